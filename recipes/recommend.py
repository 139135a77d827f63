"""
Recommend for a table of histories, in shards that several processes share and a second run completes.

    accelerate launch recipes/recommend.py --config recipes/scientific/recommend.yaml
    torchrun --nproc_per_node 2 recipes/recommend.py --config recipes/scientific/recommend.yaml

Reads `user_id` and `history` (item ids, oldest first) from Parquet or JSON lines and writes `part-00000.parquet` …
with `user_id`, `item_ids`, `scores` (log-probabilities) and `latent_steps`. The shards do not depend on the number of
processes. A shard appears when it is whole; one that is there is not computed again.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import TrlParser

from lasar_hf import LasarForGenerativeRec, SidCatalog
from lasar_hf.data import LasarProcessor
from lasar_hf.data.tables import id_text, read_batches
from lasar_hf.evaluation import recommend_samples
from lasar_hf.files import file_hash, folder_hashes, write_json


# What decides the answers of a checkpoint.
MODEL_FILES = (
    "*.safetensors", "*.bin", "config.json", "adapter_config.json", "sid_catalog.json", "tokenizer*", "vocab*",
    "merges.txt", "*.model", "*.py",
)  # fmt: skip


@dataclass
class RecommendArguments:
    """For whom to recommend what, with which model."""

    model: str = field(metadata={"help": "Checkpoint with its tokenizer and catalogue."})
    histories: str = field(metadata={"help": "`.parquet` or `.jsonl` with `user_id` and `history` (item ids)."})
    output_dir: str = field(metadata={"help": "Folder of the shards."})
    top_k: int = field(default=10, metadata={"help": "Items for each user."})
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    latent_steps: int | None = field(default=None, metadata={"help": "Fixed depth, 0 for none; else the policy's."})
    exclude_history: bool = field(default=False, metadata={"help": "Never recommend an item of the history."})
    instruction: str = field(default="Recommend the next item.", metadata={"help": "Text before the history."})
    max_history: int = field(default=50, metadata={"help": "Most items of a history that are shown."})
    batch_size: int = field(default=64, metadata={"help": "Users a batch."})
    shard_size: int = field(default=2048, metadata={"help": "Users a shard."})

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")


def read_histories(path: Path, catalog: SidCatalog) -> tuple[list[str], list[list[int]]]:
    """User ids, and histories as item rows. Raises `ValueError` for what is missing, empty or unknown."""
    users, histories = [], []
    for start, batch in read_batches(path, ["user_id", "history"]):
        for number, (user, history) in enumerate(zip(batch["user_id"], batch["history"], strict=True), start):
            name = id_text(user)
            if name is None:
                raise ValueError(f"{path}: row {number} has no user_id.")
            if history and not isinstance(history, list):
                raise ValueError(f"{path}: the history of user {name!r} is {history!r}, expected a list of item ids.")
            if not history:
                raise ValueError(f"{path}: the history of user {name!r} is empty.")
            rows = [catalog.index_of.get(id_text(item)) for item in history]
            if None in rows:
                unknown = history[rows.index(None)]
                raise ValueError(f"{path}: user {name!r} has the item {unknown!r}, which the catalogue lacks.")
            users.append(name)
            histories.append(rows)
    if not users:
        raise ValueError(f"{path} holds no history.")
    return users, histories


def model_files(model: str) -> dict[str, str]:
    """Hash of each file that decides what a checkpoint answers; of an adapter, those of what it adapts too."""
    parts = [folder_hashes(model, pattern) for pattern in MODEL_FILES]
    files = {name: digest for part in parts for name, digest in part.items()}
    adapter = Path(model, "adapter_config.json")
    if adapter.exists():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        files |= {f"{base}/{name}": digest for name, digest in model_files(base).items()}
    return files


def check_request(args: RecommendArguments, folder: Path) -> None:
    """Write down what the shards answer; a folder with shards that answer something else is refused."""
    request = {**asdict(args), "histories_sha256": file_hash(args.histories), "model": model_files(args.model)}
    del request["output_dir"], request["histories"]
    path = folder / "request.json"
    if path.exists() and any(folder.glob("part-*.parquet")):
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in request if request[name] != before.get(name))
        if changed:
            raise ValueError(f"{folder} holds shards made with another {', '.join(changed)}: use another output_dir.")
    write_json(path, request)


def is_done(path: Path, request: str) -> bool:
    """Whether a shard is there. Raises `ValueError` for one of another request, as two jobs in one folder leave."""
    if not path.exists():
        return False
    if (pq.read_schema(path).metadata or {}).get(b"request") != request.encode():
        raise ValueError(f"{path} answers another request than this one: use another output_dir.")
    return True


def main(args: RecommendArguments) -> None:
    """Recommend for every user whose shard is not there yet."""
    state = PartialState(cpu=not torch.accelerator.is_available())  # else every process would be alone on a CPU
    folder = Path(args.output_dir)
    catalog = SidCatalog.from_pretrained(args.model)
    users, histories = read_histories(Path(args.histories), catalog)
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        check_request(args, folder)
    state.wait_for_everyone()
    request = file_hash(folder / "request.json")
    model = LasarForGenerativeRec.from_pretrained(args.model).to(state.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    processor = LasarProcessor(tokenizer, catalog.codes.numpy(), args.instruction, args.max_history)
    shards = range(0, len(users), args.shard_size)
    for number in tqdm(range(len(shards))[state.process_index :: state.num_processes], desc="Shards",
                       disable=not state.is_main_process):
        path = folder / f"part-{number:05d}.parquet"
        if is_done(path, request):
            continue
        part = slice(shards[number], shards[number] + args.shard_size)
        samples = Dataset.from_dict({"history": histories[part]})
        found = recommend_samples(
            model, samples, processor, catalog, args.top_k, args.num_beams, args.latent_steps, args.batch_size,
            exclude_history=args.exclude_history,
        )
        kept = found.items >= 0
        table = pa.table({
            "user_id": users[part],
            "item_ids": [[catalog.item_ids[item] for item in row[keep]] for row, keep in
                         zip(found.items, kept, strict=True)],
            "scores": pa.array([row[keep] for row, keep in zip(found.scores, kept, strict=True)],
                               pa.list_(pa.float32())),
            "latent_steps": found.latent_steps,
        }).replace_schema_metadata({"request": request})
        pq.write_table(table, folder / f"{path.name}.tmp")
        os.replace(folder / f"{path.name}.tmp", path)
    state.wait_for_everyone()


if __name__ == "__main__":
    main(*TrlParser((RecommendArguments,)).parse_args_and_config())
    PartialState().destroy_process_group()
