import json
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bluejay.accounts import keys
from bluejay.accounts.store import Store
from bluejay.cli import app
from bluejay.cli.accounts import parse_moment
from bluejay.errors import ConfigError, InvalidRequest

from ..accounts.rows import NOON, usage


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no settings."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("CONFIG", "DATABASE"):
        monkeypatch.delenv(f"BLUEJAY_{name}", raising=False)
    return tmp_path


@pytest.fixture
def store() -> Iterator[Store]:
    """The store that the verbs use."""
    opened = Store.open()
    yield opened
    opened.close()


def run(line: str, columns: int = 120) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, shlex.split(line))


def done(line: str) -> str:
    result = run(line)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(line: str) -> str:
    result = run(line)
    assert isinstance(result.exception, InvalidRequest), result.output
    return str(result.exception)


# bluejay keys


def test_a_key_is_shown_once_with_how_to_use_it(store: Store) -> None:
    result = run("keys create laptop")
    text = result.stdout.strip()
    record = store.find_key(keys.digest_of(text))
    assert record is not None
    assert (record.name, record.scopes, record.expires_at) == ("laptop", ("user",), None)
    assert record.project.name == "default"
    assert "a key for laptop in the project default, plan free:" in result.stderr
    assert "it is shown this once and cannot be had again" in result.stderr
    assert 'curl -H "Authorization: Bearer $KEY" http://127.0.0.1:8000/v1/models' in result.stderr
    assert text not in result.stderr
    assert text not in done("keys list") + done("keys list --json")


def test_a_key_for_an_administrator_that_expires(store: Store) -> None:
    done("projects create research")
    result = run("keys create operator --project research --admin --expires 30d")
    record = store.find_key(keys.digest_of(result.stdout.strip()))
    assert record is not None
    assert record.scopes == ("user", "admin")
    assert record.expires_at is not None
    assert abs(record.expires_at - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)
    assert f", valid until {record.expires_at:%Y-%m-%d %H:%M} UTC" in result.stderr


def test_a_project_other_than_the_default_must_be_there(store: Store) -> None:
    assert "there is no project 'research'" in refusal("keys create laptop --project research")
    assert "expires_at is 2020-01-01 00:00, which is over" in refusal("keys create laptop --expires 2020-01-01")
    assert not store.has_keys()


def test_keys_are_listed_and_revoked(store: Store) -> None:
    assert "make one with: bluejay keys create NAME" in run("keys list").stderr
    assert json.loads(done("keys list --json")) == []
    text = done("keys create '[b]laptop'").strip()
    done("keys create phone")
    assert done(f"keys revoke {text[:11]}…") == f"{text[:11]}… ([b]laptop, project default) is revoked\n"
    heading, laptop, phone = done("keys list").splitlines()
    assert heading.split() == ["Key", "Name", "Project", "Scopes", "State", "Created", "Expires", "Last", "used"]
    assert laptop.split()[:5] == [text[:11], "[b]laptop", "default", "user", "revoked"]
    assert phone.split()[4] == "valid"
    assert f"there is no key '{text[:11]}'" not in run(f"keys revoke {text}").output
    assert "there is no key 'bj-nothing'" in refusal("keys revoke bj-nothing")


def test_what_a_key_begins_with_is_whole_in_a_narrow_terminal(store: Store) -> None:
    text = done("keys create laptop").strip()
    assert text[:11] in run("keys list", columns=50).stdout


def test_the_list_as_json_tells_the_state(store: Store) -> None:
    done("keys create laptop")
    done("projects disable default")
    (row,) = json.loads(done("keys list --json"))
    assert (row["name"], row["project"], row["state"], row["scopes"]) == (
        "laptop",
        "default",
        "project disabled",
        ["user"],
    )
    assert set(row) == {"id", "prefix", "name", "project", "scopes", "state"} | {
        f"{what}_at" for what in ("created", "expires", "revoked", "last_used")
    }


# bluejay projects


def test_projects_are_made_listed_and_changed(store: Store, home: Path) -> None:
    assert "make one with: bluejay projects create NAME" in run("projects list").stderr
    assert "bluejay keys create NAME --project research" in done("projects create research --plan premium")
    assert done("projects plan research developer") == "project research is on the plan developer\n"
    assert "bluejay projects enable research" in done("projects disable research")
    (row,) = json.loads(done("projects list --json"))
    assert (row["name"], row["plan"]) == ("research", "developer")
    assert row["disabled_at"] is not None
    assert "disabled" in done("projects list")
    assert done(f"projects enable {row['id']}") == "project research is enabled\n"
    assert "enabled" in done("projects list")


def test_plans_are_those_of_the_package_and_of_the_settings_file(home: Path) -> None:
    assert "there is no plan 'gold', only free, developer, premium" in refusal("projects create research --plan gold")
    (home / "config" / "bluejay").mkdir(parents=True)
    (home / "config" / "bluejay" / "config.toml").write_text("[plans.gold]\npriority = 50\n")
    done("projects create research --plan gold")
    assert "only free, developer, premium, gold" in refusal("projects plan research silver")
    (home / "config" / "bluejay" / "config.toml").write_text("[plans.gold]\nprio = 50\n")
    assert isinstance(run("projects plan research gold").exception, ConfigError)


# bluejay usage


def test_usage_is_added_up(store: Store) -> None:
    assert "no usage in that time" in run("usage").stderr
    research = store.create_project("research")
    store.record_usage(
        [
            usage("1", project_id=research.id),
            usage("2", generated_tokens=4000),
            usage("3", started_at=NOON + timedelta(1)),
        ]
    )
    heading, *rows = done("usage").splitlines()
    assert heading.split() == ["Project", "Requests", "Prompt", "tokens", "of", "them", "cached", "Generated", "Tokens"]
    assert [row.split() for row in rows] == [
        ["(without", "a", "key)", "2", "6", "2", "4,005", "4,011"],
        ["research", "1", "3", "1", "5", "8"],
        ["all", "3", "9", "3", "4,010", "4,019"],
    ]
    assert json.loads(done("usage --by day --project research --json")) == [
        {
            "day": "2026-01-31",
            "num_requests": 1,
            "prompt_tokens": 3,
            "cached_tokens": 1,
            "generated_tokens": 5,
            "num_tokens": 8,
        }
    ]
    assert [row["day"] for row in json.loads(done("usage --by day --since 2026-02-01 --json"))] == ["2026-02-01"]
    assert [row["num_requests"] for row in json.loads(done("usage --by model --until 2026-02-01 --json"))] == [2]
    assert "all" not in done("usage --by model --until 2026-02-01")
    assert "there is no project 'nobody'" in refusal("usage --project nobody")


# What they share


def test_the_database_is_named_by_flag_or_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(f"projects create one --database sqlite:///{home}/one.db")
    monkeypatch.setenv("BLUEJAY_DATABASE", f"sqlite:///{home}/two.db")
    done("projects create two")
    assert [row["name"] for row in json.loads(done("projects list --json"))] == ["two"]
    line = f"projects list --json --database sqlite:///{home}/one.db"
    assert [row["name"] for row in json.loads(done(line))] == ["one"]
    assert not (home / "data").exists()


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T12:30", datetime(2026, 1, 31, 12, 30, tzinfo=UTC)),
        ("2026-01-31T12:30+02:00", datetime(2026, 1, 31, 10, 30, tzinfo=UTC)),
    ],
)
def test_moments_are_utc_unless_they_name_a_zone(text: str, moment: datetime) -> None:
    assert parse_moment(text, "since", direction=-1) == moment


@pytest.mark.parametrize(("text", "span"), [("90m", 1.5), ("12h", 12), ("7d", 168), ("4w", 672)])
@pytest.mark.parametrize("direction", [1, -1])
def test_spans_count_from_now(text: str, span: float, direction: int) -> None:
    found = parse_moment(text, "since", direction=direction)
    assert abs(found - datetime.now(UTC) - direction * timedelta(hours=span)) < timedelta(minutes=1)


@pytest.mark.parametrize("text", ["", "yesterday", "30", "d", "-3d", "999999w", "2026-13-01", "\u0663d"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a date as 2026-01-31"):
        parse_moment(text, "expires", direction=1)


@pytest.mark.parametrize(
    "verb",
    [
        *(f"keys {name}" for name in ("create", "list", "revoke")),
        *(f"projects {name}" for name in ("create", "list", "plan", "disable", "enable")),
        "usage",
    ],
)
def test_help_has_examples(verb: str) -> None:
    assert f"bluejay {verb}" in done(f"{verb} --help")
