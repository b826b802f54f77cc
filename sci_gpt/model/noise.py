"""Noise of samples: a vector per document, frame and member from a counter, and which asked values stand together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sci_gpt.model.init import standard_normal
from sci_gpt.model.inputs import ModelInputs, Noise, NoiseSettings, Together, to_inputs
from sci_tokenizers.packing import Batch

ENSEMBLE = 32  # members from which quantiles and scores are taken, of a model that gives samples


def frame_noise(document: str, *, seed: int, member: int, frames: tuple[int, int], width: int) -> Tensor:
    """Standard normal float32 (frames, width) for the frames [first, last) of a document's member.

    A pure function of (seed, document, member, frame): a frame's noise is the same whether it is drawn alone, as in a
    rollout, or with the whole document, as in training.
    """
    first, last = frames
    flat = standard_normal(seed, f"noise:{document}:{member}", start=first * width, stop=last * width)
    return flat.view(last - first, width)


def token_noise(documents: Sequence[str], batch: Batch, *, members: int, seed: int, width: int) -> Tensor:
    """(members, T, width): all slots of a frame share its vector; 0 where no token is.

    Args:
        documents: names that key the noise, one per span of the batch.
        batch: its spans say where the documents lie; each starts at its own frame 0.
    """
    out = torch.zeros(members, batch.rows * batch.row_length, width)
    for name, (start, frames, slots) in zip(documents, batch.spans, strict=True):
        for member in range(members):
            drawn = frame_noise(name, seed=seed, member=member, frames=(0, frames), width=width)
            out[member, start : start + frames * slots] = drawn.repeat_interleave(slots, dim=0)
    return out


def noisy_inputs(
    batch: Batch,
    device: torch.device | str = "cpu",
    *,
    noise: NoiseSettings,
    seed: int,
    members: int | None = None,
) -> ModelInputs:
    """Tensors of a batch with the noise that a model with these settings takes; none where its width is 0.

    Args:
        batch: its documents are known by their sample number in the run, else by their key.
        noise: of the model.
        seed: of the run or the forecast.
        members: samples per document; None: as in training.
    """
    inputs = to_inputs(batch, device)
    if not noise.width:
        return inputs
    names = [str(n) if n >= 0 else key for n, key in zip(batch.numbers, batch.keys, strict=True)]
    drawn = token_noise(names, batch, members=members or noise.members, seed=seed, width=noise.drawn)
    together = {
        name: Together(**{field: value.to(device) for field, value in vars(one).items()})
        for name, one in together_of(batch).items()
    }
    return replace(inputs, noise=Noise(values=drawn.to(device), together=together))


def together_of(batch: Batch) -> dict[str, Together]:
    """Which units of each modality are asked together: those of the same document, origin and lead."""
    return {modality: _together(batch, modality) for modality in batch.payloads}


def _together(batch: Batch, modality: str) -> Together:
    payload = batch.payloads[modality]
    flat = payload.index[payload.unit_token]
    document, frame = batch.document[flat], batch.frame[flat]
    spans = np.asarray(batch.spans, np.int64).reshape(-1, 3)
    slot = (flat - spans[document, 0]) % spans[document, 2] if len(flat) else flat
    asked = np.stack([document, frame, payload.unit_lead], axis=1)
    group = np.unique(asked, axis=0, return_inverse=True)[1].reshape(-1) if len(flat) else flat
    return Together(
        group=torch.from_numpy(np.asarray(group, np.int64)),
        slot=torch.from_numpy(np.asarray(slot, np.int64)),
        frame=torch.from_numpy(np.asarray(frame, np.int64)),
    )
