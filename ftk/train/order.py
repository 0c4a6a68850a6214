"""Which sample when, and with which random numbers: a pure function of (seed, index). No loader state, no RNG state.

Each epoch permutes every bucket under a key, cuts it into micro-batches of one bucket, and shuffles those. Epochs follow
each other without a seam; a step is the next `global_batch_size / micro_batch_size` micro-batches, and rank r takes every
world-th of them: another number of processes changes who computes, not what is computed.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ftk import storage
from ftk.errors import ConfigError

Remainder = Literal["smaller", "drop", "fill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One use of a sample: `sample` is its position in the cache, `repeat` counts its uses within the epoch."""

    epoch: int
    sample: int
    repeat: int


MicroBatch = tuple[Draw, ...]


class Order:
    """The sequence of micro-batches.

    Args:
        keys: a stable name of each sample.
        buckets: the bucket of each sample; a micro-batch holds one bucket.
        repeats: uses of each sample in an epoch.
        remainder: what becomes of a bucket's incomplete micro-batch: train on it as it is (`smaller`), leave it out of this
            epoch (`drop`), or fill it up with samples of the same bucket (`fill`).

    Raises:
        ConfigError: `drop` leaves nothing to train on.
    """

    def __init__(
        self,
        *,
        keys: Sequence[str],
        buckets: Sequence[Hashable],
        repeats: Sequence[int],
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        remainder: Remainder,
    ) -> None:
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.micro_batches_a_step = global_batch_size // micro_batch_size
        self.remainder: Remainder = remainder
        self._repeats = list(repeats)
        self._members: dict[str, list[int]] = {}
        for sample, bucket in enumerate(buckets):
            self._members.setdefault(str(bucket), []).append(sample)
        uses = {bucket: sum(self._repeats[sample] for sample in members) for bucket, members in self._members.items()}
        left_over = {bucket: count % micro_batch_size for bucket, count in uses.items()}
        self.num_dropped = sum(left_over.values()) if remainder == "drop" else 0
        self.num_filled = sum(micro_batch_size - n for n in left_over.values() if n) if remainder == "fill" else 0
        self.num_smaller = sum(n > 0 for n in left_over.values()) if remainder == "smaller" else 0
        partial = 0 if remainder == "drop" else 1
        self.micro_batches_an_epoch = sum(
            count // micro_batch_size + (partial if left_over[bucket] else 0) for bucket, count in uses.items()
        )
        if not self.micro_batches_an_epoch:
            raise ConfigError(
                f"train.remainder: drop leaves nothing: no bucket holds {micro_batch_size} samples "
                f"(train.micro_batch_size). The largest holds {max(uses.values(), default=0)}. Use smaller or fill."
            )
        self.samples_an_epoch = sum(uses.values()) - self.num_dropped + self.num_filled
        described = [list(row) for row in zip(keys, map(str, buckets), self._repeats, strict=True)]
        self.fingerprint = storage.digest([described, seed, global_batch_size, micro_batch_size, remainder])
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, counted from 0."""
        first = step * self.micro_batches_a_step
        return [self.micro_batch(index) for index in range(first, first + self.micro_batches_a_step)]

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch at an index of the endless sequence."""
        epoch, position = divmod(index, self.micro_batches_an_epoch)
        return self._epoch(epoch)[position]

    def _plan_epoch(self, epoch: int) -> list[MicroBatch]:
        batches: list[MicroBatch] = []
        for bucket in sorted(self._members):
            uses = [
                Draw(epoch=epoch, sample=sample, repeat=repeat)
                for sample in self._members[bucket]
                for repeat in range(self._repeats[sample])
            ]
            shuffled = [uses[i] for i in keyed_permutation(len(uses), self.seed, epoch, bucket)]
            batches += self._cut(shuffled)
        return [batches[i] for i in keyed_permutation(len(batches), self.seed, epoch, "micro-batches")]

    def _cut(self, draws: list[Draw]) -> list[MicroBatch]:
        size = self.micro_batch_size
        batches = [tuple(draws[start : start + size]) for start in range(0, len(draws), size)]
        if len(batches[-1]) == size or self.remainder == "smaller":
            return batches
        if self.remainder == "drop":
            return batches[:-1]
        fillers = []
        for turn in range(size - len(batches[-1])):
            again = draws[turn % len(draws)]
            # a repeat number that no ordinary use has, so that a filler gets noise of its own
            number = self._repeats[again.sample] + turn // len(draws)
            fillers.append(Draw(epoch=again.epoch, sample=again.sample, repeat=number))
        return [*batches[:-1], (*batches[-1], *fillers)]


def share(micro_batches: Sequence[MicroBatch], rank: int, world_size: int) -> list[MicroBatch]:
    """What rank r computes of a step: every world-th micro-batch; shares may be uneven or empty."""
    return list(micro_batches[rank::world_size])


def keyed_permutation(length: int, *key: object) -> npt.NDArray[np.int64]:
    """A permutation of range(length) that depends on the key alone: by the sort order of Philox's raw words.

    NumPy keeps a bit generator's raw stream stable between versions; of `Generator.permutation` it promises nothing.
    """
    words = np.random.Philox(key=int(storage.digest(list(key)), 16)).random_raw(length)
    return np.argsort(words, kind="stable")


def keyed_seed(*key: object) -> int:
    """A 63-bit seed that depends on the key alone."""
    return int(storage.digest(list(key), 16), 16) >> 1
