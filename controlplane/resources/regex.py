"""RE2's syntax, checked without RE2: Envoy refuses a whole route configuration for one bad expression."""

import re

MAX_SIZE = 5_000
"""Upper bound of the estimated program: repetitions multiply, and each match costs time in proportion."""
PROPERTY_SIZE = 1_250
"""Of a class such as `\\pL`: the ranges of its UTF-8 encodings (measured; the others are rounded up likewise)."""
MAX_REPEAT = 1_000
"""Of a repetition, multiplied by those around it; RE2's own limit."""
MAX_DEPTH = 50
LARGEST_BYTE = 0xFF

_ESCAPED_CLASS = "dDsSwW"
_ESCAPED_CHARACTER = {"a": "\a", "f": "\f", "t": "\t", "n": "\n", "r": "\r", "v": "\v"}
_ASSERTION = "AbBz"
_CLASSES = {"alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space", "upper", "word", "xdigit"}
_GROUP = re.compile(r"\?(?:P?<(?P<name>[^>]*)>|(?P<flags>[imsU]*(?:-[imsU]+)?)(?P<end>[:)]))")
_REPEAT = re.compile(r"\{([0-9]{1,5})(,([0-9]{0,5}))?\}")
_HEX = re.compile(r"x(?:[0-9A-Fa-f]{2}|\{([0-9A-Fa-f]{1,6})\})")
_PROPERTY = re.compile(
    r"[pP](?:[CLMNPSZ]|\{\^?(?:[CLMNPSZ]|L[lmotu]|M[cen]|N[dlo]|P[cdefios]|S[ckmo]|Z[lps]|Arabic|Cyrillic|Greek|Han|Hebrew|Latin)\})"
)
_NAMED_CLASS = re.compile(r"\[:\^?([a-z]*):\]")


def check_re2(text: str) -> int:
    """The number of groups; raises ValueError, saying why and where, on what RE2 would refuse or what would be too large for a proxy."""
    reader = _Reader(text)
    size = reader.alternatives(0)
    if reader.at < len(text):
        reader.refuse("unexpected )")
    if size > MAX_SIZE:
        raise ValueError("is too large when its repetitions are multiplied out")
    return reader.groups


def check_substitution(text: str, *, groups: int) -> None:
    """Raises ValueError if a replacement refers to a group that the expression does not have."""
    for escape in re.findall(r"\\(.?)", text):
        if escape != "\\" and not (escape.isascii() and escape.isdigit() and int(escape) <= groups):
            raise ValueError(f"substitution: \\{escape} is none of the {groups} groups of the pattern")


class _Reader:
    """Recursive descent over the expression; the methods return the estimated size of what they read, in instructions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.groups = 0
        self.product = 1
        self.names: set[str] = set()

    def refuse(self, why: str) -> None:
        raise ValueError(f"is not an RE2 expression: {why} at position {self.at}")

    def alternatives(self, depth: int) -> int:
        if depth > MAX_DEPTH:
            self.refuse("too many nested groups")
        size = self.sequence(depth)
        while self.peek() == "|":
            self.at += 1
            size += self.sequence(depth) + 1
        return size

    def sequence(self, depth: int) -> int:
        size = 0
        while self.at < len(self.text) and self.peek() not in "|)":
            size += self.repeated(depth)
        return size

    def repeated(self, depth: int) -> int:
        """An atom with its repetition; leaves in `product` how often the innermost of it is repeated."""
        self.refuse_repetition()
        outer, self.product = self.product, 1
        size = self.atom(depth)
        if self.peek() and self.peek() in "*+?":
            self.at += 1
            size += 1
        elif match := _REPEAT.match(self.text, self.at):
            size = self.counted(size, match)
        else:
            self.product = max(outer, self.product)
            return size
        if self.peek() == "?":
            self.at += 1
        # RE2 refuses a repeated repetition, and lacks possessive quantifiers
        self.refuse_repetition()
        self.product = max(outer, self.product)
        return size

    def refuse_repetition(self) -> None:
        if (self.peek() and self.peek() in "*+?") or _REPEAT.match(self.text, self.at):
            self.refuse("nothing to repeat")

    def counted(self, size: int, match: re.Match[str]) -> int:
        low, high = int(match[1]), int(match[3] or match[1])
        self.product *= max(low, high, 1)
        if self.product > MAX_REPEAT or max(low, high) > MAX_REPEAT or low > high:
            self.refuse(f"repetition {match[0]}")
        self.at = match.end()
        return size * max(low, high, 1) + 1

    def atom(self, depth: int) -> int:
        char = self.peek()
        if char == "(":
            return self.group(depth)
        if char == "[":
            return self.bracket()
        if char == "\\":
            return self.escape(in_bracket=False)
        self.at += 1
        # a dot is any of the UTF-8 encodings, which takes some ten instructions
        return 10 if char == "." else len(char.encode(errors="replace"))

    def group(self, depth: int) -> int:
        self.at += 1
        if self.peek() == "?":
            match = _GROUP.match(self.text, self.at)
            if not match:
                self.refuse("(?… that RE2 lacks, such as look-around or an atomic group,")
                return 0
            self.at = match.end()
            if match["end"] == ")":
                self.refuse_repetition()
                return 0
            if match["name"] is not None:
                self.groups += 1
                self.name(match["name"])
        else:
            self.groups += 1
        size = self.alternatives(depth + 1)
        if self.peek() != ")":
            self.refuse("missing )")
        self.at += 1
        return size + 2

    def name(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in self.names:
            self.refuse("bad or repeated group name")
        self.names.add(name)

    def bracket(self) -> int:
        self.at += 1
        if self.peek() == "^":
            self.at += 1
        size, first = 0, True
        while first or self.peek() != "]":
            if self.at >= len(self.text):
                self.refuse("missing ]")
            size += self.bracket_item()
            first = False
        self.at += 1
        return size + 12

    def bracket_item(self) -> int:
        if self.text.startswith("[:", self.at) and (match := _NAMED_CLASS.match(self.text, self.at)):
            if match[1] not in _CLASSES:
                self.refuse(f"class {match[0]}")
            self.at = match.end()
            return 4
        if _PROPERTY.match(self.text, self.at + 1) and self.peek() == "\\":
            return self.escape(in_bracket=True)
        start = self.bracket_character()
        if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
            self.at += 1
            end = self.bracket_character()
            if start is None or end is None or start > end:
                self.refuse("bad range in [ ]")
        return 2

    def bracket_character(self) -> str | None:
        """One character, or None for an escape that stands for several."""
        char = self.peek()
        if char != "\\":
            self.at += 1
            return char
        start = self.at + 1
        self.escape(in_bracket=True)
        escaped = self.text[start : self.at]
        if escaped[0] == "x":
            return chr(int(escaped.strip("x{}"), 16))
        if escaped in _ESCAPED_CHARACTER:
            return _ESCAPED_CHARACTER[escaped]
        return None if escaped[0] in _ESCAPED_CLASS + "pP" else escaped

    def escape(self, *, in_bracket: bool) -> int:
        self.at += 1
        char = self.peek()
        if not char:
            self.refuse("\\ at the end")
        if match := _HEX.match(self.text, self.at):
            if match[1] and int(match[1], 16) > LARGEST_BYTE:
                self.refuse("no code point beyond \\x{FF}, since Envoy matches bytes; write the character itself instead")
            self.at = match.end()
            return 4
        if match := _PROPERTY.match(self.text, self.at):
            self.at = match.end()
            return PROPERTY_SIZE
        if char in _ESCAPED_CLASS or char in _ESCAPED_CHARACTER or (not in_bracket and char in _ASSERTION):
            self.at += 1
            return 4
        if char.isalnum() or not char.isascii():
            self.refuse(f"\\{char}, which RE2 lacks (as it lacks references to groups),")
        self.at += 1
        return 1

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]
