"""A worker of test_train_feed.py: takes steps from the feed as a trainer does, and tells what memory is its own."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import psutil

from sci_gpt.data.store import Store
from sci_gpt.recipes import parts
from sci_gpt.train.feed import Place, Prefetch, StepReader
from toy_store import toy_config

MIXTURE = [  # short windows: it is their number that matters
    {"source": "field", "weight": 1, "frames": 4, "stride": 1, "context_frames": [1, 2]},
    {"source": "station", "weight": 2, "frames": 6, "stride": 1, "context_frames": [2, 3]},
    {"source": "quake", "weight": 0.2, "frames": 8, "stride": 1, "context_frames": [2, 4]},
]


def main(store: Path, marks: list[int]) -> None:
    """Print {"samples", "bytes"}: memory that no other process shares, after so many samples or a few more."""
    schedule = {"steps": 10**6, "warmup_steps": 1, "cooldown_steps": 1}
    config = toy_config(store, store.parent / "run", schedule=schedule, mixture=MIXTURE, rows_per_step=6)
    curriculum = parts.curriculum(config, Store.open(store))
    place = Place(rank=0, world=1, accumulation=1)
    feed = Prefetch(StepReader(curriculum, place, settings=parts.tokenizer_settings(config), threads=2))
    step = n = 0
    found = []
    for mark in marks:
        while n < mark:
            rows, _ = feed.get(step, n)
            assert not rows.passed_over
            step, n = step + 1, rows.next_sample
        del rows
        gc.collect()
        found.append({"samples": n, "bytes": psutil.Process().memory_full_info().uss})
    feed.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
