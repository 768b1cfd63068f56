"""What a network's output means: parameterizations, each one linear row.

Every training target in use is a linear form of clean data and noise,

    target = a * x0 + b * eps,                                                             (1)

with (a, b) read off the node. With x = alpha * x0 + sigma * eps, eq. (1) is solved for the clean
data by

    x0 = (b * x - sigma * out) / (b * alpha - sigma * a),                                  (2)

and an error in the output is worth an error in x0 by

    |d out|² = ((b * alpha - sigma * a) / sigma)² |d x0|².                                 (3)

| name | a | b | source |
| --- | --- | --- | --- |
| x0 | 1 | 0 | |
| eps | 0 | 1 | Ho et al. 2020, eq. 14 |
| v | -sigma | alpha | Salimans & Ho 2022, appendix D |
| score | 0 | -1/sigma | Song et al. 2021 |
| flow | -1 | 1 | Liu et al. 2023 (rectified flow), from data to noise |
| edm | from c_skip, c_out | | Karras et al. 2022, table 1 |

Example:
  >>> import jax.numpy as jnp
  >>> from jaxdiff import schedules
  >>> node = schedules.linear().at(500)
  >>> x0, noise = jnp.ones((1, 4)), jnp.full((1, 4), 0.5)
  >>> x = node.alpha * x0 + node.sigma * noise
  >>> out = v.target(x0, noise, node)
  >>> print(v.x0(out, x, node).round(5), eps.x0(noise, x, node).round(5))
  [[1. 1. 1. 1.]] [[1. 1. 1. 1.]]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff._checks import check_same_shape
from jaxdiff.base import Array, Node


class Parameterization(NamedTuple):
    """What a network's raw output means.

    Attributes:
      name: the name, for messages.
      row: `node -> (a, b)`, eq. (1).
      needs_signal: whether eq. (2) is singular where alpha = 0.
    """

    name: str
    row: Callable[[Node], tuple[Array | float, Array | float]]
    needs_signal: bool = False

    def target(self, x0: Array, eps: Array, node: Node) -> Array:
        """Returns what the network should say, eq. (1).

        Args:
          x0: clean data `(B, ...)`.
          eps: noise, shape of `x0`.
          node: the point of the process, scalar or `(B,)` fields.

        Raises:
          ValueError: `x0` and `eps` differ in shape.
        """
        check_same_shape(x0=x0, eps=eps)
        a, b = self.row(node.over(x0))
        return a * x0 + b * eps

    def x0(self, output: Array, x: Array, node: Node) -> Array:
        """Returns the clean data that an output implies, eq. (2).

        Args:
          output: the network's output, shape of `x`.
          x: noisy data `(B, ...)`.
          node: the point of the process, scalar or `(B,)` fields.

        Raises:
          ValueError: `output` and `x` differ in shape.
        """
        check_same_shape(output=output, x=x)
        node = node.over(x)
        a, b = self.row(node)
        return (b * x - node.sigma * output) / (b * node.alpha - node.sigma * a)


def _nonzero(sigma: Array) -> Array:
    # Keeps the score's row finite at the clean node, where sigma * (1 / sigma) need not be 1.
    return jnp.maximum(sigma, 1e-18)


x0 = Parameterization("x0", lambda node: (1.0, 0.0))
eps = Parameterization("eps", lambda node: (0.0, 1.0), needs_signal=True)
v = Parameterization("v", lambda node: (-node.sigma, node.alpha))
score = Parameterization("score", lambda node: (0.0, -1 / _nonzero(node.sigma)), needs_signal=True)
flow = Parameterization("flow", lambda node: (-1.0, 1.0))


def edm(sigma_data: float = 0.5) -> Parameterization:
    """The preconditioned output F of EDM (Karras et al. 2022, table 1), for any alpha and sigma.

    D = c_skip x + c_out F with the c of the paper at the noise-to-signal ratio sigma / alpha. The
    other half of the preconditioning, c_in and c_noise, is `denoisers.preconditioned`.

    Args:
      sigma_data: the standard deviation of the data, positive.

    Raises:
      ValueError: `sigma_data` is not positive.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")

    def row(node: Node) -> tuple[Array, Array]:
        scale = jnp.sqrt(node.sigma**2 + (sigma_data * node.alpha) ** 2)
        return node.sigma / (sigma_data * scale), -sigma_data * node.alpha / scale

    return Parameterization(f"edm({sigma_data})", row)


def eps_from_x0(x0: Array, x: Array, node: Node) -> Array:
    """Returns the noise in x if the clean data is x0: (x - alpha x0) / sigma.

    Args:
      x0: clean data `(B, ...)`.
      x: noisy data, shape of `x0`.
      node: the point of the process, scalar or `(B,)` fields.

    Returns:
      The noise, shape of `x`; zero at a clean node, which has none.

    Raises:
      ValueError: `x0` and `x` differ in shape.
    """
    check_same_shape(x0=x0, x=x)
    node = node.over(x)
    noisy = node.sigma > 0
    return jnp.where(noisy, (x - node.alpha * x0) / jnp.where(noisy, node.sigma, 1), 0)


def convert(
    output: Array, x: Array, node: Node, source: Parameterization, target: Parameterization
) -> Array:
    """Returns an output of one parameterization as that of another.

    Args:
      output: the output under `source`, shape of `x`.
      x: noisy data `(B, ...)`.
      node: the point of the process, scalar or `(B,)` fields.
      source: what `output` means.
      target: what the result means.

    Raises:
      ValueError: `output` and `x` differ in shape.
    """
    clean = source.x0(output, x, node)
    return target.target(clean, eps_from_x0(clean, x, node), node)


def split_variance(output: Array, channels: int) -> tuple[Array, Array]:
    """Splits the output of a network that also predicts a variance.

    Args:
      output: `(B, ..., 2C)`: C channels of the parameterization's output, and C that say, from -1
        to 1, where the logarithm of the variance lies between the small and the large one (Nichol
        & Dhariwal 2021, eq. 15).
      channels: C, those of the data.

    Returns:
      The output proper and the fraction of `process.reverse_variance`, from 0 to 1, each
      `(B, ..., C)`.

    Raises:
      ValueError: the output has not 2C channels.
    """
    if output.shape[-1] != 2 * channels:
        raise ValueError(
            f"a network that learns the variance of data of {channels} channels must have "
            f"{2 * channels} output channels, got {output.shape}"
        )
    return output[..., :channels], (output[..., channels:] + 1) / 2


def check_signal(parameterization: Parameterization, alpha_can_vanish: bool) -> None:
    """Refuses to divide by a signal of zero.

    Args:
      parameterization: what the network predicts.
      alpha_can_vanish: whether the schedule has a node with alpha = 0.

    Raises:
      ValueError: the parameterization says nothing about x0 at such a node.
    """
    if parameterization.needs_signal and alpha_can_vanish:
        raise ValueError(
            f"{parameterization.name} prediction is singular on a schedule that ends at zero "
            "signal-to-noise (x_T is the noise itself): use predictions.v, x0, flow or edm"
        )
