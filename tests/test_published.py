"""A published figure is what the published folder still scores, in a process that knows nothing but the folder."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup

from itera_lite.base.core import DataError
from itera_lite.base.data import load_corpus
from itera_lite.base.record import Record
from itera_lite.base.tokenizers import train_tokenizer
from itera_lite.checkpoints.folder import model_bytes, save_model
from itera_lite.checkpoints.weights import weights_sha256
from itera_lite.evaluation.evaluate import evaluate_folder, row_from_folder
from itera_lite.evaluation.scores import DocScores, EvaluationError, score_documents
from itera_lite.evaluation.validate import validate
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model
from itera_lite.reports.entries import read_entry
from itera_lite.reports.pages import notebook_page

ROOT = Path(__file__).resolve().parents[1]
# another processor sums in another order, and a router may choose the other of two equal experts;
# a wrong model is off by far more
TOLERANCE = 1e-4
KEPT = 12  # model folders; all others can be made again by their record's command


def published():
    """(record's folder, row) for every row whose model folder is kept beside its record, each folder once."""
    found, folders = [], set()
    for path in sorted((ROOT / "papermill_runs/published").rglob("metrics.json")):
        name = path.parent.relative_to(ROOT / "papermill_runs/published")
        for row in Record.read(path).results:
            folder = (path.parent / row.artifact).resolve() if row.artifact else None
            if (
                row.status != "ok"
                or folder is None
                or not row.bits_per_byte
                or folder in folders
                or not folder.exists()
            ):
                continue
            folders.add(folder)
            found.append(pytest.param(path.parent, row, id=f"{name}:{row.name}"))
    nothing = pytest.mark.skip(
        reason="papermill_runs/published holds no record with an artifact: nothing has been published yet"
    )
    return found or [pytest.param(None, None, id="none", marks=nothing)]


def text_of(record):
    """The documents a record's figures are about, or None where that text cannot be had here."""
    try:
        corpus = load_corpus(record.data.corpus, seed=record.run.seed)
    except DataError:
        return None
    if corpus.sha256["test"] == record.data.sha256["test"]:
        documents = corpus.test
    else:  # the record read the first documents of each file only
        limit = record.run.parameters.get("limit_documents")
        documents = load_corpus(record.data.corpus, seed=record.run.seed, limit_documents=limit).test
    ends = np.cumsum([len(d.encode()) for d in documents])
    assert (
        record.data.eval_bytes in ends
    ), "the corpus at hand is not the one of the record: no number of its first documents has as many bytes"
    return documents[: int(np.searchsorted(ends, record.data.eval_bytes)) + 1]


@pytest.mark.parametrize("notebook", ["05_quantization", "08d_advice"])
def test_a_report_from_before_abstracts_opens_with_one(notebook):
    entry = read_entry("tinystories", ROOT / "papermill_runs/published/tinystories" / notebook)
    page = BeautifulSoup(notebook_page(entry), "html.parser")
    cells = page.select(".jp-MarkdownCell")
    assert cells[0].h1 and entry.record.opening() in cells[1].text and "Machine" in cells[1].text
    assert all(code.find_parent("details", class_="code") for code in page.select(".jp-CodeCell .jp-Cell-inputWrapper"))
    assert not page.select("details[open]") and page.select("main figure.plot") and page.select("main table")


@pytest.mark.parametrize("folder, row", published())
def test_published_artifact_is_what_its_row_says(folder, row):
    artifact = folder / row.artifact
    assert weights_sha256(artifact) == row.artifact_sha256
    assert model_bytes(artifact)[0] == row.file_bytes


@pytest.mark.timeout(1800)  # one CPU-minute alone; on a shared machine a fraction of a core may be all there is
@pytest.mark.parametrize("folder, row", published())
def test_published_folder_gives_the_published_figure(folder, row):
    record = Record.read(folder)
    documents = text_of(record)
    if documents is not None:
        answer = evaluate_folder(folder / row.artifact, documents=documents, measure=["quality"])
        again = row_from_folder(row.name, row.technique, folder / row.artifact, answer=answer, bootstrap_samples=2)
        assert math.isclose(again.bits_per_byte, row.bits_per_byte, rel_tol=TOLERANCE)
        assert math.isclose(again.perplexity, row.perplexity, rel_tol=10 * TOLERANCE)
        return
    # Without the corpus: on the text that the library generates itself, against the record's figure where it has one;
    # where it has none the folder must still load and score.
    answer = evaluate_folder(folder / row.artifact, measure=[], probes=["stories"], documents=[])["stories"]
    stated = record.extra.get("stories", {}).get(row.name, answer)
    assert answer["documents"] == stated["documents"]
    assert math.isclose(answer["bits_per_byte"], stated["bits_per_byte"], rel_tol=TOLERANCE)


def test_what_is_not_kept_can_be_made_again():
    kept = {(case.values[0] / case.values[1].artifact).resolve() for case in published() if case.values[0]}
    assert len(kept) <= KEPT, f"{len(kept)} model folders are kept: {', '.join(sorted(f.name for f in kept))}"
    for path in sorted((ROOT / "papermill_runs/published").rglob("metrics.json")):
        record = Record.read(path)
        absent = [row.name for row in record.results if row.artifact and not (path.parent / row.artifact).exists()]
        assert not absent or record.run.rebuild_command.startswith(
            "papermill nbs/"
        ), f"{path}: {absent[0]} is not kept, and no command makes it again"


def test_something_published_can_be_checked_without_its_corpus():
    records = [Record.read(path) for path in sorted((ROOT / "papermill_runs/published").rglob("metrics.json"))]
    if not any(row.artifact for record in records for row in record.results):
        pytest.skip("papermill_runs/published holds no record with an artifact: nothing has been published yet")
    checkable = [
        row.name
        for record in records
        for row in record.results
        if row.artifact and row.name in record.extra.get("stories", {})
    ]
    assert checkable, "no published record has a figure on `stories`; 04_evaluation writes one for its rows"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder made here, its model, tokenizer and a little text."""
    folder = tmp_path_factory.mktemp("made") / "model"
    corpus = load_corpus("stories", limit_documents=60)
    tokenizer = train_tokenizer(corpus.train, 320)
    model = build_model(named_config("micro", vocab_size=320)).eval()
    save_model(model, folder, tokenizer=tokenizer)
    return folder, model, tokenizer, corpus


def test_a_folder_scores_the_same_in_any_process(made):
    folder, model, tokenizer, corpus = made
    here = score_documents(model, tokenizer, corpus.test[:20])
    by_name = evaluate_folder(folder, "stories", limit_documents=20, measure=["quality", "memory"])
    by_text = evaluate_folder(folder, corpus, limit_documents=20, measure=["quality"])
    assert by_name["scores"] == by_text["scores"], "two processes, one result, whoever read the text"
    there = DocScores.of(by_name["scores"])
    assert np.allclose(there.nll, here.nll, rtol=1e-5) and (there.tokens == here.tokens).all()
    assert (
        by_name["file_bytes"] == model_bytes(folder)[0] and by_name["peak_rss_bytes"] > by_name["imports_rss_bytes"] > 0
    )


def test_a_damaged_folder_is_refused_in_one_line(made, tmp_path):
    folder, model, tokenizer, corpus = made
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(EvaluationError) as caught:
        evaluate_folder(tmp_path, corpus, limit_documents=2)
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0], "the other process' traceback comes along, for --debug"


def test_validate_finds_a_model_equal_to_itself(made):
    folder, *_, corpus = made
    report = validate(folder, folder, corpus=corpus, speed_seconds=0.05, compare_documents=3, bootstrap_samples=50)
    row = report.model
    assert (
        row.ratio == 1 and row.kl_to_baseline == 0 and row.top1_agreement == 1 and row.perplexity_change_ci95 == [0, 0]
    )
    assert report.cloze["paired"]["difference"] == 0 and report.embedding_cosine["min"] > 1 - 1e-6
    assert (
        re.search(r"ratio 1\.000", str(report))
        and report.samples["model"]["prompts"] == report.samples["baseline"]["prompts"]
    )
