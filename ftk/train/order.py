"""Which sample when, and with which random numbers: a pure function of (seed, index). No loader state, no RNG state.

Each epoch permutes every group (samples of one bucket and one list of reference sizes, and where it is asked for of one text
length) under a key, cuts it into micro-batches of one
group, and shuffles those. Epochs follow each other without a seam; a step is the next `global_batch_size /
micro_batch_size` micro-batches, and rank r takes every world-th of them: another number of processes changes who computes,
not what is computed.

All is kept in arrays, and a `Draw` is made only when it is asked for: a million samples open in a second.

Shape legend: S samples, U uses of samples, E epochs, P uses in an epoch (places), G groups, N micro-batches in an epoch.
"""

from collections.abc import Sequence
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
"""About how many numbers are made at once where any number of epochs can be."""
_PERMUTED_AT_ONCE = 2**16
EMPTY_CAPTION = -1


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
    """The sequence of micro-batches.

    Where micro-batches are grouped by text length, or class images come at a ratio, epochs may differ a little in their
    number of micro-batches; `micro_batches_an_epoch`, `samples_an_epoch` and the counts of remainders are then those of
    the first epoch.

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
        self.micro_batch_size = config.micro_batch_size
        self.micro_batches_a_step = config.global_batch_size // config.micro_batch_size
        self.remainder = config.remainder
        self._repeats_S = _integers(samples["repeats"])
        self._uses = _uses(self._repeats_S, is_class_S, self.held_out, config)
        self._captions = _captions(samples, config, empty_length)
        self._varies = self._captions.varies or self._uses.varies
        self.fingerprint = _fingerprint(samples, self.held_out, is_class_S, config, empty_length)
        self._count_first_epoch()
        self._starts = np.zeros(1, np.int64)
        self._most_epochs = max(1, _BLOCK // max(self._uses.num_an_epoch, self._captions.num_groups))
        self._epoch = lru_cache(maxsize=min(64, max(2, self._most_epochs)))(self._plan_epoch)

    def shape_of(self, sample: int) -> int:
        """A number for the shape of a sample's tensors: its bucket, and the sizes of its references."""
        return int(self._captions.bucket_S[sample])

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, counted from 0."""
        first = step * self.micro_batches_a_step
        return [self.micro_batch(index) for index in range(first, first + self.micro_batches_a_step)]

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch at an index of the endless sequence."""
        number, position = self._locate(index)
        epoch = self._epoch(number)
        places, copies = epoch.places(position, self.micro_batch_size, is_filled=self.remainder == "fill")
        sample, repeat, caption = (column[places] for column in (epoch.sample_P, epoch.repeat_P, epoch.caption_P))
        # The repeat numbers of copies start behind those of all ordinary uses, so a copy gets noise of its own.
        repeat = repeat + copies * epoch.num_turns * self._repeats_S[sample]
        columns = (sample.tolist(), repeat.tolist(), caption.tolist())
        return tuple(Draw(epoch=number, sample=s, repeat=r, caption=c) for s, r, c in zip(*columns, strict=True))

    def _count_first_epoch(self) -> None:
        size, counts_G = self.micro_batch_size, self._counts(0, 1)[0]
        left_G = counts_G % size
        self.num_dropped = int(left_G.sum()) if self.remainder == "drop" else 0
        self.num_filled = int((size - left_G[left_G > 0]).sum()) if self.remainder == "fill" else 0
        self.num_smaller = int((left_G > 0).sum()) if self.remainder == "smaller" else 0
        self.samples_an_epoch = self._uses.num_an_epoch - self.num_dropped + self.num_filled
        self.micro_batches_an_epoch = int(self._cut(counts_G).sum())
        if not self.micro_batches_an_epoch:
            group = "bucket" if self._captions.slot_group is None else "bucket and text length (train.group_by)"
            raise ConfigError(
                f"train.remainder: drop leaves nothing: no {group} holds {size} samples (train.micro_batch_size). "
                f"The largest holds {counts_G.max(initial=0)}. Use smaller or fill."
            )

    def _cut(self, counts_G: Integers) -> Integers:
        """Into how many micro-batches groups of these sizes are cut, any shape."""
        whole = counts_G // self.micro_batch_size
        return whole if self.remainder == "drop" else whole + (counts_G % self.micro_batch_size > 0)

    def _locate(self, index: int) -> tuple[int, int]:
        """The epoch of a micro-batch, and its position there."""
        if not self._varies:
            return divmod(index, self.micro_batches_an_epoch)
        starts = self._starts
        while starts[-1] <= index:
            # Doubled each time, so that neither the first step nor a late one waits for epochs one by one.
            first = len(starts) - 1
            counts_E = self._cut(self._counts(first, first + min(self._most_epochs, first + 1))).sum(1)
            starts = np.concatenate([starts, starts[-1] + np.cumsum(counts_E)])
            # Replaced, not changed: another thread may be reading it.
            self._starts = starts
        epoch = int(np.searchsorted(starts, index, side="right")) - 1
        return epoch, index - int(starts[epoch])

    def _counts(self, first: int, last: int) -> Integers:
        """[E,G]: uses in each group, of epochs first..last-1."""
        _, group_EP = self._draw_captions(self._uses.of(first, last), first)
        num_groups = self._captions.num_groups
        cells = group_EP + num_groups * np.arange(last - first)[:, None]
        return np.bincount(cells.ravel(), minlength=num_groups * (last - first)).reshape(-1, num_groups)

    def _draw_captions(self, use_EP: Integers, first: int) -> tuple[Integers, Integers]:
        """[E,P] captions, and [E,P] groups, of the uses in the epochs from `first`."""
        sample_EP = self._uses.sample_U[use_EP]
        words_EP = _words(first, use_EP.shape, self.seed, "captions") if self._captions.is_drawn else None
        caption_EP = self._captions.draw(sample_EP, words_EP)
        return caption_EP, self._captions.group(sample_EP, caption_EP)

    def _plan_epoch(self, epoch: int) -> "_Epoch":
        use_EP = self._uses.of(epoch, epoch + 1)
        caption_P, group_P = (array[0] for array in self._draw_captions(use_EP, epoch))
        # Sorted by group, and by random words within: one sort permutes every group.
        bits = np.uint64(self._captions.num_groups.bit_length())
        words_P = _words(epoch, use_EP.shape, self.seed, "groups")[0] >> bits
        order_P = np.argsort((group_P.astype(np.uint64) << (np.uint64(64) - bits)) | words_P, kind="stable")
        counts_G = np.bincount(group_P, minlength=self._captions.num_groups)
        bound_G = np.concatenate([[0], np.cumsum(counts_G)])
        batches_G = self._cut(counts_G)
        group_N = np.repeat(np.arange(len(counts_G)), batches_G)
        start_N = bound_G[group_N] + self.micro_batch_size * _counted(batches_G)
        shuffled_N = keyed_permutation(len(group_N), self.seed, epoch, "micro-batches")
        sample_P = self._uses.sample_U[use_EP[0]]
        turn_P = self._uses.turns(epoch)
        repeat_P = self._uses.repeat_U[use_EP[0]] + turn_P * self._repeats_S[sample_P]
        return _Epoch(
            sample_P=sample_P[order_P],
            repeat_P=repeat_P[order_P].astype(np.int32),
            caption_P=caption_P[order_P],
            num_turns=int(turn_P.max(initial=0)) + 1,
            start_N=start_N[shuffled_N].astype(np.int32),
            group_N=group_N[shuffled_N].astype(np.int32),
            bound_G=bound_G,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """The uses of an epoch, group by group, and where its micro-batches start.

    `bound_G` [G+1] is where groups start and end; `num_turns` how often class uses may come.
    """

    sample_P: Integers
    repeat_P: Integers
    caption_P: Integers
    num_turns: int
    start_N: Integers
    group_N: Integers
    bound_G: Integers

    def places(self, position: int, size: int, *, is_filled: bool) -> tuple[Integers, Integers]:
        """The places of a micro-batch, and of each the how-manieth copy of its use it is; 0 is the use itself."""
        first, start = self.bound_G[self.group_N[position]], self.start_N[position]
        end = min(start + size, self.bound_G[self.group_N[position] + 1])
        own = np.arange(start, end)
        missing = np.arange(size - len(own) if is_filled else 0)
        fill = first + missing % (end - first)
        return np.concatenate([own, fill]), np.concatenate([np.zeros_like(own), 1 + missing // (end - first)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uses:
    """All uses of samples. An epoch has the first `num_always` of them, and the next `num_class` of an endless row.

    That row holds one keyed permutation of the other uses after the other, so all come equally often over the epochs.
    """

    sample_U: Integers
    repeat_U: Integers
    num_always: int
    num_class: int
    seed: int

    @property
    def num_an_epoch(self) -> int:
        """P."""
        return self.num_always + self.num_class

    @property
    def num_others(self) -> int:
        """How long a permutation of the endless row is."""
        return len(self.sample_U) - self.num_always

    @property
    def varies(self) -> bool:
        """Whether epochs differ in their uses."""
        return bool(self.num_class) and self.num_class % self.num_others > 0

    def of(self, first: int, last: int) -> Integers:
        """[E,P]: the uses of epochs first..last-1, in a fixed order of their places."""
        always_EP = np.broadcast_to(np.arange(self.num_always), (last - first, self.num_always))
        if not self.num_class:
            return always_EP
        row_EP = self._row(first * self.num_class, last * self.num_class).reshape(last - first, self.num_class)
        return np.concatenate([always_EP, row_EP], axis=1)

    def turns(self, epoch: int) -> Integers:
        """[P]: of each place, how many permutations before its own the epoch has begun."""
        row = np.arange(epoch * self.num_class, (epoch + 1) * self.num_class) // max(1, self.num_others)
        return np.concatenate([np.zeros(self.num_always, np.int64), row - row[:1]])

    def _row(self, first: int, last: int) -> Integers:
        at_once = max(1, _PERMUTED_AT_ONCE // self.num_others)
        length = at_once * self.num_others
        parts = []
        for block in range(first // length, (last - 1) // length + 1):
            whole = _permutations(block * at_once, at_once, self.num_others, self.seed)
            parts.append(self.num_always + whole[max(0, first - block * length) : last - block * length])
        return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutations(first: int, count: int, length: int, seed: int) -> Integers:
    """`count` permutations of range(length), one after the other, from the first-th on."""
    return np.argsort(_words(first, (count, length), seed, "class images"), axis=1, kind="stable").astype(np.int32).ravel()


def _uses(repeats_S: Integers, is_class_S: npt.NDArray[np.bool_], held_out: Integers, config: TrainConfig) -> _Uses:
    left_S = repeats_S.copy()
    left_S[held_out] = 0
    sample_U, repeat_U = np.repeat(np.arange(len(left_S), dtype=np.int32), left_S), _counted(left_S).astype(np.int32)
    if config.class_ratio is None:
        return _Uses(sample_U=sample_U, repeat_U=repeat_U, num_always=len(sample_U), num_class=0, seed=config.seed)
    instances_first = np.argsort(is_class_S[sample_U], kind="stable")
    num_instance = int(left_S[~is_class_S].sum())
    for what, number in (("instance", num_instance), ("class", len(sample_U) - num_instance)):
        if not number:
            raise ConfigError(
                f"train.class_ratio {config.class_ratio:g}: the cache holds no {what} images. "
                f"Set `role: {what}` on a source in data.sources, or leave train.class_ratio out."
            )
    num_class = round(config.class_ratio * num_instance)
    if not num_class:
        raise ConfigError(
            f"train.class_ratio {config.class_ratio:g}: an epoch of {num_instance} uses of instance images would have no "
            f"class image. Raise it to {1 / num_instance:.2g} or more, or leave it out."
        )
    return _Uses(
        sample_U=sample_U[instances_first],
        repeat_U=repeat_U[instances_first],
        num_always=num_instance,
        num_class=num_class,
        seed=config.seed,
    )


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

    @property
    def varies(self) -> bool:
        """Whether the group of a use differs between epochs."""
        return self.slot_group is not None and self.is_drawn and self.dropout < 1

    def draw(self, sample_EP: Integers, words_EP: Words | None) -> Integers:
        """The caption of each use: of a word, one half says whether it is dropped, the other half which it is."""
        num_EP = self.num_S[sample_EP]
        if words_EP is None:
            return num_EP - 1  # one caption, or none
        half = np.uint64(32)
        caption_EP = ((words_EP >> half) * num_EP.astype(np.uint64) >> half).astype(np.int32)
        is_kept_EP = (words_EP & np.uint64(2**32 - 1)) >= np.uint64(round(self.dropout * 2**32))
        return np.where(is_kept_EP & (num_EP > 0), caption_EP, np.int32(EMPTY_CAPTION))

    def group(self, sample_EP: Integers, caption_EP: Integers) -> Integers:
        """The group of each use."""
        if self.slot_group is None:
            return self.bucket_S[sample_EP]
        slot_EP: Integers = self.slot_S[sample_EP] + 1 + caption_EP
        return self.slot_group[slot_EP]


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
        include={"seed", "global_batch_size", "micro_batch_size", "remainder", "group_by", "class_ratio", "caption_dropout"},
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
    columns += [_integers(samples[name]) for name in ("bucket_width", "bucket_height", "repeats")]
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


def _words(first: int, shape: Sequence[int], *key: object) -> Words:
    """`shape` [E,P]: raw words of Philox, row e from a part of the key's stream that is that of row `first` + e alone.

    Rows of one stream, not streams of their own: any number of epochs takes one call.
    """
    num_rows, length = shape
    blocks_a_row = -(-length // 4)  # Philox makes 4 words for each value of its counter
    philox = np.random.Philox(key=int(storage.digest(list(key)), 16), counter=first * blocks_a_row)
    words: Words = philox.random_raw(num_rows * blocks_a_row * 4).reshape(num_rows, -1)[:, :length]
    return words


def share(micro_batches: Sequence[MicroBatch], rank: int, world_size: int) -> list[tuple[int, MicroBatch]]:
    """What rank r computes of a step, as (number in the step, micro-batch): every world-th; shares may be uneven or empty."""
    return list(enumerate(micro_batches))[rank::world_size]


def keyed_permutation(length: int, *key: object) -> npt.NDArray[np.int64]:
    """A permutation of range(length) that depends on the key alone: by the sort order of Philox's raw words.

    NumPy keeps a bit generator's raw stream stable between versions; of `Generator.permutation` it promises nothing.
    """
    words = np.random.Philox(key=int(storage.digest(list(key)), 16)).random_raw(length)
    return np.argsort(words, kind="stable")


def keyed_seed(*key: object) -> int:
    """A 63-bit seed that depends on the key alone."""
    return int(storage.digest(list(key), 16), 16) >> 1
