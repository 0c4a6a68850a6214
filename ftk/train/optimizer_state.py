"""Whatever an optimizer keeps, as plain tensors and plain JSON: no pickle, nothing that loading could run.

A tree is a JSON value. Finite numbers, text, truth values and None stand for themselves; all else is an object of one tag:

    {"tensor": KEY}    a tensor, kept under KEY beside the tree       {"float": "nan"}   a number that JSON lacks
    {"list": [...]}    {"tuple": [...]}    {"dict": [[key, value], ...]}                 {"dtype": "float32"}
    {"subclass": ...}  a tensor of a class of its own (8-bit moments), by its parts as `__tensor_flatten__` gives them
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ftk.errors import CheckpointError, ConfigError

Place = Callable[[torch.Tensor], torch.Tensor]


def pack(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree of `value`; its tensors are added to `tensors` under `key` or names that begin with it.

    Raises:
        ConfigError: a kind of value that has no tree, so that a checkpoint could not hold it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if is_plain(value):
        tensors[key] = value.detach()
        return {"tensor": key}
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        return {"subclass": _pack_subclass(value, key, tensors)}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{key}.{number}", tensors) for number, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, Mapping):
        return {"dict": [[pack(name, key, tensors), pack(item, f"{key}.{name}", tensors)] for name, item in value.items()]}
    raise ConfigError(
        f"train.optimizer: it keeps {key}, a {type(value).__name__}, which a checkpoint cannot hold, "
        f"so the run could not be resumed. Choose another optimizer."
    )


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor], place: Place) -> Any:
    """Inverse of `pack`. `place` puts a tensor where the optimizer wants it.

    Raises:
        CheckpointError: a tensor, or the class of one, is not there.
    """
    if not isinstance(tree, Mapping):
        return tree
    ((tag, content),) = tree.items()
    match tag:
        case "float":
            return float(content)
        case "dtype":
            return getattr(torch, content)
        case "tensor":
            if content not in tensors:
                raise CheckpointError(f"The checkpoint has no tensor {content!r}, which its trainer.json names.")
            return place(tensors[content])
        case "subclass":
            return _unpack_subclass(content, tensors, place)
        case "list":
            return [unpack(item, tensors, place) for item in content]
        case "tuple":
            return tuple(unpack(item, tensors, place) for item in content)
        case "dict":
            return {unpack(name, tensors, place): unpack(item, tensors, place) for name, item in content}
    raise CheckpointError(f"The checkpoint's optimizer state has a value of the kind {tag!r}, which this ftk does not know.")


def is_plain(value: Any) -> bool:
    """A tensor that safetensors can hold as it is."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def names_in(tree: Any) -> set[str]:
    """The keys of all tensors that a tree names."""
    if isinstance(tree, Mapping):
        own = {tree["tensor"]} if set(tree) == {"tensor"} else set()
        return own.union(*(names_in(item) for item in tree.values()))
    return set().union(*(names_in(item) for item in tree)) if isinstance(tree, list) else set()


def _pack_subclass(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    parts, context = value.__tensor_flatten__()
    return {
        "class": f"{type(value).__module__}:{type(value).__qualname__}",
        "parts": [[name, pack(getattr(value, name), f"{key}.{name}", tensors)] for name in parts],
        "context": pack(context, key, tensors),
        "size": list(value.size()),
        "stride": list(value.stride()),
    }


def _unpack_subclass(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], place: Place) -> Any:
    module, _, name = content["class"].partition(":")
    # Only a tensor class that the configured optimizer has imported already: a checkpoint makes nothing run.
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, torch.Tensor)):
        raise CheckpointError(
            f"The checkpoint's optimizer state has tensors of the class {content['class']}, which the installed optimizer "
            f"does not have. Use the versions in the run's environment.json, or start over with --fresh."
        )
    parts = {part: unpack(tree, tensors, place) for part, tree in content["parts"]}
    unflatten: Any = found.__tensor_unflatten__  # type: ignore[attr-defined]
    return unflatten(parts, unpack(content["context"], tensors, place), torch.Size(content["size"]), content["stride"])
