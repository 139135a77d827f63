"""LASAR for Hugging Face: recommenders that reason in hidden states before they write a Semantic ID."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_lasar import LasarConfig
from .decoding_lasar import RecommendOutput, SidCatalog
from .modeling_lasar import LasarForGenerativeRec, LasarModel


__version__ = "0.1.0"

AutoConfig.register("lasar", LasarConfig)
AutoModel.register(LasarConfig, LasarForGenerativeRec)
AutoModelForCausalLM.register(LasarConfig, LasarForGenerativeRec)
LasarConfig.register_for_auto_class()
LasarForGenerativeRec.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["LasarConfig", "LasarForGenerativeRec", "LasarModel", "RecommendOutput", "SidCatalog"]
