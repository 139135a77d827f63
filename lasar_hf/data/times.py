"""Times of a column: numbers of one unit, or dates of one form."""

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from datetime import date

import numpy as np
import pandas as pd
from pandas.tseries.api import guess_datetime_format


UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")  # up to 1e11, 1e14, 1e17, more


def parse_times(values: Sequence[object], form: str | None = None) -> tuple[np.ndarray, str]:
    """
    Times as numbers, and their common form: a unit, or the format of a date. Numbers keep their unit; dates, as text,
    objects or numbers like 20240131, become nanoseconds since 1970 (UTC if they have no time zone). `ValueError` if a
    value is not a time, or has another form.
    """
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
    formats, parsed = [form], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about the order that `dayfirst` does not force
        if form is None:
            guesses = [guess_datetime_format(str(column[0]), dayfirst=day_first) or "" for day_first in (False, True)]
            formats = ["ISO8601", *guesses, *(guess.replace("%B", "%b") for guess in guesses)]
        for date_format in filter(None, dict.fromkeys(formats)):
            with suppress(ValueError, TypeError, OverflowError):
                times = pd.to_datetime(column, format=date_format, utc=True)
                if not times.isna().any() and "ISO8601" not in parsed:
                    parsed[date_format] = times.dt.as_unit("ns").astype("int64").to_numpy()
    if not parsed:
        raise ValueError("not dates of one form")
    form, times = next(iter(parsed.items()))
    if any((others != times).any() for others in parsed.values()):
        warnings.warn(f"Dates like {values[0]!r} fit {' and '.join(parsed)}; read as {form}.", stacklevel=2)
    return times, form


def wrong_time(values: Sequence[object], form: str | None, first: str, where: str, start: int, column: str) -> str:
    """Message about a batch of times that [`parse_times`] refuses; `first` is the first time of the column."""

    def is_refused(times: Sequence[object], form: str | None) -> bool:
        with suppress(ValueError):
            return not parse_times(times, form)
        return True

    position = bisect_left(range(1, len(values)), True, key=lambda length: is_refused(values[:length], form))
    expected = "a finite number or a date like 2024-01-31"
    if not is_refused(values[position : position + 1], None):
        expected = f"the unit or form of {first}"
    return f"{where} {start + position}, {column} is {values[position]!r}; expected {expected}."
