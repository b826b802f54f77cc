"""Facts of a built store: counts, tokens, periods, places, histograms, quality, licences; for `inspect` and card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sci_gpt.config import TokenizerConfig
from sci_gpt.data.quality import RULES
from sci_gpt.data.store import SPLITS, Store
from sci_tokenizers.sample import Sample, channel_name
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.variables import VARIABLES

BINS = 40
_PIECES, _VALUES = (
    32,
    400_000,
)  # pieces of the training split, and values in all, that a source's histograms are made of
_MOST_PLACES = 500


def store_facts(store: Store) -> dict[str, Any]:
    """What a built store holds, as plain values.

    Returns:
        path, name, fingerprint, commit, tokenizer (the sizes that tokens are counted for: the defaults), quality_rules
        {rule: what it says}, tokens, and per source: modality, nature, licence, citation, shape (variables, rows,
        columns), step_seconds, start and end (ISO 8601), splits {split: stretches, times, tokens, missing_share, start,
        end, quality {rule: spans, times}}, places, histograms {channel: unit, low, high, counts, values} of the
        training split, statistics {channel: ..} of the training split, in transformed units.

    Raises:
        DataError: a part of the store is missing or damaged.
    """
    settings = TokenizerSettings(**TokenizerConfig().model_dump())
    sources = [_source(store, name, settings=settings) for name in store.sources]
    return {
        "path": str(store.path),
        "name": store.manifest["name"],
        "fingerprint": store.fingerprint,
        "commit": store.manifest["commit"],
        "tokenizer": TokenizerConfig().model_dump(mode="json"),
        "quality_rules": {rule.name: rule.what for rule in RULES},
        "tokens": sum(split["tokens"] for row in sources for split in row["splits"].values()),
        "sources": sources,
    }


def iso(seconds: float) -> str:
    """A time in seconds since 1970 as ISO 8601, to the second."""
    return str(np.datetime64(round(seconds), "s"))


def _source(store: Store, name: str, *, settings: TokenizerSettings) -> dict[str, Any]:
    row = store.manifest["sources"][name]
    tokenizer = make_tokenizer(store.modality(name), settings)
    slots = tokenizer.num_slots(store.shape(name))
    splits = {}
    for split in SPLITS:
        frames, begins, closes = 0, [], []
        for records, _ in store.shards(name, split):
            frames += int((records["num_times"] // tokenizer.frame_times).sum())
            begins.append(float(records["start_time"].min()))
            closes.append(float(records["end_time"].max()))
        period = (min(begins), max(closes)) if begins else None
        splits[split] = {
            **row["splits"][split],
            "tokens": frames * slots,
            "start": iso(period[0]) if period else None,
            "end": iso(period[1]) if period else None,
        }
    starts = [split["start"] for split in splits.values() if split["start"]]
    ends = [split["end"] for split in splits.values() if split["end"]]
    return {
        "source": name,
        "modality": row["modality"],
        "nature": row["nature"],
        "licence": row["licence"],
        "citation": row["citation"],
        "shape": row["shape"],
        "step_seconds": row["step_seconds"],
        "start": min(starts, key=np.datetime64),
        "end": max(ends, key=np.datetime64),
        "splits": splits,
        "places": _places(store, name),
        "histograms": _histograms(store, name),
        "statistics": {channel: _moments(stats) for channel, stats in store.statistics[name].items()},
    }


def _moments(stats: ChannelStatistics) -> dict[str, Any]:
    """A channel's statistics; of the climatology of each cell only how many cells have one."""
    row = stats.to_json()
    del row["prior"]  # a run's, not the store's
    return row | {"cells": None if stats.cells is None else len(stats.cells.place)}


def _places(store: Store, name: str) -> dict[str, Any]:
    """Where a source's stretches are: bounds of each (degrees), each once, and how many have no known place."""
    found: dict[tuple[float, ...], None] = {}
    unknown = 0
    for split in SPLITS:
        for index in range(store.num_stretches(name, split)):
            sample = store.read(name, split, index=index, start=0, stop=1)
            known = np.isfinite(sample.latitude) & np.isfinite(sample.longitude)
            if not known.any():
                unknown += 1
                continue
            south, west = float(sample.latitude[known].min()), float(sample.longitude[known].min())
            north, east = float(sample.latitude[known].max()), float(sample.longitude[known].max())
            found[tuple(round(number, 4) for number in (south, north, west, east))] = None
    names = ("south", "north", "west", "east")
    listed = [dict(zip(names, bounds, strict=True)) for bounds in list(found)[:_MOST_PLACES]]
    return {"known": len(found), "stretches_without_place": unknown, "bounds": listed}


def _histograms(store: Store, name: str) -> dict[str, Any]:
    """Histograms per channel over pieces spread evenly over the training split, in physical units."""
    variables, levels = store.variables(name)
    pieces = list(_pieces(store, name))
    found = {}
    for number, (variable, level) in enumerate(zip(variables, levels, strict=True)):
        values = np.concatenate([piece.values[:, number][piece.valid[:, number]] for piece in pieces])
        if not len(values):
            continue
        low, high = float(values.min()), float(values.max())
        counts, _ = np.histogram(values, bins=BINS, range=(low, high if high > low else low + 1.0))
        found[channel_name(variable, level)] = {
            "unit": VARIABLES[variable].unit if variable in VARIABLES else None,
            "low": low,
            "high": high,
            "counts": counts.tolist(),
            "values": len(values),
        }
    return found


def _pieces(store: Store, name: str) -> Iterator[Sample]:
    lengths = store.lengths(name, "train")
    ends = np.cumsum(lengths)
    whole, per_time = int(ends[-1]), int(np.prod(store.shape(name)))
    times = max(1, min(_VALUES // (_PIECES * per_time), whole // _PIECES))
    for at in np.unique(np.linspace(0, max(whole - times, 0), _PIECES).astype(int)).tolist():
        index = int(np.searchsorted(ends, at, side="right"))
        start = at - (int(ends[index - 1]) if index else 0)
        stop = min(start + times, int(lengths[index]))
        yield store.read(name, "train", index=index, start=start, stop=stop)
