"""Prompts and answers in token ids, and the small tokenizer."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.data import LasarProcessor, build_tokenizer
from lasar_hf.model.configuration_lasar import CONTROL_TOKENS, sid_tokens


SPECIAL = {"<|pad|>", "<|endoftext|>", *CONTROL_TOKENS, *sid_tokens(3, 4)}
CODES = np.array([[0, 1, 2], [3, 3, 3], [2, 0, 1], [1, 2, 0]])


def tokenizer_with_tokens():
    tokenizer = build_tokenizer(["Recommend the next item.", "a red chair and a blue chair"], vocab_size=300)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL_TOKENS, *sid_tokens(3, 4)]})
    return tokenizer


@pytest.fixture(scope="module")
def processor():
    return LasarProcessor(tokenizer_with_tokens(), CODES, max_history=3)


def test_text_layout(processor):
    assert processor.prompt_text([1, 0]) == "Recommend the next item.<a_3><b_3><c_3><a_0><b_1><c_2><|latent_start|>"


def test_newest_items_are_kept_oldest_first(processor):
    assert processor.prompt_text([0, 1, 2, 3]) == processor.prompt_text([1, 2, 3])
    assert processor.prompt_ids([0, 0, 0, 1, 2, 3]) == processor.prompt_ids([1, 2, 3])


@given(history=st.lists(st.integers(0, 3), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_prompt_is_what_the_tokenizer_says(processor, history):
    text = processor.prompt_text(history)
    assert processor.prompt_ids(history) == processor.tokenizer(text, add_special_tokens=False).input_ids


def test_answer(processor):
    assert processor.tokenizer.convert_ids_to_tokens(processor.answer_ids([1])[0]) == ["<a_3>", "<b_3>", "<c_3>"]
    assert processor.answer_ids([1, 0]) == [processor.answer_ids([1])[0], processor.answer_ids([0])[0]]
    assert processor.answer_ids([]) == []


@given(
    text=st.lists(
        st.one_of(st.sampled_from([*CONTROL_TOKENS, "<a_0>", "<c_3>", "<|endoftext|>", "<|pad|>", " "]), st.text())
    ).map("".join)
)
@settings(max_examples=50, deadline=None)
def test_item_text_never_becomes_a_special_token(processor, text):
    ids = processor.text_ids([text])[0]
    assert not [token for token in processor.tokenizer.convert_ids_to_tokens(ids) if token in SPECIAL]
    assert processor.tokenizer.decode(ids) == text  # and nothing is lost


def test_free_texts_is_free_text_of_each(processor):
    texts = ["red <a_0> chair", "", "blue"]
    assert processor.text_ids(texts) == [processor.text_ids([text])[0] for text in texts]
    assert processor.text_ids([]) == []


@pytest.mark.parametrize("history", [[4], [-1], [0, 99]])
def test_unknown_item_row(processor, history):
    with pytest.raises(ValueError, match="there are 4 items"):
        processor.prompt_ids(history)
    with pytest.raises(ValueError, match="there are 4 items"):
        processor.prompt_text(history)
    with pytest.raises(ValueError, match="there are 4 items"):
        processor.answer_ids([history[-1]])[0]


def test_empty_history(processor):
    with pytest.raises(ValueError, match="at least one item"):
        processor.prompt_ids([])


def test_missing_tokens_are_named():
    tokenizer = build_tokenizer(["a"], vocab_size=258)
    with pytest.raises(ValueError, match=r"no token <\|latent_start\|>"):
        LasarProcessor(tokenizer, CODES)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL_TOKENS, *sid_tokens(2, 4)]})
    with pytest.raises(ValueError, match="no token <c_0>"):
        LasarProcessor(tokenizer, CODES)


def test_tokens_that_are_not_special_are_refused():
    tokenizer = build_tokenizer(["a"], vocab_size=258)
    tokenizer.add_special_tokens({"extra_special_tokens": list(CONTROL_TOKENS)})
    tokenizer.add_tokens(sid_tokens(3, 4))
    with pytest.raises(ValueError, match="<a_0>, but not as a special token"):
        LasarProcessor(tokenizer, CODES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_history": 0}, "`max_history` is 0"),
        ({"codes": CODES[0]}, "expected integers"),
        ({"codes": CODES / 2}, "expected integers"),
        ({"codes": CODES[:0]}, "expected integers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LasarProcessor(tokenizer_with_tokens(), **({"codes": CODES} | arguments))


def test_build_tokenizer_is_deterministic_and_lossless():
    texts = [f"the {word} number {n}" for n in range(40) for word in ("red", "green", "blue")]
    one, two = build_tokenizer(texts, 300), build_tokenizer(texts, 300)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert 258 < len(one) <= 300
    assert one.decode(one("日本 näïve 7\n\t", add_special_tokens=False).input_ids) == "日本 näïve 7\n\t"
    assert (one.pad_token_id, one.eos_token_id, one.bos_token_id) == (0, 1, 1)
    assert len(one("the green number").input_ids) < len("the green number") / 2


def test_build_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer_with_tokens().save_pretrained(tmp_path)
    loaded = LasarProcessor(AutoTokenizer.from_pretrained(tmp_path), CODES)
    assert loaded.prompt([0, 1]) == LasarProcessor(tokenizer_with_tokens(), CODES).prompt([0, 1])
    assert loaded.free_text("x <a_0>") == LasarProcessor(tokenizer_with_tokens(), CODES).free_text("x <a_0>")


def test_build_tokenizer_too_small():
    with pytest.raises(ValueError, match="`vocab_size` is 257, expected at least 258"):
        build_tokenizer(["a"], 257)


def test_build_tokenizer_takes_an_endless_word():
    begin = time.perf_counter()
    tokenizer = build_tokenizer(["x" * 100_000, "a red chair"], 300)
    assert time.perf_counter() - begin < 3  # 7 s and more when the whole word is looked at
    assert len(tokenizer("a red chair").input_ids) < 11
