"""
Recommend for a table of histories, in shards that several processes share. A second run completes a first one.

Reads `user_id` and `history` (item ids, oldest first) from Parquet or JSON lines. Writes `part-00000.parquet` … with
`user_id`, `item_ids`, `scores` (log-probabilities) and `latent_steps`. The shards do not depend on the number of
processes; a complete shard is not computed again, a damaged one is. The prompt format is that of the checkpoint.

Items that the catalogue does not have are left out of a history; `unknown_items` is their number. A user without a
known item gets the most popular training items of `data_dir`, or none without `data_dir`; then `fallback` is true, and
`scores` and `latent_steps` are null. With `strict`, unknown items and empty histories are errors.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from ..arguments import read_switch
from ..data import PreparedData
from ..data.interactions import id_text
from ..data.tables import read_batches
from ..evaluation import popular_items, recommend_samples
from ..files import atomic_file, checkpoint_hashes, file_hash, read_json, write_json
from ..model.catalog_lasar import SidCatalog
from ..model.memory_lasar import ItemMemory
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from ..onednn import int8_linear, onednn_linear
from ..processes import locked_for_all
from .parser import ScriptParser


logger = logging.getLogger(__name__)

# Files of a checkpoint that decide its recommendations.
MODEL_FILES = (
    "*.safetensors", "config.json", "adapter_config.json", "processor_config.json", "sid_catalog.json",
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.py",
)  # fmt: skip
SCHEMA = pa.schema({
    "user_id": pa.string(), "item_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32()),
    "latent_steps": pa.int64(), "fallback": pa.bool_(), "unknown_items": pa.int64(),
})  # fmt: skip


@dataclass
class RecommendArguments:
    """Arguments of a batch of recommendations."""

    model: str = field(metadata={"help": "Checkpoint with its processor and catalogue."})
    histories: str = field(metadata={"help": "`.parquet` or `.jsonl` with `user_id` and `history` (item ids)."})
    output_dir: str = field(metadata={"help": "Folder of the shards."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder that recipes/prepare.py wrote, for the most popular items."}
    )
    strict: bool = field(default=False, metadata={"help": "Refuse unknown items and empty histories."})
    top_k: int = field(default=10, metadata={"help": "Items per user."})
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    latent_steps: int | None = field(
        default=None, metadata={"help": "Number of latent steps, 0 for direct generation. Default: the policy's."}
    )
    exclude_history: str = field(
        default="auto",
        metadata={"help": "Leave out the items of the history: true, false or auto, as the model was trained."},
    )
    memory: str = field(
        default="auto",
        metadata={"help": "Mix the model with its item memory: true, false or auto, if the checkpoint has one."},
    )
    int8: bool = field(
        default=False, metadata={"help": "Round the weights to int8: faster on a CPU, and scores change a little."}
    )
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})
    shard_size: int = field(default=2048, metadata={"help": "Users per shard."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the Hub; a folder has none."}
    )

    def __post_init__(self):
        read_switch(self, "exclude_history")
        read_switch(self, "memory")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")


def read_histories(
    path: Path, catalog: SidCatalog, strict: bool = False
) -> tuple[list[str], list[list[int]], list[int]]:
    """User ids, their histories as item indices without unknown items, and the number of these."""
    users, histories, num_unknown = [], [], []
    for start, batch in read_batches(path, ["user_id", "history"]):
        for row, (user, history) in enumerate(zip(batch["user_id"], batch["history"], strict=True), start):
            user_id = id_text(user)
            if user_id is None:
                raise ValueError(f"{path}: row {row}: invalid user_id {user!r}; expected a string or an integer.")
            if not isinstance(history, list | None) or (strict and not history):
                raise ValueError(f"{path}: the history of user {user_id!r} is {history!r}; expected a list of ids.")
            items = [catalog.index_of.get(id_text(item)) for item in history or []]
            if strict and None in items:
                unknown = history[items.index(None)]
                raise ValueError(f"{path}: the history of user {user_id!r} has {unknown!r}; not in the catalogue.")
            users.append(user_id)
            histories.append([item for item in items if item is not None])
            num_unknown.append(items.count(None))
    if not users:
        raise ValueError(f"{path} has no rows; expected a user_id and a history in each.")
    return users, histories, num_unknown


def model_hashes(model: str) -> dict[str, str]:
    """Hash of each file that decides the recommendations; for an adapter, those of its base model too."""
    return checkpoint_hashes(model, MODEL_FILES)


def write_request(args: RecommendArguments, popular: list[str], folder: Path) -> None:
    """Write the settings of the shards; refuse a folder whose shards have other settings."""
    request = {**asdict(args), "histories_sha256": file_hash(args.histories), "model": model_hashes(args.model)}
    request["popular_items"] = popular
    del request["output_dir"], request["histories"], request["data_dir"]
    path = folder / "request.json"
    if path.exists() and any(folder.glob("part-*.parquet")):
        before = read_json(path)
        changed = sorted(name for name in request if request[name] != before.get(name))
        if changed:
            raise ValueError(
                f"{folder} contains shards with different settings ({', '.join(changed)}). Use another output_dir."
            )
    write_json(path, request)


def is_done(path: Path, request: str, num_users: int) -> bool:
    """Whether the shard is whole. Two jobs in one folder can leave one of another request, which is refused."""
    if not path.exists():
        return False
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
        is_whole = table.schema.equals(SCHEMA) and len(table) == num_users
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        is_whole = False
    if not is_whole:
        logger.warning("%s is damaged. It is computed again.", path)
        return False
    if (table.schema.metadata or {}).get(b"request") != request.encode():
        raise ValueError(f"{path} was produced with different settings. Use another output_dir.")
    return True


def shard_table(
    users: list[str],
    histories: list[list[int]],
    num_unknown: list[int],
    recommended: list[list[dict]],
    latent_steps: list[int],
    popular: list[str],
) -> pa.Table:
    """One row per user. `recommended` and `latent_steps` are those of the users whose history is not empty."""
    answers = iter(zip(recommended, latent_steps, strict=True))
    rows = []
    for user, history, unknown in zip(users, histories, num_unknown, strict=True):
        row = {"user_id": user, "item_ids": popular, "fallback": not history, "unknown_items": unknown}
        if history:
            entries, steps = next(answers)
            row["item_ids"] = [entry["item_id"] for entry in entries]
            row |= {"scores": [entry["score"] for entry in entries], "latent_steps": steps}
        rows.append(row)
    return pa.Table.from_pylist(rows, SCHEMA)


def main(args: RecommendArguments) -> None:
    """Recommend for the users of every missing shard."""
    state = PartialState(cpu=not torch.accelerator.is_available())  # otherwise CPU processes do not find each other
    with locked_for_all(args.output_dir):
        write_shards(args, state)


def write_shards(args: RecommendArguments, state: PartialState) -> None:
    """Write the missing shards to a folder that no other command writes to."""
    folder = Path(args.output_dir)
    processor = LasarProcessor.from_pretrained(args.model, revision=args.revision)
    users, histories, num_unknown = read_histories(Path(args.histories), processor.catalog, args.strict)
    popular = []
    if args.data_dir:
        popular = popular_items(PreparedData.load(args.data_dir), processor.catalog, args.top_k)
    if state.is_main_process:
        logger.info(
            "%d users: left out %d unknown items of their histories; %d users without a known item get %s.",
            len(users),
            sum(num_unknown),
            histories.count([]),
            "popular items" if popular else "none (no data_dir)",
        )
        write_request(args, popular, folder)
    state.wait_for_everyone()
    request = file_hash(folder / "request.json")
    model = LasarForGenerativeRec.from_pretrained(args.model, revision=args.revision).to(state.device).eval()
    if args.int8:
        int8_linear(model)
    finders: dict[Any, Any] = {None: ItemMemory.find, True: ItemMemory.from_pretrained}
    memory = None if args.memory is False else finders[args.memory](args.model, revision=args.revision)
    shards = list(enumerate(range(0, len(users), args.shard_size)))[state.process_index :: state.num_processes]
    for number, start in tqdm(shards, desc="Shards", disable=not state.is_main_process):
        path = folder / f"part-{number:05d}.parquet"
        shard = slice(start, start + args.shard_size)
        if is_done(path, request, len(users[shard])):
            continue
        known = [history for history in histories[shard] if history]
        with onednn_linear(model):
            output = recommend_samples(
                model,
                Dataset.from_dict({"history": known}),
                processor,
                args.top_k,
                args.num_beams,
                args.latent_steps,
                args.batch_size,
                exclude_history=args.exclude_history,  # type: ignore[arg-type]
                memory=memory,
            )
        recommended = processor.decode_recommendations(output)
        table = shard_table(
            users[shard], histories[shard], num_unknown[shard], recommended, output.latent_steps.tolist(), popular
        )
        with atomic_file(path) as temporary:
            table = table.replace_schema_metadata({"request": request})
            pq.write_table(table, temporary, write_page_checksum=True)
    state.wait_for_everyone()


def run() -> None:
    """Run the command with the arguments of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*ScriptParser((RecommendArguments,), __doc__).parse_args_and_config())
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run()
