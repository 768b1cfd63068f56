"""A run that is killed five times, and whose checkpoints are damaged, ends as one that is not."""

import collections
import importlib.util
import random
from pathlib import Path

import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from tests import quick_to_compile

spec = importlib.util.spec_from_file_location("chaos", Path(__file__).with_name("chaos.py"))
chaos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chaos)

SHORT = [
    *chaos.SMALL, "--config.train.num_steps=1000", "--config.train.checkpoint_every=50",
    "--config.train.sample_every=0",
]  # fmt: skip


@pytest.mark.slow
def test_five_kills_and_damage_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " ".join(quick_to_compile.FLAGS))
    reference = chaos.finish(tmp_path / "reference", SHORT)
    tally, rng = collections.Counter(), random.Random(0)
    killed = tmp_path / "killed"
    assert chaos.disturbed(killed, SHORT, 5, 12.0, rng, tally) == reference
    # And once more, where it is known what is damaged and that it matters.
    last, older = chaos.steps(killed)[-1], chaos.steps(killed)[-2]
    for path in (killed / "checkpoints" / str(last)).glob("state/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert chaos.finish(killed, SHORT, tally) == reference
    assert f"resumed from the checkpoint of step {older}" in Path(f"{killed}.log").read_text()
    assert (killed / "checkpoints" / f"{last}.damaged").is_dir()
    assert chaos.steps(killed)[-1] == last
