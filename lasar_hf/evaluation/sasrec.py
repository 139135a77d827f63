"""SASRec with cross-entropy as a baseline, by the package cornac, which is optional."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy as np
import torch

from .baselines import rank_rows


EPOCHS_PER_EVALUATION = 5


def has_sasrec() -> bool:
    """Whether the package of [`sasrec_ranking`] is installed."""
    return find_spec("cornac") is not None


def sasrec_ranking(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool = False,
    validation: Mapping[str, Sequence] | None = None,
    num_epochs: int = 40,
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
        validation (`Dataset` or `Mapping`, *optional*):
            Columns `history` and `target`. Of the weights after 5, 10, … epochs, those with the best NDCG@10 on these
            samples are used, as cornac measures it: items of the history stay in its lists. Without samples, those
            after the last epoch.
        num_epochs, max_history, seed (`int`, *optional*, default to `40`, `20` and `0`):
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
        model_selection="last" if validation is None else "best",
        val_eval_every=EPOCHS_PER_EVALUATION,
        val_metric="ndcg",
        val_k=10,
    )
    model.fit(data, None if validation is None else _held_out(validation, data.iid_map))
    known = np.fromiter(data.iid_map.keys(), dtype=np.int64)  # items in the order of the network's outputs

    def score(user: int, history: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return known, model.score(user, [data.iid_map[item] for item in history if item in data.iid_map])

    scores = (score(user, history) for user, history in enumerate(histories))
    return rank_rows(scores, train_sequences, histories, num_items, top_k, exclude_history)


def _held_out(validation: Mapping[str, Sequence], known: Mapping[int, int]):
    """Samples with a known target, each as a session that ends with it."""
    from cornac.data import SequentialDataset

    pairs = zip(validation["history"], validation["target"], strict=True)
    sessions = [[*history, target] for history, target in pairs if target in known]
    rows = [(user, user, item, time) for user, items in enumerate(sessions) for time, item in enumerate(items)]
    return SequentialDataset.build(rows, fmt="USIT", global_iid_map=known, exclude_unknowns=True)
