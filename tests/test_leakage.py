"""The leak check: titles in any typography are found, and only they."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.reasoning.leakage import normalize_words, rejection_reason, remove_name


@pytest.mark.parametrize(
    "text",
    [
        "The person keeps to cups. A cup of another colour is due.",
        "The person keeps to cups. A cup of another colour is due. 🙂 (½ — “ok”)",
        "האיש אוסף כוסות.\u200f הבאה תהיה אדומה.",
        "Der Nächste ist ein Band der Reihe.",
        "这个人一直在买同一个系列的书，下一本也来自这个系列。",
    ],
)
def test_text_of_any_language_is_accepted(text):
    assert rejection_reason(text, "Silent Harbor, Volume Six") is None


@pytest.mark.parametrize(
    ("title", "written"),
    [
        ("Silent Harbor, Volume Six", "Sil\u200bent\u00a0HARBOR, volume six"),
        ("Silent Harbor, Volume Six", "Ｓilent Harbor, Volume Six"),
        ("Silent Harbor, Volume Six", "silent\nharbor, VOLUME  SIX"),
        ("Silent Harbor, Volume Six", "Silent *Harbor* Volume Six"),
        ("Silent Harbor, Volume Six", "Silent Harbor, Volume Six's heir"),
        ("Levi's Jeans", "Levi\u2019s Jeans"),
        ("Wi-Fi Lamp", "Wi\u2011Fi Lamp"),
        ("Wi\u2013Fi Lamp", "Wi-Fi Lamp"),
        ("Café Mug Deluxe", "Cafe Mug Deluxe"),
        ("Cafe Mug Deluxe", "cafe\u0301 mug deluxe"),
        ("İstanbul", "istanbul"),
        ("ISTANBUL", "İstanbul"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom & Jerry", "tom &amp; jerry"),
        ('Mug 3" Wide', "mug 3\u2033 wide"),
        ("Gauge™ Pro", "Gauge Pro"),
        ("静港第六卷", "系列的静港第六卷这本书"),  # no spaces between words
        ("머그컵", "머그컵을"),  # an ending on the word
    ],
)
def test_title_in_other_typography_is_found(title, written):
    assert rejection_reason(f"So the next that may well follow is {written}, of course.", title) == "title"


@pytest.mark.parametrize("title", ["Art", "It", "e", "7", ".", "™", "", "person of", "Volume Fivefold"])
def test_parts_of_words_are_not_titles(title):
    assert rejection_reason("The party of people of smart taste took part: Volume Five fits.", title) is None


@given(st.text(max_size=60), st.text(min_size=1, max_size=12), st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_title_inside_any_text_is_rejected(before, title, after):
    if len(normalize_words(title)) > 1:
        assert rejection_reason(f"{before} {title} {after} and then some more words follow", title) is not None


@given(st.text(max_size=40))
@settings(deadline=None)
def test_normalized_words_are_letters_and_single_spaces(text):
    words = normalize_words(text)
    assert all(word.isalnum() for word in words.split(" ") if words)
    assert words == normalize_words(words) == normalize_words(f" {text}\n")


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("It is Big Cup. A mug follows.", "big cup", "It is. A mug follows."),  # the sentence still ends
        ("A cup cup holder holder.", "cup holder", "A."),  # removing one creates another
        ("A <a_<|x|>1> cup.", "mug", "A <a_ 1> cup."),
    ],
)
def test_remove_name(text, name, expected):
    assert remove_name(text, name) == expected
