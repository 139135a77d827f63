"""Targets from the memory that does not know the user, and examples whose target they replace."""

import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from lasar_hf import LasarProcessor, LasarSFTConfig, LasarSFTTrainer
from lasar_hf.data import PreparedData, with_neighbours
from lasar_hf.evaluation import memory_matrix, neighbour_draws, similar_items
from tests.recipes import save_prepared
from tests.training import COMMON, sft_setup


def sequences(seed: int = 0, users: int = 30, items: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(items)[: rng.integers(1, 6)].tolist() for _ in range(users)]


@pytest.mark.parametrize("exclude", [True, False])
def test_draws_follow_the_scores_without_the_user(exclude):
    """Against the memory of the sequences of all other users, one user at a time."""
    train, draws = sequences(users=8), 4000  # few, so that each user counts
    settings = dict(window=3, gap_decay=0.6, mirror=0.5, shrinkage=0.1, text_weight=0.5, temperature=0.4)
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


def neighbour_trainer(folder, share=0.5, neighbours=None, **kwargs):
    """A trainer of six direct examples with neighbours."""
    model, tokenizer, catalog, examples, _ = sft_setup([0] * 6)
    neighbours = np.random.default_rng(0).integers(0, 20, (6, 8)) if neighbours is None else neighbours
    processor = LasarProcessor(tokenizer, catalog)
    args = LasarSFTConfig(
        str(folder), **COMMON | {"neighbour_targets": share, "per_device_train_batch_size": 2, **kwargs}
    )
    return LasarSFTTrainer(
        model, args, train_dataset=with_neighbours(examples, neighbours), processing_class=processor
    )


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_neighbours_replace_the_share_of_targets_that_is_asked_for(tmp_path, monkeypatch, share):
    neighbours = np.array([[7, -1], [8, 9], [7, 7], [-1, -1], [7, 8], [9, 9]])
    trainer = neighbour_trainer(tmp_path, share, neighbours, per_device_train_batch_size=6)
    answers, forward = [], trainer.model.forward

    def record(input_ids, attention_mask=None, labels=None, **kwargs):
        answers.append([row[row != -100].tolist() for row in labels])
        for ids, label, row in zip(input_ids, labels, answers[-1], strict=True):
            assert ids[label != -100].tolist() == row
        return forward(input_ids, attention_mask, labels=labels, **kwargs)

    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    own = [row[row != -100].tolist() for row in batch["labels"]]
    tokens = trainer.processor.sid_token_ids.tolist()
    trainer.model.forward = record
    trainer.model.train()
    for step in range(100):
        trainer.state.global_step = step
        trainer.compute_loss(trainer.model, dict(batch))
    for index, row in enumerate(neighbours.tolist()):
        allowed = [tokens[item] for item in row if item >= 0]
        drawn = [part[index] for part in answers]
        replaced = [part for part in drawn if part in allowed]
        assert all(part in allowed or part == own[index] for part in drawn)
        assert len(replaced) / 100 == pytest.approx(share if allowed else 0.0, abs=0.15)
        assert {tuple(part) for part in replaced} == {tuple(part) for part in allowed}


def test_a_batch_without_neighbours_keeps_its_targets(tmp_path):
    neighbours = np.full((6, 2), -1)
    trainer, plain = neighbour_trainer(tmp_path, 1.0, neighbours), neighbour_trainer(tmp_path, 0.0, neighbours)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    losses = [part.compute_loss(part.model.train(), dict(batch)) for part in (trainer, plain)]
    assert torch.equal(*losses)


def test_a_row_without_a_share_keeps_its_target(tmp_path):
    """As the deepest row of an example that is trained at several depths."""
    trainer, plain = neighbour_trainer(tmp_path, 1.0), neighbour_trainer(tmp_path, 0.0)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    batch["neighbour_share"] = torch.zeros(6)
    losses = [part.compute_loss(part.model.train(), dict(batch)) for part in (trainer, plain)]
    assert torch.equal(*losses)


def test_evaluation_has_the_true_targets(tmp_path):
    trainer, plain = neighbour_trainer(tmp_path, 1.0), neighbour_trainer(tmp_path, 0.0)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    losses = [part.compute_loss(part.model.eval(), dict(batch)) for part in (trainer, plain)]
    assert torch.equal(*losses)


def test_neighbours_need_one_row_per_example():
    examples = sft_setup()[3]
    with pytest.raises(ValueError, match="targets: all"):
        with_neighbours(examples, np.zeros((2, 3), dtype=np.int64))


def test_a_share_is_a_probability(tmp_path):
    with pytest.raises(ValueError, match="neighbour_targets is 1.5"):
        LasarSFTConfig(str(tmp_path), neighbour_targets=1.5, use_cpu=True, bf16=False)


@pytest.mark.parametrize("step", [3, 5])
def test_training_resumes_with_the_same_draws(tmp_path, step):
    options = dict(max_steps=7, save_strategy="steps", save_steps=step)
    whole, part = neighbour_trainer(tmp_path, **options), neighbour_trainer(tmp_path, **options)
    whole.train()
    part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for name, weight in whole.model.named_parameters():
        assert torch.equal(part.model.get_parameter(name), weight), name


def test_items_without_text_have_no_vector(tmp_path):
    save_prepared(tmp_path)
    assert PreparedData.load(tmp_path).text_vectors is None
    vectors = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "embeddings.npy", vectors)
    items = Dataset.from_dict(PreparedData.load(tmp_path).items.to_dict())
    shutil.rmtree(tmp_path / "items")
    titles = ["" if item == 4 else title for item, title in enumerate(items["title"])]
    items.remove_columns("title").add_column("title", titles).save_to_disk(tmp_path / "items")
    data = PreparedData.load(tmp_path)
    vectors[4] = 0
    np.testing.assert_array_equal(data.text_vectors, vectors)


def test_vectors_are_read_when_they_are_needed(tmp_path):
    """They may have gigabytes, and most recipes do not use them."""
    save_prepared(tmp_path)
    (tmp_path / "embeddings.npy").write_bytes(b"not an array")
    data = PreparedData.load(tmp_path)
    with pytest.raises(ValueError):
        data.text_vectors  # noqa: B018
