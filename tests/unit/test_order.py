from collections import Counter

import numpy as np
import pytest

from ftk.errors import ConfigError
from ftk.train.order import Order, keyed_permutation, keyed_seed, share


def make_order(**changes):
    settings = {
        "keys": [f"s{i}" for i in range(11)],
        "buckets": ["a"] * 7 + ["b"] * 4,
        "repeats": [1] * 10 + [3],
        "seed": 3,
        "global_batch_size": 6,
        "micro_batch_size": 3,
        "remainder": "smaller",
    }
    return Order(**{**settings, **changes})


def epoch_of(order, epoch):
    count = order.micro_batches_an_epoch
    return [order.micro_batch(index) for index in range(epoch * count, (epoch + 1) * count)]


def test_every_use_of_every_sample_comes_once_an_epoch():
    for epoch in range(3):
        uses = Counter((draw.sample, draw.repeat) for batch in epoch_of(make_order(), epoch) for draw in batch)
        assert uses == Counter([(i, 0) for i in range(11)] + [(10, 1), (10, 2)])


def test_a_micro_batch_holds_one_bucket():
    order = make_order()
    for batch in epoch_of(order, 0):
        assert len({draw.sample >= 7 for draw in batch}) == 1


def test_epochs_differ_and_equal_seeds_agree():
    assert epoch_of(make_order(), 0) == epoch_of(make_order(), 0)
    samples = [[draw.sample for batch in epoch_of(make_order(), epoch) for draw in batch] for epoch in (0, 1)]
    assert samples[0] != samples[1]
    assert epoch_of(make_order(seed=4), 0) != epoch_of(make_order(), 0)


def test_any_index_can_be_asked_for_first():
    whole = [make_order().micro_batch(index) for index in range(40)]
    late = make_order()
    assert [late.micro_batch(index) for index in reversed(range(40))][::-1] == whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_change_of_world_size_changes_who_computes_and_not_what(world_size):
    order = make_order(global_batch_size=12)
    for step in range(5):
        shares = [share(order.step(step), rank, world_size) for rank in range(world_size)]
        assert Counter(batch for part in shares for batch in part) == Counter(order.step(step))


def test_remainder_policies_are_counted():
    smaller, drop, fill = (make_order(remainder=policy) for policy in ("smaller", "drop", "fill"))
    # bucket a has 7 uses (remainder 1), bucket b 6
    assert (smaller.num_smaller, drop.num_dropped, fill.num_filled) == (1, 1, 2)
    assert (smaller.samples_an_epoch, drop.samples_an_epoch, fill.samples_an_epoch) == (13, 12, 15)
    for order in (smaller, drop, fill):
        assert sum(len(batch) for batch in epoch_of(order, 1)) == order.samples_an_epoch
    assert {len(batch) for order in (drop, fill) for batch in epoch_of(order, 0)} == {3}


def test_a_filler_has_random_numbers_of_its_own():
    for epoch in range(4):
        draws = [draw for batch in epoch_of(make_order(remainder="fill"), epoch) for draw in batch]
        assert len(draws) == len(set(draws))


def test_dropping_everything_is_refused():
    with pytest.raises(ConfigError, match="drop leaves nothing"):
        make_order(remainder="drop", micro_batch_size=12, global_batch_size=12)


def test_the_fingerprint_sees_samples_and_settings():
    keys = [f"s{i}" for i in range(10)] + ["other"]
    changes = [{}, {"seed": 4}, {"micro_batch_size": 2}, {"remainder": "drop"}, {"repeats": [1] * 11}, {"keys": keys}]
    assert len({make_order(**change).fingerprint for change in changes}) == len(changes)


def test_a_keyed_permutation_is_one_and_is_pinned():
    assert sorted(keyed_permutation(1000, 1, "x").tolist()) == list(range(1000))
    # Pinned: another value here would silently change the order of every run that is resumed.
    assert keyed_permutation(8, 7, 0, "256x256").tolist() == [0, 7, 1, 6, 3, 5, 2, 4]
    assert keyed_seed(7, 0, "key", 0, "noise") == 8308584601134556145


def test_permutations_are_uniform_enough():
    first = np.bincount([int(keyed_permutation(4, seed, "u")[0]) for seed in range(2000)], minlength=4)
    assert first.min() > 400
