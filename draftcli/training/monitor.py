"""The monitor: whether a run looks like reward hacking, when it ends by itself, and which step is kept.

Values in, verdict out: it reads the lines of validation.jsonl, of the whole run so far, and keeps nothing. So a resumed
run judges as an undisturbed one does, and the lines of a run can be judged again by another setting.

The rule itself is `metrics.hacking`, the same as in an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from draftcli.config import Config, MonitorConfig, trained_signs
from draftcli.errors import InputError
from draftcli.metrics.hacking import Hacking, Standing, find_hacking, sign_changes
from draftcli.metrics.statistics import or_nan
from draftcli.runs import Run, ValidationLine

ADVICE = "raise draftp.kl_coeff or lower optim.lr in a new run"


@dataclass(frozen=True)
class MonitorVerdict:
    """What follows from the validations so far.

    Attributes:
        alarm: what looks like reward hacking at the newest, in a sentence without full stop; None: nothing does.
        stops: whether the run is to end now.
        final: the step that final/ is to be written from, if it ends now.
    """

    alarm: str | None
    stops: bool
    final: int


class Monitor:
    """Judges the validations of a run.

    Args:
        rule: the section `monitor` of its settings.
        weights: of the rewards that it is trained on, by name.
        held_out: names of those that it is not.
        normalised: whether rewards are divided by running statistics in training, so that the mean reward of one step
            cannot be compared with that of another.
    """

    def __init__(
        self, rule: MonitorConfig, weights: Mapping[str, float], held_out: Collection[str], normalised: bool = False
    ) -> None:
        self.rule, self.weights, self.held_out, self.normalised = rule, dict(weights), tuple(held_out), normalised

    @classmethod
    def of(cls, cfg: Config) -> Monitor:
        """The monitor that a run's settings ask for."""
        weights = {name: reward.weight for name, reward in cfg.rewards.items()}
        normalised = any(reward.normalise != "none" for reward in cfg.rewards.values())
        return cls(cfg.monitor, weights, cfg.held_out, normalised)

    @property
    def trained(self) -> dict[str, int]:
        """As `trained_signs` has it."""
        return trained_signs(self.weights)

    @property
    def can_stop(self) -> bool:
        """Whether it may end the run."""
        return bool(self.held_out) if self.rule.stop is None else self.rule.stop == "hacking"

    @property
    def announcement(self) -> str:
        """What a run says of it at its start."""
        if self.can_stop:
            judges = f"held out: {', '.join(self.held_out)}" if self.held_out else "nothing is held out"
            return f"monitor: ends the run if it looks like reward hacking ({judges}); monitor.stop=never only warns"
        if self.rule.stop is None:
            return "monitor: warns and never ends the run, as held_out_rewards names nothing"
        return "monitor: warns and never ends the run (monitor.stop=never)"

    def judge(self, history: Sequence[ValidationLine]) -> MonitorVerdict:
        """The verdict after the newest validation.

        Args:
            history: all validations of the run, the newest last; at least one.
        """
        alarms = self._verdicts(history)
        last, now = history[-1]["step"], alarms[-1]
        patient = min(self.rule.patience, len(alarms))
        stops = self.can_stop and len(alarms) >= self.rule.patience and all(alarms[-patient:])
        final = self._best(history, alarms, self._cause(history, alarms)) if self.rule.final == "best" else last
        return MonitorVerdict(_in_words(now), stops, final)

    def alarms(self, history: Sequence[ValidationLine]) -> list[str | None]:
        """What looked like reward hacking at each validation, in words; None: nothing did."""
        return [_in_words(verdict) for verdict in self._verdicts(history)]

    def may_need(self, history: Sequence[ValidationLine]) -> set[int]:
        """The steps whose checkpoints `judge` may ask for at this or a later validation."""
        if not (self.can_stop and self.rule.final == "best" and history):
            return set()
        alarms = self._verdicts(history)
        # The last step as well: where the next validation is well again, all that raised no alarm may be gone back to.
        causes = {self._cause(history, alarms), history[-1]["step"]}
        for name in {name for line in history for name in line["rewards"]}:
            sign = self.trained.get(name, 1)
            means = {line["step"]: sign * _mean(line, name) for line in history if not math.isnan(_mean(line, name))}
            causes |= {max(means, key=means.__getitem__)} if means else set()
        return {self._best(history, alarms, cause) for cause in causes} - {0}

    def _verdicts(self, history: Sequence[ValidationLine]) -> list[Hacking | None]:
        """The verdict of the rule at each validation, as it was then."""
        standings = [Standing.of_validation(line) for line in history]
        # What peft.init_from brought along is not this run's doing.
        begun: set[str] = set()
        if history and not history[0]["step"]:
            begun = {sign.name for sign in standings[0].signs if sign.is_far}
        standings = [replace(s, signs=[sign for sign in s.signs if sign.name not in begun]) for s in standings]
        return [find_hacking(standings[: i + 1], self.trained) for i in range(len(standings))]

    def _cause(self, history: Sequence[ValidationLine], alarms: Sequence[Hacking | None]) -> int:
        """The last step at which all was well: that of the newest validation, or, where the newest ones in a row raised
        alarms, the last before them, and no later than any reward that fell was at its best.
        """
        first = len(alarms)
        while first and alarms[first - 1]:
            first -= 1
        steps = {f"step {line['step']}": line["step"] for line in history}
        since = [steps[fall.since] for alarm in alarms[first:] if alarm for fall in alarm.falls]
        return min([history[max(0, first - 1)]["step"], *since])

    def _best(self, history: Sequence[ValidationLine], alarms: Sequence[Hacking | None], cause: int) -> int:
        """Of the validations up to `cause` that raised no alarm, the step with the highest trained reward; where there
        is none, as after a first step that made everything worse, the first step that was validated.
        """
        scores = {
            line["step"]: validation_score(line, self.weights, ())
            for line, alarm in zip(history, alarms, strict=True)
            if 0 < line["step"] <= cause and alarm is None
        }
        known = {step: score for step, score in scores.items() if not math.isnan(score)}
        if known:
            return max(known, key=known.__getitem__)
        return next((line["step"] for line in history if line["step"]), 0)


def validation_score(line: ValidationLine, trained: Mapping[str, float], held_out: Sequence[str]) -> float:
    """How good a validation is: the first held-out reward, else what the images count in the training. NaN where no
    reward had something to say.

    Lines of older versions do not have the latter; the weighted sum of the trained rewards takes its place.
    """
    if held_out:
        return _mean(line, held_out[0])
    if "trained" in line:
        return or_nan(line["trained"].get("tuned"))
    parts = [weight * _mean(line, name) for name, weight in trained.items()]
    return sum(part for part in parts if not math.isnan(part)) if not all(map(math.isnan, parts)) else math.nan


def check_not_ended(monitor: Monitor, run: Run) -> None:
    """Raise InputError where a monitor has ended the run, final/ is written, and nothing says to go on."""
    stop = run.stopped()
    if stop is not None and monitor.can_stop and run.has_final(stop["final"]):
        raise InputError(
            f"{run.folder} was ended by its monitor ({stop['why']}), and final/ is of step {stop['final']}; to go on "
            "with it anyway: --set monitor.stop=never"
        )


def _in_words(verdict: Hacking | None) -> str | None:
    return None if verdict is None else verdict.sentence("held-out prompts")


def alarm_in_words(line: ValidationLine) -> str | None:
    """What a run says after a validation that raised an alarm and did not end it; None: nothing."""
    alarm = line.get("alarm")
    return None if alarm is None else f"{alarm}. Look at samples/; stop here, or {ADVICE}"


def far_signs(line: ValidationLine) -> list[str]:
    """The signs of a validation that are far from the base's, in words."""
    return [sign.words for sign in sign_changes(line) if sign.is_far]


def _mean(line: ValidationLine, name: str) -> float:
    """Of a reward, tuned; NaN where it was not measured."""
    return or_nan(line["rewards"].get(name, {}).get("tuned"))
