"""From image files to samples: what is rejected and why, where samples go, and what their bytes are."""

import hashlib
import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageOps

from ftk.contracts import RejectReason
from ftk.errors import EnvironmentFault
from ftk.pipeline import images
from ftk.pipeline.buckets import place
from ftk.pipeline.images import ImageProblem, ImageRecipe, ImageTask, PreparedImage, Probe, prepare_image, probe_image
from ftk.pipeline.perceptual import perceptual_hash
from ftk.pipeline.sources.base import Blob

SIZES = ((64, 64), (48, 80), (80, 48))
RECIPE = ImageRecipe(
    sizes=(SIZES,),
    upscale="always",
    upscale_limit=1.5,
    min_size=1,
    crop="center",
    crops=1,
    flip=False,
    resize="gamma",
    image_format="png",
    quality=None,
    background=(255, 255, 255),
    animated="first",
    max_pixels=1_000_000,
    max_input_aspect=8.0,
)
SQUARE = replace(RECIPE, sizes=(((64, 64),),))

Encoded = Callable[..., bytes]
Noise = Callable[..., Image.Image]


def _blob(data: bytes, name: str = "image") -> Blob:
    return Blob(location=name, data=data)


def _task(data: bytes, recipe: ImageRecipe = RECIPE, mask: bytes | None = None, controls: tuple[bytes, ...] = ()) -> ImageTask:
    return ImageTask(
        image=_blob(data),
        mask=None if mask is None else _blob(mask, "a mask"),
        controls=tuple(_blob(control, f"control {index}") for index, control in enumerate(controls)),
        recipe=recipe,
    )


def _good(data: bytes, recipe: ImageRecipe = RECIPE, **more: Any) -> PreparedImage:
    """The prepared image, after a look at what headers alone had told."""
    task = _task(data, recipe, **more)
    result, probe = prepare_image(task), probe_image(task)
    assert isinstance(result, PreparedImage), result
    assert isinstance(probe, Probe), probe
    assert (probe.width, probe.height) == (result.width, result.height)
    assert len(probe.placements) == len(result.variants)
    if recipe.crop != "focus":
        assert list(probe.placements) == [variant.placement for variant in result.variants]
    return result


def _bad(data: bytes, recipe: ImageRecipe = RECIPE, **more: Any) -> ImageProblem:
    result = prepare_image(_task(data, recipe, **more))
    assert isinstance(result, ImageProblem)
    assert result.detail
    return result


def _bad_by_header(data: bytes, recipe: ImageRecipe = RECIPE, **more: Any) -> ImageProblem:
    assert probe_image(_task(data, recipe, **more)) == _bad(data, recipe, **more)
    return _bad(data, recipe, **more)


def _array(data: bytes | None, mode: str = "RGB") -> np.ndarray:
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
        return np.asarray(image).astype(int)


def _pixels(prepared: PreparedImage, variant: int = 0) -> np.ndarray:
    return _array(prepared.variants[variant].data)


def _bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# --- Rejects ---


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_a_cut_file_is_truncated(noise_image: Noise, encoded: Encoded, image_format: str) -> None:
    data = encoded(noise_image(96, 64), image_format)
    assert _bad(data[: len(data) // 2]).reason == RejectReason.TRUNCATED


@pytest.mark.parametrize(
    ("data", "detail"),
    [(b"", "the file is empty"), (b"This is text, renamed.", "no image header that can be read (starts with b'This is ')")],
    ids=["zero-byte", "text"],
)
def test_what_is_no_image_is_unreadable(data: bytes, detail: str) -> None:
    problem = _bad_by_header(data)
    assert problem.reason == RejectReason.UNREADABLE
    assert problem.detail == detail


def test_a_missing_or_unreadable_file_says_so(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path / "gone.png", RejectReason.FILE_MISSING),
        (tmp_path, RejectReason.NOT_A_FILE),
    ]:
        task = ImageTask(image=Blob(location=str(path)), mask=None, controls=(), recipe=RECIPE)
        problem = prepare_image(task)
        assert isinstance(problem, ImageProblem)
        assert problem.reason == reason
        assert problem.contents == ("",)
        assert probe_image(task) == problem


def test_a_fault_of_the_network_is_nobodys_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Blob) -> bytes:
        raise EnvironmentFault("no route to host")

    monkeypatch.setattr(Blob, "read", read)
    for function in (prepare_image, probe_image):
        with pytest.raises(EnvironmentFault):
            function(_task(b""))


@pytest.mark.parametrize("size", [(50_000, 50_000), (1, 65_000)])
def test_a_bomb_is_rejected_on_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("the bomb was decoded"))
    tracemalloc.start()
    try:
        problem = _bad_by_header(_bomb(*size), replace(RECIPE, max_pixels=200_000_000))
        # numpy's arrays count, also those of zeros that were never touched.
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert problem.reason in (RejectReason.TOO_MANY_PIXELS, RejectReason.TOO_EXTREME_ASPECT)
    assert f"{size[0]} x {size[1]}" in problem.detail
    for more in ({"mask": _bomb(*size)}, {"controls": (_bomb(*size),)}):
        assert f"{size[0]} x {size[1]}" in _bad_by_header(_bomb(64, 64), replace(RECIPE, max_pixels=200_000_000), **more).detail


def test_max_pixels_is_inclusive(noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(64, 64), "PNG")
    _good(data, replace(RECIPE, max_pixels=64 * 64))
    assert _bad_by_header(data, replace(RECIPE, max_pixels=64 * 64 - 1)).reason == RejectReason.TOO_MANY_PIXELS


@pytest.mark.parametrize("size", [(161, 20), (20, 161)])
def test_a_sliver_is_rejected(noise_image: Noise, encoded: Encoded, size: tuple[int, int]) -> None:
    assert _bad_by_header(encoded(noise_image(*size), "PNG")).reason == RejectReason.TOO_EXTREME_ASPECT
    _good(encoded(noise_image(160, 20), "PNG"))


def test_a_short_side_is_too_small(noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(100, 50), "PNG")
    _good(data, replace(RECIPE, min_size=50))
    problem = _bad_by_header(data, replace(RECIPE, min_size=51))
    assert problem.reason == RejectReason.TOO_SMALL
    assert "50 px" in problem.detail
    assert "51" in problem.detail


def test_what_becomes_of_animations_is_the_recipes_choice(encoded: Encoded) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("#ff0000", "#00ff00")]
    reject = replace(RECIPE, animated="reject")
    for image_format in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
        assert (_pixels(_good(data)) == [255, 0, 0]).all()
        assert _bad_by_header(data, reject).reason == RejectReason.ANIMATED
    _good(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), reject)


def test_contents_are_the_hashes_of_all_files(noise_image: Noise, encoded: Encoded, tmp_path: Path) -> None:
    files = [encoded(noise_image(64, 64, seed=seed), "PNG") for seed in range(4)]
    hashes = tuple(hashlib.sha256(data).hexdigest() for data in files)
    assert _good(files[0], mask=files[1], controls=tuple(files[2:])).contents == hashes
    assert _bad(files[0], replace(RECIPE, min_size=99), mask=files[1]).contents == hashes[:2]
    gone = Blob(location=str(tmp_path / "gone.png"))
    task = ImageTask(image=_blob(files[0]), mask=gone, controls=(_blob(files[2]),), recipe=RECIPE)
    problem = prepare_image(task)
    assert isinstance(problem, ImageProblem)
    assert problem.contents == (hashes[0], "", hashes[2])


# --- Placements ---


def test_an_image_of_the_buckets_size_is_unchanged(noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(80, 48)
    assert np.array_equal(_pixels(_good(encoded(image, "BMP"))), np.asarray(image))


def test_the_crop_keeps_the_middle(encoded: Encoded) -> None:
    image = Image.new("RGB", (160, 64), "#ff0000")
    image.paste((0, 255, 0), (60, 0, 100, 64))
    pixels = _pixels(_good(encoded(image, "PNG"), SQUARE))
    assert (pixels[32, 14:50] == [0, 255, 0]).all()
    assert (pixels[32, :8] == [255, 0, 0]).all()
    assert (pixels[32, -8:] == [255, 0, 0]).all()


def test_one_variant_a_resolution(noise_image: Noise, encoded: Encoded) -> None:
    prepared = _good(encoded(noise_image(96, 64), "PNG"), replace(RECIPE, sizes=(SIZES, ((32, 32),))))
    assert [_pixels(prepared, index).shape for index in (0, 1)] == [(48, 80, 3), (32, 32, 3)]
    assert prepared.variants[0].placement == place(96, 64, list(SIZES))
    assert len({variant.image_id for variant in prepared.variants}) == 2


def test_resolutions_that_share_a_bucket_give_one_sample(noise_image: Noise, encoded: Encoded) -> None:
    recipe = replace(RECIPE, sizes=(SIZES, ((80, 48), (32, 64))))
    assert len(_good(encoded(noise_image(96, 64), "PNG"), recipe).variants) == 1


def test_a_size_does_not_depend_on_the_other_sizes(noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(400, 300), "JPEG")
    both = _good(data, replace(RECIPE, sizes=(((512, 384),), ((64, 48),)))).variants
    alone = _good(data, replace(RECIPE, sizes=(((64, 48),),))).variants
    assert both[1] == alone[0]


@pytest.mark.parametrize(
    ("upscale", "reached"), [("always", [32, 64, 128]), ("limit", [32, 64]), ("never", [32])], ids=["always", "limit", "never"]
)
def test_images_are_enlarged_as_far_as_the_recipe_says(
    noise_image: Noise, encoded: Encoded, upscale: str, reached: list[int]
) -> None:
    recipe = replace(RECIPE, sizes=(((32, 32),), ((64, 64),), ((128, 128),)), upscale=upscale)
    prepared = _good(encoded(noise_image(50, 50), "PNG"), recipe)
    assert [variant.placement.bucket_width for variant in prepared.variants] == reached


def test_the_upscale_limit_is_inclusive(noise_image: Noise, encoded: Encoded) -> None:
    recipe = replace(RECIPE, sizes=(((96, 96),),), upscale="limit")
    _good(encoded(noise_image(64, 64), "PNG"), recipe)
    problem = _bad_by_header(encoded(noise_image(63, 64), "PNG"), recipe)
    assert problem.reason == RejectReason.TOO_SMALL
    assert "63 x 64 would be enlarged 1.52 times to reach 96 x 96, against data.upscale_limit 1.5" in problem.detail
    problem = _bad_by_header(encoded(noise_image(63, 64), "PNG"), replace(recipe, upscale="never"))
    assert "data.upscale: never" in problem.detail


def test_random_crops_are_parts_of_the_image_fixed_by_its_content(noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(150, 64)
    recipe = replace(SQUARE, crop="random", crops=6)
    prepared = _good(encoded(image, "PNG"), recipe)
    lefts = [variant.placement.crop_x for variant in prepared.variants]
    assert len(set(lefts)) == len(lefts) > 3
    for index, left in enumerate(lefts):
        assert np.array_equal(_pixels(prepared, index), np.asarray(image)[:, left : left + 64])
    other = _good(encoded(noise_image(150, 64, seed=1), "PNG"), recipe)
    assert [variant.placement.crop_x for variant in other.variants] != lefts
    assert len(_good(encoded(noise_image(128, 128), "PNG"), recipe).variants) == 1, "equal crops are one"


ASPECTS = ("original", "1:1", "4:3", "16:9")


def test_crops_are_cut_to_the_aspects_in_turn(noise_image: Noise, encoded: Encoded) -> None:
    sizes = ((64, 64), (80, 60), (96, 54), (48, 80))
    image = noise_image(120, 200)
    data = encoded(image, "PNG")
    recipe = replace(RECIPE, sizes=(sizes,), aspects=ASPECTS)
    every = _good(data, replace(recipe, crops=4))
    buckets = [(variant.placement.bucket_width, variant.placement.bucket_height) for variant in every.variants]
    assert sorted(buckets) == sorted(sizes), "one of each, the image's own among them"
    for variant in every.variants:
        # Of every shape the largest part: one side of the image is whole.
        assert 0 in variant.placement.slack
        assert variant.placement.crop_x == variant.placement.slack[0] // 2
    # One crop is the first of them, and the same image has the same one whenever it is prepared.
    single = _good(data, recipe).variants
    assert [variant.image_id for variant in single] == [every.variants[0].image_id]
    assert len(_good(data, replace(recipe, crops=9)).variants) == 4, "equal crops are one"
    anywhere = _good(data, replace(recipe, crops=9, crop="random")).variants
    assert len({variant.image_id for variant in anywhere}) == len(anywhere) > 6
    firsts = {
        _good(encoded(noise_image(120, 200, seed=seed), "PNG"), recipe).variants[0].placement.bucket_width for seed in range(12)
    }
    assert firsts == {48, 64, 80, 96}, "other images begin with others"


def test_masks_follow_crops_of_every_aspect(encoded: Encoded) -> None:
    image = Image.linear_gradient("L").resize((200, 120))
    recipe = replace(RECIPE, sizes=(((64, 64), (80, 60), (96, 54), (80, 48)),), aspects=ASPECTS, crops=4, crop="random")
    prepared = _good(encoded(image.convert("RGB"), "PNG"), recipe, mask=encoded(image, "PNG"))
    assert len(prepared.variants) == 4
    for variant in prepared.variants:
        assert np.abs(_array(variant.mask, "L") - _array(variant.data)[..., 0]).max() <= 2


def test_without_aspects_crops_and_names_are_what_they_were(noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(150, 64), "PNG")
    for recipe in (RECIPE, replace(SQUARE, crop="random", crops=3)):
        assert _good(data, recipe) == _good(data, replace(recipe, aspects=("original",)))


@pytest.mark.parametrize("left", [10, 180])
def test_a_focus_crop_holds_what_stands_out(encoded: Encoded, left: int) -> None:
    image = Image.new("RGB", (256, 64), (128, 128, 128))
    ImageDraw.Draw(image).ellipse((left, 20, left + 24, 44), fill=(255, 150, 20))
    pixels = _pixels(_good(encoded(image, "PNG"), replace(SQUARE, crop="focus")))
    assert ((pixels == [255, 150, 20]).all(2)).sum() > 400


def test_a_flip_is_a_mirrored_sample_beside_each(noise_image: Noise, encoded: Encoded) -> None:
    parts = [encoded(noise_image(150, 64, seed=seed), "PNG") for seed in range(3)]
    recipe = replace(SQUARE, flip=True, crop="random", crops=2)
    prepared = _good(parts[0], recipe, mask=parts[1], controls=(parts[2],))
    assert [variant.flipped for variant in prepared.variants] == [False, True, False, True]
    for plain, mirrored in (prepared.variants[:2], prepared.variants[2:]):
        assert plain.placement == mirrored.placement
        assert np.array_equal(_array(plain.data)[:, ::-1], _array(mirrored.data))
        assert np.array_equal(_array(plain.mask, "L")[:, ::-1], _array(mirrored.mask, "L"))
        assert np.array_equal(_array(plain.controls[0])[:, ::-1], _array(mirrored.controls[0]))
        assert plain.image_id != mirrored.image_id
        assert plain.mask_id != mirrored.mask_id
        assert plain.control_ids != mirrored.control_ids


# --- Masks and controls ---


@pytest.mark.parametrize("crop", ["center", "random", "focus"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_mask_and_control_of_the_images_size_get_its_geometry(encoded: Encoded, crop: str, orientation: int) -> None:
    image = Image.linear_gradient("L").resize((300, 100)).convert("RGB")
    ImageDraw.Draw(image).ellipse((20, 20, 60, 60), fill=(250, 120, 10))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(image, "PNG", exif=exif)
    variant = _good(data, replace(SQUARE, crop=crop), mask=data, controls=(data, data)).variants[0]
    pixels = _array(variant.data)
    assert np.array_equal(_array(variant.controls[0]), pixels)
    assert np.array_equal(_array(variant.controls[1]), pixels)
    luma = np.asarray(Image.fromarray(pixels.astype(np.uint8)).convert("L")).astype(int)
    # Resizing and taking the luma may be exchanged, but for rounding and clipping at the edges of the disc.
    assert np.abs(_array(variant.mask, "L") - luma).max() <= 6


def test_a_mask_of_another_size_covers_the_same_part(encoded: Encoded) -> None:
    def halves(width: int, height: int, mode: str) -> Image.Image:
        image = Image.new(mode, (width, height), 0)
        image.paste("white", (width * 2 // 5, 0, width, height))
        return image

    variant = _good(
        encoded(halves(400, 100, "RGB"), "PNG"),
        replace(SQUARE, crop="random", crops=1),
        mask=encoded(halves(100, 25, "L"), "PNG"),
        controls=(encoded(halves(1200, 300, "RGB"), "PNG"),),
    ).variants[0]
    image, mask, control = _array(variant.data)[:, :, 0], _array(variant.mask, "L"), _array(variant.controls[0])[:, :, 0]
    assert np.abs((image > 127).sum(1) - (mask > 127).sum(1)).max() <= 2
    assert np.abs((image > 127).sum(1) - (control > 127).sum(1)).max() <= 1


@pytest.mark.parametrize("role", ["mask", "control"])
@pytest.mark.parametrize(
    ("image_size", "size"),
    [((256, 256), (512, 128)), ((256, 128), (128, 256)), ((256, 128), (250, 128)), ((300, 200), (300, 206))],
)
def test_a_mask_or_control_of_another_shape_is_rejected(
    noise_image: Noise, encoded: Encoded, role: str, image_size: tuple[int, int], size: tuple[int, int]
) -> None:
    part = encoded(noise_image(*size), "PNG")
    more: dict[str, Any] = {"mask": part} if role == "mask" else {"controls": (part,)}
    problem = _bad_by_header(encoded(noise_image(*image_size), "PNG"), **more)
    assert problem.reason == (RejectReason.MASK_MISMATCHED if role == "mask" else RejectReason.CONTROL_MISMATCHED)
    assert f"{size[0]} x {size[1]}" in problem.detail
    assert f"{image_size[0]} x {image_size[1]}" in problem.detail


@pytest.mark.parametrize(
    "size",
    [(1000, 667), (999, 667), (1000, 664), (500, 334), (500, 333), (2000, 1333), (30, 20), (31, 20), (63, 42), (4000, 2668)],
)
def test_a_mask_that_was_scaled_and_rounded_fits(noise_image: Noise, encoded: Encoded, size: tuple[int, int]) -> None:
    recipe = replace(RECIPE, max_pixels=20_000_000)
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    variant = _good(encoded(noise_image(1000, 667), "PNG"), recipe, mask=encoded(mask, "PNG")).variants[0]
    width = variant.placement.bucket_width
    assert np.abs((_array(variant.mask, "L") > 127).sum(1) - width / 2).max() <= 1


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_mask_drawn_on_the_stored_pixels_is_turned_like_them(
    noise_image: Noise, encoded: Encoded, image_format: str, orientation: int, scale: float
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = encoded(noise_image(256, 128), image_format, exif=exif)
    stored = Image.new("L", (round(256 * scale), round(128 * scale)))
    stored.paste(255, (0, 0, stored.width // 4, stored.height // 2))
    tagged = encoded(stored, "PNG", exif=exif)
    with Image.open(io.BytesIO(tagged)) as mask:
        upright = ImageOps.exif_transpose(mask)
    assert upright.size == (stored.height, stored.width)
    recipe = replace(RECIPE, sizes=(((64, 128),),))
    masks = (encoded(stored, "PNG"), encoded(upright, "PNG"), tagged)
    variants = [_good(image, recipe, mask=mask).variants[0] for mask in masks]
    expected = np.asarray(upright.resize((64, 128), Image.Resampling.LANCZOS)).astype(int)
    for variant in variants:
        assert np.abs(_array(variant.mask, "L") - expected).max() <= 6
    control = _good(image, recipe, controls=(encoded(stored.convert("RGB"), "PNG"),)).variants[0].controls[0]
    assert np.abs(_array(control)[..., 0] - expected).max() <= 6
    # The same mask beside an image that needs no turn has other pixels, and so another name.
    plain = _good(encoded(noise_image(256, 128), "PNG"), replace(RECIPE, sizes=(((64, 128),),)), mask=encoded(stored, "PNG"))
    assert plain.variants[0].mask_id != variants[0].mask_id


@pytest.mark.parametrize(
    ("size", "is_turned"), [((101, 100), True), ((100, 101), False), ((100, 100), False), ((202, 200), True)]
)
def test_beside_an_almost_square_image_the_exact_numbers_decide(
    noise_image: Noise, encoded: Encoded, size: tuple[int, int], is_turned: bool
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0], size[1] // 2))
    upper = _array(
        _good(encoded(noise_image(101, 100), "JPEG", exif=exif), SQUARE, mask=encoded(mask, "PNG")).variants[0].mask, "L"
    )
    # Turned by 90 degrees, the upper half of the stored pixels is the right one.
    assert (upper[5, 5] < 10) == is_turned
    assert (upper[5, 58], upper[58, 5]) == (255, 0)


def test_a_mask_with_an_orientation_of_its_own_follows_that_alone(noise_image: Noise, encoded: Encoded) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned, sideways = (encoded(noise_image(128, 64), "PNG", exif=tag) for tag in (exif, None))
    assert _bad_by_header(sideways, mask=turned).reason == RejectReason.MASK_MISMATCHED
    # Its tag says that it is upright as (128, 64): not what its image is.
    assert _bad_by_header(turned, mask=encoded(noise_image(64, 128), "PNG", exif=exif)).reason == RejectReason.MASK_MISMATCHED


def test_a_mask_that_is_black_where_the_image_is_used_is_known(noise_image: Noise, encoded: Encoded) -> None:
    def is_empty(mask: Image.Image, size: tuple[int, int] = (64, 64)) -> bool:
        return _good(encoded(noise_image(*size), "PNG"), SQUARE, mask=encoded(mask, "PNG")).variants[0].has_empty_mask

    # The centre of 192 is used: a white shape beside it does not count, nor what the filter lets in of it.
    beside = Image.new("L", (384, 128))
    beside.paste(255, (0, 0, 126, 128))
    assert is_empty(beside, (192, 64))
    beside.putpixel((200, 60), 255)
    assert not is_empty(beside, (192, 64))
    assert is_empty(Image.new("L", (64, 64)))
    assert is_empty(Image.new("RGBA", (64, 64)))
    assert is_empty(Image.new("L", (64, 64), 1)), "labels of 0 and 1 are black"
    assert not is_empty(Image.new("L", (64, 64), 255))
    assert not _good(encoded(noise_image(64, 64), "PNG")).variants[0].has_empty_mask


def test_a_mask_in_the_alpha_channel_has_a_name_of_its_own(noise_image: Noise, encoded: Encoded) -> None:
    shape = Image.new("L", (128, 128))
    shape.paste(255, (0, 0, 64, 128))
    mask = Image.new("RGBA", shape.size, "black")
    mask.putalpha(shape)
    image = encoded(noise_image(64, 64), "PNG")
    variant = _good(image, SQUARE, mask=encoded(mask, "PNG"), controls=(encoded(mask, "PNG"),)).variants[0]
    assert np.array_equal(
        _array(variant.mask, "L"), _array(_good(image, SQUARE, mask=encoded(shape, "PNG")).variants[0].mask, "L")
    )
    assert (_array(variant.controls[0])[:, 40:] == 255).all(), "a control image is a picture: transparency shows the background"


def test_a_mask_is_antialiased(encoded: Encoded) -> None:
    checkers = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    for image_format in ("PNG", "TIFF"):
        data = encoded(checkers.convert("1"), image_format)
        assert np.abs(_array(_good(data, SQUARE, mask=data).variants[0].mask, "L") - 127).max() <= 4


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (None, (RejectReason.MASK_MISSING, RejectReason.CONTROL_MISSING)),
        (b"text", (RejectReason.MASK_UNREADABLE, RejectReason.CONTROL_UNREADABLE)),
        (b"cut", (RejectReason.MASK_UNREADABLE, RejectReason.CONTROL_UNREADABLE)),
    ],
    ids=["missing", "no image", "truncated"],
)
def test_what_is_wrong_with_a_mask_or_control_names_it(
    noise_image: Noise, encoded: Encoded, tmp_path: Path, data: bytes | None, reasons: tuple[RejectReason, RejectReason]
) -> None:
    whole = encoded(noise_image(64, 64), "PNG")
    data = whole[: len(whole) // 2] if data == b"cut" else data
    blob = Blob(location=str(tmp_path / "part.png"), data=data)
    for mask, controls, reason in [(blob, (), reasons[0]), (None, (_blob(whole), blob), reasons[1])]:
        problem = prepare_image(ImageTask(image=_blob(whole), mask=mask, controls=controls, recipe=RECIPE))
        assert isinstance(problem, ImageProblem)
        assert problem.reason == reason
        assert problem.detail.startswith("mask part.png: " if mask else "control part.png: ")
        assert str(tmp_path) not in problem.detail


# --- Encodings and copies ---


@pytest.mark.parametrize(
    ("source", "options", "suffix"),
    [
        ("JPEG", {}, "jpg"),
        ("MPO", {}, "jpg"),
        ("AVIF", {}, "jpg"),
        ("WEBP", {}, "jpg"),
        ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, "jpg"),
        ("WEBP", {"lossless": True}, "png"),
        ("PNG", {}, "png"),
        ("TIFF", {}, "png"),
        ("GIF", {}, "png"),
    ],
)
def test_auto_keeps_what_was_lossy_lossy(
    noise_image: Noise, encoded: Encoded, source: str, options: dict[str, Any], suffix: str
) -> None:
    variant = _good(encoded(noise_image(100, 90), source, **options), replace(RECIPE, image_format="auto")).variants[0]
    assert variant.suffix == suffix
    with Image.open(io.BytesIO(variant.data)) as image:
        assert image.format == {"jpg": "JPEG", "png": "PNG"}[suffix]


def test_the_first_frame_tells_whether_an_animated_webp_was_lossy(noise_image: Noise, encoded: Encoded) -> None:
    frames = [noise_image(64, 64, seed=seed) for seed in (0, 1)]
    for lossless, suffix in ((True, "png"), (False, "jpg")):
        data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=lossless)
        assert _good(data, replace(RECIPE, image_format="auto")).variants[0].suffix == suffix


@pytest.mark.parametrize(
    ("image_format", "quality", "magic"),
    [
        ("png", None, b"\x89PNG"),
        ("jpeg", None, b"\xff\xd8"),
        ("jpeg", 60, b"\xff\xd8"),
        ("webp", None, b"RIFF"),
        ("webp", 60, b"RIFF"),
    ],
)
def test_equal_inputs_give_equal_bytes_in_every_format(
    noise_image: Noise, encoded: Encoded, image_format: str, quality: int | None, magic: bytes
) -> None:
    data = encoded(noise_image(96, 64), "PNG")
    recipe = replace(RECIPE, image_format=image_format, quality=quality)
    one, two = _good(data, recipe), _good(data, recipe)
    assert one == two
    assert one.variants[0].data.startswith(magic)
    exact = _pixels(_good(data))
    worst = np.abs(_pixels(one) - exact).mean()
    assert worst == 0 if image_format == "png" or (image_format == "webp" and quality is None) else 0 < worst < 40


def test_quality_and_full_colour_of_jpeg(noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(96, 64), "PNG")
    sizes = {}
    for quality in (30, 95, None):
        variant = _good(data, replace(RECIPE, image_format="jpeg", quality=quality)).variants[0]
        sizes[quality] = len(variant.data)
        with Image.open(io.BytesIO(variant.data)) as image:
            assert {layer[1:3] for layer in image.layer} == {(1, 1)}, "colours at half resolution"
    assert sizes[30] < sizes[95] == sizes[None]


def test_nothing_of_the_originals_metadata_is_kept(noise_image: Noise, encoded: Encoded) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    for image_format in ("png", "jpeg", "webp"):
        recipe = replace(RECIPE, image_format=image_format)
        data = encoded(noise_image(64, 64), image_format, exif=exif, comment=b"somebody")
        variant = _good(data, recipe).variants[0]
        assert not variant.copied
        assert b"somebody" not in variant.data
        with Image.open(io.BytesIO(variant.data)) as image:
            assert not dict(image.getexif())


@pytest.mark.parametrize(
    ("source", "options", "formats"),
    [
        ("JPEG", {}, {"auto": "jpg", "jpeg": "jpg"}),
        ("JPEG", {"progressive": True, "quality": 60}, {"auto": "jpg", "jpeg": "jpg"}),
        ("PNG", {}, {"auto": "png", "png": "png"}),
        ("WEBP", {}, {"auto": "webp", "webp": "webp"}),
        ("WEBP", {"lossless": True}, {"auto": "webp", "webp": "webp"}),
        ("BMP", {}, {}),
        ("TIFF", {}, {}),
    ],
)
def test_an_image_that_needs_no_change_is_copied(
    noise_image: Noise, encoded: Encoded, source: str, options: dict[str, Any], formats: dict[str, str]
) -> None:
    data = encoded(noise_image(80, 48), source, **options)
    for image_format in ("auto", "png", "jpeg", "webp"):
        recipe = replace(RECIPE, image_format=image_format, flip=True)
        plain, mirrored = _good(data, recipe).variants
        assert plain.copied == (image_format in formats)
        if plain.copied:
            assert plain.data == data
            assert plain.suffix == formats[image_format]
        assert not mirrored.copied
    larger = _good(encoded(noise_image(160, 96), source, **options), replace(RECIPE, image_format="auto"))
    assert not larger.variants[0].copied


def test_what_is_more_than_8_bit_rgb_pixels_is_not_copied(noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(80, 48)
    transparent = image.convert("RGBA")
    transparent.putalpha(100)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    frames = {"save_all": True, "append_images": [noise_image(80, 48, seed=1)]}
    plain = encoded(image, "JPEG")
    deep = struct.pack(">IIBBBBB", 80, 48, 16, 2, 0, 0, 0)
    sixteen = encoded(image, "PNG")[:16] + deep + struct.pack(">I", zlib.crc32(b"IHDR" + deep))
    rows = zlib.compress((b"\0" + b"\x12\x34" * 240) * 48)
    sixteen += struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(">I", zlib.crc32(b"IDAT" + rows))
    sixteen += encoded(image, "PNG")[-12:]
    for data in [
        encoded(image.convert("L"), "JPEG"),
        encoded(image.convert("L"), "PNG"),
        encoded(image.convert("P"), "PNG"),
        encoded(image.convert("RGBA"), "PNG"),
        encoded(transparent, "PNG"),
        encoded(transparent, "WEBP"),
        encoded(image, "PNG", transparency=(1, 2, 3)),
        encoded(image, "PNG", icc_profile=b"x" * 200),
        encoded(image, "JPEG", icc_profile=b"x" * 200),
        *(encoded(image, image_format, exif=exif) for image_format in ("JPEG", "PNG", "WEBP")),
        encoded(image, "JPEG", comment=b"taken at home"),
        encoded(image, "JPEG", xmp=b"<x:xmpmeta/>"),
        encoded(image, "WEBP", xmp=b"<x:xmpmeta/>"),
        *(encoded(image, image_format, **frames) for image_format in ("PNG", "WEBP", "MPO")),
        plain + b"a film that a telephone put here",
        encoded(image, "PNG") + b"more",
        sixteen,
    ]:
        variant = _good(data, replace(RECIPE, image_format="auto")).variants[0]
        assert not variant.copied
        assert _array(variant.data).shape == (48, 80, 3)


def test_a_damaged_file_is_not_copied(noise_image: Noise, encoded: Encoded) -> None:
    jpeg, png = (encoded(noise_image(80, 48), image_format) for image_format in ("JPEG", "PNG"))
    for damaged in (jpeg[: len(jpeg) // 2], png[: len(png) // 2] + png[-12:], png[:400] + b"!" + png[401:]):
        assert isinstance(prepare_image(_task(damaged, replace(RECIPE, image_format="auto"))), ImageProblem)


# --- Names and hashes ---


def test_the_image_id_names_content_and_everything_done_to_it(noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(96, 64), "TIFF")
    recipes = [
        RECIPE,
        replace(RECIPE, image_format="jpeg"),
        replace(RECIPE, image_format="jpeg", quality=94),
        replace(RECIPE, image_format="webp"),
        replace(RECIPE, background=(0, 0, 0)),
        replace(RECIPE, resize="linear"),
        replace(RECIPE, sizes=(((32, 32),),)),
        replace(RECIPE, crop="random", sizes=(((32, 32),),)),
    ]
    variants = [_good(data, recipe, mask=data, controls=(data,)).variants[0] for recipe in recipes]
    ids = [variant.image_id for variant in variants]
    ids.append(_good(encoded(noise_image(96, 64, seed=1), "PNG")).variants[0].image_id)
    ids += [variants[0].mask_id, variants[0].control_ids[0]]
    assert len(set(ids)) == len(ids)
    # What changes no pixel changes no name.
    same = _good(data, replace(RECIPE, max_pixels=999_999, upscale="limit", animated="reject"), mask=data).variants[0]
    assert (same.image_id, same.mask_id) == (ids[0], variants[0].mask_id)
    assert _good(data, replace(RECIPE, image_format="auto")).variants[0].image_id == ids[0]
    assert variants[1].mask_id == variants[0].mask_id
    assert _good(data).variants[0].mask_id == ""


def test_the_version_is_part_of_every_name(noise_image: Noise, encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise_image(96, 64), "PNG")
    before = _good(data, mask=data, controls=(data,)).variants[0]
    monkeypatch.setattr(images, "IMAGES_VERSION", images.IMAGES_VERSION + 1)
    after = _good(data, mask=data, controls=(data,)).variants[0]
    assert before.image_id != after.image_id
    assert before.mask_id != after.mask_id
    assert before.control_ids != after.control_ids


def _distance(one: str, two: str) -> int:
    return (int(one, 16) ^ int(two, 16)).bit_count()


def _scene(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)


def test_the_perceptual_hash_is_the_standard_one() -> None:
    scene = _scene(0).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    values = np.asarray(scene).astype(float)
    rows = [[0.0] * 8 for _ in range(8)]
    positions = (np.arange(32) + 0.5) * np.pi / 32
    for down in range(8):
        for across in range(8):
            rows[down][across] = 4 * float(np.cos(positions * down) @ values @ np.cos(positions * across))
    bits = (np.array(rows) > np.median(rows)).flatten()
    assert perceptual_hash(scene) == f"{int(''.join('01'[int(bit)] for bit in bits), 2):016x}"


def test_images_that_look_alike_have_near_hashes(encoded: Encoded) -> None:
    recipe = replace(SQUARE, sizes=(((128, 128),),))
    scene = _scene(1)
    original = _good(encoded(scene, "PNG"), recipe).perceptual_hash
    assert len(original) == 16
    alike = [
        encoded(scene, "JPEG", quality=40),
        encoded(scene.resize((90, 90)), "PNG"),
        encoded(scene.point(lambda value: int(value * 0.9 + 10)), "PNG"),
        encoded(scene.convert("L"), "PNG"),
    ]
    assert max(_distance(original, _good(data, recipe).perceptual_hash) for data in alike) <= 6
    others = [_good(encoded(_scene(seed), "PNG"), recipe).perceptual_hash for seed in range(2, 8)]
    assert min(_distance(original, other) for other in others) >= 12


def test_the_hash_is_of_the_whole_upright_picture(encoded: Encoded) -> None:
    scene = _scene(3).resize((256, 128))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = encoded(scene.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    hashes = {
        _good(data, replace(SQUARE, crop=crop, flip=flip)).perceptual_hash
        for data, crop, flip in [
            (encoded(scene, "PNG"), "center", False),
            (encoded(scene, "PNG"), "random", True),
            (turned, "center", False),
        ]
    }
    assert max(_distance(one, two) for one in hashes for two in hashes) <= 2


def test_a_flat_picture_has_a_definite_hash() -> None:
    hashes = {perceptual_hash(Image.new("RGB", size, (80, 80, 80))) for size in ((64, 64), (100, 37), (32, 32))}
    assert hashes == {"8000000000000000"}


def test_a_file_is_read_from_its_location(noise_image: Noise, encoded: Encoded, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encoded(noise_image(96, 64), "PNG"))
    task = ImageTask(image=Blob(location=os.fspath(path)), mask=None, controls=(), recipe=RECIPE)
    assert prepare_image(task) == _good(path.read_bytes())
