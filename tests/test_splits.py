"""Splits, the samples of each part, and the numbers of the data card."""

import json
import warnings

import numpy as np
import pytest
from datasets import List, Value

from lasar_hf.data import Interactions, describe, global_time, leave_one_out, read_lcrec, samples, splits


def shop(*histories):
    num_items = 1 + max(max(history) for history in histories)
    users = [f"u{row}" for row in range(len(histories))]
    return Interactions([f"i{row}" for row in range(num_items)], [{}] * num_items, users, list(map(list, histories)))


def test_leave_one_out():
    split = leave_one_out(shop([4, 3, 2, 1, 0], [1, 2, 3]))
    assert split.user_ids == ["u0", "u1"]
    assert split.train == [[4, 3, 2], [1]]
    assert split.validation == [[1], [2]]
    assert split.test == [[0], [3]]
    assert split.num_skipped == 0


def test_short_users_are_left_out_with_one_warning():
    with pytest.warns(UserWarning) as caught:
        split = leave_one_out(shop([0, 1], [0, 1, 2], [2]))
    assert split.user_ids == ["u1"]
    assert split.num_skipped == 2
    assert [str(warning.message)[:15] for warning in caught] == ["Left out 2 of 3"]


def test_complete_users_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert leave_one_out(shop([0, 1, 2])).num_skipped == 0


def test_nobody_left_is_an_error():
    with pytest.raises(ValueError, match="1 users"):
        leave_one_out(shop([0, 1]))


def test_samples_of_each_part():
    split = leave_one_out(shop([5, 4, 3, 2, 1], [0, 1, 2]))
    assert samples(split, "train").to_dict() == {
        "user_id": ["u0", "u0"], "history": [[5], [5, 4]], "target": [4, 3]
    }  # fmt: skip
    assert samples(split, "train", targets="last").to_dict() == {
        "user_id": ["u0"], "history": [[5, 4]], "target": [3]
    }  # fmt: skip
    assert samples(split, "validation").to_dict() == {
        "user_id": ["u0", "u1"], "history": [[5, 4, 3], [0]], "target": [2, 1]
    }  # fmt: skip
    assert samples(split, "test").to_dict() == {
        "user_id": ["u0", "u1"], "history": [[5, 4, 3, 2], [0, 1]], "target": [1, 2]
    }  # fmt: skip
    features = samples(split, "train").features
    assert features == {"user_id": Value("string"), "history": List(Value("int64")), "target": Value("int64")}


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_samples_equal_a_plain_loop_and_do_not_depend_on_chunks(monkeypatch, name):
    rng = np.random.default_rng(0)
    data = shop(*(rng.integers(0, 30, size=rng.integers(3, 12)).tolist() for _ in range(50)))
    split = leave_one_out(data)
    expected = []
    for user, history in zip(data.user_ids, data.histories, strict=True):
        places = {"train": range(1, len(history) - 2), "validation": [len(history) - 2], "test": [len(history) - 1]}
        expected += [(user, history[:place], history[place]) for place in places[name]]
    for chunk, window in ((10_000, None), (7, None), (7, 3), (10_000, 1)):
        monkeypatch.setattr(splits, "CHUNK_SIZE", chunk)
        got = samples(split, name, max_history=window)
        shown = [(user, history[-(window or 100) :], target) for user, history, target in expected]
        assert list(zip(got["user_id"], got["history"], got["target"], strict=True)) == shown


def test_a_window_bounds_long_histories():
    split = leave_one_out(shop([step % 50 for step in range(20_000)]))
    assert samples(split, "train", max_history=10).data.nbytes < 10_000_000  # without a window 1.6 GB
    with pytest.raises(ValueError, match="max_history"):
        samples(split, "train", max_history=0)


def test_unknown_part_or_targets():
    split = leave_one_out(shop([0, 1, 2]))
    with pytest.raises(ValueError, match="part is 'valid'"):
        samples(split, "valid")
    with pytest.raises(ValueError, match="targets is 'first'"):
        samples(split, "train", targets="first")


def test_real_counts(shared_data):
    split = leave_one_out(read_lcrec(shared_data / "scientific"))
    assert [len(samples(split, name)) for name in ("train", "validation", "test")] == [33541, 8317, 8317]
    assert len(samples(split, "train")) == sum(len(sequence) - 1 for sequence in split.train)


def timed(**histories):
    """A shop where users interact with item `n` at time `n`."""
    items = 1 + max(max(history) for history in histories.values())
    return Interactions(
        [f"i{row}" for row in range(items)], [{}] * items, list(histories), list(histories.values()),
        timestamps=[[float(item) for item in history] for history in histories.values()],
    )  # fmt: skip


def test_global_time():
    split = global_time(timed(u=[0, 1, 2, 3, 8, 9], v=[4, 5], w=[6, 7]), 0.2, 0.2)
    assert (split.validation_from, split.test_from) == (6.0, 8.0)
    assert split.train == [[0, 1, 2, 3], [4, 5], []]
    assert split.validation == [[], [], [6, 7]]
    assert split.test == [[8, 9], [], []]
    assert samples(split, "validation").to_dict() == {"user_id": ["w"], "history": [[6]], "target": [7]}
    assert samples(split, "test").to_dict() == {
        "user_id": ["u", "u"], "history": [[0, 1, 2, 3], [0, 1, 2, 3, 8]], "target": [8, 9]
    }  # fmt: skip
    assert samples(split, "train")["target"][:] == [1, 2, 3, 5]
    assert samples(split, "train", targets="last")["target"][:] == [3, 5]
    split = global_time(timed(u=list(range(10))), validation_share=0.1, test_share=0.3)
    assert (split.validation_from, split.test_from) == (6.0, 7.0)


def test_global_time_never_trains_on_what_is_later():
    rng = np.random.default_rng(0)
    histories = {f"u{user}": sorted(rng.choice(200, size=rng.integers(1, 9), replace=False)) for user in range(80)}
    split = global_time(timed(**{user: [int(item) for item in items] for user, items in histories.items()}))
    latest = {name: max(max(part, default=-1) for part in getattr(split, name)) for name in ("train", "validation")}
    earliest = {name: min(min(part, default=999) for part in getattr(split, name)) for name in ("validation", "test")}
    assert latest["train"] < split.validation_from <= earliest["validation"]
    assert latest["validation"] < split.test_from <= earliest["test"]
    for history, target in zip(samples(split, "test")["history"], samples(split, "test")["target"], strict=True):
        assert max(history) < target


@pytest.mark.parametrize(
    ("shop_at_hand", "shares", "message"),
    [
        (shop([0, 1, 2]), (0.1, 0.1), "timestamps"),
        (timed(u=[0, 1, 2]), (0.5, 0.5), "validation_share is 0.5"),
        (timed(u=[0, 1, 2]), (0.0, 0.1), "validation_share is 0.0"),
        (timed(u=[0, 0, 0, 0]), (0.2, 0.2), "distinct timestamps"),
    ],
)
def test_global_time_refuses(shop_at_hand, shares, message):
    with pytest.raises(ValueError, match=message):
        global_time(shop_at_hand, *shares)


@pytest.fixture
def card():
    data = timed(u=[0, 1, 2, 2, 9], v=[3, 4, 5])
    return describe(data, leave_one_out(data))


def test_card_has_the_sizes(card):
    assert (card["users"], card["items"], card["interactions"]) == (2, 10, 8)
    assert card["density"] == 8 / 20
    assert card["history_length"] == {"min": 3, "median": 4.0, "mean": 4.0, "max": 5}


def test_card_counts_items_without_text_or_users(card):
    assert card["items_without_interactions"] == 3
    assert card["items_without_text"] == 10
    assert card["items_with"] == {"title": 0, "description": 0, "brand": 0, "categories": 0}


def test_card_describes_the_order(card):
    assert card["order"].startswith("by time")
    assert card["tied_neighbours"] == 1 / 6
    assert card["time"] == {"first": 0.0, "last": 9.0}
    untimed = shop([0, 1, 2])
    assert "no times" in describe(untimed, leave_one_out(untimed))["order"]


def test_card_describes_leave_one_out(card):
    assert card["split"] == {
        "kind": "leave-one-out", "users": 2, "users_skipped": 0, "train": 4, "validation": 2, "test": 2
    }  # fmt: skip


def test_card_describes_global_time():
    data = timed(u=[0, 1, 2, 2, 9], v=[3, 4, 5])
    assert describe(data, global_time(data, 0.25, 0.25))["split"] == {
        "kind": "global time", "users": 2, "users_skipped": 0, "train": 4, "validation": 2, "test": 2,
        "validation_from": 3.0, "test_from": 5.0,
    }  # fmt: skip


def test_card_is_json(card):
    assert json.loads(json.dumps(card)) == card


def test_the_first_item_of_a_sequence_is_no_repeat():
    assert splits.repeat_rate([[4, 4, 2, 4], [7], []]) == 2 / 3
