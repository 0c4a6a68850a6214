"""Full fine-tuning: the denoiser's own parameters, all or some of them. What is delivered is the whole denoiser.

Parameters in bf16 have fp32 masters in the optimizer, which are what a checkpoint holds; the delivery has the rounded ones.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import _formats, _peft, _whole
from ftk.methods.base import (
    DENOISER,
    EVERYTHING,
    Components,
    Part,
    TargetPattern,
    Targets,
    check_format,
    parts,
    target_modules,
)
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

MAX_SHARD_SIZE = "5GB"
_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_SINGLE = _PATTERN.format(suffix="")
_INDEX = f"{_SINGLE}.index.json"


class FullConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Targets = Field(
        default=EVERYTHING, description="`all`, a group of the family, names of modules or parameters, or {regex: ...}"
    )


class Full:
    """The denoiser itself."""

    name = "full"
    Config: ClassVar[type[BaseModel]] = FullConfig
    EXTRA: tuple[str, ...] = ()
    FORMATS = ("diffusers",)

    def needs(self, family: Family, config: FullConfig) -> tuple[str, ...]:
        """The denoiser alone."""
        return (DENOISER,)

    def attach(self, components: Components, family: Family, config: FullConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Thaw the chosen parameters.

        Raises:
            ConfigError: a target that names nothing, or 8-bit weights, which can be neither trained nor delivered.
        """
        denoiser: Any = components["denoiser"]
        layers = [module for module in denoiser.modules() if _peft.is_layer(module)]
        _peft.refuse_quantised(layers, "method full")
        named = dict(denoiser.named_parameters())
        (part,) = parts(components, family, config)
        for name in _chosen(list(named), part):
            named[name].requires_grad_(True)
        return _peft.trained(denoiser)

    def changes_base(self, config: FullConfig) -> bool:
        """It is the base that is trained."""
        return True

    def trains_base(self, config: FullConfig) -> bool:
        """And nothing else."""
        return True

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """The trained parameters by name."""
        return {name: parameter.detach() for name, parameter in _peft.trained(components["denoiser"]).items()}

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        import torch

        own = _peft.trained(components["denoiser"])
        assert own.keys() == state.keys(), f"state of other parameters: {sorted(own.keys() ^ state.keys())[:3]}"
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def export(
        self,
        components: Components,
        family: Family,
        config: FullConfig,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """The denoiser's folder in the Diffusers layout: `config.json` and safetensors, in shards where they are large.

        Where its weights are split over processes all must call, and one writes; the others return no files.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        reason = "what was trained is the model, not something added to it. Use the written folder in place of the model's own."
        check_format(self.name, self.FORMATS, form, dict.fromkeys(("peft", "comfyui", "kohya", "lycoris"), reason))
        denoiser: Any = components["denoiser"]
        tensors = denoiser.state_dict()
        plan = split_torch_state_dict_into_shards(
            _whole.outlines(tensors, denoiser.dtype), filename_pattern=_PATTERN, max_shard_size=MAX_SHARD_SIZE
        )
        folder, is_writer = directory / _formats.component(family), _whole.writes(tensors.values())
        with storage.committing_directory(folder) if is_writer else contextlib.nullcontext(folder) as temporary:
            for file, names in plan.filename_to_tensors.items():
                whole = _whole.gather({name: tensors[name] for name in names}, denoiser.dtype, keep=is_writer)
                if is_writer:
                    _peft.commit_tensors(temporary / file, whole, metadata)
            if is_writer:
                storage.commit_json(temporary / "config.json", _settings(denoiser))
            if is_writer and plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                storage.commit_json(temporary / _INDEX, index)
        return sorted(path for path in folder.iterdir() if path.is_file()) if is_writer else []

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """Copy the weights into the pipeline's denoiser, a shard at a time: two of a large one would not fit."""
        import torch

        denoiser = _peft.denoiser_of(pipeline)
        folder = directory / ("transformer" if denoiser is getattr(pipeline, "transformer", None) else "unet")
        own, missing = denoiser.state_dict(), set(denoiser.state_dict())
        for path in _files(folder):
            tensors = _peft.read_tensors(path)
            for name, tensor in tensors.items():
                if name not in own or own[name].shape != tensor.shape:
                    raise CheckpointError(
                        f"{path} is of another model: it holds {name} {tuple(tensor.shape)}, where this "
                        f"{type(denoiser).__name__} has {tuple(own[name].shape) if name in own else 'nothing'}."
                    )
            with torch.no_grad():
                for name, tensor in tensors.items():
                    own[name].copy_(tensor)
            missing -= tensors.keys()
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the model's tensors, such as {min(missing)}. Export it again."
            )

    def merge(self, components: Components) -> None:
        """Nothing: the weights are the trained ones."""

    def usage(self, family: Family, config: FullConfig) -> str:
        """diffusers' loader of the component."""
        name = _formats.component(family)
        loader = f'type(pipeline.{name}).from_pretrained("path/to/this/folder", subfolder="{name}", dtype=pipeline.dtype)'
        return f"pipeline.{name} = {loader}"


def _chosen(names: list[str], part: Part) -> list[str]:
    """Parameters that the part's targets mean: a name, or the end of one, of a parameter or of a module that it lies in.

    An expression must match the whole name of either.
    """
    wanted = target_modules(part)
    if isinstance(wanted, TargetPattern):
        rule = re.compile(wanted.regex)
        found = [name for name in names if any(rule.fullmatch(place) for place in _places(name))]
        if not found:
            raise ConfigError(
                f"{part.setting}: {wanted.regex!r} matches the whole name of no module or parameter of {part.owner}."
            )
        return found
    chosen: set[str] = set()
    for suffix in wanted:
        found = [name for name in names if any(("." + place).endswith("." + suffix) for place in _places(name))]
        if not found:
            ends = {part for name in names for part in name.split(".") if not part.isdecimal()}
            near = difflib.get_close_matches(suffix, sorted(ends), n=3, cutoff=0.5)
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{part.setting}: {suffix!r} is the name of no module or parameter of {part.owner}.{meant}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _places(name: str) -> list[str]:
    """A parameter's name, and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _settings(denoiser: Any) -> Any:
    """The component's configuration, without the folder that it was loaded from."""
    settings = json.loads(denoiser.to_json_string())
    return {name: value for name, value in settings.items() if name != "_name_or_path"}


def _files(folder: Path) -> list[Path]:
    """The weights' files, by the index if there is one.

    Raises:
        CheckpointError: there are none, or the index cannot be read.
    """
    if not (folder / _INDEX).exists():
        return [folder / _SINGLE]
    try:
        return [folder / name for name in sorted(set(storage.read_json(folder / _INDEX)["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _INDEX} is damaged: {error}. Export it again.") from error


METHOD = Full()
