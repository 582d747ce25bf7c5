"""A1111: a LoRA through its Lora extension, on modules by SDXL's names. See sdxl_lora.py.

The extension's own files do the work; what it asks of the rest of the program (its settings, its page, the model that
is loaded) is stood in for.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from tempfile import mkdtemp
from types import SimpleNamespace
from unittest import mock

from sdxl_lora import arguments, compare, modules_by_name, sdxl_shapes, single_file_modules, without

source, lora = arguments("A1111")
sys.path.insert(0, str(source / "extensions-builtin" / "Lora"))
without("gradio", "einops")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

OPEN_CLIP = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def open_clip_modules() -> nn.Module:
    """The second text encoder by OpenCLIP's names."""
    layers, widths = {}, {}
    for name, shape in sdxl_shapes()["text_encoder_2"].items():
        if match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name):
            place = f"model.transformer.resblocks.{match[1]}"
            if match[2] == "self_attn.out_proj":
                widths[f"{place}.attn"] = shape[1]
            if match[2] in OPEN_CLIP:
                layers[f"{place}.{OPEN_CLIP[match[2]]}"] = shape
    root = modules_by_name(layers)
    for name, width in widths.items():
        parent, _, last = name.rpartition(".")
        root.get_submodule(parent).add_module(last, nn.MultiheadAttention(width, 1, device="meta"))
    return root


unet = nn.Module()
unet.diffusion_model = single_file_modules()
first = modules_by_name({f"transformer.{name}": shape for name, shape in sdxl_shapes()["text_encoder"].items()})
embedders = [SimpleNamespace(wrapped=first), SimpleNamespace(wrapped=open_clip_modules())]
model = SimpleNamespace(is_sdxl=True, model=unet, conditioner=SimpleNamespace(embedders=embedders))
program = mock.MagicMock(name="modules")
program.shared.sd_model = model
program.models.sd3.mmdit.QkvLinear = type("QkvLinear", (nn.Linear,), {})
program.devices.cpu, program.devices.dtype = torch.device("cpu"), torch.float32
program.shared.cmd_opts.lora_dir = mkdtemp()  # where it looks for LoRAs when it is imported
program.sd_models.read_state_dict = lambda _: dict(lora.tensors)
for name in ("", ".shared", ".devices", ".sd_models", ".errors", ".scripts", ".sd_hijack", ".cache", ".hashes",
             ".patches", ".textual_inversion", ".textual_inversion.textual_inversion", ".models", ".models.sd3",
             ".models.sd3.mmdit"):  # fmt: skip
    stand_in = program
    for part in name.split(".")[1:]:
        stand_in = getattr(stand_in, part)
    sys.modules[f"modules{name}"] = stand_in

import networks  # noqa: E402

networks.assign_network_names_to_compvis_modules(model)
found = networks.load_network("lora", SimpleNamespace(filename=__file__))  # it asks when the file was changed
modules = {module.network_key.partition(".")[0]: module for module in found.modules.values()}


def added_to(name: str) -> Tensor:
    """What it adds to one weight."""
    return modules[name].calc_updown(torch.zeros(lora.delta(name).shape))[0]


# It has no place for the second text encoder's projection, and by diffusers' names it finds nothing.
outside = [name for name in lora.modules if name.endswith("text_projection")]
added = {name: partial(added_to, name) for name in modules}
compare("A1111's Lora extension", lora, added, expected=len(lora.modules) - len(outside) if lora.by_kohya else 0)
