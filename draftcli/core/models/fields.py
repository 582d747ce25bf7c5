"""What the configuration of a model may say: every field of its scheduler, UNet and VAE, and what we make of each.

A field is used; or harmless, for a reason; or it changes the formulas, and all but the values under which ours hold
are refused by name; or it changes the sampler's grid alone, which is warned about, as we draw on a grid of our own.
A field that is not known here is refused unless it has its default value.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from draftcli.core.models.family import FAMILIES, Family, find_family
from draftcli.core.models.kinds import Facts, check_kind
from draftcli.errors import InputError, brief

Fits = Callable[[Any, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Rule:
    """What we make of one field.

    Attributes:
        why: what it does, and so why this rule.
        fits: whether a value, beside all fields of its configuration, is one under which our formulas hold.
        allowed: those values in words.
        is_grid: it only changes which noise levels a sampler visits, so that another value is a warning.
    """

    why: str
    fits: Fits = lambda _value, _fields: True
    allowed: str = "any value"
    is_grid: bool = False


def _only(why: str, *values: Any, is_grid: bool = False) -> Rule:
    return Rule(why, lambda value, _: value in values, " or ".join(map(repr, values)), is_grid)


def _rules(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_scale(value: Any, _: Mapping[str, Any]) -> bool:
    return _is_number(value) and value != 0


def _is_per_channel(value: Any, fields: Mapping[str, Any]) -> bool:
    """None in both of latents_mean and latents_std, or a number for each latent channel in both."""
    if value is None:
        return fields.get("latents_mean") is None and fields.get("latents_std") is None
    return isinstance(value, list | tuple) and len(value) == fields["latent_channels"] and all(map(_is_number, value))


_OFF = (False, None)
_NOISE = "{family}'s noise levels"
_BUILT = Rule("used: diffusers builds the network by it, for us as for its own pipeline")
_SOLVER = Rule("harmless: of that class's own solver; ours is sampling.sampler")
_OUR_GRID = Rule("harmless: the grid of steps is sampling.schedule or sampling.timesteps")
_CLIPPING = Rule("harmless: it counts only with clip_sample or thresholding, which are refused")
_FLOW = Rule("harmless: it counts only with use_flow_sigmas, which is refused")
_GRID = "the class's own noise levels"

_SCHEDULER: dict[str, Rule] = {
    **_rules(Rule("used, unless model.prediction_type or model.zero_terminal_snr say otherwise"),
             "prediction_type", "rescale_betas_zero_snr"),
    "num_train_timesteps": _only(_NOISE, 1000),
    "beta_start": _only(_NOISE, 0.00085),
    "beta_end": _only(_NOISE, 0.012),
    "beta_schedule": _only(_NOISE, "scaled_linear"),
    "trained_betas": _only("noise levels of its own", None),
    "timestep_type": _only("the network is given the logarithm of the noise level", "discrete"),
    "use_flow_sigmas": _only("flow matching", *_OFF),
    "clip_sample": _only("predictions of the image are clipped", *_OFF),
    "thresholding": _only("predictions of the image are clipped", *_OFF),
    "variance_type": _only("a learned variance", None, "fixed_small", "fixed_small_log", "fixed_large",
                           "fixed_large_log"),
    **_rules(_only(_GRID, *_OFF, is_grid=True),
             "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    "interpolation_type": _only(_GRID, "linear", is_grid=True),
    "final_sigmas_type": _only(_GRID, "zero", is_grid=True),
    "lambda_min_clipped": _only(_GRID, -math.inf, is_grid=True),
    "timestep_scaling": _only("how much of x an LCM mixes into the image", 10.0, is_grid=True),
    **_rules(_OUR_GRID, "timestep_spacing", "steps_offset", "original_inference_steps"),
    **_rules(Rule("harmless: the ends of Karras, exponential or beta sigmas"), "sigma_min", "sigma_max"),
    **_rules(_CLIPPING, "clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"),
    **_rules(_FLOW, "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"),
    **_rules(_SOLVER, "algorithm_type", "corrector_order", "disable_corrector", "euler_at_final", "lower_order_final",
             "noise_sampler_seed", "predict_x0", "predictor_order", "set_alpha_to_one", "skip_prk_steps",
             "solver_order", "solver_p", "solver_type", "tau_func"),
}  # fmt: skip

_INPUT = "it wants an input beside prompt, size keys and noise"
_UNET: dict[str, Rule] = {
    **_rules(Rule("4 and 4, or kinds.py says what model it is"), "in_channels", "out_channels"),
    "addition_embed_type": Rule("what goes in beside text and noise: the family's, as check_fields asks it"),
    "time_cond_proj_dim": Rule("used: sampling.guidance_embedding is what such a UNet is told"),
    **_rules(_only(_INPUT, None), "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"),
    "attention_type": _only(_INPUT, "default"),
    **_rules(Rule("harmless: a default for images; ours is sampling.height and width"), "sample_size"),
    **_rules(Rule("harmless: dropout is off, in training as in drawing"), "dropout"),
    **_rules(_BUILT, "act_fn", "addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim",
             "block_out_channels", "center_input_sample", "class_embeddings_concat", "conv_in_kernel",
             "conv_out_kernel", "cross_attention_dim", "cross_attention_norm", "down_block_types",
             "downsample_padding", "dual_cross_attention", "flip_sin_to_cos", "freq_shift", "layers_per_block",
             "mid_block_only_cross_attention", "mid_block_scale_factor", "mid_block_type", "norm_eps",
             "norm_num_groups", "num_attention_heads", "only_cross_attention",
             "projection_class_embeddings_input_dim", "resnet_out_scale_factor", "resnet_skip_time_act",
             "resnet_time_scale_shift", "reverse_transformer_layers_per_block", "time_embedding_act_fn",
             "time_embedding_dim", "time_embedding_type", "timestep_post_act", "transformer_layers_per_block",
             "up_block_types", "upcast_attention", "use_linear_projection"),
}  # fmt: skip

_VAE: dict[str, Rule] = {
    "scaling_factor": Rule("latents are divided by it", _is_scale, "a number other than 0"),
    **_rules(Rule("latents are scaled and shifted by them", _is_per_channel,
                  "a number for each latent channel in both latents_mean and latents_std, or neither"),
             "latents_mean", "latents_std"),
    "shift_factor": _only("{family}'s latents are not shifted by one number", None, 0),
    "out_channels": _only("images are red, green and blue", 3),
    **_rules(Rule("harmless: of the encoder, which is never used"), "in_channels", "down_block_types",
             "use_quant_conv"),
    **_rules(Rule("harmless: the precision is model.vae_precision, float32 by default"), "force_upcast"),
    **_rules(Rule("harmless: a default for tiles; ours is model.vae_tile"), "sample_size"),
    **_rules(_BUILT, "act_fn", "block_out_channels", "latent_channels", "layers_per_block", "mid_block_add_attention",
             "norm_num_groups", "up_block_types", "use_post_quant_conv"),
}  # fmt: skip

FIELDS: dict[str, dict[str, Rule]] = {"scheduler": _SCHEDULER, "unet": _UNET, "vae": _VAE}
_ADVICE = {
    "scheduler": "correct scheduler_config.json if the model was trained with {family}'s noise, "
    "else choose another model",
    "unet": "choose a text-to-image {family}",
    "vae": "set model.vae to another VAE for {family}",
}

# Classes of schedulers that draw from the same noise process as every family here, each with its own solver.
SAME_PROCESS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE",
        "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
        "KDPM2Discrete", "LMSDiscrete", "PNDM", "SASolver", "UniPCMultistep",
    )
)  # fmt: skip
# The same process too, but with fresh noise at each of a few steps, which the model was distilled for.
FEW_STEPS = frozenset({"LCMScheduler", "TCDScheduler"})
_CLASSES = {
    "scheduler": SAME_PROCESS | FEW_STEPS,
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL"}),
}
_OTHER_PROCESSES = {"EDM": "EDM", "Flow": "flow matching"}  # by how the class's name begins


def check_fields(part: str, module: Any, where: str, family: Family | None = None, sampler: str = "euler") -> None:
    """Refuse a part of a model whose configuration asks for other formulas than its family's, and warn where it asks
    for another grid than ours.

    Args:
        part: scheduler, unet or vae.
        module: diffusers' object, with its `config`.
        where: what the user calls the place that it came from.
        family: of the model; None: SDXL.
        sampler: sampling.sampler, which may be what the scheduler asks for.

    Raises:
        InputError: its class, or a field of its configuration, is not one that we know how to go by.
    """
    family = family or find_family()
    kind, fields, rules = type(module), dict(module.config), {**FIELDS[part]}
    check_class(part, kind.__name__, where, family)
    if part == "unet":
        check_kind(Facts(taken=fields["in_channels"], given=fields["out_channels"]), where)
        rules["addition_embed_type"] = _added_input(family)
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}
    fresh = f"{kind.__name__} (fresh noise at each step, as sampling.sampler lcm)"
    is_ours = (kind.__name__, sampler) == ("LCMScheduler", "lcm")
    asked = [fresh] if kind.__name__ in FEW_STEPS and not is_ours else []
    for name, value in sorted(fields.items()):
        rule = rules.get(name)
        if name.startswith("_") or (rule is not None and name not in defaults):
            continue  # who wrote it; or of a class that reads this file too, while its own does not
        if rule is None:
            default = defaults.get(name)
            if value not in (list(default) if isinstance(default, tuple) else default, default, *_OFF):
                raise InputError(
                    f"{where}: the {part}'s {name} is {brief(value)}, a field that draftp does not know; take it out "
                    "of the configuration if nothing uses it"
                )
        elif not rule.fits(value, fields):
            if not rule.is_grid:
                origin = f", the default of {kind.__name__}" if name in fields.get("_use_default_values", ()) else ""
                raise InputError(
                    f"{where}: the {part}'s {name} is {brief(value)}{origin} ({rule.why.format(family=family.short)}); "
                    f"draftp knows {rule.allowed}; {_ADVICE[part].format(family=family.short)}"
                )
            asked.append(f"{name} {value}")
    if asked:
        warnings.warn(
            f"{where}: the scheduler asks for {', '.join(asked)}; draftp uses sampling.sampler on the grid of "
            "sampling.schedule",
            stacklevel=2,
        )


def _added_input(family: Family) -> Rule:
    """What a family's UNet takes beside text and noise; what the others' take tells whose another one is."""
    each = [f"{some.pipeline} has {some.added_input!r}" for some in map(find_family, FAMILIES)]
    return _only("size keys and pooled text, or nothing: " + ", ".join(each), family.added_input)


def check_class(part: str, name: str, where: str, family: Family | None = None) -> None:
    """Refuse a part of a model that is of a class whose formulas are not its family's.

    Args:
        part: scheduler, unet or vae.
        name: of diffusers' class.
        where: what the user calls the place that it came from.
        family: of the model; None: SDXL.

    Raises:
        InputError: the class is not one that we know how to go by.
    """
    if name not in _CLASSES[part]:
        short = (family or find_family()).short
        process = next((f" ({words})" for start, words in _OTHER_PROCESSES.items() if name.startswith(start)), "")
        raise InputError(
            f"{where}: its {part} is of the class {name}{process}, whose formulas are not those of {short}; "
            f"{_ADVICE[part].format(family=short)}"
        )
