"""Settings that fit a data set: columns by their names; Semantic IDs, model and training by the size of the data.

They are rules of thumb. The numbers of `recipes/scientific` (8,000 users on a CPU) are one point of them, and each can
be changed.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from ..data.readers import TEXT_COLUMNS


COLUMNS = {
    "user": ("user_id", "user", "userid", "reviewerid", "customer_id", "visitorid"),
    "item": ("item_id", "item", "itemid", "movieid", "product_id", "asin", "parent_asin", "business_id", "book_id"),
    "time": ("timestamp", "time", "date", "unixreviewtime", "datetime", "created_at"),
    "title": TEXT_COLUMNS["title"],
}
CORE = 5  # minimum number of interactions of a user and an item
LARGE = 100_000  # interactions from which on the core is used


def find_column(kind: str, names: Sequence[str], table: str) -> str:
    """
    The column of users, items, times or titles, by its name.

    Raises:
        `ValueError`: if no column has one of the usual names.
    """
    # RecBole writes user_id:token, spreadsheets write User ID.
    usual = {re.sub("[ .-]", "_", name.strip().lower().split(":")[0]): name for name in reversed(names)}
    for name in COLUMNS[kind]:
        if name in usual:
            return usual[name].split(":")[0]
    raise ValueError(
        f"{table} has no column with a usual name of a {kind}; its columns are {', '.join(names)}. Set "
        f"--{kind}-column."
    )


def core_size(num_interactions: int) -> int:
    """`k_core` of a data set: small ones keep all users and items."""
    return CORE if num_interactions >= LARGE else 1


def prepare_settings(num_items: int) -> dict[str, Any]:
    """Arguments of [`PrepareArguments`] that depend on the size of the catalogue."""
    # Few levels with many codes remember pairs of items better. Codes beyond half of the items would stay empty.
    codebook_size = min(2048, max(4, 2 ** round(math.log2(max(num_items, 8) / 2))))
    width = min(128, max(2, num_items // 4))
    return {
        "num_sid_levels": 2 if num_items <= codebook_size**2 / 16 else 3, "codebook_size": codebook_size,
        "text_dim": width, "collaborative_dim": width, "tokenizer_size": 1000 if num_items >= 1000 else 400,
    }  # fmt: skip


def train_settings(num_users: int, num_items: int, num_interactions: int, num_sid_levels: int) -> dict[str, dict]:
    """Arguments of the stages of training, `stage1`, `stage2` and `grpo`, and of the evaluation."""
    hidden_size = 64 if num_items < 1000 else 128 if num_items < 20_000 else 256
    backbone = {
        "model_type": "gpt_neox", "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": 2 if num_items < 1000 else 4, "num_attention_heads": hidden_size // 32,
        "max_position_embeddings": 512, "hidden_dropout": 0.2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    # Batches of about 1/600 of the tokens, and as many epochs as give 5,000 updates, within limits.
    tokens = num_interactions * num_sid_levels
    batch = min(16_000, max(400, tokens // 600))
    updates = 2 * tokens / batch  # an epoch of both tasks
    epochs = min(40, max(2, round(5000 / updates)))
    common = {
        "weight_decay": 0.2, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "gradient_checkpointing": False,
        "bf16": False, "eval_users": min(2000, num_users), "eval_strategy": "steps", "eval_steps": 0.125,
        "save_strategy": "steps", "save_steps": 0.125, "save_total_limit": 2, "per_device_eval_batch_size": 64,
        "metric_for_best_model": "eval_NDCG@10", "load_best_model_at_end": True, "logging_steps": 0.02,
        "report_to": "none", "neighbour_targets": 0.5,
    }  # fmt: skip
    # Candidates of 8 to 32 prompts, and 100 to 300 updates. Stage 2 of small data has few updates, so larger ones.
    is_small = num_users < 2000
    prompts, steps = (8, 100) if is_small else (32, 300)
    reinforce = {name: value for name, value in common.items() if name not in ("neighbour_targets", "warmup_steps")}
    return {
        "stage1": {
            "stage": 1, "instruction": "", "max_history": 50, "tasks": ["history", "next_item"],
            "backbone_config": backbone, "codebook_init": True, "learning_rate": 2e-3, "num_train_epochs": epochs,
            "max_tokens_per_batch": batch, **common,
        },
        "stage2": {
            "stage": 2, "depth_source": "uniform", "depth_weights": [8, 4, 3, 2, 1, 1, 1, 1, 1], "alignment": "kl",
            "alignment_weight": 0.1, "policy_weight": 0.1, "learning_rate": 2e-3 if is_small else 5e-4,
            "num_train_epochs": max(1, round(epochs / (2 if is_small else 4))),
            "max_tokens_per_batch": min(16_000, 7 * batch), **common,
        },
        "grpo": {
            **reinforce, "reward_funcs": ["exact_match", "ranking", "prefix"], "sampling": "sample",
            "num_generations": 8, "drop_groups_without_signal": True, "depth_gradient": "exact", "step_cost": "auto",
            "step_cost_warmup": 0.5, "learning_rate": 2e-5, "lr_scheduler_type": "constant", "weight_decay": 0.0,
            "per_device_train_batch_size": 8 * prompts, "max_steps": steps, "eval_steps": steps // 4,
            "save_steps": steps // 4, "logging_steps": 10,
        },
        "evaluate": {"users": 10_000 if num_users > 100_000 else 0},
    }  # fmt: skip
