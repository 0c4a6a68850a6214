"""Adapters in files of other programs: every layer's change is what the program that wrote it computes."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ftk.errors import CheckpointError, ConfigError
from ftk.methods.adapters import adapter_files
from ftk.methods.adapters.adapter_files import AdapterFile
from ftk.models import base as families
from ftk.models.base import DENOISER

META, CPU = torch.device("meta"), torch.device("cpu")
RANK = 3
Tensors = dict[str, torch.Tensor]
QWEN = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.0.proj", "transformer_blocks.1.attn.to_out.0")
SDXL = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2",
    "mid_block.attentions.0.proj_in",
)
ORIGINAL = {
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "down_blocks.1.resnets.0.conv1": "input_blocks.3.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "mid_block.attentions.0": "middle_block.1",
}
"""Of the tiny SDXL, with one ResNet a level."""


@functools.cache
def components(name: str, directory: Path) -> dict[str, Any]:
    family: Any = families.get(name)
    encoders = getattr(family, "trainable_encoders", ())
    loaded = {each: family.load_encoder(directory, each, torch.float32, CPU) for each in encoders}
    return {DENOISER: family.load_denoiser(directory, torch.float32, CPU), **loaded}


@pytest.fixture
def read(tiny_models: Callable[[str], Path], tmp_path: Path) -> Callable[..., AdapterFile]:
    """Write tensors into a file, and read it as an adapter of a tiny model."""

    def run(name: str, tensors: Tensors, header: Mapping[str, str] | None = None, pipeline: Any = None) -> AdapterFile:
        path = tmp_path / "adapter-of-others.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(header or {}))
        modules = components(name, tiny_models(name))
        return adapter_files.read(path, families.get(name), modules, "--add", pipeline)

    return run


def shape_of(name: str, directory: Path, layer: str, component: str = DENOISER) -> torch.Size:
    shape: torch.Size = components(name, directory)[component].get_submodule(layer).weight.shape
    return shape


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora_of(shape: torch.Size, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """down, up."""
    return draw(seed, RANK, *shape[1:]), draw(seed + 1, shape[0], RANK, *[1] * (len(shape) - 2))


def double(tensor: torch.Tensor) -> Any:
    return tensor.double().numpy()


def product(down: torch.Tensor, up: torch.Tensor) -> Any:
    return double(up.flatten(1)) @ double(down.flatten(1))


def check(file: AdapterFile, component: str, layer: str, shape: torch.Size, expected: Any) -> None:
    """Within 1e-7 of the change's size."""
    found = file.layers[component][layer].delta(shape).double().numpy()
    expected = np.asarray(expected).reshape(tuple(shape))
    assert np.abs(found - expected).max() <= 3e-7 * np.abs(expected).max()


FORMS: list[tuple[str, str, Callable[[str], str], tuple[str, str], bool]] = [
    ("musubi-tuner", "qwen-image", lambda layer: "lora_unet_" + layer.replace(".", "_"), ("lora_down", "lora_up"), True),
    ("ai-toolkit", "qwen-image", lambda layer: f"diffusion_model.{layer}", ("lora_A", "lora_B"), False),
    ("ComfyUI with alpha", "qwen-image", lambda layer: f"diffusion_model.{layer}", ("lora_down", "lora_up"), True),
    ("diffusers", "qwen-image", lambda layer: f"transformer.{layer}", ("lora_A", "lora_B"), False),
    ("DiffSynth", "qwen-image", lambda layer: layer, ("lora_A.default", "lora_B.default"), False),
    ("sd-scripts", "sdxl", lambda layer: "lora_unet_" + original(layer).replace(".", "_"), ("lora_down", "lora_up"), True),
    ("flat names", "sdxl", lambda layer: "lora_unet_" + layer.replace(".", "_"), ("lora_down", "lora_up"), True),
    ("ComfyUI's own", "sdxl", lambda layer: f"diffusion_model.{original(layer)}", ("lora_down", "lora_up"), True),
    ("diffusers", "sdxl", lambda layer: f"unet.{layer}", ("lora_A", "lora_B"), False),
    ("old diffusers", "sdxl", lambda layer: f"unet.{layer}", ("lora.down", "lora.up"), False),
]


def original(layer: str) -> str:
    start = next(start for start in ORIGINAL if layer.startswith(start))
    return ORIGINAL[start] + layer.removeprefix(start)


@pytest.mark.parametrize(
    ("program", "name", "key", "factors", "has_alpha"), FORMS, ids=[f"{each[0]}-{each[1]}" for each in FORMS]
)
def test_a_lora_of_another_program_is_read_with_its_alpha(
    read: Callable[..., AdapterFile],
    tiny_models: Callable[[str], Path],
    program: str,
    name: str,
    key: Callable[[str], str],
    factors: tuple[str, str],
    has_alpha: bool,
) -> None:
    tensors: Tensors = {}
    expected = {}
    for seed, layer in enumerate(QWEN if name == "qwen-image" else SDXL):
        shape = shape_of(name, tiny_models(name), layer)
        down, up = lora_of(shape, 10 * seed)
        tensors |= {f"{key(layer)}.{factors[0]}.weight": down, f"{key(layer)}.{factors[1]}.weight": up}
        alpha = seed + 0.5
        if has_alpha:
            tensors[f"{key(layer)}.alpha"] = torch.tensor(alpha)
        expected[layer] = (shape, product(down, up) * (alpha / RANK if has_alpha else 1.0))
    file = read(name, tensors)
    assert file.layers.keys() == {DENOISER}
    assert file.layers[DENOISER].keys() == expected.keys()
    assert file.kinds == ["lora"]
    for layer, (shape, change) in expected.items():
        check(file, DENOISER, layer, shape, change)


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl"])
def test_text_encoders_of_sd_scripts_are_read(
    read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path], name: str
) -> None:
    prefixes = (
        {"text_encoder": "lora_te_"}
        if name == "stable-diffusion"
        else {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    )
    family: Any = families.get(name)
    modules = components(name, tiny_models(name))
    tensors: Tensors = {}
    expected = {}
    for seed, (component, prefix) in enumerate(prefixes.items()):
        for published in ("text_model.encoder.layers.1.self_attn.out_proj", "text_model.encoder.layers.0.mlp.fc1"):
            (layer,) = [
                each for each, _ in modules[component].named_modules() if family.encoder_key(component, each) == published
            ]
            shape = modules[component].get_submodule(layer).weight.shape
            down, up = lora_of(shape, 100 * seed + len(published))
            start = prefix + published.replace(".", "_")
            tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up, f"{start}.alpha": torch.tensor(6.0)}
            expected[component, layer] = (shape, 2.0 * product(down, up))
    file = read(name, tensors)
    assert {(component, layer) for component, layers in file.layers.items() for layer in layers} == expected.keys()
    for (component, layer), (shape, change) in expected.items():
        check(file, component, layer, shape, change)


def test_names_that_diffusers_gave_before_it_had_peft_are_read(
    read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path]
) -> None:
    name, start = "stable-diffusion", "mid_block.attentions.0.transformer_blocks.0.attn1"
    modules = components(name, tiny_models(name))
    (out,) = [each for each, _ in modules["text_encoder"].named_modules() if each.endswith("layers.0.self_attn.out_proj")]
    places = {
        (DENOISER, f"{start}.to_q"): f"unet.{start}.processor.to_q_lora",
        (DENOISER, f"{start}.to_out.0"): f"unet.{start}.processor.to_out_lora",
        ("text_encoder", out): "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora",
    }
    tensors, expected = {}, {}
    for seed, ((component, layer), key) in enumerate(places.items()):
        shape = modules[component].get_submodule(layer).weight.shape
        down, up = lora_of(shape, 10 * seed)
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        expected[component, layer] = (shape, product(down, up))
    file = read(name, tensors)
    for (component, layer), (shape, change) in expected.items():
        check(file, component, layer, shape, change)


def kron(left: torch.Tensor, right: Any) -> Any:
    """Cell by cell, as the definition has it; of kernels each cell's matrix."""
    left_LM, right = double(left), np.asarray(right, dtype=np.float64)
    out = np.zeros((left_LM.shape[0] * right.shape[0], left_LM.shape[1] * right.shape[1], *right.shape[2:]))
    for row in range(left_LM.shape[0]):
        for column in range(left_LM.shape[1]):
            rows = slice(row * right.shape[0], (row + 1) * right.shape[0])
            columns = slice(column * right.shape[1], (column + 1) * right.shape[1])
            out[rows, columns] = left_LM[row, column] * right
    return out


def core(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    """For each cell of the kernel a^T t b."""
    cells = double(t)
    return np.stack(
        [
            np.stack([double(a).T @ cells[:, :, row, column] @ double(b) for column in range(cells.shape[3])], -1)
            for row in range(cells.shape[2])
        ],
        -2,
    )


def lokr_of(shape: torch.Size, form: str) -> tuple[Tensors, Any, float]:
    """Tensors of a LoKr layer, its Kronecker product, and what divides alpha in LyCORIS (0: alpha has no meaning)."""
    out_left, in_left = 2, 2
    right = (shape[0] // out_left, shape[1] // in_left, *shape[2:])
    w1 = draw(1, out_left, in_left)
    w2 = draw(2, *right)
    if form == "whole":
        return {"lokr_w1": w1, "lokr_w2": w2}, kron(w1, double(w2)), 0
    if form == "core":
        t, a, b = draw(3, RANK, RANK, *right[2:]), draw(4, RANK, right[0]), draw(5, RANK, right[1])
        return {"lokr_w1": w1, "lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}, kron(w1, core(t, a, b)), RANK
    a, b = draw(4, right[0], RANK), draw(5, RANK, int(np.prod(right[1:])))
    tensors = {"lokr_w2_a": a, "lokr_w2_b": b}
    low = (double(a) @ double(b)).reshape(right)
    if form == "low":
        return {"lokr_w1": w1, **tensors}, kron(w1, low), RANK
    a1, b1 = draw(6, out_left, RANK), draw(7, RANK, in_left)
    return {"lokr_w1_a": a1, "lokr_w1_b": b1, **tensors}, kron(a1 @ b1, low), RANK


@pytest.mark.parametrize(
    ("form", "layer"),
    [
        ("whole", "to_q"),
        ("low", "to_q"),
        ("both", "to_q"),
        ("whole", "conv1"),
        ("low", "conv1"),
        ("both", "conv1"),
        ("core", "conv1"),
    ],
)
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_lokr_of_lycoris_is_read(
    read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path], form: str, layer: str, prefix: str
) -> None:
    name = "stable-diffusion"
    module = {"to_q": SDXL[0], "conv1": "down_blocks.1.resnets.0.conv2"}[layer]
    shape = shape_of(name, tiny_models(name), module)
    tensors, change, divisor = lokr_of(shape, form)
    key = prefix + module.replace(".", "_")
    file = read(name, {**{f"{key}.{kind}": tensor for kind, tensor in tensors.items()}, f"{key}.alpha": torch.tensor(7.0)})
    check(file, DENOISER, module, shape, change * (7.0 / divisor if divisor else 1.0))
    assert file.kinds == ["lokr"]


def test_a_whole_lokr_of_musubi_tuner_has_an_alpha(
    read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path]
) -> None:
    """It divides by the longer side of the larger factor, and marks its files with the factor's number."""
    shape = shape_of("qwen-image", tiny_models("qwen-image"), QWEN[0])
    tensors, change, _ = lokr_of(shape, "whole")
    key = "lora_unet_" + QWEN[0].replace(".", "_")
    named = {f"{key}.{kind}": tensor for kind, tensor in tensors.items()}
    file = read("qwen-image", {**named, f"{key}.alpha": torch.tensor(4.0), "lokr_factor": torch.tensor(2)})
    check(file, DENOISER, QWEN[0], shape, change * 4.0 / max(tensors["lokr_w2"].shape))


@pytest.mark.parametrize("form", ["linear", "flat kernel", "core"])
def test_loha_of_lycoris_is_read(read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path], form: str) -> None:
    name = "stable-diffusion"
    module = SDXL[0] if form == "linear" else "down_blocks.1.resnets.0.conv2"
    shape = shape_of(name, tiny_models(name), module)
    tensors: Tensors = {}
    halves = []
    for half in (1, 2):
        if form == "core":
            t, a, b = draw(half, RANK, RANK, *shape[2:]), draw(half + 2, RANK, shape[0]), draw(half + 4, RANK, shape[1])
            tensors |= {f"hada_t{half}": t, f"hada_w{half}_a": a, f"hada_w{half}_b": b}
            halves.append(core(t, a, b))
        else:
            a, b = draw(half + 2, shape[0], RANK), draw(half + 4, RANK, int(np.prod(shape[1:])))
            tensors |= {f"hada_w{half}_a": a, f"hada_w{half}_b": b}
            halves.append(double(a) @ double(b))
    key = "lora_unet_" + module.replace(".", "_")
    file = read(name, {**{f"{key}.{kind}": tensor for kind, tensor in tensors.items()}, f"{key}.alpha": torch.tensor(1.5)})
    check(file, DENOISER, module, shape, halves[0] * halves[1] * 1.5 / RANK)


def test_a_convolution_of_lycoris_with_a_core_is_read(
    read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path]
) -> None:
    module = "down_blocks.1.resnets.0.conv2"
    shape = shape_of("stable-diffusion", tiny_models("stable-diffusion"), module)
    down, mid, up = draw(1, RANK, shape[1], 1, 1), draw(2, RANK, RANK, 3, 3), draw(3, shape[0], RANK, 1, 1)
    key = "lora_unet_" + module.replace(".", "_")
    file = read(
        "stable-diffusion", {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    )
    change = core(mid, up.flatten(1).T, down.flatten(1))
    check(file, DENOISER, module, shape, change)
    # And as three convolutions do it, one after the other.
    image = draw(4, 1, shape[1], 8, 8)
    through = torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(torch.nn.functional.conv2d(image, down), mid, padding=1), up
    )
    torch.testing.assert_close(
        torch.nn.functional.conv2d(image, file.layers[DENOISER][module].delta(shape), padding=1), through, atol=1e-4, rtol=1e-5
    )


def test_settings_of_peft_tell_the_strength(read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path]) -> None:
    """alpha, patterns and rsLoRA, in the header of a diffusers file."""
    tensors: Tensors = {}
    shapes = {}
    for seed, layer in enumerate(QWEN):
        shapes[layer] = shape_of("qwen-image", tiny_models("qwen-image"), layer)
        down, up = lora_of(shapes[layer], 10 * seed)
        tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    settings = {"r": RANK, "lora_alpha": 6, "rank_pattern": {}, "alpha_pattern": {"attn.to_q": 1.5}, "use_rslora": False}
    for is_rs, divisor in ((False, RANK), (True, RANK**0.5)):
        tree = {f"transformer.{key}": value for key, value in {**settings, "use_rslora": is_rs}.items()}
        file = read("qwen-image", tensors, {"lora_adapter_metadata": json.dumps(tree)})
        for layer, alpha in zip(QWEN, (1.5, 6, 6), strict=True):
            change = product(tensors[f"transformer.{layer}.lora_A.weight"], tensors[f"transformer.{layer}.lora_B.weight"])
            check(file, DENOISER, layer, shapes[layer], change * alpha / divisor)


@pytest.mark.parametrize("on_inputs", [False, True])
def test_dora_of_lycoris_rescales_the_changed_weight(
    read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path], on_inputs: bool
) -> None:
    layer = QWEN[0]
    weight = components("qwen-image", tiny_models("qwen-image"))[DENOISER].get_submodule(layer).weight.detach()
    down, up = lora_of(weight.shape, 1)
    lengths = draw(3, 1, weight.shape[1]).abs() if on_inputs else draw(3, weight.shape[0], 1).abs()
    key = "lora_unet_" + layer.replace(".", "_")
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": lengths}
    file = read("qwen-image", tensors)
    changed = double(weight) + product(down, up)
    expected = changed / np.linalg.norm(changed, axis=0 if on_inputs else 1, keepdims=True) * double(lengths)
    np.testing.assert_allclose(file.layers[DENOISER][layer].applied(weight).numpy(), expected, atol=1e-5)
    half = file.layers[DENOISER][layer].applied(weight, 0.5).numpy()
    np.testing.assert_allclose(half, (expected + double(weight)) / 2, atol=1e-5)
    assert file.kinds == ["dora"]


@pytest.mark.parametrize("name", ["sdxl", "qwen-image"])
def test_what_diffusers_loads_is_what_is_read(
    read: Callable[..., AdapterFile], tiny_models: Callable[[str], Path], name: str
) -> None:
    """Its own loader is the judge, over every layer that it knows in such a file."""
    family: Any = families.get(name)
    pipeline = family.pipeline(tiny_models(name), torch.float32, CPU, **dict.fromkeys(family.latent_components))
    denoiser = getattr(pipeline, family.denoiser_attribute)
    layers = QWEN if name == "qwen-image" else SDXL
    tensors: Tensors = {}
    for seed, layer in enumerate(layers):
        down, up = lora_of(denoiser.get_submodule(layer).weight.shape, 10 * seed)
        key = "lora_unet_" + (original(layer) if name == "sdxl" else layer).replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    file = read(name, tensors)
    pipeline.load_lora_weights(dict(tensors), adapter_name="theirs")
    for layer in layers:
        adapted = denoiser.get_submodule(layer)
        theirs = adapted.get_delta_weight("theirs").detach()
        torch.testing.assert_close(file.layers[DENOISER][layer].delta(adapted.weight.shape), theirs, atol=1e-5, rtol=1e-6)


def test_a_file_of_another_base_model_is_refused_with_the_first_keys(read: Callable[..., AdapterFile]) -> None:
    tensors: Tensors = {}
    for number in range(5):
        key = f"lora_unet_double_blocks_{number}_img_attn_qkv"
        tensors |= {f"{key}.lora_down.weight": torch.zeros(2, 8), f"{key}.lora_up.weight": torch.zeros(8, 2)}
    with pytest.raises(
        CheckpointError,
        match=r"trained on another base model: 5 of its 5 layers fit nothing in this QwenImageTransformer2DModel: "
        r"lora_unet_double_blocks_0_img_attn_qkv, .*_1_.*_2_img_attn_qkv and 2 more",
    ):
        read("qwen-image", tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_A": torch.zeros(2, 5), "lora_B": torch.zeros(7, 2)},
            "another size of this one: of .* lora_A 2x5, lora_B 7x2 make",
        ),
        ({"lora_A": torch.zeros(2, 5)}, "has lora_A and no lora_B"),
        ({"diff": torch.zeros(2, 5)}, "1 of its 1 tensors are no part of a LoRA, LoHa, LoKr or DoRA: .*diff"),
        ({"alpha": torch.tensor(1.0)}, "holds alpha, which is no whole adapter"),
        ({"lokr_w1": torch.zeros(2, 2), "lokr_w2_a": torch.zeros(2, 2)}, "no lokr_w2_b"),
    ],
)
def test_a_file_that_makes_no_weight_is_refused(read: Callable[..., AdapterFile], tensors: Tensors, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read("qwen-image", {f"transformer.{QWEN[0]}.{kind}": tensor for kind, tensor in tensors.items()})


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"--add .*old.pt is a pickle"):
        adapter_files.locate(tmp_path / "old.pt", "--add")
    with pytest.raises(ConfigError, match="no such file or folder"):
        adapter_files.locate(tmp_path / "nowhere", "--add")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"holds several files: a\.safetensors, b\.safetensors"):
        adapter_files.locate(tmp_path, "--add")
