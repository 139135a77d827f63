"""Training examples: their layout, the tokens with loss, and that only the training part is read."""

import numpy as np
import pytest
from datasets import Dataset

from lasar_hf import LasarProcessor, SidCatalog
from lasar_hf.data import (
    ALIGNMENT_TASKS,
    Interactions,
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
CATALOG = SidCatalog([[0, 1], [2, 2], [1, 0], [2, 0], [1, 1], [0, 0]], DATA.item_ids)


def sid_tokenizer(texts):
    tokenizer = build_tokenizer(texts, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL_TOKENS, *sid_tokens(2, 3)]})
    return tokenizer


@pytest.fixture(scope="module")
def processor():
    return LasarProcessor(sid_tokenizer(["Recommend the next item.", "red blue chair tea"]), CATALOG, "Next:")


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


def test_sft_examples(processor, split):
    rows = sft_examples(samples(split, "train"), processor)
    assert rows.column_names == ["input_ids", "labels"]
    assert [text(processor, ids) for ids in rows["input_ids"]] == [
        "Next:<a_0><b_1><|latent_start|><|latent_end|><a_2><b_2>",
        "Next:<a_0><b_1><a_2><b_2><|latent_start|><|latent_end|><a_1><b_0>",
        "Next:<a_2><b_0><|latent_start|><|latent_end|><a_0><b_1>",
    ]
    assert [learned(processor, row) for row in rows] == ["<a_2><b_2>", "<a_1><b_0>", "<a_0><b_1>"]


def test_history_examples_learn_every_item(processor, split):
    rows = history_examples(split, processor)
    assert [text(processor, ids) for ids in rows["input_ids"]] == [
        "Next:<a_0><b_1><a_2><b_2><|latent_start|><|latent_end|><a_1><b_0>",
        "Next:<a_2><b_0><|latent_start|><|latent_end|><a_0><b_1>",
    ]
    assert [learned(processor, row) for row in rows] == ["<a_0><b_1><a_2><b_2><a_1><b_0>", "<a_2><b_0><a_0><b_1>"]


def test_history_examples_under_a_short_limit(processor, split):
    short = LasarProcessor(processor.tokenizer, CATALOG, instruction="Next:", max_history=1)
    row = history_examples(split, short)[0]
    assert text(short, row["input_ids"]) == "Next:<a_2><b_2><|latent_start|><|latent_end|><a_1><b_0>"
    assert learned(short, row) == "<a_2><b_2><a_1><b_0>"


def test_alignment_examples(processor, split, monkeypatch):
    monkeypatch.setattr("lasar_hf.data.examples.MAX_TEXT_TOKENS", 12)
    of = {task: alignment_examples(DATA, split, processor, [task]) for task in ALIGNMENT_TASKS}
    assert {task: len(rows) for task, rows in of.items()} == {
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


def test_alignment_examples_order_is_seeded_and_no_text_gives_no_rows(processor, split):
    one, same, other = (alignment_examples(DATA, split, processor, seed=seed)["input_ids"][:] for seed in (0, 0, 1))
    assert one == same != other and sorted(one) == sorted(other)
    bare = Interactions(DATA.item_ids, [{}] * 6, DATA.user_ids, DATA.histories)
    rows = alignment_examples(bare, split, processor)
    assert len(rows) == 0 and rows.column_names == ["input_ids", "labels"]


def test_an_unknown_alignment_task_is_named(processor, split):
    with pytest.raises(ValueError, match="sid_to_price"):
        alignment_examples(DATA, split, processor, tasks=["sid_to_price"])


def test_titles_need_an_end_of_text_token(split):
    tokenizer = sid_tokenizer(["x"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        alignment_examples(DATA, split, LasarProcessor(tokenizer, CATALOG), tasks=["sid_to_title"])


@pytest.mark.parametrize("task", ALIGNMENT_TASKS)
def test_alignment_prompts_start_like_the_main_task(processor, split, task):
    with_bos = LasarProcessor(processor.tokenizer, CATALOG, instruction="Next:", add_bos=True)
    bos = processor.tokenizer.bos_token_id
    plain, marked = (alignment_examples(DATA, split, one, tasks=[task]) for one in (processor, with_bos))
    assert list(marked["input_ids"]) == [[bos, *ids] for ids in plain["input_ids"]]
    assert list(marked["labels"]) == [[-100, *labels] for labels in plain["labels"]]


def test_reasoning_examples_have_latent_tokens(processor, split):
    examples = reasoning_examples(samples(split, "train"), processor, depths=[1, 3, 2])
    assert examples.column_names == ["input_ids", "labels", "depth", "sample_index"]
    assert text(processor, examples["input_ids"][1]) == (
        "Next:<a_0><b_1><a_2><b_2><|latent_start|><|latent|><|latent|><|latent|><|latent_end|><a_1><b_0>"
    )
    assert learned(processor, examples[1]) == "<a_1><b_0>"


def test_reasoning_examples_name_their_sample(processor, split):
    examples = reasoning_examples(samples(split, "train"), processor, depths=[1, 3, 2])
    assert examples["depth"][:] == [1, 3, 2]
    assert examples["sample_index"][:] == [0, 1, 2]


@pytest.mark.parametrize(("depths", "match"), [([1, 2], "depths"), ([1, -1, 2], r"depths\[1\]")])
def test_wrong_depths_are_refused(processor, split, depths, match):
    with pytest.raises(ValueError, match=match):
        reasoning_examples(samples(split, "train"), processor, depths)


def test_grpo_examples_hold_prompt_and_target(processor, split):
    examples = grpo_examples(samples(split, "train"), processor)
    assert examples.column_names == ["prompt", "target"]
    assert examples[1] == {"prompt": "Next:<a_0><b_1><a_2><b_2><|latent_start|>", "target": 2}


def test_grpo_examples_hold_the_terminal_anchor(processor, split):
    anchors = np.arange(6, dtype=np.float32).reshape(3, 2)
    examples = grpo_examples(samples(split, "train"), processor, anchors)
    assert examples["terminal_anchor"][:] == anchors.tolist()


def test_grpo_examples_need_an_anchor_per_sample(processor, split):
    with pytest.raises(ValueError, match="terminal_anchors"):
        grpo_examples(samples(split, "train"), processor, np.zeros((2, 4)))


def test_no_samples_is_an_error(processor):
    nothing = samples(leave_one_out(Interactions(["a", "b", "c"], [{}] * 3, ["u"], [[0, 1, 2]])), "train")
    with pytest.raises(ValueError, match="no samples"):
        sft_examples(nothing, processor)


def numbered(name, count, **more):
    return Dataset.from_dict({"row": [f"{name}{row}" for row in range(count)], "task": [name] * count} | more)


TABLES = {"a": numbered("a", 10), "b": numbered("b", 4), "c": numbered("c", 3)}


def test_mix_weights_count_examples():
    rows = mix_examples(TABLES, {"b": 2.5, "c": 0, "a": 0.4})
    names = list(rows["row"])
    assert sorted(set(rows["task"])) == ["a", "b"] and len(rows) == 14
    times = [names.count(f"b{row}") for row in range(4)]
    assert sorted(times) == [2, 2, 3, 3]
    drawn = [name for name in names if name[0] == "a"]
    assert len(drawn) == len(set(drawn)) == 4


def test_mix_without_weights_keeps_all_examples_in_order():
    assert list(mix_examples(TABLES)["row"]) == [*TABLES["a"]["row"], *TABLES["b"]["row"], *TABLES["c"]["row"]]


def test_mix_is_seeded():
    one, same, other = (list(mix_examples(TABLES, {"a": 0.5}, seed=seed)["row"]) for seed in (0, 0, 1))
    assert one == same != other


def test_mix_keeps_the_columns_that_all_have():
    assert mix_examples({"a": numbered("a", 2, extra=[1, 2]), "b": numbered("b", 2)}).column_names == ["row", "task"]


def test_mix_of_real_examples(processor, split):
    main, alignment = sft_examples(samples(split, "train"), processor), alignment_examples(DATA, split, processor)
    rows = mix_examples({"next_item": main, "alignment": alignment}, {"alignment": 2})
    assert len(rows) == 3 + 2 * 13 and rows.column_names == ["input_ids", "labels"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"d": 1}, "weights .*'d'"),
        ({"a": -1}, "weights .*-1 .*'a'"),
        ({"a": float("nan")}, "weights .*nan .*'a'"),
        ({"a": float("inf")}, "weights .*inf .*'a'"),
        ({"a": 0, "b": 0.0, "c": 0.1}, "weight"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        mix_examples(TABLES, weights)
