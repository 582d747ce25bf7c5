"""Under sharding.offload only what a phase needs is on the device. Here a CPU plays both parts, with real copies."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from draftcli.core.engine.residency import JUDGES, UNET, Residency
from draftcli.errors import InputError
from draftcli.planning.live_bytes import LiveBytes
from tests.command import WITH_VALIDATION, draftp, recipe
from tests.tiny import batch, tiny_config, tiny_model


class Judge(nn.Module):
    """A reward with weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 64 * 64, 8).double().requires_grad_(False)

    def forward(self, images, prompts):
        return self.layer(images.flatten(1)).square().mean(1)


def bytes_of(*networks):
    """Bytes of frozen weights and buffers."""
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers()) if not t.requires_grad]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_only_the_group_whose_turn_it_is_lies_on_the_device():
    networks = {name: nn.Linear(4, 4).requires_grad_(False) for name in (UNET, JUDGES)}
    homes = {name: network.weight.data_ptr() for name, network in networks.items()}
    before = {name: network.weight.clone() for name, network in networks.items()}
    residency = Residency(torch.device("cpu"))
    for name, network in networks.items():
        residency.add(name, [network])
    for turn in (UNET, JUDGES, JUDGES, UNET):
        residency.need(turn)
        for name, network in networks.items():
            assert (network.weight.data_ptr() != homes[name]) == (name == turn)
            assert torch.equal(network.weight, before[name])


def test_what_is_trained_stays():
    network = nn.Linear(4, 4)
    residency, home = Residency(torch.device("cpu")), network.weight.data_ptr()
    residency.add(UNET, [network])
    residency.need(UNET)
    assert network.weight.data_ptr() == home


@pytest.mark.parametrize("scheme", ["lora", "none"])
def test_a_step_holds_one_group_at_a_time(tiny_sdxl, scheme):
    """The second copy of frozen weights that is there is the UNet's, then decoder and reward's, then the UNet's."""
    model = tiny_model(tiny_sdxl, sharding={"offload": True}, peft={"peft_scheme": scheme})
    judge = model.reward_model = Judge()
    unets = [model.unet] if model.base_unet is None else [model.unet, model.base_unet]
    copies = []
    live = LiveBytes([t for n in (*unets, model.vae, judge) for t in (*n.parameters(), *n.buffers())])
    need = model.networks.residency.need

    def watched(group):
        before = live.now
        need(group)
        copies.append((group, live.now - before))

    model.networks.residency.need = watched
    with live:
        model.get_loss_and_metrics(batch(4))
    moves = [(group, size) for group, size in copies if size]
    unet, judges = bytes_of(*unets), bytes_of(model.vae, judge)
    assert moves == [(UNET, unet), (JUDGES, judges - unet), (UNET, unet - judges)]


def test_validation_and_pictures_too(tiny_sdxl):
    """The same pictures, whatever order the networks are asked in."""
    plain, offloaded = (tiny_model(tiny_sdxl, 0.1, sharding={"offload": on}) for on in (False, True))
    x_T = plain.initial_noise(batch(2))
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(plain.generate(batch(2), x_T)[0], offloaded.generate(batch(2), x_T)[0])
        assert torch.equal(plain.annealed_images(batch(2), x_T), offloaded.annealed_images(batch(2), x_T))
    assert plain.get_loss_and_metrics(batch(2), True)[0] == offloaded.get_loss_and_metrics(batch(2), True)[0]


def test_a_graph_that_would_miss_its_weights_is_refused(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1, sharding={"offload": True})
    with pytest.raises(InputError, match="takes the UNet's weights away before a backward"):
        model.generate(batch(1), model.initial_noise(batch(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"two_stage": False}, "needs sharding.two_stage true"),
        ({"recompute_steps": False}, "recompute_steps true or unset"),
        ({"strategy": "fsdp"}, "cannot be combined with sharding.strategy fsdp"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_go_with_it(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        tiny_config(tmp_path, sharding={"offload": True, **settings})


def test_a_run_with_it_gives_the_same_lora(tiny_sdxl, tmp_path):
    """Validation, a checkpoint, the reward with its weights: all of a run."""
    sections = {"rewards": {"toy": 1.0}, "data": WITH_VALIDATION, "model": {"precision": "fp64"}}
    sections["trainer"] = {"max_steps": 2, "val_check_interval": 1}
    found = {}
    for offload in (False, True):
        preset = recipe(tiny_sdxl, tmp_path / "tiny.yaml", **sections, sharding={"offload": offload})
        done = draftp("train", "--preset", preset, "--output", tmp_path / f"run-{offload}")
        assert done.code == 0, done.err
        assert ("saves nothing on a CPU" in done.err) == offload
        found[offload] = load_file(tmp_path / f"run-{offload}/final/pytorch_lora_weights.safetensors")
    for name, weight in found[False].items():
        torch.testing.assert_close(found[True][name], weight, atol=1e-7, rtol=0)  # the reward computes in float32
