"""The lab of penalties: every training has a file of its own, settings that can be, and a row in the tables."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from held import ARMS, STAGES, Run, do, ends, runs_of, tables
from lab import gather, left

import draftcli
from draftcli.config import conflicts, without_effect


def test_every_training_has_a_file_of_its_own():
    runs = {run for steps in (90, 4) for stage in STAGES for run in runs_of(stage, [*ARMS], steps=steps)}
    assert len({run.name for run in runs}) == len(runs) > 100


@pytest.mark.parametrize("arm", ARMS)
def test_the_settings_of_an_arm_can_be(arm):
    cfg = draftcli.load_config("toy", ARMS[arm])
    assert list(conflicts(cfg)) == []
    assert without_effect(cfg) == []


@pytest.mark.slow(reason="two trainings of three steps, and six times 128 pictures")
def test_a_training_leaves_what_the_tables_need(tmp_path):
    runs = [Run("front", arm, 0, steps=3) for arm in ("gate_3", "min_3")]
    for run in runs:
        assert left([run], tmp_path) == [run]
        assert do(run, tmp_path).startswith(run.name)
        assert left([run], tmp_path) == []
    results = gather(tmp_path)
    assert [point["steps"] for point in results[runs[0].name]["curve"]] == [0, 1, 2, 3]
    assert all("kl_weight" in line for line in results[runs[0].name]["training"])
    rows = [line for line in tables(results, 1, 3) if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["gate_3", "min_3"]
    assert all(cell in rows[0] for cell in ends([results[runs[0].name]]))
