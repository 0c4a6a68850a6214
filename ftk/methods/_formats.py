"""Names of adapter tensors in the delivery formats, by the rules of the programs that read them.

| format    | module `a.b.c` is named | read by |
|-----------|-------------------------|---------|
| comfyui   | `diffusion_model.a.b.c` of a transformer, `lora_unet_a_b_c` of a U-Net | ComfyUI |
| kohya     | `lora_unet_a_b_c`, U-Nets only | sd-scripts, A1111, Forge, ComfyUI, diffusers |
| lycoris   | `lycoris_a_b_c` | LyCORIS, ComfyUI |

ComfyUI's own U-Net has other module names; it finds diffusers' under `lora_unet_` (`comfy/lora.py`, `model_lora_keys_unet`).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ftk.errors import ConfigError
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

Stem = Callable[[str], str]
SINGLE_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
NAMED_FILES = {"comfyui": "comfyui.safetensors", "kohya": "kohya.safetensors", "lycoris": "lycoris.safetensors"}


_LDM_NAMES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
"""Modules of a U-Net that ComfyUI and sd-scripts know by the original model's names alone."""


def component(family: Family) -> str:
    """`transformer` or `unet`: the denoiser's folder, and what diffusers puts before its adapters' names."""
    return family.denoiser_components[0]


def stem(form: str, family: Family) -> Stem:
    """How a format names a module.

    Raises:
        ConfigError: the family's adapters have no kohya format.
    """
    is_unet = component(family) == "unet"
    if form == "kohya" and not is_unet:
        raise ConfigError(
            f"{family.name} has no kohya format: its names are those of Stable Diffusion's U-Net, and no reader of them knows "
            f"this transformer. Write comfyui: ComfyUI and diffusers read it."
        )
    if form == "lycoris":
        return lambda name: "lycoris_" + name.replace(".", "_")
    if is_unet:
        return lambda name: "lora_unet_" + _LDM_NAMES.get(name, name).replace(".", "_")
    return lambda name: f"diffusion_model.{name}"


def split(tensors: "Mapping[str, torch.Tensor]", kinds: tuple[str, ...]) -> "dict[str, dict[str, torch.Tensor]]":
    """Tensors by module, then by what they are: `MODULE.hada_w1_a` is `hada_w1_a` of `MODULE`."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        assert kind in kinds, name
        by_module.setdefault(module, {})[kind] = tensor
    return by_module
