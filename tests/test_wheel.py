"""The wheel built from this tree installs and runs `itera-lite doctor` away from the tree."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "itera_lite")  # what a wheel is made of


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy: setuptools leaves build folders where it works."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def facts_of(environment, folder):
    """What the installed command says of itself; the tree is not on its path."""
    python = environment / "bin" / "python"
    where = run(python, "-c", "import itera_lite; print(itera_lite.__file__)", cwd=folder).strip()
    assert Path(where).is_relative_to(environment), where
    assert "Python" in run(environment / "bin" / "itera-lite", "doctor", cwd=folder)
    return json.loads(run(environment / "bin" / "itera-lite", "doctor", "--json", cwd=folder))


def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "itera_lite").rglob("*.py")}
    static = (ROOT / "itera_lite/reports/static").iterdir()
    data = {"itera_lite/py.typed"} | {path.relative_to(ROOT).as_posix() for path in static}
    assert modules | data <= names
    metadata = {name for name in names if ".dist-info/" in name}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert names - metadata == modules | data


def test_wheel_runs_doctor(wheel, tmp_path):
    """The wheel alone in a fresh environment that borrows this one's dependencies (the slow test installs them)."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel,
        cwd=tmp_path,
    )
    # a folder named in a .pth file serves its packages, but its .pth files (the tree's editable install) are not read
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert facts_of(environment, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_installs_all_it_needs_and_runs_doctor(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    assert facts_of(environment, tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
