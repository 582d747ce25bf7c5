"""The monitor's bench: what it would have done in a run is found without the oracle, which says how late it was."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from stops import JOBS, ORACLE, replay, table


def result(means: list[tuple[float, float, float]]) -> dict:
    """A job's file; trained reward, held-out one and oracle after 0, 5, 10, ... steps."""
    lines = []
    for i, each in enumerate(means):
        rewards = {
            name: {"base": 1.0, "tuned": mean, "difference": mean - 1, "low": mean - 1.1, "high": mean - 0.9}
            for name, mean in zip(("toy", "toy_judge", ORACLE), each, strict=True)
        }
        lines.append({"step": 5 * i, "images": 8, "rewards": rewards, "diversity": {}})
    job = {"name": "hacked_1", "is_hacked": True, "frozen": False, "settings": ["a=1"], "held_out": "toy_judge"}
    return {**job, "lines": lines}


HACKED = [(1.0, 1.0, 0.7), (1.5, 1.4, 0.74), (2.0, 1.5, 0.73), (2.5, 1.2, 0.6), (3.0, 0.9, 0.5)]


@pytest.mark.parametrize(
    ("patience", "stop", "lost_there"),
    [(1, 15, 0.14), (2, 20, 0.24), (3, None, None)],
)
def test_a_run_is_replayed_without_the_oracle(patience, stop, lost_there):
    found = replay(result(HACKED), patience)
    assert (found.stop, found.peak) == (stop, 5)
    if stop is not None:
        assert found.final == 10
        assert found.lost(found.final) == pytest.approx(0.01)
        assert found.lost(stop) == pytest.approx(lost_there)


def test_the_oracle_alone_stops_nothing():
    only_oracle_falls = [(t, 1 + t / 10, o) for t, _, o in HACKED]
    assert replay(result(only_oracle_falls)).stop is None


def test_the_table_counts_what_was_in_time():
    said = table([result(HACKED)], 1)
    assert (
        "| hacked 1 | before | `a=1` | toy_judge | 0.700 | 0.740 (5) | 0.500 | 15 | 0.600 | 10 | 0.730, 0.010 |" in said
    )
    assert "of 1 hacked runs 1 were ended, 1 of them with a final/ whose oracle is at most 0.02 under its peak" in said


def test_half_of_the_runs_are_made_after_the_rule_and_none_is_held_to_what_it_trains_on():
    for is_hacked in (True, False):
        of_kind = [job for job in JOBS if job.is_hacked is is_hacked]
        assert [sum(job.frozen is frozen for job in of_kind) for frozen in (False, True)] == [5, 5]
    assert all(f"{job.held_out}:" not in job.settings[0] for job in JOBS)
    assert len({job.name for job in JOBS}) == len({job.settings for job in JOBS}) == 20
