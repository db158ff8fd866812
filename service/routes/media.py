"""Thumbnails and videos by signed URL; videos with byte ranges, so that a browser can seek."""

from __future__ import annotations

import re

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response, StreamingResponse

from service import catalog, keys
from service.blobs import BlobMissing, Blobs, thumbnail_key, video_key
from service.catalog import NotFound
from service.routes.access import InHouse, KeyFirst

router = APIRouter(route_class=KeyFirst, tags=["media"])
TYPES = {"matroska": "video/webm", "webm": "video/webm", "avi": "video/x-msvideo", "mpegts": "video/mp2t", "mpeg": "video/mpeg"}


@router.get("/media/{kind}/{media_id}")
def media(kind: str, media_id: str, exp: int, sig: str, request: Request, house: InHouse) -> Response:
    """A thumbnail or a video. The signature stands for the key: whoever has the URL may see it until it expires."""
    keys.check_signature(house.signing_secret, f"/media/{kind}/{media_id}", exp, sig)
    video_id, _, ordinal = media_id.partition("-")
    if kind not in ("thumbnail", "video"):
        raise NotFound("media", media_id)
    with house.runtime.database.read() as connection:
        video = catalog.signed_video(connection, video_id)
    if kind == "thumbnail":
        data = house.runtime.blobs.get(thumbnail_key(video.collection_id, video.id, int(ordinal)))
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})
    if (video.media or {}).get("stored") is False:
        raise BlobMissing("this video was imported without its file; an upload of the same file brings it back")
    container = str((video.media or {}).get("container", ""))
    kind_of = next((value for name, value in TYPES.items() if name in container), "video/mp4")
    return ranged(house.runtime.blobs, video_key(video.collection_id, video.id), kind_of, request.headers.get("range"))


def ranged(blobs: Blobs, key: str, media_type: str, header: str | None) -> Response:
    """The blob, or the part of it that a Range header asks for (one range; RFC 9110, section 14)."""
    size = blobs.size(key)
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    start, end, status = 0, size, 200
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if found and found.group(0) != "bytes=-":
        first, last = found.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= size or start >= end:
            raise HTTPException(416, f"the file has {size} bytes", {"Content-Range": f"bytes */{size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    return StreamingResponse(blobs.stream(key, start, end), status, headers, media_type)

