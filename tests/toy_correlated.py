"""Made-up fields whose joint distribution is known, and a small model trained on them to give samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import NoiseSettings
from sci_gpt.model.loss import valid_weights, weighted_sums
from sci_gpt.model.noise import noisy_inputs
from sci_gpt.model.predict import Predictor
from sci_gpt.model.shapes import ModelShape
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import CellClimatology, ChannelStatistics, place_number
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings

SIDE, PATCH = 8, 4
PERSISTENCE = 0.7  # correlation of a cell with itself one frame later
LENGTH = 2.0  # of the spatial correlation exp(-distance^2 / (2 LENGTH^2)), in cells
SHARED = 0.6  # correlation of the two variables in a cell
LEVEL, SPREAD = 280.0, 5.0  # K, of both variables
VARIABLES = ("air_temperature", "sea_surface_temperature")
INNOVATION = math.sqrt(1 - PERSISTENCE**2)  # spread of a cell one frame ahead
RATE = 8e-3
STEPS, DOCUMENTS = 260, 4  # of training: some seconds
SHAPE = ModelShape(layers=2, width=48, heads=2, hidden=96)
SETTINGS = TokenizerSettings(grid_patch=PATCH)


def places() -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes (SIDE, SIDE), far apart, so that patches know their places."""
    rows, columns = (axis.astype(np.float32) for axis in np.indices((SIDE, SIDE)))
    return 10.0 * rows - 35.0, 40.0 * columns


def statistics() -> dict[str, ChannelStatistics]:
    """What a training split knows of the process, each cell's climatology among it.

    Without that the level to which a cell returns would have to be guessed from eight frames, and the spread of a
    calibrated forecast would be that of the process and of the guess.
    """
    number = np.sort(place_number(*places()).ravel())
    one = ChannelStatistics(
        count=10**6,
        mean=LEVEL,
        std=SPREAD,
        step_std=SPREAD * math.sqrt(2 * (1 - PERSISTENCE)),
        num_year=0,
        num_day=0,
        climatology=(LEVEL,),
        minimum=LEVEL - 6 * SPREAD,
        maximum=LEVEL + 6 * SPREAD,
        cells=CellClimatology(place=number, coefficients=np.full((len(number), 1), LEVEL, np.float32)),
    )
    return dict.fromkeys(VARIABLES, one)


def covariance() -> np.ndarray:
    """Of a frame's cells, (SIDE^2, SIDE^2), for a variance of 1."""
    place = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), axis=-1).reshape(-1, 2)
    distance = ((place[:, None] - place[None]) ** 2).sum(axis=-1)
    return np.asarray(np.exp(-distance / (2 * LENGTH**2)))


def frames(count: int, *, seed: int, start: np.ndarray | None = None, runs: int = 1) -> np.ndarray:
    """(runs, count, variable, SIDE, SIDE) of the process, of mean 0 and variance 1, from its own distribution or from
    the frame `start` on (not counted)."""
    random = np.random.default_rng(seed)
    root = np.linalg.cholesky(covariance() + 1e-6 * np.eye(SIDE**2))
    mix = np.linalg.cholesky(np.array([[1.0, SHARED], [SHARED, 1.0]]))

    def fresh() -> np.ndarray:
        white = random.standard_normal((runs, 2, SIDE**2))
        return np.asarray(np.einsum("uv,rvc->ruc", mix, white) @ root.T)

    state = fresh() if start is None else np.broadcast_to(start.reshape(1, 2, -1), (runs, 2, SIDE**2))
    out = []
    for _ in range(count):
        state = PERSISTENCE * state + INNOVATION * fresh()
        out.append(state)
    return np.stack(out, axis=1).reshape(runs, count, 2, SIDE, SIDE)


def as_sample(values: np.ndarray, *, key: str) -> Sample:
    """A daily film of (times, variable, SIDE, SIDE)."""
    times = len(values)
    seconds = 1.0e9 + 86400.0 * np.arange(times)
    latitude, longitude = places()
    return Sample(
        key=key,
        source="correlated",
        modality="grid",
        variables=VARIABLES,
        levels=(np.nan, np.nan),
        values=(LEVEL + SPREAD * values).astype(np.float32),
        valid=np.ones(values.shape, bool),
        time=seconds,
        year_phase=np.zeros(times, np.float32),
        day_phase=np.zeros(times, np.float32),
        step_seconds=86400.0,
        latitude=latitude,
        longitude=longitude,
        elevation=np.zeros((SIDE, SIDE), np.float32),
    )


def trained(steps: int, *, documents: int = 8, noise: NoiseSettings, seed: int = 0) -> SciGPT:
    """A model trained for some steps on documents of 16 frames, of which the first 8 give the scales."""
    model = build_model(SHAPE, ModelSettings(tokenizer=SETTINGS, noise=noise))
    initialize(model, seed)
    model.train()
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    tokenizer, known = make_tokenizer("grid", SETTINGS), statistics()
    for step in range(steps):
        films = frames(16, seed=1000 + step, runs=documents)
        made = [
            tokenizer.encode(as_sample(film, key=f"{step}/{i}"), num_context=8, leads=(1,), statistics=known)
            for i, film in enumerate(films)
        ]
        for group in adam.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10, (steps - step) / steps)
        inputs = noisy_inputs(collate([made], sum(one.num_tokens for one in made)), noise=noise, seed=seed)
        loss = weighted_sums(model(inputs), inputs, settings=SETTINGS)["grid"] / valid_weights(inputs)["grid"]
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    return model.eval()


def away(ensemble: np.ndarray) -> np.ndarray:
    """Members (context, member, ..) less the ensemble's mean, as wide as the distribution that they are drawn from."""
    count = ensemble.shape[1]
    return np.asarray((ensemble - ensemble.mean(axis=1, keepdims=True)) * math.sqrt(count / (count - 1)))


def shuffled(ensemble: np.ndarray) -> np.ndarray:
    """Members (context, member, ..) dealt anew in every cell: the same marginals to the bit, nothing in common."""
    order = np.random.default_rng(3).random(ensemble.shape).argsort(axis=1)
    return np.take_along_axis(ensemble, order, axis=1)


def zonal_power(fields: np.ndarray) -> np.ndarray:
    """Mean power of each zonal wave number 0.. SIDE / 2 of fields (.., SIDE, SIDE)."""
    return np.asarray((np.abs(np.fft.rfft(fields, axis=-1)) ** 2).reshape(-1, SIDE // 2 + 1).mean(axis=0))


def predictor(model: SciGPT) -> Predictor:
    """Of a model of `trained`."""
    return Predictor(model, SETTINGS, statistics={"correlated": statistics()})


def contexts(count: int, *, num_times: int = 8) -> Sequence[Sample]:
    """Films that no training has seen."""
    return [as_sample(film, key=f"unseen/{i}") for i, film in enumerate(frames(num_times, seed=7, runs=count))]
