"""Passwords in addresses, which no message and no record is to have."""

from __future__ import annotations

import re
import urllib.parse

MASK = "***"
_ADDRESS = re.compile(r"(?<=://)[^/\s]\S*@")  # as far as the last @: a password may hold signs that end a host


def masked(text: str) -> str:
    """A text whose addresses have no user and no password: `http://***@host`."""
    return _ADDRESS.sub(f"{MASK}@", text)


def masked_word(word: str) -> str:
    """`masked` of what is one word, or one address, whatever blanks its password has."""
    return re.sub(r"(?<=://)(?!/).*@", f"{MASK}@", word, flags=re.DOTALL)


def masked_url(url: str) -> str:
    """One address without its user and password; what else is in it stays."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return masked(url)
    host = parts.netloc.rpartition("@")[2]
    return url if host == parts.netloc else parts._replace(netloc=f"{MASK}@{host}").geturl()
