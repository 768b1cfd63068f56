"""Pictures, animations and pages to look at: arrays in, PNG, GIF and self-contained HTML out.

Stands alone: NumPy at the top, Pillow and matplotlib only inside the functions that draw
(`pip install "jaxdiff[plots]"`). Nothing here knows diffusion. Images are channels last with one
or three channels; pictures that are ready to be shown are uint8. Every file is written beside its
place and moved there when it is whole. Pages make no request: everything is inside the file, so
they can be mailed, archived and opened from disk.

Example:
  >>> import numpy as np
  >>> digits = np.random.default_rng(0).uniform(-1, 1, (10, 8, 8, 1))
  >>> image_grid(digits, columns=5).shape
  (67, 166, 1)
"""

from jaxdiff.viz.comparisons import Bars, Densities, Heatmaps, Trajectories
from jaxdiff.viz.pictures import image_grid, save_gif, save_png, to_uint8, with_caption
from jaxdiff.viz.player import html_player
from jaxdiff.viz.plots import Lines, histogram_frame
from jaxdiff.viz.reports import Image, Section, Table, report_html

__all__ = [
    "Bars",
    "Densities",
    "Heatmaps",
    "Image",
    "Lines",
    "Section",
    "Table",
    "Trajectories",
    "histogram_frame",
    "html_player",
    "image_grid",
    "report_html",
    "save_gif",
    "save_png",
    "to_uint8",
    "with_caption",
]
