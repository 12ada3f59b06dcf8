"""The command line as a process: what it prints where, and the status it exits with."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_jobs import BUSY, SECONDS, WAIT, wait_until, write_notebook

ROOT = Path(__file__).resolve().parents[1]


def itera_lite(*words, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "itera_lite.app.cli", *map(str, words)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
    )


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
    assert {"doctor", "models", "run", "report", "generate", "compress", "validate", "bench"} <= set(commands)
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
    process = subprocess.Popen(
        [sys.executable, "-m", "itera_lite.app.cli", "run", "--notebooks", "03"], cwd=project, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # a shell may have started the tests with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until((project / "pids").exists, 60 * BUSY)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the foreground
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("itera-lite: 03_training failed")
    assert "This notebook failed" in (project / "papermill_runs/smoke/03_training/report.ipynb").read_text()
