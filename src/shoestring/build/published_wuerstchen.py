"""The authors' Würstchen checkpoints made into pipeline folders, with the text encoders that belong to them.

model_v2_stage_b.pt    decoder/, compressor/
vqgan_f4_v1_500k.pt    vqgan/
model_v2_stage_c*.pt   prior/; beside the others prior_prior/, as diffusers calls it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers import DDPMWuerstchenScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from shoestring.data.store import split_revision
from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.quiet import no_bars
from shoestring.models.text_encoders import load_text_encoder
from shoestring.models.wuerstchen_published import PUBLISHED_FILES, STAGES, recognise, stages_in
from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from shoestring.pipelines.wuerstchen_prior import WuerstchenPriorPipeline
from shoestring.pipelines.wuerstchen_published import check_widths, combine, network_of
from shoestring.runtime import DTYPES
from shoestring.storage import atomic_path

TEXT_ENCODERS = {
    "prior": ("text_encoder", "warp-ai/wuerstchen-prior"),  # CLIP bigG
    "decoder": ("decoder_text_encoder", "warp-ai/wuerstchen"),  # CLIP-H
}
"""Stage that reads text -> (the option that names its text encoder, where the authors' lies)."""


@dataclass(frozen=True)
class Stage:
    """A network read from a file, and what was taken as published because the file does not say it."""

    network: ModelMixin
    file: Path
    assumed: tuple[str, ...]


def holds_stages(tree: Any) -> bool:
    """Whether a checkpoint's containers hold any stage of Würstchen, of whatever version."""
    try:
        return bool(stages_in(tree))
    except CheckpointError:  # it holds several
        return True


def read_stages(
    trees: Mapping[Path, Any],
    *,
    part: str | None = None,
    dtype: str = "float32",
    head_dim: int | None = None,
) -> dict[str, Stage]:
    """The stages in checkpoints, {stage: network}; `part` takes one place of a file that holds several.

    Raises `CheckpointError` for another version, a stage that is there twice, stages of different trainings,
    and files without any.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: unknown. Use {', '.join(DTYPES)}.")
    stages: dict[str, Stage] = {}
    for path, tree in trees.items():
        try:
            found = stages_in(tree, part)
            if not found:
                raise CheckpointError("no stage of Würstchen in it. Leave it out.")
            for name, values in found.items():
                if name in stages:
                    raise CheckpointError(
                        f"holds {STAGES[name]}, and so does {stages[name].file}. Leave one out."
                    )
                published = recognise(name, values, head_dim=head_dim)
                network = cast(ModelMixin, network_of(published, DTYPES[dtype]))
                stages[name] = Stage(network, path, published.assumed)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    _check_together(stages)
    return {name: stages[name] for name in STAGES if name in stages}


def make_pipeline(
    stages: Mapping[str, Stage], given: Mapping[str, str]
) -> tuple[DiffusionPipeline, dict[str, str]]:
    """A pipeline of the stages (Stage C's, Stage B and A's, or all) and the text encoders it has, by option.

    `given` has folders or hub ids for options of `TEXT_ENCODERS`; else the authors' are taken. Raises
    `RecipeError` for stages that make no pipeline, for text encoders that no stage needs or that are nowhere.
    """
    if missing := _missing(stages):
        raise RecipeError(missing)
    needed = {option: default for stage, (option, default) in TEXT_ENCODERS.items() if stage in stages}
    for option in given.keys() - needed.keys():
        raise RecipeError(f"--{option.replace('_', '-')}: has no effect without its stage. Leave it out.")
    names = {option: given.get(option, default) for option, default in needed.items()}
    prior = decoder = None
    if "prior" in stages:
        prior = WuerstchenPriorPipeline(
            **_text(names["text_encoder"]), prior=stages["prior"].network, scheduler=DDPMWuerstchenScheduler()
        )
        check_widths(names["text_encoder"], prior)
    if "decoder" in stages:
        decoder = WuerstchenDecoderPipeline(
            **_text(names["decoder_text_encoder"]),
            decoder=stages["decoder"].network,
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=stages["vqgan"].network,
            compressor=stages["compressor"].network if "compressor" in stages else None,
        )
        check_widths(names["decoder_text_encoder"], decoder)
    pipeline = combine("these files", decoder, prior) if prior and decoder else prior or decoder
    return cast(DiffusionPipeline, pipeline), names


def write_stages(stages: Mapping[str, Stage], out: Path) -> None:
    """Save the networks alone, each in the folder of its stage."""
    with atomic_path(out) as aside, no_bars():
        for name, stage in stages.items():
            stage.network.save_pretrained(aside / name)


def _missing(stages: Mapping[str, Stage]) -> str | None:
    """What to do about stages that make no pipeline; None where they make one."""
    if "decoder" in stages and "vqgan" not in stages:
        return _lacking("decoder", "vqgan")
    if "prior" in stages and "decoder" not in stages and len(stages) > 1:
        return _lacking(next(name for name in stages if name != "prior"), "decoder")
    return None


def _check_together(stages: Mapping[str, Stage]) -> None:
    """Raise `CheckpointError` for Stable Cascade's compressor beside v2's Stage B or C."""
    compressor = stages.get("compressor")
    others = [stages[name] for name in ("decoder", "prior") if name in stages]
    v2 = PUBLISHED_FILES["compressor"]
    if compressor and others and not cast(Any, compressor.network).config["affine"]:
        raise CheckpointError(
            f"{compressor.file}: the compressor of Stable Cascade (its norm has no scale and shift); "
            f"{others[0].file} is of Würstchen v2 and knows other codes. Use that of {v2}."
        )


def _lacking(there: str, missing: str) -> str:
    return (
        f"{STAGES[there]} makes no pipeline without {STAGES[missing]}: give {PUBLISHED_FILES[missing]} too, "
        "or write the networks alone with --no-encoders."
    )


def _text(name: str) -> dict[str, Any]:
    """A text encoder and its tokenizer, as a pipeline takes them."""
    place, revision = split_revision(name)
    try:
        # Only for "main" does transformers look for the safetensors that the hub's bot made of a .bin file.
        encoder = load_text_encoder(
            place, pad="masked", revision=revision or (None if Path(place).exists() else "main")
        )
    except RecipeError as error:
        raise RecipeError(f"{error} Or write the networks alone with --no-encoders.") from error
    return {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
