"""ControlNets as diffusers has them: copies of a part of a denoiser, whose outputs are zero until they are trained.

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543), section 3.

Shape legend: B batch, C latent channels, h w latent cells.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError

if TYPE_CHECKING:
    import torch

_DEFAULT_BLOCKS = 5
"""What `from_transformer` copies of Qwen-Image, and the published networks of it have."""
_EMBEDDING = "controlnet_cond_embedding"
"""The convolutions that bring pixels to the size of latents: the only part that is drawn at random."""


def copy_of(network_class: Any, denoiser: Any, **settings: Any) -> Any:
    """A network of this class with the denoiser's settings and every tensor that both have, on the CPU or on `meta`.

    What only the network has is as its class makes it: zero, but for the embedding of pixels. `from_transformer` and
    `from_unet` copy by lists of modules, which leave out `txt_norm`, and replace the number and width of Qwen-Image's heads.

    Args:
        settings: of the network, in place of the denoiser's.
    """
    import torch

    names = inspect.signature(network_class.__init__).parameters
    config = {name: value for name, value in denoiser.config.items() if name in names} | settings
    theirs = denoiser.state_dict()
    is_outline = next(iter(theirs.values())).is_meta
    with torch.random.fork_rng(devices=[]), torch.device("meta" if is_outline else "cpu"):
        network = built(network_class, config)
    network = placed(network, network.device, denoiser.dtype)
    if not is_outline:
        missing, _ = network.load_state_dict(
            {name: theirs[name] for name in network.state_dict() if name in theirs}, strict=False
        )
        assert all(name.startswith("controlnet_") for name in missing), missing
    return network


def built(network_class: Any, config: Mapping[str, Any]) -> Any:
    """A network with these settings. diffusers warns of a class of its own that FLUX.1's has and nobody here names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*FluxPosEmbed", category=FutureWarning)
        return network_class(**config)


def placed(network: Any, device: "torch.device", dtype: "torch.dtype") -> Any:
    """The network on a device and in a precision. Its own `to` warns of every change of precision."""
    import torch

    return torch.nn.Module.to(network, device, dtype)


def draw_embedding(network: Any, seed: int) -> None:
    """Draw what is random of a network that is on the CPU: equal seeds give equal weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in network.named_modules():
            if name.startswith(f"{_EMBEDDING}.") and hasattr(module, "reset_parameters") and not name.endswith(".conv_out"):
                module.reset_parameters()


def num_blocks(asked: int | None, total: int) -> int:
    """How many of a transformer's blocks are copied; by default 5, or the next lower number that works.

    diffusers adds the output of copied block i to ceil(total / copied) blocks in a row: with 3 copies of 4 blocks that is 2,
    and the third output is never used.

    Raises:
        ConfigError: an output would be left out.
    """
    valid = [count for count in range(1, total + 1) if -(-total // -(-total // count)) == count]
    if asked is None:
        return max(count for count in valid if count <= _DEFAULT_BLOCKS)
    if asked not in valid:
        listed = ", ".join(map(str, valid))
        raise ConfigError(
            f"method.blocks: {asked} copied blocks do not spread over the model's {total}: outputs of some would reach no "
            f"block. Set it to one of {listed}."
        )
    return asked


def summed(outputs: "Sequence[Sequence[torch.Tensor]]") -> "list[torch.Tensor]":
    """What a network gave for each control image, added up, as diffusers' networks for several control images do."""
    first, *others = outputs
    return [sum(rest, start) for start, *rest in zip(first, *others, strict=True)]


def official(pipeline_class: Any, pipeline: Any, network: Any, **arguments: Any) -> Any:
    """diffusers' pipeline with a ControlNet, from the components of the one without."""
    controlled = pipeline_class(**pipeline.components, controlnet=network, **arguments)
    controlled.set_progress_bar_config(disable=True)
    if "encode_prompt" in vars(pipeline):  # the family's own encoding of texts
        controlled.encode_prompt = pipeline.encode_prompt
    return controlled


def blank_images(controls: "Sequence[torch.Tensor]", factor: int) -> "list[torch.Tensor]":
    """Images of the size of these latents, for pipelines that ask for images and are to take the latents; see `encoding`."""
    import torch

    return [torch.zeros(1, 3, *(side * factor for side in latents.shape[-2:])) for latents in controls]


@contextmanager
def encoding(vae: Any, latents: "Sequence[torch.Tensor]") -> Iterator[None]:
    """Within, the VAE returns these latents, one after the other, whatever it is to encode.

    Pipelines encode control images themselves, and draw from the posterior; what a network is trained on is its mean.
    """
    remaining = iter(latents)

    def encode(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(latents=next(remaining))

    vae.encode = encode
    try:
        yield
    finally:
        del vae.encode
