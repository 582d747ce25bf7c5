"""What diversity is measured on: the embeddings of a network that looks at pictures.

Any CLIP among the rewards lends its vision tower (`toy`, `clip`, `pickscore`, ...); `dinov2` is Meta's, trained without
texts (Oquab et al. 2024); `package.module:object` is your own, a factory of a torch module that turns pictures
(B, 3, H, W) in [0, 1] into features (B, d). A figure is only comparable with figures from
the same extractor.

A network that was tuned on a reward moves pictures along what that reward's own network sees, so that in its features
they can grow apart while they grow alike to the eye. Such features are never a default where others are at hand, and
where they are measured in, the report's title says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftcli.config import expand_home
from draftcli.core.models.places import BUILT_IN
from draftcli.errors import InputError
from draftcli.rewards import Reward, load_reward
from draftcli.rewards.catalogue import same_network
from draftcli.rewards.checkpoints import LOADERS_ERRORS, read_pretrained
from draftcli.rewards.clip import CLIPReward
from draftcli.rewards.wrappers import innermost

DINOV2 = "facebook/dinov2-base"
DEFAULTS = ("dinov2", "clip", "pickscore")  # the first that is at hand, and that no trained reward stands on


@dataclass(frozen=True)
class Features:
    """Pictures (B, 3, H, W) in [0, 1] -> (B, d) float32.

    Attributes:
        name: what it is.
        network: what computes.
        extract: the features of pictures.
        trained_on: the rewards that were trained on, or may have been, and that stand on the same network.
        why: these were taken for want of others; empty: they were asked for, or are the default.
    """

    name: str
    network: nn.Module
    extract: Callable[[Tensor], Tensor]
    trained_on: tuple[str, ...] = ()
    why: str = ""

    @property
    def caution(self) -> str:
        """What a reader must know before any figure of diversity, as a sentence; empty: nothing."""
        if not self.trained_on:
            return ""
        return (
            f"Diversity is measured in features of {' and '.join(self.trained_on)}, which was or may have been trained "
            "on: in these, images can spread out while they look more and more alike. Use others, such as "
            f"--features dinov2=FOLDER{f' ({self.why})' if self.why else ''}."
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, d) features of images (B, 3, H, W) in [0, 1]."""
        return self.extract(images).float()

    def to(self, device: torch.device) -> Features:
        """Move the network."""
        self.network.to(device)
        return self


def choose_features(asked: str | None, model: str, rewards: Mapping[str, Reward], trained: Collection[str]) -> Features:
    """What the diversity of some pictures is measured in.

    Args:
        asked: as `load_features` takes it. None: of a built-in model's pictures what was made for them, else the first
            of `DEFAULTS` that can be loaded and that no trained reward stands on, else a CLIP among the judges.
        model: `model.pretrained` of the base; empty: not known.
        rewards: the judges, by name.
        trained: those of them that were trained on, or may have been.

    Raises:
        InputError: nothing can be loaded.
    """
    if asked is not None or model in BUILT_IN:
        name = asked or BUILT_IN[model].features
        return replace(load_features(name), trained_on=_standing_on(name.partition("=")[0], trained))
    why = None
    for name in (name for name in DEFAULTS if not _standing_on(name, trained)):
        try:
            return load_features(name)
        except InputError as error:
            why = why or error
    clips = {name: clip for name, reward in rewards.items() if isinstance(clip := innermost(reward), CLIPReward)}
    for name in sorted(clips, key=lambda name: len(_standing_on(name, trained))):
        return replace(_of_clip(name, clips[name]), trained_on=_standing_on(name, trained), why=str(why))
    raise InputError(f"there are no features to measure diversity in; {why}")


def _standing_on(features: str, trained: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in trained if same_network(features, name))


def load_features(name: str) -> Features:
    """The extractor `NAME` or `NAME=FOLDER` with weights of one's own.

    Raises:
        InputError: an unknown name, or weights that cannot be loaded.
    """
    kind, _, pretrained = name.partition("=")
    pretrained = expand_home(pretrained)
    if kind == "dinov2":
        return _dinov2(pretrained or DINOV2)
    reward: Any = load_reward(kind, pretrained or None)  # finds `package.module:object` as well
    if ":" in kind and isinstance(reward, nn.Module) and not isinstance(reward, CLIPReward):
        return Features(f"{name} ({reward.name})" if hasattr(reward, "name") else name, reward, reward)
    if not isinstance(reward, CLIPReward):
        raise InputError(f"--features {name}: {kind} is not a CLIP; allowed are dinov2 and rewards that are CLIPs")
    return _of_clip(name, reward)


def _of_clip(name: str, reward: CLIPReward) -> Features:
    return Features(f"{name}, CLIP image embedding", reward, lambda images: _clip_embedding(reward, images))


def _clip_embedding(reward: CLIPReward, images: Tensor) -> Tensor:
    """The projected image embedding, length as it comes."""
    seen = reward.clip.vision_model(pixel_values=reward.preprocess(images.to(reward.clip.device)))
    return reward.clip.visual_projection(seen.pooler_output)


def _dinov2(pretrained: str) -> Features:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(pretrained)
        if config.model_type != "dinov2":
            raise InputError(f"--features dinov2={pretrained}: a {config.model_type} model, not a DINOv2")
        network, faults = read_pretrained(AutoModel, pretrained)
    except LOADERS_ERRORS as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(
            f"--features dinov2: {pretrained} cannot be loaded; without the hub, download it and give "
            f"--features dinov2=FOLDER ({reason})"
        ) from error
    if faults:
        raise InputError(f"--features dinov2: {pretrained} is not whole: {faults}; download it again")
    network = network.requires_grad_(False).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's

    def extract(images: Tensor) -> Tensor:
        """The CLS token of pictures at 256 pixels on the shorter side, the middle 224 x 224 of them."""
        parameter: Any = next(network.parameters())
        pixels = _resized(images.to(parameter.device), 256, 224)
        pixels = (pixels - mean.to(pixels).view(3, 1, 1)) / std.to(pixels).view(3, 1, 1)
        return network(pixel_values=pixels).last_hidden_state[:, 0]

    return Features(f"dinov2, {pretrained}, CLS token", network, extract)


def _resized(images: Tensor, edge: int, crop: int) -> Tensor:
    """Shorter side to `edge`, bicubic with antialiasing, then the middle `crop` x `crop`."""
    height, width = images.shape[-2:]
    scale = edge / min(height, width)
    size = [int(height * scale + 1e-6), int(width * scale + 1e-6)]
    if size != [height, width]:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
    return images[..., top : top + crop, left : left + crop]
