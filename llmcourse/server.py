"""`llmcourse serve`: a model behind HTTP, in the form of OpenAI's API.

Hand-written: this is plumbing. The lesson, many texts at once, is the chapter `nbs/15c_serving.ipynb`, whose `Engine`
does the work. One thread owns the engine (`llmcourse.engine_thread`). The event loop of this module reads requests,
hands them over, and writes tokens to the clients as they come. Nothing of FastAPI is imported before a server is made:
it is the extra `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import importlib.util
import ipaddress
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmcourse import openai_form as form
from llmcourse.engine_thread import Job, Note, Runner, log_error
from llmcourse.openai_form import Ask, Refused, TextStream, Usage
from llmcourse.settings import BadInput, number, read_text, require, whole

__all__ = ["ModelServer", "ServerConfig", "listen", "read_key", "serve"]

KEY_VARIABLE = "LLMCOURSE_API_KEY"
MASKS = 32
"""token masks that are kept"""
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens and what it allows.

    Raises:
        BadInput: an absurd value, or an address that others can reach without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one"""
    max_batch: int = 8
    """requests that run at a time"""
    cache_tokens: int = 4096
    """tokens that the key-value cache has room for"""
    queue: int = 64
    """requests that may wait; one more gets 429"""
    max_tokens: int = 1024
    """new tokens that a request may ask for"""
    timeout: float = 300.0
    """seconds for one answer: then it ends as it is (`length`), or with 504 where it has not begun"""
    grace: float = 30.0
    """seconds that running answers get when the server is told to stop"""
    body_bytes: int = 2**20
    """longest body of a request"""
    idle: float = 30.0
    """seconds in which a request has to arrive, and in which a client has to take what it is sent"""
    connections: int = 512
    """open connections; one more is closed at once"""
    key: str | None = field(default=None, repr=False)
    """what clients have to show; None: nothing"""

    def __post_init__(self):
        whole("port", self.port, 0, 65535)
        for name in ("max_batch", "max_tokens", "body_bytes", "connections"):
            whole(name, getattr(self, name), 1, 2**31)
        whole("cache_tokens", self.cache_tokens, 2, 2**31)
        whole("queue", self.queue, 0, 2**31)
        for name in ("timeout", "idle"):
            number(name, getattr(self, name), high=10**6, above=0)
        number("grace", self.grace, 0, 10**6)
        require(isinstance(self.host, str) and bool(self.host), "host", self.host, "an address of this machine")
        if self.key is not None:
            good = isinstance(self.key, str) and len(self.key) >= 8 and self.key.isascii() and self.key.isprintable()
            allowed = "at least 8 printable ASCII characters without spaces"
            require(good and " " not in self.key, "key", "not shown", allowed)
        if self.key is None and not _is_loopback(self.host):
            raise BadInput(
                f"host is {self.host!r}, which others can reach, and there is no key; allowed: 127.0.0.1, or a key in "
                f"the variable {KEY_VARIABLE} or in a file (--api-key-file)."
            )

    @property
    def room(self) -> int:
        """Requests that run and wait at a time."""
        return self.max_batch + self.queue


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_key(file: str | Path | None = None) -> str | None:
    """The key that clients have to show: from a file, or from LLMCOURSE_API_KEY. Never from the command line, which
    every user of the machine can read."""
    key = read_text(Path(file), "api-key-file").strip() if file is not None else os.environ.get(KEY_VARIABLE, "")
    require(bool(key) or file is None, "api-key-file", str(file), "a file with a key in it")
    return key or None


def listen(config: ServerConfig) -> socket.socket:
    """A socket that listens at the configured address: before the model is loaded, which takes longer.

    Raises:
        BadInput: no such address, a port that is in use, or one that is not ours to take.
    """
    where = f"{config.host}:{config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):  # a label that is no host name
        raise BadInput(f"host is {config.host!r}; allowed: an address of this machine.") from None
    sock = socket.socket(found[0][0], socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # there it means: a port whose last connection has just ended
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found[0][4])
        sock.listen(128)
    except OSError as e:
        sock.close()
        raise BadInput(
            f"port is {config.port}, and {where} cannot be had ({os.strerror(e.errno)}); "
            "allowed: a free port of this machine (--port 0 takes any)."
        ) from None
    return sock


class Meters:
    """What /metrics shows, in a registry of its own: two servers in a process do not count together."""

    def __init__(self, runner: Runner):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        made = functools.partial(dict, registry=self.registry)
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.requests = Counter("llmcourse_requests", "Requests by path and status.", ["path", "status"], **made())
        self.read = Counter("llmcourse_prompt_tokens", "Tokens of prompts that were answered.", **made())
        self.written = Counter("llmcourse_new_tokens", "Tokens that were written.", **made())
        self.gone = Counter("llmcourse_cancelled", "Requests whose client went away.", **made())
        self.first = Histogram("llmcourse_first_token_seconds", "Until the first token.", buckets=seconds, **made())
        self.whole = Histogram("llmcourse_answer_seconds", "Until the end of an answer.", buckets=seconds, **made())
        for name in runner.stats._fields:  # since the engine was made: it is made again after a failure
            gauge = Gauge(f"llmcourse_engine_{name}", f"{name} of the engine's stats.", **made())
            gauge.set_function(lambda name=name: getattr(runner.stats, name))

    def page(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class Piece(NamedTuple):
    """What is certain of the text of one prompt's answer."""

    index: int
    text: str
    why: str | None
    """None: more may come; else stop or length"""


class Generation:
    """The answer to one request as it grows. `pieces` gives it out; leaving it early cancels what still runs."""

    def __init__(self, server: ModelServer, ask: Ask, prompts: Sequence[Sequence[int]], requests: Sequence[Any]):
        self.server, self.ask = server, ask
        self.notes: asyncio.Queue[Note] = asyncio.Queue()
        self.jobs = [Job(request, i, self.notes) for i, request in enumerate(requests)]
        self.usage = Usage(prompt=sum(map(len, prompts)))
        self.began = time.perf_counter()
        self.end = asyncio.get_running_loop().time() + server.config.timeout
        name = "chatcmpl" if ask.chat else "cmpl"
        self.head = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": server.name}

    def hurry(self, refused: Refused) -> None:
        """End it now, with an error."""
        self.notes.put_nowait(Note(0, error=refused))

    async def pieces(self) -> AsyncIterator[Piece]:
        """
        Raises:
            Refused: the engine could not take the prompt or failed, there was no token in time, or the server stops.
        """
        streams = [TextStream(self.server.decode, self.ask.stop) for _ in self.jobs]
        meters, open_ = self.server.meters, set(range(len(self.jobs)))
        self.server.runner.submit(self.jobs)
        self.server.generations.add(self)
        try:
            while open_:
                note = await self._next()
                if note is None:  # no time is left: what is there is the answer
                    for i in sorted(open_):
                        yield Piece(i, streams[i].end(), "length")
                    break
                if note.error is not None:
                    raise note.error
                if note.index not in open_:
                    continue
                piece, stream = "", streams[note.index]
                if note.token is not None:
                    if not self.usage.new:
                        meters.first.observe(time.perf_counter() - self.began)
                        meters.read.inc(self.usage.prompt)
                    self.usage.new += 1
                    piece = "" if note.finished == "stop" else stream.push(note.token)
                why = "stop" if stream.stopped else note.finished
                if why is not None:
                    open_.discard(note.index)
                    piece += stream.end()
                    why = "stop" if stream.stopped else why
                    self.server.runner.cancel(self.jobs[note.index : note.index + 1])
                if piece or why is not None:
                    yield Piece(note.index, piece, why)
            meters.whole.observe(time.perf_counter() - self.began)
        finally:
            self.server.generations.discard(self)
            self.server.runner.cancel(self.jobs)
            meters.written.inc(self.usage.new)

    async def _next(self) -> Note | None:
        """What comes next; None when the time is up."""
        try:
            async with asyncio.timeout_at(self.end):
                return await self.notes.get()
        except TimeoutError:
            if self.usage.new:
                return None
            text = f"no token came within {self.server.config.timeout:g} seconds; try again when fewer wait."
            raise Refused(text, 504, code="timeout", kind="server_error", headers={"Retry-After": "5"}) from None


class ModelServer:
    """A model, its engine and the HTTP application in front of it.

    Args:
        model, tokenizer: as `load_model` gives them.
        name: what clients call the model.
        make_engine: a new engine for the model; by default `llmcourse.serving.Engine`.
    Raises:
        BadInput: the extra `serve` is not installed, there is no tokenizer, or the engine cannot serve the model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, config: ServerConfig | None = None,
        make_engine: Callable[[], Any] | None = None,
    ):  # fmt: skip
        _need_extra()
        from llmcourse.serving import limits_of

        require(tokenizer is not None, "model", name, "a model with a tokenizer")
        self.tokenizer, self.name, self.config = tokenizer, name, config or ServerConfig()
        limits = limits_of(model)
        self.vocab_size, self.ends = limits.vocabulary, limits.stop
        self.context = min(limits.context or self.config.cache_tokens, self.config.cache_tokens)
        make_engine = make_engine or functools.partial(_engine, model, self.config)
        self.runner = Runner(make_engine, max_batch=self.config.max_batch, waiting=self.config.queue)
        self.meters = Meters(self.runner)
        self.generations: set[Generation] = set()
        self.open: set[object] = set()
        """requests that came in before the server was told to stop, and are not answered yet"""
        self.stopping = False
        self.created = int(time.time())
        self._tokenize = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._masks: dict[str, Any] = {}
        self._http: Any = None
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.app = Gate(self, _routes(self))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; those that only mark something have none."""
        if self.tokenizer.is_fast:  # the same, without what is around it in Python: this runs for every token
            return self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    async def generation(self, ask: Ask) -> Generation:
        """What a request asks for, with its prompts as token ids.

        Raises:
            Refused: an unknown model, no chat template, a prompt that is empty or too long.
        """
        if ask.model != self.name:
            text = f"model is {ask.model!r}; allowed: {self.name}."
            raise Refused(text, 404, param="model", code="model_not_found")
        if ask.chat and not self.tokenizer.chat_template:
            text = f"messages cannot be written as text: model {self.name!r} has no chat template"
            text = f"{text}; allowed: /v1/completions, which takes plain text."
            raise Refused(text, param="messages")
        if len(ask.prompts) > self.config.room:
            text = f"prompt has {len(ask.prompts)} texts; allowed: at most {self.config.room}."
            raise Refused(text, param="prompt")
        # in a thread: a long text takes a while, and the other clients shall not wait for it
        loop = asyncio.get_running_loop()
        prompts, requests = await loop.run_in_executor(self._tokenize, self._requests, ask)
        return Generation(self, ask, prompts, requests)

    def _requests(self, ask: Ask) -> tuple[list[list[int]], list[Any]]:
        """Prompts as ids, and what the engine is asked for."""
        from llmcourse.serving import Request, Sampling

        what = "messages" if ask.chat else "prompt"
        try:
            prompts = [self._chat_ids(ask.messages)] if ask.chat else [self._ids(p) for p in ask.prompts]
        except Refused:
            raise
        except Exception as e:  # a template that wants other roles, half of a surrogate pair
            raise Refused(f"{what} cannot be written as tokens: {e}.", param=what) from None
        allowed = self._mask(ask.schema) if ask.schema is not None else None
        seed = secrets.randbits(62) if ask.seed is None else ask.seed % 2**63
        requests = []
        for i, ids in enumerate(prompts):
            self._fits(what, ids, ask.max_tokens)
            room = self.context - len(ids)
            usual = self.config.max_tokens if ask.chat else form.COMPLETION_TOKENS
            new = min(usual, self.config.max_tokens, room) if ask.max_tokens is None else ask.max_tokens
            top_k, top_p = ask.top_k, ask.top_p
            sampling = Sampling(temperature=ask.temperature, top_k=top_k, top_p=top_p, seed=(seed + i) % 2**63)
            try:
                made = Request(prompt=tuple(ids), max_new_tokens=new, sampling=sampling, allowed=allowed)
            except BadInput as e:  # a negative token
                raise Refused(e, param=what) from None
            requests.append(made)
        return prompts, requests

    def _ids(self, prompt: str | tuple[int, ...]) -> list[int]:
        return list(self.tokenizer(prompt, verbose=False)["input_ids"]) if isinstance(prompt, str) else list(prompt)

    def _chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _fits(self, what: str, ids: Sequence[int], new: int | None) -> None:
        if not ids:
            raise Refused(f"{what} has no token; allowed: at least one.", param=what)
        if len(ids) + (new or 1) > self.context:
            asked = f" and max_tokens is {new}" if new else ""
            text = f"{what} has {len(ids)} tokens{asked}; allowed: {self.context} together, the context of this server."
            raise Refused(text, param=what, code="context_length_exceeded")

    def _mask(self, schema: Any) -> Any:
        """The token mask of a response format. The last ones are kept: clients ask for the same form again."""
        from llmcourse.structured import TokenMask, any_object, schema_pattern

        try:
            pattern = any_object() if schema is True else schema_pattern(schema)
            if pattern not in self._masks:
                mask = TokenMask(pattern, self._vocabulary, vocab_size=self.vocab_size)
                self._masks[pattern] = mask
                for old in list(self._masks)[:-MASKS]:
                    del self._masks[old]
        except BadInput as e:
            raise Refused(f"response_format cannot be held: {e}", param="response_format") from None
        return self._masks[pattern]

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """What each token spells, and which ones end a text: those at which the engine stops."""
        from llmcourse.structured import vocabulary

        return vocabulary(self.tokenizer, end=self.ends or None)

    # ---- the life of a server ----

    def still_open(self) -> None:
        """
        Raises:
            Refused: 503 when the server was told to stop.
        """
        if self.stopping:
            last = {"Retry-After": "5", "Connection": "close"}
            raise Refused("the server is stopping.", 503, code="stopping", kind="server_error", headers=last)

    def run(self, sock: socket.socket, ready: Callable[[str], None] = print) -> None:
        """Serve until `stop`, SIGTERM or Ctrl-C, then finish what runs.

        Args:
            ready: is called with the address when the first request can come.
        """
        asyncio.run(self._run(sock, ready))

    def stop(self) -> None:
        """From any thread: no new requests, and an end when those that run are finished. A second call ends at once."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._on_stop)

    async def _run(self, sock: socket.socket, ready: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._hurry = asyncio.Event()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what matters is told by `Gate`
        self._http = _http_server(self)
        self.runner.start(self._loop)
        before = {}
        if threading.current_thread() is threading.main_thread():
            for sign in (signal.SIGINT, signal.SIGTERM):
                before[sign] = signal.signal(sign, lambda *_: self.stop())
        serving = asyncio.create_task(self._http.serve(sockets=[sock]))
        try:
            while not self._http.started and not serving.done():
                await asyncio.sleep(0.01)
            if self._http.started:
                ready(_url(sock))
            await serving
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)
            self.runner.stop()
            self._tokenize.shutdown(wait=False, cancel_futures=True)

    def _on_stop(self) -> None:
        if self.stopping:
            self._hurry.set()
        else:
            self.stopping = True
            self._drain = asyncio.create_task(self._finish())  # kept: a task that nobody holds can vanish

    async def _finish(self) -> None:
        end = self._loop.time() + self.config.grace
        while self.open and not self._hurry.is_set() and self._loop.time() < end:
            await asyncio.sleep(0.02)
        for generation in list(self.generations):
            generation.hurry(Refused("the server is stopping.", 503, code="stopping", kind="server_error"))
        end = self._loop.time() + 2
        while self.open and self._loop.time() < end:
            await asyncio.sleep(0.02)
        self._http.should_exit = True


def _engine(model: Any, config: ServerConfig) -> Any:
    from llmcourse.serving import Engine

    return Engine(model, max_batch=config.max_batch, cache_tokens=config.cache_tokens)


def _need_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        text = f"llmcourse serve needs {missing[0]}, which is not installed"
        raise BadInput(f"{text}; run: pip install 'llmcourse[serve]'.")


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _http_server(server: ModelServer) -> Any:
    """uvicorn, with a limit on how long a request may take to arrive, and without its own care of signals."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    config = server.config

    class Protocol(H11Protocol):
        """Drops a client that sends no whole head of a request, or takes nothing, for `idle` seconds."""

        patience: asyncio.TimerHandle | None = None
        stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport):
            super().connection_made(transport)
            if len(self.connections) > config.connections:
                transport.abort()
            self._wait_for_head()

        def _wait_for_head(self):
            self._give_up_waiting()
            self.patience = self.loop.call_later(config.idle, self._late, self.cycle)

        def _give_up_waiting(self):
            if self.patience is not None:
                self.patience.cancel()

        def _late(self, cycle):
            if self.cycle is cycle:  # no request has begun since
                self.transport.abort()

        def on_response_complete(self):
            self._wait_for_head()
            super().on_response_complete()

        def pause_writing(self):
            self.stalled = self.loop.call_later(config.idle, self.transport.abort)
            super().pause_writing()

        def resume_writing(self):
            self.stalled.cancel()
            super().resume_writing()

        def connection_lost(self, exc):
            self._give_up_waiting()
            if self.stalled is not None:
                self.stalled.cancel()
            super().connection_lost(exc)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            yield

    return Server(
        uvicorn.Config(
            server.app, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=int(max(1, config.idle)),
            timeout_graceful_shutdown=1, loop="asyncio",
        )
    )  # fmt: skip


class Gate:
    """In front of every route: who may come in, what is counted, and that no exception leaves as it is."""

    def __init__(self, server: ModelServer, inner: Any):
        self.server, self.inner = server, inner

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        status = 0

        async def told(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._may_enter(scope)
            await self.inner(scope, receive, told)
        except Exception as e:
            if not isinstance(e, Refused):
                log_error(f"{scope['method']} {scope['path']!r}", e)
                e = Refused(FAILED, 500, kind="server_error")
            if not status:
                await refuse(e, told)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.server.meters.requests.labels(path, str(status)).inc()

    def _may_enter(self, scope: dict) -> None:
        """
        Raises:
            Refused: a wrong key, a name of this machine that is not its own, or a server that stops.
        """
        headers, key = dict(scope["headers"]), self.server.config.key
        if key is None:
            # a page in a browser can point its own name at this address, and would read the answers
            host = headers.get(b"host", b"localhost").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if not _is_loopback(name):
                raise Refused(f"Host is {host!r}; allowed: localhost, or any name with a key.", 403)
        elif scope["path"] != "/health":
            said = headers.get(b"authorization", b"")
            if not hmac.compare_digest(said, b"Bearer " + key.encode()):
                text = "the key is missing or wrong; allowed: Authorization: Bearer and the key of this server."
                raise Refused(text, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["path"] not in ("/health", "/metrics"):
            self.server.still_open()


JSON = "application/json"
FAILED = "the server failed on this request; its log says more."
PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/metrics", "/health")


async def reply(send: Callable, body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
    """A whole response."""
    pairs = {"content-type": kind, "content-length": str(len(body)), **headers}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def refuse(e: Refused, send: Callable) -> None:
    await reply(send, form.encoded(e.body()), e.status, **e.headers)


async def read_body(request: Any, config: ServerConfig) -> bytes:
    """The body of a request.

    Raises:
        Refused: 415 for what is not JSON, 413 for too long a body, 408 where it does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps out forms that a foreign page sends without asking
        raise Refused(f"Content-Type is {kind!r}; allowed: application/json.", 415)
    parts, size, most = [], 0, config.body_bytes
    close = {"Connection": "close"}
    try:
        async with asyncio.timeout(config.idle):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > 16 * most:
                    break  # read a while and thrown away: most clients look for an answer only when all is sent
    except TimeoutError:
        raise Refused(f"the body did not arrive within {config.idle:g} seconds.", 408, headers=close) from None
    if size > most:
        text = f"the body has more than {most} bytes; allowed: at most {most}."
        raise Refused(text, 413, headers=close)
    return b"".join(parts)


def _routes(server: ModelServer) -> Any:
    """The FastAPI application."""
    from fastapi import FastAPI, Request
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    model = {"id": server.name, "object": "model", "created": server.created, "owned_by": "llmcourse"}

    class Answer(Response):
        """Sends a generation, and ends it when the client goes."""

        def __init__(self, generation: Generation, ticket: object):
            self.generation, self.ticket, self.background = generation, ticket, None

        async def __call__(self, scope, receive, send):
            work = asyncio.ensure_future(self._send(send))
            gone = asyncio.ensure_future(_until_gone(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
                server.meters.gone.inc()
            finally:
                server.open.discard(self.ticket)
                gone.cancel()
                if not work.done():
                    work.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await work

        async def _send(self, send):
            ask = self.generation.ask
            pieces = self.generation.pieces()
            async with contextlib.aclosing(pieces):
                await (_stream if ask.stream else _whole)(self.generation, pieces, send)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, e: HTTPException) -> Response:
        paths = ", ".join(PATHS)
        text = {
            404: f"there is nothing at {request.url.path!r}; allowed: {paths}.",
            405: f"{request.url.path} does not take {request.method}.",
        }.get(e.status_code, str(e.detail))
        return as_response(Refused(text, e.status_code, headers=e.headers))

    @app.exception_handler(Exception)
    async def on_exception(_: Request, e: Exception) -> Response:
        return as_response(Refused(FAILED, 500, kind="server_error"))

    @app.exception_handler(Refused)
    async def on_refused(_: Request, e: Refused) -> Response:
        return as_response(e)

    def as_response(e: Refused) -> Response:
        return Response(form.encoded(e.body()), e.status, e.headers, JSON)

    async def health(_: Request) -> Response:
        status = "stopping" if server.stopping else "failed" if server.runner.dead else "ok"
        return Response(form.encoded({"status": status}), 200 if status == "ok" else 503, media_type=JSON)

    async def metrics(_: Request) -> Response:
        return Response(server.meters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(_: Request) -> Response:
        return Response(form.encoded({"object": "list", "data": [model]}), media_type=JSON)

    async def one_model(request: Request) -> Response:
        if (name := request.path_params["name"]) != server.name:
            raise Refused(f"model is {name!r}; allowed: {server.name}.", 404, param="model", code="model_not_found")
        return Response(form.encoded(model), media_type=JSON)

    async def generate(request: Request, chat: bool) -> Response:
        body = await read_body(request, server.config)
        server.still_open()  # it may have been told to stop while the body came
        server.open.add(ticket := object())
        try:
            ask = form.read_ask(form.read_json(body), chat=chat, most=server.config.max_tokens)
            return Answer(await server.generation(ask), ticket)
        except BaseException:
            server.open.discard(ticket)
            raise

    async def completions(request: Request) -> Response:
        return await generate(request, chat=False)

    async def chat_completions(request: Request) -> Response:
        return await generate(request, chat=True)

    for path, route, method in (
        ("/health", health, "GET"), ("/metrics", metrics, "GET"), ("/v1/models", models, "GET"),
        ("/v1/models/{name:path}", one_model, "GET"), ("/v1/completions", completions, "POST"),
        ("/v1/chat/completions", chat_completions, "POST"),
    ):  # fmt: skip
        app.add_route(path, route, methods=[method])  # the body is read here, not by FastAPI: its errors have our form
    return app


async def _until_gone(receive: Callable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(generation: Generation, pieces: AsyncIterator[Piece], send: Callable) -> None:
    texts = [["", ""] for _ in generation.jobs]
    async for piece in pieces:
        texts[piece.index][0] += piece.text
        texts[piece.index][1] = piece.why or ""
    made = form.answer(generation.ask, generation.head, [(text, why) for text, why in texts], generation.usage)
    await reply(send, form.encoded(made))


async def _stream(generation: Generation, pieces: AsyncIterator[Piece], send: Callable) -> None:
    """Server-sent events. The status is sent with the first piece: until then, a failure still has its own."""
    ask, made = generation.ask, functools.partial(form.chunk, generation.ask, generation.head)
    write = lambda data: send({"type": "http.response.body", "body": data, "more_body": True})
    begun: set[int] = set()
    try:
        async for piece in pieces:
            if not begun:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            data = b""
            if ask.chat and piece.index not in begun:
                data += made(piece.index, first=True)
            begun.add(piece.index)
            if piece.text:
                data += made(piece.index, piece.text)
            if piece.why is not None:
                data += made(piece.index, why=piece.why)
            await write(data)
        if ask.include_usage:
            await write(made(usage=generation.usage))
        await write(b"data: [DONE]\n\n")
    except Refused as e:
        if not begun:
            raise
        await write(form.event(e.body()))  # the status is out: the error is the last event
    await send({"type": "http.response.body", "body": b""})


def serve(name: str, config: ServerConfig, *, settings: Any = None, say: Callable[[str], None] = print) -> None:
    """`llmcourse serve`: load a model and serve it until the process is told to stop.

    Args:
        name: as in `load_model`.
        say: gets the line that says that it is ready, and the one that says that it ends.
    Raises:
        BadInput: what cannot be served, before the model is loaded where that can be known.
    """
    _need_extra()
    from llmcourse.settings import load_settings

    settings = settings or load_settings()
    sock = listen(config)
    with contextlib.closing(sock):
        from llmcourse.data import load_model
        from llmcourse.modelfolder import kernels_said
        from llmcourse.runtime import Runtime

        rt = Runtime.auto(settings.device, settings.dtype)
        model, tokenizer, _ = load_model(name, rt=rt, settings=settings)
        called = Path(name).resolve().name if Path(name).is_dir() else name
        server = ModelServer(model, tokenizer, name=called, config=config)
        where = f"{rt.describe()}; {kernels_said(model)}"
        start = lambda url: say(f"Ready: {url}/v1 serves {called} ({where}). Ctrl-C ends it.")
        server.run(sock, start)
        say("Stopped: nothing runs any more.")
