"""An example of every answer, for the documentation."""

from __future__ import annotations

from typing import Any

_ID = "01J9Z3N8Q4T5V6W7X8Y9Z0A1B2"
_VIDEO, _TASK, _ADAPTER, _GENERATION = f"vid_{_ID}", f"task_{_ID}", f"adp_{_ID}", f"gen_{_ID}"
_TIME = "2026-01-31T12:00:00.000000+00:00"
_SIGNED = "?exp=1769864400&sig=5f2c"
_URLS = {
    "thumbnail_url": f"http://127.0.0.1:8000/media/thumbnail/{_VIDEO}-0{_SIGNED}",
    "video_url": f"http://127.0.0.1:8000/media/video/{_VIDEO}{_SIGNED}",
}
_ONE = {"next_page_token": None, "total_results": 1}
_VIDEO_ROW = {
    "id": _VIDEO, "video_id": _VIDEO, "filename": "gate.mp4", "status": "ready", "error": None, "task_id": _TASK,
    "system_metadata": {"duration": 12.5, "width": 1280, "height": 720, "fps": 25.0, "codec": "h264", "frames": 312,
                        "container": "mov,mp4,m4a", "decoder": "decord", "sha256": "9f86d081", "size": 1048576},
    "metadata": {"camera": "north"}, "user_metadata": {"camera": "north"},
    "captions": [{"text": "a van stops at the gate", "start": 0.0, "end": 6.5}],
    **_URLS, "created_at": _TIME, "updated_at": _TIME,
}  # fmt: skip
_TASK_ROW = {
    "id": _TASK, "collection": "gates", "kind": "activate", "status": "succeeded", "progress": 1.0, "eta_seconds": None,
    "message": "done", "error": None, "request_id": f"req_{_ID}", "created_at": _TIME, "started_at": _TIME,
    "finished_at": _TIME, "result": {"activated": True},
}  # fmt: skip
_BACKBONE = {"name": "ViT-B-32", "pretrained": "openai", "fingerprint": "7d865e95"}
_BACKBONE_ROW = {
    **_BACKBONE, "own": True, "in_memory": True, "parameters": 151277313, "image_size": 224, "context_length": 77,
    "frame_cost": 1.0, "licence": "MIT", "published": {"msrvtt": 31.2},
}  # fmt: skip
_COLLECTION_ROW = {
    "id": f"col_{_ID}", "name": "gates", "settings": {"segment_seconds": 10.0},
    "videos": {"total": 3, "ready": 2, "queued": 1}, "captioned_videos": 2, "active_adapter": None,
    "active_generation": _GENERATION, "backbone": _BACKBONE, "created_at": _TIME,
}  # fmt: skip
_GENERATION_ROW = {
    "id": _GENERATION, "adapter_id": None, "backbone": "7d865e95", "state": "active", "videos": 3, "missing": 0,
    "created_at": _TIME,
    "activated_at": _TIME, "retired_at": None,
}  # fmt: skip
_ADAPTER_ROW = {
    "id": _ADAPTER, "version": 1, "digest": "2c26b46b", "active": True, "residency": "active", "scope": "both",
    "parameters": 517120, "metrics": {"before": {"text_to_video": {"R@1": 31.0}}, "after": {"text_to_video": {"R@1": 44.5}}},
    "created_at": _TIME,
}  # fmt: skip
_MANIFEST = {
    "digest": "2c26b46b", "backbone": "7d865e95", "rank": 8, "shared": 4, "scope": "both", "parameters": 517120,
    "size": 2071552, "recipe": {"epochs": 20}, "metrics": _ADAPTER_ROW["metrics"], "data": {"train": {"videos": 80}},
    "vocabulary": 53, "words": ["halo", "zone"], "parent": None, "created_at": _TIME, "format": "polyclip-adapter/1",
}  # fmt: skip
_TENANT_ROW = {"id": f"ten_{_ID}", "name": "acme", "quotas": {"max_videos": 1000}, "created_at": _TIME}
_KEY_ROW = {
    "id": f"key_{_ID}", "role": "search", "created_at": _TIME, "expires_at": None, "last_used_at": None, "revoked_at": None
}  # fmt: skip
_HIT = {
    "rank": 1, "score": 0.312, "video_id": _VIDEO, "start": 0.0, "end": 6.5, "filename": "gate.mp4",
    "metadata": {"camera": "north"}, **_URLS,
}  # fmt: skip

_FEEDBACK_ROW = {
    "id": f"fbk_{_ID}", "query": "a van at the gate", "video_id": _VIDEO, "start": 0.0, "end": 6.5, "relevant": True,
    "key_id": "k3y1d000", "created_at": _TIME, "updated_at": _TIME,
}  # fmt: skip
_ALERT_ROW = {
    "id": f"alr_{_ID}", "name": "vans", "text": "a van at the gate", "min_score": 0.3,
    "webhook": "https://example.com/polyclip", "events": 1, "created_at": _TIME,
}  # fmt: skip
_EVENT_ROW = {
    "id": f"evt_{_ID}", "number": 1, "alert_id": f"alr_{_ID}", "video_id": _VIDEO, "start": 0.0, "end": 6.5, "score": 0.312,
    "generation": _GENERATION, "delivery": "delivered", "error": None, "created_at": _TIME, "delivered_at": _TIME,
}  # fmt: skip
_SEARCH = {
    "data": [_HIT],
    "search_pool": {
        "collection": "gates", "generation": _GENERATION, "adapter": None, "backbone": _BACKBONE, "total_videos": 3,
        "pending_videos": 0,
    },
    "timings_ms": {"encode": 9.1, "search": 0.8}, "page_info": _ONE, "warnings": [],
}  # fmt: skip
_PROBLEM = {
    "type": "urn:polyclip:problem:collection_not_found", "title": "Not Found", "status": 404,
    "detail": "there is no collection 'gates'", "code": "collection_not_found", "request_id": f"req_{_ID}",
    "errors": None, "errors_left_out": None,
}  # fmt: skip

EXAMPLES: dict[str, dict[str, Any]] = {  # by the answer's model
    "SearchAnswer": _SEARCH,
    "BatchAnswer": {
        "data": [
            {"status": 200, "answer": _SEARCH, "problem": None}, {"status": 404, "answer": None, "problem": _PROBLEM}
        ],
    },
    "FeedbackOut": _FEEDBACK_ROW,
    "CheckUpOut": {
        "collection": "gates", "generation": _GENERATION, "adapter": None, "ready_videos": 40, "captions": 55, "asked": 60,
        "weak_queries": [
            {"text": "a van at the gate", "source": "feedback", "reasons": ["called_irrelevant"], "video_id": None, "rank": 4,
             "relevant": 1, "irrelevant": 3},
        ],
        "weak_queries_total": 1,
        "never_found": [{"video_id": _VIDEO, "filename": "gate.mp4"}], "never_found_total": 1,
        "caption_next": [{"video_id": _VIDEO, "filename": "gate.mp4", "why": "no_captions"}],
        "gate": {"captioned_videos": 25, "videos_needed": 0, "held_out_captions": 12, "held_out_needed": 18,
                 "captions_needed": 90},
    },
    "NewAlertOut": {**_ALERT_ROW, "secret": "whsec_5d41402abc4b2a76"},
    "AlertOut": _ALERT_ROW,
    "EmbeddingsOut": {
        "object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}], "model": "gates",
        "usage": {"prompt_tokens": 6, "total_tokens": 6}, "warnings": [],
    },
    "ModelsOut": {
        "object": "list", "data": [{"id": "gates", "object": "model", "created": 1769860800, "owned_by": "acme"}],
    },
    "VideoOut": _VIDEO_ROW,
    "UploadOut": {"video_id": _VIDEO, "task_id": _TASK, "status": "pending", "duplicate_of": None, "updated": []},
    "ManifestOut": {
        "queued": [{"line": 1, "task_id": _TASK}],
        "refused": [{"line": 2, "code": "invalid_url", "detail": "only http and https URLs with a host are fetched"}],
    },
    "QueuedOut": {"task_id": _TASK},
    "AdapterImportOut": {"task_id": _TASK, "adapter_id": _ADAPTER},
    "CollectionImportOut": {"task_id": _TASK, "collection": "gates"},
    "TaskOut": _TASK_ROW,
    "CollectionOut": _COLLECTION_ROW,
    "AdapterDetail": {**_ADAPTER_ROW, "manifest": _MANIFEST},
    "TenantOut": _TENANT_ROW,
    "NewKeyOut": {**_KEY_ROW, "key": "pc_5d41402abc4b2a76"},
    "UsageOut": {
        "tenant": "acme", "at": _TIME, "usage": {"collections": 1, "videos": 3, "bytes": 3145728, "adapters": 1},
        "quotas": {"max_videos": 1000},
    },
    "LivenessOut": {"status": "ok"},
    "ReadinessOut": {
        "status": "ready", "checks": {"backbone": True, "database": True, "worker": True}, "missing": [],
        "backbones": [_BACKBONE], "warning": None,
    },
    "Problem": _PROBLEM,
    **{
        f"{name}Page": {"data": [row], "page_info": _ONE}
        for name, row in (
            ("Video", _VIDEO_ROW), ("Task", _TASK_ROW), ("Collection", _COLLECTION_ROW), ("Generation", _GENERATION_ROW),
            ("Backbone", _BACKBONE_ROW), ("Adapter", _ADAPTER_ROW), ("Tenant", _TENANT_ROW), ("Key", _KEY_ROW),
            ("Feedback", _FEEDBACK_ROW), ("Alert", _ALERT_ROW), ("AlertEvent", _EVENT_ROW),
        )
    },
}  # fmt: skip
