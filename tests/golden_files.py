"""Comparing with golden files."""

from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent / "golden"


class Golden:
    """What a case reads and what it should produce, in one folder. Files that are neither fail the run, or go with `--update-golden`."""

    def __init__(self, update: bool) -> None:
        self._update = update
        self._read: dict[Path, set[Path]] = defaultdict(set)
        self._compared: dict[Path, set[Path]] = defaultdict(set)

    def read(self, path: Path) -> str:
        """An input of the case."""
        self._read[path.parent].add(path)
        return path.read_text()

    def __call__(self, path: Path, text: str) -> None:
        """Compare with the file; raises AssertionError if it differs or is not there."""
        self._compared[path.parent].add(path)
        if self._update:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            expected = path.read_text().splitlines() if path.exists() else []
            assert text.splitlines() == expected, f"{path.relative_to(ROOT)} differs: look at it, then run with --update-golden"

    def check_for_stale_files(self) -> None:
        stale = [file for folder, made in self._compared.items() for file in folder.iterdir() if file not in made | self._read[folder]]
        if self._update:
            for file in stale:
                file.unlink()
        else:
            assert not stale, f"no case reads or produces {', '.join(str(file.relative_to(ROOT)) for file in sorted(stale))}"
