"""Removes passwords from URLs before they reach messages and records."""

from __future__ import annotations

import re
import urllib.parse

MASK = "***"
_ADDRESS = re.compile(  # up to the last @: a password may contain characters that end a host
    r"(?<=://)[^/\s]\S*@"
    r"|(?:(?<=_url=)|(?<=_url: ))(?!['\"]?\w+://)['\"]?/{0,2}[^\s/@]*:\S*@"  # without http://, by mistake
)


def masked(text: str) -> str:
    """The text with user and password masked in all URLs: `http://***@host`."""
    return _ADDRESS.sub(f"{MASK}@", text)


def masked_word(word: str) -> str:
    """`masked` for a single argument or URL, whose password may contain blanks, and whose `http://` may be missing."""
    begin = r"(?<=://)(?!/)" if "://" in word else r"(?:(?<==)|^)(?=['\"]?/{0,2}[^/=@]*:)"
    return re.sub(rf"{begin}.*@", f"{MASK}@", word, flags=re.DOTALL)


def masked_url(url: str) -> str:
    """A URL with user and password masked; the rest is unchanged."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return masked(url)
    host = parts.netloc.rpartition("@")[2]
    return url if host == parts.netloc else parts._replace(netloc=f"{MASK}@{host}").geturl()
