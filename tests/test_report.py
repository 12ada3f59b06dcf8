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
from itera_lite.base.record import Criteria, DataInfo, Record, Row, start_run
from itera_lite.reports.entries import find_entries
from itera_lite.reports.numbers import HOW, SHOW, disagreements, resolve, sources
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
    "import plotly.graph_objects as go\nfrom IPython.display import Markdown",
    "print(f'07_good in effect: n={n}')",
    "Markdown('| row | value |\\n|:--|--:|\\n' + '\\n'.join(f'| r{i} | {i} |' for i in range(20)))",
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
        *(
            Row(
                name=f"nf4, seed {seed}", technique="training", file_bytes=500, ratio=8.0,
                bits_per_byte=2.01 + seed / 100, perplexity=9.6 + seed, perplexity_change_percent=2.0 + seed,
                perplexity_change_ci95=[1.5 + seed, 2.5 + seed],
            )
            for seed in range(3)
        ),
    ]
    data = DataInfo(
        corpus="made up", sha256={"test": "0" * 64}, tokenizer_sha256="0" * 64, vocab_size=10, eval_bytes=1000,
    )
    criteria = Criteria(target_ratio=3.8, max_ppl_change_percent=0.5)
    criteria.judge(4.0, 0.31, 0.42)
    points = [
        dict(step=1, tokens=100, seconds=1.5, train_bpb=3.0, val_bpb=3.1),
        dict(step=2, tokens=200, seconds=3.0, val_bpb=2.5),
    ]
    run.finish(
        "int8 <b> is made up for a test.", rows, "fp32", data=data, criteria=criteria, curves={"fp32": points},
        findings=["So is the rest."],
    )
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
    assert len(figures) == 3, "quality against size; behind a fold the training curve and the paired difference"
    drawn = [bool(figure.select(".scatterlayer .trace")) for figure in figures]
    assert drawn == [True, False, False], "what is behind a fold is drawn when it is opened"
    assert {"trained with rounding inside", "rounded after training", "as trained"} & {
        button.text.split(" ", 1)[1] for button in figures[0].select("ul.legend button")
    }


def measured(page, tmp_path, script, width):
    """What a script finds in a page after its figures were drawn, on a screen of some width."""
    shutil.copy(page.parent / "plotly.min.js", tmp_path)
    tell = f"() => {{ document.title = JSON.stringify({script}) }}"
    late = f"<script>addEventListener('load', () => setTimeout({tell}, 2000))</script>"
    narrow = f"<style>body {{ max-width: {width}px; }}</style>"  # a window of chromium has at least 500 pixels
    (tmp_path / page.name).write_text(page.read_text() + narrow + late)
    return json.loads(opened(tmp_path / page.name, width=max(500, width)).title.text)


@pytest.mark.parametrize("width", [400, 1300])
def test_the_figure_of_the_overview_leaves_room_for_its_plot(site, tmp_path, width):
    """Axes take at least three fifths of the figure's width and height, legend included, on a phone too."""
    script = """(() => { const box = document.querySelector("figure.plot");
        const plot = box.querySelector(".canvas")._fullLayout._size, whole = box.getBoundingClientRect();
        return [plot.w/whole.width, plot.h/whole.height, whole.width] })()"""
    across, up, wide = measured(site / "index.html", tmp_path, script, width)
    assert wide <= width and across >= 0.6 and up >= 0.6, (across, up, wide)


@pytest.mark.parametrize("width", [400, 1300])
def test_nothing_of_a_report_lies_beyond_its_column(site, tmp_path, width):
    """Outputs end where the text ends; what is wider scrolls within."""
    script = """[...document.querySelectorAll(".jp-OutputArea-output, figure.plot")].map(box =>
        box.getBoundingClientRect().right - document.querySelector("main .jp-Cell").getBoundingClientRect().right)"""
    beyond = measured(site / "tests.07_good.html", tmp_path, script, width)
    assert len(beyond) >= 3 and max(beyond) <= 0, beyond


def test_a_reader_sees_text_tables_and_figures_and_code_on_request(site, run_folder):
    page = BeautifulSoup((site / "tests.07_good.html").read_text(), "html.parser")
    inputs = page.select(".jp-CodeCell .jp-Cell-inputWrapper")
    assert len(inputs) >= 4 and all(code.find_parent("details", class_="code") for code in inputs)
    assert not page.select("details.code[open]") and page.select_one("button#code").text == "show all code"
    quiet = page.select_one("details.code")
    assert "in effect" in quiet.text and quiet.summary.text.startswith("code, "), "settings are behind a fold"
    for shown in ("figure.plot", "table"):
        assert not page.select_one(f"main {shown}").find_parent("details")
    failed = BeautifulSoup((site / "tests.08_bad.html").read_text(), "html.parser").select("details.code[open]")
    assert len(failed) == 1 and "assert experts" in failed[0].text


def test_a_report_opens_with_its_abstract(site, run_folder, tmp_path):
    """Made from the record, or the runner's own cell where there is one; below the title, before the rest."""
    def opening(page):
        return [cell.text for cell in BeautifulSoup(page, "html.parser").select(".jp-MarkdownCell")][:3]
    record = Record.read(run_folder / "07_good")
    title, abstract, rest = opening((site / "tests.07_good.html").read_text())
    assert "Measured" in title and "So is the rest." in abstract and "SUCCESS" in abstract and "With" in rest
    assert record.setup()["Run"][:30] in abstract
    folder = shutil.copytree(run_folder / "07_good", tmp_path / "tests" / "07_good")
    nb = nbformat.read(folder / "report.ipynb", as_version=4)
    own = nbformat.v4.new_markdown_cell("**Written by the runner.**", metadata={"tags": ["itera-lite-abstract"]})
    nb.cells.insert(1, own)
    nbformat.write(nb, folder / "report.ipynb")
    title, abstract, rest = opening((build_report(tmp_path / "tests").parent / "tests.07_good.html").read_text())
    assert "Measured" in title and abstract.strip() == "Written by the runner." and "With" in rest


def test_long_tables_show_twelve_rows(site, tmp_path):
    script = """[[...document.querySelectorAll("main tbody tr")].filter(row => row.getClientRects().length).length,
        document.querySelector("button.more").textContent]"""
    assert measured(site / "tests.07_good.html", tmp_path, script, 1300) == [12, "8 more rows"]


def test_the_overview_has_contents_headlines_and_findings(site):
    page = BeautifulSoup((site / "index.html").read_text(), "html.parser")
    targets = {a["href"].lstrip("#") for a in page.select("nav.contents a")}
    assert {"run-tests", "tests-07-good"} <= targets and all(page.find(id=target) for target in targets)
    assert page.select_one(".verdict p").text == "int8 <b> is made up for a test."
    assert [item.text for item in page.select(".verdict li")] == ["So is the rest."]
    assert "target_ratio" in page.text and "max_ppl_change_percent" in page.text, "who asked for it"


def test_seeds_are_one_line_and_name_all_their_sources(site, run_folder):
    page = BeautifulSoup((site / "index.html").read_text(), "html.parser")
    line = next(row for row in page.select("tr") if row.b and row.b.text == "nf4")
    assert "3 seeds" in line.text and not line.find_parent("details")
    mean = line.select_one('data[data-how="mean"][data-source*="perplexity_change_percent"]')
    assert mean.text == "+3.00" and [s.partition("#")[2] for s in sources(mean)] == [
        f"/results/{i}/perplexity_change_percent" for i in (3, 4, 5)
    ]
    assert {d["data-how"]: d.text for d in line.select('data[data-source*="_change_percent"]')} == {
        "mean": "+3.00", "least": "+2.00", "most": "+4.00",
    }
    single = [row.b.text for row in page.select("details tr") if row.b]
    assert single == ["nf4, seed 0", "nf4, seed 1", "nf4, seed 2"]
    entries = find_entries(run_folder)
    for wrong in (mean.text.replace("+3.00", "+2.00"), "+3.01"):
        assert disagreements(str(mean).replace(">+3.00<", f">{wrong}<"), entries)


def test_a_run_that_missed_its_limit_says_so(run_folder, tmp_path):
    """The uncompressed model keeps every limit; it is no answer."""
    for name, change in (("a", 0.0), ("b", 9.0)):
        record = Record.read(run_folder / "07_good")
        record.results = [record.results[0], record.results[0].model_copy(update=dict(
            name="trained on", perplexity_change_percent=0.0, perplexity_change_ci95=[0.0, 0.0])),
            record.results[1].model_copy(update=dict(
                perplexity_change_percent=change, perplexity_change_ci95=[change, change]))]
        (tmp_path / "runs" / name / "07_good").mkdir(parents=True)
        record.write(tmp_path / "runs" / name / "07_good")
    page = BeautifulSoup(build_report(tmp_path / "runs").read_text(), "html.parser")
    lines = {row.th.text: row.text for row in page.select('[aria-label="All runs"] tbody tr')}
    assert "int8 <b>" in lines["a"] and "none reached the limit" in lines["b"] and "trained on" not in lines["b"]


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
        named = [source.partition("#") for source in sources(tag)]
        values = [resolve(records[key], pointer) for key, _, pointer in named]
        value = HOW[tag["data-how"]](values) if "data-how" in tag.attrs else values[0]
        assert len(values) == 1 or "data-how" in tag.attrs
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
    missed = "No smaller row keeps that limit"
    assert missed in new and missed not in old, "the sentence follows the value"


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
