"""How fast `ftk prepare` decodes, resizes, crops and encodes, and how well: against Pillow, img2dataset and a trainer's loader.

Within one process every contestant takes every picture twice a round, forth and back (A B C, C B A), on one thread; what
counts is the process's CPU time. Ratios are of one round, so that a machine that slows down slows all. Each race has a fresh
process: what an allocator has seen before decides whether it gives large blocks back to the system, and clearing them anew
is a quarter of the time that Pillow takes for a large picture. Quality is measured against a full decode and Pillow's
Lanczos, after turning and colour management. The last part runs whole commands instead, by the clock.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "VIPS_CONCURRENCY": "1", "NO_ALBUMENTATIONS_UPDATE": "1"})

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, features
from rich.console import Console
from rich.table import Table

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.demo import draw_pictures
from ftk.pipeline.buckets import Placement, place
from ftk.pipeline.decode import open_image
from ftk.pipeline.images import ImageRecipe, ImageTask, PreparedImage, prepare_image
from ftk.pipeline.render import Rendering
from ftk.pipeline.sources.base import Blob
from ftk.pipeline.stage import image_recipes
from ftk.run import resolve

LANCZOS = Image.Resampling.LANCZOS
TWELVE_MEGAPIXELS = (4032, 3024)
EIGHT_MEGAPIXELS = (3264, 2448)
CAMERA = {"format": "JPEG", "quality": 92, "subsampling": "4:2:0"}
STORED = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
LIBRARIES = ("ftk", "pillow", "numpy", "pyvips", "img2dataset", "albumentations", "opencv-python-headless")
PEERS = (
    "pip install --target PEERS --no-deps img2dataset 'opencv-python-headless<5' 'albumentations<2' 'albucore==0.0.23' "
    "scipy stringzilla simsimd, then run with PYTHONPATH=PEERS (Python before 3.13)"
)

Pixels = Image.Image | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A picture's file, and where it goes: as its pixels are stored, and as it is to be looked at."""

    data: bytes
    stored: Placement
    upright: Placement
    recipe: ImageRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A way from a file's bytes to pixels, or to an encoded file. `baseline` is whom its ratio is against.

    `turns`: whether it obeys the EXIF orientation; one that does not gets a placement of the stored pixels.
    """

    name: str
    run: Callable[[Item], Any]
    baseline: str
    turns: bool = False


# What takes part: from bytes to pixels.


def pillow(item: Item) -> Image.Image:
    """The loop that everybody writes."""
    with Image.open(io.BytesIO(item.data)) as image:
        return _cropped(image.convert("RGB").resize(_size(item.stored), LANCZOS), item.stored)


def pillow_draft(item: Item) -> Image.Image:
    """The same, with JPEG decoded at the smallest of its scales that is not below the size asked for."""
    with Image.open(io.BytesIO(item.data)) as image:
        image.draft("RGB", _size(item.stored))
        return _cropped(image.convert("RGB").resize(_size(item.stored), LANCZOS), item.stored)


def pillow_careful(item: Item) -> Image.Image:
    """The same as `pillow`, turned and in sRGB; both after the resize, where they cost least."""
    with Image.open(io.BytesIO(item.data)) as image:
        profile = image.info.get("icc_profile")
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
        size = (item.upright.resize_height, item.upright.resize_width) if turned >= 5 else _size(item.upright)
        small = image.convert("RGB").resize(size, LANCZOS)
        small.getexif()[ExifTags.Base.Orientation] = turned
        return _cropped(_in_srgb(ImageOps.exif_transpose(small), profile), item.upright)


def trainer_script(item: Item) -> np.ndarray:
    """What a widely used trainer does when it loads an image: OpenCV's area filter to shrink, Pillow's Lanczos to enlarge.

    After kohya-ss/sd-scripts: `load_image`, `trim_and_resize_if_required`, `resize_image`.
    """
    import cv2

    with Image.open(io.BytesIO(item.data)) as image:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)
    height, width = pixels.shape[:2]
    size = _size(item.stored)
    if width >= size[0] and height >= size[1]:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    else:
        enlarged = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).resize(size, LANCZOS)
        pixels = cv2.cvtColor(np.array(enlarged), cv2.COLOR_RGB2BGR)
    return _cropped_array(pixels, item.stored)


def ftk_pixels(item: Item) -> Image.Image:
    """The part of `prepare_image` that makes pixels."""
    picture = Rendering(open_image(item.data), background=item.recipe.background, max_pixels=item.recipe.max_pixels)
    return _cropped(picture.at(*_size(item.upright)), item.upright)


class Img2dataset:
    """img2dataset's own `Resizer`, called as its downloader calls it, with its default filters.

    It resizes to a shorter side; the crop to the bucket is put in front of its encoder. Where only pixels are wanted, its
    encoder is taken away.
    """

    def __init__(self, resizer: types.ModuleType, encodes: bool) -> None:
        import cv2

        self._resizer, self._cv2, self._encodes = resizer, cv2, encodes
        self._placement: Placement | None = None
        self._pixels: np.ndarray | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cv2, name)

    def __call__(self, item: Item) -> Any:
        self._placement = item.stored
        self._resizer.cv2 = self  # type: ignore[attr-defined]
        resize = self._resizer.Resizer(
            image_size=min(_size(item.stored)), resize_mode="keep_ratio", resize_only_if_bigger=False, encode_format="jpg"
        )
        data, *_, error = resize(io.BytesIO(item.data))
        assert error is None, error
        return data if self._encodes else self._pixels

    def imencode(self, suffix: str, pixels: np.ndarray, params: Sequence[int]) -> tuple[bool, np.ndarray]:
        """Stands in for OpenCV's."""
        assert self._placement is not None
        assert (pixels.shape[1], pixels.shape[0]) == _size(self._placement), f"{pixels.shape} is not {self._placement}"
        cropped = _cropped_array(pixels, self._placement)
        if self._encodes:
            return self._cv2.imencode(suffix, cropped, params=params)
        self._pixels = cropped[:, :, ::-1]
        return True, np.empty(0, np.uint8)


# What takes part: from bytes to an encoded file.


def pillow_encoded(item: Item, options: dict[str, Any]) -> bytes:
    """The plain loop, and a file."""
    encoded = io.BytesIO()
    pillow(item).save(encoded, **options)
    return encoded.getvalue()


def ftk_encoded(item: Item, image_format: str) -> bytes:
    """All that a worker does for an image: checks, SHA-256, pixels, perceptual hash, file."""
    recipe = replace(item.recipe, image_format=image_format)
    task = ImageTask(image=Blob(location="picture", data=item.data), mask=None, controls=(), recipe=recipe)
    prepared = prepare_image(task)
    assert isinstance(prepared, PreparedImage), prepared
    return prepared.variants[0].data


def peers() -> types.ModuleType | None:
    """img2dataset's resizer, loaded without the rest of its package; None when it is not installed."""
    package = importlib.util.find_spec("img2dataset")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("img2dataset_resizer", Path(package.origin).parent / "resizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.cv2.setNumThreads(1)
    return module


def pixel_contestants(resizer: types.ModuleType | None, is_plain: bool) -> list[Contestant]:
    """Plain: pictures that are upright and in sRGB as they are."""
    base = "Pillow"
    found = [
        Contestant(name=base, run=pillow, baseline=base),
        Contestant(name="Pillow, draft", run=pillow_draft, baseline=base),
    ]
    if not is_plain:
        found.append(Contestant(name="Pillow, turned, sRGB", run=pillow_careful, baseline=base, turns=True))
    if resizer is not None:
        found.append(Contestant(name="img2dataset", run=Img2dataset(resizer, encodes=False), baseline=base))
        found.append(Contestant(name="sd-scripts' loader", run=trainer_script, baseline=base))
    return [*found, Contestant(name="ftk", run=ftk_pixels, baseline=base, turns=True)]


def file_contestants(resizer: types.ModuleType | None) -> list[Contestant]:
    """JPEG is at quality 95: img2dataset's with colours at half resolution, the others' at full."""
    jpeg, png = "Pillow, JPEG", "Pillow, PNG"
    found = [
        Contestant(name=jpeg, run=functools.partial(pillow_encoded, options=STORED), baseline=jpeg),
        Contestant(name="ftk, JPEG", run=functools.partial(ftk_encoded, image_format="jpeg"), baseline=jpeg),
        Contestant(name=png, run=functools.partial(pillow_encoded, options={"format": "PNG"}), baseline=png),
        Contestant(name="ftk, PNG", run=functools.partial(ftk_encoded, image_format="png"), baseline=png),
    ]
    if resizer is not None:
        found.insert(1, Contestant(name="img2dataset, JPEG", run=Img2dataset(resizer, encodes=True), baseline=jpeg))
    return found


def _size(placement: Placement) -> tuple[int, int]:
    return placement.resize_width, placement.resize_height


def _cropped(image: Image.Image, place: Placement) -> Image.Image:
    return image.crop((place.crop_x, place.crop_y, place.crop_x + place.bucket_width, place.crop_y + place.bucket_height))


def _cropped_array(pixels: np.ndarray, place: Placement) -> np.ndarray:
    return pixels[place.crop_y : place.crop_y + place.bucket_height, place.crop_x : place.crop_x + place.bucket_width]


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    converted = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"))
    assert converted is not None
    return converted


# Pictures to work on.


def camera_like(size: tuple[int, int], count: int, detail: float = 10.0) -> list[Image.Image]:
    """Drawn scenes, enlarged, with detail whose amplitude falls with frequency as in photographs (Field, JOSA A 1987).

    `detail` is its standard deviation in grey levels. A JPEG of `CAMERA` takes 2.1 bits a pixel at 10, and 3.6 at 24; of
    eight of Kodak's photographs 1.8 to 4.2, with a median of 2.1.
    """
    width, height = size
    pictures = []
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        for number, path in enumerate(draw_pictures(Path(folder), count)):
            generator = np.random.default_rng(number)
            with Image.open(path) as drawn:
                scene = np.asarray(ImageOps.fit(drawn.convert("RGB"), size, Image.Resampling.BICUBIC), np.float32)
            luma, tint = (_falling_detail(generator, height, width, deviation) for deviation in (detail, detail / 4))
            detailed = scene * 0.8 + 25 + np.stack([luma + tint, luma, luma - tint], axis=2)
            pictures.append(Image.fromarray(np.rint(detailed.clip(0, 255)).astype(np.uint8)))
    return pictures


def _falling_detail(generator: np.random.Generator, height: int, width: int, deviation: float) -> np.ndarray:
    spectrum = np.fft.rfft2(generator.standard_normal((height, width), np.float32))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    detail = np.fft.irfft2(spectrum / frequency, (height, width)).astype(np.float32)
    return detail * np.float32(deviation / detail.std())


def zone_plate(size: tuple[int, int]) -> Image.Image:
    """Rings whose frequency grows from 0 at the centre to the Nyquist frequency at the nearer of the edges."""
    rings = 127.5 + 127.5 * np.cos(np.pi * _radius(size) ** 2 / size[1])
    return Image.fromarray(np.rint(rings).astype(np.uint8)).convert("RGB")


def _radius(size: tuple[int, int]) -> np.ndarray:
    width, height = size
    return np.hypot(np.arange(height)[:, None] - (height - 1) / 2, np.arange(width)[None, :] - (width - 1) / 2)


def wide_gamut_profile() -> bytes:
    """A small ICC profile (version 2, matrix and gamma) with the primaries of Display P3, adapted to D50."""
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
        b"wtpt": (0.96420, 1.0, 0.82491),
    }

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    tags = {tag: b"XYZ \0\0\0\0" + fixed(*values) for tag, values in primaries.items()}
    tags |= {tag: b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(2.2 * 256)) for tag in (b"rTRC", b"gTRC", b"bTRC")}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 8) + b"P3-like\0" + bytes(78) + bytes(2)
    tags[b"cprt"] = b"text\0\0\0\0" + b"none\0\0\0\0"
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp").ljust(68, b"\0")
    return (header + fixed(0.96420, 1.0, 0.82491)).ljust(128, b"\0") + table + body


def encoded(pictures: Iterable[Image.Image], **options: Any) -> list[bytes]:
    """Files of pictures."""
    files = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, **options)
        files.append(file.getvalue())
    return files


def items(files: Iterable[bytes], resolution: int) -> list[Item]:
    """Files, each with its nearest bucket."""
    (recipe,) = image_recipes(resolve(run_config(resolution, ".", "."))).values()
    found = []
    for data in files:
        opened = open_image(data)
        stored, upright = (place(*size, list(recipe.sizes[0])) for size in (opened.image.size, (opened.width, opened.height)))
        found.append(Item(data=data, stored=stored, upright=upright, recipe=recipe))
    return found


def run_config(resolution: int, source: str, workspace: str, workers: int = 1) -> RunConfig:
    """A run file of defaults."""
    data = {"sources": [{"path": source, "name": "bench", "caption": "x"}], "resolutions": [resolution], "workers": workers}
    tree = {"run": "bench", "workspace": workspace, "model": {"family": "qwen-image", "path": "unused"}, "data": data}
    return validate(RunConfig, tree, "the benchmark's run file")


# The kinds of input.


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Files, and where they go. `is_plain`: they are upright and in sRGB. `environment`: of the process that races on them."""

    files: Callable[[argparse.Namespace], list[bytes]]
    resolution: int
    is_plain: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def jpegs(options: argparse.Namespace) -> list[bytes]:
    """As from a camera of 12 megapixels."""
    return encoded(camera_like(TWELVE_MEGAPIXELS, options.pictures), **CAMERA)


def detailed_jpegs(options: argparse.Namespace) -> list[bytes]:
    """The same, of foliage perhaps."""
    return encoded(camera_like(TWELVE_MEGAPIXELS, options.pictures, detail=24.0), **CAMERA)


def turned_jpegs(options: argparse.Namespace) -> list[bytes]:
    """The same from a telephone held upright: to be turned, with a wide-gamut profile."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pictures = camera_like(TWELVE_MEGAPIXELS, options.pictures)
    return encoded(pictures, **CAMERA, exif=exif.tobytes(), icc_profile=wide_gamut_profile())


def small_jpegs(options: argparse.Namespace) -> list[bytes]:
    """The same of 8 megapixels: at 1024 px the shrink is too small for any of it to be left to the JPEG decoder."""
    pictures = camera_like(TWELVE_MEGAPIXELS, options.pictures)
    return encoded((picture.resize(EIGHT_MEGAPIXELS, LANCZOS) for picture in pictures), **CAMERA)


def pngs(options: argparse.Namespace) -> list[bytes]:
    """The same without loss."""
    return encoded(camera_like(TWELVE_MEGAPIXELS, options.pictures), format="PNG", compress_level=6)


def photographs(options: argparse.Namespace, suffixes: Sequence[str]) -> list[bytes]:
    """Those in the folder that the command line names."""
    paths = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in suffixes)
    return [path.read_bytes() for path in paths]


PHOTO_JPEGS = functools.partial(photographs, suffixes=(".jpg", ".jpeg"))
PHOTO_PNGS = functools.partial(photographs, suffixes=(".png",))
# glibc's: freed blocks are kept, so that large pictures get memory that is there already. By default the sizes of what was
# freed before decide it.
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
KINDS = {
    "JPEG 12 MP to 1024": Kind(files=jpegs, resolution=1024),
    "JPEG 12 MP to 1024, memory kept": Kind(files=jpegs, resolution=1024, environment=KEEPS_MEMORY),
    "JPEG 12 MP, much detail, to 1024": Kind(files=detailed_jpegs, resolution=1024),
    "JPEG 12 MP to 512": Kind(files=jpegs, resolution=512),
    "JPEG 12 MP, P3, on its side, to 1024": Kind(files=turned_jpegs, resolution=1024, is_plain=False),
    "PNG 12 MP to 1024": Kind(files=pngs, resolution=1024),
    "JPEG 8 MP to 1024": Kind(files=small_jpegs, resolution=1024),
    "JPEG photographs to 512": Kind(files=PHOTO_JPEGS, resolution=512, is_plain=False),
    "JPEG photographs to 256": Kind(files=PHOTO_JPEGS, resolution=256, is_plain=False),
    "PNG photographs to 512": Kind(files=PHOTO_PNGS, resolution=512),
    "PNG photographs to 256": Kind(files=PHOTO_PNGS, resolution=256),
}


# Measuring.


def race(contestants: Sequence[Contestant], pictures: Sequence[Item], rounds: int) -> dict[str, list[float]]:
    """CPU seconds an image of each contestant, by round."""
    for contestant in contestants:
        contestant.run(pictures[0])
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        first = number % len(contestants)
        order = [*contestants[first:], *contestants[:first]]
        spent = dict.fromkeys(seconds, 0.0)
        for item in pictures:
            for contestant in (*order, *reversed(order)):
                started = time.process_time()
                contestant.run(item)
                spent[contestant.name] += time.process_time() - started
        for name, total in spent.items():
            seconds[name].append(total / (2 * len(pictures)))
    return seconds


def speeds(contestants: Sequence[Contestant], pictures: Sequence[Item], rounds: int) -> dict[str, dict[str, Any]]:
    """By contestant: images a second, and how many times the baseline's speed that is."""
    seconds = race(contestants, pictures, rounds)
    found = {}
    for contestant in contestants:
        own, base = seconds[contestant.name], seconds[contestant.baseline]
        found[contestant.name] = {
            "images_a_second": spread([1 / each for each in own]),
            "baseline": contestant.baseline,
            "ratio": spread([b / a for a, b in zip(own, base, strict=True)]),
        }
    return found


def psnr(pixels: Pixels, reference: Pixels) -> float:
    """dB; infinite when equal."""
    first, second = (np.asarray(each, np.float64) for each in (pixels, reference))
    assert first.shape == second.shape, f"{first.shape} is not {second.shape}"
    error = float(np.mean((first - second) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def reference(item: Item, turned: bool) -> Image.Image:
    """Decoded in full, in sRGB, upright when `turned`, and resized by Pillow's Lanczos."""
    with Image.open(io.BytesIO(item.data)) as image:
        picture = _in_srgb(image.convert("RGB"), image.info.get("icc_profile"))
        if turned:
            picture.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
            picture = ImageOps.exif_transpose(picture)
    placement = item.upright if turned else item.stored
    return _cropped(picture.resize(_size(placement), LANCZOS), placement)


def quality(contestants: Sequence[Contestant], pictures: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """By contestant: PSNR against the reference; null for infinite, which is equal to it in every pixel."""
    found: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for item in pictures:
        references = {turned: reference(item, turned) for turned in (False, True)}
        for contestant in contestants:
            found[contestant.name].append(psnr(contestant.run(item), references[contestant.turns]))
    return {
        contestant.name: {
            "psnr_median": _finite(statistics.median(found[contestant.name])),
            "psnr_worst": _finite(min(found[contestant.name])),
            "upright": contestant.turns or all(_size(item.stored) == _size(item.upright) for item in pictures),
        }
        for contestant in contestants
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def aliasing(contestant: Contestant, item: Item, size: tuple[int, int]) -> float:
    """What is left (RMS, grey levels) of a zone plate's rings that the small picture cannot show; 90 is all of it.

    Counted from 1.25 times the small picture's Nyquist frequency on, past the slope of the filters.
    """
    pixels = np.asarray(contestant.run(item), np.float64)[:, :, 1]
    scale = size[0] / item.stored.resize_width
    radius = _cropped_array(_radius(_size(item.stored)), item.stored) * scale
    frequency = radius / size[1]  # of the original: 1 / 2 at half its height
    hidden = (frequency > 1.25 * 0.5 / scale) & (frequency < 0.5)
    return float(np.sqrt(np.mean((pixels[hidden] - 127.5) ** 2)))


def race_pixels(kind: Kind, pictures: Sequence[Item], rounds: int) -> dict[str, dict[str, Any]]:
    """Speed and quality of decoding, resizing and cropping."""
    contestants = pixel_contestants(peers(), kind.is_plain)
    found = speeds(contestants, pictures, rounds)
    for name, judged in quality(contestants, pictures).items():
        found[name] |= judged
    return found


def race_files(pictures: Sequence[Item], rounds: int) -> dict[str, dict[str, Any]]:
    """Speed of the whole chain, and the sizes of what it writes."""
    contestants = file_contestants(peers())
    found = speeds(contestants, pictures, rounds)
    for contestant in contestants:
        found[contestant.name]["mean_bytes"] = round(statistics.mean(len(contestant.run(item)) for item in pictures))
    return found


def one_race(part: str, name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """What a fresh process does: one of the two races of one kind of input."""
    kind = KINDS[name]
    pictures = items((path.read_bytes() for path in sorted(folder.iterdir())), kind.resolution)
    about = {
        "input": name,
        "num_images": len(pictures),
        "mean_bytes": round(statistics.mean(len(item.data) for item in pictures)),
        "sizes": sorted({f"{item.upright.bucket_width}x{item.upright.bucket_height}" for item in pictures}),
    }
    return {**about, part: race_pixels(kind, pictures, rounds) if part == "pixels" else race_files(pictures, rounds)}


def both_races(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Each in a fresh interpreter, which has made no picture before."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        for number, data in enumerate(KINDS[name].files(options)):
            (Path(folder) / f"{number:04d}").write_bytes(data)
        for part in ("pixels", "files"):
            command = [sys.executable, __file__, f"--rounds={options.rounds}", "--race", part, name, folder]
            environment = {**os.environ, **KINDS[name].environment}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found |= json.loads(done.stdout.splitlines()[-1])
    return found


def alias_table(resizer: types.ModuleType | None) -> dict[str, dict[str, float]]:
    """By file format and contestant."""
    plate = [zone_plate(TWELVE_MEGAPIXELS)]
    files = {"JPEG": encoded(plate, **CAMERA), "PNG": encoded(plate, format="PNG", compress_level=1)}
    found = {}
    for kind, file in files.items():
        (item,) = items(file, 1024)
        found[kind] = {
            contestant.name: aliasing(contestant, item, TWELVE_MEGAPIXELS) for contestant in pixel_contestants(resizer, True)
        }
    return found


# Whole commands, by the clock.


def commands(files: Sequence[bytes], count: int, repeats: int) -> list[dict[str, Any]]:
    """`ftk prepare` against a pool of processes that run the Pillow loop, with as many workers."""
    found = []
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        for number in range(count):
            (pictures / f"{number:04d}.jpg").write_bytes(files[number % len(files)])
        for workers in (1, 2):
            runs: dict[str, list[float]] = {"ftk": [], "pillow": []}
            for number in range(repeats):
                for side in ("ftk", "pillow") if number % 2 else ("pillow", "ftk"):
                    runs[side].append(
                        count / _command_seconds(side, pictures, Path(folder) / f"{side}-{workers}-{number}", workers)
                    )
            found.append(
                {
                    "workers": workers,
                    "num_images": count,
                    "images_a_second": {side: spread(speeds) for side, speeds in runs.items()},
                    "ratio": spread([a / b for a, b in zip(runs["ftk"], runs["pillow"], strict=True)]),
                }
            )
    return found


def _command_seconds(side: str, pictures: Path, out: Path, workers: int) -> float:
    """From a command's start to its end."""
    out.mkdir()
    if side == "ftk":
        run_file = out / "run.yaml"
        run_file.write_text(run_config(1024, str(pictures), str(out / "work"), workers).model_dump_json(exclude_unset=True))
        command = [sys.executable, "-m", "ftk", "prepare", str(run_file)]
    else:
        command = [sys.executable, __file__, "--pool", str(pictures), str(out), str(workers)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def pool(pictures: Path, out: Path, workers: int) -> None:
    """The Pillow loop as a program: a pool of processes, JPEG of quality 95 out."""
    (recipe,) = image_recipes(resolve(run_config(1024, ".", "."))).values()
    with multiprocessing.get_context("fork").Pool(workers) as processes:
        tasks = [(path, out / path.name, recipe) for path in sorted(pictures.iterdir())]
        for _ in processes.imap_unordered(_pool_one, tasks):
            pass


def _pool_one(task: tuple[Path, Path, ImageRecipe]) -> None:
    path, out, recipe = task
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        placement = place(*image.size, list(recipe.sizes[0]))
    out.write_bytes(pillow_encoded(Item(data=data, stored=placement, upright=placement, recipe=recipe), STORED))


# Reporting.


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Facts without which the numbers mean nothing."""
    import pyvips

    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.machine())
    versions = {"libvips": ".".join(str(pyvips.version(part)) for part in range(3))}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    versions["Pillow's libjpeg-turbo"] = features.version_feature("libjpeg_turbo") or "absent"
    return {"cpu": cpu, "cpu_count": os.cpu_count(), "python": platform.python_version(), **versions}


def show(report: dict[str, Any]) -> None:
    """Two tables for each input, then what is left of a zone plate, then the commands."""
    console = Console()
    for result in report["inputs"]:
        about = f"{result['input']} ({result['num_images']} files of {result['mean_bytes'] / 1e6:.2f} MB)"
        table = _table(f"{about}: decode, resize, crop", ["images/s a core", "×", "range", "PSNR", "worst"])
        for name, found in result["pixels"].items():
            decibels = ("equal" if found[key] is None else f"{found[key]:.1f}" for key in ("psnr_median", "psnr_worst"))
            table.add_row(name if found["upright"] else f"{name} *", *_speed_cells(found), *decibels)
        console.print(table)
        table = _table(f"{about}: to an encoded file", ["images/s a core", "×", "range", "KB a file"])
        for name, found in result["files"].items():
            table.add_row(name, *_speed_cells(found), f"{found['mean_bytes'] / 1000:,.0f}")
        console.print(table)
    table = _table("Left of rings too fine to show (RMS)", list(report["aliasing"]))
    for name in report["aliasing"]["JPEG"]:
        table.add_row(name, *(f"{levels[name]:.1f}" for levels in report["aliasing"].values()))
    console.print(table)
    table = _table("ftk prepare, and a pool of the Pillow loop", ["ftk images/s", "Pillow images/s", "×", "range"])
    for result in report["commands"]:
        both = (f"{result['images_a_second'][side]['median']:.1f}" for side in ("ftk", "pillow"))
        table.add_row(f"{result['workers']} workers", *both, *_ranged(result["ratio"]))
    console.print(table)
    console.print("×: times the speed of the Pillow loop, with the same encoder; median, least and greatest of the rounds.")
    console.print("PSNR in dB, median and worst, against full decode and Lanczos in sRGB. *: leaves the picture on its side.")
    console.print(
        "Rings: root mean square of what is left beyond 1.25 times the Nyquist frequency; 90 grey levels is all of it."
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _speed_cells(found: dict[str, Any]) -> list[str]:
    return [f"{found['images_a_second']['median']:.1f}", *_ranged(found["ratio"])]


def _ranged(values: dict[str, float]) -> list[str]:
    return [f"{values['median']:.2f}", f"{values['min']:.2f}-{values['max']:.2f}"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--photos", type=Path, metavar="DIR", help="also measure the photographs of this folder, at 512 and 256 px"
    )
    parser.add_argument("--pictures", type=int, default=4, help="pictures of each kind that are made")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each race")
    parser.add_argument("--files", type=int, default=64, help="files that the whole commands get")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each whole command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    parser.add_argument("--pool", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--race", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure everything that was asked for; or, as a process of its own, a part of it."""
    options = parse_arguments()
    if options.pool:
        pool(Path(options.pool[0]), Path(options.pool[1]), int(options.pool[2]))
        return
    if options.race:
        part, name, folder = options.race
        print(json.dumps(one_race(part, name, Path(folder), options.rounds)))
        return
    if (resizer := peers()) is None:
        Console(stderr=True).print(f"img2dataset and sd-scripts' loader are left out. To add them: {PEERS}")
    raced = []
    for name, kind in KINDS.items():
        if options.photos or kind.files not in (PHOTO_JPEGS, PHOTO_PNGS):
            Console(stderr=True).print(name)
            raced.append(both_races(name, options))
    report = {
        "command": "python benchmarks/prepare.py"
        + " --photos PHOTOS" * (options.photos is not None)
        + "".join(f" --{name} {getattr(options, name)}" for name in ("pictures", "rounds", "files", "repeats")),
        "machine": machine(),
        "inputs": raced,
        "aliasing": alias_table(resizer),
        "commands": commands(jpegs(options), options.files, options.repeats),
    }
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
