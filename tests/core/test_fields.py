"""What a model's own files say: done as diffusers does it, harmless, or refused by name; nothing is passed over."""

import inspect
import json
import math
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig
from draftcli.core.models.fields import FEW_STEPS, FIELDS, SAME_PROCESS, check_fields
from draftcli.core.models.loading import load_parts
from draftcli.core.models.marks import check_marks
from draftcli.core.schedule import sigma_table
from draftcli.errors import InputError
from tests.command import draftp, recipe
from tests.tiny import SDXL_SCHEDULER, write_single_file

UNET = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
UNET |= {"norm_num_groups": 4, "mid_block_type": None, "addition_embed_type": "text_time", "cross_attention_dim": 8}
UNET |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8}
VAE = {"block_out_channels": (8,), "norm_num_groups": 4}
CLASSES = [
    *(("scheduler", name) for name in sorted(SAME_PROCESS | FEW_STEPS)),
    ("unet", "UNet2DConditionModel"),
    ("vae", "AutoencoderKL"),
]


def scheduler(name="EulerDiscreteScheduler", **fields):
    return getattr(diffusers, name).from_config({**SDXL_SCHEDULER, "clip_sample": False, **fields})


def unet(**fields):
    return diffusers.UNet2DConditionModel.from_config({**UNET, **fields})


def vae(**fields):
    return diffusers.AutoencoderKL.from_config({**VAE, **fields})


def changed(folder, file, **fields):
    """A copy of a model's folder in which a JSON file says other things."""
    copy = Path("copy").absolute()
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return copy


def with_channels(folder, taken, given=4):
    """A copy of a model's folder whose UNet takes and gives so many channels, as converters leave it."""
    copy = changed(folder, "unet/config.json", in_channels=taken, out_channels=given)
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for key in ("conv_in.weight", "conv_out.weight", "conv_out.bias"):
        dimension, size = (1, taken) if key.startswith("conv_in") else (0, given)
        missing = size - tensors[key].shape[dimension]
        shape = [missing if i == dimension else n for i, n in enumerate(tensors[key].shape)]
        tensors[key] = torch.cat([tensors[key], torch.zeros(shape)], dimension)
    save_file(tensors, path, {"format": "pt"})
    return copy


def one_line(result, *words):
    """The command was refused: exit code 2, and one line of ours."""
    assert result.code == 2, result.err
    (line,) = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    for word in words:
        assert word in line


# --------------------------------------------------------------------------------------------------------- every field


@pytest.mark.parametrize(("part", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_every_field_of_diffusers_has_a_rule_with_a_reason(part, name):
    names = [*inspect.signature(getattr(diffusers, name).__init__).parameters][1:]
    for field in names:
        if field not in ("args", "kwargs"):
            assert FIELDS[part][field].why, f"{name} has a new field {field}: say in fields.py what becomes of it"


def test_every_scheduler_that_diffusers_takes_for_interchangeable_is_known():
    for kind in KarrasDiffusionSchedulers:
        assert kind.name in SAME_PROCESS or kind.name.startswith("EDM"), kind.name


class EulerDiscreteScheduler(diffusers.EulerDiscreteScheduler):
    """A later release of it, with a field that is not known yet."""

    @register_to_config
    def __init__(self, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", new_field=(3, 4)):
        super().__init__(beta_start=beta_start, beta_end=beta_end, beta_schedule=beta_schedule)
        self.register_to_config(beta_start=beta_start, beta_end=beta_end, new_field=new_field)


def test_a_field_that_is_not_known_has_its_default_value_or_is_refused():
    check_fields("scheduler", EulerDiscreteScheduler(), "here")
    check_fields("scheduler", EulerDiscreteScheduler(new_field=[3, 4]), "here")  # as JSON has it
    check_fields("scheduler", scheduler(_author="me", snr_shift_scale=None), "here")
    with pytest.raises(InputError, match=r"^here: the scheduler's new_field is 4, a field that draftp does not know"):
        check_fields("scheduler", EulerDiscreteScheduler(new_field=4), "here")
    with pytest.raises(InputError, match=r"the scheduler's snr_shift_scale is 3\.0, a field"):
        check_fields("scheduler", scheduler(snr_shift_scale=3.0), "here")


# --------------------------------------------------------------------------------------------------------- what is done

HARMLESS = [
    ("scheduler", scheduler, {"name": "DDIMScheduler", "set_alpha_to_one": False}),
    ("scheduler", scheduler, {"name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}),
    ("scheduler", scheduler, {"name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}),
    ("scheduler", scheduler, {"name": "UniPCMultistepScheduler", "flow_shift": 3.0}),
    ("scheduler", scheduler, {"name": "DDPMScheduler", "variance_type": "fixed_large"}),
    ("scheduler", scheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    # Euler does not clip: the field is left over from another class, and diffusers passes it over
    ("scheduler", scheduler, {"clip_sample": True, "skip_prk_steps": True}),
    ("unet", unet, {"time_cond_proj_dim": 256}),  # what it is told, is another setting's
    ("unet", unet, {"sample_size": 96, "upcast_attention": None, "center_input_sample": True}),
    ("vae", vae, {"scaling_factor": 0.18215, "force_upcast": False, "shift_factor": 0.0, "use_quant_conv": False}),
    ("vae", vae, {"latents_mean": [0.1, 0, -1, 2], "latents_std": [1, 2, 3, 4.5]}),
]


@pytest.mark.parametrize(("part", "make", "fields"), HARMLESS, ids=[str(f) for *_, f in HARMLESS])
def test_what_does_not_change_the_formulas_is_taken_without_a_word(part, make, fields):
    check_fields(part, make(**fields), "here")


GRIDS = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"interpolation_type": "log_linear"},
    {"final_sigmas_type": "sigma_min"},
    {"name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True},
    {"name": "DPMSolverSinglestepScheduler", "lambda_min_clipped": -5.1},
    {"name": "LCMScheduler"},
    {"name": "TCDScheduler"},
]


@pytest.mark.parametrize("fields", GRIDS, ids=str)
def test_another_grid_is_warned_about(fields):
    words = fields["name"] if len(fields) == 1 and "name" in fields else " ".join(map(str, [*fields.items()][-1]))
    with pytest.warns(UserWarning, match=f"here: the scheduler asks for {words}.*sampling.schedule"):
        check_fields("scheduler", scheduler(**fields), "here")


def test_the_sampler_that_the_scheduler_asks_for_is_not_warned_about():
    check_fields("scheduler", scheduler("LCMScheduler"), "here", sampler="lcm")
    with pytest.warns(UserWarning, match="asks for timestep_scaling 5.0"):
        check_fields("scheduler", scheduler("LCMScheduler", timestep_scaling=5.0), "here", sampler="lcm")
    with pytest.warns(UserWarning, match="asks for TCDScheduler"):
        check_fields("scheduler", scheduler("TCDScheduler"), "here", sampler="lcm")


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warning_is_seen_where_pictures_are_drawn_and_by_the_doctor(tiny_sdxl):
    model = changed(tiny_sdxl, "scheduler/scheduler_config.json", use_karras_sigmas=True)
    result = draftp("sample", "--model", model, "--prompt", "x", "--steps", 1, "--height", 64, "--width", 64)
    assert result.code == 0
    assert result.err.count("the scheduler asks for use_karras_sigmas True") == 1
    result = draftp("doctor", "--preset", recipe(model))
    assert result.code == 0
    assert "warning model.pretrained" in " ".join(result.out.split())
    assert "use_karras_sigmas" in result.out


# ---------------------------------------------------------------------------------------------------- what is refused

REFUSED = [
    (
        "scheduler",
        scheduler,
        {"beta_start": 0.0001},
        "0.0001 (SDXL's noise levels); draftp knows 0.00085",
    ),
    ("scheduler", scheduler, {"beta_end": 0.014}, "beta_end is 0.014"),
    ("scheduler", scheduler, {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
    ("scheduler", scheduler, {"beta_schedule": "squaredcos_cap_v2"}, "draftp knows 'scaled_linear'"),
    ("scheduler", scheduler, {"num_train_timesteps": 1100}, "num_train_timesteps is 1100"),
    ("scheduler", scheduler, {"trained_betas": [0.1] * 1000}, "trained_betas is [0.1, 0.1, 0.1, 0.1, ...]"),
    ("scheduler", scheduler, {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    ("scheduler", scheduler, {"name": "DDIMScheduler", "clip_sample": True}, "clip_sample is True"),
    ("scheduler", scheduler, {"name": "DDPMScheduler", "thresholding": True}, "thresholding is True"),
    ("scheduler", scheduler, {"name": "DDPMScheduler", "variance_type": "learned_range"}, "is 'learned_range'"),
    ("scheduler", scheduler, {"name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "(flow matching)"),
    ("scheduler", scheduler, {"name": "EDMEulerScheduler"}, "of the class EDMEulerScheduler (EDM), whose formulas"),
    ("scheduler", scheduler, {"name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler (EDM)"),
    ("scheduler", scheduler, {"name": "FlowMatchEulerDiscreteScheduler"}, "(flow matching), whose formulas"),
    ("scheduler", scheduler, {"name": "IPNDMScheduler"}, "is of the class IPNDMScheduler, whose formulas"),
    ("unet", unet, {"in_channels": 9}, "takes 9 channels, so it is an inpainting model; draftp"),
    ("unet", unet, {"in_channels": 8}, "takes 8 channels, so it is an editing model"),
    ("unet", unet, {"in_channels": 5}, "takes 5 channels, so it is a depth model"),
    ("unet", unet, {"in_channels": 7}, "takes 7 channels, so it is an upscaler"),
    ("unet", unet, {"in_channels": 6}, "takes 6 channels, so it is a model for something else"),
    ("unet", unet, {"in_channels": 16, "out_channels": 16}, "so it makes latents for another VAE"),
    ("unet", unet, {"out_channels": 8}, "gives 8 channels, so it predicts more than the noise"),
    ("unet", unet, {"addition_embed_type": None}, "addition_embed_type is None"),
    ("unet", unet, {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
    ("unet", unet, {"num_class_embeds": 10}, "num_class_embeds is 10"),
    ("unet", unet, {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 4}, "encoder_hid_dim"),
    ("unet", unet, {"attention_type": "gated"}, "attention_type is 'gated'"),
    ("vae", vae, {"latents_mean": [0, 0, 0, 0]}, "latents_std is None, the default of AutoencoderKL (latents are"),
    ("vae", vae, {"latents_std": [1, 1, 1, 1]}, "latents_mean is None"),
    ("vae", vae, {"latents_mean": [0.1], "latents_std": [1.0]}, "latents_mean is [0.1]"),
    ("vae", vae, {"latents_mean": [0, 0, 0, math.nan], "latents_std": [1] * 4}, "latents_mean is [0, 0, 0, nan]"),
    ("vae", vae, {"scaling_factor": 0}, "scaling_factor is 0"),
    ("vae", vae, {"scaling_factor": None}, "scaling_factor is None"),
    ("vae", vae, {"shift_factor": 0.1159}, "shift_factor is 0.1159"),
    ("vae", vae, {"out_channels": 4}, "out_channels is 4"),
]


@pytest.mark.parametrize(("part", "make", "fields", "words"), REFUSED, ids=[str(f)[:60] for *_, f, _ in REFUSED])
def test_what_changes_the_formulas_is_refused_by_name(part, make, fields, words):
    with pytest.raises(InputError) as error:
        check_fields(part, make(**fields), "here")
    message = str(error.value)
    assert message.startswith("here: ")
    assert words in message
    assert "\n" not in message


def test_a_default_of_the_class_that_the_file_does_not_say_is_named_as_such():
    bare = diffusers.DDIMScheduler.from_config({"beta_schedule": "scaled_linear", "beta_end": 0.012})
    with pytest.raises(InputError, match=r"beta_start is 0.0001, the default of DDIMScheduler \(SDXL's noise levels\)"):
        check_fields("scheduler", bare, "here")


def test_a_vae_given_apart_is_looked_at_and_named(tiny_sdxl):
    other = changed(tiny_sdxl, "vae/config.json", shift_factor=0.5) / "vae"
    with pytest.raises(InputError, match=f"^model.vae {other}: the vae's shift_factor is 0.5"):
        load_parts(ModelConfig(pretrained=str(tiny_sdxl), vae=str(other)))


def test_a_model_for_inpainting_is_refused_by_every_command_and_by_the_doctor(tiny_sdxl):
    model = with_channels(tiny_sdxl, 9)
    words = f"{model}: the UNet takes 9 channels, so it is an inpainting model; draftp tunes text-to-image models"
    preset = recipe(model)
    one_line(draftp("sample", "--model", model, "--prompt", "x"), words)
    one_line(draftp("train", "--preset", preset, "--output", "run"), words)
    one_line(draftp("train", "--preset", preset, "--dry-run"), words)
    result = draftp("doctor", "--preset", preset)
    assert result.code == 1
    assert "the UNet takes 9 channels" in " ".join(result.out.split())
    assert result.out.splitlines()[-1] == "not healthy: 1 failed"


@pytest.mark.parametrize(("taken", "given"), [(9, 4), (8, 4), (4, 8)])
def test_such_a_model_in_a_single_file_too(tiny_sdxl, taken, given):
    file = write_single_file(with_channels(tiny_sdxl, taken, given), Path("one.safetensors").absolute())
    words = f"takes {taken} channels" if taken != 4 else f"gives {given} channels"
    with pytest.raises(InputError, match=f"^model.pretrained {file}: the UNet {words}, so it"):
        load_parts(ModelConfig(pretrained=str(file), config=str(tiny_sdxl)))


def test_a_single_files_scheduler_is_that_of_its_configuration(tiny_sdxl):
    file = write_single_file(tiny_sdxl, Path("one.safetensors"))
    config = changed(tiny_sdxl, "scheduler/scheduler_config.json", beta_schedule="linear")
    with pytest.raises(InputError, match=f"^model.config {config}: the scheduler's beta_schedule is 'linear'"):
        load_parts(ModelConfig(pretrained=str(file), config=str(config)))


LEVELS = {"betas": torch.linspace(1e-4, 0.02, 1000)}


@pytest.mark.parametrize(
    ("changes", "marks", "words"),
    [
        ({"beta_schedule": "linear"}, None, "the scheduler's beta_schedule is 'linear'"),
        ({"prediction_type": "velocity"}, None, "predicts 'velocity'; draftp knows epsilon, v_prediction, sample"),
        ({"beta_schedule": "linear"}, {}, "^draftp: model.config .*the scheduler's beta_schedule is 'linear'"),
        ({}, {"edm_mean": torch.zeros(4)}, "its mark edm_mean says that it was trained by EDM"),
        ({}, LEVELS, "its table betas is not that of SDXL's noise levels"),
        ({}, {}, None),
    ],
    ids=["scheduler", "prediction", "scheduler of a single file", "edm", "table", "nothing odd"],
)
def test_a_dry_run_refuses_what_the_real_start_refuses(tiny_sdxl, changes, marks, words):
    """The scheduler's configuration and a single file's marks, in the same words."""
    model = config = changed(tiny_sdxl, "scheduler/scheduler_config.json", **changes)
    if marks is not None:
        model = write_single_file(tiny_sdxl, Path("one.safetensors").absolute())
        save_file(load_file(model) | marks, model)
    command = ("train", "--preset", recipe(model, model={"pretrained": str(model), "config": str(config)}))
    real, dry = draftp(*command, "--output", "run"), draftp(*command, "--dry-run")
    if words:
        one_line(dry)
        assert re.search(words, dry.err)
        assert dry.out == ""
        assert [line for line in real.err.splitlines() if line.startswith("draftp:")] == dry.err.splitlines()
    else:
        assert dry.code == 0, dry.err


@pytest.mark.parametrize("kind", ["Inpaint", "Img2Img", "InstructPix2Pix"])
def test_a_folder_of_another_pipeline_of_sdxl_says_when_it_is_taken(tiny_sdxl, kind):
    model = changed(tiny_sdxl, "model_index.json", _class_name=f"StableDiffusionXL{kind}Pipeline")
    one_line(
        draftp("sample", "--model", model, "--prompt", "x"), f"StableDiffusionXL{kind}Pipeline", "takes 4 channels"
    )


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_model_with_another_scheduler_is_not_drawn_and_yet_merged(tiny_sdxl, lora_run, kind):
    model = changed(tiny_sdxl, "model_index.json", scheduler=["diffusers", kind])
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    one_line(draftp("sample", "--model", model, "--prompt", "x"), f"of the class {kind}")
    lora = lora_run / "final"
    result = draftp("merge-lora", lora, "--base", model, "--format", "diffusers", "--output", "out")
    assert result.code == 0, result.err
    assert json.loads(Path("out/scheduler/scheduler_config.json").read_text())["_class_name"] == kind


# ------------------------------------------------------------------------------------------------- single files

SHARES = 1 / (1 + sigma_table().double() ** 2)
ZERO_SNR = sigma_table(zero_terminal_snr=True)
LINEAR = torch.linspace(0.0001, 0.02, 1000)
TAKEN = [
    ({"alphas_cumprod": SHARES.to(torch.bfloat16)}, {}),
    ({"denoiser.sigmas": sigma_table().half()}, {}),
    ({"denoiser.sigmas": ZERO_SNR, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}),
    ({"betas": 1 - SHARES / torch.cat([torch.ones(1), SHARES[:-1]])}, {}),
    ({}, {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-xl-v1-base"}),
]
MARKED = [
    ({"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}, {}, "its mark edm_mean says"),
    ({"edm_vpred.sigma_max": torch.tensor(120.0)}, {}, "its mark edm_vpred.sigma_max says that it was trained by EDM"),
    ({"edm_vpred.sigma_min": torch.tensor(0.002), "v_pred": torch.zeros(0)}, {}, "its mark edm_vpred.sigma_min"),
    ({"betas": LINEAR}, {}, "its table betas is not that of SDXL's noise levels"),
    ({"alphas_cumprod": (1 - LINEAR).cumprod(0)}, {}, "its table alphas_cumprod"),
    ({"denoiser.sigmas": torch.linspace(0.002, 80, 1000)}, {}, "its table denoiser.sigmas"),
    ({"denoiser.sigmas": sigma_table()[:500]}, {}, "its table denoiser.sigmas"),
    ({"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(4, 4)}, {}, "as in LCM"),
    ({}, {"modelspec.prediction_type": "edm"}, "its modelspec.prediction_type is 'edm'; draftp knows v, v_prediction"),
]


@pytest.mark.parametrize(("tensors", "metadata"), TAKEN)
def test_marks_under_which_sdxls_formulas_hold(tensors, metadata):
    save_file(tensors, "one.safetensors", metadata)
    check_marks(Path("one.safetensors"), None)


@pytest.mark.parametrize(("tensors", "metadata", "words"), MARKED, ids=[words for *_, words in MARKED])
def test_marks_of_other_formulas_are_refused(tensors, metadata, words):
    save_file(tensors, "one.safetensors", metadata)
    with pytest.raises(InputError) as error:
        check_marks(Path("one.safetensors"), None)
    assert str(error.value).startswith("model.pretrained one.safetensors: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_file_with_such_a_mark_is_refused_unless_the_setting_says_better(tiny_sdxl):
    file = write_single_file(tiny_sdxl, Path("one.safetensors"))
    tensors = load_file(file)
    save_file({**tensors, "edm_vpred.sigma_max": torch.tensor(120.0)}, "edm.safetensors")
    with pytest.raises(InputError, match=r"edm_vpred\.sigma_max"):
        load_parts(ModelConfig(pretrained="edm.safetensors", config=str(tiny_sdxl)))
    save_file(tensors, "odd.safetensors", {"modelspec.prediction_type": "sample"})
    with pytest.raises(InputError, match=r"'sample'.*Set model\.prediction_type"):
        load_parts(ModelConfig(pretrained="odd.safetensors", config=str(tiny_sdxl)))
    told = ModelConfig(pretrained="odd.safetensors", config=str(tiny_sdxl), prediction_type="v_prediction")
    assert load_parts(told).prediction == "v_prediction"
