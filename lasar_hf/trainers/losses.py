"""The losses of LASAR (arXiv 2605.10207): tensors in, tensors out, one equation per function."""

import torch
from torch import nn


def bidirectional_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    Symmetric KL divergence of two hidden states, each read as a distribution over its `H` dimensions:

        KL_bi(a, b) = ½ [ KL(softmax(a) ‖ softmax(b)) + KL(softmax(b) ‖ softmax(a)) ]

    LASAR, arXiv 2605.10207, stage 2 (SFT). The paper prefers it to cosine distance and mean squared error.

    Args:
        a, b (`torch.Tensor` of shape `(..., H)`):
            Hidden states to compare.

    Returns:
        `torch.Tensor` of shape `(...)`: divergences in nats, float32, never negative.

    Example:

    ```python
    >>> bidirectional_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0]))
    tensor(0.2215)
    ```
    """
    log_p = a.float().log_softmax(dim=-1)  # (..., H)
    log_q = b.float().log_softmax(dim=-1)  # (..., H)
    # Both divergences in one sum: p (log p − log q) + q (log q − log p) = (p − q) (log p − log q).
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`1 − cos(a, b)`; arguments as for [`bidirectional_kl`]."""
    return 1 - nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def mean_squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the dimensions; arguments as for [`bidirectional_kl`]."""
    return (a.float() - b.float()).pow(2).mean(dim=-1)


# The choices of `alignment` in both configurations. A new distance is one entry here.
DISTANCES = {"kl": bidirectional_kl, "cosine": cosine_distance, "mse": mean_squared_error}


def alignment_loss(
    latents: torch.Tensor, anchors: torch.Tensor, mask: torch.Tensor, distance: str = "kl"
) -> torch.Tensor:
    """
    Alignment of the latent states with their semantic anchors, averaged over the sequences:

        L_align = 1/N Σ_{t=1..N} KL_bi(h_t, h_t^cot)

    LASAR, arXiv 2605.10207, stage 2 (SFT). Refuses `latents` and `anchors` of different shapes.

    Args:
        latents, anchors (`torch.Tensor` of shape `(B, T, H)`):
            `h_1 … h_N` and `h_1^cot … h_N^cot` of each sequence; no gradient flows into the anchors.
        mask (`torch.Tensor` of shape `(B, T)`):
            Which steps exist.
        distance (`str`, *optional*, defaults to `"kl"`):
            Key of `DISTANCES`: `"kl"`, or `"cosine"` and `"mse"` of the paper's ablation.

    Returns:
        `torch.Tensor`: scalar mean over the sequences that have a step; 0 without such a sequence.
    """
    if latents.shape != anchors.shape:
        raise ValueError(
            f"anchors has shape {tuple(anchors.shape)}; expected {tuple(latents.shape)} as latents, one anchor per "
            "latent step."
        )
    distances = DISTANCES[distance](latents, anchors.detach()).masked_fill(~mask, 0)  # (B, T)
    # Mean over the steps of a sequence first, then over the sequences: long chains do not weigh more.
    per_sequence = distances.sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (B,)
    return per_sequence.sum() / mask.any(dim=1).sum().clamp(min=1)


def depth_entropy(depth_logits: torch.Tensor) -> torch.Tensor:
    """Entropy `(B,)` of the depth policy in nats, given the logits `(B, C)` of the policy head."""
    log_policy = depth_logits.float().log_softmax(dim=-1)  # (B, C)
    return -(log_policy.exp() * log_policy).sum(dim=-1)


def reinforce_loss(
    depth_logits: torch.Tensor,
    depths: torch.Tensor,
    rewards: torch.Tensor,
    baseline: float | torch.Tensor,
    step_cost: float,
    entropy_weight: float,
    drawn_log_probs: torch.Tensor | None = None,
    min_latent_steps: int = 1,
) -> torch.Tensor:
    """
    REINFORCE on the depth policy:

        L_RF = −E_{N~π}[ (R_group − b_EMA − λ N) · log π(N | h_0) ] − η · H(π)

    LASAR, arXiv 2605.10207, RL stage. When drawn depths serve several updates, each sequence is weighted by the ratio
    of the present policy to the one that drew its depth.

    Args:
        depth_logits, depths (`torch.Tensor` of shape `(B, C)` and `(B,)`):
            Logits of the policy head, whose class `k` means `k + min_latent_steps` steps, and the sampled depths `N`.
        rewards, baseline (`torch.Tensor` of shape `(B,)`):
            Mean reward of each sequence's group, `R_group`, and the running mean `b_EMA`, which may be a `float`.
        step_cost, entropy_weight (`float`):
            Cost of a latent step, `λ`, and weight of the entropy bonus, `η`.
        drawn_log_probs (`torch.Tensor` of shape `(B,)`, *optional*):
            `log π(N | h_0)` when the depths were drawn. Defaults to the present policy's.
        min_latent_steps (`int`, *optional*, defaults to `1`):
            Steps of the first class.

    Returns:
        `torch.Tensor`: scalar mean over the sequences.
    """
    log_policy = depth_logits.float().log_softmax(dim=-1)  # (B, C)
    log_probs = log_policy.gather(1, depths[:, None] - min_latent_steps)[:, 0]  # (B,)
    advantages = (rewards - baseline - step_cost * depths).detach()  # (B,)
    if drawn_log_probs is not None:
        advantages = advantages * (log_probs.detach() - drawn_log_probs).exp()
    return -(advantages * log_probs).mean() - entropy_weight * depth_entropy(depth_logits).mean()


def exact_depth_loss(
    depth_logits: torch.Tensor,
    rewards: torch.Tensor,
    step_cost: float,
    entropy_weight: float,
    min_latent_steps: int = 1,
) -> torch.Tensor:
    """
    Depth gradient without sampling, for prompts of which every depth was scored (not in the paper):

        A_N     = (R_N − λN) − Σ_{N'} π(N') (R_{N'} − λN')
        L_depth = −Σ_N π(N).detach() · A_N · log π(N | h_0) − η · H(π)

    Arguments and result as for [`reinforce_loss`], which this equals in expectation, with `rewards` of shape
    `(B, C)`: the reward of each depth of the policy.
    """
    log_policy = depth_logits.float().log_softmax(dim=-1)  # (B, C)
    policy = log_policy.exp().detach()  # (B, C)
    depths = torch.arange(depth_logits.shape[1], device=depth_logits.device) + min_latent_steps  # (C,)
    values = rewards - step_cost * depths  # (B, C)
    advantages = (values - (policy * values).sum(dim=-1, keepdim=True)).detach()  # (B, C)
    return -(policy * advantages * log_policy).sum(dim=-1).mean() - entropy_weight * depth_entropy(depth_logits).mean()
