"""Reading: what a run asks of its store: bytes per token, samples and bytes per second, packing, windows left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from sci_gpt.config import PretrainConfig
from sci_gpt.data.curriculum import Phase
from sci_gpt.data.loader import Corpus
from sci_gpt.data.store import Store
from sci_gpt.data.stretch import window_bytes
from sci_gpt.recipes import parts

_LOOKED_AT = 256  # windows of a source, evenly over all of them


def reading(config: PretrainConfig, store: Store) -> list[dict[str, Any]]:
    """What each phase reads; from the index, no data are read.

    Returns:
        Per phase: packing (`packing_report`), bytes_per_token, tokens_per_sample (means of the mixture),
        bytes_per_token_by_modality, and sources,
        each with modality, share (of the mixture's tokens), tokens_per_sample, bytes_per_sample (by member: values as
        they are stored, valid, time, place, in whole blocks of checksums, as if nothing were kept from the window
        before), bytes_per_token, left_out ({rule: windows}) and share_left_out.

    Raises:
        DataError: the store has not what the phases ask for.
    """
    curriculum = parts.curriculum(config, store)
    return [
        _phase(config, phase, corpus=corpus)
        for phase, corpus in zip(curriculum.phases, curriculum.corpora, strict=True)
    ]


def demand(phase: dict[str, Any], tokens_per_second: float, *, nodes: int) -> dict[str, float]:
    """Samples per second, and GB per second and node, that a phase needs at a rate of tokens of the whole run."""
    return {
        "tokens_per_second": tokens_per_second,
        "samples_per_second": tokens_per_second / phase["tokens_per_sample"],
        "gigabytes_per_second_and_node": tokens_per_second * phase["bytes_per_token"] / nodes / 1e9,
    }


def _phase(config: PretrainConfig, phase: Phase, *, corpus: Corpus) -> dict[str, Any]:
    packing = parts.packing(config, phase, corpus=corpus)
    weight = sum(spec.weight for spec in phase.specs)
    sources = {
        spec.source: {"share": spec.weight / weight} | _source(corpus, number)
        for number, spec in enumerate(phase.specs)
    }
    samples = sum(row["share"] / row["tokens_per_sample"] for row in sources.values())  # per token
    return {
        "packing": packing,
        "bytes_per_token": sum(row["share"] * row["bytes_per_token"] for row in sources.values()),
        "tokens_per_sample": 1.0 / samples,
        "bytes_per_token_by_modality": {
            modality: sum(row["share"] * row["bytes_per_token"] for row in rows) / sum(row["share"] for row in rows)
            for modality in sorted({row["modality"] for row in sources.values()})
            if (rows := [row for row in sources.values() if row["modality"] == modality])
        },
        "sources": sources,
    }


def _source(corpus: Corpus, number: int) -> dict[str, Any]:
    windows, store = corpus.windows[number], corpus.store
    source, length = windows.spec.source, corpus.lengths[number]
    records, shape = store.stretches(source, windows.split), store.shape(source)
    chosen = np.unique(np.linspace(0, windows.num_windows - 1, _LOOKED_AT).round().astype(np.int64)).tolist()
    total: dict[str, float] = {}
    for window in chosen:
        stretch, start, stop = windows.locate(window)
        for name, size in window_bytes(records[stretch], shape, start=start, stop=stop).items():
            total[name] = total.get(name, 0.0) + size / len(chosen)
    lost = sum(windows.left_out.values())
    return {
        "modality": store.modality(source),
        "tokens_per_sample": length,
        "bytes_per_sample": total,
        "bytes_per_token": sum(total.values()) / length,
        "left_out": windows.left_out,
        "share_left_out": lost / (windows.num_windows + lost),
    }


def describe_reading(phase: dict[str, Any], *, basis: str) -> list[str]:
    """A phase's reading as lines for a person."""
    packing, need = phase["packing"], phase["demand"]
    lines = [
        f"rows                 fill {100 * packing['fill']:.1f} %, {100 * packing['mixed_rows']:.0f} % of them mixed, "
        f"attention cost over ranks within {100 * packing['cost_spread']:.1f} %",
        f"read from the store  {phase['bytes_per_token']:,.0f} bytes per token "
        f"({phase['tokens_per_sample']:,.0f} tokens per sample): "
        + ", ".join(f"{name} {size:,.0f}" for name, size in phase["bytes_per_token_by_modality"].items()),
    ]
    for name, row in phase["sources"].items():
        listed = ", ".join(f"{member} {size:,.0f}" for member, size in row["bytes_per_sample"].items())
        lost = f"; {100 * row['share_left_out']:.1f} % of windows left out" if row["left_out"] else ""
        lines.append(
            f"  {name} ({row['modality']}, {100 * row['share']:.0f} % of tokens): {row['bytes_per_token']:,.0f} bytes "
            f"per token, of a sample {listed}{lost}"
        )
    return [
        *lines,
        f"at {need['tokens_per_second']:,.0f} tokens/s {need['samples_per_second']:,.1f} samples/s, "
        f"{need['gigabytes_per_second_and_node']:.4g} GB/s per node ({basis})",
    ]
