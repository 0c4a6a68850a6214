"""What the checker reads in pictures of the small world, sharp, degraded, wrong, and of something else."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ftk.demo import checker, drawing, world
from ftk.demo.scenes import COLOURS, CREATURE, SHAPES, TEXTURES

NUM_SCENES = 200
NUM_DEGRADED = 100


def degraded(image, seed):
    """Blurred, noisy, and through JPEG: about 27.5 dB on average, as a small VAE gives it back."""
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(1.0)), np.float64)
    noisy = blurred + np.random.default_rng(seed).normal(0, 6, blurred.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return Image.open(buffer).convert("RGB")


def psnr(image, reference):
    error = np.mean((np.asarray(image, np.float64) - np.asarray(reference, np.float64)) ** 2)
    return 10 * np.log10(255**2 / error)


def agreement(scores):
    """The share of all attributes, and the least share of one kind."""
    right, all_ = Counter(), Counter()
    for score in scores:
        for name, agrees in score.items():
            kind = name.rpartition(".")[2] if name.startswith("things") else name
            all_[kind] += 1
            right[kind] += agrees
    return right.total() / all_.total(), min(right[kind] / all_[kind] for kind in all_)


def failed(image, scene):
    return {name for name, agrees in checker.score(image, scene).items() if not agrees}


@pytest.fixture(scope="module")
def scenes():
    return [world.scene(21, index) for index in range(NUM_SCENES)]


def test_true_pictures_are_read_right(scenes):
    together, worst = agreement(checker.score(world.render(scene), scene) for scene in scenes)
    assert together >= 0.98
    assert worst >= 0.98


def test_degraded_pictures_are_read_right_nearly_always(scenes):
    pairs = [(scene, world.render(scene)) for scene in scenes[:NUM_DEGRADED]]
    blurry = [degraded(image, seed) for seed, (_, image) in enumerate(pairs)]
    assert np.mean([psnr(one, image) for one, (_, image) in zip(blurry, pairs, strict=True)]) < 28.5
    together, worst = agreement(checker.score(image, scene) for image, (scene, _) in zip(blurry, pairs, strict=True))
    assert together >= 0.97
    assert worst >= 0.95


def test_a_score_has_all_that_a_caption_can_tell(scenes):
    for scene in (*scenes[:50], *(world.concept_scene(21, index) for index in range(12))):
        assert scene.told <= checker.score(world.render(scene), scene).keys(), scene


@pytest.mark.parametrize("name", ["shape", "colour", "size", "place"])
def test_a_thing_that_is_otherwise_than_told_is_found_out(scenes, name):
    """The picture of one scene is scored against the same scene but for one attribute."""
    others = {
        "shape": lambda thing: SHAPES[SHAPES.index(thing.shape) - 1],
        "colour": lambda thing: next(one for one in COLOURS if one != thing.colour),
        "size": lambda thing: "small" if thing.size == "large" else "large",
        "place": lambda thing: "top" if thing.place != "top" else "left",
    }
    single = [scene for scene in scenes if len(scene.things) == 1][:40]
    for scene in single:
        (thing,) = scene.things
        other = replace(scene, things=(replace(thing, **{name: others[name](thing)}),))
        assert failed(world.render(scene), other) == {f"things.0.{name}"}


def test_another_ground_is_found_out(scenes):
    for scene in scenes[:40]:
        colour = next(one for one in COLOURS if one != scene.ground)
        texture = TEXTURES[TEXTURES.index(scene.texture) - 1]
        other = replace(scene, ground=colour, texture=texture)
        assert failed(world.render(scene), other) == {"ground.colour", "ground.texture"}


def test_things_that_change_places_are_found_out(scenes):
    pairs = [scene for scene in scenes if len(scene.things) == 2][:20]
    for scene in pairs:
        first, second = scene.things
        there = ("place", "x", "y")
        swapped = (
            replace(first, **{name: getattr(second, name) for name in there}),
            replace(second, **{name: getattr(first, name) for name in there}),
        )
        assert failed(world.render(scene), replace(scene, things=swapped))


def test_a_missing_and_a_surplus_thing_are_found_out(scenes):
    scene = next(scene for scene in scenes if len(scene.things) == 2)
    fewer = replace(scene, things=scene.things[:1])
    assert failed(world.render(fewer), scene) >= {"count", "relation"}
    assert failed(world.render(scene), fewer) == {"count"}
    empty = drawing.render_ground(scene.width, scene.height, scene.ground, scene.texture)
    assert len(failed(empty, scene)) == 10
    assert checker.read(empty).things == ()


def test_pictures_of_nothing_known_are_read_without_an_error(scenes):
    noise = np.random.default_rng(0)
    for size in ((64, 64), (80, 48), (16, 16), (130, 70)):
        for image in (
            Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)),
            Image.fromarray(noise.integers(0, 2, (size[1], size[0], 3), dtype=np.uint8) * 255),
            Image.new("L", size, 128),
        ):
            score = checker.score(image, scenes[0])
            assert sum(score.values()) < len(score) - 2
            assert checker.similarity(image) == 0


@pytest.mark.parametrize(("shade", "expected"), [((0, 0, 0), "black"), ((30, 30, 34), "black"), ((255, 255, 255), "white")])
def test_shades_that_look_alike_are_one_colour(shade, expected):
    reading = checker.read(Image.new("RGB", (64, 64), shade))
    assert (reading.ground, reading.texture, reading.things) == (expected, "plain", ())


def test_the_creature_is_told_from_the_world_by_a_wide_margin(scenes):
    creatures = [world.render(world.concept_scene(21, index)) for index in range(60)]
    sharp = [checker.similarity(image) for image in creatures]
    blurry = [checker.similarity(degraded(image, seed)) for seed, image in enumerate(creatures)]
    others = [checker.similarity(world.render(scene)) for scene in scenes[:60]]
    assert min(sharp) > 0.65
    assert min(blurry) > checker.RECOGNISED + 0.1
    assert max(others) < checker.RECOGNISED - 0.2


def test_a_creature_with_other_colours_or_upside_down_is_less_like_it():
    image = world.render(next(one for one in (world.concept_scene(21, i) for i in range(60)) if one.things[0].size == "large"))
    likeness = checker.similarity(image)
    recoloured = Image.merge("RGB", image.split()[::-1])
    for other in (recoloured, image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)):
        assert checker.similarity(other) < likeness - 0.4


def test_scenes_of_the_creature_are_scored_too():
    scenes = [world.concept_scene(21, index) for index in range(40)]
    together, worst = agreement(checker.score(world.render(scene), scene) for scene in scenes)
    assert together >= 0.97
    assert worst >= 0.9
    alone = next(scene for scene in scenes if len(scene.things) == 1)
    impostor = replace(alone, things=(replace(alone.things[0], shape="circle", colour="red"),), ground="white")
    assert alone.things[0].shape == CREATURE
    assert failed(world.render(impostor), alone) >= {"things.0.shape", "things.0.size", "things.0.place", "ground.colour"}
