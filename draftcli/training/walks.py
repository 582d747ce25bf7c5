"""The pictures of each optimizer step, and what draftp.reuse keeps of them between steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftcli.core.backward import Work
from draftcli.core.batch import Batch, Walked
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.ranks import Ranks
from draftcli.core.phase import Phase
from draftcli.core.prefix import training_sampler
from draftcli.core.rollout import Rollout


class Walks:
    """Walks to the first step with gradient, each of which serves m = draftp.reuse optimizer steps.

    A step trains on B pictures in m groups of B / m: step t on the groups t .. t + m - 1, both counted from 1. Only the
    last of them is new, and walked with the weights as they are; step 1 walks all of its own. So no step has a picture
    twice, each has pictures of m ages, and a walk is at most m - 1 updates old. With m = 1 group t is step t's batch,
    and nothing is kept.

    Every process keeps the latents of whole groups: any of them can write a checkpoint alone, and any number of
    processes can read it.

    Args:
        model: walks.
        ranks: the processes that train together; each walks its share of a group.
    """

    def __init__(self, model: DRaFTPModel, ranks: Ranks) -> None:
        self.model, self.ranks, self.reuse = model, ranks, model.cfg.draftp.reuse
        self._latents: dict[int, Tensor] = {}

    def groups(self, step: int) -> range:
        """The groups that `step` trains on."""
        return range(step, step + self.reuse)

    def part(self, step: int, number: int, group: Batch) -> Batch:
        """This process's share of group `number` in `step`, walked where it serves several steps (collective)."""
        mine = self.ranks.share(len(group))
        part = group.split(len(mine))[self.ranks.rank]
        if self.reuse == 1:
            return part
        first_step = max(1, number - self.reuse + 1)
        if number not in self._latents:
            with self.ranks.all_or_none():
                x = self._walk(part)
            whole = x.new_zeros(len(group), *x.shape[1:])
            whole[mine.start : mine.stop] = x
            self.ranks.sum_([whole])
            self._latents[number] = whole
        x = self._latents[number][mine.start : mine.stop]
        return replace(part, walked=Walked(self.model.mode.first, x, uses=step - first_step))

    def _walk(self, batch: Batch) -> Tensor:
        """(B, C, H, W) latents at the first step that may carry gradient."""
        nets, cfg, first = self.model.networks, self.model.cfg, self.model.mode.first
        sampler, work = training_sampler(cfg, first, self.model.sampler), Work.of(cfg)
        parts = [(part, nets.encode(part)) for part in batch.split(work.prefix)]
        with nets.phase(Phase.PREFIX), nets.without_gradient():
            return torch.cat([Rollout(nets, sampler, part, cond).to(first) for part, cond in parts])

    def end_step(self, step: int) -> None:
        """Let go of the group that no later step trains on."""
        self._latents.pop(step, None)

    def state_dict(self) -> dict[str, Any]:
        """Latents (B / m, C, H, W) of the groups that later steps train on, by number."""
        return {"latents": {number: x.cpu() for number, x in self._latents.items()}}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Put back what `state_dict` gave, or nothing."""
        device = self.model.runtime.device
        self._latents = {number: x.to(device) for number, x in state.get("latents", {}).items()}
