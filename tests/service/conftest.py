"""One real server with its worker for all tests of the service, and an application in this process for quick ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server, Tenant, new_database, new_tenant
from workshop import Workshop, application

ON_BOTH = (
    "test_alerts", "test_captions", "test_cleanup", "test_errors", "test_feedback", "test_filters", "test_keys",
    "test_requests", "test_tenancy",
)  # fmt: skip
DATABASES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`polyclip serve` with its worker, on a data folder of its own."""
    running = Server(tmp_path_factory.mktemp("server") / "data").start()
    yield running
    running.stop()


@pytest.fixture
def tenant(server: Server) -> Tenant:
    """A fresh tenant of the real server."""
    return new_tenant(server.client)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests of these modules that ask an application in this process do so on either database, or on the one they name."""
    if "client" in metafunc.fixturenames and metafunc.module.__name__ in ON_BOTH:
        only = metafunc.definition.get_closest_marker("postgres") is not None
        metafunc.parametrize("client", DATABASES[1:] if only else DATABASES, indirect=True, scope="module")


@pytest.fixture(scope="session")
def sqlite_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with application(tmp_path_factory.mktemp("application") / "data") as running:
        yield running


@pytest.fixture(scope="session")
def postgres_client(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Iterator[Any]:
    data = tmp_path_factory.mktemp("application") / "data"
    with application(data, database_url=new_database(postgres)) as running:
        yield running


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(
        "postgres_client" if getattr(request, "param", "sqlite") == "postgresql" else "sqlite_client"
    )


@pytest.fixture
def guest(client: Any) -> Tenant:
    """A fresh tenant of the application in this process."""
    return new_tenant(client)


@pytest.fixture
def workshop(guest: Tenant) -> Workshop:
    """That tenant, with hands that do its tasks."""
    return Workshop(guest)


@pytest.fixture
def empty_postgres(postgres: str) -> str:
    return new_database(postgres)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pgserver

            server = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")  # type: ignore[attr-defined]
    except Exception as error:
        if "postgres" in os.environ.get("POLYCLIP_REQUIRE", ""):
            raise
        pytest.skip(f"no PostgreSQL here: {type(error).__name__}: {error}")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()
