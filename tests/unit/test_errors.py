"""The errors' exit codes, and what a message suggests for a misspelt word."""

import subprocess
import sys

import pytest

from ftk import errors
from ftk.errors import did_you_mean


@pytest.mark.parametrize(
    ("given", "valid", "sentence"),
    [
        ("trian", ["steps", "train"], " Did you mean `train`?"),
        ("rr", ["r", "alpha"], " Did you mean `r`?"),
        ("x", ["train"], ""),
        ("train", [], ""),
        ("", ["train"], ""),
    ],
)
def test_the_nearest_word_is_suggested_or_none(given, valid, sentence):
    assert did_you_mean(given, valid) == did_you_mean(given, iter(valid)) == sentence


@pytest.mark.parametrize(("folder", "shown"), [(".", "photos"), ("a/b", "a/b/photos"), ("/", "/photos")])
def test_a_file_is_suggested_with_its_folder(folder, shown):
    assert did_you_mean("fotos", ["photos", "masks"], folder) == f" Did you mean `{shown}`?"


def test_everything_that_is_exported_is_there_and_every_error_is_exported():
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == "ftk.errors"}
    assert set(errors.__all__) == defined


def test_errors_import_nothing_heavy():
    """Every command imports them before it knows whether it will need to suggest anything."""
    program = "import sys; import ftk.errors; print('difflib' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
