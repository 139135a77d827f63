"""SASRec with cross-entropy as a baseline, by the package cornac, which is optional."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch

from .baselines import rank_rows


def has_sasrec() -> bool:
    """Whether the package of [`sasrec_ranking`] is installed."""
    return find_spec("cornac") is not None


def sasrec_ranking(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool = False,
    num_epochs: int = 20,
    max_history: int = 20,
    seed: int = 0,
) -> np.ndarray:
    """
    SASRec (Kang and McAuley, 2018), a small transformer over item embeddings, with cross-entropy.

    Every prefix of a training sequence is an example. The softmax covers the target, the other targets of the batch
    and 2,048 random items. The network has 2 layers of width 64 and dropout 0.5.

    Args:
        train_sequences, histories, num_items, top_k, exclude_history:
            As for [`popularity_ranking`].
        num_epochs, max_history, seed (`int`, *optional*, default to `20`, `20` and `0`):
            Passes over the training sequences, newest items of a history that the network reads, and the seed.

    Returns:
        `np.ndarray` of shape `(U, k)`, int64, as [`popularity_ranking`]. Items that are in no training sequence come
        last.

    Raises:
        `ImportError`: if cornac is not installed.
    """
    if not has_sasrec():
        raise ImportError('SASRec needs cornac; run pip install "lasar_hf[baselines]", or leave SASRec out.')
    from cornac.data import SequentialDataset
    from cornac.models import SASRec

    rows = [(user, user, item, time) for user, items in enumerate(train_sequences) for time, item in enumerate(items)]
    data = SequentialDataset.build(rows, fmt="USIT")  # user, session, item, time
    model = SASRec(
        embedding_dim=64,
        loss="ce",
        batch_size=256,
        learning_rate=1e-3,
        n_sample=2048,
        sample_alpha=0.0,
        dropout=0.5,
        n_epochs=num_epochs,
        max_len=max_history,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    model.fit(data)
    known = np.fromiter(data.iid_map.keys(), dtype=np.int64)  # items in the order of the network's outputs

    def score(user: int, history: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return known, model.score(user, [data.iid_map[item] for item in history if item in data.iid_map])

    scores = (score(user, history) for user, history in enumerate(histories))
    return rank_rows(scores, train_sequences, histories, num_items, top_k, exclude_history)
