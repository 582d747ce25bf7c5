"""Is AIG on the Pareto front of reward and diversity, as its paper says? In the toy world, where the truth is known.

    python benchmarks/aig_front.py train runs/front      # the runs below; those that are there are not trained again
    python benchmarks/aig_front.py eval runs/front       # draws, measures, writes runs/front/eval and two plots

Method. One run per KL coefficient, and the two that benchmarks/held.py found best, everything else as in the
preset `toy`. The run without KL is shown at every annealing weight and LoRA scale below, the others as they are.
Prompts are held-out scenes of which only shape and colour are named, so that size, place and background are free: in
whole captions diversity would be mistakes. Diversity is measured on the oracle's own reading of the pictures
(draftcli/toy/features.py); `--features toy` takes the learned reward's own CLIP, in which cheating looks varied. Every
point has a 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from held import ARMS

COEFFICIENTS = {f"kl-{kl}": [f"draftp.kl_coeff={kl}"] for kl in (0, 3, 6, 12, 30)}
RUNS = {**COEFFICIENTS, "gate-12": ARMS["gate_12"], "min-3": ARMS["min_3"]}
WEIGHTS = ("linear", "power_2", "power_4", "step_0.3", "step_0.6", "cosine")
SCALES = (0.25, 0.5, 0.75)


def train(folder: Path, steps: int) -> None:
    for name, settings in RUNS.items():
        if (folder / name / "final").is_dir():
            continue
        every = [*settings, f"trainer.max_steps={steps}", "trainer.val_check_interval=0"]
        options = [part for setting in every for part in ("--set", setting)]
        _draftp("train", "--preset", "toy", *options, "--output", folder / name)


def evaluate(folder: Path, prompts: int, images: int, features: str) -> None:
    from draftcli.cli.console import literal_console
    from draftcli.evaluation.evaluate import Request
    from draftcli.evaluation.evaluate import evaluate as run_evaluation
    from draftcli.evaluation.plot import scatter
    from draftcli.evaluation.report import reward_label, reward_points
    from draftcli.toy.world import COLOURS, SHAPES, Scene, caption

    scenes = [caption(Scene(shape, colour)) for shape in SHAPES for colour in COLOURS]
    file = folder / "prompts.txt"
    file.write_text("\n".join(scenes[:: max(1, len(scenes) // prompts)][:prompts]) + "\n", encoding="utf-8")
    annealed, *plain = RUNS
    others = [folder / "pictures" / name for name in plain]
    for name, pictures in zip(plain, others, strict=True):  # as folders of pictures they are one column each
        _draftp("sample", folder / name, "--prompts", file, "--num-images", images, "--output", pictures)
    request = Request(
        names=[str(folder / annealed), *map(str, others)],
        weights=WEIGHTS,
        scales=SCALES,
        prompts=str(file),
        images=images,
        features=features,
        output=folder / "eval",
    )
    result = run_evaluation(request, literal_console())
    assert result is not None  # one process, so this is the main one
    for reward in result.comparison.rewards:
        path = folder / f"aig-front-{reward}.svg"
        points, label = reward_points(result.comparison, reward), reward_label(result.comparison, reward)
        path.write_text(scatter(points, "diversity kept, % of base", label, base_lines=True), encoding="utf-8")
        print(path, "front:", ", ".join(result.comparison.fronts[reward]))


def _draftp(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "draftcli", *map(str, arguments)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "eval"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--features", default="draftcli.toy.features:reading")
    given = parser.parse_args()
    if given.step == "train":
        train(given.folder, given.steps)
    else:
        evaluate(given.folder, given.prompts, given.images, given.features)
