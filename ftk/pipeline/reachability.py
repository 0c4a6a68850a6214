"""Counts which remote files can be fetched during a run, and says when it is no use to go on."""

import math
from collections import Counter

from ftk.contracts import RejectReason
from ftk.errors import EnvironmentFault, FtkError, TooManyRejects

_MIN_FAILURES = 20
_IMPROBABLE = 1e-9
_MAX_REASONS = 1000
"""Some reasons name their host, and a table may have a million of those."""


class Reachability:
    """What became of the remote files of a run.

    A run is stopped when more inputs have failed than are allowed of all, or when as many have failed in a row as would
    hardly ever do if the share that fails were the one that is allowed: then the network or a server is down.

    Args:
        fraction: `data.max_unreachable_fraction`. With 1 a run is never stopped.
        num_inputs: of the whole run; None when that is not known.
    """

    def __init__(self, fraction: float, num_inputs: int | None = None) -> None:
        self._fraction = fraction
        self._allowed = math.inf if num_inputs is None else fraction * num_inputs
        self._max_in_a_row = max(
            _MIN_FAILURES, math.ceil(math.log(_IMPROBABLE) / math.log(fraction)) if 0 < fraction < 1 else 0
        )
        self._in_a_row = 0
        self._num_fetched = 0
        self._failures: Counter[str] = Counter()
        self.has_kept = False
        """Whether samples of an earlier run are kept: then the network was not always down."""

    def note(self, reason: RejectReason | None, detail: str = "") -> None:
        """Count a remote input that was asked for: the reason and detail of its reject, if it became one."""
        if reason == RejectReason.UNREACHABLE:
            is_new = detail not in self._failures
            self._failures["other reasons" if is_new and len(self._failures) >= _MAX_REASONS else detail] += 1
            self._in_a_row += 1
        else:
            self._num_fetched += 1
            self._in_a_row = 0

    @property
    def num_failed(self) -> int:
        """Remote inputs that were asked for in vain."""
        return self._failures.total()

    @property
    def stopped(self) -> bool:
        """Whether to ask for no more files in this run."""
        if self._fraction >= 1 or self.num_failed < _MIN_FAILURES:
            return False
        return self._is_down or self.num_failed > self._allowed

    @property
    def _is_down(self) -> bool:
        return self._in_a_row >= self._max_in_a_row

    def error(self) -> FtkError:
        """What to raise when too many files are unreachable."""
        reasons = "".join(f"\n  {count:,} times: {detail}" for detail, count in self._failures.most_common(5))
        again = "What was fetched is kept: run the command again, and it asks for the others."
        if not (self._num_fetched or self.has_kept):
            return EnvironmentFault(
                f"None of {self.num_failed:,} remote images could be fetched. The network as a whole seems to be down, or "
                f"their server is, or it refuses access. Check that first:{reasons}\n{again}"
            )
        advice = "If they are gone for good, remove them from the source, or raise data.max_unreachable_fraction"
        if self._is_down:
            return EnvironmentFault(
                f"The last {self._in_a_row:,} remote images could not be fetched. The network as a whole seems to be down, or "
                f"their server is. Check that first:{reasons}\n{again} {advice}: with 1 no run is stopped."
            )
        return TooManyRejects(
            f"{self.num_failed:,} remote images could not be fetched, more than data.max_unreachable_fraction "
            f"{self._fraction:g} allows:{reasons}\n{again} {advice}."
        )
