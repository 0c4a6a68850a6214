"""A denoiser that is given more than its family knows of, for the time of a call, and a diffusers pipeline around it.

Hooks leave the denoiser's class and its layers as they are: families, pipelines, quantisation and FSDP meet the same module.

Shape legend: B batch, C latent channels, H W height and width (pixels or latent cells), N image tokens, D hidden width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

Controlling = Callable[[torch.Tensor, float], AbstractContextManager[None]]
"""A context in which a denoiser sees a control image [B,...] at a strength."""


@contextmanager
def adding_to_output(layer: torch.nn.Module, addend: torch.Tensor) -> Iterator[None]:
    """Within, a layer's output has something added to it.

    Args:
        addend: [B,D,h,w] for a convolution, or [B,N,D] for a linear layer: the first N tokens get it, so that the references
            of an edit model, which come after the image, do not. Where the layer's batch is a multiple of B, as with
            guidance, each share of it gets the same.
    """

    def add(_layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        repeated = _for_batch(addend, len(output))
        if repeated.shape == output.shape:
            return output + repeated
        return output + _padded(repeated, output.shape[1])

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def passing(denoiser: torch.nn.Module, name: str, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within, a denoiser is called with one more argument: a list of these tensors, repeated for its batch.

    Args:
        tensors: [B,D,h,w] of a U-Net, or [B,N,D] of a transformer, filled with zeros to as many tokens as it is given.
    """

    def add(_module: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        hidden = arguments[0] if arguments else options["sample" if "sample" in options else "hidden_states"]
        repeated = [_for_batch(each, len(hidden)) for each in tensors]
        if hidden.ndim == 3:
            repeated = [_padded(each, hidden.shape[1]) for each in repeated]
        # A U-Net takes them out of its list one after another.
        return arguments, {**options, name: repeated}

    handle = denoiser.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def placed_as(denoiser: Any, network: torch.nn.Module) -> torch.nn.Module:
    """The network on the denoiser's device, in its precision. Models of diffusers warn at each change of theirs."""
    return torch.nn.Module.to(network, denoiser.device, denoiser.dtype)


def _for_batch(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return tensor if len(tensor) == batch else tensor.repeat(batch // len(tensor), *[1] * (tensor.ndim - 1))


def _padded(tokens_BND: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens_BND, (0, 0, 0, num_tokens - tokens_BND.shape[1]))


class ControlledPipeline:
    """A diffusers pipeline whose denoiser sees a control image while it draws; its other arguments are the pipeline's.

    Args:
        controlling: of the control image as `encode` gives it.
        encode: a control image [B,3,H,W] in [-1, 1] as the method sees it, by the pipeline.
        names: of the arguments that take the control image and its strength.
    """

    def __init__(
        self,
        pipeline: Any,
        controlling: Controlling,
        encode: Callable[[Any, torch.Tensor], torch.Tensor],
        names: tuple[str, str],
    ) -> None:
        self._pipeline = pipeline
        self._controlling = controlling
        self._encode = encode
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def __call__(self, **options: Any) -> Any:
        """Draw.

        The control image is an image of PIL, resized to the size that is drawn, or a tensor as the method sees it, in a batch
        of one. The strength is a factor on what it adds, 1 by default; 0 draws what the base model draws.
        """
        image_name, strength_name = self._names
        if image_name not in options:
            raise TypeError(f"this pipeline draws by a control image: give it one as `{image_name}`")
        control, strength = options.pop(image_name), options.pop(strength_name, 1.0)
        if isinstance(control, Image.Image):
            options = {"width": control.width, "height": control.height, **options}
            control = self._encode(self._pipeline, as_pixels(control, (options["width"], options["height"])))
        with torch.no_grad(), self._controlling(control, strength):
            return self._pipeline(**options)


def as_pixels(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """[1,3,H,W] in [-1, 1] of an image, resized to (width, height)."""
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    return pixels[None].float() / 127.5 - 1
