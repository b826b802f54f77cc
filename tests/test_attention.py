"""Every attention kernel against plain loops in float64: whole documents, neighbourhoods, blocks of FlexAttention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sci_gpt.model import attention, flex
from sci_gpt.model.attention import Reach, attend, attend_last, cuts
from sci_gpt.model.flex import BLOCK, FlexReach, attend_flex
from sci_gpt.model.inputs import DocumentGroup, ModelInputs
from sci_gpt.model.layers import Rotary

HEADS, WIDTH = 2, 16


@dataclass(frozen=True, kw_only=True)
class Film:
    """A document: frames of rows x columns patches, a turn of `period` columns (0: none), `causal` or not."""

    frames: int
    rows: int
    columns: int
    period: int = 0
    causal: bool = True
    points: int = 1  # slots at each place

    @property
    def slots(self) -> int:
        """Of a frame."""
        return self.rows * self.columns * self.points


# Two of one shape that lie differently, one around the globe, one not causal, a series and a trace; 7 positions empty.
FILMS = (
    Film(frames=3, rows=5, columns=7),
    Film(frames=3, rows=5, columns=7, period=7),
    Film(frames=2, rows=6, columns=11, period=11),
    Film(frames=2, rows=5, columns=6, causal=False),
    Film(frames=9, rows=1, columns=1),
    Film(frames=4, rows=1, columns=1, points=5),
)
GAP = 7


def packed(films: tuple[Film, ...] = FILMS) -> ModelInputs:
    """The films one after another as a batch, GAP empty positions before the third and at the end."""
    columns: dict[str, list[int]] = {name: [] for name in ("frame", "row", "column", "period")}
    shapes: dict[tuple[int, int, bool], list[int]] = {}

    def place(frame: int, row: int, column: int, period: int) -> None:
        for name, value in zip(columns, (frame, row, column, period), strict=True):
            columns[name].append(value)

    for number, film in enumerate(films):
        if number == 2:
            for _ in range(GAP):
                place(0, 0, 0, 0)
        shapes.setdefault((film.frames, film.slots, film.causal), []).append(len(columns["frame"]))
        for frame in range(film.frames):
            for row in range(film.rows):
                for column in range(film.columns):
                    for _ in range(film.points):
                        place(frame, row, column, film.period)
    for _ in range(GAP):
        place(0, 0, 0, 0)
    groups = tuple(
        DocumentGroup(
            index=torch.tensor(starts)[:, None] + torch.arange(frames * slots),
            frames=frames,
            slots=slots,
            causal=causal,
        )
        for (frames, slots, causal), starts in shapes.items()
    )
    places: dict[str, Any] = {name: torch.tensor(values) for name, values in columns.items()}
    return ModelInputs(
        **places,
        periods=tuple(sorted({film.period for film in films} - {0})),
        features=torch.zeros(len(columns["frame"]), 1),
        payloads={},
        groups=groups,
    )


def seen(inputs: ModelInputs, radius: int | None) -> Tensor:
    """Which token sees which, (T, T), by loops over pairs of a document."""
    table = torch.zeros(len(inputs.frame), len(inputs.frame), dtype=torch.bool)
    frame, row, column, period = (x.tolist() for x in (inputs.frame, inputs.row, inputs.column, inputs.period))
    for group in inputs.groups:
        for document in group.index.tolist():
            for i in document:
                for j in document:
                    across = abs(column[i] - column[j])
                    across = min(across, period[i] - across) if period[i] else across
                    near = radius is None or (abs(row[i] - row[j]) <= radius and across <= radius)
                    table[i, j] = near and (frame[j] <= frame[i] or not group.causal)
    return table


def reference(q: Tensor, k: Tensor, v: Tensor, *, table: Tensor) -> Tensor:
    """A plain masked softmax in float64; 0 for a token that sees nothing."""
    scores = torch.einsum("ihc,jhc->hij", q.double(), k.double()) / math.sqrt(q.shape[-1])
    share = scores.masked_fill(~table, -math.inf).softmax(dim=-1).nan_to_num()
    return torch.einsum("hij,jhc->ihc", share, v.double())


def drawn(inputs: ModelInputs, *, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (T, HEADS, WIDTH) each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(inputs.frame), HEADS, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v


RADII = (None, 0, 1, 2, 3, 20)


@pytest.mark.parametrize("radius", RADII)
def test_each_document_by_itself_equals_plain_loops(radius: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its gradient; in one piece, in several, and with masks so small that each tile and frame goes alone."""
    inputs = packed()
    table, (q, k, v) = seen(inputs, radius), drawn(inputs)
    weight = drawn(inputs, seed=2)[0].double()
    wanted = [x.clone().double().requires_grad_() for x in (q, k, v)]
    expected = reference(wanted[0], wanted[1], wanted[2], table=table)
    (expected * weight).sum().backward()
    for entries, pieces in ((2**24, 1), (2**24, 3), (300, 1)):
        monkeypatch.setattr(attention, "MASK_ENTRIES", entries)
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        found = attend(given[0], given[1], v=given[2], reach=Reach.of(inputs, radius=radius), pieces=pieces)
        (found.double() * weight).sum().backward()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(given, wanted, strict=True):
            assert mine.grad is not None and theirs.grad is not None
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("radius", RADII)
def test_flex_attention_equals_plain_loops(radius: int | None) -> None:
    """Its forward pass, on the CPU."""
    inputs = packed()
    q, k, v = drawn(inputs)
    found = attend_flex(q, k, v=v, reach=FlexReach.of(inputs, radius=radius))
    expected = reference(q, k, v, table=seen(inputs, radius))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_flex_attention_takes_what_autocast_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normed queries and keys in float32, values in bf16: one dtype in the kernel, float32 given back."""
    inputs = packed()
    q, k, v = drawn(inputs)
    reach = FlexReach.of(inputs)
    whole = attend_flex(q, k, v=v, reach=reach)

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        return flex_attention(q, k, v, **options)

    monkeypatch.setattr(flex, "flex_attention", kernel)
    found = attend_flex(q, k, v=v.bfloat16(), reach=reach)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("radius", RADII)
def test_no_pair_that_is_seen_lies_in_a_block_left_out(radius: int | None) -> None:
    """The kernel on a GPU skips blocks that are not listed, and asks nothing of those listed as full."""
    inputs = packed((*FILMS, Film(frames=3, rows=24, columns=32, period=32)))
    reach = FlexReach.of(inputs, radius=radius)
    size = len(reach.document)
    table = torch.zeros(size, size, dtype=torch.bool)
    count = len(reach.order)
    table[:count, :count] = _pairs(inputs, radius)[reach.order][:, reach.order]
    cut = table.view(size // BLOCK, BLOCK, size // BLOCK, BLOCK)
    live, full = (_listed(reach, name) for name in ("kv", "full_kv"))
    assert not (live & full).any()
    assert not (cut.any(dim=3).any(dim=1) & ~(live | full)).any()
    assert cut.all(dim=3).all(dim=1)[full].all()
    assert (live | full).float().mean() < (0.75 if radius is None or radius > 3 else 0.6)
    assert full.any() == (radius is None or radius > 3)


def _pairs(inputs: ModelInputs, radius: int | None) -> Tensor:
    """As `seen`, without loops: for many tokens."""
    document = torch.full_like(inputs.frame, -1)
    until = inputs.frame.clone()
    number = 0
    for group in inputs.groups:
        for index in group.index:
            document[index], number = number, number + 1
            until[index] = inputs.frame[index] if group.causal else group.frames
    table = (document[:, None] == document) & (document >= 0) & (until[:, None] >= inputs.frame)
    if radius is None:
        return table
    across = (inputs.column[:, None] - inputs.column).abs()
    turned = torch.where(inputs.period > 0, torch.minimum(across, inputs.period - across), across)
    return table & ((inputs.row[:, None] - inputs.row).abs() <= radius) & (turned <= radius)


def _listed(reach: FlexReach, name: str) -> Tensor:
    """Blocks (queries, keys) that the mask lists."""
    mask = reach.mask
    count = getattr(mask, f"{name}_num_blocks")[0, 0]
    index = getattr(mask, f"{name}_indices")[0, 0]
    found = torch.zeros(len(count), len(count), dtype=torch.bool)
    for row, many in enumerate(count.tolist()):
        found[row, index[row, :many].long()] = True
    return found


@pytest.mark.parametrize("radius", [None, 2])
@pytest.mark.parametrize("spoilt", [0, 2, 5])
def test_a_document_full_of_nan_leaves_its_neighbours_alone(radius: int | None, spoilt: int) -> None:
    """FlexAttention packs many documents in one block; NaN stays in its own, where it does show."""
    inputs = packed()
    starts = [int(index[0]) for group in inputs.groups for index in group.index]
    assert len(starts) == len(FILMS)
    documents = sorted((index for group in inputs.groups for index in group.index), key=lambda index: int(index[0]))
    q, k, v = drawn(inputs)
    reach = FlexReach.of(inputs, radius=radius)
    before = attend_flex(q, k, v=v, reach=reach)
    own = documents[spoilt]
    for value in (math.nan, math.inf):
        bad = [x.index_fill(0, own, value) for x in (q, k, v)]
        after = attend_flex(bad[0], bad[1], v=bad[2], reach=reach)
        others = torch.ones(len(q), dtype=torch.bool).index_fill(0, own, False)
        assert torch.equal(after[others], before[others])
        assert after[own].isnan().all()
    late = own[-FILMS[spoilt].slots :]
    after = attend_flex(q, k, v=v.index_fill(0, late, math.nan), reach=reach)
    assert after[late].isnan().all()
    assert torch.equal(after[own[: -len(late)]], before[own[: -len(late)]])


@pytest.mark.parametrize("radius", [None, 1, 3])
def test_the_last_frames_alone_are_those_of_all(radius: int | None) -> None:
    inputs = packed()
    q, k, v = drawn(inputs)
    reach = Reach.of(inputs, radius=radius)
    whole = attend(q, k, v=v, reach=reach)
    last = inputs.last_frames
    torch.testing.assert_close(attend_last(q[last], k, v=v, reach=reach), whole[last], rtol=1e-5, atol=1e-5)
    flexible = replace(reach, flex=FlexReach.of(inputs, radius=radius))
    torch.testing.assert_close(attend_last(q[last], k, v=v, reach=flexible), whole[last], rtol=1e-5, atol=1e-5)


def test_rotary_angles_are_those_of_frame_row_and_column() -> None:
    """By loops: half of the pairs turn with the frame, counted from 0, a quarter each with row and column."""
    inputs = packed((Film(frames=3, rows=2, columns=3),))
    found = Rotary.of(inputs, WIDTH)
    x = drawn(inputs)[0]
    turned = found.turn(x)
    half = WIDTH // 2  # pairs of neighbouring channels
    shares = (("frame", half // 2), ("row", half // 4), ("column", half - half // 2 - half // 4))
    for token in range(18):
        place, pair = {"frame": token // 6, "row": token // 3 % 2, "column": token % 3}, 0
        for name, count in shares:
            for number in range(count):
                angle = place[name] * 1000.0 ** (-number / count)
                plane = complex(x[token, 1, 2 * pair], x[token, 1, 2 * pair + 1])
                expected = plane * complex(math.cos(angle), math.sin(angle))
                found_there = complex(turned[token, 1, 2 * pair], turned[token, 1, 2 * pair + 1])
                assert found_there == pytest.approx(expected, abs=1e-5)
                pair += 1


def test_a_large_document_is_cut_so_that_no_mask_passes_its_bound() -> None:
    assert cuts(8, 100) == [0, 8] and cuts(8, 100, pieces=4) == [0, 2, 4, 6, 8]
    assert cuts(8, 2000) == list(range(9))  # 64 M entries in one piece, two frames 16 M too; one frame needs no mask
    assert cuts(8, 600) == [0, 4, 8]  # 23 M entries in one piece, 11.5 M in the later of two


def test_documents_within_the_radius_are_not_tiled() -> None:
    reach = Reach.of(packed(), radius=4)
    assert [near.group.frames for near in reach.near] == [3, 2, 2]  # 5 x 7 open, 6 x 11 around, 5 x 6
    assert sum(len(group.index) for group in reach.groups) == 3  # 5 x 7 around the globe: no column is farther than 3


@pytest.mark.gpu
def test_flex_attention_on_a_gpu_gives_the_gradients_of_plain_loops() -> None:
    if not torch.cuda.is_available():
        pytest.skip("FlexAttention's backward pass needs an accelerator")
    inputs = packed()
    for radius in (None, 2):
        table, tensors = seen(inputs, radius), drawn(inputs)
        weight = drawn(inputs, seed=2)[0].double()
        wanted = [x.clone().double().requires_grad_() for x in tensors]
        expected = reference(wanted[0], wanted[1], wanted[2], table=table)
        (expected * weight).sum().backward()
        given = [x.clone().cuda().requires_grad_() for x in tensors]
        on_gpu = replace(
            inputs,
            **{name: getattr(inputs, name).cuda() for name in ("frame", "row", "column", "period")},
            groups=tuple(replace(group, index=group.index.cuda()) for group in inputs.groups),
        )
        found = attend(given[0], given[1], v=given[2], reach=Reach.of(on_gpu, radius=radius))
        (found.double() * weight.cuda()).sum().backward()
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-2, atol=1e-3)
        for mine, theirs in zip(given, wanted, strict=True):
            assert mine.grad is not None and theirs.grad is not None
            torch.testing.assert_close(mine.grad.cpu().double(), theirs.grad, rtol=1e-2, atol=1e-2)
