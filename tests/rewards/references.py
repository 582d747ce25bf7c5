"""The reward models again, in plain torch, from their definitions and with the official names of their tensors.

They make small random checkpoints in the official layout, and compute what the official scores of those would be.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig

from draftcli.rewards.check import double_by_default

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def pictures(height: int, width: int, count: int = 3) -> Tensor:
    """(count, 3, height, width), smooth and random, in steps of 1 / 255."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1).mul(255).round() / 255


def sharp_pictures(height: int, width: int, count: int = 3) -> Tensor:
    """Black and white dots, at which bicubic overshoots everywhere."""
    return (torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) > 0.5).float()


def as_pil(images: Tensor) -> list[Image.Image]:
    """Pictures of 8 bits."""
    return [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]


def seeded(make: Any, seed: int = 0) -> Any:
    """A network whose every tensor is random, norms and biases too, so that none can be swapped unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


class ClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class ClipTower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ClipVision(nn.Module):
    def __init__(self, width: int, embed: int, edge: int, patch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((edge // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = ClipTower(width, 16, 2)
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP, 16 heads in either tower as ViT-H/14 has them."""

    def __init__(self, vocabulary: int, edge: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.visual = ClipVision(32, 24, edge, patch)
        self.transformer = ClipTower(48, 16, 3)
        self.token_embedding = nn.Embedding(vocabulary, 48)
        self.positional_embedding = nn.Parameter(torch.randn(77, 48))
        self.ln_final = nn.LayerNorm(48)
        self.text_projection = nn.Parameter(torch.randn(48, 24))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 77), zeros after the end; the end is the highest number."""
        mask = torch.full((77, 77), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        x = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]
        return x @ self.text_projection

    def cosine(self, images: Tensor, tokens: Tensor) -> Tensor:
        image, text = self.visual((images - MEAN) / STD), self.encode_text(tokens)
        return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


def as_transformers(clip: OpenClip) -> dict[str, Tensor]:
    """The tensors by the names of transformers' CLIPModel, with the tables of numbers that older releases kept."""
    theirs = {"logit_scale": clip.logit_scale.data}
    layers: dict[str, Any] = {
        "text_model.final_layer_norm": clip.ln_final,
        "vision_model.pre_layrnorm": clip.visual.ln_pre,
        "vision_model.post_layernorm": clip.visual.ln_post,
    }
    for tower, half, projection in (("text", clip, clip.text_projection), ("vision", clip.visual, clip.visual.proj)):
        theirs[f"{'text' if tower == 'text' else 'visual'}_projection.weight"] = projection.data.T
        theirs[f"{tower}_model.embeddings.position_embedding.weight"] = half.positional_embedding.data
        theirs[f"{tower}_model.embeddings.position_ids"] = torch.arange(len(half.positional_embedding))[None]
        for number, block in enumerate(half.transformer.resblocks):
            layer = f"{tower}_model.encoder.layers.{number}."
            layers |= {f"{layer}layer_norm1": block.ln_1, f"{layer}layer_norm2": block.ln_2}
            layers |= {f"{layer}mlp.fc1": block.mlp.c_fc, f"{layer}mlp.fc2": block.mlp.c_proj}
            layers[f"{layer}self_attn.out_proj"] = block.attn.out_proj
            for kind in ("weight", "bias"):
                thirds = getattr(block.attn, f"in_proj_{kind}").data.chunk(3)
                theirs |= {f"{layer}self_attn.{x}_proj.{kind}": third for x, third in zip("qkv", thirds, strict=True)}
    for name, module in layers.items():
        theirs |= {f"{name}.weight": module.weight.data, f"{name}.bias": module.bias.data}
    theirs["text_model.embeddings.token_embedding.weight"] = clip.token_embedding.weight.data
    theirs["vision_model.embeddings.class_embedding"] = clip.visual.class_embedding.data
    theirs["vision_model.embeddings.patch_embedding.weight"] = clip.visual.conv1.weight.data
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}


def clip_backbone(folder: Path, tokenizer: Any, edge: int = 32) -> Path:
    """Write what is read of the CLIP that OpenClip's tensors belong to: configuration, tokenizer, preprocessor."""
    shared = {"num_attention_heads": 16, "hidden_act": "gelu"}
    vocabulary = len(tokenizer)
    text = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": vocabulary}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": edge, "patch_size": 8}
    CLIPConfig(
        text_config={**shared, **text, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1},
        vision_config={**shared, **vision},
        projection_dim=24,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = {"image_processor_type": "CLIPImageProcessor", "image_mean": MEAN.flatten().tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps({**pixels, "image_std": STD.flatten().tolist()}))
    return folder


def open_clip_tokens(tokenizer: Any, prompts: list[str]) -> Tensor:
    """(B, 77), zeros after the end."""
    tokens = torch.zeros(len(prompts), 77, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = tokenizer(prompt).input_ids
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def slope_and_differences(reward: Any, images: Tensor, prompts: list[str], step: float = 1e-5) -> tuple[float, float]:
    """The slope of the summed scores in a random direction, by the gradient and by central differences, in float64."""
    reward.double()
    # Away from 0 and 1, where the preprocessing saturates as the official one does.
    images = (0.3 + 0.4 * images.double()).requires_grad_()
    with double_by_default():
        reward(images, prompts).sum().backward()
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), double_by_default():
        ahead, behind = (reward(images + s * step * direction, prompts).sum() for s in (1, -1))
    assert images.grad is not None
    return (images.grad * direction).sum().item(), ((ahead - behind) / (2 * step)).item()


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention by its definition; mask (B, L) has 0 where a key is not looked at."""
    batch, _, width = query.shape
    query, key, value = (x.view(batch, -1, heads, width // heads).transpose(1, 2) for x in (query, key, value))
    weights = query @ key.transpose(-1, -2) / (width // heads) ** 0.5
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (weights.softmax(-1) @ value).transpose(1, 2).reshape(batch, -1, width)


class BlipVisionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](attend(*self.attn["qkv"](self.norm1(x)).chunk(3, -1), heads=16))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class BlipVision(nn.Module):
    def __init__(self, width: int, edge: int, patch: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (edge // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(BlipVisionBlock(width) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def bert_attention(width: int, seen: int) -> nn.ModuleDict:
    looks = {"query": nn.Linear(width, width), "key": nn.Linear(seen, width), "value": nn.Linear(seen, width)}
    output = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)}
    return nn.ModuleDict({"self": nn.ModuleDict(looks), "output": nn.ModuleDict(output)})


class BlipTextBlock(nn.Module):
    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.attention, self.crossattention = bert_attention(width, width), bert_attention(width, seen)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        x = self.look(self.attention, x, x, mask)
        x = self.look(self.crossattention, x, seen, None)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + y)

    def look(self, part: nn.ModuleDict, x: Tensor, at: Tensor, mask: Tensor | None) -> Tensor:
        looks, output = part["self"], part["output"]
        y = attend(looks["query"](x), looks["key"](at), looks["value"](at), heads=12, mask=mask)
        return output["LayerNorm"](x + output["dense"](y))


class BlipText(nn.Module):
    def __init__(self, vocabulary: int, width: int, seen: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(40, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BlipTextBlock(width, seen) for _ in range(2))})

    def forward(self, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        x = self.embeddings["word_embeddings"](tokens) + self.embeddings["position_embeddings"](places)
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, mask, seen)
        return x


def head(width: int, numbers: tuple[int, ...]) -> nn.ModuleDict:
    """The linear layers of a scoring head, by their official numbers."""
    widths = (width, 1024, 128, 64, 16, 1)
    return nn.ModuleDict({str(n): nn.Linear(a, b) for n, a, b in zip(numbers, widths, widths[1:], strict=False)})


def score_by(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    for layer in layers.values():
        x = layer(x)
    return x[:, 0]


class OfficialImageReward(nn.Module):
    """BLIP with 16 heads to see and 12 to read, and the head; also the two projections that are left over."""

    def __init__(self, vocabulary: int, edge: int = 32) -> None:
        super().__init__()
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": BlipVision(32, edge, 8),
                "text_encoder": BlipText(vocabulary, 24, 32),
                "vision_proj": nn.Linear(32, 8),
                "text_proj": nn.Linear(24, 8),
            }
        )
        self.mlp = nn.ModuleDict({"layers": head(24, (0, 2, 4, 6, 7))})

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.blip["visual_encoder"]((images - MEAN) / STD)
        read = self.blip["text_encoder"](tokens, mask, seen)
        return (score_by(self.mlp["layers"], read[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def bert_tokenizer(folder: Path) -> int:
    """Write a small BERT tokenizer; returns the size of its vocabulary."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz,"]
    words += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"] + ["red", "circle", "blue", "squares"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return len(words)
