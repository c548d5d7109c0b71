"""What is here and what is missing: device, driver, versions, tiers, limits, and the command that installs the rest.

Only looks: nothing is allocated, and without a device everything but the device is still told. Sits above `config` and
`_cuda`; nothing imports it but `cli`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from .. import _cuda, config
from ..checks import nbytes
from ..errors import NumbabufError
from ..pool.spec import Tier

__all__ = ["collect", "render"]

EXTRAS = {
    "ml_dtypes": ("bfloat16", "bfloat16 slots and buffers"),
    "tqdm": ("progress", "progress bars instead of plain counters"),
    "matplotlib": ("plot", "pictures: numbabuf.plots, plan --plot"),
    "nvtx": ("nvtx", "ranges for Nsight Systems"),
    "prometheus_client": ("prometheus", "metrics on scrape"),
    "distributed": ("dask", "a manager per Dask worker"),
}
"""Module -> (the extra that brings it, what it is for)."""

WITHOUT_GPU = "Without a GPU the same code runs in Numba's simulator: set NUMBA_ENABLE_CUDASIM=1 before Python starts."

PACKAGES = ("numbabuf", "numba", "numba-cuda", "cuda-core", "numpy")


def collect(problem: str | None = None) -> dict[str, Any]:
    """Return what is known of this machine, as plain values.

    Parameters
    ----------
    problem : str, optional
        Why no GPU can be used, where the caller knows.

    Returns
    -------
    info : dict
        "backend" ("cuda", "simulator" or None), "problem", "device", "versions", "tiers", "switches", "missing".

    Notes
    -----
    Makes the device's context current in this thread, if there is a device.
    """
    backend, problem, device = _found(problem)
    return {
        "backend": backend,
        "problem": problem,
        "device": device,
        "versions": _versions(),
        "tiers": _tiers(backend, device),
        "switches": {
            switch.name: {"value": _value(switch), "set": switch.name in os.environ, "help": switch.help}
            for switch in config.SWITCHES
        },
        "missing": _missing(),
    }


def _found(problem: str | None) -> tuple[str | None, str | None, dict[str, Any]]:
    """Return backend, why there is none, and what is known of the device."""
    backend = _cuda.backend()
    if backend != "cuda":
        return backend, problem, {"name": "Numba's simulator (results, not speed)"}
    try:
        if problem is not None:
            raise NumbabufError(problem)
        return backend, None, _device()
    except Exception as error:  # a driver can fail in many ways, and this command is asked why
        return None, str(error), {}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "numbabuf":
                versions[package] = "not installed, imported from its folder"
    return versions


def _missing() -> list[dict[str, str]]:
    """Return what could be installed, what it is for, and the command."""
    wanted = [(module, what, extra) for module, (extra, what) in EXTRAS.items()]
    wanted.insert(0, ("numba_cuda", "any GPU: the extra that fits its driver, cu12 or cu13", "cu13"))
    return [
        {"module": module, "for": what, "command": f"pip install 'numbabuf[{extra}]'"}
        for module, what, extra in wanted
        if importlib.util.find_spec(module) is None
    ]


def _value(switch: config.Switch) -> str:
    try:
        return "on" if config.enabled(switch.name) else "off"
    except ValueError:
        return f"neither on nor off, but {os.environ[switch.name]!r}"


def _device() -> dict[str, Any]:
    """The device of this thread, as the driver describes it."""
    current = _cuda.cuda.get_current_device()
    found: dict[str, Any] = {
        "name": _cuda.device_name(),
        "compute capability": ".".join(map(str, current.compute_capability)),
        "multiprocessors": int(current.MULTIPROCESSOR_COUNT),
        "driver": ".".join(map(str, _cuda.cuda.cudadrv.driver.driver.get_version())),
        "managed memory": bool(current.MANAGED_MEMORY),
        "managed memory migrates on demand": bool(current.CONCURRENT_MANAGED_ACCESS),
    }
    memory = _cuda.memory_info()
    if memory is not None:
        found["free"], found["total"] = memory
    return found


def _tiers(backend: str | None, device: dict[str, Any]) -> dict[str, str]:
    """What each tier is here, and how much of it there is."""
    try:
        host = nbytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        host = "unknown"
    if backend is None:
        return {tier.value: "no device" for tier in Tier}
    if backend == "simulator":
        return {tier.value: f"host memory, {host} in all" for tier in Tier}
    room = f"{nbytes(device['free'])} free of {nbytes(device['total'])}" if "free" in device else "unknown"
    managed = room if device["managed memory"] else "not offered by this device"
    return {"device": room, "managed": managed, "pinned": f"page-locked host memory, {host} in all"}


def render(info: dict[str, Any]) -> str:
    """Return what `collect` found as text for a terminal."""
    device = info["device"]
    rows = [("backend", info["backend"] or f"none: {info['problem']}")]
    for name, value in device.items():
        rows.append(("device" if name == "name" else name, nbytes(value) if name in ("free", "total") else str(value)))
    switches = info["switches"].items()
    sections = {
        "": rows,
        "versions": list(info["versions"].items()),
        "tiers": list(info["tiers"].items()),
        "switches": [(name, f"{it['value']}{' (set)' if it['set'] else ''}: {it['help']}") for name, it in switches],
        "missing": [(gap["module"], f"{gap['command']}   # {gap['for']}") for gap in info["missing"]],
    }
    lines = []
    for title, entries in sections.items():
        if title and entries:
            lines += ["", title]
        lines += [f"{'  ' if title else ''}{name:<{34 - 2 * bool(title)}} {value}" for name, value in entries]
    if info["backend"] is None:
        lines += ["", WITHOUT_GPU]
    return "\n".join(lines)
