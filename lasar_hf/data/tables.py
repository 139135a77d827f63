"""
Tables in batches of rows: delimited text, JSON lines or arrays (each also as `.gz`, `.bz2`, `.xz` or `.zip`), Parquet,
and data sets of `datasets`. Only the columns that are needed are read.
"""

import ast
import codecs
import logging
import lzma
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from csv import reader as csv_reader
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import fsspec
import pyarrow as pa
from datasets import Dataset, IterableDataset
from pyarrow import csv, parquet

from ..terminal import printable
from .interactions import parse_json


logger = logging.getLogger(__name__)

Table: TypeAlias = str | Path | Dataset | IterableDataset

BATCH_SIZE = 65_536  # rows per batch
MAX_NAMES = 2000  # characters of column names in an error
DELIMITED, JSON = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter", ".item"), (".json", ".jsonl", ".ndjson")
UNREADABLE = (pa.ArrowInvalid, UnicodeError, LookupError, EOFError, OSError, zlib.error, lzma.LZMAError,
              zipfile.BadZipFile)  # fmt: skip


def read_batches(
    table: Table, columns: Sequence[str], optional: Sequence[str] = (), **options: Any
) -> Iterator[tuple[int, dict[str, list]]]:
    """
    Yield batches of rows: the number of the first row, counted from 1, and the values of each column. Delimited
    columns are read as text. `optional` columns that the table does not have are `None`. Options: `encoding`; of
    delimited text `delimiter`, and `layouts`, lists of columns of which a file without a header has the one that fits.
    A single one may name the first columns only.
    """
    names = list(dict.fromkeys([*columns, *optional]))
    start = 1
    for batch in _raw_batches(table, columns, names, **options):
        size = len(next(iter(batch.values())))
        if size:
            yield start, {name: batch[name] if name in batch else [None] * size for name in names}
        start += size


def table_name(table: Table) -> str:
    """Name of a table in messages: the path of a file, or the name of a data set."""
    if isinstance(table, Dataset | IterableDataset):
        return f"data set {table.info.dataset_name or 'in memory'}"
    return str(table)


def _raw_batches(
    table: Table, columns: Sequence[str], names: Sequence[str], encoding: str | None = None, **options: Any
) -> Iterator[dict[str, list]]:
    """Batches with those of the columns `names` that the table has; it must have `columns`."""
    if isinstance(table, Dataset | IterableDataset):
        # A stream may not know its columns before the first row.
        existing = table.column_names or list(next(iter(table), {}))
        present = _present(table, existing, columns, names)
        yield from table.select_columns(present).with_format(None).iter(BATCH_SIZE)
        return
    path = Path(table)
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if encoding == "utf-8":
        encoding = "utf-8-sig"  # with or without a byte-order mark
    read = _json_batches if suffix in JSON else _delimited_batches
    try:
        if suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                present = _present(path, file.schema_arrow.names, columns, names)
                yield from (batch.to_pydict() for batch in file.iter_batches(BATCH_SIZE, columns=present))
        else:
            yield from read(path, columns, names, encoding or _encoding(path), **options)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not readable as {suffix[1:]} ({printable(str(error).splitlines()[0])}).") from error


def _present(table: Table, existing: Sequence[str], columns: Sequence[str], names: Sequence[str]) -> list[str]:
    if missing := next((column for column in columns if column not in existing), None):
        shown = ", ".join(existing)
        shown = printable(shown if len(shown) < MAX_NAMES else f"{shown[:MAX_NAMES]} …")
        raise ValueError(f"{table_name(table)} has no column {missing!r}; its columns are {shown}.")
    if repeated := next((column for column in names if list(existing).count(column) > 1), None):
        raise ValueError(f"{table_name(table)} has several columns named {repeated!r}; rename them.")
    return [column for column in names if column in existing]


def _open(path: Path) -> BinaryIO:
    """The content of a file, decompressed."""
    if path.suffix.lower() == ".zip" and len(names := zipfile.ZipFile(path).namelist()) > 1:
        raise ValueError(f"{path} contains {', '.join(names)}; expected one file.")
    return fsspec.open(str(path), "rb", compression="infer").open()


def _encoding(path: Path) -> str:
    """Encoding of a text file: by its byte-order mark or first letter, else UTF-8 if all of it is, else Latin-1."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        block = file.read(2**20)
        if 0 in block[:2]:  # UTF-16 without a mark: one byte of the first letter is zero
            return "utf-16-be" if block[0] == 0 else "utf-16-le"
        if block.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-8-sig" if block.startswith(codecs.BOM_UTF8) else "utf-16"
        try:
            while decoder.decode(block, final=not block) or block:
                block = file.read(2**20)
        except UnicodeDecodeError:
            warnings.warn(f"{path} is not UTF-8 text; it is read as latin-1. Otherwise give encoding.", stacklevel=2)
            return "latin-1"
    return "utf-8"


def column_names(path: str | Path) -> list[str]:
    """
    Names of the columns of a file: those of Parquet, the keys of the first JSON row, or the first row of delimited
    text, which RecBole writes as `user_id:token`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    suffix = _suffix(path)
    if suffix == ".parquet":
        return parquet.read_schema(path).names
    if suffix in JSON:
        return list(next(_json_rows(path, _encoding(path)))[1])
    _, row = _first_row(path, _encoding(path), None)
    return [re.sub(r":(token|float)(_seq)?$", "", field) for field in row]


def _suffix(path: Path) -> str:
    """`.csv` of `ratings.csv.gz`; refuses unknown formats."""
    suffix = "." + re.sub(r"\.(gz|bz2|xz|zip)$", "", path.name.lower()).rpartition(".")[2]
    if suffix not in (".parquet", *DELIMITED, *JSON):
        formats = ", ".join([".parquet", *DELIMITED, *JSON])
        raise ValueError(f"{path}: unknown format; expected {formats} (or .gz, .bz2, .xz or .zip of these).")
    return suffix


def _first_row(path: Path, encoding: str, delimiter: str | None) -> tuple[str, list[str]]:
    """The delimiter and the fields of the first row of delimited text."""
    with TextIOWrapper(_open(path), encoding, newline="") as file:
        line = next((line for line in file if line.strip()), "")
        delimiter = delimiter or ("::" if "::" in line else max(",;\t|", key=line.count))
        lines = csv_reader(chain([line], file), delimiter=delimiter[0], skipinitialspace=True)
        row = line.split(delimiter) if len(delimiter) > 1 else next(lines, [])
        return delimiter, [field.strip() for field in row]


def _delimited_batches(
    path: Path, columns: Sequence[str], names: Sequence[str], encoding: str, layouts=(), delimiter: str | None = None
) -> Iterator[dict[str, list]]:
    # 1. The first row: names of columns, which RecBole writes as `user_id:token`, or data.
    delimiter, row = _first_row(path, encoding, delimiter)
    is_long = len(delimiter) > 1  # then without quotes
    fields = [field if field in names else re.sub(r":(token|float)(_seq)?$", "", field) for field in row]
    is_given = len(layouts) == 1  # otherwise supposed
    layout = next((part for part in layouts if len(part) == len(row) or is_given and len(part) < len(row)), None)
    is_data = is_given or any(field[:1].isdigit() for field in fields)
    has_header = not layout or not is_data or set(fields) & set(names)
    if not has_header:
        logger.warning("%s has no header; its columns are read as %s.", path, ", ".join(layout))
        fields = layout
    present = _present(path, fields, columns, names)

    # 2. Tab-separated text has no quotes, as RecBole's, except around whole fields. A file that writes `\"` escapes.
    is_tab = delimiter == "\t"
    with TextIOWrapper(_open(path), encoding, newline="") as file:
        escape_char = "\\" if '\\"' in file.read(2**20) else False

    # 3. All rows as text: the id 007 keeps its zeros, and a column of numbers may contain a word further down.
    numbers = [str(number) for number in range(len(row))]  # as names, since other columns may repeat
    read = csv.ReadOptions(column_names=numbers, skip_rows_after_names=1 if has_header else 0)
    dialect = {"delimiter": "\x1f" if is_long else delimiter, "escape_char": escape_char}
    if is_long or is_tab:
        dialect |= {"quote_char": False, "escape_char": False}
    parse = csv.ParseOptions(newlines_in_values=True, **dialect)
    chosen = [numbers[fields.index(name)] for name in present]
    convert = csv.ConvertOptions(include_columns=chosen, column_types=dict.fromkeys(chosen, pa.string()))
    with _open(path) as file:
        stream = pa.transcoding_input_stream(pa.PythonFile(file, mode="r"), encoding, "utf-8")
        # pyarrow knows delimiters of one byte, and opening quotes (an odd number, or those of an empty field) only
        # directly after them.
        mark = re.escape(delimiter)
        blanks = rf"""{mark} +(?="(?:"")*(?!")|""(?:{mark}|[\r\n]|\Z))"""
        replace = _replace(mark, "\x1f") if is_long else _replace(blanks, delimiter)
        stream = pa.TransformInputStream(stream, replace)
        with csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert) as reader:
            for batch in reader:
                values = [_without_quotes(part) if is_tab else part for part in batch.to_pydict().values()]
                yield dict(zip(present, values, strict=True))


def _without_quotes(values: list[str]) -> list[str]:
    """Fields that are quoted as a whole, without the quotes."""
    return [
        value[1:-1].replace('""', '"') if len(value) > 1 and value[0] == value[-1] == '"' else value
        for value in values
    ]


def _replace(pattern: str, new: str) -> Callable[[pa.Buffer], bytes]:
    """A function that replaces a pattern in successive blocks of a file, of which the last one is empty."""
    expression, rest = re.compile(pattern.encode()), b""

    def step(block: pa.Buffer) -> bytes:
        nonlocal rest
        text = rest + block.to_pybytes()
        end = text.rfind(b"\n") + 1 if block.size else len(text)  # whole lines
        rest = text[end:]
        return expression.sub(new.encode(), text[:end])

    return step


def _json_batches(
    path: Path, columns: Sequence[str], names: Sequence[str], encoding: str, **_: object
) -> Iterator[dict[str, list]]:
    # Not pyarrow's JSON reader: it rounds integers above 2**64, turns ids such as "2024-01-02" into dates, refuses
    # columns of mixed types and does not name the line of an error.
    batch: dict[str, list] = {name: [] for name in names}
    for number, (where, row) in enumerate(_json_rows(path, encoding), start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {where} is {type(row).__name__}; expected an object.")
        if missing := next((name for name in columns if name not in row), None):
            raise ValueError(f"{path}: {where} has no {missing!r}.")
        for name in names:
            batch[name].append(row.get(name))
        if number % BATCH_SIZE == 0:
            yield batch
            batch = {name: [] for name in names}
    yield batch


def _python_object(text: str) -> Any:
    """The value of a Python literal. Raises `ValueError` if the text is not a literal or repeats a key."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        names = [key.value for key in getattr(node, "keys", ()) if isinstance(key, ast.Constant)]
        if len(set(names)) < len(names):
            raise ValueError("a key appears twice")
    return ast.literal_eval(tree)


def _json_rows(path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    """Rows of one array, or of lines that are not blank: JSON, or Python's `{'a': 1}` as in Amazon 2014."""
    with TextIOWrapper(_open(path), encoding) as file:
        is_first = True
        for number, line in enumerate(file, start=1):
            if is_first and line.lstrip().startswith("["):
                rows = parse_json(line + file.read(), path)
                yield from ((f"row {position}", row) for position, row in enumerate(rows, start=1))  # type: ignore[arg-type, var-annotated]
            elif line.strip():
                is_first = False
                try:
                    row = parse_json(line, path, number)
                except ValueError as error:
                    try:
                        row = _python_object(line.strip())
                    except (ValueError, SyntaxError, MemoryError, RecursionError):
                        raise error from None
                yield f"line {number}", row
