"""Tensors with every shape and dtype of a run and no data, which compute as they would on a GPU and are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcli.planning.live_bytes import LiveBytes


class WithoutData(LiveBytes):
    """Inside, every tensor is on the meta device, whatever device is asked for, and its bytes are counted.

    Args:
        known: tensors that are there already, such as weights.
        value: what code gets that reads a tensor's number.
        fused: attention is a fused kernel, without its quadratic matrix.

    Attributes:
        casts: what a GPU's autocast caches until it ends: the casts of trained weights, by the weight's id.
    """

    def __init__(self, known: Iterable[Tensor] = (), value: int = 0, fused: bool = True) -> None:
        super().__init__(known)
        self.value = value
        self.casts: dict[int, Tensor] = {}
        self._functions = _gpu_functions(self.casts, fused)

    def __enter__(self) -> Any:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        self.casts.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return (bool if kind == torch.bool else float if kind.is_floating_point else int)(self.value)
        if kwargs and kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        args = [a.to("meta") if isinstance(a, Tensor) and not a.is_meta else a for a in args]
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _gpu_functions(casts: dict[int, Tensor], fused: bool) -> Iterator[None]:
    """Inside, the functions of torch that the UNet calls do as on a GPU: they have the dtypes of autocast, of which the
    meta device has none, and attention is the fused kernel, which it does not choose by itself.

    They are replaced in torch. A TorchFunctionMode would be off in backward, where checkpoints recompute.

    Args:
        casts: holds the casts of trained weights while autocast caches them.
        fused: whether attention is the fused kernel.
    """
    narrow, wide = partial(partial, _in_autocast, casts), partial(partial, _in_autocast, None)
    replaced: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (F, "linear", narrow),
        (F, "conv2d", narrow),
        (F, "group_norm", wide),
        (F, "layer_norm", wide),
        (torch, "clear_autocast_cache", lambda clear: lambda: (casts.clear(), clear())),
    ]
    if fused:
        replaced.append((F, "scaled_dot_product_attention", partial(partial, _fused_attention)))
    with ExitStack() as stack:
        for place, name, replacement in replaced:
            original = getattr(place, name)
            setattr(place, name, replacement(original))
            stack.callback(setattr, place, name, original)
        yield


def _in_autocast(casts: dict[int, Tensor] | None, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function` as a GPU's autocast calls it: in the narrow dtype, or in float32 where `casts` is None."""
    if not torch.is_autocast_enabled("cpu"):
        return function(*args, **kwargs)
    dtype = torch.float32 if casts is None else torch.get_autocast_dtype("cpu")

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if casts is None or not isinstance(value, nn.Parameter) or not value.requires_grad:
            return value.to(dtype)
        if id(value) not in casts:
            casts[id(value)] = value.to(dtype)
        return casts[id(value)]

    return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _fused_attention(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    *args: Any,
    **kw: Any,
) -> Tensor:
    if attn_mask is not None:  # short texts
        return function(query, key, value, attn_mask, *args, **kw)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
