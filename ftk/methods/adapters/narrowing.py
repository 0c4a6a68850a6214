"""What narrows a method's targets: blocks by number (`layers`) and layers that are left out (`exclude`)."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from ftk.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from ftk.methods.adapters.targets import TrainedComponent


def _as_list(value: Any) -> Any:
    # As PEFT: a single number stands for a list of one.
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


BlockNumbers = Annotated[tuple[int, ...], BeforeValidator(_as_list)]


def ends_with(name: str, suffix: str) -> bool:
    """Whether `suffix` is the whole name of a module, or its last parts."""
    return f".{name}".endswith(f".{suffix}")


def without_excluded(component: "TrainedComponent", names: Sequence[str], excluded: Any) -> list[str]:
    """The names that `exclude` does not name.

    Args:
        excluded: ends of names, or a pattern with a `regex` that matches whole names. The end of a name may be that of a module
            around the layer.

    Raises:
        ConfigError: an entry excludes none of the targets, or all of them are excluded.
    """
    setting = component.setting.replace("targets", "exclude")
    expression = getattr(excluded, "regex", None)
    remaining = list(names)
    for entry in [expression] if expression is not None else excluded:
        matched = {
            name
            for name in names
            if (re.fullmatch(entry, name) if expression is not None else any(ends_with(place, entry) for place in places(name)))
        }
        if not matched:
            ends = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2)}
            raise ConfigError(f"{setting}: {entry!r} excludes none of the {len(names)} targets.{did_you_mean(entry, ends)}")
        remaining = [name for name in remaining if name not in matched]
    if not remaining:
        raise ConfigError(f"{setting}: all {len(names)} layers of {component.setting} are excluded, so nothing is trained.")
    return remaining


def in_blocks(component: "TrainedComponent", names: Sequence[str], numbers: Sequence[int], pattern: str | None) -> list[str]:
    """The names in blocks of these numbers.

    A block is numbered by its place in the list that holds it. PEFT takes the last number in a name that is followed by another
    part, which is the number of a feed-forward layer for `blocks.5.ff.net.0.proj`; here it is that of the family's own block.

    Args:
        pattern: the name of the list, where a model has several, or where the numbers of another list are meant.

    Raises:
        ConfigError: there is no such list, or no block of a number.
    """
    by_name = {name: number for name in names if (number := _block_number(component, name, pattern)) is not None}
    present = sorted(set(by_name.values()))
    if not present:
        where = f"a list {pattern!r}" if pattern else "a numbered block"
        raise ConfigError(f"method.layers: none of the {len(names)} targets lies in {where} of {component.owner}.")
    absent = sorted(set(numbers) - set(present))
    if absent:
        raise ConfigError(
            f"method.layers: {', '.join(map(str, absent))} {'is' if len(absent) == 1 else 'are'} no block of {component.owner} "
            f"with a target in it. Their numbers are {present[0]} to {present[-1]}."
        )
    return [name for name in names if by_name.get(name) in set(numbers)]


def places(name: str) -> list[str]:
    """The name, and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _block_number(component: "TrainedComponent", name: str, pattern: str | None) -> int | None:
    if pattern is not None:
        matched = re.search(rf"(?:^|\.){re.escape(pattern)}\.(\d+)(?:\.|$)", name)
        return int(matched[1]) if matched else None
    for place in reversed(places(name)):
        last = place.rpartition(".")[2]
        if last.isdecimal() and type(component.module.get_submodule(place)).__name__ in component.block_classes:
            return int(last)
    return None


PEFT_NAMES: Mapping[str, str] = {
    "r": "rank",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "initialisation",
    "init_weights": "initialisation",
    "oft_block_size": "block_size",
    "boft_block_size": "block_size",
    "boft_block_num": "block_num",
    "boft_n_butterfly_factor": "butterfly_factors",
    "boft_dropout": "dropout",
    "use_effective_conv2d": "effective_convolution",
    "loraplus_lr_ratio": "lora_plus",
    "network_dim": "rank",
    "network_alpha": "alpha",
}
"""What PEFT and sd-scripts call a setting that has another name here."""


def refuse_other_names(tree: Any, valid: Collection[str]) -> Any:
    """Refuse a setting under the name that PEFT or sd-scripts give it, with the name that it has here.

    Raises:
        ValueError: there is such a setting.
    """
    for key in set(tree) - set(valid) if isinstance(tree, Mapping) else ():
        if PEFT_NAMES.get(key, key) in valid:
            raise ValueError(f"`{key}` is called `{PEFT_NAMES[key]}` here")
    return tree
