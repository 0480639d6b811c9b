"""``make fuzz``: ends with 1 when anything failed, and writes each new failure to fixtures/fuzz."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from fuzzing.campaign import report, run, store, to_json
from fuzzing.judge import SECONDS

RESULTS = Path(__file__).parents[2] / "benchmarks/results/fuzz.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="after which an input hangs")
    parser.add_argument("--details", type=Path, help="write every failure with what it printed")
    options = parser.parse_args()
    started = time.monotonic()
    found = run(options.minutes, options.seed, options.processes, options.seconds)
    took = time.monotonic() - started
    if options.details:
        details = [
            {
                "kind": kind,
                "signature": signature,
                "count": found.signatures[kind, signature],
                **case.to_json(),
                "detail": outcome.detail,
            }
            for (kind, signature), (case, outcome) in found.examples.items()
        ]
        options.details.write_text(
            json.dumps({"examples": details, "nameless": dict(found.nameless.most_common(300))}, indent=1)
        )
    print(report(found, took))
    for path in store(found):
        print(f"wrote {path}")
    RESULTS.write_text(json.dumps(to_json(found, options.seed, took), indent=1) + "\n")
    sys.exit(1 if found.failures else 0)


if __name__ == "__main__":
    main()
