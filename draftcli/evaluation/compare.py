"""From what was measured to what is said: figures with intervals, the Pareto front, warnings, a recommendation.

The first column is the base; every other one is compared with it picture by picture, at the same prompt and seed. The
result is a plain dictionary, the content of metrics.json; docs/evaluation.md describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Gallery, Item
from draftcli.metrics.diversity import (
    NEIGHBOURS,
    cosine_diversity,
    frechet_distance,
    kernel_distance,
    log_spectral_distance,
    neighbourhoods,
    spectral_distance,
    squared_diversity,
    vendi_score,
)
from draftcli.metrics.hacking import RewardMean, Standing, find_hacking
from draftcli.metrics.signs import SIGNS, near_duplicates
from draftcli.metrics.statistics import estimate, paired, win_rate
from draftcli.metrics.thumbnails import pairwise_distance

FORMAT, VERSION = "draftp-eval", 1
FEW_PROMPTS = 10  # below it intervals are rough
LARGE_DRIFT = 0.25  # relative change of a sign that is worth a word
LARGE_LOSS = 0.5  # share of the base's diversity below which it is worth a word
Figure = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A row of the report.

    Attributes:
        key: in metrics.json.
        label: for people.
        group: reward, diversity, distance, sign or cost.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        digits: after the point.
        about: one line on what it is.
    """

    key: str
    label: str
    group: str
    better: int
    digits: int
    about: str


DIVERSITY = {
    "cosine_diversity": (cosine_diversity, "1 - cosine", 3, "1 - mean pairwise cosine of a prompt's pictures"),
    "squared_diversity": (squared_diversity, "squared distance", 2, "mean squared distance of a prompt's pictures"),
    "vendi": (vendi_score, "Vendi score", 2, "effective number of different pictures of a prompt"),
}
PIXELS = "pixel_diversity", "pixels", 3, "mean root mean squared distance of the thumbnails of a prompt's pictures"
NEIGHBOURHOODS = {
    "recall": (1, "share of the base's pictures near a picture of this column: what of the base is still reached"),
    "precision": (1, "share of this column's pictures near one of the base's: how much stays on the base's ground"),
    "density": (0, "how many neighbourhoods of base pictures hold a picture, over k"),
    "coverage": (1, "share of the base's neighbourhoods that hold a picture"),
}
DISTANCES = {
    "spectral": (spectral_distance, "spectral", "norm of the difference of the features' covariance spectra"),
    "log_spectral": (log_spectral_distance, "log spectral", "the same on log10 of the spectra"),
    "fid": (frechet_distance, "Fréchet", "Fréchet distance to the base (FID where features are Inception's)"),
    "kid": (kernel_distance, "kernel", "unbiased squared MMD to the base, cubic kernel (KID where Inception's)"),
}
SIGN_LABELS = {
    "saturation": "mean HSV saturation",
    "contrast": "standard deviation of luma",
    "edge_density": "share of pixels with an edge",
    "colour_entropy": "entropy of colours, bits",
    "high_frequency_energy": "share of variance above half the Nyquist frequency",
    "near_duplicates": "share of pictures that look like one of another prompt",
}


def compare(
    columns: Sequence[Gallery],
    items: Sequence[Item],
    measured: Mapping[str, Measured],
    trained: Sequence[str],
    judge: str,
    prefer: float = 0.5,
) -> dict[str, Any]:
    """Everything that can be said about `columns`, the first of which is the base.

    Args:
        columns: what is compared.
        items: prompts and seeds, those of a prompt together.
        measured: by the columns' names.
        trained: rewards that were trained on.
        judge: the reward of the Pareto front and the recommendation.
        prefer: 1 wants the reward alone, 0 diversity alone.

    Returns:
        "columns", "metrics", "figures" (by column and metric), "fronts" (by reward), "recommendation", "warnings".
    """
    base = columns[0].name
    prompts = list(dict.fromkeys(item.prompt for item in items))
    groups = np.array([prompts.index(item.prompt) for item in items])
    rewards = list(measured[base].scores)
    figures = {c.name: _figures(c, measured[c.name], measured[base], groups, c.name == base) for c in columns}
    fronts = {
        reward: [c.name for c, on_it in zip(columns, _front(figures, columns, reward), strict=True) if on_it]
        for reward in rewards
    }
    return {
        "columns": [
            {"name": c.name, "source": c.source, "evaluations": c.evaluations, "seconds": c.seconds} for c in columns
        ],
        "base": base,
        "judge": judge,
        "prefer": prefer,
        "trained": [name for name in trained if name in rewards],
        "metrics": [asdict(metric) for metric in _metrics(rewards)],
        "figures": figures,
        "fronts": fronts,
        "recommendation": recommend(figures, base, judge, fronts[judge], prefer),
        "warnings": warnings(figures, base, rewards, trained, len(prompts)),
    }


def pareto_front(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Whether no other point is at least as good in both and better in one; more is better. (n,) bool, NaN False."""
    points = np.stack([np.asarray(x, float), np.asarray(y, float)], axis=1)
    as_good = np.all(points[None] >= points[:, None], axis=2)
    better = np.any(points[None] > points[:, None], axis=2)
    return np.array([not line.any() for line in as_good & better]) & ~np.isnan(points.sum(1))


def recommend(
    figures: Mapping[str, Mapping[str, Figure]], base: str, judge: str, front: Sequence[str], prefer: float
) -> dict[str, Any]:
    """The column of the front nearest to the ideal: the best reward with the most diversity of all columns.

    Both axes are scaled to [0, 1] over the columns; the distance is sqrt(p (1 - reward)^2 + (1 - p) (1 - diversity)^2)
    with p = `prefer` (compromise programming, Zeleny 1973).

    Only columns whose reward is above the base's are candidates: others cost diversity or buy nothing.

    Returns:
        {"column": name or None, "why": text}.
    """
    reward = {name: f[f"reward/{judge}"] for name, f in figures.items()}
    for key, what in (("cosine_diversity", "diversity"), (f"reward/{judge}", judge)):
        if (figure := figures[base][key])["value"] is None:
            return {"column": None, "why": f"{what} was not measured ({figure['why']})"}
    candidates = [name for name in front if name != base and reward[name]["difference"] > 0]
    if not candidates:
        return {
            "column": None,
            "why": f"keep {base}: no column raises {judge} and is on its Pareto front with diversity",
        }
    gain = _scaled({name: figure["value"] for name, figure in reward.items()})
    kept = _scaled({name: f["cosine_diversity"]["value"] for name, f in figures.items()})

    def distance(name: str) -> float:
        return float(np.sqrt(prefer * (1 - gain[name]) ** 2 + (1 - prefer) * (1 - kept[name]) ** 2))

    best = min(candidates, key=distance)
    diversity = figures[best]["cosine_diversity"]["value"] / figures[base]["cosine_diversity"]["value"]
    figure = reward[best]
    text = (
        f"{judge} {figure['difference']:+.3g} against {base} (95 % {figure['difference_low']:+.3g} to "
        f"{figure['difference_high']:+.3g}), {100 * diversity:.0f} % of its diversity"
    )
    if not figure["difference_low"] > 0:
        text += f"; that {judge} rises at all is not certain"
    return {"column": best, "why": text}


def warnings(
    figures: Mapping[str, Mapping[str, Figure]], base: str, rewards: Sequence[str], trained: Sequence[str], prompts: int
) -> list[str]:
    """What a reader must not overlook, in whole sentences; only what the intervals are sure of."""
    said = []
    if prompts < FEW_PROMPTS:
        said.append(f"Only {prompts} prompts: every interval is rough. Take at least {FEW_PROMPTS}, better 50.")
    for name, figure in figures.items():
        if name == base:
            continue
        if (verdict := find_hacking(_base_and_column(base, name, figure, rewards), trained)) is not None:
            said.append(f"{name}: {verdict.sentence('these prompts')}.")
        kept = _ratio(figure["cosine_diversity"], figures[base]["cosine_diversity"])
        if kept is not None and kept < LARGE_LOSS and _sure(figure["cosine_diversity"]) < 0:
            said.append(f"{name}: {100 * kept:.0f} % of the base's diversity is left.")
        ratios = {sign: _ratio(figure[sign], figures[base][sign]) for sign in [*SIGNS, "near_duplicates"]}
        drifted = [
            f"{sign.replace('_', ' ')} {ratio:.2g}"
            for sign, ratio in ratios.items()
            if ratio is not None and abs(ratio - 1) > LARGE_DRIFT and _sure(figure[sign]) != 0
        ]
        if drifted:
            said.append(f"{name}: as a multiple of the base's: {', '.join(drifted)}.")
    return said


def _base_and_column(base: str, name: str, figures: Mapping[str, Figure], rewards: Sequence[str]) -> list[Standing]:
    """The base and a column as `find_hacking` takes them."""
    known = {r: figure for r in rewards if "difference" in (figure := figures[f"reward/{r}"])}
    before = {r: RewardMean(figure["value"] - figure["difference"]) for r, figure in known.items()}
    now = {
        r: RewardMean(figure["value"], figure["difference_low"], figure["difference_high"])
        for r, figure in known.items()
    }
    return [Standing(base, before), Standing(name, now)]


def _figures(column: Gallery, here: Measured, base: Measured, groups: np.ndarray, is_base: bool) -> dict[str, Figure]:
    """Every figure of one column, by metric."""
    figures = {
        f"reward/{name}": _figure(scores, groups, None if is_base else base.scores[name])
        for name, scores in here.scores.items()
    }
    each = int(np.bincount(groups).min())
    varied = {key: [_by_prompt(function, m, groups) for m in (here, base)] for key, (function, *_) in DIVERSITY.items()}
    varied[PIXELS[0]] = [pairwise_distance(m.thumbnails, groups.tolist()) for m in (here, base)]
    for key, (values, base_values) in varied.items():
        if each < 2:
            figures[key] = _none(f"needs 2 pictures a prompt, has {each}")
        else:
            figures[key] = _figure(values, np.arange(len(values)), None if is_base else base_values)
    figures |= _distances(here, base, groups, is_base)
    for name, values in here.signs.items():
        figures[name] = _figure(values, groups, None if is_base else base.signs[name])
    doubles, base_doubles = (near_duplicates(m.thumbnails, groups) for m in (here, base))
    figures["near_duplicates"] = _figure(doubles, groups, None if is_base else base_doubles)
    for key in ("evaluations", "seconds"):
        value = getattr(column, key)
        figures[key] = _none("unknown") if value is None else {"value": float(value)}
    return figures


def _by_prompt(function: Callable[[np.ndarray], float], here: Measured, groups: np.ndarray) -> np.ndarray:
    return np.array([function(here.features[groups == group]) for group in np.unique(groups)])


def _distances(here: Measured, base: Measured, groups: np.ndarray, is_base: bool) -> dict[str, Figure]:
    """Where the column lies as seen from the base's pictures."""
    count, width = here.features.shape
    if is_base:
        return {key: _none("the others are measured against it") for key in [*NEIGHBOURHOODS, *DISTANCES]}
    enough = 10 * NEIGHBOURS
    figures: dict[str, Figure] = {}
    if count < enough:
        figures |= {key: _none(f"needs {enough} pictures for k = {NEIGHBOURS}, has {count}") for key in NEIGHBOURHOODS}
    else:
        terms = neighbourhoods(base.features, here.features, NEIGHBOURS)
        figures |= {key: _figure(getattr(terms, key), groups, None) for key in NEIGHBOURHOODS}
    for key, (function, *_) in DISTANCES.items():
        needed = enough if key == "kid" else width + 1
        if count < needed:
            figures[key] = _none(f"needs {needed} pictures for {width} features, has {count}")
        else:
            figures[key] = {"value": function(base.features, here.features), "n": count}
    return figures


def _figure(values: np.ndarray, groups: np.ndarray, base: np.ndarray | None) -> Figure:
    """Mean, median, interval; against `base` also the paired difference and the win rate."""
    found = estimate(values, groups)
    if not found.n:
        return _none("nothing to say about these prompts")
    figure: Figure = {
        "value": found.mean, "median": found.median, "low": found.low, "high": found.high, "n": found.n,
    }  # fmt: skip
    if base is not None:
        against, wins = paired(base, values, groups), win_rate(base, values, groups)
        figure |= {
            "difference": against["difference"],
            "difference_low": against["low"],
            "difference_high": against["high"],
            "win_rate": wins.mean,
            "win_low": wins.low,
            "win_high": wins.high,
        }
    return figure


def _none(why: str) -> Figure:
    return {"value": None, "why": why}


def _metrics(rewards: Sequence[str]) -> list[Metric]:
    return [
        *(Metric(f"reward/{name}", name, "reward", 1, 3, "") for name in rewards),
        *(Metric(key, label, "diversity", 1, digits, about) for key, (_, label, digits, about) in DIVERSITY.items()),
        Metric(PIXELS[0], PIXELS[1], "diversity", 1, *PIXELS[2:]),
        *(Metric(key, key, "distance", better, 3, about) for key, (better, about) in NEIGHBOURHOODS.items()),
        *(Metric(key, label, "distance", -1, 4, about) for key, (_, label, about) in DISTANCES.items()),
        *(Metric(key, key.replace("_", " "), "sign", 0, 3, about) for key, about in SIGN_LABELS.items()),
        Metric("evaluations", "UNet evaluations", "cost", -1, 0, "of one picture: steps (guided: 2) x networks"),
        Metric("seconds", "seconds", "cost", -1, 2, "of one picture, on the machine that drew it"),
    ]


def _front(figures: Mapping[str, Mapping[str, Figure]], columns: Sequence[Gallery], reward: str) -> np.ndarray:
    values = [[figures[c.name][key]["value"] for c in columns] for key in ("cosine_diversity", f"reward/{reward}")]
    return pareto_front(*[[float("nan") if v is None else v for v in line] for line in values])


def _scaled(values: Mapping[str, float | None]) -> dict[str, float]:
    known = {name: value for name, value in values.items() if value is not None}
    low, high = min(known.values()), max(known.values())
    return {name: (value - low) / (high - low) if high > low else 1.0 for name, value in known.items()}


def _sure(figure: Figure) -> int:
    """1 or -1 where the interval of the difference to the base is above or below 0; else 0."""
    if figure.get("difference") is None:
        return 0
    return int(figure["difference_low"] > 0) - int(figure["difference_high"] < 0)


def _ratio(figure: Figure, base: Figure) -> float | None:
    return figure["value"] / base["value"] if figure["value"] is not None and base["value"] else None
