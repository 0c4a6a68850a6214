"""A perceptual hash: 64 bits that hardly change when a picture is scaled, recompressed or slightly recoloured."""

import functools

import numpy as np
from PIL import Image

_SIDE = 32
_KEPT = 8


def perceptual_hash(image: Image.Image) -> str:
    """The 64-bit pHash, as 16 hex digits: which low frequencies of the picture are above their median.

    Gray at 32 x 32, a type-II DCT of both sides, the 8 x 8 lowest frequencies row by row, most significant bit first
    (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).
    """
    small = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0).convert("L")
    basis = _cosines()
    frequencies = basis @ np.asarray(small, np.float64) @ basis.T
    # Rounded, so that frequencies which a flat picture does not have count as equal, not as noise of the arithmetic.
    frequencies = np.round(frequencies, 3)
    return np.packbits(frequencies > np.median(frequencies)).tobytes().hex()


@functools.cache
def _cosines() -> np.ndarray:
    frequency = np.arange(_KEPT)[:, None]
    position = np.arange(_SIDE)[None, :]
    return 2 * np.cos(np.pi * frequency * (2 * position + 1) / (2 * _SIDE))
