"""What a picture of the small world shows, read back from its pixels: colours, shapes, places, sizes, ground.

Nothing here is learned. The ground is the one of all grounds that, drawn, explains most of the picture; things are what it
does not explain, one a connected region; a thing's colour is the nearest of the world's, its shape the one whose drawing
covers it best. Blurred pictures are read as well: grounds and shapes are compared by how much, not by whether.

Shape legend: H W pixels of the picture, E edge of a template, N templates, M windows of the picture, P pixels of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ftk.demo import drawing
from ftk.demo.scenes import COLOURS, CREATURE, RADII, SHAPES, TEXTURES, Scene, holds, place_of, relation

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Distances in Oklab, where 1 is from black to white. No thing is nearer than 0.19 to its ground, and no second tone further
# than 0.15 from its base, but black's, 0.25.
_GROUND_CAP = 0.12
_THING_DISTANCE = 0.1
_LEAST_AREA_PX = 36
_BLUR_PX = 0.7
_TEMPLATE_EDGE = 40
_SHAPE_RADII = np.arange(7.0, 18.0, 0.75)
_SHIFTS_PX = (-2, -1, 0, 1, 2)
RECOGNISED = 0.3
"""From this similarity on a picture counts as one of the creature; those of the world are at 0, its other creatures below."""
_CREATURE_BLUR_PX = 1.0
# Shades that differ to the cube root of the conversion, and to nobody who looks.
_BLACKEST = 0.08
_TO_CONES = np.array([[0.4122215, 0.2119035, 0.0883025], [0.5363325, 0.6806995, 0.2817188], [0.0514460, 0.1073970, 0.6299788]])
_TO_OKLAB = np.array(
    [[0.2104543, 1.9779985, 0.0259040], [0.7936178, -2.4285922, 0.7827718], [-0.0040720, 0.4505937, -0.8086758]],
    np.float32,
)
_CREATURE_RADII = np.arange(8.5, 16.5, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One thing in a picture. `x`, `y` is the middle of its box, in px."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a picture shows, the largest thing first."""

    ground: str
    texture: str
    things: tuple[Seen, ...]


def read(image: Image.Image) -> Reading:
    """Ground and things of a picture of any size."""
    rgb_HW3 = _pixels(image)
    lab_HW3 = _oklab(rgb_HW3)
    ground = _ground(lab_HW3)
    regions = _regions(np.linalg.norm(lab_HW3 - ground.lab_HW3, axis=-1) > _THING_DISTANCE)
    things = tuple(_thing(rgb_HW3, lab_HW3, region_HW, ground) for region_HW in regions)
    return Reading(ground=ground.colour, texture=ground.texture, things=things)


def score(image: Image.Image, scene: Scene) -> dict[str, bool]:
    """Whether each attribute of a scene is in the picture; the names are those of `Scene.told`.

    What is seen is matched with the scene's things in the way in which most attributes agree; of a thing without a match none
    does. A creature has no colour to agree; where it is to be seen is where the picture is most like it.
    """
    found = read(image)
    wanted = len(scene.things)
    # None stands for things that are not there.
    seen: list[Seen | None] = [*found.things, *[None] * max(0, wanted - len(found.things))]
    best = max((_agreement(scene, chosen) for chosen in permutations(seen, wanted)), key=lambda agreed: sum(agreed.values()))
    return {
        "count": len(found.things) == wanted,
        "ground.colour": found.ground == scene.ground,
        "ground.texture": found.texture == scene.texture,
        **best,
        **_creatures_agree(image, scene),
    }


def similarity(image: Image.Image) -> float:
    """How much of the creature's look is somewhere in the picture: 1 all of it, 0 no more than one flat colour has.

    The share of the variance of the creature's drawing that the picture explains, at the best place and of the best size.
    """
    return _most_like(image)[0]


def _creatures_agree(image: Image.Image, scene: Scene) -> dict[str, bool]:
    numbers = [number for number, thing in enumerate(scene.things) if thing.shape == CREATURE]
    if not numbers:
        return {}
    likeness, seen = _most_like(image)
    return {
        f"things.{number}.{name}": likeness >= RECOGNISED and getattr(seen, name) == getattr(scene.things[number], name)
        for number in numbers
        for name in ("shape", "size", "place")
    }


def _agreement(scene: Scene, chosen: Sequence[Seen | None]) -> dict[str, bool]:
    agreed = {
        f"things.{number}.{name}": seen is not None and getattr(seen, name) == getattr(thing, name)
        for number, (thing, seen) in enumerate(zip(scene.things, chosen, strict=True))
        for name in ("shape", "colour", "size", "place")
        if thing.colour
    }
    if len(scene.things) == 2:
        first, second = scene.things
        wanted = relation((first.x, first.y), (second.x, second.y))
        agreed["relation"] = None not in chosen and holds(wanted, *((one.x, one.y) for one in chosen if one))
    return agreed


def _most_like(image: Image.Image) -> tuple[float, Seen]:
    """How like the creature the picture is where it is most like it, and the creature there."""
    rgb_HW3 = _pixels(image.convert("RGB").filter(ImageFilter.GaussianBlur(_CREATURE_BLUR_PX)))
    least, x, y, radius = min(_unlikeness(rgb_HW3, float(radius)) for radius in _CREATURE_RADII)
    seen = _seen(CREATURE, "", radius, (x, y), (image.width, image.height))
    return min(max(1 - least, 0.0), 1.0), seen


def _unlikeness(rgb_HW3: Array, radius: float) -> tuple[float, float, float, float]:
    """Squared distance to the creature of this radius, as a share of the creature's own variance; best x and y; the radius."""
    template_EE3, weight_EE1 = _creature(radius)
    edge = len(template_EE3)
    if edge > min(rgb_HW3.shape[:2]):
        return 1.0, 0.0, 0.0, radius
    weighted_EE3 = template_EE3 * weight_EE1
    own = float((template_EE3 * weighted_EE3).sum())
    variance = own - float((weighted_EE3.sum(axis=(0, 1)) ** 2).sum() / weight_EE1.sum())
    distance = _correlated(rgb_HW3**2, weight_EE1) - 2 * _correlated(rgb_HW3, weighted_EE3) + own
    top, left = np.unravel_index(distance.argmin(), distance.shape)
    return float(distance.min()) / variance, left + edge / 2, top + edge / 2, radius


def _correlated(image_HW3: Array, template_EEC: Array) -> NDArray[np.float64]:
    """The sum of products, over pixels and channels, at each place where the template lies inside the image."""
    (height, width), edge = image_HW3.shape[:2], len(template_EEC)
    template = np.fft.rfft2(template_EEC, s=(height, width), axes=(0, 1))
    product_HW = np.fft.irfft2((np.fft.rfft2(image_HW3, axes=(0, 1)) * template.conj()).sum(axis=-1), s=(height, width))
    return product_HW[: height - edge + 1, : width - edge + 1]


def _pixels(image: Image.Image) -> Array:
    """RGB from 0 to 1."""
    return np.asarray(image.convert("RGB")).astype(np.float32) / np.float32(255)


def _named(colour: str) -> Array:
    return np.array(COLOURS[colour], np.float32) / np.float32(255)


def _oklab(rgb: Array) -> Array:
    """Colours in a space where distances are those that people see. Source: Ottosson, "A perceptual color space" (2020)."""
    linear = ((np.maximum(rgb, _BLACKEST) + 0.055) / 1.055) ** 2.4
    lab: Array = np.cbrt(linear @ _TO_CONES) @ _TO_OKLAB
    return lab


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ground:
    """A ground without things, a little blurred, as a decoder's are: in RGB from 0 to 1, and in Oklab."""

    colour: str
    texture: str
    rgb_HW3: Array
    lab_HW3: Array


@cache
def _grounds(width: int, height: int) -> list[_Ground]:
    found = []
    for colour, texture in product(COLOURS, TEXTURES):
        drawn = drawing.render_ground(width, height, colour, texture)
        rgb_HW3 = _pixels(drawn.filter(ImageFilter.GaussianBlur(_BLUR_PX)))
        found.append(_Ground(colour=colour, texture=texture, rgb_HW3=rgb_HW3, lab_HW3=_oklab(rgb_HW3)))
    return found


def _ground(lab_HW3: Array) -> _Ground:
    """The ground that explains most: a pixel that is far from it, as a thing's are from any, counts as `_GROUND_CAP`."""
    height, width = lab_HW3.shape[:2]
    coarse = np.s_[::2, ::2]

    def cost(ground: _Ground) -> float:
        return float(np.minimum(np.linalg.norm(lab_HW3[coarse] - ground.lab_HW3[coarse], axis=-1), _GROUND_CAP).mean())

    return min(_grounds(width, height), key=cost)


def _regions(mask_HW: Mask) -> list[Mask]:
    """Connected regions of some size, the largest first. Pixels that touch at a side are connected."""
    labels_HW = np.where(mask_HW, np.arange(1, mask_HW.size + 1).reshape(mask_HW.shape), 0)
    spread_HW = np.zeros_like(labels_HW)
    while not np.array_equal(spread_HW, labels_HW):
        spread_HW, padded = labels_HW, np.pad(labels_HW, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        labels_HW = np.where(mask_HW, np.maximum.reduce([labels_HW, *around]), 0)
    names, areas = np.unique(labels_HW[mask_HW], return_counts=True)
    order = np.argsort(-areas, kind="stable")
    return [labels_HW == names[position] for position in order if areas[position] >= _LEAST_AREA_PX]


def _thing(rgb_HW3: Array, lab_HW3: Array, region_HW: Mask, ground: _Ground) -> Seen:
    distance_N = np.linalg.norm(lab_HW3 - ground.lab_HW3, axis=-1)[region_HW]
    # The pixels furthest from the ground are inside, not at the blurred edge.
    inside_N = distance_N >= np.median(distance_N)
    colour = _nearest_colour(np.median(lab_HW3[region_HW][inside_N], axis=0), ground.colour)
    towards_HW3 = _named(colour) - ground.rgb_HW3
    cover_HW = ((rgb_HW3 - ground.rgb_HW3) * towards_HW3).sum(axis=-1) / (towards_HW3**2).sum(axis=-1)
    shape, radius, x, y = _fit(np.where(_grown(region_HW), cover_HW.clip(0, 1), 0))
    height, width = region_HW.shape
    return _seen(shape, colour, radius, (x, y), (width, height))


def _seen(shape: str, colour: str, radius: float, centre: tuple[float, float], size: tuple[int, int]) -> Seen:
    """A thing of this radius around this centre, in a picture of this width and height."""
    (x, y), (width, height) = centre, size
    limit = (RADII["small"] + RADII["large"]) / 2
    place = place_of(x - width / 2, y - height / 2)
    return Seen(shape=shape, colour=colour, size="small" if radius < limit else "large", place=place, x=x, y=y)


def _nearest_colour(lab: Array, ground: str) -> str:
    """The colour that is nearest to these values, but the ground's: what has that cannot be told from it."""
    others = [name for name in COLOURS if name != ground]
    return min(others, key=lambda name: float(np.linalg.norm(lab - _oklab(_named(name)))))


def _grown(region_HW: Mask) -> Mask:
    """With the pixels around it, where a blurred edge ends."""
    padded = np.pad(region_HW, 1)
    height, width = region_HW.shape
    grown: Mask = np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
    return grown


def _fit(cover_HW: Array) -> tuple[str, float, float, float]:
    """Shape, radius and centre of the drawing that is most like what a thing covers.

    By Tanimoto's coefficient, ab / (aa + bb - ab): intersection over union, of what is covered in part too.
    """
    rows, columns = np.nonzero(cover_HW >= cover_HW.max() / 2)
    y, x = (int(values.min() + values.max() + 1) // 2 for values in (rows, columns))
    edge = _TEMPLATE_EDGE
    padded_HW = np.pad(cover_HW, edge)
    corners = [(y + down + edge // 2, x + across + edge // 2) for down, across in product(_SHIFTS_PX, repeat=2)]
    windows_MP = np.stack([padded_HW[top : top + edge, left : left + edge].ravel() for top, left in corners])
    names, templates_NP = _templates()
    shared_NM = templates_NP @ windows_MP.T
    either_NM = (templates_NP**2).sum(axis=1)[:, None] + (windows_MP**2).sum(axis=1)[None] - shared_NM
    number, window = divmod(int((shared_NM / either_NM).argmax()), len(corners))
    shape, radius = names[number]
    top, left = corners[window]
    return shape, radius, float(left - edge // 2), float(top - edge // 2)


@cache
def _templates() -> tuple[list[tuple[str, float]], Array]:
    """Shape and radius of each template, and what it covers of its square, flattened."""
    names = [(shape, float(radius)) for shape, radius in product(SHAPES, _SHAPE_RADII)]
    blur = ImageFilter.GaussianBlur(_BLUR_PX)
    drawn = [drawing.shape_mask(shape, _TEMPLATE_EDGE, radius).filter(blur) for shape, radius in names]
    return names, np.stack([_pixels(one)[..., 0].ravel() for one in drawn])


@cache
def _creature(radius: float) -> tuple[Array, Array]:
    """The creature's colours, and where they count: inside, since at its edge they mix with whatever is behind it."""
    template = drawing.creature_template(2 * round(radius) + 2, radius)
    blur = ImageFilter.GaussianBlur(_CREATURE_BLUR_PX)
    cover_EE = _pixels(template.getchannel("A").filter(blur))[..., 0]
    return _pixels(template.convert("RGB").filter(blur)), ((cover_EE - 0.75) / 0.25).clip(0, 1)[..., None]
