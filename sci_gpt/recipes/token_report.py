"""What tokens keep of real windows: round-trip error, bins, clipping, ids, rates; what build and report refuse."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sci_gpt.config import PretrainConfig, TokenizerConfig
from sci_gpt.data.order import keyed
from sci_gpt.data.store import Store
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes import parts
from sci_tokenizers.quantizer import Quantizer
from sci_tokenizers.sample import Sample
from sci_tokenizers.series import SeriesTokenizer
from sci_tokenizers.statistics import SourceStatistics
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import Tokenizer, TokenizerSettings
from sci_tokenizers.variables import VARIABLES, forward_transform, nearest

WIDEST_BIN = 0.1  # of the standard deviation of one-step differences
MOST_CLIPPED = 0.01  # of the largest 1 % of values
_TOP_PARTS = 100  # the largest values are one such part of all
ALLOWED = "tokens_allowed"  # in the manifest: SOURCE/CHANNEL that are kept all the same
BANDS = 60  # of scaled values, in the picture of which ids are used
_BUILD_FRAMES = (256, 128, 64, 32, 16, 8)  # of the windows that a build looks at: the longest that the data hold
_QUANTIZED, _ENCODED = 200, 24  # windows of a source that are quantized, and that are encoded and decoded whole
_OVERLAP = 4  # so many times at most is a value looked at, on average


@dataclass(frozen=True, kw_only=True)
class BinUse:
    """How a series channel uses its ids, in the variable's transformed unit.

    Attributes:
        bin_width: mean over the windows.
        bin_over_step: bin_width by the standard deviation of one-step differences; None where nothing changes.
        clipped, clipped_top: share clipped of all values, and of the largest 1 % by rank, rounded up (by their size, a
            variable that is mostly 0 would count its zeros among them).
        ids_used, ids: ids that stand for a value in these windows, and in all.
        entropy_bits: of the ids' shares.
        bands: how many values lie in each of BANDS equal parts of [-limit, limit].
    """

    bin_width: float
    bin_over_step: float | None
    clipped: float
    clipped_top: float
    ids_used: int
    ids: int
    entropy_bits: float
    bands: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ChannelTokens:
    """What encoding and decoding did to one channel, in its physical unit.

    Attributes:
        channel, unit: as in the store.
        num_values: that were encoded and decoded.
        max_error, mean_error: of decoded values.
        step_std: standard deviation of one-step differences; None where no two neighbours are valid.
        use: of ids, for series.
        refused: why a run should not have this channel, and whether it was allowed all the same.
    """

    channel: str
    unit: str
    num_values: int
    max_error: float
    mean_error: float
    step_std: float | None
    use: BinUse | None = None
    refused: str | None = None
    allowed: bool = False


@dataclass(frozen=True, kw_only=True)
class SourceTokens:
    """One source: its windows, how many tokens one has, how many are encoded per second by one thread, its channels."""

    source: str
    modality: str
    frames: int
    windows: int
    tokens_per_sample: int
    tokens_per_second: float
    channels: tuple[ChannelTokens, ...]


def token_report(config: PretrainConfig, store: Store) -> tuple[SourceTokens, ...]:
    """Every source of a run, by the run's tokenizers and windows, over windows spread evenly over its training split.

    Raises:
        DataError: the store has not what the run asks for.
    """
    settings, allowed = parts.tokenizer_settings(config), tuple(store.manifest.get(ALLOWED, ()))
    return tuple(_source(store, spec, settings=settings, allowed=allowed) for spec in parts.window_specs(config))


def to_json(report: Iterable[SourceTokens]) -> dict[str, Any]:
    """Plain values: {"sources": [..], "refused": [..]}."""
    rows = list(report)
    return {"sources": [asdict(row) for row in rows], "refused": refusals(rows)}


def refusals(report: Iterable[SourceTokens]) -> list[str]:
    """A line for every channel that is refused and not allowed."""
    return [
        f"{source.source}/{row.channel}: {row.refused}"
        for source in report
        for row in source.channels
        if row.refused is not None and not row.allowed
    ]


def refuse(lines: Sequence[str]) -> None:
    """Refuse channels that their tokens would spoil.

    Raises:
        DataError: there are such lines.
    """
    if lines:
        raise DataError(
            f"tokens would lose what matters of {'; '.join(lines)}. Give the variable a transform or the quantizer "
            "more ids (tokenizer.series_ids, series_limit), leave it out, or keep it as it is: `tokens: {allow: "
            f"[{', '.join(line.partition(':')[0] for line in lines)}]}}` in the data configuration"
        )


def check_tokens(store: Store, allowed: Sequence[str]) -> None:
    """Refuse a built store of which a series channel has bins too wide for its steps, or its extremes clipped.

    Its windows are of up to 256 frames, an eighth to half of them context, by the tokenizer's default sizes.

    Args:
        store: built.
        allowed: SOURCE/CHANNEL that are kept all the same.

    Raises:
        ConfigError: `allowed` names a channel that no series source has.
        DataError: refused; the message names every channel, by how much, and what to do.
    """
    settings = TokenizerSettings(**TokenizerConfig().model_dump())
    series = [name for name in store.sources if store.modality(name) == "series"]
    known = [f"{name}/{channel}" for name in series for channel in store.statistics[name]]
    for name in allowed:
        if name not in known:
            close = f"; nearest: {nearest(name, known)!r}" if known else ", and the store has no series"
            raise ConfigError(f"tokens.allow: no series channel {name!r} in {store.path}{close}")
    lines = []
    for name in series:
        spec = _build_windows(store, name)
        if spec is not None:
            chosen = _chosen(store, spec, frame_times=1, most=_QUANTIZED)
            uses = _bin_uses(store, chosen, tokenizer=SeriesTokenizer(settings), source=name)
            lines += [f"{name}/{channel}: {why}" for channel, use in uses.items() if (why := _verdict(use))]
    refuse([line for line in lines if line.partition(":")[0] not in allowed])


def _verdict(use: BinUse) -> str | None:
    """Why a channel is refused; None where it is not."""
    found = []
    if use.bin_over_step is not None and use.bin_over_step > WIDEST_BIN:
        found.append(
            f"a bin is {use.bin_over_step:.2g} of the standard deviation of one-step differences wide (at most "
            f"{WIDEST_BIN:g})"
        )
    if use.clipped_top > MOST_CLIPPED:
        found.append(f"{use.clipped_top:.1%} of the largest 1 % of values are clipped (at most {MOST_CLIPPED:.0%})")
    return " and ".join(found) or None


def _build_windows(store: Store, source: str) -> WindowSpec | None:
    """The windows that a build looks at; None where training is too short to judge."""
    longest = int(store.lengths(source, "train").max(initial=0))
    for frames in _BUILD_FRAMES:
        spec = WindowSpec(source=source, frames=frames, stride=1, context_frames=(frames // 8, frames // 2), leads=(1,))
        if frames <= longest and _num_good(store, spec):
            return spec
    return None


def _num_good(store: Store, spec: WindowSpec) -> int:
    try:
        return Windows(store, spec, split="train", frame_times=1).num_windows
    except DataError:  # rules of quality leave out every window of this length: a shorter one may pass
        return 0


def _chosen(store: Store, spec: WindowSpec, *, frame_times: int, most: int) -> list[tuple[Sample, int]]:
    """Windows spread evenly over the training split, each with its context, drawn from the window's number."""
    windows = Windows(store, spec, split="train", frame_times=frame_times)
    times = store.num_times(spec.source, "train")
    count = min(most, windows.num_windows, -(-_OVERLAP * times // (spec.frames * frame_times)))
    low, high = spec.context_frames
    numbers = np.unique(np.linspace(0, windows.num_windows - 1, count).round().astype(int)).tolist()
    return [(windows.read(n), low + keyed(0, "context", spec.source, n) % (high - low + 1)) for n in numbers]


def _source(store: Store, spec: WindowSpec, *, settings: TokenizerSettings, allowed: Sequence[str]) -> SourceTokens:
    tokenizer = make_tokenizer(store.modality(spec.source), settings)
    chosen = _chosen(store, spec, frame_times=tokenizer.frame_times, most=_QUANTIZED)
    statistics = store.statistics[spec.source]
    uses: dict[str, BinUse] = {}
    if isinstance(tokenizer, SeriesTokenizer):
        uses = _bin_uses(store, chosen, tokenizer=tokenizer, source=spec.source)
    whole = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, _ENCODED).round().astype(int))]
    errors, tokens, seconds = _round_trips(whole, tokenizer, statistics=statistics, leads=spec.leads)
    rows = []
    for v, channel in enumerate(chosen[0][0].channels):
        use = uses.get(channel)
        refused = _verdict(use) if use else None
        rows.append(
            ChannelTokens(
                channel=channel,
                unit=VARIABLES[chosen[0][0].variables[v]].unit,
                num_values=len(errors[v]),
                max_error=float(errors[v].max(initial=0.0)),
                mean_error=float(errors[v].mean()) if len(errors[v]) else 0.0,
                step_std=_step_std(np.concatenate([_steps(x.values[:, v], x.valid[:, v]) for x, _ in chosen])),
                use=use,
                refused=refused,
                allowed=refused is not None and f"{spec.source}/{channel}" in allowed,
            )
        )
    return SourceTokens(
        source=spec.source,
        modality=store.modality(spec.source),
        frames=spec.frames,
        windows=len(chosen),
        tokens_per_sample=spec.frames * tokenizer.num_slots(store.shape(spec.source)),
        tokens_per_second=tokens / seconds,
        channels=tuple(rows),
    )


def _round_trips(
    chosen: Sequence[tuple[Sample, int]], tokenizer: Tokenizer, *, statistics: SourceStatistics, leads: tuple[int, ...]
) -> tuple[list[np.ndarray], int, float]:
    """|decoded - value| per channel over the valid values, physical; tokens made, and seconds of encoding alone."""
    errors: list[list[np.ndarray]] = [[] for _ in chosen[0][0].channels]
    made, seconds = 0, 0.0
    for sample, context in chosen:
        begun = time.perf_counter()
        tokens = tokenizer.encode(sample, num_context=context, leads=leads, statistics=statistics)
        seconds += time.perf_counter() - begun
        made += tokens.num_tokens
        back = tokenizer.decode(tokens, tokens.payload)
        wrong = np.abs(back.astype(np.float64) - sample.values)
        for v, rows in enumerate(errors):
            rows.append(wrong[:, v][sample.valid[:, v]])
    return [np.concatenate(rows) for rows in errors], made, seconds


def _steps(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """One-step differences along the first axis where both ends are valid, flat."""
    both = valid[1:] & valid[:-1]
    return np.asarray(np.diff(values.astype(np.float64), axis=0)[both])


def _step_std(steps: np.ndarray) -> float | None:
    return float(steps.std()) if len(steps) else None


def _bin_uses(
    store: Store, chosen: Sequence[tuple[Sample, int]], *, tokenizer: SeriesTokenizer, source: str
) -> dict[str, BinUse]:
    """Per channel, over windows of a source as the tokenizer scales them by the store's statistics."""
    first = chosen[0][0]
    pools: list[_Pool] = [_Pool() for _ in first.channels]
    for sample, context in chosen:
        scaled, scale = tokenizer.scaled(sample, num_context=context, statistics=store.statistics[source])
        valid = sample.valid[:, :, 0, 0]
        ids = tokenizer.quantizer.bins.ids(scaled, valid)
        for v, pool in enumerate(pools):
            transformed = forward_transform(sample.values[:, v, 0, 0].astype(np.float64), sample.variables[v])
            pool.add(transformed, valid[:, v], scaled=scaled[:, v], ids=ids[:, v], scale=float(scale[v]))
    bins = tokenizer.quantizer.bins
    found = {channel: pool.use(bins) for channel, pool in zip(first.channels, pools, strict=True)}
    return {channel: use for channel, use in found.items() if use is not None}


class _Pool:
    """What the windows of one channel say together."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        self.scaled: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.steps: list[np.ndarray] = []
        self.scales: list[float] = []

    def add(self, values: np.ndarray, valid: np.ndarray, *, scaled: np.ndarray, ids: np.ndarray, scale: float) -> None:
        """A window's transformed values (F,), and what the tokenizer made of them."""
        self.values.append(values[valid])
        self.scaled.append(scaled[valid])
        self.ids.append(ids[valid])
        self.steps.append(_steps(values, valid))
        if valid.any():
            self.scales.append(scale)

    def use(self, bins: Quantizer) -> BinUse | None:
        """None where no value is valid."""
        if not self.scales:
            return None
        values, scaled, ids = (np.concatenate(rows) for rows in (self.values, self.scaled, self.ids))
        clipped = bins.clipped(scaled)
        top = np.argsort(values, kind="stable")[-math.ceil(len(values) / _TOP_PARTS) :]
        counts = np.bincount(ids, minlength=bins.num_ids)
        width = bins.width * float(np.mean(self.scales))
        step = _step_std(np.concatenate(self.steps))
        bands, _ = np.histogram(bins.centres(ids), BANDS, range=(-bins.limit, bins.limit))
        return BinUse(
            bin_width=width,
            bin_over_step=width / step if step else None,
            clipped=float(clipped.mean()),
            clipped_top=float(clipped[top].mean()),
            ids_used=int((counts > 0).sum()),
            ids=bins.num_bins,
            entropy_bits=entropy_bits(counts),
            bands=tuple(bands.tolist()),
        )


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon's entropy of the shares of `counts`, bits; 0 for nothing."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0
