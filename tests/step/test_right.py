"""The right to do something alone: one thread has it, nothing stays taken, and no two threads wait for each other."""

import signal
import threading

import pytest

from numbabuf import BusyError, CaptureError
from numbabuf.step.right import CaptureRight, Right


def elsewhere(act):
    """Run `act` in another thread; return what it raised."""
    raised = []

    def run():
        try:
            act()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised


def take(right, **options):
    with right.held(**options):
        pass


@pytest.mark.parametrize("make", [lambda: Right("taken"), CaptureRight])
def test_one_thread_at_a_time(make):
    right = make()
    assert right.thread is None
    with right.held():
        assert right.thread == threading.get_ident()
        (error,) = elsewhere(lambda: take(right, wait=False))
        assert isinstance(error, BusyError)
    assert right.thread is None and elsewhere(lambda: take(right, wait=False)) == []


def test_it_is_waited_for():
    right, order = Right("taken"), []
    began = threading.Event()

    def second():
        began.set()
        with right.held():
            order.append("second")

    with right.held():
        thread = threading.Thread(target=second)
        thread.start()
        assert began.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_a_thread_that_holds_one_waits_for_no_other():
    """Two threads that hold a right each, and want the other's, would wait for each other for ever."""
    one, two = Right("one is taken"), Right("two is taken")
    both, errors = threading.Barrier(2), []

    def hold(first, second):
        with first.held():
            both.wait(60)
            try:
                take(second)
            except BusyError as error:
                errors.append(str(error))
            both.wait(60)

    threads = [threading.Thread(target=hold, args=rights, daemon=True) for rights in ((one, two), (two, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(errors) == ["one is taken", "two is taken"]


def test_one_that_is_dropped_in_another_thread_is_free():
    right, blocks = CaptureRight(), []

    def enter():
        blocks.append(right.held())
        blocks[0].__enter__()

    assert elsewhere(enter) == [] and right.thread is not None
    blocks.clear()
    assert right.thread is None
    take(right)


def test_a_signal_handler_in_the_middle_of_taking_it(request):
    """The handler takes and gives back the right itself; what it interrupted goes on as if nothing had been."""
    right, taken = Right("taken"), []

    def handler(number, frame):
        take(right, wait=False)
        taken.append(True)

    before = signal.signal(signal.SIGUSR1, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGUSR1, before))
    signal.raise_signal(signal.SIGUSR1)
    with right.held():
        pass
    with right.held(), pytest.raises(BusyError):
        signal.raise_signal(signal.SIGUSR1)
    assert taken == [True] and right.thread is None


def test_a_thread_that_captures_is_refused_a_second_capture():
    right = CaptureRight()
    with right.held(), pytest.raises(CaptureError, match="cannot capture others"):
        take(right)
