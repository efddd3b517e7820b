"""`isthmus-agent`: run the agent of a node, and see how it does."""

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from agent.errors import AgentError
from agent.log import configure
from agent.settings import Settings

app = typer.Typer(
    help="The agent of an Isthmus node: keeps one Envoy as the control plane wants it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _with_options(*names: str) -> Callable[[Callable[[Settings], None]], Callable[..., None]]:
    """A command that takes these settings as options; one that is not given leaves it to the environment."""

    def decorate(command: Callable[[Settings], None]) -> Callable[..., None]:
        def with_options(**given: str | None) -> None:
            command(_settings({name: value for name, value in given.items() if value is not None}))

        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name)) for name in names]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer looks for
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        return with_options

    return decorate


def _option(name: str) -> Any:
    field = Settings.model_fields[name]
    default = "" if field.default in (None, (), {}, PydanticUndefined) else f" Default: {str(field.default).lower()}."
    help_ = f"{field.description}{default} [AGENT_{name.upper()}]"
    return Annotated[
        str | None, typer.Option(f"--{name.replace('_', '-')}", metavar=_metavar(field.annotation), help=help_, show_default=False)
    ]


def _metavar(annotation: Any) -> str:
    """What is taken, as help shows it."""
    if get_origin(annotation) is Literal:
        return f"<{'|'.join(get_args(annotation))}>"
    return {bool: "<true|false>", int: "<number>", float: "<number>"}.get(annotation, "<text>")


def _settings(given: dict[str, str]) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as error:
        _fail("; ".join(f"{'.'.join(str(part) for part in it['loc'])}: {it['msg']}" for it in error.errors(include_input=False)))


@app.command()
@_with_options(*Settings.model_fields)
def run(settings: Settings) -> None:
    """Register this node if it is new, then serve: follow the control plane, drive Envoy, report.

    SIGTERM drains Envoy and stops both; SIGHUP stops the agent alone, and the next one adopts Envoy without losing a request.
    """
    from agent.run import run as serve

    configure(settings.log_level)
    try:
        asyncio.run(serve(settings))
    except AgentError as error:
        _fail(str(error))


@app.command()
@_with_options("state_dir", "run_dir")
def status(settings: Settings) -> None:
    """How the agent with this state directory does: what is applied, since when, its peers, what is wrong."""
    try:
        said = json.loads((settings.sockets / "status.json").read_bytes())
    except (OSError, ValueError, AgentError) as error:
        _fail(f"no agent has left a status: {error}")
    _show(said)
    if not _runs(said["pid"]):
        envoy = "serves on" if _runs(said["envoy_pid"]) else "does not run either"
        _fail(f"the agent (process {said['pid']}) is not running any more: the above is what it said last; Envoy {envoy}")


def _runs(pid: int | None) -> bool:
    return Path(f"/proc/{pid}").exists()


def _show(said: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, text in _lines(said, time.time()):
        table.add_row(name, Text(text))
    Console().print(table)


def _lines(said: dict[str, Any], now: float) -> Iterator[tuple[str, str]]:
    yield "node", f"{said['node']} of {said['kind'].replace('_', ' ')} {said['site']}, agent {said['version']}, process {said['pid']}"
    away = f"away: {said['last_error'] or 'it has not answered yet'}"
    yield "control plane", f"{said['control_plane']}, {'connected' if said['connected'] else away}"
    yield "envoy", f"{said['envoy']}, process {said['envoy_pid']}"
    yield (
        "applied",
        f"{said['applied']} at revision {said['revision']}, for {now - said['since']:.0f} s" if said["applied"] else "nothing yet",
    )
    yield "gateway", ", ".join(said["gateways"]) or "none"
    yield "IPsec", said["ipsec"]
    for it in said["rejected"]:
        yield "rejected", f"{it['kind']} {it['key']}: {it['reason']}"
    names = said["names"]
    for peer in said["peers"]:
        path = f"through {names[peer['path']]}" if peer["path"] in names else peer["path"]
        used = "in use, " if peer["in_use"] else ""
        yield (
            "peer",
            f"{names.get(peer['site_id'], peer['site_id'])} {path} {peer['state']} for {now - peer['since']:.0f} s: {used}{peer['reason']} {peer['error']}",
        )
    for edge in said["edges"]:
        yield (
            "edge",
            f"{names.get(edge['site_id'], edge['site_id'])} {edge['state']} for {now - edge['since']:.0f} s, {edge['tunnels']} tunnels {edge['error']}",
        )
    for name, discovery in said["discoveries"].items():
        yield "discovery", f"{name} {'connected' if discovery['connected'] else discovery['reason']}"
    for warning in said["warnings"]:
        yield "warning", warning


def _fail(message: str) -> NoReturn:
    typer.echo(f"isthmus-agent: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
