"""Traces read from files of the public formats, within limits; every fault is one line that names file and row.

Sits above `traces` and `files`, below `cli`.
"""

from __future__ import annotations

import csv
import io
import json
import operator
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import TraceError
from .traces import RequestTrace, StepTrace

__all__ = ["MAX_ARRIVAL_MS", "MAX_REQUEST_TOKENS", "MAX_STEP_SEQS", "read_trace"]

MAX_REQUEST_TOKENS = 100_000_000
"""Largest prompt, output or step that a trace may state; more than that is a damaged row, not a request."""

MAX_STEP_SEQS = 1_000_000
"""Most sequences that a row of a step trace may state."""

MAX_ARRIVAL_MS = 1e13
"""Latest arrival that a trace may state: 317 years of milliseconds, so that times since 1970 fit too."""

GZIP = b"\x1f\x8b"
"""How gzip-compressed data begins."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole(value: object, *, low: int) -> int:
    """Return a count of tokens; "374" and 374.0 are whole numbers, 1.5, True and "nan" are not."""
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python reads "1_0" as 10
            raise ValueError
        try:
            number = int(value) if isinstance(value, str) else operator.index(value)  # type: ignore[arg-type]  # TypeError is the answer
        except (TypeError, ValueError):
            exact = float(value)  # type: ignore[arg-type]
            number = int(exact)
            if number != exact:
                raise ValueError from None
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be a whole number; found {_short(value)}") from None
    if not low <= number <= MAX_REQUEST_TOKENS:
        raise ValueError(f"must be from {low} to {MAX_REQUEST_TOKENS}; found {_short(number)}")
    return number


def _milliseconds(value: object) -> float:
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        number = float(value)  # type: ignore[arg-type]  # TypeError is the answer
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be a number of milliseconds; found {_short(value)}") from None
    if not 0 <= number <= MAX_ARRIVAL_MS:
        raise ValueError(f"must be from 0 to {MAX_ARRIVAL_MS:g} milliseconds; found {number:g}")
    return number


_DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?", re.ASCII)


def _date_time(value: object) -> float:
    """Return milliseconds since 1970. Not `fromisoformat` alone: before Python 3.11 it refuses 7 decimals."""
    match = _DATE_TIME.fullmatch(str(value).strip())
    try:
        if match is None:
            raise ValueError
        day, time, fraction, zone = match.groups()
        moment = datetime.fromisoformat(f"{day}T{time}{'+00:00' if zone in (None, 'Z') else zone}")
    except ValueError:
        raise ValueError(f"must be a date and time as 2023-11-16 18:17:03.9799600; found {_short(value)}") from None
    seconds = (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()
    return _milliseconds(seconds * 1000 + float(fraction or 0) * 1000)


def _prompt(value: object) -> int:
    return _whole(value, low=1)


def _output(value: object) -> int:
    return _whole(value, low=0)


class _Format(NamedTuple):
    """Names of the columns for arrival, prompt and output, and how an arrival is written."""

    arrival: str
    prompt: str
    output: str
    read_arrival: Callable[[Any], float]

    def columns(self) -> tuple[tuple[str, Callable[[Any], float]], ...]:
        return ((self.arrival, self.read_arrival), (self.prompt, _prompt), (self.output, _output))


_FORMATS = (
    _Format("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date_time),  # Azure LLM inference traces
    _Format("timestamp", "input_length", "output_length", _milliseconds),  # Mooncake
    _Format("arrival_ms", "prompt", "output", _milliseconds),
)
_STEP_COLUMNS = ("num_tokens", "num_seqs")


def read_trace(path: str | os.PathLike[str]) -> RequestTrace | StepTrace:
    """Read a request or step trace; what the file is follows from its contents, not from its name.

    Understood, each plain or gzip-compressed: CSV with a header line, JSON lines, and NPZ, with the columns
    ``TIMESTAMP, ContextTokens, GeneratedTokens`` (Azure; date and time), ``timestamp, input_length,
    output_length`` (Mooncake; milliseconds) or ``arrival_ms, prompt, output``; NPZ also with ``num_tokens,
    num_seqs`` and, if there, ``decode_seqs``, one row a step. Further columns are left alone. Rows out of
    order are sorted by arrival (stable) and counted; the first arrival becomes 0. A file holds at most 1 GiB, and
    compressed data expands to at most 32 MiB or 100 times its size, see `files.allowance`.

    Parameters
    ----------
    path : str or path-like

    Raises
    ------
    TraceError
        The file cannot be read or holds something else; the text is ``path:line: reason`` (or ``path:
        reason`` where there is no line; an array's row counts from 0).
    """
    name = os.fspath(path)
    data = _contents(name)
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _read_npz(name, data)
    text = _text(name, data)
    rows = _json_rows(name, text) if text.lstrip()[:1] == "{" else _csv_rows(name, text)
    return _request_trace(name, *_columns(name, rows))


def _fail(name: str, line: int | None, reason: str) -> TraceError:
    return TraceError(f"{name}: {reason}" if line is None else f"{name}:{line}: {reason}")


def _contents(name: str) -> bytes:
    try:
        data = files.read_regular(name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _fail(name, None, f"cannot be read: {reason}") from None
    if not data.startswith(GZIP):
        if name.endswith(".gz"):
            raise _fail(name, None, "cannot be decompressed: not a gzip file")
        return data
    try:
        data = files.expand(data)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _fail(name, None, f"cannot be decompressed: {error}") from None
    if data.startswith(GZIP):
        raise _fail(name, None, "compressed twice: decompress it once")
    return data


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _fail(name, line, f"not text in UTF-8 and no NPZ: byte 0x{data[error.start]:02x}") from None


def _csv_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [field.strip() for field in fields]
                if len(set(header)) < len(header):
                    raise _fail(name, reader.line_num, f"a column is named twice: {', '.join(map(_short, header))}")
                _format(name, reader.line_num, header)  # here, so that a header without rows is checked too
            elif len(fields) != len(header):
                raise _fail(name, reader.line_num, f"{len(header)} fields expected; found {len(fields)}")
            else:
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise _fail(name, reader.line_num, f"not CSV: {error}") from None


def _json_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row_text in enumerate(text.split("\n"), 1):
        if not row_text.strip():
            continue
        try:
            row = json.loads(row_text)
        except ValueError as error:
            raise _fail(name, line, f"not JSON: {error}") from None
        except RecursionError:
            raise _fail(name, line, "not a flat JSON object: nested too deep") from None
        if not isinstance(row, dict):
            raise _fail(name, line, f"a JSON object expected; found {row_text.strip()[:40]!r}")
        yield line, row


def _format(name: str, line: int | None, columns: Iterable[str]) -> _Format:
    """Return the format whose three columns are all there; else say what is missing of the nearest one."""
    found = list(columns)
    missing = {known: [column for column in known[:3] if column not in found] for known in _FORMATS}
    nearest = min(_FORMATS, key=lambda known: len(missing[known]))
    if not missing[nearest]:
        return nearest
    listed = ", ".join(map(repr, found))[:200] or "none"
    if len(missing[nearest]) < 3:
        raise _fail(name, line, f"no column {' and no '.join(missing[nearest])}; found {listed}")
    known_lists = " or ".join(", ".join(known[:3]) for known in _FORMATS)
    raise _fail(name, line, f"columns {known_lists} expected; found {listed}")


def _columns(name: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> tuple[Floats, Ints, Ints]:
    """Read rows of named fields into the three columns; the first row decides the format."""
    columns: tuple[tuple[str, Callable[[Any], float]], ...] = ()
    values: tuple[array[Any], ...] = (array("d"), array("q"), array("q"))  # a quarter of what lists would take
    for line, row in rows:
        columns = columns or _format(name, line, row).columns()
        for (column, read), out in zip(columns, values, strict=True):
            if column not in row:
                raise _fail(name, line, f"no {column}")
            try:
                out.append(read(row[column]))
            except ValueError as error:
                raise _fail(name, line, f"{column} {error}") from None
    arrival, prompt, output = values
    return np.array(arrival, np.float64), np.array(prompt, np.int64), np.array(output, np.int64)


def _request_trace(name: str, arrival: Floats, prompt: Ints, output: Ints) -> RequestTrace:
    if not arrival.size:
        raise _fail(name, None, "holds no request")
    late = int(np.count_nonzero(arrival < np.maximum.accumulate(arrival)))
    order = np.argsort(arrival, kind="stable")
    arrival = arrival[order]
    return RequestTrace(name, arrival - arrival[0], prompt[order], output[order], late)


def _read_npz(name: str, data: bytes) -> RequestTrace | StepTrace:
    try:
        wanted = {*_STEP_COLUMNS, "decode_seqs"}.union(*(known[:3] for known in _FORMATS))
        arrays = files.read_arrays(data, wanted)
    except Exception as error:  # damage anywhere in it: zipfile, zlib, numpy and tokenize errors
        raise _fail(name, None, f"cannot be read as NPZ: {str(error) or type(error).__name__}") from None
    if all(column in arrays for column in _STEP_COLUMNS):
        return _step_trace(name, arrays)
    known = _format(name, None, files.array_names(data))
    if known.read_arrival is _date_time:
        raise _fail(name, None, "arrays TIMESTAMP are not read; give arrival_ms, prompt, output")
    arrival = _array(name, arrays, known.arrival, 0, MAX_ARRIVAL_MS, whole=False)
    prompt = _array(name, arrays, known.prompt, 1, MAX_REQUEST_TOKENS, length=arrival.size)
    output = _array(name, arrays, known.output, 0, MAX_REQUEST_TOKENS, length=arrival.size)
    return _request_trace(name, arrival, prompt.astype(np.int64), output.astype(np.int64))


def _step_trace(name: str, arrays: dict[str, NDArray[Any]]) -> StepTrace:
    tokens, seqs = (
        _array(name, arrays, column, 1, most).astype(np.int64)
        for column, most in zip(_STEP_COLUMNS, (MAX_REQUEST_TOKENS, MAX_STEP_SEQS), strict=True)
    )
    if not tokens.size:
        raise _fail(name, None, "holds no step")
    if seqs.size != tokens.size:
        raise _fail(name, None, f"num_seqs: {tokens.size} rows expected, as in num_tokens; found {seqs.size}")
    decode = np.zeros_like(tokens)
    if "decode_seqs" in arrays:
        decode = _array(name, arrays, "decode_seqs", 0, MAX_REQUEST_TOKENS, length=tokens.size).astype(np.int64)
    _check_steps(name, tokens, seqs, decode)
    return StepTrace(name, tokens, seqs, decode)


def _check_steps(name: str, tokens: Ints, seqs: Ints, decode: Ints) -> None:
    """Refuse steps without one token a decoding sequence, one for each other, or none left over if all decode."""
    for wrong, reason in (
        (seqs > tokens, "more sequences than tokens"),
        (decode > seqs, "more decoding sequences than sequences"),
        ((decode == seqs) & (tokens != seqs), "every sequence decodes, with more tokens than sequences"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            sizes = f"num_tokens {tokens[row]}, num_seqs {seqs[row]}, decode_seqs {decode[row]}"
            raise _fail(name, None, f"row {row}: {reason} ({sizes})")


def _array(
    name: str,
    arrays: dict[str, NDArray[Any]],
    key: str,
    low: float,
    high: float,
    *,
    whole: bool = True,
    length: int | None = None,
) -> Floats:
    """Return a checked array as float64, which holds it exactly: `high` is far below 2**53."""
    array = arrays[key]
    if array.dtype.kind not in "iuf" or array.ndim != 1:
        raise _fail(name, None, f"{key}: a row of numbers expected; found {array.dtype} of shape {array.shape}")
    if length is not None and array.size != length:
        raise _fail(name, None, f"{key}: {length} rows expected, as in the first column; found {array.size}")
    values = array.astype(np.float64)
    fits = (values >= low) & (values <= high)  # NaN fits nowhere
    if whole:
        fits &= values == np.trunc(values)
    if not fits.all():
        row = int(np.argmin(fits))
        kind = "whole numbers" if whole else "numbers"
        raise _fail(name, None, f"{key}[{row}]: {kind} from {low:g} to {high:g} expected; found {array[row]}")
    return values
