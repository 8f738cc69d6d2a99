"""The schema: counts, defaults equal to the model's, and settings without effect refused."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from shoestring.errors import RecipeError
from shoestring.recipes.architectures import MicroDiTModel
from shoestring.recipes.checks import SCHEDULERS
from shoestring.recipes.fields import parse_images
from shoestring.recipes.load import load_recipe

SMALL = Path(__file__).with_name("small.yaml")


@pytest.mark.parametrize(
    ("given", "images"),
    [
        (50_000, 50_000),
        ("50k", 50_000),
        ("5.12M", 5_120_000),
        ("512M", 512_000_000),
        ("204.8k", 204_800),
        ("1B", 10**9),
        ("1e6", 10**6),
        (2.0, 2),
        (0, 0),
    ],
)
def test_counts_of_images_are_exact(given: object, images: int) -> None:
    assert parse_images(given) == images


@pytest.mark.parametrize(
    "given", ["many", "1.5", 1.5, "-3", -3, "", None, True, "5 MB", [1], "k", float("nan")]
)
def test_what_is_no_count_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="whole number of images"):
        parse_images(given)


def test_model_section_has_the_constructors_arguments_and_defaults() -> None:
    from shoestring.models.microdit import MicroDiT

    derived = {"self", "sample_size", "in_channels", "caption_channels", "pos_interp_scale"}
    parameters = inspect.signature(MicroDiT.__init__).parameters
    of_model = {name: p.default for name, p in parameters.items() if name not in derived}
    of_recipe = {name: f.default for name, f in MicroDiTModel.model_fields.items() if name != "kind"}
    assert of_recipe == of_model


def test_a_recipe_may_ask_for_every_padding_that_text_encoders_know() -> None:
    from shoestring.models.text_encoders import PADS

    recipes = [load_recipe(SMALL, [f"data.pad={pad}"]) for pad in PADS]
    assert [(recipe.data.pad, recipe.data.padded) for recipe in recipes] == [
        ("none", False),
        ("encoder", True),
        ("masked", True),
    ]
    with pytest.raises(RecipeError, match=r"data\.pad"):
        load_recipe(SMALL, ["data.pad=zeros"])


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["phases.0.schedule=constant", "phases.0.final=0.1"], "phases.0.final"),
        (["phases.0.images=1k", "phases.0.warmup=1k"], "phases.0.warmup"),
        (["objective.prediction=velocity", "objective.weight_cap=20"], "objective.weight_cap"),
        (["train.preview_every=null", "train.preview_prompts=[a red circle]"], "train.preview_prompts"),
        (["model.num_experts=0", "optimizer.expert_lr_ratio=0.5"], "optimizer.expert_lr_ratio"),
        (["model.text_depth=0", "model.text_positions=rope"], "model.text_positions"),
        (["model.hidden_size=6", "model.head_dim=2", "model.mixer_size=6"], "model.hidden_size"),
        (["model.positions=sincos+rope", "model.head_dim=2"], "model.head_dim"),
        (["model.text_positions=rope", "model.head_dim=1"], "model.head_dim"),
        (["ema.decays=[0.9]", "phases.0.ema=null", "phases.1.ema=null"], "ema"),
        (
            ["train.grad_clip=1", "phases.0.grad_clip=2", "phases.1.grad_clip=null"],
            "train.grad_clip",
        ),
        (["ema.decays=[0.9]", "ema.start=1B"], "ema.start"),
        (
            ["train.microbatch=8", "phases.0.microbatch=4", "phases.1.microbatch=null"],
            "train.microbatch",
        ),
        (["phases.0.optimizer=fresh"], "phases.0.optimizer"),
        (["train.checkpoint_every=10k", "train.keep_every=9999"], "train.keep_every"),
    ],
)
def test_setting_without_effect_is_an_error(sets: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match=rf"^--set {key}: .+\.$"):
        load_recipe(SMALL, sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["model.hidden_size=100"],
            "model.hidden_size: 100 must be divisible by head_dim 32; nearest: 96 or 128.",
        ),
        (["model.depth=4", "model.qkv_ratio=[1, 1, 1]"], "model.qkv_ratio: 3 ratios for 4 blocks"),
        (["model.depth=4", "model.expert_blocks=[1, 4]"], "model.expert_blocks: block 4 does not exist"),
        (
            ["phases.1.name=masked", "phases.0.name=masked"],
            "phases.1.name: 'masked' is the name of an earlier",
        ),
        (["evaluation.prompts=2k"], "evaluation.prompts: 2000 prompts, but only 1024 scenes are held out"),
        (["ema.decays=[0.9, 0.9]"], "ema.decays: names a decay twice."),
        (["phases.0.size=64"], "phases.0.size: 64 px, but the scenes are made at 32 px"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(SMALL, sets)
    assert str(caught.value).startswith(f"--set {message}")


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_scheduler_that_does_not_fit_the_objective_names_those_that_do(kind: str) -> None:
    for scheduler in [
        *SCHEDULERS[kind],
        "euler",
        *(s for k, v in SCHEDULERS.items() if k != kind for s in v),
    ]:
        sets = [f"objective.kind={kind}", f"sampling.scheduler={scheduler}"]
        if scheduler in SCHEDULERS[kind]:
            assert load_recipe(SMALL, sets).sampling.scheduler == scheduler
            continue
        with pytest.raises(RecipeError) as caught:
            load_recipe(SMALL, sets)
        assert str(caught.value).endswith(f"Allowed: {', '.join(SCHEDULERS[kind])}.")


def test_a_phase_overrides_numbers_of_the_objective_alone() -> None:
    recipe = load_recipe("microdit-xl")
    assert [recipe.objective_in(phase).model_dump() for phase in recipe.phases] == [
        {"kind": "edm", "sigma_data": 0.9, "p_mean": mean, "p_std": std}
        for mean, std in [(-0.6, 1.2), (-0.6, 1.2), (0.0, 0.6), (0.0, 0.6)]
    ]
    with pytest.raises(RecipeError, match=r"phases.0.objective.p_men: no number.+Did you mean 'p_mean'\?"):
        load_recipe("microdit-xl", ["phases.0.objective.p_men=0"])
    with pytest.raises(
        RecipeError, match=r"phases.0.objective.p_std: -1.0 is not allowed: must be more than 0"
    ):
        load_recipe("microdit-xl", ["phases.0.objective.p_std=-1"])


def test_a_phase_inherits_replaces_or_drops_the_average_and_the_gradient_limit() -> None:
    sets = ["ema.decays=[0.9]", "train.grad_clip=1", "phases.1.ema=null", "phases.1.grad_clip=null"]
    recipe = load_recipe(SMALL, sets)
    assert [recipe.ema_in(phase) for phase in recipe.phases] == [recipe.ema, None]
    assert [recipe.grad_clip_in(phase) for phase in recipe.phases] == [1.0, None]


def test_a_phase_inherits_replaces_or_drops_the_microbatch() -> None:
    sets = ["train.microbatch=8", "phases.1.microbatch=null"]
    recipe = load_recipe(SMALL, sets)
    assert [recipe.microbatch_in(phase) for phase in recipe.phases] == [8, None]
    recipe = load_recipe(SMALL, ["phases.1.microbatch=4"])
    assert [recipe.microbatch_in(phase) for phase in recipe.phases] == [None, 4]


def test_checkpoints_may_be_kept_as_often_as_they_are_written() -> None:
    sets = ["train.checkpoint_every=10k", "train.keep_every=10k"]
    assert load_recipe(SMALL, sets).train.keep_every == 10_000
