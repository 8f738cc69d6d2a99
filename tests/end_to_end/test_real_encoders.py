"""Encoders of the real libraries' classes, the whole way: encode, train, pipeline, sample.

Every number on the way is compared with what diffusers and transformers give when asked directly.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

import shoestring
from shoestring.cli.main import main
from shoestring.data.loader import Loader
from shoestring.data.store import Store
from shoestring.pipelines.generate import generate
from shoestring.runtime import keyed_normal

RECIPE = """
base: demo
name: run
data: {{scenes: null, store: store, autoencoder: {autoencoder}, text_encoder: {text}, pad: {pad}}}
model: {{hidden_size: 32, mixer_size: 32, depth: 1, text_depth: 1, head_dim: 16}}
phases: [{{name: only, size: {size}, images: 48, batch: 16, lr: 2.0e-3}}]
train: {{threads: 1, log_every: 16, checkpoint_every: 48, preview_every: 48}}
ema: {{decays: [0.9]}}
sampling: {{scheduler: flow_heun, steps: 2, guidance: 3, shift: 1}}
evaluation: {{loss_images: 4, loss_levels: [-1, 1]}}
"""
PROMPT = "woman astronaut medium skin tone"
LATENTS = {"kl": AutoencoderKL, "tiny": AutoencoderTiny, "dc": AutoencoderDC}
TEXTS = {
    "clip": (CLIPTextModel, CLIPTokenizer),
    "clip_projection": (CLIPTextModelWithProjection, CLIPTokenizer),
    "t5": (T5EncoderModel, T5Tokenizer),
}


@dataclass(frozen=True)
class Case:
    """One pair of encoders and how they are used."""

    autoencoder: str
    text: str
    size: int
    pad: str = "none"
    log_variance: bool = False


CASES = {
    "kl": Case("kl", "clip", 64, log_variance=True),
    "tiny": Case("tiny", "t5", 64),
    "dc": Case("dc", "clip_projection", 128, pad="encoder"),
}


@dataclass(frozen=True)
class Journey:
    """What a case left behind, and the plain models it was made with."""

    case: Case
    folder: Path
    source: Path
    words: tuple[object, ...]  # after `shoestring encode SOURCE --out STORE`
    vae: Any
    text: Any
    tokenizer: Any

    @property
    def store(self) -> Store:
        return Store.open(self.folder / "store")

    @property
    def pipeline(self) -> Path:
        return self.folder / "runs/run/pipeline"

    def shard(self, column: str) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of a column's only shard, by safetensors alone."""
        (path,) = (self.folder / "store/columns" / column).glob("*.safetensors")
        return load_file(path)


def shoestring_command(*words: object) -> None:
    """A command line in this process, which has to succeed."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code, words


@pytest.fixture(
    scope="module", params=[("drawings", "kl"), *(("emoji", name) for name in CASES)], ids="-".join
)
def journey(
    request: pytest.FixtureRequest, encoders: Path, tmp_path_factory: pytest.TempPathFactory
) -> Journey:
    """encode, train and sample by the command line; on drawn shapes always, on emoji where they are."""
    source_name, name = request.param
    source: Path = request.getfixturevalue(source_name)
    case = CASES[name]
    folder = tmp_path_factory.mktemp(name)
    with contextlib.chdir(folder):
        places = {"autoencoder": encoders / case.autoencoder, "text": encoders / case.text}
        words = ["--autoencoder", places["autoencoder"], "--text-encoder", places["text"], "--pad", case.pad]
        words += ["--size", case.size, "--held-out", 8, *(["--log-variance"] if case.log_variance else [])]
        shoestring_command("encode", source, "--out", "store", *words, "--device", "cpu")
        Path("recipe.yaml").write_text(RECIPE.format(**places, pad=case.pad, size=case.size))
        shoestring_command("train", "recipe.yaml", "--device", "cpu")
        shoestring_command("sample", "runs/run", PROMPT, "--seed", 3, "--device", "cpu")
    text_class, tokenizer_class = TEXTS[case.text]
    return Journey(
        case,
        folder,
        source,
        tuple(words),
        LATENTS[case.autoencoder].from_pretrained(places["autoencoder"]).eval(),
        text_class.from_pretrained(places["text"]).eval(),
        tokenizer_class.from_pretrained(places["text"]),
    )


# --- the store -------------------------------------------------------------------------------------------


def pictures(journey: Journey, rows: range) -> torch.Tensor:
    """Rows of the source in [-1, 1], read and reduced by Pillow alone: (B, 3, H, W)."""
    import io

    import pyarrow.parquet as pq

    if journey.source.is_dir():
        opened = [Image.open(journey.source / f"{row:02d}.png") for row in rows]
    else:
        column = pq.read_table(journey.source)["image"]
        opened = [Image.open(io.BytesIO(column[row].as_py()["bytes"])) for row in rows]
    size = (journey.case.size, journey.case.size)
    arrays = [np.asarray(each.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for each in opened]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def assert_float16_of(stored: np.ndarray[Any, Any], exact: torch.Tensor) -> None:
    """Stored values are the exact ones rounded to float16, give or take one unit in the last place."""
    assert stored.dtype == np.float16
    torch.testing.assert_close(torch.from_numpy(stored).float(), exact, rtol=2**-10, atol=2e-5)


@torch.no_grad()
def test_stored_latents_are_the_autoencoders_own(journey: Journey) -> None:
    rows = range(0, 48, 5)
    images = pictures(journey, rows)
    shard = journey.shard(f"latents-{journey.case.size}")
    if journey.case.autoencoder == "kl":
        distribution = journey.vae.encode(images).latent_dist
        assert_float16_of(shard["mean"][list(rows)], distribution.mean)
        assert_float16_of(shard["log_variance"][list(rows)], distribution.logvar)
        return
    assert set(shard) == {"mean"}
    output = journey.vae.encode(images)
    exact = output.latents if journey.case.autoencoder == "tiny" else output.latent
    assert_float16_of(shard["mean"][list(rows)], exact)


@torch.no_grad()
def test_stored_tokens_are_the_text_models_own(journey: Journey) -> None:
    """Each caption alone through the plain model; padded and without a mask where that is how it is used."""
    store, case = journey.store, journey.case
    for row in range(0, 48, 5):
        caption = store.captions(row)[0]
        padding = "max_length" if case.pad == "encoder" else False
        inputs = journey.tokenizer(caption, padding=padding, truncation=True, return_tensors="pt")
        output = journey.text(input_ids=inputs["input_ids"])
        (tokens,) = store.text(np.array([row]))
        assert_float16_of(tokens.half().numpy(), output.last_hidden_state[0])
        pooled = store.pooled(np.array([row]))
        exact = {"clip": "pooler_output", "clip_projection": "text_embeds"}.get(case.text)
        if exact is None:
            assert pooled is None
        else:
            assert pooled is not None
            assert_float16_of(pooled.half().numpy(), output[exact])


@pytest.mark.parametrize("journey", [("emoji", "tiny")], indirect=True)
def test_t5_counts_tokens_as_its_sentencepiece_model_does(encoders: Path, journey: Journey) -> None:
    """What transformers makes of `spiece.model` gives that model's own pieces, and the end mark."""
    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_file=str(encoders / "t5" / "spiece.model"))
    store = journey.store
    for row in range(0, 48, 5):
        (tokens,) = store.text(np.array([row]))
        assert len(tokens) == len(plain.encode(store.captions(row)[0])) + 1


@pytest.mark.gpu
def test_a_gpu_gives_the_same_latents_and_tokens(journey: Journey) -> None:
    """To the ten bits that its convolutions keep; and the pipeline draws there in bfloat16."""
    with contextlib.chdir(journey.folder):
        shoestring_command("encode", journey.source, "--out", "gpu", *journey.words, "--device", "cuda")
        theirs, rows = Store.open("gpu"), np.arange(48)
    ours = journey.store
    noise = torch.zeros(48, *ours.latent_shape(journey.case.size)) if journey.case.log_variance else None
    size = journey.case.size
    torch.testing.assert_close(
        theirs.latents(size, rows, noise=noise), ours.latents(size, rows, noise=noise), rtol=2e-2, atol=2e-2
    )
    for one, other in zip(theirs.text(rows), ours.text(rows), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    pipeline = shoestring.load(journey.pipeline, dtype=torch.bfloat16).to("cuda")
    assert np.abs(draw(pipeline) - draw(shoestring.load(journey.pipeline))).mean() < 0.05


# --- what training sees ----------------------------------------------------------------------------------


def scaled(journey: Journey, raw: torch.Tensor) -> torch.Tensor:
    """As the papers' pipelines scale: Stable Diffusion 3's, Sana's, and TAESD's, which needs none."""
    return {"kl": (raw - 0.0609) * 1.5305, "dc": raw * 0.41407, "tiny": raw}[journey.case.autoencoder]


def rows_of(journey: Journey, captions: tuple[str, ...]) -> list[int]:
    """The rows that captions belong to (here no two rows share one)."""
    store = journey.store
    owner = {caption: row for row in range(len(store)) for caption in store.captions(row)}
    return [owner[caption] for caption in captions]


def test_batches_hold_latents_scaled_as_diffusers_scales_them(journey: Journey) -> None:
    """Of a distribution, a draw: mean + exp(log-variance / 2) * noise keyed by the place in the run."""
    size = journey.case.size
    loader = Loader(journey.store, size=size, batch_size=16, seed=5)
    shard = journey.shard(f"latents-{size}")
    for start in (0, 16, 400):
        batch = loader.batch(start, start + 16)
        rows = rows_of(journey, batch.captions)
        raw = torch.from_numpy(shard["mean"][rows]).float()
        if journey.case.log_variance:
            spread = torch.from_numpy(shard["log_variance"][rows]).float()
            raw = raw + (spread / 2).exp() * keyed_normal(5, "latent", batch.index, raw.shape[1:])
        torch.testing.assert_close(batch.latents, scaled(journey, raw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("journey", [("drawings", "kl"), ("emoji", "kl")], indirect=True, ids="-".join)
def test_draws_are_standard_normal_new_in_each_epoch_and_the_same_again(journey: Journey) -> None:
    loader = Loader(journey.store, size=64, batch_size=16, seed=5)
    shard, epoch = journey.shard("latents-64"), len(loader)
    draws = []
    for number in range(30):
        batch = loader.batch(number * epoch, (number + 1) * epoch)
        rows = rows_of(journey, batch.captions)
        mean, spread = (torch.from_numpy(shard[name][rows]).float() for name in ("mean", "log_variance"))
        noise = (batch.latents / 1.5305 + 0.0609 - mean) / (spread / 2).exp()
        draws.append(noise[torch.tensor(rows).argsort()].flatten())
    every = torch.stack(draws)
    count = every.numel()
    assert every.mean().abs() < 5 / count**0.5
    assert (every.var() - 1).abs() < 5 * (2 / count) ** 0.5
    assert ((every**4).mean() - 3).abs() < 5 * (96 / count) ** 0.5
    between = torch.corrcoef(every)[~torch.eye(30, dtype=torch.bool)]
    assert between.abs().max() < 6 / every.shape[1] ** 0.5
    ahead = list(loader.batches(0, 2 * epoch))  # as an unbroken run reads
    resumed = list(Loader(journey.store, size=64, batch_size=16, seed=5).batches(16, 2 * epoch))
    assert len(resumed) == len(ahead) - 1
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(ahead[1:], resumed, strict=True))


# --- the pipeline ----------------------------------------------------------------------------------------


def draw(pipeline: Any, **more: Any) -> Any:
    """Pixels of the prompt with seed 3, by the recipe's sampling."""
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPT, generator=generator, **{"output_type": "np", **more}).images


def test_the_run_holds_losses_and_a_pipeline_of_the_encoders_it_was_given(journey: Journey) -> None:
    lines = [json.loads(line) for line in (journey.folder / "runs/run/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if line["kind"] in ("train", "held_out")]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    index = json.loads((journey.pipeline / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", type(journey.vae).__name__]
    assert index["text_encoder"] == ["transformers", type(journey.text).__name__]
    opened = shoestring.load(journey.pipeline)
    for ours, theirs in ((opened.vae, journey.vae), (opened.text_encoder, journey.text)):
        given = theirs.state_dict()
        assert all(torch.equal(value, given[name]) for name, value in ours.state_dict().items())
    captions = [journey.store.captions(row)[0] for row in range(8)]
    assert opened.tokenizer(captions)["input_ids"] == journey.tokenizer(captions)["input_ids"]


@torch.no_grad()
def test_the_pipeline_decodes_as_the_autoencoder_itself(journey: Journey) -> None:
    pipeline = shoestring.load(journey.pipeline)
    latents = draw(pipeline, output_type="latent")
    raw = {"kl": latents / 1.5305 + 0.0609, "dc": latents / 0.41407, "tiny": latents}
    own = journey.vae.decode(raw[journey.case.autoencoder]).sample
    expected = (own / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(pipeline, output_type="pt"), expected, rtol=0, atol=1e-5)


def test_sample_draws_a_picture_of_the_phases_size_which_python_draws_again(journey: Journey) -> None:
    picture = Image.open(journey.folder / "samples/00000.png")
    assert (picture.mode, picture.size) == ("RGB", (journey.case.size, journey.case.size))
    assert np.asarray(picture).std() > 0
    again = draw(shoestring.load(journey.folder / "runs/run"), output_type="pil")[0]
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_plain_diffusers_opens_the_export_and_draws_the_same(journey: Journey) -> None:
    plain = DiffusionPipeline.from_pretrained(
        journey.pipeline, custom_pipeline="pipeline", trust_remote_code=True
    )
    plain.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(plain), draw(shoestring.load(journey.pipeline)))


def test_half_precision_draws_nearly_the_same_picture(journey: Journey) -> None:
    whole = draw(shoestring.load(journey.pipeline))
    half = draw(shoestring.load(journey.pipeline, dtype=torch.bfloat16))
    assert half.shape == whole.shape
    assert np.abs(half - whole).mean() < 0.02


# --- prompts that are cut --------------------------------------------------------------------------------


def test_a_prompt_that_is_cut_is_told_in_the_log_and_by_previews_not(
    journey: Journey, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 16 if journey.case.text != "t5" else 512
    pipeline = shoestring.load(journey.pipeline)
    pipeline.encode_prompt(["short", "a red circle"])
    assert caplog.messages == []
    long = " ".join(["circle"] * (limit + 4))
    over = len(journey.tokenizer(long)["input_ids"]) - limit
    caplog.clear()  # transformers' own complaint
    pipeline.encode_prompt([long, "short", long])
    assert caplog.messages == [
        f"prompt too long for the text encoder: the last {over} of its tokens are ignored "
        f"(it takes {limit}): {long}"
    ]
    caplog.clear()
    next(generate(pipeline, [long], [0]))
    assert caplog.messages == []


# --- encoders that change --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autoencoder", "text encoder"])
def test_an_encoder_that_changed_under_its_name_is_refused(
    kind: str, drawings: Path, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    places = {"autoencoder": tmp_path / "tiny", "text": tmp_path / "clip"}
    for place in places.values():
        shutil.copytree(encoders / place.name, place)
    words = ["--autoencoder", places["autoencoder"], "--text-encoder", places["text"], "--size", 64]
    with contextlib.chdir(tmp_path):
        shoestring_command("encode", drawings, "--out", "store", *words)
        weights = next(places[kind.split()[0]].glob("*.safetensors"))
        changed = {name: tensor * 1.01 for name, tensor in load(weights).items()}
        save_file(changed, weights, metadata={"format": "pt"})
        Path("recipe.yaml").write_text(RECIPE.format(**places, pad="none", size=64))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["train", "recipe.yaml", "--device", "cpu"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: store: was made with other weights of the {kind} {weights.parent} (")
    assert line.endswith("Put the old ones back, or make another store with these.")


# --- the console -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("tiny", "t5"), pytest.param(("kl", "clip"), marks=pytest.mark.slow)])
def test_nothing_but_our_own_lines_reaches_the_console(
    names: tuple[str, str], drawings: Path, encoders: Path, tmp_path: Path
) -> None:
    """A process of its own, since the libraries' loggers hold on to the stderr they began with."""
    places = {"autoencoder": encoders / names[0], "text": encoders / names[1]}
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(**places, pad="none", size=64))
    words = ["--autoencoder", places["autoencoder"], "--text-encoder", places["text"], "--size", 64]
    commands = [
        ["encode", drawings, "--out", "store", *words],
        ["train", "recipe.yaml", "--device", "cpu"],
        ["sample", "runs/run", PROMPT],
    ]
    code = """
import json, sys
from shoestring.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code
"""
    told = json.dumps([[str(word) for word in words] for words in commands])
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, told],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    progress = re.compile(r" +\d+ images  ?(phase only|\d+%  only  loss \d)")
    assert [line for line in done.stderr.splitlines() if line and not progress.match(line)] == []
    assert "100%  only" in done.stderr
    assert [line.split(":")[0].split("  ")[0] for line in done.stdout.splitlines()] == [
        "store",
        "runs/run",
        "samples/00000.png",
        "samples/grid.png",
    ]


# --- forms of tokenizers ---------------------------------------------------------------------------------


def test_vocabulary_and_merges_alone_give_the_tokens_of_the_whole_tokenizer(
    encoders: Path, tmp_path: Path
) -> None:
    """Older repositories have no tokenizer.json; saved again, each form stays the same tokenizer."""
    from shoestring.models.text_encoders import load_text_encoder

    whole, files = (load_text_encoder(str(encoders / name)) for name in ("clip", "clip_files"))
    captions = ["A red CIRCLE, isn't it?", "naïve 🙂 flag", ""]
    for ours, theirs in zip(files.encode(captions).tokens, whole.encode(captions).tokens, strict=True):
        assert torch.equal(ours, theirs)
    assert files.identity()["tokenizer"] == whole.identity()["tokenizer"]
    t5 = load_text_encoder(str(encoders / "t5"))
    t5.model.save_pretrained(tmp_path)
    t5.tokenizer.save_pretrained(tmp_path)
    again = load_text_encoder(str(tmp_path))
    assert not (tmp_path / "spiece.model").exists()
    assert again.lengths(captions) == t5.lengths(captions)
    assert again.identity()["tokenizer"] == t5.identity()["tokenizer"]
