"""Texts, ids and files of others: no forged token, no path outside, no crash without a file, no terminal command."""

import gzip
import io
import json
import random
import sys
import warnings
from pathlib import Path

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from pyarrow import parquet
from rich.console import Console

import lasar_cli
from lasar_hf import LasarForGenerativeRec, LasarProcessor, Recommender, SidCatalog
from lasar_hf.commands.recommend import read_histories
from lasar_hf.data import (
    Interactions,
    build_tokenizer,
    leave_one_out,
    read_index,
    read_items,
    read_lcrec,
    read_table,
)
from lasar_hf.data.examples import alignment_examples
from lasar_hf.data.interactions import clean_text, id_text
from lasar_hf.reasoning import TemplateTeacher
from lasar_hf.reasoning.leakage import SPECIAL_TOKENS
from lasar_hf.reasoning.openai_teacher import prompt_fields
from lasar_hf.serving import create_app
from lasar_hf.terminal import printable
from tests import preparing
from tests.recipes import ROOT
from tests.tiny import tiny_backbone, tiny_catalog, tiny_model


SPECIAL = ["<a_1>", "<b_0><c_3>", "<|latent_start|>", "<|latent|>", "<|latent_end|>", "<|endoftext|>", "<|pad|>"]
PIECES = [
    *SPECIAL, "</s>", "<unk>", "<s>", "<|im_start|>user", "[INST]", "<a_<a_1>1>", "<|lat<|latent|>ent|>", "＜a_1＞",
    "&lt;a_1&gt;", "<a_1\u200b>", "<A_1>", "<a_01>", "< a_1 >", "\0", "\x1b[2J", "\x1b]0;title\x07", "\x9b31m",
    "\b\b\b", "\r\n", "\n\n", "\t", "\x0b\x0c\x1c\x85\u2028", "\u202e", "\u2066abc\u2069", "\u200f",
    "\u200b\u200c\u200d", "\ufeff", "\ud800", "\udfff\ud800", "\ufffe", "\ue000", "e\u0301" * 200, "🦆👩‍👩‍👧", "ﷺ",
    "日本語の本", "ไทย", "𝔸𝕓", "İıß", "a" * 100_000, " " * 5000, "", "<b>bold</b>", "<script>alert(1)</script>",
    "<!-- ",
    "&amp;&#0;&#x202e;", "[bold]x[/]", "[/]", "[link=x]", "$\\frac$", "../../etc/passwd", "/etc/passwd", "..\\..\\x",
    "~root", "file:///etc/passwd", "C:\\x", "con", ".", "..", "-", "--help", "-rf *", "$(touch x)", "`id`", "; ls",
    "| cat", "%s%n%99999d", "{0.__class__}", "{{x}}", "' OR 1=1 --", '"', '""', "'", ",", ";", "::", "\\", "\\u0000",
    "=1+1", "@SUM(1)", "#", "NaN", "inf", "null", "true", "1e400", "9" * 5000, "-0", "007", "7.0", "0x10", "user_id",
    "item_id",
]  # fmt: skip
WORDS = ["red", "blue", "Cup", "Volume One", "of", "the"]


def hostile_texts(count: int, seed: int = 0) -> list[str]:
    """Each piece alone, then pieces among words."""
    draw = random.Random(seed)
    short = [piece for piece in PIECES if len(piece) < 1000]
    texts = list(PIECES)
    while len(texts) < count:
        parts = draw.choices(short, k=draw.randint(1, 3)) + draw.choices(WORDS, k=draw.randint(0, 3))
        draw.shuffle(parts)
        texts.append(draw.choice(["", " "]).join(parts))
    return texts


TEXTS = hostile_texts(500)
IDS = list(dict.fromkeys(filter(None, map(id_text, TEXTS))))


@pytest.fixture(scope="module")
def shop() -> Interactions:
    """Each text as a title, brand and description, cleaned as the readers do."""
    clean = [{"title": text, "description": text[::-1], "brand": text[:50]} for text in map(clean_text, TEXTS)]
    items = [{name: text for name, text in item.items() if text} for item in clean]
    histories = [list(range(start, start + 5)) for start in range(0, len(items) - 5, 3)]
    return Interactions(
        [f"i{i}" for i in range(len(items))], items, [f"u{i}" for i in range(len(histories))], histories
    )


def codes_of(count: int):
    """Distinct codes of three levels of eight."""
    return [[number // 64 % 8, number // 8 % 8, number % 8] for number in range(count)]


@pytest.fixture(scope="module")
def processor(shop) -> LasarProcessor:
    """With a tokenizer that can write every text."""
    tokenizer = build_tokenizer([item.get("title", "") for item in shop.items], 400)
    backbone = tiny_backbone()
    backbone.resize_token_embeddings(len(tokenizer))
    LasarForGenerativeRec.from_backbone(backbone, tokenizer, num_sid_levels=3, codebook_size=8)
    return LasarProcessor(tokenizer, SidCatalog(codes_of(len(shop.items)), shop.item_ids))


def special_ids(processor: LasarProcessor) -> set[int]:
    return set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.get_added_vocab().values())


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def test_no_text_becomes_a_token(processor):
    special = special_ids(processor)
    assert len(special) >= 24 + 3 + 2
    for text, ids in zip(TEXTS, processor.text_ids([clean_text(text) for text in TEXTS]), strict=True):
        assert not special & set(ids), text[:80]


def test_no_title_adds_a_token_to_an_example(shop, processor):
    special, levels = special_ids(processor), processor.catalog.num_levels
    examples = alignment_examples(shop, leave_one_out(shop), processor)
    assert len(examples) > 3 * 400
    end = processor.tokenizer.eos_token_id
    for ids in examples["input_ids"]:
        found = [token for token in ids if token in special]
        # The Semantic ID and either the empty latent region, or the end of the text after it.
        region = [processor.latent_start_token_id, processor.latent_end_token_id]
        assert found[:2] == region and len(found) == 2 + levels or found[-1] == end and len(found) == levels + 1


def test_no_title_stands_as_a_token_in_a_chain_or_a_request(shop):
    teacher = TemplateTeacher(shop, leave_one_out(shop))
    for target in range(5, len(shop.items)):
        chain = teacher.chain_of_thought([target - 5, target - 2, target - 1], target)
        assert not SPECIAL_TOKENS.search(chain), chain[:200]
        assert chain.encode()
        assert all(letter.isprintable() or letter in "\u200c\u200d" for letter in chain), ascii(chain[:200])
        request = json.dumps(prompt_fields(shop.items[target]), ensure_ascii=False)
        assert not SPECIAL_TOKENS.search(request), request[:200]


def test_an_instruction_has_no_token(processor):
    tokenizer, catalog = processor.tokenizer, tiny_catalog(codebook_size=4)
    refused = 0
    for text in TEXTS[::3]:
        try:
            made = LasarProcessor(tokenizer, catalog, clean_text(text))
        except ValueError as error:
            assert "instruction" in str(error) or "tokenizer" in str(error)
            refused += 1
        else:
            assert not special_ids(processor) & set(made.prefix_ids), text[:80]
    assert refused >= len(SPECIAL) // 3


def test_a_terminal_gets_no_commands():
    for text in TEXTS:
        shown = printable(text)
        assert all(letter.isprintable() or letter in "\u200c\u200d" for letter in shown), ascii(shown[:80])
        shown.encode()
    assert printable("Größe „M“, 日本語, 👩‍👧") == "Größe „M“, 日本語, 👩‍👧"


def test_the_command_shows_titles_as_they_are(monkeypatch):
    out, err = (Console(file=io.StringIO(), width=100_000, force_terminal=True, no_color=True) for _ in range(2))
    monkeypatch.setattr(lasar_cli, "console", out)
    monkeypatch.setattr(lasar_cli, "errors", err)
    texts = [text for text in TEXTS if len(text) < 1000]
    lasar_cli.show_table("titles", ["title"], [[text] for text in texts])
    for text in texts:
        lasar_cli.show_error(f"Error: {text}", "red")
    for stream in (out.file, err.file):
        for line in stream.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").split("\n"):
            assert all(letter.isprintable() or letter in "\u200c\u200d" for letter in line), ascii(line[:200])
    assert "[bold]x[/]" in out.file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def recommender_of(ids: list[str], titles: list[str]) -> Recommender:
    model, tokenizer = tiny_model(codebook_size=8)
    catalog = SidCatalog(codes_of(len(ids)), ids, titles=titles)
    return Recommender(model, LasarProcessor(tokenizer, catalog))


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    ids = [text for text in IDS if len(text) < 1000][:400]
    return recommender_of(ids, [clean_text(text) for text in reversed(ids)])


def test_ids_come_back_as_they_are(recommender, tmp_path):
    recommender.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = Recommender.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.catalog.item_ids == recommender.catalog.item_ids
    assert loaded.catalog.titles == recommender.catalog.titles
    histories = [[item] for item in loaded.catalog.item_ids[:20]]
    assert loaded.recommend(histories, top_k=3) == recommender.recommend(histories, top_k=3)


def test_any_text_is_an_item_or_an_error(recommender):
    known = 0
    for text in TEXTS:
        try:
            index = recommender.item_index(text)
        except ValueError as error:
            assert "Semantic ID" in str(error) or "have the title" in str(error)
        else:
            known += index is not None
            assert index is None or 0 <= index < len(recommender.catalog)
    assert known > 300


def test_recommendations_are_printed_without_commands(recommender, tmp_path, monkeypatch, capsys):
    ids = [text for text in IDS if len(text) < 1000 and not text.isprintable()][:18]
    small = recommender_of([*ids, "one", "two"], [*(text[::-1] or None for text in ids), "One", "\x1b[2JTwo\u202e"])
    small.save_pretrained(tmp_path)
    code = (ROOT / "examples" / "recommend.py").read_text()
    monkeypatch.setattr(sys, "argv", ["recommend.py", str(tmp_path), "one", "two", "--top_k", "20"])
    exec(compile(code, "recommend.py", "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 21
    assert all(letter.isprintable() or letter in "\n\u200c\u200d" for letter in shown)
    assert "\\x1b" in shown


def test_an_explanation_can_be_drawn_with_any_title():
    titles = ["$\\frac$", "$x", "a$\\alpha_$b", "[/]", "<b>", "\\", "_^{", "日本", "\x1b[2J", "\0", "\n", "%s", "{0}"]
    some = recommender_of([f"i{number}" for number in range(len(titles))], titles)
    for start in range(0, len(titles) - 3, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing glyphs
            some.explain([f"i{start + k}" for k in range(3)], top_k=5).figure().savefig(image := io.BytesIO())
        assert image.getvalue().startswith(b"\x89PNG")


def test_preparing_writes_into_its_folder_only(tmp_path):
    ids = [text for text in IDS if len(text) < 500][:60]
    rows = [{"user_id": f"{ids[user]}", "item_id": ids[(user + step) % 60], "timestamp": step + 1}
            for user in range(60) for step in range(6)]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = "".join(
        json.dumps({"item_id": item, "title": text}) + "\n" for item, text in zip(ids, TEXTS, strict=False)
    )
    (tmp_path / "items.jsonl").write_text(items)
    before = {path.name for path in tmp_path.iterdir()}
    source_args = {"interactions": str(tmp_path / "log.jsonl"), "items": str(tmp_path / "items.jsonl"), "k_core": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preparing.run(tmp_path / "out", "table", source_args)
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert set(SidCatalog.from_pretrained(tmp_path / "out" / "catalog").item_ids) == set(ids)
    assert not any("passwd" in str(path.relative_to(tmp_path)) for path in written)


# ---------------------------------------------------------------------------------------------------------------------
# Files

ROWS = [("u1", "a", "5"), ("u1", "b", "6"), ("u2", "b", "7"), ("u2", "c", "8")]
NAMES = ("user_id", "item_id", "timestamp")


def json_lines(rows=ROWS) -> bytes:
    return b"".join(json.dumps(dict(zip(NAMES, row, strict=True))).encode() + b"\n" for row in rows)


def parquet_bytes() -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table(dict(zip(NAMES, zip(*ROWS, strict=True), strict=True))), stream)
    return stream.getvalue()


CSV = "".join(",".join(row) + "\n" for row in [NAMES, *ROWS]).encode()
GOOD = {
    ".csv": CSV, ".tsv": CSV.replace(b",", b"\t"), ".dat": CSV.replace(b",", b"::"), ".jsonl": json_lines(),
    ".json": b"[" + json_lines().strip().replace(b"\n", b",") + b"]", ".csv.gz": gzip.compress(CSV, mtime=0),
    ".jsonl.gz": gzip.compress(json_lines(), mtime=0), ".parquet": parquet_bytes(),
    ".inter": CSV.replace(b",", b"\t").replace(b"_id", b"_id:token"),
}  # fmt: skip
INSERTED = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b'"', b"'", b"\\", b"\r", b"\n", b"\x1b[2J", b"[" * 5000,
    b"{" * 5000, b'{"a":' * 3000, b"NaN", b"1e400", b"-1e400", b"Infinity", b"9" * 6000, b"9" * 30, b"\xed\xa0\x80",
    b"\\ud800", b'"user_id":"x",', b",,,,", b"\t\t", b"::", b"--help", b"../../etc/passwd", b"x" * 70_000, b"null",
    b"[]", b"{}", "‮日本".encode(), b"\x1f", b"=cmd()", b"<a_1>", b"1970-01-01", b"\x80\x81", b"\x1a", b"#", b";",
]  # fmt: skip


def hostile_files(count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """Suffix and content: good files with something inserted, cut, changed or taken out, and files of other kinds."""
    draw = random.Random(seed)
    files = [(suffix, content) for suffix in GOOD for content in (b"", b"\n", b"\0", b"\xef\xbb\xbf", b"PK\x03\x04")]
    files += [
        (suffix, GOOD[other]) for suffix in GOOD for other in (".parquet", ".csv.gz", ".json") if other != suffix
    ]
    while len(files) < count:
        suffix = draw.choice(list(GOOD))
        content = bytearray(GOOD[suffix])
        place = draw.randrange(len(content))
        match draw.randrange(4):
            case 0 | 1:
                content[place:place] = draw.choice(INSERTED)
            case 2:
                del content[place : place + draw.choice([1, 5, len(content)])]
            case 3:
                content[place] = draw.randrange(256)
        files.append((suffix, bytes(content)))
    return files


def read(path: Path):
    """Read as interactions, then as items and as histories to recommend for."""
    yield lambda: read_table(path, k_core=1)
    yield lambda: read_items(path, text_columns={"title": "timestamp"})
    yield lambda: read_histories(path, tiny_catalog())


def test_a_file_is_read_or_named(tmp_path):
    wrong = 0
    for number, (suffix, content) in enumerate(hostile_files(300)):
        path = tmp_path / f"file-{number}{suffix}"
        path.write_bytes(content)
        for attempt in read(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    attempt()
                except ValueError as error:
                    wrong += 1
                    assert path.name in str(error), (suffix, content[:200], error)
                    assert len(str(error)) < 20_000
                    assert printable(str(error)) == str(error).replace("\n", " "), ascii(str(error)[:300])
    assert wrong > 300


def test_files_of_other_forms_are_read_or_named(tmp_path):
    good = {"shop.inter.json": b'{"u": ["a", "b"], "v": ["b"]}', "shop.item.json": b'{"a": {"title": "Cup"}, "b": {}}',
            "shop.index.json": b'{"a": ["<a_1>", "<b_2>"], "b": ["<a_1>", "<b_3>"]}'}  # fmt: skip
    draw, wrong = random.Random(0), 0
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        changed = draw.choice(list(good))
        for name, content in good.items():
            content = bytearray(content)
            if name == changed:
                place = draw.randrange(len(content))
                content[place : place + draw.randrange(3)] = draw.choice(INSERTED)
            (folder / name).write_bytes(content)
        for attempt in (
            lambda at=folder: read_lcrec(at),
            lambda at=folder: read_index(at / "shop.index.json", ["a", "b"], 2, 8),
        ):
            try:
                attempt()
            except ValueError as error:
                wrong += 1
                assert changed in str(error), error
                assert printable(str(error)) == str(error).replace("\n", " "), ascii(str(error)[:300])
    assert wrong > 80


# ---------------------------------------------------------------------------------------------------------------------
# The server

BODIES = [
    b"", b"[]", b"null", b"{", b"\0", b"\xff", b"[" * 100_000, b'{"history":' * 3000, b'{"history": NaN}',
    b'{"history": "a"}', b'{"history": [1e400], "top_k": 2}', b'{"history": [' + b"9" * 5000 + b"]}",
    b'{"history": ["\\ud800"]}', b'{"\\ud800": 1}', b'{"history": ["one"], "top_k": 1e9}',
    b'{"history": ["one"], "top_k": ' + b"9" * 400 + b"}", b'{"history": ["one"], "top_k": NaN}',
    b'{"history": ["one"], "latent_steps": -1}', b'{"history": ["one"], "latent_steps": 99}',
    b'{"history": [[["one"]]]}', b'{"history": ["one"], "history": ["gone"]}', b'{"history": [true]}',
    b'{"history": [null]}', b'{"history": {"a": 1}}', b'{"histories": []}', b'{"histories": [[]]}',
    b'{"histories": [["one"], "two"]}', b'{"history": ["one"], "allow": ["../../etc/passwd"]}',
    b'{"history": ["one"], "deny": ["\\u0000"]}', b'{"history": ["<a_1><b_2>"]}',
    b'{"history": ["one"], "unknown_items": "--help"}', b'{"history": ["one"], "../../etc/passwd": 1}',
    b'{"history": ["one"], "\\u202e\\u001b[2J": 1}', b'{"history": ["' + b"a" * 100_000 + b'"]}',
    json.dumps({"history": ["one"] * 10_001}).encode(), json.dumps({"histories": [["one"]] * 5000}).encode(),
    '{"history": ["one"]}'.encode("utf-16"), b'\xef\xbb\xbf{"history": ["one"]}',
    b'{"history": ["one"]}{"history": ["one"]}',
]  # fmt: skip


def test_a_server_answers_every_body(tmp_path):
    small = recommender_of(["one", "two", "three"], ["One", "Two", "Three"])
    folder = str(tmp_path / "secret-place" / "model")
    small.model.config._name_or_path = folder
    token = "t0ken-of-the-admin"
    with TestClient(create_app(small, admin_token=token), raise_server_exceptions=False) as client:
        texts = [json.dumps({"history": [text]}).encode() for text in TEXTS if len(text) < 1000][::5]
        for path in ("/recommend", "/catalog/add", "/catalog/remove"):
            for body in [*BODIES, *texts] if path == "/recommend" else BODIES:
                headers = {"Content-Type": "application/json"}
                if path != "/recommend":
                    headers["Authorization"] = f"Bearer {token}"
                answer = client.post(path, content=body, headers=headers)
                assert answer.status_code in (200, 400, 422), (path, body[:80], answer.text[:200])
                assert "secret-place" not in answer.text and token not in answer.text
                assert len(answer.content) < 20_000, (path, body[:80])
        wrong = ["", "Bearer", f"bearer {token}", f"Bearer {token} x", f"Basic {token}", b"Bearer \xff"]
        for header in wrong:
            answer = client.post("/catalog/remove", json={"item_ids": ["two"]}, headers={"Authorization": header})
            assert answer.status_code == 401 and token not in answer.text
        assert client.post("/recommend", json={"history": ["one"]}).status_code == 200
        assert "secret-place" not in client.get("/metrics").text
