"""LoRA against its formulas, and its files against the rules of those who read them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from ftk.configs.schema import MethodConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.base import Export
from ftk.models import base as families
from ftk.models.base import Conditions, Model
from ftk.train.placement import Int8Linear

CPU = torch.device("cpu")
LAYER = "transformer_blocks.0.attn.to_q"
LoraCase = tuple[Any, Any, Model, torch.Tensor]


@pytest.fixture
def lora(tiny_model: Path) -> Callable[..., LoraCase]:
    """(method, its settings, the model with trained noise in its denoiser, the layer's weight before)."""

    def make(**settings: Any) -> LoraCase:
        method, config = methods.parse(MethodConfig(name="lora", **{"targets": ("to_q",), **settings}))
        model = _model(tiny_model)
        before = model.denoiser.get_submodule(LAYER).weight.detach().clone()
        parameters = method.attach(model, config, 0)
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
        model.denoiser.eval()
        return method, config, model, before

    return make


def _model(directory: Path, family: str = "qwen-image", dtype: torch.dtype = torch.float32) -> Model:
    return families.load_model(families.get(family), directory, (), dtype, CPU)


def _factors(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    layer = model.denoiser.get_submodule(LAYER)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 10.0}, 2.5),
        ({"rank": 4, "alpha": 10.0, "rslora": True}, 5.0),
        ({"rank": 4, "rank_pattern": {"to_q": 2}}, 1.0),
        ({"rank": 4, "alpha": 3.0, "rank_pattern": {"to_q": 2}}, 1.5),
        ({"rank": 4, "alpha_pattern": {"to_q": 12.0}}, 3.0),
    ],
)
def test_it_computes_w_plus_b_a_times_the_scale(lora: Callable[..., LoraCase], settings: dict[str, Any], scale: float) -> None:
    method, _, model, weight = lora(**settings)
    A, B = _factors(model)
    assert len(A) == settings.get("rank_pattern", {}).get("to_q", 4)
    layer = model.denoiser.get_submodule(LAYER)
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    expected = weight + scale * B @ A
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), F.linear(inputs, expected, layer.bias), atol=2e-6, rtol=1e-5)
    method.merge(model)
    torch.testing.assert_close(model.denoiser.get_submodule(LAYER).weight, expected, atol=1e-6, rtol=1e-5)


def test_dora_keeps_the_magnitude_of_each_row_apart(lora: Callable[..., LoraCase]) -> None:
    method, _, model, weight = lora(rank=4, alpha=8.0, dora=True)
    A, B = _factors(model)
    magnitude = model.denoiser.get_submodule(LAYER).lora_magnitude_vector["default"].weight.detach().clone()
    total = weight + 2.0 * B @ A
    method.merge(model)
    expected = magnitude[:, None] * total / total.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.denoiser.get_submodule(LAYER).weight, expected, atol=1e-6, rtol=1e-5)


def test_gaussian_and_default_differ_in_a_alone(tiny_model: Path) -> None:
    starts = {}
    for name in ("gaussian", "default"):
        method, config = methods.parse(MethodConfig(name="lora", rank=8, targets="all", initialisation=name))
        model = _model(tiny_model)
        state = method.attach(model, config, 0)
        assert all(not parameter.any() for key, parameter in state.items() if "lora_B" in key)
        starts[name] = torch.cat([parameter.flatten() for key, parameter in state.items() if "lora_A" in key])
    assert starts["gaussian"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert starts["default"].abs().max() < 1 / 4  # uniform in 1 / sqrt(inputs), which are 16 or more


def test_pissa_starts_from_the_largest_singular_values_and_the_weight_keeps_the_rest(tiny_model: Path) -> None:
    method, config = methods.parse(MethodConfig(name="lora", rank=3, alpha=6.0, targets=("to_q",), initialisation="pissa"))
    model = _model(tiny_model)
    weight = model.denoiser.get_submodule(LAYER).weight.detach().clone()
    method.attach(model, config, 0)
    A, B = _factors(model)
    U, S, V = torch.linalg.svd(weight)
    torch.testing.assert_close(2.0 * B @ A, U[:, :3] * S[:3] @ V[:3], atol=1e-5, rtol=1e-5)
    rest = torch.linalg.svdvals(model.denoiser.get_submodule(LAYER).base_layer.weight.detach())
    torch.testing.assert_close(rest[:5], S[3:8], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_what_takes_factors_out_starts_a_bf16_model_to_its_rounding(tiny_model: Path, initialisation: str) -> None:
    method, config = methods.parse(MethodConfig(name="lora", rank=3, targets=("to_q",), initialisation=initialisation))
    model = _model(tiny_model, dtype=torch.bfloat16)
    weight = model.denoiser.get_submodule(LAYER).weight.detach().clone()
    method.attach(model, config, 0)
    A, B = _factors(model)
    rest = model.denoiser.get_submodule(LAYER).base_layer.weight.detach()
    assert A.dtype == B.dtype == rest.dtype == torch.bfloat16
    total = rest.float() + B.float() @ A.float()
    assert (total - weight.float()).abs().max() <= rest.abs().max().item() * 2**-8
    assert not torch.equal(rest, weight)


def test_pissa_of_too_high_a_rank_names_the_layer(tiny_model: Path) -> None:
    method, config = methods.parse(MethodConfig(name="lora", rank=64, targets=("to_q",), initialisation="pissa"))
    with pytest.raises(ConfigError, match=f"takes rank 64 of {LAYER}"):
        method.attach(_model(tiny_model), config, 0)


def test_the_delivery_of_pissa_has_twice_the_rank_and_is_the_difference(lora: Callable[..., LoraCase], tmp_path: Path) -> None:
    method, config, model, weight = lora(rank=3, alpha=6.0, initialisation="pissa")
    A, B = _factors(model)
    trained = model.denoiser.get_submodule(LAYER).base_layer.weight.detach() + 2.0 * B @ A
    (file,) = method.export(model, config, Export(directory=tmp_path, form="comfyui", metadata={}))
    tensors = load_file(file)
    down, up = (tensors[f"diffusion_model.{LAYER}.lora_{side}.weight"] for side in "AB")
    assert len(down) == 6
    assert tensors[f"diffusion_model.{LAYER}.alpha"] == 6
    torch.testing.assert_close(weight + up @ down, trained, atol=2e-6, rtol=1e-5)


def test_lora_plus_names_b_and_its_factor(lora: Callable[..., LoraCase]) -> None:
    method, config, model, _ = lora(rank=2, lora_plus=16.0)
    ((expression, factor),) = methods.parameter_groups(method, config)
    assert factor == 16
    trained = [name for name, parameter in model.denoiser.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if re.search(expression, name)] == [name for name in trained if "lora_B" in name] != []
    assert methods.parameter_groups(*methods.parse(MethodConfig(name="lora"))) == ()
    assert methods.parameter_groups(*methods.parse(MethodConfig(name="full"))) == ()


def test_comfyui_names_of_a_transformer(lora: Callable[..., LoraCase], tmp_path: Path) -> None:
    method, config, model, _ = lora(rank=2, alpha=8.0)
    (file,) = method.export(model, config, Export(directory=tmp_path, form="comfyui", metadata={}))
    stems = [f"diffusion_model.transformer_blocks.{number}.attn.to_q" for number in (0, 1)]
    assert sorted(load_file(file)) == sorted(
        f"{stem}.{part}" for stem in stems for part in ("alpha", "lora_A.weight", "lora_B.weight")
    )


def test_a_kohya_file_of_a_transformer_has_the_names_of_musubi_tuner(lora: Callable[..., LoraCase], tmp_path: Path) -> None:
    """Which diffusers reads back."""
    method, config, model, weight = lora(rank=2, alpha=8.0)
    (file,) = method.export(model, config, Export(directory=tmp_path, form="kohya", metadata={}))
    stems = [f"lora_unet_transformer_blocks_{number}_attn_to_q" for number in (0, 1)]
    assert sorted(load_file(file)) == sorted(
        f"{stem}.{part}" for stem in stems for part in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    state = QwenImagePipeline.lora_state_dict(load_file(file))
    method.merge(model)
    change = model.denoiser.get_submodule(LAYER).weight.detach() - weight
    product = state[f"transformer.{LAYER}.lora_B.weight"] @ state[f"transformer.{LAYER}.lora_A.weight"]
    torch.testing.assert_close(product, change, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_names_of_a_u_net_and_alpha_over_rank(tiny_models: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    model = _model(tiny_models("sdxl"), "sdxl")
    settings = {"rank": 4, "rank_pattern": {"linear_1": 2}, "targets": ("mid_block.resnets.0.conv1", "linear_1", "to_out.0")}
    method, config = methods.parse(MethodConfig(name="lora", alpha=2.0, **settings))
    parameters = method.attach(model, config, 0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1
    before = {
        name: module.weight.detach().clone() for name, module in model.denoiser.named_modules() if name.endswith("base_layer")
    }
    (file,) = method.export(model, config, Export(directory=tmp_path, form=form, metadata={}))
    tensors = load_file(file)
    method.merge(model)
    # As the readers have it: `.` is `_`. ComfyUI knows diffusers' names but for one module; sd-scripts SDXL's original ones.
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    expected = {
        "comfyui": {
            "lora_unet_mid_block_resnets_0_conv1": "mid_block.resnets.0.conv1",
            "lora_unet_time_embedding_linear_1": "time_embedding.linear_1",
            "lora_unet_label_emb_0_0": "add_embedding.linear_1",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0": attention,
        },
        "kohya": {
            "lora_unet_middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
            "lora_unet_time_embed_0": "time_embedding.linear_1",
            "lora_unet_label_emb_0_0": "add_embedding.linear_1",
            "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0": attention,
        },
    }[form]
    stems = {name.split(".")[0] for name in tensors}
    assert expected.keys() <= stems
    assert {name.partition(".")[2] for name in tensors} == {"alpha", "lora_down.weight", "lora_up.weight"}
    for stem, module in expected.items():
        down, up, alpha = (tensors[f"{stem}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        added = (up.flatten(1) @ down.flatten(1)) * alpha / len(down)
        weight = before[f"{module}.base_layer"]
        torch.testing.assert_close(
            weight + added.reshape(weight.shape), model.denoiser.get_submodule(module).weight.detach(), atol=1e-6, rtol=1e-5
        )


def test_diffusers_loses_most_of_comfyuis_dora_and_the_file_says_so(
    lora: Callable[..., LoraCase], tiny_model: Path, tmp_path: Path
) -> None:
    method, config, model, weight = lora(rank=2, alpha=8.0, dora=True)
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter *= 1.5
    for form in ("comfyui", "diffusers"):
        method.export(model, config, Export(directory=tmp_path / form, form=form, metadata={}))
    with safe_open(tmp_path / "comfyui/comfyui.safetensors", "pt") as file:
        assert file.metadata()["ftk_read_by"] == "ComfyUI; not diffusers, which leaves out dora_scale"
    method.merge(model)
    change = model.denoiser.get_submodule(LAYER).weight.detach() - weight
    lost = {}
    for form, file in (("comfyui", "comfyui.safetensors"), ("diffusers", "pytorch_lora_weights.safetensors")):
        family = families.get("qwen-image")
        absent = dict.fromkeys((*family.text_components, *family.latent_components))
        pipeline = family.pipeline(tiny_model, torch.float32, torch.device("cpu"), **absent)
        pipeline.load_lora_weights(tmp_path / form, weight_name=file)
        pipeline.fuse_lora()
        read = pipeline.transformer.get_submodule(LAYER).get_base_layer().weight.detach() - weight
        lost[form] = float((read - change).norm() / change.norm())
    assert lost["diffusers"] < 1e-5
    assert lost["comfyui"] > 0.5


def test_comfyuis_dora_computes_what_was_trained(lora: Callable[..., LoraCase], tmp_path: Path) -> None:
    method, config, model, weight = lora(rank=2, alpha=8.0, dora=True)
    (file,) = method.export(model, config, Export(directory=tmp_path, form="comfyui", metadata={}))
    stem = f"diffusion_model.{LAYER}."
    tensors = {name.removeprefix(stem): value for name, value in load_file(file).items() if name.startswith(stem)}
    method.merge(model)
    total = weight + (tensors["lora_B.weight"] @ tensors["lora_A.weight"]) * tensors["alpha"] / 2
    # Its rule for a scale of each output: by the norm of the weight before.
    assert tensors["dora_scale"].shape == (len(weight), 1)
    computed = total * tensors["dora_scale"] / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(computed, model.denoiser.get_submodule(LAYER).weight.detach(), atol=1e-6, rtol=1e-5)


def test_dora_refuses_layers_with_rows_that_have_no_direction(tiny_model: Path) -> None:
    method, config = methods.parse(MethodConfig(name="lora", rank=2, dora=True, targets=("to_q",)))
    model = _model(tiny_model)
    with torch.no_grad():
        model.denoiser.get_submodule(LAYER).weight[:3] = 0
    with pytest.raises(ConfigError, match=rf"1 of \d+ layers have some: {LAYER} \(3 rows\)"):
        method.attach(model, config, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True, "initialisation": "pissa"}, "exclude each other"),
        ({"rank_pattern": {"to_q": 0}}, "above 0"),
        ({"alpha_pattern": {"to_q": -1.0}}, "above 0"),
        ({"lora_plus": 0.5}, "greater than or equal to 1"),
        ({"initialisation": "evo"}, "gaussian"),
        ({"ranks": 3}, "Did you mean `rank`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.parse(MethodConfig(name="lora", **settings))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_refused(lora: Callable[..., LoraCase], setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}: 'to_k' is the end of no targeted layer.*to_q"):
        lora(**{setting: {"to_k": 2}})


def test_dropout_belongs_to_training_alone(lora: Callable[..., LoraCase], tiny_model: Path, tmp_path: Path) -> None:
    method, config, model, _ = lora(rank=2, dropout=0.9)
    family = families.get("qwen-image")
    method.export(model, config, Export(directory=tmp_path, form="diffusers", metadata={}))
    pipeline = family.pipeline(tiny_model, torch.float32, CPU, text_encoder=None, tokenizer=None, vae=None)
    method.load_into(family, pipeline, tmp_path)
    pipeline.transformer.train()
    layer = pipeline.transformer.get_submodule(LAYER)
    inputs = torch.randn(4, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(inputs), layer(inputs))


def test_a_file_that_names_other_layers_is_refused(lora: Callable[..., LoraCase], tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    method, config, model, _ = lora(rank=2)
    family = families.get("qwen-image")
    (file,) = method.export(model, config, Export(directory=tmp_path, form="diffusers", metadata={}))
    save_file({name.replace("blocks.1", "blocks.7"): value for name, value in load_file(file).items()}, file)
    pipeline = family.pipeline(tiny_model, torch.float32, CPU, text_encoder=None, tokenizer=None, vae=None)
    with pytest.raises(CheckpointError, match=r"another base model: it holds \S*transformer_blocks.7"):
        method.load_into(family, pipeline, tmp_path)


def _quantised(directory: Path) -> Model:
    model = _model(directory)
    for block in model.denoiser.transformer_blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
                    codes = (layer.weight.detach() / scale).round().to(torch.int8)
                    setattr(parent, name, Int8Linear(layer, codes, scale))
    return model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora", {"rank": 2}),
        ("lora", {"rank": 2, "dora": True}),
        ("oft", {"block_size": 4}),
        ("boft", {}),
        ("loha", {"rank": 2}),
        ("lokr", {"rank": 2}),
        ("peft", {"type": "MISS", "r": 4}),
    ],
)
def test_adapters_train_on_an_8_bit_base_and_do_not_merge_into_it(
    tiny_model: Path, name: str, settings: dict[str, Any]
) -> None:
    method, config = methods.parse(MethodConfig(name=name, **settings))
    model = _quantised(tiny_model)
    parameters = method.attach(model, config, 0)
    texts = model.family.collate_texts([{"embeds": torch.randn(5, model.denoiser.config.joint_attention_dim)}])
    noisy = torch.randn(1, 16, 4, 4)
    method.predict(model, noisy, torch.tensor([0.5]), Conditions(texts=texts)).square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())
    with pytest.raises(ConfigError, match=r"train.memory.base: full"):
        method.merge(model)


@pytest.mark.parametrize(("name", "settings"), [("full", {}), ("lora", {"rank": 2, "initialisation": "olora"})])
def test_what_writes_into_the_base_refuses_8_bit_weights(tiny_model: Path, name: str, settings: dict[str, Any]) -> None:
    method, config = methods.parse(MethodConfig(name=name, **settings))
    assert methods.changes_base(method, config)
    with pytest.raises(ConfigError, match=r"train.memory.base: full"):
        method.attach(_quantised(tiny_model), config, 0)


def test_plain_lora_leaves_the_base_alone() -> None:
    assert not methods.changes_base(*methods.parse(MethodConfig(name="lora")))
    assert not methods.changes_base(*methods.parse(MethodConfig(name="oft")))
