"""
What both trainers promise, whatever their settings: a step is the same however its batch is split, draws and scores
agree at any temperature, the baseline follows the rewards, and methods have the parameters of those they replace.
"""

import inspect
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset

from lasar_hf import LasarGRPOConfig, LasarGRPOTrainer, LasarSFTConfig, LasarSFTTrainer
from lasar_hf.files import read_json
from lasar_hf.trainers import add_catalog_head, lasar_lora_config
from lasar_hf.trainers import grpo_trainer as grpo_module
from lasar_hf.trainers.prefix_sampler import PrefixBatchSampler, PrefixRepeatSampler
from lasar_hf.trainers.sft_trainer import LasarDataCollator
from tests.killed_training import make as killed_trainer
from tests.recipes import ROOT
from tests.tiny import batch, row, sid_ids, tiny_catalog, tiny_model
from tests.training import (
    COMMON,
    FixedDraws,
    first_code,
    grpo_setup,
    grpo_trainer,
    parameters,
    sft_setup,
    some_equal,
    user_setup,
)


# SGD, since Adam's first steps follow the sign even of gradients that are rounding errors.
STEPS = COMMON | dict(optim="sgd", learning_rate=0.05, lr_scheduler_type="constant")


def assert_same_training(one, two):
    """The same weights, logged losses and gradient norms after training."""
    before = parameters(one.model)
    for trainer in (one, two):
        trainer.train()
    logs = [[log for log in trainer.state.log_history if "grad_norm" in log] for trainer in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    weights = parameters(two.model)
    assert any(not weights[name].equal(value) for name, value in before.items())
    torch.testing.assert_close(parameters(one.model), weights, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# One batch, or several micro-batches (and by two processes: test_distributed.py)


def mixed_examples(examples: Dataset) -> Dataset:
    """Reasoning, direct answers, and plain text of other lengths: each micro-batch has other numbers of terms."""
    rows = [example | {"depth": -1 if i % 3 == 2 else 0} for i, example in enumerate(examples)]
    for i in (1, 2, 3):
        text = [3, 4, 5, 6, 7, 8][: 2 + i]
        rows.insert(i, {"input_ids": text, "labels": [-100, *text[1:]], "depth": -1})
    return Dataset.from_list(rows)


SFT = {
    "stage 1": dict(depths=[0] * 6),
    "alignment and policy": dict(policy_weight=0.5, alignment_weight=0.5, policy_label_smoothing=0.1),
    "vocabulary": dict(policy_weight=0.5, sid_loss="vocab", alignment="cosine"),
    "some without anchors": dict(depths=[0, 0, 0, 4, 3, 0], policy_weight=0.5, alignment="mse", alignment_weight=0.5),
    "scores of items": dict(alignment="item_kl", alignment_weight=0.5, depths=[0, 2, 1, 0, 0, 4]),
    "several depths": dict(depth_weights=[1.0, 0.0, 0.5, 1.0], policy_weight=0.5, alignment_weight=0.5),
    "mixed with text": dict(depths=[0, 1, 3, 2, 0, 4], mixed=True, policy_weight=0.5, alignment="none"),
    "mixed, several depths": dict(
        depths=[0, 1, 3, 2, 0, 4], mixed=True, policy_weight=0.5, alignment="none", depth_weights=[1.0, 0.0, 1.0]
    ),
    "LoRA": dict(policy_weight=0.5, lora=True),
}  # fmt: skip


def sft(folder, size, depths=(1, 3, 2, 4, 1, 2), mixed=False, lora=False, **options):
    model, tokenizer, catalog, examples, anchors = sft_setup(list(depths))
    if mixed:
        examples, anchors = mixed_examples(examples.remove_columns("sample_index")), None
    options = dict(train_sampling_strategy="sequential", per_device_train_batch_size=size) | options
    args = LasarSFTConfig(str(folder), **STEPS, **options, gradient_accumulation_steps=len(examples) // size)
    torch.manual_seed(0)
    return LasarSFTTrainer(
        model, args, catalog, anchors, train_dataset=examples, processing_class=tokenizer,
        peft_config=lasar_lora_config(model, r=2, lora_dropout=0.0) if lora else None,
    )  # fmt: skip


@pytest.mark.parametrize("options", SFT.values(), ids=SFT)
def test_sft_accumulates_what_one_batch_has(tmp_path, options):
    size = 9 if options.get("mixed") else 6
    assert_same_training(sft(tmp_path, size, **options), sft(tmp_path, 3 if size == 9 else 2, **options))


def test_batches_of_users_are_one_batch(tmp_path):
    """Also if only some of the examples have a label of the policy."""

    def trainer(**options):
        model, tokenizer, catalog, examples, _ = user_setup()
        depths = [-1 if i % 4 == 0 else 1 for i in range(len(examples))]
        examples = examples.remove_columns("sample_index").add_column("depth", depths)
        args = LasarSFTConfig(
            str(tmp_path), **STEPS | dict(max_steps=1, max_grad_norm=0.0), policy_weight=1.0, alignment="none",
            **options,
        )  # fmt: skip
        return LasarSFTTrainer(model, args, catalog, train_dataset=examples, processing_class=tokenizer)

    count = len(trainer(max_tokens_per_batch=90).get_train_dataloader())
    assert count > 2
    users, whole = (
        trainer(max_tokens_per_batch=90, gradient_accumulation_steps=count),
        trainer(per_device_train_batch_size=32),
    )
    for part in (users, whole):
        part.train()
    torch.testing.assert_close(parameters(users.model), parameters(whole.model), rtol=1e-5, atol=1e-6)


GRPO = {
    "reinforce and terminal": dict(depth_weight=1.0, terminal_weight=0.5, beta=0.1),
    "some without anchors": dict(terminal_weight=1.0, anchors=[True, False, True, True]),
    "exact, without signal": dict(depth_gradient="exact", depth_weight=1.0, drop_groups_without_signal=True, beta=0.1),
    "ranks, users together": dict(depth_reward="rank", depth_weight=1.0, prompts_per_user=2, loss_type="dapo"),
    "temperature": dict(temperature=0.7, depth_weight=1.0, beta=0.1),
}


def grpo(folder, size, anchors=(True,) * 4, **options):
    model, tokenizer, catalog, examples = grpo_setup()
    kept = [anchor if has else None for anchor, has in zip(examples["terminal_anchor"], anchors, strict=True)]
    examples = examples.remove_columns("terminal_anchor").add_column("terminal_anchor", kept)
    args = LasarGRPOConfig(
        str(folder), **STEPS, num_generations=4, per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size, **options,
    )  # fmt: skip
    return FixedDraws(model, args, catalog, [some_equal], train_dataset=examples, processing_class=tokenizer)


@pytest.mark.parametrize("options", GRPO.values(), ids=GRPO)
def test_grpo_accumulates_what_one_batch_has(tmp_path, options):
    one, two = grpo(tmp_path / "one", 16, **options), grpo(tmp_path / "two", 8, **options)
    assert_same_training(one, two)
    assert one.reward_baseline == pytest.approx(two.reward_baseline)


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed


def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(tmp_path):
    """`kill -9` after the third of four steps, of which every second is saved."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.killed_training", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "ended.json") == [-signal.SIGKILL] * 2
    for kind in ("sft", "grpo"):
        assert {path.name for path in (tmp_path / kind).glob("checkpoint-*")} == {"checkpoint-2"}
        whole = killed_trainer(kind, tmp_path / f"{kind}-whole")  # seeds the draws
        whole.train()
        resumed = killed_trainer(kind, tmp_path / kind)
        resumed.train(resume_from_checkpoint=True)
        for name, value in parameters(whole.model).items():
            assert resumed.model.get_parameter(name).equal(value), (kind, name)


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


def catalogue_log_probs(model, sequence, codes, catalog, temperature) -> torch.Tensor:
    """Log-probability of each code of an answer `(M,)` among those that continue an item, from plain logits."""
    ids = torch.tensor([[*sequence, *sid_ids(model, codes)]])
    logits, parts = model.model(ids).last_hidden_state[0] @ model.lm_head.weight.T, []
    for level, code in enumerate(codes):
        follow = sorted({item[level] for item in catalog.codes.tolist() if item[:level] == list(codes[:level])})
        scores = logits[len(sequence) - 1 + level, [model.config.sid_token_id(level, c) for c in follow]]
        parts.append((scores / temperature).log_softmax(0)[follow.index(code)])
    return torch.stack(parts)


def test_candidates_are_drawn_and_scored_at_the_temperature(tmp_path, monkeypatch):
    """By plain logits, so that a temperature that is left out everywhere is seen too; the ratio is 1."""
    drawn, sample = [], grpo_module.sample_items
    monkeypatch.setattr(grpo_module, "sample_items", lambda *a, **k: (drawn.append(sample(*a, **k)), drawn[-1])[1])
    trainer = grpo_trainer(tmp_path, temperature=0.7, num_iterations=2, beta=0.1, depth_weight=0.0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    expected = []
    for prompt, mask, answer in zip(
        inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_ids"], strict=True
    ):
        offsets = [trainer.model.config.sid_token_id(level, 0) for level in range(3)]
        codes = [int(token) - offset for token, offset in zip(answer, offsets, strict=True)]
        expected.append(catalogue_log_probs(trainer.model, prompt[mask.bool()].tolist(), codes, trainer.catalog, 0.7))
    expected = torch.stack(expected).detach()  # (B · G, M)
    torch.testing.assert_close(inputs["old_per_token_logps"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs["ref_per_token_logps"], expected, atol=1e-5, rtol=1e-5)
    scores = drawn[0][1].flatten()  # in the order of the prompts' trees
    torch.testing.assert_close(scores.sort()[0], expected.sum(dim=1).sort()[0], atol=1e-5, rtol=1e-5)
    trainer.compute_loss(trainer.model, inputs)
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0]
    assert trainer._metrics["train"]["kl"][0] == pytest.approx(0, abs=1e-6)


def test_the_rewards_of_depths_are_at_the_temperature(tmp_path):
    trainer = grpo_trainer(tmp_path, temperature=0.7, depth_gradient="exact", depth_weight=1.0)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[0] for _ in range(4)])
    config, example = trainer.model.config, trainer.train_dataset[0]
    prompt = trainer.processing_class(example["prompt"], add_special_tokens=False).input_ids
    codes = trainer.catalog.codes[example["target"]].tolist()
    for depth in range(1, 5):
        sequence = [*prompt, *[config.latent_token_id] * depth, config.latent_end_token_id]
        expected = catalogue_log_probs(trainer.model, sequence, codes, trainer.catalog, 0.7).sum().item()
        assert inputs["depth_rewards"][0, depth - 1].item() == pytest.approx(expected, abs=1e-4)


def test_text_labels_are_scored_at_the_temperature():
    model, _ = tiny_model()
    add_catalog_head(model, tiny_catalog(), temperature=0.7)
    ids = torch.tensor([[3, 4, 5, 6]])
    scored = model(ids, labels=ids, fused_lm_head=True)
    expected = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(scored.log_probs[0], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Baseline and accuracy


def test_the_baseline_follows_the_mean_rewards_of_three_batches(tmp_path):
    """`b ← 0.8 b + 0.2 mean`. A batch is compared with the baseline before it; an evaluation changes nothing."""
    means = iter([1.0, 5.0, 100.0, -3.0])  # the third is that of an evaluation
    trainer = grpo_trainer(
        tmp_path, baseline_decay=0.8, depth_weight=1.0, alignment="none", beta=0.0, depth_entropy_weight=0.0,
        step_cost=0.0, reward_funcs=[lambda completion_ids, **kwargs: [next(means)] * len(completion_ids)],
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    steps = [(True, 1.0, 1.0), (True, 1.0, 1.8), (False, 1.8, 1.8), (True, 1.8, 0.84)]
    for training, compared, after in steps:
        trainer.model.train(training)
        inputs = trainer._generate_and_score_completions([trainer.train_dataset[0] for _ in range(8)])
        assert inputs["reward_baseline"].tolist() == pytest.approx([compared] * 8)
        assert trainer.reward_baseline == pytest.approx(after)
        trainer.compute_loss(trainer.model, inputs)
        loss = trainer._metrics["train" if training else "eval"]["depth_loss"][-1]
        log_probs = inputs["depth_log_prob"].mean().item()
        assert loss == pytest.approx(-(inputs["group_reward"][0].item() - compared) * log_probs, rel=1e-4, abs=1e-5)


def test_a_label_that_ties_with_the_best_code_is_a_hit(tmp_path):
    """Codes whose rows of the head are equal tie; `mean_token_accuracy` counts labels that no code exceeds."""
    model, tokenizer, catalog, examples, _ = sft_setup([0] * 6)
    first, answers = model.config.sid_token_offset, [codes[0] for codes in catalog.codes[:6].tolist()]
    best = max(set(answers), key=answers.count)
    other = next(code for code in answers if code != best)
    with torch.no_grad():
        model.lm_head.weight[first:] = 0
    labels = [[-100] * (len(row["input_ids"]) - 3) + [row["input_ids"][-3], -100, -100] for row in examples]
    examples = examples.remove_columns(["labels", "sample_index"]).add_column("labels", labels)
    args = LasarSFTConfig(str(tmp_path), **COMMON, per_device_train_batch_size=6)
    trainer = LasarSFTTrainer(model, args, catalog, train_dataset=examples, processing_class=tokenizer)
    trainer.compute_loss(model.eval(), next(iter(trainer.get_train_dataloader())))
    assert trainer._metrics["eval"]["mean_token_accuracy"] == [1.0]  # all codes tie
    hidden = []
    model.model.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))
    inputs = next(iter(trainer.get_train_dataloader()))
    model(inputs["input_ids"], inputs["attention_mask"])
    is_label = inputs["labels"][:, 1:] != -100
    direction = hidden[0][:, :-1][is_label].mean(dim=0)
    assert (hidden[0][:, :-1][is_label] @ direction > 0).all()
    with torch.no_grad():
        model.lm_head.weight[first + best] = model.lm_head.weight[first + other] = direction
    trainer._metrics["eval"].clear()
    trainer.compute_loss(model.eval(), inputs)
    expected = np.mean([answer in (best, other) for answer in answers])
    assert trainer._metrics["eval"]["mean_token_accuracy"] == pytest.approx([expected])
    assert 0 < expected < 1


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def test_grpo_trains_the_adapter_alone_and_merges_to_the_same_model(tmp_path):
    model, tokenizer, catalog, examples = grpo_setup()
    args = LasarGRPOConfig(
        str(tmp_path), **COMMON | dict(max_steps=3), num_generations=4, per_device_train_batch_size=8, depth_weight=1.0
    )
    trainer = LasarGRPOTrainer(
        model, args, catalog, [first_code], train_dataset=examples, processing_class=tokenizer,
        peft_config=lasar_lora_config(model, r=2, lora_dropout=0.0),
    )  # fmt: skip
    before = parameters(trainer.model)
    trainer.train()
    changed = {name for name, value in parameters(trainer.model).items() if not value.equal(before[name])}
    documented = ("lora_A", "lora_B", "trainable_tokens_delta", "policy_head.modules_to_save")
    assert all(any(part in name for part in documented) for name in changed)
    assert all(any(part in name for name in changed) for part in documented)
    trainer.save_model()
    merged, prompts = type(model).from_pretrained(tmp_path).eval(), batch([row(model, 5, 0), row(model, 8, 0, seed=1)])
    outputs = [part.recommend(**prompts, catalog=catalog) for part in (trainer.model.eval(), merged)]
    assert outputs[0].items.equal(outputs[1].items)
    torch.testing.assert_close(outputs[0].scores, outputs[1].scores, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Methods of other libraries that are replaced


CLASSES = [LasarSFTTrainer, LasarGRPOTrainer, LasarDataCollator, PrefixRepeatSampler, PrefixBatchSampler]


def replaced_methods() -> list[tuple[type, str]]:
    """Every method of ours with one of the same name in a class of another library."""
    found = []
    for ours in CLASSES:
        own = [base for base in ours.__mro__ if base.__module__.startswith("lasar_hf")]
        others = [base for base in ours.__mro__ if base not in (*own, object)]
        names = {name for base in own for name, part in vars(base).items() if inspect.isfunction(part)}
        found += [(ours, name) for name in sorted(names) if any(name in vars(base) for base in others)]
    return [(ours, name) for ours, name in found if not name.startswith("__")]


def test_the_replaced_methods_are_found():
    names = {name for _, name in replaced_methods()}
    assert {"compute_loss", "_calculate_rewards", "_get_num_items_in_batch", "torch_call"} <= names


@pytest.mark.parametrize(("ours", "name"), replaced_methods(), ids=lambda part: getattr(part, "__name__", part))
def test_a_replaced_method_keeps_its_parameters(ours, name):
    """So that an upgrade that changes one is noticed. More parameters need defaults."""
    bases = [base for base in ours.__mro__ if not base.__module__.startswith("lasar_hf") and name in vars(base)]
    theirs, mine = (list(inspect.signature(vars(c)[name]).parameters.values()) for c in (bases[0], owner(ours, name)))
    kinds = inspect.Parameter
    if [part.kind for part in mine[1:]] == [kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD]:
        return  # passes all on
    extra = mine[len(theirs) :]
    if theirs and theirs[-1].kind is kinds.VAR_KEYWORD:  # those before **kwargs have names
        extra, mine = mine[len(theirs) - 1 : -1], [*mine[: len(theirs) - 1], mine[-1]]
    assert [(part.name, part.kind) for part in mine[: len(theirs)]] == [(part.name, part.kind) for part in theirs]
    assert all(part.default is not kinds.empty for part in extra)


def owner(ours: type, name: str) -> type:
    return next(base for base in ours.__mro__ if name in vars(base))


def test_deprecation_warnings_of_this_package_are_errors():
    """As pyproject.toml says; those of a library name the caller with their stack level."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        code = compile(f"import warnings; warnings.warn('old', {category.__name__})", "sft_trainer.py", "exec")
        with pytest.raises(category, match="old"):
            exec(code, {"__name__": "lasar_hf.trainers.sft_trainer"})
