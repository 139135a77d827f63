"""What is pushed is what loads: a training pushes to a local Hub, and a visitor without the package recommends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lasar_hf import LasarForGenerativeRec, LasarProcessor, LasarSFTConfig, Recommender
from lasar_hf.trainers.hub import SHARED, commit_operations, shared_files
from tests.hub_server import hub_server
from tests.recipes import save_checkpoint
from tests.tiny import tiny_catalog, tiny_model


ROOT = Path(__file__).resolve().parents[1]
HISTORY = ["item-1", "item-2"]

# Trains two steps with `push_to_hub` and prints the trainer's own list.
TRAIN = """
import json, sys
from pathlib import Path
from lasar_hf import LasarProcessor, LasarSFTConfig, LasarSFTTrainer
from lasar_hf.trainers import lasar_lora_config
from tests.training import COMMON, sft_setup

folder, use_lora = sys.argv[1], sys.argv[2] == "lora"
model, tokenizer, catalog, rows, anchors = sft_setup()
options = COMMON | dict(
    max_steps=2, learning_rate=5e-2, policy_weight=0.1, push_to_hub=True, hub_model_id="user/shop",
    save_strategy="steps", save_steps=1,
)
trainer = LasarSFTTrainer(
    model, LasarSFTConfig(folder, **options), anchors=anchors, train_dataset=rows,
    processing_class=LasarProcessor(tokenizer, catalog),
    peft_config=lasar_lora_config(model, r=4) if use_lora else None,
)
trainer.train()
Path(folder, "anchors").mkdir()
Path(folder, "anchors", "anchors.safetensors").write_bytes(b"large")
trainer.save_model()
processor = trainer.processor
output = trainer.model.eval().recommend(**processor([["item-1", "item-2"]]), catalog=catalog, top_k=5)
print(json.dumps(processor.decode_recommendations(output)[0]))
"""

VISIT = """
import json, sys
sys.modules["lasar_hf"] = None  # importing it fails
from transformers import AutoModel, AutoProcessor, pipeline

name, options = sys.argv[1], json.loads(sys.argv[2])
model = AutoModel.from_pretrained(name, trust_remote_code=True, **options)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **options)
output = model.recommend(**processor([["item-1", "item-2"]]), top_k=5)
recommend = pipeline("generative-recommendation", model=name, trust_remote_code=True, device="cpu", **options)
assert [item["item_id"] for item in recommend(["item-1", "item-2"], top_k=5)["items"]] == [
    item["item_id"] for item in processor.decode_recommendations(output)[0]
]
print(json.dumps(processor.decode_recommendations(output)[0]))
"""


@pytest.fixture
def hub(tmp_path):
    with hub_server() as server:
        server.environment = os.environ | {
            "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        yield server


def run(code: str, *arguments: str, environment: dict) -> list[dict]:
    """What a program prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert [item["item_id"] for item in first] == [item["item_id"] for item in second]
    for one, other in zip(first, second, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_visitor_gets_the_list_of_the_trainer(hub, tmp_path, kind):
    folder = tmp_path / "out"
    expected = run(TRAIN, str(folder), kind, environment=hub.environment)
    _, files = hub.files("user/shop")
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert {path for path in files if "/" in path} == (adapter if kind == "lora" else set())
    names = {path for path in files if "/" not in path and not path.endswith("_lasar.py")}
    assert names == {
        "README.md", "checksums.json", "config.json", "generation_config.json", "handler.py", "model.safetensors",
        "processor_config.json", "sid_catalog.json", "sid_catalog.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert not [path for path, content in files.items() if str(tmp_path).encode() in content]  # no local paths
    visitor = hub.environment | {"HF_HOME": str(tmp_path / "visitor"), "PYTHONPATH": ""}
    assert_same(run(VISIT, "user/shop", "{}", environment=visitor), expected)
    # Offline the same files come from the cache, and the local folder is the same model.
    assert_same(run(VISIT, "user/shop", "{}", environment=visitor | {"HF_HUB_OFFLINE": "1"}), expected)
    assert_same(Recommender.from_pretrained(folder, device="cpu").recommend([HISTORY], top_k=5)[0]["items"], expected)


PUSH = """
import json, sys
from lasar_hf import Recommender

recommender = Recommender.from_pretrained(sys.argv[1], device="cpu")
recommender.push_to_hub("user/shop")
print(json.dumps(recommender.recommend([["item-1", "item-2"]], top_k=5)[0]["items"]))
"""

READ = """
import json, sys
from lasar_hf import LasarProcessor, Recommender, SidCatalog

name, options = sys.argv[1], json.loads(sys.argv[2])
catalog, processor = SidCatalog.from_pretrained(name, **options), LasarProcessor.from_pretrained(name, **options)
assert catalog.item_ids == processor.catalog.item_ids
recommender = Recommender.from_pretrained(name, device="cpu", **options)
assert recommender.model.catalog.item_ids == catalog.item_ids
print(json.dumps(recommender.recommend([["item-1", "item-2"]], top_k=5)[0]["items"]))
"""


def test_every_part_has_the_revision_and_the_token(hub, tmp_path):
    """The catalogue of a newer revision has other items."""
    hub.token = "secret"
    first, second = tmp_path / "first", tmp_path / "second"
    save_checkpoint(first)
    save_checkpoint(second)
    catalog = tiny_catalog()
    catalog.remove([f"item-{number}" for number in range(3, 12)]).save_pretrained(second)
    old = run(PUSH, str(first), environment=hub.environment)
    revision = hub.files("user/shop")[0]
    new = run(PUSH, str(second), environment=hub.environment)
    assert old != new
    anonymous = hub.environment | {"HF_HOME": str(tmp_path / "reader")}
    del anonymous["HF_TOKEN"]
    options = {"token": "secret"}
    assert run(READ, "user/shop", json.dumps(options), environment=anonymous) == new
    assert run(READ, "user/shop", json.dumps(options | {"revision": revision}), environment=anonymous) == old
    assert_same(run(VISIT, "user/shop", json.dumps(options | {"revision": revision}), environment=anonymous), old)


PARTS = """
import json, sys
from lasar_hf import Recommender
from tests.test_recommender import ring_memory

recommender = Recommender.from_pretrained(sys.argv[1], device="cpu")
recommender.card = 'A card.\\n\\n# model\\n\\nname = "model"  # the folder\\n'
if sys.argv[2] == "first":
    recommender.memory = ring_memory(recommender.catalog)
    recommender.push_to_hub("shop", private=True)
    recommender.model.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="user/weights", private=True)
    recommender.processor.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="user/format", private=True)
else:
    recommender.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="user/shop", max_shard_size="5KB")
print(json.dumps(None))
"""


def test_a_recommender_pushes_its_card_and_memory_and_removes_old_ones(hub, tmp_path):
    save_checkpoint(tmp_path / "model")
    run(PARTS, str(tmp_path / "model"), "first", environment=hub.environment)
    _, first = hub.files("user/shop")
    assert first["README.md"].decode() == 'A card.\n\n# user/shop\n\nname = "user/shop"  # the folder\n'
    assert {"item_memory.safetensors", "model.safetensors", "handler.py", "tokenizer.json"} <= set(first)
    assert hub.private == {"user/shop", "user/weights", "user/format"}
    run(PARTS, str(tmp_path / "model"), "second", environment=hub.environment)
    _, second = hub.files("user/shop")
    assert {"item_memory.safetensors", "model.safetensors"}.isdisjoint(second)
    assert {"model.safetensors.index.json", "README.md", "sid_catalog.json", "tokenizer.json"} <= set(second)
    assert "# user/shop" in second["README.md"].decode()


def test_pushing_during_the_training_is_refused(tmp_path):
    options = {"push_to_hub": True, "use_cpu": True, "bf16": False}
    LasarSFTConfig(str(tmp_path), **options)
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match="hub_strategy"):
            LasarSFTConfig(str(tmp_path), hub_strategy=strategy, **options)


def test_files_of_the_run_are_not_shared(tmp_path):
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path)
    LasarProcessor(tokenizer, tiny_catalog()).save_pretrained(tmp_path)
    before = shared_files(tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "run.json", "trainer_state.json", "anchors/anchors.safetensors",
                 "checkpoint-2/model.safetensors", "item_memory.safetensors",
                 "runs/events", "adapter/training_args.bin"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert shared_files(tmp_path) == before
    assert len(before) > len(SHARED) / 2


def test_a_local_base_model_is_not_named_in_the_upload(tmp_path):
    (tmp_path / "adapter").mkdir()
    path = tmp_path / "adapter" / "adapter_config.json"
    for base, expected in ((str(tmp_path), None), ("user/base", "user/base")):
        path.write_text(json.dumps({"base_model_name_or_path": base, "r": 4}))
        (operation,) = commit_operations(tmp_path)
        with operation.as_file() as file:
            assert json.load(file) == {"base_model_name_or_path": expected, "r": 4}
        assert json.loads(path.read_text())["base_model_name_or_path"] == base  # the local one still loads


def test_a_checkpoint_with_catalogue_can_be_loaded_without_network(tmp_path, monkeypatch):
    save_checkpoint(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert LasarForGenerativeRec.from_pretrained(tmp_path).catalog is not None
