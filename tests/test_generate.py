"""Hugging Face `generate` under the catalogue's constraint, and the pinned generation config."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, pipeline

from lasar_hf import LasarForGenerativeRec, SidCatalog
from lasar_hf.model.decoding_lasar import SidLogitsProcessor
from tests.references import draw_model_and_catalog, draw_prompts, score_every_item
from tests.tiny import batch, row, sid_ids, tiny_backbone, tiny_catalog, tiny_model, tiny_tokenizer


def with_slots(model, prompts: list[list[int]], depths: list[int], closed: bool = True) -> dict[str, torch.Tensor]:
    """Left-padded prompts with their latent slots and, if closed, `<|latent_end|>`."""
    config = model.config
    slots = [[config.latent_token_id] * depth + [config.latent_end_token_id] * closed for depth in depths]
    return batch([prompt + slot for prompt, slot in zip(prompts, slots, strict=True)])


def items_of(model, catalog: SidCatalog, sequences: torch.Tensor) -> list[int]:
    """Item indices of sequences that end in Semantic IDs, -1 for anything else."""
    index_of = {tuple(sid_ids(model, codes)): i for i, codes in enumerate(catalog.codes.tolist())}
    return [index_of.get(tuple(ids), -1) for ids in sequences[:, -catalog.num_levels :].tolist()]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_generate_returns_what_recommend_returns(data):
    """Random catalogues, depths, paddings, widths and batches, with and without cache, region open or closed."""
    model, catalog = draw_model_and_catalog(data)
    prompts, depths, inputs = draw_prompts(data, model)
    size, width = len(prompts), data.draw(st.integers(2, 8))
    closed = bool((depths == 0).any()) or data.draw(st.booleans())  # without slots the region must be closed
    recommended = model.recommend(**inputs, catalog=catalog, top_k=width, num_beams=width, latent_steps=depths)
    generated = model.generate(
        **with_slots(model, prompts, depths.tolist(), closed),
        max_new_tokens=catalog.num_levels + (not closed),
        logits_processor=[SidLogitsProcessor(catalog, model.config)],
        num_beams=width,
        num_return_sequences=width,
        length_penalty=0.0,
        use_cache=data.draw(st.booleans()),
        return_dict_in_generate=True,
        output_scores=True,
    )
    items = torch.tensor(items_of(model, catalog, generated.sequences)).view(size, width)
    scores = generated.sequences_scores.view(size, width)
    found = scores > -1e8  # with fewer items than beams `generate` pads with anything
    assert torch.equal(found, recommended.items >= 0)
    assert torch.equal(torch.where(found, items, -1), recommended.items)
    torch.testing.assert_close(scores[found], recommended.scores[found], atol=2e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_one_beam(use_cache):
    model, _ = tiny_model()
    catalog, prompts, depths = tiny_catalog(), [row(model, 6, 0), row(model, 4, 0, seed=1)], [2, 0]
    one = model.recommend(**batch(prompts), catalog=catalog, top_k=1, num_beams=1, latent_steps=torch.tensor(depths))
    # Two tokens more than a Semantic ID has: only the end of the text can follow.
    generated = model.generate(
        **with_slots(model, prompts, depths),
        logits_processor=[SidLogitsProcessor(catalog, model.config)],
        max_new_tokens=5,
        use_cache=use_cache,
    )
    assert generated.shape[1] == len(prompts[0]) + 2 + 1 + 3 + 1
    assert (generated[:, -1] == model.config.backbone_config.eos_token_id).all()
    assert items_of(model, catalog, generated[:, :-1]) == one.items[:, 0].tolist()


def test_sampling_draws_from_the_policy():
    """With 60 codes a level, of which all can be drawn."""
    torch.manual_seed(0)
    model, _ = tiny_model(codebook_size=60)
    catalog = SidCatalog([[i, 0, 0] for i in range(60)], [str(i) for i in range(60)])
    prompt = row(model, 5, 0)
    generated = model.generate(
        **with_slots(model, [prompt], [1]),
        logits_processor=[SidLogitsProcessor(catalog, model.config)],
        max_new_tokens=3,
        do_sample=True,
        top_k=0,
        num_return_sequences=2000,
    )
    counts = torch.bincount(torch.tensor(items_of(model, catalog, generated)), minlength=60).double() / 2000
    expected = score_every_item(model, prompt, 1, catalog).exp()
    assert (counts - expected).abs().max() < 0.03
    assert (counts > 0).sum() > 50


def call_generate(model, tokenizer, ids):
    return model.generate(ids, max_new_tokens=3)


def call_with_names(model, tokenizer, ids):
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=2)


def call_with_the_constraint(model, tokenizer, ids):
    return model.generate(ids, logits_processor=[SidLogitsProcessor(tiny_catalog(), model.config)], max_new_tokens=4)


def call_with_an_adapter(model, tokenizer, ids):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"])).generate(input_ids=ids, max_new_tokens=3)


def call_pipeline(model, tokenizer, ids):
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return write([tokenizer.decode(sequence) for sequence in ids.tolist()], max_new_tokens=3)


@pytest.mark.parametrize(
    "call", [call_generate, call_with_names, call_with_the_constraint, call_with_an_adapter, call_pipeline]
)
def test_a_prompt_without_slots_is_sent_to_recommend(call):
    model, tokenizer = tiny_model()
    with pytest.raises(ValueError, match="Prompt 0 .*recommend"):
        call(model, tokenizer, torch.tensor([row(model, 6, 0)]))


@pytest.mark.parametrize("after", ["<|endoftext|>", "red", "<a_1>", "<|pad|>"])
def test_only_slots_or_the_end_follow_the_start(after):
    """An appended end-of-text token, text, codes and padding do not hide that there are no slots."""
    model, tokenizer = tiny_model()
    closed = row(model, 7, 0, [])
    opened = [*row(model, 7, 0), tokenizer.convert_tokens_to_ids(after)]
    with pytest.raises(ValueError, match="Prompt 1 .*recommend"):
        model.generate(torch.tensor([closed, opened]), max_new_tokens=3)


def test_packed_sequences_are_refused():
    """They would end without a token."""
    model, _ = tiny_model()
    ids = torch.tensor([row(model, 6, 2, [])])
    with pytest.raises(ValueError, match="paged"):
        model.generate(ids, cache_implementation="paged", max_new_tokens=3)


def test_plain_text_continues_as_in_the_backbone():
    model, tokenizer = tiny_model()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    written = write("the next item", max_new_tokens=4, return_tensors=True)
    ids = tokenizer("the next item").input_ids
    for _ in range(4):
        logits = model.lm_head(model.model.backbone(torch.tensor([ids])).last_hidden_state)[0, -1]
        logits[[model.config.latent_start_token_id, model.config.latent_token_id]] = -torch.inf
        ids.append(int(logits.argmax()))
    assert written[0]["generated_token_ids"] == ids


def test_the_processor_leaves_plain_text_alone():
    model, _ = tiny_model()
    processor = SidLogitsProcessor(tiny_catalog(), model.config)
    config, scores = model.config, torch.randn(3, model.config.vocab_size)
    plain, opened, history = [3, 4, 5], [3, 4, config.latent_start_token_id], [3, *sid_ids(model, (1, 2))]
    processed = processor(torch.tensor([plain, opened, history]), scores)
    assert torch.equal(processed[[0, 2]], scores[[0, 2]])
    assert processed[1].isfinite().nonzero().tolist() == [[config.latent_end_token_id]]
    assert processed[1].max() == 0


def test_the_processor_never_lets_an_invalid_prefix_pass():
    model, _ = tiny_model()
    catalog = SidCatalog([[0, 1, 2], [3, 0, 0]], ["a", "b"])
    processor, config = SidLogitsProcessor(catalog, model.config), model.config
    good, bad = ([config.latent_end_token_id, *sid_ids(model, codes)] for codes in ((0, 1), (0, 2)))
    with pytest.raises(ValueError, match="Sequence 1 of input_ids"):
        processor(torch.tensor([good, bad]), torch.zeros(2, config.vocab_size))
    with pytest.raises(ValueError, match="NaN"):
        processor(torch.tensor([good]), torch.full((1, config.vocab_size), torch.nan))
    with pytest.raises(ValueError, match="levels"):
        SidLogitsProcessor(tiny_catalog(num_items=5, num_sid_levels=2), config)
    whole = torch.tensor([[config.latent_end_token_id, *sid_ids(model, (0, 1, 2))]])
    processor.eos_token_id = None
    with pytest.raises(ValueError, match="max_new_tokens"):
        processor(whole, torch.zeros(1, config.vocab_size))


def test_no_leftover_of_the_backbone_survives(tmp_path):
    leftovers = dict(
        do_sample=True,
        temperature=0.6,
        top_k=2,
        top_p=0.5,
        min_p=0.3,
        typical_p=0.5,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
        length_penalty=2.0,
        num_beams=3,
    )
    backbone = tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "generation_config.json").write_text(json.dumps(leftovers))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "backbone").generation_config.top_k == 2
    model = LasarForGenerativeRec.from_backbone(
        str(tmp_path / "backbone"), tiny_tokenizer(), num_sid_levels=3, codebook_size=4
    ).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = LasarForGenerativeRec.from_pretrained(tmp_path / "model").eval()
    neutral = dict(
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        num_beams=1,
    )  # top_k and length_penalty: transformers' own
    for config in (model.generation_config, loaded.generation_config):
        used, _ = loaded._prepare_generation_config(config)
        assert {name: getattr(used, name) for name in neutral} == neutral
        assert not used.min_p
        assert used.suppress_tokens == [model.config.latent_start_token_id, model.config.latent_token_id]
