"""Configurations of every kind, read back from nothing but names and shapes; and what no shape can hide."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from itera_lite.base.core import CheckpointError
from itera_lite.checkpoints.checks import FIRST_VERSION_MAP, first_seam
from itera_lite.checkpoints.folder import save_model
from itera_lite.checkpoints.inference import infer, meaning
from itera_lite.checkpoints.inspector import inspect
from itera_lite.checkpoints.layouts import LAYOUTS, config_to_hf, from_native, rename, to_native
from itera_lite.checkpoints.untrusted import read_foreign
from itera_lite.methods.channels import find_sites, slice_model
from itera_lite.models.config import config_from_dict, named_config
from itera_lite.models.model import build_model
from itera_lite.storage.packed import storage_bytes
from itera_lite.storage.precision import compress_model

LEGACY = Path(__file__).resolve().parents[2] / "shared/legacy"
# leave no trace in shapes
FREE = {"dropout", "layer_norm_eps", "load_balance_loss_weight", "ssm_dt_limit", "tie_embeddings", "num_heads"}


def numbers(low, high):
    return st.integers(low, high)


@st.composite
def configs(draw):
    """Any configuration that this project can build, small."""
    flag = lambda: draw(st.booleans())  # noqa: E731
    layers, hidden = draw(numbers(1, 4)), draw(numbers(1, 12))
    fields = {
        "vocab_size": draw(numbers(1, 20)), "hidden_size": hidden, "num_layers": layers,
        "max_seq_length": draw(numbers(1, 9)),
    }
    fields |= {
        "positions": draw(st.sampled_from(["learned", "none"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])), "tie_embeddings": flag(),
    }
    if draw(numbers(0, 9)) == 0:
        heads = draw(st.sampled_from([h for h in range(1, hidden + 1) if hidden % h == 0]))
        return config_from_dict(
            fields | {"model_type": "transformer", "num_heads": heads, "ffn_size": draw(numbers(1, 9))}
        )
    kernel, expand = draw(st.sampled_from(["s4", "mamba", "mamba2"])), draw(numbers(1, 4))
    fields |= {
        "kernel": kernel, "ssm_expand_factor": expand, "ssm_state_size": draw(numbers(1, 9)),
        "ssm_conv_kernel": draw(numbers(1, 5)),
    }
    fields |= {"conv_bias": flag(), "proj_bias": flag(), "feed_forward": flag()}
    if kernel == "mamba":
        fields["ssm_dt_rank"] = draw(st.none() | numbers(1, 6))
    if kernel == "mamba2":
        inner = expand * hidden
        head = draw(st.sampled_from([p for p in range(1, inner + 1) if inner % p == 0]))
        groups = draw(st.sampled_from([g for g in range(1, inner // head + 1) if (inner // head) % g == 0]))
        fields |= {"ssm_head_size": head, "ssm_groups": groups, "ssm_dt_limit": draw(st.none() | st.just((0.01, 0.2)))}
    if fields["feed_forward"]:
        experts = draw(numbers(0, 12))
        mixtures = draw(st.none() | st.sets(numbers(0, layers - 1)).map(sorted).map(tuple))
        fields |= {
            "num_experts": experts, "top_k_experts": draw(numbers(min(1, experts), experts)),
            "expert_size": draw(numbers(1, 9)), "moe_layers": mixtures,
        }
    return config_from_dict(fields)


def tensors_of(config):
    """Tensors of a model's names and shapes, the head unlike the embedding."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    return {n: torch.ones(t.shape) if n == "lm_head.weight" else torch.zeros(t.shape) for n, t in state.items()}


def layouts_of(config, tensors):
    """The layouts that have a place for every tensor."""
    if config.model_type == "transformer":
        return []
    published = ["published", "published older", "published moe.moe"] * (config.kernel == "s4")
    face = [config.kernel, "mamba_ssm"] * (
        config.kernel != "s4" and not config.feed_forward and config.norm == "rmsnorm" and config.positions == "none"
    )
    out = ["native"]
    for layout in published + face:
        family = "published" if layout in published else "hugging face"
        if all(rename(n, LAYOUTS[family])[0] for n in from_native(tensors, layout)):
            out.append(layout)
    return out


def determined(config):
    """The fields that shapes tell, by effective value."""
    fields = config.model_dump(exclude=FREE)
    if config.tie_embeddings is False:
        fields["tie_embeddings"] = False
    if config.positions == "none":
        del fields["max_seq_length"]
    if config.model_type == "transformer":
        return fields
    fields |= {f: meaning(f, fields[f], fields) for f in ("moe_layers", "ssm_dt_rank", "ssm_head_size")}
    mixtures = fields["moe_layers"] = config.mixture_layers
    for field, kernel in (("ssm_dt_rank", "mamba"), ("ssm_head_size", "mamba2")):
        if config.kernel != kernel:
            del fields[field]
    del fields["ssm_groups"]
    if config.kernel == "mamba2":
        del fields["ssm_state_size"]
    if not mixtures:
        del fields["num_experts"]
    if not mixtures or config.num_experts > 1:
        del fields["top_k_experts"]
    if not config.feed_forward or (len(mixtures) == config.num_layers and not config.num_experts):
        del fields["expert_size"]
    return fields


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
@example(config_from_dict({}))
@example(config_from_dict({"num_layers": 4, "num_experts": 0, "top_k_experts": 0, "moe_layers": (0, 1, 2, 3)}))
def test_shapes_give_back_every_field_they_determine(config):
    tensors, want = tensors_of(config), determined(config)
    found = [infer(tensors)]
    for layout in layouts_of(config, tensors):
        renamed = to_native(from_native(tensors, layout))
        assert renamed.tensors.keys() == tensors.keys()
        found.append(infer(renamed.tensors))
    for inference in found:
        values = {"model_type": inference.model_type} | inference.values
        assert not inference.contradictions
        assert values == want
        assert all(
            inference.witnesses.get(f)
            for f in values
            if f != "model_type" and not (f == "moe_layers" and not config.feed_forward)
        )
        assert not inference.values.keys() & inference.undetermined.keys()
        built = (
            tensors_of(inference.config())
            if "num_heads" not in inference.undetermined or config.hidden_size % 4 == 0
            else tensors
        )
        assert {n: t.shape for n, t in built.items()} == {n: t.shape for n, t in tensors.items()}


@settings(max_examples=200, deadline=None)
@given(configs())
def test_its_own_configuration_contradicts_no_model(config):
    """With the stored configuration nothing is open, nothing is contradicted, and the very configuration comes back."""
    inference = infer(tensors_of(config), json.loads(json.dumps(config.model_dump(mode="json"))))
    assert not inference.contradictions
    got, want = inference.config().model_dump(), config.model_dump()
    if "moe_layers" in want:
        got["moe_layers"], want["moe_layers"] = inference.config().mixture_layers, config.mixture_layers
    if not (config.model_type == "itera_lite" and config.mixture_layers):  # then these say nothing of the model
        got, want = ({k: v for k, v in c.items() if k not in ("num_experts", "top_k_experts")} for c in (got, want))
    assert got == want


# Sizes that one dimension alone tells: another value is another model, not a contradiction


def lonely(config, tensors):
    """(tensor, axis) whose change makes another possible model."""
    alone = {("position_embedding.weight", 0)}
    if config.tie_embeddings:
        alone.add(("embedding.weight", 0))
    if config.num_layers == 1:
        alone.add(("layers.0.ssm.conv1d.weight", 2))
    return alone


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(configs(), st.data())
def test_one_wrong_dimension_is_found_and_its_tensor_named(config, data):
    tensors = tensors_of(config)
    choices = [
        (n, axis) for n, t in tensors.items() for axis in range(t.dim()) if (n, axis) not in lonely(config, tensors)
    ]
    name, axis = data.draw(st.sampled_from(choices))
    shape = list(tensors[name].shape)
    shape[axis] += data.draw(st.sampled_from([1, 2, shape[axis], 5] + [-1] * (shape[axis] > 1)))
    wrong = infer(tensors | {name: torch.zeros(shape)})
    named = {t for c in wrong.contradictions for t in c.tensors}
    assert (
        name in named
    ), f"{name} {tuple(tensors[name].shape)} → {tuple(shape)}: {[c.text for c in wrong.contradictions]}"
    assert any(name in c.text for c in wrong.contradictions)
    with pytest.raises(CheckpointError, match="no configuration fits") as error:
        wrong.config()
    assert "\n" not in str(error.value)


@settings(max_examples=100, deadline=None)
@given(configs(), st.data())
def test_a_missing_or_foreign_tensor_is_named(config, data):
    tensors = tensors_of(config)
    parts = ("D", "in_proj.weight", "out_proj.weight", "w1.weight", "A_log", "dt_proj.weight", "attn.norm.weight")
    needed = [n for n in tensors if n.endswith(parts)]
    name = data.draw(st.sampled_from(needed))
    try:
        wrong = infer({n: t for n, t in tensors.items() if n != name})
        assert any(name in c.tensors for c in wrong.contradictions), name
    except CheckpointError as error:
        assert "no layer" in str(error) or "which kernel" in str(error)
    extra = f"layers.0.ssm.{'x_proj.weight' if config.model_type == 'itera_lite' and config.kernel != 'mamba' else 'B'}"
    assert any(extra in c.tensors for c in infer(tensors | {extra: torch.zeros(3, 5)}).contradictions)


@settings(max_examples=150, deadline=None)
@given(configs(), st.data())
def test_a_stored_field_that_is_wrong_is_said_and_the_tensors_win(config, data):
    tensors, true = tensors_of(config), determined(config)
    fields = [
        f
        for f, v in true.items()
        if f not in ("model_type", "kernel", "moe_layers") and not (f == "expert_size" and not config.feed_forward)
    ]
    name = data.draw(st.sampled_from(fields))
    other = {"learned": "none", "none": "learned", "layernorm": "rmsnorm", "rmsnorm": "layernorm"}
    value = (
        not true[name] if isinstance(true[name], bool) else other[true[name]] if true[name] in other else true[name] + 1
    )
    inference = infer(tensors, {"model_type": config.model_type, name: value})
    assert any(
        c.field == name and c.stored and repr(value) in c.text for c in inference.contradictions
    ), inference.contradictions
    assert inference.values[name] == true[name]
    with pytest.raises(CheckpointError):
        inference.config(strict=True)


PLAIN = st.none() | st.booleans() | numbers(-3, 10**30) | st.floats() | st.text(max_size=9)
JUNK = PLAIN | st.lists(numbers(-1, 9), max_size=3) | st.dictionaries(st.text(max_size=3), numbers(0, 3))
FAR = [
    "layers.99999999999999999999.ssm.B", "layers.0.moe.experts.4000000000.w1.weight", "layers.1.ffn.w1.weight",
    "layers.0.attn.qkv.weight", "x",
]


@settings(max_examples=200, deadline=None)
@given(configs(), st.data())
def test_junk_in_a_stored_configuration_is_one_line_at_most(config, data):
    tensors = tensors_of(config)
    fields = data.draw(
        st.dictionaries(st.sampled_from([*type(config).model_fields, "use_flash_attn"]), JUNK, max_size=6)
    )
    try:
        inference = infer(tensors, fields)
        assert {n: t.shape for n, t in tensors_of(inference.config()).items()} == {
            n: t.shape for n, t in tensors.items()
        }
    except CheckpointError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(configs(), st.data())
def test_junk_among_the_tensors_is_one_line_at_most(config, data):
    """Any tensors with names of this project's, of any shape, some of them far away: an answer or a refusal, soon."""
    names = [*tensors_of(config), *FAR]
    shapes = data.draw(st.dictionaries(st.sampled_from(names), st.lists(numbers(0, 5), max_size=4), max_size=30))
    keep = data.draw(st.booleans())
    try:
        infer(
            (tensors_of(config) if keep else {}) | {n: torch.empty(s, device="meta") for n, s in shapes.items()}
        ).config()
    except CheckpointError as error:
        assert "\n" not in str(error)


# One of each


def test_the_first_versions_map_is_the_one_in_its_file():
    path = LEGACY / "itera_lite_mixed_precision.pt"
    if not path.exists():
        pytest.skip(f"{LEGACY} is not here: the map in the file {path.name} cannot be read")
    says = read_foreign(path).extra["mixed_precision_metadata"]["precision_map"]
    assert list(says.items()) == list(FIRST_VERSION_MAP.items())


@settings(max_examples=100, deadline=None)
@given(configs().filter(lambda c: c.model_type == "itera_lite" and c.kernel == "s4" and c.d_inner > 1), st.data())
def test_pruned_step_sizes_are_told_by_the_weights_alone(config, data):
    n, fewer = config.num_layers, st.none() | numbers(1, config.d_inner - 1)
    rows = data.draw(st.lists(fewer, min_size=n, max_size=n))
    pruned = config_from_dict(config.model_dump() | {"layer_sizes": {"ssm_dt_rows": rows}})
    tensors = tensors_of(pruned)
    found = infer(tensors)
    sizes = {"ssm_dt_rows": tuple(rows)} if any(rows) else None
    assert not found.contradictions and found.values.get("layer_sizes") == sizes
    assert {n: t.shape for n, t in tensors_of(found.config()).items()} == {n: t.shape for n, t in tensors.items()}
    if sizes:  # one wrong dimension is still found: weight and bias alone tell the rows, so either may be named
        pair = next([f"layers.{i}.ssm.dt_proj.{end}" for end in ("weight", "bias")] for i, n in enumerate(rows) if n)
        for axis in (0, 1):
            shape = list(tensors[pair[0]].shape)
            shape[axis] += 1
            wrong = infer(tensors | {pair[0]: torch.zeros(shape)}).contradictions
            assert any(set(pair[: 2 - axis]) & set(c.tensors) for c in wrong), (pair, shape)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_what_pruning_leaves_is_told_by_the_weights_alone(fraction):
    """Pruning's own configuration and the one that its weights tell are the same, in every layer and in one."""
    torch.manual_seed(0)
    model = build_model(named_config("micro", vocab_size=60))
    sites = find_sites(model, "dt_rows")
    for some in (sites, sites[1:2]):
        pruned = slice_model(model, [(site, torch.arange(site.units) >= fraction * site.units) for site in some])
        told = infer(pruned.state_dict()).config()
        assert told.layer_sizes and told.layer_sizes == pruned.config.layer_sizes
        assert told == pruned.config.model_copy(update={"moe_layers": pruned.config.mixture_layers})


def test_transformer_with_heads_that_do_not_fit_is_one_line():
    config = named_config("transformer-tiny", vocab_size=20, hidden_size=6, num_heads=3, ffn_size=8)
    with pytest.raises(CheckpointError, match="num_heads"):
        infer(tensors_of(config)).config()
    assert infer(tensors_of(config), {"model_type": "transformer", "num_heads": 3}).config() == config


def test_unusable_stored_configuration_is_refused():
    tensors = tensors_of(named_config("micro", vocab_size=20))
    for stored in ({"hiden_size": 64}, {"model_type": "gpt2"}, {"torch_dtype": "float16"}):
        with pytest.raises(CheckpointError, match="unknown") as error:
            infer(tensors, stored)
        assert "\n" not in str(error.value)
    assert infer(tensors, {"use_flash_attn": True, "gradient_checkpointing": False}).notes


@pytest.mark.parametrize("experts", [1, 8])
@pytest.mark.parametrize("kernel", ["s4", "mamba", "mamba2"])
def test_seams_are_found_wherever_they_are(kernel, experts):
    """Each linear layer alone in FP16 is named, in every layer and expert."""
    fields = {"ssm_head_size": 16} if kernel == "mamba2" else {}
    config = named_config("micro", vocab_size=20, kernel=kernel, num_experts=experts, top_k_experts=1, **fields)
    for name, t in tensors_of(config).items():
        if t.dim() == 2 and name.startswith("layers") and not name.endswith((".B", ".C", "A_log")):
            seam = first_seam({name: torch.float16}, config)
            assert seam and f"{name.removesuffix('.weight')} (fp16)" in seam, (name, seam)


def test_a_file_is_inspected_in_every_layout(tmp_path):
    torch.manual_seed(0)
    every = {
        "s4": ["native", "published", "published older", "published moe.moe"], "mamba": ["mamba", "mamba_ssm"],
        "mamba2": ["mamba2", "mamba_ssm"],
    }
    for kernel, layouts in every.items():
        alone = {} if kernel == "s4" else {"norm": "rmsnorm", "feed_forward": False, "positions": "none"}
        config = named_config("micro", vocab_size=20, kernel=kernel, **alone)
        state = build_model(config).state_dict()
        for layout in layouts:
            safetensors.torch.save_file(from_native(state, layout), tmp_path / "model.safetensors")
            report = inspect(tmp_path / "model.safetensors")
            assert report.runs and not report.contradictions and report.kernel == kernel
            assert report.parameters == sum(t.numel() for t in state.values())
            assert json.loads(report.to_json())["parameters"] == report.parameters
            assert report.text().startswith(str(tmp_path)) and "told by the tensors" in report.text()


@pytest.mark.filterwarnings("ignore")  # torch's quantisation is deprecated
def test_pickled_files_and_folders_are_inspected(tmp_path):
    """What torch.save leaves: INT8 of torch's own, a configuration object's fields, shards of Hugging Face's."""
    config = named_config("micro", vocab_size=20)
    model = build_model(config).eval()
    state = from_native(model.state_dict(), "published")
    lost = {n: t for n, t in state.items() if "experts" not in n and "router" not in n}
    stored = {
        "vocab_size": 20, "num_experts": 0, "top_k_experts": 2, "moe_layers": [1], "hidden_size": 64,
        "use_flash_attn": False,
    }
    half = {n: t.half() if FIRST_VERSION_MAP.match(n) else t for n, t in lost.items()}
    torch.save(
        {
            "model_state_dict": half, "config": stored,
            "mixed_precision_metadata": {"precision_map": dict(FIRST_VERSION_MAP)},
        },
        tmp_path / "mixed.pt",
    )
    report = inspect(tmp_path / "mixed.pt")
    assert (
        report.experts["lost"]
        and not report.runs
        and "top_k_experts 2" in report.contradictions[0]
        and len(report.contradictions) == 1
    )
    assert [c.holds for c in report.claims] == [False, True] and report.configuration["top_k_experts"] == 0

    torch.save(
        half | {"embedding.weight": torch.quantize_per_tensor(state["embedding.weight"], 0.001, 0, torch.qint8)},
        tmp_path / "embedding_int8.pt",
    )
    assert [c.holds for c in inspect(tmp_path / "embedding_int8.pt").claims] == [True]
    packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    torch.save({"model_state_dict": packed.state_dict()}, tmp_path / "dynamic.pt")
    report = inspect(tmp_path / "dynamic.pt")
    assert report.dtypes["int8"]["tensors"] == sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert not report.contradictions and not report.runs and "(int8)" in report.seam

    theirs = named_config(
        "micro", vocab_size=20, kernel="mamba2", norm="rmsnorm", feed_forward=False, positions="none", ssm_head_size=16,
        ssm_groups=2,
    )
    state = list(from_native(build_model(theirs).state_dict(), "mamba2").items())
    files = {f"pytorch_model-{i}.bin": dict(state[i::2]) for i in range(2)}
    for name, part in files.items():
        torch.save(part, tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {t: name for name, part in files.items() for t in part}})
    )
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(theirs) | {"dtype": "bfloat16"}))
    report = inspect(tmp_path)
    assert (report.container, report.contradictions, report.runs) == (
        "Hugging Face folder (torch zip, 2 files)", [], True,
    )
    assert (report.configuration["ssm_groups"], report.configuration["ssm_state_size"]) == (2, 8)
    assert [c.holds for c in report.claims] == [False]  # it says bfloat16


def test_our_folders_are_inspected_as_packed_and_damage_is_one_line(tmp_path):
    model = build_model(named_config("micro", vocab_size=20))
    folder = save_model(
        compress_model(model, {"embedding": "int8", "layers.*.ssm.*": "bf16", "*": "fp16"}), tmp_path / "model"
    )
    report = inspect(folder)
    assert report.runs and not report.contradictions and report.dtypes.keys() == {"bf16", "fp16", "int8", "scales"}
    assert report.tensor_bytes == storage_bytes(
        compress_model(model, {"embedding": "int8", "layers.*.ssm.*": "bf16", "*": "fp16"})
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256", None)  # somebody who changes it knowingly
    (folder / "config.json").write_text(json.dumps(config | {"precision": {"*": "int8"}}))
    report = inspect(folder)
    assert not report.runs and any(c.holds is False for c in report.claims)
    (folder / "config.json").write_text(
        json.dumps(config | {"architecture": config["architecture"] | {"hidden_size": 128, "dropout": 0.5}})
    )
    report = inspect(folder)
    assert not report.runs and report.configuration["hidden_size"] == 64 and report.configuration["dropout"] == 0.5
    assert "hidden_size 128, the tensors 64" in report.contradictions[0]
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(folder)


def test_inspecting_what_is_no_checkpoint_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "a.pt").write_bytes(b"nothing")
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "a.pt", tmp_path / "x.safetensors", tmp_path / "none.pt"):
        with pytest.raises(CheckpointError) as error:
            inspect(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mixed_precision", "micro_distilled"])
def test_files_of_the_first_version_are_what_they_are(name):
    path = LEGACY / f"itera_lite_{name}.pt"
    if not path.exists():
        pytest.skip(f"{LEGACY} is not here: the file {path.name} cannot be inspected")
    report = inspect(path)
    if name == "mixed_precision":
        assert set(report.dtypes) == {"fp16", "fp32"} and report.experts == {
            "number": 0, "layers": [1, 3], "lost": True,
        }
        assert (report.parameters, report.file_bytes, f"{report.fp32_bytes / report.file_bytes:.2f}") == (
            1_754_400, 4_164_117, "1.69",
        )
        assert not report.runs and report.seam.startswith("layers.0.ssm.in_proj (fp16) → layers.0.ssm.dt_proj (fp32)")
        assert [c.holds for c in report.claims if "INT8" in c.says] == [False]
    else:
        assert report.runs and not report.stored and not report.tokenizer and not report.contradictions
        assert report.parameters == 293_656 and report.configuration == named_config("micro").model_dump(
            mode="json"
        ) | {"moe_layers": [1]}


