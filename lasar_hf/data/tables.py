"""Rows of CSV, Parquet and JSON-lines files or of a `datasets` data set, a batch at a time, whatever their size."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from math import isfinite, nan
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, IterableDataset
from pyarrow import csv, parquet


Source = str | Path | Dataset | IterableDataset
Batch = dict[str, list]
BATCH_ROWS = 65_536


def read_batches(source: Source, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, Batch]]:
    """
    Read the named columns of a table, `BATCH_ROWS` rows at a time.

    Args:
        source (`str`, `Path`, `Dataset` or `IterableDataset`):
            A file that ends in `.csv`, `.parquet`, `.jsonl`, `.ndjson` or `.json` (one object a line), all but Parquet
            also with `.gz` after it; or a data set of the `datasets` library.
        columns (`Sequence[str]`):
            Columns that must be there.
        optional (`Sequence[str]`, *optional*):
            Columns that may be missing; their values are `None` then.

    Yields:
        `tuple[int, dict[str, list]]`: number of the batch's first row, counted from 1, and the values of each column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an ending that is not known, a column that is not there, or a row that cannot be read; names the
            file and, where one is at fault, the row.
    """
    if isinstance(source, Dataset | IterableDataset):
        yield from _number(_dataset_batches(source, columns, optional))
        return
    path = Path(source)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    readers = {".csv": _csv_batches, ".parquet": _parquet_batches}
    readers |= dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_batches)
    if kind not in readers:
        raise ValueError(f"{path}: expected a file that ends in .csv, .parquet, .jsonl, .ndjson or .json.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    yield from _number(readers[kind](path, columns, optional))


def source_name(source: Source) -> str:
    """What errors call a source: the path of a file, or the name of a data set."""
    if isinstance(source, Dataset | IterableDataset):
        return f"data set {source.info.dataset_name or 'in memory'}"
    return str(source)


def as_time(value: object, where: str) -> float:
    """
    A point in time as a number: numbers as they are, dates as seconds since 1970 (UTC where no zone is given).

    Raises:
        ValueError: neither a number nor an ISO date, or not finite; `where` names the place.
    """
    time = nan  # of what is not read below: a truth value
    try:
        if isinstance(value, str):
            try:
                time = float(value)
            except ValueError:
                value = datetime.fromisoformat(value.strip())
        elif isinstance(value, date) and not isinstance(value, datetime):
            value = datetime.combine(value, time_of_day())
        if isinstance(value, datetime):
            zoned = value if value.tzinfo else value.replace(tzinfo=UTC)
            time = zoned.timestamp()
        elif not isinstance(value, str | bool):
            time = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {value!r} is no time, expected a number or a date like 2024-01-31.") from error
    if not isfinite(time):
        raise ValueError(f"{where}: {value!r} is no time, expected a finite number.")
    return time


def id_text(value: object) -> str | None:
    """
    An id as text: whole numbers without a point, as one table may hold what another has as text.

    Args:
        value (`object`):
            What a table holds.

    Returns:
        `str`, *optional*: `None` for what cannot be one: nothing, blanks, a fraction, a truth value, a list, an
        object, or text with half a surrogate pair, which no file takes.
    """
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53  # beyond, floats have gaps
    if is_whole or (isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value()):
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    text = str(value)
    is_text = text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
    return text if is_text and text.strip() else None


def _number(batches: Iterator[Batch]) -> Iterator[tuple[int, Batch]]:
    start = 1
    for batch in batches:
        size = len(next(iter(batch.values())))
        if size:
            yield start, batch
        start += size


def _check(name: str, there: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(there)}.")
    for column in (*columns, *optional):
        if list(there).count(column) > 1:
            raise ValueError(f"{name} has several columns {column!r}: name each its own.")


def _dataset_batches(source: Dataset | IterableDataset, columns: Sequence[str], optional: Sequence[str]):
    there = source.column_names
    if there is None:  # a stream tells its columns with its first row
        there = list(next(iter(source), {}))
    _check(source_name(source), there, columns, optional)
    known = [column for column in (*columns, *optional) if column in there]
    for batch in source.select_columns(known).with_format(None).iter(BATCH_ROWS):
        yield _complete({column: list(batch[column]) for column in known}, optional)


def _csv_batches(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Batch]:
    try:
        with csv.open_csv(path) as reader:
            there = reader.schema.names
        _check(str(path), there, columns, optional)
        known = [column for column in (*columns, *optional) if column in there]
        # As text: an id such as 007 stays as it is, and a column of numbers may hold a word further down.
        convert = csv.ConvertOptions(
            include_columns=known, column_types=dict.fromkeys(known, pa.string()), strings_can_be_null=False
        )
        parse = csv.ParseOptions(newlines_in_values=True)
        with csv.open_csv(path, parse_options=parse, convert_options=convert) as reader:
            for batch in reader:
                yield _complete(batch.to_pydict(), optional)
    except (pa.ArrowInvalid, UnicodeDecodeError, EOFError, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({str(error).splitlines()[0]}).") from error


def _parquet_batches(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Batch]:
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            _check(str(path), there, columns, optional)
            known = [column for column in (*columns, *optional) if column in there]
            for batch in file.iter_batches(BATCH_ROWS, columns=known):
                yield _complete(batch.to_pydict(), optional)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}).") from error


def _json_batches(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Batch]:
    names = (*columns, *optional)
    batch: Batch = {name: [] for name in names}
    for number, row in _json_rows(path):
        for name in columns:
            if name not in row:
                raise ValueError(f"{path}: line {number} has no {name!r}.")
        for name in names:
            batch[name].append(row.get(name))
        if len(batch[names[0]]) == BATCH_ROWS:
            yield batch
            batch = {name: [] for name in names}
    yield batch


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Objects of a file, one a line; empty lines would shift the row numbers and are refused as broken."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                row = _parse(line, f"{path}: line {number}")
                if not isinstance(row, dict):
                    raise ValueError(f"{path}: line {number} is {type(row).__name__}, expected an object.")
                yield number, row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: after line {number}: broken gzip file ({error}).") from error


def _parse(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{where}: broken JSON ({error}).") from error


def _complete(batch: Batch, optional: Sequence[str]) -> Batch:
    size = len(next(iter(batch.values()), []))
    return batch | {column: [None] * size for column in optional if column not in batch}
