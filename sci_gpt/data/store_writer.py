"""Writes the shards of one split of one source: WebDataset tars of stretches, with fixed-width records beside them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sci_gpt.data.quality import RULES, SPAN, find_spans
from sci_gpt.data.shard import KEY, block_sums
from sci_gpt.data.store import DTYPES, QUALITY, RECORD, TIME_BYTES, records_name, shard_name, sums_name, unpack
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Packing:
    """An archive's own integers: physical value = stored * scale + offset (in the variable table's unit)."""

    dtype: str
    scale: float
    offset: float


class SplitWriter:
    """Appends stretches to the shards of one split; the index is written by `close`, or at a clean exit from `with`.

    Args:
        folder: `STORE/SOURCE/SPLIT`; made here.
        shard_bytes: a new shard is begun when the present one has reached this size.
        packing: the archive's integers, kept where they give the sample's values back exactly.
    """

    def __init__(self, folder: Path, shard_bytes: int, *, packing: Packing | None = None) -> None:
        self.folder, self.shard_bytes, self.packing = folder, shard_bytes, packing
        self.num_stretches = self.num_times = self.num_values = self.num_missing = 0
        self._tar: tarfile.TarFile | None = None
        self._rows: list[np.ndarray] = []
        self._sums: list[int] = []
        self._spans: list[tuple[int, int, int, int]] = []
        self._shards: list[dict[str, object]] = []
        folder.mkdir(parents=True)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()

    def close(self) -> None:
        """Finish the last shard and write the index."""
        self._finish_shard()
        np.save(self.folder / QUALITY, np.array(self._spans, SPAN), allow_pickle=False)
        (self.folder / "index.json").write_text(json.dumps({"shards": self._shards}, indent=1) + "\n", encoding="utf-8")

    def quality(self) -> dict[str, dict[str, int]]:
        """{rule: {"spans", "times"}} of what was added: where a rule of quality holds."""
        rows = np.array(self._spans, SPAN)
        found = {}
        for number, rule in enumerate(RULES):
            mine = rows[rows["rule"] == number]
            found[rule.name] = {"spans": len(mine), "times": int((mine["stop"] - mine["start"]).sum())}
        return found

    def add(self, sample: Sample) -> None:
        """Append one stretch.

        Raises:
            DataError: the key is not SOURCE/GROUP[/PART] of letters, digits, `_` and `-` (a dot ends a WebDataset key).
        """
        if not KEY.fullmatch(sample.key) or len(sample.key) > RECORD["key"].itemsize:
            raise DataError(
                f"sample key {sample.key!r} must be SOURCE/GROUP[/PART] of letters, digits, '_' and '-', at most "
                f"{RECORD['key'].itemsize} characters"
            )
        if self._tar is None:
            self._tar = tarfile.open(self.folder / shard_name(len(self._shards)), "w", format=tarfile.GNU_FORMAT)
        self._rows.append(self._write(self._tar, sample))
        self._spans += [(self.num_stretches, *span) for span in find_spans(sample)]
        self.num_stretches += 1
        self.num_times += sample.num_times
        self.num_values += sample.valid.size
        self.num_missing += int(sample.valid.size - np.count_nonzero(sample.valid))
        if self._tar.offset >= self.shard_bytes:
            self._finish_shard()

    def _write(self, tar: tarfile.TarFile, sample: Sample) -> np.ndarray:
        stored, code, scale, offset = _pack(sample, self.packing)
        row = np.zeros((), RECORD)
        row["key"] = sample.key.encode()
        row["shard"] = len(self._shards)
        row["num_times"] = sample.num_times
        row["code"], row["scale"], row["offset"] = code, scale, offset
        row["values_bytes_per_time"] = stored[0].nbytes
        row["valid_bytes_per_time"] = sample.valid[0].size
        row["step_seconds"] = sample.step_seconds
        row["start_time"], row["end_time"] = sample.time[0], sample.time[-1]
        row["missing_share"] = 1.0 - np.count_nonzero(sample.valid) / sample.valid.size
        clock = np.stack([sample.time, sample.year_phase, sample.day_phase], axis=1).astype("<f8")
        if clock[0].nbytes != TIME_BYTES:
            raise DataError(f"sample {sample.key!r}: a time's record is {TIME_BYTES} bytes, got {clock[0].nbytes}")
        row["valid_offset"] = -1
        members = {"values": stored}
        if not sample.valid.all():
            members["valid"] = sample.valid.astype(np.uint8)
        members["time"] = clock
        members["place"] = np.stack([sample.latitude, sample.longitude, sample.elevation]).astype("<f4")
        for name, array in members.items():
            row[f"{name}_offset"], data = _add_array(tar, f"{sample.key}.{name}.npy", array=array)
            row[f"{name}_sums"] = len(self._sums)
            self._sums += block_sums(data)
        meta = {
            "key": sample.key,
            "source": sample.source,
            "modality": sample.modality,
            "channels": sample.channels,
            "step_seconds": sample.step_seconds,
            "scale": scale,
            "offset": offset,
        }
        _add_bytes(tar, f"{sample.key}.meta.json", content=json.dumps(meta).encode())
        return row

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        number = len(self._shards)
        self._tar.close()
        self._tar = None
        rows, sums = np.stack(self._rows), np.array(self._sums, "<u4")
        np.save(self.folder / records_name(number), rows, allow_pickle=False)
        np.save(self.folder / sums_name(number), sums, allow_pickle=False)
        path = self.folder / shard_name(number)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(
            {
                "shard": path.name,
                "records": records_name(number),
                "records_crc32": zlib.crc32(rows.tobytes()),
                "sums": sums_name(number),
                "sums_crc32": zlib.crc32(sums.tobytes()),
                "num_stretches": len(rows),
                "num_times": int(rows["num_times"].sum()),
                "bytes": path.stat().st_size,
                "sha256": digest,
            }
        )
        self._rows, self._sums = [], []


def _pack(sample: Sample, packing: Packing | None) -> tuple[np.ndarray, int, float, float]:
    if packing is not None and np.dtype(packing.dtype) in DTYPES:
        dtype = np.dtype(packing.dtype)
        limits = np.iinfo(dtype)
        steps = np.rint((sample.values.astype(np.float64) - packing.offset) / packing.scale)
        steps[~sample.valid] = 0.0
        if steps.min() >= limits.min and steps.max() <= limits.max:
            stored = steps.astype(dtype)
            back = unpack(stored, packing.scale, offset=packing.offset)
            if np.array_equal(back[sample.valid], sample.values[sample.valid]):
                return stored, DTYPES.index(dtype), packing.scale, packing.offset
    return np.ascontiguousarray(sample.values, "<f4"), 0, 1.0, 0.0


def _add_array(tar: tarfile.TarFile, name: str, *, array: np.ndarray) -> tuple[int, memoryview]:
    """Offset of the array's first byte in the tar, and its data."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    content = buffer.getvalue()
    header = len(content) - array.nbytes
    return _add_bytes(tar, name, content=content) + header, memoryview(content)[header:]


def _add_bytes(tar: tarfile.TarFile, name: str, *, content: bytes) -> int:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = 0o644
    start = tar.offset + len(entry.tobuf(tar.format))
    tar.addfile(entry, io.BytesIO(content))
    return start
