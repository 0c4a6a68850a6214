"""From a YAML file and `--set` to a validated `RunConfig`, and back to a resolved dump."""

import os
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ftk import locations
from ftk.configs import prompt_lines
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, did_you_mean

RECIPES = Path(__file__).parent / "recipes"
_MAX_FILE_BYTES = 1 << 20
_SECRET_KEY = re.compile(r"(token|secret|password|api_?key|credential)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|AKIA[0-9A-Z]{12,}|ghp_[A-Za-z0-9]{16,})\b|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


# Parts of a mistake's place that name no setting, but a validator or one type of several.
_BRANCH = re.compile(r"^(function-|literal\[|constrained-|tuple\[|list\[|dict\[)|^(int|float|str|bool|none)$")

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, without aliases (which can grow without bound), and refusing a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a string; people write it all the time and mean the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML safely; `ConfigError` names the place of a mistake."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ConfigError(f"{where} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # PyYAML lets its own conversions (of dates, of tagged values) fail with all of these.
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def load(path: Path, overrides: Sequence[str] = (), workspace: str | None = None) -> RunConfig:
    """Read a run file, apply `section.key=value` overrides in order, and validate the result.

    Raises:
        ConfigError: a file cannot be read, or what it says is wrong; every mistake is listed, with the nearest valid key.
    """
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _MAX_FILE_BYTES else ""
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.{_nearby_files(path)} `ftk init` writes a run file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a YAML file: {error}") from None
    if size > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes; a run file has at most {_MAX_FILE_BYTES:,}. Is it the right file?")
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not the sections of a run file. `ftk init` writes one.")
    for override in overrides:
        _apply_override(tree, override)
    if workspace is not None:
        tree["workspace"] = workspace
    sample = tree.get("sample")
    if isinstance(sample, dict) and isinstance(sample.get("prompts"), str):
        sample["prompts"] = prompt_lines.read(sample["prompts"])
    return validate(RunConfig, tree, str(path))


def validate(model: type[Model], tree: Any, where: str, prefix: str = "") -> Model:
    """Validate a tree; a `ConfigError` lists every mistake with its place, what was found, and the nearest valid key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = _joined([_explain(model, dict(problem), prefix) for problem in _causes(error)])
        raise ConfigError(f"{where}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from None


def resolved_yaml(config: RunConfig) -> str:
    """The configuration with every default filled in and every secret redacted, as YAML."""
    return yaml.safe_dump(redact(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def redact(value: Any) -> Any:
    """Replace values of secret-looking keys, and secret-looking parts of any string, by `***`: also a URL's user and query."""
    if isinstance(value, dict):
        return {
            key: "***" if _SECRET_KEY.search(str(key)) and isinstance(item, str) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return _SECRET_VALUE.sub("***", locations.redacted(value)) if isinstance(value, str) else value


def default_workers(configured: int) -> int:
    """`data.workers`, where 0 means one process a core that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return configured or available


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"--set {override}: expected section.key=value, for example --set train.steps=500")
    *parents, last = dotted.strip().split(".")
    node: Any = tree
    for name in [*parents, last][:-1]:
        child = _child(node, name, override)
        if child is None:
            child = {}
            _put(node, name, child, override)
        node = child
    if not isinstance(node, (list, dict)):
        raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value, not a section")
    _put(node, last, parse_yaml(value, f"--set {override}"), override)


def _put(node: Any, name: str, value: Any, override: str) -> None:
    node[_list_index(node, name, override) if isinstance(node, list) else name] = value


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, override)]
    if isinstance(node, dict):
        return node.get(name)
    raise ConfigError(f"--set {override}: {name!r} lies below a value, not a section")


def _list_index(node: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(f"--set {override}: {name!r} is not a position in a list of {len(node)} (they count from 0)")
    return int(name)


def _nearby_files(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
    return did_you_mean(path.name, names, str(folder))


def _causes(error: ValidationError) -> list[Any]:
    """The mistakes, without a list that seems too short only because its items are wrong."""
    places = [problem["loc"] for problem in error.errors()]
    return [
        problem
        for problem in error.errors()
        if problem["type"] != "too_short"
        or not any(place[: len(problem["loc"])] == problem["loc"] for place in places if place != problem["loc"])
    ]


def _explain(model: type[BaseModel], problem: dict[str, Any], prefix: str) -> str:
    location = [part for part in problem["loc"] if not (isinstance(part, str) and _BRANCH.match(part))]
    dotted = prefix + ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        valid = _fields_at(model, location[:-1])
        return f"`{dotted}` is not a setting.{did_you_mean(str(location[-1]), valid)} Valid here: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"`{dotted}` is missing. It has no default."
    message = str(problem["msg"]).removeprefix("Value error, ").replace("a valid tuple", "a list")
    found = problem.get("input")
    shown = f" (found {redact(found)!r})" if not isinstance(found, (dict, list, BaseModel)) else ""
    return f"`{dotted or 'the file'}`: {message}{shown}"


def _joined(lines: Sequence[str]) -> list[str]:
    """One line for each place: a value that fits none of several types is told of once, with all that it may be."""
    places: dict[str, list[str]] = {}
    for line in lines:
        place, separator, message = line.partition(": ")
        places.setdefault(place + separator, []).append(message)
    joined = []
    for place, messages in places.items():
        bare = [re.sub(r" \(found .*\)$", "", message) for message in messages[:-1]]
        joined.append(place + " or ".join([*bare, messages[-1]]))
    return joined


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The valid keys at a place in the tree, found by walking the annotations."""
    current: type[BaseModel] = model
    is_key = False
    for part in location:
        if isinstance(part, int) or is_key:
            is_key = False
            continue
        field = current.model_fields.get(part)
        inner = _section_in(field.annotation) if field else None
        if inner is None:
            return []
        current, is_key = inner, field is not None and get_origin(field.annotation) is dict
    return list(current.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, dict, Annotated):
        for argument in get_args(annotation):
            if (found := _section_in(argument)) is not None:
                return found
    return None
