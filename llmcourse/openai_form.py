"""The form of OpenAI's API: what a request may ask for, how text leaves piece by piece, how answers and errors look.

Hand-written plumbing of `llmcourse.server`. Everything here is a function of its arguments: no socket, no model, no
thread. What is asked for is honored or refused by name; nothing is ignored in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmcourse.settings import BadInput, number, one_of, require, whole

__all__ = ["Ask", "Refused", "TextStream", "Usage", "answer", "chunk", "read_ask", "read_json", "sentence"]

STOPS = 4
"""stop texts in one request, at most"""
COMPLETION_TOKENS = 16
"""new tokens where a text completion does not say how many: OpenAI's number"""


def sentence(text: object, most: int = 400) -> str:
    """One line of at most `most` characters: a message can quote what a client sent, and that can be long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most * 2 // 3]} … {line[-most // 3 :]}"


class Refused(Exception):
    """What a client gets in place of an answer: a status and one sentence."""

    def __init__(
        self, message: object, status: int = 400, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(sentence(message))
        self.status, self.param, self.code, self.kind = status, param, code, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients turn into an exception."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def _checked(name: str, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except BadInput as e:
        raise Refused(e, param=name) from None


def read_json(data: bytes) -> dict[str, Any]:
    """The object in the body of a request.

    Raises:
        Refused: anything that is not one JSON object.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as e:  # not UTF-8 is a ValueError
        why = "it is nested too deeply" if isinstance(e, RecursionError) else e
        raise Refused(f"the body is not JSON ({why}); allowed: one JSON object.") from None
    if not isinstance(found, dict):
        raise Refused(f"the body is a JSON {type(found).__name__}; allowed: one JSON object.")
    return found


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request for new text, checked as far as that is possible without the model."""

    model: str
    chat: bool
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """of a text completion: texts, or token ids"""
    messages: tuple[dict[str, str], ...] = ()
    """of a chat: role and content"""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    schema: Any = None
    """of `response_format`: a JSON schema, True for any JSON object, None for plain text"""


# argument -> the values that ask for nothing; null always does
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logit_bias": ({},),
}  # fmt: skip
NEUTRAL_TEXT = NEUTRAL | {"best_of": (1,), "echo": (False,), "suffix": ()}
NEUTRAL_CHAT = NEUTRAL | {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "service_tier": ("auto", "default"),
    "store": (False,), "reasoning_effort": ("none",), "audio": (), "moderation": (), "prediction": (),
    "prompt_cache_options": (), "prompt_cache_retention": (), "top_logprobs": (), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip
# these name the asker or sort requests in OpenAI's books: they change no answer
HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
COMMON = ("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options")
TEXT = (*COMMON, "prompt", "response_format")
CHAT = (*COMMON, "messages", "max_completion_tokens", "response_format")


def read_ask(body: Mapping[str, Any], *, chat: bool, most: int) -> Ask:
    """What a request asks for.

    Args:
        chat: whether it came to /v1/chat/completions, else to /v1/completions.
        most: new tokens that a request may ask for.
    Raises:
        Refused: a missing, absurd, unknown or unsupported argument, by its name.
    """
    known, neutral = (CHAT, NEUTRAL_CHAT) if chat else (TEXT, NEUTRAL_TEXT)
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in known or name in HARMLESS:
            continue
        if name not in neutral:
            raise Refused(f"{name!r} is no argument of this address; known: {', '.join(known)}.", param=name)
        if not any(value == v and type(value) is type(v) for v in neutral[name]):
            nothing = ", ".join(["null", *(json.dumps(v) for v in neutral[name])])
            raise Refused(f"{name} is {value!r}; allowed: {nothing}: this server does not offer more.", param=name)
    take = lambda name, check: None if name not in given else _checked(name, lambda: check(name, given[name]))
    for name in ("model", "messages" if chat else "prompt"):
        if name not in given:
            raise Refused(f"{name} is missing.", param=name)
    options = take("stream_options", _stream_options) or {}
    stream = bool(take("stream", lambda n, v: one_of(n, v, (True, False))))
    if options and not stream:
        raise Refused("stream_options is given without stream; allowed: together with stream.", param="stream_options")
    return Ask(
        model=take("model", _text), chat=chat,
        prompts=() if chat else take("prompt", _prompts), messages=take("messages", _messages) if chat else (),
        max_tokens=_max_tokens(given, take, most),
        temperature=1.0 if (t := take("temperature", lambda n, v: number(n, v, 0, 2))) is None else t,
        top_p=take("top_p", lambda n, v: number(n, v, high=1, above=0)),
        top_k=take("top_k", lambda n, v: whole(n, v, 1)),
        seed=take("seed", lambda n, v: whole(n, v, -(2**63), 2**63 - 1)),
        stop=take("stop", _stops) or (), stream=stream, include_usage=bool(options.get("include_usage")),
        schema=take("response_format", _response_format),
    )  # fmt: skip


def _max_tokens(given: Mapping[str, Any], take: Callable, most: int) -> int | None:
    both = [take(name, lambda n, v: whole(n, v, 1, most)) for name in ("max_tokens", "max_completion_tokens")]
    if None not in both and both[0] != both[1]:
        text = f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; allowed: one of them."
        raise Refused(text, param="max_tokens")
    return both[0] if both[1] is None else both[1]


def _text(name: str, value: Any) -> str:
    require(isinstance(value, str), name, value, "a text")
    return value


def _stream_options(name: str, value: Any) -> dict[str, Any]:
    require(isinstance(value, dict), name, value, "an object")
    for key in value:
        one_of(f"key in {name}", key, ("include_usage", "include_obfuscation"))
    one_of(f"{name}.include_obfuscation", value.get("include_obfuscation") or False, (False,))
    one_of(f"{name}.include_usage", value.get("include_usage") or False, (True, False))
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= STOPS and all(isinstance(s, str) and s for s in stops)
    require(good, name, value, f"a text, or a list of at most {STOPS}, none of them empty")
    return tuple(_utf8(name, s) for s in stops)


def _utf8(name: str, text: str) -> str:
    """JSON can hold half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadInput(f"{name} has half a character at position {e.start}; allowed: text in UTF-8.") from None
    return text


def _prompts(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    ids = lambda v: isinstance(v, list) and bool(v) and all(type(i) is int for i in v)
    if isinstance(value, str):
        return (_utf8(name, value),)
    if ids(value):
        return (tuple(value),)
    good = isinstance(value, list) and bool(value) and (all(isinstance(v, str) for v in value) or all(map(ids, value)))
    require(good, name, value, "a text, a list of texts, a list of token ids, or a list of such lists")
    return tuple(_utf8(name, v) if isinstance(v, str) else tuple(v) for v in value)


def _messages(name: str, value: Any) -> tuple[dict[str, str], ...]:
    require(isinstance(value, list) and bool(value), name, value, "a list of at least one message")
    found = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        require(isinstance(message, dict), where, message, "an object with role and content")
        for key, v in message.items():
            require(key in ("role", "content") or v is None, f"key in {where}", key, "role, content")
        role = one_of(f"{where}.role", message.get("role"), ("system", "developer", "user", "assistant"))
        content = _content(f"{where}.content", message.get("content"))
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return tuple(found)


def _content(where: str, value: Any) -> str:
    """The text of a message: OpenAI also writes it as a list of parts."""
    if isinstance(value, str):
        return _utf8(where, value)
    good = isinstance(value, list) and bool(value) and all(isinstance(p, dict) for p in value)
    require(good, where, value, "a text, or a list of parts of the type text")
    for part in value:
        one_of(f"type of a part of {where}", part.get("type"), ("text",))
        require(isinstance(part.get("text"), str), f"text of a part of {where}", part.get("text"), "a text")
        require(set(part) == {"type", "text"}, f"keys of a part of {where}", sorted(part), "type, text")
    return _utf8(where, "".join(part["text"] for part in value))


def _response_format(name: str, value: Any) -> Any:
    """The schema that the answer has to fit, True for any JSON object, None for text."""
    require(isinstance(value, dict), name, value, "an object with a type")
    kind = one_of(f"{name}.type", value.get("type"), ("text", "json_object", "json_schema"))
    if kind != "json_schema":
        require(set(value) == {"type"}, f"keys of {name}", sorted(value), "type")
        return True if kind == "json_object" else None
    about = value.get("json_schema")
    good = set(value) == {"type", "json_schema"} and isinstance(about, dict)
    require(good and isinstance(about.get("schema"), dict), name, value, "a json_schema with a schema, an object")
    for key in about:  # strict or not: the tokens that the schema forbids are never drawn
        one_of(f"key in {name}.json_schema", key, ("name", "description", "schema", "strict"))
    return about["schema"]


class TextStream:
    """The text of tokens that come one by one, in pieces that never cut a character and never show a stop text.

    The pieces together are the whole text, however it is delivered. A piece is held back while its end can still
    change: a character of several tokens, or the beginning of a stop text.

    Args:
        decode: token ids to text; the end of a sequence that is no whole character becomes U+FFFD.
        stops: texts at which the text ends; they are no part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.stopped = False
        """a stop text has come: there is no more text"""
        self._ids: list[int] = []  # from the last tokens whose text went out on
        self._fresh = 0  # how many of them had their text sent
        self._sent = 0  # characters of their text that are out
        self._held = ""  # perhaps the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that is certain with one more token; often nothing."""
        self._ids.append(token)
        text = self.decode(self._ids)
        # an unfinished character is one U+FFFD, or one for each of its bytes, of which there are three at most
        tail = len(text) - len(text.rstrip("\ufffd"))
        ready = len(text) - min(tail, 3)
        piece = text[self._sent : ready]
        self._sent = max(self._sent, ready)
        if ready == len(text):  # all is out: the tokens before these are needed no longer
            self._ids = self._ids[self._fresh :]
            self._fresh, self._sent = len(self._ids), len(self.decode(self._ids))
        return self._before_stop(piece)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        piece = self._before_stop(self.decode(self._ids)[self._sent :])
        rest, self._held, self._ids = "" if self.stopped else self._held, "", []
        return piece + rest

    def _before_stop(self, piece: str) -> str:
        if self.stopped or not self.stops:
            return "" if self.stopped else piece
        text = self._held + piece
        places = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = min(len(text), max(map(len, self.stops)) - 1)
        keep = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


@dataclass
class Usage:
    """Tokens that were read and written."""

    prompt: int = 0
    new: int = 0

    def form(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": self.new, "total_tokens": self.prompt + self.new}


def answer(ask: Ask, head: Mapping[str, Any], texts: Sequence[tuple[str, str]], usage: Usage) -> dict[str, Any]:
    """A whole answer: `texts` are text and reason of the end, one for each prompt."""
    choices = []
    for i, (text, why) in enumerate(texts):
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if ask.chat else {"text": text}
        choices.append({"index": i, **said, "logprobs": None, "finish_reason": why})
    kind = "chat.completion" if ask.chat else "text_completion"
    return {**head, "object": kind, "choices": choices, "usage": usage.form()}


def chunk(
    ask: Ask, head: Mapping[str, Any], index: int = 0, text: str | None = None, why: str | None = None, *,
    first: bool = False, usage: Usage | None = None,
) -> bytes:  # fmt: skip
    """One server-sent event of a stream: a piece of text, the end of one, or (with `usage`) the last word."""
    if usage is not None:
        choices = []
    elif ask.chat:
        delta = {"role": "assistant", "content": ""} if first else {} if text is None else {"content": text}
        choices = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": why}]
    else:
        choices = [{"index": index, "text": text or "", "logprobs": None, "finish_reason": why}]
    told = {"usage": usage.form() if usage else None} if ask.include_usage else {}
    kind = "chat.completion.chunk" if ask.chat else "text_completion"
    return event({**head, "object": kind, "choices": choices, **told})


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(data) + b"\n\n"


def encoded(data: Any) -> bytes:
    """JSON in UTF-8. What a client sent can hold half of a surrogate pair, which UTF-8 cannot write: then escapes."""
    try:
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(data, separators=(",", ":")).encode()
