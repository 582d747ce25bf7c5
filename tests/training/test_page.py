"""training.html: what a run's own files say, as a page; and a page that cannot be written stops no run."""

import json
from pathlib import Path

import pytest
from PIL import Image

from draftcli.config import Config, dump_config
from draftcli.runs import Run
from draftcli.training.monitor import Monitor
from draftcli.training.page import find_alarms, train_page, write_train_page

REWARD, HELD_OUT = "brightness", "symmetry"


def line(step: int, trained: float, held_out: float, kept: float = 1.0) -> dict:
    def figures(value: float) -> dict:
        return {
            "base": 1.0, "tuned": value, "difference": value - 1, "low": value - 1.01, "high": value - 0.99, "n": 8,
        }  # fmt: skip

    diversity = {**figures(kept), "kept": kept, "kept_low": kept - 0.05, "kept_high": kept + 0.05}
    return {
        "step": step, "images": 8, "rewards": {REWARD: figures(trained), HELD_OUT: figures(held_out)},
        "diversity": diversity, "score": held_out, "training_reward": None,
    }  # fmt: skip


def step(number: int, **more: object) -> dict:
    return {
        "step": number,
        "reward": 0.5 + number / 10,
        "kl_penalty": 0.01 * number,
        "kl_coeff": 0.1,
        "grad_norm": 1.0,
        **more,
    }


HISTORY = [line(0, 1.0, 1.0), line(2, 1.2, 1.1), line(4, 1.4, 0.8, kept=0.5)]
STEPS = [step(1), step(2), step(3, skipped="gradient"), step(4)]


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(tmp_path / "<b>run")
    run.samples.mkdir(parents=True)
    cfg = Config.model_validate({"rewards": {REWARD: {"weight": 1.0}}, "held_out_rewards": {HELD_OUT: None}})
    run.config.write_text(dump_config(cfg), encoding="utf-8")
    for path, lines in ((run.validation, HISTORY), (run.metrics, STEPS)):
        path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    for number in (0, 2, 4):
        Image.new("RGB", (300, 200), "red").save(run.samples / f"step-{number:06d}-sheet.png")
    return run


def test_the_page_shows_what_the_run_wrote_down(run):
    html = train_page(run)
    assert "<b>run" not in html
    assert "&lt;b&gt;run: training" in html
    assert html.count('<svg class="plot"') == 7, (
        "two rewards, diversity, reward in training, KL and coefficient, gradient norm"
    )
    assert html.index("symmetry (held out)") < html.index("brightness (trained on)")
    assert "symmetry over the steps: 1.00 at step 0, 0.800 at step 4" in html
    assert [int(part.partition("<")[0]) for part in html.split("<summary>Step ")[1:]] == [4, 2, 0]
    assert "Step 4 of" in html
    assert "50.0 % (95 % interval 45.0 to 55.0) of the base" in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"


def test_a_reward_whose_lower_scores_are_wanted_got_better_where_it_fell_and_weight_0_is_held_out(run):
    weights = {REWARD: {"weight": 0.0}, HELD_OUT: {"weight": -1.0}}
    run.config.write_text(dump_config(Config.model_validate({"rewards": weights})), encoding="utf-8")
    html = train_page(run)
    assert f'{REWARD} <span class="tag ">held out</span>' in html
    assert f'{HELD_OUT} <span class="tag in">trained on, lower is better</span>' in html
    assert html.count('<td class="up">') == 2, "one rose and one fell, and both are better for it"


def test_a_change_whose_interval_has_no_width_is_neither_better_nor_worse(run):
    """All prompts changed alike: how far they might have been apart is not known."""
    same = {"base": 1.0, "tuned": 1.2, "difference": 0.2, "low": 0.2, "high": 0.2, "n": 8}
    last = {**HISTORY[-1], "rewards": {**HISTORY[-1]["rewards"], REWARD: same}}
    run.validation.write_text("".join(json.dumps(one) + "\n" for one in [*HISTORY[:-1], last]), encoding="utf-8")
    html = train_page(run)
    assert '<td class="">+0.200</td><td>none</td>' in html
    assert '<td class="down">\N{MINUS SIGN}0.200</td>' in html


def test_alarms_are_those_of_the_run_at_their_steps():
    monitor = Monitor.of(Config.model_validate({"rewards": {REWARD: 1.0}, "held_out_rewards": [HELD_OUT]}))
    assert find_alarms(HISTORY[:2], STEPS[:2], monitor) == []
    skipped, *found = find_alarms(HISTORY, STEPS, monitor)
    assert skipped == "step 3 was skipped"
    assert [text.partition(":")[0] for text in found] == ["step 4", "step 4"]
    assert "symmetry on held-out prompts fell by 0.3 against step 2" in found[0]
    assert "50.0 %" in found[1]


def test_an_alarm_is_at_the_top_and_what_the_monitor_saw_below_it(run):
    figures = {"base": 0.4, "tuned": 0.8, "difference": 0.4, "low": 0.3, "high": 0.5, "n": 8}
    last = {**HISTORY[-1], "signs": {"colour_entropy": figures}, "alarm": "symmetry fell <b>"}
    for more, words in (
        ({}, "<h3>Alarm</h3>"),
        ({"stopped": {"why": "", "final": 2}}, "after step 4; final/ is of step 2"),
    ):
        run.validation.write_text("".join(json.dumps(one) + "\n" for one in [*HISTORY[:-1], {**last, **more}]))
        html = train_page(run)
        assert words in html
        assert html.index("symmetry fell &lt;b&gt;.") < html.index("colour entropy")
        assert "+0.300 to +0.500" in html


def test_a_long_run_has_some_sheets_and_gaps_in_its_curves(run):
    for number in range(6, 60, 2):
        Image.new("RGB", (30, 20), "red").save(run.samples / f"step-{number:06d}-sheet.png")
    html = train_page(run)
    assert html.count("<summary>Step ") == 12
    reward = html[html.index("reward in training over") :]
    assert reward[: reward.index("</svg>")].count('class="curve"') == 2, "nothing is drawn through a skipped step"


@pytest.mark.parametrize("trouble", ["a folder in its place", "a damaged sheet", "settings that are none"])
def test_a_page_that_cannot_be_written_is_a_warning(run, trouble, capsys):
    if trouble == "a folder in its place":
        blocked = run.page.with_name(f".{run.page.name}.partial")
        blocked.symlink_to("/dev/full")
    elif trouble == "a damaged sheet":
        (run.samples / "step-000004-sheet.png").write_bytes(b"no picture")
    else:
        run.config.write_text("[", encoding="utf-8")
    write_train_page(run)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1
    assert "the training itself is not affected" in warning
    assert not Path(run.page).exists()
