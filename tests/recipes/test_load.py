"""Loading: one base, layers, `--set`, errors in one line, and a dump that reads back equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shoestring.errors import RecipeError
from shoestring.recipes.load import builtin_names, changed_keys, describe, dump, load_recipe, load_stages
from shoestring.recipes.schema import FREE_KEYS, ROUNDING_KEYS, Recipe

SMALL = Path(__file__).with_name("small.yaml")


def child(folder: Path, text: str, *sets: str, name: str = "mine.yaml") -> Recipe:
    """The recipe of a file with this text."""
    (folder / name).write_text(text)
    return load_recipe(folder / name, sets)


def error_of(folder: Path, text: str, *sets: str) -> str:
    with pytest.raises(RecipeError) as caught:
        child(folder, text, *sets)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", builtin_names())
def test_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    for stage, recipe in load_stages(name).items():
        assert recipe.name == (f"{name}-{stage}" if stage else name)
        assert child(tmp_path, dump(recipe)) == recipe
    assert describe(name)


def test_deltas_are_short() -> None:
    from importlib import resources

    for name in builtin_names():
        text = (resources.files("shoestring.recipes") / "builtin" / f"{name}.yaml").read_text()
        assert "\nbase:" not in text or len(text.splitlines()) <= 20


def test_microdit_xl_is_the_published_training() -> None:
    """Steps of 2,048 images, rates and masks of the authors' four configuration files."""
    recipe = load_recipe("microdit-xl")
    steps = [(p.name, p.size, p.images / p.batch, p.mask, p.lr, p.warmup / p.batch) for p in recipe.phases]
    assert steps == [
        ("masked-256", 256, 250_000, 0.75, 2.4e-4, 2_500),
        ("dense-256", 256, 30_000, 0.0, 8e-5, 0),
        ("masked-512", 512, 50_000, 0.75, 8e-5, 500),
        ("dense-512", 512, 5_000, 0.0, 8e-5, 0),
    ]
    emas = [recipe.ema_in(phase) for phase in recipe.phases]
    assert emas[:2] == [None, None]
    averaged = [(ema.decays, ema.start / 2048) for ema in emas if ema]
    assert averaged == [((0.99975,), 25_000), ((0.9975,), 1_000)]
    assert [p.position_scale for p in recipe.phases] == [1, 1, 2, 2]
    assert [recipe.grad_clip_in(p) for p in recipe.phases] == [0.25, 0.25, 0.5, 0.5]
    first = recipe.phases[0]
    assert first.schedule == "cosine"
    assert first.final == 0.33
    assert (recipe.data.pad, recipe.data.max_tokens, recipe.data.caption_drop) == ("encoder", 77, 0.1)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.betas) == (0.1, (0.9, 0.999))
    assert (recipe.sampling.scheduler, recipe.sampling.steps, recipe.sampling.guidance) == ("edm_heun", 30, 5)


@pytest.mark.parametrize("name", ["wuerstchen-v2", "wuerstchen-microdit"])
def test_wuerstchen_reads_clip_as_its_authors_did(name: str) -> None:
    """Told its padding, all 77 states kept; Stage A reads no captions."""
    read = {stage: (r.data.pad, r.data.max_tokens) for stage, r in load_stages(name).items()}
    assert read == {"a": ("none", None), "b": ("masked", 77), "c": ("masked", 77)}


@pytest.mark.parametrize(("name", "millions"), [("microdit-xl", 1165.4), ("microdit-tiny", 200.7)])
def test_published_models_have_the_published_size(name: str, millions: float) -> None:
    import torch

    from shoestring.models.microdit import MicroDiT

    with torch.device("meta"):
        model = MicroDiT(**load_recipe(name).model.model_dump(exclude={"kind"}))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_a_layer_changes_only_what_it_names(tmp_path: Path) -> None:
    recipe = child(
        tmp_path, f"base: {SMALL}\nmodel: {{depth: 3}}\nphases: {{1: {{lr: 1e-4}}}}", "train.keep=5"
    )
    assert changed_keys(load_recipe(SMALL), recipe) == [
        "name: 'small' -> 'mine'",
        "model.depth: 5 -> 3",
        "phases.1.lr: 0.002 -> 0.0001",
        "train.keep: 2 -> 5",
    ]


def test_base_is_a_name_or_a_path_beside_the_file(tmp_path: Path) -> None:
    child(tmp_path, f"base: {SMALL}\nseed: 3", name="parent.yaml")
    recipe = child(tmp_path, "base: parent.yaml\nname: other")
    assert (recipe.seed, recipe.name) == (3, "other")


def test_store_and_scenes_displace_each_other(tmp_path: Path) -> None:
    recipe = child(tmp_path, f"base: {SMALL}\ndata: {{store: mine}}")
    assert (recipe.data.store, recipe.data.scenes) == ("mine", None)
    back = child(tmp_path, f"base: {SMALL}\ndata: {{store: mine}}", "data.scenes={images: 3k, size: 32}")
    assert back.data.store is None
    assert back.data.scenes is not None
    assert back.data.scenes.images == 3_000
    both = "data: {store: a, scenes: {images: 3k}}"
    assert error_of(tmp_path, f"base: {SMALL}\n{both}") == (
        "recipe mine.yaml, data: has both store and scenes. Keep one of them."
    )
    assert error_of(tmp_path, f"base: {SMALL}", "data.store=a", "data.scenes.images=3").startswith(
        "--set data: has both"
    )
    assert "needs either `store`" in error_of(tmp_path, f"base: {SMALL}\ndata: {{scenes: null}}")


def test_another_kind_replaces_the_whole_section(tmp_path: Path) -> None:
    recipe = child(tmp_path, "base: microdit-xl\noptimizer: {kind: muon}")
    assert recipe.optimizer.weight_decay == 0.0  # not microdit-xl's 0.1
    same = child(tmp_path, "base: microdit-xl\noptimizer: {kind: adamw, eps: 1e-6}")
    assert (same.optimizer.weight_decay, same.optimizer.eps) == (0.1, 1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {depht: 3}", "recipe mine.yaml, model.depht: unknown key. Did you mean 'depth'?"),
        ("modle: {}", "recipe mine.yaml, modle: unknown key. Did you mean 'model'?"),
        ("phases: {0: {bath: 3}}", "recipe mine.yaml, phases.0.bath: unknown key. Did you mean 'batch'?"),
        ("objective: {sift: 1}", "recipe mine.yaml, objective.sift: unknown key. Did you mean 'shift'?"),
        (
            "model: {depth: twelve}",
            "recipe mine.yaml, model.depth: 'twelve' is not allowed: must be a whole number.",
        ),
        ("model: {depth: yes}", "recipe mine.yaml, model.depth: True is not allowed: must be a number."),
        ("model: 3", "recipe mine.yaml, model: 3 is not allowed: must be a section of keys and values."),
        (
            "model: {qkv_ratio: [a]}",
            "recipe mine.yaml, model.qkv_ratio.0: 'a' is not allowed: must be a number.",
        ),
        ("sampling: {steps: 0}", "recipe mine.yaml, sampling.steps: 0 is not allowed: must be at least 1."),
        ("sampling: {steps: -4}", "recipe mine.yaml, sampling.steps: -4 is not allowed: must be at least 1."),
        (
            "train: {dtype: bf16}",
            "recipe mine.yaml, train.dtype: 'bf16' is unknown. Did you mean 'bfloat16'?",
        ),
        (
            "train: {dtype: half}",
            "recipe mine.yaml, train.dtype: 'half' is unknown. Allowed: auto, float32, bfloat16.",
        ),
        (
            "objective: {kind: ddpm}",
            "recipe mine.yaml, objective: kind 'ddpm' is unknown. Allowed: edm, flow, "
            "reconstruction, decoder, prior, noise, distillation, lcm.",
        ),
        (
            "optimizer: {betas: [0.9]}",
            "recipe mine.yaml, optimizer.betas: [0.9] is not allowed: has too few items.",
        ),
        ("phases: {7: {lr: 1}}", "recipe mine.yaml, phases.7: no such item. phases has items 0 to 1."),
        ("phases: []", "recipe mine.yaml, phases: [] is not allowed: must not be empty."),
        ("name: a/b", "recipe mine.yaml, name: 'a/b' is not allowed: must be letters, digits"),
        ("seed: 1\nseed: 2", "recipe mine.yaml, line 3: not valid YAML (key seed is given twice)."),
        ("seed: [", "recipe mine.yaml, line 3: not valid YAML ("),
    ],
)
def test_mistake_in_a_file_names_file_key_and_cure(text: str, message: str, tmp_path: Path) -> None:
    assert error_of(tmp_path, f"base: {SMALL}\n{text}\n").startswith(message)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train", "--set train: not an assignment. Write key=value"),
        ("=3", "--set =3: not an assignment."),
        ("train..keep=3", "--set train..keep=3: not an assignment."),
        ("model.depht=3", "--set model.depht: unknown key. Did you mean 'depth'?"),
        ("phases.x.lr=3", "--set phases.x: no such item."),
        ("train.trackers=[1", "--set train.trackers=[1: '[1' is not valid YAML."),
        ("base=demo", "--set base=demo: base cannot be set."),
    ],
)
def test_mistake_in_an_assignment_names_it(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(SMALL, [assignment])
    assert str(caught.value).startswith(message)


def test_assignments_take_yaml_values() -> None:
    sets = [
        "phases.0.images=3k",
        "phases.0.lr=1e-4",
        "train.trackers=[wandb]",
        "ema=null",
        "model.use_bias=true",
    ]
    recipe = load_recipe(SMALL, sets)
    first = recipe.phases[0]
    assert (first.images, first.lr, recipe.train.trackers) == (3_000, 1e-4, ("wandb",))
    assert recipe.ema is None
    assert recipe.model.use_bias is True


@pytest.mark.parametrize("name", ["dmo", "nothing.yaml", "no/such/recipe.yaml"])
def test_missing_recipe_lists_the_built_in_ones(name: str) -> None:
    with pytest.raises(RecipeError, match=", ".join(builtin_names())):
        load_recipe(name)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    assert (
        error_of(tmp_path, "")
        == "recipe mine.yaml: must be a mapping of keys such as data, model and phases."
    )
    assert "missing" in error_of(tmp_path, "name: x")
    assert "mine.yaml -> mine.yaml" in error_of(tmp_path, "base: mine.yaml")
    assert error_of(tmp_path, "base: [demo]").startswith("recipe mine.yaml, base: ['demo'] is not allowed")
    assert error_of(tmp_path, "base: dmo").startswith("recipe mine.yaml, base: recipe ")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot be read|not valid YAML"):
        load_recipe(tmp_path / "binary.yaml")


def test_equal_recipes_have_no_changed_keys() -> None:
    assert changed_keys(load_recipe(SMALL), load_recipe(SMALL)) == []
    changed = changed_keys(load_recipe(SMALL), load_recipe(SMALL, ["ema=null"]))
    assert all(line.startswith("ema.") and line.endswith("-> None") for line in changed)


def test_keys_that_may_change_are_told_apart_from_those_that_are_learned_by() -> None:
    old = load_recipe(SMALL)
    sets = [
        *("parallel.kind=fsdp2", "phases.1.microbatch=4", "train.keep=5", "evaluation.seeds=7"),
        *("phases.1.lr=1", "train.grad_clip=7", "train.dtype=float32", "sampling.guidance=9"),
    ]
    new = load_recipe(SMALL, sets)
    assert [line.split(":")[0] for line in changed_keys(old, new, but=FREE_KEYS)] == [
        *("phases.1.lr", "train.grad_clip", "train.dtype", "sampling.guidance")
    ]
    rounding = {line.split(":")[0] for line in changed_keys(old, new, only=ROUNDING_KEYS)}
    assert {"parallel.kind", "phases.1.microbatch"} <= rounding
    assert all(key.startswith("parallel.") or key == "phases.1.microbatch" for key in rounding)
    assert set(ROUNDING_KEYS) < set(FREE_KEYS)


FSDP2 = ["parallel.kind=fsdp2"]


@pytest.mark.parametrize("pattern", FREE_KEYS)
def test_every_pattern_of_free_keys_names_a_key(pattern: str) -> None:
    recipe = load_stages("wuerstchen-demo")["b"] if "vqgan" in pattern else load_recipe(SMALL, FSDP2)
    place = [yaml.safe_load(dump(recipe))]
    for part in pattern.split("."):
        place = (
            [each[part] for each in place]
            if part != "*"
            else [inner for each in place for inner in (each.values() if isinstance(each, dict) else each)]
        )
    assert place


def test_recipes_load_without_torch() -> None:
    code = """
import sys
from shoestring.recipes.load import load_recipe
load_recipe("demo")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
