"""`make demo`: a bank across two clusters, with curl as the only client. `--check` verifies, stops, and says by its exit status how it went."""

import asyncio
import shutil
import signal
import sys
import time
from functools import partial
from typing import Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.table import Table

from lab.api import Refused
from lab.fabric import Fabric
from lab.process import ProcessFailed, environment, leaves
from lab.site import Site
from lab.traffic import Traffic
from lab.wait import until

A, B, EDGE = "cluster-a", "cluster-b", "edge"
BANK_PORT, LEDGER_PORT = 8080, 5432
DOMAIN = "bank.localhost"
"""Browsers and curl take any name under `localhost` for this machine."""
SCRIPT = "lab/demo.sh"

console = Console(highlight=False, soft_wrap=True)


def main(*, check: bool = typer.Option(False, "--check", help="Verify and stop, instead of waiting for Ctrl-C.")) -> None:
    """Start two clusters and the fabric between them, and put one application across."""
    started = time.monotonic()
    try:
        asyncio.run(_run(check, started))
    except asyncio.CancelledError:  # by a signal
        sys.exit(130 if check else 0)
    except BaseExceptionGroup as failures:
        _fail(leaves(failures))
    except (ProcessFailed, DemoFailed, Refused, TimeoutError, httpx.HTTPError) as failure:
        _fail([failure])


class DemoFailed(Exception):
    """Something that the demo promises did not happen."""


async def _run(check: bool, started: float) -> None:
    _stop_on_signals()
    async with Fabric((A, B), edges=(EDGE,), mesh=False, tapped=True, progress=lambda text: _say(text, started)) as fabric:
        a, b = fabric.site(A), fabric.site(B)
        _say("Starting the bank's pods", started)
        await _deploy(a, b)
        _say(f"Creating the bank's objects with {SCRIPT}\n", started)
        await _create(fabric)
        _say("Every Envoy has them", started)
        host, port = await a.reach(BANK_PORT)
        client = fabric.client(f"http://{host}:{port}", {"host": f"{DOMAIN}:{port}"})
        await _use(client)
        traffic = await _scale(client, b, started)
        _report(traffic)
        await _cut(client, fabric, started)
        await _graph(fabric, 60, len(traffic.outcomes))
        console.print(f"\n[bold green]The demo works[/], {time.monotonic() - started:.0f} s after its start.")
        if not check:
            _invite(fabric, host, port)
            await asyncio.Event().wait()


def _stop_on_signals() -> None:
    """The first signal begins to take everything down; further ones do not disturb that."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(task: asyncio.Task[Any] = task) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: None)
        console.print("\nStopping …")
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


def _say(text: str, started: float) -> None:
    console.print(f"[dim]{time.monotonic() - started:5.1f} s[/]  {text}")


async def _deploy(a: Site, b: Site) -> None:
    """The front page in A, everything else in B. All know each other only by the load balancers of their own site."""

    def env(site: Site) -> dict[str, str]:
        return {
            "LEDGER": f"{site.place.inside}:{LEDGER_PORT}",
            "BANK": f"http://{site.place.inside}:{BANK_PORT}",
            "BANK_HOST": DOMAIN,
        }

    def python(module: str) -> list[str]:
        return [sys.executable, "-m", f"lab.bank.{module}"]

    async with asyncio.TaskGroup() as group:
        group.create_task(a.cluster.deploy("web", python("web"), env=env(a)))
        group.create_task(b.cluster.deploy("transfers", python("transfers"), env=env(b)))
        group.create_task(b.cluster.deploy("referrals", python("referrals"), env=env(b)))
        group.create_task(b.cluster.deploy("ledger", python("ledger"), port=LEDGER_PORT))


async def _create(fabric: Fabric) -> None:
    if not shutil.which("curl"):
        raise DemoFailed("curl is not installed, and it is what the demo creates its objects with")
    script = await asyncio.create_subprocess_exec(
        "bash",
        SCRIPT,
        env=environment(fabric.directory)
        | {
            "ISTHMUS_URL": fabric.replicas[0].url,
            "ISTHMUS_CA": str(fabric.replicas[0].ca),
            "ISTHMUS_TOKEN": fabric.replicas[0].token.read_text().strip(),
            "SITE_A": A,
            "SITE_B": B,
        },
    )
    if await script.wait() != 0:
        raise DemoFailed(f"{SCRIPT} ended with status {script.returncode}")


async def _use(client: httpx.AsyncClient) -> None:
    """What a customer does: moves money, recommends the bank, looks at the front page."""
    order = {"from": "ada", "to": "grace", "amount": 250}
    _answers(await client.post("/api/transfers", json=order), "a transfer is accepted in the other cluster")
    _answers(await client.post("/api/referrals", json={"email": "edsger@example.org"}), "a referral is accepted")
    page = await client.get("/")
    _answers(page, "the front page is served")
    _expect("999750" in page.text, "it shows the new balance, read from the ledger over TCP")


def _answers(answer: httpx.Response, what: str) -> None:
    if not answer.is_success:
        raise DemoFailed(f"it should be so that {what}, but the answer was {answer.status_code} {answer.text}")
    _expect(True, what)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise DemoFailed(f"it should be so that {what}")
    console.print(f"         [green]✓[/] {what}")


async def _scale(client: httpx.AsyncClient, b: Site, started: float) -> Traffic:
    """1 → 3 → 1 pods under load: the load follows, and nothing is lost."""
    async with Traffic(client, "/api/transfers/limits", rate=200, workers=8) as traffic:
        await traffic.more(100)
        for replicas in (3, 1):
            changed = time.monotonic()
            scaling = asyncio.create_task(b.cluster.scale("transfers", replicas))
            await until(partial(_are_used, traffic, replicas), f"traffic to follow to {replicas} pods")
            _say(f"Scaled transfers in {B} to {replicas}: traffic followed {time.monotonic() - changed:.1f} s after the order", started)
            await scaling
            await traffic.more(200)
            _bars(traffic.pods(200))
    _expect(not traffic.failures, f"no request failed meanwhile ({len(traffic.failures)} of {len(traffic.outcomes)} did)")
    return traffic


async def _cut(client: httpx.AsyncClient, fabric: Fabric, started: float) -> None:
    """The link between both clusters is cut under load: requests go through the regional edge, and nothing is lost."""
    taps = [tap for name in (A, B) if (tap := fabric.site(name).tap)]
    async with Traffic(client, "/api/transfers/limits", rate=200, workers=8) as traffic:
        await traffic.more(100)
        await asyncio.gather(*(tap.cut() for tap in taps))
        cut = time.monotonic()
        await until(partial(_leads_through, fabric, EDGE), f"requests to go through {EDGE}", within_s=30)
        _say(f"Cut the tunnel between {A} and {B}: {time.monotonic() - cut:.1f} s later all know that requests go through {EDGE}", started)
        await traffic.more(200)
        for tap in taps:
            tap.mend()
    _expect(not traffic.failures, f"no request failed meanwhile ({len(traffic.failures)} of {len(traffic.outcomes)} did)")
    console.print(f"           The longest took {max(outcome.latency_s for outcome in traffic.outcomes) * 1000:.0f} ms.")


async def _leads_through(fabric: Fabric, path: str) -> bool:
    """Whether this is how A reaches B, as the control plane tells it."""
    answer = await fabric.api.request("GET", f"/api/data/namespaces/system/topology/path?from={A}&to={B}")
    return bool(answer["path"] == path)


async def _are_used(traffic: Traffic, pods: int) -> bool:
    return len(traffic.pods(20)) == pods


def _bars(pods: dict[str, int]) -> None:
    for pod, count in sorted(pods.items()):
        console.print(f"           {pod:<14} {'█' * (count // 5)} {count}")


def _report(traffic: Traffic) -> None:
    console.print(
        f"\n{len(traffic.outcomes)} requests from {A} to {B}, {len(traffic.failures)} failed; as the client saw them: "
        f"p50 {traffic.latency_ms(0.5):.1f} ms, p99 {traffic.latency_ms(0.99):.1f} ms."
    )


async def _graph(fabric: Fabric, seconds: int, requests: int) -> None:
    """The same seen by the fabric: Envoys count, agents report, the control plane answers."""

    async def edges() -> list[dict[str, Any]]:
        now = int(time.time())
        question = {
            "namespace": "bank",
            "start_time": str(now - seconds),
            "end_time": str(now),
            "step": f"{seconds}s",
            "group_by": ["VHOST", "SITE"],
            "field_selector": {"edge": {"metric": {"types": [*_COUNTS.values(), *_ERRORS, *_LATENCIES]}}},
        }
        answer = await fabric.api.request("POST", "/api/data/namespaces/bank/graph/service", question)
        found: list[dict[str, Any]] = answer["data"]["edges"]
        return found

    async def counted() -> list[dict[str, Any]]:
        found = await edges()
        return found if sum(_count(edge, seconds) for edge in found if edge["src_id"]["site"] == A) >= requests / 2 else []

    table = Table(title=f"The service graph of the last {seconds} seconds, as the control plane tells it", title_justify="left")
    for column in ("from", "through", "to"):
        table.add_column(column)
    for column in ("count", "errors", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for edge in await until(counted, f"the service graph to count most of {requests} requests", within_s=30):
        protocol, name = _load_balancer(edge)
        errors = float(_metrics(edge)[f"{protocol}_ERROR_RATE"]) * seconds
        latencies = (f"{float(value):.0f}" for name, value in _metrics(edge).items() if name in _LATENCIES)
        table.add_row(
            edge["src_id"]["site"],
            f"{protocol} {name}",
            edge["dst_id"]["site"],
            f"{_count(edge, seconds):.0f}",
            f"{errors:.0f}",
            *latencies,
        )
    console.print()
    console.print(table)
    console.print("Agents report every few seconds, so the latest requests may be missing.")


_COUNTS = {"HTTP": "HTTP_REQUEST_RATE", "TCP": "TCP_CONNECTION_RATE"}
_ERRORS = ("HTTP_ERROR_RATE", "TCP_ERROR_RATE")
_LATENCIES = ("HTTP_RESPONSE_LATENCY_PERCENTILE_50", "HTTP_RESPONSE_LATENCY_PERCENTILE_99")


def _count(edge: dict[str, Any], seconds: int) -> float:
    """Requests, or connections."""
    return float(_metrics(edge)[_COUNTS[_load_balancer(edge)[0]]]) * seconds


def _load_balancer(edge: dict[str, Any]) -> tuple[str, str]:
    """Protocol and name."""
    protocol, name = edge["dst_id"]["vhost"].removeprefix("ves-io-").split("-loadbalancer-")
    return protocol.upper(), name


def _metrics(edge: dict[str, Any]) -> dict[str, str]:
    """Value by type, of the only step that was asked for."""
    return {metric["type"]: metric["value"]["raw"][-1]["value"] for metric in edge["data"]["metric"]["data"]}


def _invite(fabric: Fabric, host: str, port: int) -> None:
    replica = fabric.replicas[0]
    auth = f'--cacert {replica.ca} -H "Authorization: APIToken $(cat {replica.token})"'
    console.print(f"""
  The bank         http://{DOMAIN}:{port}/
  Control plane    {replica.url}/docs
  Operator token   {replica.token}
  Logs             {fabric.directory}

Three things to try:

  curl -H 'Host: {DOMAIN}' http://{host}:{port}/api/transfers -d '{{"from": "ada", "to": "edsger", "amount": 10}}'
  curl {auth} {replica.url}/api/config/namespaces/bank/origin_pools/transfers
  curl {auth} {replica.url}/api/config/namespaces/bank/http_loadbalancers/bank/status

[bold]Ctrl-C[/] stops everything.""")


def _fail(failures: list[BaseException]) -> NoReturn:
    for failure in failures:
        console.print(f"[red]The demo failed:[/] {type(failure).__name__}: {failure}")
    sys.exit(1)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
