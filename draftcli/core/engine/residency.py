"""Which networks are on the device: all of them, or under `sharding.offload` those that the phase at hand needs.

A training step asks for the UNet twice (prefix, gradient steps) and once for decoder and rewards. Frozen weights never
change, so they wait in the computer's memory, are copied to the device when their turn comes and dropped there when it
is over; nothing is ever copied back. What is trained stays on the device, with its gradient and moments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

UNET, JUDGES = "unet", "judges"


class Residency:
    """Groups of networks of which at most one has its frozen weights on the device at a time.

    A network that was never added stays where it is. No graph may be alive from one group's turn to its next: its
    backward would look for weights that are gone.

    Args:
        device: to compute on. On a CPU there is no second memory, and each turn is one more copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waiting: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._turn: str | None = None

    def add(self, group: str, networks: Iterable[nn.Module]) -> None:
        """Put frozen weights and buffers of `networks` into the computer's memory until it is their turn."""
        if self._turn == group:
            self._end_turn()
        for network in networks:
            for parameter in filter(lambda p: p.requires_grad, network.parameters()):
                parameter.data = parameter.data.to(self.device)
            frozen = [p for p in network.parameters() if not p.requires_grad]
            for tensor in (*frozen, *network.buffers()):
                tensor.data = _in_host_memory(tensor.data, self.device)
                self._waiting[group].append((tensor, tensor.data))

    def need(self, group: str) -> None:
        """It is the turn of `group`."""
        if self._turn == group or group not in self._waiting:
            return
        self._end_turn()
        for tensor, kept in self._waiting[group]:
            tensor.data = kept.to(self.device, non_blocking=True, copy=True)
        self._turn = group

    def _end_turn(self) -> None:
        for tensor, kept in self._waiting[self._turn] if self._turn else ():
            tensor.data = kept
        self._turn = None


def _in_host_memory(data: Tensor, device: torch.device) -> Tensor:
    """On the CPU; for a GPU page-locked, from where copies run several times as fast."""
    data = data.cpu()
    return data.pin_memory() if device.type == "cuda" else data
