"""Growing documents: frame by frame what encoding the whole document again gives, in every modality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sci_tokenizers.growth import Growth
from sci_tokenizers.prior import PRIOR_FEATURES, LinearPrior
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics, known_priors
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import Tokenizer, TokenizerError, TokenizerSettings
from sci_tokenizers.tokens import Tokens
from toy_samples import toy_sample, toy_statistics

SETTINGS = TokenizerSettings(grid_patch=4)
CONTEXT, AHEAD, WAYS = 30, 40, 2  # two refits of series, one of traces
NAMES = ("payload", "valid", "last", "memory", "anchor", "anchor_spread", "volatility")


def statistics_with_prior(sample: Sample) -> dict[str, ChannelStatistics]:
    """`toy_statistics` and a linear prior of made-up weights for every channel."""
    random, size = np.random.default_rng(0), len(sample.channels) * PRIOR_FEATURES + 1
    return {
        channel: replace(
            row,
            prior=LinearPrior(
                leads=(1,), weights=(tuple(0.1 * random.standard_normal(size)),), spread=(1.5,), limits=(9.0,) * size
            ),
        )
        for channel, row in toy_statistics(sample).items()
    }


def blanked(tokenizer: Tokenizer, sample: Sample, statistics: dict[str, ChannelStatistics] | None) -> Tokens:
    """The document whose future is not valid."""
    known = CONTEXT * tokenizer.frame_times
    values, valid = sample.values.copy(), sample.valid.copy()
    values[known:], valid[known:] = 0.0, False
    context = replace(sample, values=values, valid=valid)
    return tokenizer.encode(context, num_context=CONTEXT, leads=(1,), statistics=statistics)


@pytest.mark.parametrize(
    ("modality", "knows"), [("grid", True), ("grid", False), ("series", True), ("series", False), ("trace", False)]
)
def test_growing_equals_encoding_the_whole_document_again(modality: str, knows: bool) -> None:
    """All that a token holds, for two different futures at once, with priors and without, and with a silent channel."""
    tokenizer = make_tokenizer(modality, SETTINGS)
    n = tokenizer.frame_times
    sample = toy_sample(modality, (CONTEXT + AHEAD) * n)
    if modality == "series":  # two levels of one variable are kin
        names = ("air_temperature", "air_temperature", "precipitation_amount")
        sample = replace(sample, variables=names, levels=(85000.0, 50000.0, np.nan))
        sample.values[:, 1] = 250.0 + 0.5 * sample.values[:, 0]
    sample.valid[:, -1, :1] = False  # never seen
    statistics = statistics_with_prior(sample) if knows else None
    tokens = blanked(tokenizer, sample, statistics)
    priors = known_priors(statistics, sample.channels, leads=(1,))
    assert (priors is not None) == knows
    growth = Growth(tokens, batch=WAYS, tokenizer=tokenizer, priors=priors)
    random = np.random.default_rng(5)
    futures, grown = [], []
    for _ in range(AHEAD - 1):
        drawn = random.standard_normal((WAYS, *tokens.payload.shape[1:])).astype(np.float32)
        futures.append(growth.physical(drawn))
        grown.append(growth.extend(futures[-1]))
    for way in range(WAYS):
        values, valid = sample.values.copy(), sample.valid.copy()
        values[CONTEXT * n : -n] = np.concatenate([one[way] for one in futures])
        valid[CONTEXT * n : -n] = sample.valid[: CONTEXT * n].any(axis=0)
        values[-n:], valid[-n:] = 0.0, False
        whole = tokenizer.encode(
            replace(sample, values=np.where(valid, values, 0.0).astype(np.float32), valid=valid),
            num_context=CONTEXT,
            leads=(1,),
            statistics=statistics,
        )
        for step, ways in enumerate(grown):
            for name in NAMES:
                found, expected = getattr(ways[way], name)[0], getattr(whole, name)[CONTEXT + step]
                np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4, err_msg=f"{name}, step {step}")
    assert np.abs(grown[-1][0].payload[0] - grown[-1][1].payload[0]).max() > 0.1


def test_a_document_grows_by_lead_one_and_no_further_than_its_clock() -> None:
    """Each refusal is one clear error."""
    tokenizer = make_tokenizer("series", SETTINGS)
    sample = toy_sample("series", CONTEXT + 2)
    tokens = tokenizer.encode(sample, num_context=CONTEXT, leads=(1,))
    growth = Growth(tokens, batch=1, tokenizer=tokenizer, priors=None)
    growth.extend(growth.physical(np.zeros((1, 3, 1, 1), np.float32)))
    with pytest.raises(TokenizerError, match=f"its clock ends with frame {CONTEXT + 1}"):
        growth.extend(np.zeros((1, 1, 3, 1, 1), np.float32))
    two = tokenizer.encode(sample, num_context=CONTEXT, leads=(1, 2))
    with pytest.raises(TokenizerError, match="only documents of lead 1"):
        Growth(two, batch=1, tokenizer=tokenizer, priors=None)
