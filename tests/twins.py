"""NumPy twins of numbabuf's kernels: slow, obvious, and what every test compares bit for bit.

A twin has its kernel's name. The conversions are NumPy's own `astype`, and ml_dtypes' for bfloat16; the padding is
`numpy.pad`. Knows nothing of rings, buckets or devices.
"""

import numpy as np


def convert(data, dtype):
    """`data` as `dtype`, with NumPy's (or ml_dtypes') rounding and silent overflow."""
    with np.errstate(all="ignore"):
        return np.asarray(data).astype(dtype)


def fill_slot(before, data, padded, pad):
    """One slot after a fill.

    Parameters
    ----------
    before : array, shape (capacity, ...)
        The whole slot before, in its own element type.
    data : array or None
        The live values in the staged element type; in two dimensions the rows may be shorter than the slot's.
        None: nothing was staged.
    padded : int
        Rows of the slot that are valid after the fill.
    pad : scalar, "repeat_last" or "keep"
    """
    if before.ndim == 0:
        data = None if data is None else np.reshape(data, 1)
        return fill_slot(before.reshape(1), data, padded, pad).reshape(())
    after = before.copy()
    live = np.zeros((0, *before.shape[1:]), before.dtype) if data is None else convert(data, before.dtype)
    region = tuple(slice(0, n) for n in live.shape)
    window = after[:padded]
    if isinstance(pad, str) and pad == "keep":
        window[region] = live
    elif isinstance(pad, str) and live.size == 0:
        window[...] = np.zeros((), before.dtype)
    else:
        missing = [(0, whole - part) for whole, part in zip(window.shape, live.shape, strict=True)]
        if isinstance(pad, str):
            window[...] = np.pad(live, missing, mode="edge")
        else:
            window[...] = np.pad(live, missing, constant_values=convert(pad, before.dtype))
    return after


def fill_slots(before, inputs, padded, pads):
    """All slots after a fill: `fill_slot` for each name in `before`; `inputs` may leave names out."""
    return {name: fill_slot(before[name], inputs.get(name), padded[name], pads[name]) for name in before}


def bits(array):
    """An array's bytes, one row per element, for comparisons that tell NaNs and zeros of both signs apart."""
    array = np.ascontiguousarray(array)
    return array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize)


def differences(found, wanted):
    """Where two arrays differ in any bit: the indices of the first few elements, in flat order."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return np.flatnonzero((bits(found) != bits(wanted)).any(axis=1))[:5].tolist()


def assert_same(found, wanted, what=""):
    """Assert that two arrays have the same bits; uint16 stands for bfloat16, which Numba cannot type."""
    at = differences(found, wanted)
    assert not at, (
        f"{what}: elements {at} are {found.reshape(-1)[at].tolist()}, wanted {wanted.reshape(-1)[at].tolist()}"
    )


class Slots:
    """What a manager's static slots hold, step after step.

    Parameters
    ----------
    manager
        Read for the slots' specs, axes and pads alone.
    """

    def __init__(self, manager):
        self.slots = {slot.name: slot for slot in manager.slots if slot.static}
        self.contents = {name: np.zeros(slot.spec.shape, slot.spec.dtype) for name, slot in self.slots.items()}
        self.written = set()

    def rows(self, name, sizes):
        """Rows of a slot in a step of `sizes` (axis -> size)."""
        slot = self.slots[name]
        return slot.capacity if slot.axis is None else min(slot.capacity, sizes[slot.axis] + slot.extra)

    def step(self, inputs, bucket):
        """One step: every slot is filled with its input, or with none, and padded to `bucket` (axis -> size)."""
        padded = {name: self.rows(name, bucket) for name in self.slots}
        pads = {name: slot.pad for name, slot in self.slots.items()}
        kept = {
            name: self.contents[name]
            for name, slot in self.slots.items()
            if slot.keeps and name in self.written and inputs.get(name) is None
        }
        self.contents = {**fill_slots(self.contents, inputs, padded, pads), **kept}
        self.written.update(name for name, data in inputs.items() if data is not None)

    def assert_same(self, found):
        """Compare with the contents of the manager's slots, by name."""
        assert found.keys() == self.contents.keys()
        for name, wanted in self.contents.items():
            if wanted.dtype.name == "bfloat16":
                wanted = wanted.view(np.uint16)
            assert_same(found[name], wanted, name)
