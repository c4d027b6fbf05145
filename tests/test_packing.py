"""Packed rows: what the examples of a row learn and lose is what they would one by one, on every family that can."""

import pytest
import torch
from tiny import VOCAB, adapted, tiny_llama, tiny_model
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_adapter.core.families import FAMILIES
from llama_adapter.data import IGNORE, Encoded
from llama_adapter.data.batches import collate, response_tokens
from llama_adapter.training.loss import response_loss, why_not_packed
from llama_adapter.training.packed_attention import Segments, joined
from llama_adapter.training.packing import pack, packed_rows, shared_prefix
from llama_adapter.training.varlen import attend_at_once, fits

CPU = torch.device("cpu")
EAGER = {"gemma2", "gpt_oss"}


def examples(prefix: int = 4, lengths=(9, 5, 7), seed: int = 0) -> list[Encoded]:
    """Examples that begin alike; the last three tokens of each are the response."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, VOCAB, (prefix,), generator=generator).tolist()
    found = []
    for number, length in enumerate(lengths):
        own = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        own[0] = 3 + number  # so that nothing more is alike
        ids = start + own
        found.append(Encoded(ids, [IGNORE] * (len(ids) - 3) + ids[-3:], False))
    return found


def one_by_one(model, batch):
    return sum(response_loss(model, collate([example]), CPU) for example in batch)


def gradients(adapter):
    return [parameter.grad.clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - EAGER))
def test_loss_and_gradients_are_those_of_the_examples_alone(family, prefix):
    model = tiny_model(family)
    adapter = adapted(model)
    batch = examples(prefix) if family not in ("exaone4", "gemma3_text") else examples(prefix, (4, 5, 4))
    longest = max(len(example.input_ids) for example in batch)
    if why_not_packed(model, longest):
        assert family in ("exaone4", "gemma3_text", "cohere2", "ministral"), family
        pytest.skip(why_not_packed(model, longest))
    expected = one_by_one(model, batch)
    expected.backward()
    alone = gradients(adapter)
    for parameter in adapter.parameters():
        parameter.grad = None
    found = response_loss(model, pack(batch), CPU)
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients(adapter), alone, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        assert theirs.abs().max() > 1e-4


def kernel(query, key, value, queries, keys, most_queries, most_keys):
    """What torch's varlen kernel is documented to do: each range apart, causal, aligned to the end."""
    assert queries.dtype == keys.dtype == torch.int32
    outputs = []
    for i in range(len(queries) - 1):
        q, k, v = query[queries[i] : queries[i + 1]], key[keys[i] : keys[i + 1]], value[keys[i] : keys[i + 1]]
        assert len(q) <= most_queries
        assert len(k) <= most_keys
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("sections", [[(0, (4, 1, 6))], [(3, (4, 1, 3))], [(2, (4, 1)), (0, (2,)), (1, (1, 1))]])
def test_one_call_over_all_examples_is_attention_to_each(sections, scaling):
    segments = joined([Segments(*section) for section in sections])
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    shapes = [(1, heads, sum(prefix + sum(own) for prefix, own in sections), 8) for heads in (4, 2, 2)]
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    apart = segments.attend(ALL_ATTENTION_FUNCTIONS["sdpa"], module, *states, scaling=scaling)
    together = attend_at_once(segments.ranges, *states, scaling, kernel)
    torch.testing.assert_close(together, apart)
    weights = torch.randn_like(apart)
    wanted = torch.autograd.grad((apart * weights).sum(), states)
    found = torch.autograd.grad((together * weights).sum(), states)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)  # the prefix's are added in fp32


def test_the_kernel_is_for_half_precision_on_cuda():
    class Query:
        device, dtype, shape = torch.device("cuda"), torch.float32, (1, 4, 9, 64)

    assert not fits(torch.zeros(1, 4, 9, 64, dtype=torch.bfloat16), {})
    assert not fits(Query(), {})


def test_the_prefix_is_computed_once():
    batch = examples(4, (9, 5, 7))
    row = pack(batch)
    assert row.segments.prefix == 4
    assert row.input_ids.shape == (1, 4 + 9 + 5 + 7)
    assert row.position_ids[0].tolist() == [0, 1, 2, 3, *range(4, 13), *range(4, 9), *range(4, 11)]
    assert len(row.predicting) == response_tokens(batch) == 9


def test_no_token_of_the_prefix_predicts_a_learnt_one():
    ids = [5, 6, 7, 8, 9]
    batch = [Encoded([*ids, last], [IGNORE, IGNORE, 7, 8, 9, last], False) for last in (10, 11)]
    assert shared_prefix(batch) == 1  # token 1 predicts the 7 of each example
    model = tiny_model()
    adapted(model)
    torch.testing.assert_close(response_loss(model, pack(batch), CPU), one_by_one(model, batch))


def test_one_example_shares_with_nobody():
    assert shared_prefix(examples()[:1]) == 0
    model = tiny_model()
    adapted(model)
    batch = examples()[:1]
    torch.testing.assert_close(response_loss(model, pack(batch), CPU), one_by_one(model, batch))


def test_rows_hold_every_example_once_and_like_beginnings_together():
    first, second = examples(20, (9, 5, 7), 1), examples(20, (8, 6), 2)
    lonely = examples(0, (19,), 3)
    (row,) = packed_rows([*first, *second, *lonely], 8)
    assert [len(part.lengths) for part in row.segments.parts] == [3, 2, 1]
    assert [part.prefix for part in row.segments.parts] == [20, 20, 0]
    assert len(row.targets) == sum(row.losses) == response_tokens([*first, *second, *lonely])
    assert sum(row.spans) == row.input_ids.shape[1]
    split = list(packed_rows(first, 2))
    assert [len(row.segments.lengths) for row in split] == [2, 1]
    shares = [row for process in range(2) for row in packed_rows([*first, *second], 8, process, 2)]
    assert sum(len(row.targets) for row in shares) == response_tokens([*first, *second])


def test_attention_that_knows_no_segments_fails_instead_of_mixing_examples():
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", getattr(wrapped, "wraps", wrapped))
    try:
        with pytest.raises(RuntimeError, match="size of tensor"):
            response_loss(tiny_model(), pack(examples()), CPU)
    finally:
        AttentionInterface.register("sdpa", wrapped)


def test_what_cannot_be_packed_says_why():
    assert why_not_packed(tiny_llama(), 100) is None
    assert "needs sdpa attention, and this base uses eager" in why_not_packed(
        tiny_llama(attn_implementation="eager"), 100
    )
    window = tiny_model("mistral")
    window.config.sliding_window = 8
    assert "longer than the base's sliding window of 8" in why_not_packed(window, 9)
