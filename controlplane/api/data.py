"""Under `/api/data`: what happened and how it looks from outside. Logs and graphs."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from controlplane.api.deps import CurrentCaller, JsonBody, NamespaceInPath, Now, Session
from controlplane.api.description import asked, described
from controlplane.api.requests import read
from controlplane.errors import FieldError, Invalid
from controlplane.resources.base import Flag, Value, Whole
from controlplane.resources.enumeration import Names
from controlplane.services import logs, telemetry
from controlplane.services.graph import GROUPINGS, METRICS, VHOST_PREFIX, Graph, Series, Span

Json = dict[str, Any]

router = APIRouter(prefix="/api/data/namespaces")

MOST_STEPS = 1000
LAST_YEAR = 9000
"""Of times in questions: far from where sums of times overflow, and from the bucket of the totals."""
_DEFAULT_RANGE = timedelta(minutes=10)
_STEP = re.compile(r"([0-9]{1,7})(s|m|h)?")
_SECONDS = {"s": 1, "m": 60, "h": 3600, None: 1}

# Logs


class LogQuery(Value):
    unsupported = {"aggs": "aggregations of logs are not supported"}

    namespace: str = ""
    query: str = Field("", max_length=4096)
    start_time: str = ""
    end_time: str = ""
    limit: Whole = Field(500, ge=0, le=500)
    sort: Annotated[Literal["DESCENDING", "ASCENDING"], Names("DESCENDING", "ASCENDING")] = "DESCENDING"
    scroll: Flag = False


_AUDIT_LOGS = "/{namespace}/audit_logs"


@router.post(
    _AUDIT_LOGS,
    operation_id="ves.io.schema.log.CustomAPI.AuditLogQuery",
    tags=["log"],
    openapi_extra=described(_AUDIT_LOGS) | asked(LogQuery),
)
async def audit_logs(namespace: NamespaceInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """Who changed what; by default in the last ten minutes."""
    query = read(LogQuery, body, namespace)
    if query.scroll:
        raise Invalid("scroll: is not supported, ask with narrower times", [FieldError("scroll", "is not supported")])
    start, end = _range(query.start_time, query.end_time, now)
    terms = logs.parse_query(query.query)
    newest_first = query.sort == "DESCENDING"
    found, hits = await logs.audit_logs(
        session, caller.tenant_id, namespace, terms, start=start, end=end, newest_first=newest_first, most=query.limit or 500
    )
    return {"logs": [logs.line(record, caller.tenant) for record in found], "total_hits": str(hits), "scroll_id": "", "aggs": {}}


# The service graph


class LabelFilter(Value):
    label: Annotated[
        Literal["LABEL_SITE", "LABEL_VHOST"],
        Names("LABEL_NONE", "LABEL_SITE", "LABEL_APP_TYPE", "LABEL_SERVICE", "LABEL_VHOST_TYPE", "LABEL_VHOST"),
    ]
    op: Annotated[Literal["EQ"], Names("NOP", "EQ", "NEQ")] = "EQ"
    value: str


Metrics = Annotated[tuple[str, ...], Field(max_length=len(METRICS))]


class NodeMetrics(Value):
    downstream: Metrics = ()
    upstream: Metrics = ()


class EdgeMetrics(Value):
    types: Metrics = ()


class NodeSelector(Value):
    unsupported = {"healthscore": "health scores are not supported"}

    metric: NodeMetrics = NodeMetrics()


class EdgeSelector(Value):
    unsupported = {"healthscore": "health scores are not supported"}

    metric: EdgeMetrics = EdgeMetrics()


class FieldSelector(Value):
    node: NodeSelector = NodeSelector()
    edge: EdgeSelector = EdgeSelector()


class GraphQuery(Value):
    ignored = frozenset({"range"})

    namespace: str = ""
    start_time: str = ""
    end_time: str = ""
    step: str = "auto"
    group_by: tuple[Annotated[Literal["NONE", "NAMESPACE", "SITE", "SERVICE", "VHOST"], Names(*GROUPINGS)], ...] = Field(
        ("VHOST", "SITE"), max_length=len(GROUPINGS)
    )
    label_filter: tuple[LabelFilter, ...] = ()
    field_selector: FieldSelector = FieldSelector()


_GRAPH = "/{namespace}/graph/service"
_EVERY_GRAPH = "/system/graph/all_ns_service"


@router.post(
    _GRAPH, operation_id="ves.io.schema.graph.service.CustomAPI.Graph", tags=["graph"], openapi_extra=described(_GRAPH) | asked(GraphQuery)
)
async def service_graph(namespace: NamespaceInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """Who called what where in one namespace: rates, errors, latencies, throughput, per node and edge. Without a selection, all of them."""
    query = read(GraphQuery, body, namespace)
    return await _graph(session, caller, namespace, query, now)


@router.post(
    _EVERY_GRAPH, operation_id="ves.io.schema.graph.service.CustomAPI.AllNSServiceGraph", tags=["graph"], openapi_extra=asked(GraphQuery)
)
async def service_graph_of_all_namespaces(body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """The same for all namespaces."""
    return await _graph(session, caller, None, read(GraphQuery, body, "system"), now)


async def _graph(session: Session, caller: CurrentCaller, namespace: str | None, query: GraphQuery, now: datetime) -> Json:
    start, end = _range(query.start_time, query.end_time, now)
    span = Span(start, end, _step(query.step, end - start))
    only = {each.label.removeprefix("LABEL_"): _without_prefix(each.value) for each in query.label_filter}
    made = await telemetry.service_graph(session, caller.tenant_id, namespace, span, query.group_by, only)
    return {"step": f"{span.step.total_seconds():.0f}s", "data": await run_in_threadpool(_data, made, span, query.field_selector)}


def _data(made: Graph, span: Span, selector: FieldSelector) -> Json:
    node, edge = selector.node.metric, selector.edge.metric
    asked = any((node.downstream, node.upstream, edge.types))
    downstream, upstream, between = (_types(names, asked) for names in (node.downstream, node.upstream, edge.types))
    return {
        "nodes": [
            {
                "id": dict(id),
                "data": {
                    "metric": {
                        "downstream": _metrics(made.downstream.get(id, {}), downstream, span),
                        "upstream": _metrics(made.upstream.get(id, {}), upstream, span),
                    }
                },
            }
            for id in made.nodes
        ],
        "edges": [
            {"src_id": dict(source), "dst_id": dict(destination), "data": {"metric": {"data": _metrics(series, between, span)}}}
            for (source, destination), series in sorted(made.edges.items())
        ],
    }


def _types(names: tuple[str, ...], asked: bool) -> tuple[str, ...]:
    for name in names:
        if name not in METRICS:
            raise Invalid(
                f"metric {name!r} should be one of {', '.join(METRICS)}", [FieldError("field_selector", f"{name[:64]} is not known")]
            )
    return tuple(dict.fromkeys(names)) if asked else tuple(METRICS)


def _metrics(series: Series, types: tuple[str, ...], span: Span) -> list[Json]:
    """Those of them that have values at all."""
    seconds = span.step.total_seconds()
    found = []
    for type in types:
        unit, measure = METRICS[type]
        values = ((step, measure(sums, seconds)) for step, sums in sorted(series.items()))
        raw = [{"timestamp": step.timestamp(), "value": f"{value:.6g}"} for step, value in values if value is not None]
        if raw:
            found.append({"type": type, "unit": unit, "value": {"raw": raw}})
    return found


def _without_prefix(vhost: str) -> str:
    for prefix in VHOST_PREFIX.values():
        vhost = vhost.removeprefix(prefix)
    return vhost


# Times


def _range(start: str, end: str, now: datetime) -> tuple[datetime, datetime]:
    """By default the last ten minutes."""
    until = _time("end_time", end) or now
    since = _time("start_time", start) or until - _DEFAULT_RANGE
    if since >= until:
        raise Invalid("start_time should be before end_time", [FieldError("start_time", "should be before end_time")])
    return since, until


def _time(name: str, text: str) -> datetime | None:
    """RFC 3339, or Unix seconds."""
    if not text:
        return None
    try:
        at = datetime.fromtimestamp(int(text), UTC) if text.isdecimal() else datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        raise Invalid(f"{name}: {text[:64]!r} is not a time", [FieldError(name, "should be RFC 3339, or Unix seconds")]) from None
    if not 1970 <= at.year <= LAST_YEAR:
        raise Invalid(f"{name}: {text[:64]!r} is out of range", [FieldError(name, f"should be between 1970 and {LAST_YEAR}")])
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _step(text: str, whole: timedelta) -> timedelta:
    """`auto`: all in one step."""
    if text in ("", "auto"):
        return whole
    match = _STEP.fullmatch(text)
    step = timedelta(seconds=int(match[1]) * _SECONDS[match[2]]) if match else timedelta()
    if step <= timedelta() or whole / step > MOST_STEPS:
        description = f"should be auto or a duration such as 60s, and give at most {MOST_STEPS} steps"
        raise Invalid(f"step: {description}", [FieldError("step", description)])
    return step
