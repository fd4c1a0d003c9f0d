"""Generates with any OpenAI-compatible endpoint, such as `vllm serve` in a separate environment.

The number of concurrent requests and of requests per minute is limited. Temporary failures (no connection, 408, 409,
429, 5xx, a time-out, an invalid reply) are retried after a wait that doubles each time, or that the server sets. A
request that keeps failing ends the evaluation; the answers so far are saved, and the same command continues.

Models differ in the parameters that they support: GPT-5 and the o-series reject max_tokens, temperature=0 and seed.
Parameters that a 400 reply names as unsupported are omitted or renamed from then on, with a warning, and recorded in
`OpenAIBackend.adapted`. A request that a content filter rejects, or that is longer than the context, gets an empty
answer with a `refusal`, and the evaluation continues; if the first requests are all too long, it ends, as the settings
are probably wrong.

`eval.backends.wire` decides which key is sent to which endpoint, and limits the size of replies.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from eval.backends import Completion, Sampling
from eval.backends.wire import ReplyRefused, is_loopback, key_of, limit_reply
from flatlora.inputs.conversations import Chat, readable, turns
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.masking import MASK, masked
from flatlora.utils.names import printable

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 60.0
T = TypeVar("T")
R = TypeVar("R")


class EndpointError(OSError):
    """The endpoint cannot be used, perhaps temporarily; the message names the request and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(masked(message)))


@dataclass(frozen=True)
class Endpoint:
    """Address, model and request limits of an endpoint.

    Args:
        url: ends in /v1.
        key_variable: environment variable with the key; None: see `wire.key_of`.
    """

    url: str
    model: str
    key_variable: str | None = None
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout_s: float = 300.0  # of one request until its complete reply
    tries: int = 6
    first_wait_s: float = 1.0


class OpenAIBackend:
    """Completions and chats of one model at an endpoint.

    Args:
        chat: `generate` sends each prompt as a user message of a chat, instead of as a text to complete.
        identity: more entries for generation.json.
    """

    def __init__(self, endpoint: Endpoint, *, chat: bool = False, identity: Mapping[str, Any] | None = None) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                ["Invalid backend=openai: the package openai is not installed; run pip install 'openai>=2'."]
            ) from error
        self.endpoint, self.batch_size, self.as_chat = endpoint, endpoint.concurrency, chat
        self.identity = dict(identity or {})
        self._next_slot = 0.0
        self._answered, self._too_long = False, 0  # whether any request was answered; how many were too long before
        self._given_up = threading.Event()
        self.adapted: dict[str, str | None] = {}  # parameter that the model rejects → its other name; None: omitted
        self._key = key_of(endpoint.key_variable, endpoint.url)
        self._secrets = [text for text in (self._key, httpx.URL(endpoint.url).password) if text]
        headers: dict[str, Any] = {"Accept-Encoding": "identity"}
        if self._key is None:  # do not send OPENAI_ORG_ID and OPENAI_PROJECT_ID either
            headers |= {"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit}
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=self._key or "none",
            # The client's own retries have no deadline for a whole reply and no rate, and accept replies without text.
            max_retries=0,
            default_headers=headers,
            # For a loopback address, ignore a proxy in the environment: it is another machine.
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"response": [limit_reply]}, trust_env=not is_loopback(endpoint.url)
            ),
        )
        # An event loop in its own thread: only a coroutine can be canceled at the deadline of a whole request.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="requests", daemon=True).start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def describe(self) -> dict[str, Any]:
        """Returns the entries for generation.json; without the address, as a server that moved has the same model."""
        return {
            "backend": "openai",
            "model": self.endpoint.model,
            "chat": self.as_chat,
            **self.identity,
        }

    def prompt_length(self, prompt: str | Chat) -> int:
        """Returns the number of characters, as the endpoint's tokenizer is unknown."""
        return len(readable(prompt.messages) if isinstance(prompt, Chat) else prompt)

    def generate(
        self, prompts: Sequence[str | Chat], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        if self.as_chat or any(isinstance(prompt, Chat) for prompt in prompts):
            chats = [prompt if isinstance(prompt, Chat) else Chat(turns(None, prompt)) for prompt in prompts]
            return self.chat(chats, sampling, seeds)
        options, create = _options(sampling), self._client.completions.create

        async def ask(index: int) -> Completion:
            reply = await self._request(partial(create, prompt=prompts[index]), options | _seed(seeds, index))
            return _completion(reply, lambda choice: choice.text, sampling)

        return self._all(ask, len(prompts))

    def chat(self, chats: Sequence[Chat], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """Returns one reply per chat, in order.

        Raises:
            EndpointError: the endpoint rejects a request, or a request keeps failing.
        """
        options, create = _options(sampling), self._client.chat.completions.create

        async def ask(index: int) -> Completion:
            chat = chats[index]
            tools = {"tools": list(chat.tools)} if chat.tools else {}
            asked = partial(create, messages=list(chat.messages), **tools)
            reply = await self._request(asked, options | _seed(seeds, index))
            return _completion(reply, lambda choice: choice.message.content, sampling)

        return self._all(ask, len(chats))

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
        """Yields (item, work(item)) in the order in which they finish; `concurrency` run at a time.

        After a failure no other item is started or retried; results of the running ones are still yielded.

        Raises:
            EndpointError: the first failure.
        """
        self._given_up.clear()
        failures: list[Exception] = []

        def begin(item: T) -> R | None:
            if self._given_up.is_set():
                return None
            try:
                return work(item)
            except Exception as error:
                self._given_up.set()
                failures.append(error)
                raise

        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            futures = {pool.submit(begin, item): item for item in items}
            try:
                for future in as_completed(futures):
                    if future.exception() is None and future.result() is not None:
                        yield futures[future], future.result()
            except BaseException:  # an interrupt, or the caller stops: do not wait for running requests
                self._given_up.set()
                self._loop.call_soon_threadsafe(self._cancel_requests)
                raise
        self._given_up.clear()
        if failures:
            raise failures[0]

    def _cancel_requests(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _all(self, ask: Callable[[int], Awaitable[Completion]], count: int) -> list[Completion]:
        def answer(index: int) -> Completion:
            return asyncio.run_coroutine_threadsafe(self._one(lambda: ask(index)), self._loop).result()

        if count == 1:  # may be called from a thread of `each`
            return [answer(0)]
        completions = dict(self.each(answer, range(count)))
        return [completions[index] for index in range(count)]

    async def _request(self, create: Callable[..., Awaitable[Any]], options: Mapping[str, Any]) -> Any:
        """Returns the reply to one request, sent with the parameters that the model supports."""
        import openai

        while True:
            sent = self._supported(options)
            try:
                # Renamed parameters go into the body: the client's methods have no arguments for unknown names.
                own, renamed = (
                    {k: v for k, v in sent.items() if (k in options) is is_known} for is_known in (True, False)
                )
                return await create(model=self.endpoint.model, **own, extra_body=renamed or None)
            except openai.APIStatusError as error:
                if (rejected := _unsupported(error, sent)) is None:
                    raise
                if rejected not in self.adapted:  # a concurrent request may have adapted it already
                    self._adapt(rejected, error)

    def _supported(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options without, or under the other names of, parameters that the model rejected."""
        supported = {}
        for name, value in options.items():
            while name in self.adapted:
                name = self.adapted[name]
            if name is not None:
                supported[name] = value
        return supported

    def _adapt(self, rejected: str, error: openai.APIStatusError) -> None:
        other = re.search(r"use ['`\"](\w+)['`\"] instead", _server_message(error), re.IGNORECASE)
        name = other[1] if other else _OTHER_NAMES.get(rejected)
        self.adapted[rejected] = name if name != rejected and name not in self.adapted else None
        change = f"{self.adapted[rejected]} is sent instead" if self.adapted[rejected] else "it is left out"
        logger.warning(
            "%s does not support %s (%s): %s.", self.endpoint.model, rejected, _server_message(error), change
        )

    async def _one(self, ask: Callable[[], Awaitable[Completion]]) -> Completion:
        for attempt in range(1, self.endpoint.tries + 1):
            await self._slot()
            try:
                completion = await asyncio.wait_for(ask(), self.endpoint.timeout_s)
                self._answered = True
                return completion
            except Exception as raised:
                error = raised.__cause__ if isinstance(raised.__cause__, ReplyRefused) else raised
                reason, wait = self._reason(error), _retry_after(error)
                is_refused = _is_refused(error)
                if is_refused and not self._answered and _LENGTH.search(reason.lower()):
                    self._too_long += 1
                if is_refused and self._too_long <= _MOST_TOO_LONG:
                    logger.warning("%s refused a request: %s.", self.endpoint.model, reason)
                    return Completion("", 0, False, refusal=reason)
                if wait is None and not _is_temporary(error):
                    raise EndpointError(f"{self.endpoint.url} refuses {self.endpoint.model}: {reason}") from error
                last = error
            if self._given_up.is_set():
                break
            if attempt < self.endpoint.tries:
                backoff = self.endpoint.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                await asyncio.sleep(min(wait if wait is not None else backoff, _LONGEST_WAIT_S))
        if isinstance(last, _NullText) and attempt == self.endpoint.tries:
            # Most likely a filter: this answer stays empty, and the evaluation continues.
            return Completion("", 0, False, refusal=reason)
        raise EndpointError(f"{self.endpoint.url} failed {attempt} times, the last one: {reason}")

    def _reason(self, error: Exception) -> str:
        """Returns why a request failed; secrets that the server repeats are masked."""
        if isinstance(error, TimeoutError):
            return f"no complete answer within {self.endpoint.timeout_s:g} s"
        reason = _server_message(error)
        for secret in self._secrets:
            reason = reason.replace(secret, MASK)
        if not self._secrets and getattr(error, "status_code", None) in (401, 403):
            reason += "; no key was sent, as none was given for this address (judge_key or base_key)"
        return reason

    async def _slot(self) -> None:
        """Waits until the rate limit allows one more request."""
        if self.endpoint.requests_per_minute is None:
            return
        now = time.monotonic()
        begin = max(now, self._next_slot)
        self._next_slot = begin + 60.0 / self.endpoint.requests_per_minute
        await asyncio.sleep(begin - now)


class _NoAnswer(Exception):
    """A successful reply without an answer."""


class _NullText(_NoAnswer):
    """A valid reply whose text is null, as filters return it."""


class _Filtered(_NoAnswer):
    """A reply that a filter ended before its first word."""


# Parameters that may be omitted or renamed; all others determine the request.
_ADAPTABLE = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")
_OTHER_NAMES = {"max_tokens": "max_completion_tokens"}
_UNSUPPORTED = re.compile(
    r"unsupported|(?:not|n't) support|unknown (?:parameter|field|argument|name)|unrecognized|inputs are not permitted"
    r"|deprecated",
    re.IGNORECASE,
)
# Error codes and phrases of servers that reject the content or the length of a request.
_REFUSED_CODES = (
    *("content_filter", "content_policy_violation", "invalid_prompt", "ResponsibleAIPolicyViolation"),
    *("moderation_blocked", "content_moderation", "data_inspection_failed", "context_length_exceeded"),
)
_REFUSED_PHRASES = (
    *("content management policy", "content filter", "content_filter", "content policy", "usage policy", "moderation"),
    *("inappropriate content", "maximum context length", "context size", "prompt is too long"),
)
_LENGTH = re.compile("context|too long")
_MOST_TOO_LONG = 8  # if more requests are too long before one is answered, the settings are wrong


def _unsupported(error: openai.APIStatusError, sent: Mapping[str, Any]) -> str | None:
    """Returns the parameter of a request that the model does not support, or not with this value; None if none."""
    text = _error_text(error)
    if error.status_code not in (400, 422) or not _UNSUPPORTED.search(text):
        return None
    named = [error.param, *(name for pair in _NAMED.findall(text) for name in pair)]
    return next((name for name in named if name in sent and name in _ADAPTABLE), None)


# A parameter in quotes, or after a word such as "parameter"; elsewhere "temperature" and "stop" may be ordinary words.
_NAMED = re.compile(r"['`\"](\w+)['`\"]|\b(?:(?:support )?(?:parameter|argument)s?|support|on this model):?\s+(\w+)")


def _error_text(error: openai.APIStatusError) -> str:
    """Returns the server's error text and its location, without the parts of the request that it repeats."""
    body = _body(error)
    details = body.get("detail") if isinstance(body, Mapping) else None
    if not isinstance(details, list):
        return _server_message(error)
    errors = [detail for detail in details if isinstance(detail, Mapping)]
    return "; ".join(f"{[str(part) for part in detail.get('loc', [])]}: {detail.get('msg')}" for detail in errors)


def _body(error: Exception) -> Any:
    body = getattr(error, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], Mapping):  # as from Gemini's endpoint
        body = body[0].get("error", body[0])
    return body


def _is_refused(error: Exception) -> bool:
    """Whether only this request is rejected, because of its content or its length."""
    if isinstance(error, _Filtered):
        return True
    import openai

    if isinstance(error, openai.PermissionDeniedError):  # with another code, the key or the account is rejected
        return error.code in _REFUSED_CODES
    if not isinstance(error, openai.BadRequestError):
        return False
    message = _server_message(error).lower()
    return error.code in _REFUSED_CODES or any(phrase in message for phrase in _REFUSED_PHRASES)


def _options(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        options["top_p"] = sampling.top_p
    if sampling.stop and not sampling.stop_in_body:  # endpoints have no equivalent of `stop_in_body`
        options["stop"] = list(sampling.stop)[:4]  # the API's maximum; `_completion` cuts at the others
    return options


def _seed(seeds: Sequence[int] | None, index: int) -> dict[str, int]:
    return {} if seeds is None else {"seed": seeds[index] % (1 << 31)}


def _completion(reply: Any, text_of: Callable[[Any], str | None], sampling: Sampling) -> Completion:
    try:
        choice = reply.choices[0]
        text = text_of(choice)
        ended = choice.finish_reason
    except (AttributeError, IndexError, TypeError) as error:
        raise _NoAnswer(f"a reply without an answer ({str(reply)[:100]!r})") from error
    if not text and ended == "content_filter":
        raise _Filtered("the server's filter ends the answer before its first word")
    if not isinstance(text, str):
        raise (_NullText if text is None else _NoAnswer)("a reply whose answer is no text")
    most = sampling.max_new_tokens * _LONGEST_TOKEN
    whole = len(text) <= most
    text, stopped = sampling.cut(text[:most])
    tokens = getattr(getattr(reply, "usage", None), "completion_tokens", None)
    return Completion(text, tokens if isinstance(tokens, int) else 0, stopped or (whole and ended == "stop"))


_LONGEST_TOKEN = 128  # letters, those of the longest in usual vocabularies; an endpoint may ignore max_tokens


def _is_temporary(error: Exception) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    temporary = (openai.APIConnectionError, openai.APIResponseValidationError, TimeoutError, _NoAnswer, ValueError)
    return isinstance(error, temporary)


def _retry_after(error: Exception) -> float | None:
    response = getattr(error, "response", None)
    seconds = response.headers.get("retry-after") if response is not None else None
    try:
        return max(0.0, float(seconds)) if seconds else None
    except ValueError:
        return None


def _server_message(error: Exception) -> str:
    """Returns the status and the server's own message; without a message, the client's."""
    body = _body(error)
    message = body.get("message") or body.get("detail") if isinstance(body, Mapping) else None
    status = f"status {error.status_code}: " if hasattr(error, "status_code") else ""
    return status + reason_of(ValueError(message)) if message else reason_of(error)
