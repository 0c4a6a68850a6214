"""Names of adapter tensors in the delivery formats, by the rules of the programs that read them.

| format    | module `a.b.c` is named | read by |
|-----------|-------------------------|---------|
| comfyui   | `diffusion_model.a.b.c` of a transformer, `lora_unet_a_b_c` of a U-Net | ComfyUI |
| kohya     | `lora_unet_a_b_c`, U-Nets only | sd-scripts, A1111, Forge, ComfyUI, diffusers |
|           | of a CLIP text encoder, both: `lora_te_text_model_a_b_c`; where there are two, `lora_te1_` and `lora_te2_` | |
| lycoris   | `lycoris_a_b_c` | LyCORIS, ComfyUI |

ComfyUI's own U-Net has other module names; it finds diffusers' under `lora_unet_` (`comfy/lora.py`, `model_lora_keys_unet`).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError
from ftk.methods.base import DENOISER
from ftk.models.base import Family, TrainsEncoders

if TYPE_CHECKING:
    import torch

Stem = Callable[[str], str]
SINGLE_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
NAMED_FILES = {"comfyui": "comfyui.safetensors", "kohya": "kohya.safetensors", "lycoris": "lycoris.safetensors"}


_CLIP_ROOTS = ("text_model.", "text_projection")
_LDM_NAMES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
"""Modules of a U-Net that ComfyUI and sd-scripts know by the original model's names alone."""


def component(family: Family) -> str:
    """`transformer` or `unet`: the denoiser's folder, and what diffusers puts before its adapters' names."""
    return family.denoiser_components[0]


def stem(form: str, family: Family, component: str = DENOISER) -> Stem:
    """How a format names a module of a component.

    Raises:
        ConfigError: the family's adapters have no kohya format, or text encoders none of LyCORIS'.
    """
    is_unet = _is_unet(family)
    if form == "kohya" and not is_unet:
        raise ConfigError(
            f"{family.name} has no kohya format: its names are those of Stable Diffusion's U-Net, and no reader of them knows "
            f"this transformer. Write comfyui: ComfyUI and diffusers read it."
        )
    if component != DENOISER:
        if form == "lycoris":
            raise ConfigError("LyCORIS' names are those of one model, and this trained text encoders too. Write kohya.")
        assert isinstance(family, TrainsEncoders)
        number = family.trainable_encoders.index(component) + 1 if len(family.trainable_encoders) > 1 else ""
        return lambda name: f"lora_te{number}_{clip_name(name).replace('.', '_')}"
    if form == "lycoris":
        return lambda name: "lycoris_" + name.replace(".", "_")
    if is_unet:
        return lambda name: "lora_unet_" + _LDM_NAMES.get(name, name).replace(".", "_")
    return lambda name: f"diffusion_model.{name}"


def clip_name(name: str) -> str:
    """A module or tensor of a CLIP text encoder as every reader knows it. transformers 5 has flattened some encoders' names."""
    return name if name.startswith(_CLIP_ROOTS) else _CLIP_ROOTS[0] + name


def here(model: Any, name: str) -> str:
    """Inverse of `clip_name`: how this model calls it."""
    return name if hasattr(model, "text_model") else name.removeprefix(_CLIP_ROOTS[0])


def _is_unet(family: Family) -> bool:
    return component(family) == "unet"


def split(tensors: "Mapping[str, torch.Tensor]", kinds: tuple[str, ...]) -> "dict[str, dict[str, torch.Tensor]]":
    """Tensors by module, then by what they are: `MODULE.hada_w1_a` is `hada_w1_a` of `MODULE`."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        assert kind in kinds, name
        by_module.setdefault(module, {})[kind] = tensor
    return by_module
