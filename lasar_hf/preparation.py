"""Steps of a preparation that need no model: each reads files of `folder` and writes to `out` (see `run_steps`)."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from .data.card import describe
from .data.interactions import Interactions
from .data.prepared_data import PreparedData
from .data.sources import SourceArguments, read_source
from .data.splits import Split, TimeSplit, global_time, leave_one_out, samples
from .data.storage import (
    BATCH_ROWS,
    load_interactions,
    load_split,
    load_texts,
    save_interactions,
    save_split,
    save_texts,
)
from .files import write_json
from .reasoning.segments import Embed, Segmenter
from .reasoning.template_teacher import TemplateTeacher


logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")


def load_base(folder: Path) -> tuple[Interactions, Split | TimeSplit]:
    """What the first two steps left."""
    return load_interactions(folder / "interactions"), load_split(folder / "split")


def write_interactions(folder: Path, out: Path, source: SourceArguments, seed: int) -> None:
    """`interactions/`: the source, read, checked and filtered."""
    interactions = read_source(source, seed)
    _show(_sizes(interactions) | interactions.counts)
    save_interactions(interactions, out / "interactions")


def write_split(folder: Path, out: Path, split: str, validation_share: float, test_share: float) -> None:
    """`split/`: leave-one-out or global time."""
    interactions = load_interactions(folder / "interactions")
    by_time = split == "global_time"
    parts = global_time(interactions, validation_share, test_share) if by_time else leave_one_out(interactions)
    for name in PARTS:
        if not len(samples(parts, name, "last", max_history=1)):
            raise ValueError(f"the {name} part has no sample: no user has an item to predict and one before it there.")
    save_split(parts, out / "split")


def write_chains(
    folder: Path,
    out: Path,
    targets: str,
    max_history: int,
    teacher: str,
    teacher_model: str | None,
    base_url: str = "",
    concurrency: int = 16,
) -> None:
    """`chains.arrow` and `chains.json`: a chain of thought a training sample, and who wrote how many."""
    interactions, split = load_base(folder)
    train = samples(split, "train", targets, max_history)
    template = TemplateTeacher(interactions, split)
    if teacher == "template":
        parts = (train.select(range(*rows)) for rows in _batches(len(train)))
        save_texts((template.chains_of_thought(part) for part in parts), out / "chains.arrow")
        counts = {"teacher": teacher, "requests": len(train)}
    else:
        from .reasoning.openai_teacher import OpenAITeacher  # its HTTP client is slow to import

        log_path = folder / "teacher_log.jsonl"  # not in `out`: it outlives a run that is killed
        model = OpenAITeacher(interactions, teacher_model, base_url, log_path, template, concurrency)
        save_texts([model.chains_of_thought(train)], out / "chains.arrow")
        counts = {"teacher": teacher, "model": teacher_model} | model.counts
    write_json(out / "chains.json", counts)


def write_segments(folder: Path, out: Path, max_latent_steps: int, embed: Embed | None) -> None:
    """`segments.arrow`: the chains, cut; read once to learn what a usual gap is, and once to cut."""
    chains = load_texts(folder / "chains.arrow")
    segmenter = Segmenter(embed, max_latent_steps).fit(_texts(chains))
    save_texts(map(segmenter.cut, _texts(chains)), out / "segments.arrow", nested=True)


def write_samples(
    folder: Path, out: Path, codes: np.ndarray, targets: str, max_history: int, codebook_size: int
) -> None:
    """`items/`, `samples/` and `prepared.json`, see `PreparedData`."""
    interactions, split = load_base(folder)
    parts = {name: samples(split, name, targets, max_history) for name in PARTS}
    chains, segments = (load_texts(folder / f"{name}.arrow") for name in ("chains", "segments"))
    columns = [chains.rename_column("text", "chain_of_thought"), segments.rename_column("text", "segments")]
    parts["train"] = concatenate_datasets([parts["train"], *columns], axis=1)
    items = PreparedData.item_table(interactions, codes)
    PreparedData(items, DatasetDict(parts), codebook_size, max_history=max_history).save(out)


def write_card(folder: Path, out: Path, arguments: dict[str, object], lasar_hf: str) -> None:
    """`data_card.json`: arguments, counts, order and split of the data, Semantic IDs, chains."""
    interactions, split = load_base(folder)
    prepared = PreparedData.load(folder)
    train = prepared.samples["train"].select_columns("segments")
    num_segments = sum(len(parts) for batch in train.iter(BATCH_ROWS) for parts in batch["segments"])
    counts = {
        **_sizes(interactions),
        "users": len(split.user_ids),
        **{f"{name}_samples": len(part) for name, part in prepared.samples.items()},
        "mean_depth": round(num_segments / len(train), 3),
    }
    _show(counts)
    card = {"arguments": arguments, "lasar_hf": lasar_hf, "counts": counts, "data": describe(interactions, split)}
    for name in ("semantic_ids", "chains"):
        card[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    write_json(out / "data_card.json", card)


def _batches(size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of each batch."""
    return ((start, min(start + BATCH_ROWS, size)) for start in range(0, size, BATCH_ROWS))


def _texts(chains: Dataset) -> Iterator[list[str]]:
    return (batch["text"] for batch in chains.iter(BATCH_ROWS))


def _sizes(interactions: Interactions) -> dict[str, int]:
    return {
        "users": len(interactions.user_ids),
        "items": len(interactions.items),
        "interactions": interactions.num_interactions,
    }


def _show(counts: dict[str, float]) -> None:
    logger.info(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
