"""
Recommend with a checkpoint: item ids in, item ids out.

    python examples/recommend.py outputs/quickstart/model 12 40 13
"""

import argparse

from transformers import AutoTokenizer

from lasar_hf import LasarForGenerativeRec, SidCatalog
from lasar_hf.data import LasarProcessor


def main() -> None:
    """Read a history from the command line and print the items to recommend."""
    parser = argparse.ArgumentParser(description="Recommend the next items of one user.")
    parser.add_argument("model", help="checkpoint with model, tokenizer and catalogue")
    parser.add_argument("history", nargs="+", help="item ids, oldest first")
    parser.add_argument("--top_k", type=int, default=10, help="items to recommend")
    parser.add_argument("--instruction", default="", help="text before the history, as in training")
    args = parser.parse_args()

    model = LasarForGenerativeRec.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    catalog = SidCatalog.from_pretrained(args.model)
    processor = LasarProcessor(tokenizer, catalog.codes.numpy(), args.instruction)

    index_of = {item_id: row for row, item_id in enumerate(catalog.item_ids)}
    unknown = [item for item in args.history if item not in index_of]
    if unknown:
        parser.error(f"the catalogue has no item {unknown[0]!r}")
    text = processor.prompt_text([index_of[item_id] for item_id in args.history])
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    result = model.recommend(prompt.input_ids, prompt.attention_mask, catalog, top_k=args.top_k)
    print(f"{int(result.latent_steps[0])} latent steps")
    for row, score in zip(result.items[0].tolist(), result.scores[0].tolist(), strict=True):
        if row >= 0:
            print(f"{catalog.item_ids[row]}\t{score:.3f}")


if __name__ == "__main__":
    main()
