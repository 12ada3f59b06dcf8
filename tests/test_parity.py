"""With the same weights, our Mamba and Mamba-2 are Hugging Face's: logits, decoding step by step, gradients."""

import pytest
import torch

from itera_lite.checkpoints.layouts import HUGGING_FACE, config_from_hf, rename, to_native
from itera_lite.models.config import config_from_dict
from itera_lite.models.model import build_model

transformers = pytest.importorskip(
    "transformers", reason="Hugging Face's models come with pip install 'itera-lite[bench]'"
)
TOLERANCE = 1e-4  # relative, float32
SHAPES = {
    "mamba": dict(hidden_size=32, state_size=5, time_step_rank=3),
    "mamba-biased": dict(hidden_size=24, state_size=16, use_bias=True, num_hidden_layers=3, expand=3),
    "mamba-bare": dict(hidden_size=40, state_size=1, use_conv_bias=False, conv_kernel=2, tie_word_embeddings=False),
    "mamba2": dict(hidden_size=32, state_size=8, head_dim=16, num_heads=4, n_groups=1, chunk_size=16),
    "mamba2-groups": dict(
        hidden_size=48, state_size=4, head_dim=8, num_heads=12, n_groups=3, chunk_size=8, use_bias=True
    ),
    "mamba2-bare": dict(
        hidden_size=16, state_size=16, head_dim=4, num_heads=8, n_groups=8, chunk_size=32, use_conv_bias=False,
        conv_kernel=3,
    ),
    "mamba2-limits": dict(
        hidden_size=32, state_size=8, head_dim=32, num_heads=2, n_groups=2, chunk_size=16, time_step_limit=(0.01, 0.2)
    ),
}


def pair(shape):
    """Hugging Face's model with weights that are far from their initial symmetry, and ours with the same ones."""
    torch.manual_seed(0)
    values = dict(vocab_size=60, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, pad_token_id=0) | SHAPES[shape]
    kind = shape.split("-")[0]
    config_type, model_type = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    }[kind]
    theirs = model_type(config_type(**values)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.05 * torch.randn_like(p)
    fields, _ = config_from_hf(theirs.config.to_dict())
    ours = build_model(config_from_dict(fields)).eval()
    ours.load_state_dict(to_native(dict(theirs.state_dict())).tensors)
    return theirs, ours


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("length", [1, 16, 37, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape, length):
    theirs, ours = pair(shape)
    ids = torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        assert error(ours(ids), theirs(ids).logits) <= TOLERANCE


# Hugging Face's sequence clamps step sizes, its single step does not
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "mamba2-limits"])
def test_prefill_and_single_steps(shape):
    theirs, ours = pair(shape)
    ids = torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = theirs(ids[:, :21], use_cache=True)
        logits, state = ours.prefill(ids[:, :21])
        assert error(logits, output.logits[:, -1]) <= TOLERANCE
        for t in range(21, 30):
            output = theirs(ids[:, t : t + 1], cache_params=output.cache_params, use_cache=True)
            logits, state = ours.step(ids[:, t], state)
            assert error(logits, output.logits[:, -1]) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_every_weight(shape):
    theirs, ours = pair(shape)
    ids = torch.randint(0, 60, (2, 37), generator=torch.Generator().manual_seed(2))
    theirs(ids).logits.square().mean().backward()
    ours(ids).square().mean().backward()
    mine, names = dict(ours.named_parameters()), []
    for name, p in theirs.named_parameters():
        native = rename(name, HUGGING_FACE)[1]
        names.append(native)
        assert error(mine[native].grad, p.grad) <= TOLERANCE, name
    assert sorted(names) == sorted(mine)
