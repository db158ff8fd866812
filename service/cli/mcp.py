"""`polyclip mcp`: tools for a language model, over stdio, that ask a running service with a key's rights."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlsplit

import typer

from service.errors import PolyclipError

if TYPE_CHECKING:
    import httpx
    from mcp.server import MCPServer

SECONDS = 60.0  # for an answer
PAGE = 50
INSTRUCTIONS = """Finds moments in collections of videos by what they show. Ask list_collections for the names, then search;
look_at_video shows a video's facts, captions and a picture of it."""


class McpMissing(PolyclipError):
    """The package `mcp` is not installed."""

    code, hint = "mcp_missing", "pip install 'polyclip[mcp]'"


class KeyNeeded(PolyclipError):
    """A command that asks a service was given no key."""

    code, hint = "key_needed", "give --key, or set POLYCLIP_KEY"


def serve(
    url: Annotated[str | None, typer.Option(help="the service (POLYCLIP_URL; default http://127.0.0.1:8000)")] = None,
    key: Annotated[str | None, typer.Option(help="a key of it, role search or more (POLYCLIP_KEY)")] = None,
) -> None:
    """Tools for language models over stdio (MCP): search, list_collections, look_at_video in a running service."""
    import httpx

    key = key or os.environ.get("POLYCLIP_KEY")
    if not key:
        raise KeyNeeded("no key was given: --key, or POLYCLIP_KEY, which other users of the machine do not see")
    url = url or os.environ.get("POLYCLIP_URL") or "http://127.0.0.1:8000"
    if urlsplit(url).scheme not in ("http", "https"):
        raise typer.BadParameter("--url is an http or https URL")
    server(httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=SECONDS)).run("stdio")


def server(http: httpx.AsyncClient) -> MCPServer:
    """The tools, which ask the service through this client. Raises McpMissing."""
    try:
        from mcp.server import MCPServer
        from mcp.server.mcpserver import Image
        from mcp.types import ToolAnnotations
    except ImportError as error:
        raise McpMissing("the package mcp is not installed: pip install 'polyclip[mcp]'") from error
    made = MCPServer("polyclip", instructions=INSTRUCTIONS, version=version("polyclip"), log_level="WARNING")
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)

    @made.tool(annotations=reads)
    async def search(
        collection: str, text: str, limit: int = 10, group_by: str = "video", filter: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Finds what the text says in a collection's videos, best first; `start` and `end` in seconds.

        `group_by`: "video" gives each video once, "segment" each part of it that was found. `limit`: 1 to 50 hits. `filter`
        compares metadata: {"duration": {"gte": 5}, "metadata.camera": "north"}.
        """
        body = {"collection": collection, "text": text, "page_limit": limit, "group_by": group_by, "filter": filter}
        found = await _ask(http, "POST", "/search", json=body)
        return {name: found[name] for name in ("data", "search_pool", "warnings")}

    @made.tool(annotations=reads)
    async def list_collections() -> dict[str, Any]:
        """The collections that can be searched, with how many videos each has and what they are about."""
        rows: list[Any] = []
        page: dict[str, Any] = {"page_limit": PAGE}
        while True:
            found = await _ask(http, "GET", "/collections", params=page)
            rows += found["data"]
            if (token := found["page_info"]["next_page_token"]) is None:
                names = ("name", "videos", "settings", "active_adapter", "created_at")
                return {"collections": [{name: row[name] for name in names} for row in rows]}
            page["page_token"] = token

    @made.tool(annotations=reads, structured_output=False)
    async def look_at_video(collection: str, video_id: str) -> list[Any]:
        """A video's status, facts, metadata and captions, and a picture of it where there is one."""
        path = f"/collections/{quote(collection, safe='')}/videos/{quote(video_id, safe='')}"
        video = await _ask(http, "GET", path)
        shown: list[Any] = [video]
        if video["thumbnail_url"] is not None:
            parts = urlsplit(video["thumbnail_url"])  # of this service, whatever it calls itself
            picture = await _answer(http, "GET", f"{parts.path}?{parts.query}")
            if picture.status_code == 200:
                shown.append(Image(data=picture.content, format="jpeg"))
        return shown

    return made


async def _ask(http: httpx.AsyncClient, method: str, path: str, **request: Any) -> Any:
    """What the service answers, as JSON; its problems become errors of the tool, with code and detail."""
    from mcp.server.mcpserver.exceptions import ToolError

    answer = await _answer(http, method, path, **request)
    try:
        body = answer.json()
        if answer.status_code < 400:
            return body
        told = f"{body['code']}: {body['detail']}"
    except (ValueError, KeyError, TypeError):
        told = f"{http.base_url} does not answer as polyclip does (status {answer.status_code})"
    raise ToolError(told)


async def _answer(http: httpx.AsyncClient, method: str, path: str, **request: Any) -> httpx.Response:
    import httpx
    from mcp.server.mcpserver.exceptions import ToolError

    try:
        return await http.request(method, path, **request)
    except httpx.HTTPError as error:
        raise ToolError(f"the service at {http.base_url} does not answer: {type(error).__name__}") from error
