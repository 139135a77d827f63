"""Training at several depths: one chain of latent steps, an answer after each of them."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from lasar_hf import LasarSFTConfig, LasarSFTTrainer
from lasar_hf.trainers import DepthRows, bidirectional_kl
from tests.tiny import tiny_catalog
from tests.training import COMMON, moved, parameters, sft_setup, sft_trainer, user_setup


START, SLOT, END = 90, 91, 92


def test_rows_differ_in_their_latent_slots_only():
    example = {"input_ids": [5, 6, START, SLOT, SLOT, END, 7, 8], "labels": [-100] * 6 + [7, 8], "sample_index": 3}
    rows = DepthRows([2.0, 0.0, 1.0, 1.0], SLOT, END).expand(example)
    assert [row["input_ids"] for row in rows] == [
        [5, 6, START, *[SLOT] * depth, END, 7, 8] for depth in (0, 2, 3)
    ]  # fmt: skip
    assert all(row["labels"] == [-100] * (len(row["input_ids"]) - 2) + [7, 8] for row in rows)
    assert [row["loss_weight"] for row in rows] == [0.5, 0.25, 0.25]
    assert [row["is_own"] for row in rows] == [False, True, False]
    assert [row["neighbour_share"] for row in rows] == pytest.approx([1.0, 1 / 3, 0.0])
    assert all(row["sample_index"] == 3 for row in rows)


def test_the_own_depth_has_a_row_without_a_weight():
    """It has no labels, so it adds nothing to the cross-entropy."""
    example = {"input_ids": [5, START, SLOT, END, 7], "labels": [-100] * 4 + [7]}
    rows = DepthRows([1.0], SLOT, END).expand(example)
    assert [(row["loss_weight"], row["is_own"]) for row in rows] == [(1.0, False), (0.0, True)]
    assert [row["labels"] for row in rows] == [[-100, -100, -100, 7], [-100] * 5]


def test_plain_text_is_one_row():
    example = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert DepthRows([1.0, 1.0], SLOT, END).expand(example) == [
        example | {"loss_weight": 1.0, "is_own": True, "neighbour_share": 1.0}
    ]  # fmt: skip


def test_a_path_has_the_tokens_of_all_its_rows():
    """`<|latent_start|>` and the slots of the deepest row once, the end and the answer for each depth."""
    rows = DepthRows([1.0, 0.0, 1.0], SLOT, END)
    assert rows.path_length([5, 6, START, SLOT, END, 7, 8], START) == 1 + 2 + 3 * 3  # depths 0, 1 and 2
    assert rows.path_length([5, 6], START) == 1


def answers_loss(model, rows: list[dict]) -> torch.Tensor:
    """Mean negative log-probability of the answer's tokens, one sequence after the other."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        scored = model(ids, labels=torch.tensor([row["labels"]]), fused_lm_head=True)
        total, count = total - scored.log_probs.sum(), count + scored.label_mask.sum()
    return total / count


def test_loss_is_the_weighted_mean_over_the_depths(tmp_path):
    weights = [1.0, 0.5, 0.0, 2.0, 0.25]
    options = dict(policy_weight=0.7, alignment_weight=0.3, per_device_train_batch_size=6)
    trainer = sft_trainer(tmp_path, depth_weights=weights, **options)
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))

    # Each example, and that example at every depth.
    single = sft_trainer(tmp_path, **options)
    examples = list(single.train_dataset)
    config = model.config
    rows = DepthRows(weights, config.latent_token_id, config.latent_end_token_id)
    expected = 0.0
    for example in examples:
        for row in rows.expand(example):
            if row["loss_weight"] > 0:
                expected = expected + row["loss_weight"] * answers_loss(model, [row])
    # The other terms are those of the example's own depth.
    single.model.load_state_dict(model.state_dict())
    own = single.compute_loss(single.model.eval(), next(iter(single.get_train_dataloader())))
    rest = own - answers_loss(model, examples)
    torch.testing.assert_close(loss, expected / len(examples) + rest, atol=1e-5, rtol=1e-5)


def with_text(examples: Dataset) -> Dataset:
    """Examples with as many of plain text, which are not trained at several depths."""
    text = [{"input_ids": [3, 4, 5, 6, 7][: 3 + i % 3], "labels": [-100, 4, 5, 6, 7][: 3 + i % 3]} for i in range(6)]
    return concatenate_datasets([examples.remove_columns("sample_index"), Dataset.from_list(text)])


@pytest.mark.parametrize("training", [True, False])
def test_an_example_weighs_the_same_as_one_of_a_single_row(tmp_path, training):
    model, tokenizer, catalog, examples, _ = sft_setup()
    examples = with_text(examples)
    args = LasarSFTConfig(str(tmp_path), **COMMON, depth_weights=[1.0, 0.0, 0.5, 1.0], per_device_train_batch_size=12)
    trainer = LasarSFTTrainer(model, args, catalog, train_dataset=examples, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model.train(training), dict(batch))
    total, count = 0.0, 0
    for example in examples:
        labels = sum(label != -100 for label in example["labels"])
        for row in trainer.depth_rows.expand(example):
            if row["loss_weight"] > 0:
                total = total + labels * row["loss_weight"] * answers_loss(model, [row])
        count += labels
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)


def test_metrics_are_those_of_the_own_depth(tmp_path):
    logs = []
    for weights in (None, [1.0] * 5):
        trainer = sft_trainer(tmp_path, depth_weights=weights, policy_weight=0.1, max_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("mean_depth", "depth_accuracy", "align_loss", "policy_loss", "latent_norm_ratio", "latent_cosine"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name


def test_batches_of_users_weigh_every_example_the_same(tmp_path):
    def trainer(**kwargs):
        model, tokenizer, catalog, examples, anchors = user_setup()
        args = LasarSFTConfig(
            str(tmp_path),
            **COMMON | dict(max_steps=1, max_grad_norm=0.0, optim="sgd", policy_weight=0.1),
            depth_weights=[1.0, 0.5, 0.0, 1.0],
            **kwargs,
        )
        return LasarSFTTrainer(model, args, catalog, anchors, train_dataset=examples, processing_class=tokenizer)

    num_batches = len(trainer(max_tokens_per_batch=160).get_train_dataloader())
    assert num_batches > 2
    users = trainer(max_tokens_per_batch=160, gradient_accumulation_steps=num_batches)
    whole = trainer(per_device_train_batch_size=32)
    before = parameters(whole.model)
    users.train()
    whole.train()
    assert moved(before, whole.model)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(users.model.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


def test_item_kl_compares_the_items_that_states_stand_for(tmp_path):
    trainer = sft_trainer(tmp_path, alignment="item_kl", alignment_weight=1.0, gradient_checkpointing=False)
    plain = sft_trainer(tmp_path, alignment="none")
    model, inputs = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    plain.model.load_state_dict(model.state_dict())
    cross_entropy = plain.compute_loss(plain.model.eval(), {k: v for k, v in inputs.items() if k != "anchors"})
    outputs = model(inputs["input_ids"], inputs["attention_mask"])
    codes, offset = tiny_catalog().codes, model.config.sid_token_offset
    expected = 0.0
    for states, anchors, depth in zip(outputs.latent_states, inputs["anchors"], outputs.latent_steps, strict=True):
        scores = []
        for vectors in (states[1 : 1 + depth], anchors[:depth]):
            logits = (vectors @ model.lm_head.weight.T)[:, offset:].unflatten(1, (3, 4))  # (N, levels, codes)
            scores.append(torch.stack([sum(logits[:, level, c] for level, c in enumerate(item)) for item in codes], 1))
        expected += bidirectional_kl(*scores).mean() / len(outputs.latent_steps)
    loss = trainer.compute_loss(model, dict(inputs))
    torch.testing.assert_close(loss - cross_entropy, expected, atol=1e-5, rtol=1e-5)


def test_the_deepest_row_must_fit_too(tmp_path):
    sft_trainer(tmp_path, [0] * 6, depth_weights=[1.0], max_length=10)  # the longest example has as many tokens
    with pytest.raises(ValueError, match="13 tokens, but max_length is 10"):
        sft_trainer(tmp_path, [0] * 6, depth_weights=[1.0, 1.0, 1.0, 1.0, 0.0], max_length=10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth_weights": []}, "depth_weights is"),
        ({"depth_weights": [0.0, 0.0]}, "not all of them 0"),
        ({"depth_weights": [1.0, -1.0]}, "at least 0"),
        ({"depth_weights": [1.0], "sid_loss": "vocab"}, 'sid_loss="catalog"'),
        ({"depth_weights": [1.0] * 6}, "depth_weights is 5; expected 0 to 4"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        sft_trainer(tmp_path, **changed)
