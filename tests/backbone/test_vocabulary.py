"""Vocabulary rows against a backbone whose token embedding has been changed by hand."""

from dataclasses import replace

import pytest
import torch
from small import small
from torch import Tensor

from backbone import VOCABULARY_ROWS, Adapter, AdapterShape, AdapterStack, Backbone, FlatAdapter, Graphs, Slots, load_backbone

TEXTS = ["kilo", "a kilo over the gey bo kites, kilo", "a red ball", "sector tango report, two striped rings at the left" * 2]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


def made(backbone: Backbone, seed: int, count: int | None, scope: str = "both") -> Adapter:
    """With rows for `count` of the texts' tokens, start and end among them; None: without rows."""
    generator = torch.Generator().manual_seed(seed)
    ids: tuple[int, ...] = ()
    if count is not None:
        found = backbone.tokenize(TEXTS).ids.unique()
        ids = tuple(sorted(found[torch.randperm(len(found), generator=generator)[:count]].tolist()))
    shape = AdapterShape(backbone.dims, 4, 16 if scope == "both" else 0, scope, ids)  # type: ignore[arg-type]
    return shape.assemble({name: 0.1 * torch.randn(size, generator=generator) for name, size in shape.layout().items()})


def by_hand(backbone: Backbone, adapter: Adapter | None, tokens: Tensor) -> Tensor:
    """tokens (B, L) → (B, D): with the rows in the backbone's own embedding, and the adapter's other tensors."""
    if adapter is None or adapter.vocabulary is None:
        return backbone.encode_text(tokens, adapter)
    embedding, frozen = backbone.token_embedding, backbone.token_embedding.clone()
    for token, row in zip(adapter.vocabulary.ids.tolist(), adapter.vocabulary.rows, strict=True):
        embedding[token] += row
    vectors = backbone.encode_text(tokens, replace(adapter, vocabulary=None))
    embedding.copy_(frozen)
    return vectors


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.fixture(scope="module")
def mixed(backbone: Backbone) -> tuple[Tensor, list[Adapter | None], Tensor]:
    """Tokens of 24 texts, an adapter for each (many rows, few, none, none at all), and what they give by hand."""
    adapters = [None, made(backbone, 1, 5), made(backbone, 2, None), made(backbone, 3, 40), made(backbone, 4, 12, "text")]
    tokens = backbone.tokenize([TEXTS[i % len(TEXTS)] for i in range(24)]).ids
    rows = [adapters[i % len(adapters)] for i in range(24)]
    vectors = torch.cat([by_hand(backbone, rows[i], tokens[i : i + 1]) for i in range(24)])
    return tokens, rows, vectors


@torch.inference_mode()
def test_a_row_changes_its_tokens_embedding_and_nothing_else(
    backbone: Backbone, mixed: tuple[Tensor, list[Adapter | None], Tensor]
) -> None:
    tokens, rows, expected = mixed
    for text, own, vector in zip(tokens, rows, expected, strict=True):
        close(backbone.encode_text(text[None], own)[0], vector)
    close(backbone.encode_text(tokens, rows), expected)
    one = rows[3]
    close(backbone.encode_text(tokens, one), by_hand(backbone, one, tokens))


@torch.inference_mode()
def test_each_text_of_a_mixed_batch_has_the_rows_of_its_own_slot(
    backbone: Backbone, mixed: tuple[Tensor, list[Adapter | None], Tensor]
) -> None:
    tokens, rows, expected = mixed
    stack = AdapterStack(backbone.dims, 6, words=50, tokens=backbone.tokens)
    for slot in range(1, 6):  # what another adapter leaves in a slot must not stay
        stack.write(slot, FlatAdapter.of(made(backbone, 70 + slot, 50), backbone.dims))
    distinct = list({id(own): own for own in rows}.values())
    slot_of = {id(own): slot for slot, own in enumerate(distinct)}
    for slot, own in enumerate(distinct):
        if own is not None:
            stack.write(slot, FlatAdapter.of(own, backbone.dims))
            back = stack.adapter(slot)
            assert (back.vocabulary is None) == (own.vocabulary is None)
    slots = Slots(stack, torch.tensor([slot_of[id(own)] for own in rows]))
    close(backbone.encode_text(tokens, slots), expected)
    close(Graphs(backbone, stack, texts=24, frames=1).encode_text(tokens, slots), expected)
    without = Slots(stack, torch.tensor([0, 2]))  # no row of the batch has any
    close(backbone.encode_text(tokens[[0, 2]], without), expected[[0, 2]])


def test_a_stack_takes_no_more_rows_than_it_has_room_for_and_no_unknown_token(backbone: Backbone) -> None:
    stack = AdapterStack(backbone.dims, 2, words=8, tokens=1000)
    large, unknown = (AdapterShape(backbone.dims, 1, 0, "text", ids) for ids in (tuple(range(9)), (1000,)))
    for shape in (large, unknown):
        with pytest.raises(ValueError, match="vocabulary rows, room for 8, of token ids from 0 to 999"):
            stack.write(1, FlatAdapter.of(shape.assemble(shape.initial(0)), backbone.dims))
    assert stack.adapter(1) == Adapter(None, None)
    with pytest.raises(ValueError, match="vocabulary rows"):
        AdapterStack(backbone.dims, 2, words=1 << 15, tokens=1000)


def test_the_gradient_of_a_row_is_that_of_its_embedding(backbone: Backbone) -> None:
    shape = AdapterShape(backbone.dims, 2, 0, "text", tuple(backbone.tokenize(TEXTS).ids.unique().tolist()))
    tensors = {name: tensor.requires_grad_() for name, tensor in shape.initial(0, start="small").items()}
    tokens = backbone.tokenize(TEXTS).ids
    for adapters in (shape.assemble(tensors), [shape.assemble(tensors)] * len(TEXTS)):
        tensors["vocabulary_rows"].grad = None
        backbone.encode_text(tokens, adapters)[:, 0].sum().backward()
        found = tensors["vocabulary_rows"].grad
        changed = load_backbone("builtin")
        changed.token_embedding.requires_grad_()
        changed.encode_text(tokens, shape.assemble({n: t.detach() for n, t in tensors.items()}))[:, 0].sum().backward()
        assert found is not None and changed.token_embedding.grad is not None
        close(found, changed.token_embedding.grad[list(shape.vocabulary)])


def test_a_prefix_beside_rows_is_refused_as_it_would_leave_them_out(backbone: Backbone) -> None:
    tokens = backbone.trim(backbone.tokenize(TEXTS).ids)
    prefix = backbone.text_prefix(tokens, 2)
    backbone.encode_text(tokens, made(backbone, 2, None), prefix=prefix)
    with pytest.raises(ValueError, match="prefix"):
        backbone.encode_text(tokens, made(backbone, 1, 5), prefix=prefix)


@pytest.mark.parametrize("ids", [(3, 2), (2, 2), (-1, 2)])
def test_the_tokens_of_a_shape_are_ascending(backbone: Backbone, ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        AdapterShape(backbone.dims, vocabulary=ids)


def test_rows_count_among_an_adapters_values_and_change_no_other(backbone: Backbone) -> None:
    plain, rich = AdapterShape(backbone.dims), AdapterShape(backbone.dims, vocabulary=tuple(range(VOCABULARY_ROWS)))
    assert rich.parameters == plain.parameters + VOCABULARY_ROWS * backbone.dims.text_width
    fresh = rich.initial(3, start="small")
    assert not fresh.pop("vocabulary_rows").any()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in plain.initial(3, start="small").items())
    with pytest.raises(ValueError, match="vision"):
        AdapterShape(backbone.dims, shared=0, scope="vision", vocabulary=(1,))


def test_padding_is_not_of_the_text(backbone: Backbone) -> None:
    assert backbone.lengths(backbone.tokenize(["a red ball", ""]).ids).tolist() == [5, 2]
    whole = small("ViT-B-16-SigLIP2")  # its attention is not causal, so that nothing is cut off
    assert not whole.causal
    tokens = torch.tensor([[5, 6, 7, 0, 0, 0], [5, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 4], [5, 6, 7, 8, 9, 0]])
    assert whole.lengths(tokens).tolist() == [3, 1, 6, 6]
