"""The configuration file: what is read, and the line that every mistake is reported with."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import GalerneConfig
from serving.config_file import MAX_FILE_BYTES, load, parse
from serving.errors import ConfigError

DIGEST = "0123456789abcdef" * 4
GOOD = f"""\
listen:
  port: 8001
models:
  - id: small
    source: fake:small
    engine: {{dtype: bfloat16, max_model_len: 2048}}
    replicas: {{min: 1, max: 2}}
    slo: {{ttft_p95_s: 1, itl_p95_s: 0.1}}
  - id: org/large
    source: hf:org/large
tenants:
  - id: press
    keys:
      - {{id: newsroom, sha256: "{DIGEST}", expires: 2027-01-31}}
    models: [small]
"""


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml")
    for line in caught.value.problems:
        assert line.startswith("c.yaml:")
        assert "\n" not in line
        assert DIGEST not in line
    return caught.value.problems


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_a_good_file() -> None:
    config = parse(GOOD, "c.yaml")
    assert config.listen.port == 8001
    assert config.model("small").engine == {"dtype": "bfloat16", "max_model_len": 2048}
    assert config.tenants[0].keys[0].expires == date(2027, 1, 31)
    assert config.tenants[0].models == ("small",)


@pytest.mark.parametrize("path", sorted(Path("deployments/config").glob("*.yaml")), ids=str)
def test_the_shipped_files_load(path: Path) -> None:
    assert load(path).models


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("engine:", "engin:", "c.yaml:6: models[0].engin: unknown field; did you mean 'engine'? allowed: adapters"),
        (
            "    slo:",
            "    zzz: 1\n    slo:",
            "c.yaml:8: models[0].zzz: unknown field; allowed: adapters, autoscaling, ",
        ),
        ("min: 1", "mni: 1", "c.yaml:7: models[0].replicas.mni: unknown field; did you mean 'min'? allowed: max, min"),
        (
            "listen:",
            "limit:",
            "c.yaml:1: limit: unknown field; did you mean 'limits'? allowed: admins, demo_keys, gateway",
        ),
        ("port: 8001", "port: many", "c.yaml:2: listen.port: must be an integer, but it is text"),
        ("port: 8001", "port: 70000", "c.yaml:2: listen.port: must be at most 65535"),
        ("  port: 8001", "  - 8001", "c.yaml:1: listen: must be a mapping, but it is a list"),
        ("min: 1", "min: yes", "c.yaml:7: models[0].replicas.min: must be an integer, but it is true or false"),
        ("min: 1", "min: 3", "c.yaml:7: models[0].replicas.max: max (2) is below min (3)"),
        ("min: 1", "min: -1", "c.yaml:7: models[0].replicas.min: must be at least 0"),
        ("min: 1", "min: 0", "c.yaml:7: models[0].replicas.min: 0 needs an `autoscaling` section"),
        (", max: 2}", "}\n    autoscaling: {}", "c.yaml:7: models[0].replicas.max: models with `autoscaling` need it"),
        ("ttft_p95_s: 1", "ttft_p95_s: 0", "c.yaml:8: models[0].slo.ttft_p95_s: must be greater than 0"),
        ("id: small\n", "id: 'a b'\n", "c.yaml:4: models[0].id: must be letters, digits, '.', '_' and '-'"),
        ("id: small\n", "id: 12\n", "c.yaml:4: models[0].id: must be text (put it in quotes), but it is an integer"),
        ("fake:small", "ftp:small", "c.yaml:5: models[0].source: no kind of model source that is known; allowed: p"),
        ("dtype: bfloat16", "trust_remote_code: true", "c.yaml:6: models[0].engine: trust_remote_code cannot be set"),
        ("id: org/large", "id: small", "c.yaml:9: models[1].id: the same value stands twice"),
        ("id: press", "id: Press!", "c.yaml:12: tenants[0].id: must be 1 to 63 lower-case letters"),
        (DIGEST, "beef", "c.yaml:14: tenants[0].keys[0].sha256: must be the 64 lower-case hexadecimal digits"),
        ("2027-01-31", "soon", "c.yaml:14: tenants[0].keys[0].expires: must be a date such as 2027-01-31"),
        ("2027-01-31", "2027-13-45", "c.yaml:14: tenants[0].keys[0].expires: not a plain value"),
        ("[small]", "[small, big]", "c.yaml:15: tenants[0].models[1]: there is no model 'big'; models: org/large, s"),
        ("[small]", "small", "c.yaml:15: tenants[0].models: must be a list, but it is text"),
        ("    source: fake:small\n", "", "c.yaml:4: models[0].source: is missing"),
        ("  port: 8001", "  port: 1\n  port: 2", "c.yaml:3: listen.port: stands twice; it was first given in line 2"),
        ("  port: 8001", "  1: 2", "c.yaml:2: listen: a key must be text; put it in quotes"),
        ("  port: 8001", "  <<: {port: 1}", "c.yaml:2: listen: '<<' is not supported"),
        ("port: 8001", "port: !secret x", "c.yaml:2: listen.port: not a plain value: remove the tag"),
        ("port: 8001", "port: !!python/name:os.system x", "c.yaml:2: listen.port: not a plain value"),
        ("  port: 8001", "\tport: 8001", "c.yaml:2:1: a tab in the indentation"),
        ("port: 8001", "port: host: 1", "c.yaml:2:13: not valid YAML: a ':' where no key can stand"),
        ("port: 8001", "port: @x", "c.yaml:2:9: not valid YAML: a character that YAML reserves"),
        ("port: 8001", "port: *nowhere", "c.yaml:2:9: not valid YAML: an alias ('*name') without its anchor"),
        ("port: 8001", "port: [1, 2", "c.yaml:3:"),
        ("port: 8001", "port: 'open", "c.yaml:"),
        ("models:\n", "models\n", "c.yaml:"),
        ("port: 8001", "port: \x00", "c.yaml:2:9: a control character"),
        ("tenants:", "---\ntenants:", "c.yaml:11:1: not valid YAML: a second document"),
    ],
)
def test_each_mistake_has_its_line(old: str, new: str, expected: str) -> None:
    found = problems(changed(old, new))
    assert found[0].startswith(expected)


def test_every_problem_is_reported_in_the_files_order() -> None:
    text = changed("port: 8001", "port: 0").replace("min: 1", "min: x").replace("id: press", "id: P")
    assert [line.split(":")[1] for line in problems(text)] == ["2", "7", "12"]


def test_a_digest_twice_is_not_repeated() -> None:
    text = GOOD + f'  - id: other\n    keys: [{{id: k, sha256: "{DIGEST}"}}]\n'
    assert problems(text) == (
        "c.yaml:17: tenants[1].keys[0].sha256: the same value stands twice, and has to be unique",
    )


def test_a_key_in_the_wrong_place_is_not_repeated() -> None:
    for old in ("id: newsroom", "port: 8001", "id: small\n", "min: 1", "2027-01-31"):
        name = old.split(":")[0] + ": " if ":" in old else ""
        text = changed(old, f"{name}sk-Secret!{DIGEST}" + ("\n" if old.endswith("\n") else ""))
        assert "sk-Secret" not in "".join(problems(text))


def test_demo_keys_point_at_the_address() -> None:
    text = changed("  port: 8001", "  host: 0.0.0.0") + "demo_keys: true\n"
    assert problems(text)[0].startswith("c.yaml:2: listen.host: demo_keys are public")


def test_anchors_and_aliases() -> None:
    text = changed("replicas: {min: 1, max: 2}", "replicas: &two {min: 1, max: 2}")
    text = text.replace("    source: hf:org/large\n", "    source: hf:org/large\n    replicas: *two\n")
    config = parse(text, "c.yaml")
    assert config.models[1].replicas == config.models[0].replicas


def test_aliases_do_not_explode() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    assert "aliases expand to more than" in problems("\n".join(levels))[0]
    assert "aliases expand to more than" in problems("a: &a [*a]")[0]
    assert "aliases expand to more than" in problems("a: &a {b: *a}")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "c.yaml: the file is empty"),
        ("# nothing\n", "c.yaml: the file is empty"),
        ("- a\n", "c.yaml:1: a configuration is a mapping ('models: …'), not a list"),
        ("\nhello\n", "c.yaml:2: a configuration is a mapping ('models: …'), not a single value"),
        ("{}", "c.yaml:1: models: is missing"),
        ("[" * 100_000, "c.yaml:1: the file holds more than 32 levels"),
        ("a: [" + "1," * 201_000 + "]", "c.yaml:1: the file holds more than 100000 values"),
        ("a" * (MAX_FILE_BYTES + 1), f"c.yaml: larger than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_what_is_no_configuration(text: str, expected: str) -> None:
    found = problems(text) if not expected.startswith("c.yaml: ") else _plain(text)
    assert found[0].startswith(expected)


def _plain(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml")
    return caught.value.problems


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"# ok\n# caf\xe9\n")
    for path, part in (
        (tmp_path / "none.yaml", "none.yaml: there is no such file"),
        (tmp_path, ": this is a directory"),
        (large, "larger than 1048576 bytes"),
        (latin, "latin.yaml:2: not UTF-8 text"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert len(caught.value.problems) == 1
        assert part in caught.value.problems[0]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load(path) == parse(GOOD, "c.yaml")


# No deadline: a busy machine is no failure.
@given(st.text(max_size=60) | st.text(st.sampled_from("a:-[]{}&*!|>%@`'\"#,\n\t ?<1"), max_size=40))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    for whole in (text, GOOD + text, dedent(GOOD).replace("small", text)):
        found: tuple[str, ...] = ("a problem",)
        try:
            assert isinstance(parse(whole, "c.yaml"), GalerneConfig)
        except ConfigError as error:
            found = error.problems
        assert found
        assert all(len(line.splitlines()) == 1 for line in found)
