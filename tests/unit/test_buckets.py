"""Buckets: the sizes are what memory and the model allow, and an image goes where it loses least."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftk.models.components.geometry import nearest_multiple
from ftk.pipeline.buckets import (
    Placement,
    bucket_sizes,
    cover,
    follow,
    largest_part,
    place,
    place_exactly,
    random_crops,
    share_out,
)

SETTINGS = list(itertools.product([64, 500, 512, 1000, 1024], [8, 16, 32], [1.0, 1.5, 2.0, 4.0]))


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_sizes_are_multiples_within_the_area_and_the_aspect(resolution: int, step: int, max_aspect: float) -> None:
    sizes = bucket_sizes(resolution, step, max_aspect)
    assert sizes, "every setting has at least one bucket"
    for width, height in sizes:
        assert width % step == 0
        assert height % step == 0
        assert 0 < width * height <= resolution * resolution
        assert max(width, height) <= max_aspect * min(width, height)


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_sizes_are_symmetric_sorted_and_unique(resolution: int, step: int, max_aspect: float) -> None:
    sizes = bucket_sizes(resolution, step, max_aspect)
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_no_size_could_grow_in_both_directions(resolution: int, step: int, max_aspect: float) -> None:
    for width, height in bucket_sizes(resolution, step, max_aspect):
        assert (width + step) * (height + step) > resolution * resolution


def test_the_square_is_a_bucket_where_it_fits() -> None:
    assert (1024, 1024) in bucket_sizes(1024, 16, 2.0)
    assert bucket_sizes(512, 16, 1.0) == [(512, 512)]


def test_an_edge_that_is_no_multiple_still_has_a_square_bucket_at_aspect_one() -> None:
    assert bucket_sizes(1000, 16, 1.0) == [(992, 992)]


def test_a_wider_limit_only_adds_shapes() -> None:
    narrow, wide = bucket_sizes(1024, 16, 1.5), bucket_sizes(1024, 16, 3.0)
    assert max(w / h for w, h in narrow) <= 1.5 < max(w / h for w, h in wide) <= 3.0


def _random_images() -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(draw.randint(1, 6000), draw.randint(1, 6000)) for _ in range(500)] + [(1, 1), (1, 6000), (6000, 1)]


def test_the_crop_lies_inside_the_resized_image() -> None:
    sizes = bucket_sizes(512, 16, 2.0)
    for width, height in _random_images():
        placement = place(width, height, sizes)
        assert (placement.bucket_width, placement.bucket_height) in sizes
        assert placement.crop_x >= 0
        assert placement.crop_y >= 0
        assert placement.crop_x + placement.bucket_width <= placement.resize_width
        assert placement.crop_y + placement.bucket_height <= placement.resize_height


def test_the_resize_keeps_the_aspect_and_one_side_fits_exactly() -> None:
    for width, height in _random_images():
        placement = place(width, height, bucket_sizes(512, 16, 2.0))
        exact = (
            placement.resize_width == placement.bucket_width,
            placement.resize_height == placement.bucket_height,
        )
        assert any(exact)
        scale = max(placement.bucket_width / width, placement.bucket_height / height)
        assert abs(placement.resize_width - width * scale) <= 0.5 + 1e-6
        assert abs(placement.resize_height - height * scale) <= 0.5 + 1e-6


def test_the_crop_is_central() -> None:
    for width, height in _random_images():
        placement = place(width, height, bucket_sizes(512, 16, 2.0))
        right = placement.resize_width - placement.bucket_width - placement.crop_x
        bottom = placement.resize_height - placement.bucket_height - placement.crop_y
        assert 0 <= right - placement.crop_x <= 1
        assert 0 <= bottom - placement.crop_y <= 1


def test_the_nearest_aspect_is_picked() -> None:
    sizes = bucket_sizes(1024, 16, 2.0)
    for width, height in _random_images():
        placement = place(width, height, sizes)
        taken = abs(math.log(placement.bucket_width / placement.bucket_height) - math.log(width / height))
        best = min(abs(math.log(w / h) - math.log(width / height)) for w, h in sizes)
        assert taken <= best + 1e-9


def test_an_image_of_a_buckets_size_is_left_as_it_is() -> None:
    sizes = bucket_sizes(1024, 16, 2.0)
    for width, height in sizes:
        placement = place(width, height, sizes)
        assert placement.bucket_width / placement.bucket_height == pytest.approx(width / height)
        assert (placement.crop_x, placement.crop_y) == (0, 0)
    assert place(1024, 1024, sizes).resize_width == 1024


def test_a_turned_image_gets_the_turned_bucket() -> None:
    sizes = bucket_sizes(1024, 16, 2.0)
    for width, height in _random_images():
        one, two = place(width, height, sizes), place(height, width, sizes)
        assert (one.bucket_width, one.bucket_height) == (two.bucket_height, two.bucket_width)


def test_upscaling_is_noticed() -> None:
    sizes = bucket_sizes(512, 16, 2.0)
    assert place(511, 511, sizes).upscales(511, 511)
    assert not place(512, 512, sizes).upscales(512, 512)
    assert not place(4000, 3000, sizes).upscales(4000, 3000)
    assert place(300, 2000, sizes).upscales(300, 2000)


def test_the_enlargement_is_that_of_the_side_that_decides() -> None:
    assert cover(500, 1000, (1000, 1000)).enlargement(500, 1000) == 2
    assert cover(2000, 4000, (1000, 1000)).enlargement(2000, 4000) == 0.5
    assert cover(1000, 1000, (1000, 1000)).enlargement(1000, 1000) == 1


def _inside(placement: Placement) -> bool:
    across, down = placement.slack
    return 0 <= placement.crop_x <= across and 0 <= placement.crop_y <= down


def test_a_crop_is_moved_no_further_than_the_image_reaches() -> None:
    placement = cover(300, 100, (100, 100))
    assert placement.slack == (200, 0)
    assert (placement.at(-5, -5).crop_x, placement.at(-5, -5).crop_y) == (0, 0)
    assert (placement.at(17, 3).crop_x, placement.at(17, 3).crop_y) == (17, 0)
    assert placement.at(999, 999).crop_x == 200


CONTENT = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"


def test_random_crops_are_fixed_by_the_content_for_ever() -> None:
    # Golden: a prepared dataset is resumed by later versions too, whose crops must be these.
    crops = random_crops(cover(3000, 1000, (1000, 1000)), CONTENT, range(4))
    assert [crop.crop_x for crop in crops] == [1155, 289, 596, 1519]
    assert {crop.crop_y for crop in crops} == {0}
    assert random_crops(cover(3000, 1000, (1000, 1000)), CONTENT, range(2)) == crops[:2]
    assert random_crops(cover(3000, 1000, (1000, 1000)), CONTENT[::-1], range(4)) != crops


def test_random_crops_lie_inside_and_reach_both_ends() -> None:
    placement = cover(1100, 1000, (1000, 1000))
    crops = random_crops(placement, CONTENT, range(3000))
    assert all(_inside(crop) for crop in crops)
    assert {crop.crop_x for crop in crops} == set(range(101))
    assert len(set(crops)) == len(crops) == 101, "equal crops are one"


def test_an_image_of_its_buckets_shape_has_one_crop() -> None:
    placement = cover(2000, 2000, (1000, 1000))
    assert random_crops(placement, CONTENT, range(64)) == (placement,)


def test_a_mask_of_the_images_size_goes_exactly_where_the_image_goes() -> None:
    sizes = bucket_sizes(512, 16, 2.0)
    for width, height in _random_images()[:100]:
        for crop in random_crops(place(width, height, sizes), CONTENT, range(5)):
            assert follow(crop, width, height) == crop


@pytest.mark.parametrize("size", [(750, 250), (6000, 2000), (301, 100)])
def test_a_mask_of_its_own_size_is_cropped_at_the_same_relative_place(size: tuple[int, int]) -> None:
    for crop in random_crops(cover(3000, 1000, (1000, 1000)), CONTENT, range(20)):
        own = follow(crop, *size)
        assert (own.bucket_width, own.bucket_height) == (1000, 1000)
        assert _inside(own)
        assert own.crop_x / own.slack[0] == pytest.approx(crop.crop_x / crop.slack[0], abs=1e-3)


def test_a_mask_of_another_shape_is_central_where_the_image_says_nothing() -> None:
    leader = cover(3000, 1000, (1000, 1000)).at(0, 0)
    own = follow(leader, 1000, 1500)
    assert own.slack == (0, 500)
    assert (own.crop_x, own.crop_y) == (0, 250)


# Properties that hold for any image and any sizes.

SIDES = st.integers(1, 20_000)
BUCKETS = st.tuples(st.integers(1, 200).map(lambda n: 16 * n), st.integers(1, 200).map(lambda n: 16 * n))
LISTS = st.lists(BUCKETS, min_size=1, max_size=12, unique=True)


def _bucket(placement: Placement) -> tuple[int, int]:
    return placement.bucket_width, placement.bucket_height


def _lost(width: int, height: int, size: tuple[int, int]) -> float:
    """The share of an image that the crop to a size leaves out, from the definition: the largest rectangle of its shape."""
    ratio = size[0] / size[1]
    return 1 - min(width, height * ratio) * min(height, width / ratio) / (width * height)


@given(SIDES, SIDES, LISTS)
def test_an_image_goes_to_the_size_that_loses_least(width: int, height: int, sizes: list[tuple[int, int]]) -> None:
    chosen = _bucket(place_exactly(width, height, sizes))
    assert chosen in sizes
    assert _lost(width, height, chosen) <= min(_lost(width, height, size) for size in sizes) + 1e-9


@given(SIDES, SIDES, LISTS)
def test_the_order_of_the_sizes_means_nothing(width: int, height: int, sizes: list[tuple[int, int]]) -> None:
    assert place_exactly(width, height, sizes) == place_exactly(width, height, sizes[::-1])


@given(SIDES, SIDES, BUCKETS, st.sets(st.integers(1, 8), min_size=1))
def test_of_sizes_of_one_shape_the_largest_that_the_image_fills_is_taken(
    width: int, height: int, size: tuple[int, int], factors: set[int]
) -> None:
    sizes = [(size[0] * factor, size[1] * factor) for factor in factors]
    filled = [each for each in sizes if each[0] <= width and each[1] <= height]
    assert _bucket(place_exactly(width, height, sizes)) == (max(filled) if filled else min(sizes))


@given(BUCKETS, LISTS)
def test_an_image_of_a_listed_size_is_left_as_it_is(size: tuple[int, int], others: list[tuple[int, int]]) -> None:
    placement = place_exactly(*size, [size, *others])
    assert _bucket(placement) == size
    assert (placement.resize_width, placement.resize_height, placement.slack) == (*size, (0, 0))


@given(SIDES, SIDES, LISTS)
def test_any_resize_covers_its_bucket_and_no_crop_leaves_the_image(
    width: int, height: int, sizes: list[tuple[int, int]]
) -> None:
    for placement in (place_exactly(width, height, sizes), place(width, height, sizes)):
        assert _inside(placement)
        assert 0 in placement.slack
        for crop in random_crops(placement, CONTENT, range(3)):
            assert _inside(crop)
            assert _bucket(crop) == _bucket(placement)


@given(SIDES, SIDES, st.integers(32, 2048), st.sampled_from([8, 16, 64]), st.floats(1, 4))
def test_an_edge_gives_a_bucket_of_its_own_with_the_nearest_aspect(
    width: int, height: int, edge: int, step: int, max_aspect: float
) -> None:
    sizes = bucket_sizes(max(edge, step), step, max_aspect)
    chosen = _bucket(place(width, height, sizes))
    assert chosen in sizes
    assert _lost(width, height, chosen) <= min(_lost(width, height, size) for size in sizes) + 1e-9


@given(SIDES, SIDES, st.sampled_from([8, 16, 64]))
def test_the_nearest_size_is_a_multiple_and_none_is_nearer(width: int, height: int, multiple: int) -> None:
    for side, near in zip((width, height), nearest_multiple((width, height), multiple), strict=True):
        assert near % multiple == 0
        assert near >= multiple
        assert abs(near - side) <= min(abs(other - side) for other in range(multiple, side + 2 * multiple, multiple))


def test_a_square_image_between_two_turned_sizes_becomes_upright() -> None:
    assert _bucket(place_exactly(700, 700, [(1664, 928), (928, 1664)])) == (928, 1664)


@pytest.mark.parametrize("size", [(1600, 1200), (1200, 1600), (500, 500), (3000, 400), (7, 5)])
@pytest.mark.parametrize("aspect", [Fraction(16, 9), Fraction(4, 3), Fraction(1), Fraction(3, 4)])
def test_the_largest_part_of_an_aspect_keeps_one_side_whole(size: tuple[int, int], aspect: Fraction) -> None:
    width, height = size
    # As trainers with random ratios cut it.
    expected = (height * aspect, height) if Fraction(width, height) > aspect else (width, width / aspect)
    part = largest_part(width, height, aspect)
    assert all(abs(mine - theirs) <= 0.5 for mine, theirs in zip(part, expected, strict=True))
    assert largest_part(width, height, None) == size


def test_crops_take_the_aspects_in_turn() -> None:
    aspects = ("original", "1:1", "4:3", "16:9")
    assert sorted(share_out(aspects, CONTENT, 4)) == sorted(aspects)
    seven = share_out(aspects, CONTENT, 7)
    assert sorted(map(len, seven.values())) == [1, 2, 2, 2]
    assert sorted(number for numbers in seven.values() for number in numbers) == list(range(7))
    firsts = [next(iter(share_out(aspects, f"{seed:064x}", 1))) for seed in range(2000)]
    assert all(400 < number < 600 for number in Counter(firsts).values()), "images are spread evenly over the aspects"
    # Golden: a prepared dataset is resumed by later versions too, whose crops must be these.
    assert firsts[:4] == ["1:1", "16:9", "4:3", "4:3"]
