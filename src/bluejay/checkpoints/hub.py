"""Models of the Hugging Face hub: fetch them through huggingface_hub into its cache.

HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HUB_DISABLE_PROGRESS_BARS mean what they mean there.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from bluejay.checkpoints import blobs
from bluejay.checkpoints.hub_cache import (
    COMMIT,
    PACKAGED,
    CachedModel,
    DamagedFile,
    Verification,
    cache_folder,
    find_snapshot,
    list_models,
    packaged_model,
    refuse_revision,
    remove,
    snapshot_of,
    storage_of,
    verify,
    weight_files,
    write_ref,
)
from bluejay.checkpoints.hub_names import HubName
from bluejay.checkpoints.keymaps import GENERATION_CONFIG, TOKENIZER_FILES
from bluejay.errors import CheckpointError, InvalidRequest, ModelNotFound
from bluejay.model.config import ModelConfig

__all__ = ["CachedModel", "DamagedFile", "Verification", "list_models", "pull", "remove", "resolve", "verify"]

# All that Bluejay reads of a model, its weights aside; code and other frameworks' weights are never fetched.
_SMALL_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)


def pull(name: str, revision: str | None = None, *, endpoint: str | None = None, cache_dir: Path | None = None) -> Path:
    """Fetch a model into the cache, or bring it up to date; return its directory.

    Only what Bluejay reads is fetched: config, tokenizer, and one kind of weights (safetensors where there are any). A
    download that was interrupted goes on where it stopped. With HF_HUB_OFFLINE the cached model is returned.

    Args:
        name: NAME[@REVISION], or a short name such as gpt-j-6b.
        revision: branch, tag or commit, where it is not part of the name.
        endpoint: the hub's address; None means HF_ENDPOINT, else huggingface.co.
        cache_dir: None means huggingface_hub's cache.

    Raises:
        InvalidRequest: the name breaks the rules.
        ModelNotFound: the hub has no such model or revision.
        ConfigError: the model is of a family that Bluejay does not open; its weights were not fetched.
        CheckpointError: no weights there, no access, no network, no space, or damaged files.
    """
    from huggingface_hub import HfApi, constants

    if name in PACKAGED:
        raise InvalidRequest(f"the {name} model is part of the package; there is nothing to pull", param="model")
    model = HubName.parse(name, revision)
    cache = cache_folder(cache_dir)
    if constants.HF_HUB_OFFLINE:
        return find_snapshot(model, cache)
    with _explained(model, endpoint or constants.ENDPOINT, cache):
        info = HfApi(endpoint=endpoint).model_info(
            model.repo_id, revision=model.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        if info.sha is None or not COMMIT.fullmatch(info.sha):
            raise CheckpointError(f"{model}: the hub named the commit {info.sha!r}; is HF_ENDPOINT a model hub?")
        wanted = _needed_files(model, [sibling.rfilename for sibling in info.siblings or []])
        transfer = _Transfer(model, info.sha, endpoint, cache)
        # The config tells the family: nobody should wait for 24 GB to learn that Bluejay cannot open them.
        transfer.fetch(["config.json"])
        snapshot = snapshot_of(model, info.sha, cache)
        ModelConfig.from_file(snapshot / "config.json")
        transfer.fetch(wanted)
        # Only now: until all is there, the branch goes on to mean the older commit.
        write_ref(model, info.sha, cache)
    return snapshot


def resolve(
    name: str, revision: str | None = None, *, local_files_only: bool = True, cache_dir: Path | None = None
) -> Path:
    """Find a model: a path that exists, a model of the package ("default", "default-draft"), or a model of the cache.

    Args:
        name: a path, "default", "default-draft", NAME[@REVISION] or a short name such as gpt-j-6b.
        revision: branch, tag or commit, where it is not part of the name.
        local_files_only: False pulls a model that is not there.
        cache_dir: None means huggingface_hub's cache.

    Raises:
        ModelNotFound: not here; the message has the command that fetches it.
        InvalidRequest: the name breaks the rules, or a revision is asked of a path or of the default model.
    """
    if name in PACKAGED:
        refuse_revision(name, revision)
        return packaged_model(name)
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, no such user, a NUL: no path, then
        if name and (path := Path(name).expanduser()).exists():
            refuse_revision(name, revision)
            return path
    if name.startswith(("/", "./", "../", "~")):
        raise ModelNotFound(f"{name!r}: no such file or directory", param="model")
    model = HubName.parse(name, revision)
    try:
        return find_snapshot(model, cache_folder(cache_dir))
    except ModelNotFound:
        if local_files_only:
            raise
        return pull(name, revision, cache_dir=cache_dir)


@dataclass(frozen=True)
class _RemoteFile:
    """A file on the hub, and the blob of the cache that will hold its content."""

    name: str
    url: str
    blob: Path
    size: int | None

    @property
    def part(self) -> Path:
        """Where an unfinished download waits."""
        return blobs.part_of(self.blob)


@dataclass(frozen=True)
class _Transfer:
    """One commit of one model on its way from the hub into the cache."""

    model: HubName
    commit: str
    endpoint: str | None
    cache: Path

    def fetch(self, names: list[str]) -> None:
        """Bring those files into the cache that are not there, after a look at the free space."""
        snapshot = snapshot_of(self.model, self.commit, self.cache)
        absent = [name for name in names if not (snapshot / name).exists()]
        files = [file for name in absent if not (file := self._remote_file(name)).blob.exists()]
        _check_space(files, self.cache)
        for file in files:
            self._fetch_blob(file)
        for name in absent:
            self._link(name)

    def _remote_file(self, name: str) -> _RemoteFile:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.model.repo_id, name, revision=self.commit, endpoint=self.endpoint)
        metadata = get_hf_file_metadata(url)
        blob = storage_of(self.model, self.cache) / "blobs" / blobs.blob_name(metadata.etag, label=name)
        return _RemoteFile(name, url, blob, metadata.size)

    def _fetch_blob(self, file: _RemoteFile) -> None:
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # public, but not in its __all__

        # huggingface_hub's own lock, so that no two programs fetch one file.
        lock = self.cache / ".locks" / storage_of(self.model, self.cache).name / f"{file.blob.name}.lock"
        for folder in (lock.parent, file.blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not file.blob.exists():
                blobs.fetch(file.url, file.blob, size=file.size, label=file.name)

    def _link(self, name: str) -> None:
        """Give the content its name; huggingface_hub finds the blob there and fetches nothing."""
        from huggingface_hub import hf_hub_download

        hf_hub_download(self.model.repo_id, name, revision=self.commit, cache_dir=self.cache, endpoint=self.endpoint)


def _needed_files(model: HubName, names: list[str]) -> list[str]:
    _, weights = weight_files(names)
    missing = [name for name in ("config.json",) if name not in names] + ([] if weights else ["weights"])
    if missing:
        raise CheckpointError(
            f"{model} has no {' and no '.join(missing)} that Bluejay opens (config.json with model*.safetensors or "
            f"pytorch_model*.bin); it holds {', '.join(sorted(names)[:20]) or 'nothing'}"
        )
    return [name for name in _SMALL_FILES if name in names] + weights


def _check_space(files: list[_RemoteFile], cache: Path) -> None:
    needed = sum((file.size or 0) - (file.part.stat().st_size if file.part.exists() else 0) for file in files)
    folder = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the download needs {needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; "
            "make room, or let HF_HOME name a larger disk"
        )


@contextlib.contextmanager
def _explained(model: HubName, endpoint: str, cache: Path) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours, each with its remedy."""
    from huggingface_hub import errors

    # The base class of its HTTP library, requests or httpx by version, and of sockets and disks.
    failures = cast("tuple[type[Exception], ...]", (errors.HfHubHTTPError.__bases__[0], OSError))
    again = f"what has come is kept, so go on with: bluejay pull {model}"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{model} is gated: accept its terms at {endpoint}/{model.repo_id}, then set HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(
            f"{endpoint} has no revision {model.revision!r} of {model.repo_id}", param="revision"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"{endpoint} has no model {model.repo_id}; if it is private, set HF_TOKEN to your token", param="model"
        ) from None
    except failures as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(cache).free
            raise CheckpointError(
                f"{cache}: the disk is full ({free / 1e6:.0f} MB free); make room, then {again}"
            ) from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise CheckpointError(f"{endpoint} refuses {model}: set HF_TOKEN to a valid token ({error})") from None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{model} could not be fetched from {endpoint}: {reason}; {again}") from None
