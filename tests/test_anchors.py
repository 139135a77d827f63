"""Anchors: batched and de-duplicated encoding equals encoding one by one, and stale or damaged stores are refused."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.data import build_tokenizer
from lasar_hf.reasoning import AnchorStore, anchors, checkpoint_hash, encode_anchors
from tests.tiny import tiny_catalog


SEGMENTS = [
    ["The last item is red.", "So a much longer chain of words follows from it."],
    ["Tea."],
    ["The last item is red.", "Tea.", "A third one with <a_0> in it."],
]
PROMPTS = [[5, 6, 7], [8], [5, 6, 7]]
NAMES = ["anchors.json", "index.npy", "offsets.npy", "vectors.npy"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([text for sample in SEGMENTS for text in sample], 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    return LasarForGenerativeRec.from_backbone(
        Qwen3ForCausalLM(config), tokenizer, num_sid_levels=3, codebook_size=4, max_latent_steps=4
    ).eval()


@pytest.fixture(scope="module")
def processor(tokenizer, model):  # `model` adds the Semantic-ID tokens
    return LasarProcessor(tokenizer, tiny_catalog(), instruction="", add_bos=False)


@pytest.fixture(scope="module")
def store(model, processor):
    return encode_anchors(model, processor, SEGMENTS, batch_size=2)


def hidden_state(model, ids):
    """The final hidden state at the last of some token ids."""
    with torch.no_grad():
        return model.model.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].numpy()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("add_bos", [False, True])
def test_segment_encoded_alone(model, processor, batch_size, add_bos):
    processor = LasarProcessor(processor.tokenizer, processor.catalog, instruction="", add_bos=add_bos)
    bos = [processor.tokenizer.bos_token_id] if add_bos else []
    store = encode_anchors(model, processor, SEGMENTS, batch_size=batch_size)
    for sample, segments in enumerate(SEGMENTS):
        assert store[sample].dtype == np.float32
        for step, text in enumerate(segments):
            expected = hidden_state(model, bos + processor.text_ids([text])[0])
            np.testing.assert_allclose(store[sample][step], expected, atol=1e-5)


def test_segment_encoded_after_prompt(model, processor):
    store = encode_anchors(model, processor, SEGMENTS, prompts=PROMPTS, batch_size=2)
    assert store.depths.tolist() == [2, 1, 3]
    for sample, segments in enumerate(SEGMENTS):
        ids = list(PROMPTS[sample])
        for step, text in enumerate(segments):
            ids += processor.text_ids([" " + text if step else text])[0]
            np.testing.assert_allclose(store[sample][step], hidden_state(model, ids), atol=1e-5)


def test_bos_is_not_added_to_prompts(model, processor):
    with_bos = LasarProcessor(processor.tokenizer, processor.catalog, instruction="", add_bos=True)
    one = encode_anchors(model, processor, SEGMENTS, prompts=PROMPTS)
    other = encode_anchors(model, with_bos, SEGMENTS, prompts=PROMPTS)
    assert np.array_equal(one.vectors, other.vectors)


def test_equal_segments_share_a_vector(store):
    assert store.vectors.shape == (4, 16)
    assert store.depths.tolist() == [2, 1, 3]
    assert np.array_equal(store[0][0], store[2][0])
    assert np.array_equal(store[1][0], store[2][1])


def test_terminal_anchors(store):
    terminal = store.terminal()
    assert terminal.dtype == np.float32
    assert np.array_equal(terminal, np.stack([store[sample][-1] for sample in range(3)]))


def test_steps_have_the_anchors_of_their_place_in_the_chain(store):
    one, two, three = store[2]
    for depth, expected in ((1, [three]), (2, [two, three]), (6, [one, one, two, two, three, three])):
        assert np.array_equal(store.at_depth(2, depth), expected)
    assert store.at_depth(2, 0).shape == (0, 16)


def test_long_segments_keep_their_end(model, processor):
    long, end = "a b c d e f g h i j", " g h i j"
    cut = encode_anchors(model, processor, [[long]], max_tokens=len(processor.text_ids([end])[0]))
    np.testing.assert_allclose(cut[0], encode_anchors(model, processor, [[end]])[0], atol=1e-5)


def test_training_mode_is_restored(model, processor):
    model.train()
    encode_anchors(model, processor, [["Tea."]])
    assert model.model.backbone.training
    assert all(weight.grad is None for weight in model.parameters())
    model.eval()


def test_save_and_load(store, tmp_path):
    store.save(tmp_path / "anchors")
    loaded = AnchorStore.load(tmp_path / "anchors", store.checkpoint_hash)
    assert isinstance(loaded.vectors, np.memmap)
    assert len(loaded) == 3
    assert all(np.array_equal(loaded[sample], store[sample]) for sample in range(3))
    assert sorted(path.name for path in (tmp_path / "anchors").iterdir()) == NAMES


def test_stale_anchors_are_refused(store, tmp_path):
    store.save(tmp_path)
    with pytest.raises(ValueError, match="stale"):
        AnchorStore.load(tmp_path, "0" * 64)


def test_missing_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"anchors\.json"):
        AnchorStore.load(tmp_path, "hash")


def test_interrupted_save_is_refused(store, tmp_path, monkeypatch):
    store.save(tmp_path)
    monkeypatch.setattr(np, "save", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"anchors\.json"):
        AnchorStore.load(tmp_path, store.checkpoint_hash)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("vectors", lambda vectors: np.full_like(vectors, np.nan)),
        ("vectors", lambda vectors: vectors[:, :8]),
        ("index", lambda index: np.roll(index, 1)),
        ("offsets", lambda offsets: np.array([0, 1, 3, 6])),
    ],
)
def test_damaged_array_is_named(store, tmp_path, name, damage):
    store.save(tmp_path)
    np.save(tmp_path / f"{name}.npy", damage(getattr(store, name)))
    with pytest.raises(ValueError, match=rf"{name}\.npy"):
        AnchorStore.load(tmp_path, store.checkpoint_hash)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(value):
    vectors = np.zeros((2, 4), dtype=np.float32)
    vectors[1, 2] = value
    with pytest.raises(ValueError, match="vectors has NaN or infinity"):
        AnchorStore(vectors, np.array([0, 1]), np.array([0, 1, 2]), "hash")


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"checkpoint_hash": 1, "inputs_hash": "", "sha256": {}}'])
def test_other_json_is_named(model, processor, store, tmp_path, text):
    store.save(tmp_path)
    (tmp_path / "anchors.json").write_text(text)
    with pytest.raises(ValueError, match=r"anchors\.json is damaged"):
        AnchorStore.load(tmp_path, store.checkpoint_hash)
    with pytest.raises(ValueError, match=r"anchors\.json is damaged"):
        encode_anchors(model, processor, SEGMENTS, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_truncated_file_is_named(store, tmp_path, name):
    store.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        AnchorStore.load(tmp_path, store.checkpoint_hash)


def test_missing_array_is_named(store, tmp_path):
    store.save(tmp_path)
    (tmp_path / "vectors.npy").unlink()
    with pytest.raises(ValueError, match=r"vectors\.npy"):
        AnchorStore.load(tmp_path, store.checkpoint_hash)


@pytest.mark.parametrize("sample", [-1, 3])
def test_unknown_sample(store, sample):
    with pytest.raises(IndexError, match=str(sample)):
        store[sample]


def test_checkpoint_hash_sees_every_bit():
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))  # has a scalar of another type

    one, other = model(), model()
    assert checkpoint_hash(one) == checkpoint_hash(other)
    with torch.no_grad():
        other[0].weight[1, 1] = torch.nextafter(other[0].weight[1, 1], torch.tensor(9.0))
    assert checkpoint_hash(one) != checkpoint_hash(other)
    assert checkpoint_hash(model().bfloat16()) != checkpoint_hash(one)


@pytest.mark.parametrize("segments", [[["a"], []], [], [["a", ""]]])
def test_nothing_to_encode(model, processor, segments):
    with pytest.raises(ValueError, match="segments"):
        encode_anchors(model, processor, segments)


def test_prompts_of_other_samples(model, processor):
    with pytest.raises(ValueError, match="prompts"):
        encode_anchors(model, processor, SEGMENTS, prompts=[[1]])


class Killed(BaseException):
    """Stands for kill -9."""


class CountedModel:
    """Counts the sequences that a base model encodes, and dies after `passes` forward passes."""

    def __init__(self, model, passes=10**9):
        self.sequences, self.passes = 0, passes
        self.hook = model.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        if self.passes == 0:
            raise Killed
        self.passes -= 1
        self.sequences += len(kwargs["input_ids"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def many(count=23):
    """More distinct segments than one shard holds, not sorted by length."""
    return [[f"Segment {row * 7 % count} {'very ' * (row * 5 % 9)}long.", "Tea."] for row in range(count)]


REWORDED = [[text.replace("Segment", "Section") for text in sample] for sample in many()]  # of the same lengths


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(anchors, "SHARD_SIZE", 4)


def encode(model, processor, folder, segments=None, **options):
    return encode_anchors(model, processor, segments or many(), folder, **{"batch_size": 2} | options)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_on_disk_equal_memory(model, processor, tmp_path, small_shards):
    on_disk = encode(model, processor, tmp_path / "disk")
    in_memory = encode(model, processor, None)
    assert isinstance(on_disk.vectors, np.memmap)
    assert all(np.array_equal(on_disk[row], in_memory[row]) for row in range(23))
    in_memory.save(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(tmp_path / "disk")


@pytest.mark.parametrize("passes", range(13))  # 24 distinct segments, 2 per pass: the last one is not killed
def test_killed_encoding_continues(model, processor, tmp_path, small_shards, passes):
    with CountedModel(model, passes), pytest.raises(Killed) if passes < 12 else nullcontext():
        encode(model, processor, tmp_path / "killed")
    with CountedModel(model) as again:
        encode(model, processor, tmp_path / "killed")
    assert again.sequences == 24 - 4 * (passes // 2)  # whole shards of 4 are kept
    encode(model, processor, tmp_path / "undisturbed")
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["vectors.npy", "progress.json"])
def test_an_interrupted_encoding_with_a_cut_file_starts_again(model, processor, tmp_path, small_shards, name):
    """A cut file of vectors must not be filled up with zeros."""
    with CountedModel(model, 5), pytest.raises(Killed):
        encode(model, processor, tmp_path / "cut")
    content = (tmp_path / "cut" / name).read_bytes()
    (tmp_path / "cut" / name).write_bytes(content[: len(content) // 8])  # cuts what is done
    encode(model, processor, tmp_path / "cut")
    encode(model, processor, tmp_path / "undisturbed")
    assert files(tmp_path / "cut") == files(tmp_path / "undisturbed")


def test_interrupted_encoding_is_refused(model, processor, tmp_path, small_shards):
    with CountedModel(model, 5), pytest.raises(Killed):
        encode(model, processor, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"anchors\.json"):
        AnchorStore.load(tmp_path, checkpoint_hash(model))


def test_progress_of_a_complete_store_is_removed(model, processor, tmp_path, small_shards):
    encode(model, processor, tmp_path)
    (tmp_path / "progress.json").write_text("{}")  # killed before its removal
    (tmp_path / ".anchors.1.tmp.json").write_text("{")  # killed while it was written
    with CountedModel(model, 0):
        encode(model, processor, tmp_path)
    assert sorted(files(tmp_path)) == NAMES


@pytest.mark.parametrize("change", [{"segments": REWORDED}, {"max_tokens": 3}, {"prompts": [[1]] * 23}, "weights"])
def test_other_inputs_are_encoded_again(model, processor, tmp_path, small_shards, change):
    encode(model, processor, tmp_path)
    if change == "weights":
        model, change = LasarForGenerativeRec(model.config).eval(), {}
    with CountedModel(model) as again:
        encode(model, processor, tmp_path, **change)
    assert again.sequences >= 23


def test_interrupted_encoding_of_other_inputs_is_dropped(model, processor, tmp_path, small_shards):
    with CountedModel(model, 5), pytest.raises(Killed):
        encode(model, processor, tmp_path, REWORDED)
    with CountedModel(model) as again:
        encode(model, processor, tmp_path)
    assert again.sequences == 24


def test_equal_chains_after_equal_prompts_share_vectors(model, processor):
    with CountedModel(model) as counted:
        store = encode_anchors(model, processor, [["Tea.", "Red."]] * 3, prompts=[[5], [5], [6]])
    assert counted.sequences == 2
    assert np.array_equal(store[0], store[1])
    assert not np.allclose(store[0], store[2])


def test_histories_of_a_user_are_read_once(model, processor):
    start = processor.latent_start_token_id
    history = [5 + i % 7 for i in range(40)]
    prompts = [[*history[:end], start] for end in (30, 20, 40)] + [[9, 9, start]]
    read = []
    hook = model.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(
            kwargs["inputs_embeds"][..., 0].numel() if "inputs_embeds" in kwargs else kwargs["input_ids"].numel()
        ),
        with_kwargs=True,
    )
    segments = [["Tea.", "Red."], ["Tea."], ["Red."], ["Red."]]
    store = encode_anchors(model, processor, segments, prompts=prompts)
    hook.remove()
    assert sum(read) < 4 * 40
    for sample, texts in enumerate(segments):
        ids = list(prompts[sample])
        for step, text in enumerate(texts):
            ids += processor.text_ids([" " + text if step else text])[0]
            np.testing.assert_allclose(store[sample][step], hidden_state(model, ids), atol=1e-5)
