"""Requests that Schemathesis makes of the server's own OpenAPI description, valid and invalid, for some minutes.

No answer may have a status of 500 or more, other than 503 and 504. The server then still has to be healthy and to give
a right answer.

python benchmarks/serving_fuzz.py [--minutes 10] [--seed 0] [--threads N] [--json FILE]
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from common import Row, show
from serving_client import encode_request
from serving_process import Server, serve
from serving_work import MODEL, EmbeddingWork, connect, embedding_work, make_texts

from cafe import Cafe
from cafe.checkpoint import resolve_checkpoint

MAX_NEW_TOKENS = "64"  # of an answer, so that the time is not spent on long ones


def fuzz(server: Server, seconds: int, seed: int, events: Path) -> int:
    """Run Schemathesis, and return its exit status. It writes each request and answer into a file."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://{server.host}:{server.port}/openapi.json"]
    command += ["--max-time", str(seconds), "--seed", str(seed), "--checks", "not_a_server_error"]
    command += ["--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "60", "--workers", "4"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(events), "--warnings", "off", "--no-shrink"]
    return subprocess.run(command, timeout=seconds + 600).returncode


def count_statuses(events: Path) -> Counter[int]:
    """Count the answers by their status."""
    statuses: Counter[int] = Counter()

    def search(value: object) -> None:
        """Look for responses in whatever the file holds."""
        if isinstance(value, dict):
            if isinstance(value.get("status_code"), int):
                statuses[value["status_code"]] += 1
            for each in value.values():
                search(each)
        elif isinstance(value, list):
            for each in value:
                search(each)

    with events.open() as file:
        for line in file:
            search(json.loads(line))
    return statuses


async def is_well(server: Server, work: EmbeddingWork) -> bool:
    """Return whether a server is healthy and gives a right answer."""
    async with connect(server) as connection:
        health = await connection.request(encode_request("/health"))
        response = await connection.request(work.message)
    return health.status == response.status == 200 and work.is_right(response)


def main() -> None:
    """Print the statuses and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch in the server")
    options, _ = parser.parse_known_args()
    work = embedding_work(Cafe.load(resolve_checkpoint(MODEL)), make_texts(1))
    server_options = "--max-new-tokens", MAX_NEW_TOKENS
    with serve(MODEL, *server_options, threads=options.threads) as server, tempfile.TemporaryDirectory() as directory:
        events = Path(directory) / "events.ndjson"
        failed = fuzz(server, round(60 * options.minutes), options.seed, events)
        statuses, well = count_statuses(events), asyncio.run(is_well(server, work))
    print(", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items())))
    errors = sum(count for status, count in statuses.items() if status >= 500 and status not in (503, 504))
    show(
        f"Schemathesis for {options.minutes:g} minutes, seed {options.seed}",
        [
            Row("requests", statuses.total(), 1000, 1000),
            Row("answers with a status of 500", max(errors, int(failed != 0)), 0, 0, at_least=False),
            Row("healthy afterwards, with a right answer", well, 1, 1),
        ],
    )


if __name__ == "__main__":
    main()
