"""Both trainers on TRL: what they add is called, exact, logged, and moves every trainable parameter."""

import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from lasar_hf import (
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarProcessor,
    LasarSFTConfig,
    LasarSFTTrainer,
    SidCatalog,
)
from lasar_hf.evaluation import RankingEvaluator
from lasar_hf.trainers import (
    DISTANCES,
    add_catalog_head,
    alignment_loss,
    depth_entropy,
    reinforce_loss,
)
from lasar_hf.trainers.catalog_head import score_labels
from lasar_hf.trainers.trainer_mixin import latent_metrics
from tests.references import mixed_rows
from tests.tiny import batch, row, sid_ids, tiny_catalog, tiny_model
from tests.training import (
    COMMON,
    first_code,
    grpo_setup,
    grpo_trainer,
    moved,
    parameters,
    sft_setup,
    sft_trainer,
)


@pytest.mark.parametrize("sid_loss", ["catalog", "vocab"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_stage_2_moves_every_parameter_and_logs_every_term(tmp_path, sid_loss, checkpointing):
    trainer = sft_trainer(tmp_path, sid_loss=sid_loss, policy_weight=0.1, gradient_checkpointing=checkpointing)
    before = parameters(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == set(before)
    logs = trainer.state.log_history[0]
    assert {
        "loss",
        "align_loss",
        "policy_loss",
        "depth_accuracy",
        "mean_depth",
        "depth_entropy",
        "latent_norm_ratio",
        "mean_token_accuracy",
        "entropy",
    } <= set(logs)


def test_a_metric_without_terms_is_not_logged(tmp_path):
    trainer = sft_trainer(tmp_path, depths=[0] * 6, policy_weight=0.1)
    trainer.train()
    assert trainer.state.log_history[0]["mean_depth"] == 0
    assert not {"latent_norm_ratio", "policy_loss", "depth_accuracy"} & set(trainer.state.log_history[0])


def test_latent_metrics_are_means_over_the_steps():
    model, _ = tiny_model()
    sequences = mixed_rows(model)
    output = model.model(**batch(sequences))
    terms = latent_metrics(output, model.get_input_embeddings())
    metrics = {name: total / count for name, (total, count) in terms.items()}
    depths = [ids.count(model.config.latent_token_id) for ids in sequences]
    before = torch.cat([states[:n] for states, n in zip(output.latent_states, depths, strict=True)])  # (steps, H)
    after = torch.cat([states[1 : n + 1] for states, n in zip(output.latent_states, depths, strict=True)])
    ratio = before.norm(dim=-1).mean() / model.get_input_embeddings().weight.norm(dim=-1).mean()
    torch.testing.assert_close(metrics["latent_norm_ratio"], ratio)
    torch.testing.assert_close(metrics["latent_cosine"], torch.cosine_similarity(before, after, dim=-1).mean())
    assert metrics["mean_depth"] == sum(depths) / len(depths)


def test_stage_1_freezes_the_policy_head(tmp_path):
    trainer = sft_trainer(tmp_path, depths=[0] * 6)
    before = parameters(trainer.model)
    trainer.train()
    policy_head = {name for name in before if "policy_head" in name}
    assert len(policy_head) == 4
    assert moved(before, trainer.model) == set(before) - policy_head
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable == set(before) - policy_head  # DDP waits for the gradient of every trainable one


def test_stage_2_unfreezes_the_policy_head(tmp_path):
    stage1 = sft_trainer(tmp_path, depths=[0] * 6)
    LasarSFTTrainer(
        stage1.model,
        LasarSFTConfig(str(tmp_path), **COMMON, policy_weight=1.0),
        tiny_catalog(),
        train_dataset=sft_setup()[3],
        processing_class=stage1.processing_class,
    )
    assert all(p.requires_grad for p in stage1.model.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_stage_2_loss_is_the_sum_of_its_terms(tmp_path, smoothing):
    trainer = sft_trainer(
        tmp_path,
        policy_weight=0.7,
        policy_label_smoothing=smoothing,
        alignment_weight=0.3,
        gradient_checkpointing=False,
    )
    model, catalog = trainer.model.eval(), tiny_catalog()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, dict(inputs))
    outputs = model(inputs["input_ids"], inputs["attention_mask"])
    # Cross-entropy by the definition: each code among the codes that continue an item with the same prefix.
    cross_entropy, count = 0.0, 0
    for i in range(len(inputs["labels"])):
        positions = (inputs["labels"][i] != -100).nonzero()[:, 0]
        answer = inputs["labels"][i, positions].tolist()
        codes = [token - model.config.sid_token_id(level, 0) for level, token in enumerate(answer)]
        for level, position in enumerate(positions):
            follow = sorted({c[level] for c in catalog.codes.tolist() if c[:level] == codes[:level]})
            logits = outputs.logits[i, position - 1, [model.config.sid_token_id(level, c) for c in follow]]
            cross_entropy -= logits.log_softmax(0)[follow.index(codes[level])]
            count += 1
    depth = outputs.latent_steps
    mask = torch.arange(outputs.latent_states.shape[1] - 1) < depth[:, None]
    align = alignment_loss(outputs.latent_states[:, 1:], inputs["anchors"], mask)
    log_policy = outputs.depth_logits.log_softmax(-1)  # (B, C)
    one_hot = torch.nn.functional.one_hot(depth - 1, log_policy.shape[1])  # (B, C)
    label = (1 - smoothing) * one_hot + smoothing / log_policy.shape[1]
    policy = -(label * log_policy).sum(-1).mean()
    torch.testing.assert_close(loss, cross_entropy / count + 0.3 * align + 0.7 * policy, atol=1e-5, rtol=1e-5)


def test_vocabulary_loss_is_the_models_own(tmp_path):
    trainer = sft_trainer(tmp_path, sid_loss="vocab", alignment="none")
    inputs = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, dict(inputs))
    torch.testing.assert_close(loss, model(**inputs).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_text_labels_are_scored_over_the_vocabulary(temperature):
    model, _ = tiny_model()
    add_catalog_head(model, tiny_catalog(), temperature)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    labels = ids.clone()
    labels[:, :2] = -100
    scored = model(ids, labels=labels, fused_lm_head=True)
    expected = (model(ids).logits[0, :-1] / temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(scored.log_probs[0, 1:], expected[1:])
    assert scored.log_probs[0, 0] == 0
    assert scored.label_mask.tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_of_a_sequence_is_not_read(side):
    """It predicts no label. The states of `<|latent_start|>` and of slots are used, so those stay."""
    model, _ = tiny_model()
    catalog = tiny_catalog()
    add_catalog_head(model, catalog)
    answer = sid_ids(model, catalog.codes[0])
    inputs = batch([row(model, 7, 2, answer), row(model, 4, 2, answer), row(model, 5, 2)], side)
    ids = inputs["input_ids"]
    labels = torch.where(ids >= model.config.sid_token_offset, ids, -100)
    read, outputs = [], []
    model.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: read.append(args[0].shape))
    scored = model(**inputs, labels=labels, fused_lm_head=True)
    assert read[-1] == (3, 3)  # answers: <|latent_end|> and two of three codes
    model(**inputs)
    torch.testing.assert_close(outputs[0].latent_states, outputs[1].latent_states)
    torch.testing.assert_close(outputs[0].depth_logits, outputs[1].depth_logits)
    expected = score_labels(model, outputs[1].last_hidden_state, ids, labels, catalog.trie(ids.device))
    torch.testing.assert_close(scored.log_probs, expected.log_probs)


def test_the_likeliest_code_is_a_hit():
    model, _ = tiny_model()
    codes = tiny_catalog().codes.tolist()
    add_catalog_head(model, tiny_catalog())
    inputs = batch([row(model, 5, 1, sid_ids(model, item)) for item in codes])  # one prompt, each item
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    scored = model(**inputs, labels=labels, fused_lm_head=True)
    for item, hits, scores in zip(codes, scored.is_top1[:, -3:], scored.log_probs[:, -3:], strict=True):
        for level in range(3):
            others = [scored.log_probs[i, level - 3] for i, other in enumerate(codes) if other[:level] == item[:level]]
            assert bool(hits[level]) == bool(scores[level] > max(others) - 1e-5)


def test_a_label_outside_the_catalogue_is_refused():
    model, _ = tiny_model()
    catalog = tiny_catalog(num_items=3)
    add_catalog_head(model, catalog)
    items = {tuple(c) for c in catalog.codes.tolist()}
    other = next(c for c in [(0, 0, 0), (0, 0, 1), (1, 1, 1), (2, 2, 2)] if c not in items)
    ids = torch.tensor([row(model, 4, 0, sid_ids(model, other))])
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=labels, fused_lm_head=True)


def test_loss_on_every_item_of_a_history():
    """Labels on several items of one sequence: each code is scored among the continuations of its own item."""
    model, _ = tiny_model()
    catalog = tiny_catalog()
    add_catalog_head(model, catalog)
    items = [sid_ids(model, catalog.codes[i]) for i in (3, 8, 5)]
    start = model.config.latent_start_token_id
    ids = torch.tensor([[3, 4, *items[0], *items[1], start, model.config.latent_end_token_id, *items[2]]])
    labels = ids.clone()
    labels[:, :2], labels[:, 8:10] = -100, -100
    scored = model(ids, labels=labels, fused_lm_head=True)
    assert scored.label_mask.sum() == 9
    single = torch.tensor([[3, 4, *items[0]]])
    alone = model(single, labels=torch.where(single >= 15, single, -100), fused_lm_head=True)  # ids below 15 are text
    torch.testing.assert_close(scored.log_probs[0, 1:4], alone.log_probs[0, 1:4])


@pytest.mark.parametrize("sampling", ["sample", "stochastic_beams"])
@pytest.mark.parametrize("beta", [0.0, 0.1])  # without and with a reference model
def test_grpo_moves_every_parameter_and_logs_every_term(tmp_path, sampling, beta):
    trainer = grpo_trainer(tmp_path, reward_funcs=[first_code], sampling=sampling, beta=beta)
    before = parameters(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == set(before)
    logs = trainer.state.log_history[0]
    expected = {
        "loss",
        "reward",
        "mean_depth",
        "depth_entropy",
        "depth_loss",
        "terminal_loss",
        "reward_baseline",
        "rewards/first_code/mean",
        "latent_norm_ratio",
    }
    assert expected <= set(logs)
    assert ("kl" in logs) == (beta > 0)
    assert logs.get("kl", 0) == pytest.approx(0, abs=1e-5)  # the reference is the model that training started from


@pytest.fixture
def drawn(tmp_path):
    """A trainer, and the candidates it draws for four prompts."""
    trainer = grpo_trainer(tmp_path)
    prompts = [text for text in trainer.train_dataset["prompt"] for _ in range(4)]  # four candidates each
    torch.manual_seed(0)
    return trainer, trainer.draw_candidates(prompts, trainer)


def test_grpo_candidates_are_items_of_the_catalogue(drawn):
    trainer, candidates = drawn
    answers = [sid_ids(trainer.model, trainer.catalog.codes[item]) for item in candidates["items"]]
    assert len(answers) == 16
    assert candidates["completion_ids"] == answers


def test_grpo_draws_one_depth_per_group(drawn):
    trainer, candidates = drawn
    config = trainer.model.config
    for start in range(0, 16, 4):
        group = candidates["prompt_ids"][start : start + 4]
        assert group[1:] == group[:-1]
        assert group[0][-1] == config.latent_end_token_id
        assert 1 <= group[0].count(config.latent_token_id) <= 4  # the tiny model's max_latent_steps


def test_grpo_candidates_of_a_group_descend_in_probability(drawn):
    trainer, candidates = drawn
    pairs = zip(candidates["prompt_ids"], candidates["completion_ids"], strict=True)
    scores = [
        trainer.model(
            **batch([[*prompt, *ids]]), labels=torch.tensor([[-100] * len(prompt) + ids]), fused_lm_head=True
        )
        .log_probs.sum()
        .item()
        for prompt, ids in pairs
    ]
    for start in range(0, 16, 4):
        assert scores[start : start + 4] == sorted(scores[start : start + 4], reverse=True)


def scored_batch(trainer):
    """Candidates of two prompts with their scores, as TRL hands them to `compute_loss`."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by `train()`
    torch.manual_seed(3)
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    inputs["group_reward"] = torch.arange(2.0).repeat_interleave(4)  # the tiny model's rewards are all equal
    return inputs


def test_grpo_keeps_one_reward_per_group(tmp_path):
    trainer = grpo_trainer(tmp_path, reward_funcs=[first_code])
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    expected = torch.tensor(first_code(inputs["completion_ids"])).view(2, 4).mean(dim=1).repeat_interleave(4)
    torch.testing.assert_close(inputs["group_reward"], expected)


@pytest.mark.parametrize("alignment", ["kl", "cosine", "mse"])
def test_grpo_loss_is_the_sum_of_its_terms(tmp_path, alignment):
    trainer = grpo_trainer(tmp_path, depth_weight=0.7, terminal_weight=0.5, beta=0.0, alignment=alignment)
    inputs = scored_batch(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    outputs = trainer.model(ids, mask)
    depth = outputs.latent_steps
    final = outputs.latent_states[torch.arange(8), depth]
    expected = -(inputs["advantages"]).mean()  # on-policy the ratio is 1
    expected = expected + 0.5 * DISTANCES[alignment](final, inputs["terminal_anchor"]).mean()
    expected = expected + 0.7 * reinforce_loss(
        outputs.depth_logits, depth, inputs["group_reward"], inputs["reward_baseline"], 0.005, 0.01
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_terminal_loss_is_a_mean_over_the_prompts_with_an_anchor(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_weight=0.0, terminal_weight=1.0, beta=0.0)
    examples = trainer.train_dataset
    kept = [examples["terminal_anchor"][0], None, None, None]
    trainer.train_dataset = examples.remove_columns("terminal_anchor").add_column("terminal_anchor", kept)
    inputs = scored_batch(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.args.terminal_weight = 0.0
    rest = trainer.compute_loss(trainer.model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    outputs = trainer.model(ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1))
    final = outputs.latent_states[torch.arange(4), outputs.latent_steps[:4]]  # of the first prompt's candidates
    expected = DISTANCES["kl"](final, torch.tensor(kept[:1])).mean()
    torch.testing.assert_close(loss - rest, expected, atol=1e-5, rtol=1e-5)


def test_grpo_without_alignment_has_no_terminal_loss(tmp_path):
    trainer = grpo_trainer(tmp_path, alignment="none", max_steps=1)
    trainer.train()
    assert "terminal_loss" not in trainer.state.log_history[0]


def test_sft_resumes_bit_exactly(tmp_path):
    options = dict(max_steps=4, policy_weight=0.1, save_strategy="steps", save_steps=2)
    whole = sft_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = sft_trainer(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name


def test_grpo_resumes_exactly_at_a_generation_boundary(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, steps_per_generation=2, num_iterations=1)
    whole = grpo_trainer(tmp_path / "whole", reward_funcs=[first_code], **options)
    whole.train()
    resumed = grpo_trainer(tmp_path / "again", reward_funcs=[first_code], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.reward_baseline == whole.reward_baseline
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name


@pytest.mark.parametrize("make", [sft_trainer, grpo_trainer])
def test_a_complete_run_that_starts_again_does_not_train(tmp_path, make):
    """Its last step is in the middle of an epoch, which the Trainer would go on with."""
    options = dict(max_steps=3, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
    whole = make(tmp_path, **options)
    whole.train()
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name


def test_grpo_does_not_resume_inside_a_generation(tmp_path):
    """The last checkpoint of a run is written at its last step, whatever `save_steps` is."""
    options = dict(save_strategy="steps", save_steps=2, steps_per_generation=2)
    grpo_trainer(tmp_path, **options, max_steps=3).train()
    with pytest.raises(ValueError, match="checkpoint-3 .*micro_batch 1"):
        grpo_trainer(tmp_path, **options, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("save_steps", dict(save_strategy="steps", save_steps=3, steps_per_generation=2)),
        ("save_steps", dict(save_strategy="steps", save_steps=0.5)),
        ("mask_truncated_completions", dict(mask_truncated_completions=True)),
        ("sampling", dict(sampling="Sample")),
        ("alignment", dict(alignment="euclid")),
        ("top_p", dict(top_p=0.9)),
        ("top_k", dict(top_k=5)),
        ("min_p", dict(min_p=0.1)),
        ("repetition_penalty", dict(repetition_penalty=1.1)),
        ("generation_kwargs", dict(generation_kwargs={"top_k": 5})),
        ("use_vllm", dict(use_vllm=True)),
        ("num_generations_eval", dict(num_generations_eval=2)),
        ("neftune_noise_alpha", dict(neftune_noise_alpha=5.0)),
        ("cast_lm_head_to_fp32", dict(cast_lm_head_to_fp32=True)),
        ("remove_unused_columns", dict(remove_unused_columns=True)),
        ("sync_ref_model", dict(sync_ref_model=True)),
        ("temperature", dict(temperature=0.0)),
        # The tiny catalogue has 20 items.
        ("num_generations", dict(sampling="stochastic_beams", num_generations=32, per_device_train_batch_size=32)),
    ],
)
def test_grpo_refuses_unsupported_arguments(tmp_path, argument, options):
    with pytest.raises(ValueError, match=argument):
        grpo_trainer(tmp_path, **options)


def test_grpo_processes_draw_whole_groups(tmp_path, monkeypatch):
    # Two processes draw two groups of four together, which TRL accepts, but six and two candidates each.
    monkeypatch.setattr(LasarGRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="per_device_train_batch_size .*num_generations"):
        grpo_trainer(tmp_path, per_device_train_batch_size=6, num_generations=4)


def test_grpo_draws_from_items_that_are_not_removed(tmp_path):
    model, tokenizer, catalog, rows = grpo_setup()
    args = LasarGRPOConfig(
        str(tmp_path), **COMMON, per_device_train_batch_size=8, num_generations=4, sampling="stochastic_beams"
    )
    three_items = catalog.remove(catalog.item_ids[3:])
    with pytest.raises(ValueError, match="num_generations is 4, but there are 3 items"):
        LasarGRPOTrainer(model, args, three_items, processing_class=tokenizer, train_dataset=rows)
    assert not (tmp_path / "reference_model").exists()  # refused before anything was written


def test_grpo_evaluates_whole_groups(tmp_path):
    model, tokenizer, catalog, rows = grpo_setup()
    args = LasarGRPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=8, num_generations=4)
    args.per_device_eval_batch_size = 6
    options = dict(processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ValueError, match="per_device_eval_batch_size"):
        LasarGRPOTrainer(model, args, catalog, **options)


def test_rewards_read_the_items_and_columns(tmp_path):
    model, tokenizer, catalog, rows = grpo_setup()
    calls = []

    def reward(completion_ids, target, items, color, **kwargs):
        calls.append((completion_ids, items, color))
        return [float(item == wanted) for item, wanted in zip(items, target, strict=True)]

    args = LasarGRPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=8, num_generations=4)
    rows = rows.add_column("color", ["red", "blue", "red", "blue"])
    LasarGRPOTrainer(model, args, catalog, [reward], train_dataset=rows, processing_class=tokenizer).train()
    completion_ids, items, color = calls[0]
    assert completion_ids == [sid_ids(model, catalog.codes[item]) for item in items]
    assert set(color) <= {"red", "blue"}


def test_grpo_scores_without_the_dropout_of_the_layers(tmp_path):
    """Attention passes its rate to a function, which TRL leaves on; with it the ratio would not be 1."""
    trainer = grpo_trainer(tmp_path, model_kwargs=dict(attention_dropout=0.5), num_iterations=2, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["clip_ratio/region_mean"] == 0
    assert logs["kl"] == pytest.approx(0, abs=1e-6)


def chosen_depths(trainer, inputs):
    """Log-probability `(B,)` of each sequence's depth under the present policy, and its entropy `(B,)`."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    outputs = trainer.model(ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1))
    log_policy = outputs.depth_logits.detach().log_softmax(-1)
    return log_policy.gather(1, outputs.latent_steps[:, None] - 1)[:, 0], depth_entropy(outputs.depth_logits.detach())


def test_grpo_keeps_the_log_probability_of_the_depth(tmp_path):
    trainer = grpo_trainer(tmp_path)
    inputs = scored_batch(trainer)
    torch.testing.assert_close(inputs["depth_log_prob"], chosen_depths(trainer, inputs)[0], atol=1e-5, rtol=1e-5)


def test_depths_of_an_earlier_policy_are_weighted(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_weight=1.0, terminal_weight=0.0, beta=0.0)
    inputs = scored_batch(trainer)
    log_probs, entropy = chosen_depths(trainer, inputs)
    losses = []
    for shift in (0.0, 1.0):  # the earlier policy gave the depths e times less probability
        trainer.compute_loss(trainer.model, {**inputs, "depth_log_prob": log_probs - shift})
        losses.append(trainer._metrics["train"]["depth_loss"][-1])
    bonus = trainer.args.depth_entropy_weight * entropy.mean().item()
    assert losses[1] + bonus == pytest.approx((losses[0] + bonus) * np.e, rel=1e-4)


def test_the_kl_penalty_is_pinned_to_its_unbiased_gradient():
    assert "use_bias_correction_kl" in LasarGRPOConfig.__annotations__
    assert LasarGRPOConfig.use_bias_correction_kl is True


def test_examples_and_anchors_of_other_depths_are_refused(tmp_path):
    trainer = sft_trainer(tmp_path)
    examples = [dict(trainer.train_dataset[i]) for i in (0, 1)]
    # Swapped, so that the largest depth of the batch, and with it every shape, stays the same.
    examples[0]["sample_index"], examples[1]["sample_index"] = 1, 0
    with pytest.raises(ValueError, match="sample_index 1: .* 1 latent slots .* 3 anchors"):
        trainer.data_collator(examples)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("sid_loss", dict(sid_loss="Catalog")),
        ("alignment", dict(alignment="euclid")),
        ("label_smoothing_factor", dict(label_smoothing_factor=0.1)),
        ("packing", dict(packing=True, max_length=32)),
    ],
)
def test_sft_refuses_unsupported_arguments(tmp_path, argument, options):
    with pytest.raises(ValueError, match=argument):
        sft_trainer(tmp_path, **options)


def test_sft_refuses_another_loss_function(tmp_path):
    model, tokenizer, catalog, rows, _ = sft_setup()
    args = LasarSFTConfig(str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match="compute_loss_func"):
        LasarSFTTrainer(
            model, args, catalog, train_dataset=rows, processing_class=tokenizer, compute_loss_func=lambda *_: 0
        )


def test_sft_needs_a_catalogue(tmp_path):
    model, tokenizer, _, rows, _ = sft_setup()
    with pytest.raises(ValueError, match="catalog"):
        LasarSFTTrainer(model, LasarSFTConfig(str(tmp_path), **COMMON), train_dataset=rows, processing_class=tokenizer)


def test_grpo_needs_a_catalogue(tmp_path):
    model, tokenizer, _, rows = grpo_setup()
    args = LasarGRPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=8, num_generations=4)
    with pytest.raises(ValueError, match="catalog"):
        LasarGRPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def processor_trainer(kind, folder, catalog=None, **options):
    """An SFT or GRPO trainer that is given a processor instead of a tokenizer."""
    model, tokenizer, items, rows = sft_setup()[:4] if kind == "sft" else grpo_setup()
    processor = LasarProcessor(tokenizer, items, "the next item", max_history=7)
    options = {**COMMON, "per_device_train_batch_size": 4, **options}
    if kind == "sft":
        args, trainer = LasarSFTConfig(str(folder), **options), LasarSFTTrainer
    else:
        args, trainer = LasarGRPOConfig(str(folder), **options, num_generations=4), LasarGRPOTrainer
    return trainer(model, args, catalog, train_dataset=rows, processing_class=processor)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_checkpoint_contains_the_processor(tmp_path, kind):
    trainer = processor_trainer(kind, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    processor = LasarProcessor.from_pretrained(tmp_path / "checkpoint-1")
    assert processor.to_dict() == trainer.processor.to_dict()
    assert processor.catalog.item_ids == trainer.catalog.item_ids
    assert torch.equal(processor.catalog.codes, trainer.catalog.codes)
    assert processor.prompt_ids([3, 1]) == trainer.processor.prompt_ids([3, 1])


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_processor_hands_its_tokenizer_to_trl(tmp_path, kind):
    trainer = processor_trainer(kind, tmp_path)
    assert trainer.processing_class is trainer.processor.tokenizer
    assert trainer.catalog is trainer.processor.catalog


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize(
    "other",
    [
        tiny_catalog(seed=1),
        SidCatalog(tiny_catalog().codes, [f"other-{i}" for i in range(20)]),
        tiny_catalog().remove(["item-3"]),
    ],
    ids=["codes", "items", "removed"],
)
def test_a_catalogue_other_than_the_processors_is_refused(tmp_path, kind, other):
    with pytest.raises(ValueError, match="catalog"):
        processor_trainer(kind, tmp_path, catalog=other)


def test_an_equal_catalogue_beside_a_processor_is_accepted(tmp_path):
    trainer = processor_trainer("sft", tmp_path, catalog=tiny_catalog())
    assert trainer.catalog is trainer.processor.catalog


def test_stock_sft_trainer_runs_the_latent_loop(tmp_path):
    """The latent loop is part of the base model, which TRL's own trainer calls."""
    model, tokenizer, _, rows, _ = sft_setup()
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **COMMON, per_device_train_batch_size=3, max_length=None),
        train_dataset=rows.remove_columns("sample_index"),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), dict(inputs))
    torch.testing.assert_close(loss, model(**inputs).loss, atol=1e-5, rtol=1e-5)


OVERRIDES = {
    LasarSFTTrainer: (
        SFTTrainer,
        ["compute_loss", "_set_signature_columns_if_needed", "evaluate", "_save", "create_model_card"],
    ),
    LasarGRPOTrainer: (
        GRPOTrainer,
        [
            "compute_loss",
            "_get_train_sampler",
            "_calculate_rewards",
            "_generate_and_score_completions",
            "evaluate",
            "_save_checkpoint",
            "_load_optimizer_and_scheduler",
            "_save",
            "_save_rng_state",
            "create_model_card",
        ],
    ),
}


@pytest.mark.parametrize(("ours", "name"), [(c, n) for c, (_, names) in OVERRIDES.items() for n in names])
def test_each_override_is_called_and_keeps_the_signature(tmp_path, monkeypatch, ours, name):
    parent = OVERRIDES[ours][0]
    theirs = list(inspect.signature(getattr(parent, name)).parameters)
    assert list(inspect.signature(getattr(ours, name)).parameters) == theirs
    calls = []
    original = getattr(ours, name)
    monkeypatch.setattr(ours, name, lambda self, *a, **k: (calls.append(name), original(self, *a, **k))[1])
    make = sft_trainer if ours is LasarSFTTrainer else grpo_trainer
    options = dict(save_strategy="steps", save_steps=1, max_steps=1)
    trainer = make(tmp_path, **options)
    trainer.train()
    if name == "evaluate":
        trainer.evaluate(trainer.train_dataset)
    make(tmp_path, **{**options, "max_steps": 2}).train(resume_from_checkpoint=True)
    assert calls


def test_a_trainer_saves_a_model_that_loads(tmp_path):
    trainer = sft_trainer(tmp_path, policy_weight=0.1)
    trainer.train()
    trainer.save_model()
    loaded = LasarForGenerativeRec.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)


def test_with_a_tokenizer_the_catalogue_is_saved(tmp_path):
    trainer = sft_trainer(tmp_path)
    trainer.save_model()
    assert torch.equal(SidCatalog.from_pretrained(tmp_path).codes, trainer.catalog.codes)
    assert not (tmp_path / "processor_config.json").exists()


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_model_card_names_the_tags_and_the_usage(tmp_path, kind):
    processor_trainer(kind, tmp_path).create_model_card("shop", ["Toy shop", "user/books"], tags=["mine"])
    card = (tmp_path / "README.md").read_text()
    assert f"- {kind}\n" in card
    assert "- mine\n" in card
    assert "datasets:\n- user/books\n" in card and "Toy shop, user/books" in card
    assert 'name = "shop"' in card
    assert "pipeline_tag: other\n" in card


def test_ranking_metrics_join_the_evaluation(tmp_path):
    model, tokenizer, catalog, rows, anchors = sft_setup()
    options = dict(
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_NDCG@10",
    )
    args = LasarSFTConfig(str(tmp_path), **{**COMMON, **options})
    scores = iter([0.5, 0.25])  # the first checkpoint is the better one
    trainer = LasarSFTTrainer(
        model,
        args,
        catalog,
        anchors,
        ranking_evaluator=lambda model: {"NDCG@10": next(scores)},
        train_dataset=rows,
        eval_dataset=rows.remove_columns("sample_index"),  # held-out examples have no anchors
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.5
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert [entry["eval_NDCG@10"] for entry in trainer.state.log_history if "eval_NDCG@10" in entry] == [0.5, 0.25]


def evaluated_trainer(folder, ranking_evaluator, sets=None, **options):
    """An SFT trainer that evaluates every step; `sets` are names of evaluation sets, none for no set at all."""
    model, tokenizer, catalog, rows, anchors = sft_setup()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "policy_weight": 0.1, **options}
    held_out = rows.remove_columns("sample_index").select(range(4))
    return LasarSFTTrainer(
        model,
        LasarSFTConfig(str(folder), **{**COMMON, **options}),
        catalog,
        anchors,
        train_dataset=rows,
        ranking_evaluator=ranking_evaluator,
        processing_class=LasarProcessor(tokenizer, catalog),
        eval_dataset=held_out if sets is None else dict.fromkeys(sets, held_out) or None,
    )


def test_one_evaluator_ranks_once_for_all_named_sets(tmp_path):
    calls = []
    trainer = evaluated_trainer(tmp_path, lambda model: calls.append(1) or {"HR@5": 0.5}, sets=["a", "b"])
    metrics = trainer.evaluate()
    assert len(calls) == 1
    assert metrics["eval_HR@5"] == 0.5
    assert {"eval_a_loss", "eval_b_loss"} <= set(metrics)


def test_named_sets_are_ranked_by_their_own_evaluators(tmp_path):
    evaluators = {"a": lambda model: {"HR@5": 0.5}, "b": lambda model: {"HR@5": 0.25}}
    metrics = evaluated_trainer(tmp_path, evaluators, sets=["a", "b"]).evaluate()
    ranking = {name: value for name, value in metrics.items() if "HR" in name}
    assert ranking == {"eval_a_HR@5": 0.5, "eval_b_HR@5": 0.25}


def test_ranking_needs_no_evaluation_set(tmp_path):
    scores = iter([0.5, 0.25, 0.125])
    options = dict(load_best_model_at_end=True, metric_for_best_model="HR@5", save_strategy="steps", max_steps=3)
    trainer = evaluated_trainer(tmp_path, lambda model: {"HR@5": next(scores)}, sets=[], **options)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.state.global_step == 2  # stopped early


def test_held_out_examples_have_no_policy_loss(tmp_path):
    """Their depth is that of the layout, not a label."""
    trainer = evaluated_trainer(tmp_path, None)
    metrics = trainer.evaluate()
    assert metrics["eval_mean_depth"] == np.mean([1, 3, 2, 4])
    assert "eval_policy_loss" not in metrics
    inputs = next(iter(trainer.get_eval_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    scored = trainer.model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(loss, scored.loss, atol=1e-5, rtol=1e-5)


RANKED = RankingEvaluator(
    Dataset.from_dict({"history": [[0]], "target": [1]}), LasarProcessor(tiny_model()[1], tiny_catalog()), ks=(5,)
)


@pytest.mark.parametrize(
    ("metric", "evaluator", "sets"),
    [
        ("eval_HR@10", RANKED, None),
        ("ndcg@5", RANKED, None),
        ("loss", RANKED, []),
        ("loss", RANKED, ["a"]),
        ("HR@5", {"a": RANKED}, ["a"]),
        ("HR@5", None, None),
    ],
)
def test_an_unknown_best_metric_fails_before_training(tmp_path, metric, evaluator, sets):
    with pytest.raises(ValueError, match="metric_for_best_model"):
        evaluated_trainer(tmp_path, evaluator, sets, metric_for_best_model=metric)


@pytest.mark.parametrize(
    ("metric", "evaluator", "sets"),
    [
        ("eval_HR@5", RANKED, None),
        ("NDCG@5", RANKED, []),
        ("eval_mean_depth", RANKED, []),
        ("loss", RANKED, None),
        ("a_loss", RANKED, ["a"]),
        ("a_HR@5", {"a": RANKED}, ["a"]),
        ("mean_token_accuracy", None, None),
    ],
)
def test_a_best_metric_that_is_evaluated_is_accepted(tmp_path, metric, evaluator, sets):
    trainer = evaluated_trainer(tmp_path, evaluator, sets, metric_for_best_model=metric)
    name = f"eval_{metric.removeprefix('eval_')}"
    assert name in trainer.evaluate()


# ---------------------------------------------------------------------------------------------------------------------
# Lengths


@pytest.mark.parametrize("depth", [4, 5])
def test_examples_deeper_than_the_model_fail_before_training(tmp_path, depth):
    depths = [1, 3, depth, 1, 1, 2]
    if depth <= 4:  # the tiny model's max_latent_steps
        sft_trainer(tmp_path, depths=depths)
        return
    with pytest.raises(ValueError, match="2 .* 5 .*max_latent_steps"):
        sft_trainer(tmp_path, depths=depths)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize(("missing", "name"), [(0, None), (1, "max_position_embeddings .*max_history")])
def test_examples_beyond_the_positions_fail_before_training(tmp_path, monkeypatch, kind, missing, name):
    model, tokenizer, catalog, rows = sft_setup()[:4] if kind == "sft" else grpo_setup()
    if kind == "sft":
        limit = max(map(len, rows["input_ids"]))
        options, config, trainer = {}, LasarSFTConfig, LasarSFTTrainer
    else:  # prompt, four latent steps, <|latent_end|> and three codes
        limit = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in rows["prompt"]) + 8
        options, config, trainer = {"num_generations": 4, "beta": 0.0}, LasarGRPOConfig, LasarGRPOTrainer
    model.config.backbone_config.max_position_embeddings = limit - missing
    args = config(str(tmp_path), **{**COMMON, "per_device_train_batch_size": 4, **options})
    with nullcontext() if name is None else pytest.raises(ValueError, match=name):
        trainer(model, args, catalog, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_examples_that_max_length_would_cut_are_refused(tmp_path, part):
    model, tokenizer, catalog, rows, _ = sft_setup()
    lengths = list(map(len, rows["input_ids"]))
    short = rows.select([np.argmin(lengths)])
    args = LasarSFTConfig(str(tmp_path), **COMMON, max_length=max(lengths) - 1)
    datasets = {"train_dataset": short, "eval_dataset": {"a": short}, part: rows}
    with pytest.raises(ValueError, match=f"longest with {max(lengths)} .*max_length .*max_history"):
        LasarSFTTrainer(model, args, catalog, processing_class=tokenizer, **datasets)


# ---------------------------------------------------------------------------------------------------------------------
# Examples as other trainers take them


@pytest.fixture
def grpo_with(tmp_path):
    """Makes a GRPO trainer on changed examples; its model is a path that does not exist."""
    _, tokenizer, catalog, rows = grpo_setup()

    def make(change, model="nowhere", part="train_dataset"):
        args = LasarGRPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=8, num_generations=4, beta=0.0)
        datasets = {"train_dataset": rows, part: change(rows)}
        if part == "a":  # a named set
            datasets = {"train_dataset": rows, "eval_dataset": {"a": change(rows)}}
        return LasarGRPOTrainer(model, args, catalog, processing_class=tokenizer, **datasets)

    return make


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prompt", lambda rows: rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})),
        ("prompt", lambda rows: rows.map(lambda row: {"prompt": row["prompt"] + "."})),
        ("prompt", lambda rows: rows.remove_columns("prompt")),
        ("target", lambda rows: rows.remove_columns("target")),
        ("target .*gone", lambda rows: rows.map(lambda row: {"target": "gone"})),
        ("target .*20", lambda rows: rows.map(lambda row: {"target": 20})),
    ],
    ids=["chat", "other end", "no prompt", "no target", "unknown item", "unknown index"],
)
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset", "a"])
def test_examples_are_checked_before_the_model_loads(grpo_with, name, change, part):
    with pytest.raises(ValueError, match=f"(?s)(?=.*{name})(?=.*{part})"):
        grpo_with(change, part=part)


def with_item_ids(rows):
    return rows.map(lambda row: {"target": f"item-{row['target']}"})


def test_targets_may_be_item_ids(grpo_with):
    trainer = grpo_with(with_item_ids, grpo_setup()[0])
    assert list(trainer.train_dataset["target"]) == [0, 1, 2, 3]


def test_targets_of_an_evaluation_may_be_item_ids(grpo_with):
    trainer = grpo_with(lambda rows: rows, grpo_setup()[0])
    assert "eval_reward" in trainer.evaluate(with_item_ids(grpo_setup()[3]))


@pytest.mark.parametrize("part", ["eval_dataset", "a"])
def test_long_evaluation_prompts_fail_before_training(grpo_with, part):
    model, tokenizer, _, rows = grpo_setup()
    longest = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in rows["prompt"])
    model.config.backbone_config.max_position_embeddings = longest + 8
    with pytest.raises(ValueError, match="max_position_embeddings"):
        grpo_with(lambda rows: rows.map(lambda row: {"prompt": "the " + row["prompt"]}), model, part)


@pytest.mark.parametrize("metric", ["eval_HR@5", "rewards/exact/mean", "kl", "loss"])
@pytest.mark.parametrize("named", [True, False])
def test_grpo_refuses_an_unknown_best_metric(tmp_path, metric, named):
    model, tokenizer, catalog, rows = grpo_setup()
    args = LasarGRPOConfig(
        str(tmp_path),
        **COMMON,
        per_device_train_batch_size=4,
        num_generations=4,
        beta=0.0,
        metric_for_best_model=metric,
    )
    if metric == "loss" and not named:
        metric = args.metric_for_best_model = "a_loss"
    eval_dataset = {"a": rows} if named else rows
    with pytest.raises(ValueError, match="metric_for_best_model"):
        LasarGRPOTrainer(
            model, args, catalog, train_dataset=rows, eval_dataset=eval_dataset, processing_class=tokenizer
        )


METRICS = [
    "reward",
    "eval_reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "mean_depth",
    "depth_entropy",
    "kl",
    "latent_norm_ratio",
    "terminal_loss",
    "depth_loss",
    "reward_baseline",
    "rewards/ranking/mean",
    "rewards/exact_match/std",
]


@pytest.mark.parametrize("named", [True, False])
def test_grpo_evaluates_each_best_metric_it_accepts(tmp_path, named):
    model, tokenizer, catalog, rows = grpo_setup()
    args = LasarGRPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=4, num_generations=4)
    args.per_device_eval_batch_size = 4
    trainer = LasarGRPOTrainer(
        model,
        args,
        catalog,
        train_dataset=rows,
        eval_dataset={"a": rows} if named else rows,
        processing_class=tokenizer,
    )
    evaluated = trainer.evaluate()
    for metric in [*METRICS, "a_loss" if named else "loss"]:
        args.metric_for_best_model = metric
        trainer.check_best_metric(trainer.eval_dataset)  # as at the start
        assert f"eval_{metric.removeprefix('eval_')}" in evaluated, metric


def test_a_reward_that_logs_metrics_may_be_chosen_by_them(tmp_path):
    model, tokenizer, catalog, rows = grpo_setup()

    def reward(completion_ids, log_metric, **kwargs):
        log_metric("novelty", 1.0)
        return first_code(completion_ids)

    args = LasarGRPOConfig(
        str(tmp_path), **COMMON, per_device_train_batch_size=4, num_generations=4, metric_for_best_model="novelty"
    )
    args.per_device_eval_batch_size = 4
    trainer = LasarGRPOTrainer(
        model, args, catalog, [reward], train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    assert trainer.evaluate()["eval_novelty"] == 1.0


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("loaded", [True, False])
def test_the_processor_in_the_models_folder_is_the_default(tmp_path, kind, loaded):
    first = processor_trainer(kind, tmp_path)
    first.save_model()
    config, trainer = (LasarSFTConfig, LasarSFTTrainer) if kind == "sft" else (LasarGRPOConfig, LasarGRPOTrainer)
    model = LasarForGenerativeRec.from_pretrained(tmp_path) if loaded else str(tmp_path)
    options = {} if kind == "sft" else {"num_generations": 4}
    args = config(str(tmp_path / "next"), **COMMON, per_device_train_batch_size=4, **options)
    second = trainer(model, args, train_dataset=(sft_setup() if kind == "sft" else grpo_setup())[3])
    assert second.processor.to_dict() == first.processor.to_dict()
    assert second.catalog.item_ids == first.catalog.item_ids


@pytest.mark.parametrize("config", [LasarSFTConfig, LasarGRPOConfig])
def test_the_search_for_unused_parameters_is_off(tmp_path, config):
    assert config(str(tmp_path), **COMMON, ddp_find_unused_parameters=None).ddp_find_unused_parameters is False
    with pytest.raises(ValueError, match="ddp_find_unused_parameters"):
        config(str(tmp_path), **COMMON, ddp_find_unused_parameters=True)


def test_sharded_embeddings_leave_the_norm_ratio_out(tmp_path):
    """ZeRO-3 empties them after the forward."""
    trainer = sft_trainer(tmp_path)
    output = trainer.model.model(**batch([row(trainer.model, 4, 2)]))
    empty = torch.nn.Embedding(1, 1)
    empty.weight.data = torch.empty(0)
    trainer.log_means(latent_metrics(output, empty))
    assert trainer._metrics["eval"].keys() == {"mean_depth", "depth_entropy", "latent_cosine"}


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_model_in_memory_needs_a_processing_class(tmp_path, kind):
    model, _, catalog, rows = sft_setup()[:4] if kind == "sft" else grpo_setup()
    config, trainer = (LasarSFTConfig, LasarSFTTrainer) if kind == "sft" else (LasarGRPOConfig, LasarGRPOTrainer)
    with pytest.raises(ValueError, match="processing_class"):
        trainer(model, config(str(tmp_path), **COMMON), catalog, train_dataset=rows)


@pytest.mark.parametrize("metric", ["align_loss", "policy_loss", "depth_accuracy"])
def test_held_out_examples_have_no_metric_of_anchors_to_choose_by(tmp_path, metric):
    model, tokenizer, catalog, rows, anchors = sft_setup()
    args = LasarSFTConfig(
        str(tmp_path), **COMMON, policy_weight=0.1, eval_strategy="steps", metric_for_best_model=metric
    )
    with pytest.raises(ValueError, match=f"metric_for_best_model is '{metric}'"):
        LasarSFTTrainer(
            model,
            args,
            catalog,
            anchors,
            train_dataset=rows,
            eval_dataset=rows.remove_columns("sample_index"),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("targets", [[0.0, 1.0, 2.0, 3.0], [True, False, True, True]])
def test_targets_are_whole_numbers_or_ids(grpo_with, targets):
    with pytest.raises(ValueError, match="target"):
        grpo_with(lambda rows: rows.remove_columns("target").add_column("target", targets))


def test_untokenised_examples_are_not_cut(tmp_path):
    model, tokenizer, catalog, _, _ = sft_setup()
    args = LasarSFTConfig(str(tmp_path), **COMMON, max_length=3)
    rows = Dataset.from_dict({"text": ["the red book", "the blue chair next item"]})
    with pytest.raises(ValueError, match="max_length"):
        LasarSFTTrainer(model, args, catalog, train_dataset=rows, processing_class=tokenizer)
