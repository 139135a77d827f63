"""
Recommend with a checkpoint: item ids in, items with titles out.

    python examples/recommend.py outputs/quickstart/model item-12 item-40 item-13
"""

import argparse

from lasar_hf import LasarForGenerativeRec, LasarProcessor


def main() -> None:
    """Read a history from the command line and print the recommended items."""
    parser = argparse.ArgumentParser(description="Recommend the next items for one user.")
    parser.add_argument("model", help="checkpoint with its processor and catalogue")
    parser.add_argument("history", nargs="+", help="item ids, oldest first")
    parser.add_argument("--top_k", type=int, default=10, help="items to recommend")
    args = parser.parse_args()

    processor = LasarProcessor.from_pretrained(args.model)
    model = LasarForGenerativeRec.from_pretrained(args.model).eval()
    known = [item for item in args.history if item in processor.catalog.index_of]
    if not known:
        parser.error("the catalogue has no item of the history.")
    if len(known) < len(args.history):
        print(f"{len(args.history) - len(known)} unknown items are left out")
    output = model.recommend(**processor([known]), catalog=processor.catalog, top_k=args.top_k)
    print(f"{int(output.latent_steps[0])} latent steps")
    for entry in processor.decode_recommendations(output)[0]:
        print(f"{entry['score']:7.3f}  {entry['item_id']:>8}  {entry['title'] or ''}")


if __name__ == "__main__":
    main()
