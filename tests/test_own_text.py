"""A model on one's own text, as a user meets it: a folder of text, a stop, a mistake, all as processes."""

import pytest
from test_cli import command, in_process, interrupt, itera_lite

from itera_lite.base.data import load_corpus
from itera_lite.checkpoints.folder import load_model, load_tokenizer

SMALL = ["--model", "micro", "--vocab-size", 300]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text as users have it: Markdown and plain text, in folders inside it, an empty file, a picture."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "notes" / "old").mkdir(parents=True)
    for i, story in enumerate(load_corpus("stories", limit_documents=300).train):
        (folder / "notes" / ("old" if i % 2 else ".") / f"day {i}.{'md' if i % 3 else 'txt'}").write_text(story)
    (folder / "notes" / "empty.md").write_text("")
    (folder / "notes" / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "photos").mkdir()
    (folder / "photos" / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "latin.txt").write_bytes("Ein M\u00e4rchen. ".encode("latin-1") * 9000)
    (folder / "short.txt").write_text("\n".join(f"Tale {n} is short." for n in range(40)))
    return folder


@pytest.fixture(scope="module")
def mine(place):
    """A trained model, and what the command said."""
    done = itera_lite("train", "notes", "--out", "mine", *SMALL, "--tokens", "6k", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "mine", done.stdout


def test_a_folder_of_text_becomes_a_model(place, mine):
    folder, said = mine
    lines = [line.split(":")[0] for line in said.splitlines() if not line.startswith("  ")]
    assert lines == ["text", "model", "budget", "validation", "test", "it writes", "saved", "next"]
    assert "budget: 6,000 tokens" in said and "(as asked for)" in said
    assert "bits per byte [" in said and "documents held out" in said
    assert sorted(path.name for path in place.glob("mine*")) == ["mine", "mine.metrics.csv"]
    model = load_model(folder)
    assert model.card["corpus"] == "notes" and model.card["test_bits_per_byte"] > 0
    assert load_tokenizer(folder).get_vocab_size() == model.config.vocab_size == 300


def test_it_generates(mine):
    words = ["generate", mine[0], "--prompt", "One day", "--seed", 1, "--max-new-tokens", 8]
    first, again = (itera_lite(*words) for _ in range(2))
    assert first.returncode == 0 and first.stdout.startswith("One day") and first.stdout == again.stdout


REFUSED = {
    "nothing there": (["no/such/text"], "no text at no/such/text"),
    "no text in it": (["photos"], "no text file in"), "not UTF-8": (["latin.txt"], "is not UTF-8: byte 0xe4"),
    "too little": (["short.txt"], "give about"), "model is there": (["notes", "--out", "mine"], "--overwrite"),
    "cannot be written": (["notes", "--out", "short.txt/deep/mine"], "cannot be written"),
    "two budgets": (["notes", "--tokens", "3M", "--minutes", "2"], "leave one out"),
    "no number": (["notes", "--tokens", "3X"], "allowed are whole numbers above 0, also as 500k"),
    "no time": (["notes", "--minutes", "0"], "minutes 0: allowed are numbers above 0"),
    "no such model": (["notes", "--model", "vocab200"], "did you mean 'vocab2000'"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_costs_one_line_and_no_work(place, mine, words, said, monkeypatch, capsys):
    out = [] if "--out" in words else ["--out", "refused"]
    model = [] if "--model" in words else SMALL
    status, stdout, stderr = in_process(monkeypatch, capsys, place, "train", *words, *out, *model)
    assert status in (1, 2) and "training" not in stdout
    (line,) = stderr.splitlines()
    assert line.startswith("itera-lite: ") and said in line, line
    assert not list(place.glob("refused*"))
    assert not (place / "mine.training").exists()


def test_too_little_text_says_how_much_there_is(place):
    line = itera_lite("train", "short.txt", "--out", "refused", *SMALL, cwd=place).stderr
    held = sum(len(line) for line in (place / "short.txt").read_text().splitlines())
    assert f"holds {held:,} bytes in 40 documents" in line and "kB of text or more" in line


def test_minutes_become_a_budget(place):
    done = itera_lite("train", "notes", "--out", "quick", *SMALL, "--minutes", 0.02, cwd=place)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("budget: "))
    assert "what 0.02 minutes allow at the " in line and " tokens/s of the first steps" in line
    chosen = int(line.split()[1].replace(",", ""))
    assert chosen % 1024 == 0 and load_model(place / "quick").card["training_tokens"] == chosen


def test_ctrl_c_says_where_the_work_is_and_the_same_command_goes_on(place):
    words = ["train", "notes", "--out", "stopped", *SMALL, "--tokens", "50k"]
    work = place / "stopped.training"
    status, stderr, _ = interrupt(words, place, lambda: rows(work) > 1)
    line = stderr.splitlines()[-1]
    assert status == 130 and "Traceback" not in stderr
    assert line.startswith("itera-lite: training stopped by SIGINT after step ")
    assert str(work) in line and line.endswith(f"goes on: {command(words)}")
    assert list(work.glob("checkpoint-*")) and not (place / "stopped").exists()
    other = itera_lite(*words, "--seed", 1, cwd=place)
    assert other.returncode == 1 and "seed is 1, was 0" in other.stderr and list(work.glob("checkpoint-*"))
    done = itera_lite(*words, cwd=place)
    assert done.returncode == 0 and "(that of the training which goes on)" in done.stdout, done.stderr
    assert load_model(place / "stopped").card["training_tokens"] == 49 * 1024 and not work.exists()


def rows(work):
    """Rows of the curve so far."""
    try:
        return len((work / "metrics.csv").read_text().splitlines())
    except OSError:
        return 0
