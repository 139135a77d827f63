"""Both trainers on TRL: what they add is called, exact, logged, and moves every trainable parameter."""

import inspect

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from lasar_hf import (
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarSFTConfig,
    LasarSFTTrainer,
    SidCatalog,
)
from lasar_hf.reasoning.anchors import AnchorStore
from lasar_hf.trainers import (
    add_catalog_head,
    alignment_loss,
    bidirectional_kl,
    checkpoint_to_resume,
    depth_entropy,
    reinforce_loss,
)
from tests.tiny import batch, row, sid_ids, tiny_catalog, tiny_model


COMMON = dict(
    use_cpu=True, bf16=False, report_to="none", max_steps=2, logging_steps=1, save_strategy="no",
    learning_rate=1e-2, disable_tqdm=True,
)
DEPTHS = [1, 3, 2, 4, 1, 2]


def sft_setup(depths=DEPTHS, **model_kwargs):
    model, tokenizer = tiny_model(**model_kwargs)
    catalog = tiny_catalog()
    rows = []
    for i, depth in enumerate(depths):
        answer = sid_ids(model, catalog.codes[i])
        ids = row(model, 4 + i % 3, depth, answer, seed=i)
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 3) + answer, "sample_index": i})
    generator = np.random.default_rng(0)
    count = max(sum(depths), 1)
    anchors = AnchorStore(
        generator.normal(size=(count, 16)).astype(np.float32), np.arange(count),
        np.concatenate([[0], np.cumsum(np.maximum(depths, 1))]), "hash",
    ) if min(depths) > 0 else None
    return model, tokenizer, catalog, Dataset.from_list(rows), anchors


def grpo_setup(**model_kwargs):
    model, tokenizer = tiny_model(**model_kwargs)
    catalog = tiny_catalog()
    texts = ["the red book", "the blue chair", "red chair", "blue item ."]
    anchor = np.linspace(-1, 1, 16).tolist()
    rows = [{"prompt": f"{t}<a_1><b_2><c_3><|latent_start|>", "target": i, "terminal_anchor": anchor}
            for i, t in enumerate(texts)]
    return model, tokenizer, catalog, Dataset.from_list(rows)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model, ignore=()):
    return {n for n, p in model.named_parameters() if not torch.equal(before[n], p) and n not in ignore}


def sft_trainer(tmp_path, depths=DEPTHS, model_kwargs=None, **kwargs):
    model, tokenizer, catalog, rows, anchors = sft_setup(depths, **(model_kwargs or {}))
    args = LasarSFTConfig(str(tmp_path), **{**COMMON, "per_device_train_batch_size": 3, **kwargs})
    return LasarSFTTrainer(model, args, catalog, anchors, train_dataset=rows, processing_class=tokenizer)


def first_code(completion_ids, **kwargs):
    """A reward that differs within every group, so that every step has a gradient."""
    return [float(ids[0] % 4) for ids in completion_ids]


def grpo_trainer(tmp_path, model_kwargs=None, reward_funcs=None, **kwargs):
    model, tokenizer, catalog, rows = grpo_setup(**(model_kwargs or {}))
    args = LasarGRPOConfig(
        str(tmp_path), **{**COMMON, "per_device_train_batch_size": 8, "num_generations": 4, **kwargs}
    )
    return LasarGRPOTrainer(
        model, args, catalog, reward_funcs, train_dataset=rows, processing_class=tokenizer
    )


@pytest.mark.parametrize("sid_loss", ["catalog", "vocab"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_stage_2_moves_every_parameter_and_logs_every_term(tmp_path, sid_loss, checkpointing):
    trainer = sft_trainer(tmp_path, sid_loss=sid_loss, policy_weight=0.1, gradient_checkpointing=checkpointing)
    before = parameters(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == set(before)
    logs = trainer.state.log_history[0]
    assert {"loss", "align_loss", "policy_loss", "depth_accuracy", "mean_depth", "depth_entropy", "latent_norm_ratio",
            "mean_token_accuracy", "entropy"} <= set(logs)


def test_stage_1_freezes_the_policy_head(tmp_path):
    trainer = sft_trainer(tmp_path, depths=[0] * 6)
    before = parameters(trainer.model)
    trainer.train()
    still = {name for name in before if "policy_head" in name}
    assert moved(before, trainer.model) == set(before) - still and still
    # The next stage makes it learn again.
    trainer = LasarSFTTrainer(
        trainer.model, LasarSFTConfig(str(tmp_path), **COMMON, policy_weight=1.0), tiny_catalog(),
        train_dataset=sft_setup()[3], processing_class=trainer.processing_class,
    )
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_stage_2_loss_is_the_sum_of_its_terms(tmp_path):
    trainer = sft_trainer(tmp_path, policy_weight=0.7, alignment_weight=0.3, gradient_checkpointing=False)
    model, catalog = trainer.model.eval(), tiny_catalog()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, dict(inputs))
    outputs = model(inputs["input_ids"], inputs["attention_mask"])
    cross_entropy, count = 0.0, 0
    for i in range(len(inputs["labels"])):
        places = (inputs["labels"][i] != -100).nonzero()[:, 0]
        codes = [int(inputs["labels"][i, p]) - model.config.sid_token_id(level, 0) for level, p in enumerate(places)]
        for level, place in enumerate(places):
            follow = sorted({c[level] for c in catalog.codes.tolist() if c[:level] == codes[:level]})
            logits = outputs.logits[i, place - 1, [model.config.sid_token_id(level, c) for c in follow]]
            cross_entropy -= logits.log_softmax(0)[follow.index(codes[level])]
            count += 1
    depth = outputs.latent_steps
    mask = torch.arange(outputs.latent_states.shape[1] - 1) < depth[:, None]
    align = alignment_loss(outputs.latent_states[:, 1:], inputs["anchors"], mask)
    policy = torch.nn.functional.cross_entropy(outputs.depth_logits, depth - 1)
    torch.testing.assert_close(loss, cross_entropy / count + 0.3 * align + 0.7 * policy, atol=1e-5, rtol=1e-5)


def test_vocabulary_loss_is_the_models_own(tmp_path):
    trainer = sft_trainer(tmp_path, sid_loss="vocab", alignment="none")
    inputs = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, dict(inputs))
    torch.testing.assert_close(loss, model(**inputs).loss, atol=1e-5, rtol=1e-5)


def test_text_labels_are_scored_over_the_vocabulary():
    model, _ = tiny_model()
    add_catalog_head(model, tiny_catalog())
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    labels = ids.clone()
    labels[:, :2] = -100
    scored = model(ids, labels=labels, fused_lm_head=True)
    expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(scored.log_probs[0, 1:], expected[1:])
    assert scored.log_probs[0, 0] == 0 and scored.label_mask.tolist() == [[False, True, True, True, True]]


def test_a_label_outside_the_catalogue_is_an_error():
    model, _ = tiny_model()
    catalog = tiny_catalog(num_items=3)
    add_catalog_head(model, catalog)
    known = {tuple(c) for c in catalog.codes.tolist()}
    stranger = next(c for c in [(0, 0, 0), (0, 0, 1), (1, 1, 1), (2, 2, 2)] if c not in known)
    ids = torch.tensor([row(model, 4, 0, sid_ids(model, stranger))])
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    with pytest.raises(ValueError, match="no item of the catalogue continues so"):
        model(ids, labels=labels, fused_lm_head=True)


def test_loss_on_every_item_of_a_history():
    """Labels on several items of one row: each code is scored among the continuations of its own item."""
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
    single = torch.tensor([[3, 4, *items[0]]])  # the first item alone, then nothing after it
    alone = model(single, labels=torch.where(single >= 15, single, -100), fused_lm_head=True)
    torch.testing.assert_close(scored.log_probs[0, 1:4], alone.log_probs[0, 1:4])


@pytest.mark.parametrize("sampling", ["sample", "stochastic_beams"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_moves_every_parameter_and_logs_every_term(tmp_path, sampling, beta):
    trainer = grpo_trainer(tmp_path, reward_funcs=[first_code], sampling=sampling, beta=beta)
    before = parameters(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == set(before)
    logs = trainer.state.log_history[0]
    expected = {"loss", "reward", "mean_depth", "depth_entropy", "depth_loss", "terminal_loss", "reward_baseline",
                "rewards/first_code/mean", "latent_norm_ratio"}
    assert expected <= set(logs)
    assert ("kl" in logs) == (beta > 0)
    if beta > 0:
        assert logs["kl"] == pytest.approx(0, abs=1e-5)  # the reference is the model that training started from


def test_grpo_draws_valid_candidates_in_order_and_one_depth_a_group(tmp_path):
    trainer = grpo_trainer(tmp_path)
    config, catalog = trainer.model.config, trainer.catalog
    prompts = [text for text in trainer.train_dataset["prompt"] for _ in range(4)]
    torch.manual_seed(0)
    drawn = trainer._draw_candidates(prompts, trainer)
    known = {tuple(sid_ids(trainer.model, codes)) for codes in catalog.codes}
    assert all(tuple(ids) in known for ids in drawn["completion_ids"])
    for group in range(4):
        heads = {tuple(ids) for ids in drawn["prompt_ids"][4 * group : 4 * group + 4]}
        assert len(heads) == 1
        (head,) = heads
        depth = head.count(config.latent_token_id)
        assert 1 <= depth <= 4 and head[-1] == config.latent_end_token_id
        scores = [
            trainer.model(
                **batch([[*head, *ids]]), labels=torch.tensor([[-100] * len(head) + ids]), fused_lm_head=True
            ).log_probs.sum().item()
            for ids in drawn["completion_ids"][4 * group : 4 * group + 4]
        ]
        assert scores == sorted(scores, reverse=True)


def test_grpo_ratio_is_one_on_policy_and_the_depth_loss_reads_the_group_reward(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_weight=1.0, terminal_weight=0.5, beta=0.0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by `train()`
    examples = [trainer.train_dataset[i // 4] for i in range(8)]
    torch.manual_seed(3)
    inputs = trainer._generate_and_score_completions(examples)
    assert inputs["group_reward"].view(2, 4).std(dim=1).max() == 0
    inputs["group_reward"] = torch.arange(2.0).repeat_interleave(4)
    loss = trainer.compute_loss(trainer.model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    outputs = trainer.model(ids, mask)
    depth = outputs.latent_steps
    final = outputs.latent_states[torch.arange(8), depth]
    expected = -(inputs["advantages"]).mean()  # the ratio is 1
    expected = expected + 0.5 * bidirectional_kl(final, inputs["terminal_anchor"]).mean()
    expected = expected + reinforce_loss(
        outputs.depth_logits, depth, inputs["group_reward"], inputs["reward_baseline"], 0.005, 0.01
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


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
    whole = grpo_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = grpo_trainer(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.reward_baseline == whole.reward_baseline
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name


def test_grpo_does_not_resume_inside_a_generation(tmp_path):
    """The last checkpoint of a run may lie there, whatever `save_steps` is."""
    options = dict(save_strategy="steps", save_steps=2, steps_per_generation=2)
    grpo_trainer(tmp_path, **options, max_steps=3).train()
    with pytest.raises(ValueError, match="checkpoint-3 was written 1 micro-batches behind a generation"):
        grpo_trainer(tmp_path, **options, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(save_strategy="steps", save_steps=3, steps_per_generation=2), "save_steps=3 falls between two"),
        (dict(save_strategy="steps", save_steps=0.5), "save_steps=0.5 is a share"),
        (dict(mask_truncated_completions=True), "no end token"),
        (dict(sampling="Sample"), "sampling is 'Sample': choose among sample, stochastic_beams"),
        (dict(top_p=0.9), "top_p=0.9 would draw from another policy"),
        (dict(top_k=5), "leave it at 0"),
        (dict(use_vllm=True), "latent loop"),
        (dict(num_generations_eval=2), "num_generations_eval=2 differs"),
        (dict(sampling="stochastic_beams", num_generations=32, per_device_train_batch_size=32), "from 20 items"),
    ],
)
def test_grpo_refuses_what_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, **options)


def test_grpo_counts_the_items_that_are_not_hidden_and_keeps_eval_groups_whole(tmp_path):
    model, tokenizer, catalog, rows = grpo_setup()
    options = dict(processing_class=tokenizer, train_dataset=rows)
    args = LasarGRPOConfig(
        str(tmp_path), **COMMON, per_device_train_batch_size=8, num_generations=4, sampling="stochastic_beams"
    )
    few = catalog.remove(catalog.item_ids[3:])
    with pytest.raises(ValueError, match="without replacement from 3 items"):
        LasarGRPOTrainer(model, args, few, **options)
    args.per_device_eval_batch_size = 6
    with pytest.raises(ValueError, match="per_device_eval_batch_size=6 is no multiple of num_generations=4"):
        LasarGRPOTrainer(model, args, catalog, eval_dataset=rows, **options)
    assert not (tmp_path / "reference_model").exists()


def test_grpo_scores_without_the_dropout_of_the_layers(tmp_path):
    """Attention has a rate of its own, which is no module: with it the ratio would not be 1."""
    trainer = grpo_trainer(tmp_path, model_kwargs=dict(attention_dropout=0.5), num_iterations=2, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["clip_ratio/region_mean"] == 0 and logs["kl"] == pytest.approx(0, abs=1e-6)


def test_depths_of_an_earlier_policy_are_weighed(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_weight=1.0, terminal_weight=0.0, beta=0.0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    outputs = trainer.model(ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1))
    chosen = outputs.depth_logits.log_softmax(-1).gather(1, outputs.latent_steps[:, None] - 1)[:, 0]
    torch.testing.assert_close(inputs["depth_log_prob"], chosen, atol=1e-5, rtol=1e-5)
    inputs["group_reward"] = torch.arange(2.0).repeat_interleave(4)
    weighed = []
    for shift in (0.0, 1.0):
        trainer.compute_loss(trainer.model, {**inputs, "depth_log_prob": chosen.detach() - shift})
        weighed.append(trainer._metrics["train"]["depth_loss"][-1])
    bonus = 0.01 * depth_entropy(outputs.depth_logits).mean().item()
    assert weighed[1] + bonus == pytest.approx((weighed[0] + bonus) * np.e, rel=1e-4)


def test_a_run_resumes_its_own_whole_checkpoints_only(tmp_path):
    args = LasarSFTConfig(str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-3)
    assert checkpoint_to_resume(args, data={"a": "1"}) is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
        if step < 12:  # killed while it was written
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    args.max_steps = 50
    assert checkpoint_to_resume(args, data={"a": "1"}) == str(tmp_path / "checkpoint-10")
    args.learning_rate = 1e-4
    with pytest.raises(ValueError, match="of a run with another data, learning_rate: choose another output_dir"):
        checkpoint_to_resume(args, data={"a": "2"})


def test_rows_and_anchors_of_other_depths_are_refused(tmp_path):
    trainer = sft_trainer(tmp_path)
    rows = [dict(trainer.train_dataset[i]) for i in (0, 1)]
    rows[0]["sample"], rows[1]["sample"] = 1, 0  # their largest depth stays the same
    with pytest.raises(ValueError, match="A row of sample 1 has 1 latent slots, but the sample has 3 anchors"):
        trainer.data_collator(rows)


def test_sft_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="sid_loss is 'Catalog': choose among catalog, vocab"):
        sft_trainer(tmp_path, sid_loss="Catalog")
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        sft_trainer(tmp_path, label_smoothing_factor=0.1)
    model, tokenizer, catalog, rows, _ = sft_setup()
    with pytest.raises(ValueError, match="pass catalog="):
        LasarSFTTrainer(model, LasarSFTConfig(str(tmp_path), **COMMON), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="packing=False"):
        args = LasarSFTConfig(str(tmp_path), **COMMON, packing=True, max_length=32)
        LasarSFTTrainer(model, args, catalog, train_dataset=rows, processing_class=tokenizer)


def test_stock_sft_trainer_runs_the_latent_loop(tmp_path):
    """The loop lives under the head, so TRL's own trainer trains it without knowing."""
    model, tokenizer, _, rows, _ = sft_setup()
    trainer = SFTTrainer(
        model, SFTConfig(str(tmp_path), **COMMON, per_device_train_batch_size=3, max_length=None),
        train_dataset=rows.remove_columns("sample_index"), processing_class=tokenizer,
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
        ["compute_loss", "_get_train_sampler", "_calculate_rewards", "_generate_and_score_completions",
         "_save_checkpoint", "_load_optimizer_and_scheduler", "_save", "create_model_card"],
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
    trainer.create_model_card()
    loaded = LasarForGenerativeRec.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)
    assert "lasar" in (tmp_path / "README.md").read_text()
    assert torch.equal(SidCatalog.from_pretrained(tmp_path).codes, trainer.catalog.codes)


def test_ranking_metrics_join_the_evaluation(tmp_path):
    model, tokenizer, catalog, rows, anchors = sft_setup()
    options = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_NDCG@10",
    )
    args = LasarSFTConfig(str(tmp_path), **{**COMMON, **options})
    seen = iter([0.5, 0.25])
    trainer = LasarSFTTrainer(
        model, args, catalog, anchors, ranking_evaluator=lambda model: {"NDCG@10": next(seen)}, train_dataset=rows,
        eval_dataset=rows.remove_columns("sample_index"), processing_class=tokenizer,  # held out: no anchors
    )
    trainer.train()
    assert trainer.state.best_metric == 0.5 and trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert [entry["eval_NDCG@10"] for entry in trainer.state.log_history if "eval_NDCG@10" in entry] == [0.5, 0.25]
