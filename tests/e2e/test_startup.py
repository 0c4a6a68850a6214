"""The command line answers at once, and the light parts stay light."""

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
