"""Our decoder against transformers' class: the same bits."""

import pytest
import torch

from hunyuan_staged.demo import tiny
from hunyuan_staged.models.language import LanguageModel


def both(kv_heads: int, dtype: torch.dtype) -> tuple[torch.nn.Module, LanguageModel]:
    """(transformers' model without its norm, ours with the same weights)."""
    sizes = tiny.Sizes(text_kv_heads=kv_heads)
    reference = tiny.build_language_model(tiny.qwen_config(sizes, tiny.train_tokenizer(sizes.vocab)))
    tiny.draw_weights(reference, "language")
    reference.config._attn_implementation = "sdpa"
    reference.norm = torch.nn.Identity()
    own = LanguageModel(reference.config)
    own.load_state_dict(reference.state_dict())
    # The frequencies stay in float32, as where weights are loaded.
    frequencies = reference.rotary_emb.inv_freq.clone()
    reference, own = reference.to(dtype), own.to(dtype).eval()
    reference.rotary_emb.inv_freq = frequencies
    own.rotary_emb.inv_freq = frequencies
    return reference, own


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 37, 300])
def test_the_states_are_those_of_transformers(kv_heads, dtype, length):
    reference, own = both(kv_heads, dtype)
    ids = torch.randint(500, (2, length), generator=torch.Generator().manual_seed(length))
    expected = reference(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    states = own(input_ids=ids).last_hidden_state
    assert states.dtype == dtype and torch.equal(states, expected)


@torch.no_grad()
def test_a_token_sees_none_after_it():
    _, own = both(2, torch.float32)
    ids = torch.arange(40)[None]
    changed = ids.clone()
    changed[0, 20:] += 3
    before, after = own(ids).last_hidden_state, own(changed).last_hidden_state
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert not torch.allclose(after[:, 20:], before[:, 20:])


def test_it_has_the_weights_of_transformers_but_the_last_norm():
    reference = tiny.build_language_model(tiny.qwen_config(tiny.TINY, tiny.train_tokenizer(tiny.TINY.vocab)))
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items() if name != "norm.weight"}
    assert {name: tensor.shape for name, tensor in LanguageModel(reference.config).state_dict().items()} == shapes
