"""Where pictures come from: a run, or any SDXL with any number of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcli.config import Config, load_config, without_effect
from draftcli.errors import InputError
from draftcli.runs import find_run, split_scale, unet_files, unfinished_note

if TYPE_CHECKING:
    from draftcli.core.draftp import SDXLDRaFTPModel

# A run's settings that say how to train. They don't matter for drawing, and some don't go with other numbers of steps.
# The base is drawn with as it is, not in 8 bits: as other programs will, that load the LoRA.
NOT_FOR_DRAWING: dict[str, Any] = {"draftp": {}, "sharding": {}, "model.quantize": None}


@dataclass(frozen=True)
class DrawingSource:
    """A base and what is tuned on it.

    Attributes:
        cfg: the settings to draw with.
        name: for people: the run's folder, or the model.
        folder: where its pictures go unless somebody says otherwise: the run's folder, or the working directory.
        unet: folder of a UNet that was trained in full, or None.
        loras: LoRA files or folders, each with its scale.
        from_run: whether it is a run, whose settings give size and prompts.
        warnings: what people should know about it.
    """

    cfg: Config
    name: str
    folder: Path
    unet: Path | None
    loras: list[tuple[Path, float]]
    from_run: bool
    warnings: tuple[str, ...] = ()

    @property
    def is_tuned(self) -> bool:
        """Whether there is anything beside the base."""
        return self.unet is not None or bool(self.loras)

    def load(self) -> SDXLDRaFTPModel:
        """The model: its base, and as tuned the run's UNet and all LoRAs together.

        Raises:
            InputError: model or LoRA cannot be loaded, or don't fit each other.
        """
        from draftcli.core.draftp import SDXLDRaFTPModel
        from draftcli.core.lora.files import LORA_PARTS, read_lora, weight_shapes
        from draftcli.core.models.loading import load_parts

        parts = load_parts(self.cfg.model, trained_in_full=self.unet is not None)
        shapes = {name: weight_shapes(network) for name, network in parts.modules.items() if name in LORA_PARTS}
        loras = [(read_lora(path, shapes), scale) for path, scale in self.loras]
        model = SDXLDRaFTPModel(self.cfg, parts, loras)
        if self.unet is not None:
            _load_unet(model.unet, self.unet)
        return model


def find_source(
    run: str | None,
    model: str | None,
    loras: Sequence[str],
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> DrawingSource:
    """Find what to draw with.

    Args:
        run: see `runs.find_run`; None and no `model`: the newest run.
        model: as `model.pretrained` takes it, instead of a run.
        loras: PATH or PATH=SCALE, on top of the run's own or on the model.
        overrides: KEY=VALUE, laid over the run's settings or the defaults.
        values: likewise, by dotted key.

    Raises:
        InputError: no such run or LoRA, both run and model, a setting that is not allowed.
    """
    if run is not None and model is not None:
        raise InputError(
            f"both the run {run} and --model {model} were given; give one of them. For a run's LoRA on another model: "
            f"--model {model} --lora {run}"
        )
    files = [parse_lora(text) for text in loras]
    values = {**NOT_FOR_DRAWING, **(values or {})}
    if model is not None:
        cfg = load_config(None, overrides, {"model.pretrained": model, "model.precision": _precision(), **values})
        return DrawingSource(cfg, model, Path(), None, files, from_run=False, warnings=_without_effect(cfg))
    found, weights = find_run(run)
    cfg = load_config(found.config, overrides, values)
    note = unfinished_note(found, weights, run)
    in_full = cfg.peft.peft_scheme == "none"
    return DrawingSource(
        cfg,
        name=str(found.folder),
        folder=found.folder,
        unet=weights / "unet" if in_full else None,
        loras=files if in_full else [(weights, 1.0), *files],
        from_run=True,
        warnings=(*([note] if note else []), *_without_effect(cfg)),
    )


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH=SCALE.

    Raises:
        InputError: nothing is there, or the scale is no number.
    """
    name, scale = split_scale(text, lambda name: Path(name).exists(), f"--lora {text}")
    if not Path(name).exists():
        raise InputError(f"--lora {name}: there is no such file or folder")
    return Path(name), scale


def _without_effect(cfg: Config) -> tuple[str, ...]:
    """Of the settings' warnings those that are about drawing."""
    return tuple(without_effect(cfg, "drawing"))


def _precision() -> str:
    """bf16 where a GPU computes it, as weights of SDXL's size are not worth float32 there."""
    import torch

    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def _load_unet(unet: Any, folder: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    own = {n.replace(".base_layer.", "."): t for n, t in unet.state_dict().items() if ".lora_" not in n}
    try:
        stored = {n: t for shard in unet_files(folder) for n, t in load_file(shard).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: cannot be read, it may be damaged ({error})") from error
    odd = sorted(own.keys() ^ stored.keys()) or sorted(n for n in own if own[n].shape != stored[n].shape)
    if odd:
        raise InputError(
            f"{folder} does not fit the base: {len(odd)} tensors of the UNet differ, the first is {odd[0]}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
