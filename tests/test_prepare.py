"""The preparation as a whole: what a folder holds, nothing done twice, killed runs, and every source."""

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

import huggingface_hub
import numpy as np
import pytest
from datasets import Value

from lasar_hf import SidCatalog, preparation
from lasar_hf.data import (
    Interactions,
    PreparedData,
    Split,
    TimeSplit,
    alignment_examples,
    grpo_examples,
    history_examples,
    load_interactions,
    load_split,
    load_texts,
    reasoning_examples,
    save_interactions,
    save_split,
    save_texts,
    sft_examples,
    toy_shop,
)
from lasar_hf.model.configuration_lasar import sid_token
from lasar_hf.reasoning import TemplateTeacher, segment
from lasar_hf.reasoning.segments import split_sentences
from lasar_hf.semantic_ids import ItemEncoder, format_report, item_text
from tests.preparing import ALL, RECIPE, files, processor_of, run
from tests.teacher_endpoint import GOOD, answer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert run(folder) == ALL
    return folder


def test_what_lies_in_the_folder(toy):
    names = {path.name for path in toy.iterdir() if not path.name.endswith((".npy", ".arrow"))}
    assert names == {
        "catalog", "chains.json", "data_card.json", "interactions", "item_encoder", "items", "prepared.json",
        "quantizer", "samples", "semantic_ids.json", "split", "steps", "tokenizer",
    }  # fmt: skip
    views = json.loads((toy / "semantic_ids.json").read_text())["views"]
    assert views == {"text": {"width": 8, "weight": 1.0}, "co-occurrence": {"width": 4, "weight": 1.0}}
    data, shop = PreparedData.load(toy), toy_shop(30, 48)
    assert data.codebook_size == 8 and data.codes.shape == (48, 4) and len(np.unique(data.codes, axis=0)) == 48
    assert np.array_equal(SidCatalog.from_pretrained(toy / "catalog").codes.numpy(), data.codes)
    assert data.interactions == Interactions(shop.item_ids, shop.items, shop.user_ids, shop.histories)
    assert data.split.train == [history[:-2] for history in shop.histories]
    train = data.samples["train"]
    assert train.column_names == ["user_id", "history", "target", "chain_of_thought", "segments"]
    assert [" ".join(parts) for parts in train["segments"]] == list(train["chain_of_thought"])


def test_the_card(toy):
    card, train = json.loads((toy / "data_card.json").read_text()), PreparedData.load(toy).samples["train"]
    assert card["arguments"]["seed"] == 0 and card["arguments"]["source"] == "toy"
    assert card["counts"]["users"] == 30 and card["counts"]["train_samples"] == len(train)
    assert card["data"]["split"]["kind"] == "leave-one-out" and "no times" in card["data"]["order"]
    assert card["semantic_ids"]["collisions"] == 0
    assert card["chains"] == {"teacher": "template", "requests": card["counts"]["train_samples"]}
    assert str(toy) not in json.dumps(card)  # a folder that moves stays the same


def test_counts_and_the_quality_of_the_semantic_ids_are_shown(tmp_path, caplog):
    caplog.set_level("INFO")
    columns = {"user_column": "user", "item_column": "item", "time_column": "time"}
    with pytest.warns(UserWarning, match="no text"):
        run(tmp_path / "out", "table", interactions=[str(ratings(tmp_path))], **columns)
    assert "40 users, 25 items, 320 interactions, 320 rows read, 0 repeats dropped, 0 below core" in caplog.text
    assert format_report(json.loads((tmp_path / "out" / "semantic_ids.json").read_text())) in caplog.text
    assert "25 items, 320 interactions, 200 train samples, 40 validation samples, 40 test samples" in caplog.text


def test_balanced_semantic_ids(toy, tmp_path):
    assert run(shutil.copytree(toy, tmp_path / "b"), balanced=True) == ["semantic_ids", "samples", "card"]
    first_codes = PreparedData.load(tmp_path / "b").codes[:, 0]
    assert np.bincount(first_codes).tolist() == [6] * 8  # 48 items on 8 codes


def test_the_tokenizer_knows_the_words_of_every_row(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "large")
    run(folder, tokenizer_size=4000, instruction="Fetch whatever comes next, please.")
    tokenizer = processor_of(folder, PreparedData.load(folder)).tokenizer
    chain = PreparedData.load(folder).samples["train"]["segments"][0][0]
    for text in ("Fetch whatever comes next, please.", "Which item has this title?", chain):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert len(tokens) == len(re.findall(r" ?\w+| ?[^\w\s]+", text)), text  # every word in one piece


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({}, []),
        ({"max_latent_steps": 2}, ["segments", "tokenizer", "samples", "card"]),
        ({"tokenizer_size": 280}, ["tokenizer", "card"]),
        ({"collaborative_weight": 2.0}, ["semantic_ids", "samples", "card"]),
        ({"text_dim": 9}, ["embeddings", "semantic_ids", "samples", "card"]),
        ({"toy_users": 31}, ALL),
        ({"k_core": 3, "user_column": "u"}, ["card"]),  # nothing that the toy shop uses
        ({"validation_share": 0.2, "teacher_model": "other"}, ["card"]),  # nor leave-one-out, nor the template teacher
        ({"max_history": 4}, ["chains", "segments", "tokenizer", "samples", "card"]),
    ],
)
def test_what_changed_runs_again_and_gives_what_a_fresh_run_gives(toy, tmp_path, change, steps):
    shutil.copytree(toy, tmp_path / "again")
    assert run(tmp_path / "again", **change) == steps
    run(tmp_path / "fresh", **change)
    assert files(tmp_path / "again") == files(tmp_path / "fresh")


def test_one_step(tmp_path):
    assert run(tmp_path, steps=["interactions", "split"]) == ["interactions", "split"]
    with pytest.raises(FileNotFoundError, match="holds no complete prepared data"):
        PreparedData.load(tmp_path)
    with pytest.raises(ValueError, match="step 'segments' reads 'chains'"):
        run(tmp_path, steps=["segments"])
    assert run(tmp_path) == ALL[2:]


@pytest.mark.slow
def test_killed_ten_times_the_files_are_those_of_a_calm_run(tmp_path):
    """kill -9 at random moments after the first step; each run that ends is compared, then all starts anew."""
    command = [sys.executable, str(RECIPE), "--source", "toy", "--output_dir", "data", "--tokenizer_size", "400"]
    environment = os.environ | {"PYTHONPATH": str(RECIPE.parents[1])}

    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, env=environment, text=True)

    calm = start(tmp_path / "calm")
    calm.stderr.readline()
    begin = time.perf_counter()
    calm.stderr.read()
    duration = time.perf_counter() - begin
    assert calm.wait() == 0
    expected = files(tmp_path / "calm")
    rng, kills, attempt = random.Random(0), 0, 0
    while kills < 10 or files(tmp_path / str(attempt)) != expected:
        process = start(tmp_path / str(attempt))
        process.stderr.readline()  # the first step has been looked at
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


def ratings(folder, users=40, items=25, seed=0):
    """A file of three columns in an order that is not that of time."""
    rng = np.random.default_rng(seed)
    lines = [
        f"u{user},{(user + 3 * step) % items},{int(rng.integers(1000))}" for user in range(users) for step in range(8)
    ]
    path = folder / "ratings.csv"
    path.write_text("\n".join(["user,item,time", *rng.permutation(lines)]) + "\n")
    return path


def test_three_columns_become_training_rows(tmp_path):
    """The documented command, as a user types it."""
    ratings(tmp_path)
    said = re.search(r"python (recipes/prepare\.py --output_dir outputs/mine/data .*?)\n\n", RECIPE.read_text(), re.S)
    words = said[1].replace("\\\n", " ").split()
    words[0] = str(RECIPE)
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(RECIPE.parents[1])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no item has text" in done.stderr
    folder = tmp_path / "outputs" / "mine" / "data"
    data = PreparedData.load(folder)
    assert sorted(data.item_ids, key=int) == [str(item) for item in range(25)] and len(data.split.user_ids) == 40
    processor = processor_of(folder, data)
    train = data.samples["train"]
    depths = [len(parts) for parts in train["segments"]]
    tables = (
        sft_examples(train, processor),
        history_examples(data.split, processor),
        reasoning_examples(train, processor, depths),
    )
    for rows in tables:
        assert len(rows) and all(len(row["labels"]) == len(row["input_ids"]) for row in rows)
    assert len(grpo_examples(train, processor)) == len(train)
    assert len(alignment_examples(data.interactions, data.split, processor)) == 0  # there is no text to align with
    card = json.loads((folder / "data_card.json").read_text())
    assert "by time" in card["data"]["order"] and card["data"]["reader"]["rows_read"] == 320


def test_a_file_that_changes_is_read_again(tmp_path):
    path = ratings(tmp_path)
    columns = {"user_column": "user", "item_column": "item", "time_column": "time", "interactions": [str(path)]}
    with pytest.warns(UserWarning, match="no item has text"):
        run(tmp_path / "out", "table", **columns)
    path.rename(tmp_path / "moved.csv")
    again = columns | {"interactions": [str(tmp_path / "moved.csv")]}
    assert run(tmp_path / "out", "table", **again) == ["card"]
    with (tmp_path / "moved.csv").open("a") as file:
        file.write("u0,24,2000\n")
    with pytest.warns(UserWarning, match="no item has text"):
        assert run(tmp_path / "out", "table", **again) == ALL


def test_global_time(tmp_path):
    path = ratings(tmp_path)
    columns = {"user_column": "user", "item_column": "item", "time_column": "time", "interactions": [str(path)]}
    with pytest.warns(UserWarning):
        run(tmp_path / "out", "table", split="global_time", **columns)
    data = PreparedData.load(tmp_path / "out")
    assert isinstance(data.split, TimeSplit)
    time_of = {}
    for line in path.read_text().splitlines()[1:]:
        user, item, moment = line.split(",")
        time_of[user, item] = min(int(moment), time_of.get((user, item), 10**9))
    first, second = data.split.validation_from, data.split.test_from
    points = {"train": (-1, first), "validation": (first, second), "test": (second, 10**9)}
    for name, (begin, end) in points.items():
        assert len(data.samples[name])
        for row in data.samples[name]:
            moment = time_of[row["user_id"], data.item_ids[row["target"]]]
            assert begin <= moment < end
            assert all(time_of[row["user_id"], data.item_ids[item]] <= moment for item in row["history"])
    assert data.interactions.num_interactions == 320
    assert json.loads((tmp_path / "out" / "data_card.json").read_text())["data"]["split"]["kind"] == "global time"
    assert run(tmp_path / "out", "table", **columns) == ["split", *ALL[3:]]  # back to leave-one-out


def amazon_files(folder, version):
    columns = {2018: ("reviewerID", "asin", "unixReviewTime"), 2023: ("user_id", "parent_asin", "timestamp")}
    user, item, moment = columns[version]
    reviews = [{user: f"U{u}", item: f"B{(u + s) % 9}", moment: 100 * u + s} for u in range(12) for s in range(6)]
    meta = [{item: f"B{n}", "title": f"Tool &amp; part {n}", "description": ["A tool."]} for n in range(8)]
    paths = folder / "reviews.json.gz", folder / "meta.json.gz"
    for path, rows in zip(paths, (reviews, meta), strict=True):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return [[str(path)] for path in paths]


@pytest.mark.parametrize("version", [2018, 2023])
def test_amazon(tmp_path, version):
    interactions, items = amazon_files(tmp_path, version)
    with pytest.warns(UserWarning, match="1 of 9 items have no text; they are kept"):
        run(tmp_path / "out", f"amazon{version}", interactions=interactions, items=items)
    data = PreparedData.load(tmp_path / "out")
    assert data.items["title"][:2] == ["Tool & part 0", "Tool & part 1"] and data.items["title"][8] == ""
    assert len(data.items) == 9 and len(data.split.user_ids) == 12


def test_amazon_from_the_hub(tmp_path, monkeypatch):
    (interactions,), (items,) = amazon_files(tmp_path, 2023)
    asked = []

    def download(repo, name, *, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return interactions if "rating_only" in name else items

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.warns(UserWarning, match="no text"):
        run(tmp_path / "out", "amazon2023", category="Tools", revision="abc")
    assert asked == [
        ("McAuley-Lab/Amazon-Reviews-2023", "benchmark/5core/rating_only/Tools.csv", "dataset", "abc"),
        ("McAuley-Lab/Amazon-Reviews-2023", "raw/meta_categories/meta_Tools.jsonl", "dataset", "abc"),
    ]
    assert run(tmp_path / "out", "amazon2023", category="Tools", revision="abc") == [] and len(asked) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "tabel"}, FileNotFoundError, "source 'tabel' is no folder: give toy, table"),
        ({"source": "table"}, ValueError, "source 'table' needs `interactions`: files of interactions"),
        ({"source": "amazon2023"}, ValueError, "or `category` for the Hub"),
        ({"source": "table", "interactions": ["no.csv"]}, FileNotFoundError, "no.csv: there is no such file"),
        ({"source": "toy", "items": ["x.csv"]}, ValueError, "belong to table and amazon, not to source 'toy'"),
        ({"source": "toy", "category": "Books"}, ValueError, "`category` fetches amazon2023"),
        ({"source": "table", "interactions": [str(RECIPE)], "text_columns": "name"}, ValueError, "expected JSON"),
        ({"source": "table", "interactions": [str(RECIPE)], "text_columns": "[1]"}, ValueError, "expected an object"),
        ({"source": "toy", "allow_collisions": True}, ValueError, "allow_collisions belongs to a ready-made index"),
        ({"source": "toy", "num_sid_levels": 27}, ValueError, "num_sid_levels is 27"),
        ({"source": "toy", "collaborative_dim": -3}, ValueError, "collaborative_dim is -3, expected at least 0"),
        ({"source": "toy", "collaborative_weight": math.nan}, ValueError, "collaborative_weight is nan"),
        ({"source": "toy", "text_dim": 0}, ValueError, "text_dim is 0, expected at least 1"),
        ({"source": "toy", "max_history": 0}, ValueError, "max_history is 0, expected at least 1"),
        ({"source": "toy", "teacher": "openai"}, ValueError, "name the endpoint's model by teacher_model"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, **arguments)
    assert not (tmp_path / "interactions").exists()


def test_a_teacher_behind_an_endpoint(tmp_path, endpoint):
    server = endpoint(lambda prompt, nth: answer(GOOD))
    options = {"teacher": "openai", "teacher_model": "tiny", "teacher_base_url": server.url, "toy_users": 6}
    run(tmp_path, **options)
    data = PreparedData.load(tmp_path)
    assert set(data.samples["train"]["chain_of_thought"]) == {GOOD}
    card = json.loads((tmp_path / "data_card.json").read_text())
    assert card["chains"]["model"] == "tiny" and card["chains"]["accepted"] == len(server.asked) > 10
    asked = server.asked.total()
    assert run(tmp_path, **options | {"teacher_base_url": "http://127.0.0.1:9"}) == []
    assert run(tmp_path, **options | {"targets": "last"}) == ALL[4:]
    assert server.asked.total() == asked  # each of these was answered before


def test_interactions_and_splits_come_back(tmp_path):
    table = Interactions(["a", "b"], [{"title": "x"}, {}], ["u"], [[0, 1]], [[1.5, 2.0]], {"rows_read": 2})
    save_interactions(table, tmp_path / "i")
    assert load_interactions(tmp_path / "i") == table and load_interactions(tmp_path / "i").counts == {"rows_read": 2}
    by_time = TimeSplit(["u", "v"], [[0], []], [[], [1]], [[2], []], 1.0, 2.5)
    for split in (Split(["u"], [[0, 1]], [2], [3], 4), by_time):
        save_split(split, tmp_path / "s")
        assert load_split(tmp_path / "s") == split


def test_a_folder_without_split_is_leave_one_out(toy, tmp_path):
    data = PreparedData.load(toy)
    PreparedData(data.items, data.samples, data.codebook_size).save(tmp_path)
    assert PreparedData.load(tmp_path).split == load_split(toy / "split")
    data.save(tmp_path)
    assert (tmp_path / "split").exists() and PreparedData.load(tmp_path).interactions == data.interactions


def test_item_text_is_embedded_once(tmp_path, monkeypatch):
    asked = []

    def encode(texts, batch_size, convert_to_numpy):
        asked.extend(texts)
        return np.array([[len(text), text.count("e")] for text in texts])

    package = types.SimpleNamespace(SentenceTransformer=lambda name: types.SimpleNamespace(encode=encode))
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    run(tmp_path, embedding_model="some/model")
    texts = list(map(item_text, load_interactions(tmp_path / "interactions").items))
    assert asked == list(dict.fromkeys(texts))
    assert np.load(tmp_path / "embeddings.npy")[:, 0].tolist() == list(map(len, texts))
    assert ItemEncoder.from_pretrained(tmp_path / "item_encoder").text_view == "some/model"
    assert run(tmp_path, embedding_model="some/model", toy_users=31) == ALL  # other users, the same items
    assert len(asked) == len(set(asked))


def test_sentences_are_embedded_once(tmp_path, monkeypatch):
    asked = []

    def encode(texts, batch_size, convert_to_numpy):
        asked.extend(texts)
        return np.array([[len(text) % 7, text.count("e")] for text in texts])

    package = types.SimpleNamespace(SentenceTransformer=lambda name: types.SimpleNamespace(encode=encode))
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    run(tmp_path, segment_model="some/model")
    chains = list(load_texts(tmp_path / "chains.arrow")["text"])
    assert asked == list(dict.fromkeys(part for text in chains for part in split_sentences(text)))
    expected = segment(chains, lambda texts: encode(texts, 1, True), max_segments=4)
    assert list(load_texts(tmp_path / "segments.arrow")["text"]) == expected
    asked.clear()
    assert run(tmp_path, segment_model="some/model", max_latent_steps=3) == [*ALL[5:]]
    assert asked == []


def test_texts_come_back_a_batch_at_a_time(tmp_path):
    read = []

    def batches():
        for batch in ([["a", "b"], []], [], [["\x00é"]]):
            read.append((tmp_path / "t").stat().st_size)
            yield batch

    save_texts(batches(), tmp_path / "t", nested=True)
    assert list(load_texts(tmp_path / "t")["text"]) == [["a", "b"], [], ["\x00é"]]
    assert load_texts(tmp_path / "t").cache_files  # memory-mapped
    save_texts([[]], tmp_path / "t")
    assert load_texts(tmp_path / "t").features == {"text": Value("string")} and len(load_texts(tmp_path / "t")) == 0


def test_small_batches_write_the_same(toy, tmp_path, monkeypatch):
    """Whatever is done a batch at a time: chains, segments, samples, card."""
    monkeypatch.setattr(preparation, "BATCH_ROWS", 5)
    asked = []
    write = TemplateTeacher.chains_of_thought
    monkeypatch.setattr(
        TemplateTeacher, "chains_of_thought", lambda self, part: asked.append(len(part)) or write(self, part)
    )
    run(tmp_path)
    assert len(asked) > 10 and max(asked) == 5
    for name in ("chains", "segments"):
        assert load_texts(tmp_path / f"{name}.arrow")["text"] == load_texts(toy / f"{name}.arrow")["text"]
    for name in ("tokenizer/tokenizer.json", "data_card.json"):
        assert (tmp_path / name).read_bytes() == (toy / name).read_bytes()
    train = [PreparedData.load(folder).samples["train"].to_list() for folder in (tmp_path, toy)]
    assert train[0] == train[1]


def test_a_ready_made_index_may_have_collisions(toy, tmp_path):
    codes = PreparedData.load(toy).codes.copy()
    codes[3] = codes[7]
    items = load_interactions(toy / "interactions").item_ids
    index = {item: [sid_token(*pair) for pair in enumerate(row)] for item, row in zip(items, codes, strict=True)}
    path = tmp_path / "toy.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="share the SID .* pass `allow_collisions=True`"):
        run(tmp_path / "out", index=str(path))
    run(tmp_path / "out", index=str(path), allow_collisions=True)
    assert np.array_equal(PreparedData.load(tmp_path / "out").codes, codes)
    catalog = SidCatalog.from_pretrained(tmp_path / "out" / "catalog")
    assert catalog.allow_collisions
    assert json.loads((tmp_path / "out" / "semantic_ids.json").read_text())["collisions"] == 1


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_users_without_a_sample_are_said_at_once(tmp_path, split):
    rows = [f"u{user},{(user + step) % 12},{step}" for user in range(12) for step in range(3)]
    (tmp_path / "few.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    shares = {"validation_share": 0.33, "test_share": 0.33} if split == "global_time" else {}
    with pytest.raises(ValueError, match="the train part has no sample"):
        run(tmp_path / "out", "table", interactions=[str(tmp_path / "few.csv")], k_core=1, split=split, **shares)
    assert not (tmp_path / "out" / "split").exists()


def test_a_sample_keeps_the_newest_of_a_long_history(toy, tmp_path):
    run(tmp_path, max_history=3)
    short, whole = (PreparedData.load(folder).samples for folder in (tmp_path, toy))
    for name in ("train", "validation", "test"):
        assert list(short[name]["history"]) == [history[-3:] for history in whole[name]["history"]]
        assert short[name]["target"] == whole[name]["target"]
    assert max(map(len, whole["test"]["history"])) > 3
    data = PreparedData.load(tmp_path)
    tokenizer = processor_of(tmp_path, data).tokenizer
    processor = data.processor(tokenizer, "Next:", 3)
    assert processor.prompt_text([0, 1, 2, 3]) == processor.prompt_text([1, 2, 3])
    with pytest.warns(UserWarning, match="the samples keep 3 items of a history"):
        data.processor(tokenizer, "Next:", 4)
