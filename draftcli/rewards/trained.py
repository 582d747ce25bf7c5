"""Loading the rewards that `draftp rewards train` has left; see `draftcli.rewards.folders` for what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.errors import InputError, first_line
from draftcli.rewards.catalogue import BUILT_IN_REWARDS, reward_folder, reward_reference
from draftcli.rewards.checkpoints import fill, loading, read_checkpoint
from draftcli.rewards.clip import CLIPReward, load_clip_reward
from draftcli.rewards.folders import ADAPTER_FILE, WEIGHTS, RewardFolder, Start
from draftcli.rewards.references import find_object, make_reward


class PreferenceHead(nn.Module):
    """A linear score on the features of a CLIP that stays as it is, in log-odds.

    The difference of two pictures' scores is the logarithm of the odds that the one is preferred (Bradley and Terry).

    Args:
        name: of the reward.
        clip: whose features are weighed.

    Attributes:
        line: a weight for each of `head_features`, and the score's zero: the mean of what it was trained on.
    """

    def __init__(self, name: str, clip: CLIPReward) -> None:
        super().__init__()
        self.name, self.clip = name, clip
        self.line = nn.Linear(feature_count(clip), 1)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        pixels = self.clip.preprocess(images.to(self.clip.preprocess.mean.device))
        return self.line(head_features(self.clip, pixels, self.clip.embed_texts(prompts))).squeeze(-1)


def head_features(clip: CLIPReward, pixels: Tensor, texts: Tensor) -> Tensor:
    """What a head weighs: (B, W + D + 1).

    The vision tower's pooled output (W), which knows more of a picture than what is compared with texts; the products
    of which the cosine of picture and prompt is the sum (D); and the CLIP's own score.

    Args:
        clip: the network.
        pixels: (B, 3, S, S), preprocessed.
        texts: (B, D) embedded prompts, of length 1.
    """
    pooled = clip.pool(pixels)
    match = clip.project(pooled) * texts
    return torch.cat([pooled, match, clip.scale * match.sum(-1, keepdim=True)], dim=-1)


def feature_count(clip: CLIPReward) -> int:
    """How many features `head_features` gives."""
    return clip.clip.config.vision_config.hidden_size + clip.clip.config.projection_dim + 1


def network_hash(network: nn.Module) -> str:
    """Of all weights: 16 hexadecimal digits, by an exact sum of their bits; tells networks apart and proves nothing."""
    sums = sorted(
        (tuple(p.shape), int(p.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64)))
        for p in network.parameters()
    )
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def load_start(start: Start, called: str) -> CLIPReward:
    """The CLIP that a reward is trained from.

    Args:
        start: which.
        called: what asks for it, for messages.

    Raises:
        InputError: it cannot be loaded, or is not a CLIP.
    """
    if folder := reward_folder(start.reward):
        found = load_trained(start.reward, folder, start.backbone)
    else:
        options = {"pretrained": start.pretrained, "backbone": start.backbone}
        given = {key: value for key, value in options.items() if value is not None}
        found = make_reward(start.reward, find_object(start.reward, reward_reference(start.reward)), given)
    if not isinstance(found, CLIPReward):
        clips = "clip, pickscore, hpsv2, hpsv2_1, ict, toy, or the folder of a CLIP"
        raise InputError(
            f"{called}: {start.reward} is not a CLIP, whose features can be learned on; allowed are {clips}"
        )
    return found


def load_trained(name: str, folder: RewardFolder, backbone: str | None = None) -> PreferenceHead | CLIPReward:
    """The reward in a folder, with the CLIP that it stands on.

    Args:
        name: what the user called it.
        folder: as `read_reward_folder` gave it.
        backbone: the folder of that CLIP, where it is elsewhere by now.

    Raises:
        InputError: something cannot be loaded, or is another CLIP than the one it was trained on.
    """
    if folder.trained == "whole":
        clip = load_clip_reward(name, str(folder.path), backbone)
        clip.preprocess.fit = folder.fit  # pyright: ignore[reportAttributeAccessIssue]
        return clip
    start = Start("clip", pretrained=backbone) if backbone else folder.start
    clip = load_start(start, f"reward {name}")
    if (found := network_hash(clip.clip)) != folder.network:
        raise InputError(
            f"reward {name}: was trained on another network than {_words(start)} is now (its weights' hash is {found}, "
            f"{folder.network} is expected); set rewards.{name}.backbone to the folder of the right one"
        )
    clip.preprocess.fit = folder.fit  # pyright: ignore[reportAttributeAccessIssue]
    return _head(name, folder, clip) if folder.trained == "head" else _adapted(name, folder, clip)


def _head(name: str, folder: RewardFolder, clip: CLIPReward) -> PreferenceHead:
    head = PreferenceHead(name, clip)
    path = _there(name, folder, WEIGHTS)
    fill(name, path, head.line, read_checkpoint(name, path))
    return head


def _adapted(name: str, folder: RewardFolder, clip: CLIPReward) -> CLIPReward:
    """With the LoRA merged into the CLIP's weights."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    path = _there(name, folder, ADAPTER_FILE)
    with loading(name, str(folder.path), "pretrained"):
        network: Any = inject_adapter_in_model(LoraConfig.from_pretrained(str(folder.path)), clip.clip)
    wanted = sum(".lora_" in key for key in network.state_dict())
    tensors = read_checkpoint(name, path)
    try:
        odd = set_peft_model_state_dict(network, tensors).unexpected_keys
    except RuntimeError as error:  # shapes
        raise InputError(f"reward {name}: {path} is not that CLIP's ({first_line(error)}); train it again") from error
    if odd or len(tensors) != wanted:
        raise InputError(
            f"reward {name}: {path} has {len(tensors)} tensors where {wanted} are expected; train it again"
        )
    for module in list(network.modules()):  # merged and unwrapped, so that it is a plain CLIP again
        for child, layer in list(module.named_children()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                setattr(module, child, layer.get_base_layer())
    del network.peft_config
    return CLIPReward(name, network, clip.tokenizer, clip.preprocess)


def _there(name: str, folder: RewardFolder, file: str) -> Path:
    if not (folder.path / file).is_file():
        raise InputError(f"reward {name}: {folder.path} has no {file}; copy the folder whole, or train it again")
    return folder.path / file


def trained_factory(name: str, folder: RewardFolder) -> Callable[..., Any]:
    """What makes the reward of a folder, as `make_reward` and memory plans want it."""

    def factory(backbone: str | None = None) -> nn.Module:
        return load_trained(name, folder, backbone)

    start = folder.start.reward
    blank = getattr(find_object(start, reward_reference(start)), "blank", None) if start in BUILT_IN_REWARDS else None
    if blank is not None and folder.start.pretrained is None and folder.trained != "whole":
        setattr(factory, "blank", blank)  # noqa: B010 - a head or a merged adapter adds nothing that counts
    return factory


def _words(start: Start) -> str:
    return start.pretrained or start.reward
