"""What long trainings and measurements share: they can be stopped, and the same command goes on.

Each file keeps its recipe, its training loop and its tables. Here stands only how a program finds
what is done already, keeps what an unfinished run needs, and says that it is still at work.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import joblib
import torch
from torch import Tensor, nn

import metrics

# ---- Rows: what is done already -------------------------------------------------------------


def recipe_columns(recipe) -> dict[str, str]:
    """A run's dataclass but its seed, as a row holds it and as rows are compared."""
    columns = {name: str(value) for name, value in asdict(recipe).items()}
    del columns["seed"]
    return columns


def has_row(path: Path, key: dict) -> bool:
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


def digest_of(path: Path) -> str:
    """Eight letters that name what a file holds: rows that were measured with it quote them."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


# ---- Runs: side by side, stopped and gone on with -------------------------------------------


def in_parallel(function: Callable, calls: list[tuple], workers: int) -> Iterator:
    """What function(*call) gives for each call, as soon as it is there; `workers` at a time."""
    n = min(workers, max(1, len(calls)))
    parallel = joblib.Parallel(n, return_as="generator_unordered", batch_size=1)
    yield from parallel(joblib.delayed(function)(*call) for call in calls)


def save_checkpoint(path: Path, recipe, done: int, history: list[dict], **parts) -> None:
    """All that a run needs to go on: how much is done, and the state of its models and optimizer.

    A kill while it is written leaves the last one as it was.
    """
    state = {"recipe": recipe_columns(recipe), "seed": recipe.seed, "done": done}
    state |= {"history": history}
    state |= {name: part.state_dict() for name, part in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with metrics.written_aside(path) as aside:
        torch.save(state, aside)


def load_checkpoint(path: Path, recipe, device, **parts) -> tuple[int, list[dict]]:
    """Set the parts to what was saved of this recipe: (how much is done, history), else (0, [])."""
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True, map_location=device)
    if state.get("recipe") != recipe_columns(recipe) or state.get("seed") != recipe.seed:
        return 0, []
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["done"], state["history"]


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics in float16, half the size, on the CPU; counters as they are."""
    state = {name: values.cpu() for name, values in model.state_dict().items()}
    return {
        name: values.half() if values.is_floating_point() else values
        for name, values in state.items()
    }


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
