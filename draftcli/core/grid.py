"""The step grid, without torch: which of the 1000 training levels the N sampler steps stand on."""

from __future__ import annotations


def timesteps(n: int) -> list[int]:
    """The step grid of draftp, for plain diffusers pipelines: `pipe(..., timesteps=draftcli.timesteps(25))`.

    t_k = trunc(999 - 999 k / n) for k = 0 .. n-1, in float64 as `numpy.linspace(999, 0, n, endpoint=False)` rounds it
    (NeMo 2.2.0, LegacyDDPMDiscretization). The first is always 999, the last trunc(999 / n).

    Args:
        n: number of sampler steps, 1 to 1000.

    Raises:
        ValueError: n is outside 1 .. 1000.
    """
    if not 1 <= n <= 1000:
        raise ValueError(f"{n} steps: the noise schedule has 1000 levels, so 1 to 1000 steps can be taken")
    if n == 1000:
        return list(range(999, -1, -1))
    step = -999 / n
    return [int(k * step + 999) for k in range(n)]
