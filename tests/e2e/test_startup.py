"""The command line answers at once, and the light parts stay light."""

import os
import subprocess
import sys
import time

import pytest


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_answers_in_half_a_second():
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        shown = subprocess.run([sys.executable, "-m", "ftk", "--help"], capture_output=True, text=True, check=True).stdout
        seconds.append(time.monotonic() - started)
    assert "prepare" in shown
    assert min(seconds) <= 0.5


@pytest.mark.parametrize("module", ["torch", "accelerate", "pydantic"])
def test_help_imports_nothing_heavy(module):
    assert python(f"import sys, ftk.cli.app; print('{module}' in sys.modules)") == "False\n"


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


@pytest.mark.parametrize(
    "module",
    [
        "ftk.pipeline.stage",
        "ftk.pipeline.images",
        "ftk.configs.load",
        "ftk.storage",
        "ftk.models.qwen_image",
        "ftk.methods.lora",
    ],
)
def test_light_modules_import_no_torch(module):
    assert python(f"import sys, {module}; print('torch' in sys.modules)") == "False\n"
