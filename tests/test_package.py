"""A packaged model runs with three Python packages, is the same each time, and is refused when a byte of it changes."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch.nn.functional import cross_entropy

from itera_lite.base.core import CheckpointError, ConfigError, IteraLiteError, seed_everything
from itera_lite.base.data import load_corpus
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.checkpoints.folder import save_model
from itera_lite.models.config import named_config
from itera_lite.models.generation import generate, generate_text
from itera_lite.models.model import build_model
from itera_lite.runtime import package
from itera_lite.runtime.package import PACKAGE_FILES, REQUIREMENTS, check_package, load_package, package_folder
from itera_lite.storage.precision import compress_model

ROOT = Path(__file__).resolve().parents[1]
PRECISION = {"embedding*": "int8", "*norm*": "fp32", "*conv1d*": "fp16", "*": "int4"}
SMALL = dict(vocab_size=64, hidden_size=32, num_layers=2, max_seq_length=48)
KINDS = {
    "s4": ("tiny", dict(expert_size=16, positions="learned")),
    "mamba": ("tiny", dict(expert_size=16, kernel="mamba", positions="none")),
    "transformer": ("transformer-tiny", dict(num_heads=2, ffn_size=64)),
}
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ITERA_LITE"))}


def model_of(kind, **fields):
    name, own = KINDS[kind]
    seed_everything(0)
    return build_model(named_config(name, **SMALL | own | fields)).eval()


def run(folder, *arguments, python=sys.executable, cwd=None, **environment):
    """A finished generate.py, started in a folder that is not its own."""
    command = [str(part) for part in (python, Path(folder) / "generate.py", *arguments)]
    return subprocess.run(
        command, cwd=cwd or Path(folder).parent, env=CLEAN | environment, capture_output=True, timeout=60
    )


def written(done):
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().removesuffix("\n")


def refused(done):
    """The one line of a generate.py that ended with status 1."""
    line = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and line.count("\n") == 1, (done.returncode, line)
    assert line.startswith("generate.py: ")
    return line.rstrip("\n")


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A model trained for a moment on stories, its tokenizer, and its package."""
    corpus = load_corpus("stories", limit_documents=100)
    tokenizer = train_tokenizer(corpus.train, 300)
    model = model_of("s4", vocab_size=300, max_seq_length=96)
    ids = torch.tensor([i for text in corpus.train for i in [0, *tokenizer.encode(text).ids]])
    rows = ids[: len(ids) // 65 * 65].view(-1, 65)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(40):
        batch = rows[torch.arange(8 * step, 8 * step + 8) % len(rows)]
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 4, "it learned something: log 300 is 5.7"
    place = tmp_path_factory.mktemp("stories")
    packed = compress_model(model.eval(), PRECISION)
    folder = save_model(packed, place / "model", tokenizer, card={"name": "stories"}, coding="huffman")
    package_folder(folder, place / "package", accuracy_level=0)
    return packed, tokenizer, place


@pytest.fixture(scope="module")
def bare(stories, tmp_path_factory):
    """A Python with what requirements.txt names and nothing else."""
    place = tmp_path_factory.mktemp("bare")
    environment = place / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, env=CLEAN, timeout=60)
    python = environment / "bin" / "python"
    install = [
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "--only-binary", ":all:",
        "--retries", "1", "--timeout", "20", "--constraint", ROOT / "constraints.txt",
        "--requirement", stories[2] / "package" / "requirements.txt",
    ]
    done = subprocess.run(install, cwd=place, env=CLEAN, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return python


# Only three packages


def test_generates_where_only_three_packages_are(stories, bare, tmp_path):
    model, tokenizer, place = stories
    for name in ("torch", "itera_lite", "onnx"):
        done = subprocess.run([bare, "-c", f"import {name}"], cwd=tmp_path, env=CLEAN, capture_output=True, text=True)
        assert done.returncode == 1 and f"No module named '{name}'" in done.stderr
    shutil.copytree(place / "package", tmp_path / "package")
    empty = tmp_path / "empty"
    empty.mkdir()
    for prompt in ("Once upon a time", "Lily had a red ball.", "", "ä ☃ 🙂 "):
        wanted = generate_text(model, tokenizer, prompt, 48, temperature=0)
        assert written(run(tmp_path / "package", prompt, "--tokens", 48, python=bare, cwd=empty)) == wanted
    assert not list(empty.iterdir())
    line = refused(run(tmp_path / "package", "x " * 200, python=bare, cwd=empty))
    assert "96 tokens at most" in line


def test_requirements_are_those_of_the_project(stories):
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {r.name: str(r.specifier) for r in map(Requirement, dependencies)}
    assert {name: f">={version}" for name, version in REQUIREMENTS.items()} == {n: ranges[n] for n in REQUIREMENTS}
    assert (stories[2] / "package/requirements.txt").read_text().count("\n") == 3


def test_program_is_short_and_needs_three_packages():
    lines = package.GENERATE.splitlines()
    assert len(lines) < 30 and max(map(len, lines)) <= 120
    imported = {name for names in re.findall(r"^\s*import ([^;\n]+)", package.GENERATE, re.M) for name in
                (part.split()[0] for part in names.split(","))}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "tokenizers"}


# The models' own text


@pytest.mark.parametrize("kind", KINDS)
def test_writes_what_the_torch_model_writes(kind, tmp_path):
    """Without tokenizer, from numbers of tokens; learned positions end the text, others do not."""
    model = model_of(kind)
    folder = save_model(compress_model(model, {"*": "fp32"}), tmp_path / "model")
    package_folder(folder, tmp_path / "package", accuracy_level=0)
    ids = torch.tensor([5, 17, 60, 2])
    learned = model.config.positions == "learned"
    room = SMALL["max_seq_length"] - len(ids) + 1 if learned else 60
    wanted = generate(model, ids, room, temperature=0)[0].tolist()
    assert written(run(tmp_path / "package", "5 17 60 2", "--tokens", 60)) == " ".join(map(str, wanted))
    graph, tokenizer = load_package(tmp_path / "package.tar")
    assert tokenizer is None and generate(graph, ids, room, temperature=0)[0].tolist() == wanted
    long = " ".join("1" * (SMALL["max_seq_length"] + 1))
    if learned:
        assert "48 tokens at most" in refused(run(tmp_path / "package", long))
    else:
        assert len(written(run(tmp_path / "package", long)).split()) == SMALL["max_seq_length"] + 1 + 64


def test_large_weights_lie_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("itera_lite.runtime.export.write_graph.__defaults__", (1000,))
    model = model_of("mamba")
    folder = save_model(compress_model(model, {"*": "int8"}), tmp_path / "model")
    packaged = package_folder(folder, tmp_path / "package", accuracy_level=0)
    assert "model.onnx.data" in packaged.manifest.files
    wanted = generate(load_package(tmp_path / "package.tar")[0], torch.tensor([1, 2]), 20, temperature=0)[0].tolist()
    assert written(run(tmp_path / "package", "1 2", "--tokens", 20)) == " ".join(map(str, wanted))
    data = tmp_path / "package/model.onnx.data"
    data.write_bytes(flipped(data.read_bytes()))
    assert "model.onnx.data was changed" in refused(run(tmp_path / "package", "1 2"))
    with pytest.raises(CheckpointError, match="model.onnx.data was changed"):
        load_package(tmp_path / "package")


def test_draws_with_a_seed(stories):
    _, _, place = stories
    drawn = [
        written(run(place / "package", "Once", "--temperature", 1, "--top-k", 20, "--seed", seed)) for seed in (0, 0, 1)
    ]
    greedy = written(run(place / "package", "Once"))
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != greedy
    assert written(run(place / "package", "Once", "--temperature", 2, "--top-k", 1)) == greedy


# The same bytes


def test_same_folder_gives_same_tar(stories, tmp_path):
    _, _, place = stories
    threads = torch.get_num_threads()
    moved = shutil.copytree(place / "model", tmp_path / "elsewhere" / "moved")
    torch.set_num_threads(2)
    try:
        again = package_folder(moved, tmp_path / "again", accuracy_level=0)
    finally:
        torch.set_num_threads(threads)
    content = (tmp_path / "again.tar").read_bytes()
    assert content == (place / "package.tar").read_bytes()
    for path in (place / "package").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    for where in (place, tmp_path):
        assert str(where).encode() not in content
    with tarfile.open(tmp_path / "again.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(again.manifest.files.keys() | {"manifest.json"})
    for m in members:
        assert (m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) == (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)


# What goes wrong


@pytest.mark.parametrize("name", [name for name in PACKAGE_FILES if name != "model.onnx.data"])
def test_one_changed_byte_or_a_missing_file_is_noticed(name, stories, tmp_path):
    folder = shutil.copytree(stories[2] / "package", tmp_path / "package")
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(flipped(content))
    with pytest.raises(CheckpointError, match=re.escape(f"{name} was changed")):
        check_package(folder)
    if name == "generate.py":  # a byte of a comment: the program still runs, and finds itself changed
        path.write_bytes(content.replace(b"# before", b"# Before"))
    assert f"{name} was changed" in refused(run(folder, "Once"))
    if name != "generate.py":
        path.unlink()
        assert f"No such file or directory: '{name}'" in refused(run(folder, "Once"))
        with pytest.raises(CheckpointError, match=re.escape(name)):
            check_package(folder)


def test_page_says_what_goes_wrong_and_how_it_looks(stories, tmp_path):
    """Each line of the page's table is what the program prints."""
    model = save_model(model_of("s4"), tmp_path / "model")
    package_folder(model, tmp_path / "numbers")
    stub = tmp_path / "stubs"
    for package_name, content in (("numpy", "raise ModuleNotFoundError(\"No module named 'numpy'\")"),
                                  ("onnxruntime", "__version__ = '1.20.0'")):
        (stub / package_name).mkdir(parents=True)
        (stub / package_name / f"{package_name}.py").write_text(content)
    lines = []
    folder = tmp_path / "numbers"
    graph = folder / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(flipped(content))
    lines.append(refused(run(folder, "1 2")))
    graph.unlink()
    lines.append(refused(run(folder, "1 2")))
    graph.write_bytes(content)
    for package_name in ("numpy", "onnxruntime"):
        lines.append(refused(run(folder, "1 2", PYTHONPATH=str(stub / package_name))))
    lines.append(refused(run(folder, " ".join("1" * 49))))
    lines.append(refused(run(folder, "Once upon a time")))
    page = (folder / "README.md").read_text()
    table = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", page.split("What goes wrong")[1], re.M)
    assert lines == table
    page = (stories[2] / "package/README.md").read_text()
    assert refused(run(stories[2] / "package", "x " * 200)) in page and "compared" in page


ARGUMENTS = (
    ["Once", "--tokens", "0"], ["Once", "--tokens", "many"], ["Once", "--temperature", "-1"],
    ["Once", "--temperature", "nan"], ["Once", "--top-k", "0"], ["Once", "--top-p", "1"], [],
)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_wrong_arguments_are_one_line(arguments, stories):
    refused(run(stories[2] / "package", *arguments))


def remake(tar, change):
    """A tar whose members went through `change`: (TarInfo, content) → (TarInfo, content), or None to leave one out."""
    out = io.BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as new:
        for member in old.getmembers():
            changed = change(member, old.extractfile(member).read())
            if changed:
                info, content = changed
                info.size = len(content) if info.isreg() else 0
                new.addfile(info, io.BytesIO(content))
    return out.getvalue()


def with_model(**fields):
    def change(member, content):
        if member.name == "model.onnx":
            for field, value in fields.items():
                setattr(member, field, value)
        return member, content
    return change


def without_model(member, content):
    return None if member.name == "model.onnx" else (member, content)


def shorter(member, content):
    return member, content[:-1] if member.name == "model.onnx" else content


TARS = {
    "absolute": (with_model(name="/model.onnx"), "'/model.onnx' is no part of a package"),
    "above": (with_model(name="../model.onnx"), "'../model.onnx' is no part of a package"),
    "link": (with_model(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file"),
    "hard link": (with_model(type=tarfile.LNKTYPE, linkname="README.md"), "no plain file"),
    "device": (with_model(type=tarfile.CHRTYPE), "no plain file"),
    "sparse": (with_model(type=tarfile.GNUTYPE_SPARSE), "no plain file"),
    "twice": (with_model(name="manifest.json"), "there twice"),
    "missing": (without_model, "model.onnx is missing"),
    "shorter": (shorter, "bytes, not"),
    "dated": (with_model(mtime=1), "header of model.onnx was changed"),
    "executable": (with_model(mode=0o755), "header of model.onnx was changed"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_strange_tar_is_refused(name, stories, tmp_path):
    change, why = TARS[name]
    path = tmp_path / "package.tar"
    path.write_bytes(remake(stories[2] / "package.tar", change))
    for reader in (check_package, load_package):
        with pytest.raises(CheckpointError, match=re.escape(why)) as caught:
            reader(path)
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["package.tar"]


def test_each_damaged_tar_is_refused(stories, tmp_path):
    """A changed byte anywhere (headers, contents, the zeros between and behind them), bytes cut off or added."""
    content, path = (stories[2] / "package.tar").read_bytes(), tmp_path / "package.tar"
    assert remake(stories[2] / "package.tar", lambda *pair: pair) == content
    places = [*range(0, 600, 7), *range(600, len(content), len(content) // 200), len(content) - 1]
    damaged = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1:] for i in places]
    damaged += [content[:-1], content + b"\0", content + bytes(10240), content[: len(content) // 2], b"", bytes(10240)]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as caught:
            check_package(path)
        assert "\n" not in str(caught.value)


def test_a_strange_folder_is_refused(stories, tmp_path):
    folder = shutil.copytree(stories[2] / "package", tmp_path / "package")
    (folder / "numpy.py").write_text("")
    with pytest.raises(CheckpointError, match="'numpy.py', which is no part"):
        check_package(folder)
    (folder / "numpy.py").unlink()
    (folder / "model.onnx").rename(tmp_path / "model.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="no plain file"):
        load_package(folder)


def test_refusals_come_before_work(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "export_folder", lambda *_, **__: pytest.fail("work began"))
    model = stories[2] / "model"
    taken, foreign, file = tmp_path / "taken", tmp_path / "foreign", tmp_path / "file"
    shutil.copytree(stories[2] / "package", taken)
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    file.write_text("mine")
    (tmp_path / "half.tar").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out, settings, why in (
        (taken, {}, "exists and is not empty"),
        (tmp_path / "half", {}, "exists"),
        (foreign, {}, "letter.txt"),
        (foreign, {"overwrite": True}, "letter.txt"),
        (file, {"overwrite": True}, "is a file"),
        (model, {"overwrite": True}, "lie in each other"),
        (model / "package", {}, "lie in each other"),
        (model.parent, {"overwrite": True}, "lie in each other"),
        (tmp_path / "new.tar", {}, "name the folder"),
        (file / "new", {}, "cannot be written"),
        (tmp_path / "new", {"accuracy_level": 5}, "allowed are 0"),
        (tmp_path / "new", {"precision": "int9"}, "int9"),
    ):
        with pytest.raises(ConfigError, match=re.escape(why)) as caught:
            package_folder(model, out, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="not a model folder"):
        package_folder(taken, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before
    assert sorted(p.name for p in stories[2].iterdir()) == ["model", "package", "package.tar"]


def test_a_failure_leaves_what_was_there(stories, tmp_path, monkeypatch):
    for name in ("package", "package.tar"):
        source = stories[2] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "write_tar", fails)
    with pytest.raises(IteraLiteError, match="No space left on device"):
        package_folder(stories[2] / "model", tmp_path / "package", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["package", "package.tar"]
    assert check_package(tmp_path / "package") == check_package(tmp_path / "package.tar")
    monkeypatch.undo()
    packaged = package_folder(stories[2] / "model", tmp_path / "package", precision="int8", overwrite=True)
    assert packaged.manifest.facts.requantised == "int8" and "rounded again to int8" in str(packaged.exported)
    assert check_package(tmp_path / "package") == check_package(tmp_path / "package.tar") == packaged.manifest
