"""
Recommend for a table of histories, in shards that several processes share and a second run completes.

    accelerate launch recipes/recommend.py --config recipes/scientific/recommend.yaml
    torchrun --nproc_per_node 2 recipes/recommend.py --config recipes/scientific/recommend.yaml

Reads `user_id` and `history` (item ids, oldest first) from Parquet or JSON lines and writes `part-00000.parquet` …
with `user_id`, `item_ids`, `scores` (log-probabilities) and `latent_steps`. The shards do not depend on the number of
processes. A shard appears when it is whole; one that is there is not computed again.
"""

import hashlib
import json
import os
import sys
from pathlib import Path


# Python puts a script's folder first on the path, where this folder's evaluate.py would hide the `evaluate` package.
sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]

from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import TrlParser

from lasar_hf import LasarForGenerativeRec, SidCatalog
from lasar_hf.data import PromptEncoder, write_json
from lasar_hf.data.tables import read_batches
from lasar_hf.evaluation import recommend_samples
from lasar_hf.trainers import content_hashes


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


def read_histories(path: Path, catalog: SidCatalog) -> tuple[pa.Array, pa.ListArray]:
    """User ids, and histories as item rows. Raises `ValueError` for what is missing, empty or unknown."""
    parts = []
    for _, batch in read_batches(path, ["user_id", "history"]):  # ids as they stand, even if they look like dates
        names = [[str(item) for item in history or ()] for history in batch["history"]]
        parts.append((pa.array(map(str, batch["user_id"])), pa.array(names, pa.list_(pa.string()))))
    if not parts:
        raise ValueError(f"{path} holds no history.")
    users, histories = map(pa.concat_arrays, zip(*parts, strict=True))
    empty = pc.equal(pc.list_value_length(histories), 0)
    if pc.any(empty).as_py():
        raise ValueError(f"{path}: the history of user {users[pc.index(empty, True).as_py()].as_py()!r} is empty.")
    items = histories.flatten()
    rows = pc.index_in(items, value_set=pa.array(catalog.item_ids))
    if rows.null_count:
        first = pc.index(pc.is_null(rows), True).as_py()
        user = users[pc.list_parent_indices(histories)[first].as_py()].as_py()
        raise ValueError(f"{path}: user {user!r} has the item {items[first].as_py()!r}, which the catalogue lacks.")
    ends = pc.cumulative_sum(pc.list_value_length(histories))
    return users, pa.ListArray.from_arrays(pa.concat_arrays([pa.array([0], ends.type), ends]), rows)


def check_request(args: RecommendArguments, folder: Path) -> None:
    """Write down what the shards answer; a folder with shards that answer something else is refused."""
    with open(args.histories, "rb") as file:
        request = {**asdict(args), "histories_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    del request["output_dir"], request["histories"]
    # By content: a model trained again under the same name gives other answers.
    files = [content_hashes(args.model, pattern) for pattern in MODEL_FILES]
    request["model"] = {name: digest for part in files for name, digest in part.items()}
    path = folder / "request.json"
    if path.exists() and any(folder.glob("part-*.parquet")):
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in request if request[name] != before.get(name))
        if changed:
            raise ValueError(f"{folder} holds shards made with another {', '.join(changed)}: use another output_dir.")
        return
    write_json(path, request)


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
    model = LasarForGenerativeRec.from_pretrained(args.model).to(state.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = PromptEncoder(tokenizer, catalog.codes.numpy(), args.instruction, args.max_history)
    shards = range(0, len(users), args.shard_size)
    for number in tqdm(range(len(shards))[state.process_index :: state.num_processes], desc="Shards",
                       disable=not state.is_main_process):
        path = folder / f"part-{number:05d}.parquet"
        if path.exists():
            continue
        samples = Dataset.from_dict({"history": histories[shards[number] :][: args.shard_size].to_pylist()})
        found = recommend_samples(
            model, samples, encoder, catalog, args.top_k, args.num_beams, args.latent_steps, args.batch_size,
            exclude_history=args.exclude_history,
        )
        kept = found.items >= 0
        table = pa.table({
            "user_id": users[shards[number] :][: args.shard_size],
            "item_ids": [[catalog.item_ids[item] for item in row[keep]] for row, keep in
                         zip(found.items, kept, strict=True)],
            "scores": pa.array([row[keep] for row, keep in zip(found.scores, kept, strict=True)],
                               pa.list_(pa.float32())),
            "latent_steps": found.latent_steps,
        })
        pq.write_table(table, folder / f"{path.name}.tmp")
        os.replace(folder / f"{path.name}.tmp", path)
    state.wait_for_everyone()


if __name__ == "__main__":
    main(*TrlParser((RecommendArguments,)).parse_args_and_config())
    PartialState().destroy_process_group()
