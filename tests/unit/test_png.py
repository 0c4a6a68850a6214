"""PNG: whether all pixels are there, also in a stream that ends properly."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftk.contracts import RejectReason
from ftk.pipeline import png
from ftk.pipeline.decode import Unfit, open_image
from ftk.pipeline.render import Rendering

Encoded = Callable[..., bytes]
SIZE = (40, 30)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _of_rows(rows: bytes, bits: int = 8, colour: int = 2, interlaced: bool = False) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", *SIZE, bits, colour, 0, 0, int(interlaced)))
    return png.SIGNATURE + header + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _cut(data: bytes, share: float) -> bytes:
    """The same PNG with so much of its rows, properly packed."""
    parts = [(kind, data[start:end]) for kind, start, end in png.chunks(data)]
    rows = zlib.decompress(b"".join(content for kind, content in parts if kind == b"IDAT"))
    others = [_chunk(kind, content) for kind, content in parts if kind not in (b"IDAT", b"IEND")]
    pixels = _chunk(b"IDAT", zlib.compress(rows[: int(len(rows) * share)]))
    return b"".join((png.SIGNATURE, *others, pixels, _chunk(b"IEND", b"")))


def _at(data: bytes, size: tuple[int, int], is_mask: bool = False) -> np.ndarray:
    return np.asarray(Rendering(open_image(data), is_mask=is_mask, max_pixels=1_000_000).at(*size))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_whose_rows_end_too_early_is_truncated(mode: str, share: float, encoded: Encoded) -> None:
    image = Image.effect_noise(SIZE, 90)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) << 8) if mode == "I;16" else image.convert(mode)
    data = encoded(image, "PNG")
    assert png.has_all_rows(data)
    assert png.has_all_rows(_cut(data, 1.0))
    cut = _cut(data, share)
    assert not png.has_all_rows(cut)
    for size in (SIZE, (20, 15), (80, 60)):
        assert _at(data, size).shape[:2] == (size[1], size[0])
        for is_mask in (False, True):
            with pytest.raises(Unfit) as caught:
                _at(cut, size, is_mask)
            assert caught.value.reason == RejectReason.TRUNCATED


@pytest.mark.parametrize(
    ("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 4), (8, 6), (16, 6)]
)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (40, 30)])
def test_interlaced_pixels_are_counted_pass_by_pass(
    bits: int, colour: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "SIZE", size)
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    # The specification's own table of which pixels each pass holds, row by row.
    pattern = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    rows = b""
    for number in "1234567":
        for y in range(size[1]):
            columns = sum(pattern[y % 8][x % 8] == number for x in range(size[0]))
            rows += b"\0" + b"\x55" * ((columns * channels * bits + 7) // 8) if columns else b""
    whole = _of_rows(rows, bits, colour, interlaced=True)
    with Image.open(io.BytesIO(whole)) as image:
        image.load()
    assert png.has_all_rows(whole)
    assert not png.has_all_rows(_of_rows(rows[:-1], bits, colour, interlaced=True))


def test_half_of_an_interlaced_png_is_truncated() -> None:
    whole = b"".join(
        (b"\0" + b"\x55" * (columns * 3)) * rows
        for columns, rows in ((5, 4), (5, 4), (10, 4), (10, 8), (20, 7), (20, 15), (40, 15))
    )
    assert (_at(_of_rows(whole, interlaced=True), (20, 15)) == 0x55).all()
    with pytest.raises(Unfit) as caught:
        _at(_of_rows(whole[: len(whole) // 2], interlaced=True), (20, 15))
    assert caught.value.reason == RejectReason.TRUNCATED


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_black_last_row_is_a_row(mode: str, encoded: Encoded) -> None:
    data = encoded(Image.new(mode, SIZE), "PNG")
    assert _at(data, SIZE).shape[:2] == (30, 40)
    # All pixels are there, if nothing behind them.
    assert _at(data[:-12], SIZE).shape[:2] == (30, 40)


def test_a_stream_that_would_fill_the_memory_is_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    start = zlib.decompressobj

    class Watched:
        def __init__(self) -> None:
            self.inner: Any = start()

        def decompress(self, data: bytes, most: int) -> bytes:
            held.append(most)
            return self.inner.decompress(data, most)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    assert png.has_all_rows(_of_rows(b"\0" * (12 << 20)))
    assert len(held) == 1
    assert held[0] <= 4 << 20
