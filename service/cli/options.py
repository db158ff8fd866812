"""What the modules of the command line share: consoles, common options, settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from service.settings import Settings

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Data = Annotated[Path | None, typer.Option(help="data folder (POLYCLIP_DATA; default ./polyclip-data)")]
Backbone = Annotated[str | None, typer.Option(help="builtin, or an open_clip model: `polyclip backbones` lists some")]
Pretrained = Annotated[str | None, typer.Option(help="its weights: a tag, a file, a repository of the hub, or 'random'")]
TenantName = Annotated[str, typer.Option(help="whose collection it is")]
CollectionName = Annotated[str, typer.Option(help="the collection's name")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def settings_from(data: Path | None, **values: Any) -> Settings:
    """Settings from the environment, with what the command line gives on top."""
    from service.settings import Settings

    given = {name: value for name, value in values.items() if value is not None}
    if data is not None:
        given["data"] = data
    return Settings(**given)
