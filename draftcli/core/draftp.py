"""DRaFT+ for Stable Diffusion XL. The file to read first.

What each method adds:

1. DRaFT (Clark et al., ICLR 2024): unroll the sampler, x_T ~ N(0, I), and ascend the gradient of reward(x_0).
2. DRaFT-K: only the last K of N sampler steps carry gradient (core/gradient/mode.py).
3. DRaFT+ (NVIDIA NeMo-Aligner): a penalty to the frozen base keeps the network from hacking the reward:

       loss = -mean_b reward(x_0, prompt)  +  kl_coeff * mean_k mean (eps_tuned - eps_base)^2

   over the last K steps, both estimates guided, at the same x, gradient through the tuned one only.
4. AIG (Jena et al., WACV 2025): sample with w eps_tuned + (1 - w) eps_base, w rising from noise to image
   (core/guidance.py).

A training step is three pieces, each of which can be batched or recomputed by itself: `rollout` (N - K steps without
gradient) -> x_K; `tail` (the last K steps, tuned and base) -> x_0 and two eps stacks; `decode` and reward -> scores.
core/backward.py puts them together so that a training step is fast and fits.

Names: `tuned` and `base`, always. Shape legend: B images, K gradient steps, N sampler steps, C latent channels,
H W latent size. Images are float in [0, 1], NCHW, except where `generate` and `annealed_guidance` return [0, 255], the
contract of the system whose public names they keep (NeMo-Aligner's MegatronSDXLDRaFTPModel).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.config import Config, DraftpConfig, ShardingConfig
from draftcli.core.annealing import (
    Weighing,
    drawn,
    linear,
    mixed,
    step_weights,
)
from draftcli.core.backward import loss_and_gradient
from draftcli.core.batch import Batch, ImageNoise, derived_seed
from draftcli.core.denoise import SOLVERS, Predict, denoise
from draftcli.core.engine import sharding
from draftcli.core.engine.eight_bit import quantize_blocks
from draftcli.core.engine.folding import folded
from draftcli.core.engine.prompt_cache import PromptCache
from draftcli.core.engine.residency import JUDGES, UNET, Residency
from draftcli.core.engine.runtime import choose_runtime
from draftcli.core.gradient.mode import check_sampler, first_gradient_step
from draftcli.core.guidance import guided, network_input, to_noise_estimate
from draftcli.core.lora import adapters
from draftcli.core.lora.files import Lora, attach_loras
from draftcli.core.models.sdxl import (
    Conditioning,
    Parts,
    decode,
    load_parts,
    predict,
)
from draftcli.core.models.size_keys import size_keys, time_ids
from draftcli.core.penalty import kl_penalty
from draftcli.core.schedule import Level, Schedule, make_schedule
from draftcli.errors import InputError

Metrics = dict[str, Any]
NOT_FOLDED = "sharding.fold_lora has no effect: rounding would take more than sharding.fold_tolerance of the LoRA"


class SDXLDRaFTPModel:
    """An SDXL being tuned, its frozen base, and the reward it is tuned for.

    Attributes:
        unet: the trained network (LoRA on it, or all of it); inside `base_weights()` it is the base.
        vae: the decoder.
        reward_model: assign before training: `reward_model(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`.
        schedule: noise levels of the run's N steps.
        grad_scaler: scales the loss under fp16, else does nothing; the trainer steps through it.
        phase: phase(name) is a context around each phase of a training step: a label in torch's profiler, until
            someone assigns a stop-watch.

    Args:
        cfg: the settings, from `draftcli.load_config`.
        parts: loaded modules; None loads `cfg.model`.
        loras: what is tuned instead of a new LoRA to train: LoRAs with the scale of each, frozen. May be none. The
            model is for drawing then, and settings of training (draftp, sharding, model.quantize) do not count.

    Raises:
        InputError: the model cannot be loaded, or the settings do not fit it.
    """

    def __init__(
        self, cfg: Config, parts: Parts | None = None, loras: Sequence[tuple[Lora, float]] | None = None
    ) -> None:
        self.cfg = cfg = cfg if loras is None else _for_drawing(cfg)
        self.runtime = choose_runtime(cfg.model.device, cfg.model.precision)
        in_full = cfg.peft.peft_scheme == "none"
        split = sharding.splits_weights(cfg.sharding)
        self._rank0_loads = split and parts is None  # process 0 for all
        hollow = self._rank0_loads and not sharding.is_source()
        self.parts = parts or load_parts(cfg.model, trained_in_full=in_full, hollow_unet=hollow)
        device = self.runtime.device
        offload = cfg.sharding.offload
        self.vae = self.parts.vae if offload else self.parts.vae.to(device)
        # A network that will be split stays on the CPU until then: no device need ever hold all of it.
        self.unet = self.parts.unet if offload or split else self.parts.unet.to(device)
        copied = sharding.hollow if self._rank0_loads else copy.deepcopy
        self.base_unet = copied(self.unet).eval() if in_full else None
        if in_full:
            self.unet.requires_grad_(True)
        elif loras is None:
            peft = cfg.peft
            adapters.attach_lora(self.unet, peft.rank, peft.alpha, peft.target_modules, seed=cfg.trainer.seed)
        for name, network in self.parts.modules.items() if loras else ():
            attach_loras(network, loras or (), part=name)
        if cfg.model.quantize:
            quantize_blocks(self.unet)
        sharding.speed_up(cfg.sharding, self.runtime, self.unet, self.base_unet, self.vae)
        self._residency = Residency(device)
        if offload:
            self._residency.add(UNET, filter(None, [self.unet, self.base_unet]))
            self._residency.add(JUDGES, [self.vae])
        self._encoded = PromptCache(
            self.parts,
            device,
            offload=cfg.model.offload_text_encoders,
            folder=None if cfg.sharding.prompt_cache is None else Path(cfg.sharding.prompt_cache),
        )
        self.schedule = self._schedule()
        self.first_gradient_step = first_gradient_step(cfg.sampling.steps, cfg.draftp.truncation_steps)
        self._reward_model: Any = None
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=cfg.model.precision == "fp16")
        self.phase: Callable[[str], AbstractContextManager[Any]] = torch.profiler.record_function
        self._images_seen = 0

    # ------------------------------------------------------------------------------------------------ the networks

    @property
    def trainable_parameters(self) -> list[Tensor]:
        """The weights that are trained."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    @property
    def reward_model(self) -> Callable[[Tensor, list[str]], Tensor] | None:
        """What the network is tuned for; assigning it moves a reward that is a network to the model's device."""
        return self._reward_model

    @reward_model.setter
    def reward_model(self, reward: Callable[[Tensor, list[str]], Tensor]) -> None:
        if self.cfg.sharding.offload:
            judges = getattr(reward, "rewards", {"": reward}).values()
            self._residency.add(JUDGES, (judge for judge in judges if isinstance(judge, nn.Module)))
        elif hasattr(reward, "to"):
            reward.to(self.runtime.device)  # type: ignore[attr-defined]
        self._reward_model = reward

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """Inside, `self.unet` is the frozen base: adapters off, or the frozen copy of full fine-tuning.

        Whatever state adapters were in comes back afterwards, also after an exception.
        """
        if self.base_unet is None:
            with adapters.adapters_off(self.unet):
                yield
            return
        tuned, self.unet = self.unet, self.base_unet
        try:
            yield
        finally:
            self.unet = tuned

    def configure_sharded_model(self) -> None:
        """FSDP2 on the UNet (and on the frozen base of full fine-tuning); VAE, text encoders and rewards stay whole.

        Collective, and so is every use of the UNet from here on. Make the optimizer afterwards. No process but 0 ever
        holds a whole network, and that one but one: the others get their parts from it, and the base's are copies of
        the tuned one's.

        Raises:
            InputError: no process group is initialised, or sharding.shard_size does not divide the processes.
        """
        device = self.runtime.device
        mesh = sharding.make_mesh(self.cfg.sharding, device)
        weights = {name: t.detach() for name, t in (*self.unet.named_parameters(), *self.unet.named_buffers())}
        for unet in filter(None, [self.unet, self.base_unet]):
            sharding.shard(unet, mesh, self.runtime.dtype)
        if self._rank0_loads:
            sharding.hand_out(weights, self.unet, device)
            if self.base_unet is not None:
                sharding.copy_parts(self.unet, self.base_unet, device)

    @contextmanager
    def without_gradient(self) -> Iterator[None]:
        """Inside, the tuned network is as quick as it can be without gradient: its LoRA folded (engine/folding.py)."""
        settings = self.cfg.sharding
        with torch.no_grad():
            if self.base_unet is not None or not settings.fold_lora:
                yield
                return
            self._residency.need(UNET)
            with folded(self.unet, settings.fold_tolerance) as done:
                if not done and "fold_lora" in settings.model_fields_set:
                    warnings.warn(NOT_FOLDED, stacklevel=1)
                yield

    # ------------------------------------------------------------------------------------------------ conditioning

    def append_sdxl_size_keys(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Size conditioning for pictures of `size` (height, width), default the run's; each key (B, 2) int64."""
        return size_keys(len(prompts), *(size or (self.cfg.sampling.height, self.cfg.sampling.width)))

    @torch.no_grad()
    def encode(self, batch: Batch) -> Conditioning:
        """What the UNet is told for [unconditional ; conditional], on its device and in its dtype."""
        device = self.runtime.device
        with self.phase("text"):
            sequence, pooled = self._encoded(batch.prompts)
        negatives = [self.cfg.sampling.negative_prompt if n is None else n for n in batch.negatives]
        absent = torch.tensor([n is None and self.parts.zeros_for_empty for n in negatives], device=device)
        if absent.all():
            uncond, uncond_pooled = torch.zeros_like(sequence), torch.zeros_like(pooled)
        else:
            uncond, uncond_pooled = self._encoded([n or "" for n in negatives])
            uncond = uncond.masked_fill(absent[:, None, None], 0)
            uncond_pooled = uncond_pooled.masked_fill(absent[:, None], 0)
        ids = time_ids(self.append_sdxl_size_keys(batch.prompts, batch.size))
        cond = Conditioning(torch.cat([uncond, sequence]), torch.cat([uncond_pooled, pooled]), torch.cat([ids, ids]))
        return cond.to(device, self.runtime.dtype)

    def as_batch(self, batch: Batch | Sequence[str], training: bool = False) -> Batch:
        """A plain list of prompts becomes a batch of the run's size; in training its seeds are new each time."""
        if isinstance(batch, Batch):
            return batch
        seen, count = self._images_seen, len(batch)
        if training:
            self._images_seen += count
        seeds = [derived_seed(self.cfg.trainer.seed, "list", seen + i) for i in range(count)]
        size = (self.cfg.sampling.height, self.cfg.sampling.width)
        return Batch(list(batch), seeds, size, [None] * count)

    def initial_noise(self, batch: Batch) -> Tensor:
        """x_T (B, C, H, W) unit normal, float32 on the CPU, from the batch's seeds."""
        height, width = batch.size
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        channels = self.unet.config.in_channels
        return ImageNoise(batch.seeds)((len(batch), channels, height // factor, width // factor))

    # ------------------------------------------------------------------------------- the three pieces of a trajectory

    def start(self, x_T: Tensor) -> Tensor:
        """Unit noise (B, C, H, W) -> latents at the first level, on the device. x_T is left as it is."""
        return x_T.to(self.runtime.device, self.runtime.latent_dtype) * self.schedule.init_scale

    def denoiser(self, cond: Conditioning) -> Predict:
        """The guided noise estimate of what `self.unet` is when called: tuned, or base in `base_weights()`."""
        sampling, alone = self.cfg.sampling, cond.conditional

        def predict_guided(x: Tensor, level: Level) -> Tensor:
            self._residency.need(UNET)
            with self.runtime.autocast():
                if sampling.is_guided(level.index):
                    doubled = network_input(torch.cat([x, x]), level)
                    output = guided(predict(self.unet, doubled, level.timestep, cond), sampling.scale)
                else:
                    output = predict(self.unet, network_input(x, level), level.timestep, alone)
            return to_noise_estimate(output, x, level, self.parts.prediction)

        return predict_guided

    def base_denoiser(self, cond: Conditioning) -> Predict:
        """The base's guided noise estimate; never carries gradient."""
        tuned = self.denoiser(cond)

        @torch.no_grad()
        def predict_base(x: Tensor, level: Level) -> Tensor:
            with self.phase("base pass"), self.base_weights():
                return tuned(x, level)

        return predict_base

    @torch.no_grad()
    def rollout(self, x: Tensor, cond: Conditioning, churn_noise: ImageNoise | None = None) -> Tensor:
        """The first N - K steps, tuned, without gradient: latents (B, C, H, W) at the start -> x_K."""
        return self._denoise(self.denoiser(cond), x, churn_noise, stop=self.first_gradient_step)

    def walk(self, x: Tensor, cond: Conditioning, churn_noise: ImageNoise, start: int) -> tuple[list[Tensor], Tensor]:
        """The steps from `start` to the image, tuned, without gradient.

        Args:
            x: (B, C, H, W) latents at level `start`.
            cond: from `encode`.
            churn_noise: continues that of `rollout`.
            start: first step to take.

        Returns:
            the latents (B, C, H, W) that the network was asked at in each step; x_0 (B, C, H, W).
        """
        tuned, asked = self.denoiser(cond), []

        @torch.no_grad()
        def predict_here(x: Tensor, level: Level) -> Tensor:
            asked.append(x)
            return tuned(x, level)

        return asked, self._denoise(predict_here, x, churn_noise, start=start)

    def tail(
        self, x: Tensor, cond: Conditioning, churn_noise: ImageNoise | None = None, with_base: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The last K steps, with gradient through x and the tuned network.

        Args:
            x: (B, C, H, W) latents x_K.
            cond: from `encode`.
            churn_noise: continues that of `rollout`.
            with_base: also ask the base, at the same x, without gradient. Its estimate does not steer x.

        Returns:
            x_0 (B, C, H, W); eps of the tuned network (K, B, C, H, W); of the base, or None.
        """
        tuned, base = self.denoiser(cond), self.base_denoiser(cond)
        check_sampler(self.cfg.sampling.sampler)
        eps_tuned: list[Tensor] = []
        eps_base: list[Tensor] = []

        def predict_both(x: Tensor, level: Level) -> Tensor:
            eps_tuned.append(tuned(x, level))
            if with_base:
                eps_base.append(base(x, level))
            return eps_tuned[-1]

        x = self._denoise(predict_both, x, churn_noise, start=self.first_gradient_step)
        return x, torch.stack(eps_tuned), torch.stack(eps_base) if with_base else None

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, 8 H, 8 W) in [0, 1], differentiable.

        Raises:
            InputError: `x_0` has a graph through the UNet, whose weights `sharding.offload` takes away here.
        """
        if self.cfg.sharding.offload and x_0.grad_fn is not None:
            raise InputError(
                "sharding.offload takes the UNet's weights away before a backward through decoder and UNet at once: "
                "leave it out, or take the gradient by get_loss_and_metrics"
            )
        self._residency.need(JUDGES)
        return decode(self.vae, x_0, self.cfg.model.vae_tile)

    # ------------------------------------------------------------------------------------------------ whole pictures

    def generate(self, batch: Batch | Sequence[str], x_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw pictures, differentiable through the last K steps.

        Args:
            batch: B prompts.
            x_T: (B, C, H, W) unit normal noise.

        Returns:
            image (B, 3, 8 H, 8 W) in [0, 255]; guided eps (K, B, C, H, W) of the tuned network; of the base.
        """
        batch = self._sized(batch, x_T)
        cond, churn_noise = self.encode(batch), self._churn_noise(batch)
        x = self.rollout(self.start(x_T), cond, churn_noise)
        x_0, eps_tuned, eps_base = self.tail(x, cond, churn_noise)
        assert eps_base is not None
        return self.decode(x_0) * 255, eps_tuned, eps_base

    @torch.no_grad()
    def annealed_guidance(
        self,
        batch: Batch | Sequence[str],
        x_T: Tensor,
        weighing_fn: Weighing | None = None,
        stochastic: bool = False,
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
        self,
        batch: Batch | Sequence[str],
        x_T: Tensor,
        weighing_fn: Weighing | None = None,
        stochastic: bool = False,
    ) -> Tensor:
        """What `annealed_guidance` draws, (B, 3, 8 H, 8 W) in [0, 1]: the form that everything here works with."""
        batch = self._sized(batch, x_T)
        uniform = None
        if stochastic:
            generators = [torch.Generator().manual_seed(derived_seed(seed, "network")) for seed in batch.seeds]
            uniform = torch.stack([torch.rand(len(self.schedule), generator=g) for g in generators])
        x_0 = self.annealed_latents(
            self.start(x_T),
            self.encode(batch),
            weighing_fn,
            self._churn_noise(batch),
            uniform,
            self._encode_base(batch),
        )
        return self.decode(x_0)

    @torch.no_grad()
    def annealed_latents(
        self,
        x: Tensor,
        cond: Conditioning,
        weighing_fn: Weighing | None = None,
        churn_noise: ImageNoise | None = None,
        uniform: Tensor | None = None,
        cond_base: Conditioning | None = None,
    ) -> Tensor:
        """The trajectory of AIG: latents (B, C, H, W) at the start -> x_0. Weight 1 is tuned, weight 0 base.

        Args:
            x: latents at the start.
            cond: from `encode`.
            weighing_fn: None is i / total.
            churn_noise: for `sampling.s_churn`.
            uniform: (B, N) in [0, 1): draw one network a step by these instead of mixing both.
            cond_base: what the base is told, where that differs from what tuned is told.
        """
        weights, told = step_weights(weighing_fn or linear, self.schedule), cond_base or cond
        if uniform is None:
            network = mixed(self.denoiser(cond), self.base_denoiser(told), weights)
        else:
            network = drawn(
                lambda rows: self.denoiser(cond[rows]),
                lambda rows: self.base_denoiser(told[rows]),
                weights,
                uniform,
            )
        return self._denoise(network, x, churn_noise)

    # -------------------------------------------------------------------------------------------------- the objective

    def get_forward_output_and_loss_func(
        self, validation_step: bool = False
    ) -> Callable[[Iterator[Batch | Sequence[str]], Any], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Metrics]]]]:
        """The forward pass as a function of a data iterator, and the loss as a function of its images.

        Returns:
            f(data_iterator, model) -> image (B, 3, 8 H, 8 W) in [0, 1], loss_func;
            loss_func(image) -> scalar loss, metrics "loss", "reward" and "kl_penalty" (None where it was not
            measured), in validation also "images_and_captions".
        """
        needs_base = validation_step or self.cfg.draftp.needs_base

        def forward(
            data_iterator: Iterator[Batch | Sequence[str]], model: SDXLDRaFTPModel
        ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Metrics]]]:
            batch = model.as_batch(next(data_iterator), training=not validation_step)
            cond, churn_noise = model.encode(batch), model._churn_noise(batch)
            x = model.rollout(model.start(model.initial_noise(batch)), cond, churn_noise)
            with torch.set_grad_enabled(not validation_step):
                x_0, eps_tuned, eps_base = model.tail(x, cond, churn_noise, with_base=needs_base)
                image = model.decode(x_0)

            def loss_func(image: Tensor) -> tuple[Tensor, Metrics]:
                assert model.reward_model is not None, "assign model.reward_model before training"
                reward = model.reward_model(image, list(batch.prompts)).mean()
                loss, kl = -reward, None
                if eps_base is not None:
                    kl = kl_penalty(eps_tuned, eps_base)
                    if model.cfg.draftp.kl_coeff > 0:
                        loss = loss + model.cfg.draftp.kl_coeff * kl
                metrics: Metrics = {
                    "loss": loss.item(),
                    "reward": reward.item(),
                    "kl_penalty": None if kl is None else kl.item(),
                }
                if validation_step:
                    metrics["images_and_captions"] = (image.detach(), list(batch.prompts))
                return loss, metrics

            return image, loss_func

        return forward

    def get_loss_and_metrics(self, batch: Batch | Sequence[str], forward_only: bool = False) -> tuple[float, Metrics]:
        """The loss of a batch in micro-batches, and unless `forward_only` its gradient, added to the weights' `.grad`.

        The gradient is that of the mean over the whole batch, times `grad_scaler`'s scale under fp16. It comes in two
        stages (core/backward.py), unless `sharding.two_stage` is false or a subclass brings its own
        `get_forward_output_and_loss_func`: then by one backward per micro-batch through that function's loss.

        Returns:
            loss; metrics averaged over the images ("images_and_captions": images (B, 3, H, W) in [0, 1] and prompts).
        """
        batch = self.as_batch(batch, training=not forward_only)
        own = type(self).get_forward_output_and_loss_func is SDXLDRaFTPModel.get_forward_output_and_loss_func
        if own and self.cfg.sharding.two_stage and not forward_only:
            metrics = loss_and_gradient(self, batch)
            return metrics["loss"], metrics
        step = self.get_forward_output_and_loss_func(validation_step=forward_only)
        total: Metrics = {}
        pictures: list[tuple[Tensor, list[str]]] = []
        for micro in batch.split(self.cfg.trainer.micro_batch_size):
            share = len(micro) / len(batch)
            with torch.set_grad_enabled(not forward_only):
                image, loss_func = step(iter([micro]), self)
                loss, metrics = loss_func(image)
            if not forward_only:
                self.grad_scaler.scale(loss * share).backward()
            if "images_and_captions" in metrics:
                pictures.append(metrics.pop("images_and_captions"))
            for name, value in metrics.items():
                total[name] = None if value is None else total.get(name, 0.0) + share * value
        if pictures:
            total["images_and_captions"] = (
                torch.cat([images for images, _ in pictures]),
                [caption for _, captions in pictures for caption in captions],
            )
        return total["loss"], total

    # -------------------------------------------------------------------------------------------------------- private

    def _schedule(self) -> Schedule:
        sampling = self.cfg.sampling
        return make_schedule(sampling.steps, sampling.schedule, self.parts.zero_terminal_snr)

    def _denoise(
        self, predict_noise: Predict, x: Tensor, churn_noise: ImageNoise | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        sampling = self.cfg.sampling
        return denoise(
            predict_noise,
            x,
            self.schedule,
            solver=SOLVERS[sampling.sampler],
            start=start,
            stop=stop,
            churn=sampling.s_churn,
            noise=churn_noise,
        )

    def _encode_base(self, batch: Batch) -> Conditioning | None:
        """What the base is told where a LoRA changes the text encoders as well; else None, the same as tuned."""
        changed = [encoder for encoder in self.parts.text_encoders if adapters.lora_layers(encoder)]
        if not changed:
            return None
        with ExitStack() as stack:
            for encoder in changed:
                stack.enter_context(adapters.adapters_off(encoder))
            return self.encode(batch)

    def _churn_noise(self, batch: Batch) -> ImageNoise:
        """The noise that `sampling.s_churn` adds along the batch's trajectories."""
        return ImageNoise([derived_seed(seed, "churn") for seed in batch.seeds])

    def _sized(self, batch: Batch | Sequence[str], x_T: Tensor) -> Batch:
        """The batch, of the size that the noise has."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return replace(self.as_batch(batch), size=(x_T.shape[-2] * factor, x_T.shape[-1] * factor))


def _for_drawing(cfg: Config) -> Config:
    """The settings without those of training: pictures are drawn on one device, and with the base as other programs
    load it, not in 8 bits.
    """
    model = cfg.model.model_copy(update={"quantize": None})
    return cfg.model_copy(update={"model": model, "sharding": ShardingConfig(), "draftp": DraftpConfig()})
