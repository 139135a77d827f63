"""Losses and rewards against their equations, written out."""

import math
import sys

import pytest
import torch

from lasar_hf.trainers import (
    ExactMatchReward,
    RankingReward,
    alignment_loss,
    bidirectional_kl,
    depth_entropy,
    exact_depth_loss,
    load_rewards,
    reinforce_loss,
)
from tests.tiny import sid_ids, tiny_catalog, tiny_model


def test_bidirectional_kl_is_the_mean_of_both_divergences():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    p, q = a.softmax(-1), b.softmax(-1)
    expected = 0.5 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(bidirectional_kl(a, b), expected)


def test_bidirectional_kl_of_equal_distributions_is_zero():
    a = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bidirectional_kl(a, a + 3), torch.zeros(3), atol=1e-6, rtol=0)  # softmax ignores the 3


@pytest.mark.parametrize("distance", ["kl", "cosine", "mse"])
def test_alignment_averages_over_steps_then_sequences(distance):
    torch.manual_seed(0)
    latents, anchors = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    loss = alignment_loss(latents, anchors, mask, distance)
    one = torch.ones(1, 1, dtype=torch.bool)
    single = [
        [alignment_loss(latents[i, t].view(1, 1, -1), anchors[i, t].view(1, 1, -1), one, distance) for t in range(n)]
        for i, n in enumerate([2, 4])
    ]
    torch.testing.assert_close(loss, (sum(single[0]) / 2 + sum(single[1]) / 4) / 2)


def test_alignment_has_gradients_for_existing_steps_only():
    torch.manual_seed(0)
    latents, anchors = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    alignment_loss(latents, anchors, mask).backward()
    assert anchors.grad is None
    assert torch.equal(latents.grad.any(dim=-1), mask)


def test_reinforce_loss_is_its_equation():
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = reinforce_loss(logits, torch.tensor([3, 1]), torch.tensor([1.0, 0.5]), 0.25, 0.1, 0.5)
    policy = logits.softmax(-1)
    entropy = -(policy * policy.log()).sum(-1).mean()
    expected = -((1 - 0.25 - 0.3) * policy[0, 2].log() + (0.5 - 0.25 - 0.1) * policy[1, 0].log()) / 2 - 0.5 * entropy
    torch.testing.assert_close(loss, expected)


def test_reinforce_with_depths_of_another_policy_is_unbiased():
    """Weighted by the ratio, the gradient expected under the drawing policy is the one expected under π."""
    torch.manual_seed(0)
    logits, drawn = torch.randn(1, 4, requires_grad=True), torch.randn(4).log_softmax(-1)
    depths, rewards = torch.arange(1, 5), torch.rand(4)
    rows = [reinforce_loss(logits, depths[i : i + 1], rewards[i : i + 1], 0.2, 0.1, 0.0, drawn[i]) for i in range(4)]
    (got,) = torch.autograd.grad((drawn.exp() * torch.stack(rows)).sum(), logits)
    value = (logits.softmax(-1)[0] * (rewards - 0.2 - 0.1 * depths)).sum()
    (expected,) = torch.autograd.grad(-value, logits)
    torch.testing.assert_close(got, expected)


def test_exact_depth_gradient_is_the_gradient_of_the_expected_value():
    torch.manual_seed(0)
    logits, rewards = torch.randn(4, 5, requires_grad=True), torch.rand(4, 5)
    (got,) = torch.autograd.grad(exact_depth_loss(logits, rewards, 0.05, 0.3), logits)
    value = (logits.softmax(-1) * (rewards - 0.05 * torch.arange(1, 6))).sum(-1).mean()
    (expected,) = torch.autograd.grad(-value - 0.3 * depth_entropy(logits).mean(), logits)
    torch.testing.assert_close(got, expected)


def test_reinforce_is_the_exact_gradient_on_average():
    torch.manual_seed(0)
    logits, rewards = torch.randn(1, 3), torch.tensor([[0.2, 1.0, 0.4]])
    policy, total = logits.softmax(-1)[0], torch.zeros(1, 3)
    for depth in (1, 2, 3):
        leaf = logits.clone().requires_grad_()
        loss = reinforce_loss(leaf, torch.tensor([depth]), rewards[:, depth - 1], 0.3, 0.1, 0.0)
        total += policy[depth - 1] * torch.autograd.grad(loss, leaf)[0]
    leaf = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(exact_depth_loss(leaf, rewards, 0.1, 0.0), leaf)
    torch.testing.assert_close(total, exact)


@pytest.fixture
def groups():
    """Catalogue, configuration, candidates and targets of two groups of three; the first has its target at rank 2."""
    model, _ = tiny_model()
    catalog = tiny_catalog()
    completions = [sid_ids(model, catalog.codes[item]) for item in (4, 7, 2, 9, 1, 3)]
    return catalog, model.config, completions, [7, 7, 7, 0, 0, 0]


def test_exact_match_rewards_the_target(groups):
    catalog, config, completions, target = groups
    assert ExactMatchReward(catalog, config)(completions, target) == [0, 1, 0, 0, 0, 0]


def test_ranking_penalises_by_rank_in_groups_with_the_target(groups):
    catalog, config, completions, target = groups
    weights = [1 / math.log2(rank + 1) for rank in (1, 2, 3)]
    expected = [-weights[0] / sum(weights), 0, -weights[2] / sum(weights), 0, 0, 0]
    assert RankingReward(catalog, config, 3)(completions, target) == pytest.approx(expected)


@pytest.mark.parametrize("index", [-3, 20])
def test_a_target_outside_the_catalogue_is_refused(groups, index):
    catalog, config, completions, _ = groups
    with pytest.raises(ValueError, match=f"target is {index}"):
        ExactMatchReward(catalog, config)(completions[:1], [index])


def test_rewards_load_by_name(groups):
    catalog, config, completions, target = groups
    rewards = load_rewards(["ranking", "exact_match"], catalog, config, 3)
    assert rewards[0](completions, target) == RankingReward(catalog, config, 3)(completions, target)
    assert rewards[1](completions, target) == ExactMatchReward(catalog, config)(completions, target)


def test_a_reward_loads_from_the_current_directory(groups, tmp_path, monkeypatch):
    (tmp_path / "shop_rewards.py").write_text("def short(completion_ids, target, **kwargs):\n    return [0.5]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # restored afterwards
    (reward,) = load_rewards(["shop_rewards.short"], *groups[:2], 3)
    assert reward([[1]], [0]) == [0.5]


@pytest.mark.parametrize("name", ["exact", "no_such_module.reward", "math.no_such_reward"])
def test_an_unknown_reward_is_named(groups, name):
    with pytest.raises(ValueError, match=f"reward '{name}'"):
        load_rewards([name], *groups[:2], 3)


def test_alignment_refuses_anchors_of_another_depth():
    latents, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="anchors"):
        alignment_loss(latents, torch.randn(2, 1, 4), mask)


def test_depth_zero_can_be_the_first_class():
    """The same policy, one step lower, at the same cost per step."""
    torch.manual_seed(0)
    logits, rewards, depths = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 2])
    own = rewards.gather(1, depths[:, None])[:, 0]
    low = reinforce_loss(logits, depths, own, 0.1, 0.2, 0.05, min_latent_steps=0)
    high = reinforce_loss(logits, depths + 1, own + 0.2, 0.1, 0.2, 0.05)
    torch.testing.assert_close(low, high)
    low = exact_depth_loss(logits, rewards, 0.2, 0.05, min_latent_steps=0)
    torch.testing.assert_close(low, exact_depth_loss(logits, rewards, 0.2, 0.05))
