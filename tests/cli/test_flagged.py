import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bluejay.accounts.store import Store
from bluejay.cli import app
from bluejay.errors import InvalidRequest


@pytest.fixture
def database(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/accounts.db"
    store = Store.open(url)
    for number in range(3):
        store.add_flagged(
            request_id="r",
            project_id=None,
            model="jay",
            rule="rude",
            action="mask",
            prompt=f"prompt {number}",
            text=f"[red]tëxt\n{number}",
        )
    store.close()
    return url


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["flagged", *args])


def test_generations_are_listed(database: str) -> None:
    done = run("list", "--database", database)
    assert done.exit_code == 0
    assert "rude" in done.stdout
    found = json.loads(run("list", "--database", database, "--json", "--after", "1", "--limit", "1").stdout)
    assert [(record["id"], record["text"], record["status"]) for record in found] == [(2, "[red]tëxt\n1", "pending")]
    assert "there may be more: --after 2" in run("list", "--database", database, "--limit", "2").stderr
    assert "nothing here" in run("list", "--database", database, "--status", "accepted").stderr


def test_generations_are_accepted_and_rejected(database: str) -> None:
    done = run("accept", "1", "3", "--note", "a quotation", "--reviewer", "Ada", "--database", database)
    assert done.stdout == "1 accepted by Ada\n3 accepted by Ada\n"
    assert run("reject", "2", "--database", database).stdout.startswith("2 rejected by ")
    accepted = json.loads(run("list", "--status", "accepted", "--json", "--database", database).stdout)
    assert [(record["id"], record["note"]) for record in accepted] == [(1, "a quotation"), (3, "a quotation")]
    missing = run("accept", "9", "--database", database).exception
    assert isinstance(missing, InvalidRequest)
    assert "there is no flagged generation 9" in str(missing)
    assert run("accept", "0", "--database", database).exit_code == 2


def test_generations_are_exported(database: str, tmp_path: Path) -> None:
    run("reject", "2", "--database", database)
    lines = run("export", "--database", database).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["prompt 0", "prompt 1", "prompt 2"]
    output = tmp_path / "rejected.jsonl"
    done = run("export", "--status", "rejected", "--output", str(output), "--database", database)
    assert "1 written to" in done.stderr
    assert json.loads(output.read_text())["text"] == "[red]tëxt\n1"


def test_an_unknown_status_is_named(database: str) -> None:
    command = [sys.executable, "-m", "bluejay", "flagged", "list", "--status", "odd", "--database", database]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: status is 'odd', expected one of pending, accepted, rejected")
