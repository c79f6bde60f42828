import dataclasses

import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.evaluation.scenes import PLACES, RELATIONS, Scene, parse, random_scene


def scenes(n, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, **options) for _ in range(n)]


def without_jitter(scene):
    centres = RELATIONS[scene.where] if len(scene.things) == 2 else [PLACES[scene.where]]
    things = zip(scene.things, centres, strict=True)
    return Scene(
        tuple(dataclasses.replace(thing, centre=centre) for thing, centre in things),
        scene.where,
        scene.background,
    )


def test_parse_undoes_caption():
    drawn = scenes(500, held_out=None, two_things=0.5)
    assert {len(scene.things) for scene in drawn} == {1, 2}
    for scene in drawn:
        assert parse(scene.caption) == without_jitter(scene)
        assert parse(scene.caption).caption == scene.caption


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a small red circle",
        "a small red circle in the middle on a grey background ",
        "A small red circle in the middle on a grey background",
        "a red small circle in the middle on a grey background",
        "a small pink circle in the middle on a grey background",
        "a small red circle in the middle on a red background",
        "a small red circle above on a grey background",
        "a small red circle in the middle a small blue square on a grey background",
        "a small red circle above a small blue square",
        "a small red circle above a blue square on a grey background",
        "a small red circle above small blue square on a grey background",
    ],
)
def test_a_caption_that_no_scene_has_is_refused(caption):
    with pytest.raises(InputError, match="speaks of no scene"):
        parse(caption)
