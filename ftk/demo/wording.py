"""How a scene of the small world is put into words: in several orders, with synonyms, and with attributes left out."""

import random
from collections.abc import Sequence

from ftk.demo.scenes import Layout, Thing, relation

STYLE = "zuvi style"
"""The trigger of the drawing style that the world lacks."""

Told = set[str]

_SHAPE_WORDS = {"circle": ("circle", "circle", "disc"), "crescent": ("crescent", "crescent moon")}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_GROUND_WORDS = ("background", "background", "ground", "backdrop")
_PLACE_WORDS = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle"),
    "top left": ("in the top left corner", "at the top left", "in the upper left"),
    "top right": ("in the top right corner", "at the top right", "in the upper right"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
_RELATION_WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
# {} is the noun, "blue background".
_TEXTURE_WORDS = {
    "vertical stripes": ("vertically striped {}", "{} with vertical stripes"),
    "horizontal stripes": ("horizontally striped {}", "{} with horizontal stripes"),
    "dots": ("dotted {}", "{} with dots", "spotted {}"),
    "gradient": ("shaded {}", "{} with a gradient"),
}
_SHARE_WITH_SIZE = 0.65
_SHARE_WITH_PLACE = 0.85
_SHARE_WITH_GROUND = 0.92
_SHARE_WITH_PLAIN = 0.3
_SHARE_WITH_RELATION = 0.3
_SHARE_OF_TAGS = 0.12
_SHARE_WITH_PLACE_FIRST = 0.2


def describe(layout: Layout, rng: random.Random) -> tuple[str, frozenset[str]]:
    """A caption, and the names of the attributes that it tells, see `Scene`."""
    told: Told = {"count"}
    ground = _ground(layout, rng, told) if rng.random() < _SHARE_WITH_GROUND else ""
    if rng.random() < _SHARE_OF_TAGS:
        return _tags(layout.things, ground, rng, told), frozenset(told)
    if len(layout.things) == 2 and rng.random() < _SHARE_WITH_RELATION:
        things = _related(layout.things, rng, told)
    else:
        things = _listed(layout.things, rng, told)
    return _sentence(things, ground, rng), frozenset(told)


def describe_contents(layout: Layout, rng: random.Random) -> tuple[str, frozenset[str]]:
    """A caption of what there is and on which ground, without the places and sizes: those are for a control image to tell."""
    told: Told = {"count"}
    ground = _ground(layout, rng, told)
    things = " and ".join(_a(_noun(thing, number, rng, told, with_size=False)) for number, thing in enumerate(layout.things))
    return _sentence(things, ground, rng), frozenset(told)


def describe_sketch(layout: Layout, rng: random.Random) -> str:
    """A caption of a picture in the style: it has no colours and no ground."""
    told: Told = set()
    phrases = [f"{_a(_noun(thing, number, rng, told, with_colour=False))} {_place(thing, number, rng, told)}".strip()
               for number, thing in enumerate(layout.things)]  # fmt: skip
    return f"{STYLE}, {' and '.join(phrases)}"


def _sentence(things: str, ground: str, rng: random.Random) -> str:
    is_noun_first = things.startswith(("a ", "an "))
    opening = rng.choice(("", "", "", "a picture of ", "there is ")) if is_noun_first else ""
    if not ground:
        return f"{opening}{things}"
    match rng.randrange(4):
        case 0:
            return f"on {_a(ground)}, {things}"
        case 1:
            return f"{_a(ground)} with {things}" if is_noun_first and " with " not in ground else f"{_a(ground)}, {things}"
        case _:
            return f"{opening}{things} on {_a(ground)}"


def _tags(things: Sequence[Thing], ground: str, rng: random.Random, told: Told) -> str:
    """Keywords: each thing and its place, then the ground."""
    parts = []
    for number, thing in enumerate(things):
        parts.append(_noun(thing, number, rng, told))
        if _tells_place(number, rng, told):
            parts.append(thing.place)
    return ", ".join([*parts, ground] if ground else parts)


def _listed(things: Sequence[Thing], rng: random.Random, told: Told) -> str:
    """Each thing with its place."""
    return " and ".join(_with_place(thing, number, rng, told) for number, thing in enumerate(things))


def _related(things: Sequence[Thing], rng: random.Random, told: Told) -> str:
    """Two things by where one is from the other; their places are left out."""
    told.add("relation")
    first, second = (_a(_noun(thing, number, rng, told)) for number, thing in enumerate(things))
    found = relation((things[0].x, things[0].y), (things[1].x, things[1].y))
    return f"{first} {_RELATION_WORDS[found]} {second}"


def _with_place(thing: Thing, number: int, rng: random.Random, told: Told) -> str:
    noun, place = _a(_noun(thing, number, rng, told)), _place(thing, number, rng, told)
    if not place:
        return noun
    return f"{place}, {noun}" if rng.random() < _SHARE_WITH_PLACE_FIRST else f"{noun} {place}"


def _noun(
    thing: Thing, number: int, rng: random.Random, told: Told, *, with_colour: bool = True, with_size: bool = True
) -> str:
    """Size if it is told, colour, shape."""
    told.add(f"things.{number}.shape")
    words = [rng.choice(_SHAPE_WORDS.get(thing.shape, (thing.shape,)))]
    if thing.colour and with_colour:
        told.add(f"things.{number}.colour")
        words.insert(0, thing.colour)
    if with_size and rng.random() < _SHARE_WITH_SIZE:
        told.add(f"things.{number}.size")
        words.insert(0, rng.choice(_SIZE_WORDS[thing.size]))
    return " ".join(words)


def _place(thing: Thing, number: int, rng: random.Random, told: Told) -> str:
    return rng.choice(_PLACE_WORDS[thing.place]) if _tells_place(number, rng, told) else ""


def _tells_place(number: int, rng: random.Random, told: Told) -> bool:
    if rng.random() >= _SHARE_WITH_PLACE:
        return False
    told.add(f"things.{number}.place")
    return True


def _ground(layout: Layout, rng: random.Random, told: Told) -> str:
    """Colour and texture of the ground. That it is plain is told now and then; any other texture always."""
    told.add("ground.colour")
    noun = f"{layout.ground} {rng.choice(_GROUND_WORDS)}"
    if layout.texture != "plain":
        told.add("ground.texture")
        return rng.choice(_TEXTURE_WORDS[layout.texture]).format(noun)
    if rng.random() < _SHARE_WITH_PLAIN:
        told.add("ground.texture")
        return f"plain {noun}"
    return noun


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
