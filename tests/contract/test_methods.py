"""What every method promises, with every family's tiny model."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ftk.configs.schema import MethodConfig
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.base import Method
from ftk.models import base as families
from ftk.models.base import Family

CPU = torch.device("cpu")
# Settings to try of each method, by name; those of methods that are not listed are their defaults.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "plain": {"rank": 4},
        "alpha": {"rank": 4, "alpha": 10.0},
        "all-linear": {"rank": 2, "alpha": 1.0, "targets": "all-linear"},
        "list": {"rank": 2, "targets": ("to_q", "to_out.0")},
    },
}
CASES = [
    pytest.param(name, settings, id=f"{name}-{label}")
    for name in methods.available()
    for label, settings in SETTINGS.get(name, {"default": {}}).items()
]
FAMILIES = families.available()

each_case = pytest.mark.parametrize(("method_name", "settings"), CASES)
each_family = pytest.mark.parametrize("family_name", FAMILIES)
each_method = pytest.mark.parametrize("method_name", methods.available())

EXPORT = """
import sys
from pathlib import Path
import torch
from ftk.configs.schema import MethodConfig
from ftk.methods import base as methods
from ftk.models import base as families
family = families.get(sys.argv[1])
method, config = methods.parse(MethodConfig(name=sys.argv[2]))
components = {"denoiser": family.load_denoiser(Path(sys.argv[3]), torch.float32, torch.device("cpu"))}
method.attach(components, family, config, seed=3)
method.export(components, family, config, Path(sys.argv[4]), method.FORMATS[0], {"run": "test", "step": "5"})
"""


class Trained:
    """A method attached to a fresh denoiser of a tiny model."""

    def __init__(self, family: Family, model: Path, name: str, settings: dict[str, Any], seed: int = 3) -> None:
        self.family = family
        self.model = model
        self.method: Method
        self.method, self.config = methods.parse(MethodConfig(name=name, **settings))
        self.denoiser = family.load_denoiser(model, torch.float32, CPU).eval()
        self.components = {"denoiser": self.denoiser}
        self.base = self.predict()
        self.parameters = self.method.attach(self.components, family, self.config, seed)

    @torch.no_grad()
    def predict(self, denoiser: Any = None) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        noisy = torch.randn(2, self.family.geometry.channels, 4, 6, generator=draw)
        width = self.denoiser.config.joint_attention_dim
        texts = self.family.collate_texts([{"embeds": torch.randn(length, width, generator=draw)} for length in (5, 9)])
        chosen = self.denoiser if denoiser is None else denoiser
        return self.family.predict(chosen, noisy, torch.tensor([0.3, 0.8]), texts)

    @torch.no_grad()
    def perturb(self) -> "Trained":
        """As if something had been trained: seeded noise on every parameter."""
        draw = torch.Generator().manual_seed(2)
        for _, parameter in sorted(self.parameters.items()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
        assert (self.predict() - self.base).abs().max() > 1e-2
        return self

    def export(self, directory: Path) -> list[Path]:
        metadata = {"run": "test", "step": "5"}
        return self.method.export(self.components, self.family, self.config, directory, self.method.FORMATS[0], metadata)


@pytest.fixture
def attached(family_name: str, method_name: str, tiny_models: Callable[[str], Path]) -> Callable[..., Trained]:
    """Makes a freshly attached method; takes its settings."""
    family, model = families.get(family_name), tiny_models(family_name)
    return lambda settings, seed=3: Trained(family, model, method_name, settings, seed)


@each_family
@each_case
def test_training_starts_at_the_base_model(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings)
    torch.testing.assert_close(trained.predict(), trained.base, atol=1e-6, rtol=0)


@each_family
@each_case
def test_what_attach_returns_is_all_that_trains(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings)
    assert trained.parameters
    wanting = {id(parameter) for parameter in trained.denoiser.parameters() if parameter.requires_grad}
    assert wanting == {id(parameter) for parameter in trained.parameters.values()}
    assert all(parameter.requires_grad for parameter in trained.parameters.values())


@each_family
@each_case
def test_every_parameter_gets_a_gradient(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings).perturb()
    with torch.enable_grad():
        Trained.predict.__wrapped__(trained).square().mean().backward()  # type: ignore[attr-defined]
    # The last block's text stream ends there: what only feeds it has no say in the image.
    without = [name for name, parameter in trained.parameters.items() if parameter.grad is None]
    assert len(without) < len(trained.parameters) / 4, without


@each_family
@each_method
def test_equal_seeds_give_equal_starts_and_leave_the_random_state(attached: Callable[..., Trained]) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = attached({}, seed=1)
    assert torch.equal(torch.rand(3), expected)
    states = [trained.method.state(trained.components) for trained in (one, attached({}, seed=1), attached({}, seed=2))]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


@each_family
@each_case
def test_state_round_trips(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings).perturb()
    state = {key: value.detach().clone() for key, value in trained.method.state(trained.components).items()}
    assert sum(value.numel() for value in state.values()) == sum(p.numel() for p in trained.parameters.values())
    fresh = attached(settings, seed=99)
    fresh.method.load_state(fresh.components, state)
    assert torch.equal(fresh.predict(), trained.predict())
    again = fresh.method.state(fresh.components)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert all(parameter.requires_grad for parameter in fresh.parameters.values())


@each_family
@each_method
def test_state_of_another_model_is_refused(attached: Callable[..., Trained]) -> None:
    trained = attached({})
    state = dict(trained.method.state(trained.components))
    state["elsewhere." + next(iter(state))] = torch.zeros(1)
    with pytest.raises(AssertionError):
        trained.method.load_state(trained.components, state)


@each_family
@each_case
def test_a_fresh_pipeline_with_the_export_predicts_the_same(
    attached: Callable[..., Trained], settings: dict[str, Any], tmp_path: Path
) -> None:
    trained = attached(settings).perturb()
    files = trained.export(tmp_path)
    assert files
    assert all(file.is_file() for file in files)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    pipeline = trained.family.pipeline(trained.model, torch.float32, CPU)
    trained.method.load_into(pipeline, tmp_path)
    loaded = trained.predict(getattr(pipeline, trained.family.denoiser_components[0]))
    torch.testing.assert_close(loaded, trained.predict(), atol=1e-5, rtol=1e-5)
    assert (loaded - trained.base).abs().max() > 1e-2


@each_family
@each_case
def test_the_export_carries_its_metadata(attached: Callable[..., Trained], settings: dict[str, Any], tmp_path: Path) -> None:
    (file,) = attached(settings).export(tmp_path)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["run"] == "test"
    assert metadata["step"] == "5"


@each_family
@each_case
def test_equal_weights_are_exported_to_equal_bytes(
    attached: Callable[..., Trained], settings: dict[str, Any], tmp_path: Path
) -> None:
    one, two = attached(settings).perturb(), attached(settings).perturb()
    for first, second, third in zip(
        one.export(tmp_path / "1"), one.export(tmp_path / "2"), two.export(tmp_path / "3"), strict=True
    ):
        assert first.read_bytes() == second.read_bytes() == third.read_bytes()


@each_family
@each_method
def test_another_process_exports_equal_bytes(
    attached: Callable[..., Trained], family_name: str, method_name: str, tmp_path: Path
) -> None:
    trained = attached({})
    files = trained.export(tmp_path / "here")
    there = tmp_path / "there"
    subprocess.run(
        [sys.executable, "-c", EXPORT, family_name, method_name, str(trained.model), str(there)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    for file in files:
        assert (there / file.name).read_bytes() == file.read_bytes()


@each_family
@each_case
def test_merging_predicts_what_the_adapter_predicts(attached: Callable[..., Trained], settings: dict[str, Any]) -> None:
    trained = attached(settings).perturb()
    expected = trained.predict()
    plain = trained.family.load_denoiser(trained.model, torch.float32, CPU)
    trained.method.merge(trained.components)
    torch.testing.assert_close(trained.predict(), expected, atol=1e-4, rtol=1e-4)
    merged = trained.denoiser.state_dict()
    assert merged.keys() == plain.state_dict().keys(), "nothing of the method is left in the model"


@each_family
@pytest.mark.parametrize("method_name", [name for name in methods.available() if name == "lora"])
def test_every_target_group_of_the_family_can_be_trained(attached: Callable[..., Trained], family_name: str) -> None:
    sizes = {group: len(attached({"targets": group}).parameters) for group in families.get(family_name).target_groups}
    assert all(sizes.values())
    assert max(sizes, key=lambda group: sizes[group]) == "all-linear"


@each_family
@pytest.mark.parametrize("method_name", [name for name in methods.available() if name == "lora"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_z"], "'to_z' is the name of no linear layer"),
        (["norm1"], "'norm1' is the name of no linear layer"),
        (["o_q"], "'o_q' is the name of no linear layer"),
        ("atention", "no group 'atention'.*attention"),
    ],
)
def test_targets_that_do_not_exist_are_config_errors(attached: Callable[..., Trained], targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attached({"targets": targets})
