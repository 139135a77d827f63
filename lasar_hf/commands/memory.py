"""
Give checkpoints an item memory: a matrix of item-to-item steps of the training sequences, mixed with the model.

The matrix has the steps of item-kNN and items with similar text, which decide where steps are rare; it is tuned on
validation samples. Its weight in the mixture is fitted for each checkpoint on validation samples, with `path@N` for
`N` latent steps and `path@text` for a model that writes a chain of thought. Writes `item_memory.safetensors` into each
checkpoint, which `eval.py` and `recommend.py` then use.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..card import add_section, folder_card, save_card
from ..data import PreparedData
from ..evaluation import (
    Tuning,
    build_memory,
    fit_gate,
    ranking_metrics,
    ranks,
    recommend_samples,
    similar_items,
    tune_memory,
)
from ..locks import locked
from ..model.configuration_lasar import LasarConfig
from ..model.memory_lasar import ItemMemory
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from ..onednn import onednn_linear
from .parser import ScriptParser


logger = logging.getLogger(__name__)


@dataclass
class MemoryArguments:
    """Arguments of the item memory."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    models: list[str] = field(metadata={"help": "Checkpoints: `path`, `path@N` for N latent steps, or `path@text`."})
    max_neighbours: int = field(default=200, metadata={"help": "Neighbours to keep per item."})
    users: int = field(default=10_000, metadata={"help": "Largest number of validation samples to fit the weight on."})
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})

    def __post_init__(self):
        how = {entry: entry.partition("@")[2] for entry in self.models}
        wrong = [entry for entry, part in how.items() if not (part in ("", "text") or part.isdecimal())]
        paths = [entry.partition("@")[0] for entry in self.models]
        if wrong or not self.models or len(set(paths)) < len(paths):
            raise ValueError(
                f"models is {wrong or self.models}; expected distinct paths, path@N with N latent steps, or path@text."
            )
        missing = [path for path in paths if not Path(path, "config.json").exists()]
        if missing:
            raise ValueError(
                f"models has {missing}; expected local folders of checkpoints, where the memories are saved."
            )


def fit(args: MemoryArguments, data: PreparedData, memory: ItemMemory, path: str, reasoning: str) -> ItemMemory:
    """The memory with the weight for one checkpoint; `reasoning` is a depth, `text`, or empty for the policy."""
    processor = LasarProcessor.from_pretrained(path)
    data.check_catalog(processor.catalog, path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LasarForGenerativeRec.from_pretrained(path).to(device).eval()
    samples = data.draw("validation", args.users)
    depth = int(reasoning) if reasoning.isdecimal() else None
    with onednn_linear(model):
        candidates = recommend_samples(
            model,
            samples,
            processor,
            args.num_beams,
            args.num_beams,
            depth,
            args.batch_size,
            progress=True,
            exclude_history=data.exclude_history,
            memory=memory,
            write_text=reasoning == "text",
        )
    fitted, lists = fit_gate(memory, candidates, list(samples["target"]))
    results = ranking_metrics(ranks(lists, samples["target"]), ks=(10,))
    logger.info(
        "%s: weight sigmoid(%.3f + %.3f log s), with s the largest score of the memory; validation HR@10 %.4f, "
        "NDCG@10 %.4f.",
        path,
        *fitted.gate,
        results["HR@10"],
        results["NDCG@10"],
    )
    return fitted


def memory_text(memory: ItemMemory, tuning: Tuning, reasoning: str) -> str:
    """Section of the model card."""
    steps = f" Fitted for {reasoning} latent steps." if reasoning.isdecimal() else ""
    intercept, slope = memory.gate
    return (
        "`item_memory.safetensors` has the item-to-item steps of the training histories and items with similar text. "
        "`Recommender` and the pipeline mix it with the model; its weight is "
        f"sigmoid({intercept:.3f} + {slope:.3f} log s), with s the largest score that the memory gives.{steps} Alone "
        f"it has an NDCG@10 of {tuning.validation_ndcg:.4f} on validation samples.\n"
    )


def main(args: MemoryArguments) -> None:
    """Tune the matrix once. Fit its weight for each checkpoint, and save it there."""
    with ExitStack() as stack:
        for entry in args.models:
            stack.enter_context(locked(entry.partition("@")[0]))
        add_memories(args)


def add_memories(args: MemoryArguments) -> None:
    """Give memories to checkpoints to which no other command writes."""
    for entry in args.models:
        path, _, reasoning = entry.partition("@")
        depth = int(reasoning) if reasoning.isdecimal() else None
        LasarConfig.from_pretrained(path).check_depth(f"The depth of {entry!r} in models", depth)
    data = PreparedData.load(args.data_dir)
    similar = similar_items(data.text_vectors)
    tuning = tune_memory(data, similar)
    logger.info("Memory alone: %s, validation NDCG@10 %.4f.", tuning.settings, tuning.validation_ndcg)
    memory = build_memory(data, args.max_neighbours, similar=similar, **tuning.settings)
    for entry in args.models:
        path, _, reasoning = entry.partition("@")
        fitted = fit(args, data, memory, path, reasoning)
        fitted.save_pretrained(path)
        card = folder_card(path)
        add_section(card, "Item memory", memory_text(fitted, tuning, reasoning))
        save_card(card, path)


def run() -> None:
    """Run the command with the arguments of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*ScriptParser((MemoryArguments,), __doc__).parse_args_and_config())


if __name__ == "__main__":
    run()
