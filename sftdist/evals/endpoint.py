"""A model behind an OpenAI-compatible URL: chat completions, greedy, with timeouts and retries; the only httpx import.

The wire format is that of https://platform.openai.com/docs/api-reference/chat, which vLLM, llama.cpp, TGI, SGLang and
others serve.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from sftdist.core.errors import ConfigError, SftdistError
from sftdist.data.message import Message
from sftdist.data.rowerror import show
from sftdist.evals.prompts import Answer

CHAT = "/chat/completions"
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for


class EndpointError(SftdistError):
    """A server that cannot be reached, keeps failing, or answers something else than a chat completion."""


@dataclass(frozen=True)
class Endpoint:
    """A served model. `url` is the API's root, such as http://localhost:8000/v1; without `model` it is the only one
    that is served there; `seconds` is the timeout of one request, `tries` how often it is made, `wait` the seconds
    before the second try, doubled for each one after."""

    url: str
    model: str | None = None
    key: str | None = None
    seconds: float = 120.0
    tries: int = 5
    wait: float = 1.0

    def answer(self, messages: Sequence[Message], max_tokens: int) -> str:
        """The text that the model answers; "" where the server withholds it."""
        return self.ask(messages, max_tokens).text

    def ask(self, messages: Sequence[Message], max_tokens: int, *, tools: Sequence[Mapping[str, Any]] = ()) -> Answer:
        """The greedy answer; an answer of tool calls alone has their JSON as its text.

        Raises ConfigError where the server refuses the request (URL, key, model, length), EndpointError where it
        cannot be reached or fails at every try.
        """
        body = {
            "model": self.name,
            "messages": [_on_the_wire(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            **({"tools": list(tools)} if tools else {}),
        }
        return self._read(self._request("POST", CHAT, body))

    @cached_property
    def name(self) -> str:
        """`model`, or the only one that the server has."""
        if self.model is not None:
            return self.model
        listed = self._request("GET", "/models", None).get("data")
        names = [str(one["id"]) for one in listed or () if isinstance(one, Mapping) and "id" in one]
        if len(names) != 1:
            found = ", ".join(names[:10]) or "none"
            raise ConfigError(f"{self.url}: given no model, and it serves {len(names)} ({found}); name one of them")
        return names[0]

    @cached_property
    def _client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url.rstrip("/").removesuffix(CHAT), headers=headers, timeout=self.seconds)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """The JSON object of a response. What may pass is tried again: no connection, a timeout, `RETRIED`."""
        for left in reversed(range(self.tries)):
            asked_to_wait = None
            try:
                response = self._client.request(method, path, json=body)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise ConfigError(
                    f"given the URL {self.url}, required one such as http://host:8000/v1 ({error})"
                ) from None
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code not in RETRIED:
                    return self._object(response)
                failure = f"HTTP {response.status_code}: {_said(response)}"
                asked_to_wait = response.headers.get("Retry-After")
            if left:
                time.sleep(self._pause(self.tries - left - 1, asked_to_wait))
        raise EndpointError(
            f"{self.url}: given no answer at {self.tries} tries, the last time {failure}; "
            "see that the server runs and can be reached from here, then run this again"
        )

    def _pause(self, tried: int, asked: str | None) -> float:
        """Seconds before the next try. The header may be a date, too, which is not worth reading here."""
        seconds = float(asked) if asked is not None and asked.isdigit() else self.wait * 2**tried
        return min(seconds, LONGEST_WAIT)

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code in (401, 403):
            raise ConfigError(
                f"{self.url}: given {'a key' if self.key else 'no key'}, which the server refuses "
                f"(HTTP {response.status_code}: {_said(response)}); set the environment variable that holds the key"
            )
        if not response.is_success:
            raise ConfigError(
                f"{self.url}: the server refuses the request for model {self.model or '(the only one)'} "
                f"(HTTP {response.status_code}: {_said(response)}); required the root of an OpenAI-compatible API, "
                "such as http://host:8000/v1, and a model that it serves"
            )
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EndpointError(
                f"{self.url}: given {show(response.text)}, required a JSON object as OpenAI's API gives"
            )
        return found

    def _read(self, found: Mapping[str, Any]) -> Answer:
        try:
            choice = found["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
            text = message.get("content") or message.get("refusal") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            given = show(json.dumps(found))
            raise EndpointError(
                f"{self.url}: given {given}, required a chat completion with choices[0].message.content"
            )
        usage = found.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        text = text if text or not calls else json.dumps(calls, ensure_ascii=False)
        return Answer(text, tokens if isinstance(tokens, int) else 0, reason != "length")


def _on_the_wire(message: Message) -> dict[str, Any]:
    """A message as the API takes it: the arguments of a call are text there; reasoning is not sent back."""
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [_sent_call(call, place) for place, call in enumerate(message.tool_calls)] or None,
    }
    sent = {key: value for key, value in optional.items() if value is not None}
    return {"role": message.role, "content": message.content, **sent}


def _sent_call(call: Mapping[str, Any], place: int) -> dict[str, Any]:
    function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
    return {"id": f"call_{place}", **call, "function": function}


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    """A call as a reference has it. Arguments that are no JSON are the model's fault, not the server's: they stay."""
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return {"name": function["name"], "arguments": arguments}


def _said(response: httpx.Response) -> str:
    return show(" ".join(response.text.split()), 200) if response.text.strip() else "(nothing)"
