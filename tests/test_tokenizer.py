"""The byte-level tokenizer for backbones trained from scratch."""

import time

import pytest

from lasar_hf.data import build_tokenizer


def test_build_tokenizer_is_deterministic_and_lossless():
    texts = [f"the {word} number {n}" for n in range(40) for word in ("red", "green", "blue")]
    one, two = build_tokenizer(texts, 300), build_tokenizer(texts, 300)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert 258 < len(one) <= 300
    assert one.decode(one("日本 näïve 7\n\t", add_special_tokens=False).input_ids) == "日本 näïve 7\n\t"
    assert (one.pad_token_id, one.eos_token_id, one.bos_token_id) == (0, 1, 1)
    assert len(one("the green number").input_ids) < len("the green number") / 2


def test_build_tokenizer_too_small():
    with pytest.raises(ValueError, match="vocab_size"):
        build_tokenizer(["a"], 257)


def test_build_tokenizer_reads_an_endless_word():
    begin = time.perf_counter()
    tokenizer = build_tokenizer(["x" * 100_000, "a red chair"], 300)
    assert time.perf_counter() - begin < 3  # 7 s and more when the whole word is looked at
    assert len(tokenizer("a red chair").input_ids) < 11
