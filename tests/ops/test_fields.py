"""Checked fields of JSON: values that pass, and the messages for values that do not."""

import pytest

from cna_kernels import InputError
from cna_kernels.fields import Fields, is_number

RECORD = {"n": 3, "x": 0.5, "flag": True, "name": "a", "pairs": [[1, 2]], "inside": {"n": 7}, "empty": None}


def read(record=RECORD, prefix=""):
    return Fields(record, "f.json", prefix)


def is_pair(value):
    return isinstance(value, list) and len(value) == 2


def test_values():
    fields = read()
    assert fields.integer("n", (1, 3)) == 3 and fields.integer("empty", (1, 3), 2) == 2
    assert fields.number("n", (0, 9)) == 3.0 and type(fields.number("n", (0, 9))) is float
    assert fields.number("absent", (0, 9), None) is None
    assert fields.boolean("flag") is True and fields.boolean("absent", False) is False
    assert fields.text("name") == "a" and fields.one_of("name", ("a", "b")) == "a"
    assert fields.items("pairs", is_pair, "pairs") == [[1, 2]] and fields.items("absent", is_pair, "pairs", []) == []
    assert fields.object("inside").integer("n", (0, 9)) == 7 and fields.object("empty", None) is None
    fields.refuse("absent")
    fields.only(RECORD, "a test")


REFUSED = {
    "f.json: n: expected a whole number from 4 to 9, got 3": lambda f: f.integer("n", (4, 9)),
    "f.json: flag: expected a whole number from 0 to 9, got True": lambda f: f.integer("flag", (0, 9)),
    "f.json: x: expected a whole number from 0 to 9, got 0.5": lambda f: f.integer("x", (0, 9)),
    "f.json: flag: expected a number from 0 to 9, got True": lambda f: f.number("flag", (0, 9)),
    "f.json: x: expected a number from 1 to 1e+06, got 0.5": lambda f: f.number("x", (1, 1e6)),
    "f.json: n: expected true or false, got 3": lambda f: f.boolean("n"),
    "f.json: n: expected text, got 3": lambda f: f.text("n"),
    "f.json: name: expected b or c, got 'a'": lambda f: f.one_of("name", ("c", "b")),
    "f.json: absent: is missing": lambda f: f.text("absent"),
    "f.json: empty: expected text, got null": lambda f: f.text("empty"),
    "f.json: n: expected pairs, got 3": lambda f: f.items("n", is_pair, "pairs"),
    "f.json: pairs[0]: expected threes, got [1, 2]": lambda f: f.items("pairs", lambda x: len(x) == 3, "threes"),
    "f.json: name: expected a JSON object, got 'a'": lambda f: f.object("name"),
    "f.json: absent: is missing ": lambda f: f.object("absent"),
    "f.json: inside.n: expected text, got 7": lambda f: f.object("inside").text("n"),
    "f.json: inside.n: not a field of a test": lambda f: f.object("inside").only((), "a test"),
    "f.json: name: is not supported, got 'a'": lambda f: f.refuse("name", (None, "b")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_file_and_field(message):
    with pytest.raises(InputError) as caught:
        REFUSED[message](read())
    assert str(caught.value) == message.strip()


def test_what_is_no_object():
    with pytest.raises(InputError, match=r"^f\.json: expected a JSON object$"):
        read([1])


def test_long_values_are_cut():
    with pytest.raises(InputError) as caught:
        read({"n": "x" * 1000}).integer("n", (0, 9))
    assert len(str(caught.value)) < 130


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**309])
def test_numbers_that_no_double_holds(value):
    """JSON has whole numbers of any length; arithmetic with floats has not."""
    fields = Fields({"x": value, "list": [1, value]}, "here")
    assert not is_number(value)
    with pytest.raises(InputError, match="here: x: expected a number"):
        fields.number("x", (0, 1))
    with pytest.raises(InputError, match=r"here: list.1.: expected a number"):
        fields.items("list", is_number, "a number")
    assert is_number(10**308) and is_number(-1.5) and not is_number(float("nan")) and not is_number(True)
