"""The command line: `numbabuf replay [TRACE]`, `numbabuf plan TRACE`, `numbabuf info`, and what they share.

A command is one `Command`: its arguments and one function that returns the exit code. 0: all is well; 1: the
command ran and found something wrong; 2: it could not run (arguments, trace, device), and one line on stderr
says why. Numba reads NUMBA_ENABLE_CUDASIM once, at its import, so nothing here may import numba at module
level. Nothing in numbabuf imports this module.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import config
from ..errors import BackendError, NumbabufError

if TYPE_CHECKING:
    from ..demand.compare import Comparison

__all__ = ["main"]

MOST_STEPS = 10_000_000
"""Most steps that `plan` reads: a row of a trace may stand for a hundred million."""


class Command(NamedTuple):
    """One subcommand."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    device: bool
    """Whether it needs a backend: without a GPU the simulator is chosen before it runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name. Left out, this is the program itself: it takes them from the
        process and may start the process anew (once) to run in the simulator. Given, it never does.

    Returns
    -------
    int
        0, 1 or 2, as the module says; 130 when interrupted.

    Raises
    ------
    SystemExit
        By argparse, for ``--help`` (0) and for arguments it refuses (2).
    """
    if argv is None and sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file may have any name
    try:
        try:
            return _dispatch(argv)
        finally:
            if sys.stdout is not None:  # None where the program was started without one: then nothing is lost
                sys.stdout.flush()  # here, where a closed pipe or a full disk can still be answered
    except BrokenPipeError:  # the reader of our output, `head` for one, is gone
        _silence_stdout()
        return 2
    except (NumbabufError, MemoryError, OSError) as error:
        if isinstance(error, OSError):
            _silence_stdout()
        _complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


def _dispatch(argv: Sequence[str] | None) -> int:
    """Read the arguments, and run the command that they name."""
    parser = argparse.ArgumentParser(prog="numbabuf", description="Fixed-address input buffers and CUDA graph replay.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.help, description=command.help)
        command.arguments(sub)
        sub.set_defaults(parser=sub)
    args = parser.parse_args(argv)
    command = COMMANDS[args.command]
    if command.device:
        try:
            for switch in config.SWITCHES:
                config.enabled(switch.name)
        except ValueError as error:
            raise NumbabufError(str(error)) from None
        choose_backend(restart=argv is None)
    return command.run(args)


def _complain(text: str) -> None:
    """Say something on stderr, in one line; where that cannot be written, the exit code must do."""
    if sys.stderr is not None:  # else print would take stdout
        with contextlib.suppress(OSError):
            print("numbabuf:", *filter(None, map(str.strip, text.splitlines())), file=sys.stderr, flush=True)


def _silence_stdout() -> None:
    """Where stdout takes nothing more, let what it still holds go nowhere, lest the interpreter fail at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -------------------------------------------------------------------------------------------------- backend


def choose_backend(*, restart: bool) -> None:
    """Choose the simulator where no GPU can be used and the user has not chosen; say so on stderr.

    Numba reads the choice when it is imported; where that has happened, the process is started anew with the
    choice made (`restart`), which can happen only once, since the variable is then set.
    """
    chosen = os.environ.get("NUMBA_ENABLE_CUDASIM")
    problem = None if chosen not in (None, "0") else device_problem()
    if problem is None:
        return
    if chosen is not None:
        raise BackendError(f"no GPU ({problem}) and NUMBA_ENABLE_CUDASIM={chosen}: set it to 1 to use the simulator")
    imported = "numba" in sys.modules
    if imported and not restart:
        raise BackendError(f"no GPU ({problem}): set NUMBA_ENABLE_CUDASIM=1 before numba is imported")
    _complain(f"no GPU ({problem}); using Numba's simulator: results, not speed")
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    if imported:
        again = [
            sys.executable,
            *sys.orig_argv[1:],
        ]  # as it was started: -m, console script, -W and -X options
        if sys.platform == "win32":  # exec there returns to the shell at once
            raise SystemExit(subprocess.call(again))
        os.execv(sys.executable, again)


def device_problem() -> str | None:
    """Return why no GPU can be used, None where one can; asks the driver, as numba is not imported yet."""
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    library = os.environ.get("NUMBA_CUDA_DRIVER") or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"{library} cannot be loaded"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"the driver answers with error {code}"
    return None if count.value else "the driver reports no device"


# --------------------------------------------------------------------------------------------------- replay

_SIZES: dict[str, dict[str, int]] = {
    "simulator": {"steps": 200, "max_tokens": 256, "max_seqs": 16, "dim": 8, "vocab": 512},
    "cuda": {"steps": 1000, "max_tokens": 2048, "max_seqs": 256, "dim": 64, "vocab": 32000},
}
_WORKLOADS: dict[str, dict[str, Any]] = {
    "simulator": {"requests": 64, "rate_per_s": 20.0},
    "cuda": {"requests": 1000, "rate_per_s": 100.0},
}


def _whole(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:  # argparse puts the name of this function into its message
        value = int(text)
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be from {low} to {2**31 - 1}; found {value}")
        return value

    return number


def _whole_list(low: int) -> Callable[[str], list[int]]:
    def numbers(text: str) -> list[int]:
        return [_whole(low)(part) for part in text.split(",")]

    return numbers


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    def default(name: str) -> str:
        return f"default {_SIZES['simulator'][name]} in the simulator, {_SIZES['cuda'][name]} on a GPU"

    add = parser.add_argument
    add("trace", nargs="?", metavar="TRACE", help="CSV, JSONL or NPZ, plain or .gz (default: generated requests)")
    for name, least, what in (
        ("steps", 0, "stop after N steps, 0: run all"),
        ("max_tokens", 1, "most tokens in a step"),
        ("max_seqs", 1, "most sequences in a step"),
        ("dim", 1, "columns of the embedding table"),
        ("vocab", 1, "rows of the embedding table"),
    ):
        add(f"--{name.replace('_', '-')}", type=_whole(least), metavar="N", help=f"{what} ({default(name)})")
    lists = "padded sizes (default: powers of two up to --max-tokens)"
    add("--buckets", type=_whole_list(1), metavar="N,N,...", help=lists)
    add("--ring", type=_whole(1), default=4, metavar="N", help="staging blocks (default 4)")
    add("--overflow", choices=("raise", "eager"), default="raise", help="for steps beyond the largest bucket")
    seeded = "of generated requests, token ids and weights (default 0)"
    add("--seed", type=_whole(0), default=0, metavar="N", help=seeded)
    add("--json", metavar="OUT", help="write the results to this file")
    add("--report", metavar="OUT.html", help="write the results to this file as one HTML page with pictures")
    add("--quiet", action="store_true", help="no progress bar and no table")


def _settle_options(args: argparse.Namespace) -> None:
    """Give what was not given its default, and refuse what cannot be replayed; ends the program where it is wrong."""
    from .. import _cuda
    from ..demand import buckets

    for name, value in _SIZES[_cuda.backend()].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        args.buckets = buckets.validate(args.buckets or buckets.powers_of_two(args.max_tokens), args.max_tokens)
    except ValueError as error:
        args.parser.error(str(error))
    if args.overflow == "raise" and args.buckets[-1] < args.max_tokens:
        args.parser.error(
            f"steps may have {args.max_tokens} tokens and the largest bucket holds {args.buckets[-1]}: "
            "lower --max-tokens, or give a larger bucket, or --overflow eager"
        )
    for name in ("vocab", "max_tokens", "max_seqs"):
        if getattr(args, name) * args.dim >= 2**31:
            option = f"--{name.replace('_', '-')}"
            args.parser.error(f"{option} {getattr(args, name)} x --dim {args.dim} must be below 2**31 elements")
    _check_folders(args, "json", "report")


def _check_folders(args: argparse.Namespace, *options: str) -> None:
    """Refuse a file to write in a folder that is not there; ends the program."""
    for option in options:
        path = getattr(args, option)
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            args.parser.error(f"--{option} {path}: no such directory")


def _replay(args: argparse.Namespace) -> int:
    """Replay a trace through an InputBufferManager, check every step against NumPy, report."""
    from .. import _cuda
    from .replay import print_intro, print_results, report_of, run
    from .tracefiles import read_trace
    from .traces import Workload

    _settle_options(args)
    workload = Workload(**_WORKLOADS[_cuda.backend()], seed=args.seed)
    trace = read_trace(args.trace) if args.trace else workload.generate()
    if not args.quiet:
        print_intro(args, trace, workload)
    with warnings.catch_warnings():
        # the manager warns of the first step that has no graph; the table counts them all
        warnings.filterwarnings("ignore", message=".*runs without a graph", category=RuntimeWarning)
        results = run(args, trace)
    parameters = {name: getattr(args, name) for name in (*_SIZES["cuda"], "buckets", "ring", "overflow", "seed")}
    report = report_of(results, trace, None if args.trace else workload, parameters)
    written = _write_reports(args, report)
    if not args.quiet:
        print_results(args, report)
    if results["mismatch"] is None:
        return 0 if written else 2
    text = "wrong result at step {step}, sequence {sequence}: NumPy says {expected}, the device {found}"
    _complain("error: " + text.format(**results["mismatch"]))
    return 1


def _write_reports(args: argparse.Namespace, report: dict[str, Any]) -> bool:
    """Write what was asked for; return whether all of it could be."""
    written = True
    if args.json:
        written = _write(args.json, json.dumps(report, indent=2) + "\n")
    if args.report:
        from ..view.report import render

        written = _write(args.report, render(report)) and written
    return written


def _write(path: str, text: str) -> bool:
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # a trace may have any name
            file.write(text)
    except OSError as error:
        _complain(f"error: {path}: cannot be written: {error.strerror}")
        return False
    return True


# ------------------------------------------------------------------------------------------------ plan and info


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("trace", metavar="TRACE", help="CSV, JSONL or NPZ, plain or .gz")
    add("--k", type=_whole(1), default=16, metavar="N", help="sizes to choose (default 16)")
    add("--axis", choices=("tokens", "seqs"), default="tokens", help="which size of a step (default tokens)")
    add("--max-tokens", type=_whole(1), default=2048, metavar="N", help="most tokens in a step (default 2048)")
    add("--max-seqs", type=_whole(1), default=256, metavar="N", help="most sequences in a step (default 256)")
    add("--plot", metavar="OUT.png", help="draw the comparison into this file (needs matplotlib)")


def _plan(args: argparse.Namespace) -> int:
    """Print the bucket list for a log, and what other lists would pad on it."""
    from ..demand.compare import compare
    from .tracefiles import read_trace

    if args.plot and importlib.util.find_spec("matplotlib") is None:
        args.parser.error("--plot needs matplotlib: pip install 'numbabuf[plot]'")
    _check_folders(args, "plot")
    steps = read_trace(args.trace).steps(max_tokens=args.max_tokens, max_seqs=args.max_seqs)
    top = args.max_tokens if args.axis == "tokens" else args.max_seqs
    sizes = [getattr(step, f"num_{args.axis}") for step in itertools.islice(steps, MOST_STEPS + 1)]
    if len(sizes) > MOST_STEPS:
        raise NumbabufError(f"{args.trace}: more than {MOST_STEPS:,} steps: shorten it, or raise --max-tokens")
    found = compare(sizes, args.k, max_size=top)
    print(f"{found.steps:,} steps, at most {top:,} {args.axis} each")
    print(found.table())
    return _plot(found, args.plot) if args.plot else 0


def _plot(found: Comparison, path: str) -> int:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(found.fits) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    found.plot(figure.add_subplot())
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # no right to write there, or a suffix that matplotlib does not know
        _complain(f"error: {path}: cannot be written: {error}")
        return 2
    return 0


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _info(args: argparse.Namespace) -> int:
    """Print what is here, what is missing, and the command that installs it."""
    problem = device_problem()  # asked before numba is imported, which would answer less clearly
    from . import info

    found = info.collect(problem)
    print(json.dumps(found, indent=2) if args.json else info.render(found))
    return 0


COMMANDS = {
    "info": Command("Tell what is here and what is missing.", _info_arguments, _info, device=False),
    "plan": Command("Choose the sizes to capture for a log of requests.", _plan_arguments, _plan, device=False),
    "replay": Command(
        "Replay a request trace through graphs, checking every step.", _replay_arguments, _replay, device=True
    ),
}
