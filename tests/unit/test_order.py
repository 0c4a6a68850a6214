import itertools
import math
import os
from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from counting import steps_of
from pydantic import ValidationError

from ftk import storage
from ftk.cache import view
from ftk.configs.schema import TrainConfig
from ftk.errors import CacheError, ConfigError
from ftk.pipeline.shard_writer import sample_key
from ftk.train.order import EMPTY_CAPTION, ORDER_VERSION, Order, keyed_permutation, keyed_seed, share

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
    repeats = pa.int32() if all(isinstance(each["repeats"], int) for each in rows) else pa.float64()
    table = pa.Table.from_pylist(rows, schema=view.sample_schema(repeats, has_references=False))
    # As the cache's reader gives it.
    return table.set_column(table.column_names.index("role"), "role", table["role"].dictionary_encode())


def eleven():
    """Bucket a has 7 uses, bucket b 6: the last sample comes three times."""
    buckets = [256] * 7 + [512] * 4
    return [row(i, bucket_width=buckets[i], repeats=3 if i == 10 else 1) for i in range(11)]


def make_order(rows=None, **changes):
    settings = {"seed": 3, "global_batch_size": 6, "micro_batch_size": 3, **changes}
    return Order(table_of(rows or eleven()), TrainConfig(**settings), empty_length=EMPTY_LENGTH)


def steps_of_epoch(order, epoch):
    """All steps of an epoch."""
    return [order.step(epoch * order.steps_an_epoch + position) for position in range(order.steps_an_epoch)]


def draws_of(order, epoch):
    return [draw for step in steps_of_epoch(order, epoch) for batch in step for draw in batch]


def draws_before(order, epoch):
    return [draw for number in range(epoch) for draw in draws_of(order, number)]


def samples_of(step):
    """What a step trains on, however it is cut."""
    return Counter(draw for batch in step for draw in batch)


# The sequence once more, in plain Python: one use at a time, every list written out.


class Reference:
    def __init__(self, rows, **settings):
        config = TrainConfig(**settings)
        self.rows, self.config, self.seed = rows, config, config.seed
        uses = [(sample, repeat) for sample, each in enumerate(rows) for repeat in range(int(each["repeats"]))]
        self.always, self.others, self.num_class = uses, [], 0
        if config.class_ratio is not None:
            self.always = [use for use in uses if rows[use[0]]["role"] == "instance"]
            self.others = [use for use in uses if rows[use[0]]["role"] == "class"]
            mean = sum(each["repeats"] for each in rows if each["role"] == "instance")
            self.num_class = round(config.class_ratio * mean)

    def words(self, length, *key, first=0):
        random = np.random.Philox(key=int(storage.digest([self.seed, *key]), 16))
        return [int(word) for word in random.random_raw(first + length)[first:]]

    def class_use(self, position):
        """The use at a position of the endless row of class images, and which permutation it is of."""
        length = len(self.others)
        turn, place = divmod(position, length)
        block, number = divmod(turn, max(1, 2**16 // length))
        words = self.words(length, block, "class images", first=number * length)
        return self.others[keyed_order(words)[place]], turn

    def uses(self, epoch):
        """(sample, repeat number), and how many permutations of the class uses the epoch took part of."""
        drawn = [self.class_use(position) for position in range(epoch * self.num_class, (epoch + 1) * self.num_class)]
        turns = [turn - drawn[0][1] for _, turn in drawn]
        repeats = [self.rows[sample]["repeats"] * turn for ((sample, _), _), turn in zip(drawn, turns, strict=True)]
        found = [(sample, repeat + more) for ((sample, repeat), _), more in zip(drawn, repeats, strict=True)]
        return [*self.always, *self.taking_turns(epoch), *found], turns[-1] + 1 if turns else 1

    def taking_turns(self, epoch):
        """The uses by which repeats are more than whole: the next ones of a circle, as many as their share."""
        found = []
        for repeats in sorted({each["repeats"] for each in self.rows if each["repeats"] % 1}):
            members = [sample for sample, each in enumerate(self.rows) if each["repeats"] == repeats]
            circle = [members[place] for place in keyed_order(self.words(len(members), repeats, "turns"))]
            share = Fraction(str(repeats)) % 1 * len(members)
            drawn = range(math.ceil(epoch * share), math.ceil((epoch + 1) * share))
            found += [(circle[place % len(circle)], int(repeats)) for place in drawn]
        return found

    def caption(self, sample, word):
        number = len(self.rows[sample]["text_lengths"])
        if self.config.caption_dropout == 0 and all(len(each["text_lengths"]) == 1 for each in self.rows):
            return 0
        is_dropped = word % 2**32 < round(self.config.caption_dropout * 2**32)
        return EMPTY_CAPTION if is_dropped else (word // 2**32) * number // 2**32

    def group(self, use):
        sample, _, caption = use
        each = self.rows[sample]
        length = each["text_lengths"][caption] if caption >= 0 else EMPTY_LENGTH
        by_length = self.config.group_by == "text_length"
        return each["bucket_width"], each["bucket_height"], length if by_length else 0

    def groups(self):
        """All groups that any caption of a sample leads to."""
        captions = [(sample, 0, i) for sample, each in enumerate(self.rows) for i in range(-1, len(each["text_lengths"]))]
        return sorted({self.group(use) for use in captions})

    def epoch(self, epoch):
        """The steps of an epoch, each a list of (epoch, sample, repeat, caption)."""
        size = self.config.global_batch_size
        uses, turns = self.uses(epoch)
        caption_words = self.words(len(uses), epoch, "captions")
        place_words = self.words(len(uses), epoch, "places")
        uses = [(*use, self.caption(use[0], word)) for use, word in zip(uses, caption_words, strict=True)]
        by_chance = [use for _, use in sorted(zip(place_words, uses, strict=True))]
        num_last = len(uses) % size
        last, others = by_chance[:num_last], by_chance[num_last:]
        whole, rest = [], []
        names = self.groups()
        ranks = keyed_order(self.words(len(names), epoch, "groups"))
        for _, name in sorted(zip(ranks, names, strict=True)):
            members = [use for use in others if self.group(use) == name]
            end = len(members) - len(members) % size
            whole += [members[start : start + size] for start in range(0, end, size)]
            rest += members[end:]
        whole += [rest[start : start + size] for start in range(0, len(rest), size)]
        steps = [whole[number] for number in keyed_order(self.words(len(whole), epoch, "steps"))]
        if last and self.config.remainder != "drop":
            steps.append(last + (self.copies(by_chance[: max(size, num_last)], num_last, turns)))
        return [[(epoch, *use) for use in step] for step in steps]

    def copies(self, by_chance, num_last, turns):
        found = []
        for number in range(num_last, self.config.global_batch_size if self.config.remainder == "fill" else 0):
            sample, repeat, caption = by_chance[number % len(by_chance)]
            copy = 1 + (number - num_last) // len(by_chance)
            found.append((sample, repeat + copy * turns * math.ceil(self.rows[sample]["repeats"]), caption))
        return found

    def cut(self, step):
        """A step's micro-batches."""
        batches = []
        for name in self.groups():
            members = [use for use in step if self.group(use[1:]) == name]
            size = self.config.micro_batch_size
            batches += [members[start : start + size] for start in range(0, len(members), size)]
        return batches


def keyed_order(words):
    return sorted(range(len(words)), key=words.__getitem__)


def random_rows(random):
    rows = []
    for number in range(int(random.integers(4, 14))):
        lengths = [int(length) for length in random.integers(4, 7, random.integers(1, 4))]
        role = "class" if number == 0 or (number > 1 and random.random() < 0.4) else "instance"
        size = {"bucket_width": int(random.choice([256, 512])), "bucket_height": int(random.choice([256, 512]))}
        rows.append(row(number, text_lengths=lengths, repeats=int(random.integers(1, 4)), role=role, **size))
    return rows


def with_parts(rows, random):
    """Instance images repeated so many times, and a part."""
    return [
        {**each, "repeats": float(random.choice([0.5, 1.5, 0.25, 3.0]))} if each["role"] == "instance" else each
        for each in rows
    ]


@pytest.mark.parametrize("case", range(36))
def test_the_sequence_is_that_of_a_plain_implementation(case):
    random = np.random.default_rng(case)
    micro = int(random.integers(1, 5))
    settings = {
        "seed": int(random.integers(0, 100)),
        "micro_batch_size": micro,
        "global_batch_size": micro + int(random.integers(0, 9)),
        "remainder": ["smaller", "fill", "drop"][case % 3],
        "group_by": ["bucket", "text_length"][case // 3 % 2],
        "class_ratio": [None, 0.7, None, 3.1][case // 6 % 4],
        "caption_dropout": float(random.choice([0, 0.3, 1])),
    }
    rows = random_rows(random) if case < 24 else with_parts(random_rows(random), random)
    reference = Reference(rows, **settings)
    expected = [reference.cut(step) for epoch in range(5) for step in reference.epoch(epoch)]
    try:
        order = make_order(rows, **settings)
    except ConfigError:
        assert not reference.epoch(0)
        return
    ours = [[[(d.epoch, d.sample, d.repeat, d.caption) for d in b] for b in order.step(i)] for i in range(len(expected))]
    assert ours == expected
    assert order.samples_an_epoch == sum(map(len, reference.epoch(0)))
    assert order.steps_of(5) == len(expected)


def test_every_use_of_every_sample_comes_once_an_epoch():
    for epoch in range(3):
        uses = Counter((draw.sample, draw.repeat) for draw in draws_of(make_order(), epoch))
        assert uses == Counter([(i, 0) for i in range(11)] + [(10, 1), (10, 2)])


@pytest.mark.parametrize(
    ("repeats", "num_images", "counts"),
    [
        (0.5, 6, [3, 3, 3, 3]), (0.5, 5, [3, 2, 3, 2]), (1.5, 4, [6, 6, 6, 6]), (0.25, 4, [1, 1, 1, 1]),
        (0.1, 3, [1, 0, 0, 1, 0]), (2.0, 3, [6, 6, 6]), (0.75, 4, [3, 3, 3, 3]), (1 / 3, 6, [2, 2, 2, 2]),
    ],
)  # fmt: skip
def test_images_of_part_repeats_take_turns_from_epoch_to_epoch(repeats, num_images, counts):
    rows = [row(i, repeats=repeats) for i in range(num_images)] + [row(9, repeats=1.0)]
    order = make_order(rows, global_batch_size=2, micro_batch_size=1)
    epochs = [Counter() for _ in range(60)]
    for index in range(order.steps_of(60)):
        for draw in itertools.chain.from_iterable(order.step(index)):
            epochs[draw.epoch].update([draw.sample])
    assert [sum(epoch.values()) - 1 for epoch in epochs][: len(counts)] == counts
    assert all(epoch[num_images] == 1 for epoch in epochs)
    assert all(int(repeats) <= epoch[sample] <= math.ceil(repeats) for epoch in epochs for sample in range(num_images))
    # Within any row of 1/repeats epochs each image is seen, and none more than once more often than another.
    length = math.ceil(1 / repeats)
    for first in range(60 - length):
        seen = sum(epochs[first : first + length], Counter())
        times = [seen[sample] for sample in range(num_images)]
        assert min(times) >= 1
        assert max(times) - min(times) <= 1


def test_whole_repeats_are_the_same_whatever_their_type():
    ints, floats = ([row(i, repeats=kind(1 + i % 3)) for i in range(7)] for kind in (int, float))
    orders = make_order(ints), make_order(floats)
    assert orders[0].fingerprint == orders[1].fingerprint
    assert [orders[0].step(index) for index in range(9)] == [orders[1].step(index) for index in range(9)]


def test_part_repeats_of_class_images_do_not_go_with_a_ratio():
    rows = [row(0), row(1, role="class", repeats=0.5)]
    with pytest.raises(ConfigError, match=r"class_ratio 1 says how often class images come"):
        make_order(rows, class_ratio=1.0)


def test_steps_and_epochs_are_told_from_one_another():
    order = make_order([row(i, repeats=0.5) for i in range(9)], global_batch_size=2, micro_batch_size=1)
    # 5 and 4 uses: 3 and 2 steps
    assert [order.steps_of(epochs) for epochs in (0.01, 0.34, 1, 2, 3, 3.5)] == [1, 1, 3, 5, 8, 9]
    assert [order.epochs_of(steps) for steps in (3, 4, 5, 8)] == [1, 1.5, 2, 3]


def test_a_micro_batch_holds_one_bucket():
    for step in steps_of_epoch(make_order(), 0):
        for batch in step:
            assert len(batch) <= 3
            assert len({draw.sample >= 7 for draw in batch}) == 1


@pytest.mark.parametrize("remainder", ["smaller", "drop", "fill"])
@pytest.mark.parametrize(
    "settings", [{}, {"group_by": "text_length", "caption_dropout": 0.3}, {"class_ratio": 0.7}, {"validation": {"share": 0.2}}]
)
def test_the_micro_batch_size_does_not_change_what_a_step_holds(remainder, settings):
    rows = [
        row(i, text_lengths=[4, 5 + i % 3], role="class" if i % 4 == 3 else "instance", bucket_width=256 + 64 * (i % 3))
        for i in range(29)
    ]
    orders = [
        make_order(rows, global_batch_size=6, micro_batch_size=micro, remainder=remainder, **settings) for micro in (1, 2, 4, 6)
    ]
    for index in range(4 * orders[0].steps_an_epoch):
        steps = [order.step(index) for order in orders]
        assert all(samples_of(step) == samples_of(steps[0]) for step in steps)
        assert all(len(batch) == 1 for batch in steps[0])
        assert all(max(map(len, step)) <= micro for step, micro in zip(steps, (1, 2, 4, 6), strict=True))
        # One after the other they are the same draws, so what goes by the place in a step is the same too.
        assert len({tuple(draw for batch in step for draw in batch) for step in steps}) == 1
    assert len({order.fingerprint for order in orders}) == 1


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_lone_image_of_a_bucket_counts_no_more_than_the_others(micro):
    """Five photos, four of one size and one of another, four to a step: steps of four and of one, whatever the micro-batch."""
    rows = [row(i, bucket_width=512 if i == 4 else 256) for i in range(5)]
    order = make_order(rows, global_batch_size=4, micro_batch_size=micro)
    assert order.num_short == 1
    sizes = [sum(map(len, order.step(index))) for index in range(2000)]
    assert sizes == [4, 1] * 1000
    # In the mean over steps, each step's mean over its samples: an update's share of each photo.
    share_of_photo = Counter()
    for index in range(2000):
        for draw, count in samples_of(order.step(index)).items():
            share_of_photo[draw.sample] += count / sizes[index] / 2000
    assert all(share == pytest.approx(0.2, abs=0.04) for share in share_of_photo.values())


@pytest.mark.parametrize("remainder", ["drop", "fill"])
def test_no_image_is_left_out_or_repeated_more_often_than_another(remainder):
    rows = [row(i, bucket_width=512 if i == 4 else 256) for i in range(5)]
    order = make_order(rows, global_batch_size=4, micro_batch_size=4, remainder=remainder)
    counts = Counter(draw.sample for draw in draws_before(order, 1000))
    assert sum(counts.values()) == 1000 * order.samples_an_epoch
    assert all(count == pytest.approx(200 * order.samples_an_epoch, abs=60) for count in counts.values())


def test_steps_hold_one_bucket_as_far_as_the_buckets_go():
    """Nine and seven in steps of four: two whole steps and one, and what remains, one and three, shares the last."""
    rows = [row(i, bucket_width=512 if i > 8 else 256) for i in range(16)]
    order = make_order(rows, global_batch_size=4, micro_batch_size=4)
    places = set()
    for epoch in range(20):
        steps = steps_of_epoch(order, epoch)
        assert sorted(tuple(map(len, step)) for step in steps) == [(1, 3), (4,), (4,), (4,)]
        places |= {position for position, step in enumerate(steps) if len(step) == 2}
    # Mixed steps come anywhere in an epoch.
    assert places == {0, 1, 2, 3}


def test_epochs_differ_and_equal_seeds_agree():
    assert steps_of_epoch(make_order(), 0) == steps_of_epoch(make_order(), 0)
    samples = [[draw.sample for draw in draws_of(make_order(), epoch)] for epoch in (0, 1)]
    assert samples[0] != samples[1]
    assert steps_of_epoch(make_order(seed=4), 0) != steps_of_epoch(make_order(), 0)


def test_order_within_an_epoch_does_not_repeat_in_later_epochs():
    order = make_order([row(i) for i in range(6)], micro_batch_size=6)
    seen = {tuple(draw.sample for draw in order.step(epoch)[0]) for epoch in range(100)}
    assert len(seen) > 80


@pytest.mark.parametrize("settings", [{}, {"group_by": "text_length", "caption_dropout": 0.3}, {"class_ratio": 0.5}])
def test_any_index_can_be_asked_for_first(settings):
    rows = [row(i, text_lengths=[4, 5, 6], role="class" if i > 6 else "instance", bucket_width=256 + i) for i in range(11)]
    order, late = make_order(rows, **settings), make_order(rows, **settings)
    whole = [order.step(index) for index in range(200)]
    assert [late.step(index) for index in reversed(range(200))][::-1] == whole
    batches = [batch for step in whole for batch in step]
    assert list(itertools.islice(order.micro_batches(), len(batches))) == batches
    epochs = [batch[0].epoch for batch in batches]
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_change_of_world_size_changes_who_computes_and_not_what(world_size):
    order = make_order(global_batch_size=8)
    for step in range(5):
        parts = [share(order.step(step), rank, world_size) for rank in range(world_size)]
        assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
        assert [batch for _, batch in sorted(itertools.chain(*parts), key=lambda pair: pair[0])] == order.step(step)


def test_what_becomes_of_the_last_step_is_counted():
    smaller, drop, fill = (make_order(remainder=policy) for policy in ("smaller", "drop", "fill"))
    # 13 uses in steps of 6
    assert (smaller.num_short, drop.num_dropped, fill.num_filled) == (1, 1, 5)
    assert (smaller.samples_an_epoch, drop.samples_an_epoch, fill.samples_an_epoch) == (13, 12, 18)
    assert (smaller.steps_an_epoch, drop.steps_an_epoch, fill.steps_an_epoch) == (3, 2, 3)
    for order, sizes in ((smaller, [6, 6, 1]), (drop, [6, 6]), (fill, [6, 6, 6])):
        assert [sum(map(len, step)) for step in steps_of_epoch(order, 1)] == sizes


@pytest.mark.parametrize("settings", [{}, {"group_by": "text_length"}, {"class_ratio": 2.0}])
def test_a_filler_has_random_numbers_of_its_own(settings):
    rows = [row(i, text_lengths=[4, 5, 6], repeats=1 + i, role="class" if i > 2 else "instance") for i in range(5)]
    for size in (7, 50):
        order = make_order(rows, remainder="fill", micro_batch_size=7, global_batch_size=size, **settings)
        assert order.num_filled
        for epoch in range(6):
            draws = draws_of(order, epoch)
            assert len(draws) % size == 0
            assert len({(draw.sample, draw.repeat) for draw in draws}) == len(draws)


def test_fewer_samples_than_a_step_are_one_short_step():
    order = make_order([row(i) for i in range(5)], global_batch_size=8, micro_batch_size=2)
    assert [sum(map(len, order.step(index))) for index in range(4)] == [5, 5, 5, 5]
    assert [draw.epoch for draw in order.step(3)[0]] == [3, 3]


def test_dropping_everything_is_refused():
    with pytest.raises(ConfigError, match=r"drop leaves nothing: an epoch has 13 samples.*global_batch_size 14"):
        make_order(remainder="drop", global_batch_size=14)


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
    whole = 0
    for epoch in range(20):
        steps = steps_of_epoch(order, epoch)
        whole += sum(len({len(batch) for batch in step}) == 1 and len(step) == 2 for step in steps)
        for batch in itertools.chain.from_iterable(steps):
            drawn = {
                (rows[d.sample]["text_lengths"][d.caption] if d.caption >= 0 else EMPTY_LENGTH, d.sample % 2) for d in batch
            }
            assert len(drawn) == 1
        assert Counter(draw.sample for step in steps for batch in step for draw in batch) == Counter(range(40))
    # As far as equal lengths go, all of a step has the same.
    assert whole > 20


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
        ([*rows[:-1], {**rows[-1], "repeats": 1.5}], {}),
        ([*rows[:-1], {**rows[-1], "bucket_width": 512}], {}),
        ([*rows[:-1], {**rows[-1], "bucket_height": 512}], {}),
        ([*rows[:-1], {**rows[-1], "text_lengths": [11]}], {"group_by": "text_length"}),
        ([*rows[:-1], {**rows[-1], "role": "instance"}], {"class_ratio": 1.0}),
        (rows[::-1], {}),
    ]
    assert len({make_order(these, **settings).fingerprint for these, settings in changes}) == len(changes)
    same = make_order(rows, learning_rate=1.0, steps=7, micro_batch_size=2)
    assert make_order(rows).fingerprint == same.fingerprint


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
        assert [whole.step(i) for i in range(50)] == [parts.step(i) for i in range(50)]


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
        assert sum(map(len, order.step(0))) == 8
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
    # Pinned: other rules are another ORDER_VERSION, or the order of every run that is resumed would silently change.
    assert ORDER_VERSION == 2
    assert [(draw.sample, draw.repeat, draw.caption) for draw in draws] == [
        (0, 0, 1), (3, 1, 1), (3, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 0),
    ]  # fmt: skip
