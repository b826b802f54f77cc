"""Writes the index of one split of a source that stays where it is: a record per stretch, and none of its values."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sci_gpt.data.addresses import load_table
from sci_gpt.data.in_place import IN_PLACE, ZarrSample
from sci_gpt.data.index import INDEX, RECORD, SUM, quality_name, records_name, shard_name, sums_name
from sci_gpt.data.quality import SPAN, count_spans, find_spans
from sci_gpt.data.shard import KEY
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample


class InPlaceWriter:
    """Appends the records of one split's samples; the index is written by `close`, or at a clean exit from `with`.

    Samples of one tile that follow each other in the Zarr and in time are one stretch, whatever blocks they were read
    in and in whatever order they came: only splits and gaps cut. Spans of quality are looked for within each block.

    Args:
        folder: `STORE/SOURCE/SPLIT`; made here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_stretches = self.num_times = self.num_values = self.num_missing = 0
        self._rows: list[np.ndarray] = []
        self._spans: list[tuple[int, int, int, int]] = []
        folder.mkdir(parents=True)

    def __enter__(self) -> InPlaceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()

    def add(self, sample: Sample) -> None:
        """Take in where one sample is.

        Raises:
            DataError: it does not know that, or its key is not SOURCE/GROUP/PART as `SplitWriter.add` wants it.
        """
        if not isinstance(sample, ZarrSample):
            raise DataError(
                f"sample {sample.key!r} does not say where in a Zarr it is; copy its source (in_place: false)"
            )
        if not KEY.fullmatch(sample.key) or len(sample.key) > RECORD["key"].itemsize:
            raise DataError(
                f"sample key {sample.key!r} must be SOURCE/GROUP/PART of letters, digits, '_' and '-', at most "
                f"{RECORD['key'].itemsize} characters; give the Zarr a shorter name"
            )
        row = np.zeros((), RECORD)
        row["key"] = sample.key.encode()
        row["num_times"] = sample.num_times
        row["code"], row["scale"] = IN_PLACE, 1.0
        row["values_offset"] = sample.first
        for name in ("valid", "time", "place"):
            row[f"{name}_offset"] = -1
        row["values_bytes_per_time"] = sample.values[0].nbytes
        row["step_seconds"] = sample.step_seconds
        row["start_time"], row["end_time"] = sample.time[0], sample.time[-1]
        missing = int(sample.valid.size - np.count_nonzero(sample.valid))
        row["missing_share"] = missing / sample.valid.size
        self._spans += [(len(self._rows), *span) for span in find_spans(sample)]
        self._rows.append(row)
        self.num_values += sample.valid.size
        self.num_missing += missing
        self.num_times += sample.num_times

    def take(self, folder: Path) -> None:
        """Take in the index of the same split that another writer made of other parts of the source.

        Raises:
            DataError: it is torn.
        """
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        records = [load_table(folder / records_name(number), RECORD) for number in range(len(index["shards"]))]
        before = len(self._rows)
        for number, table in enumerate(records):
            for stretch, rule, start, stop in load_table(folder / quality_name(number), SPAN).tolist():
                self._spans.append((before + stretch, rule, start, stop))
            before += len(table)
        self._rows += [np.array(row) for table in records for row in table]
        for name in ("num_times", "num_values", "num_missing"):
            setattr(self, name, getattr(self, name) + int(index[name]))

    def close(self) -> None:
        """Join what is contiguous and write the index."""
        rows, spans = _joined(self._rows, self._spans)
        self.num_stretches = len(rows)
        self._rows, self._spans = list(rows), spans
        shards: list[dict[str, Any]] = []
        if len(rows):
            tables = {
                "records": (records_name(0), rows),
                "sums": (sums_name(0), np.zeros(0, SUM)),
                "quality": (quality_name(0), np.array(spans, SPAN)),
            }
            for name, table in tables.values():
                np.save(self.folder / name, table, allow_pickle=False)
            shards.append(  # a row as of any shard: only the tar is not there
                {
                    "shard": shard_name(0),
                    "num_stretches": len(rows),
                    "num_times": self.num_times,
                    "num_spans": len(spans),
                    "bytes": 0,
                    "sha256": None,
                    **{f"{kind}_crc32": zlib.crc32(table.tobytes()) for kind, (_, table) in tables.items()},
                }
            )
        counts = {name: getattr(self, name) for name in ("num_times", "num_values", "num_missing")}
        (self.folder / INDEX).write_text(json.dumps(counts | {"shards": shards}, indent=1) + "\n", encoding="utf-8")

    def quality(self) -> dict[str, dict[str, int]]:
        """{rule: {"spans", "times"}} of what was added: where a rule of quality holds."""
        return count_spans(np.array(self._spans, SPAN))


def _joined(
    rows: list[np.ndarray], spans: list[tuple[int, int, int, int]]
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Records of whole stretches, tile by tile in the order of time, and their spans; blocks that follow are joined."""
    tiles: dict[bytes, int] = {}
    places = [tiles.setdefault(row["key"].item().split(b"/")[1], len(tiles)) for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (places[n], int(rows[n]["values_offset"])))
    joined: list[np.ndarray] = []
    moved: dict[int, tuple[int, int]] = {}  # block -> its stretch, and times of the stretch before it
    for n in order:
        row = rows[n].copy()
        last = joined[-1] if joined else None
        if last is not None and _follows(last, row):
            moved[n] = (len(joined) - 1, int(last["num_times"]))
            before, more = int(last["num_times"]), int(row["num_times"])
            share = (before * last["missing_share"] + more * row["missing_share"]) / (before + more)
            last["num_times"], last["end_time"], last["missing_share"] = before + more, row["end_time"], share
        else:
            moved[n] = (len(joined), 0)
            joined.append(row)
    found = [(moved[n][0], rule, start + moved[n][1], stop + moved[n][1]) for n, rule, start, stop in spans]
    return np.array(joined, RECORD), sorted(found)


def _follows(last: np.ndarray, row: np.ndarray) -> bool:
    """Whether a block begins where a stretch of the same tile ends, on the Zarr's axis and in time."""
    same = last["key"].item().split(b"/")[:2] == row["key"].item().split(b"/")[:2]
    next_to = int(last["values_offset"]) + int(last["num_times"]) == int(row["values_offset"])
    return bool(same and next_to and row["start_time"] - last["end_time"] <= 1.5 * row["step_seconds"])
