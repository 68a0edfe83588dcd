"""`galerne keys new | list | revoke`: what a platform team does with keys.

The configuration is never rewritten: comments, order and what a team's own tools generate would be lost. Each command
says what to write and in which line, and checks what it can beforehand; gateways take the change by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from serving.api.auth import new_key
from serving.config import NAME, CredentialConfig, GalerneConfig, KeyConfig
from serving.config_file import Located, load, locate
from serving.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
console = Console()

SOON_DAYS = 30
PLACEHOLDER = "0" * 60
ADMINS = "(administrator)"

FileOption = Annotated[
    Path | None, typer.Option("--file", help="Configuration file: says where the key goes, and checks that it fits.")
]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="Tenant of the key.")]


@app.command("new")
def new(
    name: Annotated[str, typer.Option("--id", help="Id of the key within its tenant.")] = "key-1",
    tenant: TenantOption = None,
    expires: Annotated[
        str | None,
        typer.Option(help="Last good day (2027-01-31), or a time with its zone (2027-01-31T18:00:00+01:00)."),
    ] = None,
    scope: Annotated[list[str] | None, typer.Option(help="What it opens; several times for several.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use; several times for several.")] = None,
    network: Annotated[list[str] | None, typer.Option(help="A network it is good from (10.0.0.0/8).")] = None,
    file: FileOption = None,
) -> None:
    """Make a key: shown once here, stored nowhere; the configuration keeps its digest."""
    key, digest = new_key()
    fields = {"expires": expires, "scopes": scope, "models": model, "networks": network}
    given = {name: value for name, value in fields.items() if value}
    try:
        KeyConfig.model_validate({"id": name, "sha256": digest} | given)
    except ValidationError as error:
        raise ConfigError(tuple(_sentence(*e["loc"], text=e["msg"]) for e in error.errors())) from None
    where = "for tenants[].keys in the configuration:"
    if file is not None:
        where = f"for {_place(load(file), file, tenant, name, model)}:"
    console.print(f"key (shown once): {key}", soft_wrap=True, highlight=False)
    console.print(where, soft_wrap=True, highlight=False, markup=False)
    parts = [f"id: {name}", f'sha256: "{digest}"']
    parts += [f"{field}: {_yaml(value)}" for field, value in given.items()]
    console.print(f"  - {{{', '.join(parts)}}}", soft_wrap=True, highlight=False, markup=False)


@app.command("list")
def list_keys(
    file: Annotated[Path, typer.Argument(help="Configuration file.", metavar="FILE")],
    tenant: TenantOption = None,
    expiring: Annotated[bool, typer.Option("--expiring", help=f"Only those that end within {SOON_DAYS} days.")] = False,
) -> None:
    """List keys by id with what they open and until when; never a digest."""
    view = Table("tenant", "key", "state", "scopes", "models", "networks")
    for column in view.columns[:2]:
        column.no_wrap = True
    now = datetime.now(UTC)
    for owner, key in _keys(load(file)):
        told = state(key, now)
        if (tenant is not None and owner != tenant) or (expiring and not told.startswith("ends in")):
            continue
        own = key if isinstance(key, KeyConfig) else None
        view.add_row(
            owner,
            key.id,
            told,
            " ".join(own.scopes) if own else "ops",
            "-" if own is None else "all of its tenant" if own.models is None else " ".join(own.models),
            "any" if key.networks is None else " ".join(map(str, key.networks)),
        )
    console.print(view)


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Option("--id", help="Id of the key.")],
    file: Annotated[Path, typer.Option("--file", help="Configuration file.")],
    tenant: TenantOption = None,
) -> None:
    """Say where a key stands and what ends it: gateways take the change within 3 s, running answers are finished."""
    config = load(file)
    found = _where(config, tenant, lambda key: key.id == name)
    if not found:
        raise ConfigError((f"{file}: there is no key {name!r}{f' of tenant {tenant!r}' if tenant else ''}",))
    for where in found:
        at = locate(file, config, where)
        console.print(f"{at.file}:{at.line}: add `revoked: true` to this key,", soft_wrap=True, highlight=False)
    console.print("and leave it there while its old holder may still try: the gateway's log then says who does.")


def placeholders(config: GalerneConfig) -> tuple[str, ...]:
    """Keys whose digest is an example's, zeros and a digit: nobody can hold them."""
    return tuple(f"{owner}/{key.id}" for owner, key in _keys(config) if key.sha256.startswith(PLACEHOLDER))


def state(key: CredentialConfig, now: datetime) -> str:
    """Whether a key is good, and for how long."""
    if key.revoked:
        return "revoked"
    if key.expires is None:
        return "good"
    left_s = key.expires_s - now.timestamp()
    if left_s <= 0:
        return f"expired ({key.expires})"
    days = int(left_s // 86400)
    return f"ends in {days} days ({key.expires})" if days <= SOON_DAYS else f"good until {key.expires}"


def _keys(config: GalerneConfig) -> list[tuple[str, CredentialConfig]]:
    found: list[tuple[str, CredentialConfig]] = [(tenant.id, key) for tenant in config.tenants for key in tenant.keys]
    return found + [(ADMINS, key) for key in config.admins]


def _where(
    config: GalerneConfig, tenant: str | None, fits: Callable[[CredentialConfig], bool]
) -> list[tuple[str | int, ...]]:
    found: list[tuple[str | int, ...]] = [
        ("tenants", i, "keys", j)
        for i, owner in enumerate(config.tenants)
        for j, key in enumerate(owner.keys)
        if fits(key) and tenant in {None, owner.id}
    ]
    admins: list[tuple[str | int, ...]] = [("admins", i) for i, key in enumerate(config.admins) if fits(key)]
    return found + (admins if tenant is None else [])


def _place(config: GalerneConfig, file: Path, tenant: str | None, name: str, models: list[str] | None) -> str:
    """Where the key goes; raises ConfigError where it could not stand."""
    if tenant is None:
        raise ConfigError(("--tenant is missing: with --file it has to be known whose key this is",))
    names = [owner.id for owner in config.tenants]
    if tenant not in names:
        raise ConfigError((f"{file}: there is no tenant {tenant!r}; tenants: {', '.join(names)}",))
    number = names.index(tenant)
    owner = config.tenants[number]
    if any(key.id == name for key in owner.keys):
        raise ConfigError((f"{file}: tenant {tenant!r} has a key {name!r} already: give another --id",))
    known = {name for m in config.models for name in m.names} if owner.models is None else set(owner.models)
    if unknown := sorted(set(models or ()) - known):
        raise ConfigError(
            (f"{file}: tenant {tenant!r} has no model {unknown[0]!r}; models: {', '.join(sorted(known))}",)
        )
    at: Located = locate(file, config, ("tenants", number, "keys"))
    return f"{at.file}:{at.line}: tenants[{number}].keys ({tenant})"


def _yaml(value: str | list[str]) -> str:
    """A value as YAML has it; what could be read as something else in quotes."""
    if isinstance(value, list):
        return f"[{', '.join(_yaml(word) for word in value)}]"
    plain = re.fullmatch(NAME, value) or re.fullmatch(r"\d{4}-\d{2}-\d{2}(T[\d:+\-Z.]+)?", value)
    return value if plain else f'"{value}"'


def _sentence(*where: str | int, text: str) -> str:
    return f"{'.'.join(map(str, where))}: {text.removeprefix('Value error, ')}"
