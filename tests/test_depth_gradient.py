"""Options of the RL stage for depth and rewards."""

import math

import pytest
import torch

from lasar_hf import LasarGRPOConfig, LasarGRPOTrainer
from lasar_hf.trainers import PrefixReward
from tests.tiny import sid_ids, tiny_catalog, tiny_model
from tests.training import COMMON, grpo_setup, grpo_trainer, moved, parameters


def generation(trainer):
    """A batch of a trainer that has drawn its candidates."""
    trainer.model.train()
    examples = [example for example in trainer.train_dataset for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions([dict(example) for example in examples])


def target_log_prob(model, prompt_ids: list[int], depth: int, target: int) -> float:
    """By the definition: each code among the codes that continue an item with the same prefix."""
    config, catalog = model.config, tiny_catalog()
    codes = catalog.codes[target].tolist()
    ids = [*prompt_ids, *[config.latent_token_id] * depth, config.latent_end_token_id, *sid_ids(model, codes)]
    logits, total = type(model).forward(model, torch.tensor([ids])).logits[0, -len(codes) - 1 :], 0.0
    for level, code in enumerate(codes):
        follow = sorted({c[level] for c in catalog.codes.tolist() if c[:level] == codes[:level]})
        scores = logits[level, [config.sid_token_id(level, c) for c in follow]].log_softmax(0)
        total += float(scores[follow.index(code)])
    return total


def test_exact_gradient_scores_the_target_at_every_depth(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_gradient="exact", depth_weight=1.0)
    batch = generation(trainer)
    model, size = trainer.model, trainer.num_generations
    model.eval()
    for i, example in enumerate(trainer.train_dataset):
        prompt = trainer.processing_class(example["prompt"], add_special_tokens=False).input_ids
        expected = [target_log_prob(model, prompt, depth, example["target"]) for depth in range(1, 5)]
        for j in range(size):
            assert batch["depth_rewards"][i * size + j].tolist() == pytest.approx(expected, abs=1e-4)


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


def test_an_automatic_cost_is_half_the_gain_of_the_best_depth(tmp_path):
    trainer = grpo_trainer(tmp_path, depth_gradient="exact", depth_weight=1.0, step_cost="auto")
    rewards = generation(trainer)["depth_rewards"]
    gain = (rewards.max(dim=1).values - rewards[:, 0]).mean()
    assert trainer.step_cost == pytest.approx(0.5 * float(gain), rel=1e-5)
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


@pytest.mark.parametrize("depth", [0, 3])
def test_a_fixed_depth_is_that_of_all_candidates(tmp_path, depth):
    trainer = grpo_trainer(tmp_path, fixed_depth=depth, depth_weight=0.0)
    before = parameters(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["mean_depth"] == depth
    assert moved(before, trainer.model)


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
        ({"depth_gradient": "guess"}, "depth_gradient"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, **options)
