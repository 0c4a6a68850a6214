"""The benchmark of overheads still fits what it measures; its numbers are not looked at."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import overheads as bench

pytestmark = pytest.mark.benchmarks
SMALL = ["--items", "50", "--samples", "40", "--steps", "3", "--payload-mib", "1", "--repeats", "2"]


def test_every_part_is_measured_as_often_as_asked_and_the_demo_once(monkeypatch):
    demos = []
    monkeypatch.setitem(bench.PARTS, "demo", lambda _: demos.append(1) or 90.0)
    results = bench.measure(bench.parse_arguments(SMALL))
    assert list(results) == list(bench.PARTS) == list(bench.SHOWN)
    assert demos == [1]
    assert all(0 < seconds["min"] <= seconds["median"] <= seconds["max"] for seconds in results.values())


def test_a_part_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.parse_arguments(["hlep"])
    assert "no such part: hlep; choose from help, lookup" in capsys.readouterr().err
