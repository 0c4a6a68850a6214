"""What the errors of network clients mean: fsspec, aiohttp, botocore and others each have their own."""

import email.utils
import time
from collections.abc import Iterator
from typing import Literal

from ftk.errors import FtkError

Kind = Literal["missing", "denied", "refused", "transient", "unknown"]

NO_CONNECTION = ("ClientConnector", "ConnectionTimeoutError", "EndpointConnectionError")
"""In the names of errors that say that a host has no address, or does not take connections."""
_RETRIED_STATUSES = frozenset({408, 409, 412, 416, 425, 429})


def what(error: BaseException) -> str:
    """The status, or the error in a line; it may hold a URL with its secrets."""
    status = http_status(error)
    error = _cause(error)
    if type(error).__name__ == "TooManyRedirects":
        return "its redirects never end"
    if isinstance(error, TimeoutError) and not str(error):
        return "TimeoutError: no whole answer in time"
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"HTTP {status}" if status else first_line.rstrip(": ")


def http_status(error: BaseException | None) -> int | None:
    """The status that a client library's error, or its cause, speaks of."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(each, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int) and status:
            return status
    return None


def _cause(error: BaseException) -> BaseException:
    """fsspec says FileNotFoundError of whatever made its HEAD fail: the cause tells."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def kind(error: BaseException) -> Kind:
    """What to do: `missing` and `refused` files are not there for us, `denied` ones may be with credentials, and what is
    `transient` may help to try again. `unknown` is not the network's.
    """
    error = _cause(error)
    if isinstance(error, (FtkError, IsADirectoryError)):
        return "unknown"
    status = http_status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing"
    if isinstance(error, PermissionError) or status in (401, 403, 407) or "Credential" in type(error).__name__:
        return "denied"
    if isinstance(error, ValueError) or type(error).__name__ == "TooManyRedirects" or "Validation" in type(error).__name__:
        return "refused"
    if status and status < 500 and status not in _RETRIED_STATUSES:
        return "refused"
    # Each client library has errors of its own, and another tomorrow: what Python itself does not raise is the network's.
    of_library = type(error).__module__ != "builtins"
    return "transient" if status or of_library or isinstance(error, (OSError, EOFError)) else "unknown"


def asked_wait(error: BaseException | None) -> float:
    """Seconds that a server asks to wait in `Retry-After`, which is a number or a date; 0 where it does not."""
    value = next((text for each in _causes(error) if (text := _header(each, "Retry-After"))), "")
    if value.strip().isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, date.timestamp() - time.time())


def _header(error: BaseException, name: str) -> str:
    """A header of the answer that a client library's error speaks of."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return str(headers.get(name.lower(), ""))
    headers = getattr(error, "headers", None) or getattr(response, "headers", None) or {}
    return str(headers.get(name, ""))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
