"""A LoRA added in one operation a layer is the same LoRA, and leaves nothing behind."""

import pytest
import torch

from draftcli.core.engine.fused import fused
from draftcli.core.lora.adapters import lora_layers
from tests.tiny import batch, latents_at, prefers_red, tiny_model

ON_ALL = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1"], "alpha": 1.5}


def change(model):
    """Of x_K: rms of fused minus plain, over the rms of plain."""
    images = batch(2)
    cond, start = model.encode(images), model.networks.start(images)
    plain = latents_at(model, cond, start, 2)
    with fused(model.unet, model.runtime.dtype):
        return float((latents_at(model, cond, start, 2) - plain).norm() / plain.norm())


@pytest.mark.parametrize(("precision", "most"), [("fp64", 1e-13), ("fp32", 1e-5), ("bf16", 0.03)])
def test_fused_is_the_plain_lora(tiny_sdxl, precision, most):
    """In bfloat16 as far as rounding goes: folding, whose error is of the same size, is held to as much."""
    model = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL, model={"precision": precision})
    assert change(model) < most


def test_every_linear_layer_is_fused_and_comes_back(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL)
    layers = lora_layers(model.unet)

    def own_forwards():
        return [layer for layer in layers if "forward" in vars(layer)]

    def fuse_and_fail():
        with fused(model.unet, model.runtime.dtype):
            linear = [layer for layer in layers if isinstance(layer.get_base_layer(), torch.nn.Linear)]
            assert 0 < len(linear) < len(layers)  # convolutions stay as they are
            assert own_forwards() == linear
            raise RuntimeError("from inside")

    with pytest.raises(RuntimeError, match="from inside"):
        fuse_and_fail()
    assert not own_forwards()


def test_the_base_has_no_lora_where_tuned_is_fused(tiny_sdxl):
    model, images = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL), batch(2)
    cond, start = model.encode(images), model.networks.start(images)
    with model.base_weights():
        base = latents_at(model, cond, start, 2)
    with fused(model.unet, model.runtime.dtype), model.base_weights():
        assert torch.equal(latents_at(model, cond, start, 2), base)


@pytest.mark.parametrize("fold", [True, False])
def test_a_training_step_has_the_gradient_of_the_plain_lora(tiny_sdxl, fold):
    """Fused in the prefix alone, which carries none."""
    gradients = []
    for two_stage in (True, False):  # without two stages nothing is folded or fused
        model = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL, sharding={"fold_lora": fold, "two_stage": two_stage})
        model.reward_model = prefers_red
        model.get_loss_and_metrics(batch(2))
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters]))
    assert (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[1].norm()


@pytest.mark.parametrize(("precision", "is_fused"), [("bf16", True), ("fp32", False)])
def test_pictures_are_drawn_fused_in_half_precision(tiny_sdxl, precision, is_fused):
    """Base and tuned in one walk, as annealing draws: the base must not get the LoRA."""
    model, images = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL, model={"precision": precision}), batch(2)
    seen = set()
    layer = next(layer for layer in lora_layers(model.unet) if isinstance(layer.get_base_layer(), torch.nn.Linear))
    hook = layer.get_base_layer().register_forward_hook(lambda *_: seen.add("forward" in vars(layer)))
    drawn = model.annealed_images(images, model.initial_noise(images))
    hook.remove()
    assert seen == {is_fused}
    by_hand = model.annealed_images(images, model.initial_noise(images), lambda *_: 0.0)
    with model.base_weights():
        base = model.decode(latents_at(model, model.encode(images), model.networks.start(images), 4))
    assert torch.equal(by_hand, base)
    assert not torch.equal(drawn, base)
