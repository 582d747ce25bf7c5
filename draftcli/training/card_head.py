"""The YAML head of a run's model card, in the Hub's form (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from draftcli.config import Config, is_hub_id
from draftcli.core.models.family import Family
from draftcli.core.models.places import BUILT_IN, card_base
from draftcli.core.models.recognition import family_of
from draftcli.metrics.roles import reward_role
from draftcli.metrics.statistics import has_interval
from draftcli.runs import ValidationLine
from draftcli.training.result import diversity_kept


def card_head(cfg: Config, title: str, validation: ValidationLine | None, sheet: str | None) -> str:
    """What the Hub files a model under, and shows of it: base, license, tags, measured results and pictures.

    Args:
        cfg: the run's settings.
        title: what people call the run.
        validation: its last validation; its figures are the `model-index`.
        sheet: name of that validation's sheet in the card's folder; None: there is none.
    """
    lora, family = cfg.peft.peft_scheme == "lora", family_of(cfg.model)
    head: dict[str, Any] = {
        **card_base(cfg.model.pretrained, is_lora=lora),
        "library_name": "diffusers",
        **_license(cfg.model.pretrained, family),
        "pipeline_tag": "text-to-image",
        "tags": [family.tag, "text-to-image", "draft", "reward-fine-tuning", *(["lora"] if lora else [])],
    }
    if sheet is not None and validation is not None:
        text = f"Held-out prompts after step {validation['step']}: the base, and beside it the fine-tuned model"
        head["widget"] = [{"text": text, "output": {"url": sheet}}]
    if validation is not None and (results := _results(cfg, validation)):
        head |= {"model_name": title, "eval_results": results}
    return ModelCardData(**head).to_yaml()


def _license(pretrained: str, family: Family) -> dict[str, str]:
    """Weights that were trained from a model stay under its license, of which the settings say nothing."""
    if pretrained in BUILT_IN:
        return {"license": "apache-2.0"}
    if pretrained == family.hub_base:
        return {"license": family.hub_license}
    if is_hub_id(pretrained):
        link = f"https://huggingface.co/{pretrained}"
        return {"license": "other", "license_name": "that-of-the-base-model", "license_link": link}
    return {"license": "unknown"}


def _results(cfg: Config, validation: ValidationLine) -> list[EvalResult]:
    """The tuned model's mean of every reward, and the diversity kept; what it stands against is in their `args`."""
    source = cfg.data.validation_prompts
    prompts = Path(source).name if isinstance(source, str) else "the run's own list"

    def result(kind: str, name: str, value: float, args: dict[str, Any]) -> EvalResult:
        return EvalResult(
            task_type="text-to-image",
            dataset_type="held-out-prompts",
            dataset_name=f"{validation['images']} images of held-out prompts ({prompts})",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            metric_args=args,
        )

    results = []
    for name, figures in validation["rewards"].items():
        if not (_is_known(figures["base"]) and _is_known(figures["tuned"])):
            continue
        args = {"base": figures["base"], "change": figures["difference"]}
        if has_interval(figures["low"], figures["high"]):
            args |= {"change_95_percent_low": figures["low"], "change_95_percent_high": figures["high"]}
        results.append(result(name, f"{name}, {reward_role(name, cfg.trained)}", figures["tuned"], args))
    if (kept := diversity_kept(validation)) is not None:
        args = {"low": kept.low, "high": kept.high} if has_interval(kept.low, kept.high) else {}
        results.append(result("diversity-kept", "diversity in pixels, as a share of the base's", kept.share, args))
    return results


def _is_known(figure: float | None) -> bool:
    """Whether it is a number; in validation.jsonl null stands for NaN."""
    return figure is not None and math.isfinite(figure)
