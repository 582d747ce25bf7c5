"""What must hold whatever the numbers are: one thing computed in two ways. float64 and 1e-9 unless said otherwise."""

import inspect
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model

import draftcli
from draftcli.core.batch import Batch
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.lora.adapters import adapters_off, lora_layers
from draftcli.core.models.sdxl import SDXL
from draftcli.core.weighings import weighing
from draftcli.rewards import Reward
from tests.tiny import batch, latents_at, move, prefers_red, tiny_model

FULL = {"peft": {"peft_scheme": "none"}}
LORA_ON_ALL = {"peft": {"rank": 2, "target_modules": ["to_q", "to_v", "ff.net.2", "conv1", "proj_in"]}}
both_schemes = pytest.mark.parametrize("scheme", [{}, FULL], ids=["lora", "full"])


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.trainable_parameters])


def train_step(model, prompts):
    """Loss, metrics and gradient of a batch."""
    loss, metrics = model.get_loss_and_metrics(prompts)
    return loss, metrics, gradients(model)


def picture(model, prompts, noise=None):
    with torch.no_grad():
        return model.generate(prompts, model.initial_noise(prompts) if noise is None else noise)[0]


def count_calls(unet):
    """How often `unet` runs from now on, as a list that grows."""
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    return calls


# ------------------------------------------------------------------------------------------------------- the gradient


def loss_by_hand(model, folder, prompts, k):
    """DRaFT+'s loss written out: own guidance, own Euler steps, detached by hand before the last K; own base."""
    cfg, cond = model.cfg, model.encode(prompts)
    base = UNet2DConditionModel.from_pretrained(folder / "unet").double()
    keys = {"text_embeds": cond.text_embeds, "time_ids": cond.time_ids}
    sigmas, n = model.schedule.sigmas.tolist(), cfg.sampling.steps

    def eps(unet, x, i):
        inputs = torch.cat([x, x]) / math.sqrt(1 + sigmas[i] ** 2)
        out = unet(inputs, model.schedule.timesteps[i], cond.prompt_embeds, added_cond_kwargs=keys).sample
        uncond, conditional = out.chunk(2)
        return uncond + cfg.sampling.scale * (conditional - uncond)

    x, penalties = model.initial_noise(prompts).double() * model.schedule.init_scale, []
    for i in range(n):
        if i == n - k:
            x = x.detach()
        tuned = eps(model.unet, x, i)
        if i >= n - k:
            penalties.append((tuned - eps(base, x, i).detach()).pow(2).mean())
        x = x + (sigmas[i + 1] - sigmas[i]) * tuned
    image = (model.vae.decode(x / 0.13025).sample / 2 + 0.5).clamp(0, 1)
    rewards = prefers_red(image, prompts.prompts)
    return -rewards.mean() + cfg.draftp.kl_coeff * sum(penalties) / k


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_gradient_is_that_of_backpropagation_by_hand(tiny_sdxl, k, checkpointing):
    """K = 4 = N is full backpropagation, K < N detaches before the last K steps."""
    model = tiny_model(
        tiny_sdxl,
        0.1,
        **LORA_ON_ALL,
        draftp={"truncation_steps": k},
        sharding={"activation_checkpointing": checkpointing},
    )
    prompts = batch(2)
    loss, _, found = train_step(model, prompts)
    model.unet.zero_grad()
    expected = loss_by_hand(model, tiny_sdxl, prompts, k)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    assert found.norm() > 1e-3
    close(found, gradients(model))


def test_more_steps_with_gradient_give_another_gradient(tiny_sdxl):
    first, second = (
        train_step(tiny_model(tiny_sdxl, 0.1, draftp={"truncation_steps": k}), batch(2))[2] for k in (1, 2)
    )
    assert (first - second).norm() > 0.01 * second.norm()


@both_schemes
def test_frozen_parts_get_no_gradient(tiny_sdxl, scheme):
    model = tiny_model(tiny_sdxl, 0.01, **scheme)
    model.get_loss_and_metrics(batch(2))
    trained = {id(p) for p in model.trainable_parameters}
    frozen = [p for m in model.parts.modules.values() for p in m.parameters() if id(p) not in trained]
    frozen += list(model.base_unet.parameters()) if scheme else []
    assert len(frozen) > 300
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    assert all(p.grad is not None for p in model.trainable_parameters)


def test_only_lora_is_trained_by_default(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    trained = [name for name, p in model.unet.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


@both_schemes
@pytest.mark.parametrize("churn", [0, 1.2])
def test_kl_penalty_starts_at_zero(tiny_sdxl, scheme, churn):
    """With churn too: tuned and base see the same noise. Exactly zero with a LoRA, which runs the very same network;
    products of matrices that lie elsewhere in memory, as a copy's do, may round differently.
    """
    model = tiny_model(tiny_sdxl, **scheme, sampling={"s_churn": churn})
    assert model.get_loss_and_metrics(batch(2), forward_only=True)[1]["kl_penalty"] <= (1e-28 if scheme else 0)
    move(model, 0.01)
    assert model.get_loss_and_metrics(batch(2), forward_only=True)[1]["kl_penalty"] > 1e-6


# ----------------------------------------------------------------------------------------------------------- the base


def adapter_state(unet):
    wanted = {name: p.requires_grad for name, p in unet.named_parameters()}
    return wanted, [(layer.disable_adapters, list(layer.active_adapters)) for layer in lora_layers(unet)]


def as_attached(unet):
    pass


def one_weight_frozen(unet):
    lora_layers(unet)[0].lora_A["default"].weight.requires_grad_(False)


def one_layer_off(unet):
    lora_layers(unet)[1].enable_adapters(False)


def one_layer_off_but_wanting_gradient(unet):
    one_layer_off(unet)
    lora_layers(unet)[1].lora_B["default"].weight.requires_grad_(True)


def a_second_adapter_asleep(unet):
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), unet, adapter_name="other")


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize(
    "prepare",
    [as_attached, one_weight_frozen, one_layer_off, one_layer_off_but_wanting_gradient, a_second_adapter_asleep],
)
def test_the_base_pass_leaves_adapters_as_they_were(tiny_sdxl, prepare, fails):
    model = tiny_model(tiny_sdxl, 0.1)
    prepare(model.unet)
    before = adapter_state(model.unet)
    with pytest.raises(RuntimeError, match="from inside") if fails else nullcontext(), model.base_weights():
        assert all(layer.disable_adapters for layer in lora_layers(model.unet))
        if fails:
            raise RuntimeError("from inside")
    assert adapter_state(model.unet) == before


def test_base_passes_can_be_nested(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1)
    before = adapter_state(model.unet)
    with adapters_off(model.unet):
        with adapters_off(model.unet):
            pass
        assert all(layer.disable_adapters for layer in lora_layers(model.unet))
    assert adapter_state(model.unet) == before


@both_schemes
def test_the_base_is_the_model_before_training(tiny_sdxl, scheme):
    untouched = picture(tiny_model(tiny_sdxl), batch(2))
    model = tiny_model(tiny_sdxl, 0.02, **scheme)
    assert (picture(model, batch(2)) - untouched).abs().mean() > 0.5
    with model.base_weights():
        close(picture(model, batch(2)), untouched)


def test_the_base_of_full_fine_tuning_stays_behind(tiny_sdxl):
    model = tiny_model(tiny_sdxl, **FULL)
    base = {name: p.clone() for name, p in model.base_unet.named_parameters()}
    optimizer = torch.optim.SGD(model.trainable_parameters, lr=0.1)
    model.get_loss_and_metrics(batch(2))
    optimizer.step()
    assert all(torch.equal(p, base[name]) for name, p in model.base_unet.named_parameters())
    assert any(not torch.equal(p, base[name]) for name, p in model.unet.named_parameters())
    tuned = model.unet
    with model.base_weights():
        assert model.unet is model.base_unet
    assert model.unet is tuned
    with pytest.raises(RuntimeError, match="from inside"), model.base_weights():
        raise RuntimeError("from inside")
    assert model.unet is tuned


@pytest.mark.parametrize(("kl_coeff", "log_kl", "calls"), [(0.1, False, 6), (0, True, 6), (0, False, 4)])
def test_the_base_is_asked_only_where_a_kl_or_a_log_needs_it(tiny_sdxl, kl_coeff, log_kl, calls):
    model = tiny_model(tiny_sdxl, 0.1, draftp={"kl_coeff": kl_coeff, "log_kl": log_kl})
    ran = count_calls(model.unet)
    _, metrics = model.get_loss_and_metrics(batch(2))
    assert len(ran) == calls  # N = 4 tuned, K = 2 base
    assert (metrics["kl_penalty"] is None) == (calls == 4)


# -------------------------------------------------------------------------------------------------- batches and noise


def test_a_batch_of_4_equals_4_batches_of_1(tiny_sdxl):
    """In float32, where kernels round differently by batch size."""
    model = tiny_model(tiny_sdxl, 0.05, model={"precision": "fp32"})
    together = batch(4)

    def latents(prompts):
        with torch.no_grad():
            cond = model.encode(prompts)
            return latents_at(model, cond, model.networks.start(prompts), len(model.schedule))

    apart = torch.cat([latents(one) for one in together.split(1)])
    torch.testing.assert_close(latents(together), apart, rtol=1e-4, atol=1e-4 * apart.abs().max().item())


def test_noise_depends_on_seed_and_size_alone(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    noise = model.initial_noise(batch(4))
    assert torch.equal(model.initial_noise(batch(2, first=1)), noise[1:3])
    other = Batch(["x", "y", "z"], [3, 0, 3], (64, 64), [None] * 3)
    torch.manual_seed(99)
    assert torch.equal(model.initial_noise(other), noise[[3, 0, 3]])
    assert not torch.equal(noise[0], noise[1])
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_plain_lists_of_prompts_get_fresh_noise_that_a_rerun_repeats(tiny_sdxl):
    first, again = tiny_model(tiny_sdxl), tiny_model(tiny_sdxl)
    seeds = [first.as_batch(["a", "b"], training=True).seeds, first.as_batch(["a", "b"]).seeds]
    assert len({*seeds[0], *seeds[1]}) == 4
    assert again.as_batch(["c", "d"]).seeds == seeds[0], "only training uses noise up"
    assert again.as_batch(["c", "d"], training=True).seeds == seeds[0]
    assert again.as_batch(["c"]).seeds == seeds[1][:1]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_equal_one_big_batch(tiny_sdxl, micro):
    """3 leaves a smaller last one, which must weigh less."""
    loss, metrics, gradient = train_step(tiny_model(tiny_sdxl, 0.1, trainer={"micro_batch_size": 4}), batch(4))
    in_parts = tiny_model(tiny_sdxl, 0.1, trainer={"micro_batch_size": micro, "global_batch_size": 12})
    loss_, metrics_, gradient_ = train_step(in_parts, batch(4))
    assert loss_ == pytest.approx(loss, abs=1e-9)
    assert metrics_ == pytest.approx(metrics, abs=1e-9)
    close(gradient_, gradient)


def test_gradients_add_up_over_batches(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1)
    once = train_step(model, batch(2))[2].clone()
    close(train_step(model, batch(2))[2], 2 * once)


# ------------------------------------------------------------------------------------------------- loss and metrics


def test_metrics_of_a_training_step(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1)
    loss, metrics = model.get_loss_and_metrics(batch(4))
    assert set(metrics) == {"loss", "reward", "kl_penalty"}
    assert all(isinstance(value, float) for value in [loss, *metrics.values()])
    assert loss == metrics["loss"] == pytest.approx(-metrics["reward"] + 0.1 * metrics["kl_penalty"], abs=1e-12)


def test_forward_only_gives_pictures_and_no_gradient(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1)
    loss, metrics = model.get_loss_and_metrics(batch(3), forward_only=True)
    images, captions = metrics["images_and_captions"]
    assert set(metrics) == {"loss", "reward", "kl_penalty", "images_and_captions"}
    assert captions == list(batch(3).prompts)
    assert not images.requires_grad
    close(images * 255, picture(model, batch(3)))
    assert all(p.grad is None for p in model.trainable_parameters)
    assert loss == pytest.approx(model.get_loss_and_metrics(batch(3))[0], abs=1e-9)


def test_forward_and_loss_as_two_functions(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1)
    image, loss_func = model.get_forward_output_and_loss_func()(iter([batch(2)]), model)
    close(image * 255, picture(model, batch(2)))
    loss, metrics = loss_func(image)
    assert loss.item() == metrics["loss"] == pytest.approx(model.get_loss_and_metrics(batch(2))[0], abs=1e-9)
    loss.backward()
    image, loss_func = model.get_forward_output_and_loss_func(validation_step=True)(iter([batch(2)]), model)
    assert not image.requires_grad
    assert "images_and_captions" in loss_func(image)[1]


def test_each_picture_is_scored_with_its_own_prompt(tiny_sdxl):
    model, seen = tiny_model(tiny_sdxl), []

    def spy(images, prompts):
        seen.append((images.shape, images.min() >= 0, images.max() <= 1, prompts))
        return prefers_red(images, prompts)

    model.reward_model = spy
    model.get_loss_and_metrics(batch(4))
    first, second = batch(4).split(2)
    assert seen == [((2, 3, 64, 64), True, True, list(part.prompts)) for part in (first, second)]


# --------------------------------------------------------------------------------------------------- churn, annealing


def test_churn_is_reproducible_whatever_the_batch(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.05, sampling={"s_churn": 1.2})
    together = picture(model, batch(4))
    torch.manual_seed(3)
    close(picture(model, batch(2, first=0)), together[:2])
    close(picture(model, batch(4).split(3)[1]), together[3:])
    calm = picture(tiny_model(tiny_sdxl, 0.05), batch(4))
    assert (together - calm).abs().mean() > 1


@both_schemes
@pytest.mark.parametrize("churn", [0, 1.2])
def test_annealing_with_weight_0_is_base_and_with_1_tuned(tiny_sdxl, scheme, churn):
    """Bit for bit, but that a LoRA in training is folded where the tuned network alone is asked."""
    model = tiny_model(tiny_sdxl, 0.02 if scheme else 0.1, **scheme, sampling={"s_churn": churn})
    prompts = batch(2)
    noise = model.initial_noise(prompts)
    tuned = model.annealed_guidance(prompts, noise, weighing("draft"))
    torch.testing.assert_close(tuned, picture(model, prompts), rtol=0, atol=1e-3 if not scheme else 0)  # of 255
    with model.base_weights():
        base = picture(model, prompts)
    assert torch.equal(model.annealed_guidance(prompts, noise, weighing("base")), base)
    mixed = model.annealed_guidance(prompts, noise)
    assert torch.equal(mixed, model.annealed_guidance(prompts, noise, lambda sigma, sigma_next, i, n: i / n))
    assert (mixed - tuned).abs().mean() > 0.1
    assert (mixed - base).abs().mean() > 0.1
    assert not mixed.requires_grad


@pytest.mark.parametrize(
    ("kind", "tuned", "base"), [("base", 0, 4), ("draft", 4, 0), ("step_0.5", 2, 2), ("linear", 3, 4)]
)
def test_a_step_with_weight_0_or_1_asks_one_network(tiny_sdxl, kind, tuned, base):
    model = tiny_model(tiny_sdxl, 0.02, **FULL)
    tuned_calls, base_calls = count_calls(model.unet), count_calls(model.base_unet)
    model.annealed_guidance(batch(1), model.initial_noise(batch(1)), weighing(kind))
    assert (len(tuned_calls), len(base_calls)) == (tuned, base)


# ----------------------------------------------------------------------------------------------------- conditioning


def test_a_negative_prompt_changes_the_picture(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    absent, given = picture(model, batch(2)), picture(model, batch(2, negatives=["blurry", "blurry"]))
    assert (absent - given).abs().mean() > 1
    of_the_run = tiny_model(tiny_sdxl, sampling={"negative_prompt": "blurry"})
    assert torch.equal(picture(of_the_run, batch(2)), given)
    assert (picture(of_the_run, batch(2, negatives=["dark", None]))[0] - given[0]).abs().mean() > 1


def test_negative_prompts_mix_with_absent_ones(tiny_sdxl):
    """An absent one is zeros, as SDXL was trained; an empty one is encoded like any other."""
    model = tiny_model(tiny_sdxl)
    cond = model.encode(batch(4, negatives=[None, "blurry", "", None]))
    uncond, pooled = cond.prompt_embeds[:4], cond.text_embeds[:4]
    sequence, vector = SDXL().encode_prompts(model.parts, ["blurry", ""])
    assert torch.equal(uncond[[0, 3]], torch.zeros_like(uncond[[0, 3]]))
    assert torch.equal(pooled[[0, 3]], torch.zeros_like(pooled[[0, 3]]))
    close(uncond[[1, 2]], sequence)
    close(pooled[[1, 2]], vector)
    alone = [picture(model, one) for one in batch(4, negatives=[None, "blurry", "", None]).split(1)]
    close(picture(model, batch(4, negatives=[None, "blurry", "", None])), torch.cat(alone))


def test_a_model_that_encodes_the_empty_prompt_gets_no_zeros(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    model.parts.zeros_for_empty = False
    close(model.encode(batch(1)).prompt_embeds[:1], SDXL().encode_prompts(model.parts, [""])[0])


def test_prompts_of_other_languages_and_endless_ones_are_encoded(tiny_sdxl):
    sequence, pooled = SDXL().encode_prompts(tiny_model(tiny_sdxl).parts, ["", "日本語 🎨", "red " * 500])
    assert sequence.shape == (3, 77, 32 + 48)
    assert pooled.shape == (3, 48)
    assert sequence.isfinite().all()


def test_size_keys_are_height_then_width(tiny_sdxl):
    model = tiny_model(tiny_sdxl, sampling={"height": 64, "width": 128})
    keys = model.append_sdxl_size_keys(["a", "b"])
    assert {name: value.tolist() for name, value in keys.items()} == {
        "original_size_as_tuple": [[64, 128]] * 2,
        "target_size_as_tuple": [[64, 128]] * 2,
        "crop_coords_top_left": [[0, 0]] * 2,
    }
    assert model.encode(batch(1, (64, 128))).time_ids.tolist() == [[64, 128, 0, 0, 64, 128]] * 2


def test_a_wide_picture_is_not_told_that_it_is_tall(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    wide = batch(2, (64, 128))
    noise = model.initial_noise(wide)
    assert noise.shape == (2, 4, 8, 16)
    right = picture(model, wide, noise)
    assert right.shape == (2, 3, 64, 128)
    # generate takes the size of the noise, so a plain list is told the same as the batch
    assert torch.equal(picture(model, list(wide.prompts), noise), right)
    cond, transposed = model.encode(wide), model.encode(replace(wide, size=(128, 64)))
    x, level = model.networks.at_first_level(noise), model.schedule.level(0)
    with torch.no_grad():
        assert (model.networks.tuned(cond)(x, level) - model.networks.tuned(transposed)(x, level)).abs().max() > 0.01


def test_one_model_trains_on_several_sizes(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    for size in [(64, 64), (64, 96), (128, 64)]:
        _, metrics = model.get_loss_and_metrics(batch(2, size), forward_only=True)
        assert metrics["images_and_captions"][0].shape == (2, 3, *size)
    assert math.isfinite(model.get_loss_and_metrics(batch(2, (128, 64)))[0])


# ----------------------------------------------------------------------------------------------------- the contracts


def test_what_generate_returns(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1, draftp={"truncation_steps": 3})
    noise = model.initial_noise(batch(2))
    before = noise.clone()
    image, eps_tuned, eps_base = model.generate(list(batch(2).prompts), noise)
    assert torch.equal(noise, before)
    assert image.shape == (2, 3, 64, 64)
    assert 0 <= image.min() < 10
    assert 100 < image.max() <= 255
    assert eps_tuned.shape == eps_base.shape == (3, 2, 4, 8, 8)
    assert image.requires_grad
    assert eps_tuned.requires_grad
    assert not eps_base.requires_grad


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (SDXLDRaFTPModel, ["cfg", "parts"]),
        (SDXLDRaFTPModel.configure_sharded_model, ["self"]),
        (SDXLDRaFTPModel.append_sdxl_size_keys, ["self", "prompts"]),
        (SDXLDRaFTPModel.generate, ["self", "batch", "x_T"]),
        (SDXLDRaFTPModel.annealed_guidance, ["self", "batch", "x_T", "weighing_fn"]),
        (SDXLDRaFTPModel.get_forward_output_and_loss_func, ["self", "validation_step"]),
        (SDXLDRaFTPModel.get_loss_and_metrics, ["self", "batch", "forward_only"]),
        (SDXLDRaFTPModel.base_weights, ["self"]),
        (draftcli.timesteps, ["n"]),
        (draftcli.get_reward_model, ["cfg"]),
        (draftcli.load_config, ["preset", "overrides"]),
        (Reward.__call__, ["self", "images", "prompts"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_public_signatures(function, parameters):
    """Names and order are the contract; what follows them must have a default."""
    found = list(inspect.signature(function).parameters.values())
    assert [p.name for p in found[: len(parameters)]] == parameters
    assert all(p.default is not p.empty for p in found[len(parameters) :])


def test_public_names_are_the_same_from_everywhere():
    assert draftcli.SDXLDRaFTPModel is SDXLDRaFTPModel
    assert set(draftcli.__all__) >= {"SDXLDRaFTPModel", "get_reward_model", "load_config", "timesteps"}


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("scheme", [{}, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_float32_weights(tiny_sdxl, precision, scheme):
    model = tiny_model(tiny_sdxl, model={"precision": precision}, **scheme)
    model.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256, enabled=precision == "fp16")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for p in model.trainable_parameters} == {torch.float32}
    assert {p.dtype for p in model.unet.parameters() if not p.requires_grad} == ({half} if not scheme else set())
    assert next(model.vae.parameters()).dtype == torch.float32
    model.get_loss_and_metrics(batch(2))
    scale = model.grad_scaler.get_scale()
    exact = tiny_model(tiny_sdxl, model={"precision": "fp32"}, **scheme)
    exact.get_loss_and_metrics(batch(2))
    found, expected = gradients(model) / scale, gradients(exact)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    # Roughly the same direction is what 8 bits (bf16) leave over 4 steps and a backward through a decoder.
    assert torch.cosine_similarity(found, expected, dim=0) > {"bf16": 0.9, "fp16": 0.99}[precision]
