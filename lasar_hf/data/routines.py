"""A generated shop where reasoning is needed: each user has routines of their own, and must follow several of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from ..arguments import check_whole_numbers
from ..files import write_json
from ..model.catalog_lasar import SidCatalog
from .examples import INSTRUCTIONS
from .interactions import Interactions
from .prepared_data import RARE_REPEATS, save_interactions
from .splits import PARTS, Split, repeat_rate
from .tokenizer import build_tokenizer


PRODUCTS = ("Tea", "Walk", "Bath", "Book", "Chess", "Piano", "Yoga", "Soup", "Film", "Nap")
MAX_LINKS = 6
# The second product comes right after the first, so a reader needs one look-up for it. With words in between it needs
# two, which a written chain of two layers does not learn in the updates of the recipes.
SEGMENT = "the history has a routine of this user with these two products, one right after the other: {one} {other}"
_NUMBERS = ("One", "Two", "Three", "Four", "Five", "Six")
TOKENIZER_SIZE = 600  # at most; each word becomes one token


def write_routines(
    folder: str | Path,
    num_users: int = 12_000,
    validation_users: int = 500,
    test_users: int = 1200,
    max_links: int = MAX_LINKS,
    min_segments: int = 1,
    seed: int = 0,
) -> None:
    """
    Write prepared data ([`PreparedData`]) of a shop in which the next item lies several links away.

    A user takes the 10 products in a circle. The circle is new for every user, so weights cannot store it. The
    history has, in this order:

    * the 10 routines of the user, in any order. A routine is an item of its own, "Tea, then Walk";
    * a cue, from "One ahead" to "Six ahead";
    * the product that the user is at.

    The target is the product that lies as many routines ahead as the cue says. The chain of thought has one segment
    for each link, a sentence that ends in the product that the link leads to, so the number of latent steps follows
    from the cue alone. Semantic IDs have one code.

    Args:
        folder (`str` or `Path`):
            Folder to write.
        num_users, validation_users, test_users (`int`, *optional*, default to `12_000`, `500` and `1200`):
            Number of users of each part, each with one sample. No two users have the same circle, so those of
            validation and test are new; they depend on nothing but their numbers and `seed`, so they are new to
            models that were trained on several such folders.
        max_links (`int`, *optional*, defaults to `6`):
            Largest number of links that a cue asks for. The items do not depend on it.
        min_segments (`int`, *optional*, defaults to `1`):
            Chains of thought with fewer links repeat their last segment until they have so many: a teacher goes on
            after it has found the answer. Users and targets do not depend on it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random numbers.
    """
    check_whole_numbers(
        1,
        num_users=num_users,
        validation_users=validation_users,
        test_users=test_users,
        max_links=max_links,
        min_segments=min_segments,
    )
    check_whole_numbers(0, seed=seed)
    counts = dict(zip(PARTS, (num_users, validation_users, test_users), strict=True))
    if max_links > MAX_LINKS:
        raise ValueError(f"max_links is {max_links}; expected 1 to {MAX_LINKS}.")
    # 1. Users, part after part: history, and the items that the chain of thought reaches.
    rng = np.random.default_rng(seed)
    order = ("test", "validation", "train")
    part_of = np.repeat(order, [counts[part] for part in order])
    users = [_user(circle, int(rng.integers(1, max_links + 1)), rng) for circle in _circles(len(part_of), rng)]
    user_ids = [f"user-{user}" for user in range(len(users))]
    titles = item_titles()
    items = [{"title": title} for title in titles]
    item_ids = [f"item-{item}" for item in range(len(items))]

    # 2. A user is whole in one part.
    sequences = [[*history, chain[-1]] for history, chain in users]
    parts: dict[str, Any] = {
        part: [row if own == part else [] for row, own in zip(sequences, part_of, strict=True)] for part in PARTS
    }
    split = Split(user_ids, **parts)
    folder = Path(folder)
    save_interactions(Interactions(item_ids, items, user_ids, sequences), split, folder)

    # 3. Samples, Semantic IDs and tokenizer.
    tables = {}
    for part in PARTS:
        own = np.flatnonzero(part_of == part)
        tables[part] = {
            "user_id": [user_ids[user] for user in own],
            "history": [users[user][0] for user in own],
            "target": [users[user][1][-1] for user in own],
        }
        if part == "train":
            segments = [_segments(users[user][1]) for user in own]
            segments = [texts + texts[-1:] * (min_segments - len(texts)) for texts in segments]
            tables[part] |= {"chain_of_thought": [" ".join(texts) for texts in segments], "segments": segments}
    DatasetDict({part: Dataset.from_dict(table) for part, table in tables.items()}).save_to_disk(folder / "samples")
    SidCatalog(np.arange(len(items))[:, None], item_ids, titles=titles).save_pretrained(folder / "catalog")
    texts = [*INSTRUCTIONS.values(), *titles, *(text for pair in _pairs() for text in _segments(pair))]
    build_tokenizer(texts, TOKENIZER_SIZE).save_pretrained(folder / "tokenizer")
    rate = repeat_rate([row for row in split.train if row])
    write_json(
        folder / "prepared.json",
        {
            "codebook_size": len(items),
            "max_history": len(PRODUCTS) + 2,
            "repeat_rate": rate,
            "exclude_history": rate <= RARE_REPEATS,
        },
    )


def item_titles() -> list[str]:
    """Titles of the items: products, then cues, then routines."""
    cues = [f"{number} ahead" for number in _NUMBERS]
    return [*PRODUCTS, *cues, *(f"{PRODUCTS[one]}, then {PRODUCTS[other]}" for one, other in _pairs())]


def links(history: list[int]) -> int:
    """The number of links that the cue of a history asks for."""
    return history[-2] - len(PRODUCTS) + 1


def _pairs() -> list[tuple[int, int]]:
    """The two products of each routine."""
    return [(one, other) for one in range(len(PRODUCTS)) for other in range(len(PRODUCTS)) if one != other]


def _circles(count: int, rng: np.random.Generator) -> list[list[int]]:
    """Distinct circles of all products, each from a random product on; the first ones do not depend on `count`."""
    circles: dict[tuple[int, ...], list[int]] = {}
    while len(circles) < count:
        circle = rng.permutation(len(PRODUCTS)).tolist()
        start = circle.index(0)
        circles.setdefault((*circle[start:], *circle[:start]), circle)
    return list(circles.values())


def _user(circle: list[int], num_links: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """History of a user, and the products of the chain, which begins with the first of the circle."""
    numbers = {pair: len(PRODUCTS) + MAX_LINKS + index for index, pair in enumerate(_pairs())}
    routines = [numbers[pair] for pair in zip(circle, [*circle[1:], circle[0]], strict=True)]
    cue = len(PRODUCTS) + num_links - 1
    return [*rng.permutation(routines).tolist(), cue, circle[0]], circle[: num_links + 1]


def _segments(chain: Sequence[int]) -> list[str]:
    """What a chain of thought says at each link."""
    names = [PRODUCTS[product] for product in chain]
    return [SEGMENT.format(one=one, other=other) for one, other in zip(names, names[1:], strict=False)]
