"""
Rank the whole catalogue for held-out users: popularity, Markov, then checkpoints.

    accelerate launch recipes/eval.py --config recipes/scientific/eval.yaml

A model is `name=path` or, with `N` latent steps for every user, `name=path@N` (`@0` is direct generation). Prints the
table and writes `report.json` and `report.md`, with the significance of each difference between neighbouring rows (a
bootstrap over users). The prompt format is that of each checkpoint.
"""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from trl import TrlParser

from lasar_hf import LasarForGenerativeRec, LasarProcessor
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
from lasar_hf.onednn import onednn_linear


TOP_K = 20


@dataclass
class EvaluateArguments:
    """Arguments of an evaluation."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    output_dir: str = field(metadata={"help": "Folder of the report."})
    models: list[str] = field(default_factory=list, metadata={"help": "`name=path` or `name=path@N`."})
    split: str = field(default="test", metadata={"help": "Part to evaluate on.", "choices": ["validation", "test"]})
    users: int = field(default=0, metadata={"help": "Evaluate on this many users, the first ones; 0 for all."})
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})

    def __post_init__(self):
        check_choices(self)


def parse_models(entries: list[str]) -> dict[str, tuple[str, int | None]]:
    """Path and fixed depth, if any, of each model by its name."""
    models = {}
    for entry in entries:
        name, _, location = entry.partition("=")
        path, _, depth = location.partition("@")
        if not path or not (depth or "0").isdecimal():
            raise ValueError(f"models has {entry!r}; expected name=path or name=path@N with N latent steps.")
        if name in ("popularity", "Markov", *models):
            raise ValueError(f"models has the name {name!r} twice, or it is that of a baseline; use another name.")
        models[name] = path, int(depth) if depth else None
    return models


def select_users(samples, users: int):
    """The first `users` samples, or all for 0."""
    if not 0 <= users <= len(samples):
        raise ValueError(f"users is {users}; expected at most {len(samples)}, or 0 for all.")
    return samples.select(range(users)) if users else samples


def evaluate_model(args: EvaluateArguments, data: PreparedData, samples, path: str, depth: int | None):
    """Recommended item indices `(U, 20)` and the row of the results table; processes share the batches."""
    state = PartialState()
    processor = LasarProcessor.from_pretrained(path)
    data.check_catalog(processor.catalog, path)
    data.processor(processor.tokenizer, processor.instruction, processor.max_history)  # warns if samples keep less
    model = LasarForGenerativeRec.from_pretrained(path).to(state.device).eval()

    # 1. Deal out whole batches in the order of recommend_samples, so that any number of processes rounds alike.
    lengths = [len(processor.prompt_ids(history)) for history in samples["history"]]
    order = sorted(range(len(samples)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    own_users = [user for batch in batches[state.process_index :: state.num_processes] for user in batch]

    # 2. Recommend. The first batch runs once without the clock, to warm up.
    options = (processor, TOP_K, args.num_beams, depth, args.batch_size)
    with onednn_linear(model):
        recommend_samples(model, samples.select(own_users[: args.batch_size]), *options)
        output = recommend_samples(model, samples.select(own_users), *options, progress=state.is_main_process)

    # 3. Every process gets the recommendations of all.
    items, latent_steps, seconds = np.full((len(samples), TOP_K), -1), np.zeros(len(samples), dtype=np.int64), 0.0
    for users, part in gather_object([(own_users, output)]):
        items[users], latent_steps[users], seconds = part.items, part.latent_steps, max(seconds, part.seconds)
    row = evaluate_recommendations(items, samples["target"], len(processor.catalog), latent_steps, seconds)
    return items, row


def main(args: EvaluateArguments) -> None:
    """Evaluate the baselines and every model; print and write the report."""
    models = parse_models(args.models)
    state = PartialState(cpu=not torch.accelerator.is_available())  # otherwise CPU processes do not find each other
    if state.is_main_process:  # a folder that cannot be written to must fail before hours of work
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    data = PreparedData.load(args.data_dir)
    samples = select_users(data.samples[args.split], args.users)
    train, num_items = data.split.train, len(data.items)
    contexts = [history[-1] for history in samples["history"]]
    popular = popularity_ranking(train, num_items, TOP_K)
    predictions = {
        "popularity": np.tile(popular, (len(samples), 1)), "Markov": markov_ranking(train, contexts, num_items, TOP_K)
    }
    rows = {name: evaluate_recommendations(p, samples["target"], num_items) for name, p in predictions.items()}
    for name, (path, depth) in models.items():
        predictions[name], rows[name] = evaluate_model(args, data, samples, path, depth)
    if state.is_main_process:
        print(comparison_table(rows))
        hits = {name: hits_per_user(ranks(items, samples["target"]), 10) for name, items in predictions.items()}
        pairs = list(zip(list(hits)[1:], list(hits)[:-1], strict=True))  # each recommender against the row above
        users = samples["user_id"]
        tests = {f"{a} - {b}": asdict(paired_bootstrap(hits[a], hits[b], users)) for a, b in pairs}
        save_report(args.output_dir, rows, {"arguments": asdict(args), "HR@10_against_the_row_before": tests})


if __name__ == "__main__":
    main(*TrlParser((EvaluateArguments,)).parse_args_and_config())
    PartialState().destroy_process_group()
