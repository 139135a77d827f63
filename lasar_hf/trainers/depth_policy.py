"""A depth policy fitted to held-out users, with a frozen backbone (not in the paper)."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..model.base_lasar import DepthPolicyHead
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from .catalog_head import score_labels
from .losses import exact_depth_loss


@dataclass(frozen=True)
class DepthScores:
    """What a model says about the targets of samples at every depth."""

    start_states: torch.Tensor  # (U, H), h_0
    log_probs: np.ndarray  # (U, N_max + 1), log p(target | depth)


def score_depths(
    model: LasarForGenerativeRec, samples, processor: LasarProcessor, batch_size: int = 32
) -> DepthScores:
    """
    `log p(target | depth)` of every sample at every depth, from one chain of latent steps per sample.

    Args:
        model, processor ([`LasarForGenerativeRec`] and [`LasarProcessor`]):
            The model, and its prompt format and catalogue.
        samples (`Dataset`):
            Table with the columns `history` and `target`.
        batch_size (`int`, *optional*, defaults to `32`):
            Samples per batch.

    Returns:
        [`DepthScores`], in the order of the samples.
    """
    config, trie = model.config, processor.catalog.trie(model.device)
    prompts, answers = map(processor.prompt_ids, samples["history"]), processor.answer_ids(samples["target"])
    pairs, num_depths = list(zip(prompts, answers, strict=True)), config.max_latent_steps + 1
    states, log_probs = [], []
    with model.evaluation_mode():
        for start in range(0, len(pairs), batch_size):
            rows = [
                [*prompt, *[config.latent_token_id] * depth, config.latent_end_token_id, *answer]
                for prompt, answer in pairs[start : start + batch_size]
                for depth in range(num_depths)
            ]  # B · D
            inputs = processor.pad(rows).to(model.device)
            ids = inputs["input_ids"]
            is_answer = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - config.num_sid_levels
            labels = torch.where(is_answer, ids, -100)  # left-padded, so answers end in the last column
            output = model.model(ids, inputs["attention_mask"])
            scored = score_labels(model, output.last_hidden_state, ids, labels, trie)
            log_probs.append(scored.log_probs.sum(dim=1).view(-1, num_depths).cpu().numpy())
            states.append(output.latent_states[::num_depths, 0].float().cpu())
    return DepthScores(torch.cat(states), np.concatenate(log_probs))


def fit_depth_policy(
    head: DepthPolicyHead, start_states: torch.Tensor, rewards: np.ndarray, step_cost: float,
    min_latent_steps: int = 1, max_steps: int = 300, learning_rate: float = 3e-3, seed: int = 0,
) -> DepthPolicyHead:
    """
    A copy of the policy head, fitted by the exact gradient on the rewards of all depths.

    A fifth of the samples stop the training: the head with the best mean reward of its most likely depth on them is
    kept, that before training included.

    Args:
        head ([`DepthPolicyHead`]):
            The head to start from, which is not changed.
        start_states (`torch.Tensor` of shape `(U, H)`):
            `h_0` of the samples.
        rewards (`np.ndarray` of shape `(U, C)`):
            Reward of each depth of the policy, such as `log p(target | depth)`.
        step_cost (`float`):
            Cost of a latent step, in units of reward.
        min_latent_steps (`int`, *optional*, defaults to `1`):
            Steps of the first class.
        max_steps, learning_rate, seed (*optional*, default to `300`, `3e-3` and `0`):
            Updates on all samples at once, their learning rate, and the seed of the split.

    Returns:
        [`DepthPolicyHead`]: the fitted head.
    """
    head = copy.deepcopy(head).float().train().requires_grad_(True)
    order = np.random.default_rng(seed).permutation(len(rewards))
    held_out, fitted = order[: max(len(order) // 5, 1)], order[max(len(order) // 5, 1) :]
    cost = step_cost * (np.arange(rewards.shape[1]) + min_latent_steps)  # (C,)
    values, rewards = rewards - cost, torch.as_tensor(rewards, dtype=torch.float32)
    optimizer = torch.optim.Adam(head.parameters(), learning_rate)
    best, best_state = -np.inf, None
    for step in range(max_steps + 1):
        with torch.no_grad():
            chosen = head(start_states[held_out]).argmax(dim=-1).numpy()
        value = values[held_out, chosen].mean()
        if value > best:
            best, best_state = value, copy.deepcopy(head.state_dict())
        if step == max_steps:
            break
        logits = head(start_states[fitted])  # (F, C)
        loss = exact_depth_loss(logits, rewards[fitted], step_cost, 0.01, min_latent_steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    head.load_state_dict(best_state)
    return head.eval()
