"""Three kinds of tests: against an oracle, of a property, and the real command line run tiny."""
import ast
import copy
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets.folder import default_loader
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image

import stae

HERE = Path(__file__).parent
SOURCE = (HERE / "stae.py").read_text()
torch.set_num_threads(min(2, torch.get_num_threads()))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(seed=0, channels=3):
    torch.manual_seed(seed)
    return stae.Autoencoder(channels, width=4, latent_channels=4)


def tiny_step(transform="crop", views=1, seed=0, batch=6, side=16):
    """A batch and the draws of a step."""
    x = torch.rand(batch, 3, side, side, generator=generator(seed))
    return x, stae.draw_views(transform, x.shape, generator(seed), views, (0.25, 1.0)), stae.draw_slices(4, 8, generator(seed))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ 1. data


def test_shapes_are_always_the_same_bytes():
    images, labels, tests = stae.make_shapes()
    assert images.shape == (12_000, 1, 32, 32) and images.dtype == torch.uint8 and tests == 2_000
    assert labels.bincount().min() > 3_800
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == SHAPES_HASH
    assert hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16] == LABELS_HASH


SHAPES_HASH, LABELS_HASH = "3a6dbf5ae9b76fe8", "8eb66d683e88d398"


def test_shapes_are_shapes():
    """Black around, a third of each kind in front, and the middle of an image with rings alone is darker than with discs."""
    images, labels, tests = stae.make_shapes(600)
    assert 0.6 < (images == 0).float().mean() < 0.95 and tests == 100 and labels.bincount().min() > 150
    assert images.flatten(1).amax(dim=1).min() >= 80
    brightness = [images[labels == kind].float().mean() for kind in range(3)]
    assert brightness[1] < brightness[0] and brightness[1] < brightness[2]
    assert stae.make_shapes(600, seed=1)[0].ne(images).any()


def test_batches_cover_an_epoch_and_depend_on_seed_and_step_alone():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    run = {step: (x * 255).flatten().round().int().tolist() for step, x in stae.batches(images, 3, 0, 0, 6)}
    assert list(run) == list(range(6))
    assert len({i for step in (0, 1, 2) for i in run[step]}) == 9  # no image twice within an epoch
    assert [run[step] for step in (0, 1, 2)] != [run[step] for step in (3, 4, 5)]
    again = {step: (x * 255).flatten().round().int().tolist() for step, x in stae.batches(images, 3, 0, 4, 6)}
    assert again == {step: run[step] for step in (4, 5)}  # started in the middle of an epoch
    other = [(x * 255).flatten().round().int().tolist() for _, x in stae.batches(images, 3, 1, 0, 3)]
    assert other != [run[step] for step in (0, 1, 2)]


def write_npz(path, size=16, channels=3, train=24, test=10, **extra):
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (train + test, size // 8, size // 8, channels))
    x = coarse.repeat(8, 1).repeat(8, 2).astype(np.uint8)
    y = np.arange(train + test) % 3
    arrays = dict(x_train=x[:train], y_train=y[:train], x_test=x[train:], y_test=y[train:]) | extra
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return x, y


def test_npz_with_and_without_a_test_split(tmp_path):
    x, y = write_npz(tmp_path / "a.npz")
    (train, _), (_, labels) = stae.load_data(str(tmp_path / "a.npz"))
    assert torch.equal(train, torch.from_numpy(x[:24]).permute(0, 3, 1, 2)) and labels.tolist() == y[24:].tolist()
    np.savez(tmp_path / "b.npz", x=x)
    (train, labels), (test, _) = stae.load_data(str(tmp_path / "b.npz"))
    assert len(train) == 31 and len(test) == 3 and labels is None
    both = sorted(image.numpy().tobytes() for image in torch.cat((train, test)).contiguous())
    assert both == sorted(image.numpy().tobytes() for image in torch.from_numpy(x).permute(0, 3, 1, 2).contiguous())
    assert torch.equal(test, stae.load_data(str(tmp_path / "b.npz"))[1][0])  # always the same tenth
    (train, _), (test, labels) = stae.load_data(str(tmp_path / "a.npz"), validation=5)
    assert torch.equal(test, torch.from_numpy(x[19:24]).permute(0, 3, 1, 2)) and len(train) == 19 == 24 - len(labels)


def test_size_crops_to_a_square_and_resizes(tmp_path):
    x = np.zeros((4, 40, 64, 1), np.uint8)
    x[:, :, 12:52] = 200  # exactly the centre square
    np.savez(tmp_path / "wide.npz", x=x)
    train = stae.load_data(str(tmp_path / "wide.npz"), size=16)[0][0]
    assert train.shape == (3, 1, 16, 16) and train.unique().tolist() == [200]
    assert stae.load_data(str(tmp_path / "wide.npz"))[0][0].shape == (3, 1, 40, 40)


def write_folder(root):
    """Two classes of 16x16 images in every format and mode people have; three files that cannot be read."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colour = to_pil_image(pixels)
    (root / "cats" / "deep").mkdir(parents=True), (root / "dogs").mkdir()
    for name, image in {
        "cats/a.png": colour, "cats/b.jpg": colour, "cats/deep/grey.png": colour.convert("L"), "dogs/c.JPEG": colour,
        "dogs/alpha.png": colour.convert("RGBA"), "dogs/palette.png": colour.convert("P"), "dogs/d.webp": colour,
        "dogs/cmyk.jpg": colour.convert("CMYK"), "dogs/bits.png": colour.convert("1"),
    }.items():
        image.save(root / name)
    (root / "cats" / "zero.png").write_bytes(b"")
    (root / "dogs" / "text.jpg").write_text("hello")
    (root / "dogs" / "truncated.png").write_bytes((root / "cats/a.png").read_bytes()[:300])
    (root / "notes.txt").write_text("not an image")
    return pixels


def test_folder_of_many_formats(tmp_path, capsys):
    pixels = write_folder(tmp_path)
    images, labels, tests = stae.read_folder(tmp_path)
    assert images.shape == (9, 3, 16, 16) and tests == 0
    broken = {"cats/zero.png", "dogs/text.jpg", "dogs/truncated.png"}
    names = [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*.*")) if file.suffix != ".txt"]
    names = [name for name in stae.shuffled(names) if name not in broken]
    assert labels.tolist() == [int(name.startswith("dogs")) for name in names]  # a subfolder of a class belongs to it
    assert torch.equal(images[names.index("cats/a.png")], torch.from_numpy(pixels).permute(2, 0, 1))
    said = capsys.readouterr().err
    assert "skipped 3 of 12" in said and str(tmp_path / "cats" / "zero.png") in said
    (tmp_path / "loose.png").write_bytes((tmp_path / "cats/a.png").read_bytes())
    assert stae.read_folder(tmp_path)[1] is None  # an image outside of every class


def test_a_new_file_moves_no_other_between_train_and_test(tmp_path):
    def test_split():
        test = stae.load_data(str(tmp_path))[1][0][:, 0, 0, 0].tolist()
        return set(test)

    for i in range(60):
        save_image(torch.full((3, 16, 16), i / 255), tmp_path / f"{i}.png")
    before = test_split()
    save_image(torch.full((3, 16, 16), 1.0), tmp_path / "new.png")
    assert len(before) == 6 and len(before - test_split()) <= 1 and len(test_split() - before) <= 1


def test_links_are_followed_and_a_test_split_must_be_readable(tmp_path):
    for folder in ("train", "test", "elsewhere"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            save_image(torch.full((3, 16, 16), i / 255), tmp_path / folder / f"{i}.png")
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "classes" / "dangling.png").symlink_to(tmp_path / "nowhere")
    images, labels, _ = stae.read_folder(tmp_path / "classes")
    assert len(images) == 4 and labels.tolist() == [0, 0, 0, 0]
    for file in (tmp_path / "test").iterdir():
        file.write_bytes(b"")
    with pytest.raises(stae.BadInput, match="none of its 4 test images"):
        stae.read_folder(tmp_path)


def test_links_in_a_circle_show_each_image_once(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(5):
        save_image(torch.full((3, 16, 16), i / 255), tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    images, labels, _ = stae.read_folder(tmp_path)
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4] and labels.tolist() == [0] * 5


@pytest.mark.parametrize("first, second", [("train", "test"), ("train", "val"), ("Train", "Test")])
def test_folder_with_train_and_test(tmp_path, first, second):
    for split, label, grey in [(first, "a", 10), (first, "b", 20), (second, "b", 30)]:
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(3):
            save_image(torch.full((3, 16, 16), (grey + i) / 255), tmp_path / split / label / f"{i}.png")
    (train, labels), (test, test_labels) = stae.load_data(str(tmp_path))
    assert train[:, 0, 0, 0].tolist() == [10, 11, 12, 20, 21, 22] and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test[:, 0, 0, 0].tolist() == [30, 31, 32] and test_labels.tolist() == [1, 1, 1]


def write_faces(root, numbers=(1, 2, 162_770, 162_771, 182_637, 182_638, 202_599), height=218, width=178):
    """CelebA's layout and file names; the grey of a face is its place in `numbers`."""
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i, number in enumerate(numbers):
        picture = np.full((height, width, 3), 255, np.uint8)
        top, left = (height - 128) // 2, (width - 128) // 2
        picture[top : top + 128, left : left + 128] = 10 * i  # white outside of the centre square
        to_pil_image(picture).save(folder / f"{number:06}.png")
        (folder / f"{number:06}.png").rename(folder / f"{number:06}.jpg")  # a PNG by content: exact pixels
    return folder


def test_celeba_is_cropped_and_split_by_number(tmp_path):
    folder = write_faces(tmp_path)
    (folder / "notes.jpg").write_text("not a number")
    (train, labels), (test, _) = stae.load_data("celeba", tmp_path)
    assert train.shape == (3, 3, 128, 128) and test.shape == (2, 3, 128, 128) and labels is None
    assert [sorted(image.unique().tolist()) for image in train] == [[0], [10], [20]]  # 162,770 is the last to train
    assert [sorted(image.unique().tolist()) for image in test] == [[50], [60]]  # 182,638 is the first to test
    (train, _), (test, _) = stae.load_data("celeba", tmp_path, size=64, validation=1)
    assert train.shape == (2, 3, 64, 64) and test.unique().tolist() == [20]


def test_celeba_is_downloaded_when_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(stae, "CelebA", lambda root, download: write_faces(Path(root)) if download else None)
    assert len(stae.load_data("celeba", tmp_path, size=16)[0][0]) == 3
    monkeypatch.setattr(stae, "CelebA", None)  # not asked again
    assert len(stae.load_data("celeba", tmp_path, size=16)[0][0]) == 3


def test_celeba_without_test_faces_holds_out_a_tenth(tmp_path):
    write_faces(tmp_path, numbers=range(1, 21))
    (train, _), (test, _) = stae.load_data("celeba", tmp_path, size=16)
    greys = train[:, 0, 0, 0].tolist() + test[:, 0, 0, 0].tolist()
    assert len(test) == 2 and sorted(greys) == [10 * i for i in range(20)] and greys != sorted(greys)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder of 12 images, of which two cannot be read, that counts as large; and a list of the files decoded."""
    folder, decoded, loader = tmp_path / "photos", [], stae.default_loader
    folder.mkdir()
    for i in range(12):
        save_image(torch.full((3, 24, 24), i / 255), folder / f"{i:02}.png")
    (folder / "03.png").write_bytes(b""), (folder / "07.png").write_text("text")

    def counting(path):
        decoded.append(path.name)
        return loader(path)

    monkeypatch.setattr(stae, "default_loader", counting)
    monkeypatch.setattr(stae, "CACHE_ABOVE", 5)
    return folder, decoded


def greys(folder, size=16):
    return [images[:, 0, 0, 0].tolist() for images, _ in stae.load_data(str(folder), size=size)]


def test_many_images_are_decoded_once(cached, capsys, monkeypatch):
    folder, decoded = cached
    first = greys(folder)
    assert sorted(first[0] + first[1]) == [i for i in range(12) if i not in (3, 7)] and len(decoded) == 12
    assert f"skipped 2 of 12 images, unreadable: first {folder / '03.png'}" in capsys.readouterr().err
    assert {p.name for p in folder.parent.iterdir()} == {"photos", "photos.stae-16.npy"}
    assert np.load(folder.parent / "photos.stae-16.npy").shape == (10, 3, 16, 16)
    assert greys(folder) == first and len(decoded) == 12
    assert "photos.stae-16.npy lacks 2 images" in capsys.readouterr().err
    monkeypatch.chdir(folder.parent)
    assert greys("photos") == first and len(decoded) == 12  # by another path
    monkeypatch.setattr(stae, "CACHE_ABOVE", 100)
    assert greys(folder) == first and len(decoded) == 24  # the same split and order without the cache


@pytest.mark.parametrize("change", ["added", "changed", "gone", "size", "end", "half", "empty"])
def test_a_stale_or_damaged_cache_is_made_anew(cached, change):
    folder, decoded = cached
    cache = folder.parent / "photos.stae-16.npy"
    before, size = sum(greys(folder), []), 16
    if change == "added":
        save_image(torch.full((3, 24, 24), 200 / 255), folder / "new.png")
    elif change == "changed":
        save_image(torch.full((3, 24, 24), 200 / 255), folder / "00.png")
    elif change == "gone":
        (folder / "00.png").unlink()
    elif change == "size":
        size = 24
    else:
        cache.write_bytes(cache.read_bytes()[: {"end": -100, "half": -3000, "empty": 0}[change]])
    after = sum(greys(folder, size), [])
    expected = set(before) | ({200} if change in ("added", "changed") else set())
    assert set(after) == expected - ({0} if change in ("changed", "gone") else set())
    assert len(decoded) == 24 + (change == "added") - (change == "gone")
    assert sum(greys(folder, size), []) == after and len(decoded) < 26
    assert len(np.load(folder.parent / f"photos.stae-{size}.npy")) == 10 + (change == "added") - (change == "gone")


def test_a_cache_made_without_a_size_serves_that_size(cached):
    folder, decoded = cached
    first, _, _ = stae.read_folder(folder)
    count = len(decoded)
    again, _, _ = stae.read_folder(folder, size=24)  # as --eval asks, which knows the size by now
    assert torch.equal(first, again) and len(decoded) == count
    assert stae.read_folder(folder, size=16)[0].shape[2] == 16 and len(decoded) == 2 * count


def test_an_interrupted_cache_is_made_anew(cached, monkeypatch):
    folder, decoded = cached
    counting = stae.default_loader

    def interrupted(path):
        if len(decoded) == 8:
            raise KeyboardInterrupt
        return counting(path)

    monkeypatch.setattr(stae, "default_loader", interrupted)
    with pytest.raises(KeyboardInterrupt):
        greys(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["photos"]
    monkeypatch.setattr(stae, "default_loader", counting)
    first = greys(folder)
    assert len(first[0] + first[1]) == 10


def test_a_cache_that_cannot_be_written(cached, monkeypatch):
    folder, _ = cached
    monkeypatch.setattr(stae.os, "access", lambda *args: False)
    with pytest.raises(stae.BadInput, match="photos.stae-16.npy"):
        greys(folder)


def test_a_wrong_side_is_told_before_all_is_decoded(cached):
    with pytest.raises(stae.BadInput, match="pass --size 16"):
        stae.read_folder(cached[0], size=20)
    assert [p.name for p in cached[0].parent.iterdir()] == ["photos"]


def test_decoding_shows_its_progress(cached, capsys):
    greys(cached[0])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "decoded 12 of 12 images" and "photos.stae-16.npy, 0.00 GB" in said[1] and len(said) == 2


def test_mapped_and_resident_images_give_the_same_batches(cached):
    images = stae.load_data(str(cached[0]), size=16)[0][0]
    pairs = zip(stae.batches(images, 4, 0, 0, 5), stae.batches(images.clone(), 4, 0, 0, 5, torch.device("cpu")))
    assert all(step == other_step and torch.equal(x, y) for (step, x), (other_step, y) in pairs)
    model, test = tiny_model(), torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=generator())
    one, other = (stae.evaluate(model, (train, None), (test, None), hole=0.3) for train in (images, images.clone()))
    assert one == other


def write_cifar10(root, per_file=4):
    """The official layout: five pickled training files and one test file of flat channel-first rows."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random, rows = np.random.default_rng(0), {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows[name] = random.integers(0, 256, (per_file, 3072), dtype=np.uint8), random.integers(0, 10, per_file).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": rows[name][0], "labels": rows[name][1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return rows


def test_cifar10_in_the_official_layout(tmp_path, monkeypatch):
    rows = write_cifar10(tmp_path)
    monkeypatch.setattr(stae.CIFAR10, "_check_integrity", lambda self: True)
    digest = hashlib.md5((tmp_path / "cifar-10-batches-py/batches.meta").read_bytes()).hexdigest()
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digest}
    monkeypatch.setattr(stae.CIFAR10, "meta", meta)
    (train, labels), (test, _) = stae.load_data("cifar10", str(tmp_path))
    assert train.shape == (20, 3, 32, 32) and test.shape == (4, 3, 32, 32)
    assert torch.equal(test, torch.from_numpy(rows["test_batch"][0]).view(4, 3, 32, 32))
    kinds = sorted({kind for _, labels in rows.values() for kind in labels})
    assert labels[:4].tolist() == [kinds.index(kind) for kind in rows["data_batch_1"][1]]


# ------------------------------------------------------------------------------------------------ 2. transforms


def test_crop_equals_slicing_and_interpolate():
    images = torch.rand(40, 3, 24, 32, generator=generator())
    boxes = stae.draw_boxes(images.shape, generator(1), 0.04, 1.0)
    assert boxes[:, 2].min() == 1 and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 24).all() and (boxes[:, 1] + boxes[:, 3] <= 32).all()
    for crop, image, (top, left, height, width) in zip(stae.crop(images, boxes), images, boxes.tolist()):
        piece = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(piece, size=(24, 32), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(crop, expected, atol=1e-5, rtol=0)


def test_crop_of_the_whole_image_is_the_image():
    images = torch.rand(3, 3, 16, 16)
    whole = stae.draw_boxes(images.shape, generator(), 1.0, 1.0)
    torch.testing.assert_close(stae.crop(images, whole), images, atol=1e-6, rtol=0)


def test_crop_sides_are_log_uniform():
    sides = stae.draw_boxes((20_000, 3, 1024, 1024), generator(), 0.1, 0.9)[:, 2] / 1024
    position = (sides / 0.1).log() / math.log(9)
    assert abs(position.mean() - 0.5) < 0.01 and abs(position.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize("kind, cell", [("pixel", 1), ("patch", 4)])
def test_masks_have_an_exact_count_and_share_channels(kind, cell):
    mask = stae.draw_mask(kind, (50, 3, 16, 24), generator(), 0.7)
    assert mask.shape == (50, 1, 16, 24)
    assert (mask == 0).sum(dim=(1, 2, 3)).unique().tolist() == [round(0.7 * 384 / cell**2) * cell**2]
    blocks = mask.unfold(2, cell, cell).unfold(3, cell, cell)
    assert (blocks.amin(dim=(4, 5)) == blocks.amax(dim=(4, 5))).all()
    assert (mask.mean(dim=0) > 0).all()  # every place is kept sometimes


def test_tiny_crops_stay_inside():
    boxes = stae.draw_boxes((100, 3, 32, 32), generator(), 1e-40, 1.0)
    assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 32 and boxes[:, 2].min() == 1


def test_channel_mask():
    mask = stae.draw_mask("channel", (3000, 3, 8, 8), generator(), 0.7)
    assert mask.shape == (3000, 3, 1, 1) and abs(mask.mean() - 0.3) < 0.02


@pytest.mark.parametrize("transform", stae.TRANSFORMS)
def test_a_drawn_transform_is_the_same_for_both_images(transform):
    """Equal images stay equal, every image gets its own draw whatever its neighbours, and weights sum to 1."""
    x, views, _ = tiny_step(transform, views=2)
    assert sum(weight for weight, _, _ in views) == pytest.approx(1)
    assert len(views) == {"none": 1, "stack": 6}.get(transform, 2)
    for _, name, draw in views:
        seen = stae.apply_transform(name, draw, x)
        assert seen.shape == x.shape and seen.min() >= 0 and seen.max() <= 1 + 1e-6
        other = x.clone()
        other[1:] = 0.5
        assert torch.equal(stae.apply_transform(name, draw, other)[0], seen[0])
    again = stae.draw_views(transform, x.shape, generator(), 2, (0.25, 1.0))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(views, again) if a[2] is not None)


def test_detail_filters_by_hand():
    flat = torch.full((1, 3, 16, 16), 0.25)
    assert torch.allclose(stae.detail("blur", flat), flat)
    assert stae.detail("edges", flat)[..., 1:-1, 1:-1].max() < 0.05
    assert stae.detail("residual", flat).max() < 1e-3
    dot = torch.zeros(1, 1, 16, 16)
    dot[..., 8, 8] = 1.0
    blurred = stae.detail("blur", dot)
    assert blurred[..., 8, 8].item() == pytest.approx(1 / 121) and blurred[..., 2, 8] == 0
    assert blurred[..., 15, 8] == 0 and stae.blur(dot, 11)[..., 13, 8].item() == pytest.approx(1 / (11 * 8))
    assert stae.detail("residual", dot)[..., 8, 8].item() == pytest.approx(1, abs=1e-4)
    edges = stae.detail("edges", dot)[0, 0]
    assert edges[8, 8] < 1e-3 and edges[8, 7].item() == pytest.approx(1, abs=1e-4)
    assert edges[7, 7].item() == pytest.approx(0.5**0.5, abs=1e-4)
    dots = torch.zeros(1, 1, 16, 16)
    dots[..., 4, 4], dots[..., 11, 11] = 1.0, 0.1  # local contrast makes a faint dot as strong as a bright one
    contrast = stae.detail("contrast", dots)[0, 0]
    assert contrast[4, 4].item() == pytest.approx(1) and contrast[11, 11] > 0.9 and contrast[0, 15] == 0.5
    red = torch.tensor([0.6, 0.3, 0.3]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    saturated = torch.tensor([0.4 + 1.8 * 0.2, 0.4 - 1.8 * 0.1, 0.4 - 1.8 * 0.1])
    expected = saturated.mean() + 1.4 * (saturated - saturated.mean())
    torch.testing.assert_close(stae.detail("colour", red)[0, :, 5, 5], expected)


@pytest.mark.parametrize("ratio", [1e-6, 0.1, 0.35, 0.9, 0.999])
def test_holes_have_their_area_and_stay_inside(ratio):
    holes = stae.draw_holes((500, 3, 24, 24), generator(), ratio)
    side = min(max(1, round(24 * ratio**0.5)), 23)
    assert (holes[:, 2:] == side).all() and holes.min() >= 0 and (holes[:, :2] + side).max() == 24
    inside = stae.hole_mask(holes, 24)
    assert inside.shape == (500, 1, 24, 24) and (inside.sum(dim=(1, 2, 3)) == side**2).all()
    for (top, left, _, _), mask in zip(holes[:50].tolist(), inside[:, 0]):
        assert mask[top : top + side, left : left + side].all()
    corners = holes[:, :2].float()
    assert (corners.std(dim=0) > 0.2 * (24 - side)).all() and holes[:, 0].unique().numel() == 25 - side
    assert torch.equal(holes, stae.draw_holes((500, 3, 24, 24), generator(), ratio))


def test_holes_are_filled_with_the_mean_of_their_image():
    images = torch.rand(5, 3, 16, 16, generator=generator())
    holes = stae.draw_holes(images.shape, generator(), 0.35)
    holed = stae.cut_holes(images, holes)
    for image, cut, (top, left, side, _) in zip(images, holed, holes.tolist()):
        expected = image.clone()
        expected[:, top : top + side, left : left + side] = image.mean(dim=(1, 2)).view(3, 1, 1)
        torch.testing.assert_close(cut, expected)


def test_unknown_transform_is_named():
    with pytest.raises(ValueError, match="'wavelet'.*pixel"):
        stae.draw_views("wavelet", (1, 3, 16, 16), generator())


# ------------------------------------------------------------------------------------------------ 3. model


def test_parameter_counts_of_the_authors_network():
    count = lambda *sizes: sum(p.numel() for p in stae.Autoencoder(*sizes).parameters())
    assert count(3, 32, 8) == 135_027
    assert round(count(3, 128, 32) / 1e6, 2) == 2.13  # CelebA ordinary
    assert round(count(3, 128, 128, 128, 128) / 1e6, 2) == 11.15  # masked, 128 numbers
    assert round(count(3, 128, 128, 512, 128) / 1e6, 1) == 36.3  # masked, 512 numbers


def test_global_code_is_flatten_and_linear_on_both_sides():
    model = stae.Autoencoder(3, width=4, latent_channels=4, latent_dim=10, size=16)
    x = torch.rand(5, 3, 16, 16)
    features = model.encoder.down2(model.encoder.down1(F.silu(model.encoder.stem(x)))).flatten(1)  # (5, 16)
    flat = features @ model.encoder.head[1].weight.T + model.encoder.head[1].bias
    z = model.encode(x)
    assert z.shape == (5, 10, 1, 1) and model(x).shape == x.shape
    expected = (flat - flat.mean(dim=0)) / (flat.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(z.flatten(1), expected, atol=1e-5, rtol=1e-4)
    spatial = F.silu(z.flatten(1) @ model.decoder[1].weight.T + model.decoder[1].bias).view(5, 4, 2, 2)
    torch.testing.assert_close(model.decode(z), model.decoder[4:](spatial).sigmoid())


@pytest.mark.parametrize("channels, height, width", [(3, 32, 32), (1, 16, 40)])
def test_shapes_and_ranges(channels, height, width):
    model = tiny_model(channels=channels)
    z = model.encode(torch.rand(5, channels, height, width))
    assert z.shape == (5, 4, height // 8, width // 8) and z.dtype == torch.float32
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    x_hat = model.decode(z)
    assert x_hat.shape == (5, channels, height, width) and 0 <= x_hat.min() and x_hat.max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(torch.rand(2, channels, 32, 32)).dtype == model.decode(z).dtype == torch.float32


def test_skip_is_the_mean_of_its_group_of_pixels():
    down = stae.Down(2, 4)
    for p in down.parameters():
        p.data.zero_()
    x = torch.rand(1, 2, 4, 4)
    corners = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2)  # (1, 2, 4, 2, 2)
    expected = torch.stack([corners[:, c, i : i + 2].mean(dim=1) for c in (0, 1) for i in (0, 2)], dim=1)
    torch.testing.assert_close(down(x), F.silu(expected))


# ------------------------------------------------------------------------------------------------ 4. SIGReg


def naive_sigreg(codes, slices):
    """The formula by plain loops in float64, over all 33 knots of [-3, 3]: no symmetry, no recurrence."""
    codes, slices = codes.double(), slices.double()
    codes = codes[..., None, None] if codes.dim() == 2 else codes
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    values = []
    for row in range(codes.shape[2]):
        for column in range(codes.shape[3]):
            for k in range(slices.shape[1]):
                s = codes[:, :, row, column] @ slices[:, k]
                wave = torch.exp(1j * t[:, None] * s).mean(dim=1)
                gap = (wave - torch.exp(-(t**2) / 2)).abs() ** 2 * torch.exp(-(t**2) / 2)
                values.append(len(s) * torch.trapezoid(gap, t))
    return torch.stack(values).mean()


@pytest.mark.parametrize("shape", [(32, 1), (50, 8), (20, 64), (12, 512), (16, 4, 2, 3), (8, 3, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigreg_against_plain_loops_value_and_gradient(shape, dtype):
    """In float32, under bf16 autocast and for codes in bf16; whole and, with many slices, in parts."""
    codes = (torch.randn(shape, generator=generator()) * 1.3 + 0.2).to(dtype).requires_grad_()
    slices = stae.draw_slices(shape[1], 5, generator(1))
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = stae.sigreg(codes, slices)
    expected = naive_sigreg(codes, slices)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and value.dtype == torch.float32
    ours, theirs = (torch.autograd.grad(v, codes)[0].float() for v in (value, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4 if dtype == torch.float32 else 1e-2)


def test_sigreg_in_parts(monkeypatch):
    codes = torch.randn(40, 3, 4, 4, generator=generator()).requires_grad_()
    slices = stae.draw_slices(3, 4000, generator(1))  # 16 * 40 * 4000 projections: three parts
    value, expected = stae.sigreg(codes, slices), [stae.sigreg(codes[..., i, j], slices) for i in range(4) for j in range(4)]
    assert value.item() == pytest.approx(sum(expected).item() / 16, rel=1e-5)
    ours, theirs = (torch.autograd.grad(v, codes)[0] for v in (value, sum(expected) / 16))
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_sigreg_exact_values():
    slices = stae.draw_slices(8, 64, generator())
    assert stae.sigreg(torch.zeros(100, 8), slices).item() == pytest.approx(0.4020 * 100, rel=1e-3)
    draws = [stae.sigreg(torch.randn(128, 8, generator=generator(i)), slices).item() for i in range(300)]
    assert np.mean(draws) == pytest.approx(1.0525, abs=0.03)


# ------------------------------------------------------------------------------------------------ 5. objective


@pytest.mark.parametrize("transform", stae.TRANSFORMS)
def test_frozen_judge_equals_a_deep_copied_encoder(transform):
    """The author's way, a copy of the encoder whose weights do not train, gives the same loss and gradients."""
    x, views, slices = tiny_step(transform, views=2)
    ours, theirs = tiny_model(), tiny_model()
    loss, _ = stae.stae_loss(ours, x, views, slices, stae.judge_weights(ours.encoder, "frozen"), 0.03, 0.3)
    loss.backward()

    copied = copy.deepcopy(theirs.encoder).requires_grad_(False)
    z = theirs.norm(theirs.encoder(x)[0])
    x_hat = theirs.decode(z)
    expected = 0.03 * stae.sigreg(z, slices)
    for weight, name, draw in views:
        with torch.no_grad():
            t, t_layers = copied(stae.apply_transform(name, draw, x))
        r, r_layers = copied(stae.apply_transform(name, draw, x_hat))
        s = t.std(dim=(0, 2, 3), correction=0).view(1, -1, 1, 1)
        d = (((r - t) / (s + 1e-3)) ** 2).mean()
        for a, b in zip(t_layers, r_layers):
            d = d + 0.3 * ((b - a) ** 2).mean() / (((a - a.mean()) ** 2).mean() + 1e-4)
        expected = expected + weight * d
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, atol=1e-6, rtol=1e-5)


def test_judge_gives_the_encoder_no_gradient():
    """With the code cut off from the encoder, nothing reaches its weights through a frozen judge, and all of them through a live one."""
    x, views, slices = tiny_step()
    for kind in ("frozen", "live"):
        model = tiny_model()
        model.encode = lambda images, encode=model.encode: encode(images).detach()
        loss, _ = stae.stae_loss(model, x, views, slices, stae.judge_weights(model.encoder, kind))
        loss.backward()
        reached = [name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert len(reached) == (0 if kind == "frozen" else len(list(model.encoder.parameters())))
        assert model.decoder[3].weight.grad.abs().sum() > 0


def test_target_is_a_constant():
    """No gradient reaches the original through T(x): with the code held, x gets none at all."""
    x, views, slices = tiny_step()
    x.requires_grad_()
    model = tiny_model()
    model.encode = lambda images, encode=model.encode: encode(images.detach())
    loss, _ = stae.stae_loss(model, x, views, slices, stae.judge_weights(model.encoder, "frozen"))
    loss.backward()
    assert x.grad is None


def test_pixels_are_never_compared():
    """To a judge that cannot see, any two images are equal: the loss then says nothing to the decoder."""
    x, views, slices = tiny_step()
    model = tiny_model()
    blind = {name: torch.zeros_like(p) for name, p in model.encoder.named_parameters()}
    blind["stem.bias"] += 1.0
    loss, terms = stae.stae_loss(model, x, views, slices, blind, 0.0, 0.3)
    loss.backward()
    assert terms["distance"] == 0 and terms["layers"] == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    stae.mse_loss(model, x)[0].backward()
    assert model.decoder[3].weight.grad.abs().sum() > 0  # the baseline does compare them


@pytest.mark.parametrize("transform", stae.TRANSFORMS)
def test_distance_is_zero_for_a_perfect_reconstruction(transform):
    x, views, slices = tiny_step(transform)
    model = tiny_model()
    model.decode = lambda z: x
    _, terms = stae.stae_loss(model, x, views, slices, stae.judge_weights(model.encoder, "frozen"), 0.03, 0.3)
    assert terms["distance"] == 0 and terms["layers"] == 0


def test_running_statistics_come_from_full_images_alone():
    x, views, slices = tiny_step("pixel", views=3)
    for kind in stae.JUDGES:
        model, twin = tiny_model(), tiny_model()
        kept = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
        stae.stae_loss(model, x, views, slices, stae.judge_weights(model.encoder, kind, kept))
        twin.encode(x)
        assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
        assert torch.equal(model.norm.running_var, twin.norm.running_var)


def test_kept_judge_judges_with_the_kept_weights():
    x, views, slices = tiny_step()
    model, other = tiny_model(0), tiny_model(1)
    kept = {name: p.detach() for name, p in other.encoder.named_parameters()}
    frozen = stae.stae_loss(model, x, views, slices, stae.judge_weights(model.encoder, "frozen"))[1]
    random = stae.stae_loss(model, x, views, slices, stae.judge_weights(model.encoder, "random", kept))[1]
    assert frozen["sigreg"] == random["sigreg"] and frozen["distance"] != random["distance"]


def test_live_judge_in_plain_autograd():
    """Gradient reaches the encoder as judge on both sides and through s, and SIGReg acts on the transformed codes too."""
    x, views, slices = tiny_step(views=2)
    ours, theirs = tiny_model(), tiny_model()
    loss, _ = stae.stae_loss(ours, x, views, slices, stae.judge_weights(ours.encoder, "live"), layer_weight=0.0)
    loss.backward()

    standardise = lambda c: (c - c.mean((0, 2, 3), True)) / (c.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    z = theirs.norm(theirs.encoder(x)[0])
    x_hat = theirs.decode(z)
    distance, codes = 0, [z]
    for _, name, draw in views:
        t, r = (theirs.encoder(stae.apply_transform(name, draw, images))[0] for images in (x, x_hat))
        s = t.std(dim=(0, 2, 3), correction=0).view(1, -1, 1, 1)
        distance = distance + (((r - t) / (s + 1e-3)) ** 2).mean() / 2
        codes += [standardise(t), standardise(r)]
    expected = distance + 0.03 * sum(stae.sigreg(code, slices) for code in codes) / 5
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", stae.JUDGES)
@pytest.mark.parametrize("latent_dim", [None, 5])
def test_masked_objective_in_plain_autograd(kind, latent_dim):
    """(d(J(x_c), J(x_m)) + d(J(Tx), J(Tx_c)) + d(J(Tx), J(Tx_m))) / 3 + lambda / 2 * (SIGReg(E(x)) + SIGReg(E(y)))"""
    x, views, _ = tiny_step(views=2)
    slices = stae.draw_slices(latent_dim or 4, 8, generator())
    y = stae.cut_holes(x, stae.draw_holes(x.shape, generator(), 0.35))
    torch.manual_seed(0)
    ours = stae.Autoencoder(3, 4, 4, latent_dim, 16)
    theirs = copy.deepcopy(ours)
    kept = {name: p.detach() * 1.1 for name, p in ours.encoder.named_parameters()}
    weights = stae.judge_weights(ours.encoder, kind, kept)
    loss, terms = stae.masked_loss(ours, x, y, views, slices, weights, 0.07, 0.5)
    loss.backward()

    judge = theirs.encoder if kind == "live" else copy.deepcopy(theirs.encoder)
    if kind in ("ema", "random"):
        judge.load_state_dict(kept)
    deviation = lambda t: ((t - t.mean((0, 2, 3), True)) ** 2).mean((0, 2, 3), True).sqrt()  # t.std's slope is coarse
    distance = lambda t, r: (((r - t) / (deviation(t) + 1e-3)) ** 2).mean()
    layer = lambda t, r: ((r - t) ** 2).mean() / (t.var(correction=0) + 1e-4)
    standardise = lambda c: (c - c.mean((0, 2, 3), True)) / (c.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    z_c, z_m = theirs.norm(theirs.encoder(torch.cat((x, y)))[0]).chunk(2)  # one set of statistics
    x_c, x_m = theirs.decode(z_c), theirs.decode(z_m)
    total, expected = distance(judge(x_c)[0], judge(x_m)[0]) / 3, {}
    for end, z, x_hat in (("clean", z_c, x_c), ("masked", z_m, x_m)):
        codes, d, h = [z], 0, 0
        for _, name, draw in views:
            t, r = judge(stae.apply_transform(name, draw, x)), judge(stae.apply_transform(name, draw, x_hat))
            t = t if kind == "live" else (t[0].detach(), [a.detach() for a in t[1]])
            d, h = d + distance(t[0], r[0]) / 2, h + sum(layer(a, b) for a, b in zip(t[1], r[1])) / 2
            codes += [standardise(t[0]), standardise(r[0])] if kind == "live" else []
        gaussian = sum(stae.sigreg(code, slices) for code in codes) / len(codes)
        total = total + (d + 0.5 * h) / 3 + 0.07 / 2 * gaussian
        expected |= {f"distance_{end}": d, f"layers_{end}": h, f"sigreg_{end}": gaussian}
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert terms.keys() == {"agreement", *expected}
    assert {name: terms[name].item() for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)
    ours, theirs = gradients(ours), gradients(theirs)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=5e-5, rtol=1e-4)


def test_masked_baseline_by_hand():
    x, _, _ = tiny_step()
    y = stae.cut_holes(x, stae.draw_holes(x.shape, generator(), 0.35))
    loss, terms = stae.mse_loss(tiny_model(), x, y)
    assert loss.item() == pytest.approx(((tiny_model()(y) - x) ** 2).mean().item(), rel=1e-5)
    assert loss != stae.mse_loss(tiny_model(), x)[0] and terms.keys() == {"mse"}


def test_live_judge_is_not_rewarded_for_shrinking():
    """Scaling what the judge sees changes nothing, because s is not detached: the slope at scale 1 is next to zero."""
    target, seen = torch.randn(8, 4, 2, 2, generator=generator()), torch.randn(8, 4, 2, 2, generator=generator(1))
    scale = torch.ones((), requires_grad=True)
    loss = stae.code_distance(scale * target, scale * seen)
    assert torch.autograd.grad(loss, scale)[0].abs() < 0.01 * loss


def test_unknown_judge_is_named():
    for name in ("nobody", "ema"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            stae.judge_weights(tiny_model().encoder, name)


def test_mse_loss_by_hand():
    x, _, _ = tiny_step()
    model = tiny_model()
    loss, terms = stae.mse_loss(model, x)
    expected = sum(((tiny_model()(x) - x) ** 2).flatten().tolist()) / x.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-5) and terms.keys() == {"mse"}


def test_sections_2_to_5_run_alone():
    """What a reader copies needs torch and nothing else of the file."""
    start, end = SOURCE.index("# 2. Transforms"), SOURCE.index("# 6. Evaluation")
    names = {}
    exec("import torch\nimport torch.nn.functional as F\nfrom torch import nn\n" + SOURCE[start:end], names)
    x = torch.rand(4, 3, 16, 16)
    model = names["Autoencoder"](3, 4, 4)
    for transform in names["TRANSFORMS"]:
        for judge in names["JUDGES"]:
            views = names["draw_views"](transform, x.shape, generator())
            kept = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
            weights = names["judge_weights"](model.encoder, judge, kept)
            draws = views, names["draw_slices"](4, 8, generator()), weights
            names["stae_loss"](model, x, *draws)[0].backward()
            holed = names["cut_holes"](x, names["draw_holes"](x.shape, generator(), 0.35))
            names["masked_loss"](model, x, holed, *draws)[0].backward()
    names["mse_loss"](model, x)[0].backward()
    assert not re.search(r"cuda|argparse|config\.|open\(", SOURCE[start:end])  # no devices, flags or files


# ------------------------------------------------------------------------------------------------ 6. evaluation


def test_psnr_and_luma_chroma_by_hand():
    assert stae.psnr(0.01) == pytest.approx(20) and stae.psnr(0) == math.inf
    luma, chroma = stae.luma_chroma(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1))
    assert luma.item() == pytest.approx(0.299)
    assert chroma.flatten().tolist() == pytest.approx([-0.299 / 1.772, 0.701 / 1.402], abs=1e-5)  # (B-Y)/1.772, (R-Y)/1.402
    luma, chroma = stae.luma_chroma(torch.full((1, 3, 1, 1), 0.3))
    assert luma.item() == pytest.approx(0.3) and chroma.abs().max() < 1e-6


def test_ssim_by_hand():
    """One window: a 11x11 image has a single place, so the formula can be written out with numpy."""
    x, y = (torch.rand(2, 3, 11, 11, generator=generator(i)) for i in (0, 1))
    g = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = np.outer(g, g) / np.outer(g, g).sum()
    expected = []
    for image_x, image_y in zip(x.double().numpy(), y.double().numpy()):
        scores = []
        for a, b in zip(image_x, image_y):
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            scores.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
        expected.append(np.mean(scores))
    assert stae.ssim(x, y).tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(stae.ssim(x, x), torch.ones(2))


def test_variation_by_hand():
    image = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]).view(1, 1, 2, 3)
    assert stae.variation(image).item() == pytest.approx(1 + 1 + 0 + 0.5 + 0 + 1 + 0.5)


    inside = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]).view(1, 1, 2, 3)
    assert stae.variation(image, inside).item() == pytest.approx(1 + 0.5 + 1)


def pca_psnr(train, test, dimensions):
    pca, x = stae.PCA(train, dimensions), test / 255
    return stae.psnr((pca.decode(pca.encode(x)) - x).square().mean().item())


def numpy_pca_psnr(train, test, dimensions):
    x, y = (images.flatten(1).numpy() / 255.0 for images in (train, test))
    basis = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:dimensions]
    rest = (y - x.mean(0)) - (y - x.mean(0)) @ basis.T @ basis
    return -10 * np.log10((rest**2).mean())


def test_pca_floor_against_numpy():
    images, _, _ = stae.make_shapes(400)
    train, test = images[:300], images[300:]
    assert pca_psnr(train, test, 20) == pytest.approx(numpy_pca_psnr(train, test, 20), abs=1e-3)
    big = F.interpolate(images.float(), scale_factor=4, mode="bilinear")[:, :, :80].to(torch.uint8)  # 80 * 128 > 4096 pixels
    before = torch.random.get_rng_state()
    assert pca_psnr(big[:300], big[300:], 20) == pytest.approx(numpy_pca_psnr(big[:300], big[300:], 20), abs=0.02)
    assert torch.equal(before, torch.random.get_rng_state())
    assert pca_psnr(big[:300], big[300:], 320) == pytest.approx(numpy_pca_psnr(big[:300], big[300:], 320), abs=0.02)


def test_evaluate_whatever_the_batch_size():
    images = torch.randint(0, 256, (130, 3, 16, 16), dtype=torch.uint8, generator=generator())
    model = tiny_model()
    with torch.no_grad():
        for _ in range(20):
            model.encode(torch.rand(32, 3, 16, 16))
    one, other = (
        stae.evaluate(model, (images, None), (images, None), probe=False, batch_size=size) for size in (130, 7))
    assert one == pytest.approx(other, rel=1e-5)
    with torch.no_grad():
        x = images.float() / 255
        error = model(x) - x
    assert one["mse"] == pytest.approx((error**2).mean().item(), rel=1e-5)
    assert one["psnr"] == pytest.approx(-10 * math.log10(one["mse"]))
    luma = (error * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1)
    assert one["psnr_luma"] == pytest.approx(-10 * math.log10((luma**2).mean().item()), abs=1e-3)
    _, chroma = stae.luma_chroma(error)
    assert one["psnr_chroma"] == pytest.approx(-10 * math.log10((chroma**2).mean().item()), abs=1e-3)
    with torch.no_grad():
        assert one["ssim"] == pytest.approx(stae.ssim(x, model(x)).mean().item(), rel=1e-4)
        assert one["sharpness"] == pytest.approx((stae.variation(model(x)).sum() / stae.variation(x).sum()).item(), rel=1e-4)
        codes = model.encode(x)
    assert one["code_size"] == 16 and one["min_std"] == pytest.approx(codes.std(dim=0, correction=0).mean(dim=(1, 2)).min().item(), rel=1e-4)
    assert one["pca_psnr"] == pytest.approx(pca_psnr(images, images, 16), rel=1e-5)
    slices = stae.draw_slices(4, 256, stae.generator_for("cpu", 0))
    assert one["sigreg"] == pytest.approx(naive_sigreg(codes[:128], slices[:, :256]).item(), rel=1e-4)


def test_holes_measured_by_hand():
    train, test = (torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator(n)) for n in (30, 20))
    model = tiny_model().eval()
    results, other = (stae.evaluate(model, (train, None), (test, None), 0.35, probe=False, batch_size=size) for size in (7, 20))
    assert other == pytest.approx(results, rel=1e-5)
    x, holes = test.double() / 255, stae.fixed_holes(test, 0.35)
    with torch.no_grad():
        x_hat = model(stae.cut_holes(x.float(), holes)).double()
    mean, side = (train.double() / 255).mean(dim=0), 9
    inside, floor, ours, theirs = [], [], 0, 0
    for image, output, (top, left, _, _) in zip(x, x_hat, holes.tolist()):
        cut = lambda picture: picture[:, top : top + side, left : left + side]
        inside.append(((cut(output) - cut(image)) ** 2).mean().item())
        floor.append(((cut(mean) - cut(image)) ** 2).mean().item())
        ours += stae.variation(cut(output)[None]).item()
        theirs += stae.variation(cut(image)[None]).item()
    decibel = lambda mse: -10 * math.log10(mse)
    whole = ((x_hat - x) ** 2).mean().item()
    outside = (whole * 256 - np.mean(inside) * side**2) / (256 - side**2)
    expected = {"masked_psnr": decibel(whole), "hole_psnr": decibel(np.mean(inside)), "hole_floor_psnr": decibel(np.mean(floor)),
                "visible_psnr": decibel(outside), "hole_sharpness": ours / theirs,
                "masked_ssim": stae.ssim(x.float(), x_hat.float()).mean().item()}
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_collapse_shows_even_when_positions_differ():
    """A code that is the same for every image, though not at every place, has no deviation."""
    model = tiny_model()
    constant = torch.randn(1, 4, 2, 2, generator=generator())
    model.encode = lambda images: constant.expand(len(images), -1, -1, -1)
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=generator())
    assert stae.evaluate(model, (images, None), (images, None), probe=False)["min_std"] < 1e-6


def clusters(count=60, classes=3, dimensions=5, spread=0.3, seed=0):
    """Points around well-separated centres, in random order -> x (count, dimensions), labels (count,)."""
    centres = 4 * torch.randn(classes, dimensions, generator=generator(99))
    labels = torch.randint(classes, (count,), generator=generator(seed))
    return centres[labels] + spread * torch.randn(count, dimensions, generator=generator(seed + 1)), labels


@pytest.mark.parametrize("count, dimensions", [(40, 7), (7, 40)])
def test_ridge_against_the_normal_equations(count, dimensions):
    x = torch.randn(count, dimensions, generator=generator())
    y = torch.randn(count, 3, generator=generator(1))
    for strength, weights in zip((1e-2, 1.0), stae.ridge(x, y, (1e-2, 1.0)), strict=True):
        a, b = x.double().numpy(), y.double().numpy()
        expected = np.linalg.solve(a.T @ a / count + strength * np.eye(dimensions), a.T @ b / count)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [200, 5000])
def test_linear_probe_by_hand(count, monkeypatch):
    """Against a probe written out with numpy: standardise, choose on the last fifth, fit on all, count. Squared error
    chooses when the last fifth is small, accuracy when it has 1,000 images."""
    x, labels = clusters(count, spread=4.0)
    test, test_labels = clusters(90, spread=4.0, seed=5)
    x, test = x * torch.tensor([1, 100, 0.01, 1, 1]) + 7, test * torch.tensor([1, 100, 0.01, 1, 1]) + 7
    a, b = x.double().numpy(), test.double().numpy()
    a, b = (a - a.mean(0)) / a.std(0), (b - a.mean(0)) / a.std(0)
    y = np.eye(3)[labels]

    def scores(fit, asked, strength):
        target = y[fit] - y[fit].mean(0)
        weights = np.linalg.solve(a[fit].T @ a[fit] + len(a[fit]) * strength * np.eye(5), a[fit].T @ target)
        return asked @ weights + y[fit].mean(0)

    held = [scores(slice(count * 4 // 5), a[count * 4 // 5 :], strength) for strength in stae.RIDGE]
    wrong = [(score.argmax(1) != labels[count * 4 // 5 :].numpy()).mean() for score in held]
    errors = [((score - y[count * 4 // 5 :]) ** 2).mean() for score in held]
    best = [stae.RIDGE[int(np.argmin(tried))] for tried in (wrong, errors)]
    assert best[0] != best[1]
    expected = 100 * (scores(slice(count), b, best[int(count == 200)]).argmax(1) == test_labels.numpy()).mean()
    fitted, ridge = [], stae.ridge
    monkeypatch.setattr(stae, "ridge", lambda x, y, strengths: fitted.append((len(x), *strengths)) or ridge(x, y, strengths))
    assert stae.linear_probe(x, labels, test, test_labels) == pytest.approx(expected) and 40 < expected < 95
    assert fitted == [(count * 4 // 5, *stae.RIDGE), (count, best[int(count == 200)])]


def test_linear_probe_is_not_fooled_by_the_test_labels():
    x, labels = clusters()
    noise = torch.randint(3, (600,), generator=generator(3))
    assert stae.linear_probe(x, labels, x, labels) == 100
    assert stae.linear_probe(torch.randn(600, 5, generator=generator()), noise, torch.randn(600, 5, generator=generator(1)), noise) < 45


def test_few_labels_sees_few():
    x, labels = clusters(120, spread=3.0)
    test, test_labels = clusters(200, spread=3.0, seed=5)
    seen = []
    probe = stae.linear_probe
    try:
        stae.linear_probe = lambda x, labels, *rest: seen.append((x, labels)) or float(len(seen))
        assert stae.few_labels(x, labels, test, test_labels, 10) == 3.0  # the mean of 1 to 5
    finally:
        stae.linear_probe = probe
    assert [labels.bincount().tolist() for _, labels in seen] == [[10] * 3] * 5
    assert len({x.sum().item() for x, _ in seen}) == 5 and any(labels.diff().lt(0).any() for _, labels in seen)
    assert all((x[i] == points).all(dim=1).any() for points, _ in seen[:1] for i in [(x == points[0]).all(dim=1).nonzero()[0, 0]])
    assert math.isnan(stae.few_labels(x, labels, test, test_labels, 100))  # no class has as many
    assert stae.few_labels(x, labels.clamp(min=1), test, test_labels.clamp(min=1), 10) > 40  # class 0 is in neither
    assert 40 < stae.few_labels(x, labels, test, test_labels, 10) <= 100


def test_knn_by_loop():
    x, labels = clusters(80, spread=6.0)
    test, test_labels = clusters(300, spread=6.0, seed=5)
    right = 0
    for point, label in zip(test, test_labels):
        nearest = sorted(range(80), key=lambda i: -F.cosine_similarity(x[i], point, dim=0).item())[:20]
        votes = [sum(labels[i].item() == kind for i in nearest) for kind in range(3)]
        right += votes.index(max(votes)) == label
    assert stae.knn(x, labels, test, test_labels) == pytest.approx(100 * right / 300) and 20 < right / 3 < 95
    assert stae.knn(100 * x, labels, test, test_labels) == pytest.approx(100 * right / 300)  # cosine: scale does not count
    assert stae.knn(x[:5], labels[:5], test, test_labels) >= 0  # fewer than 20 of them


def test_k_means_finds_clusters_made_by_hand():
    x, labels = clusters(300, classes=6)
    inertia, owner = stae.k_means(x, 6, generator())
    assert stae.mutual_information(owner, labels) == pytest.approx(1)
    within = sum((x[labels == kind] - x[labels == kind].mean(dim=0)).square().sum().item() for kind in range(6))
    assert inertia == pytest.approx(within / (x - x.mean(dim=0)).square().sum().item(), rel=1e-4)
    assert stae.k_means(x, 1, generator())[0] == pytest.approx(1)
    assert math.isnan(stae.k_means(torch.ones(9, 2), 3, generator())[0])
    same, owner = stae.k_means(torch.ones(9, 2) * torch.arange(3).repeat(3)[:, None], 5, generator())  # fewer points than clusters
    assert same == pytest.approx(0) and len(owner) == 9


def test_k_means_keeps_the_best_of_its_starts():
    x, _ = clusters(200, classes=12, spread=1.0)
    one, three = (stae.k_means(x, 12, generator(), starts=starts)[0] for starts in (1, 3))
    singles, shared = [], generator()
    for _ in range(3):
        singles.append(stae.k_means(x, 12, shared, starts=1)[0])
    assert three == pytest.approx(min(singles)) and one == pytest.approx(singles[0]) and max(singles) > min(singles)


def test_mutual_information_by_hand():
    a, b = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    entropy = lambda *p: -sum(q * math.log(q) for q in p)
    mutual = entropy(1 / 3, 1 / 3, 1 / 3) + entropy(1 / 2, 1 / 2) - entropy(1 / 3, 1 / 6, 1 / 6, 1 / 3)
    expected = mutual / ((entropy(1 / 3, 1 / 3, 1 / 3) + entropy(1 / 2, 1 / 2)) / 2)
    assert stae.mutual_information(a, b) == pytest.approx(expected) == stae.mutual_information(b, a)
    assert stae.mutual_information(a, (a + 1) % 3) == pytest.approx(1)  # names do not count
    assert 0 <= stae.mutual_information(a, torch.tensor([0, 1, 0, 1, 0, 1])) < 1e-12
    assert math.isnan(stae.mutual_information(a * 0, b * 0))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_rankme_against_numpy(shape):
    codes = torch.randn(shape, generator=generator()) * torch.linspace(0.1, 3, shape[1])
    values = np.linalg.svd(codes.double().numpy(), compute_uv=False)
    p = values / values.sum() + 1e-5
    assert stae.rankme(codes) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert stae.rankme(torch.eye(6).repeat(5, 1)) == pytest.approx(6, rel=1e-3)
    assert stae.rankme(torch.ones(30, 6)) == pytest.approx(1, abs=0.01)
    low = torch.randn(300, 8, generator=generator()) @ torch.linalg.qr(torch.randn(200, 8, generator=generator(1))).Q.T
    assert stae.rankme(low) == pytest.approx(stae.rankme(torch.randn(300, 8, generator=generator())), rel=0.03)


@pytest.mark.parametrize("shape", [(60, 12), (10, 30)])
def test_alignment_against_numpy(shape):
    pixels, labels = torch.rand(shape, generator=generator()), torch.randint(4, shape[:1], generator=generator(1))
    x = pixels.double().numpy()
    _, s, v = np.linalg.svd((x - x.mean(0)).T, full_matrices=False)  # x is D x N there
    rank = int((s > 1e-9 * s[0]).sum())
    shares = np.linalg.norm(np.eye(4)[labels].T @ v[:rank].T, axis=0) ** 2
    ours = [stae.alignment(pixels, labels, count) for count in range(1, rank + 1)]
    np.testing.assert_allclose(ours, shares.cumsum() / shares.sum(), rtol=1e-6)
    assert ours[-1] == 1 and (np.diff(ours) >= 0).all() and stae.alignment(pixels, labels, 10**6) == 1
    assert rank == min(shape[0] - 1, shape[1])  # centred, so one less than the images
    assert math.isnan(stae.alignment(pixels, labels * 0, 3))


def test_pca_of_more_numbers_than_images():
    """No axis is made up: what is left of a test image is what the training images do not span, and probes stay sound."""
    for side in (16, 40):  # below and above 4,096 pixels
        images = torch.randint(0, 256, (30, 3, side, side), dtype=torch.uint8, generator=generator())
        pca = stae.PCA(images[:12], 50)
        assert pca.axes.shape == (3 * side**2, 11) and stae.PCA(images[:1], 50).axes.shape[1] == 0
        torch.testing.assert_close(pca.axes.T @ pca.axes, torch.eye(11), atol=1e-4, rtol=0)
        torch.testing.assert_close(pca.decode(pca.encode(images[:12] / 255)), images[:12] / 255, atol=1e-4, rtol=0)
        spread = pca.encode(images[:12] / 255).std(dim=0)
        assert spread.tolist() == sorted(spread.tolist(), reverse=True)  # the leading axis first
        assert (pca.encode(images[12:] / 255).std(dim=0) / spread).max() < 3


def test_codes_that_are_all_equal(capsys):
    """One image twice, and a code that is the same for all: a table, not a crash."""
    images, labels = labelled(2)
    results = stae.evaluate(tiny_model(), (images, labels), (images, labels))
    assert results["rankme"] < 3
    model = tiny_model()
    model.encode = lambda x: torch.ones(len(x), 4, 2, 2)
    results = stae.evaluate(model, (images, labels), (images, labels))
    assert math.isnan(results["kmeans_inertia"]) and results["probe_code"] == 50 and results["rankme"] == pytest.approx(1, abs=0.01)


def test_larger_images_have_no_alignment():
    images, labels = labelled(30, side=40)
    results = stae.evaluate(tiny_model(), (images, labels), (images, labels))
    assert "alignment" not in results and results["probe_pixels"] > 90


def labelled(count, seed=0, channels=3, side=16):
    """Noise on a grey that names the class of an image -> images, labels."""
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 50, (count, channels, side, side), generator=generator(seed))
    return (60 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels


CONTROLS = ["probe_random_code", "knn_pca", "knn_random", "few10_random_code", "few100_random_code", "accuracy_error"]
PROBES = ["probe_code", "probe_features", "probe_random", "probe_pixels", "probe_pca", "knn_code", "knn_features", "few10", "few100",
          "kmeans_inertia", "kmeans_nmi", "rankme", "alignment"]


def test_codes_are_measured_and_the_model_stays(capsys):
    train, test = labelled(120), labelled(30, 1)
    model = tiny_model().eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    results = stae.evaluate(model, train, test, batch_size=7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert set(PROBES) < results.keys() and results["accuracy_error"] == pytest.approx(50 / 30**0.5)
    assert 60 < results["probe_pca"] <= 100 and math.isnan(results["few100"])  # 40 images of each class
    assert stae.evaluate(model, train, test, batch_size=30) == pytest.approx(results, rel=1e-4, nan_ok=True)
    with torch.no_grad():
        codes, unseen = (model.encode(images / 255).flatten(1) for images in (train[0], test[0]))
        middle = [model.encoder(images / 255)[1][1].flatten(1) for images in (train[0], test[0])]
    order = torch.randperm(120, generator=stae.generator_for("cpu", 0))
    labels = train[1][order], test[1]
    assert results["rankme"] == pytest.approx(stae.rankme(codes), rel=1e-4)
    assert results["probe_code"] == stae.linear_probe(codes[order], labels[0], unseen, labels[1])
    assert results["probe_features"] == stae.linear_probe(middle[0][order], labels[0], middle[1], labels[1])
    fresh = stae.untrained(model)
    with torch.no_grad():
        for name, look in {"random": lambda x: fresh.encoder(x)[1][1], "random_code": fresh.encode}.items():
            raw = [look(images / 255).flatten(1) for images in (train[0][order], test[0])]
            assert results[f"probe_{name}"] == stae.linear_probe(raw[0], labels[0], raw[1], labels[1])
            if name == "random":
                assert results["knn_random"] == stae.knn(raw[0], labels[0], raw[1], labels[1])
            else:
                assert results["few10_random_code"] == stae.few_labels(raw[0], labels[0], raw[1], labels[1], 10)
        pca = stae.PCA(train[0], 16)
        raw = [pca.encode(images / 255) for images in (train[0][order], test[0])]
        assert results["probe_pca"] == stae.linear_probe(raw[0], labels[0], raw[1], labels[1])
        assert results["knn_pca"] == stae.knn(raw[0], labels[0], raw[1], labels[1])
    assert results["knn_code"] == stae.knn(codes[order], labels[0], unseen, labels[1])
    assert results["few10"] == stae.few_labels(codes[order], labels[0], unseen, labels[1], 10)
    pixels = (train[0][order] / 255).flatten(1)
    assert results["alignment"] == pytest.approx(stae.alignment(pixels, labels[0], 16), rel=1e-6)


def test_at_most_20000_images_are_probed(monkeypatch):
    seen, collect = [], stae.collect
    monkeypatch.setattr(stae, "collect", lambda function, images, device: seen.append(len(images)) or collect(function, images[:50], device))
    for name in ("linear_probe", "knn", "few_labels", "alignment", "mutual_information"):
        monkeypatch.setattr(stae, name, lambda *args: 0.0)
    images, labels = labelled(50, channels=1)
    stae.evaluate_codes(tiny_model(channels=1).eval(), stae.PCA(images, 3), (images.repeat(500, 1, 1, 1), labels.repeat(500)), (images, labels))
    assert set(seen) == {10_000, 20_000, 50}


def test_the_untrained_control_has_weights_of_its_own():
    model = tiny_model(seed=5)
    fresh, again = stae.untrained(model), stae.untrained(tiny_model(seed=6))
    for name, weight in fresh.named_parameters():
        assert torch.equal(weight, again.state_dict()[name]) and not torch.equal(weight, model.state_dict()[name])
        assert weight.dim() == 1 or 0.5 < weight.std() / model.state_dict()[name].std() < 2  # of the same size


def test_activations_are_pooled_to_at_most_4096():
    assert torch.equal(stae.pooled(torch.arange(2 * 64 * 64.0).view(1, 2, 64, 64)).flatten(), 
                       F.adaptive_avg_pool2d(torch.arange(2 * 64 * 64.0).view(1, 2, 64, 64), 45).flatten())
    assert stae.pooled(torch.rand(1, 5000, 2, 2)).shape == (1, 5000, 1, 1)
    small = torch.rand(2, 64, 8, 8, generator=generator())
    assert torch.equal(stae.pooled(small), small) and stae.pooled(torch.rand(1, 256, 32, 32)).shape == (1, 256, 4, 4)


@pytest.mark.parametrize("labels", [None, torch.arange(1100)])
def test_without_labels_the_rest_is_measured(capsys, labels):
    images = torch.randint(0, 256, (1100, 1, 16, 16), dtype=torch.uint8, generator=generator())
    results = stae.evaluate(tiny_model(channels=1), (images, labels), (images[:9], labels))
    assert set(PROBES) & results.keys() == {"rankme"} and "skipped" in capsys.readouterr().out
    assert stae.evaluate(tiny_model(channels=1), (images, labels), (images[:9], labels), probe=False).keys().isdisjoint(PROBES)


@pytest.mark.parametrize("channels, latent_dim", [(3, None), (1, None), (3, 5)])
def test_pictures_of_the_code(channels, latent_dim):
    images = torch.randint(0, 256, (40, channels, 16, 16), dtype=torch.uint8, generator=generator())
    images[20:] //= 4
    model = stae.Autoencoder(channels, 4, 4, latent_dim, 16).eval()
    drawn = stae.code_pictures(model, images[:30], images[20:])
    spatial = {"brush"} if latent_dim is None else set()
    assert drawn.keys() == {"walk", "interpolation", "samples", "neighbours"} | spatial
    for _, rows in drawn.values():
        assert len({row.shape for row in rows}) == 1 and all(0 <= row.min() and row.max() <= 1 and row.std() > 0 for row in rows)
    count = {name: (len(rows), len(rows[0])) for name, (_, rows) in drawn.items()}
    axes = latent_dim or 8
    expected = {"walk": (axes, 9), "interpolation": (8, 9), "samples": (4, 16), "neighbours": (7, 8), "brush": (4, 16)}
    assert count == {name: expected[name] for name in drawn}
    x = images[20:36] / 255
    with torch.no_grad():
        z, codes = model.encode(x), model.encode(images[:30] / 255).flatten(1)
        between = model.decode((z[:1] + z[1:2]) / 2)
    rows = drawn["interpolation"][1]
    torch.testing.assert_close(rows[0][4:5], between, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[1][4], (x[0] + x[1]) / 2)
    assert torch.equal(rows[1][0], x[0]) and torch.equal(rows[1][8], x[1])
    rows = drawn["neighbours"][1]  # of the first eight test images, ten of which are training images as well
    assert all(torch.equal(row, x[:8]) for row in (rows[0], rows[1], rows[4]))
    flat = images[:30].flatten(1) / 255
    for shown, space, asked in ((rows[3], codes, z[:8].flatten(1)), (rows[6], flat, x[:8].flatten(1))):
        picked = torch.cdist(shown.flatten(1), flat).argmin(dim=1)
        far = (space[picked] - asked).norm(dim=1)  # of the third neighbour: rounding may swap two as near
        third = (space[None] - asked[:, None]).norm(dim=2).sort(dim=1).values[:, 2]
        torch.testing.assert_close(far, third, rtol=1e-3, atol=1e-3)
    walk = drawn["walk"][1]
    _, _, v = np.linalg.svd((codes - codes.mean(dim=0)).numpy(), full_matrices=False)
    end = torch.from_numpy(v[0]) * ((codes - codes.mean(dim=0)) @ torch.from_numpy(v[0])).std() * 3
    ends = [model.decode((codes.mean(dim=0) + sign * end).view(1, *z.shape[1:]))[0] for sign in (-1, 1)]
    assert min((walk[0][0] - end).abs().max() for end in ends) < 1e-3


def test_the_brush_paints_the_middle_of_the_code_alone():
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator())
    model = tiny_model().eval()
    x, others, plain, painted = stae.code_pictures(model, images, images)["brush"][1]
    with torch.no_grad():
        z = model.encode(x)
        z[:, :, 1:3, 1:3] = model.encode(others)[:, :, 1:3, 1:3]
        torch.testing.assert_close(painted, model.decode(z))
        torch.testing.assert_close(plain, model(x))
    assert torch.equal(others[0], x[1]) and torch.equal(others[-1], x[0]) and not torch.equal(painted, plain)


def test_samples_follow_the_codes(monkeypatch):
    """Means and covariances of the drawn codes, of many of them."""
    model, drawn = tiny_model().eval(), []
    model.norm.running_mean.fill_(-1)  # codes about 1
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=generator())
    with torch.no_grad():
        codes = model.encode(images / 255).flatten(1)
    model.decode = lambda z: drawn.append(z.flatten(1)) or torch.rand(len(z), 3, 16, 16)
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **rest: draw(3000, *shape[1:], **rest))
    stae.code_pictures(model, images, images)
    normal, fitted = [z for z in drawn if len(z) == 3000]
    torch.testing.assert_close(normal.mean(dim=0), torch.zeros(16), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(normal.T), torch.eye(16), atol=0.15, rtol=0)
    torch.testing.assert_close(fitted.mean(dim=0), codes.mean(dim=0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(fitted.T), torch.cov(codes.T, correction=0), atol=0.1 * torch.cov(codes.T).max().item(), rtol=0)


def test_the_classifier_learns_and_is_always_the_same():
    images, labels = labelled(60, side=20)
    models = [stae.make_classifier(3, 3, 20) for _ in range(2)]
    for model in models:
        stae.train_classifier(model, images, labels, "fp32", steps=80)
    assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()))
    assert not models[0].training
    test, test_labels = labelled(30, 1, side=20)
    with torch.no_grad():
        assert stae.accuracy(models[0](test / 255).argmax(dim=1), test_labels) > 90


def test_recognition_asks_the_classifier_about_reconstructions():
    """A classifier of the first pixel, and an autoencoder that makes it right for a known share of the images."""
    (images, labels), model = labelled(60), tiny_model().eval()
    classifier = lambda x: -(x[:, :1, 0, 0] * 255 - torch.tensor([25.0, 85.0, 145.0])).abs()
    original = stae.accuracy(classifier(images / 255).argmax(dim=1), labels)
    with torch.no_grad():
        made = stae.accuracy(classifier(model(images / 255)).argmax(dim=1), labels)
    results = stae.evaluate(model, (images, labels), (images, labels), probe=False, classifier=classifier)
    assert results["recognition_original"] == original == 100 and results["recognition"] == made < 60
    assert results["recognition_pca"] > made and "probe_code" not in results and results["accuracy_error"] > 0


# ------------------------------------------------------------------------------------------------ 7. training


def test_learning_rate_warms_up_and_decays_to_a_twentieth():
    rates = [stae.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.02 and rates[99] == rates[100] == 2.0
    assert all(a > b for a, b in zip(rates[100:], rates[101:])) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert stae.learning_rate(0, 1, 2.0) == 2.0


def test_generator_depends_on_its_key_alone():
    draw = lambda *key: torch.randint(0, 1 << 30, (4,), generator=stae.generator_for("cpu", *key)).tolist()
    assert draw(0, 0, 1) == draw(0, 0, 1)
    assert len({tuple(draw(seed, kind, step)) for seed in range(5) for kind in (0, 1) for step in range(50)}) == 500


def share_runs(rank, folder):
    """Two processes: as they should, then with averages that pass no gradient on."""
    share_a_run(rank, 2, folder)
    share_a_run(rank, 2, folder, plainly=True)


def share_a_run(rank, world, folder, plainly=False):
    """What a process of `world` ones makes of one step's loss and gradients, and of 20 steps, for each objective."""
    torch.set_num_threads(1)
    if world > 1:
        where = f"file://{folder}/meeting-{plainly}"
        torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    if plainly:
        stae.average = lambda x: (x := x.clone(), torch.distributed.all_reduce(x))[0] / world
    images, results = (torch.rand(24, 3, 16, 16, generator=generator()) * 255).byte(), {}
    for name, flags in SHARED.items():
        config = stae.argparse.Namespace(**stae.DEFAULTS | dict(
            batch_size=12, channels=3, size=16, width=4, latent_channels=4, transform="crop", views=2, judge_layers=0.3,
            lr=1e-3, device="cpu", precision="fp32") | flags)
        torch.manual_seed(0)
        model = stae.make_model(config)
        engine = stae.start(model, config)
        feed = stae.batches(images, 12, 0, 0, 20, part=stae.own_part(12))
        loss, _ = engine[1](next(feed)[1], *stae.draw_step(0, torch.device("cpu"), config))
        loss.backward()
        results[name] = {"loss": stae.average(loss.detach()), "gradients": gradients(model)}
        for step, x in feed if not plainly else ():
            stae.train_step(*engine, x, step)
        results[name]["weights"] = {key: value.clone() for key, value in model.state_dict().items()}
        results[name]["images"] = model.eval()(stae.as_float(images)).detach()
    if rank == 0:
        torch.save(results, folder / f"{world}-{plainly}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


SHARED = {judge: dict(judge=judge) for judge in stae.JUDGES} | {
    "masked": dict(masked=True), "masked-live": dict(masked=True, judge="live", transform="pixel"),
    "global": dict(latent_dim=5), "mse": dict(objective="mse"), "masked-mse": dict(masked=True, objective="mse")}


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """What one process says, what two say with half a batch each, and two whose averages pass no gradient on."""
    folder = tmp_path_factory.mktemp("processes")
    share_a_run(0, 1, folder)
    torch.multiprocessing.spawn(share_runs, (folder,), nprocs=2)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return [torch.load(folder / f"{name}.pt") for name in ("1-False", "2-False", "2-True")]


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_match_one(shared_runs, name):
    one, two, plain = (runs[name] for runs in shared_runs)
    torch.testing.assert_close(two["loss"], one["loss"], atol=0, rtol=1e-5)
    assert two["gradients"].keys() == one["gradients"].keys()
    off = {key: (two["gradients"][key] - value).abs().max().item() for key, value in one["gradients"].items()}
    assert max(off.values()) < 1e-5
    wrong = max((plain["gradients"][key] - value).abs().max().item() for key, value in one["gradients"].items())
    assert wrong > 1e-4, "an average that passes no gradient on must not do"
    torch.testing.assert_close(two["images"], one["images"], atol=1e-3, rtol=0)
    for key, value in one["weights"].items():
        if name != "global":  # the bias before its norm does nothing, so Adam moves it by what rounding leaves
            torch.testing.assert_close(two["weights"][key], value, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------ 8. command line


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with tiny.npz in it."""
    monkeypatch.chdir(tmp_path)
    write_npz("tiny.npz")
    return tmp_path


TINY = "--dataset tiny.npz --width 4 --latent-channels 4 --epochs 1 --batch-size 8 --device cpu --precision fp32"


def run(line):
    return stae.main(shlex.split(line))


def same(one, other):
    """Equal tables, but for rounding; what has no value is None in both."""
    return one.keys() == other.keys() and all(
        one[name] == (other[name] if other[name] is None else pytest.approx(other[name], rel=1e-5)) for name in one)


def torchrun(line, count=2):
    """The real command line in several processes -> exit code, stdout, stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", stae.__file__]
    done = subprocess.run([*command, *shlex.split(line)], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_torchrun_writes_the_run_of_one_process(here):
    code, out, error = torchrun(f"{TINY} --judge ema --out two")
    assert code == 0, error
    assert run(f"{TINY} --judge ema --out one") == 0
    assert sorted(p.name for p in (here / "two").iterdir()) == sorted(p.name for p in (here / "one").iterdir())
    assert out.count("measuring on") == out.count("written to") == 1 and sorted(os.listdir()) == ["one", "tiny.npz", "two"]
    one, two = (torch.load(here / name / "checkpoint.pt") for name in ("one", "two"))
    assert one["config"] == two["config"]
    for one, two in ((one["model"], two["model"]), (one["state"]["judge"], two["state"]["judge"])):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-3, rtol=0)
    rows = [np.loadtxt(here / name / "log.csv", delimiter=",", skiprows=1)[:, :4] for name in ("one", "two")]
    np.testing.assert_allclose(*rows, rtol=1e-3)


@pytest.mark.parametrize("line, says", [(f"{TINY} --batch-size 7", "shared by 2 processes"), ("--dataset nope", "--dataset nope")])
def test_torchrun_tells_bad_input_once(here, line, says):
    code, _, error = torchrun(line)
    assert code and error.count("stae.py: error") == 1 and says in error and "stae.py\", line" not in error


@pytest.mark.parametrize("judge", stae.JUDGES)
@pytest.mark.parametrize("transform", stae.TRANSFORMS)
def test_command_line_for_every_transform_and_judge(here, capsys, transform, judge):
    assert run(f"{TINY} --transform {transform} --judge {judge} --judge-layers 0.3") == 0
    folder = here / "runs" / f"tiny-stae-{transform}-{judge}-s0"
    assert sorted(p.name for p in folder.iterdir()) == sorted(stae.RUN_FILES)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == set(
        "psnr psnr_luma psnr_chroma mse ssim sharpness sigreg min_std pca_psnr code_size parameters train_seconds"
        " images_per_second seed".split() + CONTROLS + PROBES
    )
    assert metrics["code_size"] == 16 and math.isfinite(metrics["psnr"])
    rows = (folder / "log.csv").read_text().splitlines()
    assert rows[0] == "step,loss,distance,layers,sigreg,gradient_norm,min_std,lr,seconds,images_per_second"
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]
    loss, distance, layers, sigreg = map(float, rows[1].split(",")[1:5])
    assert loss == pytest.approx(distance + 0.3 * layers + 0.03 * sigreg, rel=1e-5)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (checkpoint["state"]["judge"] is not None) == (judge in ("ema", "random"))
    out = capsys.readouterr().out
    assert out.index(f"transform={transform}") < out.index("step 1/3") < out.index("psnr_luma")
    picture = pil_to_tensor(default_loader(folder / "reconstructions.png"))
    assert picture.shape == (3, 2 * 66 + 2, 10 * 66 + 2) and picture.float().std() > 1


@pytest.mark.parametrize("flags", ["--judge frozen --judge-layers 0.3 --latent-dim 6", "--judge live", "--objective mse --latent-dim 6"])
def test_masked_run(here, capsys, flags):
    assert run(f"{TINY.replace('--latent-channels 4', '')} --masked {flags} --hole 0.2 --out run") == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics.keys() == {name for name in stae.EXPLAIN if "recognition" not in name}
    assert {name for name in metrics if metrics[name] is None} == {"few10", "few100", "few10_random_code", "few100_random_code"}
    assert metrics["code_size"] == (6 if "latent" in flags else 8 * 4)
    columns, first = (row.split(",") for row in Path("run/log.csv").read_text().splitlines()[:2])
    row = dict(zip(columns, map(float, first)))
    if "mse" in flags:
        assert row["loss"] == row["mse"] and "agreement" not in row
    else:
        distances = row["agreement"] + row["distance_clean"] + row["distance_masked"]
        layers = row.get("layers_clean", 0) + row.get("layers_masked", 0)
        gaussian = (row["sigreg_clean"] + row["sigreg_masked"]) / 2
        weight = 0.3 if "0.3" in flags else 10.0
        assert row["loss"] == pytest.approx((distances + weight * layers) / 3 + 0.03 * gaussian, rel=1e-5)
    picture = pil_to_tensor(default_loader("run/reconstructions.png"))  # originals, holes, from holes, from originals
    assert picture.shape == (3, 4 * 66 + 2, 10 * 66 + 2)
    assert run("--eval run") == 0 and run("--eval run --hole 0.6 --out other") == 0
    assert metrics["hole"] == 0.2
    again, other = (json.loads(Path(name).read_text()) for name in ("run/eval-tiny.json", "other/eval-tiny.json"))
    assert same(again, metrics)
    assert other["psnr"] == pytest.approx(metrics["psnr"]) and other["hole_psnr"] != metrics["hole_psnr"]


def test_masked_runs_of_stae_and_mse_see_the_same_holes(here, monkeypatch):
    seen, cut = [], stae.cut_holes
    monkeypatch.setattr(stae, "cut_holes", lambda images, holes: seen.append(holes.tolist()) or cut(images, holes))
    for flags in ("", "--objective mse"):
        assert run(f"{TINY} --masked {flags}") == 0
    assert len(seen) % 2 == 0 and seen[: len(seen) // 2] == seen[len(seen) // 2 :] and seen[0] != seen[1]
    assert {p.name for p in Path("runs").iterdir()} == {"tiny-masked-stae-crop-frozen-s0", "tiny-masked-mse-crop-frozen-s0"}
    assert run(f"{TINY} --objective mse --out whole") == 0
    masked, whole = (stae.load_model(name).state_dict() for name in ("runs/tiny-masked-mse-crop-frozen-s0", "whole"))
    assert not torch.equal(masked["encoder.stem.weight"], whole["encoder.stem.weight"])


def test_masked_celeba_has_a_global_code_unless_told_otherwise(here, capsys, monkeypatch):
    def stop(*args):
        raise FloatingPointError("seen enough")

    monkeypatch.setattr(stae, "train", stop)
    write_faces(here / "data")
    for flags, code in (("--masked", 128), ("--masked --latent-dim 512", 512), ("--masked --latent-channels 32", None), ("", None)):
        assert run(f"--dataset celeba --size 16 --width 16 --batch-size 2 {flags}") == 1
        assert f"  latent_dim={code}  " in capsys.readouterr().out.splitlines()[0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("flags", ["--judge live --judge-layers 1", "--masked --judge ema", "--objective mse"])
def test_compiled_steps_agree_with_plain_ones(here, flags):
    for out in ("plain", "compiled --compile"):
        assert run(f"{TINY} --epochs 4 --no-probe --out {out} {flags}") == 0
    rows = [np.loadtxt(here / name / "log.csv", delimiter=",", skiprows=1)[:, :-3] for name in ("plain", "compiled")]
    np.testing.assert_allclose(*rows, rtol=1e-3)


def test_every_step_has_draws_of_its_own(here, monkeypatch):
    seen, draw = [], stae.draw_views

    def record(transform, shape, draws, *rest):
        seen.append((draws.initial_seed(), draws.device.type))
        return draw(transform, shape, draws, *rest)

    monkeypatch.setattr(stae, "draw_views", record)
    for seed in (0, 1):
        assert run(f"{TINY} --epochs 2 --seed {seed}") == 0
    steps = seen[:6] + seen[7:13]  # the seventh of a run is the picture of T
    assert len(seen) == 14 and len(set(steps)) == 12


@pytest.mark.parametrize("flags", ["--transform crop --crop 0.3 1", "--transform crop --views 2", "--transform pixel --mask-ratio 0.2",
                                   "--lr 0.0001", "--judge-layers 2", "--sigreg-weight 0.5", "--slices 8", "--precision bf16"])
def test_flags_reach_training(here, flags):
    base = "--transform pixel" if "pixel" in flags else "--transform crop"
    assert run(f"{TINY} {base} --out base") == 0 and run(f"{TINY} {flags} --out other") == 0
    base, other = (stae.load_model(name).state_dict() for name in ("base", "other"))
    assert not torch.equal(base["encoder.stem.weight"], other["encoder.stem.weight"])


@pytest.mark.parametrize("dataset, side, row", [("x.npz", 64, "cifar10"), ("x.npz", 72, "celeba"), ("faces", 64, "cifar10")])
def test_a_path_takes_the_row_of_its_size(here, capsys, monkeypatch, dataset, side, row):
    def stop(*args):
        raise FloatingPointError("seen enough")

    monkeypatch.setattr(stae, "train", stop)
    write_npz("x.npz", size=side)
    Path("faces").mkdir()
    for i in range(10):
        save_image(torch.rand(3, side, side), f"faces/{i}.png")
    assert run(f"--dataset {dataset} --batch-size 8") == 1
    said = capsys.readouterr().out.splitlines()[0].split("  ")
    assert {f"{key}={value}" for key, value in stae.PRESETS[row].items()} <= set(said)


def test_progress_on_a_terminal_rewrites_one_line(here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    assert run(f"{TINY} --epochs 10") == 0
    shown = re.findall(r"\r\033\[K([^\r\n]*)", capsys.readouterr().out)
    assert len(shown) == 30 and max(map(len, shown)) == 39 and shown[-1].startswith("step 30/30")


def test_mse_ignores_judge_and_transform(here):
    for flags in ("--judge frozen --transform crop", "--judge ema --transform pixel"):
        assert run(f"{TINY} --objective mse {flags}") == 0
    one, other = (stae.load_model(f"runs/tiny-mse-{name}-s0/checkpoint.pt") for name in ("crop-frozen", "pixel-ema"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert torch.load("runs/tiny-mse-pixel-ema-s0/checkpoint.pt", weights_only=True)["state"]["judge"] is None


def test_same_seed_same_weights_other_seed_other_weights(here):
    for flags in ("", "", "--seed 1"):
        assert run(f"{TINY} {flags}") == 0
    weights = [stae.load_model(f"runs/tiny-stae-crop-frozen-{end}/checkpoint.pt").state_dict() for end in ("s0", "s0-2", "s1")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["encoder.stem.weight"], weights[2]["encoder.stem.weight"])


def test_ema_judge_is_an_average_and_random_judge_stays(here):
    for judge in ("ema", "random"):
        assert run(f"{TINY} --judge {judge} --out {judge}") == 0
    torch.manual_seed(0)
    initial = dict(stae.Autoencoder(3, 4, 4).encoder.named_parameters())
    kept = torch.load("random/checkpoint.pt", weights_only=True)["state"]["judge"]
    assert all(torch.equal(kept[name], weight) for name, weight in initial.items())
    saved = torch.load("ema/checkpoint.pt", weights_only=True)
    moved, end = saved["state"]["judge"]["stem.weight"] - initial["stem.weight"], saved["model"]["encoder.stem.weight"] - initial["stem.weight"]
    assert 0 < moved.abs().max() < 0.01 * end.abs().max()  # three steps of a thousandth


def test_grey_images_and_eval(here, capsys):
    write_npz("grey.npz", channels=1)
    assert run(f"{TINY} --dataset grey.npz --transform pixel --out grey") == 0
    before = {p: p.read_bytes() for p in Path("grey").iterdir()}
    first = json.loads(Path("grey/metrics.json").read_text())
    assert first["psnr_chroma"] is None
    assert run("--eval grey/checkpoint.pt") == 0 and run("--eval grey") == 0
    assert run("--eval grey/checkpoint.pt --out elsewhere") == 0 and run("--eval grey --validation 5") == 2
    assert "was trained on those images" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before  # the run's own files are as they were
    added = {p.name for p in Path("grey").iterdir()} - {p.name for p in before}
    assert added == {"eval-grey.json", "eval-grey.png", "eval-grey-2.json", "eval-grey-2.png"}
    again = json.loads(Path("grey/eval-grey.json").read_text())
    assert again["psnr_chroma"] is None and same(again, first)
    assert Path("elsewhere/eval-grey.png").exists()
    write_npz("other.npz", channels=1, size=32)
    assert run("--eval grey/checkpoint.pt --dataset other.npz") == 0 and Path("grey/eval-other.json").exists()
    assert run("--eval grey/checkpoint.pt --dataset tiny.npz") == 2
    assert "3 channels" in capsys.readouterr().err
    assert run("--compare grey --dataset tiny.npz") == 2
    assert "3 channels" in capsys.readouterr().err


def test_eval_overwrites_no_picture_and_knows_older_checkpoints(here):
    assert run(f"{TINY} --out run") == 0
    Path("run/eval-tiny.png").write_text("mine")
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    for newer in ("masked", "hole", "latent_dim"):
        del checkpoint["config"][newer]
    torch.save(checkpoint, "run/checkpoint.pt")
    assert run("--eval run") == 0
    assert Path("run/eval-tiny.png").read_text() == "mine" and Path("run/eval-tiny-2.png").exists()
    before = sorted(os.listdir("run"))
    assert run("--eval run --overwrite") == 0
    assert Path("run/eval-tiny.png").read_bytes() == Path("run/eval-tiny-2.png").read_bytes() and sorted(os.listdir("run")) == before


def test_a_global_code_larger_than_the_image_is_refused(here, capsys):
    assert run(f"{TINY.replace('--latent-channels 4', '')} --latent-dim 769") == 2
    assert "pass 768 or less" in capsys.readouterr().err and not Path("runs").exists()


def test_eval_on_other_data_forgets_the_validation_slice(here):
    assert run(f"{TINY} --validation 8 --batch-size 16 --out run") == 0
    x, _ = write_npz("small.npz", train=4, test=6)
    assert run("--eval run --dataset small.npz") == 0


def test_load_model_for_those_who_import_the_file(here):
    assert run(f"{TINY} --out run") == 0
    model = stae.load_model("run/checkpoint.pt")
    assert not model.training
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(x), model.decode(model.encode(x)))


def test_compare(here, capsys):
    assert run(f"{TINY} --out a") == 0 and run(f"{TINY} --objective mse --out b") == 0
    assert run("--compare a b") == 0 and run("--compare b a --out figures") == 0 and run("--compare b a") == 0
    picture = pil_to_tensor(default_loader("comparison.png"))
    assert picture.shape == (3, 3 * 66 + 2, 10 * 66 + 2)
    assert {p.name for p in here.glob("comparison*")} == {"comparison.png", "comparison-2.png"}
    write_npz("other.npz", size=24)
    assert run(f"{TINY} --dataset other.npz --out c") == 0 and run("--compare a c") == 2
    assert "tiny.npz" in capsys.readouterr().err


def test_compare_with_holes(here, capsys):
    """Originals, holes, then each run from holes and from originals; an ordinary run beside a masked one is shown both."""
    flags = {"a": "--masked --latent-dim 6", "b": "--masked --latent-dim 6 --objective mse", "c": "--objective mse --latent-channels 4"}
    for name, flag in flags.items():
        assert run(f"{TINY.replace('--latent-channels 4', '')} {flag} --out {name}") == 0
    assert run("--compare a b --out two") == 0 and run("--compare c a --out mixed") == 0
    assert "originals with holes, c from holes, c from originals, a from holes" in capsys.readouterr().out
    for name in ("two", "mixed"):
        assert pil_to_tensor(default_loader(f"{name}/comparison.png")).shape == (3, 6 * 66 + 2, 10 * 66 + 2)
    assert run("--compare c --hole 0.1 --out hole") == 0  # an ordinary run is shown holes when they are asked for
    assert pil_to_tensor(default_loader("hole/comparison.png")).shape == (3, 4 * 66 + 2, 10 * 66 + 2)
    assert run("--eval c --hole 0.1 --out hole") == 0 and "hole_psnr" in json.loads(Path("hole/eval-tiny.json").read_text())
    assert run("--eval c --out whole") == 0 and "hole_psnr" not in json.loads(Path("whole/eval-tiny.json").read_text())
    x = torch.from_numpy(np.load("tiny.npz")["x_test"]).permute(0, 3, 1, 2)
    rows = stae.pictures([stae.load_model("a"), stae.load_model("b")], x, 0.35)
    holed = stae.cut_holes(x / 255, stae.fixed_holes(x, 0.35))
    with torch.no_grad():
        expected = [x / 255, holed] + [model(y) for model in map(stae.load_model, "ab") for y in (holed, x / 255)]
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, other)


def test_labels_at_the_end_of_a_run(here, capsys):
    assert run(f"{TINY} --out run") == 0 and run(f"{TINY} --no-probe --out bare") == 0
    said, full = capsys.readouterr().out, json.loads(Path("run/metrics.json").read_text())
    bare = json.loads(Path("bare/metrics.json").read_text())
    assert set(PROBES) < full.keys() and bare.keys().isdisjoint(PROBES + CONTROLS) and said.count("probe_code ") == 1
    assert full["few100"] is None and "recognition" not in full and set(PROBES) < set(stae.EXPLAIN)
    assert run("--eval run") == 0 and run("--eval run --no-probe --out bare") == 0
    again = json.loads(Path("run/eval-tiny.json").read_text())
    assert same(again, full)
    assert json.loads(Path("bare/eval-tiny.json").read_text()).keys().isdisjoint(PROBES)
    write_npz("unlabelled.npz", y_train=None, y_test=None)
    capsys.readouterr()
    assert run(f"{TINY} --dataset unlabelled.npz --out other") == 0
    said, other = capsys.readouterr().out, json.loads(Path("other/metrics.json").read_text())
    assert "skipped" in said and "rankme" in other and "probe_code" not in other and "psnr" in other


def test_odd_labels_are_numbered(here):
    """Labels that do not count from 0, are negative, or have a class in one split alone."""
    odd = np.array([-7, 10**12, 3] * 8)
    write_npz("odd.npz", y_train=odd, y_test=np.array([3, 10**12] * 4 + [3, 99]))
    (_, train), (_, test) = stae.load_data("odd.npz")
    assert train.tolist() == [0, 3, 1] * 8 and test.tolist() == [1, 3] * 4 + [1, 2]
    assert run(f"{TINY} --dataset odd.npz --out run") == 0
    write_npz("same.npz", y_train=np.zeros(24, int), y_test=np.zeros(10, int))
    assert run(f"{TINY} --dataset same.npz --out same") == 0  # of one class there is nothing to tell apart
    assert "probe_code" not in json.loads(Path("same/metrics.json").read_text())
    assert run(f"{TINY} --dataset same.npz --recognition --out other") == 2 and not Path("other").exists()


def test_recognition_keeps_its_classifier(here, capsys, monkeypatch):
    made, trained = stae.train_classifier, []
    monkeypatch.setattr(stae, "train_classifier", lambda *args: trained.append(args) or made(*args, steps=3))
    keys = {"recognition", "recognition_original", "recognition_pca"}
    assert run(f"{TINY} --recognition --out run") == 0
    first = json.loads(Path("run/metrics.json").read_text())
    kept = list(here.glob("tiny.npz.stae-classifier-*.pt"))
    assert keys < first.keys() and len(kept) == len(trained) == 1 and str(kept[0]) in capsys.readouterr().out
    assert run("--eval run --recognition --no-probe --out again") == 0 and len(trained) == 1  # reused
    again = json.loads(Path("again/eval-tiny.json").read_text())
    assert {name: again[name] for name in keys} == {name: first[name] for name in keys}
    assert run(f"{TINY} --recognition --validation 8 --out other") == 0 and len(trained) == 2  # other images, another one
    assert len(trained[1][1]) == 16 and len(list(here.glob("*classifier*"))) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:1000])
    assert run("--eval run --recognition --no-probe --out third") == 0 and len(trained) == 3  # damaged: made anew
    assert run("--eval run --recognition --no-probe --out fourth") == 0 and len(trained) == 3
    kept[0].unlink()
    monkeypatch.setattr(stae, "save_whole", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    assert run("--eval run --recognition --no-probe --out fifth") == 0
    assert "not kept (disk full)" in capsys.readouterr().err and json.loads(Path("fifth/eval-tiny.json").read_text())["recognition"] is not None


@pytest.mark.parametrize("flags", ["", "--latent-dim 6"])
def test_pictures_command(here, capsys, flags):
    write_npz("grey.npz", channels=1)
    line = f"{TINY} --dataset grey.npz --out run {flags}"
    assert run(line.replace("--latent-channels 4", "") if flags else line) == 0
    before = set(Path("run").iterdir())
    assert run("--pictures run") == 0 and run("--pictures run/checkpoint.pt") == 0 and run("--pictures run --out figures") == 0
    assert run("--pictures run --out figures --overwrite") == 0
    said, names = capsys.readouterr().out, {"walk", "interpolation", "samples", "neighbours"} | ({"brush"} if not flags else set())
    assert {p.name for p in set(Path("run").iterdir()) - before} == {f"{name}{end}.png" for name in names for end in ("", "-2")}
    assert {p.stem for p in Path("figures").iterdir()} == names and ("skipped" in said) == bool(flags)
    for name, (rows, columns) in dict(walk=(8 if not flags else 6, 9), interpolation=(8, 9), samples=(4, 16), neighbours=(7, 8)).items():
        picture = pil_to_tensor(default_loader(f"figures/{name}.png")).float()
        assert picture.shape == (3, rows * 66 + 2, columns * 66 + 2) and picture[:, 2:66, 2:66].std() + picture[:, 2:66, -66:-2].std() > 0
    assert run("--pictures .") == 2 and "a run is run" in capsys.readouterr().err  # a folder of runs
    Path("grey.npz").rename("moved.npz")
    assert run("--pictures run") == 2 and "trained on grey.npz, which is not there" in capsys.readouterr().err
    assert run("--pictures run --dataset moved.npz --out third") == 0
    Path("moved.npz").rename("grey.npz")
    assert run("--pictures run --width 8") == 2 and "trained with 4" in capsys.readouterr().err
    write_npz("one.npz", channels=1, test=1)
    assert run("--pictures run --dataset one.npz") == 2 and "one image" in capsys.readouterr().err
    assert run("--pictures run --recognition") == 2 and "--recognition belongs" in capsys.readouterr().err
    assert run("--benchmark --no-probe") == 2 and "--no-probe belongs" in capsys.readouterr().err
    assert run("--compare run --no-probe") == 2 and "--no-probe belongs" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["", "--masked --judge ema", "--dataset cifar10 --objective mse --views 2"])
def test_benchmark(here, capsys, flags):
    before = set(here.iterdir())
    assert run(f"--benchmark --width 4 --latent-channels 4 --batch-size 4 --device cpu --size 16 {flags}") == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert told.keys() == set("device stae_ms mse_ms ratio flop_ratio stae_images_per_second peak_memory_mb".split())
    assert told["ratio"] == pytest.approx(told["stae_ms"] / told["mse_ms"]) and told["peak_memory_mb"] > 10
    assert told["stae_images_per_second"] == pytest.approx(4000 / told["stae_ms"])
    assert 1.1 < told["flop_ratio"] < 4 and "4x" not in lines[0] and "batch 4" in lines[0] and set(here.iterdir()) == before


def test_the_table_is_readable(tmp_path, capsys):
    stae.report({"psnr": 21.7049, "psnr_chroma": math.inf, "parameters": 135_027, "train_seconds": 12_345.6}, tmp_path / "m.json")
    said = [line.split("  ")[0:1] + line.split()[1:2] for line in capsys.readouterr().out.splitlines()[:4]]
    assert said == [["psnr", "21.7"], ["psnr_chroma", "-"], ["parameters", "135,027"], ["train_seconds", "12,346"]]
    kept = json.loads((tmp_path / "m.json").read_text())
    assert kept == {"psnr": 21.7049, "psnr_chroma": None, "parameters": 135_027, "train_seconds": 12_345.6}


def test_overwrite(here, capsys):
    assert run(f"{TINY} --out run") == 0
    Path("run/mine.txt").write_text("keep")
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    assert run(f"{TINY} --out run") == 2
    assert "--overwrite" in capsys.readouterr().err and {p: p.read_bytes() for p in Path("run").iterdir()} == before
    assert run(f"{TINY} --out run --overwrite --seed 1") == 0
    assert Path("run/mine.txt").read_text() == "keep" and json.loads(Path("run/metrics.json").read_text())["seed"] == 1


def test_a_folder_that_cannot_be_written_stops_a_run_but_not_an_eval(here, capsys, monkeypatch):
    assert run(f"{TINY} --out run") == 0
    monkeypatch.setattr(stae.os, "access", lambda *args: False)
    assert run(TINY) == 2 and "can be written" in capsys.readouterr().err
    assert run("--eval run") == 0  # writes beside the checkpoint, whatever the current folder


def test_folder_of_images_end_to_end(here, capsys):
    for name in "ab":
        (here / "photos" / name).mkdir(parents=True)
        for i in range(8):
            save_image(torch.rand(3, 20, 30, generator=generator(i)), here / "photos" / name / f"{i}.png")
    (here / "shapes").mkdir()
    assert run(f"{TINY} --dataset photos --size 16 --out run") == 0 and run("--eval run --dataset .") == 0
    assert run(f"{TINY} --dataset shapes --transform none --width 1 --latent-channels 1 --batch-size 1000 --out shapes/run") == 0
    assert run("--eval run --out photos/x") == 2 and run("--pictures run --out photos/x") == 2 and not Path("photos/x").exists()
    assert "among the images" in capsys.readouterr().err
    assert run(f"{TINY} --dataset photos --out run2") == 2
    assert "20 pixels" in capsys.readouterr().err and not Path("run2").exists()


def test_out_of_memory_is_one_line_and_a_bug_keeps_its_traceback(here, capsys, monkeypatch):
    for message, outcome in (("DefaultCPUAllocator: not enough memory", 1), ("a bug", RuntimeError)):
        def fail(*args):
            raise RuntimeError(message)

        monkeypatch.setattr(stae, "train", fail)
        if outcome == 1:
            assert run(TINY) == 1 and message in capsys.readouterr().err
        else:
            with pytest.raises(outcome):
                run(TINY)


def test_a_loss_that_is_not_finite_stops_the_run(here, capsys, monkeypatch):
    monkeypatch.setattr(stae, "mse_loss", lambda model, x, holed: (model(x).sum() * math.nan, {"mse": torch.tensor(math.nan)}))
    assert run(f"{TINY} --objective mse --out run") == 1
    said = capsys.readouterr().err
    assert "step 1" in said and "--lr" in said and not Path("run/checkpoint.pt").exists()


BAD = {
    "--dataset nowhere": "nowhere",
    "--dataset empty": "no image below it",
    "--dataset celeba": "img_align_celeba.zip",
    "--dataset celeba --data faceless": "img_align_celeba.zip",
    "--masked --hole 0": "'0' is not a number in (0, 1)",
    "--masked --hole 1": "'1'",
    "--masked --hole -0.1": "-0.1",
    "--hole 0.5": "add --masked",
    "--latent-dim 0": "'0'",
    "--latent-dim 8": "--latent-dim and --latent-channels",
    "--latent-dim 2.5": "'2.5'",
    "--dataset broken": "no readable image",
    "--dataset notes.txt": "notes.txt",
    "--dataset float.npz": "float32",
    "--dataset labels.npz": "y_train",
    "--dataset keys.npz": "['images']",
    "--dataset broken.npz": "not a readable .npz",
    "--dataset pickled.npz": "not a readable .npz",
    "--dataset odd.npz": "pass --size 16",
    "--dataset sizes": "--size",
    "--dataset sizes --out sizes/run": "among the images",
    "--dataset . --size 16": "--out runs is among the images",
    "--dataset single": "0 training images are too few",
    "--dataset single --validation 1": "too few",
    "--data tiny.npz": "is not a folder",
    "--dataset cifar10 --data offline": "cannot be downloaded",
    "--transform wavelet": "'wavelet'",
    "--judge nobody": "'nobody'",
    "--objective gan": "'gan'",
    "--size 30": "divisible by 8",
    "--size 32.0": "an integer",
    "--size 8": "from 16",
    "--crop 0.5 0.2": "MIN is above MAX",
    "--crop 0 1": "'0'",
    "--crop 0.5 1.5": "'1.5'",
    "--crop 0.5": "expected 2",
    "--mask-ratio 0": "'0'",
    "--objective mse --mask-ratio 2": "'2'",
    "--objective mse --transform wavelet": "'wavelet'",
    "--views 0": "'0'",
    "--judge-layers -1": "-1",
    "--sigreg-weight nan": "'nan'",
    "--sigreg-weight inf": "'inf'",
    "--slices 0": "'0'",
    "--width 0": "'0'",
    "--width many": "'many'",
    "--latent-channels 3": "must divide 8 * --width = 32",
    "--width 32 --latent-channels 256": "larger than the image",
    "--epochs 0": "'0'",
    "--epochs 1.5": "'1.5'",
    "--batch-size 1": "from 2",
    "--batch-size 25": "pass 24 or less",
    "--lr 0": "'0'",
    "--seed -1": "-1",
    "--validation 24": "24 training images are too few",
    "--device tpu": "tpu",
    "--device cuda:999": "this machine has",
    "--device cuda:01": "this machine has",
    "--device cpu:1": "cpu:1",
    "--width 4000000000": "4000000000",
    f"--epochs {'9' * 400}": "999",
    "--precision fp8": "'fp8'",
    "--out tiny.npz": "is not a folder",
    "--out tiny.npz/below": "is not a folder",
    "--out ''": "is not a name or a path",
    "--dataset ''": "is not a name or a path",
    "--eval nowhere.pt": "no such file",
    "--eval foreign.pt --compare foreign.pt": "not allowed with",
    "--eval foreign.pt --device tpu": "tpu",
    "--eval half.pt": "not a checkpoint",
    "--eval evil.pt": "not a checkpoint",
    "--eval notes.txt": "not a checkpoint",
    "--eval foreign.pt": "not a checkpoint",
    "--eval other.pt": "not a checkpoint",
    "--compare nowhere": "nowhere",
    "--benchmark --dataset tiny.npz": "random pixels",
    "--benchmark --dataset shapes --latent-channels 3": "must divide",
    "--benchmark --eval foreign.pt": "not allowed with",
    "--pictures nowhere": "nowhere: no such file",
    "--pictures foreign.pt --eval foreign.pt": "not allowed with",
    "--recognition --dataset unlabelled.npz": "no labels",
    "--epoch 3": "--epoch",
    "--save-every 0": "'0' is not a number above 0",
    "--save-every nan": "'nan'",
    "--eval foreign.pt --save-every 1": "--save-every belongs",
    "--resume nowhere": "no such file",
    "--resume half.pt --out new": "goes on in that folder",
    "--resume evil.pt": "not a checkpoint",
    "crop": "crop",
}


class Evil:
    """Makes a folder when it is unpickled: the trace that the test looks for."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_line_and_leaves_no_trace(here, capsys, monkeypatch, flags):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(stae, "CelebA", offline)
    Path("empty").mkdir(), Path("broken").mkdir(), Path("sizes").mkdir(), Path("single").mkdir()
    save_image(torch.rand(3, 16, 16), "single/only.png")
    Path("faceless/celeba/img_align_celeba").mkdir(parents=True)
    Path("empty/readme.txt").write_text("no image"), Path("broken/a.png").write_text("no image"), Path("notes.txt").write_text("?")
    for side in (16, 24):
        save_image(torch.rand(3, side, side), f"sizes/{side}.png")
    x, _ = write_npz("good.npz", train=24)
    np.savez("float.npz", x=x.astype(np.float32)), np.savez("keys.npz", images=x), np.savez("odd.npz", x=x.repeat(2, 1).repeat(2, 2)[:, :20, :20])
    np.savez("labels.npz", x_train=x, y_train=np.arange(3)), Path("broken.npz").write_bytes(Path("good.npz").read_bytes()[:500])
    np.savez("pickled.npz", x=np.array([{"a": 1}], dtype=object))
    np.savez("unlabelled.npz", x=x), torch.save({"weights": torch.ones(3)}, "foreign.pt")
    other = stae.Autoencoder(3, 8, 4).state_dict()
    sizes = {"channels": 3, "width": 4, "latent_channels": 4}
    torch.save({"config": sizes, "model": other, "results": {}}, "other.pt")
    torch.save({"config": sizes, "model": tiny_model().state_dict(), "results": {}}, "half.pt")
    torch.save({"config": sizes, "model": tiny_model().state_dict(), "results": Evil()}, "evil.pt")
    before = {p: p.is_file() and p.read_bytes() for p in here.rglob("*") if "offline" not in p.name}
    line = flags if flags.startswith(("--eval", "--compare", "--pictures", "--resume")) else f"{TINY} {flags}"
    assert run(line) == 2
    said = capsys.readouterr().err.splitlines()
    assert len([s for s in said if s.startswith("stae.py: error:")]) == 1 and said[-1].startswith("stae.py: error:")
    assert BAD[flags] in said[-1] and "Traceback" not in "".join(said)
    assert {p: p.is_file() and p.read_bytes() for p in here.rglob("*") if "offline" not in p.name} == before


def test_eval_refuses_flags_that_contradict_the_checkpoint(here, capsys):
    assert run(f"{TINY} --out run") == 0
    assert run("--eval run/checkpoint.pt --width 8") == 2
    assert "--width 8: run/checkpoint.pt was trained with 4" in capsys.readouterr().err
    assert run("--compare run --width 8") == 2 and "--width 8" in capsys.readouterr().err
    assert run("--eval run/checkpoint.pt --width 4") == 0


def test_default_command_as_a_stranger_types_it(tmp_path):
    """The real thing in its own process, cut to one epoch: shapes, pixel masks, frozen judge."""
    done = subprocess.run([sys.executable, HERE / "stae.py", "--epochs", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "shapes-stae-pixel-frozen-s0"
    assert {p.name for p in folder.iterdir()} == set(stae.RUN_FILES)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 16 < metrics["psnr"] < metrics["pca_psnr"] and metrics["min_std"] > 0.5
    assert done.stdout.count("step ") < 15 and "\r" not in done.stdout


@pytest.mark.slow
def test_default_command_beats_its_pca_floor(tmp_path):
    done = subprocess.run([sys.executable, HERE / "stae.py"], cwd=tmp_path, capture_output=True, text=True)
    metrics = json.loads((tmp_path / "runs" / "shapes-stae-pixel-frozen-s0" / "metrics.json").read_text())
    assert done.returncode == 0 and metrics["psnr"] > metrics["pca_psnr"]


# ------------------------------------------------------------------------------------------------ faults


@pytest.fixture(autouse=True)
def heard_signals():
    """Signals that nohup, or a background job, may have had this process ignore."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt_at(monkeypatch, step, number=signal.SIGTERM):
    """A signal that comes in the middle of that step, once."""
    train_step = stae.train_step

    def interrupted(*args):
        if args[-1] == step:
            monkeypatch.setattr(stae, "train_step", train_step)
            os.kill(os.getpid(), number)
        return train_step(*args)

    monkeypatch.setattr(stae, "train_step", interrupted)


def log_without_times(run_folder):
    rows = [row.split(",") for row in (Path(run_folder) / "log.csv").read_text().splitlines()]
    assert rows[0][-2:] == ["seconds", "images_per_second"]
    return [row[:-2] for row in rows]


def state_of(run_folder):
    """All tensors of a checkpoint, by name."""
    found = {}

    def walk(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            walk(f"{name}.{key}", part)

    walk("", torch.load(Path(run_folder) / "checkpoint.pt", weights_only=True))
    return found


def equal_runs(one, two):
    one_state, two_state = state_of(one), state_of(two)
    return one_state.keys() == two_state.keys() and all(torch.equal(two_state[name], v) for name, v in one_state.items()) and (
        log_without_times(one) == log_without_times(two))


@pytest.mark.parametrize("flags", ["", "--judge ema --precision bf16", "--judge random --views 2", "--judge live --judge-layers 1",
                                   "--masked --transform pixel", "--objective mse"])
@pytest.mark.parametrize("step, number", [(31, signal.SIGTERM), (2, signal.SIGINT), (3, signal.SIGHUP)])
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(here, monkeypatch, capsys, flags, step, number):
    line = f"{TINY} --epochs 20 --no-probe {flags}"
    assert run(f"{line} --out whole") == 0
    interrupt_at(monkeypatch, step, number)
    assert run(f"{line} --out cut") == 128 + number
    said = capsys.readouterr().err
    assert "interrupted" in said and "--resume cut" in said and not Path("cut/metrics.json").exists()
    assert torch.load("cut/checkpoint.pt", weights_only=True)["state"]["step"] == step + 1
    with open("cut/log.csv", "a") as log:
        log.write("33,1,1,1\n5")  # what a killed run may have written after its checkpoint
    assert run("--resume cut --no-probe") == 0
    assert equal_runs("whole", "cut") and sorted(os.listdir("whole")) == sorted(os.listdir("cut"))
    tables = [json.loads(Path(name, "metrics.json").read_text()) for name in ("whole", "cut")]
    assert all(tables[0][key] == tables[1][key] for key in tables[0] if key not in ("train_seconds", "images_per_second"))
    before = {p: p.read_bytes() for p in Path("cut").iterdir()}
    assert run("--resume cut/checkpoint.pt --no-probe") == 2 and "epochs are done" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("cut").iterdir()} == before
    Path("cut/metrics.json").unlink()  # as if it had ended while it was measured
    assert run("--resume cut/checkpoint.pt --no-probe") == 0 and Path("cut/metrics.json").exists()
    assert Path("cut/checkpoint.pt").read_bytes() == before[Path("cut/checkpoint.pt")] and equal_runs("whole", "cut")


def test_a_run_grows(here, capsys):
    assert run(f"{TINY} --epochs 2 --no-probe --out run") == 0
    first = state_of("run")
    assert run("--resume run --epochs 4 --lr 0.001 --device auto --precision auto --no-probe") == 0
    said = capsys.readouterr().out
    assert "going on after step 6 of 12" in said and "schedule of 12 steps to a peak of 0.001" in said
    assert [row[0] for row in log_without_times("run")] == ["step", *map(str, range(1, 13))]
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert checkpoint["config"]["epochs"] == 4 and checkpoint["config"]["lr"] == 0.001 and checkpoint["state"]["step"] == 12
    assert "auto" not in (checkpoint["config"]["device"], checkpoint["config"]["precision"])
    assert not torch.equal(first[".model.encoder.stem.weight"], checkpoint["model"]["encoder.stem.weight"])


@pytest.mark.parametrize("flags, says", {
    "--width 8": "--width 8: run was trained with 4", "--seed 1": "--seed 1: run was trained with 0",
    "--batch-size 4": "--batch-size 4: run was trained with 8", "--judge ema": "--judge ema: run was trained with frozen",
    "--masked": "--masked True: run was trained with False", "--validation 3": "--validation 3: run was trained with 0",
    "--epochs 1": "--epochs 1: run is a run of 2", "--out other": "goes on in that folder", "--overwrite": "goes on in that folder",
    "--dataset other.npz": "are not those that run was trained on", "--dataset nowhere.npz": "no such file",
    "--device cuda:77": "this machine has", "--eval run": "not allowed with"}.items())
def test_resume_refuses_another_run(here, capsys, flags, says):
    assert run(f"{TINY} --epochs 2 --no-probe --out run") == 0
    write_npz("other.npz", train=26)
    before = {p: p.is_file() and p.read_bytes() for p in here.rglob("*")}
    assert run(f"--resume run {flags}") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and says in said[0]
    assert {p: p.is_file() and p.read_bytes() for p in here.rglob("*")} == before


def test_an_ignored_signal_stays_ignored(here, monkeypatch):
    """nohup does that: a lost terminal must not end the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_at(monkeypatch, 1, signal.SIGHUP)
    assert run(f"{TINY} --no-probe") == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


def test_interrupted_while_it_is_measured(here, monkeypatch, capsys):
    measure = stae.measure
    monkeypatch.setattr(stae, "measure", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    assert run(f"{TINY} --no-probe --out run") == 130 and "--resume run" in capsys.readouterr().err
    monkeypatch.setattr(stae, "measure", measure)
    assert run("--resume run --no-probe") == 0
    first = Path("run/metrics.json").read_text()
    monkeypatch.setattr(stae, "measure", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    assert run("--resume run --no-probe --epochs 2") == 130 and not Path("run/metrics.json").exists()  # that of one epoch
    monkeypatch.setattr(stae, "measure", measure)
    assert run("--resume run --no-probe") == 0 and Path("run/metrics.json").read_text() != first


def test_the_way_to_go_on_names_what_a_run_does_not_keep(here, monkeypatch, capsys):
    write_faces(here / "elsewhere", (*range(1, 11), 182_638))
    line = f"{TINY.replace('--dataset tiny.npz', '--dataset celeba --size 16')} --data elsewhere --no-probe --out run"
    interrupt_at(monkeypatch, 0)
    assert run(line) == 143
    go_on = capsys.readouterr().err.split("go on with: python stae.py ")[1].splitlines()[0]
    assert go_on == "--resume run --data elsewhere --no-probe" and run(go_on) == 0


@pytest.mark.parametrize("log, says", [(None, "run/log.csv is gone"), (b"step;loss\n1;2\n", "move it away"),
                                       (bytes(range(256)), "move it away"), (b"step,loss\n1,2\na note\n", "move it away")])
def test_a_log_that_somebody_touched(here, capsys, log, says):
    assert run(f"{TINY} --no-probe --out run") == 0
    Path("run/log.csv").unlink()
    if log is not None:
        Path("run/log.csv").write_bytes(log)
    assert run("--resume run --epochs 2 --no-probe") == (0 if log is None else 2)
    assert says in capsys.readouterr().err
    if log is None:
        assert [row[0] for row in log_without_times("run")] == ["step", "4", "5", "6"]
    else:
        assert Path("run/log.csv").read_bytes() == log


def test_data_that_moved_are_known_by_what_they_are(here, monkeypatch):
    interrupt_at(monkeypatch, 1)
    assert run(f"{TINY} --no-probe --out run") == 143
    Path("tiny.npz").rename("moved.npz")
    assert run("--resume run") == 2 and run("--resume run --dataset moved.npz --no-probe") == 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(here, monkeypatch, capsys):
    save, train_step = torch.save, stae.train_step
    assert run(f"{TINY} --epochs 2 --no-probe --out run") == 0
    before = Path("run/checkpoint.pt").read_bytes()

    def full(contents, file):
        whole = io.BytesIO()
        save(contents, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")

    monkeypatch.setattr(torch, "save", full)
    assert run("--resume run --epochs 4 --save-every 0.0000001") == 1
    said = capsys.readouterr().err
    assert "run/checkpoint.pt cannot be written" in said and "Traceback" not in said and "--resume run" in said
    assert Path("run/checkpoint.pt").read_bytes() == before and not Path("run/checkpoint.pt.tmp").exists()
    monkeypatch.setattr(torch, "save", save)
    assert run("--resume run --epochs 4 --no-probe") == 0
    assert run(f"{TINY} --epochs 4 --no-probe --out whole") == 0
    assert log_without_times("run")[0] == log_without_times("whole")[0] and len(log_without_times("run")) == 13


def test_a_full_disk_ends_the_run_in_one_line(here):
    """For real: no file of this process may grow beyond 40 kB."""
    code = ("import resource, signal, sys, stae; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); sys.exit(stae.main(sys.argv[1:]))")
    line = f"{TINY} --width 8 --no-probe --out run"
    path = {"PYTHONPATH": str(Path(stae.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *shlex.split(line)], capture_output=True, text=True, env=os.environ | path)
    assert done.returncode == 1 and "run/checkpoint.pt cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir("run")) == ["log.csv"]


@pytest.mark.parametrize("flags, term", [("", "distance"), ("--objective mse", "mse")])
def test_a_loss_that_is_not_finite_takes_no_step(here, monkeypatch, capsys, flags, term):
    assert run(f"{TINY} --epochs 20 --no-probe --out whole {flags}") == 0
    assert run(f"{TINY} --epochs 10 --no-probe --out run {flags}") == 0
    good, before, models = stae.Objective.forward, Path("run/checkpoint.pt").read_bytes(), []

    def poisoned(self, images, *draws):
        loss, terms = good(self, images, *draws)
        models.append((self.model, [p.detach().clone() for p in self.model.parameters()]))
        nan = math.nan if len(models) == 8 else 1.0  # in the 38th step
        return loss * nan, terms | {term: terms[term] * nan}

    monkeypatch.setattr(stae.Objective, "forward", poisoned)
    assert run("--resume run --epochs 20 --save-every 0.0000001") == 1
    said = capsys.readouterr().err
    assert f"step 38: not finite: loss nan, {term} nan" in said and "--lr" in said and "--resume run" in said
    model, weights = models[7]
    untouched = models[8][1] if len(models) > 8 else list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, untouched))
    assert torch.load("run/checkpoint.pt", weights_only=True)["state"]["step"] == 37  # the last good step
    monkeypatch.setattr(stae.Objective, "forward", good)
    assert run("--resume run --no-probe") == 0 and before != Path("run/checkpoint.pt").read_bytes()


def test_collapse_is_told_while_it_happens(here, capsys):
    """Equal images have equal codes, which may yet differ from place to place; no other run is accused."""
    x = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8).repeat(24, axis=0)
    np.savez("same.npz", x=x)
    assert run(f"{TINY} --dataset same.npz --no-probe --out same") == 0
    said = capsys.readouterr().err
    assert "the code collapses" in said and "--sigreg-weight" in said
    assert max(float(row[-2]) for row in log_without_times("same")[1:]) < 1e-3 and json.loads(Path("same/metrics.json").read_text())["min_std"] < 1e-3
    assert run(f"{TINY} --epochs 20 --no-probe") == 0 and "collapses" not in capsys.readouterr().err


def hostile(kind):
    """A checkpoint of somebody who means harm, or knows no better."""
    config = stae.DEFAULTS | {"channels": 3, "width": 4, "latent_channels": 4, "size": 16, "transform": "crop", "epochs": 1, "lr": 0.1,
                              "precision": "fp32", "device": "cpu"}
    whole = {"config": config, "model": tiny_model().state_dict(), "results": {"seed": 0, "train_seconds": 1.0}}
    if kind in ("width", "batch_size", "views"):
        config[kind] = 10**12
    elif kind == "latent_dim":
        config |= {"latent_dim": 768, "width": 4096, "size": 4096, "latent_channels": 4096}
    elif kind == "word":
        config["width"] = "__import__('os').mkdir('ran')"
    elif kind == "flag":
        config["eval"] = "notes.txt"
    elif kind == "lacking":
        del config["epochs"]
    elif kind == "list":
        whole = [whole]
    elif kind == "code":
        whole["results"] = Evil()
    elif kind == "whole numbers":
        whole["model"] = {name: value.long() for name, value in whole["model"].items()}
    elif kind == "shape":
        whole["model"]["encoder.stem.weight"] = torch.zeros(4, 3, 4, 5)
    elif kind == "one more":
        whole["model"]["extra"] = torch.zeros(3)
    elif kind == "no tensor":
        whole["model"]["encoder.stem.weight"] = "zeros"
    elif kind == "results":
        whole["results"]["train_seconds"] = "long"
    elif kind and kind.startswith("state"):
        optimizer = torch.optim.AdamW(tiny_model().parameters())
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(4, 3, 4, 4)
        optimizer.step()
        whole["state"] = {"step": 3, "logged": 3, "seconds": 1.0, "recent": torch.empty(0), "judge": None, "data": "01234567",
                          "optimizer": optimizer.state_dict()}
        whole["state"] |= {"state: step": {"step": "3"}, "state: log": {"logged": 5}, "state: time": {"seconds": 0.0},
                           "state: judge": {"judge": {"stem.weight": torch.zeros(4, 3, 4, 4)}}, "state": {}}[kind]
    return whole


@pytest.mark.parametrize("kind", ["width", "batch_size", "views", "latent_dim", "word", "flag", "lacking", "list", "code",
                                  "whole numbers", "shape", "one more", "no tensor", "truncated", "empty", "text", "results", "state",
                                  "state: step", "state: log", "state: time", "state: judge"])
def test_a_strangers_checkpoint_is_refused_and_runs_nothing(here, capsys, kind):
    torch.save(hostile(kind), "stranger.pt")
    data = Path("stranger.pt").read_bytes()
    Path("stranger.pt").write_bytes({"truncated": data[:2000], "empty": b"", "text": b"hello"}.get(kind, data))
    before = {p: p.is_file() and p.read_bytes() for p in here.rglob("*")}
    for flag in ("--eval", "--pictures", "--compare", "--resume"):
        assert run(f"{flag} stranger.pt") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "stranger.pt: not a checkpoint" in said and "weights_only" not in said
    with pytest.raises(stae.BadInput):
        stae.load_model("stranger.pt")
    assert {p: p.is_file() and p.read_bytes() for p in here.rglob("*")} == before  # "ran" is not among them


def test_a_checkpoint_without_its_training_state(here, capsys):
    whole = hostile(None)
    whole["config"]["dataset"] = "tiny.npz"
    whole["model"] = {name: value.half() if value.is_floating_point() else value for name, value in whole["model"].items()}
    torch.save(whole, "half.pt")
    assert stae.load_model("half.pt").encoder.stem.weight.dtype == torch.float32
    assert run("--eval half.pt --no-probe") == 0
    assert run("--resume half.pt") == 2 and "not the state of its training" in capsys.readouterr().err


def bomb(width, height):
    """A PNG with the header of a huge image and nothing in it."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100)), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


STRANGE = {  # files: what is said of them, or None when they can be read
    "zero.jpg": "cannot identify", "text.jpg": "cannot identify", "truncated.png": "", "truncated.jpg": "truncated",
    "bomb.png": "decompression bomb", "large.png": "decompression bomb", "sixteen.png": "16-bit grey", "header.webp": "",
    "cmyk.jpg": None, "animated.gif": None, "palette.png": None, "alpha.png": None, "bits.png": None, "grey.jpg": None,
    "wrong-suffix.jpg": None, "one.png": None, "line.png": None, "UPPER.JPEG": None}


def test_strange_images(here, capsys):
    colour = to_pil_image(torch.rand(3, 16, 16))
    folder = here / "strange"
    folder.mkdir()
    for name, image in {"cmyk.jpg": colour.convert("CMYK"), "palette.png": colour.convert("P"), "alpha.png": colour.convert("RGBA"),
                        "bits.png": colour.convert("1"), "grey.jpg": colour.convert("L"), "one.png": colour.crop((0, 0, 1, 1)),
                        "line.png": colour.crop((0, 0, 16, 1)), "UPPER.JPEG": colour, "truncated.jpg": colour, "truncated.png": colour,
                        "header.webp": colour, "sixteen.png": to_pil_image(np.full((16, 16, 1), 3000, np.int16))}.items():
        image.save(folder / name)
    colour.save(folder / "animated.gif", save_all=True, append_images=[colour.rotate(90)])
    (folder / "wrong-suffix.jpg").write_bytes((folder / "alpha.png").read_bytes())
    for name in ("truncated.jpg", "truncated.png", "header.webp"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: 20 if name == "header.webp" else len(data) * 2 // 3])
    (folder / "zero.jpg").write_bytes(b""), (folder / "text.jpg").write_text("hello")
    (folder / "bomb.png").write_bytes(bomb(20_000, 20_000)), (folder / "large.png").write_bytes(bomb(10_000, 10_000))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    images, names, _ = stae.read_images(folder, sorted(STRANGE), [], 16)
    assert set(names) == {name for name in STRANGE if STRANGE[name] is None} and images.shape == (len(names), 3, 16, 16)
    assert "skipped 8 of 18" in capsys.readouterr().err
    for name, says in STRANGE.items():  # and each alone
        if says is not None:
            with pytest.raises(stae.BadInput, match=rf"(?i){name} \(.*{says}"):
                stae.read_images(folder, [name], [], 16)
    assert run(f"{TINY} --dataset strange --size 16 --batch-size 2 --no-probe") == 0
    assert "Traceback" not in capsys.readouterr().err and {p: p.read_bytes() for p in folder.iterdir()} == before


def test_what_is_random_is_always_the_same():
    """Hashes of integers: order, boxes, holes, masks and shapes of a seed, on every machine."""
    def digest(*tensors):
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]

    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 1, 1)
    order = [(x[:, 0, 0, 0] * 255).round().to(torch.uint8) for _, x in stae.batches(images, 7, 3, 0, 10)]
    again = [(x[:, 0, 0, 0] * 255).round().to(torch.uint8) for _, x in stae.batches(images, 7, 3, 6, 10)]
    assert all(torch.equal(a, b) for a, b in zip(order[6:], again))
    config = stae.argparse.Namespace(**stae.DEFAULTS | dict(
        batch_size=12, channels=3, size=32, transform="crop", crop=[0.25, 1.0], latent_channels=8, masked=True, seed=5))
    holes, views, _ = stae.draw_step(123, torch.device("cpu"), config)
    config.transform = "pixel"
    _, masks, _ = stae.draw_step(123, torch.device("cpu"), config)
    found = {"order": digest(*order), "holes": digest(holes), "boxes": digest(views[0][2]), "masks": digest(masks[0][2].byte()),
             "shapes": digest(*stae.make_shapes(50)[:2])}
    assert found == {"order": "8d4f3646c431e549", "holes": "aea87427a5b48d96", "boxes": "8648c4fb66d263d5",
                     "masks": "356257f44484b7da", "shapes": "3b7d0873adfaa8b9"}


@pytest.mark.slow
def test_25_killed_runs_end_as_if_nothing_had_happened(here):
    line = f"{TINY} --epochs 1200 --width 8 --no-probe --save-every 0.01"
    command = [sys.executable, stae.__file__]
    subprocess.run([*command, *shlex.split(line), "--out", "whole"], check=True, stdout=subprocess.DEVNULL)
    random, deaths, resumed = np.random.default_rng(0), 0, 0
    for i in range(25):
        out, more = f"run{i}", ["--out", f"run{i}"]
        go, life = shlex.split(line) + more, random.uniform(3, 9)
        while True:
            with open("said.txt", "w") as said:
                process = subprocess.Popen([*command, *go], stdout=said, stderr=said)
                try:
                    assert process.wait(timeout=life) == 0, Path("said.txt").read_text()
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            deaths, life = deaths + 1, random.uniform(3, 9) if deaths % 3 else 600
            if Path(out, "checkpoint.pt").exists():
                torch.load(Path(out, "checkpoint.pt"), weights_only=True)
                go, resumed = ["--resume", out, "--no-probe", "--save-every", "0.01"], resumed + 1
            else:
                go = shlex.split(line) + more + ["--overwrite"]
        assert equal_runs("whole", out), out
    assert deaths >= 25 and resumed >= 20
    print(f"{deaths} deaths, {resumed} resumptions")


@pytest.mark.slow
def test_ten_seeds_of_the_default_run(here):
    tables = []
    for seed in range(10):
        assert run(f"--seed {seed} --no-probe --out {seed}") == 0
        tables.append(json.loads(Path(str(seed), "metrics.json").read_text()))
    psnrs = [table["psnr"] for table in tables]
    print(sorted(psnrs))
    assert min(table["min_std"] for table in tables) > 0.5 and max(psnrs) - min(psnrs) < 1.5


# ------------------------------------------------------------------------------------------------ the project


def test_import_has_no_side_effects(tmp_path):
    program = f"""
import sys, torch, random, numpy, os
sys.path.insert(0, {str(HERE)!r})
before = torch.random.get_rng_state(), random.getstate(), repr(numpy.random.get_state()), torch.get_num_threads(), dict(os.environ)
import stae
after = torch.random.get_rng_state(), random.getstate(), repr(numpy.random.get_state()), torch.get_num_threads(), dict(os.environ)
assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_nothing_but_the_four_packages_is_imported():
    imported = {node.module if isinstance(node, ast.ImportFrom) else name.name for node in ast.walk(ast.parse(SOURCE))
                if isinstance(node, (ast.Import, ast.ImportFrom)) for name in node.names}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch", "torchvision", "numpy"}


def test_requirements_equal_the_header_of_the_file():
    header = re.search(r"^# dependencies = (.*)$", SOURCE, re.M).group(1)
    assert ast.literal_eval(header) == (HERE / "requirements.txt").read_text().split()
    assert all(">=" in line for line in ast.literal_eval(header))


def commands():
    """Every stae.py command of README.md and of the head of the file, environment variables and comments off."""
    text = (HERE / "README.md").read_text() + stae.__doc__
    for block in re.findall(r"```\nrun\(\) \{.*?```", text, re.S):  # a shell function of what its commands have in common
        template = re.search(r"python stae\.py.*", block).group()
        text = text.replace(block, re.sub(r"^run (.*)", lambda line: template.replace("$*", line.group(1)), block.replace(template, ""), flags=re.M))
    found = re.findall(r"python stae\.py([^\n`#&|]*)", text)
    return sorted({" ".join(line.split()) for line in found} - {"--help"})


def test_every_command_in_the_readme_parses():
    assert len(commands()) > 50
    for line in commands():
        stae.build_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("name", ["cifar10", "faces"])
def test_models_that_come_along(name):
    """They reconstruct shapes that they have never seen better than the mean image of these does."""
    model = stae.load_model(HERE / "samples" / f"{name}.pt")
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    x = stae.as_float(stae.make_shapes(64)[0]).expand(-1, 3, -1, -1)
    with torch.no_grad():
        error = (model(x) - x).square().mean()
    assert error < 0.3 * (x - x.mean(dim=0)).square().mean()


def test_readme_is_complete():
    text = (HERE / "README.md").read_text()
    flags = [option for action in stae.build_parser()._actions for option in action.option_strings if option.startswith("--")]
    assert [flag for flag in flags if not re.search(rf"`{flag}[ `]", text) and flag != "--help"] == []
    assert [key for key in stae.EXPLAIN if not re.search(rf"^{key} ", text, re.M)] == []
    assert "@@" not in text and [link for link in re.findall(r"\]\((samples/[^)]*)\)", text) if not (HERE / link).exists()] == []


def test_python_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {}
    for block in blocks:
        exec(block.replace("128, 3, 32, 32", "8, 3, 16, 16"), names)
    assert blocks and names["loss"].isfinite()
