"""From raw interactions to training examples: readers, splits, prompts, prepared data."""

from .card import describe
from .examples import (
    ALIGNMENT_TASKS,
    INSTRUCTIONS,
    alignment_examples,
    grpo_examples,
    history_examples,
    mix_examples,
    reasoning_examples,
    sft_examples,
    stage1_examples,
)
from .interactions import Interactions, read_index, read_lcrec
from .prepared_data import PreparedData
from .readers import read_amazon, read_table
from .sources import SourceArguments, read_source, source_settings
from .splits import Split, TimeSplit, global_time, leave_one_out, samples
from .storage import load_interactions, load_split, load_texts, save_interactions, save_split, save_texts
from .tokenizer import build_tokenizer
from .toy import toy_shop


__all__ = [
    "ALIGNMENT_TASKS",
    "INSTRUCTIONS",
    "Interactions",
    "PreparedData",
    "SourceArguments",
    "Split",
    "TimeSplit",
    "alignment_examples",
    "build_tokenizer",
    "describe",
    "global_time",
    "grpo_examples",
    "history_examples",
    "leave_one_out",
    "load_interactions",
    "load_split",
    "load_texts",
    "mix_examples",
    "read_amazon",
    "read_index",
    "read_lcrec",
    "read_source",
    "read_table",
    "reasoning_examples",
    "samples",
    "save_interactions",
    "save_split",
    "save_texts",
    "sft_examples",
    "source_settings",
    "stage1_examples",
    "toy_shop",
]
