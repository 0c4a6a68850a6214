"""What ftk's training loop costs: its step time against a plain torch loop with the same model, shapes and optimizer.

Blocks of steps alternate (ftk, raw, raw, ftk, ...) within one process; each pair of blocks gives one ratio, and the median
of the ratios is the answer. On a workspace (`tiny`, `mid`) ftk's side is all of it: cache, batches built by its thread,
hooks, metrics and TensorBoard; only checkpoints lie outside the blocks. With `--synthetic` (always so for `full`) it is
`Trainer.update` on batches in memory.

Shape legend: B batch, C channels, H W latent cells, L text tokens, D text width, N image tokens.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

import ftk
import ftk.cache.stage
import ftk.pipeline.stage
from ftk.configs.load import validate
from ftk.configs.schema import MethodConfig, RunConfig, TrainConfig
from ftk.demo import draw_pictures
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.train import data
from ftk.train.data import Batch
from ftk.train.loop import Trainer
from ftk.train.optim import MasterOptimizer
from ftk.train.stage import Build, build_trainer

FAMILY = "qwen-image"
RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
LOG_EVERY = 10
LIBRARIES = ("ftk", "torch", "diffusers", "peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and how it is measured. `parameters` bounds their number."""

    transformer: dict[str, Any]
    resolution: int
    text_tokens: int
    block: int
    warmup: int
    parameters: tuple[float, float] | None = None


MID = {
    "num_layers": 9,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": 16,  # the tiny text encoder's width
}
TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (8, 4, 4),
    "joint_attention_dim": 16,
}
SIZES = {
    "tiny": Size(transformer=TINY, resolution=128, text_tokens=20, block=100, warmup=100),
    "mid": Size(transformer=MID, resolution=256, text_tokens=20, block=10, warmup=10, parameters=(45e6, 55e6)),
    "full": Size(transformer={}, resolution=1024, text_tokens=200, block=3, warmup=2, parameters=(20e9, 21e9)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The order of events: warm-up, then pairs of blocks."""

    device: torch.device
    pairs: int
    block: int
    warmup: int

    @property
    def steps(self) -> int:
        """Steps that each side takes."""
        return self.warmup + self.pairs * self.block


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one raw step takes, already on the device."""

    clean_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    sigma_B: torch.Tensor
    text_BLD: torch.Tensor


@dataclass(slots=True, kw_only=True)
class Blocks:
    """Seconds a step of each block, in the order they ran, and the most memory that a block held (CUDA only)."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


class RawLoop:
    """The loop that one writes by hand: nothing of ftk's in it, no data loading, no logging."""

    def __init__(self, transformer: Any, parameters: list[torch.nn.Parameter], samples: Sequence[Sample]) -> None:
        self.transformer, self.parameters, self.samples = transformer, parameters, samples
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=parameters[0].is_cuda)

    def step(self, index: int) -> None:
        """Noise, pack, predict, unpack, squared error, backward, clip, update."""
        sample = self.samples[index % len(self.samples)]
        clean, noise = sample.clean_BCHW, sample.noise_BCHW
        batch, channels, height, width = clean.shape
        sigma = sample.sigma_B.to(clean.dtype).view(-1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        packed = noisy.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        output = self.transformer(
            hidden_states=packed.reshape(batch, (height // 2) * (width // 2), channels * 4),
            timestep=sample.sigma_B,
            encoder_hidden_states=sample.text_BLD,
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        unpacked = output.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        prediction = unpacked.reshape(batch, channels, height, width)
        F.mse_loss(prediction.float(), (noise - clean).float()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Interleaved:
    """Stands between the batches and `Trainer.fit`: lets whole blocks through, and runs the raw loop's between them."""

    def __init__(self, batches: Iterable[list[Batch]], raw_step: Callable[[int], None], plan: Plan) -> None:
        self.ftk, self.raw = Blocks(), Blocks()
        self._batches, self._raw_step, self._plan = iter(batches), raw_step, plan

    def __iter__(self) -> Iterator[list[Batch]]:
        """When this is asked for the next batch, the trainer and all its hooks are done with the last one."""
        plan = self._plan
        for _ in range(plan.warmup):
            yield next(self._batches)
        for step in range(plan.warmup):
            self._raw_step(step)
        for pair in range(plan.pairs):
            first = plan.warmup + pair * plan.block
            if pair % 2:
                self._raw_block(first)
            started = self._start()
            for _ in range(plan.block):
                yield next(self._batches)
            self._stop(self.ftk, started)
            if not pair % 2:
                self._raw_block(first)

    def _raw_block(self, first: int) -> None:
        started = self._start()
        for step in range(first, first + self._plan.block):
            self._raw_step(step)
        self._stop(self.raw, started)

    def _start(self) -> float:
        if self._plan.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def _stop(self, blocks: Blocks, started: float) -> None:
        if self._plan.device.type == "cuda":
            torch.cuda.synchronize()
            blocks.peak_bytes = max(blocks.peak_bytes, torch.cuda.max_memory_allocated())
        blocks.seconds.append((time.perf_counter() - started) / self._plan.block)


def measure_workspace(name: str, size: Size, plan: Plan, checkpointing: bool) -> dict[str, Any]:
    """ftk as `ftk train` runs it, on a workspace made for the purpose."""
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        config = make_workspace(Path(folder), name, size, plan, checkpointing)
        build = build_trainer(config)
        samples = samples_like(build, plan)
        family, dtype = models.get(FAMILY), samples[0].clean_BCHW.dtype
        transformer: Any = family.load_denoiser(Path(config.model.path), dtype, plan.device)
        transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(TARGETS)))
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        raw = RawLoop(transformer, [p for p in transformer.parameters() if p.requires_grad], samples)
        batches = data.steps(build.order, build.batches.build, 0, plan.steps)
        interleaved = Interleaved(batches, raw.step, plan)
        build.trainer.fit(interleaved)
        return summary(name, "workspace", checkpointing, build.trainer, interleaved, plan, samples)


def make_workspace(root: Path, name: str, size: Size, plan: Plan, checkpointing: bool) -> RunConfig:
    """Tiny model (with a larger transformer for `mid`), drawn pictures, prepared and cached."""
    family = models.get(FAMILY)
    family.tiny(root / "model")
    if name != "tiny":
        shutil.rmtree(root / "model" / "transformer")
        random_transformer(size, torch.float32, torch.device("cpu")).save_pretrained(root / "model" / "transformer")
    draw_pictures(root / "pictures")
    train = {
        **train_settings(plan, checkpointing),
        "device": plan.device.type,
        "checkpoint_every": 10 * plan.steps,
        "log_every": LOG_EVERY,
        "tensorboard": True,
    }
    tree = {
        "run": name,
        "workspace": str(root),
        "model": {"family": FAMILY, "path": str(root / "model")},
        "data": {"sources": [{"path": str(root / "pictures")}], "resolutions": [size.resolution], "workers": 1},
        "cache": {"text_dtype": "float32", "latents_dtype": "float32", "device": plan.device.type},
        "method": {"name": "lora", "rank": RANK, "targets": "attention"},
        "train": train,
    }
    config = validate(RunConfig, tree, "the benchmark's run file")
    ftk.pipeline.stage.run(config)
    ftk.cache.stage.run(config)
    return config


def samples_like(build: Build, plan: Plan) -> list[Sample]:
    """For each step a synthetic sample of the shapes that ftk's batch of that step has."""
    generator = torch.Generator().manual_seed(0)
    shapes = []
    for step in range(plan.steps):
        (batch,) = (build.batches.build(micro_batch) for micro_batch in build.order.step(step))
        embeds = batch.texts["embeds"]
        assert embeds is not None
        shapes.append((batch.latents_BCHW.shape, embeds.shape, batch.latents_BCHW.dtype))
    return [synthetic(latents, text, dtype, plan.device, generator) for latents, text, dtype in shapes]


def measure_synthetic(name: str, size: Size, plan: Plan, checkpointing: bool) -> dict[str, Any]:
    """`Trainer.update` on one batch in memory; both sides share the model and its adapter, which may fill the device."""
    dtype = torch.bfloat16 if plan.device.type == "cuda" else torch.float32
    denoiser = random_transformer(size, dtype, plan.device).requires_grad_(False).train()
    family = models.get(FAMILY)
    config = TrainConfig.model_validate(train_settings(plan, checkpointing))
    method, method_config = methods.parse(MethodConfig.model_validate({"name": "lora", "rank": RANK}))
    assert set(family.target_groups[method_config.targets]) == set(TARGETS)
    parameters = method.attach({"denoiser": denoiser}, family, method_config, 0)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    trainer = Trainer(
        family=family,
        denoiser=denoiser,
        predict=family.predict,
        optimizer=MasterOptimizer(parameters, config.optimizer),
        config=config,
        device=plan.device,
    )
    side = size.resolution // family.geometry.factor
    latents, text = (1, family.geometry.channels, side, side), (1, size.text_tokens, denoiser.config.joint_attention_dim)
    sample = synthetic(latents, text, dtype, plan.device, torch.Generator().manual_seed(0))
    batch = Batch(
        latents_BCHW=sample.clean_BCHW.cpu(),
        noise_BCHW=sample.noise_BCHW.cpu(),
        sigma_B=sample.sigma_B.cpu(),
        texts={"embeds": sample.text_BLD.cpu(), "mask": None},
    )
    raw = RawLoop(denoiser, list(parameters.values()), [sample])
    interleaved = Interleaved(([batch] for _ in range(plan.steps)), raw.step, plan)
    trainer.fit(interleaved)
    tflop = step_tflop(denoiser.config, (side // 2) ** 2, size.text_tokens, checkpointing)
    return summary(name, "synthetic", checkpointing, trainer, interleaved, plan, [sample], tflop)


def train_settings(plan: Plan, checkpointing: bool) -> dict[str, Any]:
    """The part of `train:` that both ways of measuring share."""
    return {
        "steps": plan.steps,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "precision": "bf16" if plan.device.type == "cuda" else "fp32",
        "gradient_checkpointing": checkpointing,
    }


def random_transformer(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights, made on the device and in the dtype they stay in; the parameter count is asserted."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            transformer = QwenImageTransformer2DModel(**size.transformer)
    finally:
        torch.set_default_dtype(default)
    if size.parameters is not None:
        count = sum(parameter.numel() for parameter in transformer.parameters())
        low, high = size.parameters
        assert low <= count <= high, f"{count:,} parameters, not {low:,.0f} to {high:,.0f}"
    return transformer


def synthetic(
    latents: Sequence[int], text: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Sample:
    """Random tensors of these shapes, on the device."""
    return Sample(
        clean_BCHW=torch.randn(*latents, generator=generator).to(device, dtype),
        noise_BCHW=torch.randn(*latents, generator=generator).to(device, dtype),
        sigma_B=torch.rand(latents[0], generator=generator).to(device),
        text_BLD=torch.randn(*text, generator=generator).to(device, dtype),
    )


def step_tflop(config: Any, image_tokens: int, text_tokens: int, checkpointing: bool) -> float:
    """TFLOP of a step with d the width, L the layers and S all tokens; a multiply-add counts as two.

    Forward: 24 d^2 L S in linears, 4 S^2 d L in attention, 16 d r L N in the adapter. Backward: linears once more (the base
    is frozen, so there are gradients of inputs only), attention 2.5 times (it computes the scores again), the adapter
    twice. Checkpointing adds one forward. Qwen-Image at 1024 px with 200 text tokens: 165.0, and 237.2 with checkpointing.
    """
    d, layers = config.num_attention_heads * config.attention_head_dim, config.num_layers
    tokens = image_tokens + text_tokens
    linear, attention = 24 * d**2 * layers * tokens, 4 * tokens**2 * d * layers
    adapter = 4 * 2 * 2 * d * RANK * layers * image_tokens
    forward = linear + attention + adapter
    return float(forward * (2 if checkpointing else 1) + linear + 2.5 * attention + 2 * adapter) / 1e12


def summary(
    name: str,
    mode: str,
    checkpointing: bool,
    trainer: Trainer,
    interleaved: Interleaved,
    plan: Plan,
    samples: Sequence[Sample],
    tflop: float | None = None,
) -> dict[str, Any]:
    """The numbers of one measurement, as they go into the JSON file."""
    trained = sum(parameter.numel() for parameter in trainer.optimizer.parameters.values())
    ratios = [a / b for a, b in zip(interleaved.ftk.seconds, interleaved.raw.seconds, strict=True)]
    sides = {}
    for side, blocks in (("ftk", interleaved.ftk), ("raw", interleaved.raw)):
        seconds = spread(blocks.seconds)
        sides[side] = {
            "seconds_a_step": {**seconds, "blocks": blocks.seconds},
            "tflop_a_second": tflop / seconds["median"] if tflop else None,
            "peak_bytes": blocks.peak_bytes or None,
        }
    return {
        "size": name,
        "mode": mode,
        "gradient_checkpointing": checkpointing,
        "device": plan.device.type,
        "dtype": str(next(trainer.denoiser.parameters()).dtype).removeprefix("torch."),
        "num_base_parameters": sum(p.numel() for p in trainer.denoiser.parameters()) - trained,
        "num_trained_parameters": trained,
        "latents_CHW": sorted({"x".join(map(str, sample.clean_BCHW.shape[1:])) for sample in samples}),
        "text_tokens": spread([sample.text_BLD.shape[1] for sample in samples]),
        "pairs": plan.pairs,
        "steps_a_block": plan.block,
        "tflop_a_step": tflop,
        "ratio": {**spread(ratios), "pairs": ratios},
        **sides,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine(device: torch.device) -> dict[str, Any]:
    """Facts without which the numbers mean nothing."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
    }


def show(results: Sequence[dict[str, Any]]) -> None:
    """One row a measurement."""
    table = Table(title="ftk's training step against a raw torch loop", title_justify="left", show_lines=True)
    table.add_column("size", no_wrap=True)
    for column in ("parameters", "ftk ms a step", "raw ms a step", "ftk / raw"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        what = [f"{result['size']}, {result['dtype']}", result["mode"]]
        table.add_row(
            "\n".join([*what, "checkpointing"] if result["gradient_checkpointing"] else what),
            f"{result['num_base_parameters'] / 1e6:,.2f} M",
            *(_side(result[side]) for side in ("ftk", "raw")),
            _spread_text(result["ratio"], 1, 3),
        )
    console = Console()
    console.print(table)
    console.print("Median, and below it least and greatest, of the blocks; a ratio is of two neighbouring blocks.")


def _side(side: dict[str, Any]) -> str:
    lines = [_spread_text(side["seconds_a_step"], 1e3, 2)]
    if side["tflop_a_second"]:
        lines.append(f"{side['tflop_a_second']:,.2f} TFLOP/s")
    if side["peak_bytes"]:
        lines.append(f"peak {side['peak_bytes'] / 2**30:,.1f} GiB")
    return "\n".join(lines)


def _spread_text(values: dict[str, float], scale: float, digits: int) -> str:
    median, low, high = (f"{values[key] * scale:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median}\n{low}-{high}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="may be given twice; tiny and mid by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--synthetic", action="store_true", help="Trainer.update on batches in memory; always so for full")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, on both sides")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of blocks, one of each side")
    parser.add_argument("--block", type=int, help="steps a block; a multiple of 10 on a workspace")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads; more are slower when cores are busy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    options = parser.parse_args()
    options.size = options.size or ["tiny", "mid"]
    if "full" in options.size and options.device != "cuda":
        parser.error("--size full is 20 billion parameters: it needs --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if not options.synthetic and options.size != ["full"] and options.block and options.block % LOG_EVERY:
        parser.error(f"--block must be a multiple of {LOG_EVERY}, so that each block holds as many log steps")
    return options


def main() -> None:
    """Measure every size that was asked for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = []
    for name in options.size:
        size = SIZES[name]
        plan = Plan(device=device, pairs=options.pairs, block=options.block or size.block, warmup=size.warmup)
        measure = measure_synthetic if options.synthetic or name == "full" else measure_workspace
        results.append(measure(name, size, plan, options.checkpointing))
    show(results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(device), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
