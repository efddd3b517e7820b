"""Numbers into `bench/RESULTS.md`: one section for each part, replaced when the part runs again."""

import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

FILE = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Written by `make bench`; ratios carry over to other machines, absolute numbers do not. Each section says when and where it ran.
"""


@dataclass(frozen=True)
class Section:
    """`rows` are the table's lines, the first one its head; `notes` say what was measured and how."""

    title: str
    notes: str
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        head, *lines = [" | ".join(_cell(cell) for cell in row) for row in self.rows]
        rule = " | ".join("---" for _ in self.rows[0])
        table = "\n".join(f"| {line} |" for line in (head, rule, *lines))
        return f"## {self.title}\n\n{date.today().isoformat()}, {machine()}\n\n{self.notes.strip()}\n\n{table}\n"  # noqa: DTZ011 — the day it ran here


def write(section: Section) -> None:
    """Put the section in its place; sections stay in alphabetical order."""
    text = FILE.read_text() if FILE.exists() else HEAD
    sections = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}
    sections[section.title] = section.markdown().removeprefix("## ")
    FILE.write_text("\n".join([HEAD, *(f"## {sections[title].rstrip()}\n" for title in sorted(sections))]))


def machine() -> str:
    """What the numbers were taken on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    gib = int(memory[1]) / (1 << 20) if memory else 0
    return f"{os.cpu_count()} × {model[1] if model else platform.machine()}, {gib:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
