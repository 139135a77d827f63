"""Output of a preparation: hostile items stay plain text, and no sample contains later items."""

import json
import random
import re

import pytest

from lasar_hf.data import PreparedData, alignment_examples, history_examples, read_lcrec, toy_shop
from lasar_hf.data.prepared_data import load_interactions
from lasar_hf.reasoning.leakage import SPECIAL_TOKENS
from tests.preparing import processor_of, run
from tests.references import fold


HOSTILE = {
    "0": {"title": "Silent <a_1><b_2> Harbor <|latent_start|>", "brand": "Hill"},
    "1": {"title": "x" * 100_000, "brand": "Hill"},
    "2": {"title": "zero\x00 width\u202e turn \x1b[31m end", "brand": "Hill"},
    "3": {"title": "<|latent|>", "brand": "Hill"},
    "4": {"asin": "B00ASIN"},
    "5": {},
    "6": {"title": "word " * 20_000, "description": "\u2066\ud83d half"},
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    histories = {str(user): [(user + step * (1 + user % 3)) % 7 for step in range(5)] for user in range(20)}
    (folder / "Shop.inter.json").write_text(json.dumps(histories))
    (folder / "Shop.item.json").write_text(json.dumps(HOSTILE))
    run(folder / "out", folder)
    return folder


def test_items_without_text_are_kept(hostile):
    data = PreparedData.load(hostile / "out")
    assert data.items["asin"][4] == "B00ASIN"
    assert data.interactions.items[4] == {"asin": "B00ASIN"}
    assert data.interactions.items[5] == {}


def test_control_characters_become_spaces(hostile):
    data = PreparedData.load(hostile / "out")
    assert data.items["title"][2].split() == ["zero", "width", "turn", "[31m", "end"]


def test_titles_do_not_produce_special_tokens(hostile):
    data = PreparedData.load(hostile / "out")
    processor = processor_of(hostile / "out", data)
    tokens = processor.tokenizer.get_added_vocab()
    special = {tokens[name] for name in tokens if SPECIAL_TOKENS.fullmatch(name)} - {processor.tokenizer.eos_token_id}
    for example in alignment_examples(data.interactions, data.split, processor, ["sid_to_title"]):
        text = [token for token in example["labels"] if token != -100]
        assert len(text) <= 65  # 64 tokens and the end of text
        assert not special & set(text)
        assert len([token for token in example["input_ids"] if token in special]) == 4  # the Semantic ID


def test_chains_of_hostile_items_are_short_and_printable(hostile):
    data = PreparedData.load(hostile / "out")
    for row in data.samples["train"]:
        assert not SPECIAL_TOKENS.search(row["chain_of_thought"])
        assert len(row["chain_of_thought"]) < 2000
        assert row["chain_of_thought"].isprintable()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Shop.inter.json", '{"0": [1, 2],\n "1": [3,, 4]}', r"Shop\.inter\.json: line 2"),
        ("Shop.inter.json", '{"0": [1], "0": [2]}', r"Shop\.inter\.json.*'0'"),
        ("Shop.item.json", '{"1": {"title": "x"}, "1": {}}', r"Shop\.item\.json.*'1'"),
    ],
)
def test_broken_files_are_named_and_nothing_is_left(tmp_path, name, text, message):
    (tmp_path / "Shop.inter.json").write_text('{"0": [1, 2, 3]}')
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"steps", ".interactions.partial"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.jsonl", '{"u": 1, "i": 2, "t": 3}\n{"u": 1, "i"\n', r"log\.jsonl: line 2"),
        ("log.jsonl", '{"u": 1, "i": 2, "t": 3}\n{"u": 1, "i": 2}\n', r"log\.jsonl: line 2 .*'t'"),
        ("log.csv", "u,i\n1,2\n", r"log\.csv .*'t'"),
    ],
)
def test_broken_tables_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    columns = {"user_column": "u", "item_column": "i", "time_column": "t", "interactions": [str(tmp_path / name)]}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", "table", columns)


def test_times_are_sorted_and_ties_keep_the_order(tmp_path):
    history = list(zip("wxyz", (9, 1, 5, 5), strict=True))
    lines = ["u,i,t"] + [f"{user},{item},{time}" for user in "abc" for item, time in history]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    columns = {"user_column": "u", "item_column": "i", "time_column": "t", "k_core": 1}
    with pytest.warns(UserWarning):
        run(tmp_path / "out", "table", columns | {"interactions": str(tmp_path / "log.csv")})
    data = PreparedData.load(tmp_path / "out")
    for history in data.interactions.histories:
        assert [data.catalog.item_ids[item] for item in history] == list("xyzw")
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())["data"]
    assert card["tied_neighbours"] == pytest.approx(1 / 3)


def shown_name(title):
    """A title as the template teacher quotes it: ten words without final punctuation, in lower case here."""
    words = "".join(letter if letter.isprintable() else " " for letter in title[:1000]).split()
    return " ".join(re.sub(r"[.!?,;:]+$", "", word[:40]) for word in words[:10]).strip().casefold()


def check_no_future(folder, sequences, max_history=6):
    """
    Check all that a model will see against the raw sequences `{user: items}`: a prompt contains the items before its
    target, and no chain or segment contains the target's title, a Semantic ID, or the name of a later item.

    Returns the number of checked samples.
    """
    data = PreparedData.load(folder)
    processor = processor_of(folder, data, max_history)
    index_of = {tuple(codes): row for row, codes in enumerate(data.catalog.codes.tolist())}
    titles = [fold(item.get("title", "")) for item in data.interactions.items]
    names = [shown_name(item.get("title", "")) for item in data.interactions.items]

    def items_in(text):
        codes = [int(code) for code in re.findall(r"<[a-z]_(\d+)>", text)]
        return [index_of[tuple(codes[start : start + 4])] for start in range(0, len(codes), 4)]

    last = {"train": -2, "validation": -1, "test": None}
    seen = 0
    for part, samples in data.samples.items():
        positions = {}
        for row in samples:
            sequence = sequences[row["user_id"]]
            position = len(row["history"])
            assert sequence[:position] == row["history"] and sequence[position] == row["target"]
            assert position < len(sequence[: last[part]]) and positions.setdefault(row["user_id"], 0) < position
            positions[row["user_id"]] = position
            assert items_in(processor.prompt_text(row["history"])) == sequence[:position][-max_history:]
            for text in [row["chain_of_thought"], *row["segments"]] if part == "train" else []:
                assert not titles[row["target"]] or titles[row["target"]] not in fold(text)
                assert not SPECIAL_TOKENS.search(text)
                past = [names[item] for item in row["history"]]
                for item in set(sequence[position:]) - set(row["history"]):
                    is_quoted = names[item] and f'"{names[item]}"' in text.casefold()
                    assert not is_quoted or names[item] in past
                seen += 1
    for row in history_examples(data.split, processor):
        shown = items_in(processor.tokenizer.decode(row["input_ids"]))
        assert any(shown == sequence[:-2][-max_history - 1 :] for sequence in sequences.values())
    return seen


def test_nothing_of_the_future_in_the_toy_shop(tmp_path):
    shop = toy_shop(30, 48)
    run(tmp_path)
    assert check_no_future(tmp_path, dict(zip(shop.user_ids, shop.histories, strict=True))) > 300


def test_the_source_is_stored_as_it_was_read(hostile):
    assert load_interactions(hostile / "out")[0] == read_lcrec(hostile)


def test_nothing_of_the_future_among_hostile_items(hostile):
    raw = json.loads((hostile / "Shop.inter.json").read_text())
    assert check_no_future(hostile / "out", raw) > 20


def test_nothing_of_the_future_on_real_items(tmp_path, shared_data):
    whole = shared_data / "scientific"
    users = json.loads((whole / "Scientific.inter.json").read_text())
    chosen = {user: users[user] for user in random.Random(0).sample(sorted(users), 60)}
    texts = json.loads((whole / "Scientific.item.json").read_text())
    items = {str(item) for history in chosen.values() for item in history}
    (tmp_path / "S.inter.json").write_text(json.dumps(chosen))
    (tmp_path / "S.item.json").write_text(json.dumps({item: texts[item] for item in items if item in texts}))
    run(tmp_path / "out", tmp_path, index=str(whole / "Scientific.index.json"), codebook_size=256)
    rows = {item: row for row, item in enumerate(PreparedData.load(tmp_path / "out").catalog.item_ids)}
    assert check_no_future(tmp_path / "out", {u: [rows[str(item)] for item in i] for u, i in chosen.items()}) > 100
    assert not (tmp_path / "out" / "quantizer").exists()
