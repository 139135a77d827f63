"""
The job of recipes/recommend.py on Ray Data, for clusters that run Ray. Each worker has its own copy of the model.

    pip install "lasar_hf[ray]"
    python examples/ray_recommend.py outputs/scientific/grpo histories.parquet recommendations --workers 2
"""

import argparse
from pathlib import Path

import ray

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.evaluation import recommend_samples


class Recommender:
    """
    Loads a checkpoint once and recommends for the batches that Ray passes.

    Args:
        args (`argparse.Namespace`):
            The command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.processor = LasarProcessor.from_pretrained(args.model)
        device = "cuda" if args.gpus_per_worker else "cpu"
        self.model = LasarForGenerativeRec.from_pretrained(args.model).to(device).eval()

    def __call__(self, batch: dict) -> dict:
        """`user_id` and `history` (item ids, oldest first) to `user_id`, `item_ids`, `scores` and `latent_steps`."""
        histories = [self.item_indices(*pair) for pair in zip(batch["user_id"], batch["history"], strict=True)]
        output = recommend_samples(
            self.model, {"history": histories}, self.processor, self.args.top_k, self.args.num_beams,
            self.args.latent_steps, exclude_history=self.args.exclude_history,
        )
        decoded = self.processor.decode_recommendations(output)
        return {
            "user_id": [str(user) for user in batch["user_id"]],
            "item_ids": [[entry["item_id"] for entry in entries] for entries in decoded],
            "scores": [[entry["score"] for entry in entries] for entries in decoded],
            "latent_steps": output.latent_steps,
        }

    def item_indices(self, user, history) -> list[int]:
        """A history as item indices; errors name the user."""
        try:
            if history is None or not len(history):
                raise ValueError("the history is empty.")
            return self.processor.item_indices([str(item) for item in history])
        except ValueError as error:
            raise ValueError(f"user {str(user)!r}: {error}") from error


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
    parser.add_argument("--exclude_history", action="store_true", help="Leave out the items of the history.")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())  # workers have another working directory
    read = ray.data.read_parquet if args.histories.endswith(".parquet") else ray.data.read_json
    recommendations = read(str(Path(args.histories).resolve())).map_batches(
        Recommender, fn_constructor_args=(args,), batch_size=args.batch_size, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=args.workers), num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
    )
    recommendations.write_parquet(str(Path(args.output_dir).resolve()))


if __name__ == "__main__":
    main()
