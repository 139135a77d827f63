"""
Prepare a data set: read, split, embed, Semantic IDs, chains of thought, segments, tokenizer, samples, data card.

    python recipes/prepare.py --config recipes/scientific/prepare.yaml

Your own interactions, a CSV of three columns:

    python recipes/prepare.py --output_dir outputs/mine/data --source table --interactions ratings.csv \
        --user_column user --item_column item --time_column time --tokenizer_size 2000

Each step leaves its files in `output_dir` and a mark in `steps/`. A second run does what is missing or what has other
arguments or input files than before, and what follows from it; a run that was killed goes on where it was. Training
reads `items/`, `samples/`, `split/` (`lasar_hf.data.PreparedData`), `catalog/`, `quantizer/` and `tokenizer/`;
`recipes/add_items.py` reads `item_encoder/` and `quantizer/`.
"""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from trl import TrlParser

import lasar_hf.data as data
from lasar_hf import SidCatalog, __version__, files, preparation, steps
from lasar_hf.arguments import check_choices
from lasar_hf.model.configuration_lasar import check_sizes
from lasar_hf.semantic_ids import (
    ItemEncoder,
    TfidfView,
    build_semantic_ids,
    collaborative_embeddings,
    combine_views,
    format_report,
    item_text,
    quality_report,
    text_embeddings,
)


@dataclass
class PrepareArguments:
    """What to make of the source."""

    output_dir: str = field(metadata={"help": "Folder to write."})
    steps: list[str] | None = field(default=None, metadata={"help": "Run these steps only; all if not given."})
    split: str = field(
        default="leave_one_out", metadata={"help": "How to split.", "choices": ["leave_one_out", "global_time"]}
    )
    validation_share: float = field(default=0.1, metadata={"help": "global_time: share of the validation part."})
    test_share: float = field(default=0.1, metadata={"help": "global_time: share of the test part."})
    index: str | None = field(default=None, metadata={"help": "Ready-made .index.json; else Semantic IDs are built."})
    allow_collisions: bool = field(default=False, metadata={"help": "index: two items may share a Semantic ID."})
    num_sid_levels: int = field(default=4, metadata={"help": "Codes of one Semantic ID."})
    codebook_size: int = field(default=256, metadata={"help": "Codes a level."})
    balanced: bool = field(
        default=False, metadata={"help": "Use a level's codes equally often (before collisions are resolved)."}
    )
    embedding_model: str | None = field(
        default=None, metadata={"help": "sentence-transformers model for item text; TF-IDF and SVD if not given."}
    )
    text_dim: int = field(default=128, metadata={"help": "Dimensions of the TF-IDF view."})
    collaborative_dim: int = field(
        default=64, metadata={"help": "Dimensions of the co-occurrence view (training part only); 0 leaves it out."}
    )
    collaborative_weight: float = field(default=1.0, metadata={"help": "Weight of the co-occurrence view."})
    targets: str = field(default="all", metadata={"help": "Training targets of a user.", "choices": ["all", "last"]})
    max_history: int = field(default=200, metadata={"help": "Newest items of a history that a sample keeps."})
    teacher: str = field(
        default="template", metadata={"help": "Who writes the chains of thought.", "choices": ["template", "openai"]}
    )
    teacher_model: str | None = field(default=None, metadata={"help": "openai: name of the model."})
    teacher_base_url: str = field(default="http://localhost:8000/v1", metadata={"help": "openai: the endpoint."})
    teacher_concurrency: int = field(default=16, metadata={"help": "openai: requests at a time."})
    max_latent_steps: int = field(default=8, metadata={"help": "Most segments of a chain of thought."})
    segment_model: str | None = field(
        default=None, metadata={"help": "sentence-transformers model that finds segments; TF-IDF if not given."}
    )
    tokenizer_size: int | None = field(
        default=None, metadata={"help": "Fit a BPE tokenizer of this size, for a backbone trained from scratch."}
    )
    instruction: str = field(default="Recommend the next item.", metadata={"help": "The tokenizer is fitted to it."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})

    def __post_init__(self):
        check_choices(self)
        check_sizes(self.num_sid_levels, self.codebook_size, self.max_latent_steps)
        least = {
            "text_dim": 1, "collaborative_dim": 0, "collaborative_weight": 0.0, "max_history": 1, "seed": 0,
            "teacher_concurrency": 1, "tokenizer_size": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {smallest}.")


def write_embeddings(folder: Path, out: Path, embedding_model: str | None, text_dim: int, seed: int) -> None:
    """`embeddings.npy`: a vector an item, of its text or, where it has none, its id; `item_encoder/` for new items."""
    table = data.load_interactions(folder / "interactions")
    texts = [item_text(item | {"item_id": name}) for item, name in zip(table.items, table.item_ids, strict=True)]
    if embedding_model is None:
        view = TfidfView(text_dim, seed)
        vectors = view.fit_transform(texts)
    else:
        view = embedding_model
        cache = folder / "embedding_cache"  # not in `out`: it outlives a run that is killed
        vectors = text_embeddings(texts, model=embedding_model, cache_dir=cache)
    np.save(out / "embeddings.npy", vectors)
    ItemEncoder(view).save_pretrained(out / "item_encoder")


def write_semantic_ids(
    folder: Path, out: Path, index: str | None, num_sid_levels: int, codebook_size: int, balanced: bool,
    collaborative_dim: int, collaborative_weight: float, seed: int, allow_collisions: bool,
) -> None:  # fmt: skip
    """`catalog/`, `semantic_ids.json` (views and quality) and, unless the codes are given, `quantizer/`."""
    table, split = preparation.load_base(folder)
    # The text comes first: of a new item only the first columns are known.
    views, weights = {"text": np.load(folder / "embeddings.npy")}, {"text": 1.0}
    if collaborative_dim:
        views["co-occurrence"] = collaborative_embeddings(split.train, len(table.items), collaborative_dim, seed)
        weights["co-occurrence"] = collaborative_weight
        if not any(map(item_text, table.items)):
            warnings.warn("no item has text: Semantic IDs come from co-occurrence alone.", stacklevel=2)
            views, weights = {"co-occurrence": views["co-occurrence"]}, {"co-occurrence": 1.0}
    vectors, quantizer = combine_views(list(views.values()), list(weights.values())), None
    if index is not None:
        codes = data.read_index(index, table.item_ids, num_sid_levels, codebook_size, allow_collisions)
    else:
        codes, quantizer = build_semantic_ids(vectors, num_sid_levels, codebook_size, seed, balanced)
        quantizer.save_pretrained(out / "quantizer")
    SidCatalog(codes, table.item_ids, allow_collisions).save_pretrained(out / "catalog")
    report = quality_report(codes, vectors, quantizer)
    logging.info("%s", format_report(report))
    made_of = {name: {"width": view.shape[1], "weight": weights[name]} for name, view in views.items()}
    files.write_json(out / "semantic_ids.json", {"views": made_of} | report)


def write_tokenizer(folder: Path, out: Path, tokenizer_size: int | None, instruction: str) -> None:
    """`tokenizer/`, where one is asked for: fitted to the items, the instructions and the segments."""
    if tokenizer_size:
        items = data.load_interactions(folder / "interactions").items
        texts = [*data.INSTRUCTIONS.values(), instruction, *map(item_text, items)]
        # Once each: repeated wording would crowd out the rest.
        segments = dict.fromkeys(chain.from_iterable(data.load_texts(folder / "segments.arrow")["text"]))
        data.build_tokenizer([*texts, *segments], tokenizer_size).save_pretrained(out / "tokenizer")


def write_segments(folder: Path, out: Path, max_latent_steps: int, segment_model: str | None) -> None:
    """`segments.arrow`: the chains of thought, cut."""
    cache = folder / "embedding_cache"  # not in `out`: it outlives a run that is killed
    embed = partial(text_embeddings, model=segment_model, cache_dir=cache) if segment_model else None
    preparation.write_segments(folder, out, max_latent_steps, embed)


def write_samples(folder: Path, out: Path, **settings: object) -> None:
    """`items/`, `samples/` and `prepared.json`."""
    preparation.write_samples(folder, out, SidCatalog.from_pretrained(folder / "catalog").codes.numpy(), **settings)


def unused(args: PrepareArguments) -> set[str]:
    """Arguments that the others leave without effect: a change of theirs is no reason to run a step again."""
    in_use = {
        "validation_share": args.split == "global_time",
        "test_share": args.split == "global_time",
        "text_dim": args.embedding_model is None,
        "collaborative_weight": args.collaborative_dim > 0,
        "balanced": args.index is None,
        "teacher_model": args.teacher == "openai",
    }
    return {name for name, is_used in in_use.items() if not is_used}


def prepare(args: PrepareArguments, source: data.SourceArguments) -> list[str]:
    """Run the steps that are not up to date; returns their names."""
    if args.teacher == "openai" and not args.teacher_model:
        raise ValueError("teacher is openai: name the endpoint's model by teacher_model.")
    if args.allow_collisions and args.index is None:
        raise ValueError("allow_collisions belongs to a ready-made index: Semantic IDs that are built never collide.")
    folder = Path(args.output_dir)

    def step(run: Callable, after: str = "", names: str = "", bound: dict | None = None, **more: object) -> steps.Step:
        """A step gets the arguments named, and they are its fingerprint with `more`; `bound` only its function."""
        settings = {name: getattr(args, name) for name in names.split()}
        name = run.__name__.removeprefix("write_")
        run = partial(run, folder, **settings, **bound or {})
        deciding = {key: value for key, value in settings.items() if key not in idle}
        return steps.Step(name, run, deciding | more, tuple(after.split()))

    idle = unused(args)
    sids = "num_sid_levels codebook_size balanced collaborative_dim collaborative_weight seed allow_collisions"
    index = files.file_hash(args.index) if args.index else None
    unsaid = ("output_dir", "steps", "teacher_base_url", "teacher_concurrency")  # they do not decide what is written
    card = {"arguments": {k: v for k, v in (asdict(source) | asdict(args)).items() if k not in unsaid}}
    card["lasar_hf"] = __version__
    endpoint = {"base_url": args.teacher_base_url, "concurrency": args.teacher_concurrency}
    read = {"source": source, "seed": args.seed}
    return steps.run_steps(folder, [
        step(preparation.write_interactions, bound=read, **data.source_settings(source, args.seed)),
        step(preparation.write_split, "interactions", "split validation_share test_share"),
        step(write_embeddings, "interactions", "embedding_model text_dim seed"),
        step(write_semantic_ids, "interactions split embeddings", sids, {"index": args.index}, index=index),
        step(preparation.write_chains, "interactions split", "targets max_history teacher teacher_model", endpoint),
        step(write_segments, "chains", "max_latent_steps segment_model"),
        step(write_tokenizer, "interactions segments", "tokenizer_size instruction"),
        step(write_samples, "interactions split semantic_ids chains segments", "targets max_history codebook_size"),
        step(preparation.write_card, "samples tokenizer", bound=card, **card),
    ], args.steps)  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare(*TrlParser((PrepareArguments, data.SourceArguments)).parse_args_and_config())
