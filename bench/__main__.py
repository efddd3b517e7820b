"""`make bench`: every part, or those that are named. Results go to `bench/RESULTS.md`; progress to the terminal."""

import asyncio
import time
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.results import FILE, Section, write

PARTS = ("propagation", "endpoints", "discovery", "pods", "dataplane", "distance", "streams", "memory")

console = Console(highlight=False)


def main(parts: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(PARTS)}; all without one.")] = None) -> None:
    """Measure on this machine; about fifteen minutes for everything."""
    chosen = parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"no such part: {', '.join(sorted(unknown))}")
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {text}")

    for part in chosen:
        say(f"[bold]{part}[/]")
        for section in asyncio.run(import_module(f"bench.{part}").run(say)):
            write(section)
            _show(section)
    say(f"Written to {FILE}")


def _show(section: Section) -> None:
    table = Table(title=section.title, title_justify="left")
    head, *rows = section.rows
    for number, name in enumerate(head):
        table.add_column(str(name), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
