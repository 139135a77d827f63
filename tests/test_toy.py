"""The generated shop: it is deterministic, and its users follow the documented patterns."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from lasar_hf.data import leave_one_out, toy_shop
from lasar_hf.data.toy import VOLUMES, next_of_brand, next_volume


@pytest.fixture(scope="module")
def shop():
    return toy_shop(num_users=600, num_items=192, seed=0)


@pytest.fixture(scope="module")
def hits(shop):
    """Share of validation items that a Markov model and the rules of the shop predict, by kind of user."""
    split = leave_one_out(shop)
    following = defaultdict(Counter)
    for sequence in split.train:
        for one, other in zip(sequence, sequence[1:], strict=False):
            following[one][other] += 1
    hits = defaultdict(list)
    for user, sequence, (target,) in zip(split.user_ids, split.train, split.validation, strict=True):
        kind, last, before = user.split("-")[0], sequence[-1], sequence[-2]
        ranked = [item for item, _ in following[last].most_common(10)]
        hits[kind, "markov@1"].append(ranked[:1] == [target])
        hits[kind, "markov@10"].append(target in ranked)
        hits[kind, "next volume"].append(next_volume(last, len(shop.items)) == target)
        hits[kind, "next of brand"].append(next_of_brand(last, len(shop.items)) == target)
        hits[kind, "look two back"].append(next_volume(before, len(shop.items)) == target)
    return {key: float(np.mean(values)) for key, values in hits.items()}


def test_equal_seeds_give_equal_shops(shop):
    assert toy_shop(600, 192, 0) == shop
    assert toy_shop(600, 192, 1).histories != shop.histories


def test_sizes(shop):
    assert len(shop.user_ids) == len(set(shop.user_ids)) == 600
    assert len(shop.items) == 192 and len({item["title"] for item in shop.items}) == 192
    assert {len(history) for history in shop.histories} == set(range(6, 13))
    assert all(set(item) == {"title", "description", "brand", "categories"} for item in shop.items)
    kinds = Counter(user.split("-")[0] for user in shop.user_ids)
    assert 250 < kinds["alternating"] < 350 and kinds["series"] > 100 and kinds["brand"] > 70


def test_followers_need_only_the_last_item(hits):
    assert hits["series", "next volume"] > 0.85
    assert hits["brand", "next of brand"] > 0.85
    assert hits["series", "markov@10"] > 0.7 and hits["brand", "markov@10"] > 0.7


def test_alternating_users_need_the_item_before_the_last(hits):
    assert hits["alternating", "look two back"] > 0.85
    assert hits["alternating", "markov@1"] < 0.1 and hits["alternating", "markov@10"] < 0.2
    assert hits["series", "look two back"] < 0.1  # one rule does not fit all users


@pytest.mark.parametrize("num_items", [48, 56, 64, 192])
def test_steps_visit_the_whole_brand(num_items):
    for step in (next_volume, next_of_brand):
        assert sorted(step(item, num_items) for item in range(num_items)) == list(range(num_items))
        for start in range(0, num_items, 3 * VOLUMES):
            brand = set(range(start, min(start + 3 * VOLUMES, num_items)))
            walk = {start}
            for _ in range(len(brand)):
                walk.add(start := step(start, num_items))
            assert walk == brand
    assert next_volume(3, num_items) == 4 and next_of_brand(3, num_items) == 3 + VOLUMES


@pytest.mark.parametrize(
    "arguments",
    [{"num_items": 47}, {"num_items": 40_000}, {"num_users": 0}, {"num_users": "30"}, {"seed": 1.5}],
    ids=["few", "many", "no users", "text", "no whole number"],
)
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        toy_shop(**arguments)
