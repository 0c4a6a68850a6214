"""A workspace with drawn pictures and a tiny model, and the command line as a user calls it."""

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ftk.cache import encode
from ftk.cli import app
from ftk.demo import draw_pictures


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _speed_measured_once() -> Iterator[None]:
    """`ftk cache` measures the machine's speed for the time that it announces, which takes longer than a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "speed", functools.cache(encode.speed))
        yield


@pytest.fixture(scope="session")
def ftk() -> Callable[..., Result]:
    """Run a command in this process, through the same entry point; no traceback may reach the user."""

    def call(*arguments: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        argv, code = sys.argv, 0
        sys.argv = ["ftk", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv = argv
        assert "Traceback" not in err.getvalue(), err.getvalue()
        return Result(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen]:
    """Start a command as a process of its own."""

    def begin(*arguments: object, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "ftk", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return begin


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A dozen captioned pictures of several shapes; read only."""
    directory = tmp_path_factory.mktemp("drawn") / "pictures"
    draw_pictures(directory, 12)
    return directory


@pytest.fixture
def workspace(tmp_path, pictures, tiny_model) -> Callable[..., Path]:
    """Write a run file over copies of the pictures and of the tiny model; returns its path."""
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copytree(tiny_model, tmp_path / "model")

    def write(**sections) -> Path:
        tree = {
            "run": "test",
            "workspace": str(tmp_path / "work"),
            "model": {"family": "qwen-image", "path": str(tmp_path / "model")},
            "data": {"sources": [{"path": str(tmp_path / "pictures")}], "resolutions": [64], "workers": 1},
            "cache": {"text_dtype": "float32", "latents_dtype": "float32"},
            "method": {"name": "lora", "rank": 4},
            "train": {
                "steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
                "checkpoint_every": 3, "caption_dropout": 0.2, "seed": 5,
            },
            "sample": {"prompts": ["a red circle"], "num_inference_steps": 2, "guidance_scale": 1.0},
            # Runs of other names deliver the same bytes then.
            "card": {"title": "test"},
        }  # fmt: skip
        for name, section in sections.items():
            # Methods share no settings: another one's must not stay.
            is_part = isinstance(section, dict) and name != "method"
            tree[name] = {**tree[name], **section} if is_part else section
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture(scope="session")
def _caches() -> dict[str, Path]:
    """Workspaces whose cache is ready, by what they were made from."""
    return {}


@pytest.fixture
def cached(ftk, workspace, tmp_path, tmp_path_factory, _caches) -> Callable[..., Path]:
    """As `workspace`, with its cache ready, and nothing trained. Equal data and encoders are encoded once, and copied."""

    def make(**sections) -> Path:
        run_file = workspace(**sections)
        tree = yaml.safe_load(run_file.read_text())
        for name in ("every", "at_start"):
            tree["sample"].pop(name, None)
        made_from = [tree[section] for section in ("model", "data", "cache", "sample")]
        made_from.append(tree["train"].get("loss", {}).get("preservation"))
        name = repr(made_from).replace(str(tmp_path), "")
        if name not in _caches:
            assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
            _caches[name] = tmp_path_factory.mktemp("cached") / "work"
            shutil.copytree(tmp_path / "work", _caches[name])
        shutil.copytree(_caches[name], tmp_path / "work", dirs_exist_ok=True)
        return run_file

    return make
