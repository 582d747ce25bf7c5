"""Which models draftp does not tune, how each is recognised before its weights are read, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcli.core.models.family import FAMILIES, find_family
from draftcli.core.models.meta import read_json
from draftcli.core.models.original_layout import ORIGINAL_UNET
from draftcli.errors import InputError, brief


@dataclass(frozen=True)
class Facts:
    """What can be seen of a model without reading its weights.

    Attributes:
        class_name: of a folder: what model_index.json names, or config.json of one network alone.
        keys: of a single file: the names of its tensors.
        taken: channels of the UNet's input; None: not known.
        given: channels of its output; None: not known.
        refiner: the sign that it is one, in words; None where there is none.
    """

    class_name: str = ""
    keys: tuple[str, ...] = ()
    taken: int | None = None
    given: int | None = None
    refiner: str | None = None

    def key(self, pattern: str) -> str | None:
        """The sign that a tensor's name begins with `pattern`, in words; None where there is none."""
        found = next((key for key in self.keys if re.match(pattern, key)), None)
        return found and f"it holds the tensor {found}"

    def named(self, pattern: str) -> str | None:
        """The sign that the class's name begins with `pattern`, in words."""
        return f"its class is {self.class_name[:80]}" if re.match(pattern, self.class_name) else None

    def takes(self, *channels: int) -> str | None:
        """The sign that the UNet takes so many channels, in words."""
        return f"the UNet takes {self.taken} channels" if self.taken in channels else None


@dataclass(frozen=True)
class OtherModel:
    """A kind of model that draftp does not tune.

    Attributes:
        sign: by which it is recognised, in words; None where it is not this kind.
        what: follows from the sign, in words that go on after "so".
        advice: what to do; None: choose one that draftp tunes.
        takes_loras: whether its layers are those of a family all the same, so that merge-lora can change them.
    """

    sign: Callable[[Facts], str | None]
    what: str
    advice: str | None = None
    takes_loras: bool = False


def _of_vae_alone(facts: Facts) -> str | None:
    part = r"(first_stage_model\.)?(encoder|decoder|quant_conv|post_quant_conv)\."
    return facts.key(part) if all(re.match(part, key) for key in facts.keys) else None


def _latents_of_another_vae(facts: Facts) -> str | None:
    return facts.takes(16, 32) if facts.taken == facts.given else None


# In the order in which they are looked for.
OTHER_MODELS = (
    OtherModel(
        lambda f: f.refiner or f.key(r"conditioner\.embedders\.0\.model\."),
        "it is the refiner of SDXL",
        "give the base model whose images it refines",
    ),
    OtherModel(lambda f: f.takes(9), "it is an inpainting model", takes_loras=True),
    OtherModel(lambda f: f.takes(8), "it is an editing model, such as InstructPix2Pix", takes_loras=True),
    OtherModel(lambda f: f.takes(5), "it is a depth model", takes_loras=True),
    OtherModel(lambda f: f.takes(7), "it is an upscaler", takes_loras=True),
    OtherModel(_latents_of_another_vae, "it makes latents for another VAE, as SDXL retrained as rectified flow does"),
    OtherModel(
        lambda f: f"the UNet takes {f.taken} channels" if f.taken not in (None, 4) else None,
        "it is a model for something else",
        takes_loras=True,
    ),
    OtherModel(
        lambda f: f"the UNet gives {f.given} channels" if f.given not in (None, 4) else None,
        "it predicts more than the noise",
        takes_loras=True,
    ),
    OtherModel(
        lambda f: f.named("Flux") or f.key(rf"({ORIGINAL_UNET})?(double_blocks|single_transformer_blocks)\."),
        "it is FLUX",
    ),
    OtherModel(
        lambda f: f.named("StableDiffusion3|SD3") or f.key(rf"({ORIGINAL_UNET})?joint_blocks\."),
        "it is Stable Diffusion 3",
    ),
    OtherModel(
        lambda f: f.key(r"cond_stage_model\.model\."),
        "it is Stable Diffusion 2 as a single file",
        "give that model as a diffusers folder or hub id",
    ),
    OtherModel(
        lambda f: (
            f.named(r"ControlNet\w*Model|StableDiffusion\w*ControlNet")
            or f.key(r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|lora_controlnet")
        ),
        "it is a ControlNet",
        "give the model that it steers: draftp tunes that one, without it",
    ),
    OtherModel(
        lambda f: f.named(r"(Asymmetric)?Autoencoder|ConsistencyDecoderVAE") or _of_vae_alone(f),
        "it is a VAE alone",
        "give a whole model, and this one as model.vae if it is to decode",
    ),
    OtherModel(
        lambda f: f.key(r"lora_(unet|te)|.*[._]lora[._](A|B|down|up)\."),
        "it is a LoRA",
        "give the model that it is for, and this file as one of model.loras or to --lora",
    ),
)


def check_kind(facts: Facts, where: str, *, to_merge: bool = False) -> None:
    """Refuse a model that is one of OTHER_MODELS.

    Args:
        facts: of the model.
        where: what the user calls the place that it came from.
        to_merge: it is not to be tuned or drawn with, only to have a LoRA merged into it.

    Raises:
        InputError: it is one, and where `to_merge` one whose layers are those of no family.
    """
    for other in OTHER_MODELS:
        if (sign := other.sign(facts)) and not (to_merge and other.takes_loras):
            tuned = " or ".join(find_family(name).title for name in FAMILIES)
            advice = other.advice or (
                f"draftp tunes text-to-image models, whose UNet has 4 channels in and out; choose {tuned}"
            )
            raise InputError(f"{where}: {sign}, so {other.what}; {advice}")


def facts_of_folder(folder: Path) -> Facts:
    """What the configuration in a diffusers folder, of a whole model or of one network, says of it.

    Raises:
        InputError: a configuration cannot be read.
    """
    files = [folder / "model_index.json", folder / "config.json"]
    index = read_json(next((file for file in files if file.is_file()), files[0]))
    unet: dict[str, Any] = {}
    with suppress(InputError):  # of one that is damaged or missing its loader will tell
        unet = read_json(folder / "unet" / "config.json")
    refiner = None
    if index.get("requires_aesthetics_score") is True:
        refiner = "its model_index.json says requires_aesthetics_score"
    elif _is_absent(index.get("text_encoder", "?")) and not _is_absent(index.get("text_encoder_2")):
        refiner = "it has the second text encoder alone"
    return Facts(
        str(index.get("_class_name", "")),
        (),
        _number(unet.get("in_channels")),
        _number(unet.get("out_channels")),
        refiner,
    )


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _is_absent(part: Any) -> bool:
    """Whether model_index.json names no class for a part."""
    return part is None or (isinstance(part, list) and not any(part))


def facts_of_file(tensors: Any) -> Facts:
    """What the header of a single file says of it; `tensors` is the file, opened by `safe_open`."""
    keys, metadata = tuple(tensors.keys()), tensors.metadata() or {}
    found = set(keys)

    def size(key: str, dimension: int) -> int | None:
        shape = tensors.get_slice(ORIGINAL_UNET + key).get_shape() if ORIGINAL_UNET + key in found else []
        return shape[dimension] if len(shape) > dimension else None

    said = metadata.get("modelspec.architecture", "")
    refiner = f"its modelspec.architecture is {brief(said)}" if said.endswith("refiner") else None
    return Facts("", keys, size("input_blocks.0.0.weight", 1), size("out.2.weight", 0), refiner)
