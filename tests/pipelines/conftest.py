"""A small Würstchen: diffusers' networks with random weights, ours with the same ones, real CLIP parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated import wuerstchen as theirs
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.models.wuerstchen_vqgan import PaellaVQModel

CODE = 4  # channels of the code
TEXT = 16  # width of Stage C's text
DECODER_TEXT = 12
LIMIT = 16  # tokens that the CLIP encoders take

PRIOR = {"c_in": CODE, "c": 16, "c_cond": TEXT, "c_r": 8, "depth": 2, "nhead": 2}
DECODER: dict[str, Any] = {
    "c_r": 8,
    "c_cond": 16,
    "c_hidden": [8, 16, 16, 16],
    "nhead": [-1, 2, 2, 2],
    "blocks": [1, 1, 1, 1],
    "level_config": ["CT", "CTA", "CTA", "CTA"],
    "inject_effnet": [False, True, True, True],
    "effnet_embd": CODE,
    "clip_embd": DECODER_TEXT,
}
VQGAN = {"bottleneck_blocks": 1, "embed_dim": 16, "num_vq_embeddings": 8}


@dataclass(frozen=True)
class Cascade:
    """Networks of diffusers' classes and of ours with the same weights; tokenizers and text encoders."""

    theirs: dict[str, nn.Module]
    ours: dict[str, nn.Module]
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    decoder_text_encoder: CLIPTextModel

    def prior_parts(self, whose: dict[str, nn.Module]) -> dict[str, Any]:
        """Parts of a prior's pipeline by their names there, with a scheduler of its own."""
        return {
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
            "prior": whose["prior"],
            "scheduler": DDPMWuerstchenScheduler(),
        }

    def decoder_parts(self, whose: dict[str, nn.Module]) -> dict[str, Any]:
        """Parts of a decoder's pipeline, likewise."""
        return {
            "tokenizer": self.tokenizer,
            "text_encoder": self.decoder_text_encoder,
            "decoder": whose["decoder"],
            "vqgan": whose["vqgan"],
            "scheduler": DDPMWuerstchenScheduler(),
        }

    def all_parts(self, whose: dict[str, nn.Module]) -> dict[str, Any]:
        """Parts of the combined pipeline, likewise."""
        prior = {f"prior_{name}": part for name, part in self.prior_parts(whose).items()}
        return {**prior, **self.decoder_parts(whose)}


@pytest.fixture(scope="session")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    """Small networks whose every parameter is random; not to be changed."""
    torch.manual_seed(0)
    originals = {
        "prior": awake(theirs.modeling_wuerstchen_prior.WuerstchenPrior(**PRIOR)),
        "decoder": awake(theirs.WuerstchenDiffNeXt(**DECODER)),
        "vqgan": awake(theirs.PaellaVQModel(**VQGAN)),
    }
    # Its noise is x over a number in (0, 1): near 1, so that latents stay of the size of trained ones.
    originals["decoder"].clf[1].bias.data[16:] = 4.0
    copies: dict[str, nn.Module] = {
        "prior": WuerstchenPrior(**PRIOR),
        "decoder": WuerstchenDiffNeXt(**DECODER),
        "vqgan": PaellaVQModel(**VQGAN),
    }
    for name, copy in copies.items():
        copy.load_state_dict(originals[name].state_dict())
        copy.eval()
    folder = tmp_path_factory.mktemp("tokenizer")
    letters_tokenizer().save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return Cascade(originals, copies, tokenizer, clip(tokenizer, TEXT), clip(tokenizer, DECODER_TEXT))


def awake(network: nn.Module) -> nn.Module:
    """The network with every parameter and statistic random, in evaluation mode."""
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            # small at the head of the prior: its noise has a pole at B = 1, where rounding is all there is
            tensor.normal_(std=0.02 if name.startswith("out.") else 0.1)
    return network.eval()


def letters_tokenizer() -> CLIPTokenizer:
    """CLIP's own class with a vocabulary of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LIMIT)


def clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """A CLIP text model of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LIMIT,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def compressor() -> SemanticCompressor:
    """A small compressor of the cascade's code, with the published stride and ratio: 42 2/3 px a cell."""
    torch.manual_seed(1)
    sizes = [(1, 2, 8), (4, 2, 8), (4, 2, 8), (4, 2, 8)]  # and the first convolution: stride 32
    stages = [
        {
            "block": "fused",
            "expand": expand,
            "kernel": 3,
            "stride": stride,
            "in": 8,
            "out": width,
            "layers": 1,
        }
        for expand, stride, width in sizes
    ]
    network = SemanticCompressor(c_latent=CODE, variant=stages, last_channel=16)
    assert network.stride == 32
    return network.eval()


@pytest.fixture(scope="session")
def noise() -> Callable[..., Tensor]:
    """`noise(seed, *shape)`: normal numbers."""

    def draw(seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return draw
