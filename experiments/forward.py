"""The forward process, to look at: how a photograph and a mixture of Gaussians turn into noise.

    python -m experiments.forward --out=runs/forward
    python -m experiments.forward --only=photo --image=cat.jpg --schedule=cosine --steps=1000

Writes, each as a GIF and as a page with a slider and a play button:

  photo-SCHEDULE    a photograph, noised step by step by the Markov chain;
  mixture-constant  samples of a 1-D mixture under beta = 0.5 for 40 steps, against the exact
                    density of the noised mixture;
  mixture-NAME      the same under each of the library's schedules;

and `forward.html`, which compares the schedules and says how well the samples agree with the exact
densities (Kolmogorov and Smirnov's statistic).
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from scipy.special import ndtr

from experiments import runtime
from experiments.build import DISCRETE
from jaxdiff import denoisers, process, schedules, viz
from jaxdiff.base import Node

WEIGHTS, MEANS, STDS = (0.5, 0.3, 0.2), (0.0, 5.0, -3.0), (1.0, 0.5, 1.5)
X = np.linspace(-9.0, 9.0, 721)  # the axis: all but 1e-4 of the mixture, clean or noised
FALSE_ALARM = 1e-3  # how often samples from the right density would be called wrong, per animation

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines the command's options; not on import, where they would meet another command's."""
    define = {"flag_values": values}
    flags.DEFINE_string(
        "out", "runs/forward", "Folder to write to; made if it is missing.", **define
    )
    flags.DEFINE_enum(
        "only", None, ["photo", "mixture"], "Make one of the two; else both.", **define
    )
    flags.DEFINE_string("image", None, "A photograph; else one that scikit-learn ships.", **define)
    flags.DEFINE_integer(
        "image_size", 256, "The photograph's longer side is reduced to this.", 8, **define
    )
    flags.DEFINE_enum(
        "schedule", "linear", list(DISCRETE), "What the photograph is noised under.", **define
    )
    flags.DEFINE_integer("steps", 1000, "Steps of each schedule.", 1, **define)
    flags.DEFINE_integer("frames", 50, "Frames at most, besides the clean one.", 1, **define)
    flags.DEFINE_integer("samples", 20_000, "Samples of the mixture.", 100, **define)
    flags.DEFINE_integer("seed", 0, "Seed of all noise.", 0, **define)


class Chain(NamedTuple):
    """A forward chain, thinned.

    Attributes:
      states: `(K+1, B, ...)`, clean data first.
      nodes: the points of the process at which they are, each with scalar fields.
      captions: what to write under them.
    """

    states: np.ndarray
    nodes: list[Node]
    captions: list[str]


_forward_chain = jax.jit(process.forward_chain, static_argnames="every")


def run_chain(
    key: jax.Array, schedule: schedules.NoiseSchedule, x0: np.ndarray, frames: int
) -> Chain:
    """Runs the forward chain on x0 `(B, ...)` and keeps the clean data and at most `frames`."""
    every = -(-schedule.num_steps // frames)
    states = np.asarray(_forward_chain(key, schedule, x0, every=every))
    nodes = [Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))]
    for k in range(1, len(states)):
        nodes.append(schedule.at(min(k * every, schedule.num_steps) - 1))
    captions = [
        (f"t = {node.t}" if node.t >= 0 else "clean data")
        + f", alpha = {node.alpha:.3f}, sigma = {node.sigma:.3f}"
        for node in jax.device_get(nodes)
    ]
    return Chain(states, nodes, captions)


def load_photo(path: str | None, size: int) -> np.ndarray:
    """Returns a photograph as float32 `(H, W, 3)` in [-1, 1], its longer side at most `size`.

    Args:
      path: an image file; without it, the picture of a temple that scikit-learn ships.
      size: the longest side.

    Raises:
      OSError: the file does not exist or cannot be read.
      ValueError: the file is no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path is None:
        from sklearn.datasets import load_sample_image

        picture = Image.fromarray(load_sample_image("china.jpg"))
    else:
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")  # cameras' rotation
        except UnidentifiedImageError as error:
            raise ValueError(f"--image={path} is not an image that Pillow can read") from error
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / 127.5 - 1


def cdf(x: np.ndarray, node: Node) -> np.ndarray:
    """Returns the mixture's exact distribution function at a node, by hand: a check on samples."""
    alpha, sigma = float(node.alpha), float(node.sigma)
    terms = (
        weight * ndtr((x - alpha * mean) / np.hypot(alpha * std, sigma))
        for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True)
    )
    return np.asarray(sum(terms))


def ks_statistic(samples: np.ndarray, node: Node) -> float:
    """Returns the largest distance between the samples' distribution function and the exact one."""
    exact = cdf(np.sort(samples.ravel()), node)
    steps = np.arange(exact.size + 1) / exact.size
    return float(np.max(np.maximum(steps[1:] - exact, exact - steps[:-1])))


def ks_bound(num_samples: int, num_tests: int, false_alarm: float = FALSE_ALARM) -> float:
    """Returns what the largest of several statistics passes with at most this probability.

    Dvoretzky, Kiefer, Wolfowitz and Massart: P(D > d) <= 2 exp(-2 n d²), for any n; summed over the
    tests, which need not be independent.
    """
    return float(np.sqrt(np.log(2 * num_tests / false_alarm) / (2 * num_samples)))


def write_both(
    out: pathlib.Path,
    name: str,
    pages: Sequence[np.ndarray],
    captions: Sequence[str],
    title: str,
    description: str,
    gif: Sequence[np.ndarray] | None = None,
) -> Iterator[pathlib.Path]:
    """Writes an animation as GIF and as a page; the GIF's frames may differ from the page's."""
    yield viz.save_gif(out / f"{name}.gif", pages if gif is None else gif)
    yield viz.html_player(
        out / f"{name}.html", pages, title=title, captions=captions, description=description
    )


def photo(
    out: pathlib.Path, x0: np.ndarray, name: str, steps: int, frames: int, seed: int
) -> tuple[list[pathlib.Path], viz.Section]:
    """Noises a photograph `(H, W, 3)`; returns what it wrote and a section for the report."""
    chain = run_chain(jax.random.key(seed), DISCRETE[name](steps), x0[None], frames)
    images = viz.to_uint8(chain.states[:, 0])
    # A GIF has no caption of its own, so its frames carry theirs.
    marked = [viz.with_caption(*pair) for pair in zip(images, chain.captions, strict=True)]
    written = write_both(
        out,
        f"photo-{name}",
        images,
        chain.captions,
        f"A photograph under the {name} schedule",
        f"The forward chain adds a little noise in each of {steps} steps: "
        "x_t = alpha x_0 + sigma eps. Values outside [-1, 1] are shown as black or white.",
        marked,
    )
    stills = np.linspace(0, len(marked) - 1, min(6, len(marked))).round().astype(int)
    grid = viz.image_grid(np.stack([marked[i] for i in stills]), columns=3, padding=8)
    section = viz.Section("A photograph", [viz.Image(grid, f"The {name} schedule, {steps} steps.")])
    return list(written), section


def mixture(
    out: pathlib.Path, steps: int, frames: int, samples: int, seed: int
) -> tuple[list[pathlib.Path], list[viz.Section]]:
    """Noises samples of the mixture; returns what it wrote and sections for the report."""
    exact = denoisers.gaussian_mixture(WEIGHTS, np.array(MEANS)[:, None], STDS)
    density = jax.jit(lambda node: jnp.exp(exact.log_density(jnp.asarray(X)[:, None], node)))
    key = jax.random.key(seed)
    x0 = exact.sample(key, samples)
    runs = {"constant": schedules.from_betas(np.full(40, 0.5))}
    runs |= {name: make(steps) for name, make in DISCRETE.items()}
    chains = {name: run_chain(key, schedule, x0, frames) for name, schedule in runs.items()}

    written, rows = [], []
    bar = tqdm.tqdm(
        total=sum(len(chain.nodes) for chain in chains.values()),
        desc="drawing",
        unit="frame",
        disable=None,  # quiet where there is no terminal
    )
    with bar:
        for name, chain in chains.items():
            curves = [np.asarray(density(node)) for node in chain.nodes]
            draw = functools.partial(
                viz.histogram_frame,
                x=X,
                reference=np.exp(-(X**2) / 2) / np.sqrt(2 * np.pi),
                y_max=1.2 * max(0.4, *(curve.max() for curve in curves)),
                bins=90,
                labels=("Markov chain", "exact density", "N(0, 1)"),
            )
            pictures = []
            for state, curve, caption in zip(chain.states, curves, chain.captions, strict=True):
                pictures.append(draw(state, density=curve, title=f"{name}: {caption}"))
                bar.update()
            betas = "beta = 0.5 in each of 40 steps" if name == "constant" else f"{steps} steps"
            written += write_both(
                out,
                f"mixture-{name}",
                pictures,
                chain.captions,
                f"A mixture of three Gaussians, {name} schedule",
                f"Weights 0.5, 0.3, 0.2; means 0, 5, -3; standard deviations 1, 0.5, 1.5; {betas}. "
                f"The bars are {samples:,} samples, noised step by step; the line is the exact "
                "density of the noised mixture, in closed form.",
            )
            worst = max(map(ks_statistic, chain.states, chain.nodes))
            bound = ks_bound(samples, len(chain.nodes))
            last = chain.nodes[-1]
            rows.append(
                {
                    "schedule": name,
                    "steps": runs[name].num_steps,
                    "last alpha": last.alpha,
                    "last sigma": last.sigma,
                    "largest KS": round(worst, 4),
                    "KS bound": round(bound, 4),
                    "agrees": "yes" if worst <= bound else "NO",
                }
            )
    return written, _compare(runs, rows)


def _compare(
    runs: dict[str, schedules.NoiseSchedule], rows: list[dict[str, object]]
) -> list[viz.Section]:
    alphas, snrs = {}, {}
    for name, schedule in runs.items():
        if name != "constant":
            time = (np.arange(schedule.num_steps) + 1) / schedule.num_steps
            alphas[name] = (time, schedule.nodes.alpha)
            snrs[name] = (time, schedule.nodes.log_snr)
    return [
        viz.Section(
            "Schedules",
            [
                viz.Lines(alphas, "t / T", "alpha", caption="What remains of the data."),
                viz.Lines(snrs, "t / T", "log SNR", caption="log(alpha² / sigma²)."),
            ],
        ),
        viz.Section(
            "A mixture of three Gaussians",
            [
                "The Markov chain against the exact density: the largest distance between the "
                "distribution functions over all frames, and the bound that it passes by chance "
                f"once in {1 / FALSE_ALARM:g} runs at most, for each of the schedules.",
                viz.Table(rows),
            ],
        ),
    ]


def check_out(path: str) -> pathlib.Path:
    """Makes the folder and returns it, or says at once why nothing can be written there.

    Raises:
      OSError: the folder cannot be made or written to.
    """
    out = pathlib.Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"--out={path} is not a folder that can be written to: {error}") from error
    return out


def main() -> None:
    """Runs the command."""
    # The user's mistakes are known before the first file is written.
    x0 = None if FLAGS.only == "mixture" else load_photo(FLAGS.image, FLAGS.image_size)
    out = check_out(FLAGS.out)

    written, sections = [], []
    if x0 is not None:
        paths, section = photo(out, x0, FLAGS.schedule, FLAGS.steps, FLAGS.frames, FLAGS.seed)
        written += paths
        sections.append(section)
    if FLAGS.only != "photo":
        paths, more = mixture(out, FLAGS.steps, FLAGS.frames, FLAGS.samples, FLAGS.seed)
        written += paths
        sections += more
    written.append(
        viz.report_html(out / "forward.html", title="The forward process", sections=sections)
    )
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    runtime.command(define_flags, main)
