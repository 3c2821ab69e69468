"""Tests of stae.py: against oracles, of properties, and of the real command line run tiny."""

import copy
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from pytest import approx, raises
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import stae

each = pytest.mark.parametrize
HERE = Path(stae.__file__).parent
README = (HERE / "README.md").read_text()
TINY = "--dataset tiny.npz --width 2 --steps 6 --batch-size 8 --lr 0.01 --precision fp32 "
TINY += "--device cpu"
NEAR = {"atol": 2e-5, "rtol": 1e-4}
SHAPE = 6, 3, 16, 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def tiny_model(latent_dim=0):
    torch.manual_seed(0)
    return stae.Autoencoder(width=4, latent_channels=4, latent_dim=latent_dim, size=16)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def with_holes(x):
    return stae.cut_holes(x, stae.draw_holes(x.shape, generator()))


@each("sizes, millions", [((32, 8), 0.135), ((128, 32), 2.13), ((128, 128, 512, 128), 36.32)])
def test_the_networks_have_the_authors_sizes(sizes, millions):
    with torch.device("meta"):
        model = stae.Autoencoder(3, *sizes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == approx(millions, rel=0.002)


def test_down_adds_the_mean_of_each_group_of_pixels():
    down, x = stae.Down(4, 4), uniform(2, 4, 6, 8)
    for weight in down.parameters():
        nn.init.zeros_(weight)
    assert_close(down(x), F.silu(F.avg_pool2d(x, 2)))


def test_up_doubles_pixels_and_adds_a_skip():
    up, x = stae.Up(4, 4), uniform(2, 4, 3, 4)
    for weight in up.conv2.parameters():
        nn.init.zeros_(weight)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert_close(up(x), F.silu(up.skip(doubled)))


def test_codes_and_images_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        z = tiny_model().encode(uniform(*SHAPE))
        assert z.dtype == tiny_model().decode(z).dtype == torch.float32


def test_a_model_returns_reconstructions():
    model, x = tiny_model().eval(), uniform(*SHAPE)
    assert torch.equal(model(x), model.decode(model.encode(x)))


def test_the_encoder_shows_features_and_what_follows_the_first_down():
    encoder, x = tiny_model().encoder, uniform(*SHAPE)
    features, inner = encoder(x)
    assert_close(inner, encoder.down1(F.silu(encoder.stem(x))))
    assert_close(features, encoder.down2(inner))


def test_codes_of_faint_features_have_deviation_1():
    code = tiny_model().norm(0.003 * normal(200, 4, 2, 2))
    assert code.std(dim=(0, 2, 3)).tolist() == approx([1] * 4, abs=0.002)


def numpy_sigreg(codes, slices):
    """The two-sided integral over [-3, 3], with complex numbers, place by place."""
    t, statistics = np.linspace(-3, 3, 33), []
    gaussian = np.exp(-(t**2) / 2)
    for place in np.moveaxis(codes.reshape(*codes.shape[:2], -1), 2, 0):
        found = np.exp(1j * (place @ slices)[..., None] * t).mean(axis=0)  # (M, 33)
        gap = np.abs(found - gaussian) ** 2 * gaussian
        statistics.append(len(codes) * (gap[:, 1:] + gap[:, :-1]).sum(axis=1) * 6 / 32 / 2)
    return np.mean(statistics)


@each("bf16", [False, True])
@each("shape", [(32, 1), (20, 64), (16, 4, 2, 3)])
def test_sigreg_and_its_gradient_agree_with_numpy(shape, bf16):
    codes, slices = 1.3 * normal(*shape) + 0.2, stae.draw_slices(shape[1], 5, generator(1))
    codes.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = stae.sigreg(codes, slices)
    value.backward()
    exact, slices = codes.detach().double().numpy(), slices.double().numpy()
    assert value.item() == approx(numpy_sigreg(exact, slices), rel=1e-4)
    step = 1e-5 * normal(*shape, seed=2).double().numpy()
    rise = numpy_sigreg(exact + step, slices) - numpy_sigreg(exact - step, slices)
    expected = 2 * (codes.grad.numpy() * step).sum()
    assert expected == approx(rise, rel=1e-3, abs=1e-9)


def test_sigreg_is_about_1_for_gaussian_codes_and_large_for_collapsed_ones():
    slices = stae.draw_slices(16, 64, generator())
    assert_close(slices.norm(dim=0), torch.ones(64))
    values = [stae.sigreg(codes, slices) for codes in normal(100, 64, 16)]
    assert np.mean(values) == approx(1.0525, abs=0.1)
    assert stae.sigreg(torch.zeros(64, 16), slices).item() == approx(0.4020 * 64, rel=1e-3)


def test_boxes_are_log_uniform_and_lie_inside():
    boxes = stae.draw_boxes((20_000, 3, 512, 900), generator(), 0.1, 0.9)
    top, _, height, width = boxes.unbind(dim=1)
    assert top.min() == 0 and (top + height).max() == 512
    assert (width / height).mean() == approx(900 / 512, abs=0.01)
    position = (width / 900 / 0.1).log() / math.log(9)  # uniform in [0, 1]
    assert position.mean() == approx(0.5, abs=0.01)
    assert position.std() == approx(12**-0.5, abs=0.01)
    assert (top / (512 - height)).mean() == approx(0.5, abs=0.01)


def test_a_crop_equals_slicing_and_interpolating():
    images = uniform(40, 3, 24, 32)
    boxes = stae.draw_boxes(images.shape, generator(1), 1e-9, 1.0)  # also of one pixel
    cropped = stae.crop(images, boxes)
    for image, found, (top, left, height, width) in zip(images, cropped, boxes):
        box = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(box, size=(24, 32), mode="bilinear")[0]
        assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_crop_of_coarse_numbers_is_as_good():
    images = uniform(40, 3, 24, 32).bfloat16()
    boxes = stae.draw_boxes(images.shape, generator(1), 1e-9, 1.0)
    assert_close(stae.crop(images, boxes), stae.crop(images.float(), boxes).bfloat16())


@each("height, width, kinds", [(16, 16, 8), (16, 24, 4)])
def test_turned_crops_are_each_symmetry_of_the_plain_ones(height, width, kinds):
    x = uniform(100, 3, height, width)
    plain = stae.draw_transform("crop", x.shape, generator(), (0.2, 0.9))(x)
    assert_close(plain, stae.crop(x, stae.draw_boxes(x.shape, generator(), 0.2, 0.9)))
    turned = stae.draw_transform("crop", x.shape, generator(), (0.2, 0.9), turn=True)(x)
    found = set()
    for image, result in zip(plain, turned):
        symmetries = [image.rot90(turns, (1, 2)) for turns in range(0, 4, 8 // kinds)]
        symmetries += [symmetry.flip(2) for symmetry in symmetries]
        equal = [torch.equal(result, symmetry) for symmetry in symmetries]
        found.add(equal.index(True))
    assert len(found) == kinds


@each("name, cell", [("pixel", 1), ("patch", 4)])
def test_masks_black_out_an_exact_count_of_cells_in_all_channels(name, cell):
    T = stae.draw_transform(name, (50, 3, 16, 24), generator(), mask_ratio=0.7)
    kept = F.avg_pool2d(T(torch.ones(50, 3, 16, 24)), cell)
    assert kept.unique().tolist() == [0, 1]
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 0], kept[:, 2])
    black = (kept[:, 0] == 0).sum(dim=(1, 2))
    cells = 16 * 24 // cell**2
    assert black.unique().tolist() == [round(0.7 * cells)]
    share = kept.mean(dim=0)  # no place is always kept, or never
    assert share.min() > 0 and share.max() < 1


def test_channels_are_black_by_chance():
    T = stae.draw_transform("channel", (3000, 3, 8, 8), generator(), mask_ratio=0.7)
    keep = T(torch.ones(3000, 3, 8, 8)).mean(dim=(2, 3))
    assert len(keep.unique(dim=0)) == 8 and keep.mean() == approx(0.3, abs=0.03)


@each("name", stae.TRANSFORMS)
def test_a_transform_does_the_same_to_both_images_and_for_a_seed(name):
    x, other = uniform(*SHAPE), uniform(*SHAPE, seed=1)
    other[0] = x[0]
    drawn, again, another = (
        stae.draw_transform(name, x.shape, generator(seed), turn=True) for seed in (0, 0, 1)
    )
    assert torch.equal(drawn(x)[0], drawn(other)[0]) and torch.equal(drawn(x), again(x))
    assert torch.equal(drawn(x), another(x)) == (name == "none")


@each("height", [24, 16])
@each("ratio", [1e-6, 0.35, 0.999])
def test_holes_have_their_area_and_the_mean_colour_of_the_whole_image(ratio, height):
    images = uniform(300, 3, height, 24)
    holes = stae.draw_holes(images.shape, generator(), ratio)
    share = min(ratio**0.5, 1 - 1 / height)
    rows, columns = max(1, round(share * height)), max(1, round(share * 24))
    assert holes[:, 2:].unique(dim=0).tolist() == [[rows, columns]]
    expected, mask = images.clone(), torch.zeros(300, 1, height, 24)
    for index, (top, left, _, _) in enumerate(holes):
        mask[index, :, top : top + rows, left : left + columns] = 1
        mean = images[index].mean(dim=(1, 2)).view(3, 1, 1)
        expected[index, :, top : top + rows, left : left + columns] = mean
    assert torch.equal(stae.hole_mask(holes, images), mask)
    assert_close(stae.cut_holes(images, holes), expected)


class Layers(nn.Sequential):
    """A foreign encoder, with what behaves otherwise in train mode."""

    def forward(self, images):
        inner = self[1](self[0](images))
        return [self[3](self[2](inner)), inner]


class Foreign(nn.Module):
    """A model that is not ours, with codes (B, 8)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        inner, last = nn.Conv2d(3, 4, 4, 4), nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        self.encoder = Layers(inner, nn.BatchNorm2d(4), nn.Dropout(0.2), last)
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.decoder = nn.Sequential(nn.Linear(8, 768), nn.Unflatten(1, (3, 16, 16)))

    def encode(self, images):
        return self.norm(self.encoder(images)[0])

    def decode(self, code):
        return self.decoder(code).sigmoid()


@each("places", [(), (2, 3)])
def test_the_distance_and_its_gradient_by_hand(places):
    target, seen, inner, seen_inner = (0.01 * normal(4, 6, 3, *places)).unbind()
    target.requires_grad_()  # as under a live judge
    a, b = target.transpose(0, 1).flatten(1), seen.transpose(0, 1).flatten(1)  # (channels, rest)
    variance = a.var(dim=1, correction=0, keepdim=True)
    expected = ((b - a) ** 2 / (variance + 1e-6)).mean()
    found = stae.distance(target, seen)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, target), torch.autograd.grad(expected, target))
    error, variance = (seen_inner - inner).square().mean(), inner.var(correction=0)
    expected = found + 0.5 * error / (variance + 1e-4)
    lists = [target, inner, 2 * inner], [seen, seen_inner, 2 * inner]
    assert stae.distance(*lists) == found
    assert_close(stae.distance(*lists, layer_weight=0.5), expected)


def test_the_distance_of_coarse_features_is_computed_in_float32():
    lists = [
        [normal(6, 3, 4, 4, seed=seed).bfloat16() for seed in pair] for pair in ((0, 1), (2, 3))
    ]
    exact = [[features.float() for features in both] for both in lists]
    found = stae.distance(*lists, layer_weight=0.5)
    assert torch.equal(found, stae.distance(*exact, layer_weight=0.5))


def loss_by_hand(model, masked, x, transform, slices, judge, weight):
    """The losses in plain autograd; our functions are d and SIGReg alone."""
    if not masked:
        z = model.encode(x)
        target, seen = judge(transform(x)), judge(transform(model.decode(z)))
        return stae.distance(target, seen, weight) + 0.07 * stae.sigreg(z, slices)
    z, z_holed = model.encode(torch.cat((x, with_holes(x)))).chunk(2)  # one call, one norm
    x_hat, x_holed = model.decode(z), model.decode(z_holed)
    target = judge(transform(x))
    total = stae.distance(target, judge(transform(x_hat)), weight)
    total = total + stae.distance(target, judge(transform(x_holed)), weight)
    total = total + stae.distance(judge(x_hat), judge(x_holed))
    regulariser = stae.sigreg(z, slices) + stae.sigreg(z_holed, slices)
    return total / 3 + 0.07 * regulariser / 2


MODELS = {"ours": tiny_model, "global": lambda: tiny_model(5), "foreign": Foreign}


@each("masked", [False, True])
@each("live", [False, True])
@each("name", [f"ours {T}" for T in stae.TRANSFORMS] + ["global crop", "foreign crop"])
def test_losses_and_gradients_agree_with_plain_autograd(name, live, masked):
    name, T = name.split()
    x, ours, theirs = uniform(*SHAPE), MODELS[name](), MODELS[name]()
    slices = stae.draw_slices(ours.norm.num_features, 8, generator())
    rest = stae.draw_transform(T, x.shape, generator(), turn=True), slices
    torch.manual_seed(1)  # of dropout
    judge = ours.encoder if live else stae.freeze(ours.encoder)
    if masked:
        found, _ = stae.masked_loss(ours, x, with_holes(x), *rest, judge, 0.07, 0.5)
    else:
        found, _ = stae.stae_loss(ours, x, *rest, judge, 0.07, 0.5)
    found.backward()
    torch.manual_seed(1)
    fixed = copy.deepcopy(theirs.encoder).eval().requires_grad_(False)
    expected = loss_by_hand(theirs, masked, x, *rest, theirs.encoder if live else fixed, 0.5)
    expected.backward()
    assert_close(found, expected, **NEAR)
    assert_close(gradients(ours), gradients(theirs), **NEAR)
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_the_baseline_compares_pixels():
    model, x = tiny_model(), uniform(*SHAPE)
    x_hat = model.decode(model.encode(with_holes(x)))
    loss, _ = stae.mse_loss(model, x, with_holes(x))
    assert_close(loss, (x_hat - x).square().mean())


def test_what_the_judge_does_not_see_has_no_part_in_the_loss():
    encoder, x = tiny_model().encoder, uniform(*SHAPE)
    x_hat = uniform(*SHAPE, seed=1).requires_grad_()

    def judge_of_the_left_half(images):
        return encoder(images[..., :8])

    model = SimpleNamespace(encode=lambda x: x[:, :, 0, 0], decode=lambda z: x_hat)
    T, slices = lambda y: y, torch.rand(3, 8)
    loss, _ = stae.stae_loss(model, x, T, slices, judge_of_the_left_half, layer_weight=1.0)
    loss.backward()
    assert x_hat.grad[..., 8:].abs().max() == 0
    assert x_hat.grad[..., :8].abs().min() > 0


def test_a_judge_leaves_the_encoder_as_it_was():
    encoder, x = Foreign().encoder, uniform(*SHAPE)
    encoder[0].eval()  # a mode of its own
    before = copy.deepcopy(encoder)
    stae.freeze(encoder)(x)[0].sum()
    assert_close(encoder.state_dict(), before.state_dict())
    assert [m.training for m in encoder.modules()] == [m.training for m in before.modules()]


def test_any_model_learns():
    x, model, losses = uniform(24, 3, 4, 4).repeat_interleave(4, 2), Foreign(), []
    x = x.repeat_interleave(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(50):
        transform = stae.draw_transform("crop", x.shape, generator(step))
        slices, judge = stae.draw_slices(8, 8, generator(step)), stae.freeze(model.encoder)
        loss, _ = stae.stae_loss(model, x, transform, slices, judge)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@each("name", stae.TRANSFORMS)
@each("kind", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_takes_a_step(kind, name):
    model, x = tiny_model().to(kind), uniform(*SHAPE).to(kind)
    transform = stae.draw_transform(name, x.shape, generator(), turn=True)
    slices, judge = stae.draw_slices(4, 8, generator()), stae.freeze(model.encoder)
    loss, _ = stae.masked_loss(model, x, with_holes(x), transform, slices, judge)
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


X = uniform(*SHAPE)
NARROW = SimpleNamespace(encode=lambda x: x[:, :, 0, 0], decode=lambda z: X[..., :8])
WRONG_USE = {
    "'wavelet'.*pixel": lambda: stae.draw_transform("wavelet", SHAPE, None),
    r"crop_range \(0.5, 0.2\)": lambda: stae.draw_transform("crop", SHAPE, None, (0.5, 0.2)),
    "mask_ratio 0": lambda: stae.draw_transform("pixel", SHAPE, None, mask_ratio=0),
    "mask_ratio 1": lambda: stae.draw_transform("pixel", SHAPE, None, mask_ratio=1),
    "ratio 1:": lambda: stae.draw_holes(SHAPE, None, 1),
    "--steps 3.7: must be int": lambda: stae.Settings(steps=3.7),
    "--masked 'no': must be bool": lambda: stae.Settings(masked="no"),
    "--precision auto": lambda: stae.train(stae.Settings(size=16), X.byte(), "cpu", Path()),
    "--size 0: the images have 16": lambda: stae.train(stae.Settings(), X.byte(), "cpu", Path()),
    "must be uint8, from 0 to 255": lambda: stae.train(stae.Settings(), X, "cpu", Path()),
    "in train mode": lambda: stae.evaluate(tiny_model(), X.byte(), X.byte(), "cpu"),
    "float32: must be uint8": lambda: stae.evaluate(Paler(), X, X, "cpu"),
    "layer_weight 2.0.*no inner": lambda: stae.distance(X, X, layer_weight=2.0),
    "but .* of x_hat": lambda: stae.distance([X, X], [X], layer_weight=2.0),
    "but .*1, 1.* of x_hat": lambda: stae.distance([X, X], [X, X[:, :, :1, :1]], layer_weight=2.0),
    r"features \(6, 3, 16\).*tokens": lambda: stae.distance(X[..., 0], X[..., 0]),
    r"features .*3\)\] of x, but .*8\)\] of": lambda: stae.distance(X[..., 0, 0], X[:, 0, 0, :8]),
    r"features \(1, 3\)": lambda: stae.distance([X[:1, :, 0, 0]], [X[:1, :, 0, 0]]),
    r"codes \(6, 3, 16\)": lambda: stae.sigreg(X[..., 0], torch.rand(3, 8)),
    r"codes \(6, 3\), slices of 4: need \(N, 4\)": lambda: stae.sigreg(
        X[..., 0, 0], torch.rand(4, 8)
    ),
    r"decodes \(6, 3, 16, 8\)": lambda: stae.stae_loss(NARROW, X, abs, torch.rand(3, 8), abs),
    r"decodes \(6, 3, 16, 8\) from \(6, 3, 16, 16\)": lambda: stae.mse_loss(NARROW, X),
    "6 channels: must divide 16": lambda: stae.Down(4, 6),
}


@each("message", WRONG_USE)
def test_wrong_use_is_refused(message):
    with raises(ValueError, match=message):
        WRONG_USE[message]()


def test_sections_1_to_4_run_alone_with_torch():
    source, names = Path(stae.__file__).read_text(), {}
    method = source[source.index("\n# 1. ") : source.index("\n# 5. ")]
    exec("import torch\nimport torch.nn.functional as F\nfrom torch import nn\n" + method, names)
    alone, x = SimpleNamespace(**names), uniform(*SHAPE)
    model = alone.Autoencoder(3, 4, 4)
    transform = alone.draw_transform("crop", x.shape, generator(), turn=True)
    slices, judge = alone.draw_slices(4, 8, generator()), alone.freeze(model.encoder)
    holed = alone.cut_holes(x, alone.draw_holes(x.shape, generator()))
    loss, _ = alone.masked_loss(model, x, holed, transform, slices, judge)
    loss.backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def test_nothing_on_a_cuda_device_meets_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)  # a fake tensor has no values
    with FakeTensorMode() as fake, torch.device("cuda"):  # shapes alone; refuses mixed devices
        model, x, slices = stae.Autoencoder(3, 4, 4), torch.rand(SHAPE), torch.rand(4, 8)
        images, holes = x.byte(), torch.ones(6, 4).long()

    def turned_crop(x):
        return stae.apply_symmetries(stae.crop(x, holes), holes[:, 0])

    with fake:
        holed = stae.cut_holes(x, holes)
        rest = slices, stae.freeze(model.encoder), 0.03, 1.0
        loss, _ = stae.masked_loss(model, x, holed, turned_crop, *rest)
        assert loss.device.type == "cuda"
        for measured in (model.eval(), stae.PCA(images, 4, "cuda")):
            stae.evaluate(measured, images, images, "cuda", holes)
        stae.play(model, x)
        with raises(Exception, match="cpu"):
            stae.ssim(x, torch.rand(SHAPE))


def write_npz(path, **changes):
    """Write 24 images to train on and 10 to test on, or others -> those written by default."""
    coarse = np.random.default_rng(0).integers(0, 256, (34, 2, 2, 3), dtype=np.uint8)
    x = coarse.repeat(8, axis=1).repeat(8, axis=2)
    y = np.arange(34) % 3
    arrays = {"x_train": x[:24], "y_train": y[:24], "x_test": x[24:], "y_test": y[24:]}
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def paint(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (grey, grey, grey)).save(path)


def greys(images):
    return sorted(images[:, 0, 0, 0].tolist())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder that holds tiny.npz: 24 images to train on, 10 to test on."""
    monkeypatch.chdir(tmp_path)
    write_npz("tiny.npz")
    return tmp_path


def test_shapes_are_the_same_bytes_everywhere():
    images, rest = stae.load_data("shapes")
    assert images.shape == (10_000, 1, 32, 32) and rest.shape == (2_000, 1, 32, 32)
    digest = hashlib.sha256(torch.cat((images, rest)).numpy()).hexdigest()
    assert digest[:16] == "3a6dbf5ae9b76fe8"


def test_an_npz_is_read_as_it_is(here):
    x = write_npz("a.npz", names=np.array([None]))  # what is not used may be of any kind
    train, test = stae.load_data("a.npz")
    assert torch.equal(train, x[:24]) and torch.equal(test, x[24:])


def test_grey_images_that_are_not_square_are_cut_and_resized(here):
    grey = np.zeros((10, 16, 24), np.uint8)
    grey[:, :, 4:20] = np.arange(10).reshape(-1, 1, 1)
    write_npz("b.npz", x_train=grey, x_test=grey)
    assert stae.load_data("b.npz")[1].shape == (10, 1, 16, 16)
    train, _ = stae.load_data("b.npz", size=8)
    assert train.shape == (10, 1, 8, 8) and train.unique().tolist() == [*range(10)]


class Code:
    """Pickled, it makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


ZEROS = np.zeros((10, 16, 16, 3), np.uint8)
BAD_NPZ = [  # what is changed of a good one, and what the error says
    (dict(x_test=None, x_val=ZEROS), r"needs x_test; found x_train uint8 \(24, 16.*x_val"),
    (dict(x_test=ZEROS / 255), "must be uint8.*x_test float64"),
    (dict(x_train=ZEROS == 0), "must be uint8.*x_train bool"),
    (dict(x_train=ZEROS + 1), "x_train is of 0 and 1 alone; multiply it by 255"),
    (dict(x_test=ZEROS[..., :2]), r"must be uint8.*\(10, 16, 16, 2\)"),
    (dict(x_test=ZEROS[:0]), r"must be uint8.*\(0, 16, 16, 3\)"),
    (dict(x_test=ZEROS[:, 1:]), r"differ in size or channels.*\(10, 15, 16, 3\)"),
    (dict(x_test=np.array([Code()])), "bad.npz: cannot be read.*pickle"),
]


@each("changes, message", BAD_NPZ)
def test_a_bad_npz_is_refused_with_what_was_found(here, changes, message):
    write_npz("bad.npz", **changes)
    with raises(stae.BadInput, match=message):
        stae.load_data("bad.npz")
    assert not Path("ran").exists()


def test_images_of_all_kinds_are_decoded(here):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = 255 * (pixels[..., 3] > 99)
    colour, clear, grey = Image.fromarray(pixels[..., :3]), pixels[..., 3:] == 0, pixels[..., :1]
    exif, text, wide = Image.Exif(), PngImagePlugin.PngInfo(), grey[..., 0] * np.uint16(257)
    exif[0x0112] = 6  # to be turned by 90 degrees
    text.add_text("parameters", "a" * 3_000_000, zip=True)
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x09nonsense"
    palette, cmyk = colour.quantize(16), colour.convert("CMYK")
    cases = [  # a file, the image in it, how to save it, the pixels that are expected
        ("turned.PNG", colour, {"exif": exif}, np.rot90(colour, -1)),
        ("exif.png", colour, {"exif": broken}, colour),
        ("text.png", colour, {"pnginfo": text}, colour),
        ("palette.png", palette, {}, palette.convert("RGB")),
        ("cmyk.TIFF", cmyk, {}, cmyk.convert("RGB")),
        ("clear.png", Image.fromarray(pixels), {}, np.where(clear, 255, colour)),
        ("grey.bmp", colour.getchannel(0), {}, grey),
        ("16.tif", Image.fromarray(wide), {}, grey),
        ("16.png", Image.fromarray(wide), {}, grey),
    ]
    for name, image, how, expected in cases:
        image.save(name, **how)
        found, _ = stae.read_images([name], 16)
        assert (found[0].permute(1, 2, 0).numpy() == np.asarray(expected)).all(), name
    Image.fromarray(wide.astype(np.int32)).save("32.tif")
    with raises(stae.BadInput, match="no known range"):
        stae.read_images(["32.tif"], 16)


def test_a_large_jpeg_is_decoded_as_well_at_a_part_of_its_size(here):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    large = Image.fromarray(pixels).resize((512, 384), Image.Resampling.BICUBIC)
    large.save("large.jpg", quality=95)
    images, _ = stae.read_images(["large.jpg"], 32)
    found = images[0].permute(1, 2, 0).int().numpy()
    centre = large.resize((32, 32), Image.Resampling.BILINEAR, (64, 0, 448, 384))
    assert np.abs(found - np.asarray(centre)).mean() < 0.8


def test_what_is_no_picture_in_a_folder_is_left_out_and_told(here, capsys):
    names = "a.png deep/er/b.JPG e.heic.png .c.png ._d.png .x/f.png @eaDir/f.png __MACOSX/f.png"
    for index, name in enumerate(names.split()):
        paint(here / "photos" / name, 10 * index)
    paint(here / "elsewhere" / "g.png", 100)
    Path("photos/h.heic").write_text("no decoder")
    Path("photos/t.jpg").write_text("hello")
    Path("photos/linked").symlink_to(here / "elsewhere")
    Path("photos/i.png").symlink_to(here / "elsewhere" / "g.png")
    Path("photos/deep/circle").symlink_to(here / "photos")
    train, test = stae.load_data("photos", size=16)
    assert sorted(greys(train) + greys(test)) == [0, 10, 20, 100, 100]
    said = capsys.readouterr().out
    assert "left out 5: hidden; the first is ._d.png" in said
    assert "left out 1: a link in a circle; the first is deep/circle" in said
    assert "left out 1: not a kind that is read here, .heic; the first is h.heic" in said
    assert "left out 1 that cannot be read, the first is photos/t.jpg" in said
    images, readable = stae.read_images(["photos/t.jpg", "elsewhere/g.png"], 16)
    assert images.unique().tolist() == [100] and readable.tolist() == [False, True]


def test_the_first_images_are_not_all_of_one_folder(here):
    for name in [
        f"{part}/{number}.png" for part in ("train/a", "test/a", "test/b") for number in range(20)
    ]:
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).touch()
    _, test = stae.list_folder(Path("photos"))
    assert {path.parent.name for path in test[:16]} == {"a", "b"}


SPLITS = [("train", "test"), ("Train", "VALID"), ("train", "val"), ("a/b/train", "a/b/test")]


@each("first, second", SPLITS)
def test_a_folder_with_splits(here, capsys, first, second):
    for index in range(3):
        paint(here / "photos" / first / f"{index}.png", index)
        paint(here / "photos" / second / "deep" / f"{index}.png", 10 + index)
    paint(here / "photos" / "cover.png", 20)
    paint(here / "photos" / first / "../other" / "0.png", 20)
    train, test = stae.load_data("photos")
    assert train.shape == test.shape == (3, 3, 64, 64)
    assert greys(train) == [0, 1, 2] and greys(test) == [10, 11, 12]
    assert re.search(r"left out 2: in neither split; the first is", capsys.readouterr().out)
    for path in Path("photos", second).rglob("*.png"):
        path.write_text("hello")
    with raises(stae.BadInput, match="none of 3 images can be read"):
        stae.load_data("photos")


def test_new_images_move_no_old_one_between_the_splits(here):
    splits = []
    for count in (2, 60, 120):
        for index in range(count):
            paint(here / "photos" / f"{index % 7}-{index}.png", index)
        splits.append([set(files) for files in stae.list_folder(here / "photos")])
    (few, one), (train, test), (more_train, more_test) = splits
    assert len(few) == len(one) == 1 and len(more_train | more_test) == 120
    assert train <= more_train and test <= more_test and 2 <= len(test) <= 12


@each("inside", ["", "img_align_celeba"])  # as Kaggle packs it
def test_celeba_is_split_by_number_and_cut_to_its_centre(here, inside):
    folder = here / "celeba" / "img_align_celeba" / inside
    folder.mkdir(parents=True)
    for index, number in enumerate((1, 162_770, 162_771, 182_637, 182_638, 202_599)):
        face = Image.new("RGB", (178, 218), "white")
        face.paste((10 * index,) * 3, (25, 45, 153, 173))
        face.putpixel((25, 45), (7, 7, 7))  # the corner of what is to be cut out
        face.save(folder / f"{number:06}.jpg", format="PNG")  # exact pixels
    train, test = stae.load_data("celeba", str(here))
    assert train.shape == test.shape == (2, 3, 128, 128)
    assert train.unique().tolist() == [0, 7, 10] and test.unique().tolist() == [7, 40, 50]
    assert greys(train) == greys(test) == [7, 7]


def test_cifar10_is_read_in_torchvisions_layout(monkeypatch):
    def stored(root, train, download):
        data = np.full((40 if train else 10, 32, 32, 3), [50 * train, 60, 70], np.uint8)
        return SimpleNamespace(data=data)

    monkeypatch.setattr(stae.datasets, "CIFAR10", stored)
    train, test = stae.load_data("cifar10")
    assert train[39, :, 0, 0].tolist() == [50, 60, 70] and greys(test) == [0] * 10


def run(line):
    return stae.main(shlex.split(line))


def stored(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def log_of(folder):
    """The rows of log.csv without what depends on the clock."""
    return [line.rsplit(",", 2)[0] for line in Path(folder, "log.csv").read_text().splitlines()]


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("stae.py: error: ") and error.count("\n") == 1
    return error


def change_call(monkeypatch, owner, name, count, change):
    """Let the count-th call of a function go through `change` instead; all others as ever."""
    function, calls = getattr(owner, name), []

    def changed(*arguments):
        calls.append(1)
        return change(function, *arguments) if len(calls) == count else function(*arguments)

    monkeypatch.setattr(owner, name, changed)


def interrupt(function, *arguments):
    raise KeyboardInterrupt


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(stae, "LOG_STEPS", 2)
    monkeypatch.setattr(stae, "SAVE_SECONDS", 0.0)


STOPS = [  # flags, and in which call of what the run is stopped
    ("", stae, "step_loss", 1),
    ("--judge live --precision bf16", stae, "step_loss", 4),
    ("--masked --latent-dim 3 --transform pixel", stae, "step_loss", 5),
    ("--objective mse", torch, "save", 2),
    ("--masked --objective mse", Path, "replace", 2),
    ("--transform patch", stae, "report", 1),
    ("", stae.csv, "DictWriter", 3),
]


@each("flags, owner, name, count", STOPS)
def test_a_stopped_run_ends_as_if_nothing_had_happened(
    here, often, monkeypatch, capsys, flags, owner, name, count
):
    assert run(f"{TINY} {flags} --out whole") == 0
    change_call(monkeypatch, owner, name, count, interrupt)
    assert run(f"{TINY} {flags}") == 130
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert run(f"{TINY} {flags}") == 0
    [folder] = Path("runs").iterdir()
    for part in ("model", "optimizer"):
        whole, resumed = stored("whole")[part], stored(folder)[part]
        states = resumed.get("state", resumed), whole.get("state", whole)
        assert_close(*states, rtol=0, atol=0)
    assert log_of(folder) == log_of("whole")
    assert sorted(os.listdir(folder)) == sorted(os.listdir("whole"))


def test_the_same_command_measures_a_finished_run_again(here):
    assert run(TINY) == 0
    [folder] = Path("runs").iterdir()
    before = (folder / "checkpoint.pt").read_bytes()
    (folder / "metrics.json").unlink()
    assert run(TINY) == 0
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert (folder / "metrics.json").exists()
    assert run(f"{TINY} --lr 0.02") == 0 and len(os.listdir("runs")) == 2


def test_a_run_goes_on_with_what_it_began_with_alone(here, capsys):
    assert run(f"{TINY} --precision bf16 --out run") == 0
    assert run(f"{TINY} --precision auto --out run") == 0
    capsys.readouterr()
    assert run(f"{TINY} --lr 0.02 --out run") == 2
    error = one_line(capsys)
    assert "precision bf16, here fp32" in error and "lr 0.01, here 0.02" in error
    write_npz("tiny.npz", x_train=ZEROS)
    assert run(f"{TINY} --precision auto --out run") == 2
    assert "images have changed" in one_line(capsys)


def test_train_refuses_the_run_of_other_settings(runs):
    images = torch.zeros(24, 3, 16, 16, dtype=torch.uint8)
    settings = stae.Settings(size=16, precision="fp32")
    before = (runs / "one" / "checkpoint.pt").read_bytes()
    with raises(stae.BadInput, match="is another run.*steps 6, here 1875"):
        stae.train(settings, images, "cpu", runs / "one")
    assert (runs / "one" / "checkpoint.pt").read_bytes() == before


def test_two_runs_do_not_mix_in_one_folder(here, often, monkeypatch, capsys):
    def begin_another(step_loss, *arguments):
        assert run(f"{TINY} --lr 0.02 --out run") == 0
        capsys.readouterr()
        return step_loss(*arguments)

    change_call(monkeypatch, stae, "step_loss", 2, begin_another)
    assert run(f"{TINY} --out run") == 2
    assert "another run was started in it" in one_line(capsys)
    assert stored("run")["settings"]["lr"] == 0.02


def test_a_batch_of_more_images_than_there_are_is_told(here, capsys):
    assert run(f"{TINY} --batch-size 128 --out run") == 0
    assert "--batch-size 128: there are 24 images" in capsys.readouterr().out


@each("out, named", [("photos/run", "among"), ("photos", "among"), ("mine", "comparison.png")])
def test_a_run_overwrites_nothing_and_keeps_out_of_its_images(here, capsys, out, named):
    for name in ("photos/0.png", "photos/1.png", "photos/2.png", "mine/comparison.png"):
        paint(here / name, 0)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert run(f"{TINY} --dataset photos --out {out}") == 2
    assert named in one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_the_rate_rises_over_100_steps_and_falls_to_a_twentieth():
    rates = [stae.learning_rate(step, 2100, 2.0) for step in range(2100)]
    assert rates[:100] == approx([2 * (step + 1) / 100 for step in range(100)])
    assert rates[100] == 2 and rates[1100] == approx(1.05) and rates[-1] == approx(0.1, rel=1e-4)
    falls = [rate - later for rate, later in zip(rates[100:], rates[101:])]
    assert min(falls) > 0


WIRING = dict(size=16, width=4, latent_channels=4, slices=8, transform="crop", crop_min=0.3)
WIRING |= dict(crop_max=0.8, turn=True, hole=0.2, layer_weight=0.5, sigreg_weight=0.07)
WIRING |= dict(precision="fp32", batch_size=8, steps=3, seed=5)


@each("objective", ["stae", "mse"])
@each("masked", [False, True])
@each("judge", ["frozen", "live"])
def test_a_step_has_the_loss_that_its_settings_name(objective, masked, judge):
    settings = stae.Settings(**WIRING, objective=objective, masked=masked, judge=judge)
    x, ours, theirs, draws = uniform(*SHAPE), tiny_model(), tiny_model(), generator(1)
    loss, _ = stae.step_loss(ours, settings, x, generator(1))
    loss.backward()
    holed = stae.cut_holes(x, stae.draw_holes(x.shape, draws, 0.2)) if masked else None
    if objective == "mse":
        expected, _ = stae.mse_loss(theirs, x, holed)
    else:
        transform = stae.draw_transform("crop", x.shape, draws, (0.3, 0.8), turn=True)
        rest = transform, stae.draw_slices(4, 8, draws)
        seer = theirs.encoder if judge == "live" else stae.freeze(theirs.encoder)
        if masked:
            expected, _ = stae.masked_loss(theirs, x, holed, *rest, seer, 0.07, 0.5)
        else:
            expected, _ = stae.stae_loss(theirs, x, *rest, seer, 0.07, 0.5)
    expected.backward()
    assert torch.equal(loss, expected)
    assert_close(gradients(ours), gradients(theirs), **NEAR)


def test_training_is_adamw_with_clipping_on_seeded_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(stae, "LOG_STEPS", 2)
    settings, images = stae.Settings(**WIRING, lr=0.05), bytes_of(24, 3, 16, 16)
    trained = stae.train(settings, images, "cpu", str(tmp_path))
    torch.manual_seed(5)
    model = stae.Autoencoder(3, 4, 4, size=16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for step, batch in stae.draw_batches(images, settings, 0):
        draws = stae.seeded("cpu", 5, step, 0, 1)
        model.norm.momentum = 1 / (step + 1)
        loss, _ = stae.step_loss(model, settings, batch / 255, draws)
        optimizer.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
        optimizer.param_groups[0]["lr"] = stae.learning_rate(step, 3, 0.05)
        optimizer.step()
        losses.append(loss.item())
    # Adam divides by small gradients, so that rounding shows; a step moves weights by 0.05
    assert_close(dict(trained.state_dict()), dict(model.state_dict()), atol=1e-3, rtol=1e-3)
    rows = stored(tmp_path)["history"]
    means = [sum(losses[:2]) / 2, losses[2]]
    assert [row["loss"] for row in rows] == approx(means, rel=1e-4)
    assert [row["seconds"] * row["images_per_second"] for row in rows] == approx([16, 8])


def test_steps_and_epochs_of_all_seeds_have_draws_of_their_own():
    keys = [(seed, step, 0, end) for seed in (0, 1) for step in (0, 1, 2) for end in (0, 1)]
    assert len({stae.seeded("cpu", *key).initial_seed() for key in keys}) == 12


def test_checkpoints_are_a_minute_apart(tmp_path, monkeypatch):
    clock, saved = iter(range(0, 10_000, 10)), []  # each look at it takes 10 seconds
    monkeypatch.setattr(stae.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(stae, "LOG_STEPS", 1)
    monkeypatch.setattr(stae, "save_checkpoint", lambda *all: saved.append(all[4][-1]["step"]))
    settings = stae.Settings(**WIRING | {"steps": 12})
    stae.train(settings, bytes_of(8, 3, 16, 16), "cpu", tmp_path)
    assert saved == [3, 6, 9, 12]  # a step takes 30 seconds, so each second one would be too soon


def test_other_images_have_another_fingerprint():
    images = bytes_of(2001, 3, 4, 4)
    before = stae.fingerprint(images)
    images[1999, 2, 3, 3] += 1
    assert stae.fingerprint(images) != before


def test_another_stae_py_makes_another_run(tmp_path, monkeypatch):
    before = stae.run_folder(stae.Settings())
    (tmp_path / "stae.py").write_text("another")
    monkeypatch.setattr(stae, "__file__", str(tmp_path / "stae.py"))
    assert stae.run_folder(stae.Settings()) != before


def test_every_epoch_has_all_images_in_an_order_of_its_own():
    def batches(first=0, seed=0):
        settings = stae.Settings(steps=6, batch_size=8, seed=seed)
        return [x.tolist() for _, x in stae.draw_batches(torch.arange(24), settings, first)]

    drawn = batches()
    first, second = sum(drawn[:3], []), sum(drawn[3:], [])
    assert sorted(first) == sorted(second) == list(range(24)) and first != second
    assert batches(first=4) == drawn[4:]
    assert batches(seed=1) != drawn


def test_short_runs_have_the_averages_of_their_images(tmp_path):
    settings = stae.Settings(steps=12, batch_size=100, width=4, lr=1e-9, size=16, precision="fp32")
    images = (255 * uniform(24, 3, 16, 16)).byte()  # fewer than a batch
    model = stae.train(settings, images, "cpu", tmp_path / "new")
    assert not model.training
    features = model.encoder(images.float() / 255)[0].detach()
    assert_close(model.norm.running_mean, features.mean(dim=(0, 2, 3)), **NEAR)
    assert_close(model.norm.running_var, features.var(dim=(0, 2, 3)), **NEAR)
    assert model.norm.momentum == 0.1


def make_loss_nan(function, *arguments):
    loss, terms = function(*arguments)
    return loss * math.nan, terms


def make_gradient_nan(function, model, *arguments):
    loss, terms = function(model, *arguments)
    weight = model.encoder.stem.weight
    return loss + (weight - weight.detach()).abs().sum().sqrt(), terms


def fill_disk(write, path, data):
    write(path, data[:100])
    raise OSError(28, "No space left on device")


FAILURES = [
    (stae, "step_loss", 3, make_loss_nan, "step 4: loss is not finite"),
    (stae, "step_loss", 4, make_gradient_nan, "step 4: gradient_norm is not finite"),
    (Path, "write_bytes", 2, fill_disk, "No space left on device"),
]


@each("owner, name, count, change, message", FAILURES)
def test_a_run_that_fails_keeps_its_last_checkpoint(
    here, often, monkeypatch, capsys, owner, name, count, change, message
):
    change_call(monkeypatch, owner, name, count, change)
    assert run(f"{TINY} --out run") == 1
    assert message in one_line(capsys)
    assert stored("run")["history"][-1]["step"] == 2
    assert sorted(os.listdir("run")) == ["checkpoint.pt", "log.csv"]


def run_out_of_memory(*arguments):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def fail(*arguments):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_full_memory_is_one_line_but_a_bug_has_its_traceback(here, monkeypatch, capsys):
    change_call(monkeypatch, stae, "train", 1, run_out_of_memory)
    assert run(f"{TINY} --out run") == 1
    assert "allocate 8 bytes" in one_line(capsys)
    change_call(monkeypatch, stae, "train", 1, fail)
    with raises(RuntimeError, match="illegal memory access"):
        run(f"{TINY} --out run")


PRESETS = """shapes: transform=pixel width=32 lr=0.01 batch_size=64 turn=False slices=16
    cifar10: transform=crop width=64 lr=0.003 batch_size=128 turn=True latent_channels=8
    cifar10 --lr 0.5 --no-turn: lr=0.5 width=64 turn=False
    x.npz: transform=crop width=64 steps=5760 turn=True
    celeba: width=128 lr=0.001 latent_channels=32 latent_dim=0 steps=63000 slices=64
    celeba --latent-channels 16 --slices 9: latent_channels=16 slices=9
    celeba --masked: latent_dim=128 latent_channels=128 slices=256 layer_weight=10.0 turn=False
    celeba --masked --latent-channels 64 --layer-weight 0: latent_channels=64 layer_weight=0.0
    shapes --masked: latent_dim=0 latent_channels=8 layer_weight=10.0 turn=False"""


@each("case", PRESETS.splitlines())
def test_flags_beat_the_preset_which_beats_the_defaults(case):
    line, expected = case.split(": ")
    settings = stae.choose_settings(stae.parse_flags(["--dataset", *line.split()])[1])
    for pair in expected.split():
        name, value = pair.split("=")
        assert str(getattr(settings, name)) == value


CHANGES = """--dataset other.npz; --size 24; --objective mse; --masked; --masked --hole 0.2
    --transform pixel; --crop-min 0.2; --crop-max 0.7; --no-turn; --judge live; --layer-weight 1
    --transform patch --mask-ratio 0.3; --sigreg-weight 0.1; --masked --slices 5; --width 4
    --latent-channels 4; --latent-dim 4; --steps 3; --batch-size 6; --objective mse --lr 0.02
    --seed 1; --precision bf16"""
CHANGES = re.findall("--.*?(?=;|$)", CHANGES, re.M)


def test_every_setting_is_changed_below():
    changed = [change.split("--")[-1].split()[0] for change in CHANGES]
    names = [item.name.replace("_", "-") for item in fields(stae.Settings)]
    assert sorted(changed) == sorted("no-turn" if name == "turn" else name for name in names)


@each("change", CHANGES)
def test_every_setting_reaches_training(here, monkeypatch, change):
    monkeypatch.setattr(stae, "report", lambda *arguments: None)
    write_npz("other.npz", x_train=ZEROS)
    for name, flags in {"base": change.rpartition("--")[0], "changed": change}.items():
        assert run(f"{TINY} --steps 2 {flags} --out {name}") == 0
    assert log_of("changed") != log_of("base")


class Paler:
    """A model whose code is the image, and which decodes it paler."""

    def encode(self, images):
        return images

    def decode(self, code):
        return 0.6 * code + 0.1


def bytes_of(*shape):
    return (256 * uniform(*shape)).byte()


def decibels(error):
    return -10 * math.log10(error.double().square().mean().item())


def test_ssim_agrees_with_numpy():
    x, y = uniform(2, 2, 3, 13, 12)
    y = 0.7 * x + 0.3 * y
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    window = np.outer(window, window) / window.sum() ** 2

    def average(images):  # over the window, wherever it lies inside the image
        windows = np.lib.stride_tricks.sliding_window_view(images, (11, 11), axis=(2, 3))
        return (windows * window).sum(axis=(4, 5))

    a, b = x.double().numpy(), y.double().numpy()
    mean_a, mean_b = average(a), average(b)
    variance_a, variance_b = average(a * a) - mean_a**2, average(b * b) - mean_b**2
    covariance = average(a * b) - mean_a * mean_b
    lightness = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4)
    expected = (lightness * structure).mean(axis=(1, 2, 3))
    assert stae.ssim(x, y).tolist() == approx(expected, abs=1e-5)


def test_images_and_holes_are_measured_by_the_mean_error_of_all():
    train_images, images = bytes_of(1300, 3, 16, 16) // 4, bytes_of(130, 3, 16, 16)  # in parts
    train_images[1000:] = 255
    images[129] = 255
    x, holes = images.float() / 255, stae.draw_holes(images.shape, generator(), 0.35)
    found = stae.evaluate(Paler(), train_images, images, "cpu", holes)
    inside = stae.hole_mask(holes, images).bool().expand_as(x)
    floor = train_images.double().mean(dim=0) / 255 - x
    expected = {
        "psnr": decibels(0.6 * x + 0.1 - x),
        "ssim": stae.ssim(x, 0.6 * x + 0.1).mean().item(),
        "hole_psnr": decibels((0.6 * stae.cut_holes(x, holes) + 0.1 - x)[inside]),
        "hole_floor_psnr": decibels(floor[inside]),
    }
    assert {name: found[name] for name in expected} == approx(expected, rel=1e-4)


def test_the_picture_shows_holes_of_the_run(here, monkeypatch):
    drawn = {}
    monkeypatch.setattr(stae, "save_picture", lambda path, rows: drawn.update(rows))
    images, model = bytes_of(20, 3, 16, 16), tiny_model().eval()
    settings = stae.Settings(size=16, masked=True, hole=0.1)
    stored = {"history": [{"seconds": 1.0, "images_per_second": 1.0}]}
    stae.report({"samples": (model, settings, stored)}, images, images, torch.device("cpu"), here)
    x, holes = images[:16] / 255, stae.draw_holes(images.shape, stae.seeded("cpu", 0), 0.1)
    holed = stae.cut_holes(x, holes[:16])
    with torch.no_grad():
        expected = {"originals": x, "samples": model(x)}
        expected |= {"holes of 0.1": holed, "samples, from holes": model(holed)}
    assert_close({name: drawn[name] for name in expected}, expected)
    assert "samples, samples" in drawn


def test_codes_are_measured_by_hand():
    images, slices = bytes_of(300, 3, 16, 16), stae.draw_slices(3, 256, stae.seeded("cpu", 0))
    images[:, 1] //= 4
    code = images.float() / 255
    order = torch.randperm(300, generator=stae.seeded("cpu", 1))
    found = stae.measure_codes(Paler(), images, "cpu")
    first, second, _ = [stae.sigreg(code[group], slices) for group in order.split(128)]
    assert found["sigreg"] == approx((first + second).item() / 2, rel=1e-5)
    deviation = code[:, 1].double().std(dim=0, correction=0).mean()
    assert found["min_std"] == approx(deviation.item(), rel=1e-5)
    assert found["code_size"] == 768


def test_flat_codes_are_measured_as_well():
    images = bytes_of(20, 3, 16, 16)
    found = stae.evaluate(Foreign().eval(), images, images, "cpu")
    assert found["code_size"] == 8 and found["min_std"] > 0


def test_codes_are_as_gaussian_when_the_images_lie_by_class():
    images = (40 * normal(1280, 3, 1, 1) + 128).clamp(0, 255).byte()
    in_order = images[images[:, 0, 0, 0].argsort()]
    scores = [stae.measure_codes(Paler(), x, "cpu")["sigreg"] for x in (images, in_order)]
    assert scores[1] == approx(scores[0], rel=0.05)


def test_pca_is_the_best_linear_code():
    images = bytes_of(200, 1, 16, 16)
    x, pca = images.float() / 255, stae.PCA(images, 10, "cpu")
    code = pca.encode(x)
    deviation = code.std(dim=0, correction=0)
    assert deviation.flatten().tolist() == approx([1] * 10, rel=0.02)
    centred = x.flatten(1) - x.flatten(1).mean(dim=0)
    left = torch.linalg.svdvals(centred)[10:].square().sum()
    error = (pca.decode(code) - x).square().sum()
    assert error.item() == approx(left.item(), rel=0.02)


def test_play_changes_codes():
    x = uniform(5, 3, 8, 8)
    rows = stae.play(SimpleNamespace(encode=lambda x: x, decode=lambda z: z), x)
    walk, interpolation, brush = rows["walk"], rows["interpolation"], rows["brush"]
    assert walk[:, 0, 5, 5].tolist() == [-3, -1.5, 0, 1.5, 3]
    assert torch.equal(walk[3, 1:], x[0, 1:])
    assert_close(interpolation[1], 0.75 * x[0] + 0.25 * x[4])
    expected = x.clone()
    expected[:, :, 2:6, 2:6] = x.roll(-1, dims=0)[:, :, 2:6, 2:6]
    assert torch.equal(brush, expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tiny.npz and two runs, one and two, the second masked."""
    folder = tmp_path_factory.mktemp("runs")
    write_npz(folder / "tiny.npz")
    for name, flags in {"one": "", "two": "--masked --objective mse"}.items():
        assert run(f"{TINY} --dataset {folder}/tiny.npz {flags} --out {folder}/{name}") == 0
    return folder


def test_runs_are_measured_side_by_side(runs, here):
    line = f"--eval {runs}/one {runs}/two --device cpu"
    assert run(line) == run(line) == 0
    assert sorted(os.listdir("runs")) == ["eval", "eval-2"]
    assert Image.open("runs/eval/comparison.png").width > 10 * 64
    tables = json.loads(Path("runs/eval/metrics.json").read_text())
    one, two, pca = tables.values()
    assert list(tables) == [f"{runs}/one", f"{runs}/two", "PCA 32"]
    assert one.keys() - pca.keys() == {"parameters", "train_seconds", "images_per_second"}
    assert two.keys() - one.keys() == {"hole_psnr", "hole_floor_psnr", "hole"}
    alone = json.loads((runs / "two" / "metrics.json").read_text())
    assert two == approx(alone["two"])


@pytest.fixture(scope="module")
def controls():
    path = HERE / "samples" / "controls.py"
    spec = importlib.util.spec_from_file_location("controls", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_controls_of_the_study_run(controls, runs, tmp_path):
    line = f"{runs}/one {runs}/two --recognition --steps 2 --device cpu --out {tmp_path}/a.json"
    assert controls.main(line.split()) == 0
    tables = json.loads((tmp_path / "a.json").read_text())
    assert list(tables) == [f"{runs}/one", f"{runs}/two", "PCA 32", "untrained", "originals"]
    assert tables[f"{runs}/two"].keys() >= {"recognition", "probe_features", "hole_sharpness"}
    assert controls.main(line.split()) == 2  # the file is there
    assert controls.main(["nowhere"]) == 2


@each("y", [np.array(["a"] * 24), np.arange(24) - 1])
def test_labels_that_are_no_classes_are_refused(controls, runs, here, capsys, y):
    write_npz("words.npz", y_train=y)
    assert controls.main([f"{runs}/one", "--dataset", "words.npz", "--device", "cpu"]) == 2
    assert "words.npz: y_train" in capsys.readouterr().err


def test_the_controls_measure_pictures_by_hand(controls):
    images = bytes_of(20, 3, 16, 16) // 2
    images = torch.cat((images, 128 - images))  # so that the mean image is grey, of 0.25
    found = controls.measure_pictures(Paler(), images, "cpu")
    red, green, blue = (0.1 - 0.4 * images / 255).unbind(dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    colour = torch.stack(((blue - luma) / 1.772, (red - luma) / 1.402))
    assert found.pop("psnr_chroma") == approx(decibels(colour), rel=1e-4)
    assert found.pop("sharpness") == approx(0.6, rel=1e-4)
    bands = {"0", "1", "3", "7", "high"}
    assert found.keys() == {f"{name}_{band}" for name in ("kept", "error") for band in bands}
    for name, share in found.items():
        assert share == approx(36 if name.startswith("kept") else 16, rel=0.02)


def test_an_unfinished_run_and_other_images_are_told(here, often, monkeypatch, capsys):
    change_call(monkeypatch, stae, "step_loss", 5, interrupt)
    assert run(f"{TINY} --out run") == 130
    write_npz("tiny.npz", x_train=ZEROS)
    assert run("--eval run --device cpu --out out") == 0
    assert "run (unfinished)" in json.loads(Path("out/metrics.json").read_text())
    assert run("--eval run --dataset tiny.npz --device cpu --out out2") == 0
    assert len(re.findall("run .*was trained on other images", capsys.readouterr().out)) == 2


def test_what_has_no_checkpoint_yet_is_left_out_and_told(runs, here, capsys):
    Path("new").mkdir()
    assert run(f"--eval {runs}/one new --device cpu") == 0
    assert "new: left out" in capsys.readouterr().out


def test_tables_are_not_written_among_the_images(bad, here, monkeypatch, capsys):
    for name in ("photos/0.png", "photos/1.png"):
        paint(here / name, 0)
    monkeypatch.chdir("photos")
    assert run(f"--eval {bad}/done.pt --dataset {here}/photos --device cpu") == 2
    assert "lies among the images" in one_line(capsys)
    assert sorted(os.listdir()) == ["0.png", "1.png"]


def test_a_model_is_loaded_for_use(runs):
    model, weights = stae.load_model(runs / "one"), stored(runs / "one")["model"]
    assert not model.training and model.size == 16
    assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)


@pytest.fixture(scope="module")
def bad(runs, tmp_path_factory):
    """A folder of what cannot be used, and a checkpoint, done.pt."""
    folder = tmp_path_factory.mktemp("bad")
    write_npz(folder / "tiny.npz")
    whole, stem = stored(runs / "one"), torch.ones(2, 3, 4, 4)
    settings, weights = whole["settings"], whole["model"]
    changes = {
        "done": {},
        "code": {"history": Code()},
        "words": {"history": "abc"},
        "rows": {"history": [{"step": 6}]},
        "wide": {"settings": settings | {"width": 10**9}},
        "shape": {"settings": settings | {"width": 64}},
        "larger": {"settings": settings | {"size": 24}},
        "lacking": {"model": {"encoder.stem.weight": stem}},
        "extra": {"model": weights | {"extra": stem}},
        "nan": {"model": weights | {"encoder.stem.weight": stem * math.nan}},
    }
    for name, change in changes.items():
        torch.save(whole | change, folder / f"{name}.pt")
    for key in whole:
        left = {name: value for name, value in whole.items() if name != key}
        torch.save(left, folder / f"no_{key}.pt")
    for name in ("text.pt", "text.npz", "notes.txt", "broken/a.png", "broken/b.jpg", "nothing/.x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hello")
    for name, path in {"half.pt": "done.pt", "half.npz": "tiny.npz"}.items():
        (folder / name).write_bytes((folder / path).read_bytes()[:2000])
    paint(folder / "single" / "0.png", 0)
    for name, x in {"grey": ZEROS[..., 0], "odd": ZEROS[:, :9, :9], "alone": ZEROS[:1]}.items():
        write_npz(folder / f"{name}.npz", x_train=x, x_test=x)
    return folder


# Command lines, and after "=" what the error names if it is not the last word
BAD_LINES = """--dataset nowhere; --dataset notes.txt; --dataset broken; --dataset nothing; shapes
    --dataset single; --dataset nowhere.npz; --dataset text.npz; --dataset half.npz; --bogus
    --dataset odd.npz = 9 x 9 pixels: pass --size 16; --dataset alone.npz = 1 image is too few
    --transform wavelet; --judge ema; --judge random; --objective gan; --size 30; --size 8
    --size -8; --size 32.0; --crop-min 0.5 --crop-max 0.2; --crop-min 0; --crop-max 1.5
    --layer-weight -1; --sigreg-weight nan; --sigreg-weight inf; --slices 0; --width 0
    --width many; --width 4000000000; --latent-channels 3; --latent-dim -1; --steps 0
    --steps 1.5; --batch-size 1; --lr 7; --seed -1; --seed 4294967296; --hole 1; --mask-ratio 2
    --device tpu; --precision fp8; --out notes.txt; --compile; --recognition; --crop
    --epochs 3 = --epochs; --step 3 = --step; --data photos; --eval nowhere
    --validation 9 = --validation; --init done = --init; --eval notes.txt; --eval nothing
    --eval code.pt; --eval wide.pt; --eval done.pt --width 8 = width
    --eval done.pt --objective mse = objective
    --eval done.pt --dataset broken; --eval done.pt --dataset grey.npz = 1 channels, not 3
    --eval done.pt larger.pt = channels of the runs differ; --eval shape.pt; --eval lacking.pt
    --eval extra.pt; --eval nan.pt; --eval half.pt; --eval text.pt; --eval no_settings.pt
    --eval no_channels.pt; --eval no_model.pt; --eval no_history.pt; --eval no_data.pt
    --eval words.pt; --eval rows.pt"""
BAD_LINES = re.findall(r"\S.*?(?=;|$)", BAD_LINES, re.M)


@each("line", BAD_LINES)
def test_bad_input_is_refused_in_one_line_and_leaves_no_trace(bad, monkeypatch, capsys, line):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    flags, _, named = line.strip("; ").partition(" = ")
    assert run(f"--device cpu {flags}" if "--eval" in flags else f"{TINY} {flags}") == 2
    assert (named or flags.split()[-1]) in one_line(capsys)
    assert sorted(bad.rglob("*")) == before


def test_several_processes_are_refused(here, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(TINY) == 2
    assert "WORLD_SIZE" in one_line(capsys)


@each("text", [stae.__doc__, README], ids=["docstring", "README"])
def test_the_commands_of_the_documentation_are_understood(text):
    pattern = r"^ *(?:.*&& )?python stae\.py\b([^\n#]*)"
    lines = re.findall(pattern, text.replace("\\\n", " "), re.M)
    assert len(lines) > 3
    for line in lines:
        flags, given = stae.parse_flags(shlex.split(line))
        stae.choose_settings(given)
        assert not flags.eval or given.keys() <= {"dataset"}


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(HERE / "samples")
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    assert blocks
    for block in blocks:
        exec(block, {})
