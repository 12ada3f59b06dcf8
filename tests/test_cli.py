"""The command line as a process: what it prints where, and the status it exits with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def itera_lite(*words, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "itera_lite.cli", *map(str, words)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
    )


def test_help_imports_nothing_heavy():
    code = """
import sys
from itera_lite.cli import main
try: main(["--help"])
except SystemExit as exit: assert exit.code == 0
heavy = {"torch", "numpy", "papermill", "plotly", "pydantic", "rich"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_each_command_has_help():
    listed = itera_lite("--help").stdout.split("Commands:")[1].splitlines()
    commands = [line.split()[0] for line in listed if line.strip() and line.startswith("  ") and not line.startswith("   ")]
    assert {"doctor", "models", "run", "report", "generate", "compress", "validate", "bench"} <= set(commands)
    code = f"""
from itera_lite.cli import main
for command in {commands!r}:
    try: main([command, "--help"])
    except SystemExit as exit: assert exit.code == 0, command
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


BAD = {
    "command": (["rum"], "No such command 'rum'"),
    "option": (["run", "--presset", "smoke"], "--presset"),
    "number": (["run", "--notebooks", "03", "-p", "max_tokens=many"], "max_tokens"),
    "preset": (["run", "--preset", "smok"], "unknown preset 'smok': allowed smoke, laptop, gpu, cluster; did you mean 'smoke'?"),
    "notebook": (["run", "--notebooks", "03,99"], "unknown notebook '99'"),
    "model": (["run", "--notebooks", "03", "--model", "tinny"], "unknown model 'tinny': allowed tiny"),
    "parameter": (["run", "--notebooks", "03", "-p", "sed=7"], "unknown parameter 'sed'"),
    "corpus": (["run", "--notebooks", "03", "-p", "corpus=tinystory"], "unknown corpus 'tinystory'"),
    "data folder": (["run", "--data-dir", "no/such/folder"], "no/such/folder"),
    "run name": (["run", "--name", "../elsewhere"], "--name '../elsewhere'"),
    "report": (["report", "no/such/run"], "no/such/run"),
    "model folder": (["generate", "no/such/model", "--prompt", "Once"], "no/such/model"),
}


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
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "ConfigError: unknown preset 'smok'" in done.stderr


def test_what_only_a_notebook_can_find_is_one_line_too(tmp_path):
    """A text that is not UTF-8 is met inside the running notebook: its last line comes back, the rest stays on its page."""
    (tmp_path / "latin.txt").write_bytes("Ein M\u00e4rchen. ".encode("latin-1") * 100)
    done = itera_lite("run", "--notebooks", "03", "-p", f"corpus={tmp_path / 'latin.txt'}", "--run-dir", tmp_path / "run")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("itera-lite: 03_training failed in cell ") and "latin.txt" in line and "UTF-8" in line
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("report: file://") and (tmp_path / "run/site/index.html").is_file()


def test_ctrl_c_ends_a_run_within_five_seconds(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "itera_lite.cli", "run", "--notebooks", "03", "--run-dir", str(tmp_path / "run")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    notebook = tmp_path / "run/03_training/report.ipynb"
    end = time.monotonic() + 120
    while not (notebook.exists() and '"status": "running"' in notebook.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the runner and its kernel alike
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("itera-lite: 03_training")
    assert "This notebook failed" in json.dumps(json.loads(notebook.read_text()))
