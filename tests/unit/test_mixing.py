"""Several adapters in one pipeline: the sum of what each does alone, at its strength."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ftk.configs.schema import AddedAdapterConfig, MethodConfig
from ftk.deliver import mixing
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.base import Export
from ftk.models import base as families
from ftk.models.base import DENOISER, Conditions, Model
from ftk.models.components.schedule import NoiseSchedule

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8, "targets": ("to_q", "to_k")},
    "loha": {"name": "loha", "rank": 4, "targets": ("to_q", "to_v")},
    "lokr": {"name": "lokr", "rank": 2, "alpha": 1, "targets": "attention"},
    "oft": {"name": "oft", "block_size": 4, "targets": ("to_q",)},
    "dora": {"name": "lora", "rank": 4, "dora": True, "targets": ("to_q",)},
    "hra": {"name": "peft", "type": "HRA", "r": 4, "targets": ("to_q",)},
    "full": {"name": "full", "targets": ("to_q",)},
}
NOISE = {"full": 0.02, "loha": 0.3}
Weights = dict[str, torch.Tensor]


class Adapter:
    """A delivered adapter of a tiny model, its method, and what it changes of the weights, by component."""

    def __init__(
        self, directory: Path, family: Any, folder: Path, settings: Mapping[str, Any], seed: int, form: str | None
    ) -> None:
        self.folder = folder
        self.family = family
        self.method, config = methods.parse(MethodConfig(**settings))
        model = families.load_model(family, directory, self.method.encoders(family, config), torch.float32, CPU)
        before = {name: weights(module) for name, module in model.components.items()}
        parameters = self.method.attach(model, config, seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(parameters.items()):
                parameter += NOISE.get(self.method.name, 0.2) * torch.randn(parameter.shape, generator=draw)
        for module in model.components.values():
            module.eval()
        self.method.export(model, config, Export(directory=folder, form=form or self.method.FORMATS[0], metadata={}))
        self.method.merge(model)
        self.changes = {
            name: {key: after - before[name][key] for key, after in weights(module).items()}
            for name, module in model.components.items()
        }


def weights(module: torch.nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def adapter(tiny_models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Adapter]:
    def make(kind: str, seed: int, family: str = "qwen-image", form: str | None = None, **others: Any) -> Adapter:
        place = tmp_path / f"{kind}-{seed}-{form}"
        settings = {**KINDS[kind], **others}
        return Adapter(tiny_models(family), families.get(family), place, settings, seed, form)

    return make


@pytest.fixture
def pipeline(tiny_models: Callable[[str], Path]) -> Callable[..., Any]:
    def make(family: str = "qwen-image") -> Any:
        absent = families.get(family).latent_components
        return families.get(family).pipeline(tiny_models(family), torch.float32, CPU, **dict.fromkeys(absent))

    return make


def drawn(name: str, pipeline: Any) -> torch.Tensor:
    """A prediction from a prompt that the pipeline's own text encoder encodes."""
    family = families.get(name)
    torch.manual_seed(0)
    noisy = torch.randn(1, family.geometry.channels, 8, 8)
    made = pipeline.encode_prompt("a red cat", device=CPU, num_images_per_prompt=1, **EXTRA[name])
    texts = {"embeds": made[0][0]} if name != "sdxl" else {"embeds": made[0][0], "pooled": made[2][0]}
    with torch.no_grad():
        denoiser = getattr(pipeline, family.denoiser_attribute)
        model = Model(family=family, schedule=NoiseSchedule(objective="flow", sigmas=torch.ones(1)), denoiser=denoiser)
        return family.predict(model, noisy, torch.tensor([0.5]), Conditions(texts=family.collate_texts([texts])))


EXTRA: dict[str, dict[str, Any]] = {"qwen-image": {}, "stable-diffusion": {"do_classifier_free_guidance": False}}


def summed(name: str, pipeline: Any, parts: list[tuple[Adapter, float]]) -> torch.Tensor:
    """What a fresh pipeline predicts with all changes added to its weights."""
    with torch.no_grad():
        for one, strength in parts:
            for component, changes in one.changes.items():
                own = families.get(name).denoiser_attribute if component == DENOISER else component
                state = getattr(pipeline, own).state_dict()
                for key, change in changes.items():
                    state[key] += strength * change
    return drawn(name, pipeline)


def mixed(pipeline: Any, own: Adapter, strength: float, added: list[tuple[Adapter, float]]) -> Any:
    found = [
        mixing.find(AddedAdapterConfig(path=str(one.folder), strength=each), f"sample.adapters.{number}.path")
        for number, (one, each) in enumerate(added)
    ]
    files = mixing.read(own.family, pipeline, found)
    own.method.load_into(own.family, pipeline, own.folder)
    strengths = {} if own.method.name == "full" else {mixing.OWN: strength}
    mixing.set_strengths(pipeline, strengths)
    mixing.add(own.family, pipeline, strengths, [(file, each.strength) for file, each in zip(files, found, strict=True)])
    return pipeline


@pytest.mark.parametrize("own", KINDS)
def test_all_together_are_the_sum_of_each_at_its_strength(
    adapter: Callable[..., Adapter], pipeline: Callable[..., Any], own: str
) -> None:
    first = adapter(own, 1)
    strength = 0.5 if own in ("lora", "loha", "lokr") else 1.0
    added = [
        (adapter("lora", 2), 2.0),
        (adapter("loha", 3), -0.5),
        (adapter("lokr", 4), 0.25),
        (adapter("lora", 5, form="peft"), 1.5),
    ]
    name = "qwen-image"
    expected = summed(name, pipeline(), [(first, strength), *added])
    found = drawn(name, mixed(pipeline(), first, strength, added))
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
    # Each has a say in it.
    for left_out in range(len(added)):
        rest = [one for number, one in enumerate(added) if number != left_out]
        assert (summed(name, pipeline(), [(first, strength), *rest]) - expected).abs().max() > 1e-4


def test_text_encoders_are_mixed_too(adapter: Callable[..., Adapter], pipeline: Callable[..., Any]) -> None:
    name = "stable-diffusion"
    encoders = {"family": name, "text_encoder": {}}
    first, second, third = (adapter(kind, seed, **encoders) for kind, seed in (("lora", 1), ("lora", 2), ("lokr", 3)))
    parts = [(first, 0.5), (second, 2.0), (third, 0.75)]
    expected = summed(name, pipeline(name), parts)
    found = drawn(name, mixed(pipeline(name), first, 0.5, parts[1:]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("own", ["oft", "hra", "dora"])
def test_others_lie_on_top_of_a_rotated_convolution(
    adapter: Callable[..., Adapter], pipeline: Callable[..., Any], own: str
) -> None:
    name, targets = "stable-diffusion", {"targets": ("to_q", "proj_in") if own != "hra" else ("to_q",), "text_encoder": {}}
    first = adapter(own, 1, family=name, **targets)
    added = [
        (adapter(kind, seed, family=name, targets=("to_q", "proj_in")), 0.5) for seed, kind in enumerate(("lora", "loha"), 2)
    ]
    expected = summed(name, pipeline(name), [(first, 1.0), *added])
    found = drawn(name, mixed(pipeline(name), first, 1.0, added))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_adapter_of_another_base_is_refused_before_anything_is_drawn(
    adapter: Callable[..., Adapter], pipeline: Callable[..., Any]
) -> None:
    other = adapter("lora", 1, family="stable-diffusion", targets=("to_q",))
    found = mixing.find(AddedAdapterConfig(path=str(other.folder)), "sample.adapters.0.path")
    with pytest.raises(CheckpointError, match="trained on another base model"):
        mixing.read(families.get("qwen-image"), pipeline(), [found])


@pytest.mark.parametrize("kind", ["oft", "dora", "hra"])
def test_what_does_not_add_up_is_refused_by_its_type(adapter: Callable[..., Adapter], kind: str) -> None:
    folder = adapter(kind, 1).folder
    with pytest.raises(ConfigError, match=rf"sample.adapters.1.path .* is of type {kind.upper()}, which does not add up"):
        mixing.find(AddedAdapterConfig(path=str(folder)), "sample.adapters.1.path")
    with pytest.raises(ConfigError, match=f"0.5 has no meaning .* of type {kind.upper()}"):
        mixing.check_own_strength(0.5, folder, kind)
    mixing.check_own_strength(1.0, folder, kind)


def test_where_no_adapter_lies_is_said(adapter: Callable[..., Adapter], tmp_path: Path) -> None:
    full = adapter("full", 1).folder
    run = tmp_path / "run"
    adapter("lora", 1).folder.rename(tmp_path / "moved")
    run.mkdir()
    (tmp_path / "moved").rename(run / "adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text("{")
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (full, "holds no adapter"),
        (run, f"Did you mean `{run / 'adapter'}`"),
        (tmp_path / "broken", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            mixing.find(AddedAdapterConfig(path=str(path)), "sample.adapters.0.path")
    with pytest.raises(ConfigError, match="full, whose weights are the model's own"):
        mixing.check_own_strength(2.0, full, "full")
