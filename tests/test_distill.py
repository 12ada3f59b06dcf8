"""Distillation from cached logits that another process goes on with and caches anew ends with the same bits."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STUDENT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from itera_lite.base.core import seed_everything
from itera_lite.base.batches import encode_documents
from itera_lite.base.data import load_corpus
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.methods.cached_logits import Notes
from itera_lite.methods.distill import distill
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model
from itera_lite.training.config import TrainConfig
from itera_lite.training.teacher import weights_fingerprint
from itera_lite.training.trainer import TrainingInterrupted

folder, stop_at = sys.argv[1], int(sys.argv[2])
corpus = load_corpus("stories", limit_documents=60)
small, large = (train_tokenizer(corpus.train, size) for size in (300, 500))

def model(seed, size, **changes):
    seed_everything(seed)
    shape = dict(vocab_size=size, hidden_size=16, num_layers=2, max_seq_length=32)
    return build_model(named_config("micro", **shape, **changes))

find, calls = Notes.find, []
def counted(self, windows):
    if len(windows) == 4: # a batch, and not all that the notes are made of
        calls.append(1)
        if len(calls) == stop_at: os.kill(os.getpid(), signal.SIGTERM)
    return find(self, windows)
Notes.find = counted

config = TrainConfig(max_tokens=2048, seq_length=32, batch_size=4, eval_tokens=256, device="cpu")
student = model(1, 300)
streams = [encode_documents(small, documents) for documents in (corpus.train, corpus.validation)]
try: distill(student, model(0, 500), *streams, config, folder, tokenizers=(small, large), progress=False)
except TrainingInterrupted as e: sys.exit("interrupted")
print(weights_fingerprint(student), len(calls))
"""


def learn(folder, stop_at=0):
    process = subprocess.run(
        [sys.executable, "-c", STUDENT, str(folder), str(stop_at)], cwd=ROOT, capture_output=True, text=True
    )
    return process.returncode, process.stdout.split(), process.stderr.strip().splitlines()[-1:]


def test_interrupted_distillation_ends_with_the_same_bits(tmp_path):
    ended, (weights, steps), _ = learn(tmp_path / "whole")
    assert ended == 0 and int(steps) == 16
    assert learn(tmp_path / "parts", stop_at=6)[2] == ["interrupted"]
    ended, (again, rest), _ = learn(tmp_path / "parts")
    assert ended == 0 and int(rest) < int(steps), "it began anew"
    assert again == weights
