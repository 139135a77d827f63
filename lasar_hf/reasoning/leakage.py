"""The leak check: a chain of thought must not give the target away, and must be plain text."""

import html
import re
import unicodedata
from collections import Counter


SPECIAL_TOKENS = re.compile(r"<[a-z]_\d+>|<\|[^|<>]*\|>")  # Semantic-ID and control tokens
# Scripts without spaces between words, or with endings on names (Thai and its neighbours, Chinese, Japanese, Korean),
# are compared letter by letter.
_LETTERWISE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\U00020000-\U0003fffd"
_WORD = re.compile(rf"(?=\w)[{_LETTERWISE}]|[^\W_{_LETTERWISE}]+")

REJECTIONS = {
    "title": "It named the next item by its title or its own description",
    "token": "It contained a code in angle brackets",
    "empty": "It was empty or far too short",
    "garbage": "It was not plain text",
    "long": "It was far too long",
    "endpoint": "The endpoint refused the request",
}
MIN_LETTERS, MAX_CHARACTERS, MIN_LETTER_SHARE = 20, 4000, 0.7
# Control characters, marks that change the writing direction, and the replacement character.
_UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffd]")
_NOT_CHARACTERS = {"Cs", "Co", "Cn"}  # half of a surrogate pair (which no text file can store), private, unassigned


def rejection_reason(text: str, *names: str) -> str | None:
    """
    The reason (a key of `REJECTIONS`) why a text cannot be a chain of thought, or `None` if it can.

    The text must not contain any of the `names` that give the target away, such as its title, as whole words after
    [`normalize_words`]. Names of fewer than two letters or digits are ignored.
    """
    categories = Counter(map(unicodedata.category, text))
    letters, marks = (sum(categories[name] for name in categories if name[0] == group) for group in "LM")
    if letters < MIN_LETTERS:
        return "empty"
    if len(text) > MAX_CHARACTERS:
        return "long"
    if SPECIAL_TOKENS.search(text):
        return "token"
    words = normalize_words(text)
    if any(contains_name(words, normalize_words(name)) for name in names):
        return "title"
    if letters + marks < MIN_LETTER_SHARE * sum(not letter.isspace() for letter in text):
        return "garbage"
    return "garbage" if _UNREADABLE.search(text) or not categories.keys().isdisjoint(_NOT_CHARACTERS) else None


def normalize_words(text: str) -> str:
    """
    The words of a text in lower case, separated by single spaces. HTML entities, accents, invisible characters,
    punctuation and symbols are removed, so that texts which differ only in typography become equal.
    """
    text = html.unescape(text)
    if not text.isascii():
        # Without the spaces, NFKD would turn the trademark signs into letters of the name.
        letters = unicodedata.normalize("NFKD", text.translate({ord("™"): " ", ord("℠"): " "}))
        text = "".join(letter for letter in letters if unicodedata.category(letter) not in ("Mn", "Cf"))
        text = unicodedata.normalize("NFC", text)  # joins the parts of Korean syllables again
    return " ".join(_WORD.findall(text.casefold()))


def contains_name(words: str, name: str) -> bool:
    """Whether normalised words contain a normalised name of at least two letters as whole words."""
    return len(name) > 1 and f" {name} " in f" {words} "


def remove_tokens(text: str) -> str:
    """Replace Semantic-ID and control tokens by blanks, until replacing one no longer creates another."""
    while SPECIAL_TOKENS.search(text):
        text = SPECIAL_TOKENS.sub(" ", text)
    return text


def remove_name(text: str, name: str) -> str:
    """Remove a normalised name and all special tokens, until removing one no longer creates another."""
    while contains_name(normalize_words(text), name) or SPECIAL_TOKENS.search(text):
        text = " ".join(_remove_first(remove_tokens(text).split(), name))
    return text


def _remove_first(words: list[str], name: str) -> list[str]:
    """Words without the first occurrence of a normalised name; a sentence that ended with it still ends there."""
    # One written word can be several normalised ones, so each normalised word keeps the index of its written word.
    parts = [(part, index) for index, word in enumerate(words) for part in normalize_words(word).split()]
    size = len(name.split())
    for start in range(len(parts) - size + 1):
        window = parts[start : start + size]
        if contains_name(" ".join(part for part, _ in window), name):
            first, last = window[0][1], window[-1][1]
            end = words[last][-1] if words[last][-1] in ".!?" else ""
            before = [*words[: first - 1], words[first - 1] + end] if first else []
            return [*before, *words[last + 1 :]]
    return words
