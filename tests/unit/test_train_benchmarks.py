"""The benchmarks of training still fit the interfaces that they measure; their numbers are not looked at."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from ftk.deliver.run_delivery import RunDelivery
from ftk.train import stage
from ftk.train.hooks.recorder import read_metrics

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import method_costs
import train_matrix as matrix
import train_resume as resume
import train_setup as setup
import train_step as steps

pytestmark = pytest.mark.benchmarks


@pytest.fixture(scope="module")
def matrix_options(tiny_model):
    return argparse.Namespace(
        size="tiny", device="cpu", edge=[64], batch=[2], only=[], steps=1, json=None, scheduler=tiny_model
    )


@pytest.fixture(scope="module")
def bench(matrix_options):
    return matrix.make_bench("full", matrix_options)


def test_the_floating_point_operations_are_those_of_the_flop_counter():
    qwen_image = SimpleNamespace(num_attention_heads=24, attention_head_dim=128, num_layers=60)
    whole = matrix.Case(edge_px=1024, batch_size=1, checkpointed=False)
    again = matrix.Case(edge_px=1024, batch_size=4)
    # torch's FlopCounterMode over diffusers' model on the meta device: 72.2 forward, 92.8 backward
    assert matrix.step_tflop(qwen_image, whole) == pytest.approx(165.0, abs=0.1)
    assert matrix.step_tflop(qwen_image, again) == pytest.approx(4 * 237.2, abs=0.4)


def test_every_measure_is_a_case_of_its_own_and_those_of_a_model_are_together(matrix_options):
    found = matrix.cases(matrix_options)
    assert len({case.name for case in found}) == len(found) == 12
    assert [case.base for case in found] == ["full"] * 8 + ["int8"] * 4


def test_all_loops_are_timed_on_one_model_and_ftks_agrees_with_its_reference(bench, matrix_options):
    expected = matrix.reference(bench, 64, 2)
    before = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    for loop in ("ftk", "raw", "diffusers"):
        case = matrix.Case(edge_px=64, batch_size=2, loop=loop, checkpointed=False)
        found = matrix.measure(bench, case, expected, matrix_options)
        assert found["seconds_a_step"]["median"] > 0, found
        if loop == "ftk":
            assert found["agreement"]["gradient_cosine"]["min"] > 0.999
            assert found["agreement"]["loss"] == pytest.approx(found["agreement"]["eager_loss"], rel=1e-3)
    assert all(torch.equal(parameter, before[name]) for name, parameter in bench.parameters.items())


def test_a_case_that_does_not_fit_is_a_result(bench, matrix_options, monkeypatch):
    def no_room(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(matrix, "ours", no_room)
    found = matrix.measure(bench, matrix.Case(edge_px=64, batch_size=2), (0.0, {}), matrix_options)
    assert found["failed"].startswith("does not fit: CUDA out of memory")


def test_cases_that_the_file_has_are_not_measured_again(matrix_options, tmp_path, monkeypatch):
    options = argparse.Namespace(**{**vars(matrix_options), "json": tmp_path / "matrix.json", "only": ["raw"]})
    first = matrix.run(options)
    assert len(first["cases"]) == 2
    assert json.loads(options.json.read_text())["cases"] == first["cases"]
    monkeypatch.setattr(matrix, "make_bench", lambda *_: pytest.fail("a model was made"))
    assert matrix.run(options)["cases"] == first["cases"]


def test_all_sides_take_turns_on_the_same_samples():
    options = argparse.Namespace(block=10, rounds=2)
    found = steps.overhead_of("tiny", 4, options)
    assert set(found["sides"]) == {"ftk", "raw", "diffusers"}
    assert len(found["sides"]["raw"]["ratio"]["rounds"]) == 2
    assert set(found["data_seconds"]) == {"median", "min", "max", "p99"}


def test_the_wait_for_data_leaves_out_the_warmup_and_the_first_step_of_each_block(monkeypatch):
    numbers = range(1, steps.WARMUP_STEPS + 5)
    table = pa.table({"step": numbers, "data_seconds": [float(number) for number in numbers]})
    monkeypatch.setattr(steps, "metrics_table", lambda _: table)
    waits = steps.waiting(Path("unread"), {steps.WARMUP_STEPS + 1, steps.WARMUP_STEPS + 4})
    assert (waits["min"], waits["max"]) == (steps.WARMUP_STEPS + 2, steps.WARMUP_STEPS + 3)


def test_a_made_workspace_trains_and_resumes_at_its_checkpoint(tmp_path):
    run = setup.make_workspace(tmp_path, setup.SIZES["many"], num_samples=12, train=resume.settings_of("by bucket"))
    resume.save(tmp_path, "by bucket", 1000)
    going_on = run.config.model_copy(update={"train": run.config.train.model_copy(update={"steps": 1002})})
    stage.run(run.with_config(going_on), RunDelivery)
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / "benchmark")] == [1001, 1002]


def test_each_round_has_every_side_once_and_the_turns_change():
    found = list(setup.taking_turns(("a", "b", "c"), 4))
    rounds = ["".join(name for number, name in found if number == turn) for turn in range(4)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 4


@pytest.mark.parametrize("kind", method_costs.MODELS)
def test_every_method_is_measured_beside_lora_on_weights_that_they_share(kind, monkeypatch):
    arguments = ["--model", kind, "--size", "tiny", "--rounds", "2", "--block", "1", "--repeats", "1"]
    monkeypatch.setattr(method_costs, "in_a_process", lambda command: {"peak_bytes": 100 if "bare" in command else 150})
    options = method_costs.parse_arguments(arguments)
    report = method_costs.run(options)
    found = report["results"][kind]["methods"]
    assert list(found) == list(method_costs.METHODS)
    assert found["full"]["num_parameters"] == report["results"][kind]["num_base_parameters"]
    assert all(one["delivered_bytes"] >= 4 * one["num_parameters"] for one in found.values())
    assert found[method_costs.REFERENCE]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert {one["bytes_above_bare"]["median"] for one in found.values()} == {50}
    lines = method_costs.markdown(report["results"]).splitlines()
    assert {line.count("|") for line in lines} == {6}
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(found)
    assert report["command"].startswith(f"python benchmarks/method_costs.py --model {kind} --size tiny")


def test_the_memory_of_a_method_is_that_of_a_process_of_its_own():
    model = method_costs.MODELS["transformer"]["tiny"]
    assert method_costs.memory_of(method_costs.REFERENCE, model, 1)["peak_bytes"] > 2**20
