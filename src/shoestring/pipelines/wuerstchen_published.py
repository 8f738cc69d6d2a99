"""Published Würstchen repositories as our pipelines, though diffusers no longer opens them.

    warp-ai/wuerstchen          decoder/ vqgan/ scheduler/ text_encoder/ tokenizer/   Stage B and A
    warp-ai/wuerstchen-prior    prior/ scheduler/ text_encoder/ tokenizer/            Stage C
    stabilityai/stable-cascade  the parts of the first, of another Stage B            Stage A is the same

An index (model_index.json) names a library and a class for each part. These name `wuerstchen`, a module that
diffusers has moved away; what diffusers 0.42 itself writes names `diffusers`, which has no such class at its
top. Here the class alone decides: Würstchen's networks are ours, the rest is diffusers' and transformers'.
Parts are loaded one by one, from safetensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import is_accelerate_available
from huggingface_hub import ModelCard
from torch import nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.checkpoint_files import SUFFIXES, read_checkpoint
from shoestring.models.hub import fetch_file, fetch_folder, first_line
from shoestring.models.microdit import load_strictly
from shoestring.models.quiet import muted, no_bars
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.models.wuerstchen_published import PUBLISHED_FILES, STAGES, Published, recognise, stages_in
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.pipelines.wuerstchen import WuerstchenCombinedPipeline
from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from shoestring.pipelines.wuerstchen_prior import WuerstchenPriorPipeline

NETWORKS: dict[str, Any] = {
    "prior": WuerstchenPrior,
    "decoder": WuerstchenDiffNeXt,
    "vqgan": PaellaVQModel,
    "compressor": SemanticCompressor,
}
"""Stage, as `stages_in` names it -> its class."""

PIPELINES: dict[str, Any] = {
    "WuerstchenPriorPipeline": WuerstchenPriorPipeline,
    "WuerstchenDecoderPipeline": WuerstchenDecoderPipeline,
    "WuerstchenCombinedPipeline": WuerstchenCombinedPipeline,
}

_CLASSES = {network.__name__: network for network in NETWORKS.values()}
_CASCADE = ("StableCascadeDecoderPipeline", "StableCascadeCombinedPipeline")
_LOADABLE = (
    ModelMixin,
    SchedulerMixin,
    transformers.PreTrainedModel,
    transformers.PreTrainedTokenizerBase,
    transformers.ImageProcessingMixin,
)
_FILES = ("*.json", "*.txt", "*.safetensors")
_VARIANTS = "*/*.*.safetensors"


def is_published(index: Mapping[str, Any]) -> bool:
    """Whether an index has networks of Würstchen under the name of a library that has none."""
    return any(
        name in _CLASSES and not library.startswith("shoestring.") for library, name in _parts(index).values()
    )


def load_published(
    name: str,
    index: Mapping[str, Any],
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    **given: Any,
) -> DiffusionPipeline:
    """The pipeline of one published repository, or of a local copy, as its index (`model_index.json`) says.

    `variant` names the files to read where there are such, as in `model.fp16.safetensors`. `given` are parts
    that take the place of the repository's (None leaves an optional one out) and settings of the pipeline.
    Raises `CheckpointError` for parts that are missing, damaged or of another stage.
    """
    kind = str(index.get("_class_name"))
    pipeline_class = PIPELINES.get(kind) or (getattr(diffusers, kind) if kind in _CASCADE else None)
    if pipeline_class is None:
        raise CheckpointError(f"{name}: its index names {kind}. Known: {', '.join([*PIPELINES, *_CASCADE])}.")
    known = _arguments(pipeline_class).keys()
    if unknown := sorted(given.keys() - known):
        raise RecipeError(
            f"{unknown[0]}: no keyword for a published Würstchen. Use prior, dtype, revision, variant, or a "
            f"part or setting of the pipeline: {', '.join(sorted(known))}."
        )
    wanted = {part: class_name for part, (_, class_name) in _parts(index).items() if part not in given}
    folder = _folder(name, list(wanted), revision, variant)
    if variant and not any(folder.glob(f"*/*.{variant}*.safetensors")):
        raise CheckpointError(f"{name}: has no files of the variant {variant!r}. Leave it out.")
    parts = {part: _load_part(name, folder / part, wanted[part], dtype, variant) for part in wanted}
    settings = {key: value for key, value in index.items() if key in known and key not in _parts(index)}
    with muted("diffusers.pipelines.pipeline_utils"):  # that Stable Cascade's is no longer maintained
        pipeline: DiffusionPipeline = pipeline_class(**{**settings, **parts, **given})
    check_widths(name, pipeline)
    pipeline.register_to_config(_name_or_path=name)
    return pipeline


def combine(
    name: str, decoder: WuerstchenDecoderPipeline, prior: DiffusionPipeline
) -> WuerstchenCombinedPipeline:
    """Stage C and Stages B and A as one pipeline. Raises `CheckpointError` where they do not fit together."""
    check_prior("given", type(prior).__name__)
    if isinstance(prior, WuerstchenCombinedPipeline):
        prior = prior.prior_pipe
    pads = [stage.config.text_pad for stage in (prior, decoder)]
    if decoder.text_encoder is not None and pads[0] != pads[1]:
        raise CheckpointError(
            f"{name}: its decoder reads text padded as {pads[1]!r}, the prior as {pads[0]!r}, and a pipeline "
            "has one padding. Load the decoder without text (text_encoder=None, tokenizer=None)."
        )
    theirs = prior.components
    parts = {f"prior_{part}": theirs[part] for part in ("tokenizer", "text_encoder", "prior", "scheduler")}
    parts |= decoder.components | {"previewer": prior.previewer or decoder.previewer}
    config = decoder.config
    settings = {
        "latent_dim_scale": config.latent_dim_scale,
        "null_tokens": config.null_tokens,
        "decoder_steps": config.default_steps,
        "decoder_latents_of": config.latents_of,
    }
    try:
        pipeline = WuerstchenCombinedPipeline(**parts, **settings, **_told(prior))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    pipeline.register_to_config(_name_or_path=name)
    return pipeline


def _told(prior: WuerstchenPriorPipeline) -> dict[str, Any]:
    """Stage C's settings that are not its class's defaults, since stages joined have another for guidance."""
    taken = _arguments(WuerstchenCombinedPipeline).keys() - prior.components.keys()
    defaults = {name: each for name, each in _arguments(WuerstchenPriorPipeline).items() if name in taken}
    return {name: prior.config[name] for name in defaults if prior.config[name] != defaults[name]}


def _arguments(kind: Any) -> dict[str, Any]:
    """A pipeline's parts and settings with their defaults."""
    return {name: each.default for name, each in inspect.signature(kind).parameters.items()}


def check_prior(name: str, kind: str) -> None:
    """Raise `CheckpointError` unless `kind` is a class of pipelines that have a Stage C of ours."""
    if kind in (WuerstchenPriorPipeline.__name__, WuerstchenCombinedPipeline.__name__):
        return
    if "StableCascade" in kind:
        kind += " (Würstchen v3), whose codes v2's Stage B does not know"
    raise CheckpointError(
        f"prior {name}: is a {kind}. Give a WuerstchenPriorPipeline, such as warp-ai/wuerstchen-prior."
    )


def find_prior(name: str, revision: str | None = None) -> str:
    """Where Stage C of a published Stage B lies: beside it, where its model card says, or at NAME-prior.

    Raises `CheckpointError` where a local copy has none beside it and its card names none.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _named_by_card(name, revision) or f"{name}-prior"
    own = folder.resolve()
    beside = own.with_name(f"{own.name}-prior")
    if beside.is_dir():
        return str(beside)
    if named := _named_by_card(name, revision):
        return named
    raise CheckpointError(f"{name}: {missing_prior(name)}")


def missing_prior(name: str) -> str:
    """What to do about a Stage B without Stage C."""
    place = f" to {name}-prior" if Path(name).is_dir() else ""
    return (
        f"holds Stage B and A; there is no Stage C. Download warp-ai/wuerstchen-prior{place}, or give "
        "load(..., prior=FOLDER or HUB_ID); with prior=None the decoder is loaded alone."
    )


def load_vqgan(
    path_or_id: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> PaellaVQModel:
    """Stage A of Würstchen or Stable Cascade: of a repository, a folder, or a file (.pt, .safetensors).

    A repository or folder holds the network itself or has it in `vqgan/`. Its configuration says by what
    latents are divided (`scale_factor`); a file has none, and the published 0.3764 is taken. Raises
    `CheckpointError` where there is no Stage A.
    """
    path = Path(path_or_id)
    if path.is_file() or (path.suffix in SUFFIXES and not path.is_dir()):
        return network_of(_stage_in(path, "vqgan"), dtype)  # type: ignore[return-value]
    found, problem = {}, "its config.json names no class"
    for subfolder in ("vqgan", None):
        try:
            with no_bars():
                found = PaellaVQModel.load_config(path_or_id, subfolder=subfolder, revision=revision)
        except (OSError, ValueError) as error:
            problem = first_line(error)
            continue
        if found.get("_class_name") == PaellaVQModel.__name__:
            return _load_network(
                str(path_or_id), path_or_id, PaellaVQModel, dtype, subfolder=subfolder, revision=revision
            )
    reason = f"it holds a {found['_class_name']}" if found.get("_class_name") else problem
    raise CheckpointError(
        f"{path_or_id}: no Stage A there ({reason}). Give a folder or hub id with vqgan/, such as "
        f"warp-ai/wuerstchen, or a file such as {PUBLISHED_FILES['vqgan']}."
    )


def network_of(found: Published, dtype: torch.dtype | None = None) -> nn.Module:
    """The network of a recognised state dict, around its tensors, in evaluation mode; `dtype` None: theirs.

    Raises `CheckpointError` where a name or shape is not of the sizes that were read off the others.
    """
    with torch.device("meta"):
        network: nn.Module = NETWORKS[found.stage](**found.config)
    state = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in found.state.items()
    }
    load_strictly(network, state, assign=True)
    return network.eval()


def check_widths(name: str, pipeline: DiffusionPipeline) -> None:
    """Raise `CheckpointError` for a text encoder whose tokens are not what the network beside it takes."""
    parts = pipeline.components
    for encoder, network, width in (
        ("text_encoder", "prior", "c_cond"),
        ("text_encoder", "decoder", "clip_embd"),
        ("prior_text_encoder", "prior_prior", "c_cond"),
    ):
        text, taker = parts.get(encoder), parts.get(network)
        made = getattr(getattr(text, "config", None), "hidden_size", None)
        if made is None or type(taker) not in _CLASSES.values() or made == taker.config[width]:
            continue
        raise CheckpointError(
            f"{name}: the {encoder} makes tokens {made} wide, the {network} takes {taker.config[width]}. "
            "They are not of one stage: Stage C reads CLIP bigG (1280), Stage B CLIP-H (1024)."
        )


# --- parts -----------------------------------------------------------------------------------------------


def _parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """{part: (library, class)} of an index; the class is None for a part that is left out."""
    found = {}
    for part, value in index.items():
        if isinstance(value, (list, tuple)) and len(value) == 2 and part.isidentifier():
            library, class_name = value
            if class_name is None or (isinstance(library, str) and isinstance(class_name, str)):
                found[part] = (str(library), class_name)
    return found


def _folder(name: str, parts: list[str], revision: str | None, variant: str | None) -> Path:
    """The repository's folder, its parts downloaded where it is on the hub; variants when asked for."""
    if Path(name).is_dir():
        return Path(name)
    wanted = [f"{part}/{file}" for part in parts for file in _FILES]
    return fetch_folder(name, wanted, unwanted=None if variant else _VARIANTS, revision=revision)


def _class(class_name: str) -> Any:
    """The class of a part by its name: ours, diffusers' or transformers'; None for what is no part."""
    kind = _CLASSES.get(class_name)
    for library in (diffusers, transformers):
        kind = kind or getattr(library, class_name, None)
    return kind if isinstance(kind, type) and issubclass(kind, _LOADABLE) else None


def _load_part(
    name: str, folder: Path, class_name: str | None, dtype: torch.dtype, variant: str | None
) -> Any:
    """A part of a repository by its class; None where the index leaves it out."""
    if class_name is None:
        return None
    kind = _class(class_name)
    if kind is None:
        raise CheckpointError(f"{name}: its {folder.name} is a {class_name}, which is not known here.")
    if not folder.is_dir():
        raise CheckpointError(f"{name}: has no {folder.name}/. Download the whole repository.")
    variant = _variant(name, folder, variant)
    if issubclass(kind, ModelMixin):
        return _load_network(name, folder, kind, dtype, variant=variant)
    if issubclass(kind, transformers.PreTrainedTokenizerBase) and not _has_words(folder, kind):
        raise CheckpointError(_damaged(name, folder.name, "no vocabulary"))
    try:
        with no_bars(), muted("transformers.modeling_utils"):
            if not issubclass(kind, transformers.PreTrainedModel):
                return kind.from_pretrained(folder)
            part, info = kind.from_pretrained(
                folder, use_safetensors=True, dtype=dtype, variant=variant, output_loading_info=True
            )
    except Exception as error:  # each library raises kinds of its own for files that are not what they seem
        raise CheckpointError(_damaged(name, folder.name, first_line(error))) from error
    if info["missing_keys"]:
        raise CheckpointError(_damaged(name, folder.name, f"{sorted(info['missing_keys'])[0]} is missing"))
    return part


def _variant(name: str, folder: Path, wanted: str | None) -> str | None:
    """`wanted` where a part has such files, None where it has plain ones; others alone are refused."""
    stems = [file.stem for file in folder.glob("*.safetensors")]  # model.fp16, model-00001-of-00002.fp16
    held = sorted({stem.split(".")[1].split("-")[0] for stem in stems if "." in stem})
    if wanted in held:
        return wanted
    if held and all("." in stem for stem in stems):
        kinds = " and ".join(held)
        raise CheckpointError(
            f"{name}: its {folder.name} is there as {kinds} alone. Give load(..., variant={held[0]!r})."
        )
    return None


def _has_words(folder: Path, kind: Any) -> bool:
    """Whether a tokenizer's vocabulary is there, without which transformers makes one of no words."""
    files = dict(kind.vocab_files_names)
    whole = files.pop("tokenizer_file", "tokenizer.json")
    return (folder / whole).is_file() or all((folder / file).is_file() for file in files.values())


def _load_network(
    name: str,
    place: str | Path,
    kind: Any,
    dtype: torch.dtype,
    variant: str | None = None,
    **where: Any,
) -> Any:
    """A network by diffusers' `from_pretrained`, which passes over what is missing or of another class."""
    part = where.get("subfolder") or Path(place).name
    try:
        with no_bars(), muted("diffusers.configuration_utils", about=kind.__name__):
            config = kind.load_config(place, **where)
            if config.get("_class_name", kind.__name__) != kind.__name__:
                raise CheckpointError(
                    f"{name}: its {part} is a {config['_class_name']}, where a {kind.__name__} belongs. "
                    "Two stages were taken for one another."
                )
            network, info = kind.from_pretrained(
                place,
                use_safetensors=True,
                torch_dtype=dtype,
                variant=variant,
                low_cpu_mem_usage=is_accelerate_available(),
                output_loading_info=True,
                **where,
            )
    except CheckpointError:
        raise
    except Exception as error:  # of damaged files, or of sizes that our network refuses
        raise CheckpointError(_damaged(name, part, first_line(error))) from error
    for problem in ("missing", "unexpected"):
        if names := sorted(info[f"{problem}_keys"]):
            raise CheckpointError(_damaged(name, part, f"{names[0]} is {problem}"))
    return network


def _damaged(name: str, part: str, reason: str) -> str:
    return (
        f"{name}: its {part} is missing or damaged ({reason}). Download it again; safetensors are read alone."
    )


def _named_by_card(name: str, revision: str | None) -> str | None:
    """The hub id of Stage C in a model card's `prior`, where diffusers looks too."""
    try:
        here = Path(name).is_dir()
        card = Path(name, "README.md") if here else fetch_file(name, "README.md", revision)
        named = getattr(ModelCard.load(card).data, "prior", None)
    except (
        CheckpointError,
        OSError,
        ValueError,
        AttributeError,
        TypeError,
    ):  # no card, or none that can be read
        return None
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) else None


def _stage_in(path: Path, stage: str) -> Published:
    """One stage of a checkpoint file."""
    try:
        found = stages_in(read_checkpoint(path))
        if stage not in found:
            held = " and ".join(STAGES[each] for each in found) or "no stage of Würstchen"
            raise CheckpointError(f"holds {held}, where {STAGES[stage]} is wanted: {PUBLISHED_FILES[stage]}.")
        return recognise(stage, found[stage])
    except CheckpointError as error:
        raise CheckpointError(
            str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        ) from error
