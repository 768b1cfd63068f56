import numpy as np
import pytest

from jaxdiff.data import from_folder, in_memory

Image = pytest.importorskip("PIL.Image")


def arrays(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path, **options)


def test_folder_gives_its_images_in_the_order_of_names(tmp_path):
    images = arrays(3, 6, 5, 3)
    for name, pixels in zip(["c.PNG", "a.png", "b.webp"], images, strict=True):
        save(tmp_path / name, pixels, **({"lossless": True} if "webp" in name else {}))
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._a.png").touch()  # as macOS leaves them
    source = from_folder(tmp_path)
    assert [file.name for file in source.files] == ["a.png", "b.webp", "c.PNG"]
    np.testing.assert_array_equal(in_memory(source).images, images[[1, 2, 0]])
    assert "label" not in source[0]


def test_folder_takes_subfolders_for_classes(tmp_path):
    images = arrays(3, 4, 4, 1)
    for name, pixels in zip(["dog/x.png", "cat/deep/z.png", "cat/a.png"], images, strict=True):
        save(tmp_path / name, pixels)
    (tmp_path / "empty").mkdir()
    source = from_folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    read = in_memory(source)
    np.testing.assert_array_equal(read.labels, [0, 0, 1])
    np.testing.assert_array_equal(read.images, images[[2, 1, 0]])


def test_folder_is_grey_only_if_all_images_are(tmp_path):
    grey, colour = arrays(1, 4, 4, 1)[0], arrays(1, 4, 4, 3)[0]
    save(tmp_path / "a.png", grey)
    assert from_folder(tmp_path)[0]["image"].shape == (4, 4, 1)
    save(tmp_path / "b.png", colour)
    source = from_folder(tmp_path)
    np.testing.assert_array_equal(source[0]["image"], np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(source[1]["image"], colour)


def test_folder_crops_the_centre_and_resizes(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = (10, 200, 30)  # the centred square
    save(tmp_path / "wide.png", pixels)
    save(tmp_path / "tall.png", pixels.swapaxes(0, 1))
    images = in_memory(from_folder(tmp_path, size=4)).images
    np.testing.assert_array_equal(images, np.broadcast_to((10, 200, 30), (2, 4, 4, 3)))


def test_folder_turns_images_as_their_exif_says(tmp_path):
    pixels = arrays(1, 4, 6, 3)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    save(tmp_path / "a.png", pixels, exif=exif)
    save(tmp_path / "b.png", arrays(1, 6, 4, 3)[0])
    source = from_folder(tmp_path)  # both are 6 high and 4 wide
    np.testing.assert_array_equal(source[0]["image"], np.rot90(pixels, -1))


def test_folder_names_the_file_at_fault(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no images in .*\.png"):
        from_folder(tmp_path)
    save(tmp_path / "good.png", arrays(1, 40, 40, 3)[0])
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        from_folder(tmp_path, size=0)
    save(tmp_path / "small.png", arrays(1, 4, 4, 3)[0])
    with pytest.raises(ValueError, match=r"good.png is 40x40 and .*small.png is 4x4: give size="):
        from_folder(tmp_path)
    (tmp_path / "small.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*small.png"):
        from_folder(tmp_path)
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "small.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*small.png"):
        in_memory(from_folder(tmp_path))
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png has pixels of mode 'I;16'.*8 bits"):
        from_folder(tmp_path)
    save(tmp_path / "class" / "small.png", arrays(1, 40, 40, 3)[0])
    with pytest.raises(ValueError, match=r"both in itself .* and in subfolders"):
        from_folder(tmp_path)
