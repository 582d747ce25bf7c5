"""Tables and plot of docs/estimators.md, from what estimators.py measured.

    python benchmarks/estimators_page.py runs/estimators/estimators.json docs/estimators.md

Each table of the page stands between `<!-- NAME -->` and `<!-- end -->` and is written anew; the plot is
docs/images/estimators.svg. Needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from estimators import ARMS, EXACT, RATES, SEEDS
from lab import ANALYTIC, HELD_OUT, at_reward, curve, head, interval, mean_over_seeds, number

from draftcli.metrics.statistics import estimate, paired, ratio

mpl.use("Agg")
from matplotlib import pyplot as plt

mpl.rcParams["svg.fonttype"] = "none"  # letters as letters
mpl.rcParams["svg.hashsalt"] = "estimators"  # the same file for the same figures

RECIPE, FIRST = "last_k_4", "last_k_1"
NAMES = {
    "last_k_1": "`last_k`, K = 1 (DRaFT-1)",
    "last_k_4": "`last_k`, K = 4 (the preset `toy`)",
    "last_k_10": "`last_k`, K = N (DRaFT, exact)",
    "low_variance": "`low_variance`, K = 1, 2 samples (DRaFT-LV)",
    "random_k": "`random_k`, 1 to N",
    "refl": "`refl`, last 4 steps",
    "drtune": "`drtune`, 3 steps",
    "sparse": "`sparse`, 4 steps",
    "sparse_late": "`sparse`, 2 of the last 4, no rescaling",
    "matching": "`matching`, scale 1000",
    "matching_300": "`matching`, scale 300",
    "last_k_1_detached": "`last_k`, K = 1, `detach_uncond`",
    "last_k_4_detached": "`last_k`, K = 4, `detach_uncond`",
    "last_k_1_prefix_5": "`last_k`, K = 1, `prefix_steps` 5",
    "last_k_4_prefix_4": "`last_k`, K = 4, `prefix_steps` 4",
}
Results = dict[str, dict[str, Any]]


def runs(results: Results, arm: str, stage: str = "final") -> list[dict[str, Any]]:
    """The finished runs of an arm, by seed."""
    found = (results.get(f"{stage}-{arm}-seed{seed}") for seed in range(SEEDS))
    return [run for run in found if run is not None]


def finished(results: Results) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """The arms that have finished runs: their key, their name and those runs."""
    for arm, name in NAMES.items():
        if some := runs(results, arm):
            yield arm, name, some


def at_reward_of_first(results: Results, arm: str, key: str) -> float:
    """A figure of an arm where its learned reward first reaches the one with which DRaFT-1 ends; NaN: it does not."""
    first, some = runs(results, FIRST), runs(results, arm)
    if arm == FIRST:
        return float(curve(some, key)[-1])
    return at_reward(some, curve(first, "toy")[-1], key)


def sum_cosine(found: dict[str, Any], exact: dict[str, Any]) -> str:
    """Cosine of the sums of gradients over all pairs, with the interval over resampled pairs."""
    gram, own, true = (np.array(g) for g in (found["gram"], found["gram_mode"], exact["gram_exact"]))
    draw = np.random.default_rng(0)
    counts = np.vstack([np.ones(len(gram)), draw.multinomial(len(gram), np.ones(len(gram)) / len(gram), 2000)])
    products = [np.einsum("bi,ij,bj->b", counts, g, counts) for g in (gram, own, true)]
    cosines = products[0] / np.sqrt(products[1] * products[2])
    return interval(cosines[0], *np.percentile(cosines[1:], [2.5, 97.5]), form=".2f")


def fidelity(results: Results) -> list[str]:
    """Against the exact gradient, at both places."""
    lines: list[str] = []
    for half, title in (("", "at the untouched LoRA"), ("-half", "half way through the preset's steps")):
        exact = results.get(f"fidelity-{EXACT}{half}")
        if exact is None:
            continue
        lines += head(title, "cosine, one image", "cosine, sum of 64", "norm, of the exact one's", "own variance")
        for arm, name in NAMES.items():
            found = results.get(f"fidelity-{arm}{half}")
            if found is None:
                continue
            cosine, size = estimate(found["cosine"]), estimate(found["ratio"])
            own = found["own_variance"]
            cells = [
                interval(cosine.mean, cosine.low, cosine.high, ".2f"),
                sum_cosine(found, exact),
                interval(size.mean, size.low, size.high, ".2f"),
                "none" if own is None else f"{np.median(own):.2f}",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def efficiency(results: Results) -> list[str]:
    """Evaluations to the reward at which DRaFT-1 ends, and to the recipe's; what oracle and diversity are there."""
    first, recipe = (curve(runs(results, arm), "toy")[-1] for arm in (FIRST, RECIPE))
    budget = at_reward_of_first(results, FIRST, "evaluations")
    there = ("of DRaFT-1's", "oracle there", "diversity there, of the base's")
    lines = head("mode", "seeds", "an image", f"to {first:.2f}", *there, f"to {recipe:.2f}")
    for arm, name, some in finished(results):
        needed, oracle, kept = (
            at_reward_of_first(results, arm, key) for key in ("evaluations", "toy_oracle", "diversity")
        )
        cells = [
            f"{len(some)}",
            f"{some[0]['evaluations_an_image']:g}",
            number(needed, ",.0f"),
            number(needed / budget, ".0%", ""),
            number(oracle, ".3f", ""),
            number(kept / curve(some, "diversity")[0], ".0%", ""),
            number(at_reward(some, recipe, "evaluations"), ",.0f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def seconds(results: Results) -> list[str]:
    """The same in seconds of training steps."""
    first, recipe = (curve(runs(results, arm), "toy")[-1] for arm in (FIRST, RECIPE))
    whole = at_reward_of_first(results, FIRST, "seconds")
    titles = ("an image", "the whole budget", f"to {first:.2f}", "of DRaFT-1's", f"to {recipe:.2f}")
    lines = head("mode, seconds", *titles)
    for arm, name, some in finished(results):
        last = curve(some, "seconds")[-1]
        images = some[0]["curve"][-1]["evaluations"] / some[0]["evaluations_an_image"]
        needed = at_reward_of_first(results, arm, "seconds")
        cells = [
            f"{last / images:.3f}",
            f"{last:.0f}",
            number(needed, ".0f"),
            number(needed / whole, ".0%", ""),
            number(at_reward(some, recipe, "seconds"), ".0f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def end_of_budget(results: Results) -> list[str]:
    """At the end of equal budgets, beside the recipe, in pairs."""
    recipe = runs(results, RECIPE)
    groups = np.repeat(np.arange(len(recipe[0]["curve"][0]["diversity"])), HELD_OUT)  # pictures of one caption
    less = "difference from the preset"
    lines = head("mode", "learned reward", less, "oracle", less, "diversity, of the base's")
    base = recipe[0]["curve"][0]
    lines.append(f"| base | {np.mean(base['toy']):.3f} | | {np.mean(base['toy_oracle']):.3f} | | 100% |")
    for arm, name, some in finished(results):
        cells: list[str] = []
        for key in ("toy", "toy_oracle"):
            found = paired(mean_over_seeds(recipe, -1, key), mean_over_seeds(some, -1, key), groups)
            cells.append(f"{found['tuned']:.3f}")
            cells.append("" if arm == RECIPE else interval(found["difference"], found["low"], found["high"], "+.3f"))
        kept = ratio(mean_over_seeds(some, 0, "diversity"), mean_over_seeds(some, -1, "diversity"))
        cells.append(f"{kept.mean:.0%} ({kept.low:.0%} to {kept.high:.0%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def sweep(results: Results) -> list[str]:
    """Learned reward and oracle after a third of the budget, by learning rate."""
    lines = head("mode", *(f"rate {rate:g}" for rate in RATES))
    for arm, name in NAMES.items():
        found = [results.get(f"sweep-{arm}-{rate:g}") for rate in RATES]
        last = [None if run is None else run["curve"][-1] for run in found]
        cells = ["" if p is None else f"{np.mean(p['toy']):.2f}, {np.mean(p['toy_oracle']):.3f}" for p in last]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def hacking(results: Results) -> list[str]:
    """Oracle and diversity at equal learned reward, with the penalty and without."""
    target = curve(runs(results, FIRST), "toy")[-1]
    figures = (f"oracle at {target:.2f}", "diversity there", "oracle at the end")
    lines = head("mode", *(f"{what}, KL {kl}" for what in figures for kl in ("on", "off")))
    for arm, name in NAMES.items():
        both = [runs(results, arm, stage)[:1] for stage in ("final", "hacking")]
        if not all(both):
            continue
        oracle = [number(at_reward(some, target, "toy_oracle"), ".3f", "") for some in both]
        kept = [number(at_reward(s, target, "diversity") / curve(s, "diversity")[0], ".0%", "") for s in both]
        last = [f"{curve(some, 'toy_oracle')[-1]:.3f}" for some in both]
        lines.append(f"| {name} | {' | '.join([*oracle, *kept, *last])} |")
    return lines


def protocol(results: Results) -> list[str]:
    """Trained on the learned reward, judged by everything else."""
    keys = ("toy", "toy_oracle", *ANALYTIC)
    lines = head("trained on `toy`", *keys)
    base = runs(results, RECIPE)[0]["curve"][0]
    lines.append(f"| base | {' | '.join(f'{np.mean(base[key]):.3f}' for key in keys)} |")
    for _, name, some in finished(results):
        lines.append(f"| {name} | {' | '.join(f'{curve(some, key)[-1]:.3f}' for key in keys)} |")
    return lines


TABLES = {
    "efficiency": efficiency,
    "seconds": seconds,
    "end_of_budget": end_of_budget,
    "sweep": sweep,
    "fidelity": fidelity,
    "hacking": hacking,
    "protocol": protocol,
}


def draw(results: Results, picture: Path) -> None:
    """Learned reward against evaluations and against seconds, and the oracle against the learned reward."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5.2), constrained_layout=True)
    colours = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    for i, arm in enumerate(ARMS):
        some = runs(results, arm)
        if not some:
            continue
        evaluations = [point["evaluations"] / 1000 for point in some[0]["curve"]]
        style = {"color": colours[i % 20], "marker": "o", "markersize": 3, "linewidth": 2 if arm == RECIPE else 1.3}
        left.plot(evaluations, curve(some, "toy"), label=NAMES[arm].replace("`", ""), **style)
        middle.plot(curve(some, "seconds"), curve(some, "toy"), **style)
        right.plot(curve(some, "toy"), curve(some, "toy_oracle"), **style)
    for axes in (left, middle):
        axes.axhline(curve(runs(results, RECIPE), "toy")[-1], color="grey", linewidth=0.8, linestyle="--")
        axes.set_ylabel("learned reward, held-out captions")
    left.set_xlabel("UNet evaluations, thousands (forward 1, backward 2)")
    middle.set_xlabel("seconds of training steps")
    right.set_xlabel("learned reward, held-out captions")
    right.set_ylabel("oracle: the truth")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    results: Results = json.loads(options.figures.read_text(encoding="utf-8"))
    text = options.page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        block = "\n".join(table(results)).strip()
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda m, block=block: f"{m[1]}\n{block}\n\n{m[2]}",
            text,
            flags=re.S,
        )
    options.page.write_text(text, encoding="utf-8")
    draw(results, options.page.parent / "images" / "estimators.svg")


if __name__ == "__main__":
    main()
