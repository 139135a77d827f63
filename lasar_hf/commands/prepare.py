"""
Prepare a data set: read, split, embed, Semantic IDs, chains of thought, segments, tokenizer, samples, data card.

    python recipes/prepare.py --config recipes/toy/prepare.yaml

Your own interactions, a CSV file with three columns:

    python recipes/prepare.py --output_dir outputs/mine/data --tokenizer_size 2000 --source table --source_args \
        '{"interactions":"ratings.csv","user_column":"user","item_column":"item","time_column":"time"}'

Each step writes its files to `output_dir` and a mark to `steps/`. A second run repeats only the steps whose arguments
or input files changed, and the steps that read their files; a killed run resumes. Training reads the folder with
`lasar_hf.data.PreparedData`; `recipes/add_items.py` also reads `item_encoder/` and `quantizer/`.
"""

import logging
import math
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets

from .. import __version__
from ..arguments import check_choices, import_dotted, read_json_object
from ..data import (
    INSTRUCTIONS,
    PreparedData,
    build_tokenizer,
    global_time,
    leave_one_out,
    read_index,
    read_source,
    samples,
    write_routines,
)
from ..data.prepared_data import RARE_REPEATS, load_interactions, save_dataset, save_interactions
from ..data.readers import check_source_args, source_settings
from ..data.routines import SEGMENT
from ..data.splits import PARTS, Split, repeat_rate
from ..evaluation import compare_exclusion
from ..files import file_hash, read_json, write_json
from ..locks import locked
from ..model.catalog_lasar import SidCatalog
from ..model.configuration_lasar import check_sizes
from ..reasoning import Segmenter, TemplateTeacher
from ..semantic_ids import (
    ItemEncoder,
    TfidfEmbedder,
    build_semantic_ids,
    collaborative_embeddings,
    combine_views,
    format_report,
    item_text,
    quality_report,
    text_embeddings,
)
from ..steps import Step, run_steps
from .parser import ScriptParser


logger = logging.getLogger(__name__)

BATCH_SIZE = 65_536  # samples whose texts are in memory at a time


@dataclass
class PrepareArguments:
    """What to read and what to make of it."""

    source: str = field(
        metadata={
            "help": "toy, routines, table (your own files), amazon2014, amazon2018, amazon2023, a folder with "
            "<Name>.inter.json and <Name>.item.json, or the dotted path of a function that returns Interactions."
        }
    )
    output_dir: str = field(metadata={"help": "Folder to write."})
    source_args: dict | str | None = field(
        default=None, metadata={"help": 'Arguments of the source, such as {"interactions": "ratings.csv"}.'}
    )
    steps: list[str] | None = field(default=None, metadata={"help": "Steps to run; all by default."})
    split: str = field(
        default="leave_one_out", metadata={"help": "How to split.", "choices": ["leave_one_out", "global_time"]}
    )
    validation_share: float = field(default=0.1, metadata={"help": "global_time: share of the validation part."})
    test_share: float = field(default=0.1, metadata={"help": "global_time: share of the test part."})
    index: str | None = field(default=None, metadata={"help": "Ready-made Semantic IDs (.index.json), if any."})
    allow_collisions: bool = field(default=False, metadata={"help": "index: items may share a Semantic ID."})
    num_sid_levels: int = field(default=4, metadata={"help": "Number of codes per Semantic ID."})
    codebook_size: int = field(default=256, metadata={"help": "Number of codes per level."})
    quantizer: str = field(
        default="lasar_hf.semantic_ids.ResidualKMeans", metadata={"help": "Dotted path of the quantizer's class."}
    )
    embedding_model: str | None = field(
        default=None,
        metadata={
            "help": "sentence-transformers model for item text, as name or name@revision; TF-IDF and SVD by default."
        },
    )
    text_dim: int = field(default=128, metadata={"help": "Width of the TF-IDF vectors."})
    collaborative_dim: int = field(
        default=64, metadata={"help": "Width of the co-occurrence vectors (training part only); 0 leaves them out."}
    )
    collaborative_weight: float = field(default=1.0, metadata={"help": "Weight of the co-occurrence vectors."})
    targets: str = field(default="all", metadata={"help": "Training targets per user.", "choices": ["all", "last"]})
    max_history: int = field(default=200, metadata={"help": "Maximum number of history items of a sample."})
    teacher: str = field(
        default="template", metadata={"help": "Writer of the chains of thought.", "choices": ["template", "openai"]}
    )
    teacher_model: str | None = field(default=None, metadata={"help": "openai: name of the model."})
    teacher_base_url: str = field(default="http://localhost:8000/v1", metadata={"help": "openai: the endpoint."})
    teacher_concurrency: int = field(default=16, metadata={"help": "openai: number of concurrent requests."})
    teacher_allow_insecure_http: bool = field(
        default=False,
        metadata={"help": "openai: send the key also over http:// to another machine, where others can read it."},
    )
    max_latent_steps: int = field(default=8, metadata={"help": "Maximum number of segments of a chain of thought."})
    segment_model: str | None = field(
        default=None,
        metadata={"help": "sentence-transformers model for segmentation, as embedding_model; TF-IDF by default."},
    )
    tokenizer_size: int | None = field(
        default=None, metadata={"help": "Size of a BPE tokenizer to fit, for a backbone trained from scratch."}
    )
    instruction: str = field(
        default="Recommend the next item.", metadata={"help": "Text that the tokenizer is fitted to as well."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of embeddings and Semantic IDs."})

    def __post_init__(self):
        read_json_object(self, "source_args")
        check_choices(self)
        check_sizes(self.num_sid_levels, self.codebook_size, self.max_latent_steps)
        smallest = {
            "text_dim": 1, "collaborative_dim": 0, "collaborative_weight": 0.0, "max_history": 1, "seed": 0,
            "teacher_concurrency": 1, "tokenizer_size": 1,
        }  # fmt: skip
        for name, minimum in smallest.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected at least {minimum}.")
        if self.teacher == "openai" and not self.teacher_model:
            raise ValueError("teacher_model is missing; teacher=openai needs the name of the endpoint's model.")
        if self.allow_collisions and self.index is None:
            raise ValueError("allow_collisions needs index: Semantic IDs that are built never collide.")


def write_interactions(args: PrepareArguments, out: Path) -> None:
    """`items/`, `users/` and `interactions.json`: the source, split."""
    interactions = read_source(args.source, args.source_args)  # type: ignore[arg-type]
    show("Read", {
        "users": len(interactions.user_ids), "items": len(interactions.items),
        "interactions": interactions.num_interactions, **interactions.counts,
    })  # fmt: skip
    if args.split == "global_time":
        split = global_time(interactions, args.validation_share, args.test_share)
    else:
        split = leave_one_out(interactions)
    for part in PARTS:
        if not len(samples(split, part, "last", max_history=1)):
            raise ValueError(f"The {part} part has no samples: no user has a target and an item before it.")
    save_interactions(interactions, split, out)


def write_embeddings(args: PrepareArguments, out: Path) -> None:
    """`embeddings.npy`: a vector of each item's text, or id if it has none; `item_encoder/` for new items."""
    data, _ = load_interactions(args.output_dir)
    texts = [item_text(item | {"item_id": item_id}) for item, item_id in zip(data.items, data.item_ids, strict=True)]
    if args.embedding_model is None:
        embedder: TfidfEmbedder | str = TfidfEmbedder(args.text_dim, args.seed)
        vectors = embedder.fit_transform(texts)
    else:
        embedder = args.embedding_model
        vectors = text_embeddings(texts, model=embedder, cache_dir=embedding_cache(args))
    np.save(out / "embeddings.npy", vectors)
    ItemEncoder(embedder).save_pretrained(out / "item_encoder")


def write_semantic_ids(args: PrepareArguments, out: Path) -> None:
    """`catalog/`, `semantic_ids.json` (views and quality) and, unless the codes are given, `quantizer/`."""
    data, split = load_interactions(args.output_dir)
    # The text comes first: new items have no co-occurrence and only know the first columns.
    views, weights = {"text": np.load(Path(args.output_dir, "embeddings.npy"))}, {"text": 1.0}
    if args.collaborative_dim:
        vectors = collaborative_embeddings(split.train, len(data.items), args.collaborative_dim, args.seed)
        views["co-occurrence"], weights["co-occurrence"] = vectors, args.collaborative_weight
        if not any(map(item_text, data.items)):
            warnings.warn("No item has text; the Semantic IDs come from co-occurrence alone.", stacklevel=2)
            del views["text"]
            weights = {"co-occurrence": 1.0}
    vectors, quantizer = combine_views(list(views.values()), list(weights.values())), None
    if args.index is not None:
        codes = read_index(args.index, data.item_ids, args.num_sid_levels, args.codebook_size, args.allow_collisions)
    else:
        quantizer = import_dotted(args.quantizer)(args.num_sid_levels, args.codebook_size, args.seed)
        codes, quantizer = build_semantic_ids(vectors, quantizer=quantizer)
        quantizer.save_pretrained(out / "quantizer")
    titles = [item.get("title") for item in data.items]
    SidCatalog(codes, data.item_ids, args.allow_collisions, titles=titles).save_pretrained(out / "catalog")
    report = quality_report(codes, vectors, quantizer)
    logger.info("%s", format_report(report))
    view_sizes = {name: {"width": view.shape[1], "weight": weights[name]} for name, view in views.items()}
    write_json(out / "semantic_ids.json", {"quantizer": args.quantizer, "views": view_sizes} | report)


def write_chains(args: PrepareArguments, out: Path) -> None:
    """`chains.arrow` and `chains.json`: a chain of thought per training sample, and how many each teacher wrote."""
    data, split = load_interactions(args.output_dir)
    train = samples(split, "train", args.targets, args.max_history)
    teacher, batch_size = TemplateTeacher(data, split), BATCH_SIZE
    counts = {"teacher": "template", "requests": len(train)}
    if args.teacher == "openai":
        from lasar_hf.reasoning.openai_teacher import OpenAITeacher  # needs an optional package

        # The log is not in `out`, so that answers outlive a killed run.
        log_path = Path(args.output_dir, "teacher_log.jsonl")
        teacher = OpenAITeacher(  # type: ignore[assignment]
            data,
            args.teacher_model,
            args.teacher_base_url,
            log_path,
            teacher,
            args.teacher_concurrency,
            allow_insecure_http=args.teacher_allow_insecure_http,
        )
        batch_size = len(train)  # one call, so that its counts are those of all samples

    def write(batch: dict[str, list]) -> dict[str, list]:
        return {"chain_of_thought": teacher.chains_of_thought(batch)}

    map_to_file(train, write, out / "chains.arrow", Features(chain_of_thought=Value("string")), batch_size)
    if args.teacher == "openai":
        counts = {"teacher": "openai", "model": args.teacher_model} | teacher.counts  # type: ignore[attr-defined]
    write_json(out / "chains.json", counts)


def write_segments(args: PrepareArguments, out: Path) -> None:
    """`segments.arrow`: the chains of thought, cut into segments."""
    chains = open_arrow(Path(args.output_dir, "chains.arrow"))
    embed = None
    if args.segment_model:
        embed = partial(text_embeddings, model=args.segment_model, cache_dir=embedding_cache(args))
    segmenter = Segmenter(embed, args.max_latent_steps)
    segmenter.fit(batch["chain_of_thought"] for batch in chains.iter(BATCH_SIZE))

    def cut(batch: dict[str, list]) -> dict[str, list]:
        return {"segments": segmenter.cut(batch["chain_of_thought"])}

    map_to_file(chains, cut, out / "segments.arrow", Features(segments=List(Value("string"))), BATCH_SIZE)


def write_tokenizer(args: PrepareArguments, out: Path) -> None:
    """`tokenizer/`, if one is asked for: fitted to the items, the instructions and the segments."""
    if not args.tokenizer_size:
        return
    items = load_interactions(args.output_dir)[0].items
    batches = open_arrow(Path(args.output_dir, "segments.arrow")).iter(BATCH_SIZE)
    # Each distinct segment counts once, so that repeated wording does not dominate the vocabulary.
    segments = dict.fromkeys(chain.from_iterable(chain.from_iterable(batch["segments"] for batch in batches)))
    texts = [*INSTRUCTIONS.values(), args.instruction, *map(item_text, items), *segments]
    build_tokenizer(texts, args.tokenizer_size).save_pretrained(out / "tokenizer")


def write_samples(args: PrepareArguments, out: Path) -> None:
    """`samples/` and `prepared.json`: the (history, target) pairs with chains of thought and segments."""
    folder = Path(args.output_dir)
    interactions, split = load_interactions(folder)
    parts = {part: samples(split, part, args.targets, args.max_history) for part in PARTS}
    texts = [open_arrow(folder / name) for name in ("chains.arrow", "segments.arrow")]
    parts["train"] = concatenate_datasets([parts["train"], *texts], axis=1)
    save_dataset(DatasetDict(parts), out / "samples")
    write_json(
        out / "prepared.json",
        {"codebook_size": args.codebook_size, "max_history": args.max_history}
        | measure_repeats(split, parts["validation"], len(interactions.items)),
    )


def measure_repeats(split: Split, validation: Dataset, num_items: int) -> dict[str, Any]:
    """The repeat rate, and whether lists leave the history out: by rate if it is tiny, else as validation says."""
    rate = repeat_rate(split.train)
    if rate <= RARE_REPEATS or not len(validation):
        return {"repeat_rate": rate, "exclude_history": rate <= RARE_REPEATS}
    kept, excluded = compare_exclusion(split.train, validation["history"], validation["target"], num_items)
    logger.info(
        "%.2f %% of the training interactions repeat an item of the user. HR@10 of item-kNN on validation: %.4f with "
        "and %.4f without the history, so exclude_history is %s.",
        100 * rate,
        kept,
        excluded,
        excluded >= kept,
    )
    return {"repeat_rate": rate, "exclude_history": excluded >= kept}


def write_card(args: PrepareArguments, out: Path) -> None:
    """`data_card.json`: arguments, counts, description of the data, Semantic IDs and chains of thought."""
    folder = Path(args.output_dir)
    card = card_settings(args) | card_numbers(folder)
    card |= {name: read_json(folder / f"{name}.json") for name in ("semantic_ids", "chains")}
    write_json(out / "data_card.json", card)


def card_numbers(folder: Path) -> dict[str, Any]:
    """Counts and description of prepared data, with its repeat rate."""
    data = PreparedData.load(folder)
    batches = data.samples["train"].select_columns("segments").iter(BATCH_SIZE)
    num_segments = sum(len(segments) for batch in batches for segments in batch["segments"])
    description = read_json(folder / "interactions.json")["description"]
    counts = {
        "users": len(data.users),
        "items": len(data.items),
        "interactions": sum(description["split"][part] for part in PARTS),
        **{f"{part}_samples": len(table) for part, table in data.samples.items()},
        "mean_depth": round(num_segments / len(data.samples["train"]), 3),
    }
    show("Prepared", counts)
    repeats = {"repeat_rate": data.repeat_rate, "exclude_history": data.exclude_history}
    return {"counts": counts, "data": description | repeats}


def generated_steps(args: PrepareArguments) -> list[Step]:
    """The routines, which come with their own split, Semantic IDs and chains of thought; and their data card."""
    arguments: dict[str, Any] = args.source_args or {}  # type: ignore[assignment]
    check_source_args("routines", partial(write_routines, args.output_dir), arguments)
    settings = {"arguments": {"source": "routines", "source_args": arguments}, "lasar_hf": __version__}

    def write_generated_card(out: Path) -> None:
        write_json(out / "data_card.json", settings | card_numbers(Path(args.output_dir)))

    return [
        Step("routines", partial(write_routines, **arguments), {**arguments, "segment": SEGMENT}),
        Step("card", write_generated_card, settings, ("routines",)),
    ]


def card_settings(args: PrepareArguments) -> dict[str, Any]:
    """What the card says about the run: all arguments that decide what is written."""
    ignored = ("output_dir", "steps", "teacher_base_url", "teacher_concurrency", "teacher_allow_insecure_http")
    arguments = {name: value for name, value in asdict(args).items() if name not in ignored}
    return {"arguments": arguments, "lasar_hf": __version__}


def map_to_file(table: Dataset, function, path: Path, features: Features, batch_size: int) -> None:
    """Write the result of a function of batches to an Arrow file, so that memory holds one batch."""
    table.map(
        function,
        batched=True,
        batch_size=batch_size,
        remove_columns=table.column_names,
        features=features,
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint=path.stem,
    )


def open_arrow(path: Path) -> Dataset:
    """Open an Arrow file, memory-mapped; the fingerprint depends on the content, not on the time of writing."""
    return Dataset(Dataset.from_file(str(path)).data, fingerprint=file_hash(path)[:16])


def embedding_cache(args: PrepareArguments) -> Path:
    """Folder of sentence embeddings, which outlives a killed run."""
    return Path(args.output_dir, "embedding_cache")


def show(what: str, counts: dict[str, float]) -> None:
    """Log counts in one line. Users with fewer than three items are read, but not prepared by leave-one-out."""
    logger.info("%s: %s", what, ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))


def prepare_steps(args: PrepareArguments) -> list[Step]:
    """
    The steps, each with the arguments that decide its files and the steps whose files it reads. An argument that has
    no effect, such as `text_dim` with an `embedding_model`, is left out: changing it does not repeat a step.
    """

    def values(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names}

    source, split = source_settings(args.source, args.source_args), values("split")  # type: ignore[arg-type]
    if args.split == "global_time":
        split = values("split", "validation_share", "test_share")
    embeddings = values("embedding_model", "seed") | ({} if args.embedding_model else values("text_dim"))
    semantic_ids = values("num_sid_levels", "codebook_size", "collaborative_dim", "seed", "allow_collisions")
    semantic_ids |= {"index": file_hash(args.index)} if args.index else values("quantizer")
    if args.collaborative_dim:
        semantic_ids |= values("collaborative_weight")
    chains = values("targets", "max_history", "teacher")
    if args.teacher == "openai":
        chains |= values("teacher_model")
    segments = values("max_latent_steps", "segment_model")
    tokenizer = values("tokenizer_size", "instruction")
    return [
        Step("interactions", partial(write_interactions, args), source | split),
        Step("embeddings", partial(write_embeddings, args), embeddings, ("interactions",)),
        Step("semantic_ids", partial(write_semantic_ids, args), semantic_ids, ("interactions", "embeddings")),
        Step("chains", partial(write_chains, args), chains, ("interactions",)),
        Step("segments", partial(write_segments, args), segments, ("chains",)),
        Step("tokenizer", partial(write_tokenizer, args), tokenizer, ("interactions", "segments")),
        Step(
            "samples",
            partial(write_samples, args),
            values("targets", "max_history", "codebook_size"),
            ("interactions", "semantic_ids", "chains", "segments"),
        ),
        Step("card", partial(write_card, args), card_settings(args), ("samples", "tokenizer")),
    ]


def prepare(args: PrepareArguments) -> list[str]:
    """Run the steps that are not up to date; returns their names."""
    with locked(args.output_dir):
        steps = generated_steps(args) if args.source == "routines" else prepare_steps(args)
        return run_steps(args.output_dir, steps, args.steps)


def run() -> None:
    """Run the command with the arguments of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare(*ScriptParser((PrepareArguments,), __doc__).parse_args_and_config())


if __name__ == "__main__":
    run()
