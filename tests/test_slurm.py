"""The job script on a real Slurm.  Runs where sbatch reaches a cluster that shares this file system; elsewhere it says so and skips."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "slurm/run_notebook.sbatch"


def reachable():
    if not shutil.which("sbatch"):
        return False
    return subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, timeout=30).stdout.strip() != ""


needs_slurm = pytest.mark.skipif(not reachable(), reason="no Slurm cluster answers sinfo: the job script was NOT run")


@pytest.fixture
def project(tmp_path):
    """The project's folder as a job sees it, with a papermill_runs of its own."""
    for name in ("nbs", "itera_lite", "slurm", "settings.ini", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
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
    shown = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=True).stdout
    return dict(part.split("=", 1) for part in shown.split() if "=" in part)[name]


def wait_for(job, *states, seconds):
    end = time.monotonic() + seconds
    while (state := field(job, "JobState")) not in states:
        assert time.monotonic() < end, f"job {job} is {state} after {seconds} s"
        time.sleep(0.2)
    return state


def log(project, job):
    return (project / f"papermill_runs/slurm-{job}.log").read_text()


def wait_for_log(project, job, text, seconds):
    end = time.monotonic() + seconds
    while not ((path := project / f"papermill_runs/slurm-{job}.log").exists() and text in path.read_text()):
        assert time.monotonic() < end, f"the log of job {job} has no {text!r} after {seconds} s"
        time.sleep(0.1)


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@needs_slurm
def test_job_runs_a_notebook_and_its_record_names_the_job(project):
    job = submit(project, "03_training", "smoke")
    assert wait_for(job, *ENDED, seconds=240) == "COMPLETED", log(project, job)
    record = json.loads((project / f"papermill_runs/job-{job}/03_training/metrics.json").read_text())
    assert record["run"]["job_id"] == job
    assert record["run"]["preset"] == "smoke"
    assert all(not cell.get("outputs") or cell["outputs"][0]["output_type"] != "error" for cell in executed(project, job)["cells"])


@needs_slurm
@pytest.mark.parametrize("arguments", [("no_such_notebook",), ("03_training", "no_such_preset")], ids=["notebook", "preset"])
def test_job_fails_with_one_line_and_the_runners_status(project, arguments):
    job = submit(project, *arguments)
    assert wait_for(job, *ENDED, seconds=60) == "FAILED"
    assert field(job, "ExitCode") == "1:0"
    (line,) = [line for line in log(project, job).splitlines() if line.startswith("itera-lite: ")]
    assert arguments[-1] in line and "Traceback" not in log(project, job)


@needs_slurm
def test_signal_reaches_the_runner_which_ends_the_notebook_truthfully(project):
    """What happens a minute before the time limit: Slurm signals the batch step, which exec has made the runner itself."""
    job = submit(project, "03_training", "smoke")
    wait_for_log(project, job, "Executing", seconds=60)
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
    assert wait_for(job, *ENDED, seconds=15) == "FAILED"
    assert "failed" in json.dumps(executed(project, job))


def executed(project, job):
    """The executed notebook; unreadable JSON fails here."""
    return json.loads((project / f"papermill_runs/job-{job}/03_training/report.ipynb").read_text())


def test_script_outside_a_job_says_how_to_submit_it():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", SCRIPT, "03_training"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "submit this script with sbatch" in done.stderr


def test_script_without_an_environment_says_what_to_do(tmp_path):
    environment = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", ROOT / SCRIPT, "03_training"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "make setup" in done.stderr
