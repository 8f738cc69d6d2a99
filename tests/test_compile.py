"""Compiled networks: a graph for each shape, none given up, and the same in a resumed run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring import build
from shoestring.build.compiling import compile_network, most_graphs
from shoestring.cost.ledger import Ledger
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.store import Store
from shoestring.recipes.load import load_recipe
from shoestring.recipes.schema import Recipe
from shoestring.training.checkpoint import Checkpoint
from tests.cli.conftest import run as command_line
from tests.test_build import Pictures

RECIPE = """
base: demo
name: compiled
data: {store: store, max_tokens: 8, caption_drop: 0.5}
model:
  {patch_size: 4, hidden_size: 16, depth: 2, head_dim: 8, multiple_of: 8, mixer_depth: 0, mixer_size: 768,
   num_experts: 2, expert_blocks: 2, text_depth: 0, positions: sincos, text_positions: none, qk_norm: hidden}
phases:
  - {name: annealed, size: 16, images: 30, batch: 4, lr: 1.0e-3, mask: {start: 0.75, steps: 7}}
  - {name: masked, size: 32, images: 10, batch: 4, mask: 0.5, lr: 1.0e-3, position_scale: 2, microbatch: 3}
  - {name: dense, size: 32, images: 4, batch: 4, lr: 1.0e-3, position_scale: 2}
train: {compile: true, threads: 1, log_every: 4, checkpoint_every: 12, keep: 9, preview_every: null}
ema: null
"""


class Words(Pictures):
    """Pictures whose captions have between one and eight words."""

    def rows(self, start: int, stop: int) -> Any:
        for row in super().rows(start, stop):
            yield replace(row, captions=(" ".join(["grey"] * (1 + int(row.key) % 8)),))


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """No graphs of other tests, and the limits as they were."""
    config: Any = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    config.recompile_limit, config.accumulated_recompile_limit = before
    torch._dynamo.reset()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of three phases in a folder with its store."""
    monkeypatch.chdir(tmp_path)
    settings = EncodeSettings(sizes=(16, 32), max_tokens=8)
    assert encode(Words(), tmp_path / "store", settings, log=lambda line: None) is not None
    (tmp_path / "compiled.yaml").write_text(RECIPE)
    return load_recipe("compiled.yaml")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_graphs")
def test_there_is_one_graph_for_each_shape_of_every_phase_and_one_for_all_lengths_of_text(
    recipe: Recipe,
) -> None:
    """Counted on dynamo's own graphs, run as they were captured; more than the eight it keeps by default."""
    store = Store.open("store")
    system = build.system_of(recipe, store)
    networks = system.networks(recipe.phases[0])
    parts, network = system.parts(networks), networks["transformer"]
    objective: Any = parts[0].objective
    compile_network(recipe, network, backend="eager")
    shapes: set[tuple[int, ...]] = set()
    lengths: set[int] = set()
    for plan in build.plan_phases(system, parts, Ledger("", "", 0, "", 0)):
        plan.enter()
        for number, batch in enumerate(plan.batches(0)):
            plan.advance(number * plan.batch)
            for part in batch.parts(-(-len(batch) // (plan.microbatch or 99))):
                objective(part).per_sample.mean().backward()
                rows, _, side, _ = part.latents.shape
                kept = int((side // 4) ** 2 * (1 - objective.mask))
                shapes.add((rows, side, kept, min(part.text.shape[1], 2)))
                lengths.add(part.text.shape[1])
    counters = torch._dynamo.utils.counters
    assert len(lengths) > 2
    assert counters["stats"]["unique_graphs"] == len(shapes) > 8
    assert counters["frames"]["ok"] == counters["frames"]["total"], "none was left uncompiled"
    assert not counters["graph_break"]
    assert most_graphs(recipe) >= len(shapes)


@pytest.mark.usefixtures("fresh_graphs")
def test_parts_of_a_sharded_network_count_their_graphs_together(recipe: Recipe) -> None:
    network: Any = build.system_of(recipe, Store.open("store")).networks(recipe.phases[0])["transformer"]
    compile_network(recipe, network, tuple(network.transformer_blocks), backend="eager")
    assert torch._dynamo.config.recompile_limit == 2 * most_graphs(recipe)
    assert torch._dynamo.config.accumulated_recompile_limit >= 2 * most_graphs(recipe)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.usefixtures("fresh_graphs")
def test_a_compiled_run_resumes_bit_for_bit_whatever_text_it_meets_first(recipe: Recipe) -> None:
    """Two phases through the real compiler; resumed in the second, with all graphs made anew."""
    phase = "size: {}, images: 12, batch: 4, lr: 1.0e-3, position_scale: {}"
    sets = [
        f"phases=[{{name: small, mask: 0.5, {phase.format(16, 1)}}}, {{name: large, {phase.format(32, 2)}}}]",
        *("model.depth=1", "model.num_experts=0", "train.checkpoint_every=4"),
    ]
    words = [word for each in sets for word in ("--set", each)]
    assert command_line("train", "compiled.yaml", *words) == 0
    run = Path("runs/compiled")
    shutil.copytree(run, "unbroken")
    for images in (20, 24):
        shutil.rmtree(run / f"checkpoints/{images:012d}")
    torch._dynamo.reset()
    assert command_line("train", "runs/compiled", "--resume") == 0
    assert torch._dynamo.utils.counters["frames"]["ok"] == 3, "two graphs, and one made anew"
    one, other = (
        Checkpoint(root / f"checkpoints/{24:012d}", {}).tensors() for root in (run, Path("unbroken"))
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = ("--name", "plain", "--set", "train.compile=false")
    assert command_line("train", "compiled.yaml", *words, *plain) == 0
    assert losses(run) == pytest.approx(losses(Path("runs/plain")), rel=1e-3), "as without a compiler"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]
