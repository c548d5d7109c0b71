"""What the kernels become: machine code for each architecture, read without a GPU.

A spill is a kernel that waits for memory nobody asked for; a 16-byte access that became four is a fill at a
fraction of the bus. Both are silent in every other test.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import lab
import pytest

from numbabuf._cuda import kernels

pytestmark = pytest.mark.skipif(
    bool(lab.missing()),
    reason=f"compiling to machine code needs {', '.join(lab.missing())}; pip install -e .[cu13,sass]",
)


def examine(*arguments):
    """Run the lab in a process of its own, outside the simulator: {(kernel number, architecture): row}."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    program = pathlib.Path(lab.__file__)
    done = subprocess.run(
        [sys.executable, str(program), "--json", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=program.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    per_kernel = len({row["arch"] for row in rows})
    return {(index // per_kernel, row["arch"]): row for index, row in enumerate(rows)}


@pytest.fixture(scope="module")
def compiled():
    return examine()


@pytest.fixture(scope="module")
def controls():
    return examine("--controls", "--arch", "sm_90")


def spilled_bytes(row):
    return row["spill_stores"] + row["spill_loads"]


def local_accesses(row):
    return [opcode for opcode in row["opcodes"] if opcode.startswith(("LDL", "STL"))]


def wide_accesses(row, kind):
    """128-bit loads ("LDG") or stores ("STG") of global memory."""
    return sum(n for opcode, n in row["opcodes"].items() if opcode.startswith(kind) and ".128" in opcode)


NAMES = [lab.kernel_name(kernel) for kernel, _ in kernels.KERNELS]
EVERY_KERNEL = pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
EVERY_ARCHITECTURE = pytest.mark.parametrize("arch", lab.ARCHITECTURES)
STREAMING = [number for number, name in enumerate(NAMES) if name.startswith(("fill", "copy", "send"))]


def test_the_lab_sees_local_memory_and_narrow_accesses(controls):
    plain, local = controls[0, "sm_90"], controls[1, "sm_90"]
    assert not local_accesses(plain) and plain["stack"] == 0
    assert local_accesses(local) and local["stack"] > 0
    assert plain["opcodes"]["LDG.E"] == 1 and wide_accesses(plain, "LDG") == 0


def test_there_are_kernels_that_fill_and_copy():
    assert STREAMING


@EVERY_ARCHITECTURE
@EVERY_KERNEL
def test_no_spills_and_no_local_memory(compiled, number, arch):
    row = compiled[number, arch]
    assert row["name"] == NAMES[number]
    assert spilled_bytes(row) == 0
    assert local_accesses(row) == []
    assert row["stack"] == 0


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("number", STREAMING, ids=[NAMES[number] for number in STREAMING])
def test_fills_and_copies_use_128_bit_accesses(compiled, number, arch):
    row = compiled[number, arch]
    assert wide_accesses(row, "LDG") > 0, row["opcodes"]
    assert wide_accesses(row, "STG") > 0, row["opcodes"]


FILL = NAMES.index("fill_slots")
REGISTERS = {"sm_75": 96, "sm_80": 96, "sm_90": 70, "sm_100": 80}
"""What a thread of `fill_slots` may use: more would leave fewer warps to hide the reads of host memory."""


@EVERY_ARCHITECTURE
def test_the_fill_keeps_to_its_registers(compiled, arch):
    assert compiled[FILL, arch]["registers"] <= REGISTERS[arch]


@EVERY_ARCHITECTURE
def test_the_fill_publishes_by_one_strong_store_behind_its_fences(compiled, arch):
    """The order that `tests/_cuda/test_memory_model.py` proves right, as the machine runs it."""
    row = compiled[FILL, arch]
    strong = {opcode: n for opcode, n in row["opcodes"].items() if opcode.startswith("STG") and "STRONG" in opcode}
    assert strong == {"STG.E.64.STRONG.SYS": 1}
    kinds = r"BAR\.SYNC|MEMBAR\.SC\.GPU|ATOMG\.E\.ADD|MEMBAR\.SC\.SYS|STG\.E\.64\.STRONG\.SYS|STG"
    found = re.findall(rf"/\*[0-9a-f]+\*/\s+(?:@!?\w+ +)?({kinds})", row["sass"])
    end = found[found.index("BAR.SYNC") :]
    assert end[:4] == ["BAR.SYNC", "MEMBAR.SC.GPU", "ATOMG.E.ADD", "MEMBAR.SC.SYS"]
    assert end[-1] == "STG.E.64.STRONG.SYS"
    assert end[4:-1] in (["STG"], ["STG", "STG"])  # DONE and STEP, which lie side by side


SEND = NAMES.index("send_slots")


@EVERY_ARCHITECTURE
def test_the_way_back_publishes_by_one_strong_store_behind_its_fences(compiled, arch):
    row = compiled[SEND, arch]
    strong = {opcode: n for opcode, n in row["opcodes"].items() if opcode.startswith("STG") and "STRONG" in opcode}
    assert strong == {"STG.E.64.STRONG.SYS": 1}
    kinds = r"BAR\.SYNC|MEMBAR\.SC\.SYS|ATOMG\.E\.ADD|STG\.E\.64\.STRONG\.SYS|STG"
    found = re.findall(rf"/\*[0-9a-f]+\*/\s+(?:@!?\w+ +)?({kinds})", row["sass"])
    end = found[found.index("BAR.SYNC") :]
    assert end == ["BAR.SYNC", "MEMBAR.SC.SYS", "ATOMG.E.ADD", "MEMBAR.SC.SYS", "STG", "STG.E.64.STRONG.SYS"]
    assert row["registers"] <= REGISTERS[arch]
