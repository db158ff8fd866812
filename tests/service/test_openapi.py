"""What /openapi.json promises: a client generated from it is typed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from service.app import create_app
from service.http import answers, answers_alerts, answers_feedback, answers_search, batch
from service.http.examples import EXAMPLES
from service.settings import Settings

MODELS = (answers, answers_alerts, answers_feedback, answers_search, batch)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data=tmp_path_factory.mktemp("openapi") / "data")).openapi()


def _operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for methods in document["paths"].values() for operation in methods.values()]


def _model(document: dict[str, Any], media: dict[str, Any]) -> dict[str, Any]:
    name: str = media["schema"]["$ref"].removeprefix("#/components/schemas/")
    found: dict[str, Any] = document["components"]["schemas"][name]
    return found


def test_every_operation_has_a_name_of_its_own_and_a_summary(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in _operations(document)]
    assert len(set(names)) == len(names) >= 37
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", name) for name in names)
    assert {"search", "upload_video", "list_videos", "train_adapter", "get_task"} <= set(names)
    assert all(operation["summary"] and operation["description"] for operation in _operations(document))


def test_every_answer_in_json_is_a_model_with_an_example(document: dict[str, Any]) -> None:
    for operation in _operations(document):
        good = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
        assert good, operation["operationId"]
        for status, answer in good.items():
            content = answer.get("content", {})
            assert bool(content) == (status != "204"), operation["operationId"]
            for media_type, media in content.items():
                if media_type == "application/json":
                    model = _model(document, media)
                    assert model["properties"] and model["examples"], operation["operationId"]
                else:
                    assert media["schema"]["type"] == "string", operation["operationId"]


def test_every_error_is_a_problem_document(document: dict[str, Any]) -> None:
    for operation in _operations(document):
        for status, answer in operation["responses"].items():
            if status >= "400" and operation["operationId"] != "get_readiness":
                assert list(answer["content"]) == ["application/problem+json"], (operation["operationId"], status)
                assert "request_id" in _model(document, answer["content"]["application/problem+json"])["properties"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_an_answer_as_its_model_gives_it(document: dict[str, Any], name: str) -> None:
    model = next(getattr(module, name) for module in MODELS if hasattr(module, name))
    example = EXAMPLES[name]
    assert model.model_validate(example).model_dump(mode="json") == example
    assert document["components"]["schemas"][name]["examples"] == [example]


def test_what_may_be_set_is_what_is_answered() -> None:
    from service.http.schemas import Quotas
    from service.settings import CollectionSettings

    assert list(answers.SettingsOut.__annotations__) == list(CollectionSettings.model_fields)
    assert list(answers.QuotasOut.__annotations__) == list(Quotas.model_fields)


def test_the_routes_take_files_as_the_document_says(document: dict[str, Any]) -> None:
    forms = [o["operationId"] for o in _operations(document) if "multipart/form-data" in str(o.get("requestBody"))]
    assert forms == ["search_by_image", "upload_video", "import_adapter", "import_collection"]
