"""A page that plays an animation, frame by frame."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxdiff.viz import _html
from jaxdiff.viz._files import PathLike, check_frames, check_milliseconds, write


def html_player(
    path: PathLike,
    frames: Sequence[np.ndarray] | np.ndarray,
    *,
    title: str,
    captions: Sequence[str],
    description: str = "",
    milliseconds: int = 100,
) -> pathlib.Path:
    """Writes a page that shows frames one at a time, with a slider and a play button.

    The arrow keys, Home, End and the space bar work too. Without JavaScript, and on paper, the
    page shows all frames with their captions.

    Args:
      path: the file; missing folders are made, an existing file is replaced at once.
      frames: uint8 images of one shape, `(K, H, W, C)` or a sequence of `(H, W, C)`, C 1 or 3.
        Small ones are shown enlarged, pixel by pixel.
      title: the page's heading.
      captions: one line for each frame.
      description: text under the heading; blank lines separate paragraphs.
      milliseconds: how long a frame is shown while playing.

    Returns:
      The path.

    Raises:
      ImportError: Pillow is missing.
      TypeError: the frames are not uint8.
      ValueError: there are none, their shapes differ, captions and frames are not as many, or
        the duration is out of range.
    """
    frames = check_frames(frames)
    if len(captions) != len(frames):
        raise ValueError(
            f"captions must be as many as frames, got {len(captions)} for {len(frames)} frames"
        )
    check_milliseconds("milliseconds", milliseconds)
    figures = "\n".join(
        _html.pixel_figure(frame, alt=caption, caption=caption, side=640)
        for frame, caption in zip(frames, captions, strict=True)
    )
    body = f"""
<main class="player">
<h1>{html.escape(title)}</h1>
{_html.paragraphs(description)}
<div id="frames" data-milliseconds="{int(milliseconds)}">
{figures}
</div>
<div id="controls" role="group" aria-label="Player">
<button id="play" type="button">Play</button>
<input id="slider" type="range" min="0" max="{len(frames) - 1}" step="1" value="0"
 aria-label="Frame">
<span id="position" aria-hidden="true"></span>
</div>
<p class="hint">Arrow keys step, Home and End jump, space plays and pauses.</p>
</main>
<script>{_PLAYER_SCRIPT}</script>
"""
    return write(path, _html.page(title, body).encode())


_PLAYER_SCRIPT = """
"use strict";
(() => {
  const frames = document.getElementById("frames");
  const figures = [...frames.querySelectorAll("figure")];
  const slider = document.getElementById("slider");
  const button = document.getElementById("play");
  const position = document.getElementById("position");
  const last = figures.length - 1;
  let index = 0;
  let timer = null;

  function show(wanted) {
    figures[index].classList.remove("shown");
    index = Math.min(Math.max(wanted, 0), last);
    figures[index].classList.add("shown");
    slider.value = index;
    slider.setAttribute("aria-valuetext", figures[index].textContent);
    position.textContent = `${index + 1} / ${figures.length}`;
  }
  function pause() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  }
  function play() {
    if (index === last) show(0);
    button.textContent = "Pause";
    timer = setInterval(() => {
      show(index + 1);
      if (index === last) pause();
    }, Number(frames.dataset.milliseconds));
  }
  function toggle() { timer === null ? play() : pause(); }

  button.addEventListener("click", toggle);
  slider.addEventListener("input", () => { pause(); show(Number(slider.value)); });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === " ") {
      if (event.target === button) return;  // the button presses itself
      event.preventDefault();
      toggle();
      return;
    }
    const steps = { ArrowRight: index + 1, ArrowUp: index + 1, ArrowLeft: index - 1,
      ArrowDown: index - 1, Home: 0, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();  // the slider would step once more, the page would scroll
    pause();
    show(steps[event.key]);
  });
  document.documentElement.classList.add("live");
  show(0);
})();
"""
