"""A generated shop: some users continue a series, others alternate between two interests."""

import numpy as np

from ..arguments import check_whole_numbers
from .interactions import CATEGORY_SEPARATOR, Interactions


VOLUMES = 8  # items per series
SERIES_PER_BRAND = 3
SHARES = {"series": 0.3, "brand": 0.2, "alternating": 0.5}
NOISE = 0.05  # share of random items

_BRANDS = ("Harrow", "Larkspur", "Quillon", "Tamarind", "Osprey", "Velden", "Mirrin", "Calder", "Juniper", "Ashgrove")
_HOUSES = ("Press", "House", "Studio", "Works", "Workshop", "Editions", "Collective", "Makers", "Atelier", "Supply")
_ADJECTIVES = (
    "Amber", "Silent", "Crooked", "Hollow", "Gilded", "Frozen", "Wandering", "Scarlet", "Hidden", "Copper",
    "Velvet", "Broken", "Ivory", "Drifting", "Burning", "Marble", "Midnight", "Paper", "Salted", "Thorny",
)  # fmt: skip
_NOUNS = (
    "Lantern", "Harbor", "Compass", "Orchard", "Bridge", "Falcon", "Clockwork", "Garden", "Kettle", "Mountain",
    "Violin", "Ledger", "Anchor", "Meadow", "Mirror", "Castle", "Beacon", "Canyon", "Locket", "Tower",
)  # fmt: skip
_KINDS = ("", "Saga", "Chronicle", "Mystery", "Journey", "Archive", "Legend", "Almanac")
_CATEGORIES = (
    ("Books", "Mystery", "novel", "detectives", "clues"),
    ("Books", "Fantasy", "novel", "dragons", "spells"),
    ("Books", "Travel", "guide", "maps", "railways"),
    ("Games", "Board Games", "game", "dice", "tiles"),
    ("Games", "Card Games", "deck", "tricks", "suits"),
    ("Games", "Jigsaw Puzzles", "puzzle", "pieces", "landscapes"),
    ("Crafts", "Knitting", "pattern", "yarn", "needles"),
    ("Crafts", "Woodworking", "kit", "chisels", "joints"),
    ("Music", "Piano", "album", "scores", "etudes"),
    ("Music", "Guitar", "album", "chords", "riffs"),
    ("Kitchen", "Baking", "cookbook", "dough", "ovens"),
    ("Kitchen", "Spices", "box", "blends", "roasts"),
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_NUMBERS = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")


def toy_shop(num_users: int = 600, num_items: int = 192, seed: int = 0) -> Interactions:
    """
    Generate a shop. Eight volumes make a series, three series make a brand, and each series has a category.

    There are three kinds of users. The prefix of the user id names the kind:

    * `series-…` reads the volumes of a series in order, then those of the brand's next series;
    * `brand-…` reads the same volume of each series of a brand, then the next volume of each;
    * `alternating-…` alternates between two series of two brands, each in order. The next item follows from the item
      before the last one, and hardly from the last.

    One position in twenty is a random item instead.

    Args:
        num_users, num_items (`int`, *optional*, default to `600` and `192`):
            Number of users, each with 6 to 12 items, and of items (48 to 25,600), rounded down to whole series.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random numbers.

    Returns:
        `Interactions`: items have title, description, brand and categories.

    Example:

    ```python
    >>> from lasar_hf.data import toy_shop

    >>> shop = toy_shop(num_users=2)
    >>> shop.user_ids[1], shop.histories[1]
    ('series-1', [43, 44, 45, 46, 47, 24, 25, 26, 27, 28, 29, 30])
    ```
    """
    check_whole_numbers(1, num_users=num_users, num_items=num_items)
    check_whole_numbers(0, seed=seed)
    num_series = num_items // VOLUMES
    names = [f"{adjective} {noun} {kind}".strip() for kind in _KINDS for adjective in _ADJECTIVES for noun in _NOUNS]
    if not 2 * SERIES_PER_BRAND <= num_series <= len(names):
        least, most = 2 * SERIES_PER_BRAND * VOLUMES, len(names) * VOLUMES
        raise ValueError(f"num_items is {num_items}; expected {least} to {most}.")
    rng = np.random.default_rng(seed)
    titles = [names[index] for index in rng.permutation(len(names))[:num_series]]
    categories = rng.permutation(np.arange(num_series) % len(_CATEGORIES))
    items = [
        _item(titles[series], series // SERIES_PER_BRAND, _CATEGORIES[categories[series]], volume)
        for series in range(num_series)
        for volume in range(VOLUMES)
    ]
    # A few series are far more popular than the others.
    popularity = 1.0 / np.arange(1, num_series + 1)
    popularity = rng.permutation(popularity / popularity.sum())
    kinds = rng.choice(list(SHARES), size=num_users, p=list(SHARES.values()))
    return Interactions(
        item_ids=[f"item-{index}" for index in range(len(items))],
        items=items,
        user_ids=[f"{kind}-{user}" for user, kind in enumerate(kinds)],
        histories=[_history(str(kind), num_series, popularity, rng) for kind in kinds],
    )


def next_volume(item: int, num_items: int) -> int:
    """The next volume; after the last volume of a series, the first of the brand's next series."""
    first, count = _brand_items(item, num_items)
    return first + (item - first + 1) % count


def next_of_brand(item: int, num_items: int) -> int:
    """The same volume of the brand's next series; after the last series, the next volume of the first."""
    first, count = _brand_items(item, num_items)
    series, volume = divmod(item - first, VOLUMES)
    num_series = count // VOLUMES
    volume, series = divmod((volume * num_series + series + 1) % count, num_series)
    return first + series * VOLUMES + volume


def _brand_items(item: int, num_items: int) -> tuple[int, int]:
    """The first item of an item's brand, and the number of its items; the last brand may have fewer series."""
    first = item - item % (SERIES_PER_BRAND * VOLUMES)
    return first, min(SERIES_PER_BRAND * VOLUMES, num_items - first)


def _history(kind: str, num_series: int, popularity: np.ndarray, rng: np.random.Generator) -> list[int]:
    num_items = num_series * VOLUMES
    series = [rng.choice(num_series, p=popularity)]
    if kind == "alternating":
        brands = np.arange(num_series) // SERIES_PER_BRAND
        other_brands = np.where(brands == brands[series[0]], 0.0, popularity)
        series.append(rng.choice(num_series, p=other_brands / other_brands.sum()))
    upcoming = [int(one * VOLUMES + rng.integers(VOLUMES)) for one in series]
    step = next_of_brand if kind == "brand" else next_volume
    history = []
    for position in range(rng.integers(6, 13)):
        turn = position % len(upcoming)
        history.append(int(rng.integers(num_items)) if rng.random() < NOISE else upcoming[turn])
        upcoming[turn] = step(upcoming[turn], num_items)
    return history


def _item(series: str, brand: int, category: tuple[str, ...], volume: int) -> dict[str, str]:
    section, shelf, thing, *topics = category
    maker = f"{_BRANDS[brand % len(_BRANDS)]} {_HOUSES[brand // len(_BRANDS) % len(_HOUSES)]}"
    if brand >= len(_BRANDS) * len(_HOUSES):
        maker += f" {brand // (len(_BRANDS) * len(_HOUSES)) + 1}"
    return {
        "title": f"{series}, Volume {_NUMBERS[volume]}",
        "description": (
            f"The {_ORDINALS[volume]} {thing} of the {series} series by {maker}, for everybody who likes {topics[0]} "
            f"and {topics[1]}."
        ),
        "brand": maker,
        "categories": CATEGORY_SEPARATOR.join((section, shelf)),
    }
