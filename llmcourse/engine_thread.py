"""The thread that owns an engine, and the way to it from an event loop.

Hand-written plumbing of `llmcourse.server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmcourse.openai_form import Refused
from llmcourse.settings import BadInput

__all__ = ["Job", "Note", "Runner", "log_error"]


class Note(NamedTuple):
    """What the engine's thread tells about one prompt."""

    index: int
    token: int | None = None
    finished: str | None = None
    error: Refused | None = None


class Job:
    """One prompt on its way through the engine."""

    def __init__(self, request: Any, index: int, notes: asyncio.Queue):
        self.request, self.index, self.notes = request, index, notes
        self.id: int | None = None  # the engine's number; only its thread looks at it
        self.over = False  # the loop knows the end of it
        self.again = False  # it waited when an engine failed, and went to the next one


class Runner:
    """The thread that owns an engine. Its other methods are for the event loop.

    An exception of a step ends the requests that were running, with an error; those that waited go to a new engine.
    """

    def __init__(self, make_engine: Callable[[], Any], *, max_batch: int, waiting: int):
        self.make_engine, self.max_batch, self.waiting = make_engine, max_batch, waiting
        self.engine = make_engine()
        self.stats = self.engine.stats
        self.taken = 0  # requests that are not over
        self.dead = False
        self._jobs: dict[int, Job] = {}
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        self._orders.put(None)
        self._thread.join(timeout=60)

    @property
    def room(self) -> int:
        """Requests that may be there: those that run or can run at once, and those that may wait."""
        full = self.stats.waiting > 0  # fewer than max_batch run where the cache has no room for more
        return (self.stats.running if full else self.max_batch) + self.waiting

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand jobs over, all or none.

        Raises:
            Refused: 429 where there is no room for them, 503 where there is no engine.
        """
        if self.dead:
            raise Refused("the engine has failed and could not be started again.", 503, kind="server_error")
        if self.taken + len(jobs) > self.room:
            text = f"{self.taken} requests run or wait, of at most {self.room}: no room for {len(jobs)} more now."
            wait = {"Retry-After": "1"}
            raise Refused(text, 429, code="queue_full", kind="rate_limit_error", headers=wait)
        self.taken += len(jobs)
        self._orders.put((self._submit, list(jobs)))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more."""
        jobs = [job for job in jobs if not job.over]
        if jobs:
            self._orders.put((self._cancel, jobs))

    # ---- below, all but the last method runs in the engine's thread ----

    def _run(self) -> None:
        while not self.dead and self._obey():
            try:
                events = self.engine.step()
                notes = [self._note(e) for e in events if e.id in self._jobs]
            except Exception as e:
                notes = self._restart(e)
            self.stats = self.engine.stats
            self._tell(notes)

    def _obey(self) -> bool:
        """Carry out what was ordered; waits for an order while there is nothing to do. False: it was to stop."""
        while True:
            try:
                order = self._orders.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            what, jobs = order
            try:
                what(jobs)
            except Exception as e:
                self._tell(self._restart(e, jobs))
                return not self.dead

    def _submit(self, jobs: list[Job]) -> None:
        try:
            for job in jobs:
                job.id = self.engine.submit(job.request)
                self._jobs[job.id] = job
        except BadInput as e:  # all of them, or none
            for job in jobs:
                if job.id is not None:
                    self._jobs.pop(job.id, None)
                    self.engine.cancel(job.id)
            refused = Refused(e, param="prompt")
            self._tell([(job, Note(job.index, error=refused)) for job in jobs])

    def _cancel(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.id is not None and self._jobs.pop(job.id, None) is not None:
                self.engine.cancel(job.id)
        self.stats = self.engine.stats
        self._tell([(job, Note(job.index, finished="cancelled")) for job in jobs])

    def _note(self, e: Any) -> tuple[Job, Note]:
        job = self._jobs[e.id] if e.finished is None else self._jobs.pop(e.id)
        if e.finished in ("failed", "cancelled"):
            text = f"the answer could not be finished: {e.reason or e.finished}."
            return job, Note(job.index, error=Refused(text, 500, kind="server_error", code="generation_failed"))
        return job, Note(job.index, e.token, e.finished)

    def _restart(self, e: Exception, more: Sequence[Job] = ()) -> list[tuple[Job, Note]]:
        """After an exception nobody knows what state the engine is in. Who ran, and `more`, get an error."""
        log_error("a step of the engine failed", e)
        text = "the model failed while it worked on this request; the server goes on, and its log says more."
        refused = Refused(text, 500, kind="server_error", code="engine_failed")
        waiting = {text.id for text in self.engine.scheduler.waiting if not text.new}  # nothing was written yet
        jobs, self._jobs = self._jobs, {}
        try:
            self.engine = self.make_engine()
        except Exception as again:
            log_error("the engine could not be started again", again)
            self.dead, waiting = True, set()
        again = [job for id, job in jobs.items() if id in waiting and job not in more and not job.again]
        for job in again:
            job.again = True  # once: perhaps it is what breaks the engine
        if again:
            self._orders.put((self._submit, again))
        ended = {*jobs.values(), *more}.difference(again)
        return [(job, Note(job.index, error=refused)) for job in ended]

    def _tell(self, notes: list[tuple[Job, Note]]) -> None:
        if notes:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._heard, notes)

    def _heard(self, notes: list[tuple[Job, Note]]) -> None:
        for job, note in notes:
            if job.over:
                continue
            if note.finished is not None or note.error is not None:
                job.over = True
                self.taken -= 1
            job.notes.put_nowait(note)


def log_error(what: str, e: BaseException) -> None:
    """Print what failed, with its traceback, where whoever runs the server looks."""
    trace = "".join(traceback.format_exception(e))
    print(f"llmcourse serve: {what}\n{trace}", file=sys.stderr, flush=True)
