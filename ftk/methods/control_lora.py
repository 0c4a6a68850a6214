"""Control LoRA: a control image's latents are further input channels of the denoiser, beside a LoRA on its layers.

The new columns of the input layer are zeros at first, so training starts at the base. They are trained whole, as a layer beside
the untouched one. The file has them as a LoRA on the widened layer, of as many ranks as there are columns: the form of FLUX.1's
Control LoRAs, which `FluxControlPipeline` loads.

Source: diffusers, `examples/flux-control/train_control_lora_flux.py`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, Field, model_validator

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import lora
from ftk.methods.adapters import injection, peft_directory
from ftk.methods.adapters.targets import Targets
from ftk.methods.base import CacheNeeds, Export, MergedPipeline, empty_control
from ftk.models.base import DENOISER, Conditions, ControlForm, Family, Model

if TYPE_CHECKING:
    import torch

NETWORK = "control_in"
"""Its name in `Model.extras`."""
_FAMILY = "ftk_adapter_of"
"""In the file's header: the family whose denoiser it was trained with."""
_ARGUMENTS = ("control", "control_strength")
_REASON = "its readers do not widen a model's input layer. Write diffusers."
_LOADING = """\
from ftk.methods import control_lora
pipeline = control_lora.load(pipeline, "path/to/this/folder")  # draw with control=..., an image"""


class ControlLoraConfig(lora.LoraConfig):
    """Settings under `method:`: those of `lora` that go with it."""

    rank: int = Field(default=32, ge=1)
    targets: Targets = Field(default="attention+mlp", description="as of lora; the new columns are trained whatever it names")

    @model_validator(mode="after")
    def _lora_alone(self) -> Self:
        if self.dora or self.initialisation in ("pissa", "olora"):
            named = "dora: true" if self.dora else f"initialisation: {self.initialisation}"
            raise ValueError(f"`{named}` is not for control-lora, whose adapter can be switched off at any time. Leave it out")
        for name in ("modules_to_save", "text_encoder"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` is not for control-lora, which adapts layers of the denoiser alone. Leave it out")
        return self


class ControlLora(lora.Lora):
    """A LoRA, and the columns of the input layer that read the control image."""

    name = "control-lora"
    Config: ClassVar[type[BaseModel]] = ControlLoraConfig
    reads_several = False
    FORMATS: tuple[str, ...] = ("diffusers",)
    REASONS: ClassVar[Mapping[str, str]] = dict.fromkeys(("peft", "comfyui", "kohya", "lycoris"), _REASON)

    def cache_needs(self, family: Family, settings: ControlLoraConfig) -> CacheNeeds:
        """Control images as latents."""
        return CacheNeeds(controls="latents")

    def attach(self, model: Model, settings: ControlLoraConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """The LoRA, and columns of zeros.

        Raises:
            ConfigError: the denoiser's input layer cannot be widened.
        """
        from ftk.methods.controls import input_columns

        layer = model.denoiser.get_submodule(input_columns.input_layer(model.family, model.denoiser))
        columns = input_columns.new(layer)
        parameters = super().attach(model, settings, seed)
        model.extras[NETWORK] = columns
        return {**parameters, f"{NETWORK}.weight": columns.weight}

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's, of both inputs."""
        import torch

        (latents_BCHW,) = conditions.controls
        if NETWORK not in model.extras:  # merged: the input layer takes both itself
            return model.family.predict(model, torch.cat([noisy_BCHW, latents_BCHW], 1), sigma_B, conditions)
        with _controlling(model.family, model.denoiser, model.extras[NETWORK], latents_BCHW, 1.0):
            return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def export(self, model: Model, settings: lora.LoraConfig, export: Export) -> list[Path]:
        """A LoRA file of diffusers, with a LoRA on the widened input layer in it."""
        import torch

        from ftk.methods.controls import input_columns

        self.check_format(export.form, settings)
        adapter, name = lora.adapter_of(model.denoiser, settings), input_columns.input_layer(model.family, model.denoiser)
        A, B = input_columns.as_factors(model.extras[NETWORK].weight.detach())
        peft_config, targets = adapter.settings, adapter.settings.target_modules
        own = adapter.factors.get(name)
        if own is not None:
            A = torch.cat([torch.cat([own.A, torch.zeros_like(own.A)], 1), A])
            B = torch.cat([own.B, B], 1)
        else:
            peft_config.target_modules = f"{targets}|{name}" if isinstance(targets, str) else {*targets, name}
        peft_config.rank_pattern = {name: len(A), **peft_config.rank_pattern}
        peft_config.alpha_pattern = {name: len(A), **peft_config.alpha_pattern}
        factors = {**adapter.factors, name: lora.Factors(A=A, B=B, magnitude=None)}
        whole = replace(export, metadata={**export.metadata, _FAMILY: model.family.name})
        return lora.write({DENOISER: replace(adapter, factors=factors)}, model.family, whole)

    def load_into(self, family: Family, pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> Any:
        """The LoRA into the denoiser, and a pipeline of ftk around the pipeline."""
        from ftk.methods.controls import input_columns

        path, denoiser = directory / lora.WEIGHTS_FILE, getattr(pipeline, family.denoiser_attribute)
        weight, tensors = _read(family, denoiser, path)
        columns = input_columns.new(denoiser.get_submodule(input_columns.input_layer(family, denoiser)))
        columns.weight.data.copy_(weight)
        peft_directory.check_fits(denoiser, tensors, path)
        _inject(denoiser, tensors, path, adapter)
        return _pipeline(family, pipeline, denoiser, columns.requires_grad_(False))

    def start_values(self, model: Model, path: Path) -> "tuple[dict[str, torch.Tensor], Sequence[Path]]":
        """Of a folder or a file, with the layers and ranks of this run.

        Raises:
            ConfigError: there is none, or it has other layers or ranks.
            CheckpointError: it is damaged, or no Control LoRA of this model.
        """
        file = path / lora.WEIGHTS_FILE if path.is_dir() else path
        if not file.is_file() or file.suffix != ".safetensors":
            raise ConfigError(
                f"train.start_from {path}: there is no Control LoRA. Name a folder with {lora.WEIGHTS_FILE}, such as a run's "
                f"adapter/, or a .safetensors file."
            )
        weight, tensors = _read(model.family, model.denoiser, file)
        expected, layers = injection.state(model.denoiser), injection.adapted(model.denoiser)
        shapes, wanted = ({name: tuple(each.shape) for name, each in tree.items()} for tree in (tensors, expected))
        if shapes != wanted:
            name = min(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
            raise ConfigError(
                f"train.start_from {file} has other layers or ranks than this run: {name} is {shapes.get(name, 'absent')} "
                f"there and {wanted.get(name, 'absent')} here. Set method.rank and method.targets as they were."
            )
        values = {f"{NETWORK}.weight": weight.float()}
        for name, tensor in tensors.items():
            layer, _, factor = name.removesuffix(".weight").rpartition(".")
            # The file holds the strength in B.
            scale = layers[layer].scaling[injection.ADAPTER] if factor == "lora_B" else 1.0
            values[f"{layer}.{factor}.{injection.ADAPTER}.weight"] = tensor.float() / scale
        return values, [file]

    def merge(self, model: Model) -> None:
        """Fold the LoRA in, and the columns into one convolution with the input layer.

        Raises:
            ConfigError: the input layer is linear: no pipeline of diffusers draws with such a widened transformer.
        """
        import torch

        from ftk.methods.controls import input_columns

        name = input_columns.input_layer(model.family, model.denoiser)
        if not isinstance(input_columns.plain(model.denoiser.get_submodule(name)), torch.nn.Conv2d):
            raise ConfigError(
                f"control-lora widens the input layer of {model.family.name}, and diffusers has no pipeline for such a "
                f"transformer: nothing of it can be merged. Use `ftk export`: ftk loads its file into the pipeline as it is."
            )
        injection.merge(model.denoiser)
        both = input_columns.widened(model.denoiser.get_submodule(name), model.extras.pop(NETWORK))
        model.denoiser.set_submodule(name, both)
        model.denoiser.register_to_config(in_channels=both.in_channels)

    def merged_pipeline(self, model: Model, directory: Path) -> MergedPipeline:
        """That of InstructPix2Pix, whose U-Nets have such an input; it gives them latents that are not normalised.

        At an `image_guidance_scale` of 1 its guidance is that of the base's pipeline, with the image in both branches.
        """
        import diffusers
        import torch

        from ftk.methods.controls import input_columns

        index = directory / "model_index.json"
        base = str(storage.read_json(index)["_class_name"])
        name = base.replace("Pipeline", "InstructPix2PixPipeline")
        constants = model.family.normalisation(directory)
        if not hasattr(diffusers, name) or any(constants["latents_mean"]):
            raise ConfigError(
                f"diffusers has no pipeline beside {base} that takes further inputs of the model as control-lora gives them: "
                f"nothing of it can be merged. Use `ftk export`."
            )
        weight = model.denoiser.get_submodule(input_columns.input_layer(model.family, model.denoiser)).weight
        std_C = torch.tensor(constants["latents_std"]).to(weight)
        weight.data[:, len(std_C) :] /= std_C[:, None, None]
        return MergedPipeline(name=name, usage="pipeline(prompt, image=control_image, image_guidance_scale=1)")

    def usage(self, family: Family, settings: Any) -> str:
        """ftk's loader."""
        return _LOADING

    def strength_refusal(self, settings: Any) -> str | None:
        """The LoRA alone has none: without the columns that it was trained with it only harms."""
        return "control-lora has the strength of its control images, `control_strength`."

    def dropped_control(self, control: "torch.Tensor", form: ControlForm) -> "torch.Tensor":
        """Latents of zeros, of which the columns add nothing."""
        return empty_control(control, form)

    def sampling_pipeline(self, model: Model, pipeline: Any) -> Any:
        """That of `load_into`, with the columns as they are now."""
        return _pipeline(model.family, pipeline, model.denoiser, model.extras[NETWORK])

    def pipeline_controls(self, controls: "Sequence[torch.Tensor]", strength: float = 1.0) -> dict[str, Any]:
        """One image's latents. The strength is that of the LoRA too: at 0 the base model draws."""
        (latents_BCHW,) = controls
        return dict(zip(_ARGUMENTS, (latents_BCHW, strength), strict=True))


def load(pipeline: Any, folder: str) -> Any:
    """A diffusers pipeline with the Control LoRA in a folder: draw with `control=`, an image, and `control_strength=`.

    Raises:
        CheckpointError: the folder holds none, or that of another model.
    """
    from ftk.models import base as families

    path = Path(folder) / lora.WEIGHTS_FILE
    name = peft_directory.read_header(path).get(_FAMILY, "")
    if name not in families.available():
        raise CheckpointError(f"{path} does not say which model it is for: it is no Control LoRA of ftk.")
    return METHOD.load_into(families.get(name), pipeline, path.parent)


@contextmanager
def _controlling(family: Family, denoiser: Any, columns: Any, latents_BCHW: "torch.Tensor", strength: float) -> Iterator[None]:
    """A context in which the input layer reads a control image's latents too, and the LoRA acts, both at a strength."""
    from ftk.methods.controls import input_columns, steering

    layer = denoiser.get_submodule(input_columns.input_layer(family, denoiser))
    added = input_columns.output(columns, latents_BCHW)
    added = added if strength == 1 else strength * added
    with injection.at_strength([denoiser], strength), steering.adding_to_output(layer, added):
        yield


def _pipeline(family: Family, pipeline: Any, denoiser: Any, columns: Any) -> Any:
    """The pipeline that draws with a control image."""
    from ftk.methods.controls import steering

    def controlling(latents_BCHW: "torch.Tensor", strength: float) -> Any:
        return _controlling(family, denoiser, columns, latents_BCHW.to(columns.weight), strength)

    def encode(pipeline: Any, pixels_BCHW: "torch.Tensor") -> "torch.Tensor":
        return family.encode_images(pipeline.vae, pixels_BCHW)[0]

    return steering.ControlledPipeline(pipeline, controlling, encode, _ARGUMENTS)


def _read(family: Family, denoiser: Any, path: Path) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
    """The columns' weight in a file, and the tensors of its LoRA by their names in the denoiser.

    Raises:
        CheckpointError: it is damaged, or no Control LoRA of this model.
    """
    from ftk.methods.controls import input_columns

    start = f"{family.denoiser_attribute}."
    tensors = {name.removeprefix(start): tensor for name, tensor in peft_directory.read_tensors(path).items()}
    name = input_columns.input_layer(family, denoiser)
    shape = denoiser.get_submodule(name).weight.shape
    A, B = (tensors.pop(f"{name}.{factor}.weight", None) for factor in ("lora_A", "lora_B"))
    if A is None or B is None or A.shape[1] != 2 * shape[1] or B.shape[0] != shape[0]:
        raise CheckpointError(
            f"{path} is no Control LoRA of this model, or was trained on another base model: it does not widen {name} from "
            f"{shape[1]} to {2 * shape[1]} inputs. Load it into the model that it was trained on."
        )
    weight, own = input_columns.from_factors(A, B)
    if own is not None:
        tensors |= {f"{name}.lora_A.weight": own[0], f"{name}.lora_B.weight": own[1]}
    return weight, tensors


def _inject(denoiser: Any, tensors: "Mapping[str, torch.Tensor]", path: Path, adapter: str) -> None:
    """A LoRA with alpha = rank, as ftk writes every one."""
    import peft

    ranks = {name.removesuffix(".lora_A.weight"): len(each) for name, each in tensors.items() if name.endswith("lora_A.weight")}
    exact = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    settings = peft.LoraConfig(
        r=1, lora_alpha=1, rank_pattern=exact, alpha_pattern=dict(exact), target_modules="|".join(map(re.escape, ranks))
    )
    peft_directory.inject_tensors(denoiser, settings, tensors, path, adapter)


METHOD = ControlLora()
