"""What every test shares: no network, one thread a worker, and where fixtures and data sets are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports torch or the hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TERM"] = "dumb"  # plain output from rich
os.environ.pop("SHOESTRING_TRACEBACK", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Published networks' outputs (SHOESTRING_FIXTURES); the test is skipped where they are absent."""
    return _folder("SHOESTRING_FIXTURES", "../shared/parity")


@pytest.fixture(scope="session")
def data() -> Path:
    """Small real data sets (SHOESTRING_DATA); the test is skipped where they are absent."""
    return _folder("SHOESTRING_DATA", "../shared/data")


@pytest.fixture(scope="session")
def launch() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """`launch(processes, script or "-m", ...)`: run Python as torchrun does, without its start-up time.

    Returns how each process ended, by rank; all are killed after `timeout` seconds.
    """

    def run(
        processes: int, *words: Any, cwd: Path, timeout: float = 240.0, **environment: str
    ) -> list[subprocess.CompletedProcess[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, *map(str, words)]
        started = []
        for rank in range(processes):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            several = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
            started.append(
                subprocess.Popen(
                    command,
                    cwd=cwd,
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        **(several if processes > 1 else {}),
                        **environment,
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            told = [process.communicate(timeout=timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        return [
            subprocess.CompletedProcess(command, process.returncode, out, err)
            for process, (out, err) in zip(started, told, strict=True)
        ]

    return run


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock `StableDiffusionXLPipeline`, saved: real classes, tokenizers of 77 positions made by hand.

    Text of 16 + 24 channels, pooled 20; a VAE of 8 px a cell. Not to be changed.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    signs = [chr(code) for code in range(33, 127)]  # "!" is 0, as in CLIP
    merges = [("r", "e"), ("re", "d</w>"), ("n", "o"), ("no", "i"), ("noi", "s"), ("nois", "e</w>")]
    words = [*signs, *(f"{sign}</w>" for sign in signs), *map("".join, merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}

    def tokenizer(**marks: str) -> CLIPTokenizer:
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **marks)

    def text(width: int, layers: int, act: str) -> CLIPTextConfig:
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
        marks = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}  # as published, and not true
        return CLIPTextConfig(
            vocab_size=len(vocabulary),
            num_hidden_layers=layers,
            hidden_act=act,
            projection_dim=20,
            **sizes,
            **marks,
        )

    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=2,
        cross_attention_dim=40,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20 + 6 * 4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text(16, 2, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text(24, 3, "gelu")),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
    folder = tmp_path_factory.mktemp("pipeline") / "sdxl"
    pipeline.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none, without importing torch for the others."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _folder(variable: str, default: str) -> Path:
    path = ROOT / os.environ.get(variable, default)
    if not path.is_dir():
        pytest.skip(f"no {path}: set {variable}")
    return path
