"""A language model behind an OpenAI-compatible chat-completions address."""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from consilience.errors import InputError, MachineError

#: Answers of a server that may do better a little later.
_PASSING = (408, 429, 500, 502, 503, 504)
#: Seconds before the first retry; every further one waits twice as long.
PAUSE = 1.0
_LONGEST_ANSWER = 1 << 20


class _Here(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go to whom it leads to."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Return nothing, which makes the redirection an error."""


@dataclass(frozen=True)
class Endpoint:
    """A model that answers prompts over HTTP.

    Attributes:
        url: of chat completions, or what comes before ``/chat/completions``.
        model: the model's name there.
        key: the environment variable that holds the key; empty: none is sent.
        timeout: seconds until a request is given up, however its answer trickles in.
        retries: further attempts where the network or the server fails.
        tokens: the most tokens of an answer.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 30.0
    retries: int = 2
    tokens: int = 64

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Return the answers of the model, one request a prompt.

        Raises:
            InputError: the key's variable is not set.
            MachineError: the endpoint cannot be reached, refuses, or answers something else.
        """
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: str) -> str:
        request = self._request(prompt)
        for attempt in range(self.retries + 1):
            reason, passing = self._try(request)
            if isinstance(reason, bytes):
                return self._content(reason)
            if not passing or attempt == self.retries:
                raise MachineError(f"{self.url}: {reason}; check the endpoint's url, model and key, then run it again")
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError

    def _try(self, request: urllib.request.Request) -> tuple[bytes | str, bool]:
        """Return the answer's bytes, or in words why there are none, and whether that may pass."""
        try:
            return _read(request, self.timeout), False
        except HTTPError as error:
            error.close()
            return f"answered {error.code} {error.reason}", error.code in _PASSING
        except TimeoutError:
            return f"did not answer within {self.timeout:g} s", True
        except (OSError, HTTPException) as error:
            return f"cannot be reached ({getattr(error, 'reason', None) or error})", True

    def _request(self, prompt: str) -> urllib.request.Request:
        turns = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": turns, "max_tokens": self.tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {_secret(self.key)}"
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        return urllib.request.Request(url, json.dumps(body).encode(), headers)

    def _content(self, answer: bytes) -> str:
        try:
            content: Any = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise MachineError(f"{self.url}: answered something else than a chat completion; check the endpoint's url")
        return content


def _read(request: urllib.request.Request, timeout: float) -> bytes:
    """Return the whole answer to a request.

    The socket's own timeout bounds each of its reads, and a server may send a byte at a time: the request runs in a
    thread that is waited for as long and no longer, and that ends soon after.

    Raises:
        TimeoutError: it took longer than ``timeout`` seconds.
        OSError: the network or the server failed.
    """
    found: list[bytes | Exception] = []
    deadline = time.monotonic() + timeout

    def read() -> None:
        try:
            with urllib.request.build_opener(_Here()).open(request, timeout=timeout) as reply:
                parts, size = list[bytes](), 0
                while (part := reply.read1(1 << 16)) and size < _LONGEST_ANSWER:
                    parts.append(part)
                    size += len(part)
                    if time.monotonic() > deadline:
                        return
            found.append(b"".join(parts))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def check_url(url: str) -> None:
    """Check an address before anything is sent to it.

    Raises:
        InputError: it is not one of HTTP.
    """
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise InputError(
                f"url: {parts.scheme}://{parts.hostname}: a name or password in an address is sent to nobody; name "
                "the environment variable that holds the key as key"
            )
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or any(not 32 < ord(c) < 127 for c in url):
        raise InputError(f"url: {url!r} is no address; write it as https://HOST/v1/chat/completions")


def _secret(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise InputError(f"key: the environment variable {variable} is not set; export it, or leave key out")
    if any(not 32 < ord(c) < 127 for c in value):
        raise InputError(f"key: the environment variable {variable} holds what no key does; set it again")
    return value
