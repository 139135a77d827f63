"""Which answers of a language model cannot be chains of thought: giving the target away, or no text."""

import html
import re
import unicodedata
from collections import Counter


SPECIAL_TOKENS = re.compile(r"<[a-z]_\d+>|<\|[^|<>]*\|>")  # SID and control tokens
# A word, as titles are compared. Scripts that put no spaces between words or add endings to names (Thai and its
# neighbours, Chinese, Japanese, Korean) are compared letter by letter.
_LETTERWISE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\U00020000-\U0003fffd"
_BARE_WORD = re.compile(rf"(?=\w)[{_LETTERWISE}]|[^\W_{_LETTERWISE}]+")

REJECTIONS = {
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


def rejection_reason(text: str, *names: str) -> str | None:
    """
    Why an answer cannot be used, or `None`.

    Args:
        text (`str`):
            The answer.
        names (`str`):
            What would give the target away, such as its title. Each is looked for as whole words, in whatever
            typography (see `bare`); one of fewer than two letters or digits is not.

    Returns:
        `str`, *optional*: a key of `REJECTIONS`.
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


def fold(text: str) -> str:
    """Text in one case, with single spaces."""
    return " ".join(text.split()).casefold()


def bare(text: str) -> str:
    """
    Text as it is compared with a title: its words in one case and in their plainest letters, and nothing between them
    but single spaces. HTML entities, accents, invisible letters, punctuation and symbols make no difference.
    """
    text = html.unescape(text)
    if not text.isascii():
        letters = unicodedata.normalize("NFKD", text.translate({ord("™"): " ", ord("℠"): " "}))  # no letters of a name
        text = "".join(letter for letter in letters if unicodedata.category(letter) not in ("Mn", "Cf"))
        text = unicodedata.normalize("NFC", text)  # Korean syllables in one piece again
    return " ".join(_BARE_WORD.findall(fold(text)))


def holds(text: str, name: str) -> bool:
    """Whether a bare text holds a bare name as whole words; one of fewer than two letters is not looked for."""
    return len(name) > 1 and f" {name} " in f" {text} "


def without_name(text: str, title: str) -> str:
    """Take the bare title, SID and control tokens out, and again as long as a cut joins a new one."""
    while holds(bare(text), title) or SPECIAL_TOKENS.search(text):
        text = " ".join(_cut(SPECIAL_TOKENS.sub(" ", text).split(), title))
    return text


def _cut(words: list[str], title: str) -> list[str]:
    """Words without those that make up the first occurrence of the bare title; the sentence still ends there."""
    parts = [(part, place) for place, word in enumerate(words) for part in bare(word).split()]
    size = len(title.split())
    for start in range(len(parts) - size + 1):
        run = parts[start : start + size]
        if holds(" ".join(part for part, _ in run), title):
            first, last = run[0][1], run[-1][1]
            end = words[last][-1] if words[last][-1] in ".!?" else ""
            before = [*words[: first - 1], words[first - 1] + end] if first else []
            return [*before, *words[last + 1 :]]
    return words
