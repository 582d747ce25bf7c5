"""The toy world's grammar and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from draftcli.toy import world
from draftcli.toy.prompts import prompt_files
from draftcli.toy.world import Scene

PROMPTS = Path(__file__).parents[2] / "presets" / "prompts"


def test_every_caption_reads_back_as_its_scene() -> None:
    scenes = world.all_scenes()
    assert len({world.caption(scene) for scene in scenes}) == len(scenes) == 1920
    assert all(world.parse(world.caption(scene)) == scene for scene in scenes)


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a red circle", Scene("circle", "red")),
        ("  A  Large RED circle. ", Scene("circle", "red", "large")),
        ("a blue star on a gray background", Scene("star", "blue", background="grey")),
        ("an orange ring in the center", Scene("ring", "orange", place="centre")),
        ("a big pink cross at the top of a black background", Scene("cross", "pink", "large", "top", "black")),
    ],
)
def test_what_is_left_unsaid_is_any(text: str, scene: Scene) -> None:
    assert world.parse(text) == scene


@pytest.mark.parametrize(
    "text", ["", "a circle", "red", "a photo of a dog", "a red circle and a blue square", "a red red"]
)
def test_outside_the_grammar_is_none(text: str) -> None:
    assert world.parse(text) is None


def test_held_out_scenes_share_every_value_but_no_scene_with_training() -> None:
    training, held_out = world.training_scenes(), world.held_out_scenes()
    assert len(training) + len(held_out) == 1920
    assert not set(training) & set(held_out)
    for name in world.ATTRIBUTES:
        assert {getattr(scene, name) for scene in training} == set(world.choices(name))
        assert {getattr(scene, name) for scene in held_out} == set(world.choices(name))


def test_a_few_held_out_scenes_are_balanced() -> None:
    chosen = world.held_out_scenes(64)
    assert len(set(chosen)) == 64
    for name in world.ATTRIBUTES:
        uses = [sum(getattr(scene, name) == value for scene in chosen) for value in world.choices(name)]
        assert max(uses) - min(uses) <= 3, (name, uses)


def test_pictures_are_floats_in_range_and_repeat_with_the_seed() -> None:
    for scene in (*world.held_out_scenes(12), Scene("star", "red")):
        for wear in (0.0, 1.0):
            picture = world.render(scene, np.random.default_rng(3), wear)
            assert picture.shape == (3, 64, 64)
            assert picture.dtype == np.float32
            assert picture.min() >= 0
            assert picture.max() <= 1
            assert (picture == world.render(scene, np.random.default_rng(3), wear)).all()


def test_prompt_files_are_what_the_world_makes() -> None:
    for name, captions in prompt_files().items():
        assert (PROMPTS / name).read_text(encoding="utf-8").splitlines() == captions
        assert len(captions) >= 64
        assert all(world.parse(text) for text in captions)
