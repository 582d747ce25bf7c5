"""The loss of a batch and its gradient in two stages, so that memory peaks at the larger of the two, not at their sum.

    rollout    without gradient, in large batches, LoRA folded      -> x_K (and x of every step, where steps recompute)
    stage one  decoder, reward and their backward, a few images at a time   -> d loss / d x_0, then all of it is freed
    stage two  the gradient steps receive it, with the KL penalty, which hangs on them alone

Stage two either keeps the graph of the K steps over stage one (`tail`, and one backward), or runs step after step again
from the x that the rollout passed through, from the last to the first, each with a backward of its own: then memory
does not grow with K. Either way the gradient is that of one backward through everything (float64: 1e-9).

DRaFT-LV (Clark et al. 2024, arXiv 2309.17400) draws n more samples of the last step from one rollout: x_0 is detached,
noised again to the last level, x_0 + sigma eps, and denoised once. The loss is the mean over all 1 + n samples (the
paper's listing sums them, which rescales reward and penalty alike).

Shape legend: B images, K gradient steps, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftcli.config import Config
from draftcli.core.batch import ImageNoise, derived_seed
from draftcli.core.denoise import euler_step
from draftcli.core.models.sdxl import Conditioning
from draftcli.core.penalty import kl_penalty

if TYPE_CHECKING:
    from draftcli.core.batch import Batch
    from draftcli.core.draftp import SDXLDRaFTPModel


_Scored = tuple[Tensor, Tensor | None]  # mean reward and KL of a micro-batch


@dataclass(frozen=True)
class Path:
    """What a rollout leaves for the two stages. Nothing here has a graph.

    Attributes:
        batch: B pictures.
        cond: what the UNet is told of them.
        noise: goes on where the rollout's churn ended.
        first: the first gradient step.
        x: (B, C, H, W) at each gradient step, after churn; where the graph is kept, x_K before churn alone.
        x_0: (B, C, H, W) at the end, where steps recompute.
    """

    batch: Batch
    cond: Conditioning
    noise: ImageNoise
    first: int
    x: list[Tensor]
    x_0: Tensor | None

    def split(self, count: int) -> Iterator[Path]:
        """Parts of at most `count` pictures."""
        for part, i in zip(self.batch.split(count), range(0, len(self.batch), count), strict=True):
            cut = slice(i, i + count)
            x_0 = None if self.x_0 is None else self.x_0[cut]
            yield replace(
                self, batch=part, cond=self.cond[cut], noise=self.noise[cut], x=[x[cut] for x in self.x], x_0=x_0
            )


def loss_and_gradient(model: SDXLDRaFTPModel, batch: Batch) -> dict[str, Any]:
    """Add the gradient of the batch's mean loss to the weights' `.grad`, times `grad_scaler`'s scale under fp16.

    Returns:
        "loss", "reward" and "kl_penalty" (None where it was not measured), means over the batch; with DRaFT-LV over
        all of its samples.
    """
    draftp, micro = model.cfg.draftp, model.cfg.trainer.micro_batch_size
    groups = [(group, model.encode(group)) for group in batch.split(prefix_batch_size(model.cfg))]
    with model.phase("prefix"), model.without_gradient():
        paths = [path for group, cond in groups for path in _rollouts(model, group, cond)]
    samples = len(batch) * (1 + draftp.low_variance_samples)
    parts = [(part, len(part.batch) / samples) for path in paths for part in path.split(micro)]
    backward = _backward_of_recomputed_steps if recomputes_steps(model.cfg) else _backward_of_kept_steps
    rewards: list[Tensor] = []
    penalties: list[Tensor] = []
    for (_, share), (reward, kl) in zip(parts, backward(model, parts), strict=True):
        rewards.append(share * reward)
        penalties += [] if kl is None else [share * kl]
    reward = float(torch.stack(rewards).sum())
    kl = float(torch.stack(penalties).sum()) if penalties else None
    return {"loss": -reward + draftp.kl_coeff * (kl or 0.0), "reward": reward, "kl_penalty": kl}


def prefix_batch_size(cfg: Config) -> int:
    """Images drawn together where no gradient is needed and no activation is kept: whole micro-batches."""
    micro = cfg.trainer.micro_batch_size
    return max(micro, (cfg.sharding.prefix_batch_size or 8) // micro * micro)


def recomputes_steps(cfg: Config) -> bool:
    """Whether gradient steps run again when their backward comes, rather than keep their graph."""
    draftp, settings = cfg.draftp, cfg.sharding
    asked = settings.recompute_steps
    if asked is None:
        asked = settings.offload or (settings.activation_checkpointing and draftp.truncation_steps > 1)
    return asked or draftp.low_variance_samples > 0


def _rollouts(model: SDXLDRaFTPModel, batch: Batch, cond: Conditioning) -> Iterator[Path]:
    """Without gradient: the path of `batch`, and of its DRaFT-LV samples."""
    noise, first = model._churn_noise(batch), model.first_gradient_step
    x = model.rollout(model.start(model.initial_noise(batch)), cond, noise)
    if not recomputes_steps(model.cfg):
        yield Path(batch, cond, noise, first, [x], None)
        return
    passed, x_0 = model.walk(x, cond, noise, first)
    yield Path(batch, cond, noise, first, passed, x_0)
    last = len(model.schedule) - 1
    for j in range(model.cfg.draftp.low_variance_samples):
        fresh = ImageNoise([derived_seed(seed, "low variance", j) for seed in batch.seeds])(tuple(x_0.shape))
        again = x_0 + float(model.schedule.sigmas[last]) * fresh.to(x_0)
        passed, sample = model.walk(again, cond, noise, last)
        yield Path(batch, cond, noise, last, passed, sample)


def reward_gradient(model: SDXLDRaFTPModel, x_0: Tensor, prompts: list[str], share: float) -> tuple[Tensor, Tensor]:
    """Stage one: the mean reward, and d (-share * mean reward) / d x_0 (B, C, H, W), scaled under fp16."""
    assert model.reward_model is not None, "assign model.reward_model before training"
    count = model.cfg.sharding.decode_batch_size or len(prompts)
    gradients: list[Tensor] = []
    total = torch.zeros((), device=x_0.device, dtype=x_0.dtype)
    for i in range(0, len(prompts), count):
        latents = x_0[i : i + count].detach().requires_grad_()
        with model.phase("decode"):
            image = model.decode(latents)
        with model.phase("reward"):
            reward = model.reward_model(image, prompts[i : i + count]).sum() / len(prompts)
        with model.phase("backward of decoder and reward"):
            model.grad_scaler.scale(-share * reward).backward()
        gradients.append(torch.zeros_like(latents) if latents.grad is None else latents.grad)
        total = total + reward.detach()
    return total, torch.cat(gradients)


def _backward_of_kept_steps(model: SDXLDRaFTPModel, parts: Sequence[tuple[Path, float]]) -> Iterator[_Scored]:
    """Both stages of one micro-batch after the other; the K steps' graph is kept from their one forward pass.

    Args:
        model: whose weights get the gradient.
        parts: micro-batches, and the share of each in the loss.
    """
    for path, share in parts:
        with model.phase("gradient steps"):
            x_0, eps, eps_base = model.tail(path.x[0], path.cond, path.noise, with_base=model.cfg.draftp.needs_base)
        reward, gradient = reward_gradient(model, x_0, list(path.batch.prompts), share)
        with model.phase("backward of gradient steps"):
            surrogate, kl = (gradient * x_0).sum(), None
            if eps_base is not None:
                kl = kl_penalty(eps, eps_base)
                surrogate = surrogate + _penalty(model, kl, share)
            surrogate.backward()
        yield reward, None if kl is None else kl.detach()


def _backward_of_recomputed_steps(model: SDXLDRaFTPModel, parts: Sequence[tuple[Path, float]]) -> Iterator[_Scored]:
    """Stage one of all micro-batches, then stage two of all: decoder and rewards are asked for once."""
    judged: list[tuple[Tensor, Tensor]] = []
    for path, share in parts:
        assert path.x_0 is not None
        judged.append(reward_gradient(model, path.x_0, list(path.batch.prompts), share))
    for (path, share), (reward, gradient) in zip(parts, judged, strict=True):
        yield reward, _backward_step_by_step(model, path, share, gradient)


def _backward_step_by_step(model: SDXLDRaFTPModel, path: Path, share: float, gradient: Tensor) -> Tensor | None:
    """Stage two of one micro-batch from the gradient at x_0: each step again, from the last to the first. Its KL."""
    tuned, base = model.denoiser(path.cond), model.base_denoiser(path.cond)
    penalties: list[Tensor] = []
    for k in reversed(range(len(path.x))):
        level = model.schedule.level(path.first + k, model.cfg.sampling.s_churn)
        x = path.x[k].detach().requires_grad_(k > 0)
        with model.phase("gradient steps"):
            eps = tuned(x, level)
            surrogate = (gradient * euler_step(x, eps, level)).sum()
        if model.cfg.draftp.needs_base:
            kl = kl_penalty(eps, base(x, level)) / len(path.x)
            surrogate = surrogate + _penalty(model, kl, share)
            penalties.append(kl.detach())
        with model.phase("backward of gradient steps"):
            surrogate.backward()
        if k:
            assert x.grad is not None
            gradient = x.grad
    return torch.stack(penalties).sum() if penalties else None


def _penalty(model: SDXLDRaFTPModel, kl: Tensor, share: float) -> Tensor:
    return model.grad_scaler.scale(share * model.cfg.draftp.kl_coeff * kl)
