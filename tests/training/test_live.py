"""What people see: a live view in a terminal, plain lines elsewhere."""

import io
import os
import pty
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from draftcli.cli import main
from draftcli.progress import duration
from draftcli.training.live import LiveView, curve
from tests.command import WITH_VALIDATION, draftp, in_child, recipe

METRICS = {
    "seconds": 0.1,
    "reward": 0.5,
    "kl_penalty": 0.01,
    "grad_norm": 1.5,
    "images_per_second": 2.0,
    "memory_gib": 1.25,
}


def frames(width: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=file, force_terminal=True, width=width, legacy_windows=False)
    with LiveView(console, "run", 0, 40) as view:
        for step in range(1, 31):
            view.step({**METRICS, "step": step, "reward": step / 10, "kl_coeff": 0.15}, skipped=2)
        view.saved(20)
        view.note("validating: tuned 3/8")
        console.print(view)
    return file.buffer.getvalue().decode(encoding)


def test_the_view_shows_where_a_run_is():
    shown = frames(160)
    for words in ("step 30/40", "reward 3.000", "▁", "█", "kl 0.0100", "kl_coeff 0.15", "grad 1.50", "images/s", "GiB",
                  "skipped 2", "saved at 20", "validating: tuned 3/8", "left"):  # fmt: skip
        assert words in shown


def test_what_is_held_out_what_is_trained_and_the_coefficient_stand_side_by_side_and_an_alarm_below():
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    console = Console(file=file, force_terminal=True, width=120, legacy_windows=False)
    row = "at 20: held out judge 8.100 (-0.200)  trained toy 9.000 (+1.500)"
    with LiveView(console, "run", 0, 40, coefficient=12.0) as view:
        view.step({**METRICS, "step": 20}, skipped=0)
        view.validated(1.0, row)
        console.print(view)
        calm = file.buffer.getvalue().decode()
        view.validated(1.0, row, "judge on held-out prompts fell by 0.3")
        console.print(view)
    assert f"{row}  kl_coeff 12" in calm
    assert "ALARM" not in calm
    assert "ALARM  judge on held-out prompts fell by 0.3" in file.buffer.getvalue().decode()


def test_the_view_fits_a_narrow_terminal_and_one_without_unicode():
    assert "step 30/40" in frames(60)
    for width in (60, 120):
        assert "#" in frames(width, "ascii")


@pytest.mark.parametrize(
    ("last", "error", "shown"),
    [(3, None, "✓"), (9, None, "■"), (9, KeyboardInterrupt, "stopped after step 3"), (9, ValueError, "✗")],
)
def test_the_view_ends_with_what_happened(last, error, shown):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    console = Console(file=file, force_terminal=True, width=160, legacy_windows=False)
    with suppress(KeyboardInterrupt, ValueError), LiveView(console, "run", 0, last) as view:
        for step in range(1, 4):
            view.step({**METRICS, "step": step}, skipped=0)
        if error is not None:
            raise error
    at_the_end = file.buffer.getvalue().decode().rsplit("run", 1)
    assert shown in at_the_end[0][-20:] + at_the_end[1]


@pytest.mark.parametrize(
    ("values", "bars"), [([1, 1, 1], "▁▁▁"), ([0, 7], "▁█"), (range(8), "▁▂▃▄▅▆▇█"), ([0, 0, 7, 7], "▁█")]
)
def test_the_curve_goes_from_the_lowest_to_the_highest(values, bars):
    assert curve(list(values), 2 if bars == "▁█" else 24) == bars


@pytest.mark.parametrize(
    ("step", "every", "left"),
    [
        (4, 0, "1 min 0 s"),  # 6 steps of 10 s
        (4, 5, "3 min 0 s"),  # and validations after 5 and 10, of a minute
        (4, 3, "4 min 0 s"),  # after 6, 9 and, as always, the last
        (5, 5, "2 min 50 s"),  # that after 5 comes now
        (9, 20, "1 min 10 s"),
    ],
)
def test_the_time_left_is_that_of_recent_steps_and_of_the_validations_to_come(step, every, left):
    file = io.StringIO()
    with LiveView(Console(file=file, width=200), "run", 0, 10, validate_every=every) as view:
        view.validated(60)
        for at in range(1, step + 1):
            view.step({**METRICS, "seconds": 10.0, "step": at}, skipped=0)
    assert f"about {left} left" in file.getvalue().splitlines()[-1]


def test_a_slow_first_step_is_soon_forgotten():
    file = io.StringIO()
    with LiveView(Console(file=file, width=200), "run", 0, 100) as view:
        for at in range(1, 41):
            view.step({**METRICS, "seconds": 1.0 if at > 1 else 500.0, "step": at}, skipped=0)
    assert "about 1 min 0 s left" in file.getvalue().splitlines()[-1]


def test_durations_have_two_units_at_most():
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 7500)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 5 min",
    ]


def test_without_a_terminal_there_are_plain_lines(tiny_sdxl):
    out = draftp("train", "--preset", recipe(tiny_sdxl), "--output", "run").out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 4
    assert all("reward" in line and "images/s" in line for line in steps)
    assert "\x1b" not in out


def test_a_real_terminal_gets_the_live_view(tiny_sdxl):
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer={"val_check_interval": 2})
    terminal, other_end = pty.openpty()

    def run():
        os.dup2(other_end, 1)
        os.environ.update(TERM="xterm-256color", COLUMNS="140", LINES="40")
        with open(1, "w", encoding="utf-8", closefd=False) as out:
            sys.stdout = out
            with mock.patch.object(sys, "argv", ["draftp", "train", "--preset", str(preset), "--output", "run"]):
                main()
            out.flush()

    status = in_child(run)
    os.close(other_end)
    shown = b""
    try:
        while piece := os.read(terminal, 65536):
            shown += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(terminal)
    text = shown.decode("utf-8")
    assert status == 0
    assert "\x1b[" in text
    for words in ("step 4/4", "reward", "saved at 4", "validation after step 4", "weights", str(Path("run/final"))):
        assert words in text
