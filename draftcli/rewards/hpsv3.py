"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): a Qwen2-VL that is asked for a rating, and a small head on its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.errors import InputError
from draftcli.rewards.blank import with_blank
from draftcli.rewards.checkpoints import (
    Official,
    Origin,
    fill,
    find_checkpoint,
    network_config,
    read_checkpoint,
    shape_of,
)
from draftcli.rewards.clip import load_tokenizer
from draftcli.rewards.qwen_vl import (
    BlankWords,
    Patches,
    plain_words,
    seen_in_plans,
    token_ids,
    with_attention_in_plans,
)

HPSV3_WEIGHTS = Official("HPSv3.safetensors", hub="MizzenAI/HPSv3")
QWEN2_VL = "Qwen/Qwen2-VL-7B-Instruct"
HPSV3_AREA = 256 * 28 * 28  # least and most: a square picture becomes 448 x 448
REWARD_TOKEN = "<|Reward|>"
# Qwen2-VL's chat template around a picture.
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_AFTER = "<|vision_end|>"
# The network was trained with these words, blanks at the ends of lines included: another wording is another score. They
# are the authors' (github.com/MizzenAI/HPSv3, MIT, Copyright (c) 2024 HPSv3 Team).
HPSV3_INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 "
    "being the best. \n\n**Visual Quality:**  \nEvaluate the overall visual quality of the image. The following "
    "sub-dimensions should be considered:\n- **Reasonableness:** The image should not contain any significant "
    "biological or logical errors, such as abnormal body structures or nonsensical environmental setups.\n- "
    "**Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n- **Detail Richness:** Consider the level of detail in "
    "textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).\n- **Aesthetic and "
    "Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, "
    "depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n- "
    "**Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest "
    "possible. \n\n**Text Alignment:**  \nAssess how well the image matches the textual prompt across the following "
    "sub-dimensions:\n- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description in terms of number, "
    "appearance, and behavior.\n- **Style Relevance:** If the prompt specifies a particular artistic or stylistic "
    "style, evaluate how well the image adheres to this style.\n- **Contextual Consistency**: Assess whether the "
    "background, setting, and surrounding elements in the image logically fit the scenario described in the prompt. "
    "The environment should support and enhance the subject without contradictions.\n- **Attribute Fidelity**: Check "
    "if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, expressions, actions) are "
    "faithfully represented in the image. Minor deviations may be acceptable, but critical attributes should be "
    "preserved.\n- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured "
    "in the image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\nTextual prompt - "
)
_QUESTION = "\n\n\n\nPlease provide the overall ratings of this image: "


class HPSv3(nn.Module):
    """mu, the first output of head(network(picture and question) at the reward token).

    Each picture passes alone, so that its score does not depend on those beside it; the gradient reaches its pixels.
    What would stand after the reward token in the official text does not matter: the network looks only backwards.

    Args:
        network: transformers' Qwen2VLModel.
        head: (..., D) -> (..., 2).
        tokenizer: Qwen2-VL's, which knows the reward token.
        preprocess: of the pictures.
    """

    name = "hpsv3"

    def __init__(self, network: Any, head: nn.Sequential, tokenizer: Any, preprocess: Patches) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores, float32, without bounds; see `draftcli.rewards.Reward`."""
        return self.judge(images, prompts)[:, 0]

    def judge(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 2), float32: mu and the logarithm of sigma of the normal distribution of people's preference."""
        patches, grid = self.preprocess(images.to(self.preprocess.mean.device))
        return torch.stack([self._judge(one, grid, prompt) for one, prompt in zip(patches, prompts, strict=True)])

    def _judge(self, patches: Tensor, grid: tuple[int, int], prompt: str) -> Tensor:
        asked = f"{_AFTER}{HPSV3_INSTRUCTION}{plain_words(prompt)}{_QUESTION}{REWARD_TOKEN}"
        before, after = (
            self.network.language_model.embed_tokens(token_ids(self.tokenizer, text, patches.device))
            for text in (_BEFORE, asked)
        )
        hidden = torch.cat([before, self.see(patches, grid).to(before), after])[None]
        # Counted through, picture and text alike, as the authors' code has it: not Qwen2-VL's own positions in a plane.
        positions = torch.arange(hidden.shape[1], device=hidden.device).expand(3, 1, -1)
        read = self.network.language_model(inputs_embeds=hidden, position_ids=positions, use_cache=False)
        last = read.last_hidden_state[0, -1]
        return self.head(last.to(self.head[0].weight.dtype)).float()

    def see(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches of one picture (N, D) and their rows and columns -> (N / 4, width)."""
        thw = torch.tensor([[1, *grid]], device=patches.device)
        seen = self.network.visual(patches.to(self.network.visual.dtype), grid_thw=thw)
        return seen if isinstance(seen, Tensor) else seen.pooler_output  # transformers 4 returns it bare


def rank_head(width: int) -> nn.Sequential:
    """width-1024-16-2 with ReLUs. The dropout, off here, only keeps the official numbering of layers."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class _BlankHPSv3(HPSv3):
    def see(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return seen_in_plans(self.network.visual, patches.to(self.network.visual.dtype))


def _blank() -> HPSv3:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 151658, "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
    )  # fmt: skip
    with torch.device("meta"):
        network = with_attention_in_plans(Qwen2VLModel(config))
        preprocess = Patches(config.vision_config, HPSV3_AREA, HPSV3_AREA)
        return _BlankHPSv3(network, rank_head(3584), BlankWords(), preprocess)


@with_blank(_blank)
def hpsv3(pretrained: str | None = None, backbone: str = QWEN2_VL) -> HPSv3:
    """HPSv3: mu, without bounds, by a Qwen2-VL with 7 billion parameters in bfloat16, as its authors compute it.

    `backbone` holds configuration and tokenizer of the Qwen2-VL that it was made of.

    Raises:
        InputError: see `find_checkpoint`, `read_checkpoint`, `load_tokenizer` and `fill`.
    """
    from accelerate import init_empty_weights
    from transformers import Qwen2VLModel

    name = HPSv3.name
    path = find_checkpoint(name, HPSV3_WEIGHTS, pretrained)
    tensors = read_checkpoint(name, path)
    origin = _origin("visual.patch_embed.proj.weight" in tensors)
    config = network_config(name, backbone, "backbone", "qwen2_vl", "a qwen2_vl one")
    config.text_config.vocab_size = shape_of(name, path, tensors, origin("language_model.embed_tokens.weight")[0])[0]
    tokenizer = load_tokenizer(name, backbone, "backbone", config.text_config.vocab_size)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(REWARD_TOKEN) >= config.text_config.vocab_size:
        raise InputError(
            f"reward {name}: the network knows {config.text_config.vocab_size} tokens, and the tokenizer of {backbone} "
            f"as many without {REWARD_TOKEN}: they do not belong together; set rewards.{name}.backbone to the right one"
        )
    with init_empty_weights(include_buffers=False):
        network = Qwen2VLModel(config)
        parts = nn.ModuleDict({"rm_head": rank_head(config.text_config.hidden_size)})
    of_head = {key: tensor for key, tensor in tensors.items() if key.startswith("rm_head.")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in of_head}
    fill(name, path, parts, of_head)
    # The network's own next words are not asked for.
    fill(name, path, network, rest, origin, unused=["lm_head.weight"], dtype=torch.bfloat16)
    preprocess = Patches(config.vision_config, HPSV3_AREA, HPSV3_AREA)
    return HPSv3(network, parts["rm_head"], tokenizer, preprocess)  # type: ignore[arg-type]


def _origin(older: bool) -> Callable[[str], Origin]:
    """The official name for a tensor of Qwen2VLModel; `older`: as transformers called them before 4.52."""

    def origin(key: str) -> Origin:
        if older:
            return key.replace("language_model.", "model.", 1), lambda tensor: tensor
        return f"model.{key}", lambda tensor: tensor

    return origin
