"""Batches of users: what they contain, and that training on them weighs every example the same."""

import pytest
import torch
from trl.trainer.utils import RepeatSampler

from lasar_hf import LasarSFTConfig, LasarSFTTrainer
from lasar_hf.trainers import checkpoint_to_resume
from lasar_hf.trainers.prefix_sampler import PrefixBatchSampler, PrefixRepeatSampler, prefix_groups
from tests.training import COMMON, moved, parameters, user_setup


START = 99
# Two users with three and two samples, and a user whose first item was dropped from the window.
SEQUENCES = [
    [3, 4, START, 7], [5, START, 8], [3, START, 7], [5, 6, START, 8], [3, 4, 5, START, 9, 9], [4, 5, START, 9]
]  # fmt: skip


def trainer(folder, **kwargs):
    """A trainer of `user_setup`."""
    model, tokenizer, catalog, examples, anchors = user_setup()
    args = LasarSFTConfig(str(folder), **{**COMMON, "policy_weight": 0.1, **kwargs})
    return LasarSFTTrainer(model, args, catalog, anchors, train_dataset=examples, processing_class=tokenizer)


def test_groups_are_chains_of_prefixes():
    groups = prefix_groups(["ab", "b", "a", "bc", "abx", "aby", "c"])
    assert sorted(groups) == [[1, 3], [2, 0, 4], [5], [6]]


def test_every_process_gets_its_share_of_all_examples():
    parts = [list(PrefixBatchSampler(SEQUENCES, START, 20, num_processes=2, process_index=i)) for i in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(len(SEQUENCES)))


def test_order_depends_on_the_epoch_alone():
    sampler = PrefixBatchSampler([[i, START, 1] for i in range(20)], START, 6)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert len(second) == len(first) == len(sampler) == 10
    assert {frozenset(batch) for batch in second} != {frozenset(batch) for batch in first}  # users meet other users


def test_a_budget_below_a_user_names_both_numbers():
    with pytest.raises(ValueError, match=r"max_tokens_per_batch is 11\b.*\b12 tokens"):
        PrefixBatchSampler(SEQUENCES, START, 11)
    PrefixBatchSampler(SEQUENCES, START, 12)


def test_every_example_weighs_the_same(tmp_path):
    users = trainer(tmp_path / "users", max_tokens_per_batch=70, max_steps=1)
    num_batches = len(users.get_train_dataloader())
    assert num_batches > 2
    users = trainer(
        tmp_path / "users",
        max_tokens_per_batch=70,
        max_steps=1,
        gradient_accumulation_steps=num_batches,
        max_grad_norm=0.0,
        optim="sgd",
    )
    whole = trainer(tmp_path / "whole", per_device_train_batch_size=32, max_steps=1, max_grad_norm=0.0, optim="sgd")
    before = parameters(whole.model)
    users.train()
    whole.train()
    assert moved(before, whole.model)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(users.model.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("step", [5, 6, 7, 8])
def test_training_resumes_bit_exactly_inside_an_epoch(tmp_path, step):
    options = dict(max_tokens_per_batch=70, max_steps=9, save_strategy="steps", save_steps=step)
    whole = trainer(tmp_path / "whole", **options)
    assert len(whole.get_train_dataloader()) == 5
    whole.train()
    resumed = trainer(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_prompts_of_a_user_stay_together():
    base = RepeatSampler(range(8), mini_repeat_count=2, batch_size=2, seed=0)
    order = list(PrefixRepeatSampler(base, [[0, 1, 2, 3], [4, 5, 6, 7]], 2))
    assert sorted({tuple(order[i : i + 4]) for i in range(0, 16, 4)}) == [
        (0, 0, 1, 1), (2, 2, 3, 3), (4, 4, 5, 5), (6, 6, 7, 7)
    ]  # fmt: skip


def test_one_prompt_per_user_is_the_order_of_trl():
    def base():
        return RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=1)

    assert list(PrefixRepeatSampler(base(), [[i] for i in range(7)], 1)) == list(base())


def test_a_stream_has_no_batches_of_users(tmp_path):
    model, tokenizer, catalog, examples, anchors = user_setup()
    args = LasarSFTConfig(str(tmp_path), **COMMON, max_tokens_per_batch=70)
    with pytest.raises(ValueError, match="max_tokens_per_batch"):
        LasarSFTTrainer(
            model, args, catalog, anchors, train_dataset=examples.to_iterable_dataset(), processing_class=tokenizer
        )


@pytest.mark.parametrize("changed", [{"max_tokens_per_batch": 71}, {"max_tokens_per_batch": None}])
def test_other_batches_are_not_resumed(tmp_path, changed):
    first = LasarSFTConfig(str(tmp_path), **COMMON, max_tokens_per_batch=70)
    checkpoint_to_resume(first)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1, "max_steps": 2}')
    with pytest.raises(ValueError, match="max_tokens_per_batch"):
        checkpoint_to_resume(LasarSFTConfig(str(tmp_path), **COMMON, **changed))


def test_the_loss_of_one_process_has_the_labels_of_one_process(tmp_path, monkeypatch):
    """Without `average_tokens_across_devices` the loss is not multiplied by the number of processes."""
    labels = {}
    for averaged in (True, False):
        users = trainer(tmp_path, max_tokens_per_batch=90, average_tokens_across_devices=averaged)
        with monkeypatch.context() as patch:
            patch.setattr(LasarSFTConfig, "world_size", 2)
            users.get_train_dataloader()
        labels[averaged] = users.labels_per_step
    assert labels[True] == 2 * labels[False]


@pytest.mark.parametrize("terms", [dict(policy_weight=0.0, alignment="none"), dict(policy_weight=0.5)], ids=str)
def test_small_batches_do_not_weigh_more(tmp_path, terms):
    options = dict(learning_rate=0.0, **terms)
    users = trainer(tmp_path / "users", max_tokens_per_batch=70, max_steps=5, **options)
    sizes = set(map(len, users.get_train_dataloader().batch_sampler))
    whole = trainer(tmp_path / "whole", per_device_train_batch_size=32, max_steps=1, **options)
    losses = []
    for part in (users, whole):
        part.train()
        losses.append([log["loss"] for log in part.state.log_history if "loss" in log])
    assert len(sizes) > 1
    assert sum(losses[0]) / 5 == pytest.approx(losses[1][0], rel=1e-4)
