"""`polyclip mcp`: a language model's tools, with a key's rights; client, server and service are all in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from mcp import Client
from serving import Tenant, new_tenant
from typer.testing import CliRunner
from workshop import Workshop

from service.cli import mcp
from service.cli.main import app


def use(guest: Tenant, *calls: tuple[str, Mapping[str, Any]], role: str = "search", transport: Any = None) -> list[Any]:
    """The results of these calls of tools."""

    async def run() -> list[Any]:
        headers = {"Authorization": f"Bearer {guest.keys[role]}"}
        service = transport or httpx.ASGITransport(guest.client.app)
        async with (
            httpx.AsyncClient(transport=service, base_url="http://service", headers=headers) as http,
            Client(mcp.server(http)) as client,
        ):
            tools = {tool.name for tool in (await client.list_tools()).tools}
            assert tools == {"search", "list_collections", "look_at_video"}
            return [await client.call_tool(name, dict(arguments)) for name, arguments in calls]

    return asyncio.run(run())


def test_the_tools_ask_the_service_with_the_key_s_rights(guest: Tenant, workshop: Workshop, client: Any) -> None:
    films, (video,) = workshop.filled([1], ["a red ball"])
    for _ in range(mcp.PAGE):
        guest.collection()
    listed, found, looked = use(
        guest,
        ("list_collections", {}),
        ("search", {"collection": films, "text": "a ball", "limit": 1}),
        ("look_at_video", {"collection": films, "video_id": video}),
    )
    rows = listed.structured_content["collections"]
    assert len(rows) == mcp.PAGE + 1 and rows[-1]["name"] == films and rows[-1]["videos"]["ready"] == 1
    (hit,) = found.structured_content["data"]
    assert (hit["video_id"], hit["rank"], hit["filename"]) == (video, 1, "clip.mp4")
    facts, picture = looked.content
    assert [c["text"] for c in json.loads(facts.text)["captions"]] == ["a red ball"]
    assert (picture.type, picture.mime_type) == ("image", "image/jpeg") and len(picture.data) > 100

    other = new_tenant(client)
    hidden = use(
        other,
        ("list_collections", {}),
        ("search", {"collection": films, "text": "a ball"}),
        ("look_at_video", {"collection": films, "video_id": video}),
        ("look_at_video", {"collection": "../admin/tenants", "video_id": "?x"}),
        ("search", {"collection": films, "text": "a ball", "limit": 51}),
    )
    assert hidden[0].structured_content == {"collections": []}
    told = [result.content[0].text for result in hidden[1:]]
    assert all(result.is_error for result in hidden[1:])
    assert all(
        code in text for code, text in zip(("collection_not_found",) * 2 + ("not_found", "page_limit"), told, strict=True)
    )


def test_a_service_that_does_not_answer_is_told_to_the_model(guest: Tenant) -> None:
    def lost(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/search":
            raise httpx.ConnectError("refused")
        return httpx.Response(502, text="<html>")

    away, other = use(
        guest, ("search", {"collection": "a", "text": "b"}), ("list_collections", {}), transport=httpx.MockTransport(lost)
    )
    assert away.is_error and "does not answer" in away.content[0].text
    assert other.is_error and "502" in other.content[0].text


def test_the_command_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYCLIP_KEY", raising=False)
    assert isinstance(CliRunner().invoke(app, ["mcp"]).exception, mcp.KeyNeeded)
    assert CliRunner().invoke(app, ["mcp", "--key", "pc_a_b", "--url", "ftp://x"]).exit_code == 2
