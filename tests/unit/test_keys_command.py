"""`galerne keys`, and the example of four organisations that it is used on."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serving.api.auth import digest
from serving.api.auth.keys import KeyRing
from serving.cli import app
from serving.cli.keys import placeholders, state
from serving.config import KeyConfig
from serving.config_file import load
from serving.errors import ConfigError

EXAMPLE = Path(str(files("deployments") / "config" / "tenants.yaml"))


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["keys", *arguments], env={"COLUMNS": "200"})
    if done.exception is not None:
        raise done.exception
    return done.stdout


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*arguments)
    return str(caught.value)


def test_a_new_key_fits_where_it_is_said_to_go(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(EXAMPLE.read_text())
    options = ("--expires", "2028-01-31T18:00:00+01:00", "--scope", "inference", "--model", "chat-small")
    out = run(
        "new",
        "--tenant",
        "newspaper",
        "--id",
        "desk",
        *options,
        "--network",
        "10.0.0.0/8",
        "--file",
        str(tmp_path / "c.yaml"),
    )
    key = out.split("key (shown once): ")[1].split()[0]
    where, line = re.search(r"for .*c\.yaml:(\d+): (.*):\n", out).groups(), out.splitlines()[-1]  # type: ignore[union-attr]
    assert where[1] == "tenants[3].keys (newspaper)"
    text = EXAMPLE.read_text().splitlines()
    assert text[int(where[0]) - 1].strip() == "keys:"
    text.insert(int(where[0]), f"    {line}")
    (tmp_path / "c.yaml").write_text("\n".join(text))
    config = load(tmp_path / "c.yaml")
    identity, reason = KeyRing(config.tenants).find(bytes.fromhex(digest(key)), 0.0)
    assert (identity.tenant_id, identity.key_id, identity.models, reason) == ("newspaper", "desk", {"chat-small"}, None)
    # The comments are where they were.
    assert [row for row in text if row.lstrip().startswith("#")] == [
        row for row in EXAMPLE.read_text().splitlines() if row.lstrip().startswith("#")
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--tenant", "nobody", "--file", str(EXAMPLE)], "there is no tenant 'nobody'; tenants: press-agency"),
        (["--file", str(EXAMPLE)], "--tenant is missing"),
        (["--tenant", "newspaper", "--id", "editors", "--file", str(EXAMPLE)], "has a key 'editors' already"),
        (["--tenant", "newspaper", "--model", "chat-large", "--file", str(EXAMPLE)], "has no model 'chat-large'"),
        (["--expires", "tomorrow"], "expires: must be a date"),
        (["--expires", "2027-01-31T18:00:00"], "expires: a time needs its zone"),
        (["--scope", "admin"], "scopes"),
        (["--network", "10.0.0.1/8"], "networks"),
        (["--id", "Key 1"], "id"),
    ],
)
def test_what_would_not_fit_is_no_key(options: list[str], problem: str) -> None:
    assert problem in refused("new", *options)


def test_the_snippet_is_yaml_as_it_stands() -> None:
    out = run("new", "--expires", "2027-01-31", "--model", "org/chat-1.5", "--network", "2001:db8::/32")
    (found,) = yaml.safe_load(out.splitlines()[-1])
    key = KeyConfig.model_validate(found)
    assert (key.models, str((key.networks or ())[0]), str(key.expires)) == (
        ("org/chat-1.5",),
        "2001:db8::/32",
        "2027-01-31",
    )


def test_keys_are_listed_without_a_digest() -> None:
    out = run("list", str(EXAMPLE))
    assert all(name in out for name in ("newsroom-2026", "counsellors", "editors", "10.20.0.0/16", "monitoring"))
    assert "000000" not in out
    assert "editors" not in run("list", str(EXAMPLE), "--tenant", "erp-vendor")


def test_the_state_of_a_key() -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    key = KeyConfig(id="k", sha256="0" * 64)
    assert state(key, now) == "good"
    for days, told in ((-1, "expired"), (5, "ends in 5 days"), (100, "good until")):
        assert state(key.model_copy(update={"expires": now + timedelta(days=days)}), now).startswith(told)
    assert state(key.model_copy(update={"revoked": True}), now) == "revoked"


def test_revoking_names_the_line() -> None:
    out = run("revoke", "--id", "editors", "--file", str(EXAMPLE))
    line = int(re.search(r"tenants\.yaml:(\d+): add `revoked: true`", out).group(1))  # type: ignore[union-attr]
    assert "id: editors" in EXAMPLE.read_text().splitlines()[line - 1]
    assert "there is no key 'nobody'" in refused("revoke", "--id", "nobody", "--file", str(EXAMPLE))


def test_the_example_is_what_it_says() -> None:
    config = load(EXAMPLE)
    ring = {tenant.id: tenant for tenant in config.tenants}
    assert set(ring) == {"press-agency", "employment-service", "erp-vendor", "newspaper"}
    assert ring["employment-service"].labels["residency"] == "fr"
    # No key of anybody: a digest of zeros and a digit.
    assert all(key.sha256.startswith("0" * 63) for tenant in config.tenants for key in tenant.keys)
    assert len(placeholders(config)) == 8
