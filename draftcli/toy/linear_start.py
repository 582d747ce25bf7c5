"""Start a tiny autoencoder as an almost exactly linear one: block averages in, block averages out.

From a random start the colours, which are few pixels' worth of error, take thousands of steps to reach the latents.
From this start they are there at step 0, as the mean of each 8x8 block, and only edges are left to learn. Every
residual branch starts at zero, convolutions that halve take the mean of 2x2, those that double copy. A colour c travels
as the two channels +c and -c, for silu(c) - silu(-c) = c; two constant channels keep group norm nearly linear.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.nn import Conv2d
from torch.nn import functional as F

CARRIED = 8  # +r -r +g -g +b -b and two constants; all other channels start at random
CONSTANT = 3.0


@torch.no_grad()
def linear_start(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Set the weights of an untrained VAE without attention and with one norm group.

    Images (B, 3, H, W) in [-1, 1] fix its scale.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            _clear(module.conv2)
            if isinstance(module.conv_shortcut, Conv2d):
                _carry(module.conv_shortcut, slice(0, 1), 1.0)
        elif isinstance(module, Downsample2D):
            _carry(module.conv, slice(0, 2), 0.25)
        elif isinstance(module, Upsample2D):
            _carry(module.conv, slice(1, 2), 1.0)
    encoder, decoder = vae.encoder, vae.decoder
    _split_colours(encoder.conv_in)
    _split_colours(decoder.conv_in)
    _clear(decoder.conv_out)
    _join_colours(encoder.conv_out)
    _join_colours(decoder.conv_out)
    encoder.conv_out.weight[4:] = 0  # the posterior's log variance: almost none, everywhere
    encoder.conv_out.bias[4:] = -6
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _clear(conv)
        conv.weight.copy_(torch.eye(conv.in_channels)[:, :, None, None])
    latents = vae.encode(images).latent_dist.mean
    encoder.conv_out.weight[:4] *= F.avg_pool2d(images, 8).std() / latents[:, :3].std()
    restored = vae.decode(vae.encode(images).latent_dist.mean).sample
    decoder.conv_out.weight *= (restored * images).sum() / (restored * restored).sum()


def _clear(conv: Conv2d) -> None:
    conv.weight.zero_()
    conv.bias.zero_()


def _carry(conv: Conv2d, taps: slice, value: float) -> None:
    """The carried channels pass through, weighted alike over the kernel's `taps` in both directions."""
    conv.weight[:CARRIED] = 0
    conv.bias[:CARRIED] = 0
    for channel in range(CARRIED):
        conv.weight[channel, channel, taps, taps] = value


def _split_colours(conv: Conv2d) -> None:
    conv.weight[:CARRIED] = 0
    conv.bias[:CARRIED] = 0
    for colour in range(3):
        conv.weight[2 * colour, colour, 1, 1] = 1
        conv.weight[2 * colour + 1, colour, 1, 1] = -1
    conv.bias[6], conv.bias[7] = CONSTANT, -CONSTANT


def _join_colours(conv: Conv2d) -> None:
    conv.weight[:3] = 0
    conv.bias[:3] = 0
    for colour in range(3):
        conv.weight[colour, 2 * colour, 1, 1] = 1
        conv.weight[colour, 2 * colour + 1, 1, 1] = -1
