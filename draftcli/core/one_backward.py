"""The same objective by one backward through everything: what NeMo-Aligner's pair of functions is, on the same pieces.

It is the plain way: simple, and with the memory of decoder, reward and gradient steps together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from draftcli.core.backward import KeptGraph, Piece
from draftcli.core.batch import Batch
from draftcli.core.networks import Networks, RewardFunction, scored
from draftcli.core.penalty import Penalty, objective
from draftcli.errors import InputError

# "loss", "reward" and "kl_penalty" (None where it was not measured), and in validation "images_and_captions"
Metrics = dict[str, Any]
LossFunction = Callable[[Tensor], tuple[Tensor, Metrics]]


def as_metrics(loss: Tensor, reward: Tensor, kl: Tensor | None) -> Metrics:
    """Scalars as numbers."""
    return {"loss": loss.item(), "reward": reward.item(), "kl_penalty": None if kl is None else kl.item()}


def images_and_loss(
    nets: Networks, reward: RewardFunction, penalty: Penalty, pieces: Sequence[Piece], validation: bool
) -> tuple[Tensor, LossFunction]:
    """The images of all pieces (B, 3, H, W) in [0, 1], and their loss as a function of them.

    Args:
        nets: tuned and base.
        reward: r(images, prompts).
        penalty: to the base.
        pieces: of one batch.
        validation: without gradient; the base is asked in any case, and images and captions are among the metrics.

    Raises:
        InputError: the loss of a piece is a regression that needs the reward's gradient beforehand.
    """
    if any(piece.regression is not None for piece in pieces):
        raise InputError("draftp.gradient: this mode has no gradient by one backward; set sharding.two_stage=true")
    with torch.set_grad_enabled(not validation):
        forwards = [KeptGraph().forward(nets, piece, validation or penalty.is_measured) for piece in pieces]
        images = nets.decode(torch.cat([forward.x_0 for forward in forwards]))
    captions = [prompt for piece in pieces for prompt in piece.prompts]

    def loss_func(images: Tensor) -> tuple[Tensor, Metrics]:
        scores = scored(reward, images, captions)
        weights, r = None if validation else penalty.weigh(images, captions, scores), scores.mean()
        each = [None] * len(pieces) if weights is None else weights.split([len(piece) for piece in pieces])
        penalties = [
            penalty(forward.eps, forward.eps_base, piece.levels, some) * (len(piece) / len(captions))
            for forward, piece, some in zip(forwards, pieces, each, strict=True)
            if forward.eps is not None and forward.eps_base is not None
        ]
        kl = torch.stack(penalties).sum() if penalties else None
        loss = objective(r, kl, penalty.beta)
        metrics = as_metrics(loss, r, kl)
        if validation:
            metrics["images_and_captions"] = (images.detach(), captions)
        return loss, metrics

    return images, loss_func


def one_backward(
    parts: Sequence[tuple[Batch, Callable[[], tuple[Tensor, LossFunction]]]],
    scale: Callable[[Tensor], Tensor] | None,
) -> tuple[float, Metrics]:
    """Loss and metrics of a batch, averaged over its images.

    Args:
        parts: micro-batches, and a function for each that gives images and loss.
        scale: of the loss, under fp16, for the backward of each part; None: no backward.
    """
    count = sum(len(part) for part, _ in parts)
    total: Metrics = {}
    pictures: list[tuple[Tensor, list[str]]] = []
    for part, forward in parts:
        share = len(part) / count
        with torch.set_grad_enabled(scale is not None):
            images, loss_func = forward()
            loss, metrics = loss_func(images)
        if scale is not None:
            scale(loss * share).backward()
        if "images_and_captions" in metrics:
            pictures.append(metrics.pop("images_and_captions"))
        for name, value in metrics.items():
            total[name] = None if value is None else total.get(name, 0.0) + share * value
    if pictures:
        shown, captions = zip(*pictures, strict=True)
        total["images_and_captions"] = (torch.cat(shown), [text for texts in captions for text in texts])
    return total["loss"], total
