"""Request traces: read from the public formats or generated, and turned into steps and token inputs.

A trace is either one row a request (`RequestTrace`) or one row a step (`StepTrace`); `trace.steps(...)` gives
both the same form: `Step`s under a limit of tokens and of sequences. NumPy only: this module knows no device,
no slot and no manager, and it may not import them. It sits below `errors` and above `cli`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import operator
import os
import re
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import TraceError

__all__ = [
    "MAX_ARRIVAL_MS",
    "MAX_REQUEST_TOKENS",
    "MAX_STEP_SEQS",
    "RequestTrace",
    "Step",
    "StepTrace",
    "Workload",
    "read_trace",
    "token_inputs",
]

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


# ---------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True, eq=False)
class Step:
    """What a server computes at once: some tokens of some sequences, the decoding sequences first.

    Attributes
    ----------
    requests : ndarray of int64, shape (num_seqs,)
        Which request each sequence belongs to (its row in the trace), all different.
    first : ndarray of int64, shape (num_seqs,)
        Position of the sequence's first token of this step within its request.
    counts : ndarray of int64, shape (num_seqs,)
        Tokens of each sequence in this step, at least 1.
    """

    requests: Ints
    first: Ints
    counts: Ints

    @property
    def num_seqs(self) -> int:
        """Sequences in the step."""
        return self.counts.size

    @property
    def num_tokens(self) -> int:
        """Tokens in the step, over all its sequences."""
        return int(self.counts.sum())


def token_inputs(step: Step, *, vocab: int, seed: int = 0) -> dict[str, Ints]:
    """Return the input arrays of one step.

    Traces hold lengths and no text, so a token id is a hash of (seed, request, position): the same token of
    the same request is the same id in every run, however the batcher cut the request up.

    Parameters
    ----------
    step : Step
    vocab : int
        Ids are in [0, vocab).
    seed : int

    Returns
    -------
    dict
        ``input_ids``, ``positions`` and ``token_index``, shape (num_tokens,), and ``seq_starts``, shape
        (num_seqs + 1,), whose entries i and i + 1 bound the tokens of sequence i. The token index is 0, 1, 2,
        ...: where a step is run in pieces, it tells each piece where it begins. All int64.

    Examples
    --------
    >>> step = Step(np.array([7, 9]), np.array([30, 0]), np.array([1, 3]))
    >>> inputs = token_inputs(step, vocab=1000)
    >>> inputs["positions"].tolist(), inputs["seq_starts"].tolist()
    ([30, 0, 1, 2], [0, 1, 4])
    """
    starts = np.zeros(step.num_seqs + 1, np.int64)
    np.cumsum(step.counts, out=starts[1:])
    index = np.arange(starts[-1], dtype=np.int64)
    positions = np.repeat(step.first - starts[:-1], step.counts) + index
    requests = np.repeat(step.requests, step.counts)
    return {
        "input_ids": (_hash(requests, positions, seed) % np.uint64(vocab)).astype(np.int64),
        "positions": positions,
        "token_index": index,
        "seq_starts": starts,
    }


def _hash(a: Ints, b: Ints, seed: int) -> NDArray[np.uint64]:
    """Mix three integers into 64 even bits; all arithmetic wraps modulo 2**64."""
    x = (a.astype(np.uint64) << np.uint64(32)) ^ b.astype(np.uint64)
    x ^= np.uint64(seed * 0x632BE59BD9B4E019 % 2**64)
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        x ^= x >> np.uint64(31)
        x *= np.uint64(factor)
    return x ^ (x >> np.uint64(29))


def _check_limits(max_tokens: int, max_seqs: int) -> tuple[int, int]:
    for name, value in (("max_tokens", max_tokens), ("max_seqs", max_seqs)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} must be at least 1; found {value}: give the most that one step may hold")
    return operator.index(max_tokens), operator.index(max_seqs)


# --------------------------------------------------------------------------------------------------- traces


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """Requests in the order of their arrival.

    Attributes
    ----------
    name : str
        Where the trace comes from: a path, or the generator.
    arrival_ms : ndarray of float64, shape (n,)
        Arrival of each request, milliseconds from the first; never decreases.
    prompt : ndarray of int64, shape (n,)
        Tokens of each prompt, at least 1.
    output : ndarray of int64, shape (n,)
        Tokens generated for each request, at least 0.
    reordered : int
        Rows that the file held after a later arrival; they were sorted to their place, equal times in file
        order.
    """

    name: str
    arrival_ms: Floats
    prompt: Ints
    output: Ints
    reordered: int = 0

    kind = "requests"

    def __len__(self) -> int:
        return self.prompt.size

    def steps(self, *, max_tokens: int, max_seqs: int, step_ms: float = 20.0, token_ms: float = 0.02) -> Iterator[Step]:
        """Yield the steps that a server with continuous batching would run for these requests.

        First come, first served, on a clock that a step advances by ``step_ms + token_ms * num_tokens``. Each
        step takes one token of every decoding sequence; the room left goes to the waiting prompts in order,
        and a prompt that does not fit is cut (chunked prefill). A request is done after its prompt and
        `output` decode steps. Times with nothing to do are skipped. Not modelled: preemption, paging, prefix
        caches.

        Parameters
        ----------
        max_tokens, max_seqs : int
            Most tokens, and most sequences, in one step.
        step_ms, token_ms : float
            The clock: fixed time of a step and time of each of its tokens, in milliseconds.

        Yields
        ------
        Step
            Over all of them every token of every request (its prompt and its output) is there exactly once.

        Raises
        ------
        ValueError
            A limit is below 1, or a time is negative.
        """
        max_tokens, max_seqs = _check_limits(max_tokens, max_seqs)
        if not (0 <= step_ms < math.inf and 0 <= token_ms < math.inf):
            raise ValueError(f"step_ms and token_ms must be at least 0; found {step_ms} and {token_ms}")
        return self._steps(max_tokens, max_seqs, step_ms, token_ms)

    def _steps(self, max_tokens: int, max_seqs: int, step_ms: float, token_ms: float) -> Iterator[Step]:
        done = np.zeros(len(self), np.int64)  # tokens of each request that have been processed
        total = self.prompt + self.output
        waiting: deque[int] = deque()  # arrived, prompt not finished; only the first can have been begun
        decoding = np.zeros(0, np.int64)
        arrived, clock = 0, 0.0
        while arrived < len(self) or waiting or decoding.size:
            if not waiting and not decoding.size:
                clock = max(clock, float(self.arrival_ms[arrived]))
            while arrived < len(self) and self.arrival_ms[arrived] <= clock:
                waiting.append(arrived)
                arrived += 1
            chunks: list[tuple[int, int]] = []
            room, seats = max_tokens - decoding.size, max_seqs - decoding.size
            while waiting and room and seats:
                request = waiting[0]
                take = min(room, int(self.prompt[request] - done[request]))
                chunks.append((request, take))
                room, seats = room - take, seats - 1
                if done[request] + take < self.prompt[request]:
                    break
                waiting.popleft()
            prefill = np.array(chunks, np.int64).reshape(-1, 2)
            requests = np.concatenate([decoding, prefill[:, 0]])
            counts = np.concatenate([np.ones_like(decoding), prefill[:, 1]])
            step = Step(requests, done[requests], counts)
            yield step
            done[requests] += counts
            decoding = requests[(done[requests] >= self.prompt[requests]) & (done[requests] < total[requests])]
            clock += step_ms + token_ms * step.num_tokens


@dataclass(frozen=True, eq=False)
class StepTrace:
    """Steps that a server has run: sizes only, no requests.

    Attributes
    ----------
    name : str
        Where the trace comes from.
    num_tokens, num_seqs, decode_seqs : ndarray of int64, shape (n,)
        Tokens, sequences, and sequences of one token (decoding ones) of each step.
    """

    name: str
    num_tokens: Ints
    num_seqs: Ints
    decode_seqs: Ints

    kind = "steps"
    reordered = 0

    def __len__(self) -> int:
        return self.num_tokens.size

    def steps(self, *, max_tokens: int, max_seqs: int) -> Iterator[Step]:
        """Yield the steps of the trace; a step beyond a limit is cut into several, nothing is left out.

        The sequences of a step are the decoding ones, one token each, then the others, which share the rest
        evenly. What came before is not in such a trace, so every sequence is a request of its own that starts
        at position 0.

        Parameters
        ----------
        max_tokens, max_seqs : int
            Most tokens, and most sequences, in one step.

        Raises
        ------
        ValueError
            A limit is below 1.
        """
        max_tokens, max_seqs = _check_limits(max_tokens, max_seqs)
        return self._steps(max_tokens, max_seqs)

    def _steps(self, max_tokens: int, max_seqs: int) -> Iterator[Step]:
        request = 0
        for tokens, seqs, decode in zip(self.num_tokens, self.num_seqs, self.decode_seqs, strict=True):
            counts = np.ones(seqs, np.int64)
            if seqs > decode:
                share, rest = divmod(int(tokens - decode), int(seqs - decode))
                counts[decode:] = share
                counts[decode : decode + rest] += 1
            yield from _cut(request + np.arange(seqs, dtype=np.int64), counts, max_tokens, max_seqs)
            request += int(seqs)


def _cut(requests: Ints, counts: Ints, max_tokens: int, max_seqs: int) -> Iterator[Step]:
    """Yield `counts` in order as steps under the limits, each as full as they allow."""
    first, left = np.zeros_like(counts), counts.copy()
    while left.size:
        ends = np.cumsum(left[:max_seqs])
        whole = int(np.searchsorted(ends, max_tokens, side="right"))  # sequences that fit without a cut
        room = max_tokens - (int(ends[whole - 1]) if whole else 0)
        part = whole < ends.size and room > 0
        take = left[: whole + part].copy()
        if part:
            take[-1] = room
        yield Step(requests[: take.size], first[: take.size].copy(), take)
        first[: take.size] += take
        left[: take.size] -= take
        requests, first, left = requests[whole:], first[whole:], left[whole:]


@dataclass(frozen=True)
class Workload:
    """Parameters of the generator: Poisson arrivals, log-normal lengths.

    Attributes
    ----------
    requests : int
        Requests to generate.
    rate_per_s : float
        Mean arrivals a second.
    prompt_median, output_median : float
        Median length in tokens.
    prompt_sigma, output_sigma : float
        Standard deviation of the logarithm of the length.
    max_tokens : int
        Longer prompts and outputs are cut to this.
    seed : int
        The same seed gives the same trace (as far as NumPy keeps its streams, NEP 19).
    """

    requests: int = 64
    rate_per_s: float = 20.0
    prompt_median: float = 48.0
    prompt_sigma: float = 0.9
    output_median: float = 16.0
    output_sigma: float = 0.7
    max_tokens: int = 2048
    seed: int = 0

    def generate(self) -> RequestTrace:
        """Return the trace of these parameters.

        Raises
        ------
        ValueError
            A parameter is out of its range.

        Examples
        --------
        >>> trace = Workload(requests=3).generate()
        >>> len(trace), float(trace.arrival_ms[0])
        (3, 0.0)
        """
        for name, low in (
            ("requests", 1),
            ("max_tokens", 1),
            ("seed", 0),
            ("prompt_sigma", 0),
            ("output_sigma", 0),
        ):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {low}; found {getattr(self, name)}")
        for name in ("rate_per_s", "prompt_median", "output_median"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0; found {getattr(self, name)}")
        random = np.random.default_rng(self.seed)
        gaps = random.exponential(1000.0 / self.rate_per_s, self.requests)
        arrival_ms = np.cumsum(gaps) - gaps[0]
        prompt = random.lognormal(math.log(self.prompt_median), self.prompt_sigma, self.requests)
        output = random.lognormal(math.log(self.output_median), self.output_sigma, self.requests)
        lengths = np.clip(np.rint([prompt, output]), 1, self.max_tokens).astype(np.int64)
        return RequestTrace("generator", arrival_ms, lengths[0], lengths[1])


# -------------------------------------------------------------------------------------------------- reading


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


# ------------------------------------------------------------------------------------------------------ NPZ


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
    # one token a decoding sequence, at least one for each other, and none left over when all of them decode
    for wrong, reason in (
        (seqs > tokens, "more sequences than tokens"),
        (decode > seqs, "more decoding sequences than sequences"),
        ((decode == seqs) & (tokens != seqs), "every sequence decodes, with more tokens than sequences"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            sizes = f"num_tokens {tokens[row]}, num_seqs {seqs[row]}, decode_seqs {decode[row]}"
            raise _fail(name, None, f"row {row}: {reason} ({sizes})")
    return StepTrace(name, tokens, seqs, decode)


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
