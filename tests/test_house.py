"""House rules that no single notebook can test: what holds for all of them, for the library and for the tree."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(
    path for path in NBS.rglob("*.ipynb") if not path.name.startswith("_") and ".ipynb_checkpoints" not in path.parts
)
LIBRARY = [path for path in NOTEBOOKS if path.parent != NBS]
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent == NBS and path.stem != "index"]
FLOORS = (  # a room imports from folders on floors before its own, and from lower numbers in its own folder
    ("base", "kernels"),
    ("models",),
    ("storage",),
    ("checkpoints",),
    ("evaluation",),
    ("training", "runtime"),
    ("methods",),
    ("serving", "jobs", "reports"),
    ("bench",),
    ("app",),
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
MAX_CELLS, MAX_EXPORTED_LINES, MAX_WIDTH = 60, 40, 120
MAX_FILE_BYTES, MAX_PUBLISHED_BYTES = 2_500_000, 40_000_000


def room(path):
    """A notebook's place: its folder and name, as in kernels/01_s4."""
    return path.relative_to(NBS).with_suffix("").as_posix()


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=room)
each_library = pytest.mark.parametrize("path", LIBRARY, ids=room)
each_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=room)


def cells(path, kind=None):
    return [cell for cell in json.loads(path.read_text())["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def is_exported(cell):
    return bool(re.match(r"#\|\s*exporti?\b", source(cell)))


def syntax_tree(cell):
    """The cell as Python; lines of IPython's own (%magic, !shell) are left out."""
    return ast.parse("\n".join(line for line in source(cell).split("\n") if not line.lstrip().startswith(("%", "!"))))


def module_of(path):
    """The module a notebook exports, or None."""
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(source(cell) for cell in cells(path, "code")), re.M)
    return found and found[1]


def tracked_files():
    """Every file of the project: in git, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# Notebooks


@each_notebook
def test_notebook_carries_no_outputs(path):
    for number, cell in enumerate(cells(path, "code")):
        assert (
            cell["outputs"] == [] and cell["execution_count"] is None
        ), f"code cell {number}: run `make clean-notebooks`"


@each_notebook
def test_notebook_is_short_enough_to_read(path):
    assert len(cells(path)) <= MAX_CELLS, f"more than {MAX_CELLS} cells: two notebooks"
    for cell in cells(path, "code"):
        assert max(map(len, source(cell).split("\n"))) <= MAX_WIDTH, f"a wider line than {MAX_WIDTH}: {source(cell)!r}"
        if is_exported(cell):
            lines = source(cell).count("\n") + 1
            assert lines <= MAX_EXPORTED_LINES, f"an exported cell of {lines} lines: {source(cell)[:80]!r}"


@each_library
def test_library_notebook_exports_the_module_of_its_room(path):
    assert re.fullmatch(r"\d\d[a-z]?_\w+", path.stem), "named by its number in the folder"
    number = path.stem.split("_")[0]
    assert len(list(path.parent.glob(f"{number}_*.ipynb"))) == 1, f"two notebooks have the number {number}"
    folder, module = path.parent.name, path.stem.split("_", 1)[1]
    assert module_of(path) == f"{folder}.{module}" and folder in FLOOR


@each_experiment
def test_experiment_exports_nothing(path):
    assert re.fullmatch(r"\d\d[a-z]?_\w+", path.stem)
    assert module_of(path) is None and not any(is_exported(cell) for cell in cells(path, "code"))


@each_experiment
def test_experiment_has_one_parameters_cell_of_literals(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell tagged `parameters`"
    parameters = {}
    for statement in syntax_tree(tagged[0]).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1, ast.unparse(statement)
        parameters[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert {"preset", "seed", "out_dir", "data_dir"} <= parameters.keys()
    assert parameters["preset"] == "smoke" and parameters["out_dir"] == "" and parameters["data_dir"] == ""


def imported_rooms(path):
    """The modules of this project that a notebook imports, as folder.module."""
    for cell in cells(path, "code"):
        for node in ast.walk(syntax_tree(cell)):
            if isinstance(node, ast.Import):
                yield from (a.name.removeprefix("itera_lite.") for a in node.names if a.name.startswith("itera_lite."))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("itera_lite."):
                inner = node.module.removeprefix("itera_lite.")
                yield from [inner] if "." in inner else [f"{inner}.{alias.name}" for alias in node.names]


@each_library
def test_library_notebook_imports_only_downwards(path):
    numbers = {module_of(other): other.stem for other in LIBRARY}
    folder = path.parent.name
    for module in imported_rooms(path):
        other = module.split(".")[0]
        assert module in numbers, f"{room(path)} imports {module}, which no notebook exports"
        if other == folder:
            assert numbers[module] <= path.stem, f"{room(path)} imports {module}, which has a higher number"
        else:
            assert FLOOR[other] < FLOOR[folder], f"{room(path)} imports {module} from floor {FLOOR[other] + 1}"


@each_experiment
def test_experiment_imports_modules_that_exist(path):
    assert set(imported_rooms(path)) <= {module_of(other) for other in LIBRARY}


@each_notebook
def test_links_lead_somewhere(path):
    """A link to another notebook or file names one that is there; the index is read from the project's root."""
    home = ROOT if path.stem == "index" else path.parent
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", link)]
    assert not [link for link in links if not (home / link).exists()]


# The library


def test_library_and_notebooks_are_in_sync(tmp_path):
    """Exporting and cleaning in a copy changes nothing: no stale module, no orphan, no stray metadata."""
    for name in ("nbs", "itera_lite", "settings.ini", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in project_files(tmp_path)}
    for module in (tmp_path / "itera_lite").rglob("*.py"):
        if "AUTOGENERATED" in module.read_text() or module.name == "_modidx.py":
            module.unlink()
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=tmp_path, check=True, capture_output=True, text=True)
    after = {path.relative_to(tmp_path): path.read_bytes() for path in project_files(tmp_path)}
    changed = sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"run `make export clean-notebooks`, and delete modules without a notebook: {changed}"


def project_files(root):
    return [path for folder in ("nbs", "itera_lite") for path in (root / folder).rglob("*")
            if path.is_file() and path.suffix in {".py", ".ipynb", ".typed"} and ".ipynb_checkpoints" not in path.parts]


def test_library_reads_no_pickle():
    """A pickle from outside runs code when it is read; the project's formats are safetensors and JSON."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in (ROOT / "itera_lite").rglob("*.py"):
        if path.relative_to(ROOT).as_posix() == "itera_lite/checkpoints/sandbox.py":
            continue  # the one door for such files: tests/test_untrusted.py watches it
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not modules & {alias.name.split(".")[0] for alias in node.names}, f"{path.name}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in modules, f"{path.name}:{node.lineno}"
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "torch.save"} and not called.endswith(
                    "read_pickle"
                ), f"{path.name}:{node.lineno}"
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"{path.name}:{node.lineno}"


def test_library_lines_are_no_wider_than_the_notebooks():
    """Every line of every module; the list of names that nbdev writes at its own width is left out."""
    for path in (ROOT / "itera_lite").rglob("*.py"):
        if path.name == "_modidx.py":
            continue
        text = re.sub(r"^__all__ = \[.*?\]$", "", path.read_text(), flags=re.M | re.S)
        wide = [line for line in text.split("\n") if len(line) > MAX_WIDTH]
        assert not wide, f"{path.relative_to(ROOT)}: {wide[0]}"


def test_every_module_of_the_index_imports():
    modules = [module for module in map(module_of, NOTEBOOKS) if module]
    code = "; ".join(f"import itera_lite.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The tree


def test_constraints_pin_all_that_an_installation_needs():
    """Everything that the project and its extras require, directly or not, in the version that is tested here."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    seen, waiting = set(), [Requirement(line) for line in project["dependencies"] + extras]
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        installed = distribution(requirement.name)
        assert (
            pins.get(key[0]) == installed.version.partition("+")[0]
        ), f"constraints.txt: {requirement.name} is {installed.version} here"
        for line in installed.requires or []:
            needed = Requirement(line)
            if any(
                needed.marker is None or needed.marker.evaluate({"extra": extra})
                for extra in requirement.extras or {""}
            ):
                waiting.append(needed)


def test_no_file_is_too_large():
    sizes = {path: path.stat().st_size for path in tracked_files()}
    assert not {str(path): size for path, size in sizes.items() if size > MAX_FILE_BYTES}
    published = sum(size for path, size in sizes.items() if (ROOT / "papermill_runs/published") in path.parents)
    assert published <= MAX_PUBLISHED_BYTES


def test_no_absolute_path_of_a_machine():
    # spelt with a class each, so that this file does not find itself
    folders = re.compile(rb"(?<![\w.:/~$}])/(?:[h]ome|[r]oot|[U]sers|[w]ork|[t]mp|[s]cratch)/[\w.]")
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if path.suffix not in {".safetensors", ".png"} and folders.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {folders.search(line)[0].decode()}")
    assert not found


MAX_README_LINES = 120


def test_readme_is_what_the_index_notebook_gives(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    subprocess.run(
        [
            "make", "--no-print-directory", "--assume-old=.venv/.ready", f"BIN={BIN}", f"README={tmp_path}/README.md",
            "readme",
        ],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
    )
    readme = (tmp_path / "README.md").read_text()
    assert readme == (ROOT / "README.md").read_text(), "run `make readme`"
    assert readme.count("\n") <= MAX_README_LINES, "README fits a screen or three: long tables have a page of their own"


def test_pages_beside_readme_are_what_records_and_notebooks_give():
    from itera_lite.reports.front_page import generated

    for name, text in generated(ROOT).items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}: run `make readme`"


PAGES = ("README.md", "CONTRIBUTING.md", "nbs/README.md", "papermill_runs/README.md",
         "papermill_runs/published/README.md")


@pytest.mark.parametrize("path", PAGES)
def test_links_of_pages_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / path).read_text(encoding="utf-8"))
    assert not [link for link in links if not re.match(r"\w+:", link) and not ((ROOT / path).parent / link).exists()]
