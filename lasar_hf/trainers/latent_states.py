"""What both trainers share: the latent states of the pass that made the loss, and what is logged of them."""

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..model.base_lasar import LasarModel, LasarModelOutput
from .losses import depth_entropy


def unwrap_lasar(model: nn.Module) -> nn.Module:
    """The [`LasarForGenerativeRec`] inside wrappers of PEFT."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class LatentStateRecorder:
    """
    Keeps the output of the last pass through the trunk, so that extra losses read the latent states of that same pass.

    Args:
        trunk ([`LasarModel`]):
            The trunk.
    """

    def __init__(self, trunk: LasarModel):
        self.output: LasarModelOutput | None = None
        self.handle: RemovableHandle = trunk.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: tuple, output: LasarModelOutput) -> None:
        self.output = output

    def pop(self) -> LasarModelOutput:
        """The last output; forgotten afterwards, so that its graph is freed."""
        output, self.output = self.output, None
        return output


def last_latent(output: LasarModelOutput) -> torch.Tensor:
    """`h_N` of each row, `(B, H)`."""
    place = output.latent_steps[:, None, None].expand(-1, 1, output.latent_states.shape[-1])
    return output.latent_states.gather(1, place)[:, 0]


@torch.no_grad()
def latent_metrics(output: LasarModelOutput, embedding: nn.Embedding) -> dict[str, torch.Tensor]:
    """
    What to watch in latent reasoning.

    Args:
        output ([`LasarModelOutput`]):
            A pass through the trunk.
        embedding (`nn.Embedding`):
            The backbone's embedding matrix.

    Returns:
        `dict[str, torch.Tensor]`: scalars `mean_depth` (steps), `depth_entropy` (nats) and `latent_norm_ratio`, the
        mean norm of the inputs of the latent slots over that of the embeddings, whose growth is the known failure of
        latent loops.
    """
    steps = output.latent_steps
    metrics = {"mean_depth": steps.float().mean(), "depth_entropy": depth_entropy(output.depth_logits).mean()}
    inputs = output.latent_states[:, :-1]
    is_input = torch.arange(inputs.shape[1], device=steps.device) < steps[:, None]
    if is_input.any():
        sample = embedding.weight[:1024].float().norm(dim=-1).mean()
        metrics["latent_norm_ratio"] = inputs[is_input].float().norm(dim=-1).mean() / sample
    return metrics
