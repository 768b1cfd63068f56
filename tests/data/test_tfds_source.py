import json
import os
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
from PIL import Image

from jaxdiff.data import _libraries, from_tfds, in_memory


def arrays(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def prepare_tiny(data_dir, features=("image", "label"), name="tiny_pictures"):
    """Prepares a TFDS data set of 6 + 3 images, as a stranger would; returns its directory."""
    tfds = _libraries.require("tensorflow_datasets")
    images = {"train": arrays(6, 5, 4, 3), "test": arrays(3, 5, 4, 3, seed=1)}
    kinds = {
        "image": tfds.features.Image(shape=(5, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
        "id": tfds.features.Text(),
    }

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        url_infos = None

        def _info(self):
            chosen = tfds.features.FeaturesDict({key: kinds[key] for key in features})
            return tfds.core.DatasetInfo(builder=self, features=chosen, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in images}

        def _generate_examples(self, split):
            for i, pixels in enumerate(images[split]):
                example = {"image": Image.fromarray(pixels), "label": i % 3, "id": str(i)}
                yield i, {key: example[key] for key in features}

    Tiny.name = name
    with _libraries.quiet():
        builder = Tiny(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(
            download_dir=data_dir / "downloads",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return pathlib.Path(builder.data_dir), images


@pytest.mark.parametrize("split", ["train", "test"])
def test_tfds_reads_a_data_set_of_others(tmp_path, split):
    _, images = prepare_tiny(tmp_path, ("id", "image", "label"))
    source = from_tfds("tiny_pictures", split, data_dir=tmp_path)
    assert len(source) == len(images[split])
    for i, expected in enumerate(images[split]):
        example = source[i]
        assert sorted(example) == ["image", "label"]
        np.testing.assert_array_equal(example["image"], expected)
        assert example["label"] == i % 3
    batch = source.gather([2, 0, 2])
    np.testing.assert_array_equal(batch["image"], images[split][[2, 0, 2]])
    np.testing.assert_array_equal(batch["label"], [2, 0, 2])
    assert "tensorflow" not in sys.modules


def test_tfds_reads_parts_of_splits_and_data_without_labels(tmp_path):
    _, images = prepare_tiny(tmp_path, ("image",))
    source = from_tfds("tiny_pictures", "train[2:5]", data_dir=tmp_path)
    assert list(source[0]) == ["image"]
    read = in_memory(source)
    assert read.labels is None
    np.testing.assert_array_equal(read.images, images["train"][2:5])


def test_tfds_says_how_to_prepare_what_is_not(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"TensorFlow.*file_format='array_record'"
    ) as caught:
        from_tfds("cifar10", data_dir=tmp_path)
    assert f"tfds.builder('cifar10', data_dir='{tmp_path}')" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifarr10", "no data set 'cifarr10': did you mean 'cifar10'"),
        ("digit", "did you mean 'digits'"),
        ("mnist:1.2.3", "cannot be loaded at version 1.2.3, only: 3.0.1"),
        ("lsun/bedrooom", "bedrooom.*bedroom"),
    ],
)
def test_tfds_names_the_nearest_data_set(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        from_tfds(name, data_dir=tmp_path)


def test_tfds_names_the_nearest_split(tmp_path):
    prepare_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'trian': did you mean 'train'?"):
        from_tfds("tiny_pictures", "trian", data_dir=tmp_path)


def test_tfds_needs_images(tmp_path):
    prepare_tiny(tmp_path, ("id", "label"))
    with pytest.raises(ValueError, match=r"no feature \"image\", only \['id', 'label'\]"):
        from_tfds("tiny_pictures", data_dir=tmp_path)


def test_tfds_needs_a_format_with_random_access(tmp_path):
    path, _ = prepare_tiny(tmp_path)
    info = json.loads((path / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (path / "dataset_info.json").write_text(json.dumps(info))
    for file in path.glob("*array_record*"):
        file.rename(str(file).replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"format tfrecord.*file_format='array_record'"):
        from_tfds("tiny_pictures", data_dir=tmp_path)


@pytest.mark.skipif("JAXDIFF_TEST_TFDS" not in os.environ, reason="JAXDIFF_TEST_TFDS is not set")
def test_tfds_reads_cifar10():
    source = from_tfds("cifar10", data_dir=os.environ["JAXDIFF_TEST_TFDS"])
    assert len(source) == 50_000
    assert source[0]["image"].shape == (32, 32, 3)
