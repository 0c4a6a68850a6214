"""One opened image file at any size: sRGB, upright, and decoded in full only where that is needed."""

import numpy as np
from PIL import Image

from ftk.pipeline import decode, resize
from ftk.pipeline.decode import Opened, Pixels


class Rendering:
    """An opened image (RGB) or mask (gray), to be had at any size; its full pixels are decoded at most once.

    A plain JPEG or PNG that shrinks goes from its bytes to the size that was asked for; everything else is decoded first.
    Of an opaque picture the pixels are resized as they are stored, and turned and converted to sRGB after that: on a
    megapixel rather than on all of the original's, which is most of the time that colour management and rotation would
    take. A resize on light (`linear`) has to know the colours before, as does a composition over the background.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        is_mask: bool = False,
        background: tuple[int, int, int] = (0, 0, 0),
        linear: bool = False,
        max_pixels: int,
    ) -> None:
        self.opened = opened
        self.is_alpha = False
        """Of a mask whose pixels were decoded: whether it is the alpha channel of its file."""
        self._is_mask = is_mask
        self._background = background
        self._linear = linear
        self._max_pixels = max_pixels
        self._decoded: Pixels | None = None
        image = opened.image
        self._profile: bytes | None = None if is_mask else image.info.get("icc_profile")
        is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
        self._streams = (is_plain_jpeg or decode.is_plain_png(opened)) and not (linear and self._profile)
        self._has_full_colour = is_plain_jpeg and image.mode == "RGB" and _has_full_colour(image)

    def at(self, width: int, height: int) -> Image.Image:
        """The whole upright picture, resized to (width, height): mode RGB, or L of a mask.

        Equal files and settings give equal pixels, whatever other sizes are asked for.

        Raises:
            Unfit: the file is damaged, cut, or has no defined 8-bit picture.
        """
        swapped = self.opened.orientation in decode.SWAPPING_ORIENTATIONS
        pixels = self._as_stored((height, width) if swapped else (width, height))
        image = decode.upright(decode.as_image(pixels.array_HWC), self.opened.orientation)
        return image.convert("L") if self._is_mask else decode.to_srgb(image, pixels.profile)

    def _as_stored(self, size: tuple[int, int]) -> Pixels:
        stored = self.opened.image.size
        if self._streams and size != stored and size[0] <= stored[0] and size[1] <= stored[1]:
            array = self._streamed(stored, size)
            if array is not None:
                return Pixels(array_HWC=array, profile=self._profile)
        if self._decoded is None:
            self._decoded = self._decode()
        resized = resize.resize(self._decoded.array_HWC, size, linear=self._linear)
        return Pixels(array_HWC=resized, profile=self._decoded.profile)

    def _streamed(self, stored: tuple[int, int], size: tuple[int, int]) -> np.ndarray | None:
        if self.opened.image.format == "PNG":
            return resize.png_at(self.opened.data, stored, size, linear=self._linear)
        factor = min(stored[0] / size[0], stored[1] / size[1])
        shrink = 1 if self._linear else resize.shrink_on_load(factor, has_full_colour=self._has_full_colour)
        return resize.jpeg_at(self.opened.data, stored, size, shrink=shrink, linear=self._linear)

    def _decode(self) -> Pixels:
        if self._is_mask:
            pixels, self.is_alpha = decode.decode_mask(self.opened, max_pixels=self._max_pixels)
            return pixels
        return decode.decode(self.opened, self._background, max_pixels=self._max_pixels, to_srgb=self._linear)


def _has_full_colour(image: Image.Image) -> bool:
    # (name, horizontal, vertical, table) of Y, Cb and Cr: the luma is stored no finer than the colours.
    layers: list[tuple[int, int, int, int]] = getattr(image, "layer", [])
    return len(layers) == 3 and layers[0][1:3] == layers[1][1:3]
