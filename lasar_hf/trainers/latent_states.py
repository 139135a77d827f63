"""What both trainers read of the latent states: those of the pass that made the loss, and what is logged of them."""

import torch
from peft import PeftModel
from torch import nn

from ..model.base_lasar import LasarModel, LasarModelOutput
from .losses import depth_entropy


def unwrap_lasar(model: nn.Module) -> nn.Module:
    """The [`LasarForGenerativeRec`] inside a PEFT wrapper, or the model itself without one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class LatentStateRecorder:
    """
    Keeps the output of the base model's last forward, so that extra losses read the latent states of that same pass.

    Args:
        base_model ([`LasarModel`]):
            The model under the head; a forward hook is added to it.
    """

    def __init__(self, base_model: LasarModel):
        self.output: LasarModelOutput | None = None
        base_model.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: tuple, output: LasarModelOutput) -> None:
        self.output = output

    def pop(self) -> LasarModelOutput:
        """The last output. It is released here, so that its autograd graph can be freed."""
        output, self.output = self.output, None
        return output


@torch.no_grad()
def latent_metrics(output: LasarModelOutput, embedding: nn.Embedding) -> dict[str, torch.Tensor]:
    """
    Metrics of the latent reasoning.

    Args:
        output ([`LasarModelOutput`]):
            Output of the base model.
        embedding (`nn.Embedding`):
            The backbone's input embeddings.

    Returns:
        `dict[str, torch.Tensor]`: scalars `mean_depth` (steps), `depth_entropy` (nats) and `latent_norm_ratio`, the
        norm of the latent slots' inputs relative to the embeddings', which grows when a latent loop diverges.
    """
    steps = output.latent_steps  # (B,)
    metrics = {"mean_depth": steps.float().mean(), "depth_entropy": depth_entropy(output.depth_logits).mean()}
    # The input of slot t is h_{t-1}, for t = 1 … N.
    inputs = output.latent_states[:, :-1]  # (B, max N, H)
    is_input = torch.arange(inputs.shape[1], device=steps.device) < steps[:, None]  # (B, max N)
    if is_input.any():
        embedding_norm = embedding.weight[:1024].float().norm(dim=-1).mean()
        metrics["latent_norm_ratio"] = inputs[is_input].float().norm(dim=-1).mean() / embedding_norm
    return metrics
