"""GRPO's objective: inherited options, temperature, accumulation and the reward baseline act on catalogue scores."""

import pytest
import torch

from tests.tiny import batch, sid_ids
from tests.training import first_code, grpo_trainer, parameters, sft_trainer


# Only the policy gradient; no other term of the loss.
POLICY = dict(reward_funcs=[first_code], beta=0.0, depth_weight=0.0, alignment="none")


def drawn_batch(trainer, groups=2):
    """Scored candidates of some prompts, as TRL hands them to `compute_loss`."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by `train()`
    torch.manual_seed(3)
    size, rows = trainer.num_generations, trainer.train_dataset
    return trainer._generate_and_score_completions([dict(rows[i // size % len(rows)]) for i in range(size * groups)])


def head_gradient(trainer, loss):
    """Gradient of the head, which every code's score depends on."""
    return torch.autograd.grad(loss, trainer.model.lm_head.weight)[0]


def token_scores(trainer, inputs):
    """
    Log-probabilities and entropies `(B, M)` of the codes by their definition: a softmax over the codes that continue
    an item, at the trainer's temperature.
    """
    model, catalog = trainer.model, trainer.catalog
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    logits = model(ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)).logits
    first_ids = [model.config.sid_token_id(level, 0) for level in range(3)]
    log_probs, entropies = [], []
    for i, answer in enumerate(inputs["completion_ids"].tolist()):
        codes = [token - first for token, first in zip(answer, first_ids, strict=True)]
        for level in range(3):
            follow = sorted({c[level] for c in catalog.codes.tolist() if c[:level] == codes[:level]})
            scores = logits[i, level - 4, [first_ids[level] + code for code in follow]] / trainer.args.temperature
            policy = scores.log_softmax(0)
            log_probs.append(policy[follow.index(codes[level])])
            entropies.append(-(policy.exp() * policy).sum())
    return torch.stack(log_probs).view(-1, 3), torch.stack(entropies).view(-1, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient that is followed


def is_target(items, target, **kwargs):
    return [float(item == wanted) for item, wanted in zip(items, target, strict=True)]


def expected_gradients(folder, sampling):
    """Gradients of many drawn groups and of the expected reward, which is the probability of an item of about .9."""
    size, groups = 4, 300
    trainer = grpo_trainer(
        folder,
        **{**POLICY, "reward_funcs": [is_target]},
        sampling=sampling,
        temperature=0.25,
        scale_rewards="none",
        per_device_train_batch_size=size * groups,
        gradient_checkpointing=False,
    )
    model, config = trainer.model, trainer.model.config
    with torch.no_grad():
        list(model.model.policy_head.parameters())[-1][0] = 100.0  # always one latent step
    # 1. The probability of each item, and the target.
    prompt = trainer.processing_class(trainer.train_dataset["prompt"][0], add_special_tokens=False).input_ids
    start = [*prompt, config.latent_token_id, config.latent_end_token_id]
    inputs = batch([[*start, *sid_ids(model, codes)] for codes in trainer.catalog.codes])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    policy = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(dim=1).exp()
    assert policy.sum().item() == pytest.approx(1, abs=1e-4)
    target = int(policy.argmax())
    assert 0.8 < policy[target].item() < 0.97
    # 2. A group's mean includes the candidate itself, which leaves 1 - 1 / G. The loss is a mean over three codes.
    exact = head_gradient(trainer, -policy[target] * (1 - 1 / size) / 3)
    # 3. The trainer's own loss.
    rows = trainer.train_dataset.select([0]).remove_columns("target").add_column("target", [target])
    trainer.train_dataset = rows
    return head_gradient(trainer, trainer.compute_loss(model, drawn_batch(trainer, groups))), exact


def test_independent_draws_follow_the_gradient_of_the_expected_reward(tmp_path):
    got, exact = expected_gradients(tmp_path, "sample")
    assert (got - exact).norm() < 0.2 * exact.norm()


def test_stochastic_beams_are_biased_and_say_so(tmp_path):
    with pytest.warns(UserWarning, match="sampling"):
        got, exact = expected_gradients(tmp_path, "stochastic_beams")
    assert (got - exact).norm() > 0.8 * exact.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Options of TRL


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        (dict(loss_type="dapo"), 1),
        (dict(loss_type="bnpo"), 1),
        (dict(loss_type="dr_grpo"), 1),
        (dict(loss_type="cispo", epsilon_high=5.0), 1),
        (dict(loss_type="sapo"), 1),
        (dict(loss_type="vespo"), 1),
        (dict(importance_sampling_level="sequence"), 1),
        (dict(pad_to_multiple_of=8), 1),
        (dict(loss_type="luspo", importance_sampling_level="sequence"), 3),  # times the length
        (dict(num_iterations=2), 1),
    ],
    ids=str,
)
def test_losses_agree_on_policy(tmp_path, options, factor):
    """Answers have one length and the ratio is 1, so every type has the gradient of plain GRPO."""
    gradients = []
    for kwargs in ({}, options):
        trainer = grpo_trainer(tmp_path, **POLICY, **kwargs)
        gradients.append(head_gradient(trainer, trainer.compute_loss(trainer.model, drawn_batch(trainer))))
    assert gradients[0].norm() > 0.01
    torch.testing.assert_close(gradients[1], factor * gradients[0], atol=1e-6, rtol=1e-4)


def clipped(ratio, advantages, low=0.8, high=1.2):
    return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)


OFF_POLICY = {
    "epsilon": (dict(epsilon=0.05), lambda r, a, h: clipped(r, a, 0.95, 1.05)),
    "epsilon_high": (dict(epsilon_high=0.5), lambda r, a, h: clipped(r, a, 0.8, 1.5)),
    "delta": (dict(delta=1.3), lambda r, a, h: -torch.min(r.clamp(max=1.3) * a, r.clamp(0.8, 1.2) * a)),
    "importance_sampling_level": (
        dict(importance_sampling_level="sequence"),
        lambda r, a, h: clipped(r.log().mean(1, True).exp(), a),
    ),
    "off_policy_mask_threshold": (
        dict(off_policy_mask_threshold=0.1),
        lambda r, a, h: clipped(r, a) * ((a >= 0) | (-r.log().mean(1, True) <= 0.1)),
    ),
    "top_entropy_quantile": (
        dict(top_entropy_quantile=0.5),
        lambda r, a, h: clipped(r, a) * (h >= h.flatten().quantile(0.5)),
    ),
    "entropy_coef": (dict(entropy_coef=0.7), lambda r, a, h: clipped(r, a) - 0.7 * h.mean()),
}


@pytest.mark.parametrize(("options", "equation"), OFF_POLICY.values(), ids=OFF_POLICY)
def test_options_of_the_objective_act_on_the_catalogues_scores(tmp_path, options, equation):
    trainer = grpo_trainer(tmp_path, **POLICY, **options)
    inputs = drawn_batch(trainer)
    log_probs, entropies = token_scores(trainer, inputs)
    shift = torch.linspace(-0.6, 0.6, 24)[torch.randperm(24)].view(8, 3)
    inputs["old_per_token_logps"] = log_probs.detach() + shift
    ratio = (log_probs - inputs["old_per_token_logps"]).exp()
    expected = equation(ratio, inputs["advantages"][:, None], entropies).mean()
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradients = [head_gradient(trainer, value) for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def last_code(completion_ids, **kwargs):
    return [float(ids[-1] % 4) for ids in completion_ids]


ADVANTAGES = {
    "scale_rewards": (dict(scale_rewards="none"), lambda r: r.sum(-1) - r.sum(-1).mean(1, True)),
    "batch": (dict(scale_rewards="batch"), lambda r: (r.sum(-1) - r.sum(-1).mean(1, True)) / r.sum(-1).std()),
    "reward_weights": (
        dict(reward_weights=[2.0, 0.5], scale_rewards="none"),
        lambda r: 2 * (r - r.mean(1, True))[..., 0] + 0.5 * (r - r.mean(1, True))[..., 1],
    ),
    "multi_objective_aggregation": (
        dict(multi_objective_aggregation="normalize_then_sum"),
        lambda r: (
            ((r - r.mean(1, True)) / r.std(1, keepdim=True)).sum(-1)
            / ((r - r.mean(1, True)) / r.std(1, keepdim=True)).sum(-1).std()
        ),
    ),
}


@pytest.mark.parametrize(("options", "equation"), ADVANTAGES.values(), ids=ADVANTAGES)
def test_advantages_and_group_rewards_have_the_weights(tmp_path, options, equation):
    trainer = grpo_trainer(tmp_path, **{**POLICY, "reward_funcs": [first_code, last_code]}, **options)
    inputs = drawn_batch(trainer)
    ids = inputs["completion_ids"].tolist()
    rewards = torch.tensor([first_code(ids), last_code(ids)]).T.view(2, 4, 2)  # groups, candidates, functions
    torch.testing.assert_close(inputs["advantages"].view(2, 4), equation(rewards), atol=1e-3, rtol=1e-3)
    weights = torch.tensor(options.get("reward_weights", [1.0, 1.0]))
    expected = (rewards * weights).sum(-1).mean(1).repeat_interleave(4)  # R_group, whatever the scale
    torch.testing.assert_close(inputs["group_reward"], expected)


def test_candidates_without_a_reward_do_not_count(tmp_path):
    trainer = grpo_trainer(tmp_path, **{**POLICY, "reward_funcs": [lambda completion_ids, **_: REWARDS]})
    torch.testing.assert_close(drawn_batch(trainer, 3)["group_reward"][::4], torch.tensor([2.0, 4.0, 3.2]))


REWARDS = [1.0, None, 3.0, None, 4.0, 4.0, 4.0, None, None, None, None, None]


def test_adaptive_entropy_moves_its_coefficient(tmp_path):
    trainer = grpo_trainer(
        tmp_path, **POLICY, use_adaptive_entropy=True, entropy_target=100.0, entropy_coef_delta=0.25
    )
    trainer.train()
    assert [log["entropy_coef"] for log in trainer.state.log_history if "entropy_coef" in log] == [0.25, 0.5]


@pytest.mark.parametrize("name", ["rollout_func", "tools", "environment_factory"])
def test_other_ways_to_draw_candidates_are_refused(tmp_path, name):
    trainer = grpo_trainer(tmp_path)
    with pytest.raises(ValueError, match=name):
        type(trainer)(
            trainer.model,
            trainer.args,
            trainer.catalog,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
            **{name: [first_code]},
        )


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


def test_candidates_are_drawn_at_the_temperature(tmp_path):
    trainer = grpo_trainer(tmp_path, **POLICY, temperature=1e-3)
    prompts = [text for text in trainer.train_dataset["prompt"] for _ in range(4)]
    items = trainer.draw_candidates(prompts, trainer)["items"]
    assert all(len(set(items[start : start + 4])) == 1 for start in range(0, 16, 4))


def test_candidates_are_scored_at_the_temperature(tmp_path):
    """Also by the policy that drew them, which `num_iterations` asks for."""
    trainer = grpo_trainer(tmp_path, **POLICY, temperature=0.4, num_iterations=2)
    inputs = drawn_batch(trainer)
    log_probs, entropies = token_scores(trainer, inputs)
    torch.testing.assert_close(inputs["old_per_token_logps"], log_probs, atol=1e-5, rtol=1e-4)
    trainer.compute_loss(trainer.model, inputs)
    assert trainer._metrics["train"]["entropy"][-1] == pytest.approx(entropies.mean().item(), rel=1e-4)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] == 0


def test_the_reference_scores_at_the_temperature(tmp_path):
    trainer = grpo_trainer(tmp_path, **{**POLICY, "beta": 0.1}, temperature=0.4)
    inputs = drawn_batch(trainer)
    log_probs, _ = token_scores(trainer, inputs)  # the reference is the model that training starts from
    torch.testing.assert_close(inputs["ref_per_token_logps"], log_probs, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation


def assert_same_step(one, two):
    """A step of one batch, and the same step accumulated over two halves of it."""
    for trainer in (one, two):
        trainer.train()
    logs = [trainer.state.log_history[0] for trainer in (one, two)]
    names = {
        "loss", "grad_norm", "align_loss", "policy_loss", "depth_loss", "terminal_loss", "mean_depth", "reward",
        "reward_baseline", "depth_entropy", "latent_norm_ratio",
    } & set(logs[0])  # fmt: skip
    assert {name: logs[1][name] for name in names} == pytest.approx({name: logs[0][name] for name in names}, rel=1e-3)
    expected = parameters(one.model)
    for name, parameter in two.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5, msg=name)


SGD = dict(optim="sgd", learning_rate=1.0, max_grad_norm=1e9, max_steps=1)


def test_sft_accumulates_to_the_step_of_the_whole_batch(tmp_path):
    options = dict(**SGD, policy_weight=0.5, alignment_weight=0.5, train_sampling_strategy="sequential")
    one = sft_trainer(tmp_path, **options, per_device_train_batch_size=6)
    two = sft_trainer(tmp_path, **options, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert_same_step(one, two)


def test_grpo_accumulates_to_the_step_of_the_whole_batch(tmp_path):
    options = dict(
        **SGD,
        reward_funcs=[first_code],
        depth_weight=0.5,
        terminal_weight=0.5,
        shuffle_dataset=False,
        fixed_draws=True,
    )
    one = grpo_trainer(tmp_path, **options, per_device_train_batch_size=16)
    two = grpo_trainer(tmp_path, **options, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert_same_step(one, two)
    losses = []
    for trainer in (one, two):  # an evaluation does not accumulate
        trainer.args.per_device_eval_batch_size = 16
        torch.manual_seed(0)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The reward baseline


def scripted(values):
    """A reward that is the next of some values for all candidates of a batch."""
    values = iter(values)
    return lambda completion_ids, **kwargs: [next(values)] * len(completion_ids)


def test_the_baseline_is_a_running_mean_of_the_rewards(tmp_path):
    options = {**POLICY, "reward_funcs": [scripted([1.0, 0.0, 0.5])], "baseline_decay": 0.9, "max_steps": 3}
    trainer = grpo_trainer(tmp_path, **options)
    trainer.train()
    logs = [log["reward_baseline"] for log in trainer.state.log_history if "reward_baseline" in log]
    assert logs == pytest.approx([1.0, 1.0, 0.9])  # it starts as the first mean
    assert trainer.reward_baseline == pytest.approx(0.9 * 0.9 + 0.1 * 0.5)


def test_evaluation_reads_the_baseline_only(tmp_path):
    options = {**POLICY, "reward_funcs": [scripted([1.0, 0.0, 0.0])], "depth_weight": 0.1, "max_steps": 1}
    trainer = grpo_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_reward_baseline"] == 1
    assert trainer.reward_baseline == 1


def test_the_depth_policy_is_rewarded_above_the_baseline(tmp_path):
    """Rewards equal to the baseline leave the cost of the steps only, rewards above it outweigh the cost."""
    losses = {}
    for reward in (1.0, 2.0):
        trainer = grpo_trainer(
            tmp_path, **{**POLICY, "reward_funcs": [scripted([reward])], "depth_weight": 1.0}, depth_entropy_weight=0.0
        )
        trainer.reward_baseline = 1.0
        trainer.compute_loss(trainer.model, drawn_batch(trainer))
        losses[reward] = trainer._metrics["train"]["depth_loss"][-1]
    assert losses[1.0] < 0  # -(0 - cost) log π
    assert losses[2.0] > 1
