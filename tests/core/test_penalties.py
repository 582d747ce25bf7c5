"""What every penalty promises. One that is added to PENALTIES is in all of these tests by its name."""

import json

import pytest
import torch

from draftcli.config import DraftpConfig
from draftcli.core.penalty import PENALTIES, Penalty, make_penalty
from draftcli.core.schedule import make_schedule
from draftcli.errors import InputError

every_kind = pytest.mark.parametrize("kind", PENALTIES)
LEVELS = [make_schedule(5).level(i) for i in (2, 3, 4)]


def penalty_of(kind: str, beta: float = 0.7) -> Penalty:
    return make_penalty(DraftpConfig.model_validate({"kl_kind": kind, "kl_coeff": beta, "log_kl": False}))


def estimates(steps: int = 3, images: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of tuned and base (K, B, C, H, W), in float64."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, steps, images, 4, 8, 8, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1]


@every_kind
def test_it_pulls_towards_the_base_and_ends_there(kind):
    penalty, (tuned, base) = penalty_of(kind), estimates()
    kl = penalty(tuned, base, LEVELS)
    assert kl.shape == ()
    assert kl > 0
    (slope,) = torch.autograd.grad(kl, tuned)
    assert (slope * (tuned - base)).sum() > 0
    assert penalty(base, base, LEVELS) == 0


@every_kind
def test_it_is_a_mean_over_steps_and_images(kind):
    """So that steps that run again one by one, and micro-batches, add up to the same loss."""
    penalty, (tuned, base) = penalty_of(kind), estimates()
    whole = penalty(tuned, base, LEVELS)
    by_step = [penalty(tuned[k, None], base[k, None], [level]) for k, level in enumerate(LEVELS)]
    by_image = [penalty(tuned[:, i, None], base[:, i, None], LEVELS) for i in range(4)]
    for parts in (by_step, by_image):
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


@every_kind
def test_its_state_comes_back_from_a_checkpoint(kind):
    one, two = penalty_of(kind), penalty_of(kind)
    for kl in (0.1, 0.4, 0.2):
        one.end_step(kl)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for penalty in (one, two):
        penalty.end_step(0.3)
    assert one.beta == two.beta >= 0


def test_a_penalty_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"draftp.kl_kind 'none': there is no such penalty; there is eps"):
        penalty_of("none")


@every_kind
def test_the_base_is_asked_where_the_loss_needs_it(kind):
    assert penalty_of(kind, 0.7).is_measured
