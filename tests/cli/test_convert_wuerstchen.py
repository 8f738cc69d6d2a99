"""`shoestring convert` on Würstchen: the authors' files become folders that open, and nothing else does."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import shoestring
from shoestring.models.autoencoders import load_autoencoder
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.pipelines.wuerstchen_published import load_vqgan
from tests.models.wuerstchen_oracles import shake

LETTERS = "!abcdefghijklmnopqrstuvwxyz'."
LIMIT = 9
ENCODERS = ("--text-encoder", "text_c", "--decoder-text-encoder", "text_b")
SMALL = (*ENCODERS, "--head-dim", 8)
ALL = ("stage_b.pt", "stage_a.pt", "stage_c.pt")
STAGES = [
    {"block": kind, "expand": expand, "kernel": 3, "stride": stride, "in": 8, "out": 8, "layers": 1}
    for kind, expand, stride in (
        ("fused", 1, 1),
        ("fused", 4, 2),
        ("fused", 4, 2),
        ("mbconv", 4, 2),
        ("mbconv", 4, 1),
        ("mbconv", 4, 2),
    )
]


def randomly(network: nn.Module) -> Any:
    shake(network, small=0.1)
    return network.eval()


def as_the_authors(network: nn.Module) -> dict[str, Tensor]:
    """A state dict under the authors' names: q, k and v in one matrix, as torch's attention has them."""
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if found := re.fullmatch(r"(.*\.attention)\.to_([qkv])\.(weight|bias)", name):
            whole = f"{found[1]}.attn.in_proj_{found[3]}"
            state[whole] = torch.cat([state[whole], tensor]) if whole in state else tensor
        else:
            state[name.replace(".to_out.0.", ".attn.out_proj.").replace("r.embedding.", "r.codebook.")] = (
                tensor
            )
    return state


def save_text_encoder(folder: Path, width: int) -> None:
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    words = CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=LIMIT
    )
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=LIMIT, **sizes, **marks)
    CLIPTextModel(config).save_pretrained(folder)
    words.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Small networks, and a folder with them as the authors' three files and their text encoders."""
    folder = tmp_path_factory.mktemp("world")
    made = {
        "prior": randomly(WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=8, depth=2, nhead=2)),
        "decoder": randomly(
            WuerstchenDiffNeXt(
                c_r=8,
                c_cond=16,
                c_hidden=[8, 16],
                nhead=[-1, 2],
                blocks=[1, 2],
                level_config=["CT", "CTA"],
                inject_effnet=[False, True],
                effnet_embd=4,
                clip_embd=12,
            )
        ),
        "vqgan": randomly(PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)),
        "compressor": randomly(SemanticCompressor(c_latent=4, variant=STAGES, last_channel=16)),
    }
    states = {name: as_the_authors(network) for name, network in made.items()}
    stage_b = {"state_dict": states["decoder"], "effnet_state_dict": states["compressor"]}
    raw = {name: 2 * tensor for name, tensor in states["prior"].items()}
    torch.save(stage_b, folder / "stage_b.pt")
    torch.save({"state_dict": states["vqgan"]}, folder / "stage_a.pt")
    torch.save({"state_dict": raw, "ema_state_dict": states["prior"], "iter": 7}, folder / "stage_c.pt")
    save_text_encoder(folder / "text_c", 16)
    save_text_encoder(folder / "text_b", 12)
    return folder, made


@pytest.fixture
def networks(world: tuple[Path, dict[str, Any]], empty: Path) -> dict[str, Any]:
    """The networks; the current folder is a copy of that one."""
    shutil.copytree(world[0], empty, dirs_exist_ok=True)
    return world[1]


def assert_same(folder: str, network: nn.Module) -> None:
    stored = load_file(Path(folder, "diffusion_pytorch_model.safetensors"))
    state = network.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)


# --- they convert ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_authors_three_files_become_the_whole_cascade(networks: dict[str, Any], command: Any) -> None:
    """Every tensor arrives; the networks open as ours and put out what diffusers' classes put out."""
    said = command("convert", *ALL, "out", *SMALL)
    assert (said.code, said.err) == (0, "")
    for folder, name in (("prior_prior", "prior"), *((n, n) for n in ("decoder", "vqgan", "compressor"))):
        assert_same(f"out/{folder}", networks[name])
    pipeline = shoestring.load("out")
    assert type(pipeline).__name__ == "WuerstchenCombinedPipeline"
    x, r, c = torch.randn(1, 4, 6, 4), torch.rand(1), torch.randn(1, 5, 16)
    torch.testing.assert_close(
        pipeline.prior_prior(x, r, c), networks["prior"](x, r, c), atol=1e-4, rtol=1e-4
    )
    z, codes, text = torch.randn(1, 4, 32, 16), torch.randn(1, 4, 3, 2), torch.randn(1, 5, 12)
    expected = networks["decoder"](z, r, codes, text)
    torch.testing.assert_close(pipeline.decoder(z, r, codes, text), expected, atol=1e-4, rtol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a fox", height=128, width=128, prior_num_inference_steps=2, num_inference_steps=2)
    assert made.images[0].size == (128, 128)


def test_what_is_said_names_each_file_and_what_no_weight_tells(networks: Any, command: Any) -> None:
    said = command(
        "convert", *ALL, "out", "--text-encoder", "text_c", "--decoder-text-encoder", "text_b", *SMALL[4:]
    )
    millions = {name: sum(p.numel() for p in each.parameters()) / 1e6 for name, each in networks.items()}
    assert said.out.splitlines() == [
        f"stage_c.pt: Würstchen v2's Stage C (prior), {millions['prior']:.1f} M parameters.",
        f"stage_b.pt: Würstchen v2's Stage B (decoder), {millions['decoder']:.1f} M parameters.",
        f"stage_a.pt: Würstchen v2's Stage A (VQGAN), {millions['vqgan']:.1f} M parameters.",
        f"stage_b.pt: Würstchen v2's semantic compressor, {millions['compressor']:.1f} M parameters.",
        "Not in the weights, taken as published: patch_size 2, scale_factor 0.3764, strides 1 2 2 2 1 2, "
        "scaled codes (z + 1) / 42.",
        "out: a WuerstchenCombinedPipeline. Next: shoestring.load('out')",
    ]


@torch.no_grad()
def test_the_converted_parts_are_an_autoencoder_for_stores(networks: dict[str, Any], command: Any) -> None:
    command("convert", *ALL, "out", *SMALL)
    autoencoder = load_autoencoder("out")
    pictures = 2 * torch.rand(1, 3, 128, 128) - 1
    codes = autoencoder.encode(pictures).latent
    assert torch.equal(codes, networks["compressor"].compress((pictures + 1) / 2))
    assert autoencoder.decode(codes).sample.shape == pictures.shape


@pytest.mark.parametrize(
    ("files", "options", "kind", "parts"),
    [
        (("stage_c.pt",), SMALL[:2], "WuerstchenPriorPipeline", {"prior"}),
        (
            ("stage_b.pt", "stage_a.pt"),
            SMALL[2:4],
            "WuerstchenDecoderPipeline",
            {"decoder", "vqgan", "compressor"},
        ),
    ],
)
def test_some_stages_become_the_pipeline_of_those(
    files: Any, options: Any, kind: str, parts: set[str], networks: dict[str, Any], command: Any
) -> None:
    said = command("convert", *files, "out", *options, "--head-dim", 8)
    assert (said.code, said.err) == (0, "")
    assert type(shoestring.load("out")).__name__ == kind
    for part in parts:
        assert_same(f"out/{part}", networks[part])


def test_networks_alone_need_no_text_encoder(networks: dict[str, Any], command: Any) -> None:
    said = command("convert", *ALL, "out", "--no-encoders", "--head-dim", 8)
    assert said.out.splitlines()[-1] == (
        "out: prior/, decoder/, vqgan/, compressor/ alone. Next: `init: out` in a recipe."
    )
    assert {path.name for path in Path("out").iterdir()} == networks.keys()
    for name, network in networks.items():
        assert_same(f"out/{name}", network)


def test_stage_a_alone_opens_as_an_autoencoder(networks: dict[str, Any], command: Any) -> None:
    """Stable Cascade's stage_a.safetensors is the same network under the same names."""
    save_file(as_the_authors(networks["vqgan"]), "stage_a.safetensors")
    for source, out in (("stage_a.pt", "a"), ("stage_a.safetensors", "b")):
        assert command("convert", source, out).code == 0
        assert_same(f"{out}/vqgan", networks["vqgan"])
        assert type(load_autoencoder(out)).__name__ == "PaellaVQModel"
        assert load_vqgan(out).config.scale_factor == 0.3764


def test_the_weights_before_averaging_can_be_had(networks: dict[str, Any], command: Any) -> None:
    assert command("convert", "stage_c.pt", "out", *SMALL[:2], *SMALL[4:], "--part", "state_dict").code == 0
    stored = load_file("out/prior/diffusion_pytorch_model.safetensors")
    assert torch.equal(stored["projection.weight"], 2 * networks["prior"].projection.weight)


def test_weights_may_become_half_as_wide(networks: dict[str, Any], command: Any) -> None:
    assert command("convert", *ALL, "out", "--no-encoders", *SMALL[4:], "--dtype", "bfloat16").code == 0
    for name, network in networks.items():
        stored = load_file(f"out/{name}/diffusion_pytorch_model.safetensors")
        floats = {key: tensor for key, tensor in stored.items() if not key.endswith("num_batches_tracked")}
        assert {tensor.dtype for tensor in floats.values()} == {torch.bfloat16}
        assert all(torch.equal(floats[key], network.state_dict()[key].bfloat16()) for key in floats)


# --- mistakes --------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it ran",)


def damage(name: str, networks: dict[str, Any]) -> None:
    """Make the file that a mistake below names."""
    prior = as_the_authors(networks["prior"])
    cascade = SemanticCompressor(c_latent=4, variant=STAGES, last_channel=16, affine=False).state_dict()
    made: dict[str, Callable[[], Any]] = {
        "trap.pt": lambda: {"ema_state_dict": prior, "zz": Trap()},
        "other.pt": lambda: {"weight": torch.zeros(2)},
        "less.pt": lambda: {"ema_state_dict": {n: t for n, t in prior.items() if n != "out.1.bias"}},
        "nan.pt": lambda: {"ema_state_dict": {**prior, "out.1.bias": torch.full((8,), torch.nan)}},
        "v1.pt": lambda: {
            "state_dict": {"byt5_mapper.weight": torch.zeros(2), "clf.1.weight": torch.zeros(2)}
        },
        "two.pt": lambda: {"a": prior, "b": dict(prior)},
        "effnet.pt": lambda: cascade,
        "wide.pt": lambda: {
            "ema_state_dict": WuerstchenPrior(c_in=6, c=16, c_cond=16, c_r=8, depth=1).state_dict()
        },
    }
    if name in made:
        torch.save(made[name](), name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("trap.pt", "out", *SMALL), "trap.pt: refused: it holds more than tensors: its pickle asks for "),
        (
            ("stage_b.pt", "trap.pt", "out", *SMALL),
            "trap.pt: refused: it holds more than tensors: its pickle asks",
        ),
        (("stage_c.pt", "other.pt", "out", *SMALL), "other.pt: no stage of Würstchen in it. Leave it out."),
        (("stage_c.pt", "stage_c.pt", "out", *SMALL), "stage_c.pt: is given twice. Leave one out."),
        (
            ("less.pt", "out", *SMALL[:2], *SMALL[4:]),
            "less.pt: WuerstchenPrior: 1 tensors missing, such as out.1.b",
        ),
        (("nan.pt", "out", *SMALL), "nan.pt: out.1.bias: holds infinite numbers or NaN"),
        (("v1.pt", "out", *SMALL), "v1.pt: Stage B of Würstchen v1 (Paella"),
        (
            ("two.pt", "out", *SMALL),
            "two.pt: holds 2 networks of Stage C (prior). Choose with --part: 'a', 'b'.",
        ),
        (
            ("stage_c.pt", "out", *SMALL, "--part", "c"),
            "stage_c.pt: no network at 'c'. Choose with --part: 'ema_st",
        ),
        (
            (*ALL, "out", *SMALL, "--part", "state_dict"),
            "--part: is for one file, and several are given. Convert that one by itself.",
        ),
        (
            ("stage_c.pt", "out", *SMALL[:2]),
            "stage_c.pt: attention of width 16 cannot have heads of 64. Give --head",
        ),
        (
            ("stage_b.pt", "out", *SMALL[2:]),
            "Stage B (decoder) makes no pipeline without Stage A (VQGAN): give vqg",
        ),
        (
            ("stage_c.pt", "stage_a.pt", "out", *SMALL),
            "Stage A (VQGAN) makes no pipeline without Stage B (decoder)",
        ),
        (
            ("stage_c.pt", "effnet.pt", "out", *SMALL),
            "effnet.pt: the compressor of Stable Cascade (its norm has no scale and shift); stage_c.pt is",
        ),
        (
            ("stage_b.pt", "effnet.pt", "out", *SMALL),
            "effnet.pt: holds semantic compressor, and so does stage_b.pt.",
        ),
        (
            ("stage_b.pt", "stage_a.pt", "wide.pt", "out", *ENCODERS, "--head-dim", 4),
            "these files: prior_prior makes codes of 6 channels, decoder takes 4",
        ),
        (
            ("stage_c.pt", "out", "--text-encoder", "text_b", *SMALL[4:]),
            "text_b: the text_encoder makes tokens 12 wide, the prior takes 16. They are not of one st",
        ),
        (
            ("stage_c.pt", "out", *SMALL[4:]),
            "text encoder warp-ai/wuerstchen-prior: no text model there (",
        ),
        (
            ("stage_c.pt", "out", *SMALL),
            "--decoder-text-encoder: has no effect without its stage. Leave it out.",
        ),
        (
            ("stage_a.pt", "out", *SMALL[:2]),
            "--text-encoder: has no effect without Stage B or C. Leave it out.",
        ),
        (("stage_c.pt", "out", *SMALL[:2], "--pad", "zeros"), "--pad: is not for Würstchen. Leave it out."),
        (("stage_c.pt", "out", "--no-encoders", *SMALL), "--text-encoder: has no effect with --no-encoders."),
        (("stage_c.pt", "out", "--dtype", "int8"), "--dtype int8: unknown. Use float32, bfloat16, float16."),
        (
            ("stage_c.pt", "stage_b.pt"),
            "stage_b.pt: stage_c.pt is a checkpoint already. Give a folder for the pi",
        ),
        (
            ("stage_c.pt", "text_c", "out.pt"),
            "text_c: no checkpoint file. Several sources are the files of one W",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: tuple[object, ...], told: str, networks: dict[str, Any], command: Any
) -> None:
    for word in words:
        damage(str(word), networks)
    before = sorted(Path().rglob("*"))
    error = command("convert", *words).refused()
    assert error.startswith(told), error
    assert sorted(Path().rglob("*")) == before


def test_a_full_disk_leaves_nothing_half_written(networks: Any, command: Any, full_disk: Any) -> None:
    with full_disk("out"):
        error = command("convert", *ALL, "out", *SMALL).refused()
    assert error.startswith("out: the disk is full (")
    assert not Path("out").exists()


def test_a_folder_of_configurations_is_what_the_hub_would_hold(
    networks: dict[str, Any], command: Any
) -> None:
    """Each config.json opens in diffusers' own class too: names of arguments are its."""
    command("convert", *ALL, "out", "--no-encoders", *SMALL[4:])
    for name, kind in (("prior", WuerstchenPrior), ("decoder", WuerstchenDiffNeXt), ("vqgan", PaellaVQModel)):
        config = json.loads(Path("out", name, "config.json").read_text())
        assert config["_class_name"] == kind.__name__
        theirs = kind.from_pretrained(f"out/{name}")
        state = networks[name].state_dict()
        assert all(torch.equal(theirs.state_dict()[key], state[key]) for key in state)
