"""Masks e-mail addresses and IP addresses.

An IP address is four numbers up to 255 without leading zeros, or an IPv6 address of the ranges in use (2000::/3,
fc00::/7, fe80::/10 and ff00::/8: so a Python slice `1::2` or a C++ name `abc::def` is none). Loopback and unspecified
addresses identify nobody and stay. A version number of four parts cannot be told from an address: `1.2.3.4` is masked,
`v1.2.3.4`, `1.2.3.4.5` and `1.2.3` are not.
"""

from __future__ import annotations

import ipaddress
import re

EMAIL_MASK, IP_MASK = "<EMAIL_ADDRESS>", "<IP_ADDRESS>"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = re.compile(
    rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{{0,63}}@(?:{_LABEL}\.){{1,8}}[A-Za-z]{{2,63}}(?![A-Za-z0-9-])"
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]{4}:)[0-9A-Fa-f]{4}(?:::?[0-9A-Fa-f]{1,4}){0,7}(?:::)?(?!\w|:\w)")
_IPV6_IN_USE = tuple(ipaddress.IPv6Network(range_) for range_ in ("2000::/3", "fc00::/7", "fe80::/10", "ff00::/8"))


def mask_emails(text: str) -> str:
    """Replaces e-mail addresses of ASCII letters: RFC 5322's unquoted form with a domain of at least two labels."""
    return _EMAIL.sub(EMAIL_MASK, text) if "@" in text else text


def mask_ip_addresses(text: str) -> str:
    """Replaces valid IPv4 and IPv6 addresses; a port or prefix length behind one stays."""
    text = _IPV4.sub(_mask_valid, text)
    return _IPV6.sub(_mask_valid, text) if ":" in text else text


def _mask_valid(match: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(match.group())
    except ValueError:
        return match.group()
    if address.is_loopback or address.is_unspecified:
        return match.group()
    if address.version == 6 and not any(address in range_ for range_ in _IPV6_IN_USE):
        return match.group()
    return IP_MASK
