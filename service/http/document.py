"""What /openapi.json says beyond the models: names of operations, files in and out, media types of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service.http.examples import EXAMPLES

BINARY = {"type": "string", "format": "binary"}


def form(file: str, part: str = "file", **texts: str) -> dict[str, Any]:
    """`openapi_extra` of a route that takes multipart/form-data: a file and parts of text, each with its description."""
    parts = {part: {**BINARY, "description": file}}
    parts |= {name: {"type": "string", "description": text} for name, text in texts.items()}
    schema = {"type": "object", "required": [part], "properties": parts}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def download(*media_types: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with bytes."""
    return {status: {"content": {media_type: {"schema": BINARY} for media_type in media_types}}}


def operation_id(route: APIRoute) -> str:
    return route.name


def install(app: FastAPI) -> None:
    """Adds the examples (FastAPI would leave out what is null in them), and gives errors the media type that they have."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        for name, schema in document["components"]["schemas"].items():
            if name in EXAMPLES:
                schema["examples"] = [EXAMPLES[name]]
        for methods in document["paths"].values():
            for operation in methods.values():
                for answer in operation["responses"].values():
                    content = answer.get("content", {})
                    if "application/problem+json" in content and "application/json" in content:
                        content["application/problem+json"] = content.pop("application/json")
        return document

    app.openapi = openapi  # type: ignore[method-assign]
