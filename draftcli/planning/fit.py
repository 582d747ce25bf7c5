"""Settings that fit a device: the fastest first, then one concession after the other, the cheapest first.

A concession is made only where it helps the phase that needs most, and its cost is reported. The global batch, the
picture and the method stay as they are; a setting that the user gave is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from draftcli.config import Config, check_config
from draftcli.core.gradient.mode import make_mode
from draftcli.core.phase import JUDGING_PHASES, Phase
from draftcli.errors import InputError
from draftcli.planning.memory import GB, MemoryPlan
from draftcli.planning.plan import count_evaluations

LARGEST = 8  # images per backward: at SDXL's size more keep no GPU busier


@dataclass(frozen=True)
class Choice:
    """One concession.

    Attributes:
        setting: dotted key.
        value: its new value.
        cost: what is lost with it, in words.
    """

    setting: str
    value: Any
    cost: str


@dataclass(frozen=True)
class Fit:
    """Settings that fit.

    Attributes:
        cfg: the settings that fit.
        choices: what was chosen beside what was given, in order.
        plan: the memory that they need.
    """

    cfg: Config
    choices: list[Choice]
    plan: MemoryPlan


def fit(cfg: Config, size: int, plan: Callable[[Config], MemoryPlan], given: frozenset[str], ranks: int = 1) -> Fit:
    """Choose settings that need at most `size` bytes.

    Args:
        cfg: the settings asked for.
        size: bytes of the device.
        plan: from settings to their memory plan.
        given: dotted keys, or whole sections, that the user gave and that are not to be touched.
        ranks: processes that share the training.

    Raises:
        InputError: nothing fits; the message has the least that is needed.
    """
    if not cfg.sharding.two_stage and _is_given("sharding.two_stage", given):  # without it these have no effect
        given |= {"sharding.decode_batch_size", "sharding.prefix_batch_size"}
    chosen: dict[str, Choice] = {}
    for choice in _start(cfg):
        if not _is_given(choice.setting, given) and _get(cfg, choice.setting) != choice.value:
            cfg = _with(cfg, choice)
            chosen[choice.setting] = choice
    found, vain, before = plan(cfg), set[Choice](), cfg
    while found.needed > size:
        options = (c for c in _concessions(cfg, found) if not _is_given(c.setting, given) and c not in vain)
        choice = next((c for c in options if _get(cfg, c.setting) != c.value), None)
        if choice is None:
            raise InputError(
                f"nothing fits {size / GB:.1f} GB: at least {found.needed / GB:.1f} GB are needed, most in the phase "
                f"{found.worst}; a smaller sampling.height and width, fewer rewards or more processes would help"
            )
        after = plan(smaller := _with(cfg, choice))
        if after.phases[found.worst] < found.phases[found.worst]:
            cfg, found = smaller, after
            chosen.pop(choice.setting, None)
            chosen[choice.setting] = choice
        else:
            vain.add(choice)
    options = [c for c in reversed(chosen.values()) if _get(before, c.setting) != c.value]
    options = [Choice(c.setting, _get(before, c.setting), "nothing") for c in options]
    for choice in options:  # a later, costlier one may have made an earlier one unnecessary
        after = plan(larger := _with(cfg, choice))
        if after.needed <= size:
            cfg, found = larger, after
            del chosen[choice.setting]
    if not _is_given("trainer.micro_batch_size", given):
        images = max(1, cfg.trainer.global_batch_size // ranks)
        for count in (n for n in range(2, min(LARGEST, images) + 1) if images % n == 0):
            choice = Choice("trainer.micro_batch_size", count, "nothing: it fits")
            after = plan(larger := _with(cfg, choice))
            if after.needed > size:
                break
            cfg, found, chosen[choice.setting] = larger, after, choice
    return Fit(cfg, list(chosen.values()), found)


def _start(cfg: Config) -> Iterator[Choice]:
    """The quickest settings that make a difference to memory, at one image per backward."""
    yield Choice("trainer.micro_batch_size", 1, "increased below where it fits")
    yield Choice("sharding.decode_batch_size", 1, "little: one image keeps a GPU busy in the decoder")
    yield Choice("sharding.two_stage", True, "nothing")
    yield Choice("sharding.activation_checkpointing", False, "nothing: it is faster")
    yield Choice("sharding.offload", False, "nothing: it is faster")
    yield Choice("model.vae_tile", None, "nothing: it is faster, and exact")
    if cfg.peft.peft_scheme == "lora" and cfg.model.precision in ("bf16", "fp16"):
        yield Choice("sharding.fold_lora", False, "little: rounding hardly ever lets a LoRA be folded here")


def _concessions(cfg: Config, plan: MemoryPlan) -> Iterator[Choice]:
    """What could make the worst phase smaller, from the cheapest to the costliest."""
    phase = plan.worst
    decodes = phase in JUDGING_PHASES or phase is Phase.ALL
    steps = phase not in (Phase.TEXT, Phase.PREFIX, Phase.OPTIMIZER)
    yield Choice("model.offload_text_encoders", True, "text encoders move to the GPU for prompts that are new")
    if cfg.ema.decay is not None and cfg.sharding.strategy != "fsdp":
        yield Choice("ema.device", "cpu", "the average travels over the bus each step")
    if phase is Phase.PREFIX:
        for count in (4, 2, 1):
            if count < (cfg.sharding.prefix_batch_size or 8):
                yield Choice("sharding.prefix_batch_size", count, "some speed of the prefix")
        if cfg.peft.peft_scheme == "lora":
            yield Choice("sharding.fold_lora", False, "three matrix products a layer instead of one in the prefix")
    if steps:
        yield Choice("sharding.activation_checkpointing", True, _evaluations(cfg, "activation_checkpointing"))
    mode = make_mode(cfg)
    if steps and mode.longest > 1 and not mode.recomputes:
        yield Choice("sharding.recompute_steps", True, _evaluations(cfg, "recompute_steps"))
    if _may_offload(cfg):
        travel = f"UNet, decoder and rewards travel to the GPU each step; {_evaluations(cfg, 'offload')}"
        yield Choice("sharding.offload", True, travel)
    if decodes:
        for tile in (512, 256):
            if tile < max(cfg.sampling.height, cfg.sampling.width):
                yield Choice("model.vae_tile", tile, "tiles are decoded twice, images and gradient change a little")


def _evaluations(cfg: Config, name: str) -> str:
    """The cost, in words, of a setting in `sharding` that computes something twice."""
    before, after = (count_evaluations(some) for some in (cfg, _with(cfg, Choice(f"sharding.{name}", True, ""))))
    more = sum(after.values()) - sum(before.values())
    return f"{f'{more:.4g}' if more else 'no'} more UNet evaluations an image, of about {before['forward']:.4g}"


def _may_offload(cfg: Config) -> bool:
    sharding = cfg.sharding
    possible = sharding.two_stage and sharding.recompute_steps is not False and sharding.strategy != "fsdp"
    return possible and cfg.model.device != "cpu"


def _is_given(key: str, given: frozenset[str]) -> bool:
    return not given.isdisjoint((key, key.partition(".")[0]))


def _get(cfg: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


def _with(cfg: Config, choice: Choice) -> Config:
    data = cfg.model_dump(exclude_unset=True)
    section, name = choice.setting.split(".")
    data.setdefault(section, {})[name] = choice.value
    return check_config(data)
