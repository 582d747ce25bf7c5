"""The commands as functions, for scripts and notebooks: they print only warnings, and libraries stay quiet.

They call what the commands call. Invalid input raises `draftcli.errors.InputError`, if possible before torch is
imported; other failures raise its base class `DraftpError`.
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
"""Called as progress(what, done, total): what is being done, such as "drawing", and how much of it is finished."""


def train(
    cfg: Config,
    output: StrPath,
    *,
    progress: Progress | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Run, or resume, the training that `cfg` describes, as `draftp train` does.

    Ctrl-C, or the interrupt button of a notebook, stops it after the current step; call it again to resume.

    Args:
        cfg: the settings, from `draftcli.load_config`.
        output: the run's folder, which need not exist yet.
        progress: called after each step with "training", the number of steps taken and `trainer.max_steps`.
        on_step: called after each step with its line of metrics.jsonl, such as `line["reward"]`.

    Returns:
        how it ended, the last validation, and the files that were written.

    Raises:
        InputError: settings, prompts, model or folder are wrong, or another process is writing to the folder.
        DraftpError: the disk cannot be written, or three steps in a row were not finite.
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
        from draftcli.core.gradient.mode import idle_beside_mode
        from draftcli.planning.plan import following_init_from
        from draftcli.training.loop import train as run_training

        cfg = following_init_from(cfg)
        for text in [*without_effect(cfg), *idle_beside_mode(cfg)]:
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
    """Generate images with a run, or with any model and LoRAs, as `draftp sample` does.

    Existing images are kept; only missing ones are generated.

    Args:
        run: a run's folder or one of its checkpoints; None and no `model`: the newest run under runs/.
        prompts: a list of texts; or one text, which names a file, a built-in set or a dataset. None: the run's
            validation prompts.
        model: a diffusers folder, hub id, .safetensors or toy, instead of a run.
        loras: PATH or PATH=SCALE, on top of the run's own or on the model.
        overrides: KEY=VALUE, as for `load_config`, such as `sampling.steps=10`.
        base: generate images with the base too, at the same seeds.
        images: number of images per prompt.
        seed: first seed; image j of each prompt has seed + j. None: the run's.
        batch_size: images generated at once; None: chosen by their size.
        suffix: png, jpg or webp.
        output: folder; None: in the run's folder, or the working directory.
        progress: called with "drawing", the number of images done and of all images.

    Returns:
        the image files, and the other files that were written.

    Raises:
        InputError: no such run, model, LoRA or file, no prompts, or a setting that is not allowed.
        DraftpError: the disk cannot be written.
        Interrupted: by Ctrl-C; call it again to resume.
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
    """Blend the base and the fine-tuned model with Annealed Importance Guidance, as `draftp anneal` does.

    Args:
        run: see `sample`.
        prompts: see `sample`.
        weights: annealing weights, such as linear or power_2 (docs/annealing.md), with a column for each.
        only: generate only these, without the base and the fine-tuned model.
        stochastic: choose one network at random in each step, by the weight: half the cost.
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
        the image files, and the other files that were written.

    Raises:
        InputError: as in `sample`; nothing to anneal to, or an unknown weight.
        DraftpError: the disk cannot be written.
        Interrupted: by Ctrl-C; call it again to resume.
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
    """Compare fine-tuned models with their base, as `draftp eval` does, and write the report.

    Args:
        runs: one or several runs, checkpoints of runs or folders of images; None: the newest run under runs/.
        weights: annealing weights to compare with the base and the fine-tuned model.
        scales: scales of the LoRA to compare too.
        prompts: a file, built-in set or dataset; None: the first run's validation prompts.
        images: number of images per prompt; diversity needs at least 2.
        seed: first seed; None: the first run's.
        rewards: rewards to score with besides those of the runs; they are held out.
        features: features that diversity is measured in; None: see docs/evaluation.md.
        judge: reward that decides the recommendation; None: the first held-out one.
        prefer: trade-off of the recommendation: 1 is reward only, 0 is diversity only.
        overrides: KEY=VALUE, changes to the first run's settings.
        batch_size: images generated at once; None: chosen by their size.
        output: folder of the report; None: eval/ in the first run's folder.
        progress: called with what is being done ("drawing NAME", then "measuring"), the number of images done, and of
            all images.

    Returns:
        the comparison and the files that were written; of several processes only the main one gets them, and the
        others get None.

    Raises:
        InputError: something that was named does not exist or cannot be combined.
        DraftpError: the disk cannot be written.
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
    """Open a run that has weights: its settings, the figures of its steps, its validations and its files.

    This needs no torch. The weights of an unfinished run are those of its newest checkpoint.

    Args:
        path: a run's folder, its name under runs/, or one of its checkpoints; None: the newest run under runs/.

    Raises:
        InputError: there is none, it is not a run, or nothing has been trained in it yet.
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
