"""Training rows: layout, where the loss is, and that nothing but the training part is read."""

import numpy as np
import pytest
from datasets import Dataset

from lasar_hf.data import (
    Interactions,
    LasarProcessor,
    alignment_examples,
    build_tokenizer,
    grpo_examples,
    history_examples,
    leave_one_out,
    mix_examples,
    reasoning_examples,
    samples,
    sft_examples,
)
from lasar_hf.model.configuration_lasar import CONTROL_TOKENS, sid_tokens
from lasar_hf.reasoning import AnchorStore


CODES = np.array([[0, 1], [2, 2], [1, 0], [2, 0], [1, 1], [0, 0]])
DATA = Interactions(
    [f"i{row}" for row in range(6)],
    [
        {"title": "red chair", "description": "a chair"},
        {"title": "blue <a_0> chair"},
        {"title": "tea"},
        {},
        {"title": "secret validation item"},
        {"title": "secret test item", "description": "x" * 1000},
    ],
    ["u", "v"],
    [[0, 1, 2, 4, 5], [3, 0, 4, 5]],
)


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_tokenizer(["Recommend the next item.", "red blue chair tea"], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL_TOKENS, *sid_tokens(2, 3)]})
    return LasarProcessor(tokenizer, CODES, instruction="Next:")


@pytest.fixture(scope="module")
def split():
    return leave_one_out(DATA)


def text(processor, ids):
    return processor.tokenizer.decode(ids)


def learned(processor, row):
    """The tokens under the loss, and a check that labels are -100 or the token itself."""
    assert len(row["labels"]) == len(row["input_ids"])
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return text(processor, [label for label in row["labels"] if label != -100])


def test_sft_rows(processor, split):
    rows = sft_examples(samples(split, "train"), processor)
    assert rows.column_names == ["input_ids", "labels", "task"] and set(rows["task"]) == {"next_item"}
    assert [text(processor, ids) for ids in rows["input_ids"]] == [
        "Next:<a_0><b_1><|latent_start|><|latent_end|><a_2><b_2>",
        "Next:<a_0><b_1><a_2><b_2><|latent_start|><|latent_end|><a_1><b_0>",
        "Next:<a_2><b_0><|latent_start|><|latent_end|><a_0><b_1>",
    ]
    assert [learned(processor, row) for row in rows] == ["<a_2><b_2>", "<a_1><b_0>", "<a_0><b_1>"]


def test_history_rows_learn_every_item(processor, split):
    rows = history_examples(split, processor)
    assert [text(processor, ids) for ids in rows["input_ids"]] == [
        "Next:<a_0><b_1><a_2><b_2><|latent_start|><|latent_end|><a_1><b_0>",
        "Next:<a_2><b_0><|latent_start|><|latent_end|><a_0><b_1>",
    ]
    assert [learned(processor, row) for row in rows] == ["<a_0><b_1><a_2><b_2><a_1><b_0>", "<a_2><b_0><a_0><b_1>"]


def test_history_rows_under_a_short_limit(processor, split):
    short = LasarProcessor(processor.tokenizer, CODES, instruction="Next:", max_history=1)
    row = history_examples(split, short)[0]
    assert text(short, row["input_ids"]) == "Next:<a_2><b_2><|latent_start|><|latent_end|><a_1><b_0>"
    assert learned(short, row) == "<a_2><b_2><a_1><b_0>"


def test_alignment_rows(processor, split):
    rows = alignment_examples(DATA, split, processor, max_text_tokens=12)
    of = {task: [row for row in rows if row["task"] == task] for task in set(rows["task"])}
    assert {task: len(found) for task, found in of.items()} == {
        "title_to_sid": 5, "description_to_sid": 2, "sid_to_title": 5, "titles_to_sid": 1
    }  # fmt: skip
    row = next(row for row in of["title_to_sid"] if "red chair" in text(processor, row["input_ids"]))
    assert text(processor, row["input_ids"]).endswith(" red chair<|latent_start|><|latent_end|><a_0><b_1>")
    assert learned(processor, row) == "<a_0><b_1>"
    row = next(row for row in of["sid_to_title"] if "red chair" in text(processor, row["input_ids"]))
    assert text(processor, row["input_ids"]).endswith(" <a_0><b_1>red chair<|endoftext|>")
    assert learned(processor, row) == "red chair<|endoftext|>"
    long = next(row for row in of["description_to_sid"] if "xx" in text(processor, row["input_ids"]))
    assert len(long["input_ids"]) < 80 and learned(processor, long) == "<a_0><b_0>"


def test_title_histories_use_the_training_part_only(processor, split):
    (row,) = alignment_examples(DATA, split, processor, tasks=["titles_to_sid"])
    shown = text(processor, row["input_ids"])
    assert shown.endswith(" red chair; blue <a_0> chair<|latent_start|><|latent_end|><a_1><b_0>")
    assert "secret" not in shown
    # "<a_0>" of the title is text: the only such token of the row would be one of the answer
    assert processor.tokenizer.convert_tokens_to_ids("<a_0>") not in row["input_ids"]


def test_alignment_rows_order_is_seeded_and_no_text_gives_no_rows(processor, split):
    one, same, other = (alignment_examples(DATA, split, processor, seed=seed)["input_ids"][:] for seed in (0, 0, 1))
    assert one == same != other and sorted(one) == sorted(other)
    bare = Interactions(DATA.item_ids, [{}] * 6, DATA.user_ids, DATA.histories)
    rows = alignment_examples(bare, split, processor)
    assert len(rows) == 0 and rows.column_names == ["input_ids", "labels", "task"]


def test_alignment_rows_refuses(processor, split):
    with pytest.raises(ValueError, match="`tasks` holds 'sid_to_price'"):
        alignment_examples(DATA, split, processor, tasks=["sid_to_price"])
    tokenizer = build_tokenizer(["x"], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL_TOKENS, *sid_tokens(2, 3)]})
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-text token"):
        alignment_examples(DATA, split, LasarProcessor(tokenizer, CODES), tasks=["sid_to_title"])


def anchors(*depths, hidden_size=2):
    vectors = np.arange(sum(depths) * hidden_size, dtype=np.float32).reshape(-1, hidden_size)
    return AnchorStore(vectors, np.arange(sum(depths)), np.cumsum([0, *depths]), "hash")


def test_reasoning_rows(processor, split):
    rows = reasoning_examples(samples(split, "train"), processor, depths=[1, 3, 2])
    assert rows.column_names == ["input_ids", "labels", "depth", "sample"]
    assert text(processor, rows[1]["input_ids"]) == (
        "Next:<a_0><b_1><a_2><b_2><|latent_start|><|latent|><|latent|><|latent|><|latent_end|><a_1><b_0>"
    )
    assert learned(processor, rows[1]) == "<a_1><b_0>"
    assert rows["depth"][:] == [1, 3, 2] and rows["sample"][:] == [0, 1, 2]


def test_reasoning_rows_with_anchors(processor, split):
    rows = reasoning_examples(samples(split, "train"), processor, [1, 3, 2], anchors(1, 3, 2))
    assert rows["anchors"][:] == [[[0, 1]], [[2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11]]]


@pytest.mark.parametrize(
    ("depths", "store", "message"),
    [
        ([1, 2], None, "2 entries for 3 samples"),
        ([1, 0, 2], None, "the depth of sample 1 is 0"),
        ([1, 3, 2], anchors(1, 3), "belong to 2 samples, not to these 3"),
        ([1, 3, 2], anchors(1, 2, 2), "sample 1 has depth 3, but 2 anchors"),
    ],
)
def test_reasoning_rows_refuses(processor, split, depths, store, message):
    with pytest.raises(ValueError, match=message):
        reasoning_examples(samples(split, "train"), processor, depths, store)


def test_grpo_rows(processor, split):
    part = samples(split, "train")
    rows = grpo_examples(part, processor)
    assert rows.column_names == ["prompt", "target"]
    assert rows[1] == {"prompt": "Next:<a_0><b_1><a_2><b_2><|latent_start|>", "target": 2}
    rows = grpo_examples(part, processor, anchors(1, 3, 2))
    assert rows["terminal_anchor"][:] == [[0, 1], [6, 7], [10, 11]]
    with pytest.raises(ValueError, match="belong to 2 samples"):
        grpo_examples(part, processor, anchors(1, 3))


def test_no_samples_is_an_error(processor):
    nothing = samples(leave_one_out(Interactions(["a", "b", "c"], [{}] * 3, ["u"], [[0, 1, 2]])), "train")
    with pytest.raises(ValueError, match="no samples"):
        sft_examples(nothing, processor)


def numbered(name, count, **more):
    return Dataset.from_dict({"row": [f"{name}{row}" for row in range(count)], "task": [name] * count} | more)


TABLES = {"a": numbered("a", 10), "b": numbered("b", 4), "c": numbered("c", 3)}


def test_mix_rows_counts():
    rows = mix_examples(TABLES, {"b": 2.5, "c": 0, "a": 0.4})
    names = list(rows["row"])
    assert sorted(set(rows["task"])) == ["a", "b"] and len(rows) == 14
    times = [names.count(f"b{row}") for row in range(4)]
    assert sorted(times) == [2, 2, 3, 3]
    drawn = [name for name in names if name[0] == "a"]
    assert len(drawn) == len(set(drawn)) == 4


def test_mix_rows_without_weights_is_all_rows_in_order():
    assert list(mix_examples(TABLES)["row"]) == [*TABLES["a"]["row"], *TABLES["b"]["row"], *TABLES["c"]["row"]]


def test_mix_rows_is_seeded():
    one, same, other = (list(mix_examples(TABLES, {"a": 0.5}, seed=seed)["row"]) for seed in (0, 0, 1))
    assert one == same != other


def test_mix_rows_keeps_the_columns_that_all_have():
    assert mix_examples({"a": numbered("a", 2, extra=[1, 2]), "b": numbered("b", 2)}).column_names == ["row", "task"]


def test_mix_rows_of_real_rows(processor, split):
    main, alignment = sft_examples(samples(split, "train"), processor), alignment_examples(DATA, split, processor)
    rows = mix_examples({"next_item": main, "alignment": alignment}, {"alignment": 2})
    assert len(rows) == 3 + 2 * 13 and rows.column_names == ["input_ids", "labels", "task"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"d": 1}, "`weights` names 'd', which is no table: choose among a, b, c"),
        ({"a": -1}, "the weight of 'a' is -1"),
        ({"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a": float("inf")}, "the weight of 'a' is inf"),
        ({"a": 0, "b": 0.0, "c": 0.1}, "the mix has no rows"),
    ],
)
def test_mix_rows_refuses(weights, message):
    with pytest.raises(ValueError, match=message):
        mix_examples(TABLES, weights)
