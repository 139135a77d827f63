"""Training: the supervised stages and RL as subclasses of TRL's trainers, their losses and rewards."""

from .catalog_head import add_catalog_head, item_embeddings
from .depth_policy import DepthScores, fit_depth_policy, score_depths
from .depth_rows import DepthRows
from .grpo_config import LasarGRPOConfig
from .grpo_trainer import LasarGRPOTrainer
from .lora import is_adapter, lasar_lora_config, load_model, lora_from_arguments
from .losses import DISTANCES, alignment_loss, bidirectional_kl, depth_entropy, exact_depth_loss, reinforce_loss
from .model_config import LasarModelConfig
from .resume import checkpoint_to_resume, starting_files
from .rewards import ExactMatchReward, PrefixReward, RankingReward, load_rewards
from .sft_config import LasarSFTConfig
from .sft_trainer import LasarDataCollator, LasarSFTTrainer
from .sharding import unsharded_weights


__all__ = [
    "DISTANCES",
    "DepthRows",
    "DepthScores",
    "ExactMatchReward",
    "LasarDataCollator",
    "LasarGRPOConfig",
    "LasarGRPOTrainer",
    "LasarModelConfig",
    "LasarSFTConfig",
    "LasarSFTTrainer",
    "PrefixReward",
    "RankingReward",
    "add_catalog_head",
    "alignment_loss",
    "bidirectional_kl",
    "checkpoint_to_resume",
    "depth_entropy",
    "exact_depth_loss",
    "fit_depth_policy",
    "is_adapter",
    "item_embeddings",
    "lasar_lora_config",
    "load_model",
    "load_rewards",
    "lora_from_arguments",
    "reinforce_loss",
    "score_depths",
    "starting_files",
    "unsharded_weights",
]
