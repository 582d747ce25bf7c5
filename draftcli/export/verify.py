"""Is what was written what was meant? Keys are counted in the files; then diffusers' own loaders open them, and the
networks' outputs on fixed input are compared with those of base + adapter, one network in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftcli.core.lora.files import LORA_PARTS, Lora, Shapes, Update, attach_loras
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.family import Family, tokenizer_folders
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.models.vae import load_vae
from draftcli.core.models.weight_files import clean_key, weight_files
from draftcli.errors import DraftpError, InputError, first_line
from draftcli.export.base import ModelLocation
from draftcli.export.inputs import Changes
from draftcli.export.other_vae import OtherVae
from draftcli.export.tensors import close_files, stored_tensors

# Largest difference allowed, as a part of the largest value of the output. Rounding of each weight is relative to it
# (2^-9 for bfloat16, 2^-12 for float16, 2^-25 for float32) and adds up over some hundred layers.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 2e-4, torch.float64: 2e-4}
LATENT = (16, 24)
_SEED = 20


@dataclass(frozen=True)
class Comparison:
    """One network of the result beside base + adapter, on the same input.

    Attributes:
        part: the network.
        difference: largest absolute difference of the outputs.
        tolerance: how large it may be.
        effect: how far the changes themselves move the output at most; 0 where they don't concern this network.
        size: largest value of the output.
    """

    part: str
    difference: float
    tolerance: float
    effect: float
    size: float

    def line(self) -> str:
        """For people."""
        effect = f"the adapter moves it by {self.effect:.2g}" if self.effect else "not adapted"
        return (
            f"{self.part}: loaded again it differs from base + adapter by at most {self.difference:.2g} "
            f"(allowed {self.tolerance:.2g}; {effect})"
        )


Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name


def check_tensors(where: Path, expected: Tensors, found: Tensors) -> str:
    """Every tensor that must be in the result is, with its dtype and shape, and no other.

    Returns:
        how many there are, for people.

    Raises:
        DraftpError: a tensor is missing or unknown, or has another shape or dtype.
    """
    if odd := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
        raise DraftpError(f"{where}: {len(odd)} tensors are not as meant, the first is {odd[0]}")
    return f"{len(found)} tensors, all accounted for"


def tensors_of_file(file: Path) -> Tensors:
    """What a file holds."""
    return {key: (stored.dtype, stored.shape) for key, stored in stored_tensors(file).items()}


def tensors_of_folder(folder: Path, family: Family) -> Tensors:
    """What a diffusers folder holds: `part.key`, with keys as `clean_key` has them."""
    return {
        f"{part}.{clean_key(part, key)}": facts
        for part in family.networks
        for file in weight_files(folder / part, part, None)
        for key, facts in tensors_of_file(file).items()
    }


def check_lora(file: Path, lora: Lora, shapes: Shapes) -> str:
    """The file, read back, has the layers of `lora` with the same matrices and scales: nothing is multiplied out.

    A is the same to the last bit, and so is B where the scale is the same. A file that has another part of the scale in
    its alphas has the same B times scale but for the rounding of B's dtype.

    Args:
        file: the result.
        lora: in the dtype written, with scales multiplied in: `write.written_as`.
        shapes: of the base's weights.

    Returns:
        how many layers there are, for people.

    Raises:
        DraftpError: it is no LoRA for weights of these shapes, a layer is missing or unknown, or has other values.
    """
    try:
        found = read_lora(file, shapes)
    except InputError as error:  # the user did not write this file
        raise DraftpError(f"verification failed: {error}") from error
    wanted = {(part, module): update for part, module, update in lora.updates()}
    read = {(part, module): update for part, module, update in found.updates()}
    if wanted.keys() != read.keys():
        raise DraftpError(f"{file}: {len(wanted.keys() ^ read.keys())} layers are not as meant")
    for place, update in wanted.items():
        if not _same_update(update, read[place]):
            raise DraftpError(f"{file}: {'.'.join(place)} is not as meant")
    return f"{len(read)} layers, all fit the model"


def _same_update(meant: Update, found: Update) -> bool:
    if any(getattr(meant, side).dtype != getattr(found, side).dtype for side in ("down", "up")):
        return False
    if meant.up.shape != found.up.shape or not torch.equal(meant.down, found.down):
        return False
    if meant.scale == found.scale:
        return torch.equal(meant.up, found.up)
    one, two = (update.scale * update.up.double() for update in (meant, found))
    kind = torch.finfo(found.up.dtype)
    smallest = kind.smallest_normal * kind.eps * (abs(meant.scale) + abs(found.scale))
    return bool(((one - two).abs() <= kind.eps * one.abs() + smallest).all())


def compare_model(
    base: ModelLocation, changes: Changes, result: ModelLocation, dtype: torch.dtype, vae: OtherVae | None = None
) -> list[Comparison]:
    """The result, as diffusers' own loader has it, beside base + adapter; its VAE tensor by tensor.

    Args:
        base: what was merged into.
        changes: what was merged.
        result: what was written.
        dtype: of the weights written, for the tolerance.
        vae: what the result decodes with; None: with the base's own.

    Raises:
        DraftpError: the loader fails, a difference is above tolerance, or the VAE is not that one bit for bit.
    """
    touched = {part for part, _ in changes.touched()}
    found = []
    for part in (part for part in LORA_PARTS if part in base.family.networks):
        before, wanted = _base_and_tuned(base, part, changes)
        with _loaded(result, part) as network:
            found.append(_compared(part, before, wanted, _output(network), dtype, part in touched))
    if vae is not None:
        with _loader_errors(result.path):
            _check_same_vae(result.path, vae.load(), load_vae(str(result.path), vae.like), f"model.vae {vae.name}")
    else:
        with _loaded(base, "vae") as one, _loaded(result, "vae") as two:
            _check_same_vae(result.path, one, two, "the base's")
    return found


def _check_same_vae(result: Path, wanted: Any, found: Any, name: str) -> None:
    """The same configuration is not asked for: that of a folder is a copy, and a single file has none."""
    own, other = wanted.float().state_dict(), found.float().state_dict()
    if own.keys() != other.keys() or not all(torch.equal(own[key], other[key]) for key in own):
        raise DraftpError(f"{result}: its VAE is not {name}")


def compare_lora(base: ModelLocation, lora: Lora, file: Path, dtype: torch.dtype) -> list[Comparison]:
    """The LoRA file, put on the base by diffusers' own loader, beside the LoRA that was meant.

    Args:
        base: any model it fits.
        lora: before casting.
        file: what was written.
        dtype: of the matrices written, for the tolerance.

    Raises:
        DraftpError: the loader fails, or a difference is above tolerance.
    """
    import diffusers

    pipeline = getattr(diffusers, base.family.pipeline)
    unet_config = modules_on_meta(base.config, base.family, ["unet"])["unet"].config
    found = []
    for part in lora.parts:
        before, wanted = _base_and_tuned(base, part, Changes([lora]))
        with _loaded(base, part) as network, _loader_errors(file):
            read: Any = pipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, unet_config=unet_config, return_lora_metadata=True
            )
            state, alphas, metadata = read
            if part == "unet":
                pipeline.load_lora_into_unet(state, alphas, network, metadata=metadata)
            else:
                pipeline.load_lora_into_text_encoder(state, alphas, network, prefix=part, metadata=metadata)
            found.append(_compared(part, before, wanted, _output(network), dtype, touched=True))
    return found


def _base_and_tuned(base: ModelLocation, part: str, changes: Changes) -> tuple[Tensor, Tensor]:
    with _loaded(base, part) as network:
        before = _output(network)
        if part == "unet" and changes.full:
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(changes.apply("unet", name, parameter))
        elif any(part in lora.parts for lora in changes.loras):
            attach_loras(network, [(lora, 1.0) for lora in changes.loras], part)
        return before, _output(network)


def _compared(
    part: str, before: Tensor, wanted: Tensor, found: Tensor, dtype: torch.dtype, touched: bool
) -> Comparison:
    size = float(wanted.abs().max())
    effect = float((wanted - before).abs().max()) if touched else 0.0
    result = Comparison(part, float((found - wanted).abs().max()), TOLERANCE.get(dtype, 0.5) * size, effect, size)
    if not result.difference <= result.tolerance:  # NaN as well
        raise DraftpError(
            f"verification failed: the {part} loaded again differs from base + adapter by up to "
            f"{result.difference:.3g} (allowed {result.tolerance:.3g}); nothing was kept"
        )
    if touched and effect == 0:
        raise DraftpError(f"verification failed: the changes don't move the {part}'s output at all; was it trained?")
    if touched and result.difference >= effect:
        raise DraftpError(
            f"verification failed: rounding moves the {part}'s output by {result.difference:.3g}, the changes by "
            f"{effect:.3g}: they would be lost; take --dtype fp32, or keep them as a LoRA with --format lora or kohya"
        )
    return result


@contextmanager
def _loaded(location: ModelLocation, part: str) -> Iterator[Any]:
    """One network in float32, by the pipeline's own loader, with all others left out."""
    import diffusers

    family, path = location.family, location.path
    pipeline = getattr(diffusers, family.pipeline)
    others = dict.fromkeys(name for name in (*family.networks, *tokenizer_folders(family)) if name != part)
    with _loader_errors(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        if location.single_file:
            from diffusers import EulerDiscreteScheduler

            pipe = pipeline.from_single_file(
                str(path),
                config=str(location.config),
                torch_dtype=torch.float32,
                scheduler=EulerDiscreteScheduler(steps_offset=1),  # as the pipeline of SD 1.x wants it
                **family.options,
                **others,
            )
        else:
            pipe = pipeline.from_pretrained(
                path,
                torch_dtype=torch.float32,
                variant=location.variant,
                use_safetensors=True,
                **family.options,
                **others,
            )
        network = getattr(pipe, part)
    unset = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
    if unset:
        raise DraftpError(f"verification failed: {path}: diffusers finds {len(unset)} tensors of {part} missing")
    yield network.eval().requires_grad_(False)
    del pipe, network
    close_files()


@contextmanager
def _loader_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (DraftpError, OSError, KeyboardInterrupt):
        raise
    except Exception as error:
        import diffusers

        # It raises errors of many types for files that it cannot load.
        raise DraftpError(
            f"verification failed: diffusers {diffusers.__version__} does not take {path.name}; update it, or take "
            f"--verify keys ({type(error).__name__}: {first_line(error)})"
        ) from error


@torch.no_grad()
def _output(network: Any) -> Tensor:
    """The output of a network on fixed input."""
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config = network.config
    if hasattr(config, "vocab_size"):
        ids = torch.randint(config.vocab_size - 2, (2, 77), generator=generator)
        ids[:, 40:] = config.vocab_size - 1  # CLIP's end of text is its last token
        output = network(ids, output_hidden_states=True)
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return torch.cat([output.hidden_states[-2].flatten(1), pooled.flatten(1)], dim=1)
    added = None
    latents, text = normal(2, config.in_channels, *LATENT), normal(2, 77, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2)
        pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": normal(2, pooled_width), "time_ids": sizes}
    return network(latents, torch.tensor([801, 201]), encoder_hidden_states=text, added_cond_kwargs=added).sample
