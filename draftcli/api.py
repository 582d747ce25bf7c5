"""The commands as functions, for scripts and notebooks: nothing is printed but warnings, and libraries stay quiet.

They call what the commands call. What the user gave wrong is raised as `draftcli.errors.InputError`, before torch is
imported for it where that can be seen; what went wrong otherwise is a `DraftpError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcli.runs import Run, find_run

if TYPE_CHECKING:
    from draftcli.config import Config
    from draftcli.evaluation.evaluate import EvaluationResult
    from draftcli.sampling.job import DrawingResult
    from draftcli.sampling.source import DrawingSource
    from draftcli.training.result import TrainingResult

StrPath = str | Path
Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total): what goes on, such as "drawing", and how much of it is done."""


def train(
    cfg: Config,
    output: StrPath,
    *,
    progress: Progress | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Run, or resume, the training that `cfg` describes, as `draftp train` does.

    Ctrl-C, or a notebook's button that interrupts, stops it after the present step; the same call again goes on.

    Args:
        cfg: the settings, from `draftcli.load_config`.
        output: the run's folder; need not exist yet.
        progress: called after each step with "training", the steps taken and `trainer.max_steps`.
        on_step: called after each step with its line of metrics.jsonl, such as `line["reward"]`.

    Returns:
        how it ended, the last validation, and the files that were written.

    Raises:
        InputError: settings, prompts, model or folder are wrong, or another process is writing there.
        DraftpError: the disk refuses, or something was not finite three times in a row.
    """
    from draftcli.training.starting import check_start

    folder = Path(output)
    check_start(cfg, folder)
    from draftcli.cli.console import literal_console
    from draftcli.config import without_effect
    from draftcli.errors import warn
    from draftcli.quiet import quiet_libraries

    def after_step(line: dict[str, Any]) -> None:
        if progress is not None:
            progress("training", line["step"], cfg.trainer.max_steps)
        if on_step is not None:
            on_step(line)

    with quiet_libraries():
        from draftcli.planning.plan import following_init_from
        from draftcli.training.loop import train as run_training

        cfg = following_init_from(cfg)
        for text in without_effect(cfg):
            warn(text)
        return run_training(cfg, folder, literal_console(quiet=True), after_step)


def sample(
    run: StrPath | None = None,
    prompts: Sequence[str] | StrPath | None = None,
    *,
    model: str | None = None,
    loras: Sequence[str] = (),
    overrides: Sequence[str] = (),
    base: bool = False,
    images: int = 1,
    seed: int | None = None,
    batch_size: int | None = None,
    suffix: str = "png",
    output: StrPath | None = None,
    progress: Progress | None = None,
) -> DrawingResult:
    """Draw pictures from a run, or from any model with any LoRAs, as `draftp sample` does.

    What is there already is not drawn again.

    Args:
        run: a run's folder or one of its checkpoints; None and no `model`: the newest run under runs/.
        prompts: a list of texts; or, as one text, a file, a built-in set or a dataset. None: the run's validation
            prompts.
        model: instead of a run: a diffusers folder, hub id, .safetensors or toy.
        loras: PATH or PATH=SCALE, on top of the run's own or on the model.
        overrides: KEY=VALUE, as for `load_config`, such as `sampling.steps=10`.
        base: draw the base too, with the same seeds.
        images: pictures per prompt.
        seed: of a prompt's first picture, those after it count up; None: the run's.
        batch_size: pictures drawn together; None: by their size.
        suffix: png, jpg or webp.
        output: folder; None: in the run's folder, or the working directory.
        progress: called with "drawing", the pictures done and those in all.

    Returns:
        the pictures' files, and what was written beside them.

    Raises:
        InputError: no such run, model, LoRA or file, no prompts, or a setting that is not allowed.
        DraftpError: the disk refuses.
        Interrupted: by Ctrl-C; the same call again goes on.
    """
    from draftcli.sampling.source import find_source

    source = find_source(_text(run), model, loras, overrides)
    kinds = source.columns(base)
    how = {"images": images, "seed": seed, "batch_size": batch_size, "suffix": suffix}
    return _draw("sample", source, kinds, prompts, output, progress, how)


def anneal(
    run: StrPath | None = None,
    prompts: Sequence[str] | StrPath | None = None,
    *,
    weights: Sequence[str] = ("linear",),
    only: bool = False,
    stochastic: bool = False,
    model: str | None = None,
    loras: Sequence[str] = (),
    overrides: Sequence[str] = (),
    images: int = 1,
    seed: int | None = None,
    batch_size: int | None = None,
    suffix: str = "png",
    output: StrPath | None = None,
    progress: Progress | None = None,
) -> DrawingResult:
    """Draw with Annealed Importance Guidance, as `draftp anneal` does: base, the weights and tuned at the same seeds.

    Args:
        run: see `sample`; all that is not named here is as there.
        prompts: see `sample`.
        weights: annealing weights, such as linear or power_2 (docs/annealing.md); a column each.
        only: draw the weights only, without base and tuned beside them.
        stochastic: ask one network a step, drawn by the weight: half the price.
        model: see `sample`.
        loras: see `sample`.
        overrides: see `sample`.
        images: see `sample`.
        seed: see `sample`.
        batch_size: see `sample`.
        suffix: see `sample`.
        output: see `sample`.
        progress: see `sample`.

    Returns:
        the pictures' files, and what was written beside them.

    Raises:
        InputError: as in `sample`; nothing to anneal to, or an unknown weight.
        DraftpError: the disk refuses.
        Interrupted: by Ctrl-C; the same call again goes on.
    """
    from draftcli.sampling.source import find_source

    source = find_source(_text(run), model, loras, overrides)
    kinds = source.annealed_columns(weights, only)
    how = {"images": images, "seed": seed, "batch_size": batch_size, "suffix": suffix}
    return _draw("anneal", source, kinds, prompts, output, progress, {**how, "stochastic": stochastic, "page": True})


def evaluate(
    runs: Sequence[StrPath] | StrPath | None = None,
    *,
    weights: Sequence[str] = ("linear",),
    scales: Sequence[float] = (),
    prompts: str | None = None,
    images: int = 4,
    seed: int | None = None,
    rewards: Sequence[str] = (),
    features: str | None = None,
    judge: str | None = None,
    prefer: float = 0.5,
    overrides: Sequence[str] = (),
    batch_size: int | None = None,
    output: StrPath | None = None,
    progress: Progress | None = None,
) -> EvaluationResult | None:
    """Measure what the tuning bought and what it cost, as `draftp eval` does, and write the report.

    Args:
        runs: runs, checkpoints of runs and folders of pictures, one or several; None: the newest run under runs/.
        weights: annealing weights, a column each beside base and tuned.
        scales: scales of the LoRA, a column each.
        prompts: a file, built-in set or dataset; None: the first run's validation prompts.
        images: pictures per prompt; diversity needs 2.
        seed: of a prompt's first picture; None: the first run's.
        rewards: judges beside those of the runs, all held out.
        features: what diversity is measured in; None: see docs/evaluation.md.
        judge: the reward of the recommendation; None: the first held-out one.
        prefer: what is recommended: 1 for reward alone, 0 for diversity alone.
        overrides: KEY=VALUE over the first run's settings.
        batch_size: pictures drawn together; None: by their size.
        output: folder of the report; None: eval/ in the first run's folder.
        progress: called with what goes on ("drawing NAME", then "measuring"), how many pictures are done, and how many
            there are.

    Returns:
        the comparison and the files; None in all processes but the main one, where there are several.

    Raises:
        InputError: what was asked for does not exist or cannot be combined.
        DraftpError: the disk refuses.
    """
    from draftcli.evaluation.request import Request, check_request

    names = [] if runs is None else [runs] if isinstance(runs, str | Path) else runs
    request = Request(
        names=[str(name) for name in names],
        weights=weights,
        scales=scales,
        prompts=prompts,
        images=images,
        seed=seed,
        rewards=rewards,
        features=features,
        judge=judge,
        prefer=prefer,
        overrides=overrides,
        batch_size=batch_size,
        output=None if output is None else Path(output),
    )
    check_request(request)
    from draftcli.cli.console import literal_console
    from draftcli.quiet import quiet_libraries

    with quiet_libraries():
        from draftcli.evaluation.evaluate import evaluate as run_evaluation

        return run_evaluation(request, literal_console(quiet=True), progress)


def load_run(path: StrPath | None = None) -> Run:
    """A run that has weights: its settings, its figures step by step, its validations and its files.

    Needs no torch. For what is not finished yet the weights are those of the newest checkpoint.

    Args:
        path: a run's folder, its name under runs/, or one of its checkpoints; None: the newest run under runs/.

    Raises:
        InputError: there is none, it is no run, or nothing has been trained in it yet.
    """
    return find_run(_text(path))[0]


def _draw(
    name: str,
    source: DrawingSource,
    kinds: Sequence[str],
    prompts: Sequence[str] | StrPath | None,
    output: StrPath | None,
    progress: Progress | None,
    how: dict[str, Any],
) -> DrawingResult:
    """Draw what the command `name` would; `how` are further fields of `Job`."""
    from draftcli.sampling.source import check_drawing

    is_file = isinstance(prompts, str | Path)
    file, texts = (str(prompts), ()) if is_file else (None, tuple(prompts or ()))
    check_drawing(source, kinds, texts, file, how["suffix"])
    from draftcli.cli.console import literal_console
    from draftcli.quiet import quiet_libraries

    with quiet_libraries():
        from draftcli.sampling.job import Job
        from draftcli.sampling.job import run as run_job

        folder = None if output is None else Path(output)
        job = Job(name, source, kinds, prompts=texts, prompt_file=file, output=folder, **how)
        return run_job(job, literal_console(quiet=True), progress)


def _text(path: StrPath | None) -> str | None:
    return None if path is None else str(path)
