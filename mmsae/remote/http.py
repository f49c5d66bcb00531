"""Files from web servers: whole or not at all, of the version that was found, and from public addresses alone.

A server may redirect to another one, and a list of URLs may come from somebody else. So what an address leads to is
looked at when the connection is made: this machine and private networks are refused, unless
``MMSAE_PRIVATE_HOSTS=HOST,HOST`` names them.
"""

from __future__ import annotations

import http.client
import ipaddress
import netrc
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from mmsae.errors import InputError
from mmsae.remote.retry import MayPass
from mmsae.remote.urls import Remote, shown

TIMEOUT = 60.0
"""Seconds that a server may be silent."""
CHUNK = 1 << 20
ALLOWED = "MMSAE_PRIVATE_HOSTS"
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be others later."""


def find(url: str) -> Remote:
    """Size and version of a file, from an answer to a request for its first byte (some servers refuse HEAD).

    Raises:
        InputError: It is not there, or the server does not say how long it is.
        MayPass: The server or the network failed.
    """
    with _answer(url, {"Range": "bytes=0-0"}) as answer:
        headers = answer.headers
        length = headers.get("Content-Length")
        if answer.status == 206:
            length = headers.get("Content-Range", "").rpartition("/")[2]
        if not (length or "").isdigit():
            raise InputError(
                f"{shown(url)}: the server does not say how long it is, so a cut transfer would look whole"
            )
        return Remote(url, int(length), headers.get("ETag") or headers.get("Last-Modified") or "")


def download(remote: Remote, file: BinaryIO) -> None:
    """Write the file.

    Raises:
        InputError: It is not there any more, or has changed since it was found.
        MayPass: The server or the network failed, or the transfer was cut.
    """
    with _answer(remote.url, {}) as answer:
        length = answer.headers.get("Content-Length")
        now = Remote(
            remote.url,
            int(length) if length and length.isdigit() else remote.size,
            answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "",
        )
        refuse_changed(remote, now)
        got = 0
        try:
            while data := answer.read(CHUNK):
                got += len(data)
                file.write(data)
        except (http.client.HTTPException, TimeoutError, ConnectionError) as e:
            raise MayPass(f"the transfer was cut after {got} of {remote.size} bytes ({_said(e)})") from e
        if got != remote.size:
            raise MayPass(f"the transfer was cut after {got} of {remote.size} bytes")


def tail(remote: Remote, n: int) -> bytes | None:
    """The last ``n`` bytes, or None where the server gives no parts.

    Raises:
        InputError: The file is not there.
        MayPass: The server or the network failed.
    """
    with _answer(remote.url, {"Range": f"bytes={max(0, remote.size - n)}-{remote.size - 1}"}) as answer:
        if answer.status != 206:
            return None
        data = answer.read()
    if len(data) != min(n, remote.size):
        raise MayPass(f"{len(data)} of the last {n} bytes came")
    return data


def refuse_changed(then: Remote, now: Remote) -> None:
    """Refuse a file that is not the one that was found.

    Raises:
        InputError: Naming both sizes or both tags.
    """
    if then.size != now.size:
        raise InputError(f"{shown(then.url)} had {then.size} bytes when it was found and has {now.size} now")
    if then.tag != now.tag:
        raise InputError(
            f"{shown(then.url)} has changed since it was found: its ETag was {then.tag or 'none'} and is "
            f"{now.tag or 'none'}"
        )


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "mmsae", **headers})
    host = urlsplit(url).hostname or ""
    if credentials := _netrc(host):
        request.add_unredirected_header("Authorization", credentials)
    try:
        with _opener().open(request, timeout=TIMEOUT) as answer:
            yield answer
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416 and e.headers.get("Content-Range", "").endswith("/0"):
            raise InputError(f"{shown(url)} is empty") from e
        if e.code in PASSING:
            raise MayPass(f"the server answers {e.code} {e.reason}", _seconds(e.headers.get("Retry-After"))) from e
        if e.code in (401, 403, 407):
            raise InputError(
                f"{shown(url)}: the server answers {e.code} {e.reason}: it asks for credentials, or refuses those of "
                "~/.netrc"
            ) from e
        raise InputError(f"{shown(url)} cannot be read: the server answers {e.code} {e.reason}") from e
    except urllib.error.URLError as e:
        import ssl

        if isinstance(e.reason, ssl.SSLCertVerificationError):
            raise InputError(f"{shown(url)}: the certificate of the server is not valid: {e.reason}") from e
        raise MayPass(f"the server cannot be reached ({_said(e.reason)})") from e
    except (http.client.HTTPException, ConnectionError, TimeoutError) as e:
        raise MayPass(f"the connection failed ({_said(e)})") from e


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urljoin(req.full_url, headers.get("Location", ""))
        before, scheme = urlsplit(req.full_url).scheme, urlsplit(target).scheme
        if scheme not in ("http", "https") or (before, scheme) == ("https", "http"):
            raise InputError(
                f"{shown(req.full_url)} redirects to {shown(target)}: from {before} to {scheme} is refused"
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_checked(http.client.HTTPConnection, req), req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_checked(http.client.HTTPSConnection, req), req, context=self._context)


def _checked(kind: type[http.client.HTTPConnection], request: Any) -> type[http.client.HTTPConnection]:
    """A connection that looks at the address before anything is sent; a proxy stands between, so then at the name."""
    url, by_proxy = request.full_url, request.has_proxy() or bool(getattr(request, "_tunnel_host", None))
    host = urlsplit(url).hostname or ""

    class Checked(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._create_connection = _connect

    def _connect(address: tuple[str, int], *args: Any) -> socket.socket:
        if by_proxy:
            _refuse_private(host, host, url)
        made = socket.create_connection(address, *args)
        try:
            if not by_proxy:
                _refuse_private(made.getpeername()[0], host, url)
        except BaseException:
            made.close()
            raise
        return made

    return Checked


def _refuse_private(address: str, host: str, url: str) -> None:
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:  # a name, which the proxy looks up
        ip = None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    private = address == "localhost" if ip is None else not ip.is_global
    allowed = {h.strip() for h in os.environ.get(ALLOWED, "").split(",")}
    if private and not {host, str(ip)} & allowed:
        raise InputError(
            f"{shown(url)} leads to {address}, an address of this machine or of a private network: it is refused, "
            f"unless {ALLOWED}={host} allows it"
        )


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # no file:, no ftp:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
        _Http(),
        _Https(),
    ):
        opener.add_handler(handler)
    return opener


def _netrc(host: str) -> str:
    """Basic authorisation from ~/.netrc (or the file that NETRC names), which is sent to that host alone."""
    import base64

    with suppress(OSError, netrc.NetrcParseError):
        if found := netrc.netrc(os.environ.get("NETRC") or None).authenticators(host):
            user, _, password = found
            return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return ""


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdigit() else 0.0


def _said(error: object) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
