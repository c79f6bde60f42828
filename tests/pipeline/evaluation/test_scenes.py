import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.console import InputError
from pipeline.evaluation.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    JITTER,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Reading,
    Scene,
    Thing,
    describes,
    draw,
    is_held_out,
    parse,
    random_scene,
    read,
)

WORDS = ("colour", "shape", "size", "place", "background")


def scenes(n, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, **options) for _ in range(n)]


def said(scene):
    """The five words of a one-object scene."""
    thing = scene.things[0]
    return Reading(thing.colour, thing.shape, thing.size, scene.where, scene.background)


def share_right(scenes_drawn, readings):
    pairs = [(said(s), r) for s, r in zip(scenes_drawn, readings, strict=True)]
    return {w: sum(getattr(a, w) == getattr(b, w) for a, b in pairs) / len(pairs) for w in WORDS}


@pytest.fixture(scope="module")
def read_back():
    """2,000 scenes of one object, seen and held out, and what the checker reads of each."""
    drawn, readings = [], []
    for side, seed in ((32, 0), (64, 1)):
        for scene in scenes(1000, seed, held_out=None):
            drawn.append(scene)
            readings.append(read(draw(scene, side)))
    return drawn, readings


# ---- drawing scenes


def pairs_of(drawn):
    return {(thing.colour, thing.shape) for scene in drawn for thing in scene.things}


def test_no_training_scene_shows_a_held_out_pair():
    every = set(itertools.product(COLOURS, SHAPES))
    assert set(HELD_OUT) < every
    for two_things in (0.0, 0.5, 1.0):
        seen = pairs_of(scenes(1000, held_out=False, two_things=two_things))
        assert seen == every - set(HELD_OUT)
        assert pairs_of(scenes(200, held_out=True, two_things=two_things)) == set(HELD_OUT)
    assert pairs_of(scenes(1000, held_out=None)) == every
    assert {pair for pair in every if is_held_out(*pair)} == set(HELD_OUT)


def test_each_word_of_a_held_out_pair_is_seen_elsewhere():
    seen = pairs_of(scenes(1000))
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)


def test_every_word_is_drawn():
    drawn = scenes(1000, two_things=0.5)
    assert {scene.where for scene in drawn} == {*PLACES, *RELATIONS}
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {t.size for s in drawn for t in s.things if len(s.things) == 1} == set(SIZES)


def test_a_seed_gives_the_same_scenes_and_pixels():
    first, again, other = (scenes(50, seed, two_things=0.5) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    for a, b in zip(first, again, strict=True):
        picture = draw(a, 32)
        assert (picture.shape, picture.dtype) == ((32, 32, 3), np.uint8)
        assert np.array_equal(picture, draw(b, 32))


def test_two_scenes_of_a_caption_differ():
    same = [s for s in scenes(2000) if s.caption == scenes(1)[0].caption]
    assert len(same) > 1
    assert len({thing.centre for scene in same for thing in scene.things}) == len(same)


def test_no_object_is_cut_or_covered():
    centres = [[c] for c in PLACES.values()] + [list(c) for c in RELATIONS.values()]
    for group in centres:
        # two objects are small ones
        radius = max(SIZES.values()) if len(group) == 1 else SIZES["small"]
        for x, y in group:
            # it may touch the border: 1e-9 for the sum of two shares
            assert radius + JITTER <= min(x, y, 1 - x, 1 - y) + 1e-9
    for (ax, ay), (bx, by) in RELATIONS.values():
        assert max(abs(ax - bx), abs(ay - by)) > 2 * SIZES["small"] + 2 * JITTER


@pytest.mark.parametrize("word", ["colour", "shape", "size", "background"])
def test_unknown_words_are_not_drawn(word):
    scene = parse("a small red circle in the middle on a grey background")
    if word == "background":
        scene = dataclasses.replace(scene, background="plaid")
    else:
        thing = dataclasses.replace(scene.things[0], **{word: "plaid"})
        scene = dataclasses.replace(scene, things=(thing,))
    with pytest.raises((InputError, KeyError), match="plaid"):
        draw(scene, 32)


# ---- captions


def all_scenes():
    """Every combination of words once, without jitter."""
    looks = list(itertools.product(COLOURS, SHAPES))
    for (colour, shape), size, background in itertools.product(looks, SIZES, BACKGROUNDS):
        for place, centre in PLACES.items():
            yield Scene((Thing(colour, shape, size, centre),), place, background)
    for a, b, background in itertools.product(looks, looks, BACKGROUNDS):
        for relation, (here, there) in RELATIONS.items():
            things = (Thing(*a, "small", here), Thing(*b, "small", there))
            yield Scene(things, relation, background)


def test_no_two_word_combinations_share_a_caption():
    captions = [scene.caption for scene in all_scenes()]
    looks = len(COLOURS) * len(SHAPES)
    single, double = looks * len(SIZES) * len(PLACES), looks**2 * len(RELATIONS)
    assert len(captions) == (single + double) * len(BACKGROUNDS)
    assert len(set(captions)) == len(captions)


def test_a_caption_names_every_word_in_order():
    for scene in scenes(300, held_out=None, two_things=0.5):
        words = [w for t in scene.things for w in ("a", t.size, t.colour, t.shape)]
        words[4:4] = scene.where.split()
        assert scene.caption.split() == [*words, "on", "a", scene.background, "background"]


def test_relations_hold_between_the_pixels():
    is_true = {
        "above": lambda a, b: a[1] < b[1] and abs(a[0] - b[0]) < 0.1,
        "below": lambda a, b: a[1] > b[1] and abs(a[0] - b[0]) < 0.1,
        "to the left of": lambda a, b: a[0] < b[0] and abs(a[1] - b[1]) < 0.1,
        "to the right of": lambda a, b: a[0] > b[0] and abs(a[1] - b[1]) < 0.1,
    }
    assert is_true.keys() == RELATIONS.keys()
    counts = dict.fromkeys(RELATIONS, 0)
    for scene in scenes(400, two_things=1.0):
        first, second = scene.things
        if first.colour == second.colour:
            continue
        picture = draw(scene, 48)
        centres = []
        for thing in (first, second):
            y, x = np.nonzero((picture == COLOURS[thing.colour]).all(-1))
            # whole, not half behind the other
            assert len(x) > 0.3 * (2 * SIZES["small"] * 48) ** 2
            # of the box around it: a triangle's pixels lie low
            centres.append(tuple((i.min() + i.max() + 1) / 2 / 48 for i in (x, y)))
        for got, thing in zip(centres, scene.things, strict=True):
            assert got == pytest.approx(thing.centre, abs=0.03)
        assert is_true[scene.where](*centres), scene.caption
        counts[scene.where] += 1
    assert min(counts.values()) > 50


def without_jitter(scene):
    centres = RELATIONS[scene.where] if len(scene.things) == 2 else [PLACES[scene.where]]
    things = zip(scene.things, centres, strict=True)
    moved = tuple(dataclasses.replace(thing, centre=centre) for thing, centre in things)
    return Scene(moved, scene.where, scene.background)


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
        "a small brown circle in the middle on a grey background",
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


# ---- the checker


def test_the_checker_reads_true_renders(read_back):
    drawn, readings = read_back
    for word in WORDS:
        assert len({getattr(said(scene), word) for scene in drawn}) >= 2
    assert pairs_of(drawn) == set(itertools.product(COLOURS, SHAPES))
    shares = share_right(drawn, readings)
    assert min(shares.values()) >= 0.99, shares


def test_the_checker_says_no_to_captions_of_other_pictures(read_back):
    drawn, readings = read_back
    shuffled = [readings[i] for i in np.random.default_rng(0).permutation(len(readings))]
    shares = share_right(drawn, shuffled)
    choices = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}
    choices["background"] = BACKGROUNDS
    for word, share in shares.items():
        chance = 1 / len(choices[word])
        error = np.sqrt(chance * (1 - chance) / len(drawn))
        assert share == pytest.approx(chance, abs=4 * error), word


def blurred(picture, _):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.0)))


def noisy(picture, rng):
    return np.clip(picture + rng.normal(0, 25, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("spoil", [blurred, noisy])
def test_the_checker_reads_spoiled_renders(spoil):
    rng = np.random.default_rng(0)
    drawn = scenes(200, held_out=None)
    shares = share_right(drawn, [read(spoil(draw(scene, 64), rng)) for scene in drawn])
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_shows_nothing(background):
    scene = parse(f"a small red circle in the middle on a {background} background")
    empty = np.full((32, 32, 3), BACKGROUNDS[background], np.uint8)
    assert read(empty) == Reading(None, None, None, None, background)
    assert describes(scene, empty) == dict.fromkeys(WORDS, False) | {"background": True}


@pytest.mark.parametrize(("share", "is_seen"), [(0.2, False), (0.35, True)])
def test_a_quarter_of_the_smallest_object_is_the_least_that_is_seen(share, is_seen):
    red = []
    for shape in SHAPES:
        picture = draw(parse(f"a small red {shape} in the middle on a grey background"), 64)
        red.append((picture == COLOURS["red"]).all(-1).sum())
    picture = np.full((64, 64, 3), BACKGROUNDS["grey"], np.uint8)
    inner = picture[20:44, 20:44].reshape(-1, 3)
    inner[: int(share * min(red))] = COLOURS["red"]
    picture[20:44, 20:44] = inner.reshape(24, 24, 3)
    assert (read(picture).colour == "red") == is_seen


def test_describes_judges_word_by_word():
    scene = parse("a small red circle in the middle on a grey background")
    assert describes(scene, draw(scene, 64)) == dict.fromkeys(WORDS, True)
    others = {
        "colour": "a small blue circle in the middle on a grey background",
        "shape": "a small red cross in the middle on a grey background",
        "size": "a large red circle in the middle on a grey background",
        "place": "a small red circle in the top left on a grey background",
        "background": "a small red circle in the middle on a white background",
    }
    for word, caption in others.items():
        wanted = dict.fromkeys(WORDS, True) | {word: False}
        assert describes(scene, draw(parse(caption), 64)) == wanted
