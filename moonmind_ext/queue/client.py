"""The calls of the queue's REST API that people make; workers have a client of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from moonmind_ext.queue.rules import Row

REQUEST_SECONDS = 10
"""For each step of a call. A queue answers in milliseconds, and people wait for it."""

EVENTS_AT_ONCE = 200
"""MoonMind's default. Events with live output may be large."""

_SERVER_ERROR = 500


class UnreachableError(Exception):
    """A server that does not answer, or that says it cannot; it may in a moment."""


class RefusedError(Exception):
    """A call that the server understood and refused.

    Attributes
    ----------
    code
        MoonMind's word for the reason; None where the server does not know the call.
    """

    def __init__(self, code: str | None, message: str) -> None:
        super().__init__(message)
        self.code = code


class QueueClient:
    """Asks one server."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def submit(self, kind: str, payload: Row, *, priority: int, max_attempts: int) -> Row:
        """Put a job in the queue."""
        body = {
            "type": kind,
            "payload": payload,
            "priority": priority,
            "maxAttempts": max_attempts,
        }
        return self._call("POST", "", "id", json=body)

    def job(self, job_id: str) -> Row:
        """Give a job."""
        return self._call("GET", f"/{_part(job_id)}", "id")

    def artifacts(self, job_id: str) -> list[Row]:
        """Give the rows of a job's artifacts, the newest first."""
        items: list[Row] = self._call("GET", f"/{_part(job_id)}/artifacts", "items")["items"]
        return items

    def events(self, job_id: str, after: str | None = None) -> Iterator[Row]:
        """Give a job's events, the oldest first.

        Parameters
        ----------
        after
            The `createdAt` of the last one that is known.
        """
        while True:
            query = {"limit": EVENTS_AT_ONCE} | ({"after": after} if after else {})
            path = f"/{_part(job_id)}/events"
            items: list[Row] = self._call("GET", path, "items", params=query)["items"]
            yield from items
            if len(items) < EVENTS_AT_ONCE:
                return
            after = items[-1]["createdAt"]

    def cancel(self, job_id: str, reason: str | None) -> Row:
        """Cancel a job that waits, or ask its worker to."""
        return self._call("POST", f"/{_part(job_id)}/cancel", "id", json={"reason": reason})

    def _call(self, method: str, path: str, needs: str, **given: Any) -> Row:
        """Make a call whose answer must have a certain key, or it is none of a queue."""
        try:
            response = self._http.request(method, f"/api/queue/jobs{path}", **given)
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UnreachableError(str(error) or type(error).__name__) from None
        except ValueError:
            answer = None
        if response.is_success and isinstance(answer, dict) and needs in answer:
            return answer
        if response.status_code >= _SERVER_ERROR or response.is_success:
            raise UnreachableError(f"it answers {response.status_code}: {response.text[:200]}")
        detail = answer.get("detail") if isinstance(answer, dict) else None
        if isinstance(detail, dict) and "code" in detail:
            raise RefusedError(detail["code"], str(detail.get("message")))
        raise RefusedError(None, f"the server answers {response.status_code} to {method} {path}")


@contextmanager
def open_client(url: str) -> Iterator[QueueClient]:
    """Make a client of the server at a base URL.

    Raises
    ------
    UnreachableError
        When that is no URL; later when the server does not answer.
    """
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UnreachableError(str(error)) from None
    with httpx.Client(base_url=url, timeout=REQUEST_SECONDS) as http:
        yield QueueClient(http)


def _part(job_id: str) -> str:
    """Make it one part of a path, whatever was typed."""
    return quote(job_id, safe="")
