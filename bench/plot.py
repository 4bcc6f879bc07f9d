"""Plots of a benchmark's report, as SVG (time against N, time by stage), and its rows as a table.

python bench/plot.py [out/bench.json] [--out FOLDER] [--d 128] [--threads N] [--precision int8]
"""

import argparse
import json
import math
import pathlib
from xml.sax.saxutils import escape

COLOURS = [
    "#0b6e99",
    "#c4560b",
    "#2b8a3e",
    "#862e9c",
    "#868e96",
    "#495057",
    "#b8860b",
    "#c2255c",
    "#1098ad",
]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 80, 230, 44, 60


def text(x, y, content, anchor="middle", size=13, more=""):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>'
        f"{escape(content)}</text>"
    )


def page(parts, height=HEIGHT):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" fill="#222">'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def milliseconds(value):
    return f"{value:g} ms" if value < 1000 else f"{value / 1000:g} s"


def rows_of(report, arguments, direction):
    """The rows of one pass, head size and number of threads."""
    return [
        row
        for row in report["rows"]
        if row["pass"] == direction
        and row["shape"][3] == arguments.d
        and row["threads"] == arguments.threads
        and row.get("layout", "bhnd") == arguments.layout
    ]


def series(rows, precision):
    """Curves {label: {N: ms}}: ours by keep, the rivals."""
    curves = {}
    for row in rows:
        if row["name"] == "sla2":
            if row["precision"] != precision:
                continue
            label = f"SLA2 {precision}, keep {row['keep']:g}"
        elif row["name"].startswith("flex"):
            if row["keep"] != min(r["keep"] for r in rows if r["name"] == row["name"]):
                continue
            label = f"FlexAttention {row['precision']}, keep {row['keep']:g}"
        else:
            label = row["name"].replace("_", " ")
        curves.setdefault(label, {})[row["shape"][2]] = row["ms_median"]
    return curves


def time_plot(curves, title):
    tokens = sorted({n for curve in curves.values() for n in curve})
    times = [t for curve in curves.values() for t in curve.values()]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    high = max(high, low + 1)
    first, last = math.log(tokens[0]), math.log(max(tokens[-1], tokens[0] * 1.01))

    def x(n):
        return LEFT + (math.log(n) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(ms):
        return HEIGHT - BOTTOM - (math.log10(ms) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [text(LEFT, 24, title, "start", 15)]
    for decade in range(low, high + 1):
        at = y(10**decade)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
        )
        parts.append(text(LEFT - 8, at + 4, milliseconds(10**decade), "end", 12))
    for n in tokens:
        parts.append(
            f'<line x1="{x(n):.1f}" x2="{x(n):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            f'stroke="#eee"/>'
        )
        parts.append(text(x(n), HEIGHT - BOTTOM + 18, str(n), "middle", 12))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "tokens N (log)"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        text(16, middle, "median time (log)", more=f'transform="rotate(-90 16 {middle:.0f})"')
    )
    ends = []
    for index, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = "" if label.startswith("SLA2") else ' stroke-dasharray="6 4"'
        points = [(x(n), y(ms)) for n, ms in sorted(curve.items())]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        for a, b in points:
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>')
        ends.append((points[-1][1], label, colour))
    # Labels beside the last points, moved apart.
    place = TOP
    for at, label, colour in sorted(ends):
        place = max(at + 4, place + 15)
        parts.append(text(WIDTH - RIGHT + 12, place, label, "start", 12, f'fill="{colour}"'))
    return page(parts)


def stage_plot(rows, title):
    """One bar a row, its stages side by side."""
    height = TOP + 46 * len(rows) + 110
    longest = max(sum(row["stages_ms"].values()) for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in row["stages_ms"]))
    parts = [text(12, 24, title, "start", 15)]
    wide = WIDTH - 150 - 90
    for index, row in enumerate(rows):
        top = TOP + 46 * index
        label = f"{row['pass']}, {row['precision']}"
        parts.append(text(140, top + 20, label, "end", 12))
        left = 150.0
        for name, ms in row["stages_ms"].items():
            width = ms / longest * wide
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="30" fill="{colour}" '
                f'stroke="#fff"><title>{escape(name)} {ms:.3f} ms</title></rect>'
            )
            if width > 34:
                parts.append(
                    text(
                        left + width / 2,
                        top + 20,
                        f"{ms:.2g}" if ms < 10 else f"{ms:.0f}",
                        size=11,
                        more='fill="#fff"',
                    )
                )
            left += width
        parts.append(
            text(left + 6, top + 20, f"{sum(row['stages_ms'].values()):.3g} ms", "start", 12)
        )
    base = TOP + 46 * len(rows) + 16
    for index, name in enumerate(names):
        left, top = 20 + index % 4 * 185, base + index // 4 * 20
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(left + 18, top + 11, name, "start", 12))
    parts.append(text(WIDTH / 2, height - 8, "milliseconds by stage, one run", size=12))
    return page(parts, height)


def table(report):
    """Every row of ours as Markdown."""
    rivals = ["torch_sdpa_fp32", "torch_sdpa_bf16", "flex_attention_fp32", "flex_attention_bf16"]
    for row in report["rows"]:
        rivals += [name for name in row["speedup_over"] if name not in rivals]
    rivals = [r for r in rivals if any(r in row["speedup_over"] for row in report["rows"])]
    head = ["pass", "threads", "N", "d", "keep", "precision", "layout", "ms", "quartiles"]
    head += [
        "TFLOP/s",
        "roofline",
        "workspace MiB",
        *[f"over {name.replace('_', ' ')}" for name in rivals],
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        if row["name"] != "sla2":
            continue
        share = row["roofline_share"]
        workspace = row.get("workspace_mib")
        cells = [
            row["pass"],
            str(row["threads"]),
            str(row["shape"][2]),
            str(row["shape"][3]),
            f"{row['keep']:g}",
            row["precision"],
            row.get("layout", "bhnd"),
            f"{row['ms_median']:.2f}",
            f"{row['ms_q1']:.2f} to {row['ms_q3']:.2f}",
            f"{row['effective_tflops']:.2f}",
            "" if share is None else f"{share:.0%}",
            "" if workspace is None else f"{workspace:.1f}",
        ]
        over = row["speedup_over"]
        cells += [f"{over[name]:.1f}x" if name in over else "" for name in rivals]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", nargs="?", default="out/bench.json")
    parser.add_argument("--out", default="out")
    parser.add_argument("--d", type=int, default=128, help="head size")
    parser.add_argument("--threads", type=int, help="the most that there are, if not given")
    parser.add_argument("--precision", default="int8")
    arguments = parser.parse_args()
    report = json.loads(pathlib.Path(arguments.report).read_text(encoding="utf-8"))
    if not report["rows"]:
        raise SystemExit(f"plot: {arguments.report} has no rows")
    if arguments.threads is None:
        arguments.threads = max(row["threads"] for row in report["rows"])
    if arguments.d not in {row["shape"][3] for row in report["rows"]}:
        arguments.d = report["rows"][0]["shape"][3]
    layouts = [row.get("layout", "bhnd") for row in report["rows"]]
    arguments.layout = "bhnd" if "bhnd" in layouts else layouts[0]
    folder = pathlib.Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_table.md").write_text(table(report), encoding="utf-8")
    print(folder / "bench_table.md")
    machine = report["machine"].get("gpu", report["machine"]["processor"])
    with_stages = []
    for direction in ("forward", "backward"):
        rows = rows_of(report, arguments, direction)
        precisions = {row["precision"] for row in rows if row["name"] == "sla2"}
        if not precisions:
            continue
        precision = arguments.precision if arguments.precision in precisions else min(precisions)
        title = f"{direction}, d = {arguments.d}, {arguments.threads} threads, {machine}"
        path = folder / f"bench_time_{direction}.svg"
        path.write_text(time_plot(series(rows, precision), title), encoding="utf-8")
        print(path)
        staged = [row for row in rows if row.get("stages_ms")]
        # The usual case: N = 32768 where it was run, else the longest, and the smallest keep.
        tokens = {row["shape"][2] for row in staged}
        wanted = 32768 if 32768 in tokens else max(tokens, default=0)
        keep = min((row["keep"] for row in staged), default=0)
        with_stages += [r for r in staged if r["shape"][2] == wanted and r["keep"] == keep]
    if with_stages:
        n, keep = with_stages[0]["shape"][2], with_stages[0]["keep"]
        title = f"N = {n}, d = {arguments.d}, keep {keep:g}, {machine}"
        path = folder / "bench_stages.svg"
        path.write_text(stage_plot(with_stages, title), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
