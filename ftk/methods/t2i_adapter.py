"""T2I-Adapter: a small network reads the pixels of a control image, and what it makes of them is added inside the denoiser.

With a U-Net it is diffusers' `T2IAdapter`, which its pipelines load: its features are added to those of each level, once for
all noise levels. It starts from random weights, as published. With a transformer it is ftk's own, see `token_adapter`.

Sources: Mou et al. 2023 (arXiv 2302.08453); diffusers, `examples/t2i_adapter/train_t2i_adapter_sdxl.py`.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods.adapters import peft_directory
from ftk.methods.base import CacheNeeds, Export, check_format, empty_control
from ftk.methods.controls import unet_adapter
from ftk.models.base import Conditions, ControlForm, Family, Model

if TYPE_CHECKING:
    import torch

NETWORK = "t2i_adapter"
"""Its name in `Model.extras`."""
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FAMILY = "ftk_adapter_of"
"""In the file's header: the family whose denoiser it was trained with."""
_U_NET_ARGUMENT = "down_intrablock_additional_residuals"
_TRANSFORMER_ARGUMENT = "controlnet_block_samples"
_ARGUMENTS = ("image", "adapter_conditioning_scale")
"""What the pipelines call the control image and its strength."""
_LOADING_U_NET = """\
import diffusers
adapter = diffusers.T2IAdapter.from_pretrained("path/to/this/folder", dtype=pipeline.dtype)
adapter_pipeline = getattr(diffusers, type(pipeline).__name__.replace("Pipeline", "AdapterPipeline"))
pipeline = adapter_pipeline.from_pipe(pipeline, adapter=adapter, dtype=pipeline.dtype)  # draw with image=..."""
_LOADING_TRANSFORMER = """\
# No other program than ftk reads this adapter.
from ftk.methods import t2i_adapter
pipeline = t2i_adapter.load(pipeline, "path/to/this/folder")  # draw with image=..."""


class T2IAdapterConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter_type: Literal["full_adapter", "full_adapter_xl", "light_adapter"] | None = Field(
        default=None, description="of a U-Net, diffusers' names; by default the first that fits it"
    )
    num_res_blocks: int = Field(default=2, ge=1, description="residual blocks for each feature")
    width: int | None = Field(default=None, ge=1, description="of a transformer: channels of the residual blocks; 320")
    stages: int | None = Field(default=None, ge=1, description="of a transformer: how many features; at most 4 by default")


class T2IAdapter:
    """The denoiser stays as it is."""

    name = "t2i-adapter"
    Config: ClassVar[type[BaseModel]] = T2IAdapterConfig
    FORMATS = ("diffusers",)
    reads_several = False

    def encoders(self, family: Family, settings: T2IAdapterConfig) -> tuple[str, ...]:
        """None; refuses what only the other kind of denoiser has."""
        ours, others = ("a U-Net", ("width", "stages")) if _is_unet(family) else ("a transformer", ("adapter_type",))
        for name in others:
            if getattr(settings, name) is not None:
                raise ConfigError(f"method.{name} has no effect with {family.name}, whose denoiser is {ours}. Leave it out.")
        return ()

    def cache_needs(self, family: Family, settings: T2IAdapterConfig) -> CacheNeeds:
        """Control images as pixels."""
        return CacheNeeds(controls="pixels")

    def attach(self, model: Model, settings: T2IAdapterConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """The network beside the denoiser.

        Raises:
            ConfigError: no such network fits this denoiser.
        """
        import torch

        from ftk.methods.controls import steering

        denoiser = model.denoiser
        # Values are drawn on the CPU, the same for every device; shapes alone have none.
        with torch.random.fork_rng(devices=[]), torch.device("meta" if denoiser.device.type == "meta" else "cpu"):
            torch.manual_seed(seed)
            network = _new(model.family, denoiser, settings)
        model.extras[NETWORK] = steering.placed_as(denoiser, network).train()
        return {f"{NETWORK}.{name}": parameter for name, parameter in network.named_parameters()}

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's, with the features added to the denoiser's own."""
        (pixels_BCHW,) = conditions.controls
        with _adding(model.family, model.denoiser, model.extras[NETWORK], _as_image(pixels_BCHW), 1.0):
            return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def base_refusal(self, settings: T2IAdapterConfig) -> None:
        """The base model is there."""

    def base_prediction(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's."""
        import torch

        with torch.no_grad():
            return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def export(self, model: Model, settings: T2IAdapterConfig, export: Export) -> list[Path]:
        """A folder in the layout of diffusers."""
        reason = "what was trained is a network beside the model, which no LoRA file can hold. Write diffusers."
        check_format(self.name, self.FORMATS, export.form, dict.fromkeys(("peft", "comfyui", "kohya", "lycoris"), reason))
        network, files = model.extras[NETWORK], [export.directory / _CONFIG]
        storage.commit_bytes(files[0], network.to_json_string().encode())
        header = {**export.metadata, _FAMILY: model.family.name}
        return [*files, peft_directory.commit_tensors(export.directory / _WEIGHTS, network.state_dict(), header)]

    def load_into(self, family: Family, pipeline: Any, directory: Path) -> Any:
        """diffusers' pipeline for adapters, or ftk's own around that of a transformer."""
        from ftk.methods.controls import steering

        denoiser = getattr(pipeline, family.denoiser_attribute)
        network = steering.placed_as(denoiser, _read(family, denoiser, directory))
        return _pipeline(family, pipeline, denoiser, network.requires_grad_(False).eval())

    def start_values(self, model: Model, path: Path) -> "tuple[dict[str, torch.Tensor], Sequence[Path]]":
        """Of a folder or a file, of ftk or of others.

        Raises:
            ConfigError: there is none.
            CheckpointError: it is damaged, or not of this network's shape.
        """
        file = path / _WEIGHTS if path.is_dir() else path
        if not file.is_file() or file.suffix != ".safetensors":
            raise ConfigError(
                f"train.start_from {path}: there is no T2I-Adapter. Name a folder with {_WEIGHTS}, such as a run's adapter/, "
                f"or a .safetensors file."
            )
        tensors, expected = peft_directory.read_tensors(file), model.extras[NETWORK].state_dict()
        shapes, wanted = ({name: tuple(each.shape) for name, each in tree.items()} for tree in (tensors, expected))
        if shapes != wanted:
            name = min(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
            raise CheckpointError(
                f"train.start_from {file} holds another adapter than this run trains: {name} is {shapes.get(name, 'absent')} "
                f"there and {wanted.get(name, 'absent')} here. Set the adapter's settings as they were."
            )
        return {f"{NETWORK}.{name}": tensor.float() for name, tensor in tensors.items()}, [file]

    def merge(self, model: Model) -> None:
        """There is nothing to merge."""
        raise ConfigError(f"{self.name} trains a network beside the model: nothing of it can be merged. Use `ftk export`.")

    def usage(self, family: Family, settings: T2IAdapterConfig) -> str:
        """diffusers' loader, or ftk's."""
        return _LOADING_U_NET if _is_unet(family) else _LOADING_TRANSFORMER

    def dropped_control(self, control: "torch.Tensor", form: ControlForm) -> "torch.Tensor":
        """Black."""
        return empty_control(control, form)

    def sampling_pipeline(self, model: Model, pipeline: Any) -> Any:
        """That of `load_into`, with the network as it is now."""
        return _pipeline(model.family, pipeline, model.denoiser, model.extras[NETWORK])

    def pipeline_controls(self, controls: "Sequence[torch.Tensor]", strength: float = 1.0) -> dict[str, Any]:
        """One image, which the pipelines want in [0, 1]."""
        (pixels_BCHW,) = controls
        return dict(zip(_ARGUMENTS, (_as_image(pixels_BCHW), strength), strict=True))


def load(pipeline: Any, folder: str) -> Any:
    """A diffusers pipeline with the adapter in a folder: draw with `image=`, a control image or [1,3,H,W] in [0, 1].

    Raises:
        CheckpointError: the folder holds no such adapter, or that of another model.
    """
    from ftk.models import base as families

    directory = Path(folder)
    name = peft_directory.read_header(directory / _WEIGHTS).get(_FAMILY, "")
    if name not in families.available():
        raise CheckpointError(f"{directory / _WEIGHTS} does not say which model it is for: ftk did not write it.")
    return METHOD.load_into(families.get(name), pipeline, directory)


def _is_unet(family: Family) -> bool:
    return family.denoiser_attribute == "unet"


def _as_image(pixels_BCHW: "torch.Tensor") -> "torch.Tensor":
    """From [-1, 1] to [0, 1]."""
    return (pixels_BCHW + 1) / 2


def _new(family: Family, denoiser: Any, settings: T2IAdapterConfig) -> Any:
    """A network with new weights that fits the denoiser."""
    from diffusers import T2IAdapter as Network

    if _is_unet(family):
        features = unet_adapter.taken(denoiser, family.geometry.factor)
        shape = unet_adapter.settings(settings.adapter_type, features)
        return Network(in_channels=3, num_res_blocks=settings.num_res_blocks, **shape)
    from ftk.methods.controls.token_adapter import TokenAdapter

    return TokenAdapter(
        width=settings.width or 320,
        hidden_width=denoiser.inner_dim,
        stages=_stages(family, denoiser, settings.stages),
        num_res_blocks=settings.num_res_blocks,
        pixels=family.geometry.pixel_multiple,
    )


def _stages(family: Family, denoiser: Any, wanted: int | None) -> int:
    """How many features a transformer is given.

    Raises:
        ConfigError: it takes none, or would not use as many.
    """
    from ftk.methods.controls.token_adapter import MOST_STAGES, num_used

    if _TRANSFORMER_ARGUMENT not in inspect.signature(type(denoiser).forward).parameters:
        raise ConfigError(
            f"method t2i-adapter: {type(denoiser).__name__}, the denoiser of {family.name}, takes nothing that could be added "
            f"to its blocks. Use control-lora."
        )
    blocks = len(denoiser.transformer_blocks)
    usable = [number for number in range(1, blocks + 1) if num_used(number, blocks) == number]
    if wanted is None:
        return max(number for number in usable if number <= MOST_STAGES)
    if wanted not in usable:
        raise ConfigError(
            f"method.stages: {wanted} features cannot be spread evenly over the {blocks} blocks of {family.name}. "
            f"Possible: {', '.join(map(str, usable))}."
        )
    return wanted


def _adding(
    family: Family, denoiser: Any, network: Any, image_BCHW: "torch.Tensor", strength: float
) -> AbstractContextManager[None]:
    """A context in which the denoiser is given what the network makes of a control image in [0, 1]."""
    from ftk.methods.controls import steering

    features = [strength * each for each in network(image_BCHW)] if strength != 1 else network(image_BCHW)
    return steering.passing(denoiser, _U_NET_ARGUMENT if _is_unet(family) else _TRANSFORMER_ARGUMENT, features)


def _pipeline(family: Family, pipeline: Any, denoiser: Any, network: Any) -> Any:
    """The pipeline that draws with a control image."""
    from ftk.methods.controls import steering

    if not _is_unet(family):
        return steering.ControlledPipeline(
            pipeline,
            lambda image_BCHW, strength: _adding(
                family, denoiser, network, image_BCHW.to(network.device, network.dtype), strength
            ),
            lambda _pipeline, pixels_BCHW: _as_image(pixels_BCHW),
            _ARGUMENTS,
        )
    return _of_diffusers(pipeline, network)


def _of_diffusers(pipeline: Any, network: Any) -> Any:
    """diffusers' pipeline for adapters, of the parts of its pipeline without one."""
    import diffusers

    name = type(pipeline).__name__
    pipeline_class = getattr(diffusers, name.replace("Pipeline", "AdapterPipeline"), None)
    if pipeline_class is None:
        raise ConfigError(f"method t2i-adapter: diffusers has no pipeline for adapters beside {name}.")
    parameters = inspect.signature(pipeline_class.__init__).parameters
    parts: Mapping[str, Any] = {**pipeline.config, **pipeline.components}
    made = pipeline_class(**{key: value for key, value in parts.items() if key in parameters}, adapter=network)
    made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    made.decode_latents = functools.partial(_decoded, pipeline.vae)
    # A family may encode texts in its own way (`clip_skip`, windows).
    if "encode_prompt" in vars(pipeline):
        made.encode_prompt = pipeline.encode_prompt
    return made


def _decoded(vae: Any, latents_BCHW: "torch.Tensor") -> Any:
    """[B,H,W,3] in [0, 1] on the CPU: what the pipeline's own method gives, which warns that diffusers will remove it."""
    pixels_BCHW = vae.decode(latents_BCHW / vae.config.scaling_factor, return_dict=False)[0]
    return (pixels_BCHW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()


def _read(family: Family, denoiser: Any, directory: Path) -> Any:
    """The network in a folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another model.
    """
    path = directory / _WEIGHTS
    tensors = peft_directory.read_tensors(path)
    written_for = peft_directory.read_header(path).get(_FAMILY, family.name)
    try:
        config = storage.read_json(directory / _CONFIG)
        network = _of_config(family, config)
        network.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit {directory / _CONFIG} beside it, or is an adapter of another model than {family.name}. "
            f"Export it again."
        ) from error
    if written_for != family.name or not _fits(family, denoiser, network.config):
        raise CheckpointError(
            f"{path} was trained on another base model, of {written_for}: it does not fit this {type(denoiser).__name__}. Load "
            f"it into the model that it was trained on."
        )
    return network


def _of_config(family: Family, config: Mapping[str, Any]) -> Any:
    """A network of these settings, its shapes alone."""
    import torch
    from diffusers import T2IAdapter as Network

    from ftk.methods.controls.token_adapter import TokenAdapter

    network_class = Network if _is_unet(family) else TokenAdapter
    if config["_class_name"] != network_class.__name__:
        raise ValueError(f"it is a {config['_class_name']}")
    with torch.device("meta"):
        return network_class(**{key: value for key, value in config.items() if not key.startswith("_")})


def _fits(family: Family, denoiser: Any, config: Any) -> bool:
    """Whether a denoiser can be given the features of a network with these settings."""
    if not _is_unet(family):
        return bool(config.hidden_width == denoiser.inner_dim and config.pixels == family.geometry.pixel_multiple)
    features = unet_adapter.made(config.adapter_type, config.channels, config.downscale_factor)
    return unet_adapter.taken(denoiser, family.geometry.factor)[: len(features)] == features


METHOD = T2IAdapter()
