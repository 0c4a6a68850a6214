"""When a run stops asking for remote files, and what it says then."""

import pytest

from ftk.contracts import RejectReason
from ftk.errors import EnvironmentFault, TooManyRejects
from ftk.pipeline.reachability import Reachability


def _noted(outcomes: str, fraction: float, num_inputs: int | None = None) -> Reachability:
    """After `.` for each file that was fetched, and `x` for each that could not be."""
    reachability = Reachability(fraction, num_inputs)
    for each in outcomes:
        reachability.note(RejectReason.UNREACHABLE if each == "x" else None, "HTTP 503" if each == "x" else "")
    return reachability


@pytest.mark.parametrize(
    ("outcomes", "fraction", "num_inputs", "stopped"),
    [
        ("x" * 19, 0.1, 1000, False),
        ("x" * 20, 0.1, 1000, True),
        ("x" * 20, 0.1, None, True),
        ("x" * 20, 0.0, 1000, True),
        ("x" * 29, 0.5, 1000, False),
        ("x" * 30, 0.5, 1000, True),
        ("x" * 500, 1.0, 500, False),
        ("x." * 19, 0.1, 100, False),
        ("x." * 20, 0.1, 100, True),
        ("x." * 20, 0.1, 1000, False),
        ("x" * 19 + "." + "x" * 19, 0.1, None, False),
    ],
)
def test_a_run_stops_when_too_many_have_failed_or_too_many_in_a_row(
    outcomes: str, fraction: float, num_inputs: int | None, stopped: bool
) -> None:
    assert _noted(outcomes, fraction, num_inputs).stopped == stopped


def test_a_dead_network_is_told_from_too_many_dead_links() -> None:
    error = _noted("x" * 3, 0.1).error()
    assert isinstance(error, EnvironmentFault)
    assert "None of 3 remote images could be fetched. The network as a whole seems to be down" in str(error)
    assert "3 times: HTTP 503" in str(error)
    error = _noted("." + "x" * 20, 0.1).error()
    assert isinstance(error, EnvironmentFault)
    assert "The last 20 remote images could not be fetched. The network as a whole seems to be down" in str(error)
    error = _noted("..x.xx", 0.1).error()
    assert isinstance(error, TooManyRejects)
    assert "3 remote images could not be fetched, more than data.max_unreachable_fraction 0.1 allows" in str(error)


def test_what_an_earlier_run_fetched_says_that_the_network_was_up() -> None:
    reachability = _noted("xx", 0.1)
    reachability.has_kept = True
    assert isinstance(reachability.error(), TooManyRejects)
