"""The pipeline: what diffusers' users expect of one, with small real parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from PIL import Image

import shoestring
from shoestring.errors import CheckpointError
from shoestring.models.autoencoders import PixelAutoencoder
from shoestring.models.microdit import MicroDiT
from shoestring.models.text_encoders import HashingTextEncoder
from shoestring.pipelines.export import export
from shoestring.pipelines.generate import generate, save_grid, save_png, warn_cut_prompts
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.sampling.schedulers import make_scheduler

PROMPTS = ["a red circle", "a blue square in the top left on a white background"]


def make_pipeline(prediction: str = "edm", **changes: Any) -> MicroDiTPipeline:
    """A tiny pipeline whose output layer is awake."""
    torch.manual_seed(0)
    network = MicroDiT(
        sample_size=8,
        in_channels=3,
        caption_channels=16,
        hidden_size=16,
        depth=2,
        head_dim=8,
        multiple_of=8,
        mixer_depth=1,
        mixer_size=16,
        num_experts=2,
    )
    torch.nn.init.normal_(network.proj_out.weight, std=0.5)
    for block in [*network.patch_mixer, *network.transformer_blocks]:
        torch.nn.init.normal_(block.modulation.linear.weight, std=0.2)
    name = "edm_heun" if prediction == "edm" else "flow_euler"
    pipeline = MicroDiTPipeline(
        transformer=network.eval(),
        vae=PixelAutoencoder(),
        text_encoder=HashingTextEncoder(width=16, max_tokens=12),
        scheduler=make_scheduler(name, prediction=prediction, sigma_data=0.5),
        prediction=prediction,
        **{"default_steps": 3, "default_guidance": 2.0, **changes},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["edm", "velocity", "x0"])
def pipeline(request: pytest.FixtureRequest) -> MicroDiTPipeline:
    return make_pipeline(request.param)


def draw(
    pipeline: DiffusionPipeline, prompt: Any = PROMPTS, seed: int = 0, **more: Any
) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(prompt, generator=generator, output_type="np", **more).images)


def test_a_seed_gives_the_same_pictures_and_another_gives_others(pipeline: MicroDiTPipeline) -> None:
    first = draw(pipeline)
    assert first.shape == (2, 8, 8, 3)
    assert np.array_equal(first, draw(pipeline))
    assert not np.array_equal(first, draw(pipeline, seed=1))


def test_output_types_are_diffusers(pipeline: MicroDiTPipeline) -> None:
    pil = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0)).images[0]
    array = draw(pipeline, PROMPTS[0])[0]
    assert isinstance(pil, Image.Image)
    assert np.array_equal(np.asarray(pil), (array * 255).round().astype(np.uint8))
    tensor = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt").images[0]
    assert np.allclose(tensor.permute(1, 2, 0).numpy(), array)
    (latent,) = pipeline(PROMPTS[0], output_type="latent", return_dict=False)
    assert latent.shape == (1, 3, 8, 8)


def test_saving_and_opening_changes_no_picture(pipeline: MicroDiTPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    opened = shoestring.load(tmp_path / "saved")
    assert isinstance(opened, MicroDiTPipeline)
    assert opened.config.prediction == pipeline.config.prediction
    assert np.array_equal(draw(pipeline), draw(opened))


def test_plain_diffusers_opens_an_export_when_told_to_trust_it(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    opened = DiffusionPipeline.from_pretrained(
        tmp_path / "saved", custom_pipeline=str(tmp_path / "saved" / "pipeline.py"), trust_remote_code=True
    )
    assert np.array_equal(draw(pipeline), draw(opened))


def test_an_export_brings_the_transformer_up_to_date_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    pipeline = make_pipeline()
    export(pipeline, folder, ("transformer",))
    untouched = (folder / "text_encoder" / "config.json").stat().st_mtime_ns
    torch.nn.init.ones_(pipeline.transformer.proj_out.bias)
    pipeline.transformer.register_to_config(pos_interp_scale=2.0)
    export(pipeline, folder, ("transformer",))
    opened = shoestring.load(folder)
    assert opened.transformer.config.pos_interp_scale == 2.0
    assert np.array_equal(draw(pipeline), draw(opened))
    assert (folder / "text_encoder" / "config.json").stat().st_mtime_ns == untouched
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline"]


def test_embeddings_of_encode_prompt_give_the_prompts_picture(pipeline: MicroDiTPipeline) -> None:
    names = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    embeddings = dict(zip(names, pipeline.encode_prompt(PROMPTS), strict=True))
    assert np.array_equal(draw(pipeline, None, **embeddings), draw(pipeline))


def test_guidance_one_is_the_text_alone_and_zero_the_null_alone(pipeline: MicroDiTPipeline) -> None:
    """At scale 1 no null caption is evaluated; at scale 0 the prompt does not matter."""
    calls = []
    forward = pipeline.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["hidden_states"].shape[0])
        return forward(*args, **kwargs)

    pipeline.transformer.forward = counted
    draw(pipeline, guidance_scale=1.0)
    assert set(calls) == {2}
    calls.clear()
    zero = draw(pipeline, guidance_scale=0.0)
    assert set(calls) == {4}
    assert np.allclose(zero, draw(pipeline, PROMPTS[::-1], guidance_scale=0.0), atol=1e-5)


def test_a_negative_prompt_changes_the_picture(pipeline: MicroDiTPipeline) -> None:
    plain = draw(pipeline)
    assert not np.allclose(
        plain, draw(pipeline, negative_prompt="a green cross in the bottom right"), atol=1e-3
    )
    assert np.allclose(plain, draw(pipeline, guidance_scale=2.0), atol=1e-6)


def test_several_pictures_of_a_prompt_lie_side_by_side(pipeline: MicroDiTPipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    four = pipeline(PROMPTS, num_images_per_prompt=2, generator=generators, output_type="np").images
    second = draw(pipeline, PROMPTS[0], seed=1)
    assert four.shape == (4, 8, 8, 3)
    assert np.allclose(four[1], second[0], atol=1e-5)


def test_callbacks_see_every_step_and_may_change_the_latents_or_stop(pipeline: MicroDiTPipeline) -> None:
    seen = []

    def halve(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((number, float(timestep), given["latents"].shape))
        return {"latents": given["latents"] * 0}

    black = draw(pipeline, callback_on_step_end=halve)
    assert [number for number, *_ in seen] == list(range(pipeline.num_timesteps))
    assert np.allclose(black, 0.5)
    steps = []

    def stop(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(number)
        pipe._interrupt = True
        return given

    draw(pipeline, callback_on_step_end=stop)
    assert steps == [0]


def test_pictures_may_be_wide_and_sizes_that_do_not_fit_are_refused(pipeline: MicroDiTPipeline) -> None:
    assert draw(pipeline, height=4, width=12).shape == (2, 4, 12, 3)
    with pytest.raises(ValueError, match="must be multiples of 2; nearest: 8 x 8"):
        draw(pipeline, height=7, width=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "must be at least 1"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "must be"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "not among"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**{"prompt": PROMPTS, **arguments})


def test_a_first_block_cache_that_never_skips_changes_nothing() -> None:
    """diffusers' cache hooks find our blocks; with a threshold of zero every block still runs."""
    pipeline = make_pipeline()
    plain = draw(pipeline)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert np.allclose(draw(pipeline), plain, atol=1e-4)
    pipeline.transformer.disable_cache()
    assert np.array_equal(draw(pipeline), plain)


def test_generate_gives_each_picture_its_own_seed(pipeline: MicroDiTPipeline, tmp_path: Path) -> None:
    """A picture does not depend on what it is drawn beside, and its file says how to draw it again."""
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    together = list(generate(pipeline, prompts, [5, 6, 7], batch_size=2))
    alone = next(generate(pipeline, [PROMPTS[0]], [7]))
    difference = np.abs(np.asarray(together[2].image, float) - np.asarray(alone.image, float))
    assert difference.max() <= 1
    save_png(together[2], tmp_path / "p.png")
    text = Image.open(tmp_path / "p.png").text  # type: ignore[attr-defined]
    assert text["prompt"] == PROMPTS[0]
    assert '"seed": 7' in text["shoestring"]
    assert '"steps": 3' in text["shoestring"]
    save_grid([picture.image for picture in together], tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 2 * 128


def test_a_prompt_too_long_is_warned_about_with_the_tokens_cut() -> None:
    long = " ".join(["word"] * 15)
    (line,) = warn_cut_prompts(make_pipeline(), ["short", long])
    assert "the last 3 of its tokens are ignored (it takes 12)" in line


def test_a_place_without_a_pipeline_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pipeline here"):
        shoestring.load(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(CheckpointError, match="no pipeline yet"):
        shoestring.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub repository"):
        shoestring.load("nobody/nothing")
