"""Security of the traffic with endpoints: valid addresses, keys, and a limit on the size of replies."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx

from flatlora.utils.errors import SettingError
from flatlora.utils.masking import MASK, masked_url, masked_word

logger = logging.getLogger(__name__)

MOST_REPLY_BYTES = 1 << 24
"""Limit of one reply; an answer of a million tokens takes about a quarter of it."""
OPENAI_KEY, _OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"


def url_error(key: str, url: str) -> str | None:
    """Returns why `url`, the value of the setting `key`, is no address of an endpoint; None if it can be one."""
    shown = masked_word(url)
    try:
        parts = httpx.URL(url)
        port = 80 if parts.port is None else parts.port
        fits = parts.scheme in ("http", "https") and bool(parts.host) and 0 < port < 1 << 16 and " " not in url
        fits &= "%" not in parts.host or ":" in parts.host  # "%" is an invalid character, except in an IPv6 zone
    except (httpx.InvalidURL, ValueError):  # ValueError: a host with an invalid IDNA label
        fits = False
    if not fits:
        return f"Invalid {key}={shown}: an address is needed, such as http://HOST:PORT/v1."
    if parts.query or parts.fragment:
        begin = re.split("[?#]", shown)[0]
        return f"Invalid {key}={begin}…: paths are appended to the address, so it must not have ? or #; cut it there."
    if parts.username == MASK:
        return f"Invalid {key}={shown}: this address is from a record, which has no password; give it with password."
    return None


def key_error(key: str, variable: str | None, url_key: str, url: str) -> str | None:
    """Returns why the key in an environment variable cannot be sent to `url`; None if it can.

    The message does not show a value that is no variable's name, as it may be the key itself.

    Args:
        key, url_key: names of the settings with the variable and the address.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", variable):
        return (
            f"Invalid {key}: it must be the name of an environment variable, in capitals, not the key itself; export "
            f"the key, and write {key}=ITS_NAME."
        )
    if not (value := _key_in(variable)):
        logger.warning("%s=%s: there is no such environment variable, so no key is sent.", key, variable)
    elif not re.fullmatch("[!-~]+", value):
        return (
            f"Invalid {key}={variable}: the key in it has blanks or letters that no request may have; export it again."
        )
    elif not _is_private(url):
        return (
            f"Invalid {url_key}={masked_url(url)} with {key}={variable}: http would send the key unencrypted; use "
            f"https, or a tunnel to 127.0.0.1, or {key}=null if no key is needed."
        )
    return None


def endpoint_errors(url_key: str, url: str, key: str, variable: str | None) -> list[SettingError]:
    """Returns the errors of the settings `url_key` and `key`, which name an endpoint and the variable with its key."""
    message = url_error(url_key, url) or key_error(key, variable, url_key, url)
    keys = (url_key.rpartition(".")[2], key.rpartition(".")[2])
    return [SettingError(keys, message)] if message else []


def key_of(variable: str | None, url: str) -> str | None:
    """Returns the key for an endpoint: from the variable that the user named, else OPENAI_API_KEY or None.

    OPENAI_API_KEY is sent to api.openai.com and to the address in OPENAI_BASE_URL; to others only if the user names it.
    No key is sent over http to another machine.
    """
    if not _is_private(url):
        return None
    if variable is None and _is_openais(url):
        variable = OPENAI_KEY
    return _key_in(variable) if variable else None


def _key_in(variable: str) -> str | None:
    """Returns the key in an environment variable, without blanks and line ends around it, as a file may have had."""
    return os.environ.get(variable, "").strip() or None


def _is_openais(url: str) -> bool:
    base_url = os.environ.get("OPENAI_BASE_URL", "")
    return httpx.URL(url).host == _OPENAI_HOST or base_url.rstrip("/") == url.rstrip("/")


def _is_private(url: str) -> bool:
    """Whether the traffic to `url` cannot be read on the way: over TLS, or within this machine."""
    return httpx.URL(url).scheme == "https" or is_loopback(url)


def is_loopback(url: str) -> bool:
    """Whether an address is a loopback address of this machine."""
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ReplyRefused(Exception):
    """A reply that is not read, because it is compressed or too long."""


async def limit_reply(response: Any) -> None:
    """Response hook of the client: limits the body, before it is read, to `MOST_REPLY_BYTES`.

    Compressed replies are rejected: three megabytes of gzip can expand to gigabytes, which no deadline interrupts.

    Raises:
        ReplyRefused: the reply is compressed; while reading, that it is too long.
    """
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ReplyRefused(f"its reply is compressed ({coding[:20]}) without a request for it; turn that off there")
    base = next(kind for kind in type(response.stream).__mro__ if kind.__name__ == "AsyncByteStream")
    response.stream = type("LimitedStream", (_Limited, base), {})(response.stream)


class _Limited:
    """The bytes of a reply, up to the limit; combined with the stream class of the client's httpx or httpx2."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > MOST_REPLY_BYTES:
                raise ReplyRefused(f"its reply has more than {MOST_REPLY_BYTES >> 20} MiB")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
