"""DRaFT+ for Stable Diffusion. The file to read first.

What each method adds:

1. DRaFT (Clark et al., ICLR 2024): unroll the sampler, x_T ~ N(0, I), and ascend the gradient of reward(x_0).
2. DRaFT-K: only the last K of N sampler steps carry gradient (core/gradient/last_k.py).
3. DRaFT+ (NVIDIA NeMo-Aligner): a penalty to the frozen base keeps the network from hacking the reward:

       loss = -mean_b reward(x_0, prompt)  +  beta * mean_k mean (eps_tuned - eps_base)^2

   over the last K steps, both estimates guided, at the same x, gradient through the tuned one only.
4. AIG (Jena et al., WACV 2025): sample with w eps_tuned + (1 - w) eps_base, w rising from noise to image
   (core/annealing.py).

`training_step` is the algorithm. What it stands on: denoise.py (the one loop), gradient/ (which steps carry gradient),
backward.py (their gradient in two stages), penalty.py (the loss). SDXLDRaFTPModel and SDDRaFTPModel keep the public
names of the system they descend from (NeMo-Aligner's MegatronSDXLDRaFTPModel and MegatronSDDRaFTPModel).

Names: `tuned` and `base`, always. Shape legend: B images, K gradient steps, N sampler steps, C latent channels,
H W latent size. Images are float in [0, 1], NCHW, except where `generate` and `annealed_guidance` return [0, 255], the
contract of that system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from draftcli.config import Config, conflicts
from draftcli.core.annealing import annealed_denoiser, step_weights
from draftcli.core.backward import KeptGraph, Piece, Work, reward_slope
from draftcli.core.batch import Batch, derived_seed
from draftcli.core.denoise import Sampler
from draftcli.core.engine.networks import PlacedNetworks, Watch
from draftcli.core.gradient.last_k import LastK
from draftcli.core.gradient.mode import GradientMode, check_sampler, make_mode, named_mode
from draftcli.core.lora.files import Lora
from draftcli.core.models.family import Conditioning, Parts
from draftcli.core.models.recognition import family_of
from draftcli.core.models.size_keys import size_keys
from draftcli.core.networks import Networks, RewardFunction
from draftcli.core.one_backward import LossFunction, Metrics, as_metrics, images_and_loss, one_backward
from draftcli.core.penalty import Penalty, make_penalty, objective
from draftcli.core.phase import Phase
from draftcli.core.prefix import training_sampler
from draftcli.core.rollout import Rollout, churn_noise
from draftcli.core.weighings import Weighing, linear
from draftcli.errors import InputError

# objective(data_iterator, model) -> images (B, 3, H, W), loss_func; loss_func(images) -> scalar loss, metrics
Objective = Callable[[Iterator[Batch | Sequence[str]], Any], tuple[Tensor, LossFunction]]


def training_step(
    nets: Networks,
    reward: RewardFunction,
    mode: GradientMode,
    penalty: Penalty,
    sampler: Sampler,
    batch: Batch | Sequence[Batch],
    work: Work,
) -> StepFigures:
    """One step of DRaFT+: adds d (-mean reward + beta KL) / d weights to the weights' `.grad`.

    Args:
        nets: tuned and base.
        reward: r(images, prompts).
        mode: which steps carry gradient.
        penalty: to the base.
        sampler: the N steps from noise to image; with a prefix fewer before those with gradient.
        batch: B images, of several sizes as several batches; the loss is the mean over them.
        work: in which portions; it does not change the gradient.
    """
    executor, figures = work.executor, StepFigures()
    batches = [batch] if isinstance(batch, Batch) else batch
    parts = [(part, nets.encode(part)) for batch in batches for part in batch.split(work.prefix)]
    with nets.phase(Phase.PREFIX), nets.without_gradient():
        # x_T ~ N(0, I), then x <- x + (sigma' - sigma) eps(x, c), up to the steps to which the mode gives a gradient;
        # on to x_0 as well, where that has to be known before those steps run again
        on = work.recompute or mode.recomputes
        rollouts = (Rollout(nets, sampler, part, cond, None, on, work.lockstep) for part, cond in parts)
        pieces = [piece for rollout in rollouts for piece in mode.pieces(rollout)]
    samples = sum(map(len, pieces))
    for group in executor.groups([small for piece in pieces for small in piece.split(work.micro)]):
        # those steps, the base beside: x_0, eps, eps_base (RecomputedSteps: eps and eps_base in stage two)
        forwards = [executor.forward(nets, piece, penalty.is_measured) for piece in group]
        # stage one: r(x_0, c) and s = d r / d x_0, and each image's weight in the KL; then decoder and reward are freed
        judged = [
            reward_slope(nets, reward, forward.x_0, piece.prompts, len(piece) / samples, work, penalty)
            for forward, piece in zip(forwards, group, strict=True)
        ]
        # stage two: d (-<s, x_0> + beta mean (eps - eps_base)^2) / d weights, the sum by penalty.objective
        for piece, forward, seen in zip(group, forwards, judged, strict=True):
            kl = executor.backward(nets, piece, forward, seen, penalty, work)
            figures.add(seen.share, seen.reward, kl)
    return figures


@dataclass
class StepFigures:
    """Mean reward and penalty of a training step, summed up over its pieces by their share of the loss."""

    rewards: list[Tensor] = field(default_factory=list)
    penalties: list[Tensor] = field(default_factory=list)

    def add(self, share: float, reward: Tensor, kl: Tensor | None) -> None:
        """The means of one piece; `kl` None: the penalty was not measured."""
        self.rewards.append(share * reward)
        self.penalties += [] if kl is None else [share * kl]

    def metrics(self, beta: float) -> Metrics:
        """The loss and its two parts as numbers."""
        reward = torch.stack(self.rewards).sum().cpu()
        kl = torch.stack(self.penalties).sum().cpu() if self.penalties else None
        loss = objective(reward.double(), None if kl is None else kl.double(), beta)
        return as_metrics(loss, reward, kl)


def _last_steps(cfg: Config) -> LastK:
    """The last K steps, whatever the mode; all of them where K is above N, as a mode that does not use K allows."""
    check_sampler(cfg.sampling.sampler)
    return LastK(cfg.sampling.steps, min(cfg.draftp.truncation_steps, cfg.sampling.steps))


class DRaFTPModel:
    """A model being tuned, its frozen base, and the reward it is tuned for.

    Attributes:
        kind: the only family that it takes; None: any.
        networks: tuned and base on this machine.
        sampler: the run's N steps.
        reward_model: assign before training: `reward_model(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`.
        grad_scaler: scales the loss under fp16, else does nothing.

    Args:
        cfg: the settings, from `draftcli.load_config`.
        parts: loaded modules, model.loras merged into them; None loads `cfg.model`.
        loras: for drawing alone: the LoRAs that tuned has, with the scale of each, frozen. May be none.
        loss: an objective of one's own, as `get_forward_output_and_loss_func` returns it, for get_loss_and_metrics.

    Raises:
        InputError: the model cannot be loaded, is of another family, or the settings do not fit it.
    """

    kind: str | None = None

    def __init_subclass__(cls) -> None:
        if "get_forward_output_and_loss_func" in vars(cls):
            raise TypeError(f"{cls.__name__}: training calls no overridden function; pass an objective as loss=")

    def __init__(
        self,
        cfg: Config,
        parts: Parts | None = None,
        loras: Sequence[tuple[Lora, float]] | None = None,
        loss: Objective | None = None,
    ) -> None:
        if loras is None:
            if (problem := next(conflicts(cfg), None)) is not None:
                raise InputError(problem)
            named_mode(cfg)  # one that cannot be is an error before anything is loaded
        family = family_of(cfg.model, fetch=True) if parts is None else parts.family
        if self.kind not in (None, family.name):
            raise InputError(f"{type(self).__name__} is for the family {self.kind}, and this model is {family.title}")
        self.cfg, self.loss = cfg, loss
        self.networks = PlacedNetworks(cfg, parts, loras)
        self.sampler = Sampler.named(cfg.sampling.sampler, self.networks.schedule, cfg.sampling.s_churn)
        self.grad_scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=cfg.model.precision == "fp16")
        self._reward_model: RewardFunction | None = None
        self._images_seen = 0

    # ------------------------------------------------------------------------------------------------ the networks

    parts = property(lambda self: self.networks.parts, doc="The loaded modules.")
    runtime = property(lambda self: self.networks.runtime, doc="Device and dtype.")
    schedule = property(lambda self: self.networks.schedule, doc="The noise levels of the run's N steps.")
    unet = property(lambda self: self.networks.unet, doc="The tuned network; inside `base_weights()` the base.")
    base_unet = property(lambda self: self.networks.base_unet, doc="The frozen copy of full fine-tuning, or None.")
    vae = property(lambda self: self.networks.vae, doc="The decoder.")

    @property
    def trainable_parameters(self) -> list[Tensor]:
        """The weights that are trained."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    @property
    def reward_model(self) -> RewardFunction | None:
        """What the network is tuned for; assigning it moves a reward that is a network to the model's device."""
        return self._reward_model

    @reward_model.setter
    def reward_model(self, reward: RewardFunction | None) -> None:
        self.networks.place_reward(reward)
        self._reward_model = reward

    @cached_property
    def mode(self) -> GradientMode:
        """Which steps carry gradient.

        Raises:
            InputError: the settings name no mode that can be, or a sampler that cannot train.
        """
        return make_mode(self.cfg)

    @cached_property
    def penalty(self) -> Penalty:
        """What holds tuned to base; its coefficient may have a state.

        Raises:
            InputError: the settings name no such penalty.
        """
        return make_penalty(self.cfg.draftp)

    def base_weights(self) -> AbstractContextManager[None]:
        """Inside, `unet` is the frozen base; afterwards everything is as it was, also after an exception."""
        return self.networks.base_weights()

    def watched(self, watch: Watch) -> AbstractContextManager[None]:
        """Inside, `watch(phase)` is a context around each phase of a training step: to measure it, or to leave it."""
        return self.networks.watched(watch)

    def configure_sharded_model(self) -> None:
        """FSDP2 on the UNet (and on the frozen base of full fine-tuning); VAE, text encoders and rewards stay whole.

        Collective, and so is every use of the UNet from here on. Make the optimizer afterwards.

        Raises:
            InputError: no process group is initialised, or sharding.shard_size does not divide the processes.
        """
        self.networks.split()

    # ------------------------------------------------------------------------------------- what goes in, what comes out

    def encode(self, batch: Batch) -> Conditioning:
        """What the UNet gets for [unconditional ; conditional], on its device and in its dtype."""
        return self.networks.encode(batch)

    def as_batch(self, batch: Batch | Sequence[str], training: bool = False) -> Batch:
        """A plain list of prompts becomes a batch of the run's size; in training its seeds are new each time."""
        if isinstance(batch, Batch):
            return batch
        seen, count = self._images_seen, len(batch)
        self._images_seen += count if training else 0
        seeds = [derived_seed(self.cfg.trainer.seed, "list", seen + i) for i in range(count)]
        return Batch(list(batch), seeds, self._size)

    def initial_noise(self, batch: Batch) -> Tensor:
        """x_T (B, C, H, W) unit normal, float32 on the CPU, from the batch's seeds."""
        return self.networks.noise(batch)

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, 8 H, 8 W) in [0, 1], differentiable; see `PlacedNetworks.decode`."""
        return self.networks.decode(x_0)

    # ------------------------------------------------------------------------------------------------ whole pictures

    def generate(self, batch: Batch | Sequence[str], x_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw pictures, differentiable through the last K steps, whatever `draftp.gradient` is.

        Args: see `annealed_guidance`.

        Returns:
            image (B, 3, 8 H, 8 W) in [0, 255]; guided eps (K, B, C, H, W) of the tuned network; of the base.
        """
        (piece,) = self._pieces(_last_steps(self.cfg), self._sized(batch, x_T), x_T)
        forward = KeptGraph().forward(self.networks, piece, with_base=True)
        assert forward.eps is not None
        assert forward.eps_base is not None
        return self.decode(forward.x_0) * 255, forward.eps.guided, forward.eps_base.guided

    @torch.no_grad()
    def annealed_guidance(
        self, batch: Batch | Sequence[str], x_T: Tensor, weighing_fn: Weighing | None = None, stochastic: bool = False
    ) -> Tensor:
        """Draw pictures with AIG.

        Args:
            batch: B prompts.
            x_T: (B, C, H, W) unit normal noise.
            weighing_fn: (sigma_i, sigma_next, i, total) -> weight of the tuned network in [0, 1]; None is i / total.
            stochastic: ask one network a step, tuned with the weight as probability, instead of mixing both. A
                picture's draws depend on its seed alone.

        Returns:
            (B, 3, 8 H, 8 W) in [0, 255].

        Raises:
            InputError: weighing_fn gave a weight outside [0, 1].
        """
        return self.annealed_images(batch, x_T, weighing_fn, stochastic) * 255

    @torch.no_grad()
    def annealed_images(
        self, batch: Batch | Sequence[str], x_T: Tensor, weighing_fn: Weighing | None = None, stochastic: bool = False
    ) -> Tensor:
        """What `annealed_guidance` draws, (B, 3, 8 H, 8 W) in [0, 1]: the form that everything here works with."""
        batch, nets = self._sized(batch, x_T), self.networks
        cond = nets.encode(batch)
        weights, seeds = step_weights(weighing_fn or linear, self.schedule), batch.seeds if stochastic else None
        network = annealed_denoiser(nets.tuned, nets.base, (cond, nets.encode_base(batch, cond)), weights, seeds)
        with nets.drawing(tuned_alone=all(weight == 1 for weight in weights)):
            x_0 = self.sampler.walk(network, nets.at_first_level(x_T), churn_noise(batch))
        return torch.cat([self.decode(x) for x in x_0.split(Work.of(self.cfg).decode if nets.trains else len(x_0))])

    # -------------------------------------------------------------------------------------------------- the objective

    def get_forward_output_and_loss_func(self, validation_step: bool = False) -> Objective:
        """The forward pass as a function of a data iterator, and the loss as a function of its images.

        Returns:
            f(data_iterator, model) -> image (B, 3, 8 H, 8 W) in [0, 1], loss_func; loss_func(image) -> scalar loss,
            metrics "loss", "reward" and "kl_penalty" (None: not measured), in validation also "images_and_captions".
            In training the images are those of all the mode's pieces; in validation with the last K steps' penalty.
        """

        def forward(data_iterator: Iterator[Batch | Sequence[str]], model: DRaFTPModel) -> tuple[Tensor, LossFunction]:
            batch = model.as_batch(next(data_iterator), training=not validation_step)
            mode = _last_steps(model.cfg) if validation_step else model.mode
            pieces = model._pieces(mode, batch, model.initial_noise(batch), training=not validation_step)
            return images_and_loss(model.networks, model._reward(), model.penalty, pieces, validation_step)

        return forward

    def get_loss_and_metrics(
        self, batch: Batch | Sequence[str] | Sequence[Batch], forward_only: bool = False
    ) -> tuple[float, Metrics]:
        """The loss of a batch in micro-batches, and unless `forward_only` its gradient, added to the weights' `.grad`.

        Pictures of several sizes are several batches. The gradient is that of the mean over all of them, times
        `grad_scaler`'s scale under fp16. It comes from `training_step`; with `sharding.two_stage` false, or a `loss` of
        one's own, from one backward per micro-batch through what `get_forward_output_and_loss_func` returns.

        Returns:
            loss; metrics averaged over the images ("images_and_captions": images (B, 3, H, W) in [0, 1] and prompts).
        """
        given = [batch] if isinstance(batch, Batch) else batch
        batches = [part for part in given if isinstance(part, Batch)]
        batches = batches or [self.as_batch([text for text in given if isinstance(text, str)], not forward_only)]
        if self.loss is None and self.cfg.sharding.two_stage and not forward_only:
            work = Work.of(self.cfg, self.mode, self.grad_scaler.scale)
            sampler = training_sampler(self.cfg, self.mode.first, self.sampler)
            step = self.networks, self._reward(), self.mode, self.penalty, sampler, batches, work
            metrics = training_step(*step).metrics(self.penalty.beta)
            return metrics["loss"], metrics
        forward = self.loss or self.get_forward_output_and_loss_func(validation_step=forward_only)
        small = [part for batch in batches for part in batch.split(self.cfg.trainer.micro_batch_size)]
        parts = [(part, partial(forward, iter([part]), self)) for part in small]
        return one_backward(parts, None if forward_only else self.grad_scaler.scale)

    # -------------------------------------------------------------------------------------------------------- private

    @property
    def _size(self) -> tuple[int, int]:
        return self.cfg.sampling.height, self.cfg.sampling.width

    def _reward(self) -> RewardFunction:
        if self._reward_model is None:
            raise InputError("there is no reward to train on: assign model.reward_model first")
        return self._reward_model

    @torch.no_grad()
    def _pieces(self, mode: GradientMode, batch: Batch, x_T: Tensor, training: bool = False) -> list[Piece]:
        """What carries gradient of the pictures that start from unit noise x_T (B, C, H, W)."""
        sampler = training_sampler(self.cfg, mode.first, self.sampler) if training else self.sampler
        start = None if training and batch.walked is not None else self.networks.at_first_level(x_T)
        cond = self.networks.encode(batch)
        return list(mode.pieces(Rollout(self.networks, sampler, batch, cond, start, mode.recomputes)))

    def _sized(self, batch: Batch | Sequence[str], x_T: Tensor) -> Batch:
        """The batch, of the size that the noise has."""
        factor = self.networks.factor
        return replace(self.as_batch(batch), size=(x_T.shape[-2] * factor, x_T.shape[-1] * factor))


class SDXLDRaFTPModel(DRaFTPModel):
    """The model where it is an SDXL."""

    kind = "sdxl"

    def append_sdxl_size_keys(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Size conditioning for pictures of `size` (height, width), default the run's; each key (B, 2) int64."""
        return size_keys(len(prompts), *(size or self._size))


class SDDRaFTPModel(DRaFTPModel):
    """The model where it is a Stable Diffusion 1.x or 2.x."""

    kind = "sd1"
