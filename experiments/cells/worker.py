"""What a process that runs cells does, whoever started it."""

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.cells import claims
from experiments.cells.cell import Cell, Task, folder_of
from experiments.cells.claims import Claim, ClaimLost
from mup_jax import data
from mup_jax.training import train
from mup_jax.training.throughput import Progress
from mup_jax.training.vectorized import most_runs, train_vectorized


def configure(platform: str, compiled: Path) -> None:
    """Sets JAX up, before its first use.

    Args:
      platform: of JAX; empty for its own choice.
      compiled: a folder for compiled programs: another worker, or the next start, need not compile
        the same program again.
    """
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if platform:
        jax.config.update("jax_platforms", platform)
    if platform == "cpu":
        # Half of the compilation, which is most of a short run, and of its memory; steps of small
        # models are no slower.
        flags = ["--xla_backend_optimization_level=1", *quick_emitters()]
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def quick_emitters() -> list[str]:
    """Flags of XLA for the CPU code generator that compiles fastest.

    A flag that XLA does not know ends the process: later versions have one generator.
    """
    return ["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []


def run_task(task: Task, workdir: Path, reports: Any) -> None:
    """Trains the cells of a task, each in its folder in `workdir`; `reports` is for `Progress`.

    Cells that another worker has claimed are left to that one. What was compiled for tasks before
    the last few is forgotten: a worker's memory does not grow with the ladder.
    """
    gc.collect()
    groups = _groups(task.cells, workdir) if task.vectorized else [[cell] for cell in task.cells]
    for group in groups:
        with contextlib.ExitStack() as stack, contextlib.suppress(ClaimLost):
            held = []
            for cell in group:
                folder = folder_of(cell, workdir)
                claim = stack.enter_context(claims.held(folder, task.claims[cell.name]))
                if claim and not (folder / "result.json").exists():
                    held.append((cell, claim))
            if held:
                _run_cells((task.size, task.name), held, workdir, reports)


def _groups(cells: Sequence[Cell], workdir: Path) -> Iterator[Sequence[Cell]]:
    """Cells to be trained by one program: as many as fit into memory, and new ones only."""
    begun = [cell for cell in cells if (folder_of(cell, workdir) / "checkpoints").exists()]
    yield from ([cell] for cell in begun)
    new = [cell for cell in cells if cell not in begun]
    if new:
        config = new[0].config
        vocab_size = data.vocab_size(config.data.source, config.data.tokenizer)
        most = most_runs(config, vocab_size, _memory())
        yield from (new[i : i + most] for i in range(0, len(new), most))


def _memory() -> int:
    """Bytes of a device that may be used: of a CPU's memory a core's share of the half."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // 2 // (os.cpu_count() or 1)


def _run_cells(
    task: tuple[str, str], held: Sequence[tuple[Cell, Claim]], workdir: Path, reports: Any
) -> None:
    cells = [cell for cell, _ in held]
    reports.put((task, cells[0], 0, 1, None, None))

    def report(i: int, now: Progress) -> None:
        cell, claim = held[i]
        claim.check()
        reports.put((task, cell, now.step, now.steps, now.loss, None))

    folders = [folder_of(cell, workdir) for cell in cells]
    if len(cells) == 1:
        results = [train(cells[0].config, folders[0], lambda now: report(0, now))]
    else:
        results = train_vectorized([cell.config for cell in cells], folders, report)
    for cell, result in zip(cells, results, strict=True):
        reports.put((task, cell, result["steps"], result["steps"], None, result))
