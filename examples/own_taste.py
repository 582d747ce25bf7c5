"""From somebody's choices to pictures that follow them, in the toy world, where the somebody is a function.

A person with a stated doubt is shown pairs of the toy's pictures and says which is better; `draftp rewards train`
learns a reward from the answers; `draftp train` tunes the toy to it; and because the person is a function, how far the
new pictures please them is measured, not guessed.

    python examples/own_taste.py circle runs/taste --person oracle
    python examples/own_taste.py circle runs/taste --person warm
    python examples/own_taste.py pairs runs/taste

`oracle` is the toy world's truth: who likes what fits the caption. `warm` is another taste: warm colours and large
shapes, whatever the caption; their captions leave size and background open. `pairs` measures how many pairs are worth
it: the agreement of rewards that were trained on 50 to 800. Needs no network; minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import draftcli
from draftcli.cli.console import literal_console
from draftcli.preferences.train import TrainReport, TrainRequest, train_on_preferences
from draftcli.rating.pairs import pairs_in_folder
from draftcli.rating.server import served
from draftcli.rating.session import RatingSession
from draftcli.rating.storage import PREFERENCES, open_preferences
from draftcli.toy import oracle
from draftcli.toy.person import rate_pairs
from draftcli.toy.world import Scene, caption, held_out_scenes, training_scenes

PAIRS = (50, 100, 200, 400, 800)
APART = 0.05  # in the person's own score: pairs that are further apart are those on which agreement is asked
Taste = Callable[[Tensor, list[str]], Tensor]


def warm_and_large(images: Tensor, prompts: list[str]) -> Tensor:
    """How much more red there is than blue, and how large the shape is: scores (B,), about 0 to 1.5."""
    warmth = (images[:, 0] - images[:, 2]).mean((1, 2)).cpu()
    return 3 * warmth + oracle.read_pictures(images).radius / 20


class WarmPerson:
    """`warm_and_large` as a reward that only judges: examples/own_taste.py:WarmPerson."""

    name = "warm"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        return warm_and_large(images, prompts).to(images)


@dataclass(frozen=True)
class Person:
    """Somebody who looks at pictures.

    Attributes:
        taste: the score that decides.
        doubt: of two pictures the better is chosen with the probability sigmoid(lead / doubt).
        judge: the same taste as a reward.
        shorten: what the person asks for, from a scene of the toy world.
    """

    taste: Taste
    doubt: float
    judge: str
    shorten: Callable[[Scene], Scene]

    def prefers_first(self, first: Tensor, second: Tensor, prompts: list[str], seed: int) -> np.ndarray:
        """(n,) whether the first of two pictures (n, 3, H, W) is chosen."""
        lead = (self.taste(first, prompts) - self.taste(second, prompts)).double()
        return np.random.default_rng(seed).random(len(prompts)) < torch.sigmoid(lead / self.doubt).numpy()


PEOPLE = {
    "oracle": Person(oracle.oracle_score, 0.05, "toy_oracle", lambda scene: scene),
    "warm": Person(
        warm_and_large,
        0.05,
        f"{__file__}:WarmPerson",
        lambda scene: Scene(scene.shape, scene.colour, place=scene.place),
    ),
}


@dataclass(frozen=True)
class Drawn:
    """Two pictures of every prompt.

    Attributes:
        prompts: n of them.
        files: of the first and of the second pictures, n each.
    """

    prompts: list[str]
    files: tuple[list[Path], list[Path]]

    def images(self, side: int) -> Tensor:
        """(n, 3, 64, 64) in [0, 1]."""
        pixels = np.stack([np.array(Image.open(file)) for file in self.files[side]])
        return torch.from_numpy(pixels).movedim(-1, 1).float() / 255


def captions(person: Person, scenes: Sequence[Scene], count: int) -> list[str]:
    """The first `count` different captions that the person asks for."""
    return list(dict.fromkeys(caption(person.shorten(scene)) for scene in scenes))[:count]


def draw(prompts: list[str], folder: Path, pairs: int = 1) -> Drawn:
    """So many pairs of each prompt, of two seeds each, by the toy's base, as `draftp sample --model toy` draws them."""
    draftcli.sample(prompts=prompts, model="toy", images=2 * pairs, seed=1, batch_size=64, output=folder)
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    by_prompt: dict[str, list[Path]] = {prompt: [] for prompt in prompts}
    for line in lines:
        if line["prompt"] not in by_prompt:  # of an earlier call with more prompts
            continue
        by_prompt[line["prompt"]].append(folder / line["file"])
    asked = prompts * pairs
    files = [
        [by_prompt[prompt][2 * (number // len(prompts)) + side] for number, prompt in enumerate(asked)]
        for side in range(2)
    ]
    return Drawn(asked, (files[0], files[1]))


def rate(person: Person, drawn: Drawn, file: Path, seed: int = 0) -> None:
    """Write the person's answers as `draftp rate` does, the sides drawn by chance."""
    chosen = person.prefers_first(drawn.images(0), drawn.images(1), drawn.prompts, seed)
    swapped = np.random.default_rng([seed, 1]).random(len(chosen)) < 0.5
    with file.open("w", encoding="utf-8") as out:
        for i, prompt in enumerate(drawn.prompts):
            sides = [
                {"picture": str(files[i].relative_to(file.parent)), "seed": 1 + number}
                for number, files in enumerate(drawn.files)
            ]
            left, right = reversed(sides) if swapped[i] else sides
            answer = "left" if chosen[i] != swapped[i] else "right"
            line = {"prompt": prompt, "left": left, "right": right, "answer": answer, "seconds": 0.0, "repeats": False}
            out.write(json.dumps(line) + "\n")


def rate_on_page(person: Person, pictures: Path, output: Path, count: int, seed: int = 0) -> Path:
    """Answer on the page of `draftp rate`, by the requests that a browser makes; returns the file of answers."""

    def choose(left: Image.Image, right: Image.Image, prompt: str) -> str:
        images = [torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 255 for picture in (left, right)]
        lead = float(person.taste(images[0], [prompt]) - person.taste(images[1], [prompt]))
        return "left" if chance.random() < 1 / (1 + np.exp(-lead / person.doubt)) else "right"

    chance = np.random.default_rng(seed)
    pairs = pairs_in_folder(pictures, "base", count, seed)
    (output / PREFERENCES).unlink(missing_ok=True)
    with open_preferences(output) as preferences:
        session = RatingSession(preferences, len(pairs), seed)
        session.add(pairs)
        with served(session) as address:
            rate_pairs(address, choose, finish=False)
    return output / PREFERENCES


def learn(file: Path, folder: Path) -> TrainReport:
    """`draftp rewards train FILE --from toy --output FOLDER`."""
    return train_on_preferences(TrainRequest(file, folder, start="toy", overwrite=True), literal_console(quiet=True))


@torch.no_grad()
def agreement(reward: Any, person: Person, drawn: Drawn) -> dict[str, float]:
    """How often reward and person prefer the same of two pictures that are more than APART apart to the person."""
    images = [drawn.images(side) for side in range(2)]
    scores, truth = ([judge(i, drawn.prompts).double() for i in images] for judge in (reward, person.taste))
    lead = truth[0] - truth[1]
    apart = lead.abs() > APART
    same = (scores[0] - scores[1])[apart] * lead[apart] > 0
    return {"agreement": float(same.double().mean()), "pairs": int(apart.sum())}


def circle(output: Path, name: str, pairs: int, steps: int, held_out: int = 200) -> dict[str, Any]:
    """Rate, learn, tune, and look whether the person is pleased.

    Returns:
        The reward's own report, its agreement with the person on captions that neither training has seen, and what the
        tuning changed in the person's score, with its paired interval.
    """
    person, folder = PEOPLE[name], output / name
    began = time.monotonic()
    drawn = draw(captions(person, training_scenes(), pairs), folder / "pictures")
    report = learn(rate_on_page(person, folder / "pictures", folder, pairs), folder / "my-taste")
    unseen = draw(captions(person, held_out_scenes(), held_out), folder / "unseen")
    reward = str(folder / "my-taste")
    figures: dict[str, Any] = {
        "person": name, "pairs": len(drawn.prompts), "doubt": person.doubt,
        "report": report.found.figures(),
        "unseen": agreement(draftcli.get_reward_model(reward), person, unseen),
        "unseen, the toy's learned reward": agreement(draftcli.get_reward_model("toy"), person, unseen),
    }  # fmt: skip
    figures["tuned"] = tune(person, reward, folder / "run", steps)
    figures["seconds"] = time.monotonic() - began
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def tune(person: Person, reward: str, run: Path, steps: int) -> dict[str, Any]:
    """`draftp train --preset toy --reward FOLDER=1.0`, and the person's score of the base's pictures and the tuned."""
    prompts = [captions(person, scenes, count) for scenes, count in ((training_scenes(), 400), (held_out_scenes(), 64))]
    cfg = draftcli.load_config(
        "toy",
        [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", f"trainer.save_interval={steps}"],
        {
            "rewards": {reward: 1.0},
            "held_out_rewards": [person.judge],
            "data.prompts": prompts[0],
            "data.validation_prompts": prompts[1],
        },
    )
    draftcli.train(cfg, run)
    last = (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(last)["rewards"][person.judge]


def how_many_pairs(output: Path, name: str, seeds: int = 3) -> dict[str, Any]:
    """Agreement with the person on unseen captions by how many pairs the reward was trained on."""
    person, folder = PEOPLE[name], output / name
    asked = captions(person, training_scenes(), max(PAIRS))
    drawn = draw(asked, folder / "pictures", pairs=-(-max(PAIRS) // len(asked)))
    unseen = draw(captions(person, held_out_scenes(), 240), folder / "unseen")
    prompts = drawn.prompts
    rows = []
    for count in PAIRS:
        found = []
        for seed in range(seeds):
            order = np.random.default_rng([seed, 2]).permutation(len(prompts))[:count]
            some = Drawn([prompts[i] for i in order], tuple([files[i] for i in order] for files in drawn.files))  # pyright: ignore[reportArgumentType]
            file = folder / "some.jsonl"
            rate(person, some, file, seed)
            report = learn(file, folder / "some")
            found.append({
                "unseen": agreement(draftcli.get_reward_model(str(folder / "some")), person, unseen)["agreement"],
                "own answers": report.found.agreement.mean,
            })  # fmt: skip
        rows.append({"pairs": count, **{key: [f[key] for f in found] for key in found[0]}})
        print(json.dumps(rows[-1]), flush=True)
    figures = {
        "person": name, "doubt": person.doubt, "rows": rows,
        "the toy's learned reward": agreement(draftcli.get_reward_model("toy"), person, unseen),
    }  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["circle", "pairs"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--person", choices=list(PEOPLE), default="oracle")
    parser.add_argument("--pairs", type=int, default=300, help="of the circle")
    parser.add_argument("--steps", type=int, default=60, help="of the tuning")
    options = parser.parse_args(arguments)
    if options.what == "circle":
        print(json.dumps(circle(options.output, options.person, options.pairs, options.steps), indent=2))
    else:
        how_many_pairs(options.output, options.person)


if __name__ == "__main__":
    main()
