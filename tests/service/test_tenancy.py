"""Nobody meets another tenant's objects: not by name, not by id, not in a list, not in a search."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from serving import Tenant, clip, new_tenant

from backbone import AdapterShape
from service.adapters import adapter_rows, train
from service.jobs import task_rows
from service.search import query
from service.storage import collection_rows, generation_rows, segment_rows, tenant_rows
from service.storage.rows import NotFound
from service.videos import video_rows


@dataclass(frozen=True, slots=True)
class Estate:
    """What one tenant owns, each object by what names it in a path."""

    owner: Tenant
    collection: str
    video: str
    task: str
    adapter: str
    key: str
    feedback: str
    alert: str


@pytest.fixture(scope="module")
def estate(client: Any) -> Estate:
    owner = new_tenant(client)
    collection = owner.collection("films")
    uploaded = owner.upload(collection, clip(), captions=["a ball"]).json()
    path = f"/admin/collections/{collection}/adapters/import"
    imported = owner.call("POST", path, files={"file": ("a.safetensors", adapter_file(client))})
    assert imported.status_code == 202, imported.text
    key = owner.keys["search"].split("_")[1]
    said = {"collection": collection, "query": "a ball", "video_id": uploaded["video_id"], "relevant": True}
    feedback = owner.post("/feedback", said).json()["id"]
    alert = owner.post(f"/collections/{collection}/alerts", {"text": "a ball"}).json()["id"]
    adapter = imported.json()["adapter_id"]
    return Estate(owner, collection, uploaded["video_id"], uploaded["task_id"], adapter, key, feedback, alert)


@pytest.fixture
def stranger(client: Any) -> Tenant:
    """An admin of another tenant, with a collection of its own."""
    other = new_tenant(client)
    other.collection("mine")
    return other


def adapter_file(client: Any) -> bytes:
    """An untrained adapter for the application's backbone."""
    import torch

    import adapters_store

    backbone = client.app.state.services.encoder.backbone
    shape = AdapterShape(backbone.dims, 2, 0, "text")
    tensors = {name: torch.zeros(size) for name, size in shape.layout().items()}
    return adapters_store.pack(shape, backbone.fingerprint, tensors)


ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/collections/{collection}", None),
    ("PATCH", "/collections/{collection}", {"settings": {}}),
    ("DELETE", "/collections/{collection}", None),
    ("POST", "/search", {"collection": "{collection}", "text": "a ball"}),
    ("POST", "/search", {"collection": "mine", "text": "a ball", "adapter": "{adapter}"}),
    ("POST", "/search/video", {"collection": "{collection}", "video_id": "{video}"}),
    ("POST", "/search/video", {"collection": "mine", "video_id": "{video}"}),
    ("GET", "/collections/{collection}/videos", None),
    ("POST", "/collections/{collection}/videos", {"url": "https://example.org/a.mp4"}),
    ("POST", "/collections/{collection}/videos/manifest", {"url": "https://example.org/a.mp4"}),
    ("POST", "/v1/embeddings", {"model": "{collection}", "input": "a red ball"}),
    ("GET", "/collections/{collection}/videos/{video}", None),
    ("GET", "/collections/mine/videos/{video}", None),
    ("PUT", "/collections/{collection}/videos/{video}/captions", {"captions": []}),
    ("PUT", "/collections/mine/videos/{video}/captions", {"captions": []}),
    ("DELETE", "/collections/{collection}/videos/{video}", None),
    ("DELETE", "/collections/mine/videos/{video}", None),
    ("POST", "/feedback", {"collection": "{collection}", "query": "a", "video_id": "{video}", "relevant": True}),
    ("POST", "/feedback", {"collection": "mine", "query": "a", "video_id": "{video}", "relevant": True}),
    ("GET", "/collections/{collection}/feedback", None),
    ("DELETE", "/collections/{collection}/feedback/{feedback}", None),
    ("DELETE", "/collections/mine/feedback/{feedback}", None),
    ("GET", "/collections/{collection}/check-up", None),
    ("POST", "/collections/{collection}/alerts", {"text": "a"}),
    ("GET", "/collections/{collection}/alerts", None),
    ("GET", "/collections/{collection}/alerts/{alert}", None),
    ("GET", "/collections/mine/alerts/{alert}", None),
    ("DELETE", "/collections/{collection}/alerts/{alert}", None),
    ("DELETE", "/collections/mine/alerts/{alert}", None),
    ("GET", "/collections/{collection}/alerts/{alert}/events", None),
    ("GET", "/collections/mine/alerts/{alert}/events", None),
    ("GET", "/tasks/{task}", None),
    ("GET", "/tasks/{task}/events", None),
    ("POST", "/tasks/{task}/cancel", None),
    ("GET", "/tasks?collection={collection}", None),
    ("GET", "/collections/{collection}/adapters", None),
    ("GET", "/collections/{collection}/adapters/{adapter}", None),
    ("GET", "/collections/mine/adapters/{adapter}", None),
    ("GET", "/collections/{collection}/adapters/{adapter}/weights", None),
    ("GET", "/collections/mine/adapters/{adapter}/weights", None),
    ("DELETE", "/collections/{collection}/adapters/{adapter}", None),
    ("DELETE", "/collections/mine/adapters/{adapter}", None),
    ("GET", "/collections/{collection}/generations", None),
    ("GET", "/admin/collections/{collection}/export", None),
    ("POST", "/admin/collections/{collection}/adapters", {}),
    ("POST", "/admin/collections/{collection}/activate", {"adapter_id": None}),
    ("POST", "/admin/collections/mine/activate", {"adapter_id": "{adapter}"}),
    ("POST", "/admin/collections/{collection}/evaluate", {}),
    ("GET", "/admin/tenants/{tenant}/usage", None),
    ("GET", "/admin/tenants/{tenant}/keys", None),
    ("POST", "/admin/tenants/{tenant}/keys", {"role": "admin"}),
    ("DELETE", "/admin/tenants/{tenant}/keys/{key}", None),
    ("DELETE", "/admin/tenants/{mine}/keys/{key}", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_another_tenants_object_is_a_404(estate: Estate, stranger: Tenant, method: str, path: str, body: Any) -> None:
    names = {
        "collection": estate.collection, "video": estate.video, "task": estate.task, "adapter": estate.adapter,
        "key": estate.key, "tenant": estate.owner.name, "mine": stranger.name, "feedback": estate.feedback,
        "alert": estate.alert,
    }  # fmt: skip
    if body is not None:
        body = {name: value.format(**names) if isinstance(value, str) else value for name, value in body.items()}
    answer = stranger.call(method, path.format(**names), **({"json": body} if body is not None else {}))
    assert answer.status_code == 404, answer.text
    assert answer.json()["code"].endswith("_not_found")


def test_every_route_that_names_an_object_is_tried(client: Any) -> None:
    """A route that is added later must be tried above, or be named here with the reason."""
    elsewhere = {
        ("GET", "/media/{kind}/{media_id}"),  # by signed URL, without a key
        ("POST", "/collections/{name}/videos"),  # multipart, below
        ("POST", "/admin/collections/{name}/adapters/import"),  # multipart, below
        ("POST", "/search/image"),  # multipart, below
        ("POST", "/search/batch"),  # tells it in the place of a query, below
        ("DELETE", "/admin/tenants/{name}"),  # the operator's alone: 403 for every tenant, whoever is named
    }
    tried = {(method, _shape(path.split("?")[0])) for method, path, _ in ROUTES}
    routes = [
        (method.upper(), path)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
        if "{" in path or path.startswith("/search")
    ]
    assert [r for r in routes if r not in elsewhere and (r[0], _shape(r[1])) not in tried] == []


def _shape(path: str) -> str:
    return "/".join("*" if part.startswith("{") or part == "mine" else part for part in path.split("/"))


def test_uploads_into_another_tenants_collection_are_a_404(estate: Estate, stranger: Tenant) -> None:
    assert stranger.upload(estate.collection, clip(1)).status_code == 404
    data = adapter_file(stranger.client)
    path = f"/admin/collections/{estate.collection}/adapters/import"
    assert stranger.call("POST", path, files={"file": ("a.safetensors", data)}).status_code == 404


def test_pictures_and_batches_find_nothing_of_another_tenant(estate: Estate, stranger: Tenant) -> None:
    Image.new("RGB", (8, 8)).save(picture := BytesIO(), "PNG")
    parts = {"image": ("p.png", picture.getvalue()), "collection": (None, estate.collection)}
    assert stranger.call("POST", "/search/image", files=parts).status_code == 404
    queries = [{"collection": estate.collection, "text": "a ball"}, {"collection": "mine", "video_id": estate.video}]
    told = stranger.post("/search/batch", {"queries": queries}).json()["data"]
    assert [each["problem"]["code"] for each in told] == ["collection_not_found", "video_not_found"]


def test_lists_show_nothing_of_another_tenant(estate: Estate, stranger: Tenant) -> None:
    for what in ("videos", "adapters", "feedback", "alerts"):
        assert stranger.get(f"/collections/mine/{what}", page_limit=50).json()["data"] == []
    assert stranger.get("/tasks", page_limit=50).json()["data"] == []
    assert [row["name"] for row in stranger.get("/collections").json()["data"]] == ["mine"]
    keys = stranger.get(f"/admin/tenants/{stranger.name}/keys").json()["data"]
    assert {key["id"] for key in keys} == {key.split("_")[1] for key in stranger.keys.values()}
    used = stranger.get(f"/admin/tenants/{stranger.name}/usage").json()["usage"]
    assert used == {"collections": 1, "videos": 0, "bytes": 0, "adapters": 0}


def test_a_page_token_of_another_tenant_shows_nothing_of_it(estate: Estate, stranger: Tenant) -> None:
    estate.owner.collection()
    token = estate.owner.get("/collections", page_limit=1).json()["page_info"]["next_page_token"]
    rows = stranger.get("/collections", page_token=token).json()["data"]
    assert estate.collection not in [row["name"] for row in rows]


def test_equal_collection_names_of_two_tenants_do_not_meet(estate: Estate, stranger: Tenant) -> None:
    stranger.collection(estate.collection)
    answer = stranger.upload(estate.collection, clip())
    assert answer.json()["duplicate_of"] is None
    mine = stranger.get(f"/collections/{estate.collection}/videos").json()["data"]
    assert [video["video_id"] for video in mine] == [answer.json()["video_id"]]
    assert stranger.call("DELETE", f"/collections/{estate.collection}").status_code == 204
    assert estate.owner.get(f"/collections/{estate.collection}/videos/{estate.video}").status_code == 200


def test_the_owner_still_has_everything(estate: Estate) -> None:
    path = f"/collections/{estate.collection}"
    for suffix in ("", f"/videos/{estate.video}", f"/adapters/{estate.adapter}", f"/adapters/{estate.adapter}/weights"):
        assert estate.owner.get(path + suffix).status_code == 200
    assert estate.owner.get(f"/tasks/{estate.task}").json()["status"] == "queued"


def test_no_function_of_the_catalog_finds_another_tenants_rows(estate: Estate, stranger: Tenant) -> None:
    services = estate.owner.client.app.state.services
    with services.storage.database.read() as connection:
        mine = tenant_rows.tenant_named(connection, stranger.name).id
        owner = tenant_rows.tenant_named(connection, estate.owner.name).id
        theirs = collection_rows.collection_named(connection, owner, estate.collection)
        for look in (
            lambda: video_rows.video(connection, mine, estate.video),
            lambda: task_rows.task(connection, mine, estate.task),
            lambda: adapter_rows.adapter(connection, mine, theirs.id, estate.adapter),
            lambda: generation_rows.generation(connection, mine, theirs.active_generation_id),
            lambda: collection_rows.collection_name(connection, mine, theirs.id),
            lambda: collection_rows.active_generation(connection, mine, estate.collection),
        ):
            with pytest.raises(NotFound):
                look()
        assert collection_rows.lock_collection(connection, mine, theirs.id) is None
        assert video_rows.videos_by_id(connection, mine, [estate.video]) == {}
        assert video_rows.videos_of(connection, mine, theirs.id, "pending") == []
        assert video_rows.captions_of(connection, mine, [estate.video]) == {estate.video: []}
        assert video_rows.captions_of(connection, owner, [estate.video]) != {estate.video: []}
        assert generation_rows.generations_of(connection, mine, theirs.id) == []
        assert collection_rows.counts(connection, mine, theirs.id) == {}


def test_vectors_are_read_by_their_own_tenant_only(estate: Estate, stranger: Tenant) -> None:
    """Rows of `segments` bear no tenant: the functions that read them must look at whose vector set it is."""
    services = estate.owner.client.app.state.services
    with services.storage.database.write() as connection:
        mine = tenant_rows.tenant_named(connection, stranger.name).id
        owner = tenant_rows.tenant_named(connection, estate.owner.name).id
        generation = collection_rows.active_generation(connection, owner, estate.collection)[1]
        row = {"ordinal": 0, "start": 0.0, "end": 1.0, "pooled": bytes(2), "frames": bytes(2)}
        segment_rows.add_segments(connection, owner, estate.video, generation.vector_set, [row])
        assert (found := segment_rows.segments_after(connection, owner, generation.vector_set, 0, 10))
        assert segment_rows.video_vectors(connection, owner, generation.vector_set, [estate.video]) != {}
        assert segment_rows.segments_after(connection, mine, generation.vector_set, 0, 10) == []
        assert segment_rows.video_vectors(connection, mine, generation.vector_set, [estate.video]) == {}
        assert segment_rows.frame_vectors(connection, mine, generation.vector_set, [found[0]["seq"]]) == {}
        assert segment_rows.has_vectors(connection, owner, estate.video, generation.vector_set)
        assert not segment_rows.has_vectors(connection, mine, estate.video, generation.vector_set)
        segment_rows.drop_vectors(connection, mine, generation.vector_set)
        assert segment_rows.has_vectors(connection, owner, estate.video, generation.vector_set)
        segment_rows.drop_vectors(connection, owner, generation.vector_set)
        assert not segment_rows.has_vectors(connection, owner, estate.video, generation.vector_set)


def test_training_sees_only_the_tenants_own_captions(estate: Estate, stranger: Tenant) -> None:
    services = estate.owner.client.app.state.services
    with services.storage.database.read() as connection:
        mine = tenant_rows.tenant_named(connection, stranger.name).id
        theirs = tenant_rows.tenant_named(connection, estate.owner.name).id
        collection = collection_rows.collection_named(connection, theirs, estate.collection).id
        with pytest.raises(train.TooFewCaptions):
            train.check_captions(connection, mine, collection)
    with pytest.raises(NotFound):
        query.Searcher(services.storage, services.encoder).search(mine, estate.collection, "a ball")
    with pytest.raises(NotFound), services.storage.database.write() as connection:
        tenant_rows.revoke_key(connection, mine, estate.key)
    with pytest.raises(NotFound), services.storage.database.write() as connection:
        video_rows.mark_video_deleted(connection, mine, estate.video)
