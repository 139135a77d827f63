"""
The job of recipes/recommend.py on Ray Data, for clusters that run Ray. Each worker has its own copy of the model.

    pip install "lasar_hf[ray]"
    python examples/ray_recommend.py outputs/scientific/grpo histories.parquet recommendations --workers 2
"""

import argparse
from pathlib import Path

import pyarrow as pa
import ray

from lasar_hf import ItemMemory, LasarForGenerativeRec, LasarProcessor
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import popular_items, recommend_samples


SCHEMA = pa.schema({
    "user_id": pa.string(), "item_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32()),
    "latent_steps": pa.int64(), "fallback": pa.bool_(), "unknown_items": pa.int64(),
})  # fmt: skip


class Recommender:
    """
    Loads a checkpoint once and recommends for the batches that Ray passes.

    Args:
        args (`argparse.Namespace`):
            The command line, and `popular`, the item ids for users without a known item.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.processor = LasarProcessor.from_pretrained(args.model)
        device = "cuda" if args.gpus_per_worker else "cpu"
        self.model = LasarForGenerativeRec.from_pretrained(args.model).to(device).eval()
        self.memory = ItemMemory.find(args.model)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`user_id` and `history` (item ids, oldest first) to the columns of recipes/recommend.py."""
        index_of, rows = self.processor.catalog.index_of, []
        for row in batch.to_pylist():
            items = [index_of.get(str(item)) for item in row["history"] or []]
            known = [item for item in items if item is not None]
            if self.args.strict and (not known or len(known) < len(items)):
                raise ValueError(f"User {row['user_id']!r}: {row['history']!r} is empty or has unknown items.")
            # The answer to a new user, replaced below for all others.
            rows.append({
                "user_id": str(row["user_id"]), "item_ids": self.args.popular, "scores": None, "latent_steps": None,
                "fallback": not known, "unknown_items": len(items) - len(known), "history": known,
            })  # fmt: skip
        known_rows = [row for row in rows if row["history"]]
        output = recommend_samples(
            self.model,
            {"history": [row["history"] for row in known_rows]},
            self.processor,
            self.args.top_k,
            self.args.num_beams,
            self.args.latent_steps,
            exclude_history=self.args.exclude_history,
            memory=self.memory,
        )
        decoded = self.processor.decode_recommendations(output)
        for row, entries, steps in zip(known_rows, decoded, output.latent_steps.tolist(), strict=True):
            row["item_ids"] = [entry["item_id"] for entry in entries]
            row |= {"scores": [entry["score"] for entry in entries], "latent_steps": steps}
        return pa.Table.from_pylist(rows, SCHEMA)


def main() -> None:
    """Read the histories, recommend, write Parquet."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("model", help="Checkpoint with its processor and catalogue.")
    parser.add_argument("histories", help="`.parquet` or `.jsonl` with `user_id` and `history` (item ids).")
    parser.add_argument("output_dir", help="Folder of the Parquet files.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus_per_worker", type=float, default=0)
    # Workers that claim every core leave none for reading and writing, and Ray would wait without end.
    parser.add_argument("--cpus_per_worker", type=float, default=0.5)
    parser.add_argument("--top_k", type=int, default=10)
    parser.add_argument("--num_beams", type=int, default=50)
    parser.add_argument("--latent_steps", type=int, help="Number of latent steps; by default the policy head chooses.")
    parser.add_argument(
        "--exclude_history", action="store_true", default=None, help="Leave out the items of the history."
    )
    parser.add_argument("--data_dir", help="Folder that recipes/prepare.py wrote, for the most popular items.")
    parser.add_argument("--strict", action="store_true", help="Refuse unknown items and empty histories.")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())  # workers have another working directory
    args.popular = []
    if args.data_dir:
        catalog = LasarProcessor.from_pretrained(args.model).catalog
        args.popular = popular_items(PreparedData.load(args.data_dir), catalog, args.top_k)
    read = ray.data.read_parquet if args.histories.endswith(".parquet") else ray.data.read_json
    # Blocks are shared out among the workers. Without this, a small file would be one block and use one worker.
    histories = read(str(Path(args.histories).resolve())).repartition(target_num_rows_per_block=1024)
    recommendations = histories.map_batches(
        Recommender,
        fn_constructor_args=(args,),
        batch_size=args.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
    )
    recommendations.write_parquet(str(Path(args.output_dir).resolve()))


if __name__ == "__main__":
    main()
