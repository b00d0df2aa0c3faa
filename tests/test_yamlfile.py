"""Each trap of YAML: what is read, or the line and column at which it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xcli.errors import ConfigError
from xcli.yamlfile import DEEPEST, LARGEST_FILE, Mark, Place, read_yaml, write_inline, write_yaml


def data(text: str):
    document = read_yaml(text, "f.yaml")
    assert not document.faults
    return document.data


def faults(text: str) -> list[str]:
    found = read_yaml(text, "f.yaml").faults
    return [f"{mark.line}:{mark.column}: {what}" for _, mark, what, _ in found]


def refusal(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as error:
        read_yaml(text, "f.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100_000),
        (".5e2", 50),
        ("-2.5", -2.5),
        ("1.", 1.0),
        ("7", 7),
        ("0", 0),
        ("+3", 3),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("2026-01-31", "2026-01-31"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("0o17", "0o17"),
        ("~", None),
        ("null", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("=", "="),
    ],
)
def test_a_plain_value_is_read_as(text, value):
    found = data(f"key: {text}\n")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("k: 012", "1:4: a number with a leading zero has two readings; write 12 or '012'"),
        ("k: -007", "1:4: a number with a leading zero has two readings; write 7 or '-007'"),
        ("k: .inf", "1:4: .inf is not a finite number"),
        ("k: .nan", "1:4: .nan is not a finite number"),
        ("k: 1e999", "1:4: 1e999 is not a finite number"),
        ("k: 12345678901234567890", "1:4: a whole number of more than 18 digits"),
        ("k: !!int abc", "1:4: 'abc' is not a value of the tag !!int"),
        ("k: !!bool yes", "1:4: 'yes' is not a value of the tag !!bool"),
        (r'k: "\ud800"', "1:4: text with half a surrogate pair"),
        ("a: 1\nb: 2\na: 3", "3:1: given twice; first at 1:1"),
        ("1: x", "1:1: a key must be text; quote it: '1'"),
        ("true: x", "1:1: a key must be text; quote it: 'true'"),
        ("[a]: x", "1:1: a key must be text, not a list or a mapping"),
        ("a: &a {b: 1}\nc: {<<: *a}", "2:5: merge keys (<<) are not supported; write the keys out"),
        ("a: &a [*a]", "1:4: an alias that contains itself"),
    ],
)
def test_a_trap_is_refused_at_its_place(text, fault):
    assert faults(text) == [fault]


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!mine", "!!set", "!!binary", "!!timestamp"]
)
@pytest.mark.parametrize("value", ["[x]", "{x: }", "x"])
def test_a_foreign_tag_is_refused_at_its_place(tag, value):
    (fault,) = faults(f"ok: 1\nk: {tag} {value}")
    assert fault.startswith(f"2:4: the tag {tag!r} is not accepted")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "f.yaml:1:6: not valid YAML: "),
        (
            "a:\n\tb: 1",
            "f.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("a: b: c", "f.yaml:1:5: not valid YAML: mapping values are not allowed here"),
        ("path: -", "f.yaml:1:7: not valid YAML: a list cannot start here; a lone - is written '-'"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1: a second document starts here; a config is one document"),
        ("a: *b", "f.yaml:1:4: not valid YAML: found undefined alias 'b'"),
        ("ok: 1\nb: \x00", "f.yaml:2:4: a character that YAML does not allow"),
        (b"a: \xff", "f.yaml:1:4: not UTF-8 text (byte 0xff)"),
        (b"a: 1\nb: \xe9t\xe9", "f.yaml:2:4: not UTF-8 text (byte 0xe9)"),
        ("a: 1\n".encode("utf-16"), "f.yaml:1:1: not UTF-8 text (byte 0xff)"),
        ('a: "\\UFFFFFFFF"', "f.yaml: not valid YAML: "),
        ("[" * (DEEPEST + 1), f"f.yaml:1:{DEEPEST}: nested more than {DEEPEST} levels deep"),
        ("[" * 500_000, f"f.yaml:1:{DEEPEST}: nested more than {DEEPEST} levels deep"),
        ("#" * (LARGEST_FILE + 1), "f.yaml: larger than 1 MiB; this is not a config"),
    ],
)
def test_what_cannot_be_read_is_refused_whole(text, message):
    assert refusal(text).startswith(message)


def test_a_billion_laughs_are_cut_short():
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
    assert "aliases expanded" in refusal("\n".join(lines))


def test_aliases_are_followed_and_share_nothing():
    found = data("a: &a [1, 2]\nb: *a\n")
    found["a"].append(3)
    assert found == {"a": [1, 2, 3], "b": [1, 2]}


def test_positions_of_keys_and_values():
    positions = read_yaml("a:\n  - {b: 1, c:   2}\n  - x\n", "f.yaml").positions
    assert positions["a",] == Place(Mark(1, 1), Mark(2, 3))
    assert positions["a", 0, "c"] == Place(Mark(2, 12), Mark(2, 17))
    assert positions["a", 1] == Place(Mark(3, 5), Mark(3, 5))


def test_every_fault_is_found_and_the_rest_is_read():
    document = read_yaml("a: 012\nb: 1\nb: 2\nc: !x y\nd: 4", "f.yaml")
    assert document.data == {"a": None, "b": 1, "c": None, "d": 4}
    assert [(fault.path, fault.lost) for fault in document.faults] == [
        (("a",), True),
        (("b",), False),
        (("c",), True),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_key():
    assert read_yaml(b"\xef\xbb\xbfa: 1", "f").data == read_yaml("\ufeffa: 1", "f").data == {"a": 1}


def test_nothing_is_none():
    assert data("") is data("# only a comment\n") is data("---\n") is None


texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12) | st.sampled_from(
    [
        "no",
        "1e5",
        "012",
        "12:30",
        "<<",
        "=",
        "null",
        "true",
        "-",
        "",
        " x",
        "a: b",
        "#",
        "\x85",
        "\ufeff",
        "2026-01-31",
    ]
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_what_is_written_reads_back(value):
    assert data(write_yaml(value)) == value
    assert data(write_inline(value)) == value
