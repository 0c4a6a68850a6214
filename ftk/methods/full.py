"""Full fine-tuning: the denoiser's own parameters, all or some of them, and those of its text encoders if they are asked for.

What is delivered is whole components.

Parameters in bf16 have fp32 masters in the optimizer, which are what a checkpoint holds; the delivery has the rounded ones.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base
from ftk.methods.adapters import formats, injection, peft_directory, sharded, targets
from ftk.methods.base import (
    DENOISER,
    EVERYTHING,
    Components,
    TargetPattern,
    Targets,
    TextEncoderConfig,
    TrainedComponent,
    check_format,
    target_modules,
)
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

MAX_SHARD_SIZE = "5GB"
_DENOISER_FILES = "diffusion_pytorch_model{suffix}.safetensors"
_ENCODER_FILES = "model{suffix}.safetensors"


class FullTextEncoderConfig(TextEncoderConfig):
    """Settings under `method.text_encoder`."""

    targets: Targets = Field(default=EVERYTHING, description="as of the denoiser")


class FullConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Targets = Field(
        default=EVERYTHING, description="`all`, a group of the family, names of modules or parameters, or {regex: ...}"
    )
    text_encoder: FullTextEncoderConfig | None = Field(default=None, description="train the text encoders too; {} by defaults")


class Full:
    """The model itself."""

    name = "full"
    Config: ClassVar[type[BaseModel]] = FullConfig
    EXTRA: tuple[str, ...] = ()
    FORMATS = ("diffusers",)

    def needs(self, family: Family, config: FullConfig) -> tuple[str, ...]:
        """The denoiser, and by `text_encoder` the text encoders."""
        return base.needs(family, config)

    def parameter_groups(self, config: FullConfig) -> Sequence[tuple[str, float]]:
        """The text encoders' own learning rate."""
        return base.encoder_rates(config)

    def attach(self, components: Components, family: Family, config: FullConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Thaw the chosen parameters.

        Raises:
            ConfigError: a target that names nothing, or 8-bit weights, which can be neither trained nor delivered.
        """
        parameters: dict[str, torch.nn.Parameter] = {}
        for part in base.parts(components, family, config):
            layers = [module for module in part.module.modules() if targets.is_layer(module)]
            injection.refuse_quantised(layers, "method full")
            named = dict(part.module.named_parameters())
            for name in _chosen(list(named), part):
                parameters[part.prefix + name] = named[name].requires_grad_(True)
        return parameters

    def changes_base(self, config: FullConfig) -> bool:
        """It is the base that is trained."""
        return True

    def trains_base(self, config: FullConfig) -> bool:
        """And nothing else."""
        return True

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """The trained parameters by name."""
        return {name: parameter.detach() for name, parameter in _trained(components).items()}

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        import torch

        own = _trained(components)
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
        """Each component's folder in the Diffusers layout: `config.json` and safetensors, in shards where they are large.

        Where the denoiser's weights are split over processes all must call, and one writes; the others return no files.
        """
        reason = "what was trained is the model, not something added to it. Use the written folder in place of the model's own."
        check_format(self.name, self.FORMATS, form, dict.fromkeys(("peft", "comfyui", "kohya", "lycoris"), reason))
        is_writer, files = sharded.writes(components[DENOISER].state_dict().values()), []
        for name, model in components.items():
            folder = directory / (formats.component(family) if name == DENOISER else name)
            _write(model, folder, name == DENOISER, metadata, is_writer)
            files += [path for path in folder.iterdir() if path.is_file()] if is_writer else []
        return sorted(files)

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """Copy the weights into the pipeline's components."""
        denoiser = peft_directory.denoiser_of(pipeline)
        folder = directory / ("transformer" if denoiser is getattr(pipeline, "transformer", None) else "unet")
        _read_into(denoiser, folder, _DENOISER_FILES)
        for config in sorted(directory.glob("text_encoder*/config.json")):
            _read_into(peft_directory.encoder_of(pipeline, config.parent.name, directory), config.parent, _ENCODER_FILES)

    def merge(self, components: Components) -> None:
        """Nothing: the weights are the trained ones."""

    def usage(self, family: Family, config: FullConfig) -> str:
        """The components' own loaders."""
        names = [formats.component(family) if name == DENOISER else name for name in self.needs(family, config)]
        loader = 'type(pipeline.{0}).from_pretrained("path/to/this/folder", subfolder="{0}", dtype=pipeline.dtype)'
        return "\n".join(f"pipeline.{name} = {loader.format(name)}" for name in names)


def _trained(components: Components) -> "dict[str, torch.nn.Parameter]":
    """What is trained of all components."""
    found: dict[str, torch.nn.Parameter] = {}
    for name, model in components.items():
        found |= {base.prefix(name) + key: parameter for key, parameter in injection.trained(model).items()}
    return found


def _chosen(names: list[str], part: TrainedComponent) -> list[str]:
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


def _write(model: Any, folder: Path, is_denoiser: bool, metadata: Mapping[str, str], is_writer: bool) -> None:
    """A component's folder; all processes, where its weights are split."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = _DENOISER_FILES if is_denoiser else _ENCODER_FILES
    tensors = {name if is_denoiser else formats.clip_name(name): tensor for name, tensor in model.state_dict().items()}
    plan = split_torch_state_dict_into_shards(
        sharded.outlines(tensors, model.dtype), filename_pattern=pattern, max_shard_size=MAX_SHARD_SIZE
    )
    with storage.committing_directory(folder) if is_writer else contextlib.nullcontext(folder) as temporary:
        for file, names in plan.filename_to_tensors.items():
            whole = sharded.gather({name: tensors[name] for name in names}, model.dtype, keep=is_writer)
            if is_writer:
                peft_directory.commit_tensors(temporary / file, whole, metadata)
        if is_writer:
            storage.commit_json(temporary / "config.json", _settings(model, is_denoiser))
        if is_writer and plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            storage.commit_json(temporary / _index(pattern), index)


def _settings(model: Any, is_denoiser: bool) -> Any:
    """The component's configuration, without the folder that it was loaded from."""
    text = model.to_json_string() if is_denoiser else model.config.to_json_string()
    settings = {name: value for name, value in json.loads(text).items() if name != "_name_or_path"}
    return settings if is_denoiser else {**settings, "architectures": [type(model).__name__]}


def _read_into(model: Any, folder: Path, pattern: str) -> None:
    """Copy the weights into a model, a shard at a time: two of a large one would not fit.

    Raises:
        CheckpointError: they are of another model, or not whole.
    """
    import torch

    own, missing = model.state_dict(), set(model.state_dict())
    for path in _files(folder, pattern):
        tensors = {
            name if name in own else formats.here(model, name): tensor
            for name, tensor in peft_directory.read_tensors(path).items()
        }
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{path} is of another model: it holds {name} {tuple(tensor.shape)}, where this "
                    f"{type(model).__name__} has {tuple(own[name].shape) if name in own else 'nothing'}."
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        missing -= tensors.keys()
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of the model's tensors, such as {min(missing)}. Export it again.")


def _index(pattern: str) -> str:
    return f"{pattern.format(suffix='')}.index.json"


def _files(folder: Path, pattern: str) -> list[Path]:
    """The weights' files, by the index if there is one.

    Raises:
        CheckpointError: there are none, or the index cannot be read.
    """
    index = folder / _index(pattern)
    if not index.exists():
        return [folder / pattern.format(suffix="")]
    try:
        return [folder / name for name in sorted(set(storage.read_json(index)["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}. Export it again.") from error


METHOD = Full()
