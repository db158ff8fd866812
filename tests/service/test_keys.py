"""Who may look: the operator's key and its strength, guessed keys, keys that end while a stream runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from serving import ROOT, ROOT_KEY, Tenant, clip, new_tenant
from test_errors import check_problem
from workshop import application

from service.app import create_app
from service.settings import Settings
from service.storage.keys import Guesses, TooManyWrongKeys


@pytest.mark.parametrize("key", ["x", "", "a" * 40, "abcabcabcabcabcabc", "with spaces in the key", "schlüssel-der-wahl"])
def test_a_root_key_that_can_be_guessed_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValidationError, match="16 or more"):
        Settings(data=tmp_path, root_key=key)


def test_metrics_are_for_the_operator(client: Any, guest: Tenant) -> None:
    check_problem(client.get("/metrics"), 401, "missing_key")
    check_problem(guest.call("GET", "/metrics"), 403, "role_too_low")
    assert "polyclip_requests" in client.get("/metrics", headers=ROOT).text


def test_a_setting_opens_the_metrics(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    settings = Settings(data=tmp_path / "data", root_key=ROOT_KEY, threads=1, metrics_open=True)
    with TestClient(create_app(settings)) as open_one:
        assert open_one.get("/metrics").status_code == 200


def test_an_address_that_guesses_waits_and_good_keys_go_on(tmp_path: Path) -> None:
    with application(tmp_path / "data") as client:
        guest = new_tenant(client)  # none of whose keys has been used yet
        made = client.post(f"/admin/tenants/{guest.name}/keys", json={"role": "search"}, headers=ROOT).json()
        client.delete(f"/admin/tenants/{guest.name}/keys/{made['id']}", headers=ROOT)
        limit = client.app.state.services.storage.settings.wrong_keys  # type: ignore[attr-defined]
        statuses = [client.get("/collections", headers={"X-API-Key": f"pc_{i}_x"}).status_code for i in range(limit + 1)]
        assert statuses == [401] * limit + [429]
        answer = client.get("/collections", headers={"X-API-Key": "pc_other_x"})
        check_problem(answer, 429, "too_many_wrong_keys")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert guest.call("GET", "/collections").status_code == 200
        revoked = client.get("/collections", headers={"X-API-Key": made["key"]})
        check_problem(revoked, 401, "invalid_key")
        check_problem(client.get("/collections"), 401, "missing_key")


def test_guesses_of_one_address_hinder_no_other_and_their_memory_is_bounded() -> None:
    guesses = Guesses(2)
    for _ in range(2):
        guesses.wrong("2001:db8::1")
        guesses.wrong("192.0.2.1")
    for address in ("2001:db8::2", "192.0.2.1"):
        with pytest.raises(TooManyWrongKeys):
            guesses.wrong(address)
    for address in ("2001:db8:0:1::1", "192.0.2.2", ""):
        guesses.wrong(address)
    for number in range(Guesses.ROOM + 10):
        guesses.wrong(f"address {number}")
    assert len(guesses._wrong) == Guesses.ROOM


def waiting_task(guest: Tenant) -> str:
    return str(guest.upload(guest.collection(), clip(1)).json()["task_id"])


def test_a_revoked_key_ends_its_event_stream(client: Any, guest: Tenant) -> None:
    task, house = waiting_task(guest), client.app.state.services
    made = client.post(f"/admin/tenants/{guest.name}/keys", json={"role": "write"}, headers=ROOT).json()
    import threading
    import time

    def revoke() -> None:
        while not house.streams[made["id"]]:
            time.sleep(0.01)
        client.delete(f"/admin/tenants/{guest.name}/keys/{made['id']}", headers=ROOT)

    revoker = threading.Thread(target=revoke)
    revoker.start()
    answer = client.get(f"/tasks/{task}/events", headers={"X-API-Key": made["key"]})  # returns when the stream ends
    revoker.join()
    assert answer.text.count("event: task") == 1
    assert made["id"] not in house.streams or not house.streams[made["id"]]


def test_a_key_holds_so_many_event_streams_and_no_more(client: Any, guest: Tenant) -> None:
    task, house = waiting_task(guest), client.app.state.services
    made = client.post(f"/admin/tenants/{guest.name}/keys", json={"role": "write"}, headers=ROOT).json()
    house.streams[made["id"]] = house.storage.settings.event_streams
    try:
        answer = client.get(f"/tasks/{task}/events", headers={"X-API-Key": made["key"]})
        check_problem(answer, 429, "too_many_streams")
    finally:
        del house.streams[made["id"]]
