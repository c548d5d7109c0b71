"""What a whole number is, and what is said of anything else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbabuf.checks import whole_number


@given(st.integers(), st.integers(), st.integers())
def test_a_number_comes_back_if_it_is_in_range(number, least, most):
    if least <= number <= most:
        assert whole_number("n", number, least=least, most=most) == number
    else:
        with pytest.raises(ValueError, match=rf"^n is {number}: .*{least} to {most}"):
            whole_number("n", number, least=least, most=most)


@pytest.mark.parametrize("value", [7, np.int8(7), np.uint64(7), np.array(7)])
def test_what_python_takes_for_an_index_is_a_plain_int(value):
    found = whole_number("n", value)
    assert type(found) is int and found == 7


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float32(2), "2", None, float("nan"), [2], np.array([2, 3])])
def test_anything_else_is_refused_by_name_value_and_type(value):
    with pytest.raises(TypeError, match="^max_bytes is .*whole number") as caught:
        whole_number("max_bytes", value)
    assert repr(value) in str(caught.value) and type(value).__name__ in str(caught.value)


def test_the_least_is_nought_unless_told_and_there_is_no_most():
    assert whole_number("n", 0) == 0 and whole_number("n", 1 << 70) == 1 << 70
    with pytest.raises(ValueError, match="n is -1: give a whole number >= 0"):
        whole_number("n", -1)
