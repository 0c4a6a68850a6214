"""What encoding costs beside the bare encoder, what its shortcuts gain, and what storing its results loses. Five parts:

- overhead: `encode_units`, from prepared shards to committed cache shards, against the family's encoder alone on the same
  batches, which lie in memory as tensors. The component is loaded, and both sides are warm.
- fold: the encoder folded for single frames against diffusers' own `vae.encode`, on the same pixels.
- prefix: `encode_texts`, which keeps the template's keys and values, against diffusers' `encode_prompt`, on the same captions.
- rounding: what the stored precisions do to the posterior and to the embeddings.
- decode: decoding pictures in threads, and in processes that hand arrays back through pipes.

Sides alternate within one process (A, B, B, A, ...). Each round gives one ratio; the median of the ratios is the answer.
Weights are random unless --model names a model. On a GPU there are absolute figures too; on a CPU, which others may use, not.

Shape legend: B batch, C channels, H W pixels, L text tokens, D text width.
"""

import os

# Waiting threads sleep. Else they spin, until the process has more OpenMP threads than cores: with ftk's writer it has, so that
# on a machine that others use too the bare encoder takes up to four times as long as the same encoder within ftk.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import io
import json
import platform
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from prepare import camera_like
from rich.console import Console
from rich.table import Table

import ftk.pipeline.stage
from ftk.cache import encode, plan
from ftk.configs.load import validate
from ftk.configs.schema import CacheConfig, ModelConfig, RunConfig
from ftk.models import base as models
from ftk.models.components.model_folder import locate
from ftk.models.qwen_image import TEMPLATE
from ftk.pipeline.dataset import PreparedDataset
from ftk.pipeline.engine import WorkerPool
from ftk.run import resolve

FAMILY = "qwen-image"
WORDS = re.findall("[a-z]+", TEMPLATE.partition("Describe")[2].partition("<")[0])
"""Each is one token, of the tiny model's tokenizer as of the real one's."""
CAPTION_TOKENS = (20, 60, 200)
# What is computed in, where --dtype does not say. On a CPU tfloat32 is float32; of texts there is no tfloat32.
DTYPES = {
    ("latents", "cpu"): ("float32", "bfloat16"),
    ("latents", "cuda"): ("float32", "tfloat32", "bfloat16"),
    ("texts", "cpu"): ("float32", "bfloat16"),
    ("texts", "cuda"): ("float32", "bfloat16"),
}
STORED = {"latents": ("float16", "bfloat16", "float32"), "texts": ("float16", "bfloat16")}
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MEGAPIXEL = (1024, 1024)
FILES = {
    "JPEG": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    "PNG": {"format": "PNG"},
}
WORKERS = (1, 2)
EDGE_PX = {"cpu": 256, "cuda": 1024}
LIBRARIES = ("ftk", "torch", "diffusers", "transformers", "pillow", "numpy", "safetensors")

# The language model of Qwen2.5-VL 7B, and one of 180 M parameters whose head takes as large a share of the work.
TEXT_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
TEXT_MID = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 12, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 16640,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}  # fmt: skip
TEXT_PARAMETERS = {"cpu": (175e6, 185e6), "cuda": (6.4e9, 6.6e9)}

Side = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much `overhead` encodes a round; a batch is None where memory decides, as it does in `ftk cache`."""

    images: int
    texts: int
    image_batch: int | None = None
    text_batch: int | None = None


LOADS = {
    # Small batches: with those that 1 GiB allows, a round that lasts seconds would have but one.
    ("full", "cpu"): Load(images=4, texts=16, image_batch=1, text_batch=4),
    ("full", "cuda"): Load(images=128, texts=512),
    ("tiny", "cpu"): Load(images=64, texts=192),
    ("tiny", "cuda"): Load(images=512, texts=1024),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A component: its kind, size, precision and device, and the folder of a real model, or of the tiny one."""

    kind: str
    size: str
    dtype: str
    device: torch.device
    directory: Path
    is_random: bool

    @property
    def family(self) -> Any:
        return models.get(FAMILY)

    @property
    def loader_name(self) -> str:
        """The family's method."""
        return "load_vae" if self.kind == "latents" else "load_text_encoder"

    @property
    def encoder_name(self) -> str:
        """The family's method."""
        return "encode_images" if self.kind == "latents" else "encode_texts"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.dtype == "tfloat32" else getattr(torch, self.dtype)

    def convolutions(self) -> AbstractContextManager[None]:
        """The rules that `ftk cache` sets for a GPU's convolutions: each side is measured under them."""
        return torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=self.dtype == "tfloat32"
        )

    def load(self) -> Any:
        """As the family loads it, so with all that it changes in it; random weights of full size come from no file."""
        loader, dtype = getattr(self.family, self.loader_name), self.torch_dtype
        if self.size == "tiny" or not self.is_random:
            return loader(self.directory, dtype, self.device)
        component = random_vae(dtype) if self.kind == "latents" else random_text_model(dtype, self.device)
        with patch.object(type(component), "from_pretrained", return_value=component):
            return loader(self.directory, dtype, self.device)


def random_vae(dtype: torch.dtype) -> Any:
    """Qwen-Image's architecture: it is the class's default."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    return cast(AutoencoderKLQwenImage(), dtype)


def random_text_model(dtype: torch.dtype, device: torch.device) -> Any:
    """Made on the device; a CPU gets the one of 180 M parameters. The part that sees images is the tiny model's."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={**(TEXT_MID if device.type == "cpu" else TEXT_7B), "bos_token_id": None, "eos_token_id": None},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    layers = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    low, high = TEXT_PARAMETERS[device.type]
    assert low <= layers <= high, f"{layers:,} parameters in layers, not {low:,.0f} to {high:,.0f}"
    return cast(model, dtype)


def cast(component: Any, dtype: torch.dtype) -> Any:
    """As from a file: what is no parameter, the RoPE frequencies, stays in fp32."""
    for parameter in component.parameters():
        parameter.data = parameter.data.to(dtype)
    return component


# Running sides in turn.


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one turn of one side took; CPU time is of all threads, memory is on a GPU, beyond what was there before."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


def race(sides: Mapping[str, Side], rounds: int, device: torch.device, before: Side = gc.collect) -> dict[str, list[Spent]]:
    """Every side once a round, forth and back, after one turn that does not count; `before` is called ahead of each turn."""
    spent: dict[str, list[Spent]] = {name: [] for name in sides}
    for side in sides.values():
        before()
        side()
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            before()
            spent[name].append(turn(sides[name], device))
    return spent


def turn(side: Side, device: torch.device) -> Spent:
    """Ends when the device has done what was asked of it."""
    held = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    cpu, started = time.process_time(), time.perf_counter()
    side()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Spent(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        peak_bytes=torch.cuda.max_memory_allocated() - held if device.type == "cuda" else None,
    )


def ratios(spent: Mapping[str, Sequence[Spent]], above: str, below: str, field: str = "seconds") -> dict[str, Any]:
    """Of one side's turns to the other's in the same rounds."""
    found = [getattr(a, field) / getattr(b, field) for a, b in zip(spent[above], spent[below], strict=True)]
    return {**spread(found), "rounds": found}


def absolute(spent: Mapping[str, Sequence[Spent]], count: int, device: torch.device) -> dict[str, Any]:
    """By side: items a second, seconds a round and the most memory, on a GPU; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        name: {
            "items_a_second": spread([count / each.seconds for each in turns]),
            "seconds_a_round": spread([each.seconds for each in turns]),
            "peak_bytes": max(each.peak_bytes or 0 for each in turns),
        }
        for name, turns in spent.items()
    }


def resident_peak(side: Side) -> int | None:
    """By how much one turn raises this process's resident memory; None where the system does not tell (Linux does)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what the turn before gave back is used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status_bytes(status, "VmRSS")
    side()
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# Pictures and captions.


def photographs(size: tuple[int, int], count: int, **options: Any) -> list[bytes]:
    """Files of drawn scenes with the detail of photographs."""
    files = []
    for picture in camera_like(size, count):
        file = io.BytesIO()
        picture.save(file, **options)
        files.append(file.getvalue())
    return files


def captions(count: int, tokens: Sequence[int]) -> list[str]:
    """Each of one of these lengths, give or take a quarter; all different, the same every time."""
    generator = np.random.default_rng(0)
    made: list[str] = []
    for number in range(count):
        length = round(tokens[number % len(tokens)] * generator.uniform(0.75, 1.25))
        made.append(" ".join(generator.choice(WORDS, length)))
    assert len(set(made)) == count
    return made


def pixels_of(files: Sequence[bytes], edge: int, device: torch.device) -> torch.Tensor:
    """[B,3,edge,edge] in [-1, 1], in this order in memory: convolutions keep to the order that they are given."""
    arrays = []
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            arrays.append(np.asarray(ImageOps.fit(image.convert("RGB"), (edge, edge), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1).to(device)


# Part: overhead.


def overhead(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """All sizes and kinds asked for, in the precision that `ftk cache` takes by itself unless told otherwise."""
    found, usual = [], CacheConfig()
    for size in options.size:
        for kind, dtype in (("latents", usual.vae_dtype), ("texts", usual.text_dtype)):
            for setting in settings(options, size, directory, kind, (dtype,)):
                with tempfile.TemporaryDirectory(prefix="ftk-bench-", dir=options.directory) as folder:
                    found.append(overhead_of(setting, options, Path(folder)))
                encode.release()
    return found


def overhead_of(setting: Setting, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`encode_units` against the bare encoder on the batches that it makes."""
    job = encoding_job(setting, folder)
    component = setting.load()
    units = (picture_units if setting.kind == "latents" else text_units)(setting, options, folder)
    count = sum(len(unit.items) for unit in units)

    def through_ftk() -> None:
        done = list(encode.encode_units(job, units, lambda *_: None))
        assert sum(one.num_items for one in done) == count

    # Of the class: a job makes a family of its own, with the settings of its run file.
    with patch.object(type(setting.family), setting.loader_name, lambda *_: component), setting.convolutions():
        batches = recorded(setting, through_ftk)
        assert sum(len(batch) for batch in batches) == count, "a batch was halved: the device has too little memory"
        encoder = getattr(setting.family, setting.encoder_name)

        def bare() -> None:
            for batch in batches:
                encoder(component, batch)

        def fresh() -> None:
            shutil.rmtree(job.folder, ignore_errors=True)
            gc.collect()

        spent = race({"ftk": through_ftk, "bare": bare}, options.rounds, setting.device, fresh)
    return {
        **about(setting),
        "edge_px": units[0].items[0].width if setting.kind == "latents" else None,
        "items": count,
        "batches": len(batches),
        "shards": len(units),
        "ratio": ratios(spent, "ftk", "bare"),
        "cpu_time_ratio": ratios(spent, "ftk", "bare", "cpu_seconds"),
        "sides": absolute(spent, count, setting.device),
    }


def encoding_job(setting: Setting, folder: Path) -> encode.EncodeJob:
    """What `ftk cache` would make of a run file that names this setting."""
    load = LOADS[setting.size, setting.device.type]
    cache = {
        "vae_dtype" if setting.kind == "latents" else "text_dtype": setting.dtype,
        "device": setting.device.type,
        "image_batch": load.image_batch,
        "text_batch": load.text_batch,
    }
    return encode.EncodeJob(
        kind=setting.kind,
        base=ModelConfig(family=FAMILY, path=str(setting.directory)),
        model=setting.directory,
        folder=folder / "cache",
        prepared=folder / "work" / "prepared",
        config=CacheConfig.model_validate(cache),
        workers=0,
    )


def picture_units(setting: Setting, options: argparse.Namespace, folder: Path) -> list[plan.Unit[plan.ImageItem]]:
    """JPEG files of the bucket's size through `ftk prepare`; two shards, so that one is written while another is encoded."""
    edge, count = (
        options.edge or EDGE_PX[setting.device.type],
        options.images or LOADS[setting.size, setting.device.type].images,
    )
    (folder / "pictures").mkdir()
    for number, file in enumerate(photographs((edge, edge), count, **FILES["JPEG"])):
        (folder / "pictures" / f"{number:04d}.jpg").write_bytes(file)
        (folder / "pictures" / f"{number:04d}.txt").write_text("a picture")
    tree = {
        "run": "bench",
        "workspace": str(folder / "work"),
        "model": {"family": FAMILY, "path": "unused"},
        "data": {"sources": [{"path": str(folder / "pictures")}], "resolutions": [edge]},
    }
    run = resolve(validate(RunConfig, tree, "the benchmark's run file"))
    ftk.pipeline.stage.run(run)
    pictures = list(plan.needed_pictures(PreparedDataset.open(run.paths.prepared).tables(), run.needs))
    assert len(pictures) == count
    assert {(each.width, each.height) for each in pictures} == {(edge, edge)}
    return list(plan.units(pictures, lambda _: 1, -(-count // 2), ()))


def text_units(setting: Setting, options: argparse.Namespace, _folder: Path) -> list[plan.Unit[plan.TextItem]]:
    """Captions of all lengths, the empty one among them; two shards too."""
    count = options.texts or LOADS[setting.size, setting.device.type].texts
    texts = list(plan.needed_texts(pa.chunked_array([[captions(count - 1, CAPTION_TOKENS)]]), (), ""))
    return list(plan.units(texts, lambda _: 1, -(-count // 2), ()))


def recorded(setting: Setting, side: Side) -> list[Any]:
    """The batches, pixels or captions, with which a turn of ftk's side calls the family."""
    original, batches = getattr(setting.family, setting.encoder_name), []

    def recording(_family: Any, component: Any, batch: Any) -> Any:
        batches.append(batch)
        return original(component, batch)

    with patch.object(type(setting.family), setting.encoder_name, recording):
        side()
    return batches


# Part: fold.


def fold(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """In every precision; the images of a round are one batch."""
    device = torch.device(options.device)
    edge, count = options.edge or EDGE_PX[device.type], options.images or {"cpu": 1, "cuda": 8}[device.type]
    pixels_BCHW = pixels_of(photographs((edge, edge), count, **FILES["PNG"]), edge, device)
    chosen = list(settings(options, options.size[0], directory, "latents"))
    exact = plain_posterior(unfolded(replace(chosen[0], dtype="float64")), pixels_BCHW)
    found = []
    for setting in chosen:
        with setting.convolutions():
            found.append(fold_of(setting, options.rounds, pixels_BCHW, exact))
    return found


def fold_of(
    setting: Setting, rounds: int, pixels_BCHW: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """The same weights, folded and as they were; `exact` is what they give in fp64."""
    plain, folded = unfolded(setting), setting.load()
    sides: dict[str, Side] = {
        "folded": lambda: setting.family.encode_images(folded, pixels_BCHW),
        "diffusers": lambda: plain_posterior(plain, pixels_BCHW),
    }
    spent = race(sides, rounds, setting.device)
    if setting.device.type == "cuda":
        peaks: dict[str, int | None] = {name: max(each.peak_bytes or 0 for each in turns) for name, turns in spent.items()}
    else:
        peaks = {name: resident_peak(side) for name, side in sides.items()}
    results = {name: side() for name, side in sides.items()}
    pairs = {"between": (results["folded"], results["diffusers"])} | {name: (found, exact) for name, found in results.items()}
    return {
        **about(setting),
        "edge_px": pixels_BCHW.shape[-1],
        "items": len(pixels_BCHW),
        "times_faster": ratios(spent, "diffusers", "folded"),
        "times_less_cpu_time": ratios(spent, "diffusers", "folded", "cpu_seconds"),
        "differences": {
            name: {"mean": largest(found[0] - other[0], other[0]), "std": largest(found[1] - other[1], other[1])}
            for name, (found, other) in pairs.items()
        },
        "peak_bytes": peaks,
        "sides": absolute(spent, len(pixels_BCHW), setting.device),
    }


def plain_posterior(vae: Any, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of diffusers' own encoder, normalised."""
    with torch.inference_mode():
        found = vae.encode(pixels_BCHW[:, :, None].to(vae.dtype)).latent_dist
        shift, scale = (
            torch.tensor(vae.config[name], device=vae.device).view(-1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        wide = torch.promote_types(vae.dtype, torch.float32)
        return (found.mean[:, :, 0].to(wide) - shift) / scale, found.std[:, :, 0].to(wide) / scale


def unfolded(setting: Setting) -> Any:
    """The VAE as diffusers loads it."""
    from diffusers import AutoencoderKLQwenImage

    if setting.size == "full" and setting.is_random:
        vae = random_vae(setting.torch_dtype)
    else:
        vae = AutoencoderKLQwenImage.from_pretrained(setting.directory / "vae", dtype=setting.torch_dtype)
    return vae.requires_grad_(False).eval().to(setting.device)


def largest(differences: torch.Tensor, values: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float(differences.abs().max() / values.abs().max())


# Part: prefix.


def prefix(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """In every precision and of every length; the captions of a round are one batch."""
    count = options.texts or {"cpu": 2, "cuda": 32}[options.device]
    batches = [captions(count, [tokens]) for tokens in CAPTION_TOKENS]
    chosen = list(settings(options, options.size[0], directory, "texts"))
    reference = replace(chosen[0], dtype="float32").load()
    exact = [diffusers_embeds(reference, batch) for batch in batches]
    del reference
    found = []
    for setting in chosen:
        encoder = setting.load()
        found += [prefix_of(setting, encoder, pair, options.rounds) for pair in zip(batches, exact, strict=True)]
    return found


def prefix_of(setting: Setting, encoder: Any, pair: tuple[list[str], list[torch.Tensor]], rounds: int) -> dict[str, Any]:
    """Captions of one length, give or take a quarter; a third side shows what of it the head and the prefix take.

    `pair` is the captions, and what diffusers makes of them in fp32.
    """
    batch, exact = pair
    sides: dict[str, Side] = {
        "ftk": lambda: setting.family.encode_texts(encoder, batch),
        "no head": lambda: without_head(encoder, batch),
        "diffusers": lambda: diffusers_embeds(encoder, batch),
    }
    spent = race(sides, rounds, setting.device)
    theirs, own = sides["diffusers"](), [item["embeds"].float() for item in sides["ftk"]()]
    pairs = {"between": (own, theirs), "ftk": (own, exact), "diffusers": (theirs, exact)}
    return {
        **about(setting),
        "tokens": spread([len(row) for row in own]),
        "items": len(batch),
        "times_faster": ratios(spent, "diffusers", "ftk"),
        "times_less_cpu_time": ratios(spent, "diffusers", "ftk", "cpu_seconds"),
        "times_less_cpu_time_than_no_head": ratios(spent, "no head", "ftk", "cpu_seconds"),
        "times_faster_than_no_head": ratios(spent, "no head", "ftk"),
        "differences": {
            name: largest(torch.cat(found) - torch.cat(other), torch.cat(other)) for name, (found, other) in pairs.items()
        },
        "sides": absolute(spent, len(batch), setting.device),
    }


def diffusers_embeds(encoder: Any, batch: list[str]) -> list[torch.Tensor]:
    """[L,D] of each caption, without its padding."""
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(
        scheduler=None, vae=None, text_encoder=encoder.model, tokenizer=encoder.tokenizer, transformer=None
    )
    with torch.inference_mode():
        embeds_BLD, mask_BL = pipeline.encode_prompt(batch, device=encoder.model.device)
    lengths = [embeds_BLD.shape[1]] * len(batch) if mask_BL is None else mask_BL.sum(dim=1).tolist()
    return [row[:length].float() for row, length in zip(embeds_BLD, lengths, strict=True)]


def without_head(encoder: Any, batch: list[str]) -> torch.Tensor:
    """The model on template and captions, with neither logits nor the states of all layers."""
    rows = encoder.tokenizer([TEMPLATE.format(caption) for caption in batch], padding=True, return_tensors="pt")
    with torch.inference_mode():
        return encoder.model.model(**rows.to(encoder.model.device)).last_hidden_state


# Part: rounding.


def rounding(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Latents of photographs, then texts. Computed in fp32; what computing in less changes stands beside it."""
    found = []
    for kind, measured in (("latents", rounded_latents), ("texts", rounded_texts)):
        if chosen := list(settings(options, options.size[0], directory, kind)):
            found += measured(chosen, options)
    return found


def rounded_latents(chosen: Sequence[Setting], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors of the mean and of the std, also in units of the std itself, from which training draws."""
    edge = options.edge or EDGE_PX[options.device]
    if options.photos:
        paths = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
        files = [path.read_bytes() for path in paths[: options.images]]
    else:
        files = photographs((edge, edge), options.images or 8, **FILES["PNG"])
    pixels = pixels_of(files, edge, chosen[0].device).split(1)
    mean, std = posterior(chosen[0], pixels)
    found = {f"stored {dtype}": stored((mean, std), dtype) for dtype in STORED["latents"]}
    found |= {f"computed {setting.dtype}": posterior(setting, pixels) for setting in chosen[1:]}
    return [
        {
            **about(chosen[0]),
            "edge_px": edge,
            "items": len(files),
            "what": what,
            "mean": errors(own_mean, mean),
            "std": errors(own_std, std),
            "mean_in_stds": {
                "rms": rms((own_mean - mean) / std),
                "largest": float(((own_mean - mean) / std).abs().max()),
            },
        }
        for what, (own_mean, own_std) in found.items()
    ]


def rounded_texts(chosen: Sequence[Setting], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors of the embeddings, of captions of all lengths."""
    batch = captions(options.texts or 12, CAPTION_TOKENS)
    embeds = embeddings(chosen[0], batch)
    found = {f"stored {dtype}": stored((embeds,), dtype)[0] for dtype in STORED["texts"]}
    found |= {f"computed {setting.dtype}": embeddings(setting, batch) for setting in chosen[1:]}
    return [
        {**about(chosen[0]), "items": len(batch), "what": what, "embeds": errors(own, embeds)} for what, own in found.items()
    ]


def posterior(setting: Setting, pixels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of all images."""
    vae = setting.load()
    with setting.convolutions():
        means, stds = zip(*(setting.family.encode_images(vae, one) for one in pixels), strict=True)
    return torch.cat(means), torch.cat(stds)


def embeddings(setting: Setting, batch: Sequence[str]) -> torch.Tensor:
    """[L,D] of all captions, one after another."""
    encoder = setting.load()
    return torch.cat([item["embeds"].float() for item in setting.family.encode_texts(encoder, batch)])


def stored(tensors: Sequence[torch.Tensor], dtype: str) -> tuple[torch.Tensor, ...]:
    """As they come back from storage."""
    return tuple(tensor.to(getattr(torch, dtype)).float() for tensor in tensors)


def errors(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """RMS relative to that of the values, the largest error, and the shares of values that overflowed or became zero."""
    finite = torch.isfinite(found)
    differences = (found - exact)[finite]
    return {
        "relative_rms": rms(differences) / rms(exact),
        "largest": float(differences.abs().max()),
        "largest_value": float(exact.abs().max()),
        "share_overflowed": float((~finite).double().mean()),
        "share_flushed_to_zero": float(((found == 0) & (exact != 0)).double().mean()),
    }


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


# Part: decode.


def decode(options: argparse.Namespace, _directory: Path) -> list[dict[str, Any]]:
    """Pictures of a megapixel, read from files, with one and two workers of either sort."""
    return [decode_of(kind, options) for kind in FILES]


def decode_of(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Files of one kind; the workers are up and warm."""
    files = photographs(MEGAPIXEL, options.images or 32, **FILES[kind])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ftk-bench-", dir=options.directory)))
        for number, file in enumerate(files):
            (folder / f"{number:04d}").write_bytes(file)
        paths = sorted(folder.iterdir())
        sides: dict[str, Side] = {}
        for workers in WORKERS:
            threads = stack.enter_context(ThreadPoolExecutor(workers))
            pool = stack.enter_context(WorkerPool(workers, seconds=120, memory_bytes=4 << 30))
            sides[f"threads {workers}"] = functools.partial(drain, threads.map, paths)
            sides[f"processes {workers}"] = functools.partial(drain, pool.map, paths)
        spent = race(sides, options.rounds, torch.device("cpu"))
    return {
        "kind": kind,
        "items": len(files),
        "mean_bytes": statistics.mean(len(file) for file in files),
        "images_a_second": {name: spread([len(files) / each.seconds for each in turns]) for name, turns in spent.items()},
        "times_one_thread": {name: ratios(spent, "threads 1", name) for name in sides},
        "threads_to_processes": {
            str(workers): ratios(spent, f"processes {workers}", f"threads {workers}") for workers in WORKERS
        },
    }


def drain(mapped: Callable[..., Iterator[Any]], paths: Sequence[Path]) -> None:
    """Take every picture, as whoever stacks them into a batch does."""
    for pixels_HWC in mapped(decoded, paths):
        assert isinstance(pixels_HWC, np.ndarray), pixels_HWC


def decoded(path: Path) -> np.ndarray:
    """Height, width, RGB; as `ftk cache` decodes."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return np.asarray(image.convert("RGB"))


PARTS: dict[str, Callable[[argparse.Namespace, Path], list[dict[str, Any]]]] = {
    "overhead": overhead, "fold": fold, "prefix": prefix, "rounding": rounding, "decode": decode,
}  # fmt: skip


# Settings, and reporting.


def settings(
    options: argparse.Namespace, size: str, directory: Path, kind: str, dtypes: Sequence[str] = ()
) -> Iterator[Setting]:
    """One for each precision that is asked for, or else for each of `dtypes` or of `DTYPES`; none if `kind` is not wanted."""
    if kind not in options.kind:
        return
    for dtype in options.dtype or dtypes or DTYPES[kind, options.device]:
        if (kind, dtype) != ("texts", "tfloat32"):
            yield Setting(
                kind=kind,
                size=size,
                dtype=dtype,
                device=torch.device(options.device),
                directory=directory,
                is_random=not options.model,
            )


def about(setting: Setting) -> dict[str, Any]:
    """What a result is of."""
    return {
        "kind": setting.kind,
        "size": setting.size,
        "weights": "random" if setting.is_random else "real",
        "device": setting.device.type,
        "dtype": setting.dtype,
    }


@contextmanager
def model_directory(options: argparse.Namespace) -> Iterator[Path]:
    """The folder of the model, or a temporary one with the tiny model in it."""
    family = models.get(FAMILY)
    if options.model:
        components = (*family.latent_components, *family.text_components)
        yield locate(family, ModelConfig(family=FAMILY, path=options.model), components, Path(tempfile.gettempdir()))
        return
    with tempfile.TemporaryDirectory(prefix="ftk-bench-", dir=options.directory) as folder:
        family.tiny(Path(folder))
        yield Path(folder)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Facts without which the numbers mean nothing. `load`: tasks that ran or waited in the last minute, before the start."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
    }


Cells = Callable[[dict[str, Any]], list[str]]


def ranged(values: Mapping[str, float]) -> list[str]:
    """Median, and least to greatest."""
    return [f"{values['median']:.3f}", f"{values['min']:.3f}-{values['max']:.3f}"]


def overhead_cells(found: dict[str, Any]) -> list[str]:
    name = f"{found['kind']}, {found['size']}, {found['dtype']}"
    ours = found["sides"].get("ftk")
    speed = [f"{ours['items_a_second']['median']:,.1f}", f"{ours['peak_bytes'] / 2**30:,.2f}"] if ours else ["", ""]
    return [name, *ranged(found["ratio"]), *ranged(found["cpu_time_ratio"]), *speed]


def fold_cells(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['dtype']}, {found['items']} x {found['edge_px']} px",
        *ranged(found["times_faster"]),
        *ranged(found["times_less_cpu_time"]),
        *(f"{max(found['differences'][name].values()):.1e}" for name in ("between", "folded", "diffusers")),
        *("" if peak is None else f"{peak / 2**20:,.0f}" for peak in found["peak_bytes"].values()),
    ]


def prefix_cells(found: dict[str, Any]) -> list[str]:
    name = f"{found['dtype']}, {found['items']} of {found['tokens']['min']:.0f}-{found['tokens']['max']:.0f} tokens"
    keys = ("times_faster", "times_less_cpu_time")
    return [
        name,
        *(cell for key in keys for cell in ranged(found[key])),
        *(f"{found[f'{key}_than_no_head']['median']:.3f}" for key in keys),
        *(f"{difference:.1e}" for difference in found["differences"].values()),
    ]


def rounding_cells(found: dict[str, Any]) -> list[str]:
    main = found["mean"] if found["kind"] == "latents" else found["embeds"]
    cells = [f"{found['kind']}, {found['what']}", f"{main['relative_rms']:.1e}", f"{main['largest']:.1e}"]
    if found["kind"] == "texts":
        return [*cells, "", "", "", _outside(main) if found["what"].startswith("stored") else ""]
    units = found["mean_in_stds"]
    own = [f"{found['std']['relative_rms']:.1e}", f"{units['rms']:.1e}", f"{units['largest']:.1e}"]
    return [*cells, *own, _outside(main, found["std"]) if found["what"].startswith("stored") else ""]


def _outside(*tensors: Mapping[str, float]) -> str:
    return f"{max(found['share_overflowed'] + found['share_flushed_to_zero'] for found in tensors):.1e}"


def decode_cells(found: dict[str, Any]) -> list[str]:
    sides = [cell for name in list(found["times_one_thread"])[1:] for cell in ranged(found["times_one_thread"][name])]
    return [
        f"{found['kind']}, {found['mean_bytes'] / 1000:,.0f} KB",
        f"{found['images_a_second']['threads 1']['median']:.1f}",
        *sides,
    ]


TABLES: dict[str, tuple[list[str], Cells, str]] = {
    "overhead": (
        ["ftk / bare", "range", "CPU time", "range", "items/s", "peak GiB"],
        overhead_cells,
        "1.02: ftk takes 2 % longer. Absolute figures are of ftk, on a GPU. Fixed costs of a run are spread over few items.",
    ),
    "fold": (
        ["× faster", "range", "CPU time", "range", "difference", "error", "theirs", "MiB", "theirs"],
        fold_cells,
        "Difference: of the two, largest of mean or std, of the largest value. Error: the same, from diffusers in fp64. "
        "MiB: peak of working memory, weights left out.",
    ),
    "prefix": (
        ["× faster", "range", "CPU time", "range", "no head", "CPU time", "difference", "error", "theirs"],
        prefix_cells,
        "Times diffusers' encode_prompt; no head: times the model alone, on the same tokens. Difference: the largest, of the "
        "largest value. Error: the same, from diffusers in fp32.",
    ),
    "rounding": (
        ["relative RMS", "largest", "RMS of std", "RMS in stds", "largest", "lost"],
        rounding_cells,
        "Lost: share that overflowed or became zero. With random weights the std is near 1; a trained VAE's is far smaller, "
        "and errors in units of it as much larger.",
    ),
    "decode": (
        ["images/s", "processes 1", "range", "threads 2", "range", "processes 2", "range"],
        decode_cells,
        "Images a second of one thread, and times that; pictures of a megapixel.",
    ),
}


def show(part: str, report: dict[str, Any]) -> None:
    """One row a result."""
    columns, cells, note = TABLES[part]
    table = Table(title=part, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for found in report["results"]:
        table.add_row(*cells(found))
    console = Console(width=max(Console().width, 140))
    console.print(table)
    console.print(f"{note} Tasks that ran or waited in the minute before the start: {report['machine']['load']:.1f}.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument(
        "--size", choices=("tiny", "full"), action="append", help="full by default; overhead: may be given twice"
    )
    parser.add_argument(
        "--kind", choices=("latents", "texts"), action="append", help="of overhead and rounding; both by default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES["latents", "cuda"], action="append", help="precision that is computed in; may be given twice"
    )
    parser.add_argument("--edge", type=int, help="px, of square images; 256 on a CPU, 1024 on a GPU by default")
    parser.add_argument("--images", type=int, help="images a round, of rounding in all")
    parser.add_argument("--texts", type=int, help="captions a round, of rounding in all")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2, help="torch's CPU threads")
    parser.add_argument("--model", metavar="MODEL", help="a Qwen-Image model, a folder or a Hub id; random weights by default")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photographs for rounding; drawn pictures by default")
    parser.add_argument("--directory", metavar="DIR", help="where data are put for the time being, on a local disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    options = parser.parse_args()
    options.size = options.size or ["full"]
    options.kind = options.kind or ["latents", "texts"]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if options.part == "rounding" and options.dtype:
        parser.error("rounding takes all precisions")
    if options.part in ("fold", "prefix") and len(options.kind) == 1:
        parser.error(f"{options.part} is of one kind by itself")
    return options


def shown_command(options: argparse.Namespace) -> str:
    """What to type for the same measurement, without the folders."""
    shown = [f"python benchmarks/cache.py {options.part}"]
    for name in ("size", "kind", "dtype"):
        shown += [f"--{name} {value}" for value in getattr(options, name) or ()]
    for name in ("device", "edge", "images", "texts", "rounds", "threads"):
        if getattr(options, name) is not None:
            shown.append(f"--{name} {getattr(options, name)}")
    shown += [f"--{name} {name.upper()}" for name in ("model", "photos") if getattr(options, name)]
    return " ".join(shown)


def main() -> None:
    """Measure the part that was asked for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"command": shown_command(options), "machine": machine(options)}
    with model_directory(options) as directory:
        report["results"] = PARTS[options.part](options, directory)
    show(options.part, report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
