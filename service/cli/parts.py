"""What a process works with that runs jobs or commands by itself."""

from __future__ import annotations

from dataclasses import dataclass

from indexer.decode import Decoder
from service.adapters.encoder import Encoder
from service.settings import Settings
from service.storage.storage import Storage
from service.videos.decoders import Decoders


@dataclass(frozen=True, slots=True)
class Parts:
    storage: Storage
    encoder: Encoder
    decoders: Decoders

    @classmethod
    def over(cls, settings: Settings, decoder: Decoder = "pyav") -> Parts:
        storage = Storage(settings)
        storage.prepare()
        return cls(storage, Encoder(storage), Decoders(settings, decoder))

    def close(self) -> None:
        self.encoder.close()
        self.decoders.close()
        self.storage.close()
