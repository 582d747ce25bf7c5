"""What every family of models promises, on networks without weights. One in FAMILIES is in these tests by its name."""

import pytest
import torch

from draftcli.core.batch import Batch
from draftcli.core.models.family import FAMILIES, Parts, find_family
from draftcli.core.models.meta import modules_on_meta
from draftcli.errors import InputError

META = torch.device("meta")


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_from_text_to_image(name):
    """Two images of 64 x 96 pixels: what the UNet gets, its output, and the decoder's."""
    family = find_family(name)
    modules = modules_on_meta(family.config_folder, family)
    assert modules.keys() == family.networks.keys()
    encoders = [module for part, module in modules.items() if part.startswith("text_encoder")]
    parts = Parts(modules["unet"], modules["vae"], encoders, family=family)
    width, pooled = parts.unet.config.cross_attention_dim, encoders[-1].config.projection_dim

    def embed(prompts):
        return torch.ones(len(prompts), 77, width), torch.ones(len(prompts), pooled)

    cond = family.condition(parts, embed, Batch(["a fox", "an owl"], [1, 2], (64, 96), ["blurry", None]), None)
    assert cond.prompt_embeds.shape == (4, 77, width)
    assert len(cond[1:].prompt_embeds) == len(cond.conditional.prompt_embeds) == 2
    assert (cond[1:].prompt_embeds[0] == 0).all() == parts.zeros_for_empty, "the second image has no negative prompt"
    x = torch.empty(4, parts.unet.config.in_channels, 8, 12, device=META)
    output = family.predict(parts.unet, x, 500, cond.to(META, torch.float32))
    assert (output.shape, output.dtype) == (x.shape, x.dtype)
    half = family.predict(parts.unet, x[:2], 500, cond.conditional.to(META, torch.float32))
    assert half.shape == x[:2].shape
    assert family.decode(parts.vae, x[:2]).shape == (2, 3, 64, 96)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_called_by_its_name_and_has_a_schedule(name):
    family = find_family(name)
    assert family.name == name
    parts = Parts(torch.nn.Module(), torch.nn.Module(), family=family)
    for spacing in ("trailing", "leading"):
        schedule = family.schedule(parts, 25, spacing)
        assert len(schedule) == 25
        assert schedule.sigmas[-1] == 0
        assert (schedule.sigmas.diff() < 0).all()


def test_a_family_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="there is no such family"):
        find_family("nowhere")
