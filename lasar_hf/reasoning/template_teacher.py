"""Offline teacher: a chain of thought from a history to its target, written from item metadata by fixed wording."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from ..data.interactions import CATEGORY_SEPARATOR, Interactions
from ..data.splits import Split
from .leakage import contains_name, normalize_words, remove_name


_NUMBER = r"(?:\d{1,3}|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
_PART = re.compile(rf"^(?P<series>.*?\w)\W+(?:volume|vol|book|part|season|episode)\W*\s{_NUMBER}\b", re.IGNORECASE)
_WORDS_OF_A_NAME = 10
_NAMELESS = "an item without a name"
_OFTEN = 2  # users who made a step before it counts as usual; below it may be this very sample


@dataclass(frozen=True)
class _Facts:
    """What the chain may say of an item; a field that is not known is empty."""

    name: str
    series: str
    brand: str
    path: tuple[str, ...]
    words: tuple[str, ...]  # of the text, where neither brand nor category is known

    @property
    def interest(self) -> str:
        """The narrowest group that the item belongs to, in words; empty when nothing is known."""
        if self.series:
            return f"the series {self.series}"
        if self.brand:
            return f"the brand {self.brand}"
        return f"the category {self.path[-1]}" if self.path else ""


class TemplateTeacher:
    """
    Writes chains of thought without a network, from what the items' metadata say.

    The chain tells how the target follows from the history. It is short where the target continues the last item, and
    longer where one has to look further back: it then recalls each interest, says whether they take turns, and returns
    to the older one; longest where no item of the history shares anything with the target.

    Of the target it knows nothing but its category, brand and series (where neither brand nor category is known: the
    words it shares with an item of the history), and names them only when another item shares them. It never contains
    the target's title as whole words, in whatever typography (see `bare`; a title of one letter is too short to be
    told from other text), nor SID or control tokens, and reads no item but those of the history.

    Args:
        interactions (`Interactions`):
            The items' text.
        split (`Split`, *optional*):
            Its training part tells which steps from one item to the next are usual.

    Warns when most items have no text at all: the chains then say next to nothing.

    Example:

    ```python
    >>> teacher = TemplateTeacher(interactions, split)
    >>> teacher.chain_of_thought(history=[3, 40, 4], target=41)
    'The last item is "Silent Harbor, Volume Five". It belongs to the series Silent Harbor. …'
    ```
    """

    def __init__(self, interactions: Interactions, split: Split | None = None):
        self._titles = [normalize_words(item.get("title", "")) for item in interactions.items]
        self._facts = [_facts(item) for item in interactions.items]
        self._names = [normalize_words(facts.name) for facts in self._facts]
        self._brands = Counter(facts.brand for facts in self._facts)
        self._paths = Counter(facts.path for facts in self._facts)
        nameless = sum(not (facts.words or facts.brand or facts.path) for facts in self._facts)
        if 2 * nameless > len(self._facts):
            warnings.warn(
                f"{nameless} of {len(self._facts)} items have no text: chains of thought will say next to nothing.",
                stacklevel=2,
            )
        self._usual = _usual_steps(split, len(interactions.items)) if split else frozenset()

    def chain_of_thought(self, history: Sequence[int], target: int) -> str:
        """
        Write the chain of one sample.

        Args:
            history (`Sequence[int]`):
                Item rows, oldest first.
            target (`int`):
                Item row of the next item.

        Returns:
            `str`: sentences; the same for the same arguments.

        Raises:
            ValueError: an empty history.
        """
        if not len(history):
            raise ValueError(f"a chain of thought to item row {target} needs a history of at least one item.")
        title = self._titles[target]
        shown = [self._facts[item] for item in history]
        for place, item in enumerate(history):
            if contains_name(self._names[item], title):  # taken before, or a part of the same name: it must not be quoted
                shown[place] = replace(shown[place], name=_NAMELESS)
        goal = self._facts[target]
        rank, position = max((_relation(facts, goal), place) for place, facts in enumerate(shown))
        nearest = _relation(shown[-1], goal)
        if nearest >= 3:  # within one brand the step is short, even if an older item is closer still
            rank, position = nearest, len(shown) - 1
        by = f" by {shown[-1].brand}" if shown[-1].brand else ""
        sentences = [f"The last item is {shown[-1].name}{by}."]
        if rank == 1 and goal.words:
            sentences += self._resemble(shown[position], goal)
        elif rank and position == len(shown) - 1:
            sentences += self._continue(shown, goal, rank)
        elif rank:
            sentences += self._return(shown, position, goal, rank)
        else:
            sentences += self._depart(shown, goal)
        if rank < 4 and (history[-1], target) in self._usual:
            sentences.append("Other people took this very step too.")
        return remove_name(" ".join(sentences), title)

    def chains_of_thought(self, samples: Dataset) -> list[str]:
        """
        Write the chain of each sample.

        Args:
            samples (`Dataset`):
                From `samples`: columns `history` and `target`.

        Returns:
            `list[str]`: one chain a sample, in order.
        """
        pairs = zip(samples["history"], samples["target"], strict=True)
        return [self.chain_of_thought(history, target) for history, target in pairs]

    def _continue(self, shown: list[_Facts], goal: _Facts, rank: int) -> list[str]:
        """The target continues the last item: say what they share."""
        if rank == 4:
            return [f"It belongs to {shown[-1].interest}, and the next part of it follows."]
        if rank == 3:
            return [self._conclusion(goal, rank)]
        sentences = _belongs(shown[-1])
        same = [facts for facts in shown[:-1] if _relation(facts, shown[-1]) >= rank]
        if same:
            sentences.append(f"Earlier {same[-1].name} was of the same kind.")
        return [*sentences, self._conclusion(goal, rank)]

    def _resemble(self, similar: _Facts, goal: _Facts) -> list[str]:
        """Nothing is known but words: name those that an item of the history shares with the target."""
        shared = " and ".join([word for word in similar.words if word in goal.words][:4])
        return [f"The words {shared} describe {similar.name}.", f"So another item with {shared} follows."]

    def _return(self, shown: list[_Facts], position: int, goal: _Facts, rank: int) -> list[str]:
        """The target continues an earlier item: recall both interests, compare them, return to the older one."""
        latest, older = shown[-1], shown[position]
        sentences = _belongs(latest)
        if latest.interest:
            sentences += self._recall(shown[:-1], latest.interest)
        sentences.append(f"There is another interest, {older.interest}, with {older.name} in it.")
        sentences += self._recall(shown[:position], older.interest)
        interests = [facts.interest for facts in shown]
        if position == len(shown) - 2 and len(shown) > 2 and interests[-1] == interests[-3] != interests[-2]:
            sentences.append("The two interests take turns, one item of each after the other.")
            sentences.append(f"The last turn went to {latest.interest}, so now {older.interest} has its turn again.")
        else:
            sentences.append("The recent items have drifted away from it, yet it has not been left for good.")
        return [*sentences, self._conclusion(goal, rank)]

    def _depart(self, shown: list[_Facts], goal: _Facts) -> list[str]:
        """Nothing in the history is like the target: go through the interests, then leave them."""
        latest = shown[-1].interest
        seen = dict.fromkeys(facts.interest for facts in reversed(shown[:-1]))
        others = [interest for interest in seen if interest not in ("", latest)][:2]
        sentences = _belongs(shown[-1])
        sentences += [f"Before that the person looked at {interest}." for interest in others]
        sentences.append("Nothing of this leads on from here.")
        return [*sentences, "A change is due, to something not seen in the history.", self._conclusion(goal, 0)]

    def _recall(self, shown: list[_Facts], interest: str) -> list[str]:
        earlier = [facts.name for facts in shown if facts.interest == interest]
        return [f"Of {interest} the person also took {earlier[-1]}."] if earlier else []

    def _conclusion(self, goal: _Facts, rank: int) -> str:
        """What kind of item comes next, by those attributes that do not single it out."""
        if rank == 4:
            return f"So the next part of {goal.interest} follows."
        shelf = f" in {goal.path[-1]}" if goal.path and self._paths[goal.path] > 1 else ""
        brand = f" by {goal.brand}" if goal.brand and self._brands[goal.brand] > 1 else ""
        if rank == 1:
            shelf = shelf or f" in {goal.path[-2]}"
        return f"So another item{shelf}{brand} follows." if shelf or brand else "So something of another kind follows."


def _facts(item: dict[str, str]) -> _Facts:
    part = _PART.match(item.get("title", ""))
    text = item.get("title") or item.get("description")
    known = "brand" in item or "categories" in item
    return _Facts(
        name=f'"{_plain(text)}"' if text else _NAMELESS,
        series=_plain(part["series"]) if part else "",
        brand=_plain(item.get("brand", "")),
        path=tuple(_plain(level) for level in item.get("categories", "").split(CATEGORY_SEPARATOR) if level),
        words=() if known or not text else tuple(dict.fromkeys(re.findall(r"[^\W\d_]{4,}", _plain(text).lower()))),
    )


def _belongs(facts: _Facts) -> list[str]:
    """A sentence on the item's group, unless that is its brand, which is named with the item."""
    return [f"It belongs to {facts.interest}."] if facts.series or (facts.path and not facts.brand) else []


def _relation(one: _Facts, other: _Facts) -> int:
    """How close two items are: 4 one series, 3 one brand, 2 one category, 1 sister categories or words, 0 nothing."""
    if one.series and (one.series, one.brand) == (other.series, other.brand):
        return 4
    if one.brand and one.brand == other.brand:
        return 3
    if one.path and one.path == other.path:
        return 2
    if one.words and other.words:
        return int(len(set(one.words) & set(other.words)) > 1)
    # The first level is the shop's department: all items may share it.
    return int(min(len(one.path), len(other.path)) > 2 and one.path[:-1] == other.path[:-1])


def _usual_steps(split: Split, num_items: int) -> frozenset[tuple[int, int]]:
    steps = [np.stack([items[:-1], items[1:]]) for items in map(np.asarray, split.train) if len(items) > 1]
    if not steps:
        return frozenset()
    origin, end = np.concatenate(steps, axis=1)
    pairs, counts = np.unique(origin.astype(np.int64) * num_items + end, return_counts=True)
    return frozenset(divmod(pair, num_items) for pair in pairs[counts >= _OFTEN].tolist())


def _plain(text: str) -> str:
    """The first words of a name, without what ends a sentence or is not printable, so that sentences stay whole."""
    words = "".join(letter if letter.isprintable() else " " for letter in text[:1000]).split()
    return " ".join(re.sub(r"[.!?,;:]+$", "", word[:40]) for word in words[:_WORDS_OF_A_NAME]).strip()
