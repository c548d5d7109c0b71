"""Service: the graph that covers a step, graphs that leave, and counts that outlive them."""

import pytest

from numbabuf import GraphMissingError, _cuda
from numbabuf.step.graph import CapturedStep, Step
from numbabuf.step.service import Service


def graph(*sizes, steps=0):
    made = CapturedStep(Step(None, {}, {}), sizes, sizes, 1)
    made.steps, made.live = steps, steps * 2
    return made


@pytest.fixture
def service():
    return Service(_cuda.as_stream(None))


def test_the_smallest_that_covers(service):
    with pytest.raises(GraphMissingError):
        service.covering((1,))
    small, large = graph(8), graph(32)
    service.adopt([large, small])
    assert list(service) == [small, large] and len(service) == 2
    assert [service.covering((size,)) for size in (0, 8, 9, 32, 33)] == [small, small, large, large, None]
    service.check()


def test_every_axis_has_to_be_covered(service):
    wide, deep = graph(32, 1), graph(8, 4)
    service.adopt([wide, deep])
    assert service.covering((8, 1)) is deep, "the fewest tokens, whatever else"
    assert service.covering((9, 1)) is wide
    assert service.covering((9, 2)) is None
    assert [service.largest(0), service.largest(1), service.largest(0, (2,))] == [32, 4, 8]


def test_a_graph_leaves_service_at_once_and_its_counts_stay(service):
    old, new, other = graph(8, steps=3), graph(8, steps=1), graph(16, steps=5)
    service.adopt([old, other])
    service.adopt([new])
    assert list(service) == [new, other]
    assert service.counts([graph(4, steps=1), graph(99)]) == {4: (1, 2), 8: (4, 8), 16: (5, 10)}
    service.close()
    assert (list(service), service.leaving) == ([], [])
    assert service.counts([]) == {8: (4, 8), 16: (5, 10)}
