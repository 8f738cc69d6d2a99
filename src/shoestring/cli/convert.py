"""`shoestring convert`: published checkpoints into pipeline folders, and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from shoestring.errors import CheckpointError, RecipeError

_WUERSTCHEN = {"text_encoder", "decoder_text_encoder", "head_dim", "dtype", "part"}
"""Options that make sense for Würstchen's stages; the other system's are all but `decoder_text_encoder`."""


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A published checkpoint, or Würstchen's several; or a run, a pipeline or a hub id."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="A new pipeline's folder; or FILE.pt, FILE.safetensors.")],
    autoencoder: Annotated[str | None, typer.Option(help="Folder or hub id[@revision]. [authors']")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Folder or hub id[@revision]. [authors']")] = None,
    decoder_text_encoder: Annotated[
        str | None, typer.Option(help="Of Würstchen's Stage B: folder or hub id[@revision]. [authors']")
    ] = None,
    no_encoders: Annotated[
        bool, typer.Option("--no-encoders", help="Write the networks alone, enough for a recipe's `init`.")
    ] = False,
    pad: Annotated[
        str | None, typer.Option(help="Prompts' padding: zeros (as published), encoder or none. [zeros]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt in tokens. [the encoder's]")] = None,
    prediction: Annotated[str | None, typer.Option(help="edm, velocity or x0. [edm]")] = None,
    sigma_data: Annotated[float | None, typer.Option(help="For prediction edm. [0.9]")] = None,
    head_dim: Annotated[
        int | None, typer.Option(min=1, help="Width of a head, where the size is not a published one.")
    ] = None,
    expert_capacity: Annotated[
        float | None, typer.Option(help="Experts a patch has, on average. [2]")
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the latents, where no positions are stored. [64]")
    ] = None,
    position_scale: Annotated[
        float | None, typer.Option(help="What positions are divided by, where none are stored. [2]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [float32]")] = None,
    part: Annotated[str | None, typer.Option(help="Which network of a file that holds several.")] = None,
) -> None:
    """Turn a published MicroDiT or Würstchen into a pipeline folder, or a MicroDiT into such a checkpoint."""
    texts = {"text_encoder": text_encoder, "decoder_text_encoder": decoder_text_encoder}
    encoders = {"autoencoder": autoencoder, **texts, "pad": pad, "max_tokens": max_tokens}
    sampling = {"prediction": prediction, "sigma_data": sigma_data}
    network = {"head_dim": head_dim, "expert_capacity": expert_capacity, "dtype": dtype, "part": part}
    latents = {"sample_size": sample_size, "position_scale": position_scale}
    settings, hints = _given(encoders | sampling), _given(network | latents)

    from shoestring.models.checkpoint_files import SUFFIXES

    paths = [Path(source) for source in sources]
    if all(path.is_file() or (path.suffix in SUFFIXES and not path.is_dir()) for path in paths):
        if out.suffix in SUFFIXES:
            raise RecipeError(f"{out}: {sources[0]} is a checkpoint already. Give a folder for the pipeline.")
        if no_encoders:
            _refuse(settings, "has no effect with --no-encoders")
        _to_pipeline(paths, out, hints, None if no_encoders else settings)
    else:
        away = {"no_encoders": True} if no_encoders else {}
        _refuse(settings | hints | away, "is for making a pipeline of a checkpoint")
        _to_checkpoint(sources, out)


def _to_pipeline(paths: list[Path], out: Path, hints: dict[str, Any], given: dict[str, Any] | None) -> None:
    """Read the files, see of which system they are, and write its folder."""
    from shoestring.build import published, published_wuerstchen
    from shoestring.models.checkpoint_files import read_checkpoint

    published.refuse_taken(out)
    for path in paths:
        if paths.count(path) > 1:
            raise RecipeError(f"{path}: is given twice. Leave one out.")
    trees = {path: read_checkpoint(path) for path in paths}
    if len(trees) > 1 or any(published_wuerstchen.holds_stages(tree) for tree in trees.values()):
        options = hints | (given or {})
        _refuse({name: options[name] for name in options if name not in _WUERSTCHEN}, "is not for Würstchen")
        _to_wuerstchen(trees, out, hints, given)
    else:
        _refuse({name: 0 for name in given or {} if name == "decoder_text_encoder"}, "is for Würstchen alone")
        ((path, tree),) = trees.items()
        _to_microdit(path, tree, out, hints, given)


def _to_microdit(
    source: Path, tree: Any, out: Path, hints: dict[str, Any], given: dict[str, Any] | None
) -> None:
    from shoestring.build import published
    from shoestring.pipelines.export import export

    network, recognised = published.read_network(source, tree, **hints)
    config, assumed = network.config, list(recognised.assumed)
    if given is None:
        published.write_network(network, out)
        told = f"{out}: the network alone. Next: `init: {out}` in a recipe."
    else:
        settings = published.published_settings(network, given)
        pipeline = published.published_pipeline(network, **settings)
        export(pipeline, out)
        assumed += [f"{name} {value}" for name, value in settings.items() if name not in given]
        side = config.sample_size * pipeline.vae_scale_factor
        told = f"{out}: a pipeline for pictures of {side} px. Next: shoestring sample {out} 'a prompt'"
    name = f"MicroDiT {recognised.name}" if recognised.name else "MicroDiT"
    typer.echo(
        f"{source}: {name}, {_millions(network)}, "
        f"{config.in_channels} channels, latents of {config.sample_size} x {config.sample_size}, "
        f"positions divided by {config.pos_interp_scale:g}."
    )
    if assumed:
        typer.echo(f"Not in the weights, taken as published: {', '.join(assumed)}.")
    typer.echo(told)


def _to_wuerstchen(
    trees: dict[Path, Any], out: Path, hints: dict[str, Any], given: dict[str, Any] | None
) -> None:
    from shoestring.build import published_wuerstchen as published
    from shoestring.models.wuerstchen_published import STAGES
    from shoestring.pipelines.export import export

    if len(trees) > 1 and "part" in hints:
        raise RecipeError("--part: is for one file, and several are given. Convert that one by itself.")
    stages = published.read_stages(trees, **hints)
    assumed = [each for stage in stages.values() for each in stage.assumed]
    if given is None or not stages.keys() & {"prior", "decoder"}:
        _refuse(given or {}, "has no effect without Stage B or C")
        published.write_stages(stages, out)
        held = ", ".join(f"{name}/" for name in stages)
        told = f"{out}: {held} alone. Next: `init: {out}` in a recipe."
    else:
        pipeline, names = published.make_pipeline(stages, given)
        export(pipeline, out)
        assumed += [f"{name} {value}" for name, value in names.items() if name not in given]
        told = f"{out}: a {type(pipeline).__name__}. Next: shoestring.load({str(out)!r})"
    for name, stage in stages.items():
        typer.echo(f"{stage.file}: Würstchen v2's {STAGES[name]}, {_millions(stage.network)}.")
    typer.echo(f"Not in the weights, taken as published: {', '.join(dict.fromkeys(assumed))}.")
    typer.echo(told)


def _to_checkpoint(sources: list[str], out: Path) -> None:
    from shoestring.build import published
    from shoestring.pipelines.transformer import load_transformer

    if len(sources) > 1:
        files = [source for source in sources if not Path(source).is_file()]
        raise RecipeError(f"{files[0]}: no checkpoint file. Several sources are the files of one Würstchen.")
    (source,) = sources
    if out.suffix not in {".pt", ".safetensors"}:
        raise RecipeError(
            f"{out}: give a file, FILE.pt or FILE.safetensors, to make a checkpoint of {source}."
        )
    published.refuse_taken(out)
    network = load_transformer(source)
    try:
        count = published.write_published(network, out)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    config = network.config
    typer.echo(
        f"{out}: {count} tensors under the published names. In the authors' code: "
        f"input_size={config.sample_size}, in_channels={config.in_channels}, "
        f"pos_interp_scale={config.pos_interp_scale:g}."
    )


def _millions(network: Any) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:,.1f} M parameters"


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, numbers among them checked."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, float) and not 0 < value < math.inf:
            raise RecipeError(f"--{name.replace('_', '-')} {value:g}: must be a number above 0.")
    return given


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Raise `RecipeError` for an option that would do nothing."""
    for name in options:
        raise RecipeError(f"--{name.replace('_', '-')}: {reason}. Leave it out.")
