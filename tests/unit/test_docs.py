"""What the documents show must be true: run files parse, commands and make targets exist."""

import re
from pathlib import Path

import yaml

from ftk.cli.app import app
from ftk.configs.schema import RunConfig

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


def test_run_files_in_the_readme_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        RunConfig.model_validate(yaml.safe_load(block))


def test_commands_in_the_readme_exist():
    commands = {command.name for command in app.registered_commands}
    shown = set(re.findall(r"^ftk (\w+)", README, re.MULTILINE)) | set(re.findall(r"`ftk (\w+)", README))
    assert shown
    assert shown <= commands


def test_make_targets_in_the_readme_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    shown = set(re.findall(r"\bmake (\w+)", README)) - {"to"}
    assert {"demo", "test", "bench", "setup"} <= shown
    for target in shown:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
