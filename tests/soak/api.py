"""`make fuzz-api`: schemathesis against a real `trtllm-serve`, by what the server's OpenAPI document says of itself.

    python tests/soak/api.py [--cases 5000] [--seed 1]

The exit status is 1 where an answer is a failure of the server, or not what the document promises.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # as `tests.soak.api`, so that the modules beside it are found
    sys.path.insert(0, str(Path(__file__).parents[2]))
    __package__ = "tests.soak"

from .server import Server

OPTIONS = ("--max_seq_len=64", "--num_serve_frontends=2", "--tool_parser=hermes")
# A request may be one that the document allows and be refused: it may ask for more than the server's limits, for a
# grammar that is none, or for fields that contradict each other. JSON Schema has no words for these.
LEFT_OUT = "positive_data_acceptance"


def fuzz(address: str, examples: int, seed: int) -> tuple[int, str]:
    """The number of requests that schemathesis made, `examples` a path besides its own, and what it reports.

    RuntimeError, with that, where it found something.
    """
    command = ["st", "run", f"{address}/openapi.json", "--checks=all", f"--exclude-checks={LEFT_OUT}", "--mode=all"]
    how = [f"--max-examples={examples}", f"--seed={seed}", "--continue-on-failure", "--no-color", "--warnings=off"]
    with tempfile.TemporaryDirectory(prefix="fuzz-api-") as folder:
        done = subprocess.run(
            [Path(sys.executable).with_name(command[0]), *command[1:], *how], capture_output=True, text=True, cwd=folder
        )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    cases = re.search(r"([\d,]+) generated", done.stdout)
    assert cases, done.stdout
    return int(cases[1].replace(",", "")), done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="requests at least (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-api-") as folder, Server(Path(folder), *OPTIONS) as server:
        began, cases, seed = time.monotonic(), 0, options.seed
        while cases < options.cases:
            try:
                more, _ = fuzz(f"http://{server.host}:{server.port}", 250, seed)
            except RuntimeError as error:
                sys.exit(str(error))
            cases, seed = cases + more, seed + 1
        took = time.monotonic() - began
        server.complete()
        unknown = [line for line in server.log.read_text().splitlines() if "Traceback" in line or "failed" in line]
    print(f"{cases} requests in {took:.0f} s, none broke the server or its document")
    if unknown or server.process.returncode:
        sys.exit(f"the server ended with exit code {server.process.returncode} and said {unknown}")


if __name__ == "__main__":
    main()
