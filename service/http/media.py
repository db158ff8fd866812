"""Thumbnails and videos by signed URL; videos with byte ranges, so that a browser can seek."""

from __future__ import annotations

import re

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response, StreamingResponse

from service.http import document
from service.http.auth import PROBLEMS, InServices, KeyFirst
from service.storage import keys
from service.storage.blobs import BlobMissing, thumbnail_key, video_key
from service.storage.rows import NotFound
from service.videos import video_rows

router = APIRouter(route_class=KeyFirst, tags=["media"], responses=PROBLEMS)
TYPES = {  # by a name of the container, as FFmpeg calls it
    "matroska": "video/x-matroska",
    "avi": "video/x-msvideo",
    "mpegts": "video/mp2t",
    "mpeg": "video/mpeg",
    "mpegvideo": "video/mpeg",
    "flv": "video/x-flv",
    "asf": "video/x-ms-asf",
    "ogg": "video/ogg",
    "gif": "image/gif",
    "mxf": "application/mxf",
    "rm": "application/vnd.rn-realmedia",
    "h264": "video/h264",
    "hevc": "video/h265",
    "dv": "video/dv",
}
HEAD_BYTES = 64
_FILES = document.download("image/jpeg", "video/mp4", "application/octet-stream")
_FILES |= document.download("video/mp4", "application/octet-stream", status=206)


@router.get("/media/{kind}/{media_id}", name="get_media", response_class=Response, responses=_FILES)
def media(kind: str, media_id: str, exp: int, sig: str, request: Request, services: InServices) -> Response:
    """A thumbnail or a video. The signature stands for the key: whoever has the URL may see it until it expires."""
    keys.check_signature(services.signing_secret, f"/media/{kind}/{media_id}", exp, sig)
    video_id, _, ordinal = media_id.partition("-")
    if kind not in ("thumbnail", "video"):
        raise NotFound("media", media_id)
    with services.storage.database.read() as connection:
        video = video_rows.signed_video(connection, video_id)
    private = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    if kind == "thumbnail":
        data = services.storage.blobs.get(thumbnail_key(video.collection_id, video.id, int(ordinal)))
        return Response(data, media_type="image/jpeg", headers=private)
    if (video.media or {}).get("stored") is False:
        raise BlobMissing("this video was imported without its file; an upload of the same file brings it back")
    key, etag = video_key(video.collection_id, video.id), f'"{video.sha256}"'
    size = services.storage.blobs.size(key)
    headers = {**private, "Accept-Ranges": "bytes", "ETag": etag}
    wanted = request.headers.get("range") if request.headers.get("if-range", etag) == etag else None
    part = asked_range(wanted, size)
    start, end = part or (0, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    beginning = b"".join(services.storage.blobs.stream(key, 0, min(size, HEAD_BYTES)))
    type_ = media_type(str((video.media or {}).get("container", "")), beginning)
    return StreamingResponse(services.storage.blobs.stream(key, start, end), 206 if part else 200, headers, type_)


def media_type(container: str, head: bytes) -> str:
    """The media type of a file with these first bytes; `container` is what the decoder called it, empty before it looked."""
    names = container.split(",")
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "video/quicktime" if brand == b"qt  " else "video/3gpp" if brand.startswith(b"3g") else "video/mp4"
    if "mov" in names:  # without a brand, as QuickTime wrote it before there was MP4
        return "video/quicktime"
    if b"webm" in head and head.startswith(b"\x1aE\xdf\xa3"):
        return "video/webm"
    return next((TYPES[name] for name in names if name in TYPES), "application/octet-stream")


def asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, byte after the last) that a Range header asks for; None for the whole file.

    Several ranges, other units and what cannot be read are answered with the whole (RFC 9110, section 14.2). Raises a 416
    where no range can be had.
    """
    found = re.fullmatch(r"bytes=(.*)", header or "", re.IGNORECASE)
    specs = [re.fullmatch("([0-9]*)-([0-9]*)", spec.strip(" \t")) for spec in found.group(1).split(",")] if found else []
    if not specs or any(spec is None or spec.group(0) == "-" for spec in specs):
        return None
    parts = []
    for first, last in (spec.groups() for spec in specs if spec is not None):
        start = _number(first) if first else max(0, size - _number(last))
        end = min(size, _number(last) + 1) if first and last else size
        if start < end:
            parts.append((start, end))
    if not parts:
        raise HTTPException(416, f"the file has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return parts[0] if len(specs) == 1 else None


def _number(digits: str) -> int:
    """As large as it matters: `int` refuses thousands of digits."""
    return int(digits.lstrip("0")[:18] or 0)
