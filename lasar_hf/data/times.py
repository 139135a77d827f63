"""Times of a column: numbers of one unit, or dates of one form."""

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from datetime import date

import numpy as np
import pandas as pd
from pandas.tseries.api import guess_datetime_format


# Forms of text that pandas does not guess: Goodreads' and Twitter's dates, and hours from 1 to 12.
FORMATS = ("%a %b %d %H:%M:%S %z %Y", "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p")
ZONED = "ISO8601 with a zone"
UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")  # up to 1e11, 1e14, 1e17, more


class TimeColumn:
    """
    The times of a column, collected in batches of rows. All must have one unit or form.

    Args:
        name (`str`):
            Name of the column in errors.
        time_format (`str`, *optional*):
            Form of dates as for `strptime`; found by default.
    """

    def __init__(self, name: str | None, time_format: str | None = None):
        self.name, self.time_format, self.form = name, time_format, time_format
        self._batches: list[np.ndarray] = []
        self._first = self._missing = ""  # the first time, and the first one that seems to be missing

    def add(self, values: Sequence[object], table: str, start: int) -> None:
        """Add times; `start` is the row of the first one in `table`. `ValueError` names a row of another form."""
        self._first = self._first or f"{values[0]!r} in row {start} of {table}"
        try:
            numbers, self.form = parse_times(values, self.form)
        except ValueError:
            raise ValueError(f"{table}: {self._wrong_time(values, start)}") from None
        is_missing = np.isin(numbers, (0, -1))
        if not self._missing and is_missing.any():
            position = int(is_missing.argmax())
            self._missing = f"{table}: row {start + position}, {self.name} is {values[position]!r}"
        self._batches.append(numbers)

    def numbers(self) -> np.ndarray:
        """All times, as from [`parse_times`]. `ValueError` if some are 0 or -1 among later times: they are missing."""
        times = np.concatenate(self._batches)
        if self._missing and times.max() >= 1e8:
            raise ValueError(f"{self._missing}, but others are long after 1970; remove the rows without a time.")
        return times

    def _wrong_time(self, values: Sequence[object], start: int) -> str:
        """Message about the first time that [`parse_times`] refuses."""

        def is_refused(times: Sequence[object], form: str | None) -> bool:
            with suppress(ValueError):
                return not parse_times(times, form)
            return True

        position = bisect_left(range(1, len(values)), True, key=lambda length: is_refused(values[:length], self.form))
        expected = f"time_format {self.time_format}, as for strptime"
        if not self.time_format:
            expected = "a finite number or a date like 2024-01-31, from 1678 to 2262; time_format names other forms"
        if not is_refused(values[position : position + 1], self.time_format):
            expected = f"the unit or form of {self._first}"
        return f"row {start + position}, {self.name} is {values[position]!r}; expected {expected}."


def parse_times(values: Sequence[object], form: str | None = None) -> tuple[np.ndarray, str]:
    """
    Times as numbers, and their common form: a unit, or the format of a date. Numbers keep their unit; dates, as text,
    objects or numbers like 20240131, become nanoseconds since 1970 (UTC if they have no time zone). `ValueError` if a
    value is not a time, or has another form than the one that is given.
    """
    if form and form.startswith("%") and form != "%Y%m%d":
        return _parse_dates(values, form)
    try:
        numbers = pd.to_numeric(pd.Series(values, dtype=object)).to_numpy()
        numbers = numbers.astype(float) if numbers.dtype == object else numbers
    except (TypeError, ValueError, OverflowError):
        return _parse_dates(values, form)
    is_day = (numbers >= 19000101) & (numbers <= 21001231) & (np.floor(numbers) == numbers)
    days = pd.to_datetime(numbers[is_day].astype("int64").astype(str), format="%Y%m%d", errors="coerce")
    is_day[is_day] = ~days.isna()
    if is_day.all() and form in (None, "%Y%m%d"):
        return days.as_unit("ns").astype("int64").to_numpy(), "%Y%m%d"
    units = np.searchsorted([1e11, 1e14, 1e17], np.abs(numbers), side="right")
    form = form or UNITS[units[0]]
    # Dates among numbers since 1970 are another form; among small numbers they are numbers by chance.
    is_mixed = is_day.any() and numbers[~is_day].min(initial=2**62) >= 1e8
    is_number = np.isfinite(numbers).all() and not any(isinstance(value, bool) for value in values)
    if is_mixed or not is_number or any(UNITS[unit] != form for unit in np.unique(units)):
        raise ValueError("not finite numbers of one unit")
    return numbers, form


def _parse_dates(values: Sequence[object], form: str | None) -> tuple[np.ndarray, str]:
    """Dates as nanoseconds since 1970, and their format. The month comes first where both orders fit."""
    column = pd.Series([value if isinstance(value, date) else str(value).strip() for value in values], dtype=object)
    if column.astype(str).str.lower().isin(["now", "today"]).any():  # pandas reads these as the present
        raise ValueError("not a date")
    # ISO times with and without a zone are two forms; a column of both has neither.
    has_zone = column.astype(str).str.contains(r":\d\d.*(?:Z|[+-]\d\d:?\d\d)$")
    iso = ZONED if has_zone.all() else None if has_zone.any() else "ISO8601"
    if form in ("ISO8601", ZONED) and form != iso:
        raise ValueError("ISO times with and without a zone")
    formats, parsed = [form], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about the order that `dayfirst` does not force
        if form is None:
            guesses = [guess_datetime_format(str(column[0]), dayfirst=day_first) or "" for day_first in (False, True)]
            formats = [iso, *guesses, *(guess.replace("%B", "%b") for guess in guesses), *FORMATS]
        for date_format in filter(None, dict.fromkeys(formats)):
            with suppress(ValueError, TypeError, OverflowError):
                pandas_format = "ISO8601" if date_format == ZONED else date_format
                times = pd.to_datetime(column, format=pandas_format, utc=True)
                if not times.isna().any() and iso not in parsed:
                    parsed[date_format] = times.dt.as_unit("ns").astype("int64").to_numpy()
    if not parsed:
        raise ValueError("not dates of one form")
    form, times = next(iter(parsed.items()))
    if any((others != times).any() for others in parsed.values()):
        warnings.warn(f"Dates like {values[0]!r} fit {' and '.join(parsed)}; read as {form}.", stacklevel=2)
    return times, form
