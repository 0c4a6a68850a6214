"""Prompts as lines of a text file, with the options that sd-scripts has for them: `a dog --n blurry --w 768 --h 1024 --d 7`.

Source: sd-scripts, `line_to_prompt_dict` in `library/train_util.py`.
"""

import re
from typing import Any

from ftk import locations
from ftk.errors import ConfigError, did_you_mean

_MAX_FILE_BYTES = 1 << 20
_OPTIONS = {"n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "s": "num_inference_steps",
            "l": "guidance_scale", "cn": "controls"}  # fmt: skip
_UNKNOWN = {"ss": "the sampler", "g": "embedded guidance", "fs": "the shift", "ctr": "truncated guidance",
            "rcfg": "renormalised guidance"}  # fmt: skip
_LISTED = ", ".join(f"--{option}" for option in _OPTIONS)
HAS_OPTIONS = re.compile(rf" --(?:{'|'.join(_OPTIONS)}) ")


def read(file: str) -> list[dict[str, Any]]:
    """`sample.prompts` of a text file; empty lines and those that begin with # are passed over.

    Raises:
        ConfigError: it cannot be read, or a line has an option that ftk does not know.
    """
    path = locations.local_path(file)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"sample.prompts: {file} has more than {_MAX_FILE_BYTES:,} bytes. Is it the right file?")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"sample.prompts: {file} cannot be read: {reason}. Name a text file with a prompt per line, or write a list of "
            f"prompts."
        ) from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    return [_entry(line, f"{file}, line {number}") for number, line in numbered if line and not line.startswith("#")]


def _entry(line: str, where: str) -> dict[str, Any]:
    """A line as an entry of `sample.prompts`; values are checked where all entries are."""
    prompt, *options = line.split(" --")
    entry: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        name, _, value = option.strip().partition(" ")
        name = name.lower()
        if name in _UNKNOWN:
            raise ConfigError(f"{where}: `--{name}` ({_UNKNOWN[name]}) is not known to ftk. Leave it out. Known are {_LISTED}.")
        if name not in _OPTIONS:
            raise ConfigError(
                f"{where}: `--{name}` is not an option of a prompt.{did_you_mean(name, _OPTIONS)} Known are {_LISTED}."
            )
        if _OPTIONS[name] in entry:
            raise ConfigError(f"{where}: `--{name}` stands twice.")
        entry[_OPTIONS[name]] = [value.strip()] if name == "cn" else value.strip()
    return entry
