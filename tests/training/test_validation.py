"""How validation draws and judges: other portions than one picture at a time, and the same pictures."""

from pathlib import Path

import pytest

from draftcli.core.lora.adapters import lora_layers
from draftcli.prompts import Prompt
from draftcli.rewards import WeightedSum, load_held_out
from draftcli.runs import Run
from draftcli.training.validation import Validation
from tests.tiny import PROMPTS, prefers_red, tiny_model


def validated(folder, run, **sharding):
    """Its figures; the rows of each call of the UNet and whether its LoRA was on; how many were judged at once."""
    one = {"micro_batch_size": 1, "global_batch_size": 4}
    model = tiny_model(folder, 0.1, model={"precision": "fp32"}, trainer=one, sharding=sharding)
    asked, judged = [], []
    layer = lora_layers(model.unet)[0]
    model.unet.register_forward_pre_hook(lambda module, seen: asked.append((len(seen[0]), not layer.disable_adapters)))

    def red(images, prompts):
        judged.append(len(images))
        return prefers_red(images, prompts)

    Path(run, "samples").mkdir(parents=True)
    line, _ = Validation(
        model, WeightedSum({"red": red}), load_held_out(model.cfg), [Prompt(text) for text in PROMPTS]
    )(Run(Path(run)), 1)
    return line["rewards"]["red"], asked, judged


def test_pictures_are_drawn_as_the_prefix_is_and_stay_as_they_are(tiny_sdxl):
    """Together, with the LoRA folded; decoder and rewards, the largest things in memory, get a micro-batch."""
    alone, one_by_one, _ = validated(tiny_sdxl, "alone", prefix_batch_size=1, fold_lora=False)
    figures, together, judged = validated(tiny_sdxl, "together")
    assert one_by_one == [(2, False)] * 16 + [(2, True)] * 16
    assert together == [(8, False)] * 8
    assert judged == [1] * 8
    assert figures == pytest.approx(alone, abs=1e-5)
    assert figures["difference"] != pytest.approx(0, abs=1e-3)
