"""Networks with every shape and dtype of a run and no data, on the meta device: what a training would hold can be seen
before anything is fetched. They work inside `WithoutData`.

Of many equal layers one after another two are there, and `RepeatedLayers` keeps in memory what those between would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding

from draftcli.config import Config, RewardSource
from draftcli.core.engine.eight_bit import EightBitLinear, quantize_blocks
from draftcli.core.lora.adapters import attach_lora
from draftcli.core.models.family import Parts
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.precision import DTYPES
from draftcli.planning.live_bytes import LiveBytes
from draftcli.rewards.aesthetic import AestheticReward, scoring_head
from draftcli.rewards.catalogue import BUILT_IN_REWARDS
from draftcli.rewards.clip import CLIPReward
from draftcli.rewards.imagereward import TEXT_LENGTH, ImageReward
from draftcli.rewards.pixels import Preprocess
from draftcli.rewards.registry import load_reward
from draftcli.rewards.wrappers import InMicroBatches, PromptRelative

# transformers' configurations of the networks that the official weights belong to.
_VIT_H = {
    "vision": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
    "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "projection_dim": 1024,
}
_VIT_L = {
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "projection_dim": 768,
}


class Tokens:
    """Stands in for a tokenizer: as many tokens as a text may have."""

    model_max_length = 77

    def __call__(self, prompts: Any, max_length: int = 77, **options: Any) -> BatchEncoding:
        """(B, max_length) zeros, and a mask of ones."""
        ids = torch.zeros(1 if isinstance(prompts, str) else len(prompts), max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def shortened_modules(folder: Path, targets: Sequence[str] = ()) -> dict[str, Any]:
    """The four networks whose configurations lie in `folder`, on the meta device, shortened where every layer is to be
    treated alike.

    Args:
        folder: with a folder for each.
        targets: peft.target_modules.

    Raises:
        InputError: a configuration is missing or not readable.
    """
    modules = modules_on_meta(folder)
    for part, network in modules.items():
        if part != "unet" or not any(_ONE_BLOCK.search(target) for target in targets):
            shorten(network)
    return modules


_ONE_BLOCK = re.compile(r"(^|\.)\d+\.(attn|ff|norm)")  # a target that says which transformer block it means


def stand_in_parts(folder: Path, cfg: Config) -> Parts:
    """The SDXL whose configuration lies in `folder`, on the meta device, in the dtypes that `load_parts` gives it and
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
    encoders = (modules["text_encoder"], modules["text_encoder_2"])
    parts = Parts(modules["unet"], modules["vae"], encoders, (Tokens(), Tokens()))
    if lora:
        with torch.device("meta"):  # else peft would fill a LoRA of real memory with zeros
            attach_lora(parts.unet, cfg.peft.rank, cfg.peft.alpha, cfg.peft.target_modules)
        for parameter in filter(lambda p: p.requires_grad, parts.unet.parameters()):
            parameter.data = parameter.data.to(trained)
    if cfg.model.quantize:
        quantize_blocks(parts.unet)
    return parts


def stays(module: nn.Module) -> nn.Module:
    """Let `module.to` do nothing: what has no data is as good on one device as on another."""
    module.to = lambda *_, **__: module
    return module


class WithoutData(LiveBytes):
    """Inside, every tensor is on the meta device, whatever device is asked for, and is counted.

    Args:
        known: tensors that are there already, such as weights.
        value: what code gets that asks a tensor for its number.
        fused: attention is a fused kernel, without its quadratic matrix.
    """

    def __init__(self, known: Iterable[Tensor] = (), value: int = 0, fused: bool = True) -> None:
        super().__init__(known)
        self.value, self.fused = value, fused

    def __enter__(self) -> Any:
        """Torch knows a fused kernel for the meta device, and does not choose it by itself."""
        self._attention = F.scaled_dot_product_attention
        if self.fused:
            F.scaled_dot_product_attention = self._fused
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """As it was."""
        F.scaled_dot_product_attention = self._attention
        super().__exit__(*error)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *more: Any, **kw: Any) -> Tensor:
        if attn_mask is not None:  # short texts
            return self._attention(query, key, value, attn_mask, *more, **kw)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return (bool if kind == torch.bool else float if kind.is_floating_point else int)(self.value)
        if kwargs and kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        args = [a.to("meta") if isinstance(a, Tensor) and not a.is_meta else a for a in args]
        return super().__torch_dispatch__(func, types, args, kwargs)


# ------------------------------------------------------------------------------------------------ many equal layers

REPEATED = ("BasicTransformerBlock", "CLIPEncoderLayer", "SiglipEncoderLayer", "BlipEncoderLayer", "BlipTextLayer")


def shorten(network: nn.Module) -> None:
    """Leave the first and the last of many equal layers, in place; `RepeatedLayers` stands for those between."""
    for module in list(network.modules()):
        for name, layers in module.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) > 3 and type(layers[0]).__name__ in REPEATED:
                between = RepeatedLayers(layers[0], len(layers) - 2)
                setattr(module, name, nn.ModuleList([layers[0], between, layers[-1]]))
    network.register_forward_hook(_let_go)


def tensors(network: nn.Module, buffers: bool = True) -> Iterator[tuple[Tensor, int]]:
    """Every parameter (and buffer) of a network, and how often the whole network has one like it."""
    yield from ((tensor, 1) for tensor in (*network.parameters(), *(network.buffers() if buffers else ())))
    for others in (module for module in network.modules() if isinstance(module, RepeatedLayers)):
        own = (*others.like.parameters(), *(others.like.buffers() if buffers else ()))
        yield from ((tensor, others.count) for tensor in own)


def size_of(found: Iterable[tuple[Tensor, int]]) -> int:
    """Bytes of what `tensors` found."""
    return sum(times * tensor.numel() * tensor.element_size() for tensor, times in found)


class RepeatedLayers(nn.Module):
    """Stands for `count` layers that are like the one before it: it computes nothing, and keeps in memory as much as
    each of them would have kept, which is seen on that layer: what a graph needs until backward, autocast's casts of
    trained weights until the network is done.

    Args:
        like: the layer before.
        count: of layers.

    Attributes:
        live: what counts; nothing is kept without it.
        recomputed: whether activations are recomputed in backward: then no graph needs the casts.
    """

    def __init__(self, like: nn.Module, count: int) -> None:
        super().__init__()
        self._like = [like]  # in a list, so that it is no part of this one
        self.count = count
        self.live: LiveBytes | None = None
        self.recomputed = False
        self._before, self._is_tuple = 0, False
        self._casts: Tensor | None = None
        like.register_forward_pre_hook(self._begin)
        like.register_forward_hook(self._end)

    @property
    def like(self) -> nn.Module:
        """The layer before."""
        return self._like[0]

    def _begin(self, *_: Any) -> None:
        self._before = self.live.now if self.live else 0

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._is_tuple = isinstance(output, tuple)  # transformers before 5

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`hidden`, as the layers before and after take and return it."""
        if self.live is not None:
            kept = self.live.now - self._before
            casts = sum(m.kept_bytes for m in self.like.modules() if isinstance(m, _Autocast))
            if torch.is_grad_enabled() and hidden.requires_grad:
                kept -= casts if self.recomputed else 0
                hidden = _Kept.apply(hidden, self.count * kept)  # type: ignore[assignment]
            self._casts = torch.empty(self.count * casts, dtype=torch.uint8)
        return (hidden,) if self._is_tuple else hidden

    def let_go(self) -> None:
        """Forget what was kept without a graph."""
        self._casts = None


def _let_go(network: nn.Module, *_: Any) -> None:
    for module in network.modules():
        if isinstance(module, RepeatedLayers | _Autocast):
            module.let_go()


class _Kept(torch.autograd.Function):
    """Passes a tensor on, and holds so many bytes until its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int) -> Tensor:
        ctx.held = torch.empty(max(0, size), dtype=torch.uint8)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.held = None
        return gradient, None


# ------------------------------------------------------------------------------------------------ as a GPU computes


def autocast_to(network: nn.Module, dtype: torch.dtype) -> None:
    """Make `network` compute as inside a GPU's autocast, which there is none of on the meta device: matrix products and
    convolutions in `dtype`, norms in float32, and a trained weight's cast kept until the network is done.
    """
    for module in network.modules():
        if type(module) in _AUTOCAST:
            module.__class__ = _AUTOCAST[type(module)]
            setattr(module, "autocast_dtype", dtype)  # noqa: B010


class _Autocast(nn.Module):
    autocast_dtype: torch.dtype
    _kept: Sequence[Any] = ()

    def cast(self, x: Tensor) -> list[Any]:
        """Input, weight and bias in the dtype of the products."""
        own = [getattr(self, "weight", None), getattr(self, "bias", None)]
        casts = [None if p is None else p.to(self.autocast_dtype) for p in own]
        if torch._C._current_graph_task_id() == -1:  # not for what a backward recomputes
            self._kept = [
                c for p, c in zip(own, casts, strict=True) if c is not p and p is not None and p.requires_grad
            ]
        return [x.to(self.autocast_dtype), *casts]

    @property
    def kept_bytes(self) -> int:
        """Of the casts."""
        return size_of((cast, 1) for cast in self._kept)

    def wide(self, x: Tensor) -> list[Any]:
        """In float32."""
        return [x.float(), *(None if p is None else p.float() for p in (self.weight, self.bias))]

    def let_go(self) -> None:
        """Forget the casts."""
        self._kept = ()


class _Linear(_Autocast, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*self.cast(x))


class _EightBit(_Autocast, EightBitLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.autocast_dtype)


class _Conv2d(_Autocast, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(*self.cast(x))


class _GroupNorm(_Autocast, nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide, weight, bias = self.wide(x)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps)


class _LayerNorm(_Autocast, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide, weight, bias = self.wide(x)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps)


_AUTOCAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    EightBitLinear: _EightBit,
    nn.GroupNorm: _GroupNorm,
    nn.LayerNorm: _LayerNorm,
}


# ------------------------------------------------------------------------------------------------ rewards


class StandInReward(nn.Module):
    """The sum of a run's rewards.

    Args:
        settings: of each, by name.

    Attributes:
        uncounted: rewards whose networks are not known, as they are somebody's own: they read every pixel and no more.
    """

    def __init__(self, settings: Mapping[str, RewardSource]) -> None:
        super().__init__()
        self.uncounted: list[str] = []
        self.judges = nn.ModuleList()
        self.plain: list[Callable[..., Tensor]] = []
        for name, setting in settings.items():
            reward = self._made(name)
            if setting.relative is not None and hasattr(reward, "embed_images"):
                reward = PromptRelative(reward, **setting.relative.model_dump())
            if setting.micro_batch_size is not None:
                reward = InMicroBatches(reward, setting.micro_batch_size)
            if isinstance(reward, nn.Module):
                self.judges.append(reward)
            else:
                self.plain.append(reward)

    def to(self, *args: Any, **kwargs: Any) -> StandInReward:
        """Stay; see `stays`."""
        return self

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        judges = [*self.judges, *self.plain] or [_mean_of_pixels]
        scores = [judge(images, prompts) for judge in judges]
        return torch.stack([score.to(images.dtype) for score in scores]).sum(0)

    def _made(self, name: str) -> Any:
        if name in _NETWORKS:
            shorten(network := _NETWORKS[name](name))
            return stays(network)
        if name in BUILT_IN_REWARDS and not BUILT_IN_REWARDS[name].parameters:  # none or few, that ship with draftp
            reward = load_reward(name)
            return stays(reward.to("meta")) if isinstance(reward, nn.Module) else reward
        self.uncounted.append(name)
        return _mean_of_pixels


def _mean_of_pixels(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def _clip(name: str, network: Mapping[str, Any]) -> CLIPReward:
    from transformers import CLIPConfig, CLIPModel

    vision = {**network["vision"], "patch_size": 14}
    config = CLIPConfig(vision_config=vision, text_config=network["text"], projection_dim=network["projection_dim"])
    with torch.device("meta"):
        clip = CLIPModel(config)
    return CLIPReward(name, clip, Tokens(), Preprocess(224, "crop"))


def _aesthetic(name: str) -> AestheticReward:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        config = CLIPVisionConfig(**_VIT_L["vision"], patch_size=14, projection_dim=768)
        vision = CLIPVisionModelWithProjection(config)
        head = nn.Linear(768, 1) if name == "aesthetic_v1" else scoring_head(768)
    return AestheticReward(name, vision, head, Preprocess(224, "crop_even"))


def _aesthetic_v2_5(name: str) -> AestheticReward:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    sizes |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    with torch.device("meta"):
        vision = SiglipVisionModel(SiglipVisionConfig(**sizes))
        head = scoring_head(1152, last_dropout=True)
    return AestheticReward(name, vision, head, Preprocess(384, "squash"))


def _imagereward(name: str) -> ImageReward:
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    text: dict[str, Any] = {"hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072}
    text |= {"num_hidden_layers": 12}
    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**_VIT_L["vision"], image_size=224, patch_size=16))
        config = BlipTextConfig(
            **text, vocab_size=30524, num_attention_heads=12, max_position_embeddings=512, use_cache=False
        )
        reader = BlipTextModel(config, add_pooling_layer=False)
        head = scoring_head(768)
    assert Tokens.model_max_length >= TEXT_LENGTH
    return ImageReward(vision, reader, head, Tokens(), Preprocess(224, "crop_even"))


_NETWORKS: dict[str, Callable[[str], nn.Module]] = {
    "pickscore": lambda name: _clip(name, _VIT_H),
    "hpsv2": lambda name: _clip(name, _VIT_H),
    "hpsv2_1": lambda name: _clip(name, _VIT_H),
    "clip": lambda name: _clip(name, _VIT_L),
    "aesthetic": _aesthetic,
    "aesthetic_v1": _aesthetic,
    "aesthetic_v2_5": _aesthetic_v2_5,
    "imagereward": _imagereward,
}
