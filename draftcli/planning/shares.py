"""What each of several processes holds under sharding.strategy fsdp, worked out from the shapes of the weights.

FSDP2 cuts every parameter of the UNet along its first dimension; the first process has the largest part, which is
counted. VAE, text encoders and rewards stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from draftcli.config import Config
from draftcli.core.engine.sharding import BLOCKS
from draftcli.core.precision import DTYPES
from draftcli.errors import InputError
from draftcli.planning.rehearsal import Weights, stand_ins, weights_of
from draftcli.planning.repeated_layers import tensors

Counted = tuple[Tensor, int]  # a tensor, and how often there is one like it


def per_rank(cfg: Config, folder: Path, ranks: Sequence[int]) -> dict[int, dict[str, int]]:
    """Bytes that each of N processes holds, for each N of `ranks`.

    Args:
        cfg: the settings; with sharding.shard_size so many processes split one copy.
        folder: with the configurations of the model's four networks.
        ranks: numbers of processes.

    Returns:
        by N: "unet" and "frozen copy of the unet" where there is one, frozen or not, with the LoRA's part in "LoRA";
        "trained" (as many bytes again are gradients, twice as many AdamW's moments); "frozen", "whole"; and
        "gathered", what a block's turn takes for a moment: itself and the next one and the root's own parameters, in
        the dtype of the matrix products, and the gradients of two blocks, in the weights' own.

    Raises:
        InputError: sharding.shard_size does not divide N.
    """
    whole = cfg.model_copy(update={"sharding": cfg.sharding.model_copy(update={"strategy": "none"})})
    unet, weights = stand_ins(whole, folder).unet, weights_of(whole, folder)
    in_full = cfg.peft.peft_scheme == "none"
    return {count: _share(cfg, unet, weights, _split_over(cfg, count), in_full) for count in ranks}


def _split_over(cfg: Config, ranks: int) -> int:
    """How many processes split one copy."""
    size = cfg.sharding.shard_size or ranks
    if ranks > 1 and ranks % size:
        raise InputError(f"sharding.shard_size {size} does not divide {ranks} processes")
    return min(size, ranks)


def _share(cfg: Config, unet: nn.Module, weights: Weights, split: int, in_full: bool) -> dict[str, int]:
    found = list(tensors(unet, buffers=False))
    all_of_it = _shards(found, split)
    trained = all_of_it if in_full else _shards([(p, times) for p, times in found if p.requires_grad], split)
    own = {"unet": all_of_it - trained, "LoRA": trained}
    if in_full:
        own = {"unet": trained, "frozen copy of the unet": trained}
    return {
        **own,
        "trained": trained,
        "frozen": sum(own.values()) - trained,
        "whole": sum(size for name, size in weights.parts.items() if name not in own),
        "gathered": _gathered(cfg, unet, in_full) if split > 1 else 0,
    }


def _shards(found: Iterable[Counted], split: int) -> int:
    """Bytes of the first process's part of every parameter."""
    return sum(
        times * -(-p.shape[0] // split) * p.stride(0) * p.element_size() if p.ndim else times * p.element_size()
        for p, times in found
    )


def _gathered(cfg: Config, unet: nn.Module, in_full: bool) -> int:
    half = DTYPES[cfg.model.precision].itemsize
    *inner, root = _groups(unet)
    sent = max(sum(p.numel() * min(half, p.element_size()) for p in group) for group in inner)
    summed = max(sum(p.numel() * p.element_size() for p in group if p.requires_grad or in_full) for group in inner)
    roots = sum(p.numel() * min(half, p.element_size()) for p in root)
    # FSDP2 leaves a root gathered once it has run.
    return 2 * sent + (2 if in_full else 1) * roots + 2 * summed


def _groups(unet: nn.Module) -> Iterator[list[Tensor]]:
    """What is gathered together: the parameters of each sharded block, then all others."""
    taken: set[int] = set()
    for block in unet.modules():
        if type(block).__name__ in BLOCKS:
            yield (group := [p for p in block.parameters() if id(p) not in taken])
            taken |= {id(p) for p in group}
    yield [p for p in unet.parameters() if id(p) not in taken]
