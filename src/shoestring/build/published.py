"""A published MicroDiT checkpoint made into a pipeline folder, and a pipeline into such a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from shoestring.data.store import split_revision
from shoestring.errors import CheckpointError, OutputError, RecipeError
from shoestring.models.autoencoders import latent_channels, load_autoencoder
from shoestring.models.checkpoint_files import networks_in, write_checkpoint
from shoestring.models.microdit import MicroDiT
from shoestring.models.microdit_config import ANCHOR, Recognised, recognise
from shoestring.models.microdit_published import network_tensors, state_from_published
from shoestring.models.quiet import no_bars
from shoestring.models.text_encoders import TextEncoder, load_text_encoder
from shoestring.pipelines.microdit import PREDICTIONS, MicroDiTPipeline
from shoestring.runtime import DTYPES
from shoestring.sampling.schedulers import make_scheduler
from shoestring.storage import atomic_path

AUTOENCODERS = {4: "stabilityai/stable-diffusion-xl-base-1.0", 16: "ostris/vae-kl-f8-d16"}
"""What the authors trained with, by latent channels."""
TEXT_ENCODER = "apple/DFN5B-CLIP-ViT-H-14-378"
SIGMA_DATA = 0.9

PADS = ("zeros", "encoder", "none")
"""How prompts are padded: with token 0, as open_clip does and the authors; by the tokenizer; not at all."""
_PAD_TOKEN = "<|pad|>"


def read_network(
    path: Path, tree: Any, *, part: str | None = None, dtype: str = "float32", **hints: Any
) -> tuple[MicroDiT, Recognised]:
    """The network in a published checkpoint and how it was recognised; `hints` are `recognise`'s.

    `tree` is what `read_checkpoint` made of the file. `part` says which network, by its place, where a file
    holds several. Weights of the type and layout that is asked for stay on disk until they are used. Raises
    `CheckpointError` for a file without such a network.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: unknown. Use {', '.join(DTYPES)}.")
    networks = networks_in(tree, ANCHOR)
    if part is None and len(networks) == 1:
        (values,) = networks.values()
    elif part in networks:
        values = networks[part]
    elif networks:
        problem = f"no network at {part!r}" if part else f"holds {len(networks)} networks"
        raise CheckpointError(f"{path}: {problem}. Choose with --part: {', '.join(map(repr, networks))}.")
    else:
        raise CheckpointError(
            f"{path}: no MicroDiT in it: nothing is called {ANCHOR}, with or without a prefix. Nor is there "
            "a stage of Würstchen."
        )
    try:
        tensors = network_tensors(values)
        recognised = recognise(tensors, **hints)
        state = state_from_published({name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()})
        return MicroDiT.around(state, recognised.config).eval(), recognised
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def published_settings(network: MicroDiT, given: dict[str, Any]) -> dict[str, Any]:
    """What the authors used with a network, where `given` does not say otherwise: arguments for below."""
    settings = {
        "autoencoder": AUTOENCODERS.get(network.config.in_channels),
        "text_encoder": TEXT_ENCODER,
        "pad": "zeros",
        "prediction": "edm",
        "sigma_data": SIGMA_DATA if given.get("prediction", "edm") == "edm" else None,
    }
    return {name: value for name, value in (settings | given).items() if value is not None}


def published_pipeline(
    network: MicroDiT,
    *,
    text_encoder: str,
    pad: str,
    prediction: str,
    autoencoder: str | None = None,
    sigma_data: float | None = None,
    max_tokens: int | None = None,
) -> MicroDiTPipeline:
    """A pipeline around a published network, to sample as the authors do: Heun, 30 steps, guidance 5.

    Raises `RecipeError` for encoders that cannot be had, or whose widths are not the network's.
    """
    if prediction not in PREDICTIONS:
        raise RecipeError(f"--prediction {prediction}: unknown. Use {', '.join(PREDICTIONS)}.")
    if sigma_data is not None and prediction != "edm":
        raise RecipeError(
            f"--sigma-data {sigma_data:g}: has no effect with prediction {prediction}. Leave it out."
        )
    channels, width = network.config.in_channels, network.config.caption_channels
    if autoencoder is None:
        raise RecipeError(f"--autoencoder: give one; none is published for latents of {channels} channels.")
    try:
        image, revision = split_revision(autoencoder)
        vae = load_autoencoder(image, revision=revision)
        text = _load_text_encoder(text_encoder, pad, max_tokens)
    except RecipeError as error:
        raise RecipeError(f"{error} Or convert the network alone with --no-encoders.") from error
    if latent_channels(vae) != channels:
        raise RecipeError(
            f"autoencoder {autoencoder}: its latents have {latent_channels(vae)} channels, the network's "
            f"{channels}. Published: {', '.join(f'{c} channels {name}' for c, name in AUTOENCODERS.items())}."
        )
    if text.width != width:
        raise RecipeError(
            f"text encoder {text_encoder}: its tokens have {text.width} components, the network takes "
            f"{width}. Published: {TEXT_ENCODER}, 1024."
        )
    return MicroDiTPipeline(
        transformer=network,
        vae=vae,
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        scheduler=make_scheduler(
            "edm_heun" if prediction == "edm" else "flow_heun",
            prediction=prediction,
            sigma_data=sigma_data,
        ),
        prediction=prediction,
        text_pad=text.pad,
        max_tokens=text.max_tokens,
        default_steps=30,
        default_guidance=5.0,
    )


def write_network(network: MicroDiT, out: Path) -> None:
    """Save a folder with `transformer/` alone: enough for a recipe's `init` and for the way back."""
    with atomic_path(out) as aside, no_bars():
        network.save_pretrained(aside / "transformer")


def write_published(network: MicroDiT, out: Path) -> int:
    """Save a network under the published names; how many tensors that were."""
    tensors = network.to_published()
    write_checkpoint(tensors, out)
    return len(tensors)


def refuse_taken(out: Path) -> None:
    """Raise `OutputError` where something is at `out` already, but for an empty folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"{out}: is there already. Choose another name, or remove it first.")


def _load_text_encoder(name: str, pad: str, max_tokens: int | None) -> TextEncoder:
    if pad not in PADS:
        raise RecipeError(f"--pad {pad}: unknown. Use {', '.join(PADS)}.")
    place, revision = split_revision(name)
    # Only for "main" does transformers look for the safetensors that the hub's bot made of a .bin file.
    encoder = load_text_encoder(
        place,
        max_tokens=max_tokens,
        pad="none" if pad == "none" else "encoder",
        revision=revision or (None if Path(place).exists() else "main"),
    )
    if pad == "zeros":
        pad_with_zeros(encoder)
    return encoder


def pad_with_zeros(encoder: TextEncoder) -> None:
    """Make an encoder see token 0 where a caption is padded, and nowhere else.

    open_clip pads with 0, which in CLIP's vocabulary is "!". With that as its padding mark, a tokenizer would
    take every "!" of a prompt for one; so the mark is a new token, whose embedding is a copy of token 0's.
    """
    tokenizer, model = encoder.tokenizer, cast(Any, encoder.model)
    if tokenizer.pad_token_id == 0:
        return
    tokenizer.add_special_tokens({"pad_token": _PAD_TOKEN})
    added = tokenizer.pad_token_id
    if added >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(added + 1, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[added] = weight[0]
    # CLIP's oldest configurations find the end of a caption by its largest token, which is now the padding.
    model.config.eos_token_id = tokenizer.eos_token_id
    model.requires_grad_(False)
