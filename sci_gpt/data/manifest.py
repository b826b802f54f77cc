"""Manifest: what a store says of itself, and the digests by which a changed or foreign file of it is refused."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from sci_gpt.data.addresses import Address
from sci_gpt.data.faults import Patience, is_transient, patiently, reason
from sci_gpt.errors import DataError

MANIFEST, STATISTICS = "manifest.json", "statistics.json"


def sha256(content: bytes) -> str:
    """Hex digest of a file's content."""
    return hashlib.sha256(content).hexdigest()


def content_digest(manifest: dict[str, Any]) -> str:
    """Hex digest of what a manifest says, its own `digest` aside."""
    own = {key: value for key, value in manifest.items() if key != "digest"}
    return sha256(json.dumps(own, sort_keys=True, allow_nan=False).encode())


def read_manifest(root: Address, version: int, *, patience: Patience) -> dict[str, Any]:
    """The manifest of the store at `root`, compared with its own digest.

    Raises:
        DataError: no store there, an unfinished or changed one, or one of another format version.
    """
    path = root / MANIFEST
    manifest = read_object(path, _content(path, store=root, patience=patience))
    if manifest.get("format_version") != version:
        raise DataError(
            f"data store {str(root)!r} has format version {manifest.get('format_version')!r}, this code reads "
            f"{version}; build it again with `sci-gpt build`"
        )
    if manifest.get("digest") != content_digest(manifest):
        raise DataError(
            f"{path} does not match its own digest: it was changed after it was written; build the store again"
        )
    return manifest


def read_sealed(root: Address, name: str, *, manifest: dict[str, Any], patience: Patience) -> bytes:
    """Content of a small file of the store, if it is the one that the manifest was written over.

    Raises:
        DataError: it is missing, cannot be read, or is another one.
    """
    content = _content(root / name, store=root, patience=patience)
    expected, found = manifest["files"].get(name), sha256(content)
    if found != expected:
        raise DataError(
            f"{root}/{name}: expected the file of SHA-256 {str(expected)[:12]} by {MANIFEST}, got {found[:12]}: it was "
            "changed or is another one's; build the store again"
        )
    return content


def read_object(path: Address, content: bytes) -> dict[str, Any]:
    """The JSON object in a file's content.

    Raises:
        DataError: it holds something else.
    """
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}; build the store again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(found).__name__}; build the store again")
    return found


def _content(path: Address, *, store: Address, patience: Patience) -> bytes:
    def whole() -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError as error:  # nothing to wait for
            raise DataError(
                f"no data store at {str(store)!r} ({path.name} is missing); make it with `sci-gpt build`"
            ) from error

    try:
        return patiently(whole, patience, again=lambda: None, sleep=time.sleep)
    except Exception as error:
        if not is_transient(error):
            raise
        raise DataError(f"{path} cannot be read: {reason(error)}; mend the disk, the network or the address") from error
