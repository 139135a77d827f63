"""The losses of LASAR, tensors in and tensors out, one equation of METHOD.md a function."""

import torch
from torch import nn


def bidirectional_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    Symmetric divergence of two hidden states, each read as a distribution over its dimensions (METHOD.md 4):

        KL_bi(a, b) = ½ [ KL(softmax(a) ‖ softmax(b)) + KL(softmax(b) ‖ softmax(a)) ]

    Args:
        a (`torch.Tensor` of shape `(..., H)`):
            Hidden states.
        b (`torch.Tensor` of shape `(..., H)`):
            Hidden states to compare with.

    Returns:
        `torch.Tensor` of shape `(...)`: divergences in nats, float32, never negative.
    """
    log_p, log_q = a.float().log_softmax(dim=-1), b.float().log_softmax(dim=-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def _cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 1 - nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def _mean_squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b.float()).pow(2).mean(dim=-1)


DISTANCES = {"kl": bidirectional_kl, "cosine": _cosine_distance, "mse": _mean_squared_error}


def alignment_loss(
    latents: torch.Tensor, anchors: torch.Tensor, mask: torch.Tensor, distance: str = "kl"
) -> torch.Tensor:
    """
    Alignment of the latent states with their semantic anchors (METHOD.md 4), averaged over the rows:

        L_align = 1/N Σ_{t=1..N} KL_bi(h_t, h_t^cot)

    Args:
        latents (`torch.Tensor` of shape `(B, T, H)`):
            `h_1 … h_N` of each row.
        anchors (`torch.Tensor` of shape `(B, T, H)`):
            `h_1^cot … h_N^cot`; no gradient flows into them.
        mask (`torch.Tensor` of shape `(B, T)`):
            Which steps exist.
        distance (`str`, *optional*, defaults to `"kl"`):
            `"kl"`, or the paper's ablations `"cosine"` and `"mse"`.

    Returns:
        `torch.Tensor`: scalar mean over the rows that have a step; 0 if none has.
    """
    if latents.shape != anchors.shape:
        raise ValueError(
            f"latents has shape {tuple(latents.shape)} but anchors has {tuple(anchors.shape)}: each latent step needs "
            "its own anchor."
        )
    steps = DISTANCES[distance](latents, anchors.detach()).masked_fill(~mask, 0)
    rows = steps.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return rows.sum() / mask.any(dim=1).sum().clamp(min=1)


def depth_entropy(depth_logits: torch.Tensor) -> torch.Tensor:
    """
    Entropy of the depth policy.

    Args:
        depth_logits (`torch.Tensor` of shape `(B, N_max)`):
            Logits of the policy head.

    Returns:
        `torch.Tensor` of shape `(B,)`: entropies in nats, float32.
    """
    log_policy = depth_logits.float().log_softmax(dim=-1)
    return -(log_policy.exp() * log_policy).sum(dim=-1)


def reinforce_loss(
    depth_logits: torch.Tensor,
    depths: torch.Tensor,
    rewards: torch.Tensor,
    baseline: float | torch.Tensor,
    step_cost: float,
    entropy_weight: float,
    drawn_log_probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    REINFORCE on the depth policy (METHOD.md 5):

        L_RF = −E_{N~π}[ (R_group − b_EMA − λ N) · log π(N | h_0) ] − η · H(π)

    Depths that are used for several updates come from an earlier policy; the ratio of the two then weighs each row.

    Args:
        depth_logits (`torch.Tensor` of shape `(B, N_max)`):
            Logits of the policy head; class `k` means `k + 1` steps.
        depths (`torch.Tensor` of shape `(B,)`):
            Sampled depths `N`, from 1.
        rewards (`torch.Tensor` of shape `(B,)`):
            Mean reward of each row's group, `R_group`.
        baseline (`float` or `torch.Tensor` of shape `(B,)`):
            Running mean of the group rewards, `b_EMA`.
        step_cost (`float`):
            Cost of a step, `λ`.
        entropy_weight (`float`):
            Weight of the entropy bonus, `η`.
        drawn_log_probs (`torch.Tensor` of shape `(B,)`, *optional*):
            `log π(N | h_0)` of the policy that the depths were drawn from; the present one if not given.

    Returns:
        `torch.Tensor`: scalar mean over the rows.
    """
    log_policy = depth_logits.float().log_softmax(dim=-1)
    chosen = log_policy.gather(1, depths[:, None] - 1)[:, 0]
    advantages = (rewards - baseline - step_cost * depths).detach()
    if drawn_log_probs is not None:
        advantages = advantages * (chosen.detach() - drawn_log_probs).exp()
    return -(advantages * chosen).mean() - entropy_weight * depth_entropy(depth_logits).mean()


def exact_depth_loss(
    depth_logits: torch.Tensor, rewards: torch.Tensor, step_cost: float, entropy_weight: float
) -> torch.Tensor:
    """
    Depth gradient without sampling, when every depth of a prompt was scored (METHOD.md 5, beyond the paper):

        A_N = (R_N − λN) − Σ_{N'} π(N') (R_{N'} − λN'),   L_depth = −Σ_N π(N).detach() · A_N · log π(N | h_0) − η H(π)

    Args:
        depth_logits (`torch.Tensor` of shape `(B, N_max)`):
            Logits of the policy head; class `k` means `k + 1` steps.
        rewards (`torch.Tensor` of shape `(B, N_max)`):
            Reward of each depth, `R_1 … R_{N_max}`.
        step_cost (`float`):
            Cost of a step, `λ`.
        entropy_weight (`float`):
            Weight of the entropy bonus, `η`.

    Returns:
        `torch.Tensor`: scalar mean over the rows.
    """
    log_policy = depth_logits.float().log_softmax(dim=-1)
    policy = log_policy.exp().detach()
    steps = torch.arange(1, depth_logits.shape[1] + 1, device=depth_logits.device)
    values = rewards - step_cost * steps
    advantages = (values - (policy * values).sum(dim=-1, keepdim=True)).detach()
    return -(policy * advantages * log_policy).sum(dim=-1).mean() - entropy_weight * depth_entropy(depth_logits).mean()
