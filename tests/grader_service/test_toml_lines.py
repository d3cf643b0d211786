"""On which line a key stands, whatever the text around it looks like."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grader_service.toml_lines import Key, line_of, lines_of


def expected(text: str) -> dict[Key, int]:
    """Keys as the text itself says: each line with one ends in `# = key key ...`, numbers for positions."""
    found: dict[Key, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        for comment in line.split("# = ")[1:]:
            for key in comment.strip().split(" & "):
                found[tuple(int(part) if part.isdecimal() else part for part in key.split())] = number
    return found


EXAMPLES = [
    "a = 1 # = a",
    "\n# a = 1\n\n a = 1 # = a\n",
    "[t] # = t\na = 1 # = t a\n[t.u] # = t u\na = 1 # = t u a\n[w.x] # = w & w x\n",
    "a.b = 1 # = a & a b\na.c = 2 # = a c\n",
    "[t.u] # = t u\n[t] # = t\nx = 1 # = t x\n",
    'a = """ # = a\n[t]\nb = 1\n"""\nb = 2 # = b\n',
    "a = ''' # = a\n'''\nb = 0 # = b",
    "a = [ # = a & a 0 & a 1 & a 1 b\n  1, # [t]\n  { b = ']' },\n\n]\nc = [] # = c\n",
    (
        "[[t]] # = t & t 0\na = 1 # = t 0 a\n[t.u] # = t 0 u\n[[t]] # = t 1\n"
        "[[t.v]] # = t 1 v & t 1 v 0\n[[t.v]] # = t 1 v 1\nb=1 # = t 1 v 1 b\n"
    ),
    "a = {b = 1, c.d = {e = 2}} # = a & a b & a c & a c d & a c d e",
    'a = "# \\" ]" # = a',
    "a = 1\r\n[t]\r\nb = 2\r\n",
    "",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_lines_of_examples(text: str) -> None:
    tomllib.loads(text)
    if "\r" in text:
        assert lines_of(text) == {("a",): 1, ("t",): 2, ("t", "b"): 3}
    else:
        assert lines_of(text) == expected(text)
        assert lines_of(text.replace("\n", "\r\n")) == expected(text)


def test_quoted_keys_are_one_name() -> None:
    assert lines_of("[courses.'a.b']\n\"c d\".e = 1\n") == {
        ("courses",): 1,
        ("courses", "a.b"): 1,
        ("courses", "a.b", "c d"): 2,
        ("courses", "a.b", "c d", "e"): 2,
    }


def test_a_missing_key_is_missing_from_the_table_around_it() -> None:
    lines = lines_of("a = 1\n[t]\n[t.u]\n")
    assert line_of(("t", "u", "x", "y"), lines) == 3
    assert line_of(("t", "x"), lines) == 2
    assert line_of(("x",), lines) is None


NAMES = st.text(min_size=1, max_size=6)
SPACE = st.sampled_from(["", " ", "\t", "  "])
NOISE = st.sampled_from(["", "# comment ''' [", "   ", "#"])
VALUES: st.SearchStrategy[str] = st.one_of(
    st.integers().map(str),
    st.sampled_from(
        ['"]"', "'#'", '"""\n[x]\ny = 1\n"""', "'''\n\n'''", "[\n1,\n# ]\n2]", "[]", "{}", "{ a = '''\n''' }"]
    ),
)


def quoted(name: str) -> str:
    """A basic string. toml.io, "String"."""
    return '"' + "".join(f"\\U{ord(c):08X}" if c in '"\\' or not c.isprintable() else c for c in name) + '"'


@given(st.data())
def test_the_line_of_every_key_in_any_text(data: Any) -> None:
    lines: list[str] = []
    keys: dict[Key, int] = {}

    def say(text: str) -> int:
        lines.extend(data.draw(st.lists(NOISE, max_size=2)))
        begin = len(lines) + 1
        lines.extend(
            (data.draw(SPACE) + text + data.draw(SPACE) + data.draw(st.sampled_from(["", "# '''"]))).split("\n")
        )
        return begin

    for table in [None, *data.draw(st.lists(NAMES, max_size=4, unique=True))]:
        if table is not None:
            keys["tables", table] = say(f"[{data.draw(SPACE)}tables . {quoted(table)}]")
        for name in data.draw(st.lists(NAMES.filter(lambda name: name != "tables"), max_size=4, unique=True)):
            line = say(f"{quoted(name)}{data.draw(SPACE)}= {data.draw(VALUES)}")
            keys[("tables", table, name) if table is not None else (name,)] = line
    text = "\n".join(lines)
    assert set(tomllib.loads(text)) == {key[0] for key in keys}
    found = lines_of(text)
    assert {key: found[key] for key in keys} == keys
