"""Offline teacher: writes a chain of thought from a history to its target from item metadata, in fixed wording."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise

from datasets import Dataset

from ..data.interactions import CATEGORY_SEPARATOR, Interactions
from ..data.splits import Split
from .leakage import contains_name, normalize_words, remove_name


NAMELESS = "an item without a name"
MAX_NAME_WORDS = 10
MIN_STEP_COUNT = 2  # of a common step in training: a single one may be this very sample
_NUMBER = r"(?:\d{1,3}|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
_PART = re.compile(rf"^(?P<series>.*?\w)\W+(?:volume|vol|book|part|season|episode)\W*\s{_NUMBER}\b", re.IGNORECASE)


class _Relation(IntEnum):
    """How close two items are."""

    NONE = 0
    SIMILAR = 1  # sister categories, or two words in common
    CATEGORY = 2
    BRAND = 3
    SERIES = 4


@dataclass(frozen=True)
class _Item:
    """What a chain may say about an item; unknown fields are empty."""

    name: str
    series: str
    brand: str
    path: tuple[str, ...]  # categories, the widest first
    words: tuple[str, ...]  # of the text, if neither brand nor categories are known

    @property
    def interest(self) -> str:
        """The narrowest group that the item belongs to, in words; empty if none is known."""
        if self.series:
            return f"the series {self.series}"
        if self.brand:
            return f"the brand {self.brand}"
        return f"the category {self.path[-1]}" if self.path else ""


class TemplateTeacher:
    """
    Writes chains of thought from the items' metadata, without a language model.

    A chain explains how the target follows from the history. It is short if the target continues the last item. It is
    longer if the target continues an earlier item: then it recalls both interests, notes whether they alternate, and
    returns to the older one. It is also longer if no item of the history has anything in common with the target.

    Of the target a chain mentions only category, brand and series (without brand and category: the words that it
    shares with an item of the history), and only if another item shares them. A chain never contains Semantic-ID or
    control tokens, nor the target's title as whole words, in any typography (see [`normalize_words`]; titles of one
    letter are not searched). It quotes only items of the history.

    Warns if most items have no text: their chains say almost nothing.

    Args:
        interactions ([`Interactions`]):
            The items' text.
        split ([`Split`], *optional*):
            Its training part determines which steps from one item to the next are common.

    Example:

    ```python
    >>> teacher = TemplateTeacher(interactions, split)
    >>> teacher.chain_of_thought(history=[3, 40, 4], target=41)
    'The last item is "Silent Harbor, Volume Five". It belongs to the series Silent Harbor. …'
    ```
    """

    def __init__(self, interactions: Interactions, split: Split | None = None):
        self._titles = [normalize_words(item.get("title", "")) for item in interactions.items]
        self._items = [_read_item(item) for item in interactions.items]
        self._names = [normalize_words(item.name) for item in self._items]
        self._brand_counts = Counter(item.brand for item in self._items)
        self._path_counts = Counter(item.path for item in self._items)
        without_text = sum(not (item.words or item.brand or item.path) for item in self._items)
        if 2 * without_text > len(self._items):
            warnings.warn(
                f"{without_text} of {len(self._items)} items have no text: their chains say almost nothing.",
                stacklevel=2,
            )
        steps = Counter(step for items in split.train for step in pairwise(items)) if split else {}
        self._common_steps = {step for step, count in steps.items() if count >= MIN_STEP_COUNT}

    def chain_of_thought(self, history: Sequence[int], target: int) -> str:
        """The chain from a history of item indices, oldest first and not empty, to the target's item index."""
        if not len(history):
            raise ValueError(f"history is empty for target {target}; expected at least one item.")
        # 1. Items whose name contains the target's title (such as an earlier purchase of it) must not be quoted.
        title = self._titles[target]
        items = [self._items[item] for item in history]
        for position, item in enumerate(history):
            if contains_name(self._names[item], title):
                items[position] = replace(items[position], name=NAMELESS)

        # 2. Find the item of the history that the target continues: the closest one, of these the most recent.
        goal = self._items[target]
        relation, position = max((_relation(item, goal), position) for position, item in enumerate(items))
        last_relation = _relation(items[-1], goal)
        if last_relation >= _Relation.BRAND:  # a short step, even if an older item is closer still
            relation, position = last_relation, len(items) - 1

        # 3. Write the sentences for that case.
        by = f" by {items[-1].brand}" if items[-1].brand else ""
        sentences = [f"The last item is {items[-1].name}{by}."]
        if relation == _Relation.SIMILAR and goal.words:
            shared = " and ".join([word for word in items[position].words if word in goal.words][:4])
            sentences.append(f"The words {shared} describe {items[position].name}.")
            sentences.append(f"So another item with {shared} follows.")
        elif relation and position == len(items) - 1:
            sentences += self._continue_last(items, goal, relation)
        elif relation:
            sentences += self._return_to_earlier(items, position, goal, relation)
        else:
            sentences += self._leave_history(items, goal)
        if relation < _Relation.SERIES and (history[-1], target) in self._common_steps:
            sentences.append("Other people took this very step too.")
        return remove_name(" ".join(sentences), title)

    def chains_of_thought(self, samples: Dataset | dict[str, list]) -> list[str]:
        """The chain of each sample of a table with the columns `history` and `target`, from [`samples`]."""
        pairs = zip(samples["history"], samples["target"], strict=True)
        return [self.chain_of_thought(history, target) for history, target in pairs]

    def _continue_last(self, items: list[_Item], goal: _Item, relation: _Relation) -> list[str]:
        """Say what the target shares with the last item."""
        if relation == _Relation.SERIES:
            return [f"It belongs to {items[-1].interest}, and the next part of it follows."]
        if relation == _Relation.BRAND:
            return [self._conclusion(goal, relation)]
        sentences = _belongs(items[-1])
        same = [item for item in items[:-1] if _relation(item, items[-1]) >= relation]
        if same:
            sentences.append(f"Earlier {same[-1].name} was of the same kind.")
        return [*sentences, self._conclusion(goal, relation)]

    def _return_to_earlier(self, items: list[_Item], position: int, goal: _Item, relation: _Relation) -> list[str]:
        """Recall the latest and the older interest, compare them, and return to the older one."""
        latest, older = items[-1], items[position]
        sentences = _belongs(latest)
        if latest.interest:
            sentences += _recall(items[:-1], latest.interest)
        sentences.append(f"There is another interest, {older.interest}, with {older.name} in it.")
        sentences += _recall(items[:position], older.interest)
        interests = [item.interest for item in items]
        if position == len(items) - 2 and len(items) > 2 and interests[-1] == interests[-3] != interests[-2]:
            sentences.append("The two interests take turns, one item of each after the other.")
            sentences.append(f"The last turn went to {latest.interest}, so now {older.interest} has its turn again.")
        else:
            sentences.append("The recent items have drifted away from it, yet it has not been left for good.")
        return [*sentences, self._conclusion(goal, relation)]

    def _leave_history(self, items: list[_Item], goal: _Item) -> list[str]:
        """Nothing in the history is like the target: list the interests, then leave them."""
        latest = items[-1].interest
        earlier = dict.fromkeys(item.interest for item in reversed(items[:-1]))
        others = [interest for interest in earlier if interest not in ("", latest)][:2]
        sentences = _belongs(items[-1])
        sentences += [f"Before that the person looked at {interest}." for interest in others]
        sentences.append("Nothing of this leads on from here.")
        conclusion = self._conclusion(goal, _Relation.NONE)
        return [*sentences, "A change is due, to something not seen in the history.", conclusion]

    def _conclusion(self, goal: _Item, relation: _Relation) -> str:
        """The kind of the next item, by attributes that it shares with other items."""
        if relation == _Relation.SERIES:
            return f"So the next part of {goal.interest} follows."
        category = f" in {goal.path[-1]}" if goal.path and self._path_counts[goal.path] > 1 else ""
        brand = f" by {goal.brand}" if goal.brand and self._brand_counts[goal.brand] > 1 else ""
        if relation == _Relation.SIMILAR:
            category = category or f" in {goal.path[-2]}"
        kind = f"another item{category}{brand}" if category or brand else "something of another kind"
        return f"So {kind} follows."


def _read_item(item: dict[str, str]) -> _Item:
    part = _PART.match(item.get("title", ""))
    text = item.get("title") or item.get("description")
    has_group = "brand" in item or "categories" in item
    words = [] if has_group or not text else re.findall(r"[^\W\d_]{4,}", _short_name(text).lower())
    return _Item(
        name=f'"{_short_name(text)}"' if text else NAMELESS,
        series=_short_name(part["series"]) if part else "",
        brand=_short_name(item.get("brand", "")),
        path=tuple(_short_name(name) for name in item.get("categories", "").split(CATEGORY_SEPARATOR) if name),
        words=tuple(dict.fromkeys(words)),
    )


def _short_name(text: str) -> str:
    """The first words of a name, printable and without punctuation that would end a sentence."""
    words = "".join(letter if letter.isprintable() else " " for letter in text[:1000]).split()
    return " ".join(re.sub(r"[.!?,;:]+$", "", word[:40]) for word in words[:MAX_NAME_WORDS]).strip()


def _relation(one: _Item, other: _Item) -> _Relation:
    if one.series and (one.series, one.brand) == (other.series, other.brand):
        return _Relation.SERIES
    if one.brand and one.brand == other.brand:
        return _Relation.BRAND
    if one.path and one.path == other.path:
        return _Relation.CATEGORY
    if one.words and other.words:
        return _Relation(len(set(one.words) & set(other.words)) > 1)
    # All items may share the shop's department, the widest category: related items must share more levels.
    return _Relation(min(len(one.path), len(other.path)) > 2 and one.path[:-1] == other.path[:-1])


def _belongs(item: _Item) -> list[str]:
    """A sentence on the item's group, unless that is its brand, which is named with the item."""
    return [f"It belongs to {item.interest}."] if item.series or (item.path and not item.brand) else []


def _recall(items: list[_Item], interest: str) -> list[str]:
    """A sentence on the latest item of an interest, if there is one."""
    earlier = [item.name for item in items if item.interest == interest]
    return [f"Of {interest} the person also took {earlier[-1]}."] if earlier else []
