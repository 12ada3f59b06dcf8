"""`itera-lite compress`: every method from folder to folder, and every refusal in one line with nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from itera_lite.app.cli import app, users_mistake
from itera_lite.base.core import seed_everything
from itera_lite.base.data import load_corpus
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.checkpoints.folder import load_model, load_tokenizer, model_bytes, read_config, save_model
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model
from itera_lite.storage.packed import tensor_precisions, tensor_shapes

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(vocab_size=320, hidden_size=32, num_layers=2, max_seq_length=64)
KINDS = {
    "s4": ("micro", {}), "mamba": ("micro", {"kernel": "mamba"}),
    "mamba2": ("micro", {"kernel": "mamba2", "ssm_head_size": 16}),
    "transformer": ("transformer-tiny", {"ffn_size": 64, "num_heads": 4}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of each kind, a text, and a text that is too short."""
    folder, text = tmp_path_factory.mktemp("compress"), load_corpus("stories", limit_documents=150)
    tokenizer = train_tokenizer(text.train, SMALL["vocab_size"])
    for name, (config, fields) in KINDS.items():
        seed_everything(0)
        save_model(build_model(named_config(config, **SMALL | fields)).eval(), folder / name, tokenizer)
    (folder / "text.txt").write_text("\n\n".join(text.train), encoding="utf-8")
    (folder / "short.txt").write_text("\n\n".join(f"Story {n} is short." for n in range(9)), encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    return folder


def compress(place, *words, kind="s4", out="out"):
    """Run the command in this process: lines printed, the one line of a refusal, and the status."""
    words = [str(w).replace("TEXT", str(place / "text.txt")) for w in words]
    done = CliRunner().invoke(app, ["compress", str(place / kind), "--out", str(place / out), "--overwrite", *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        mistake = users_mistake(done.exception)
        if mistake is None:
            raise done.exception
        return done.output.splitlines(), *mistake
    return done.output.splitlines(), "", done.exit_code


CALIBRATED = ["--text", "TEXT", "--calibration-tokens", 512]
METHODS = {
    "quantize": ["--map", "int8+fp16"],
    "inline map": ["--map", '{"embedding": "int4", "*norm*": "fp16", "*": "int8"}'],
    "bits": ["--bits", 4],
    "gptq": ["--method", "gptq", "--precision", "int4-g32", *CALIBRATED],
    "coded": ["--method", "coded", "--bits", 3, *CALIBRATED],
    "activations": ["--method", "activations", "--bits", 8, *CALIBRATED],
    "qat": ["--method", "qat", "--bits", 3, "--tokens", 512, *CALIBRATED],
    "prune": ["--method", "prune", "--recipe", "d_inner=0.25,heads=0.25,ffn=0.25", *CALIBRATED],
    "prune and recover": ["--method", "prune", "--recipe", "ffn=0.5", "--tokens", 512, *CALIBRATED],
    "prune by magnitude": ["--method", "prune", "--recipe", "ffn=0.5"],
    "distill": ["--method", "distill", "--recipe", "hidden_size=16", "--tokens", 512, "--text", "TEXT"],
    "vocabulary": ["--method", "vocabulary", "--size", 280, "--text", "TEXT"],
}

# on each kind of model; the rest on one
EVERYWHERE = ("inline map", "gptq", "coded", "activations", "prune", "vocabulary")


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in METHODS for kind in KINDS if kind == "s4" or name in EVERYWHERE]
)
def test_each_method_gives_a_smaller_folder_that_runs(name, kind, place):
    words = METHODS[name]
    printed, line, status = compress(place, *words, kind=kind)
    assert (line, status) == ("", 0)
    before, after = model_bytes(place / kind)[0], model_bytes(place / "out")[0]
    assert after < before
    summary = [p for p in printed if p.startswith(f"ratio {before / after:.2f}, ")]
    assert len(summary) == 1 and " s, peak memory " in summary[0] and summary[0].endswith(" MB"), printed
    model, tokenizer = load_model(place / "out"), load_tokenizer(place / "out")
    ids = torch.tensor([tokenizer.encode("Once there was").ids])
    with torch.inference_mode():
        assert model(ids).isfinite().all()
    assert model.card["compressed"].split()[0] in words + ["quantize"]


def test_what_was_asked_for_is_in_the_folder(place):
    compress(place, "--map", '{"embedding": "int4", "*norm*": "fp16", "*": "int8"}')
    stored = tensor_precisions(load_model(place / "out"))
    asked = {"embedding.weight": "int4", "norm_f.weight": "fp16", "layers.0.ssm.in_proj.weight": "int8"}
    assert {name: stored[name] for name in asked} == asked
    compress(place, *METHODS["coded"])
    assert read_config(place / "out").coding == "huffman"
    compress(place, *METHODS["prune"])
    assert tensor_shapes(load_model(place / "out"))["layers.0.ssm.out_proj.weight"] == (32, 48)
    compress(place, *METHODS["vocabulary"])
    assert load_tokenizer(place / "out").get_vocab_size() == load_model(place / "out").config.vocab_size == 280
    compress(place, "--method", "sparse", "--recipe", "magnitude=0.5")
    assert (load_model(place / "out").layers[0].ssm.in_proj.weight == 0).float().mean() == 0.5


def test_the_same_command_gives_the_same_folder(place):
    for name, words in {"gptq": METHODS["gptq"], "distill": METHODS["distill"]}.items():
        weights = []
        for out in ("first", "second"):
            assert compress(place, *words, "--seed", 1, out=out)[1:] == ("", 0), name
            weights.append(read_config(place / out).weights)
        assert weights[0] == weights[1], name


REFUSED = {
    "map names an unknown tensor": (
        ["--map", '{"layers.*.ssm.dt_prj": "int8", "*": "fp16"}'],
        "'layers.*.ssm.dt_prj' names no tensor of this model; did you mean 'layers.*.ssm.dt_proj'?",
    ),
    "map names a layer that is not there": (
        ["--map", '{"layers.7.ssm.in_proj": "int8", "*": "fp16"}'], "'layers.7.ssm.in_proj' names no tensor",
    ),
    "group does not divide": (
        ["--precision", "int4-g33"], "groups of 33 do not divide rows of 32 weights; sizes that do: 32, 16",
    ),
    "group does not divide, gptq": (
        ["--method", "gptq", "--precision", "int3-g48", *CALIBRATED], "groups of 48 do not divide",
    ),
    "precision does not exist": (["--precision", "int9"], "unknown precision 'int9'"),
    "bit width does not exist": (["--bits", 9], "bits 9"),
    "bit width is a fraction": (["--bits", 3.5], "bits 3.5: allowed are whole numbers from 2 to 8"),
    "bits out of reach": (["--method", "coded", "--bits", 12, *CALIBRATED], "bits 12.0"),
    "precision in a map does not exist": (["--map", '{"*": "int1"}'], "unknown precision 'int1'"),
    "calibration set is empty": (["--method", "gptq", "--text", "EMPTY"], "empty"),
    "calibration set is too short": (
        ["--method", "gptq", "--text", "SHORT"], "calibration_tokens asks for 4,096: give more text, or ask for fewer",
    ),
    "calibration of no token": (
        ["--method", "gptq", "--text", "TEXT", "--calibration-tokens", 0], "calibration_tokens 0: one window takes 64",
    ),
    "pruning, calibration too short": (
        ["--method", "prune", "--recipe", "ffn=0.5", "--text", "SHORT"], "give more text",
    ),
    "no text": (["--method", "qat"], "give text (--text)"),
    "text is not there": (["--method", "gptq", "--text", "no/such.txt"], "no text at no/such.txt"),
    "all experts": (["--method", "prune", "--recipe", "experts=1.0"], "removing 1 of experts leaves 0 of 4"),
    "more than top-k leaves": (
        ["--method", "prune", "--recipe", "experts=0.75"],
        "fewer than the 2 that each token chooses (top_k_experts): allowed fractions go up to 0.5",
    ),
    "unknown group": (["--method", "prune", "--recipe", "widgets=0.5"], "unknown group to prune 'widgets'"),
    "recipe is no recipe": (["--method", "prune", "--recipe", "d_inner"], "allowed are name=value"),
    "no recipe": (["--method", "prune"], "needs a recipe"),
    "map file is not there": (["--map", "no/such.yaml"], "unknown precision map 'no/such.yaml'"),
    "map file is not YAML": (["--map", "BROKEN"], "is not YAML"),
    "map file is a folder": (["--map", "FOLDER"], "Is a directory"),
    "map file holds a list": (["--map", "LIST"], "not list"),
    "map is not JSON": (["--map", '{"*": '], "is not JSON"),
    "map is not complete": (["--map", '{"embedding": "int8"}'], "undecided"),
    "unknown method": (["--method", "zip"], "unknown method 'zip': allowed quantize, gptq"),
    "option of another method": (["--method", "vocabulary", "--tokens", 5], "method vocabulary takes no tokens"),
    "two answers": (["--bits", 4, "--precision", "int4"], "both given"),
    "student with unknown field": (
        ["--method", "distill", "--recipe", "hidden_sise=16", "--text", "TEXT"], "hidden_sise",
    ),
    "vocabulary below the bytes": (
        ["--method", "vocabulary", "--size", 100, "--text", "TEXT"], "vocabulary of 100: allowed are 257",
    ),
    "number is a word": (["--calibration-tokens", "many"], "--calibration-tokens"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input_costs_one_line_and_writes_nothing(words, said, place, tmp_path):
    (tmp_path / "broken.yaml").write_text("{: nothing")
    (tmp_path / "list.yaml").write_text("- int8\n")
    named = {
        "EMPTY": place / "empty.txt", "SHORT": place / "short.txt", "BROKEN": tmp_path / "broken.yaml",
        "LIST": tmp_path / "list.yaml", "FOLDER": tmp_path,
    }
    before = sorted(p.name for p in place.iterdir())
    printed, line, status = compress(place, *(named.get(w, w) for w in words), out="refused")
    shown = line or "\n".join(printed)  # a word for a number is refused by the parser, before the program
    assert status != 0 and said in shown
    assert "\n" not in line and sorted(p.name for p in place.iterdir()) == before


def test_what_is_in_the_way_stays_as_it_is(place):
    notes = place / "notes"
    notes.mkdir()
    (notes / "thoughts.txt").write_text("keep me")
    for out, said in (("notes", "thoughts.txt"), ("text.txt", "is a file"), ("s4", "the model itself")):
        printed, line, status = compress(place, out=out)
        assert (status, said in line, printed) == (1, True, []), line
    assert (notes / "thoughts.txt").read_text() == "keep me" and load_model(place / "s4")
    compress(place, "--map", "fp16", out="again")
    kept = {p.name: p.read_bytes() for p in (place / "again").iterdir()}
    assert compress(place, "--bits", 9, out="again")[2] == 1
    assert {p.name: p.read_bytes() for p in (place / "again").iterdir()} == kept
    assert compress(place, "--map", "bf16", out="again")[2] == 0  # a model folder is replaced, as save_model does


def test_nothing_to_remove_is_an_answer_and_no_error(place):
    for kind, recipe, reason in (
        ("s4", "heads=0.5", "a model with kernel s4 has no heads to remove"),
        ("transformer", "experts=0.5,d_state=0.5", "a Transformer has no experts to remove"),
    ):
        printed, line, status = compress(place, "--method", "prune", "--recipe", recipe, kind=kind, out="none")
        assert (status, line, len(printed)) == (0, "", 1) and printed[0].startswith(f"not_applicable: {reason}")
        assert not (place / "none").exists()
    save_model(build_model(named_config("micro", **SMALL, num_experts=2)), place / "two")
    printed, _, status = compress(place, "--method", "prune", "--recipe", "experts=0.5", kind="two", out="none")
    assert status == 0 and printed == [
        "not_applicable: no experts can go: each token chooses all 2 of them (top_k_experts)"
    ]
    printed, _, status = compress(place, "--method", "prune", "--recipe", "ffn=0.5,heads=0.5", out="some")
    assert status == 0 and any(p.startswith("note: heads left out: ") for p in printed)


def test_a_compressed_model_is_not_compressed_again(place):
    compress(place, "--bits", 4, out="small")
    _, line, status = compress(place, "--bits", 3, kind="small", out="smaller")
    assert status == 1 and "compressed already (int4)" in line and not (place / "smaller").exists()


def test_converted_checkpoints_are_compressed(place, tmp_path):
    """A Hugging Face Mamba, in FP16, without a tokenizer, as `convert` writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=320, hidden_size=32, state_size=8, num_hidden_layers=2, intermediate_size=64, time_step_rank=4
    )
    transformers.MambaForCausalLM(config).half().save_pretrained(tmp_path / "hf")
    foreign = CliRunner().invoke(app, ["compress", str(tmp_path / "hf"), "--out", str(tmp_path / "no")])
    assert "itera-lite convert" in str(foreign.exception)
    assert CliRunner().invoke(app, ["convert", str(tmp_path / "hf"), str(place / "converted")]).exit_code == 0
    for words in (["--precision", "int4"], ["--method", "prune", "--recipe", "d_inner=0.25"]):
        assert compress(place, *words, kind="converted", out="from-hf")[1:] == ("", 0)
        assert load_model(place / "from-hf")(torch.tensor([[1, 2, 3]])).isfinite().all()
    _, line, status = compress(place, "--method", "gptq", "--text", "TEXT", kind="converted", out="no")
    assert status == 1 and "has no tokenizer" in line
    save_model(load_model(place / "converted"), place / "spoken", load_tokenizer(place / "s4"))
    for words in (METHODS["gptq"], METHODS["vocabulary"], METHODS["coded"]):
        assert compress(place, *words, kind="spoken", out="from-hf")[1:] == ("", 0)


def program(*words):
    return subprocess.run(
        [sys.executable, "-m", "itera_lite.app.cli", "compress", *map(str, words)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )


def test_as_a_process(place, tmp_path):
    done = program(place / "s4", "--out", tmp_path / "out", "--map", json.dumps({"*": "fp16"}))
    assert done.returncode == 0 and done.stderr == "" and "ratio " in done.stdout
    done = program("no/such/model", "--out", tmp_path / "refused")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and line.startswith("itera-lite: no/such/model")
    assert not (tmp_path / "refused").exists()
