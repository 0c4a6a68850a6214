"""Which safetensors files hold a component's weights, and what their headers say. No tensor is read, and no torch needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftk import storage
from ftk.errors import ModelError, did_you_mean

_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(?P<early>-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?P<late>-\d+-of-\d+)?"
    r"\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")


@dataclass(frozen=True, slots=True)
class Tensor:
    """An entry of a safetensors header: the dtype by its name there (`F16`, `BF16`) and the shape."""

    dtype: str
    shape: tuple[int, ...]


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. The library checks the header against the size of the file.

    Raises:
        ModelError: it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
            return {name: Tensor(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}. Download it again.") from None


def metadata(path: Path) -> Mapping[str, str]:
    """The text metadata in the header of a safetensors file that `header` accepts."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.metadata() or {}


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a component's weights: those that `NAME.index.json` lists, else the file itself.

    Raises:
        ValueError: the index is damaged, or names a file outside of the folder.
    """
    index = folder / f"{name}.index.json"
    if not index.exists():
        return [folder / name]
    try:
        names = set(storage.read_json(index)["weight_map"].values())
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} cannot be read ({type(error).__name__}: {error})") from None
    return [folder / storage.plain_name(file) for file in sorted(names)]


def needs_weights(folder: Path) -> bool:
    """Whether a component's folder is that of a network; tokenizers and schedulers have no weights."""
    return (folder / "config.json").is_file() and not folder.name.startswith(("tokenizer", "scheduler"))


def variants(folder: Path) -> dict[str | None, list[Path]]:
    """The files of a component's weights by variant, indexes of shards among them; None stands for those without one."""
    files: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _FILE.fullmatch(path.name) or _INDEX.fullmatch(path.name)
        if match:
            files.setdefault(match["variant"], []).append(path)
    return files


def chosen_variant(folder: Path, wanted: str | None) -> str | None:
    """The variant of a component that is read: `wanted` where there is one of it, else the plain weights, else the only one.

    Raises:
        ModelError: the folder has no weights that can be read, or several variants of which none is `wanted`.
    """
    files = variants(folder)
    if wanted in files:
        return wanted
    if None in files:
        return None
    if not files:
        other = sorted(path.name for path in folder.iterdir() if path.name != "config.json")
        raise ModelError(
            f"{folder} has no weights as safetensors. Found: {', '.join(other) or 'config.json alone'}. Other formats are not "
            f"read: download the safetensors files, or convert the model."
        )
    names = sorted(filter(None, files))
    if wanted is None and len(names) == 1:
        return names[0]
    problem = "several variants and no plain weights" if wanted is None else f"no variant {wanted!r}"
    meant = did_you_mean(wanted, names) if wanted else ""
    raise ModelError(f"{folder} has {problem}. Set model.variant to one of: {', '.join(names)}.{meant}")


def plain_names(folder: Path, variant: str) -> dict[str, Path]:
    """The files of one variant by the names that they have without it; shards keep theirs, which the index lists."""
    named = {}
    for path in variants(folder)[variant]:
        index, file = _INDEX.fullmatch(path.name), _FILE.fullmatch(path.name)
        if index:
            named[f"{index['stem']}.safetensors.index.json"] = path
        elif file and not (file["early"] or file["late"]):
            named[f"{file['stem']}.safetensors"] = path
        else:
            named[path.name] = path
    return named
