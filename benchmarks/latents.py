"""What the format of prepared images costs the latents: PNG against JPEG and WebP, through the VAE that will encode them.

Every photograph is prepared once a format by `prepare_image`, read back, and encoded by the family's own `encode_images`.
Differences of latents are root mean squares, relative to the standard deviation of the latents that PNG gives (each channel
about its own mean). Yardsticks stand beside them: what the rounding of pixels to 8 bits does to the latents (noise of the
same size is added once more), what storing them as float16 loses, and, of real weights, the standard deviation of the VAE's
own posterior, from which training draws.
"""

import argparse
import importlib.metadata
import io
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from ftk.configs.load import validate
from ftk.configs.schema import ModelConfig, RunConfig
from ftk.models import base as models
from ftk.models.components.model_folder import locate
from ftk.pipeline.images import ImageTask, PreparedImage, prepare_image
from ftk.pipeline.sources.base import Blob
from ftk.pipeline.stage import image_recipes
from ftk.run import resolve

FAMILY = "qwen-image"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# name: image_format, quality
FORMATS: dict[str, tuple[str, int | None]] = {
    "png": ("png", None),
    "webp, lossless": ("webp", None),
    "auto": ("auto", None),
    "jpeg 95": ("jpeg", 95),
    "jpeg 85": ("jpeg", 85),
    "webp 90": ("webp", 90),
}
LIBRARIES = ("ftk", "torch", "diffusers", "pillow", "pyvips")


def load_vae(model: str | None) -> Any:
    """The VAE of a model, or one of Qwen-Image's full size with seeded random weights."""
    family, device = models.get(FAMILY), torch.device("cpu")
    if model is not None:
        directory = locate(
            family, ModelConfig(family=FAMILY, path=model), family.latent_components, Path(tempfile.gettempdir())
        )
        return family.load_vae(directory, torch.float32, device)
    from diffusers import AutoencoderKLQwenImage

    from ftk.models.qwen_image import fold_single_frame

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage().requires_grad_(False).eval()
    fold_single_frame(vae)
    return vae


def prepared(data: bytes, resolution: int) -> dict[str, bytes]:
    """A photograph's file in every format; all hold the same pixels before they are encoded."""
    tree = {
        "run": "bench",
        "model": {"family": FAMILY, "path": "unused"},
        "data": {"sources": [{"path": "."}], "resolutions": [resolution]},
    }
    (recipe,) = image_recipes(resolve(validate(RunConfig, tree, "the benchmark's run file"))).values()
    files = {}
    for name, (image_format, quality) in FORMATS.items():
        own = replace(recipe, image_format=image_format, quality=quality)
        task = ImageTask(image=Blob(location="photograph", data=data), mask=None, controls=(), recipe=own)
        result = prepare_image(task)
        assert isinstance(result, PreparedImage), result
        files[name] = result.variants[0].data
    return files


def pixels_of(data: bytes) -> np.ndarray:
    """Height, width, RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def encode(vae: Any, pixels_HWC: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the normalised latents."""
    pixels_BCHW = torch.tensor(pixels_HWC, dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    return models.get(FAMILY).encode_images(vae, pixels_BCHW)


def compare(vae: Any, data: bytes, resolution: int, is_random: bool) -> dict[str, dict[str, float]]:
    """By format, how one photograph's file, pixels and latents differ from PNG's; then the yardsticks."""
    files = prepared(data, resolution)
    pixels = {name: pixels_of(file) for name, file in files.items()}
    original, std = encode(vae, pixels["png"])
    scale = rms(original - original.mean(dim=(2, 3), keepdim=True))
    differences = {pixels["png"].tobytes(): 0.0}
    found = {}
    for name, file in files.items():
        # Equal pixels have equal latents: `auto` is always one of the others.
        seen = pixels[name].tobytes()
        if seen not in differences:
            differences[seen] = rms(encode(vae, pixels[name])[0] - original)
        found[name] = {
            "bytes_a_pixel": len(file) / pixels["png"][:, :, 0].size,
            "psnr": psnr(pixels[name], pixels["png"]),
            "relative_rms": differences[seen] / scale,
        }
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, pixels["png"].shape)
    rounded = encode(vae, pixels["png"] + noise)[0] - original
    found["8-bit pixels"] = {"relative_rms": rms(rounded) / scale}
    found["float16 latents"] = {"relative_rms": rms(original.half().float() - original) / scale}
    if not is_random:
        found["posterior's std"] = {"relative_rms": rms(std) / scale}
    return found


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def psnr(pixels: np.ndarray, reference: np.ndarray) -> float:
    """dB; infinite when equal."""
    error = float(np.mean((pixels.astype(np.float64) - reference) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median, least and greatest; null for infinite, which is a PSNR of equal pixels."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def summary(photographs: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """By format, over the photographs of one kind of file."""
    first = next(iter(photographs.values()))
    return {
        name: {key: spread([found[name][key] for found in photographs.values()]) for key in values}
        for name, values in first.items()
    }


def show(report: dict[str, Any]) -> None:
    """A table for each kind of photograph."""
    console = Console()
    for kind, formats in report["results"].items():
        title = f"{report['num_photographs'][kind]} {kind} photographs to {report['resolution']} px. VAE: {report['vae']}"
        table = Table(title=title, title_justify="left")
        table.add_column("stored as", no_wrap=True)
        for column in ("bytes/pixel", "PSNR", "worst", "difference", "greatest"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, found in formats.items():
            difference = [_percent(found["relative_rms"][key]) for key in ("median", "max")]
            table.add_row(name, *(_file_cells(found) if "psnr" in found else [""] * 3), *difference)
        console.print(table)
    console.print("PSNR in dB. Difference: RMS of latents, relative to their standard deviation. Medians and worst cases.")
    if report["is_random"]:
        console.print(
            "The VAE's weights are random, a stand-in: they rank the formats, but a trained VAE passes on another share of "
            "the difference. Give --model a Qwen-Image model for that."
        )


def _file_cells(found: dict[str, Any]) -> list[str]:
    decibels = [found["psnr"][key] for key in ("median", "min")]
    return [f"{found['bytes_a_pixel']['median']:.2f}", *("equal" if value is None else f"{value:.1f}" for value in decibels)]


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def machine() -> dict[str, Any]:
    """Facts without which the numbers mean nothing."""
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    return {"machine": platform.machine(), "cpu_count": os.cpu_count(), "python": platform.python_version(), **versions}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, metavar="DIR", required=True, help="a folder of photographs")
    parser.add_argument("--model", metavar="MODEL", help="a Qwen-Image model, a folder or a Hub id; random weights by default")
    parser.add_argument("--resolution", type=int, default=256, help="px; the bucket keeps this square's area")
    parser.add_argument("--count", type=int, default=4, help="photographs of each kind, JPEG and others; 0 means all")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    return parser.parse_args()


def main() -> None:
    """Measure JPEG photographs, whose detail was lossy before, and the others apart."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    vae = load_vae(options.model)
    kinds: dict[str, list[Path]] = {"JPEG": [], "lossless": []}
    for path in sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in SUFFIXES):
        kinds["JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "lossless"].append(path)
    found: dict[str, dict[str, Any]] = {}
    for kind, paths in kinds.items():
        for path in paths[: options.count or None]:
            started = time.perf_counter()
            found.setdefault(kind, {})[path.relative_to(options.photos).as_posix()] = compare(
                vae, path.read_bytes(), options.resolution, options.model is None
            )
            Console(stderr=True).print(f"{path.name}: {time.perf_counter() - started:.1f} s")
    flags = "".join(f" --{name} {getattr(options, name)}" for name in ("resolution", "count", "threads"))
    report = {
        "command": f"python benchmarks/latents.py --photos PHOTOS{' --model MODEL' if options.model else ''}{flags}",
        "machine": machine(),
        "vae": "Qwen-Image's" if options.model else "Qwen-Image's size, random weights",
        "is_random": options.model is None,
        "num_parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "resolution": options.resolution,
        "num_photographs": {kind: len(photographs) for kind, photographs in found.items()},
        "results": {kind: summary(photographs) for kind, photographs in found.items()},
    }
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
