"""How much memory a training takes, before it runs: what is held all the time, and what each phase of a step adds
(planning/rehearsal.py takes one without data).

What cannot be counted this way is added as `allowance`: the CUDA context, the workspaces of libraries within their
kernels, and what fragmentation wastes.

The plan is of one process on a GPU, unless model.device is cpu. A GB is 10^9 bytes, as makers of cards count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from draftcli.config import Config, check_batch_size
from draftcli.core.backward import Work
from draftcli.core.gradient.mode import make_mode, recomputes_steps
from draftcli.core.phase import JUDGING_PHASES, Phase
from draftcli.planning.rehearsal import judging_of, prefix_of, steps_of, validates, weights_of
from draftcli.planning.shares import per_rank

GB = 1e9
# Measured on an H100 at SDXL's size (docs/benchmarks.md): 0.84 GB of context, and 1.3 to 2.7 GB between the bytes that
# are alive by this plan and what the caching allocator must have: workspaces within kernels, and fragmentation.
CONTEXT = 850_000_000  # a CUDA context with its loaded kernels
UNSEEN = 2_000_000_000  # workspaces and fragmentation, of a model that holds as much
FRAGMENTATION = 0.08  # of what comes and goes, where that is more

# Once it has run, FSDP's root stays gathered.
_GATHERED = frozenset(Phase) - {Phase.TEXT, Phase.VALIDATION, Phase.OPTIMIZER}


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
    phases: dict[Phase, int]
    allowance: int
    uncounted: tuple[str, ...]

    @property
    def worst(self) -> Phase:
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


def memory_plan(cfg: Config, folder: Path, ranks: int = 1) -> MemoryPlan:
    """Work out the memory of each of `ranks` processes.

    Args:
        cfg: the settings.
        folder: with the configurations of the model's four networks.
        ranks: processes that train together.

    Raises:
        InputError: sharding.shard_size does not divide `ranks`, or `ranks` cannot share the batch evenly.
    """
    check_batch_size(cfg, ranks)
    images = cfg.trainer.global_batch_size // ranks
    split = cfg.sharding.strategy == "fsdp" and ranks > 1
    if not split:  # one process alone has everything whole
        cfg = cfg.model_copy(update={"sharding": cfg.sharding.model_copy(update={"strategy": "none"})})
    weights, passing = weights_of(cfg, folder), _passing(cfg, folder, images)
    resident, trained, gathered = dict(weights.parts), weights.trained, 0
    if split:
        share = per_rank(cfg, folder, (ranks,))[ranks]
        resident |= {name: size for name, size in share.items() if name in resident}
        trained, gathered = share["trained"], share["gathered"]
    resident["AdamW's moments"] = 2 * trained if split else weights.moments  # fsdp splits none in 8 bits
    if cfg.ema.decay is not None and cfg.ema.device == "same":
        resident["moving average"] = trained
    passing[Phase.OPTIMIZER] = weights.optimizer * trained // weights.trained
    if cfg.peft.peft_scheme == "lora" and cfg.sharding.fold_lora and not split and cfg.model.quantize is None:
        bases = prefix_of(cfg, folder, _prefix_batch(cfg, images), with_lora=False)
        folded = bases[Phase.PREFIX] + weights.adapted  # a second copy of the weights that have a LoRA
        # In half precision rounding may forbid the fold, at any step anew: then the LoRA acts by itself.
        passing[Phase.PREFIX] = (
            max(folded, passing[Phase.PREFIX]) if cfg.model.precision in ("bf16", "fp16") else folded
        )
    _add_gradient(passing, cfg, images, trained)
    for phase in passing:
        passing[phase] += gathered if phase in _GATHERED else 0
    for names, phases in _visitors(cfg):
        size = sum(resident.pop(name, 0) for name in names)
        for phase in passing.keys() & phases:
            passing[phase] += size
    always = sum(resident.values())
    phases = {phase: always + size for phase, size in passing.items()}
    unseen = max(int(FRAGMENTATION * max(passing.values())), min(UNSEEN, max(phases.values())))
    allowance = CONTEXT + unseen if cfg.model.device != "cpu" else 0
    return MemoryPlan(resident, phases, allowance, weights.uncounted)


def _add_gradient(passing: dict[Phase, int], cfg: Config, images: int, size: int) -> None:
    """Of the weights: there in the backward that makes it, and in all that comes between that and the optimizer."""
    mode = make_mode(cfg)
    again = recomputes_steps(cfg)
    several = images > cfg.trainer.micro_batch_size or mode.pieces_per_image > 1
    held = {Phase.OPTIMIZER, Phase.BACKWARD, Phase.ALL}
    held |= {Phase.BASE, Phase.STEPS} if several or (again and mode.longest > 1) else set()
    if several and not again:  # else all are judged before any backward
        held |= {Phase.DECODE, Phase.REWARD, Phase.JUDGING}
    for phase in held & passing.keys():
        passing[phase] += size


def _visitors(cfg: Config) -> Iterator[tuple[Sequence[str], frozenset[Phase]]]:
    """Parts that are on the device in some phases alone, and in which."""
    if not cfg.draftp.asks_held_out:  # else each training step asks them too, and they stay
        yield ("held-out rewards",), frozenset({Phase.VALIDATION})
    if cfg.model.offload_text_encoders:
        yield ("text encoder", "text encoder 2"), frozenset({Phase.TEXT})
    if cfg.sharding.offload:
        frozen = "unet" if cfg.peft.peft_scheme == "lora" else "frozen copy of the unet"
        yield (frozen,), frozenset(Phase) - JUDGING_PHASES
        yield ("vae decoder", "rewards"), JUDGING_PHASES


def _passing(cfg: Config, folder: Path, images: int) -> dict[Phase, int]:
    """What comes and goes in each phase of a process that trains on `images` a step, gradients of others apart."""
    micro = min(cfg.trainer.micro_batch_size, images)
    prefix = prefix_of(cfg, folder, _prefix_batch(cfg, images), with_lora=True)
    found = {Phase.TEXT: prefix[Phase.TEXT], Phase.PREFIX: prefix[Phase.PREFIX]}
    steps = steps_of(cfg, folder, micro)
    if cfg.sharding.two_stage:
        # Decoder and reward come between the steps and their backward: on top of the graph, where that is kept.
        graph = steps[Phase.DECODE]
        judging = judging_of(cfg, folder, min(micro, cfg.sharding.decode_batch_size or micro))
        others = {Phase.TEXT, Phase.PREFIX, Phase.BACKWARD, *judging}
        found |= {phase: size for phase, size in steps.items() if phase not in others}
        found |= {phase: graph + size for phase, size in judging.items()}
    found |= {phase: size for phase, size in steps.items() if phase in (Phase.BACKWARD, Phase.ALL)}
    if validates(cfg):
        found |= judging_of(cfg, folder, micro, training=False)
    return found


def _prefix_batch(cfg: Config, images: int) -> int:
    return min(images, Work.of(cfg).prefix)
