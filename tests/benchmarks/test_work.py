"""Work and memory of a training step at toy size, held against stored figures that no machine changes.

After a change that means to alter them: python benchmarks/work.py --baselines tests/benchmarks/work.json
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import work

STORED = json.loads((Path(__file__).parent / "work.json").read_text(encoding="utf-8"))
QUICK = {"toy, as it is", "toy, draftp.prefix_steps 10"}
CASES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow(reason="more of the same")) for name in STORED
]


@pytest.mark.parametrize("name", CASES)
def test_no_figure_has_become_worse_or_out_of_date(name):
    found = work.of_the_toy(name.removeprefix("toy, "))
    changes = {what: found[what] / was - 1 for what, was in STORED[name].items()}
    told = [
        f"{name}: {what} {STORED[name][what]:.4g} -> {found[what]:.4g} ({change:+.1%})"
        for what, change in changes.items()
        if abs(change) > (0.02 if what == "MB at the peak" else 1e-6)
    ]
    assert not told, "; ".join(told)
