"""What is seen of long work: on a real terminal, through a real pipe, in a real kernel, and from a process apart."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]

WORK = """
import sys, time
from itera_lite.base.progress import Progress, track
with Progress("counting", 8, show=len(sys.argv) < 2) as work:
    for done in range(1, 9):
        time.sleep({pace})
        work.to(done, f"{{done}} so far")
"""
SLOW, QUICK = WORK.format(pace=0.3), WORK.format(pace=0.02)
LINE = re.compile(r"counting [0-7]/8 · [0-7] so far · (about )?[1-9] s left")


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if k not in ("ITERA_LITE_PROGRESS", "JPY_SESSION_NAME")}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"} | more


def piped(code, *arguments, **more):
    """What a program writes to a pipe: stdout, stderr."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), check=True, cwd=ROOT)
    return done.stdout, done.stderr


def on_terminal(code, *arguments):
    """What a program writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), cwd=ROOT)
    os.close(theirs)
    text = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        text += piece
    assert process.wait(timeout=60) == 0
    return text.decode()


def in_kernel(code, **more):
    """The outputs of a notebook's cell, and every message by which they came."""
    messages = []

    class Client(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            messages.append(msg)
            return super().process_message(msg, cell, cell_index)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = Client(notebook, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment(**more))
    return notebook.cells[0].outputs, messages


def test_a_terminal_gets_a_bar_that_moves():
    text = on_terminal(SLOW)
    assert text.count("\n") == 1, "one line"
    drawn = text.split("\r")
    assert sum(bool(LINE.search(line)) for line in drawn) >= 2 and "█" in drawn[-2]
    assert re.search(r"█+\| counting 8/8 · 8 so far · took [23] s\s*$", text.rstrip())


def test_a_log_gets_few_lines():
    lines = piped(SLOW)[1].splitlines()
    assert len(lines) == 2 and LINE.fullmatch(lines[0])
    assert re.fullmatch(r"counting 8/8 · 8 so far · took \d s", lines[1])


@pytest.mark.parametrize("code, arguments", [(QUICK, ()), (SLOW, ("silent",))])
def test_short_and_silent_work_says_nothing(code, arguments):
    assert piped(code, *arguments) == ("", "")
    assert on_terminal(code, *arguments) == ""


def test_nobody_is_told_where_it_is_off():
    assert piped(SLOW, ITERA_LITE_PROGRESS="off") == ("", "")


def test_a_notebook_gets_one_output_that_changes():
    outputs, messages = in_kernel(SLOW.replace("len(sys.argv) < 2", "True") + "print('done')")
    assert [output.output_type for output in outputs] == ["display_data", "stream"], "and no pink box"
    assert re.fullmatch(r"counting 8/8 · 8 so far · took \d s", outputs[0].data["text/plain"])
    assert outputs[0].metadata == {"itera_lite": "progress"}
    changes = [m["content"] for m in messages if m["msg_type"] == "update_display_data"]
    assert 3 <= len(changes) <= 6, "no more than two a second"
    assert all(content["metadata"] == {"itera_lite": "progress"} for content in changes)
    assert any(LINE.fullmatch(content["data"]["text/plain"]) for content in changes)
    assert any(re.search(r'<progress value="\d" max="8">', content["data"]["text/html"]) for content in changes)


def test_short_work_leaves_no_output_in_a_notebook():
    assert in_kernel(QUICK.replace("len(sys.argv) < 2", "True"))[0] == []


def test_a_notebook_whose_cell_was_left_says_no_more():
    code = """
import time
from itera_lite.base.progress import SCREEN, track
try:
    for step in track(range(9), "loop"):
        time.sleep(0.4)
        if step == 5: raise KeyboardInterrupt
except KeyboardInterrupt as e: kept = e # with its traceback the loop's generator stays alive
"""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in (code, "time.sleep(1.2); print(SCREEN.works, SCREEN.face)")]
    )
    NotebookClient(notebook, kernel_name="python3", timeout=60).execute(env=environment())
    first, second = notebook.cells
    assert re.fullmatch(r"loop 5/9 · took \d s", first.outputs[0].data["text/plain"])
    assert [output.text for output in second.outputs] == ["[] None\n"]


TRAINING = """
import os, sys, tempfile, torch
torch.set_num_threads(1)
from itera_lite.base.batches import encode_documents
from itera_lite.base.core import seed_everything
from itera_lite.base.data import load_corpus
from itera_lite.base.progress import Progress, Screen
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.checkpoints.folder import save_model
from itera_lite.evaluation.evaluate import evaluate_folder
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model
from itera_lite.training.config import TrainConfig
from itera_lite.training.train import train

few = load_corpus("stories", limit_documents=400)
tokenizer = train_tokenizer(few.train, 300)
streams = [encode_documents(tokenizer, documents) for documents in (few.train, few.validation)]
seed_everything(0)
model = build_model(named_config("micro", vocab_size=300, max_seq_length=64))
config = TrainConfig(
    max_tokens={tokens}, seq_length=64, batch_size=4, learning_rate=0.01, eval_every_tokens=2048, eval_tokens=512,
    device="cpu",
)
"""
RUN = "\nended = train(model, *streams, config, {folder}, seed=0)\n"
OFTEN = "\nScreen.patience, Progress.every = 0.0, 0.05\n"  # else a test takes as long as a reader needs
STEPS = re.compile(r"training \d+/\d+ · \d\.\d\d bits per byte( in training)? · (about )?\d+ (s|min) left")


@pytest.fixture(scope="module")
def trained_in_kernels():
    """Outputs and messages of a training that nobody looks at, and of one that a person in JupyterLab sees."""
    code = TRAINING.format(tokens=40_000) + OFTEN + RUN.format(folder="tempfile.mkdtemp()")
    return [in_kernel(code, **more) for more in ({}, {"JPY_SESSION_NAME": "a.ipynb"})]


def updates(messages):
    return [m["content"] for m in messages if m["msg_type"] == "update_display_data"]


def test_a_training_reports_steps_bits_and_time_in_one_output(trained_in_kernels):
    outputs, messages = trained_in_kernels[0]
    assert [output.output_type for output in outputs] == ["display_data"] and "<svg" not in str(messages)
    assert re.fullmatch(r"training 157/157 · \d\.\d\d bits per byte · took \d+ s", outputs[0].data["text/plain"])
    assert sum(bool(STEPS.fullmatch(content["data"]["text/plain"])) for content in updates(messages)) > 5


def test_a_person_in_jupyterlab_sees_the_curve_grow_and_keeps_the_figure(trained_in_kernels):
    outputs, messages = trained_in_kernels[1]
    drawings = [content["data"].get("text/html", "") for content in updates(messages)]
    points = [drawing.count("<circle") for drawing in drawings[:-1] if "<svg" in drawing]
    assert points[0] < points[-1] and points == sorted(points)
    figure = outputs[0].data["application/vnd.plotly.v1+json"]
    assert len(outputs) == 1 and [len(series["x"]) for series in figure["data"]][1] == 21
    assert figure["layout"]["title"]["text"].startswith("training 157/157")
    assert outputs[0].metadata == {}, "a figure is no progress: a report keeps it"


def test_ctrl_c_ends_a_training_that_reports(tmp_path):
    code = TRAINING.format(tokens=40_000_000) + RUN.format(folder=repr(str(tmp_path / "run")))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        cwd=ROOT,
    )
    lines = [next(process.stderr) for _ in range(2)]  # it began, and there is an estimate
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[1]
    assert all(line.startswith("training ") for line in lines) and "left" in lines[1]
    assert re.search(r"^training \d+/156250 · .*took \d+ s$", text, re.M), "the last line says how far it came"
    assert "TrainingInterrupted: training stopped by SIGINT" in text and process.returncode == 1
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_an_evaluation_in_its_own_process_reports_on_the_line_of_its_parent():
    code = TRAINING.format(tokens=1024) + OFTEN + """
folder = save_model(model, tempfile.mkdtemp() + "/tiny", tokenizer)
answer = evaluate_folder(folder, documents=few.train*4, measure=["quality"])
"""
    lines = [content["data"]["text/plain"] for content in updates(in_kernel(code)[1])]
    scoring = [re.match(r"evaluation of tiny · scoring (\d+)/\d+ documents( · |$)", line) for line in lines]
    done = [int(found[1]) for found in scoring if found]
    assert done and done == sorted(done) and done[-1] > 0, lines
    assert lines[-1].startswith("evaluation of tiny · took"), lines
