"""Small Qwen-VL models: Qwen2-VL with HPSv3's head again, in plain torch, from its definition and with the official
names of its tensors; configurations as on the hub; and a tokenizer made on the spot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.rewards.references import MEAN, STD

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WIDTH, HEADS, VISION_WIDTH, PATCH = 32, 2, 32, 14


def qwen_tokenizer(folder: Path, texts: list[str], more: list[str] | None = None) -> Any:
    """Write a byte-level BPE like Qwen's, learned on `texts`, with `more` as tokens of their own; return it as read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(more or [])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.save_pretrained(folder)
    return made


def qwen2_vl_config(folder: Path, tokenizer: Any) -> None:
    """Write config.json of a small Qwen2-VL, in the flat form that the hub has; its vocabulary is padded there."""
    config = {
        "model_type": "qwen2_vl", "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vocab_size": len(tokenizer) + 50,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"), "bos_token_id": 0, "eos_token_id": 1,
        "vision_config": {
            "depth": 2, "embed_dim": VISION_WIDTH, "num_heads": 2, "mlp_ratio": 4, "hidden_size": WIDTH,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: the two halves of the last dimension of (..., L, D) as real and imaginary parts."""
    half = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([half.real, half.imag], -1)


def heads_attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """(H, L, D) each -> (L, H D); softmax attention by its definition."""
    weights = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        weights = weights + torch.full_like(weights, -torch.inf).triu(1)
    return (weights.softmax(-1) @ value).transpose(0, 1).flatten(1)


class SeeingBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (2, -1)).transpose(0, 1) for part in self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        )
        x = x + self.attn["proj"](heads_attend(turned(query, angles), turned(key, angles), value, causal=False))
        wide = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](wide * torch.sigmoid(1.702 * wide))


class Seeing(nn.Module):
    """One picture (3, H, W), normalised, of a size that fits -> (N / 4, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        film = nn.Conv3d(3, VISION_WIDTH, (2, PATCH, PATCH), (2, PATCH, PATCH), bias=False)
        self.patch_embed = nn.ModuleDict({"proj": film})
        self.blocks = nn.ModuleList(SeeingBlock(VISION_WIDTH) for _ in range(2))
        wide = 4 * VISION_WIDTH
        layers = {"0": nn.Linear(wide, wide), "2": nn.Linear(wide, WIDTH)}
        self.merger = nn.ModuleDict({"ln_q": nn.LayerNorm(VISION_WIDTH, eps=1e-6), "mlp": nn.ModuleDict(layers)})

    def forward(self, picture: Tensor) -> Tensor:
        film = torch.stack([picture, picture], 1)[None]
        maps = self.patch_embed["proj"](film)[0, :, 0]  # (width, rows, columns)
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in maps.shape[1:]), indexing="ij")
        # In blocks of 2 x 2, row by row.
        order = (rows // 2 * 2 * columns.shape[1] + columns // 2 * 4 + rows % 2 * 2 + columns % 2).flatten().argsort()
        x, rows, columns = maps.flatten(1).T[order], rows.flatten()[order], columns.flatten()[order]
        pace = 10000.0 ** -(torch.arange(4) / 4)
        angles = torch.cat([rows[:, None] * pace, columns[:, None] * pace], -1)
        for block in self.blocks:
            x = block(x, angles)
        merged = self.merger["ln_q"](x).reshape(len(x) // 4, -1)
        return self.merger["mlp"]["2"](F.gelu(self.merger["mlp"]["0"](merged)))


class ReadingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
        one = WIDTH // HEADS
        sizes = {"q_proj": WIDTH, "k_proj": one, "v_proj": one}
        looks = {name: nn.Linear(WIDTH, size) for name, size in sizes.items()}
        self.self_attn = nn.ModuleDict({**looks, "o_proj": nn.Linear(WIDTH, WIDTH, bias=False)})
        gates = {name: nn.Linear(WIDTH, 48, bias=False) for name in ("gate_proj", "up_proj")}
        self.mlp = nn.ModuleDict({**gates, "down_proj": nn.Linear(48, WIDTH, bias=False)})

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        query, key, value = (
            self.self_attn[f"{name}_proj"](y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(0, 1) for name in "qkv"
        )
        # Keys and values are one head's, for all.
        x = x + self.self_attn["o_proj"](heads_attend(turned(query, angles), turned(key, angles), value, causal=True))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class OfficialHPSv3(nn.Module):
    """Qwen2-VL and its head by the names that transformers had before 4.52."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Seeing()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocabulary, WIDTH),
                "layers": nn.ModuleList(ReadingBlock() for _ in range(2)),
                "norm": nn.RMSNorm(WIDTH, 1e-6),
            }
        )
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        sizes = {"0": (WIDTH, 1024), "3": (1024, 16), "5": (16, 2)}
        self.rm_head = nn.ModuleDict({number: nn.Linear(*size) for number, size in sizes.items()})

    def forward(self, image: Tensor, tokens: Tensor, pad: int, reward: int) -> Tensor:
        """(2,) of an image (3, H, W) in [0, 1] and all tokens of the text, the picture's place taken by one `pad`."""
        (place,) = (tokens == pad).nonzero()[0].tolist()
        text = self.model["embed_tokens"](tokens)
        x = torch.cat([text[:place], self.visual((image - MEAN) / STD), text[place + 1 :]])
        one = WIDTH // HEADS
        angles = torch.arange(len(x))[:, None] * 1e6 ** -(torch.arange(0, one, 2) / one)
        for block in self.model["layers"]:
            x = block(x, angles)
        x = self.model["norm"](x)[len(x) - len(tokens) + int((tokens == reward).nonzero()[0])]
        x = self.rm_head["0"](x).relu()
        return self.rm_head["5"](self.rm_head["3"](x).relu())
