"""Pictures of a run for its report, in colours for the colour-blind and without pyplot's global state."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

if TYPE_CHECKING:  # the report draws these, and runs as a program
    from reproduce.report import Range, Run

__all__ = ["Pictures", "pictures"]

Pictures = dict[str, "Figure | str"]  # or why there is none

# Okabe and Ito's colours; marks and dashes tell groups apart without them.
LOOKS: dict[str, tuple[str, str, str]] = {
    "all-256": ("#000000", "s", "-"),
    "all-64 before": ("#CC79A7", "v", "-"),
    "all-64": ("#D55E00", "^", "-"),
    "router": ("#0072B2", "o", "-"),
    "random": ("#8C8C8C", "D", ":"),
    "edges": ("#E69F00", "P", "--"),
    "oracle": ("#009E73", "X", "-."),
}
BLUE, RED, GREEN = LOOKS["router"][0], LOOKS["all-64"][0], LOOKS["oracle"][0]
SPEED = "first_token_prompts_per_s"
CHOOSERS = ("router", "random", "edges", "oracle")
TILES, SIDE = 4, 64  # of a page, two in a row; pixels of a tile
WHISKERS = {"elinewidth": 0.9, "ecolor": "#444444"}
LIMIT = {"color": "#000000", "linewidth": 0.9, "dashes": (6, 3)}


def pictures(run: Run) -> Pictures:
    """All pictures of a report, by name, or in words why one is missing."""
    drawers = (tradeoff, families, kinds, throughput, losses, samples)
    return {draw.__name__: draw(run) for draw in drawers}


def panels(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def legend(figure: Figure, ax: Any, columns: int) -> None:
    """One for all panels, below them."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def group_of(run: Run, name: str) -> str:
    """The group of a routing of any seed."""
    return next(s.results["routings"][name]["group"] for s in run.seeds if name in s.results["routings"])


def known(ranges: Iterable[Range | None], scale: float = 100) -> tuple[np.ndarray, np.ndarray]:
    """Of n ranges the places ``[m]`` of those that are there, and ``[3, m]``: their values, lows and highs."""
    there = [(place, r.value, r.low, r.high) for place, r in enumerate(ranges) if r]
    found = np.array(there, dtype=float).reshape(-1, 4).T
    return found[0], scale * found[1:]


def reach(found: np.ndarray) -> np.ndarray:
    """Whiskers ``[2, m]`` of ``[3, m]``: how far lows and highs are from the values."""
    return np.abs(found[1:] - found[0])


def spots(run: Run, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens kept and scores in percent, ``[3, n]`` each, by tokens kept."""
    (_, kept), (_, score) = (known(run.spread(name, key) for name in names) for key in ("tokens_kept", "score"))
    order = np.argsort(kept[0], kind="stable")
    return kept[:, order], score[:, order]


def tradeoff(run: Run) -> Figure:
    """Score against tokens kept: all of it, and its upper end."""
    figure, axes = panels(11, 5, 1, 2)
    whole = run.whole()
    ends = [*run.names("all-64"), *([whole] if whole else [])]  # of every chooser's line: nothing is left to choose
    single = [n for n in run.names(*CHOOSERS) if "%" not in n and n != run.chosen]
    bar = 0.996 * spots(run, ["reference"])[1][0, 0]
    for ax in axes:
        for group in CHOOSERS:
            budgets = [name for name in run.names(group) if "%" in name]
            if budgets:
                colour, _, dashes = LOOKS[group]
                kept, score = spots(run, [*budgets, *ends])
                ax.plot(kept[0], score[0], dashes, color=colour, label=group, linewidth=1.8)
                ax.fill_between(kept[0], score[1], score[2], color=colour, alpha=0.15, linewidth=0)
        points = [whole, *run.names("all-64 before", "all-64"), *single, run.chosen]  # the chosen one on top
        for name in filter(None, points):
            colour, mark, _ = LOOKS[group_of(run, name)]
            rival = name.endswith(f" as {run.chosen}")
            if rival or name == run.chosen:
                mark = "*"
            elif name in single:
                mark = "d"
            size = 16 if name == run.chosen else 10 if rival else 8
            kept, score = spots(run, [name])
            ax.errorbar(kept[0], score[0], xerr=reach(kept), yerr=reach(score), fmt=mark, color=colour, markersize=size,
                        markeredgecolor="white", markeredgewidth=0.8, elinewidth=1, zorder=4,
                        label=None if rival else name)  # fmt: skip
        ax.axhline(bar, label="99.6% of the reference", **LIMIT)
        ax.axvline(50, color="#A0A0A0", linewidth=0.9, dashes=(2, 2), label="half of the tokens")
        ax.set_xlabel("visual tokens kept, %")
        ax.set_ylabel("questions right, %")
    axes[0].set_title("Score against tokens kept (small stars: at the chosen budget)", loc="left", fontsize=10.5)
    axes[1].set_title("Its upper end", loc="left", fontsize=10.5)
    if bar > 0:
        axes[1].set_ylim(0.955 * bar, 1.01 * bar)
    legend(figure, axes[0], 4)
    return figure


def families(run: Run) -> Figure | str:
    """Score per family of pages: a bar per routing, whiskers from the least to the largest seed."""
    keys, names = run.keys("families"), run.shown()
    if not keys:
        return "no scores per family"
    figure, (ax,) = panels(11, 4.4)
    width = 0.84 / len(names)
    for n, name in enumerate(names):
        places, score = known(run.spread(name, "families", key, "score") for key in keys)
        ax.bar(places + (n - (len(names) - 1) / 2) * width, score[0], 0.92 * width, yerr=reach(score), label=name,
               color=LOOKS[group_of(run, name)][0], error_kw=WHISKERS)  # fmt: skip
    ax.axhline(95, label="95%, the reference's bar", **LIMIT)
    ax.set_xticks(range(len(keys)), keys)
    ax.tick_params(axis="x", length=0)
    ax.grid(False, axis="x")
    ax.set_ylabel("questions right, %")
    ax.set_ylim(0, 101)
    ax.set_title("Score per family of pages", loc="left", fontsize=10.5)
    legend(figure, ax, 4)
    return figure


def kinds(run: Run) -> Figure | str:
    """Share of tiles compressed per kind of tile: the router's as bars, the others' as marks."""
    shares = {kind: run.spread(run.chosen, "compressed_by_kind", kind) for kind in run.keys("compressed_by_kind")}
    there = {kind: share.value for kind, share in shares.items() if share}
    keys = sorted(there, key=lambda kind: there[kind])
    if not keys:
        return "no shares per tile kind"
    figure, (ax,) = panels(8, 1.6 + 0.34 * len(keys))
    places, share = known(shares[kind] for kind in keys)
    ax.barh(places, share[0], 0.66, color=BLUE, label=run.chosen, xerr=reach(share), error_kw=WHISKERS)
    for group in CHOOSERS[1:]:
        places, share = known(run.spread(run.rival(group), "compressed_by_kind", kind) for kind in keys)
        colour, mark, _ = LOOKS[group]
        ax.plot(share[0], places, mark, color=colour, markersize=8.5, markeredgecolor="white", markeredgewidth=0.9,
                label=f"{group}, same budget" if len(places) else None, zorder=4)  # fmt: skip
    ax.set_yticks(range(len(keys)), keys)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlim(-2, 102)
    ax.set_xlabel("tiles compressed, %")
    ax.set_title("Which tiles are compressed", loc="left", fontsize=10.5)
    legend(figure, ax, 4)
    return figure


def throughput(run: Run) -> Figure | str:
    """Prompts per second as a ratio to the policy with every tile whole."""
    batches, whole = sorted(run.keys(SPEED), key=int), run.whole()
    names = [n for n in run.names() if whole and any(run.values(n, SPEED, b, of=whole) for b in batches)][::-1]
    if not names:
        return "throughput was not measured"
    figure, axes = panels(max(6, 4.6 * len(batches)), 1.2 + 0.3 * len(names), 1, len(batches))
    for ax, batch in zip(axes, batches, strict=True):
        places, ratio = known((run.spread(name, SPEED, batch, of=whole) for name in names), 1)
        colours = [LOOKS[group_of(run, names[int(place)])][0] for place in places]
        ax.barh(places, ratio[0], 0.66, color=colours, xerr=reach(ratio), error_kw=WHISKERS)
        for place, value, high in zip(places, ratio[0], ratio[2], strict=True):
            ax.annotate(f"{value:.2f}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        ax.axvline(1, **LIMIT)
        ax.margins(x=0.12)
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.label_outer()
        ax.grid(False, axis="y")
        ax.set_xlabel("ratio to every tile whole")
        ax.set_title(f"Prompts per second, batch {batch}", loc="left", fontsize=10.5)
    return figure


def losses(run: Run) -> Figure | str:
    """Losses of stages 0a, 0b, 1 and 2."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {stage: {} for stage in ("0a", "0b", "1", "2")}
    for entry in run.reference_log:
        stage = str(entry.get("stage"))[:2]
        if stage not in curves or "step" not in entry:
            continue
        means = {key: value for key, value in entry.items() if key.endswith(" tiles") and isinstance(value, list)}
        found = {f"tiles per page: {key.split()[0]}": value[0] for key, value in means.items()}
        for label, loss in (found or {"training": entry.get("loss")}).items():
            curve = curves[stage].setdefault(label, [])
            if curve and entry["step"] <= curve[-1][0]:
                curve.clear()  # the log is appended to: a later run starts here
            curve += [] if loss is None else [(entry["step"], loss)]
    for seed in run.seeds:
        for stage, lines in seed.logs.items():
            curves[stage][f"seed {seed.number}"] = [(e["step"], e["loss"]) for e in lines if e.get("loss") is not None]
    curves = {stage: {label: curve for label, curve in own.items() if curve} for stage, own in curves.items()}
    if not any(curves.values()):
        return "no stage has a log"
    figure, axes = panels(11, 6.4, 2, 2)
    whats = ("ViT", "language model", "consistency, KL to the reference", "router, cross-entropy")
    colours = [LOOKS[group][0] for group in ("router", "all-64", "oracle", "all-64 before", "edges", "random")]
    for ax, (stage, own), what in zip(axes, curves.items(), whats, strict=True):
        for n, (label, curve) in enumerate(own.items()):
            line = np.array(curve, dtype=float).T  # [2, n]
            window = max(1, line.shape[1] // 40)
            smooth = [np.convolve(row, np.full(window, 1 / window), "valid") for row in line]
            ax.plot(*line, color=colours[n % len(colours)], alpha=0.25 if window > 1 else 0, linewidth=0.8)
            ax.plot(*smooth, color=colours[n % len(colours)], label=label, linewidth=1.8)
        if not own:
            ax.text(0.5, 0.5, "no log", transform=ax.transAxes, ha="center", color="#777777")
        elif all(loss > 0 for curve in own.values() for _, loss in curve):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        if own:
            ax.legend(frameon=False)
        ax.set_title(f"Stage {stage}: {what}", loc="left", fontsize=10.5)
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
    return figure


def samples(run: Run) -> Figure | str:
    """The first page of each family in the test set, as the first seed routes it, with two of its questions."""
    seed = run.seeds[0]
    compressed, right = seed.decisions.get(run.chosen), seed.outcomes.get(run.chosen)
    if not run.lines or compressed is None or right is None:
        return f"test/data.jsonl, decisions or outcomes of {run.chosen} are missing"
    first: dict[str, int] = {}
    for line, page in zip(run.lines, seed.page.tolist(), strict=True):
        first.setdefault(line["family"], page)
    questions = {family: np.flatnonzero(seed.page == page).tolist() for family, page in first.items()}
    images = {family: run.out / "test" / run.lines[own[0]]["image"] for family, own in questions.items()}
    absent = [path.name for path in images.values() if not path.is_file()]
    if absent or len(compressed) != TILES * (int(seed.page.max()) + 1):
        return f"{len(compressed)} decisions, and images that are missing: {', '.join(absent) or 'none'}"
    base = min(line["tile"] for line in run.lines)  # the first tile's number, 0 or 1
    columns = min(3, len(first))
    figure, axes = panels(3.9 * columns, 0.6 + 4.4 * -(-len(first) // columns), -(-len(first) // columns), columns)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.03)
    for ax in axes:
        ax.set_axis_off()
    for ax, (family, asked) in zip(axes, questions.items(), strict=False):
        own = compressed[TILES * first[family] :][:TILES].tolist()
        with Image.open(images[family]) as image:
            draw_tiles(ax, image, own)
        ax.set_title(f"{family}, page {first[family]}", loc="left", fontsize=10.5)
        # The first on a compressed tile and the first on a whole one; where one of them is missing, the next.
        rates = [own[run.lines[q]["tile"] - base] for q in asked]
        pair = [asked[rates.index(rate)] for rate in sorted(set(rates))]
        pair = sorted([*pair, *(q for q in asked if q not in pair)][:2])
        for n, q in enumerate(pair):
            human, answer = (turn["value"] for turn in run.lines[q]["conversations"][:2])
            text = textwrap.shorten(f"{human.replace('<image>', '')} → {answer}", 44, placeholder=" …")
            place = {"y": -0.03 - 0.075 * n, "transform": ax.transAxes, "va": "top", "fontsize": 10}
            ax.text(x=0, s=text, parse_math=False, **place)
            ax.text(x=1, s="right" if right[q] else "wrong", ha="right", weight="bold",
                    color=GREEN if right[q] else RED, **place)  # fmt: skip
    title = (
        f"{run.chosen}, seed {seed.number}: tokens per tile (4: compressed, outlined). Below: two questions,\n"
        "one on a compressed tile where there is one, their true answers, and whether the model's is right."
    )
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    return figure


def draw_tiles(ax: Any, image: Image.Image, compressed: list[bool]) -> None:
    """A page's tiles, apart so that the outlines of the compressed ones hide nothing, each one's tokens beside it."""
    pixels, gap = np.asarray(image.convert("RGB")), 5
    for place, small in enumerate(compressed):
        row, column = divmod(place, 2)
        x, y = column * (SIDE + gap), row * (SIDE + gap)
        tile = pixels[row * SIDE :, column * SIDE :][:SIDE, :SIDE]
        ax.imshow(tile, interpolation="nearest", extent=(x, x + SIDE, y + SIDE, y))
        ax.add_patch(Rectangle((x - 1, y - 1), SIDE + 2, SIDE + 2, fill=False, edgecolor=BLUE if small else "#B8B8B8",
                               linewidth=4 if small else 0.8))  # fmt: skip
        ax.text(x + (SIDE + 5 if column else -5), y + SIDE / 2, "4" if small else "16", va="center", fontsize=11,
                ha="left" if column else "right", color=BLUE if small else "#444444",
                weight="bold" if small else "normal")  # fmt: skip
    ax.set(xlim=(-3, 2 * SIDE + gap + 3), ylim=(2 * SIDE + gap + 3, -3))
