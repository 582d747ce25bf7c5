"""Analytic rewards: known answers, gradients, and real JPEG files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from scipy.stats import spearmanr
from torch import Tensor

from draftcli.rewards import load_reward
from draftcli.rewards.analytic import LUMA_TABLE, jpeg_bits

NAMES = ["brightness", "saturation", "symmetry", "compressibility"]


def textures(count: int, size: tuple[int, int] = (64, 80)) -> Tensor:
    """From nearly flat to noise, of different colours."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        cells = 2 + i
        small = torch.rand(1, 3, cells, cells, generator=generator)
        picture = torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)[0]
        made.append(0.5 + (picture - 0.5) * torch.rand(1, generator=generator))
    return torch.stack(made)


def test_known_answers() -> None:
    red = torch.zeros(1, 3, 16, 16)
    red[:, 0] = 1
    half = torch.zeros(1, 3, 16, 16)
    half[..., 8:] = 1
    for name, image, expected in [
        ("brightness", red, 0.299), ("brightness", half, 0.5), ("saturation", red, 1.0), ("saturation", half, 0.0),
        ("symmetry", red, 0.0), ("symmetry", half, -1.0), ("compressibility", torch.full((1, 3, 16, 16), 0.5), 0.0),
    ]:  # fmt: skip
        assert load_reward(name)(image, ["x"]).item() == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    reward = load_reward(name)
    images = textures(2, (24, 37)).double().requires_grad_()
    reward(images, ["", ""]).sum().backward()
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ahead, behind = (reward(images + s * 1e-7 * direction, ["", ""]).sum() for s in (1, -1))
    assert images.grad is not None
    expected = ((ahead - behind) / 2e-7).item()
    assert (images.grad * direction).sum().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_estimated_bits_rank_pictures_as_real_jpeg_files_do(quality: int) -> None:
    images = textures(30)
    sizes = []
    for image in images:
        file = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        sizes.append(len(file.getvalue()))
    assert spearmanr(jpeg_bits(images, quality), sizes).statistic > 0.95


def test_a_grey_block_is_transformed_as_jpeg_does() -> None:
    """Against scipy's cosine transform, at quality 50, where the tables are the standard's own."""
    block = torch.rand(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.0
    for y in (0, 8):
        for x in (0, 8):
            part = 255 * (block[y : y + 8, x : x + 8].numpy() - 0.5)
            expected += np.log2(1 + (dctn(part, norm="ortho") / np.array(LUMA_TABLE)) ** 2).sum() / 2
    assert jpeg_bits(block.expand(1, 3, 16, 16), 50).item() == pytest.approx(expected / 256, rel=1e-9)
