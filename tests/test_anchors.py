"""Anchors: batched and de-duplicated encoding equals one by one, and stale or torn stores are refused."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from lasar_hf.data import build_tokenizer
from lasar_hf.model.configuration_lasar import CONTROL_TOKENS, sid_tokens
from lasar_hf.reasoning import AnchorStore, checkpoint_hash, encode_anchors


SEGMENTS = [
    ["The last item is red.", "So a much longer chain of words follows from it."],
    ["Tea."],
    ["The last item is red.", "Tea.", "A third one with <a_0> in it."],
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer([text for sample in SEGMENTS for text in sample], 280)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL_TOKENS, *sid_tokens(2, 3)]})
    return tokenizer


@pytest.fixture(scope="module")
def backbone(tokenizer):
    torch.manual_seed(0)
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(backbone, tokenizer):
    return encode_anchors(backbone, tokenizer, SEGMENTS, checkpoint_hash(backbone), batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_anchor_is_the_last_hidden_state_of_the_segment_alone(backbone, tokenizer, batch_size):
    store = encode_anchors(backbone, tokenizer, SEGMENTS, "hash", batch_size=batch_size)
    for sample, segments in enumerate(SEGMENTS):
        assert store[sample].dtype == np.float32
        for step, text in enumerate(segments):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_tensors="pt").input_ids
            expected = backbone.eval()(input_ids=ids).last_hidden_state[0, -1].detach().numpy()
            np.testing.assert_allclose(store[sample][step], expected, atol=1e-5)


def test_equal_segments_share_a_vector(store):
    assert store.vectors.shape == (4, 16)
    assert store.depths.tolist() == [2, 1, 3] and len(store) == 3
    assert np.array_equal(store[0][0], store[2][0]) and np.array_equal(store[1][0], store[2][1])


def test_long_segments_keep_their_end(backbone, tokenizer):
    long, end = "a b c d e f g h i j", "g h i j"
    keep = len(tokenizer(" " + end, split_special_tokens=True).input_ids)
    cut = encode_anchors(backbone, tokenizer, [[long]], "", max_tokens=keep)[0]
    np.testing.assert_allclose(cut, encode_anchors(backbone, tokenizer, [[" " + end]], "")[0], atol=1e-5)


def test_the_backbone_is_left_as_it_was(backbone, tokenizer):
    backbone.train()
    encode_anchors(backbone, tokenizer, [["Tea."]], "")
    assert backbone.training and all(weight.grad is None for weight in backbone.parameters())


def test_save_and_load(store, tmp_path):
    store.save(tmp_path / "anchors")
    loaded = AnchorStore.load(tmp_path / "anchors", store.checkpoint_hash)
    assert isinstance(loaded.vectors, np.memmap)
    assert all(np.array_equal(loaded[row], store[row]) for row in range(3)) and len(loaded) == 3
    names = {path.name for path in (tmp_path / "anchors").iterdir()}
    assert names == {"vectors.npy", "index.npy", "offsets.npy", "anchors.json"}
    facts = json.loads((tmp_path / "anchors" / "anchors.json").read_text())
    assert facts == {
        "checkpoint_hash": store.checkpoint_hash, "hidden_size": 16, "num_vectors": 4, "num_segments": 6,
        "num_samples": 3, "inputs_hash": store.inputs_hash,
    }  # fmt: skip


def test_stale_anchors_are_refused(store, tmp_path):
    store.save(tmp_path)
    with pytest.raises(ValueError, match="stale anchors"):
        AnchorStore.load(tmp_path, "0" * 64)


def test_a_torn_store_is_refused(store, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no complete anchors"):
        AnchorStore.load(tmp_path, store.checkpoint_hash)
    store.save(tmp_path)
    monkeypatch.setattr(np, "save", lambda *args, **kwargs: 1 / 0)  # a second writing dies half-way
    with pytest.raises(ZeroDivisionError):
        store.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete anchors"):
        AnchorStore.load(tmp_path, store.checkpoint_hash)


def test_arrays_of_another_store_are_refused(store, tmp_path):
    store.save(tmp_path)
    np.save(tmp_path / "vectors.npy", np.zeros((9, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="sizes in anchors.json"):
        AnchorStore.load(tmp_path, store.checkpoint_hash)


@pytest.mark.parametrize("sample", [-1, 3])
def test_unknown_sample(store, sample):
    with pytest.raises(IndexError, match=f"sample {sample} has no anchors"):
        store[sample]


def test_checkpoint_hash_sees_every_bit():
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))  # has a scalar of another type

    one, other = model(), model()
    assert len(checkpoint_hash(one)) == 64
    assert checkpoint_hash(one) == checkpoint_hash(other)
    with torch.no_grad():
        other[0].weight[1, 1] = torch.nextafter(other[0].weight[1, 1], torch.tensor(9.0))
    assert checkpoint_hash(one) != checkpoint_hash(other)
    assert checkpoint_hash(model().bfloat16()) != checkpoint_hash(one)


@pytest.mark.parametrize(
    ("segments", "message"),
    [([["a"], []], "sample 1 has no segments"), ([], "no segments"), ([["a", ""]], "segment '' has no token")],
)
def test_nothing_to_encode(backbone, tokenizer, segments, message):
    with pytest.raises(ValueError, match=message):
        encode_anchors(backbone, tokenizer, segments, "")


class Killed(BaseException):
    """Stands for kill -9."""


def many(count=23):
    """More distinct segments than one shard holds, of lengths that are not in order."""
    return [[f"Segment {row * 7 % count} {'very ' * (row * 5 % 9)}long.", "Tea."] for row in range(count)]


def encode(backbone, tokenizer, folder, segments=None, fingerprint="stage1", **more):
    options = {"batch_size": 2, "shard_size": 4} | more
    return encode_anchors(backbone, tokenizer, segments or many(), fingerprint, folder=folder, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Counting(torch.nn.Module):
    """A backbone that counts the sequences it is given, and dies before the `last`-th pass."""

    def __init__(self, backbone, last=10**9):
        super().__init__()
        self.backbone, self.config, self.last, self.sequences = backbone, backbone.config, last, 0

    def forward(self, input_ids, attention_mask):
        self.last -= 1
        if self.last < 0:
            raise Killed
        self.sequences += len(input_ids)
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask)


def test_shards_on_disk_equal_memory(backbone, tokenizer, tmp_path):
    on_disk = encode(backbone, tokenizer, tmp_path)
    in_memory = encode_anchors(backbone, tokenizer, many(), "stage1", batch_size=2)
    assert isinstance(on_disk.vectors, np.memmap) and len(on_disk) == 23
    assert all(np.array_equal(on_disk[row], in_memory[row]) for row in range(23))
    assert set(files(tmp_path)) == {"vectors.npy", "index.npy", "offsets.npy", "anchors.json"}
    in_memory.save(tmp_path.parent / "saved")
    assert files(tmp_path.parent / "saved") == files(tmp_path)


def test_a_killed_encoding_goes_on(backbone, tokenizer, tmp_path):
    encode(backbone, tokenizer, tmp_path / "calm")
    for last in range(13):  # 24 distinct segments, two a pass
        folder = tmp_path / str(last)
        with pytest.raises(Killed) if last < 12 else nullcontext():
            encode(Counting(backbone, last), tokenizer, folder)
        if last < 12:
            with pytest.raises(FileNotFoundError, match="no complete anchors"):
                AnchorStore.load(folder, "stage1")
        again = Counting(backbone)
        encode(again, tokenizer, folder)
        assert again.sequences == (24 - 4 * (last // 2) if last < 12 else 0)  # whole shards of four are kept
        assert files(folder) == files(tmp_path / "calm")


def test_a_run_killed_at_its_very_end_leaves_no_progress(backbone, tokenizer, tmp_path):
    encode(backbone, tokenizer, tmp_path / "calm")
    encode(backbone, tokenizer, tmp_path / "killed")
    (tmp_path / "killed" / "progress.json").write_text("{}")  # all but its removal was done
    encode(Counting(backbone, 0), tokenizer, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "calm")


REWORDED = [[text.replace("Segment", "Section") for text in sample] for sample in many()]  # of the same lengths


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"segments": REWORDED}, {"max_tokens": 3}])
def test_other_inputs_are_encoded_anew(backbone, tokenizer, tmp_path, change):
    encode(backbone, tokenizer, tmp_path)
    again = Counting(backbone)
    encode(again, tokenizer, tmp_path)
    assert again.sequences == 0
    encode(again, tokenizer, tmp_path, **change)
    assert again.sequences >= 23
    with pytest.raises(Killed):  # nor is a begun store of other inputs gone on with
        encode(Counting(backbone, 5), tokenizer, tmp_path)
    again = Counting(backbone)
    encode(again, tokenizer, tmp_path, **change)
    assert again.sequences >= 23


def test_anchors_in_the_chain_see_the_prompt_and_what_came_before(backbone, tokenizer):
    prompts = [[5, 6, 7], [8], [5, 6, 7]]
    store = encode_anchors(backbone, tokenizer, SEGMENTS, "", batch_size=2, context="chain", prompts=prompts)
    assert store.depths.tolist() == [2, 1, 3]
    for sample, segments in enumerate(SEGMENTS):
        ids = list(prompts[sample])
        for step, text in enumerate(segments):
            text = " " + text if step else text
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            states = backbone.eval()(input_ids=torch.tensor([ids])).last_hidden_state
            np.testing.assert_allclose(store[sample][step], states[0, -1].detach().numpy(), atol=1e-5)


def test_equal_chains_after_equal_prompts_share_vectors(backbone, tokenizer):
    counting = Counting(backbone)
    segments, prompts = [["Tea.", "Red."]] * 3, [[5], [5], [6]]
    store = encode_anchors(counting, tokenizer, segments, "", context="chain", prompts=prompts)
    assert counting.sequences == 2 and store.vectors.shape == (4, 16)
    assert np.array_equal(store[0], store[1]) and not np.allclose(store[0], store[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "whole"}, "`context` is 'whole', expected 'segment' or 'chain'"),
        ({"context": "chain"}, "`prompts` are needed for 'chain'"),
        ({"prompts": [[1]] * 3}, "`prompts` are needed for 'chain', and for nothing else"),
        ({"context": "chain", "prompts": [[1]]}, "`prompts` has 1 entries for 3 samples"),
    ],
)
def test_contexts_that_do_not_fit(backbone, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        encode_anchors(backbone, tokenizer, SEGMENTS, "", **options)
