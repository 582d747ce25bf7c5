"""A family of models: what of SDXL, or of a sibling of it, is not the method's.

A family is one object, found by name; the networks, plans and exports ask it. To them a model is `Parts` and a
`Conditioning`.

Shape legend: B images, L text tokens, D text width, D2 pooled width (0 where a family has none), C latent channels,
H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from draftcli.core.batch import Batch
from draftcli.core.guidance import Prediction
from draftcli.core.models.original_layout import Original
from draftcli.core.schedule import Schedule
from draftcli.errors import InputError

# (B, L, D) sequence and (B, D2) pooled embeddings of B prompts
Embedding = tuple[Tensor, Tensor]

FAMILIES = {"sdxl": "draftcli.core.models.sdxl:SDXL", "sd1": "draftcli.core.models.sd1:SD1"}


@dataclass(frozen=True)
class Edition:
    """What the metadata of files call a model.

    Attributes:
        architecture: modelspec.architecture of a whole model.
        lora_implementation: modelspec.implementation of a LoRA: whose names its layers have.
        kohya_version: kohya's ss_base_model_version.
        v2: kohya's ss_v2.
    """

    architecture: str
    lora_implementation: str
    kohya_version: str
    v2: bool = False


class Family(Protocol):
    """One kind of model.

    Attributes:
        name: as settings and files call it.
        title: for people.
        short: for people, where there is little room.
        pipeline: the class in diffusers.
        options: what its from_pretrained gets beside the model. None leaves a part out, one that draws no picture.
        hub_base: hub id of the model that this family is known by.
        hub_license: that model's license, as the Hub calls it.
        config_folder: its configuration, without weights and tokenizers, so that its shape is known offline.
        networks: what it consists of, as diffusers' folders are called, and what plans call each.
        original_prefixes: what the tensors of each network begin with in a single file of the original code.
        kohya_prefixes: what the layers of each network begin with in kohya's LoRAs.
        tag: on model cards.
        added_input: what the UNet gets beside text and noise: its addition_embed_type in diffusers.
        zeros_for_empty: `Parts.zeros_for_empty` of models whose files say nothing of it.
    """

    name: str
    title: str
    short: str
    pipeline: str
    options: Mapping[str, Any]
    hub_base: str
    hub_license: str
    config_folder: Path
    networks: Mapping[str, str]
    original_prefixes: Mapping[str, str]
    kohya_prefixes: Mapping[str, str]
    tag: str
    added_input: str | None
    zeros_for_empty: bool

    def build(self, part: str, settings: Mapping[str, Any]) -> nn.Module:
        """One network, with weights as its class makes them.

        Args:
            part: a name in `networks`.
            settings: its configuration, as its config.json has it.
        """
        ...

    def encode_prompts(self, parts: Parts, prompts: Sequence[str]) -> Embedding:
        """The embeddings of B prompts, as the model was trained with them."""
        ...

    def condition(
        self, parts: Parts, embed: Callable[[Sequence[str]], Embedding], batch: Batch, negative: str | None
    ) -> Conditioning:
        """What the UNet gets for a batch.

        Args:
            parts: the model.
            embed: `encode_prompts`, maybe from a cache.
            batch: B images.
            negative: of those that have no negative prompt of their own; None: no negative prompt at all.
        """
        ...

    def predict(self, unet: Any, x: Tensor, timestep: int, cond: Conditioning, guidance: float | None = None) -> Tensor:
        """The network's raw output at x (B, C, H, W), already scaled to its input, in the dtype of x.

        Args:
            unet: of the family.
            x: (B, C, H, W).
            timestep: 0 .. 999.
            cond: for B pictures.
            guidance: sampling.guidance_embedding, for a UNet whose input it is.
        """
        ...

    def decode(self, vae: Any, latents: Tensor, tile: int | None = None) -> Tensor:
        """Latents (B, C, H, W) -> (B, 3, 8 H, 8 W) in [0, 1], differentiable.

        Args:
            vae: the decoder.
            latents: (B, C, H, W).
            tile: edge in pixels of the tiles to decode apart (tiles.py); None decodes all at once.
        """
        ...

    def original_layout(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Original]:
        """The tensors of one network in a single file of the original code.

        Args:
            part: a name in `networks`.
            shapes: of the network's tensors, by our keys.

        Raises:
            InputError: a tensor has no place there.
        """
        ...

    def kohya_unet_names(self, modules: Iterable[str]) -> dict[str, str]:
        """What kohya's LoRAs call the UNet's modules, with dots; those that they have no name for are left out.

        Args:
            modules: of the whole UNet, by diffusers' names.
        """
        ...

    def edition(self, unet: Mapping[str, tuple[int, ...]], prediction: str | None) -> Edition:
        """What metadata call a model of this family.

        Args:
            unet: the shapes of its UNet's weights, by module.
            prediction: of the model; None: not known.
        """
        ...

    def schedule(
        self, parts: Parts, steps: int, spacing: Literal["trailing", "leading"], timesteps: Sequence[int] = ()
    ) -> Schedule:
        """The noise levels of `steps` sampler steps; see `make_schedule`."""
        ...


@cache
def find_family(name: str = "sdxl") -> Family:
    """The family called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in FAMILIES:
        raise InputError(f"model.family {name!r}: there is no such family; available are {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)()


def tokenize(parts: Parts, prompts: Sequence[str]) -> list[Tensor]:
    """(B, L) token ids of each tokenizer, on the CPU: padded, or cut, to its length."""
    return [
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in parts.tokenizers
    ]


def tokenizer_folders(family: Family) -> list[str]:
    """Where the tokenizers are in a diffusers folder of a family: one for each text encoder."""
    encoders = (part for part in family.networks if part.startswith("text_encoder"))
    return [part.replace("text_encoder", "tokenizer") for part in encoders]


def latent_factor(vae: Any) -> int:
    """Pixels by latent, along an edge."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@dataclass
class Parts:
    """The loaded modules of a model, and the facts about it that are not in the weights.

    Making one freezes its modules, drops the VAE's encoder, which is never used, and lets no tokenizer give more tokens
    than its text encoder has positions: tokenizers that say nothing of a length would give 10^30.

    Attributes:
        unet: called as diffusers' UNet2DConditionModel.
        vae: diffusers' AutoencoderKL; only its decoder is used.
        text_encoders: as the family has them, in the order of its `networks`. Empty where a caller brings its own
            conditioning.
        tokenizers: theirs.
        prediction: what the network predicts.
        zero_terminal_snr: whether it was trained with rescaled betas.
        zeros_for_empty: an absent negative prompt is zeros (SDXL base) rather than the encoded empty prompt; None: as
            most models of the family have it.
        name: of the model, for people.
        family: which kind of model it is.
    """

    unet: Any
    vae: Any
    text_encoders: Sequence[Any] = ()
    tokenizers: Sequence[Any] = ()
    prediction: Prediction = "epsilon"
    zero_terminal_snr: bool = False
    zeros_for_empty: bool | None = None
    name: str = field(default="custom", compare=False)
    family: Family = field(default_factory=find_family, compare=False)

    def __post_init__(self) -> None:
        if self.zeros_for_empty is None:
            self.zeros_for_empty = self.family.zeros_for_empty
        drop_vae_encoder(self.vae)
        for module in self.modules.values():
            module.requires_grad_(False).eval()
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=False):
            positions = getattr(encoder.config, "max_position_embeddings", tokenizer.model_max_length)
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every network by name."""
        encoders = {f"text_encoder{'' if i == 0 else f'_{i + 1}'}": m for i, m in enumerate(self.text_encoders)}
        return {"unet": self.unet, "vae": self.vae, **encoders}


@dataclass
class Conditioning:
    """What the UNet gets beside the latents, for [unconditional ; conditional]: first dimension 2 B.

    Attributes:
        prompt_embeds: (2 B, L, D).
        text_embeds: (2 B, D2) pooled; None in a family without.
        time_ids: (2 B, 6) size keys; None in a family without.
    """

    prompt_embeds: Tensor
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Move everything; the text tensors take `dtype`."""
        text = None if self.text_embeds is None else self.text_embeds.to(device, dtype)
        sizes = None if self.time_ids is None else self.time_ids.to(device)
        return Conditioning(self.prompt_embeds.to(device, dtype), text, sizes)

    def __getitem__(self, some: slice | Tensor) -> Conditioning:
        """That of some of the B pictures: a slice, or chosen (B,) bool."""
        return self._of(lambda rows: rows.unflatten(0, (2, -1))[:, some].flatten(0, 1))

    @property
    def unconditional(self) -> Conditioning:
        """The first half alone, first dimension B."""
        return self._of(lambda rows: rows[: len(rows) // 2])

    @property
    def conditional(self) -> Conditioning:
        """The second half alone, first dimension B: for a network call without guidance."""
        return self._of(lambda rows: rows[len(rows) // 2 :])

    def _of(self, part: Callable[[Tensor], Tensor]) -> Conditioning:
        """A part of each tensor that is there."""
        text, sizes = (None if rows is None else part(rows) for rows in (self.text_embeds, self.time_ids))
        return Conditioning(part(self.prompt_embeds), text, sizes)


def drop_vae_encoder(vae: Any) -> None:
    """Free the half of the VAE that is never used: a third of its weights."""
    for name in ("encoder", "quant_conv"):
        if getattr(vae, name, None) is not None:
            setattr(vae, name, None)
