"""Of many equal layers in a row two are enough: a placeholder takes as much memory as those between would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.planning.without_data import WithoutData

REPEATED = (
    *("BasicTransformerBlock", "CLIPEncoderLayer", "SiglipEncoderLayer", "BlipEncoderLayer", "BlipTextLayer"),
    *("Qwen2VLVisionBlock", "Qwen2VLDecoderLayer", "Qwen3VLVisionBlock", "Qwen3VLTextDecoderLayer"),
)


def shorten(network: nn.Module) -> None:
    """Leave the first and the last of many equal layers, in place; `RepeatedLayers` stands for those between."""
    for module in list(network.modules()):
        for name, layers in module.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) > 3 and type(layers[0]).__name__ in REPEATED:
                between = RepeatedLayers(layers[0], len(layers) - 2)
                setattr(module, name, nn.ModuleList([layers[0], between, layers[-1]]))


def tensors(network: nn.Module, buffers: bool = True) -> Iterator[tuple[Tensor, int]]:
    """Every parameter (and buffer) of a network, and how often the whole network has one like it."""
    yield from ((tensor, 1) for tensor in (*network.parameters(), *(network.buffers() if buffers else ())))
    for others in (module for module in network.modules() if isinstance(module, RepeatedLayers)):
        own = (*others.like.parameters(), *(others.like.buffers() if buffers else ()))
        yield from ((tensor, others.count) for tensor in own)


def size_of(found: Iterable[tuple[Tensor, int]]) -> int:
    """Bytes of what `tensors` found."""
    return sum(times * tensor.numel() * tensor.element_size() for tensor, times in found)


class RepeatedLayers(nn.Module):
    """Placeholder for `count` copies of the layer before it. It computes nothing, and allocates what each of them
    would have kept, measured on that layer: what the graph needs until backward, and autocast's casts of trained
    weights until the network has returned.

    Args:
        like: the layer before.
        count: of layers.

    Attributes:
        live: counts what is alive; nothing is allocated without it.
        recomputed: whether activations are recomputed in backward: then no graph needs the casts.
    """

    def __init__(self, like: nn.Module, count: int) -> None:
        super().__init__()
        self._like = [like]  # in a list, so that it is no child of this one
        self.count = count
        self.live: WithoutData | None = None
        self.recomputed = False
        self._before, self._is_tuple = 0, False
        like.register_forward_pre_hook(self._begin)
        like.register_forward_hook(self._end)

    @property
    def like(self) -> nn.Module:
        """The layer before."""
        return self._like[0]

    def _begin(self, *_: Any) -> None:
        self._before = self.live.now if self.live else 0

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._is_tuple = isinstance(output, tuple)  # transformers before 5

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`hidden`, as the layers before and after take and return it."""
        if self.live is not None:
            kept = self.live.now - self._before
            own = [self.live.casts[id(p)] for p in self.like.parameters() if id(p) in self.live.casts]
            casts = size_of((cast, 1) for cast in own)
            if torch.is_grad_enabled() and hidden.requires_grad:
                kept -= casts if self.recomputed else 0
                hidden = _Kept.apply(hidden, self.count * kept)  # type: ignore[assignment]
            if casts:
                self.live.casts[id(self)] = torch.empty(self.count * casts, dtype=torch.uint8)
        return (hidden,) if self._is_tuple else hidden


class _Kept(torch.autograd.Function):
    """Passes a tensor on, and holds so many bytes until its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int) -> Tensor:
        ctx.held = torch.empty(max(0, size), dtype=torch.uint8)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.held = None
        return gradient, None
