"""A step of Qwen-Image at full size on one GPU: each measure of `train.memory` that changes its speed, one by one.

For 1024 and 512 px with 200 text tokens, 1 and 4 samples: ftk as it is (bf16, eager), compiled, and with an 8-bit base, each
with all blocks checkpointed and with none; on the same weights a loop by hand and that of diffusers' own script. Of each:
seconds a step, TFLOP/s, the most memory and what the memory plan foretold, and how far loss and gradients are from ftk's eager
step.

Weights are random, made on the device: no download, and nothing said about what 8 bits do to a trained model. A case is written
to the file as soon as it is measured; started again, the program does those that the file lacks.

Shape legend: B batch, C channels, H W latent cells, L text tokens, D text width.
"""

import argparse
import gc
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# First: it settles how many threads torch may use.
import train_setup as setup  # isort: skip
import torch
from rich.console import Console
from rich.table import Table
from train_loops import DiffusersLoop, RawLoop, Sample
from train_setup import SIZES, Size, spread

from ftk import devices
from ftk.configs.schema import MethodConfig, TrainConfig
from ftk.errors import FtkError
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models.base import Conditions, Model
from ftk.train import memory, optim, placement
from ftk.train.data import Batch, Step
from ftk.train.loop import Trainer
from ftk.train.optim import MasterOptimizer

TEXT_TOKENS = 200
# Of dense bf16 products, by part of the device's name; NVIDIA's data sheets.
PEAK_TFLOPS = {"H100": 989.5, "H200": 989.5, "A100": 312.0, "4090": 165.2}
# So that B, which begins at 0, lets a gradient through to A.
B_DEVIATION = 0.01

Gradients = tuple[float, dict[str, torch.Tensor]]
"""Of a batch: its loss, and the gradient of each of the adapter's weights, on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row. `loop` is ftk, raw or diffusers."""

    edge_px: int
    batch_size: int
    loop: str = "ftk"
    base: str = "full"
    compiled: bool = False
    checkpointed: bool = True

    @property
    def name(self) -> str:
        """As in the file."""
        measures = ["int8"] * (self.base == "int8") + ["compiled"] * self.compiled + ["checkpointed"] * self.checkpointed
        return " ".join([f"{self.edge_px}px b{self.batch_size} {self.loop}", *measures])


def cases(options: argparse.Namespace) -> list[Case]:
    """All of them, those that share a model together, and in it those of one shape."""
    kinds = [("ftk", "full", False), ("raw", "full", False), ("diffusers", "full", False), ("ftk", "full", True),
             ("ftk", "int8", False), ("ftk", "int8", True)]  # fmt: skip
    found = [
        Case(edge_px=edge, batch_size=batch, loop=loop, base=base, compiled=compiled, checkpointed=checkpointed)
        for edge, batch, (loop, base, compiled), checkpointed in itertools.product(
            options.edge, options.batch, kinds, (True, False)
        )
    ]
    chosen = [case for case in found if all(word in case.name for word in options.only)]
    return sorted(chosen, key=lambda case: case.base)


@dataclass(kw_only=True)
class Bench:
    """A model on the device with its adapter, the method that made it, and the adapter's weights at the start.

    `scheduler` is a directory with the family's scheduler.
    """

    size: Size
    base: str
    device: torch.device
    scheduler: Path
    model: Model
    method: methods.Method
    settings: Any
    parameters: dict[str, torch.nn.Parameter]
    first: dict[str, torch.Tensor]

    def reset(self) -> None:
        """Blocks as diffusers has them, the adapter as at the start."""
        for block in memory.blocks(self.model.denoiser, self.model.family):
            block.__dict__.pop("forward", None)
        self.model.denoiser.disable_gradient_checkpointing()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.first[name])
                parameter.grad = None


def make_bench(base: str, options: argparse.Namespace) -> Bench:
    """Weights from a seed, so that those of 8 bits are the same ones rounded."""
    started = time.perf_counter()
    family, size, device = models.get(setup.FAMILY), SIZES[options.size], torch.device(options.device)
    dtype = torch.bfloat16
    denoiser = setup.random_transformer(size, dtype, device).requires_grad_(False).train()
    if base == "int8":
        placement.quantise_base(denoiser, family, device)
    model = Model(family=family, schedule=family.load_schedule(options.scheduler).to(device), denoiser=denoiser)
    method, settings = methods.parse(MethodConfig.model_validate({"name": "lora", "rank": setup.RANK}))
    parameters = method.attach(model, settings, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.copy_(B_DEVIATION * torch.randn(parameter.shape, generator=generator))
    first = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    say(f"model made ({base} base): {time.perf_counter() - started:.0f} s")
    return Bench(
        size=size,
        base=base,
        device=device,
        scheduler=options.scheduler,
        model=model,
        method=method,
        settings=settings,
        parameters=parameters,
        first=first,
    )


def train_config(case: Case) -> TrainConfig:
    """What a user would write for this case; the rest is as by default."""
    measures = {
        "checkpointing": "all" if case.checkpointed else "none",
        "offload": "none",
        "base": case.base,
        "compile": case.compiled,
    }
    sizes = {"global_batch_size": case.batch_size, "micro_batch_size": case.batch_size}
    return TrainConfig.model_validate({"memory": measures, "learning_rate": setup.LEARNING_RATE, "precision": "bf16", **sizes})


def make_trainer(bench: Bench, case: Case) -> tuple[Trainer, memory.MemoryPlan]:
    """ftk's own trainer, placed by its own plan."""
    family, config = bench.model.family, train_config(case)
    workload = memory.Workload(
        height=case.edge_px // family.geometry.factor,
        width=case.edge_px // family.geometry.factor,
        text_tokens=TEXT_TOKENS,
        micro_batch_size=case.batch_size,
    )
    plan = memory.plan(planned_shapes(bench), config, workload, memory.inspect_device(bench.device))
    placement.after_method(bench.model.denoiser, plan, family, bench.device)
    trainer = Trainer(
        model=bench.model,
        method=bench.method,
        optimizer=MasterOptimizer(bench.parameters, config),
        schedule=optim.schedule(config.schedule, config.steps),
        config=config,
        device=bench.device,
        dtype=torch.bfloat16,
    )
    return trainer, plan


def planned_shapes(bench: Bench) -> Model:
    """As the plan sees a model: not quantised yet, without weights."""
    denoiser = setup.random_transformer(bench.size, torch.float32, torch.device("meta")).requires_grad_(False)
    shapes = Model(family=bench.model.family, schedule=bench.model.schedule, denoiser=denoiser)
    bench.method.attach(shapes, bench.settings, 0)
    return shapes


def make_batch(bench: Bench, case: Case) -> Batch:
    """Noise, the same for all cases of a shape; all texts of one length, so there is no mask."""
    geometry = bench.model.family.geometry
    side = case.edge_px // geometry.factor
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, case.batch_size, geometry.channels, side, side, generator=generator)
    text = torch.randn(case.batch_size, TEXT_TOKENS, bench.size.text_width, generator=generator)
    batch = Batch(
        latents_BCHW=latents.bfloat16(),
        noise_BCHW=noise.bfloat16(),
        sigma_B=(torch.arange(case.batch_size) + 0.5) / case.batch_size,
        weight_B=torch.ones(case.batch_size),
        conditions=Conditions(texts={"embeds": text.bfloat16(), "mask": None}),
    )
    return batch.map(lambda tensor: tensor.to(bench.device))


def sample_of(batch: Batch) -> Sample:
    """The same tensors."""
    text = batch.conditions.texts["embeds"]
    assert text is not None
    return Sample(
        clean_BCHW=batch.latents_BCHW, noise_BCHW=batch.noise_BCHW, sigma_B=batch.sigma_B, text_BLD=text, mask_BL=None
    )


def gradients(trainer: Trainer, batch: Batch) -> Gradients:
    """The loss of the batch, and the adapter's gradients on the host."""
    loss = trainer.losses(batch).mean()
    loss.backward()
    found = {}
    for name, parameter in trainer.optimizer.parameters.items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.float().cpu()
        parameter.grad = None
    return float(loss.detach()), found


def agreement(found: Gradients, expected: Gradients) -> dict[str, Any]:
    """The losses, and the cosine of each adapter's gradient with the expected one."""
    cosines = [
        float(torch.cosine_similarity(found[1][name].flatten(), one.flatten(), dim=0)) for name, one in expected[1].items()
    ]
    return {"loss": found[0], "eager_loss": expected[0], "gradient_cosine": spread(cosines)}


def reference(bench: Bench, edge_px: int, batch_size: int) -> Gradients:
    """Of ftk's eager step with all blocks checkpointed, which fits before all others."""
    bench.reset()
    shape = Case(edge_px=edge_px, batch_size=batch_size)
    trainer, _ = make_trainer(bench, shape)
    return gradients(trainer, make_batch(bench, shape))


def measure(bench: Bench, case: Case, expected: Gradients, options: argparse.Namespace) -> dict[str, Any]:
    """One case. What does not fit or fails is a result too: the other cases still count."""
    bench.reset()
    release(bench.device.type)
    try:
        return {**asdict(case), **(ours if case.loop == "ftk" else theirs)(bench, case, expected, options)}
    except (RuntimeError, FtkError) as error:  # also torch.compile's own
        reason = "does not fit" if isinstance(error, RuntimeError) and devices.is_out_of_memory(error) else "fails"
        return {**asdict(case), "failed": f"{reason}: {str(error).splitlines()[0]}"}
    finally:
        bench.reset()


def ours(bench: Bench, case: Case, expected: Gradients, options: argparse.Namespace) -> dict[str, Any]:
    """`Trainer.update`, after the warm-up that `ftk train` does."""
    trainer, plan = make_trainer(bench, case)
    batch = make_batch(bench, case)
    started = time.perf_counter()
    placement.warm_up(trainer.losses, [batch], bench.parameters.values())
    warm_up = time.perf_counter() - started
    close = agreement(gradients(trainer, batch), expected)
    step = Step(batches=[(0, batch)], num_samples=case.batch_size)
    return {
        **timed(lambda: trainer.update(step), bench, case, options),
        "planned_bytes": plan.total_bytes,
        "attention": plan.attention,
        "warm_up_seconds": warm_up,
        "agreement": close,
    }


def theirs(bench: Bench, case: Case, _: Gradients, options: argparse.Namespace) -> dict[str, Any]:
    """The other loops train the adapter in bf16, as diffusers' script does, with torch's own choice of attention."""
    if case.checkpointed:
        bench.model.denoiser.enable_gradient_checkpointing()
    parameters = list(bench.parameters.values())
    loop: RawLoop | DiffusersLoop
    if case.loop == "raw":
        loop = RawLoop(bench.model.denoiser, parameters, setup.LEARNING_RATE)
    else:
        loop = DiffusersLoop(bench.model.denoiser, parameters, setup.LEARNING_RATE, bench.scheduler)
    sample = sample_of(make_batch(bench, case))
    return timed(lambda: loop.step(sample), bench, case, options)


def timed(step: Callable[[], Any], bench: Bench, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of single steps, each waited for, after two that do not count; the most memory of those that do."""
    is_cuda = bench.device.type == "cuda"
    seconds = []
    for number in range(options.steps + 2):
        if is_cuda:
            torch.cuda.synchronize()
        if number == 2 and is_cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    found = spread(seconds[2:])
    tflop = step_tflop(bench.model.denoiser.config, case)
    rate = tflop / found["median"]
    peak = peak_tflops()
    return {
        "seconds_a_step": {**found, "steps": seconds[2:]},
        "tflop_a_step": tflop,
        "tflop_a_second": rate,
        "share_of_peak": rate / peak if is_cuda and peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }


def peak_tflops() -> float | None:
    """What the device can do in bf16, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for part, value in PEAK_TFLOPS.items() if part in name), None)


def step_tflop(config: Any, case: Case) -> float:
    """TFLOP that a step of this case has to compute; a multiply-add counts as two. d: width, L: layers, S: all tokens.

    Of a sample forward: 24 d^2 L S in linears, 4 S^2 d L in attention, 16 d r L N in the adapter, N image tokens. Backward:
    linears once more, since the base is frozen and only inputs have gradients, attention 2.5 times (it computes the scores
    again), the adapter twice. Checkpointing adds one forward. Qwen-Image, 1024 px, 200 text tokens: 165 and 237.
    """
    d, layers = config.num_attention_heads * config.attention_head_dim, config.num_layers
    image = (case.edge_px // models.get(setup.FAMILY).geometry.pixel_multiple) ** 2
    tokens = image + TEXT_TOKENS
    linear, attention = 24 * d**2 * layers * tokens, 4 * tokens**2 * d * layers
    adapter = 4 * 2 * 2 * d * setup.RANK * layers * image
    forward = linear + attention + adapter
    backward = linear + 2.5 * attention + 2 * adapter
    return float(case.batch_size * (forward * (2 if case.checkpointed else 1) + backward)) / 1e12


def release(device: str) -> None:
    """Give back what is not used any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All cases that the file lacks, a model after the other: there is no room for two."""
    report = begun(options)
    todo = [case for case in cases(options) if case.name not in report["cases"]]
    if not todo:
        return report
    bench = make_bench("full", options)
    references = {shape: reference(bench, *shape) for shape in dict.fromkeys((case.edge_px, case.batch_size) for case in todo)}
    for base, group in itertools.groupby(todo, lambda case: case.base):
        if base != bench.base:
            del bench
            release(options.device)
            bench = make_bench(base, options)
        for case in group:
            report["cases"][case.name] = measure(bench, case, references[case.edge_px, case.batch_size], options)
            report["machine"]["load_after"] = os.getloadavg()[0]
            write(report, options.json)
            say(line(case.name, report["cases"][case.name]))
    return report


def say(text: str) -> None:
    """At once, so that whoever ends the program knows where it was."""
    print(text, flush=True)


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """The file as it is, if there is one, of the same size and device."""
    machine = setup.machine(torch.device(options.device))
    report: dict[str, Any] = {"size": options.size, "machine": machine, "cases": {}}
    if options.json and options.json.exists():
        there = json.loads(options.json.read_text())
        if (there["size"], there["machine"]["device"]) == (report["size"], report["machine"]["device"]):
            report["cases"] = there["cases"]
    return report


def write(report: Mapping[str, Any], path: Path | None) -> None:
    """Whole or not at all."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        temporary.replace(path)


def line(name: str, found: Mapping[str, Any]) -> str:
    """One case in one line."""
    if "seconds_a_step" not in found:
        return f"{name}: {found['failed']}"
    close = found.get("agreement")
    cosine = f", cosine {close['gradient_cosine']['min']:.5f}" if close else ""
    return f"{name}: {found['seconds_a_step']['median']:.4f} s, {found['tflop_a_second']:.1f} TFLOP/s{cosine}"


def show(report: Mapping[str, Any]) -> None:
    """One row a case."""
    table = Table(title=f"A step of {report['size']} size on {report['machine']['device']}", title_justify="left")
    columns = ("s a step", "TFLOP/s", "of peak", "peak GiB", "planned GiB", "warm-up s", "loss, eager's", "least cosine")
    for number, column in enumerate(("", *columns)):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for name, found in report["cases"].items():
        table.add_row(name, *(cells(found) if "seconds_a_step" in found else [found["failed"][:40]]))
    Console(width=max(Console().width, 170)).print(table)


def cells(found: Mapping[str, Any]) -> list[str]:
    seconds = found["seconds_a_step"]
    shown = [f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})", f"{found['tflop_a_second']:,.2f}"]
    shown.append(f"{found['share_of_peak']:.0%}" if found["share_of_peak"] else "")
    shown += [f"{found[name] / 2**30:.1f}" if found.get(name) else "" for name in ("peak_bytes", "planned_bytes")]
    if "agreement" not in found:
        return [*shown, "", "", ""]
    close = found["agreement"]
    losses = f"{close['loss']:.5f}, {close['eager_loss']:.5f}"
    return [*shown, f"{found['warm_up_seconds']:.1f}", losses, f"{close['gradient_cosine']['min']:.6f}"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("tiny", "mid", "full"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--edge", type=int, nargs="+", default=[1024, 512], help="px; a multiple of 16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="samples a step")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only cases with all these words in their names")
    parser.add_argument("--steps", type=int, default=7, help="of each case, after two that do not count")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are kept; what it has is not done again")
    options = parser.parse_args()
    if options.size == "full" and options.device != "cuda":
        parser.error("--size full is 20 billion parameters: it needs --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    return options


def main() -> None:
    """Measure what is not measured yet."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        # The other loop reads a scheduler's settings; weights it does not need.
        models.get(setup.FAMILY).tiny(Path(folder))
        options.scheduler = Path(folder)
        report = run(options)
    show(report)


if __name__ == "__main__":
    main()
