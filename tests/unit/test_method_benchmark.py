"""The benchmark of methods on the shipped model: that its runs are alike, and that its tables say what was measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import methods as bench

from ftk.configs.schema import LossConfig

pytestmark = pytest.mark.benchmarks


def point(**given):
    settings = {
        "arm": bench.REFERENCE, "rate": 1e-3, "seed": 0, "steps": 400, "num_parameters": 1000, "seconds_a_step": 0.1,
        "likeness": 0.5, "told": 0.8, "kept": 0.9, "changed": 4.0, "confused": 0.0,
    }  # fmt: skip
    return bench.Point(**{**settings, **given})


@pytest.fixture(scope="module")
def points():
    """Two arms at two rates, over two seeds; the second arm never reaches a likeness of 0.6."""
    found = []
    for seed in (0, 1):
        for steps, likeness, kept in ((100, 0.2, 0.95), (400, 0.62, 0.8)):
            found.append(point(seed=seed, steps=steps, likeness=likeness, kept=kept + 0.01 * seed))
            found.append(point(seed=seed, steps=steps, rate=3e-3, likeness=likeness, kept=kept - 0.3))
            found.append(point(arm="full", seed=seed, steps=steps, likeness=0.45, kept=0.7, seconds_a_step=0.2))
    return found


def test_all_arms_are_valid_and_differ_in_nothing_but_method_rate_class_images_and_preservation(tmp_path):
    plans = {}
    for name, arm in bench.ARMS.items():
        made = bench.make_run(tmp_path, arm, rate=arm.rate, seed=0, steps=8, name="x").config
        assert len(made.data.sources) == (2 if arm.has_class_images else 1)
        plans[name] = made.train.model_copy(update={"learning_rate": 1.0, "class_ratio": None, "loss": LossConfig()})
        assert made.train.loss.model_copy(update={"preservation": None}) == LossConfig()
    assert all(plan == plans[bench.REFERENCE] for plan in plans.values())


def test_the_best_rate_is_the_one_that_learns_and_keeps_most_at_the_end(points):
    assert bench.best_rate(points, bench.REFERENCE) == 1e-3
    assert bench.best_rate([*points, point(rate=5e-3, steps=100, likeness=1.0, kept=1.0)], bench.REFERENCE) == 1e-3


def test_equal_likeness_is_looked_for_at_every_rate_and_step(points):
    assert bench.kept_at(points, bench.REFERENCE, 0.6) == [0.8, 0.81]
    assert bench.kept_at(points, bench.REFERENCE, 0.1) == [0.95, 0.96]
    assert bench.kept_at(points, "full", 0.6) == []


def test_the_tables_show_each_arm_beside_the_first(points):
    base = {"likeness": 0.0, "told": 0.5, "kept": 0.97, "changed": 0.0, "confused": 0.0}
    report = {"points": [vars_of(one) for one in points], "base": base, "likeness_levels": [0.4, 0.6]}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in bench.markdown(report).splitlines() if line]
    by_name = {row[0]: row for row in rows[:5]}
    assert by_name["the base model"][4:] == ["0.00", "50%", "97%", "0.0", "0%"]
    assert by_name["full"][1:5] == ["0.001", "1,000", "2.00", "0.45 (0.45 to 0.45)"]
    equal = {row[0]: row[1:] for row in rows[5:]}
    assert equal["full"] == ["70 (70 to 70)%", "not reached"]


def test_what_the_file_has_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def learn(task):
        asked.append(task[1:4])
        return [point(arm=task[1], rate=task[2], seed=task[3])]

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        map = staticmethod(map)

    monkeypatch.setattr(bench, "_learn", learn)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "set_up", lambda *_: None)
    monkeypatch.setattr(bench, "base_row", lambda _: {"likeness": 0.0})
    path = tmp_path / "found.json"
    arguments = ["--method", "full", "--factors", "1", "--seeds", "1", "--scenes", "4", "--json", str(path)]
    bench.run(bench.parse_arguments(arguments))
    report = bench.run(bench.parse_arguments([*arguments[:2], "--method", "LoRA, rank 4", *arguments[2:]]))
    assert asked == [("full", 3e-4, 0), ("LoRA, rank 4", 3e-3, 0)]
    assert [one["arm"] for one in report["points"]] == ["full", "LoRA, rank 4"]
    assert json.loads(path.read_text())["points"] == report["points"]
    with pytest.raises(SystemExit, match="name another file"):
        bench.run(bench.parse_arguments([*arguments, "--steps", "8"]))


def vars_of(one):
    return {name: getattr(one, name) for name in bench.Point.__dataclass_fields__}


def test_a_run_is_read_after_every_part_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "NUM_CLASS_IMAGES", 2)
    monkeypatch.setattr(bench, "SAMPLING", replace(bench.SAMPLING, num_inference_steps=2))
    bench.set_up(tmp_path, 2)
    found = bench.learn(tmp_path, "LoRA, rank 16, class images", 1e-3, 0, 8, 2)
    assert [one.steps for one in found] == [4, 8]
    assert len({one.num_parameters for one in found}) == 1
    assert found[0].changed > 0
    assert all(0 <= one.kept <= 1 for one in found)
