"""A LoRA with SDXL's real shapes and random weights, and what a program's own code must make of it.

    python benchmarks/clients/sdxl_lora.py FOLDER

writes into FOLDER, by kohya's names and by diffusers', a LoRA of the 700 layers that are trained by default (94 MB) and
one of all 1,059 linear layers and convolutions (160 MB). The other scripts of this folder give such a file to one
program's own code, whose source is given by its path and of which nothing is copied here:

    python benchmarks/clients/comfyui.py --source ComfyUI FOLDER/default-kohya.safetensors

Each prints how many modules the program matched and the largest error of what it adds to their weights, and fails
where that is not what the table in docs/formats.md says. Networks are made without weights, so that 4 GB are enough.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from draftcli.core.lora.adapters import DEFAULT_TARGETS
from draftcli.core.lora.files import Lora, Update
from draftcli.core.models.family import find_family
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.models.original_names import original_unet_names
from draftcli.core.models.sdxl import SDXL_CONFIG
from draftcli.export.formats import DiffusersLora, KohyaLora, MergeJob
from draftcli.export.inputs import Changes
from draftcli.export.lineage import Lineage

RANK, ALPHA = 4, 2.0
LARGEST_ERROR = 1e-6  # of a sum of RANK products of float32, beside updates of about 0.1


def sdxl_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """The weights of SDXL's linear layers and convolutions, by network and module as a LoRA names them."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for part, network in modules_on_meta(SDXL_CONFIG).items():
        if part == "vae":
            continue
        start = "" if part == "unet" or hasattr(network, "text_model") else "text_model."
        layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        found[part] = {start + name: tuple(module.weight.shape) for name, module in layers.items()}
    return found


def random_lora(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Lora:
    """A LoRA of these layers."""
    generator = torch.Generator().manual_seed(0)

    def update(shape: tuple[int, ...]) -> Update:
        down = torch.randn(RANK, *shape[1:], generator=generator) / RANK
        up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator) / RANK
        return Update(down, up, ALPHA / RANK)

    return Lora("random", {p: {m: update(s) for m, s in layers.items()} for p, layers in shapes.items()})


def write_files(folder: Path) -> None:
    """Both LoRAs in both namings."""
    folder.mkdir(parents=True, exist_ok=True)
    everything, family = sdxl_shapes(), find_family()
    default = {m: s for m, s in everything["unet"].items() if any(m.endswith(f".{t}") for t in DEFAULT_TARGETS)}
    for name, shapes in (("default", {"unet": default}), ("all", everything)):
        changes = Changes([random_lora(shapes)])
        lineage = Lineage(name, family, family.edition(everything["unet"], None))
        job = MergeJob(None, changes, everything, lineage, None, None, 0, lambda _: nullcontext(lambda _: None))
        for kind, ending in ((KohyaLora, "kohya"), (DiffusersLora, "diffusers")):
            kind(job).write(folder / f"{name}-{ending}.safetensors")


@dataclass
class LoraFile:
    """What a file holds.

    Attributes:
        tensors: all of it.
        modules: (up, down, scale) by the part of the key that names the module.
        by_kohya: whether it has kohya's names, rather than diffusers'.
    """

    tensors: dict[str, Tensor]
    modules: dict[str, tuple[Tensor, Tensor, float]]
    by_kohya: bool

    def delta(self, module: str) -> Tensor:
        """What it adds to a module's weight, in the weight's shape."""
        up, down, scale = self.modules[module]
        return (scale * up.flatten(1).double() @ down.flatten(1).double()).reshape(up.shape[0], *down.shape[1:])


def read(file: Path) -> LoraFile:
    """Read a file that `write_files` or `draftp merge-lora` wrote."""
    tensors, modules = load_file(file), {}
    endings = (".lora_up.weight", ".lora_down.weight", ".lora_B.weight", ".lora_A.weight")
    for name in dict.fromkeys(key.removesuffix(e) for key in tensors for e in endings if key.endswith(e)):
        found = [tensors[name + ending] for ending in endings if name + ending in tensors]
        alpha = tensors.get(f"{name}.alpha")
        modules[name] = (*found, 1.0 if alpha is None else float(alpha) / len(found[1]))
    return LoraFile(tensors, modules, by_kohya=any(key.startswith("lora_unet_") for key in tensors))


def single_file_modules() -> nn.Module:
    """SDXL's UNet by the names of the original code, without weights and without a way through it."""
    unet = sdxl_shapes()["unet"]
    return modules_by_name({original_unet_names(unet)[name]: shape for name, shape in unet.items()})


def modules_by_name(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A tree of linear layers and convolutions without weights, by their dotted names."""
    root = nn.Module()
    for name, (out, width, *kernel) in shapes.items():
        *parents, last = name.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        layer = nn.Conv2d(width, out, tuple(kernel), device="meta") if kernel else nn.Linear(width, out, device="meta")
        at.add_module(last, layer)
    return root


def arguments(program: str) -> tuple[Path, LoraFile]:
    """The program's source, put in front of sys.path, and the LoRA that it is given."""
    parser = argparse.ArgumentParser(description=f"Give a LoRA to {program}'s own code.")
    parser.add_argument("--source", type=Path, required=True, help=f"where {program}'s source is")
    parser.add_argument("lora", type=Path, help="a .safetensors file")
    given = parser.parse_args()
    sys.argv = sys.argv[:1]  # some programs parse the command line when they are imported
    sys.path.insert(0, str(given.source.resolve()))
    return given.source.resolve(), read(given.lora)


def without(*names: str) -> None:
    """Stand in for packages that a program imports and that a LoRA has nothing to do with, where they are missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            module: ModuleType = mock.MagicMock(name=name)
            module.__spec__ = mock.MagicMock()
            sys.modules[name] = module


def compare(program: str, lora: LoraFile, added: Mapping[str, Callable[[], Tensor]], expected: int) -> None:
    """Print what the program matched and how far off it is; leave with 1 where that is not what is expected.

    Args:
        program: its name.
        lora: what it was given.
        added: what it adds to the weight of each module that it matched, by the module's name in the file.
        expected: how many modules it must match.
    """
    worst = max((float((make().double() - lora.delta(name)).abs().max()) for name, make in added.items()), default=0.0)
    print(f"{program}: {len(added)} of {len(lora.modules)} modules matched, largest error {worst:.1e}")
    if len(added) != expected or not worst <= LARGEST_ERROR:
        sys.exit(f"expected {expected} modules and an error of at most {LARGEST_ERROR:.0e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_files(parser.parse_args().folder)
