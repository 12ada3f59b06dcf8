"""Training on several processes, started by torchrun on the CPU, computes what one does with the batch of both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def toy(experts):
    """A small model and its text."""
    import torch

    from itera_lite.base.batches import TokenStream
    from itera_lite.base.core import seed_everything
    from itera_lite.models.config import named_config
    from itera_lite.models.model import build_model

    seed_everything(1)
    ids = torch.randint(1, 3, (900,)).cumsum(0) % 17
    stream = TokenStream(ids=ids, starts=torch.tensor([0]), bytes=torch.tensor([2000]))
    fields = {
        "vocab_size": 17, "hidden_size": 8, "num_layers": 2, "expert_size": 8, "max_seq_length": 16,
        "dropout": 0.1 if experts is True else 0.0,
    }
    dense = {} if experts else {"num_experts": 0, "top_k_experts": 0, "moe_layers": ()}
    return build_model(named_config("micro", **fields, **dense)), stream


def train_toy(folder, batch_size, looks=None, experts=False, steps=12, sharding=False):
    """The toy's losses and weights; with `looks`, it is asked to stop when it has looked for a request so often."""
    from itera_lite.base.system import StopSignals
    from itera_lite.training.config import TrainConfig
    from itera_lite.training.sharding import whole
    from itera_lite.training.trainer import Trainer, TrainingInterrupted, deterministic

    model, stream = toy(experts)
    config = TrainConfig(
        max_tokens=steps * 16 * 16,
        seq_length=16,
        batch_size=batch_size,
        grad_accumulation=2,
        learning_rate=0.02,
        eval_every_tokens=3 * 256,
        eval_tokens=640,
        log_every_steps=1,
        checkpoint_every_steps=5,
        device="cpu",
        sharding=sharding,
    )
    trainer = Trainer(model, stream, stream, config, folder, seed=3, progress=False)
    stop = StopSignals()
    if looks is not None:
        asked = iter(range(looks))
        stop = type(
            "Asked", (), {"received": property(lambda self: None if next(asked, None) is not None else "SIGTERM")}
        )()
    with trainer.alone(), deterministic(trainer.device):
        trainer.resume()
        try:
            trainer.fit(stop)
        except TrainingInterrupted:
            return trainer.at.step
    losses = [[row["step"], row["train_loss"], row["val_nll"]] for row in trainer.at.rows]
    return {
        "losses": losses, "weights": [whole(p.detach()).flatten().tolist() for p in model.parameters()],
        "processes": trainer.processes,
    }


def each_process(folder):
    """What torchrun starts twice: undisturbed runs, and one that is stopped in the middle of a step, then resumed."""
    outcomes = {
        # a loss that does not depend on how a batch is shared, as a balancing loss does
        "dense": train_toy(folder / "dense", batch_size=4),
        "alone": train_toy(folder / "alone", batch_size=4, experts=True),
        "stopped_at": train_toy(folder / "stopped", batch_size=4, experts=True, looks=16),
        "resumed": train_toy(folder / "stopped", batch_size=4, experts=True),
        "experts": train_toy(folder / "experts", batch_size=4, experts="without dropout"),
        "sharded": train_toy(folder / "sharded", batch_size=4, sharding=True),
        "sharded_stopped_at": train_toy(folder / "sharded-stopped", batch_size=4, looks=16, sharding=True),
        "sharded_resumed": train_toy(folder / "sharded-stopped", batch_size=4, sharding=True),
        "left_at": train_toy(folder / "left", batch_size=4, looks=16, sharding=True),
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(folder),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_equal_one_with_twice_the_batch(two_processes, tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two processes
    one = train_toy(tmp_path / "one", batch_size=8)
    torch.set_num_threads(threads)
    two = two_processes[0]["dense"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == len(two["losses"]) == 13
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a[0] == b[0]
        assert all(x == y or abs(x - y) < 1e-4 for x, y in zip(a[1:], b[1:], strict=True)), (a, b)
    assert one["losses"][-1][2] < one["losses"][0][2] - 0.1, "nothing was learnt"
    pairs = ((x, y) for p, q in zip(one["weights"], two["weights"], strict=True) for x, y in zip(p, q, strict=True))
    assert max(abs(x - y) for x, y in pairs) < 1e-3


def test_both_processes_hold_the_same_weights(two_processes):
    for run in ("dense", "alone"):
        assert two_processes[0][run]["weights"] == two_processes[1][run]["weights"]


def test_stopped_and_resumed_on_two_processes_gives_the_same_bits(two_processes):
    for outcome in two_processes:
        assert 0 < outcome["stopped_at"] < 12
        assert outcome["resumed"] == outcome["alone"]


def close(one, other, tolerance):
    """Check that two runs have the same losses, step by step, relative to their size."""
    assert len(one["losses"]) == len(other["losses"]) == 13
    for a, b in zip(one["losses"], other["losses"], strict=True):
        assert a[0] == b[0]
        pairs = zip(a[1:], b[1:], strict=True)
        assert all(x == y or abs(x - y) <= tolerance * abs(y) for x, y in pairs), (a, b)


def test_experts_are_balanced_over_all_processes(two_processes, tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = train_toy(tmp_path / "experts", batch_size=8, experts="without dropout")
    torch.set_num_threads(threads)
    close(two_processes[0]["experts"], one, 1e-5)


def test_sharded_weights_give_the_same_losses(two_processes):
    for outcome in two_processes:
        close(outcome["sharded"], outcome["dense"], 1e-5)
        assert 0 < outcome["sharded_stopped_at"] < 12
        assert outcome["sharded_resumed"] == outcome["sharded"]


def test_a_run_of_two_processes_goes_on_with_one(two_processes, tmp_path_factory, capsys):
    """A node is gone: its share of each step is the other's, and so is the checkpoint."""
    import torch

    folder = tmp_path_factory.getbasetemp() / "two0/left"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train_toy(folder, batch_size=8)
    torch.set_num_threads(threads)
    assert "processes is 1, was 2" in capsys.readouterr().out
    close(alone, two_processes[0]["dense"], 1e-5)


if __name__ == "__main__":
    each_process(Path(sys.argv[1]))
