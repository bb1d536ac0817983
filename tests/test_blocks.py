"""Layouts: what a layout string means, which are refused, and that views are views."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pion_hf.optim.blocks import Layout, merge_rows, split

SIZES = st.integers(1, 5)


@st.composite
def layouts_and_tensors(draw):
    """A layout and a tensor it fits, of distinct values, with the expected `(E, out_i, in)` of every piece."""
    width, experts = draw(SIZES), draw(st.none() | SIZES)
    transposed = draw(st.booleans())
    form = draw(st.sampled_from(["whole", "rows", "interleaved"]))
    if form == "rows":
        rows = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
        layout, edges = Layout(transposed, rows=rows), [0, *itertools.accumulate(rows)]
        of_piece = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        out = sum(rows)
    elif form == "interleaved":
        heads, parts, dim = draw(SIZES), draw(SIZES), draw(SIZES)
        layout, out = Layout(transposed, interleaved=(heads, parts)), heads * parts * dim
        of_piece = [[r for r in range(out) if r // dim % parts == i] for i in range(parts)]
    else:
        layout, out = Layout(transposed), draw(SIZES)
        of_piece = [list(range(out))]
    matrices = torch.arange(float((experts or 1) * out * width)).view(experts or 1, out, width)
    stored = (matrices.mT if transposed else matrices).contiguous()
    return layout, stored if experts else stored[0], [matrices[:, rows] for rows in of_piece]


@given(layouts_and_tensors())
def test_split_gives_the_rows_of_each_matrix(case):
    layout, tensor, expected = case
    views = split(tensor, layout)
    assert len(views) == layout.pieces == len(expected)
    for view, matrix in zip(views, expected, strict=True):
        assert view.ndim == 4
        torch.testing.assert_close(merge_rows(view), matrix, rtol=0, atol=0)


@given(layouts_and_tensors())
def test_what_is_written_to_the_views_lies_in_the_tensor(case):
    """Every entry belongs to exactly one view: adding 1 through all of them adds 1 everywhere, once."""
    layout, tensor, expected = case
    before = tensor.clone()
    views = split(tensor, layout)
    for view in views:
        assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        view.add_(1)
    torch.testing.assert_close(tensor, before + 1, rtol=0, atol=0)
    for view, matrix in zip(views, expected, strict=True):  # a round trip through merged rows, as in a step
        view.copy_(matrix.view(view.shape))
    torch.testing.assert_close(tensor, before, rtol=0, atol=0)


@given(layouts_and_tensors())
def test_a_layout_survives_its_string(case):
    layout, _, _ = case
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("", Layout()),
        ("transposed", Layout(transposed=True)),
        ("rows=4,2,2", Layout(rows=(4, 2, 2))),
        ("transposed;rows=8,8", Layout(transposed=True, rows=(8, 8))),
        ("interleaved=4,3", Layout(interleaved=(4, 3))),
        ("transposed;interleaved=8,2", Layout(transposed=True, interleaved=(8, 2))),
    ],
)
def test_the_strings_of_the_grammar(text, layout):
    """Literal strings: checkpoints hold them, so they may not change."""
    assert Layout.parse(text) == layout
    assert str(layout) == text


@pytest.mark.parametrize(
    "text",
    [
        "transpose",
        "transposed=1",
        "transposed=",
        "rows",
        "rows=",
        "rows=4,",
        "rows=4,x",
        "rows=4,0",
        "rows=-4,8",
        "rows=4.0,4",
        "interleaved=4",
        "interleaved=4,3,2",
        "interleaved=0,3",
        "interleaved=4,-3",
        "rows=4,4;;transposed",
        ";",
        "rows=4,4 ; transposed",
        "transposed;transposed",
        "rows=2,2;rows=4",
        "rows=6,6;interleaved=4,3",
        None,
        3,
    ],
)
def test_a_wrong_layout_is_refused_with_the_right_forms(text):
    with pytest.raises(
        ValueError, match=r"layout.*'transposed', 'rows=a,b,\.\.\.', 'interleaved=heads,parts'"
    ) as caught:
        Layout.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((6, 4), "rows=4,4", r"rows \(4, 4\) sum to 8, the matrix has 6 rows"),
        ((4, 6), "transposed;rows=2,2", r"sum to 4, the matrix has 6 rows"),
        ((3, 6, 4), "rows=9,9", r"sum to 18, the matrix has 6 rows"),
        ((10, 4), "interleaved=4,3", "10 rows do not divide into 4 heads of 3 matrices"),
        ((4,), "", r"not the shape \(4,\)"),
        ((), "", r"not the shape \(\)"),
        ((2, 2, 2, 2), "", r"not the shape \(2, 2, 2, 2\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(shape, layout, message):
    with pytest.raises(ValueError, match=message):
        split(torch.zeros(shape), Layout.parse(layout))
