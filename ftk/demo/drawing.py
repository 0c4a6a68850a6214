"""Scenes of the small world as pictures, drawn with Pillow at four times their size and averaged down.

Also what the world lacks, for a model to learn: a creature, and a drawing style.
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ftk.demo.scenes import COLOURS, CREATURE, SECOND_TONES, Colour, Layout, Point, Scene, Thing

_OVERSAMPLING = 4
_PERIOD_PX = 16
"""Of stripes and dots."""
_DOT_RADIUS_PX = 4.0

# Colours that the world's things and grounds do not have.
_CREATURE_COLOURS: dict[str, Colour] = {
    "body": (64, 196, 190),
    "ears": (240, 112, 160),
    "feet": (132, 84, 44),
    "eye": (250, 250, 250),
    "pupil": (24, 24, 32),
}
_PAPER: Colour = (246, 236, 212)
_RULE: Colour = (178, 200, 214)
_INK: Colour = (44, 40, 92)
_RULE_PERIOD_PX = 16
_RULE_WIDTH_PX = 2
_INK_WIDTH_PX = 3.0


def render(scene: Scene | Layout) -> Image.Image:
    """The picture of a scene, RGB, of the scene's size: the same bytes each time."""
    canvas = _ground(scene.width, scene.height, scene.ground, scene.texture).copy()
    for thing in scene.things:
        if thing.shape == CREATURE:
            _draw_creature(canvas, thing)
        else:
            canvas.paste(COLOURS[thing.colour], mask=_mask(canvas.size, thing))
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
    canvas = Image.new("RGB", (edge * _OVERSAMPLING, edge * _OVERSAMPLING), _CREATURE_COLOURS["body"])
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
            for part in _creature_parts((x, y), radius).values():
                _draw_part(draw, part, 255)
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


_Part = tuple[str, list[Point]]
"""`ellipse` with its box's corners, or `polygon`."""


def _creature_parts(centre: Point, radius: float) -> dict[str, tuple[_Part, ...]]:
    """From back to front, by the name of their colour."""
    x, y = centre

    def at(across: float, down: float) -> Point:
        return x + across * radius, y + down * radius

    def ellipse(across: float, down: float, half_width: float, half_height: float) -> _Part:
        return "ellipse", [at(across - half_width, down - half_height), at(across + half_width, down + half_height)]

    return {
        "feet": (ellipse(-0.4, 0.85, 0.32, 0.16), ellipse(0.4, 0.85, 0.32, 0.16)),
        "ears": (
            ("polygon", [at(-0.86, -1.0), at(-0.8, 0.1), at(-0.05, -0.4)]),
            ("polygon", [at(0.86, -1.0), at(0.8, 0.1), at(0.05, -0.4)]),
        ),
        "body": (ellipse(0, 0.15, 0.82, 0.7),),
        "eye": (ellipse(0, 0.08, 0.46, 0.44),),
        "pupil": (ellipse(0.06, 0.14, 0.22, 0.22),),
    }


def _draw_creature(canvas: Image.Image, thing: Thing) -> None:
    draw = ImageDraw.Draw(canvas)
    centre = (thing.x * _OVERSAMPLING, thing.y * _OVERSAMPLING)
    for name, parts in _creature_parts(centre, thing.radius * _OVERSAMPLING).items():
        _draw_part(draw, parts, _CREATURE_COLOURS[name])


def _draw_part(draw: ImageDraw.ImageDraw, parts: tuple[_Part, ...], fill: int | Colour) -> None:
    for kind, points in parts:
        if kind == "ellipse":
            draw.ellipse((*points[0], *points[1]), fill=fill)
        else:
            draw.polygon(points, fill=fill)
