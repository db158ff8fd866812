"""What is answered: what a route returns is checked against these models."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from adapters_store import Manifest

Row = TypeVar("Row", bound=BaseModel)
VideoStatus = Literal["pending", "validating", "queued", "indexing", "ready", "failed"]
TaskStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class PageInfo(BaseModel):
    next_page_token: str | None = Field(description="The `page_token` of the next page; null on the last.")
    total_results: int


class Page(BaseModel, Generic[Row]):
    """The shape of every list."""

    data: list[Row]
    page_info: PageInfo


class Failure(BaseModel, extra="allow"):
    code: str = Field(description="Stable; the documentation names them all.")
    detail: str


@with_config(ConfigDict(extra="allow"))
class MediaOut(TypedDict, total=False):
    """Facts of the file: `sha256` and `size` (bytes) from the first, the others when it is decoded; sizes as shown."""

    sha256: str
    size: int
    duration: float
    width: int
    height: int
    fps: float
    codec: str
    frames: int
    container: str
    decoder: str


class CaptionOut(BaseModel):
    text: str
    start: float | None
    end: float | None


class VideoOut(BaseModel):
    """A video of a collection."""

    id: str
    filename: str
    status: VideoStatus
    error: Failure | None
    task_id: str | None
    system_metadata: MediaOut
    metadata: dict[str, Any]
    captions: list[CaptionOut]
    thumbnail_url: str | None
    video_url: str
    created_at: str
    updated_at: str
    video_id: str = Field(description="The same as `id`; left out from the next version on.", deprecated=True)
    user_metadata: dict[str, Any] = Field(description="The same as `metadata`; as above.", deprecated=True)


class VideoPage(Page[VideoOut]):
    """Videos, newest first."""


class UploadOut(BaseModel):
    """`duplicate_of`: the video with the same bytes that the collection had; `updated`: what of it has changed."""

    video_id: str | None = Field(description="Null while the video is still to be fetched from a URL: see the task's result.")
    task_id: str | None
    status: VideoStatus
    duplicate_of: str | None
    updated: list[Literal["captions", "metadata"]] = []


class QueuedLine(BaseModel):
    line: int
    task_id: str


class RefusedLine(BaseModel):
    line: int
    code: str
    detail: str


class ManifestOut(BaseModel):
    """Each line, counted from 1, is in one of the two lists."""

    queued: list[QueuedLine]
    refused: list[RefusedLine]


class QueuedOut(BaseModel):
    """A task that was queued: `GET /tasks/{task_id}` tells how it stands."""

    task_id: str


class AdapterImportOut(QueuedOut):
    """The task has ended already."""

    adapter_id: str


class CollectionImportOut(QueuedOut):
    """`collection`: the name that it will have."""

    collection: str


class TaskOut(BaseModel):
    """`progress` from 0 to 1; `result`, by kind, when it has succeeded; `error` when it has failed.

    `request_id`: of the request that asked for it, which the log lines of its job bear.
    """

    id: str
    collection: str | None
    kind: str
    status: TaskStatus
    progress: float
    eta_seconds: float | None
    message: str | None
    error: Failure | None
    request_id: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    result: dict[str, Any] | None


class TaskPage(Page[TaskOut]):
    """Tasks, newest first."""


class SettingsOut(TypedDict, total=False):
    """A collection's settings that were set."""

    segment_seconds: float
    description: str
    pinned: bool
    keep_generations: int
    keep_generation_days: float


class BackboneName(BaseModel):
    """An architecture and its weights; `fingerprint` identifies both, null where it has never been loaded here."""

    name: str
    pretrained: str | None
    fingerprint: str | None


class CollectionOut(BaseModel):
    """`videos`: how many, in total and by status; `active_adapter`: null for the frozen backbone."""

    id: str
    name: str
    settings: SettingsOut
    videos: dict[str, int]
    captioned_videos: int
    active_adapter: str | None
    active_generation: str
    backbone: BackboneName
    created_at: str


class CollectionPage(Page[CollectionOut]):
    """Collections, newest first."""


class BackboneOut(BackboneName):
    """`own`: new collections get it; `in_memory`: at most two are. `frame_cost`: processor time of a frame, ViT-B-32's being 1.
    `published`: R@1 of the weights from text, in per cent, by data set. Null is what is not known of it.
    """

    own: bool
    in_memory: bool
    parameters: int | None
    image_size: int | None
    context_length: int | None
    frame_cost: float | None
    licence: str | None
    published: dict[str, Any] | None


class BackbonePage(Page[BackboneOut]):
    """Backbones, the data folder's own first."""


class GenerationOut(BaseModel):
    """`videos` have vectors in it, `missing` are to be embedded before it can be used. `backbone`: its fingerprint."""

    id: str
    adapter_id: str | None
    backbone: str
    state: Literal["building", "active", "retired"]
    videos: int
    missing: int
    created_at: str
    activated_at: str | None
    retired_at: str | None


class GenerationPage(Page[GenerationOut]):
    """Generations, newest first."""


class AdapterOut(BaseModel):
    """`residency`: where this process has it; `metrics`: of its validation, `before` and `after` its training."""

    id: str
    version: int
    digest: str
    active: bool
    residency: Literal["active", "inactive", "loading", "offloaded"]
    scope: str
    parameters: int
    metrics: dict[Literal["before", "after"], Any]
    created_at: str


class AdapterPage(Page[AdapterOut]):
    """Adapters, newest first."""


class AdapterDetail(AdapterOut):
    """With where it came from: recipe, data, metrics and loss curve."""

    manifest: Manifest


class QuotasOut(TypedDict, total=False):
    """The quotas that were set."""

    max_videos: int
    max_bytes: int
    max_collections: int


class TenantOut(BaseModel):
    id: str
    name: str
    quotas: QuotasOut
    created_at: str


class TenantPage(Page[TenantOut]):
    """Tenants, newest first."""


class KeyOut(BaseModel):
    id: str
    role: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    revoked_at: str | None


class KeyPage(Page[KeyOut]):
    """All keys of a tenant."""


class NewKeyOut(KeyOut):
    """With the key itself, the only time that it is shown."""

    key: str


class Usage(BaseModel):
    collections: int
    videos: int
    bytes: int
    adapters: int


class UsageOut(BaseModel):
    tenant: str
    at: str
    usage: Usage
    quotas: QuotasOut


class LivenessOut(BaseModel):
    status: Literal["ok"]


class ReadinessOut(BaseModel):
    """`status`: ready, degraded (no worker: searches are answered, jobs wait) or not ready. `missing`: what was not found.
    `backbones`: those in memory, two at most, the data folder's own first. `warning`: what its searches are worth where it
    knows no real pictures."""

    status: str
    checks: dict[str, bool]
    missing: list[str]
    backbones: list[BackboneName]
    warning: str | None


class Problem(BaseModel):
    """RFC 9457 problem document."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[dict[str, Any]] | None = None
    errors_left_out: int | None = None
