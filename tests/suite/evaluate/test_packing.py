"""Sequences packed into trees: nothing is lost, and each token sees its own past only."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from suite.evaluate.packing import Request, Tree, build_trees, layout

# Few different tokens, so that common beginnings are frequent.
requests = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=14).flatmap(
        lambda tokens: st.builds(Request, st.just(tuple(tokens)), st.integers(1, len(tokens) - 1))
    ),
    min_size=1,
    max_size=12,
)


def pasts(tree: Tree, row: int, mask: torch.Tensor | None) -> list[list[int]]:
    """The tokens each node attends to, in the order of their positions."""
    if mask is None:
        return [tree.tokens[: node + 1] for node in range(len(tree))]
    seen = [mask[row, 0, node].nonzero().flatten().tolist() for node in range(len(tree))]
    assert all([tree.depths[n] for n in nodes] == list(range(len(nodes))) for nodes in seen)
    return [[tree.tokens[n] for n in nodes] for nodes in seen]


@given(requests, st.sampled_from([0, 6, 100]))
def test_every_scored_token_is_predicted_from_exactly_what_precedes_it(
    chosen: list[Request], largest: int
) -> None:
    trees = build_trees(chosen, largest)
    table = layout(trees)
    read = {}
    for row, tree in enumerate(trees):
        past = pasts(tree, row, table.mask)
        for index, nodes in tree.reads:
            read[index] = [past[node] for node in nodes]
    assert sorted(read) == list(range(len(chosen)))
    for index, request in enumerate(chosen):
        first = len(request.tokens) - request.scored
        assert read[index] == [list(request.tokens[:end]) for end in range(first, len(request.tokens))]


@given(requests)
def test_no_tree_grows_beyond_the_largest_unless_one_request_is_longer(chosen: list[Request]) -> None:
    for tree in build_trees(chosen, 8):
        longest = max(len(chosen[index].tokens) - 1 for index, _ in tree.reads)
        assert len(tree) <= max(8, longest)


def test_a_shared_context_is_one_path() -> None:
    context = tuple(range(10))
    (tree,) = build_trees([Request((*context, 20, 21, 22), 3), Request((*context, 30, 31), 2)], 100)
    assert len(tree) == 10 + 2 + 1  # the last token of each is predicted, never read
    assert [nodes[0] for _, nodes in tree.reads] == [9, 9]


def test_one_token_answers_cost_nothing_beyond_their_context() -> None:
    (tree,) = build_trees([Request((1, 2, 3, answer), 1) for answer in (4, 5)], 100)
    assert tree.tokens == [1, 2, 3]
    assert layout([tree]).mask is None  # a plain row keeps the model's own, faster mask


def test_requests_beyond_the_attention_window_stay_alone() -> None:
    pair = [Request((*range(20), answer), 1) for answer in (30, 31)]
    assert len(build_trees(pair, 100, longest_shared=20)) == 1
    assert len(build_trees(pair, 100, longest_shared=19)) == 2


def test_rows_come_longest_first() -> None:
    lengths = [len(tree) for tree in build_trees([Request((n, *range(n)), 1) for n in (3, 9, 5)], 0)]
    assert lengths == [9, 5, 3]
