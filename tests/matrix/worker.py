"""Training runs in a process of its own, to be killed, or to be one of several ranks.

    worker.py JOBS.json
    worker.py --serve

JOBS is a list of ``{"case", "form", "output_dir", "options"}``, run one after the other; cases are those of the matrix, and
``fits``, which begins by fitting output layer and middle blocks. Prints ``step N`` at the end of every step and saves, per job
and rank, ``final-RANK.pt`` with the final weights and the number of bytes that all-reduce carried.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

torch.set_num_threads(1)

from support import Recorder, trainer_of, weights_of  # noqa: E402
from test_head import trainer as fitting_trainer  # noqa: E402

from hf_zo import measurement  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
CARRIED = [0]


def count_all_reduce() -> None:
    all_reduce = torch.distributed.all_reduce

    def counting(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        CARRIED[0] += values.nbytes
        return all_reduce(values, *args, **kwargs)

    torch.distributed.all_reduce = counting


def run(case: str, form: str, output_dir: str, options: dict[str, Any]) -> None:
    CARRIED[0] = 0
    infinite_on_rank, parting_rank = options.pop("infinite_on_rank", None), options.pop("parting_rank", None)
    if parting_rank is not None:
        measurement.AGREEMENT_EVERY = 3
    dtype = getattr(torch, options.pop("dtype", "float32"))
    if case == "fits":
        trainer = fitting_trainer(Path(output_dir), **options)
    else:
        trainer = trainer_of(output_dir, case, form, dtype, **options)
    if RANK > 0:  # ranks must agree even where they were built differently
        with torch.no_grad():
            for p in trainer.model.parameters():
                if p.requires_grad:
                    p.add_(1.0)
    trainer.add_callback(Recorder(lambda hook, step, kwargs: tell(f"step {step}") if hook == "on_step_end" else None))
    if infinite_on_rank == RANK:
        compute_loss = trainer.compute_loss

        def infinite_once(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = compute_loss(*args, **kwargs)
            return loss * torch.inf if trainer.state.global_step == 1 else loss

        trainer.compute_loss = infinite_once
    if parting_rank == RANK:

        def part(hook: str, step: int, kwargs: Any) -> None:
            if (hook, step) == ("on_step_end", 1):
                for p in trainer.model.parameters():
                    p.data[..., -1] += 1e-6

        trainer.add_callback(Recorder(part))
    told = ""
    try:
        trainer.train()
    except RuntimeError as error:
        if parting_rank is None:
            raise
        told = str(error)
    torch.save(
        {
            "told": told,
            "weights": weights_of(trainer.model),
            "carried": CARRIED[0],
            "skipped": trainer._zo_optimizer.skipped_steps,
            "ddp": "DistributedDataParallel" in type(trainer.model_wrapped).__name__,
            "log": trainer.state.log_history,
        },
        Path(output_dir) / f"final-{RANK}.pt",
    )


def tell(line: str) -> None:
    """Print a line in one write: where Python does not buffer, `print` makes two, and a kill would come between them."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def serve() -> None:
    """Run jobs from standard input, each in a forked process: importing everything once takes longer than a job.

    Prints ``pid N`` before a job and ``ended STATUS`` after it.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            tell(f"pid {os.getpid()}")
            run(**json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        tell(f"ended {status}")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
        sys.exit()
    count_all_reduce()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
