"""Embeddings and head weights of the tokens that a backbone gets. Not in the paper."""

import math

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def add_embeddings(language_model: PreTrainedModel, num_old: int, num_tokens: int) -> None:
    """
    Add embeddings and head weights of new tokens, drawn with the mean and the deviation of the old ones. If the
    backbone has learnt text, the new rows of the head are quiet.
    """
    if num_tokens > language_model.get_input_embeddings().weight.shape[0]:
        language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    states, entropy = _states_of_own_text(language_model, num_old)
    has_learnt_text = entropy < 0.8 * math.log(num_old)  # random weights write all tokens alike
    head = language_model.get_output_embeddings().weight
    modules = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    weights = {module.weight.data_ptr(): module.weight for module in modules}  # one entry if they are tied
    for pointer, weight in weights.items():
        old = weight[:num_old].float()
        noise = torch.randn(num_tokens - num_old, old.shape[1], device=old.device) * old.std(dim=0)
        is_quiet = has_learnt_text and pointer == head.data_ptr()
        new = _quiet_rows(old, noise, states) if is_quiet else old.mean(dim=0) + noise
        weight[num_old:num_tokens] = new.to(weight.dtype)


def _states_of_own_text(language_model: PreTrainedModel, num_old: int) -> tuple[torch.Tensor, float]:
    """Last hidden states `(T, H)` of text that the model writes itself, and the mean entropy of its next token."""
    head = language_model.get_output_embeddings().weight[:num_old].float()  # (V, H)
    # Draws of their own, so that those of the rows depend on the seed alone.
    generator = torch.Generator(head.device).manual_seed(0)
    token_ids = torch.randint(num_old, (64, 1), device=head.device, generator=generator)
    cache, states, entropies = None, [], []
    was_training = language_model.training
    language_model.eval()
    for _ in range(8):
        output = language_model.base_model(input_ids=token_ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        states.append(output.last_hidden_state[:, -1].to(head))  # (64, H)
        distribution = torch.distributions.Categorical(logits=states[-1] @ head.T)  # (64, V)
        entropies.append(distribution.entropy().mean())
        token_ids = torch.multinomial(distribution.probs, 1, generator=generator)
    language_model.train(was_training)
    return torch.cat(states), float(torch.stack(entropies).mean())


def _quiet_rows(old: torch.Tensor, noise: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """
    Head weights `(N, H)` of new tokens that are nearly uniform among themselves, and together have a probability of
    about 1e-5 in text.

    Args:
        old (`torch.Tensor` of shape `(V, H)`):
            Head weights of the old tokens.
        noise (`torch.Tensor` of shape `(N, H)`):
            What makes the new rows differ, before it is scaled.
        states (`torch.Tensor` of shape `(T, H)`):
            Last hidden states of text.
    """
    # 1. Scale the noise: logits of new tokens differ by 0.25, which costs 0.03 nats against the uniform distribution.
    spread = (states @ noise.T).std()
    new = old.mean(dim=0) + noise * (0.25 / spread).clamp(max=1)  # (N, H)
    # 2. Move all rows by one vector, found by ridge regression of what the log-probability of all new tokens has above
    # that of 1e-5. Only states where it is too high count, so repeating it reaches the last of them.
    moment = states.T @ states  # (H, H)
    moment.diagonal().add_(0.1 * moment.diagonal().mean())
    limit = (states @ old.T).logsumexp(dim=1) + math.log(1e-5)  # (T,)
    for _ in range(10):
        excess = ((states @ new.T).logsumexp(dim=1) - limit).clamp(min=0)  # (T,)
        new = new - torch.linalg.solve(moment, states.T @ excess)
    return new
