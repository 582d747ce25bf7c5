"""The networks on this machine: tuned and base as two callables; whatever makes them fit or run faster is behind them.

Placement, offloading, folding, 8 bits, caches, autocast and FSDP2 are done here and nowhere else; the method
(core/networks.py) sees callables.

Shape legend: B images, C latent channels, H W latent size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.config import Config
from draftcli.core.batch import Batch, ImageNoise
from draftcli.core.denoise import Predict
from draftcli.core.engine import sharding
from draftcli.core.engine.eight_bit import quantize_blocks
from draftcli.core.engine.folding import folded
from draftcli.core.engine.fused import fused
from draftcli.core.engine.prompt_cache import PromptCache
from draftcli.core.engine.residency import JUDGES, UNET, Residency
from draftcli.core.engine.runtime import choose_runtime
from draftcli.core.guidance import Estimator, NoiseEstimate, make_estimate, network_input, only_guided
from draftcli.core.lora import adapters
from draftcli.core.lora.beginning import attach_begun
from draftcli.core.lora.files import Lora, attach_loras
from draftcli.core.lora.merging import load_base
from draftcli.core.models.family import Conditioning, Parts, latent_factor
from draftcli.core.phase import Phase
from draftcli.core.precision import HALF
from draftcli.core.schedule import Level
from draftcli.errors import InputError

NOT_FOLDED = "sharding.fold_lora has no effect: rounding would take more than sharding.fold_tolerance of the LoRA"

# watch(phase) -> a context around each phase of a step
Watch = Callable[[Phase], AbstractContextManager[Any]]


class PlacedNetworks:
    """Tuned and base as `core.networks.Networks`, on this machine.

    Args:
        cfg: the settings.
        parts: loaded modules, model.loras merged into them; None loads `cfg.model`.
        loras: None is for training, of the LoRA that the UNet has already, of a new one or of the whole UNet. Else it
            is for drawing: these frozen LoRAs, each with its scale, are what tuned is; with none of them tuned is the
            base.

    Attributes:
        unet: the tuned network; inside `base_weights()` it is the base.
        base_unet: the frozen copy of full fine-tuning; None: the base is the UNet with its adapters off.
        vae: the decoder.
        schedule: noise levels of the run's N steps.
        trains: whether `loras` is None.

    Raises:
        InputError: the model cannot be loaded, or the settings do not fit it.
    """

    def __init__(self, cfg: Config, parts: Parts | None, loras: Sequence[tuple[Lora, float]] | None) -> None:
        self.cfg, self.trains = cfg, loras is None
        self.runtime = choose_runtime(cfg.model.device, cfg.model.precision)
        in_full = cfg.peft.peft_scheme == "none"
        split = loras is None and sharding.splits_weights(cfg.sharding)
        # Of a network that will be split process 0 reads the weights, and sends the others their part.
        self._rank0_loads = split and parts is None
        hollow = self._rank0_loads and not sharding.is_source()
        self.parts = parts or load_base(cfg.model, cfg.sampling, trained_in_full=in_full, hollow_unet=hollow)
        self.family = self.parts.family
        device, offload = self.runtime.device, cfg.sharding.offload
        self.vae = self.parts.vae if offload else self.parts.vae.to(device)
        # A network that will be split stays on the CPU until then: no device need ever hold all of it.
        self.unet = self.parts.unet if offload or split else self.parts.unet.to(device)
        copied = sharding.hollow if self._rank0_loads else copy.deepcopy
        self.base_unet = copied(self.unet).eval() if in_full else None
        if in_full:
            self.unet.requires_grad_(True)
        elif loras is None and not adapters.lora_layers(self.unet):
            peft = cfg.peft
            if peft.init_from is None:
                adapters.attach_lora(self.unet, peft.rank, peft.alpha, peft.target_modules, seed=cfg.trainer.seed)
            else:
                attach_begun(self.unet, peft)
        for name, network in self.parts.modules.items() if loras else ():
            attach_loras(network, loras or (), part=name)
        if cfg.model.quantize:
            quantize_blocks(self.unet)
        sharding.speed_up(cfg.sharding, self.runtime, self.unet, self.base_unet, self.vae)
        self.residency = Residency(device)
        if offload:
            self.residency.add(UNET, filter(None, [self.unet, self.base_unet]))
            self.residency.add(JUDGES, [self.vae])
        cache = cfg.sharding.prompt_cache
        self._encoded = PromptCache(
            self.parts, device, offload=cfg.model.offload_text_encoders, folder=None if cache is None else Path(cache)
        )
        sampling = cfg.sampling
        self.schedule = self.family.schedule(self.parts, sampling.steps, sampling.schedule, sampling.timesteps)
        self._watch: Watch = torch.profiler.record_function

    # ------------------------------------------------------------------------------------------- tuned and base

    def tuned(self, cond: Conditioning) -> Predict:
        """The guided noise estimate of what `unet` is when called: tuned, or base in `base_weights()`."""
        return only_guided(self.tuned_estimates(cond))

    def tuned_estimates(self, cond: Conditioning) -> Estimator:
        """Its guided and its conditional estimate, of one call."""
        return lambda x, level: _estimates(self, cond, x, level)

    def _output(self, x: Tensor, level: Level, cond: Conditioning) -> Tensor:
        """What the network says. Autocast is left after each call, with its copies of weights, which may be of a call
        without gradient.
        """
        with self.runtime.autocast():
            return self.family.predict(self.unet, x, level.timestep, cond, self.cfg.sampling.guidance_embedding)

    def base(self, cond: Conditioning) -> Predict:
        """The base's guided noise estimate; never carries gradient."""
        return only_guided(self.base_estimates(cond))

    def base_estimates(self, cond: Conditioning) -> Estimator:
        """The base's guided and conditional estimate; they never carry gradient."""
        tuned = self.tuned_estimates(cond)

        @torch.no_grad()
        def estimate_of_base(x: Tensor, level: Level) -> NoiseEstimate:
            with self.phase(Phase.BASE), self.base_weights():
                return tuned(x, level)

        return estimate_of_base

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """Inside, `unet` is the frozen base: adapters off, or the frozen copy of full fine-tuning.

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

    @contextmanager
    def without_gradient(self) -> Iterator[None]:
        """Inside, the tuned network is as quick as it can be without gradient: its LoRA folded (engine/folding.py), or
        added in one operation a layer (engine/fused.py).
        """
        settings = self.cfg.sharding
        with torch.no_grad(), ExitStack() as stack:
            self.residency.need(UNET)
            done = self.base_unet is not None
            if settings.fold_lora and not done:
                done = stack.enter_context(folded(self.unet, settings.fold_tolerance))
                if not done and "fold_lora" in settings.model_fields_set:
                    warnings.warn(NOT_FOLDED, stacklevel=1)
            if not done and not settings.compile:  # compiled code has the layers' own forward in it
                stack.enter_context(fused(self.unet, self.runtime.dtype))
            yield

    def drawing(self, tuned_alone: bool) -> AbstractContextManager[None]:
        """Inside, pictures are drawn as quickly as can be; no gradient may be asked for.

        In half precision LoRAs are added in one operation a layer: unlike folded weights, such layers know when their
        adapters are off. In full precision the LoRA in training is folded, where the base is not asked: `tuned_alone`.
        """
        if self.runtime.dtype not in HALF:
            return self.without_gradient() if tuned_alone and self.trains else nullcontext()
        if self.base_unet is not None or self.cfg.sharding.compile:
            return nullcontext()
        self.residency.need(UNET)  # its matrices are copied where they are
        return fused(self.unet, self.runtime.dtype)

    # --------------------------------------------------------------------------------- what stands before and behind

    @torch.no_grad()
    def encode(self, batch: Batch) -> Conditioning:
        """What the UNet gets for [unconditional ; conditional], on its device and in its dtype."""
        with self.phase(Phase.TEXT):
            cond = self.family.condition(self.parts, self._encoded, batch, self.cfg.sampling.negative_prompt)
        return cond.to(self.runtime.device, self.runtime.dtype)

    def encode_base(self, batch: Batch, cond: Conditioning) -> Conditioning:
        """What the base gets: `cond`, which tuned gets, unless a LoRA changes the text encoders as well."""
        changed = [encoder for encoder in self.parts.text_encoders if adapters.lora_layers(encoder)]
        if not changed:
            return cond
        with ExitStack() as stack:
            for encoder in changed:
                stack.enter_context(adapters.adapters_off(encoder))
            return self.encode(batch)

    @property
    def factor(self) -> int:
        """Pixels by latent, along an edge."""
        return latent_factor(self.vae)

    def noise(self, batch: Batch) -> Tensor:
        """x_T (B, C, H, W) unit normal, float32 on the CPU, from the batch's seeds."""
        height, width = batch.size
        shape = (len(batch), self.unet.config.in_channels, height // self.factor, width // self.factor)
        return ImageNoise(batch.seeds)(shape)

    def at_first_level(self, noise: Tensor) -> Tensor:
        """Unit noise (B, C, H, W) -> latents at the first level, on the device. The noise is left as it is."""
        return noise.to(self.runtime.device, self.runtime.latent_dtype) * self.schedule.init_scale

    def start(self, batch: Batch) -> Tensor:
        """x_T (B, C, H, W) of a batch at the first level."""
        return self.at_first_level(self.noise(batch))

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
        self.residency.need(JUDGES)
        return self.family.decode(self.vae, x_0, self.cfg.model.vae_tile)

    # ----------------------------------------------------------------------------------------------------- placement

    def place_reward(self, reward: Any) -> None:
        """Move a reward that is a network to the device, or let it wait with the decoder under `sharding.offload`.

        Args:
            reward: a callable; where it consists of several they are in its `rewards`, by name. None: there is none.

        Raises:
            InputError: it is a class, or cannot be called.
        """
        if reward is None:
            return
        if isinstance(reward, type) or not callable(reward):
            raise InputError(
                f"model.reward_model = {reward!r}: expected what is called as reward(images, prompts); "
                "draftcli.get_reward_model takes names, classes and factories too"
            )
        if self.cfg.sharding.offload:
            judges = getattr(reward, "rewards", {"": reward}).values()
            self.residency.add(JUDGES, (judge for judge in judges if isinstance(judge, nn.Module)))
        elif hasattr(reward, "to"):
            reward.to(self.runtime.device)

    def split(self) -> None:
        """FSDP2 on the UNet and on the frozen base of full fine-tuning; VAE, text encoders and rewards stay whole.

        Collective, and so is every use of the UNet from here on. No process but 0 ever holds a whole network, and that
        one but one: the others get their parts from it, and the base's are copies of the tuned one's.

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

    # ------------------------------------------------------------------------------------------------------ profiling

    def phase(self, phase: Phase) -> AbstractContextManager[Any]:
        """Around each phase of a step: a label in torch's profiler, or what `watched` has installed."""
        return self._watch(phase)

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Inside, `watch(phase)` is the context around each phase."""
        before, self._watch = self._watch, watch
        try:
            yield
        finally:
            self._watch = before


def _estimates(nets: PlacedNetworks, cond: Conditioning, x: Tensor, level: Level) -> NoiseEstimate:
    """What `nets.unet` says at x (B, C, H, W), in one call."""
    sampling, detach_uncond = nets.cfg.sampling, nets.cfg.draftp.detach_uncond
    nets.residency.need(UNET)
    seen = network_input(x, level)
    if not sampling.is_guided(level.index):
        output = nets._output(seen, level, cond.conditional)
    elif detach_uncond and torch.is_grad_enabled():
        with torch.no_grad():
            without_prompt = nets._output(seen, level, cond.unconditional)
        output = torch.cat([without_prompt, nets._output(seen, level, cond.conditional)])
    else:
        output = nets._output(torch.cat([seen, seen]), level, cond)
    return make_estimate(output, x, level, nets.parts.prediction, sampling.scale)
