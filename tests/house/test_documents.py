"""What documents say must be there."""

import re
from pathlib import Path

import pytest

from bluejay.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def _verbs() -> set[str]:
    named = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    return named | {str(group.name) for group in app.registered_groups}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_documents_show_are_verbs(document: Path) -> None:
    shown = set(re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?bluejay ([a-z]+)", document.read_text(encoding="utf-8"), re.M))
    assert shown <= _verbs()


def test_the_tree_in_the_structure_page_is_true() -> None:
    text = (ROOT / "docs" / "concepts" / "structure.md").read_text(encoding="utf-8")
    named = re.findall(r"^  ([a-z_]+)/", text, re.M)
    rooms = {path.parent.name for path in (ROOT / "src" / "bluejay").glob("*/__init__.py")}
    assert set(named) == rooms
