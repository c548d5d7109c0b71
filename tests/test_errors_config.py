"""The exceptions keep their promises to `except` clauses; the switches are read in one place, and strictly."""

import inspect

import pytest

from numbabuf import config, errors
from numbabuf.errors import NumbabufError

OWN = [value for _, value in inspect.getmembers(errors, inspect.isclass)]


def test_every_error_is_numbabufs_and_says_what_it_is():
    assert len(OWN) >= 10
    for error in OWN:
        assert issubclass(error, NumbabufError) and inspect.getdoc(error)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.TierFullError, MemoryError),
        (errors.BucketOverflowError, ValueError),
        (errors.GraphMissingError, LookupError),
        (errors.StaleBufferError, RuntimeError),
        (errors.ClosedError, RuntimeError),
        (errors.BusyError, RuntimeError),
        (errors.CaptureError, RuntimeError),
        (errors.BackendError, RuntimeError),
        (errors.TraceError, ValueError),
    ],
)
def test_errors_are_also_what_python_calls_them(error, builtin):
    assert issubclass(error, builtin)
    assert str(error("text")) == "text"


@pytest.mark.parametrize("switch", config.SWITCHES, ids=lambda switch: switch.name)
def test_a_switch_has_a_default_and_is_read_when_asked(switch, monkeypatch):
    monkeypatch.delenv(switch.name, raising=False)
    assert config.enabled(switch.name) is switch.default
    assert switch.name.startswith("NUMBABUF_") and switch.help
    for text, value in (("1", True), (" ON ", True), ("yes", True), ("True", True), ("0", False), ("off", False)):
        monkeypatch.setenv(switch.name, text)
        assert config.enabled(switch.name) is value
    for text in ("", "  "):
        monkeypatch.setenv(switch.name, text)
        assert config.enabled(switch.name) is switch.default
    monkeypatch.setenv(switch.name, "maybe")
    with pytest.raises(ValueError, match=f"{switch.name} is 'maybe'"):
        config.enabled(switch.name)
    with pytest.warns(RuntimeWarning, match=f"{switch.name} is 'maybe'"):
        assert config.enabled(switch.name, or_warn=True) is switch.default


def test_an_unknown_switch_is_a_mistake():
    with pytest.raises(KeyError):
        config.enabled("NUMBABUF_NO_SUCH_SWITCH")
