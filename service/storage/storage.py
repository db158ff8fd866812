"""A data folder: its settings, its database and its files."""

from __future__ import annotations

import secrets
import stat
from contextlib import suppress
from pathlib import Path

from adapters_store import durable
from service.settings import Settings
from service.storage import facts, keys
from service.storage.blobs import Blobs
from service.storage.database import Database


class Storage:
    """One per process. `prepare` must have run once on the data folder, by this process or another."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        durable.make_folder(settings.data)
        _close_to_others(settings.data)
        self.database = Database(settings.database, settings.database_connections, settings.database_seconds)
        self.blobs = Blobs(settings.blob_root, settings.scratch)

    def prepare(self) -> str | None:
        """Schema, signing secret and operator's key; returns that key in clear if it was made just now."""
        self.database.migrate(self.settings.data / "migrate.lock")
        made = keys.new_key()[1]
        with self.database.write() as connection:
            facts.keep_fact(connection, "signing_secret", secrets.token_hex(32))
            if self.settings.root_key is not None:
                facts.set_fact(connection, "root_key_hash", keys.hash_key(self.settings.root_key))
                return None
            return made if facts.keep_fact(connection, "root_key_hash", keys.hash_key(made)) == keys.hash_key(made) else None

    def close(self) -> None:
        self.database.close()


def _close_to_others(data: Path) -> None:
    """Folders 0700 and files 0600, at the top of a data folder that an earlier version has made; what is below is shut off."""
    if not (data / "polyclip.sqlite").exists():
        return
    for path in (data, *data.iterdir()):
        mode = path.lstat().st_mode
        if mode & 0o077 and ((stat.S_ISDIR(mode) and not mode & stat.S_ISVTX) or stat.S_ISREG(mode)):
            with suppress(PermissionError, FileNotFoundError):  # somebody else's, or gone meanwhile
                path.chmod(mode & 0o700)
