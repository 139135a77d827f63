"""Files of a checkpoint that are cut, changed or lost: an error names the file, and no other result comes silently."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lasar_hf import ItemMemory, LasarProcessor, Recommender, SidCatalog
from lasar_hf.model import catalog_lasar, files_lasar, memory_lasar
from lasar_hf.model.memory_lasar import catalog_hash
from tests.tiny import tiny_catalog, tiny_model


HISTORIES = [["item-1", "item-2"], ["item-4"]]
JSON_FILES = [
    "config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "sid_catalog.json", "model.safetensors.index.json", "checksums.json",
]  # fmt: skip
TENSOR_FILES = [
    "model.safetensors", "model-00002-of-00003.safetensors", "sid_catalog.safetensors", "item_memory.safetensors",
]  # fmt: skip


def recommender() -> Recommender:
    model, tokenizer = tiny_model("llama")
    catalog = tiny_catalog()
    catalog = SidCatalog(catalog.codes, catalog.item_ids, titles=[f"Book {number}" for number in range(20)])
    memory = ItemMemory(
        torch.arange(21), (torch.arange(20) + 1) % 20, torch.ones(20), catalog_hash(catalog), gate=(1.0, 0.5)
    )
    return Recommender(model, LasarProcessor(tokenizer, catalog), memory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same checkpoint with one file of weights and with three."""
    folder = tmp_path_factory.mktemp("saved")
    recommender().save_pretrained(folder / "one")
    recommender().save_pretrained(folder / "shards", max_shard_size="10KB")
    return folder


@pytest.fixture
def copy_of(saved, tmp_path):
    """A function that copies the checkpoint that has a file."""

    def copy(name: str):
        whole = saved / "one" if (saved / "one" / name).exists() else saved / "shards"
        return shutil.copytree(whole, tmp_path / "model")

    return copy


def flipped(content: bytes, bit: int) -> bytes:
    """The content with one other bit."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def results(folder) -> list[dict]:
    return Recommender.from_pretrained(folder, device="cpu").recommend(HISTORIES, top_k=5)


def assert_refused(folder, name: str) -> None:
    """Loading ends in an error that names the file and is not that of a parser."""
    with pytest.raises((ValueError, OSError)) as caught:
        results(folder)
    assert type(caught.value) in (ValueError, OSError, FileNotFoundError)
    assert name in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("name", JSON_FILES + TENSOR_FILES)
@pytest.mark.parametrize("damage", ["empty", "half", "not text", "nested", "list", "null"])
def test_a_damaged_file_is_named(copy_of, name, damage):
    path = copy_of(name) / name
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"", "half": content[: len(content) // 2], "not text": b"\xff\xfe\x00" + content,
            "nested": b"[" * 200_000, "list": b"[1, 2]", "null": b"null",
        }[damage]
    )  # fmt: skip
    assert_refused(path.parent, name)


@pytest.mark.parametrize(
    "name", [*JSON_FILES[:4], "sid_catalog.json", "sid_catalog.safetensors", "model-00002-of-00003.safetensors"]
)
def test_a_missing_file_is_named(copy_of, name):
    folder = copy_of(name)
    (folder / name).unlink()
    assert_refused(folder, name)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00003.safetensors"])
def test_a_flipped_bit_of_the_weights_is_found(copy_of, name):
    path = copy_of(name) / name
    content = path.read_bytes()
    size = 8 * len(content)
    for bit in [size - 1, size - 31, size // 2, *random.Random(0).sample(range(size // 2, size), 5)]:
        path.write_bytes(flipped(content, bit))
        assert_refused(path.parent, "model")


def content_of(part: SidCatalog | ItemMemory) -> list:
    """What a catalogue or a memory says, without its hash."""
    names = ["codes", "removed", "item_ids", "titles", "allow_collisions"]
    if isinstance(part, ItemMemory):
        names = ["pointers", "neighbours", "weights", "decay", "gate", "catalog_sha256"]
    values = [getattr(part, name) for name in names]
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.parametrize("name", ["sid_catalog.json", "sid_catalog.safetensors", "item_memory.safetensors"])
def test_every_flipped_bit_is_found_or_has_no_effect(copy_of, name):
    """Only the name of the hash itself may change unnoticed; then the content is right."""
    path = copy_of(name) / name
    kind = ItemMemory if "memory" in name else SidCatalog
    content, expected = path.read_bytes(), content_of(kind.from_pretrained(path.parent))
    for bit in random.Random(0).sample(range(8 * len(content)), 300):
        path.write_bytes(flipped(content, bit))
        try:
            assert content_of(kind.from_pretrained(path.parent)) == expected
        except ValueError as error:
            assert type(error) is ValueError and path.stem in str(error)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "processor_config.json", "tokenizer.json"])
def test_a_flipped_bit_of_the_settings_never_changes_a_result(saved, copy_of, name):
    expected = results(saved / "one")
    path = copy_of(name) / name
    content = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 12):
        path.write_bytes(flipped(content, bit))
        try:
            assert results(path.parent) == expected
        except (ValueError, OSError) as error:
            assert type(error) in (ValueError, OSError)


# ---------------------------------------------------------------------------------------------------------------------
# Parts that do not belong together


def change_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_tensors(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def swap(content: dict, one: str, other: str) -> None:
    content[one], content[other] = content[other], content[one]


LAYER = "model.backbone.layers.1.mlp.up_proj.weight"
DISAGREEMENTS = {
    "policy head missing": (
        "model.safetensors", lambda c: [c.pop(name) for name in list(c) if "policy_head" in name], "policy_head",
    ),
    "layer missing": ("model.safetensors", lambda c: c.pop(LAYER), LAYER),
    "fewer layers": (
        "config.json",
        lambda c: c["backbone_config"].update(num_hidden_layers=1, layer_types=["full_attention"]), "config.json",
    ),
    "more layers": (
        "config.json",
        lambda c: c["backbone_config"].update(num_hidden_layers=3, layer_types=3 * ["full_attention"]), "config.json",
    ),
    "other heads": (
        "config.json", lambda c: c["backbone_config"].update(num_attention_heads=4, num_key_value_heads=4, head_dim=4),
        "config.json",
    ),
    "offset 0": ("config.json", lambda c: c.update(sid_token_offset=0), "sid_token_offset"),
    "offset + 1": ("config.json", lambda c: c.update(sid_token_offset=c["sid_token_offset"] + 1), "sid_token_offset"),
    "offset beyond": ("config.json", lambda c: c.update(sid_token_offset=10**6), "sid_token_offset"),
    "no offset": ("config.json", lambda c: c.update(sid_token_offset=None), "sid_token_offset"),
    "control tokens swapped": (
        "config.json", lambda c: swap(c, "latent_start_token_id", "latent_token_id"), "config.json",
    ),
    "codes as text": ("config.json", lambda c: c.update(codebook_size="4"), "codebook_size"),
    "too many codes": ("config.json", lambda c: c.update(codebook_size=1000), "sid_token_offset"),
    "misspelt field": ("config.json", lambda c: c.update(max_latent_step=3), "max_latent_step. "),
    "switch": ("config.json", lambda c: c.update(exclude_history=True), "config.json"),
    "other rotary base": (
        "config.json", lambda c: c["backbone_config"]["rope_parameters"].update(rope_theta=7.0), "config.json",
    ),
    "tokenizer without a code": (
        "tokenizer.json",
        lambda c: next(token for token in c["added_tokens"] if token["content"] == "<a_0>").update(content="<z_0>"),
        "The tokenizer has other ids",
    ),
    "other words": ("tokenizer.json", lambda c: swap(c["model"]["vocab"], "next", "red"), "instruction"),
    "shorter history": ("processor_config.json", lambda c: c.update(max_history=2), "processor_config.json"),
    "ids reversed": ("sid_catalog.json", lambda c: c["item_ids"].reverse(), "sid_catalog.json"),
    "titles moved": ("sid_catalog.json", lambda c: c["titles"].append(c["titles"].pop(0)), "sid_catalog.json"),
    "nested ids": (
        "sid_catalog.json", lambda c: c.update(item_ids=[[item_id] for item_id in c["item_ids"]]), "item_ids",
    ),
    "no ids": ("sid_catalog.json", lambda c: c.update(item_ids=None), "item_ids"),
    "wrong number of levels": ("sid_catalog.json", lambda c: c.update(num_levels=9), "num_levels"),
    "switch as text": ("sid_catalog.json", lambda c: c.update(allow_collisions="no"), "allow_collisions"),
    "codes in another order": (
        "sid_catalog.safetensors", lambda c: c.update(codes=c["codes"].flip(0).contiguous()),
        "sid_catalog.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_parts_that_disagree_are_refused(copy_of, case):
    name, change, message = DISAGREEMENTS[case]
    path = copy_of(name) / name
    (change_json if path.suffix == ".json" else change_tensors)(path, change)
    assert_refused(path.parent, message)


# ---------------------------------------------------------------------------------------------------------------------
# Older files, and saving again


def test_files_of_older_versions_load_with_a_warning(saved, copy_of, monkeypatch):
    expected, folder, seen = results(saved / "one"), copy_of("model.safetensors"), []
    (folder / "checksums.json").unlink()
    change_json(folder / "sid_catalog.json", lambda content: content.pop("sha256"))
    change_json(folder / "processor_config.json", lambda content: content.pop("prefix_ids"))
    memory = ItemMemory.from_pretrained(folder)
    settings = {"catalog_sha256": memory.catalog_sha256, "decay": memory.decay, "gate": memory.gate}
    tensors = {name: getattr(memory, name) for name in ("pointers", "neighbours", "weights")}
    save_file(tensors, folder / "item_memory.safetensors", metadata={"settings": json.dumps(settings)})
    for module in (catalog_lasar, files_lasar, memory_lasar):
        monkeypatch.setattr(module.logger, "warning_once", seen.append)
    assert results(folder) == expected
    for name in ("checksums.json", "sid_catalog.json", "item_memory.safetensors"):
        assert any(name in message for message in seen)


def test_a_change_on_purpose_is_possible(copy_of):
    folder = copy_of("config.json")
    change_json(folder / "config.json", lambda content: content.update(exclude_history=True))
    with pytest.raises(ValueError, match="delete checksums.json"):
        results(folder)
    (folder / "checksums.json").unlink()
    (items, _) = (entry["items"] for entry in results(folder))
    assert not {"item-1", "item-2"} & {item["item_id"] for item in items}


def test_saving_again_has_new_checksums(copy_of):
    folder = copy_of("model-00002-of-00003.safetensors")
    changed = Recommender.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        changed.model.lm_head.weight.mul_(0.5)
    changed.save_pretrained(folder)
    listed = set(json.loads((folder / "checksums.json").read_text()))
    assert listed - {"model.safetensors.index.json"} == {  # transformers leaves the index of the shards
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
    }  # fmt: skip
    assert results(folder) == changed.recommend(HISTORIES, top_k=5)
