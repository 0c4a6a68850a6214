"""What a scene of the small world consists of, and which scenes there are. All lengths in px.

A scene is one or two things on a ground. Each thing has a shape, a colour, a size and a place; the ground a colour and a
texture in two tones of it. What is drawn can be told apart by eye and by `ftk.demo.checker`: things never touch, stand out
from both tones of their ground, and are clearly large or small, and clearly at their place. A creature is a thing whose shape
is its name: how it looks follows from that, and no word tells it.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Colour = tuple[int, int, int]
Point = tuple[float, float]

SIZES = ((64, 64), (80, 48), (48, 80))
"""Width and height: the buckets of `data.resolutions: [64]`, so that nothing is resized on its way to the cache."""

COLOURS: dict[str, Colour] = {
    "red": (214, 32, 44),
    "orange": (255, 140, 24),
    "yellow": (255, 226, 56),
    "green": (36, 156, 70),
    "blue": (28, 100, 230),
    "purple": (150, 46, 176),
    "white": (252, 252, 250),
    "black": (20, 20, 24),
}
SECOND_TONES: dict[str, Colour] = {
    "red": (150, 14, 30),
    "orange": (206, 100, 6),
    "yellow": (222, 186, 16),
    "green": (18, 106, 46),
    "blue": (14, 62, 160),
    "purple": (98, 22, 120),
    "white": (200, 208, 218),
    "black": (82, 82, 92),
}
TEXTURES = ("plain", "vertical stripes", "horizontal stripes", "dots", "gradient")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "crescent")
CREATURE = "mippo"
"""The concept that the world lacks: a creature that nothing was trained on. Creatures are always large: a small one has too few
pixels for its eyes."""
RADII = {"small": 9.0, "large": 15.0}
"""Of the circle around a thing."""

PLACES: dict[str, tuple[int, int]] = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "centre": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
"""By name, the side of the centre across and down."""

RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""By name, the axis (0 is across, 1 down) and the side of the other thing."""

# A thing of the first colour on a ground of the second: hard to tell from the ground's second tone.
_CLASHES = {("red", "orange"), ("orange", "yellow")}
_MARGIN_PX = 2.0
_GAP_PX = 6.0
_JITTER_PX = 2.0
_JITTER_OF_RADIUS = 0.06
"""Of loose scenes alone, as a share."""
_LEAST_ROOM_PX = 12.0
# Halfway between the least offset of a thing at an edge and the greatest of one in the centre.
_SIDE_THRESHOLD_PX = (_LEAST_ROOM_PX - _JITTER_PX / 2) / 2
_SHARE_OF_PAIRS = 0.4
_SHARE_OF_PLAIN = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One thing. A creature's `shape` is its name, and its `colour` empty: it has several. `x`, `y` is its centre."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a picture shows, how it is described, and what of it the description tells.

    `told` holds names of attributes: `count`, `ground.colour`, `ground.texture`, `things.N.shape` (colour, size, place), and
    `relation`, of two things.
    """

    width: int
    height: int
    ground: str
    texture: str
    things: tuple[Thing, ...]
    caption: str
    told: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A scene before it is described."""

    width: int
    height: int
    ground: str
    texture: str
    things: tuple[Thing, ...]


def generator(*names: object) -> random.Random:
    """A generator of the same numbers for the same names, in each version of Python: text is hashed with SHA-512."""
    return random.Random(" ".join(map(str, names)))  # noqa: S311


def creature_name(rng: random.Random) -> str:
    """Two or three syllables; never `CREATURE`, where a consonant is double."""
    return "".join(rng.choice("bcdfghjklmnprstvwxz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def layout(rng: random.Random, *, loose: bool = False) -> Layout:
    """One or two things of the world's own shapes; see `arranged`."""
    if rng.random() >= _SHARE_OF_PAIRS:
        return arranged(rng, [rng.choice(SHAPES)], loose=loose)
    return arranged(rng, [rng.choice(SHAPES), rng.choice(SHAPES)], loose=loose)


def arranged(rng: random.Random, shapes: Sequence[str], *, loose: bool = False) -> Layout:
    """These shapes somewhere on some ground: drawn until no two touch and none looks like another.

    Each place of each size is one point; in a loose scene things are somewhere near, and a little smaller or larger.
    """
    width, height = rng.choice(SIZES)
    ground = rng.choice(list(COLOURS))
    texture = "plain" if rng.random() < _SHARE_OF_PLAIN else rng.choice(TEXTURES[1:])
    while True:
        things = tuple(_thing(rng, shape, width, height, ground, loose) for shape in shapes)
        if _are_apart(things) and len({(thing.shape, thing.colour) for thing in things}) == len(things):
            return Layout(width=width, height=height, ground=ground, texture=texture, things=things)


def relation(first: Point, second: Point) -> str:
    """Where the first of two centres is, seen from the second, along the axis on which they are further apart."""
    across, down = first[0] - second[0], first[1] - second[1]
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def holds(wanted: str, first: Point, second: Point) -> bool:
    """Whether the first of two centres is clearly on this side of the second, whatever there is on the other axis."""
    axis, sign = RELATIONS[wanted]
    return sign * (first[axis] - second[axis]) >= _SIDE_THRESHOLD_PX


def place_of(across: float, down: float) -> str:
    """The name of a place this far from the centre of the picture."""
    sides = (_side(across), _side(down))
    return next(name for name, found in PLACES.items() if found == sides)


def _side(offset: float) -> int:
    return 0 if abs(offset) < _SIDE_THRESHOLD_PX else int(math.copysign(1, offset))


def _thing(rng: random.Random, shape: str, width: int, height: int, ground: str, loose: bool) -> Thing:
    colour = rng.choice(_visible(COLOURS, ground)) if shape in SHAPES else ""
    size = rng.choice(list(RADII)) if shape in SHAPES else "large"
    radius = RADII[size] * (1 + rng.uniform(-1, 1) * _JITTER_OF_RADIUS if loose else 1)
    jitter = _JITTER_PX if loose else 0.0
    places = [name for name, sides in PLACES.items() if _fits(sides[0], width, radius) and _fits(sides[1], height, radius)]
    place = rng.choice(places)
    across, down = PLACES[place]
    return Thing(
        shape=shape, colour=colour, size=size, place=place, radius=radius,
        x=_coordinate(rng, across, width, radius, jitter), y=_coordinate(rng, down, height, radius, jitter),
    )  # fmt: skip


def _visible(colours: Iterable[str], ground: str) -> list[str]:
    return [colour for colour in colours if colour != ground and (colour, ground) not in _CLASHES]


def _room(length: int, radius: float) -> float:
    """How far from the centre a thing can be."""
    return length / 2 - radius - _MARGIN_PX


def _fits(side: int, length: int, radius: float) -> bool:
    return side == 0 or _room(length, radius) >= _LEAST_ROOM_PX


def _coordinate(rng: random.Random, side: int, length: int, radius: float, jitter: float) -> float:
    if side == 0:
        return length / 2 + rng.uniform(-jitter, jitter) / 2
    return length / 2 + side * (_room(length, radius) - rng.uniform(0, jitter))


def _are_apart(things: Sequence[Thing]) -> bool:
    return all(
        math.dist((one.x, one.y), (other.x, other.y)) >= one.radius + other.radius + _GAP_PX
        for position, one in enumerate(things)
        for other in things[:position]
    )
