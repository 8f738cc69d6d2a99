"""What is looked at while a run trains: pictures, and the loss on held-out images."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from shoestring.build.systems import AnySystem, take_weights
from shoestring.data.store import Store
from shoestring.evaluation.expert_load import watched_experts
from shoestring.models.autoencoders import decode_latents, encode_images, scale_latents
from shoestring.pipelines.export import export
from shoestring.pipelines.generate import generate, save_grid
from shoestring.recipes.schema import Phase
from shoestring.runtime import keyed_seed
from shoestring.storage import RunFolder, write_json
from shoestring.training.tracking import Record

PREVIEWS = 8
PREVIEW_PIXELS = 1024**2
"""Of previews drawn at once: decoding is what takes memory, some 4 GB for as many in float32."""


class Exhibit:
    """A copy of a system's networks with the run's weights (or averages), to look at and to export.

    On the main process alone, without weights between looks. It is never compiled, sharded or trained, so
    that looking leaves the training as it is. A checkpoint's thread may export while another looks: one
    of them waits.
    """

    def __init__(self, system: AnySystem, run: RunFolder) -> None:
        self.system, self.run = system, run
        self.busy = threading.Lock()
        with torch.device("meta"):
            networks = system.networks(system.recipe.phases[0])
        for network in networks.values():
            network.eval().requires_grad_(False)
        self.parts = system.parts(networks)
        self.product = system.product(networks)

    def export(self, images: int, weights: dict[str, Tensor]) -> None:
        """Write what the run makes, with these weights, at the resolution trained at last."""
        with self.busy:
            self._take(images, weights)
            self.product.export(self.run)
            self._let_go()

    def look(self, images: int, weights: dict[str, Tensor], device: torch.device) -> list[Record]:
        """Write pictures; a record of them, and one of the loss on held-out images where there are any."""
        with self.busy:
            phase = self._take(images, weights)
            for part in self.parts:  # a teacher stays a shape: looking asks nothing of it
                part.objective._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
            file = self.product.preview(self.run, images, device)
            held_out = list(self._held_out(images, phase, device))
            self._let_go()
        return [{"kind": "preview", "images": images, "file": file}, *held_out]

    def _take(self, images: int, weights: dict[str, Tensor]) -> Phase:
        """Hold these weights, set to the phase that the run is in after so many images; that phase."""
        take_weights(self.parts, weights)
        phase = self.system.recipe.phase_after(images)
        self.system.enter(phase, self.parts)
        return phase

    def _let_go(self) -> None:
        """Hold no weights from look to look."""
        for part in self.parts:
            part.objective.trained.to_empty(device="meta")

    def _held_out(self, images: int, phase: Phase, device: torch.device) -> Iterator[Record]:
        split = self.system.held_out_split
        if split is None:
            return
        with watched_experts(next(iter(self.parts[0].objective.trained.values()))) as load:
            rows = self.system.held_out_rows(self.parts, split, phase.size, device)
        by_noise = {row["facet"].removeprefix("log_sigma="): row["value"] for row in rows}
        record = {"kind": "held_out", "images": images, "loss": by_noise.pop("all"), "by_noise": by_noise}
        experts = load.figures()
        yield {**record, "experts": experts} if experts else record


class Drawn:
    """A pipeline that draws prompts; `changing` names its components that training changes."""

    def __init__(self, system: AnySystem, pipeline: DiffusionPipeline, changing: Sequence[str]) -> None:
        self.system, self.pipeline, self.changing = system, pipeline, tuple(changing)

    def export(self, run: RunFolder) -> None:
        export(self.pipeline, run.pipeline, self.changing)

    def preview(self, run: RunFolder, images: int, device: torch.device) -> str:
        """Pictures of the same prompts and seeds every time, as one PNG and a JSON of how they were made."""
        recipe, store = self.system.recipe, self.system.store
        prompts = list(recipe.train.preview_prompts or held_out_captions(store, PREVIEWS))
        seeds = [keyed_seed(recipe.seed, "preview") + i for i in range(len(prompts))]
        self.pipeline.to(device)
        at_once = max(1, PREVIEW_PIXELS // max(phase.size for phase in recipe.phases) ** 2)
        pictures = list(generate(self.pipeline, prompts, seeds, batch_size=at_once))
        for name, component in self.pipeline.components.items():  # needed for pictures alone
            if isinstance(component, nn.Module) and name not in self.changing:
                component.to("cpu")
        settings = {"steps": pictures[0].steps, "guidance": pictures[0].guidance, "seed": seeds[0]}
        return _save_preview(run, images, [picture.image for picture in pictures], prompts, settings)


def preview_reconstructions(
    system: AnySystem, autoencoder: nn.Module, run: RunFolder, images: int, device: torch.device
) -> str:
    """Held-out pictures above what an autoencoder makes of them, the same ones every time."""
    split, size = system.held_out_split or "train", system.recipe.phase_after(images).size
    originals = next(iter(system.held_out(split, size, PREVIEWS))).latents.to(device)
    autoencoder.to(device).eval()
    with torch.no_grad():
        raw, _ = encode_images(autoencoder, originals)
        made = decode_latents(autoencoder, scale_latents(autoencoder, raw))
    pictures = [_picture(each) for each in (*originals, *made)]
    captions = held_out_captions(system.store, PREVIEWS)
    return _save_preview(run, images, pictures, captions, {"reconstructions": True}, columns=len(originals))


def _picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    pixels = ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def _save_preview(
    run: RunFolder,
    images: int,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    settings: Mapping[str, object],
    columns: int | None = None,
) -> str:
    path: Path = run.previews / f"{images:09d}.png"
    save_grid(pictures, path, columns)
    write_json(path.with_suffix(".json"), {"prompts": list(prompts), "images": images, **settings})
    return path.relative_to(run.root).as_posix()


def held_out_captions(store: Store, count: int) -> list[str]:
    """The first captions of the first held-out split, or of the training images where nothing is held out."""
    name = next((split for split in store.splits if split != "train"), "train")
    split = store.splits[name]
    rows = split.rows(torch.arange(min(count, len(split))).numpy())
    return [store.captions(int(row))[0] for row in rows]
