"""`shoestring convert`: the authors' checkpoints become pipelines that sample as theirs, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import shoestring
from shoestring.models.microdit import MicroDiT
from shoestring.models.microdit_published import config_from_published
from shoestring.models.text_encoders import load_text_encoder

LETTERS = "!abcdefghijklmnopqrstuvwxyz'."
LIMIT = 11


@dataclass(frozen=True)
class Published:
    """The authors' tensors for one network, and the small folders of encoders that fit it."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    options: tuple[object, ...]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {n.removeprefix("weights."): t for n, t in self.tensors.items() if n.startswith("weights.")}


def tokenizer() -> CLIPTokenizer:
    """CLIP's own, with a vocabulary of letters: "!" is token 0 as in the real one, padding the end mark."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "wo", "wow</w>"]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *marks])}
    return CLIPTokenizer(vocab=vocabulary, merges=[("w", "o"), ("wo", "w</w>")], model_max_length=LIMIT)


def save_encoders(folder: Path, channels: int, width: int) -> None:
    """A CLIP text model and an SDXL-like autoencoder (8 px a cell), tiny, saved by their own libraries."""
    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=LIMIT, **sizes, **marks)
    CLIPTextModel(config).save_pretrained(folder / "text")
    words.save_pretrained(folder / "text")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=channels,
        scaling_factor=0.13025 if channels == 4 else 0.2614,
        **blocks,
    ).save_pretrained(folder / "vae")


@pytest.fixture(params=["a", "b"])
def published(request: pytest.FixtureRequest, fixtures: Path, empty: Path) -> Published:
    """4 channels without biases, then 16 with; `x.pt` in the current folder is the state dict."""
    with safe_open(fixtures / f"microdit_{request.param}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        config = json.loads(file.metadata()["config"])
    save_encoders(empty, config["in_channels"], config["caption_channels"])
    encoders = ("--autoencoder", "vae", "--text-encoder", "text")
    found = Published(tensors, config, (*encoders, "--head-dim", config["head_dim"]))
    torch.save(found.weights, "x.pt")
    return found


@pytest.fixture
def small(empty: Path) -> dict[str, Tensor]:
    """A small network's published tensors, also in `x.pt`; its encoders in `vae` and `text`."""
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "caption_channels": 16, "hidden_size": 16, "depth": 2, "head_dim": 8}
    mixer = {"mixer_depth": 1, "mixer_size": 16, "num_experts": 2, "multiple_of": 8}
    state = MicroDiT(**sizes, **mixer).to_published()
    torch.save(state, "x.pt")
    save_encoders(empty, 4, 16)
    return state


SMALL = ("--autoencoder", "vae", "--text-encoder", "text", "--head-dim", 8)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- there and back --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_converted_checkpoint_gives_the_authors_output_and_their_samples(
    published: Published, command: Any
) -> None:
    """Opened from the folder: the network's output, and six Heun steps from noise with guidance 3."""
    said = command("convert", "x.pt", "out", *published.options)
    assert (said.code, said.err) == (0, "")
    pipeline = shoestring.load("out")
    t = published.tensors
    text = t["y"].squeeze(1)
    assert relative(pipeline.transformer(t["x"], t["t"], text)[0], t["out"]) < 1e-5
    side = 8 * published.config["input_size"]
    latents = pipeline(
        prompt_embeds=text,
        latents=t["sample_noise"],
        height=side,
        width=side,
        num_inference_steps=6,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert relative(latents, t["sample_heun6_cfg3"]) < 1e-4


def test_a_converted_folder_has_the_published_settings(published: Published, command: Any) -> None:
    Path("out").mkdir()  # an empty folder is in nobody's way
    said = command("convert", "x.pt", "out", *published.options)
    config = published.config
    channels, side, scale = config["in_channels"], config["input_size"], config["pos_interp_scale"]
    first, second, last = said.out.splitlines()
    assert f"{channels} channels, latents of {side} x {side}, positions divided by {scale:g}." in first
    assumed = "expert_capacity 2, pad zeros, prediction edm, sigma_data 0.9"
    assert second == f"Not in the weights, taken as published: {assumed}."
    assert last == f"out: a pipeline for pictures of {8 * side} px. Next: shoestring sample out 'a prompt'"
    pipeline = shoestring.load("out")
    settings = ("prediction", "text_pad", "max_tokens", "default_steps", "default_guidance")
    assert [pipeline.config[name] for name in settings] == ["edm", "encoder", LIMIT, 30, 5.0]
    assert type(pipeline.scheduler).__name__ == "EDMHeunScheduler"
    assert (pipeline.scheduler.config.sigma_data, pipeline.scheduler.config.sigma_max) == (0.9, 80.0)
    assert pipeline.vae.config.scaling_factor == (0.13025 if channels == 4 else 0.2614)
    full = MicroDiT(**config_from_published(config)).config
    ours = {name: pipeline.transformer.config[name] for name in full if not name.startswith("_")}
    assert ours == {name: list(full[name]) if isinstance(full[name], tuple) else full[name] for name in ours}


@pytest.mark.parametrize("back", ["back.pt", "deep/er/back.safetensors"])
def test_the_way_back_gives_every_tensor_bit_for_bit(back: str, published: Published, command: Any) -> None:
    """All of them, positions and mask token too: what the authors' strict loading asks for."""
    assert command("convert", "x.pt", "out", *published.options).code == 0
    said = command("convert", "out", back)
    side, scale = published.config["input_size"], published.config["pos_interp_scale"]
    assert (said.code, said.err) == (0, "")
    assert said.out == (
        f"{back}: {len(published.weights)} tensors under the published names. In the authors' code: "
        f"input_size={side}, in_channels={published.config['in_channels']}, pos_interp_scale={scale:g}.\n"
    )
    read = load_file if back.endswith(".safetensors") else lambda p: torch.load(p, weights_only=True)
    assert_equal(read(back), published.weights)
    assert command("convert", back, "again", *published.options).code == 0
    assert (
        Path("again/transformer/config.json").read_text() == Path("out/transformer/config.json").read_text()
    )


def test_a_picture_is_drawn_from_a_converted_folder(published: Published, command: Any) -> None:
    """The whole way through the command line: real CLIP, tokenizer and autoencoder."""
    command("convert", "x.pt", "out", *published.options)
    said = command("sample", "out", "wow! a horse", "--steps", 2, "--device", "cpu")
    assert said.code == 0
    side = 8 * published.config["input_size"]
    assert Image.open("samples/00000.png").size == (side, side)
    settings = json.loads(Image.open("samples/00000.png").text["shoestring"])
    assert (settings["scheduler"], settings["guidance"]) == ("EDMHeunScheduler", 5.0)


def test_a_run_goes_to_the_published_names_and_back(here: Path, tiny: Path, command: Any) -> None:
    """A run of ours in the published architecture, its settings given again on the way back."""
    sets = (
        "model.positions=sincos",
        "model.qk_norm=hidden",
        "model.text_positions=none",
        "model.text_depth=1",
    )
    words = [word for each in sets for word in ("--set", each)]
    assert command("train", tiny, "--name", "flat", *words).code == 0
    assert command("convert", "runs/flat", "flat.pt").code == 0
    head = shoestring.load("runs/flat").transformer.config.head_dim
    settings = ("--autoencoder", "pixels", "--text-encoder", "hashing", "--pad", "none", "--head-dim", head)
    said = command("convert", "flat.pt", "flat", *settings, "--prediction", "x0")
    assert (said.code, said.err) == (0, "")
    ours, theirs = shoestring.load("flat").transformer, shoestring.load("runs/flat").transformer
    assert_equal(ours.state_dict(), theirs.state_dict())
    for folder in ("flat", "runs/flat"):
        steps = ("--steps", 2, "--guidance", 3, "--scheduler", "flow_heun")
        assert command("sample", folder, "a red circle", *steps, "--out", f"of-{folder}").code == 0
    pictures = [Path(f"of-{folder}/00000.png") for folder in ("flat", "runs/flat")]
    assert Image.open(pictures[0]).tobytes() == Image.open(pictures[1]).tobytes()


def test_the_network_alone_is_enough_to_start_from(here: Path, tiny: Path, command: Any) -> None:
    sets = (
        "model.positions=sincos",
        "model.qk_norm=hidden",
        "model.text_positions=none",
        "model.text_depth=1",
    )
    words = [word for each in sets for word in ("--set", each)]
    command("train", tiny, "--name", "flat", *words)
    command("convert", "runs/flat", "flat.safetensors")
    head = shoestring.load("runs/flat").transformer.config.head_dim
    said = command("convert", "flat.safetensors", "alone", "--no-encoders", "--head-dim", head)
    assert said.out.splitlines()[-1] == "alone: the network alone. Next: `init: alone` in a recipe."
    assert sorted(path.name for path in Path("alone").iterdir()) == ["transformer"]
    phase = "phases=[{name: tuned, size: 32, images: 24, batch: 24, lr: 1.0e-12}]"
    init = ("--set", "init=alone", "--set", phase, "--set", "train.preview_every=null")
    assert command("train", tiny, "--name", "tuned", *words, *init).code == 0
    before, after = (shoestring.load(f"runs/{name}").transformer.state_dict() for name in ("flat", "tuned"))
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)
    assert command("convert", "alone", "back.safetensors").code == 0
    assert_equal(load_file("back.safetensors"), load_file("flat.safetensors"))


# --- prompts ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prompts_are_padded_as_the_authors_padded_them(small: dict[str, Tensor], command: Any) -> None:
    """open_clip fills up with token 0. The tokens by hand, through the text model as it was saved."""
    assert command("convert", "x.pt", "out", *SMALL).code == 0
    vocabulary, plain = tokenizer().get_vocab(), CLIPTextModel.from_pretrained("text").eval()
    prompts = {
        "wow! ab": ["wow</w>", "!</w>", "a", "b</w>"],
        "a !! b": ["a</w>", "!", "!</w>", "b</w>"],
        "": [],
    }
    pipeline = shoestring.load("out")
    for prompt, pieces in prompts.items():
        ids = [vocabulary[piece] for piece in ("<|startoftext|>", *pieces, "<|endoftext|>")]
        padded = torch.tensor([ids + [0] * (LIMIT - len(ids))])
        expected = plain(input_ids=padded).last_hidden_state
        text, mask, *_ = pipeline.encode_prompt(prompt)
        assert mask is None
        assert torch.allclose(text, expected, atol=1e-6)
        (encoded,) = load_text_encoder("out", pad="encoder").encode([prompt]).tokens
        assert torch.allclose(encoded, expected[0], atol=1e-6), "and so a store is encoded with it"


@torch.no_grad()
def test_the_tokenizers_own_padding_is_another_and_can_be_had(small: dict[str, Tensor], command: Any) -> None:
    texts = {}
    for pad in ("zeros", "encoder", "none"):
        assert command("convert", "x.pt", pad, *SMALL, "--pad", pad, "--max-tokens", 8).code == 0
        texts[pad] = shoestring.load(pad).encode_prompt("ab")[:2]
    end = tokenizer().eos_token_id
    ids = tokenizer()("ab")["input_ids"]
    plain = CLIPTextModel.from_pretrained("text").eval()
    expected = plain(input_ids=torch.tensor([ids + [end] * (8 - len(ids))])).last_hidden_state
    assert torch.allclose(texts["encoder"][0], expected, atol=1e-6)
    assert not torch.allclose(texts["zeros"][0], expected, atol=1e-2)
    assert torch.allclose(texts["none"][0], expected[:, : len(ids)], atol=1e-6)
    assert texts["none"][1].all()


# --- formats ---------------------------------------------------------------------------------------------


def wrapped(kind: str, state: dict[str, Tensor]) -> Any:
    """The network as training frameworks save it."""
    other = {"vae.encoder.conv_in.weight": torch.zeros(2), "text_encoder.a.weight": torch.zeros(2)}
    if kind == "whole model":
        return {**other, **{f"dit.{name}": tensor for name, tensor in state.items()}}
    if kind == "composer":
        names = {f"dit._orig_mod.{name}": tensor for name, tensor in state.items()}
        return {
            "state": {"model": {**other, **names}, "run_name": "x"},
            "rng": [{"python": (3, (1, 2), None)}],
        }
    if kind == "parallel":
        return {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    return {"ema": state}


@pytest.mark.parametrize("kind", ["whole model", "composer", "parallel", "averages"])
def test_every_way_of_saving_gives_the_same_network(kind: str, small: Any, command: Any) -> None:
    torch.save(wrapped(kind, small), "wrapped.pt")
    assert command("convert", "wrapped.pt", "out", *SMALL).code == 0
    assert command("convert", "x.pt", "plain", *SMALL).code == 0
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert Path("out", name).read_bytes() == Path("plain", name).read_bytes()


def test_of_several_networks_one_is_chosen_by_name(small: dict[str, Tensor], command: Any) -> None:
    averages = {name: 2 * tensor for name, tensor in small.items() if name not in {"pos_embed", "mask_token"}}
    torch.save(
        {"model": {f"dit.{name}": tensor for name, tensor in small.items()}, "ema": averages}, "two.pt"
    )
    error = command("convert", "two.pt", "out", *SMALL).refused()
    assert error == "two.pt: holds 2 networks. Choose with --part: 'ema', 'model.dit'."
    error = command("convert", "two.pt", "out", *SMALL, "--part", "emma").refused()
    assert error == "two.pt: no network at 'emma'. Choose with --part: 'ema', 'model.dit'."
    positions = ("--sample-size", 4, "--position-scale", 1)
    assert command("convert", "two.pt", "out", *SMALL, "--part", "ema", *positions).code == 0
    ours = shoestring.load("out").transformer.to_published()
    assert torch.equal(ours["x_embedder.proj.weight"], 2 * small["x_embedder.proj.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_widen_exactly_and_may_stay_half(
    dtype: torch.dtype, small: dict[str, Tensor], command: Any
) -> None:
    half = {name: tensor.to(dtype) for name, tensor in small.items()}
    save_file(half, "half.safetensors")
    assert command("convert", "half.safetensors", "wide", *SMALL).code == 0
    wide = load_file("wide/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    name = str(dtype).removeprefix("torch.")
    assert command("convert", "half.safetensors", "half", *SMALL, "--dtype", name).code == 0
    stored = load_file("half/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(wide[name], stored[name].float()) for name in wide)
    assert command("convert", "half", "back.pt").code == 0
    back = torch.load("back.pt", weights_only=True)
    stored_apart = {"pos_embed", "mask_token"}
    assert all(torch.equal(back[name], half[name]) for name in half.keys() - stored_apart)


# --- mistakes --------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it ran",)


def test_a_malicious_checkpoint_is_refused_and_runs_nothing(small: dict[str, Tensor], command: Any) -> None:
    torch.save({**small, "zz": Trap()}, "bad.pt")
    error = command("convert", "bad.pt", "out", *SMALL).refused()
    assert error.startswith("bad.pt: refused: it holds more than tensors: its pickle asks for ")
    assert ".mkdir. Nothing of it was run." in error
    assert not Path("it ran").exists()
    assert not Path("out").exists()


def damage(name: str, state: dict[str, Tensor]) -> None:
    """Make the file that a mistake below names."""
    changes: dict[str, Callable[[], Any]] = {
        "nan.pt": lambda: {**state, "blocks.0.norm1.weight": torch.full((16,), torch.nan)},
        "other.pt": lambda: {"conv1.weight": torch.zeros(3, 3)},
        "alien.pt": lambda: {**state, "label_emb.weight": torch.zeros(3)},
        "shape.pt": lambda: {**state, "final_layer.linear.bias": torch.zeros(3)},
        "list.pt": lambda: {**state, "final_layer.linear.bias": [0.0] * 16},
        "less.pt": lambda: {n: t for n, t in state.items() if n != "final_layer.linear.bias"},
        "moved.pt": lambda: {**state, "pos_embed": state["pos_embed"] + 0.1},
    }
    if name in changes:
        torch.save(changes[name](), name)
    elif name == "cut.pt":
        Path(name).write_bytes(Path("x.pt").read_bytes()[:5000])
    elif name == "page.pt":
        Path(name).write_text("<!doctype html>")
    elif name == "taken":
        Path(name).mkdir()
        Path(name, "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("none.pt", "out", *SMALL),
            "none.pt: no such file. Give a checkpoint (.pt, .pth, .ckpt, .bin, .safe",
        ),
        (("cut.pt", "out", *SMALL), "cut.pt: not a whole PyTorch checkpoint ("),
        (("page.pt", "out", *SMALL), "page.pt: not a whole PyTorch checkpoint ("),
        (
            ("other.pt", "out", *SMALL),
            "other.pt: no MicroDiT in it: nothing is called x_embedder.proj.weight",
        ),
        (("alien.pt", "out", *SMALL), "alien.pt: label_emb.weight: not a tensor of a published MicroDiT"),
        (
            ("shape.pt", "out", *SMALL),
            "shape.pt: Of no MicroDiT with head_dim 8: final_layer.linear.bias is 3",
        ),
        (
            ("less.pt", "out", *SMALL),
            "less.pt: Of no MicroDiT with head_dim 8: final_layer.linear.bias is mi",
        ),
        (("list.pt", "out", *SMALL), "list.pt: final_layer.linear.bias: is a list, not a tensor."),
        (("nan.pt", "out", *SMALL), "nan.pt: blocks.0.norm1.weight: holds infinite numbers or NaN"),
        (("moved.pt", "out", *SMALL), "moved.pt: pos_embed: not the sin-cos positions of a 2 x 2 grid"),
        (("x.pt", "out", *SMALL[:4]), "x.pt: Width 16 and depth 2 are neither XL/2's nor Tiny/2's"),
        (
            ("x.pt", "out", *SMALL, "--position-scale", 2),
            "x.pt: pos_interp_scale 2: the stored positions say",
        ),
        (("x.pt", "out", *SMALL, "--position-scale", -1), "--position-scale -1: must be a number above 0."),
        (("x.pt", "out", *SMALL, "--sigma-data", "nan"), "--sigma-data nan: must be a number above 0."),
        (
            ("x.pt", "out", *SMALL, "--dtype", "int8"),
            "--dtype int8: unknown. Use float32, bfloat16, float16.",
        ),
        (("x.pt", "out", *SMALL, "--pad", "left"), "--pad left: unknown. Use zeros, encoder, none."),
        (("x.pt", "out", *SMALL, "--prediction", "eps"), "--prediction eps: unknown. Use edm, velocity, x0."),
        (
            ("x.pt", "out", *SMALL, "--prediction", "x0", "--sigma-data", 0.5),
            "--sigma-data 0.5: has no effect with prediction x0. Leave it out.",
        ),
        (("x.pt", "out", *SMALL, "--max-tokens", 99), "max_tokens 99: this text encoder takes 1 to 11."),
        (("x.pt", "out", *SMALL, "--no-encoders"), "--autoencoder: has no effect with --no-encoders."),
        (
            ("x.pt", "out", *SMALL[2:]),
            "autoencoder stabilityai/stable-diffusion-xl-base-1.0: neither a local",
        ),
        (
            ("x.pt", "out", *SMALL[:2], *SMALL[4:]),
            "text encoder apple/DFN5B-CLIP-ViT-H-14-378: no text model",
        ),
        (
            ("x.pt", "out", *SMALL[2:], "--autoencoder", "pixels"),
            "autoencoder pixels: its latents have 3 channels, the network's 4. Published: 4 channels stab",
        ),
        (
            ("x.pt", "out", "--autoencoder", "vae", "--text-encoder", "hashing", "--pad", "none", *SMALL[4:]),
            "text encoder hashing: its tokens have 64 components, the network takes 16. Published: apple",
        ),
        (("x.pt", "taken", *SMALL), "taken: is there already. Choose another name, or remove it first."),
        (("x.pt", "x.pt", *SMALL), "x.pt: x.pt is a checkpoint already. Give a folder for the pipeline."),
        (("nowhere", "out.pt"), "nowhere: neither a folder here nor a hub repository that can be read ("),
        (("vae", "out.pt"), "vae: no pipeline here (no model_index.json), nor a network alone (no tran"),
        (("vae", "out"), "out: give a file, FILE.pt or FILE.safetensors, to make a checkpoint of vae."),
        (("vae", "out.pt", "--dtype", "float16"), "--dtype: is for making a pipeline of a checkpoint. Leave"),
        (("vae", "out.pt", "--no-encoders"), "--no-encoders: is for making a pipeline of a checkpoint."),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: tuple[object, ...], message: str, small: dict[str, Tensor], command: Any
) -> None:
    damage(str(words[0]), small)
    damage(str(words[1]), small)
    before = sorted(Path().rglob("*"))
    error = command("convert", *words).refused()
    assert error.startswith(message), error
    assert sorted(Path().rglob("*")) == before


def test_encoders_that_cannot_be_had_point_to_doing_without(small: dict[str, Tensor], command: Any) -> None:
    error = command("convert", "x.pt", "out", *SMALL[2:]).refused()
    assert error.endswith("Or convert the network alone with --no-encoders.")


def test_a_network_with_improvements_does_not_go_back(here: Path, command: Any) -> None:
    error = command("convert", "runs/tiny", "out.pt").refused()
    assert error.startswith("runs/tiny: positions 'sincos+rope': has no place in the published layout")
    assert not Path("out.pt").exists()


@pytest.mark.parametrize("damaged", ["config", "weights", "class"])
def test_a_damaged_pipeline_does_not_go_back(damaged: str, small: dict[str, Tensor], command: Any) -> None:
    assert command("convert", "x.pt", "out", *SMALL).code == 0
    config, weights = (
        Path("out/transformer", name) for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    if damaged == "config":
        config.write_text("{")
    elif damaged == "class":
        config.write_text(config.read_text().replace("MicroDiT", "UNet2DModel"))
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    error = command("convert", "out", "back.pt").refused()
    expected = {
        "config": "out/transformer/config.json: cannot be read (",
        "class": "out: its network is a UNet2DModel, not a MicroDiT.",
        "weights": "out: its transformer is damaged (",
    }
    assert error.startswith(expected[damaged])
    assert not Path("back.pt").exists()


def test_a_full_disk_leaves_nothing_half_written(
    small: dict[str, Tensor], command: Any, full_disk: Callable[[str], Any]
) -> None:
    with full_disk("out"):
        error = command("convert", "x.pt", "out", *SMALL).refused()
    assert error.startswith("out: the disk is full (")
    assert command("convert", "x.pt", "out", *SMALL).code == 0
    with full_disk("back"):
        error = command("convert", "out", "back.pt").refused()
    assert error.startswith("back.pt: the disk is full (")
    assert not [path for path in Path().rglob("*") if "back" in path.name]
