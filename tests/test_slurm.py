"""The job script on a real Slurm, where sbatch reaches a cluster that shares this file system; elsewhere it skips."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_jobs import BUSY, FINISH, PARAMETERS, write_notebook

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "slurm/run_notebook.sbatch"


def reachable():
    if not shutil.which("sbatch"):
        return False
    return (
        subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, timeout=30
        ).stdout.strip()
        != ""
    )


needs_slurm = pytest.mark.skipif(not reachable(), reason="no Slurm cluster answers sinfo: the job script was NOT run")


@pytest.fixture
def project(tmp_path):
    """A small project as a job sees it: the script, the environment, a toy notebook that waits as told."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = itera_lite\n")
    write_notebook(
        tmp_path, "03_training", "import time; time.sleep(wait)", FINISH.format(name="03_training"),
        parameters=PARAMETERS + "\nwait = 0",
    )
    (tmp_path / "slurm/params/03_training/smoke.yaml").write_text("wait: 0\n")
    (tmp_path / "slurm/params/03_training/laptop.yaml").write_text("wait: 600\n")
    (tmp_path / SCRIPT).symlink_to(ROOT / SCRIPT)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "papermill_runs").mkdir()
    return tmp_path


def submit(project, *arguments, options=()):
    """The job's id."""
    done = subprocess.run(
        ["sbatch", "--parsable", "--mem=2G", *options, SCRIPT, *arguments], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def field(job, name):
    """One field of what scontrol knows of the job, such as JobState or ExitCode."""
    shown = subprocess.run(
        ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=True
    ).stdout
    return dict(part.split("=", 1) for part in shown.split() if "=" in part)[name]


def wait_for(job, *states, seconds):
    end = time.monotonic() + seconds * BUSY
    while (state := field(job, "JobState")) not in states:
        assert time.monotonic() < end, f"job {job} is {state} after {seconds} s"
        time.sleep(0.2)
    return state


def log(project, job):
    return (project / f"papermill_runs/slurm-{job}.log").read_text()


def wait_until_it_waits(project, job, run, seconds):
    """Until the executed notebook states that its waiting cell runs."""
    end, path = time.monotonic() + seconds * BUSY, project / f"papermill_runs/{run}/03_training/report.ipynb"
    while not (path.exists() and any(
        "time.sleep" in "".join(cell["source"]) and cell["metadata"]["papermill"]["status"] == "running"
        for cell in executed(project, run)["cells"]
    )):
        assert time.monotonic() < end, f"job {job} does not wait after {seconds} s: {log(project, job)}"
        time.sleep(0.1)


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@needs_slurm
def test_job_runs_a_notebook_and_its_record_names_the_job(project):
    job = submit(project, "03_training")
    assert wait_for(job, *ENDED, seconds=60) == "COMPLETED", log(project, job)
    record = json.loads((project / f"papermill_runs/job-{job}/03_training/metrics.json").read_text())
    assert record["run"]["job_id"] == job
    assert record["run"]["preset"] == "smoke"
    assert "metadata" in executed(project, f"job-{job}")


@needs_slurm
@pytest.mark.parametrize(
    "arguments", [("no_such_notebook",), ("03_training", "no_such_preset")], ids=["notebook", "preset"]
)
def test_job_fails_with_one_line_and_the_runners_status(project, arguments):
    job = submit(project, *arguments)
    assert wait_for(job, *ENDED, seconds=60) == "FAILED"
    assert field(job, "ExitCode") == "1:0"
    (line,) = [line for line in log(project, job).splitlines() if line.startswith("itera-lite: ")]
    assert arguments[-1] in line and "Traceback" not in log(project, job)


@needs_slurm
@pytest.mark.parametrize("options", [("--batch", "--signal=TERM"), ()], ids=["time is running out", "cancelled"])
def test_stopped_job_leaves_a_notebook_that_says_so(project, options):
    """Slurm signals the batch step, which exec has made the runner; a plain scancel reaches every process of it."""
    job = submit(project, "03_training", "laptop", "named")
    wait_until_it_waits(project, job, "named", seconds=60)
    subprocess.run(["scancel", *options, job], check=True)
    assert wait_for(job, *ENDED, seconds=10) == ("FAILED" if options else "CANCELLED")
    deadline = time.monotonic() + 5 * BUSY
    while "This notebook failed" not in json.dumps(executed(project, "named")):
        assert time.monotonic() < deadline, "the executed notebook does not say that it was stopped"
        time.sleep(0.2)


@needs_slurm
def test_requeued_job_goes_on_in_the_same_run(project):
    """What Slurm does when a node fails: the same job id, hence the same run."""
    job = submit(project, "03_training", "laptop")
    wait_until_it_waits(project, job, f"job-{job}", seconds=60)
    (project / "slurm/params/03_training/laptop.yaml").write_text("wait: 0\n")
    subprocess.run(["scontrol", "requeue", job], check=True)
    assert wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=300) == "COMPLETED", log(project, job)
    assert "restart 1" in log(project, job)
    assert (
        json.loads((project / f"papermill_runs/job-{job}/03_training/metrics.json").read_text())["run"]["job_id"] == job
    )


def executed(project, run):
    """The executed notebook; unreadable JSON fails here."""
    return json.loads((project / f"papermill_runs/{run}/03_training/report.ipynb").read_text())


def test_script_outside_a_job_says_how_to_submit_it():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", SCRIPT, "03_training"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "submit this script with sbatch" in done.stderr


def test_script_without_an_environment_says_what_to_do(tmp_path):
    environment = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", ROOT / SCRIPT, "03_training"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "make setup" in done.stderr
