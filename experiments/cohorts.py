"""Tables of visits in experiments: from a table to what a model is trained on, and back.

A run on a table leaves in its directory, beside what every run leaves (`runs`):

schema.json      what the columns hold; edited, it may be given to another run as data.schema
cohort.json      the fitted codec, what each column says of itself, and how many visits each patient
                 trained on has
synthetic.csv    the patients drawn

How many visits a synthetic patient has (and what the network is told of him, if static columns are
conditions) is that of a random patient trained on, unless it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from ml_collections import ConfigDict

from experiments import build, drawing, runs
from jaxdiff import columns, data, denoisers, editing, rng, sampling
from jaxdiff.base import Array, Node, PyTree
from jaxdiff.data import tables
from jaxdiff.training import sharding

if TYPE_CHECKING:
    from pandas import DataFrame


class Cohort(NamedTuple):
    """Patients to train on, and patients to compare with.

    Attributes:
      table: those trained on.
      held_out: the others; None if all are trained on.
      codec: fitted to those trained on.
      sequences: those trained on, encoded.
      own: what each of their columns says of itself.
    """

    table: DataFrame
    held_out: DataFrame | None
    codec: tables.Codec
    sequences: tables.Sequences
    own: columns.Columns


class Templates(NamedTuple):
    """What a model of a table needs to draw patients, beside its parameters.

    Attributes:
      codec: what decodes them.
      own: what each column says of itself.
      lengths: `(N,)`, how many visits the patients trained on have.
      vectors: `(N, D)`, what the network is told of them, or None.
    """

    codec: tables.Codec
    own: columns.Columns
    lengths: np.ndarray
    vectors: np.ndarray | None


def read(config: ConfigDict) -> tuple[DataFrame, tables.Schema]:
    """Returns the whole table that `config.data` names, checked, and its schema.

    Raises:
      ValueError: there is no path, or the schema is not one.
      TableError: the table cannot be used; says where.
    """
    options = config.data
    if options.name == "pbc":
        table, schema = tables.pbc()
    elif options.path:
        table = tables.read_table(options.path)
        schema = None
    else:
        raise ValueError('data.name="table" needs data.path, a CSV or Parquet file')
    if options.schema:
        schema = read_schema(Path(options.schema))
    elif schema is None:
        schema = tables.infer_schema(table, patient=options.patient, time=options.time)
    return tables.check_table(table, schema), schema


def read_schema(path: Path) -> tables.Schema:
    """Returns the schema in a JSON file.

    Raises:
      ValueError: the file holds none.
    """
    try:
        return tables.Schema.from_json(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no schema of a table: {error}") from error


def load(config: ConfigDict) -> Cohort:
    """Reads the table and divides the patients, by the run's seed.

    Raises:
      ValueError, TableError: see `read`; or a part has no patients.
    """
    table, schema = read(config)
    share = config.data.held_out
    if not 0 <= share < 1:
        raise ValueError(f"data.held_out must lie in [0, 1), got {share}")
    held_out = None
    if share:
        table, held_out = tables.split_patients(table, schema, share, config.seed)
    options = config.data
    codec = tables.fit_codec(
        table,
        schema,
        transform=options.transform,
        categories=options.categories,
        static=options.static,
        fill=options.fill,
    )
    levels = len(config.model.channel_multipliers)
    length = codec.padded_length(2 ** (levels - 1))
    sequences = codec.encode(table, length=length)
    static = np.array([channel.static for channel in codec.channels], bool)
    own = columns.fit(sequences.x0, sequences.observed, codec.signs, static)
    return Cohort(table, held_out, codec, sequences, own)


def resolve(config: ConfigDict, cohort: Cohort) -> None:
    """Writes into the configuration what the table decides."""
    if cohort.sequences.static.shape[1]:
        config.model.vector_dim = cohort.sequences.static.shape[1] + 1


def told(static: np.ndarray) -> np.ndarray | None:
    """Returns the vectors that a network is told of static columns `(N, S)`, or None if S is 0.

    The last entry says that they are told: zeros are no condition.
    """
    if not static.shape[1]:
        return None
    return np.concatenate([static, np.ones_like(static[:, :1])], axis=1)


def make_source(cohort: Cohort) -> data.sources.SequenceSource:
    """Returns the patients trained on."""
    sequences = cohort.sequences
    return data.from_sequences(sequences.x0, sequences.mask, told(sequences.static))


def save(workdir: Path, cohort: Cohort) -> None:
    """Writes what drawing needs."""
    runs.write_json(workdir / "schema.json", cohort.codec.schema.to_json())
    vectors = told(cohort.sequences.static)
    runs.write_json(
        workdir / "cohort.json",
        {
            "codec": cohort.codec.to_json(),
            "columns": {name: a.tolist() for name, a in cohort.own._asdict().items()},
            "lengths": cohort.sequences.lengths.tolist(),
            "vectors": None if vectors is None else vectors.tolist(),
        },
    )


def load_templates(workdir: Path) -> Templates:
    """Reads what `save` wrote.

    Raises:
      RunError: it is not there, or damaged.
    """
    path = workdir / "cohort.json"
    try:
        saved = json.loads(path.read_text())
        vectors = saved["vectors"]
        return Templates(
            tables.Codec.from_json(saved["codec"]),
            columns.Columns(**{name: np.array(a) for name, a in saved["columns"].items()}),
            np.array(saved["lengths"], np.int32),
            None if vectors is None else np.array(vectors, np.float32),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise runs.RunError(f"{path} is missing or damaged: train the run again") from error


def make_draw(
    config: ConfigDict,
    shape: tuple[int, ...],
    own: columns.Columns,
    *,
    edits: bool = False,
    grid: Node | None = None,
) -> Any:
    """Returns `draw(key, params, first_index, cond, known, known_mask) -> x0`, compiled.

    Args:
      config: the configuration.
      shape: of one example, `(L, C)`.
      own: what each column says of itself.
      edits: whether `known` `(B, L, C)`, where `known_mask` is set, is kept to.
      grid: the nodes to visit; those of `config.sample` if not given.
    """
    grid = drawing.make_grid(config) if grid is None else grid
    solver = drawing.make_solver(config)
    make = drawing.make_denoiser(config, shape, own)

    def draw(
        key: Array,
        params: PyTree,
        first_index: Array,
        cond: Mapping[str, Array],
        known: Array | None = None,
        known_mask: Array | None = None,
    ) -> Array:
        real = cond["mask"][..., None]
        denoiser = denoisers.masked(make(params, cond), real)
        way = editing.inpaint(solver, known, known_mask) if edits else solver
        x0 = sampling.sample(
            key, denoiser, way, grid, (real.shape[0], *shape), first_index=first_index
        )
        return jnp.where(real, x0, 0)

    return jax.jit(draw)


class Plan(NamedTuple):
    """What is decided of patients before they are drawn.

    Attributes:
      lengths: `(N,)`, how many visits each has.
      vectors: `(N, D)`, what the network is told of each, or None.
      known: `(N, L, C)` or `(1, L, C)`, what is given of them, where `known_mask` is set; or None.
      known_mask: bool, shape of `known`.
    """

    lengths: np.ndarray
    vectors: np.ndarray | None
    known: np.ndarray | None = None
    known_mask: np.ndarray | None = None


def plan(
    templates: Templates,
    shape: tuple[int, ...],
    *,
    num: int,
    seed: int,
    first_index: int = 0,
    visits: int | None = None,
    where: Mapping[str, Any] | None = None,
) -> Plan:
    """Decides how many visits patients have, and what of their static columns is given.

    Patient i of a seed takes the number of visits of the same patient of the templates, whatever
    the number of patients.

    Args:
      templates: the patients trained on.
      shape: of one example, `(L, C)`.
      num: how many patients.
      seed: the seed.
      first_index: the number of the first.
      visits: how many visits all have; None for as many as a random template.
      where: values of static columns that all have.

    Raises:
      ValueError: `visits` is out of range, or a column is not static.
      TableError: a value is none that its column holds.
    """
    codec, length = templates.codec, shape[0]
    if visits is not None and not 1 <= visits <= length:
        raise ValueError(f"visits must lie in 1 .. {length}, as the run was trained, got {visits}")
    index = first_index + jnp.arange(num)
    keys = rng.stream(rng.per_example(jax.random.key(seed), index), rng.Stream.LENGTH)
    count = len(templates.lengths)
    whose = np.minimum((np.asarray(rng.uniform(keys)) * count).astype(int), count - 1)
    lengths = templates.lengths[whose] if visits is None else np.full(num, visits, np.int32)
    vectors = None if templates.vectors is None else templates.vectors[whose]
    if not where:
        return Plan(lengths, vectors)
    known, known_mask = codec.known_static(where, 1, length)
    if vectors is None:
        return Plan(lengths, None, known, known_mask)
    vectors = np.concatenate([np.where(known_mask, known, vectors[:, :-1]), vectors[:, -1:]], 1)
    return Plan(lengths, vectors.astype(np.float32))


def draw(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    patients: Plan,
    compiled: Any,
    *,
    first_index: int = 0,
    key: Array | None = None,
) -> np.ndarray:
    """Draws patients in batches of `config.sample.batch_size`.

    Args:
      config: the configuration.
      params: the network's parameters.
      shape: of one example, `(L, C)`.
      patients: what is decided of them.
      compiled: `make_draw(config, shape, own, edits=patients.known is not None)`.
      first_index: the number of the first.
      key: what they are drawn from; that of `config.sample.seed` if not given.

    Returns:
      `(N, L, C)` float32, 0 behind a patient's last visit.
    """
    size, num = config.sample.batch_size, len(patients.lengths)
    if size < 1:
        raise ValueError(f"sample.batch_size must be at least 1, got {size}")
    edits = patients.known is not None
    key = jax.random.key(config.sample.seed) if key is None else key
    mesh = build.make_mesh(config)
    divided = size % mesh.size == 0
    drawn = []
    with tqdm.tqdm(total=num, unit="patient", desc="patients", disable=None) as bar:
        for start in range(0, num, size):
            # The last batch is filled up with its last patient.
            which = np.minimum(start + np.arange(size), num - 1)
            cond = {"mask": np.arange(shape[0])[None] < patients.lengths[which, None]}
            if patients.vectors is not None:
                cond["vector"] = patients.vectors[which]
            given = ()
            if edits:
                given = tuple(
                    np.broadcast_to(a, (num, *shape))[which]
                    for a in (patients.known, patients.known_mask)
                )
            if divided:
                cond, given = jax.device_put((cond, given), sharding.rows(mesh))
            x0 = compiled(key, params, first_index + start, cond, *given)
            drawn.append(sharding.to_host(x0)[: num - start])
            bar.update(len(drawn[-1]))
    return np.concatenate(drawn)


def decode(templates: Templates, patients: Plan, x0: np.ndarray, first_index: int = 0) -> DataFrame:
    """Returns the table of drawn patients, named from `first_index` + 1 on."""
    static = None if patients.vectors is None else patients.vectors[:, :-1]
    return templates.codec.decode(x0, patients.lengths, static, first_id=first_index + 1)


def draw_table(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    templates: Templates,
    *,
    first_index: int = 0,
    visits: int | None = None,
    where: Mapping[str, Any] | None = None,
    compiled: Any = None,
) -> DataFrame:
    """Returns `config.sample.num` patients, as a table.

    Args:
      config: the configuration.
      params: the network's parameters.
      shape: of one example, `(L, C)`.
      templates: the patients trained on.
      first_index: the number of the first patient.
      visits: see `plan`.
      where: see `plan`.
      compiled: `make_draw(config, shape, templates.own, edits=where)`, if it is there.
    """
    options = config.sample
    patients = plan(
        templates, shape, num=options.num, seed=options.seed, first_index=first_index,
        visits=visits, where=where,
    )  # fmt: skip
    edits = patients.known is not None
    compiled = compiled or make_draw(config, shape, templates.own, edits=edits)
    x0 = draw(config, params, shape, patients, compiled, first_index=first_index)
    return decode(templates, patients, x0, first_index)


def parse_where(texts: list[str], schema: tables.Schema) -> dict[str, Any]:
    """Reads `["sex=f", "trt=1"]` by what the columns hold.

    Raises:
      ValueError: it cannot be read so, or a column is not static; the message names it.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in schema.statics:
            raise ValueError(
                f"--where wants COLUMN=VALUE of static columns, {', '.join(schema.statics)}, got "
                f"{text!r}"
            )
        column = schema[name]
        known = {str(category): category for category in column.categories}
        try:
            values[name] = float(value) if column.is_real else known[value]
        except (KeyError, ValueError) as error:
            wanted = "a number" if column.is_real else f"one of {', '.join(known)}"
            raise ValueError(f"--where: {name} must be {wanted}, got {value!r}") from error
    return values
