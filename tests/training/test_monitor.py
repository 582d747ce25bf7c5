"""The monitor: its verdicts by tables, and runs that it ends, resumed, killed, in several processes."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from draftcli.config import MonitorConfig, load_config
from draftcli.runs import Run
from draftcli.training import session
from draftcli.training.log import complete_validation
from draftcli.training.monitor import Monitor, alarm_in_words, validation_score
from tests.command import WITH_VALIDATION, draftp, in_child, recipe
from tests.ranks import train_in_ranks

LORA = "pytorch_lora_weights.safetensors"
GREEN = "tests.example_rewards:green"


def line(step: int, trained: float, held_out: float, **more: object) -> dict:
    """A validation whose means have intervals 0.2 wide; the base's are 1."""
    rewards = {
        name: {"base": 1.0, "tuned": mean, "difference": mean - 1, "low": mean - 1.1, "high": mean - 0.9}
        for name, mean in (("trained", trained), ("held_out", held_out))
    }
    return {"step": step, "images": 8, "rewards": rewards, "diversity": {}, **more}


def lines(*means: tuple[float, float]) -> list[dict]:
    """Validations after 0, 5, 10, ... steps."""
    return [line(5 * i, *each) for i, each in enumerate(means)]


def monitor(**settings: object) -> Monitor:
    return Monitor(MonitorConfig.model_validate(settings), {"trained": 1.0}, ["held_out"])


SOUND = [(1.0, 1.0), (1.5, 1.3), (2.0, 1.5)]
FALLING = [*SOUND, (2.5, 1.2)]  # what is held out fell by 0.3 from step 10


@pytest.mark.parametrize(
    ("means", "settings", "stops", "final"),
    [
        (SOUND, {}, False, 10),
        (FALLING, {}, True, 10),
        (FALLING, {"final": "last"}, True, 15),
        (FALLING, {"stop": "never"}, False, 10),
        (FALLING, {"patience": 2}, False, 10),
        ([*FALLING, (2.6, 1.1)], {"patience": 2}, True, 10),
        ([*FALLING, (2.6, 1.5)], {"patience": 2}, False, 20),  # it was a bad validation
        # A fall beyond the interval, but of less than half of what had been gained.
        ([(1.0, 1.0), (1.5, 1.4), (2.0, 1.25)], {}, False, 10),
        ([(1.0, 1.0), (1.5, 1.4), (2.0, 1.15)], {}, True, 5),
        # The highest trained reward before the fall began, which is not the last one.
        ([(1.0, 1.0), (2.2, 1.3), (2.0, 1.5), (2.5, 1.2)], {}, True, 5),
        # Step 10 was an alarm itself, and is none to go back to.
        ([(1.0, 1.0), (1.5, 1.3), (2.5, 1.0), (1.5, 1.6), (2.6, 1.2)], {}, True, 5),
        # Every step made it worse: the first that there is.
        ([(1.0, 1.0), (1.5, 0.95), (2.0, 0.8)], {}, True, 5),
        ([(1.0, 1.0), (1.5, 0.8)], {}, True, 5),
    ],
)
def test_when_it_stops_and_what_it_goes_back_to(means, settings, stops, final):
    verdict = monitor(**settings).judge(lines(*means))
    assert (verdict.stops, verdict.final) == (stops, final)


def test_an_alarm_by_signs_goes_back_to_the_last_validation_without_one():
    far = {"base": 0.4, "tuned": 0.8, "low": 0.3, "high": 0.5}
    signs = {"saturation": far, "contrast": far}
    history = [line(0, 1.0, 1.0), line(5, 1.5, 1.05), line(10, 2.0, 1.0), line(15, 2.5, 1.05, signs=signs)]
    verdict = monitor().judge(history)
    assert (verdict.stops, verdict.final) == (True, 10)
    words = (
        "saturation is 2 times the base's, contrast is 2 times the base's, while trained, which was trained on, rose"
    )
    assert verdict.alarm.startswith(words)
    history[-1] = line(15, 2.5, 1.2, signs=signs)  # what is held out has surely risen as well
    assert monitor().judge(history).alarm is None


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_step_it_goes_back_to_was_always_among_those_it_kept(seed, patience):
    """Over histories of any course: a checkpoint that was let go is never asked for."""
    import random

    draw = random.Random(seed)
    history, kept, watch = [], set(), monitor(patience=patience)
    for i in range(30):
        history.append(line(5 * i, 1 + 0.1 * i + draw.uniform(-0.4, 0.4), 1 + draw.uniform(-0.5, 0.5)))
        needed = watch.may_need(history)
        assert needed <= kept | {5 * i}, "what was let go is gone"
        kept = needed
        verdict = watch.judge(history)
        if verdict.stops:
            assert verdict.final in kept
            return


def test_a_reward_whose_lower_scores_are_wanted_may_fall():
    history = [line(0, 1.0, 1.0), line(5, 0.5, 1.0), line(10, 0.2, 1.0)]
    watch = Monitor(MonitorConfig(), {"trained": -1.0}, ["held_out"])
    assert watch.alarms(history) == [None, None, None]
    assert watch.alarms([*history, line(15, 0.1, 0.5)])[-1].startswith(
        "held_out on held-out prompts fell by 0.5 against step 0 while -trained, which was trained on, rose"
    )


def test_a_reward_of_weight_0_is_a_judge_as_one_that_is_held_out():
    watch = Monitor(MonitorConfig(), {"trained": 1.0, "held_out": 0.0}, [])
    assert watch.alarms(lines(*FALLING))[-1] is not None


def test_what_could_not_be_measured_says_nothing():
    history = lines(*FALLING)
    history[-1]["rewards"]["held_out"] |= {"tuned": None, "low": None, "high": None}
    verdict = monitor().judge(history)
    assert (verdict.alarm, verdict.stops) == (None, False)
    assert alarm_in_words({**history[-1], "alarm": None}) is None
    history = [line(5 * i, math.nan, 1.0) for i in range(3)]
    assert monitor().judge(history).final == 5


@pytest.mark.parametrize(
    ("settings", "can_stop", "words"),
    [
        ([], True, "ends the run if it looks like reward hacking (held out: toy_oracle)"),
        (["held_out_rewards=[]"], False, "never ends the run, as held_out_rewards names nothing"),
        (["monitor.stop=never"], False, "never ends the run (monitor.stop=never)"),
        (["held_out_rewards=[]", "monitor.stop=hacking"], True, "(nothing is held out)"),
    ],
)
def test_by_default_it_ends_a_run_that_has_something_held_out(settings, can_stop, words):
    watch = Monitor.of(load_config("toy", settings))
    assert watch.can_stop is can_stop
    assert words in watch.announcement


# ------------------------------------------------------------------------------------------------------------ runs

# Trained on red and judged by green, its opposite: the first step makes it worse, and the second too.
HACKED = {
    "held_out_rewards": [GREEN],
    "data": {**WITH_VALIDATION, "validation_images": 4},
    "monitor": {"patience": 2},
}
EVERY_STEP = {"val_check_interval": 1, "save_interval": 8, "keep_checkpoints": 1, "max_steps": 8}


def train(preset: Path, output: str, *options: str, code: int = 0):
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == code, result.err
    return result


@pytest.fixture(scope="module")
def ended(tiny_sdxl, tmp_path_factory):
    """A run that its monitor ended, and its recipe."""
    folder = tmp_path_factory.mktemp("ended")
    preset = recipe(tiny_sdxl, folder / "tiny.yaml", **HACKED, trainer=EVERY_STEP, ema={"decay": 0.5})
    return folder / "run", preset, train(preset, folder / "run")


def copied(ended, output: str = "run") -> Path:
    shutil.copytree(ended[0], output)
    return ended[1]


def test_a_run_that_is_hacked_ends_by_itself_and_says_why(ended):
    folder, _, result = ended
    run = Run(folder)
    last = run.validations()[-1]
    assert last["step"] < 8
    stop = last["stopped"]
    assert stop["final"] < last["step"]
    assert (
        f"ended by its monitor after step {last['step']}, final/ is of step {stop['final']}: {GREEN} on" in result.out
    )
    assert "monitor: ends the run if it looks like reward hacking" in result.out
    assert "this looks like reward hacking" in result.err
    assert run.has_final(stop["final"])
    assert run.steps()[-1]["stopped"] == stop["why"]
    assert [step for step in run.steps() if "stopped" in step] == run.steps()[-1:]
    card = (run.final / "README.md").read_text(encoding="utf-8")
    assert f"{stop['final']} steps of 2 images" in card
    assert f"The run was ended by its monitor after step {last['step']}" in card
    page = run.page.read_text(encoding="utf-8")
    assert f"Ended by the monitor after step {last['step']}; final/ is of step {stop['final']}" in page
    assert "batch spread" in page
    assert {step.name for step in run.checkpoints()} == {f"step-{step:06d}" for step in (last["step"], stop["final"])}


def test_final_is_what_a_run_of_so_many_steps_has(ended):
    """The average of the weights at the chosen step, not that of the step it ended at."""
    folder, preset, _ = ended
    final = Run(folder).stopped()["final"]
    train(preset, "short", "--set", f"trainer.max_steps={final}", "--set", "monitor.stop=never")
    one, other = (load_file(path / "final" / LORA) for path in (folder, Path("short")))
    assert all(one[name].equal(other[name]) for name in one)


def test_its_state_is_listed(ended):
    listed = draftp("runs", ended[0], "--json")
    assert json.loads(listed.out)[0]["state"] == "ended by its monitor"


def test_to_go_on_it_must_be_said(ended):
    preset, run = copied(ended), Run(Path("run"))
    last = run.validations()[-1]
    refused = train(preset, "run", code=2)
    assert refused.err.count("\n") == 1
    assert "was ended by its monitor" in refused.err
    assert "--set monitor.stop=never" in refused.err
    result = train(preset, "run", "--set", "monitor.stop=never")
    assert f"resuming run after step {last['step']}" in result.out
    assert "finished 8 steps" in result.out
    assert run.has_final(8)
    assert [line["step"] for line in run.validations()] == list(range(9))
    assert "is finished (8 steps)" in train(preset, "run", "--set", "monitor.stop=never").out


def test_final_may_be_of_the_last_step(ended):
    train(ended[1], "run", "--set", "monitor.final=last")
    run = Run(Path("run"))
    assert run.stopped()["final"] == run.validations()[-1]["step"]
    assert run.has_final(run.stopped()["final"])


def test_a_kill_before_final_is_written_is_made_good(ended, monkeypatch):
    preset = ended[1]

    def die() -> None:
        session.write_final = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        train(preset, "run")

    assert os.WTERMSIG(in_child(die)) == signal.SIGKILL
    run = Run(Path("run"))
    assert not run.final.exists()
    assert "ended by its monitor" in train(preset, "run").out
    whole = Run(ended[0])
    assert run.stopped() == whole.stopped()
    one, other = (load_file(found.final / LORA) for found in (whole, run))
    assert all(one[name].equal(other[name]) for name in one)
    assert [step.get("stopped") for step in run.steps()] == [step.get("stopped") for step in whole.steps()]


def test_a_run_in_parts_ends_at_the_same_step(ended):
    preset, whole = ended[1], Run(ended[0])
    train(preset, "run", "--set", "trainer.max_steps=1")
    train(preset, "run")
    assert Run(Path("run")).validations()[-1]["stopped"] == whole.stopped()


def test_two_processes_end_together(ended):
    preset, whole = ended[1], Run(ended[0])
    for code, said in train_in_ranks(2, preset, "run", "--set", "trainer.micro_batch_size=1"):
        assert code == 0, said
    run = Run(Path("run"))
    assert run.stopped()["final"] == whole.stopped()["final"]
    assert run.has_final(run.stopped()["final"])


def test_tensorboard_says_why(tiny_sdxl):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    preset = recipe(tiny_sdxl, **HACKED, trainer=EVERY_STEP, logging={"tensorboard": True})
    train(preset, "run")
    events = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0, "tensors": 0}).Reload()
    alarms = [point.value for point in events.Scalars("monitor/alarm")]
    assert alarms[0] == 0
    assert alarms[-1] == 1
    (text,) = events.Tensors("monitor/stopped/text_summary")
    assert Run(Path("run")).stopped()["why"].encode() in text.tensor_proto.string_val[0]


def test_settings_without_effect_are_said(tiny_sdxl):
    preset = recipe(tiny_sdxl, monitor={"patience": 2}, trainer={"max_steps": 1})
    assert "monitor.stop, patience and final have no effect without validation" in train(preset, "run").err


def test_rewards_in_training_are_not_compared_where_their_unit_moves(tmp_path):
    """A normalised reward is divided by statistics that move: the mean of one step says nothing beside another's."""
    cfg = load_config("toy", ["rewards={toy: {normalise: std}}"])
    run = Run(tmp_path)
    run.metrics.write_text('{"step": 1, "reward": 2.0, "reward_std": 1.0}\n')
    for given, expected in ((Monitor.of(cfg), None), (monitor(), 2.0)):
        now = line(1, 1.0, 1.0)
        complete_validation(now, run, given)
        assert now["training_reward"] == expected


def test_the_best_step_is_by_what_the_training_counts() -> None:
    """Which is not the sum of means where a reward is normalised or has a target; lines of older versions lack it."""
    history = lines(*SOUND, (2.0, 1.5))
    for one, worth in zip(history, (0.0, 2.0, 1.0, 1.5), strict=True):
        one["trained"] = {"base": 0.0, "tuned": worth}
    assert [validation_score(one, {"trained": 1.0}, ()) for one in history] == [0, 2, 1, 1.5]
    falling = [*history, line(20, 3.0, 0.5)]
    falling[-1]["trained"] = {"base": 0.0, "tuned": 9.0}
    assert monitor().judge(falling).final == 5
    for one in falling:
        del one["trained"]
    assert monitor().judge(falling).final == 10
