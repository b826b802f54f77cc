"""What bounds our loader: the time of a window split into its parts, each timed alone over the same windows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.loader_systems import Ours
from sci_gpt.data.shard import Shard, block_sums

PARTS = ("sample number to window", "window to stretch and times", "reading bytes", "checksums", "Sample, with checks")


def split(folder: Path, *, window_bytes: int, repeats: int = 5) -> dict[str, float]:
    """Microseconds of a window, in all ("whole") and of each of PARTS (best of `repeats` epochs), warm."""
    ours = Ours(folder, 1, window_bytes=window_bytes)
    corpus = ours.corpus
    windows, store = corpus.windows[0], corpus.store
    total = windows.num_windows
    numbers = [corpus.order.sample(n)[1] for n in range(total)]
    asked: list[tuple[Shard, int, int]] = []
    list(ours.epoch())
    read = Shard.read

    def remembered(shard: Shard, offset: int, *, size: int) -> bytes:
        asked.append((shard, offset, size))
        return read(shard, offset, size=size)

    Shard.read = remembered  # type: ignore[method-assign, assignment]
    try:
        for _ in ours.epoch():
            continue
    finally:
        Shard.read = read  # type: ignore[method-assign]
    index, start, stop = windows.locate(numbers[0])
    one = store.read("field", "train", index=index, start=start, stop=stop)
    film = {"time": one.time, "year_phase": one.year_phase, "day_phase": one.day_phase}

    def epoch() -> None:
        for _ in ours.epoch():
            continue

    def reading() -> None:
        for shard, offset, size in asked:
            shard.read(offset, size=size)

    def checking() -> None:
        for shard, offset, size in asked:
            block_sums(shard.read(offset, size=size))

    def sampling() -> None:
        for _ in range(total):
            one.filmed(np.frombuffer(one.values.data, "<f4").reshape(one.values.shape), one.valid, **film)

    def best(what: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            what()
            seconds.append(time.perf_counter() - begun)
        return 1e6 * min(seconds) / total

    reads = best(reading)
    parts = (
        best(lambda: [corpus.order.sample(n) for n in range(total)]),
        best(lambda: [windows.locate(number) for number in numbers]),
        reads,
        best(checking) - reads,  # on bytes that were just read, as they are there
        best(sampling),
    )
    return {"whole": best(epoch)} | dict(zip(PARTS, parts, strict=True))


def describe(parts: dict[str, float]) -> str:
    """The split as a sentence."""
    rest = parts["whole"] - sum(parts[name] for name in PARTS)
    listed = ", ".join(f"{name} {parts[name]:.1f}" for name in sorted(PARTS, key=lambda name: -parts[name]))
    return f"{parts['whole']:.1f} µs a window: {listed}, the rest (finding the stretch, calls) {rest:.1f}"
