"""What RE2 lacks is refused when it is written. (The table was held against RE2 itself.)"""

import pytest

from controlplane.resources.regex import check_re2, check_substitution


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("", 0),
        ("/api/v[0-9]+/.*", 0),
        ("^/(a|b)?/(?:c)+?$", 1),
        ("(?P<name>a)(?<other>b)(?i:c)(?s-m)", 2),
        (r"\d\W\b\.\-\x41\x{E9}\pL\P{^Greek}\t\z", 0),
        (r"[]a][^]-][\d\-x][a-z\x00-\x1f][[:alpha:][:^digit:]_]", 0),
        ("a{3}b{2,}c{1,1000}?d{,3}e{", 0),
        ("(a{100}){10}", 1),
        ("é+漢", 0),
    ],
)
def test_re2_is_accepted_and_its_groups_are_counted(text: str, groups: int) -> None:
    assert check_re2(text) == groups


@pytest.mark.parametrize(
    "text",
    [
        "(?=a)",
        "(?!a)",
        "(?<=a)b",
        "(?<!a)b",
        "(?>a)",
        "(?#a)",
        r"(a)\1",
        r"\k<a>",
        r"\Z",
        r"\é",
        "a++",
        "a**",
        "a{2}{3}",
        "*a",
        "(|*)",
        "(?i)*",
        "a{1001}",
        "a{3,2}",
        "((a{100}){11})",
        "(a",
        "a)",
        "[a",
        "[z-a]",
        r"[a-\d]",
        "[[:latin:]]",
        r"\p{Klingon}",
        r"\x{110000}",
        r"\x{100}",
        "\\",
        "(?P<n>a)(?P<n>b)",
        "(?P<a-b>c)",
        "(" * 60 + ")" * 60,
        r"(?:\pL{5}){2}",
        "(.{30}){30}",
    ],
)
def test_what_re2_lacks_or_a_proxy_would_choke_on_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an RE2 expression|is too large"):
        check_re2(text)


def test_the_place_is_named() -> None:
    with pytest.raises(ValueError, match=r"look-around.* at position 3"):
        check_re2("ab(?=c)")


@pytest.mark.parametrize("text", ["", "/b", r"/\1/\2", r"\\", r"\0"])
def test_a_substitution_may_use_the_groups(text: str) -> None:
    check_substitution(text, groups=2)


@pytest.mark.parametrize("text", [r"\3", r"\n", "\\", r"\\\9"])
def test_a_substitution_of_a_group_that_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="none of the 2 groups"):
        check_substitution(text, groups=2)
