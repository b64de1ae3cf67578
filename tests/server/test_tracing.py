"""Laws of the traces, read where a collector reads them: from what a server process sends over OTLP."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server import settings
from server.settings import parse
from tests.live import process

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """What an OpenTelemetry collector is to the server: a path that takes spans."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Span] = []

    def named(self, name: str, trace: bytes) -> Span:
        [span] = [span for span in self.spans if span.name == name and span.trace_id == trace]
        return span


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            found.spans += [s for r in sent.resource_spans for scope in r.scope_spans for s in scope.spans]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            yield found


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


def test_a_request_is_a_span_of_its_caller_s_trace_with_queue_batch_and_decoding_inside(collector: Collector) -> None:
    with process("--otlp-endpoint", collector.url, module="tests.failing_server", FAIL="nothing") as service:
        service.wait_ready()
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1", "x-request-id": "asked"}
        assert service.chat(headers=headers).status_code == 200
        service.terminate()
        assert service.wait() == 0
    trace = bytes.fromhex(TRACE)
    request, queue, batch, prefill, decode = (
        collector.named(name, trace) for name in ("chat smollm2-135m-instruct", "queue", "batch", "prefill", "decode")
    )
    assert request.parent_span_id == bytes.fromhex(PARENT)
    assert request.trace_state == "vendor=1"
    assert request.kind == Span.SPAN_KIND_SERVER
    assert queue.parent_span_id == batch.parent_span_id == request.span_id
    assert prefill.parent_span_id == decode.parent_span_id == batch.span_id
    times = (
        *(request.start_time_unix_nano, queue.start_time_unix_nano),
        *(queue.end_time_unix_nano, batch.start_time_unix_nano, prefill.start_time_unix_nano),
        *(prefill.end_time_unix_nano, decode.start_time_unix_nano),
        *(decode.end_time_unix_nano, batch.end_time_unix_nano, request.end_time_unix_nano),
    )
    assert list(times) == sorted(times)
    said = {each.key: each.value for each in request.attributes}
    assert said["gen_ai.usage.output_tokens"].int_value == len("Hello!") + 1
    assert said["microbatch.request_id"].string_value == "asked"
    assert request.status.code != Status.STATUS_CODE_ERROR


def test_a_request_that_fails_is_a_span_with_an_error_and_no_trace_of_another(collector: Collector) -> None:
    with process("--otlp-endpoint", collector.url, module="tests.failing_server", FAIL="break_device") as service:
        service.wait_ready()
        assert service.chat().status_code == 500
        assert service.wait() == 1
    [request] = [span for span in collector.spans if span.name.startswith("chat")]
    assert request.status.code == Status.STATUS_CODE_ERROR
    assert request.parent_span_id == b""


def test_traces_without_their_packages_end_the_start_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(settings, "find_spec", missing)
    assert parse([]).otlp_endpoint is None
    with pytest.raises(SystemExit):
        parse(["--otlp-endpoint", "http://127.0.0.1:4318/v1/traces"])
    assert "microbatch[otel]" in capsys.readouterr().err
