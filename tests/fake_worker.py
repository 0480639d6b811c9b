"""Stands in for ``smolconv.continual_pretraining.run.worker`` where launchers are tested: steps are naps, a checkpoint is a number.

What it does beyond that stands in $FAKE, as JSON: ``steps``, ``nap`` (seconds), ``gloo`` (meet the other ranks and sum),
``files`` (the same by files in the run's folder, which spares each rank the import of torch), ``rank`` (which one does the
following, or "all") at ``step``: ``do`` = "raise", "fail" (a failure file and exit code 6), "kill", "hang" (for ever, in no
reach of signals).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

_meetings = itertools.count()


def main() -> int:
    run, rank, world_size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fake = {
        "steps": 3,
        "nap": 0.05,
        "gloo": False,
        "files": False,
        "rank": None,
        "step": 2,
        "do": None,
        **json.loads(os.environ["FAKE"]),
    }
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, frame: asked.append(signum))
    saved = run / "checkpoints" / "saved"
    step = int(saved.read_text()) if saved.exists() and "never" not in sys.argv else 0
    facts = {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")}
    print(f"rank {rank} of {world_size} begins after step {step}: {facts} pid {os.getpid()}", flush=True)
    (run / "start" / "deepspeed").mkdir(parents=True, exist_ok=True)  # as the real one's, which its launcher removes
    _agree(fake, 0)
    (run / f"begun-{rank}").write_text(str(os.getpid()))
    while step < fake["steps"]:
        step += 1
        time.sleep(fake["nap"])
        if fake["rank"] in (rank, "all") and step == fake["step"]:
            _do(fake["do"], run, rank)
        stop = _agree(fake, len(asked))
        print(f"rank {rank} step {step}", file=sys.stderr, flush=True)
        if stop:
            if rank == 0:
                saved.parent.mkdir(exist_ok=True)
                saved.write_text(str(step))
            _agree(fake, 0)
            print(f"rank {rank} saved step {step} after {[signal.Signals(n).name for n in asked]}", flush=True)
            return 75
    return 0


def _agree(fake: dict, value: float) -> float:
    """The sum over the ranks; where they do not meet, the value itself."""
    if fake["files"]:
        return _agree_by_files(value)
    if not fake["gloo"]:
        return value
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.tensor([float(value), 1.0])
    dist.all_reduce(total)
    assert int(total[1]) == int(os.environ["WORLD_SIZE"])
    return float(total[0])


def _agree_by_files(value: float) -> float:
    """Ranks of one start know each other by its port; as with gloo, one that is gone is an error of the others."""
    folder, rank = Path(sys.argv[1]) / f"met-{os.environ['MASTER_PORT']}", int(os.environ["RANK"])
    folder.mkdir(exist_ok=True)
    ranks = range(int(os.environ["WORLD_SIZE"]))
    number = next(_meetings)
    mine = folder / f"{number}-{rank}"
    mine.with_suffix(".part").write_text(f"{os.getpid()} {value}")
    mine.with_suffix(".part").rename(mine)
    while True:
        gone = [path for path in folder.glob(f"{number - 1}-*") if not _alive(path.read_text().split()[0])]
        met = [folder / f"{number}-{other}" for other in ranks]
        if all(path.exists() for path in met):
            return sum(float(path.read_text().split()[1]) for path in met)
        if gone:
            raise RuntimeError(f"{gone} ended")
        time.sleep(0.005)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _do(what: str, run: Path, rank: int) -> None:
    print(f"rank {rank} is about to {what}", flush=True)
    if what == "raise":
        raise RuntimeError("of my own accord")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(1000)
    if what == "fail":
        document = {"rank": rank, "exit_code": 6, "error": "TrainingStopped", "message": "the loss is nan"}
        document["attempt"] = os.environ.get("SMOLCONV_ATTEMPT", "")
        (run / "logs" / f"failure-rank-{rank:05d}.json").write_text(json.dumps(document))
        os._exit(6)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
