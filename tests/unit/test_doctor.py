"""`ftk doctor`: what there is, and how a run would fit it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ftk.cli import doctor
from ftk.errors import ConfigError, ModelError

RUN = """
run: r
workspace: {workspace}
model: {{family: qwen-image, path: {model}}}
data:
  sources: [{{path: photos}}]
  resolutions: [64]
train: {{precision: fp32, device: cpu, memory: {{device_gib: 0.01}}}}
"""


@pytest.fixture
def run_file(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(workspace=tmp_path / "work", model=tiny_model))
    return path


def invoked(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(doctor.doctor)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})


def test_the_machine_is_described_as_json(tmp_path: Path) -> None:
    report = json.loads(invoked("--json", "--workspace", str(tmp_path / "not" / "there")).stdout)
    assert report["num_cpu_cores"] >= 1
    assert report["free_disk_bytes"] > 0
    named = {one["name"]: one for one in report["libraries"]}
    assert named["torch"]["is_fine"]
    assert named["torch"]["version"]
    assert named["diffusers"]["supported"] == "<0.50,>=0.42"


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "peft" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    text = invoked().stdout
    assert "wandb: not installed; pip install --upgrade 'ftk[wandb]'" in text
    assert "peft: version 0.1, not >=0.18; pip install --upgrade 'ftk'" in text


def test_a_run_is_planned_from_its_resolutions_before_there_is_a_cache(run_file: Path) -> None:
    text = invoked(str(run_file)).stdout
    assert "1 x 64x64 px with 1024 text tokens, from data.resolutions" in text
    assert "checkpointed blocks" in text
    assert "planned for train.memory.device_gib" in text
    plan = json.loads(invoked(str(run_file), "--json", "--set", "train.memory.checkpointing=all").stdout)["plan"]
    assert plan["num_checkpointed"] == plan["num_blocks"] == 2


def test_a_run_is_planned_from_its_cache(run_file: Path, tmp_path: Path, written_cache: Callable[..., Any]) -> None:
    written_cache(tmp_path / "work" / "cache")
    found = json.loads(invoked(str(run_file), "--json").stdout)
    # the widest bucket of that cache is 64x80 px, its longest caption there has 7 tokens
    assert found["workload"] == {
        "height": 10, "width": 8, "text_tokens": 7, "micro_batch_size": 1, "world_size": 1, "reference_tokens": 0,
    }  # fmt: skip
    assert "work/cache" in found["workload_from"]


def test_a_model_that_is_not_here_is_not_downloaded_for_a_plan(run_file: Path) -> None:
    with pytest.raises(ModelError, match="not on this machine"):
        invoked(str(run_file), "--set", "model.path=Qwen/Qwen-Image")


def test_the_trained_layers_are_listed_with_their_shapes(run_file: Path) -> None:
    settings = ("--set", "method.targets=attention+mlp", "--set", "method.rank=4", "--set", "method.exclude=[to_v]")
    text = invoked(str(run_file), "--layers", *settings).stdout
    assert "transformer_blocks.0-1.attn.to_q" in text
    assert "to_v" not in text
    listed = json.loads(invoked(str(run_file), "--layers", "--json", *settings).stdout)
    by_name = {layer["name"]: layer for layer in listed["layers"]}
    layer = by_name["transformer_blocks.1.attn.to_q"]
    rows, columns = layer["weight"]
    assert layer["num_parameters"] == 4 * (rows + columns)
    assert layer["kind"] == "Linear"
    total = sum(each["num_parameters"] for each in listed["layers"])
    assert f"lora trains {total:,} parameters in {len(by_name)} of {listed['num_layers_of_model']} layers" in text


def test_layers_need_a_run_file() -> None:
    with pytest.raises(ConfigError, match="name its file"):
        invoked("--layers")
