"""A pruned model is described by its folder alone: what a process that never saw the pruning makes of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from itera_lite.base.core import CheckpointError
from itera_lite.checkpoints.folder import load_model, model_bytes, save_model
from itera_lite.methods.channels import GROUPS, find_sites, mask_model, slice_model, why_not
from itera_lite.methods.prune import make_plan, prune_model, prune_unstructured, sparsity
from itera_lite.models.config import config_from_dict
from itera_lite.models.model import build_model
from itera_lite.storage.precision import compress_model

SMALL = dict(vocab_size=60, hidden_size=32, num_layers=4, max_seq_length=48)
SSM_ONLY = dict(norm="rmsnorm", feed_forward=False, tie_embeddings=False, positions="none")
KINDS = {
    "s4": dict(SMALL, expert_size=16),
    "mamba": dict(SMALL, kernel="mamba", ssm_dt_rank=4, expert_size=16),
    "mamba2": dict(SMALL, kernel="mamba2", ssm_head_size=8, ssm_groups=2, expert_size=16),
    "mamba converted": dict(SMALL, kernel="mamba", ssm_dt_rank=4, **SSM_ONLY),
    "mamba2 converted": dict(SMALL, kernel="mamba2", ssm_head_size=8, ssm_groups=4, **SSM_ONLY),
    "transformer": dict(SMALL, model_type="transformer", ffn_size=64),
}
FRESH = """
import json, sys, torch
from itera_lite.checkpoints.folder import load_model
folder, out = sys.argv[1:]
model, ids = load_model(folder), torch.arange(1, 21)[None]
with torch.no_grad():
    logits = model(ids)
    last, state = model.prefill(ids[:, :-1])
    step, _ = model.step(ids[:, -1], state)
shapes = {n: list(p.shape) for n, p in model.named_parameters()}
torch.testing.assert_close(step, logits[:, -1], atol=1e-4, rtol=1e-4)
modules = [m for m in sys.modules if m.startswith("itera_lite.methods.")]
json.dump(dict(logits=logits.tolist(), shapes=shapes, modules=modules), open(out, "w"))
"""


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    model = build_model(config_from_dict(KINDS[kind])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def fractions_of(model):
    """Half of every group that the model has, a quarter of its layers."""
    return {group: 0.25 if group == "layers" else 0.5 for group in GROUPS if not why_not(model, group)}


def fresh(folder, tmp_path):
    out = tmp_path / "answer.json"
    ended = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), str(out)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_folder_runs_in_a_fresh_process(kind, tmp_path):
    model = model_of(kind)
    ids = torch.arange(1, 21)[None]
    batches = [(torch.randint(0, 60, (2, 16)), torch.randint(0, 60, (2, 16)))]
    plan = make_plan(model, fractions_of(model), calibration=batches)
    small, folder = slice_model(model, plan), tmp_path / "pruned"
    save_model(small, folder)
    answer = fresh(folder, tmp_path)
    assert not answer["modules"], "a pruned folder needs nothing of the methods that made it"
    assert answer["shapes"] == {n: list(p.shape) for n, p in small.named_parameters()}
    with torch.no_grad():
        expected, masked = small(ids), mask_model(model, plan)(ids)
    assert torch.equal(torch.tensor(answer["logits"]), expected)
    assert (expected - masked).abs().max() < 1e-5 * masked.abs().max()
    whole = save_model(model, tmp_path / "whole")
    assert model_bytes(folder)[0] < 0.75 * model_bytes(whole)[0]


def test_pruned_model_can_be_packed_and_pruned_again(tmp_path):
    model = model_of("s4")
    once = prune_model(model, {"d_inner": 0.25, "layers": 0.25}, importance="magnitude")
    small = prune_model(once, {"d_inner": 0.5, "experts": 0.25}, importance="magnitude")
    assert [small.config.layer(i).d_inner for i in range(3)] == [24] * 3 and small.config.num_experts == 3
    packed = compress_model(small, {"*": "int8"})
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        assert torch.equal(load_model(save_model(packed, tmp_path / "packed"))(ids), packed(ids))


def altered(folder, change):
    """A folder whose configuration was changed on purpose: its own checksum taken out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["architecture"])
    del config["sha256"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop("layer_sizes"), "its configuration says"),
        (lambda a: a["layer_sizes"].update(d_inner=[48, 48, 48, 47]), "its configuration says"),
        (lambda a: a["layer_sizes"].update(d_inner=[48] * 3), "3 values"),
        (lambda a: a["layer_sizes"].update(d_inner=[48, 48, 48, 65]), "allowed 1 … 64"),
        (lambda a: a["layer_sizes"].update(hidden_size=[16] * 4), "unknown width"),
        (lambda a: a.update(layer_sizes="narrow"), "layer_sizes"),
        (lambda a: a["layer_sizes"].update(num_experts=[None, 1, None, 4]), "top_k_experts"),
    ],
)
def test_sizes_that_the_tensors_contradict_are_one_line(change, says, tmp_path):
    folder = save_model(prune_model(model_of("s4"), {"d_inner": 0.25}, importance="magnitude"), tmp_path / "pruned")
    altered(folder, change)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_was_not_pruned_is_written_as_before(tmp_path):
    folder = save_model(model_of("s4"), tmp_path / "whole")
    assert "layer_sizes" not in (folder / "config.json").read_text() + (folder / "README.md").read_text()


def test_published_folders_still_load():
    root = Path(__file__).resolve().parents[1] / "papermill_runs/published"
    folders = [path.parent for path in root.rglob("config.json") if (path.parent / "README.md").exists()]
    for folder in folders:
        model = load_model(folder)
        assert model.config.layer_sizes is None or "pruned" in model.card


def test_inspect_understands_a_pruned_folder(tmp_path):
    folder = save_model(prune_model(model_of("s4"), {"d_inner": 0.25}, importance="magnitude"), tmp_path / "pruned")
    ended = subprocess.run(
        [sys.executable, "-m", "itera_lite.app.cli", "inspect", str(folder)], capture_output=True, text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "layer_sizes" in ended.stdout and "contradict" not in ended.stdout


def test_pruned_model_in_transformers():
    pytest.importorskip("transformers", minversion="5")
    from itera_lite.checkpoints.causal_lm import wrap

    small = prune_model(model_of("s4"), {"d_inner": 0.25}, importance="magnitude")
    wrapped, ids = wrap(small), torch.arange(1, 21)[None]
    assert wrapped.config.native() == small.config
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, small(ids))


@pytest.mark.parametrize("kind", ["s4", "mamba2", "transformer"])
def test_zeros_survive_the_folder(kind, tmp_path):
    sparse = prune_unstructured(model_of(kind), 0.5)
    folder = save_model(sparse, tmp_path / "sparse")
    assert sparsity(load_model(folder)) == sparsity(sparse) > 0.2


def test_every_site_is_found_once():
    for kind in KINDS:
        model = model_of(kind)
        for group in GROUPS:
            sites = find_sites(model, group)
            assert len({(s.path, s.group) for s in sites}) == len(sites)
            for site in sites:
                touched = torch.cat([s.owner.flatten() for s in site.slices])
                assert set(touched.tolist()) - {-1} == set(range(site.units)), (kind, group)
