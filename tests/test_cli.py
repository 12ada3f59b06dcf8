"""The command line as a process: what it prints where, and the status it exits with."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_jobs import BUSY, SECONDS, WAIT, wait_until, write_notebook

from itera_lite.app.cli import main
from itera_lite.base.core import seed_everything
from itera_lite.base.data import load_corpus
from itera_lite.base.machine import can_draw
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.checkpoints.folder import save_model
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model

ROOT = Path(__file__).resolve().parents[1]


def itera_lite(*words, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "itera_lite.app.cli", *map(str, words)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
    )


def command(words):
    """The words of a command as a shell takes them."""
    return shlex.join(["itera-lite", *map(str, words)])


def interrupt(words, cwd, ready):
    """Press Ctrl-C in a command once it is ready: its exit status, stderr, and the seconds until it ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "itera_lite.app.cli", *map(str, words)], cwd=cwd, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # a shell may have started the tests with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until(lambda: ready() or process.poll() is not None, 120 * BUSY)
        assert process.poll() is None, f"it ended before it was stopped: {process.communicate()}"
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the foreground
        _, stderr = process.communicate(timeout=60 * BUSY)
    finally:
        process.kill()
    return process.returncode, stderr, time.monotonic() - began


def in_process(monkeypatch, capsys, folder, *words):
    """Run a command in this process, in some folder: its exit status, stdout and stderr."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code, *capsys.readouterr()


def test_help_imports_nothing_heavy():
    code = """
import sys
from itera_lite.app.cli import main
try: main(["--help"])
except SystemExit as exit: assert exit.code == 0
heavy = {"torch", "numpy", "papermill", "plotly", "pydantic", "rich"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_each_command_has_help():
    listed = itera_lite("--help").stdout.split("Commands:")[1].splitlines()
    commands = [line.split()[0] for line in listed if line.startswith("  ") and line[2:3].strip()]
    assert {
        "doctor", "models", "train", "run", "report", "generate", "compress", "compare", "validate", "bench",
    } <= set(commands)
    code = f"""
from itera_lite.app.cli import main
for command in {commands!r}:
    try: main([command, "--help"])
    except SystemExit as exit: assert exit.code == 0, command
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


BAD = {
    "command": (["rum"], "No such command 'rum'"), "option": (["run", "--presset", "smoke"], "--presset"),
    "number": (["run", "--notebooks", "03", "-p", "max_tokens=many"], "max_tokens"),
    "preset": (
        ["run", "--preset", "smok"],
        "unknown preset 'smok': allowed smoke, laptop, gpu, cluster; did you mean 'smoke'?",
    ),
    "notebook": (["run", "--notebooks", "03,99"], "unknown notebook '99'"),
    "notebook's number": (["run", "--notebooks", "7"], "07_mixed_precision"),
    "notebook's word": (["run", "--notebooks", "mixed"], "07_mixed_precision"),
    "model": (["run", "--notebooks", "03", "--model", "tinny"], "unknown model 'tinny': allowed tiny"),
    "parameter": (["run", "--notebooks", "03", "-p", "sed=7"], "unknown parameter 'sed'"),
    "corpus": (["run", "--notebooks", "03", "-p", "corpus=tinystory"], "unknown corpus 'tinystory'"),
    "data folder": (["run", "--data-dir", "no/such/folder"], "no/such/folder"),
    "run name": (["run", "--name", "../elsewhere"], "--name '../elsewhere'"),
    "report": (["report", "no/such/run"], "no/such/run"),
    "model folder": (["generate", "no/such/model", "--prompt", "Once"], "no/such/model"),
}


TEXTS = {"empty.txt": (b"", "empty"), "latin.txt": ("Ein M\u00e4rchen. ".encode("latin-1"), "UTF-8")}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_read_costs_one_line(name, tmp_path):
    content, said = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    done = itera_lite("run", "--notebooks", "03", "-p", f"corpus={tmp_path / name}", "--run-dir", tmp_path / "run")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("itera-lite: ") and name in line and said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_bad_input_costs_one_line_and_nothing_else(words, said, tmp_path):
    run_dir = ["--run-dir", tmp_path / "run"] if words[0] == "run" and "--name" not in words else []
    done = itera_lite(*words, *run_dir)
    assert done.returncode in (1, 2) and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("itera-lite: ") and said in line
    assert not (tmp_path / "run").exists()


def test_debug_shows_where_an_error_comes_from():
    done = itera_lite("run", "--preset", "smok", "--debug")
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert "ConfigError: unknown preset 'smok'" in done.stderr


@pytest.fixture
def toy_project(tmp_path):
    """A project whose only notebook does as it is told by the test."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = itera_lite\n")

    def with_cell(cell):
        write_notebook(tmp_path, "03_training", cell)
        return tmp_path

    return with_cell


def test_error_inside_a_notebook_is_one_line_and_a_page(toy_project):
    project = toy_project(
        "from itera_lite.base.core import DataError\nraise DataError('vocab_size 512: this text supports 300')"
    )
    done = itera_lite("run", "--notebooks", "03", cwd=project)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("itera-lite: 03_training failed in cell 2 ")
    assert "vocab_size 512: this text supports 300" in line
    assert done.stdout.startswith("report: file://") and (project / "papermill_runs/smoke/site/index.html").is_file()


def test_ctrl_c_ends_a_run_within_five_seconds(toy_project):
    project = toy_project(WAIT + "time.sleep(300)")
    status, stderr, seconds = interrupt(["run", "--notebooks", "03"], project, (project / "pids").exists)
    assert status == 130 and "Traceback" not in stderr and seconds < SECONDS
    assert stderr.splitlines()[-1].startswith("itera-lite: 03_training failed")
    assert "This notebook failed" in (project / "papermill_runs/smoke/03_training/report.ipynb").read_text()


# Models of one's own


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an untrained model, an int8 copy of it, a model without a tokenizer, and a text."""
    folder, text = tmp_path_factory.mktemp("models"), load_corpus("stories", limit_documents=150)
    tokenizer = train_tokenizer(text.train, 320)
    seed_everything(0)
    model = build_model(named_config("micro", vocab_size=320, hidden_size=32, num_layers=2, max_seq_length=64)).eval()
    save_model(model, folder / "mine", tokenizer)
    save_model(model, folder / "mute")
    (folder / "text.txt").write_text("\n\n".join(text.train), encoding="utf-8")
    assert itera_lite("compress", "mine", "--out", "small", "--precision", "int8", cwd=folder).returncode == 0
    return folder


def contents(folder):
    """Every file below a folder, with its size and time."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_plan_says_what_it_takes_and_writes_nothing(place):
    before = contents(place)
    for words in ([], ["--out", "planned", "--method", "qat", "--tokens", "1024", "--text", "text.txt"]):
        done = itera_lite("compress", "mine", "--plan", *words, cwd=place)
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in ("bytes", "mine", "MB")), done.stdout
    assert contents(place) == before


SCORED = ["--text", "text.txt", "--documents", "4"]


def test_compare_prints_a_table_and_writes_a_page(place, tmp_path):
    page = tmp_path / "compared.html"
    done = itera_lite("compare", "mine", "small", *SCORED, "--out", page, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "small" in done.stdout and str(page) in done.stdout
    text = page.read_text()
    assert "<table>" in text and "small" in text and "Plotly.newPlot" in text and 'src="http' not in text


def test_compare_draws_a_picture_and_prints_json(place, tmp_path):
    if not can_draw().ok:
        pytest.skip(can_draw().detail)
    picture = tmp_path / "compared.png"
    done = itera_lite("compare", "mine", "small", *SCORED, "--json", "--out", picture, cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["rows"]] == ["mine", "small"]
    assert picture.read_bytes().startswith(b"\x89PNG")


WRONG = {
    "precision as a map": (["compress", "mine", "--out", "new", "--map", "int8"], "--precision int8"),
    "model is there": (["compress", "mine", "--out", "small"], "--overwrite"),
    "the model itself": (["compress", "mine", "--out", "mine", "--overwrite"], "the model itself"),
    "no place to write": (["compress", "mine", "--out", "text.txt/new"], "cannot be written"),
    "nowhere to write": (["compress", "mine"], "--plan"),
    "misspelt model": (["compress", "smal", "--out", "new"], "did you mean 'small'?"),
    "no model": (["generate", "text.txt", "--prompt", "One"], "is a file, no model folder"),
    "one baseline": (["validate", "mine", "--baseline", "mime"], "did you mean 'mine'?"),
    "no tokenizer": (["compare", "mine", "mute", *SCORED], "no tokenizer.json"),
    "no such text": (["compare", "mine", "small", "--text", "storys"], "did you mean 'stories'?"),
    "other picture": (["compare", "mine", "small", "--out", "x.pdf"], ".html"),
    "no place for it": (["compare", "mine", "small", "--out", "text.txt/x.html"], "cannot be written"),
    "import over a model": (["convert", "mine", "small"], "--overwrite"),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG)
def test_folders_are_looked_at_before_the_work(place, words, said, monkeypatch, capsys):
    before = contents(place)
    status, stdout, stderr = in_process(monkeypatch, capsys, place, *words)
    assert status in (1, 2) and stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith("itera-lite: ") and said in line, line
    assert contents(place) == before


def test_overwrite_replaces_a_model(place):
    words = ["compress", "mine", "--out", "again", "--precision"]
    assert itera_lite(*words, "int8", cwd=place).returncode == 0
    before = (place / "again" / "config.json").read_text()
    assert itera_lite(*words, "nf4", "--overwrite", cwd=place).returncode == 0
    assert (place / "again" / "config.json").read_text() != before


def test_interrupted_compression_is_kept_and_the_same_command_goes_on(place, tmp_path):
    words = ["compress", "mine", "--out", tmp_path / "q", "--method", "qat", "--text", "text.txt"]
    words += ["--calibration-tokens", 512, "--tokens", 60_000]
    cache = place / "papermill_runs" / ".cache" / "compress"
    status, stderr, _ = interrupt(words, place, lambda: any(len(p.read_text().splitlines()) > 2 for p in
                                                            cache.rglob("metrics.csv")))
    line = stderr.splitlines()[-1]
    assert status == 130 and "Traceback" not in stderr and line.endswith(f"goes on: {command(words)}"), stderr
    (kept,) = {path.parent for path in cache.rglob("checkpoint-*")}
    assert str(kept.parent) in line or str(kept) in line
    assert not (tmp_path / "q").exists()
    done = itera_lite(*words, cwd=place)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "q" / "config.json").exists() and not list(cache.rglob("checkpoint-*"))
