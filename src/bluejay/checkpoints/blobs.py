"""The files of the hub's cache: each lies under the hash of its content, and so can be fetched in parts and checked.

The hub names a large file by its SHA-256 and a small one by git's SHA-1.
Source: huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from bluejay.errors import CheckpointError

_CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def has_known_hash(blob_name: str) -> bool:
    """Whether the name is a hash that content can be checked against."""
    return bool(_SHA256.fullmatch(blob_name) or _GIT_SHA1.fullmatch(blob_name))


def damage(path: Path, blob_name: str, *, label: str) -> str | None:
    """Say how a file's content differs from its hash; None if it does not, or if the name is no hash.

    Args:
        path: the file to read.
        blob_name: the hash that the hub gave it.
        label: the file's name for the progress bar.
    """
    try:
        if _SHA256.fullmatch(blob_name):
            kind, found = "SHA-256", _digest(path, hashlib.sha256(), label)
        elif _GIT_SHA1.fullmatch(blob_name):
            header = b"blob %d\x00" % path.stat().st_size
            kind, found = "git SHA-1", _digest(path, hashlib.sha1(header, usedforsecurity=False), label)
        else:
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found == blob_name else f"{kind} is {found}, expected {blob_name}"


def fetch(url: str, blob: Path, *, size: int | None, label: str) -> None:
    """Download a file into the cache; go on where an earlier download stopped, and check its hash.

    huggingface_hub drops a part that it could not finish, which for GPT-J may be 24 GB; so the part is kept here beside
    the blob, under the name by which its cache tools know and clear such parts.

    Args:
        url: the file on the hub.
        blob: where it goes; its name is the hash that the hub gave.
        size: bytes to expect, None where the hub does not say.
        label: the file's name for messages and the progress bar.
    Raises: CheckpointError if the content is not what the hub announced. The network's and the disk's errors pass.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not in its __all__

    part = part_of(blob)
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()
    with part.open("ab") as out:
        # Without compression, the bytes that came are the bytes that count, and a range continues them.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=size, displayed_filename=label)
    if problem := damage(part, blob.name, label=label):
        part.unlink()
        raise CheckpointError(f"{label}: the download is damaged: {problem}; it was removed, so pull again")
    part.replace(blob)


def part_of(blob: Path) -> Path:
    """Where an unfinished download of a blob waits."""
    return blob.with_name(f"{blob.name}.incomplete")


def blob_name(etag: str | None, *, label: str) -> str:
    """The cache's name for a file, from the tag that the hub sent; CheckpointError if it cannot be a file name."""
    if etag is None or not _SAFE_NAME.fullmatch(etag):
        raise CheckpointError(f"{label}: the hub sent the tag {etag!r}, expected a hash; is HF_ENDPOINT a model hub?")
    return etag


def _digest(path: Path, hasher: hashlib._Hash, label: str) -> str:
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # public, but not in its __all__

    size = path.stat().st_size
    # No bar for what is read within a second; None leaves it to tqdm to draw on terminals only.
    hidden = True if size < 256 * _CHUNK_BYTES else None
    bar = tqdm(total=size, desc=f"checking {label}", unit="B", unit_scale=True, disable=hidden)  # type: ignore[no-untyped-call]
    with path.open("rb") as file, bar:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            bar.update(len(chunk))
    return hasher.hexdigest()
