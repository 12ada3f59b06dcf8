"""A package in an environment that has onnxruntime, tokenizers and numpy, and nothing else."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from itera_lite.base.data import load_corpus
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.checkpoints.folder import load_model, load_tokenizer, save_model
from itera_lite.models.config import named_config
from itera_lite.models.generation import generate_text
from itera_lite.models.model import build_model
from itera_lite.runtime.package import package_folder
from itera_lite.storage.precision import compress_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Python of a new environment with the packages of a package's requirements.txt and what these need."""
    place = tmp_path_factory.mktemp("bare")
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pins = ["--constraint", str(ROOT / "constraints.txt")]
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *pins, "onnxruntime", "tokenizers", "numpy"],
        capture_output=True, text=True, timeout=240, check=False,
    )
    if done.returncode:
        pytest.skip(f"no package index within reach: {done.stderr.strip().splitlines()[-1:]}")
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a tokenizer, its matrices in INT8."""
    tokenizer = train_tokenizer(load_corpus("stories").train[:200], 300)
    shape = dict(vocab_size=300, hidden_size=64, num_layers=2, expert_size=32, max_seq_length=64)
    model = compress_model(build_model(named_config("tiny", **shape)).eval(), {"*norm*": "fp32", "*": "int8"})
    return save_model(model, tmp_path_factory.mktemp("models") / "int8", tokenizer)


def run(python, program, *words):
    return subprocess.run([python, "-I", program, *words], capture_output=True, text=True, timeout=120, check=False)


def test_package_runs_where_nothing_else_is_installed(bare, folder, tmp_path):
    for module in ("torch", "itera_lite", "onnx"):
        missing = subprocess.run([bare, "-I", "-c", f"import {module}"], capture_output=True, text=True, check=False)
        assert f"No module named '{module}'" in missing.stderr
    package_folder(folder, tmp_path / "package", accuracy_level=0)
    done = run(bare, tmp_path / "package" / "generate.py", "Once upon a time", "20")
    expected = generate_text(load_model(folder), load_tokenizer(folder), "Once upon a time", 20, temperature=0)
    assert (done.returncode, done.stdout.rstrip("\n")) == (0, expected), done.stderr


def test_program_refuses_an_altered_file_in_one_line(bare, folder, tmp_path):
    package_folder(folder, tmp_path / "package")
    graph = tmp_path / "package" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    done = run(bare, tmp_path / "package" / "generate.py", "Once", "2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "model.onnx is missing or was altered" in done.stderr


def test_sampling_is_repeatable(folder, tmp_path):
    package_folder(folder, tmp_path / "package")
    texts = [run(sys.executable, tmp_path / "package" / "generate.py", "Once", "12", "0.8", s).stdout for s in "112"]
    assert texts[0] == texts[1] != texts[2]
