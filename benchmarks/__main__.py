"""Run every benchmark, one after another (``python -m benchmarks``), or some (``python -m benchmarks chain``).

Each prints its figures beside the limit or the rival measured in the same run. Nothing else should run meanwhile.
"""

from __future__ import annotations

import subprocess
import sys

ALL = ("chain", "finality", "propagation", "heal", "catchup", "wire", "model", "delta", "daemons", "failover")


def main() -> int:
    """Run the benchmarks that are named, or all; return how many failed."""
    chosen = sys.argv[1:] or ALL
    if unknown := set(chosen) - set(ALL):
        print(f"there is no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(ALL)}", file=sys.stderr)
        return 2
    failures = 0
    for name in chosen:
        print(f"\n== {name}\n", flush=True)
        failures += subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    return failures


if __name__ == "__main__":
    sys.exit(main())
