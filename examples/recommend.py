"""
Recommend with a checkpoint: item ids or titles in, items with titles out.

    python examples/recommend.py outputs/quickstart/model item-12 item-40 item-13
"""

import argparse

from lasar_hf import Recommender
from lasar_hf.terminal import printable


def main() -> None:
    """Read a history from the command line and print the recommended items."""
    parser = argparse.ArgumentParser(description="Recommend the next items for one user.")
    parser.add_argument("model", help="folder of a checkpoint, or a model id on the Hub")
    parser.add_argument("history", nargs="+", help="item ids or titles, oldest first")
    parser.add_argument("--top_k", type=int, default=10, help="items to recommend")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    args = parser.parse_args()

    try:
        recommender = Recommender.from_pretrained(args.model, revision=args.revision)
        (result,) = recommender.recommend([args.history], top_k=args.top_k)
    except (OSError, ValueError) as error:
        parser.error(printable(str(error)))
    print(f"{result['latent_steps']} latent steps")
    for item in result["items"]:
        print(f"{item['score']:7.3f}  {printable(item['item_id']):>8}  {printable(item['title'] or '')}")


if __name__ == "__main__":
    main()
