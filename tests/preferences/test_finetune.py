"""Fine-tuning a CLIP on preferences: PickScore's loss by hand, resume bit for bit, and the folders that are left."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import draftcli
from draftcli.errors import InputError
from draftcli.preferences.finetune import FineTuning, PairScores, finetune, split_groups
from draftcli.preferences.reading import read_answers
from draftcli.progress import Activity
from draftcli.rewards import load_reward
from draftcli.toy.reward import toy_reward
from tests.command import draftp
from tests.preferences.people import rate

PAIRS = 30
QUICK = FineTuning(epochs=2, batch_size=8, lr=1e-3, rank=2)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tie, and a prompt that has two pairs."""
    file = rate(tmp_path_factory.mktemp("rated"), PAIRS, repeats=4)
    items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    items[5]["answer"] = "neither"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return file


def test_loss_and_gradient_are_pickscores_by_hand(rated: Path) -> None:
    """Logits by transformers' own forward, the loss as Kirstain et al. wrote it: labels, ties, weights by prompt."""
    answers = read_answers(rated)
    rows = [0, 3, 5, 8, 1, 2, 7, 4, 6, 9, 30, 31]
    some = answers.only([i in rows for i in range(len(answers.answers))])
    clip = toy_reward()
    clip.clip.requires_grad_(True)
    ours = PairScores(clip, some).backward(torch.arange(len(some.answers)).numpy())
    gradient = clip.clip.text_projection.weight.grad.clone()

    clip.clip.zero_grad()
    total = shares = 0.0
    for answer in some.answers:
        share = 1 / sum(other.prompt == answer.prompt for other in some.answers)
        tokens = clip.tokenizer([answer.prompt], padding="max_length", return_tensors="pt")
        pixels = [torch.from_numpy(np.array(shown.picture())) for shown in (answer.first, answer.second)]
        pixels = torch.stack(pixels).movedim(-1, 1) / 255 * 2 - 1
        probabilities = clip.clip(**tokens, pixel_values=pixels).logits_per_text[0].softmax(0)
        loss = -(answer.label * probabilities[0].log() + (1 - answer.label) * probabilities[1].log())
        total, shares = total + share * loss, shares + share
    loss = total / shares
    loss.backward()
    assert any(answer.label == 0.5 for answer in some.answers)
    assert shares < len(some.answers), "a prompt has two pairs"
    assert ours == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, clip.clip.text_projection.weight.grad, rtol=1e-3, atol=1e-6)


class Interrupting(Activity):
    """Ctrl-C in the second epoch."""

    def update(self, text: str) -> None:
        if text.startswith("epoch 2") and "batch 2" in text:
            raise KeyboardInterrupt


@pytest.mark.parametrize("train", ["lora", "whole"])
def test_a_killed_training_goes_on_to_the_same_weights(train: str, rated: Path) -> None:
    answers = read_answers(rated)
    settings = FineTuning(**{**QUICK.__dict__, "train": train})

    def run(state: str, activity: Activity) -> dict[str, torch.Tensor]:
        trained = finetune(toy_reward(), answers, settings, {"of": "this"}, Path(state), activity)
        Path(state, "saved").mkdir(parents=True)
        trained.save(Path(state, "saved"))
        (weights,) = Path(state, "saved").glob("*.safetensors")
        return {**load_file(weights), "odds": trained.odds}

    whole = run("whole", Activity())
    with pytest.raises(KeyboardInterrupt):
        run("killed", Interrupting())
    assert json.loads(Path("killed/state.json").read_text(encoding="utf-8"))["epoch"] == 1
    again = run("killed", Activity())
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_another_training_does_not_go_on_from_it(rated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = read_answers(rated)
    with pytest.raises(KeyboardInterrupt):
        finetune(toy_reward(), answers, QUICK, {"of": "this"}, Path("state"), Interrupting())
    finetune(toy_reward(), answers, QUICK, {"of": "that"}, Path("state"), Activity())
    assert "an unfinished training of other preferences or settings is replaced" in capsys.readouterr().err


def test_it_stops_early_and_keeps_the_best(rated: Path) -> None:
    answers = read_answers(rated)
    settings = FineTuning(**{**QUICK.__dict__, "train": "whole", "lr": 1.0, "epochs": 9, "patience": 1})
    clip = toy_reward()
    trained = finetune(clip, answers, settings, {}, Path("state"), Activity())
    losses, best = trained.states["validation_losses"], trained.states["best_epoch"]
    assert losses[best] == min(losses)
    assert trained.states["epochs"] == best + 1 < 9, "at a rate far too high the next epoch is soon worse"
    validation = split_groups(answers.groups, settings.seed, "p").validation
    assert PairScores(clip, answers).loss(validation) == pytest.approx(min(losses)), "what is left is the best"


@pytest.mark.parametrize("count", [3, 10, 200])
def test_prompts_are_on_one_side_of_the_split(count: int) -> None:
    groups = torch.arange(count).repeat(3).numpy()
    split = split_groups(groups, 0, "p")
    parts = [set(groups[rows]) for rows in (split.training, split.validation, split.test)]
    assert set.union(*parts) == set(range(count))
    assert sum(map(len, parts)) == count
    assert len(parts[2]) == max(1, round(0.2 * count))
    with pytest.raises(InputError, match="2 prompts cannot be split"):
        split_groups(groups % 2, 0, "p")


@pytest.mark.parametrize("train", ["lora", "whole"])
def test_the_command_leaves_a_reward_by_its_path(train: str, rated: Path) -> None:
    result = draftp("rewards", "train", rated, "--train", train, "--epochs", 2, "--lr", 1e-3, "--output", "mine")
    assert result.code == 0, result.err
    report = json.loads(Path("mine/report.json").read_text(encoding="utf-8"))
    assert (report["trained"], report["epochs"]) == (train, 2)
    assert report["split"]["test"] == report["held_out"]["agreement"]["n"]
    assert not list(Path().glob(".mine*")), "nothing is left of how it went"
    assert not list(Path("mine").glob("*.bin"))
    reward = load_reward("./mine")
    images, prompts = torch.rand(2, 3, 64, 64), ["a red star", "a large blue circle"]
    assert not torch.allclose(reward(images, prompts), toy_reward()(images, prompts), atol=1e-3)
    lines = [json.loads(line) for line in Path("mine/held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = {answer.called: answer for answer in read_answers(rated).answers}
    for line in lines[:2]:
        answer = answers[line["at"]]
        shown = [torch.from_numpy(np.array(s.picture())) for s in (answer.first, answer.second)]
        scores = reward(torch.stack(shown).movedim(-1, 1) / 255, [answer.prompt] * 2)
        assert float(scores[0] - scores[1]) == pytest.approx(line["log_odds"], abs=1e-3), (
            "what was judged is what is left"
        )
    checked = draftp("rewards", "check", "./mine", "--size", "64x64")
    assert checked.code == 0, checked.out
    relative = draftcli.load_config("toy", ["rewards={./mine: {relative: {positive: Good, negative: Bad}}}"])
    assert draftcli.get_reward_model(relative)(images, prompts).shape == (2,)
    if train == "whole":
        assert load_reward("clip", "mine")(images, prompts).abs().max() <= 1, "a CLIP in transformers' format"
        again = draftp("rewards", "train", rated, "--from", "./mine", "--output", "head")
        assert again.code == 0, again.err
        assert math.isfinite(float(load_reward("./head")(images, prompts).sum()))


def test_settings_without_effect_are_said(rated: Path) -> None:
    result = draftp("rewards", "train", rated, "--epochs", 2, "--rank", 4)
    assert "warning: --epochs has no effect with --train head" in result.err
    assert "warning: --rank has no effect with --train head" in result.err
    assert draftp("rewards", "train", rated, "--train", "forest").code == 2
