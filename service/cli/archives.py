"""`polyclip export`, `polyclip import`, `polyclip fsck`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import AsJson, Backbone, Data, Pretrained, TenantName, err, out, settings_from


def export(
    collection: Annotated[str, typer.Argument(help="the collection's name")],
    file: Annotated[Path, typer.Argument(help="the archive to write, a tar")],
    videos: Annotated[bool, typer.Option(help="put the uploaded files in")] = True,
    generations: Annotated[bool, typer.Option("--generations", help="put the vectors of retired generations in too")] = False,
    tenant: TenantName = "default",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Write a collection as one archive. The service may run on."""
    from service.cli.moving import export_collection

    console = None if as_json else err
    done = export_collection(settings_from(data), tenant, collection, file, videos, generations, console)
    if as_json:
        out.print_json(data=done)
    else:
        for why, ids in done["left_out"].items():
            err.print(f"left out, {why}: {', '.join(ids)}", style="yellow", markup=False, soft_wrap=True)
        out.print(f"{file}: {done['videos']} videos, {done['bytes']:,} bytes", markup=False, soft_wrap=True)
    if "damaged" in done["left_out"]:
        raise typer.Exit(1)


def import_(
    file: Annotated[Path, typer.Argument(help="an archive that an export wrote")],
    collection: Annotated[str | None, typer.Option(help="the new collection's name; default: the archive's")] = None,
    re_embed: Annotated[
        bool, typer.Option("--re-embed", help="take in an archive of another backbone: embed its frames, leave its adapters")
    ] = False,
    tenant: TenantName = "default",
    data: Data = None,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    as_json: AsJson = False,
) -> None:
    """Make a collection of an archive: all of it or nothing. The service may run on."""
    from service.cli.moving import import_collection

    settings = settings_from(data, backbone=backbone, pretrained=pretrained)
    done = import_collection(settings, tenant, file, collection, re_embed, None if as_json else err)
    if as_json:
        out.print_json(data=done)
    else:
        if done["adapters_left_out"]:
            err.print(f"left out: {len(done['adapters_left_out'])} adapters of another backbone", style="yellow")
        for video in done["failed"]:
            err.print(f"failed: {video}", style="yellow")
        out.print(f"{done['collection']}: {done['videos']} videos, {done['adapters']} adapters", markup=False)
    if done["failed"]:
        raise typer.Exit(1)


def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="mend what can be mended")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="read every stored file against its sha256")] = False,
    collection: Annotated[str | None, typer.Option(help="this collection alone")] = None,
    tenant: Annotated[str | None, typer.Option(help="this tenant alone; with --collection: whose it is")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Verify rows against files and vectors. The service may run on."""
    from service.cli.moving import check
    from service.upkeep.fsck_videos import Finding

    def show(finding: Finding) -> None:
        if not as_json:
            outcome = finding.outcome or ("can be repaired" if finding.mend else "cannot be repaired")
            line = f"{finding.code}: {finding.object}: {finding.detail} [{outcome}]"
            out.print(line, style="green" if finding.outcome == "repaired" else "yellow", markup=False, soft_wrap=True)

    owner = tenant or ("default" if collection else None)
    found, counts = check(settings_from(data), owner, collection, repair, deep, None if as_json else err, show)
    left = [finding for finding in found if finding.outcome != "repaired"]
    if as_json:
        out.print_json(data={"healthy": not left, "checked": counts, "findings": [finding.to_json() for finding in found]})
    else:
        checked = ", ".join(f"{count} {what}" for what, count in counts.items())
        state = f"{len(found)} findings, {len(found) - len(left)} repaired" if found else "healthy"
        out.print(f"{state}: {checked} checked")
    if left:
        raise typer.Exit(1)
