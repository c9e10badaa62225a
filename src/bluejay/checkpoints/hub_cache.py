"""The models on this machine: find, list, check and remove them, without a network.

The cache and its place are huggingface_hub's own, so other programs share the files:

    HF_HOME/hub/models--OWNER--NAME/
        blobs/HASH            the content
        snapshots/COMMIT/…    names, as links to blobs
        refs/main             the commit that a branch or tag means

Source: huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from bluejay.checkpoints import blobs
from bluejay.checkpoints.hub_names import HubName
from bluejay.errors import CheckpointError, ConfigError, InvalidRequest, ModelNotFound
from bluejay.model.config import ModelConfig
from bluejay.model.quantized import Quantization

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy

DEFAULT_MODEL = "default"
DEFAULT_MODEL_DIR = Path(__file__).resolve().parents[1] / "default_model"
# The models of the package, by name: the place in DEFAULT_MODEL_DIR.
PACKAGED = {DEFAULT_MODEL: ".", "default-draft": "draft"}
MANIFEST = "SHA256SUMS"

# The two kinds of weights, the preferred one first.
_WEIGHTS = {"safetensors": ("model", "safetensors"), "torch_bin": ("pytorch_model", "bin")}
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine.

    Attributes:
        name: what `resolve` takes.
        revision: branch, tag or commit; None for a model of the package.
        path: its directory.
        size_bytes: on disk; files shared by two revisions count for each.
        family: "gptj" or "gpt_neo".
        format: "safetensors" or "torch_bin", None where weights are missing still.
        quantization: "int8" or "int4", "other" for a way that Bluejay does not read, None for floats.
        last_used: when a file of it was last read, as far as the file system keeps count.
    """

    name: str
    revision: str | None
    path: Path
    size_bytes: int
    family: str
    format: str | None
    quantization: str | None
    last_used: datetime | None


@dataclass(frozen=True)
class DamagedFile:
    """A file whose content is not what it should be."""

    name: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        path: the model's directory.
        num_checked: files whose content was hashed.
        damaged: those that differ, are missing or cannot be read.
        unchecked: files for which no hash is known.
    """

    path: Path
    num_checked: int
    damaged: tuple[DamagedFile, ...]
    unchecked: tuple[str, ...] = ()


def packaged_model(name: str) -> Path:
    """The directory of a model of the package; ModelNotFound if this copy of the package is without its weights."""
    directory = DEFAULT_MODEL_DIR / PACKAGED[name]
    if not has_weights(directory):
        raise ModelNotFound(f"the weights of {name!r} are not in {directory}; install Bluejay again", param="model")
    return directory


def refuse_revision(name: str, revision: str | None) -> None:
    """Raise InvalidRequest if a revision is asked of what has none."""
    if revision is not None:
        raise InvalidRequest(f"{name!r} is not a model of the hub and has no revision {revision!r}", param="revision")


def list_models(*, cache_dir: Path | None = None) -> list[CachedModel]:
    """All models here that Bluejay can open: those of the package first, then those of the cache by name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    found = []
    for name, place in PACKAGED.items():
        directory = DEFAULT_MODEL_DIR / place
        if has_weights(directory):
            size = sum(path.stat().st_size for path in directory.glob("*") if path.is_file())
            found.append(_described(name, None, directory, size, None))
    try:
        repos = scan_cache_dir(cache_folder(cache_dir)).repos
    except CacheNotFound:
        repos = frozenset()
    for repo in sorted(repos, key=lambda repo: repo.repo_id.lower()):
        for cached in sorted(repo.revisions, key=lambda cached: (not cached.refs, cached.commit_hash)):
            revision = min(cached.refs, default=cached.commit_hash)
            last_used = max((file.blob_last_accessed for file in cached.files), default=None)
            if repo.repo_type == "model":
                found.append(_described(repo.repo_id, revision, cached.snapshot_path, cached.size_on_disk, last_used))
    return [model for model in found if model is not None]


def verify(name: str, revision: str | None = None, *, cache_dir: Path | None = None) -> Verification:
    """Read every file of a model and compare its hash: with the cache's, or for one of the package with its SHA256SUMS.

    Raises: ModelNotFound if the model is not here; CheckpointError if the list of hashes is broken.
    """
    if name in PACKAGED:
        refuse_revision(name, revision)
        return _verify_manifest(DEFAULT_MODEL_DIR / PACKAGED[name])
    snapshot = find_snapshot(HubName.parse(name, revision), cache_folder(cache_dir), complete=False)
    damaged, unchecked, num_checked = [], [], 0
    for path in sorted(path for path in snapshot.rglob("*") if not path.is_dir()):
        label = path.relative_to(snapshot).as_posix()
        # Its first link leads to blobs/HASH; a plain file is what a file system without links is given.
        blob_name = path.readlink().name if path.is_symlink() else ""
        if not path.exists():
            damaged.append(DamagedFile(label, "missing"))
        elif not blobs.has_known_hash(blob_name):
            unchecked.append(label)
        else:
            num_checked += 1
            if problem := blobs.damage(path, blob_name, label=label):
                damaged.append(DamagedFile(label, problem))
    if not has_weights(snapshot):
        damaged.append(DamagedFile("weights", "not all of them are here"))
    return Verification(snapshot, num_checked, tuple(damaged), tuple(unchecked))


def remove(name: str, revision: str | None = None, *, dry_run: bool = False, cache_dir: Path | None = None) -> int:
    """Delete a model from the cache: one revision where one is named, else all of them.

    Args:
        name: NAME[@REVISION], or a short name such as gpt-j-6b.
        revision: branch, tag or commit, where it is not part of the name.
        dry_run: delete nothing, only say what would be freed.
        cache_dir: None means huggingface_hub's cache.
    Returns: the bytes freed; files that another revision needs stay and do not count.
    Raises: InvalidRequest for a model of the package; ModelNotFound if it is not here; CheckpointError if it stays.
    """
    if name in PACKAGED:
        raise InvalidRequest(f"the {name} model is part of the package and cannot be removed", param="model")
    model = HubName.parse(name, revision)
    cache = cache_folder(cache_dir)
    storage = storage_of(model, cache)
    whole = revision is None and "@" not in name
    if whole and not storage.is_dir():
        raise _not_cached(model, cache)
    target = storage if whole else find_snapshot(model, cache, complete=False)
    plan = _deletion(storage, None if whole else target.name)
    freed = _content_bytes(storage) if whole else plan.expected_freed_size
    if not dry_run:
        plan.execute()
        if whole:  # and what huggingface_hub does not count: parts of downloads, broken links, locks
            shutil.rmtree(storage, ignore_errors=True)
            shutil.rmtree(cache / ".locks" / storage.name, ignore_errors=True)
        if target.exists():
            raise CheckpointError(f"{target} could not be removed; check who owns it, or remove the folder by hand")
    return freed


def weight_files(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """The preferred kind of weights among file names, and its files, the index included."""
    present = set(names)
    for kind, (stem, suffix) in _WEIGHTS.items():
        if (single := f"{stem}.{suffix}") in present:
            return kind, [single]
        shard = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}\.{suffix}")
        shards = sorted(name for name in present if shard.fullmatch(name))
        if (index := f"{stem}.{suffix}.index.json") in present and shards:
            return kind, [index, *shards]
    return None, []


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights, and of a sharded model every shard."""
    _, files = weight_files(path.name for path in directory.glob("*") if path.exists())
    shards = files[1:]
    return bool(files) and (not shards or len(shards) == int(shards[-1].rpartition("-of-")[2].partition(".")[0]))


def cache_folder(cache_dir: Path | None) -> Path:
    """The cache to use: the one given, else huggingface_hub's."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)


def storage_of(model: HubName, cache: Path) -> Path:
    """The folder of a model with all its revisions."""
    return cache / f"models--{model.repo_id.replace('/', '--')}"


def snapshot_of(model: HubName, commit: str, cache: Path) -> Path:
    """The folder of one commit."""
    return storage_of(model, cache) / "snapshots" / commit


def find_snapshot(model: HubName, cache: Path, *, complete: bool = True) -> Path:
    """The snapshot of a cached model; with `complete`, only if all its weights are there."""
    commit = model.revision
    if not COMMIT.fullmatch(commit):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (storage_of(model, cache) / "refs" / model.revision).read_text(encoding="utf-8").strip()
    snapshot = snapshot_of(model, commit, cache)
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise _not_cached(model, cache)
    if complete and not has_weights(snapshot):
        raise ModelNotFound(
            f"{model} is not complete in the cache at {cache}; go on with: bluejay pull {model}", param="model"
        )
    return snapshot


def write_ref(model: HubName, commit: str, cache: Path) -> None:
    """Let a branch or tag mean a commit."""
    if model.revision == commit:
        return
    ref = storage_of(model, cache) / "refs" / model.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    new.write_text(commit, encoding="utf-8")
    new.replace(ref)


def _not_cached(model: HubName, cache: Path) -> ModelNotFound:
    from huggingface_hub import constants

    offline = "HF_HUB_OFFLINE is set: unset it, then " if constants.HF_HUB_OFFLINE else ""
    return ModelNotFound(
        f"{model} is not in the cache at {cache}; {offline}get it with: bluejay pull {model}", param="model"
    )


def _described(
    name: str, revision: str | None, path: Path, size_bytes: int, last_used: float | None
) -> CachedModel | None:
    """A row of the list, None for a model of another family."""
    try:
        config = ModelConfig.from_file(path / "config.json")
    except ConfigError:
        return None
    kind, _ = weight_files(path.name for path in path.glob("*"))
    when = None if last_used is None else datetime.fromtimestamp(last_used, UTC)
    return CachedModel(
        name=name,
        revision=revision,
        path=path,
        size_bytes=size_bytes,
        family=config.model_type,
        format=kind if has_weights(path) else None,
        quantization=_quantization(config),
        last_used=when,
    )


def _quantization(config: ModelConfig) -> str | None:
    try:
        found = Quantization.of(config)
    except ConfigError:
        return "other"
    return None if found is None else found.name


def _verify_manifest(directory: Path) -> Verification:
    manifest = directory / MANIFEST
    damaged, num_checked = [], 0
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{manifest}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line)
        if match is None or PurePosixPath(match[2]).is_absolute() or ".." in PurePosixPath(match[2]).parts:
            raise CheckpointError(f"{manifest}: line {number} is {line[:80]!r}, expected a SHA-256 and a file name")
        num_checked += 1
        if problem := blobs.damage(directory / match[2], match[1], label=match[2]):
            damaged.append(DamagedFile(match[2], problem))
    return Verification(directory, num_checked, tuple(damaged))


def _deletion(storage: Path, commit: str | None) -> DeleteCacheStrategy:
    """huggingface_hub's plan to delete one commit, or all, with the blobs that then nothing needs."""
    from huggingface_hub import scan_cache_dir

    scan = scan_cache_dir(storage.parent)
    # A copy of the model under another name has the same commits: only this one is meant.
    own = frozenset(repo for repo in scan.repos if repo.repo_path.name == storage.name)
    commits = {cached.commit_hash for repo in own for cached in repo.revisions}
    return dataclasses.replace(scan, repos=own).delete_revisions(*(commits if commit is None else commits & {commit}))


def _content_bytes(storage: Path) -> int:
    """What the content of a model takes on the disk; parts of downloads are content too."""
    paths = [path for folder in ("blobs", "snapshots") for path in (storage / folder).rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file() and not path.is_symlink())
