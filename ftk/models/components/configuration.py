"""Reads the configurations that come with a model, without trusting them: they may be damaged, or of other weights.

A model is built without its weights first, and compared with the headers of their files: a wrong configuration is refused
before it makes anything large.
"""

import inspect
import logging
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk import storage
from ftk.errors import FtkError, ModelError
from ftk.models.components import weights
from ftk.models.components.weights import Tensor
from ftk.progress import human_bytes

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger("ftk")
_MAX_BYTES = 1 << 20
_MODULES_PER_TENSOR = 10
"""Modules without weights (activations, lists) stand between those with weights; real models have fewer than 4 per tensor."""
_SPARE_MODULES = 1000
_SPARE_BYTES = 1 << 28
_MAX_STEPS = 100_000
_CHECKED: dict[tuple[Any, str], Any] = {}
"""Configurations that `checked` has accepted, by class and the digest of what was compared."""
_Check = Callable[[Any], bool]


@contextmanager
def reading(place: Path, what: str) -> Iterator[None]:
    """Turn what a library raises on files that it cannot read into a `ModelError`.

    Libraries raise errors of any class on wrong files, and tokenizers panics, which are no `Exception`.
    """
    try:
        yield
    except (FtkError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and "Panic" not in type(error).__name__:
            raise
        raise ModelError(f"{place} cannot be loaded as {what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) else line or type(error).__name__


def read(path: Path) -> dict[str, Any]:
    """Settings by name, all numbers finite.

    Raises:
        ModelError: the file is missing, damaged or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {human_bytes(path.stat().st_size)}, more than any configuration")
        tree = storage.read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist. Download the model again.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds {_kind(tree)} instead of settings by name.")
    stack: list[tuple[str, Any]] = list(tree.items())
    while stack:
        name, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{path}: `{name}` is {value}, which is not a finite number.")
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        stack += [(f"{name}.{key}", each) for key, each in inner]
    return tree


def number(path: Path, tree: Mapping[str, Any], name: str, valid: _Check, rule: str) -> float:
    """A number among settings.

    Raises:
        ModelError: it is missing, not a number, or not `valid`; `rule` says what is.
    """
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not valid(value):
        raise ModelError(f"{path}: `{name}` is {value!r:.80}. It must be {rule}.")
    return value


def scheduler(scheduler_class: Any, folder: Path) -> dict[str, Any]:
    """The settings of a scheduler of diffusers, whose tables have a size that fits.

    Raises:
        ModelError: the file is damaged, or a setting is of the wrong kind.
    """
    path = folder / "scheduler_config.json"
    tree = read(path)
    _check_settings(scheduler_class, path, tree)
    if "num_train_timesteps" in tree:
        number(path, tree, "num_train_timesteps", lambda value: 1 <= value <= _MAX_STEPS, f"between 1 and {_MAX_STEPS:,}")
    return tree


def checked(model_class: Any, folder: Path) -> Any:
    """A component's configuration with the defaults of its class, which describes the weights beside it.

    The model that shows this is built once for equal files: a command comes back to the same ones several times.

    Raises:
        ModelError: as `outline`.
    """
    tree, tensors = read(folder / "config.json"), _tensors(folder)
    contents = storage.digest([tree, {name: [each.dtype, each.shape] for name, each in tensors.items()}])
    if (model_class, contents) not in _CHECKED:
        _CHECKED[model_class, contents] = _outline(model_class, folder, tree, tensors).config
    return _CHECKED[model_class, contents]


def outline(model_class: Any, folder: Path, dtype: "torch.dtype") -> Any:
    """The shapes of a component of diffusers or transformers, frozen, on the `meta` device: no weights are read.

    Raises:
        ModelError: its configuration is damaged, or does not describe the weights beside it.
    """
    import torch

    model = _outline(model_class, folder, read(folder / "config.json"), _tensors(folder))
    # The `to` of diffusers' models warns of every dtype.
    return torch.nn.Module.to(model, dtype).requires_grad_(False)


def _outline(model_class: Any, folder: Path, tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    path = folder / "config.json"
    is_diffusers = hasattr(model_class, "from_config")
    if is_diffusers:
        named = tree.get("_class_name", model_class.__name__)
        if named != model_class.__name__:
            raise ModelError(f"{path}: `_class_name` is {named!r:.80}, and a {model_class.__name__} is expected here.")
        _check_settings(model_class, path, tree)
    try:
        model = _built(model_class, folder, tree, tensors)
    except ModelError as error:
        # What a library raises seldom names the setting; what is refused here says enough.
        name = _culprit(model_class, folder, tree, tensors) if is_diffusers and error.__cause__ is not None else None
        at = f". It could be built without `{name}`, which is {tree[name]!r:.80}." if name else "."
        raise ModelError(f"{str(error).rstrip('.')}{at}") from error
    _compare(model, path, tensors)
    return model


def _tensors(folder: Path) -> dict[str, Tensor]:
    """What the headers of a component's weights list."""
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    return {name: tensor for path in files for name, tensor in weights.header(path).items()}


def _check_settings(model_class: Any, path: Path, tree: Mapping[str, Any]) -> None:
    """Compare settings with the signature of a class of diffusers: their kinds alone, for annotations there are loose."""
    for name, parameter in inspect.signature(model_class.__init__).parameters.items():
        if name not in tree or parameter.default is inspect.Parameter.empty:
            continue
        outer, inner = _kinds(parameter.annotation)
        outer |= {_kind(parameter.default)}
        inner |= {_kind(each) for each in _flat(parameter.default)}
        value = tree[name]
        if value is None and not {"a number", "a whole number"} & outer:
            continue  # as published configurations have it where an older version of the class had no such setting
        wrong = [value] if not _is_of(value, outer) else [each for each in _flat(value) if inner and not _is_of(each, inner)]
        if wrong:
            expected = outer if wrong[0] is value else inner
            raise ModelError(f"{path}: `{name}` holds {wrong[0]!r:.80}, where {' or '.join(sorted(expected))} is expected.")
        sizes = [each for each in (value, *_flat(value)) if isinstance(each, int)]
        if min(sizes, default=0) < 0 and _kind(parameter.default) == "a whole number":
            raise ModelError(f"{path}: `{name}` is {value!r:.80}. It must not be negative.")


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", tuple: "a list"}
    return "null" if value is None else names.get(type(value), "settings by name")


def _kinds(annotation: Any) -> tuple[set[str], set[str]]:
    """The kinds of values that an annotation allows, and those of the items of its lists."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if annotation in names:
        return {names[annotation]}, set()
    origin, arguments = typing.get_origin(annotation), [each for each in typing.get_args(annotation) if each is not ...]
    parts = [_kinds(each) for each in arguments]
    outer = {kind for each, _ in parts for kind in each}
    inner = {kind for _, each in parts for kind in each}
    return ({"a list"}, outer | inner) if origin in (tuple, list) or annotation in (tuple, list) else (outer, inner)


def _is_of(value: Any, kinds: set[str]) -> bool:
    return _kind(value) in kinds or (_kind(value) == "a whole number" and "a number" in kinds)


def _flat(value: Any) -> Iterator[Any]:
    """The items of a list and of the lists in it."""
    for each in value if isinstance(value, list | tuple) else ():
        if isinstance(each, list | tuple):
            yield from _flat(each)
        else:
            yield each


def _built(model_class: Any, folder: Path, tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The model on the `meta` device."""
    import torch

    with reading(folder, model_class.__name__), torch.device("meta"), _bounded(folder, tensors):
        if hasattr(model_class, "from_config"):
            return model_class.from_config(dict(tree))
        return model_class(model_class.config_class.from_pretrained(folder))


@contextmanager
def _bounded(folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop the building of a model that has far more modules, or a far larger tensor, than its weights have tensors."""
    from torch.nn.modules.module import register_module_module_registration_hook
    from torch.utils._python_dispatch import TorchDispatchMode

    most = _MODULES_PER_TENSOR * len(tensors) + _SPARE_MODULES
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ModelError(f"{folder / 'config.json'} describes more layers than the {len(tensors)} tensors beside it.")

    largest = max((math.prod(each.shape) for each in tensors.values()), default=0)

    class Sizes(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            size = result.numel() if hasattr(result, "numel") else 0
            if size > largest + _SPARE_BYTES:
                raise ModelError(
                    f"{folder / 'config.json'} describes a tensor {list(result.shape)}. "
                    f"The largest of the weights beside it has {largest:,} values."
                )
            return result

    handle = register_module_module_registration_hook(counted)
    try:
        with Sizes():
            yield
    finally:
        handle.remove()


def _culprit(model_class: Any, folder: Path, tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """The setting without which a model can be built, if there is one."""
    for name in tree:
        if name.startswith("_") or name not in inspect.signature(model_class.__init__).parameters:
            continue
        try:
            _built(model_class, folder, {key: value for key, value in tree.items() if key != name}, tensors)
        except ModelError:
            continue
        return name
    return None


def _compare(model: Any, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a model of other shapes than its weights have; names may differ, which is for its own loader to see."""
    if not tensors:
        return
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            raise ModelError(
                f"{path} does not describe the weights beside it: {name} is {list(tensors[name].shape)} there, and by the "
                f"configuration {list(shape)}. Download the model again."
            )
    described, stored = (
        sum(math.prod(shape) for shape in each) for each in (shapes.values(), (tensor.shape for tensor in tensors.values()))
    )
    if described > 2 * stored:
        raise ModelError(f"{path} describes {described:,} parameters, and the weights beside it hold {stored:,}.")
