"""Several LoRAs, or a UNet trained in full, as one LoRA: exactly, or of a given rank with the error stated.

The best approximation of a given rank, in the sum of squares, is the truncated singular value decomposition
(Eckart and Young 1936). A LoRA's update is B A with inner width R, so the decomposition of an R x R matrix is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftcli.core.lora.files import Lora, Update
from draftcli.errors import InputError
from draftcli.export.base import Base
from draftcli.export.inputs import Changes

_DENSE_LIMIT = 512  # beyond this many singular values a dense decomposition takes minutes a layer


@dataclass(frozen=True)
class Loss:
    """What compression lost.

    Attributes:
        relative: norm of the difference over the norm of the update, over all layers (Frobenius).
        worst: the same of the worst layer.
        layer: which that is.
        left_out: norm of the changes that no LoRA can hold (biases, norms), over that of all changes.
    """

    relative: float
    worst: float
    layer: str
    left_out: float = 0.0


def combine(loras: Sequence[Lora]) -> Lora:
    """One LoRA with exactly the sum of their effects: matrices side by side, ranks added up.

    Raises:
        InputError: one of them has biases or DoRA magnitudes, which matrices cannot hold.
    """
    for lora in loras:
        if odd := next((f"{part}.{module}" for part, module, u in lora.updates() if not u.is_plain), None):
            raise InputError(
                f"{lora.name} is more than the matrices of a LoRA: {odd} has a bias or a DoRA magnitude, which draftp "
                "does not write into LoRA files; merge it into a model with --format diffusers or single-file"
            )
    if len(loras) == 1:
        return loras[0]
    gathered: dict[str, dict[str, list[Update]]] = {}
    for lora in loras:
        for part, module, update in lora.updates():
            gathered.setdefault(part, {}).setdefault(module, []).append(update)
    parts = {p: {m: _side_by_side(updates) for m, updates in modules.items()} for p, modules in gathered.items()}
    return Lora(" + ".join(lora.name for lora in loras), parts)


def compress(lora: Lora, rank: int) -> tuple[Lora, Loss]:
    """The nearest LoRA with at most `rank` in each layer, and what that loses. Layers within it stay as they are."""
    parts: dict[str, dict[str, Update]] = {}
    ledger = _Ledger()
    for part, module, update in lora.updates():
        kept, lost, size = update, 0.0, float(update.delta().square().sum())
        if update.rank > rank:
            kept, lost = _truncate(update, rank)
        ledger.add(f"{part}.{module}", lost, size)
        parts.setdefault(part, {})[module] = kept
    return Lora(f"{lora.name}, rank {rank}", parts), ledger.loss()


def extract(changes: Changes, base: Base, rank: int, done: Callable[[], object]) -> tuple[Lora, Loss]:
    """The nearest LoRA of `rank` to all `changes` of the UNet, a full fine-tuning among them.

    Text encoders are changed by LoRAs only: their parts go along as they are.
    """
    updates: dict[str, Update] = {}
    others = combine(changes.loras).parts if changes.loras else {}
    ledger = _Ledger()
    for key, stored in base.tensors["unet"].items():
        tensor = stored.load()
        delta = changes.apply("unet", key, tensor) - tensor.double()
        size = float(delta.square().sum())
        if not key.endswith(".weight") or delta.ndim not in (2, 4):
            ledger.left_out += size
        elif size:
            module = key.removesuffix(".weight")
            updates[module], lost = _decompose(delta, rank)
            ledger.add(f"unet.{module}", lost, size)
        done()
    return Lora(f"rank {rank} of a full fine-tuning", others | {"unet": updates}), ledger.loss()


class _Ledger:
    def __init__(self) -> None:
        self.lost = self.size = self.left_out = 0.0
        self.worst = (0.0, "")

    def add(self, layer: str, lost: float, size: float) -> None:
        self.lost, self.size = self.lost + lost, self.size + size
        self.worst = max(self.worst, ((lost / size) ** 0.5 if size else 0.0, layer))

    def loss(self) -> Loss:
        whole = self.size + self.left_out
        left_out = (self.left_out / whole) ** 0.5 if whole else 0.0
        return Loss((self.lost / self.size) ** 0.5 if self.size else 0.0, *self.worst, left_out)


def _side_by_side(updates: Sequence[Update]) -> Update:
    if len(updates) == 1:
        return updates[0]
    down = torch.cat([update.down.double() for update in updates])
    up = torch.cat([update.scale * update.up.double() for update in updates], dim=1)
    return Update(down.float(), up.float(), 1.0)


def _truncate(update: Update, rank: int) -> tuple[Update, float]:
    """Through the small matrix between the two orthogonal bases of B and A; with the sum of squares lost."""
    up, down = update.up.double().flatten(1), update.down.double().flatten(1)
    left, small_left = torch.linalg.qr(up)
    right, small_right = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(update.scale * small_left @ small_right.T)
    return _of(left @ u, s, v @ right.T, rank, update.up.shape, update.down.shape), float(s[rank:].square().sum())


def _decompose(delta: Tensor, rank: int) -> tuple[Update, float]:
    matrix = delta.flatten(1)
    if min(matrix.shape) <= _DENSE_LIMIT:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(matrix.float(), q=min(rank + 32, *matrix.shape), niter=4)
            u, s, v = u.double(), s.double(), right.double().T
    kept = _of(u, s, v, rank, (delta.shape[0], -1, *(1 for _ in delta.shape[2:])), (-1, *delta.shape[1:]))
    return kept, max(0.0, float(matrix.square().sum() - s[:rank].square().sum()))


def _of(u: Tensor, s: Tensor, v: Tensor, rank: int, up_shape: Sequence[int], down_shape: Sequence[int]) -> Update:
    root = s[:rank].sqrt()  # half of each singular value on either side keeps both matrices in the range of fp16
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    return Update(down.float().reshape(-1, *down_shape[1:]), up.float().reshape(up_shape[0], -1, *up_shape[2:]), 1.0)
