"""recipes/memory.py: the matrix, its fitted weight, and the scripts that use the saved memory."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lasar_hf import ItemMemory, LasarForGenerativeRec, LasarProcessor
from lasar_hf.card import find_card
from lasar_hf.card.headings import split_headings
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import (
    Recommendations,
    build_memory,
    fit_gate,
    memory_matrix,
    ndcg_per_user,
    ranks,
    recommend_samples,
)
from tests.recipes import load_recipe, report, save_checkpoint, save_prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data, and a checkpoint with a memory of it."""
    folder = tmp_path_factory.mktemp("memory")
    save_checkpoint(folder / "checkpoint", instruction="")
    save_prepared(folder / "data")
    recipe = load_recipe("memory")
    checkpoint = str(folder / "checkpoint")
    recipe.main(recipe.MemoryArguments(str(folder / "data"), [f"{checkpoint}@0"], num_beams=8, batch_size=5))
    return folder


def test_the_largest_neighbours_are_kept(folder):
    data = PreparedData.load(folder / "data")
    memory = build_memory(data, max_neighbours=3, shrinkage=2.0)
    matrix = memory_matrix(data.split.train, len(data.items), shrinkage=2.0).toarray()
    for item, row in enumerate(matrix):
        kept = slice(memory.pointers[item], memory.pointers[item + 1])
        weights = memory.weights[kept].double().numpy()
        assert len(weights) == min(3, (row > 0).sum())
        np.testing.assert_allclose(row[memory.neighbours[kept]], weights, rtol=1e-6)
        np.testing.assert_allclose(np.sort(weights)[::-1], np.sort(row)[::-1][: len(weights)], rtol=1e-6)


@pytest.mark.parametrize("memory_is_right", [True, False])
def test_the_weight_follows_the_better_part(folder, memory_is_right):
    """Candidates 0 … 3, of which one part always puts the target first and the other puts it last."""
    memory = build_memory(PreparedData.load(folder / "data"))
    num_users = 12
    items = np.tile(np.arange(4), (num_users, 1))
    targets = np.arange(num_users) % 4
    right = np.where(items == targets[:, None], 0.7, 0.1)
    wrong = np.where(items == targets[:, None], 0.1, 0.3)
    parts = (right, wrong) if memory_is_right else (wrong, right)
    scores = dict(memory_scores=np.log(parts[0]), model_scores=np.log(parts[1]))
    recall = memory.recall(torch.arange(num_users)[:, None])
    scores["memory_strength"] = recall.strength.numpy()
    output = Recommendations(items, scores["model_scores"], np.zeros(num_users), 0.0, **scores)
    fitted, lists = fit_gate(memory, output, targets.tolist())
    is_known = recall.strength.numpy() > 0
    assert ndcg_per_user(ranks(lists, targets), 10)[is_known].mean() == 1.0
    weights = fitted.recall(torch.arange(num_users)[:, None]).weight
    weights = weights[weights > 0]
    # The target is first if the right part has at least a quarter of the weight.
    assert (weights > 0.25).all() if memory_is_right else (weights < 0.75).all()
    assert memory.gate == (0.0, 0.0)  # the given memory is unchanged


def test_the_fitted_lists_are_what_the_model_recommends(folder):
    """With all items among the candidates."""
    path = folder / "checkpoint"
    model, processor = LasarForGenerativeRec.from_pretrained(path), LasarProcessor.from_pretrained(path)
    data = PreparedData.load(folder / "data")
    samples, options = data.samples["validation"], dict(num_beams=20, latent_steps=0)
    memory = build_memory(data)
    candidates = recommend_samples(model, samples, processor, 20, memory=memory, **options)
    fitted, lists = fit_gate(memory, candidates, list(samples["target"]))
    assert fitted.gate != memory.gate
    output = recommend_samples(model, samples, processor, 10, memory=fitted, **options)
    assert (output.items == lists).all()


@pytest.mark.parametrize("models", [["missing"], ["{0}@0", "{0}"]])
def test_models_are_distinct_folders(folder, models):
    """The memory is written into the folder, once."""
    recipe = load_recipe("memory")
    with pytest.raises(ValueError, match="models"):
        recipe.MemoryArguments(str(folder / "data"), [name.format(folder / "checkpoint") for name in models])


def test_the_card_says_that_there_is_a_memory(folder):
    text = split_headings(find_card(folder / "checkpoint").text)["Item memory"]
    assert "item_memory.safetensors" in text and "Fitted for 0 latent steps." in text


def test_eval_has_a_second_row(folder, tmp_path):
    recipe = load_recipe("eval")
    models = [f"direct={folder / 'checkpoint'}@0"]
    recipe.main(recipe.EvaluateArguments(str(folder / "data"), str(tmp_path), models, batch_size=3, num_beams=8))
    results = report(tmp_path)["results"]
    assert list(results)[-2:] == ["direct", "direct + memory"]
    assert results["direct + memory"] != results["direct"]
    assert results["direct + memory"]["repeats"] == 0


@pytest.mark.parametrize(("choice", "is_used"), [("auto", True), (True, True), ("false", False)])
def test_recommend_mixes_if_the_checkpoint_has_one(folder, tmp_path, choice, is_used):
    recipe = load_recipe("recommend")
    histories = tmp_path / "histories.jsonl"
    histories.write_text(json.dumps({"user_id": "a", "history": ["item-1", "item-2"]}) + "\n", encoding="utf-8")
    recipe.main(recipe.RecommendArguments(
        str(folder / "checkpoint"), str(histories), str(tmp_path / "out"), memory=choice, num_beams=8
    ))  # fmt: skip
    row = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()[0]
    processor = LasarProcessor.from_pretrained(folder / "checkpoint")
    memory = ItemMemory.from_pretrained(folder / "checkpoint") if is_used else None
    model = LasarForGenerativeRec.from_pretrained(folder / "checkpoint")
    expected = model.recommend(
        **processor([["item-1", "item-2"]]), catalog=processor.catalog, num_beams=8, memory=memory
    )
    assert row["item_ids"] == [processor.catalog.item_ids[item] for item in expected.items[0]]


def test_depths_are_numbers(folder):
    recipe = load_recipe("memory")
    with pytest.raises(ValueError, match="models"):
        recipe.MemoryArguments(str(folder / "data"), ["path@two"])
