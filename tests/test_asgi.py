"""The small server: what its owner's failure may not leave behind."""

import httpx
import pytest

from moonmind_ext import asgi


async def app(scope: object, receive: object, send: "object") -> None:
    assert callable(send)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def answers(port: int) -> bool:
    async with httpx.AsyncClient(timeout=10) as http:
        return (await http.get(f"http://127.0.0.1:{port}/")).status_code == 204


async def test_servers_answer_after_one_whose_owner_failed() -> None:
    for _ in range(3):
        with pytest.raises(OSError, match="no space"):
            async with asgi.serve(app):
                raise OSError("no space")
        # Listeners get the numbers of those that were closed.
        async with asgi.serve(app) as port:
            assert await answers(port)
