"""Cutting chains of thought: where, how often, and that nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.reasoning import Segmenter, segment
from lasar_hf.reasoning import segments as segments_module
from lasar_hf.reasoning.segments import split_sentences


TOPICS = {"red": [1.0, 0.0, 0.0], "sea": [0.0, 1.0, 0.0], "tea": [0.0, 0.0, 1.0]}


def by_topic(sentences):
    """An embedder that reads the first word only."""
    return np.array([TOPICS[sentence.split()[0].lower()] for sentence in sentences])


def sentence(topic, number):
    return f"{topic.capitalize()} one two three {number}."


def test_cuts_where_the_topic_changes():
    parts = [sentence(topic, row) for row, topic in enumerate(["red", "red", "sea", "tea", "tea", "tea"])]
    expected = [" ".join(parts[:2]), parts[2], " ".join(parts[3:])]
    assert segment([" ".join(parts)], by_topic, min_words=1) == [expected]


def test_short_parts_are_not_cut():
    parts = [sentence(topic, row) for row, topic in enumerate(["red", "red", "sea", "tea", "tea", "tea"])]
    (segments,) = segment([" ".join(parts)], by_topic, min_words=6)
    assert len(segments) == 2
    assert all(len(part.split()) >= 6 for part in segments)


def test_lowest_similarity_is_cut_first():
    angles = dict(zip("abcd", np.radians([0, 10, 60, 170]), strict=True))  # gaps of 10, 50 and 110 degrees

    def embed(sentences):
        return np.array([[np.cos(angles[text[0]]), np.sin(angles[text[0]])] for text in sentences])

    text = "a a. b b. c c. d d. a a. a a."
    assert segment([text], embed, max_segments=2, min_words=1) == [["a a. b b. c c. d d.", "a a. a a."]]
    assert segment([text], embed, max_segments=3, min_words=1) == [["a a. b b. c c.", "d d.", "a a. a a."]]
    assert segment([text], embed, max_segments=1, min_words=1) == [[text]]


def test_limit_depends_on_all_texts():
    calm, lively = "Red a. Red b. Red c.", "Red a. Sea b. Tea c."
    assert list(map(len, segment([calm, lively], by_topic, min_words=1))) == [1, 3]
    assert list(map(len, segment([calm, lively], by_topic, min_words=1, threshold=2.0))) == [1, 1]


def test_each_distinct_sentence_is_embedded_once():
    asked = []

    def embed(sentences):
        asked.append(list(sentences))
        return by_topic(sentences)

    segment(["Red a. Sea b.", "Red a. Tea c.", "Sea b. Red a."], embed)
    assert asked == [["Red a.", "Sea b.", "Tea c."]]


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["Red a.", "Sea b c d!", "Tea e f?", "Red g h i j k."]), min_size=1, max_size=12),
        min_size=1, max_size=4,
    ),
    max_segments=st.integers(1, 5),
    min_words=st.integers(1, 8),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_segments_join_to_the_text(texts, max_segments, min_words):
    texts = [" ".join(parts) for parts in texts]
    for text, segments in zip(texts, segment(texts, by_topic, max_segments, min_words), strict=True):
        assert " ".join(segments) == text
        assert 1 <= len(segments) <= max_segments
        assert len(segments) == 1 or min(len(part.split()) for part in segments) >= min_words


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_batch_size_does_not_matter(data):
    """Fitted and cut in parts, with few sentences embedded and few gaps compared at a time."""
    parts = st.lists(st.sampled_from(["Red a.", "Sea b c d!", "Tea e f?", "Red g h i j k."]), min_size=1, max_size=9)
    texts = [" ".join(some) for some in data.draw(st.lists(parts, min_size=1, max_size=8))]
    size = data.draw(st.integers(1, 9))
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    expected = segment(texts, by_topic, min_words=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments_module, "BATCH_SIZE", data.draw(st.integers(1, 4)))
        segmenter = Segmenter(by_topic, min_words=1).fit(iter(batches))
        assert [segments for batch in batches for segments in segmenter.cut(batch)] == expected


def test_default_embedder_finds_a_change_of_words():
    text = (
        "The person reads crime novels by Hill. Crime novels by Hill came twice. "
        "Kettles boil water quickly. Kettles boil water for tea."
    )
    assert segment([text], max_segments=2) == [
        [
            "The person reads crime novels by Hill. Crime novels by Hill came twice.",
            "Kettles boil water quickly. Kettles boil water for tea.",
        ]
    ]


def test_default_embedder_is_deterministic():
    texts = [f"Word{row % 7} and other{row} things. More{row % 3} of them follows word{row % 5}." for row in range(40)]
    assert segment(texts) == segment(texts)


@pytest.mark.parametrize("text", ["!!! ???", "a. a. b.", "x", "!!! ???\n!!!", "a! b? c. " * 20])
def test_default_embedder_accepts_any_text(text):
    assert " ".join(segment([text])[0]).split() == text.split()


def test_sentences():
    assert split_sentences("One  two. Three 1.75mm four!\nFive\n\n  six? ") == [
        "One two.", "Three 1.75mm four!", "Five", "six?"
    ]  # fmt: skip


def test_empty_text_is_refused():
    with pytest.raises(ValueError, match="texts: text 1"):
        segment(["Red a.", "  "], by_topic)


def test_max_segments_below_one_is_refused():
    with pytest.raises(ValueError, match="max_segments"):
        segment(["Red a."], by_topic, max_segments=0)
