"""Recommendations for a table of samples, and ranking metrics during training."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..model.memory_lasar import ItemMemory
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from .explicit import write_chains
from .metrics import DEFAULT_KS
from .report import evaluate_recommendations


@dataclass(frozen=True)
class Recommendations:
    """Recommendations for a table of samples, in its order."""

    items: np.ndarray  # (U, k) item indices, best first; -1 pads
    scores: np.ndarray  # (U, k) log-probabilities; -inf at padding
    latent_steps: np.ndarray  # (U,)
    seconds: float  # wall-clock time of all samples together
    model_scores: np.ndarray | None = None  # (U, k) with a memory: log-probabilities under the model alone
    memory_scores: np.ndarray | None = None  # (U, k) with a memory: those under the memory alone
    memory_strength: np.ndarray | None = None  # (U,) with a memory: its largest score
    text_tokens: np.ndarray | None = None  # (U,) with a written chain of thought: tokens of the text


def recommend_samples(
    model: LasarForGenerativeRec,
    samples: Dataset,
    processor: LasarProcessor,
    top_k: int = 20,
    num_beams: int = 50,
    latent_steps: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
    exclude_history: bool | None = None,
    memory: ItemMemory | None = None,
    write_text: bool = False,
) -> Recommendations:
    """
    Recommend for every sample. Samples are batched by length, which keeps padding small.

    Args:
        model, processor ([`LasarForGenerativeRec`] and [`LasarProcessor`]):
            The model, and its prompt format and catalogue.
        samples (`Dataset`):
            Table with a column `history` (item indices, oldest first).
        top_k, num_beams, latent_steps:
            As for [`LasarForGenerativeRec.recommend`]; one `int` for all samples.
        batch_size (`int`, *optional*, defaults to `64`):
            Samples per batch.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        exclude_history (`bool`, *optional*):
            Leave the items of a sample's history out of its recommendations, even if they are too old to be in the
            prompt. Defaults to `exclude_history` of the model's configuration.
        memory ([`ItemMemory`], *optional*):
            As for [`LasarForGenerativeRec.recommend`].
        write_text (`bool`, *optional*, defaults to `False`):
            Write a chain of thought before the item ([`write_chains`]) instead of taking latent steps, with a model
            that was trained on [`~lasar_hf.data.explicit_examples`].

    Raises:
        `ValueError`: if `exclude_history` is `False`, but the model was trained with it, the processor is that of
        another model, or `write_text` has `latent_steps`.
    """
    if write_text and latent_steps:
        raise ValueError(f"latent_steps is {latent_steps} with write_text=True; expected 0 or None.")
    if exclude_history is None:
        exclude_history = model.config.exclude_history
    model.config.check_exclusion(exclude_history)
    processor.check_matches(model.config)
    memory = None if memory is None else memory.to(model.device)
    histories = samples["history"]
    prompts = [processor.prompt_ids(history) for history in histories]
    order = sorted(range(len(prompts)), key=lambda sample: len(prompts[sample]), reverse=True)
    names = ["items", "scores"] if memory is None else ["items", "scores", "model_scores", "memory_scores"]
    lists: dict[str, np.ndarray] = {name: np.empty((len(prompts), top_k), dtype=np.float32) for name in names}
    lists["items"] = np.empty((len(prompts), top_k), dtype=np.int64)
    depths, lengths = np.empty(len(prompts), dtype=np.int64), np.empty(len(prompts), dtype=np.int64)
    if memory is not None:
        lists["memory_strength"] = np.empty(len(prompts), dtype=np.float32)
    start_time = time.perf_counter()
    for start in tqdm(range(0, len(order), batch_size), desc="Recommending", disable=not progress):
        batch = order[start : start + batch_size]
        texts = [prompts[sample] for sample in batch]
        if write_text:
            texts = write_chains(model, processor, texts)
        inputs = processor.pad(texts).to(model.device)
        output = model.recommend(
            **inputs,
            catalog=processor.catalog,
            top_k=top_k,
            num_beams=num_beams,
            latent_steps=0 if write_text else latent_steps,
            deny=[torch.tensor(histories[sample]) for sample in batch] if exclude_history else None,
            allow_empty=True,
            memory=memory,
        )
        for name, rows in lists.items():
            rows[batch] = getattr(output, name).cpu().numpy()
        depths[batch] = output.latent_steps.cpu().numpy()
        lengths[batch] = [len(text) - len(prompts[sample]) for text, sample in zip(texts, batch, strict=True)]
    seconds = time.perf_counter() - start_time
    return Recommendations(latent_steps=depths, seconds=seconds, text_tokens=lengths if write_text else None, **lists)


class RankingEvaluator:
    """
    HR@k, NDCG@k and mean depth on held-out samples, as `ranking_evaluator` of [`LasarSFTTrainer`].

    Args:
        samples (`Dataset`):
            Table with the columns `history` and `target`.
        processor, num_beams, latent_steps, ks:
            As for [`recommend_samples`] and [`score_predictions`].
    """

    def __init__(
        self,
        samples: Dataset,
        processor: LasarProcessor,
        num_beams: int = 20,
        latent_steps: int | None = None,
        ks: Sequence[int] = DEFAULT_KS,
    ):
        self.samples, self.processor = samples, processor
        self.num_beams, self.latent_steps, self.ks = num_beams, latent_steps, ks
        self.metric_names = [f"{name}@{k}" for name in ("HR", "NDCG") for k in ks] + ["mean_depth"]

    def __call__(self, model: LasarForGenerativeRec) -> dict[str, float]:
        """`HR@k`, `NDCG@k` and `mean_depth` of the model."""
        output = recommend_samples(
            model, self.samples, self.processor, max(self.ks), self.num_beams, self.latent_steps
        )
        targets, num_items = self.samples["target"], len(self.processor.catalog)
        row = evaluate_recommendations(output.items, targets, num_items, output.latent_steps, ks=self.ks)
        return {name: row[name] for name in self.metric_names}
