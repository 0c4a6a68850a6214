"""LoRA that starts from what its layers see."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftk.configs.schema import MethodConfig
from ftk.deliver.run_delivery import RunDelivery
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import eva, injection
from ftk.run import load_run
from ftk.train import build

RANK = 3


class Model(torch.nn.Module):
    """Two linear layers and a convolution; PEFT's mixin is all that it must have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 12, bias=False), torch.nn.Linear(12, 8)
        self.kernel = torch.nn.Conv1d(8, 8, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.kernel(self.second(self.first(inputs)).transpose(1, 2))

    def add_adapter(self, config: object, adapter_name: str) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


@pytest.fixture
def model() -> Model:
    import peft

    torch.manual_seed(0)
    made = Model()
    settings = peft.LoraConfig(r=RANK, target_modules=["first", "second", "kernel"], rank_pattern={"second": 2})
    injection.inject(made, settings, 1)
    return made


def seen_by(model: Model, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """[N,I] inputs of each linear layer."""
    first = torch.cat([batch.reshape(-1, 16) for batch in batches])
    return {"first": first, "second": first @ model.first.base_layer.weight.detach().T}


def factor(model: Model, name: str) -> torch.Tensor:
    return getattr(model, name).lora_A["default"].weight.detach()


def test_A_spans_the_principal_directions_of_the_layers_inputs(model: Model) -> None:
    spread = torch.diag(torch.logspace(1, -1, 16)) @ torch.linalg.qr(torch.randn(16, 16))[0]
    batches = [torch.randn(4, 25, 16) @ spread + 0.5 for _ in range(8)]
    kernel = factor(model, "kernel").clone()
    eva.start([model], [lambda batch=batch: model(batch) for batch in batches])
    for name, inputs in seen_by(model, batches).items():
        A = factor(model, name)
        _, _, V = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
        wanted = V[: len(A)]
        # The same space, and the first direction first; each of length 1.
        torch.testing.assert_close(torch.linalg.svdvals(A @ wanted.T), torch.ones(len(A)), atol=0.02, rtol=0)
        assert (A[0] @ wanted[0]).abs() > 0.99
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-4, rtol=0)
    assert torch.equal(factor(model, "kernel"), kernel), "a convolution starts as it did"
    assert not model.first._forward_pre_hooks


def test_rows_wait_until_there_are_as_many_as_directions(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    before = factor(model, "first").clone()
    row = torch.randn(1, 1, 16)
    eva.start([model], [lambda: model(row)] * (RANK - 1))
    assert torch.equal(factor(model, "first"), before)
    assert "1 of 2 linear layers saw fewer inputs than their rank" in caplog.text
    eva.start([model], [lambda: model(torch.randn(1, 1, 16))] * RANK)
    assert not torch.equal(factor(model, "first"), before)


def test_a_run_starts_from_its_cache_at_the_base_and_resumes_to_the_bit(
    ftk: Callable, workspace: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"name": "lora", "rank": 4, "initialisation": "eva", "eva_batches": 5}
    run_file = workspace(method=settings, train={"steps": 4, "checkpoint_every": 2, "learning_rate": 1e-3})
    for stage in ("prepare", "cache"):
        assert ftk(stage, run_file).code == 0

    def start(**method: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        overrides = [f"method.{name}={value}" for name, value in method.items()]
        made = build.build_trainer(load_run(run_file, [*overrides, "run=looked-at"]), RunDelivery)
        batch = made.loader.step(0).batches[0][1]
        with made.trainer.model.evaluating(), torch.no_grad():
            loss = made.trainer.losses(batch)
        weights = {name: tensor.clone() for name, tensor in made.trainer.optimizer.weights().items()}
        for closing in (made.inputs.store, made.recorder):
            closing.close()
        return weights, loss

    eva, loss = start()
    plain, plain_loss = start(initialisation="gaussian", eva_batches=32)
    torch.testing.assert_close(loss, plain_loss, atol=1e-6, rtol=0)
    for name, tensor in eva.items():
        if ".lora_A." in name:
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(4), atol=1e-4, rtol=0)
            assert not torch.equal(tensor, plain[name])
        else:
            assert not tensor.any()
    assert all(torch.equal(tensor, eva[name]) for name, tensor in start()[0].items()), "equal data, equal starts"

    assert ftk("train", run_file).code == 0
    for steps in (2, 4):
        done = ftk("train", run_file, "--set", "run=halves", "--set", f"train.steps={steps}")
        assert done.code == 0, done.err
        assert ("looking at 5 micro-batches" in done.err) == (steps == 2), "only a run that begins looks at the data"
    one, two = (
        load_file(tmp_path / "work/runs" / run / "adapter/pytorch_lora_weights.safetensors") for run in ("test", "halves")
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_settings_that_have_no_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`eva_batches` has no effect without `initialisation: eva`"):
        methods.parse(MethodConfig(name="lora", eva_batches=3))
    method, config = methods.parse(MethodConfig(name="lora", initialisation="eva"))
    assert methods.start_batches(method, config) == 32
    assert methods.start_batches(*methods.parse(MethodConfig(name="lora"))) == 0
    assert methods.start_batches(*methods.parse(MethodConfig(name="oft"))) == 0
