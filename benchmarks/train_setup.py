"""What the benchmarks of `ftk train` share: models of three sizes, caches that nothing was encoded for, facts of the machine.

Shape legend: C latent channels, h w latent cells, L text tokens, D text width.
"""

import importlib.metadata
import itertools
import os
import platform
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import QwenImageTransformer2DModel
from read import item_id, samples_table, write_cache

from ftk.cache import fingerprint, shards, view
from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.models import base as models
from ftk.pipeline import dataset as prepared
from ftk.run import Run, resolve

FAMILY = "qwen-image"
RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LEARNING_RATE = 1e-4
LIBRARIES = ("ftk", "torch", "diffusers", "peft", "numpy", "pyarrow", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A denoiser, and the samples that it is trained on: buckets in px, and from how many to how many text tokens.

    `parameters` bounds the denoiser's size.
    """

    transformer: dict[str, Any]
    buckets: Sequence[tuple[int, int]]
    text_tokens: tuple[int, int]
    parameters: tuple[float, float]

    @property
    def text_width(self) -> int:
        """D."""
        return int(self.transformer.get("joint_attention_dim", 3584))


_TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (8, 4, 4),
    "joint_attention_dim": 16,
}
_MID = {"num_layers": 9, "num_attention_heads": 6, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
SIZES = {
    "tiny": Size(transformer=_TINY, buckets=((128, 128), (96, 160), (160, 96)), text_tokens=(20, 60), parameters=(5e4, 2e5)),
    "mid": Size(transformer=_MID, buckets=((256, 256), (192, 320), (320, 192)), text_tokens=(20, 60), parameters=(45e6, 55e6)),
    # Samples of Qwen-Image's own size: 1024 px, texts of 200 tokens.
    "samples": Size(
        transformer={**_TINY, "joint_attention_dim": 3584},
        buckets=((1024, 1024),),
        text_tokens=(200, 200),
        parameters=(5e4, 5e5),
    ),
    # As small as the family takes them, for caches of a million.
    "many": Size(transformer=_TINY, buckets=((32, 32), (48, 32), (32, 48)), text_tokens=(8, 32), parameters=(5e4, 2e5)),
    "full": Size(transformer={}, buckets=((1024, 1024), (512, 512)), text_tokens=(200, 200), parameters=(20e9, 21e9)),
}


def make_workspace(root: Path, size: Size, *, num_samples: int, train: dict[str, Any], items_a_shard: int = 250) -> Run:
    """A model with random weights and a sealed cache of noise, as `ftk train` expects them; no stage has run.

    The model has no VAE and no text encoder: a training machine needs none.
    """
    family: Any = models.get(FAMILY)
    family.tiny(root / "model")
    for folder in ("vae", "text_encoder", "tokenizer", "transformer"):
        shutil.rmtree(root / "model" / folder)
    random_transformer(size, torch.float32, torch.device("cpu")).save_pretrained(root / "model" / "transformer")
    run = make_run(root, train)
    make_cache(root / "cache", run, size, num_samples, items_a_shard)
    return run


def make_run(root: Path, train: dict[str, Any]) -> Run:
    """The run of a workspace that `make_workspace` made."""
    tree = {
        "run": "benchmark",
        "workspace": str(root),
        "model": {"family": FAMILY, "path": str(root / "model")},
        "data": {"sources": [{"path": str(root / "pictures")}]},
        "method": {"name": "lora", "rank": RANK, "targets": "attention"},
        "train": {"learning_rate": LEARNING_RATE, "max_grad_norm": 1.0, "device": "cpu", "precision": "fp32", **train},
    }
    return resolve(validate(RunConfig, tree, "the benchmark's run file"))


def make_cache(folder: Path, run: Run, size: Size, num_samples: int, items_a_shard: int) -> None:
    """A cache of `num_samples` that passes for one that the run made. Buckets and text lengths take turns."""
    family = run.family
    low, high = size.text_tokens
    lengths = np.random.default_rng(0).integers(low, high + 1, num_samples).tolist()
    sides = [size.buckets[number % len(size.buckets)] for number in range(num_samples)]
    shapes = (
        (family.geometry.channels, side[1] // family.geometry.factor, side[0] // family.geometry.factor) for side in sides
    )
    pictures = (
        (item_id("latents", number), {"mean": noise(number, *shape), "std": noise(number + 1, *shape).abs()})
        for number, shape in enumerate(shapes)
    )
    empty = (item_id("empty", 0), {"embeds": noise(0, 5, size.text_width).bfloat16()})
    texts = (
        (item_id("texts", number), {"embeds": noise(number, length, size.text_width).bfloat16()})
        for number, length in enumerate(lengths)
    )
    table = samples_table(num_samples, lengths)
    ones = [1] * num_samples
    for name, values in (("bucket_width", [w for w, _ in sides]), ("bucket_height", [h for _, h in sides]), ("repeats", ones)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.int32()))
    counts = dict.fromkeys(shards.KINDS, items_a_shard)
    write_cache(folder, {"latents": pictures, "texts": itertools.chain([empty], texts)}, counts, table)
    _say_that_this_run_made_it(folder, run)


def _say_that_this_run_made_it(folder: Path, run: Run) -> None:
    """Commit the view again, with the facts by which training knows a stale cache."""
    manifest = view.read_manifest(folder)
    assert manifest is not None
    facts = {name: getattr(manifest, name) for name in ("family", "latents_fingerprint", "texts_fingerprint", "empty_text")}
    facts |= {"normalisation": {}, "prompts": {}, "prepared_fingerprint": "", "prepared_recipe": prepared.recipe(run.config)}
    facts["encoders"] = {kind: fingerprint.encoder_parts(kind, run, None) for kind in shards.KINDS}
    view.commit(folder, view.read_tables(folder, manifest), facts)


_NOISE = torch.randn(2**21, generator=torch.Generator().manual_seed(0)).half()


def noise(number: int, *shape: int) -> torch.Tensor:
    """Normal numbers in fp16, others for each number; cut from one piece, since a million generators take minutes."""
    count = int(np.prod(shape))
    start = number * 7919 % (len(_NOISE) - count)
    return _NOISE[start : start + count].reshape(shape).clone()


def random_transformer(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights by torch's own rules, made on the device and in the dtype they stay in; their number is asserted."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            transformer = QwenImageTransformer2DModel(**size.transformer)
    finally:
        torch.set_default_dtype(default)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    low, high = size.parameters
    assert low <= count <= high, f"{count:,} parameters, not {low:,.0f} to {high:,.0f}"
    return transformer


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread_text(values: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """Median, and the range in brackets."""
    median, low, high = (f"{values[key] * scale:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def taking_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): all names in each round, each time another first, and every second round backwards."""
    for number in range(rounds):
        first = number // 2 % len(names)
        turned = [*names[first:], *names[:first]]
        yield from ((number, name) for name in (reversed(turned) if number % 2 else turned))


def machine(device: torch.device) -> dict[str, Any]:
    """Facts without which the numbers mean nothing. `load`: tasks that ran or waited in the minute before."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    facts = {
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    return {**facts, **{library: importlib.metadata.version(library) for library in LIBRARIES}}
