"""What training keeps in memory of a denoiser's forward pass: what autograd saves, counted on the `meta` device."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftk.models.base import Activations

if TYPE_CHECKING:
    import torch

BOTH_STREAMS = ("hidden_states", "encoder_hidden_states")
"""What the blocks of a transformer with an image and a text stream are given, and keep where they are computed again."""


def activations(
    denoiser: Any,
    block_classes: Sequence[str],
    inputs: Mapping[str, Any],
    dtype: "torch.dtype",
    *,
    states: Sequence[str],
    backward_widths: int = 12,
) -> Activations:
    """Run the denoiser where nothing has values and nothing is computed, and count what would be kept.

    Args:
        block_classes: of the family.
        inputs: of `denoiser.forward` for one sample, tensors on the `meta` device, the image first. Where nothing of the
            denoiser is trained, gradients are taken to pass through all of it, up to the image.
        states: the arguments of a block that differ from block to block.
        backward_widths: how many times these the backward pass of a block works in beside what is kept.
    """
    import torch

    kept = _Kept(block_classes=block_classes, states=states)
    if not any(each.requires_grad for each in denoiser.parameters()):
        # What is trained lies beside the denoiser: its gradients come through all of it.
        inputs = {name: _with_gradient(each) for name, each in inputs.items()}
    weights = {name: _on_meta(each, dtype) for name, each in (*denoiser.named_parameters(), *denoiser.named_buffers())}
    next(iter(inputs.values())).requires_grad_(not any(each.requires_grad for each in weights.values()))
    with kept.counting(denoiser, weights.values()), _without_scores():
        torch.func.functional_call(denoiser, weights, (), dict(inputs))
    count = len(kept.by_block)
    mean = sum(kept.by_block) // count
    # While one block is computed again it is the largest that must fit, not the mean.
    highest = max(saved + backward_widths * read for saved, read in zip(kept.by_block, kept.inputs, strict=True))
    return Activations(
        block_saved=mean,
        block_input=sum(kept.inputs) // count,
        block_working=highest - mean,
        # Gradients of the largest tensor, of what it was made from, and their sum where a skip connection ends.
        outside=kept.outside + 3 * kept.largest_outside,
    )


@dataclass(slots=True, kw_only=True)
class _Kept:
    """Bytes that autograd saves, weights left out, each storage once: in each block, where it was not saved before, and not."""

    block_classes: Sequence[str]
    states: Sequence[str]
    by_block: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outside: int = 0
    largest_outside: int = 0

    @contextmanager
    def counting(self, denoiser: Any, weights: "Iterable[torch.Tensor]") -> "Iterator[None]":
        """Count what is saved within the context."""
        import torch

        # The tensors are held on to, so that no storage is freed and its number used again.
        seen = {one.untyped_storage()._cdata: one for one in weights}
        is_within = False

        def enter(_block: Any, inputs: tuple["torch.Tensor", ...], named: Mapping[str, Any]) -> None:
            nonlocal is_within
            is_within = True
            self.by_block.append(0)
            given = [named.get(name, inputs[place] if place < len(inputs) else None) for place, name in enumerate(self.states)]
            self.inputs.append(sum(each.nbytes for each in given if isinstance(each, torch.Tensor)))

        def leave(*_: Any) -> None:
            nonlocal is_within
            is_within = False

        def pack(tensor: "torch.Tensor") -> "torch.Tensor":
            whole = tensor.untyped_storage()
            if whole._cdata not in seen:
                seen[whole._cdata] = tensor
                if is_within:
                    self.by_block[-1] += whole.nbytes()
                else:
                    self.outside += whole.nbytes()
                    self.largest_outside = max(self.largest_outside, whole.nbytes())
            return tensor

        blocks = [module for module in denoiser.modules() if type(module).__name__ in self.block_classes]
        handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
        handles += [block.register_forward_hook(leave) for block in blocks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _with_gradient(value: Any) -> Any:
    import torch

    is_states = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 2
    return value.detach().requires_grad_() if is_states else value


def _on_meta(tensor: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Its shape in the working precision. PEFT gives adapters the precision of their layer, but not on the meta device."""
    import torch

    keeps = not tensor.is_floating_point() or (tensor.requires_grad and not tensor.is_meta)
    empty = torch.empty_like(tensor, device="meta", dtype=tensor.dtype if keeps else dtype)
    return empty.requires_grad_(tensor.requires_grad)


def _without_scores() -> AbstractContextManager[Any]:
    """Attention as the kernels of a GPU do it: they keep queries, keys, values, output and one fp32 number a row.

    On the meta device torch would take the one that keeps the matrix of scores.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Attention(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, *heads_BHLD: torch.Tensor) -> torch.Tensor:
            output = torch.empty_like(heads_BHLD[0])
            ctx.save_for_backward(*heads_BHLD, output, torch.empty(output.shape[:-1], device=output.device))
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            raise NotImplementedError("only what is saved for a backward pass is counted; none runs")

    class Mode(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.scaled_dot_product_attention:
                named = kwargs or {}
                return Attention.apply(*args[:3], *(named[name] for name in ("query", "key", "value") if name in named))
            return function(*args, **(kwargs or {}))

    return Mode()
