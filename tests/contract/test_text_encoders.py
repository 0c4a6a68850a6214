"""What methods promise of text encoders that they train with the denoiser, with every family that has some."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftk.configs.schema import MethodConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.base import Export
from ftk.models import base as families
from ftk.models.base import DENOISER, Conditions, Model, TrainsEncoders

CPU = torch.device("cpu")
CAPTIONS = ["a red cat", "two dogs on a long chair"]
# What text encoders make of the token ids.
ENCODED = ("embeds", "pooled")
FAMILIES = [name for name in families.available() if isinstance(families.get(name), TrainsEncoders)]
BOTH: dict[str, Any] = {"text_encoder": {"targets": "attention+mlp", "rate": 0.5}}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 2.0, "rank_pattern": {"fc1": 2}},
    "lora-dora": {"rank": 2, "dora": True, "initialisation": "default"},
    "lora-pissa": {"rank": 3, "initialisation": "pissa"},
    "oft": {"r": 8},
    "boft": {},
    "loha": {"rank": 4, "alpha": 2.0},
    "lokr": {"rank": 2, "alpha": 1.0},
    "peft": {"type": "HRA", "r": 4},
    "full": {},
}
each_family = pytest.mark.parametrize("family_name", FAMILIES)
each_method = pytest.mark.parametrize("case", SETTINGS)


@functools.cache
def _untrained(family_name: str, directory: Path, encoders: tuple[str, ...]) -> Model:
    """A tiny model in memory, to be copied: that takes half as long as loading it."""
    return families.load_model(families.get(family_name), directory, encoders, torch.float32, CPU)


class Trained:
    """A method attached to the denoiser and the text encoders of a tiny model."""

    def __init__(self, family_name: str, directory: Path, items: Any, case: str) -> None:
        self.family: Any = families.get(family_name)
        self.directory = directory
        self.items = items
        values = {**SETTINGS[case], **BOTH}
        self.method, self.settings = methods.parse(MethodConfig(name=case.split("-")[0], **values))
        self.encoders = tuple(self.method.encoders(self.family, self.settings))
        self.untrained = _untrained(family_name, directory, self.encoders)
        denoiser, encoders = copy.deepcopy((self.untrained.denoiser, dict(self.untrained.encoders)))
        self.model = dataclasses.replace(self.untrained, denoiser=denoiser, encoders=encoders, extras={})
        self.base = self.predict()
        self.parameters = self.method.attach(self.model, self.settings, 3)
        for module in self.model.components.values():
            module.eval()

    def outline(self) -> Model:
        """The shapes of the model before anything is attached to it."""
        return families.load_model(self.family, self.directory, self.encoders, torch.float32, torch.device("meta"))

    def predict(self, model: Model | None = None, grad: bool = False) -> torch.Tensor:
        """What the method predicts, or the family with another model."""
        noisy_BCHW = torch.randn(2, self.family.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(1))
        sigma_B = self.model.schedule.sigmas[[700, 200]]
        # The texts are encoded from their token ids alone.
        collated = self.family.collate_texts(self.items)
        conditions = Conditions(texts={name: tensor for name, tensor in collated.items() if name not in ENCODED})
        with torch.set_grad_enabled(grad):
            if model is None:
                return self.method.predict(self.model, noisy_BCHW, sigma_B, conditions)
            prediction: torch.Tensor = self.family.predict(model, noisy_BCHW, sigma_B, conditions)
            return prediction

    def parameters_of(self, component: str) -> dict[str, torch.nn.Parameter]:
        """Those of one component, by their names in the whole model."""
        prefixes = tuple(f"{name}." for name in self.model.encoders)
        if component == DENOISER:
            return {name: parameter for name, parameter in self.parameters.items() if not name.startswith(prefixes)}
        return {name: parameter for name, parameter in self.parameters.items() if name.startswith(f"{component}.")}

    @torch.no_grad()
    def perturb(self) -> "Trained":
        draw = torch.Generator().manual_seed(2)
        scale = 0.02 if self.method.name == "full" else 0.2
        for _, parameter in sorted(self.parameters.items()):
            parameter += scale * torch.randn(parameter.shape, generator=draw)
        return self

    def export(self, directory: Path, form: str | None = None) -> list[Path]:
        export = Export(directory=directory, form=form or self.method.FORMATS[0], metadata={"run": "test"})
        return self.method.export(self.model, self.settings, export)

    def pipeline(self) -> Any:
        return self.family.pipeline(self.directory, torch.float32, CPU, vae=None)

    def predict_with(self, pipeline: Any) -> torch.Tensor:
        """What the family predicts with the modules of a pipeline."""
        encoders = {name: getattr(pipeline, name) for name in self.family.trainable_encoders}
        return self.predict(dataclasses.replace(self.model, denoiser=pipeline.unet, encoders=encoders, extras={}))


@pytest.fixture(scope="module")
def make(tiny_models: Callable[[str], Path]) -> Callable[[str, str], Trained]:
    encoded: dict[str, Any] = {}

    def build(family_name: str, case: str) -> Trained:
        family, directory = families.get(family_name), tiny_models(family_name)
        if family_name not in encoded:
            encoder = family.load_text_encoder(directory, torch.float32, CPU)
            encoded[family_name] = [
                {name: tensor.clone() for name, tensor in item.items()} for item in family.encode_texts(encoder, CAPTIONS)
            ]
        return Trained(family_name, directory, encoded[family_name], case)

    return build


@pytest.fixture(scope="module")
def perturbed(make: Callable[[str, str], Trained]) -> Callable[[str, str], Trained]:
    """The same after training. Several tests read one, and none changes it."""
    return functools.cache(lambda family_name, case: make(family_name, case).perturb())


@each_family
def test_token_ids_give_what_the_cache_holds(make: Callable[..., Trained], family_name: str) -> None:
    trained = make(family_name, "lora")
    cached = trained.family.collate_texts(trained.items)
    token_ids = {name: tensor for name, tensor in cached.items() if "ids" in name}
    fresh = families.encoded(trained.untrained, token_ids)
    for name in ENCODED:
        assert (name in cached) == (name in fresh)
        if name in cached:
            torch.testing.assert_close(fresh[name], cached[name], atol=1e-6, rtol=0)


@each_family
@each_method
def test_it_starts_at_the_base_and_trains_every_component(make: Callable[..., Trained], family_name: str, case: str) -> None:
    trained = make(family_name, case)
    torch.testing.assert_close(trained.predict(), trained.base, atol=1e-5, rtol=0)
    modules = trained.model.components.values()
    trainable = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in trained.parameters.values()}
    trained.perturb().predict(grad=True).square().mean().backward()
    for component in trained.model.components:
        parameters = trained.parameters_of(component)
        assert parameters
        with_gradient = [name for name, each in parameters.items() if each.grad is not None and each.grad.any()]
        # SDXL reads the layer before the last: of two, one is trained.
        assert len(with_gradient) >= len(parameters) / 2, component


@each_family
@each_method
def test_a_fresh_model_with_the_trained_values_predicts_the_same_and_an_outline_has_their_shapes(
    make: Callable[..., Trained], perturbed: Callable[..., Trained], family_name: str, case: str
) -> None:
    trained, fresh = perturbed(family_name, case), make(family_name, case)
    assert fresh.parameters.keys() == trained.parameters.keys()
    assert not torch.equal(fresh.predict(), trained.predict())
    with torch.no_grad():
        for name, parameter in fresh.parameters.items():
            parameter.copy_(trained.parameters[name])
    assert torch.equal(fresh.predict(), trained.predict())
    shapes = trained.method.attach(trained.outline(), trained.settings, 0)
    assert {name: each.shape for name, each in shapes.items()} == {
        name: each.shape for name, each in trained.parameters.items()
    }


@each_family
@each_method
def test_a_fresh_pipeline_with_the_export_predicts_the_same_and_so_does_its_usage(
    perturbed: Callable[..., Trained], family_name: str, case: str, tmp_path: Path
) -> None:
    trained = perturbed(family_name, case)
    expected = trained.predict()
    files = trained.export(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)
    pipeline = trained.pipeline()
    assert (trained.predict_with(pipeline) - expected).abs().max() > 1e-3
    trained.method.load_into(trained.family, pipeline, tmp_path)
    torch.testing.assert_close(trained.predict_with(pipeline), expected, atol=1e-5, rtol=1e-5)
    assert not any(getattr(pipeline, name).training for name in trained.family.trainable_encoders)

    by_usage = trained.pipeline()
    lines = trained.method.usage(trained.family, trained.settings)
    exec(lines.replace("path/to/this/folder", str(tmp_path)), {"pipeline": by_usage})
    torch.testing.assert_close(trained.predict_with(by_usage), expected, atol=1e-5, rtol=1e-5)


@each_family
@each_method
def test_merging_and_unloading(make: Callable[..., Trained], family_name: str, case: str) -> None:
    trained = make(family_name, case).perturb()
    expected = trained.predict()
    trained.method.merge(trained.model)
    torch.testing.assert_close(trained.predict(), expected, atol=1e-5, rtol=1e-5)
    plain = trained.untrained.components
    assert plain.keys() == trained.model.components.keys()
    for name, module in trained.model.components.items():
        assert module.state_dict().keys() == plain[name].state_dict().keys()


@each_family
@pytest.mark.parametrize("case", ["lora", "loha", "lokr"])
def test_kohya_and_comfyui_names_of_text_encoders(
    make: Callable[..., Trained], family_name: str, case: str, tmp_path: Path
) -> None:
    trained = make(family_name, case)
    stems = {"stable-diffusion": ["lora_te"], "sdxl": ["lora_te1", "lora_te2"]}[family_name]
    layers = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    expected = {f"{stem}_text_model_encoder_layers_{number}_{layer}" for stem in stems for number in (0, 1) for layer in layers}
    for form in ("kohya", "comfyui"):
        (file,) = trained.export(tmp_path / form, form)
        names = {name.partition(".")[0] for name in load_file(file)}
        assert {name for name in names if name.startswith("lora_te")} == expected
        assert all(name.startswith(("lora_unet_", "lora_te")) for name in names)


@each_family
def test_a_kohya_lora_loads_into_the_pipeline(perturbed: Callable[..., Trained], family_name: str, tmp_path: Path) -> None:
    trained = perturbed(family_name, "lora")
    (file,) = trained.export(tmp_path, "kohya")
    pipeline = trained.pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    torch.testing.assert_close(trained.predict_with(pipeline), trained.predict(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["lora", "oft"])
def test_text_encoders_that_the_pipeline_has_not_are_refused(make: Callable[..., Trained], case: str, tmp_path: Path) -> None:
    make("sdxl", case).export(tmp_path)
    trained = make("stable-diffusion", case)
    with pytest.raises(CheckpointError, match=r"another base model|does not fit this model"):
        trained.method.load_into(trained.family, trained.pipeline(), tmp_path)


def test_lycoris_names_are_refused(make: Callable[..., Trained], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trained text encoders too. Write kohya"):
        make("stable-diffusion", "loha").export(tmp_path, "lycoris")


@each_method
def test_a_family_that_cannot_train_its_text_encoder_says_so(case: str) -> None:
    method, settings = methods.parse(MethodConfig(name=case.split("-")[0], **SETTINGS[case], **BOTH))
    with pytest.raises(ConfigError, match=r"method.text_encoder: .*qwen-image cannot be trained.* Leave it out"):
        method.encoders(families.get("qwen-image"), settings)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("attn", r"method.text_encoder.targets: stable-diffusion's text_encoder has no group 'attn'. Did you mean `attention`"),
        (["q_prog"], r"method.text_encoder.targets: 'q_prog' is the name of no.*Did you mean .*q_proj"),
        ({"regex": "fc1"}, r"method.text_encoder.targets: the expression 'fc1' matches no layer"),
    ],
)
@pytest.mark.parametrize("case", ["lora"])
def test_targets_of_a_text_encoder_that_do_not_exist(
    make: Callable[..., Trained], case: str, targets: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BOTH, "text_encoder", {"targets": targets})
    with pytest.raises(ConfigError, match=message):
        make("stable-diffusion", case)


def test_the_rates_of_text_encoders() -> None:
    def rates(**values: Any) -> list[tuple[str, float]]:
        method, settings = methods.parse(MethodConfig(name="lora", **values))
        return list(methods.parameter_groups(method, settings))

    assert rates() == rates(text_encoder={}) == []
    assert [rate for _, rate in rates(text_encoder={"rate": 0.5})] == [0.5]
    assert [rate for _, rate in rates(text_encoder={"rate": 0.5}, lora_plus=16)] == [8.0, 0.5, 16.0]
