"""`import itera_lite as il`: cheap to import, the same verbs for paths and models, work that survives a signal."""

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import itera_lite as il
from itera_lite.base.core import CheckpointError, ConfigError, DataError, IteraLiteError, seed_everything
from itera_lite.base.data import load_corpus
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.checkpoints.folder import load_model, model_bytes, read_config, save_model
from itera_lite.methods.compress import METHODS, NEEDED, OPTIONS, compress, method_options
from itera_lite.methods.plan import PLANS
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model and a text, as a user has them."""
    folder, text = tmp_path_factory.mktemp("verbs"), load_corpus("stories", limit_documents=150)
    tokenizer = train_tokenizer(text.train, 320)
    seed_everything(0)
    config = named_config("micro", vocab_size=320, hidden_size=32, num_layers=2, max_seq_length=64)
    save_model(build_model(config).eval(), folder / "model", tokenizer, card=dict(name="mine"))
    (folder / "text.txt").write_text("\n\n".join(text.train), encoding="utf-8")
    (folder / "texts").mkdir()
    for i in range(3):
        (folder / "texts" / f"{i}.txt").write_text("\n\n".join(text.train[i::3]), encoding="utf-8")
    return folder


def python(code, cwd=ROOT, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=240)


def test_importing_costs_nothing():
    code = "import sys, itera_lite as il; assert set(il.__all__) <= set(dir(il)); print('torch' in sys.modules)"
    done = python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
    code = "import sys, itera_lite as il; il.load; print('torch' in sys.modules, il.load.__module__)"
    assert python(code).stdout.split() == ["True", "itera_lite.app.verbs"]
    with pytest.raises(AttributeError, match="'itera_lite' has no attribute 'compres'.*compress"):
        il.compres  # noqa: B018


def test_each_package_says_what_it_holds():
    for init in (ROOT / "itera_lite").rglob("__init__.py"):
        line = re.match(r'"""(.+?)("""|\n)', init.read_text())
        assert line and len(line[1]) <= 120, init


def test_verbs_have_real_signatures_and_help():
    for name in il.__all__:
        verb = getattr(il, name)
        kinds = {p.kind for p in inspect.signature(verb).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{name} hides its options"
        assert "Example:" in verb.__doc__ and "Parameters:" in verb.__doc__ and f"il.{name}(" in verb.__doc__
        assert max(map(len, verb.__doc__.split("\n"))) <= 120


def test_help_lists_what_the_methods_take():
    """Names and defaults of every method, in the three places that offer them."""
    union = {option for method in METHODS for option in method_options(method)}
    assert union == OPTIONS.keys() and PLANS.keys() == METHODS.keys()
    for function in (compress, il.compress, il.plan):
        named = inspect.signature(function).parameters
        assert union <= named.keys() and all(named[o].default in (None, "") for o in union)
        said = " ".join(inspect.getdoc(function).split())
        for method in METHODS:
            defaults = ", ".join(f"{k}={v!r}" for k, v in method_options(method).items())
            assert f"{method}: {METHODS[method].__doc__}" in said and defaults in said, method
        assert all(f"{option} {' '.join(text.split())}" in said for option, text in OPTIONS.items())


def test_what_a_method_needs_is_refused_when_it_is_missing(place):
    for method, needs in NEEDED.items():
        recipe = "hidden_size=16" if method == "distill" else "ffn=0.5"
        given = dict(text=str(place / "text.txt"), recipe=recipe, size=280)
        for need in needs:
            name = need.split(" ")[-1]
            with pytest.raises(ConfigError, match=name):
                rest = {k: v for k, v in given.items() if k in method_options(method) and k != name}
                il.compress(place / "model", method, **rest)


def test_a_model_is_a_path_or_a_model(place, monkeypatch):
    monkeypatch.chdir(place)
    model = il.load("model")
    assert model.folder == place / "model" and model.card["name"] == "mine" and not model.training
    assert il.load(model.folder).tokenizer.to_str() == model.tokenizer.to_str()
    small = il.compress("model", bits=4)
    said = {il.generate(m, "Once", max_new_tokens=8, seed=0) for m in ("model", place / "model", model)}
    assert len(said) == 1 and il.generate(small, "Once", max_new_tokens=8, seed=0)
    assert il.save(model, "copy") == place / "copy" and il.save("model", "copied") == place / "copied"
    assert read_config("copy").weights == read_config("copied").weights == read_config("model").weights
    il.save(small, "int4")
    assert il.compress(model, bits=4).file_bytes == small.file_bytes == model_bytes("int4")[0]


WRONG = {
    "no such folder": (lambda p: il.load(p / "modle"), CheckpointError, "did you mean 'model'?"),
    "a file": (lambda p: il.load(p / "text.txt"), CheckpointError, "is a file"),
    "a folder of text": (lambda p: il.load(p / "texts"), CheckpointError, "no config.json"),
    "no model": (lambda p: il.evaluate(3), ConfigError, "of type int"),
    "a wrong path to compare": (lambda p: il.compare(p / "model", p / "no"), CheckpointError, "no such model folder"),
    "no text": (lambda p: il.evaluate(p / "model", text="no/such.txt"), DataError, "no text at no/such.txt"),
    "text that is nothing": (lambda p: il.evaluate(p / "model", text=" "), ConfigError, "text ' '"),
    "no document": (lambda p: il.evaluate(p / "model", documents=0), ConfigError, "documents 0"),
    "a precision as a map": (lambda p: il.compress(p / "model", map="int8"), ConfigError, "use precision=int8"),
    "a model in the way": (lambda p: il.save(il.load(p / "model"), p / "model"), ConfigError, "overwrite=True"),
    "a file in the way": (lambda p: il.save(p / "model", p / "text.txt"), ConfigError, "is a file"),
    "text in the way": (lambda p: il.save(p / "model", p / "texts", overwrite=True), ConfigError, "0.txt"),
    "a plan that cannot be": (lambda p: il.plan(p / "model", "gptq"), ConfigError, "give text"),
}


@pytest.mark.parametrize(("action", "kind", "said"), WRONG.values(), ids=WRONG)
def test_a_mistake_costs_one_line(action, kind, said, place):
    with pytest.raises(kind) as refused:
        action(place)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_compressed_says_what_it_is(place):
    small = il.compress(place / "model", "prune", recipe="heads=0.5,ffn=0.5")
    lines = repr(small).split("\n")
    assert lines[0].startswith("prune recipe=heads=0.5,ffn=0.5: stored as fp32")
    before, after = model_bytes(place / "model")[0], model_bytes(small.folder)[0]
    assert f"{after:,} bytes" in lines[1] and f"{before / after:.2f} times smaller than model ({before:,})" in lines[1]
    assert any(line.startswith("note: heads left out") for line in lines)
    kept = small.folder
    assert kept.is_dir() and kept == small.folder
    del small
    assert not kept.exists(), "its temporary folder goes with it"
    coded = il.compress(place / "model", "coded", bits=3.0, text=place / "text.txt", calibration_tokens=512)
    assert coded.file_bytes == model_bytes(il.save(coded, place / "coded"))[0] and "huffman coded" in repr(coded)
    assert read_config(il.save(il.load(place / "coded"), place / "again")).coding == "huffman"


def test_evaluation_is_of_the_model_in_hand(place):
    """A model that was changed after it was loaded is not what its folder holds."""
    model = il.load(place / "model")
    found = il.evaluate(model, text=place / "texts", documents=3)
    assert found.file_bytes == model_bytes(place / "model")[0] and found.documents == 3
    assert all(part in str(found) for part in ("bits per byte", "3 documents of texts", f"{found.file_bytes:,} bytes"))
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    assert il.evaluate(model, text=place / "texts", documents=3).bits_per_byte != found.bits_per_byte


def test_compare_prints_and_saves_itself(place, monkeypatch):
    monkeypatch.chdir(place)
    small = il.compress("model", precision="int8")
    found = il.compare("model", small, text="text.txt", documents=3)
    assert [r.name for r in found.rows] == ["model", "quantize precision=int8"]
    assert found.rows[1].ratio == small.ratio and found.rows[1].bits_per_byte_diff_ci95
    assert f"{small.ratio:.2f}×" in str(found) and "3 documents of text.txt" in str(found)
    page = found.save("sub/x.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page) and "Plotly.newPlot" in page
    again = small.compare("text.txt", documents=3, compare_documents=3, speed_seconds=0.05)
    assert again.rows[1].bits_per_byte == found.rows[1].bits_per_byte


STOPPED = """
import itera_lite as il
small = il.compress("model", "distill", recipe="hidden_size=16", text="text.txt", tokens=40_000)
il.save(small, "student", overwrite=True)
"""


def test_an_interrupted_training_goes_on_with_the_same_call(place):
    """Ctrl-C during `compress`: the folder that is named is there; the same call ends with the same bits."""
    cache = place / "papermill_runs"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ITERA_LITE_ROOT": str(place)}
    command = [sys.executable, "-c", STOPPED]
    work = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (rows := list(cache.rglob("metrics.csv"))) or len(rows[0].read_text().splitlines()) < 3:
        assert work.poll() is None and time.monotonic() < until, work.stderr and work.stderr.read()
        time.sleep(0.02)
    work.send_signal(signal.SIGINT)
    last = work.communicate(timeout=120)[1].strip().splitlines()[-1]
    assert work.returncode != 0 and "TrainingInterrupted: training stopped by SIGINT" in last, last
    (named,) = re.findall(r"its work is kept in (\S+): the same call goes on there", last)
    assert list((place / named).glob("checkpoint-*")), "a whole checkpoint in the folder that was named"
    for name in ("student", "whole"):
        code = STOPPED.replace('"student"', f'"{name}"')
        done = python(code, cwd=place, ITERA_LITE_ROOT=str(place))
        assert done.returncode == 0, done.stderr
        assert not cache.exists(), "nothing is left of finished work"
    assert read_config(place / "student").weights == read_config(place / "whole").weights
    assert load_model(place / "student").config.hidden_size == 16


def test_a_short_training_reads_little_besides(place, monkeypatch):
    """Eight steps of distillation: tokens that all models read, as counted, stay near what training itself reads."""
    from itera_lite.models.model import CausalLM
    hidden, read = CausalLM.hidden, []

    def counted(model, ids, state=None):
        read.append(ids.numel())
        return hidden(model, ids, state)

    monkeypatch.setattr(CausalLM, "hidden", counted)
    tokens = 8 * 8 * 64
    il.compress(place / "model", "distill", recipe="hidden_size=16", text=place / "text.txt", tokens=tokens)
    assert 2 * tokens <= sum(read) <= 2.5 * tokens  # student and teacher, and three validations of at least a batch


def test_nothing_is_written_by_a_plan(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("ITERA_LITE_ROOT", str(place))
    before = sorted(place.rglob("*"))
    for method, options in (
        ("quantize", {}), ("qat", dict(text="text.txt", tokens=4096)),
        ("distill", dict(text="text.txt", student="micro")),
    ):
        foreseen = il.plan("model", method, **options)
        assert foreseen.file_bytes > 0 and foreseen.seconds >= 0 and "nothing was written" in repr(foreseen)
        assert foreseen.memory_bytes == sum(foreseen.memory.values())
    assert sorted(place.rglob("*")) == before


def test_errors_of_verbs_are_the_projects_own():
    assert all(issubclass(kind, IteraLiteError) for _, kind, _ in WRONG.values())
