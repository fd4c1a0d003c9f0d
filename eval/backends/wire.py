"""What goes to an endpoint and what comes from it: addresses, keys, and replies that are small enough to be read."""

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
"""Of one reply: a million tokens of an answer take a quarter of it."""
OPENAI_KEY, _OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"


def url_error(key: str, url: str) -> str | None:
    """Why no endpoint can be there, for `key` of the command line; None where one may."""
    shown = masked_word(url)
    try:
        parts = httpx.URL(url)
        port = 80 if parts.port is None else parts.port
        fits = parts.scheme in ("http", "https") and bool(parts.host) and 0 < port < 1 << 16 and " " not in url
        fits &= "%" not in parts.host or ":" in parts.host  # what no name has, escaped; of IPv6 the zone
    except (httpx.InvalidURL, ValueError):  # of the host: a label of IDNA that is none
        fits = False
    if not fits:
        return f"Invalid {key}={shown}: an address is needed, such as http://HOST:PORT/v1."
    if parts.query or parts.fragment:
        begin = re.split("[?#]", shown)[0]
        return f"Invalid {key}={begin}…: paths are added to an address, so no ? and no # may be in it; cut it there."
    if parts.username == MASK:
        return f"Invalid {key}={shown}: records keep no password, and this is one of theirs; give the address anew."
    return None


def key_error(key: str, variable: str | None, url_key: str, url: str) -> str | None:
    """Why the key in an environment variable cannot be sent, for settings `key` and `url_key`; None where it can.

    What is no variable's name may be the key itself, so it is not shown.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", variable):
        return (
            f"Invalid {key}: it names an environment variable, in capitals, and is never the key itself; export the "
            f"key, and write {key}=ITS_NAME."
        )
    if not os.environ.get(variable):
        logger.warning("%s=%s: there is no such environment variable, so no key is sent.", key, variable)
    elif not _is_private(url):
        return (
            f"Invalid {url_key}={masked_url(url)} with {key}={variable}: over http anybody on the way to that machine "
            f"reads the key; use https, or a tunnel to 127.0.0.1, or {key}=null where none is needed."
        )
    return None


def endpoint_errors(url_key: str, url: str, key: str, variable: str | None) -> list[SettingError]:
    """What is wrong with the settings `url_key` and `key` that name an endpoint and its key."""
    message = url_error(url_key, url) or key_error(key, variable, url_key, url)
    keys = (url_key.rpartition(".")[2], key.rpartition(".")[2])
    return [SettingError(keys, message)] if message else []


def key_of(variable: str | None, url: str) -> str | None:
    """The key for an endpoint: of the variable that the user named for it, else OpenAI's for OpenAI's own.

    OpenAI's key belongs to api.openai.com, or to the address in OPENAI_BASE_URL; anywhere else it goes only by name.
    No key goes over http to another machine.
    """
    if not _is_private(url):
        return None
    if variable is None and _is_openais(url):
        variable = OPENAI_KEY
    return os.environ.get(variable) or None if variable else None


def _is_openais(url: str) -> bool:
    told = os.environ.get("OPENAI_BASE_URL", "")
    return httpx.URL(url).host == _OPENAI_HOST or told.rstrip("/") == url.rstrip("/")


def _is_private(url: str) -> bool:
    """Whether nobody on the way reads what is sent: over TLS, or within this machine."""
    return httpx.URL(url).scheme == "https" or is_loopback(url)


def is_loopback(url: str) -> bool:
    """Whether an address is of this very machine."""
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ReplyRefused(Exception):
    """A reply that is not read: compressed, though none was asked for, or endless."""


async def limit_reply(response: Any) -> None:
    """Hook of the client, for each response before its body is read: no more than `MOST_REPLY_BYTES` come in.

    Three megabytes of gzip may be gigabytes of text, made where no deadline can end it; so compression is not asked
    for, and refused.

    Raises:
        ReplyRefused: here for a compressed reply, while it is read for one that is too long.
    """
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ReplyRefused(f"its reply is compressed ({coding[:20]}), though none was asked for; turn that off there")
    base = next(kind for kind in type(response.stream).__mro__ if kind.__name__ == "AsyncByteStream")
    response.stream = type("LimitedStream", (_Limited, base), {})(response.stream)


class _Limited:
    """The bytes of a reply; beside it stands the base class of the client's package, which is httpx or httpx2."""

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
