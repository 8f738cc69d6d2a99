"""SDXL's U-Net and its KOALA students, random weights: operations, memory, forward, and the whole pipeline.

python benchmarks/unet_students.py [--part arithmetic forward pipeline] [--networks sdxl koala-1b koala-700m]
    [--sizes 256 512] [--dtypes bfloat16] [--threads 1] [--rounds 2] [--memory 8GiB] [--device cpu]
    [--cpu-time] [--tiny]

  arithmetic  on shapes alone, at 1024 px in float16: operations of a forward; bytes of weights and of live
              tensors; what one guided picture sums to with all parts loaded (`plain`) and stage by stage
  forward     one evaluation at batch 1. Networks take turns with the first where both fit into --memory, so
              that a slow moment of the machine hits both; `speed_up` is its seconds over theirs, `peak` what
              the process (on a GPU the allocator) held beside weights, `counted` what shapes foretell
  pipeline    one picture in 10 guided steps: text encoders, U-Net, decode. Seconds and peak with all parts
              loaded (`plain`), peak with one after the other (`staged`; parts are made, not read, so its time
              means nothing), with the decoder full, in tiles of 512 px, and tiny. On a GPU unless asked for

Weights are uniform noise: no figure here depends on what they are, and no picture is looked at.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from parts.figures import alternated, hardware, seconds, tell
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from shoestring.cost.flops import forward_flops
from shoestring.pipelines.memory import parse_size
from shoestring.pipelines.memory_parts import (
    NETWORKS,
    SDXL_VAE,
    TILE,
    TOKENS,
    denoise_live,
    memory_table,
    sdxl_parts,
    set_tile,
    unet_bytes,
    unet_inputs,
)
from shoestring.pipelines.staged import return_large_blocks
from shoestring.runtime import DTYPES, PeakMemory, pick_device, set_threads

PARTS = ("arithmetic", "forward", "pipeline")
DECODERS = ("full", "tiled", "tiny")
STEPS, GUIDANCE = 10, 3.5

TEXT: Sequence[dict[str, Any]] = (  # SDXL's two encoders
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
)
TINY_TEXT: Sequence[dict[str, Any]] = (
    {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
) * 2
TINY_VAE = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "sample_size": 64}


def config(name: str, tiny: bool) -> dict[str, Any]:
    """A network's configuration; with `tiny` its layers and depths at a width of 8."""
    full = dict(NETWORKS[name]())
    if not tiny:
        return full
    narrow = {"block_out_channels": [8, 16, 16], "attention_head_dim": [1, 2, 2], "norm_num_groups": 4}
    text = sum(each["hidden_size"] for each in TINY_TEXT)
    added = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 16 + 6 * 4}
    return {**full, **narrow, **added, "cross_attention_dim": text, "sample_size": 8}


def on_meta(make: Callable[[], nn.Module]) -> Any:
    """A network without its numbers."""
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


def random(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> Any:
    """A network of small noise, made in its type and place: nothing is ever there twice."""
    network = nn.Module.to(on_meta(make), dtype).to_empty(device=device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(-0.02, 0.02)
        else:  # transformers' positions
            tensor.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
    return network


def filled(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Normal draws in the shape of a U-Net's arguments."""
    return {
        name: filled(value) if isinstance(value, dict) else value.normal_().abs_()
        for name, value in inputs.items()
    }


def arithmetic(names: Sequence[str], size: int, say: Callable[..., None]) -> None:
    """Tell operations and bytes of the published shapes."""
    for row in memory_table(names, size):
        about = {name: row.pop(name) for name in ("network", "size", "dtype")}
        unet = sdxl_parts(NETWORKS[about["network"]]()).unet
        sides = (about["size"] // 8,) * 2
        flops = forward_flops(unet, **unet_inputs(unet, 1, sides, torch.float32))
        say("forward_flops", flops / 1e12, "TFLOP", network=about["network"], size=about["size"])
        for name, value in row.items():
            say(name, value / 1e9, "GB", **about)
    for kind, vae in (("full", AutoencoderKL(**SDXL_VAE)), ("tiny", AutoencoderTiny())):
        latents = torch.empty(1, 4, size // 8, size // 8, device="meta")
        flops = forward_flops(vae.to("meta"), latents, method="decode")
        say("decode_flops", flops / 1e12, "TFLOP", decoder=kind, size=size)


def forward(
    names: Sequence[str],
    sizes: Sequence[int],
    dtype: torch.dtype,
    limit: int,
    rounds: int,
    tiny: bool,
    device: torch.device,
    clock: Callable[[], float],
    say: Callable[..., None],
) -> None:
    """Tell seconds and peaks of one evaluation, each network beside the first where memory allows."""
    shapes = {name: on_meta(partial(UNet2DConditionModel, **config(name, tiny))) for name in names}
    taken = {name: unet_bytes(unet, dtype) for name, unet in shapes.items()}
    networks: dict[str, Any] = {}
    for group in groups(taken, limit):
        networks = {name: unet for name, unet in networks.items() if name in group}
        gc.collect()
        for name in group:
            if name not in networks:
                networks[name] = random(partial(UNet2DConditionModel, **config(name, tiny)), dtype, device)
        for size in sizes:
            compare({name: networks[name] for name in group}, names[0], size, rounds, device, clock, say)


def groups(taken: Mapping[str, int], limit: int) -> list[tuple[str, ...]]:
    """Networks in memory together: each with the first where both fit, else alone, else not at all."""
    for name in (name for name in taken if taken[name] > limit):
        print(f"unet_students: {name} takes {taken[name] / 1e9:.1f} GB and is left out", file=sys.stderr)
    first, *others = taken
    alone = [name for name in others if taken[name] <= limit]
    pairs = [(first, name) if taken[first] + taken[name] <= limit else (name,) for name in alone]
    if taken[first] <= limit and not any(first in pair for pair in pairs):
        pairs.insert(0, (first,))
    return pairs


@torch.no_grad()
def compare(
    networks: Mapping[str, Any],
    first: str,
    size: int,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
    say: Callable[..., None],
) -> None:
    """Tell one size: the networks take turns."""
    works, sides = {}, (size // 8, size // 8)
    for name, unet in networks.items():
        inputs = filled(unet_inputs(unet, 1, sides, unet.dtype, str(device)))
        works[name] = partial(unet, **inputs)
    medians = alternated(works, rounds, device, clock)
    for name, unet in networks.items():
        shape = on_meta(partial(UNet2DConditionModel, **unet.config))
        flops = forward_flops(shape, **unet_inputs(shape, 1, sides, torch.float32))
        about = {"network": name, "size": size, "beside": next((n for n in networks if n != name), None)}
        say("forward", medians[name], "s", **about)
        say("flops_per_s", flops / medians[name] / 1e9, "GFLOP/s", **about)
        if name != first and first in networks:
            say("speed_up", medians[first] / medians[name], "times", **about)
        say("peak", held(works[name], device) / 1e6, "MB", **about)
        say("counted", denoise_live(shape, 1, sides, unet.dtype) / 1e6, "MB", **about)


def held(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that a piece of work holds beside what was there."""
    meter = PeakMemory(device)
    meter.reset()
    before = meter.bytes()
    seconds(work, device)
    return meter.bytes() - before


class Drawing:
    """One guided picture of random networks, by parts that can be made and dropped."""

    def __init__(
        self, name: str, decoder: str, size: int, dtype: torch.dtype, tiny: bool, device: torch.device
    ) -> None:
        self.unet = partial(UNet2DConditionModel, **config(name, tiny))
        self.text = TINY_TEXT if tiny else TEXT
        self.projection = 16 if tiny else 1280
        vae = {**SDXL_VAE, **(TINY_VAE if tiny else {})}
        self.vae = AutoencoderTiny if decoder == "tiny" else partial(AutoencoderKL, **vae)
        self.decoder, self.size, self.dtype, self.device = decoder, size, dtype, device

    def make(self, what: Callable[[], nn.Module]) -> Any:
        """A part with random weights."""
        return random(what, self.dtype, self.device)

    def encoders(self) -> list[Any]:
        """SDXL's two text encoders."""
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        return [
            self.make(partial(kind, CLIPTextConfig(**each, projection_dim=self.projection)))
            for kind, each in zip(kinds, self.text, strict=True)
        ]

    def encode(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        """A prompt and the empty one, as SDXL's pipeline joins them."""
        ids = torch.zeros(2, TOKENS, dtype=torch.long, device=self.device)
        results = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        states = torch.cat([each.hidden_states[-2] for each in results], dim=-1)
        pooled = results[1].text_embeds
        return {
            "negative_prompt_embeds": states[:1],
            "prompt_embeds": states[1:],
            "negative_pooled_prompt_embeds": pooled[:1],
            "pooled_prompt_embeds": pooled[1:],
        }

    def denoise(self, unet: Any, embeds: Mapping[str, Tensor]) -> Tensor:
        """Latents after 10 steps, by diffusers' own pipeline."""
        pipeline = StableDiffusionXLPipeline(
            vae=None,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"),
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        side = {"height": self.size, "width": self.size}
        how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
        latents: Tensor = pipeline(**embeds, **side, **how).images
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """The picture's pixels."""
        set_tile(vae, min(TILE, self.size // 2) if self.decoder == "tiled" else None)
        pixels: Tensor = vae.decode(latents.to(self.dtype), return_dict=False)[0]
        return pixels

    def staged(self) -> None:
        """Each part is made, used and dropped."""
        embeds = self.encode(self.encoders())
        latents = self.denoise(self.make(self.unet), embeds)
        self.decode(self.make(self.vae), latents)


@torch.no_grad()
def pipeline(drawing: Drawing, say: Callable[..., None]) -> None:
    """Tell seconds and peaks of one whole drawing."""
    device, meter = drawing.device, PeakMemory(drawing.device)
    free(device)
    meter.reset()
    before = meter.bytes()
    drawing.staged()
    say("staged_peak", (meter.bytes() - before) / 1e9, "GB")
    free(device)
    meter.reset()
    before = meter.bytes()
    encoders, unet, vae = drawing.encoders(), drawing.make(drawing.unet), drawing.make(drawing.vae)

    def draw() -> Tensor:
        return drawing.decode(vae, drawing.denoise(unet, drawing.encode(encoders)))

    latents = drawing.denoise(unet, drawing.encode(encoders))
    say("plain", alternated({"": draw}, 2, device)[""], "s")
    say("plain_peak", (meter.bytes() - before) / 1e9, "GB")
    if device.type == "cuda":
        say("plain_reserved", torch.cuda.max_memory_reserved(device) / 1e9, "GB")
    say("decode", alternated({"": lambda: drawing.decode(vae, latents)}, 2, device)[""], "s")


def free(device: torch.device) -> None:
    """Drop what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[dict[str, Any], Drawing]]:
    """Every network, number type, size and decoder."""
    for name in arguments.networks:
        for dtype in arguments.dtypes:
            for size in arguments.sizes:
                for decoder in DECODERS[-1:] if arguments.tiny else DECODERS:
                    about = {"network": name, "dtype": dtype, "size": size, "decoder": decoder}
                    drawing = Drawing(name, decoder, size, DTYPES[dtype], arguments.tiny, device)
                    yield about, drawing


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, help="all; on a CPU not pipeline")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="all; with --tiny the students")
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels of a side; 256 512, on a GPU 512 1024")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="bfloat16; on a GPU float16 too")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice unless given")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each network")
    parser.add_argument("--memory", default="8GiB", help="for the weights of networks that are compared")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: one thread beside other work")
    parser.add_argument("--tiny", action="store_true", help="networks of a few channels, one round")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    gpu = device.type == "cuda"
    if not gpu:
        return_large_blocks()
    threads = set_threads(arguments.threads)
    tiny = arguments.tiny
    arguments.sizes = arguments.sizes or ([64] if tiny else [512, 1024] if gpu else [256, 512])
    arguments.networks = arguments.networks or list(NETWORKS)[tiny:]
    arguments.dtypes = arguments.dtypes or (["float16", "bfloat16"] if gpu else ["bfloat16"])
    parts = arguments.part or (PARTS if gpu or tiny else PARTS[:2])
    say = partial(tell, "unet_students", hardware=hardware(device))
    if "arithmetic" in parts:
        arithmetic(arguments.networks, 256 if tiny else 1024, say)
    measured = partial(say, threads=threads)
    limit, rounds = parse_size(arguments.memory), 1 if tiny else arguments.rounds
    for dtype in arguments.dtypes if "forward" in parts else ():
        told = partial(measured, dtype=dtype)
        given = (arguments.networks, arguments.sizes, DTYPES[dtype], limit, rounds, tiny, device)
        forward(*given, time.process_time if arguments.cpu_time else time.perf_counter, told)
    for about, drawing in cases(arguments, device) if "pipeline" in parts else ():
        pipeline(drawing, partial(measured, **about))


if __name__ == "__main__":
    main()
