"""The ends of `fill_slots` and `send_slots` under the axioms of the PTX memory model: what any execution may read.

No machine at hand shows what these rows show. The kernels' last lines are restated as loads, stores, atomics and fences
for two thread blocks and the host; a checker that lies beside the clone enumerates the executions. `test_sass.py` reads
from the machine code that the kernel has the order that is stated here.
"""

import pathlib
import sys

import pytest

CHECKER = pathlib.Path(__file__).resolve().parents[3] / "shared" / "memory_model"

pytestmark = pytest.mark.skipif(
    not (CHECKER / "ptxmm.py").exists(), reason="the checker of memory models, ptxmm.py, is not beside this clone"
)

VERSIONS = pytest.mark.parametrize("version", ["6.0", "7.5"])
BLOCKS = 2

# STEP counts the fills, DONE the thread blocks of this fill; RETIRED is what the host reads; STAGED stands for the
# staging block, which holds 1 in this fill and 2 once the host wrote it again.
START = {"STEP": 0, "DONE": 0, "RETIRED": 0, "STAGED": 1}
READ = [("ld", "step", "STEP", "weak", None), ("ld", "staged", "STAGED", "weak", None)]
BARRIER = ("bar", 0)
DEVICE_FENCE = ("fence", "sc", "gpu")
REPORT = [("atom", "before", "DONE", "add", [1], "rlx", "gpu"), ("bne", "before", BLOCKS - 1, "end")]
SYSTEM_FENCE = ("fence", "sc", "sys")
ADVANCE = [("st", "DONE", 0, "weak", None), ("st", "STEP", 1, "weak", None)]
PUBLISH = ("st", "RETIRED", 1, "rlx", "sys")  # how the model counts a volatile store
WEAK_PUBLISH = ("st", "RETIRED", 1, "weak", None)
END = ("label", "end")

KERNEL = [*READ, BARRIER, DEVICE_FENCE, *REPORT, SYSTEM_FENCE, *ADVANCE, PUBLISH, END]
OTHER_THREAD = [*READ, BARRIER]
"""A thread of a block that does not report for it."""
HOST = [("ld", "seen", "RETIRED", "acq", "sys"), ("bne", "seen", 1, "end"), ("st", "STAGED", 2, "weak", None), END]


def allowed(question, kernel, version):
    """Whether an execution of two blocks, the first with two threads, and the host has an end that `question` asks for.

    `question` is given the registers of the three device threads, then those of the host.
    """
    other = OTHER_THREAD if BARRIER in kernel else READ
    return ends([(0, 0, kernel, {}), (0, 0, other, {}), (1, 0, kernel, {}), (9, 9, HOST, {})], START, question, version)


def ends(threads, start, question, version):
    """Whether an execution of `threads`, each (block, device, program, registers), ends as `question` asks."""
    sys.path.insert(0, str(CHECKER))
    try:
        from ptxmm import check
    finally:
        sys.path.remove(str(CHECKER))
    return bool(check(threads, start, version, want=question, stop=True))


def host_sees_the_count(registers):
    return registers[3].get("seen") == 1


def a_later_steps_values_are_read(registers):
    return any(thread.get("staged") == 2 for thread in registers[:3])


def the_next_count_is_read(registers):
    return any(thread.get("step") == 1 for thread in registers[:3])


def without(removed):
    return [instruction for instruction in KERNEL if instruction != removed]


@VERSIONS
def test_a_block_is_read_before_the_host_writes_it_again(version):
    assert allowed(host_sees_the_count, KERNEL, version), "the protocol publishes nothing: the other rows say nothing"
    assert not allowed(a_later_steps_values_are_read, KERNEL, version)


@VERSIONS
def test_no_thread_sees_the_next_count(version):
    assert not allowed(the_next_count_is_read, KERNEL, version)


@VERSIONS
@pytest.mark.parametrize(
    "mutant, question",
    [
        (without(BARRIER), a_later_steps_values_are_read),
        (without(DEVICE_FENCE), a_later_steps_values_are_read),
        (without(DEVICE_FENCE), the_next_count_is_read),
        (without(SYSTEM_FENCE), a_later_steps_values_are_read),
        (without(SYSTEM_FENCE), the_next_count_is_read),
        ([*READ, BARRIER, DEVICE_FENCE, *REPORT, *ADVANCE, SYSTEM_FENCE, PUBLISH, END], the_next_count_is_read),
        ([WEAK_PUBLISH if part == PUBLISH else part for part in KERNEL], a_later_steps_values_are_read),
    ],
    ids=[
        "no barrier, staged values",
        "no fence of the device, staged values",
        "no fence of the device, count",
        "no fence of the system, staged values",
        "no fence of the system, count",
        "fence of the system behind the count",
        "weak publication",
    ],
)
def test_every_part_is_needed(mutant, question, version):
    assert allowed(question, mutant, version)


# --------------------------------------------------------------------------------------------------------- the way back

# A, B and C are the parts of a return block: 1 is what this step sends. SENT counts the thread blocks of this send.
SEND_START = {"SENT": 0, "RETURNED": 0, "A": 0, "B": 0, "C": 0}
SEND_REPORT = [("atom", "before", "SENT", "add", [1], "rlx", "gpu"), ("bne", "before", BLOCKS - 1, "end")]
PUBLISH_SENT = ("st", "RETURNED", 1, "rlx", "sys")
SEND = [BARRIER, SYSTEM_FENCE, *SEND_REPORT, SYSTEM_FENCE, ("st", "SENT", 0, "weak", None), PUBLISH_SENT, END]
READER = [
    ("ld", "seen", "RETURNED", "acq", "sys"), ("bne", "seen", 1, "end"),
    *(("ld", part.lower(), part, "weak", None) for part in "ABC"), END,
]  # fmt: skip


def sent(question, kernel, version):
    """As `allowed`, of a send: the first block's two threads write A and C, the second block writes B."""
    parts = [("st", part, 1, "weak", None) for part in "ACB"]
    barrier = [BARRIER] if BARRIER in kernel else []
    programs = [(0, 0, [parts[0], *kernel]), (0, 0, [parts[1], *barrier]), (1, 0, [parts[2], *kernel]), (9, 9, READER)]
    return ends([(*program, {}) for program in programs], SEND_START, question, version)


def the_reader_sees_the_number(registers):
    return registers[3].get("seen") == 1


def a_part_is_missing(registers):
    return registers[3].get("seen") == 1 and not all(registers[3].get(part) for part in "abc")


@VERSIONS
def test_what_is_published_has_arrived(version):
    assert sent(the_reader_sees_the_number, SEND, version), "it publishes nothing: the other rows say nothing"
    assert not sent(a_part_is_missing, SEND, version)


@VERSIONS
@pytest.mark.parametrize(
    "mutant",
    [
        SEND[1:],
        [SEND[0], *SEND[2:]],
        [*SEND[:4], *SEND[5:]],
        [("st", "RETURNED", 1, "weak", None) if part == PUBLISH_SENT else part for part in SEND],
        [*SEND[:2], PUBLISH_SENT, *SEND[2:-2], END],
    ],
    ids=["no barrier", "no fence before the sum", "no fence behind it", "weak publication", "published too early"],
)
def test_every_part_of_the_way_back_is_needed(mutant, version):
    assert sent(a_part_is_missing, mutant, version)
