"""Teachers: found wherever U-Nets lie, read a tensor at a time, with the noise schedule they learned."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.network_files import LazyTensors
from shoestring.models.unet_original import original_names
from shoestring.models.unet_students import (
    SD14,
    SD21,
    SDXL,
    StudentSpec,
    copy_weights,
    cut_student,
    student_config,
)
from shoestring.models.unet_teachers import Teacher, load_unet, open_teacher

SMALL: dict[str, Any] = SDXL | {
    "sample_size": 8,
    "block_out_channels": [8, 16, 16],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
    "norm_num_groups": 4,
}
# scheduler/scheduler_config.json of stabilityai/sdxl-turbo and, in words, of SDXL-Lightning's card
TURBO = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
LIGHTNING = TURBO | {"_class_name": "EulerDiscreteScheduler"}
ORIGINAL = "model.diffusion_model."
FAMILIES = {"SDXL": SDXL, "SD14": SD14, "SD21": SD21}


def network(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**SMALL).eval()


def write_pipeline(folder: Path, unet: Any, scheduler: Mapping[str, Any] = TURBO, **saving: Any) -> Path:
    """What `open_teacher` reads of a pipeline: index, scheduler, U-Net."""
    unet.save_pretrained(folder / "unet", **saving)
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def same(teacher: Teacher, unet: torch.nn.Module) -> bool:
    state = unet.state_dict()
    return state.keys() == teacher.tensors.keys() and all(
        torch.equal(teacher.tensors[name], tensor) for name, tensor in state.items()
    )


@cache
def _meta(family: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**FAMILIES[family])


def meta_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of a family's network; inpainting's have the same names."""
    width = config["cross_attention_dim"]
    family = next(name for name, each in FAMILIES.items() if each["cross_attention_dim"] == width)
    state: dict[str, Tensor] = _meta(family).state_dict()
    return state


def write_single_file(
    path: Path, config: Mapping[str, Any], *, prefix: str = ORIGINAL, **others: Tensor
) -> Path:
    """A file with a real network's names, each tensor one number of its own, but for the widths that tell."""
    tensors = dict(others)
    for number, (name, original) in enumerate(original_names(meta_state(config)).items()):
        shape = (1,)
        if name.endswith("attn2.to_k.weight"):
            shape = (1, config["cross_attention_dim"])
        if name == "conv_in.weight":
            shape = (320, config["in_channels"])
        if name == "conv_out.weight":
            shape = (4, 320)
        tensors[prefix + original] = torch.full(shape, float(number))
    save_file(tensors, path)
    return path


def test_a_pipeline_a_folder_of_its_own_and_a_run_are_opened(tmp_path: Path) -> None:
    unet = network()
    pipeline = write_pipeline(tmp_path / "run/pipeline", unet)
    (tmp_path / "run/recipe.yaml").write_text("system: koala\n")
    shutil.copytree(pipeline / "unet", tmp_path / "alone")
    for place in (tmp_path / "run", pipeline, pipeline / "unet", tmp_path / "alone"):
        teacher = open_teacher(place)
        assert same(teacher, unet), place
        assert student_config(teacher.config, StudentSpec()) == teacher.config
        spacing = "leading" if place.name == "alone" else "trailing"
        assert teacher.scheduler.config.timestep_spacing == spacing, place


@pytest.mark.parametrize("saving", [{"max_shard_size": "20KB"}, {"variant": "fp16"}, {}])
def test_shards_and_variants_are_read(saving: dict[str, Any], tmp_path: Path) -> None:
    unet = network().half()
    folder = write_pipeline(tmp_path / "pipeline", unet, **saving)
    assert same(open_teacher(folder), unet)
    files = sorted(path.name for path in (folder / "unet").glob("*.safetensors"))
    assert (len(files) > 2) == ("max_shard_size" in saving)


def test_of_two_precisions_the_full_one_is_read(tmp_path: Path) -> None:
    unet = network()
    folder = write_pipeline(tmp_path / "pipeline", unet)
    network(1).half().save_pretrained(folder / "unet", variant="fp16")
    assert same(open_teacher(folder), unet)


class Watched(Mapping[str, Tensor]):
    """Hands on a teacher's tensors and counts how many bytes of them are alive at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.alive, self.peak, self.read = tensors, 0, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        self._count(tensor.nbytes)
        self.read += tensor.nbytes
        weakref.finalize(tensor, self._count, -tensor.nbytes)
        return tensor

    def _count(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


def test_no_more_than_one_tensor_of_the_teacher_is_alive_while_a_student_is_cut(tmp_path: Path) -> None:
    unet, spec = network(), StudentSpec(layers_per_block=1, depth=(1, 1, 1))
    teacher = open_teacher(write_pipeline(tmp_path / "pipeline", unet, max_shard_size="50KB"))
    watched = Watched(teacher.tensors)
    student = cut_student(watched, spec, teacher.config)
    own = [tensor.nbytes for tensor in student.state_dict().values()]
    assert watched.peak == max(own)
    assert watched.read == sum(own)  # each once, and nothing that is left out
    assert watched.alive == 0


def test_turbo_and_lightning_teach_on_the_noise_of_their_repository(tmp_path: Path) -> None:
    for name, config, kind in (
        ("turbo", TURBO, EulerAncestralDiscreteScheduler),
        ("lightning", LIGHTNING, EulerDiscreteScheduler),
    ):
        scheduler = open_teacher(write_pipeline(tmp_path / name, network(), config)).scheduler
        assert isinstance(scheduler, DDPMScheduler)
        assert torch.equal(scheduler.alphas_cumprod, kind.from_config(config).alphas_cumprod)
        assert scheduler.config.timestep_spacing == "trailing"
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a_teachers_prediction_and_zero_terminal_noise_are_kept(tmp_path: Path) -> None:
    config = TURBO | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    config["rescale_betas_zero_snr"] = True
    scheduler = open_teacher(write_pipeline(tmp_path / "v", network(), config)).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, DDIMScheduler.from_config(config).alphas_cumprod)


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_are_those_that_diffusers_converts(family: str) -> None:
    config = FAMILIES[family]
    state = meta_state(config)
    original = {ORIGINAL + there: state[name] for name, there in original_names(state).items()}
    back = convert_ldm_unet_checkpoint(original, dict(_meta(family).config))
    assert back.keys() == state.keys()
    assert all(back[name] is tensor for name, tensor in state.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [ORIGINAL, ""])
def test_a_single_file_is_opened_by_diffusers_names(family: str, prefix: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    beside = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "alphas_cumprod": torch.zeros(1)}
    path = write_single_file(tmp_path / "model.safetensors", config, prefix=prefix, **beside)
    teacher = open_teacher(path)
    assert teacher.config == config
    numbers = {name: teacher.tensors[name].flatten()[0].item() for name in teacher.tensors}
    assert numbers == {name: float(number) for number, name in enumerate(meta_state(config))}
    assert teacher.scheduler.config.prediction_type == "epsilon"
    assert torch.equal(
        teacher.scheduler.alphas_cumprod, EulerDiscreteScheduler.from_config(TURBO).alphas_cumprod
    )


def test_a_single_file_in_diffusers_layout_is_opened_as_lightnings_is(tmp_path: Path) -> None:
    original = load_file(write_single_file(tmp_path / "original.safetensors", SDXL))
    names = {ORIGINAL + there: name for name, there in original_names(meta_state(SDXL)).items()}
    save_file({names[name]: tensor for name, tensor in original.items()}, tmp_path / "lightning.safetensors")
    theirs, ours = (open_teacher(tmp_path / f"{name}.safetensors") for name in ("original", "lightning"))
    assert ours.config == theirs.config == SDXL
    assert ours.identity == theirs.identity


def test_channels_are_the_files(tmp_path: Path) -> None:
    inpainting = SD14 | {"in_channels": 9}
    assert open_teacher(write_single_file(tmp_path / "9.safetensors", inpainting)).config == inpainting


def test_a_file_that_says_it_predicts_v_is_believed(tmp_path: Path) -> None:
    mark = {"v_pred": torch.zeros(0)}
    for name, marks, zero in (("v", mark, False), ("ztsnr", mark | {"ztsnr": torch.zeros(0)}, True)):
        config = open_teacher(
            write_single_file(tmp_path / f"{name}.safetensors", SDXL, **marks)
        ).scheduler.config
        assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", zero)


def test_an_sd_2_that_does_not_say_is_told_by_the_spread_of_a_bias(tmp_path: Path) -> None:
    path = write_single_file(tmp_path / "2.safetensors", SD21)
    bias = ORIGINAL + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for spread, prediction, size in ((0.15, "v_prediction", 96), (0.03, "epsilon", 64)):
        save_file(load_file(path) | {bias: torch.tensor([-spread, spread])}, tmp_path / "one.safetensors")
        teacher = open_teacher(tmp_path / "one.safetensors")
        assert teacher.scheduler.config.prediction_type == prediction
        assert teacher.config["sample_size"] == size


def test_identity_is_the_networks_and_not_its_places(tmp_path: Path) -> None:
    unet = network()
    once = open_teacher(write_pipeline(tmp_path / "a", unet)).identity
    assert once == open_teacher(write_pipeline(tmp_path / "b", unet, max_shard_size="50KB")).identity
    assert (
        once
        != open_teacher(write_pipeline(tmp_path / "c", unet, TURBO | {"prediction_type": "sample"})).identity
    )
    with torch.no_grad():
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight[0, 0] += 1e-3
    assert once != open_teacher(write_pipeline(tmp_path / "d", unet)).identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_network_is_its_teacher_and_is_not_trained(dtype: torch.dtype, tmp_path: Path) -> None:
    unet = network()
    loaded = load_unet(write_pipeline(tmp_path / "pipeline", unet), dtype=dtype)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    state = unet.to(dtype).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_a_network_in_8_bits_answers_nearly_as_before(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "pipeline", network())
    told: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 10), "time_ids": torch.full((2, 6), 8.0)},
    }
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        exact, rough = (load_unet(pipeline, int8=int8)(z, 500, **told).sample for int8 in (False, True))
    assert not torch.equal(exact, rough)
    assert (exact - rough).square().mean() < 1e-4 * exact.square().mean()
    assert load_unet(pipeline, int8=True).mid_block.attentions[0].proj_in.weight.__class__ is not Tensor


def test_what_is_no_u_net_is_refused_by_what_it_is(tmp_path: Path) -> None:
    pixart = tmp_path / "pixart"
    (pixart / "transformer").mkdir(parents=True)
    index = {"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (pixart / "model_index.json").write_text(json.dumps(index))
    (pixart / "transformer/config.json").write_text("{}")
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    sizes = {"block_out_channels": (4, 4), "norm_num_groups": 2, "sample_size": 8}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    UNet2DModel(**sizes, **blocks).save_pretrained(tmp_path / "plain/unet")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("")
    for place, says in (
        ("pixart", "a PixArtSigmaPipeline, whose network is PixArtTransformer2DModel"),
        ("vae", "its network is of the class AutoencoderKL, not UNet2DConditionModel"),
        ("plain", "its network is of the class UNet2DModel, not UNet2DConditionModel"),
        ("text", "its network is of the class CLIPTextModel, not UNet2DConditionModel"),
        ("empty", "no network here"),
        ("run", "this run has no pipeline yet"),
        ("nowhere", "neither a folder here nor a hub repository"),
        ("nowhere.safetensors", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=says):
            open_teacher(tmp_path / place)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "a LoRA"),
        (["double_blocks.0.img_attn.qkv.weight"], "a Flux transformer"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["decoder.up_blocks.0.resnets.0.norm1.weight"], "an autoencoder"),
        (["x"], "no U-Net in it: 1 tensors, such as x"),
    ],
)
def test_a_file_that_is_no_u_net_is_refused_by_what_it_is(
    names: list[str], says: str, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=rf"file\.safetensors: {says}"):
        open_teacher(tmp_path / "file.safetensors")


def test_a_single_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = write_single_file(tmp_path / "whole.safetensors", SD14)
    whole = load_file(path)
    lacking = {name: tensor for name, tensor in whole.items() if "middle_block" not in name}
    first = f"{ORIGINAL}input_blocks.0.0.weight"
    refiner = {n: torch.zeros(1, 1280) if n.endswith("attn2.to_k.weight") else t for n, t in whole.items()}
    for tensors, says in (
        (lacking, "SD 1.x's does, but lacks 46 tensors, such as model.diffusion_model.middle_block.0"),
        (
            whole | {f"{ORIGINAL}extra": torch.zeros(1)},
            "has besides 1 tensors, such as model.diffusion_model.extra",
        ),
        (whole | {first: torch.zeros(64, 4)}, r"file\.safetensors: .* 64 channels wide and not 320"),
        (refiner, r"reads text \[1280\] wide"),
        (whole | {"edm_mean": torch.zeros(1)}, "EDM's noise levels"),
    ):
        save_file(tensors, tmp_path / "file.safetensors")
        with pytest.raises(CheckpointError, match=says):
            open_teacher(tmp_path / "file.safetensors")


@pytest.mark.parametrize("wrong", [{"layers_per_block": "two"}, {"block_out_channels": [8] * 4}])
def test_a_configuration_of_which_no_network_can_be_built_is_refused(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    file = write_pipeline(tmp_path / "pipeline", network()) / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(CheckpointError, match=r"unet/config\.json: no U-Net can be built of it \("):
        open_teacher(tmp_path / "pipeline")


def test_another_family_of_noise_is_refused(tmp_path: Path) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FlowMatchEulerDiscreteScheduler().config}
    for name, scheduler, says in (
        ("flow", flow, "its FlowMatchEulerDiscreteScheduler has no betas"),
        ("edm", TURBO | {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "another family of noise"),
        ("x", TURBO | {"prediction_type": "flow_prediction"}, "predicts 'flow_prediction'"),
    ):
        with pytest.raises(CheckpointError, match=says):
            open_teacher(write_pipeline(tmp_path / name, network(), scheduler))


def test_damaged_and_missing_weights_are_refused(tmp_path: Path) -> None:
    cut = write_pipeline(tmp_path / "cut", network())
    weights = cut / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shards = write_pipeline(tmp_path / "shards", network(), max_shard_size="50KB")
    next((shards / "unet").glob("*00002*")).unlink()
    pickled = write_pipeline(tmp_path / "pickled", network(), safe_serialization=False)
    other = write_pipeline(tmp_path / "other", network())
    config = json.loads((other / "unet/config.json").read_text())
    (other / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 13}))
    for folder, says in (
        (cut, "not a whole safetensors file"),
        (shards, "00002.*missing, though .* names it"),
        (pickled, "no diffusion_pytorch_model.safetensors"),
        (other, r"tensors do not fit its configuration"),
    ):
        with pytest.raises(CheckpointError, match=says):
            load_unet(folder)
    teacher, spec = open_teacher(other), StudentSpec(layers_per_block=1)
    student = UNet2DConditionModel(**student_config(teacher.config, spec))
    with pytest.raises(CheckpointError, match=r"is \(16, 12\), not \(16, 13\) as its configuration says"):
        copy_weights(student, teacher.tensors, spec, teacher.config)


def test_asking_whether_a_tensor_is_there_does_not_read_it(tmp_path: Path) -> None:
    save_file({"here": torch.zeros(2)}, tmp_path / "one.safetensors")
    tensors = LazyTensors({"here": (tmp_path / "one.safetensors", "gone")})
    assert "here" in tensors
    assert "there" not in tensors
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        tensors["here"]
