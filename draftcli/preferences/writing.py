"""The folder of a trained reward: config.json, weights, README.md, report.json, held_out.jsonl."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from draftcli.disk import disk_errors, write_aside
from draftcli.lines import json_line
from draftcli.preferences.agreement import Assessment, advice, agreement_table
from draftcli.preferences.pairs import Answers
from draftcli.rewards.folders import CONFIG, SECTION, RewardFolder

CARD, REWARD_REPORT, HELD_OUT_FILE = "README.md", "report.json", "held_out.jsonl"
WHAT = {
    "head": "A linear head (Bradley and Terry) on the frozen features of",
    "lora": "A LoRA, trained with PickScore's loss, of",
    "whole": "A CLIP, trained with PickScore's loss from",
}


@dataclass(frozen=True)
class TrainedReward:
    """What training gives.

    Attributes:
        save: writes weights, and where there is one the network's own config.json, into a folder.
        odds: (m,) log-odds of the held-out answers by rewards that have not seen their prompts.
        rows: (m,) which of the answers these are.
        curve: (m,) the same by rewards that were trained on so many answers, by their number.
        settings: of the training, for the report.
        states: of the training, for the report: what was chosen, when it stopped.
    """

    save: Callable[[Path], None]
    odds: Tensor
    rows: np.ndarray
    curve: dict[int, Tensor]
    settings: dict[str, Any]
    states: dict[str, Any]


def write_reward(
    output: Path, reward: RewardFolder, trained: TrainedReward, found: Assessment, preferences: Answers
) -> None:
    """Write the folder whole, or leave what was there.

    Raises:
        DraftpError: it cannot be written.
    """
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_aside(output, lambda folder: _fill(folder, output, reward, trained, found, preferences))


def _fill(
    folder: Path,
    output: Path,
    reward: RewardFolder,
    trained: TrainedReward,
    found: Assessment,
    preferences: Answers,
) -> None:
    folder.mkdir(exist_ok=True)
    trained.save(folder)
    config = folder / CONFIG
    own = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    _write_json(config, {**own, SECTION: reward.section()})
    facts = {
        "preferences": preferences.where,
        "pairs": len(preferences.answers),
        "ties": len(preferences.answers) - preferences.decided,
        "skipped": preferences.skipped,
        "left_out": list(preferences.left_out),
        "groups": len(np.unique(preferences.groups)),
        **reward.section(),
        "settings": trained.settings,
        **trained.states,
        "held_out": found.figures(),
        "advice": advice(found, len(preferences.answers)),
    }
    _write_json(folder / REWARD_REPORT, facts)
    (folder / CARD).write_text(_card(output, reward, found, preferences), encoding="utf-8")
    with (folder / HELD_OUT_FILE).open("w", encoding="utf-8") as file:
        for row, odds in zip(trained.rows.tolist(), trained.odds.tolist(), strict=True):
            answer = preferences.answers[row]
            file.write(json_line({
                "at": answer.called, "prompt": answer.prompt, "first": answer.first.name,
                "second": answer.second.name, "answer": answer.label, "log_odds": round(odds, 6),
            }))  # fmt: skip


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(output: Path, reward: RewardFolder, found: Assessment, preferences: Answers) -> str:
    start = reward.start.pretrained or reward.start.reward
    rows = "\n".join(f"| {name} | {words} |" for name, words in agreement_table(found))
    bins = "\n".join(f"| {b.sure:.2f} | {b.right:.2f} | {b.n} |" for b in found.calibration)
    notes = "\n".join(f"- {text}" for text in advice(found, len(preferences.answers)))
    prompt = "the prompt matters" if any(answer.prompt for answer in preferences.answers) else "it has no prompts"
    return f"""---
tags:
- draftp
- reward-model
- text-to-image
---

# {output.resolve().name}: a reward trained on one person's preferences

{WHAT[reward.trained]} `{start}`, trained on {len(preferences.answers)} choices between two images. It is the taste of
whoever made them and of nobody else, on images of their kind; {prompt}. The difference of two scores is the
logarithm of the odds that the one is preferred.

```bash
draftp rewards check {shlex.quote(f"./{output.name}")}
draftp train --preset sdxl-lora --reward {shlex.quote(f"./{output.name}=1.0")}
```

## How well it agrees

On answers that it has not seen, with 95 % intervals. Answers of one prompt were never on both sides of the split, and
each prompt counts alike.

| | |
|---|---|
{rows}

How sure it is, and how often it is right then (a tie counts half):

| sure | right | pairs |
|---|---|---|
{bins}

{notes}

The licence of `{start}` holds for what was made from it. More: `report.json`; every held-out answer: `held_out.jsonl`.
"""
