"""Refusals: which errors of a command are the user's to mend, and the one line that says so."""

from __future__ import annotations

import errno

from sci_gpt.errors import SciGptError
from sci_tokenizers import packing, quantizer, sample, tokenizer, tokens, variables

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def for_a_person(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for a defect of ours, which keeps its traceback."""
    of_data = (sample.SampleError, variables.UnitError, variables.UnknownVariableError, tokenizer.TokenizerError)
    of_tokens = (tokens.TokensError, packing.PackingError, quantizer.QuantizerError)
    if isinstance(error, (SciGptError, *of_data, *of_tokens)):
        return str(error)
    full = isinstance(error, OSError) and error.errno in _DISK_FULL
    # Libraries in C and Rust (HDF5, SQLite, safetensors) report a full disk in words of their own.
    words = ("no space left on device", "os error 28", "disk is full", "disk quota exceeded", "file too large")
    if full or any(word in str(error).lower() for word in words):
        where = getattr(error, "filename", None)
        return (
            f"no space left while writing {str(where)!r}: free some space or choose another output folder"
            if where
            else f"no space left on the output's disk ({error}): free some space or choose another output folder"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}; check the path and its permissions"
    return None
