"""Items of the prompt have no probability: in training, sampling and recommending, by the same distribution."""

import pytest
import torch
from datasets import Dataset

from lasar_hf import LasarConfig, LasarGRPOConfig, LasarGRPOTrainer, LasarProcessor, SidCatalog
from lasar_hf.model.decoding_lasar import SidLogitsProcessor, history_filter, sample_items
from lasar_hf.trainers import add_catalog_head
from tests.references import score_every_item
from tests.tiny import batch, sid_ids, tiny_catalog, tiny_model
from tests.training import COMMON, first_code


def recommender(num_items: int = 20):
    """A model that excludes the history, its catalogue, and the Semantic-ID tokens of each item."""
    model, _ = tiny_model()
    model.config.exclude_history = True
    catalog = tiny_catalog(num_items)
    return model, catalog, [sid_ids(model, codes) for codes in catalog.codes]


def prompt_of(model, items: list[list[int]]) -> list[int]:
    return [3, *[token for item in items for token in item], 5, model.config.latent_start_token_id]


def test_leaves_are_found_at_the_end_of_each_item():
    model, catalog, items = recommender()
    trie = catalog.trie("cpu")
    ids = torch.tensor([[3, *items[4], items[2][0], *items[2], 7, *items[4][:2]]])  # an extra code and a cut item
    leaves = trie.leaves_in(ids - model.config.sid_token_offset, model.config.codebook_size)[0]
    found = {column: trie.items(leaf)[0].item() for column, leaf in enumerate(leaves) if leaf >= 0}
    assert found == {3: 4, 7: 2}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("steps", [0, 2])
def test_scores_are_the_policy_without_the_history(side, steps):
    model, catalog, items = recommender()
    histories = [[4, 2, 4], [7], list(range(1, 19))]
    prompts = batch([prompt_of(model, [items[i] for i in history]) for history in histories], side)
    output = model.recommend(**prompts, catalog=catalog, top_k=20, num_beams=20, latent_steps=steps)
    for row, history in enumerate(histories):
        others = [item for item in range(20) if item not in history]
        rest = SidCatalog(catalog.codes[others], list(map(str, others)))
        ids = prompt_of(model, [items[i] for i in history])
        expected = score_every_item(model, ids, steps, rest)
        found = dict(zip(output.items[row].tolist(), output.scores[row].tolist(), strict=True))
        assert sorted(found) == sorted({*others, -1})
        torch.testing.assert_close(torch.tensor([found[item] for item in others]), expected.float())


@pytest.mark.parametrize(("history", "num_items"), [([4, 2, 9], 20), (range(5), 5)])
def test_training_scores_are_those_of_recommending(history, num_items):
    """The importance ratio of GRPO is 1 on the policy that drew, also for a history of all items."""
    model, catalog, items = recommender(num_items)
    ids = prompt_of(model, [items[i] for i in history])
    count = num_items - len(history) or num_items
    output = model.recommend(torch.tensor([ids]), catalog=catalog, top_k=count, num_beams=20, latent_steps=2)
    tail = [model.config.latent_token_id] * 2 + [model.config.latent_end_token_id]
    inputs = batch([[*ids, *tail, *items[item]] for item in output.items[0].tolist()])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    add_catalog_head(model, catalog)
    model.eval()
    scored = model(**inputs, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(scored.log_probs.sum(dim=1), output.scores[0], atol=1e-5, rtol=1e-5)


def test_every_item_of_a_history_is_scored_without_those_before_it():
    model, catalog, items = recommender()
    add_catalog_head(model, catalog)
    model.eval()
    ids = torch.tensor([[3, *items[4], *items[2], *items[9]]])
    scored = model(ids, labels=torch.where(ids > 3, ids, -100), fused_lm_head=True).log_probs[0]
    for number in range(3):
        end = 4 + 3 * number  # the sequence up to this item
        single = torch.tensor([ids[0, :end].tolist()])
        labels = single.clone()
        labels[:, :-3] = -100
        alone = model(single, labels=labels, fused_lm_head=True).log_probs[0]
        torch.testing.assert_close(scored[end - 4 : end - 1], alone[-3:])


def test_the_item_right_before_a_label_has_no_probability():
    """In a history, no token is between two items. These two differ in their last code only."""
    model, catalog, items = recommender()
    add_catalog_head(model, catalog)
    codes = catalog.codes.tolist()
    before, item = next((a, b) for a in range(20) for b in range(20) if a != b and codes[a][:2] == codes[b][:2])
    ids = torch.tensor([[3, *items[before], *items[item]]])
    labels = ids.clone()
    labels[:, :4] = -100
    score = model.eval()(ids, labels=labels, fused_lm_head=True).log_probs[0, -1]
    follow = [c[2] for c in codes if c[:2] == codes[item][:2] and c != codes[before]]
    logits = model(ids).logits[0, -2, [model.config.sid_token_id(2, code) for code in follow]]
    torch.testing.assert_close(score, logits.log_softmax(0)[follow.index(codes[item][2])], atol=1e-5, rtol=1e-5)


def test_a_target_that_repeats_keeps_its_probability():
    model, catalog, items = recommender()
    add_catalog_head(model, catalog)
    ids = torch.tensor([[*prompt_of(model, [items[4], items[2]]), model.config.latent_end_token_id, *items[4]]])
    labels = ids.clone()
    labels[:, :-3] = -100
    assert model(ids, labels=labels, fused_lm_head=True).loss.isfinite()


@pytest.mark.parametrize("replacement", [True, False])
def test_samples_are_not_in_the_history(replacement):
    model, catalog, items = recommender()
    ids = torch.tensor([prompt_of(model, [items[i] for i in range(15)])])
    trie = catalog.trie("cpu")
    with model.evaluation_mode():
        state = model.encode_prompts(ids, latent_steps=1)
        history = history_filter(model.config, trie, ids)
        leaves, _ = sample_items(model, state, trie, 5, replacement=replacement, history=history)
    assert set(trie.items(leaves).flatten().tolist()) <= set(range(15, 20))


def test_items_that_share_a_semantic_id_are_not_excluded():
    model, _ = tiny_model()
    model.config.exclude_history = True
    codes = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0]])
    catalog = SidCatalog(codes, list("abcd"), allow_collisions=True)
    first, _, third, _ = (sid_ids(model, codes) for codes in catalog.codes)
    ids = torch.tensor([prompt_of(model, [first, third])])
    output = model.recommend(ids, catalog=catalog, top_k=4, num_beams=4, latent_steps=0)
    assert sorted(output.items[0].tolist()) == [-1, 0, 1, 3]


def test_a_history_of_all_items_excludes_none():
    model, catalog, items = recommender(num_items=5)
    ids = torch.tensor([prompt_of(model, items)])
    output = model.recommend(ids, catalog=catalog, top_k=5, num_beams=5, latent_steps=0)
    assert sorted(output.items[0].tolist()) == list(range(5))


def test_generate_agrees_with_recommend():
    model, catalog, items = recommender()
    model.eval()
    ids = torch.tensor([[*prompt_of(model, [items[4], items[2]]), model.config.latent_end_token_id]])
    constraint = SidLogitsProcessor(catalog, model.config)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=[constraint],
        num_beams=6,
        num_return_sequences=6,
        max_new_tokens=3,
        length_penalty=0.0,
        do_sample=False,
    )
    output = model.recommend(ids[:, :-1], catalog=catalog, top_k=6, num_beams=6, latent_steps=0)
    assert written[:, -3:].tolist() == [items[item] for item in output.items[0].tolist()]


def test_a_group_needs_enough_items_without_repeats(tmp_path):
    """Stochastic beams are distinct, so a prompt with nearly all items cannot fill a group."""
    model, tokenizer = tiny_model()
    model.config.exclude_history = True
    catalog = tiny_catalog()
    processor = LasarProcessor(tokenizer, catalog, instruction="")
    prompt = processor.prompt_text(list(range(17)))
    args = LasarGRPOConfig(str(tmp_path), **COMMON, num_generations=8, sampling="stochastic_beams")
    rows = Dataset.from_list([{"prompt": prompt, "target": 18}] * 8)
    trainer = LasarGRPOTrainer(model, args, reward_funcs=[first_code], train_dataset=rows, processing_class=processor)
    with pytest.raises(ValueError, match="num_generations"):
        trainer.train()


def test_the_configuration_keeps_it(tmp_path):
    LasarConfig(exclude_history=True).save_pretrained(tmp_path)
    assert LasarConfig.from_pretrained(tmp_path).exclude_history
    assert not LasarConfig().exclude_history
