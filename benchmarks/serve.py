"""Requests per second and waiting times of `llmcourse serve` under 1 to 32 clients, beside one request at a time.

    python benchmarks/serve.py              # course-3m, one thread a server
    python benchmarks/serve.py --model smollm2-135m --clients 1,8 --each 1 --least 8 --new 16 --rounds 3
    python benchmarks/serve.py --load       # 32 clients, 2,000 requests: none lost, none crossed
    python benchmarks/serve.py --quick      # a smoke run: its numbers mean nothing

Every candidate is a server in a process of its own, asked over HTTP for streamed greedy completions by the same
clients, each of which sends its next request when it has its answer (a closed loop). The candidates take turns in every
round. `llmcourse serve` stands in the list a second time, as the null control. The peers: a loop that answers one
request after the other with the model of transformers, behind the same HTTP; and `transformers serve`, where it is
installed with what it needs. Intervals: 95 % from the rounds, paired (Student's t on the logarithm of the ratio).
Results: benchmarks/results/serve.json, each model under its name; those of --load under "load".
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from shared import RESULTS, machine, save

from llmcourse.data import load_model, load_records
from llmcourse.runtime import Runtime
from llmcourse.settings import load_settings

OURS, ALONE, THEIRS = "llmcourse serve", "one at a time, same HTTP", "transformers serve"


# ---- the loop that answers one request after the other: the peer behind the same HTTP ----


class OneAtATime:
    """What `llmcourse.serving.Engine` offers, by the plain loop: the oldest request, token by token, to its end."""

    def __init__(self, model: Any, cache_tokens: int):
        self.model, self.waiting, self.count, self.cache_tokens = model, collections.deque(), 0, cache_tokens
        self.new: list[int] = []
        self.past = None

    @property
    def idle(self) -> bool:
        return not self.waiting

    @property
    def stats(self) -> Any:
        from llmcourse.serving import EngineStats

        running = min(1, len(self.waiting))
        known = {"waiting": len(self.waiting) - running, "running": running}
        return EngineStats(**{name: known.get(name, 0) for name in EngineStats._fields})

    def submit(self, request: Any) -> int:
        self.count += 1
        self.waiting.append((self.count, request))
        return self.count

    def cancel(self, id: int) -> None:
        if self.waiting and self.waiting[0][0] == id:
            self.new, self.past = [], None
        self.waiting = collections.deque(pair for pair in self.waiting if pair[0] != id)

    @torch.inference_mode()
    def step(self) -> list[Any]:
        from llmcourse.serving import Event

        if not self.waiting:
            return []
        id, request = self.waiting[0]
        ids = torch.tensor([self.new[-1:] or list(request.prompt)])  # (1, T)
        out = self.model(ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, token = out.past_key_values, int(out.logits[0, -1].argmax())
        self.new.append(token)
        full = len(self.new) == request.max_new_tokens
        why = "stop" if token in ends(self.model) else "length" if full else None
        if why:
            self.waiting.popleft()
            self.new, self.past = [], None
        return [Event(id, token, why)]


def ends(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    found = model.config.eos_token_id if found is None else found
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def serve_one_at_a_time(name: str, config: Any) -> None:
    """In a process of its own: the plain loop behind the course's HTTP."""
    from llmcourse.server import ModelServer, listen

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tokenizer, _ = load_model(name, rt=Runtime.auto("cpu", "float32"))
    server = ModelServer(
        model, tokenizer, name=name, config=config, make_engine=lambda: OneAtATime(model, config.cache_tokens)
    )
    with contextlib.closing(listen(config)) as sock:
        server.run(sock, lambda url: print(f"Ready: {url}/v1", flush=True))


# ---- servers as processes ----


class Candidate(NamedTuple):
    url: str
    model: str
    process: subprocess.Popen


@contextlib.contextmanager
def started(command: list[str], model: str, threads: int, url: str | None = None) -> Iterator[Candidate]:
    """A server from its start to its end; ready when it says so, or (with `url`) when it answers."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    told = subprocess.PIPE if url is None else subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdout=told, stderr=subprocess.DEVNULL, text=True)
    try:
        if url is None:
            line = process.stdout.readline()
            if not line.startswith("Ready: "):
                raise RuntimeError(f"{command[2:4]} did not start")
            url = line.split()[1].removesuffix("/v1")
        end = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[2:4]} did not start")
            time.sleep(0.2)
        yield Candidate(url, model, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def transformers_command(folder: str) -> tuple[list[str], str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", code, "serve", folder, "--device", "cpu", "--dtype", "float32"]
    return [*command, "--host", "127.0.0.1", "--port", str(port)], f"http://127.0.0.1:{port}"


# ---- clients ----


class Got(NamedTuple):
    """One answer: seconds to its first piece of text and to its end."""

    prompt: int
    text: str
    first: float
    whole: float


async def one(web: httpx.AsyncClient, who: Candidate, i: int, prompt: str, new: int) -> Got:
    body = {"model": who.model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    began, first, text = time.perf_counter(), None, ""
    async with web.stream("POST", f"{who.url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode()[:300])
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                piece = "".join(c.get("text") or "" for c in json.loads(line[6:]).get("choices", []))
                if piece and first is None:
                    first = time.perf_counter() - began
                text += piece
    whole = time.perf_counter() - began
    return Got(i, text, whole if first is None else first, whole)


async def crowd(who: Candidate, asks: list[tuple[int, str]], clients: int, new: int) -> tuple[float, list[Got]]:
    """So many clients send these requests, each its next when it has its answer: seconds, answers in order."""
    left, got = collections.deque(enumerate(asks)), [None] * len(asks)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=300, trust_env=False, limits=limits) as web:

        async def client() -> None:
            while left:
                place, (i, prompt) = left.popleft()
                got[place] = await one(web, who, i, prompt, new)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - began, got


def some_prompts(n: int, words: tuple[int, int], seed: int) -> list[str]:
    """Beginnings of the test articles, each once, of different lengths."""
    rng = random.Random(seed)
    texts = [r["text"].split() for r in load_records("wikipedia", "test")]
    rng.shuffle(texts)
    cut = [" ".join(t[: rng.randint(*words)]) for t in texts if len(t) > words[1]]
    return list(dict.fromkeys(cut))[:n]


# ---- the comparison ----


def ratio(own: list[float], base: list[float]) -> dict[str, float]:
    """Geometric mean of the ratios of the rounds, and its 95 % interval by Student's t."""
    logs = np.log(np.array(own) / np.array(base))
    half = _t(len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return {"ratio": math.exp(logs.mean()), "low": math.exp(logs.mean() - half), "high": math.exp(logs.mean() + half)}


def _t(df: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection of its integral."""
    x = np.linspace(-200, 200, 400_001)
    density = (1 + x**2 / df) ** (-(df + 1) / 2)
    return float(np.interp(0.975, np.cumsum(density) / density.sum(), x))


def measure(options: argparse.Namespace, candidates: dict[str, Candidate], keep: Callable[[dict], None]) -> None:
    """`keep` gets what is there after each number of clients: a run that is cut off keeps what it has."""
    prompts = some_prompts(max(options.clients) * options.each, options.words, seed=0)
    rng, found = random.Random(0), {}
    for who in candidates.values():  # everything is loaded and warm
        asyncio.run(crowd(who, list(enumerate(prompts[:2])), 2, 4))
    for clients in options.clients:
        n = max(clients * options.each, options.least)
        asks = [(i % len(prompts), prompts[i % len(prompts)]) for i in range(n)]
        seconds = {name: [] for name in candidates}
        answers: dict[str, list[Got]] = {name: [] for name in candidates}
        for _ in range(options.rounds):
            for name in rng.sample(list(candidates), len(candidates)):
                took, got = asyncio.run(crowd(candidates[name], asks, clients, options.new))
                seconds[name].append(took)
                answers[name] += got
        rows = {}
        print(f"\n{clients} clients, {n} requests a round, {options.rounds} rounds", flush=True)
        print(f"{'':<27}{'requests/s':>10}{'speed':>8}{'95 % interval':>18}   first ms p50, p99    whole ms p50, p99")
        for name, got in answers.items():
            first, whole = ([getattr(g, what) * 1e3 for g in got] for what in ("first", "whole"))
            rows[name] = {
                "requests_per_s": n * options.rounds / sum(seconds[name]),
                "seconds": seconds[name],
                **ratio(seconds[ALONE], seconds[name]),
                "first_ms": quantiles(first),
                "whole_ms": quantiles(whole),
                "same_text_as_alone": sum(a.text == b.text for a, b in zip(got, answers[ALONE])) / len(got),
            }
            row = rows[name]
            ends = f"{row['low']:.2f} to {row['high']:.2f}"
            waits = [f"{row[k]['p50']:>9.0f} {row[k]['p99']:>9.0f}" for k in ("first_ms", "whole_ms")]
            print(f"{name:<27}{row['requests_per_s']:>10.1f}{row['ratio']:>7.2f}×{ends:>18} {'  '.join(waits)}")
        null = ratio(seconds[OURS], seconds[f"{OURS}, again"])
        print(f"null control, the same server twice: {null['low']:.2f} to {null['high']:.2f}")
        found[str(clients)] = {"requests_a_round": n, "rows": rows, "null": null}
        keep(found)


def quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 99)}


# ---- the load test ----


@torch.inference_mode()
def greedy(model: Any, ids: list[int], new: int) -> tuple[list[int], float]:
    """What the model alone writes, and the smallest distance of its choices to the second best."""
    x, past, written, least = torch.tensor([ids]), None, [], math.inf
    while len(written) < new and (not written or written[-1] not in ends(model)):
        out = model(x, past_key_values=past, use_cache=True)
        past, top = out.past_key_values, out.logits[0, -1].topk(2)
        written.append(int(top.indices[0]))
        least = min(least, float(top.values[0] - top.values[1]))
        x = torch.tensor([written[-1:]])
    return written, least


def load(options: argparse.Namespace, who: Candidate) -> dict[str, Any]:
    """Many requests of few different prompts in random order; every answer is held against the model alone."""
    prompts = some_prompts(max(2, options.requests // 20), options.words, seed=1)
    model, tokenizer, _ = load_model(options.model, rt=Runtime.auto("cpu", "float32"))
    print(f"{len(prompts)} prompts, each by the model alone", flush=True)
    alone = {i: greedy(model, tokenizer(p)["input_ids"], options.new) for i, p in enumerate(prompts)}
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    expected = {i: text(ids) for i, (ids, _) in alone.items()}
    order = [i % len(prompts) for i in range(options.requests)]
    random.Random(2).shuffle(order)
    print(f"{options.requests} requests of {max(options.clients)} clients", flush=True)
    took, got = asyncio.run(crowd(who, [(i, prompts[i]) for i in order], max(options.clients), options.new))
    wrong = [g for g in got if g.text != expected[g.prompt]]
    others = collections.Counter(expected.values())
    crossed = [g for g in wrong if others[g.text]]
    margins = [alone[g.prompt][1] for g in wrong]
    metrics = httpx.get(f"{who.url}/metrics", timeout=10, trust_env=False).text.splitlines()
    left = {
        line.split()[0]: float(line.split()[1])
        for line in metrics
        if line.startswith("llmcourse_engine_") and " " in line
    }
    found = {
        "requests": options.requests,
        "clients": max(options.clients),
        "different_prompts": len(prompts),
        "new_tokens": options.new,
        "answered": sum(g is not None for g in got),
        "as_the_model_alone": len(got) - len(wrong),
        "crossed": len(crossed),
        "other": len(wrong) - len(crossed),
        "largest_margin_of_those": max(margins, default=0.0),
        "seconds": took,
        "requests_per_s": options.requests / took,
        "first_ms": quantiles([g.first * 1e3 for g in got]),
        "whole_ms": quantiles([g.whole * 1e3 for g in got]),
        "engine_after": left,
    }
    print(json.dumps(found, indent=1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="course-3m")
    parser.add_argument("--clients", default="1,2,4,8,16,32", help="numbers with commas between them")
    parser.add_argument("--each", type=int, default=2, help="requests of each client in a round")
    parser.add_argument("--least", type=int, default=16, help="requests in a round at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=32, help="new tokens of a request")
    parser.add_argument("--words", default="8,40", help="words of a prompt, from and to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--load", action="store_true", help="only the load test")
    parser.add_argument("--requests", type=int, default=2000, help="of the load test")
    parser.add_argument("--peers", default="alone,transformers", help="which, with commas between them")
    parser.add_argument("--quick", action="store_true", help="few requests and rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json", help="where the JSON goes")
    parser.add_argument("--one-at-a-time", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.clients = [int(n) for n in options.clients.split(",")]
    options.words = tuple(int(n) for n in options.words.split(","))
    if options.quick:
        options.clients, options.rounds, options.requests, options.new = [1, 4], 2, 40, 8

    from llmcourse.server import ServerConfig

    config = ServerConfig(port=0, max_batch=options.max_batch, cache_tokens=8192, queue=256, timeout=600)
    if options.one_at_a_time:
        serve_one_at_a_time(options.model, config)
        return 0
    torch.set_num_threads(options.threads)
    ours = [sys.executable, "-m", "llmcourse", "serve", options.model, "--port", "0", "--device", "cpu"]
    ours += ["--dtype", "float32", "--max-batch", str(config.max_batch), "--cache-tokens", str(config.cache_tokens)]
    ours += ["--queue", str(config.queue), "--timeout", "600"]
    alone = [sys.executable, __file__, "--one-at-a-time", "--model", options.model]
    report = json.loads(options.out.read_text(encoding="utf8")) if options.out.is_file() else {}
    report["machine"] = machine(threads=options.threads, instructions=torch.backends.cpu.get_cpu_capability())
    with contextlib.ExitStack() as stack:
        start = lambda command, name, url=None: stack.enter_context(started(command, name, options.threads, url))
        candidates = {OURS: start(ours, options.model)}
        if options.load:
            report["load"] = {"model": options.model, "quick": options.quick} | load(options, candidates[OURS])
            save(report, options.out)
            return 0
        candidates[f"{OURS}, again"] = start(ours, options.model)
        candidates[ALONE] = start(alone, options.model)
        if "transformers" in options.peers:
            from llmcourse.modelfolder import locate_model

            folder = str(locate_model(options.model, load_settings()))
            try:
                command, url = transformers_command(folder)
                candidates[THEIRS] = start(command, folder, url)
            except RuntimeError as e:
                print(f"{THEIRS}: {e}")
        about = {
            "new_tokens": options.new,
            "words": options.words,
            "max_batch": options.max_batch,
            "rounds": options.rounds,
            "quick": options.quick,
        }

        def keep(found: dict) -> None:
            report.setdefault("models", {})[options.model] = about | {"clients": found}
            save(report, options.out)

        measure(options, candidates, keep)
    print(f"written to {options.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
