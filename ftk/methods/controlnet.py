"""ControlNet: a trainable copy of a part of the denoiser reads a control image, and adds to the denoiser, which stays as it is.

Every output of the copy passes through a layer of zeros at first, so training starts at the base model itself.

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543); diffusers,
`examples/controlnet/train_controlnet.py`. The networks are diffusers' own classes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods.adapters import peft_directory
from ftk.methods.base import CacheNeeds, Export, check_format, empty_control
from ftk.models import base as families
from ftk.models.base import Conditions, ControlForm, Family, HasControlNetworks, Model, with_arguments
from ftk.models.components import control_networks, weights
from ftk.models.components.configuration import first_line

if TYPE_CHECKING:
    import torch

NETWORK = "controlnet"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"


class ControlNetConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: int | None = Field(
        default=None, ge=1, description="blocks of a transformer that are copied; 5 by default, or as many as there are"
    )


class ControlNet:
    """The base model stays as it is."""

    name = "controlnet"
    Config: ClassVar[type[BaseModel]] = ControlNetConfig
    FORMATS = ("diffusers",)
    reads_several = True

    def encoders(self, family: Family, settings: ControlNetConfig) -> tuple[str, ...]:
        """None.

        Raises:
            ConfigError: the family has no ControlNet.
        """
        _known(family)
        return ()

    def cache_needs(self, family: Family, settings: ControlNetConfig) -> CacheNeeds:
        """Control images in the form that the family's network reads."""
        return CacheNeeds(controls=_known(family).control_form)

    def thaw(self, model: Model, settings: ControlNetConfig) -> None:
        """Make the copy."""
        model.extras[NETWORK] = _known(model.family).make_control_network(model.denoiser, settings.blocks)

    def attach(self, model: Model, settings: ControlNetConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """The copy, whose outputs are zero; all of it is trained."""
        if NETWORK not in model.extras:
            self.thaw(model, settings)
        network = model.extras[NETWORK]
        control_networks.draw_embedding(network, seed)
        network.requires_grad_(True).train().to(next(model.denoiser.parameters()).device)
        return {f"{NETWORK}.{name}": parameter for name, parameter in network.named_parameters()}

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's, with what the network adds."""
        residuals = _known(model.family).control_residuals(model, model.extras[NETWORK], noisy_BCHW, sigma_B, conditions)
        return model.family.predict(with_arguments(model, **residuals), noisy_BCHW, sigma_B, conditions)

    def base_refusal(self, settings: ControlNetConfig) -> None:
        """The base model is there."""

    def base_prediction(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's."""
        import torch

        with torch.no_grad():
            return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def export(self, model: Model, settings: ControlNetConfig, export: Export) -> list[Path]:
        """A folder that the network's class reads with `from_pretrained`."""
        reads_it = "ComfyUI reads diffusers' file as it is. Use --format diffusers and put the file into models/controlnet."
        reason = "it is a network beside the model, and no adapter of the model's layers. Use --format diffusers."
        check_format(
            self.name,
            self.FORMATS,
            export.form,
            {**dict.fromkeys(("peft", "kohya", "lycoris", "a1111"), reason), "comfyui": reads_it},
        )
        network = model.extras[NETWORK]
        config = {name: value for name, value in json.loads(network.to_json_string()).items() if name != "_name_or_path"}
        storage.commit_json(export.directory / CONFIG_FILE, config)
        written = peft_directory.commit_tensors(export.directory / WEIGHTS_FILE, network.state_dict(), export.metadata)
        return [export.directory / CONFIG_FILE, written]

    def load_into(self, family: Family, pipeline: Any, directory: Path) -> Any:
        """The network beside the pipeline's components."""
        denoiser = getattr(pipeline, family.denoiser_attribute)
        network = _read(_known(family), denoiser, directory)
        return ControlledPipeline(family, pipeline, control_networks.placed(network, denoiser.device, denoiser.dtype).eval())

    def merge(self, model: Model) -> None:
        """There is nothing to merge."""
        raise ConfigError(
            f"{self.name} trains a network beside the model: nothing of it can be merged. Use `ftk export`, and load the "
            f"network in a pipeline for ControlNets."
        )

    def usage(self, family: Family, settings: ControlNetConfig) -> str:
        """The classes' own loaders."""
        network, controlled = (each.__name__ for each in _known(family).control_classes())
        return "\n".join(
            [
                f"from diffusers import {network}, {controlled}",
                f'controlnet = {network}.from_pretrained("path/to/this/folder", dtype=pipeline.dtype)',
                f"pipeline = {controlled}(**pipeline.components, controlnet=controlnet)",
            ]
        )

    def dropped_control(self, control: "torch.Tensor", form: ControlForm) -> "torch.Tensor":
        """Black pixels, or latents of zeros."""
        return empty_control(control, form)

    def sampling_pipeline(self, model: Model, pipeline: Any) -> Any:
        """The same, with the network as it is now."""
        return ControlledPipeline(model.family, pipeline, model.extras[NETWORK])

    def pipeline_controls(self, controls: "Sequence[torch.Tensor]", strength: float = 1.0) -> dict[str, Any]:
        """What a `ControlledPipeline` takes."""
        return {"controls": tuple(controls), "strength": strength}

    def start_values(self, model: Model, path: Path) -> "tuple[dict[str, torch.Tensor], Sequence[Path]]":
        """Of a folder in the Diffusers layout, or of a file from one, of ftk or of others.

        Raises:
            ConfigError: there is none, or it copies another number of blocks.
            CheckpointError: it is damaged, or was trained on another base model.
        """
        files = _files(path)
        tensors = {name: tensor for file in files for name, tensor in peft_directory.read_tensors(file).items()}
        expected = model.extras[NETWORK].state_dict()
        theirs, ours = _num_blocks(tensors), _num_blocks(expected)
        if theirs and ours and theirs != ours:
            raise ConfigError(
                f"train.start_from: {path} copies {theirs} blocks, and this run {ours}. Set method.blocks: {theirs}."
            )
        if single := [name for name in tensors.keys() - expected.keys() if name.startswith("single_transformer_blocks.")]:
            raise ConfigError(
                f"train.start_from: {path} copies single blocks too ({min(single)} and others), which ftk does not train. "
                f"Name a ControlNet of double blocks alone."
            )
        _check_shapes(tensors, expected, path)
        return {f"{NETWORK}.{name}": tensor.float() for name, tensor in tensors.items()}, files


class ControlledPipeline:
    """The family's pipeline with a network: it takes control images as `Conditions.controls` has them.

    diffusers' own pipelines take pictures. Those of families whose networks read latents encode them at random each time.
    """

    def __init__(self, family: Family, pipeline: Any, network: Any) -> None:
        self._family = _known(family)
        self._pipeline = pipeline
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    @property
    def components(self) -> dict[str, Any]:
        """Those of the pipeline, and the network."""
        return {**self._pipeline.components, NETWORK: self._network}

    def __call__(self, controls: "Sequence[torch.Tensor]", strength: float = 1.0, **options: Any) -> Any:
        return self._family.draw_controlled(self._pipeline, self._network, controls, strength, options)


def _known(family: Family) -> HasControlNetworks:
    """The family, if diffusers has a ControlNet for it.

    Raises:
        ConfigError: it has none; the message names the families that have.
    """
    if _is_known(family):
        assert isinstance(family, HasControlNetworks)
        return family
    reason = (
        "diffusers has no pipeline with a ControlNet for edit models" if family.references else "ftk knows no ControlNet of it"
    )
    known = [name for name in families.available() if _is_known(families.get(name))]
    raise ConfigError(
        f"method.name: controlnet cannot be trained for {family.name}: {reason}. It can be for {', '.join(known)}."
    )


def _is_known(family: Family) -> bool:
    return isinstance(family, HasControlNetworks) and family.references is None


def _read(family: HasControlNetworks, denoiser: Any, directory: Path) -> Any:
    """The network in a folder that `export` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or it was trained on another base model.
    """
    network_class, _ = family.control_classes()
    path = directory / WEIGHTS_FILE
    tensors = peft_directory.read_tensors(path)
    network = _empty(network_class, directory / CONFIG_FILE)
    _check_shapes(tensors, network.state_dict(), path)
    base = {name: tensor for name, tensor in denoiser.state_dict().items() if name in tensors}
    _check_shapes({name: tensors[name] for name in base}, base, path)
    network.load_state_dict(tensors)
    return network


def _empty(network_class: Any, path: Path) -> Any:
    """A network as a `config.json` describes it.

    Raises:
        CheckpointError: it is missing or damaged, or of another class.
    """
    try:
        config = storage.read_json(path)
        class_name, settings = config["_class_name"], {name: each for name, each in config.items() if name[0] != "_"}
        if class_name == network_class.__name__:
            return control_networks.built(network_class, settings)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: `ftk train` or `ftk export` writes it.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}. Export it again.") from error
    raise CheckpointError(
        f"{path} is of a {class_name!s:.80}, not of a {network_class.__name__}: it was trained on another base model. Use it "
        f"with that one."
    )


def _check_shapes(tensors: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    wrong = sorted(
        name
        for name in tensors.keys() | expected.keys()
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
    )
    if wrong or not tensors:
        raise CheckpointError(
            f"{path} was trained on another base model, or another size of this one: {len(wrong)} of its tensors are not as "
            f"here{f', such as {wrong[0]}' if wrong else ''}. Use it with the model that it was trained on."
        )


def _files(path: Path) -> list[Path]:
    """The safetensors files of a ControlNet."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if path.is_dir():
        try:
            files = weights.weight_files(path, WEIGHTS_FILE)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}. Download it again.") from error
        if all(file.is_file() for file in files):
            return files
        inner = " Did you mean the folder adapter/ in it?" if (path / "adapter" / WEIGHTS_FILE).is_file() else ""
    else:
        inner = ""
    raise ConfigError(
        f"train.start_from {path}: there is no ControlNet. Name a folder with {WEIGHTS_FILE}, such as a run's adapter/, or a "
        f".safetensors file.{inner}"
    )


def _num_blocks(names: Mapping[str, Any]) -> int:
    """How many blocks of a transformer these tensors are of."""
    return len({name.split(".")[1] for name in names if name.startswith("transformer_blocks.")})


METHOD = ControlNet()
