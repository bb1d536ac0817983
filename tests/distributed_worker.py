"""Several processes for tests: started together, one gloo group, none left behind."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def forkserver() -> Any:
    """Makes new processes, which find imported what several of them need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_sharding", "tests.test_distributed", "tests.test_kills"])
    return context


def launch(target: Callable, processes: int, *args: Any, timeout: float = 600) -> list[Any]:
    """What `target(*args)` returns in each of so many processes of one group. `target` must be importable.

    Raises:
        AssertionError: a process failed, with its traceback, or the time ran out. The others are killed.
    """
    context = forkserver()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(rank, processes, folder, target, args)) for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        end = time.monotonic() + timeout
        try:
            while any(w.exitcode is None for w in workers) and time.monotonic() < end:
                if any(w.exitcode for w in workers):
                    break
                time.sleep(0.05)
            failed = [rank for rank, w in enumerate(workers) if w.exitcode != 0]
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not failed, f"processes {failed} of {processes} did not end well:\n" + "\n".join(errors)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(processes)]


def _work(rank: int, processes: int, folder: str, target: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    # As launchers set them; the rendezvous is a file, so that no port is asked for.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=300),
        )
        torch.save(target(*args), Path(folder, f"{rank}.pt"))
        dist.barrier()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"process {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
