"""How much memory a training takes, before it runs: the training step itself, taken on tensors without data.

The real modules, the real code of core/two_stage.py and a real AdamW run under torch's FakeTensorMode: every shape,
dtype, autocast and saved activation is there, and no data. What is alive is counted operator by operator, so that
whatever a setting does to memory (checkpointing, two stages, tiles, folding, batches) it does here too. Attention is
torch's fused kernel, without its quadratic matrix. What cannot be seen this way is added as `allowance`: the CUDA
context, the workspaces of libraries within their kernels, and what fragmentation wastes.

Planned is one process of a GPU's, unless model.device says cpu. A GB is 10^9 bytes, as a card's maker counts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from draftcli.config import Config, check_config
from draftcli.core.adapters import lora_layers
from draftcli.core.draftp import Batch, SDXLDRaFTPModel
from draftcli.core.live_bytes import LiveBytes, PeakMeter
from draftcli.core.sdxl import Parts
from draftcli.core.sharding import BLOCKS
from draftcli.core.two_stage import prefix_batch_size, recomputes_steps
from draftcli.training.stand_ins import StandInReward, stand_in_parts, without_data

GB = 1e9
CONTEXT = 700_000_000  # a CUDA context with its loaded kernels, and the workspaces of cuBLAS and cuDNN
FRAGMENTATION = 0.08  # of what comes and goes

TEXT, PREFIX, BACKWARD, OPTIMIZER = "text", "prefix", "backward of gradient steps", "optimizer"
ALL = "steps, decode, reward and backward"  # without sharding.two_stage they are one


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one process will hold on its device.

    Attributes:
        resident: what is there all the time, by what it is.
        phases: the most bytes alive at once in each phase of a training step, everything included.
        allowance: for what is not seen; none on a CPU.
        uncounted: rewards whose own networks are not known, and not in here.
    """

    resident: dict[str, int]
    phases: dict[str, int]
    allowance: int
    uncounted: tuple[str, ...]

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return max(self.phases.values())

    @property
    def needed(self) -> int:
        """What a device must have: the peak and the allowance."""
        return self.peak + self.allowance


@dataclass(frozen=True)
class _Step:
    """What was counted: bytes of weights by part, of those that are trained, of those that have a LoRA; and in each
    phase what comes and goes beside them.
    """

    weights: dict[str, int]
    trained: int
    adapted: int
    passing: dict[str, int]
    uncounted: tuple[str, ...]


def memory_plan(cfg: Config, folder: Path, ranks: int = 1) -> MemoryPlan:
    """Work out the memory of each of `ranks` processes.

    Args:
        cfg: the settings.
        folder: with the configurations of the model's four networks.
        ranks: processes that train together.
    """
    images = max(1, cfg.trainer.global_batch_size // ranks)
    step, prefix = _counted_step(cfg, folder, images), _counted_prefix(cfg, folder, images)
    sharded = cfg.sharding.strategy == "fsdp" and ranks > 1
    weights, trained = dict(step.weights), step.trained
    gathered = 0
    if sharded:
        share = per_rank(cfg, folder, (ranks,))[ranks]
        weights |= {name: share[name] for name in share if name in weights}
        trained, gathered = share["trained"], share["gathered"]
    gradient, moments = trained, 2 * trained
    resident = {**weights, "AdamW's moments": moments}
    if cfg.ema.decay is not None and cfg.ema.device == "same":
        resident["moving average"] = trained
    offloaded = sum(size for name, size in weights.items() if name.startswith("text encoder"))
    if cfg.model.offload_text_encoders:
        resident = {name: size for name, size in resident.items() if not name.startswith("text encoder")}
    always = sum(resident.values())
    folds = cfg.sharding.fold_lora and cfg.sharding.strategy != "fsdp"
    folded = step.adapted if folds else 0  # a second copy of the weights that have a LoRA
    several = images > cfg.trainer.micro_batch_size
    phases = {TEXT: always + prefix[TEXT] + (offloaded if cfg.model.offload_text_encoders else 0)}
    phases[PREFIX] = always + prefix[PREFIX] + gathered + folded
    for name, size in step.passing.items():
        if name in (TEXT, PREFIX):
            continue
        held = gradient if several or name in (OPTIMIZER, BACKWARD, ALL) else 0
        passing = size * trained // step.trained if name == OPTIMIZER else size + gathered
        phases[name] = always + held + passing
    on_gpu = cfg.model.device != "cpu"
    allowance = CONTEXT + int(FRAGMENTATION * (max(phases.values()) - always)) if on_gpu else 0
    return MemoryPlan(resident, phases, allowance, step.uncounted)


def memory_lines(cfg: Config, folder: Path, ranks: int = 1) -> list[str]:
    """The plan for people: what is held all the time, the peak of each phase, and the table over ranks under fsdp."""
    plan = memory_plan(cfg, folder, ranks)
    size = _largest(cfg)
    where = "on a CPU" if cfg.model.device == "cpu" else "on a GPU"
    whose = "of the process" if ranks == 1 else f"of each of {ranks} processes"
    always, digits = sum(plan.resident.values()), 2 if plan.peak > GB else 3

    def line(bytes_: int, name: str) -> str:
        return f"{bytes_ / GB:>19.{digits}f} {name}"

    lines = [f"memory       GB (10^9 bytes) {whose} {where} at {size[0]} x {size[1]}, worked out, not measured"]
    lines.append(line(always, "load, there all the time:"))
    lines += [line(part, f"  {name}") for name, part in plan.resident.items() if part >= 0.005 * always]
    lines += [line(most, name) for name, most in plan.phases.items()]
    lines.append(line(plan.needed, f"needed: the largest, and {plan.allowance / GB:.2f} for context and fragmentation"))
    if plan.uncounted:
        lines.append(f"             not counted: the networks of {', '.join(plan.uncounted)}")
    if cfg.sharding.strategy == "fsdp":
        lines.append("fsdp         GB of each process: trained, gradient, AdamW, frozen, whole (VAE, text, rewards)")
        for count, share in per_rank(cfg, folder, (1, 2, 4, 8, 16)).items():
            trained = share["trained"] / GB
            parts = (trained, trained, 2 * trained, share["frozen"] / GB, share["whole"] / GB)
            lines.append(f"{count:>9} ranks" + "".join(f"{part:>8.2f}" for part in parts) + f"   sum {sum(parts):.2f}")
    return lines


# --------------------------------------------------------------------------------------------- sharded, on many ranks


def per_rank(cfg: Config, folder: Path, ranks: Sequence[int]) -> dict[int, dict[str, int]]:
    """Bytes that each of N processes holds under sharding.strategy fsdp, for each N of `ranks`.

    FSDP2 cuts every parameter of the UNet along its first dimension; the first process has the largest part, which is
    counted. VAE and text encoders stay whole.

    Returns:
        by N: "unet" and "frozen copy of the unet" where there is one, frozen or not, with the LoRA's part in "LoRA";
        "trained" (as many bytes again are gradients, twice as many AdamW's moments); "frozen", "whole"; and
        "gathered", what a block's turn takes for a moment: itself and the next one, the root's own parameters, and the
        gradients of two blocks.
    """
    with _planned(cfg, folder) as planned:
        model = planned.model
        unets = [u for u in (model.unet, model._base_unet) if u is not None]
        found: dict[int, dict[str, int]] = {}
        for count in ranks:
            own = {name: _bytes(_shards(network, count)) for name, network in _named(unets)}
            lora = _bytes(_shards(model.unet, count, lambda p: p.requires_grad)) if len(unets) == 1 else 0
            trained = lora or own["unet"]
            own["unet"] -= lora
            blocks = [sum(_bytes([p]) for p in group) for group in _groups(model.unet)]
            *inner, root = blocks
            moving = 2 * max(inner, default=0) + len(unets) * root  # FSDP2 leaves a root gathered once it has run
            found[count] = {
                **own,
                **({"LoRA": lora} if lora else {}),
                "trained": trained,
                "frozen": sum(own.values()) + lora - trained,
                "whole": sum(size for name, size in planned.weights().items() if name not in ("LoRA", *own)),
                "gathered": (moving + (0 if lora else 2 * max(inner, default=0))) if count > 1 else 0,
            }
        return found


def _named(unets: Sequence[nn.Module]) -> Iterable[tuple[str, nn.Module]]:
    return zip(("unet", "frozen copy of the unet"), unets, strict=False)


def _shards(network: nn.Module, ranks: int, chosen: Any = lambda parameter: True) -> list[Tensor]:
    """The first process's part of every parameter."""
    return [p.detach()[: -(-p.shape[0] // ranks)] if p.ndim else p for p in network.parameters() if chosen(p)]


def _groups(network: nn.Module) -> list[list[Tensor]]:
    """What is gathered together: the parameters of each sharded block, then all others."""
    groups, taken = [], set()
    for block in network.modules():
        if type(block).__name__ in BLOCKS:
            groups.append([p for p in block.parameters() if id(p) not in taken])
            taken |= {id(p) for p in groups[-1]}
    return [*groups, [p for p in network.parameters() if id(p) not in taken]]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ----------------------------------------------------------------------------------------- the step on fake tensors


def _counted_step(cfg: Config, folder: Path, images: int) -> _Step:
    """One micro-batch from its latents to the optimizer's step.

    Graphs that are kept grow by as much with each gradient step: beyond three they are counted at two and three.
    """
    micro = min(cfg.trainer.micro_batch_size, images)
    k = cfg.draftp.truncation_steps
    again = cfg.sharding.two_stage and recomputes_steps(cfg)
    key = _key(cfg, micro)
    if k <= 3 and not (again and k > 2):
        return _step(key, folder, k)
    if again:
        return _step(key, folder, 2)
    two, three = (_step(key, folder, count) for count in (2, 3))
    passing = {name: size + (k - 3) * (size - two.passing[name]) for name, size in three.passing.items()}
    return replace(three, passing=passing)


def _counted_prefix(cfg: Config, folder: Path, images: int) -> dict[str, int]:
    """What comes and goes while prompts are encoded and while no gradient is needed."""
    count = prefix_batch_size(cfg) if cfg.sharding.two_stage else cfg.trainer.micro_batch_size
    count = min(images, count)
    return _prefix(_key(cfg, count), folder)


def _key(cfg: Config, images: int) -> str:
    """The settings that what comes and goes hangs on, for `images` at a time; others take one value."""
    sections = cfg.model_dump(mode="json", include={"model", "draftp", "sampling", "peft", "rewards", "sharding"})
    sections["model"] |= {"pretrained": "toy", "offload_text_encoders": False, "config": None, "vae": None}
    sections["model"]["device"] = "cpu" if cfg.model.device == "cpu" else "auto"
    sections["sharding"] |= {"prompt_cache": None, "prefix_batch_size": None, "strategy": "none", "fold_lora": False}
    sections["sharding"] |= {"compile": False, "attention": "auto"}
    sections["trainer"] = {"micro_batch_size": images, "global_batch_size": images}
    sections["draftp"]["kl_coeff"] = float(cfg.draftp.kl_coeff > 0)
    sections["sampling"]["height"], sections["sampling"]["width"] = _largest(cfg)
    sections["sampling"]["sizes"] = []
    return json.dumps(sections, sort_keys=True)


def _largest(cfg: Config) -> tuple[int, int]:
    return max(cfg.sampling.sizes or [(cfg.sampling.height, cfg.sampling.width)], key=lambda size: size[0] * size[1])


@cache
def _step(key: str, folder: Path, k: int) -> _Step:
    sections = json.loads(key)
    sections["draftp"]["truncation_steps"] = k
    sections["sampling"] |= {"steps": k, "guidance_interval": [0.0, 1.0]}
    cfg = check_config(sections)
    with _planned(cfg, folder) as planned:
        model = planned.model
        trained = model.trainable_parameters
        weights = planned.weights()
        adapted = _bytes(layer.get_base_layer().weight for layer in lora_layers(model.unet))  # type: ignore[union-attr]
        for weight in trained:  # as the micro-batches before have left it
            weight.grad = torch.empty_like(weight)
        with planned.counted() as meter:
            with meter(ALL):
                model.get_loss_and_metrics(planned.batch(cfg.trainer.micro_batch_size))
            if cfg.sharding.two_stage:
                del meter.peaks[ALL]
        passing = planned.passing(meter)
        passing[OPTIMIZER] = planned.optimizer_step(trained)
        return _Step(weights, _bytes(trained), adapted, passing, tuple(planned.reward.uncounted))


@cache
def _prefix(key: str, folder: Path) -> dict[str, int]:
    sections = json.loads(key)
    sections["draftp"]["truncation_steps"] = 1
    sections["sampling"] |= {"steps": 2, "guidance_interval": [0.0, 1.0]}
    cfg = check_config(sections)
    with _planned(cfg, folder) as planned:
        model, batch = planned.model, planned.batch(cfg.trainer.micro_batch_size)
        with planned.counted() as meter:
            cond = model.encode(batch)
            with meter(PREFIX), torch.no_grad(), model.base_weights():  # folded, the adapters are off
                model.rollout(model.start(model.initial_noise(batch)), cond)
        return planned.passing(meter)


class _Planned:
    """A model of stand-ins with its reward, inside the mode that makes them."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        for module in parts.modules.values():
            without_data(module)
        on_cpu = cfg.model_copy(update={"model": cfg.model.model_copy(update={"device": "cpu"})})
        self.model = SDXLDRaFTPModel(on_cpu, parts, loras=[])
        self.reward = StandInReward(cfg)
        self.size = (cfg.sampling.height, cfg.sampling.width)
        self.for_gpu = cfg.model.device != "cpu"
        for unet in filter(None, [self.model.unet, self.model._base_unet] if self.for_gpu else []):
            for module in unet.modules():
                if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                    _norm_as_on_gpu(module)
        self._known = 0
        self._decode_once()

    def _decode_once(self) -> None:
        """Of pictures that are decoded and judged one after another the first says how much each takes."""
        decode, reward, seen = self.model.decode, self.reward, [0, 0]

        def decode_first(x_0: Tensor) -> Tensor:
            seen[0] += 1
            if seen[0] == 1:
                return decode(x_0)
            return F.interpolate(x_0[:, :3], self.size)

        def judge_first(images: Tensor, prompts: list[str]) -> Tensor:
            seen[1] += 1
            return reward(images, prompts) if seen[1] == 1 else images.mean((1, 2, 3))

        self.model.decode = decode_first
        self.model.reward_model = judge_first

    def weights(self) -> dict[str, int]:
        """Bytes by part."""
        model = self.model
        found = {"LoRA": _bytes(p for p in model.unet.parameters() if p.requires_grad)}
        found["unet"] = _tensors_of(model.unet) - found["LoRA"]
        if model._base_unet is not None:
            found = {"unet": _tensors_of(model.unet), "frozen copy of the unet": _tensors_of(model._base_unet)}
        found["vae decoder"] = _tensors_of(model.vae)
        for name, encoder in zip(("text encoder", "text encoder 2"), model.parts.text_encoders, strict=True):
            found[name] = _tensors_of(encoder)
        found["rewards"] = _tensors_of(self.reward)
        return found

    def batch(self, images: int) -> Batch:
        return Batch(["one prompt"] * images, list(range(images)), self.size, [None] * images)

    @contextmanager
    def counted(self) -> Iterator[PeakMeter]:
        """Inside, what is alive is counted, by the model's phases."""
        model = self.model
        networks = [*model.parts.modules.values(), *filter(None, [model._base_unet]), self.reward]
        known = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        live = _Counter([*known, *(p.grad for p in model.trainable_parameters if p.grad is not None)])
        self._known = live.now
        model.phase = meter = PeakMeter(live)
        for unet in filter(None, [model.unet, model._base_unet]):
            for module in unet.modules():
                if isinstance(blocks := getattr(module, "transformer_blocks", None), nn.ModuleList):
                    module.transformer_blocks = shortened(blocks, live)
        with live:
            yield meter

    def passing(self, meter: PeakMeter) -> dict[str, int]:
        return {name: peak - self._known for name, peak in meter.peaks.items()}

    def optimizer_step(self, weights: Sequence[Tensor]) -> int:
        """What the optimizer takes beside weights, gradients and moments."""
        # On a GPU all weights are taken at once, as one would be; on a CPU one after the other, so the largest counts.
        count = sum(w.numel() for w in weights) if self.for_gpu else max(w.numel() for w in weights)
        weights = [nn.Parameter(torch.empty(count, dtype=weights[0].dtype))]
        weights[0].grad = torch.empty_like(weights[0])
        optimizer = torch.optim.AdamW(weights, foreach=self.for_gpu)
        live = _Counter([t for weight in weights for t in (weight, weight.grad) if t is not None], value=1)
        with live:
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        return max(0, live.peak - _bytes(moments) - 2 * _bytes(weights))


def _tensors_of(network: nn.Module) -> int:
    return _bytes([*network.parameters(), *network.buffers()])


@contextmanager
def _planned(cfg: Config, folder: Path) -> Iterator[_Planned]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and diffusers on weights that are not there
        parts = stand_in_parts(folder, cfg)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield _Planned(cfg, parts)


class _Counter(LiveBytes):
    """Counts on tensors without data; where code asks one for its number, it gets `value`."""

    def __init__(self, known: Iterable[Tensor] = (), value: int = 0) -> None:
        super().__init__(known)
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most of what is asked, and quicker answered here
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return (bool if kind == torch.bool else float if kind.is_floating_point else int)(self.value)
        return super().__torch_dispatch__(func, types, args, kwargs)


def shortened(blocks: nn.ModuleList, live: LiveBytes) -> nn.ModuleList:
    """The first two of many equal transformer blocks, and one that keeps in memory what the others would.

    Without gradient nothing outlives a block, so that two are as good as ten. With gradient each keeps what the second
    one is seen to keep.
    """
    if len(blocks) <= 3:
        return blocks
    second = blocks[1]
    plain, before = second.forward, [0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        before[0] = live.now
        return plain(*args, **kwargs)

    second.forward = forward
    return nn.ModuleList([blocks[0], second, _Others(len(blocks) - 2, before, live)])


class _Others(nn.Module):
    def __init__(self, count: int, before: list[int], live: LiveBytes) -> None:
        super().__init__()
        self.count, self.before, self.live = count, before, live

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return hidden
        return _Kept.apply(hidden, self.count * (self.live.now - self.before[0]))  # type: ignore[return-value]


class _Kept(torch.autograd.Function):
    """Passes a tensor on, and holds so many bytes until its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int) -> Tensor:
        ctx.held = torch.empty(max(0, size), dtype=torch.uint8)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.held = None
        return gradient, None


def _norm_as_on_gpu(norm: nn.GroupNorm | nn.LayerNorm) -> None:
    """Under a GPU's autocast norms are computed in float32 and their outputs are float32; under the CPU's not."""
    plain = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return plain(x)
        weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)

    norm.forward = forward
