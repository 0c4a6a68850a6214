"""Every family on its tiny model, through prepare, cache, train and sample, as a user calls them."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ftk.cache.store import CacheStore
from ftk.configs.schema import negative_key
from ftk.models import sdxl
from ftk.models.components.geometry import SampleGeometry
from ftk.run import load_run
from ftk.train.data import BatchBuilder
from ftk.train.inputs import open_inputs

NEW_FAMILIES = ["stable-diffusion", "sdxl"]


@pytest.fixture
def run_file(workspace: Callable[..., Path], tiny_models: Callable[[str], Path]) -> Callable[..., Path]:
    """A run over drawn pictures with a family's tiny model; two sample pictures, by guidance, while training."""

    def write(family: str, **train: object) -> Path:
        settings = {"steps": 4, "checkpoint_every": 2, "sigma": {"weighting": "min_snr"}, **train}
        return workspace(
            model={"family": family, "path": str(tiny_models(family))},
            data={"flip": True},
            train=settings,
            sample={"every": 2, "guidance_scale": 2.0, "width": 64, "height": 64},
        )

    return write


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_a_family_goes_all_the_way_and_resumes_exactly(
    run_file: Callable[..., Path], ftk: Callable, tmp_path: Path, family: str
) -> None:
    path = run_file(family)
    for stage in ("prepare", "cache"):
        assert (result := ftk(stage, path)).code == 0, result.err
    assert (result := ftk("train", path, "--dry-run")).code == 0, result.err
    assert (result := ftk("train", path)).code == 0, result.err
    run = tmp_path / "work" / "runs" / "test"
    losses = pq.read_table(run / "metrics.parquet")["loss"].to_pylist()
    assert len(losses) == 4
    assert all(0 < loss < 3 for loss in losses)
    tensors = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in tensors)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_B." in name)
    assert sorted(one.name for one in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    for steps in (2, 4):
        assert (result := ftk("train", path, "--set", "run=halves", "--set", f"train.steps={steps}")).code == 0, result.err
    halves = load_file(run.parent / "halves" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(tensor, halves[name]) for name, tensor in tensors.items())
    result = ftk("sample", path, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["num_images"] == 2
    with Image.open(report["grid"]) as grid:
        assert grid.width > 128


def test_sdxl_is_told_of_each_samples_own_size_and_crop(run_file: Callable[..., Path], ftk: Callable) -> None:
    path = run_file("sdxl")
    for stage in ("prepare", "cache"):
        assert (result := ftk(stage, path)).code == 0, result.err
    run = load_run(path)
    inputs = open_inputs(run, torch.device("cpu"))
    store: CacheStore = inputs.store
    builder = BatchBuilder(store=store, run=run, sigmas=inputs.sigmas, dtype=torch.float32)
    assert run.family.name == "sdxl"
    seen = set()
    for number, row in enumerate(store.table.to_pylist()):
        geometry_BG = builder.fixed([number], 0, 4).conditions.geometry_BG
        assert geometry_BG is not None
        geometry = SampleGeometry(**{field.name: row[field.name] for field in fields(SampleGeometry)})
        assert geometry_BG.tolist() == [geometry.numbers()]
        time_ids = sdxl.time_ids(geometry_BG)
        left = row["resize_width"] - row["bucket_width"] - row["crop_x"] if row["flipped"] else row["crop_x"]
        assert time_ids[0, 2:].tolist() == [row["crop_y"], left, row["bucket_height"], row["bucket_width"]]
        assert time_ids[0, :2].tolist() == [row["height"], row["width"]]
        seen.add(tuple(time_ids[0].tolist()))
    assert len(seen) > 1


def test_dropped_captions_of_sdxl_train_zeros_until_the_run_file_names_a_text(
    run_file: Callable[..., Path], ftk: Callable, tmp_path: Path
) -> None:
    path = run_file("sdxl", caption_dropout=0.5, steps=2)
    for stage in ("prepare", "cache", "train"):
        assert (result := ftk(stage, path)).code == 0, result.err
    store = open_inputs(load_run(path), torch.device("cpu")).store
    assert not store.empty_text()["embeds"].any()
    assert not store.prompt(negative_key(None))["embeds"].any()
    other = ("--set", "train.caption_dropout_text=a picture")
    result = ftk("train", path, *other)
    assert result.code == 2
    assert "holds another text for dropped captions than 'a picture'. Run `ftk cache RUN.yaml`" in result.err
    result = ftk("cache", path, *other, "--json")
    assert json.loads(result.out)["num_texts_encoded"] == 1
    # The same run cannot go on with another text.
    result = ftk("train", path, *other, "--set", "train.steps=4")
    assert result.code == 2
    assert "dropped_text" in result.err
    assert (result := ftk("train", path, *other, "--set", "run=other")).code == 0, result.err
