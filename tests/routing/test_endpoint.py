"""A chat endpoint, played by a server on this machine."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from consilience.errors import InputError, MachineError
from consilience.routing.instructions import endpoint
from consilience.routing.instructions.endpoint import Endpoint, check_url

KEY = "CONSILIENCE_TEST_KEY"


@dataclass
class Played:
    """What the server answers, in turn, and what it was asked."""

    url: str = ""
    answers: list[tuple[int, bytes, dict[str, str]]] = field(default_factory=list[tuple[int, bytes, dict[str, str]]])
    asked: list[tuple[str, dict[str, Any], str | None]] = field(
        default_factory=list[tuple[str, dict[str, Any], str | None]]
    )

    def says(self, text: str) -> None:
        self.answers.append((200, json.dumps({"choices": [{"message": {"content": text}}]}).encode(), {}))

    def fails(self, code: int, body: bytes = b"no", **headers: str) -> None:
        self.answers.append((code, body, headers))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    state = Played()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.asked.append((self.path, json.loads(body), self.headers.get("Authorization")))
            code, answer, headers = state.answers.pop(0)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            return

    monkeypatch.setattr(endpoint, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_prompt_is_asked_as_the_protocol_has_it(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, " secret-1\n")
    played.says("One.")
    played.says("Zwölf.")
    assert Endpoint(played.url, "tiny", KEY, tokens=7)(["a?", "b?"]) == ["One.", "Zwölf."]
    path, body, key = played.asked[1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret-1")
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "b?"}],
        "max_tokens": 7,
        "temperature": 0,
    }


def test_the_whole_address_does_as_well_and_no_key_is_sent_unless_named(played: Played) -> None:
    played.says("Yes.")
    assert Endpoint(f"{played.url}/chat/completions", "tiny")(["a?"]) == ["Yes."]
    assert played.asked[0][0] == "/v1/chat/completions"
    assert played.asked[0][2] is None


def test_what_may_pass_is_tried_again(played: Played) -> None:
    played.fails(503)
    played.fails(429)
    played.says("At last.")
    assert Endpoint(played.url, "tiny", retries=2)(["a?"]) == ["At last."]
    assert len(played.asked) == 3


def test_it_gives_up_after_the_retries(played: Played) -> None:
    played.fails(503)
    played.fails(503)
    with pytest.raises(MachineError, match=r"answered 503 .*; check the endpoint's url, model and key"):
        Endpoint(played.url, "tiny", retries=1)(["a?"])
    assert len(played.asked) == 2


def test_a_refusal_is_not_repeated_and_shows_no_key(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret-2")
    played.fails(401, b'{"error": "bad key secret-2"}')
    with pytest.raises(MachineError, match="answered 401") as caught:
        Endpoint(played.url, "tiny", KEY)(["a?"])
    assert "secret" not in str(caught.value)
    assert len(played.asked) == 1


def test_the_key_follows_no_redirection(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret-3")
    played.fails(302, Location=f"{played.url}/elsewhere")
    with pytest.raises(MachineError, match="answered 302"):
        Endpoint(played.url, "tiny", KEY)(["a?"])
    assert len(played.asked) == 1


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}'])
def test_other_answers_are_named(played: Played, body: bytes) -> None:
    played.answers.append((200, body, {}))
    with pytest.raises(MachineError, match="something else than a chat completion"):
        Endpoint(played.url, "tiny")(["a?"])


def test_nobody_there(played: Played) -> None:
    port = int(played.url.rpartition(":")[2].removesuffix("/v1"))
    free = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    gone = free.server_port
    free.server_close()
    assert gone != port
    with pytest.raises(MachineError, match="cannot be reached"):
        Endpoint(f"http://127.0.0.1:{gone}", "tiny", retries=1)(["a?"])


def test_a_missing_or_odd_key_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(InputError, match=f"variable {KEY} is not set"):
        Endpoint("http://127.0.0.1:9", "tiny", KEY)(["a?"])
    monkeypatch.setenv(KEY, "two\nlines")
    with pytest.raises(InputError, match=f"variable {KEY} holds what no key does"):
        Endpoint("http://127.0.0.1:9", "tiny", KEY)(["a?"])


@pytest.mark.parametrize(
    "url", ["", "ftp://a/b", "file:///etc/passwd", "https://", "http://a b/", "http://a:0/", "http://[", "http://a\n/"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        check_url(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://example.org/v1/chat/completions"])
def test_addresses_pass(url: str) -> None:
    check_url(url)
