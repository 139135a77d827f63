"""Options of the RL stage for depth and rewards."""

import math

import pytest
import torch
from trl import TrlParser

from lasar_hf import LasarGRPOConfig, LasarGRPOTrainer
from lasar_hf.trainers import PrefixReward
from tests.tiny import sid_ids, tiny_catalog, tiny_model
from tests.training import COMMON, first_code, grpo_setup, grpo_trainer, moved, parameters


def generation(trainer):
    """A batch of a trainer that has drawn its candidates."""
    trainer.model.train()
    examples = [example for example in trainer.train_dataset for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions([dict(example) for example in examples])


def target_log_prob(model, prompt_ids: list[int], depth: int, target: int, temperature: float) -> float:
    """By the definition: each code among the codes that continue an item with the same prefix."""
    config, catalog = model.config, tiny_catalog()
    codes = catalog.codes[target].tolist()
    ids = [*prompt_ids, *[config.latent_token_id] * depth, config.latent_end_token_id, *sid_ids(model, codes)]
    logits, total = type(model).forward(model, torch.tensor([ids])).logits[0, -len(codes) - 1 :], 0.0
    for level, code in enumerate(codes):
        follow = sorted({c[level] for c in catalog.codes.tolist() if c[:level] == codes[:level]})
        scores = (logits[level, [config.sid_token_id(level, c) for c in follow]] / temperature).log_softmax(0)
        total += float(scores[follow.index(code)])
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_exact_gradient_scores_the_target_at_every_depth(tmp_path, temperature):
    trainer = grpo_trainer(tmp_path, depth_gradient="exact", depth_weight=1.0, temperature=temperature)
    batch = generation(trainer)
    model, size = trainer.model, trainer.num_generations
    model.eval()
    for i, example in enumerate(trainer.train_dataset):
        prompt = trainer.processing_class(example["prompt"], add_special_tokens=False).input_ids
        expected = [target_log_prob(model, prompt, depth, example["target"], temperature) for depth in range(1, 5)]
        for j in range(size):
            assert batch["depth_rewards"][i * size + j].tolist() == pytest.approx(expected, abs=1e-4)


def test_exact_gradient_scores_targets_as_recommend_does(tmp_path):
    """From depth 0 on, and without the items of the history."""
    model, tokenizer, catalog, examples = grpo_setup()
    model.model.policy_head.out_proj = torch.nn.Linear(16, 5)
    model.config.min_latent_steps, model.config.exclude_history = 0, True
    histories = ["".join(tokenizer.convert_ids_to_tokens(sid_ids(model, catalog.codes[i]))) for i in (7, 8, 9, 10)]
    prompts = [f"red{history}<|latent_start|>" for history in histories]
    examples = examples.remove_columns("prompt").add_column("prompt", prompts)
    args = LasarGRPOConfig(
        str(tmp_path), **COMMON, num_generations=4, per_device_train_batch_size=16, depth_gradient="exact"
    )
    trainer = LasarGRPOTrainer(model, args, catalog, train_dataset=examples, processing_class=tokenizer)
    rewards = generation(trainer)["depth_rewards"][::4]  # (B, C)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
    for depth in range(5):
        output = model.recommend(
            inputs["input_ids"], inputs["attention_mask"], catalog, top_k=20, num_beams=20, latent_steps=depth
        )
        for i, target in enumerate(examples["target"]):
            rank = output.items[i].tolist().index(target)
            assert rewards[i, depth].item() == pytest.approx(output.scores[i, rank].item(), abs=1e-4)


def test_exact_gradient_moves_the_policy_to_the_best_depth(tmp_path):
    trainer = grpo_trainer(
        tmp_path, depth_gradient="exact", depth_weight=5.0, step_cost=0.0, depth_entropy_weight=0.0, max_steps=30,
        learning_rate=5e-3,
    )  # fmt: skip
    # Only the policy head learns, so the best depth of each prompt does not change.
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("policy_head" in name)
    rewards = generation(trainer)["depth_rewards"][:: trainer.num_generations]  # (B, C)
    trainer.train()
    prompts = trainer.processing_class(trainer.train_dataset["prompt"][:], padding=True, return_tensors="pt")
    output = trainer.model.recommend(prompts["input_ids"], prompts["attention_mask"], tiny_catalog())
    chosen = rewards.gather(1, output.latent_steps[:, None] - 1)[:, 0]
    best, mean = rewards.max(dim=1).values, rewards.mean(dim=1)
    assert (best - chosen).mean() < 0.2 * (best - mean).mean()


def test_the_deepest_chain_costs_half_the_gain_of_the_best_depth(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_gradient="exact", depth_weight=1.0, step_cost="auto")
    rewards = generation(trainer)["depth_rewards"]
    gain = (rewards.max(dim=1).values - rewards[:, 0]).mean()
    assert 3 * trainer.step_cost == pytest.approx(0.5 * float(gain), rel=1e-5)  # from 1 to 4 steps
    first = trainer.step_cost
    generation(trainer)
    assert trainer.step_cost == first


def test_the_cost_rises_during_the_warm_up(tmp_path):
    trainer = grpo_trainer(tmp_path, step_cost=0.4, step_cost_warmup=0.5, depth_weight=0.1, max_steps=6)
    trainer.train()
    costs = [log["step_cost"] for log in trainer.state.log_history if "step_cost" in log]
    assert costs == pytest.approx([0.0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4])


def test_rank_reward_is_the_groups_ndcg(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_reward="rank")
    codes, size = trainer.catalog.codes, trainer.num_generations
    groups = [[5, 5, 3, 2], [7, 7, 7, 7], [1, 4, 2, 2], [9, 8, 3, 3]]
    targets = [3, 7, 6, 3]
    assert size == 4
    assert len({tuple(c) for c in codes.tolist()}) == len(codes)
    inputs = [{"items": i, "target": t} for group, t in zip(groups, targets, strict=True) for i in group]
    expected = [1 / math.log2(3), 1.0, 0.0, 1 / math.log2(4)]
    assert trainer._rank_rewards(inputs) == pytest.approx([value for value in expected for _ in range(4)])


def test_prefix_reward_counts_leading_codes():
    model, _ = tiny_model()
    catalog = tiny_catalog()
    target = catalog.codes[0].tolist()
    other = [(code + 1) % 4 for code in target]
    candidates = [target, [*target[:2], other[2]], [target[0], other[1], target[2]], [other[0], *target[1:]]]
    rewards = PrefixReward(catalog, model.config)([sid_ids(model, codes) for codes in candidates], [0] * 4)
    assert rewards == pytest.approx([0.0, 0.2 * 2 / 3, 0.2 / 3, 0.0])


def test_groups_without_signal_have_no_loss(tmp_path):
    def first_code_reward(completion_ids, target, **kwargs):
        """Candidates of the first two prompts differ, those of the others do not."""
        return [float(index % 4 if index < 8 else 1) for index in range(len(completion_ids))]

    losses = {}
    for drop in (False, True):
        trainer = grpo_trainer(
            tmp_path, reward_funcs=[first_code_reward], fixed_draws=True, drop_groups_without_signal=drop, beta=0.3,
            depth_weight=0.0, alignment="none", scale_rewards="none", per_device_train_batch_size=16,
        )  # fmt: skip
        # The reference is another model, so that there is a KL penalty.
        for parameter in trainer.ref_model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        trainer.current_gradient_accumulation_steps = 1  # set by train()
        batch = generation(trainer)
        if drop:
            assert (batch["completion_mask"].sum(dim=1) > 0).tolist() == [True] * 8 + [False] * 8
            # The mean over the first two groups alone.
            half = {name: part[:8] for name, part in batch.items() if isinstance(part, torch.Tensor) and part.ndim}
            half |= {"loss_scale": torch.ones(8), "num_items_in_batch": batch["num_items_in_batch"]}
            losses["half"] = float(trainer.compute_loss(trainer.model, half))
        losses[drop] = float(trainer.compute_loss(trainer.model, batch))
    assert losses[True] == pytest.approx(losses["half"], rel=1e-4)
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)


def test_groups_of_equal_rewards_have_no_signal(tmp_path):
    """Seven times 0.8 does not have the mean 0.8 in float32, so the advantages are not quite 0."""
    trainer = grpo_trainer(
        tmp_path, reward_funcs=[lambda completion_ids, **kwargs: [0.8] * len(completion_ids)], num_generations=7,
        per_device_train_batch_size=28, drop_groups_without_signal=True,
    )  # fmt: skip
    batch = generation(trainer)
    assert batch["advantages"].abs().max() > 0
    assert batch["completion_mask"].sum() == 0


def test_dropped_groups_accumulate_to_the_step_of_the_whole_batch(tmp_path):
    def one_prompt(completion_ids, target, **kwargs):
        return [float(ids[0] % 4) * (item == 1) for ids, item in zip(completion_ids, target, strict=True)]

    moves = []
    for size in (16, 8):  # the second run has its only signal in one of two micro-batches
        trainer = grpo_trainer(
            tmp_path / str(size), reward_funcs=[one_prompt], fixed_draws=True, drop_groups_without_signal=True,
            shuffle_dataset=False, optim="sgd", max_steps=1, per_device_train_batch_size=size, max_grad_norm=0.0,
            gradient_accumulation_steps=16 // size,
        )  # fmt: skip
        before = parameters(trainer.model)
        trainer.train()
        moves.append({name: part - before[name] for name, part in parameters(trainer.model).items()})
    assert max(part.abs().max() for part in moves[0].values()) > 1e-3
    for name, part in moves[0].items():
        torch.testing.assert_close(moves[1][name], part, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), ("0.25", 0.25)])
def test_a_cost_can_be_given_as_text(tmp_path, value, expected):
    options = f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\ndepth_gradient: exact\n"
    (tmp_path / "grpo.yaml").write_text(options + f"step_cost: {value}\n")
    parser = TrlParser((LasarGRPOConfig,))
    assert parser.parse_args_and_config(["--config", str(tmp_path / "grpo.yaml")])[0].step_cost == expected
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--depth_gradient", "exact", "--step_cost", value]
    assert parser.parse_args_and_config([*arguments, "--bf16", "false"])[0].step_cost == expected


def test_only_an_automatic_cost_is_resumed(tmp_path):
    options = dict(save_strategy="steps", save_steps=1, depth_gradient="exact", depth_weight=1.0)
    first = grpo_trainer(tmp_path, **options, step_cost="auto", max_steps=1)
    first.train()
    for step_cost, expected in (("auto", first.step_cost), (0.25, 0.25)):
        trainer = grpo_trainer(tmp_path, **options, step_cost=step_cost, max_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert trainer.step_cost == expected


def test_the_depth_policy_learns_from_ranks(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_reward="rank", reward_funcs=[first_code])
    torch.manual_seed(0)
    batch = generation(trainer)
    codes, size = batch["completion_ids"].tolist(), trainer.num_generations
    expected = []
    for i, example in enumerate(trainer.train_dataset):
        distinct = [list(ids) for ids in dict.fromkeys(map(tuple, codes[i * size : (i + 1) * size]))]
        target = sid_ids(trainer.model, trainer.catalog.codes[example["target"]])
        expected += [1 / math.log2(distinct.index(target) + 2) if target in distinct else 0.0] * size
    assert batch["group_reward"].tolist() == pytest.approx(expected)
    assert batch["reward_baseline"].tolist() == pytest.approx([sum(expected) / len(expected)] * len(expected))
    assert max(expected) > 0


@pytest.mark.parametrize("min_latent_steps", [0, 1])
@pytest.mark.parametrize("exclude_history", [False, True])
def test_candidates_are_scored_as_they_were_drawn(tmp_path, min_latent_steps, exclude_history):
    """Drawn candidates are as frequent as they are probable for the loss, whose ratio is then 1."""
    size = 3000
    model, tokenizer, catalog, examples = grpo_setup()
    if min_latent_steps == 0:
        model.model.policy_head.out_proj = torch.nn.Linear(16, 5)
        torch.nn.init.constant_(model.model.policy_head.out_proj.bias, 0.0)
        with torch.no_grad():
            model.model.policy_head.out_proj.bias[0] = 100.0  # always depth 0
    model.config.min_latent_steps, model.config.exclude_history = min_latent_steps, exclude_history
    history = "".join(tokenizer.convert_ids_to_tokens(sid_ids(model, catalog.codes[7])))
    examples = examples.select([0]).remove_columns("prompt").add_column("prompt", [f"red{history}<|latent_start|>"])
    args = LasarGRPOConfig(
        str(tmp_path), **COMMON, num_generations=size, per_device_train_batch_size=size, temperature=0.7,
        num_iterations=2,
    )  # fmt: skip
    trainer = LasarGRPOTrainer(model, args, catalog, train_dataset=examples, processing_class=tokenizer)
    torch.manual_seed(0)
    batch = generation(trainer)
    # 1. The trainer's scores of the candidates, as kept for the ratio, against those of the loss's own pass.
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    assert (model.config.latent_token_id in ids[0].tolist()) == (min_latent_steps == 1)
    scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)[0]
    torch.testing.assert_close(scores, batch["old_per_token_logps"], atol=1e-6, rtol=0)
    # 2. Their probabilities against the frequencies, within four standard deviations.
    candidates, index, counts = batch["completion_ids"].unique(dim=0, return_inverse=True, return_counts=True)
    probability = torch.zeros(len(candidates)).scatter(0, index, scores.sum(dim=1).exp().detach())
    assert probability.sum() == pytest.approx(1, abs=0.02)
    deviation = (probability * (1 - probability) / size).sqrt()
    assert ((counts / size - probability).abs() < 4 * deviation + 1e-4).all()
    answers = [sid_ids(model, catalog.codes[7])] if exclude_history else []
    assert not any(answer in candidates.tolist() for answer in answers)


@pytest.mark.parametrize("depth", [0, 3])
def test_a_fixed_depth_is_that_of_all_candidates(tmp_path, depth):
    trainer = grpo_trainer(tmp_path, fixed_depth=depth, depth_weight=0.0)
    before = parameters(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["mean_depth"] == depth
    assert ("terminal_loss" in trainer.state.log_history[0]) == (depth > 0)  # h_0 is no latent step
    assert moved(before, trainer.model)
    assert ("terminal_loss" in trainer.state.log_history[0]) == (depth > 0)  # h_0 is no latent step


def test_ranking_metrics_choose_the_best_model(tmp_path):
    values = iter([0.1, 0.3, 0.2])

    class Evaluator:
        metric_names = ["NDCG@10"]

        def __call__(self, model):
            return {"NDCG@10": next(values)}

    model, tokenizer, catalog, examples = grpo_setup()
    args = LasarGRPOConfig(
        str(tmp_path), **COMMON | dict(max_steps=3, save_strategy="steps"), save_steps=1, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_NDCG@10", load_best_model_at_end=True, num_generations=4,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = LasarGRPOTrainer(
        model, args, catalog, train_dataset=examples, processing_class=tokenizer, ranking_evaluator=Evaluator()
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = LasarGRPOTrainer(
        trainer.state.best_model_checkpoint, LasarGRPOConfig(str(tmp_path / "x"), **COMMON, num_generations=4,
        per_device_train_batch_size=4), catalog, train_dataset=examples, processing_class=tokenizer,
    ).model  # fmt: skip
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_cost": "auto"}, "depth_gradient"),
        ({"step_cost": "cheap"}, "expected a number or auto"),
        ({"step_cost_warmup": 2.0}, "expected 0 to 1"),
        ({"fixed_depth": 2, "depth_weight": 0.1}, "depth_weight"),
        ({"fixed_depth": 9, "depth_weight": 0.0}, "expected 0 to 4"),
        ({"drop_groups_without_signal": True, "loss_type": "bnpo"}, "loss_type"),
        ({"drop_groups_without_signal": True, "entropy_coef": 0.1}, "entropy_coef"),
        ({"depth_gradient": "guess"}, "depth_gradient"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, **options)


@pytest.mark.parametrize("gradient", ["exact", "reinforce"])
def test_the_exact_gradient_moves_the_policy_head_alone(tmp_path, gradient):
    trainer = grpo_trainer(
        tmp_path, depth_gradient=gradient, depth_weight=1.0, alignment="none", beta=0.0, max_steps=1,
        reward_funcs=[lambda completion_ids, **kwargs: [0.5] * len(completion_ids)],
    )  # fmt: skip
    before = parameters(trainer.model)
    trainer.train()
    others = {name for name in moved(before, trainer.model) if "policy_head" not in name}
    assert bool(others) == (gradient == "reinforce")
    assert moved(before, trainer.model) - others


def test_the_policy_head_has_a_learning_rate_of_its_own(tmp_path):
    trainer = grpo_trainer(
        tmp_path, depth_weight=1.0, learning_rate=1e-4, policy_learning_rate=1e-2, max_steps=1, alignment="none",
        reward_funcs=[first_code], lr_scheduler_type="constant",
    )  # fmt: skip
    before = parameters(trainer.model)
    trainer.train()
    # The first step of Adam moves a weight by its learning rate.
    for name, weight in trainer.model.named_parameters():
        step = (weight - before[name]).abs().max().item()
        assert step == pytest.approx(1e-2 if "policy_head" in name else 1e-4, rel=0.05), name
    groups = trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(before)
