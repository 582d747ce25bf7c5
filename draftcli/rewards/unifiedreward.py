"""UnifiedReward 2.0 (Wang et al. 2025, arXiv 2503.05236): a chat model that writes three scores, which are read from
its answer. It judges only: through written words there is no gradient.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.errors import InputError
from draftcli.rewards.blank import with_blank
from draftcli.rewards.checkpoints import load_pretrained, network_config, preprocessor_config
from draftcli.rewards.clip import load_tokenizer
from draftcli.rewards.qwen_vl import (
    BlankWords,
    Patches,
    plain_words,
    seen_in_plans,
    token_ids,
    with_attention_in_plans,
)

UNIFIED_REWARD = "CodeGoat24/UnifiedReward-2.0-qwen3vl-2b"
LONGEST_ANSWER = 256  # tokens; the asked form has three lines, and numbers of up to 16 digits, a token each
QWEN3_VL_AREAS = (256 * 256, 4096 * 4096)  # least and most pixels of Qwen3-VL
SCORED = ("Alignment", "Coherence", "Style")
# Qwen3-VL's chat template around a picture.
_BEFORE = "<|im_start|>user\n<|vision_start|>"
_AFTER = "<|vision_end|>"
_END = "<|im_end|>\n<|im_start|>assistant\n"
# The network was trained with these words: another wording is another score. They are the authors'
# (github.com/CodeGoat24/UnifiedReward, MIT, Copyright (c) 2025 Yibin Wang).
UNIFIED_QUESTION = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\nProvide overall assessments for the image "
    "along the following axes (each rated from 1 to 5):\n- Alignment Score: How well the image matches the caption in "
    "terms of content.\n- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n- Style Score: How aesthetically appealing the image looks, regardless of caption "
    "accuracy.\n\nOutput your evaluation using the format below:\n\nAlignment Score (1-5): X\nCoherence Score (1-5): "
    "Y\nStyle Score (1-5): Z\n\nYour task is provided as follows:\nText Caption: "
)


class UnifiedReward(nn.Module):
    """The mean of the three scores in a chat model's answer, 1 to 5; NaN where the answer does not hold all three.

    The answer is the likeliest word after word, without chance, to each picture alone.

    Args:
        network: transformers' Qwen3VLForConditionalGeneration.
        tokenizer: its tokenizer.
        preprocess: of the pictures.
    """

    name = "unifiedreward"
    differentiable = False

    def __init__(self, network: Any, tokenizer: Any, preprocess: Patches) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        return torch.tensor([read_scores(answer) for answer in self.answers(images, prompts)], device=images.device)

    @torch.no_grad()
    def answers(self, images: Tensor, prompts: list[str]) -> list[str]:
        """What the network writes about each of (B, 3, H, W) pictures in [0, 1] and its prompt."""
        patches, grid = self.preprocess(images.to(self.preprocess.mean.device))
        return [self._answer(one, grid, prompt) for one, prompt in zip(patches, prompts, strict=True)]

    def _answer(self, patches: Tensor, grid: tuple[int, int], prompt: str) -> str:
        from transformers import GenerationConfig

        before, after = self.question(prompt, patches.device)
        picture = before.new_full((len(patches) // self.preprocess.merge**2,), self.network.config.image_token_id)
        ids = torch.cat([before, picture, after])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": patches}
        # Which places are the picture's; before release 5, transformers finds them by itself.
        if "mm_token_type_ids" in inspect.signature(self.network.forward).parameters:
            inputs["mm_token_type_ids"] = torch.zeros_like(ids)
            inputs["mm_token_type_ids"][:, len(before) : len(before) + len(picture)] = 1
        ends = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        # What its folder says of chance and temperature does not count here.
        self.network.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=LONGEST_ANSWER, eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id
        )
        thw = torch.tensor([[1, *grid]], device=ids.device)
        written = self.network.generate(**inputs, image_grid_thw=thw)
        return self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)

    def question(self, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens before the picture, and those after it."""
        asked = f"{_AFTER}{UNIFIED_QUESTION}[{plain_words(prompt)}]{_END}"
        return token_ids(self.tokenizer, _BEFORE, device), token_ids(self.tokenizer, asked, device)


def read_scores(answer: str) -> float:
    """The mean of the scores for alignment, coherence and style; NaN where one is missing or is not from 1 to 5."""
    found = [re.search(rf"{axis} Score \(1-5\):\s*(\d+(?:\.\d+)?)", answer) for axis in SCORED]
    scores = [float(match[1]) for match in found if match]
    whole = len(scores) == len(SCORED) and all(1 <= score <= 5 for score in scores)
    return sum(scores) / len(scores) if whole else math.nan


class _BlankUnifiedReward(UnifiedReward):
    """Reads picture and question once. Writing needs less, one word at a time."""

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        patches, _ = self.preprocess(images)
        return torch.stack([self._read(one, prompt) for one, prompt in zip(patches, prompts, strict=True)])

    @torch.no_grad()
    def _read(self, patches: Tensor, prompt: str) -> Tensor:
        model = self.network.model
        seen = seen_in_plans(model.visual, patches.to(self.network.dtype))
        before, after = (model.language_model.embed_tokens(ids) for ids in self.question(prompt, patches.device))
        hidden = torch.cat([before, seen, after])[None]
        read = model.language_model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return self.network.lm_head(read[0, -1]).max().float()


def _blank() -> UnifiedReward:
    network_class = _network_class()
    from transformers import Qwen3VLConfig

    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
            "rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        network = network_class(config)
        network.to(torch.bfloat16)
        with_attention_in_plans(network.model)
        return _BlankUnifiedReward(network, BlankWords(), Patches(config.vision_config, *QWEN3_VL_AREAS))


@with_blank(_blank)
def unifiedreward(pretrained: str = UNIFIED_REWARD, backbone: str | None = None) -> UnifiedReward:
    """UnifiedReward 2.0: the mean of three scores from 1 to 5, by a Qwen3-VL in bfloat16; to hold out only.

    `pretrained` may be one of the larger ones too. `backbone` holds tokenizer and preprocessor, where they are
    elsewhere.

    Raises:
        InputError: see `load_pretrained` and `load_tokenizer`; also where transformers is too old.
    """
    name = UnifiedReward.name
    network_class = _network_class()
    config = network_config(name, pretrained, "pretrained", "qwen3_vl", "a qwen3_vl one")
    place, setting = (backbone, "backbone") if backbone else (pretrained, "pretrained")
    preprocess = _patches(name, place, setting, config.vision_config)
    network = load_pretrained(name, network_class, pretrained, "pretrained", torch.bfloat16)
    return UnifiedReward(network, load_tokenizer(name, place, setting, config.text_config.vocab_size), preprocess)


def _network_class() -> Any:
    try:
        from transformers import Qwen3VLForConditionalGeneration
    except ImportError as error:
        raise InputError("reward unifiedreward: needs transformers 4.57 or newer, which has Qwen3-VL") from error
    return Qwen3VLForConditionalGeneration


def _patches(name: str, place: str, setting: str, vision: Any) -> Patches:
    """As preprocessor_config.json says: its older form calls the limits min_pixels and max_pixels."""
    pixels = preprocessor_config(name, place, setting)
    size = pixels.get("size") or {}
    least = pixels.get("min_pixels") or size.get("shortest_edge", QWEN3_VL_AREAS[0])
    most = pixels.get("max_pixels") or size.get("longest_edge", QWEN3_VL_AREAS[1])
    return Patches(vision, least, most, pixels["image_mean"], pixels["image_std"])
