"""Leave-one-out, and the samples of each part."""

import warnings

import numpy as np
import pytest
from datasets import List, Value

from lasar_hf.data import Interactions, leave_one_out, read_lcrec, samples
from lasar_hf.data import splits as splits_module


def shop(*histories):
    num_items = 1 + max(max(history) for history in histories)
    users = [f"u{row}" for row in range(len(histories))]
    return Interactions([f"i{row}" for row in range(num_items)], [{}] * num_items, users, list(map(list, histories)))


def test_leave_one_out():
    split = leave_one_out(shop([4, 3, 2, 1, 0], [1, 2, 3]))
    assert split.user_ids == ["u0", "u1"]
    assert split.train == [[4, 3, 2], [1]]
    assert (split.validation, split.test) == ([1, 2], [0, 3])
    assert split.num_skipped == 0


def test_short_users_are_skipped_counted_and_said_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = leave_one_out(shop([0, 1], [0, 1, 2], [2]))
    assert split.user_ids == ["u1"] and split.num_skipped == 2
    assert [str(warning.message) for warning in caught] == ["skipped 2 of 3 users: fewer than three items."]


def test_complete_users_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leave_one_out(shop([0, 1, 2]))


def test_nobody_left_is_an_error():
    with pytest.raises(ValueError, match="none of the 1 users"):
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
    for chunk in (10_000, 7):
        monkeypatch.setattr(splits_module, "_USERS_A_CHUNK", chunk)
        got = samples(split, name)
        assert list(zip(got["user_id"], got["history"], got["target"], strict=True)) == expected


def test_unknown_part_or_targets():
    split = leave_one_out(shop([0, 1, 2]))
    with pytest.raises(ValueError, match="`name` is 'valid'"):
        samples(split, "valid")
    with pytest.raises(ValueError, match="`targets` is 'first'"):
        samples(split, "train", targets="first")


def test_real_counts(shared_data):
    split = leave_one_out(read_lcrec(shared_data / "scientific"))
    assert [len(samples(split, name)) for name in ("train", "validation", "test")] == [33541, 8317, 8317]
    assert len(samples(split, "train")) == sum(len(sequence) - 1 for sequence in split.train)
