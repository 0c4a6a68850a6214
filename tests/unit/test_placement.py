"""A denoiser that a plan was carried out on computes what it computed before."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from ftk.errors import ConfigError
from ftk.models import base as models
from ftk.models.base import Conditions, Model, Texts
from ftk.models.components.schedule import NoiseSchedule
from ftk.train import placement
from ftk.train.memory import MemoryPlan, blocks, has_torchao

CPU = torch.device("cpu")
FAMILY = models.get("qwen-image")
LAYERS = 5
needs_torchao = pytest.mark.skipif(not has_torchao(), reason="torchao is not installed")


def a_denoiser(heads: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    denoiser = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=LAYERS, attention_head_dim=16,
        num_attention_heads=heads, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return denoiser.to(dtype).requires_grad_(False).train()


def adapted(denoiser: Any, config: peft.PeftConfig | None = None) -> Any:
    torch.manual_seed(1)
    denoiser.add_adapter(config or lora())
    for parameter in denoiser.parameters():
        if parameter.requires_grad:  # B starts at zero, and then A has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return denoiser


def lora(dropout: float = 0.0) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_dropout=dropout, target_modules=FAMILY.target_groups["attention"].suffixes)


def a_plan(**changes: Any) -> MemoryPlan:
    facts = {
        "device": "cpu", "budget_bytes": None, "dtype": "float32", "num_blocks": LAYERS, "num_checkpointed": 0,
        "num_offloaded": 0, "base": "full", "sharding": "none", "attention": "native", "compile": False, "parts": {},
        "total_bytes": 0, "host_bytes": 0, "reasons": (), "fits": True,
    }  # fmt: skip
    return MemoryPlan(**{**facts, **changes})


def predict(denoiser: Any, noisy_BCHW: torch.Tensor, sigma_B: torch.Tensor, texts: Texts) -> torch.Tensor:
    schedule = NoiseSchedule(objective="flow", sigmas=torch.linspace(1, 0.001, 1000))
    model = Model(family=FAMILY, schedule=schedule, denoiser=denoiser)
    return FAMILY.predict(model, noisy_BCHW, sigma_B, Conditions(texts=texts))


@dataclass
class Outcome:
    loss: float
    gradients: dict[str, torch.Tensor]


def train_step(denoiser: Any, seed: int = 2, lengths: tuple[int, int] = (6, 6)) -> Outcome:
    """One forward and backward pass at batch 2; the texts are padded where their lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    dtype = denoiser.img_in.weight.dtype
    noisy = torch.randn(2, 16, 8, 8, generator=generator).to(dtype)
    texts = [{"embeds": torch.randn(length, 16, generator=generator).to(dtype)} for length in lengths]
    torch.manual_seed(3)
    output = predict(denoiser, noisy, torch.tensor([0.3, 0.8]), FAMILY.collate_texts(texts))
    loss = (output - torch.randn(output.shape, generator=generator)).square().mean()
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in denoiser.named_parameters() if one.requires_grad}
    denoiser.zero_grad(set_to_none=True)
    return Outcome(loss=loss.item(), gradients=gradients)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.loss == expected.loss
    assert found.gradients.keys() == expected.gradients.keys()
    assert all(torch.equal(found.gradients[name], expected.gradients[name]) for name in expected.gradients)
    assert any(gradient.any() for gradient in expected.gradients.values())


def cosine(found: Outcome, expected: Outcome) -> float:
    flat = [torch.cat([one.flatten().double() for one in outcome.gradients.values()]) for outcome in (found, expected)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


def saved_bytes(denoiser: Any) -> int:
    """What autograd holds at the end of a forward pass, each storage once, weights left out."""
    weights = {one.untyped_storage()._cdata for one in [*denoiser.parameters(), *denoiser.buffers()]}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predict(denoiser, torch.randn(1, 16, 8, 8), torch.tensor([0.5]), {"embeds": torch.randn(1, 6, 16), "mask": None})
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("count", [1, 3, LAYERS])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_blocks_give_the_same_bits(count: int, dropout: float) -> None:
    expected = train_step(adapted(a_denoiser(), lora(dropout)))
    denoiser = adapted(a_denoiser(), lora(dropout))
    placement.after_method(denoiser, a_plan(num_checkpointed=count), FAMILY, CPU)
    assert_equal(train_step(denoiser), expected)


def test_each_checkpointed_block_saves_memory() -> None:
    sizes = []
    for count in range(LAYERS + 1):
        denoiser = adapted(a_denoiser())
        placement.checkpoint_blocks(denoiser, FAMILY, count)
        sizes.append(saved_bytes(denoiser))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.3 * sizes[0]


@pytest.mark.parametrize(
    "changes", [{"num_checkpointed": 3}, {"num_checkpointed": 4, "num_offloaded": 2}, {"attention": "math"}]
)
def test_placement_keeps_names_classes_and_objects(changes: dict[str, Any]) -> None:
    denoiser = adapted(a_denoiser())
    names = {name: id(one) for name, one in denoiser.named_parameters()}
    classes = [type(module) for module in denoiser.modules()]
    placement.after_method(denoiser, a_plan(**changes), FAMILY, CPU)
    assert {name: id(one) for name, one in denoiser.named_parameters()} == names
    assert [type(module) for module in denoiser.modules()] == classes


@pytest.mark.parametrize(("offloaded", "checkpointed"), [(1, 1), (2, 4), (3, 5), (LAYERS, LAYERS)])
def test_offloaded_blocks_give_the_same_bits_step_after_step(offloaded: int, checkpointed: int) -> None:
    whole, denoiser = adapted(a_denoiser(), lora(0.3)), adapted(a_denoiser(), lora(0.3))
    placement.after_method(denoiser, a_plan(num_offloaded=offloaded, num_checkpointed=checkpointed), FAMILY, CPU)
    for seed in (1, 2, 3):
        with torch.no_grad():  # as validation does, between two steps
            arguments = torch.ones(1, 16, 8, 8), torch.tensor([0.5]), {"embeds": torch.ones(1, 6, 16), "mask": None}
            assert torch.equal(predict(denoiser.eval(), *arguments), predict(whole.eval(), *arguments))
        assert_equal(train_step(denoiser.train(), seed), train_step(whole.train(), seed))


def test_offloaded_weights_leave_the_device_and_trained_ones_stay() -> None:
    denoiser = adapted(a_denoiser())
    before = {name: one.detach().clone() for name, one in denoiser.named_parameters()}
    stream = placement.offload_blocks(denoiser, FAMILY, [0, 2, 4], CPU)
    hosts = {one.host.untyped_storage().data_ptr() for one in stream.streamed}
    slots = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    assert len(slots) == 2
    for number, block in enumerate(blocks(denoiser, FAMILY)):
        for name, one in block.named_parameters():
            is_hosted = one.untyped_storage().data_ptr() in hosts
            assert is_hosted == (number in (0, 2, 4) and not one.requires_grad), name
    assert all(torch.equal(one, before[name]) for name, one in denoiser.named_parameters())


def test_offloaded_weights_are_read_from_the_slots_not_from_the_host() -> None:
    """Else the copies would be for nothing, and on a GPU the kernels would meet tensors of two devices."""
    denoiser = adapted(a_denoiser())
    stream = placement.offload_blocks(denoiser, FAMILY, [1], CPU)
    placement.checkpoint_blocks(denoiser, FAMILY, 2)
    seen: list[int] = []
    layer = blocks(denoiser, FAMILY)[1].attn.to_q.base_layer
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.untyped_storage().data_ptr()))
    train_step(denoiser)
    assert seen == [stream.slots[0].untyped_storage().data_ptr()] * 2  # forward, and recomputed
    assert layer.weight.untyped_storage().data_ptr() == stream.streamed[0].host.untyped_storage().data_ptr()


def test_moving_the_denoiser_leaves_offloaded_blocks_where_they_are() -> None:
    denoiser = adapted(a_denoiser())
    placement.offload_blocks(denoiser, FAMILY, [1, 3], CPU)
    denoiser.to("meta")
    places = [{one.device.type for one in block.parameters()} for block in blocks(denoiser, FAMILY)]
    assert places == [{"meta"}, {"cpu"}, {"meta"}, {"cpu"}, {"meta"}]


def test_offloaded_blocks_are_spread_evenly() -> None:
    assert placement.spread(3, 9) == [0, 3, 6]
    assert placement.spread(5, 5) == [0, 1, 2, 3, 4]
    assert placement.spread(0, 5) == []
    assert len(set(placement.spread(7, 60))) == 7


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lora,
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["to_q", "to_k"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["to_q", "to_k"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["to_q", "to_k"]),
}


@needs_torchao
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_train_on_an_8_bit_base_as_on_a_full_one(name: str) -> None:
    expected = train_step(adapted(a_denoiser(heads=4), CONFIGS[name]()))
    denoiser = a_denoiser(heads=4)
    placement.before_method(denoiser, a_plan(base="int8"), FAMILY, CPU)
    denoiser = adapted(denoiser, CONFIGS[name]())
    placement.after_method(denoiser, a_plan(base="int8"), FAMILY, CPU)
    found = train_step(denoiser)
    assert found.loss == pytest.approx(expected.loss, rel=2e-2)
    assert found.loss != expected.loss
    assert cosine(found, expected) > 0.995


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_8_bit_layer_differentiates_what_it_computes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    full = torch.nn.Linear(48, 32).to(dtype).requires_grad_(False)
    layer = placement.Int8Linear(full, *placement._rounded(full.weight))
    assert layer.codes.dtype == torch.int8
    assert layer.codes.abs().amax(1).min() >= 126  # each row uses all of its range
    rounding = (layer.weight.float() - full.weight.float()).abs() / full.weight.float().abs().amax(1, keepdim=True)
    assert rounding.max() < 0.55 / 127 + (2**-8 if dtype == torch.bfloat16 else 0)
    plain = torch.nn.Linear(48, 32).to(dtype)
    plain.weight.data, plain.bias.data = layer.weight, full.bias.data
    results = []
    for one in (layer, plain):
        x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = one(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@needs_torchao
def test_an_8_bit_base_takes_half_of_bf16_and_keeps_adapters_in_bf16() -> None:
    denoiser = a_denoiser(heads=8, dtype=torch.bfloat16)
    size = sum(one.nbytes for one in blocks(denoiser, FAMILY)[0].parameters())
    placement.quantise_base(denoiser, FAMILY, CPU)
    first = blocks(denoiser, FAMILY)[0]
    assert sum(one.nbytes for one in [*first.parameters(), *first.buffers()]) < 0.52 * size
    assert type(denoiser.img_in) is torch.nn.Linear
    trained = [one for one in adapted(denoiser).parameters() if one.requires_grad]
    assert {one.dtype for one in trained} == {torch.bfloat16}


@needs_torchao
def test_an_8_bit_base_can_be_offloaded() -> None:
    def built(**changes: Any) -> Any:
        denoiser = a_denoiser()
        placement.before_method(denoiser, a_plan(base="int8"), FAMILY, CPU)
        placement.after_method(adapted(denoiser), a_plan(base="int8", **changes), FAMILY, CPU)
        return denoiser

    streamed = built(num_checkpointed=5, num_offloaded=3)
    assert_equal(train_step(streamed), train_step(built()))
    first = blocks(streamed, FAMILY)[0].attn.to_q.base_layer
    assert first.codes.untyped_storage().nbytes() > 10 * first.codes.nbytes  # one piece with the rest of its block


def test_an_8_bit_base_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization.quant_primitives", None)
    with pytest.raises(ConfigError, match=r"pip install 'ftk\[int8\]'"):
        placement.before_method(a_denoiser(), a_plan(base="int8"), FAMILY, CPU)


@pytest.mark.parametrize("name", ["math", "efficient", "flash", "cudnn"])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 4)])
def test_attention_kernels_agree(name: str, lengths: tuple[int, int]) -> None:
    expected = train_step(adapted(a_denoiser()), lengths=lengths)
    denoiser = adapted(a_denoiser())
    placement.after_method(denoiser, a_plan(attention=name, num_checkpointed=2), FAMILY, CPU)
    found = train_step(denoiser, lengths=lengths)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert cosine(found, expected) > 0.99999


def test_the_chosen_kernel_also_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    denoiser = adapted(a_denoiser())
    block = blocks(denoiser, FAMILY)[0]
    block.attn.to_q.register_forward_pre_hook(lambda *_: chosen.append(torch.backends.cuda.flash_sdp_enabled()))
    placement.after_method(denoiser, a_plan(attention="math", num_checkpointed=1), FAMILY, CPU)
    train_step(denoiser)
    assert chosen == [False, False]
    assert torch.backends.cuda.flash_sdp_enabled()


def test_blocks_are_compiled_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code generation alone is left out: it takes minutes on a CPU."""
    graphs: list[Any] = []

    def capture(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=capture))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/c++")
    denoiser, whole = adapted(a_denoiser()), adapted(a_denoiser())
    placement.after_method(denoiser, a_plan(compile=True, num_checkpointed=2, num_offloaded=1), FAMILY, CPU)
    parameters = [one for one in denoiser.parameters() if one.requires_grad]

    def losses(size: int) -> torch.Tensor:
        texts = {"embeds": torch.ones(2, size - 3, 16), "mask": None}
        return predict(denoiser, torch.ones(2, 16, size, size), torch.tensor([0.3, 0.8]), texts).mean((1, 2, 3))

    assert placement.warm_up(losses, [12], parameters) > 0
    assert all(one.grad is None for one in parameters)
    assert len(graphs) == 2  # the first block, whose input needs no gradient, and all others
    found, expected = train_step(denoiser), train_step(whole)
    assert len(graphs) == 2
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert cosine(found, expected) > 0.99999


def test_compiling_for_a_cpu_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        placement.after_method(a_denoiser(), a_plan(compile=True), FAMILY, CPU)
