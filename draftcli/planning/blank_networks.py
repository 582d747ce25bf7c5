"""The networks of a run without data, on the meta device: what a training would hold can be known before anything is
fetched. They work inside `WithoutData`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.config import Config, RewardConfig, RewardSource
from draftcli.core.engine.eight_bit import EightBitLinear, quantize_blocks
from draftcli.core.lora.adapters import attach_lora
from draftcli.core.models.family import Parts
from draftcli.core.models.fields import check_fields
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.models.recognition import family_of_folder
from draftcli.core.precision import DTYPES
from draftcli.errors import InputError
from draftcli.planning.repeated_layers import shorten
from draftcli.rewards.blank import BlankTokenizer
from draftcli.rewards.catalogue import BUILT_IN_REWARDS
from draftcli.rewards.registry import blank_reward, check_differentiable, load_reward
from draftcli.rewards.wrappers import AtWorst, InMicroBatches, PromptRelative


def shortened_modules(folder: Path, targets: Sequence[str] = ()) -> dict[str, Any]:
    """The networks whose configurations are in `folder`, on the meta device, shortened where every layer is to be
    treated alike.

    Args:
        folder: with a folder for each.
        targets: peft.target_modules.

    Raises:
        InputError: a configuration is missing or not readable, or asks for other formulas than its family's.
    """
    family = family_of_folder(folder)
    modules = modules_on_meta(folder, family)
    for part in ("unet", "vae"):
        check_fields(part, modules[part], str(folder), family)
    for part, network in modules.items():
        if part != "unet" or not any(_ONE_BLOCK.search(target) for target in targets):
            shorten(network)
    return modules


_ONE_BLOCK = re.compile(r"(^|\.)\d+\.(attn|ff|norm)")  # a target that says which transformer block it means


def blank_parts(folder: Path, cfg: Config) -> Parts:
    """The model whose configuration is in `folder`, on the meta device, in the dtypes that `load_parts` gives it and
    with the LoRA that is to be trained.
    """
    modules, lora = shortened_modules(folder, cfg.peft.target_modules), cfg.peft.peft_scheme == "lora"
    dtype = DTYPES[cfg.model.precision]
    wide = torch.promote_types(dtype, torch.float32)
    # FSDP gathers a block's weights in the dtype of the matrix products.
    trained = dtype if cfg.sharding.strategy == "fsdp" else wide
    dtypes = {
        "unet": dtype if lora else trained,
        "vae": DTYPES[cfg.model.vae_precision] if cfg.model.vae_precision else wide,
    }
    for part, module in modules.items():
        nn.Module.to(module, dtypes.get(part, dtype))
    encoders = [module for part, module in modules.items() if part.startswith("text_encoder")]
    tokenizers = [BlankTokenizer() for _ in encoders]
    parts = Parts(modules["unet"], modules["vae"], encoders, tokenizers, family=family_of_folder(folder))
    if lora:
        with torch.device("meta"):  # else peft would fill a LoRA of real memory with zeros
            attach_lora(parts.unet, cfg.peft.rank, cfg.peft.alpha, cfg.peft.target_modules)
        for parameter in filter(lambda p: p.requires_grad, parts.unet.parameters()):
            parameter.data = parameter.data.to(trained)
    if cfg.model.quantize:
        quantize_blocks(parts.unet)
        for layer in (module for module in parts.unet.modules() if isinstance(module, EightBitLinear)):
            # It asks for the autocast of its input's device, and the meta device has none.
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(dtype),))
    return parts


def stays(module: nn.Module) -> nn.Module:
    """Make `module.to` do nothing: torch refuses to move what has no data, and here no device is another."""
    module.to = lambda *_, **__: module
    return module


class BlankRewards(nn.Module):
    """The sum of a run's rewards, without weights.

    Args:
        settings: of each, by name.

    Attributes:
        uncounted: rewards whose networks are not known, such as plug-ins without a `blank`: taken as the mean of the
            pixels.

    Raises:
        InputError: one that is to be trained on says that it has no gradient.
    """

    def __init__(self, settings: Mapping[str, RewardSource]) -> None:
        super().__init__()
        self.uncounted: list[str] = []
        self.judges = nn.ModuleList()
        self.plain: list[Callable[..., Tensor]] = []
        for name, setting in settings.items():
            reward = self._made(name)
            if isinstance(setting, RewardConfig):
                check_differentiable(name, reward)
            if setting.relative is not None and hasattr(reward, "embed_images"):
                reward = PromptRelative(reward, **setting.relative.model_dump())
            if setting.micro_batch_size is not None:
                reward = InMicroBatches(reward, setting.micro_batch_size)
            if isinstance(setting, RewardConfig) and setting.robust is not None:
                reward = AtWorst(reward, setting.robust)
            if isinstance(reward, nn.Module):
                self.judges.append(reward)
            else:
                self.plain.append(reward)
        stays(self)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        judges = [*self.judges, *self.plain] or [_mean_of_pixels]
        scores = [judge(images, prompts) for judge in judges]
        return torch.stack([score.to(images.dtype) for score in scores]).sum(0)

    def _made(self, name: str) -> Any:
        if name in BUILT_IN_REWARDS and not BUILT_IN_REWARDS[name].parameters:  # none or few, and they ship with draftp
            reward = load_reward(name)
            return stays(reward.to("meta")) if isinstance(reward, nn.Module) else reward
        with suppress(InputError):  # a plug-in may be installed elsewhere only
            if (network := blank_reward(name)) is not None:
                shorten(network)
                return stays(network)
        self.uncounted.append(name)
        return _mean_of_pixels


def _mean_of_pixels(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))
