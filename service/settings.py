"""Every setting, with its default and what it is for. `POLYCLIP_` and the field's name is its environment variable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MiB = 1024 * 1024
SHORTEST_SEGMENT = 1.0  # seconds


class Settings(BaseSettings):
    """One instance per process, built by the command line; nothing reads the environment elsewhere."""

    model_config = SettingsConfigDict(env_prefix="POLYCLIP_", extra="forbid", frozen=True)

    data: Path = Field(Path("polyclip-data"), description="Folder that holds everything of the embedded default.")
    database_url: str | None = Field(None, description="SQLAlchemy URL; default: SQLite in the data folder.")
    database_connections: int = Field(48, ge=4, description="Connections to that database that a process opens at most.")
    database_seconds: float = Field(10.0, gt=0, description="Time that a request waits for one that is free, in seconds.")
    jobs_database_url: str | None = Field(None, description="Database of the job engine; default: SQLite beside the other.")
    blobs: str | None = Field(None, description="Root URL of videos, frames and adapters; default: the data folder.")
    root_key: str | None = Field(
        None, description="The operator's key, 16 characters or more; default: made at the first start and printed once."
    )
    metrics_open: bool = Field(False, description="Answer `/metrics` without the operator's key.")
    wrong_keys: int = Field(100, ge=1, description="Unknown keys that an address may send in a minute before it must wait.")
    event_streams: int = Field(20, ge=1, description="Streams of events that one key may hold open in one process.")
    alerts: int = Field(1000, ge=0, description="Alerts (standing queries) that a tenant may have.")
    feedback: int = Field(20_000, ge=0, description="Statements of feedback that a collection keeps.")
    private_urls: bool = Field(
        False, description="Call URLs that tenants name at private addresses too: of the machine, of its network."
    )
    backbone: str | None = Field(None, description="`builtin` or an open_clip model; default: the data folder's.")
    pretrained: str | None = Field(
        None, description="Weights of that model: a tag, a file, a repository of the hub, or `random`."
    )
    backbones: tuple[str, ...] | None = Field(
        None,
        description="What collections may be changed to, a JSON list of NAME or NAME:WEIGHTS; default: the built-in one, and "
        "open_clip's models with the weights that it knows.",
    )
    tokenizer: Path | None = Field(
        None,
        description="Folder of its tokenizer, where that does not come with open_clip; default: beside the file, or the hub.",
    )
    device: str | None = Field(None, description="`cpu` or `cuda`; default: cuda where there is one.")
    precision: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="What the backbone computes in; default: float32 on a CPU, float16 on a GPU."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of one forward pass; default: torch's choice.")

    header_bytes: int = Field(65536, ge=1024, description="Largest headers of one request, in bytes.")
    url_bytes: int = Field(16384, ge=256, description="Longest URL, in bytes.")
    body_bytes: int = Field(
        2 * MiB,
        ge=1024,
        description="Largest body that is no upload, in bytes; captions: 4 times it, embeddings and manifests: 8.",
    )
    header_seconds: float = Field(15.0, gt=0, description="Time in which the headers of a request must come, in seconds.")
    body_seconds: float = Field(30.0, gt=0, description="Time that a body may stand still or fall behind 1 KiB/s, in seconds.")
    connections_per_address: int = Field(
        256, ge=0, description="Connections open at once from one IPv4 address or IPv6 /64; 0: any number, as behind a proxy."
    )

    segment_seconds: float = Field(
        30.0, ge=SHORTEST_SEGMENT, description="Videos longer than this are cut into equal segments, in seconds; at least 1."
    )
    max_segments: int = Field(2000, ge=1, description="Segments of a video; one that would have more is refused.")
    cached_short_side: int = Field(256, ge=16, le=1024, description="Short side of the cached frames, in pixels, 16 to 1024.")
    max_video_bytes: int = Field(2048 * MiB, ge=1, description="Largest upload, in bytes.")
    fetch_seconds: float = Field(600.0, gt=0, description="Time that fetching one video from a URL may take, in seconds.")
    max_archive_bytes: int = Field(65536 * MiB, ge=1, description="Largest archive that is imported over HTTP, in bytes.")
    max_video_seconds: float = Field(4 * 3600, gt=0, description="Longest video, in seconds.")
    decode_seconds: float = Field(600.0, gt=0, description="Wall time that decoding one video may take, in seconds.")
    decode_bytes: int = Field(2048 * MiB, ge=64 * MiB, description="Memory that decoding one video may take, in bytes.")
    decode_output_bytes: int = Field(512 * MiB, ge=1, description="Cached frames and thumbnails of one video, in bytes.")
    decoder: Literal["pyav", "decord", "auto"] = Field(
        "auto",
        description="Of the operator's own files (`polyclip index`): `auto` is decord where it agrees with PyAV, and PyAV "
        "elsewhere. What comes over HTTP is always decoded by PyAV.",
    )
    decoders: int = Field(2, ge=1, description="Decoder processes of a worker.")

    candidates: int = Field(200, ge=1, description="Segments that the first stage hands to exact rescoring.")
    text_cache_bytes: int = Field(64 * MiB, ge=0, description="Text vectors kept, by tenant, adapter and text, in bytes.")
    frame_cache_bytes: int = Field(256 * MiB, ge=0, description="Frame vectors kept for rescoring, in bytes.")
    adapter_bytes: int = Field(256 * MiB, ge=1, description="Adapters kept on the device, in bytes.")
    adapter_host_bytes: int = Field(1024 * MiB, ge=0, description="Adapters kept in the host's memory, in bytes.")
    adapter_rank: int = Field(16, ge=1, description="Largest rank that is kept on the device; larger ones are slower.")
    adapter_max_rank: int | None = Field(
        None, ge=1, description="Largest rank that is imported, or trained over HTTP; default: that of `adapter_rank`."
    )
    view_bytes: int = Field(2048 * MiB, ge=1, description="Index views kept in memory, in bytes.")
    snapshot_bytes: int = Field(4096 * MiB, ge=0, description="Snapshots of index views kept on disk, in bytes; 0: none.")
    batch_texts: int = Field(64, ge=1, description="Largest batch of texts in one forward pass.")
    queue_texts: int = Field(1024, ge=2, description="Texts that may wait to be encoded, half of them one tenant's.")
    image_bytes: int = Field(10 * MiB, ge=1024, description="Largest picture of a search by image, in bytes.")
    search_seconds: float = Field(20.0, gt=0, description="How long a text may wait to be encoded, in seconds.")
    batch_frames: int = Field(96, ge=1, description="Largest batch of frames in one forward pass.")
    training_seconds: float = Field(
        6 * 3600, gt=0, description="Time for the steps of one training, in seconds; it ends with the best adapter until then."
    )
    training_turn_seconds: float = Field(
        600.0, gt=0, description="Steps after which a training lets another tenant's that waits go first, in seconds."
    )
    training_steps: int = Field(100_000, ge=1, description="Most optimiser steps that a recipe may ask for.")
    training_epochs: float = Field(100.0, gt=0, description="Most epochs that a recipe may ask for.")
    training_batch: int = Field(512, ge=2, description="Largest batch that a recipe may ask for, in pairs.")
    keep_generations: int = Field(2, ge=0, description="Retired generations that each collection keeps, ready for a switch.")
    keep_generation_days: float = Field(30.0, ge=0, description="Days after which a retired generation is removed.")
    job_tries: int = Field(6, ge=1, description="Tries of a task that fails by what may pass, minutes apart at last.")
    job_deaths: int = Field(3, ge=1, description="Deaths of its worker after which a task that ran each time fails.")
    keep_task_days: float = Field(90.0, ge=0, description="Days after which ended tasks and alerts' events are forgotten.")
    idempotency_hours: float = Field(24.0, gt=0, description="Hours for which an `Idempotency-Key` is remembered.")
    worker_id: str = Field("0", description="Tells workers on one data folder apart (PostgreSQL); the same at each start.")
    url_seconds: int = Field(3600, ge=1, description="Life of a signed media URL, in seconds.")

    @field_validator("data")
    @classmethod
    def _readable(cls, data: Path) -> Path:
        try:
            str(data.absolute()).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the folder's name is not UTF-8: {str(data)!r}") from error
        return data

    @field_validator("blobs")
    @classmethod
    def _whole(cls, blobs: str | None) -> str | None:
        if blobs is not None and (parts := urlsplit(blobs)).scheme == "file" and (parts.query or parts.fragment):
            raise ValueError("in a file URL write ? as %3F and # as %23")
        return blobs

    @field_validator("root_key")
    @classmethod
    def _hard_to_guess(cls, key: str | None) -> str | None:
        if key is not None and (len(key) < 16 or len(set(key)) < 6 or not all("!" <= c <= "~" for c in key)):
            raise ValueError("needs 16 or more ASCII characters without spaces, 6 of them different")
        return key

    @property
    def misplaced(self) -> Path | None:
        """Where versions that put paths into URLs unquoted kept this folder's blobs, if that is another place and there."""
        now = self.data.absolute() / "blobs"
        before = Path(unquote(urlsplit(f"file://{now}").path))
        return before if self.blobs is None and before != now and (before / "videos").is_dir() else None

    @property
    def has_data(self) -> bool:
        """Whether there is anything to be read: a database elsewhere, or the one in the data folder."""
        return self.database_url is not None or (self.data / "polyclip.sqlite").is_file()

    @property
    def database(self) -> str:
        return self.database_url or _sqlite(self.data / "polyclip.sqlite")

    @property
    def jobs_database(self) -> str:
        if self.jobs_database_url:
            return self.jobs_database_url
        return self.database_url or _sqlite(self.data / "jobs.sqlite")

    @property
    def blob_root(self) -> str:
        return self.blobs or (self.data.absolute() / "blobs").as_uri()

    @property
    def largest_rank(self) -> int:
        return self.adapter_max_rank or self.adapter_rank

    @property
    def scratch(self) -> Path:
        """Files on their way: uploads, decoded frames, training sets. On the same file system as the blobs."""
        return self.data.absolute() / "scratch"

    @property
    def snapshots(self) -> Path:
        """Snapshots of index views, a cache of this machine's own."""
        return self.data.absolute() / "snapshots"


def _sqlite(path: Path) -> str:
    """The URL of a file; SQLAlchemy takes back what is quoted."""
    return f"sqlite:///{quote(str(path.absolute()))}"


class CollectionSettings(BaseModel, extra="forbid"):
    """What a collection may set for itself."""

    segment_seconds: float | None = Field(None, ge=SHORTEST_SEGMENT, le=3600, description="Length of a segment, seconds.")
    description: str | None = Field(None, max_length=1000)
    pinned: bool | None = Field(None, description="Keep the active adapter on the device, used or not.")
    keep_generations: int | None = Field(None, ge=0, le=100, description="Retired generations that are kept.")
    keep_generation_days: float | None = Field(None, ge=0, le=36500, description="Days for which they are kept.")


def settings_json(settings: CollectionSettings) -> dict[str, Any]:
    return json.loads(settings.model_dump_json(exclude_none=True))  # type: ignore[no-any-return]
