"""What a reward's scores depend on beside the pictures: scores that are kept hold as long as it stays the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.config import RewardSource
from draftcli.contents import contents_of
from draftcli.rewards.wrappers import innermost, source_file

AT_ONCE = 2**22  # elements: what a large tensor is read in, so that a card that is nearly full has room for it


def settings_and_files(rewards: Mapping[str, RewardSource]) -> str:
    """How rewards are asked, and hashes of the files of this machine that their names and settings name, as JSON.

    Args:
        rewards: by name.
    """
    settings = {
        name: source.model_dump(mode="json", include={*RewardSource.model_fields}) for name, source in rewards.items()
    }
    return json.dumps([settings, contents_of({"rewards": settings})])


def code_and_weights(judge: Any) -> str:
    """A hash of the file that has the code of a reward or a network, and of its weights; wrappers are not in it.

    Weights count by an exact sum of their bits, the same on every device: each is read once, none is copied whole.
    """
    inner, source = innermost(judge), source_file(judge)
    digest = hashlib.sha256(getattr(inner, "__qualname__", type(inner).__qualname__).encode())
    if source is not None and Path(source).is_file():
        digest.update(Path(source).read_bytes())
    for key, tensor in inner.state_dict().items() if isinstance(inner, nn.Module) else ():
        if isinstance(tensor, Tensor):  # a network may keep other things there
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {_sum_of_bits(tensor)}\n".encode())
    return digest.hexdigest()


def _sum_of_bits(tensor: Tensor) -> int:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    bits = tensor.detach().reshape(-1).view(kind)
    return int(torch.stack([part.sum(dtype=torch.int64) for part in bits.split(AT_ONCE)]).sum())
