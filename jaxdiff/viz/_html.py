"""HTML pages in one file: the frame of a page, its style, and the pieces that pages share."""

from __future__ import annotations

import base64
import html

import numpy as np

from jaxdiff.viz._files import png_bytes


def page(title: str, body: str) -> str:
    """Returns a whole page."""
    # The policy makes the promise binding: the browser itself refuses every request.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;\
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>{body}</body>
</html>
"""


def figure(data: bytes, kind: str, alt: str, caption: str, attributes: str = "") -> str:
    """Returns an image of the type image/`kind`, with its data inside and a line under it."""
    code = base64.b64encode(data).decode()
    tag = f'<img{attributes} alt="{html.escape(alt)}" src="data:image/{kind};base64,{code}">'
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{tag}{caption}</figure>"


def pixel_figure(image: np.ndarray, alt: str, caption: str, side: int) -> str:
    """Returns a checked image, enlarged by a whole number up to `side` on its longer side."""
    height, width = image.shape[:2]
    scale = max(1, side // max(height, width))
    # Enlarged pixels stay squares: what is looked at is the data, not an interpolation of it.
    crisp = ' class="crisp"' if scale > 1 else ""
    size = f'{crisp} width="{width * scale}" height="{height * scale}"'
    return figure(png_bytes(image), "png", alt, caption, size)


def paragraphs(text: str) -> str:
    """Returns text as paragraphs, which blank lines separate."""
    parts = (part.strip() for part in text.split("\n\n"))
    return "\n".join(f"<p>{html.escape(part)}</p>" for part in parts if part)


_STYLE = """
:root { --text: #1c2024; --soft: #5b6570; --back: #fbfbfa; --card: #ffffff; --line: #d9dde1;
  --accent: #0067a3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8ea; --soft: #a0a9b2; --back: #15181b; --card: #1d2125; --line: #363c42;
    --accent: #6cb8ec; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
main.player { max-width: 46rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere; }
.hint, figcaption, caption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
img.crisp { image-rendering: pixelated; }
img[src^="data:image/svg"] { background: #fff; }
figcaption { margin-top: .4rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .93rem; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
#controls { display: none; gap: .9rem; align-items: center; margin-top: .5rem; }
#controls ~ .hint { display: none; }
#slider { flex: 1; min-width: 6rem; accent-color: var(--accent); }
#play { min-width: 5.2rem; padding: .4rem .9rem; font: inherit; color: var(--text);
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
#play:hover { border-color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#position { min-width: 4.5rem; text-align: right; color: var(--soft); font-size: .9rem;
  font-variant-numeric: tabular-nums; }
@media screen {
  .live #frames { display: grid; justify-content: center; padding: 1rem;
    background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
  .live #frames figure { grid-area: 1 / 1; margin: 0; visibility: hidden; }
  .live #frames figure.shown { visibility: visible; }
  .live #frames img { margin: 0 auto; }
  .live #frames figcaption { text-align: center; color: var(--text); font-size: 1rem; }
  .live #controls { display: flex; }
  .live #controls ~ .hint { display: block; } }
"""
