"""Further input channels of a denoiser, for a control image's latents: a layer of zeros beside the one that takes latents.

W [x, c] = W_x x + W_c c: two layers whose outputs are added are one of twice the inputs, and the first stays as it is.

Shape legend: B batch, C latent channels, H W latent cells, D hidden width, R rank.
"""

from typing import Any

import torch
from torch import nn

from ftk.errors import ConfigError
from ftk.models.base import Family
from ftk.models.components import flow_matching

LAYERS = ("conv_in", "img_in", "x_embedder", "pos_embed.proj")
"""What diffusers calls the layer that takes the latents."""


def input_layer(family: Family, denoiser: nn.Module) -> str:
    """The name of the layer that takes the latents: a convolution, or a linear layer that takes tokens of 2 x 2 cells.

    Raises:
        ConfigError: it is none of those that are known here.
    """
    channels, patch = family.geometry.channels, family.geometry.patch
    for name in LAYERS:
        try:
            layer = plain(denoiser.get_submodule(name))
        except AttributeError:
            continue
        if isinstance(layer, nn.Conv2d) and layer.in_channels in (channels, 2 * channels):  # the latter once widened
            return name
        if isinstance(layer, nn.Linear) and patch == 2 and layer.in_features == channels * patch**2:
            return name
    raise ConfigError(
        f"method control-lora: {type(denoiser).__name__}, the denoiser of {family.name}, takes its latents in no layer that "
        f"can be widened ({', '.join(LAYERS)})."
    )


def plain(layer: Any) -> Any:
    """A layer without the adapter around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def new(layer: Any) -> Any:
    """A layer of zeros that takes what this one takes; its outputs are to be added, so it has no bias."""
    if isinstance(layer, nn.Conv2d):
        beside = _convolution(layer, layer.in_channels)
    else:
        beside = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    beside.weight = nn.Parameter(torch.zeros_like(layer.weight))
    return beside


def _convolution(layer: Any, channels: int) -> Any:
    """One of the same kernel, its shapes alone."""
    shape = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    return nn.Conv2d(channels, layer.out_channels, bias=False, device="meta", **shape)


def output(columns: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """[B,D,h,w] of a convolution, [B,N,D] of a linear layer: what is added to the output of the input layer."""
    added: torch.Tensor = columns(latents_BCHW if isinstance(columns, nn.Conv2d) else flow_matching.pack(latents_BCHW))
    return added


def as_factors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the low-rank adapter on the widened layer, after whose own inputs come the control's, that adds these columns.

    A picks each input out of the control's half, and B holds its column, so the product is exact: R is their number.
    """
    rank = weight[0].numel()
    picks = torch.eye(rank, dtype=weight.dtype, device=weight.device).reshape(rank, *weight.shape[1:])
    A = torch.cat([torch.zeros_like(picks), picks], 1)
    return A, weight.reshape(len(weight), rank, *[1] * (weight.ndim - 2))


def from_factors(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """The columns that an adapter on the widened layer adds, and what of the adapter acts on the layer's own inputs."""
    inputs = A.shape[1] // 2
    columns = (B.float().flatten(1) @ A[:, inputs:].float().flatten(1)).reshape(len(B), inputs, *A.shape[2:]).to(B.dtype)
    is_own = A[:, :inputs].flatten(1).any(1)
    return columns, (A[is_own, :inputs].contiguous(), B[:, is_own].contiguous()) if bool(is_own.any()) else None


def widened(layer: Any, columns: Any) -> Any:
    """One convolution of both, the layer's own channels first."""
    both = _convolution(layer, layer.in_channels + columns.in_channels)
    both.weight = nn.Parameter(torch.cat([layer.weight.detach(), columns.weight.detach().to(layer.weight)], 1))
    both.bias = layer.bias
    return both.requires_grad_(False)
