"""Tensors without data compute as on a GPU, whose autocast and attention the meta device does not have."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from draftcli.planning.without_data import WithoutData
from tests.tiny import tiny_model

# Input in bfloat16, weights in float32, and the dtype that CUDA's autocast computes in (pytorch.org/docs, amp).
LAYERS = {
    "linear": (nn.Linear(8, 8, device="meta"), (2, 8), torch.bfloat16),
    "conv2d": (nn.Conv2d(8, 8, 3, device="meta"), (2, 8, 4, 4), torch.bfloat16),
    "group_norm": (nn.GroupNorm(2, 8, device="meta"), (2, 8, 4), torch.float32),
    "layer_norm": (nn.LayerNorm(8, device="meta"), (2, 8), torch.float32),
}


def autocast() -> torch.autocast:
    """As a model on a CPU enters it, where a plan is made."""
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_dtype_of_cudas_autocast(name):
    layer, shape, dtype = LAYERS[name]
    with WithoutData():
        with autocast():
            assert layer(torch.empty(shape, dtype=torch.bfloat16)).dtype == dtype
        assert layer(torch.empty(shape)).dtype == torch.float32


def test_every_function_of_the_unet_on_cudas_list_is_among_them(tiny_sdxl):
    """Torch knows the list even where it was built without CUDA."""
    called = set()

    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    def is_listed(name: str) -> bool:
        try:
            return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")
        except RuntimeError:  # not an operator
            return False

    unet = tiny_model(tiny_sdxl).unet.float()
    x = torch.randn(1, 4, 8, 8)
    text = {"encoder_hidden_states": torch.randn(1, 77, unet.config.cross_attention_dim)}
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, width), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad(), Names():
        unet(x, 500, **text, added_cond_kwargs=added)
    # exp is of the step's number alone, which is float32; attention has its inputs from linear layers.
    assert set(filter(is_listed, called)) == {*LAYERS, "exp", "scaled_dot_product_attention"}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_cast_of_a_trained_weight_lives_until_autocast_ends(checkpointed):
    layer = nn.Linear(100, 100, bias=False, device="meta")
    live = WithoutData([layer.weight])
    weight, cast, activation = 40_000, 20_000, 200
    with live:
        x = torch.empty(1, 100, dtype=torch.bfloat16, requires_grad=True)
        with autocast(), torch.no_grad():
            y = layer(layer(x))
            assert live.now == weight + cast + 2 * activation, "one cast for both calls"
        assert live.now == weight + 2 * activation
        with autocast():
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            assert live.now == weight + cast + 2 * activation
        assert live.now == weight + 2 * activation + (0 if checkpointed else cast), "a graph keeps what it needs"
        y.sum().backward()
        assert layer.weight.grad is not None
        del y
        assert live.now == 2 * weight + 2 * activation, "the weight and x, and their gradients"


@pytest.mark.parametrize("fused", [True, False])
def test_attention_has_a_quadratic_matrix_only_where_it_is_not_fused(fused):
    q = torch.empty(1, 1, 1000, 8, device="meta", requires_grad=True)
    live = WithoutData([q], fused=fused)
    with live:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert (live.peak > 4 * 1000 * 1000) == (not fused)


def test_torch_is_as_before_afterwards():
    before = F.linear, F.layer_norm, F.scaled_dot_product_attention, torch.clear_autocast_cache
    with WithoutData():
        assert F.linear is not before[0]
    assert before == (F.linear, F.layer_norm, F.scaled_dot_product_attention, torch.clear_autocast_cache)
