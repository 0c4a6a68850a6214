"""The benchmark of methods with control images: that its runs are alike, and that its table says what was measured."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import controls as bench

from ftk.demo.steering import Agreement

pytestmark = pytest.mark.benchmarks


def agreement(place: float) -> dict[str, float]:
    return asdict(Agreement(place=place, size=0.5, shape=0.5, colour=0.5, ground=1.0, distance_px=4.0))


def point(seed: int, place: float) -> bench.Point:
    return bench.Point(
        arm="T2I-Adapter", seed=seed, steps=400, num_parameters=1000, cpu_seconds=20.0 + seed, right=agreement(place),
        shuffled=agreement(0.1), half=agreement(0.4),
    )  # fmt: skip


def test_arms_differ_in_nothing_but_method_rate_and_steps(tmp_path: Path) -> None:
    plans = []
    for arm in bench.ARMS.values():
        config = bench.make_run(tmp_path, arm, seed=3, name="x").config
        assert config.train.seed == 3
        assert (config.train.steps, config.train.learning_rate) == (arm.steps, arm.rate)
        plans.append(config.train.model_copy(update={"steps": 1, "learning_rate": 1.0, "checkpoint_every": 1}))
    assert all(plan == plans[0] for plan in plans)


def test_methods_that_read_different_forms_have_caches_of_their_own(tmp_path: Path) -> None:
    by_form = {}
    for name, arm in bench.ARMS.items():
        run = bench.make_run(tmp_path, arm, seed=0, name="x")
        by_form.setdefault(run.needs.controls, set()).add(run.config.workspace)
        assert len(by_form[run.needs.controls]) == 1, name
    assert len(set.union(*by_form.values())) == len(by_form)


def test_the_table_has_the_median_and_the_spread_over_seeds() -> None:
    report = {"points": [asdict(point(0, 0.8)), asdict(point(1, 0.9))], "base": agreement(0.125)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in bench.markdown(report).splitlines()]
    assert rows[2][:1] + rows[2][5:6] == ["the base model", "12 (12 to 12)%"]
    assert rows[3][:6] == ["T2I-Adapter", "1,000", "400", "20 (20 to 21)", "its own control", "85 (80 to 90)%"]
    assert rows[4][4:6] == ["another scene's", "10 (10 to 10)%"]
    assert rows[5][4:6] == ["its own at half strength", "40 (40 to 40)%"]
