"""From raw interactions to training rows: readers, splits, prompts, teacher text, segments and anchors."""

from .anchor_encoding import encode_anchors
from .anchors import AnchorStore, checkpoint_hash
from .card import describe
from .interactions import Interactions, read_index, read_lcrec
from .mixture import mix_rows, stage1_rows
from .pipeline import Step, file_hash, run_steps, write_json
from .preparation import (
    load_base,
    write_card,
    write_chains,
    write_interactions,
    write_samples,
    write_segments,
    write_split,
)
from .prepared import PreparedData
from .prompts import PromptEncoder, build_tokenizer
from .readers import read_amazon, read_table
from .rows import (
    ALIGNMENT_TASKS,
    INSTRUCTIONS,
    alignment_rows,
    grpo_rows,
    history_rows,
    reasoning_rows,
    sft_rows,
)
from .segments import Segmenter, segment, tfidf_embedder
from .sources import SourceArguments, read_source, source_settings
from .splits import Split, TimeSplit, global_time, leave_one_out, samples
from .storage import load_interactions, load_split, load_texts, save_interactions, save_split, save_texts
from .teacher import TemplateTeacher
from .toy import toy_shop


__all__ = [
    "ALIGNMENT_TASKS",
    "INSTRUCTIONS",
    "AnchorStore",
    "Interactions",
    "PreparedData",
    "PromptEncoder",
    "Segmenter",
    "SourceArguments",
    "Split",
    "Step",
    "TemplateTeacher",
    "TimeSplit",
    "alignment_rows",
    "build_tokenizer",
    "checkpoint_hash",
    "describe",
    "encode_anchors",
    "file_hash",
    "global_time",
    "grpo_rows",
    "history_rows",
    "leave_one_out",
    "load_base",
    "load_interactions",
    "load_split",
    "load_texts",
    "mix_rows",
    "read_amazon",
    "read_index",
    "read_lcrec",
    "read_source",
    "read_table",
    "reasoning_rows",
    "run_steps",
    "samples",
    "save_interactions",
    "save_split",
    "save_texts",
    "segment",
    "sft_rows",
    "source_settings",
    "stage1_rows",
    "tfidf_embedder",
    "toy_shop",
    "write_card",
    "write_chains",
    "write_interactions",
    "write_json",
    "write_samples",
    "write_segments",
    "write_split",
]
