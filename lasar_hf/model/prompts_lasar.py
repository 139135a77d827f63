"""What a prompt of the recommender must be."""

from collections.abc import Callable
from functools import partial

import torch

from .base_lasar import most_likely_depth
from .batching_lasar import BatchLayout
from .configuration_lasar import LATENT_START_TOKEN, LasarConfig


def checked_prompts(
    config: LasarConfig,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    latent_steps: int | torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[BatchLayout, torch.Tensor | Callable[[torch.Tensor], torch.Tensor]]:
    """
    The layout of prompts, and their depths `(B,)` or the function that chooses them. Arguments and errors as for
    [`~LasarForGenerativeRec.recommend`].
    """
    # 1. Every prompt must be tokens of the vocabulary without a gap, and end in its only control token.
    layout = BatchLayout(input_ids, attention_mask, config, name="Prompt")
    valid = layout.valid
    last_token = input_ids.gather(1, layout.last_prompt_column())[:, 0]  # (B,)
    unfinished = (last_token != config.latent_start_token_id) | (layout.length != layout.prompt_length)
    control = valid & ((input_ids == config.latent_start_token_id) | (input_ids == config.latent_end_token_id))
    parts = valid[:, 0] + (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1)  # (B,), runs of tokens without padding
    problems = {
        f"does not end in {LATENT_START_TOKEN}. Append it to the prompt.": unfinished | (layout.length == 0),
        f"has {LATENT_START_TOKEN} or <|latent_end|> before its end. Remove it.": control.sum(dim=1) > 1,
        "has an attention_mask with a hole. Pad at the sides only.": parts > 1,
    }
    is_wrong = torch.stack(list(problems.values()))  # (problems, B)
    if is_wrong.any():
        problem, index = is_wrong.nonzero()[0].tolist()
        raise ValueError(f"Prompt {index} {list(problems)[problem]}")
    # 2. Prompt, latent steps, <|latent_end|> and Semantic ID must fit into the backbone's positions.
    if latent_steps is None:
        latent_steps = partial(most_likely_depth, min_latent_steps=config.min_latent_steps)
    if callable(latent_steps):
        max_steps = config.max_latent_steps
    else:
        max_steps = latent_steps = _checked_depths(config, latent_steps, len(input_ids), input_ids.device)
    length = layout.length + max_steps + 1 + config.num_sid_levels  # (B,)
    limit = getattr(config.backbone_config, "max_position_embeddings", None)  # some backbones have no limit
    if limit is not None and (length > limit).any():
        index = int((length > limit).nonzero()[0])
        raise ValueError(
            f"Prompt {index} needs {int(length[index])} positions for prompt, latent steps and answer, but the "
            f"backbone has max_position_embeddings={limit}. Use fewer history items."
        )
    return layout, latent_steps


def _checked_depths(
    config: LasarConfig, latent_steps: int | torch.Tensor, batch_size: int, device: torch.device
) -> torch.Tensor:
    latent_steps = torch.as_tensor(latent_steps, device=device)
    is_integer = not latent_steps.is_floating_point() and latent_steps.dtype != torch.bool
    if not is_integer or latent_steps.shape not in ((), (batch_size,)):
        raise ValueError(
            f"latent_steps has type {latent_steps.dtype} and shape {tuple(latent_steps.shape)}; expected an "
            f"integer, or one for each of the {batch_size} prompts."
        )
    latent_steps = latent_steps.expand(batch_size)
    outside = (latent_steps < 0) | (latent_steps > config.max_latent_steps)
    if outside.any():
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"latent_steps is {int(latent_steps[index])} for prompt {index}; expected 0 … {config.max_latent_steps}."
        )
    return latent_steps
