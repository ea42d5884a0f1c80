"""Who may come in: names, origins, keys, and limits on what a stranger can use up.

What it teaches: a server on your own machine is open to every web page you visit unless it looks at
who is asking. A stranger's page may send requests to 127.0.0.1, so Origin is checked; it may have
its own name lead to 127.0.0.1, so Host is checked. Both hold for WebSockets, too, which no browser
keeps from crossing sites. And whatever can be had without end is asked for without end: bytes of a
body, seconds between them, connections, tokens.

Parent: none
New: everything

Read in this order: Limits, APIError, Gate.
"""

import asyncio
import contextlib
import hmac
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


@dataclass
class Limits:
    """What a stranger may ask for."""

    max_body: int = 2**20  # largest request body, bytes
    max_tokens: int = 4096  # longest answer, tokens
    max_choices: int = 8  # answers to one request: n times the number of prompts
    max_running: int = 32  # streams in a pass of a model
    max_waiting: int = 64  # requests that wait for a model; more are told to come again
    max_connections: int = 256  # requests and WebSockets at once
    seconds: float = 600  # longest time for an answer, in seconds
    patience: float = 20  # longest wait for the next part of a body, or for a reader, in seconds

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} {value} is not above 0")


class APIError(Exception):
    """What goes to the client as {"error": ...}, in OpenAI's form."""

    def __init__(
        self, status, message, code=None, param=None, kind="invalid_request_error", wait=0
    ):
        super().__init__(message)
        self.status, self.wait = status, wait
        self.body = {"message": message, "type": kind, "param": param, "code": code}

    def response(self):
        headers = {"Retry-After": str(self.wait)} if self.wait else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.body}, self.status, headers)


def shows_key(authorization, key):
    """Whether a header shows the key; compared in a time that does not tell how much is right."""
    if key is None:
        return True
    shown = authorization.removeprefix("Bearer ").strip()
    return hmac.compare_digest(shown.encode(errors="replace"), key.encode())


class Gate:
    """Looks at every request before the application does: ASGI middleware.

    Host has to be one of ours (else a page may have its own name lead here), Origin the same as
    Host (else a page of another site is asking), the key right, the body small and not slow."""

    def __init__(self, app, key, hosts, limits, counts):
        self.app, self.key, self.hosts, self.limits, self.counts = app, key, hosts, limits, counts
        self.open = 0  # connections

    def problem(self, scope):
        """The APIError for a request that may not come in, or None."""
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        host, path = headers.get("host", ""), scope["path"]
        if self.hosts is not None and hostname(host) not in self.hosts:
            return APIError(421, f"{host[:100]!r} is not a name of this server")
        origin = headers.get("origin")
        if origin is not None and (place(origin) != host.lower()):
            return APIError(403, f"a page from {origin[:100]!r} may not use this server")
        if headers.get("sec-fetch-site") == "cross-site" and path.startswith(("/v1", "/api")):
            return APIError(403, "another site may not use this server")
        closed = path.startswith(("/v1", "/api", "/metrics")) and path != "/api/status"
        if scope["type"] == "http" and closed:  # a WebSocket shows its key in its first message
            if not shows_key(headers.get("authorization", ""), self.key):
                return APIError(
                    401, "no API key, or another: Authorization: Bearer KEY", "invalid_api_key"
                )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.limits.max_body:
            return self.too_large()
        if self.open >= self.limits.max_connections:
            text = f"{self.open} connections are open already"
            return APIError(503, text, "overloaded", None, "server_error", wait=1)
        return None

    def too_large(self):
        return APIError(413, f"the body is larger than {self.limits.max_body:,} bytes")

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        problem = self.problem(scope)
        if scope["type"] == "websocket":
            if problem:
                await receive()
                return await send({"type": "websocket.close", "code": 1008})
            return await self.counted(scope, receive, send)

        async def answer(message):
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other") if message["status"] != 404 else "other"
                name = (path or "page", message["status"])
                self.counts[name] = self.counts.get(name, 0) + 1
                headers = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                ]
                if b"cache-control" not in dict(message["headers"]):
                    headers.append((b"cache-control", b"no-cache"))  # a page built anew is seen
                message = message | {"headers": [*message["headers"], *headers]}
            # A reader that does not read may hold a connection, but not for ever.
            await asyncio.wait_for(send(message), self.limits.patience)

        if problem is None:
            body = await self.body(scope, receive)
            problem = body if isinstance(body, APIError) else None
        if problem is not None:
            return await problem.response()(scope, receive, answer)
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return parts.pop() if parts else await receive()

        await self.counted(scope, again, answer)

    async def counted(self, scope, receive, send):
        self.open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open -= 1

    async def body(self, scope, receive):
        """The whole body, or an APIError where it is too large or too slow."""
        body, more = b"", True
        try:
            while more:
                message = await asyncio.wait_for(receive(), self.limits.patience)
                if message["type"] == "http.disconnect":
                    return APIError(499, "the client closed the connection")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > self.limits.max_body:
                    return self.too_large()
        except asyncio.TimeoutError:
            return APIError(408, f"no more of the body for {self.limits.patience} seconds")
        return body


def hostname(host):
    """Of a Host header: without the port, and without the brackets of IPv6."""
    return re.sub(r":\d+$", "", host).strip("[]").lower()


def place(origin):
    """host:port of an Origin header; None for `null` and what is no URL."""
    with contextlib.suppress(ValueError):
        return urlsplit(origin).netloc.lower() or None
