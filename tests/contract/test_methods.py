"""What every method promises, with every family's tiny model."""

import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import control_images
import denoisers
import new_words
import pytest
import torch
from safetensors import safe_open

from ftk.configs.schema import MethodConfig, TrainConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.base import Export, HasBasePrediction, HasControls, Method
from ftk.models import base as families
from ftk.models.base import Conditions, Family, Model
from ftk.train.optim import MasterOptimizer

CPU = torch.device("cpu")
# Every format that some method writes: each method writes it too, or says why not.
FORMATS = ("diffusers", "peft", "comfyui", "kohya", "lycoris", "a1111")
# What every case of a method has: what tiny models can carry, where a default is made for real ones.
NEEDED: dict[str, dict[str, Any]] = {
    "oft": {"block_size": 4},
    "peft": {"type": "HRA", "r": 4},
    "loha": {"rank": 4},
    "textual-inversion": {"tokens": {"<cat>": {"vectors": 3, "start": "!"}}},
}
# Settings to try of each method, by name; those of methods that are not listed are what they need.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "plain": {"rank": 4},
        "alpha": {"rank": 4, "alpha": 10.0},
        "all-linear": {"rank": 2, "alpha": 1.0, "targets": "all-linear"},
        "all": {"rank": 2, "dropout": 0.5, "targets": "all"},
        "list": {"rank": 2, "targets": ("to_q", "to_out.0")},
        "regex": {"rank": 2, "targets": {"regex": ".*attn.*to_[qv]"}},
        "patterns": {"rank": 4, "alpha": 2.0, "rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3.0}},
        "dora": {"rank": 4, "alpha": 2.0, "dora": True, "initialisation": "default"},
        "pissa": {"rank": 3, "alpha": 6.0, "initialisation": "pissa"},
        "olora": {"rank": 3, "initialisation": "olora", "rank_pattern": {"to_v": 2}},
        "whole-modules": {"rank": 4, "modules_to_save": ("norm_out", "proj_out")},
    },
    "oft": {
        "blocks": {"block_size": 4},
        "r": {"block_size": None, "r": 2},
        "coft": {"coft": True, "eps": 0.1},
        "shared": {"block_share": True},
        "exact-all-linear": {"use_cayley_neumann": False, "targets": "all-linear"},
        "bias-and-dropout": {"bias": "oft_only", "module_dropout": 0.3},
    },
    "boft": {"blocks": {}, "number-and-bias": {"block_num": 2, "bias": "boft_only"}},
    "loha": {"alpha": {"alpha": 2.0}, "all": {"targets": "all"}, "kernels": {"targets": "all", "effective_convolution": True}},
    "lokr": {
        "alpha": {"rank": 2, "alpha": 1.0},
        "whole": {"rank": 100},
        "kernels": {"rank": 2, "targets": "all", "effective_convolution": True, "decompose_both": True, "decompose_factor": 4},
        "lycoris": {"rank": 4, "initialisation": "lycoris", "rank_pattern": {"to_q": 2}},
        "whole-modules": {"rank": 4, "modules_to_save": {"regex": ".*img_mod"}},
    },
    "peft": {"hra": {}, "miss": {"type": "MISS"}},
    "custom-diffusion": {"whole": {}, "rank": {"rank": 2}},
    "full": {"all": {}, "attention": {"targets": "attention"}, "list": {"targets": ("to_q.weight",)}},
    "textual-inversion": {"words": {}, "pivotal": {"norm": "keep", "lora": {"rank": 4}}},
    "control-lora": {"plain": {"rank": 4}, "all": {"rank": 2, "alpha": 3.0, "targets": "all"}},
}
FAMILIES = denoisers.families_of_each()
# Noise on the trained parameters that moves a tiny model visibly and leaves it finite.
NOISE = {"full": 0.02, "loha": 0.3}
# Those that draw nothing, some with one family alone: equal starts whatever the seed.
WITHOUT_CHANCE = {"oft", "boft", "full", "custom-diffusion", "textual-inversion", "controlnet-qwen-image", "controlnet-flux"}

# diffusers' T2I-Adapters are random at first, as published.
STARTING_ELSEWHERE = {("stable-diffusion", "t2i-adapter"), ("sdxl", "t2i-adapter")}
PAIRS = [
    (family, name)
    for family in FAMILIES
    for name in methods.available()
    if control_images.knows(family, name, NEEDED.get(name, {}))
]
# Every case with the first family; with the others one of each method, and those that carry their convolutions.
WITH_CONVOLUTIONS = {"all", "kernels"}
CASES = [
    denoisers.marked(family, name, settings, id=f"{name}-{label}-{family}")
    for family, name in PAIRS
    for number, (label, settings) in enumerate(SETTINGS.get(name, {"default": {}}).items())
    if family == FAMILIES[0] or number == 0 or label in WITH_CONVOLUTIONS
]
each_case = pytest.mark.parametrize(("family_name", "method_name", "settings"), CASES)
each_case_of_one_family = pytest.mark.parametrize(
    ("family_name", "method_name", "settings"), [case for case in CASES if case.values[0] == FAMILIES[0]]
)
each_family = pytest.mark.parametrize("family_name", FAMILIES)
each_pair = pytest.mark.parametrize(("family_name", "method_name"), [denoisers.marked(*pair) for pair in PAIRS])

EXPORT = """
import json, sys
from pathlib import Path
import torch
from ftk.configs.schema import MethodConfig
from ftk.methods import base as methods
from ftk.models import base as families
family = families.get(sys.argv[1])
for name, values in json.loads(sys.argv[4]).items():
    method, settings = methods.parse(MethodConfig(name=name, **values))
    encoders = method.encoders(family, settings)
    model = families.load_model(family, Path(sys.argv[2]), encoders, torch.float32, torch.device("cpu"))
    method.attach(model, settings, seed=3)
    metadata = {"run": "test", "step": "5"}
    method.export(model, settings, methods.Export(directory=Path(sys.argv[3], name), form=method.FORMATS[0], metadata=metadata))
"""


@functools.cache
def _base(family_name: str, directory: Path, encoders: tuple[str, ...] = ()) -> Model:
    """A tiny model in memory, to be copied: that takes half as long as loading it."""
    model = families.load_model(families.get(family_name), directory, encoders, torch.float32, CPU)
    for module in model.components.values():
        module.eval()
    return model


class Trained:
    """A method attached to a fresh copy of a tiny model."""

    def __init__(self, family: Family, directory: Path, name: str, values: dict[str, Any], texts: Any, seed: int = 3) -> None:
        self.family = family
        self.directory = directory
        self.texts = texts
        self.method: Method
        self.method, self.settings = methods.parse(MethodConfig(name=name, **{**NEEDED.get(name, {}), **values}))
        self.needs = self.method.cache_needs(family, self.settings)
        untrained = _base(family.name, directory, self.method.encoders(family, self.settings))
        copies = {"denoiser": copy.deepcopy(untrained.denoiser), "encoders": copy.deepcopy(untrained.encoders)}
        self.model = dataclasses.replace(untrained, **copies, extras={})
        self.base = self.predict(untrained.denoiser)
        self.parameters = self.method.attach(self.model, self.settings, seed)
        for module in self.model.components.values():
            module.eval()

    def predict(self, denoiser: Any = None, grad: bool = False, texts: Any = None) -> torch.Tensor:
        """What the method predicts, or the family with another denoiser and other encoded texts."""
        noisy_BCHW = torch.randn(2, self.family.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(1))
        sigma_B = self.model.schedule.sigmas[[700, 200]]
        controls = control_images.tensors(self.method, self.family, self.settings, count=2)
        conditions = Conditions(texts=texts or self.family.collate_texts(self.texts), controls=controls)
        with torch.set_grad_enabled(grad):
            if denoiser is None:
                return self.method.predict(self.model, noisy_BCHW, sigma_B, conditions)
            other = dataclasses.replace(self.model, denoiser=denoiser, encoders={})
            return self.family.predict(other, noisy_BCHW, sigma_B, conditions)

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the trained values."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def perturb(self) -> "Trained":
        """As if something had been trained: seeded noise on every parameter."""
        draw = torch.Generator().manual_seed(2)
        for _, parameter in sorted(self.parameters.items()):
            parameter += NOISE.get(self.method.name, 0.2) * torch.randn(parameter.shape, generator=draw)
        assert (self.predict() - self.base).abs().max() > 1e-3
        return self

    def train(self, steps: int) -> "Trained":
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-2)
        for _ in range(steps):
            self.predict(grad=True).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return self

    def export(self, directory: Path, form: str | None = None) -> list[Path]:
        metadata = {"run": "test", "step": "5"}
        form = form or methods.formats(self.method, self.settings)[0]
        export = Export(directory=directory, form=form, metadata=metadata)
        return self.method.export(self.model, self.settings, export)

    def pipeline(self, **components: Any) -> Any:
        """A fresh one of the same model, with its denoiser alone; with its text encoders where those learn new words.

        diffusers' pipelines with control images ask the VAE for its settings.
        """
        texts = () if self.needs.placeholder_tokens else self.family.text_components
        absent = dict.fromkeys((*texts, *(() if isinstance(self.method, HasControls) else self.family.latent_components)))
        return self.family.pipeline(self.directory, torch.float32, CPU, **{**absent, **components})

    def check_loaded(self, load: Callable[[Any], Any]) -> None:
        """What `load` makes of a fresh pipeline predicts what was trained; with control images it draws what training draws."""
        pipeline = load(self.pipeline())
        if not isinstance(self.method, HasControls):
            texts = None
            if self.needs.placeholder_tokens:
                with torch.no_grad():
                    texts = new_words.encoded_by(self.family, pipeline, new_words.captions(self.needs))
            predicted = self.predict(getattr(pipeline, self.family.denoiser_attribute), texts=texts)
            torch.testing.assert_close(predicted, self.predict(), atol=1e-5, rtol=1e-5)
            return
        while_training = self.pipeline(**{self.family.denoiser_attribute: self.model.denoiser})
        expected = self.drawn(self.method.sampling_pipeline(self.model, while_training))
        torch.testing.assert_close(self.drawn(pipeline), expected, atol=1e-4, rtol=1e-4)

    def drawn(self, pipeline: Any) -> torch.Tensor:
        """Latents after two steps of a pipeline of a method that reads control images."""
        assert isinstance(self.method, HasControls)
        arguments = self.method.pipeline_controls(control_images.tensors(self.method, self.family, self.settings, count=1))
        latents: torch.Tensor = pipeline(
            **self.family.pipeline_texts(self.texts[0]), **arguments, **self.family.generation(1.0),
            width=control_images.SIDE, height=control_images.SIDE, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(4),
        ).images  # fmt: skip
        return latents


def weights_of(pipeline: Any) -> dict[tuple[str, str], torch.Tensor]:
    """All tensors of a pipeline's components."""
    modules = {name: each for name, each in pipeline.components.items() if isinstance(each, torch.nn.Module)}
    return {(name, key): tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def texts_of(tiny_models: Callable[[str], Path]) -> Callable[[str, str], list[dict[str, torch.Tensor]]]:
    """Two encoded captions of a family for a method, by both names."""
    encoded: dict[str, list[dict[str, torch.Tensor]]] = {}

    def texts(family_name: str, method_name: str) -> list[dict[str, torch.Tensor]]:
        family = families.get(family_name)
        method, settings = methods.parse(MethodConfig(name=method_name, **NEEDED.get(method_name, {})))
        needs = method.cache_needs(family, settings)
        name = f"{family_name} {needs.placeholder_tokens}"
        if name not in encoded:
            encoded[name] = new_words.encoded(family, tiny_models(family_name), needs)
        return encoded[name]

    return texts


@pytest.fixture
def attached(
    family_name: str, method_name: str, tiny_models: Callable[[str], Path], texts_of: Callable[[str], Any]
) -> Callable[..., Trained]:
    """Makes a freshly attached method; takes its settings."""
    family, directory = families.get(family_name), tiny_models(family_name)
    texts = texts_of(family_name, method_name)
    return lambda settings, seed=3: Trained(family, directory, method_name, settings, texts, seed)


@pytest.fixture(scope="module")
def perturbed_of(tiny_models: Callable[[str], Path], texts_of: Callable[[str], Any]) -> Callable[[str, str], Trained]:
    """A family's model after training with a method, by both names. Many tests read one, and none changes it."""

    @functools.cache
    def make(family_name: str, method_name: str) -> Trained:
        family, directory = families.get(family_name), tiny_models(family_name)
        return Trained(family, directory, method_name, {}, texts_of(family_name, method_name)).perturb()

    return make


@pytest.fixture
def perturbed(family_name: str, method_name: str, perturbed_of: Callable[[str, str], Trained]) -> Trained:
    """That of the test's own family and method."""
    return perturbed_of(family_name, method_name)


@each_case
def test_training_starts_at_the_base_model_and_attach_returns_all_that_trains(
    attached: Callable[..., Trained], settings: dict[str, Any]
) -> None:
    trained = attached(settings)
    if (trained.family.name, trained.method.name) not in STARTING_ELSEWHERE:
        torch.testing.assert_close(trained.predict(), trained.base, atol=3e-6, rtol=0)

    assert trained.parameters
    modules = trained.model.components.values()
    trainable = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in trained.parameters.values()}
    assert all(parameter.requires_grad for parameter in trained.parameters.values())


@each_case_of_one_family
def test_on_the_meta_device_it_has_the_same_shapes(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings)
    encoders = trained.method.encoders(trained.family, trained.settings)
    outline = families.load_model(trained.family, trained.directory, encoders, torch.float32, torch.device("meta"))
    shapes = trained.method.attach(outline, trained.settings, 0)
    assert {name: each.shape for name, each in shapes.items()} == {
        name: each.shape for name, each in trained.parameters.items()
    }


@each_case_of_one_family
def test_every_parameter_gets_a_gradient(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings).perturb()
    trained.predict(grad=True).square().mean().backward()
    # The last block's text stream ends there: what only feeds it has no say in the image.
    without = [name for name, parameter in trained.parameters.items() if parameter.grad is None]
    assert len(without) < len(trained.parameters) / 4, without


@each_pair
def test_equal_seeds_give_equal_starts_and_leave_the_random_state(
    attached: Callable[..., Trained], family_name: str, method_name: str
) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = attached({}, seed=1).values()
    assert torch.equal(torch.rand(3), expected)
    same_seed, other_seed = attached({}, seed=1).values(), attached({}, seed=2).values()
    assert all(torch.equal(first[name], same_seed[name]) for name in first)
    is_drawn = any(not torch.equal(first[name], other_seed[name]) for name in first)
    assert is_drawn == (not {method_name, f"{method_name}-{family_name}"} & WITHOUT_CHANCE)


@each_case
def test_a_fresh_model_with_the_values_of_two_steps_predicts_the_same(
    attached: Callable[..., Trained], settings: dict[str, Any]
) -> None:
    trained = attached(settings).train(2)
    assert (trained.predict() - trained.base).abs().max() > 1e-5
    values = trained.values()
    fresh = attached(settings)
    assert fresh.parameters.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in fresh.parameters.items():
            parameter.copy_(values[name])
    assert torch.equal(fresh.predict(), trained.predict())
    # COFT projects again, by a rounding.
    atol = 1e-7 if settings.get("coft") else 0.0
    for name, parameter in fresh.parameters.items():
        torch.testing.assert_close(parameter.detach(), values[name], atol=atol, rtol=0)
    assert all(parameter.requires_grad for parameter in fresh.parameters.values())


@each_pair
def test_trained_values_of_another_model_are_refused(attached: Callable[..., Trained]) -> None:
    optimizer = MasterOptimizer(attached({}).parameters, TrainConfig())
    tensors, facts = optimizer.state()
    weights = optimizer.weights()
    optimizer.restore(weights, tensors, facts)
    weights["elsewhere." + next(iter(weights))] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"not those of this run: 1 differ, the first is elsewhere\."):
        optimizer.restore(weights, tensors, facts)


@each_case
def test_a_fresh_pipeline_with_the_export_predicts_the_same(
    attached: Callable[..., Trained], settings: dict[str, Any], tmp_path: Path
) -> None:
    trained = attached(settings).perturb()
    files = trained.export(tmp_path)
    assert files
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)
    trained.check_loaded(lambda pipeline: trained.method.load_into(trained.family, pipeline, tmp_path))


@each_pair
def test_every_format_is_written_or_refused_with_a_way_that_works(perturbed: Trained, tmp_path: Path) -> None:
    trained = perturbed
    for form in FORMATS:
        directory = tmp_path / form
        refused = None
        try:
            files = trained.export(directory, form)
        except ConfigError as error:
            refused = str(error)
        if refused is None:
            assert form in trained.method.FORMATS
            assert all(file.is_file() for file in files)
        else:
            assert form != trained.method.FORMATS[0]
            assert any(word in refused for word in ("Write ", "Use ", "Merge ")), refused
            assert not directory.exists(), "nothing is written where the whole cannot be"


@pytest.mark.parametrize(("family_name", "method_name"), [pair for pair in PAIRS if pair[0] == FAMILIES[0]])
def test_a_format_that_does_not_exist_is_refused(perturbed: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no delivery format 'gguf'"):
        perturbed.export(tmp_path, "gguf")


@each_pair
def test_equal_weights_are_exported_to_equal_bytes_with_their_metadata(
    attached: Callable[..., Trained], perturbed: Trained, tmp_path: Path
) -> None:
    equal = attached({}).perturb()
    files = [trained.export(tmp_path / str(number)) for number, trained in enumerate((perturbed, perturbed, equal))]
    for first, second, third in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    weights = next(path for path in files[0] if path.suffix == ".safetensors")
    with safe_open(weights, "pt") as opened:
        assert opened.metadata().items() >= {"run": "test", "step": "5"}.items()


def test_another_process_exports_equal_bytes(
    tiny_models: Callable[[str], Path], texts_of: Callable[[str], Any], tmp_path: Path
) -> None:
    family, directory = families.get("qwen-image"), tiny_models("qwen-image")
    settings = {name: NEEDED.get(name, {}) for family_name, name in PAIRS if family_name == family.name}
    subprocess.run(
        [sys.executable, "-c", EXPORT, family.name, str(directory), str(tmp_path / "there"), json.dumps(settings)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    for name in settings:
        here = Trained(family, directory, name, {}, texts_of(family.name, name)).export(tmp_path / "here" / name)
        for file in here:
            assert (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes() == file.read_bytes()


@each_pair
def test_a_damaged_or_missing_export_is_named(perturbed: Trained, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        perturbed.method.load_into(perturbed.family, perturbed.pipeline(), tmp_path)
    file = next(path for path in perturbed.export(tmp_path) if path.suffix == ".safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        perturbed.method.load_into(perturbed.family, perturbed.pipeline(), tmp_path)


@each_pair
def test_an_export_of_another_model_is_refused(
    family_name: str, method_name: str, perturbed_of: Callable[[str, str], Trained], tmp_path: Path
) -> None:
    known = [family for family, name in PAIRS if name == method_name]
    other = known[(known.index(family_name) + 1) % len(known)]
    if other == family_name:
        pytest.skip("there is no other family that this method knows")
    perturbed_of(other, method_name).export(tmp_path)
    trained = perturbed_of(family_name, method_name)
    with pytest.raises(CheckpointError, match=r"another (base )?model|does not fit this model|does not exist"):
        trained.method.load_into(trained.family, trained.pipeline(), tmp_path)


@each_case
def test_merging_predicts_what_the_adapter_predicts(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings).perturb()
    expected = trained.predict()
    plain = _base(trained.family.name, trained.directory).denoiser
    # Whatever is dropped while training belongs to no merged weight.
    trained.model.denoiser.train()
    is_taught = trained.needs.placeholder_tokens and isinstance(trained.family, families.HasTokenStates)
    if (isinstance(trained.method, HasControls) or is_taught) and (
        trained.family.name,
        trained.method.name,
    ) not in control_images.MERGED:
        with pytest.raises(ConfigError, match=r"(nothing (of it )?can|cannot) be merged.*Use `ftk export`"):
            trained.method.merge(trained.model)
        return
    trained.method.merge(trained.model)
    assert trained.model.denoiser.training
    torch.testing.assert_close(trained.predict(), expected, atol=1e-5, rtol=1e-5)
    merged = trained.model.denoiser.state_dict()
    assert merged.keys() == plain.state_dict().keys(), "nothing of the method is left in the model"


@each_case
def test_the_base_models_own_prediction_is_exact_or_refused_in_words(
    attached: Callable[..., Trained], settings: dict[str, Any]
) -> None:
    trained = attached(settings).perturb()
    method, model, family = trained.method, trained.model, trained.family
    reason = methods.base_refusal(method, trained.settings)
    if reason is not None:
        assert reason.endswith(".")
        return
    assert isinstance(method, HasBasePrediction)
    before, flags = trained.predict(), {name: each.requires_grad for name, each in model.denoiser.named_parameters()}
    noisy_BCHW = torch.randn(2, family.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    controls = control_images.tensors(method, family, trained.settings, count=2)
    conditions = Conditions(texts=family.collate_texts(trained.texts), controls=controls)
    predicted = method.base_prediction(model, noisy_BCHW, model.schedule.sigmas[[700, 200]], conditions)
    assert torch.equal(predicted, trained.base)
    assert not predicted.requires_grad
    # Training goes on as if nothing had been asked.
    assert {name: each.requires_grad for name, each in model.denoiser.named_parameters()} == flags
    assert torch.equal(trained.predict(), before)


@each_case_of_one_family
def test_a_strength_scales_what_was_trained_or_is_refused_in_words(
    attached: Callable[..., Trained], settings: dict[str, Any]
) -> None:
    trained = attached(settings).perturb()
    method, model = trained.method, trained.model
    reason = methods.strength_refusal(method, trained.settings)
    if reason is not None:
        assert reason.endswith(".")
        return
    before = trained.predict()
    with methods.at_strength(method, model, 0.0):
        torch.testing.assert_close(trained.predict(), trained.base, atol=1e-6, rtol=0)
    with methods.at_strength(method, model, 0.5):
        assert (trained.predict() - before).abs().max() > 1e-3
    assert torch.equal(trained.predict(), before)


@each_pair
def test_it_says_how_it_is_loaded(perturbed: Trained, tmp_path: Path) -> None:
    trained = perturbed
    trained.export(tmp_path)
    lines = trained.method.usage(trained.family, trained.settings).replace("path/to/this/folder", str(tmp_path))

    def load(pipeline: Any) -> Any:
        names = {"pipeline": pipeline}
        exec(lines, names)
        return names["pipeline"]

    ours, theirs = trained.method.load_into(trained.family, trained.pipeline(), tmp_path), load(trained.pipeline())
    if type(ours) is type(theirs) or not isinstance(trained.method, HasControls):
        trained.check_loaded(load)
        return
    # A pipeline of diffusers calls control images otherwise than ftk's own around it: their networks are what counts.
    expected, weights = weights_of(ours), weights_of(theirs)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {name for name, _ in weights_of(trained.pipeline())} != {name for name, _ in expected}


@each_family
@pytest.mark.parametrize("method_name", ["lora", "full"])
def test_every_target_group_of_the_family_can_be_trained(attached: Callable[..., Trained], family_name: str) -> None:
    sizes = {group: len(attached({"targets": group}).parameters) for group in families.get(family_name).target_groups}
    assert all(sizes.values())
    assert max(sizes, key=lambda group: sizes[group]) == "all-linear"
    assert len(attached({"targets": "all"}).parameters) >= sizes["all-linear"]


@pytest.mark.parametrize("family_name", FAMILIES[:1])
@pytest.mark.parametrize("method_name", ["lora", "peft"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_z"], "'to_z' is the name of no linear layer"),
        (["o_q"], "'o_q' is the name of no linear layer.*Did you mean .*to_q"),
        (["to_out"], "'to_out' is the name of no linear layer.*Did you mean .*to_out.0"),
        ("atention", "no group 'atention'. Did you mean `attention`.*attention"),
        ({"regex": "to_q"}, "'to_q' matches no layer.*whole names"),
        ({"regex": "to_["}, "is not a regular expression"),
        ([], "a group of the family, `all`, a list"),
        ({"regexp": "to_q"}, "a group of the family, `all`, a list"),
    ],
)
def test_targets_that_do_not_exist_are_config_errors(attached: Callable[..., Trained], targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attached({"targets": targets})


@pytest.mark.parametrize("family_name", [name for name in FAMILIES if families.get(name).denoiser_attribute == "unet"])
@pytest.mark.parametrize("method_name", ["oft", "boft"])
def test_a_larger_convolution_is_refused_by_what_rotates_channels(attached: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError, match="conv1 cannot be trained by this method: it is a 3x3 convolution"):
        attached({"targets": ["to_q", "conv1"]})
    # Everything that it can carry is another matter.
    assert not any("conv1" in name for name in attached({"targets": "all", "block_size": 2}).parameters)
