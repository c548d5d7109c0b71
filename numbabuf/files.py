"""Files that come from elsewhere, read within limits, and files of ours, replaced whole or not at all.

Only regular files are read: a FIFO or a device has no end to wait for. Compressed data is expanded up to a limit that
follows from its own size, so that a small file cannot fill the memory. Bytes and arrays only: nothing here knows what
is in them. Sits above `checks`, below `demand` and `traces`.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import secrets
import stat
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_BYTES", "allowance", "array_names", "expand", "read_arrays", "read_regular", "replace"]

MOST_BYTES = 1 << 30
"""Largest file that is read, and the most that a compressed one may expand to."""

_FREELY = 32 << 20
"""Bytes that any compressed file may expand to."""

_RATIO = 100
"""Beyond that, bytes that each byte of a compressed file may expand to; text reaches 20, a bomb 1,000."""


def allowance(nbytes: int) -> int:
    """Return how many bytes a compressed file of `nbytes` may expand to.

    Examples
    --------
    >>> allowance(1 << 20) == 100 << 20
    True
    """
    return min(MOST_BYTES, max(_FREELY, _RATIO * nbytes))


def read_regular(path: str | os.PathLike[str], *, most: int = MOST_BYTES) -> bytes:
    """Return the contents of a regular file of at most `most` bytes.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is a FIFO or a device, or larger than `most`.
    """
    # A FIFO without a writer would block an `open` without O_NONBLOCK; a regular file does not care.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise ValueError("it is not a regular file: copy its contents to one")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(handle)
    if len(data) > most:
        raise ValueError(f"it is larger than {most:,} bytes, the most that is read: give a smaller one")
    return data


def expand(data: bytes) -> bytes:
    """Return what gzip-compressed data expands to.

    Raises
    ------
    ValueError, OSError, EOFError, zlib.error
        It expands to more than `allowance`, or is damaged.
    """
    most = allowance(len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"{len(data):,} bytes expand to more than {most:,}: give the file uncompressed")
    return found


def read_arrays(data: bytes, names: set[str] | None = None) -> dict[str, NDArray[Any]]:
    """Return the arrays of an NPZ file by name, all of them or those in `names`; no pickled object is loaded.

    Raises
    ------
    ValueError
        They expand to more than `allowance`.
    Exception
        The file is damaged: numpy and zipfile raise a dozen kinds, RuntimeError among them.
    """
    most = allowance(len(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
            raise ValueError("its compression is not one that numpy.savez_compressed writes")
        if sum(member.file_size for member in members) > most:
            raise ValueError(f"{len(data):,} bytes expand to more than {most:,}")
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        return {name: found[name] for name in found.files if names is None or name in names}


def array_names(data: bytes) -> list[str]:
    """Return the names of all arrays of an NPZ file that `read_arrays` reads."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` in the place of the file at `path`, all of it or nothing; a link stays a link.

    Raises
    ------
    OSError
        It cannot be written; what was there is there still.
    ValueError
        There is something that is not a regular file.

    Notes
    -----
    Threads and processes: each call writes a file of its own beside the target and renames it, so that a reader sees
    one whole file, and the last to rename stays.
    """
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise ValueError(f"{os.fspath(path)} is not a regular file: give the path of a file to write")
    partial = os.path.join(os.path.dirname(target), f".numbabuf-{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            if os.path.exists(target):  # as private as it was
                os.chmod(partial, stat.S_IMODE(os.stat(target).st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError) and error.errno is not None:  # named after the file that was asked for
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from None
        raise
