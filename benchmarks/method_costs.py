"""What each method costs beside LoRA on the same model: parameters, the delivered file, a step's time, memory.

Two models of 50 M parameters with random weights: a transformer in the layout of Qwen-Image, and a U-Net in that of Stable
Diffusion. A step is ftk's own update (predict, backward, clip, AdamW) in fp32 on a batch that is in memory. All methods take
turns within one process, on weights that those share which do not change them; each round gives one ratio to LoRA's block of
that round. Memory is the most that a process of each method's own holds after training, above that of one which holds the bare
model and nothing else.

Shape legend: B batch, C channels, H W latent cells, L text tokens, D text width.
"""

import argparse
import copy
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First: it settles how many threads torch may use.
import train_setup as setup  # isort: skip
import torch
from diffusers import UNet2DConditionModel
from train_loops import resident_bytes
from train_setup import spread, spread_text, taking_turns
from train_step import in_a_process

from ftk.configs.schema import MethodConfig, TrainConfig
from ftk.methods import base as methods
from ftk.methods.base import Export
from ftk.models import base as models
from ftk.models.base import Conditions, Model
from ftk.models.components.schedule import NoiseSchedule
from ftk.train import optim
from ftk.train.data import Batch, Step
from ftk.train.loop import Trainer
from ftk.train.optim import MasterOptimizer

CPU = torch.device("cpu")
REFERENCE = "LoRA, rank 16"
BARE = "bare"
WARMUP_STEPS = 2
# As a user would choose them for equal tasks, not for equal sizes.
METHODS: Mapping[str, Mapping[str, Any]] = {
    REFERENCE: {"name": "lora", "rank": 16},
    "LoRA, rank 16, DoRA": {"name": "lora", "rank": 16, "dora": True},
    "OFT, blocks of 32": {"name": "oft", "block_size": 32},
    "OFT, 8 blocks": {"name": "oft", "block_size": None, "r": 8},
    "BOFT, blocks of 4": {"name": "boft", "block_size": 4},
    "LoHa, rank 8": {"name": "loha", "rank": 8},
    "LoKr, rank 16": {"name": "lokr", "rank": 16},
    "MiSS, r 16": {"name": "peft", "type": "MISS", "r": 16},
    "HRA, r 8": {"name": "peft", "type": "HRA", "r": 8},
    "full": {"name": "full"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A denoiser, and the samples that it is trained on. `parameters` bounds its size."""

    family: str
    make: Callable[[], Any]
    parameters: tuple[float, float]
    edge_px: int
    text_tokens: int
    text_width: int


def _transformer(size: str) -> Callable[[], Any]:
    return lambda: setup.random_transformer(setup.SIZES[size], torch.float32, CPU)


def _u_net(widths: Sequence[int], layers: int, text_width: int) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=tuple(widths), layers_per_block=layers, cross_attention_dim=text_width, attention_head_dim=8
        )

    return make


MODELS: Mapping[str, Mapping[str, ModelSize]] = {
    "transformer": {
        "mid": ModelSize(family="qwen-image", make=_transformer("mid"), parameters=(45e6, 55e6),
                     edge_px=256, text_tokens=40, text_width=3584),
        "tiny": ModelSize(family="qwen-image", make=_transformer("tiny"), parameters=(5e4, 2e5),
                      edge_px=64, text_tokens=8, text_width=16),
    },
    "u-net": {
        "mid": ModelSize(family="stable-diffusion", make=_u_net((96, 192, 384, 384), 1, 768), parameters=(50e6, 60e6),
                     edge_px=256, text_tokens=77, text_width=768),
        "tiny": ModelSize(family="stable-diffusion", make=_u_net((32, 32, 32, 32), 1, 32), parameters=(2e5, 1e6),
                      edge_px=128, text_tokens=77, text_width=32),
    },
}  # fmt: skip


def make_denoiser(model: ModelSize) -> Any:
    """Frozen, in training mode; its size is asserted."""
    denoiser = model.make().requires_grad_(False).train()
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    low, high = model.parameters
    assert low <= count <= high, f"{count:,} parameters, not {low:,.0f} to {high:,.0f}"
    return denoiser


@dataclass(kw_only=True)
class Bench:
    """A method attached to a denoiser, and what steps it."""

    settings: Any
    trainer: Trainer
    batch: Batch

    def step(self) -> None:
        """One update."""
        self.trainer.update(Step(batches=[(0, self.batch)], num_samples=len(self.batch)))

    @property
    def num_parameters(self) -> int:
        """Those that are trained."""
        return sum(parameter.numel() for parameter in self.trainer.optimizer.parameters.values())

    def delivered_bytes(self) -> int:
        """All weights that an export in the method's own format takes."""
        with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
            method = self.trainer.method
            export = Export(directory=Path(folder), form=method.FORMATS[0], metadata={})
            files = method.export(self.trainer.model, self.settings, export)
            return sum(file.stat().st_size for file in files if file.suffix == ".safetensors")


def make_bench(size: ModelSize, given: Mapping[str, Any], denoiser: Any, batch_size: int) -> Bench:
    """The method with these settings on this denoiser, which it changes."""
    family = models.get(size.family)
    model = Model(family=family, schedule=noise_schedule(size.family), denoiser=denoiser)
    method, settings = methods.parse(MethodConfig.model_validate(given))
    parameters = method.attach(model, settings, 0)
    train = TrainConfig.model_validate(
        {"global_batch_size": batch_size, "micro_batch_size": batch_size, "learning_rate": 1e-5, "precision": "fp32"}
    )
    trainer = Trainer(
        model=model,
        method=method,
        optimizer=MasterOptimizer(parameters, train),
        schedule=optim.schedule(train.schedule, train.steps),
        config=train,
        device=CPU,
    )
    return Bench(settings=settings, trainer=trainer, batch=make_batch(size, family, batch_size))


@functools.cache
def noise_schedule(family: str) -> NoiseSchedule:
    """That of the family's tiny model, whose scheduler is a real one."""
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        models.get(family).tiny(Path(folder))
        return models.get(family).load_schedule(Path(folder))


def make_batch(model: ModelSize, family: Any, batch_size: int) -> Batch:
    """Noise; all texts of one length, so there is no mask."""
    side = model.edge_px // family.geometry.factor
    latents, noise = setup.noise(0, 2, batch_size, family.geometry.channels, side, side).float()
    text = {"embeds": setup.noise(1, model.text_tokens, model.text_width).float()}
    return Batch(
        latents_BCHW=latents,
        noise_BCHW=noise,
        sigma_B=(torch.arange(batch_size) + 0.5) / batch_size,
        weight_B=torch.ones(batch_size),
        conditions=Conditions(texts=family.collate_texts([text] * batch_size)),
    )


def twin(denoiser: Any, settings: Mapping[str, Any]) -> Any:
    """A denoiser for this method: modules of its own and, unless it trains them, the same weights."""
    shared = {} if settings["name"] == "full" else {id(weight): weight for weight in denoiser.parameters()}
    return copy.deepcopy(denoiser, shared)


def costs(model: ModelSize, options: argparse.Namespace) -> dict[str, Any]:
    """Of all methods, by their names."""
    names = [REFERENCE, *(name for name in options.method or METHODS if name != REFERENCE)]
    denoiser = make_denoiser(model)
    benches = {
        name: make_bench(model, METHODS[name], twin(denoiser, METHODS[name]), options.batch) for name in names
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {
        name: {"settings": METHODS[name], "num_parameters": bench.num_parameters, "delivered_bytes": bench.delivered_bytes()}
        for name, bench in benches.items()
    }
    seconds = step_seconds(benches, options)
    del benches
    peaks = peak_bytes(model, names, options)
    for name in names:
        ratios = [own / lora for own, lora in zip(seconds[name], seconds[REFERENCE], strict=True)]
        above = [own - bare for own, bare in zip(peaks[name], peaks[BARE], strict=True)]
        found[name] |= {"seconds_a_step": spread(seconds[name]), "ratio": spread(ratios), "bytes_above_bare": spread(above)}
    return {
        "family": model.family,
        "num_base_parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "edge_px": model.edge_px, "text_tokens": model.text_tokens, "batch_size": options.batch,
        "rounds": options.rounds, "steps_a_block": options.block, "bare_bytes": spread(peaks[BARE]), "methods": found,
    }  # fmt: skip


def step_seconds(benches: Mapping[str, Bench], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each method's blocks, in the order of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in benches}
    for bench in benches.values():
        for _ in range(WARMUP_STEPS):
            bench.step()
    for _, name in taking_turns(tuple(benches), options.rounds):
        started = time.perf_counter()
        for _ in range(options.block):
            benches[name].step()
        found[name].append((time.perf_counter() - started) / options.block)
    return found


def peak_bytes(model: ModelSize, names: Sequence[str], options: argparse.Namespace) -> dict[str, list[int]]:
    """The most that processes held: one that makes the model alone, and one of each method that trains too."""
    kind = next(kind for kind, sizes in MODELS.items() if model in sizes.values())
    found: dict[str, list[int]] = {name: [] for name in (BARE, *names)}
    for _, name in taking_turns(tuple(found), options.repeats):
        arguments = ["--memory-of", name, "--model", kind, "--size", options.size, "--batch", str(options.batch)]
        done = in_a_process([__file__, *arguments, "--threads", str(options.threads)])
        found[name].append(done["peak_bytes"])
    return found


def memory_of(name: str, model: ModelSize, batch_size: int) -> dict[str, int]:
    """What this process, which does nothing else, holds at most."""
    denoiser = make_denoiser(model)
    if name != BARE:
        bench = make_bench(model, METHODS[name], denoiser, batch_size)
        for _ in range(WARMUP_STEPS):
            bench.step()
    return {"peak_bytes": resident_bytes("VmHWM")}


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of docs/methods.md: one a model, a row a method."""
    return "\n\n".join(table(kind, found) for kind, found in results.items())


def table(kind: str, found: Mapping[str, Any]) -> str:
    """Of one model, which the first cell names."""
    head = [f"{kind}, {found['num_base_parameters'] / 1e6:.0f} M", "trained", "file", "step", "memory"]
    rows = [head, ["---", *["---:"] * 4], *([name, *cells(one)] for name, one in found["methods"].items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(found: Mapping[str, Any]) -> list[str]:
    """One method on one model."""
    return [
        f"{found['num_parameters']:,}",
        f"{found['delivered_bytes'] / 2**20:,.1f} MiB",
        spread_text(found["ratio"]),
        f"{spread_text(found['bytes_above_bare'], 2**-20, 0)} MiB",
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="may be given twice; both by default")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="beside LoRA; all by default")
    parser.add_argument("--size", choices=("tiny", "mid"), default="mid", help="tiny says nothing about a real model")
    parser.add_argument("--batch", type=int, default=1, help="samples a step")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each method")
    parser.add_argument("--block", type=int, default=2, help="steps a turn")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each method, for memory")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads; more are slower when cores are busy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    parser.add_argument("--memory-of", choices=(BARE, *METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.batch, options.rounds, options.block, options.repeats) < 1:
        parser.error("--batch, --rounds, --block and --repeats are at least 1")
    options.model = options.model or list(MODELS)
    return options


def shown_command(options: argparse.Namespace) -> str:
    """What to type for the same measurement."""
    chosen = [f" --model {kind}" for kind in options.model] if options.model != list(MODELS) else []
    chosen += [f' --method "{name}"' for name in options.method or ()]
    numbers = [f" --{name} {getattr(options, name)}" for name in ("size", "batch", "rounds", "block", "repeats", "threads")]
    return "python benchmarks/method_costs.py" + "".join([*chosen, *numbers])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All models that were asked for."""
    machine = setup.machine(CPU)
    results = {kind: costs(MODELS[kind][options.size], options) for kind in options.model}
    machine["load_after"] = os.getloadavg()[0]
    return {"command": shown_command(options), "machine": machine, "results": results}


def main() -> None:
    """Measure, print the table, and keep the numbers where they are asked for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, MODELS[options.model[0]][options.size], options.batch)))
        return
    report = run(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(markdown(report["results"]))
    machine = report["machine"]
    print(f"\nMedians, with least and greatest in brackets; steps beside {REFERENCE}'s, memory above the bare model's.")
    print(f"Load of the machine: {machine['load']:.1f} before, {machine['load_after']:.1f} at the end.")


if __name__ == "__main__":
    main()
