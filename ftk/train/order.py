"""Which sample when, and with which random numbers: a pure function of (seed, index). No loader state, no RNG state.

Each epoch is cut into steps of `global_batch_size` samples. First chance picks the samples of the last step, the incomplete
one, from all of them, so that no sample is left out more often than another. The rest is permuted group by group (samples of
one bucket and one list of reference sizes, and where it is asked for of one text length): first come whole steps of one
group, then steps mixed from what remains of all groups. All whole steps are then shuffled.

Micro-batches only cut a step for computation: at most `micro_batch_size` samples of one group each. Rank r computes every
world-th of them. Neither the size of micro-batches nor the number of processes changes which samples a step has.

All is kept in arrays, and a `Draw` is made only when it is asked for: a million samples open in a second.

Shape legend: S samples, U uses of samples, P uses in an epoch (places), G groups, N whole steps in an epoch.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.configs.schema import TrainConfig
from ftk.errors import ConfigError
from ftk.train import held_out
from ftk.train.held_out import Integers, Words

_BLOCK = 2**20
"""About how many uses the epochs that are remembered have together."""
_PERMUTED_AT_ONCE = 2**16
_QUOTA_UNIT = 2**20
EMPTY_CAPTION = -1
ORDER_VERSION = 2
"""Of the rules above: other rules give another sequence, and a run is not continued under them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One use of a sample: `sample` is its row in the cache's table, `repeat` tells its uses within the epoch apart.

    `caption` is one of the sample's captions, or `EMPTY_CAPTION` where it was dropped.
    """

    epoch: int
    sample: int
    repeat: int
    caption: int


MicroBatch = tuple[Draw, ...]


class Order:
    """The sequence of steps.

    `samples_an_epoch`, `steps_an_epoch` and the counts of what becomes of the last step are those of the first epoch.

    Args:
        samples: the cache's sample table; its columns key, bucket_width, bucket_height, repeats, role and text_lengths, those
            of references where there are any, and for `validation.share` latents, texts, width and height.
        empty_length: tokens of the empty caption.

    Raises:
        CacheError: two samples have one key.
        ConfigError: `drop`, `validation.share` or `class_ratio` leaves nothing to train on.
    """

    def __init__(self, samples: pa.Table, config: TrainConfig, *, empty_length: int) -> None:
        hash_S = held_out.hashes(samples, lambda rows: rows["key"], keyed_seed(config.seed, "validation"))
        held_out.refuse_doubled_keys(samples["key"], hash_S)
        is_class_S = _equals(samples["role"], "class")
        self.held_out = held_out.held_out(samples, hash_S, is_class_S, config.validation.share)
        self.seed = config.seed
        self.step_size = config.global_batch_size
        self.micro_batch_size = config.micro_batch_size
        self.remainder = config.remainder
        repeats_S = samples["repeats"].to_numpy()
        self._most_repeats_S = np.ceil(repeats_S).astype(np.int64)
        self._uses = _uses(repeats_S, is_class_S, self.held_out, config)
        self._captions = _captions(samples, config, empty_length)
        self.fingerprint = _fingerprint(samples, self.held_out, is_class_S, config, empty_length)
        self._count_first_epoch()
        self._starts = np.zeros(1, np.int64)
        num_cached = _BLOCK // max(self.samples_an_epoch, self._captions.num_groups)
        self._epoch = lru_cache(maxsize=min(64, max(2, num_cached)))(self._plan_epoch)

    def shape_of(self, sample: int) -> int:
        """A number for the shape of a sample's tensors: its bucket, and the sizes of its references."""
        return int(self._captions.bucket_S[sample])

    def step(self, index: int) -> list[MicroBatch]:
        """The micro-batches of a step of the endless sequence, counted from 0."""
        number, position = self._locate(index)
        epoch = self._epoch(number)
        places = epoch.places(position, self.step_size)
        sample, repeat, caption = (column[places] for column in (epoch.sample_P, epoch.repeat_P, epoch.caption_P))
        groups = self._captions.group(sample, caption)
        columns = (sample.tolist(), repeat.tolist(), caption.tolist())
        draws = [Draw(epoch=number, sample=s, repeat=r, caption=c) for s, r, c in zip(*columns, strict=True)]
        return list(_cut(draws, groups, self.micro_batch_size))

    def micro_batches(self) -> Iterator[MicroBatch]:
        """The micro-batches of all steps, one after the other, without end."""
        return itertools.chain.from_iterable(map(self.step, itertools.count()))

    def steps_of(self, epochs: float) -> int:
        """How many steps so many epochs have, counted from the first; at least 1."""
        whole = int(epochs)
        before = int(self._num_steps(np.arange(whole)).sum()) if self._uses.varies else whole * self.steps_an_epoch
        return max(1, before + round((epochs - whole) * int(self._num_steps(np.arange(whole, whole + 1))[0])))

    def epochs_of(self, steps: int) -> float:
        """How many epochs so many steps are: inverse of `steps_of`."""
        epoch, position = self._locate(steps)
        return epoch + position / int(self._num_steps(np.arange(epoch, epoch + 1))[0])

    def _num_steps(self, epoch_E: Integers) -> Integers:
        """[E]: the number of steps of each of these epochs."""
        num_uses_E = self._uses.num_of(epoch_E)
        return num_uses_E // self.step_size if self.remainder == "drop" else -(-num_uses_E // self.step_size)

    def _locate(self, index: int) -> tuple[int, int]:
        """The epoch of a step, and its position there."""
        if not self._uses.varies:
            return divmod(index, self.steps_an_epoch)
        starts = self._starts
        while starts[-1] <= index:
            # Doubled each time, so that neither the first step nor a late one waits for epochs one by one.
            epochs = np.arange(len(starts) - 1, 2 * len(starts))
            starts = np.concatenate([starts, starts[-1] + np.cumsum(self._num_steps(epochs))])
            # Replaced, not changed: another thread may be reading it.
            self._starts = starts
        epoch = int(np.searchsorted(starts, index, side="right")) - 1
        return epoch, index - int(starts[epoch])

    def _count_first_epoch(self) -> None:
        mean, size = self._uses.mean_an_epoch, self.step_size
        if mean < size and self.remainder == "drop":
            raise ConfigError(
                f"train.remainder: drop leaves nothing: an epoch has {mean:g} samples, fewer than a step "
                f"(train.global_batch_size {size}). Use smaller or fill."
            )
        num_uses = int(self._uses.num_of(np.zeros(1, np.int64))[0])
        if not num_uses:
            raise ConfigError("The cache has no sample to train on. Run `ftk inspect` on it to see what it holds.")
        num_last = num_uses % size
        self.num_short = num_last if self.remainder == "smaller" else 0
        self.num_dropped = num_last if self.remainder == "drop" else 0
        self.num_filled = -num_uses % size if self.remainder == "fill" else 0
        self.samples_an_epoch = num_uses - self.num_dropped + self.num_filled
        self.steps_an_epoch = -(-self.samples_an_epoch // size)

    def _plan_epoch(self, epoch: int) -> "_Epoch":
        use_P = self._uses.of(epoch)
        sample_P = self._uses.sample_U[use_P]
        words_P = _words(len(use_P), self.seed, epoch, "captions") if self._captions.is_drawn else None
        caption_P = self._captions.draw(sample_P, words_P)
        place_P, copy_P = self._arranged(self._captions.group(sample_P, caption_P), epoch)
        turn_P = self._uses.turns(epoch)
        # The repeat numbers of copies start behind those of all ordinary uses, so a copy gets noise of its own.
        turn_P = turn_P[place_P] + copy_P * (int(turn_P.max(initial=0)) + 1)
        sample_P, caption_P = sample_P[place_P], caption_P[place_P]
        return _Epoch(
            sample_P=sample_P,
            repeat_P=(self._uses.repeat_U[use_P[place_P]] + turn_P * self._most_repeats_S[sample_P]).astype(np.int32),
            caption_P=caption_P,
            shuffled_N=keyed_permutation(len(use_P) // self.step_size, self.seed, epoch, "steps").astype(np.int32),
        )

    def _arranged(self, group_P: Integers, epoch: int) -> tuple[Integers, Integers]:
        """The places of an epoch in an order in which every `step_size` of them are a step; the incomplete one is the last.

        Returns:
            The places, and of each which copy of its use it is; 0 is the use itself.
        """
        size, num_groups = self.step_size, self._captions.num_groups
        words_P = _words(len(group_P), self.seed, epoch, "places")
        num_last = len(group_P) % size
        # As many of all uses as a step has, in an order of chance: first those of the last step, then what it is filled with.
        drawn = _smallest(words_P, size) if num_last else np.zeros(0, np.int64)
        # Groups in an order of chance, so that those whose remainders share a step differ between epochs.
        rank_G = keyed_permutation(num_groups, self.seed, epoch, "groups").astype(np.uint64)
        rank_P = rank_G[group_P]
        rank_P[drawn[:num_last]] = num_groups
        bits = np.uint64(num_groups.bit_length())
        counts_G = np.bincount(rank_P.astype(np.int32), minlength=num_groups + 1)
        # One sort permutes every group: by the group, and within by random words.
        place_P = np.argsort((rank_P << (np.uint64(64) - bits)) | (words_P >> bits), kind="stable")
        rest_G = counts_G % size
        rest_places = np.repeat(np.cumsum(counts_G) - rest_G, rest_G) + _counted(rest_G)
        is_rest_P = np.zeros(len(place_P), np.bool_)
        is_rest_P[rest_places] = True
        place_P = np.concatenate([place_P[~is_rest_P], place_P[is_rest_P]])
        if self.remainder == "drop":
            place_P = place_P[: len(place_P) - num_last]
        copied = np.arange(num_last, size if num_last and self.remainder == "fill" else num_last)
        copy_P = np.zeros(len(place_P) + len(copied), np.int32)
        copy_P[len(place_P) :] = 1 + (copied - num_last) // max(1, len(drawn))
        return np.concatenate([place_P, drawn[copied % max(1, len(drawn))]]), copy_P


def _cut(draws: Sequence[Draw], groups: Integers, size: int) -> Iterator[MicroBatch]:
    """The draws of a step as micro-batches of one group."""
    by_group = sorted(zip(groups.tolist(), draws, strict=True), key=lambda pair: pair[0])
    for _, members in itertools.groupby(by_group, key=lambda pair: pair[0]):
        alike = tuple(draw for _, draw in members)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """The uses of an epoch, step by step, and the order of its whole steps."""

    sample_P: Integers
    repeat_P: Integers
    caption_P: Integers
    shuffled_N: Integers

    def places(self, position: int, size: int) -> slice:
        """Where the uses of a step are. One that is not whole, or was filled, is the last of its epoch."""
        number = int(self.shuffled_N[position]) if position < len(self.shuffled_N) else position
        return slice(number * size, (number + 1) * size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uses:
    """All uses of samples: those of every epoch, then those that take turns (`shares`), then those of class images.

    With a class ratio an epoch has the next `num_class` of an endless row of class images, which holds one keyed permutation
    of their uses after the other, so all come equally often over the epochs.
    """

    sample_U: Integers
    repeat_U: Integers
    num_always: int
    shares: "tuple[_Share, ...]"
    num_class: int
    seed: int

    @property
    def mean_an_epoch(self) -> float:
        """How many uses an epoch has in the mean; where repeats are not whole, one more or one less."""
        return self.num_always + self.num_class + sum(share.quota / _QUOTA_UNIT for share in self.shares)

    @property
    def varies(self) -> bool:
        """Whether epochs differ in their number of uses."""
        return any(share.quota % _QUOTA_UNIT for share in self.shares)

    @property
    def first_other(self) -> int:
        """Where the uses of the endless row begin."""
        return self.num_always + sum(share.count for share in self.shares)

    @property
    def num_others(self) -> int:
        """How long a permutation of the endless row is."""
        return len(self.sample_U) - self.first_other

    def num_of(self, epoch_E: Integers) -> Integers:
        """[E]: how many uses each of these epochs has; P."""
        always_E = np.full_like(epoch_E, self.num_always + self.num_class)
        return always_E + sum(share.before(epoch_E + 1) - share.before(epoch_E) for share in self.shares)

    def of(self, epoch: int) -> Integers:
        """[P]: the uses of an epoch, in a fixed order of their places."""
        parts = [np.arange(self.num_always, dtype=np.int32), *(share.uses(epoch) for share in self.shares)]
        if self.num_class:
            parts.append(self._row(epoch * self.num_class, (epoch + 1) * self.num_class))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def turns(self, epoch: int) -> Integers:
        """[P]: of each place, how many permutations before its own the epoch has begun."""
        row = np.arange(epoch * self.num_class, (epoch + 1) * self.num_class) // max(1, self.num_others)
        num_others = int(self.num_of(np.array([epoch]))[0]) - self.num_class
        return np.concatenate([np.zeros(num_others, np.int64), row - row[:1]])

    def _row(self, first: int, last: int) -> Integers:
        at_once = max(1, _PERMUTED_AT_ONCE // self.num_others)
        length = at_once * self.num_others
        parts = []
        for block in range(first // length, (last - 1) // length + 1):
            whole = _permutations(block, at_once, self.num_others, self.seed)
            parts.append(self.first_other + whole[max(0, first - block * length) : last - block * length])
        return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutations(block: int, count: int, length: int, seed: int) -> Integers:
    """`count` permutations of range(length), one after the other: the block-th such row."""
    words = _words(count * length, seed, block, "class images").reshape(count, length)
    return np.argsort(words, axis=1, kind="stable").astype(np.int32).ravel()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Uses `first`..`first + count - 1`, of which an epoch has the next `quota / _QUOTA_UNIT`, round and round.

    A use comes in each of as many epochs as the quota takes to go round: in every second one, if it is half of them.
    """

    first: int
    count: int
    quota: int

    def before(self, epoch_E: Integers) -> Integers:
        """[E]: how many have been used before each of these epochs begins. Rounded up, so the first epoch has some."""
        return -(-epoch_E * self.quota // _QUOTA_UNIT)

    def uses(self, epoch: int) -> Integers:
        """Those of an epoch."""
        start, end = self.before(np.array([epoch, epoch + 1])).tolist()
        return (self.first + np.arange(start, end) % self.count).astype(np.int32)


def _uses(repeats_S: npt.NDArray[Any], is_class_S: npt.NDArray[np.bool_], held_out: Integers, config: TrainConfig) -> _Uses:
    repeats_S = repeats_S.copy()
    repeats_S[held_out] = 0
    whole_S = np.floor(repeats_S).astype(np.int64)
    part_S = np.round(repeats_S - whole_S, 9)
    sample_U, repeat_U = np.repeat(np.arange(len(whole_S), dtype=np.int32), whole_S), _counted(whole_S).astype(np.int32)
    is_other_U = is_class_S[sample_U] if config.class_ratio is not None else np.zeros(len(sample_U), np.bool_)
    num_always = int(len(sample_U) - is_other_U.sum())
    shares, turning = _shares(repeats_S, part_S, num_always, config.seed)
    num_class = 0
    if config.class_ratio is not None:
        if part_S[is_class_S].any():
            raise ConfigError(
                f"train.class_ratio {config.class_ratio:g} says how often class images come, and `repeats` of their sources "
                f"only how often one comes beside another: give sources with `role: class` whole repeats."
            )
        mean = num_always + sum(share.quota / _QUOTA_UNIT for share in shares)
        num_class = _class_uses(config.class_ratio, mean, int(is_other_U.sum()))
    return _Uses(
        sample_U=np.concatenate([sample_U[~is_other_U], turning, sample_U[is_other_U]]),
        repeat_U=np.concatenate([repeat_U[~is_other_U], whole_S[turning].astype(np.int32), repeat_U[is_other_U]]),
        num_always=num_always,
        shares=shares,
        num_class=num_class,
        seed=config.seed,
    )


def _shares(
    repeats_S: npt.NDArray[Any], part_S: npt.NDArray[Any], first: int, seed: int
) -> tuple[tuple[_Share, ...], Integers]:
    """What takes turns, for each of the repeats that are not whole, and the samples of these uses one after the other."""
    shares, samples = [], [np.zeros(0, np.int32)]
    for repeats in np.unique(repeats_S[part_S > 0]).tolist():
        members = np.flatnonzero(repeats_S == repeats).astype(np.int32)
        quota = math.ceil(round(float(part_S[members[0]]) * len(members), 6) * _QUOTA_UNIT)
        shares.append(_Share(first=first, count=len(members), quota=quota))
        samples.append(members[keyed_permutation(len(members), seed, repeats, "turns")])
        first += len(members)
    return tuple(shares), np.concatenate(samples)


def _class_uses(ratio: float, num_instance: float, num_class: int) -> int:
    """How many uses of class images an epoch has for so many of instance images."""
    for what, number in (("instance", num_instance), ("class", num_class)):
        if not number:
            raise ConfigError(
                f"train.class_ratio {ratio:g}: the cache holds no {what} images. "
                f"Set `role: {what}` on a source in data.sources, or leave train.class_ratio out."
            )
    if not round(ratio * num_instance):
        raise ConfigError(
            f"train.class_ratio {ratio:g}: an epoch of {num_instance:g} uses of instance images would have no "
            f"class image. Raise it to {1 / num_instance:.2g} or more, or leave it out."
        )
    return round(ratio * num_instance)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captions:
    """Which captions samples have, and the group of a sample with each.

    A sample's slots are the empty caption and its own ones; `slot_group` is None where captions make no difference.
    """

    num_S: Integers
    bucket_S: Integers
    slot_S: Integers
    slot_group: Integers | None
    num_groups: int
    dropout: float

    @property
    def is_drawn(self) -> bool:
        """Whether there is a choice."""
        return self.dropout > 0 or bool((self.num_S > 1).any())

    def draw(self, sample_P: Integers, words_P: Words | None) -> Integers:
        """The caption of each use: of a word, one half says whether it is dropped, the other half which it is."""
        num_P = self.num_S[sample_P]
        if words_P is None:
            return num_P - 1  # one caption, or none
        half = np.uint64(32)
        caption_P = ((words_P >> half) * num_P.astype(np.uint64) >> half).astype(np.int32)
        is_kept_P = (words_P & np.uint64(2**32 - 1)) >= np.uint64(round(self.dropout * 2**32))
        return np.where(is_kept_P & (num_P > 0), caption_P, np.int32(EMPTY_CAPTION))

    def group(self, sample_P: Integers, caption_P: Integers) -> Integers:
        """The group of each use."""
        if self.slot_group is None:
            return self.bucket_S[sample_P]
        slot_P: Integers = self.slot_S[sample_P] + 1 + caption_P
        return self.slot_group[slot_P]


def _captions(samples: pa.Table, config: TrainConfig, empty_length: int) -> _Captions:
    num_S = _integers(pc.list_value_length(samples["text_lengths"])).astype(np.int32)
    bucket_S, num_groups = _codes((_integers(samples["bucket_width"]) << 32) | _integers(samples["bucket_height"]))
    if (sizes := _reference_sizes(samples)) is not None:
        sizes_S = sizes.dictionary_encode().indices.to_numpy()
        bucket_S, num_groups = _codes((bucket_S.astype(np.int64) << 32) | sizes_S)
    slot_S = np.cumsum(num_S + 1) - (num_S + 1)
    slot_group = None
    if config.group_by == "text_length":
        length_of_slot = np.full(int((num_S + 1).sum()), empty_length, np.int64)
        is_own = np.ones(len(length_of_slot), np.bool_)
        is_own[slot_S] = False
        length_of_slot[is_own] = _integers(pc.list_flatten(samples["text_lengths"]))
        slot_group, num_groups = _codes((np.repeat(bucket_S, num_S + 1).astype(np.int64) << 32) | length_of_slot)
    return _Captions(
        num_S=num_S,
        bucket_S=bucket_S,
        slot_S=slot_S,
        slot_group=slot_group,
        num_groups=num_groups,
        dropout=config.caption_dropout,
    )


def _reference_sizes(samples: pa.Table) -> pa.Array | None:
    """[S]: the sizes of each sample's references as one text; None where the cache has no references."""
    if "reference_widths" not in samples.column_names:
        return None
    sides = [pc.cast(samples[name], pa.list_(pa.string())) for name in ("reference_widths", "reference_heights")]
    joined = pc.binary_join_element_wise(*(pc.binary_join(column, ",") for column in sides), "x")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def _fingerprint(
    samples: pa.Table, held_out: Integers, is_class_S: npt.NDArray[np.bool_], config: TrainConfig, empty_length: int
) -> str:
    """32 hex digits of all that the sequence hangs on, whatever the chunks of the table."""
    settings = config.model_dump(
        mode="json",
        include={"seed", "global_batch_size", "remainder", "group_by", "class_ratio", "caption_dropout"},
    )
    by_length = config.group_by == "text_length"
    hasher = blake3.blake3(storage.json_bytes([settings, len(samples), empty_length if by_length else None]))
    for chunk in samples["key"].cast(pa.large_binary()).chunks:
        _, ends, data = chunk.buffers()
        if len(chunk) and data is not None:
            first, last = np.frombuffer(ends, np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
            hasher.update(memoryview(data)[first:last])
    columns: list[npt.NDArray[Any]] = [
        _integers(pc.binary_length(samples["key"])),
        _integers(pc.list_value_length(samples["text_lengths"])),
        held_out,
    ]
    columns += [_integers(samples[name]) for name in ("bucket_width", "bucket_height")]
    # As integers where they are whole, whatever the column's type.
    is_whole = pc.all(pc.equal(samples["repeats"], pc.floor(samples["repeats"]))).as_py() is not False
    columns.append(_integers(samples["repeats"]) if is_whole else samples["repeats"].to_numpy())
    if by_length:
        columns.append(_integers(pc.list_flatten(samples["text_lengths"])))
    if config.class_ratio is not None:
        columns.append(is_class_S)
    if (sizes := _reference_sizes(samples)) is not None:
        hasher.update(storage.json_bytes(sizes.to_pylist()))
    for column in columns:
        hasher.update(np.ascontiguousarray(column).view(np.uint8).data)
    return hasher.hexdigest()[:32]


def _integers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    values: npt.NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
    return values


def _equals(column: pa.ChunkedArray, value: str) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.equal(column, pa.scalar(value)).to_numpy(), dtype=np.bool_)


def _codes(values: Integers) -> tuple[Integers, int]:
    """Equal values as equal numbers, in the order of the values; and how many values there are."""
    indices, distinct = held_out.encoded(values)
    rank = np.empty(len(distinct), np.int32)
    rank[np.argsort(distinct)] = np.arange(len(rank), dtype=np.int32)
    return rank[indices], len(rank)


def _counted(counts: Integers) -> Integers:
    """0, 1, ... count-1 for each of the counts, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _words(length: int, *key: object) -> Words:
    """Raw words of Philox that depend on the key alone.

    NumPy keeps a bit generator's raw stream stable between versions; of `Generator.permutation` it promises nothing.
    """
    words: Words = np.random.Philox(key=int(storage.digest(list(key)), 16)).random_raw(length)
    return words


def _smallest(words: Words, count: int) -> npt.NDArray[np.int64]:
    """The places of the smallest `count` words, or of all if there are fewer; the smallest first."""
    places = np.argpartition(words, count)[:count] if count < len(words) else np.arange(len(words))
    return places[np.argsort(words[places], kind="stable")]


def share(micro_batches: Sequence[MicroBatch], rank: int, world_size: int) -> list[tuple[int, MicroBatch]]:
    """What rank r computes of a step, as (number in the step, micro-batch): every world-th; shares may be uneven or empty."""
    return list(enumerate(micro_batches))[rank::world_size]


def keyed_permutation(length: int, *key: object) -> npt.NDArray[np.int64]:
    """A permutation of range(length) that depends on the key alone: by the sort order of raw words."""
    return np.argsort(_words(length, *key), kind="stable")


def keyed_seed(*key: object) -> int:
    """A 63-bit seed that depends on the key alone."""
    return int(storage.digest(list(key), 16), 16) >> 1
