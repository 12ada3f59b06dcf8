"""The report as a reader meets it: in a real browser without a network, from notebooks that papermill really ran."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from bs4 import BeautifulSoup

from itera_lite.base.core import RunError
from itera_lite.base.record import Criteria, Record, Row, start_run
from itera_lite.reports.entries import find_entries
from itera_lite.reports.numbers import SHOW, disagreements, resolve
from itera_lite.reports.pages import external_loads
from itera_lite.reports.readme import readme_table
from itera_lite.reports.report import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=8000",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]

# Ends as papermill leaves it: one notebook that ran through, one whose second cell of its own fails.
GOOD = [
    "md:# Measured\n\nWith $h_t = e^{\\Delta_t A} h_{t-1}$.",
    "parameters:n = 2",
    "import plotly.graph_objects as go",
    "go.Figure([go.Scatter(x=[0, 1, n], y=[0, 1, 4]), go.Scatter(x=[0, 1, n], y=[1, 1, 1])], layout_title='Squares')",
]
BAD = ["parameters:experts = 2", "assert experts < 3, f'top-{experts} of 2 experts'", "print('never reached')"]


def run_by_papermill(folder, cells, **parameters):
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    )
    for text in cells:
        kind, _, source = text.partition(":") if text.startswith(("md:", "parameters:")) else ("code", "", text)
        tags = {"tags": ["parameters"]} if kind == "parameters" else {}
        nb.cells.append(
            nbformat.v4.new_markdown_cell(source) if kind == "md" else nbformat.v4.new_code_cell(source, metadata=tags)
        )
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder / "source.ipynb")
    try:
        papermill.execute_notebook(
            folder / "source.ipynb", folder / "report.ipynb", parameters=parameters, progress_bar=False
        )
    except papermill.PapermillExecutionError:
        pass
    (folder / "source.ipynb").unlink()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two notebooks; its record says what these tests need, about nothing."""
    folder = tmp_path_factory.mktemp("runs") / "tests"
    run = start_run("07_good", out_dir=str(folder / "07_good"))
    rows = [
        Row(
            name="fp32", technique="none", file_bytes=4000, ratio=1, bits_per_byte=2.0, bits_per_byte_ci95=[1.9, 2.1],
            perplexity=9.5,
        ),
        Row(
            name="int8 <b>", technique="rounding", file_bytes=1000, ratio=4.0, bits_per_byte=2.003,
            bits_per_byte_ci95=[1.903, 2.103], perplexity=9.53, perplexity_change_percent=0.31,
            perplexity_change_ci95=[0.2, 0.42],
        ),
        Row(name="cut", technique="pruning", status="failed", reason="conv1d got 192 channels for 211"),
    ]
    criteria = Criteria(target_ratio=3.8, max_ppl_change_percent=0.5)
    criteria.judge(4.0, 0.31, 0.42)
    points = [
        dict(step=1, tokens=100, seconds=1.5, train_bpb=3.0, val_bpb=3.1),
        dict(step=2, tokens=200, seconds=3.0, val_bpb=2.5),
    ]
    run.finish("rows made up for a test", rows, "fp32", criteria=criteria, curves={"fp32": points})
    run_by_papermill(folder / "07_good", GOOD, n=3)
    run_by_papermill(folder / "08_bad", BAD, experts=3)
    return folder


@pytest.fixture(scope="module")
def site(run_folder, tmp_path_factory):
    return build_report(run_folder, tmp_path_factory.mktemp("site")).parent


def opened(page, width=1400):
    """The page's elements after Chromium ran its scripts, with no server to be reached."""
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: install chromium to test that figures are drawn and pages fit a phone")
    command = [CHROMIUM, *FLAGS, f"--window-size={width},2000", "--dump-dom", page.resolve().as_uri()]
    return BeautifulSoup(
        subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout, "html.parser"
    )


def test_pages_load_nothing_from_a_server(site):
    pages = sorted(site.glob("*.html"))
    assert [page.name for page in pages] == ["index.html", "tests.07_good.html", "tests.08_bad.html"]
    for page in pages:
        text = page.read_text()
        assert external_loads(text) == []
        loaded = [
            tag["src"]
            for tag in BeautifulSoup(text, "html.parser").find_all(src=True)
            if not tag["src"].startswith("data:")
        ]
        assert loaded == ["plotly.min.js"] and (site / "plotly.min.js").stat().st_size > 1_000_000


def test_a_figure_is_drawn_in_a_browser_without_network(site):
    page = opened(site / "tests.07_good.html")
    assert len(page.select("figure.plot .scatterlayer .trace")) == 2, "two lines in the notebook's figure"
    assert page.select_one("figcaption").text == "Squares" and page.find("math")
    overview = opened(site / "index.html")
    figures = overview.select("figure.plot")
    assert len(figures) == 2, "the training curve and the paired difference"
    assert all(figure.select(".scatterlayer .trace") for figure in figures)


def test_a_page_without_plotly_beside_it_says_so(site, tmp_path):
    canvas = opened(Path(shutil.copy(site / "index.html", tmp_path))).select_one("figure.plot .canvas")
    assert "plotly.min.js" in canvas.text


def test_pages_fit_a_phone(site, tmp_path):
    """Wide tables scroll by themselves; the page does not."""
    shutil.copy(site / "plotly.min.js", tmp_path)
    for page in site.glob("*.html"):
        measure = "() => { document.title = document.documentElement.scrollWidth + '/' + innerWidth }"
        script = f"<script>addEventListener('load', () => setTimeout({measure}, 2000))</script>"
        (tmp_path / page.name).write_text(page.read_text() + script)
        needed, given = map(int, opened(tmp_path / page.name, width=500).title.text.split("/"))
        assert given <= 500 and needed <= given, f"{page.name} is {needed} wide on a screen of {given}"


def test_a_failed_notebook_is_shown_as_failed(site, run_folder):
    status = {entry.notebook: entry.status for entry in find_entries(run_folder)}
    assert status["07_good"].state == "ok"
    assert (status["08_bad"].state, status["08_bad"].cell, status["08_bad"].error) == (
        "failed", 2, "AssertionError: top-3 of 2 experts",
    )
    for page in ("index.html", "tests.08_bad.html"):
        text = BeautifulSoup((site / page).read_text(), "html.parser")
        assert "top-3 of 2 experts" in text.text and "failed" in [badge.text for badge in text.select(".badge.bad")]


def test_a_killed_notebook_is_shown_as_failed(run_folder, tmp_path):
    """What a dead kernel leaves: no error, the runner's mark, and cells without an execution count."""
    folder = shutil.copytree(run_folder / "07_good", tmp_path / "killed" / "03_training")
    nb = nbformat.read(folder / "report.ipynb", as_version=4)
    nb.cells[-1].update(outputs=[], execution_count=None)
    nbformat.write(nb, folder / "report.ipynb")
    assert find_entries(tmp_path)[0].status.state == "interrupted"
    nb.cells[-1].metadata.papermill.update(status="failed", exception=True)
    nbformat.write(nb, folder / "report.ipynb")
    assert find_entries(tmp_path)[0].status.state == "failed"


def test_every_number_stands_in_the_record_it_names(site, run_folder):
    records = {f"tests/{path.parent.name}": json.loads(path.read_text()) for path in run_folder.glob("*/metrics.json")}
    numbers = BeautifulSoup((site / "index.html").read_text(), "html.parser").find_all("data")
    assert len(numbers) > 25
    for tag in numbers:
        key, _, pointer = tag["data-source"].partition("#")
        value = resolve(records[key], pointer)
        assert float(tag["value"]) == value and tag.text == SHOW[tag["data-show"]](value)


def test_a_table_cell_without_address_is_a_dash_with_a_reason(site):
    page = BeautifulSoup((site / "index.html").read_text(), "html.parser")
    cells = page.select("td.n")
    assert len(cells) > 15
    for cell in cells:
        assert cell.find("data") or cell.select_one(".dash")["title"], cell
    assert "conv1d got 192 channels" in str(page) and "int8 &lt;b&gt;" in str(page)


def test_a_changed_record_changes_the_page(site, run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "tests")
    record = Record.read(copy / "07_good")
    record.results[1].perplexity_change_percent = 0.77
    record.curves["fp32"][1]["val_bpb"] = 2.25
    record.write(copy / "07_good")
    old = (site / "index.html").read_text()
    stale = disagreements(old, find_entries(copy))
    changed = {"/results/1/perplexity_change_percent", "/curves/fp32/1/val_bpb"}
    assert {line.partition(":")[0] for line in stale} == {f"tests/07_good#{pointer}" for pointer in changed}
    new = build_report(copy).read_text()
    assert "+0.77" in new and "+0.77" not in old and "2.2500" in new
    assert "+0.77" in readme_table([record])
    assert "No row keeps that limit" in new and "No row keeps that limit" not in old, "the sentence follows the value"


def test_a_report_of_nothing_is_one_line(tmp_path):
    with pytest.raises(
        RunError, match="^nothing to report in .*: no metrics.json or report.ipynb there or below; run "
    ):
        build_report(tmp_path)
    called = subprocess.run(
        [Path(sys.executable).parent / "itera-lite", "report", str(tmp_path)], capture_output=True, text=True
    )
    assert called.returncode != 0 and "Traceback" not in called.stderr and len(called.stderr.strip().splitlines()) == 1
    assert re.search("nothing to report", called.stderr) and not list(tmp_path.iterdir())


def test_runs_of_one_name_are_told_apart(run_folder, tmp_path):
    for place in "ab":
        (tmp_path / place / "tests" / "07_good").mkdir(parents=True)
        shutil.copy(run_folder / "07_good" / "metrics.json", tmp_path / place / "tests" / "07_good")
    entries = find_entries([tmp_path / "a" / "tests", tmp_path / "b" / "tests"])
    assert len({entry.run for entry in entries}) == 2
    assert (
        disagreements(
            build_report([tmp_path / "a" / "tests", tmp_path / "b" / "tests"], tmp_path / "site").read_text(), entries
        )
        == []
    )
