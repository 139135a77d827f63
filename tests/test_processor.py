"""The prompt format: token ids, text, padding, saving and loading, and refused arguments."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from lasar_hf import LasarProcessor, RecommendOutput, SidCatalog
from lasar_hf.data import build_tokenizer
from lasar_hf.model.configuration_lasar import CONTROL_TOKENS, sid_tokens


SPECIAL = {"<|pad|>", "<|endoftext|>", *CONTROL_TOKENS, *sid_tokens(3, 4)}
CATALOG = SidCatalog(
    [[0, 1, 2], [3, 3, 3], [2, 0, 1], [1, 2, 0]], ["10", "11", "12", "13"], titles=["Apple", None, "Chair", "Desk"]
)


def lasar_tokenizer(levels: int = 3):
    tokenizer = build_tokenizer(["Recommend the next item.", "a red chair and a blue chair"], vocab_size=300)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL_TOKENS, *sid_tokens(levels, 4)]})
    return tokenizer


def adding_tokenizer(template: str):
    """A tokenizer that adds special tokens to each text, as Llama's adds BOS."""
    tokenizer = lasar_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@pytest.fixture(scope="module")
def processor():
    return LasarProcessor(lasar_tokenizer(), CATALOG, max_history=3)


def test_layout_of_a_prompt(processor):
    assert processor.prompt_text([1, 0]) == "Recommend the next item.<a_3><b_3><c_3><a_0><b_1><c_2><|latent_start|>"


def test_most_recent_items_are_kept(processor):
    assert processor.prompt_text([0, 1, 2, 3]) == processor.prompt_text([1, 2, 3])
    assert processor.prompt_ids([0, 0, 0, 1, 2, 3]) == processor.prompt_ids([1, 2, 3])


@given(history=st.lists(st.integers(0, 3), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_prompt_ids_are_the_tokenised_text(processor, history):
    text = processor.prompt_text(history)
    assert processor.prompt_ids(history) == processor.tokenizer(text, add_special_tokens=False).input_ids


def test_answers_are_semantic_ids(processor):
    assert processor.tokenizer.convert_ids_to_tokens(processor.answer_ids([1])[0]) == ["<a_3>", "<b_3>", "<c_3>"]
    assert processor.answer_ids([1, 0]) == [*processor.answer_ids([1]), *processor.answer_ids([0])]
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


def test_texts_are_tokenised_independently(processor):
    texts = ["red <a_0> chair", "", "blue"]
    assert processor.text_ids(texts) == [processor.text_ids([text])[0] for text in texts]
    assert processor.text_ids([]) == []


def test_a_batch_of_histories_is_left_padded(processor):
    batch = processor([["11"], ["10", "12"]])
    short, long = processor.prompt_ids([1]), processor.prompt_ids([0, 2])
    missing = len(long) - len(short)
    assert batch["input_ids"].tolist() == [[processor.tokenizer.pad_token_id] * missing + short, long]
    assert batch["attention_mask"].tolist() == [[0] * missing + [1] * len(short), [1] * len(long)]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long


def test_item_ids_may_be_numbers(processor):
    expected = processor([["11", "10"]])["input_ids"]
    assert torch.equal(processor([[11, 10]])["input_ids"], expected)
    assert torch.equal(processor([np.array([11, 10])])["input_ids"], expected)


@pytest.mark.parametrize("histories", [[["10", "99"]], [["10", 99]], [[10.0]]])
def test_unknown_item_ids_are_refused(processor, histories):
    with pytest.raises(ValueError, match="catalogue has no item"):
        processor(histories)


@pytest.mark.parametrize("histories", ["10", ["10", "11"], [10, 11], [[]]])
def test_histories_are_lists_of_items(processor, histories):
    with pytest.raises(ValueError, match="history"):
        processor(histories)


@pytest.mark.parametrize("history", [[4], [-1], [0, 99]])
def test_item_indices_outside_the_catalogue_are_refused(processor, history):
    for method in (processor.prompt_ids, processor.prompt_text, processor.answer_ids):
        with pytest.raises(ValueError, match="Item indices"):
            method(history)


def test_recommendations_are_decoded_without_padding(processor):
    scores = torch.tensor([[-0.5, -1.0], [0.0, -torch.inf]])
    output = RecommendOutput(items=torch.tensor([[2, 1], [0, -1]]), scores=scores)
    assert processor.decode_recommendations(output) == [
        [
            {"item_id": "12", "title": "Chair", "score": -0.5},
            {"item_id": "11", "title": None, "score": -1.0},
        ],
        [{"item_id": "10", "title": "Apple", "score": 0.0}],
    ]


def test_recommendations_of_a_catalogue_without_titles():
    catalog = SidCatalog(CATALOG.codes, CATALOG.item_ids)
    output = RecommendOutput(items=torch.tensor([[2]]), scores=torch.tensor([[0.0]]))
    decoded = LasarProcessor(lasar_tokenizer(), catalog).decode_recommendations(output)
    assert decoded == [[{"item_id": "12", "title": None, "score": 0.0}]]


# What the tokenizer adds by itself: nothing, BOS as Llama's, EOS, or both.
@pytest.mark.parametrize(("template", "has_bos"), [("$A", 0), ("<s> $A", 1), ("$A </s>", 0), ("<s> $A </s>", 1)])
def test_bos_is_there_once_and_eos_never(template, has_bos):
    tokenizer = adding_tokenizer(template)
    processor = LasarProcessor(tokenizer, CATALOG)
    tokenised = tokenizer(processor.prompt_text([1, 0]), add_special_tokens=False).input_ids
    called = processor([["11", "10"]])["input_ids"][0].tolist()
    assert processor.add_bos == bool(has_bos)
    assert processor.prompt_ids([1, 0]) == tokenised == called
    assert called.count(tokenizer.bos_token_id) == has_bos
    assert called[:has_bos] == [tokenizer.bos_token_id] * has_bos
    assert tokenizer.eos_token_id not in called


def test_add_bos_overrules_the_tokenizer():
    tokenizer = adding_tokenizer("<s> $A")
    assert tokenizer.bos_token_id not in LasarProcessor(tokenizer, CATALOG, add_bos=False).prompt_ids([0])
    tokenizer = adding_tokenizer("$A")
    assert LasarProcessor(tokenizer, CATALOG, add_bos=True).prompt_ids([0])[0] == tokenizer.bos_token_id


def test_add_bos_needs_a_bos_token():
    tokenizer = lasar_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="add_bos"):
        LasarProcessor(tokenizer, CATALOG, add_bos=True)


@pytest.mark.parametrize("bos_template", ["$A", "<s> $A </s>"])
def test_processor_round_trip(tmp_path, bos_template):
    processor = LasarProcessor(adding_tokenizer(bos_template), CATALOG, instruction="Which item?", max_history=2)
    processor.save_pretrained(tmp_path)
    for loaded in (LasarProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, LasarProcessor)
        assert (loaded.instruction, loaded.max_history) == ("Which item?", 2)
        assert loaded.add_bos == processor.add_bos
        assert loaded.prompt_ids([0, 1, 2]) == processor.prompt_ids([0, 1, 2])
        assert loaded.text_ids(["x <a_0>"]) == processor.text_ids(["x <a_0>"])
        assert loaded.catalog.titles == CATALOG.titles


def test_check_format_compares_what_is_given(processor):
    processor.check_format()
    processor.check_format(instruction="Recommend the next item.", max_history=3)
    with pytest.raises(ValueError, match="instruction"):
        processor.check_format(instruction="Another one.")
    with pytest.raises(ValueError, match="max_history"):
        processor.check_format(max_history=4)


def test_missing_tokens_are_named():
    tokenizer = build_tokenizer(["a"], vocab_size=258)
    with pytest.raises(ValueError, match=r"<\|latent_start\|>"):
        LasarProcessor(tokenizer, CATALOG)
    with pytest.raises(ValueError, match="<c_0>"):
        LasarProcessor(lasar_tokenizer(levels=2), CATALOG)


def test_tokens_that_are_not_special_are_refused():
    tokenizer = build_tokenizer(["a"], vocab_size=258)
    tokenizer.add_special_tokens({"extra_special_tokens": list(CONTROL_TOKENS)})
    tokenizer.add_tokens(sid_tokens(3, 4))
    with pytest.raises(ValueError, match="<a_0>"):
        LasarProcessor(tokenizer, CATALOG)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_history": 0},
        {"instruction": "Items like <a_1>:"},
        {"instruction": "Think <|latent|>"},
        {"layout": "{history}{instruction}<|latent_start|>"},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LasarProcessor(lasar_tokenizer(), CATALOG, **arguments)


def test_another_saved_layout_is_refused(tmp_path):
    LasarProcessor(lasar_tokenizer(), CATALOG).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace("{instruction}{history}", "{history}{instruction}"))
    with pytest.raises(ValueError, match="layout"):
        LasarProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["instruction", "max_history", "add_bos", "layout"])
def test_incomplete_prompt_format_is_refused(processor, tmp_path, name):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=name):
        LasarProcessor.from_pretrained(tmp_path)


def test_folder_without_prompt_format_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="processor_config.json"):
        LasarProcessor.from_pretrained(tmp_path)


def test_mistyped_prompt_format_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos": "false"}))
    with pytest.raises(ValueError, match="add_bos"):
        LasarProcessor.from_pretrained(tmp_path)
