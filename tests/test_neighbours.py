"""Targets from the memory that does not know the user, and examples whose target they replace."""

import numpy as np
import pytest
import torch

from lasar_hf import LasarSFTConfig
from lasar_hf.data import with_neighbours
from lasar_hf.evaluation import memory_matrix, neighbour_draws, similar_items
from tests.training import sft_setup, sft_trainer


def sequences(seed: int = 0, users: int = 30, items: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(items)[: rng.integers(1, 6)].tolist() for _ in range(users)]


@pytest.mark.parametrize("exclude", [True, False])
def test_draws_follow_the_scores_without_the_user(exclude):
    """Against the memory of the sequences of all other users, one user at a time."""
    train, draws = sequences(), 4000
    settings = dict(window=3, gap_decay=0.6, mirror=0.5, shrinkage=5.0, text_weight=0.5, temperature=0.4)
    similar = similar_items(np.random.default_rng(1).normal(size=(12, 4)), 3)
    drawn = neighbour_draws(train, 12, similar, draws, **settings, history_decay=0.7, exclude_history=exclude)
    row = 0
    for user, sequence in enumerate(train):
        others = train[:user] + train[user + 1 :]
        matrix = memory_matrix(others, 12, similar, **settings).toarray()
        for place in range(1, len(sequence)):
            scores = sum(0.7**age * matrix[item] for age, item in enumerate(reversed(sequence[:place])))
            if exclude:
                scores[sequence[:place]] = 0
            if scores.sum() == 0:
                assert (drawn[row] == -1).all()
            else:
                shares = np.bincount(drawn[row], minlength=12) / draws
                np.testing.assert_allclose(shares, scores / scores.sum(), atol=0.04)
            row += 1
    assert row == len(drawn)


def test_draws_depend_on_the_seed_alone():
    first, again, other = (neighbour_draws(sequences(), 12, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_neighbours_replace_the_share_of_targets_that_is_asked_for(tmp_path):
    model, tokenizer, catalog, examples, _ = sft_setup([0] * 6)
    trainer = sft_trainer(tmp_path, depths=[0] * 6)
    collator = trainer.data_collator
    collator.item_token_ids = catalog.codes + model.config.sid_token_id(0, 0) + 4 * torch.arange(3)
    examples = with_neighbours(examples, np.array([[7, -1], [8, 9], [7, 7], [-1, -1], [7, 8], [9, 9]]))
    rows = [examples[index] for index in (0, 3)] * 300  # of equal length
    for share in (0.0, 0.3, 1.0):
        collator.neighbour_targets = share
        answers = collator(rows)["labels"][:, -3:]
        is_new = (answers == collator.item_token_ids[7]).all(dim=1)
        assert float(is_new[0::2].float().mean()) == pytest.approx(share, abs=0.08)
        assert not is_new[1::2].any()  # has no neighbours
        assert torch.equal(collator(rows)["input_ids"][1::2], collator(rows)["input_ids"][1::2])


def test_neighbours_need_one_row_per_example():
    examples = sft_setup()[3]
    with pytest.raises(ValueError, match="targets: all"):
        with_neighbours(examples, np.zeros((2, 3), dtype=np.int64))


def test_a_share_is_a_probability(tmp_path):
    with pytest.raises(ValueError, match="neighbour_targets is 1.5"):
        LasarSFTConfig(str(tmp_path), neighbour_targets=1.5, use_cpu=True, bf16=False)
