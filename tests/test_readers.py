"""Reading interactions and Semantic IDs: what is read, and what each fault in a file says."""

import json

import numpy as np
import pytest

from lasar_hf.data import Interactions, read_index, read_lcrec


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


def test_lcrec_without_text_file(tmp_path):
    data = read_lcrec(write(tmp_path, inter={"0": ["b", "a"]}))
    assert data.item_ids == ["a", "b"] and data.items == [{}, {}] and data.histories == [[1, 0]]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"inter": '{"0": [1, 2],\n "1": [1, }'}, r"Shop\.inter\.json: line 2: broken JSON"),
        ({"inter": '{"0": [1], "0": [2]}'}, r"Shop\.inter\.json: the key '0' appears twice"),
        ({"inter": [1, 2]}, r"Shop\.inter\.json: holds list"),
        ({"inter": {"7": []}}, r"Shop\.inter\.json: user '7' has an empty history"),
        ({"inter": {"7": 3}}, r"Shop\.inter\.json: user '7' has int"),
        ({"inter": {"7": [1, None]}}, r"Shop\.inter\.json: user '7' has the item None"),
        ({"inter": {"7": [True]}}, r"Shop\.inter\.json: user '7' has the item True"),
        ({"inter": {"7": [1]}, "item": {"1": "text"}}, r"Shop\.item\.json: item '1' is str"),
        ({"inter": {"7": [1]}, "item": '{"1": '}, r"Shop\.item\.json: line 1: broken JSON"),
    ],
)
def test_lcrec_names_what_is_wrong(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        read_lcrec(write(tmp_path, **parts))


def test_lcrec_needs_exactly_one_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no `<Name>.inter.json`"):
        read_lcrec(tmp_path)
    write(tmp_path, inter={"0": [1]})
    (tmp_path / "Other.inter.json").write_text("{}")
    with pytest.raises(ValueError, match="several data sets"):
        read_lcrec(tmp_path)


def test_lcrec_refuses_bytes_that_are_no_text(tmp_path):
    (tmp_path / "Shop.inter.json").write_bytes(b'{"0": ["\xff"]}')
    with pytest.raises(ValueError, match=r"Shop\.inter\.json: not UTF-8 text"):
        read_lcrec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": ["a", "a"]}, "item 'a' appears twice"),
        ({"user_ids": ["u", "u"]}, "user 'u' appears twice"),
        ({"histories": [[0], []]}, "user 'v' has an empty history"),
        ({"histories": [[0], [0, 2]]}, "user 'v' has item row 2"),
        ({"histories": [[-1], [0]]}, "user 'u' has item row -1"),
        ({"histories": [[0]]}, "`histories` has 1 entries for 2"),
        ({"items": [{}]}, "`items` has 1 entries for 2"),
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
        (["<a_1>"], r"item 'x' has 1 SID levels, expected 2"),
        (["<a_1>", "<b_1>", "<c_1>"], r"item 'x' has 3 SID levels, expected 2"),
        ("<a_1><b_1>", r"item 'x' has no list of SID levels"),
        (["<a_1>", "<b_8>"], r"item 'x' has '<b_8>' at level 1, expected one of <b_0> to <b_7>"),
        (["<b_1>", "<a_1>"], r"item 'x' has '<b_1>' at level 0"),
        (["<a_1>", "<b_01>"], r"item 'x' has '<b_01>'"),
        (["<a_1>", 3], r"item 'x' has 3 at level 1"),
        (["<a_0>", "<b_0>"], r"items 'y' and 'x' share the SID <a_0><b_0>"),
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
    with pytest.raises(ValueError, match=r"Shop\.index\.json: item 'x' has no SID"):
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
        with pytest.raises(ValueError, match="share the SID"):
            read_index(index, data.item_ids)
        codes = read_index(index, data.item_ids, allow_collisions=True)
        assert len(np.unique(codes, axis=0)) == 9897
    else:
        assert len(np.unique(read_index(index, data.item_ids), axis=0)) == items
