"""Requests to the egress proxy, as HTTP/1.1 writes them: read strictly, written anew."""

from __future__ import annotations

import re

REQUEST = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/1\.[01]")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*)")
AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?")
NOT_FORWARDED = {"connection", "proxy-connection", "proxy-authorization", "keep-alive", "te", "upgrade", "host"}

Fields = list[tuple[str, str]]


class Answered(Exception):
    """The client gets this status and sentence instead of a connection."""

    def __init__(self, status: int, sentence: str, verdict: str = "denied") -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.verdict = status, f"Sandgate: {sentence}", verdict


def read(head: bytes) -> tuple[str, str, Fields]:
    """Method, target and fields of a head. Answered(400) for what is none."""
    line, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    request, found = REQUEST.fullmatch(line), [FIELD.fullmatch(each) for each in lines]
    if request is None or None in found:
        raise Answered(400, "that is not a request of HTTP/1.1.")
    fields = [(field[1].decode("latin-1"), field[2].decode("latin-1")) for field in found if field]
    return request[1].decode(), request[2].decode(), fields


def destination(method: str, asked: str) -> tuple[str, int, str] | None:
    """(host, port, path) of what is asked for; None for everything odd, user names among it."""
    if method == "CONNECT":
        authority, path, otherwise = asked, "", 0
    elif asked[:7].lower() == "http://":
        authority, slash, path = re.match(r"([^/?#]*)(/?)(.*)", asked[7:], re.DOTALL).groups()  # type: ignore[union-attr]
        path, otherwise = slash + path if slash else "/" + path, 80
    else:
        return None
    found = AUTHORITY.fullmatch(authority)
    if found is None or "#" in path:
        return None
    port = int(found[3] or otherwise)
    return (found[1] or found[2], port, path) if 1 <= port <= 65535 else None


def rewritten(method: str, host: str, port: int, path: str, fields: Fields) -> tuple[bytes, int | None]:
    """The head as the server gets it, and how many bytes of a body may follow (None: chunked). One request, one connection."""
    names = {name.lower() for name, _ in fields}
    lengths = {value.strip() for name, value in fields if name.lower() == "content-length"}
    if (
        len(lengths) > 1
        or (lengths and "transfer-encoding" in names)
        or not all(re.fullmatch("[0-9]{1,18}", n) for n in lengths)
    ):
        raise Answered(400, "the length of the request's body is not clear.")
    dropped = NOT_FORWARDED | {
        each.strip().lower() for name, value in fields if name.lower() == "connection" for each in value.split(",")
    }
    authority = (f"[{host}]" if ":" in host else host) + ("" if port == 80 else f":{port}")
    lines = [f"{method} {path} HTTP/1.1", f"Host: {authority}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in fields if name.lower() not in dropped]
    length = None if "transfer-encoding" in names else int(next(iter(lengths), "0"))
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), length


def answer(status: int, sentence: str) -> bytes:
    """The sentence stands in the reason, which is all that most clients show of a refused CONNECT, and in the body."""
    said = sentence.encode("ascii", "backslashreplace")
    head = b"HTTP/1.1 %d %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    return head % (status, said, len(said) + 1) + said + b"\n"
