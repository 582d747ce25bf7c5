"""draftp: fine-tune Stable Diffusion on differentiable rewards with DRaFT+, and sample with AIG.

Importing this package is instant: the public names below load torch and diffusers only when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftcli.api import anneal, evaluate, load_run, sample, train
    from draftcli.config import Config, load_config
    from draftcli.core.draftp import SDDRaFTPModel, SDXLDRaFTPModel
    from draftcli.core.grid import timesteps
    from draftcli.rewards import get_reward_model
    from draftcli.sampling.pipeline import annealed

__version__ = "0.1.0"
__all__ = [
    "Config",
    "SDDRaFTPModel",
    "SDXLDRaFTPModel",
    "anneal",
    "annealed",
    "evaluate",
    "get_reward_model",
    "load_config",
    "load_run",
    "sample",
    "timesteps",
    "train",
]

_HOME = {
    "train": "draftcli.api",
    "sample": "draftcli.api",
    "anneal": "draftcli.api",
    "evaluate": "draftcli.api",
    "load_run": "draftcli.api",
    "Config": "draftcli.config",
    "load_config": "draftcli.config",
    "timesteps": "draftcli.core.grid",
    "SDDRaFTPModel": "draftcli.core.draftp",
    "SDXLDRaFTPModel": "draftcli.core.draftp",
    "annealed": "draftcli.sampling.pipeline",
    "get_reward_model": "draftcli.rewards",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'draftcli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
