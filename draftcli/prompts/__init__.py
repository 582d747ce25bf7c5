"""Prompts: what one is, where they are read from, and the order in which a run takes them."""

from draftcli.prompts.order import Batches, Shuffled
from draftcli.prompts.prompt import SEEDS, Prompt, PromptList, PromptSequence, past_the_limit
from draftcli.prompts.reading import built_in_sets, find_prompts, read_prompts

__all__ = [
    "SEEDS",
    "Batches",
    "Prompt",
    "PromptList",
    "PromptSequence",
    "Shuffled",
    "built_in_sets",
    "find_prompts",
    "past_the_limit",
    "read_prompts",
]
