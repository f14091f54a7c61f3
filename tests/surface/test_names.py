"""Names: code by `module:name`, prefixes, nested tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.base.errors import UsageError
from atoll.base.names import dotted, load, load_from_user, under, without_prefix

words = st.text("abc/.", min_size=1, max_size=5)


@given(st.text("ab/", max_size=3), st.dictionaries(words, st.integers()))
def test_a_prefix_is_put_and_taken_away(prefix, values):
    assert without_prefix(under(prefix, values), prefix) == values


def test_another_prefix_is_left_out():
    assert without_prefix({"a/x": 1, "b/x": 2, "ab/x": 3}, "a/") == {"x": 1}


def test_code_by_name():
    assert load("pathlib:Path.home").__name__ == "home"
    with pytest.raises(UsageError, match="No module is called 'absent'"):
        load_from_user("absent:x")
    with pytest.raises(UsageError, match="has no class or function 'Pth'") as refusal:
        load_from_user("pathlib:Pth")
    assert refusal.value.line == "pathlib:Path"
    with pytest.raises(UsageError, match="has no class or function 'huber'") as refusal:
        load_from_user("pathlib:huber")
    assert not refusal.value.line, "no name is similar"


def test_nested_tables():
    assert dotted({"a": 1, "b": {"c": {"d": 2}, "e": 3}}) == {"a": 1, "b.c.d": 2, "b.e": 3}
