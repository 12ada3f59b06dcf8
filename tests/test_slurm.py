"""Jobs on a real Slurm: one that answers here, else one that is started for the tests; without Slurm they skip."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from test_jobs import BUSY, FINISH, PARAMETERS, write_notebook

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "slurm/run_notebook.sbatch"
pytestmark = pytest.mark.timeout(600)


def answers():
    """Whether a cluster that shares this file system can be asked."""
    if not shutil.which("sinfo"):
        return False
    asked = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, timeout=60)
    return bool(asked.stdout.strip())


@pytest.fixture(scope="session")
def cluster():
    """A cluster to submit to."""
    if answers():
        yield "the machine's own"
        return
    if why := slurm_cluster.missing():
        pytest.skip(f"no Slurm cluster: the job tests were NOT run: {why}")
    try:
        slurm_cluster.start()
        yield "started for the tests"
    finally:
        slurm_cluster.stop()
        os.environ.pop("SLURM_CONF", None)


@pytest.fixture
def project(cluster, tmp_path):
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


def test_job_runs_a_notebook_and_its_record_names_the_job(project):
    job = submit(project, "03_training")
    assert wait_for(job, *ENDED, seconds=60) == "COMPLETED", log(project, job)
    record = json.loads((project / f"papermill_runs/job-{job}/03_training/metrics.json").read_text())
    assert record["run"]["job_id"] == job
    assert record["run"]["preset"] == "smoke"
    assert "metadata" in executed(project, f"job-{job}")


@pytest.mark.parametrize(
    "arguments", [("no_such_notebook",), ("03_training", "no_such_preset")], ids=["notebook", "preset"]
)
def test_job_fails_with_one_line_and_the_runners_status(project, arguments):
    job = submit(project, *arguments)
    assert wait_for(job, *ENDED, seconds=60) == "FAILED"
    assert field(job, "ExitCode") == "1:0"
    (line,) = [line for line in log(project, job).splitlines() if line.startswith("itera-lite: ")]
    assert arguments[-1] in line and "Traceback" not in log(project, job)


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


def test_requeued_job_goes_on_in_the_same_run(project):
    """What Slurm does when a node fails: the same job id, hence the same run."""
    job = submit(project, "03_training", "laptop")
    wait_until_it_waits(project, job, f"job-{job}", seconds=60)
    (project / "slurm/params/03_training/laptop.yaml").write_text("wait: 0\n")
    subprocess.run(["scontrol", "requeue", job], check=True)
    assert wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=300) == "COMPLETED", log(project, job)
    assert "turn 2" in log(project, job)
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


# --- what `itera-lite submit` queues


TOY = "\nwait = 0\nfail = False\nx = 0.0"
CELLS = ("import time; time.sleep(wait)", "assert not fail, 'told to fail'")


def git(project, *words):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=project, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(cluster, tmp_path):
    """A project under git with three toy notebooks."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "settings.ini").write_text("[DEFAULT]\nlib_name = itera_lite\n")
    for name in ("03_training", "04_evaluation", "07_mixed_precision"):
        write_notebook(project, name, *CELLS, FINISH.format(name=name), parameters=PARAMETERS + TOY)
        (project / f"slurm/params/{name}/smoke.yaml").write_text("wait: 0\n")
    (project / "slurm/params/resources.yaml").write_text("smoke: {time: 5, memory: 1G, cpus: 1}\n")
    shutil.copy(ROOT / SCRIPT, project / SCRIPT)
    (project / ".gitignore").write_text("papermill_runs/\n.venv\n")
    (project / ".venv").symlink_to(sys.prefix)
    git(project, "init", "--quiet")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message=toy")
    return project


def command(project, *words, status=0):
    """What `itera-lite …` printed."""
    environment = {**os.environ, "ITERA_LITE_ROOT": str(project)}
    done = subprocess.run(
        [sys.executable, "-m", "itera_lite.app.cli", *map(str, words)], cwd=project, env=environment,
        capture_output=True, text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def states(project, run):
    """Name → state and detail, of every job of a run."""
    return {s["name"]: (s["state"], s["detail"]) for s in json.loads(command(project, "status", run, "--json"))}


def until(project, run, condition, seconds):
    end = time.monotonic() + seconds * BUSY
    while not condition(found := states(project, run)):
        assert time.monotonic() < end, found
        time.sleep(1)
    return found


def ended(found):
    return all(state not in ("pending", "running") for state, _ in found.values())


def test_chain_runs_what_was_submitted_though_the_tree_changes(repository):
    words = ("--preset", "smoke", "--notebooks", "03,04,07", "--run", "chain", "-p", "wait=4")
    said = command(repository, "submit", *words)
    assert "03_training: job" in said
    write_notebook(repository, "04_evaluation", "raise SystemExit('the tree has changed')", parameters=PARAMETERS + TOY)
    found = until(repository, "chain", ended, 180)
    assert {state for state, _ in found.values()} == {"done"}, found
    records = [json.loads((repository / f"papermill_runs/chain/{n}/metrics.json").read_text()) for n in found]
    started = {r["notebook"]: r["run"]["started"] for r in records}
    assert started["03_training"] < min(started["04_evaluation"], started["07_mixed_precision"])
    assert len({r["run"]["job_id"] for r in records}) == 3
    again = command(repository, "submit", "--preset", "smoke", "--notebooks", "03,07", "--run", "chain", "-p", "wait=4",
                    "--local", "--this-tree")
    assert "nothing to do" in again


def test_what_depends_on_a_failure_is_not_left_waiting(repository):
    command(repository, "submit", "--preset", "smoke", "--notebooks", "03,04", "--run", "broken", "-p", "fail=true")
    found = until(repository, "broken", ended, 120)
    assert found["03_training"][0] == "failed" and "told to fail" in found["03_training"][1]
    assert found["04_evaluation"][0] == "cancelled"


def test_sweep_with_failures_goes_on_where_it_failed(repository):
    sweep = repository / "lr.yaml"
    sweep.write_text("notebook: 03_training\nsweep: {x: {linear: [0, 1], n: 3}, fail: [false, true]}\nat_once: 2\n")
    command(repository, "submit", "--sweep", sweep)
    found = until(repository, "lr", ended, 240)
    assert sorted(state for state, _ in found.values()) == ["done"] * 3 + ["failed"] * 3
    assert all("told to fail" in detail for state, detail in found.values() if state == "failed")
    assert "3 rows" in command(repository, "collect", "lr", "--out", repository / "records.parquet")
    said = command(repository, "submit", "--sweep", sweep)
    assert "3 points" in said, said  # those that failed
    until(repository, "lr", ended, 240)
    table = command(repository, "collect", "lr", "--out", repository / "records.csv")
    assert "3 rows" in table and len((repository / "records.csv").read_text().splitlines()) == 4


def test_warned_of_the_time_limit_a_job_takes_another_turn(repository):
    command(repository, "submit", "--preset", "smoke", "--notebooks", "03", "--run", "turns", "-p", "wait=30")
    until(repository, "turns", lambda found: "cell 2" in found["03_training"][1], 60)
    job = json.loads(next((repository / "papermill_runs/turns/jobs").glob("*-submission.json")).read_text())
    job = job["jobs"][0]["job_id"]
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    assert wait_for(job, "COMPLETED", "FAILED", seconds=240) == "COMPLETED"
    text = (repository / f"papermill_runs/turns/jobs/03_training-{job}.log").read_text()
    assert "queued again" in text and "turn 2" in text


def test_cancel_takes_back_what_waits_and_stops_what_runs(repository):
    command(repository, "submit", "--preset", "smoke", "--notebooks", "03,04", "--run", "gone", "-p", "wait=300")
    until(repository, "gone", lambda found: found["03_training"][0] == "running", 60)
    assert "2 jobs cancelled" in command(repository, "cancel", "gone")
    found = until(repository, "gone", ended, 60)
    assert found["04_evaluation"][0] == "cancelled" and found["03_training"][0] in ("cancelled", "failed")


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (("--partition", "nowhere"), "unknown partition 'nowhere'"),
        (("--memory", "900G"), "921,600 MB asked for"),
        (("--run", "../out"), "the name of a folder"),
        (("-p", "wiat=3"), "unknown parameter"),
        (("--notebooks", "33"), "unknown notebook"),
    ],
    ids=["partition", "memory", "run", "parameter", "notebook"],
)
def test_what_cannot_run_is_refused_and_nothing_is_queued(repository, words, contains):
    before = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout
    named = () if "--notebooks" in words else ("--notebooks", "03")
    said = command(repository, "submit", "--preset", "smoke", *named, *words, status=1)
    assert contains in said and "Traceback" not in said
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout == before
    assert not (repository / "papermill_runs/smoke/jobs").exists()


def test_uncommitted_changes_are_refused(repository):
    (repository / "nbs/03_training.ipynb").write_text((repository / "nbs/03_training.ipynb").read_text() + "\n")
    said = command(repository, "submit", "--preset", "smoke", "--notebooks", "03", status=1)
    assert "commit them" in said and "nbs/03_training.ipynb" in said


def test_without_slurm_the_queue_runs_here(repository):
    said = command(repository, "submit", "--preset", "smoke", "--notebooks", "03,04,07", "--run", "here", "--local",
                   "--at-most", "2")
    assert "07_mixed_precision: job local-2" in said
    assert {state for state, _ in states(repository, "here").values()} == {"done"}


# --- the project itself, at the commit that is checked out


@pytest.fixture(scope="module")
def clone(cluster, tmp_path_factory):
    """The project's own commit, with the environment of the tests."""
    folder = tmp_path_factory.mktemp("clone") / "itera-lite"
    made = subprocess.run(["git", "clone", "--quiet", ROOT, folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the project is no git repository, so nothing of it was submitted: {made.stderr.strip()}")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


SMALL = (
    "-p", "max_tokens=40960", "-p", "eval_every_tokens=10240", "-p", "eval_tokens=2048", "-p", "limit_documents=300",
    "-p", "device=cpu", "-p", "prompts=[]",
)


def curve(clone, run):
    record = json.loads((clone / f"papermill_runs/{run}/03_training/metrics.json").read_text())
    return record["curves"], record["run"]


def test_two_nodes_train_as_one_process_does(clone):
    command(clone, "submit", "--preset", "smoke", "--notebooks", "03", "--run", "two", "--nodes", "2", *SMALL)
    command(clone, "submit", "--preset", "smoke", "--notebooks", "03", "--run", "one", *SMALL)
    for run in ("two", "one"):
        found = until(clone, run, ended, 300)
        log = next((clone / f"papermill_runs/{run}/jobs").glob("*.log")).read_text()
        assert found["03_training"][0] == "done", log
        assert ("2 nodes" in log) == (run == "two")
    (two, _), (one, _) = curve(clone, "two"), curve(clone, "one")
    (name,) = one
    losses = [[row["val_bpb"] for row in c[name]] for c in (two, one)]
    assert len(losses[0]) == len(losses[1]) > 3
    assert all(abs(a - b) <= 1e-5 * b for a, b in zip(*losses, strict=True)), losses


def test_a_node_that_dies_leaves_a_failure_and_a_checkpoint(clone):
    words = ("--preset", "smoke", "--notebooks", "03", "--run", "dies", "-p", "checkpoint_every_steps=5", *SMALL,
             "-p", "max_tokens=400000")
    command(clone, "submit", "--nodes", "2", *words)
    folder = clone / "papermill_runs/dies/03_training/training"
    end = time.monotonic() + 240 * BUSY
    while not list(folder.glob("checkpoint-*[1-9]*-1")):
        assert time.monotonic() < end, states(clone, "dies")
        time.sleep(0.2)
    killed = subprocess.run(["pkill", "--signal=KILL", "--newest", "--full", "itera_lite.training.nodes.*dies"])
    assert killed.returncode == 0
    found = until(clone, "dies", ended, 120)
    assert found["03_training"][0] == "failed" and "what was saved is kept" in found["03_training"][1], found
    command(clone, "submit", *words)  # on one node, from the checkpoint
    assert until(clone, "dies", ended, 300)["03_training"][0] == "done"
    assert curve(clone, "dies")[1]["parameters"]["max_tokens"] == 400_000


LAUNCH = """
import sys, time
from itera_lite.jobs.executor import launch, watch_live
launched = launch(sys.argv[1], run=sys.argv[2], local=sys.argv[2] == "here", time=5, memory="1G")
table = watch_live(launched, seconds=0.5)
while not launched.over(): time.sleep(0.5)
time.sleep(2)
print(table.value)
print([state for _, state, _ in launched.rows()])
"""


@pytest.mark.parametrize("run", ["here", "queued"])
def test_a_sweep_launched_from_python_runs_here_and_on_slurm(repository, run):
    pytest.importorskip("submitit")
    sweep = repository / "seeds.yaml"
    sweep.write_text("notebook: 03_training\npoints: [{x: 1.0}, {x: 2.0}, {fail: true}]\n")
    environment = {**os.environ, "ITERA_LITE_ROOT": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(sweep), run], cwd=repository, env=environment, capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "['done', 'done', 'failed']", done.stdout + done.stderr
    assert "told to fail" in done.stdout
