"""Preflight finds each failure of the first version's jobs, and nothing where there is nothing."""

import pytest

from itera_lite.base.core import PRESETS
from itera_lite.jobs import preflight as module
from itera_lite.jobs.cluster import NodeKind, Partition
from itera_lite.jobs.faults import FAULTS, caught
from itera_lite.jobs.notebooks import PIPELINE
from itera_lite.jobs.preflight import preflight

LARGE = [Partition(name="all", default=True, nodes=[NodeKind(count=8, cpus=64, memory_mb=512_000, gpus=8)])]


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.number}" for f in FAULTS])
def test_each_failure_of_the_first_version_is_caught(fault, tmp_path):
    found = caught(fault, tmp_path)
    assert found, fault.happened
    assert all("\n" not in str(f) for f in found)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_shipped_notebook_raises_a_false_alarm(preset, monkeypatch):
    monkeypatch.setattr(module, "check_corpora", lambda steps, data_dir: None)  # the corpora may not be here
    found = preflight([n for n in PIPELINE if preset == "smoke" or n != "03_training"] + ["03"], preset, offered=LARGE)
    assert found.ok, str(found)
