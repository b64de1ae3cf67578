"""Where a request ends and what it asks of the connection: nothing in a body is ever taken for a request."""

import socket

import orjson
import pytest

from tests.live import QUESTION, Live, live, raw_request, scripted, text_of

CHAT = orjson.dumps({"messages": QUESTION})
STREAM = orjson.dumps({"messages": QUESTION, "stream": True})
HIDDEN = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
H2C = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA")


def answers_to(service: Live, *sent: bytes) -> bytes:
    """All that is answered to these bytes until the server closes."""
    with service.connect() as bare:
        for data in sent:
            bare.sendall(data)
        return read_all(bare)


def read_all(bare: socket.socket) -> bytes:
    found = b""
    while data := bare.recv(65536):
        found += data
    return found


def chunked(*chunks: bytes, trailers: bytes = b"", head: bytes = b"") -> bytes:
    """A chat request whose body comes in chunks."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        + head
        + b"\r\n"
        + body
        + b"0\r\n"
        + trailers
        + b"\r\n"
    )


# Upgrades


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "streamed"])
def test_a_request_that_asks_for_another_protocol_keeps_its_body(body: bytes) -> None:
    with live(scripted("H")) as service:
        answer = answers_to(service, raw_request(body, *H2C))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"content":"H"' in answer


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.0", "x"])
def test_the_body_of_an_upgrade_is_no_second_request(protocol: str) -> None:
    with live() as service:
        answer = answers_to(service, raw_request(HIDDEN, "Connection: Upgrade, close", f"Upgrade: {protocol}"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_connection_goes_on_after_an_upgrade_that_was_not_made() -> None:
    upgrade = raw_request(CHAT, "Connection: Upgrade", "Upgrade: h2c")
    with live() as service:
        answer = answers_to(service, upgrade, raw_request(CHAT, "Connection: close"))
    assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("request_line", [b"CONNECT x:80 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"PRI * HTTP/2.0"])
def test_what_no_path_is_meant_for_is_refused(request_line: bytes) -> None:
    with live() as service:
        answer = answers_to(service, request_line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer[:12] in (b"HTTP/1.1 404", b"HTTP/1.1 405", b"HTTP/1.1 505")
    assert b'"error"' in answer


# Versions


def test_a_client_of_http_1_0_gets_a_stream_without_chunks() -> None:
    old = raw_request(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0")
    with live(scripted("Hello!")) as service:
        head, _, body = answers_to(service, old).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    *events, rest = body.decode().split("\n\n")
    assert (events[-1], rest) == ("data: [DONE]", "")
    assert text_of([orjson.loads(event.removeprefix("data: ")) for event in events[:-1]]) == "Hello!"


def test_a_client_of_http_1_0_gets_a_plain_answer() -> None:
    with live() as service:
        head, _, body = answers_to(service, raw_request(CHAT).replace(b"HTTP/1.1", b"HTTP/1.0")).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert orjson.loads(body)["object"] == "chat.completion"


# Ends of bodies

AMBIGUOUS = {
    "two ways": chunked(CHAT, head=b"Content-Length: 5\r\n"),
    "two lengths": raw_request(CHAT, "Content-Length: 5"),
    "a list of lengths": raw_request(CHAT).replace(b"Content-Length: ", b"Content-Length: 5, "),
    "chunks in HTTP/1.0": chunked(CHAT).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a negative length": raw_request(CHAT, length=-5),
    "a length with a sign": raw_request(CHAT).replace(b"Content-Length: ", b"Content-Length: +"),
    "a chunk longer than it says": chunked(CHAT).replace(b"\r\n%x\r\n" % len(CHAT), b"\r\n5\r\n"),
    "a chunk of a negative size": chunked(CHAT).replace(b"\r\n%x\r\n" % len(CHAT), b"\r\n-5\r\n"),
    "a space before a colon": raw_request(CHAT, "Transfer-Encoding : chunked"),
    "no host": raw_request(CHAT).replace(b"Host: localhost\r\n", b""),
    "two hosts": raw_request(CHAT, "Host: other"),
}


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_a_body_whose_end_could_be_seen_elsewhere_is_refused(what: str) -> None:
    with live() as service:
        answer = answers_to(service, AMBIGUOUS[what], HIDDEN)
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b'"error"' in answer
        assert service.ended() == []


REFUSED_HEADS = {
    "two lengths of a body": b"HEAD / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
    "another version": b"HEAD /version HTTP/2.0\r\nHost: x\r\n\r\n",
    "a chunk without a size": b"HEAD /version HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
}


@pytest.mark.parametrize("what", REFUSED_HEADS)
def test_what_asks_for_a_head_alone_is_refused_with_one(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with live() as service:
        head, end, body = answers_to(service, REFUSED_HEADS[what]).partition(b"\r\n\r\n")
    assert head[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 505")
    assert (end, body) == (b"\r\n\r\n", b"")
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("coding", ["gzip", "gzip, chunked", "identity"])
def test_a_transfer_coding_that_is_not_known_is_refused(coding: str) -> None:
    with live() as service:
        answer = answers_to(service, chunked(CHAT).replace(b": chunked", f": {coding}".encode()))
    assert answer.startswith(b"HTTP/1.1 501")


def test_a_key_is_not_taken_from_trailers() -> None:
    with live(api_keys=("known",)) as service:
        inside = chunked(CHAT, head=b"Authorization: Bearer known\r\nConnection: close\r\n")
        behind = chunked(CHAT, head=b"Connection: close\r\n", trailers=b"Authorization: Bearer known\r\n")
        assert answers_to(service, inside).startswith(b"HTTP/1.1 200")
        assert answers_to(service, behind).startswith(b"HTTP/1.1 401")


def test_trailers_and_what_chunks_say_of_themselves_are_ignored() -> None:
    body = chunked(CHAT[:9], CHAT[9:], head=b"Connection: close\r\n", trailers=b"X-Sum: 1\r\nX-More: 2\r\n")
    with live() as service:
        assert answers_to(service, body.replace(b"\r\n9\r\n", b"\r\n9;name=value\r\n")).startswith(b"HTTP/1.1 200")


# Requests on one connection


def test_requests_that_come_together_are_answered_in_their_order() -> None:
    paths = [b"/version", b"/nothing", b"/health/live", b"/version"]
    sent = b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths)
    with live() as service:
        answer = answers_to(service, sent + raw_request(CHAT, "Connection: close"), HIDDEN)
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200", b"200", b"200"]


def test_empty_lines_before_a_request_mean_nothing() -> None:
    with live() as service:
        answer = answers_to(
            service, b"\r\n\r\n" + raw_request(CHAT) + b"\r\n", b"\r\n" + raw_request(CHAT, "Connection: close")
        )
    assert answer.count(b"HTTP/1.1 200") == 2


def test_a_request_may_name_the_whole_url() -> None:
    with live() as service:
        asked = b"GET http://x:1/version?a=b HTTP/1.1\r\nHost: x:1\r\nConnection: close\r\n\r\n"
        assert b'"version"' in answers_to(service, asked)


# Clients that ask before they send


def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    request = raw_request(CHAT, "Expect: 100-continue", "Connection: close")
    head, blank, body = request.partition(b"\r\n\r\n")
    with live() as service, service.connect() as bare:
        bare.sendall(head + blank)
        assert bare.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        bare.sendall(body)
        assert read_all(bare).startswith(b"HTTP/1.1 200")


def test_a_client_that_asks_first_and_is_refused_can_send_no_other_request_there() -> None:
    """It could be meant as the body."""
    head, blank, _ = raw_request(CHAT, "Expect: 100-continue").partition(b"\r\n\r\n")
    with live(api_keys=("known",)) as service:
        answer = answers_to(service, head + blank)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in answer.lower()


# Clients that have nothing more to say


@pytest.mark.parametrize("path", ["/health/live", "/version", "/metrics", "/nothing"])
def test_who_has_nothing_more_to_say_is_still_answered(path: str) -> None:
    with live() as service, service.connect() as bare:
        bare.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        bare.shutdown(socket.SHUT_WR)
        assert read_all(bare)[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 404")


def test_a_large_plain_answer_reaches_who_has_nothing_more_to_say() -> None:
    with live() as service, service.connect() as bare:
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bare.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        bare.shutdown(socket.SHUT_WR)
        head, _, body = read_all(bare).partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head.lower()
