"""A page for each of several priors on one server: the first at /, the others at /1/, /2/, ...

    GET /2/ -> open_page(2), once -> the page's own app, asked for /

A prior is loaded when somebody first opens its page.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import NamedTuple

from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sampling.playground.guard import Guard
from sampling.playground.tasks import one_line_message
from stage1_tokenizer.engine.errors import UserError

CLOSED = "/closed"
"""Path that no page has."""


class OpenedPage(NamedTuple):
    """A page that is served."""

    app: FastAPI
    guard: Guard


def page_root(number: int) -> str:
    """Return the beginning of the paths of a page."""
    return f"/{number}" if number else ""


class Choice:
    """An ASGI app with several pages. It opens the first one at its start, the others when they are asked for."""

    def __init__(self, open_page: Callable[[int], OpenedPage], count: int) -> None:
        """open_page: opens the page of a number below `count`; a UserError that it raises is the answer."""
        self._open_page, self._count = open_page, count
        self._opened = {0: open_page(0)}
        self._opening, self._lifetimes = asyncio.Lock(), AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request by its page."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        found = re.fullmatch(r"/([1-9]\d{0,3})(/.*)", scope["path"], re.ASCII | re.DOTALL)
        number, path = (int(found[1]), found[2]) if found and int(found[1]) < self._count else (0, scope["path"])
        scope = {**scope, "path": path, "raw_path": path.encode()}
        if number not in self._opened and (path != "/" or self._opened[0].guard.refusal(scope)):
            number, scope["path"] = 0, CLOSED  # requests that are refused must not load a prior
        try:
            answer: ASGIApp = await self._open(number)
        except UserError as error:
            answer = PlainTextResponse(one_line_message(error), 500)
        await answer(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start the first page, and end all pages when the server ends."""
        await receive()
        async with self._lifetimes:
            await self._start(self._opened[0])
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self, number: int) -> Guard:
        """Return a page, which is opened if it is not yet; meanwhile the others do not answer."""
        async with self._opening:
            if number not in self._opened:
                page = self._open_page(number)
                await self._start(page)
                self._opened[number] = page
        return self._opened[number].guard

    async def _start(self, page: OpenedPage) -> None:
        await self._lifetimes.enter_async_context(page.app.router.lifespan_context(page.app))
