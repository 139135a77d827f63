"""A batch of mixed depths and paddings, and a functional of everything a forward returns, for equivalence tests."""

from tests.tiny import row, sid_ids


DEPTHS = [0, 3, 1, 4, 3]
SIDES = ["left", "right", "left", "right", "right"]


def mixed_rows(model):
    """Five sequences of different lengths, depths `DEPTHS`, and answers of zero to three codes."""
    answers = [sid_ids(model, codes) for codes in ([0, 1, 2], [3, 3, 0], [1, 0, 0], [2, 2], [1])]
    lengths = [6, 4, 9, 5, 7]
    return [row(model, p, n, a, seed=i) for i, (p, n, a) in enumerate(zip(lengths, DEPTHS, answers, strict=True))]


def gradients(model, loss):
    """Gradient of each parameter that gets one."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def functional(logits, latent_states):
    """A smooth functional of everything, so that every gradient path counts."""
    return logits.double().log_softmax(-1)[..., 0].sum() + latent_states.double().pow(2).sum()
