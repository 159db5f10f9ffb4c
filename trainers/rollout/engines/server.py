"""One server that is spoken to over HTTP: asked again while it is away, until it has been silent for too long."""

from __future__ import annotations

import http.client
import io
import json
import os
import selectors
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ...errors import UserError, first_line

T = TypeVar("T")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between two attempts; each is twice as long as the one before."""
TICK_S = 0.25  # between two looks at whether the answer is still wanted
KEY = "VLLM_API_KEY"  # the variable of vLLM's own


class Unavailable(Exception):
    """No answer, or one that says to come back: the server may do better the next time."""


class Answered(Exception):
    """An answer that is none. status: of HTTP. reason: in the server's own words."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class Failed(Answered, Unavailable):
    """It answered that it failed, or that it has too much to do."""


class Refused(Answered):
    """The server does not want what it was asked."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Server:
    """url: as the user gave it, without what follows it in a request. timeout: seconds.

    An answer is waited for while the server has answered anything within `timeout`, since with a thousand requests in
    its queue the last one waits for long, and with nothing answered none will be.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        try:
            if parts.scheme not in kinds or not parts.hostname or parts.query or parts.fragment:
                raise ValueError
            self.connect: Callable[..., http.client.HTTPConnection] = kinds[parts.scheme]
            self.place = (parts.hostname, parts.port)
        except ValueError:  # urllib's too, of a port that is none
            raise UserError(
                f"--vllm_server_base_url {url} is no address: it is http:// or https://, a host and a port, as "
                "http://localhost:8000"
            ) from None
        self.url, self.timeout = url.rstrip("/"), timeout
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")  # with which other clients want it
        self.heard = -float("inf")  # when it last answered
        self.lock = threading.Lock()  # of who gives it an adapter again
        self.given: dict[str, float] = {}  # when it was last given which

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        read: Callable[[Any], T] = lambda answer: answer,
        stop: threading.Event | None = None,
        once: float | None = None,
        failures: int | None = None,
    ) -> T:
        """What `read` makes of the answer's JSON; a GET without a body, else a POST.

        once: try for so many seconds, and no second time. failures: so many answers that it failed (5xx) are believed,
        None: none of them. stop: set where the answer is not wanted any more.

        Raises Refused, what `read` raises but Unavailable, Cancelled, and UserError where the server was silent for
        `timeout`; with `once` Unavailable in its place.
        """
        began, pause, failed, stop = time.monotonic(), FIRST_PAUSE_S, 0, stop or threading.Event()
        timeout = self.timeout if once is None else once
        while True:
            try:
                return self._attempt(path, body, began, timeout, read, stop)
            except (OSError, http.client.HTTPException, Unavailable) as error:
                reason = getattr(error, "strerror", None) or first_line(error)
                left = self._until(began, timeout) - time.monotonic()
                failed += isinstance(error, Failed)
                if isinstance(error, Failed) and failed == failures:
                    raise Refused(error.status, error.reason) from error
                if once is not None:
                    raise Unavailable(reason) from error
                if left <= 0:
                    raise UserError(
                        f"the vLLM server {self.url} has not answered for {timeout:g} s ({reason}): start it, correct "
                        "--vllm_server_base_url, or wait longer with --vllm_server_timeout"
                    ) from error
            if stop.wait(min(pause, left)):
                raise Cancelled
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _until(self, began: float, timeout: float) -> float:
        return max(began, self.heard) + timeout

    def _attempt(
        self, path: str, body: Any, began: float, timeout: float, read: Callable[[Any], T], stop: threading.Event
    ) -> T:
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        )
        least = time.monotonic() + TICK_S  # which the last attempt has, too
        connection = self.connect(*self.place, timeout=max(least, self._until(began, timeout)) - time.monotonic())

        def wait() -> None:
            if stop.is_set():
                raise Cancelled
            if time.monotonic() > max(least, self._until(began, timeout)):
                raise TimeoutError("it took the request, but no whole answer came back")

        connection.response_class = lambda sock, **more: http.client.HTTPResponse(patient(sock, wait), **more)  # type: ignore[assignment]
        try:
            sent = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", self.prefix + path, sent, headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode(errors="replace")
        finally:
            connection.close()
        if status >= 500 or status in (408, 425, 429):
            raise Failed(status, reason_of(text))
        if status >= 400:
            self.heard = time.monotonic()
            raise Refused(status, reason_of(text))
        try:
            answer = json.loads(text or "null")
        except (ValueError, RecursionError):
            answer = text  # of what only says that it was done
        found = read(answer)
        self.heard = time.monotonic()  # not where it is Unavailable in so many words, which may be for ever
        return found


class Patient(io.RawIOBase):
    """What comes in through a socket. wait: called before each piece of it, and now and then while none comes; raises
    where it is not waited for any more."""

    def __init__(self, sock: Any, wait: Callable[[], None]) -> None:
        self.raw, self.wait = sock.makefile("rb", buffering=0), wait
        self.pending: Callable[[], int] = getattr(sock, "pending", int)  # bytes that TLS has taken in already

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        self.wait()
        if not self.pending():
            with selectors.DefaultSelector() as selector:
                selector.register(self.raw, selectors.EVENT_READ)
                while not selector.select(TICK_S):
                    self.wait()
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def patient(sock: Any, wait: Callable[[], None]) -> Any:
    """As much of a socket as an `HTTPResponse` uses, read by `Patient`."""
    return SimpleNamespace(makefile=lambda mode: io.BufferedReader(Patient(sock, wait)))


def reason_of(text: str) -> str:
    """What an answer that refuses says, in one line: vLLM's of any age, FastAPI's, or its beginning."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = text
    if isinstance(answer, dict):
        inside = answer.get("error", answer)
        answer = inside.get("message") or inside.get("detail") or inside if isinstance(inside, dict) else inside
    said = " ".join(str(answer).split()).rstrip(".")
    return said if len(said) <= 300 else said[:297] + "..."
