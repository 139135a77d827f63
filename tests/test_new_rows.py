"""New tokens of a backbone that has learnt text: nearly uniform among themselves, and without probability in text."""

import math

import pytest
import torch

from lasar_hf import LasarForGenerativeRec
from tests.tiny import WORDS, batch, row, sid_ids, tiny_backbone, tiny_catalog, tiny_tokenizer


FIRST_WORD = 3  # after the special tokens
NUM_WORDS = len(WORDS) - FIRST_WORD


def text(num_rows: int = 32, length: int = 16) -> torch.Tensor:
    """Token ids `(num_rows, length)`: a word follows its predecessor in the vocabulary nine times out of ten."""
    steps = torch.where(torch.rand(num_rows, length) < 0.9, 1, torch.randint(NUM_WORDS, (num_rows, length)))
    return FIRST_WORD + steps.cumsum(dim=1) % NUM_WORDS


def pretrained_backbone(kind: str, tied: bool):
    torch.manual_seed(0)
    backbone = tiny_backbone(kind, hidden_size=32, tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
    for _ in range(60):
        token_ids = text()
        loss = backbone(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1.2  # the entropy of the text is 0.5, that of random words 2.2
    return backbone.eval()


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_of_a_pretrained_backbone_do_no_harm(kind, tied):
    levels, codes = 3, 64
    model = LasarForGenerativeRec.from_backbone(pretrained_backbone(kind, tied), tiny_tokenizer(), levels, codes)
    model.requires_grad_(False)
    probability = model(input_ids=text()).logits.softmax(dim=-1)  # (32, 16, V)
    assert probability[..., len(WORDS) :].sum(dim=-1).mean() < 1e-4
    catalog = tiny_catalog(20, levels, codes)
    rows = [row(model, 8, 0, sid_ids(model, catalog.codes[item])) for item in range(20)]
    logits = model(**batch(rows)).logits[:, -levels - 1 : -1]  # (20, M, V)
    start = model.config.sid_token_offset
    logits = logits[..., start:].unflatten(-1, (levels, codes)).diagonal(dim1=1, dim2=2).transpose(1, 2)  # (20, M, K)
    cross_entropy = -logits.log_softmax(dim=-1).gather(2, catalog.codes[:, :, None]).mean()
    assert cross_entropy < math.log(codes) + 0.1


def test_text_goes_on_as_before():
    torch.manual_seed(0)
    token_ids = text(4)
    backbone = pretrained_backbone("qwen3", tied=True)
    with torch.no_grad():
        before = backbone(input_ids=token_ids).logits.log_softmax(dim=-1)
        model = LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer(), 3, 64)
        after = model(input_ids=token_ids).logits.log_softmax(dim=-1)[..., : len(WORDS)]
    assert (before.exp() * (before - after)).sum(dim=-1).mean() < 1e-4


def test_random_weights_keep_their_deviation():
    """There is no text to protect, and a backbone from scratch learns faster from rows that differ."""
    torch.manual_seed(0)
    model = LasarForGenerativeRec.from_backbone(tiny_backbone(), tiny_tokenizer(), 3, 64)
    weight = model.lm_head.weight
    assert torch.isclose(weight[len(WORDS) :].std(), weight[: len(WORDS)].std(), rtol=0.1)
