"""Is what was written what was meant? Keys are counted in the files; then the ecosystem's own loaders open them, and
the networks' outputs on fixed input are compared with base + adapter, one network in memory at a time.
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

from draftcli.core.lora.files import Lora, attach_loras, read_lora
from draftcli.core.models.meta import PARTS, modules_on_meta
from draftcli.errors import DraftpError, first_line
from draftcli.export.base import Base, clean_key, weight_files
from draftcli.export.inputs import Changes
from draftcli.export.tensors import close_files, stored_tensors
from draftcli.export.write import Merger

# Largest difference allowed, as a part of the largest value of the output. Rounding of each weight is relative to it
# (2^-9 for bfloat16, 2^-12 for float16, 2^-25 for float32) and adds up over some hundred layers.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 2e-4, torch.float64: 2e-4}
LATENT = (16, 24)
_SEED = 20


@dataclass(frozen=True)
class Comparison:
    """One network of the artefact against base + adapter.

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


def check_model_keys(merger: Merger, artefact: Path, kind: str) -> str:
    """Every tensor that must be in the artefact is, with its shape and dtype, and every change found its tensor.

    Raises:
        DraftpError: not so.
    """
    missed = merger.touched - merger.written
    if missed:
        raise DraftpError(f"{len(missed)} changes found no tensor, the first is {'.'.join(min(missed))}")
    if kind == "single-file":
        expected = {entry.key: (entry.dtype, entry.shape) for entry in merger.original_entries()}
        found = {key: (s.dtype, s.shape) for key, s in stored_tensors(artefact).items()}
    else:
        expected, found = {}, {}
        for part in PARTS:
            expected |= {f"{part}.{clean_key(part, e.key)}": (e.dtype, e.shape) for e in merger.entries(part)}
            for file in weight_files(artefact, part, None):
                found |= {f"{part}.{clean_key(part, k)}": (s.dtype, s.shape) for k, s in stored_tensors(file).items()}
    if odd := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
        raise DraftpError(f"{artefact}: {len(odd)} tensors are not as meant, the first is {odd[0]}")
    return f"{len(found)} tensors, all accounted for; {len(merger.written)} of them changed"


def check_lora_keys(lora: Lora, artefact: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    """The file read back is `lora`, to the last bit of the dtype written.

    Args:
        lora: with scales multiplied in, as a reader must find it.
        artefact: the file.
        shapes: of the base's weights.

    Raises:
        DraftpError: not so.
    """
    found = read_lora(artefact, shapes)
    wanted = {(part, module): update for part, module, update in lora.updates()}
    read = {(part, module): update for part, module, update in found.updates()}
    if wanted.keys() != read.keys():
        raise DraftpError(f"{artefact}: {len(wanted.keys() ^ read.keys())} layers are not as meant")
    for place, update in wanted.items():
        other = read[place]
        close = torch.allclose(other.delta(), update.delta(), rtol=0, atol=1e-2 * float(update.delta().abs().max()))
        if not close:
            raise DraftpError(f"{artefact}: {'.'.join(place)} is not as meant")
    return f"{len(read)} layers, all fit the model"


def compare_model(base: Base, changes: Changes, artefact: Path, kind: str, dtype: torch.dtype) -> list[Comparison]:
    """The saved model, by diffusers' own loader, against base + adapter; and its VAE tensor by tensor.

    Args:
        base: what was merged into.
        changes: what was merged.
        artefact: folder or file.
        kind: "diffusers" or "single-file".
        dtype: of the weights written, for the tolerance.

    Raises:
        DraftpError: the loader fails, or a difference is above tolerance.
    """
    source = (base.path, base.config, base.kind == "single-file", base.variant)
    target = (artefact, base.config, kind == "single-file", None)
    concerned = {part for part, _ in changes.touched()}
    found = []
    for part in ("unet", "text_encoder", "text_encoder_2"):
        before, wanted = _base_and_tuned(source, part, changes)
        with _loaded(target, part) as network:
            found.append(_compared(part, before, wanted, _output(network), dtype, part in concerned))
    with _loaded(source, "vae") as one, _loaded(target, "vae") as two:
        own, other = one.state_dict(), two.state_dict()
        if own.keys() != other.keys() or not all(torch.equal(own[key], other[key]) for key in own):
            raise DraftpError(f"{artefact}: its VAE is not the base's")
    return found


def compare_lora(base: Base, lora: Lora, artefact: Path, dtype: torch.dtype) -> list[Comparison]:
    """The LoRA file, put on the base by diffusers' own loader, against the LoRA that was meant.

    Args:
        base: any model it fits.
        lora: before casting.
        artefact: the file.
        dtype: of the matrices written.

    Raises:
        DraftpError: as for `compare_model`.
    """
    from diffusers import StableDiffusionXLPipeline as Pipeline

    source = (base.path, base.config, base.kind == "single-file", base.variant)
    unet_config = modules_on_meta(base.config)["unet"].config
    found = []
    for part in lora.parts:
        before, wanted = _base_and_tuned(source, part, Changes([lora]))
        with _loaded(source, part) as network, _loader_errors(artefact):
            read: Any = Pipeline.lora_state_dict(
                str(artefact.parent), weight_name=artefact.name, unet_config=unet_config, return_lora_metadata=True
            )
            state, alphas, metadata = read
            if part == "unet":
                Pipeline.load_lora_into_unet(state, alphas, network, metadata=metadata)
            else:
                Pipeline.load_lora_into_text_encoder(state, alphas, network, prefix=part, metadata=metadata)
            found.append(_compared(part, before, wanted, _output(network), dtype, concerned=True))
    return found


_Location = tuple[Path, Path, bool, str | None]


def _base_and_tuned(source: _Location, part: str, changes: Changes) -> tuple[Tensor, Tensor]:
    with _loaded(source, part) as network:
        before = _output(network)
        if part == "unet" and changes.full:
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(changes.apply("unet", name, parameter))
        elif any(part in lora.parts for lora in changes.loras):
            attach_loras(network, [(lora, 1.0) for lora in changes.loras], part)
        return before, _output(network)


def _compared(
    part: str, before: Tensor, wanted: Tensor, found: Tensor, dtype: torch.dtype, concerned: bool
) -> Comparison:
    size = float(wanted.abs().max())
    effect = float((wanted - before).abs().max()) if concerned else 0.0
    result = Comparison(part, float((found - wanted).abs().max()), TOLERANCE.get(dtype, 0.5) * size, effect, size)
    if not result.difference <= result.tolerance:  # also where it is no number
        raise DraftpError(
            f"verification failed: the {part} loaded again differs from base + adapter by up to "
            f"{result.difference:.3g} (allowed {result.tolerance:.3g}); nothing was kept"
        )
    if concerned and effect == 0:
        raise DraftpError(f"verification failed: the changes don't move the {part}'s output at all; was it trained?")
    if concerned and result.difference >= effect:
        raise DraftpError(
            f"verification failed: rounding moves the {part}'s output by {result.difference:.3g}, the changes by "
            f"{effect:.3g}: they would be lost; take --dtype fp32, or keep them as a LoRA with --format lora or kohya"
        )
    return result


@contextmanager
def _loaded(location: _Location, part: str) -> Iterator[Any]:
    """One network in float32, by the pipeline's own loader, with all others left out."""
    from diffusers import StableDiffusionXLPipeline as Pipeline

    path, config, single_file, variant = location
    others: dict[str, Any] = dict.fromkeys((*PARTS, "tokenizer", "tokenizer_2"))
    others.pop(part)
    with _loader_errors(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        if single_file:
            from diffusers import EulerDiscreteScheduler

            pipe = Pipeline.from_single_file(
                str(path),
                config=str(config),
                torch_dtype=torch.float32,
                add_watermarker=False,
                scheduler=EulerDiscreteScheduler(),
                **others,
            )
        else:
            pipe = Pipeline.from_pretrained(
                path,
                torch_dtype=torch.float32,
                variant=variant,
                use_safetensors=True,
                add_watermarker=False,
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
        # A loader says in many ways that it does not take a file.
        raise DraftpError(
            f"verification failed: diffusers does not take {path.name} ({type(error).__name__}: {first_line(error)})"
        ) from error


@torch.no_grad()
def _output(network: Any) -> Tensor:
    """What a network makes of fixed input."""
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
    sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return network(
        normal(2, config.in_channels, *LATENT),
        torch.tensor([801, 201]),
        encoder_hidden_states=normal(2, 77, config.cross_attention_dim),
        added_cond_kwargs={"text_embeds": normal(2, pooled_width), "time_ids": sizes},
    ).sample
