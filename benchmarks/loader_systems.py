"""The loaders that `benchmarks.loader` compares: each writes the same windows in its own format and reads them back.

Runs in a process, and for the peers in a virtual environment, of its own: `loader_systems.py write SYSTEM ..` or `read
SYSTEM ..`, which reads an epoch per line of stdin. So nothing of the product is imported at the top.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

FRAMES = 16  # of a window
SHARD_BYTES = 16 << 20
STRETCH_BYTES = 4 << 20
BATCH_BYTES = 4 << 20
SHUFFLED_BYTES = 64 << 20  # webdataset's buffer: 1,000 samples, fewer where they are large


class Ours:
    """A store, read as training does: the windows of sample numbers in the run's order, checksums compared."""

    def __init__(self, folder: Path, workers: int, *, window_bytes: int) -> None:
        from sci_gpt.data.loader import Corpus
        from sci_gpt.data.store import Store
        from sci_gpt.data.windows import WindowSpec
        from sci_tokenizers.tokenizer import TokenizerSettings

        spec = WindowSpec(source="field", frames=FRAMES, stride=FRAMES, context_frames=(2, 4), leads=(1,))
        self.corpus = Corpus(Store.open(folder), [spec], seed=0, settings=TokenizerSettings(grid_patch=8))
        self.workers, self.batch, self._next = workers, max(1, BATCH_BYTES // window_bytes), 0

    @staticmethod
    def write(windows: np.ndarray, folder: Path) -> None:
        """Long stretches, of which the windows are cut without a gap."""
        from sci_gpt.data.store import FORMAT_VERSION
        from sci_gpt.data.store_writer import SplitWriter, seal
        from sci_tokenizers.sample import Sample

        per_stretch = max(1, STRETCH_BYTES // windows[0].nbytes)
        shape = windows.shape[2:]
        with SplitWriter(folder / "field" / "train", SHARD_BYTES) as writer:
            for first in range(0, len(windows), per_stretch):
                values = windows[first : first + per_stretch].reshape(-1, *shape)
                seconds = 3600.0 * (first * FRAMES + np.arange(len(values)))
                place = np.zeros(shape[1:], np.float32)
                writer.add(
                    Sample(
                        key=f"field/{first}",
                        source="field",
                        modality="grid",
                        variables=("air_temperature",),
                        levels=(np.nan,),
                        values=values,
                        valid=np.ones(values.shape, bool),
                        time=seconds,
                        year_phase=(seconds / 31556952.0 % 1.0).astype(np.float32),
                        day_phase=(seconds / 86400.0 % 1.0).astype(np.float32),
                        step_seconds=3600.0,
                        latitude=place,
                        longitude=place,
                        elevation=place,
                    )
                )
        facts = {"modality": "grid", "step_seconds": 3600.0, "variables": ["air_temperature"], "levels": [None]}
        sources = {"field": facts | {"shape": shape, "gap_days": None}}
        manifest = {"format_version": FORMAT_VERSION, "fingerprint": "benchmark", "sources": sources}
        (folder / "statistics.json").write_text("{}", encoding="utf-8")
        seal(folder, manifest)

    def epoch(self) -> Iterator[np.ndarray]:
        """The values of every window once."""
        first, total = self._next, self.corpus.windows[0].num_windows
        self._next += total
        if self.workers == 1:
            yield from map(self._values, range(first, first + total))
            return
        for begin in range(first, first + total, self.batch):  # a step's documents, as train/feed.py reads them
            with ThreadPoolExecutor(self.workers) as pool:
                yield from pool.map(self._values, range(begin, min(begin + self.batch, first + total)))

    def _values(self, n: int) -> np.ndarray:
        source, window, _ = self.corpus.order.sample(n)
        return self.corpus.windows[source].read(window).values


class Plain:
    """A sequential loop over tars with `tarfile` that returns each member's bytes, nothing decoded.

    The tars are its own: webdataset's have a second header per member (PAX, for the fraction of its time), with which
    the loop takes nearly twice as long.
    """

    def __init__(self, folder: Path, workers: int, *, window_bytes: int) -> None:
        self.paths = sorted(folder.glob("*.tar"))

    @staticmethod
    def write(windows: np.ndarray, folder: Path) -> None:
        """A `.npy` per window, one header each."""
        per_shard = max(1, SHARD_BYTES // windows[0].nbytes)
        for first in range(0, len(windows), per_shard):
            with tarfile.open(folder / f"shard-{first:08d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
                for number in range(first, min(first + per_shard, len(windows))):
                    content = io.BytesIO()
                    np.save(content, windows[number], allow_pickle=False)
                    entry = tarfile.TarInfo(f"{number:08d}.npy")
                    entry.size = content.tell()
                    content.seek(0)
                    tar.addfile(entry, content)

    def epoch(self) -> Iterator[bytes]:
        """The bytes of every member once."""
        for path in self.paths:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file is not None:
                        yield file.read()


class Webdataset:
    """Shards shuffled, then samples in a buffer; `.npy` decoded by its own decoder; workers by torch's DataLoader."""

    def __init__(self, folder: Path, workers: int, *, window_bytes: int) -> None:
        import webdataset

        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        buffer = min(1000, max(1, SHUFFLED_BYTES // window_bytes))
        data = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(buffer).decode().to_tuple("npy")
        self.samples = _loader(data, workers, window_bytes=window_bytes)

    @staticmethod
    def write(windows: np.ndarray, folder: Path) -> None:
        """A `.npy` per window."""
        import webdataset

        pattern = str(folder / "shard-%05d.tar")
        most = -(-len(windows) // 4)  # several shards also of little data: a worker without a shard is an error
        with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=most, verbose=0) as writer:
            for number, window in enumerate(windows):
                writer.write({"__key__": f"{number:08d}", "npy": window})

    def epoch(self) -> Iterator[np.ndarray]:
        """Every sample once; a batch at a time where there are workers."""
        for (values,) in self.samples:
            yield values


class Streaming:
    """mosaicml-streaming: StreamingDataset(shuffle=True); workers by its StreamingDataLoader."""

    def __init__(self, folder: Path, workers: int, *, window_bytes: int) -> None:
        import streaming

        batch = max(1, BATCH_BYTES // window_bytes)
        data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
        make = partial(streaming.StreamingDataLoader, batch_size=batch, num_workers=workers, persistent_workers=True)
        self.samples = data if workers == 1 else make(data)

    @staticmethod
    def write(windows: np.ndarray, folder: Path) -> None:
        """An MDS array of known type and shape per window."""
        import streaming

        column = f"ndarray:float32:{','.join(map(str, windows.shape[1:]))}"
        with streaming.MDSWriter(out=str(folder), columns={"values": column}, size_limit=SHARD_BYTES) as writer:
            for window in windows:
                writer.write({"values": window})

    def epoch(self) -> Iterator[np.ndarray]:
        """Every sample once; a batch at a time where there are workers."""
        for sample in self.samples:
            yield sample["values"]


class Litdata:
    """litdata: StreamingDataset(shuffle=True); workers by its StreamingDataLoader."""

    def __init__(self, folder: Path, workers: int, *, window_bytes: int) -> None:
        import litdata

        data = litdata.StreamingDataset(str(folder), shuffle=True)
        batch = max(1, BATCH_BYTES // window_bytes)
        make = partial(litdata.StreamingDataLoader, batch_size=batch, num_workers=workers, persistent_workers=True)
        self.samples = data if workers == 1 else make(data)

    @staticmethod
    def write(windows: np.ndarray, folder: Path) -> None:
        """An array per window, by `optimize` in one process."""
        import litdata

        litdata.optimize(
            partial(_row, str(windows.filename)),  # type: ignore[attr-defined]  # a memory map
            list(range(len(windows))),
            str(folder),
            chunk_bytes=SHARD_BYTES,
            num_workers=1,
        )

    def epoch(self) -> Iterator[np.ndarray]:
        """Every sample once; a batch at a time where there are workers."""
        yield from self.samples


SYSTEMS: dict[str, Any] = {
    "ours": Ours,
    "plain tarfile loop": Plain,
    "webdataset": Webdataset,
    "mosaicml-streaming": Streaming,
    "litdata": Litdata,
}


def _row(path: str, number: int) -> np.ndarray:
    return np.array(np.load(path, mmap_mode="r")[number])


def _loader(data: Any, workers: int, *, window_bytes: int) -> Any:
    if workers == 1:
        return data
    from torch.utils.data import DataLoader

    batch = max(1, BATCH_BYTES // window_bytes)
    return DataLoader(data, batch_size=batch, num_workers=workers, persistent_workers=True)


def _digest(values: Any) -> bytes:
    """Of one window's values, whatever came: the bytes of a .npy or an array."""
    array = np.load(io.BytesIO(values), allow_pickle=False) if isinstance(values, bytes) else np.asarray(values)
    return hashlib.blake2b(np.ascontiguousarray(array, "<f4").tobytes(), digest_size=16).digest()


def _touch(values: Any) -> None:
    """Look into every page of what came: a view of a mapped file has not been read before somebody looks."""
    array = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else np.asarray(values).reshape(-1)
    array[:: 4096 // array.itemsize].max()


def answer(system: Any, question: str, *, workers: int) -> dict[str, Any]:
    """An epoch: "check" gives the digest over all windows, whatever their order; "time" its seconds.

    "time after the first" has the clock start at the first thing that comes, which is not counted; "start" reads none.
    """
    if question == "start":
        return {}
    if question == "check":
        found = sorted(_digest(values) for values in system.epoch())
        return {"samples": len(found), "digest": hashlib.blake2b(b"".join(found)).hexdigest()}
    begun, count = time.perf_counter(), 0
    many = workers > 1 and not isinstance(system, Ours)
    for number, values in enumerate(system.epoch()):
        _touch(values)
        if number == 0 and question == "time after the first":
            begun = time.perf_counter()
        else:
            count += len(values) if many else 1
    return {"samples": count, "seconds": time.perf_counter() - begun}


def main(arguments: list[str]) -> int:
    """`write SYSTEM WINDOWS.npy FOLDER` or `read SYSTEM FOLDER WORKERS WINDOW_BYTES` with questions on stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print goes to stderr, and does not mix with the answers
    what, name, *rest = arguments
    if what == "write":
        SYSTEMS[name].write(np.load(rest[0], mmap_mode="r"), Path(rest[1]))
        return 0
    workers = int(rest[1])
    system = SYSTEMS[name](Path(rest[0]), workers, window_bytes=int(rest[2]))
    for question in sys.stdin:
        print(json.dumps(answer(system, question.strip(), workers=workers)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
