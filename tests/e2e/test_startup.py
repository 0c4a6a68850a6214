"""The command line answers at once, because it loads next to nothing, and the light parts stay light."""

import os
import subprocess
import sys

import pytest


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


LOADED_BY_HELP = """
import sys
sys.argv = ["ftk", "--help"]
before = set(sys.modules)
from ftk.cli import app
try:
    app.main()
except SystemExit as end:
    assert not end.code
names = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(names), len(set(sys.modules) - before))
"""


def test_help_lists_the_commands_and_loads_nothing_but_typer():
    *shown, loaded = python(LOADED_BY_HELP).splitlines()
    assert any(line.split()[:1] == ["prepare"] for line in shown)
    *packages, number = loaded.split()
    # Not rich, pydantic, numpy, torch or anything else: with these few it answers in 0.3 s (benchmarks/overheads.py).
    assert set(packages) <= {"annotated_doc", "click", "ftk", "shellingham", "typer"}
    assert int(number) < 300


def loaded_by(modules, package):
    """The modules after whose import, one after the other in a fresh process, the package is loaded."""
    lines = ["import importlib, sys", f"for name in {modules!r}:", "    importlib.import_module(name)",
             f"    print(name, {package!r} in sys.modules)"]  # fmt: skip
    return [line.split()[0] for line in python("\n".join(lines)).splitlines() if line.endswith("True")]


@pytest.mark.parametrize("heavy", ["accelerate", "pydantic"])
def test_modules_that_every_command_loads_import_nothing_heavy(heavy):
    assert loaded_by(["ftk.cli.app", "ftk.cli.run", "ftk.errors", "ftk.contracts"], heavy) == []


def test_light_modules_import_no_torch():
    light = [
        "ftk.cli.app", "ftk.storage", "ftk.configs.load", "ftk.models.qwen_image", "ftk.methods.lora", "ftk.pipeline.images",
        "ftk.pipeline.stage",
    ]  # fmt: skip
    # The last one shows that torch would be seen.
    assert loaded_by([*light, "ftk.train.loop"], "torch") == ["ftk.train.loop"]


def test_webdataset_is_imported_without_torch_and_whole_for_whoever_asks_next():
    code = """if True:
        import sys
        from ftk.pipeline import light_webdataset
        library = light_webdataset.load()
        print("torch" in sys.modules, "webdataset" in sys.modules, light_webdataset.load() is library)
        import torch.utils.data, webdataset
        print(issubclass(webdataset.DataPipeline, torch.utils.data.IterableDataset))
        """
    assert python(code) == "False False True\nTrue\n"


@pytest.mark.parametrize("source", ["pictures", "prepared shards"])
def test_prepare_loads_webdataset_but_no_torch_in_any_of_its_processes(ftk, workspace, tmp_path, source):
    run_file = workspace(data={"sources": [{"path": str(tmp_path / "pictures")}], "workers": 2})
    if source == "prepared shards":
        assert ftk("prepare", run_file).code == 0
        tars = str(tmp_path / "work" / "prepared" / "shards" / "*.tar")
        run_file = workspace(workspace=str(tmp_path / "again"), data={"sources": [{"path": tars}], "workers": 2})
    # Python then names every module that it imports, in the workers and their server too.
    process = subprocess.run(
        [sys.executable, "-m", "ftk", "prepare", str(run_file)],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    modules = [line.rsplit("|", 1)[-1].strip() for line in process.stderr.splitlines() if line.startswith("import time:")]
    assert {"webdataset.writer", "webdataset.tariterators"} <= set(modules)
    assert modules.count("ftk.pipeline.images") > 1
    # Imports that fail are named too: `torch` is tried. Its own compiled part is loaded by a real import alone.
    assert [module for module in modules if module.startswith("torch._C")] == []
