"""Kernels to PTX and machine code for any architecture, on a machine without a GPU.

    python tests/lab.py                        # every kernel of numbabuf._cuda.kernels.KERNELS
    python tests/lab.py --arch sm_90 --show    # for one architecture, with the machine code itself

Compiling needs numba-cuda and a process that is not in the simulator; the test that reads the result may be
in one, so it runs this file as a program. ptxas and nvdisasm come from the extra `sass`, PATH or a toolkit.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from unittest import mock

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
TOOLS = ("ptxas", "nvdisasm")

_MEMORY_OPCODE = re.compile(r"\b((?:LDG|STG|LDL|STL|LDS|STS|LD|ST|LDGSTS|ATOM\w*|RED\w*)(?:\.[\w.]+)?)\s")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def find_tool(name):
    """Path of a toolkit program or None; the interpreter's own packages first: they match its NVVM."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(pathlib.Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def missing():
    """What this environment lacks for compiling, as a list of names; empty where it can compile."""
    lacking = [] if importlib.util.find_spec("numba_cuda") else ["numba-cuda"]
    return lacking + [tool for tool in TOOLS if find_tool(tool) is None]


def kernel_name(kernel):
    """Name of a dispatcher, of a simulated kernel or of a plain function."""
    return getattr(kernel, "py_func", getattr(kernel, "fn", kernel)).__name__


@contextlib.contextmanager
def _device_of(capability):
    """Device functions and overloads ask the current device what to compile for; answer in its place."""
    from numba.cuda import dispatcher

    device = types.SimpleNamespace(compute_capability=capability)
    with mock.patch.object(dispatcher, "get_current_device", lambda: device):
        yield


def compile_ptx(kernel, signature, arch):
    """PTX text of a kernel, compiled with the options of its decorator."""
    from numba import cuda

    options = getattr(kernel, "targetoptions", {})
    passed = {key: options[key] for key in ("fastmath", "lineinfo", "launch_bounds") if options.get(key)}
    major_minor = int(arch.removeprefix("sm_"))
    capability = divmod(major_minor, 10)
    with _device_of(capability):
        ptx, _ = cuda.compile(
            getattr(kernel, "py_func", kernel), signature, cc=capability, device=False, abi="numba", **passed
        )
    return ptx


def assemble(ptx, arch):
    """What ptxas says of a kernel and the machine code that nvdisasm reads back: (log, sass)."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(ptx.rstrip("\0"))
        log = _run(find_tool("ptxas"), "-v", f"-arch={arch}", str(source), "-o", str(cubin))
        return log, _run(find_tool("nvdisasm"), "-c", str(cubin))


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout + done.stderr


def examine(kernel, signature, arch):
    """A kernel's use of the machine on one architecture.

    Returns
    -------
    dict
        name, arch, registers (per thread), stack, spill_stores, spill_loads (bytes per thread),
        opcodes (memory instructions with their counts) and sass (the text).
    """
    log, sass = assemble(compile_ptx(kernel, signature, arch), arch)
    # ptxas gives one line of each kind per function: more than one where a function was not inlined.
    frames = [tuple(map(int, found)) for found in _STACK.findall(log)]
    stack, stores, loads = (sum(column) for column in zip(*frames, strict=True))
    return {
        "name": kernel_name(kernel),
        "arch": arch,
        "registers": max(map(int, _REGISTERS.findall(log))),
        "stack": stack,
        "spill_stores": stores,
        "spill_loads": loads,
        "opcodes": dict(Counter(_MEMORY_OPCODE.findall(sass))),
        "sass": sass,
    }


def controls():
    """Two kernels whose machine code is known, (kernel, signature) each: the checks must tell them apart."""
    from numba import cuda
    from numba.cuda import types as cuda_types

    def plain_copy(source, target):
        i = cuda.grid(1)
        if i < target.size:
            target[i] = source[i]

    def local_copy(source, target):
        kept = cuda.local.array(64, cuda_types.float32)
        for i in range(64):
            kept[i] = source[i]
        for i in range(target.size):
            target[i] = kept[(i * 7) % 64]  # indexed by a variable: cannot stay in registers

    signature = (cuda_types.float32[::1], cuda_types.float32[::1])
    return (plain_copy, signature), (local_copy, signature)


def main(argv=None):
    """Print, or give as JSON, what `examine` says of each kernel on each architecture."""
    parser = argparse.ArgumentParser(description="Compile kernels to machine code without a GPU.")
    parser.add_argument("--module", default="numbabuf._cuda.kernels", help="module with a KERNELS tuple")
    parser.add_argument("--controls", action="store_true", help="the lab's own two kernels instead")
    parser.add_argument("--arch", action="append", help=f"default: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    parser.add_argument("--show", action="store_true", help="print the machine code too")
    options = parser.parse_args(argv)
    kernels = controls() if options.controls else importlib.import_module(options.module).KERNELS
    rows = [examine(*pair, arch) for pair in kernels for arch in options.arch or ARCHITECTURES]
    if options.json:
        json.dump(rows, sys.stdout)
        return
    for row in rows:
        print(
            "{name:24} {arch:7} {registers:3} registers, {stack} B stack, "
            "{spill_stores}+{spill_loads} B spilled".format(**row)
        )
        print("    " + "  ".join(f"{opcode} x{count}" for opcode, count in sorted(row["opcodes"].items())))
        if options.show:
            print(row["sass"])


if __name__ == "__main__":
    # As a program this file's own folder comes first on the path; the package is one above.
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    main()
