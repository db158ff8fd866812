"""`polyclip adapters`: the versions of a collection, and files from and to other houses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from service.cli.options import AsJson, Backbone, CollectionName, Data, Pretrained, TenantName, err, out, settings_from

adapters = typer.Typer(no_args_is_help=True, help="Adapters of a collection.")
DTYPES = ("float32", "float16", "bfloat16")


@adapters.command("list")
def list_all(collection: CollectionName, tenant: TenantName = "default", data: Data = None, as_json: AsJson = False) -> None:
    """The adapters of a collection."""
    from service.cli.local import adapter_versions

    versions = adapter_versions(settings_from(data), tenant, collection)
    if as_json:
        out.print_json(data=versions)
        return
    numbers = ("version", "active", "scope", "parameters", "R@1 before", "R@1 after")
    table = Table(Column("id", no_wrap=True, overflow="fold"), *numbers, "created")
    for v in versions:
        recalls = [str(v["metrics"].get(side, {}).get("text_to_video", {}).get("R@1", "-")) for side in ("before", "after")]
        active = "yes" if v["active"] else ""
        table.add_row(v["id"], str(v["version"]), active, v["scope"], f"{v['parameters']:,}", *recalls, v["created_at"][:19])
    out.print(table)


@adapters.command()
def show(adapter_id: str, collection: CollectionName, tenant: TenantName = "default", data: Data = None) -> None:
    """The manifest of an adapter."""
    from service.cli.local import adapter_versions

    found = [v for v in adapter_versions(settings_from(data), tenant, collection, manifests=True) if v["id"] == adapter_id]
    if not found:
        err.print(f"error: there is no adapter {adapter_id!r}", style="red", markup=False)
        raise typer.Exit(1)
    out.print_json(data=found[0])


@adapters.command()
def export(
    to: Annotated[Path, typer.Option("--out", help="file to write")],
    adapter_id: Annotated[str | None, typer.Argument(help="an adapter of --collection; none with --file")] = None,
    collection: Annotated[str | None, typer.Option(help="the collection's name")] = None,
    file: Annotated[Path | None, typer.Option(help="an adapter file instead, with --official")] = None,
    official: Annotated[
        bool, typer.Option("--official", help="for the paper's code: a torch state dict, or safetensors by --out's name")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"with --official: {', '.join(DTYPES)}; default: as it was imported, or float32")
    ] = None,
    without_vocabulary: Annotated[
        bool, typer.Option("--without-vocabulary", help="with --official: leave vocabulary rows out, which that code has not")
    ] = False,
    tenant: TenantName = "default",
    data: Data = None,
) -> None:
    """Write an adapter's file, or with --official a checkpoint that the paper's released code loads."""
    if dtype is not None and (not official or dtype not in DTYPES):
        raise typer.BadParameter(f"--dtype goes with --official and is one of {', '.join(DTYPES)}")
    if without_vocabulary and not official:
        raise typer.BadParameter("--without-vocabulary goes with --official")
    if file is not None:
        if not official or adapter_id is not None or collection is not None:
            raise typer.BadParameter("--file goes with --official, without an adapter id and --collection")
        from service.cli.files import export_official

        size = export_official(file, to, dtype, without_vocabulary)
    else:
        if adapter_id is None or collection is None:
            raise typer.BadParameter("give an adapter id and its --collection, or --file")
        from service.cli.local import export_adapter

        size = export_adapter(settings_from(data), tenant, collection, adapter_id, to, official, dtype, without_vocabulary)
    out.print(f"{to}: {size:,} bytes", markup=False, soft_wrap=True)


@adapters.command("import")
def import_file(file: Path, collection: CollectionName, tenant: TenantName = "default", data: Data = None) -> None:
    """Publish an adapter file as a collection's next version."""
    from service.cli.local import import_adapter

    version = import_adapter(settings_from(data), tenant, collection, file)
    out.print(f"{version.id}: version {version.version}, sha256 {version.digest[:12]}", markup=False)


@adapters.command("import-official")
def import_official(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="a checkpoint of the paper's code, .pt or safetensors")],
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    to: Annotated[Path | None, typer.Option("--out", help="the adapter file to write, safetensors")] = None,
    collection: Annotated[str | None, typer.Option(help="publish as this collection's next version instead")] = None,
    tenant: TenantName = "default",
    data: Data = None,
) -> None:
    """Read the adapter in a checkpoint of the paper's released code, for --backbone (or the data folder's)."""
    if (to is None) == (collection is None):
        raise typer.BadParameter("give either --out or --collection")
    if to is not None:
        if backbone is None:
            raise typer.BadParameter("--out needs --backbone")
        from service.cli.files import convert_official

        size = convert_official(checkpoint, backbone, pretrained, to)
        out.print(f"{to}: {size:,} bytes", markup=False, soft_wrap=True)
    elif collection is not None:
        from service.cli.local import import_adapter

        settings = settings_from(data, backbone=backbone, pretrained=pretrained)
        version = import_adapter(settings, tenant, collection, checkpoint, official=True)
        out.print(f"{version.id}: version {version.version}, sha256 {version.digest[:12]}", markup=False)
