"""
Rank the whole catalogue for held-out users: popularity and Markov, then checkpoints.

    accelerate launch recipes/eval.py --config recipes/scientific/eval.yaml

A model is `name=path` or `name=path@N` for a fixed depth `N` (`@0` is direct generation). Prints the table and writes
`report.json` and `report.md`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoTokenizer
from trl import TrlParser

from lasar_hf import LasarForGenerativeRec, SidCatalog
from lasar_hf.arguments import check_choices
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import (
    comparison_table,
    evaluate_recommendations,
    hits_per_user,
    markov_ranking,
    paired_bootstrap,
    popularity_ranking,
    ranks,
    recommend_samples,
    save_report,
)


@dataclass
class EvaluateArguments:
    """What to evaluate, on whom."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    output_dir: str = field(metadata={"help": "Folder of the report."})
    models: list[str] = field(default_factory=list, metadata={"help": "`name=path` or `name=path@N`."})
    split: str = field(default="test", metadata={"help": "Which users.", "choices": ["validation", "test"]})
    users: int = field(default=0, metadata={"help": "Only the first so many users; 0 for all."})
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    batch_size: int = field(default=64, metadata={"help": "Users a batch."})
    instruction: str = field(default="Recommend the next item.", metadata={"help": "Text before the history."})
    max_history: int = field(default=50, metadata={"help": "Most items of a history that are shown."})

    def __post_init__(self):
        check_choices(self)


def parse_models(entries: list[str]) -> dict[str, tuple[str, int | None]]:
    """From the name of each model to its path and its fixed depth, if it has one."""
    models = {}
    for entry in entries:
        name, _, location = entry.partition("=")
        path, _, depth = location.partition("@")
        if not path or not (depth or "0").isdecimal():
            raise ValueError(f"The model {entry!r} is not name=path or name=path@N with a fixed depth N.")
        if name in ("popularity", "Markov", *models):
            raise ValueError(f"Two rows of the table would be named {name!r}: give each model its own name.")
        models[name] = path, int(depth) if depth else None
    return models


def choose_users(samples, users: int):
    """The first so many users, all if 0."""
    if not 0 <= users <= len(samples):
        raise ValueError(f"users is {users}, but the split has {len(samples)}: pass 0 for all of them.")
    return samples.select(range(users)) if users else samples


def evaluate_model(args: EvaluateArguments, data: PreparedData, samples, path: str, depth: int | None):
    """Item rows `(U, 20)` and the row of numbers of one model; batches are dealt to the processes."""
    state = PartialState()
    model = LasarForGenerativeRec.from_pretrained(path).to(state.device).eval()
    processor = data.processor(AutoTokenizer.from_pretrained(path), args.instruction, args.max_history)
    catalog = SidCatalog.from_pretrained(path)
    data.check_catalog(catalog.item_ids, catalog.codes, path)
    # Whole batches of users in the order of recommend_samples: one process has the same, and with them all rounding.
    lengths = [len(processor.prompt_ids(history)) for history in samples["history"]]
    order = sorted(range(len(samples)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    mine = [user for batch in batches[state.process_index :: state.num_processes] for user in batch]
    options = (processor, catalog, 20, args.num_beams, depth, args.batch_size)
    recommend_samples(model, samples.select(mine[: args.batch_size]), *options)  # not timed: warms up
    part = recommend_samples(model, samples.select(mine), *options, progress=state.is_main_process)
    parts = gather_object([(mine, part)])
    items, steps = np.full((len(samples), 20), -1), np.zeros(len(samples), dtype=np.int64)
    for users, found in parts:
        items[users], steps[users] = found.items, found.latent_steps
    seconds = max(found.seconds for _, found in parts)
    return items, evaluate_recommendations(items, samples["target"], len(catalog), steps, seconds)


def main(args: EvaluateArguments) -> None:
    """Evaluate the baselines and every model; write and print the report."""
    models = parse_models(args.models)
    PartialState(cpu=not torch.accelerator.is_available())  # else every process would be alone on a CPU
    data = PreparedData.load(args.data_dir)
    samples = choose_users(data.samples[args.split], args.users)
    train, num_items = data.split.train, len(data.items)
    contexts = [history[-1] for history in samples["history"]]
    popular = popularity_ranking(train, num_items, 20)
    predictions = {
        "popularity": np.tile(popular, (len(samples), 1)), "Markov": markov_ranking(train, contexts, num_items, 20)
    }
    rows = {name: evaluate_recommendations(p, samples["target"], num_items) for name, p in predictions.items()}
    for name, (path, depth) in models.items():
        predictions[name], rows[name] = evaluate_model(args, data, samples, path, depth)
    hits = {name: hits_per_user(ranks(p, samples["target"]), 10) for name, p in predictions.items()}
    if PartialState().is_main_process:
        pairs = list(zip(list(hits)[1:], list(hits)[:-1], strict=True))  # each recommender against the row before
        tests = {f"{a} - {b}": asdict(paired_bootstrap(hits[a], hits[b])) for a, b in pairs}
        save_report(Path(args.output_dir), rows, {"arguments": asdict(args), "HR@10_against_the_row_before": tests})
        print(comparison_table(rows))


if __name__ == "__main__":
    main(*TrlParser((EvaluateArguments,)).parse_args_and_config())
    PartialState().destroy_process_group()
