"""What narrows a method's targets, against PEFT's own selection; and the hints for settings that PEFT calls otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from ftk.configs.schema import MethodConfig
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import injection
from ftk.models import base as families

CPU = torch.device("cpu")
ADAPTERS = ("boft", "loha", "lokr", "lora", "oft")


@pytest.fixture
def trained(tiny_models: Callable[[str], Path]) -> Callable[..., list[str]]:
    """Names of the layers that carry an adapter with these settings, on a fresh tiny model."""

    def attach(name: str = "lora", family: str = "qwen-image", **settings: Any) -> list[str]:
        method, config = methods.parse(MethodConfig(name=name, **settings))
        model = families.load_model(families.get(family), tiny_models(family), (), torch.float32, CPU)
        parameters = method.attach(model, config, 0)
        if name == "full":
            return sorted(parameters)
        assert parameters
        return sorted(injection.adapted(model.denoiser))

    return attach


def _by_peft(directory: Path, **settings: Any) -> list[str]:
    model = families.load_model(families.get("qwen-image"), directory, (), torch.float32, CPU)
    model.denoiser.add_adapter(peft.LoraConfig(r=4, **settings), adapter_name="default")
    return sorted(injection.adapted(model.denoiser))


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (["to_q", "to_k"], ["transformer_blocks.0.attn.to_q"]),
        (["to_q", "to_k", "add_q_proj"], ["to_k", "add_q_proj"]),
    ],
)
def test_excluded_layers_are_those_that_peft_excludes(
    trained: Callable[..., list[str]], tiny_models: Callable[[str], Path], targets: list[str], excluded: list[str]
) -> None:
    expected = _by_peft(tiny_models("qwen-image"), target_modules=targets, exclude_modules=excluded)
    assert trained(targets=targets, exclude=excluded) == expected
    assert trained(targets=targets) != expected


def test_an_excluded_module_takes_the_layers_in_it_along(trained: Callable[..., list[str]]) -> None:
    names = trained(targets="all-linear", exclude="transformer_blocks.1")
    assert names == [name for name in trained(targets="all-linear") if not name.startswith("transformer_blocks.1.")]


def test_an_expression_excludes_whole_names(trained: Callable[..., list[str]]) -> None:
    names = trained(targets="attention", exclude={"regex": r".*to_(q|k)"})
    assert names == [name for name in trained(targets="attention") if not name.endswith(("to_q", "to_k"))]


@pytest.mark.parametrize("number", [1, [0], [0, 1]])
def test_layers_are_the_blocks_that_peft_transforms(
    trained: Callable[..., list[str]], tiny_models: Callable[[str], Path], number: Any
) -> None:
    # PEFT wants something in front of the list, so its rule is applied to names below a root.
    targets = ["to_q", "to_k", "to_v", "add_q_proj"]
    numbers = [number] if isinstance(number, int) else number
    config = peft.LoraConfig(target_modules=targets, layers_to_transform=number, layers_pattern="transformer_blocks")
    rule = peft.tuners.tuners_utils.check_target_module_exists
    expected = [name for name in trained(targets=targets) if rule(config, f"root.{name}")]
    assert trained(targets=targets, layers=number) == expected
    assert {int(name.split(".")[1]) for name in expected} == set(numbers)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_can_be_narrowed(trained: Callable[..., list[str]], name: str) -> None:
    names = trained(name, targets=["to_q", "to_k"], layers=1, exclude="to_k")
    assert names == ["transformer_blocks.1.attn.to_q"]


def test_feed_forward_layers_count_by_their_block(trained: Callable[..., list[str]]) -> None:
    names = trained(targets="attention+mlp", layers=1)
    assert names
    assert all(name.startswith("transformer_blocks.1.") for name in names)
    assert any(".net." in name for name in names)


def test_a_list_within_a_unet_is_named(trained: Callable[..., list[str]]) -> None:
    names = trained(family="stable-diffusion", targets="attention", layers=0, layers_pattern="up_blocks")
    every = trained(family="stable-diffusion", targets="attention")
    assert names == [name for name in every if name.startswith("up_blocks.0.")] or not names


def test_full_training_leaves_excluded_parameters_frozen(trained: Callable[..., list[str]]) -> None:
    every, names = trained("full"), trained("full", exclude=["bias", "proj_out"])
    assert names == [name for name in every if not name.endswith(".bias") and not name.startswith("proj_out.")]
    assert names != every


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ["to_w"]}, r"method.exclude: 'to_w' excludes none of the \d+ targets. Did you mean `to_[qkv]`"),
        ({"targets": ["to_q"], "exclude": ["to_q"]}, "all 2 layers of method.targets are excluded"),
        ({"exclude": {"regex": "to_q"}}, "'to_q' excludes none"),
        ({"layers": 9}, "9 is no block of qwen-image with a target in it. Their numbers are 0 to 1"),
        ({"layers": [0], "layers_pattern": "blocks"}, "lies in a list 'blocks'"),
        ({"targets": ["proj_out"], "layers": 0}, "lies in a numbered block"),
    ],
)
def test_what_narrows_nothing_or_leaves_nothing_is_refused(
    trained: Callable[..., list[str]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(**settings)


@pytest.mark.parametrize(
    ("name", "key", "hint"),
    [
        ("lora", "r", "`r` is called `rank` here"),
        ("lora", "lora_alpha", "`lora_alpha` is called `alpha` here"),
        ("lora", "init_lora_weights", "`initialisation`"),
        ("lora", "layers_to_transform", "`layers`"),
        ("lora", "exclude_modules", "`exclude`"),
        ("lora", "network_dim", "`rank`"),
        ("oft", "oft_block_size", "`block_size`"),
        ("boft", "boft_dropout", "`dropout`"),
        ("lokr", "init_weights", "`initialisation`"),
        ("loha", "use_effective_conv2d", "`effective_convolution`"),
    ],
)
def test_settings_that_peft_calls_otherwise_are_refused_with_their_name(name: str, key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        methods.parse(MethodConfig(name=name, **{key: 1}))


def test_names_that_a_method_shares_with_peft_are_accepted() -> None:
    methods.parse(MethodConfig(name="oft", r=4, init_weights=False, bias="oft_only"))
    methods.parse(MethodConfig(name="peft", type="MISS", r=4))


@pytest.mark.parametrize(("initialisation", "is_base"), [("orthogonal", True), ("random", False)])
def test_lora_starts_at_the_base_but_for_random_factors(
    tiny_models: Callable[[str], Path], initialisation: str, is_base: bool
) -> None:
    method, config = methods.parse(MethodConfig(name="lora", rank=4, initialisation=initialisation))
    model = families.load_model(families.get("qwen-image"), tiny_models("qwen-image"), (), torch.float32, CPU)
    method.attach(model, config, 0)
    layer = model.denoiser.get_submodule("transformer_blocks.0.attn.to_q")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.abs().max() > 0
    assert B.abs().max() > 0
    assert bool((B @ A).abs().max() < 1e-6) == is_base


def test_oft_can_start_from_random_rotations(tiny_models: Callable[[str], Path]) -> None:
    for starts_at_base in (True, False):
        method, config = methods.parse(MethodConfig(name="oft", block_size=4, init_weights=starts_at_base))
        model = families.load_model(families.get("qwen-image"), tiny_models("qwen-image"), (), torch.float32, CPU)
        parameters = method.attach(model, config, 0)
        assert all((parameter == 0).all() for parameter in parameters.values()) == starts_at_base
