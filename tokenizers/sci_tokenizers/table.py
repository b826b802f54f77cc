"""The table of tokenizers by modality; a new line here also enrols a class in the contract tests."""

from __future__ import annotations

from sci_tokenizers.grid import GridTokenizer
from sci_tokenizers.series import SeriesTokenizer
from sci_tokenizers.tokenizer import Tokenizer, TokenizerSettings
from sci_tokenizers.trace import TraceTokenizer

TOKENIZERS: dict[str, type[Tokenizer]] = {"grid": GridTokenizer, "series": SeriesTokenizer, "trace": TraceTokenizer}


def make_tokenizer(modality: str, settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer of a modality.

    Raises:
        KeyError: no such modality (the known ones are named).
    """
    if modality not in TOKENIZERS:
        raise KeyError(f"no tokenizer for modality {modality!r}; known: {sorted(TOKENIZERS)}")
    return TOKENIZERS[modality](settings)
