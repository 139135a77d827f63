"""LASAR for Hugging Face: recommenders that reason in hidden states before they write a Semantic ID."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from .model.base_lasar import LasarModel
from .model.catalog_lasar import SidCatalog
from .model.configuration_lasar import LasarConfig
from .model.decoding_lasar import RecommendOutput
from .model.memory_lasar import ItemMemory
from .model.modeling_lasar import LasarForGenerativeRec
from .model.processing_lasar import LasarProcessor
from .model.recommender_lasar import Recommender


__version__ = "0.1.0"

AutoConfig.register("lasar", LasarConfig)
AutoModel.register(LasarConfig, LasarForGenerativeRec)
AutoModelForCausalLM.register(LasarConfig, LasarForGenerativeRec)
AutoProcessor.register(LasarConfig, LasarProcessor)
LasarConfig.register_for_auto_class()
LasarForGenerativeRec.register_for_auto_class("AutoModelForCausalLM")
LasarProcessor.register_for_auto_class("AutoProcessor")

if TYPE_CHECKING:
    from .trainers import LasarGRPOConfig, LasarGRPOTrainer, LasarSFTConfig, LasarSFTTrainer

_TRAINING = ("LasarGRPOConfig", "LasarGRPOTrainer", "LasarSFTConfig", "LasarSFTTrainer")

__all__ = [
    "ItemMemory",
    "LasarConfig",
    "LasarForGenerativeRec",
    "LasarGRPOConfig",
    "LasarGRPOTrainer",
    "LasarModel",
    "LasarProcessor",
    "LasarSFTConfig",
    "LasarSFTTrainer",
    "RecommendOutput",
    "Recommender",
    "SidCatalog",
]


def __getattr__(name: str):
    # Importing TRL takes seconds, and recommending does not need it.
    if name in _TRAINING:
        from . import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
