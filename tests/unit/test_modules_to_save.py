"""Modules of the denoiser that are trained whole beside an adapter, judged by PEFT's own loader."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from ftk.configs.schema import MethodConfig, TrainConfig
from ftk.deliver import card, mixing
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import adapter_files, whole_modules
from ftk.methods.adapters.targets import TargetPattern, denoiser_component
from ftk.methods.base import Export
from ftk.models import base as families
from ftk.models.base import DENOISER, Conditions, Model
from ftk.train import placement
from ftk.train.optim import MasterOptimizer

CPU = torch.device("cpu")
MODULES = {"qwen-image": ["norm_out", "proj_out"], "stable-diffusion": ["conv_in", "time_embedding"]}
WHOLE = ["norm_out.linear.bias", "norm_out.linear.weight", "proj_out.bias", "proj_out.weight"]
SETTINGS = [
    pytest.param("qwen-image", "lora", {"rank": 4}, id="lora"),
    pytest.param("qwen-image", "lora", {"rank": 2, "alpha": 4.0, "initialisation": "pissa"}, id="pissa"),
    pytest.param("qwen-image", "oft", {"block_size": 4, "bias": "oft_only"}, id="oft"),
    pytest.param("qwen-image", "boft", {}, id="boft"),
    pytest.param("qwen-image", "loha", {"rank": 4, "alpha": 2.0}, id="loha"),
    pytest.param("qwen-image", "lokr", {"rank": 4}, id="lokr"),
    pytest.param("qwen-image", "peft", {"type": "HRA", "r": 4}, id="hra"),
    pytest.param("stable-diffusion", "lora", {"rank": 4}, id="unet"),
]


class Case:
    """A method with whole modules on a fresh tiny model, with noise in all that it trains."""

    def __init__(self, family: str, directory: Path, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        self.family, self.directory, self.dtype = families.get(family), directory, dtype
        given = {"modules_to_save": MODULES[family], **settings}
        self.method, self.settings = methods.parse(MethodConfig(name=name, **given))
        self.model = self.load()
        self.before = {name: tensor.clone() for name, tensor in self.model.denoiser.state_dict().items()}
        self.parameters = self.method.attach(self.model, self.settings, 0)
        self.model.denoiser.eval()

    def load(self) -> Model:
        model = families.load_model(self.family, self.directory, (), self.dtype, CPU)
        model.denoiser.eval()
        return model

    @torch.no_grad()
    def train(self) -> "Case":
        draw = torch.Generator().manual_seed(2)
        for _, parameter in sorted(self.parameters.items()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
        return self

    @torch.no_grad()
    def predict(self, denoiser: Any = None) -> torch.Tensor:
        model = self.model if denoiser is None else dataclasses.replace(self.model, denoiser=denoiser)
        noisy = torch.randn(1, self.family.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(1))
        sizes = model.denoiser.config
        width = sizes.joint_attention_dim if "joint_attention_dim" in sizes else sizes.cross_attention_dim
        text = {"embeds": torch.randn(6, width, generator=torch.Generator().manual_seed(4))}
        return self.family.predict(
            model, noisy, model.schedule.sigmas[[500]], Conditions(texts=self.family.collate_texts([text]))
        )

    def export(self, directory: Path, form: str | None = None) -> list[Path]:
        form = form or methods.formats(self.method, self.settings)[0]
        return self.method.export(self.model, self.settings, Export(directory=directory, form=form, metadata={}))


@pytest.fixture
def case(tiny_models: Callable[[str], Path]) -> Callable[..., Case]:
    """Attaches a method; `lora` on the transformer by default."""

    def make(family: str = "qwen-image", name: str = "lora", **settings: Any) -> Case:
        return Case(family, tiny_models(family), name, **settings)

    return make


@pytest.mark.parametrize(("family", "name", "settings"), SETTINGS)
def test_pefts_own_loader_gives_the_prediction_that_was_trained(
    case: Callable[..., Case], tmp_path: Path, family: str, name: str, settings: dict[str, Any]
) -> None:
    trained = case(family, name, **settings)
    start = trained.predict()
    torch.testing.assert_close(start, trained.predict(trained.load().denoiser), atol=1e-6, rtol=0)
    expected = trained.train().predict()
    assert (expected - start).abs().max() > 1e-2
    trained.export(tmp_path)
    fresh = trained.load().denoiser
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft.tuners.boft")
        PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(trained.predict(fresh), expected, atol=1e-6, rtol=0)

    absent = dict.fromkeys((*trained.family.text_components, *trained.family.latent_components))
    pipeline = trained.family.pipeline(trained.directory, torch.float32, CPU, **absent)
    trained.method.load_into(trained.family, pipeline, tmp_path)
    loaded = getattr(pipeline, trained.family.denoiser_attribute)
    torch.testing.assert_close(trained.predict(loaded), expected, atol=1e-6, rtol=0)

    trained.method.merge(trained.model)
    torch.testing.assert_close(trained.predict(), expected, atol=5e-6, rtol=0)
    assert trained.model.denoiser.state_dict().keys() == trained.before.keys()


def test_these_modules_and_the_adapter_are_trained_and_nothing_else(case: Callable[..., Case]) -> None:
    attached = case()
    assert sorted(name for name in attached.parameters if "lora_" not in name) == WHOLE
    assert attached.parameters.keys() - set(WHOLE) == case(modules_to_save=None).parameters.keys()
    trainable = {name for name, each in attached.model.denoiser.named_parameters() if each.requires_grad}
    assert trainable == attached.parameters.keys()


def test_their_bf16_parameters_have_fp32_masters(case: Callable[..., Case]) -> None:
    attached = case(dtype=torch.bfloat16)
    optimizer = MasterOptimizer(attached.parameters, TrainConfig())
    assert {attached.parameters[name].dtype for name in WHOLE} == {torch.bfloat16}
    assert {optimizer.weights()[name].dtype for name in WHOLE} == {torch.float32}


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("proj_out", ["proj_out"]),
        (["linear"], ["norm_out.linear"]),
        (["norm_out", "norm_out.linear"], ["norm_out"]),
        (["norm_k"], ["transformer_blocks.0.attn.norm_k", "transformer_blocks.1.attn.norm_k"]),
        ({"regex": r"transformer_blocks\.1\.img_mod.*"}, ["transformer_blocks.1.img_mod"]),
    ],
)
def test_names_ends_of_names_and_expressions_choose_modules(case: Callable[..., Case], written: Any, names: list[str]) -> None:
    attached = case(modules_to_save=written)
    own = [name for name in attached.parameters if "lora_" not in name]
    assert own == [
        f"{name}.{key}" for name in names for key, _ in attached.model.denoiser.get_submodule(name).named_parameters()
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modules_to_save": ["proj_oud"]},
            "'proj_oud' is the name of no module of qwen-image, nor the end of one. Did you mean",
        ),
        ({"modules_to_save": {"regex": "proj"}}, "the expression 'proj' matches the whole name of no module"),
        ({"modules_to_save": ["proj_out.weight"]}, "It is the name of a parameter"),
        ({"modules_to_save": ["norm_out.silu"]}, r"norm_out\.silu has no parameters"),
        ({"modules_to_save": ["transformer_blocks"]}, r"is a list of modules. Name the modules in it, such as transf.*\.0"),
        ({"modules_to_save": ["to_q"]}, r"transformer_blocks\.0\.attn\.to_q, .* would be trained whole, and method\.targets"),
        ({"modules_to_save": ["transformer_blocks.1"]}, r"transformer_blocks\.1\.attn\.to_q, .* Leave it out of one of them"),
        ({"targets": "all", "modules_to_save": ["proj_out"]}, "method.exclude takes the same names"),
        ({"modules_to_save": []}, "a list of module names"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(case: Callable[..., Case], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        case(**settings)


def test_what_is_excluded_from_the_targets_can_be_trained_whole(case: Callable[..., Case]) -> None:
    attached = case(targets="all", exclude="proj_out", modules_to_save=["proj_out"])
    assert [name for name in attached.parameters if name.startswith("proj_out")] == ["proj_out.weight", "proj_out.bias"]


def test_a_name_that_peft_would_take_for_others_too_is_refused() -> None:
    inner = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(2, 2), "to_q": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([inner]), "proj_out": torch.nn.Linear(2, 2)})
    component = denoiser_component(families.get("qwen-image"), model, ("to_q",), "method.targets")
    both = whole_modules.select(component, ("proj_out",))
    assert both == ["blocks.0.proj_out", "proj_out"]
    assert whole_modules.entries(component, ("proj_out",), both, ["blocks.0.to_q"]) == ["proj_out"]
    pattern = TargetPattern(regex="proj_out")
    assert whole_modules.select(component, pattern) == ["proj_out"]
    with pytest.raises(ConfigError, match=r"would take blocks\.0\.proj_out for one of 1 modules such as proj_out"):
        whole_modules.entries(component, pattern, ["proj_out"], ["blocks.0.to_q"])


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "oft"])
def test_formats_without_a_place_for_them_are_refused(case: Callable[..., Case], tmp_path: Path, name: str) -> None:
    attached = case(name=name, **({"block_size": 4} if name == "oft" else {"rank": 2}))
    written = methods.formats(attached.method, attached.settings)
    assert written == (("peft",) if name == "oft" else ("peft", "comfyui"))
    for form in {"diffusers", "comfyui", "kohya", "lycoris"} - set(written):
        with pytest.raises(ConfigError, match=f"cannot be written as {form}: .*modules_to_save.* Write peft") as refused:
            attached.export(tmp_path, form)
        assert str(refused.value).endswith(f"It can be written as: {', '.join(written)}.")
    assert "PeftModel.from_pretrained(pipeline.transformer" in attached.method.usage(attached.family, attached.settings)
    with pytest.raises(ConfigError, match="there is no delivery format 'gguf'"):
        attached.export(tmp_path, "gguf")


@pytest.mark.parametrize(
    ("family", "name", "prefix"),
    [
        ("qwen-image", "lora", "diffusion_model.norm_out.linear"),
        ("qwen-image", "lokr", "diffusion_model.norm_out.linear"),
        ("stable-diffusion", "loha", "lora_unet_conv_in"),
    ],
)
def test_comfyui_adds_the_difference_to_weights_and_biases(
    case: Callable[..., Case], tmp_path: Path, family: str, name: str, prefix: str
) -> None:
    trained = case(family, name, rank=4).train()
    (file,) = trained.export(tmp_path, "comfyui")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        assert "not diffusers" in opened.metadata()["ftk_read_by"]
    own = next(each for each in MODULES[family] if each in prefix)
    state = trained.model.denoiser.state_dict()
    layer = "norm_out.linear" if own == "norm_out" else own
    for kind, key in (("weight", "diff"), ("bias", "diff_b")):
        added = trained.before[f"{layer}.{kind}"] + tensors[f"{prefix}.{key}"]
        torch.testing.assert_close(added, state[f"{layer}.{kind}"], atol=1e-6, rtol=0)
    num_whole = sum(key.endswith((".diff", ".diff_b")) for key in tensors)
    assert num_whole == sum("lora_" not in key and "hada_" not in key and "lokr_" not in key for key in trained.parameters)
    assert num_whole < len(tensors)
    loading = card.how_to_load(trained.method, trained.settings, trained.family, "base", "comfyui")
    assert "diffusers refuses the modules that were trained whole" in loading


def test_diffusers_refuses_comfyuis_file_as_the_file_says(case: Callable[..., Case], tmp_path: Path) -> None:
    attached = case()
    (file,) = attached.export(tmp_path, "comfyui")
    absent = dict.fromkeys((*attached.family.text_components, *attached.family.latent_components))
    pipeline = attached.family.pipeline(attached.directory, torch.float32, CPU, **absent)
    with pytest.raises(ValueError, match=r"proj_out\.diff"):
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)


def test_comfyui_has_no_place_for_what_is_neither_weight_nor_bias(case: Callable[..., Case], tmp_path: Path) -> None:
    attached = case(modules_to_save=["norm_out"])
    attached.model.denoiser.norm_out.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match=r"norm_out\.scale cannot be written as comfyui: .* Write peft"):
        attached.export(tmp_path, "comfyui")


def test_an_8_bit_base_keeps_them_in_full_precision(case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    # As torchao rounds, which need not be installed.
    monkeypatch.setattr(placement, "_rounded", lambda weight: (weight.to(torch.int8), torch.ones(len(weight), 1)))
    attached = case(modules_to_save=["transformer_blocks.1.img_mod", "proj_out"])
    model = attached.load()
    attached.method.thaw(model, attached.settings)
    placement.quantise_base(model.denoiser, attached.family, CPU)
    kinds = {name: type(module).__name__ for name, module in model.denoiser.named_modules()}
    assert kinds["transformer_blocks.0.img_mod.1"] == kinds["transformer_blocks.1.txt_mod.1"] == "Int8Linear"
    assert kinds["transformer_blocks.1.img_mod.1"] == "Linear"
    assert attached.method.attach(model, attached.settings, 0).keys() == attached.parameters.keys()

    model = attached.load()
    placement.quantise_base(model.denoiser, attached.family, CPU)
    with pytest.raises(ConfigError, match=r"method\.modules_to_save needs the base weights in full"):
        attached.method.attach(model, attached.settings, 0)


def test_a_run_without_them_has_the_settings_that_it_had() -> None:
    for name in ("lora", "oft", "boft", "loha", "lokr"):
        _, settings = methods.parse(MethodConfig(name=name))
        assert "modules_to_save" not in settings.model_dump(mode="json")
        _, settings = methods.parse(MethodConfig(name=name, modules_to_save="proj_out"))
        assert settings.model_dump(mode="json")["modules_to_save"] == ["proj_out"]


def test_such_an_adapter_has_no_strength_and_is_not_added_to_others(case: Callable[..., Case], tmp_path: Path) -> None:
    trained = case()
    trained.export(tmp_path)
    with pytest.raises(ConfigError, match="which holds whole modules"):
        mixing.check_own_strength(0.5, tmp_path, "lora")
    mixing.check_own_strength(1.0, tmp_path, "lora")
    with pytest.raises(ConfigError, match=r"--add .* holds whole modules beside its adapter \(norm_out, proj_out\)"):
        adapter_files.read(tmp_path, trained.family, {DENOISER: trained.load().denoiser}, "--add")


def test_a_folder_that_lacks_one_of_its_modules_is_refused(case: Callable[..., Case], tmp_path: Path) -> None:
    trained = case()
    settings, _ = trained.export(tmp_path)
    settings.write_text(settings.read_text().replace('"proj_out"', '"proj_out", "txt_in"'))
    pipeline = type("Pipeline", (), {"transformer": trained.load().denoiser})()
    with pytest.raises(CheckpointError, match="does not fit this model"):
        trained.method.load_into(trained.family, pipeline, tmp_path)
