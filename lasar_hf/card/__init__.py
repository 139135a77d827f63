"""Model cards: what a checkpoint is, how it was trained, how good it is, and code that uses it."""

from .model_card import CARD_NAME, add_section, data_name, find_card, folder_card, hub_name, model_card, save_card
from .results import add_results
from .training import CardFacts, changed_settings, training_text


__all__ = [
    "CARD_NAME",
    "CardFacts",
    "add_results",
    "add_section",
    "changed_settings",
    "data_name",
    "find_card",
    "folder_card",
    "hub_name",
    "model_card",
    "save_card",
    "training_text",
]
