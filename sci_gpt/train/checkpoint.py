"""Read checkpoints of our own format: manifest, state and verified ranges of any parameter; no DeepSpeed, no pickle.

A checkpoint is a folder `checkpoints/step-00000120/`:

    rank-00000.safetensors   fragments that rank 0 owns: fp32 weights and both moments of Adam
    rank-00000.parts.json    the part list: that file's sha256 and the address of each fragment
    state.json               step, next sample, schedule, configuration, statistics, tokenizers, fingerprint, code
    manifest.json            written last: shapes of all parameters, sha256 of every part list, of state.json, of itself

The address of an element is (parameter name, kind, tensor-parallel slice, flat range in that slice); a slice is
(offset, width) along the parameter's `tp_dim` (None: not divided). No manifest, no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sci_gpt.errors import CheckpointError, DamagedCheckpoint

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
_FOLDER = re.compile(r"step-(\d{8,})")
# What a manifest held before it had a checksum of itself; such checkpoints are still read.
_UNSEALED = {"format", "step", "world", "adam_step", "parameters", "parts", "state_sha256"}
_REMEDY = "delete this folder, and the next start takes the checkpoint before it"


class Slice(NamedTuple):
    """A tensor-parallel slice of a parameter: `width` entries from `offset` along `dim` (None: the whole parameter)."""

    dim: int | None
    offset: int
    width: int


def tensor_key(name: str, kind: str, *, offset: int, start: int) -> str:
    """A fragment's name in its file: parameter, kind, offset of the slice, first element in the slice."""
    return f"{name}:{kind}:{offset}:{start}"


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` completed steps lies in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that a folder's name says, None for any other name."""
    match = _FOLDER.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else None


def committed(run: Path) -> list[Path]:
    """The run's checkpoints (folders with a manifest), oldest first."""
    folders = [(step_of(path), path) for path in sorted((run / "checkpoints").glob("step-*"))]
    return [path for step, path in sorted((s, p) for s, p in folders if s is not None) if (path / MANIFEST).exists()]


def torn(run: Path) -> list[Path]:
    """Folders left by a save that never finished: named like a checkpoint, without a manifest."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    return [path for path in folders if step_of(path) is not None and not (path / MANIFEST).exists()]


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, None where there is none; torn ones do not count."""
    folders = committed(Path(run))
    return folders[-1] if folders else None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the sha256 of its own content."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The verified manifest of a checkpoint folder.

    Raises:
        CheckpointError: no manifest (a torn save, or no checkpoint at all), damaged, or of another format version.
    """
    path = Path(checkpoint) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: it holds no {MANIFEST}; name a folder that does"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged: it is no JSON ({error}); {_REMEDY}") from error
    if not isinstance(manifest, dict) or not (
        manifest.keys() == _UNSEALED or manifest.get("sha256") == sealed(manifest)["sha256"]
    ):
        raise DamagedCheckpoint(f"{path} is damaged: its content is not what its own sha256 says; {_REMEDY}")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{checkpoint} is of checkpoint format {manifest['format']!r}, this code reads {FORMAT}; "
            "load it with the code version in its state.json"
        )
    return manifest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The verified `state.json`: step, next_sample, schedule, config, statistics, fingerprint, code_version and more.

    Raises:
        CheckpointError: no manifest, or the state differs from what the manifest says.
    """
    checkpoint = Path(checkpoint)
    data = _verified(checkpoint / STATE, read_manifest(checkpoint)["state_sha256"])
    state: dict[str, Any] = json.loads(data)
    return state


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every parameter as a whole fp32 tensor, by name; needs neither DeepSpeed nor a process group.

    Raises:
        CheckpointError: no manifest, a file missing, damaged or not covering its parameter.
    """
    reader = Reader(Path(checkpoint))
    return {name: reader.read(name).view(reader.shape(name)) for name in reader.parameters}


def damage(checkpoint: Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What of a committed checkpoint is not as it was written, in a few words; None: nothing.

    Args:
        checkpoint: its folder.
        contents: False: only manifest, state and part lists are verified, which are small.
        share: (rank, size): this rank verifies every size-th fragment file from its own number on.

    Raises:
        CheckpointError: of another format version, or a file that the system does not let this process read.
    """
    try:
        read_state(checkpoint)
        for index, part in enumerate(read_manifest(checkpoint)["parts"]):
            listed = json.loads(_verified(checkpoint / part["file"], part["sha256"]))
            if contents and index % share[1] == share[0]:
                _verify_file(checkpoint / listed["file"], listed["sha256"])
    except DamagedCheckpoint as error:
        return str(error).removesuffix(f"; {_REMEDY}")
    return None


def _verified(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DamagedCheckpoint(f"{path} is damaged: sha256 {found[:12]}, its checkpoint says {sha256[:12]}; {_REMEDY}")
    return data


def _verify_file(path: Path, sha256: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != sha256:
        raise DamagedCheckpoint(f"{path} is damaged: sha256 {found[:12]}, its part list says {sha256[:12]}; {_REMEDY}")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """A missing file is damage; one that the system refuses to read may be whole, so that nobody may pass it over."""
    kind = DamagedCheckpoint if isinstance(error, FileNotFoundError) else CheckpointError
    return kind(f"{path} cannot be read ({error}); {_REMEDY}")


class Reader:
    """Reads flat ranges of any slice of any parameter; a file's checksum is verified when it is first opened.

    Args:
        checkpoint: its folder.
        verified: this start has verified all files (`resume.where_to_go_on` over all ranks): they are not hashed again.

    Raises:
        CheckpointError: from the constructor and from `read`: a file missing, damaged, or elements in no file.
    """

    def __init__(self, checkpoint: Path, *, verified: bool = False) -> None:
        self.folder, self.verified = checkpoint, verified
        self.manifest = read_manifest(checkpoint)
        self.parameters: dict[str, dict[str, Any]] = self.manifest["parameters"]
        self._parts = [
            json.loads(_verified(checkpoint / part["file"], part["sha256"])) for part in self.manifest["parts"]
        ]
        self._open: dict[int, Any] = {}
        self._fragments: dict[str, dict[tuple[int, int], list[tuple[int, int, int]]]] = {}
        for index, part in enumerate(self._parts):
            for name, offset, width, start, stop in part["fragments"]:
                pieces = self._fragments.setdefault(name, {}).setdefault((offset, width), [])
                pieces.append((start, stop, index))
        for slices in self._fragments.values():
            for pieces in slices.values():
                pieces.sort()

    @property
    def adam_step(self) -> float:
        """Updates that Adam has made (its bias correction)."""
        return float(self.manifest["adam_step"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(self.parameters[name]["shape"])

    def read(
        self, name: str, kind: str = WEIGHT, *, slice_: Slice | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Flat elements [start, stop) of a slice (default: the whole parameter) of `kind`: WEIGHT or one of MOMENTS."""
        info = self.parameters[name]
        shape, saved_dim = tuple(info["shape"]) or (1,), info["tp_dim"]
        wanted_dim = slice_.dim if slice_ else None
        if wanted_dim is not None and saved_dim is not None and wanted_dim != saved_dim:
            raise CheckpointError(
                f"{self.folder}: {name} was saved divided along dimension {saved_dim} and is wanted along {wanted_dim}"
            )
        dim = wanted_dim if wanted_dim is not None else saved_dim or 0
        offset, width = (slice_.offset, slice_.width) if slice_ and wanted_dim is not None else (0, shape[dim])
        outer, inner = prod(shape[:dim]), prod(shape[dim + 1 :])  # the tensor is seen as (outer, shape[dim], inner)
        row = width * inner
        stop = outer * row if stop is None else stop
        first_row, last_row = start // row, -(-stop // row)
        low, high = offset, offset + width
        if outer == 1:  # divided along the first dimension: cut exactly; otherwise whole rows of the slices are read
            low, high = offset + start // inner, offset + -(-stop // inner)
        block = torch.empty(last_row - first_row, high - low, inner, dtype=torch.float32)
        covered = 0
        for key in self._fragments.get(name, {}):
            at, size = key if saved_dim is not None else (0, shape[dim])  # undivided: one slice along any dimension
            a, b = max(low, at), min(high, at + size)
            if a >= b:
                continue
            c, d = (a - at, b - at) if outer == 1 else (first_row * size, last_row * size)
            part = self._flat(name, kind, key=key, start=c * inner, stop=d * inner).view(
                last_row - first_row, -1, inner
            )
            block[:, a - low : b - low] = part if outer == 1 else part[:, a - at : b - at]
            covered += b - a
        if covered != high - low:
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}): {covered} of {high - low} entries along dimension {dim} are in its "
                f"files; {_REMEDY}"
            )
        position = first_row * row + (low - offset) * inner  # of the block's first element, in the slice
        return block.view(-1)[start - position : stop - position]

    def _flat(self, name: str, kind: str, *, key: tuple[int, int], start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one saved slice."""
        pieces = []
        for first, last, index in self._fragments[name][key]:
            end = min(last, stop)
            if first <= start < end:
                tensor = self._file(index).get_slice(tensor_key(name, kind, offset=key[0], start=first))
                pieces.append(tensor[start - first : end - first])
                start = end
        if start < stop:
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}): elements {start}..{stop} of slice {key} are in no file; {_REMEDY}"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _file(self, index: int) -> Any:
        if index not in self._open:
            part = self._parts[index]
            path = self.folder / part["file"]
            if not self.verified:
                _verify_file(path, part["sha256"])
            try:
                self._open[index] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, error) from error
        return self._open[index]
