"""`--dry-run` of every command leaves the workspace as it is: names, bytes and times of every file and folder."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from ftk import storage
from ftk.cli.app import app


def _state(*places: Path) -> dict[str, tuple[int, int, str]]:
    """Of everything below some folders: its type and mode, when it changed last, and what a file holds."""
    found = {}
    for place in places:
        for path in (place, *sorted(place.rglob("*"))):
            status = path.lstat()
            held = storage.sha256_file(path) if path.is_file() else ""
            found[str(path)] = (status.st_mode, status.st_mtime_ns, held)
    return found


COMMANDS = {
    "prepare": ("prepare", "RUN", "--dry-run"),
    "class images": ("prepare", "CLASS", "--make-class-images", "--dry-run"),
    "cache": ("cache", "RUN", "--dry-run"),
    "cache, something new": ("cache", "NEW", "--dry-run"),
    "train": ("train", "RUN", "--dry-run"),
    "train, another run": ("train", "OTHER", "--dry-run"),
    "run": ("run", "RUN", "--dry-run"),
    "sample": ("sample", "RUN", "--dry-run"),
    "export": ("export", "RUN", "--dry-run"),
    "export, all of it": ("export", "RUN", "--format", "comfyui", "--push", "ada/dog", "--dry-run"),
    "gc": ("gc", "WORK", "--dry-run"),
    "gc, also with --yes": ("gc", "WORK", "--yes", "--dry-run"),
    "doctor": ("doctor", "RUN"),
}


@pytest.fixture(scope="module")
def trained(ftk, pictures, tiny_model, tmp_path_factory) -> Path:
    """A folder with run files, and a workspace in which everything was done once, with garbage in its cache."""
    top = tmp_path_factory.mktemp("dry")
    tree = {
        "run": "test", "workspace": str(top / "work"), "model": {"family": "qwen-image", "path": str(tiny_model)},
        "data": {"sources": [{"path": str(pictures)}], "resolutions": [64], "workers": 1},
        "cache": {"text_dtype": "float32"}, "method": {"name": "lora", "rank": 2},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
        "sample": {"prompts": ["a red circle"], "num_inference_steps": 1},
    }  # fmt: skip
    (top / "class").mkdir()
    cats = {"path": str(top / "class"), "role": "class", "generate": {"prompt": "a cat", "count": 3}}
    files = {
        "RUN": tree, "OTHER": {**tree, "run": "other"}, "NEW": {**tree, "sample": {"prompts": ["another"]}},
        "CLASS": {**tree, "data": {**tree["data"], "sources": [*tree["data"]["sources"], cats]}},
    }  # fmt: skip
    for name, content in files.items():
        (top / f"{name}.yaml").write_text(yaml.safe_dump(content))
    # Encoded with a prompt that no sample names afterwards: something for gc to find.
    for command, name in (("prepare", "RUN"), ("cache", "NEW"), ("cache", "RUN"), ("train", "RUN"), ("export", "RUN")):
        assert (result := ftk(command, top / f"{name}.yaml")).code == 0, result.err
    return top


def _arguments(top: Path, command: tuple[str, ...]) -> list[str]:
    places = {name: str(top / f"{name}.yaml") for name in ("RUN", "OTHER", "NEW", "CLASS")}
    return [{**places, "WORK": str(top / "work")}.get(part, part) for part in command]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_changes_nothing(command, ftk, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = _state(trained)
    result = ftk(*_arguments(trained, COMMANDS[command]), "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)
    assert _state(trained) == before
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_an_empty_workspace_does_not_begin_one(ftk, trained, tmp_path):
    for command in ("prepare", "run"):
        result = ftk(command, trained / "RUN.yaml", "--workspace", tmp_path / "work", "--dry-run")
        assert result.code == 0, result.err
    for command in ("cache", "train"):
        assert ftk(command, trained / "RUN.yaml", "--workspace", tmp_path / "work", "--dry-run").code == 2
    assert list(tmp_path.iterdir()) == []


def test_every_command_with_a_dry_run_is_among_those(ftk):
    having = {command.name for command in app.registered_commands if "--dry-run" in ftk(command.name, "--help").out}
    assert {command[0] for command in COMMANDS.values()} == having | {"doctor"}


@pytest.mark.parametrize("part", ["", "1-of-2"])
def test_gc_waits_for_no_writer_and_says_who_writes(part, ftk, trained):
    """A part of a job array shares the lock of the whole: it writes all the same."""
    program = (
        "import sys; from pathlib import Path; from ftk import storage\n"
        "with storage.lock(Path(sys.argv[1]), sys.argv[2]):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    cache = trained / "work/cache"
    command = [sys.executable, "-c", program, str(cache), part]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "held\n"
        result = ftk("gc", cache, "--dry-run")
        assert (result.code, f"is being written by process {writer.pid}" in result.err) == (4, True)
        writer.stdin.close()
    assert ftk("gc", cache, "--dry-run").code == 0
