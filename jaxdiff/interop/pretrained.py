"""What comes out of another library's checkpoint, and how that library draws from it.

A checkpoint is a network with its parameters; the schedule and the parameterization it was trained
with; and habits, by which its makers drew the samples that they showed. These are a `Drawing`, and
`grid` and `ddim` follow them where they differ from ours:

- indices are counted as there, of a stride T // N with an offset, and may end at index 0 instead of
  at clean data;
- diffusers' DDIM clips the clean data that it believes in, and then goes on with the noise it
  believed in before, x_s = alpha_s clip(x0) + sigma_s eps, where ours finds the noise anew.

One habit is not followed: from an index other than 0, diffusers' ancestral sampling adds noise on
the step that arrives at clean data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.base import Array, Denoiser, Info, Node, PyTree, Solver, SolverState
from jaxdiff.models import UNet
from jaxdiff.predictions import Parameterization, eps_from_x0
from jaxdiff.schedules import NoiseSchedule


class Drawing(NamedTuple):
    """How the library that a checkpoint comes from draws samples from it.

    Attributes:
      method: "ddpm" for ancestral sampling or "ddim".
      num_steps: how many steps it takes unless told otherwise.
      spacing: how the indices are spread: "leading", "trailing" or "linspace" (Lin et al. 2023,
        table 2).
      steps_offset: what is added to the indices of "leading".
      ends_clean: whether the last step arrives at clean data, or else at index 0.
      clip: the clean data believed in is kept within [-clip, clip]; None leaves it.
      noise_before_clipping: whether DDIM goes on with the noise believed in before clipping: see
        `ddim`. Otherwise clip the denoiser, with `guidance.clip_x0`, and use `solvers.ddim`.
      variance: that of ancestral sampling, for `solvers.ddpm`.
    """

    method: Literal["ddpm", "ddim"]
    num_steps: int
    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 0
    ends_clean: bool = True
    clip: float | None = 1.0
    noise_before_clipping: bool = True
    variance: Literal["small", "large", "learned"] = "small"


class Source(NamedTuple):
    """What stood in a directory of diffusers, kept so that it can be written back.

    Attributes:
      config: of the network, config.json.
      scheduler: scheduler_config.json.
      index: model_index.json of a pipeline, or None.
      folders: where the network and the scheduler are within the directory; "" for itself.
      dtypes: the dtypes of the tensors by their names.
    """

    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any] | None
    folders: tuple[str, str]
    dtypes: Mapping[str, np.dtype]


class Pretrained(NamedTuple):
    """A trained network and all that is needed to draw from it or to train it further.

    Attributes:
      model: the network; `model.apply` is a `jaxdiff.base.Network`. Its noise levels are indices of
        the schedule.
      params: its parameters, float32.
      schedule: the schedule it was trained on.
      parameterization: what its output means.
      image_shape: (height, width, channels) of the images it was trained on, or None if the
        checkpoint does not say. They were scaled to [-1, 1].
      learned_variance: whether the output has twice the channels, half of them for the variance, as
        `denoisers.from_network` reads them.
      drawing: how the library it comes from draws.
      source: what `save_diffusers` writes back; None if it does not come from diffusers.
    """

    model: UNet
    params: PyTree
    schedule: NoiseSchedule
    parameterization: Parameterization
    image_shape: tuple[int, int, int] | None
    learned_variance: bool
    drawing: Drawing
    source: Source | None = None


def grid(pretrained: Pretrained, num_steps: int | None = None) -> Node:
    """Returns the nodes that the library which a checkpoint comes from visits.

    With T indices and N steps they are i (T // N) + offset for "leading", round(T - i T/N) - 1 for
    "trailing" and round(i (T-1) / (N-1)) for "linspace", from noise to data.

    Args:
      pretrained: the checkpoint.
      num_steps: N, from 1 to T; None takes `drawing.num_steps`.

    Returns:
      The grid, fields `(N+1,)`.

    Raises:
      ValueError: `num_steps` is out of range, or `steps_offset` leads beyond the last index.
    """
    drawing, schedule = pretrained.drawing, pretrained.schedule
    total = schedule.num_steps
    steps = drawing.num_steps if num_steps is None else num_steps
    is_int = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
    if not is_int or not 1 <= steps <= total:
        raise ValueError(f"num_steps must be an integer from 1 to the {total} steps, got {steps!r}")
    if drawing.spacing == "leading":
        t = np.arange(steps)[::-1] * (total // steps) + drawing.steps_offset
    elif drawing.spacing == "trailing":
        t = np.round(total - np.arange(steps) * (total / steps)) - 1
    else:
        t = np.round(np.linspace(0, total - 1, steps))[::-1]
    if t[0] >= total:
        raise ValueError(
            f"steps_offset {drawing.steps_offset} leads to index {t[0]} of {total}: take fewer "
            f"steps than {steps}"
        )
    nodes = schedule.at(jnp.asarray(t, jnp.int32))
    last = Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))
    if not drawing.ends_clean:
        last = schedule.at(0)
    return Node(*(jnp.append(getattr(nodes, f), getattr(last, f)) for f in ("t", "alpha", "sigma")))


def ddim(clip: float | None = 1.0) -> Solver:
    """DDIM as diffusers has it: what is clipped is the clean data, and not the noise.

    x_s = alpha_s clip(x0) + sigma_s eps, eps = (x - alpha x0) / sigma (Song et al. 2021, eq. 12
    with eta = 0). Without clipping it is `solvers.ddim()`.

    Args:
      clip: the clean data is kept within [-clip, clip]; None leaves it. The denoiser must not clip.

    Returns:
      The solver, one evaluation a step; it draws nothing.

    Raises:
      ValueError: `clip` is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be None or positive, got {clip}")

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        prediction = denoiser(state.x, now)
        eps = eps_from_x0(prediction.x0, state.x, now)
        x0 = prediction.x0 if clip is None else jnp.clip(prediction.x0, -clip, clip)
        after = next.over(x0)
        info = Info(x0, prediction.evaluations)
        return SolverState(after.alpha * x0 + after.sigma * eps), info

    return Solver(lambda x, node: SolverState(x), step)
