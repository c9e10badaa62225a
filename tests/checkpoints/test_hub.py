import contextlib
import errno
import functools
import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.checkpoints import blobs, hub, hub_cache
from bluejay.errors import CheckpointError, ConfigError, InvalidRequest, ModelNotFound

from .small_hub import CONFIG, SmallHub, hash_of, model_files, small_hub

NAME = "owner/tiny-gpt-j"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the network is off for all tests but these, on loopback
    with small_hub() as running:
        running.add(NAME, model_files(WEIGHTS))
        yield running


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it takes up a connection again."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub writes 10 MB at a time, and loses what it has of them when the connection breaks."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def pull(server: SmallHub, cache: Path, name: str = NAME, revision: str | None = None) -> Path:
    return hub.pull(name, revision, endpoint=server.endpoint, cache_dir=cache)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_pull_fetches_what_is_needed_and_no_more(server: SmallHub, cache: Path) -> None:
    path = pull(server, cache)
    assert names_in(path) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert set(server.fetched()) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert hub.resolve(NAME, cache_dir=cache) == path


def test_what_was_pulled_is_in_huggingface_hubs_cache(server: SmallHub, cache: Path) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    path = pull(server, cache)
    found = hf_hub_download(NAME, "model.safetensors", cache_dir=cache, local_files_only=True)
    assert Path(found) == path / "model.safetensors"
    scan = scan_cache_dir(cache)
    assert [repo.repo_id for repo in scan.repos] == [NAME]
    assert not scan.warnings


def test_pull_again_fetches_no_content(server: SmallHub, cache: Path) -> None:
    pull(server, cache)
    server.requests.clear()
    pull(server, cache)
    assert server.fetched() == server.fetched("HEAD") == []


def test_weights_as_pickles_where_there_are_no_others(server: SmallHub, cache: Path) -> None:
    files = model_files()
    del files["model.safetensors"]
    server.add("owner/old", files)
    assert names_in(pull(server, cache, "owner/old")) == {"config.json", "tokenizer.json", "pytorch_model.bin"}


def test_shards_and_their_index(server: SmallHub, cache: Path) -> None:
    files = model_files()
    del files["model.safetensors"]
    shards = {f"model-0000{n}-of-00002.safetensors": b"%d" % n for n in (1, 2)}
    server.add("owner/big", {**files, **shards, "model.safetensors.index.json": b"{}", "model-extra.safetensors": b""})
    path = pull(server, cache, "owner/big")
    assert names_in(path) == {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"not complete in the cache .* bluejay pull owner/big"):
        hub.resolve("owner/big", cache_dir=cache)


def test_a_revision_can_be_pinned(server: SmallHub, cache: Path) -> None:
    other = server.add(NAME, model_files(b"half precision"), revision="float16")
    path = pull(server, cache, f"{NAME}@float16")
    assert path.name == other
    assert (path / "model.safetensors").read_bytes() == b"half precision"
    assert hub.resolve(NAME, "float16", cache_dir=cache) == path
    assert hub.resolve(f"{NAME}@{other}", cache_dir=cache) == path
    with pytest.raises(ModelNotFound, match=f"{NAME} is not in the cache"):
        hub.resolve(NAME, cache_dir=cache)
    assert pull(server, cache, NAME, other) == path


def test_pull_follows_the_branch(server: SmallHub, cache: Path) -> None:
    old = pull(server, cache)
    server.add(NAME, model_files(b"better"))
    new = pull(server, cache)
    assert new != old
    assert (hub.resolve(NAME, cache_dir=cache) / "model.safetensors").read_bytes() == b"better"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    server: SmallHub, cache: Path, no_waiting: None, small_chunks: None
) -> None:
    server.cut["model.safetensors"] = 2
    assert (pull(server, cache) / "model.safetensors").read_bytes() == WEIGHTS
    assert server.ranges() == [f"bytes={2**19}-", f"bytes={2**19 + 2**18}-"]


def test_a_pull_that_was_given_up_goes_on_where_it_stopped(
    server: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    server.cut["model.safetensors"] = 1

    def give_up(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", give_up)
        with pytest.raises(KeyboardInterrupt):
            pull(server, cache)
    with pytest.raises(ModelNotFound):
        hub.resolve(NAME, cache_dir=cache)
    server.requests.clear()
    assert (pull(server, cache) / "model.safetensors").read_bytes() == WEIGHTS
    assert server.ranges() == [f"bytes={2**19}-"]
    assert not list(cache.rglob("*.incomplete"))


def test_an_update_that_was_given_up_leaves_the_old_model(server: SmallHub, cache: Path, no_waiting: None) -> None:
    old = pull(server, cache)
    server.add(NAME, model_files(b"better"))
    server.cut["model.safetensors"] = 100
    with pytest.raises(CheckpointError, match="what has come is kept, so go on with: bluejay pull owner/tiny-gpt-j"):
        pull(server, cache)
    assert hub.resolve(NAME, cache_dir=cache) == old


def test_a_part_that_is_too_long_is_begun_anew(server: SmallHub, cache: Path) -> None:
    blob = cache / "models--owner--tiny-gpt-j" / "blobs" / hash_of("model.safetensors", WEIGHTS)
    blob.parent.mkdir(parents=True)
    blobs.part_of(blob).write_bytes(WEIGHTS + b"and more")
    assert (pull(server, cache) / "model.safetensors").read_bytes() == WEIGHTS


def test_content_with_another_hash_is_refused_and_not_kept(server: SmallHub, cache: Path) -> None:
    server.broken.add("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the download is damaged: SHA-256 is .*pull again"):
        pull(server, cache)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size == len(WEIGHTS)]
    server.broken.clear()
    assert (pull(server, cache) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("tag", ["../../../evil", "/tmp/evil", "..", "a/b", "", "x" * 200])
def test_a_tag_that_is_no_file_name_is_refused(tag: str) -> None:
    with pytest.raises(CheckpointError, match="expected a hash"):
        blobs.blob_name(tag, label="config.json")


def test_another_family_is_refused_before_its_weights(server: SmallHub, cache: Path) -> None:
    server.add("owner/bert", {**model_files(), "config.json": json.dumps({"model_type": "bert"}).encode()})
    with pytest.raises(ConfigError, match=r"model_type is 'bert'; Bluejay opens 'gptj' and 'gpt_neo'"):
        pull(server, cache, "owner/bert")
    assert server.fetched() == ["config.json"]
    assert hub.list_models(cache_dir=cache) == []


def test_a_model_without_weights_is_refused(server: SmallHub, cache: Path) -> None:
    server.add("owner/flax", {"config.json": b"{}", "flax_model.msgpack": b""})
    with pytest.raises(
        CheckpointError, match=r"owner/flax has no weights .* it holds config\.json, flax_model\.msgpack"
    ):
        pull(server, cache, "owner/flax")


def test_unknown_model_and_revision(server: SmallHub, cache: Path) -> None:
    with pytest.raises(ModelNotFound, match="has no model owner/nothing; if it is private, set HF_TOKEN") as caught:
        pull(server, cache, "owner/nothing")
    assert caught.value.param == "model"
    with pytest.raises(ModelNotFound, match="has no revision 'v9' of owner/tiny-gpt-j") as caught:
        pull(server, cache, NAME, "v9")
    assert caught.value.param == "revision"


def test_a_gated_model_asks_for_a_token(server: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_secret"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(
        CheckpointError, match=f"gated: accept its terms at {server.endpoint}/{NAME}, then set HF_TOKEN"
    ):
        pull(server, cache)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pull(server, cache).is_dir()
    assert not server.tokens_at_cdn


def test_a_hub_that_is_down(server: SmallHub, cache: Path) -> None:
    server.down = True
    with pytest.raises(CheckpointError, match=f"could not be fetched from {server.endpoint}: .*503.*bluejay pull"):
        pull(server, cache)


def test_no_hub_at_all(server: SmallHub, cache: Path) -> None:
    with small_hub() as gone:
        pass  # its port is free again, so that nothing listens there
    with pytest.raises(CheckpointError, match=f"could not be fetched from {gone.endpoint}: .*refused"):
        pull(gone, cache)


def test_no_room_is_seen_before_the_download(server: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, .* has 0\.00 GB free; make room, or let HF_HOME"):
        pull(server, cache)
    assert "model.safetensors" not in server.fetched()


def test_a_disk_that_fills_up_on_the_way(server: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match=r"the disk is full .* make room, then .* bluejay pull"):
        pull(server, cache)


def test_offline_takes_the_cached_model_or_says_so(
    server: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pull(server, cache)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(server, cache) == path
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE is set: unset it, then get it with: bluejay pull a/b"):
        pull(server, cache, "a/b")
    assert server.requests == []


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd\x00", "a\x00b", "owner/../../evil", "x" * 5000, "a@../../b"])
def test_names_that_trick_reach_no_file_and_no_hub(server: SmallHub, cache: Path, name: str) -> None:
    for function in (hub.verify, hub.remove):
        with pytest.raises(InvalidRequest):
            function(name, cache_dir=cache)
    with pytest.raises(InvalidRequest):
        pull(server, cache, name)
    assert server.requests == []
    assert not cache.exists()


class Opened:
    """Keeps the paths that Python opens or lists while the block runs; an audit hook cannot be taken out again."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.listening = False
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.listening and event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir"):
            self.paths.append(Path(str(arguments[0])).resolve())

    def __enter__(self) -> None:
        self.listening = True

    def __exit__(self, *_: object) -> None:
        self.listening = False


def test_whatever_the_name_nothing_outside_the_cache_is_opened(server: SmallHub, cache: Path) -> None:
    pull(server, cache)
    hub.verify(NAME, cache_dir=cache)  # and so all that is imported on the way is imported
    hub.remove(NAME, dry_run=True, cache_dir=cache)
    opened = Opened()
    part = st.sampled_from(
        ["..", ".", "", "owner", "tiny-gpt-j", "a", "\x00", "~", "%2e%2e", "\u2215", "etc", "passwd"]
    )
    path = st.lists(part, max_size=6).map("/".join)

    @given(name=st.one_of(path, st.tuples(path, path).map("@".join), st.text()))
    @settings(max_examples=300, deadline=None)
    def check(name: str) -> None:
        for function in (hub.verify, functools.partial(hub.remove, dry_run=True)):
            with opened, contextlib.suppress(InvalidRequest, ModelNotFound):
                function(name, cache_dir=cache)

    check()
    assert opened.paths
    assert [found for found in opened.paths if not found.is_relative_to(cache)] == []


def test_resolve_takes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    assert hub.resolve(str(tmp_path / "model")) == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("model").samefile(tmp_path / "model")
    assert hub.resolve("./model").samefile(tmp_path / "model")
    with pytest.raises(InvalidRequest, match="'model' is not a model of the hub and has no revision 'v1'"):
        hub.resolve("model", "v1")


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nothing", "../nothing-here", "~/nothing-here", "~nobody-here/x"]
)
def test_resolve_of_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelNotFound, match="no such file or directory"):
        hub.resolve(name)


@pytest.mark.parametrize("name", ["", "a\x00b", "x" * 5000])
def test_resolve_of_what_is_no_name(name: str, cache: Path) -> None:
    with pytest.raises(InvalidRequest):
        hub.resolve(name, cache_dir=cache)


def test_resolve_names_the_command_or_runs_it(server: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="get it with: bluejay pull EleutherAI/gpt-j-6b@float16"):
        hub.resolve("gpt-j-6b@float16", cache_dir=cache)
    monkeypatch.setattr(hub, "pull", lambda *args, **kwargs: Path("pulled"))
    assert hub.resolve(NAME, local_files_only=False, cache_dir=cache) == Path("pulled")


def test_list_models(server: SmallHub, cache: Path) -> None:
    assert [model for model in hub.list_models(cache_dir=cache) if model.name != "default"] == []
    path = pull(server, cache)
    server.add("a/neo", {**model_files(), "config.json": NEO})
    pull(server, cache, "a/neo")
    models = {model.name: model for model in hub.list_models(cache_dir=cache)}
    assert [name for name in models if name != "default"] == ["a/neo", NAME]
    assert models["a/neo"].family == "gpt_neo"
    row = models[NAME]
    assert (row.revision, row.path, row.family, row.format) == ("main", path.resolve(), "gptj", "safetensors")
    assert row.size_bytes == sum((path / name).stat().st_size for name in names_in(path))
    assert row.last_used is not None


NEO = json.dumps(
    {
        "model_type": "gpt_neo",
        "vocab_size": 16,
        "max_position_embeddings": 8,
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 2,
    }
).encode()


def test_list_shows_what_is_not_complete(server: SmallHub, cache: Path, no_waiting: None) -> None:
    server.cut["model.safetensors"] = 100
    with pytest.raises(CheckpointError):
        pull(server, cache)
    (row,) = [model for model in hub.list_models(cache_dir=cache) if model.name == NAME]
    assert row.format is None
    assert row.revision == server.commit(NAME, "main")


def test_verify_finds_a_flipped_byte_of_either_kind(server: SmallHub, cache: Path) -> None:
    path = pull(server, cache)
    assert hub.verify(NAME, cache_dir=cache) == hub.Verification(path, 3, ())
    for name in ("model.safetensors", "config.json"):
        content = bytearray((path / name).read_bytes())
        content[7] ^= 1
        (path / name).resolve().write_bytes(content)
    damaged = hub.verify(NAME, cache_dir=cache).damaged
    assert [(file.name, file.problem.partition(" is ")[0]) for file in damaged] == [
        ("config.json", "git SHA-1"),
        ("model.safetensors", "SHA-256"),
    ]


def test_verify_finds_what_is_missing(server: SmallHub, cache: Path) -> None:
    path = pull(server, cache)
    (path / "model.safetensors").resolve().unlink()
    assert hub.verify(NAME, cache_dir=cache).damaged == (
        hub.DamagedFile("model.safetensors", "missing"),
        hub.DamagedFile("weights", "not all of them are here"),
    )


def test_verify_says_what_it_cannot_check(server: SmallHub, cache: Path) -> None:
    path = pull(server, cache)
    (path / "notes.txt").write_text("mine")
    found = hub.verify(NAME, cache_dir=cache)
    assert (found.num_checked, found.damaged, found.unchecked) == (3, (), ("notes.txt",))


def test_remove_frees_the_space(server: SmallHub, cache: Path) -> None:
    path = pull(server, cache)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert hub.remove(NAME, dry_run=True, cache_dir=cache) >= size
    assert hub.resolve(NAME, cache_dir=cache) == path
    assert hub.remove(NAME, cache_dir=cache) >= size
    assert not (cache / "models--owner--tiny-gpt-j").exists()
    with pytest.raises(ModelNotFound):
        hub.remove(NAME, cache_dir=cache)


def test_remove_one_revision_keeps_what_the_other_needs(server: SmallHub, cache: Path) -> None:
    server.add(NAME, model_files(b"half"), revision="float16")
    server.add("a/copy", model_files(WEIGHTS))
    whole, half, copy = pull(server, cache), pull(server, cache, f"{NAME}@float16"), pull(server, cache, "a/copy")
    assert hub.remove(NAME, "float16", dry_run=True, cache_dir=cache) == len(b"half")
    assert hub.remove(NAME, "float16", cache_dir=cache) == len(b"half")
    assert not half.exists()
    assert not hub.verify(NAME, cache_dir=cache).damaged
    assert hub.remove(f"{NAME}@main", cache_dir=cache) > len(WEIGHTS)
    assert not whole.exists()
    assert not hub.verify("a/copy", cache_dir=cache).damaged
    assert copy.exists()


def test_remove_takes_broken_links_and_parts_of_downloads(server: SmallHub, cache: Path, no_waiting: None) -> None:
    path = pull(server, cache)
    (path / "config.json").resolve().unlink()
    server.add(NAME, model_files(b"better" * 100))
    server.cut["model.safetensors"] = 100
    with pytest.raises(CheckpointError):
        pull(server, cache)
    assert hub.remove(NAME, cache_dir=cache) > len(WEIGHTS)
    assert list(cache.rglob("*gpt-j*")) == []


@pytest.fixture(autouse=True)
def without_packaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the package is another matter: these tests speak of the cache."""
    monkeypatch.setattr(hub_cache, "DEFAULT_MODEL_DIR", tmp_path / "no_default_model")


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default model with its list of hashes."""
    directory = tmp_path / "default_model"
    directory.mkdir()
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"weights"}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    sums = [f"{hash_of('.bin', content)}  {name}\n" for name, content in files.items()]
    (directory / "SHA256SUMS").write_text("".join(sums))
    monkeypatch.setattr(hub_cache, "DEFAULT_MODEL_DIR", directory)
    return directory


def test_the_default_model_is_first_and_stays(default: Path, server: SmallHub, cache: Path) -> None:
    server.add("a/a", model_files())
    pull(server, cache, "a/a")
    first, second = hub.list_models(cache_dir=cache)
    assert (first.name, first.revision, first.path, first.format) == ("default", None, default, "safetensors")
    assert second.name == "a/a"
    assert hub.resolve("default") == default
    for function in (hub.resolve, hub.verify):
        with pytest.raises(InvalidRequest, match="has no revision"):
            function("default", "v1")
    with pytest.raises(InvalidRequest, match="cannot be removed"):
        hub.remove("default")
    with pytest.raises(InvalidRequest, match="nothing to pull"):
        hub.pull("default")


def test_the_draft_of_the_default_model_has_a_name(default: Path, cache: Path) -> None:
    draft = default / "draft"
    draft.mkdir()
    for name in ("config.json", "model.safetensors", "SHA256SUMS"):
        (draft / name).write_bytes((default / name).read_bytes())
    assert [model.name for model in hub.list_models(cache_dir=cache)] == ["default", "default-draft"]
    assert hub.resolve("default-draft") == draft
    assert hub.verify("default-draft") == hub.Verification(draft, 2, ())


def test_a_default_model_without_weights_is_not_there(default: Path, cache: Path) -> None:
    (default / "model.safetensors").unlink()
    assert hub.list_models(cache_dir=cache) == []
    with pytest.raises(ModelNotFound, match="install Bluejay again"):
        hub.resolve("default")


def test_verify_the_default_model(default: Path) -> None:
    assert hub.verify("default") == hub.Verification(default, 2, ())
    (default / "model.safetensors").write_bytes(b"Weights")
    (default / "config.json").unlink()
    damaged = hub.verify("default").damaged
    assert damaged[0] == hub.DamagedFile("config.json", "cannot be read: No such file or directory")
    assert damaged[1].problem.startswith("SHA-256 is ")


@pytest.mark.parametrize("line", ["nonsense", f"{'0' * 64}  ../x", f"{'0' * 64}  /etc/passwd", f"{'0' * 63}  x"])
def test_a_broken_list_of_hashes_is_named(default: Path, line: str) -> None:
    (default / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS: line 1 is"):
        hub.verify("default")
    (default / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS: cannot be read"):
        hub.verify("default")
