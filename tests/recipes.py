"""Recipes as modules, and small folders for them to read: a checkpoint and prepared data."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from datasets import Dataset, DatasetDict

from lasar_hf import LasarProcessor
from lasar_hf.files import write_json
from tests.tiny import tiny_catalog, tiny_model


ROOT = Path(__file__).resolve().parents[1]


COMMANDS = {"eval": "evaluate"} | {
    name: name for name in ("prepare", "sft", "grpo", "memory", "recommend", "add_items")
}  # recipe -> module of lasar_hf.commands


def load_recipe(name: str) -> ModuleType:
    """The code of `recipes/<name>.py` as a module."""
    if name in COMMANDS:
        return importlib.import_module(f"lasar_hf.commands.{COMMANDS[name]}")
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def save_checkpoint(folder: Path, **options: object) -> LasarProcessor:
    """Write a tiny model with its processor; options are those of the processor."""
    model, tokenizer = tiny_model()
    processor = LasarProcessor(tokenizer, tiny_catalog(), **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def save_prepared(folder: Path, users: int = 23, max_history: int = 50) -> None:
    """Write prepared data of users whose histories have different lengths, for the catalogue of [`tiny_catalog`]."""
    catalog = tiny_catalog()
    rows = []
    for user in range(users):
        history = [(3 * user + step) % 20 for step in range(1 + user % 7)]
        rows.append({"user_id": f"user-{user}", "history": history, "target": 5 * user % 20})
    texts = {"chain_of_thought": ["red book. blue chair."] * users, "segments": [["red book.", "blue chair."]] * users}
    held_out = Dataset.from_list(rows)
    train = Dataset.from_dict(held_out.to_dict() | texts)
    DatasetDict(train=train, validation=held_out, test=held_out).save_to_disk(folder / "samples")
    columns = {"user_id": held_out["user_id"], "train": held_out["history"]}
    targets = [[item] for item in held_out["target"]]
    Dataset.from_dict(columns | {"validation": targets, "test": targets}).save_to_disk(folder / "users")
    items = {"item_id": catalog.item_ids, "title": [f"red book {item}" for item in catalog.item_ids]}
    for name in ("description", "brand", "categories", "asin", "parent_asin"):
        items[name] = [""] * len(catalog)
    Dataset.from_dict(items).save_to_disk(folder / "items")
    catalog.save_pretrained(folder / "catalog")
    write_json(folder / "interactions.json", {"split_fields": {}, "description": {}})
    write_json(folder / "prepared.json", {"codebook_size": 4, "max_history": max_history})


def first_code_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
    """A reward as a user writes it, for the dotted path of `reward_funcs`."""
    return [float(ids[0] % 2) for ids in completion_ids]


def report(folder: Path) -> dict:
    """The report of recipes/eval.py without its folder and its times."""
    content = json.loads((folder / "report.json").read_text())
    del content["details"]["arguments"]["output_dir"]
    for row in content["results"].values():
        row.pop("ms_per_user", None)
    return content
