#!/usr/bin/env python3
"""Adds up JUnit logs: count_tests.py LOG EXIT_STATUS [LOG EXIT_STATUS ...].

Prints `N passed, N failed, N skipped`; exits with 1 if something failed. A log that is missing,
empty or broken is a failure, and so is a runner that reports one by its exit status alone."""

import sys
import xml.etree.ElementTree as ET

# What ctest writes for a test that was switched off or that skipped itself. For every other test
# that it did not run ("Unable to find executable") it writes <skipped> too.
CTEST_SKIPS = ("SKIP", "Disabled")


def has_failed(case) -> bool:
    if case.find("failure") is not None or case.find("error") is not None:
        return True
    if case.get("status") == "notrun":
        message = (
            case.find("skipped").get("message", "") if case.find("skipped") is not None else ""
        )
        return not message.startswith(CTEST_SKIPS)
    return case.get("name", "").endswith("NOT_BUILT")


def count(path: str, status: int) -> tuple[int, int, int]:
    try:
        cases = list(ET.parse(path).getroot().iter("testcase"))
    except (OSError, ET.ParseError) as error:
        print(f"{path}: {error}")
        cases = []
    failed = [case for case in cases if has_failed(case)]
    skipped = [c for c in cases if c not in failed and c.find("skipped") is not None]
    for case in failed:
        print(f"failed: {case.get('name')}")
    passed = len(cases) - len(failed) - len(skipped)
    if not failed and (status != 0 or not cases):
        print(f"{path}: the runner ended with status {status} after {len(cases)} tests")
        return passed, 1, len(skipped)
    return passed, len(failed), len(skipped)


def main() -> int:
    arguments = sys.argv[1:]
    counts = [
        count(path, int(status))
        for path, status in zip(arguments[::2], arguments[1::2], strict=True)
    ]
    passed, failed, skipped = (sum(column) for column in zip(*counts, strict=True))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
