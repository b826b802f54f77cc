"""Sampling of trajectories: the key-value cache and growing documents against encoding and computing all again."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks.results import machine, write_section
from sci_gpt.model.heads import SamplePrediction
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import Noise, NoiseSettings, to_inputs
from sci_gpt.model.noise import frame_noise, together_of
from sci_gpt.model.predict import Predictor
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_tokenizers.growth import frames_of
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.tokenizer import TokenizerSettings

SIZE = "1M"
CONTEXT, HORIZON = 512, 64
SERIES, MEMBERS = 8, 4
NOISE = 16
TIMED = 4  # steps of the uncached, spread over the horizon; all of them would take minutes


class Recomputed:
    """Trajectories without a cache: each frame encodes all documents and computes all tokens again, the same noise."""

    def __init__(self, predictor: Predictor, samples: Sequence[Sample], *, num_context: int, members: int) -> None:
        self._predictor, self._members, self._context = predictor, members, num_context
        self._end, self.films = num_context, []
        for sample in samples:
            known = num_context * predictor.tokenizers[sample.modality].frame_times
            values, valid = sample.values.copy(), sample.valid.copy()
            values[known:], valid[known:] = 0.0, False
            self.films += [replace(sample, values=values.copy(), valid=valid.copy()) for _ in range(members)]

    @torch.no_grad()
    def step(self, *, seed: int) -> list[np.ndarray]:
        """The next frame after those accepted, (frame_times, V, Y, X) of each film."""
        model, frames = self._predictor.model, self._end
        documents, noise = [], []
        for place, film in enumerate(self.films):
            tokenizer = self._predictor.tokenizers[film.modality]
            tokens = tokenizer.encode(
                film.window(0, (frames + 1) * tokenizer.frame_times),
                num_context=self._context,
                leads=(1,),
                statistics=self._predictor.statistics.get(film.source),
            )
            documents.append(replace(tokens, num_context=frames))
            width, member = model.settings.noise.drawn, place % self._members
            drawn = frame_noise(film.key, seed=seed, member=member, frames=(0, frames), width=width)
            noise.append(drawn.repeat_interleave(tokens.num_slots, dim=0))
        batch = collate([[one] for one in documents], frames * documents[0].num_slots, context_only=True)
        inputs = replace(to_inputs(batch), noise=Noise(values=torch.cat(noise)[None], together=together_of(batch)))
        (prediction,) = model(inputs, last_frames=True).values()
        assert isinstance(prediction, SamplePrediction)
        out = []
        values = prediction.values[0].numpy().reshape(len(documents), -1, *prediction.values.shape[2:])
        for film, tokens, scaled in zip(self.films, documents, values, strict=True):
            tokenizer = self._predictor.tokenizers[film.modality]
            physical = tokenizer.decode(frames_of(tokens, [frames]), tokenizer.snapped(scaled)[None])
            out.append(self._predictor.bounded(tokens, physical))
        return out

    def accept(self, frames: Sequence[np.ndarray]) -> None:
        """Write the next frame of each film, as if it had been observed; what the context never saw stays missing."""
        for film, values in zip(self.films, frames, strict=True):
            n = self._predictor.tokenizers[film.modality].frame_times
            here = slice(self._end * n, (self._end + 1) * n)
            seen = film.valid[: self._context * n].any(axis=0)
            film.values[here], film.valid[here] = np.where(seen, values, 0.0), seen
        self._end += 1


def _samples(count: int) -> list[Sample]:
    """Hourly series of one variable: a daily wave and noise."""
    times = CONTEXT + HORIZON
    hours = np.arange(times)
    out = []
    for number in range(count):
        noise = np.random.default_rng(number).standard_normal(times)
        values = 285.0 + 6.0 * np.sin(2 * np.pi * (hours + 3 * number) / 24) + noise
        out.append(
            Sample(
                key=f"series-{number}",
                source="none",
                modality="series",
                variables=("air_temperature",),
                levels=(np.nan,),
                values=values.astype(np.float32).reshape(times, 1, 1, 1),
                valid=np.ones((times, 1, 1, 1), bool),
                time=1.0e9 + 3600.0 * hours,
                year_phase=np.zeros(times, np.float32),
                day_phase=((hours / 24) % 1).astype(np.float32),
                step_seconds=3600.0,
                latitude=np.zeros((1, 1), np.float32),
                longitude=np.zeros((1, 1), np.float32),
                elevation=np.zeros((1, 1), np.float32),
            )
        )
    return out


def main() -> int:
    """Measure both in one process, print the table and write it into RESULTS.md."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model = build_model(SHAPES[SIZE], ModelSettings(tokenizer=TokenizerSettings(), noise=NoiseSettings(width=NOISE)))
    initialize(model, 0)
    predictor = Predictor(model, TokenizerSettings(), statistics={})
    samples = _samples(SERIES)
    words = {"num_context": CONTEXT, "num_samples": MEMBERS, "seed": 1}
    predictor.trajectories(samples, num_frames=2, **words)
    start = time.perf_counter()
    first = predictor.trajectories(samples, num_frames=1, **words)
    context_seconds = time.perf_counter() - start
    start = time.perf_counter()
    found = predictor.trajectories(samples, num_frames=HORIZON, **words)
    cached = time.perf_counter() - start
    again = Recomputed(predictor, samples, num_context=CONTEXT, members=MEMBERS)
    seconds, worst = [], 0.0
    for number in range(TIMED):
        start = time.perf_counter()
        frames = again.step(seed=1)
        again.accept(frames)
        seconds.append(time.perf_counter() - start)
        expected = np.concatenate([one[:, number] for one in found])
        worst = max(worst, float(np.abs(np.stack(frames) - expected).max()))
    assert worst < 1e-3, f"cached and recomputed trajectories differ by {worst} K"
    uncached = float(np.mean(seconds)) * HORIZON
    step = 1000 * (cached - context_seconds) / (HORIZON - 1)
    lines = [
        "| | whole forecast, s | one more frame, ms |",
        "|---|---|---|",
        f"| cached, documents grow | {cached:.2f} | {step:.1f} |",
        f"| all encoded and computed again | {uncached:.1f} | {1000 * float(np.mean(seconds)):.0f} |",
        f"| ratio | {uncached / cached:.1f} | {1000 * float(np.mean(seconds)) / step:.0f} |",
        "",
        f"{SERIES} series x {MEMBERS} members, {CONTEXT} frames of context and {HORIZON} ahead, model {SIZE} "
        f"({model.num_parameters / 1e6:.2f} M parameters with noise of width {NOISE}), one thread. The first frame, "
        f"whose context is computed whole in both, takes {context_seconds:.2f} s of the cached. The uncached is "
        f"{TIMED} frames measured at the shortest documents, times {HORIZON}, which flatters it. Greatest difference "
        f"of their values: {worst:.1e} K.",
        f"Made by `python -m benchmarks.rollout` ({machine()}, torch {torch.__version__}).",
    ]
    assert first[0].shape[1] == 1
    print("\n".join(lines))
    write_section("rollout", lines, title="Sampled trajectories with and without the key-value cache")
    return 0


if __name__ == "__main__":
    sys.exit(main())
