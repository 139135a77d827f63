"""The file shapes in which people have interactions: each is read into the same histories."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from pyarrow import parquet

from lasar_hf import data
from lasar_hf.data import read_amazon2018, read_amazon2023, read_items, read_table
from lasar_hf.data.tables import read_batches


# Two users, three items, in the order of time; user 2's second interaction stands before their first.
EVENTS = [("1", "10", 978_301_000), ("1", "05", 978_387_400), ("2", "7", 978_473_800), ("2", "10", 978_300_000)]
HISTORIES = {"1": ["10", "05"], "2": ["10", "7"]}
NAMES = ["user_id", "item_id", "timestamp"]


def delimited(delimiter: str, header: list[str] | None = NAMES, rating: bool = False, end: str = "\n") -> str:
    """The events as delimited text."""
    rows = [header] if header else []
    for user, item, time in EVENTS:
        rows.append([user, item, "4.0", str(time)] if rating else [user, item, str(time)])
    return "".join(delimiter.join(row) + end for row in rows)


def with_times(function) -> str:
    """The events as CSV, each time written by a function of the seconds since 1970."""
    rows = (f'{user},{item},"{function(time)}"\n' for user, item, time in EVENTS)
    return "user_id,item_id,timestamp\n" + "".join(rows)


def utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def json_lines(names=NAMES, end: str = "\n", dump=json.dumps) -> str:
    return "".join(dump(dict(zip(names, event, strict=True))) + end for event in EVENTS)


MOVIELENS = {"user_column": "userId", "item_column": "movieId"}
RECBOLE = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
YELP = {"item_column": "business_id", "time_column": "date"}

# name of the file: (content, arguments of read_table)
TEXT_FILES = {
    "comma.csv": (delimited(","), {}),
    "UPPER.CSV": (delimited(","), {}),
    "semicolon.csv": (delimited(";"), {}),
    "pipe.csv": (delimited("|"), {}),
    "tab.tsv": (delimited("\t"), {}),
    "tab.txt": (delimited("\t"), {}),
    "tab_in.csv": (delimited("\t"), {}),
    "windows_lines.csv": (delimited(",", end="\r\n"), {}),
    "blank_end.csv": (delimited(",") + "\n\n", {}),
    "no_last_newline.csv": (delimited(",").rstrip("\n"), {}),
    "spaces.csv": (delimited(" , "), {}),
    "quoted.csv": ('"user_id","item_id","timestamp"\n' + "".join(f'"{u}","{i}","{t}"\n' for u, i, t in EVENTS), {}),
    "other_columns.csv": (delimited(",", ["user_id", "item_id", "rating", "timestamp"], rating=True), {}),
    "capital_names.csv": (
        delimited(",", ["User", "Item", "Time"]),
        dict(zip(["user_column", "item_column", "time_column"], ["User", "Item", "Time"], strict=True)),
    ),
    "ml25m_ratings.csv": (delimited(",", ["userId", "movieId", "rating", "timestamp"], rating=True), MOVIELENS),
    "u.data": (delimited("\t", None, rating=True), {}),
    "ratings.dat": (delimited("::", None, rating=True), {}),
    "no_header.csv": (delimited(",", None), {}),
    "no_header_rating.csv": (delimited(",", None, rating=True), {}),
    "shop.inter": (delimited("\t", RECBOLE, rating=True), {}),
    "lines.jsonl": (json_lines(), {}),
    "lines.ndjson": (json_lines(), {}),
    "lines.json": (json_lines(), {}),
    "LINES.JSONL": (json_lines(), {}),
    "blank_lines.json": (json_lines(end="\n\n"), {}),
    "array.json": (json.dumps([dict(zip(NAMES, event, strict=True)) for event in EVENTS]), {}),
    "array_indented.json": (json.dumps([dict(zip(NAMES, event, strict=True)) for event in EVENTS], indent=2), {}),
    "python_literals.json": (json_lines(dump=repr), {}),
    "yelp.json": (
        "".join(
            json.dumps({"user_id": u, "business_id": i, "date": f"{utc(t):%Y-%m-%d %H:%M:%S}"}) + "\n"
            for u, i, t in EVENTS
        ),
        YELP,
    ),
    "milliseconds.csv": (with_times(lambda t: t * 1000), {}),
    "microseconds.csv": (with_times(lambda t: t * 10**6), {}),
    "nanoseconds.csv": (with_times(lambda t: t * 10**9), {}),
    "iso_zone.csv": (with_times(lambda t: utc(t).isoformat()), {}),
    "iso_z.csv": (with_times(lambda t: f"{utc(t):%Y-%m-%dT%H:%M:%SZ}"), {}),
    "iso_space.csv": (with_times(lambda t: f"{utc(t):%Y-%m-%d %H:%M:%S}"), {}),
    "iso_date.csv": (with_times(lambda t: f"{utc(t):%Y-%m-%d}"), {}),
    "date_number.csv": (with_times(lambda t: f"{utc(t):%Y%m%d}"), {}),
    "month_name.csv": (with_times(lambda t: f"{utc(t):%b %d, %Y}"), {}),
    "amazon_date.csv": (with_times(lambda t: f"{utc(t):%m %d, %Y}"), {}),
    "slashes.csv": (with_times(lambda t: f"{utc(t):%Y/%m/%d %H:%M}"), {}),
    "exponent.csv": (with_times(lambda t: f"{t:.8e}"), {}),
    "goodreads_date.csv": (with_times(lambda t: f"{utc(t):%a %b %d %H:%M:%S -0700 %Y}"), {}),
    "ctime.csv": (with_times(lambda t: f"{utc(t):%a %b %d %H:%M:%S %Y}"), {}),
    "mail_date.csv": (with_times(lambda t: f"{utc(t):%a, %d %b %Y %H:%M:%S +0000}"), {}),
    "twelve_hours.csv": (with_times(lambda t: f"{utc(t):%m/%d/%Y %I:%M:%S %p}"), {}),
    "log_date.csv": (
        with_times(lambda t: f"{utc(t):%d/%b/%Y:%H:%M:%S +0000}"),
        {"time_format": "%d/%b/%Y:%H:%M:%S %z"},
    ),
    "day_first.csv": (with_times(lambda t: f"{utc(t):%d%m%Y}"), {"time_format": "%d%m%Y"}),
    "blank_before_quote.csv": (
        'user_id, "item_id", "a, note", timestamp\n'
        + "".join(f'{u}, "{i}", "b, ""c"", d", {t}\n' for u, i, t in EVENTS),
        {},
    ),
    "first_columns.data": (delimited("\t", None, rating=True), {"columns": ["user_id", "item_id", "_", "timestamp"]}),
    "retailrocket.csv": (
        "timestamp,visitorid,event,itemid,transactionid\n" + "".join(f"{t}000,{u},view,{i},\n" for u, i, t in EVENTS),
        {"user_column": "visitorid", "item_column": "itemid"},
    ),
    "lastfm.tsv": (
        "".join(f"{u}\t{utc(t):%Y-%m-%dT%H:%M:%SZ}\t{i}\tArtist\t\tTrack\n" for u, i, t in EVENTS),
        {"columns": ["user_id", "timestamp", "item_id"]},
    ),
}


def zipped(content: bytes) -> bytes:
    """A zip archive with one file."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("ratings.csv", content)
    return archive.getvalue()


def parquet_file(**columns) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


USERS, ITEMS, SECONDS = (list(column) for column in zip(*EVENTS, strict=True))
COMMA, LINES = TEXT_FILES["comma.csv"][0].encode(), TEXT_FILES["lines.jsonl"][0].encode()
BYTE_FILES = {
    "utf8_bom.csv": COMMA.decode().encode("utf-8-sig"),
    "utf16.csv": COMMA.decode().encode("utf-16"),
    "utf16_be.csv": b"\xfe\xff" + COMMA.decode().encode("utf-16-be"),
    "utf16_no_mark.csv": COMMA.decode().encode("utf-16-le"),
    "utf16_be_no_mark.csv": COMMA.decode().encode("utf-16-be"),
    "utf16_no_mark.jsonl": LINES.decode().encode("utf-16-le"),
    "utf16.json": LINES.decode().encode("utf-16"),
    "utf8_bom.jsonl": LINES.decode().encode("utf-8-sig"),
    "comma.csv.gz": gzip.compress(COMMA),
    "COMMA.CSV.GZ": gzip.compress(COMMA),
    "comma.csv.bz2": bz2.compress(COMMA),
    "comma.csv.xz": lzma.compress(COMMA),
    "comma.csv.zip": zipped(COMMA),
    "lines.jsonl.gz": gzip.compress(LINES),
    "lines.json.bz2": bz2.compress(LINES),
    "integers.parquet": parquet_file(user_id=[int(u) for u in USERS], item_id=ITEMS, timestamp=SECONDS),
    "dates.parquet": parquet_file(user_id=USERS, item_id=ITEMS, timestamp=[utc(t) for t in SECONDS]),
    "NAMED.PARQUET": parquet_file(user_id=USERS, item_id=ITEMS, timestamp=SECONDS),
}
SHAPES = {name: (text.encode(), arguments) for name, (text, arguments) in TEXT_FILES.items()} | {
    name: (content, {}) for name, content in BYTE_FILES.items()
}


def histories(interactions) -> dict[str, list[str]]:
    """Item ids of each user, oldest first."""
    return {
        user: [interactions.item_ids[item] for item in history]
        for user, history in zip(interactions.user_ids, interactions.histories, strict=True)
    }


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_histories(tmp_path, name):
    content, arguments = SHAPES[name]
    (tmp_path / name).write_bytes(content)
    assert histories(read_table(tmp_path / name, k_core=1, **arguments)) == HISTORIES


def table(folder, text: str | bytes, name: str = "log.csv", **arguments):
    """Read a file of interactions with this content."""
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read_table(folder / name, k_core=1, **arguments)


def test_names_of_columns_without_header_are_given(tmp_path):
    text = "".join(f"{time};{item};{user}\n" for user, item, time in EVENTS)
    assert histories(table(tmp_path, text, columns=["timestamp", "item_id", "user_id"])) == HISTORIES


def test_dates_in_either_order_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="03/04/2014"):
        table(tmp_path, "user_id,item_id,timestamp\na,x,03/04/2014\n")


def test_a_later_row_decides_the_order_of_dates(tmp_path):
    read = table(tmp_path, "user_id,item_id,timestamp\na,x,03/04/2014\na,y,13/04/2014\n")
    assert read.timestamps == [[1396483200, 1397347200]]


def test_a_delimiter_may_be_given(tmp_path):
    assert histories(table(tmp_path, delimited("~"), delimiter="~")) == HISTORIES


def test_a_file_without_header_is_logged(tmp_path, caplog):
    with caplog.at_level("INFO"):
        table(tmp_path, delimited("\t", None, rating=True), "u.data")
    assert "u.data" in caplog.text


def test_names_of_other_columns_are_not_data(tmp_path):
    with pytest.raises(ValueError, match="user_id.*customer, product, day"):
        table(tmp_path, "customer,product,day\na,x,1\n")


def test_latin_1_is_read_with_a_warning(tmp_path):
    (tmp_path / "movies.dat").write_bytes("1::Café: Nº 1 (1981)::Drama|Comedy\n2::Two\n".replace("::Two", "::T::X")
                                          .encode("latin-1"))  # fmt: skip
    with pytest.warns(UserWarning, match="latin-1"):
        items = read_items(tmp_path / "movies.dat")
    assert items["1"] == {"title": "Café: Nº 1 (1981)", "categories": "Drama > Comedy"}


def test_movielens_genres_are_categories(tmp_path):
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n1,"American President, The (1995)",Comedy|Drama\n')
    assert read_items(tmp_path / "movies.csv", "movieId")["1"] == {
        "title": "American President, The (1995)", "categories": "Comedy > Drama"
    }  # fmt: skip


def test_the_first_columns_are_named(tmp_path):
    """MovieLens 100K: 24 columns, of which the first two are of use."""
    (tmp_path / "u.item").write_bytes(b"1|Toy Story (1995)|01-Jan-1995||http://x" + 19 * b"|0" + b"\n")
    assert read_items(tmp_path / "u.item", columns=["item_id", "title"]) == {"1": {"title": "Toy Story (1995)"}}


def test_more_names_than_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="log.csv"):
        table(tmp_path, "u,i,5\n", columns=["user_id", "item_id", "timestamp", "rating"])


@pytest.mark.parametrize("shift", range(6))
@pytest.mark.parametrize(("delimiter", "cell", "value"), [(",", ', "a"', "a"), ("::", "::bcde", "bcde")])
def test_a_delimiter_may_end_a_block(tmp_path, delimiter, cell, value, shift):
    """The file has several blocks, and each of its cells six letters, so that every one of them ends a block."""
    names = delimiter.join(["item_id", "title" + shift * "x", *map(str, range(98))])
    (tmp_path / "items.dat").write_text(names + "\n" + "".join(f"{row:06}{99 * cell}\n" for row in range(4000)))
    items = read_items(tmp_path / "items.dat", text_columns={"title": "title" + shift * "x", "brand": "97"})
    assert len(items) == 4000
    assert {(item["title"], item["brand"]) for item in items.values()} == {(value, value)}


@pytest.mark.parametrize("rows", [1, 3, 2_000])
def test_a_blank_before_a_quote_is_no_text(tmp_path, rows):
    titles = (f'"One, ""two"", {"x" * (row % 97)}"' for row in range(rows))
    text = "item_id, title,brand\n" + "".join(f'{row}, {title}, "B,"\n' for row, title in enumerate(titles))
    (tmp_path / "items.csv").write_text(text)
    items = read_items(tmp_path / "items.csv")
    assert len(items) == rows
    assert {item["brand"] for item in items.values()} == {"B,"}
    assert [items[str(row)]["title"] for row in range(rows)] == [
        f'One, "two", {"x" * (row % 97)}'.strip() for row in range(rows)
    ]


def test_an_empty_quoted_field_is_empty(tmp_path):
    (tmp_path / "items.csv").write_text('item_id,title,brand\n1, "", ""\n2,"a ","B"\n')
    assert read_items(tmp_path / "items.csv") == {"1": {}, "2": {"title": "a", "description": "B", "brand": "B"}}


def test_a_line_longer_than_a_block_is_read(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\n1," + 900_000 * "x" + '\n2, "a, b"')
    assert {item: len(fields["title"]) for item, fields in read_items(tmp_path / "items.csv").items()} == {
        "1": 900_000, "2": 4
    }  # fmt: skip


def test_the_last_letters_of_a_file_are_read(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title,brand\n1,One,")
    (tmp_path / "items.dat").write_text("item_id::title\n1::One:")
    assert read_items(tmp_path / "items.csv") == {"1": {"title": "One"}}
    assert read_items(tmp_path / "items.dat") == {"1": {"title": "One:"}}


def test_a_time_that_is_not_understood_names_time_format(tmp_path):
    with pytest.raises(ValueError, match="row 1, timestamp .*time_format"):
        table(tmp_path, "user_id,item_id,timestamp\na,x,30/Jul/2017:10:00:00\n")


def test_a_time_of_another_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 2, timestamp .*%d%m%Y"):
        table(tmp_path, "user_id,item_id,timestamp\na,x,31012024\na,y,99992024\n", time_format="%d%m%Y")


@pytest.mark.parametrize("batch_rows", [1, 65_536])
@pytest.mark.parametrize(
    ("row", "times"),
    [
        (2, [1_700_000_000, 0, 1_700_000_001]),
        (1, [0, 1_700_000_000, 0]),
        (3, [1_700_000_000, 1_700_000_000, -1]),
        (2, ["2024-01-31", "1970-01-01"]),
    ],
)
def test_a_missing_time_is_named(tmp_path, monkeypatch, batch_rows, row, times):
    monkeypatch.setattr(data.tables, "BATCH_SIZE", batch_rows)
    lines = [json.dumps(dict(zip(NAMES, ["u", "i", time], strict=True))) for time in times]
    with pytest.raises(ValueError, match=rf"log\.jsonl: row {row}, timestamp is {times[row - 1]!r}"):
        table(tmp_path, "\n".join(lines), "log.jsonl")


def test_small_numbers_may_start_at_zero(tmp_path):
    assert table(tmp_path, "user_id,item_id,timestamp\na,x,0\na,y,1\n").timestamps == [[0, 1]]


@pytest.mark.parametrize("time", ["2300-01-01", "9999-12-31 00:00:00"])
@pytest.mark.parametrize("first", ["", "a,x,2024-01-31\n"], ids=["first row", "second row"])
def test_dates_of_another_age_are_named(tmp_path, first, time):
    with pytest.raises(ValueError, match=f"row {1 + bool(first)}, timestamp is '{time}'.*2262"):
        table(tmp_path, f"user_id,item_id,timestamp\n{first}a,y,{time}\n")


def test_an_encoding_may_be_given(tmp_path):
    (tmp_path / "items.csv").write_bytes("item_id,title\n1,Tür\n".encode("cp850"))
    assert read_items(tmp_path / "items.csv", encoding="cp850") == {"1": {"title": "Tür"}}


def test_a_mark_does_not_hide_a_given_encoding(tmp_path):
    read = table(tmp_path, COMMA.decode().encode("utf-8-sig"), encoding="utf-8")
    assert histories(read) == HISTORIES


def test_an_archive_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "ml.csv.zip", "w") as file:
        file.writestr("a.csv", COMMA)
        file.writestr("b.csv", COMMA)
    with pytest.raises(ValueError, match="ml.csv.zip.*a.csv, b.csv"):
        read_table(tmp_path / "ml.csv.zip")


def test_a_broken_element_of_an_array_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"log\.json.* 2 .*item_id"):
        table(tmp_path, '[{"user_id": 1, "item_id": 2, "timestamp": 3}, {"user_id": 1}]', "log.json")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("978301000", "978387400000"),
        ("978387400000", "978301000"),
        ("1700000000", "20240131"),
        ("20240131", "1700000000"),
        ("2024-01-31", "1700000000"),
        ("1700000000", "2024-01-31"),
        ("Jan 31, 2024", "2024-01-31"),
    ],
)
@pytest.mark.parametrize("batch_rows", [1, 65_536])
def test_two_units_of_time_are_refused(tmp_path, monkeypatch, first, second, batch_rows):
    monkeypatch.setattr(data.tables, "BATCH_SIZE", batch_rows)
    lines = [json.dumps(dict(zip(NAMES, ["u", "i", time], strict=True))) for time in (first, first, second)]
    with pytest.raises(ValueError, match=r"log\.jsonl: row 3, timestamp .*row 1\b"):
        table(tmp_path, "\n".join(lines), "log.jsonl")


def test_nanoseconds_keep_their_order(tmp_path):
    text = "user_id,item_id,timestamp\n" + "".join(f"u,{i},{978301000000000000 + 3 - i}\n" for i in range(3))
    assert histories(table(tmp_path, text)) == {"u": ["2", "1", "0"]}


def test_nanoseconds_of_dates_keep_their_order(tmp_path):
    text = "user_id,item_id,timestamp\n" + "".join(f"u,{i},2024-01-31 10:00:00.00000000{3 - i}\n" for i in range(3))
    assert histories(table(tmp_path, text)) == {"u": ["2", "1", "0"]}


@pytest.mark.parametrize(
    "time", ["20240131", "2024-01-31", "Jan 31, 2024", "31-Jan-2024", "31.01.2024", "2024-01-31T02:00:00+02:00",
             "2024-01-31 00:00:00 UTC", "January 31, 2024", "01 31, 2024", "1/31/2024"]
)  # fmt: skip
def test_dates_are_seconds_since_1970(tmp_path, time):
    assert table(tmp_path, f'user_id,item_id,timestamp\na,x,"{time}"\n').timestamps == [[1706659200]]


TIED = "user_id,item_id,timestamp\n" + "".join(f"u,{item},5\n" for item in ("b", "c", "a", "10", "9"))


@pytest.mark.parametrize(
    ("arguments", "order"), [({}, "b c a 10 9"), ({"ties": "file"}, "b c a 10 9"), ({"ties": "item"}, "9 10 a b c")]
)
def test_ties_are_warned_of(tmp_path, arguments, order):
    with pytest.warns(UserWarning, match="4 of 4"):
        tied = table(tmp_path, TIED, **arguments)
    assert histories(tied) == {"u": order.split()}


def test_random_ties_are_the_same_each_time(tmp_path):
    with pytest.warns(UserWarning, match="4 of 4"):
        first, second = (histories(table(tmp_path, TIED, ties="random")) for _ in range(2))
    assert first == second
    assert first["u"] != "b c a 10 9".split()


def test_an_unknown_rule_for_ties_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ties"):
        table(tmp_path, TIED, ties="coin")


def test_few_ties_are_no_warning(tmp_path, recwarn):
    rows = "".join(f"u,{item},{max(item, 1)}\n" for item in range(12))
    table(tmp_path, "user_id,item_id,timestamp\n" + rows)
    assert not recwarn.list


def test_blanks_around_ids_go(tmp_path):
    text = 'user_id,item_id,timestamp\n" 01",x ,1\n01,x,2\n01 , y,3\n'
    assert histories(table(tmp_path, text)) == {"01": ["x", "y"]}


def test_ids_that_differ_in_case_are_reported(tmp_path):
    with pytest.warns(UserWarning, match="item_id.*'(ab|Ab)'"):
        table(tmp_path, "user_id,item_id,timestamp\nu,ab,1\nu,Ab,2\n")


def test_items_that_match_no_id_are_refused(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\nB-7,Seven\n")
    with pytest.raises(ValueError, match="items.csv.*'B-7'.*'7'"):
        table(tmp_path, "user_id,item_id,timestamp\nu,7,1\n", items=tmp_path / "items.csv")


REVIEWS = "".join(
    json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": time}) + "\n" for user, item, time in EVENTS
)


def amazon_items(folder, read, *items, dump=json.dumps) -> list[dict]:
    """Text of the items `10` and following, from metadata of one row per item."""
    reviews, meta = folder / "reviews.json", folder / "meta.json"
    reviews.write_text(REVIEWS)
    meta.write_text("\n".join(dump({"asin": "10"} | item) for item in items))
    interactions = read(reviews, meta, k_core=1)
    return interactions.items[interactions.item_ids.index("10")]


@pytest.mark.filterwarnings("ignore:.*have no text")
@pytest.mark.parametrize("dump", [json.dumps, repr])
@pytest.mark.parametrize("source", ["amazon2014", "amazon2018"])
def test_amazon_2014_categories_are_the_first_path(tmp_path, source, dump):
    item = {"title": "It's a cream", "categories": [["Beauty", "Skin"], ["Gifts"]]}
    read = data.readers.SOURCES[source]
    assert amazon_items(tmp_path, read, item, dump=dump) == {"title": "It's a cream", "categories": "Beauty > Skin"}


@pytest.mark.parametrize(("source", "row"), [("amazon2014", "{u},{i},5.0,{t}"), ("amazon2018", "{i},{u},5.0,{t}")])
def test_amazon_ratings_without_header(tmp_path, source, row):
    (tmp_path / "ratings.csv").write_text("".join(row.format(u=u, i=i, t=t) + "\n" for u, i, t in EVENTS))
    assert histories(data.readers.SOURCES[source](tmp_path / "ratings.csv", k_core=1)) == HISTORIES


@pytest.mark.filterwarnings("ignore:.*have no text")
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('<span id="a">Page</span><script>var a = 1 < 2; b("</b>");</script><style>.box{color:red}</style>', "Page"),
        ("Cup<script>var a = 1;", "Cup"),
        ("var aPageStart = (new Date()).getTime();", None),
        ("Tom &amp; Jerry &#39;s<br/>mug", "Tom & Jerry 's mug"),
        ("&lt;b&gt;Bold&lt;/b&gt; <!-- note --> cup", "Bold cup"),
        ("For < 5 and > 3 people", "For < 5 and > 3 people"),
    ],
)
def test_pieces_of_web_pages_are_removed(tmp_path, text, clean):
    item = amazon_items(tmp_path, read_amazon2018, {"title": text, "brand": "B"})
    assert item.get("title") == clean


@pytest.mark.filterwarnings("ignore:.*have no text")
@pytest.mark.parametrize(
    ("item", "description"),
    [
        ({"description": [], "feature": ["Light.", "Red."]}, "Light. Red."),
        ({"description": ["Own."], "feature": ["Light."]}, "Own."),
        ({"description": "", "details": {"Size": "M", "Colors": ["red", "blue"]}}, "Size: M, Colors: red blue"),
        ({"brand": "Tern", "subtitle": "Second edition"}, "Second edition"),
        ({"brand": "Tern"}, "Tern"),
    ],
)
def test_items_without_description_use_other_fields(tmp_path, item, description):
    assert amazon_items(tmp_path, read_amazon2018, {"title": "x"} | item)["description"] == description


@pytest.mark.parametrize("source", ["amazon2014", "amazon2018", "amazon2023"])
def test_fields_of_amazon_can_be_named(tmp_path, source):
    item = "parent_asin" if source == "amazon2023" else "asin"
    user, time = ("user_id", "timestamp") if source == "amazon2023" else ("reviewerID", "unixReviewTime")
    (tmp_path / "reviews.json").write_text("".join(f'{{"{user}": 1, "{item}": "{i}", "{time}": 5}}\n' for i in "ba"))
    (tmp_path / "meta.json").write_text("".join(f'{{"{item}": "{i}", "main_cat": "Tools"}}\n' for i in "ab"))
    options = {"k_core": 1, "ties": "item", "text_columns": {"categories": "main_cat"}}
    with pytest.warns(UserWarning, match="ordered by item"):
        read = data.readers.SOURCES[source](tmp_path / "reviews.json", tmp_path / "meta.json", **options)
    assert (read.histories, read.items) == ([[0, 1]], 2 * [{"categories": "Tools"}])


def test_a_text_field_has_several_columns(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,name,label\n1,,One\n2,Two,Zwei\n")
    items = read_items(tmp_path / "items.csv", text_columns={"title": ["name", "label"]})
    assert items == {"1": {"title": "One"}, "2": {"title": "Two"}}


def test_amazon_2023_files(tmp_path):
    rows = "".join(f"{user},{item},5.0,{time}000\n" for user, item, time in EVENTS)
    (tmp_path / "Toys.csv").write_text("user_id,parent_asin,rating,timestamp\n" + rows)
    assert histories(read_amazon2023(tmp_path / "Toys.csv", k_core=1)) == HISTORIES


def test_a_quote_in_tab_separated_text_is_text(tmp_path):
    path = tmp_path / "reviews.tsv"
    rows = ["user_id\titem_id\treview\ttimestamp", 'u1\ti1\t"great\t1', "u1\ti2\tok\t2"]
    rows += ['u2\ti1\t"bad\t3', "u2\ti2\tx\t4"]
    path.write_text("\n".join(rows) + "\n")
    data = read_table(path, k_core=1)
    assert data.timestamps == [[1, 2], [3, 4]]


def test_quotes_around_tab_separated_fields_go(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text('"user_id"\t"item_id"\t"timestamp"\n"u1"\t"i""1"\t"1"\n"u1"\t"i2"\t"2"\n')
    data = read_table(path, k_core=1)
    assert (data.user_ids, data.item_ids) == (["u1"], ['i"1', "i2"])


def test_backslashes_escape_quotes(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,1,1\nu,2,2\n")
    (tmp_path / "items.csv").write_text('item_id,title\n1,"He said \\"hi, you\\""\n2,plain\n')
    data = read_table(tmp_path / "log.csv", items=tmp_path / "items.csv", k_core=1)
    assert [item["title"] for item in data.items] == ['He said "hi, you"', "plain"]


def test_times_with_and_without_a_zone_are_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,1,2024-01-01T02:00:00+05:00\nu,2,2024-01-01 01:00:00\n")
    with pytest.raises(ValueError, match="row 2"):
        read_table(path, k_core=1)


def test_nanoseconds_apart_are_no_ties(tmp_path, recwarn):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,1,1500000000000000002\nu,2,1500000000000000001\n")
    read_table(path, k_core=1)
    assert not [warning for warning in recwarn if "equal times" in str(warning.message)]


def test_a_zone_in_a_later_batch_is_another_form(tmp_path, monkeypatch):
    monkeypatch.setattr(data.tables, "BATCH_SIZE", 1)
    path = tmp_path / "log.jsonl"
    times = ["2024-01-01T01:00", "2024-01-01T02:00Z"]
    rows = [{"user_id": "u", "item_id": item, "timestamp": time} for item, time in enumerate(times)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match="row 2"):
        read_table(path, k_core=1)


def test_equal_times_of_two_users_are_no_ties(tmp_path, recwarn):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,1,1500000000\nv,1,1500000000\n")
    read_table(path, k_core=1)
    assert not [warning for warning in recwarn if "equal times" in str(warning.message)]


@pytest.mark.parametrize("line", ['{"user_id": 1, "user_id": 2, "item_id": 3}', "{'user_id': 1, 'user_id': 2}"])
def test_a_key_that_appears_twice_is_refused(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"user_id": 7, "item_id": 8}\n' + line + "\n")
    with pytest.raises(ValueError, match="rows.jsonl: line 2"):
        list(read_batches(tmp_path / "rows.jsonl", ["user_id"]))
