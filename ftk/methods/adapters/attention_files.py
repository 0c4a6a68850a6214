"""Files of attention layers that were trained whole, as Custom Diffusion delivers them: weights, not differences.

For a U-Net the file is one that diffusers' `UNet2DConditionModel.load_attn_procs` reads: the tensors of a
`CustomDiffusionAttnProcessor` for each cross-attention. diffusers refuses a file that does not name all other attention too. In
its own pickled files that has an empty dict; its own safetensors files leave it out, and cannot be loaded. A tensor without
values does. For another denoiser the tensors have the names that they have in the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftk.errors import CheckpointError
from ftk.methods.adapters import peft_directory
from ftk.models.base import Family

UNET_FILE = "pytorch_custom_diffusion_weights.safetensors"
"""As diffusers calls it."""
OTHER_FILE = "custom_diffusion_weights.safetensors"
_PROCESSOR = ".processor."
_MARK = "_custom_diffusion"


def is_unet(family: Family) -> bool:
    """Whether diffusers has attention processors for the family's denoiser."""
    return family.denoiser_attribute == "unet"


def path_of(family: Family, directory: Path) -> Path:
    """Where the weights of a family's model lie in a delivery."""
    return directory / (UNET_FILE if is_unet(family) else OTHER_FILE)


def write(family: Family, denoiser: Any, layers: Sequence[str], directory: Path, metadata: Mapping[str, str]) -> Path:
    """Write what is trained of these layers; returns the file."""
    import torch

    modules = {name: denoiser.get_submodule(name) for name in layers}
    tensors = {
        f"{name}.{key}": each for name, layer in modules.items() for key, each in layer.named_parameters() if each.requires_grad
    }
    if is_unet(family):
        named = {_in_processor(name): tensor for name, tensor in tensors.items()}
        trained = {name.partition(_PROCESSOR)[0] for name in named}
        names = (name for name in denoiser.attn_processors if name.removesuffix(".processor") not in trained)
        tensors = named | {name: torch.empty(0) for name in names}
    return peft_directory.commit_tensors(path_of(family, directory), tensors, metadata)


def load(family: Family, denoiser: Any, directory: Path) -> None:
    """Copy what `write` wrote into a denoiser: what it draws is what diffusers' processors would draw, in less time.

    Raises:
        CheckpointError: the file is missing or damaged, or is of another model.
    """
    import torch

    path = path_of(family, directory)
    tensors = {_in_model(name): tensor for name, tensor in peft_directory.read_tensors(path).items() if tensor.numel()}
    parameters = dict(denoiser.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            here = tuple(parameters[name].shape) if name in parameters else "no such tensor"
            raise CheckpointError(
                f"{path} was trained on another base model: it holds {name} {tuple(tensor.shape)}, and this "
                f"{type(denoiser).__name__} has {here}. Load it into the model that it was trained on."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def usage(family: Family) -> str:
    """Python lines that load the file into `pipeline`. Without `_pipeline`, diffusers 0.42 reads it and changes nothing."""
    if is_unet(family):
        return f'pipeline.unet.load_attn_procs("path/to/this/folder", weight_name="{UNET_FILE}", _pipeline=pipeline)'
    return (
        "from safetensors.torch import load_file\n"
        f'weights = load_file("path/to/this/folder/{OTHER_FILE}")\n'
        f"pipeline.{family.denoiser_attribute}.load_state_dict(weights, strict=False)"
    )


def _in_processor(name: str) -> str:
    """`A.attn2.to_k.weight` and `A.attn2.to_out.0.weight` as tensors of the processor of `A.attn2`."""
    attention, dot, rest = name.rpartition(".attn2.")
    assert dot, name
    layer, _, kind = rest.partition(".")
    return f"{attention}.attn2{_PROCESSOR}{layer}{_MARK}.{kind}"


def _in_model(name: str) -> str:
    return name.replace(_PROCESSOR, ".").replace(f"{_MARK}.", ".")
