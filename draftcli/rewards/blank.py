"""Rewards without weights: what a memory plan needs to know of a reward before anything is fetched.

A reward's factory may have an attribute `blank`, called without arguments: it returns the reward in its official
architecture, every weight of it on torch's meta device (shape and dtype, no data). A plug-in that has one is counted in
memory plans, as the built-in ones are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Factory = TypeVar("Factory", bound=Callable[..., Any])


def with_blank(blank: Callable[[], nn.Module]) -> Callable[[Factory], Factory]:
    """Decorate a reward's factory with its `blank`."""

    def give(factory: Factory) -> Factory:
        setattr(factory, "blank", blank)  # noqa: B010 - a function's attribute, which types do not know
        return factory

    return give


class BlankTokenizer:
    """Stands for a tokenizer: as many tokens as a text may have."""

    model_max_length = 77

    def __call__(self, prompts: str | list[str], max_length: int = 77, **options: Any) -> Any:
        """A BatchEncoding of (B, max_length) zeros, and a mask of ones."""
        from transformers import BatchEncoding

        ids = torch.zeros(1 if isinstance(prompts, str) else len(prompts), max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
