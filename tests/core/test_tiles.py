"""Decoding in tiles."""

import pytest
import torch
import torch.nn.functional as F

from draftcli.core.models.tiles import decode_in_tiles
from tests.tiny import batch, tiny_model


def nearest(latents):
    """A decoder that sees one latent at a time, so that tiles must not change anything."""
    return F.interpolate(latents[:, :3].sin(), scale_factor=8)


@pytest.mark.parametrize("size", [(9, 9), (8, 21), (16, 11), (32, 33)])
@pytest.mark.parametrize("tile", [8, 10])
def test_tiles_of_a_local_decoder_equal_the_whole(size, tile):
    latents = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = []

    def decode(part):
        seen.append(part.shape[-2:])
        return nearest(part)

    torch.testing.assert_close(decode_in_tiles(decode, latents, tile, 8), nearest(latents), atol=1e-12, rtol=0)
    assert all(max(shape) <= tile for shape in seen)


def test_one_tile_is_decoding_at_once(tiny_sdxl):
    whole, tiled = (tiny_model(tiny_sdxl, model={"vae_tile": tile}) for tile in (None, 64))
    x = whole.initial_noise(batch(2)).double()
    assert torch.equal(whole.decode(x), tiled.decode(x))


def test_gradient_through_tiles(tiny_sdxl):
    """Against a finite difference along a random direction; a tile is decoded again, not kept."""
    model = tiny_model(tiny_sdxl, model={"vae_tile": 64})
    x = model.initial_noise(batch(1, (96, 128))).double() * 0.1
    calls = []
    model.vae.decoder.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def score(x):
        return model.decode(x).square().mean()

    leaf = x.clone().requires_grad_()
    score(leaf).backward()
    assert len(calls) == 2 * 2 * 3  # 2 x 3 tiles, forward and again in backward
    along = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = float(score(x + 1e-6 * along) - score(x - 1e-6 * along)) / 2e-6
    assert float((leaf.grad * along).sum()) == pytest.approx(difference, rel=1e-5)
    assert abs(difference) > 1e-5
