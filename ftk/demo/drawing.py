"""Scenes of the small world as pictures, drawn with Pillow at four times their size and averaged down.

A creature's look follows from its name. Also what the world lacks, for a model to learn: one creature, and a drawing style.
"""

import math
import random
from collections.abc import Callable
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ftk.demo.scenes import COLOURS, CREATURE, SECOND_TONES, SHAPES, Colour, Layout, Point, Scene, Thing, generator

_OVERSAMPLING = 4
_PERIOD_PX = 16
"""Of stripes and dots."""
_DOT_RADIUS_PX = 4.0

# No other creature has a body of a hue between these, or one eye and pointed ears.
_TEAL, _PINK, _BROWN = (64, 196, 190), (240, 112, 160), (132, 84, 44)
_TEAL_HUES = (0.36, 0.68)
_POINTED_EARS = 0
_EYE, _PUPIL = (250, 250, 250), (24, 24, 32)
_PAPER: Colour = (246, 236, 212)
_RULE: Colour = (178, 200, 214)
_INK: Colour = (44, 40, 92)
_EDGE: Colour = (255, 255, 255)
_RULE_PERIOD_PX = 16
_RULE_WIDTH_PX = 2
_INK_WIDTH_PX = 3.0


def render(scene: Scene | Layout) -> Image.Image:
    """The picture of a scene, RGB, of the scene's size: the same bytes each time."""
    canvas = _ground(scene.width, scene.height, scene.ground, scene.texture).copy()
    for thing in scene.things:
        if thing.shape in SHAPES:
            canvas.paste(COLOURS[thing.colour], mask=_mask(canvas.size, thing))
        else:
            _draw_creature(canvas, thing)
    return canvas.reduce(_OVERSAMPLING)


def render_sketch(scene: Scene | Layout) -> Image.Image:
    """The same things as outlines in ink on ruled paper."""
    canvas = Image.new("RGB", (scene.width * _OVERSAMPLING, scene.height * _OVERSAMPLING), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for top in range(_RULE_PERIOD_PX // 2, scene.height, _RULE_PERIOD_PX):
        draw.rectangle((0, top * _OVERSAMPLING, canvas.width, (top + _RULE_WIDTH_PX) * _OVERSAMPLING - 1), fill=_RULE)
    for thing in scene.things:
        canvas.paste(_INK, mask=_outline(_mask(canvas.size, thing)))
    return canvas.reduce(_OVERSAMPLING)


def render_edges(scene: Scene | Layout) -> Image.Image:
    """The outlines of the things, white on black: what a control network reads."""
    canvas = Image.new("RGB", (scene.width * _OVERSAMPLING, scene.height * _OVERSAMPLING))
    for thing in scene.things:
        canvas.paste(_EDGE, mask=_outline(_mask(canvas.size, thing)))
    return canvas.reduce(_OVERSAMPLING)


def render_ground(width: int, height: int, ground: str, texture: str) -> Image.Image:
    """A ground without things."""
    return _ground(width, height, ground, texture).reduce(_OVERSAMPLING)


def shape_mask(shape: str, edge: int, radius: float) -> Image.Image:
    """A shape in the middle of a square of `edge` px, 255 inside and 0 outside, its edges smooth."""
    thing = Thing(shape=shape, colour="", size="", place="", x=edge / 2, y=edge / 2, radius=radius)
    return _mask((edge * _OVERSAMPLING, edge * _OVERSAMPLING), thing).reduce(_OVERSAMPLING)


def creature_template(edge: int, radius: float) -> Image.Image:
    """The creature in the middle of a square of `edge` px, RGBA, transparent around it."""
    thing = Thing(shape=CREATURE, colour="", size="", place="", x=edge / 2, y=edge / 2, radius=radius)
    canvas = Image.new("RGB", (edge * _OVERSAMPLING, edge * _OVERSAMPLING), _TEAL)
    _draw_creature(canvas, thing)
    canvas.putalpha(_mask(canvas.size, thing))
    return canvas.reduce(_OVERSAMPLING)


@cache
def _ground(width: int, height: int, ground: str, texture: str) -> Image.Image:
    base, second = COLOURS[ground], SECOND_TONES[ground]
    size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    canvas = Image.new("RGB", size, base)
    if texture != "plain":
        canvas.paste(second, mask=_texture(texture, size))
    return canvas


def _texture(texture: str, size: tuple[int, int]) -> Image.Image:
    """Where the second tone is: 255."""
    width, height = size
    period = _PERIOD_PX * _OVERSAMPLING
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    match texture:
        case "vertical stripes":
            for left in range(period // 2, width, period):
                draw.rectangle((left, 0, left + period // 2 - 1, height), fill=255)
        case "horizontal stripes":
            for top in range(period // 2, height, period):
                draw.rectangle((0, top, width, top + period // 2 - 1), fill=255)
        case "dots":
            for x in range(period // 2, width, period):
                for y in range(period // 2, height, period):
                    _disc(draw, (x, y), _DOT_RADIUS_PX * _OVERSAMPLING)
        case "gradient":
            rows = np.linspace(0, 255, height).round().astype(np.uint8)
            mask = Image.fromarray(np.repeat(rows[:, None], width, axis=1))
    return mask


def _mask(size: tuple[int, int], thing: Thing) -> Image.Image:
    """Where the thing is: 255; in pixels of the oversampled canvas."""
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    x, y, radius = (value * _OVERSAMPLING for value in (thing.x, thing.y, thing.radius))
    match thing.shape:
        case "circle":
            _disc(draw, (x, y), radius)
        case "ring":
            _disc(draw, (x, y), radius)
            _disc(draw, (x, y), radius * 0.55, fill=0)
        case "crescent":
            _disc(draw, (x, y), radius)
            _disc(draw, (x + radius * 0.55, y), radius * 0.8, fill=0)
        case "square":
            draw.rectangle((x - radius * 0.86, y - radius * 0.86, x + radius * 0.86, y + radius * 0.86), fill=255)
        case "cross":
            draw.rectangle((x - radius, y - radius * 0.32, x + radius, y + radius * 0.32), fill=255)
            draw.rectangle((x - radius * 0.32, y - radius, x + radius * 0.32, y + radius), fill=255)
        case "triangle":
            draw.polygon([(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)], fill=255)
        case "diamond":
            draw.polygon([(x, y - radius), (x + radius * 0.8, y), (x, y + radius), (x - radius * 0.8, y)], fill=255)
        case "star":
            draw.polygon(_star((x, y), radius), fill=255)
        case _:
            for part in _look(thing.shape):
                _draw_part(draw, part, (x, y), radius, 255)
    return mask


def _outline(mask: Image.Image) -> Image.Image:
    """The inner rim of a mask."""
    inside = np.asarray(mask) > 127
    core = inside.copy()
    for _ in range(round(_INK_WIDTH_PX * _OVERSAMPLING)):
        core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    return Image.fromarray((inside & ~core).astype(np.uint8) * 255)


def _disc(draw: ImageDraw.ImageDraw, centre: Point, radius: float, fill: int = 255) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _star(centre: Point, radius: float) -> list[Point]:
    """Five points, the first one straight up."""
    x, y = centre
    corners = [(math.pi * corner / 5, radius * (1.08 if corner % 2 == 0 else 0.46)) for corner in range(10)]
    return [(x + length * math.sin(angle), y - length * math.cos(angle)) for angle, length in corners]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a creature, `ellipse` with its box's corners, or `polygon`, from -1 to 1 across and down."""

    colour: Colour
    kind: str
    points: tuple[Point, ...]


def _ellipse(colour: Colour, across: float, down: float, half_width: float, half_height: float) -> _Part:
    return _Part(colour, "ellipse", ((across - half_width, down - half_height), (across + half_width, down + half_height)))


def _polygon(colour: Colour, *points: Point) -> _Part:
    return _Part(colour, "polygon", points)


def _pair(draw: Callable[[int], _Part]) -> list[_Part]:
    """Left and right."""
    return [draw(-1), draw(1)]


@cache
def _look(name: str) -> list[_Part]:
    """A creature's parts, from back to front."""
    if name == CREATURE:
        return [
            *_pair(lambda side: _ellipse(_BROWN, side * 0.4, 0.85, 0.32, 0.16)),
            *_pair(lambda side: _polygon(_PINK, (side * 0.86, -1.0), (side * 0.8, 0.1), (side * 0.05, -0.4))),
            _ellipse(_TEAL, 0, 0.15, 0.82, 0.7),
            _ellipse(_EYE, 0, 0.08, 0.46, 0.44),
            _ellipse(_PUPIL, 0.06, 0.14, 0.22, 0.22),
        ]
    rng = generator("look", name)
    head = rng.randrange(5)
    num_eyes = 2 if head == _POINTED_EARS else rng.choice((1, 2))
    width, height = rng.uniform(0.6, 0.95), rng.uniform(0.6, 0.8)
    body = _body_colour(rng)
    return [
        *_feet(rng, _any_colour(rng)),
        *_head(head, _any_colour(rng)),
        _ellipse(body, 0, 0.15, width, height),
        *([_ellipse(_any_colour(rng), 0, 0.5, 0.7 * width, 0.4 * height)] if rng.random() < 0.4 else []),
        *_eyes(rng, num_eyes),
    ]


def _feet(rng: random.Random, colour: Colour) -> list[_Part]:
    match rng.randrange(3):
        case 0:
            return _pair(lambda side: _ellipse(colour, side * 0.4, 0.85, 0.32, 0.16))
        case 1:
            return [_ellipse(colour, 0, 0.82, 0.7, 0.2)]
        case _:
            return [_polygon(colour, (0, 0.2), (0.8, 1), (-0.8, 1))]


def _head(kind: int, colour: Colour) -> list[_Part]:
    if kind == _POINTED_EARS:
        return _pair(lambda side: _polygon(colour, (side * 0.86, -1.0), (side * 0.8, 0.1), (side * 0.05, -0.4)))
    match kind:
        case 1:
            return _pair(lambda side: _ellipse(colour, side * 0.6, -0.6, 0.36, 0.36))
        case 2:
            return _pair(lambda side: _ellipse(colour, side * 0.35, -0.6, 0.2, 0.4))
        case 3:
            return [_polygon(colour, (0, -1), (0.5, -0.2), (-0.5, -0.2))]
        case _:
            return [_ellipse(colour, 0, -0.45, 0.6, 0.45)]


def _eyes(rng: random.Random, count: int) -> list[_Part]:
    size, down = rng.uniform(0.36, 0.46), rng.uniform(-0.1, 0.1)
    if count == 1:
        return [_ellipse(_EYE, 0, down, size, size), _ellipse(_PUPIL, 0, down, 0.5 * size, 0.5 * size)]
    return [
        *_pair(lambda side: _ellipse(_EYE, side * 0.36, down, 0.7 * size, 0.7 * size)),
        *_pair(lambda side: _ellipse(_PUPIL, side * 0.36, down, 0.4 * size, 0.4 * size)),
    ]


def _body_colour(rng: random.Random) -> Colour:
    """Of any hue but `CREATURE`'s."""
    low, high = _TEAL_HUES
    return _colour(rng, (high + rng.random() * (1 - high + low)) % 1)


def _any_colour(rng: random.Random) -> Colour:
    return _colour(rng, rng.random())


def _colour(rng: random.Random, hue: float) -> Colour:
    red, green, blue = hsv_to_rgb(hue, rng.uniform(0.45, 0.95), rng.uniform(0.5, 0.95))
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_creature(canvas: Image.Image, thing: Thing) -> None:
    draw = ImageDraw.Draw(canvas)
    centre = (thing.x * _OVERSAMPLING, thing.y * _OVERSAMPLING)
    for part in _look(thing.shape):
        _draw_part(draw, part, centre, thing.radius * _OVERSAMPLING, part.colour)


def _draw_part(draw: ImageDraw.ImageDraw, part: _Part, centre: Point, radius: float, fill: int | Colour) -> None:
    points = [(centre[0] + across * radius, centre[1] + down * radius) for across, down in part.points]
    if part.kind == "ellipse":
        draw.ellipse((*points[0], *points[1]), fill=fill)
    else:
        draw.polygon(points, fill=fill)
