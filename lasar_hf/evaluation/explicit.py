"""Explicit chains of thought, the baseline of latent ones: the text is written token by token before the item."""

from collections.abc import Sequence

from ..data.examples import MAX_CHAIN_TOKENS
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor


def write_chains(
    model: LasarForGenerativeRec,
    processor: LasarProcessor,
    prompts: Sequence[Sequence[int]],
    max_text_tokens: int = MAX_CHAIN_TOKENS,
) -> list[list[int]]:
    """
    Write the chain of thought of each prompt greedily, with a model that was trained on
    [`~lasar_hf.data.explicit_examples`].

    Args:
        model, processor ([`LasarForGenerativeRec`] and [`LasarProcessor`]):
            The model, and its prompt format.
        prompts (`list[list[int]]` of length `B`):
            Token ids that end in `<|latent_start|>`, as of [`~LasarProcessor.prompt_ids`].
        max_text_tokens (`int`, *optional*, defaults to 256):
            Maximum number of tokens of a text. It also ends where the positions of the backbone do.

    Returns:
        `list[list[int]]` of length `B`: prompt, text and `<|latent_start|>`. With `latent_steps=0`,
        [`~LasarForGenerativeRec.recommend`] reads them and recommends.

    Raises:
        `ValueError`: if `max_text_tokens` is below 1, or a prompt leaves no position for text.
    """
    config, start_id = model.config, processor.latent_start_token_id
    # 1. Prompt, text, two control tokens and Semantic ID must fit into the backbone's positions.
    limit = getattr(config.backbone_config, "max_position_embeddings", None)  # some backbones have no limit
    room = max_text_tokens
    if limit is not None:
        room = min(room, limit - max(map(len, prompts)) - 1 - config.num_sid_levels)
    if room < 1:
        raise ValueError(
            f"There is room for {room} tokens of text; expected at least 1. Raise max_text_tokens (it is "
            f"{max_text_tokens}), or use fewer history items (max_position_embeddings is {limit})."
        )
    # 2. Write until <|latent_start|>, which ends the text.
    not_text = [processor.latent_token_id, processor.latent_end_token_id, *processor.sid_token_ids.unique().tolist()]
    inputs = processor.pad([prompt[:-1] for prompt in prompts]).to(model.device)
    with model.evaluation_mode():
        written = model.generate(
            **inputs,
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=start_id,
            suppress_tokens=not_text,
            pad_token_id=processor.tokenizer.pad_token_id or 0,
        )
    # 3. Put the text between the prompt and its last token.
    texts = written[:, inputs["input_ids"].shape[1] :].tolist()
    texts = [text[: text.index(start_id)] if start_id in text else text for text in texts]
    return [[*prompt[:-1], *text, start_id] for prompt, text in zip(prompts, texts, strict=True)]
