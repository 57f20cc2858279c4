"""What long trainings and measurements share: they can be stopped, and the same command goes on.

Each file keeps its training loop and its tables; here is only how it finds what is done already,
and how it says that it is still at work.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import metrics


def digest_of(path: Path) -> str:
    """Eight letters that name what a file holds: rows that were measured with it quote them."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def every_minute(items: Sequence, name: str, seconds: float = 60) -> Iterator:
    """The items one by one; each minute a line says how many are done."""
    start = last = time.perf_counter()
    for n_done, item in enumerate(items):
        now = time.perf_counter()
        if now - last >= seconds:
            minutes = (now - start) / 60
            print(f"  {name}: {n_done} of {len(items)}, {minutes:.1f} min", flush=True)
            last = now
        yield item


def is_measured(path: Path, key: dict) -> bool:
    """Whether a saved table has a row with all that the key names."""
    wanted = {name: metrics.cell_text(value) for name, value in key.items()}
    rows = metrics.load_rows(path, as_text=True).to_dict("records")
    return any(all(row.get(name) == text for name, text in wanted.items()) for row in rows)


def forget_rows(path: Path, digest: str | None = None) -> None:
    """Remove the rows that were measured with other weights than these; with None, all rows."""
    rows = metrics.load_rows(path, as_text=True)
    if len(rows):
        is_kept = rows["weights"] == digest if digest and "weights" in rows else [False] * len(rows)
        metrics.save_rows(path, rows[is_kept])
