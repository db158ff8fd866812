"""The containers that are read: one list for the decoder, for the first look at an upload and for the endings of files.

Only containers that hold their own frames. Playlists (hls, concat, dash) are left out: they name other files to read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 4096  # of a file, that `looks_like_video` wants to see


@dataclass(frozen=True, slots=True)
class Format:
    """`demuxers` are FFmpeg's names; `head` (a pattern) is found in the first HEAD_BYTES of every such file."""

    name: str
    demuxers: str
    endings: str
    head: bytes


FORMATS = (
    Format(
        "MP4, QuickTime, 3GP",
        "mov,mp4,m4v",
        ".mp4 .m4v .mov .3gp .3g2 .ismv",
        rb"\A....(?:ftyp|styp|moov|moof|mdat|free|skip|wide|junk|pnot|uuid|udta|sidx|ssix|prfl|emsg|prft|PICT|pict|ediw)",
    ),
    Format("Matroska, WebM", "matroska,webm", ".mkv .webm", rb"\A\x1a\x45\xdf\xa3"),
    Format("AVI", "avi", ".avi .divx", rb"\A(?:RIFF....AVI[ X\x19]|ON2 ....ON2f)"),
    Format(  # 188 bytes a packet, 192 with a time (M2TS), 204 with error correction; the first may be cut
        "MPEG transport stream",
        "mpegts",
        ".ts .m2ts .mts",
        rb"\A(?:.{0,187}?\x47(?:.{187}\x47){3}|.{0,191}?\x47(?:.{191}\x47){3}|.{0,203}?\x47(?:.{203}\x47){3})",
    ),
    Format("MPEG program stream", "mpeg", ".mpg .mpeg .vob .dat", rb"\x00\x00\x01[\xba\xbb]"),
    Format("MPEG-1 and MPEG-2 video", "mpegvideo", ".m1v .m2v", rb"\x00\x00\x01\xb3"),
    Format("MPEG-4 Visual", "m4v", ".cmp", rb"\x00\x00\x01(?:[\xb0\xb5\xb6]|[\x00-\x1f]\x00\x00\x01[\x20-\x2f])"),
    Format("H.264", "h264", ".h264 .264 .avc", rb"\A\x00{2,8}\x01|\x00\x00\x01[\x27\x47\x67]"),
    Format("HEVC", "hevc", ".hevc .265 .h265", rb"\A\x00{2,8}\x01|\x00\x00\x01[\x40\x42]\x01"),
    Format("Flash video", "flv", ".flv .f4v", rb"\AFLV"),
    Format("Windows Media", "asf", ".wmv .asf", rb"\A\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    Format("Ogg", "ogg", ".ogv .ogg", rb"\AOggS"),
    Format("GIF", "gif", ".gif", rb"\AGIF8[79]a"),
    Format("IVF", "ivf", ".ivf", rb"\ADKIF"),
    Format("MXF", "mxf", ".mxf", rb"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02"),
    Format("DV", "dv", ".dv .dif", rb"\x1f\x07\x00[\x3f\xbf]"),
    Format("RealMedia", "rm", ".rm .rmvb", rb"\A\.RMF"),
    Format("Windows recorded TV", "wtv", ".wtv", rb"\A\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d"),
    Format("NUT", "nut", ".nut", rb"\Anut/multimedia container\x00"),
    Format("YUV4MPEG2", "yuv4mpegpipe", ".y4m", rb"\AYUV4MPEG2 "),
)
DEMUXERS = ",".join(dict.fromkeys(name for each in FORMATS for name in each.demuxers.split(",")))
VIDEO_SUFFIXES = frozenset(ending for each in FORMATS for ending in each.endings.split())
_HEAD = re.compile(b"|".join(b"(?:%b)" % each.head for each in FORMATS), re.DOTALL)


def looks_like_video(head: bytes) -> bool:
    """Whether `head`, the first HEAD_BYTES of a file (fewer of a shorter one), is that of a container in the list."""
    return _HEAD.search(head) is not None


def as_markdown() -> str:
    """The table of docs/formats.md."""
    rows = [f"| {each.name} | {', '.join(f'`{ending}`' for ending in each.endings.split())} |" for each in FORMATS]
    return "\n".join(["| container | usual endings |", "| --- | --- |", *rows])
