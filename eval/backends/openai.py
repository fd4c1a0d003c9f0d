"""Answers of any OpenAI-compatible endpoint, such as `vllm serve` in an environment of its own.

Requests of a batch go out together, so many at a time and so many a minute; what fails for a moment (no connection,
408, 409, 429, 5xx, silence, an answer that is none) is tried again after a wait that doubles, or as long as the server
says. What keeps failing ends the evaluation; earlier batches are kept, and the same command goes on from there.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.backends import Completion, Messages, Sampling, cut_at
from flatlora.config import ConfigError

_LONGEST_WAIT_S = 60.0


class EndpointError(OSError):
    """The endpoint cannot be used, or not for now: what was asked and why it failed."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how hard.

    `url` ends in /v1; the key is read from the environment variable `key_variable`, and none is sent where it is unset.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
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

    def __init__(
        self, endpoint: Endpoint, *, batch_size: int, chat: bool = False, identity: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                ["Invalid backend=openai: the package openai is not installed; run pip install 'openai>=2'."]
            ) from error
        self.endpoint, self.batch_size, self.as_chat = endpoint, batch_size, chat
        self.identity = dict(identity or {})
        self._next_slot = 0.0

    def describe(self) -> dict[str, Any]:
        """Without the address: a server that moved is the same model."""
        return {
            "backend": "openai",
            "model": self.endpoint.model,
            "chat": self.as_chat,
            "batch_size": self.batch_size,
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
        options = _options(sampling)

        async def ask(client: Any, index: int) -> Completion:
            found = await client.completions.create(
                model=self.endpoint.model, prompt=prompts[index], **options, **_seed(seeds, index)
            )
            return _completion(found, lambda choice: choice.text, sampling)

        return self._all(ask, len(prompts))

    def chat(
        self, chats: Sequence[Messages], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """One reply for each chat, in order.

        Raises:
            EndpointError: as the module says.
        """
        options = _options(sampling)

        async def ask(client: Any, index: int) -> Completion:
            found = await client.chat.completions.create(
                model=self.endpoint.model, messages=list(chats[index]), **options, **_seed(seeds, index)
            )
            return _completion(found, lambda choice: choice.message.content, sampling)

        return self._all(ask, len(chats))

    def _all(self, ask: Callable[[Any, int], Coroutine[Any, Any, Completion]], count: int) -> list[Completion]:
        async def work() -> list[Completion]:
            import openai

            key = os.environ.get(self.endpoint.key_variable) or "none"
            client = openai.AsyncOpenAI(base_url=self.endpoint.url, api_key=key, max_retries=0)
            gate = asyncio.Semaphore(self.endpoint.concurrency)
            async with client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._one(gate, lambda i=index: ask(client, i))) for index in range(count)]
            return [task.result() for task in tasks]

        try:
            return asyncio.run(work())
        except* EndpointError as errors:
            raise errors.exceptions[0] from None

    async def _one(self, gate: asyncio.Semaphore, ask: Callable[[], Awaitable[Completion]]) -> Completion:
        reason = ""
        async with gate:
            for attempt in range(self.endpoint.tries):
                await self._slot()
                try:
                    return await asyncio.wait_for(ask(), self.endpoint.timeout_s)
                except Exception as error:
                    reason, wait = _reason(error, self.endpoint), _retry_after(error)
                    if wait is None and not _may_pass(error):
                        raise EndpointError(f"{self.endpoint.url} refuses {self.endpoint.model}: {reason}") from error
                if attempt + 1 < self.endpoint.tries:
                    doubled = self.endpoint.first_wait_s * 2**attempt * random.uniform(0.75, 1.25)
                    await asyncio.sleep(min(wait if wait is not None else doubled, _LONGEST_WAIT_S))
        raise EndpointError(f"{self.endpoint.url} failed {self.endpoint.tries} times, the last one: {reason}")

    async def _slot(self) -> None:
        """Wait until the rate allows one more request."""
        if self.endpoint.requests_per_minute is None:
            return
        now = time.monotonic()
        begin = max(now, self._next_slot)
        self._next_slot = begin + 60.0 / self.endpoint.requests_per_minute
        await asyncio.sleep(begin - now)


class _NoAnswer(Exception):
    """A reply of the right status without what was asked for."""


def _options(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        options["top_p"] = sampling.top_p
    if sampling.stop:
        options["stop"] = list(sampling.stop)[:4]  # as many as the interface takes; the rest is cut off here
    return options


def _seed(seeds: Sequence[int] | None, index: int) -> dict[str, int]:
    return {} if seeds is None else {"seed": seeds[index] % (1 << 31)}


def _completion(found: Any, text_of: Callable[[Any], str | None], sampling: Sampling) -> Completion:
    try:
        choice = found.choices[0]
        text = text_of(choice)
        finished = choice.finish_reason == "stop"
    except (AttributeError, IndexError, TypeError) as error:
        raise _NoAnswer(f"a reply without an answer ({str(found)[:100]!r})") from error
    if not isinstance(text, str):
        raise _NoAnswer("a reply whose answer is no text")
    text, stopped = cut_at(text, sampling.stop)
    tokens = getattr(getattr(found, "usage", None), "completion_tokens", None)
    return Completion(text, tokens if isinstance(tokens, int) else 0, finished or stopped)


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


def _reason(error: Exception, endpoint: Endpoint) -> str:
    if isinstance(error, TimeoutError):
        return f"no whole answer within {endpoint.timeout_s:g} s"
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
