import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluejay.checkpoints.hub_names import HubName
from bluejay.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "revision", "repo_id", "wanted"),
    [
        ("gpt2", None, "gpt2", "main"),
        ("EleutherAI/gpt-j-6b@float16", None, "EleutherAI/gpt-j-6b", "float16"),
        ("a/b", "v1.0", "a/b", "v1.0"),
        ("a/b@v1", "v1", "a/b", "v1"),
        ("a/b@refs/pr/40", None, "a/b", "refs/pr/40"),
        ("gpt-j-6b", None, "EleutherAI/gpt-j-6b", "main"),
        ("GPT-J-6B@float16", None, "EleutherAI/gpt-j-6b", "float16"),
        ("gpt-neo-1.3b", None, "EleutherAI/gpt-neo-1.3B", "main"),
    ],
)
def test_names(name: str, revision: str | None, repo_id: str, wanted: str) -> None:
    assert HubName.parse(name, revision) == HubName(repo_id, wanted)


def test_a_name_is_printed_as_it_is_typed() -> None:
    assert str(HubName.parse("a/b@main")) == "a/b"
    assert str(HubName.parse("a/b@v1")) == "a/b@v1"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "/",
            "/etc/passwd",
            "a/",
            "/a",
            "a/b/c",
            "..",
            "../a",
            "a/..",
            "a/../b",
            "a..b",
            ".",
            "./a",
            ".a",
            "a/.b",
        ),
        *("a\x00b", "a\n", "a b", "a%2e%2e", "%2e%2e/a", "a\\b", "C:\\a", "~", "~root", "a--b", "a.git", "-a", "a-"),
        *("модель", "ａ/b", "a/b\u202e", "a\u2215b", "a\ud800", "ı", "x" * 97, "http://host/a", "a?b", "a#b", "a:b"),
    ],
)
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="expected NAME or OWNER/NAME") as caught:
        HubName.parse(name)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    "revision", ["", "..", "a/../b", "/a", "a/", "a//b", "-a", "a\x00", "a@b", ".a", "a b", "версия", "x" * 201]
)
def test_a_revision_that_is_none_is_refused(revision: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a branch, tag or commit") as caught:
        HubName.parse("a/b", revision)
    assert caught.value.param == "revision"
    with pytest.raises(InvalidRequest):
        HubName.parse(f"a/b@{revision}")


def test_two_revisions_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="'a/b@v1' and revision 'v2'"):
        HubName.parse("a/b@v1", "v2")


@given(name=st.one_of(st.text(), st.text("aA0._-/@%\\~\x00\u2215", max_size=12)))
def test_what_is_accepted_is_two_plain_folder_names(name: str) -> None:
    try:
        model = HubName.parse(name)
    except InvalidRequest:
        return
    for part in [*model.repo_id.split("/"), *model.revision.split("/")]:
        assert part.isascii()
        assert part[0] not in ".-"
        assert ".." not in part
        assert set(part) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
