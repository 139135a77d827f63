"""The preparation as a whole: the files of a folder, which steps run again, killed runs, and every source."""

import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from datasets import Dataset

from lasar_hf import SidCatalog
from lasar_hf.data import (
    Interactions,
    PreparedData,
    Split,
    alignment_examples,
    grpo_examples,
    history_examples,
    reasoning_examples,
    sft_examples,
    toy_shop,
)
from lasar_hf.data.prepared_data import FILES, load_interactions, save_interactions
from lasar_hf.data.splits import repeat_rate
from lasar_hf.model.configuration_lasar import sid_token
from lasar_hf.reasoning import TemplateTeacher, segment
from lasar_hf.reasoning.segments import split_sentences
from lasar_hf.semantic_ids import ItemEncoder, format_report, item_text, load_quantizer
from tests.disks import DAMAGES
from tests.preparing import ALL, RECIPE, SHOP, files, processor_of, recipe, run
from tests.teacher_endpoint import GOOD, answer


COLUMNS = {"user_column": "user", "item_column": "item", "time_column": "time"}  # of `ratings`
FROM_CHAINS = ["chains", "segments", "tokenizer", "samples", "card"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert run(folder) == ALL
    return folder


def ratings(folder, users=40, items=25, seed=0):
    """A CSV file with three columns, not sorted by time."""
    rng = np.random.default_rng(seed)
    lines = [
        f"u{user},{(user + 3 * step) % items},{int(rng.integers(1000))}" for user in range(users) for step in range(8)
    ]
    path = folder / "ratings.csv"
    path.write_text("\n".join(["user,item,time", *rng.permutation(lines)]) + "\n")
    return path


def read_json(path):
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_folder_holds_one_layout(toy):
    assert {path.name for path in toy.iterdir()} == {
        "catalog", "chains.arrow", "chains.json", "data_card.json", "embeddings.npy", "interactions.json",
        "item_encoder", "items", "prepared.json", "quantizer", "samples", "segments.arrow", "semantic_ids.json",
        "steps", "tokenizer", "users",
    }  # fmt: skip


def test_the_catalogue_has_distinct_semantic_ids_and_titles(toy):
    catalog, shop = PreparedData.load(toy).catalog, toy_shop(30, 48)
    assert catalog.codes.shape == (48, 4)
    assert len(np.unique(catalog.codes.numpy(), axis=0)) == 48
    assert catalog.item_ids == shop.item_ids
    assert catalog.titles == [item["title"] for item in shop.items]


def test_the_interactions_come_back(toy):
    data, shop = PreparedData.load(toy), toy_shop(30, 48)
    assert data.interactions == Interactions(shop.item_ids, shop.items, shop.user_ids, shop.histories)
    assert data.split.train == [history[:-2] for history in shop.histories]


def test_training_samples_have_chains_and_segments(toy):
    train = PreparedData.load(toy).samples["train"]
    assert train.column_names == ["user_id", "history", "target", "chain_of_thought", "segments"]
    assert [" ".join(parts) for parts in train["segments"]] == list(train["chain_of_thought"])


def test_the_views_of_the_semantic_ids_are_stored(toy):
    views = read_json(toy / "semantic_ids.json")["views"]
    assert views == {"text": {"width": 8, "weight": 1.0}, "co-occurrence": {"width": 4, "weight": 1.0}}


def test_the_card_holds_arguments_and_counts(toy):
    card, train = read_json(toy / "data_card.json"), PreparedData.load(toy).samples["train"]
    assert (card["arguments"]["seed"], card["arguments"]["source"]) == (0, "toy")
    assert (card["counts"]["users"], card["counts"]["train_samples"]) == (30, len(train))
    assert card["data"]["split"]["kind"] == "leave-one-out"
    assert card["semantic_ids"]["collisions"] == 0
    assert card["chains"] == {"teacher": "template", "requests": len(train)}


def test_the_card_does_not_depend_on_the_folder(toy):
    assert str(toy) not in json.dumps(read_json(toy / "data_card.json"))


@pytest.mark.filterwarnings("ignore:No item has text")
def test_counts_and_quality_are_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path / "out", "table", COLUMNS | {"interactions": str(ratings(tmp_path))})
    assert "Read: 40 users, 25 items, 320 interactions, 320 rows read" in caplog.text
    assert format_report(read_json(tmp_path / "out" / "semantic_ids.json")) in caplog.text
    assert "Prepared: 40 users, 25 items, 320 interactions, 200 train samples, 40 validation samples" in caplog.text


@pytest.mark.filterwarnings("ignore:No item has text", "ignore:Left out 1 of 41 users")
def test_prepared_counts_leave_out_short_histories(tmp_path, caplog):
    caplog.set_level("INFO")
    path = ratings(tmp_path)
    path.write_text(path.read_text() + "short,3,5\nshort,4,6\n")
    run(tmp_path / "out", "table", COLUMNS | {"interactions": str(path), "k_core": 1})
    assert "Read: 41 users, 25 items, 322 interactions" in caplog.text
    assert "Prepared: 40 users, 25 items, 320 interactions" in caplog.text


def test_the_tokenizer_knows_all_words(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "large")
    run(folder, tokenizer_size=4000, instruction="Fetch whatever comes next, please.")
    tokenizer = processor_of(folder, PreparedData.load(folder)).tokenizer
    chain = PreparedData.load(folder).samples["train"]["segments"][0][0]
    for text in ("Fetch whatever comes next, please.", "Which item has this title?", chain):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert len(tokens) == len(re.findall(r" ?\w+| ?[^\w\s]+", text)), text  # one token per word


@pytest.mark.parametrize(
    "split",
    [
        Split(["u", "v"], [[0, 1], [2]], [[2], [0]], [[0], [1]], 4),
        Split(["u", "v"], [[0], []], [[], [1]], [[2], []], validation_from=1.0, test_from=2.5),
    ],
    ids=["leave one out", "global time"],
)
def test_items_and_split_come_back(tmp_path, split):
    histories = [[*a, *b, *c] for a, b, c in zip(split.train, split.validation, split.test, strict=True)]
    shop = Interactions(["a", "b", "c"], [{"title": "x"}, {}, {"asin": "B0"}], ["u", "v"], histories)
    save_interactions(shop, split, tmp_path)
    assert load_interactions(tmp_path) == (shop, split)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({}, []),
        ({"max_latent_steps": 2}, ["segments", "tokenizer", "samples", "card"]),
        ({"tokenizer_size": 280}, ["tokenizer", "card"]),
        ({"collaborative_weight": 2.0}, ["semantic_ids", "samples", "card"]),
        ({"text_dim": 9}, ["embeddings", "semantic_ids", "samples", "card"]),
        ({"source_args": SHOP | {"num_users": 31}}, ALL),
        ({"validation_share": 0.2, "teacher_model": "other"}, ["card"]),  # no effect on this split and teacher
        ({"max_history": 4}, FROM_CHAINS),
    ],
)
def test_changed_steps_give_the_files_of_a_new_run(toy, tmp_path, change, steps):
    shutil.copytree(toy, tmp_path / "again")
    assert run(tmp_path / "again", **change) == steps
    run(tmp_path / "new", **change)
    assert files(tmp_path / "again") == files(tmp_path / "new")


def test_one_step_runs_alone(tmp_path):
    assert run(tmp_path, steps=["interactions", "embeddings"]) == ["interactions", "embeddings"]
    with pytest.raises(FileNotFoundError, match="output_dir"):
        PreparedData.load(tmp_path)
    assert run(tmp_path) == ALL[2:]


@pytest.mark.filterwarnings("ignore:No item has text")
def test_a_changed_file_is_read_again(tmp_path):
    path = ratings(tmp_path)
    run(tmp_path / "out", "table", COLUMNS | {"interactions": str(path)})
    path.rename(tmp_path / "moved.csv")
    moved = COLUMNS | {"interactions": str(tmp_path / "moved.csv")}
    assert run(tmp_path / "out", "table", moved) == ["card"]  # the card names the file
    with (tmp_path / "moved.csv").open("a") as file:
        file.write("u0,24,2000\n")
    assert run(tmp_path / "out", "table", moved) == ALL


def test_every_damaged_file_is_named(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "damaged")
    used = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] in FILES]
    assert len(used) > 20
    for path in used:
        whole = path.read_bytes()
        for damage in DAMAGES.values() if len(whole) > 1 else [Path.unlink]:
            damage(path)
            with pytest.raises((ValueError, FileNotFoundError), match="lasar prepare") as raised:
                PreparedData.load(folder)
            assert str(path) in str(raised.value) or path.name == "prepared.json"
            path.write_bytes(whole)
    PreparedData.load(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_mark_is_named(toy, tmp_path, damage):
    folder = shutil.copytree(toy, tmp_path / "damaged")
    DAMAGES[damage](folder / "steps" / "samples.json")
    if damage != "missing":  # then its files are not checked
        with pytest.raises(ValueError, match="lasar prepare"):
            PreparedData.load(folder)
    run(folder)
    assert files(folder) == files(toy)


@pytest.mark.parametrize(
    ("name", "damage", "steps"),
    [
        ("users/data-00000-of-00001.arrow", "flipped bit", ALL),
        ("catalog/sid_catalog.safetensors", "half", ["semantic_ids", "samples", "card"]),
        ("chains.arrow", "empty", FROM_CHAINS),
        ("samples/train/state.json", "missing", ["samples", "card"]),
        ("data_card.json", "flipped bit", ["card"]),
    ],
)
def test_the_same_command_makes_damaged_files_again(toy, tmp_path, name, damage, steps):
    folder = shutil.copytree(toy, tmp_path / "damaged")
    DAMAGES[damage](folder / name)
    assert run(folder) == steps
    assert files(folder) == files(toy)


def test_another_source_replaces_all_files(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "shop")
    sizes = {"num_users": 5, "validation_users": 2, "test_users": 3}
    for out in (folder, tmp_path / "new"):
        assert run(out, "routines", sizes) == ["routines", "card"]
    assert files(folder) == files(tmp_path / "new")
    assert run(folder, "routines", sizes) == []


def test_small_batches_write_the_same_files(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "BATCH_SIZE", 5)
    sizes = []
    write = TemplateTeacher.chains_of_thought
    monkeypatch.setattr(
        TemplateTeacher, "chains_of_thought", lambda self, part: sizes.append(len(part["target"])) or write(self, part)
    )
    run(tmp_path)
    assert max(sizes) == 5
    for name in ("tokenizer/tokenizer.json", "data_card.json"):
        assert (tmp_path / name).read_bytes() == (toy / name).read_bytes()
    small, large = (PreparedData.load(folder).samples["train"].to_list() for folder in (tmp_path, toy))
    assert small == large


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_files(tmp_path):
    """kill -9 at random moments after the first step; after each complete run a new folder starts."""
    command = [sys.executable, str(RECIPE), "--source", "toy", "--output_dir", "data", "--tokenizer_size", "400"]
    environment = os.environ | {"PYTHONPATH": str(RECIPE.parents[1]), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, env=environment, text=True)

    undisturbed = start(tmp_path / "undisturbed")
    undisturbed.stderr.readline()
    begin = time.perf_counter()
    undisturbed.stderr.read()
    duration = time.perf_counter() - begin
    assert undisturbed.wait() == 0
    expected = files(tmp_path / "undisturbed")
    rng, kills, attempt = random.Random(0), 0, 0
    while kills < 10 or files(tmp_path / str(attempt)) != expected:
        process = start(tmp_path / str(attempt))
        process.stderr.readline()  # the first step has started
        if kills < 10:
            time.sleep(rng.uniform(0, duration))
            process.send_signal(signal.SIGKILL)
        process.stderr.read()
        if process.wait() == -signal.SIGKILL:
            kills += 1
            continue
        assert process.returncode == 0
        assert files(tmp_path / str(attempt)) == expected
        attempt += kills < 10


# ---------------------------------------------------------------------------------------------------------------------
# Sources and options


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The folder that the command in the recipe's docstring writes, and what the command printed."""
    folder = tmp_path_factory.mktemp("documented")
    ratings(folder)
    documentation = RECIPE.read_text()
    command = re.search(r"python (recipes/prepare\.py --output_dir outputs/mine/data .*?)\n\n", documentation, re.S)
    script = f"{sys.executable} {command[1]}".replace("recipes/prepare.py", str(RECIPE))
    done = subprocess.run(
        script, shell=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(RECIPE.parents[1])}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "mine" / "data", done.stderr


def test_the_documented_command_reads_three_columns(documented):
    data = PreparedData.load(documented[0])
    assert data.catalog.item_ids == [str(item) for item in range(25)]
    assert len(data.split.user_ids) == 40
    assert "No item has text" in documented[1]


def test_three_columns_become_examples_of_all_stages(documented):
    data = PreparedData.load(documented[0])
    processor, train = processor_of(documented[0], data), data.samples["train"]
    depths = [len(parts) for parts in train["segments"]]
    assert len(sft_examples(train, processor)) == len(train)
    assert len(history_examples(data.split, processor)) == 40
    assert len(reasoning_examples(train, processor, depths)) == len(train)
    assert len(grpo_examples(train, processor)) == len(train)
    assert len(alignment_examples(data.interactions, data.split, processor)) == 0  # there is no text


def test_the_card_describes_the_reader(documented):
    data = read_json(documented[0] / "data_card.json")["data"]
    assert "by time" in data["order"]
    assert data["reader"]["rows_read"] == 320


@pytest.mark.filterwarnings("ignore:No item has text")
def test_global_time_keeps_later_items_out(tmp_path):
    path = ratings(tmp_path)
    source_args = COLUMNS | {"interactions": str(path)}
    run(tmp_path / "out", "table", source_args, split="global_time")
    data = PreparedData.load(tmp_path / "out")
    time_of = {}
    for line in path.read_text().splitlines()[1:]:
        user, item, moment = line.split(",")
        time_of[user, item] = min(int(moment), time_of.get((user, item), 10**9))
    first, second = data.split.validation_from, data.split.test_from
    limits = {"train": (-1, first), "validation": (first, second), "test": (second, 10**9)}
    for part, (begin, end) in limits.items():
        assert len(data.samples[part])
        for row in data.samples[part]:
            moment = time_of[row["user_id"], data.catalog.item_ids[row["target"]]]
            assert begin <= moment < end
            assert all(time_of[row["user_id"], data.catalog.item_ids[item]] <= moment for item in row["history"])
    assert data.interactions.num_interactions == 320
    assert run(tmp_path / "out", "table", source_args) == ALL  # back to leave-one-out


def amazon_files(folder, version):
    columns = {2018: ("reviewerID", "asin", "unixReviewTime"), 2023: ("user_id", "parent_asin", "timestamp")}
    user, item, moment = columns[version]
    reviews = [{user: f"U{u}", item: f"B{(u + s) % 9}", moment: 100 * u + s} for u in range(12) for s in range(6)]
    meta = [{item: f"B{n}", "title": f"Tool &amp; part {n}", "description": ["A tool."]} for n in range(8)]
    paths = folder / "reviews.json.gz", folder / "meta.json.gz"
    for path, rows in zip(paths, (reviews, meta), strict=True):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return [str(path) for path in paths]


@pytest.mark.parametrize("version", [2018, 2023])
def test_amazon_from_files(tmp_path, version):
    interactions, items = amazon_files(tmp_path, version)
    with pytest.warns(UserWarning, match="1 of 9 items"):
        run(tmp_path / "out", f"amazon{version}", {"interactions": interactions, "items": items})
    data = PreparedData.load(tmp_path / "out")
    assert data.items["title"][:2] == ["Tool & part 0", "Tool & part 1"]
    assert data.items["title"][8] == ""
    assert len(data.split.user_ids) == 12


@pytest.mark.filterwarnings("ignore:1 of 9 items")
def test_amazon_from_the_hub(tmp_path, monkeypatch):
    interactions, items = amazon_files(tmp_path, 2023)
    downloads = []

    def download(repo, name, *, repo_type, revision):
        downloads.append((repo, name, repo_type, revision))
        return interactions if "rating_only" in name else items

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    run(tmp_path / "out", "amazon2023", {"category": "Tools", "revision": "abc"})
    assert run(tmp_path / "out", "amazon2023", {"category": "Tools", "revision": "abc"}) == []
    assert downloads == [
        ("McAuley-Lab/Amazon-Reviews-2023", "benchmark/5core/rating_only/Tools.csv", "dataset", "abc"),
        ("McAuley-Lab/Amazon-Reviews-2023", "raw/meta_categories/meta_Tools.jsonl", "dataset", "abc"),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"source": "tabel"}, FileNotFoundError, "tabel"),
        ({"source": "table"}, ValueError, "interactions"),
        ({"source": "amazon2023"}, ValueError, "category"),
        ({"source": "table", "source_args": {"interactions": "no.csv"}}, FileNotFoundError, "no.csv"),
        ({"source": "toy", "source_args": {"items": "x.csv"}}, ValueError, "items"),
        ({"source_args": "name"}, ValueError, "source_args"),
        ({"source_args": "[1]"}, ValueError, "source_args"),
        ({"allow_collisions": True}, ValueError, "allow_collisions"),
        ({"num_sid_levels": 27}, ValueError, "num_sid_levels"),
        ({"collaborative_dim": -3}, ValueError, "collaborative_dim"),
        ({"collaborative_weight": math.nan}, ValueError, "collaborative_weight"),
        ({"text_dim": 0}, ValueError, "text_dim"),
        ({"max_history": 0}, ValueError, "max_history"),
        ({"split": "random"}, ValueError, "split"),
        ({"teacher": "openai"}, ValueError, "teacher_model"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, error, match):
    with pytest.raises(error, match=match):
        run(tmp_path, **arguments)
    assert not (tmp_path / "items").exists()


def test_source_args_may_be_json_text(toy):
    assert run(toy, source_args=json.dumps(SHOP)) == []


def test_an_endpoint_writes_the_chains(tmp_path, endpoint):
    server = endpoint(lambda prompt, n: answer(GOOD))
    run(tmp_path, source_args=SHOP | {"num_users": 6}, teacher="openai", teacher_model="tiny",
        teacher_base_url=server.url)  # fmt: skip
    assert set(PreparedData.load(tmp_path).samples["train"]["chain_of_thought"]) == {GOOD}
    chains = read_json(tmp_path / "data_card.json")["chains"]
    assert chains["model"] == "tiny"
    assert chains["accepted"] == len(server.asked) > 10


def test_an_endpoint_is_not_asked_twice(tmp_path, endpoint):
    server = endpoint(lambda prompt, n: answer(GOOD))
    options = {"source_args": SHOP | {"num_users": 6}, "teacher": "openai", "teacher_model": "tiny"}
    run(tmp_path, teacher_base_url=server.url, **options)
    num_requests = server.asked.total()
    assert run(tmp_path, teacher_base_url="http://127.0.0.1:9", **options) == []
    assert run(tmp_path, teacher_base_url=server.url, targets="last", **options) == FROM_CHAINS
    assert server.asked.total() == num_requests


@pytest.fixture
def encoded(monkeypatch):
    """Texts that a stand-in for sentence-transformers encoded."""
    texts = []

    def encode(batch, batch_size=None, **options):
        texts.extend(batch)
        return np.array([[len(text), text.count("e")] for text in batch], dtype=np.float32)

    package = types.SimpleNamespace(SentenceTransformer=lambda name: types.SimpleNamespace(encode=encode))
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    return texts


def test_item_text_is_embedded_once(tmp_path, encoded):
    run(tmp_path, embedding_model="some/model")
    texts = list(map(item_text, load_interactions(tmp_path)[0].items))
    assert encoded == list(dict.fromkeys(texts))
    assert np.load(tmp_path / "embeddings.npy")[:, 0].tolist() == list(map(len, texts))
    assert run(tmp_path, source_args=SHOP | {"num_users": 31}, embedding_model="some/model") == ALL
    assert len(encoded) == len(set(encoded))  # other users, but the same items


def test_new_items_use_the_embedding_model(tmp_path, encoded):
    run(tmp_path, embedding_model="some/model", steps=["interactions", "embeddings"])
    ItemEncoder.from_pretrained(tmp_path / "item_encoder").encode([{"title": "A new item"}])
    assert encoded[-1] == "A new item"


def test_sentences_are_embedded_once(tmp_path, encoded):
    run(tmp_path, segment_model="some/model")
    train = PreparedData.load(tmp_path).samples["train"]
    chains = list(train["chain_of_thought"])
    assert encoded == list(dict.fromkeys(part for text in chains for part in split_sentences(text)))
    embed = sys.modules["sentence_transformers"].SentenceTransformer("some/model").encode
    assert list(train["segments"]) == segment(chains, embed, max_segments=4)
    encoded.clear()
    run(tmp_path, segment_model="some/model", max_latent_steps=3)
    assert encoded == []


@pytest.fixture
def colliding_index(toy, tmp_path):
    """Path of ready-made Semantic IDs where items 3 and 7 share one, and their codes."""
    catalog = PreparedData.load(toy).catalog
    codes = catalog.codes.clone()
    codes[3] = codes[7]
    tokens = [[sid_token(level, code) for level, code in enumerate(item)] for item in codes.tolist()]
    path = tmp_path / "toy.index.json"
    path.write_text(json.dumps(dict(zip(catalog.item_ids, tokens, strict=True))))
    return path, codes


def test_a_ready_made_index_may_have_collisions(tmp_path, colliding_index):
    path, codes = colliding_index
    run(tmp_path / "out", index=str(path), allow_collisions=True)
    catalog = SidCatalog.from_pretrained(tmp_path / "out" / "catalog")
    assert catalog.codes.equal(codes)
    assert catalog.allow_collisions
    assert read_json(tmp_path / "out" / "semantic_ids.json")["collisions"] == 1
    assert not (tmp_path / "out" / "quantizer").exists()


def test_collisions_are_refused_by_default(tmp_path, colliding_index):
    with pytest.raises(ValueError, match="allow_collisions"):
        run(tmp_path / "out", index=str(colliding_index[0]))


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_a_part_without_samples_is_named(tmp_path, split):
    rows = [f"u{user},{(user + step) % 12},{step}" for user in range(12) for step in range(3)]
    (tmp_path / "few.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    shares = {"validation_share": 0.33, "test_share": 0.33} if split == "global_time" else {}
    with pytest.raises(ValueError, match="train"):
        run(tmp_path / "out", "table", {"interactions": str(tmp_path / "few.csv"), "k_core": 1}, split=split, **shares)
    assert not (tmp_path / "out" / "users").exists()


def test_samples_keep_the_newest_items(toy, tmp_path):
    run(tmp_path, max_history=3)
    short, whole = (PreparedData.load(folder).samples for folder in (tmp_path, toy))
    for part in ("train", "validation", "test"):
        assert list(short[part]["history"]) == [history[-3:] for history in whole[part]["history"]]
        assert short[part]["target"] == whole[part]["target"]
    assert max(map(len, whole["test"]["history"])) > 3


def test_a_processor_with_longer_prompts_warns(tmp_path):
    run(tmp_path, max_history=3)
    data = PreparedData.load(tmp_path)
    tokenizer = processor_of(tmp_path, data).tokenizer
    assert data.processor(tokenizer, "Next:", 3).max_history == 3
    with pytest.warns(UserWarning, match="max_history"):
        data.processor(tokenizer, "Next:", 4)


def test_another_catalogue_is_refused(toy):
    data = PreparedData.load(toy)
    data.check_catalog(data.catalog, "checkpoint")
    codes = data.catalog.codes.clone()
    codes[[0, 1]] = codes[[1, 0]]
    with pytest.raises(ValueError, match="checkpoint"):
        data.check_catalog(SidCatalog(codes, data.catalog.item_ids), "checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# Extensions in a file of the user's current directory


EXTENSIONS = """
from lasar_hf.data import Interactions
from lasar_hf.semantic_ids import ResidualKMeans


class Reversed(ResidualKMeans):
    "Residual k-means that numbers the codes the other way round."

    def fit_encode(self, x):
        super().fit_encode(x)
        self.centres = self.centres[:, ::-1].copy()
        self.codes_used[:] = self.codebook_size
        return self.encode(x)


def read_shop(num_users):
    histories = [[user % 9, (user + 1) % 9, (user + 3) % 9, (user + 4) % 9] for user in range(num_users)]
    items = [{"title": f"Item number {item}"} for item in range(9)]
    return Interactions([f"i{item}" for item in range(9)], items, [f"u{user}" for user in range(num_users)], histories)
"""


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    (tmp_path / "my_extensions.py").write_text(EXTENSIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_extensions", None)


def test_source_in_the_current_directory(extensions, tmp_path):
    run(tmp_path / "out", "my_extensions.read_shop", {"num_users": 20}, codebook_size=4)
    assert len(PreparedData.load(tmp_path / "out").users) == 20


def test_quantizer_by_dotted_path(extensions, tmp_path, toy):
    run(tmp_path / "out", quantizer="my_extensions.Reversed")
    loaded = load_quantizer(tmp_path / "out")
    assert type(loaded).__name__ == "Reversed"
    np.testing.assert_array_equal(loaded.centres, load_quantizer(toy).centres[:, ::-1])


def test_another_quantizer_repeats_the_steps_that_depend_on_it(extensions, tmp_path):
    run(tmp_path / "out")
    assert run(tmp_path / "out", quantizer="my_extensions.Reversed") == ["semantic_ids", "samples", "card"]


def test_a_file_as_source_is_an_error(tmp_path):
    path = ratings(tmp_path)
    with pytest.raises(ValueError, match="source=table"):
        run(tmp_path / "out", path)


@pytest.mark.parametrize("target_repeats", [True, False])
def test_validation_decides_where_items_repeat_a_little(target_repeats):
    """Users take one item twice in training. Their validation item is one that they have, or never is."""

    train = [[user % 5, 5 + user % 5, user % 5] for user in range(40)]
    targets = [[5 + user % 5 if target_repeats else 5 + (user + 1) % 5] for user in range(40)]
    split = Split([f"user-{i}" for i in range(40)], train, targets, targets)
    validation = Dataset.from_dict({"history": train, "target": [target[0] for target in targets]})
    found = recipe.measure_repeats(split, validation, 10)
    assert found == {"repeat_rate": 0.5, "exclude_history": not target_repeats}
    # Without validation samples nothing speaks for leaving the history out.
    assert not recipe.measure_repeats(split, validation.select([]), 10)["exclude_history"]


def test_the_card_has_the_repeat_rate(toy):
    card = read_json(toy / "data_card.json")
    data = PreparedData.load(toy)
    assert card["data"]["repeat_rate"] == data.repeat_rate == repeat_rate(data.split.train)
    assert card["data"]["exclude_history"] is data.exclude_history


def test_data_of_an_older_version_gets_its_repeat_rate(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "data")
    settings = read_json(toy / "prepared.json")
    rate = settings.pop("repeat_rate")
    settings.pop("exclude_history")
    (tmp_path / "data" / "prepared.json").write_text(json.dumps(settings))
    shutil.rmtree(tmp_path / "data" / "steps")
    assert PreparedData.load(tmp_path / "data").repeat_rate == rate
