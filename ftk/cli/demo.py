"""`ftk demo`: the whole path on a tiny model and pictures of the program's own drawing."""

import time
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from ftk.cli.options import Json, show

_NUM_PICTURES = 24
_PLACES = {"model.path": "model", "data.sources.0.path": "pictures"}


def demo(
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="A folder to work in; a temporary one by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Try everything in a minute: no GPU, no download, no photos needed."""
    import tempfile

    root = Path(workspace) if workspace else Path(tempfile.mkdtemp(prefix="ftk-demo-"))
    started = time.monotonic()
    reports = _run(root)
    reports["demo"] = {"workspace": str(root), "seconds": round(time.monotonic() - started, 1)}
    if json:
        show("demo", reports, as_json=True)
    else:
        _render(root, reports)


def _run(root: Path) -> dict[str, Any]:
    import torch

    from ftk import storage
    from ftk.cli.run import run_all
    from ftk.configs.load import RECIPES, load
    from ftk.demo import draw_pictures
    from ftk.models import base as models
    from ftk.train import sample

    # The tiny model's operations last microseconds: threads would wait for each other longer than they work.
    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    run_file = root / "demo.yaml"
    storage.commit_bytes(run_file, (RECIPES / "demo.yaml").read_bytes())
    # JSON strings are YAML strings: any folder name survives --set
    places = [f"{key}={dumps(str(root / name))}" for key, name in _PLACES.items()]
    config = load(run_file, places, workspace=str(root))
    if not (root / "model" / "model_index.json").exists():
        models.get(config.model.family).tiny(root / "model")
    draw_pictures(root / "pictures", _NUM_PICTURES)
    reports: dict[str, Any] = run_all(config)
    reports["sample"] = asdict(sample.run(config))
    return reports


def _render(root: Path, reports: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ftk.progress import human_bytes

    prepare, cache, train, sample = (reports[name] for name in ("prepare", "cache", "train", "sample"))
    table = Table(title=f"What happened, in {reports['demo']['seconds']:.0f} s", title_justify="left")
    for column in ("stage", "what it did", "where"):
        table.add_column(column, overflow="fold")
    run = root / "runs" / "demo"
    rows = [
        ("prepare", f"{prepare['num_samples']} pictures into {len(prepare['buckets'])} aspect-ratio buckets, "
                    f"{prepare['num_rejects']} rejected", root / "prepared"),
        ("cache", f"{cache['num_latents_encoded']} images and {cache['num_texts_encoded']} captions encoded, "
                  f"{cache['num_latents_reused'] + cache['num_texts_reused']} reused, "
                  f"{human_bytes(cache['num_bytes'])}", root / "cache"),
        ("train", f"{train['step']} steps, {train['num_samples_seen']} samples, loss {train['loss']:.3f}, "
                  f"{train['seconds_per_step'] * 1000:.0f} ms a step", run / "adapter"),
        ("sample", f"{sample['num_images']} images, base beside adapter", sample["grid"]),
    ]  # fmt: skip
    for stage, what, where in rows:
        table.add_row(stage, what, str(where))
    console = Console()
    console.print(table)
    console.print(
        "\nThe model is tiny and random, so the pictures are noise: this shows the path, not the art.\n"
        "With your own photos (each IMG.jpg with its caption in IMG.txt beside it):\n\n"
        "  ftk init my-lora.yaml        then name your folder under data.sources\n"
        "  ftk run my-lora.yaml         prepare, cache, train; run it again at any time, it skips what is done\n"
        "  ftk sample my-lora.yaml      pictures from the base model and from your LoRA, side by side\n\n"
        f"Watch the training: tensorboard --logdir {run / 'logs'}",
        highlight=False,
        soft_wrap=True,
    )
