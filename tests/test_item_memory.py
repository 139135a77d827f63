"""A memory of item-to-item steps, mixed with the model's distribution over items."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lasar_hf import ItemMemory, SidCatalog
from lasar_hf.model.decoding_lasar import beam_search, score_items
from lasar_hf.model.memory_lasar import catalog_hash
from tests.references import score_every_item
from tests.tiny import batch, sid_ids, tiny_catalog, tiny_model


HISTORIES = [[4, 2, 9], [7], [1, 4]]


def memory_of(matrix: torch.Tensor, catalog, **kwargs) -> ItemMemory:
    rows, neighbours = matrix.nonzero(as_tuple=True)
    pointers = torch.nn.functional.pad(torch.bincount(rows, minlength=len(matrix)).cumsum(0), (1, 0))
    return ItemMemory(pointers, neighbours, matrix[rows, neighbours], catalog_hash(catalog), **kwargs)


def gate_of(weight: float) -> tuple[float, float]:
    """The gate with the same weight for all items."""
    return math.log(weight / (1 - weight)), 0.0


def setup(exclude_history: bool = False, levels: int = 3):
    """A model, its catalogue, prompts of `HISTORIES`, and a sparse matrix in which item 7 has no neighbour."""
    model, _ = tiny_model(num_sid_levels=levels, codebook_size=4 if levels == 3 else 30)
    model.config.exclude_history = exclude_history
    catalog = tiny_catalog() if levels == 3 else SidCatalog(torch.arange(20)[:, None], list(map(str, range(20))))
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(20, 20, generator=generator) * (torch.rand(20, 20, generator=generator) < 0.3)
    matrix[7] = 0
    rows = []
    for history in HISTORIES:
        tokens = [token for item in history for token in sid_ids(model, catalog.codes[item])]
        rows.append([3, *tokens, model.config.latent_start_token_id])
    return model, catalog, rows, matrix


def expected_memory(matrix, history, decay, exclude_history):
    scores = sum(decay**k * matrix[item] for k, item in enumerate(reversed(history)))
    if exclude_history:
        scores = scores.clone()
        scores[history] = 0
    return scores / scores.sum() if scores.sum() > 0 else scores


@pytest.mark.parametrize("exclude_history", [False, True])
def test_the_distribution_is_the_decayed_sum_of_rows(exclude_history):
    _, catalog, _, matrix = setup()
    memory = memory_of(matrix, catalog, decay=0.5, gate=(0.3, -0.2))
    padded = torch.tensor([[4, 2, -1, 9], [-1, 7, -1, -1], [-1, 1, 4, -1]])
    recall = memory.recall(padded, padded if exclude_history else None)
    everything = torch.arange(20).expand(3, -1)
    expected = torch.stack([expected_memory(matrix, history, 0.5, exclude_history) for history in HISTORIES])
    torch.testing.assert_close(recall.probabilities(everything), expected)
    for row, (history, probs) in enumerate(zip(HISTORIES, expected, strict=True)):
        scores = sum(0.5**k * matrix[item] for k, item in enumerate(reversed(history)))
        largest = float(scores[probs > 0].max()) if probs.any() else 0.0
        assert float(recall.strength[row]) == pytest.approx(largest)
        weight = 1 / (1 + math.exp(-(0.3 - 0.2 * math.log(largest)))) if largest else 0.0
        assert float(recall.weight[row]) == pytest.approx(weight)
    candidates = recall.candidates(6)
    for row, probs in zip(candidates.tolist(), expected, strict=True):
        best = probs.argsort(descending=True)[:6]
        assert row == [item if probs[item] > 0 else -1 for item in best.tolist()]


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("after_search", [False, True])
def test_items_are_scored_as_one_by_one(levels, steps, after_search):
    model, catalog, rows, _ = setup(levels=levels)
    items = torch.tensor([[3, 0, 19, -1], [5, 5, 1, 2], [-1, 11, 12, 13]])
    trie = catalog.remove([catalog.item_ids[19]]).trie("cpu")
    with model.evaluation_mode():
        state = model.encode_prompts(**batch(rows), latent_steps=steps)
        if after_search:
            beam_search(model, state, trie, 5)
        scores = score_items(model, state, trie, items)
    left = SidCatalog(catalog.codes[:19], catalog.item_ids[:19])
    for row, ids in enumerate(rows):
        expected = score_every_item(model, ids, steps, left)
        for item, score in zip(items[row].tolist(), scores[row].tolist(), strict=True):
            assert score == pytest.approx(expected[item].item() if 0 <= item < 19 else -math.inf, abs=1e-4)


def test_of_two_prefixes_of_the_same_items_the_shorter_does_not_see_the_longer():
    model, _ = tiny_model()
    catalog = SidCatalog([[0, 1, 0], [0, 1, 2], [2, 0, 0]], ["a", "b", "c"])
    prompt = [3, 4, 5, model.config.latent_start_token_id]
    with model.evaluation_mode():
        state = model.encode_prompts(**batch([prompt]), latent_steps=1)
        scores = score_items(model, state, catalog.trie("cpu"), torch.arange(3)[None])[0]
    expected = score_every_item(model, prompt, 1, catalog)
    assert scores.tolist() == pytest.approx([expected[item].item() for item in range(3)], abs=1e-4)


@pytest.mark.parametrize("exclude_history", [False, True])
def test_recommendations_are_those_of_the_mixture(exclude_history):
    model, catalog, rows, matrix = setup(exclude_history)
    memory = memory_of(matrix, catalog, gate=gate_of(0.6))
    output = model.recommend(**batch(rows), catalog=catalog, top_k=20, num_beams=20, latent_steps=1, memory=memory)
    for row, history in enumerate(HISTORIES):
        others = [item for item in range(20) if not (exclude_history and item in history)]
        rest = SidCatalog(catalog.codes[others], list(map(str, others)))
        model_probs = score_every_item(model, rows[row], 1, rest).exp().float()
        memory_probs = expected_memory(matrix, history, 0.7, exclude_history)[others]
        weight = 0.6 if history != [7] else 0.0
        mixed = ((1 - weight) * model_probs + weight * memory_probs).log()
        order = mixed.argsort(descending=True)
        num_items = len(others)
        assert output.items[row].tolist() == [others[i] for i in order.tolist()] + [-1] * (20 - num_items)
        torch.testing.assert_close(output.scores[row, :num_items], mixed[order], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.memory_scores[row, :num_items], memory_probs[order].log())


def test_the_memory_finds_items_that_the_beams_miss():
    model, catalog, rows, matrix = setup()
    worst = model.recommend(**batch(rows), catalog=catalog, top_k=20, num_beams=20, latent_steps=0).items[0, -1]
    only = torch.zeros_like(matrix)
    only[9, worst] = 1.0
    options = dict(catalog=catalog, top_k=2, num_beams=2, latent_steps=0)
    memory = memory_of(only, catalog, gate=gate_of(0.9))
    assert model.recommend(**batch(rows), **options, memory=memory).items[0, 0] == worst
    denied = model.recommend(**batch(rows), **options, memory=memory, deny=[[int(worst)], None, None])
    assert worst not in denied.items[0]


def test_saved_and_loaded(tmp_path):
    _, catalog, _, matrix = setup()
    memory_of(matrix, catalog, decay=0.4, gate=(1.0, -0.5)).save_pretrained(tmp_path)
    loaded = ItemMemory.from_pretrained(tmp_path)
    assert (loaded.decay, loaded.gate) == (0.4, (1.0, -0.5))
    loaded.check_matches(catalog)
    assert torch.equal(loaded.weights, matrix[matrix.nonzero(as_tuple=True)])


def test_the_memory_of_another_catalogue_is_refused():
    model, catalog, rows, matrix = setup()
    other = SidCatalog(catalog.codes, [f"other-{i}" for i in range(20)])
    with pytest.raises(ValueError, match="another catalogue"):
        model.recommend(**batch(rows), catalog=catalog, memory=memory_of(matrix, other))


def test_added_and_removed_items_are_allowed():
    """Added items are unknown to the memory, also in a history; removed ones are not recommended."""
    model, catalog, rows, matrix = setup(exclude_history=True)
    memory = memory_of(matrix, catalog)
    free = [[a, b, 3] for a in range(4) for b in range(4) if [a, b, 3] not in catalog.codes.tolist()][:2]
    larger = catalog.add(torch.tensor(free), ["new-0", "new-1"])
    first = model.recommend(**batch(rows), catalog=larger, top_k=22, num_beams=22, latent_steps=0, memory=memory)
    assert all(20 in row or 21 in row for row in first.items.tolist())
    known = first.items[0] < 20
    expected = expected_memory(matrix, HISTORIES[0], 0.7, True)
    found = first.memory_scores[0][known & (first.items[0] >= 0)].exp()
    torch.testing.assert_close(found, expected[first.items[0][known & (first.items[0] >= 0)]])
    tokens = sid_ids(model, larger.codes[21])
    with_new = batch([[3, *sid_ids(model, catalog.codes[4]), *tokens, model.config.latent_start_token_id]])
    output = model.recommend(**with_new, catalog=larger, top_k=22, num_beams=22, latent_steps=0, memory=memory)
    assert 21 not in output.items[0] and output.scores[0].max().isfinite()
    smaller = larger.remove([catalog.item_ids[3]])
    assert 3 not in model.recommend(**batch(rows), catalog=smaller, top_k=22, num_beams=22, memory=memory).items


@pytest.mark.parametrize("lists", [dict(deny=[[0, 1, 2], None, None]), dict(allow=[[3, 4, 5], None, None])])
def test_lists_do_not_hide_the_next_candidates(lists):
    """The memory's best items are denied; the next one is found although it is not among the beams."""
    model, catalog, rows, matrix = setup()
    worst = model.recommend(**batch(rows), catalog=catalog, top_k=20, num_beams=20, latent_steps=0).items[0]
    target = next(item for item in reversed(worst.tolist()) if item in (3, 4, 5))
    row = torch.zeros_like(matrix)
    row[9, [0, 1, 2]], row[9, target] = 1.0, 0.9
    memory = memory_of(row, catalog, gate=gate_of(0.99))
    output = model.recommend(
        **batch(rows), catalog=catalog, top_k=1, num_beams=1, latent_steps=0, memory=memory, **lists
    )
    assert output.items[0].tolist() == [target]


def test_removed_items_have_no_part_of_the_distribution():
    """Neither as candidates nor in the sum, but they count in a history."""
    model, catalog, rows, matrix = setup()
    smaller = catalog.remove([catalog.item_ids[i] for i in (9, 3)])
    row = torch.zeros_like(matrix)
    row[9, 3], row[9, 5] = 0.9, 0.1
    memory = memory_of(row, catalog, gate=gate_of(0.5))
    output = model.recommend(**batch(rows), catalog=smaller, top_k=18, num_beams=20, latent_steps=0, memory=memory)
    assert output.scores[0].exp().sum() == pytest.approx(1.0, abs=1e-4)
    found = dict(zip(output.items[0].tolist(), output.memory_scores[0].exp().tolist(), strict=True))
    assert found[5] == pytest.approx(1.0)


def test_scores_that_underflow_leave_the_memory_out():
    _, catalog, _, matrix = setup()
    row = torch.zeros_like(matrix)
    row[0, 3] = 1.0
    recall = memory_of(row, catalog, decay=0.05).recall(torch.tensor([[0] + [7] * 60]))
    assert recall.weight.tolist() == [0.0] and recall.probs.isfinite().all()


def test_a_semantic_id_of_several_items_is_not_excluded():
    model, catalog, _, matrix = setup(exclude_history=True)
    codes = catalog.codes.clone()
    codes[1] = codes[0]
    shared = SidCatalog(codes, catalog.item_ids, allow_collisions=True)
    row = torch.zeros_like(matrix)
    row[4, [0, 1]] = 0.5
    tokens = [*sid_ids(model, codes[1]), *sid_ids(model, codes[4])]
    prompt = torch.tensor([[3, *tokens, model.config.latent_start_token_id]])
    output = model.recommend(prompt, catalog=shared, top_k=2, latent_steps=0, memory=memory_of(row, shared))
    assert output.items[0].tolist() == [0, 1]
    assert output.memory_scores[0].exp().tolist() == pytest.approx([0.5, 0.5])


def test_more_items_than_beams_are_found():
    model, catalog, rows, matrix = setup()
    memory = memory_of(matrix, catalog)
    output = model.recommend(**batch(rows), catalog=catalog, top_k=20, num_beams=2, latent_steps=0, memory=memory)
    assert output.items.min() >= 0


def test_a_folder_without_a_memory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="item_memory"):
        ItemMemory.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change", [dict(neighbours=torch.tensor([3])), dict(weights=torch.tensor([-1.0])),
               dict(weights=torch.tensor([math.inf])), dict(decay=0.0),
               dict(pointers=torch.tensor([0, 2, 2])), dict(pointers=torch.tensor([1, 0, 1])),
               dict(gate=(math.nan, 0.0))]
)  # fmt: skip
def test_a_broken_memory_is_refused(change):
    parts = dict(pointers=torch.tensor([0, 1, 1]), neighbours=torch.tensor([1]), weights=torch.tensor([1.0]),
                 catalog_sha256="")  # fmt: skip
    ItemMemory(**parts)
    with pytest.raises(ValueError, match="memory|decay"):
        ItemMemory(**parts | change)


def test_a_damaged_memory_is_named(tmp_path):
    (tmp_path / "item_memory.safetensors").write_bytes(b"any")
    with pytest.raises(ValueError, match="item_memory.safetensors is damaged"):
        ItemMemory.from_pretrained(tmp_path)


def test_a_memory_of_an_older_version_is_refused(tmp_path):
    """Its weight depended on the support of the newest item instead of the largest score."""
    _, catalog, _, matrix = setup()
    memory = memory_of(matrix, catalog)
    tensors = {name: getattr(memory, name) for name in ("pointers", "neighbours", "weights")}
    settings = {"catalog_sha256": memory.catalog_sha256, "decay": 0.7, "gate": [0.0, 0.0]}
    tensors["support"] = torch.ones(20, dtype=torch.long)
    save_file(tensors, tmp_path / "item_memory.safetensors", metadata={"settings": json.dumps(settings)})
    with pytest.raises(ValueError, match=r"support.*recipes/memory.py"):
        ItemMemory.from_pretrained(tmp_path)
