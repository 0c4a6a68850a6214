"""Every method on every family: a checkpoint goes on to the bit, and what was attached can be taken away again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import control_images
import denoisers
import new_words
import pytest
import torch

from ftk.configs.schema import MethodConfig, TrainConfig
from ftk.methods import base as methods
from ftk.methods.adapters import injection
from ftk.models import base as families
from ftk.models.base import Conditions
from ftk.train import checkpoint
from ftk.train.optim import MasterOptimizer

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "oft": {"block_size": 4},
    "loha": {"rank": 4},
    "lokr": {"rank": 2},
    "peft": {"type": "HRA", "r": 4},
    "textual-inversion": {"tokens": {"<cat>": {"vectors": 3, "start": "!"}}, "norm": "keep"},
}
TRAIN = TrainConfig(learning_rate=1e-2, ema_decay=0.9, precision="bf16")
PAIRS = [
    (family, name)
    for family in denoisers.families_of_each()
    for name in methods.available()
    if control_images.knows(family, name, SETTINGS.get(name, {}))
]
each_pair = pytest.mark.parametrize(("family_name", "method_name"), [denoisers.marked(*pair) for pair in PAIRS])


class Run:
    """A method on a bf16 denoiser with the loop's own optimizer."""

    def __init__(self, family_name: str, model: Path, texts: Any, method_name: str, seed: int) -> None:
        self.family = families.get(family_name)
        self.texts = texts
        self.method, self.settings = methods.parse(MethodConfig(name=method_name, **SETTINGS.get(method_name, {})))
        encoders = self.method.encoders(self.family, self.settings)
        self.model = families.load_model(self.family, model, encoders, torch.bfloat16, CPU)
        self.base = self.predict(0, is_base=True).detach()
        self.parameters = self.method.attach(self.model, self.settings, seed)
        self.optimizer = MasterOptimizer(self.parameters, TRAIN)

    def predict(self, number: int, *, is_base: bool = False) -> torch.Tensor:
        """What the method predicts, or the family alone."""
        draw = torch.Generator().manual_seed(number)
        noisy = torch.randn(1, self.family.geometry.channels, 8, 8, generator=draw).bfloat16()
        controls = control_images.tensors(self.method, self.family, self.settings, count=1)
        conditions = Conditions(texts=self.family.collate_texts(self.texts), controls=controls).map(
            lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor
        )
        sigma_B = self.model.schedule.sigmas[[500]]
        if is_base:
            return self.family.predict(dataclasses.replace(self.model, encoders={}), noisy, sigma_B, conditions)
        return self.method.predict(self.model, noisy, sigma_B, conditions)

    def train(self, first: int, last: int) -> "Run":
        for number in range(first, last):
            loss = self.predict(number).square().mean()
            loss.backward()
            self.optimizer.accumulate()
            self.optimizer.gradients()
            self.optimizer.step(1.0, 1.0, loss.detach())
        return self


@pytest.fixture(scope="module")
def start(tiny_models: Callable[[str], Path]) -> Callable[..., Run]:
    encoded: dict[str, Any] = {}

    def begin(family_name: str, method_name: str, seed: int = 1) -> Run:
        model, family = tiny_models(family_name), families.get(family_name)
        method, settings = methods.parse(MethodConfig(name=method_name, **SETTINGS.get(method_name, {})))
        needs = method.cache_needs(family, settings)
        name = f"{family_name} {needs.placeholder_tokens}"
        if name not in encoded:
            encoded[name] = new_words.encoded(family, model, needs)[:1]
        return Run(family_name, model, encoded[name], method_name, seed)

    return begin


@each_pair
def test_two_steps_a_checkpoint_and_two_more_are_four_steps(
    start: Callable[..., Run], family_name: str, method_name: str, tmp_path: Path
) -> None:
    whole = start(family_name, method_name).train(0, 2)
    checkpoint.save_checkpoint(tmp_path, 2, 2, whole.optimizer, {})
    whole.train(2, 4)

    resumed = start(family_name, method_name, seed=2)
    saved = checkpoint.read(tmp_path / "00000002")
    weights, state = saved.tensors()
    resumed.optimizer.restore(weights, state, saved.optimizer_facts)
    two = {name: tensor.clone() for name, tensor in resumed.optimizer.weights().items()}
    resumed.train(2, 4)
    for kind in ("weights", "delivered"):
        one, other = getattr(whole.optimizer, kind)(), getattr(resumed.optimizer, kind)()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), kind
    assert any(not torch.equal(two[name], tensor) for name, tensor in resumed.optimizer.weights().items())
    assert torch.equal(whole.predict(0), resumed.predict(0))


# Not of those that train the model's own weights, or none of them.
@pytest.mark.parametrize(
    ("family_name", "method_name"), [pair for pair in PAIRS if pair[1] not in ("full", "custom-diffusion", "textual-inversion")]
)
def test_without_the_adapter_the_base_is_what_it_was(start: Callable[..., Run], family_name: str, method_name: str) -> None:
    run = start(family_name, method_name).train(0, 2)
    assert not torch.equal(run.predict(0), run.base)
    injection.unload(run.model.denoiser)
    assert torch.equal(run.predict(0, is_base=True), run.base)
    assert not injection.adapted(run.model.denoiser)
