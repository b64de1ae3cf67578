"""Events -> OpenTelemetry spans, with the official SDK (extra `otel`), which is only imported if an endpoint is set.

An accepted request is one span, a child of the caller's if it sent a `traceparent`. Inside it are a span for the time
in the queue and one for the time in the batch, which is split into the time to the first token and decoding.
"""

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from batching.events import Event, Outcome, RowEnded
from server.version import VERSION

SENDING_SECONDS = 5
"""Time limit for sending spans to the collector, after which they are dropped."""


class Tracing:
    """An observer of the batcher. Spans are created when a request ends, with the times of its events."""

    def __init__(self, endpoint: str, model: str) -> None:
        resource = Resource.create({"service.name": "microbatch", "service.version": VERSION})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=SENDING_SECONDS)))
        self._tracer = self._provider.get_tracer("microbatch", VERSION)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        if isinstance(event, RowEnded):
            self._trace(event, time.time())

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()

    def _trace(self, row: RowEnded, end: float) -> None:
        arrival = end - row.duration
        batch = end if row.queue_wait is None else arrival + row.queue_wait
        request = self._request(row, arrival)
        self._span("queue", request, arrival, batch)
        if row.queue_wait is not None:
            first = end if row.ttft is None else arrival + row.ttft
            running = self._open("batch", request, batch)
            running.set_attribute("microbatch.batch_size", row.batch_size)
            self._span("prefill", running, batch, first)
            if row.ttft is not None:
                self._span("decode", running, first, end)
            running.end(_nanoseconds(end))
        request.end(_nanoseconds(end))

    def _request(self, row: RowEnded, start: float) -> Span:
        """The outer span, named and described by OpenTelemetry's conventions for generative AI."""
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": self._model,
            "gen_ai.response.finish_reasons": [row.finish],
            "gen_ai.usage.input_tokens": row.prompt_tokens,
            "gen_ai.usage.output_tokens": row.output_tokens,
            "microbatch.request_id": row.id,
            "microbatch.outcome": row.outcome,
        }
        caller = self._propagator.extract(dict(row.trace))
        span = self._tracer.start_span(
            f"chat {self._model}", caller, SpanKind.SERVER, attributes, start_time=_nanoseconds(start)
        )
        if row.outcome not in (Outcome.ANSWERED, Outcome.CANCELLED):
            span.set_status(Status(StatusCode.ERROR, row.outcome))
        return span

    def _open(self, name: str, parent: Span, start: float) -> Span:
        return self._tracer.start_span(name, set_span_in_context(parent), start_time=_nanoseconds(start))

    def _span(self, name: str, parent: Span, start: float, end: float) -> None:
        self._open(name, parent, start).end(_nanoseconds(end))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
