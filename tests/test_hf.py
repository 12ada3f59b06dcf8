"""EleutherAI's harness scores our folders, dense and packed, and says what `itera_lite.evaluation.evaluate` says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
hf = pytest.importorskip(
    "itera_lite.checkpoints.huggingface", exc_type=Exception, reason="pip install 'itera-lite[hf]'"
)
lm_eval = pytest.importorskip("lm_eval", reason="pip install 'itera-lite[hf]'")

from lm_eval.tasks import TaskManager  # noqa: E402

from itera_lite.base.data import EOS, load_corpus  # noqa: E402
from itera_lite.base.tokenizers import train_tokenizer  # noqa: E402
from itera_lite.checkpoints.folder import load_model, load_tokenizer, save_model  # noqa: E402
from itera_lite.evaluation.scores import score_documents  # noqa: E402
from itera_lite.models.config import config_from_dict  # noqa: E402
from itera_lite.models.generation import generate  # noqa: E402
from itera_lite.models.model import build_model  # noqa: E402
from itera_lite.storage.packed import storage_bytes  # noqa: E402
from itera_lite.storage.precision import compress_model  # noqa: E402

MIXED = {"embedding*": "int8", "*.in_proj": "int8-tensor", "*norm*": "fp32", "*": "fp16"}
ARCHITECTURES = {
    "s4": {},
    "mamba": dict(kernel="mamba", positions="none", norm="rmsnorm", feed_forward=False, tie_embeddings=False),
    "mamba2": dict(kernel="mamba2", ssm_head_size=16, positions="none"),
    "transformer": dict(model_type="transformer", ffn_size=64),
}
COMMON = """
dataset_path: json
test_split: test
validation_split: test
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
metadata: {{version: 1}}
"""
TASKS = {
    "stories_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "stories_whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{document}}<|endoftext|>"
metric_list: [{metric: bits_per_byte}]
""",
    "stories_write": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("stories", limit_documents=60)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus.train, 300)


@pytest.fixture(scope="module")
def tasks(corpus, tmp_path_factory):
    """Three tasks on text that the library generates: nothing is fetched."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for story in corpus.test[:6]:
        sentences = story.split(". ")
        endings = [" " + other.split(". ")[1] + "." for other in corpus.test[6:9]]
        choices = [" " + sentences[1] + ".", *endings]
        rows.append(dict(text=sentences[0] + ".", choices=choices, label=0, document=". ".join(sentences[:3])))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        common = COMMON.format(data=folder / "rows.jsonl", cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}{common}", encoding="utf-8")
    return folder, rows


def make_folder(name, precision, tokenizer, folder):
    torch.manual_seed(0)
    model = build_model(
        config_from_dict(dict(vocab_size=300, hidden_size=32, num_layers=2, max_seq_length=256) | ARCHITECTURES[name])
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # choices that differ from each other
    save_model(compress_model(model, precision) if precision else model, folder, tokenizer)
    return folder


def log_likelihood(model, tokenizer, context, continuation):
    """Of the continuation's tokens, as the library scores tokens: after the end-of-text that opens a document."""
    start = [tokenizer.token_to_id(EOS)]
    whole = start + tokenizer.encode(context + continuation).ids
    skip = len(start + tokenizer.encode(context).ids) - 1
    ids = torch.tensor([whole])
    with torch.inference_mode():
        return -model.token_nll(ids[:, :-1], ids[:, 1:])[0, skip:].double().sum().item()


CASES = [(name, precision, "ours") for name in ARCHITECTURES for precision in (None, MIXED)] + [
    ("s4", MIXED, "exported"), ("mamba", None, "exported"),
]


@pytest.mark.parametrize(
    "name, precision, kind", CASES,
    ids=[f"{name}-{'mixed' if precision else 'fp32'}-{kind}" for name, precision, kind in CASES],
)
def test_harness_agrees_with_our_evaluation(name, precision, kind, tokenizer, tasks, tmp_path):
    own = make_folder(name, precision, tokenizer, tmp_path / "model")
    folder = own if kind == "ours" else hf.export(own, tmp_path / "exported")
    yaml_folder, rows = tasks
    language_model = hf.harness(
        folder, batch_size=4, softmax_dtype="float64"
    )  # sums of hundreds of nats, to four decimals
    if precision:
        assert storage_bytes(language_model.model.lm) == storage_bytes(load_model(own))  # packed in memory too
    manager = TaskManager(include_path=str(yaml_folder), include_defaults=False)
    answer = lm_eval.simple_evaluate(model=language_model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    model, samples = load_model(own), answer["samples"]
    # multiple choice: each ending's log-likelihood
    right = 0
    for sample in samples["stories_choice"]:
        row = rows[sample["doc_id"]]
        ours = [log_likelihood(model, tokenizer, row["text"], choice) for choice in row["choices"]]
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert theirs == pytest.approx(ours, abs=1e-4)
        right += ours.index(max(ours)) == row["label"]
    assert answer["results"]["stories_choice"]["acc,none"] == pytest.approx(right / len(rows))
    # whole documents, closing end-of-text included: what score_documents says
    scores = score_documents(model, tokenizer, [row["document"] for row in rows])
    for sample in samples["stories_whole"]:
        assert float(sample["filtered_resps"][0]) == pytest.approx(-scores.nll[sample["doc_id"]], abs=1e-4)
    # generation in batches of prompts that differ in length: what each prompt gives alone
    for sample in samples["stories_write"]:
        prompt = torch.tensor([0] + tokenizer.encode(rows[sample["doc_id"]]["text"]).ids)
        ids = generate(model, prompt, 12, temperature=0, stop_token=0)[0, len(prompt):].tolist()
        assert sample["filtered_resps"][0] == tokenizer.decode(ids).split(".")[0]


def test_command_line_in_a_fresh_process(tokenizer, tasks, tmp_path):
    """The harness's own command, offline, on a packed model folder."""
    own = make_folder("s4", MIXED, tokenizer, tmp_path / "model")
    command = [
        sys.executable, "-m", "itera_lite.checkpoints.huggingface", "run", "--model", "itera_lite", "--model_args",
        f"pretrained={own}", "--tasks", "stories_whole", "--include_path", str(tasks[0]), "--output_path",
        str(tmp_path / "answer"), "--batch_size", "4",
    ]
    environment = os.environ | dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "answer").rglob("results*.json")
    found = json.loads(path.read_text())["results"]["stories_whole"]["bits_per_byte,none"]
    documents = [row["document"] for row in tasks[1]]
    scores = score_documents(load_model(own), load_tokenizer(own), documents)
    size = sum(len((document + EOS).encode()) for document in documents)  # the harness counts the closing mark as text
    assert found == pytest.approx(scores.nll.sum() / math.log(2) / size, abs=1e-4)


def test_only_these_modules_need_transformers():
    modules = sorted(
        ".".join(path.relative_to(ROOT / "itera_lite").with_suffix("").parts)
        for path in (ROOT / "itera_lite").rglob("[a-z]*.py") if path.stem not in ("causal_lm", "huggingface")
    )
    code = "import sys; sys.modules['transformers'] = sys.modules['lm_eval'] = None; " + "; ".join(
        f"import itera_lite.{module}" for module in modules
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: hf.harness(tmp_path))
    said = hf.main()  # what sys.exit prints
    assert "is not a model folder" in said and "\n" not in said
