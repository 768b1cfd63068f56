"""What commands leave behind is undone; plots, which took most of small runs' time, are few."""

import os

import jax
import pytest

from jaxdiff.viz import reports

DRAWN = {}


def once(draw):
    """Returns the function with plots that differ in their numbers only taken for the same."""

    def drawn(plot):
        leaves, structure = jax.tree.flatten(plot, is_leaf=lambda part: isinstance(part, list))
        texts = [leaf for leaf in leaves if isinstance(leaf, (str, bool))]
        key = (draw, structure, *texts)
        if key not in DRAWN:
            DRAWN[key] = draw(plot)
        return DRAWN[key]

    return drawn


@pytest.fixture(scope="module", autouse=True)
def _each_kind_of_plot_is_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lines_svg", "comparison_svg"):
            patch.setattr(reports, name, once(getattr(reports, name)))
        yield


@pytest.fixture(autouse=True)
def _the_environment_stays():
    """Commands set what the processes that they start are to read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
