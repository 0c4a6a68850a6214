"""`ftk doctor`."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftk.cli.options import Json, Overrides, Workspace, load_run, show
from ftk.errors import ConfigError

if TYPE_CHECKING:
    from ftk.cache.store import CacheStore
    from ftk.run import Run
    from ftk.train.memory import MemoryPlan, Workload


def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="A run file, to plan its memory.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    workspace: Workspace = None,
    layers: Annotated[bool, typer.Option("--layers", help="List the layers that the run trains, with their shapes.")] = False,
    json: Json = False,
) -> None:
    """Show what this machine has and what ftk needs; with a run file also how its training will fit the device."""
    if run_file is None:
        if layers:
            raise ConfigError("--layers lists what a run trains: name its file, `ftk doctor RUN.yaml --layers`.")
        report = machine(Path(workspace or "."))
        show("doctor", report if json else _for_people(report), json)
        return
    from dataclasses import asdict

    from ftk.train import memory

    run = load_run(run_file, overrides, workspace)
    if layers:
        _show_layers(run, json)
        return
    plan, workload, source = planned(run)
    length = planned_length(run)
    if json:
        show("doctor", {"plan": asdict(plan), "workload": asdict(workload), "workload_from": source, **length}, True)
        return
    factor = run.family.geometry.factor
    largest = (
        f"{workload.micro_batch_size} x {workload.width * factor}x{workload.height * factor} px with "
        f"{workload.text_tokens} text tokens, from {source}"
    )
    counted = [(name, "known once there is a cache" if count is None else f"{count:,.12g}") for name, count in length.items()]
    _table("memory plan", [*counted, ("largest micro-batch", largest), *memory.describe(plan)])


def machine(workspace: Path) -> dict[str, Any]:
    """What there is: Python, devices, memory, disk, libraries against their supported ranges, and optional parts."""
    import psutil
    import torch

    place = next(folder for folder in (workspace.absolute(), *workspace.absolute().parents) if folder.exists())
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    libraries = list(_libraries())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda_runtime": torch.version.cuda,
        "devices": _devices(),
        "num_cpu_cores": allowed,
        "memory_bytes": psutil.virtual_memory().total,
        "free_memory_bytes": psutil.virtual_memory().available,
        "workspace": str(workspace),
        "free_disk_bytes": shutil.disk_usage(place).free,
        "cpp_compiler": next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None),
        "libraries": [one for one in libraries if not one["extra"]],
        "optional": [one for one in libraries if one["extra"]],
    }


def planned(run: "Run", world_size: int = 1) -> "tuple[MemoryPlan, Workload, str]":
    """The memory plan of a run, its largest micro-batch, and where that was read.

    Raises:
        ModelError: the model is not on this machine: its shapes are unknown.
    """
    from ftk import devices
    from ftk.train.inputs import check_optimizer, plan_sizes

    check_optimizer(run)
    model = _local_model(run)
    workload, source = _workload(run, world_size)
    return plan_sizes(run, model, workload, devices.resolve_device(run.config.train.device)).plan, workload, source


def planned_length(run: "Run") -> "dict[str, float | None]":
    """Steps and epochs of the run; of the two the run file gives one, and the cache is needed for the other."""
    from contextlib import closing

    from ftk.train.inputs import build_order, with_steps

    train = run.config.train
    if not _has_cache(run):
        return {"steps": train.steps if train.epochs is None else None, "epochs": train.epochs}
    with closing(_open_cache(run)) as store:
        order = build_order(run.config, store)
    steps = with_steps(run, order).config.train.steps
    return {"steps": steps, "epochs": round(order.epochs_of(steps), 2)}


def _show_layers(run: "Run", as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from ftk.train.layers import summarised, trained_layers

    layers, num_all = trained_layers(run, _local_model(run))
    if as_json:
        show("layers", {"layers": [asdict(layer) for layer in layers], "num_layers_of_model": num_all}, True)
        return
    total = sum(layer.num_parameters for layer in layers)
    title = f"{run.config.method.name} trains {total:,} parameters in {len(layers):,} of {num_all:,} layers"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    for column in ("layers", "weight", "trained"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for line in summarised(layers):
        table.add_row(line.name, f"{line.num_layers:,}", "x".join(map(str, line.weight)), f"{line.num_parameters:,}", line.kind)
    Console().print(table)


def _local_model(run: "Run") -> Path:
    """The folder of the base model on this machine; nothing is downloaded.

    Raises:
        ModelError: it is not there.
    """
    from ftk.errors import ModelError

    model = run.local_components(run.trained_components)
    if model is None:
        raise ModelError(
            f"model.path {run.config.model.path}: the denoiser is not on this machine, and its shapes are needed for a plan. "
            f"`ftk train` downloads it; or point model.path at a local folder."
        )
    return model


def _workload(run: "Run", world_size: int) -> "tuple[Workload, str]":
    from contextlib import closing

    from ftk.train import memory

    if not _has_cache(run):
        return memory.assumed_workload(run.config, run.family, world_size), "data.resolutions: there is no cache yet"
    with closing(_open_cache(run)) as store:
        workload = memory.cached_workload(store.table, run.family, run.config.train, world_size)
    return workload, f"the cache {run.paths.cache}"


def _has_cache(run: "Run") -> bool:
    from ftk import locations

    return locations.is_url(run.paths.cache) or (Path(run.paths.cache) / "cache.json").exists()


def _open_cache(run: "Run") -> "CacheStore":
    from ftk.cache.fetch import Download
    from ftk.cache.store import CacheStore

    cache = run.config.cache
    download = Download(directory=Path(cache.download_dir), max_bytes=round(cache.download_gib * 2**30))
    return CacheStore.open(run.paths.cache, download)


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        found.append(
            {
                "name": f"cuda:{number} {torch.cuda.get_device_name(number)}",
                "capability": f"{major}.{minor}",
                "free_bytes": free,
                "total_bytes": total,
                "computes_in_bf16": major >= 8,
            }
        )
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory()
        found.append({"name": "mps", "capability": "", "free_bytes": size, "total_bytes": size, "computes_in_bf16": False})
    return found


def _libraries() -> Iterator[dict[str, Any]]:
    """What ftk's own metadata requires; `extra` names the part that needs it, and is empty for what all need."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("ftk") or ():
        requirement = Requirement(line)
        named = re.search(r"""extra\s*==\s*["']([^"']+)["']""", str(requirement.marker or ""))
        extra = named[1] if named else ""
        if extra == "dev":
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        package = f"ftk[{extra}]" if extra else "ftk"
        is_fine = version is not None and requirement.specifier.contains(version.split("+")[0], prereleases=True)
        yield {
            "name": requirement.name,
            "version": version,
            "supported": str(requirement.specifier),
            "extra": extra,
            "is_fine": is_fine,
            "install": None if is_fine else f"pip install --upgrade '{package}'",
        }


def _for_people(report: dict[str, Any]) -> dict[str, Any]:
    from ftk.progress import human_bytes

    devices = [
        f"{one['name']}, compute capability {one['capability']}, {human_bytes(one['free_bytes'])} free of "
        f"{human_bytes(one['total_bytes'])}, {'bf16' if one['computes_in_bf16'] else 'no fast bf16'}"
        for one in report["devices"]
    ]
    wrong = [_line(one) for one in report["libraries"] if not one["is_fine"]]
    absent = [f"{_line(one)} for {one['extra']}" for one in report["optional"] if not one["is_fine"]]
    present = [f"{one['name']} {one['version']}" for one in report["optional"] if one["is_fine"]]
    return {
        **{name: value for name, value in report.items() if name not in ("devices", "libraries", "optional")},
        "GPUs": devices or "none: everything runs on the CPU",
        "libraries": wrong or "all within their supported ranges",
        "optional": ", ".join(present) or "none installed",
        "to be installed": absent or "nothing",
    }


def _line(one: dict[str, Any]) -> str:
    found = "not installed" if one["version"] is None else f"version {one['version']}, not {one['supported']}"
    return f"{one['name']}: {found}; {one['install']}"


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    """As `show`, for rows whose names repeat."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ftk.progress import plain_text

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(plain_text(text)))
    Console().print(table)
