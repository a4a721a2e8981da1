"""Traces, where OTLP_TRACES_ENDPOINT is set: one per request, begun here and gone on with by vLLM.

The span covers what the gateway does itself: on the fast path the decision, on the relay everything. Its `traceparent`
(W3C Trace Context) travels with the request, so vLLM's own span, with its times in queue, prefill and decode, becomes
its child. No prompt, no answer, no key: ids and names alone.
"""

from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.metering.context import TRACEPARENT

if TYPE_CHECKING:
    from gateway.arrival import Arrival

_propagator = TraceContextTextMapPropagator()


class Traced:
    """The span of one request."""

    def __init__(self, span: Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def note(self, **attributes: str) -> None:
        """Attributes, prefixed with `owngpt.`."""
        for name, value in attributes.items():
            self._span.set_attribute(f"owngpt.{name}", value)

    def failed(self, status: int, code: str | None) -> None:
        """The gateway answered with an error."""
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attribute("error.type", code or str(status))
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        """Hand it to the exporter's thread."""
        self._span.end()


class Tracing:
    """Makes spans; a thread of the SDK sends them, and drops them when nobody takes them."""

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "gateway"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
        self._tracer = self._provider.get_tracer("gateway")

    def begin(self, arrival: "Arrival") -> Traced:
        """A span for a request; a client's own `traceparent` becomes its parent."""
        parent = arrival.headers.get(TRACEPARENT)
        carrier = {TRACEPARENT.decode(): parent.decode("latin-1")} if parent is not None else None
        span = self._tracer.start_span(
            f"{arrival.method} {arrival.path}", context=_propagator.extract(carrier) if carrier else None,
            kind=SpanKind.SERVER,
        )
        assert isinstance(span, Span)  # noqa: S101 - the SDK's provider makes no other
        traced = Traced(span)
        traced.note(route=arrival.route, request_id=arrival.request_id)
        return traced

    def close(self) -> None:
        """Send what waits. Blocks for at most the exporter's timeout."""
        self._provider.shutdown()
