"""Files of the delivery formats that hold one adapter, and the names of the tensors in them.

| format    | module `a.b.c` is named | read by |
|-----------|-------------------------|---------|
| comfyui   | as the family says, such as `diffusion_model.a.b.c` of a transformer | ComfyUI |
| kohya     | `lora_unet_a_b_c`, SDXL's by their original names | sd-scripts, musubi-tuner, A1111, Forge, ComfyUI, diffusers |
|           | `lora_te_text_model_a_b_c` of a CLIP text encoder | the same |
| lycoris   | `lycoris_a_b_c` | LyCORIS, ComfyUI |

Which names a reader knows for a model is the family's to say: `Family.adapter_names`.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ftk.models.base import AdapterNames

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger("ftk")
SINGLE_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
WORDS_FILE = "learned_embeds"
"""What diffusers looks for in a folder as the vectors of a new word; the beginning of the names of several."""
NAMED_FILES = {"comfyui": "comfyui.safetensors", "kohya": "kohya.safetensors", "lycoris": "lycoris.safetensors"}


_READERS = {
    ("comfyui", "lora"): "ComfyUI, diffusers",
    ("comfyui", "dora"): "ComfyUI; not diffusers, which leaves out dora_scale",
    ("comfyui", "lycoris"): "ComfyUI",
    ("comfyui", "whole"): "ComfyUI; not diffusers, which refuses diff and diff_b",
    ("kohya", "lora"): "sd-scripts or musubi-tuner, A1111, Forge, ComfyUI, diffusers",
    ("kohya", "lycoris"): "sd-scripts with LyCORIS or musubi-tuner, A1111, Forge, ComfyUI",
    ("lycoris", "lycoris"): "LyCORIS, ComfyUI",
}


def readers(form: str, kind: str) -> str:
    """Which programs read a file of one of the formats in `NAMED_FILES`: a note in its header.

    Args:
        kind: `lora`, `dora`, or `lycoris` for LoHa and LoKr; `whole` where modules were trained whole beside it.
    """
    return _READERS[form, kind]


def warn_of_unread(form: str, names: AdapterNames, modules: Iterable[str]) -> None:
    """Log which layers the format's main reader passes over."""
    unread = [name for name in modules if not names.is_read(name)]
    if unread:
        LOGGER.warning(
            "%s: sd-scripts and its relatives, musubi-tuner among them, have no place for %d of the layers and pass over them: "
            "%s. ComfyUI and diffusers read them.",
            form,
            len(unread),
            ", ".join(unread),
        )


def split(tensors: "Mapping[str, torch.Tensor]", kinds: tuple[str, ...]) -> "dict[str, dict[str, torch.Tensor]]":
    """Tensors by module, then by what they are: `MODULE.hada_w1_a` is `hada_w1_a` of `MODULE`."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        assert kind in kinds, name
        by_module.setdefault(module, {})[kind] = tensor
    return by_module
