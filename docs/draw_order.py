"""Draws docs/images/order.png from the code itself: sample numbers become shares, blocks, rows and ranks."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sci_gpt.data.loader import Corpus, StepPlan, attention_cost, deal, plan_step
from sci_gpt.data.order import Order, mixture_table
from sci_gpt.data.windows import WindowSpec

TARGET = Path(__file__).resolve().parent / "images" / "order.png"
# name: (share of the tokens, tokens of a document, windows, colour)
SOURCES = {
    "grid": (0.4, 96, 60, "#4477aa"),
    "series": (0.4, 48, 100, "#ccbb44"),
    "trace": (0.2, 30, 150, "#aa3377"),
}
BLOCK, ROWS, ROW_LENGTH, RANKS, STEPS = 16, 6, 256, 2, 3
SHOWN = "series"


class Example(Corpus):
    """Numbered samples of three small sources of which nothing is read."""

    def __init__(self) -> None:
        self.specs = tuple(
            WindowSpec(source=name, frames=tokens, stride=1, context_frames=(1, 1), leads=(1,))
            for name, (_, tokens, _, _) in SOURCES.items()
        )
        self.lengths = tuple(tokens for _, tokens, _, _ in SOURCES.values())
        self.order = Order(
            seed=0,
            sizes=tuple(windows for _, _, windows, _ in SOURCES.values()),
            names=tuple(SOURCES),
            table=mixture_table([share / tokens for share, tokens, _, _ in SOURCES.values()]),
            block=BLOCK,
        )

    def colour(self, n: int) -> str:
        """Of the source of sample number n."""
        return list(SOURCES.values())[self.order.source(n)][3]

    def ink(self, n: int) -> str:
        """For a number on that colour."""
        return "black" if self.order.source(n) == 1 else "white"


def draw_numbers(axes: Axes, example: Example, plans: list[StepPlan]) -> None:
    """The strip of sample numbers, cut into steps."""
    last = plans[-1].next_sample
    for n in range(last):
        axes.add_patch(Rectangle((n, 0), 1, 1, facecolor=example.colour(n), edgecolor="white", linewidth=0.5))
    for t, plan in enumerate(plans):
        axes.plot([plan.first, plan.first], [-0.25, 1.25], color="black", linewidth=1.5, clip_on=False)
        axes.text(plan.first, 1.35, f" n({t}) = {plan.first}", fontsize=9, va="bottom")
    axes.plot([last, last], [-0.25, 1.25], color="black", linewidth=1.5, clip_on=False)
    axes.text(last, 1.35, f"n({len(plans)}) = {last}", fontsize=9, va="bottom", ha="right")
    axes.set_xlim(0, last)
    axes.set_ylim(-0.3, 1.3)
    axes.set_yticks([])
    axes.set_xlabel("sample number n", fontsize=9)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.legend(
        handles=[Rectangle((0, 0), 1, 1, color=colour) for _, _, _, colour in SOURCES.values()],
        labels=[
            f"{name}: {100 * share:.0f} % of the tokens, {tokens} each"
            for name, (share, tokens, _, _) in SOURCES.items()
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.75),
        ncol=3,
        fontsize=9,
        frameon=False,
    )


def draw_blocks(axes: Axes, example: Example) -> None:
    """Two epochs of one source: which window comes when."""
    source = list(SOURCES).index(SHOWN)
    size, colour = SOURCES[SHOWN][2], SOURCES[SHOWN][3]
    drawn: list[int] = []
    n = 0
    while len(drawn) < 2 * size:
        if example.order.source(n) == source:
            drawn.append(example.order.sample(n)[1])
        n += 1
    for low in range(0, size, 2 * BLOCK):
        axes.axhspan(low - 0.5, min(low + BLOCK, size) - 0.5, color="#eeeeee", zorder=0)
    axes.scatter(range(len(drawn)), drawn, s=8, color=colour, edgecolor="#665500", linewidth=0.3)
    axes.axvline(size - 0.5, color="black", linewidth=1)
    axes.text(size * 0.5, size + 3, "epoch 0", ha="center", fontsize=9)
    axes.text(size * 1.5, size + 3, "epoch 1", ha="center", fontsize=9)
    axes.set_xlim(-1, 2 * size)
    axes.set_ylim(-2, size + 12)
    axes.set_xlabel(f"samples of source {SHOWN!r} given before", fontsize=9)
    axes.set_ylabel(f"window (bands: blocks of {BLOCK})", fontsize=9)


def draw_rows(axes: Axes, example: Example, plan: StepPlan) -> None:
    """The rows of one step, those of each rank together, with their attention cost."""
    cost = dict(zip(plan.rows, attention_cost(example, plan), strict=True))
    shares = deal(plan, world=RANKS, cost=list(cost.values()))
    height = 0.0
    for rank, share in enumerate(shares):
        top = height
        for row in share:
            start = 0
            for n in row:
                width = example.length(n)
                box = Rectangle((start, -height - 0.9), width, 0.8, facecolor=example.colour(n), edgecolor="white")
                axes.add_patch(box)
                axes.text(
                    start + width / 2, -height - 0.5, str(n), ha="center", va="center", fontsize=7, color=example.ink(n)
                )
                start += width
            axes.add_patch(Rectangle((0, -height - 0.9), ROW_LENGTH, 0.8, fill=False, edgecolor="black", linewidth=0.8))
            axes.text(ROW_LENGTH + 4, -height - 0.5, f"cost {cost[row]:,}", va="center", fontsize=8)
            height += 1
        total = sum(cost[row] for row in share)
        axes.text(-6, -(top + height) / 2, f"rank {rank}\n{total:,}", ha="right", va="center", fontsize=9)
        height += 0.5 * (rank < RANKS - 1)
    axes.set_xlim(-50, ROW_LENGTH + 60)
    axes.set_ylim(-height - 0.2, 0.2)
    axes.set_yticks([])
    axes.set_xticks([0, 64, 128, 192, 256])
    axes.set_xlabel("tokens of a row", fontsize=9)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw the picture."""
    example, plans, n = Example(), [], 0
    for _ in range(STEPS):
        plans.append(plan_step(example, n, rows=ROWS, row_length=ROW_LENGTH))
        n = plans[-1].next_sample
    figure = plt.figure(figsize=(11, 6.6))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 6.5), width_ratios=(1, 1.15), hspace=0.75, wspace=0.12)
    draw_numbers(figure.add_subplot(grid[0, :]), example, plans)
    draw_blocks(figure.add_subplot(grid[1, 0]), example)
    draw_rows(figure.add_subplot(grid[1, 1]), example, plans[1])
    titles = (
        "1. The mixture says which source gives sample n; n(t) cuts the numbers into steps",
        "2. A source gives its windows block by block,\nin an order of each epoch's own",
        f"3. The samples of step 1 in {ROWS} rows, the longest placed first;\n"
        f"rows dealt to {RANKS} ranks by attention cost",
    )
    for axes, title, pad in zip(figure.axes, titles, (22, 8, 8), strict=True):
        axes.set_title(title, fontsize=10, loc="left", pad=pad, fontweight="bold")
        axes.tick_params(labelsize=8)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
