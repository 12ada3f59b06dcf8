"""Whatever was cut from a vocabulary, any Unicode text comes back as it was and has a finite score."""

import functools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itera_lite.base.core import seed_everything
from itera_lite.base.data import EOS, load_corpus
from itera_lite.base.tokenizers import TOKENIZERS, train_tokenizer
from itera_lite.evaluation.scores import score_documents
from itera_lite.methods.vocabulary import remap_model, shrink_tokenizer, token_use
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model

texts = st.text(min_size=1, max_size=40).filter(lambda text: EOS not in text)
sizes = st.sampled_from([257, 300, 380])


@functools.cache
def remapped(kind, size):
    """A small model and its tokenizer of 400 tokens, cut to `size`."""
    documents = load_corpus("stories", limit_documents=60).train
    tokenizer = train_tokenizer(documents, 400, kind=kind)
    seed_everything(0)
    model = build_model(named_config("micro", vocab_size=400, hidden_size=8, num_layers=1, max_seq_length=64))
    cut = shrink_tokenizer(tokenizer, size, token_use(tokenizer, documents))
    return remap_model(model, tokenizer, cut), cut


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts, size=sizes)
@example(text="<unk>", size=257)
@example(text=" <unk>\x00\ufeff\u2028", size=380)
@example(text="東京 🦊 naïve  \n\t", size=300)
@settings(deadline=None, max_examples=60)
def test_any_text_round_trips_and_is_scored(kind, text, size):
    model, tokenizer = remapped(kind, size)
    assert tokenizer.get_vocab_size() == size == model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    scores = score_documents(model, tokenizer, [text])
    assert np.isfinite(scores.nll).all() and scores.bytes[0] == len(text.encode())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_kept_is_spelled_as_before(kind):
    """Nothing but the cut tokens changes: a text that needs none of them has the same tokens."""
    documents = load_corpus("stories", limit_documents=60).train
    tokenizer = train_tokenizer(documents, 400, kind=kind)
    cut = shrink_tokenizer(tokenizer, 380, token_use(tokenizer, documents))
    words = {" " + word for document in documents for word in document.split()}
    kept = [w for w in words if set(tokenizer.encode(w).tokens) <= set(cut.get_vocab())]
    assert len(kept) > 10
    assert all(cut.encode(w).tokens == tokenizer.encode(w).tokens for w in kept)
