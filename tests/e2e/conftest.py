"""A workspace with drawn pictures and a tiny model, and the command line as a user calls it."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ftk.cli import app
from ftk.demo import draw_pictures


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


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
        }  # fmt: skip
        for name, section in sections.items():
            # Methods share no settings: another one's must not stay.
            is_part = isinstance(section, dict) and name != "method"
            tree[name] = {**tree[name], **section} if is_part else section
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write
