"""What a sandbox may reach: the rules as operators type them, and what they permit. The node reads it too: no Django here.

    example.org        this host, on ports 80 and 443
    *.example.org      every host below it, at any depth, and not itself
    example.org:8443   on this port only; the same behind every other form
    10.1.2.0/24        these addresses; also 127.0.0.1:5432, ::1, [2001:db8::/64]:443
    *                  every public address, under any name

A name is reached at public addresses only, unless a rule names the address too: a name alone never opens the way to what
is private, link-local or on this machine. No rules at all permit nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PORTS = (80, 443)
MOST_RULES = 100
LABEL = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # what inet_aton takes for an address, and readers do not
BRACKETED = re.compile(r"\[([^\[\]]+)\](?::([0-9]{1,5}))?")

# Everything that is not the public internet: the IANA registries of special-purpose addresses, November 2026.
NOT_PUBLIC_4 = [
    ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
]  # fmt: skip
PUBLIC_6 = IPv6Network("2000::/3")  # so neither mapped IPv4 (::ffff:0:0/96) nor NAT64 (64:ff9b::/96) is
NOT_PUBLIC_6 = [
    ip_network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]


def normalised(texts: list[str]) -> list[str]:
    """A list of rules, each in its one form and once. ValueError at the first that is none."""
    if not isinstance(texts, list) or len(texts) > MOST_RULES:
        raise ValueError(f"Network rules are a list of at most {MOST_RULES}.")
    return list(dict.fromkeys(str(parse(text)) for text in texts))


def cidrs(texts: list[str]) -> list[str]:
    """Networks and addresses of callers, such as 10.0.0.0/8, each in its one form and once. ValueError at the first that is none."""
    if not isinstance(texts, list) or len(texts) > MOST_RULES:
        raise ValueError(f"Networks are a list of at most {MOST_RULES}.")
    return list(dict.fromkeys(str(ip_network(str(text).strip(), strict=False)) for text in texts))


def lies_in(address: str | None, networks: Iterable[str]) -> bool:
    """Whether an address is in one of these; one that is not known is in none."""
    try:
        found = ip_address(address or "")
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    return any(found in ip_network(network) for network in networks)


def within(inner: list[str], outer: list[str]) -> bool:
    """Whether each of these networks lies in one of those; no networks at all are every address."""
    wide = [ip_network(text) for text in outer]
    return bool(inner) and all(
        any(one.version == there.version and one.subnet_of(there) for there in wide)  # type: ignore[arg-type]
        for one in map(ip_network, inner)
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that may be reached: `name` ("*" is any, "*.example.org" all below) or `network`, on `ports`."""

    name: str = ""
    network: Network | None = None
    ports: tuple[int, ...] = PORTS

    def __str__(self) -> str:
        port = "" if self.ports == PORTS else f":{self.ports[0]}"
        if self.network is None:
            return self.name + port
        alone = self.network.prefixlen == self.network.max_prefixlen
        said = str(self.network.network_address) if alone else str(self.network)
        return f"[{said}]{port}" if port and self.network.version == 6 else said + port

    def holds(self, other: Rule, port: int) -> bool:
        """Whether all that `other` names on this port is named by this rule."""
        if port not in self.ports:
            return False
        if other.network is not None:
            return (self.name == "*" and is_public(other.network)) or _within(other.network, self.network)
        if self.name.startswith("*."):
            return other.name.removeprefix("*").endswith(self.name[1:])
        return self.name in ("*", other.name) and bool(self.name)


class Rules:
    """A list of rules. Raises ValueError, with a sentence, at the first that is none."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.rules = [parse(text) for text in texts]

    def __bool__(self) -> bool:
        return bool(self.rules)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rules[:8]))
        return shown + (f" and {len(self.rules) - 8} more" if len(self.rules) > 8 else "")

    def cover(self, asked: Rule) -> bool:
        """Whether they permit all that this rule would."""
        return all(any(rule.holds(asked, port) for rule in self.rules) for port in asked.ports)

    def permit(self, target: str | Address, port: int) -> bool:
        """Whether the code may ask for this host. A name that it may not ask for is not even resolved."""
        asked = Rule(target) if isinstance(target, str) else Rule(network=ip_network(target))
        return any(rule.holds(asked, port) for rule in self.rules)

    def name_address(self, address: Address, port: int) -> bool:
        """Whether a rule names this very address, which then need not be public."""
        return any(port in rule.ports and _within(ip_network(address), rule.network) for rule in self.rules)


def _within(inner: Network, outer: Network | None) -> bool:
    return outer is not None and inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def is_public(addresses: Address | Network) -> bool:
    """Whether all of them are addresses of the public internet."""
    network = ip_network(addresses)
    if isinstance(network, IPv4Network):
        return not any(network.overlaps(other) for other in NOT_PUBLIC_4)
    return network.subnet_of(PUBLIC_6) and not any(network.overlaps(other) for other in NOT_PUBLIC_6)


def parse(text: str) -> Rule:
    """One rule as it was typed. ValueError with a sentence for what is none."""
    if not isinstance(text, str) or not text or len(text) > 300:
        raise ValueError("A rule of the network is a host or an address, such as example.org or 10.1.2.0/24.")
    shown = ascii(text[:80])[1:-1]
    if any(c.isspace() or not c.isprintable() for c in text):
        raise ValueError(f"{shown}: there is a space or a control character in it.")
    if "://" in text or "@" in text or set(text) & set("?#\\%,;'\"<>{}|^`"):
        raise ValueError(f"{shown}: only a host and a port, no address of a page and no user name: example.org:443.")
    host, ports = _split(text, shown)
    if "/" in host or _is_address(host):
        return Rule(network=_network(host, shown), ports=ports)
    if host == "*":
        return Rule("*", ports=ports)
    wild = host.startswith("*.")
    try:
        return Rule(("*." if wild else "") + host_name(host[2:] if wild else host), ports=ports)
    except ValueError as problem:
        raise ValueError(f"{shown}: {problem}") from None


def _split(text: str, shown: str) -> tuple[str, tuple[int, ...]]:
    if found := BRACKETED.fullmatch(text):
        host, port = found[1], found[2] or ""
    elif text.count(":") > 1:
        return text, PORTS
    else:
        host, colon, port = text.partition(":")
        if colon and not port:
            raise ValueError(f"{shown}: the port is missing behind the colon.")
    if not port:
        return host, PORTS
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"{shown}: a port is a number between 1 and 65535.")
    return host, (int(port),)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _network(host: str, shown: str) -> Network:
    try:
        network = ip_network(host)
    except ValueError as problem:
        said = "its last bits are not zero" if "host bits" in str(problem) else "that is no range of addresses"
        raise ValueError(f"{shown}: {said}; one is written as 10.1.2.0/24.") from None
    if network.prefixlen == 0:
        raise ValueError(f"{shown}: this would name every address, private ones too. Write * for all public ones.")
    return network


def host_name(text: str) -> str:
    """A host's name as it goes over the wire: ASCII, lowercase, without the last dot. ValueError for what is none."""
    if not text.isascii():
        text = _to_ascii(text)
    name = text.lower().removesuffix(".")
    if len(name) > 253 or not all(LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError("that is not the name of a host.")
    if NUMBER.fullmatch(name.rpartition(".")[2]):
        raise ValueError("it ends like an address, and is none.")
    return name


def _to_ascii(text: str) -> str:
    """By IDNA 2008: look-alikes of other scripts become the xn--… that they are, and are seen as such."""
    import idna

    try:
        return idna.encode(text, uts46=True, std3_rules=True).decode()
    except (idna.IDNAError, UnicodeError):
        raise ValueError("that is not the name of a host in any script.") from None


def target(host: str) -> str | Address:
    """What a client asks for: an address or a name, each read once. ValueError for everything that is neither."""
    if "%" not in host and _is_address(host):
        return ip_address(host)
    if not host.isascii():
        raise ValueError("that is not the name of a host.")
    return host_name(host)
