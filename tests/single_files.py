"""Writes a Stable Diffusion or SDXL model of the Diffusers layout as one file, under the names of the original code.

The names are those of `ldm` and `sgm` (Stability AI) and of OpenCLIP, as diffusers' `convert_diffusers_to_original_*` scripts
document them. What reads such files is diffusers' own; nothing of it is used here.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final", "layer_norm1": "ln_1",
    "embeddings.position_embedding.weight": "positional_embedding", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "encoder.layers": "transformer.resblocks", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def original(directory: Path) -> Tensors:
    """The whole model's tensors. The U-Net has one layer per block."""
    is_xl = (directory / "text_encoder_2").is_dir()
    clip = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    parts: list[tuple[str, str, Callable[[Tensors], Tensors]]] = [
        ("unet", "model.diffusion_model.", _unet), ("vae", "first_stage_model.", _vae), ("text_encoder", clip, _clip),
    ]  # fmt: skip
    if is_xl:
        parts.append(("text_encoder_2", "conditioner.embedders.1.model.", open_clip))
    return {
        prefix + name: tensor for folder, prefix, rename in parts for name, tensor in rename(_read(directory / folder)).items()
    }


def write(directory: Path, path: Path, metadata: Mapping[str, str] | None = None, **added: torch.Tensor) -> Path:
    """The checkpoint of a model, with more tensors beside its own."""
    save_file({**{name: each.contiguous() for name, each in original(directory).items()}, **added}, path, dict(metadata or {}))
    return path


def _read(folder: Path) -> Tensors:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    def rename(name: str) -> str:
        for here, there in names.items():
            name = name.replace(here, there)
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def _unet(tensors: Tensors) -> Tensors:
    """Of one layer per block: a level is a layer and what follows it, and on the way up two layers."""

    def place(name: str) -> str:
        for here, there in _UNET_OUTSIDE.items():
            if name.startswith(f"{here}."):
                return name.replace(here, there, 1)
        way, level, kind, number, rest = re.fullmatch(r"(\w+)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
        if kind == "downsamplers":
            return f"input_blocks.{2 * int(level) + 2}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            has_attention = any(each.startswith(f"up_blocks.{level}.attentions.1.") for each in tensors)
            return f"output_blocks.{2 * int(level) + 1}.{2 if has_attention else 1}.{rest}"
        block = (
            f"input_blocks.{2 * int(level) + 1 + int(number)}"
            if way == "down"
            else f"output_blocks.{2 * int(level) + int(number)}"
        )
        return f"{block}.{0 if kind == 'resnets' else 1}.{rest}"

    is_resnet = re.compile(r"(?!input_blocks\.0\.)((input|output)_blocks\.\d+\.0|middle_block\.[02])\.(?!op)")
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        placed = place(name)
        renamed |= _renamed({placed: tensor}, _RESNET) if is_resnet.match(placed) else {placed: tensor}
    return renamed


def _vae(tensors: Tensors) -> Tensors:
    levels = 4
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block.", name)
        name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name)
        name = re.sub(r"decoder\.up_blocks\.(\d)\.", lambda match: f"decoder.up.{levels - 1 - int(match[1])}.", name)
        name = re.sub(r"(decoder\.up\.\d)\.resnets\.", r"\1.block.", name).replace("upsamplers.0", "upsample")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = (
                name.replace("mid_block.attentions.0", "mid.attn_1")
                .replace("group_norm", "norm")
                .replace("to_out.0", "proj_out")
            )
            name = re.sub(r"to_([qkv])", r"\1", name)
            tensor = tensor[..., None, None] if name.endswith(".weight") and ".norm." not in name else tensor
        renamed[name] = tensor
    return renamed


def _clip(tensors: Tensors) -> Tensors:
    return {name if name.startswith("text_model.") else f"text_model.{name}": tensor for name, tensor in tensors.items()}


def open_clip(tensors: Tensors) -> Tensors:
    """The names of OpenCLIP for a CLIP text encoder's tensors."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    renamed: Tensors = {}
    if (projection := plain.pop("text_projection.weight", None)) is not None:
        renamed["text_projection"] = projection.T
    named = _renamed(plain, _OPEN_CLIP)
    for name, tensor in named.items():
        if ".q_proj." in name:
            parts = [named[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[name] = tensor
    return renamed
