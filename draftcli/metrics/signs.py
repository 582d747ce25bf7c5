"""Signs of drift and reward hacking that pixels alone show: one number a picture.

What over-optimised models do is known (over-saturation, lost backgrounds, grids, one picture for every prompt); each
sign is one of these as a number. None of them is good or bad by itself: a large change against the base is.

Pictures are (n, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d
from scipy.stats import entropy

REC709_LUMA = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709, on the pixel values as they are
EDGE_SLOPE = 0.1  # change of luma per pixel that counts as an edge
LEVELS = 8  # a channel, for the entropy of colours
CLIPPED = 0.5 / 255  # how near to 0 or 1 a value is that no file of 8 bits tells from it
DUPLICATE = 0.05  # root mean squared difference of thumbnails below which two pictures look alike


def hsv_saturation(images: np.ndarray) -> np.ndarray:
    """Mean HSV saturation (n,), in [0, 1]: (max - min) / max of the channels, 0 on black.

    The reward `saturation` is another measure, max - min, in which dark pixels count for little.
    """
    top, bottom = images.max(1), images.min(1)
    return np.divide(top - bottom, top, out=np.zeros_like(top), where=top > 0).mean((1, 2))


def contrast(images: np.ndarray) -> np.ndarray:
    """Root mean squared contrast (n,): the standard deviation of luma, in [0, 0.5]."""
    return _luma(images).std((1, 2))


def edge_density(images: np.ndarray) -> np.ndarray:
    """Share of pixels (n,) where luma changes by more than 0.1 a pixel (Sobel). Falls where backgrounds vanish."""
    luma = _luma(images)
    down, right = (correlate1d(correlate1d(luma, [-1, 0, 1], axis=a), [1, 2, 1], axis=3 - a) for a in (1, 2))
    return (np.hypot(down, right) / 8 > EDGE_SLOPE).mean((1, 2))  # a slope of 1 a pixel gives Sobel 8


def colour_entropy(images: np.ndarray) -> np.ndarray:
    """Entropy in bits (n,) of a picture's colours in 8 x 8 x 8 bins, in [0, 9]."""
    bins = np.minimum((images * LEVELS).astype(int), LEVELS - 1)
    codes = (bins[:, 0] * LEVELS + bins[:, 1]) * LEVELS + bins[:, 2]
    return np.array([entropy(np.bincount(code.ravel(), minlength=LEVELS**3), base=2) for code in codes])


def high_frequency_energy(images: np.ndarray) -> np.ndarray:
    """Share of luma's variance (n,) above half the Nyquist frequency, in [0, 1]. Rises with grids and noise.

    0 for a picture of one grey.
    """
    luma = _luma(images)
    power = np.abs(np.fft.fft2(luma - luma.mean((1, 2), keepdims=True))) ** 2
    frequency = np.hypot(np.fft.fftfreq(luma.shape[1])[:, None], np.fft.fftfreq(luma.shape[2])[None])
    total = power.sum((1, 2))
    return np.divide(power[:, frequency > 0.25].sum(1), total, out=np.zeros_like(total), where=total > 1e-9)


def clipped(images: np.ndarray) -> np.ndarray:
    """Share of channel values (n,) that are as low or as high as they can be, in [0, 1]. Rises with burnt colours."""
    return ((images < CLIPPED) | (images > 1 - CLIPPED)).mean((1, 2, 3))


def near_duplicates(small: np.ndarray, groups: np.ndarray, threshold: float = DUPLICATE) -> np.ndarray:
    """Whether a picture looks like one of another prompt, (n,) 0 or 1: mode collapse over prompts.

    Args:
        small: (n, t) thumbnails, from `metrics.thumbnails.thumbnail`.
        groups: (n,) the number of each picture's prompt.
        threshold: root mean squared difference below which two look alike.
    """
    similar = np.zeros(len(small))
    square = (small**2).sum(1)
    for i in range(len(small)):  # row by row: n x n distances of thousands of pictures would not fit
        distance = (square + square[i] - 2 * small @ small[i]).clip(min=0) / small.shape[1]
        similar[i] = (distance[groups != groups[i]] < threshold**2).any()
    return similar


def _luma(images: np.ndarray) -> np.ndarray:
    return np.einsum("nchw,c->nhw", images, REC709_LUMA)


SIGNS = {
    "saturation": hsv_saturation,
    "contrast": contrast,
    "edge_density": edge_density,
    "colour_entropy": colour_entropy,
    "high_frequency_energy": high_frequency_energy,
    "clipped": clipped,
}
