"""Running notebooks, where only a process of its own can show it: kernels killed, runners stopped, a call repeated."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from itera_lite.base.core import PRESETS, IteraLiteError, RunError
from itera_lite.base.record import Record
from itera_lite.jobs import engine, line
from itera_lite.jobs import notebooks as jobs
from itera_lite.reports.entries import notebook_status

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# processes that wait for each core: the limit is for a machine that is not overloaded
BUSY = max(1, os.getloadavg()[0] / os.cpu_count())
SECONDS = 5 * BUSY  # from what ended a notebook to a file that says so

PARAMETERS = "preset = 'smoke'\nseed = 0\nmodel_dir = ''\nout_dir = ''"
NAMES = (  # parameters that other modules give a meaning; checking them takes an import of torch
    "\nmodel = 'micro'\ncorpus = 'stories'"
)
FINISH = """from itera_lite.base.record import start_run
run = start_run({name!r}, preset, seed, out_dir)
record = run.finish("it ended")"""
# A cell that shows its process and that of a child, and then lasts longer than any test.
WAIT = """import os, pathlib, subprocess, sys, time
for text in ("0/1\\r", "1/1\\r", "waiting\\n"): print(text, end="", flush=True)
time.sleep(0.5)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path("pids.part").write_text(f"{os.getpid()} {child.pid}"); os.replace("pids.part", "pids")
"""


def write_notebook(project, name, *cells, parameters=PARAMETERS, tags=("parameters",)):
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    )
    nb.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)}), *map(nbformat.v4.new_code_cell, cells),
    ]
    path = project / "nbs" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)
    presets = project / "slurm" / "params" / name
    presets.mkdir(parents=True, exist_ok=True)
    for preset in ("smoke", "laptop"):
        (presets / f"{preset}.yaml").write_text("seed: 7\n")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project in a folder of its own: a toy 03_training that ends well."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = itera_lite\n")
    write_notebook(tmp_path, "03_training", FINISH.format(name="03_training"), parameters=PARAMETERS + NAMES)
    monkeypatch.setenv("ITERA_LITE_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Runner:
    """`python -m itera_lite.jobs.notebooks …` as a process of its own."""

    def __init__(self, project, *words):
        def obey():  # a shell may have started the tests with SIGINT ignored, nohup with SIGHUP
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

        self.project = project
        self.log = open(project / "runner.log", "w+")
        command = [sys.executable, "-m", "itera_lite.jobs.notebooks", *words]
        self.process = subprocess.Popen(
            command, cwd=project, stdout=self.log, stderr=self.log, start_new_session=True, preexec_fn=obey
        )

    def pids(self):
        """The kernel's process and its child's, once the waiting cell runs."""
        path = self.project / "pids"
        wait_until(path.exists, 60 * BUSY, self.text)
        return [int(pid) for pid in path.read_text().split()]

    def end(self, number=None):
        """Send a signal; the exit status and how long it took."""
        start = time.monotonic()
        if number is not None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=60 * BUSY)
        return status, time.monotonic() - start

    def text(self):
        self.log.flush()
        return (self.project / "runner.log").read_text()

    def last_line(self):
        return self.text().strip().splitlines()[-1]


def wait_until(true, seconds, explain=lambda: ""):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s; {explain()}"
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def report(project, notebook="03_training", run="smoke"):
    """The executed notebook: checked as JSON and against the format."""
    text = (project / "papermill_runs" / run / notebook / "report.ipynb").read_text()
    nbformat.validate(json.loads(text))
    return nbformat.reads(text, 4)


def statuses(nb):
    return [
        c.metadata.papermill.status for c in nb.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])
    ]


def banner(nb):
    """What the failed notebook says at its top."""
    assert "papermill-error-cell-tag" in nb.cells[0].metadata.tags
    return nb.cells[0].source


# A notebook's end


def test_killed_kernel_is_told_as_such(project):
    write_notebook(project, "03_training", "print('before')", WAIT + "time.sleep(300)", "print('never')")
    runner = Runner(project, "03", "smoke")
    kernel, child = runner.pids()
    os.kill(kernel, signal.SIGKILL)
    status, seconds = runner.end()
    assert status == 1 and seconds < SECONDS
    nb = report(project)
    assert nb.metadata.papermill.exception is True
    assert statuses(nb) == ["completed", "completed", "completed", "failed", "pending"]
    assert "killed by SIGKILL" in banner(nb) and "in cell 3" in banner(nb)
    assert runner.last_line().startswith(
        "error: 03_training failed in cell 3 (`import os, pathlib, subprocess, sys, time`): the kernel"
    )
    assert not alive(child)
    printed = [output.text for cell in nb.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    assert printed == ["before\n", "waiting\n"]  # of a line that is written over, the last


@pytest.mark.parametrize(
    ("number", "stubborn"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGHUP, False), (signal.SIGTERM, True)],
)
def test_stopped_runner_is_told_as_such(project, number, stubborn):
    """A cell that answers the interrupt shows where it was; one that ignores it is killed."""
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if stubborn else ""
    write_notebook(project, "03_training", ignore + WAIT + "while True: time.sleep(1)", "print('never')")
    runner = Runner(project, "03", "smoke")
    pids = runner.pids()
    status, seconds = runner.end(number)
    assert status == 128 + number and seconds < SECONDS
    nb = report(project)
    assert nb.metadata.papermill.exception is True
    assert statuses(nb) == ["completed", "completed", "failed", "pending"]
    assert f"stopped by {number.name}" in banner(nb)
    assert f"stopped by {number.name}" in runner.last_line() and "Traceback" not in runner.text()
    errors = [output.ename for cell in nb.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert errors == ["NotebookFailed" if stubborn else "KeyboardInterrupt"]
    assert not any(map(alive, pids))


def test_runner_stopped_while_the_kernel_starts(project):
    runner = Runner(project, "03", "smoke")
    wait_until((project / "papermill_runs/smoke/03_training/report.ipynb").exists, 60 * BUSY, runner.text)
    status, seconds = runner.end(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and seconds < SECONDS
    nb = report(project)
    assert nb.metadata.papermill.exception is True and "stopped by SIGTERM" in banner(nb)
    assert "completed" not in statuses(nb)[2:]


def test_killed_runner_leaves_a_whole_file_and_no_kernel(project):
    """Nothing can be written then; but nothing is half written, and nothing counts as finished."""
    write_notebook(project, "03_training", "print('x' * 1_000_000)", WAIT + "time.sleep(300)")
    runner = Runner(project, "03", "smoke")
    kernel, child = runner.pids()
    runner.end(signal.SIGKILL)
    nb = report(project)
    assert statuses(nb)[-1] == "running" and nb.metadata.papermill.end_time is None
    assert not jobs.ended_well(project / "papermill_runs/smoke/03_training/report.ipynb")
    wait_until(lambda: not alive(kernel), 10 * BUSY)
    os.kill(child, signal.SIGKILL)  # nobody else would


def test_memory_that_runs_out_is_told_as_such(project):
    """What the system refuses is a MemoryError of the cell; what its out-of-memory killer takes is a killed kernel."""
    limit = """import resource, psutil
limit = psutil.Process().memory_info().vms + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))"""
    write_notebook(project, "03_training", limit, "block = bytearray(2**30)", "print('never')")
    with pytest.raises(jobs.NotebookFailed, match=r"failed in cell 3 \(`block = bytearray\(2\*\*30\)`\): MemoryError"):
        jobs.run_notebook("03", "papermill_runs/smoke/03_training", progress=False, pictures=False)
    assert statuses(report(project)) == ["completed", "completed", "completed", "failed", "pending"]


def test_full_disk_leaves_the_last_whole_notebook(project, monkeypatch):
    write_notebook(project, "03_training", "print('one')", "print('two')")
    write, written = engine.write_atomic, []

    def fills_up(path, content):
        written.append(path)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(engine, "write_atomic", fills_up)
    monkeypatch.setattr(jobs, "write_atomic", fills_up)
    with pytest.raises(RunError, match="cannot be written .No space left on device."):
        jobs.run_notebook("03", "papermill_runs/smoke/03_training", progress=False, pictures=False)
    assert "completed" in statuses(report(project)) and not jobs.ended_well(
        project / "papermill_runs/smoke/03_training/report.ipynb"
    )


def test_two_runners_do_not_share_a_folder(project):
    write_notebook(project, "03_training", WAIT + "time.sleep(300)")
    runner = Runner(project, "03", "smoke")
    runner.pids()
    with pytest.raises(RunError, match="another process is running in papermill_runs/smoke/03_training"):
        jobs.run_notebook("03", "papermill_runs/smoke/03_training")
    assert runner.end(signal.SIGTERM)[0] == 128 + signal.SIGTERM


def test_notebook_without_a_record_is_an_error(project):
    write_notebook(project, "03_training", "print('no record')")
    with pytest.raises(RunError, match="no record at papermill_runs/smoke/03_training/metrics.json"):
        jobs.run_notebook("03", "papermill_runs/smoke/03_training", progress=False, pictures=False)


# What a person sees meanwhile

REPORTS = """from IPython.display import display
def show(text, **how): return display({"text/plain": text}, raw=True, metadata={"itera_lite": "progress"}, **how)
for step in range(1, 4): show(f"training {step}/3 · 1.92 bits per byte", display_id="bar", update=step > 1)
import subprocess, sys
_ = subprocess.run([sys.executable, "-c", "import sys; print('rows: 50%|##  | 2/4 [00:01<00:01]', file=sys.stderr)"])
"""


def reporting(project):
    """A toy 03_training whose work stands under a heading and reports its progress."""
    write_notebook(
        project, "03_training", REPORTS, FINISH.format(name="03_training"),
        parameters=(PARAMETERS + NAMES).replace("model_dir = ''\n", ""),
    )
    nb = nbformat.read(project / "nbs/03_training.ipynb", 4)
    nb.cells[:1] = [nbformat.v4.new_markdown_cell("# Training\n\n> a question"), nb.cells[0]]
    nb.cells[2:2] = [nbformat.v4.new_markdown_cell("## The [run](x.ipynb)")]
    nbformat.write(nb, project / "nbs/03_training.ipynb")


def test_log_gets_two_lines_for_a_short_notebook(project, capsys):
    reporting(project)
    assert jobs.main(["03", "smoke"]) == 0
    first, last, end = capsys.readouterr().err.splitlines()
    assert first == "[1/1] 03_training · starts" and end == "finished: papermill_runs/smoke"
    assert re.fullmatch(r"\[1/1\] 03_training · it ended · \d+ s", last)


def test_line_shows_what_the_running_cell_reports(project, capsys, monkeypatch):
    monkeypatch.setattr(line, "LOG_SECONDS", 0)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # with it, a kernel leaves alone what its child processes print
    reporting(project)
    assert jobs.main(["03", "smoke"]) == 0
    said = [text.removeprefix("[1/1] 03_training · ") for text in capsys.readouterr().err.splitlines()]
    assert said[:7] == [
        "starts", "cell 2 of 5 · Training", "cell 4 of 5 · The run",
        *(f"training {step}/3 · 1.92 bits per byte" for step in (1, 2, 3)), "rows: 2/4 [00:01<00:01]",
    ]
    displays = [out for cell in report(project).cells for out in cell.get("outputs", []) if "data" in out]
    assert displays == []  # a finished bar says nothing


def test_terminal_gets_one_line_that_is_written_over(project):
    reporting(project)
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    process = subprocess.Popen(
        [sys.executable, "-m", "itera_lite.jobs.notebooks", "03", "smoke"], cwd=project, stderr=theirs, stdout=theirs,
        env=environment,
    )
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # Linux reports the end of a terminal so
        pass
    assert process.wait(timeout=60 * BUSY) == 0
    lines = written.decode().split("\r\n")
    assert [bool(text) for text in lines] == [True, True, False] and lines[1] == "finished: papermill_runs/smoke"
    shown = [text.removesuffix("\x1b[K") for text in lines[0].split("\r") if text]
    assert shown[0] == "[1/1] 03_training · starts" and "it ended" in shown[-1]
    assert "[1/1] 03_training · training 3/3 · 1.92 bits per byte" in shown and max(map(len, shown)) < 80


def test_output_of_notebooks_is_shown_on_request(project, capsys):
    reporting(project)
    assert jobs.main(["03", "smoke", "--log-output"]) == 0
    said = capsys.readouterr().err
    assert "03_training in effect: preset='smoke', seed=7" in said and "[1/1] 03_training · it ended" in said


def test_failed_notebook_keeps_the_last_report_of_progress(project, capsys):
    write_notebook(project, "03_training", REPORTS + "1/0", parameters=PARAMETERS + NAMES)
    assert jobs.main(["03", "smoke"]) == 1
    assert "[1/1] 03_training · failed in cell 2\nerror: 03_training failed in cell 2 (" in capsys.readouterr().err
    displays = [out for cell in report(project).cells for out in cell.get("outputs", []) if "data" in out]
    assert [out.data["text/plain"] for out in displays] == ["training 3/3 · 1.92 bits per byte"]


def test_executed_notebook_opens_with_its_abstract(project):
    """Below the title; it is no cell of the source notebook, and goes when its copy is executed again."""
    reporting(project)
    folder = project / "papermill_runs/smoke/03_training"
    record = jobs.run_notebook("03", folder, progress=False, pictures=False)
    nb = report(project)
    assert [jobs.ABSTRACT_TAG in cell.metadata.get("tags", []) for cell in nb.cells].index(True) == 1
    assert nb.cells[1].source == record.abstract() and "**it ended**" in record.abstract()
    assert jobs.ended_well(folder / "report.ipynb") and notebook_status(nb).state == "ok"
    assert len(statuses(nb)) == 6  # the five of the notebook, and the injected one
    nb.cells[-1].outputs.append(nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[]))
    assert notebook_status(nb).cell == 5
    again = subprocess.run(
        [BIN / "papermill", folder / "report.ipynb", project / "again.ipynb", "--no-progress-bar"], capture_output=True
    )
    assert again.returncode == 0 and len(nbformat.read(project / "again.ipynb", 4).cells) == len(nb.cells) - 1


# Plain papermill


def plain_papermill(notebook, *words, cwd):
    """Run a notebook as papermill's own command does; the process, and the executed notebook's printed text."""
    environment = {name: value for name, value in os.environ.items() if name != "ITERA_LITE_ROOT"}
    done = subprocess.run(
        [BIN / "papermill", notebook, cwd / "out.ipynb", "--no-progress-bar", *words], cwd=cwd, env=environment,
        capture_output=True, text=True,
    )
    outputs = [out for cell in nbformat.read(cwd / "out.ipynb", 4).cells for out in cell.get("outputs", [])]
    return done, "".join(out.text for out in outputs if out.output_type == "stream")


BAD_P = {
    "misspelt": (["-p", "sead", "7"], "unknown parameter of 03_training (from papermill) 'sead': "),
    "list as text": (["-p", "seeds", "[0, 1]"], "takes it for text: write -y 'seeds: [0, 1]'"),
    "kind": (["-p", "seed", "many"], "seed of 03_training (from papermill) is 'many': must be a whole number"),
}


@pytest.mark.parametrize(("words", "said"), BAD_P.values(), ids=BAD_P)
def test_plain_papermill_refuses_a_bad_parameter(project, words, said):
    write_notebook(project, "03_training", FINISH.format(name="03_training"), parameters=PARAMETERS + "\nseeds = [0]")
    done, printed = plain_papermill(project / "nbs/03_training.ipynb", *words, cwd=project)
    assert done.returncode == 1 and said in done.stderr.strip().splitlines()[-1] and "in effect" not in printed
    assert not (project / "papermill_runs").exists()


def test_plain_papermill_takes_what_fits(project):
    write_notebook(
        project, "03_training", "assert seeds == [0, 1] and seed == 7", FINISH.format(name="03_training"),
        parameters=PARAMETERS + "\nseeds = [0]",
    )
    done, printed = plain_papermill(
        project / "nbs/03_training.ipynb", "-y", "seeds: [0, 1]", "-p", "seed", "7", cwd=project
    )
    assert done.returncode == 0 and "03_training in effect: preset='smoke', seed=7" in printed


def test_plain_papermill_refuses_a_notebook_that_lost_its_tag(project):
    write_notebook(project, "03_training", FINISH.format(name="03_training"), tags=())
    done, _ = plain_papermill(project / "nbs/03_training.ipynb", "-p", "seed", "7", cwd=project)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("RunError: papermill found no cell tagged 'parameters'")


def test_real_notebook_refuses_a_misspelt_parameter_from_any_folder(tmp_path):
    done, printed = plain_papermill(ROOT / "nbs/03_training.ipynb", "-p", "max_token", "8192", cwd=tmp_path)
    assert done.returncode == 1 and printed == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.endswith("more (nbs/03_training.ipynb has them all); did you mean 'max_tokens'?")


def test_notebook_finds_the_project_from_any_folder(tmp_path):
    write_notebook(
        tmp_path, "03_training", FINISH.format(name="03_training"),
        "from itera_lite.base.core import cache_dir; print('cache', cache_dir())",
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done, printed = plain_papermill(
        tmp_path / "nbs/03_training.ipynb", "-p", "out_dir", str(tmp_path / "run"), cwd=elsewhere
    )
    assert done.returncode == 0, done.stderr
    assert f"{elsewhere} is not in the project: paths and results are relative to {ROOT}" in printed
    assert f"cache {ROOT}/papermill_runs/.cache" in printed and Record.read(tmp_path / "run").notebook == "03_training"
    assert sorted(path.name for path in elsewhere.iterdir()) == ["out.ipynb"]


# The project's own notebooks and presets


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("notebook", jobs.PIPELINE)
def test_presets_fit_their_notebooks(monkeypatch, notebook, preset):
    monkeypatch.setenv("ITERA_LITE_ROOT", str(ROOT))
    values, source = jobs.preset_parameters(notebook, preset)
    defaults = jobs.notebook_parameters(jobs.notebook_path(notebook))
    jobs.check_parameters(notebook, defaults, values, source)
    jobs.check_contents(jobs.Step(notebook, Path(), values, {**defaults, **values}))


def test_presets_belong_to_notebooks():
    for path in (ROOT / "slurm/params").glob("*/*"):
        assert (ROOT / "nbs" / f"{path.parent.name}.ipynb").exists() and path.name in [
            f"{preset}.yaml" for preset in PRESETS
        ], path


def cleaned(folder, keep_tags):
    """A copy of 03_training after the real nbdev_clean."""
    settings = (ROOT / "settings.ini").read_text()
    assert "allowed_cell_metadata_keys = tags\n" in settings
    (folder / "settings.ini").write_text(
        settings if keep_tags else settings.replace("allowed_cell_metadata_keys = tags\n", "")
    )
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "nbs/03_training.ipynb", folder / "nbs")
    subprocess.run(
        [BIN / "nbdev_clean", "--fname", "nbs/03_training.ipynb"], cwd=folder, check=True, capture_output=True
    )
    return folder / "nbs/03_training.ipynb"


def test_seed_arrives_through_a_cleaned_notebook(tmp_path):
    """Cleaned as a commit does it, run as a Slurm user does it: the record states the seed that was given."""
    notebook = cleaned(tmp_path, keep_tags=True)
    small = {
        "seed": 7, "out_dir": tmp_path / "out", "max_tokens": 8192, "eval_every_tokens": 4096, "eval_tokens": 2048,
        "limit_documents": 200,
    }
    words = [word for name, value in small.items() for word in ("-p", name, str(value))]
    run = subprocess.run(
        [BIN / "papermill", notebook, tmp_path / "out.ipynb", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (
        record["run"]["seed"] == 7
        and record["run"]["parameters"]["max_tokens"] == 8192
        and record["results"][0]["seeds"] == [7]
    )


def test_cleaning_without_the_setting_is_noticed(tmp_path):
    """What happens where settings.ini lacks its line about tags: papermill would warn and run the defaults."""
    with pytest.raises(RunError, match="has 0 cells tagged 'parameters' and needs one; nbdev_clean strips tags"):
        jobs.notebook_parameters(cleaned(tmp_path, keep_tags=False))


# A run that goes on


def test_stopped_pipeline_goes_on_where_it_was(project):
    wait_once = "import os\nif not os.path.exists('pids'):\n    " + WAIT.replace("\n", "\n    ") + "time.sleep(300)"
    write_notebook(project, "07_mixed_precision", wait_once, FINISH.format(name="07_mixed_precision"))
    runner = Runner(project, "03,07", "smoke")
    runner.pids()
    runner.end(signal.SIGTERM)
    assert "the same command goes on from here" in runner.last_line()
    first = (project / "papermill_runs/smoke/03_training/report.ipynb").read_bytes()
    again = Runner(project, "03,07", "smoke")
    assert again.end()[0] == 0, again.text()
    assert "[1/2] 03_training · kept" in again.text()
    assert (project / "papermill_runs/smoke/03_training/report.ipynb").read_bytes() == first
    assert Record.read(project / "papermill_runs/smoke/07_mixed_precision").run.parameters["seed"] == 7
    settings = (project / "papermill_runs/smoke/07_mixed_precision/params.yaml").read_text()
    assert "model_dir: papermill_runs/smoke/03_training/model" in settings
    assert set(statuses(report(project, "07_mixed_precision"))) == {"completed"}


# What is refused before anything starts


def missing_preset(project):
    (project / "slurm/params/03_training/smoke.yaml").unlink()


def misspelt_preset_file(project):
    (project / "slurm/params/03_training/smoke.yaml").write_text("sed: 7\n")


def broken_preset_file(project):
    (project / "slurm/params/03_training/smoke.yaml").write_text("seed: [7\n")


def list_preset_file(project):
    (project / "slurm/params/03_training/smoke.yaml").write_text("- seed\n")


def no_tag(project):
    write_notebook(project, "03_training", "pass", tags=())


def two_tags(project):
    nb = nbformat.read(project / "nbs/03_training.ipynb", 4)
    nb.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nb, project / "nbs/03_training.ipynb")


def no_notebooks(project):
    shutil.rmtree(project / "nbs")


def library_notebook(project):
    (project / "nbs/base").mkdir()
    shutil.copy(project / "nbs/03_training.ipynb", project / "nbs/base/01_core.ipynb")


def index_notebook(project):
    shutil.copy(project / "nbs/03_training.ipynb", project / "nbs/index.ipynb")


BAD = {
    "preset": (
        ["03", "smok"], None, "unknown preset 'smok': allowed smoke, laptop, gpu, cluster; did you mean 'smoke'?",
    ),
    "notebook": (["99", "smoke"], None, "unknown notebook '99': allowed 03_training"),
    "number without its zero": (["3", "smoke"], None, "did you mean '03_training'?"),
    "part of a name": (["train", "smoke"], None, "did you mean '03_training'?"),
    "library notebook": (["01", "smoke"], library_notebook, "unknown notebook '01': allowed 03_training"),
    "index": (["index", "smoke"], index_notebook, "unknown notebook 'index': allowed 03_training"),
    "path": (["nbs/gone.ipynb", "smoke"], None, "no notebook at nbs/gone.ipynb"),
    "parameter": (["03", "smoke", "-p", "sead", "1"], None, "unknown parameter 'sead'"),
    "kind": (
        ["03", "smoke", "-p", "seed", "many"], None,
        "parameter seed of 03_training (from the command line) is 'many': must be a",
    ),
    "model": (["03", "smoke", "--model", "tinny"], None, "unknown model 'tinny': allowed tiny,"),
    "corpus": (
        ["03", "smoke", "-p", "corpus", "tinystory"], None, "unknown corpus 'tinystory': allowed stories, tinystories,",
    ),
    "data": (["03", "smoke", "--data-dir", "nowhere"], None, "data_dir 'nowhere': no such folder"),
    "no preset file": (
        ["03", "smoke"], missing_preset, "03_training has no preset 'smoke': slurm/params/03_training/smoke.yaml",
    ),
    "preset file's name": (
        ["03", "smoke"], misspelt_preset_file,
        "unknown parameter of 03_training (from slurm/params/03_training/smoke.y",
    ),
    "preset file's YAML": (["03", "smoke"], broken_preset_file, "slurm/params/03_training/smoke.yaml is not YAML"),
    "preset file's shape": (["03", "smoke"], list_preset_file, "must hold NAME: VALUE lines"),
    "no tag": (["03", "smoke"], no_tag, "has 0 cells tagged 'parameters' and needs one"),
    "two tags": (["03", "smoke"], two_tags, "has 2 cells tagged 'parameters' and needs one"),
    "no notebooks": (["03", "smoke"], no_notebooks, "run inside the project's source tree"),
}


@pytest.mark.parametrize(("words", "spoil", "line"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_before_anything_starts(project, capsys, words, spoil, line):
    if spoil:
        spoil(project)
    assert jobs.main(words) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and line in said and "\n" not in said
    assert not (project / "papermill_runs").exists()


def test_changed_parameter_does_not_overwrite_a_result(project, capsys):
    assert jobs.main(["03", "smoke"]) == 0
    before = (project / "papermill_runs/smoke/03_training/metrics.json").read_bytes()
    capsys.readouterr()
    assert jobs.main(["03", "smoke", "-p", "seed", "8"]) == 1
    assert (
        "03_training is finished in papermill_runs/smoke/03_training with seed=7 and now 8" in capsys.readouterr().err
    )
    assert (project / "papermill_runs/smoke/03_training/metrics.json").read_bytes() == before


def test_parameter_that_a_notebook_overwrites_is_found(project):
    write_notebook(project, "03_training", "seed = 0", FINISH.format(name="03_training"))
    with pytest.raises(IteraLiteError, match="seed=7 became 0"):
        jobs.run_notebook("03", "papermill_runs/smoke/03_training", {"seed": 7}, progress=False, pictures=False)


def test_folder_that_cannot_be_written_is_found_before_the_work(project, capsys):
    (project / "taken").write_text("a file")
    assert jobs.main(["03", "smoke", "--run-dir", "taken/run"]) == 1
    assert capsys.readouterr().err == (
        "error: taken/run cannot be written (Not a directory): name another folder\n"
    )
