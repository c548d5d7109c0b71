"""Graphs: the graph that covers a step, graphs that leave, and counts that outlive them."""

import pytest

from numbabuf import _cuda
from numbabuf.step.graph import CapturedStep, Step
from numbabuf.step.graphs import Graphs


def graph(*sizes, steps=0):
    made = CapturedStep(Step(None, {}, {}), sizes, sizes, None)
    made.steps, made.live = steps, steps * 2
    return made


@pytest.fixture
def table():
    return Graphs(_cuda.as_stream(None))


def test_the_smallest_that_covers(table):
    assert table.covering((1,)) is None
    small, large = graph(8), graph(32)
    table.add([large, small])
    assert list(table) == [small, large] and len(table) == 2
    assert [table.covering((size,)) for size in (0, 8, 9, 32, 33)] == [small, small, large, large, None]
    table.check()


def test_every_axis_has_to_be_covered(table):
    wide, deep = graph(32, 1), graph(8, 4)
    table.add([wide, deep])
    assert table.covering((8, 1)) is deep, "the fewest tokens, whatever else"
    assert table.covering((9, 1)) is wide
    assert table.covering((9, 2)) is None
    assert [table.largest(0), table.largest(1), table.largest(0, (2,))] == [32, 4, 8]


def test_a_graph_leaves_the_table_at_once_and_its_counts_stay(table):
    old, new, other = graph(8, steps=3), graph(8, steps=1), graph(16, steps=5)
    table.add([old, other])
    table.add([new])
    assert list(table) == [new, other]
    assert table.exact((8,)) is new and table.exact((9,)) is None
    table.retire(graph(4, steps=1))
    assert table.counts() == {4: (1, 2), 8: (4, 8), 16: (5, 10)}
    table.close()
    assert (list(table), table.leaving) == ([], [])
    assert table.counts() == {4: (1, 2), 8: (4, 8), 16: (5, 10)}
