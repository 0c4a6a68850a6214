"""The memory plan: cheap measures first, settings obeyed, figures that agree with what autograd really keeps."""

from typing import Any

import peft
import pyarrow as pa
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from ftk.configs.schema import RunConfig, TrainConfig
from ftk.errors import ConfigError
from ftk.models import base as models
from ftk.models.base import Conditions, Model
from ftk.models.components.schedule import NoiseSchedule
from ftk.train import memory
from ftk.train.memory import Device, Workload

FAMILY = models.get("qwen-image")
GIB = 1 << 30
WORKLOAD = Workload(height=128, width=128, text_tokens=200, micro_batch_size=1)


@pytest.fixture(scope="module")
def full_size() -> Any:
    """Qwen-Image in its real size with a LoRA, on the meta device."""
    with torch.device("meta"):
        return _adapted(QwenImageTransformer2DModel(num_layers=60, guidance_embeds=False).to(torch.bfloat16))


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "has_torchao", lambda: True)


def _adapted(denoiser: Any, group: str = "attention") -> Any:
    denoiser.requires_grad_(False)
    denoiser.add_adapter(peft.LoraConfig(r=4, target_modules=FAMILY.target_groups[group].suffixes))
    return denoiser


def _model(denoiser: Any) -> Model:
    schedule = NoiseSchedule(objective="flow", sigmas=torch.linspace(1, 0.001, 1000))
    return Model(family=FAMILY, schedule=schedule, denoiser=denoiser)


def gpu(gib: float, capability: tuple[int, int] = (9, 0)) -> Device:
    return Device(kind="cuda", name="a GPU", budget_bytes=round(gib * GIB), capability=capability)


def the_cpu() -> Device:
    return Device(kind="cpu", name="CPU", budget_bytes=None)


def planned(denoiser: Any, device: Device, workload: Workload = WORKLOAD, **settings: Any) -> memory.MemoryPlan:
    return memory.plan(_model(denoiser), TrainConfig.model_validate(settings), workload, device)


def measures(plan: memory.MemoryPlan) -> tuple[int, int, str, str]:
    return plan.num_checkpointed, plan.num_offloaded, plan.base, plan.sharding


def test_on_a_device_with_room_nothing_is_done(full_size: Any) -> None:
    plan = planned(full_size, gpu(139))
    assert measures(plan) == (0, 0, "full", "none")
    assert plan.fits
    assert plan.total_bytes == sum(plan.parts.values())
    assert plan.parts["frozen weights"] == pytest.approx(40.9e9, rel=0.01)  # 20.43 B parameters in bf16
    assert plan.load_device == "cuda"


@pytest.mark.usefixtures("torchao")
def test_measures_come_in_the_order_of_their_cost(full_size: Any) -> None:
    found = [planned(full_size, gpu(gib)) for gib in (80, 60, 50, 44, 32, 16, 12, 8)]
    assert all(plan.fits for plan in found)
    assert found[0].num_checkpointed == 0
    assert 0 < found[1].num_checkpointed < found[2].num_checkpointed < 60
    assert [plan.base for plan in found] == ["full"] * 4 + ["int8"] * 4
    assert [plan.num_offloaded > 0 for plan in found] == [False] * 5 + [True] * 3
    offloaded = [plan.num_offloaded for plan in found]
    assert offloaded == sorted(offloaded)
    assert all(plan.num_checkpointed == 60 for plan in found if plan.num_offloaded)
    assert all(plan.load_device == "cpu" for plan in found if plan.base == "int8")


def test_as_few_blocks_as_fit_are_checkpointed(full_size: Any) -> None:
    plan = planned(full_size, gpu(55))
    fewer = planned(full_size, gpu(55), memory={"checkpointing": plan.num_checkpointed - 1, "base": "full", "offload": "none"})
    assert plan.fits
    assert not fewer.fits


def test_one_block_is_whole_while_it_is_computed_again(full_size: Any) -> None:
    held = FAMILY.activations(full_size, 4096, 200, torch.bfloat16)
    plans = [planned(full_size, gpu(139), memory={"checkpointing": count}) for count in (58, 59, 60)]
    sizes = [plan.parts["activations"] for plan in plans]
    assert sizes[0] - sizes[1] == held.block_saved - held.block_input
    assert sizes[2] - sizes[1] == held.block_input


def test_weights_are_split_before_they_are_rounded(full_size: Any) -> None:
    several = Workload(height=128, width=128, text_tokens=200, micro_batch_size=1, world_size=4)
    assert measures(planned(full_size, gpu(139), several))[3] == "none"
    plan = planned(full_size, gpu(32), several)
    assert plan.sharding == "fsdp"
    assert plan.base == "full"
    assert plan.parts["frozen weights"] == pytest.approx(40.9e9 / 4, rel=0.01)
    assert planned(full_size, gpu(32), several, sharding="none").sharding == "none"


def test_what_is_trained_is_split_with_the_weights_where_they_are_what_is_trained() -> None:
    with torch.device("meta"):
        denoiser = QwenImageTransformer2DModel(num_layers=60, guidance_embeds=False).to(torch.bfloat16)
    numel = sum(one.numel() for one in denoiser.parameters())
    block = sum(one.numel() for one in denoiser.transformer_blocks[0].parameters())
    outside = numel - 60 * block

    def plan(gib: float, world_size: int, **settings: Any) -> memory.MemoryPlan:
        workload = Workload(height=128, width=128, text_tokens=200, micro_batch_size=1, world_size=world_size)
        config = TrainConfig.model_validate(settings)
        return memory.plan(_model(denoiser), config, workload, gpu(gib), splits_trained=True)

    whole, split = plan(1000, 8), plan(80, 8)
    assert (whole.sharding, split.sharding) == ("none", "fsdp")
    assert whole.parts["trained weights and optimizer"] == 20 * numel
    assert split.parts["trained weights and optimizer"] == 16 * numel // 8
    assert plan(80, 8, ema_decay=0.9).parts["trained weights and optimizer"] == 20 * numel // 8
    # In bf16 what is no block and two blocks; their gradients as they come and in fp32, of one block at a time.
    gathered = 2 * (outside + 2 * block) + 6 * (outside + block)
    held = FAMILY.activations(denoiser, 4096, 200, torch.bfloat16)
    assert split.parts["working memory of a block"] == gathered + held.block_working
    assert any(
        "gradients and the optimizer's state are split over 8 processes: they do not fit one" in one for one in split.reasons
    )
    alone = plan(80, 1)
    assert not alone.fits
    assert measures(alone) == (60, 0, "full", "none")


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"memory": {"checkpointing": "all"}}, (60, 0, "full", "none")),
        ({"memory": {"checkpointing": 7}}, (7, 0, "full", "none")),
        ({"memory": {"checkpointing": 100}}, (60, 0, "full", "none")),
        ({"memory": {"offload": 5}}, (5, 5, "full", "none")),
        ({"memory": {"base": "int8"}}, (0, 0, "int8", "none")),
        ({"memory": {"base": "int8", "offload": 60, "checkpointing": "all"}}, (60, 60, "int8", "none")),
        ({"sharding": "fsdp"}, (0, 0, "full", "none")),
    ],
)
@pytest.mark.parametrize("device", [gpu(139), the_cpu()])
def test_each_choice_can_be_set_by_hand(
    full_size: Any, device: Device, settings: dict[str, Any], expected: tuple[int, int, str, str]
) -> None:
    assert measures(planned(full_size, device, **settings)) == expected


def test_on_a_cpu_nothing_is_saved_unless_a_size_is_given(full_size: Any) -> None:
    assert measures(planned(full_size, the_cpu(), precision="fp32")) == (0, 0, "full", "none")
    assert planned(full_size, the_cpu(), memory={"device_gib": 60}).num_checkpointed > 0


@pytest.mark.usefixtures("torchao")
def test_settings_that_exclude_each_other_are_refused(full_size: Any) -> None:
    several = Workload(height=128, width=128, text_tokens=200, micro_batch_size=1, world_size=2)
    for settings, message in (
        ({"memory": {"offload": 5, "checkpointing": 3}}, "as many checkpointed blocks"),
        ({"memory": {"offload": 5, "checkpointing": "none"}}, "as many checkpointed blocks"),
        ({"memory": {"offload": 5}, "sharding": "fsdp"}, "choose one"),
        ({"memory": {"base": "int8"}, "sharding": "fsdp"}, "excludes"),
    ):
        with pytest.raises(ConfigError, match=message):
            planned(full_size, gpu(80), several, **settings)


def test_an_8_bit_base_without_torchao_is_refused_or_left_out(full_size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "has_torchao", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'ftk\[int8\]'"):
        planned(full_size, gpu(80), memory={"base": "int8"})
    plan = planned(full_size, gpu(32))
    assert plan.base == "full"
    assert plan.num_offloaded > 0
    assert any("pip install 'ftk[int8]'" in reason for reason in plan.reasons)


@pytest.mark.usefixtures("torchao")
def test_what_cannot_fit_is_said_with_figures_and_tried(full_size: Any) -> None:
    plan = planned(full_size, gpu(2))
    assert not plan.fits
    assert measures(plan) == (60, 60, "int8", "none")
    assert any("2.0 GiB" in reason for reason in plan.reasons)
    assert any("more than there is" in text for _, text in memory.describe(plan))


@pytest.mark.parametrize(
    ("device", "setting", "expected"),
    [
        (gpu(80, (9, 0)), "auto", torch.bfloat16),
        (gpu(80, (8, 0)), "auto", torch.bfloat16),
        (gpu(80, (7, 5)), "auto", torch.float16),
        (gpu(80, (8, 0)), "fp16", torch.float16),
        (the_cpu(), "auto", torch.float32),
        (the_cpu(), "bf16", torch.bfloat16),
        (gpu(80), "fp32", torch.float32),
    ],
)
def test_precision(device: Device, setting: str, expected: torch.dtype) -> None:
    assert memory.precision(TrainConfig(precision=setting), device)[0] == expected


def test_fp16_on_a_cpu_is_refused(full_size: Any) -> None:
    with pytest.raises(ConfigError, match=r"train.precision: fp16 is for GPUs.*Set train.precision to bf16 or fp32"):
        planned(full_size, the_cpu(), precision="fp16")


def test_a_plan_in_fp16_takes_the_memory_of_one_in_bf16(full_size: Any) -> None:
    half, brain = (planned(full_size, gpu(80, (8, 0)), precision=precision) for precision in ("fp16", "bf16"))
    assert (half.dtype, brain.dtype) == ("float16", "bfloat16")
    assert half.parts == brain.parts


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        (gpu(139, (9, 0)), {}, "cudnn"),
        (gpu(139, (8, 0)), {}, "flash"),
        (gpu(139, (12, 0)), {}, "flash"),
        (gpu(139, (7, 5)), {}, "native"),
        (gpu(139, (9, 0)), {"precision": "fp32"}, "native"),
        (the_cpu(), {}, "native"),
        (gpu(139, (9, 0)), {"memory": {"attention": "efficient"}}, "efficient"),
    ],
)
def test_attention_is_chosen_by_the_device(full_size: Any, device: Device, settings: dict[str, Any], expected: str) -> None:
    plan = planned(full_size, device, **settings)
    assert plan.attention == expected
    assert any(f"attention {expected}" in reason for reason in plan.reasons)


def test_the_largest_micro_batch_of_a_cache() -> None:
    samples = pa.table(
        {
            "bucket_width": [1024, 1024, 512, 2048],
            "bucket_height": [1024, 1024, 512, 512],
            "text_lengths": pa.array([[10], [20, 300], [1000], [30]], pa.list_(pa.int32())),
        }
    )
    found = memory.cached_workload(samples, FAMILY, TrainConfig(micro_batch_size=2, global_batch_size=2))
    assert (found.width, found.height, found.text_tokens, found.micro_batch_size) == (128, 128, 300, 2)
    assert found.image_tokens(FAMILY) == 4096


def test_without_a_cache_the_largest_resolution_and_text_are_assumed() -> None:
    tree = {
        "run": "r", "model": {"family": "qwen-image", "path": "x"},
        "data": {"sources": [{"path": "p"}], "resolutions": [512, 768]},
    }  # fmt: skip
    found = memory.assumed_workload(RunConfig.model_validate(tree), FAMILY)
    assert (found.width, found.height, found.text_tokens) == (96, 96, 1024)


def test_without_a_cache_the_largest_size_of_any_source_is_assumed() -> None:
    sources = [{"path": "p"}, {"path": "q", "resolutions": ["native"]}]
    tree = {"run": "r", "model": {"family": "qwen-image", "path": "x"}, "data": {"sources": sources, "resolutions": [1024]}}
    found = memory.assumed_workload(RunConfig.model_validate(tree), FAMILY)
    assert (found.width, found.height) == (1328 // 8, 1328 // 8)
    tree["data"] = {"sources": [{"path": "p"}], "resolutions": ["1664x928", 512]}
    found = memory.assumed_workload(RunConfig.model_validate(tree), FAMILY)
    assert (found.width, found.height) == (208, 116)


def test_advice_names_the_figures_and_what_is_left_to_change(full_size: Any) -> None:
    plan = planned(full_size, gpu(139), memory={"device_gib": 139})
    text = memory.advice(plan, WORKLOAD, FAMILY)
    assert "1024x1024 px" in text
    assert "139.0 GiB" in text
    assert text.index("checkpointing: all") < text.index("base: int8") < text.index("offload: 15") < text.index("resolutions")
    full = planned(full_size, gpu(139), memory={"checkpointing": "all", "offload": 60})
    text = memory.advice(full, WORKLOAD, FAMILY)
    assert "checkpointing: all" not in text
    assert "offload" not in text


@pytest.mark.parametrize("group", ["attention", "attention+text", "attention+mlp", "all-linear"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                      (torch.bfloat16, torch.float32)])  # fmt: skip
def test_estimated_activations_are_what_autograd_keeps(group: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    denoiser = _adapted(
        QwenImageTransformer2DModel(
            patch_size=2, in_channels=64, out_channels=16, num_layers=3, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(16, 24, 24),
        ).to(dtype),
        group,
    )  # fmt: skip
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    for batch in (1, 2):
        kept = kept_by_the_last_block(denoiser, batch, dtype) / batch
        estimate = FAMILY.activations(denoiser, 256, 32, dtype)
        assert estimate.block_saved == pytest.approx(kept, rel=0.15)
        assert estimate.block_input == (256 + 32) * 128 * dtype.itemsize


def kept_by_the_last_block(denoiser: Any, batch: int, dtype: torch.dtype) -> int:
    """Bytes of the storages that autograd saves in the last block and nowhere before, weights left out."""
    weights = {one.untyped_storage()._cdata for one in denoiser.parameters()}
    before: dict[int, torch.Tensor] = {}
    within: dict[int, torch.Tensor] = {}
    now = before
    last = denoiser.transformer_blocks[-1]

    def enter(*_: Any) -> None:
        nonlocal now
        now = within

    def leave(*_: Any) -> None:
        nonlocal now
        now = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights and key not in before:
            now[key] = tensor
        return tensor

    handles = [last.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    texts = {"embeds": torch.randn(batch, 32, 32, dtype=dtype), "mask": None}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        noisy = torch.randn(batch, 16, 32, 32, dtype=dtype)
        FAMILY.predict(_model(denoiser), noisy, torch.rand(batch), Conditions(texts=texts))
    for handle in handles:
        handle.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in within.values())


def test_estimates_agree_with_the_published_figure(full_size: Any) -> None:
    """111 KB a token a block in bf16, with LoRA on attention."""
    found = FAMILY.activations(full_size, 4096, 200, torch.bfloat16)
    assert found.block_saved / 4296 == pytest.approx(111e3, rel=0.03)
