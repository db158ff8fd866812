"""Uploads as odd clients send them: what stands around the parts is passed over, and parts and their heads have limits."""

from __future__ import annotations

import pytest
from serving import Tenant, clip
from test_errors import check_problem, send

from service.http.multipart import HEAD_BYTES, PARTS, Malformed, Multipart

KIND = "multipart/form-data; boundary=XbX"
FILE = b'--XbX\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
END = b"\r\n--XbX--\r\n"


class Kept:
    def __init__(self) -> None:
        self.filename: str | None = "nothing came"
        self.data, self.whole = b"", False

    def begin(self, filename: str | None) -> None:
        self.filename = filename

    def take(self, data: bytes) -> None:
        self.data += data

    def end(self) -> None:
        self.whole = True


def read(body: bytes, step: int = 1 << 20, kind: str = KIND) -> Kept:
    """The part `file`."""
    kept = Kept()
    parser = Multipart(kind, {"file": kept})
    for start in range(0, len(body), step):
        parser.feed(body[start : start + step])
    return kept


def test_parts_are_told_from_their_surroundings_wherever_the_pieces_end() -> None:
    content = b"\r\n--XbY\r\n--Xb\r\n\r\n-\r\n--XbXno\r\n"
    padded = FILE.replace(b"XbX\r\n", b"XbX \t\r\n")
    body = b"preamble --XbX\r\n" + padded + content + END + b"epilogue\r\n" + FILE + b"more" + END
    for step in range(1, len(body) + 1):
        kept = read(body, step)
        assert (kept.filename, kept.data, kept.whole) == ("a.mp4", content, True)


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n", b"preamble\r\n", b"two\r\nlines\r\n", b"-\r\n", b"--\r\n"])
def test_what_stands_before_the_first_boundary_refuses_no_upload(guest: Tenant, before: bytes) -> None:
    content = before + FILE + clip(70 + len(before)) + END + b"epilogue"
    assert send(guest, content=content, headers={"Content-Type": KIND}).status_code == 202


@pytest.mark.parametrize(
    "content",
    [
        b"".join(b'--XbX\r\nContent-Disposition: form-data; name="p"\r\n\r\nx\r\n' for _ in range(PARTS)) + FILE + b"a" + END,
        FILE.replace(b"a.mp4", b"a" * HEAD_BYTES) + clip() + END,
        FILE.replace(b"a.mp4", b"a" * 90_000),  # without an end
        FILE.replace(b"\r\n\r\n", b"\r\nX-A: " + b"b" * HEAD_BYTES + b"\r\n\r\n") + clip() + END,
        b"a" * 90_000 + b"\r\n" + FILE + clip() + END,
    ],
    ids=["parts", "file name", "endless file name", "another header", "preamble"],
)
def test_parts_and_their_heads_have_limits(guest: Tenant, content: bytes) -> None:
    check_problem(send(guest, content=content, headers={"Content-Type": KIND}), 422, "invalid_upload")


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        (b'name="file"; filename="a; b.mp4"', "a; b.mp4"),
        (b'name="file"; filename="a \\"b\\".mp4"', 'a "b".mp4'),
        (b"name=file;filename=a.mp4", "a.mp4"),
        (b'NAME = "file"; FILENAME = "a.mp4"', "a.mp4"),
        (b'name="file";\r\n filename="a.mp4"', "a.mp4"),
        (b'name="file"', None),
        ('name="file"; filename="日本.mp4"'.encode(), "日本.mp4"),
        (b'name="file"; filename="x.mp4"; filename*=UTF-8\'\'%E6%97%A5%E6%9C%AC.mp4', "日本.mp4"),
        (b'name="file"; filename*=UTF-8\'\'%ff; filename="x.mp4"', "x.mp4"),
        (b'name="file"; filename*=nonsense\'\'a; filename="x.mp4"', "x.mp4"),
        ('name="file"; filename="Größe.mp4"'.encode("latin-1"), "Größe.mp4"),
    ],
)
def test_file_names(disposition: bytes, filename: str | None) -> None:
    kept = read(b"--XbX\r\nContent-Type: video/mp4\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\na" + END)
    assert (kept.filename, kept.data) == (filename, b"a")


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", 'multipart/mixed; boundary="x"', ""])
def test_a_content_type_without_a_boundary_is_refused(kind: str) -> None:
    with pytest.raises(Malformed):
        Multipart(kind, {})


def test_a_boundary_may_be_quoted() -> None:
    body = (FILE + b"a" + END).replace(b"XbX", b"X b;X")
    assert read(body, kind='Multipart/Form-Data; charset=utf-8; Boundary="X b;X"').data == b"a"


def test_a_part_that_comes_twice_is_refused(guest: Tenant) -> None:
    part = b'--XbX\r\nContent-Disposition: form-data; name="metadata"\r\n\r\n{}\r\n'
    content = part + part + FILE + clip() + END
    check_problem(send(guest, content=content, headers={"Content-Type": KIND}), 422, "invalid_upload")
