"""The memory plan: what is done so that training fits a device, and why. Arithmetic alone; `placement` carries it out.

Measures are tried in the order of what they cost in speed: everything as it is; activations of as few blocks as needed computed
again; weights split over the processes; an 8-bit base; weights of as few blocks as needed kept in host memory.

Estimates err: a plan that does not fit is a warning, not an error.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from ftk.configs.schema import RunConfig, TrainConfig
from ftk.errors import ConfigError
from ftk.models.base import Activations, Family, Model, sizes_of
from ftk.progress import human_bytes

if TYPE_CHECKING:
    import torch

Base = Literal["full", "int8"]
Sharding = Literal["none", "fsdp"]
DTYPES: Mapping[str, Literal["bfloat16", "float16", "float32"]] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What the values of `train.precision` but `auto` are called in torch."""
_BASES: tuple[Base, ...] = ("full", "int8")
STREAMED_SLOTS = 2
"""Blocks of offloaded weights that the device holds at once: the one that computes, and the next."""
_GIB = 1 << 30
_CUDA_RESERVE_BYTES = _GIB
"""Workspaces of cuBLAS and cuDNN, and kernels that are loaded on first use."""
_ENCODER_WIDTHS = 20
"""What autograd keeps of a token in a layer of a text encoder, in the layer's widths; counted with CLIP's."""
_FRAGMENTATION = 0.04
"""Share that the caching allocator loses between blocks of memory."""


_PRESERVATION_REASON = "train.loss.preservation predicts twice more, one after the other: that takes time, not memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a plan must know of a device. `budget_bytes` is its free memory; None: unknown, or as good as unbounded."""

    kind: str
    name: str
    budget_bytes: int | None
    capability: tuple[int, int] | None = None
    """CUDA's compute capability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The largest micro-batch of a run: `height` and `width` in latent cells, text padded to `text_tokens`.

    `reference_tokens` are those of all references of one sample.
    """

    height: int
    width: int
    text_tokens: int
    micro_batch_size: int
    world_size: int = 1
    reference_tokens: int = 0

    def image_tokens(self, family: Family) -> int:
        """Tokens of one image and its references."""
        return self.height * self.width // family.geometry.patch**2 + self.reference_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is done to fit, and what it comes to. `reasons` say why each choice was made."""

    device: str
    budget_bytes: int | None
    dtype: Literal["bfloat16", "float16", "float32"]
    num_blocks: int
    num_checkpointed: int
    """The first blocks: their activations are computed again in the backward pass."""
    num_offloaded: int
    """So many of the checkpointed blocks, evenly spread, keep their frozen weights in host memory."""
    base: Base
    sharding: Sharding
    attention: str
    compile: bool
    parts: dict[str, int]
    """Bytes on the device by what takes them."""
    total_bytes: int
    host_bytes: int
    """Pinned host memory for offloaded weights."""
    reasons: tuple[str, ...]
    fits: bool

    @property
    def load_device(self) -> str:
        """Where weights are loaded: the CPU where they need not all reach the device, else the device."""
        return "cpu" if self.num_offloaded or self.base == "int8" or self.sharding == "fsdp" else self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measures:
    num_checkpointed: int
    num_offloaded: int
    base: Base
    sharding: Sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Bytes: frozen weights of one block by kind of base and of all else, the trained part, one sample's activations.

    Where blocks differ, `block` is their mean, and `largest_block` what must fit where one of them stands for all.
    With `splits_trained`, `trained` is split where frozen weights are. `gathered` is then beside the parts of a process:
    what is no block, two blocks, and the gradients of what is no block and of one.
    """

    num_blocks: int
    block: Mapping[Base, int]
    largest_block: Mapping[Base, int]
    outside: int
    trained: int
    splits_trained: bool
    trained_when_split: int
    gathered: int
    largest_weight: int
    activations: Activations


def inspect_device(device: "torch.device") -> Device:
    """What is free on this device now. For a CPU nothing is said: its memory is shared, and pages."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for itself is free to training.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Device(
            kind="cuda",
            name=torch.cuda.get_device_name(device),
            budget_bytes=free,
            capability=torch.cuda.get_device_capability(device),
        )
    if device.type == "mps":
        budget = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return Device(kind="mps", name="Apple GPU", budget_bytes=budget)
    return Device(kind=device.type, name=device.type.upper(), budget_bytes=None)


def precision(config: TrainConfig, device: Device) -> tuple["torch.dtype", str]:
    """The dtype of frozen weights and computation, and why.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    import torch

    if config.precision == "fp16" and device.kind == "cpu":
        raise ConfigError(
            "train.precision: fp16 is for GPUs, and this run's device is the CPU, which has few and slow kernels for it. Set "
            "train.precision to bf16 or fp32, or to auto, which chooses by the device."
        )
    if config.precision != "auto":
        return getattr(torch, DTYPES[config.precision]), "train.precision says so"
    if device.capability is not None and device.capability >= (8, 0):
        return torch.bfloat16, f"precision auto: {device.name} computes in bf16"
    if device.kind == "cuda":
        return torch.float16, f"precision auto: {device.name} does not compute in bf16 at speed, and does in fp16"
    return torch.float32, f"precision auto: {device.name} does not compute in bf16 at speed"


def cached_workload(samples: pa.Table, family: Family, config: TrainConfig, world_size: int = 1) -> Workload:
    """The largest micro-batch of a cache, whose table of samples this is: the bucket with most tokens, its longest text."""
    lengths = samples["text_lengths"].combine_chunks()
    rows = pc.list_parent_indices(lengths)
    pixels_per_token = family.geometry.pixel_multiple**2
    flat = pa.table(
        {
            "width": samples["bucket_width"].take(rows),
            "height": samples["bucket_height"].take(rows),
            "references": _reference_pixels(samples).take(rows),
            "tokens": pc.list_flatten(lengths),
        }
    )
    buckets = flat.group_by(["width", "height", "references"]).aggregate([("tokens", "max")]).to_pylist()
    largest = max(
        buckets,
        key=lambda row: (row["width"] * row["height"] + row["references"]) // pixels_per_token + row["tokens_max"],
    )
    return Workload(
        height=largest["height"] // family.geometry.factor,
        width=largest["width"] // family.geometry.factor,
        text_tokens=largest["tokens_max"],
        micro_batch_size=config.micro_batch_size,
        world_size=world_size,
        reference_tokens=largest["references"] // pixels_per_token,
    )


def _reference_pixels(samples: pa.Table) -> pa.Array:
    """Pixels of all references of each sample; 0 where the cache has none."""
    if "reference_widths" not in samples.column_names:
        return pa.repeat(pa.scalar(0, pa.int64()), len(samples))
    pairs = zip(samples["reference_widths"].to_pylist(), samples["reference_heights"].to_pylist(), strict=True)
    return pa.array([sum(w * h for w, h in zip(*pair, strict=True)) for pair in pairs], pa.int64())


def assumed_workload(config: RunConfig, family: Family, world_size: int = 1) -> Workload:
    """Before there is a cache: the largest of all resolutions, and the longest text that the family takes."""
    sizes = [size for resolution in config.data.resolutions_in_use for size in sizes_of(family, resolution)]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return Workload(
        height=height // family.geometry.factor,
        width=width // family.geometry.factor,
        text_tokens=family.max_text_tokens,
        micro_batch_size=config.train.micro_batch_size,
        world_size=world_size,
    )


def plan(model: Model, config: TrainConfig, workload: Workload, device: Device, *, splits_trained: bool = False) -> MemoryPlan:
    """Choose precision, checkpointing, sharding, base, offload and attention.

    Args:
        model: with the method attached, on whatever device; `meta` will do. What requires a gradient is what is trained.
            Text encoders and extra networks are whole on every process.
        splits_trained: whether sharding splits what is trained of the denoiser as well; else it stays whole on every process.

    Raises:
        ConfigError: settings that exclude each other, fp16 on a CPU, or an 8-bit base without torchao.
    """
    import torch

    budget = device.budget_bytes if config.memory.device_gib is None else round(config.memory.device_gib * _GIB)
    dtype, precision_reason = precision(config, device)
    sizes = _sizes(model, config, workload, dtype, splits_trained)
    fixed = _fixed(model, config, workload, dtype, sizes)
    _check(config, sizes.num_blocks)
    # Without a known budget there is nothing to decide: the first of the measures that were asked for.
    for measures in _candidates(config, sizes, workload.world_size, budget is not None):
        parts = _parts(sizes, measures, workload, device, fixed)
        fits = budget is None or sum(parts.values()) <= budget
        if fits:
            break
    attention, attention_reason = _attention(config, device, dtype)
    return MemoryPlan(
        device=device.kind,
        budget_bytes=budget,
        dtype=next(name for name in DTYPES.values() if getattr(torch, name) is dtype),
        num_blocks=sizes.num_blocks,
        num_checkpointed=measures.num_checkpointed,
        num_offloaded=measures.num_offloaded,
        base=measures.base,
        sharding=measures.sharding,
        attention=attention,
        compile=config.memory.compile,
        parts=parts,
        total_bytes=sum(parts.values()),
        host_bytes=measures.num_offloaded * sizes.block[measures.base],
        reasons=(
            precision_reason,
            *_reasons(config, measures, sizes, workload, budget),
            attention_reason,
            *((_PRESERVATION_REASON,) if config.loss.preservation is not None else ()),
            *(() if fits else (_misfit(sum(parts.values()), budget or 0),)),
        ),
        fits=fits,
    )


def describe(plan: MemoryPlan) -> list[tuple[str, str]]:
    """The plan as rows of (what, text), for people."""
    budget = "unknown" if plan.budget_bytes is None else human_bytes(plan.budget_bytes)
    return [
        ("device", f"{plan.device}, {budget} to plan for"),
        ("precision", plan.dtype),
        ("base weights", {"full": f"as {plan.dtype}", "int8": "8-bit integers"}[plan.base]),
        ("sharding", plan.sharding),
        ("checkpointed blocks", f"{plan.num_checkpointed} of {plan.num_blocks}"),
        ("offloaded blocks", f"{plan.num_offloaded} of {plan.num_blocks}, {human_bytes(plan.host_bytes)} of host memory"),
        ("attention", plan.attention),
        ("compile", "yes" if plan.compile else "no"),
        *((name, human_bytes(count)) for name, count in plan.parts.items()),
        ("expected peak", f"{human_bytes(plan.total_bytes)}{'' if plan.fits else ', more than there is'}"),
        *(("because" if not position else "", reason) for position, reason in enumerate(plan.reasons)),
    ]


def in_a_line(plan: MemoryPlan) -> str:
    """What was decided, for the log; the reason why it does not fit, where it does not."""
    budget = "" if plan.budget_bytes is None else f" of {human_bytes(plan.budget_bytes)}"
    parts = [
        f"{plan.device}, {plan.dtype}, {human_bytes(plan.total_bytes)}{budget} expected",
        f"{plan.num_checkpointed} of {plan.num_blocks} blocks checkpointed",
        *([f"{plan.num_offloaded} in host memory"] if plan.num_offloaded else []),
        *(["8-bit base"] if plan.base == "int8" else []),
        *(["weights split over the processes"] if plan.sharding == "fsdp" else []),
        f"{plan.attention} attention",
        *(["compiled"] if plan.compile else []),
        *([] if plan.fits else [plan.reasons[-1]]),
    ]
    return "memory plan: " + ", ".join(parts)


def advice(plan: MemoryPlan, workload: Workload, family: Family) -> str:
    """What a user reads when the device was out of memory: what was planned, and what to change next, cheapest first."""
    factor = family.geometry.factor
    budget = "an unknown budget" if plan.budget_bytes is None else f"a budget of {human_bytes(plan.budget_bytes)}"
    steps = []
    if plan.dtype == "float32" and plan.device == "cuda":
        steps.append("train.precision: auto")
    if plan.num_checkpointed < plan.num_blocks:
        steps.append("train.memory.checkpointing: all")
    if workload.micro_batch_size > 1:
        steps.append(f"train.micro_batch_size: {workload.micro_batch_size // 2}")
    if workload.world_size > 1 and plan.sharding == "none":
        steps.append("train.sharding: fsdp")
    if plan.sharding == "none" and plan.base == "full":
        steps.append("train.memory.base: int8")
    if plan.sharding == "none" and plan.num_offloaded < plan.num_blocks:
        wanted = min(plan.num_blocks, plan.num_offloaded + max(1, plan.num_blocks // 4))
        steps.append(f"train.memory.offload: {wanted} (with train.memory.checkpointing: all)")
    steps.append("smaller data.resolutions, then `ftk prepare` and `ftk cache`")
    return (
        f"The device is out of memory. Planned were {human_bytes(plan.total_bytes)} of {budget}, for "
        f"{workload.micro_batch_size} image(s) of {workload.width * factor}x{workload.height * factor} px with "
        f"{workload.text_tokens} text tokens at once. "
        f"Estimates err: set train.memory.device_gib below what the device has to leave more room. Or change, in this order: "
        f"{'; '.join(steps)}."
    )


def blocks(denoiser: Any, family: Family) -> list[Any]:
    """The repeated blocks in the order in which they run."""
    return [module for module in denoiser.modules() if type(module).__name__ in family.block_classes]


def has_torchao() -> bool:
    """Whether the library that quantises is installed."""
    return importlib.util.find_spec("torchao") is not None


def _sizes(model: Model, config: TrainConfig, workload: Workload, dtype: "torch.dtype", splits_trained: bool) -> _Sizes:
    family, denoiser = model.family, model.denoiser
    repeated = blocks(denoiser, family)
    frozen = sum(one.numel() for one in denoiser.parameters() if not one.requires_grad)
    trained = _num_trained(denoiser)
    per_parameter = _bytes_a_trained_parameter(config, dtype)
    by_block = [_block_bytes(block, dtype.itemsize) for block in repeated]
    total: dict[Base, int] = {base: sum(one[base] for one in by_block) for base in _BASES}
    linears = [one for block in repeated for one in _frozen_linears(block)]
    # A part is fp32, and its own master.
    per_part = _bytes_a_trained_parameter(config) / workload.world_size if splits_trained else per_parameter
    outside = frozen * dtype.itemsize - total["full"]
    # What is not a block is gathered for the whole step; of the blocks one computes and the next is on its way.
    gathered = outside + 2 * max(one["full"] for one in by_block)
    if splits_trained:
        gathered += _gathered_trained([_num_trained(block) for block in repeated], trained, dtype.itemsize)
    return _Sizes(
        num_blocks=len(repeated),
        block={base: total[base] // len(repeated) for base in _BASES},
        largest_block={base: max(one[base] for one in by_block) for base in _BASES},
        outside=outside,
        trained=trained * per_parameter,
        splits_trained=splits_trained,
        trained_when_split=round(trained * per_part),
        gathered=gathered,
        largest_weight=max((one.weight.numel() for one in linears), default=0) * dtype.itemsize,
        activations=family.activations(denoiser, workload.image_tokens(family), workload.text_tokens, dtype),
    )


def _bytes_a_trained_parameter(config: TrainConfig, dtype: "torch.dtype | None" = None) -> int:
    """The gradient as it comes and in fp32, two moments, and a master copy unless the parameter itself is fp32 (no dtype)."""
    plain = 16 if dtype is None or dtype.itemsize == 4 else 2 * dtype.itemsize + 16
    return plain + (4 if config.ema_decay else 0)


def _fixed(model: Model, config: TrainConfig, workload: Workload, dtype: "torch.dtype", sizes: _Sizes) -> dict[str, int]:
    """Bytes of what is beside the denoiser and no measure touches: text encoders and extra networks, where there are any."""
    fixed = {}
    if model.encoders:
        widths = sum(each.config.num_hidden_layers * each.config.hidden_size for each in model.encoders.values())
        kept = workload.micro_batch_size * workload.text_tokens * widths * _ENCODER_WIDTHS
        fixed["text encoders"] = _beside_bytes(model.encoders.values(), config, dtype) + kept * dtype.itemsize
    if model.extras:
        # A network like the denoiser keeps as much of a sample as its share of the denoiser's parameters.
        activations = sizes.activations
        whole = activations.outside + sizes.num_blocks * activations.block_saved
        num_denoiser = sum(each.numel() for each in model.denoiser.parameters())
        share = sum(each.numel() for module in model.extras.values() for each in module.parameters()) / num_denoiser
        kept = round(workload.micro_batch_size * share * whole)
        fixed["extra networks"] = _beside_bytes(model.extras.values(), config, dtype) + kept
    return fixed


def _beside_bytes(modules: Iterable[Any], config: TrainConfig, dtype: "torch.dtype") -> int:
    """Weights of modules that are whole on every process, and gradients, moments and masters of what is trained of them."""
    every = [each for module in modules for each in module.parameters()]
    trained = sum(each.numel() for each in every if each.requires_grad)
    frozen = sum(each.numel() for each in every) - trained
    return int(frozen * dtype.itemsize + trained * _bytes_a_trained_parameter(config, dtype))


def _num_trained(module: Any) -> int:
    return sum(one.numel() for one in module.parameters() if one.requires_grad)


def _gathered_trained(by_block: list[int], trained: int, itemsize: int) -> int:
    """Bytes of trained weights that are whole for a while, and of their gradients: as they come, and in fp32 to be summed."""
    outside, largest = trained - sum(by_block), max(by_block)
    return (outside + 2 * largest) * itemsize + (outside + largest) * (itemsize + 4)


def _block_bytes(block: Any, itemsize: int) -> dict[Base, int]:
    """Frozen weights of one block: as they are, or with its linear layers in 8 bits and a scale a row."""
    frozen = sum(one.numel() for one in block.parameters() if not one.requires_grad)
    linears = _frozen_linears(block)
    weights = sum(one.weight.numel() for one in linears)
    scales = sum(one.out_features for one in linears)
    return {"full": frozen * itemsize, "int8": weights + (scales + frozen - weights) * itemsize}


def _frozen_linears(block: Any) -> list[Any]:
    import torch

    return [one for one in block.modules() if isinstance(one, torch.nn.Linear) and not one.weight.requires_grad]


def _check(config: TrainConfig, num_blocks: int) -> None:
    memory = config.memory
    if memory.base == "int8" and not has_torchao():
        raise ConfigError("train.memory.base: int8 needs torchao, which is not installed. Run: pip install 'ftk[int8]'")
    if config.sharding == "fsdp" and memory.base == "int8":
        raise ConfigError("train.sharding: fsdp splits the frozen weights as they are: it excludes train.memory.base: int8.")
    offload = _asked(memory.offload, num_blocks)
    if config.sharding == "fsdp" and offload:
        raise ConfigError("train.sharding: fsdp and train.memory.offload both move the frozen weights: choose one of them.")
    checkpointing = _asked(memory.checkpointing, num_blocks)
    if offload and checkpointing is not None and checkpointing < offload:
        raise ConfigError(
            f"train.memory.offload: {offload} needs as many checkpointed blocks, and train.memory.checkpointing allows "
            f"{checkpointing}: weights come back for the backward pass as its activations are computed again."
        )


def _asked(setting: str | int, num_blocks: int) -> int | None:
    """How many blocks a setting names; None: the plan decides."""
    if setting == "auto":
        return None
    return {"none": 0, "all": num_blocks}.get(setting, 0) if isinstance(setting, str) else min(setting, num_blocks)


def _candidates(config: TrainConfig, sizes: _Sizes, world_size: int, is_bounded: bool) -> Iterator[_Measures]:
    """All measures that the settings allow, the cheapest first."""
    num_blocks = sizes.num_blocks
    checkpointing, offload = _asked(config.memory.checkpointing, num_blocks), _asked(config.memory.offload, num_blocks)
    least = offload or 0
    if checkpointing is None:
        counts = range(least, num_blocks + 1) if is_bounded else range(least, least + 1)
    else:
        counts = range(checkpointing, checkpointing + 1)
    base: Base = "full"
    for sharding, base in _weights(config, world_size, bool(offload)):
        for count in counts:
            yield _Measures(num_checkpointed=count, num_offloaded=least, base=base, sharding=sharding)
    if offload is None and config.sharding != "fsdp" and is_bounded and sizes.block[base]:
        most = counts[-1]
        for count in range(1, most + 1):
            yield _Measures(num_checkpointed=most, num_offloaded=count, base=base, sharding="none")


def _weights(config: TrainConfig, world_size: int, is_offloaded: bool) -> Iterator[tuple[Sharding, Base]]:
    """What can be done with the frozen weights on the device, the cheapest first."""
    if config.sharding == "fsdp" and world_size > 1:
        yield "fsdp", "full"
        return
    if config.memory.base != "int8":
        yield "none", "full"
        if config.sharding == "auto" and world_size > 1 and not is_offloaded:
            yield "fsdp", "full"
    if config.memory.base == "int8" or (config.memory.base == "auto" and has_torchao()):
        yield "none", "int8"


def _parts(sizes: _Sizes, measures: _Measures, workload: Workload, device: Device, fixed: Mapping[str, int]) -> dict[str, int]:
    block, largest, count = sizes.block[measures.base], sizes.largest_block[measures.base], sizes.num_blocks
    weights, trained, working = sizes.outside + (count - measures.num_offloaded) * block, sizes.trained, 0
    if measures.sharding == "fsdp":
        weights, trained, working = weights // workload.world_size, sizes.trained_when_split, sizes.gathered
    elif measures.num_offloaded:
        working = STREAMED_SLOTS * largest
    if measures.base == "int8":
        working += sizes.largest_weight
    saved, left = sizes.activations, count - measures.num_checkpointed
    # The first blocks are the checkpointed ones: when the backward pass reaches them the others' activations are gone.
    held = measures.num_checkpointed * saved.block_input + max(left, 1 if measures.num_checkpointed else 0) * saved.block_saved
    parts = {
        "frozen weights": weights,
        "trained weights and optimizer": trained,
        "activations": workload.micro_batch_size * (held + saved.outside),
        "working memory of a block": workload.micro_batch_size * saved.block_working + working,
        **fixed,
    }
    reserve = _CUDA_RESERVE_BYTES + round(_FRAGMENTATION * sum(parts.values())) if device.kind == "cuda" else 0
    return {**parts, "reserve": reserve}


def _attention(config: TrainConfig, device: Device, dtype: "torch.dtype") -> tuple[str, str]:
    if config.memory.attention != "auto":
        return config.memory.attention, f"attention {config.memory.attention}: train.memory.attention says so"
    if device.capability is None or device.capability < (8, 0):
        return "native", f"attention native: {device.name} has no kernel to prefer"
    if dtype.itemsize == 4:
        return "native", "attention native: the fast kernels take no fp32"
    if device.capability[0] == 9:
        return "cudnn", f"attention cudnn: the fastest on {device.name} (compute capability 9.x), 1.7 to 2.3 times flash"
    major, minor = device.capability
    return "flash", f"attention flash: {device.name} has compute capability {major}.{minor}; cuDNN's is faster on 9.x alone"


def _reasons(config: TrainConfig, measures: _Measures, sizes: _Sizes, workload: Workload, budget: int | None) -> list[str]:
    memory, found = config.memory, []
    if budget is None:
        found.append(
            "the device's memory is unknown: nothing is saved unless asked for; train.memory.device_gib plans for so much"
        )
    elif memory.device_gib is not None:
        found.append("planned for train.memory.device_gib")
    for setting, value, count, what in (
        ("checkpointing", memory.checkpointing, measures.num_checkpointed, "computed again in the backward pass"),
        ("offload", memory.offload, measures.num_offloaded, "kept in host memory"),
    ):
        if value != "auto":
            found.append(f"blocks {what}: {count}, by train.memory.{setting}: {value}")
        elif count:
            found.append(f"blocks {what}: {count}, the fewest that fit")
    if measures.sharding == "fsdp":
        why = "train.sharding says so" if config.sharding == "fsdp" else "they do not fit one"
        what = "weights, their gradients and the optimizer's state" if sizes.splits_trained else "frozen weights"
        found.append(f"{what} are split over {workload.world_size} processes: {why}")
    elif config.sharding == "fsdp":
        found.append("train.sharding: fsdp has nothing to split over: there is one process")
    if measures.base == "int8":
        why = "train.memory.base says so" if memory.base == "int8" else "weights in full do not fit"
        found.append(f"8-bit base: {why}; it changes the results a little")
    elif memory.base == "auto" and not has_torchao() and measures.num_offloaded:
        found.append("an 8-bit base would save more, at less cost: pip install 'ftk[int8]'")
    return found


def _misfit(total: int, budget: int) -> str:
    return (
        f"no measure that the settings allow fits: {human_bytes(total)} expected, {human_bytes(budget)} there. It is tried all "
        f"the same. Smaller data.resolutions or train.micro_batch_size need less"
    )
