"""A small world of captioned pictures: endless, each known by (seed, index), and the same whenever it is drawn.

Beside the world's own scenes, some of them with creatures, there are one creature and a drawing style that the world lacks, in
a dozen pictures each: what a model that was trained on the world can be taught.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ftk import storage
from ftk.demo import drawing, wording
from ftk.demo.drawing import render
from ftk.demo.scenes import CREATURE, SHAPES, Layout, Scene, arranged, creature_name, generator, layout
from ftk.demo.wording import STYLE

__all__ = [
    "CREATURE", "EDGES", "STYLE", "concept_scene", "creature_scene", "render", "scene", "steered_scene", "write_concept",
    "write_steered", "write_style", "write_world",
]  # fmt: skip

TABLE = "metadata.jsonl"
EDGES = "edges"
"""The folder of control images, within that of the pictures."""
HELD_OUT_SEED = 2
"""Of scenes that nothing is trained on."""


def scene(seed: int, index: int) -> Scene:
    """One of the world's scenes."""
    rng = generator("world", seed, index)
    return _described(layout(rng), rng)


def creature_scene(seed: int, index: int) -> Scene:
    """One of the world's creatures, seldom the same one twice, in every third scene beside another thing."""
    rng = generator("creature", seed, index)
    return _with_creature(creature_name(rng), index, rng)


def concept_scene(seed: int, index: int) -> Scene:
    """As `creature_scene`, with the creature that the world lacks."""
    return _with_creature(CREATURE, index, generator("concept", seed, index))


def steered_scene(seed: int, index: int) -> Scene:
    """One of the world's scenes, with a caption that leaves places and sizes to a control image."""
    rng = generator("steered", seed, index)
    found = layout(rng)
    return _scene(found, *wording.describe_contents(found, rng))


def write_world(directory: Path, count: int, seed: int, draw: Callable[[int, int], Scene] = scene) -> Path:
    """Draw the scenes `(seed, 0)` to `(seed, count - 1)` as PNG, with their captions in `metadata.jsonl`.

    Returns:
        The table, which is what `data.sources` names; it is written last, so it names whole files only.
    """
    rows = []
    for index in range(count):
        found = draw(seed, index)
        # Folders of a thousand: file browsers list those without a pause.
        name = f"{index // 1000:03d}/{index:06d}.png"
        storage.commit_bytes(directory / name, _png(render(found)))
        rows.append({"file_name": name, "text": found.caption})
    storage.commit_bytes(directory / TABLE, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    return directory / TABLE


def write_concept(directory: Path, count: int, seed: int) -> list[Path]:
    """Draw the creature in varied scenes as PNG, each with its caption in a `.txt` file beside it.

    Returns:
        The pictures' paths, in the order of their names.
    """
    return _write_folder(directory, count, lambda index: _pictured(concept_scene(seed, index)))


def write_style(directory: Path, count: int, seed: int) -> list[Path]:
    """As `write_concept`, the world's things in the style: outlines in ink on ruled paper."""
    return _write_folder(directory, count, lambda index: _sketched(seed, index))


def write_steered(directory: Path, count: int, seed: int) -> list[Path]:
    """Draw `steered_scene`s as PNG, each with its caption beside it, and their outlines under the same names in `edges/`.

    Returns:
        The pictures' paths, in the order of their names.
    """
    for index in range(count):
        edges = drawing.render_edges(steered_scene(seed, index))
        storage.commit_bytes(directory / EDGES / _file_name(index), _png(edges))
    return _write_folder(directory, count, lambda index: _pictured(steered_scene(seed, index)))


def _with_creature(name: str, index: int, rng: random.Random) -> Scene:
    others = [rng.choice(SHAPES)] if index % 3 == 2 else []
    return _described(arranged(rng, [name, *others]), rng)


def _described(found: Layout, rng: random.Random) -> Scene:
    return _scene(found, *wording.describe(found, rng))


def _scene(found: Layout, caption: str, told: frozenset[str]) -> Scene:
    return Scene(
        width=found.width, height=found.height, ground=found.ground, texture=found.texture, things=found.things,
        caption=caption, told=told,
    )  # fmt: skip


def _pictured(found: Scene) -> tuple[Image.Image, str]:
    return render(found), found.caption


def _sketched(seed: int, index: int) -> tuple[Image.Image, str]:
    rng = generator("style", seed, index)
    found = layout(rng)
    return drawing.render_sketch(found), wording.describe_sketch(found, rng)


def _write_folder(directory: Path, count: int, draw: Callable[[int], tuple[Image.Image, str]]) -> list[Path]:
    pictures = []
    for index in range(count):
        image, caption = draw(index)
        path = directory / _file_name(index)
        storage.commit_bytes(path, _png(image))
        storage.commit_bytes(path.with_suffix(".txt"), f"{caption}\n".encode())
        pictures.append(path)
    return pictures


def _file_name(index: int) -> str:
    return f"{index:03d}.png"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
