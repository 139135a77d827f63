"""
Prepare a data set: read, split, Semantic IDs, chains of thought, segments.

    python recipes/prepare.py --config recipes/scientific/prepare.yaml

Leaves `items/`, `samples/` (see `lasar_hf.data.PreparedData`), `catalog/`, `quantizer/`, `tokenizer/` (where one is
fitted) and `data_card.json` in `output_dir`. A second run with the same arguments does nothing.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import DatasetDict
from trl import TrlParser

from lasar_hf import SidCatalog, __version__
from lasar_hf.data import (
    PreparedData,
    TemplateTeacher,
    build_tokenizer,
    leave_one_out,
    read_index,
    read_lcrec,
    samples,
    segment,
    toy_shop,
)
from lasar_hf.semantic_ids import (
    build_semantic_ids,
    collaborative_embeddings,
    combine_views,
    item_text,
    quality_report,
    text_embeddings,
)


logger = logging.getLogger("prepare")


@dataclass
class PrepareArguments:
    """What to prepare and how."""

    output_dir: str = field(metadata={"help": "Folder to write."})
    source: str = field(metadata={"help": "Folder in the .inter.json / .item.json layout, or `toy`."})
    index: str | None = field(
        default=None, metadata={"help": "Ready-made .index.json; Semantic IDs are built if not given."}
    )
    num_sid_levels: int = field(default=4, metadata={"help": "Codes of one Semantic ID."})
    codebook_size: int = field(default=256, metadata={"help": "Codes a level."})
    embedding_model: str | None = field(
        default=None, metadata={"help": "sentence-transformers model for item text; TF-IDF and SVD if not given."}
    )
    text_dim: int = field(default=128, metadata={"help": "Dimensions of the TF-IDF view."})
    collaborative_dim: int = field(
        default=64, metadata={"help": "Dimensions of the co-occurrence view (training part only); 0 leaves it out."}
    )
    collaborative_weight: float = field(default=1.0, metadata={"help": "Weight of the co-occurrence view."})
    targets: str = field(
        default="all", metadata={"help": "Training targets of a user.", "choices": ["all", "last"]}
    )
    max_latent_steps: int = field(default=8, metadata={"help": "Most segments of a chain of thought."})
    tokenizer_size: int | None = field(
        default=None, metadata={"help": "Fit a BPE tokenizer of this size, for a backbone trained from scratch."}
    )
    toy_users: int = field(default=600, metadata={"help": "Users of the toy shop."})
    toy_items: int = field(default=192, metadata={"help": "Items of the toy shop."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})


def semantic_ids(args: PrepareArguments, interactions, split, folder: Path):
    """Codes `(I, M)` and their quality report; the quantizer is saved when there is one."""
    texts = [item_text(item) for item in interactions.items]
    views, weights = [text_embeddings(texts, args.text_dim, args.seed, model=args.embedding_model)], [1.0]
    if args.collaborative_dim:
        view = collaborative_embeddings(split.train, len(texts), args.collaborative_dim, args.seed)
        views, weights = [*views, view], [*weights, args.collaborative_weight]
    embeddings = combine_views(views, weights)
    if args.index is not None:
        codes = read_index(args.index, interactions.item_ids, args.num_sid_levels, args.codebook_size)
        return codes, quality_report(codes, embeddings)
    codes, quantizer = build_semantic_ids(embeddings, args.num_sid_levels, args.codebook_size, args.seed)
    quantizer.save_pretrained(folder / "quantizer")
    return codes, quality_report(codes, embeddings, quantizer)


def prepare(args: PrepareArguments) -> None:
    """Run the chain; `data_card.json` is written last and marks the folder as complete."""
    folder, card_path = Path(args.output_dir), Path(args.output_dir, "data_card.json")
    if card_path.exists() and json.loads(card_path.read_text())["arguments"] == asdict(args):
        logger.info("%s is up to date.", folder)
        return
    card_path.unlink(missing_ok=True)
    toy = args.source == "toy"
    interactions = toy_shop(args.toy_users, args.toy_items, args.seed) if toy else read_lcrec(args.source)
    split = leave_one_out(interactions)
    logger.info("%d users, %d items; %d users skipped.", len(split.user_ids), len(interactions.items), split.num_skipped)

    codes, report = semantic_ids(args, interactions, split, folder)
    SidCatalog(codes, interactions.item_ids).save_pretrained(folder / "catalog")
    if args.tokenizer_size:
        texts = [item_text(item) for item in interactions.items]
        build_tokenizer(texts, args.tokenizer_size).save_pretrained(folder / "tokenizer")

    train = samples(split, "train", args.targets)
    teacher = TemplateTeacher(interactions, split)
    chains = [teacher.chain_of_thought(h, t) for h, t in zip(train["history"], train["target"], strict=True)]
    segments = segment(chains, max_segments=args.max_latent_steps)
    train = train.add_column("chain_of_thought", chains).add_column("segments", segments)
    held_out = {name: samples(split, name) for name in ("validation", "test")}
    table = PreparedData.item_table(interactions, codes)
    PreparedData(table, DatasetDict(train=train, **held_out), args.codebook_size).save(folder)

    depths = [len(parts) for parts in segments]
    counts = {
        "users": len(split.user_ids), "users_skipped": split.num_skipped, "items": len(interactions.items),
        "interactions": interactions.num_interactions, "train_samples": len(train),
        "mean_depth": round(sum(depths) / len(depths), 3),
    }
    card = {"arguments": asdict(args), "lasar_hf": __version__, "counts": counts, "semantic_ids": report}
    partial = card_path.with_suffix(".tmp")
    partial.write_text(json.dumps(card, indent=2, default=float) + "\n", encoding="utf-8")
    os.replace(partial, card_path)
    logger.info("%s", json.dumps(counts))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (arguments,) = TrlParser((PrepareArguments,)).parse_args_and_config()
    prepare(arguments)
