"""From a recipe to objects: each number arrives where it belongs, in every phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoestring import build
from shoestring.build.microdit import MicroDiTSystem, load_weights
from shoestring.cost.ledger import Ledger
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.rows import Row
from shoestring.data.store import Store
from shoestring.errors import CheckpointError, RecipeError, StoreError
from shoestring.models.microdit import MicroDiT
from shoestring.objectives.edm import EDMObjective
from shoestring.objectives.flow import FlowObjective
from shoestring.recipes.load import dump, load_recipe
from shoestring.recipes.schema import Recipe
from shoestring.storage import RunFolder, write_text
from shoestring.training.loop import PhasePlan

CPU = torch.device("cpu")
SMALL = ("model.hidden_size=32", "model.mixer_size=32", "model.depth=1", "model.head_dim=16")


def recipe(tmp_path: Path, text: str = "", *sets: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: demo\nname: small\n{text}")
    return load_recipe(path, [*SMALL, *sets])


class Pictures:
    """A source of 12 pictures."""

    words = ("pictures",)
    num_rows = 12

    def describe(self) -> dict[str, Any]:
        return {"kind": "pictures"}

    def rows(self, start: int, stop: int) -> Any:
        for n in range(start, min(stop, 12)):
            yield Row(str(n), np.full((32, 32, 3), n, dtype=np.uint8), (f"picture {n}",))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Pictures at 16 and 32 px, 4 of them held out, captions of at most 8 tokens."""
    settings = EncodeSettings(sizes=(16, 32), held_out=4, max_tokens=8)
    made = encode(Pictures(), tmp_path / "store", settings, log=lambda line: None)
    assert made is not None
    return made


def network_of(recipe: Recipe, store: Store, phase: int) -> Any:
    return build.system_of(recipe, store).networks(recipe.phases[phase])["transformer"]


def planned(recipe: Recipe, store: Store) -> tuple[Any, list[PhasePlan]]:
    """The objective of a recipe's one turn, and its phases."""
    system = build.system_of(recipe, store)
    parts = system.parts(system.networks(recipe.phases[0]))
    return parts[0].objective, build.plan_phases(system, parts, Ledger("", "", 0, "", 0))


TWO_SIZES = """
data: {store: a store}
objective: {kind: edm, sigma_data: 0.5, p_mean: -0.6}
sampling: {scheduler: edm_heun, steps: 7, guidance: 3.5, shift: 1}
phases:
  - {name: small, size: 16, images: 24, batch: 6, mask: 0.5, lr: 1.0e-3, warmup: 6}
  - {name: large, size: 32, images: 40, batch: 8, lr: 5.0e-4, schedule: cosine, final: 0.1,
     position_scale: 2, objective: {p_mean: 0.4}, ema: {decays: [0.9], start: 8}, grad_clip: 0.3}
"""


def test_initial_weights_depend_on_the_seed_alone(tmp_path: Path, store: Store) -> None:
    one = recipe(tmp_path)
    torch.manual_seed(1)
    first = network_of(one, store, 0).state_dict()
    before = torch.get_rng_state()
    again = network_of(one, store, 1).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    other = recipe(tmp_path, "seed: 1")
    third = network_of(other, store, 0).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.weight"], third["patch_embed.weight"])


def test_the_network_fits_the_store(tmp_path: Path, store: Store) -> None:
    two = recipe(tmp_path, TWO_SIZES)
    config = network_of(two, store, 1).config
    assert (config.in_channels, config.caption_channels) == (3, store.text_width)
    assert (config.sample_size, config.pos_interp_scale) == (32, 2)


def test_each_phase_sets_its_own_numbers(tmp_path: Path, store: Store) -> None:
    two = recipe(tmp_path, TWO_SIZES)
    objective, plans = planned(two, store)
    assert isinstance(objective, EDMObjective)
    network: Any = objective.trained["transformer"]
    for number, (mask, p_mean, side, scale) in enumerate(
        [(0.5, -0.6, 16, 1), (0.0, 0.4, 32, 2), (0.5, -0.6, 16, 1)]
    ):
        plans[number % 2].enter()
        assert (objective.mask, objective.p_mean, objective.sigma_data) == (mask, p_mean, 0.5)
        assert (network.config.sample_size, network.config.pos_interp_scale) == (side, scale)
        batch = next(plans[number % 2].batches(0))
        assert batch.latents.shape[-1] == side
    assert (plans[0].grad_clip, plans[1].grad_clip) == (two.train.grad_clip, 0.3)
    assert (plans[1].ema_decays, plans[1].ema_start) == ((0.9,), 8)
    assert plans[0].lr(0) < plans[0].lr(6) == pytest.approx(1e-3)
    assert plans[1].lr(40) == pytest.approx(5e-5)


ANNEALED = """
data: {store: a store, caption_drop: 0}
phases:
  - {name: annealed, size: 16, images: 24, batch: 6, mask: {start: 0.75, end: 0, steps: 4}, lr: 1.0e-3,
     microbatch: 3}
  - {name: dense, size: 16, images: 24, batch: 6, lr: 1.0e-3, optimizer: fresh}
train: {microbatch: 2}
"""


def test_an_annealed_mask_is_set_before_each_step_and_costs_what_each_ratio_does(
    tmp_path: Path, store: Store
) -> None:
    annealed = recipe(tmp_path, ANNEALED)
    objective, (plan, dense) = planned(annealed, store)
    plan.enter()
    assert objective.mask == 0.75
    seen = []
    for images in range(0, 24, 6):
        plan.advance(images)
        seen.append((objective.mask, plan.mask(images), plan.flops_per_image(images)))
    ratios = [0.75, 0.5, 0.25, 0.0]
    assert [mask for mask, _, _ in seen] == pytest.approx(ratios)
    assert [told for _, told, _ in seen] == pytest.approx(ratios)
    flops = build.phase_flops(build.system_of(annealed, store), annealed.phases[0])
    assert list(flops) == [0, 6, 12, 18]
    assert [cost for _, _, cost in seen] == list(flops.values())
    assert list(flops.values()) == sorted(flops.values()), "fewer operations, the more is masked"
    assert flops[18] == dense.flops_per_image(0)
    entry = plan.cost()
    assert (entry.mask, entry.mask_end, dense.cost().mask_end) == (0.75, 0.0, None)  # type: ignore[attr-defined]
    assert (plan.microbatch, dense.microbatch) == (3, 2)
    assert (plan.fresh_optimizer, dense.fresh_optimizer) == (False, True)


def test_a_mask_that_leaves_too_little_of_the_stores_pictures_is_refused(
    tmp_path: Path, store: Store
) -> None:
    """Of 16 px and patches of 4 there are 16; the recipe alone cannot know, as sizes of latents differ."""
    text = f"data: {{store: {store.path}, autoencoder: pixels, max_tokens: 8}}"
    asked = recipe(tmp_path, text, "phases.0.size=16", "phases.1.size=16", "phases.0.mask=0.9")
    assert build.open_store(asked, device=CPU, log=print).path == store.path
    bare = asked.model_copy(
        update={"phases": tuple(each.model_copy(update={"mask": 0.95}) for each in asked.phases)}
    )
    with pytest.raises(
        RecipeError, match=r"recipe small, phases\.0\.mask: 0\.95 leaves none of the 16 patches of 16 px"
    ):
        build.open_store(bare, device=CPU, log=print)


def test_phases_go_on_in_the_data_where_the_last_one_stopped(tmp_path: Path, store: Store) -> None:
    """Positions count through the run, also from the middle of a phase; the last batch is short."""
    two = recipe(tmp_path, TWO_SIZES, "phases.1.images=20")
    _, plans = planned(two, store)
    seen = [int(i) for plan in plans for batch in plan.batches(0) for i in batch.index]
    assert seen == list(range(44))
    assert [len(batch) for batch in plans[1].batches(0)] == [8, 8, 4]
    assert [int(i) for batch in plans[1].batches(8) for i in batch.index] == list(range(32, 44))


WIDE = {
    "in_channels": 3,
    "caption_channels": 64,
    "patch_size": 4,
    "hidden_size": 32,
    "depth": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"depth": 3}, "model.depth is 3 there, 2 here. Use the `model` section"),
        ({"in_channels": 4}, "the number of latent channels (the autoencoder) is 4 there, 3 here."),
        ({"caption_channels": 32}, "the width of text (the text encoder) is 32 there, 64 here."),
        (
            {"head_dim": 32, "text_depth": 2},
            "model.head_dim is 32 there, 16 here; model.text_depth is 2 there, 1",
        ),
        ({"head_dim": 32}, "model.head_dim is 32 there, 16 here."),  # of the same shapes, and another network
        ({"positions": "sincos+rope"}, "model.positions is sincos+rope there, sincos here."),
        ({"mlp_ratio": (1.0, 2.0)}, "model.mlp_ratio is (1.0, 2.0) there, (0.5, 4.0) here."),
    ],
)
def test_init_from_another_network_names_what_differs(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    common = {**WIDE, "multiple_of": 8, "mixer_depth": 0, "num_experts": 0}
    MicroDiT(**{**common, **change}).save_pretrained(tmp_path / "transformer")
    with pytest.raises(CheckpointError) as caught:
        load_weights(MicroDiT(**common), str(tmp_path))
    assert str(caught.value).startswith(f"init {tmp_path}: not the recipe's network: {told}")


def test_init_serves_any_resolution_position_scale_and_expert_capacity(tmp_path: Path) -> None:
    common = {**WIDE, "multiple_of": 8, "mixer_depth": 0, "num_experts": 2}
    other = MicroDiT(**common, sample_size=8)
    torch.nn.init.normal_(other.proj_out.weight)
    other.half().save_pretrained(tmp_path / "transformer")  # in any number type
    mine = MicroDiT(**common, sample_size=32, pos_interp_scale=2.0, expert_capacity=1.0)
    load_weights(mine, str(tmp_path))
    assert {tensor.dtype for tensor in mine.state_dict().values()} == {torch.float32}
    pairs = zip(mine.state_dict().values(), other.float().state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (mine.config.sample_size, mine.config.pos_interp_scale) == (32, 2.0)


def test_flow_numbers_arrive_too(tmp_path: Path, store: Store) -> None:
    one = recipe(tmp_path, "", "objective.shift=0.7", "objective.weight_cap=9", "data.caption_drop=0.25")
    objective, _ = planned(one, store)
    assert isinstance(objective, FlowObjective)
    assert (objective.shift, objective.weight_cap, objective.caption_drop) == (0.7, 9, 0.25)
    assert objective.prediction == "x0"


def test_the_pipeline_reads_captions_as_the_store_did(tmp_path: Path, store: Store) -> None:
    two = recipe(tmp_path, TWO_SIZES)
    network, system = network_of(two, store, 0), build.system_of(two, store)
    assert isinstance(system, MicroDiTSystem)
    pipeline = system.pipeline({"transformer": network})
    assert pipeline.transformer is network, "shared: previews show the weights of now"
    config = pipeline.config
    assert (config.prediction, config.text_pad, config.max_tokens) == ("edm", "none", 8)
    assert (config.default_steps, config.default_guidance) == (7, 3.5)
    assert type(pipeline.scheduler).__name__ == "EDMHeunScheduler"
    assert pipeline.scheduler.config.sigma_data == 0.5
    text, mask, *_ = pipeline.encode_prompt(["word " * 20, "picture 3"])
    assert text.shape[1] == 8
    row = next(i for i in range(12) if store.captions(i) == ["picture 3"])
    (stored,) = store.text(np.array([row]))
    assert mask is not None
    assert torch.allclose(text[1][mask[1]], stored, atol=2e-3), "but for the store's half precision"


def test_a_store_with_other_encoders_is_refused(tmp_path: Path, store: Store) -> None:
    for sets, message in (
        (("data.max_tokens=64",), "made with the max tokens 8, the recipe asks for 64"),
        (("data.text_encoder=hashing@v2",), "the recipe asks for hashing@v2"),
        (("phases.0.size=64",), "holds images of 16, 32 pixels, not 64"),
    ):
        asked = recipe(tmp_path, "", f"data.store={store.path}", *sets)
        with pytest.raises(StoreError, match=message):
            build.open_store(asked, device=CPU, log=print)


def test_scenes_are_made_once_and_again_only_when_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    sets = ("data.scenes.images=20", "data.scenes.held_out=4", "evaluation.prompts=4")
    first = build.open_store(recipe(tmp_path, "", *sets), device=CPU, log=said.append)
    again = build.open_store(recipe(tmp_path, "", *sets, "seed=5"), device=CPU, log=said.append)
    assert first.path == again.path
    assert said == [f"Making 20 scenes of 32 px into {first.path}"]
    other = build.open_store(recipe(tmp_path, "", *sets, "data.scenes.seed=1"), device=CPU, log=said.append)
    assert other.path != first.path


def test_who_may_use_a_run_folder(tmp_path: Path) -> None:
    one, run = recipe(tmp_path), RunFolder(tmp_path / "run")
    build.check_claim(one, run, resume=False)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        build.check_claim(one, run, resume=True)
    write_text(run.recipe, dump(one))
    build.check_claim(one, run, resume=True)
    with pytest.raises(CheckpointError, match="a run of this name already"):
        build.check_claim(one, run, resume=False)
    with pytest.raises(RecipeError, match=r"changed since the run began: phases\.0\.lr: 0\.002 -> 0\.1"):
        build.check_claim(recipe(tmp_path, "", "phases.0.lr=0.1"), run, resume=True)


def test_previews_are_of_held_out_captions(store: Store) -> None:
    captions = build.held_out_captions(store, 3)
    rows = store.splits["held_out"].rows(np.arange(3))
    assert captions == [store.captions(int(row))[0] for row in rows]
    assert len(build.held_out_captions(store, 8)) == 4
