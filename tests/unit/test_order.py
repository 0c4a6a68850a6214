import itertools
import os
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from counting import steps_of
from pydantic import ValidationError

from ftk import storage
from ftk.cache.view import SAMPLE_SCHEMA
from ftk.configs.schema import TrainConfig
from ftk.errors import CacheError, ConfigError
from ftk.pipeline.shard_writer import sample_key
from ftk.train.order import EMPTY_CAPTION, Order, keyed_permutation, keyed_seed, share

EMPTY_LENGTH = 5


def row(number, **changes):
    """A sample as `ftk cache` lists it: one caption, one bucket, an image of its own."""
    plain = {
        "key": f"s{number}",
        "latents": f"latents-{number}",
        "controls": [],
        "mask": "",
        "text_lengths": [10],
        "width": 640,
        "height": 480,
        "bucket_width": 256,
        "bucket_height": 256,
        "resize_width": 256,
        "resize_height": 256,
        "crop_x": 0,
        "crop_y": 0,
        "flipped": False,
        "repeats": 1,
        "role": "instance",
    }
    merged = {**plain, **changes}
    return {"texts": [f"caption-{number}"] * len(merged["text_lengths"]), **merged}


def table_of(rows):
    table = pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)
    # As the cache's reader gives it.
    return table.set_column(table.column_names.index("role"), "role", table["role"].dictionary_encode())


def eleven():
    """Bucket a has 7 uses, bucket b 6: the last sample comes three times."""
    buckets = [256] * 7 + [512] * 4
    return [row(i, bucket_width=buckets[i], repeats=3 if i == 10 else 1) for i in range(11)]


def make_order(rows=None, **changes):
    settings = {"seed": 3, "global_batch_size": 6, "micro_batch_size": 3, **changes}
    return Order(table_of(rows or eleven()), TrainConfig(**settings), empty_length=EMPTY_LENGTH)


def epoch_of(order, epoch):
    """All micro-batches of an epoch, whatever their number."""
    first = next(index for index in itertools.count() if order.micro_batch(index)[0].epoch == epoch)
    return list(itertools.takewhile(lambda batch: batch[0].epoch == epoch, map(order.micro_batch, itertools.count(first))))


def draws_of(order, epoch):
    return [draw for batch in epoch_of(order, epoch) for draw in batch]


def draws_before(order, epoch):
    batches = itertools.takewhile(lambda batch: batch[0].epoch < epoch, map(order.micro_batch, itertools.count()))
    return [draw for batch in batches for draw in batch]


# The sequence once more, in plain Python: one use at a time, every list written out.


class Reference:
    def __init__(self, rows, **settings):
        config = TrainConfig(**settings)
        self.rows, self.config, self.seed = rows, config, config.seed
        uses = [(sample, repeat) for sample, each in enumerate(rows) for repeat in range(each["repeats"])]
        self.always, self.others, self.num_class = uses, [], 0
        if config.class_ratio is not None:
            self.always = [use for use in uses if rows[use[0]]["role"] == "instance"]
            self.others = [use for use in uses if rows[use[0]]["role"] == "class"]
            self.num_class = round(config.class_ratio * len(self.always))

    def word(self, purpose, row, place, length):
        words = np.random.Philox(key=int(storage.digest([self.seed, purpose]), 16))
        blocks = (length + 3) // 4
        return int(words.random_raw((row + 1) * blocks * 4)[row * blocks * 4 + place])

    def uses(self, epoch):
        """(sample, repeat number), and how many permutations of the class uses the epoch took part of."""
        found, first = list(self.always), epoch * self.num_class
        turns = [position // len(self.others) for position in range(first, first + self.num_class)]
        for position, turn in zip(range(first, first + self.num_class), turns, strict=True):
            words = [self.word("class images", turn, i, len(self.others)) for i in range(len(self.others))]
            sample, repeat = self.others[sorted(range(len(words)), key=words.__getitem__)[position % len(self.others)]]
            found.append((sample, repeat + self.rows[sample]["repeats"] * (turn - turns[0])))
        return found, turns[-1] - turns[0] + 1 if turns else 1

    def caption(self, sample, epoch, place, length):
        number = len(self.rows[sample]["text_lengths"])
        if self.config.caption_dropout == 0 and all(len(each["text_lengths"]) == 1 for each in self.rows):
            return 0
        word = self.word("captions", epoch, place, length)
        is_dropped = word % 2**32 < round(self.config.caption_dropout * 2**32)
        return EMPTY_CAPTION if is_dropped else (word // 2**32) * number // 2**32

    def group(self, sample, caption):
        each = self.rows[sample]
        length = each["text_lengths"][caption] if caption >= 0 else EMPTY_LENGTH
        by_length = self.config.group_by == "text_length"
        return each["bucket_width"], each["bucket_height"], length if by_length else 0

    def epoch(self, epoch):
        uses, turns = self.uses(epoch)
        groups = defaultdict(list)
        for place, (sample, repeat) in enumerate(uses):
            caption = self.caption(sample, epoch, place, len(uses))
            word = self.word("groups", epoch, place, len(uses))
            groups[self.group(sample, caption)].append((word, (sample, repeat, caption)))
        batches = []
        for name in sorted(groups):
            shuffled = [use for _, use in sorted(groups[name])]
            batches += self.cut(shuffled, turns)
        shuffled = keyed_permutation(len(batches), self.seed, epoch, "micro-batches")
        return [[(epoch, *batches[number][i]) for i in range(len(batches[number]))] for number in shuffled]

    def cut(self, uses, turns):
        size = self.config.micro_batch_size
        batches = [uses[start : start + size] for start in range(0, len(uses), size)]
        if len(batches[-1]) == size or self.config.remainder == "smaller":
            return batches
        if self.config.remainder == "drop":
            return batches[:-1]
        for turn in range(size - len(batches[-1])):
            sample, repeat, caption = uses[turn % len(uses)]
            own = self.rows[sample]["repeats"] * turns
            batches[-1] = [*batches[-1], (sample, repeat + own * (1 + turn // len(uses)), caption)]
        return batches


def random_rows(random):
    rows = []
    for number in range(int(random.integers(4, 14))):
        lengths = [int(length) for length in random.integers(4, 7, random.integers(1, 4))]
        role = "class" if number == 0 or (number > 1 and random.random() < 0.4) else "instance"
        size = {"bucket_width": int(random.choice([256, 512])), "bucket_height": int(random.choice([256, 512]))}
        rows.append(row(number, text_lengths=lengths, repeats=int(random.integers(1, 4)), role=role, **size))
    return rows


@pytest.mark.parametrize("case", range(24))
def test_the_sequence_is_that_of_a_plain_implementation(case):
    random = np.random.default_rng(case)
    micro = int(random.integers(1, 5))
    settings = {
        "seed": int(random.integers(0, 100)),
        "micro_batch_size": micro,
        "global_batch_size": micro * int(random.integers(1, 4)),
        "remainder": ["smaller", "fill", "drop"][case % 3],
        "group_by": ["bucket", "text_length"][case // 3 % 2],
        "class_ratio": [None, 0.7, None, 3.1][case // 6],
        "caption_dropout": float(random.choice([0, 0.3, 1])),
    }
    rows = random_rows(random)
    reference = Reference(rows, **settings)
    expected = [batch for epoch in range(5) for batch in reference.epoch(epoch)]
    try:
        order = make_order(rows, **settings)
    except ConfigError:
        assert not reference.epoch(0)
        return
    ours = [[(d.epoch, d.sample, d.repeat, d.caption) for d in order.micro_batch(i)] for i in range(len(expected))]
    assert ours == expected
    assert order.micro_batches_an_epoch == len(reference.epoch(0))
    assert order.samples_an_epoch == sum(len(batch) for batch in reference.epoch(0))


def test_every_use_of_every_sample_comes_once_an_epoch():
    for epoch in range(3):
        uses = Counter((draw.sample, draw.repeat) for draw in draws_of(make_order(), epoch))
        assert uses == Counter([(i, 0) for i in range(11)] + [(10, 1), (10, 2)])


def test_a_micro_batch_holds_one_bucket():
    for batch in epoch_of(make_order(), 0):
        assert len({draw.sample >= 7 for draw in batch}) == 1


def test_epochs_differ_and_equal_seeds_agree():
    assert epoch_of(make_order(), 0) == epoch_of(make_order(), 0)
    samples = [[draw.sample for draw in draws_of(make_order(), epoch)] for epoch in (0, 1)]
    assert samples[0] != samples[1]
    assert epoch_of(make_order(seed=4), 0) != epoch_of(make_order(), 0)


def test_order_within_an_epoch_does_not_repeat_in_later_epochs():
    order = make_order([row(i) for i in range(6)], micro_batch_size=6)
    seen = {tuple(draw.sample for draw in order.micro_batch(epoch)) for epoch in range(100)}
    assert len(seen) > 80


@pytest.mark.parametrize("settings", [{}, {"group_by": "text_length", "caption_dropout": 0.3}, {"class_ratio": 0.5}])
def test_any_index_can_be_asked_for_first(settings):
    rows = [row(i, text_lengths=[4, 5, 6], role="class" if i > 6 else "instance", bucket_width=256 + i) for i in range(11)]
    order, late = make_order(rows, **settings), make_order(rows, **settings)
    whole = [order.micro_batch(index) for index in range(200)]
    assert [late.micro_batch(index) for index in reversed(range(200))][::-1] == whole
    assert [batch for step in range(100) for batch in late.step(step)] == whole
    epochs = [batch[0].epoch for batch in whole]
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_change_of_world_size_changes_who_computes_and_not_what(world_size):
    order = make_order(global_batch_size=15)
    for step in range(5):
        parts = [share(order.step(step), rank, world_size) for rank in range(world_size)]
        assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
        assert [batch for _, batch in sorted(itertools.chain(*parts), key=lambda pair: pair[0])] == order.step(step)


def test_remainder_policies_are_counted():
    smaller, drop, fill = (make_order(remainder=policy) for policy in ("smaller", "drop", "fill"))
    # bucket a has 7 uses (remainder 1), bucket b 6
    assert (smaller.num_smaller, drop.num_dropped, fill.num_filled) == (1, 1, 2)
    assert (smaller.samples_an_epoch, drop.samples_an_epoch, fill.samples_an_epoch) == (13, 12, 15)
    for order in (smaller, drop, fill):
        assert len(draws_of(order, 1)) == order.samples_an_epoch
        assert len(epoch_of(order, 1)) == order.micro_batches_an_epoch
    assert {len(batch) for order in (drop, fill) for batch in epoch_of(order, 0)} == {3}


@pytest.mark.parametrize("settings", [{}, {"group_by": "text_length"}, {"class_ratio": 2.0}])
def test_a_filler_has_random_numbers_of_its_own(settings):
    rows = [row(i, text_lengths=[4, 5, 6], repeats=1 + i, role="class" if i > 2 else "instance") for i in range(5)]
    order = make_order(rows, remainder="fill", micro_batch_size=7, global_batch_size=7, **settings)
    assert order.num_filled
    for epoch in range(6):
        draws = draws_of(order, epoch)
        assert {len(batch) for batch in epoch_of(order, epoch)} == {7}
        assert len({(draw.sample, draw.repeat) for draw in draws}) == len(draws)


def test_dropping_everything_is_refused():
    with pytest.raises(ConfigError, match=r"drop leaves nothing.*largest holds 7"):
        make_order(remainder="drop", micro_batch_size=12, global_batch_size=12)


def test_doubled_keys_are_refused():
    with pytest.raises(CacheError, match="s1 more than once"):
        make_order([row(0), row(1), row(2, key="s1")])


def test_captions_are_chosen_evenly_and_dropped_at_their_rate():
    rows = [row(i, text_lengths=[4] * (1 + i % 3)) for i in range(30)]
    plain, dropping = make_order(rows), make_order(rows, caption_dropout=0.25)
    chosen = Counter((draw.sample % 3, draw.caption) for draw in draws_before(plain, 100))
    kept = Counter(draw.caption != EMPTY_CAPTION for draw in draws_before(dropping, 100))
    assert set(chosen) == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert chosen[1, 0] / 1000 == pytest.approx(0.5, abs=0.06)
    assert chosen[2, 1] / 1000 == pytest.approx(1 / 3, abs=0.06)
    assert kept[False] / 3000 == pytest.approx(0.25, abs=0.03)
    assert {draw.caption for draw in draws_of(make_order(caption_dropout=1.0), 0)} == {EMPTY_CAPTION}


def test_a_caption_hangs_on_seed_epoch_sample_and_use_alone():
    rows = [row(i, text_lengths=[4, 5, 6], repeats=2, bucket_width=256 + 64 * (i % 2)) for i in range(20)]
    captions = [
        {(draw.sample, draw.repeat): draw.caption for draw in draws_of(make_order(rows, **settings), 2)}
        for settings in ({}, {"micro_batch_size": 2}, {"group_by": "text_length"}, {"seed": 4})
    ]
    assert captions[0] == captions[1] == captions[2] != captions[3]


def test_groups_by_text_length_need_no_mask():
    rows = [row(i, text_lengths=[4 + i % 3, 9], bucket_width=256 + 256 * (i % 2)) for i in range(40)]
    order = make_order(rows, group_by="text_length", caption_dropout=0.2)
    sizes = set()
    for epoch in range(20):
        batches = epoch_of(order, epoch)
        sizes.add(len(batches))
        for batch in batches:
            drawn = {
                (rows[d.sample]["text_lengths"][d.caption] if d.caption >= 0 else EMPTY_LENGTH, d.sample % 2) for d in batch
            }
            assert len(drawn) == 1
        assert Counter(draw.sample for batch in batches for draw in batch) == Counter(range(40))
    # Epochs differ in their number of micro-batches, and are found nevertheless.
    assert len(sizes) > 1


def with_classes(num_instance, num_class, repeats=1):
    instance = [row(i, repeats=2) for i in range(num_instance)]
    return instance + [row(num_instance + i, role="class", repeats=repeats) for i in range(num_class)]


@pytest.mark.parametrize(("ratio", "num_class"), [(1.0, 50), (0.3, 7), (2.0, 3), (0.5, 5)])
def test_class_images_come_at_their_ratio_and_equally_often(ratio, num_class):
    order = make_order(with_classes(5, num_class), class_ratio=ratio)
    assert order.samples_an_epoch == 10 + round(10 * ratio)
    counts = Counter()
    for epoch in range(50):
        draws = draws_of(order, epoch)
        assert Counter(draw.sample for draw in draws if draw.sample < 5) == dict.fromkeys(range(5), 2)
        assert sum(draw.sample >= 5 for draw in draws) == round(10 * ratio)
        assert len({(draw.sample, draw.repeat) for draw in draws}) == len(draws)
        counts.update(draw.sample for draw in draws if draw.sample >= 5)
    assert len(counts) == num_class
    assert max(counts.values()) - min(counts.values()) <= 1


def test_class_images_come_by_their_repeats_without_a_ratio():
    draws = draws_of(make_order(with_classes(2, 3, repeats=4)), 1)
    assert Counter(draw.sample for draw in draws) == {0: 2, 1: 2, 2: 4, 3: 4, 4: 4}


@pytest.mark.parametrize(
    ("rows", "ratio", "message"),
    [
        (with_classes(3, 0), 1.0, "no class images"),
        (with_classes(0, 3), 1.0, "no instance images"),
        (with_classes(3, 3), 0.01, r"Raise it to 0\.17"),
    ],
)
def test_a_ratio_that_cannot_be_kept_is_refused(rows, ratio, message):
    with pytest.raises(ConfigError, match=message):
        make_order(rows, class_ratio=ratio)


def variants_of(number, name, first):
    """Both mirror images of a photo in two sizes, as `ftk prepare` calls them, with captions shuffled for each."""
    places = [(size, size, flipped, 0) for size in (256, 512) for flipped in (0, 1)]
    return [
        row(
            first + i,
            key=sample_key("photos", name, place),
            latents=f"{number}-{place}",
            bucket_width=place[0],
            texts=[f"photo {number}", f"shuffled {number} {place}"],
            text_lengths=[5, 5],
        )
        for i, place in enumerate(places)
    ]


def test_held_out_images_are_never_drawn_and_keep_their_variants_together():
    rows = [each for number in range(20) for each in variants_of(number, f"scenes/{number:03}.jpg", 4 * number)]
    order = make_order(rows, validation={"share": 0.25})
    assert len(order.held_out) == 20
    assert order.held_out.dtype == np.int64
    images = [sample // 4 for sample in order.held_out.tolist()]
    # One image after the other, in an order of chance.
    assert [image for image, _ in itertools.groupby(images)] == list(dict.fromkeys(images))
    assert images != sorted(images)
    assert set(Counter(sample // 4 for sample in order.held_out.tolist()).values()) == {4}
    drawn = {draw.sample for epoch in range(3) for draw in draws_of(order, epoch)}
    assert drawn == set(range(80)) - set(order.held_out.tolist())
    assert order.samples_an_epoch == 60
    assert not len(make_order(rows).held_out)


def test_files_with_equal_bytes_are_held_out_together():
    rows = [
        row(i, key=sample_key("photos", f"{'ab'[i % 2]}/{i}.jpg", (256, 256, 0, 0)), latents=f"latents-{i // 2}")
        for i in range(40)
    ]
    for seed in range(5):
        held_out = make_order(rows, seed=seed, validation={"share": 0.3}).held_out.tolist()
        assert len(held_out) == 12
        assert all(sample ^ 1 in held_out for sample in held_out)


def test_what_is_held_out_hangs_on_seed_and_names_and_not_on_the_order():
    rows = [each for number in range(30) for each in variants_of(number, f"{number}.jpg", 4 * number)]
    mixed = [rows[i] for i in keyed_permutation(len(rows), "any")]
    held_out = [
        {these[sample]["key"] for sample in make_order(these, seed=seed, validation={"share": 0.2}).held_out.tolist()}
        for these, seed in ((rows, 3), (mixed, 3), (rows, 4))
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_at_least_one_image_is_held_out_and_never_a_class_image():
    for seed in range(10):
        order = make_order(with_classes(3, 200), seed=seed, validation={"share": 0.01})
        assert len(order.held_out) == 1
        assert order.held_out[0] < 3


def test_holding_everything_out_is_refused():
    with pytest.raises(ConfigError, match="leaves nothing to train on: of 1 images"):
        make_order(with_classes(1, 5), validation={"share": 0.1})
    with pytest.raises(ValidationError):
        TrainConfig(validation={"share": 0.6})


def test_the_fingerprint_sees_all_that_changes_the_sequence():
    rows = with_classes(6, 5)
    lengths = [{**each, "text_lengths": [10, 11], "texts": ["a", "b"]} for each in rows]
    changes = [
        (rows, {}),
        (rows, {"seed": 4}),
        (rows, {"micro_batch_size": 2}),
        (rows, {"global_batch_size": 12}),
        (rows, {"remainder": "drop"}),
        (rows, {"group_by": "text_length"}),
        (rows, {"class_ratio": 1.0}),
        (rows, {"class_ratio": 2.0}),
        (rows, {"caption_dropout": 0.1}),
        (rows, {"validation": {"share": 0.2}}),
        (rows, {"validation": {"share": 0.4}}),
        (lengths, {}),
        (lengths, {"group_by": "text_length"}),
        ([*rows[:-1], {**rows[-1], "key": "other"}], {}),
        ([*rows[:-1], {**rows[-1], "repeats": 2}], {}),
        ([*rows[:-1], {**rows[-1], "bucket_width": 512}], {}),
        ([*rows[:-1], {**rows[-1], "bucket_height": 512}], {}),
        ([*rows[:-1], {**rows[-1], "text_lengths": [11]}], {"group_by": "text_length"}),
        ([*rows[:-1], {**rows[-1], "role": "instance"}], {"class_ratio": 1.0}),
        (rows[::-1], {}),
    ]
    assert len({make_order(these, **settings).fingerprint for these, settings in changes}) == len(changes)
    assert make_order(rows).fingerprint == make_order(rows, learning_rate=1.0, steps=7).fingerprint


@pytest.mark.parametrize("settings", [{}, {"group_by": "text_length", "class_ratio": 1.0, "validation": {"share": 0.2}}])
def test_chunks_of_the_table_make_no_difference(settings):
    table = table_of([{**each, "key": f"k{i}" * (1 + i % 3)} for i, each in enumerate(with_classes(6, 5))])
    wide = table.set_column(0, "key", table["key"].cast(pa.large_string()))
    config = TrainConfig(seed=3, **settings)
    whole = Order(table, config, empty_length=EMPTY_LENGTH)
    for these in (table, wide):
        chunked = pa.concat_tables([these.slice(0, 3), these.slice(3, 0), these.slice(3, 1), these.slice(4)])
        parts = Order(chunked, config, empty_length=EMPTY_LENGTH)
        assert whole.fingerprint == parts.fingerprint
        assert [whole.micro_batch(i) for i in range(50)] == [parts.micro_batch(i) for i in range(50)]


def test_a_late_step_of_a_small_dataset_is_found_at_once():
    """A hundred times as late a step is not a hundred times as much work: epochs are not passed one by one."""
    rows = [row(i, text_lengths=[4, 5, 6, 7], role="class" if i > 15 else "instance") for i in range(24)]
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "group_by": "text_length", "class_ratio": 0.4}
    early, late = make_order(rows, **settings), make_order(rows, **settings)
    assert steps_of(lambda: late.step(30_000)) < 4 * steps_of(lambda: early.step(300))
    assert late.step(1_000_000)[0][0].epoch > 50_000


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def million():
    count = 1_000_000
    random = np.random.default_rng(0)
    columns = {
        "key": pa.array([f"folder-of-photos-{number:07}-{number * 2654435761 % 2**48:012x}" for number in range(count)]),
        "bucket_width": pa.array(random.integers(8, 16, count) * 64, pa.int32()),
        "bucket_height": pa.array(random.integers(8, 16, count) * 64, pa.int32()),
        "repeats": pa.array(np.ones(count, np.int32)),
        "role": pa.array(np.full(count, "instance")).dictionary_encode(),
        "text_lengths": pa.FixedSizeListArray.from_arrays(
            pa.array(random.integers(20, 512, 2 * count), pa.int32()), 2
        ).cast(pa.list_(pa.int32())),
    }  # fmt: skip
    return pa.table(columns)


@pytest.mark.parametrize("group_by", ["bucket", "text_length"])
def test_a_million_samples_take_little_memory_and_little_work_for_each(group_by):
    table = million()
    config = TrainConfig(global_batch_size=8, micro_batch_size=4, group_by=group_by)

    def open_and_take_a_step(num_samples):
        order = Order(table.slice(0, num_samples), config, empty_length=EMPTY_LENGTH)
        assert len(order.step(0)) == 2
        return order

    before = resident_bytes()
    order = open_and_take_a_step(len(table))
    assert resident_bytes() - before < 300e6
    assert order.samples_an_epoch == 1_000_000
    # 11 instructions, for the hash of a key; an object for each sample would take hundreds.
    instructions = steps_of(lambda: open_and_take_a_step(9_000)) - steps_of(lambda: open_and_take_a_step(1_000))
    assert instructions / 8_000 < 20


def test_a_keyed_permutation_is_one_and_is_pinned():
    assert sorted(keyed_permutation(1000, 1, "x").tolist()) == list(range(1000))
    # Pinned: another value here would silently change the order of every run that is resumed.
    assert keyed_permutation(8, 7, 0, "256x256").tolist() == [0, 7, 1, 6, 3, 5, 2, 4]
    assert keyed_seed(7, 0, "key", 0, "noise") == 8308584601134556145


def test_permutations_are_uniform_enough():
    first = np.bincount([int(keyed_permutation(4, seed, "u")[0]) for seed in range(2000)], minlength=4)
    assert first.min() > 400


def test_the_sequence_is_pinned():
    rows = [row(i, text_lengths=[4, 5], repeats=1 + i % 2) for i in range(4)]
    draws = draws_of(make_order(rows, micro_batch_size=2, caption_dropout=0.2), 1)
    # Pinned: another value here would silently change the order of every run that is resumed.
    assert [(draw.sample, draw.repeat, draw.caption) for draw in draws] == [
        (0, 0, -1), (3, 1, 0), (3, 0, 1), (2, 0, 1), (1, 1, -1), (1, 0, 0),
    ]  # fmt: skip
