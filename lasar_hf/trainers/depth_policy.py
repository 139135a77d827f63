"""The probability of targets at every depth, and a depth policy fitted to it (not in the paper)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from trl.trainer.utils import pad

from ..model.base_lasar import DepthPolicyHead
from ..model.catalog_lasar import SidCatalog
from ..model.modeling_lasar import LasarForGenerativeRec
from .catalog_head import score_labels
from .losses import exact_depth_loss


@dataclass(frozen=True)
class DepthScores:
    """What a model says about the targets of `U` prompts at `D` depths."""

    start_states: torch.Tensor  # (U, H), h_0
    log_probs: torch.Tensor  # (U, D), log p(target | depth)


def score_depths(
    model: LasarForGenerativeRec,
    catalog: SidCatalog,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[int],
    depths: Sequence[int],
    temperature: float = 1.0,
    batch_size: int = 32,
) -> DepthScores:
    """
    `log p(target | depth)` of every prompt at several depths, from one chain of latent steps per prompt.

    Args:
        model ([`LasarForGenerativeRec`]), catalog ([`SidCatalog`]):
            The model, and its items.
        prompts (`list[list[int]]` of length `U`):
            Token ids that end in `<|latent_start|>`, as of [`LasarProcessor.prompt_ids`].
        targets (`list[int]` of length `U`):
            Item index of each prompt's target.
        depths (`Sequence[int]`):
            Numbers of latent steps.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that the logits are divided by.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per pass.

    Returns:
        [`DepthScores`], in the order of the prompts.

    Example:

    ```python
    >>> prompts = [processor.prompt_ids(history) for history in samples["history"]]
    >>> score_depths(model, processor.catalog, prompts, samples["target"], depths=range(9)).log_probs.shape
    torch.Size([500, 9])
    ```
    """
    config, trie, device = model.config, catalog.trie(model.device), model.device
    first_ids = config.sid_token_id(0, 0) + config.codebook_size * torch.arange(config.num_sid_levels)  # (M,)
    answers = (catalog.codes[torch.as_tensor(targets)] + first_ids).tolist()  # U × M
    states, log_probs = [], []
    with model.evaluation_mode():
        for start in range(0, len(answers), batch_size):
            # 1. Each prompt at every depth, left-padded: the answers end in the last column.
            batch = slice(start, start + batch_size)
            rows = [
                torch.tensor([*prompt, *[config.latent_token_id] * depth, config.latent_end_token_id, *answer])
                for prompt, answer in zip(prompts[batch], answers[batch], strict=True)
                for depth in depths
            ]  # B · D
            ids = pad(rows, padding_side="left").to(device)  # (B · D, L)
            mask = pad([torch.ones_like(row) for row in rows], padding_side="left").to(device)  # (B · D, L)
            labels = ids.clone()
            labels[:, : -config.num_sid_levels] = -100
            # 2. Score the answers.
            output = model.model(ids, mask)
            scored = score_labels(model, output.last_hidden_state, ids, labels, trie, temperature)
            log_probs.append(scored.log_probs.sum(dim=1).view(-1, len(depths)))
            states.append(output.latent_states[:: len(depths), 0])
    return DepthScores(torch.cat(states), torch.cat(log_probs))


def fit_depth_policy(
    head: DepthPolicyHead,
    start_states: torch.Tensor,
    rewards: np.ndarray,
    step_cost: float,
    min_latent_steps: int = 1,
    max_steps: int = 300,
    learning_rate: float = 3e-3,
    seed: int = 0,
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
