"""
The job of recipes/recommend.py on Ray Data, for clusters that run it: one actor a worker, each with its own model.

    pip install "lasar_hf[ray]"
    python examples/ray_recommend.py outputs/scientific/grpo histories.parquet recommendations --workers 2
"""

import argparse
from pathlib import Path

import ray
from transformers import AutoTokenizer

from lasar_hf import LasarForGenerativeRec, SidCatalog
from lasar_hf.data import LasarProcessor
from lasar_hf.evaluation import recommend_samples


class Recommender:
    """
    Loads a checkpoint once and recommends for the batches that Ray hands it.

    Args:
        args (`argparse.Namespace`):
            The command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.catalog = SidCatalog.from_pretrained(args.model)
        device = "cuda" if args.gpus_per_worker else "cpu"
        self.model = LasarForGenerativeRec.from_pretrained(args.model).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.processor = LasarProcessor(tokenizer, self.catalog.codes.numpy(), args.instruction, args.max_history)

    def __call__(self, batch: dict) -> dict:
        """`user_id` and `history` (item ids, oldest first) to `user_id`, `item_ids`, `scores` and `latent_steps`."""
        histories = [self.rows(*row) for row in zip(batch["user_id"], batch["history"], strict=True)]
        found = recommend_samples(
            self.model, {"history": histories}, self.processor, self.catalog, self.args.top_k, self.args.num_beams,
            self.args.latent_steps, exclude_history=self.args.exclude_history,
        )
        item_ids = [[self.catalog.item_ids[item] for item in row if item >= 0] for row in found.items]
        scores = [row[: len(items)].tolist() for row, items in zip(found.scores, item_ids, strict=True)]
        users = [str(user) for user in batch["user_id"]]
        return {"user_id": users, "item_ids": item_ids, "scores": scores, "latent_steps": found.latent_steps}

    def rows(self, user, history) -> list[int]:
        """Item rows of a history."""
        if history is None or not len(history):
            raise ValueError(f"The history of user {str(user)!r} is empty.")
        unknown = [item for item in map(str, history) if item not in self.catalog.index_of]
        if unknown:
            raise ValueError(f"User {str(user)!r} has the item {unknown[0]!r}, which the catalogue lacks.")
        return [self.catalog.index_of[str(item)] for item in history]


def main() -> None:
    """Read the histories, recommend, write Parquet."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("model", help="Checkpoint with its tokenizer and catalogue.")
    parser.add_argument("histories", help="`.parquet` or `.jsonl` with `user_id` and `history` (item ids).")
    parser.add_argument("output_dir", help="Folder of the Parquet files.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus_per_worker", type=float, default=0)
    # Workers that claim every core of a cluster leave none to read and to write: Ray would wait for ever.
    parser.add_argument("--cpus_per_worker", type=float, default=0.5)
    parser.add_argument("--top_k", type=int, default=10)
    parser.add_argument("--num_beams", type=int, default=50)
    parser.add_argument("--latent_steps", type=int, help="Fixed depth; the policy head's choice if not given.")
    parser.add_argument("--exclude_history", action="store_true", help="Never recommend an item of the history.")
    parser.add_argument("--instruction", default="Recommend the next item.")
    parser.add_argument("--max_history", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())  # workers have another working folder
    read = ray.data.read_parquet if args.histories.endswith(".parquet") else ray.data.read_json
    recommended = read(str(Path(args.histories).resolve())).map_batches(
        Recommender, fn_constructor_args=(args,), batch_size=args.batch_size, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=args.workers), num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
    )
    recommended.write_parquet(str(Path(args.output_dir).resolve()))


if __name__ == "__main__":
    main()
