"""Pages are parsed, and their images decoded, with other tools than wrote them."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxdiff import viz

PIL_Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def frames_of(number, height=6, width=5, channels=3):
    return np.random.default_rng(0).integers(
        0, 256, (number, height, width, channels), dtype=np.uint8
    )


class Page(HTMLParser):
    """Collects a page's tags with their attributes, its visible text and its embedded images."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def images(self):
        for attrs in self.all("img"):
            kind, _, code = attrs["src"].partition(";base64,")
            yield kind, base64.b64decode(code, validate=True)


def assert_self_contained(page):
    for _, attrs in page.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|fetch\(|https?://", page.raw)


NASTY = """<script>alert("x")</script> & 'quoted' "t" """.strip()


def test_player_holds_every_frame_with_its_caption(tmp_path):
    frames = frames_of(4)
    captions = [f"t = {i}" for i in range(3)] + [NASTY]
    path = viz.html_player(
        tmp_path / "a.html", frames, title=NASTY, captions=captions, description=f"one\n\n{NASTY}"
    )
    page = Page(path)
    assert_self_contained(page)
    assert len(page.all("script")) == 1  # ours
    assert [attrs["alt"] for attrs in page.all("img")] == captions
    for (kind, data), frame in zip(page.images(), frames, strict=True):
        assert kind == "data:image/png"
        np.testing.assert_array_equal(np.asarray(PIL_Image.open(io.BytesIO(data))), frame)
    slider, button = page.all("input")[0], page.all("button")[0]
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "3")
    assert slider["aria-label"]
    assert button["type"] == "button"
    assert page.text.count(NASTY) == 4  # window title, heading, description, caption


def test_player_wants_a_caption_for_each_frame(tmp_path):
    with pytest.raises(ValueError, match="got 2 for 3 frames"):
        viz.html_player(tmp_path / "a.html", frames_of(3), title="", captions=["a", "b"])


def test_report_shows_all_kinds_of_blocks(tmp_path):
    image = frames_of(1, 8, 8)[0]
    png = viz.save_png(tmp_path / "grid.png", image)
    x = np.arange(1, 9)
    report = viz.report_html(
        tmp_path / "report.html",
        title=NASTY,
        sections=[
            viz.Section("Text & tables", [NASTY, {"a": {"b": 1.5, "c": None}, NASTY: True}]),
            ("Rows", [viz.Table([{"step": 1, "loss": 0.25}, {"step": 2, "bits": 3.0}]), [[1, 2]]]),
            ("Images", [image, png, viz.Image(png, NASTY)]),
            ("Plots", [viz.Lines({NASTY: (x, 1 / x), "_b": (x, x)}, "step", "loss", log_y=True)]),
            ("Nothing", [[], {}, ""]),
        ],
    )
    page = Page(report)
    assert_self_contained(page)
    assert not page.all("script")
    kinds = [kind for kind, _ in page.images()]
    assert kinds == ["data:image/png"] * 3 + ["data:image/svg+xml"]
    assert list(page.images())[1][1] == png.read_bytes()
    for text in ("Text & tables", "a.b", "1.5", "None", "0.25", "bits", NASTY):
        assert text in page.text
    assert len(page.all("table")) == 3
    assert all(attrs["alt"] for attrs in page.all("img"))


def test_tables_round_numbers_of_every_origin(tmp_path):
    import jax.numpy as jnp

    row = [np.float64(1 / 3), jnp.float32(2), np.int64(7), True, "1e3"]
    page = viz.report_html(tmp_path / "a.html", title="", sections=[("", [[row]])]).read_text()
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page) == ["0.333333", "2", "7", "True", "1e3"]
    assert page.count('class="number"') == 3


@pytest.mark.parametrize(
    ("blocks", "error", "match"),
    [
        ("text", TypeError, "must be a list"),
        ([3], TypeError, "got int"),
        ([np.zeros((2, 2, 3))], TypeError, "uint8"),
        ([viz.Lines({"loss": ([1, 2], [1])})], ValueError, "'loss'.*2 and 1"),
        ([viz.Image("/nowhere/a.png")], FileNotFoundError, "nowhere"),
        ([viz.Image(__file__)], ValueError, "must be PNG"),
    ],
)
def test_report_errors(tmp_path, blocks, error, match):
    with pytest.raises(error, match=match):
        viz.report_html(tmp_path / "a.html", title="", sections=[("h", blocks)])
    assert not list(tmp_path.iterdir())
