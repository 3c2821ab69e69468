"""Tests of stae.py: against oracles, of properties, and of the real command line run tiny."""
import ast
import copy
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import stae

HERE = Path(__file__).parent
SOURCE = (HERE / "stae.py").read_text()
METHOD = SOURCE[SOURCE.index("\n# 1. ") : SOURCE.index("\n# 5. ")]
TINY = "--dataset tiny.npz --width 2 --epochs 1 --batch-size 8 --lr 0.01 --device cpu --precision fp32"
NEAR = {"atol": 2e-5, "rtol": 1e-4}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(seed=0, **sizes):
    torch.manual_seed(seed)
    return stae.Autoencoder(**{"channels": 3, "width": 4, "latent_channels": 4, "size": 16} | sizes)


def tiny_step(transform="crop", dimensions=4):
    x = torch.rand(6, 3, 16, 16, generator=generator())
    views = stae.views(transform, stae.draw_transform(transform, x.shape, generator()))
    return x, views, stae.draw_slices(dimensions, 8, generator())


def cut(x):
    return stae.cut_holes(x, stae.draw_holes(x.shape, generator(), 0.35))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_the_authors_networks():
    down, x = stae.Down(4, 4), torch.rand(2, 4, 6, 8)
    for p in down.parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(down(x), F.silu(F.avg_pool2d(x, 2)))  # the mean of each group of pixels

    def count(*sizes):
        return sum(p.numel() for p in stae.Autoencoder(*sizes).parameters())

    with torch.device("meta"):
        assert count(3, 32, 8) == 135_027 and round(count(3, 128, 32) / 1e6, 2) == 2.13  # CIFAR-10, CelebA
        assert [round(count(3, 128, 128, n, 128) / 1e6, 1) for n in (128, 512)] == [11.2, 36.3]  # masked


def numpy_sigreg(codes, slices):
    t, places = np.linspace(-3, 3, 33), []
    for place in np.moveaxis(codes.reshape(*codes.shape[:2], -1), 2, 0):
        wave = np.exp(1j * (place @ slices)[..., None] * t).mean(axis=0)  # (M, 33)
        gap = np.abs(wave - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
        places.append(len(codes) * ((gap[:, 1:] + gap[:, :-1]) / 2).sum(axis=1) * (t[1] - t[0]))
    return np.mean(places)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(32, 1), (20, 64), (16, 4, 2, 3)])
def test_sigreg_and_its_gradient_against_numpy(shape, bf16):
    codes = (torch.randn(shape, generator=generator()) * 1.3 + 0.2).requires_grad_()
    slices = stae.draw_slices(shape[1], 5, generator(1))
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = stae.sigreg(codes, slices)
    value.backward()
    exact, flat = codes.detach().double().numpy(), slices.double().numpy()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(numpy_sigreg(exact, flat), rel=1e-4)
    for seed in range(3):
        way = np.random.default_rng(seed).normal(size=shape)
        slope = (numpy_sigreg(exact + 1e-5 * way, flat) - numpy_sigreg(exact - 1e-5 * way, flat)) / 2e-5
        assert (codes.grad.double().numpy() * way).sum() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_boxes_are_log_uniform_and_lie_inside():
    boxes = stae.draw_boxes((20_000, 3, 512, 1024), generator(), 0.1, 0.9)
    assert boxes.dtype == torch.int64 and boxes.min() >= 0
    assert ((boxes[:, :2] + boxes[:, 2:]).amax(dim=0) <= torch.tensor([512, 1024])).all()
    position = (boxes[:, 3] / 1024 / 0.1).log() / math.log(9)  # uniform in [0, 1]
    assert abs(position.mean() - 0.5) < 0.01 and abs(position.std() - 12**-0.5) < 0.01
    assert ((boxes[:, :2] / (torch.tensor([512, 1024]) - boxes[:, 2:])).mean(dim=0) - 0.5).abs().max() < 0.01


def test_crop_equals_slicing_and_interpolating():
    images = torch.rand(40, 3, 24, 32, generator=generator())
    boxes = stae.draw_boxes(images.shape, generator(1), 1e-9, 1.0)
    boxes[0] = torch.tensor([7, 31, 1, 1])  # one pixel
    for cropped, image, (top, left, height, width) in zip(stae.crop(images, boxes), images, boxes.tolist()):
        box = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(box, size=(24, 32), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(cropped, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, cell", [("pixel", 1), ("patch", 4)])
def test_masks_black_out_an_exact_count_of_places_and_channels_by_chance(name, cell):
    mask = stae.draw_transform(name, (50, 3, 16, 24), generator(), mask_ratio=0.7)
    assert mask.shape == (50, 1, 16, 24) and mask.unique().tolist() == [0, 1]  # shared by the channels
    assert (mask == 0).sum(dim=(1, 2, 3)).unique().tolist() == [round(0.7 * 384 / cell**2) * cell**2]
    cells = mask.unfold(2, cell, cell).unfold(3, cell, cell)
    assert (cells.amin(dim=(4, 5)) == cells.amax(dim=(4, 5))).all() and (mask.mean(dim=0) > 0).all()
    by_chance = stae.draw_transform("channel", (3000, 3, 8, 8), generator(), mask_ratio=0.7)
    assert by_chance.shape == (3000, 3, 1, 1) and len(by_chance.flatten(1).unique(dim=0)) == 8
    assert ((by_chance.mean(dim=(0, 2, 3)) - 0.3).abs() < 0.03).all()


@pytest.mark.parametrize("transform", stae.TRANSFORMS)
def test_a_drawn_transform_does_the_same_to_both_images(transform):
    x, views, _ = tiny_step(transform)
    assert [weight for weight, _ in views] == ([0.5] + 5 * [0.1] if transform == "stack" else [1.0])
    for _, T in views:
        other = torch.cat((x[:1], torch.rand(5, 3, 16, 16)))
        assert T(x).shape == x.shape and T(x).min() >= 0 and T(x).max() <= 1 + 1e-6
        assert torch.equal(T(x), T(x.clone())) and torch.equal(T(other)[0], T(x)[0])
    drawn, again, another = (stae.draw_transform(transform, x.shape, generator(seed)) for seed in (0, 0, 1))
    assert drawn is None or (torch.equal(drawn, again) and not torch.equal(drawn, another))


def test_filters_by_hand():
    dot, dots = torch.zeros(2, 1, 1, 16, 16)
    dot[..., 8, 8] = dots[..., 4, 4] = 1
    dots[..., 11, 11] = 0.1
    blurred = stae.apply_filter("blur", dot)[0, 0, 8, [2, 3, 8, 13, 14]]
    assert blurred.tolist() == pytest.approx([0, 1 / 99, 1 / 121, 1 / 88, 0])  # the part of the window inside
    assert stae.apply_filter("residual", dot)[0, 0, 8, 7].item() == pytest.approx(1 / 24, abs=1e-4)
    edges = stae.apply_filter("edges", dot)[0, 0]
    assert [edges[8, 8], edges[8, 7], edges[7, 7]] == pytest.approx([0, 1, 0.5**0.5], abs=1e-4)
    contrast = stae.apply_filter("contrast", dots)[0, 0]  # makes a faint dot as strong as a bright one
    assert contrast[4, 4].item() == pytest.approx(1) and contrast[11, 11] > 0.9 and contrast[0, 15] == 0.5
    pink = torch.tensor([0.6, 0.3, 0.3]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    vivid = torch.tensor([0.4 + 1.8 * 0.2, 0.4 - 1.8 * 0.1, 0.4 - 1.8 * 0.1])
    expected = vivid.mean() + 1.4 * (vivid - vivid.mean())
    torch.testing.assert_close(stae.apply_filter("colour", pink)[0, :, 5, 5], expected)


@pytest.mark.parametrize("ratio", [1e-6, 0.35, 0.999])
def test_holes_have_their_area_and_the_mean_colour_of_the_whole_image(ratio):
    images = torch.rand(500, 3, 24, 24, generator=generator())
    holes = stae.draw_holes(images.shape, generator(), ratio)
    side = min(max(1, round(24 * ratio**0.5)), 23)
    assert (holes[:, 2:] == side).all() and holes.min() == 0 and (holes[:, :2] + side).max() == 24
    expected, mask = images.clone(), torch.zeros(500, 1, 24, 24)
    for i, (top, left, _, _) in enumerate(holes.tolist()):
        mask[i, :, top : top + side, left : left + side] = 1
        expected[i, :, top : top + side, left : left + side] = images[i].mean(dim=(1, 2)).view(3, 1, 1)
    assert torch.equal(stae.hole_mask(holes, 24), mask)
    torch.testing.assert_close(stae.cut_holes(images, holes), expected)


@pytest.mark.parametrize("places", [(), (2, 3)])
def test_distance_by_hand(places):
    target, seen, inner, inner_seen = (torch.randn(6, 3, *places, generator=generator(i)) for i in range(4))
    a, b = (side.double().numpy().swapaxes(0, 1).reshape(3, -1) for side in (target, seen))
    expected = (((b - a) / (a.std(axis=1, keepdims=True) + 1e-3)) ** 2).mean()
    assert stae.distance(target, seen).item() == pytest.approx(expected, rel=1e-5)
    t, s = inner.double().numpy(), inner_seen.double().numpy()
    layer = ((s - t) ** 2).mean() / (t.var() + 1e-4)
    lists = [target, inner, 2 * inner], [seen, inner_seen, 2 * inner]
    assert stae.distance(*lists, layer_weight=0.5).item() == pytest.approx(expected + 0.5 * layer, rel=1e-5)
    assert stae.distance(*lists).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layer_weight", [0.0, 1.0])
@pytest.mark.parametrize("transform", stae.TRANSFORMS)
@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_stae_loss_in_plain_autograd(kind, transform, layer_weight):
    x, views, slices = tiny_step(transform)
    ours, theirs = tiny_model(), tiny_model()
    judge = ours.encoder if kind == "live" else stae.freeze(ours.encoder)
    loss, _ = stae.stae_loss(ours, x, views, slices, judge, 0.07, layer_weight)
    loss.backward()
    judge = theirs.encoder if kind == "live" else copy.deepcopy(theirs.encoder).requires_grad_(False)
    z = theirs.norm(theirs.encoder(x)[0])
    x_hat = theirs.decoder(z).sigmoid()
    expected = 0.07 * stae.sigreg(z, slices)
    for weight, T in views:
        expected = expected + weight * stae.distance(judge(T(x)), judge(T(x_hat)), layer_weight)
    expected.backward()  # under a frozen judge the encoder learns through z alone
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(ours), gradients(theirs), **NEAR)


@pytest.mark.parametrize("kind", ["frozen", "live"])
@pytest.mark.parametrize("latent_dim", [0, 5])
def test_masked_loss_in_plain_autograd(kind, latent_dim):
    x, views, slices = tiny_step("pixel", latent_dim or 4)
    ours, theirs = tiny_model(latent_dim=latent_dim), tiny_model(latent_dim=latent_dim)
    judge = ours.encoder if kind == "live" else stae.freeze(ours.encoder)
    loss, terms = stae.masked_loss(ours, x, cut(x), views, slices, judge, 0.07, 0.5)
    loss.backward()
    judge = theirs.encoder if kind == "live" else copy.deepcopy(theirs.encoder).requires_grad_(False)
    z_c, z_m = theirs.norm(theirs.encoder(torch.cat((x, cut(x))))[0]).chunk(2)  # one norm for both
    x_c, x_m = theirs.decode(z_c), theirs.decode(z_m)
    agreement, T = stae.distance(judge(x_c), judge(x_m)), views[0][1]
    clean, masked = (stae.distance(judge(T(x)), judge(T(image)), 0.5) for image in (x_c, x_m))
    regulariser = (stae.sigreg(z_c, slices) + stae.sigreg(z_m, slices)) / 2
    total = (agreement + clean + masked) / 3 + 0.07 * regulariser
    total.backward()
    found, expected = [loss, *terms.values()], (total, agreement, clean, masked, regulariser)
    assert [value.item() for value in found] == pytest.approx([value.item() for value in expected], rel=1e-5)
    torch.testing.assert_close(gradients(ours), gradients(theirs), **NEAR)


def test_pixels_are_compared_by_the_baseline_alone():
    x, views, _ = tiny_step("none")
    model = tiny_model()
    expected = (model.decode(model.encode(cut(x))) - x).square().mean()
    torch.testing.assert_close(stae.mse_loss(model, x, cut(x))[0], expected)
    x_hat = torch.rand(6, 3, 16, 16, generator=generator(5)).requires_grad_()
    # What the judge does not see, here the right half, has no part in the loss
    stae.judge_views(lambda images: model.encoder(images[..., :8]), views, x, x_hat, 1.0).backward()
    assert x_hat.grad[..., 8:].abs().max() == 0 and x_hat.grad[..., :8].abs().min() > 0


class Layers(nn.Sequential):
    def forward(self, images):
        inner = self[1](self[0](images)).relu()
        return [self[2](inner), inner]


class Foreign(nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.flat, self.norm = flat, (nn.BatchNorm1d if flat else nn.BatchNorm2d)(8, affine=False)
        self.encoder = Layers(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 2, 2))
        self.decoder = nn.ConvTranspose2d(8, 3, 8, 8)
        if flat:
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.SiLU(), nn.Linear(32, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 768), nn.Unflatten(1, (3, 16, 16)))

    def encode(self, images):
        return self.norm(self.encoder(images) if self.flat else self.encoder(images)[0])

    def decode(self, code):
        return self.decoder(code).sigmoid()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make, dimensions, layer_weight", [
    (tiny_model, 4, 1.0), (lambda: Foreign(True), 8, 0.0), (lambda: Foreign(False), 8, 1.0)])
def test_any_model_learns_to_reconstruct(make, dimensions, layer_weight, masked):
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    x = F.avg_pool2d(stae.make_shapes(24)[0].float() / 255, 2).expand(-1, 3, -1, -1)
    loss_of, inputs = (stae.masked_loss, (x, cut(x))) if masked else (stae.stae_loss, (x,))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(40):
        views = stae.views("crop", stae.draw_transform("crop", x.shape, generator(step)))
        slices = stae.draw_slices(dimensions, 8, generator(step))
        loss, _ = loss_of(model, *inputs, views, slices, stae.freeze(model.encoder), 0.03, layer_weight)
        if step == 0:  # running statistics move once a step, and from full images
            twin.encode(torch.cat(inputs))
            torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


X = torch.rand(6, 3, 16, 16)
NARROW = types.SimpleNamespace(encode=lambda x: x[:, :, 0, 0], decode=lambda z: X[..., :8])


@pytest.mark.parametrize("match, call", [
    ("'wavelet'.*pixel", lambda: stae.draw_transform("wavelet", X.shape, generator())),
    ("crop_range", lambda: stae.draw_transform("crop", X.shape, generator(), crop_range=(0.5, 0.2))),
    ("mask_ratio 0", lambda: stae.draw_transform("pixel", X.shape, generator(), mask_ratio=0)),
    ("ratio 1", lambda: stae.draw_holes(X.shape, generator(), 1)),
    ("no inner activations", lambda: stae.distance(X, X, layer_weight=1.0)),
    ("decodes .6, 3, 16, 8.", lambda: stae.stae_loss(NARROW, X, [(1, abs)], torch.rand(3, 8), abs))])
def test_wrong_use_is_refused(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_sections_1_to_4_run_alone():
    names = {}
    exec("import torch\nimport torch.nn.functional as F\nfrom torch import nn\n" + METHOD, names)
    method = types.SimpleNamespace(**names)
    model = method.Autoencoder(3, 4, 4)
    for name in method.TRANSFORMS:
        views = method.views(name, method.draw_transform(name, X.shape, generator()))
        rest = views, method.draw_slices(4, 8, generator()), method.freeze(model.encoder)
        holed = method.cut_holes(X, method.draw_holes(X.shape, generator()))
        (method.stae_loss(model, X, *rest)[0] + method.masked_loss(model, X, holed, *rest)[0]).backward()
    assert len(gradients(model)) == len(list(model.parameters()))


def test_nothing_on_a_cuda_device_meets_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)  # a fake tensor has no values
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [1.0] * len(self))
    monkeypatch.setattr(F, "one_hot", lambda x: x.new_zeros(*x.shape, 3))
    with FakeTensorMode() as fake, torch.device("cuda"):  # computes shapes alone, refuses mixed devices
        model, x, holes = stae.Autoencoder(3, 4, 4), torch.rand(6, 3, 16, 16), torch.ones(6, 4).long()
        drawn = {"crop": holes, "pixel": x[:, :1], "patch": x[:, :1], "channel": x[:, :, :1, :1]}
        slices, labels, flat, images = torch.rand(4, 8), holes[:, 0], x.flatten(1), (255 * x).byte()
    with fake:
        for transform in stae.TRANSFORMS:
            rest = stae.views(transform, drawn.get(transform)), slices, stae.freeze(model.encoder), 0.03, 1.0
            masked = stae.masked_loss(model, x, stae.cut_holes(x, holes), *rest)
            for loss, _ in (stae.stae_loss(model, x, *rest), masked, stae.mse_loss(model, x)):
                assert loss.device.type == "cuda"
        scores = [stae.ssim(x, x), stae.variation(x, stae.hole_mask(holes, 16)),
                  stae.linear_probe(flat, labels, flat)]
        assert all(score.shape == (6,) and score.device.type == "cuda" for score in scores)
        stae.min_std(x)
        stae.fidelity(lambda x: model.decode(model.encode(x)), images, "cuda", holes)
        with pytest.raises(Exception, match="cpu"):
            stae.ssim(x, torch.rand(6, 3, 16, 16))


def write_npz(path, **changes):
    coarse = np.random.default_rng(0).integers(0, 256, (34, 2, 2, 3), dtype=np.uint8)
    x, y = coarse.repeat(8, axis=1).repeat(8, axis=2), np.arange(34) % 3
    np.savez(path, **{"x_train": x[:24], "y_train": y[:24], "x_test": x[24:], "y_test": y[24:]} | changes)
    return x, y


def paint(path, grey, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def greys(images):
    return images[:, 0, 0, 0].tolist()


def test_shapes_are_the_same_bytes_everywhere():
    images, labels, test_count = stae.make_shapes()
    assert images.shape == (12_000, 1, 32, 32) and test_count == 2_000
    assert hashlib.sha256(images.numpy()).hexdigest()[:16] == "3a6dbf5ae9b76fe8"
    assert hashlib.sha256(labels.numpy()).hexdigest()[:16] == "8eb66d683e88d398"


def test_an_npz_is_read_as_it_is(tmp_path):
    path = str(tmp_path / "a.npz")
    x, y = write_npz(path, y_train=10 * (np.arange(24) % 3), y_test=10 * (np.arange(24, 34) % 3))
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    (train, labels), (test, test_labels) = stae.load_data(path)
    assert torch.equal(train, x[:24]) and torch.equal(test, x[24:])
    assert [*labels, *test_labels] == y.tolist()  # numbered from 0
    (train, _), (test, labels) = stae.load_data(path, validation=5)
    assert torch.equal(train, x[:19]) and torch.equal(test, x[19:24]) and labels.tolist() == y[19:24].tolist()


def test_an_npz_without_a_test_split_keeps_a_tenth_always_the_same(tmp_path):
    x = np.zeros((34, 16, 24, 1), np.uint8)  # grey, and cut to the square in its centre
    x[:, :, 4:20] = np.arange(34).reshape(-1, 1, 1, 1)
    np.savez(tmp_path / "b.npz", x=x, y=np.arange(34))
    (train, labels), (test, test_labels) = stae.load_data(str(tmp_path / "b.npz"))
    assert train.shape == (31, 1, 16, 16) and (train == labels.view(-1, 1, 1, 1)).all()
    assert test.shape == (3, 1, 16, 16) and (test == test_labels.view(-1, 1, 1, 1)).all()
    train, (again, _) = stae.load_data(str(tmp_path / "b.npz"), size=8)
    assert train[0].shape == (31, 1, 8, 8) and greys(again) == greys(test) != [31, 32, 33]


def test_a_folder_of_the_images_people_have(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colour, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    paint(tmp_path / "cats" / "deep" / "large.jpg", 90, (60, 40))
    (tmp_path / "cats" / "text.jpg").write_text("hello")
    (tmp_path / "dogs").mkdir()
    colour.save(tmp_path / "dogs" / "turned.PNG", exif=exif)
    for mode, end in {"L": "png", "RGBA": "png", "P": "webp", "CMYK": "jpg", "F": "tif"}.items():
        colour.convert(mode).save(tmp_path / "dogs" / f"{mode}.{end}")
    images, labels = (torch.cat(parts) for parts in zip(*stae.load_data(str(tmp_path), size=16)))
    said = capsys.readouterr().out
    assert "skipped 2 of 8" in said and "cats/text.jpg" in said and "2 subfolders" in said
    assert sorted(labels.tolist()) == [0, 1, 1, 1, 1, 1] and images[labels == 0].unique().tolist() == [90]
    turned = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1)
    assert any(torch.equal(image, turned) for image in images)
    paint(tmp_path / "loose.png", 0)
    assert stae.load_data(str(tmp_path), size=16)[0][1] is None


@pytest.mark.parametrize("first, second", [("train", "test"), ("Train", "valid")])
def test_a_folder_with_splits(tmp_path, capsys, first, second):
    for split, kind, grey in [(first, "a", 10), (first, "b", 20), (second, "b", 30)]:
        for i in range(2):
            paint(tmp_path / split / kind / f"{i}.png", grey + i)
    (train, labels), (test, test_labels) = stae.load_data(str(tmp_path), size=16)
    assert sorted(zip(greys(train), labels.tolist())) == [(10, 0), (11, 0), (20, 1), (21, 1)]
    assert sorted(greys(test)) == [30, 31] and test_labels.tolist() == [1, 1]
    assert f"train/ and {second}/" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["nothing", "added", "changed", "removed", "size"])
def test_a_folder_is_decoded_again_only_after_a_change(tmp_path, monkeypatch, change):
    folder, opened, open_image = tmp_path / "photos", [], Image.open
    for i in range(30):
        paint(folder / "sub" / f"{i}.bmp", i)
        os.utime(folder / "sub" / f"{i}.bmp", (1e9, 1e9))
    train, test = (set(greys(images)) for images, _ in stae.load_data(str(folder), size=16))
    assert len(test) == 3 and train | test == {*range(30)}
    gone = min(train) if change in ("changed", "removed") else None
    if change == "removed":
        (folder / "sub" / f"{gone}.bmp").unlink()
    elif change in ("added", "changed"):
        paint(folder / "sub" / f"{30 if change == 'added' else gone}.bmp", 200)
    monkeypatch.setattr(Image, "open", lambda path, *rest: opened.append(path) or open_image(path, *rest))
    splits = stae.load_data(str(folder), size=24 if change == "size" else 16)
    new_train, new_test = (set(greys(images)) for images, _ in splits)
    painted = {200} if change in ("added", "changed") else set()
    assert new_train | new_test == ({*range(30)} - {gone}) | painted
    assert len(test - new_test) <= 1  # a new file moves hardly any other
    assert len(opened) == {"nothing": 0, "added": 31, "removed": 29}.get(change, 30)
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".cache"}  # no temporary file stays


def test_celeba_is_split_by_number_and_cut_to_its_centre(tmp_path):
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i, number in enumerate((1, 2, 162_770, 162_771, 182_637, 182_638, 202_599)):
        face = Image.new("RGB", (178, 218), "white")
        face.paste((10 * i, 10 * i, 10 * i), (25, 45, 153, 173))
        face.save(folder / f"{number:06}.jpg", format="PNG")  # exact pixels
    (folder / "notes.jpg").write_text("no number")
    (train, labels), (test, _) = stae.load_data("celeba", str(tmp_path))
    assert train.shape == (3, 3, 128, 128) and labels is None
    assert [image.unique().tolist() for image in (*train, *test)] == [[0], [10], [20], [50], [60]]


def test_cifar10_is_read_in_torchvisions_layout(monkeypatch):
    class Stored(list):
        def __init__(self, root, train, download):
            super().__init__(range(40 if train else 10))
            self.data = np.full((len(self), 32, 32, 3), [50 * train, 60, 70], np.uint8)
            self.targets = [i % 10 for i in self]

    monkeypatch.setattr(stae.datasets, "CIFAR10", Stored)
    (train, labels), (test, test_labels) = stae.load_data("cifar10")
    assert train.shape == (40, 3, 32, 32) and train[0, :, 0, 0].tolist() == [50, 60, 70]
    assert greys(test) == [0] * 10 and [*labels, *test_labels] == 5 * [*range(10)]


def labelled(count, seed):
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 128, (count, 3, 16, 16), generator=generator(seed))
    return (noise + 30 * labels.view(-1, 1, 1, 1)).byte(), labels


def decibels(error):
    return -10 * math.log10(error.square().mean().item())


def test_ssim_against_numpy_and_variation_by_hand():
    x = torch.rand(2, 3, 13, 12, generator=generator())
    y = (0.7 * x + 0.3 * torch.rand(2, 3, 13, 12, generator=generator(1)))
    a, b = (side.double().unfold(2, 11, 1).unfold(3, 11, 1).numpy() for side in (x, y))
    g = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    g = g / g.sum()
    ma, mb, aa, bb, ab = (np.einsum("bcijyx,y,x->bcij", w, g, g) for w in (a, b, a * a, b * b, a * b))
    score = (2 * ma * mb + 1e-4) * (2 * (ab - ma * mb) + 9e-4)
    score /= (ma**2 + mb**2 + 1e-4) * (aa - ma**2 + bb - mb**2 + 9e-4)
    assert stae.ssim(x, y).tolist() == pytest.approx(score.mean(axis=(1, 2, 3)), abs=1e-5)
    torch.testing.assert_close(stae.ssim(x, x), torch.ones(2))
    image = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]).view(1, 1, 2, 3)
    assert stae.variation(image, torch.ones(1, 1, 2, 3)).tolist() == pytest.approx([1 + 1 + 0.5 + 1 + 0.5])
    region = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]).view(1, 1, 2, 3)
    assert stae.variation(image, region).tolist() == pytest.approx([1 + 0.5 + 1])


@pytest.mark.parametrize("where", ["whole", "inside", "visible"])
def test_fidelity_by_hand(where):
    images = labelled(260, 0)[0]  # more than it takes at a time
    x, holes = images.float() / 255, stae.draw_holes(images.shape, generator(), 0.35)
    given = {} if where == "whole" else {"holes": holes, "hidden": where == "inside"}
    found = stae.fidelity(lambda x: 0.6 * x + 0.1, images, "cpu", **given)
    inside = stae.hole_mask(holes, 16)
    region = {"whole": torch.ones_like(inside), "inside": inside, "visible": 1 - inside}[where]
    x_hat = 0.6 * (stae.cut_holes(x, holes) if given else x) + 0.1
    error = (x_hat - x).double().permute(0, 2, 3, 1)[region[:, 0].bool()]
    red, green, blue = error.unbind(dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack(((blue - luma) / 1.772, (red - luma) / 1.402))
    sharp, sharp_x = (stae.variation(part, region).sum().item() for part in (x_hat, x))
    expected = {"psnr": decibels(error), "psnr_luma": decibels(luma), "psnr_chroma": decibels(chroma),
                "ssim": stae.ssim(x, x_hat).mean().item(), "sharpness": sharp / sharp_x}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_linear_probe_against_the_normal_equations(strength):
    x, test = torch.randn(180, 5, generator=generator()).split([80, 100])
    labels = (x[:, 0] + torch.randn(80, generator=generator(1))).sign().long() + (x[:, 1] > 0)
    labels = labels.clamp(min=0)  # 0 to 2
    a, b, y = 10 * x.double().numpy() + 3, 10 * test.double().numpy() + 9, np.eye(3)[labels]
    scaled, asked = ((side - a.mean(axis=0)) / a.std(axis=0) for side in (a, b))
    weights = np.linalg.solve(scaled.T @ scaled + 80 * strength * np.eye(5), scaled.T @ (y - y.mean(axis=0)))
    expected = (asked @ weights + y.mean(axis=0)).argmax(axis=1)
    assert stae.linear_probe(10 * x + 3, labels, 10 * test + 9, strength).tolist() == expected.tolist()


@torch.no_grad()
def test_evaluate_against_its_parts():
    (train, labels), (test, asked) = labelled(60, 0), labelled(40, 1)
    model = tiny_model().eval()

    def classifier(x):
        return F.pad(x.mean(dim=(1, 2, 3))[:, None], (1, 0), value=0.3)

    def accuracy(guess):
        return 100 * (guess == asked).double().mean().item()

    def knn(x, y):
        near = (F.normalize(y) @ F.normalize(x).T).argsort(dim=1, descending=True)[:, :20]
        return torch.tensor([np.bincount(row).argmax() for row in labels[near].numpy()])

    found = stae.evaluate(model, (train, labels), (test, asked), classifier=classifier)
    x, y = train.float() / 255, test.float() / 255
    known, codes, x_hat = model.encode(x).flatten(1), model.encode(y), model.decode(model.encode(y))
    mean = x.flatten(1).mean(dim=0)
    axes = torch.linalg.svd(x.flatten(1) - mean, full_matrices=False)[2][:16].T
    a, b = ((images.flatten(1) - mean) @ axes for images in (x, y))
    before, after = (model.encoder(images)[-1].flatten(1) for images in (x, y))
    shown = {"": x_hat, "_original": y, "_pca": (b @ axes.T + mean).view_as(y)}
    spread = np.linalg.svd(codes.flatten(1).numpy())[1]
    expected = {
        "psnr": decibels(x_hat - y), "pca_psnr": decibels(shown["_pca"] - y), "min_std": stae.min_std(codes),
        "sigreg": stae.sigreg(codes, stae.draw_slices(4, 4096, generator())).item(), "code_size": 16,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rankme": spread.sum() / np.exp((spread * np.log(spread)).sum() / spread.sum()),
        "knn_code": accuracy(knn(known, codes.flatten(1))), "knn_pca": accuracy(knn(a, b)),
        "probe_code": accuracy(stae.linear_probe(known, labels, codes.flatten(1))),
        "probe_pca": accuracy(stae.linear_probe(a, labels, b)),
        "probe_features": accuracy(stae.linear_probe(before, labels, after)),
        **{f"recognition{name}": accuracy(classifier(seen).argmax(dim=1)) for name, seen in shown.items()}}
    assert found["sigreg"] == pytest.approx(expected.pop("sigreg"), rel=0.1)  # of other slices
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    holes = stae.draw_holes(test.shape, generator())
    unlabelled = stae.evaluate(model, (train, None), (test, None), holes)
    assert not [name for name in unlabelled if name.startswith(("probe", "knn", "recognition"))]
    given = test, "cpu", holes
    inside, visible = (stae.fidelity(lambda x: model.decode(model.encode(x)), *given, h) for h in (1, 0))
    floor = stae.fidelity(lambda x: mean.view(1, 3, 16, 16), *given, hidden=True)
    expected = inside["psnr"], visible["psnr"], floor["psnr"], inside["sharpness"], inside["ssim"]
    names = "hole_psnr", "visible_psnr", "hole_floor_psnr", "hole_sharpness", "masked_ssim"
    assert [unlabelled[name] for name in names] == pytest.approx(expected, rel=1e-4)


def test_rows_of_changed_codes():
    x = torch.rand(5, 3, 8, 8, generator=generator())
    rows = stae.code_rows(types.SimpleNamespace(encode=lambda x: x, decode=lambda z: z), x)
    assert rows["walk"][:, 0, 5, 5].tolist() == [-3, -1.5, 0, 1.5, 3]
    assert torch.equal(rows["walk"][3, 1:], x[0, 1:]) and rows["samples"].unique().numel() == x.numel()
    torch.testing.assert_close(rows["interpolation"][1], 0.75 * x[0] + 0.25 * x[4])
    middle = F.pad(torch.ones(4, 4), (2, 2, 2, 2))
    assert torch.equal(rows["brush"], torch.where(middle > 0, x.roll(-1, 0), x))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz("tiny.npz")
    return tmp_path


def run(line):
    try:
        return stae.main(shlex.split(line))
    except SystemExit as end:  # by a signal
        return end.code


def stored(path):
    return torch.load(Path(path, "checkpoint.pt"), weights_only=True)


def log_of(path):
    return [line.rsplit(",", 2)[0] for line in Path(path, "log.csv").read_text().splitlines()]


def change_call(monkeypatch, owner, name, count, change):
    function, calls = getattr(owner, name), []

    def changed(*args):
        calls.append(1)
        return change(function(*args)) if len(calls) == count else function(*args)

    monkeypatch.setattr(owner, name, changed)


@pytest.mark.parametrize("flags, owner, name, count, done", [
    ("", stae.Objective, "forward", 5, 1), ("--judge ema --precision bf16", stae.Objective, "forward", 9, 2),
    ("--judge random --transform stack", torch, "save", 2, 1), ("--objective mse", stae, "evaluate", 1, 3),
    ("--masked --latent-dim 3 --transform pixel", os, "replace", 2, 2)])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(
        here, monkeypatch, capsys, flags, owner, name, count, done, number, code):
    line = f"{TINY} --epochs 3 {flags}"
    assert run(f"{line} --out whole") == 0
    change_call(monkeypatch, owner, name, count, lambda result: signal.raise_signal(number))
    assert run(line) == code  # an epoch has three steps
    hint = capsys.readouterr().err.strip().splitlines()[-1].split("stae.py ")[1]
    folder, = Path("runs").iterdir()
    assert f"--out {folder}" in hint and len(stored(folder)["history"]) == done
    assert run(f"{hint} --seed 1 --lr 0.02") == 2
    error = capsys.readouterr().err
    assert "seed 0, here 1" in error and "lr 0.01, here 0.02" in error and "width" not in error
    assert run(hint) == 0
    for part in ("objective", "optimizer"):
        ours, theirs = (stored(path)[part] for path in ("whole", folder))
        torch.testing.assert_close(ours.get("state", ours), theirs.get("state", theirs), rtol=0, atol=0)
    assert log_of("whole") == log_of(folder) and sorted(os.listdir("whole")) == sorted(os.listdir(folder))
    assert run(hint) == 2 and "--eval" in capsys.readouterr().err  # finished


def test_every_epoch_has_an_order_of_its_own(here):
    assert run(f"{TINY} --objective mse --lr 1e-9 --epochs 2 --out run") == 0
    first, second = (float(line.split(",")[1]) for line in log_of("run")[1:])
    assert first != pytest.approx(second, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(here, monkeypatch, capsys):
    change_call(monkeypatch, stae.Objective, "forward", 5, lambda result: (math.nan * result[0], result[1]))
    assert run(f"{TINY} --epochs 3 --out run") == 1
    error = capsys.readouterr().err
    assert "epoch 2/3" in error and "loss" in error and "nan" in error and error.count("\n") == 1
    assert len(stored("run")["history"]) == 1


def test_a_code_that_collapses_is_said(here, capsys):
    np.savez("same.npz", x=np.zeros((30, 16, 16, 3), np.uint8))
    for name, collapses in {"same": True, "tiny": False}.items():
        assert run(f"{TINY} --dataset {name}.npz") == 0
        assert ("collapse" in capsys.readouterr().out) == collapses


def test_the_ema_judge_follows_slowly_and_the_random_one_stays(here):
    torch.manual_seed(0)
    start = stae.Autoencoder(3, 2, 8).encoder.stem.weight
    for judge, least, most in (("ema", 1e-6, 0.01), ("random", 0, 0)):
        assert run(f"{TINY} --judge {judge} --out {judge}") == 0
        stems = [stored(judge)["objective"][f"{part}.stem.weight"] for part in ("judge", "model.encoder")]
        assert least <= (stems[0] - start).norm() / (stems[1] - start).norm() <= most


SHARED = "--judge frozen", "--judge live --transform crop", "--judge ema --masked", "--objective mse"


def two_processes(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    results, x = {}, torch.rand(6, 3, 16, 16, generator=generator(rank))
    for flags in SHARED:
        config = stae.build_parser().parse_args([*flags.split(), "--layer-weight", "1"])
        objective = stae.Objective(tiny_model(), config)
        drawn, own = objective.draw(x.shape, generator(rank)), copy.deepcopy(objective)
        own(x, *drawn)[0].backward()
        shared = nn.parallel.DistributedDataParallel(objective)
        shared(x, *drawn)[0].backward()
        results[flags] = gradients(own), gradients(objective)
    model, images = tiny_model(), (255 * torch.rand(24, 3, 16, 16, generator=generator())).byte()
    config.batch_size, config.epochs, config.precision = 6, 1, "fp32"
    stae.train(model, images, config, Path(folder))
    torch.save((results, dict(model.named_parameters())), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_gradient_of_two_processes_is_the_mean_of_theirs(tmp_path):
    torch.multiprocessing.spawn(two_processes, (tmp_path,), nprocs=2)
    results, weights = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))
    torch.testing.assert_close(*weights)  # after training on different images
    for flags in SHARED:
        (own_1, shared_1), (own_2, shared_2) = (result[flags] for result in results)
        assert any((own_1[name] - own_2[name]).abs().max() > 1e-3 for name in own_1)
        for shared in (shared_1, shared_2):
            mean = {name: (own_1[name] + own_2[name]) / 2 for name in own_1}
            torch.testing.assert_close(shared, mean, **NEAR)


def test_torchrun_trains_one_run(here):
    line = f"-m torch.distributed.run --standalone --nproc_per_node=2 {stae.__file__} {TINY}"
    done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1 and re.search(r"^psnr +\d", done.stdout, re.M)
    assert [len(log_of(folder)) for folder in here.glob("runs/*")] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--judge live", "--masked --judge ema", "--transform stack"])
def test_compiled_runs_agree_with_plain_ones(here, flags):
    for out, more in {"plain": "", "compiled": "--compile"}.items():
        assert run(f"{TINY} {flags} {more} --out {out}") == 0
    plain, compiled = (log_of(out)[1].split(",") for out in ("plain", "compiled"))
    assert [float(value) for value in compiled] == pytest.approx(list(map(float, plain)), rel=1e-3)


HOLES = {"hole_psnr", "hole_floor_psnr", "visible_psnr", "hole_sharpness", "masked_ssim"}
METRICS = set("""psnr psnr_luma psnr_chroma ssim sharpness pca_psnr sigreg min_std rankme
    probe_code probe_pca knn_code knn_pca probe_features probe_random
    code_size parameters train_seconds images_per_second""".split())
OWN = "stae-crop-frozen"


@pytest.mark.parametrize("base, flags, name", [
    *[("", f"--transform {name}", f"stae-{name}-frozen") for name in stae.TRANSFORMS if name != "crop"],
    *[("", f"--judge {name}", f"stae-crop-{name}") for name in stae.JUDGES if name != "frozen"],
    *[("", flag, OWN) for flag in (
        "--crop 0.2 0.9", "--layer-weight 1", "--sigreg-weight 0.1", "--slices 5", "--width 4", "--lr 0.02",
        "--latent-channels 4", "--latent-dim 4", "--epochs 2", "--batch-size 6", "--validation 8", "--seed 1",
        "--precision bf16", "--size 24")],
    *[("--masked", flag, f"masked-{OWN}") for flag in ("--latent-dim 3", "--layer-weight 1", "--hole 0.2")],
    ("", "--objective mse", "mse"), ("--masked", "--objective mse", "masked-mse"),
    ("", "--masked", f"masked-{OWN}"),
    *[("--transform pixel", flag, "stae-pixel-frozen") for flag in ("--seed 2", "--mask-ratio 0.5")]])
def test_flags_reach_training_and_a_run_writes_all_its_files(here, capsys, base, flags, name):
    assert run(f"{TINY} {base} --out base") == 0
    capsys.readouterr()
    assert run(f"{TINY} {base} {flags}") == 0
    first, *said = capsys.readouterr().out.splitlines()
    folder, = Path("runs").iterdir()
    assert folder.name == f"tiny-{name}-s{flags[-1] if '--seed' in flags else 0}"
    assert log_of(folder) != log_of("base")
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "comparison.png", "log.csv", "metrics.json"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == METRICS | (HOLES if "--masked" in base + flags else set())
    assert first.startswith(f"{folder}: ") and "batch_size" in first
    assert ("slices" in first) == ("--slices" in flags)  # only what is not the default
    assert run(f"{TINY} {base} {flags}") == 0 and Path(f"{folder}-2").is_dir()


@pytest.mark.parametrize("line, expected", [
    ("shapes", dict(transform="pixel", width=32, epochs=12, lr=1e-2, latent_channels=8, layer_weight=0)),
    ("cifar10", dict(transform="crop", width=64, epochs=15, lr=3e-3, latent_channels=8, batch_size=128)),
    ("celeba", dict(width=128, epochs=50, lr=1e-3, latent_channels=32, latent_dim=0)),
    ("celeba --masked", dict(transform="crop", latent_dim=128, layer_weight=10)),
    ("x.npz --lr 1", dict(width=64, lr=1, batch_size=50, epochs=375, size=32, channels=3))])
def test_presets(line, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # 1,500 steps of 2 * 50 images
    parser, images = stae.build_parser(), torch.zeros(400, 3, 32, 32)
    parser.set_defaults(**stae.preset(parser.parse_args(["--dataset", *line.split()]), images))
    assert expected.items() <= vars(parser.parse_args(["--dataset", *line.split()])).items()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_npz(folder / "tiny.npz")
    for name, flags in {"one": "", "two": "--masked --objective mse"}.items():
        assert run(f"{TINY} --dataset {folder}/tiny.npz {flags} --out {folder}/{name}") == 0
    return folder


@torch.no_grad()
def test_a_run_is_measured_and_loaded_again(runs, tmp_path):
    assert run(f"--eval {runs}/one --device cpu --out {tmp_path}/again") == 0
    folders = runs / "one", tmp_path / "again"
    table, again = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert again == pytest.approx(table)
    model, x = stae.load_model(runs / "one"), torch.rand(5, 3, 16, 16)
    stem = stored(runs / "one")["objective"]["model.encoder.stem.weight"]
    assert not model.training and torch.equal(model.encoder.stem.weight, stem)
    assert model.decode(model.encode(x)).shape == x.shape


def test_runs_are_measured_side_by_side_with_recognition(runs, monkeypatch, here):
    train = stae.train_classifier
    monkeypatch.setattr(stae, "train_classifier", lambda *args: train(*args, steps=2))
    shutil.copy(runs / "two" / "checkpoint.pt", "two.pt")
    line = f"--eval {runs}/one two.pt --dataset tiny.npz --recognition --device cpu"
    assert run(line) == run(line) == 0  # it never overwrites
    assert len([*Path("runs").glob("eval*/comparison.png")]) == 2
    one, two = json.loads(Path("runs/eval/metrics.json").read_text()).values()
    assert one.keys() == METRICS | {"recognition", "recognition_pca", "recognition_original"}
    assert two.keys() == one.keys() | HOLES and one["recognition_original"] == two["recognition_original"]


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)  # the trace that the test looks for


@pytest.fixture(scope="module")
def bad(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    x, y = write_npz(folder / "tiny.npz")
    arrays = {
        "float": dict(x=x / 255), "labels": dict(x=x, y=y[:5]), "words": dict(x=x, y=y.astype(str)),
        "code": dict(x=np.array([Code()])), "keys": dict(images=x), "two": dict(x=x[..., :2]),
        "none": dict(x=x[:0]), "single": dict(x=x[:1]), "sides": dict(x_train=x, x_test=x[:, 1:]),
        "unlabelled": dict(x=x)}
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", **array)
    whole, stem = stored(runs / "one"), torch.ones(2, 3, 4, 4)
    config, weights = whole["config"], whole["objective"]
    with torch.device("meta"):
        wide = stae.Objective(stae.Autoencoder(3, 256, 8), types.SimpleNamespace(judge="frozen")).state_dict()
    spread = {name: torch.zeros((), dtype=torch.half).expand(value.shape) for name, value in wide.items()}
    changes = {
        "code": {"history": Code()}, "keys": {"objective": {"weights": stem}}, "lacking": {"config": {}},
        "word": {"config": config | {"width": "2"}}, "wide": {"config": config | {"width": 10**9}},
        "shape": {"config": config | {"width": 4096}}, "extra": {"objective": weights | {"extra": stem}},
        "spread": {"config": config | {"width": 256}, "objective": spread}}
    for name, change in changes.items():
        torch.save(whole | change, folder / f"{name}.pt")
    (folder / "half.pt").write_bytes((runs / "one" / "checkpoint.pt").read_bytes()[:2000])
    (folder / "half.npz").write_bytes((folder / "tiny.npz").read_bytes()[:2000])
    paint(folder / "photos" / "0.png", 0)
    for name in ("empty", "broken"):
        (folder / name).mkdir()
    for name in ("text.pt", "text.npz", "notes.txt", "broken/a.png", "broken/b.jpg"):
        (folder / name).write_text("hello")
    shutil.copytree(runs / "one", folder / "done")
    return folder


LINES = """--dataset nowhere; --dataset notes.txt; --transform wavelet; --judge nobody; --objective gan;
    --size 30; --size 8; --size 32.0; --crop 0.5 0.2; --crop 0 1; --crop 0.5 1.5; --crop 0.5;
    --layer-weight -1; --sigreg-weight nan; --sigreg-weight inf; --slices 0; --width 0; --width many;
    --width 4000000000; --latent-channels 3; --latent-dim -1; --epochs 0; --epochs 1.5; --batch-size 1;
    --batch-size 25; --lr 0; --seed -1; --validation 24; --hole 0.2; --masked --hole 1; --mask-ratio 0.5;
    --transform patch --mask-ratio 2; --device tpu; --precision fp8; --out done; --out notes.txt; --epoch
    3; --bogus; --objective mse --judge ema; --objective mse --slices 5; --recognition; --dataset photos
    --out photos/run; --eval nowhere; --eval done --width 8; --eval done --out ./done; --eval done
    --objective mse; --eval done --recognition --dataset unlabelled.npz; --dataset broken; --dataset empty"""
NPZ = "float labels words code keys two none single sides half text".split()
CHECKPOINTS = "code keys lacking word wide shape extra spread half text".split()


@pytest.mark.parametrize("flags", [
    *LINES.replace("\n", "").split(";"), *(f"--dataset {name}.npz" for name in NPZ),
    *(f"--eval {name}.pt --precision fp32" for name in CHECKPOINTS)])
def test_bad_input_is_refused_in_one_line_and_leaves_no_trace(bad, monkeypatch, capsys, flags):
    monkeypatch.chdir(bad)
    before = sorted(path for path in bad.rglob("*") if path.suffix != ".cache")  # images decoded may stay
    assert run(f"{flags} --device cpu" if "--eval" in flags else f"{TINY} {flags}") == 2
    error = capsys.readouterr().err
    assert error.startswith("stae.py: error: ") and error.count("\n") == 1
    words = [word for word in flags.split() if word not in ("--dataset", "--eval", "--precision")]
    assert any(word in error for word in words if not word[0].isdecimal())
    assert sorted(path for path in bad.rglob("*") if path.suffix != ".cache") == before


@pytest.mark.parametrize("name, lines", [("stae.py", 1000), ("test_stae.py", 900)])
def test_the_code_keeps_its_limits(name, lines):
    source = (HERE / name).read_text()
    assert source.count("\n") <= lines and [line for line in source.splitlines() if len(line) > 110] == []
    nodes = list(ast.walk(ast.parse(source)))
    assert [f.name for f in nodes if isinstance(f, ast.FunctionDef) and f.end_lineno - f.lineno >= 60] == []
    starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts))  # one statement a line
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    required = {line.split(">=")[0] for line in (HERE / "requirements.txt").read_text().split()}
    assert required == {"torch", "torchvision", "numpy", "pytest"}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names <= required | {"PIL", "stae"}


def test_the_method_the_flags_and_the_readme_keep_their_limits():
    flags = [flag for flag in stae.build_parser()._option_string_actions if flag.startswith("--")]
    assert METHOD.count("\n") <= 300 and len(flags) <= 28  # with --help
    text = (HERE / "README.md").read_text()
    assert text.count("\n") <= 250 and len(text.split()) <= 2500
    assert [link for link in re.findall(r"\]\((samples/[^)#]*)\)", text) if not (HERE / link).exists()] == []


def test_the_commands_and_the_python_of_the_documentation_run(tmp_path, monkeypatch):
    def reach(*args):
        raise LookupError

    readme, pattern = (HERE / "README.md").read_text(), r"^```%s\n(.*?)^```"
    blocks = re.findall(pattern % "[a-z]*", readme, re.S | re.M)
    text = "\n".join([*blocks, stae.__doc__]).replace("\\\n", " ")
    with monkeypatch.context() as patch:
        patch.setattr(stae, "load_data", reach)
        for line in re.findall(r"^ *(?:python|torchrun .*) ?stae\.py\b([^\n#]*)", text, re.M):
            if not stae.build_parser().parse_args(shlex.split(line)).eval:
                with pytest.raises(LookupError):
                    run(line)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(HERE / "samples")
    blocks = re.findall(pattern % "python", readme, re.S | re.M)
    for block in blocks:
        exec(block, {})
    assert blocks
