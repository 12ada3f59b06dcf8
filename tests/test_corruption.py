"""Two thousand damaged checkpoints, drawn by seed: each is refused in one line, or what it was before the damage."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from itera_lite.base.core import CheckpointError
from itera_lite.checkpoints.archives import scan
from itera_lite.checkpoints.convert import build_imported, read_source
from itera_lite.checkpoints.folder import load_model, save_model
from itera_lite.checkpoints.layouts import from_native
from itera_lite.models.config import config_from_dict
from itera_lite.models.model import build_model
from itera_lite.storage.precision import compress_model

FOLDERS, FOREIGN, PICKLED = 1200, 500, 300
KERNELS = {"s4": {}, "mamba": {"kernel": "mamba"}, "mamba2": {"kernel": "mamba2", "ssm_head_size": 8, "ssm_groups": 2}}
KINDS = ("truncate", "flip", "append", "shape", "missing", "extra", "dtype")


def model_of(kernel):
    torch.manual_seed(0)
    return build_model(
        config_from_dict(
            {"vocab_size": 30, "hidden_size": 16, "num_layers": 2, "max_seq_length": 8, "expert_size": 8}
            | KERNELS[kernel]
        )
    ).eval()


def same(a, b):
    """Whether two models are one: architecture, names, every stored number."""
    first, second = a.state_dict(), b.state_dict()
    return (
        a.config == b.config and first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    )


def change_tensors(kind, tensors, draw):
    """One structural damage to a state dict, and the name it is about.

    Only an embedding itself says how many rows it has: those are left.
    """
    name = draw.choice([n for n in sorted(tensors) if kind != "shape" or "embedding" not in n])
    tensor = tensors[name]
    if kind == "shape":
        shorter = tensor.dim() and tensor.shape[-1] > 1 and draw.random() < 0.5
        tensors[name] = tensor[..., :-1].contiguous() if shorter else torch.cat([tensor, tensor])
    elif kind == "missing":
        del tensors[name]
    elif kind == "extra":
        name = draw.choice([f"{name}.more", "layers.99.ssm.D", "surprise", "layers.0.ssm.in_proj.weight_scale"])
        tensors[name] = torch.zeros(3)
    elif kind == "dtype":
        tensors[name] = tensor.to(draw.choice([torch.float64, torch.int64, torch.int32, torch.bool]))
    return name


def change_bytes(kind, path, draw, only=None):
    """One damage to a file's bytes; `only`: the first so many of them."""
    content = bytearray(path.read_bytes())
    reach = min(len(content), only or len(content))
    if kind == "truncate":
        content = content[: draw.randrange(reach)]
    elif kind == "flip":
        for _ in range(draw.choice([1, 1, 1, 4, 32])):
            content[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    else:
        content += bytes(draw.randrange(256) for _ in range(draw.randrange(1, 64)))
    path.write_bytes(content)


def refused_or_same(read, original, what):
    """Read something damaged: True if it was refused as it should be."""
    try:
        found = read()
    except CheckpointError as error:
        line = str(error)
        assert line and "\n" not in line, what
        return line
    assert original(found), f"{what}: a wrong model was loaded"
    return None


def test_model_folders(tmp_path):
    variants = []
    for kernel in KERNELS:
        model = model_of(kernel)
        variants.append((save_model(model, tmp_path / kernel), model))
        variants.append((save_model(model, tmp_path / f"{kernel}-shards", max_shard_bytes=6000), model))
        packed = compress_model(model, {"*embedding*": "int8", "*": "fp16"})
        variants.append((save_model(packed, tmp_path / f"{kernel}-packed"), packed))
    refused = 0
    for seed in range(FOLDERS):
        draw = random.Random(seed)
        folder, model = variants[seed % len(variants)]
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)
        kind, name = draw.choice(KINDS), None
        path = damaged / draw.choice(sorted(p.name for p in damaged.iterdir() if p.name != "README.md"))
        if kind in ("truncate", "flip", "append"):
            change_bytes(kind, path, draw)
        else:  # with a hash that fits, so that it is the structure that must be looked at
            path = draw.choice(sorted(damaged.glob("*.safetensors")))
            tensors = safetensors.torch.load_file(path)
            name = change_tensors(kind, tensors, draw)
            path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
            config = json.loads((damaged / "config.json").read_text())
            del config["sha256"]
            config["weights"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            (damaged / "config.json").write_text(json.dumps(config))
        line = refused_or_same(
            lambda f=damaged: load_model(f), lambda found, m=model: same(found, m),
            f"seed {seed}: {kind} of {path.name}",
        )
        refused += line is not None
        if name is not None:
            assert line is not None, f"seed {seed}: {kind} of {name!r} in {path.name} was not noticed"
            stem = name.split(".part-")[0]
            assert (
                stem in line or path.name in line or "index" in line
            ), f"seed {seed}: {kind} of {name!r}: the line does not name it: {line}"
    print(f"{refused} of {FOLDERS} damaged folders refused, the others unharmed")


@pytest.mark.parametrize("layout", ["published", "published older", "mamba", "mamba2"])
def test_foreign_safetensors(tmp_path, layout):
    kernel = layout if layout in KERNELS else "s4"
    fields = {} if kernel == "s4" else {"norm": "rmsnorm", "feed_forward": False, "positions": "none"}
    config = config_from_dict(model_of(kernel).config.model_dump() | fields | {"moe_layers": None})
    torch.manual_seed(0)
    weights = from_native({n: p.detach() for n, p in build_model(config).named_parameters()}, layout)
    whole = safetensors.torch.save(weights, {"format": "pt"})
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    original = build_imported(read_source(path))
    refused = 0
    for seed in range(FOREIGN // 4):
        draw = random.Random(f"{layout}{seed}")
        kind, name = draw.choice(KINDS), None
        path.write_bytes(whole)
        if kind in ("truncate", "flip", "append"):
            change_bytes(kind, path, draw, only=header)  # data has no checksum in such a file
        else:
            tensors = dict(weights)
            name = change_tensors(kind, tensors, draw)
            path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        line = refused_or_same(
            lambda: build_imported(read_source(path)), lambda found: same(found, original),
            f"{layout}, seed {seed}: {kind} of {name}",
        )
        refused += line is not None
    assert refused > FOREIGN // 4 * 0.8
    print(f"{refused} of {FOREIGN // 4} damaged files refused, the others unharmed")


def test_pickled_files(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(
        {"model_state_dict": from_native({n: p.detach() for n, p in model_of("s4").named_parameters()}, "published")},
        path,
    )
    whole, plan = path.read_bytes(), scan(path)
    refused = 0
    for seed in range(PICKLED):
        draw = random.Random(seed)
        path.write_bytes(whole)
        change_bytes(draw.choice(["truncate", "flip", "append"]), path, draw)
        # every byte of such a file's members is under a checksum, so what passes must be all that was there
        line = refused_or_same(lambda: scan(path), lambda found: found == plan, f"seed {seed}")
        refused += line is not None
    assert refused > PICKLED * 0.8
    print(f"{refused} of {PICKLED} damaged files refused, the others unharmed")


def test_every_loader_is_here():
    assert FOLDERS + FOREIGN + PICKLED == 2000 and Path(__file__).is_file()
