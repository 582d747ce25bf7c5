"""training.html: how a training goes, in one file that is rewritten at each validation.

Everything on it is read from the run's own files, so it shows a resumed run whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from draftcli.errors import first_line, warn
from draftcli.metrics.hacking import sign_changes
from draftcli.metrics.roles import reward_role
from draftcli.metrics.statistics import direction, has_interval, or_nan
from draftcli.pages.curve import StepCurve, curve_chart
from draftcli.pages.embed import embedded
from draftcli.pages.numbers import signed, significant
from draftcli.pages.page import render_html
from draftcli.pictures import open_picture
from draftcli.runs import Run, ValidationLine, disk_errors, write_aside
from draftcli.sampling.sheet import spread
from draftcli.training.monitor import Monitor
from draftcli.training.result import diversity_kept, diversity_warning

_TEMPLATE = Path(__file__).parent / "training.html"
SHEETS = 12  # of the validations, at most so many are in the page: the first, the last and some spread between
SHEET_EDGE = 1600  # longest side of a sheet in the page, in pixels
_OF_STEPS = {
    "reward": "reward in training",
    "kl_penalty": "KL penalty",
    "kl_coeff": "KL coefficient",
    "kl_weight": "mean weight in the KL penalty",
    "grad_norm": "gradient norm",
}


def write_train_page(run: Run) -> None:
    """Write the page of a run. A run never fails by this: what goes wrong is a warning."""
    try:
        html = train_page(run)
        with disk_errors(run.page):
            write_aside(run.page, lambda aside: aside.write_text(html, encoding="utf-8"))
    except Exception as error:  # whatever it is, the training goes on
        warn(f"{run.page} was not written ({first_line(error)}); the training itself is not affected")


def train_page(run: Run) -> str:
    """The page as text; the run has had at least one validation."""
    settings, monitor = yaml.safe_load(run.config.read_text(encoding="utf-8-sig")), Monitor.of(run.settings())
    validations, steps = run.validations(), run.steps()
    trained = monitor.trained
    last = validations[-1]
    rows = [_reward_row(name, figures, trained) for name, figures in last["rewards"].items()]
    return render_html(
        _TEMPLATE,
        f"{run.folder.name}: training",
        ["downloads.js"],
        step=steps[-1]["step"] if steps else 0,
        last_step=settings["trainer"]["max_steps"],
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        validated=last["step"],
        images=last["images"],
        rewards=sorted(rows, key=lambda row: bool(row["trained"])),
        diversity=None if (kept := diversity_kept(last)) is None else kept.words,
        best=run.best(),
        alarms=find_alarms(validations, steps, monitor),
        alarm=last.get("alarm"),
        stopped=last.get("stopped"),
        signs=_sign_rows(last),
        charts=[*_validation_charts(validations, trained), *_step_charts(steps)],
        sheets=_sheets(run),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    )


def find_alarms(
    validations: Sequence[ValidationLine], steps: Sequence[Mapping[str, Any]], monitor: Monitor
) -> list[str]:
    """What the run has warned of, in its order: signs of reward hacking, lost diversity, steps that were skipped."""
    found: list[tuple[int, str]] = []
    for line, alarm in zip(validations, monitor.alarms(validations), strict=True):
        step = line["step"]
        if alarm is not None:
            found.append((step, f"step {step}: {alarm}"))
        if (text := diversity_warning(line)) is not None:
            found.append((step, text))
    found += [(line["step"], f"step {line['step']} was skipped") for line in steps if "skipped" in line]
    return [text for _, text in sorted(found, key=lambda alarm: alarm[0])]


def _reward_row(name: str, figures: Mapping[str, float | None], trained: Mapping[str, int]) -> dict[str, str | bool]:
    values = {key: or_nan(figures[key]) for key in ("base", "tuned", "difference", "low", "high")}
    wanted = trained.get(name, 1) * direction(figures["low"], figures["high"])
    return {
        "name": name,
        "role": reward_role(name, trained),
        "trained": name in trained,
        "base": significant(values["base"]),
        "tuned": significant(values["tuned"]),
        "change": signed(values["difference"]),
        "interval": _interval(values["low"], values["high"]),
        "kind": ("", "up", "down")[wanted],
    }


def _interval(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}" if has_interval(low, high) else "none"


def _sign_rows(line: ValidationLine) -> list[dict[str, str | bool]]:
    """What the monitor watches beside rewards, of a validation."""
    return [
        {
            "name": sign.name.replace("_", " "),
            "base": significant(sign.base),
            "tuned": significant(sign.tuned),
            "change": signed(sign.tuned - sign.base),
            "interval": _interval(sign.low, sign.high),
            "far": sign.is_far,
        }
        for sign in sign_changes(line)
        if math.isfinite(sign.base)
    ]


def _validation_charts(validations: Sequence[ValidationLine], trained: Mapping[str, int]) -> list[dict[str, str]]:
    """Each reward on the held-out prompts, the held-out ones first, and the diversity kept."""
    steps = [line["step"] for line in validations]
    charts = []
    names = dict.fromkeys(name for line in validations for name in line["rewards"])
    for name in sorted(names, key=lambda name: name in trained):
        figures = [line["rewards"].get(name, {}) for line in validations]
        values, base = ([or_nan(f.get(key)) for f in figures] for key in ("tuned", "base"))
        low, high = ([b + or_nan(f.get(key)) for f, b in zip(figures, base, strict=True)] for key in ("low", "high"))
        level = next((value for value in reversed(base) if math.isfinite(value)), None)
        role = reward_role(name, trained)
        text = f"{name} ({role}) on validation prompts. Level line: base. Band: 95 % interval of the change."
        charts.append(_chart(StepCurve(steps, values, low, high, level, marked=True), name, text))
    kept = [diversity_kept(line) for line in validations]
    known = [(math.nan,) * 3 if k is None else (k.share, k.low, k.high) for k in kept]
    shares = [[100 * share for share in some] for some in zip(*known, strict=True)]
    text = "Diversity in pixels, in percent of the base. The band is the 95 % interval."
    charts.append(_chart(StepCurve(steps, *shares, level=100.0, marked=True), "diversity kept, %", text))
    return [chart for chart in charts if chart["svg"]]


def _step_charts(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    numbers = [line["step"] for line in steps]
    charts = []
    for key, label in _OF_STEPS.items():
        values = [math.nan if "skipped" in line else or_nan(line.get(key)) for line in steps]
        charts.append(_chart(StepCurve(numbers, values), label, f"{label[0].upper()}{label[1:]}, every step."))
    return [chart for chart in charts if chart["svg"]]


def _chart(curve: StepCurve, label: str, text: str) -> dict[str, str]:
    return {"svg": curve_chart(curve, label), "text": text, "name": label}


def _sheets(run: Run) -> list[dict[str, Any]]:
    """The sheets of the validations, the newest first."""
    paths = sorted(run.samples.glob("step-*-sheet.png"))
    sheets = []
    for path in (paths[i] for i in reversed(spread(len(paths), SHEETS) if paths else [])):
        source = embedded(open_picture(path), SHEET_EDGE)
        sheets.append({"step": int(path.name.split("-")[1]), "source": source})
    return sheets
