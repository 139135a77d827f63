"""Which answers of a language model cannot be chains of thought: giving the target away, or no text."""

import re
import unicodedata
from collections import Counter

from .teacher import SPECIAL_TOKENS, bare, holds


REFUSALS = {
    "title": "It named the next item by its title or its own description",
    "token": "It contained a code in angle brackets",
    "empty": "It was empty or far too short",
    "garbage": "It was not plain text",
    "long": "It was far too long",
    "endpoint": "The endpoint refused the request",
}
_FEWEST_LETTERS, _MOST_LETTERS, _SHARE_OF_LETTERS = 20, 4000, 0.7
# Control characters, those that turn the direction of writing, and what stands for a character that was lost.
_UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffd]")
_NO_CHARACTERS = {"Cs", "Co", "Cn"}  # half of a pair, private, unassigned: no file of text takes the first


def refusal(text: str, *names: str) -> str | None:
    """
    Why an answer cannot be used, or `None`.

    Args:
        text (`str`):
            The answer.
        names (`str`):
            What would give the target away, such as its title. Each is looked for as whole words, in whatever
            typography (see `bare`); one of fewer than two letters or digits is not.

    Returns:
        `str`, *optional*: a key of `REFUSALS`.
    """
    kinds = Counter(map(unicodedata.category, text))
    letters, marks = (sum(kinds[kind] for kind in kinds if kind[0] == group) for group in "LM")
    if letters < _FEWEST_LETTERS:
        return "empty"
    if len(text) > _MOST_LETTERS:
        return "long"
    if SPECIAL_TOKENS.search(text):
        return "token"
    plain = bare(text)
    if any(holds(plain, bare(name)) for name in names):
        return "title"
    if letters + marks < _SHARE_OF_LETTERS * sum(not letter.isspace() for letter in text):
        return "garbage"
    return "garbage" if _UNREADABLE.search(text) or not kinds.keys().isdisjoint(_NO_CHARACTERS) else None
