"""Resizing: exact sizes, close to a full decode with Pillow's Lanczos, no aliasing, the same in every process."""

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ftk.pipeline import resize
from ftk.pipeline.decode import as_image

Encoded = Callable[..., bytes]


def _photograph(width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls with frequency as in photographs, somewhat faster than 1 over f; its colours agree."""
    draw = np.random.default_rng(0)
    shape = (height, width // 2 + 1)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    luma = draw.standard_normal(shape) + 1j * draw.standard_normal(shape)
    channels = []
    for _ in range(3):
        own = draw.standard_normal(shape) + 1j * draw.standard_normal(shape)
        channel = np.fft.irfft2((luma + 0.3 * own) / frequency**1.4, s=(height, width))
        channels.append(120 + 45 * channel / channel.std())
    return Image.fromarray(np.stack(channels, axis=2).clip(0, 255).astype(np.uint8))


def _zone_plate(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """Circles whose frequency grows to Nyquist's at the shorter side's edge; and that frequency, in cycles a pixel."""
    y, x = np.mgrid[:height, :width].astype(float)
    radius = np.hypot(x - width / 2, y - height / 2)
    shorter = min(width, height)
    wave = 127.5 + 127.5 * np.cos(np.pi * radius**2 / shorter)
    return Image.fromarray(wave.round().astype(np.uint8)).convert("RGB"), radius / shorter


def _residue(small: np.ndarray, frequency: np.ndarray) -> float:
    """Grey levels (RMS) left where the zone plate's circles are too fine for the small picture: all of it is aliasing."""
    height, width = small.shape[:2]
    local = np.asarray(Image.fromarray(frequency.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    too_fine = (local > 1.25 * 0.5 * width / frequency.shape[1]) & (local < 0.5)
    return float(np.sqrt(np.mean((small[too_fine].astype(float) - 127.5) ** 2)))


def _psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - two) ** 2)))


def _at(data: bytes, stored: tuple[int, int], size: tuple[int, int], *, linear: bool = False) -> np.ndarray:
    shrink = 1 if linear else resize.shrink_on_load(min(stored[0] / size[0], stored[1] / size[1]), has_full_colour=False)
    small = resize.jpeg_at(data, stored, size, shrink=shrink, linear=linear)
    assert small is not None
    return small


@pytest.fixture(scope="module")
def photograph() -> tuple[bytes, Image.Image]:
    """A JPEG as cameras write it, and its full decode."""
    buffer = io.BytesIO()
    _photograph(1600, 1200).save(buffer, "JPEG", quality=93)
    return buffer.getvalue(), Image.open(buffer).convert("RGB")


# 12 megapixels to 1 is a factor of 3.4.
@pytest.mark.parametrize("factor", [1.3, 2, 3.2, 3.4, 4, 6.8, 13.4])
def test_a_jpeg_comes_out_as_a_full_decode_does(photograph: tuple[bytes, Image.Image], factor: float) -> None:
    data, decoded = photograph
    size = (round(1600 / factor), round(1200 / factor))
    expected = np.asarray(decoded.resize(size, Image.Resampling.LANCZOS))
    assert _psnr(_at(data, (1600, 1200), size), expected) >= 50
    assert _psnr(resize.resize(np.asarray(decoded), size, linear=False), expected) >= 50


@pytest.mark.parametrize("factor", [2.4, 3.4, 4.2, 8, 14])
def test_fine_detail_does_not_fold_back(encoded: Encoded, factor: float) -> None:
    plate, frequency = _zone_plate(1600, 1200)
    size = (round(1600 / factor), round(1200 / factor))
    lanczos = _residue(np.asarray(plate.resize(size, Image.Resampling.LANCZOS)), frequency)
    assert _residue(resize.resize(np.asarray(plate), size, linear=False), frequency) < 1.6 * lanczos
    assert _residue(_at(encoded(plate, "JPEG", quality=98), (1600, 1200), size), frequency) < 12
    # What the bound is worth: filters that look at few pixels of the large picture are far from it.
    for unfit in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR):
        coordinates = (1600 / size[0], 0, 0, 0, 1200 / size[1], 0)
        folded = plate.transform(size, Image.Transform.AFFINE, coordinates, unfit)
        assert _residue(np.asarray(folded), frequency) > 30


def test_a_chequerboard_turns_gray() -> None:
    checkers = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None]
    assert np.abs(resize.resize(checkers, (64, 64), linear=False).astype(float) - 127.5).max() <= 4


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_are_exact(channels: int, linear: bool) -> None:
    draw = np.random.default_rng(channels)
    for _ in range(25):
        width, height, new_width, new_height = (int(side) for side in draw.integers(1, 200, size=4))
        array = draw.integers(0, 256, size=(height, width, channels), dtype=np.uint8)
        resized = resize.resize(array, (new_width, new_height), linear=linear)
        assert resized.shape == (new_height, new_width, channels)
        assert resized.dtype == np.uint8


def test_sizes_are_exact_for_jpegs_that_are_shrunk_while_decoding(encoded: Encoded) -> None:
    draw = np.random.default_rng(1)
    for _ in range(25):
        width, height = (int(side) for side in draw.integers(900, 1100, size=2))
        data = encoded(Image.linear_gradient("L").resize((width, height)).convert("RGB"), "JPEG")
        for factor in (3.4, 14.3, 27.1):
            size = (round(width / factor), round(height / factor))
            small = _at(data, (width, height), size)
            assert small.shape == (size[1], size[0], 3)
            expected = np.asarray(Image.open(io.BytesIO(data)).resize(size, Image.Resampling.LANCZOS))
            assert np.abs(small.astype(int) - expected).max() <= 3, "the picture is moved or scaled"


@pytest.mark.parametrize(
    ("factor", "shrink"), [(1.0, 1), (3.29, 1), (3.3, 2), (13.1, 2), (13.2, 4), (26.3, 4), (26.4, 8), (900.0, 8)]
)
def test_lanczos_is_left_enough_to_do(factor: float, shrink: int) -> None:
    assert resize.shrink_on_load(factor, has_full_colour=False) == shrink
    assert resize.shrink_on_load(factor, has_full_colour=True) == 1


def test_light_is_averaged_when_asked_for(encoded: Encoded) -> None:
    checkers = np.repeat((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    # Half of all light is 188 in sRGB's encoding.
    assert np.abs(resize.resize(checkers, (64, 64), linear=True)[4:-4, 4:-4].astype(int) - 188).max() <= 3
    data = encoded(as_image(checkers), "JPEG", quality=100, subsampling=0)
    assert np.abs(_at(data, (512, 512), (64, 64), linear=True)[4:-4, 4:-4].astype(int) - 188).max() <= 3


@pytest.mark.parametrize("size", [(120, 90), (700, 525)])
def test_linear_light_agrees_with_floating_point(size: tuple[int, int]) -> None:
    draw = np.random.default_rng(2)
    pixels = draw.integers(0, 256, size=(300, 400, 3), dtype=np.uint8)
    stored = pixels / 255
    light = np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4).astype(np.float32)
    lanczos = Image.Resampling.LANCZOS
    resized = np.stack([np.asarray(Image.fromarray(light[:, :, c]).resize(size, lanczos)) for c in range(3)], axis=2)
    resized = resized.clip(0, 1)
    expected = np.where(resized <= 0.0031308, resized * 12.92, 1.055 * resized ** (1 / 2.4) - 0.055) * 255
    assert _psnr(resize.resize(pixels, size, linear=True), expected) > 50
    assert _psnr(resize.resize(pixels, size, linear=False), expected) < 35, "the test tells nothing"


def test_enlarging_is_lanczos() -> None:
    image = _photograph(80, 60)
    expected = np.asarray(image.resize((200, 150), Image.Resampling.LANCZOS))
    assert np.array_equal(resize.resize(np.asarray(image), (200, 150), linear=False), expected)


def test_a_damaged_or_misdescribed_jpeg_is_left_to_the_full_decode(photograph: tuple[bytes, Image.Image]) -> None:
    data, _ = photograph
    assert resize.jpeg_at(data[: len(data) // 2], (1600, 1200), (160, 120), shrink=2, linear=False) is None
    assert resize.jpeg_at(data, (1600, 1208), (160, 120), shrink=2, linear=False) is None
    assert resize.jpeg_at(b"\xff\xd8garbage", (1600, 1200), (160, 120), shrink=2, linear=False) is None


@pytest.mark.parametrize("place", [(30, 40), (200, 150), (370, 20)])
def test_attention_goes_to_what_stands_out(place: tuple[int, int]) -> None:
    image = Image.new("RGB", (400, 200), (128, 128, 128))
    image.paste((255, 160, 30), (place[0], place[1], place[0] + 20, place[1] + 20))
    left, _ = resize.attention(image, 200, 200)
    left = min(max(left, 0), 200)
    assert left <= place[0]
    assert place[0] + 20 <= left + 200


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_png_holds_the_pixels_and_nothing_else(mode: str) -> None:
    image = _photograph(120, 80).convert(mode)
    data = resize.png(np.asarray(image).reshape(80, 120, -1))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
        assert np.array_equal(np.asarray(opened), np.asarray(image))
        assert set(opened.info) <= {"dpi"}
    assert data == resize.png(np.asarray(image).reshape(80, 120, -1))


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_that_starts_threads_is_imported_before_workers_fork() -> None:
    code = "import sys, ftk.pipeline.images; print([name for name in ('pyvips', 'torch') if name in sys.modules])"
    assert _run(code) == "[]"


def test_every_process_gives_the_same_bytes(
    photograph: tuple[bytes, Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("resize") / "photograph.jpg"
    path.write_bytes(photograph[0])
    code = f"""
import hashlib
from pathlib import Path
from ftk.pipeline import resize
small = resize.jpeg_at(Path({str(path)!r}).read_bytes(), (1600, 1200), (470, 352), shrink=2, linear=False)
print(hashlib.sha256(resize.png(small)).hexdigest())
"""
    assert _run(code) == _run(code)
    here = resize.jpeg_at(photograph[0], (1600, 1200), (470, 352), shrink=2, linear=False)
    assert here is not None
    assert hashlib.sha256(resize.png(here)).hexdigest() == _run(code)
