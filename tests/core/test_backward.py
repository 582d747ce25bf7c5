"""A training step in two stages, folded, cached, recomputed: always the loss and gradient of one plain backward.

float64 and 1e-9 unless said otherwise.
"""

import math
import weakref

import pytest
import torch
import torch._dynamo

from draftcli.core.batch import ImageNoise, derived_seed
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine import sharding
from draftcli.core.engine.folding import folded, lost_share
from draftcli.core.lora.adapters import lora_layers
from draftcli.core.models.loading import load_parts
from draftcli.core.models.sdxl import SDXL
from draftcli.errors import InputError
from tests.tiny import batch, gradient_steps, latents_at, move, prefers_red, tiny_config, tiny_model

ON_ALL = {"rank": 2, "target_modules": ["to_q", "to_v", "ff.net.2", "conv1", "proj_in"]}
FULL = {"peft_scheme": "none"}
ONE_STAGE = {"two_stage": False, "fold_lora": False}


def step(model, prompts):
    """Loss, metrics and gradient of a batch."""
    loss, metrics = model.get_loss_and_metrics(prompts)
    return loss, metrics, torch.cat([p.grad.flatten() for p in model.trainable_parameters])


def assert_same(found, expected, tolerance=1e-9):
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert found[1] == pytest.approx(expected[1], abs=tolerance)
    assert expected[2].norm() > 1e-5
    assert (found[2] - expected[2]).norm() <= tolerance * expected[2].norm()


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("peft", [ON_ALL, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("churn", [0, 1.2], ids=["calm", "churn"])
def test_two_stages_equal_one(tiny_sdxl, k, recompute, peft, churn):
    """One image per backward, the prefix in threes of four, so that its last batch is smaller."""
    settings = {"draftp": {"truncation_steps": k}, "peft": peft, "sampling": {"s_churn": churn}}
    moved = 0.1 if peft is ON_ALL else 0.01
    one_stage = tiny_model(tiny_sdxl, moved, **settings, sharding=ONE_STAGE, trainer={"micro_batch_size": 4})
    levers = {"recompute_steps": recompute, "prefix_batch_size": 3}
    two_stage = tiny_model(tiny_sdxl, moved, **settings, sharding=levers, trainer={"micro_batch_size": 1})
    assert_same(step(two_stage, batch(4)), step(one_stage, batch(4)))


@pytest.mark.parametrize(
    "levers",
    [
        {"channels_last": True},
        {"activation_checkpointing": True},
        {"decode_batch_size": 1},
        {"attention": "math"},
        {"attention": "math", "activation_checkpointing": True},
        {"offload": True},
        {"offload": True, "activation_checkpointing": True},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("peft", [ON_ALL, FULL], ids=["lora", "full"])
def test_each_lever_keeps_the_gradient(tiny_sdxl, levers, peft):
    moved = 0.1 if peft is ON_ALL else 0.01
    plain = {"draftp": {"truncation_steps": 2}, "peft": peft}
    expected = step(tiny_model(tiny_sdxl, moved, **plain, sharding=ONE_STAGE), batch(3))
    assert_same(step(tiny_model(tiny_sdxl, moved, **plain, sharding=levers), batch(3)), expected)


@pytest.mark.parametrize(
    "peft",
    [
        pytest.param(ON_ALL, id="lora"),
        pytest.param(FULL, id="full", marks=pytest.mark.slow(reason="more of the same, another trace of each block")),
    ],
)
def test_compiled_blocks_keep_the_gradient(tiny_sdxl, monkeypatch, peft):
    """All of torch.compile but the C++ compiler: traced, and differentiated ahead of time."""
    monkeypatch.setattr(sharding, "COMPILER", "aot_eager")
    assert_compiled_is_plain(tiny_sdxl, peft)


@pytest.mark.slow(reason="a run of the C++ compiler for each shape of block")
def test_compiled_to_machine_code(tiny_sdxl):
    assert_compiled_is_plain(tiny_sdxl, {"rank": 2})


def assert_compiled_is_plain(tiny_sdxl, peft):
    settings, moved = {"draftp": {"truncation_steps": 2}, "peft": peft}, 0.01 if peft is FULL else 0.1
    expected = step(tiny_model(tiny_sdxl, moved, **settings, sharding=ONE_STAGE), batch(2))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for checkpointing in (False, True):
        levers = {"compile": True, "activation_checkpointing": checkpointing}
        assert_same(step(tiny_model(tiny_sdxl, moved, **settings, sharding=levers), batch(2)), expected)
    assert counters["stats"]["unique_graphs"] > 5
    assert not counters["graph_break"]


def test_an_attention_that_does_not_work_here_is_refused(tiny_sdxl):
    with pytest.raises(InputError, match=r"sharding.attention cudnn does not work on cpu in float64; what does: auto"):
        tiny_model(tiny_sdxl, sharding={"attention": "cudnn"})


def test_the_chosen_attention_is_what_runs(tiny_sdxl):
    model = tiny_model(tiny_sdxl, sharding={"attention": "math"}, model={"precision": "fp32"})
    cond, x = model.encode(batch(1)), model.networks.at_first_level(model.initial_noise(batch(1)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        latents_at(model, cond, x, 2)
    kernels = {event.name for event in profile.events() if "scaled_dot_product_" in event.name}
    assert kernels == {"aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math"}


def test_compile_says_in_one_line_what_is_missing(tiny_sdxl, monkeypatch):
    def without_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(sharding, "COMPILER", without_compiler)
    with pytest.raises(InputError, match=r"torch.compile does not work here, set sharding.compile=false .*no C"):
        step(tiny_model(tiny_sdxl, sharding={"compile": True}), batch(1))


def test_a_loss_of_ones_own_is_used(tiny_sdxl):
    plain = tiny_model(tiny_sdxl, 0.1)
    expected = step(plain, batch(2))[2]
    plain.unet.zero_grad()

    def doubled(data_iterator, model):
        image, loss_func = model.get_forward_output_and_loss_func()(data_iterator, model)
        return image, lambda image: (2 * (found := loss_func(image))[0], found[1])

    own = SDXLDRaFTPModel(plain.cfg, load_parts(plain.cfg.model), loss=doubled)
    own.reward_model = prefers_red
    move(own, 0.1)
    torch.testing.assert_close(step(own, batch(2))[2], 2 * expected, atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------- memory


class Marker:
    """Lives as long as a node of a graph."""

    @classmethod
    def on(cls, tensor, alive):
        """Put one on the node that made `tensor`, and count it in `alive`; nodes themselves take no weak references."""
        marker = tensor.grad_fn.metadata["marker"] = cls()
        alive.add(marker)


def live_graphs(model, monkeypatch):
    """How many decoded pictures are alive with their graph whenever the UNet runs with gradient."""
    alive, seen = weakref.WeakSet(), []
    decode = model.networks.decode

    def watched(x_0):
        image = decode(x_0)
        Marker.on(image, alive)
        return image

    monkeypatch.setattr(model.networks, "decode", watched)
    model.unet.register_forward_pre_hook(lambda *_: seen.append(len(alive)) if torch.is_grad_enabled() else None)
    return seen


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_decoder_is_freed_before_the_unet_runs_with_gradient(tiny_sdxl, monkeypatch, recompute):
    model = tiny_model(tiny_sdxl, sharding={"recompute_steps": recompute}, trainer={"micro_batch_size": 1})
    seen = live_graphs(model, monkeypatch)
    model.get_loss_and_metrics(batch(3))
    assert seen == [0] * 6  # K = 2 steps of three pictures


def test_recomputed_steps_do_not_pile_up(tiny_sdxl):
    model = tiny_model(tiny_sdxl, draftp={"truncation_steps": 4}, sharding={"recompute_steps": True})
    alive, most = weakref.WeakSet(), []

    def after(module, inputs, output):
        if torch.is_grad_enabled():
            Marker.on(output[0], alive)
            most.append(len(alive))

    model.unet.register_forward_hook(after)
    model.get_loss_and_metrics(batch(2))
    # While a step runs, the one before it still has a name; its backward has emptied it. No other is left.
    assert most == [1, 2, 2, 2]


# ------------------------------------------------------------------------------------------------------------- folding


def own_weights(unet):
    return [layer.get_base_layer().weight for layer in lora_layers(unet)]


def test_folding_never_drifts(tiny_sdxl):
    """Also after an exception; and the same tensors come back, not copies."""
    model = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL, model={"precision": "fp32"})
    tensors = own_weights(model.unet)
    before = [(w.data_ptr(), w.clone()) for w in tensors]

    def fold_and_fail():
        with folded(model.unet, 1.0) as done:
            assert done
            assert not any(torch.equal(w, b) for w, (_, b) in zip(tensors, before, strict=True))
            raise RuntimeError("from inside")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="from inside"):
            fold_and_fail()
    assert all(w.data_ptr() == p and torch.equal(w, b) for w, (p, b) in zip(tensors, before, strict=True))
    assert not any(layer.disable_adapters for layer in lora_layers(model.unet))


def folding_error(model, prompts):
    """Of x_K: rms of folded minus unfolded, over the rms of unfolded."""
    cond, start = model.encode(prompts), model.networks.start(prompts)
    plain = latents_at(model, cond, start, 2)
    with folded(model.unet, 1.0):
        return float((latents_at(model, cond, start, 2) - plain).norm() / plain.norm())


@pytest.mark.parametrize(("precision", "most"), [("fp64", 1e-13), ("fp32", 1e-5)])
def test_folded_prefix_is_the_unfolded_one(tiny_sdxl, precision, most):
    model = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL, model={"precision": precision})
    assert 0 < folding_error(model, batch(2)) < most


def test_a_lora_that_bf16_would_swallow_is_not_folded(tiny_sdxl):
    """An update below half an ulp vanishes wholly; the same in float32 folds."""
    model = tiny_model(tiny_sdxl, 1e-4, peft=ON_ALL, model={"precision": "bf16"})
    assert lost_share(model.unet) > 0.5
    assert lost_share(tiny_model(tiny_sdxl, 1e-4, peft=ON_ALL, model={"precision": "fp32"}).unet) < 0.01
    before = [w.clone() for w in own_weights(model.unet)]
    with folded(model.unet, 0.01) as done:
        assert not done
        assert all(torch.equal(w, b) for w, b in zip(own_weights(model.unet), before, strict=True))
        assert not any(layer.disable_adapters for layer in lora_layers(model.unet))


def test_folding_that_was_asked_for_and_is_not_done_is_said(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 1e-4, peft=ON_ALL, model={"precision": "bf16"}, sharding={"fold_lora": True})
    with pytest.warns(UserWarning, match="fold_lora has no effect: rounding"), model.networks.without_gradient():
        pass


def test_a_lora_that_is_zero_loses_nothing(tiny_sdxl):
    assert lost_share(tiny_model(tiny_sdxl, model={"precision": "bf16"}).unet) == 0


@pytest.mark.parametrize("fold", [True, False])
def test_folding_can_be_switched_off(tiny_sdxl, fold):
    model = tiny_model(tiny_sdxl, 0.1, sharding={"fold_lora": fold})
    with model.networks.without_gradient():
        assert {layer.disable_adapters for layer in lora_layers(model.unet)} == {fold}
        assert not torch.is_grad_enabled()


def test_adapters_that_are_off_are_not_folded_in(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1)
    before = [w.clone() for w in own_weights(model.unet)]
    with model.base_weights(), folded(model.unet, 0.01):
        assert all(torch.equal(w, b) for w, b in zip(own_weights(model.unet), before, strict=True))


# ---------------------------------------------------------------------------------------------------- less to compute


def rows(model):
    """Batch sizes that the UNet sees from now on."""
    seen = []
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


def test_without_guidance_half_is_computed(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1, sampling={"scale": 1.0})
    seen = rows(model)
    model.get_loss_and_metrics(batch(2))
    assert seen == [2] * 6
    doubled = tiny_model(tiny_sdxl, 0.1, sampling={"scale": 1 + 1e-12})
    found, expected = model.get_loss_and_metrics(batch(2)), doubled.get_loss_and_metrics(batch(2))
    assert found[1] == pytest.approx(expected[1], abs=1e-8)


def test_guidance_interval(tiny_sdxl):
    inside = tiny_model(tiny_sdxl, 0.1, sampling={"guidance_interval": [0.25, 0.75]})
    seen = rows(inside)
    with torch.no_grad():
        image = inside.generate(batch(1), inside.initial_noise(batch(1)))[0]
    assert seen == [1, 2, 2, 2, 1, 1]  # N = 4 tuned; the base beside the last two
    whole = tiny_model(tiny_sdxl, 0.1)
    assert (image - whole.generate(batch(1), whole.initial_noise(batch(1)))[0]).abs().mean() > 0.1
    with pytest.raises(InputError, match="the first number is the smaller one"):
        tiny_config(tiny_sdxl, sampling={"guidance_interval": [0.8, 0.2]})


def test_a_larger_prefix_batch_means_fewer_calls(tiny_sdxl):
    model = tiny_model(tiny_sdxl, draftp={"truncation_steps": 1}, trainer={"micro_batch_size": 1})
    seen = rows(model)
    model.get_loss_and_metrics(batch(4))
    assert seen == [8] * 3 + [2] * 8  # 3 steps of prefix; then tuned and base of each picture


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that the text encoders were asked for."""
    asked, plain = [], SDXL.encode_prompts

    def spy(family, parts, prompts):
        asked.extend(prompts)
        return plain(family, parts, prompts)

    monkeypatch.setattr(SDXL, "encode_prompts", spy)
    return asked


def test_a_prompt_is_encoded_once(tiny_sdxl, encoded):
    model = tiny_model(tiny_sdxl)
    first = model.encode(batch(3, negatives=["bad", None, "bad"]))
    again = model.encode(batch(3, negatives=["bad", None, "bad"]))
    assert sorted(encoded) == sorted([*batch(3).prompts, "bad", ""])
    assert torch.equal(first.prompt_embeds, again.prompt_embeds)


def test_embeddings_do_not_depend_on_the_batch(tiny_sdxl):
    """Bit for bit, in float32: or a resumed run, whose first batch is another, would differ."""
    settings = {"model": {"precision": "fp32"}}
    together = tiny_model(tiny_sdxl, **settings).encode(batch(4))
    last = tiny_model(tiny_sdxl, **settings).encode(batch(4).split(3)[1])
    assert torch.equal(together[3:].prompt_embeds, last.prompt_embeds)
    assert torch.equal(together[3:].text_embeds, last.text_embeds)


def test_embeddings_on_disk(tiny_sdxl, encoded, tmp_path):
    folder = tmp_path / "prompts"
    settings = {"sharding": {"prompt_cache": str(folder)}}
    first = tiny_model(tiny_sdxl, **settings).encode(batch(2))
    assert len(list(folder.iterdir())) == 2
    encoded.clear()
    assert torch.equal(tiny_model(tiny_sdxl, **settings).encode(batch(2)).prompt_embeds, first.prompt_embeds)
    assert not encoded
    tiny_model(tiny_sdxl, model={"precision": "fp32"}, **settings).encode(batch(2))
    assert len(list(folder.iterdir())) == 4, "another dtype is another embedding"
    encoded.clear()
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(tiny_model(tiny_sdxl, **settings).encode(batch(2)).prompt_embeds, first.prompt_embeds)
    assert len(encoded) == 2, "damaged files are made again"


# ------------------------------------------------------------------------------------------------------------ DRaFT-LV


def low_variance_loss_by_hand(model, prompts, n):
    """DRaFT-LV's listing, in latent space, with the mean over the 1 + n samples."""
    cond, last = model.encode(prompts), len(model.schedule) - 1
    sigma = float(model.schedule.sigmas[last])
    x = latents_at(model, cond, model.networks.start(prompts), last)
    rewards, penalties, starts = [], [], [x]
    for j in range(n):
        with torch.no_grad():
            x_0 = gradient_steps(model, cond, x, last).x_0
        noise = ImageNoise([derived_seed(seed, "low variance", j) for seed in prompts.seeds])(tuple(x.shape))
        starts.append(x_0 + sigma * noise.to(x))
    for start in starts:
        walked = gradient_steps(model, cond, start, last)
        rewards.append(prefers_red(model.decode(walked.x_0), prompts.prompts).mean())
        penalties.append((walked.eps.guided - walked.eps_base.guided).square().mean())
    return -sum(rewards) / (n + 1) + model.cfg.draftp.kl_coeff * sum(penalties) / (n + 1)


@pytest.mark.parametrize("n", [1, 2])
def test_low_variance_samples(tiny_sdxl, n):
    model = tiny_model(
        tiny_sdxl, 0.1, peft=ON_ALL, draftp={"truncation_steps": 1, "low_variance_samples": n}, sampling={"steps": 3}
    )
    loss, _, gradient = step(model, batch(3))
    model.unet.zero_grad()
    expected = low_variance_loss_by_hand(model, batch(3), n)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    by_hand = torch.cat([p.grad.flatten() for p in model.trainable_parameters])
    torch.testing.assert_close(gradient, by_hand, atol=1e-9, rtol=1e-9)


def test_low_variance_samples_cost_no_second_rollout(tiny_sdxl):
    model = tiny_model(tiny_sdxl, draftp={"truncation_steps": 1, "low_variance_samples": 2})
    seen = rows(model)
    _, metrics = model.get_loss_and_metrics(batch(2))
    assert len(seen) == 3 + 3 * (1 + 1 + 1)  # prefix; then each sample's last step, again with gradient, and base
    assert math.isfinite(metrics["loss"])
    with pytest.raises(InputError, match=r"needs sharding\.two_stage"):
        tiny_config(tiny_sdxl, draftp={"low_variance_samples": 2}, sharding={"two_stage": False})
