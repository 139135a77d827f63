"""What an output folder shares on the Hub: the checkpoint with code, catalogue and card; nothing of the run."""

import json
import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd
from transformers import TrainingArguments

from ..files import read_json
from ..model.files_lasar import CHECKSUMS_NAME
from ..model.memory_lasar import MEMORY_NAME


ADAPTER = "adapter"  # folder of the adapter of a training with LoRA
# Files that are shared, by patterns. Checkpoints, anchors, optimizer, logs and arguments of the run are not.
SHARED = (
    "README.md", "LICENSE", "*.png", "config.json", "generation_config.json", "*.safetensors",
    "*.safetensors.index.json", "*_lasar.py", "handler.py", "processor_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja",
    "sid_catalog.json", CHECKSUMS_NAME, f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model*.safetensors",
)  # fmt: skip


def check_hub_strategy(args: TrainingArguments) -> None:
    """Refuse, with a `ValueError`, to push during a training: a checkpoint of a run is no model that can be loaded."""
    if args.push_to_hub and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end":
        raise ValueError(
            f"hub_strategy is {args.hub_strategy!r}; expected 'end'. The model is pushed once it is complete, with "
            "its catalogue and merged weights."
        )


def shared_files(folder: str | os.PathLike) -> list[Path]:
    """
    The files of an output folder that are shared, in order of their names. An item memory that lies there was fitted
    to earlier weights, so a training does not push it; [`Recommender.push_to_hub`] pushes a memory.
    """
    found = {path for pattern in SHARED for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name != MEMORY_NAME)


def commit_operations(folder: str | os.PathLike) -> list[CommitOperationAdd]:
    """
    The upload of an output folder. An adapter whose base model is a local folder is shared without its name, since the
    merged weights are in the repository.
    """
    operations = []
    for path in shared_files(folder):
        content: str | bytes = str(path)
        if path.name == "adapter_config.json":
            config = read_json(path)
            if os.path.exists(config.get("base_model_name_or_path") or ""):
                config["base_model_name_or_path"] = None
            content = json.dumps(config, indent=2).encode()
        operations.append(CommitOperationAdd(path.relative_to(folder).as_posix(), content))
    return operations
