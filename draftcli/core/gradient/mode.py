"""Which sampler steps carry gradient.

DRaFT-K (Clark et al. 2024, arXiv 2309.17400): the first N - K steps run without a graph, the last K keep it, and the
gradient runs through x from step to step. K = N is full backpropagation (DRaFT); K = 1 is the default of DRaFT+.
"""

from __future__ import annotations

from draftcli.errors import InputError

SAMPLERS = ("euler", "ddim")


def first_gradient_step(steps: int, truncation_steps: int) -> int:
    """N - K: the index of the first sampler step that carries gradient.

    Raises:
        InputError: K is outside 1 .. N.
    """
    if not 1 <= truncation_steps <= steps:
        raise InputError(
            f"draftp.truncation_steps is {truncation_steps} with sampling.steps {steps}: "
            f"between 1 and {steps} steps can carry gradient"
        )
    return steps - truncation_steps


def check_sampler(sampler: str) -> None:
    """See that a sampler can carry gradient: one network call a step, and none that looks back over the cut at N - K.

    Raises:
        InputError: it cannot.
    """
    if sampler not in SAMPLERS:
        raise InputError(
            f"sampling.sampler {sampler} draws pictures but cannot train; train with {' or '.join(SAMPLERS)}, and draw "
            f"with draftp sample --sampler {sampler}"
        )
