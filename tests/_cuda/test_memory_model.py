"""The end of `fill_slots` under the axioms of the PTX memory model: what may be read, in any execution they allow.

No machine at hand shows what these rows show. The kernel's last lines are restated as loads, stores, atomics and fences
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
    sys.path.insert(0, str(CHECKER))
    try:
        from ptxmm import check
    finally:
        sys.path.remove(str(CHECKER))
    other = OTHER_THREAD if BARRIER in kernel else READ
    threads = [(0, 0, kernel, {}), (0, 0, other, {}), (1, 0, kernel, {}), (9, 9, HOST, {})]
    return bool(check(threads, START, version, want=question, stop=True))


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
