"""From raw interactions to training examples: readers, splits, examples, prepared data."""

from .examples import (
    ALIGNMENT_TASKS,
    INSTRUCTIONS,
    alignment_examples,
    chain_end_examples,
    explicit_examples,
    grpo_examples,
    history_examples,
    mix_examples,
    reasoning_examples,
    sft_examples,
    stage1_examples,
    with_neighbours,
)
from .interactions import Interactions, read_index, read_lcrec
from .prepared_data import PreparedData, describe
from .readers import read_amazon2014, read_amazon2018, read_amazon2023, read_items, read_source, read_table
from .routines import write_routines
from .splits import Split, global_time, leave_one_out, samples
from .tokenizer import build_tokenizer
from .toy import toy_shop


__all__ = [
    "ALIGNMENT_TASKS",
    "INSTRUCTIONS",
    "Interactions",
    "PreparedData",
    "Split",
    "alignment_examples",
    "build_tokenizer",
    "chain_end_examples",
    "describe",
    "explicit_examples",
    "global_time",
    "grpo_examples",
    "history_examples",
    "leave_one_out",
    "mix_examples",
    "read_amazon2014",
    "read_amazon2018",
    "read_amazon2023",
    "read_index",
    "read_items",
    "read_lcrec",
    "read_source",
    "read_table",
    "reasoning_examples",
    "samples",
    "sft_examples",
    "stage1_examples",
    "toy_shop",
    "with_neighbours",
    "write_routines",
]
