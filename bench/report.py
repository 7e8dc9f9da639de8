"""The table and the chart of the kernels' README, from the rows of bench/results.

    python bench/report.py           # rewrites the table between the marks of that README, and docs/kernels_bench.png
    python bench/report.py --check   # exits 1 where they differ from the rows

The latest run of every device is shown. The chart carries a digest of what it shows, so that it can be checked without
drawing it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "kernels.jsonl"
README = ROOT / "kernels" / "fastr1_kernels" / "README.md"
CHART = ROOT / "docs" / "kernels_bench.png"
START, END = "<!-- bench:table -->", "<!-- /bench:table -->"

Row = dict[str, Any]


def load_rows(path: Path = RESULTS) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(rows: list[Row]) -> list[Row]:
    """Of every device and case the rows of its last run, in the order of the file."""
    last = {case_key(row): row["time"] for row in rows}
    return [row for row in rows if row["time"] == last[case_key(row)]]


def case_key(row: Row) -> tuple[Any, ...]:
    shape = tuple(row["shape"].values())
    return (row["device"], row["op"], shape, row["dtype"], row["dead"], row["cold"], row["frozen"])


def cases(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in latest(rows):
        grouped.setdefault(case_key(row), []).append(row)
    return grouped


def title(row: Row) -> str:
    shape = row["shape"]
    more = [f"{row['dead']:.0%} dead rows"] * bool(row["dead"]) + ["cold L2"] * row["cold"]
    more += ["frozen head"] * row["frozen"]
    sizes = f"{shape['rows']:,} × {shape['V']:,}" + (f", D {shape['D']:,}" if row["op"].startswith("linear") else "")
    sizes = f"{shape['rows']:,} rewards" if row["op"] == "group_advantages" else sizes
    return f"`{row['op']}`: " + ", ".join([sizes, row["dtype"], *more])


def milliseconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.3f}"


def render_table(rows: list[Row]) -> str:
    """Markdown: per device a line about the run, per case a table; nothing but what the rows say."""
    lines: list[str] = []
    device = None
    for group in cases(rows).values():
        first = group[0]
        if first["device"] != device:
            device = first["device"]
            state = ", uncommitted changes" if first["dirty"] else ""
            lines += [
                f"**{device}**, {first['threads']} threads, torch {first['torch']}, triton {first['triton']}, "
                f"commit {str(first['commit'])[:10]}{state}, {first['time'][:10]}. Medians; in brackets 20 % to 80 %. "
                "Spread: how far two measurements of our unchanged code are apart.",
                "",
            ]
        floor = "" if first["floor_ms"] is None else f", measured floor {milliseconds(first['floor_ms'])} ms"
        spread = "" if first["spread"] is None else f", spread {first['spread']:.0%}"
        lines += [f"{title(first)}{floor}{spread}", ""]
        lines += ["| | ms | time / ours | peak MiB | of the floor | result |", "|---|---|---|---|---|---|"]
        lines += [table_line(row) for row in group] + [""]
    return "\n".join(lines).rstrip() if lines else "No results yet."


def table_line(row: Row) -> str:
    name = "**ours**" if row["provider"] == "ours" else row["provider"]
    if "median_ms" not in row:
        note = row.get("reason") or ("differs from the reference" if row["status"] == "mismatch" else row["status"])
        return f"| {name} | | | | | {note} |"
    spread = f" ({milliseconds(row['p20_ms'])} to {milliseconds(row['p80_ms'])})" if row["rounds"] > 2 else ""
    ratio = "" if row["time_over_ours"] is None else f"{row['time_over_ours']:.2f}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
    floor = "" if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%}"
    target = "" if "passes" not in row else f", target {row['target_ms']} ms: {'met' if row['passes'] else 'missed'}"
    cells = (name, f"{milliseconds(row['median_ms'])}{spread}", ratio, peak, floor, f"matches{target}")
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def digest(rows: list[Row]) -> str:
    shown = [(title(row), row["provider"], row.get("median_ms"), row.get("floor_ms")) for row in latest(rows)]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def draw_chart(rows: list[Row], path: Path) -> None:
    """Time over ours, a bar per provider and case; the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [group for group in cases(rows).values() if any(r.get("time_over_ours") for r in group)]
    shown = shown[:8]
    figure, axes = plt.subplots(len(shown) or 1, 1, figsize=(8, 1.7 * max(len(shown), 1)), squeeze=False)
    for axis, group in zip(axes[:, 0], shown, strict=False):
        timed = [row for row in group if row.get("time_over_ours")]
        names, values = [row["provider"] for row in timed], [row["time_over_ours"] for row in timed]
        axis.barh(names[::-1], values[::-1], color=["#4878cf" if n == "ours" else "#b0b0b0" for n in names[::-1]])
        ours = next(row for row in timed if row["provider"] == "ours")
        if ours["floor_fraction"]:
            axis.axvline(ours["floor_fraction"], color="#c44e52", linewidth=1)
        axis.set_title(f"{title(group[0]).replace('`', '')}; {group[0]['device']}", fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time / ours; red line: measured floor", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Description": digest(rows), "Software": None})
    plt.close(figure)


def with_table(text: str, rows: list[Row]) -> str:
    """The README with the table between its marks."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{START} … {END} is missing")
    return f"{before}{START}\n{render_table(rows)}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where something differs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--chart", type=Path, default=CHART)
    given = parser.parse_args(arguments)
    rows, text = load_rows(given.results), given.readme.read_text()
    wanted = with_table(text, rows)
    drawn = given.chart.exists() and digest(rows).encode() in given.chart.read_bytes()
    if given.check:
        stale = [str(path) for path, ok in ((given.readme, text == wanted), (given.chart, drawn)) if not ok]
        for path in stale:
            print(f"{path} differs from {given.results}: run `python bench/report.py`", file=sys.stderr)
        return 1 if stale else 0
    given.readme.write_text(wanted)
    if not drawn:
        draw_chart(rows, given.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
