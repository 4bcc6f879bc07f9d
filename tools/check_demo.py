#!/usr/bin/env python3
"""Checks what `make demo` promises in its report.json: SLA2 better than SLA, time, memory.

    tools/check_demo.py out/demo/report.json [--minutes 15] [--gigabytes 6]

Prints one line a promise; exit code 1 if one is not kept.
"""

import argparse
import json
import sys


def row(report, method, stage, keep=None):
    for entry in report["methods"]:
        same_keep = keep is None or abs(entry["keep"] - keep) < 1e-9
        if (entry["method"], entry["stage"]) == (method, stage) and same_keep:
            return entry
    raise SystemExit(f"the report has no row of method {method}, stage {stage}, keep {keep}")


def promises(report, minutes, gigabytes):
    """(text, kept) of each."""
    keep = report["settings"]["main_keep"]
    full = row(report, "full", "before")
    sla2, sla = row(report, "sla2", "tuned", keep), row(report, "sla", "tuned", keep)
    at = f"at {100 * keep:g}%"
    yield (
        f"as many training steps: SLA2 {sla2['train_steps']}, SLA {sla['train_steps']}",
        sla2["train_steps"] == sla["train_steps"],
    )
    # 1 dB is a fifth less squared error: more than another training seed moves it.
    for name, key, margin in (
        ("one pass", "psnr_denoised_db", 1.0),
        ("whole videos", "psnr_to_full_db", 0.0),
    ):
        text = f"{name} {at}, dB to full attention: SLA2 {sla2[key]:.2f}, SLA {sla[key]:.2f}"
        yield text, sla2[key] > sla[key] + margin
    yield (
        f"validation loss {at}: full {full['val_loss']:.4f}, SLA2 {sla2['val_loss']:.4f}, "
        f"SLA {sla['val_loss']:.4f}",
        sla2["val_loss"] < sla["val_loss"],
    )
    errors = [layer for layer in report["layers"] if abs(layer["keep"] - keep) < 1e-9]
    before, after = (
        sum(layer[key] for layer in errors) / len(errors) for key in ("error_before", "error_after")
    )
    yield f"attention error {at}: {before:.3f} -> {after:.3f}", after < 0.75 * before
    yield (
        f"a sampling step: full {full['step_ms']:.1f} ms, SLA2 {sla2['step_ms']:.1f} ms",
        sla2["step_ms"] < full["step_ms"],
    )
    if report["timing"]["resumed"]:
        yield "time: an earlier run did part of it, so the whole is not known", True
    else:
        total = report["timing"]["total_s"]
        yield f"time {total / 60:.1f} of {minutes:g} minutes", total <= 60 * minutes
    peak = report["machine"]["peak_rss_mb"]
    yield f"peak memory {peak / 1000:.2f} of {gigabytes:g} GB", peak <= 1000 * gigabytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--gigabytes", type=float, default=6)
    arguments = parser.parse_args()
    with open(arguments.report, encoding="utf-8") as file:
        report = json.load(file)
    broken = 0
    for text, kept in promises(report, arguments.minutes, arguments.gigabytes):
        print(f"{'ok    ' if kept else 'BROKEN'} {text}")
        broken += not kept
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
