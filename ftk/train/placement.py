"""Carries a memory plan out on a denoiser: where weights lie, in how many bits, and what a block's forward pass goes through.

A block keeps its class, its parameters and their names: only its `forward` is replaced, so adapters, FSDP, hooks, training,
validation and sampling all meet the same module. From the outside in, a replaced `forward` goes through

    checkpointing -> attention kernel -> weights fetched from host memory -> compiled code
"""

import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ftk.errors import ConfigError, EnvironmentFault
from ftk.models.base import Family
from ftk.progress import human_bytes
from ftk.train.memory import STREAMED_SLOTS, MemoryPlan, blocks

LOGGER = logging.getLogger("ftk")
Forward = Callable[..., Any]
_ALIGNMENT = 256
_MAX_GRAPHS = 64
"""Compiled variants of a block that dynamo keeps before it gives up: its default of 8 is fewer than a run has shapes."""
# A kernel that cannot take a shape or a mask leaves it to the next one.
_KERNELS: Mapping[str, Sequence[SDPBackend]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "math": (SDPBackend.MATH,),
}


def before_method(denoiser: nn.Module, plan: MemoryPlan, family: Family, device: torch.device) -> None:
    """What must be done before a method is attached: the 8-bit base. Weights stay on the device that they are on.

    Raises:
        ConfigError: torchao is not installed.
    """
    if plan.base == "int8":
        quantise_base(denoiser, family, device)


def after_method(denoiser: nn.Module, plan: MemoryPlan, family: Family, device: torch.device) -> None:
    """What is done once a method is attached: moves weights to the device, all but those offloaded, and wraps the blocks.

    Parameters stay the same objects. Under FSDP nothing is moved: `fully_shard` does it, block by block.

    Raises:
        ConfigError: compilation was asked for, and there is no C++ compiler for the CPU.
        EnvironmentFault: host memory cannot be pinned.
    """
    if plan.compile:
        compile_blocks(denoiser, family, device)
    if plan.num_offloaded:
        offload_blocks(denoiser, family, spread(plan.num_offloaded, plan.num_checkpointed), device)
    elif plan.sharding == "none":
        denoiser.to(device)
    choose_attention(denoiser, family, plan.attention)
    checkpoint_blocks(denoiser, family, plan.num_checkpointed)


def spread(count: int, among: int) -> list[int]:
    """`count` different numbers below `among`, evenly spread: transfers then overlap with the blocks between them."""
    return [position * among // count for position in range(count)]


def checkpoint_blocks(denoiser: nn.Module, family: Family, count: int) -> None:
    """The first `count` blocks keep their inputs alone, and are computed again in the backward pass (Chen et al. 2016).

    The first, since the backward pass reaches them last: by then the others' activations are gone. Random numbers are
    drawn again as they were.
    """
    for block in blocks(denoiser, family)[:count]:
        block.forward = _checkpointed(block.forward)


def choose_attention(denoiser: nn.Module, family: Family, name: str) -> None:
    """Kernels of scaled dot product attention within the blocks, in order of preference; `native` leaves torch its own."""
    if name != "native":
        for block in blocks(denoiser, family):
            block.forward = _with_kernels(block.forward, list(_KERNELS[name]))


def compile_blocks(denoiser: nn.Module, family: Family, device: torch.device) -> None:
    """Compile the repeated block once for all of its copies, its lengths dynamic. Call `warm_up` before the first step.

    Raises:
        ConfigError: there is no C++ compiler, which torch needs to compile for the CPU.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError("train.memory.compile on a CPU needs a C++ compiler, and there is none. Install g++, or turn it off.")
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for block in blocks(denoiser, family):
        block.forward = torch.compile(block.forward, dynamic=True)


def warm_up(losses: Callable[[Any], torch.Tensor], batches: Iterable[Any], parameters: Iterable[nn.Parameter]) -> float:
    """Run each batch forward and backward, so that every shape is compiled, and its memory found, before the first step.

    Args:
        losses: of a batch, [B]; `Trainer.losses`.
        batches: one of each distinct shape.
        parameters: what is trained: gradients are removed again.

    Returns:
        Seconds that it took.
    """
    started, trained = time.perf_counter(), list(parameters)
    for batch in batches:
        losses(batch).sum().backward()
        for parameter in trained:
            parameter.grad = None
    return time.perf_counter() - started


def _checkpointed(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _with_kernels(forward: Forward, kernels: list[SDPBackend]) -> Forward:
    # In the block, not around the model: the recomputation of a checkpointed block must meet the same kernels.
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernels, set_priority=True):
            return forward(*args, **kwargs)

    return run


# --- 8-bit base ---------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):  # type: ignore[misc]
    """A frozen linear layer whose weights are 8-bit integers with one scale a row: y = scale (codes x) + bias.

    `weight` is computed from them at each reading, in the working precision: adapters look at its shape, dtype and device.
    What is written into it is lost: adapters are merged into weights loaded in full.
    """

    def __init__(self, layer: nn.Linear, codes: torch.Tensor, scale: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] in the working precision."""
        return self.codes * self.scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        result: torch.Tensor = _Int8Product.apply(input, self.codes, self.scale)
        return result if self.bias is None else result + self.bias


class _Int8Product(torch.autograd.Function):  # type: ignore[misc]
    """x W^T, with W made for the moment of the product, in both directions; x alone has a gradient, and is not kept.

    Codes are exact in bf16, which has 8 bits: the product of x with them is rounded once, and then scaled. In fp16, whose
    range ends at 65,504, that product could be infinite: there the codes are scaled first.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        if input.dtype == torch.float16:
            return F.linear(input, codes * scale)
        return F.linear(input, codes.to(input.dtype)) * scale.T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        (gradient,) = gradients
        if gradient.dtype == torch.float16:
            return gradient @ (codes * scale), None, None
        return (gradient * scale.T) @ codes.to(gradient.dtype), None, None


def quantise_base(denoiser: nn.Module, family: Family, device: torch.device) -> None:
    """Replace the frozen linear layers of the repeated blocks by `Int8Linear`: symmetric, one scale a row, by torchao.

    Each is rounded on `device`, and put back where it was.

    Raises:
        ConfigError: torchao is not installed.
    """
    before = after = 0
    for block in blocks(denoiser, family):
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and not layer.weight.requires_grad:
                    codes, scale = _rounded(layer.weight.detach().to(device))
                    home = layer.weight.device
                    before += layer.weight.nbytes
                    after += codes.nbytes + scale.nbytes
                    setattr(parent, name, Int8Linear(layer, codes.to(home), scale.to(home)).train(layer.training))
    LOGGER.info("8-bit base: %s of frozen weights became %s", human_bytes(before), human_bytes(after))


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out,in] int8 and scale [out,1] in the precision of the weight: it is rounded first, so that it adds no error."""
    try:
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            quantize_affine,
        )
    except ImportError:
        raise ConfigError(
            "train.memory.base: int8 needs torchao, which is not installed. Run: pip install 'ftk[int8]'"
        ) from None
    rows = (1, weight.shape[1])
    scale, zero = choose_qparams_affine(
        weight.float(), MappingType.SYMMETRIC, rows, torch.int8, quant_min=-127, quant_max=127, eps=1e-12
    )
    scale = scale.to(weight.dtype)
    codes = quantize_affine(weight.float(), rows, scale.float(), zero, torch.int8, quant_min=-127, quant_max=127)
    return codes, scale.reshape(-1, 1)


# --- weights in host memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streamed:
    """The frozen tensors of one block: their bytes in one piece of host memory, and views of it and of each slot."""

    host: torch.Tensor
    tensors: list[torch.Tensor]
    host_views: list[torch.Tensor]
    slot_views: list[torch.Tensor]
    slot: int


@dataclass(kw_only=True)
class BlockStream:
    """Brings the frozen weights of offloaded blocks to the device, one block ahead, in whichever direction they run.

    Two slots on the device, taken in turn. A slot is overwritten once the kernels of its last block are queued: those of a
    block are, forward and backward, before the next block begins, since autograd runs nodes in the reverse of their order.
    """

    device: torch.device
    streamed: list[_Streamed] = field(default_factory=list)
    slots: list[torch.Tensor] = field(default_factory=list)
    _held: dict[int, int] = field(default_factory=dict)
    """Which block each slot holds, or is being filled with."""
    _last: int = -1
    _copies: Any = None
    """The side stream; None on the CPU."""
    _arrived: dict[int, Any] = field(default_factory=dict)

    def fetch(self, number: int) -> None:
        """Point the tensors of offloaded block `number` to its weights on the device; the next block's are on their way."""
        self._bring(number)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[number % STREAMED_SLOTS])
        ahead = number + 1 if number > self._last or number == 0 else number - 1
        self._last = number
        if 0 <= ahead < len(self.streamed):
            self._bring(ahead)
        one = self.streamed[number]
        _point(one.tensors, one.slot_views)

    def release(self, number: int) -> None:
        """Point the tensors of a block to host memory again. What autograd has saved of them stays on the device."""
        one = self.streamed[number]
        _point(one.tensors, one.host_views)

    def _bring(self, number: int) -> None:
        slot, one = number % STREAMED_SLOTS, self.streamed[number]
        if self._held.get(slot) == number:
            return
        self._held[slot] = number
        part = self.slots[slot][: len(one.host)]
        if self._copies is None:
            part.copy_(one.host)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            part.copy_(one.host, non_blocking=True)
            self._arrived[slot] = self._copies.record_event()


def offload_blocks(denoiser: nn.Module, family: Family, numbers: Sequence[int], device: torch.device) -> BlockStream:
    """Keep the frozen weights of these blocks in pinned host memory; everything else goes to `device`.

    The blocks must be checkpointed afterwards: their recomputation in the backward pass fetches the weights again. From then
    on `denoiser.to(...)`, which a pipeline calls, leaves these blocks alone.

    diffusers' group offloading is made for inference: it takes adapters along, puts them back as they were before the
    update, and knows no backward pass.

    Raises:
        EnvironmentFault: host memory cannot be pinned.
    """
    repeated = blocks(denoiser, family)
    chosen = [repeated[number] for number in numbers]
    frozen = [_frozen(block) for block in chosen]
    largest = max(sum(_rounded_up(tensor.nbytes) for tensor in tensors) for tensors in frozen)
    stream = BlockStream(device=device)
    stream.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(STREAMED_SLOTS, len(chosen)))]
    if device.type == "cuda":
        stream._copies = torch.cuda.Stream(device)
    for number, (block, tensors) in enumerate(zip(chosen, frozen, strict=True)):
        stream.streamed.append(_hosted(tensors, stream.slots[number % STREAMED_SLOTS], number % STREAMED_SLOTS, device))
        block.forward = _streamed_forward(block.forward, stream, number)
        block._apply = functools.partial(_stay, block)
    stays = {id(tensor) for tensors in frozen for tensor in tensors}
    for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
        if id(tensor) not in stays:
            tensor.data = tensor.data.to(device)
    num_bytes = sum(len(one.host) for one in stream.streamed)
    LOGGER.info("offload: frozen weights of %d blocks, %s, wait in host memory", len(chosen), human_bytes(num_bytes))
    return stream


def _stay(block: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return block


def _frozen(block: nn.Module) -> list[torch.Tensor]:
    """Parameters and 8-bit codes. An adapter's own buffers stay on the device, beside its weights: exports read both."""
    codes = [buffer for layer in block.modules() if isinstance(layer, Int8Linear) for buffer in layer.buffers()]
    return [*(parameter for parameter in block.parameters() if not parameter.requires_grad), *codes]


def _rounded_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _hosted(tensors: list[torch.Tensor], slot: torch.Tensor, number: int, device: torch.device) -> _Streamed:
    host = torch.empty(sum(_rounded_up(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
    if device.type == "cuda":
        _pin(host)
    host_views: list[torch.Tensor] = []
    slot_views: list[torch.Tensor] = []
    start = 0
    for tensor in tensors:
        for views, whole in ((host_views, host), (slot_views, slot)):
            views.append(whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        host_views[-1].copy_(tensor.detach())
        start += _rounded_up(tensor.nbytes)
    _point(tensors, host_views)
    return _Streamed(host=host, tensors=tensors, host_views=host_views, slot_views=slot_views, slot=number)


def _pin(host: torch.Tensor) -> None:
    """Lock a piece of memory. torch's own pinned memory is rounded up to a power of two: up to twice as much."""
    code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    if code:
        raise EnvironmentFault(
            f"{human_bytes(host.nbytes)} of host memory cannot be pinned for offloaded weights (CUDA error {code}). Free some "
            f"memory, raise the limit of locked memory (ulimit -l), or lower train.memory.offload."
        )


def _point(tensors: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    for tensor, place in zip(tensors, places, strict=True):
        tensor.data = place


def _streamed_forward(forward: Forward, stream: BlockStream, number: int) -> Forward:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        stream.fetch(number)
        try:
            return forward(*args, **kwargs)
        finally:  # a recomputation ends in an exception once it has all that is needed
            stream.release(number)

    return run
