"""
Rank the whole catalogue for held-out users: popularity, Markov, item-kNN, EASE, SASRec, item memory, then checkpoints.

A model is `name=path` or, with `N` latent steps for every user, `name=path@N` (`@0` is direct generation). One that
was trained on the task `explicit` is `name=path@text`: it writes a chain of thought before the item. Prints the tables
and writes `report.json` and `report.md`, with the significance of each difference between neighbouring rows (a
bootstrap over users). The prompt format is that of each checkpoint. A checkpoint with an item memory
(recipes/memory.py) has a second row, `name + memory`. Item-kNN, EASE and SASRec are tuned on validation users.
SASRec has a row if cornac is installed (`pip install "lasar_hf[baselines]"`). `lists.npz` has the list and the depth
of every user.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..arguments import check_choices, read_switch
from ..card import add_results, data_name
from ..data import PreparedData
from ..evaluation import (
    BASELINES,
    WITH_MEMORY,
    baseline_rankings,
    comparison_table,
    evaluate_recommendations,
    exclusion_note,
    hits_per_user,
    matrix_ranking,
    mean_interval,
    memory_matrix,
    ndcg_per_user,
    paired_bootstrap,
    ranks,
    recommend_samples,
    save_report,
    similar_items,
    slice_report,
    slice_table,
    slices,
    tune_memory,
    tuning_notes,
)
from ..files import atomic_file
from ..locks import locked
from ..model.configuration_lasar import LasarConfig
from ..model.memory_lasar import ItemMemory
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from ..onednn import onednn_linear
from ..processes import locked_for_all
from .parser import ScriptParser


logger = logging.getLogger(__name__)

TOP_K = 20


@dataclass
class EvaluateArguments:
    """Arguments of an evaluation."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    output_dir: str = field(metadata={"help": "Folder of the report."})
    models: list[str] = field(
        default_factory=list, metadata={"help": "`name=path`, `name=path@N` or `name=path@text`."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of models on the Hub; folders have none."}
    )
    split: str = field(default="test", metadata={"help": "Part to evaluate on.", "choices": ["validation", "test"]})
    users: int = field(default=0, metadata={"help": "Largest number of users, drawn at random; 0 for all."})
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})
    memory: bool = field(default=True, metadata={"help": "Whether checkpoints with an item memory have a second row."})
    baselines: bool = field(default=True, metadata={"help": "Whether to tune and rank the baselines too."})
    cards: bool = field(default=True, metadata={"help": "Write the results into the cards of the checkpoints."})
    dataset: str | None = field(
        default=None, metadata={"help": "Name of the data set, for the cards; by default that of its files."}
    )
    exclude_history: str = field(
        default="auto",
        metadata={
            "help": "Leave the items of a user's history out of every list: true, false or auto, as the prepared data "
            "says."
        },
    )

    def __post_init__(self):
        check_choices(self)
        read_switch(self, "exclude_history")
        if self.users < 0:
            raise ValueError(f"users is {self.users}; expected a number of users, or 0 for all.")


def parse_models(entries: list[str]) -> dict[str, tuple[str, str]]:
    """Path and reasoning (a fixed depth, `text`, or nothing for the policy) of each model by its name."""
    models: dict[str, tuple[str, str]] = {}
    for entry in entries:
        name, _, location = entry.partition("=")
        path, _, depth = location.partition("@")
        if not path or not (depth or "0").isdecimal() and depth != "text":
            raise ValueError(
                f"models has {entry!r}; expected name=path, name=path@N with N latent steps, or name=path@text."
            )
        if name in (*BASELINES, *models) or name.endswith(WITH_MEMORY):
            raise ValueError(f"models has the name {name!r} twice, or it is that of another row; use another name.")
        models[name] = path, depth
    return models


def history_is_excluded(args: EvaluateArguments, data: PreparedData) -> bool:
    """Whether lists have no items of the history; `auto` follows the data."""
    return data.exclude_history if args.exclude_history is None else args.exclude_history  # type: ignore[return-value]


def evaluate_model(args: EvaluateArguments, data: PreparedData, samples, path: str, reasoning: str, memory=None):
    """
    Recommended item indices `(U, 20)`, latent steps `(U,)` and the row of the results table; processes share the
    batches.
    """
    state = PartialState()
    processor = LasarProcessor.from_pretrained(path, revision=args.revision)
    data.check_catalog(processor.catalog, path)
    data.processor(processor.tokenizer, processor.instruction, processor.max_history)  # warns if samples keep less
    model = LasarForGenerativeRec.from_pretrained(path, revision=args.revision).to(state.device).eval()

    # 1. Deal out whole batches in the order of recommend_samples, so that any number of processes rounds alike.
    lengths = [len(processor.prompt_ids(history)) for history in samples["history"]]
    order = sorted(range(len(samples)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    own_users = [user for batch in batches[state.process_index :: state.num_processes] for user in batch]

    # 2. Recommend. The first batch runs once without the clock, to warm up.
    options = (processor, TOP_K, args.num_beams, int(reasoning) if reasoning.isdecimal() else None, args.batch_size)
    lists = {"exclude_history": history_is_excluded(args, data), "memory": memory, "write_text": reasoning == "text"}
    with onednn_linear(model):
        recommend_samples(model, samples.select(own_users[: args.batch_size]), *options, **lists)
        output = recommend_samples(model, samples.select(own_users), *options, progress=state.is_main_process, **lists)

    # 3. Every process gets the recommendations of all.
    items, latent_steps, seconds = np.full((len(samples), TOP_K), -1), np.zeros(len(samples), dtype=np.int64), 0.0
    text_tokens = None if output.text_tokens is None else np.zeros(len(samples), dtype=np.int64)
    for users, part in gather_object([(own_users, output)]):
        items[users], latent_steps[users], seconds = part.items, part.latent_steps, max(seconds, part.seconds)
        if text_tokens is not None:
            text_tokens[users] = part.text_tokens
    row = evaluate_recommendations(
        items,
        samples["target"],
        len(processor.catalog),
        latent_steps,
        seconds,
        histories=samples["history"],
        text_tokens=text_tokens,
    )
    return items, latent_steps, row


def evaluate_baselines(args: EvaluateArguments, data: PreparedData, samples):
    """Recommended item indices `(U, 20)` and the row of each baseline by its name, and how each was tuned."""
    num_items, histories = len(data.items), list(samples["history"])
    predictions, tuning = baseline_rankings(
        data.split.train, histories, num_items, TOP_K, history_is_excluded(args, data), data.samples["validation"]
    )
    # The memory of recipes/memory.py by itself, so that a row "+ memory" shows what the model adds.
    similar = similar_items(data.text_vectors)
    found = tune_memory(data, similar)
    settings = dict(found.settings)
    decay = settings.pop("history_decay")
    matrix = memory_matrix(data.split.train, num_items, similar, **settings)
    predictions["memory alone"] = matrix_ranking(
        matrix, data.split.train, histories, TOP_K, decay, history_is_excluded(args, data)
    )
    tuning["memory alone"] = asdict(found)
    rows = {
        name: evaluate_recommendations(items, samples["target"], num_items, histories=histories)
        for name, items in predictions.items()
    }
    return predictions, rows, tuning


def intervals(predictions: dict[str, np.ndarray], samples) -> dict[str, dict[str, list[float]]]:
    """95 % intervals of HR@10 and NDCG@10 of each row, by a bootstrap over users; none for a single user."""
    output: dict[str, dict[str, list[float]]] = {}
    if len(set(samples["user_id"])) < 2:
        return output
    for name, items in predictions.items():
        rank = ranks(items, samples["target"])
        values = {"HR@10": hits_per_user(rank, 10), "NDCG@10": ndcg_per_user(rank, 10)}
        output[name] = {metric: mean_interval(part, samples["user_id"]) for metric, part in values.items()}
    return output


def significance(predictions: dict[str, np.ndarray], samples) -> dict[str, dict]:
    """Bootstrap of the difference of each row to the one above, and of each row below item-kNN to item-kNN."""
    target_ranks = {name: ranks(items, samples["target"]) for name, items in predictions.items()}
    metrics = {"HR@10": hits_per_user, "NDCG@10": ndcg_per_user}
    values = {
        metric: {name: per_user(rank, 10) for name, rank in target_ranks.items()}
        for metric, per_user in metrics.items()
    }
    names, users = list(predictions), samples["user_id"]

    def tests(metric: str, pairs) -> dict[str, dict]:
        part = values[metric]
        return {f"{a} - {b}": asdict(paired_bootstrap(part[a], part[b], users)) for a, b in pairs}

    below = names[names.index("item-kNN") + 1 :] if "item-kNN" in names else []
    return {
        "HR@10_against_the_row_before": tests("HR@10", zip(names[1:], names[:-1], strict=True)),
        **{f"{metric}_against_item-kNN": tests(metric, [(name, "item-kNN") for name in below]) for metric in metrics},
    }


def print_tables(rows: dict[str, dict], notes: list[str], by_slice: dict[str, dict]) -> None:
    """Print the numbers of each row, how they came about, and those of parts of the users."""
    print(comparison_table(rows), *notes, "", slice_table(by_slice), sep="\n")


def report(args: EvaluateArguments, data: PreparedData, samples, predictions, rows, tuning, depths, show) -> dict:
    """Show the tables, then write the report. Returns it."""
    exclude, parts = history_is_excluded(args, data), slices(samples, data.split.train)
    by_slice = slice_report(predictions, samples["target"], parts)
    notes = [exclusion_note(exclude), *tuning_notes(tuning)]
    show(rows, notes, by_slice)
    details = {
        "arguments": asdict(args),
        "exclude_history": exclude,
        "repeat_rate": data.repeat_rate,
        "baselines": tuning,
        "intervals": intervals(predictions, samples),
        "depths": {name: np.bincount(steps).tolist() for name, steps in depths.items()},  # users by latent steps
        **significance(predictions, samples),
    }
    save_report(args.output_dir, rows, details, by_slice, notes)
    return {"results": rows, "details": details}


def write_cards(args: EvaluateArguments, report: dict) -> None:
    """Write the results into the card of each checkpoint in a folder that can be written to."""
    card = PreparedData.data_card(args.data_dir)
    dataset = args.dataset or (data_name(card) if card is not None else "own data")
    for path in dict.fromkeys(path for path, _ in parse_models(args.models).values()):
        if not Path(path).is_dir():  # on the Hub
            continue
        try:
            is_held = Path(path).samefile(args.output_dir)  # by this command
            with nullcontext() if is_held else locked(path):
                add_results(path, report, dataset)
        except (OSError, RuntimeError) as error:  # not writable, or in use by another command
            logger.warning("The card of %s has no results: %s", path, error)


def save_lists(
    folder: str, users: np.ndarray, predictions: dict[str, np.ndarray], depths: dict[str, np.ndarray]
) -> None:
    """
    Write `lists.npz`: `users` `(U,)`, positions among the samples of the part, `items/name` `(U, 20)` and, for models,
    `depths/name` `(U,)`.
    """
    arrays = {"users": users} | {f"items/{name}": items.astype(np.int32) for name, items in predictions.items()}
    arrays |= {f"depths/{name}": steps.astype(np.int16) for name, steps in depths.items()}
    with atomic_file(Path(folder, "lists.npz")) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def main(args: EvaluateArguments, show: Callable[..., Any] = print_tables) -> None:
    """Evaluate the baselines and every model; `show` and write the report."""
    models = parse_models(args.models)
    # On the CPU processes find each other only with `cpu`. While the main one tunes baselines, the others wait.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=12))
    with locked_for_all(args.output_dir):
        evaluate(args, models, state, show)


def evaluate(
    args: EvaluateArguments, models: dict[str, tuple[str, str]], state: PartialState, show: Callable[..., Any]
) -> None:
    """Evaluate in a folder that no other command writes to."""
    data = PreparedData.load(args.data_dir)
    for name, (path, reasoning) in models.items():  # before the baselines are tuned
        config = LasarConfig.from_pretrained(path, revision=args.revision)
        config.check_exclusion(history_is_excluded(args, data))
        config.check_depth(f"The depth of {name!r} in models", int(reasoning) if reasoning.isdecimal() else None)
    part = data.samples[args.split]
    users = data.drawn(args.split, args.users) if args.users else np.arange(len(part))  # (U,)
    samples = part.select(users, keep_in_memory=True)
    predictions, rows, tuning, depths = {}, {}, {}, {}
    if args.baselines and state.is_main_process:
        predictions, rows, tuning = evaluate_baselines(args, data, samples)
    for name, (path, reasoning) in models.items():
        memory = ItemMemory.find(path, revision=args.revision) if args.memory else None
        variants = {name: None} if memory is None else {name: None, name + WITH_MEMORY: memory}
        for variant, mixed in variants.items():
            results = evaluate_model(args, data, samples, path, reasoning, mixed)
            predictions[variant], depths[variant], rows[variant] = results
    if state.is_main_process:
        content = report(args, data, samples, predictions, rows, tuning, depths, show)
        save_lists(args.output_dir, users, predictions, depths)
        if args.cards:
            write_cards(args, content)


def run() -> None:
    """Run the command with the arguments of the command line."""
    main(*ScriptParser((EvaluateArguments,), __doc__).parse_args_and_config())
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run()
