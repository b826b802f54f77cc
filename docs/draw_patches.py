"""Draws docs/images/patches.png from the code: areas of cells, columns around the globe, a round trip of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from sci_gpt.model.layers import whole_turns
from sci_tokenizers.sample import Sample
from sci_tokenizers.sphere import cell_areas
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.trace import TraceTokenizer

TARGET = Path(__file__).resolve().parent / "images" / "patches.png"
BLUE, RED, GREY = "#4477aa", "#aa3377", "#888888"
PERIOD, PAIRS = 45, 8  # columns of patches around a 1 degree grid in patches of 8; column pairs of a head of width 64
ROWS, COLUMNS = 31, 48  # of a global grid with rows on the poles, closest at the equator
CONTEXT, FRAMES, SAMPLES = 24, 48, 5


def draw_areas(axes: Axes) -> None:
    """Exact areas of the rows of a global grid beside the cosine of latitude."""
    share = np.linspace(-1.0, 1.0, ROWS)
    rows = 90.0 * np.sign(share) * np.abs(share) ** 1.5
    latitude, longitude = np.meshgrid(rows, np.arange(COLUMNS) * 360.0 / COLUMNS, indexing="ij")
    areas = cell_areas(latitude, longitude)[:, 0] / 1e9
    middle = areas[len(rows) // 2]
    axes.plot(areas, rows, "o-", color=BLUE, markersize=3, linewidth=1, label="area of a cell")
    axes.plot(
        middle * np.cos(np.radians(rows)), rows, color=GREY, linewidth=1, linestyle="--", label="cosine of latitude"
    )
    axes.annotate(
        f"a row on the pole is half a cell:\n{areas[-1]:.0f}, not 0",
        (areas[-1], 90.0),
        (0.55 * areas.max(), 78.0),
        fontsize=8,
        arrowprops={"arrowstyle": "->", "linewidth": 0.7},
    )
    axes.set_xlabel("1000 km$^2$", fontsize=9)
    axes.set_ylabel("latitude", fontsize=9)
    axes.set_title(f"A global grid of {ROWS} uneven rows", fontsize=10)
    axes.legend(fontsize=8, loc="lower right", frameon=False)


def draw_turns(axes: Axes) -> None:
    """How alike two columns look to attention, by their distance: plain rotary frequencies and whole turns."""
    apart = np.arange(PERIOD + 1)
    plain = 1000.0 ** (-np.arange(PAIRS) / PAIRS)
    around = np.array(whole_turns(PERIOD, PAIRS)) * 2 * np.pi / PERIOD
    for frequency, colour, name in ((plain, GREY, "a region: plain frequencies"), (around, BLUE, "around the globe")):
        axes.plot(apart, np.cos(apart[:, None] * frequency).mean(axis=1), color=colour, linewidth=1.2, label=name)
    axes.axvline(PERIOD, color="black", linewidth=0.6)
    axes.text(PERIOD - 0.7, 0.9, "the same place", ha="right", fontsize=8)
    axes.set_xlabel("patches to the east", fontsize=9)
    axes.set_ylabel("mean cosine of the angles", fontsize=9)
    axes.set_ylim(-0.35, 1.05)
    axes.set_title(f"Columns of {PERIOD} patches around the globe", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.42, 1.0), frameon=False)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A made-up record with an onset, and what came back from its tokens."""

    seconds: np.ndarray
    truth: np.ndarray
    back: np.ndarray
    scale: float


def made_record() -> Record:
    """Ten hertz of noise of 12 counts about an offset of 3,000, and an onset of a million times that."""
    times = FRAMES * SAMPLES
    random = np.random.default_rng(5)
    onset = np.arange(times) >= 0.7 * times
    values = (3000.0 + 12.0 * random.standard_normal(times) * np.where(onset, 1e6, 1.0)).astype(np.float32)
    place = np.zeros((1, 1), np.float32)
    sample = Sample(
        key="record",
        source="record",
        modality="trace",
        variables=("digitizer_counts_vertical",),
        levels=(float("nan"),),
        values=values[:, None, None, None],
        valid=np.ones((times, 1, 1, 1), bool),
        time=np.arange(times) / 10.0,
        year_phase=np.zeros(times, np.float32),
        day_phase=np.zeros(times, np.float32),
        step_seconds=0.1,
        latitude=place,
        longitude=place,
        elevation=place,
    )
    tokenizer = TraceTokenizer(TokenizerSettings(trace_samples=SAMPLES))
    tokens = tokenizer.encode(sample, num_context=CONTEXT, leads=(1,))
    back = tokenizer.decode(tokens, tokens.payload)[:, 0, 0, 0]
    return Record(seconds=sample.time, truth=values, back=back, scale=float(tokens.scale[0, 0]))


def draw_trace(axes: Axes) -> None:
    """Error of the round trip beside what is allowed."""
    record = made_record()
    truth = record.truth.astype(np.float64)
    error = np.abs(record.back - truth)
    axes.semilogy(record.seconds, np.abs(truth), color=GREY, linewidth=0.8, label="|x|, counts")
    axes.semilogy(
        record.seconds, 1e-3 * (np.abs(truth) + record.scale), color=RED, linewidth=0.8, label="allowed error"
    )
    exact = error == 0
    axes.semilogy(record.seconds[~exact], error[~exact], ".", color=BLUE, markersize=3, label="error")
    axes.axvline(CONTEXT * SAMPLES / 10.0, color="black", linewidth=0.6)
    axes.text(CONTEXT * SAMPLES / 10.0, 3e-2, " end of context", fontsize=8)
    axes.set_ylim(1e-2, 1e10)
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_title(f"A trace's round trip ({int(exact.sum())} of {len(exact)} come back exactly)", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", frameon=False)


def main() -> None:
    """Draw the figure."""
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.0), constrained_layout=True)
    draw_areas(axes[0])
    draw_turns(axes[1])
    draw_trace(axes[2])
    for each in axes:
        each.tick_params(labelsize=8)
    figure.savefig(TARGET, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
