"""Converted weights compute what their source computes.

Files of the first version are held against float64 numpy, Hugging Face folders against their own classes.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf

from itera_lite.checkpoints.convert import convert, export_huggingface
from itera_lite.checkpoints.folder import load_model
from itera_lite.checkpoints.layouts import from_native
from itera_lite.models.config import config_from_dict
from itera_lite.models.model import build_model

LEGACY = Path(__file__).resolve().parents[2] / "shared/legacy"
FIRST_VERSION_FIELDS = {
    *"vocab_size hidden_size num_layers ssm_state_size ssm_conv_kernel ssm_expand_factor num_experts expert_size"
    " top_k_experts moe_layers".split(),
    *"load_balance_loss_weight max_seq_length dropout layer_norm_eps use_flash_attn gradient_checkpointing".split(),
}
TOLERANCE = 1e-4  # relative, float32 against float64


def layer_norm(x, w, b, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w + b


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def feed_forward(x, w1, w2):
    return gelu(x @ w1.T) @ w2.T


def first_version_logits(file, ids, top_k=2):
    """The first version's model, from its description: numpy, float64, position by position, names as in the file."""
    w = {n: t.double().numpy() for n, t in file.items()}

    def pick(*names):
        return next(w[n] for n in names if n in w)

    embedding = pick("embedding.weight", "embeddings.token_embeddings.weight")
    x = embedding[ids] + pick("position_embedding.weight", "embeddings.position_embeddings.weight")[: len(ids)]
    for i in range(1 + max(int(n.split(".")[1]) for n in w if n.startswith("layers."))):
        p = f"layers.{i}.ssm"
        projected = layer_norm(x, w[f"{p}.norm.weight"], w[f"{p}.norm.bias"]) @ w[f"{p}.in_proj.weight"].T
        inner, gate = np.split(projected, 2, -1)
        taps = w[f"{p}.conv1d.weight"][:, 0]
        padded = np.concatenate([np.zeros((taps.shape[1] - 1, inner.shape[1])), inner])
        inner = silu(
            np.stack([(padded[t : t + taps.shape[1]].T * taps).sum(1) for t in range(len(ids))]) + w[f"{p}.conv1d.bias"]
        )
        s = f"{p}.ssm"
        dt = np.log1p(np.exp(inner @ w[f"{s}.delta_proj.weight"].T + w[f"{s}.delta_proj.bias"])).mean(-1)
        h, out = np.zeros(len(w[f"{s}.A_log"])), []
        for t in range(len(ids)):
            h = np.exp(-dt[t] * np.exp(w[f"{s}.A_log"])) * h + dt[t] * (w[f"{s}.B"] @ inner[t])
            out.append(w[f"{s}.C"] @ h + w[f"{s}.D"] * inner[t])
        x = x + (np.stack(out) * silu(gate)) @ w[f"{p}.out_proj.weight"].T
        m = f"layers.{i}.moe"
        if f"{m}.ffn.w1.weight" in w:
            x = x + feed_forward(
                layer_norm(x, w[f"{m}.norm.weight"], w[f"{m}.norm.bias"]), w[f"{m}.ffn.w1.weight"],
                w[f"{m}.ffn.w2.weight"],
            )
            continue
        m = f"{m}.layer" if f"{m}.layer.norm.weight" in w else f"{m}.moe"
        if not w.get(f"{m}.router.gate.weight", np.zeros(0)).size:
            continue  # its experts were lost
        u = layer_norm(x, w[f"{m}.norm.weight"], w[f"{m}.norm.bias"])
        scores = u @ w[f"{m}.router.gate.weight"].T
        for t in range(len(ids)):
            best = np.argsort(-scores[t])[:top_k]
            share = np.exp(scores[t][best] - scores[t][best].max())
            for e, g in zip(best, share / share.sum(), strict=True):
                x[t] = x[t] + g * feed_forward(u[t], w[f"{m}.experts.{e}.w1.weight"], w[f"{m}.experts.{e}.w2.weight"])
    return layer_norm(x, w["norm.weight"], w["norm.bias"]) @ embedding.T


def worst(ours, reference):
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def far_from_initial(config):
    """A model whose every tensor matters: initial biases and norms would hide a mistake."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("layout", ["published", "published older", "published moe.moe"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_layouts_of_the_first_version(tmp_path, layout, half, with_config):
    config = config_from_dict(dict(vocab_size=90, hidden_size=16, num_layers=3, expert_size=12, max_seq_length=32))
    file = from_native({n: p.detach() for n, p in far_from_initial(config).named_parameters()}, layout)
    file["lm_head.weight"] = file[
        "embeddings.token_embeddings.weight" if "older" in layout else "embedding.weight"
    ].clone()
    file["layers.1.moe." + ("moe" if "moe.moe" in layout else "layer") + ".router.expert_counts"] = torch.arange(4.0)
    if half:
        file = {n: t.half() if "proj" in n or "embed" in n or "lm_head" in n else t for n, t in file.items()}
    stored = (
        dict(config.model_dump(mode="json"), use_flash_attn=False, gradient_checkpointing=True) if with_config else None
    )
    if stored:
        stored = {k: v for k, v in stored.items() if k in FIRST_VERSION_FIELDS}
    torch.save(
        dict(model_state_dict=file, config=stored, compression_ratio=2.0) if with_config else file,
        tmp_path / "source.pt",
    )
    convert(tmp_path / "source.pt", tmp_path / "model")
    ids = torch.randint(0, 90, (25,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_model(tmp_path / "model")(ids[None])[0].double().numpy()
    assert worst(ours, first_version_logits(file, ids.numpy())) <= TOLERANCE


@pytest.mark.parametrize("name", ["itera_lite_micro_distilled", "itera_lite_mixed_precision"])
def test_files_of_the_first_version(tmp_path, name):
    path = LEGACY / f"{name}.pt"
    if not path.is_file():
        pytest.skip(f"{path} is not here: the first version's files are checked where they are")
    convert(path, tmp_path / "model")
    file = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    ids = np.arange(3, 90, 2)
    with torch.no_grad():
        ours = load_model(tmp_path / "model")(torch.tensor(ids)[None])[0].double().numpy()
    assert worst(ours, first_version_logits(file, ids)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_hugging_face_folders(tmp_path, kind, weights):
    transformers = pytest.importorskip(
        "transformers", reason="Hugging Face's models come with pip install 'itera-lite[bench]'"
    )
    torch.manual_seed(0)
    shape = dict(
        vocab_size=70, hidden_size=32, num_hidden_layers=2, state_size=6, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    if kind == "mamba":
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).eval()
    else:
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**shape, head_dim=16, num_heads=4, n_groups=2)
        ).eval()
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder, max_shard_size="10KB" if weights == "shards" else "1GB")
    if weights == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / weights)
    convert(folder, tmp_path / "model")
    ids = torch.randint(0, 70, (2, 33), generator=torch.Generator().manual_seed(1))
    ours = load_model(tmp_path / "model")
    with torch.no_grad():
        assert worst(ours(ids).numpy(), theirs(ids).logits.numpy()) <= TOLERANCE
    export_huggingface(tmp_path / "model", tmp_path / "back")
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert worst(again(ids).logits.numpy(), theirs(ids).logits.numpy()) <= TOLERANCE
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == kind
