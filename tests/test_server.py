"""`llmcourse serve`: every address by the official client, on loopback; what goes wrong disturbs no other client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, clean_env

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="needs the client that the tests call the server with")

from llmcourse import openai_form as form  # noqa: E402
from llmcourse.server import ModelServer, ServerConfig, _engine, listen, read_key  # noqa: E402
from llmcourse.settings import BadInput  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
END = 0
PROMPTS = ("kalo mine", "rusa", "to vi qu ze ka", "sato ne", "mi", "ze ze ze lo")


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """A random model, its tokenizer with a chat template, and what the model alone writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.generation_config.eos_token_id = END
    torch.manual_seed(1)
    with torch.no_grad():  # a head of its own and larger weights: else it only repeats the last token
        model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(model.lm_head.weight))
        for name, p in model.named_parameters():
            if "proj" in name:
                p.mul_(8)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.eos_token_id == END
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def alone(tiny, prompt: str, n: int) -> list[int]:
    """The most probable tokens, one text at a time and without a cache; ends with the end token."""
    ids, new = tiny.tokenizer(prompt)["input_ids"], []
    with torch.inference_mode():
        while len(new) < n and (not new or new[-1] != END):
            new.append(int(tiny.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def text_of(tiny, ids: list[int]) -> str:
    return tiny.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eventually(holds, what: str = "it") -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.005)


class Held:
    """An engine whose steps wait while it is held."""

    def __init__(self, engine):
        self.engine, self.go = engine, threading.Event()
        self.go.set()

    def step(self):
        self.go.wait(30)
        return self.engine.step()

    def __getattr__(self, name):
        return getattr(self.engine, name)


@contextlib.contextmanager
def running(tiny, *, make_engine=None, **config):
    """A server in a thread of this process."""
    config = ServerConfig(port=0, **config)
    held = []

    def engine():
        held.append(Held((make_engine or _engine)(tiny.model, config)))
        return held[-1]

    server = ModelServer(tiny.model, tiny.tokenizer, name="tiny", config=config, make_engine=engine)
    urls, ready = [], threading.Event()
    thread = threading.Thread(target=server.run, args=(listen(config), lambda u: (urls.append(u), ready.set())))
    thread.start()
    assert ready.wait(30)
    client = openai.OpenAI(base_url=f"{urls[0]}/v1", api_key=config.key or "none", max_retries=0, timeout=30)
    port = int(urls[0].rpartition(":")[2])
    web = httpx.Client(base_url=urls[0], timeout=30, trust_env=False)
    try:
        yield SimpleNamespace(server=server, url=urls[0], port=port, client=client, web=web, held=held, thread=thread)
    finally:
        for engine in held:
            engine.go.set()
        server.stop()
        server.stop()
        client.close()
        web.close()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def up(tiny):
    with running(tiny, max_batch=4, max_tokens=128) as found:
        yield found


def ask(up, **more):
    return up.client.completions.create(**{"model": "tiny", "prompt": PROMPTS[0], "temperature": 0} | more)


def joined(stream) -> tuple[list[str], str]:
    """Pieces of text and the reason of the end of a streamed completion of one prompt."""
    pieces, why = [], None
    for part in stream:
        for choice in part.choices:
            assert why is None, "a piece came after the end"
            pieces.append(choice.text)
            why = choice.finish_reason
    return pieces, why


def chat_joined(stream) -> tuple[str, str]:
    parts = [c for part in stream for c in part.choices]
    assert parts[0].delta.role == "assistant"
    return "".join(c.delta.content or "" for c in parts), parts[-1].finish_reason


# ---- every address ----


def test_the_models_are_listed(up):
    (model,) = up.client.models.list().data
    assert model.id == "tiny" and up.client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="'other'"):
        up.client.models.retrieve("other")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_what_the_model_alone_writes(tiny, up, prompt):
    expected = alone(tiny, prompt, 12)
    whole = ask(up, prompt=prompt, max_tokens=12)
    assert whole.choices[0].text == text_of(tiny, expected)
    assert whole.choices[0].finish_reason == ("stop" if expected[-1] == END else "length")
    assert whole.usage.completion_tokens == len(expected)
    assert whole.usage.prompt_tokens == len(tiny.tokenizer(prompt)["input_ids"])
    pieces, why = joined(ask(up, prompt=prompt, max_tokens=12, stream=True))
    assert "".join(pieces) == whole.choices[0].text and why == whole.choices[0].finish_reason
    assert len(pieces) > 1


def test_a_chat_is_its_template_completed(tiny, up):
    messages = [{"role": "system", "content": "kalo"}, {"role": "user", "content": [{"type": "text", "text": "mi ne"}]}]
    prompt = "system: kalo\nuser: mi ne\nassistant:"
    how = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 10}
    whole = up.client.chat.completions.create(**how)
    assert whole.choices[0].message.content == text_of(tiny, alone(tiny, prompt, 10))
    assert whole.choices[0].message.role == "assistant"
    stream = up.client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    parts = list(stream)
    assert chat_joined(parts) == (whole.choices[0].message.content, whole.choices[0].finish_reason)
    assert parts[-1].usage == whole.usage and not parts[-1].choices
    assert all(part.usage is None for part in parts[:-1])


def test_a_seed_repeats_a_draw_streamed_or_not(up):
    how = {"temperature": 1.5, "max_tokens": 24, "top_p": 0.9}
    a, b = (ask(up, seed=7, **how).choices[0].text for _ in range(2))
    assert a == b == "".join(joined(ask(up, seed=7, stream=True, **how))[0])
    others = {ask(up, seed=s, **how).choices[0].text for s in (-2, 8, 2**63 - 1)}
    assert len(others) == 3 and a not in others
    assert len({ask(up, **how).choices[0].text for _ in range(3)}) == 3  # no seed: another one each time


def test_prompts_come_as_texts_and_as_tokens(tiny, up):
    ids = [tiny.tokenizer(p)["input_ids"] for p in PROMPTS[:3]]
    expected = [text_of(tiny, alone(tiny, p, 6)) for p in PROMPTS[:3]]
    for prompt in (list(PROMPTS[:3]), ids):
        whole = ask(up, prompt=prompt, max_tokens=6)
        assert [c.text for c in whole.choices] == expected and [c.index for c in whole.choices] == [0, 1, 2]
        assert whole.usage.prompt_tokens == sum(map(len, ids))
        texts = ["", "", ""]
        for part in ask(up, prompt=prompt, max_tokens=6, stream=True):
            for c in part.choices:
                texts[c.index] += c.text
        assert texts == expected
    assert ask(up, prompt=ids[0], max_tokens=6).choices[0].text == expected[0]


def test_the_numbers_that_openai_has_where_none_are_given(up):
    made = up.client.completions.create(model="tiny", prompt="ka lo", temperature=0)
    assert made.usage.completion_tokens <= form.COMPLETION_TOKENS
    chat = up.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "ka"}], temperature=0)
    assert chat.choices[0].finish_reason == "stop" or chat.usage.completion_tokens == 128


def test_what_asks_for_nothing_is_taken_and_changes_nothing(up):
    plain = ask(up).choices[0]
    more = dict(user="me", n=1, best_of=1, echo=False, logit_bias={}, presence_penalty=0, frequency_penalty=0.0)
    assert ask(up, **more).choices[0] == plain
    chat = dict(model="tiny", messages=[{"role": "developer", "content": "ka"}], max_tokens=2, temperature=0)
    answer = up.client.chat.completions.create(**chat).choices[0]
    more = dict(logprobs=False, tools=[], response_format={"type": "text"}, metadata={"a": "b"}, store=False, stop=None)
    assert up.client.chat.completions.create(**chat, **more).choices[0] == answer


def test_metrics_and_health(tiny, up):
    def value(name: str) -> float:
        lines = up.web.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and line[len(name)] in " {")

    before = {n: value(n) for n in ("llmcourse_new_tokens_total", "llmcourse_first_token_seconds_count")}
    made = ask(up, max_tokens=5)
    assert value("llmcourse_new_tokens_total") - before["llmcourse_new_tokens_total"] == made.usage.completion_tokens
    first = "llmcourse_first_token_seconds_count"
    assert value(first) - before[first] == 1
    assert value("llmcourse_engine_blocks") > 0
    assert 'llmcourse_requests_total{path="/v1/completions",status="200"}' in up.web.get("/metrics").text
    assert up.web.get("/health").json() == {"status": "ok"}


# ---- stop texts, characters ----


def test_a_stop_text_ends_the_answer_before_itself(tiny, up):
    full = ask(up, max_tokens=24).choices[0].text
    plain = [c for c in full if c != "\ufffd"]
    assert len(plain) > 6
    for at, length in ((2, 1), (1, 4), (0, 3), (5, 6)):
        stop = full[at : at + length]
        expected = full[: full.find(stop)]
        whole = ask(up, max_tokens=24, stop=["never in it", stop])
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
        assert whole.usage.completion_tokens <= 24
        pieces, why = joined(ask(up, max_tokens=24, stop=stop, stream=True))
        assert ("".join(pieces), why) == (expected, "stop")
    assert ask(up, max_tokens=24, stop="never in it").choices[0].text == full


def written(ids, decode, stops=()):
    """The pieces that a TextStream gives out."""
    stream, pieces = form.TextStream(decode, stops), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.end()]


def byte_decode(ids) -> str:
    return bytes(ids).decode("utf8", errors="replace")


def test_no_character_is_cut_and_the_pieces_are_the_text():
    rng = random.Random(0)
    alphabet = ["a", "ß", "語", "🙂", "\ufffd", " "]
    for _ in range(300):
        data = "".join(rng.choices(alphabet, k=12)).encode()
        if rng.random() < 0.5:  # and bytes that are no text at all
            data = bytes(rng.choice((b, rng.randrange(256))) for b in data)
        pieces = written(data, byte_decode)
        assert "".join(pieces) == byte_decode(data)
    for character in "ß語🙂":
        pieces = written(("x" + character + "y").encode(), byte_decode)
        assert [p for p in pieces if p] == ["x", character, "y"]


def test_no_piece_shows_a_part_of_a_stop_text():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abß", k=rng.randint(1, 14)))
        stops = ["".join(rng.choices("abß", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        pieces = written(text.encode(), byte_decode, stops)
        ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
        if ends:  # the first stop text that is complete ends it; of two that end together, the longer
            end = ends[0]
            expected = text[: end - max(len(s) for s in stops if text[:end].endswith(s))]
        else:
            expected = text
        assert "".join(pieces) == expected, (text, stops)
        assert [i for i in range(len(expected) + 1) if any(expected[:i].endswith(s) for s in stops)] == []


def test_the_text_of_a_real_tokenizer_in_pieces(tiny):
    decode = lambda ids: text_of(tiny, ids)
    rng = random.Random(2)
    for _ in range(50):
        ids = [rng.randrange(len(tiny.tokenizer)) for _ in range(20)]
        assert "".join(written(ids, decode)) == decode(ids)


# ---- answers of a given form ----

SCHEMA = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "word": {"enum": ["kalo", 'mi"ne']},
        "some": {"type": "array", "items": {"type": "null"}, "maxItems": 2},
    },
    "required": ["sure", "word", "some"],
    "additionalProperties": False,
}


def form_of(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def test_an_answer_has_the_form_of_its_schema(up):
    how = {"model": "tiny", "messages": [{"role": "user", "content": "ka lo"}], "response_format": form_of(SCHEMA)}
    found = set()
    for seed in range(6):
        made = up.client.chat.completions.create(**how, temperature=1.5, seed=seed)
        value = json.loads(made.choices[0].message.content)
        assert made.choices[0].finish_reason == "stop" and list(value) == ["sure", "word", "some"]
        assert value["sure"] in (True, False) and value["word"] in ("kalo", 'mi"ne')
        assert value["some"] in ([], [None], [None, None])
        stream = up.client.chat.completions.create(**how, temperature=1.5, seed=seed, stream=True)
        assert chat_joined(list(stream))[0] == made.choices[0].message.content
        found.add(made.choices[0].message.content)
    assert len(found) > 1 and len(up.server._masks) == 1
    with pytest.raises(json.JSONDecodeError):  # the control: without a form it writes anything
        json.loads(ask(up, max_tokens=30, temperature=1.5, seed=0).choices[0].text)


def test_an_answer_is_any_json_object(up):
    how = {"model": "tiny", "messages": [{"role": "user", "content": "ka lo"}], "temperature": 1.5, "max_tokens": 60}
    found, whole = set(), 0
    for seed in range(8):
        made = up.client.chat.completions.create(**how, response_format={"type": "json_object"}, seed=seed)
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
        assert text.startswith("{") and reason in ("stop", "length")
        if reason == "stop":  # one that was cut is the beginning of an object
            assert isinstance(json.loads(text), dict)
            whole += 1
        found.add(text)
    assert whole > 0 and len(found) > 1


# ---- what is refused ----

BAD = {  # arguments of a completion -> what the sentence names
    "no model": ({"model": None}, 400, "model"),
    "another model": ({"model": "other"}, 404, "model"),
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "an empty prompt": ({"prompt": ""}, 400, "prompt"),
    "an empty list": ({"prompt": []}, 400, "prompt"),
    "a number": ({"prompt": 3}, 400, "prompt"),
    "mixed prompts": ({"prompt": ["a", 3]}, 400, "prompt"),
    "an unknown token": ({"prompt": [10**6]}, 400, "prompt"),
    "a negative token": ({"prompt": [-1]}, 400, "prompt"),
    "true as a token": ({"prompt": [True]}, 400, "prompt"),
    "too long a prompt": ({"prompt": "ka " * 2000}, 400, "prompt"),
    "no room": ({"prompt": "ka " * 150, "max_tokens": 128}, 400, "prompt"),
    "too many prompts": ({"prompt": ["a"] * 1000}, 400, "prompt"),
    "half a character": ({"prompt": "\ud800"}, 400, "prompt"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "too many tokens": ({"max_tokens": 129}, 400, "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, 400, "max_tokens"),
    "true tokens": ({"max_tokens": True}, 400, "max_tokens"),
    "cold": ({"temperature": -0.1}, 400, "temperature"),
    "hot": ({"temperature": 2.1}, 400, "temperature"),
    "warm": ({"temperature": "1"}, 400, "temperature"),
    "top_p of nothing": ({"top_p": 0}, 400, "top_p"),
    "top_p of more": ({"top_p": 1.01}, 400, "top_p"),
    "top_k of nothing": ({"top_k": 0}, 400, "top_k"),
    "a seed of text": ({"seed": "1"}, 400, "seed"),
    "a seed beyond": ({"seed": 2**63}, 400, "seed"),
    "five stops": ({"stop": list("abcde")}, 400, "stop"),
    "an empty stop": ({"stop": ""}, 400, "stop"),
    "a stop of numbers": ({"stop": [1]}, 400, "stop"),
    "stream of text": ({"stream": "yes"}, 400, "stream"),
    "options without stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "unknown options": ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options"),
    "two answers": ({"n": 2}, 400, "n"),
    "logprobs": ({"logprobs": 3}, 400, "logprobs"),
    "no logprobs but some": ({"logprobs": 0}, 400, "logprobs"),
    "echo": ({"echo": True}, 400, "echo"),
    "best of two": ({"best_of": 2}, 400, "best_of"),
    "suffix": ({"suffix": "x"}, 400, "suffix"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "bias": ({"logit_bias": {"3": 1}}, 400, "logit_bias"),
    "an unknown argument": ({"min_p": 0.1}, 400, "min_p"),
    "an argument of the chat": ({"messages": []}, 400, "messages"),
}
MANY_ARRAYS = {"type": "integer"}
for _ in range(40):  # its pattern doubles with each
    MANY_ARRAYS = {"type": "array", "items": MANY_ARRAYS, "maxItems": 3}
BAD_CHAT = {
    "no messages": ({"messages": None}, "messages"),
    "an empty list": ({"messages": []}, "messages"),
    "a text": ({"messages": "hello"}, "messages"),
    "no role": ({"messages": [{"content": "a"}]}, "messages"),
    "a tool": ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    "no content": ({"messages": [{"role": "user"}]}, "messages"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    "a name": ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, "messages"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "two maxima": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    "logprobs": ({"logprobs": True}, "logprobs"),
    "top logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "a grammar": ({"response_format": {"type": "grammar"}}, "response_format"),
    "a schema of nothing": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a schema that cannot be held": (
        {"response_format": form_of({"type": "string", "pattern": "a"})},
        "response_format",
    ),
    "a schema of many arrays": ({"response_format": form_of(MANY_ARRAYS)}, "response_format"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort"),
    "a prompt": ({"prompt": "a"}, "prompt"),
}


def is_refused(response, status: int, param: str | None = None) -> str:
    """The sentence of an error in OpenAI's form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    message = error["message"]
    assert message and "\n" not in message and "Traceback" not in message and len(message) < 500
    assert param is None or param in message
    return message


def post(up, body, path="/v1/completions"):
    """As JSON with escapes, so that half of a surrogate pair arrives as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return up.web.post(path, content=data, headers={"content-type": "application/json"})


@pytest.mark.parametrize(("more", "status", "param"), BAD.values(), ids=BAD)
def test_a_bad_completion_is_refused_by_name(up, more, status, param):
    body = {"model": "tiny", "prompt": "ka", "max_tokens": 4, "temperature": 0} | more
    is_refused(post(up, body), status, param)
    if "stream_options" not in more:  # a stream that cannot begin has its status too
        is_refused(post(up, {"stream": True} | body), status, param)


@pytest.mark.parametrize(("more", "param"), BAD_CHAT.values(), ids=BAD_CHAT)
def test_a_bad_chat_is_refused_by_name(up, more, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "ka"}], "max_tokens": 4} | more
    is_refused(post(up, body, "/v1/chat/completions"), 400, param)


RAW = {
    "broken": (b'{"model": "tiny", ', 400),
    "nothing": (b"", 400),
    "a list": (b"[]", 400),
    "a number": (b"3", 400),
    "no text": (b"\xff\xfe\x00", 400),
    "deep": (b"[" * 100_000, 400),
    "deep inside": (b'{"model": ' + b"[" * 100_000, 400),
    "digits": (b'{"seed": ' + b"9" * 10_000 + b"}", 400),
    "too large": (b" " * (2**20 + 1), 413),
    "far too large": (b" " * (2**20 * 3), 413),
}


@pytest.mark.parametrize(("data", "status"), RAW.values(), ids=RAW)
def test_a_bad_body_is_refused(up, data, status):
    is_refused(post(up, data), status)


def test_a_wrong_address_method_or_type_is_refused(up):
    assert "/v1/completions" in is_refused(up.web.get("/v1/nothing"), 404)
    is_refused(up.web.get("/v1/completions"), 405)
    is_refused(up.web.post("/v1/completions", data={"model": "tiny"}), 415)
    is_refused(up.web.get("/v1/models", headers={"host": "evil.example"}), 403)
    assert up.web.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200


def test_a_long_value_does_not_make_a_long_sentence(up):
    is_refused(post(up, {"model": "x" * 10_000, "prompt": "a"}), 404, "model")
    is_refused(post(up, {"model": "tiny", "prompt": "a", "n": ["y" * 10_000]}), 400, "n")


def test_a_model_without_a_template_names_the_other_address(tiny):
    bare = type(tiny.tokenizer)(tokenizer_object=tiny.tokenizer._tokenizer, eos_token="<|endoftext|>")
    with running(SimpleNamespace(model=tiny.model, tokenizer=bare)) as up:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "ka"}]}
        assert "/v1/completions" in is_refused(post(up, body, "/v1/chat/completions"), 400, "messages")


def test_what_the_template_refuses_is_said(tiny):
    picky = type(tiny.tokenizer)(tokenizer_object=tiny.tokenizer._tokenizer, eos_token="<|endoftext|>")
    picky.chat_template = "{{ raise_exception('roles must alternate') }}"
    with running(SimpleNamespace(model=tiny.model, tokenizer=picky)) as up:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "ka"}]}
        assert "roles must alternate" in is_refused(post(up, body, "/v1/chat/completions"), 400, "messages")


# ---- many clients ----


def in_threads(*calls):
    """Start calls in threads; returns a function that waits and gives their results or exceptions."""
    found = [None] * len(calls)

    def run(i, call):
        try:
            found[i] = call()
        except Exception as e:
            found[i] = e

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for t in threads:
        t.start()

    def wait():
        for t in threads:
            t.join(60)
            assert not t.is_alive()
        return found

    return wait


def test_one_more_than_may_wait_gets_429(tiny):
    with running(tiny, max_batch=2, queue=3) as up:
        up.held[0].go.clear()
        wait = in_threads(*[lambda: ask(up, max_tokens=3)] * 5)
        eventually(lambda: up.server.runner.taken == 5)
        response = post(up, {"model": "tiny", "prompt": "ka"})
        is_refused(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            ask(up)
        is_refused(post(up, {"model": "tiny", "prompt": ["ka", "lo"], "stream": True}), 429)
        up.held[0].go.set()
        assert len({r.choices[0].text for r in wait()}) == 1
        assert ask(up, max_tokens=3).choices[0].text


def test_none_of_200_answers_is_lost_or_crossed(tiny, up):
    """32 clients at a time, greedy: each gets what the model alone writes for its own prompt."""
    rng = random.Random(3)
    words = ["ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "qu", "ze"]
    some = [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(40)]
    expected = {p: text_of(tiny, alone(tiny, p, 6)) for p in some}
    assert len(set(expected.values())) > 20  # an answer tells whose it is
    prompts = rng.choices(some, k=200)

    async def all_of_them():
        turn = asyncio.Semaphore(32)
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=up.url, timeout=60, trust_env=False, limits=limits) as web:

            async def one(i, prompt):
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "stream": i % 2 == 0}
                async with turn:
                    r = await web.post("/v1/completions", json=body)
                assert r.status_code == 200, r.text
                if i % 2:
                    return r.json()["choices"][0]["text"]
                lines = [x.removeprefix("data: ") for x in r.text.split("\n\n") if x]
                assert lines[-1] == "[DONE]"
                return "".join(c["text"] for x in lines[:-1] for c in json.loads(x)["choices"])

            return await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))

    assert asyncio.run(all_of_them()) == [expected[p] for p in prompts]
    eventually(lambda: up.server.runner.taken == 0)
    stats = up.server.runner.stats
    assert stats.free_blocks == stats.blocks and stats.running == stats.waiting == 0


def raw_request(up, body: dict, *, whole: bool = True) -> socket.socket:
    """A socket with a request on its way."""
    sock = socket.create_connection(("127.0.0.1", up.port), timeout=30)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head = f"{head}Content-Length: {len(data)}\r\n\r\n".encode()
    sock.sendall(head + data if whole else head + data[:5])
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_gives_its_blocks_back(tiny, stream):
    with running(tiny, max_batch=2) as up:
        body = {"model": "tiny", "prompt": "ka lo", "max_tokens": 200, "temperature": 1, "stream": stream}
        up.held[0].go.clear()
        sock = raw_request(up, body)
        eventually(lambda: up.server.runner.taken == 1)
        sock.close()
        eventually(lambda: "llmcourse_cancelled_total 1.0" in up.web.get("/metrics").text)
        up.held[0].go.set()
        eventually(lambda: up.server.runner.taken == 0)
        stats = up.server.runner.stats
        assert stats.running == stats.waiting == 0 and stats.free_blocks == stats.blocks
        assert up.server.generations == set() == up.server.open


def test_a_client_that_is_killed_in_the_middle_of_a_stream(tiny):
    with running(tiny, max_batch=2, max_tokens=240) as up:
        body = {"model": "tiny", "prompt": "ka lo", "max_tokens": 240, "temperature": 1.5, "stream": True}
        sock = raw_request(up, body)
        assert b"data: " in sock.recv(2**16) or b"data: " in sock.recv(2**16)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closed with a reset, as by kill -9
        sock.close()
        eventually(lambda: up.server.runner.taken == 0 and not up.server.open)
        assert ask(up, max_tokens=3).choices[0].text == text_of(tiny, alone(tiny, PROMPTS[0], 3))


GARBAGE = (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\x00" * 100, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n")


def test_garbage_and_half_requests_disturb_nobody(tiny):
    with running(tiny, max_batch=2, idle=0.5) as up:
        halves = [raw_request(up, {"model": "tiny", "prompt": "ka"}, whole=False) for _ in range(3)]
        silent = [socket.create_connection(("127.0.0.1", up.port), timeout=30) for _ in range(3)]
        silent[0].sendall(b"POST /v1/compl")
        for data in GARBAGE:
            with socket.create_connection(("127.0.0.1", up.port), timeout=30) as sock:
                sock.sendall(data)
                with contextlib.suppress(ConnectionError):  # an error or nothing, but an end
                    while sock.recv(2**16):
                        pass
        assert ask(up, max_tokens=3).choices[0].text == text_of(tiny, alone(tiny, PROMPTS[0], 3))
        for sock in halves:  # the body does not come: 408, and the connection ends
            data = b""
            while part := sock.recv(2**16):
                data += part
            assert data.startswith(b"HTTP/1.1 408") and b"did not arrive" in data
            sock.close()
        for sock in silent:  # no request comes: the connection ends
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""
            sock.close()
        eventually(lambda: len(up.server._http.server_state.connections) <= 2)  # the two clients of this test


def test_a_client_that_reads_nothing_is_dropped(tiny):
    with running(tiny, max_batch=2, idle=0.5) as up:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", up.port))
        one = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with pytest.raises(OSError):  # answers pile up until the server no longer reads, then it hangs up
            while True:
                sock.sendall(one * 500)
        sock.close()
        assert up.web.get("/health").status_code == 200


def test_too_many_connections_are_closed(tiny):
    with running(tiny, connections=4) as up:
        kept = [socket.create_connection(("127.0.0.1", up.port), timeout=30) for _ in range(4)]
        eventually(lambda: len(up.server._http.server_state.connections) == 4)
        with socket.create_connection(("127.0.0.1", up.port), timeout=30) as more, contextlib.suppress(ConnectionError):
            assert more.recv(10) == b""
        for sock in kept:
            sock.close()
        eventually(lambda: not up.server._http.server_state.connections)
        assert up.web.get("/health").status_code == 200


# ---- what goes wrong inside ----


class Breaks:
    """An engine whose step fails when it is told to."""

    def __init__(self, engine, faults: list, waiting: int = 0):
        self.engine, self.faults, self.waiting = engine, faults, waiting

    def step(self):
        events, waiting = self.engine.step(), self.engine.stats.waiting
        if self.faults and waiting >= self.waiting:
            raise self.faults.pop()
        return events

    def __getattr__(self, name):
        return getattr(self.engine, name)


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(tiny, capfd):
    faults = []
    with running(tiny, max_batch=2, make_engine=lambda m, c: Breaks(_engine(m, c), faults)) as up:
        expected = ask(up, max_tokens=3).choices[0].text
        for stream in (False, True):
            up.held[-1].go.clear()
            wait = in_threads(lambda s=stream: post(up, {"model": "tiny", "prompt": ["ka lo", "mi"], "stream": s}))
            eventually(lambda: up.server.runner.taken == 2)
            faults.append(RuntimeError("secret of the inside"))
            up.held[-1].go.set()
            assert "secret" not in is_refused(wait()[0], 500)
        assert "secret of the inside" in capfd.readouterr().err  # the log of the server says it
        assert ask(up, max_tokens=3).choices[0].text == expected
        assert up.web.get("/health").json() == {"status": "ok"}


def test_those_that_only_waited_go_on_after_a_failure(tiny, capfd):
    faults = []
    with running(tiny, max_batch=1, make_engine=lambda m, c: Breaks(_engine(m, c), faults, waiting=3)) as up:
        expected = ask(up, max_tokens=3).choices[0].text
        stream = ask(up, max_tokens=100, stream=True, temperature=1.5, seed=1)
        next(iter(stream))  # it runs, alone
        up.held[0].go.clear()
        wait = in_threads(*[lambda: ask(up, max_tokens=3).choices[0].text] * 3)
        eventually(lambda: up.server.runner.taken == 4)
        faults.append(RuntimeError("inside"))
        up.held[0].go.set()
        with pytest.raises(openai.APIError, match="failed"):
            list(stream)
        assert wait() == [expected] * 3


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(tiny, capfd):
    faults = []
    with running(tiny, max_batch=2, make_engine=lambda m, c: Breaks(_engine(m, c), faults)) as up:
        stream = ask(up, max_tokens=100, stream=True, temperature=1.5, seed=1)
        next(iter(stream))
        faults.append(RuntimeError("inside"))
        with pytest.raises(openai.APIError, match="failed"):
            for _ in stream:
                pass
        assert ask(up, max_tokens=3).choices[0].text


def test_an_engine_that_cannot_be_made_again_is_told(tiny, capfd):
    made = []

    def once(model, config):
        assert not made, "no second one"
        made.append(Breaks(_engine(model, config), [RuntimeError("the end")]))
        return made[0]

    with running(tiny, make_engine=once) as up:
        is_refused(post(up, {"model": "tiny", "prompt": "ka"}), 500)
        eventually(lambda: up.server.runner.dead)
        is_refused(post(up, {"model": "tiny", "prompt": "ka"}), 503)
        assert up.web.get("/health").status_code == 503


def test_a_fault_of_the_server_itself_shows_nothing(tiny, capfd, monkeypatch):
    with running(tiny) as up:
        monkeypatch.setattr(form, "read_ask", lambda *a, **k: 1 / 0)
        assert "division" not in is_refused(post(up, {"model": "tiny", "prompt": "ka"}), 500)
        monkeypatch.undo()
        said = []
        eventually(lambda: said.append(capfd.readouterr().err) or "ZeroDivisionError" in "".join(said))
        assert ask(up, max_tokens=2).choices and not up.server.open


# ---- time, and the end ----


def test_an_answer_that_takes_too_long_ends_as_it_is(tiny):
    with running(tiny, timeout=0.4, max_tokens=240) as up:
        up.held[0].go.clear()
        response = post(up, {"model": "tiny", "prompt": "ka"})
        assert "0.4 seconds" in is_refused(response, 504)
        up.held[0].go.set()
        eventually(lambda: up.server.runner.taken == 0)
        engine = up.held[0].engine
        engine_step = engine.step
        taken = []

        def few_steps():
            up.held[0].go.wait(30)
            if len(taken) < 3:
                taken.append(1)
                return engine_step()
            time.sleep(0.02)  # it goes on, without ever giving a token
            return []

        up.held[0].step = few_steps
        up.server.runner.engine = up.held[0]
        made = ask(up, max_tokens=200, temperature=1.5, seed=0)
        assert made.choices[0].finish_reason == "length" and 0 < made.usage.completion_tokens < 200
        eventually(lambda: up.server.runner.taken == 0)


def test_a_server_that_stops_finishes_what_runs(tiny):
    with running(tiny, max_batch=2) as up:
        expected = ask(up, max_tokens=20).choices[0].text
        up.held[0].go.clear()
        wait = in_threads(
            lambda: ask(up, max_tokens=20).choices[0].text,
            lambda: "".join(joined(ask(up, max_tokens=20, stream=True))[0]),
            lambda: ask(up, max_tokens=20).choices[0].text,  # this one still waits for a place
        )
        eventually(lambda: up.server.runner.taken == 3)
        up.server.stop()
        eventually(lambda: up.server.stopping)
        response = post(up, {"model": "tiny", "prompt": "ka"})
        is_refused(response, 503)
        assert "retry-after" in response.headers
        assert up.web.get("/health").status_code == 503
        up.held[0].go.set()
        assert wait() == [expected] * 3
        up.thread.join(30)
        assert not up.thread.is_alive()


def test_what_is_not_finished_in_the_time_of_grace_is_told(tiny):
    with running(tiny, max_batch=2, grace=0) as up:
        up.held[0].go.clear()
        wait = in_threads(lambda: post(up, {"model": "tiny", "prompt": "ka"}))
        eventually(lambda: up.server.runner.taken == 1)
        up.server.stop()
        is_refused(wait()[0], 503)
        up.held[0].go.set()
        up.thread.join(30)
        assert not up.thread.is_alive()


# ---- keys, ports, the command ----


def test_a_key_is_asked_for(tiny):
    with running(tiny, key="a-good-key") as up:
        assert ask(up, max_tokens=2).choices
        for headers in ({}, {"authorization": "Bearer a-good-kex"}, {"authorization": "a-good-key"}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                is_refused(up.web.get(path, headers=headers), 401)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{up.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert up.web.get("/health").status_code == 200
        good = {"authorization": "Bearer a-good-key", "host": "any.example"}
        assert up.web.get("/v1/models", headers=good).status_code == 200
        assert "a-good-key" not in repr(up.server.config)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_others_reach_it_with_a_key_only(host):
    with pytest.raises(BadInput, match="LLMCOURSE_API_KEY"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, key="long-enough").host == host


@pytest.mark.parametrize(
    "bad",
    [{"port": 65536}, {"port": -1}, {"max_batch": 0}, {"cache_tokens": 1}, {"queue": -1}, {"max_tokens": 0},
     {"timeout": 0}, {"timeout": float("inf")}, {"grace": -1}, {"host": ""}, {"key": "short"},
     {"key": "with a space in it"}, {"key": "schlüssel-ü"}],
)  # fmt: skip
def test_absurd_settings_are_refused(bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        ServerConfig(**bad)


def test_where_a_key_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMCOURSE_API_KEY", raising=False)
    assert read_key() is None
    monkeypatch.setenv("LLMCOURSE_API_KEY", "of-the-environment")
    assert read_key() == "of-the-environment"
    (tmp_path / "key").write_text("of-the-file\n")
    assert read_key(tmp_path / "key") == "of-the-file"
    (tmp_path / "key").write_text("\n")
    for path in (tmp_path / "key", tmp_path / "none"):
        with pytest.raises(BadInput, match="api-key-file"):
            read_key(path)


def test_an_address_that_cannot_be_had_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match="--port 0"):
            listen(ServerConfig(port=taken.getsockname()[1]))
    with pytest.raises(BadInput, match="host"):
        listen(ServerConfig(host="no.such.host.invalid", key="long-enough"))
    with pytest.raises(BadInput, match="cannot be had"):
        listen(ServerConfig(host="192.0.2.1", port=0, key="long-enough"))


def test_a_missing_extra_is_one_sentence(tiny, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else find(name, *a))
    with pytest.raises(BadInput, match=r"pip install 'llmcourse\[serve\]'"):
        ModelServer(tiny.model, tiny.tokenizer, name="tiny")


@pytest.mark.parametrize(
    ("args", "said"),
    [(["tiny", "--port", "99999"], "port"), (["tiny", "--host", "0.0.0.0"], "LLMCOURSE_API_KEY"),
     (["nobody", "--port", "0"], "nobody"), (["tiny", "--max-batch", "0"], "max_batch"),
     (["tiny", "--api-key-file", "nothing"], "api-key-file"), (["tiny", "--timeout", "nan"], "timeout")],
)  # fmt: skip
def test_the_command_refuses_in_one_sentence(cli, args, said):
    code, out, err = cli("serve", *args)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_the_command_from_the_ready_line_to_the_signal(tiny_model):
    """In a process of its own: it says where it is, answers, finishes a stream after SIGTERM, and exits with 0."""
    command = [sys.executable, "-m", "llmcourse", "serve", str(tiny_model), "--port", "0", "--device", "cpu"]
    env = clean_env(PYTHONPATH=str(ROOT), LLMCOURSE_API_KEY="of-this-test")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("Ready: http://127.0.0.1:"), line + process.stderr.read()
        url = line.split()[1]
        client = openai.OpenAI(base_url=url, api_key="of-this-test", max_retries=0, timeout=30)
        name = client.models.list().data[0].id
        assert name == "tiny" and str(tiny_model.parent) not in line
        stream = client.completions.create(model=name, prompt="ka lo", max_tokens=200, stream=True, seed=1)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices and rest[-1].choices[0].finish_reason in ("length", "stop")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == "", err
        assert "of-this-test" not in line + out
    finally:
        process.kill()
        process.wait()
