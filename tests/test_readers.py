"""Readers: the data they return, and the file, row or argument that each error names."""

import gzip
import json
import time
from collections import Counter
from datetime import UTC, date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lasar_hf.data import (
    Interactions,
    read_amazon2018,
    read_amazon2023,
    read_index,
    read_items,
    read_lcrec,
    read_source,
    read_table,
    readers,
    tables,
)
from lasar_hf.data.interactions import natural_order
from lasar_hf.data.readers import source_settings


def write(folder, **parts):
    """Write `Shop.<part>.json` files; a string is written as it is."""
    for part, content in parts.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"Shop.{part}.json").write_text(text, encoding="utf-8")
    return folder


def test_lcrec_reads_rows_text_and_order(tmp_path):
    write(
        tmp_path,
        inter={"u": [10, 2, 9], "v": [2]},
        item={
            "9": {"title": " Nine ", "description": "", "categories": "Tools,Tapes, Adhesives & Sealants,Tape"},
            "3": {"asin": "B0", "title": None, "description": ["a", "b"], "categories": ["X", "Y"], "price": 3},
        },
    )
    data = read_lcrec(tmp_path)
    assert data.item_ids == ["2", "3", "9", "10"]  # numbers in order of size; an item nobody took stays
    assert data.items == [
        {},
        {"description": "a b", "categories": "X > Y", "asin": "B0"},
        {"title": "Nine", "categories": "Tools > Tapes, Adhesives & Sealants > Tape"},
        {},
    ]
    assert data.user_ids == ["u", "v"]
    assert data.histories == [[3, 0, 2], [0]]
    assert data.num_interactions == 4


def test_half_a_surrogate_pair_does_not_reach_the_text(tmp_path):
    data = read_lcrec(write(tmp_path, inter={"0": ["a"]}, item='{"a": {"title": "x \\ud83d y"}}'))
    assert data.items == [{"title": "x ? y"}]


def test_letters_that_hide_or_turn_text_become_spaces(tmp_path):
    title = "a\x00b\x1bc\x85d\u202ee\u2066f\tg\nh\u200di\u00a0j"  # joiners, line ends and other spaces stay
    data = read_lcrec(write(tmp_path, inter={"0": ["a"]}, item={"a": {"title": title}, "b": {"title": "\x00\u202e"}}))
    assert data.items == [{"title": "a b c d e f\tg\nh\u200di\u00a0j"}, {}]


def test_lcrec_without_text_file(tmp_path):
    data = read_lcrec(write(tmp_path, inter={"0": ["b", "a"]}))
    assert data.item_ids == ["a", "b"] and data.items == [{}, {}] and data.histories == [[1, 0]]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"inter": '{"0": [1, 2],\n "1": [1, }'}, r"Shop\.inter\.json: line 2"),
        ({"inter": '{"0": [1], "0": [2]}'}, r"Shop\.inter\.json.*'0'"),
        ({"inter": [1, 2]}, r"Shop\.inter\.json.*list"),
        ({"inter": {"7": []}}, r"Shop\.inter\.json: user '7'"),
        ({"inter": {"7": 3}}, r"Shop\.inter\.json: user '7' .*int"),
        ({"inter": {"7": [1, None]}}, r"Shop\.inter\.json: user '7' .*None"),
        ({"inter": {"7": [True]}}, r"Shop\.inter\.json: user '7' .*True"),
        ({"inter": {"7": [1]}, "item": {"1": "text"}}, r"Shop\.item\.json: item '1'"),
        ({"inter": {"7": [1]}, "item": '{"1": '}, r"Shop\.item\.json: line 1"),
    ],
)
def test_lcrec_names_what_is_wrong(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        read_lcrec(write(tmp_path, **parts))


def test_lcrec_needs_exactly_one_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="inter.json"):
        read_lcrec(tmp_path)
    write(tmp_path, inter={"0": [1]})
    (tmp_path / "Other.inter.json").write_text("{}")
    with pytest.raises(ValueError, match="Other.inter.json, Shop.inter.json"):
        read_lcrec(tmp_path)


def test_lcrec_refuses_bytes_that_are_no_text(tmp_path):
    (tmp_path / "Shop.inter.json").write_bytes(b'{"0": ["\xff"]}')
    with pytest.raises(ValueError, match=r"Shop\.inter\.json.*UTF-8"):
        read_lcrec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": ["a", "a"]}, "item_ids .*'a'"),
        ({"user_ids": ["u", "u"]}, "user_ids .*'u'"),
        ({"histories": [[0], []]}, "'v' .*empty"),
        ({"histories": [[0], [0, 2]]}, "'v' .* 2"),
        ({"histories": [[-1], [0]]}, "'u' .*-1"),
        ({"histories": [[0]]}, "histories"),
        ({"items": [{}]}, "items"),
    ],
)
def test_interactions_are_checked(change, message):
    good = {"item_ids": ["a", "b"], "items": [{}, {}], "user_ids": ["u", "v"], "histories": [[0], [1, 0]]}
    Interactions(**good)
    with pytest.raises(ValueError, match=message):
        Interactions(**(good | change))


def index_file(tmp_path, **items):
    path = tmp_path / "Shop.index.json"
    path.write_text(json.dumps(items))
    return path


def test_index_in_row_order(tmp_path):
    path = index_file(tmp_path, x=["<a_7>", "<b_0>"], y=["<a_0>", "<b_3>"], unused=["<a_0>", "<b_3>"])
    codes = read_index(path, ["y", "x"], num_sid_levels=2, codebook_size=8)
    assert codes.dtype == np.int64 and codes.tolist() == [[0, 3], [7, 0]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<a_1>"], "item 'x'"),
        (["<a_1>", "<b_1>", "<c_1>"], "item 'x'"),
        ("<a_1><b_1>", "item 'x'"),
        (["<a_1>", "<b_8>"], "item 'x' has '<b_8>' at level 1"),
        (["<b_1>", "<a_1>"], r"item 'x' has '<b_1>' at level 0"),
        (["<a_1>", "<b_01>"], r"item 'x' has '<b_01>'"),
        (["<a_1>", 3], r"item 'x' has 3 at level 1"),
        (["<a_0>", "<b_0>"], "items 'y' and 'x'"),
    ],
)
def test_index_names_what_is_wrong(tmp_path, tokens, message):
    path = index_file(tmp_path, y=["<a_0>", "<b_0>"], x=tokens)
    with pytest.raises(ValueError, match=rf"Shop\.index\.json: {message}"):
        read_index(path, ["y", "x"], num_sid_levels=2, codebook_size=8)


def test_index_may_share_a_sid_when_told_so(tmp_path):
    path = index_file(tmp_path, y=["<a_0>", "<b_0>"], x=["<a_0>", "<b_0>"])
    codes = read_index(path, ["y", "x"], num_sid_levels=2, codebook_size=8, allow_collisions=True)
    assert codes.tolist() == [[0, 0], [0, 0]]


def test_index_lacks_an_item(tmp_path):
    path = index_file(tmp_path, y=["<a_0>", "<b_0>"])
    with pytest.raises(ValueError, match=r"Shop\.index\.json: item 'x'"):
        read_index(path, ["y", "x"], num_sid_levels=2)
    with pytest.raises(FileNotFoundError, match="Absent"):
        read_index(tmp_path / "Absent.index.json", ["y"])


@pytest.mark.parametrize(
    ("folder", "users", "items", "interactions"),
    [("scientific", 8317, 4344, 58492), ("beauty", 22363, 12101, 198502), ("instruments", 24772, 9922, 206153)],
)
def test_real_data(shared_data, folder, users, items, interactions):
    data = read_lcrec(shared_data / folder)
    assert (len(data.user_ids), len(data.item_ids), data.num_interactions) == (users, items, interactions)
    index = shared_data / folder / f"{folder.capitalize()}.index.json"
    if folder == "instruments":
        with pytest.raises(ValueError, match="allow_collisions"):
            read_index(index, data.item_ids)
        codes = read_index(index, data.item_ids, allow_collisions=True)
        assert len(np.unique(codes, axis=0)) == 9897
    else:
        assert len(np.unique(read_index(index, data.item_ids), axis=0)) == items


ROWS = [("b", "x", 3), ("b", "y", 1), ("a", "y", 5), ("b", "x", 9), ("a", "7", 5), ("b", "z", 3), ("a", "y", 5)]
USERS, ITEMS = ["a", "b"], ["7", "x", "y", "z"]


def log_file(folder, ending, rows=ROWS):
    """The rows as a file of one kind."""
    path = folder / f"log{ending}"
    data = {name: list(column) for name, column in zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True),
                                                       strict=True)}  # fmt: skip
    if ending == ".parquet":
        Dataset.from_dict(data).to_parquet(path)
        return path
    if ".csv" in ending:
        text = "user_id,item_id,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    else:
        text = "".join(json.dumps(dict(zip(data, row, strict=True))) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    "ending", [".csv", ".csv.gz", ".parquet", ".jsonl", ".jsonl.gz", ".json", "Dataset", "stream"]
)
@pytest.mark.parametrize("batch_rows", [2, 65_536])
def test_table_of_any_kind(tmp_path, monkeypatch, ending, batch_rows):
    monkeypatch.setattr(tables, "BATCH_SIZE", batch_rows)
    if ending in ("Dataset", "stream"):
        source = Dataset.from_parquet(str(log_file(tmp_path, ".parquet")), cache_dir=str(tmp_path))
        source = source.to_iterable_dataset() if ending == "stream" else source
        assert isinstance(source, IterableDataset if ending == "stream" else Dataset)
    else:
        source = log_file(tmp_path, ending)
    data = read_table(source, k_core=1)
    assert (data.user_ids, data.item_ids) == (USERS, ITEMS)
    assert data.histories == [[2, 0], [2, 1, 3]]  # by time, ties as in the file; of a repeat the first
    assert data.timestamps == [[5, 5], [1, 3, 3]]
    assert data.counts == {
        "rows_read": 7, "repeats_dropped": 2, "below_core_dropped": 0, "users_dropped": 0, "items_dropped": 0
    }  # fmt: skip


def test_repeats_are_kept_when_told_so(tmp_path):
    data = read_table(log_file(tmp_path, ".csv"), k_core=1, keep_repeats=True)
    assert data.histories == [[2, 0], [2, 1, 3, 1]]  # the same user, item and time is still one
    assert data.counts["repeats_dropped"] == 1


def test_without_time_the_order_of_the_file_counts(tmp_path):
    data = read_table(log_file(tmp_path, ".csv"), time_column=None, k_core=1)
    assert data.histories == [[2, 0], [1, 2, 3]] and data.timestamps is None


def test_dates(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # a date without zone must not depend on the machine
    time.tzset()
    times = "2024-01-02T00:00Z", "2024-01-01T23:00:00+00:00", "2024-01-02 01:00+02:00"
    rows = [("a", item, time) for item, time in zip("xyz", times, strict=True)]
    data = read_table(log_file(tmp_path, ".jsonl", rows), k_core=1)
    assert [data.item_ids[item] for item in data.histories[0]] == ["y", "z", "x"]
    assert data.timestamps[0] == [1704150000, 1704150000, 1704153600]
    rows = [("a", "x", "2024-01-02"), ("a", "y", "2024-01-01T23:00:00")]
    assert read_table(log_file(tmp_path, ".jsonl", rows), k_core=1).timestamps[0] == [1704150000, 1704153600]
    monkeypatch.undo()
    time.tzset()


@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60), k=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_core_equals_a_plain_loop(pairs, k):
    left = list(dict.fromkeys(pairs))
    while True:
        users, items = Counter(user for user, _ in left), Counter(item for _, item in left)
        fewer = [(user, item) for user, item in left if users[user] >= k and items[item] >= k]
        if fewer == left:
            break
        left = fewer
    source = Dataset.from_dict({"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs]})
    if not left:
        with pytest.raises(ValueError, match="k_core"):
            read_table(source, time_column=None, k_core=k)
        return
    data = read_table(source, time_column=None, k_core=k)
    got = {
        (user, data.item_ids[item])
        for user, history in zip(data.user_ids, data.histories, strict=True)
        for item in history
    }
    assert got == {(str(user), str(item)) for user, item in left}
    assert data.counts["repeats_dropped"] + data.counts["below_core_dropped"] == len(pairs) - len(left)
    for user, history in zip(data.user_ids, data.histories, strict=True):
        assert [data.item_ids[item] for item in history] == [str(item) for one, item in left if str(one) == user]


ITEMS_CSV = 'item_id,name,title,brand\nx,Ex,"two\nlines",B\nunused,U,,\ny,,,\nx,Again,,\n007,Bond,,\n'


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("text_columns", "expected"),
    [(None, {"title": "two\nlines", "description": "B", "brand": "B"}), ({"title": "name"}, {"title": "Ex"})],
)
def test_items_get_the_text_of_their_first_row(tmp_path, text_columns, expected):
    (tmp_path / "items.csv").write_text(ITEMS_CSV)
    data = read_table(log_file(tmp_path, ".csv"), tmp_path / "items.csv", k_core=1, text_columns=text_columns)
    assert data.items == [{}, expected, {}, {}]


def test_repeated_and_empty_items_are_counted(tmp_path):
    (tmp_path / "items.csv").write_text(ITEMS_CSV + "x,Again,Other,\n")
    with pytest.warns(UserWarning) as caught:
        read_table(log_file(tmp_path, ".csv"), [tmp_path / "items.csv"], k_core=1, text_columns={"title": "title"})
    messages = [str(warning.message) for warning in caught]
    assert any("1 rows" in message for message in messages)
    assert any("3 of 4" in message for message in messages)


def test_the_first_text_of_an_item_counts(tmp_path, recwarn):
    """Interactions with titles repeat the title in each row, and some rows lack it; only another title is said."""
    path = tmp_path / "log.csv"
    path.write_text("item_id,title\n1,\n1,Apple\n1,Apple\n2,Pear\n2,\n")
    assert read_items(path) == {"1": {"title": "Apple"}, "2": {"title": "Pear"}} and not recwarn
    path.write_text("item_id,title\n1,Apple\n1,Pear\n")
    with pytest.warns(UserWarning, match="1 rows repeat an item with other text"):
        assert read_items(path) == {"1": {"title": "Apple"}}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_read_items_keeps_leading_zeros(tmp_path):
    (tmp_path / "items.csv").write_text(ITEMS_CSV)
    items = read_items(tmp_path / "items.csv", text_columns={"title": "name"})
    assert items == {"x": {"title": "Ex"}, "unused": {"title": "U"}, "y": {}, "007": {"title": "Bond"}}


def test_read_items_strips_markup(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"sku": 7, "title": "Red &amp; <b>blue</b>", "categories": ["A", "B"]}')
    items = read_items([tmp_path / "items.jsonl"], "sku", strip_markup=True)
    assert items == {"7": {"title": "Red & blue", "categories": "A > B"}}


def test_read_items_names_a_row_without_id(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\na,x\n,y\n")
    with pytest.raises(ValueError, match=r"items\.csv: row 2 .*item_id"):
        read_items(tmp_path / "items.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.csv", "user_id,item_id\na,x\n", "timestamp"),
        ("log.csv", "user_id,item_id,timestamp\na,x,1\na,,2\n", "row 2 .*item_id"),
        ("log.csv", "user_id,item_id,timestamp\na,x,1\n,x,2\n", "row 2 .*user_id"),
        ("log.csv", "user_id,item_id,timestamp\na,x,soon\n", "row 1, timestamp .*soon"),
        ("log.csv", "user_id,item_id,timestamp\na,x,Now\n", "row 1, timestamp .*Now"),
        ("log.csv", "user_id,item_id,timestamp\na,x,today\n", "row 1, timestamp .*today"),
        ("log.csv", "user_id,item_id,timestamp\na,x,inf\n", "row 1, timestamp .*inf"),
        ("log.csv", "user_id,item_id,timestamp\na,x,nan\n", "row 1, timestamp .*nan"),
        ("log.csv", "user_id,item_id,timestamp\na,x,1,2\n", "csv"),
        ("log.csv", "", "user_id"),
        ("log.parquet", "none", "parquet"),
        ("log.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": 3}\n{"user_id"\n', "line 2"),
        ("log.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": 3}\n{"user_id": 1}\n', "line 2 .*item_id"),
        ("log.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": null}', "row 1, timestamp .*None"),
        ("log.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": true}', "row 1, timestamp .*True"),
        ("log.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": 1%s}' % ("0" * 400), "row 1, timestamp is 1000"),
        ("log.jsonl", '{"user_id": 1, "item_id": %s, "timestamp": 3}' % ("9" * 5000), "line 1"),
        ("log.jsonl", '{"user_id": 1}\n' + "[" * 200_000, "line 1 .*item_id"),
        ("log.jsonl", "[" * 200_000, "JSON"),
        ("log.jsonl", '{"user_id": ["a"], "item_id": 2, "timestamp": 3}', r"row 1 .*user_id"),
        ("log.jsonl", '{"user_id": "a", "item_id": 2.5, "timestamp": 3}', "row 1 .*item_id 2.5"),
        ("log.jsonl", '{"user_id": true, "item_id": 2, "timestamp": 3}', "row 1 .*user_id True"),
        ("log.jsonl", '{"user_id": NaN, "item_id": 2, "timestamp": 3}', "row 1 .*user_id nan"),
        ("log.jsonl", '{"user_id": " ", "item_id": 2, "timestamp": 3}', "row 1 .*user_id ' '"),
        ("log.jsonl", '{"user_id": "a", "item_id": "\\ud800", "timestamp": 3}', "row 1 .*item_id .*ud800"),
        ("log.csv", "user_id,item_id,item_id,timestamp\na,x,y,1\n", "item_id"),
        ("log.jsonl", "[1, 2]\n", "row 1 .*int"),
        ("log.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": 3}\n[1, 2]\n', "line 2 .*list"),
        ("log.csv", "user_id,item_id,timestamp,rating\na,x,1\n", "csv"),
        ("log.jsonl.gz", "not gzip", "gzip"),
        ("log.xlsx", "", "parquet"),
    ],
)
def test_table_names_file_and_row(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_table(tmp_path / name, k_core=1)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        read_table(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"k_core": 5}, "k_core"),
        ({"text_columns": {"price": "price"}}, "text_columns .*price"),
        ({"text_columns": {}}, "text_columns"),
        ({"text_columns": {"title": "name"}}, "name"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, arguments, match):
    path = log_file(tmp_path, ".csv")
    with pytest.raises(ValueError, match=match):
        read_table(path, path, **{"k_core": 1} | arguments)


def test_a_missing_column_of_a_data_set_is_named():
    with pytest.raises(ValueError, match="data set in memory .*item_id"):
        read_table(Dataset.from_dict({"user_id": [1]}), k_core=1)


def test_a_table_without_rows_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no interactions"):
        read_table(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("ids", [["2024-01-02", "7"], ["12345678901234567890123", "7"]], ids=["date", "big integer"])
def test_json_ids_stay_exact(tmp_path, ids):
    rows = [(1, f'"{ids[0]}"' if "-" in ids[0] else ids[0], 1), (1, ids[1], 2)]  # the column mixes types
    lines = [f'{{"user_id": {user}, "item_id": {item}, "timestamp": {moment}}}' for user, item, moment in rows]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert set(read_table(tmp_path / "log.jsonl", k_core=1).item_ids) == set(ids)


def test_rows_of_a_later_batch_are_counted_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_SIZE", 2)
    path = log_file(tmp_path, ".jsonl", [*ROWS, ("a", "x", "later")])
    with pytest.raises(ValueError, match="row 8, timestamp .*later"):
        read_table(path, k_core=1)


def test_amazon_2018(tmp_path):
    reviews, meta = tmp_path / "Toys_5.json.gz", tmp_path / "meta_Toys.json.gz"
    lines = [
        {"reviewerID": "A", "asin": "B2", "unixReviewTime": 20, "reviewText": "x", "overall": 5.0},
        {"reviewerID": "A", "asin": "B1", "unixReviewTime": 10, "reviewText": "y"},
        {"reviewerID": "A", "asin": "B2", "unixReviewTime": 5, "reviewText": "z"},
    ]
    texts = [
        {"asin": "B1", "title": "Red &amp; <b>blue</b>", "brand": "Br", "category": ["Toys", "Cars, Planes"],
         "description": ["One.", "<br>Two."]},
        {"asin": "B2", "title": "", "category": []},
    ]  # fmt: skip
    reviews.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    meta.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in texts).encode()))
    with pytest.warns(UserWarning, match="1 of 2 items have no text"):
        data = read_amazon2018(reviews, meta, k_core=1)
    assert data.item_ids == ["B1", "B2"] and data.histories == [[1, 0]] and data.timestamps == [[5, 10]]
    assert data.items[0] == {
        "title": "Red & blue", "description": "One. Two.", "brand": "Br", "categories": "Toys > Cars, Planes"
    }  # fmt: skip


def test_amazon_2023(tmp_path):
    reviews = tmp_path / "Toys.csv"
    reviews.write_text("user_id,parent_asin,rating,timestamp\nU,P1,5.0,1452647382000\nU,P0,4.0,1452647381999\n")
    meta = Dataset.from_dict(
        {"parent_asin": ["P1", "P0"], "title": ["One", None], "store": ["S", "S"], "categories": [["A", "B"], []],
         "description": [[], ["d", "e"]], "price": ["1", None]}
    )  # fmt: skip
    data = read_amazon2023(reviews, meta, k_core=1)
    assert data.item_ids == ["P0", "P1"] and data.histories == [[0, 1]]
    assert data.items == [
        {"description": "d e", "brand": "S"}, {"title": "One", "description": "S", "brand": "S", "categories": "A > B"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [{}, {"interactions": "a.csv", "category": "Toys"}, {"items": "a.csv", "category": "Toys"}]
)
def test_amazon_2023_needs_files_or_a_category(arguments):
    with pytest.raises(ValueError, match="category"):
        read_amazon2023(**arguments)


@pytest.mark.parametrize(
    ("timestamps", "message"),
    [([[1.0]], "timestamps"), ([[1.0], [1.0]], "'v' .*timestamps"), ([[1.0], [2.0, 1.0]], "'v' .*decreasing")],
)
def test_timestamps_are_checked(timestamps, message):
    with pytest.raises(ValueError, match=message):
        Interactions(["a", "b"], [{}, {}], ["u", "v"], [[0], [1, 0]], timestamps=timestamps)


def test_whole_numbers_are_the_same_ids_in_every_table(tmp_path):
    """Floats, as a table with a gap has them, integers and text; and days as time."""
    days = [date(2024, 1, day) for day in (3, 1, 2)]
    log = {"user_id": [1.0, 1.0, 2.0], "item_id": [10.0, 9.0, 10.0], "timestamp": days}
    parquet.write_table(pa.table(log), tmp_path / "log.parquet")
    parquet.write_table(pa.table({"item_id": [9, 10], "title": ["nine", "ten"]}), tmp_path / "items.parquet")
    data = read_table(tmp_path / "log.parquet", tmp_path / "items.parquet", k_core=1)
    assert data.item_ids == ["9", "10"] and data.items == [{"title": "nine"}, {"title": "ten"}]
    assert data.user_ids == ["1", "2"] and data.histories == [[0, 1], [1]]
    assert data.timestamps[0][0] == datetime(2024, 1, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("form", ["numpy", "torch", "arrow"])
def test_the_format_of_a_data_set_makes_no_difference(form):
    rows = {"user_id": [1, 1], "item_id": [Decimal("7"), Decimal("12345678901234567890")], "timestamp": [1, 2]}
    data = Dataset.from_dict(rows).with_format(form)
    assert read_table(data, k_core=1).item_ids == ["7", "12345678901234567890"]


def test_a_float_that_may_be_another_number_is_no_id():
    with pytest.raises(ValueError, match="row 1 .*user_id 9007199254740992.0"):
        read_table(Dataset.from_dict({"user_id": [2.0**53], "item_id": [1], "timestamp": [1]}), k_core=1)


def test_columns_that_may_be_there_are_there_once(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\na,x,1\n")
    (tmp_path / "items.csv").write_text("item_id,title,title\nx,one,two\n")
    with pytest.raises(ValueError, match="items.csv .*title"):
        read_table(tmp_path / "log.csv", tmp_path / "items.csv", k_core=1)


def test_numbers_of_any_length_are_ordered():
    names = ["10", "9", "x", "1" * 5000, "09", "0"]
    assert sorted(names, key=natural_order) == ["0", "09", "9", "10", "1" * 5000, "x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "JSON"),
        ('{"a": [%s]}' % ("9" * 5000), "JSON"),
        ('{"a": ["\\ud800"]}', "user 'a' .*ud800"),
        ('{"\\udfff": [1]}', "udfff"),
        ('{"a": [1], "a": [2]}', "'a'"),
    ],
)
def test_lcrec_files_that_no_data_are_made_of(tmp_path, text, message):
    (tmp_path / "Shop.inter.json").write_text(text)
    with pytest.raises(ValueError, match=rf"Shop\.inter\.json: .*{message}"):
        read_lcrec(tmp_path)


def test_lcrec_text_of_items_without_a_name(tmp_path):
    write(tmp_path, inter={"u": [1]}, item={" ": {"title": "x"}})
    with pytest.raises(ValueError, match=r"Shop\.item\.json: ' '"):
        read_lcrec(tmp_path)


def test_every_source_reads_interactions(tmp_path):
    path = log_file(tmp_path, ".csv")
    table = {"interactions": str(path), "k_core": 1}
    folder = tmp_path / "lcrec"
    folder.mkdir()
    write(folder, inter={"u": [1, 2]})
    sources = {"toy": {"num_users": 2, "num_items": 48}, "table": table, "lcrec": {"folder": str(folder)}}
    for source, source_args in sources.items():
        assert isinstance(read_source(source, source_args), Interactions), source
    assert read_source(str(folder)) == read_lcrec(folder)


def test_a_dotted_path_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "my_shop.py").write_text(
        "from lasar_hf.data import Interactions\n"
        "def read(item='a'):\n    return Interactions([item], [{}], ['u'], [[0]])\n"
        "def broken():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert read_source("my_shop.read", {"item": "b"}).item_ids == ["b"]
    with pytest.raises(ValueError, match=r"my_shop\.broken"):
        read_source("my_shop.broken")
    with pytest.raises(FileNotFoundError, match="my_shop.wrong"):
        read_source("my_shop.wrong")


@pytest.mark.parametrize(
    "source", ["tabel", "no_such_module.read", "not a source", "data/shop", "", "../downloads/Scientfic", "./x.csv"]
)
def test_an_unknown_source_lists_the_sources(source):
    with pytest.raises(FileNotFoundError, match=", ".join(readers.SOURCES)):
        read_source(source)


@pytest.mark.parametrize(
    ("source", "source_args", "match"),
    [
        ("toy", {"items": "x.csv"}, "items.*num_items"),
        ("toy", {"num_users": 0}, "num_users"),
        ("table", {}, "interactions"),
    ],
)
def test_wrong_source_args_are_named(source, source_args, match):
    with pytest.raises(ValueError, match=match):
        read_source(source, source_args)


def test_source_settings_follow_the_content_of_files(tmp_path):
    first = source_settings("table", {"interactions": [str(log_file(tmp_path, ".csv"))]})
    (tmp_path / "log.csv").rename(tmp_path / "moved.csv")
    assert source_settings("table", {"interactions": [str(tmp_path / "moved.csv")]}) == first
    (tmp_path / "moved.csv").write_text("user_id,item_id,timestamp\n")
    assert source_settings("table", {"interactions": [str(tmp_path / "moved.csv")]}) != first


def test_source_settings_follow_the_files_of_a_folder(tmp_path):
    first = source_settings(str(write(tmp_path, inter={"u": [1]})))
    assert source_settings(str(write(tmp_path, inter={"u": [2]}))) != first


def test_a_file_in_a_nested_folder_changes_the_settings(tmp_path, monkeypatch):
    (tmp_path / "shop" / "part").mkdir(parents=True)
    (tmp_path / "shop" / "part" / "a.csv").write_text("1")
    (tmp_path / "nested_source.py").write_text("def read(folder):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    before = source_settings("nested_source.read", {"folder": "shop"})
    (tmp_path / "shop" / "part" / "a.csv").write_text("2")
    assert source_settings("nested_source.read", {"folder": "shop"}) != before


def test_functions_of_one_name_are_different_sources(tmp_path, monkeypatch):
    for module in ("one_source", "other_source"):
        (tmp_path / f"{module}.py").write_text("def read():\n    pass\n")
    monkeypatch.chdir(tmp_path)
    assert source_settings("one_source.read") != source_settings("other_source.read")


def test_a_column_named_like_a_file_stays_a_name(tmp_path, monkeypatch):
    (tmp_path / "user").write_text("not a table")
    monkeypatch.chdir(tmp_path)
    settings = source_settings("table", {"interactions": "ratings.csv", "user_column": "user"})
    assert settings["source_args"]["user_column"] == "user"
