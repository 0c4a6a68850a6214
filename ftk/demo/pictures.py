"""Captioned pictures for the demo, drawn on the spot: nothing to download, the same pictures each time."""

import io
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from ftk import storage

Point = tuple[float, float]
Colour = tuple[int, int, int]
Scene = Callable[[ImageDraw.ImageDraw, int, int, random.Random], str]

_SIZES = ((320, 320), (400, 300), (300, 400), (480, 270), (270, 480), (360, 240))
_SEED = 21
_OVERSAMPLING = 3
_GROUND_CONTRAST = 190
_COLOUR_CONTRAST = 125

_COLOURS = {
    "red": (216, 67, 58),
    "orange": (240, 138, 56),
    "yellow": (247, 203, 70),
    "green": (72, 160, 100),
    "teal": (38, 148, 146),
    "blue": (56, 108, 208),
    "purple": (124, 88, 190),
    "pink": (240, 138, 174),
    "white": (252, 250, 245),
}
_GROUNDS = {
    "cream": (250, 240, 218),
    "pale blue": (196, 226, 244),
    "navy": (30, 44, 84),
    "mint": (204, 238, 216),
    "lavender": (222, 212, 242),
    "peach": (255, 218, 192),
    "dark green": (24, 72, 60),
    "maroon": (98, 28, 46),
}
_SKIES = {
    "pale blue": (190, 225, 246),
    "peach": (255, 214, 186),
    "lavender": (220, 208, 242),
    "pale yellow": (255, 240, 196),
}
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}


def draw_pictures(directory: Path, count: int = 24) -> list[Path]:
    """Draw simple colourful scenes in several aspect ratios, as PNG and JPEG, each with its caption in a `.txt` file.

    Args:
        directory: where the pictures and captions go; made when it is not there.
        count: how many pictures.

    Returns:
        The pictures' paths, in the order of their names.
    """
    pictures = []
    for index in range(count):
        rng = random.Random(_SEED * 1000 + index)  # noqa: S311
        # The second term keeps a scene from always meeting the same size.
        width, height = _SIZES[(index + 2 * (index // len(_SCENES))) % len(_SIZES)]
        scene = _SCENES[index % len(_SCENES)]
        image, caption = _render(scene, width, height, rng)
        suffix, options = (".jpg", {"quality": 95, "subsampling": 0}) if index % 3 == 2 else (".png", {})
        path = directory / f"{index:03d}-{scene.__name__.strip('_')}{suffix}"
        encoded = io.BytesIO()
        image.save(encoded, "JPEG" if suffix == ".jpg" else "PNG", **options)
        storage.commit_bytes(path, encoded.getvalue())
        storage.commit_bytes(path.with_suffix(".txt"), f"{caption}\n".encode())
        pictures.append(path)
    return pictures


def _render(scene: Scene, width: int, height: int, rng: random.Random) -> tuple[Image.Image, str]:
    canvas = Image.new("RGB", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    caption = scene(ImageDraw.Draw(canvas), canvas.width, canvas.height, rng)
    return canvas.resize((width, height), Image.Resampling.LANCZOS), caption


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _distance(first: Colour, second: Colour) -> int:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def _apart(rng: random.Random, names: Iterable[str]) -> list[str]:
    """As many of the named colours, shuffled, as can be told apart at a glance."""
    shuffled = list(names)
    rng.shuffle(shuffled)
    kept: list[str] = []
    for name in shuffled:
        if all(_distance(_COLOURS[name], _COLOURS[other]) >= _COLOUR_CONTRAST for other in kept):
            kept.append(name)
    return kept


def _ground(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> tuple[str, list[str]]:
    """Fill the canvas; returns the ground's name and colours that stand out from it and from each other."""
    name = rng.choice(list(_GROUNDS))
    fill = _GROUNDS[name]
    draw.rectangle((0, 0, width, height), fill=fill)
    return name, _apart(rng, [key for key, rgb in _COLOURS.items() if _distance(rgb, fill) >= _GROUND_CONTRAST])


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_COLOURS[colour])


def _radial(x: float, y: float, radii: tuple[float, ...], points: int, turn: float = 0.0) -> list[Point]:
    """Corners around (x, y), the first one straight up; `radii` alternate."""
    angles = [turn + 2 * math.pi * corner / points for corner in range(points)]
    return [
        (x + radii[i % len(radii)] * math.sin(angle), y - radii[i % len(radii)] * math.cos(angle))
        for i, angle in enumerate(angles)
    ]


def _heart(x: float, y: float, radius: float) -> list[Point]:
    steps = [2 * math.pi * step / 90 for step in range(90)]
    return [
        (
            x + radius * math.sin(t) ** 3,
            y - radius / 16 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in steps
    ]


def _shape(draw: ImageDraw.ImageDraw, name: str, centre: Point, radius: float, colour: str) -> None:
    x, y = centre
    fill = _COLOURS[colour]
    match name:
        case "circle":
            _disc(draw, x, y, radius, colour)
        case "ring":
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, outline=fill, width=round(radius * 0.36))
        case "square":
            half = radius * 0.86
            draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        case "triangle":
            draw.polygon(_radial(x, y + radius * 0.2, (radius * 1.1,), 3), fill=fill)
        case "diamond":
            draw.polygon(_radial(x, y, (radius, radius * 0.72), 4), fill=fill)
        case "star":
            draw.polygon(_radial(x, y, (radius * 1.1, radius * 0.46), 10), fill=fill)
        case "heart":
            draw.polygon(_heart(x, y, radius), fill=fill)


def _shapes(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    ground, colours = _ground(draw, width, height, rng)
    names = rng.sample(["circle", "square", "triangle", "star", "diamond", "heart", "ring"], k=3)
    # A row along the longer side, each shape in a cell of its own.
    count = rng.choice((1, 2)) if width == height else rng.choice((2, 3))
    long, short = max(width, height), min(width, height)
    small = rng.randrange(count) if count > 1 else None
    weights = [0.6 if index == small else 1.0 for index in range(count)]
    unit = min(long * 0.86 / sum(weights), short * 0.86)
    start = (long - unit * sum(weights)) / 2
    phrases = []
    for index, (name, colour, weight) in enumerate(zip(names, colours, weights, strict=False)):
        along = start + unit * weight / 2
        start += unit * weight
        centre = (along, short / 2) if width >= height else (short / 2, along)
        _shape(draw, name, centre, unit * weight * 0.4, colour)
        phrases.append(_a(f"small {colour} {name}" if index == small else f"{colour} {name}"))
    return f"{_listed(phrases)} on {_a(ground)} ground"


def _stripes(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    ground, colours = _ground(draw, width, height, rng)
    direction = rng.choice(("horizontal", "vertical", "diagonal"))
    band = min(width, height) / rng.choice((7, 9))
    for index in range(1, int((width + height) / band) + 1, 2):
        near, far = index * band, (index + 1) * band
        fill = _COLOURS[colours[0]]
        if direction == "horizontal":
            draw.rectangle((0, near, width, far), fill=fill)
        elif direction == "vertical":
            draw.rectangle((near, 0, far, height), fill=fill)
        else:
            draw.polygon([(near, 0), (far, 0), (far - height, height), (near - height, height)], fill=fill)
    return f"{direction} {colours[0]} and {ground} stripes"


def _dots(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    ground, colours = _ground(draw, width, height, rng)
    cell = min(width, height) / rng.choice((4, 5))
    columns, rows = round(width / cell), round(height / cell)
    for row in range(rows):
        for column in range(columns):
            x, y = (column + 0.5) * width / columns, (row + 0.5) * height / rows
            _disc(draw, x, y, cell * 0.3, colours[(row + column) % 2])
    return f"{colours[0]} and {colours[1]} dots on {_a(ground)} ground"


def _rings(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    ground, colours = _ground(draw, width, height, rng)
    for index in range(5):
        _disc(draw, width / 2, height / 2, min(width, height) * 0.44 * (1 - index / 5), colours[index % 2])
    return f"a target of {colours[0]} and {colours[1]} rings on {_a(ground)} ground"


def _sky(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    name = rng.choice(list(_SKIES))
    draw.rectangle((0, 0, width, height), fill=_SKIES[name])
    return name


def _hill(draw: ImageDraw.ImageDraw, width: int, height: int, crest: Point, fill: Colour) -> None:
    """A parabola with its top at `crest`, filled down to the lower edge."""
    x, y = crest
    xs = [width * step / 60 for step in range(61)]
    ridge = [(at, y + height * 0.42 * ((at - x) / width) ** 2) for at in xs]
    draw.polygon([(0, height), *ridge, (width, height)], fill=fill)


def _hills(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    sky = _sky(draw, width, height, rng)
    sun = rng.choice(("red", "orange", "yellow") if sky == "pale blue" else ("red", "orange"))
    side = rng.choice((0.3, 0.7))
    _disc(draw, width * side, height * 0.36, min(width, height) * 0.17, sun)
    name, shades = rng.choice(
        (
            ("green", ((150, 200, 130), (96, 166, 104), (52, 122, 84))),
            ("purple", ((186, 160, 216), (142, 110, 190), (96, 70, 150))),
            ("blue", ((140, 176, 224), (86, 128, 200), (48, 84, 160))),
        )
    )
    for shade, x, y in zip(shades, (1 - side, side - 0.1, 1.1 - side), (0.5, 0.63, 0.78), strict=True):
        _hill(draw, width, height, (width * x, height * y), shade)
    return f"{_a(sun)} sun over {name} hills under {_a(sky)} sky"


def _house(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    sky = _sky(draw, width, height, rng)
    wall, roof, door = _apart(rng, ("red", "blue", "white", "purple", "orange"))[:3]
    sun = rng.choice((0.14, 0.86))
    _disc(draw, width * sun, height * 0.16, min(width, height) * 0.1, "yellow" if sky == "pale blue" else "orange")
    _hill(draw, width, height, (width / 2, height * 0.72), (104, 176, 108))
    unit = min(width, height) / 10
    x, floor = width / 2, height * 0.84
    draw.rectangle((x - 2.4 * unit, floor - 3.2 * unit, x + 2.4 * unit, floor), fill=_COLOURS[wall])
    eaves = floor - 3.1 * unit
    draw.polygon([(x - 3 * unit, eaves), (x, eaves - 2.5 * unit), (x + 3 * unit, eaves)], fill=_COLOURS[roof])
    draw.rectangle((x - 1.8 * unit, floor - 1.9 * unit, x - 0.6 * unit, floor), fill=_COLOURS[door])
    left, top, edge = x + 0.4 * unit, floor - 2.2 * unit, 1.3 * unit
    draw.rectangle((left, top, left + edge, top + edge), fill=(255, 236, 170))
    return f"{_a(wall)} house with {_a(roof)} roof and {_a(door)} door on a green hill under {_a(sky)} sky"


def _boat(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    sky = _sky(draw, width, height, rng)
    hull, sail = _apart(rng, ("red", "orange", "green", "pink", "purple"))[:2]
    unit = min(width, height) / 10
    x, water = width / 2, height * 0.72
    draw.polygon(
        [
            (x - 0.3 * unit, water - 5.4 * unit),
            (x - 0.3 * unit, water - 1.1 * unit),
            (x - 2.4 * unit, water - 1.1 * unit),
        ],
        fill=_COLOURS[sail],
    )
    draw.polygon(
        [
            (x + 0.2 * unit, water - 6 * unit),
            (x + 0.2 * unit, water - 1.1 * unit),
            (x + 2.9 * unit, water - 1.1 * unit),
        ],
        fill=_COLOURS[sail],
    )
    draw.line((x, water - 6.2 * unit, x, water - 0.5 * unit), fill=(110, 78, 56), width=round(unit * 0.2))
    draw.polygon(
        [
            (x - 3.2 * unit, water - 0.8 * unit),
            (x + 3.2 * unit, water - 0.8 * unit),
            (x + 2.2 * unit, water + 0.9 * unit),
            (x - 2.2 * unit, water + 0.9 * unit),
        ],
        fill=_COLOURS[hull],
    )
    for row, fill in enumerate(((86, 150, 216), (56, 116, 190), (36, 84, 154))):
        level = water + row * (height - water) / 3
        crests = [
            (width * step / 80, level + unit * 0.22 * math.sin(step * math.pi * width / unit / 80 + row)) for step in range(81)
        ]
        draw.polygon([(0, height), *crests, (width, height)], fill=fill)
    return f"{_a(hull)} boat with {sail} sails on a blue sea under {_a(sky)} sky"


def _night(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    draw.rectangle((0, 0, width, height), fill=(26, 36, 82))
    moon, count = rng.choice(("white", "yellow", "pink")), rng.randint(4, 7)
    side = rng.choice((0.24, 0.76))
    radius = min(width, height) * 0.13
    _disc(draw, width * side, height * 0.24, radius, moon)
    span = 0.52 / count
    for index in range(count):
        across = 0.06 + span * (index + 0.5) + (0.36 if side < 0.5 else 0.0)
        y = height * (0.14 + 0.34 * ((index * 2 + rng.random()) % 3) / 3)
        _shape(draw, "star", (width * across, y), radius * 0.26, "yellow")
    _hill(draw, width, height, (width * (1 - side), height * 0.64), (54, 62, 124))
    _hill(draw, width, height, (width * side, height * 0.76), (16, 22, 54))
    return f"{_a(moon)} moon and {_NUMBERS[count]} yellow stars over dark hills at night"


def _trees(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> str:
    sky = _sky(draw, width, height, rng)
    colour = rng.choice(("green", "teal", "orange", "red"))
    count = 3 if width >= height else 2
    _hill(draw, width, height, (width * rng.choice((0.4, 0.6)), height * 0.74), (170, 206, 124))
    unit = min(width / count, height) / 10
    for index in range(count):
        x, foot = (index + 0.5) * width / count, height * (0.86 + 0.04 * (index % 2))
        draw.rectangle((x - 0.5 * unit, foot - 2 * unit, x + 0.5 * unit, foot), fill=(122, 84, 58))
        for tier in range(3):
            half, base = (3.4 - 0.8 * tier) * unit, foot - (1.5 + 1.7 * tier) * unit
            draw.polygon([(x - half, base), (x, base - 3 * unit), (x + half, base)], fill=_COLOURS[colour])
    return f"{_NUMBERS[count]} {colour} trees in a meadow under {_a(sky)} sky"


_SCENES: tuple[Scene, ...] = (_shapes, _hills, _shapes, _house, _stripes, _boat, _shapes, _night, _trees, _dots, _rings)
