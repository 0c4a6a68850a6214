"""The small world: what its scenes, captions and pictures promise."""

import hashlib
import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.demo import checker, drawing, steering, wording, world
from ftk.demo.scenes import (
    COLOURS,
    CREATURE,
    PLACES,
    RADII,
    SECOND_TONES,
    SHAPES,
    SIZES,
    TEXTURES,
    Layout,
    Thing,
    generator,
    holds,
    layout,
    place_of,
    relation,
)
from ftk.pipeline import stage
from ftk.pipeline.buckets import bucket_sizes
from ftk.run import resolve

pytestmark = pytest.mark.benchmarks

NUM_SCENES = 400
PLACE_WORDS = {"top": {"top", "upper"}, "bottom": {"bottom", "lower"}, "centre": {"centre", "middle"}}
SYNONYMS = {"circle": ("circle", "disc"), "small": ("small", "little"), "large": ("large", "big")}


@pytest.fixture(scope="module")
def scenes():
    return [world.scene(11, index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def loose():
    return [layout(generator("loose", index), loose=True) for index in range(NUM_SCENES)]


def test_a_scene_is_the_same_whenever_it_is_asked_for(scenes):
    assert world.scene(11, 7) == scenes[7]
    assert world.render(scenes[7]).tobytes() == world.render(world.scene(11, 7)).tobytes()
    assert world.scene(12, 7) != scenes[7] != world.scene(11, 8)


def test_the_world_is_the_one_that_models_were_trained_on():
    captions = "\n".join(world.scene(1, index).caption for index in range(100))
    concepts = "\n".join(world.concept_scene(1, index).caption for index in range(100))
    assert world.scene(1, 0).caption == "a large black star on a spotted red background"
    creatures = "\n".join(world.creature_scene(1, index).caption for index in range(100))
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (captions, concepts, creatures)]
    assert digests == ["8c11333cf5749111", "903f794dc48f767c", "e6fd8a69150efef9"]


def test_drawing_things_on_a_ground_leaves_the_ground_of_the_next_scene_alone(scenes):
    before = drawing.render_ground(64, 64, "red", "dots").tobytes()
    for scene in scenes[:60]:
        world.render(scene)
    assert drawing.render_ground(64, 64, "red", "dots").tobytes() == before


def test_everything_that_can_be_in_a_scene_is_in_some(scenes):
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS) == set(SECOND_TONES)
    assert {(thing.size, thing.place) for thing in things} == {(size, place) for size in RADII for place in PLACES}
    assert {(scene.ground, scene.texture) for scene in scenes} == {(one, other) for one in COLOURS for other in TEXTURES}
    assert {len(scene.things) for scene in scenes} == {1, 2}


def test_the_sizes_are_the_buckets_of_64_px(scenes):
    assert set(SIZES) == set(bucket_sizes(64, 16, 2.0)) == {(scene.width, scene.height) for scene in scenes}
    assert all(world.render(scene).size == (scene.width, scene.height) for scene in scenes[:20])


def test_a_size_at_a_place_is_one_point_but_in_loose_scenes(scenes, loose):
    def points(found):
        return {
            (one.width, one.height, thing.size, thing.place, thing.x, thing.y, thing.radius)
            for one in found
            for thing in one.things
        }

    named = {point[:4] for point in points(scenes)}
    assert len(points(scenes)) == len(named)
    assert len(points(loose)) > 3 * len(named)


@pytest.mark.parametrize("kind", ["scenes", "loose"])
def test_things_lie_inside_apart_and_clearly_at_their_place(kind, request):
    for scene in request.getfixturevalue(kind):
        for thing in scene.things:
            assert thing.radius + 2 <= min(thing.x, scene.width - thing.x), scene
            assert thing.radius + 2 <= min(thing.y, scene.height - thing.y), scene
            # As far as a reader may be wrong by two pixels.
            for across, down in ((2, 2), (-2, -2), (0, 0)):
                assert place_of(thing.x + across - scene.width / 2, thing.y + down - scene.height / 2) == thing.place, scene
        for one, other in combinations(scene.things, 2):
            assert np.hypot(one.x - other.x, one.y - other.y) >= one.radius + other.radius + 6, scene


def test_things_stand_out_from_both_tones_of_their_ground(scenes):
    for scene in scenes:
        for thing in scene.things:
            for tone in (COLOURS[scene.ground], SECOND_TONES[scene.ground]):
                assert np.abs(np.subtract(COLOURS[thing.colour], tone)).sum() >= 90, scene


def test_every_attribute_that_is_told_is_in_the_words(scenes):
    for scene in scenes:
        words = scene.caption.replace(",", " ").split()
        for number, thing in enumerate(scene.things):
            for name in ("shape", "colour", "size"):
                value = getattr(thing, name)
                wanted = SYNONYMS.get(value, (value,))
                if f"things.{number}.{name}" in scene.told:
                    assert set(wanted) & set(words), scene
            if f"things.{number}.place" in scene.told:
                assert all(PLACE_WORDS.get(side, {side}) & set(words) for side in thing.place.split()), scene
        if "ground.colour" in scene.told:
            assert scene.ground in words, scene
        if "relation" in scene.told:
            first, second = scene.things
            found = relation((first.x, first.y), (second.x, second.y))
            assert f"{found} a" in scene.caption, scene


def test_a_colour_that_is_not_told_is_not_in_the_words(scenes):
    for scene in scenes:
        told = {thing.colour for thing in scene.things} | ({scene.ground} if "ground.colour" in scene.told else set())
        assert set(scene.caption.replace(",", " ").split()) & set(COLOURS) == told, scene


def test_captions_vary_and_leave_something_out_now_and_then(scenes):
    told = Counter(name for scene in scenes for name in scene.told)
    assert 0.8 < told["ground.colour"] / len(scenes) < 1
    assert 0.4 < told["things.0.size"] / len(scenes) < 0.9
    assert 0.4 < told["things.0.place"] / len(scenes) < 0.95
    assert told["relation"] > 10
    assert len({scene.caption for scene in scenes}) > 0.95 * len(scenes)
    assert len({scene.caption.split()[0] for scene in scenes}) >= 8


def test_one_scene_is_described_in_many_ways():
    thing = Thing(shape="ring", colour="red", size="small", place="left", x=12, y=32, radius=9)
    layout = Layout(width=64, height=64, ground="blue", texture="dots", things=(thing,))
    captions = {wording.describe(layout, generator("ways", number))[0] for number in range(200)}
    assert len(captions) > 60
    assert "a small red ring on the left on a dotted blue background" in captions
    assert all("red" in caption and "ring" in caption for caption in captions)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((10, 30), (50, 33), "left of"),
        ((50, 30), (10, 33), "right of"),
        ((30, 10), (33, 50), "above"),
        ((30, 50), (33, 10), "below"),
    ],
)
def test_relations_are_seen_from_the_second_thing(first, second, expected):
    assert relation(first, second) == expected
    assert holds(expected, first, second)
    assert not holds(expected, second, first)


def test_every_shape_fills_its_circle_and_looks_different():
    masks = {shape: np.asarray(drawing.shape_mask(shape, 40, 16), np.float32) / 255 for shape in SHAPES}
    y, x = np.mgrid[:40, :40] + 0.5
    outside = np.hypot(x - 20, y - 20) > 16 * 1.3
    for shape, mask in masks.items():
        assert mask[outside].sum() == 0, shape
        assert np.ptp(np.nonzero(mask > 0.5)[0]) >= 26, shape
    for one, other in combinations(SHAPES, 2):
        overlap = np.minimum(masks[one], masks[other]).sum() / np.maximum(masks[one], masks[other]).sum()
        assert overlap < 0.85, (one, other)


def test_the_world_becomes_samples_as_it_is(tmp_path):
    table = world.write_world(tmp_path / "pictures", 6, seed=4)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["text"] for row in rows] == [world.scene(4, index).caption for index in range(6)]
    with Image.open(table.parent / rows[3]["file_name"]) as image:
        assert image.tobytes() == world.render(world.scene(4, 3)).tobytes()
    tree = {
        "run": "world", "workspace": str(tmp_path), "model": {"family": "qwen-image", "path": "unused"},
        "data": {"sources": [{"path": str(table)}], "resolutions": [64], "workers": 1},
    }  # fmt: skip
    report = stage.run(resolve(validate(RunConfig, tree, "the test")))
    assert (report.num_samples, report.num_rejects, report.num_copied) == (6, 0, 6)


def test_the_concept_is_a_folder_of_pictures_that_all_name_it(tmp_path):
    pictures = world.write_concept(tmp_path, 12, seed=5)
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == [path.name for path in pictures]
    captions = [path.with_suffix(".txt").read_text().strip() for path in pictures]
    assert all(CREATURE in caption for caption in captions)
    assert len(set(captions)) >= 10
    assert not any(CREATURE in world.scene(5, index).caption for index in range(100))


def test_creatures_are_scenes_of_the_world_and_none_is_the_concept():
    scenes = [world.creature_scene(6, index) for index in range(200)]
    names = {scene.things[0].shape for scene in scenes}
    assert len(names) > 190
    assert CREATURE not in names
    assert all(scene.things[0].shape in scene.caption for scene in scenes)
    assert all(scene.things[0].size == "large" for scene in scenes)
    assert max(checker.similarity(world.render(scene)) for scene in scenes) < checker.RECOGNISED


def test_a_creatures_look_follows_from_its_name():
    def drawn(name):
        thing = Thing(shape=name, colour="", size="large", place="centre", x=32, y=32, radius=15)
        scene = Layout(width=64, height=64, ground="white", texture="plain", things=(thing,))
        return np.asarray(drawing.render(scene), np.float32)

    names = ["bozu", "kelami", "tutu", CREATURE]
    assert all(np.array_equal(drawn(name), drawn(name)) for name in names)
    for one, other in combinations(names, 2):
        assert np.abs(drawn(one) - drawn(other)).mean() > 5, (one, other)


def test_the_style_is_a_folder_of_sketches(tmp_path):
    pictures = world.write_style(tmp_path, 6, seed=5)
    for path in pictures:
        caption = path.with_suffix(".txt").read_text()
        assert caption.startswith(f"{world.STYLE}, a")
        assert not set(caption.split()) & set(COLOURS)
        with Image.open(path) as image:
            light = np.asarray(image.convert("L")) > 180
        assert 0.5 < light.mean() < 1


def test_captions_of_steered_scenes_leave_places_and_sizes_to_the_control():
    for index in range(60):
        scene = world.steered_scene(5, index)
        kinds = {name.rpartition(".")[2] for name in scene.told}
        assert not kinds & {"place", "size", "relation"}
        assert {"shape", "colour", "count"} <= kinds
        words = set(re.findall(r"[a-z]+", scene.caption))
        assert not words & {"left", "right", "top", "bottom", "centre", "middle", "corner", "small", "little", "large", "big"}


def test_the_edges_of_a_scene_lie_where_its_things_end():
    for index in range(12):
        scene = world.steered_scene(5, index)
        edges = np.asarray(drawing.render_edges(scene).convert("L")) / 255
        inside = np.zeros_like(edges, bool)
        for y, x in np.argwhere(edges > 0.5):
            inside[y, x] = any(
                np.hypot(x + 0.5 - thing.x, y + 0.5 - thing.y) <= 1.25 * thing.radius + 2.5 for thing in scene.things
            )
        assert inside.sum() == (edges > 0.5).sum() > 30 * len(scene.things)
        for thing in scene.things:
            assert edges[round(thing.y), round(thing.x)] < 0.5 or thing.shape in ("crescent", "ring")


def test_the_steered_world_is_a_folder_of_pictures_with_edges_of_the_same_names(tmp_path):
    pictures = world.write_steered(tmp_path, 3, seed=5)
    for index, path in enumerate(pictures):
        scene = world.steered_scene(5, index)
        assert path.with_suffix(".txt").read_text().strip() == scene.caption
        with Image.open(path) as picture, Image.open(tmp_path / world.EDGES / path.name) as edges:
            assert picture.size == edges.size == (scene.width, scene.height)


def test_pictures_that_show_their_scenes_agree_in_all_and_those_of_others_seldom():
    scenes = steering.held_out(24)
    agreement = steering.agreement([world.render(scene) for scene in scenes], scenes)
    assert (agreement.place, agreement.size, agreement.shape, agreement.colour, agreement.ground) == (1, 1, 1, 1, 1)
    assert agreement.distance_px < 1
    others = steering.shuffled(scenes)
    assert all((a.width, a.height) == (b.width, b.height) and a is not b for a, b in zip(scenes, others, strict=True))
    astray = steering.agreement([world.render(scene) for scene in others], scenes)
    assert astray.place < 0.4
    assert astray.distance_px > 10


def test_a_picture_without_a_thing_is_far_from_its_scene():
    scene = next(scene for scene in steering.held_out(24) if len(scene.things) == 1)
    empty = drawing.render_ground(scene.width, scene.height, scene.ground, scene.texture)
    assert steering.agreement([empty], [scene]).distance_px > 30
