"""Loss functions against their equations, written out."""

import math

import pytest
import torch

from lasar_hf.trainers import (
    ExactMatchReward,
    RankingReward,
    alignment_loss,
    bidirectional_kl,
    depth_entropy,
    exact_depth_loss,
    reinforce_loss,
)
from tests.tiny import sid_ids, tiny_catalog, tiny_model


def test_bidirectional_kl_is_the_mean_of_both_divergences():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    p, q = a.softmax(-1), b.softmax(-1)
    expected = 0.5 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(bidirectional_kl(a, b), expected)
    torch.testing.assert_close(bidirectional_kl(a, a + 3), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("distance", ["kl", "cosine", "mse"])
def test_alignment_averages_over_steps_then_rows(distance):
    torch.manual_seed(0)
    latents, anchors = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    loss = alignment_loss(latents, anchors, mask, distance)
    one = torch.ones(1, 1, dtype=torch.bool)
    single = [
        [alignment_loss(latents[i, t].view(1, 1, -1), anchors[i, t].view(1, 1, -1), one, distance) for t in range(n)]
        for i, n in enumerate([2, 4])
    ]
    torch.testing.assert_close(loss, (sum(single[0]) / 2 + sum(single[1]) / 4) / 2)
    loss.backward()
    assert anchors.grad is None and not latents.grad[2].any() and not latents.grad[0, 2:].any()


def test_reinforce_loss():
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = reinforce_loss(logits, torch.tensor([3, 1]), torch.tensor([1.0, 0.5]), 0.25, 0.1, 0.5)
    policy = logits.softmax(-1)
    entropy = -(policy * policy.log()).sum(-1).mean()
    expected = -((1 - 0.25 - 0.3) * policy[0, 2].log() + (0.5 - 0.25 - 0.1) * policy[1, 0].log()) / 2 - 0.5 * entropy
    torch.testing.assert_close(loss, expected)


def test_reinforce_with_depths_of_another_policy_is_unbiased():
    """Weighed by the ratio, the gradient expected under the drawing policy is the one expected under π."""
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


def test_rewards():
    model, _ = tiny_model()
    catalog = tiny_catalog()
    items = [4, 7, 2, 9, 1, 3]  # two groups of three; the first holds its target at rank 2
    completions = [sid_ids(model, catalog.codes[item]) for item in items]
    target = [7, 7, 7, 0, 0, 0]
    assert ExactMatchReward(catalog, model.config)(completions, target) == [0, 1, 0, 0, 0, 0]
    weights = [1 / math.log2(rank + 1) for rank in (1, 2, 3)]
    expected = [-weights[0] / sum(weights), 0, -weights[2] / sum(weights), 0, 0, 0]
    assert RankingReward(catalog, model.config, 3)(completions, target) == pytest.approx(expected)


def test_alignment_refuses_anchors_of_another_depth():
    latents, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="its own anchor"):
        alignment_loss(latents, torch.randn(2, 1, 4), mask)


def test_rewards_refuse_a_target_outside_the_catalogue():
    model, _ = tiny_model()
    catalog = tiny_catalog()
    with pytest.raises(ValueError, match="target is -3"):
        ExactMatchReward(catalog, model.config)([sid_ids(model, catalog.codes[0])], [-3])
