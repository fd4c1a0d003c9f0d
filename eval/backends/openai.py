"""Answers of any OpenAI-compatible endpoint, such as `vllm serve` in an environment of its own.

So many requests are under way at a time, and so many begin a minute; what fails for a moment (no connection, 408, 409,
429, 5xx, silence, an answer that is none) is tried again after a wait that doubles, or as long as the server says. What
keeps failing ends the evaluation; every answer that came is kept, and the same command goes on from there.

Models differ in the parameters that they take: GPT-5 and the o-series refuse max_tokens, temperature=0 and seed. What a
400 names as unsupported is left out, or renamed, from then on, with a warning; `OpenAIBackend.adapted` records it. A
request whose content is refused by a filter, or that is longer than the context, has an empty answer with its
`refusal`, and the rest goes on; where the first requests are all too long, it is the settings that are, and it ends.

Which key goes to which endpoint, and how much of a reply is read, stands in `eval.backends.wire`.
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

from eval.backends import Completion, Messages, Sampling
from eval.backends.wire import ReplyRefused, is_loopback, key_of, limit_reply
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.masking import MASK, masked

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 60.0
T = TypeVar("T")
R = TypeVar("R")


class EndpointError(OSError):
    """The endpoint cannot be used, perhaps temporarily; the message names the request and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


@dataclass(frozen=True)
class Endpoint:
    """Address, model and request limits of an endpoint.

    `url` ends in /v1; `key_variable` names the environment variable with its key, None: as `wire.key_of` says.
    """

    url: str
    model: str
    key_variable: str | None = None
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout_s: float = 300.0  # of one request, however slowly its answer trickles
    tries: int = 6
    first_wait_s: float = 1.0


class OpenAIBackend:
    """Completions and chats of one model at an endpoint.

    Args:
        chat: `generate` sends each prompt as a user's message of a chat; else as a text to be completed.
        identity: what the record says besides.
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
        self._answered, self._too_long = False, 0  # whether a request was, and how many were too long before
        self._given_up = threading.Event()
        self.adapted: dict[str, str | None] = {}  # parameter that the model refuses → its other name; None: left out
        self._key = key_of(endpoint.key_variable, endpoint.url)
        self._secrets = [text for text in (self._key, httpx.URL(endpoint.url).password) if text]
        headers: dict[str, Any] = {"Accept-Encoding": "identity"}
        if self._key is None:  # nor the account that OPENAI_ORG_ID and OPENAI_PROJECT_ID name
            headers |= {"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit}
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=self._key or "none",
            # Its own retries know neither the deadline of a whole reply, nor the rate, nor a reply without an answer.
            max_retries=0,
            default_headers=headers,
            # A proxy, which the environment may name, is another machine.
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"response": [limit_reply]}, trust_env=not is_loopback(endpoint.url)
            ),
        )
        # A loop in a thread of its own: a request has a deadline as a whole, which only a coroutine can be held to.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="requests", daemon=True).start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def describe(self) -> dict[str, Any]:
        """Omits the address: a server that moved still has the same model."""
        return {
            "backend": "openai",
            "model": self.endpoint.model,
            "chat": self.as_chat,
            **self.identity,
        }

    def prompt_length(self, prompt: str) -> int:
        """Characters: nobody here knows the endpoint's tokenizer."""
        return len(prompt)

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        if self.as_chat:
            return self.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling, seeds)
        options, create = _options(sampling), self._client.completions.create

        async def ask(index: int) -> Completion:
            found = await self._request(partial(create, prompt=prompts[index]), options | _seed(seeds, index))
            return _completion(found, lambda choice: choice.text, sampling)

        return self._all(ask, len(prompts))

    def chat(
        self, chats: Sequence[Messages], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """One reply for each chat, in order.

        Raises:
            EndpointError: as the module says.
        """
        options, create = _options(sampling), self._client.chat.completions.create

        async def ask(index: int) -> Completion:
            messages = list(chats[index])
            found = await self._request(partial(create, messages=messages), options | _seed(seeds, index))
            return _completion(found, lambda choice: choice.message.content, sampling)

        return self._all(ask, len(chats))

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
        """(item, what `work` makes of it) in the order in which they end; `concurrency` are under way at a time.

        Once one has failed no other begins or is tried again, and what those under way bring is still given.

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
            except BaseException:  # an interrupt, or nobody wants the rest: what is under way is not waited for
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
        def one(index: int) -> Completion:
            return asyncio.run_coroutine_threadsafe(self._one(lambda: ask(index)), self._loop).result()

        if count == 1:  # from a thread of `each`, perhaps
            return [one(0)]
        found = dict(self.each(one, range(count)))
        return [found[index] for index in range(count)]

    async def _request(self, create: Callable[..., Awaitable[Any]], options: Mapping[str, Any]) -> Any:
        """The reply to one request, with the parameters that the model takes."""
        import openai

        while True:
            sent = self._taken(options)
            try:
                # Another name is in the body alone: the client's methods have arguments for those that it knows.
                own, renamed = ({k: v for k, v in sent.items() if (k in options) is known} for known in (True, False))
                return await create(model=self.endpoint.model, **own, extra_body=renamed or None)
            except openai.APIStatusError as error:
                if (refused := _unsupported(error, sent)) is None:
                    raise
                if refused not in self.adapted:  # a request beside this one may have been told the same
                    self._adapt(refused, error)

    def _taken(self, options: Mapping[str, Any]) -> dict[str, Any]:
        taken = {}
        for name, value in options.items():
            while name in self.adapted:
                name = self.adapted[name]
            if name is not None:
                taken[name] = value
        return taken

    def _adapt(self, refused: str, error: openai.APIStatusError) -> None:
        other = re.search(r"use ['`\"](\w+)['`\"] instead", _server_message(error), re.IGNORECASE)
        name = other[1] if other else _OTHER_NAMES.get(refused)
        self.adapted[refused] = name if name != refused and name not in self.adapted else None
        done = f"{self.adapted[refused]} is sent instead" if self.adapted[refused] else "it is left out"
        logger.warning("%s does not take %s (%s): %s.", self.endpoint.model, refused, _server_message(error), done)

    async def _one(self, ask: Callable[[], Awaitable[Completion]]) -> Completion:
        for attempt in range(1, self.endpoint.tries + 1):
            await self._slot()
            try:
                answer = await asyncio.wait_for(ask(), self.endpoint.timeout_s)
                self._answered = True
                return answer
            except Exception as raised:
                error = raised.__cause__ if isinstance(raised.__cause__, ReplyRefused) else raised
                reason, wait = self._reason(error), _retry_after(error)
                refused = _is_refused(error)
                if refused and not self._answered and _LENGTH.search(reason.lower()):
                    self._too_long += 1
                if refused and self._too_long <= _MOST_TOO_LONG:
                    logger.warning("%s refuses a request: %s.", self.endpoint.model, reason)
                    return Completion("", 0, False, refusal=reason)
                if wait is None and not _may_pass(error):
                    raise EndpointError(f"{self.endpoint.url} refuses {self.endpoint.model}: {reason}") from error
                last = error
            if self._given_up.is_set():
                break
            if attempt < self.endpoint.tries:
                doubled = self.endpoint.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                await asyncio.sleep(min(wait if wait is not None else doubled, _LONGEST_WAIT_S))
        if isinstance(last, _NoWords) and attempt == self.endpoint.tries:
            return Completion(
                "", 0, False, refusal=reason
            )  # it will not say more: a filter's answer, and no reason to end the rest
        raise EndpointError(f"{self.endpoint.url} failed {attempt} times, the last one: {reason}")

    def _reason(self, error: Exception) -> str:
        """Why a request failed, without what a server repeats of the secrets that it was sent."""
        if isinstance(error, TimeoutError):
            return f"no whole answer within {self.endpoint.timeout_s:g} s"
        reason = _server_message(error)
        for secret in self._secrets:
            reason = reason.replace(secret, MASK)
        if not self._secrets and getattr(error, "status_code", None) in (401, 403):
            reason += "; no key was sent, for none was named for this address (judge_key or base_key)"
        return reason

    async def _slot(self) -> None:
        """Wait until the rate allows one more request."""
        if self.endpoint.requests_per_minute is None:
            return
        now = time.monotonic()
        begin = max(now, self._next_slot)
        self._next_slot = begin + 60.0 / self.endpoint.requests_per_minute
        await asyncio.sleep(begin - now)


class _NoAnswer(Exception):
    """A successful reply without an answer."""


class _NoWords(_NoAnswer):
    """A reply in its form whose text is null, as filters give it."""


class _Filtered(_NoAnswer):
    """A reply that ends because of a filter, before a word."""


# What a model may do without or take by another name; anything else decides what is asked.
_ADAPTABLE = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")
_OTHER_NAMES = {"max_tokens": "max_completion_tokens"}
_UNSUPPORTED = re.compile(
    r"unsupported|(?:not|n't) support|unknown (?:parameter|field|argument|name)|unrecognized|inputs are not permitted"
    r"|deprecated",
    re.IGNORECASE,
)
# Codes and words by which servers say that it is this request's content, or its length, that they refuse.
_REFUSED_CODES = (
    *("content_filter", "content_policy_violation", "invalid_prompt", "ResponsibleAIPolicyViolation"),
    *("moderation_blocked", "content_moderation", "data_inspection_failed", "context_length_exceeded"),
)
_REFUSED_WORDS = (
    *("content management policy", "content filter", "content_filter", "content policy", "usage policy", "moderation"),
    *("inappropriate content", "maximum context length", "context size", "prompt is too long"),
)
_LENGTH = re.compile("context|too long")
_MOST_TOO_LONG = 8  # requests that are too long before one is answered: then it is the settings that are


def _unsupported(error: openai.APIStatusError, sent: Mapping[str, Any]) -> str | None:
    """The parameter of a request that its model does not take, or not with this value."""
    said = _complaint(error)
    if error.status_code not in (400, 422) or not _UNSUPPORTED.search(said):
        return None
    named = [error.param, *(name for pair in _NAMED.findall(said) for name in pair)]
    return next((name for name in named if name in sent and name in _ADAPTABLE), None)


# A parameter in quotes, or behind what announces one: "temperature" and "stop" may be other words.
_NAMED = re.compile(r"['`\"](\w+)['`\"]|\b(?:(?:support )?(?:parameter|argument)s?|support|on this model):?\s+(\w+)")


def _complaint(error: openai.APIStatusError) -> str:
    """Returns the server's error text and location, without what it repeats of the request."""
    body = _body(error)
    details = body.get("detail") if isinstance(body, Mapping) else None
    if not isinstance(details, list):
        return _server_message(error)
    found = [one for one in details if isinstance(one, Mapping)]
    return "; ".join(f"{[str(part) for part in one.get('loc', [])]}: {one.get('msg')}" for one in found)


def _body(error: Exception) -> Any:
    body = getattr(error, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], Mapping):  # as Gemini's endpoint has it
        body = body[0].get("error", body[0])
    return body


def _is_refused(error: Exception) -> bool:
    """Whether it is this one request that is refused, for its content or its length."""
    if isinstance(error, _Filtered):
        return True
    import openai

    if isinstance(error, openai.PermissionDeniedError):  # else of the key or the account
        return error.code in _REFUSED_CODES
    if not isinstance(error, openai.BadRequestError):
        return False
    message = _server_message(error).lower()
    return error.code in _REFUSED_CODES or any(words in message for words in _REFUSED_WORDS)


def _options(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        options["top_p"] = sampling.top_p
    if sampling.stop and not sampling.stop_in_body:  # which an endpoint cannot know
        options["stop"] = list(sampling.stop)[:4]  # as many as the interface takes; the rest is cut off here
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
        raise (_NoWords if text is None else _NoAnswer)("a reply whose answer is no text")
    text, stopped = sampling.cut(text)
    tokens = getattr(getattr(reply, "usage", None), "completion_tokens", None)
    return Completion(text, tokens if isinstance(tokens, int) else 0, ended == "stop" or stopped)


def _may_pass(error: Exception) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    passing = (openai.APIConnectionError, openai.APIResponseValidationError, TimeoutError, _NoAnswer, ValueError)
    return isinstance(error, passing)


def _retry_after(error: Exception) -> float | None:
    response = getattr(error, "response", None)
    told = response.headers.get("retry-after") if response is not None else None
    try:
        return max(0.0, float(told)) if told else None
    except ValueError:
        return None


def _server_message(error: Exception) -> str:
    """What the server itself says, behind the status; else the client's words."""
    body = _body(error)
    message = body.get("message") or body.get("detail") if isinstance(body, Mapping) else None
    status = f"status {error.status_code}: " if hasattr(error, "status_code") else ""
    return status + reason_of(ValueError(message)) if message else reason_of(error)
