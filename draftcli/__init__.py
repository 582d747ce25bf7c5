"""draftp: fine-tune Stable Diffusion XL on differentiable rewards with DRaFT+, and sample with AIG.

Importing this package is instant: the public names below load torch and diffusers only when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftcli.config import Config, load_config
    from draftcli.core.draftp import SDXLDRaFTPModel
    from draftcli.core.pipeline import annealed
    from draftcli.rewards import get_reward_model

__version__ = "0.1.0"
__all__ = ["Config", "SDXLDRaFTPModel", "annealed", "get_reward_model", "load_config", "timesteps"]

_HOME = {
    "Config": "draftcli.config",
    "load_config": "draftcli.config",
    "SDXLDRaFTPModel": "draftcli.core.draftp",
    "annealed": "draftcli.core.pipeline",
    "get_reward_model": "draftcli.rewards",
}


def timesteps(n: int) -> list[int]:
    """The step grid of draftp, for plain diffusers pipelines: `pipe(..., timesteps=draftcli.timesteps(25))`.

    t_k = trunc(999 - 999 k / n) for k = 0 .. n-1, in float64 as `numpy.linspace(999, 0, n, endpoint=False)` rounds it
    (NeMo 2.2.0, LegacyDDPMDiscretization). The first is always 999, the last trunc(999 / n).

    Args:
        n: number of sampler steps, 1 to 1000.

    Raises:
        ValueError: n is outside 1 .. 1000.
    """
    if not 1 <= n <= 1000:
        raise ValueError(f"{n} steps: the noise schedule has 1000 levels, so 1 to 1000 steps can be taken")
    if n == 1000:
        return list(range(999, -1, -1))
    step = -999 / n
    return [int(k * step + 999) for k in range(n)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'draftcli' has no attribute {name!r}")
