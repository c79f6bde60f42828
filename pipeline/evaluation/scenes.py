"""Procedural pictures with exact captions, and a checker that reads them back into words.

A scene is one object, or two with a relation, on a plain background. ``draw`` renders it,
``caption`` says it, ``read`` looks at any picture of that size, a blurred reconstruction or a
sample too, and says which colour, shape, size and place it sees. So caption accuracy needs no
judge of flesh or network.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.console import InputError

COLOURS = {
    "red": (225, 25, 25),
    "green": (20, 165, 50),
    "blue": (25, 45, 225),
    "yellow": (250, 225, 20),
    "cyan": (20, 205, 225),
    "black": (20, 20, 20),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (185, 185, 185), "pink": (250, 200, 210)}
SHAPES = ("circle", "square", "triangle", "cross")
# centres, as shares of the picture's side
PLACES = {
    "in the top left": (0.3, 0.3),
    "in the top right": (0.7, 0.3),
    "in the middle": (0.5, 0.5),
    "in the bottom left": (0.3, 0.7),
    "in the bottom right": (0.7, 0.7),
}
SIZES = {"small": 0.19, "large": 0.28}  # half the side of the object, as a share of the picture's
RELATIONS = {  # the first object's centre and the second's
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
    "to the left of": ((0.27, 0.5), (0.73, 0.5)),
    "to the right of": ((0.73, 0.5), (0.27, 0.5)),
}
# (colour, shape) pairs that no training picture shows; each colour and each shape is shown
# elsewhere
HELD_OUT = (("red", "triangle"), ("blue", "circle"), ("yellow", "cross"), ("black", "square"))
JITTER = 0.02  # of a centre, so that no two pictures of a caption need be equal
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object: words, and the centre it was drawn at."""

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]  # x, y as shares of the side


@dataclass(frozen=True)
class Scene:
    """A picture in words: one thing at a place, or two in a relation."""

    things: tuple[Thing, ...]
    where: str  # a key of PLACES, or of RELATIONS for two things
    background: str

    @property
    def caption(self) -> str:
        """What the picture shows, complete and true."""
        first, *rest = (f"{t.size} {t.colour} {t.shape}" for t in self.things)
        second = f" a {rest[0]}" if rest else ""
        return f"a {first} {self.where}{second} on a {self.background} background"


@dataclass(frozen=True)
class Reading:
    """What the checker sees; None where it sees no object."""

    colour: str | None
    shape: str | None
    size: str | None
    place: str | None
    background: str


def _one_of(words: Iterable[str]) -> str:
    return "(" + "|".join(words) + ")"


_THING = f"a {_one_of(SIZES)} {_one_of(COLOURS)} {_one_of(SHAPES)}"
_CAPTION = re.compile(
    f"{_THING} (?:{_one_of(PLACES)}|{_one_of(RELATIONS)} {_THING}) "
    f"on a {_one_of(BACKGROUNDS)} background"
)


def parse(caption: str) -> Scene:
    """The scene that a caption speaks of, without jitter: ``parse(c).caption`` is ``c``.

    Raises:
        InputError: a caption that no scene has.
    """
    found = _CAPTION.fullmatch(caption)
    if found is None:
        raise InputError(
            f"caption {caption!r} speaks of no scene; write it like "
            "'a small red circle in the middle on a grey background' or "
            "'a small red circle above a small blue square on a grey background', with "
            f"{', '.join([*SIZES, *COLOURS, *SHAPES, *PLACES, *RELATIONS, *BACKGROUNDS])}"
        )
    size, colour, shape, place, relation, *second, background = found.groups()
    if relation is None:
        return Scene((Thing(colour, shape, size, PLACES[place]),), place, background)
    here, there = RELATIONS[relation]
    other = Thing(second[1], second[2], second[0], there)
    return Scene((Thing(colour, shape, size, here), other), relation, background)


def is_held_out(colour: str, shape: str) -> bool:
    """True for the four pairs kept for the test of composition."""
    return (colour, shape) in HELD_OUT


def random_scene(
    rng: np.random.Generator, *, held_out: bool | None = False, two_things: float = 0.0
) -> Scene:
    """Draw a scene.

    Args:
        rng: where its chance comes from.
        held_out: False draws only seen (colour, shape) pairs, True only held-out ones, None both.
        two_things: the share of scenes that show two objects in a relation.
    """
    background = _pick(rng, BACKGROUNDS)
    if rng.random() < two_things:
        relation = _pick(rng, RELATIONS)
        things = tuple(_random_thing(rng, held_out, c, "small") for c in RELATIONS[relation])
        return Scene(things, relation, background)
    place = _pick(rng, PLACES)
    return Scene((_random_thing(rng, held_out, PLACES[place]),), place, background)


def _pick(rng: np.random.Generator, names: Iterable[str]) -> str:
    choices = tuple(names)
    return choices[int(rng.integers(len(choices)))]


def _random_thing(
    rng: np.random.Generator,
    held_out: bool | None,
    centre: tuple[float, float],
    size: str | None = None,
) -> Thing:
    while True:
        colour, shape = _pick(rng, COLOURS), _pick(rng, SHAPES)
        if held_out is None or is_held_out(colour, shape) == held_out:
            break
    x, y = (c + float(rng.uniform(-JITTER, JITTER)) for c in centre)
    return Thing(colour, shape, size or _pick(rng, SIZES), (x, y))


def draw(scene: Scene, side: int) -> np.ndarray:
    """Render a scene: uint8 [side, side, 3], edges smoothed."""
    n = side * SUPERSAMPLING
    image = Image.new("RGB", (n, n), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y = (c * n for c in thing.centre)
        _draw_shape(pen, thing.shape, x, y, SIZES[thing.size] * n, COLOURS[thing.colour])
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: object
) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)  # type: ignore[arg-type]
    elif shape == "square":
        s = 0.88 * r
        pen.rectangle((x - s, y - s, x + s, y + s), fill=fill)  # type: ignore[arg-type]
    elif shape == "triangle":
        corners = [(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)]
        pen.polygon(corners, fill=fill)  # type: ignore[arg-type]
    elif shape == "cross":
        w = 0.36 * r
        pen.rectangle((x - r, y - w, x + r, y + w), fill=fill)  # type: ignore[arg-type]
        pen.rectangle((x - w, y - r, x + w, y + r), fill=fill)  # type: ignore[arg-type]
    else:
        raise InputError(f"shape {shape!r}; there are {', '.join(SHAPES)}")


# ---- reading a picture back


def read(image: np.ndarray) -> Reading:
    """Read the largest object of a picture.

    Each pixel goes to the nearest of the nine known colours; the border tells the background, the
    commonest other colour the object's. The object's mask is held against each shape in each size,
    drawn where the mask's centre is: the best overlap (intersection over union) names shape and
    size.

    Args:
        image: uint8 [side, side, 3].
    """
    names, palette = _palette()
    nearest = np.abs(image[:, :, None, :].astype(np.int32) - palette).sum(-1).argmin(-1)
    edge = np.concatenate([nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel()])
    edge = np.concatenate([edge, nearest[:, -2:].ravel()])
    n_colours = len(COLOURS)
    background = n_colours + int(np.bincount(edge, minlength=len(names))[n_colours:].argmax())
    counts = np.bincount(nearest.ravel(), minlength=len(names))[:n_colours]
    colour = int(counts.argmax())
    side = image.shape[0]
    smallest = min(_stencil(shape, size, side).sum() for shape in SHAPES for size in SIZES)
    # fewer pixels than a quarter of the smallest object are no object
    if counts[colour] < 0.25 * smallest:
        return Reading(None, None, None, None, names[background])
    mask = nearest == colour
    shape, size, centre = _best_fit(mask)
    place = min(PLACES, key=lambda p: np.hypot(*(np.subtract(PLACES[p], centre))))
    return Reading(names[colour], shape, size, place, names[background])


@functools.cache
def _palette() -> tuple[tuple[str, ...], np.ndarray]:
    known = COLOURS | BACKGROUNDS
    return tuple(known), np.array(list(known.values()), np.int32)


@functools.cache
def _stencil(shape: str, size: str, side: int) -> np.ndarray:
    """How much of each pixel, [side, side] in [0, 1], an object in the middle covers."""
    n = side * SUPERSAMPLING
    image = Image.new("L", (n, n), 0)
    _draw_shape(ImageDraw.Draw(image), shape, n / 2, n / 2, SIZES[size] * n, 255)
    # not rounded to a mask: one pixel more or less makes a small square a circle
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _best_fit(mask: np.ndarray) -> tuple[str, str, tuple[float, float]]:
    """Shape, size and centre (x, y as shares) of the stencil that covers the mask best."""
    side = mask.shape[0]
    spectrum = np.fft.rfft2(mask.astype(np.float32))
    best = (-1.0, "", "", (0.5, 0.5))
    for shape in SHAPES:
        for size in SIZES:
            stencil = _stencil(shape, size, side)
            # overlap at every shift at once: circular correlation
            overlap = np.fft.irfft2(spectrum * np.conj(np.fft.rfft2(stencil)), s=mask.shape)
            dy, dx = np.unravel_index(int(overlap.argmax()), mask.shape)
            common = float(overlap[dy, dx])
            iou = common / (mask.sum() + stencil.sum() - common)
            if iou > best[0]:
                x, y = ((d / side + 0.5) % 1.0 for d in (dx, dy))
                best = (iou, shape, size, (x, y))
    return best[1], best[2], best[3]


def describes(scene: Scene, image: np.ndarray) -> dict[str, bool]:
    """Whether a picture shows what a one-object scene says, word by word."""
    thing, seen = scene.things[0], read(image)
    return {
        "colour": seen.colour == thing.colour,
        "shape": seen.shape == thing.shape,
        "size": seen.size == thing.size,
        "place": seen.place == scene.where,
        "background": seen.background == scene.background,
    }
