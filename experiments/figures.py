"""What follows from measured times, and how it is told in tables."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm

from experiments import chips, estimate, programs, runs, runtime
from experiments.sizes import Size


def peer_row(result: Mapping[str, Any]) -> list[str]:
    """Returns a row of the table: times of all sides, and the ratio."""
    times = [
        "failed" if "error" in side else milliseconds(side) for side in result["sides"].values()
    ]
    ahead = f"{spread(result['ratio'])} {result['best']}" if "ratio" in result else "-"
    return [*times, ahead]


def show_failures(what: str, sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a line for each side that failed."""
    for side, told in sides.items():
        if "error" in told:
            print(f"{what}, {side}: {told['error']}")


HEADS = ("images/s", "FLOP/s", "of the peak", "memory")


def of(size: Size, program: programs.Program, seconds: float) -> dict[str, Any]:
    """Returns what follows from the time of a call."""
    device = jax.devices()[0]
    chip = chips.of_kind(device.device_kind)
    peak = chip and (chip.float32 if size.config.model.dtype == "float32" else chip.bfloat16)
    speed = program.flops / seconds
    return {
        "batch_size": program.batch_size,
        "images_per_second": program.batch_size / seconds,
        "flops": program.flops,
        "flops_per_second": speed,
        "share_of_peak": speed / (peak * jax.device_count()) if peak else None,
        "memory": program.memory,
    }


def in_words(figures: Mapping[str, Any]) -> list[str]:
    """Returns the same for a table, under `HEADS`."""
    share, needs = figures["share_of_peak"], sum(figures["memory"].values())
    peak = figures["device_memory_peak"]
    memory = f"{estimate.in_bytes(peak)} at most" if peak else estimate.in_bytes(needs)
    return [
        f"{figures['images_per_second']:,.4g}",
        estimate.in_units(figures["flops_per_second"], "FLOP/s"),
        f"{100 * share:.1f} %" if share is not None else "-",
        memory,
    ]


def milliseconds(found: Mapping[str, Any]) -> str:
    """Returns a median in ms, and from where to where it goes."""
    median, low, high = (1e3 * found[key] for key in ("median", "min", "max"))
    return f"{median:.4g} ({low:.4g}..{high:.4g})"


def spread(found: Mapping[str, Any]) -> str:
    """Returns a median ratio, and from where to where it goes."""
    return f"{found['median']:.3f} ({found['min']:.3f}..{found['max']:.3f})"


def show(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table."""
    lines = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def show_training(found: Mapping[str, Any]) -> None:
    """Prints the table of `benchmark train`."""
    rows = [
        [
            name,
            v["batch_size"],
            milliseconds(v["step"]),
            spread(v["speed_of_the_loop"]),
            *in_words(v),
        ]
        for name, v in found.items()
    ]
    show(["size", "batch", "step, ms", "loop, speed of its steps", *HEADS], rows)


def show_sampling(found: Mapping[str, Any]) -> None:
    """Prints the table of `benchmark sample`."""
    rows = [
        [
            name,
            v["batch_size"],
            v["steps"],
            milliseconds(v["sample"]),
            spread(v["ratio"]),
            *in_words(v),
        ]
        for name, v in found.items()
    ]
    show(["size", "batch", "steps", "sample, ms", "over network calls", *HEADS], rows)


def show_data(found: Mapping[str, Any]) -> None:
    """Prints the table of `benchmark data`."""
    rows = [
        [name, v["batch_size"]]
        + [f"{v['batch_size'] / v[s]['median']:,.4g}" for s in ("grain", "resident", "train")]
        + [spread(v[f"{side}_ratio"]) for side in ("grain", "resident")]
        for name, v in found.items()
    ]
    heads = [f"{side}, images/s" for side in ("grain", "resident", "train step")]
    show(["size", "batch", *heads, "grain / train", "resident / train"], rows)


def show_compilation(found: Mapping[str, Any]) -> None:
    """Prints the tables of `benchmark compile`."""
    rows = [
        [name, label]
        + [f"{seconds:.2f}" for seconds in (v["cold"]["median"], v["warm"]["median"], v["lower_s"])]
        + [v["lines"], estimate.in_bytes(v["memory"]["temporaries"])]
        for name, values in found.items()
        for label, v in values.get("programs", {}).items()
    ]
    heads = ["cold, s", "cached, s", "of it to lower, s", "lines", "temporaries"]
    show(["size", "program", *heads], rows)
    alone, both, more = (each["median"] for each in found["imports"].values())
    print(f"import jax: {alone:.3f} s; import jax, jaxdiff: {both:.3f} s, {more:.3f} s more")


def show_peers(found: Mapping[str, Any]) -> None:
    """Prints the table of `benchmark peers`, and what failed."""
    results = {
        (what, name): result
        for name, values in found.items()
        for what, result in values["programs"].items()
    }
    rows = [[*key, result["devices"], *peer_row(result)] for key, result in results.items()]
    sides = next(iter(results.values()))["sides"]
    show(["program", "size", "devices", *(f"{side}, ms" for side in sides), "best / jaxdiff"], rows)
    for (what, name), result in results.items():
        show_failures(f"{what} {name}", result["sides"])


def show_memory(found: Mapping[str, Any]) -> None:
    """Prints the table of `benchmark peers --memory`, and what failed."""
    results = {name: values["memory"] for name, values in found.items()}
    rows = [
        [
            name,
            *(estimate.in_bytes(v["bytes"]) if "bytes" in v else "failed" for v in told.values()),
        ]
        for name, told in results.items()
    ]
    print("\npeak memory of train steps, above that of a process that has done nothing")
    show(["size", *next(iter(results.values()))], rows)
    for name, told in results.items():
        show_failures(f"memory {name}", told)


def show_kernels(title: str, found: Mapping[str, Any]) -> None:
    """Prints the tables of kernels, if there are any."""
    rows = [
        [
            name,
            kind,
            sums["count"],
            f"{1e3 * sums['seconds']:.4g}",
            f"{sums['flops'] / sums['seconds'] / 1e9:.4g}",
            f"{100 * sums['share']:.1f} %",
        ]
        for name, values in found.items()
        for kind, sums in (values.get("kernels") or {}).items()
    ]
    if rows:
        print(f"\nkernels of {title}, each timed alone")
        show(["of", "kind", "number", "ms", "GFLOP/s", "of the whole"], rows)


def described(size: Size) -> dict[str, Any]:
    """Returns what a reader must know of the machine and of what ran."""
    about = runs.describe(size.config, programs.count_parameters(size), size.shape)
    return about | {
        "model": runs.as_json(size.config)["model"],
        "compiler_options": runtime.compiler_options(),
        "cpu_count": os.cpu_count(),
    }


def say(text: str) -> None:
    """Writes a line of progress, beside the table."""
    tqdm.tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[tqdm.tqdm]:
    """Shows how far the measurement is; where there is no terminal, that it has begun."""
    with tqdm.tqdm(total=total, desc=name, disable=None, leave=False) as bar:
        if bar.disable:
            say(f"{name} ...")
        yield bar
