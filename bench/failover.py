"""`make bench-failover`: what users notice when parts fail. Writes `bench/FAILOVER.md`; the exit status says whether every row has figures."""

import asyncio
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from bench.failures import ROWS, Row
from bench.load import PATIENCE_S, RATE, TALKS, steady
from bench.outage import SLOW_S, Outage, outage
from bench.results import machine
from bench.scenes import SCENES, Say, Scene
from lab import faults
from lab.api import Refused
from lab.process import ProcessFailed, leaves

FILE = Path(__file__).parent / "FAILOVER.md"
OPEN_FILES = 16_384
"""Thousands of agents have as many connections."""
_STEADY_S = 2.0
_STEADY_WITHIN_S = 60.0
_FAILURES = (TimeoutError, ProcessFailed, Refused, OSError, AssertionError, RuntimeError, httpx.HTTPError)

LANES = (("edges",), ("ipsec",), ("nodes", "databases", "brief", "mesh"))
"""Scenes that may be there at the same time, each lane in this order: a path that was cut is used again only after it was good for a minute."""

Result = Outage | str
"""The figures, or why there are none."""

console = Console(highlight=False, soft_wrap=True)


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Faults last some seconds, also those that should last ten minutes.")] = False,
    only: Annotated[str, typer.Option(help="Rows whose name has this in it; nothing is written.")] = "",
) -> None:
    """Break things one after the other, under load."""
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {text}")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, OPEN_FILES), hard), hard))
    rows = [row for row in ROWS if only in row.name]
    results: list[tuple[Row, Result]] = []

    def keep(found: Mapping[str, Result]) -> None:
        """After every row, so that whoever interrupts has what there was."""
        results[:] = [(row, found.get(row.name, "not reached")) for row in rows]
        if not only:
            FILE.write_text(markdown(results, quick=quick))

    asyncio.run(_run(rows, quick=quick, say=say, keep=keep))
    if not only:
        say(f"Written to {FILE}")
    without = [row.name for row, result in results if isinstance(result, str)]
    missed = [row.name for row, result in results if isinstance(result, Outage) and row.aim.missed(result)]
    console.print(f"{len(results)} rows, {len(missed)} missed their aim, {len(without)} without figures")
    sys.exit(1 if without else 0)


async def _run(rows: Sequence[Row], *, quick: bool, say: Say, keep: Callable[[Mapping[str, Result]], None]) -> None:
    """Each scene is built once. While the edges' scene waits for its paths to rest, the others go on; one thing is built or measured at a time."""
    found: dict[str, Result] = {}
    alone = asyncio.Lock()

    async def lane(scenes: Sequence[str]) -> None:
        for name in scenes:
            if inside := [row for row in rows if row.scene == name]:
                await _scene(name, inside, found, alone, quick=quick, say=say, keep=keep)

    await asyncio.gather(*(lane(scenes) for scenes in LANES))


async def _scene(
    name: str,
    rows: Sequence[Row],
    found: dict[str, Result],
    alone: asyncio.Lock,
    *,
    quick: bool,
    say: Say,
    keep: Callable[[Mapping[str, Result]], None],
) -> None:
    """All rows of one scene; `found` takes what comes of them."""
    try:
        async with AsyncExitStack() as stack:
            async with alone:
                say(f"[bold]{name}[/]: {SCENES[name].__doc__}")
                scene = await stack.enter_async_context(SCENES[name](say))
            if not faults.can_filter(scene.fabric.network):
                raise ProcessFailed("this needs root, network namespaces and nft")
            for row in rows:
                found[row.name] = await _settled(row, scene, alone, quick=quick, say=say)
                keep(found)
    except* _FAILURES as failures:
        reason = "; ".join(f"{type(failure).__name__}: {failure}" for failure in leaves(failures))
        say(f"[red]{name} broke: {reason}[/]")
        found |= {row.name: reason.split("\n", 1)[0] for row in rows if row.name not in found}
        keep(found)


async def _settled(row: Row, scene: Scene, alone: asyncio.Lock, *, quick: bool, say: Say) -> Result:
    """Measured, once nothing is left of the row before."""
    try:
        await scene.settled(row.service)
    except _FAILURES as error:
        return _none(error, say)
    async with alone:
        return await _measured(row, scene, quick=quick, say=say)


def _none(error: Exception, say: Say) -> str:
    said = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    say(f"   [red]no figures:[/] {said}")
    return said


async def _measured(row: Row, scene: Scene, *, quick: bool, say: Say) -> Result:
    hold_s = row.quick_s if quick else row.hold_s
    loop = asyncio.get_running_loop()
    scene.note, scene.caught_up_s = "", None
    say(f"{row.name} …")
    async with scene.load(row.service) as load:
        try:
            await steady(load, for_s=_STEADY_S, within_s=_STEADY_WITHIN_S)
            began = loop.time()
            async with row.fault(scene):
                await asyncio.sleep(max(0, began + hold_s - loop.time()))
                mended = loop.time()
        except _FAILURES as error:
            return _none(error, say)
        await asyncio.sleep(row.settles_s / 3 if quick else row.settles_s)
    found = replace(outage(load.requests, load.words, began, mended), note=scene.note, caught_up_s=scene.caught_up_s)
    missed = row.aim.missed(found)
    verdict = f"[yellow]missed: {', '.join(missed)}[/]" if missed else "[green]met[/]"
    say(
        f"   {found.sent} failed, longest stall {found.stall_s:.2f} s, recovered {_seconds(found.recovered_s)}, stale {_seconds(found.stale_s)}, "
        f"TCP: {found.broken} broken, longest silence {found.silence_s:.2f} s; {row.aim}: {verdict}"
    )
    if found.errors:
        say(f"   [dim]{' | '.join(found.errors[:4])}[/]")
    return found


def markdown(results: Sequence[tuple[Row, Result]], *, quick: bool) -> str:
    head = f"""# When parts fail

Written by `make bench-failover{" ARGS=--quick" if quick else ""}` on {date.today().isoformat()}, {machine()}.

Each row runs under steady load from site a: {RATE} idempotent requests per second, and {TALKS} TCP connections that say a word every tenth of a second; all of it on
one machine, every site in a network namespace with its real agent, Envoy and pods. A request fails that gets no good answer within {PATIENCE_S:g} s; the clients retry
nothing. Other fabrics may be there meanwhile, but nothing is built or broken in them. *Recovered* and *stale* count from the fault: since when everything was answered
within {SLOW_S:g} s, and until when something was still sent to where nobody answered; what mending itself slows down counts in the other columns only. {_QUICK if quick else ""}
"""  # noqa: DTZ011 — the day it ran here
    lines = [
        "| what fails | for | requests failed | longest stall | recovered | stale | TCP connections broken | longest silence | aim | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, result in results:
        hold_s = row.quick_s if quick else row.hold_s
        if isinstance(result, str):
            lines.append(f"| {row.name} | | | | | | | | {row.aim} | **no figures**: {result} |")
            continue
        missed = row.aim.missed(result)
        verdict = f"**missed**: {', '.join(missed)}" if missed else "met" if str(row.aim) != "none" else ""
        cells = (
            row.name + (f" ({result.note})" if result.note else ""),
            f"{hold_s:g} s",
            result.sent,
            f"{result.stall_s:.2f} s",
            _seconds(result.recovered_s),
            _seconds(result.stale_s),
            f"{result.broken} of {TALKS}",
            f"{result.silence_s:.2f} s",
            str(row.aim),
            verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return head + "\n" + "\n".join(lines) + "\n"


_QUICK = "This was the quick form: faults lasted as short as they may, also those that should last ten minutes, of which `FAILOVER-LONG.md` tells."


def _seconds(value: float | None) -> str:
    return "not while it lasted" if value is None else f"{value:.2f} s"


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
