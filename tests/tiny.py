"""Small models, tokenizers and batches for the tests."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from lasar_hf import ItemMemory, LasarForGenerativeRec, SidCatalog
from lasar_hf.model.memory_lasar import catalog_hash


WORDS = ["<|pad|>", "<|endoftext|>", "<unk>", "Recommend", "the", "next", "item", ".", "red", "blue", "book", "chair"]

# Settings of small backbones that differ: heads of keys, biases, positions in one layer only, parallel residuals,
# scaled embeddings.
FAMILIES = {
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "qwen2": {"num_key_value_heads": 1},
    "llama": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0]},
    "gpt_neox": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a dozen words."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_backbone(kind: str = "qwen3", layers: int = 2, hidden_size: int = 16, **kwargs):
    """A randomly initialised causal language model, by default of two layers."""
    shape = dict(
        vocab_size=len(WORDS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.2,
    )
    config = CONFIG_MAPPING[kind](**shape | FAMILIES[kind] | kwargs)
    return AutoModelForCausalLM.from_config(config)


def tiny_model(kind: str = "qwen3", seed: int = 0, num_sid_levels: int = 3, codebook_size: int = 4, **kwargs):
    """A small recommender and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = LasarForGenerativeRec.from_backbone(
        tiny_backbone(kind, **kwargs),
        tokenizer,
        num_sid_levels=num_sid_levels,
        codebook_size=codebook_size,
        max_latent_steps=4,
    )
    return model.eval(), tokenizer


def tiny_catalog(num_items: int = 20, num_sid_levels: int = 3, codebook_size: int = 4, seed: int = 0) -> SidCatalog:
    """Items with distinct random Semantic IDs."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(codebook_size**num_sid_levels, generator=generator)[:num_items]
    codes = torch.stack([numbers // codebook_size**level % codebook_size for level in range(num_sid_levels)], dim=1)
    return SidCatalog(codes, [f"item-{i}" for i in range(num_items)])


def ring_memory(catalog: SidCatalog) -> ItemMemory:
    """A memory in which each item is followed by the next one."""
    size = len(catalog)
    return ItemMemory(
        torch.arange(size + 1),
        (torch.arange(size) + 1) % size,
        torch.ones(size),
        catalog_hash(catalog),
        gate=(5.0, 0.0),
    )


def sid_ids(model, codes) -> list[int]:
    """Token ids of one Semantic ID."""
    return [model.config.sid_token_id(level, int(code)) for level, code in enumerate(codes)]


def row(model, prompt_length: int, depth: int, answer: list[int] | None = None, seed: int = 0) -> list[int]:
    """A sequence: a random prompt, its latent slots and, if there is an answer, `<|latent_end|>` and the answer."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, len(WORDS), (prompt_length - 1,), generator=generator).tolist()
    ids = prompt + [config.latent_start_token_id] + [config.latent_token_id] * depth
    return ids if answer is None else ids + [config.latent_end_token_id, *answer]


def batch(rows: list[list[int]], sides: list[str] | str = "left") -> dict[str, torch.Tensor]:
    """Pad sequences, each on its side, into `input_ids` and `attention_mask`."""
    sides = [sides] * len(rows) if isinstance(sides, str) else sides
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (tokens, side) in enumerate(zip(rows, sides, strict=True)):
        columns = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[i, columns], mask[i, columns] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}
