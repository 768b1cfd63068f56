"""A run that is killed five times ends with the parameters of one that is not."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

spec = importlib.util.spec_from_file_location("chaos", Path(__file__).with_name("chaos.py"))
chaos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chaos)

SMALL = [
    "--config.model.channels=8", "--config.model.channel_multipliers=(1,)",
    "--config.train.batch_size=8", "--config.train.num_steps=3000",
    "--config.train.checkpoint_every=50", "--config.train.sample_every=500",
    "--config.train.log_every=50", "--config.sample.num=20",
]  # fmt: skip


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path):
    reference = chaos.finish(tmp_path / "reference", SMALL)
    assert chaos.finish(tmp_path / "again", SMALL) == reference
    assert chaos.disturbed(tmp_path / "killed", SMALL, 5, 15.0, seed=0) == reference
