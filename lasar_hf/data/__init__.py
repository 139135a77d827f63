"""From raw interactions to training rows: readers, splits, prompts, teacher text, segments and anchors."""

from .anchors import AnchorStore, checkpoint_hash, encode_anchors
from .card import describe
from .interactions import Interactions, read_index, read_lcrec
from .prepared import PreparedData
from .prompts import PromptEncoder, build_tokenizer
from .readers import read_amazon, read_table
from .rows import ALIGNMENT_TASKS, alignment_rows, grpo_rows, history_rows, reasoning_rows, sft_rows
from .segments import segment, sentence_embedder, tfidf_embedder
from .splits import Split, TimeSplit, global_time, leave_one_out, samples
from .teacher import TemplateTeacher
from .toy import toy_shop


__all__ = [
    "ALIGNMENT_TASKS",
    "AnchorStore",
    "Interactions",
    "PreparedData",
    "PromptEncoder",
    "Split",
    "TemplateTeacher",
    "TimeSplit",
    "alignment_rows",
    "build_tokenizer",
    "checkpoint_hash",
    "describe",
    "encode_anchors",
    "global_time",
    "grpo_rows",
    "history_rows",
    "leave_one_out",
    "read_amazon",
    "read_index",
    "read_lcrec",
    "read_table",
    "reasoning_rows",
    "samples",
    "segment",
    "sentence_embedder",
    "sft_rows",
    "tfidf_embedder",
    "toy_shop",
]
