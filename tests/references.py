"""Reference computations the engine is compared with, and the inputs of those comparisons."""

import torch
from hypothesis import strategies as st

from lasar_hf import SidCatalog
from tests.tiny import batch, row, sid_ids, tiny_catalog, tiny_model


# Five sequences of mixed depth, padded on mixed sides.
DEPTHS = [0, 3, 1, 4, 3]
SIDES = ["left", "right", "left", "right", "right"]


def fold(text):
    """Text in lower case with single spaces."""
    return " ".join(text.split()).casefold()


def mixed_rows(model):
    """Five sequences of different lengths, depths `DEPTHS`, and answers of one to three codes."""
    answers = [sid_ids(model, codes) for codes in ([0, 1, 2], [3, 3, 0], [1, 0, 0], [2, 2], [1])]
    lengths = [6, 4, 9, 5, 7]
    return [row(model, p, n, a, seed=i) for i, (p, n, a) in enumerate(zip(lengths, DEPTHS, answers, strict=True))]


def plain_loop(model, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The specification: one sequence at a time, without cache, growing the embeddings slot after slot.

    Returns the logits `(L, V)` and the latent states `(1 + N, H)`.
    """
    base, config = model.model, model.config
    embeds = base.get_input_embeddings()(torch.tensor([ids]))
    slots = [position for position, token in enumerate(ids) if token == config.latent_token_id]
    first = slots[0] if slots else ids.index(config.latent_start_token_id) + 1
    states = []
    for step in range(len(slots) + 1):
        hidden = base.backbone(inputs_embeds=embeds[:, : first + step]).last_hidden_state
        states.append(hidden[:, -1])
        if step < len(slots):
            slot = slot_input(model, states, step)  # (1, H)
            embeds = torch.cat([embeds[:, : first + step], slot[:, None], embeds[:, first + step + 1 :]], dim=1)
    hidden = base.backbone(inputs_embeds=embeds).last_hidden_state
    return model.lm_head(hidden)[0], torch.cat(states)


def slot_input(model, states: list[torch.Tensor], step: int) -> torch.Tensor:
    """What the slot after the states `h_0 … h_step` reads, `(1, H)`."""
    base, config = model.model, model.config
    if config.latent_input == "raw":
        return states[-1]
    if config.latent_input == "pause":
        return base.get_input_embeddings()(torch.tensor([config.latent_token_id]))
    norm, total = base.latent_input.norm, states[-1] + states[0]
    centred = total - total.mean()
    scaled = centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
    return scaled + base.latent_input.step.weight[step]


def gradients(model, loss):
    """Gradient of each parameter that has one."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def functional(logits, latent_states):
    """A smooth functional of everything, so that every gradient path counts."""
    return logits.double().log_softmax(-1)[..., 0].sum() + latent_states.double().pow(2).sum()


def score_every_item(model, prompt: list[int], depth: int, catalog: SidCatalog) -> torch.Tensor:
    """Brute force: one forward pass per item, softmax by hand over the codes that continue some item. `(I,)`."""
    config, codes = model.config, catalog.codes.tolist()
    scores = []
    for item in codes:
        ids = prompt + [config.latent_token_id] * depth + [config.latent_end_token_id, *sid_ids(model, item)]
        logits = model(torch.tensor([ids])).logits[0, -len(item) - 1 : -1].double()
        score = 0.0
        for level, code in enumerate(item):
            follow = sorted({other[level] for other in codes if other[:level] == item[:level]})
            allowed = logits[level, [config.sid_token_id(level, c) for c in follow]]
            score += allowed.log_softmax(0)[follow.index(code)]
        scores.append(score)
    return torch.stack(scores)


def draw_model_and_catalog(data):
    """A model of any kind and depth of Semantic ID, under either attention, and a catalogue of its codes."""
    levels, codes = data.draw(st.sampled_from([(3, 4), (1, 9), (2, 5), (4, 3), (3, 1)]))
    model, _ = tiny_model(
        data.draw(st.sampled_from(["qwen3", "llama", "gpt_neox"])),
        seed=data.draw(st.integers(0, 3)),
        num_sid_levels=levels,
        codebook_size=codes,
    )
    model.set_attn_implementation(data.draw(st.sampled_from(["sdpa", "eager"])))
    num_items = data.draw(st.integers(1, min(40, codes**levels)))
    return model, tiny_catalog(num_items, levels, codes, seed=data.draw(st.integers(0, 99)))


def draw_prompts(data, model):
    """Prompts, each with its depth, and their batch: padded on either side, or not at all."""
    size = data.draw(st.integers(1, 4))
    depths = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=size, max_size=size))
    prompts = [row(model, length, 0, seed=i) for i, length in enumerate(lengths)]
    inputs = batch(prompts, data.draw(st.lists(st.sampled_from(["left", "right"]), min_size=size, max_size=size)))
    if len(set(lengths)) == 1:
        del inputs["attention_mask"]
    return prompts, torch.tensor(depths), inputs
