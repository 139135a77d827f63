"""Recommending for a whole table of samples, and watching ranking metrics while a model trains."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from .metrics import DEFAULT_KS
from .report import evaluate_recommendations


@dataclass(frozen=True)
class Recommendations:
    """
    Recommendations of a table of samples, in its order.

    Args:
        items (`np.ndarray` of shape `(U, k)`):
            Item rows, best first, -1 pads.
        scores (`np.ndarray` of shape `(U, k)`):
            Log-probabilities, `-inf` where padded.
        latent_steps (`np.ndarray` of shape `(U,)`):
            Latent steps taken for each user.
        seconds (`float`):
            Wall-clock time of all users together.
    """

    items: np.ndarray
    scores: np.ndarray
    latent_steps: np.ndarray
    seconds: float


def recommend_samples(
    model: LasarForGenerativeRec,
    samples: Dataset,
    processor: LasarProcessor,
    top_k: int = 20,
    num_beams: int = 50,
    latent_steps: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
    exclude_history: bool = False,
) -> Recommendations:
    """
    Recommend for every sample, sorted by length so that batches hold little padding.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model.
        samples (`Dataset`):
            With a column `history` (item rows, oldest first).
        processor ([`LasarProcessor`]):
            The checkpoint's prompt format and catalogue.
        top_k (`int`, *optional*, defaults to `20`):
            Items for each sample.
        num_beams (`int`, *optional*, defaults to `50`):
            Width of the beam search.
        latent_steps (`int`, *optional*):
            Depth of every sample, 0 for direct generation; the policy head's choice if not given.
        batch_size (`int`, *optional*, defaults to `64`):
            Samples a batch.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        exclude_history (`bool`, *optional*, defaults to `False`):
            Whether items of a sample's history are never recommended to it.

    Returns:
        [`Recommendations`].
    """
    histories = samples["history"]
    prompts = [processor.prompt_ids(history) for history in histories]
    order = sorted(range(len(prompts)), key=lambda sample: len(prompts[sample]), reverse=True)
    items, scores = np.empty((len(prompts), top_k), dtype=np.int64), np.empty((len(prompts), top_k), dtype=np.float32)
    depths = np.empty(len(prompts), dtype=np.int64)
    start_time = time.perf_counter()
    for start in tqdm(range(0, len(order), batch_size), desc="Recommending", disable=not progress):
        rows = order[start : start + batch_size]
        batch = processor.pad([prompts[row] for row in rows]).to(model.device)
        output = model.recommend(
            **batch, catalog=processor.catalog, top_k=top_k, num_beams=num_beams, latent_steps=latent_steps,
            deny=[torch.tensor(histories[row]) for row in rows] if exclude_history else None, allow_empty=True,
        )
        items[rows], scores[rows] = output.items.cpu().numpy(), output.scores.float().cpu().numpy()
        depths[rows] = output.latent_steps.cpu().numpy()
    return Recommendations(items, scores, depths, time.perf_counter() - start_time)


class RankingEvaluator:
    """
    HR, NDCG and mean depth on held-out users while a model trains, see `ranking_evaluator` of [`LasarSFTTrainer`].

    Args:
        samples (`Dataset`):
            With the columns `history` and `target`.
        processor ([`LasarProcessor`]):
            The checkpoint's prompt format and catalogue.
        num_beams (`int`, *optional*, defaults to `20`):
            Width of the beam search.
        latent_steps (`int`, *optional*):
            Depth of every sample, 0 for direct generation; the policy head's choice if not given.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`):
            Cut-offs.
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

    def __call__(self, model: LasarForGenerativeRec) -> dict[str, float]:
        """
        Args:
            model ([`LasarForGenerativeRec`]):
                The model as it stands.

        Returns:
            `dict[str, float]`: `HR@k`, `NDCG@k` and `mean_depth`.
        """
        recommended = recommend_samples(
            model, self.samples, self.processor, max(self.ks), self.num_beams, self.latent_steps
        )
        row = evaluate_recommendations(
            recommended.items, self.samples["target"], len(self.processor.catalog), recommended.latent_steps, ks=self.ks
        )
        return {name: value for name, value in row.items() if name.startswith(("HR", "NDCG", "mean_depth"))}
