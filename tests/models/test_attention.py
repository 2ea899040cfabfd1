"""Kernels without a mask get the bounds of documents, flex-attention gets a mask; the kernels are emulated on a CPU."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import MistralConfig, masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_integration

from relora_ds.models.attention import document_bounds
from tests.data.test_masks import assert_same, loader_of, reference, step
from tests.small_models import _build, gpt_neox, llama


def sliding():
    sizes = dict(hidden_size=20, intermediate_size=35, num_hidden_layers=2, num_attention_heads=2)
    config = MistralConfig(vocab_size=67, num_key_value_heads=1, sliding_window=4, use_cache=False, **sizes)
    return _build(config, 0)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """What flash-attention's function of this name computes, one document after the other."""
    assert causal and not dropout_p and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) and cu_seqlens_q.diff().max() <= max_seqlen_q
    found = []
    for start, stop in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True):
        query, key, value = (each[start:stop].transpose(0, 1) for each in (q, k, v))
        key, value = (each.repeat_interleave(len(query) // len(each), dim=0) for each in (key, value))
        distances = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (distances >= 0) & (distances <= (window_size[0] if window_size[0] >= 0 else len(q)))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=softmax_scale)
        found.append(attended.transpose(0, 1))
    return torch.cat(found)


def flash_attn_func(*_, **__):
    raise AssertionError("a batch with documents to keep apart went to the kernel of whole rows")


@pytest.fixture
def emulated(monkeypatch):
    """Have transformers find flash-attention installed."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, None, None)
    take = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (take, dict)))


@pytest.mark.parametrize("family", [llama, gpt_neox, sliding])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_flash_attention_keeps_the_documents_of_all_rows_apart(family, micro_batch_size, emulated):
    model = family()
    expected = reference(model, loader_of().next_step())
    model.config._attn_implementation = "flash_attention_2"
    assert_same(step(model, loader_of(micro_batch_size).next_step()), expected)


def test_bounds_are_those_of_documents_and_rows():
    positions = torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]])
    bounds = torch.tensor([0, 2, 3, 4, 8], dtype=torch.int32)
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        found = document_bounds(name, positions)
        assert found.pop("max_length_q") == found.pop("max_length_k") == 4
        assert found.keys() == {"cu_seq_lens_q", "cu_seq_lens_k"}
        assert all(torch.equal(value, bounds) and value.dtype == bounds.dtype for value in found.values())
    assert all(document_bounds(name, positions) == {} for name in ("eager", "sdpa", "flex_attention"))


def flex_attention(query, key, value, *, block_mask, enable_gqa, scale, **_):
    """What flex-attention computes, which has no backward on a CPU; of its mask every entry is looked at."""
    rows, heads, length, _ = query.shape
    seen = create_mask(block_mask.mask_mod, rows, heads, length, length, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)


def uncompiled_block_mask(*inputs, **options):
    """What transformers calls, without a minute of torch.compile for a mask of 16 tokens."""
    return create_block_mask(*inputs, **{**options, "_compile": False})


@pytest.mark.parametrize("family", [llama, gpt_neox, sliding])
def test_flex_attention_gets_a_mask_of_documents(family, monkeypatch):
    model = family()
    expected = reference(model, loader_of().next_step())
    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", flex_attention)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled_block_mask)
    model.set_attn_implementation("flex_attention")
    assert_same(step(model, loader_of(3).next_step()), expected)
