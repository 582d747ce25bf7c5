"""Checks that the processes of a run, on whichever nodes, have the same settings, prompts and folder."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path

from draftcli.config import Config, dump_config
from draftcli.core.engine.ranks import Ranks
from draftcli.errors import InputError
from draftcli.runs import Run, beside, disk_errors
from draftcli.training.prompt_sets import PromptSets

NFS_CACHE = 60.0  # seconds that NFS may go on reporting that a file is not there


def check_alike(cfg: Config, prompts: PromptSets, ranks: Ranks) -> None:
    """Raise InputError where the settings or prompts are not those of process 0, as from a file on another node."""
    if ranks.size == 1:
        return
    own = {"settings": dump_config(cfg), "prompts": prompts.facts}
    first = ranks.broadcast(own)
    with ranks.all_or_none():
        if other := [what for what in own if own[what] != first[what]]:
            raise InputError(
                f"process {ranks.rank} on {socket.gethostname()} has other {' and '.join(other)} than process 0; give "
                "all nodes the same files"
            )


def check_shared(run: Run, ranks: Ranks) -> None:
    """Raise InputError where processes see different folders: each would write its part of a checkpoint elsewhere."""
    if ranks.size == 1:
        return
    probe = beside(run.folder / ranks.broadcast(secrets.token_hex(8)))
    with ranks.all_or_none(), disk_errors(run.folder):
        if ranks.is_main:
            probe.touch()
    found = ranks.where(_wait_for(probe))
    with ranks.all_or_none(), disk_errors(run.folder):
        if ranks.is_main:
            probe.unlink()
    with ranks.all_or_none():
        if missing := [str(rank) for rank in range(ranks.size) if rank not in found]:
            raise InputError(
                f"{run.folder} is another folder for process {', '.join(missing)} than for process 0; take an --output "
                "on a file system that all nodes see"
            )


def _wait_for(path: Path) -> bool:
    until = time.monotonic() + NFS_CACHE
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
