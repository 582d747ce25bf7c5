"""The two networks of tests/golden, wired into SDXLDRaFTPModel with their conditioning fed directly."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file
from torch import Tensor, nn

from draftcli.config import check_config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.lora.adapters import lora_layers
from draftcli.core.models.family import Conditioning, Parts

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())


class AnalyticUNet(nn.Module):
    """h = tanh(0.5 conv1(x) + [mean_L(ctx) P^T + y Q^T + r sin(t / 100)]); eps = 0.95 x + conv2(h)."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.P, self.Q = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
        self.r = nn.Parameter(torch.zeros(8))
        self.config = FrozenDict({"in_channels": 4})
        self.load_state_dict(weights)

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs, return_dict):
        shift = self.P(encoder_hidden_states.mean(1)) + self.Q(added_cond_kwargs["text_embeds"])
        h = torch.tanh(0.5 * self.conv1(x) + (shift + self.r * torch.sin(t.to(x) / 100))[:, :, None, None])
        return (0.95 * x + self.conv2(h),)


class LinearVAE(nn.Module):
    """The tiny decoder that a model needs to be whole; the golden losses are taken in latent space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 1)
        self.config = FrozenDict({"scaling_factor": GOLDEN["scale_factor"], "block_out_channels": (1, 1, 1, 1)})

    def decode(self, latents, return_dict):
        return (self.conv(latents),)


def golden_data(name: str) -> dict[str, Tensor]:
    data = load_file(FOLDER / f"{name}.safetensors")
    inputs = load_file(FOLDER / "analytic.safetensors")
    return {**{k: v for k, v in inputs.items() if k.startswith("inputs/")}, **data}


def golden_model(
    name: str, dtype: torch.dtype, truncation_steps: int = 1, kl_coeff: float = 0.1, scale: float = GOLDEN["cfg"]
) -> tuple[SDXLDRaFTPModel, Conditioning, dict[str, Tensor]]:
    """The model with the golden LoRA, its conditioning [uncond ; cond], and the recorded tensors."""
    data = golden_data(name)
    if name == "analytic":
        unet: nn.Module = AnalyticUNet({k.removeprefix("weights/"): v for k, v in data.items() if "weights/" in k})
        text = torch.cat([data["uncond/vector"], data["cond/vector"]])
    else:
        unet = UNet2DConditionModel(**GOLDEN["unet_config"])
        unet.load_state_dict({k: v.float() for k, v in load_file(FOLDER / "unet_weights.safetensors").items()})
        text = torch.cat([data["uncond/vector"], data["cond/vector"]])[:, :16]
    layout = GOLDEN[name]["lora"]
    cfg = check_config(
        {
            "model": {"precision": {torch.float64: "fp64", torch.float32: "fp32"}[dtype], "device": "cpu"},
            "sampling": {"height": 128, "width": 128, "steps": GOLDEN["steps"], "scale": scale},
            "draftp": {"truncation_steps": truncation_steps, "kl_coeff": kl_coeff},
            "peft": {"rank": 2, "target_modules": [entry["name"] for entry in layout]},
            "trainer": {"micro_batch_size": 2, "global_batch_size": 2},
        }
    )
    model = SDXLDRaFTPModel(cfg, Parts(unet.to(dtype).eval(), LinearVAE().to(dtype)))
    load_flat_lora(model.unet, layout, data["lora/flat"])
    time_ids = data["cond/time_ids"] if name == "unet" else torch.zeros(2, 6, dtype=torch.int64)
    context = torch.cat([data["uncond/crossattn"], data["cond/crossattn"]])
    cond = Conditioning(context, text, torch.cat([time_ids, time_ids])).to(torch.device("cpu"), dtype)
    return model, cond, data


def flat_factors(unet: nn.Module, layout: list[dict]) -> list[Tensor]:
    """The LoRA factors of `unet` in the golden order: A then B of each entry."""
    by_name = {n: m for n, m in unet.named_modules() if m in lora_layers(unet)}
    factors = []
    for entry in layout:
        layer = by_name[entry["name"]]
        factors += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return factors


def load_flat_lora(unet: nn.Module, layout: list[dict], flat: Tensor) -> None:
    offset = 0
    for factor in flat_factors(unet, layout):
        factor.data.copy_(flat[offset : offset + factor.numel()].view_as(factor))
        offset += factor.numel()
    assert offset == flat.numel()
