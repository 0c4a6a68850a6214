"""Full fine-tuning: the denoiser's own parameters, all or some of them, and those of its text encoders if they are asked for.

What is delivered is whole components.

Parameters in bf16 have fp32 masters in the optimizer, which are what a checkpoint holds; the delivery has the rounded ones.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk import storage
from ftk.errors import CheckpointError, ConfigError, did_you_mean
from ftk.methods import base
from ftk.methods.adapters import injection, narrowing, peft_directory, sharded, targets
from ftk.methods.adapters.targets import (
    EVERYTHING,
    Excluded,
    TargetPattern,
    Targets,
    TextEncoderConfig,
    TrainedComponent,
    chosen,
    names_in_group,
)
from ftk.methods.base import CacheNeeds, Export, check_format
from ftk.models.base import DENOISER, Conditions, Family, Model, TargetGroup, TrainsEncoders
from ftk.models.components import weights

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
    exclude: Excluded | None = Field(default=None, description="of the targets: modules or parameters that stay frozen")
    text_encoder: FullTextEncoderConfig | None = Field(default=None, description="train the text encoders too; {} by defaults")


class Full:
    """The model itself."""

    name = "full"
    Config: ClassVar[type[BaseModel]] = FullConfig
    FORMATS = ("diffusers",)

    def encoders(self, family: Family, settings: FullConfig) -> tuple[str, ...]:
        """By `text_encoder`, all that the family can train."""
        return base.trained_encoders(family, settings)

    def cache_needs(self, family: Family, settings: FullConfig) -> CacheNeeds:
        """Nothing but latents and texts."""
        return CacheNeeds()

    def parameter_groups(self, settings: FullConfig) -> Sequence[tuple[str, float]]:
        """The text encoders' own learning rate."""
        return base.encoder_rates(settings)

    def attach(self, model: Model, settings: FullConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Thaw the chosen parameters.

        Raises:
            ConfigError: a target that names nothing, or 8-bit weights, which can be neither trained nor delivered.
        """
        parameters: dict[str, torch.nn.Parameter] = {}
        for component in targets.trained_components(model.family, model.components, settings):
            layers = [module for module in component.module.modules() if targets.is_layer(module)]
            injection.refuse_quantised(layers, "method full")
            named = dict(component.module.named_parameters())
            for name in _chosen(list(named), component):
                parameters[component.prefix + name] = named[name].requires_grad_(True)
        return parameters

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's."""
        return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def changes_base(self, settings: FullConfig) -> bool:
        """It is the base that is trained."""
        return True

    def trains_base(self, settings: FullConfig) -> bool:
        """And nothing else."""
        return True

    def export(self, model: Model, settings: FullConfig, export: Export) -> list[Path]:
        """Each component's folder in the Diffusers layout: `config.json` and safetensors, in shards where they are large.

        Where the denoiser's weights are split over processes all must call, and one writes; the others return no files.
        """
        reason = "what was trained is the model, not something added to it. Use the written folder in place of the model's own."
        check_format(self.name, self.FORMATS, export.form, dict.fromkeys(("peft", "comfyui", "kohya", "lycoris"), reason))
        is_writer, files = sharded.writes(model.denoiser.state_dict().values()), []
        for name, module in model.components.items():
            folder = export.directory / (model.family.denoiser_attribute if name == DENOISER else name)
            _write(model.family, name, module, folder, export.metadata, is_writer)
            files += [path for path in folder.iterdir() if path.is_file()] if is_writer else []
        return sorted(files)

    def load_into(self, family: Family, pipeline: Any, directory: Path) -> Any:
        """Copy the weights into the pipeline's components."""
        denoiser = getattr(pipeline, family.denoiser_attribute)
        _read_into(denoiser, directory / family.denoiser_attribute, _DENOISER_FILES, {})
        for config in sorted(directory.glob("text_encoder*/config.json")):
            name = config.parent.name
            encoder = peft_directory.encoder_of(pipeline, name, directory)
            assert isinstance(family, TrainsEncoders)
            keys = {family.encoder_key(name, key): key for key in encoder.state_dict()}
            _read_into(encoder, config.parent, _ENCODER_FILES, keys)
        return pipeline

    def merge(self, model: Model) -> None:
        """Nothing: the weights are the trained ones."""

    def usage(self, family: Family, settings: FullConfig) -> str:
        """The components' own loaders."""
        names = [family.denoiser_attribute, *self.encoders(family, settings)]
        loader = 'type(pipeline.{0}).from_pretrained("path/to/this/folder", subfolder="{0}", dtype=pipeline.dtype)'
        return "\n".join(f"pipeline.{name} = {loader.format(name)}" for name in names)


def _chosen(names: list[str], component: TrainedComponent) -> list[str]:
    """Parameters that the component's targets mean, without those that are excluded."""
    return targets.narrowed(component, _named(names, component))


def _named(names: list[str], component: TrainedComponent) -> list[str]:
    """Parameters that the component's targets mean: a name, or the end of one, of a parameter or of a module that it lies in.

    An expression must match the whole name of either.
    """
    wanted = chosen(component)
    if isinstance(wanted, TargetGroup):
        modules = {f"{name}." for name in names_in_group(component, wanted)}
        return [name for name in names if any(f"{place}." in modules for place in narrowing.places(name))]
    if isinstance(wanted, TargetPattern):
        rule = re.compile(wanted.regex)
        matches = [name for name in names if any(rule.fullmatch(place) for place in narrowing.places(name))]
        if not matches:
            raise ConfigError(
                f"{component.setting}: {wanted.regex!r} matches the whole name of no module or parameter of {component.owner}."
            )
        return matches
    matched: set[str] = set()
    for suffix in wanted:
        matches = [name for name in names if any(("." + place).endswith("." + suffix) for place in narrowing.places(name))]
        if not matches:
            ends = {end for name in names for end in name.split(".") if not end.isdecimal()}
            meant = did_you_mean(suffix, sorted(ends))
            raise ConfigError(
                f"{component.setting}: {suffix!r} is the name of no module or parameter of {component.owner}.{meant}"
            )
        matched.update(matches)
    return [name for name in names if name in matched]


def _write(family: Family, component: str, model: Any, folder: Path, metadata: Mapping[str, str], is_writer: bool) -> None:
    """A component's folder; all processes, where its weights are split."""
    from huggingface_hub import split_torch_state_dict_into_shards

    is_denoiser = component == DENOISER
    pattern, tensors = _DENOISER_FILES, dict(model.state_dict())
    if not is_denoiser:
        assert isinstance(family, TrainsEncoders)
        pattern = _ENCODER_FILES
        tensors = {family.encoder_key(component, key): tensor for key, tensor in tensors.items()}
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


def _read_into(model: Any, folder: Path, pattern: str, keys: Mapping[str, str]) -> None:
    """Copy the weights into a model, a shard at a time: two of a large one would not fit.

    Args:
        keys: from names in the files to the model's own, where they differ.

    Raises:
        CheckpointError: they are of another model, or not whole.
    """
    import torch

    own, missing = model.state_dict(), set(model.state_dict())
    for path in _files(folder, pattern):
        tensors = {keys.get(name, name): tensor for name, tensor in peft_directory.read_tensors(path).items()}
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
    try:
        return weights.weight_files(folder, pattern.format(suffix=""))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}. Export it again.") from error


METHOD = Full()
