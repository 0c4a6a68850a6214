"""The U-Net of Stable Diffusion and SDXL: its noise schedule, its prediction, and what training it keeps in memory.

Shape legend: B batch, C latent channels (4), H W latent cells, L text tokens (77), D text width.
"""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ModelError
from ftk.models.base import DENOISER, Activations, AdapterNames, Conditions, Model, TargetGroup, Texts, encoded
from ftk.models.components import clip, configuration, control_networks, saved_tensors
from ftk.models.components.geometry import LatentGeometry
from ftk.models.components.loading import load_component, outline, reading
from ftk.models.components.schedule import NoiseSchedule

if TYPE_CHECKING:
    import torch

GEOMETRY = LatentGeometry(channels=4, factor=8, patch=8)
"""Sides are multiples of 64 px: the U-Net of 1.x halves latents three times, and SDXL's buckets have such sides too."""
BLOCK_CLASSES = ("BasicTransformerBlock",)
"""Holds all attention and most activations, and in SDXL 85% of the weights; between its copies lie convolutions."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_MLP = ("ff.net.0.proj", "ff.net.2")
_TIME = ("linear_1", "linear_2", "time_emb_proj")
_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2",
}  # fmt: skip
"""Original names of the layers that lie in no block."""
_ORIGINAL_ONLY = {"add_embedding.linear_1", "add_embedding.linear_2"}
"""Layers that ComfyUI knows by their original names alone."""
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
"""Where sd-scripts look for layers: they pass over what lies outside."""
_BLOCK_LAYER = re.compile(
    r"(?P<side>down_blocks|up_blocks|mid_block)(?:\.(?P<level>\d+))?"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)
_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
SCHEDULE: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""What schedulers of this line are configured with."""
_BACKWARD_WIDTHS = 14
"""Of a block's input: gradients on both sides of the gated MLP (4 and 8 widths), of its input and of the residual stream."""


def load(directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
    """UNet2DConditionModel, frozen, in training mode; on `meta` its shapes alone."""
    from diffusers import UNet2DConditionModel

    if device.type == "meta":
        return outline(UNet2DConditionModel, directory / "unet", dtype)
    unet = load_component(UNet2DConditionModel, directory, "unet", dtype)
    return unet.requires_grad_(False).train().to(device)


def is_told_sizes(tensors: Mapping[str, Any]) -> bool:
    """Whether the U-Net in a checkpoint of one file is SDXL's, by the names of its tensors."""
    return any(name.endswith(("label_emb.0.0.weight", "add_embedding.linear_1.weight")) for name in tensors)


def load_schedule(directory: Path) -> NoiseSchedule:
    """Of any scheduler of diffusers' that samples such models: with the same betas they have the same noise levels.

    sigma = sqrt(1 - alpha_bar) of each step, signal = sqrt(alpha_bar), both as `DDPMScheduler.add_noise` computes them; from
    the last step, noise, down to step 0.
    """
    import torch
    from diffusers import DDPMScheduler

    path = directory / "scheduler"
    config = configuration.scheduler(DDPMScheduler, path)
    if "beta_schedule" not in config and not config.get("trained_betas"):
        raise ModelError(f"{path}: a {config.get('_class_name')} has no betas, which a diffusion model is trained with.")
    with reading(path, "a scheduler"):
        scheduler = DDPMScheduler.from_config(config)
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ModelError(f"{path}: prediction_type is {prediction!r:.80}; epsilon and v_prediction can be trained.")
    signals = scheduler.alphas_cumprod.float().flip(0)
    if not (((signals >= 0) & (signals <= 1)).all() and (signals.diff() >= 0).all()):
        raise ModelError(f"{path}: its betas do not lie between 0 and 1: they give no falling signal, such as {signals[0]:g}.")
    return NoiseSchedule(
        objective="v" if prediction == "v_prediction" else "epsilon",
        sigmas=(1 - signals) ** 0.5,
        signals=signals**0.5,
        times=torch.arange(len(signals), dtype=torch.float32).flip(0),
    )


def predict(
    model: Model,
    noisy_BCHW: "torch.Tensor",
    sigma_B: "torch.Tensor",
    conditions: Conditions,
    added: Callable[[Texts], Mapping[str, Any]] | None = None,
) -> "torch.Tensor":
    """The U-Net's output in fp32: epsilon or v. It takes the number of the noise level as time.

    Args:
        added: what SDXL takes beside the text, from the texts as they are encoded now.
    """
    texts = encoded(model, conditions.texts)
    output: torch.Tensor = model.denoiser(
        noisy_BCHW,
        model.schedule.time(sigma_B),
        encoder_hidden_states=texts["embeds"],
        added_cond_kwargs=None if added is None else added(texts),
        return_dict=False,
    )[0]
    return output.float()


def control_residuals(
    model: Model,
    network: Any,
    noisy_BCHW: "torch.Tensor",
    sigma_B: "torch.Tensor",
    conditions: Conditions,
    added: Callable[[Texts], Mapping[str, Any]] | None = None,
) -> Mapping[str, Any]:
    """What a `ControlNetModel` adds to the U-Net's skip connections and to its middle.

    The network reads pixels in [0, 1], as in diffusers' `examples/controlnet/train_controlnet.py`.
    """
    texts = encoded(model, conditions.texts)
    outputs = []
    for pixels_BCHW in conditions.controls:
        down, middle = network(
            noisy_BCHW,
            model.schedule.time(sigma_B),
            encoder_hidden_states=texts["embeds"],
            controlnet_cond=(pixels_BCHW + 1) / 2,
            added_cond_kwargs=None if added is None else added(texts),
            return_dict=False,
        )
        outputs.append([*down, middle])
    *down, middle = control_networks.summed(outputs)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def draw_controlled(
    controlled: Callable[[Any], Any],
    network: Any,
    controls: "Sequence[torch.Tensor]",
    strength: float,
    options: Mapping[str, Any],
) -> Any:
    """Draw with a network and its control images, as [1,3,H,W] pixels in [-1, 1].

    Args:
        controlled: diffusers' pipeline with a network, or with a list of them: one for each control image.
    """
    images = [(pixels_BCHW.float() + 1) / 2 for pixels_BCHW in controls]
    is_one = len(images) == 1
    return controlled(network if is_one else [network] * len(images))(
        image=images[0] if is_one else images, controlnet_conditioning_scale=float(strength), **options
    )


def target_groups(*outside: str) -> Mapping[str, TargetGroup]:
    """The groups of the U-Net's layers; `outside` are the layers in no block that `all-linear` has beside the time's."""

    def in_blocks(*suffixes: str) -> Mapping[str, Sequence[str]]:
        return dict.fromkeys(BLOCK_CLASSES, suffixes)

    return {
        "attention": TargetGroup(in_blocks=in_blocks(*_ATTENTION)),
        "attention+mlp": TargetGroup(in_blocks=in_blocks(*_ATTENTION, *_MLP)),
        "text-kv": TargetGroup(in_blocks=in_blocks("attn2.to_k", "attn2.to_v")),
        "cross-attention": TargetGroup(in_blocks=in_blocks(*(f"attn2.{layer}" for layer in _ATTENTION))),
        "all-linear": TargetGroup(in_blocks=in_blocks(*_ATTENTION, *_MLP), outside=(*_TIME, *outside)),
    }


def adapter_names(
    form: str, component: str, encoders: Sequence[str], module: Any, *, is_original: bool = False
) -> AdapterNames:
    """As sd-scripts, A1111, ComfyUI and LyCORIS name the modules of a U-Net and of its CLIP text encoders.

    Args:
        is_original: whether sd-scripts train the U-Net under its original names, as they do SDXL's.

    Raises:
        ConfigError: LyCORIS' format of a text encoder.
    """
    if component != DENOISER:
        return clip.adapter_names(form, component, encoders)
    if form == "lycoris":
        return AdapterNames(module=lambda name: "lycoris_" + name.replace(".", "_"), factors=clip.LORA_FACTORS)
    originals = original_names(module)
    known = (
        originals if form == "kohya" and is_original else {name: originals[name] for name in _ORIGINAL_ONLY & originals.keys()}
    )
    return AdapterNames(
        module=lambda name: "lora_unet_" + known.get(name, name).replace(".", "_"),
        factors=clip.LORA_FACTORS,
        is_read=lambda name: form != "kohya" or name.startswith(_BLOCKS),
    )


def original_names(denoiser: Any) -> dict[str, str]:
    """The names that the layers had in CompVis' and Stability's U-Net, by those of diffusers.

    Source: Stability's `sgm/modules/diffusionmodules/openaimodel.py`, whose blocks are counted through all levels; the inverse
    of diffusers' `convert_ldm_unet_checkpoint`.
    """
    depth = denoiser.config.layers_per_block + 1
    with_attention = {
        match[0] for name, _ in denoiser.named_modules() if (match := re.match(r"up_blocks\.\d+(?=\.attentions)", name))
    }
    names = {}
    for name, _ in denoiser.named_modules():
        original = _OUTSIDE.get(name) or _original_block(name, depth, with_attention)
        if original is not None:
            names[name] = original
    return names


def _original_block(name: str, depth: int, with_attention: Set[str]) -> str | None:
    """A layer of a block: blocks of `depth` inputs or outputs for each level, each of a ResNet, attention, and resizing."""
    match = _BLOCK_LAYER.fullmatch(name)
    if match is None:
        return None
    side, level, kind, number = match["side"], int(match["level"] or 0), match["kind"], int(match["number"])
    inner = f".{_RESNET[match['rest']]}" if kind == "resnets" and match["rest"] in _RESNET else f".{match['rest']}"
    if side == "mid_block":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}{inner}"
    place = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * depth}.0.op" if match["rest"] == "conv" else None
        return f"input_blocks.{1 + level * depth + number}.{place}{inner}"
    if kind == "upsamplers":
        return f"output_blocks.{level * depth + depth - 1}.{1 + (f'up_blocks.{level}' in with_attention)}{inner}"
    return f"output_blocks.{level * depth + number}.{place}{inner}"


def activations(
    denoiser: Any, cells: int, text_tokens: int, dtype: "torch.dtype", added: Mapping[str, Any] | None = None
) -> Activations:
    """Levels differ in size, and between the blocks lie convolutions, so there is no formula that is shorter than the model."""
    import torch

    side, config = GEOMETRY.patch, denoiser.config
    inputs = {
        "sample": torch.empty(1, config.in_channels, side, cells // side, dtype=dtype, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, text_tokens, config.cross_attention_dim, dtype=dtype, device="meta"),
        "added_cond_kwargs": added,
        "return_dict": False,
    }
    return saved_tensors.activations(
        denoiser, BLOCK_CLASSES, inputs, dtype, states=("hidden_states",), backward_widths=_BACKWARD_WIDTHS
    )
