"""A training run that is killed, stopped or runs out of disk ends, once resumed, with the bits of one left alone.

One process imports torch and then forks a child for each attempt, so that an attempt costs its training and no
start-up.
A child is ended in one of these ways:

line     it kills itself (SIGKILL) before a random line of the training code: in a step, while logging
save     likewise, before a random line of the code that writes a checkpoint and removes the previous one
time     it is killed from outside at a random time, in the middle of whatever it does
disk     the disk has room for a random part of the next checkpoint (a small tmpfs, or what `small_disk` has instead)
SIGINT   Ctrl-C at a random time: it has to end by itself, within five seconds
SIGTERM  likewise
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

KINDS = ("line", "save", "time", "disk", "SIGINT", "save", "line", "disk", "save", "SIGTERM")
ATTEMPTS = 5  # in one run; after that it is left alone, and compared
SAVING = {  # functions that write a checkpoint and remove the previous one
    "save", "state_parts", "_dump", "canonical_json", "write_parts", "write_folder", "_beside", "_sync",
    "remove_checkpoints", "remove_leftovers",
}
STEPS, DISK_BYTES = 24, 4_000_000
BUSY = max(1, os.getloadavg()[0] / os.cpu_count())  # where others leave it no core of its own
LIMIT = 5 * BUSY  # seconds in which Ctrl-C ends training


# --- in the helper process


def training():
    """What every child trains: a small model with experts and dropout, steps of three batches, epochs of four steps."""
    import torch

    from itera_lite.base.batches import TokenStream
    from itera_lite.base.core import seed_everything
    from itera_lite.models.config import named_config
    from itera_lite.models.model import build_model
    from itera_lite.training.config import TrainConfig

    seed_everything(1)
    ids = torch.randint(1, 3, (420,)).cumsum(0) % 17
    stream = TokenStream(ids=ids, starts=torch.tensor([0]), bytes=torch.tensor([1000]))
    fields = {
        "vocab_size": 17, "hidden_size": 8, "num_layers": 2, "expert_size": 8, "max_seq_length": 16, "dropout": 0.1,
    }
    config = TrainConfig(
        max_tokens=STEPS * 2 * 3 * 16,
        seq_length=16,
        batch_size=2,
        grad_accumulation=3,
        eval_every_tokens=5 * 96,
        eval_tokens=160,
        checkpoint_every_steps=3,
        log_every_steps=2,
        device="cpu",
    )
    return build_model(named_config("micro", **fields)), stream, config


def kill_before_line(number, functions):
    """End this process before the `number`-th line of the training code, in these functions (None: in all)."""
    from itera_lite.base import system
    from itera_lite.training import checkpoint, config, progress, train, trainer

    files, left = {module.__file__ for module in (system, checkpoint, config, progress, train, trainer)}, number

    def on_line(frame, event, arg):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame, event, arg):
        code = frame.f_code
        return on_line if code.co_filename in files and (functions is None or code.co_name in functions) else None

    sys.settrace(on_call)
    return lambda: number - left


def attempt(order):
    """Train in a forked child, until done or until something stops it; the outcome, JSON-able."""
    from itera_lite.base.core import IteraLiteError
    from itera_lite.training.train import train

    kind, folder = order["kind"], Path(order["folder"])
    if order.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], resource.RLIM_INFINITY))
    lines = (
        kill_before_line(order.get("line", 0), SAVING if kind == "save" else None)
        if kind in ("line", "save", "count")
        else None
    )
    model, stream, config = training()
    try:
        train(model, stream, stream, config, folder, seed=3, progress=False)
    except IteraLiteError as error:
        return {"error": type(error).__name__, "message": str(error)}
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    timed = [rows[0].index(column) for column in ("seconds", "tokens_per_s")]
    rows = [[value for i, value in enumerate(row) if i not in timed] for row in rows]
    return {"weights": hashlib.sha256(weights).hexdigest(), "metrics": rows, "lines": lines() if lines else None}


def serve():
    """Read orders from standard input, one JSON object a line, and answer each with the outcome of a forked child."""
    import torch._dynamo  # noqa: F401  (torch.optim imports it late, which would cost every child seconds)

    training()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before and after training Ctrl-C ends a child as SIGTERM does
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            with os.fdopen(writing, "w") as answer:
                json.dump(attempt(order), answer)
            os._exit(0)
        os.close(writing)
        if "after" in order:
            time.sleep(order["after"])
            begun = time.monotonic()
            os.kill(child, signal.SIGKILL if order["kind"] == "time" else signal.Signals[order["kind"]])
        with os.fdopen(reading) as answer:
            text = answer.read()
        _, status = os.waitpid(child, 0)
        outcome = json.loads(text) if text else {}
        if "after" in order:
            outcome["ended_after"] = time.monotonic() - begun
        if os.WIFSIGNALED(status):
            outcome["signal"] = os.WTERMSIG(status)
        print(json.dumps(outcome | {"status": status}), flush=True)


# --- in pytest


@pytest.fixture(scope="module")
def helper():
    """Sends an order to the helper process and gives back the outcome."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"

    def ask(**order):
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A folder on a disk of `DISK_BYTES`, and whether it is one: it takes the right to mount."""
    folder = tmp_path_factory.mktemp("disk")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        reason = mount.stderr.strip().splitlines()
        warnings.warn(
            f"no small disk could be mounted ({reason}): a limit on file sizes stands in for the full one", stacklevel=1
        )
    yield folder, mount.returncode == 0
    if mount.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def alone(helper, tmp_path_factory):
    """The outcome of a run that nobody disturbed, with what the orders below need to know of it."""
    begun = time.monotonic()
    outcome = helper(kind="quiet", folder=str(tmp_path_factory.mktemp("alone") / "run"))
    seconds = time.monotonic() - begun
    counted = helper(kind="count", folder=str(tmp_path_factory.mktemp("counted") / "run"))
    assert counted["weights"] == outcome["weights"], "two undisturbed runs differ: nothing below could be believed"
    assert len({row[-1] for row in outcome["metrics"]}) > 5, "nothing was trained"
    return outcome | {"lines": counted["lines"], "seconds": seconds}


@contextlib.contextmanager
def full_disk(folder, free):
    """Fill the disk of `folder` until `free` bytes are left."""
    filler = folder / "filler"
    space = os.statvfs(folder)
    with open(filler, "wb") as f:
        f.write(bytes(max(0, space.f_bavail * space.f_frsize - free)))
    try:
        yield
    finally:
        filler.unlink()


def checkpoint_bytes(folder):
    """Size and content hash of the one checkpoint in a run's folder; (0, None) without one."""
    newest = sorted(folder.glob("checkpoint-*"))[-1:]  # one that is being written or deleted is hidden
    contents = [file.read_bytes() for path in newest for file in sorted(path.iterdir())]
    return sum(map(len, contents)), (newest[0].name, hashlib.sha256(b"".join(contents)).hexdigest()) if newest else None


def disturb(helper, alone, kind, folder, disk, real_disk, draw):
    """One attempt at training that is to be ended in this way; its outcome."""
    order = {"kind": kind, "folder": str(folder)}
    if kind == "line":
        return helper(**order, line=draw.randrange(1, alone["lines"]))
    if kind == "save":
        return helper(**order, line=draw.randrange(1, 150))
    if kind in ("time", "SIGINT", "SIGTERM"):
        return helper(**order, after=draw.uniform(0, alone["seconds"]))
    size, before = checkpoint_bytes(folder)
    share = draw.uniform(0, 0.95)
    if real_disk:
        with full_disk(disk, free=int(share * (size or 40_000))):
            outcome = helper(**order)
    else:
        outcome = helper(**order, file_bytes=int(share * (size or 40_000) / 2))
    if "error" in outcome and before:
        assert checkpoint_bytes(folder)[1] == before, "the checkpoint that was there when the disk was full has changed"
    return outcome


def check_ending(kind, outcome):
    """Whether an attempt was ended as it should; False: it was done before."""
    if outcome.get("signal") == signal.SIGKILL:
        assert kind in ("line", "save", "time")
    elif kind == "disk" and "error" in outcome:
        assert outcome["error"] == "CheckpointError" and "could not be written" in outcome["message"], outcome
        assert "\n" not in outcome["message"]
    elif kind in ("SIGINT", "SIGTERM") and outcome.get("signal") == signal.Signals[kind]:
        assert outcome["ended_after"] < LIMIT  # it came before training began, or after its end
    elif kind in ("SIGINT", "SIGTERM") and "error" in outcome:
        assert outcome["error"] == "TrainingInterrupted" and "to resume" in outcome["message"], outcome
        assert outcome["ended_after"] < LIMIT
    else:
        assert "weights" in outcome, outcome
        return False
    return True


def kill_and_compare(helper, alone, small_disk, kills, seed):
    """Train again and again, each run disturbed up to `ATTEMPTS` times, until `kills` were ended; compare each run."""
    disk, real_disk = small_disk
    draw, ended, run, kinds = random.Random(seed), {}, 0, [*KINDS]
    while sum(ended.values()) < kills:
        run += 1
        folder = disk / f"run-{seed}-{run}"
        disturbed = 0
        outcome = {}
        while "weights" not in outcome:
            if disturbed < ATTEMPTS:
                kind = kinds[(sum(ended.values())) % len(kinds)]
                outcome = disturb(helper, alone, kind, folder, disk, real_disk, draw)
                if check_ending(kind, outcome):
                    ended[kind] = ended.get(kind, 0) + 1
                disturbed += 1
            else:
                outcome = helper(kind="quiet", folder=str(folder))
        assert outcome["weights"] == alone["weights"], f"run {run} ended with other weights"
        assert outcome["metrics"] == alone["metrics"], f"run {run} ended with other metrics"
        left = [path.name for path in folder.iterdir() if path.is_dir()]
        assert len(left) == 1 and left[0].startswith("checkpoint-"), f"something half written was left behind: {left}"
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
    print(f"{sum(ended.values())} endings in {run} runs: {ended}")
    return ended


def test_ten_kills(helper, alone, small_disk):
    ended = kill_and_compare(helper, alone, small_disk, kills=10, seed=10)
    assert {"line", "save", "disk"} <= ended.keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills(helper, alone, small_disk):
    ended = kill_and_compare(helper, alone, small_disk, kills=100, seed=100)
    assert ended.keys() == set(KINDS)


if __name__ == "__main__":
    serve()
