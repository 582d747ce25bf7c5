"""The page's server: on this machine alone, for those who have its address.

The address holds a random token. Requests without it find nothing, and requests that name another host are refused, as
those of a web page are whose name was made to lead to this machine (DNS rebinding).
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from draftcli.errors import DraftpError, InputError
from draftcli.pictures import open_picture
from draftcli.preferences.reading import ANSWERS
from draftcli.rating.page import rating_page
from draftcli.rating.session import NotShown, RatingSession

HOST = "127.0.0.1"
_LARGEST = 4096  # bytes of what a page sends
_HEADERS = {
    "Content-Security-Policy": "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",  # the address is the key
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class _Guard:
    """Lets through what names this host and holds the token; adds the headers that browsers go by."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token.encode()
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        if port == 80:
            self.hosts |= {HOST, "localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        answer: ASGIApp = self.app
        if headers.getlist("host") not in [[host] for host in self.hosts]:
            answer = PlainTextResponse("this page answers to the address that draftp printed, and to no other", 403)
        elif not secrets.compare_digest(scope["path"].removeprefix("/").partition("/")[0].encode(), self.token):
            answer = PlainTextResponse("not found", 404)
        elif (origin := headers.get("origin")) is not None and origin.removeprefix("http://") not in self.hosts:
            answer = PlainTextResponse("other pages may not ask here", 403)
        await answer(scope, receive, with_headers)


def make_application(session: RatingSession, token: str, port: int) -> ASGIApp:
    """The page as an ASGI application.

    GET  TOKEN/              the page
    GET  TOKEN/state         `RatingSession.state`, as JSON
    GET  TOKEN/picture/NAME  the pixels, as PNG; what the file says of them beside is left out
    POST TOKEN/answer        {"name": of the pair, "answer": one of ANSWERS, "seconds": that it took}
    POST TOKEN/undo          {}
    POST TOKEN/finish        {}

    What is posted is answered with the new state; status 409 with it means that another pair is on the page by now.

    Args:
        session: what is on the page.
        token: first part of every address.
        port: at which requests come in, by their Host.
    """

    async def page(request: Request) -> Response:
        return HTMLResponse(rating_page())

    async def state(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.state))

    def picture(request: Request) -> Response:
        path = session.picture(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "not found")
        try:
            shown, data = open_picture(path), io.BytesIO()
        except DraftpError as error:
            raise HTTPException(404, str(error)) from None
        shown.save(data, "PNG", compress_level=1)
        return Response(data.getvalue(), media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    async def answer(request: Request) -> Response:
        given = await _read_json(request)
        name, chosen, seconds = given.get("name"), given.get("answer"), _duration(given.get("seconds"))
        if not isinstance(name, str) or chosen not in ANSWERS or seconds is None:
            raise HTTPException(400, f"expected name, answer ({', '.join(ANSWERS)}) and seconds from 0")
        return await _changed(session, lambda: session.answer(name, chosen, seconds))

    async def undo(request: Request) -> Response:
        await _read_json(request)
        return await _changed(session, session.undo)

    async def finish(request: Request) -> Response:
        await _read_json(request)
        return await _changed(session, session.ended.set)

    routes = [
        Route(f"/{token}/", page),
        Route(f"/{token}/state", state),
        Route(f"/{token}/picture/{{name}}", picture),
        Route(f"/{token}/answer", answer, methods=["POST"]),
        Route(f"/{token}/undo", undo, methods=["POST"]),
        Route(f"/{token}/finish", finish, methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes), token, port)


@contextmanager
def served(session: RatingSession, port: int = 0) -> Iterator[str]:
    """Inside, a thread serves the page; yields its address.

    Args:
        session: what is on the page.
        port: 0 takes any free one.

    Raises:
        InputError: the port is taken, or not for everybody.
    """
    token = secrets.token_urlsafe(32)
    with _listening(port) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            make_application(session, token, port), log_config=None, access_log=False, lifespan="off", ws="none",
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="page", daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{port}/{token}/"
        finally:
            server.should_exit = True
            thread.join()


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        if os.name == "posix":  # on Windows it would share the port with whoever has it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(f"--port {port}: cannot be used ({error.strerror}); leave it out for any free one") from None
    return listener


async def _changed(session: RatingSession, change: Callable[[], Any]) -> Response:
    """Make a change, off the server's own thread as it waits for the disk, and answer with the state."""
    status = 200
    try:
        await run_in_threadpool(change)
    except NotShown:
        status = 409
    except DraftpError as error:
        raise HTTPException(507, str(error)) from None
    return JSONResponse(await run_in_threadpool(session.state), status)


async def _read_json(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type") != "application/json":
        raise HTTPException(415, "expected application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST:
            raise HTTPException(413, "too long")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise HTTPException(400, "expected a JSON object")
    return given


def _duration(value: Any) -> float | None:
    """Seconds, where `value` is a number from 0 that a float can hold."""
    try:
        seconds = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
