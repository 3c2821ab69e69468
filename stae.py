"""Self-Teaching Autoencoder (STAE): it learns to reconstruct images without any reconstruction loss.

    python stae.py                                       # drawn shapes: no download, no GPU, two minutes
    python stae.py --dataset cifar10 --transform crop    # CIFAR-10, downloaded at the first run
    python stae.py --dataset cifar10 --objective mse     # the baseline: same network and schedule
    python stae.py --dataset celeba --masked             # faces with a hole in them, completed
    python stae.py --eval runs/ONE runs/OTHER            # one table and one picture of several runs

The method is sections 1 to 4, which import torch alone:

    z = E(x), x_hat = D(z)                               # encoder and decoder
    loss = d(J(T(x)), J(T(x_hat))) + lambda * SIGReg(z)  # T: the same random crop or mask for both

The judge J is the encoder itself, its weights constants for the step, or it would learn to overlook errors:
gradient reaches the decoder through x_hat, and the encoder only through its code z. No pixel of x_hat is ever
compared with one of x. SIGReg pulls the codes towards N(0, I), against collapse. Without T the pair may end
in a private language: images that mean the same to the encoder and look wrong to us.

From the author: objective, network, transformations, masked mode, frozen judge. Matteo Peluso, "Self-Teaching
    Autoencoder", 2026, https://github.com/the-puzzler/leautoencoder
From LeJEPA: SIGReg. Balestriero and LeCun, arXiv 2511.08544, 2025.
Ours: the other judges, inner activations, the scale of d, the norm, larger crops, training, evaluation.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torchvision import datasets, utils
from torchvision.transforms import functional as TF


# 1. Model: the author's network -----------------------------------------------------------------------------

class Down(nn.Module):
    """Halve the side, (B, i, h, w) -> (B, o, h/2, w/2): two 3x3 convolutions and a weightless skip."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x):
        skip = F.pixel_unshuffle(x, 2).unflatten(1, (self.conv2.out_channels, -1)).mean(dim=2)
        return F.silu(skip + self.conv2(F.silu(self.conv1(x))))


class Up(nn.Module):
    """Double the side, (B, i, h, w) -> (B, o, 2h, 2w): nearest, then two 3x3 convolutions beside a 1x1."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        return F.silu(self.skip(x) + self.conv2(F.silu(self.conv1(x))))


class Encoder(nn.Module):
    """Map images (B, channels, H, W) in [0, 1] to a list: features (B, C, H/8, W/8) or (B, n, 1, 1), then two
    inner activations. The norm of the code is kept apart: transformed images must not move its averages."""

    def __init__(self, channels, width, latent_channels, latent_dim=0, size=32):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.down1 = Down(width, 2 * width)
        self.down2 = Down(2 * width, latent_channels)
        self.head = nn.Identity()
        if latent_dim:
            flat = nn.Linear(latent_channels * (size // 8) ** 2, latent_dim)
            self.head = nn.Sequential(nn.Flatten(), flat, nn.Unflatten(1, (latent_dim, 1, 1)))

    def forward(self, images):
        stem = F.silu(self.stem(images))  # (B, w, H/2, W/2)
        middle = self.down1(stem)  # (B, 2w, H/4, W/4)
        return [self.head(self.down2(middle)), stem, middle]


class Autoencoder(nn.Module):
    """Encoder, norm of the code and decoder for images (B, channels, H, W) in [0, 1], sides divisible by 8.
    width: w, the channels after the stem. latent_channels: C of the code (B, C, H/8, W/8); must divide 8w.
    latent_dim: n, for a global code (B, n, 1, 1) of images of side `size`; the author sets C = w there.
    The losses of section 4 take any model with these three:
        model.encode(images) -> code (B, D) or (B, C, h, w), about mean 0 and variance 1 in each channel
        model.decode(code) -> images in [0, 1], of the input's shape
        model.encoder(images) -> what is judged: (B, D) or (B, C, h, w), or a list of such, features first"""

    def __init__(self, channels=3, width=64, latent_channels=8, latent_dim=0, size=32):
        super().__init__()
        self.encoder = Encoder(channels, width, latent_channels, latent_dim, size)
        self.norm = nn.BatchNorm2d(latent_dim or latent_channels, affine=False)  # a scale would fight SIGReg
        layers = [Up(latent_channels, 2 * width), Up(2 * width, width), nn.Upsample(scale_factor=2)]
        if latent_dim:
            flat = nn.Linear(latent_dim, latent_channels * (size // 8) ** 2)
            spatial = nn.Unflatten(1, (latent_channels, size // 8, size // 8))
            layers = [nn.Flatten(), flat, spatial, nn.SiLU(), *layers]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def encode(self, images):
        """Return the code (B, C, H/8, W/8) or (B, n, 1, 1), float32, mean 0 and deviation 1 per channel."""
        return self.norm(self.encoder(images)[0].float())

    def decode(self, code):
        """Return images (B, channels, H, W) in [0, 1], float32 under autocast too."""
        return self.decoder(code).float().sigmoid()


# 2. SIGReg: are the codes a standard Gaussian? (LeJEPA) -----------------------------------------------------

def draw_slices(dimensions, count, generator):
    """Draw `count` directions, uniform on the sphere, as unit columns (dimensions, count)."""
    return F.normalize(torch.randn(dimensions, count, device=generator.device, generator=generator), dim=0)


def sigreg(codes, slices, knots=17, t_max=3.0):
    """Return the Epps-Pulley statistic of codes (N, D) or (N, D, h, w) along slices (D, M), a scalar >= 0.
    Along each slice the characteristic function of the N projected codes is compared with exp(-t^2/2), that
    of a standard Gaussian: N times the integral over [-t_max, t_max] of the squared gap times exp(-t^2/2).
    Mean over slices, and over positions of a spatial code. N(0, I) gives 1.05 on average, for any N and D.
    A fixed mismatch grows with N: twice the batch wants half of the weight in a loss."""
    with torch.autocast(codes.device.type, enabled=False):  # bf16 would drown small differences of means
        codes = codes.float().reshape(*codes.shape[:2], -1).transpose(1, 2)  # (N, P, D), P positions
        projected = (codes @ slices).flatten(1)  # (N, P * M)
        t = torch.linspace(0, t_max, knots, device=codes.device)[:, None]
        gaussian = torch.exp(-t.square() / 2)
        angles = [pair[:, None] * projected for pair in t.split(2)]  # (2, N, P * M) each: fits a CPU's cache
        cos, sin = (torch.cat([f(angle).mean(dim=1) for angle in angles]) for f in (torch.cos, torch.sin))
        gap = (cos - gaussian).square() + sin.square()  # (knots, P * M)
        return len(codes) * torch.trapezoid(2 * gap * gaussian, t, dim=0).mean()


# 3. Transforms: T, drawn once per image and step, the same for x and x_hat. The kinds are the author's

TRANSFORMS = ("none", "pixel", "patch", "channel", "crop", "stack")
FILTERS = ("blur", "colour", "edges", "residual", "contrast")  # the views of "stack" beside the full image


def draw_boxes(shape, generator, smallest, largest):
    """Draw a box in each image of `shape` (B, C, H, W) -> (B, 4) int64 (top, left, height, width) in pixels.
    Its share of the side is log-uniform in [smallest, largest], at least one pixel; its corner is uniform."""
    uniform, *place = torch.rand(shape[0], 3, device=generator.device, generator=generator).unbind(dim=1)
    share = smallest * (largest / smallest) ** uniform
    sides = [(share * size).round().clamp(min=1) for size in shape[2:]]  # heights, widths: (B,) each
    corners = [(u * (size - side + 1)).floor() for u, size, side in zip(place, shape[2:], sides)]
    return torch.stack((*corners, *sides), dim=1).long()


def draw_transform(name, shape, generator, crop_range=(0.5, 1.0), mask_ratio=0.7):
    """Draw all that is random in T for images of `shape` (B, C, H, W), on the generator's device.
    crop: boxes (B, 4). pixel, patch (4x4): a mask (B, 1, H, W) with exactly round(mask_ratio * places) zeros.
    channel: a mask (B, C, 1, 1), each channel 0 with probability mask_ratio. none, stack: None. Raises
    ValueError for another name, and for a crop_range or mask_ratio outside of (0, 1]."""
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform {name!r}, expected one of {', '.join(TRANSFORMS)}")
    if not (0 < crop_range[0] <= crop_range[1] <= 1 and 0 < mask_ratio <= 1):
        raise ValueError(f"crop_range {crop_range}, mask_ratio {mask_ratio}: must lie in (0, 1], in order")
    if name in ("none", "stack", "crop"):
        return draw_boxes(shape, generator, *crop_range) if name == "crop" else None
    if name == "channel":
        uniform = torch.rand(*shape[:2], 1, 1, device=generator.device, generator=generator)
        return (uniform >= mask_ratio).float()
    cell = 4 if name == "patch" else 1
    rows, columns = shape[2] // cell, shape[3] // cell
    uniform = torch.rand(shape[0], rows * columns, device=generator.device, generator=generator)
    keep = uniform.argsort(dim=1).view(-1, 1, rows, columns) >= round(mask_ratio * rows * columns)
    return keep.float().repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)


def views(name, drawn):
    """Return T as [(weight, function of images)], given what draw_transform drew. The weights sum to 1: one
    view, or for "stack" the full image at 1/2 and five filters of it at 1/10 each."""
    if name == "stack":
        return [(0.5, lambda x: x)] + [(0.1, lambda x, kind=kind: apply_filter(kind, x)) for kind in FILTERS]
    if name == "crop":
        return [(1.0, lambda x: crop(x, drawn))]
    return [(1.0, lambda x: x if drawn is None else x * drawn)]


def crop(images, boxes):
    """Cut a box (B, 4) out of each image (B, C, H, W) and enlarge it to full size, all in one grid_sample.
    The result is that of slicing each box, then F.interpolate(mode="bilinear")."""
    axes = []
    for axis in (0, 1):
        size, start, extent = images.shape[2 + axis], boxes[:, axis, None], boxes[:, 2 + axis, None]
        place = (torch.arange(size, device=images.device) + 0.5) * extent / size - 0.5  # (B, size)
        pixel = start + place.clamp(min=0).minimum(extent - 1.0)  # nothing from outside the box bleeds in
        axes.append((2 * pixel + 1) / size - 1)  # grid_sample counts from -1 to 1
    grid = torch.broadcast_tensors(axes[1][:, None, :], axes[0][:, :, None])  # x and y, (B, H, W) each
    return F.grid_sample(images, torch.stack(grid, dim=3), padding_mode="border", align_corners=False)


def blur(images, side):
    """Average over an odd window; at the border, over its part inside the image."""
    return F.avg_pool2d(images, side, stride=1, padding=side // 2, count_include_pad=False)


def apply_filter(kind, images):
    """Return one of FILTERS of images (B, C, H, W) in [0, 1], the same shape and range."""
    if kind == "blur":
        return blur(images, 11)
    grey = images.mean(dim=1, keepdim=True)
    if kind == "colour":  # saturation, then contrast
        vivid = (grey + 1.8 * (images - grey)).clamp(0, 1)
        mean = vivid.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + 1.4 * (vivid - mean)).clamp(0, 1)
    strength = images - blur(images, 5)  # what "residual" and "contrast" show
    if kind == "edges":
        slope = torch.arange(-1, 2, dtype=images.dtype, device=images.device)
        sobel = torch.outer(2 - slope.abs(), slope)  # [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
        with torch.autocast(images.device.type, enabled=False):
            slopes = F.conv2d(grey, torch.stack((sobel, sobel.T))[:, None], padding=1)  # (B, 2, H, W)
        strength = (slopes.square().sum(dim=1, keepdim=True) + 1e-12).sqrt().expand_as(images)
    if kind == "contrast":
        strength = strength / (blur(strength.square(), 5) + 1e-4).sqrt()
    strength = strength / (strength.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-6)
    return (1 + strength) / 2 if kind == "contrast" else strength.abs()


def draw_holes(shape, generator, ratio=0.35):
    """Draw a square hole in each image of `shape` (B, C, S, S) -> boxes (B, 4), of the share `ratio` of the
    area: the side is round(sqrt(ratio) * S), from 1 to S - 1. Raises ValueError unless 0 < ratio < 1."""
    if not 0 < ratio < 1:
        raise ValueError(f"ratio {ratio}: a hole's share of the area must lie between 0 and 1")
    side = min(ratio**0.5, 1 - 1 / shape[2])
    return draw_boxes(shape, generator, side, side)


def hole_mask(holes, size):
    """Turn boxes (B, 4) in images of side `size` into (B, 1, size, size) float, 1 inside and 0 outside."""
    place = torch.arange(size, device=holes.device) - holes[:, :2, None]  # (B, 2, size), from the corner
    y, x = ((place >= 0) & (place < holes[:, 2:, None])).float().unbind(dim=1)  # (B, size) each
    return (y[:, :, None] * x[:, None, :])[:, None]


def cut_holes(images, holes):
    """Fill the holes (B, 4) of images (B, C, S, S) with the mean colour of the whole image, hidden pixels
    included, as the author does."""
    return images.lerp(images.mean(dim=(2, 3), keepdim=True), hole_mask(holes, images.shape[3]))


# 4. Objective: functions of a model, a batch and what was drawn. A judge maps images to features ------------

JUDGES = ("frozen", "live", "ema", "random")  # freeze(encoder); encoder; slow average; first copy


def freeze(encoder):
    """Return the encoder as a judge whose weights are constants: gradient reaches only its input. The running
    statistics of a BatchNorm inside a foreign encoder stay as they are."""
    constants = {name: weight.detach() for name, weight in encoder.named_parameters()}
    constants |= {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    return lambda images: torch.func.functional_call(encoder, constants, images)


def distance(target, seen, layer_weight=0.0):
    """Return d, how far what the judge sees in x_hat is from what it sees in x, as a scalar in float32.
    target, seen: features (B, D) or (B, C, h, w), or a list of these and of inner activations. Features: mean
    of ((seen - target) / (s + 1e-3))^2, s the target's deviation per channel over batch and positions. (The
    author scales both sides by their own batch, which hides a shift common to it.) layer_weight (ours)
    times a sum over inner activations is added, of mean((seen - target)^2) / (variance + 1e-4)."""
    target, seen = ([x.float() for x in ([s] if torch.is_tensor(s) else s)] for s in (target, seen))
    if layer_weight and len(target) < 2:
        raise ValueError(f"layer_weight {layer_weight}: the encoder returns no inner activations")
    dims = [dim for dim in range(target[0].dim()) if dim != 1]
    variance = target[0].var(dim=dims, correction=0, keepdim=True).clamp(min=1e-12)  # sqrt is steep at 0
    total = ((seen[0] - target[0]) / (variance.sqrt() + 1e-3)).square().mean()
    if layer_weight:
        inner = [(s - t).square().mean() / (t.var(correction=0) + 1e-4) for t, s in zip(target[1:], seen[1:])]
        total = total + layer_weight * sum(inner)
    return total


def judge_views(judge, views, images, x_hat, layer_weight):
    """Return the weighted sum over views [(weight, T)] of d(J(T(images)), J(T(x_hat))). Under a frozen judge
    the target has no graph. Raises ValueError when images and x_hat differ in shape."""
    if x_hat.shape != images.shape:
        raise ValueError(f"the model decodes {tuple(x_hat.shape)} from images {tuple(images.shape)}")
    return sum(weight * distance(judge(T(images)), judge(T(x_hat)), layer_weight) for weight, T in views)


def stae_loss(model, images, views, slices, judge, sigreg_weight=0.03, layer_weight=0.0):
    """Return the loss of images (B, C, H, W) in [0, 1], a scalar, and its terms by name. judge: usually
    freeze(model.encoder). slices: (D, M), D the channels of z. sigreg_weight: lambda; halved for twice B."""
    z = model.encode(images)
    judged = judge_views(judge, views, images, model.decode(z), layer_weight)
    regulariser = sigreg(z, slices)
    return judged + sigreg_weight * regulariser, {"distance": judged, "sigreg": regulariser}


def masked_loss(model, images, holed, views, slices, judge, sigreg_weight=0.03, layer_weight=10.0):
    """Return the loss of masked mode (the author's leAutoencoder), a scalar, and its terms by name. What is
    decoded from `images` and from `holed`, the same images with holes, must match `images` under the judge,
    and each other. At a layer_weight of 0 faces are worse."""
    z, z_holed = model.encode(torch.cat((images, holed))).chunk(2)  # in one call, so that both share a norm
    x_hat, x_holed = model.decode(z), model.decode(z_holed)
    agreement = distance(judge(x_hat), judge(x_holed))  # without T; gradient flows into both sides
    clean = judge_views(judge, views, images, x_hat, layer_weight)
    masked = judge_views(judge, views, images, x_holed, layer_weight)
    regulariser = (sigreg(z, slices) + sigreg(z_holed, slices)) / 2
    loss = (agreement + clean + masked) / 3 + sigreg_weight * regulariser
    return loss, {"agreement": agreement, "clean": clean, "masked": masked, "sigreg": regulariser}


def mse_loss(model, images, holed=None):
    """Return the baseline's loss, mean((D(E(x)) - x)^2), and its term. holed: encoded instead of images."""
    loss = (model.decode(model.encode(images if holed is None else holed)) - images).square().mean()
    return loss, {"mse": loss}


# 5. Data: images uint8 (N, C, S, S), labels (N,) or None, and the size of the test split at the end ---------

class BadInput(ValueError):
    """Something the user gave cannot be used. The message is one line that names it and the remedy."""


def need(ok, message):
    """Raise BadInput(message) unless `ok`."""
    if not ok:
        raise BadInput(message)


def progress(items, total, label):
    """Yield the items. On a terminal, show every second what label() says and how many are done."""
    begun = shown = time.perf_counter()
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if sys.stdout.isatty() and (now > shown + 1 or count == total):
            left = (now - begun) * (total / count - 1)
            print(f"\r\033[K{label()}  {count:,}/{total:,}  {left:.0f} s left", end="\r", flush=True)
            shown = now


def generator_for(device, *key):
    """Return a random generator on `device` that is seeded by the integers in `key`."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def make_shapes(count=12_000, size=32):
    """Draw two discs, rings or rectangles per image, grey on black, after the author's toy set; the label is
    the kind of the front one. Edges are blended in integers: every machine draws the same bytes."""
    generator, inner = torch.Generator().manual_seed(0), (5, size - 5)
    y, x = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
    canvas = torch.zeros(count, size, size, dtype=torch.int32)
    for _ in range(2):
        kind, grey, radius, other, row, column = (
            torch.randint(*limits, (count, 1, 1), generator=generator)
            for limits in ((0, 3), (80, 256), (3, 10), (3, 10), inner, inner))
        dy, dx = (y - row).abs(), (x - column).abs()
        from_centre = (dy**2 + dx**2).float().sqrt()
        disc = radius + 0.5 - from_centre  # how far inside its edge each pixel lies, (count, size, size)
        ring = torch.minimum(disc, from_centre - radius + 2.5)
        rectangle = torch.minimum(radius - dy, other - dx) + 0.5
        inside = torch.where(kind == 0, disc, torch.where(kind == 1, ring, rectangle))
        cover = (inside.clamp(0, 1) * 256).int()
        canvas = (grey * cover + canvas * (256 - cover)) // 256
    return canvas.to(torch.uint8)[:, None], kind.flatten(), count // 6


def read_cifar10(root):
    """Read CIFAR-10 in `root`, where torchvision downloads it unless it is there."""
    try:
        train, test = (datasets.CIFAR10(root, train=train, download=True) for train in (True, False))
    except Exception as error:  # no network, a broken archive, a folder that cannot be written, ...
        raise BadInput(f"--data {root}: download failed ({error}); put cifar-10-batches-py/ there") from None
    images = torch.from_numpy(np.concatenate([train.data, test.data])).permute(0, 3, 1, 2)
    return images, torch.tensor(train.targets + test.targets), len(test)


def read_npz(path):
    """Read x_train, y_train, x_test, y_test or x, y: uint8 (N, H, W, 1 or 3), integers; y, test optional."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ends = [end for end in ("_train", "_test") if "x" + end in file] or [""]
            x = np.concatenate([file["x" + end] for end in ends])
            y = np.concatenate([file["y" + e] for e in ends]) if all("y" + e in file for e in ends) else None
            test_count = len(file["x_test"]) if len(ends) == 2 else 0
    except Exception:  # not a zip, no x, shapes that differ: numpy raises many kinds
        raise BadInput(f"{path}: not an .npz of x_train, y_train, x_test, y_test or x, y") from None
    fine = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3)
    need(fine, f"{path}: its images are {x.dtype} {x.shape}; they must be uint8 (N, H, W, 1 or 3)")
    need(y is None or (y.shape == x.shape[:1] and y.dtype.kind in "iu"), f"{path}: y needs {len(x)} integers")
    order = np.arange(len(x)) if test_count else np.random.default_rng(0).permutation(len(x))
    labels = None if y is None else torch.from_numpy(y[order].astype(np.int64))
    return torch.from_numpy(x[order]).permute(0, 3, 1, 2), labels, test_count


def read_images(folder, names, size, crop=None):
    """Decode and centre-crop image files (to `crop` pixels when given); cache them beside the folder, under a
    name that changes with the files -> uint8 (N, 3, size, size); the names of the N that can be read."""
    folder = Path(os.path.abspath(folder))
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name in names for stat in [os.stat(folder / name)]]
    stamp = hashlib.sha256(repr((crop, stats)).encode()).hexdigest()[:8]
    cache = folder.parent / f"{folder.name}.stae-{size}-{stamp}.cache"
    row = np.dtype([("image", np.uint8, (3, size, size)), ("readable", np.bool_)])

    def decode(name):
        with suppress(Exception):  # Pillow raises whatever its decoders do: OSError, SyntaxError, ...
            image = ImageOps.exif_transpose(Image.open(folder / name))
            need(image.mode[0] not in "IF", "16 or 32 bits, which convert() would clip")
            image = TF.center_crop(image.convert("RGB"), [crop or min(image.size)] * 2)
            return np.asarray(TF.resize(image, [size, size])).transpose(2, 0, 1).tobytes() + b"\1"
        return bytes(row.itemsize)  # black, and not readable

    if not cache.exists():
        temporary = Path(f"{cache}.{os.getpid()}.tmp")  # another process may be decoding the same folder
        try:
            with ThreadPoolExecutor() as pool, open(temporary, "wb") as file:
                file.writelines(progress(pool.map(decode, names), len(names), lambda: "decoding"))
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    rows = np.memmap(cache, row, "c")  # copy on write: torch warns of a read-only array
    lost = [name for name, readable in zip(names, rows["readable"]) if not readable]
    need(len(lost) < len(names), f"{folder}: none of its {len(names)} images can be read")
    if lost:
        print(f"skipped {len(lost)} of {len(names)} images that cannot be read, the first is {lost[0]}")
        rows, names = rows[rows["readable"]], np.array(names)[rows["readable"]].tolist()
    return torch.from_numpy(rows["image"]), names


def read_folder(folder, size):
    """Read all images below `folder`, ordered by hash, and print its splits and classes: train/ and test/ (or
    val/, valid/, validation/) when both hold images; the subfolders, when every image lies in one."""
    paths = [p for p in folder.rglob("*") if p.is_file() and datasets.folder.is_image_file(p.name)]
    need(paths, f"--dataset {folder}: no image below it ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
    tops = {os.path.relpath(path, folder): path.relative_to(folder).parts[0].lower() for path in paths}
    names = sorted(tops, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    tests = [top for top in ("test", "val", "valid", "validation") if {"train", top} <= set(tops.values())]
    if tests:
        names = [name for top in ("train", tests[0]) for name in names if tops[name] == top]
    images, names = read_images(folder, names, size)
    parents = [Path(name).parts[1 if tests else 0 : -1] for name in names]
    classes = sorted({parent[0] for parent in parents if parent})
    labels = torch.tensor([classes.index(parent[0]) for parent in parents]) if all(parents) else None
    splits = f"train/ and {tests[0]}/" if tests else "none (no train/ beside a test/), so a tenth is held out"
    kinds = f"{len(classes)} subfolders" if all(parents) else "none (not every image lies in a subfolder)"
    print(f"{folder}: {len(names):,} images; splits: {splits}; classes: {kinds}")
    return images, labels, sum(tops[name] == tests[0] for name in names) if tests else 0


def read_celeba(root, size):
    """Read the centre of the faces in `root`/celeba/img_align_celeba; the splits are the official ones."""
    folder = Path(root, "celeba", "img_align_celeba")
    numbers = sorted(int(path.stem) for path in folder.glob("*.jpg") if path.stem.isdecimal())
    need(numbers, f"--data {root}: has no celeba/img_align_celeba/*.jpg; unpack img_align_celeba.zip there")
    names = [f"{number:06}.jpg" for number in numbers if number <= 162_770 or number > 182_637]
    images, names = read_images(folder, names, size, crop=128)
    return images, None, sum(int(name[:6]) > 182_637 for name in names)


def load_data(dataset, root="data", size=0, validation=0):
    """Load "shapes", "cifar10", "celeba" (in `root`), a folder or an .npz -> two pairs, to train and to test
    on: images uint8 (N, C, S, S) on the CPU, labels int64 (N,) from 0 or None. size: S; 0: 64 for a folder,
    128 for celeba, else as it is. validation: test on so many of the last training images instead."""
    path = Path(dataset)
    if dataset == "shapes":
        images, labels, test_count = make_shapes()
    elif dataset == "cifar10":
        images, labels, test_count = read_cifar10(root)
    elif dataset == "celeba":
        images, labels, test_count = read_celeba(root, size or 128)
    elif path.is_dir():
        images, labels, test_count = read_folder(path, size or 64)
    else:
        need(path.is_file(), f"--dataset {dataset}: no such folder or .npz, nor shapes, cifar10, celeba")
        images, labels, test_count = read_npz(path)
    side = min(images.shape[2:])
    if images.shape[2:] != (size or side, size or side):  # in parts, since resizing works in float
        parts = TF.center_crop(images, [side, side]).split(1000)
        images = torch.cat([TF.resize(part, [size or side] * 2) for part in parts])
    if labels is not None:
        classes, labels = labels.unique(return_inverse=True)
        labels = labels if len(classes) > 1 else None  # nothing to tell apart
    end = len(images) - (test_count or max(1, len(images) // 10))  # without a split a tenth is held out
    need(end > validation, f"--dataset {dataset}: {len(images)} images, --validation {validation}: too few")
    spans = slice(end - validation), slice(end - validation, end) if validation else slice(end, None)
    return [(images[span], None if labels is None else labels[span]) for span in spans]


# 6. Evaluation: one function measures a model -> one flat dict; pictures and a table ------------------------

def ssim(x, y):
    """Return the structural similarity of (B, C, H, W) in [0, 1], sides from 11, as (B,); 1 for equal images.
    Wang et al. 2004: Gaussian window of 11, sigma 1.5, inside the image; mean over channels and places."""
    means = (TF.gaussian_blur(images, 11, 1.5) for images in (x, y, x * x, y * y, x * y))
    mx, my, xx, yy, xy = (mean[:, :, 5:-5, 5:-5] for mean in means)
    score = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
    return (score / ((mx**2 + my**2 + 0.01**2) * (xx - mx**2 + yy - my**2 + 0.03**2))).mean(dim=(1, 2, 3))


def variation(images, region):
    """Sum the absolute differences of neighbours of (B, C, H, W), both in region (B, 1, H, W) -> (B,).
    Sharpness is this sum over reconstructions, divided by that over originals."""
    both = [(dim, region.unfold(dim, 2, 1).amin(dim=-1)) for dim in (2, 3)]
    return sum((images.diff(dim=dim).abs() * inside).flatten(1).sum(dim=1) for dim, inside in both)


def collect(function, images, device, *more):
    """Apply function(floats, *rows of more) to images (N, C, H, W) uint8, batch by batch -> (N, ...)."""
    count = max(1, min(250, 2**20 // images[0, 0].numel()))  # of large images fewer fit into memory
    parts = zip(*(rows.split(count) for rows in (images, *more)))
    return torch.cat([function(x.to(device).float() / 255, *rest) for x, *rest in parts])


def fidelity(reconstruct, images, device, holes=None, hidden=False):
    """Score reconstruct(images) against images (N, C, H, W) uint8 -> psnr, of colour images psnr_luma and
    psnr_chroma (BT.601), sharpness, ssim. holes (N, 4): cut; all but ssim is outside or, `hidden`, inside."""
    matrix = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    holes = (torch.zeros(len(images), 4) if holes is None else holes).to(device)  # of no size: all is visible

    def score(x, boxes):
        region = hole_mask(boxes, x.shape[3]) if hidden else 1 - hole_mask(boxes, x.shape[3])
        x_hat = reconstruct(cut_holes(x, boxes))
        planes = [x_hat - x]
        if x.shape[1] == 3:
            planes += torch.einsum("pc,bchw->bphw", matrix.to(device), x_hat - x).split([1, 2], dim=1)
        squares = [(plane.square() * region).mean(dim=(1, 2, 3)) for plane in planes]
        sharp = variation(x_hat, region), variation(x, region)
        return torch.stack([ssim(x, x_hat), *sharp, region.mean(dim=(1, 2, 3)), *squares], dim=1)

    structure, sharp, sharp_x, area, *errors = collect(score, images, device, holes).double().mean(0).tolist()
    decibels = [-10 * math.log10(max(error / area, 1e-12)) for error in errors]
    result = dict(zip(("psnr", "psnr_luma", "psnr_chroma"), decibels))
    return result | {"ssim": structure, "sharpness": sharp / max(sharp_x, 1e-9)}


def min_std(codes):
    """Return the least deviation over images (mean over positions) of a channel of codes; 0 is a collapse."""
    return codes.std(dim=0, correction=0).flatten(1).mean(dim=1).min().item()


def linear_probe(x, labels, test, strength=0.01):
    """Fit ridge regression of one-hot labels y on standardised x (N, D), minimising the mean of
    |x @ weights - y|^2, plus strength * |weights|^2; return the labels (M,) it gives to test (M, D)."""
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6
    x, test = (((part - mean) / scale).double() for part in (x, test))
    y = F.one_hot(labels).double()
    gram = x.T @ x / len(x) + strength * torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)) / len(x))
    return (test @ weights + y.mean(dim=0)).argmax(dim=1)


@torch.no_grad()
def evaluate(model, train, test, holes=None, classifier=None):
    """Measure an Autoencoder in eval mode on pairs from load_data -> a flat dict, explained in README.md.
    holes: boxes (N, 4) to cut into test images. classifier: from train_classifier, to measure recognition."""
    (images, labels), (test_images, test_labels), device = train, test, next(model.parameters()).device
    codes = collect(model.encode, test_images, device)  # (N, C, h, w)
    sample = images[:: 1 + images.numel() // 2**29].to(device).flatten(1).float().div_(255)  # 2 GB at most
    mean = sample.mean(dim=0)
    axes = torch.pca_lowrank(sample, min(codes[0].numel(), *sample.shape), niter=8)[2]  # 2 is inaccurate
    shown = {"": lambda x: model.decode(model.encode(x)), "_original": lambda x: x,
             "_pca": lambda x: ((x.flatten(1) - mean) @ axes @ axes.T + mean).view_as(x)}
    results = fidelity(shown[""], test_images, device)
    results["pca_psnr"] = fidelity(shown["_pca"], test_images, device)["psnr"]
    if holes is not None:
        inside = fidelity(shown[""], test_images, device, holes, hidden=True)
        floor = fidelity(lambda x: mean.view_as(x[0]).expand_as(x), test_images, device, holes, hidden=True)
        results |= {"hole_psnr": inside["psnr"], "hole_sharpness": inside["sharpness"]}
        results |= {"masked_ssim": inside["ssim"], "hole_floor_psnr": floor["psnr"]}
        results["visible_psnr"] = fidelity(shown[""], test_images, device, holes)["psnr"]
    slices = draw_slices(codes.shape[1], 256, generator_for(device, 0))
    scores = [sigreg(group, slices).item() for group in codes.split(128)[: max(1, len(codes) // 128)]]
    results |= {"sigreg": sum(scores) / len(scores), "min_std": min_std(codes)}
    spread = torch.linalg.svdvals(codes[:2000].flatten(1))  # rankme, their effective rank: arXiv 2210.02885
    results["rankme"] = torch.special.entr(spread / spread.sum()).sum().exp().item()
    if labels is not None:
        picked = torch.randperm(len(images), generator=generator_for("cpu", 0))[:10_000]
        images, labels = images[picked.to(images.device)], labels[picked]
        pool, untrained = nn.AdaptiveAvgPool2d(4), copy.deepcopy(model.encoder)
        untrained.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
        reads = {"code": model.encode, "pca": lambda x: (x.flatten(1) - mean) @ axes,
                 "features": lambda x: pool(model.encoder(x)[-1]), "random": lambda x: pool(untrained(x)[-1])}
        for name, read in reads.items():
            known, asked = (collect(read, part, device).flatten(1).cpu() for part in (images, test_images))
            guesses = {"probe": linear_probe(known, labels, asked)}
            if name in ("code", "pca"):
                nearest = (F.normalize(asked) @ F.normalize(known).T).topk(min(20, len(known))).indices
                guesses["knn"] = labels[nearest].mode(dim=1).values
            for kind, guess in guesses.items():
                results[f"{kind}_{name}"] = 100 * (guess == test_labels).double().mean().item()
    for name, show in (shown if classifier else {}).items():
        guess = collect(lambda x: classifier(show(x)).argmax(dim=1).cpu(), test_images, device)
        results["recognition" + name] = 100 * (guess == test_labels).double().mean().item()
    return results | {"code_size": codes[0].numel(), "parameters": sum(w.numel() for w in model.parameters())}


def train_classifier(images, labels, device, precision, steps=2000):
    """Train a small classifier on images (N, C, S, S) uint8 and labels (N,) -> a model with (B, K) scores."""
    layers = [nn.AvgPool2d(max(1, images.shape[2] // 64))]
    for i, o, k in ((images.shape[1], 32, 2), (32, 64, 2), (64, 128, 1), (128, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(k)]
    layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, int(labels.max()) + 1)]
    model = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05, fused=True)
    largest = images.shape[2] // 10
    for step in progress(range(steps), steps, lambda: "training the classifier"):
        generator = generator_for("cpu", step)
        picked = torch.randint(len(images), (250,), generator=generator)
        shift = torch.randint(-largest, largest + 1, (2,), generator=generator).tolist()
        x = images[picked.to(images.device)].to(device).roll(shift, dims=(2, 3)).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            scores = model(x.flip(3) if step % 2 else x).float()
        loss = F.cross_entropy(scores, labels[picked].to(device), label_smoothing=0.1)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def code_rows(model, images):
    """Decode changed codes of images (n, C, S, S) -> {label: images (n, C, S, S)}. walk: the first image's,
    its first channel from -3 to 3; samples: noise; brush: each with the middle of the next one's."""
    z = model.encode(images)
    share = torch.linspace(0, 1, len(z), device=z.device).view(-1, 1, 1, 1)
    walk, brush, edge = z[:1].repeat(len(z), 1, 1, 1), z.clone(), z.shape[2] // 4
    walk[:, :1] = 6 * share - 3
    brush[:, :, edge : 3 * edge, edge : 3 * edge] = z.roll(-1, 0)[:, :, edge : 3 * edge, edge : 3 * edge]
    codes = dict(walk=walk, interpolation=z[0].lerp(z[-1], share), samples=torch.randn_like(z), brush=brush)
    return {label: model.decode(code) for label, code in codes.items() if edge or label != "brush"}


def save_rows(path, rows):
    """Save a picture: {label: images (n, C, S, S) in [0, 1]}, a labelled row each, small images enlarged."""
    strips = []
    for label, images in rows.items():
        tiles = F.interpolate(images.cpu().clamp(0, 1), scale_factor=max(1, 64 // images.shape[3]))
        grid = utils.make_grid(tiles, nrow=len(tiles), pad_value=1)  # (3, H, W)
        caption = Image.new("RGB", (grid.shape[2], 14), "white")
        ImageDraw.Draw(caption).text((3, 1), label, fill="black")
        strips += [TF.to_tensor(caption), grid]
    TF.to_pil_image(torch.cat(strips, dim=1)).save(path)


def print_table(tables):
    """Print {run: what evaluate returns}, a column for each run, and PCA and originals beside them."""
    pca = dict(psnr="pca_psnr", probe_code="probe_pca", knn_code="knn_pca", recognition="recognition_pca")
    names = dict.fromkeys(name for table in tables.values() for name in table)
    one = next(iter(tables.values()))
    columns = [*tables, f"PCA {one['code_size']}", "originals"]
    print(" " * 16, *(f"{column:>10}" for column in columns))
    for name in [name for name in names if name not in (*pca.values(), "recognition_original")]:
        row = [t.get(name) for t in tables.values()] + [one.get(pca.get(name)), one.get(f"{name}_original")]
        cells = ("" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:,.4g}" for v in row)
        print(f"{name:16}", *(f"{cell:>{max(10, len(column))}}" for cell, column in zip(cells, columns)))


# 7. Training: one loop, one checkpoint, on one device or several --------------------------------------------

def learning_rate(step, steps, peak):
    """Return the rate of a step: linear warm-up over 100 steps or a tenth, then a cosine to 5 % of peak."""
    warmup = min(100, steps // 10 + 1)
    cosine = math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
    return peak * min(1, (step + 1) / warmup) * (0.525 + 0.475 * cosine)


class Objective(nn.Module):
    """The loss that the settings name, as a module for torch.compile and DistributedDataParallel to wrap."""

    def __init__(self, model, config):
        super().__init__()
        copied = config.judge in ("ema", "random")  # the other judges are the encoder itself
        self.model, self.config = model, config
        self.judge = copy.deepcopy(model.encoder).requires_grad_(False) if copied else None

    def draw(self, shape, generator):
        """Draw all that is random in a step on images of `shape`: holes or None, T's draw or None, slices."""
        config = self.config
        holes = draw_holes(shape, generator, config.hole) if config.masked else None
        drawn = draw_transform(config.transform, shape, generator, config.crop, config.mask_ratio)
        return holes, drawn, draw_slices(self.model.norm.num_features, config.slices, generator)

    def forward(self, images, holes, drawn, slices):
        """Return the loss of images (B, C, S, S) in [0, 1] and its terms by name."""
        model, config = self.model, self.config
        holed = cut_holes(images, holes) if config.masked else None
        if config.objective == "mse":
            return mse_loss(model, images, holed)
        judge = freeze(model.encoder) if config.judge == "frozen" else self.judge or model.encoder
        rest = views(config.transform, drawn), slices, judge, config.sigreg_weight, config.layer_weight
        return masked_loss(model, images, holed, *rest) if config.masked else stae_loss(model, images, *rest)


def train(model, images, config, folder, stored=None, compiled=False):
    """Train a model on images (N, C, S, S) uint8, on its device or the CPU -> the history, means per epoch.
    Raises FloatingPointError when one is not finite. stored: a checkpoint to go on from. Order and draws are
    functions of (seed, epoch, process). Processes average gradients; each has its images, T and SIGReg."""
    device, many = next(model.parameters()).device, distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if many else (0, 1)
    objective = Objective(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    history = stored["history"] if stored else []
    if stored:
        objective.load_state_dict(stored["objective"])
        optimizer.load_state_dict(stored["optimizer"])
    if compiled:
        objective.compile()
    wrapped = nn.parallel.DistributedDataParallel(objective) if many else objective
    count = len(images) // (config.batch_size * world)  # steps of an epoch; a partial batch is dropped
    for epoch in range(len(history), config.epochs):
        begun, totals, title = time.perf_counter(), 0.0, f"epoch {epoch + 1}/{config.epochs}"
        order = torch.randperm(len(images), generator=generator_for("cpu", config.seed, epoch))[rank::world]
        order = order.to(images.device).split(config.batch_size)
        generator = generator_for(device, config.seed, epoch, 1 + rank)
        steps = range(epoch * count, (epoch + 1) * count)
        model.train()
        for step, picked in zip(progress(steps, count, lambda: f"{title}  loss {loss.item():.4f}"), order):
            x = images[picked].to(device).float() / 255
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = wrapped(x, *objective.draw(x.shape, generator))
            optimizer.param_groups[0]["lr"] = learning_rate(step, config.epochs * count, config.lr)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if config.judge == "ema":
                for kept, weight in zip(objective.judge.parameters(), model.encoder.parameters()):
                    kept.lerp_(weight.detach(), 0.001)  # the average of about 1,000 steps
            terms = {"loss": loss} | terms | {"gradient_norm": norm}
            totals = totals + torch.stack(list(terms.values())).detach()
        row = dict(zip(terms, (totals / count).tolist()))  # waits for the device, once an epoch
        seconds = time.perf_counter() - begun
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError(f"{title}: not finite: {row}; try a lower --lr, in another folder")
        with torch.no_grad():  # normalised as in training: the running averages lag behind
            row["min_std"] = min_std(F.batch_norm(model.encoder(x)[0].float(), None, None, training=True))
        row |= {"seconds": seconds, "images_per_second": count * config.batch_size * world / seconds}
        history.append({"epoch": epoch + 1} | row)
        collapse = "the code collapses: try a higher --sigreg-weight" if row["min_std"] < 0.1 else ""
        print(title, *(f"{name} {value:.4g}" for name, value in row.items()), collapse, sep="  ", flush=True)
        if rank == 0:
            state = {"config": vars(config), "history": history, "objective": objective.state_dict()}
            torch.save(state | {"optimizer": optimizer.state_dict()}, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # atomic
            lines = [history[0].keys(), *(row.values() for row in history)]
            (folder / "log.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return history


def load_checkpoint(path):
    """Read a checkpoint, or a run's folder, from anybody -> the Autoencoder, on the CPU in eval mode; its
    settings; all that the file holds. A hostile file runs no code and allocates only what it really fills."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    need(path.is_file(), f"{path}: there is no such checkpoint")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        names = (vars(build_parser().parse_args([])).keys() - {*NOT_SETTINGS}) | {"channels", "processes"}
        config = argparse.Namespace(**{name: stored["config"][name] for name in names})
        check(config)
        real = all(w.untyped_storage().nbytes() >= w.nbytes for w in stored["objective"].values())
        need(real and stored["history"][-1]["images_per_second"] > 0, "bad tensors or history")
        with torch.device("meta"):
            objective = Objective(Autoencoder(*(vars(config)[name] for name in SHAPE)), config)
        objective.load_state_dict(dict(stored["objective"]), assign=True)  # a copy, which torch may mark
        return objective.model.float().eval(), config, stored
    except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
        raise BadInput(f"{path}: not a checkpoint of stae.py ({str(error).split('. ')[0]})") from None


def load_model(path, device="cpu"):
    """Return the Autoencoder of a run or checkpoint, in eval mode: model.encode(images), model.decode(z)."""
    return load_checkpoint(path)[0].to(device)


# 8. Command line --------------------------------------------------------------------------------------------

PRESETS = {  # what a data set changes of the defaults; a path starts from those of cifar10
    "shapes": dict(transform="pixel", width=32, epochs=12, lr=1e-2, batch_size=64),
    "cifar10": dict(transform="crop", width=64, epochs=15, lr=3e-3, batch_size=128),
    "celeba": dict(transform="crop", width=128, epochs=50, lr=1e-3, batch_size=128, latent_channels=32),
}
NUMBERS = {  # flag: default (of the shapes), least, most, help
    "--size": (0, 0, 4096, "side to resize images to; 0: as they are, but 64 for a folder, 128 for celeba"),
    "--validation": (0, 0, 10**9, "test on so many of the last training images instead"),
    "--hole": (0.35, 0.001, 0.999, "share of the area that --masked hides"),
    "--mask-ratio": (0.7, 0.001, 1, "share of the pixels, patches or channels that T blackens"),
    "--layer-weight": (0.0, 0, 1e6, "weight of the judge's inner activations; 10 with --masked"),
    "--sigreg-weight": (0.03, 0, 1e6, "lambda; halve it when the batch size doubles"),
    "--slices": (64, 1, 10**5, "directions that SIGReg tests in a step"),
    "--width": (32, 1, 4096, "channels after the stem; cifar10 64, celeba 128"),
    "--latent-channels": (8, 1, 4096, "C of a code (C, side/8, side/8); celeba 32"),
    "--latent-dim": (0, 0, 10**6, "numbers of a global code instead; celeba --masked 128"),
    "--epochs": (12, 1, 10**6, "passes over the images; cifar10 15, celeba 50"),
    "--batch-size": (64, 2, 10**6, "images per step, in each process; cifar10 and celeba 128"),
    "--lr": (1e-2, 1e-9, 1, "peak learning rate; cifar10 0.003, celeba 0.001"),
    "--seed": (0, 0, 2**63 - 1, "seed of the initial weights and of all draws"),
}
SHAPE = ("channels", "width", "latent_channels", "latent_dim", "size")  # settings that make an Autoencoder
NOT_SETTINGS = ("data", "device", "compile", "out", "eval", "recognition")  # may change when a run goes on


def build_parser():
    """Return the parser of the flags, with the defaults of the shapes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: need(False, f"{message}; see --help")
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--dataset", default="shapes", help="shapes, cifar10, celeba, a folder of images, or an .npz")
    add("--data", default="data", metavar="DIR", help="where cifar10 and celeba are, or are downloaded to")
    add("--objective", choices=("stae", "mse"), default="stae", help="mse: the plain autoencoder")
    add("--masked", action="store_true", help="fill a square hole in the images")
    add("--transform", choices=TRANSFORMS, default="pixel", help="T; crop for other data sets")
    add("--crop", type=float, nargs=2, default=[0.5, 1.0], metavar=("MIN", "MAX"), help="share of the side")
    add("--judge", choices=JUDGES, default="frozen", help="encoder, detached or not; its EMA; its first copy")
    for flag, (default, _, _, text) in NUMBERS.items():
        add(flag, type=type(default), default=default, help=text)
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="where to run")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="in training; bf16 where it is fast")
    add("--compile", action="store_true", help="compile the objective: slow to start, then faster")
    add("--out", metavar="DIR", help="folder to write to, or to go on in; else a new one under runs/")
    add("--eval", nargs="+", metavar="RUN", help="measure runs or checkpoints instead of training")
    add("--recognition", action="store_true", help="with --eval: a classifier of originals judges too")
    return parser


def preset(args, images=None):
    """Return what the data, the machine and, once loaded, the images (N, C, S, S) change of the defaults."""
    row = dict(PRESETS.get(args.dataset, PRESETS["cifar10"]), layer_weight=10.0 if args.masked else 0.0)
    row |= {"latent_dim": 128} if args.dataset == "celeba" and args.masked else {}
    cuda = args.device == "cuda" and torch.cuda.is_available()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_bf16_supported(False) if cuda else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    row["precision"] = "bf16" if fast else "fp32"
    row["processes"] = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun, as is RANK
    if images is not None:
        row |= {"channels": images.shape[1], "size": images.shape[2]}
        row |= {"latent_channels": args.width} if args.latent_dim else {}  # as the author does
        if args.dataset not in PRESETS:  # at least 1,500 steps
            row["batch_size"] = max(2, min(128, len(images) // 8))
            steps = len(images) // (row["batch_size"] * row["processes"])
            row["epochs"] = max(15, math.ceil(1500 / max(1, steps)))
    return row


def check(args, parser=None):
    """Raise BadInput for a setting out of range or, given the parser, for a flag that does nothing here."""
    for flag, (_, low, high, _) in NUMBERS.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        need(low <= value <= high, f"{flag} {value}: must be from {low:,} to {high:,}")
    need(args.size % 8 == 0 and args.size != 8, f"--size {args.size}: the side must divide by 8, from 16")
    need(0 < args.crop[0] <= args.crop[1] <= 1, f"--crop {args.crop}: must be in (0, 1], the smaller first")
    need(args.latent_dim or 8 * args.width % args.latent_channels == 0,
         f"--latent-channels {args.latent_channels}: must divide 8 * --width, {8 * args.width}")
    if parser:
        need(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is none; pass cpu")
        mse = args.objective == "mse"
        idle = dict(recognition=True, latent_channels=args.latent_dim, crop=mse or args.transform != "crop")
        idle |= dict.fromkeys(("transform", "judge", "layer_weight", "sigreg_weight", "slices"), mse)
        idle |= dict(hole=not args.masked, mask_ratio=mse or args.transform in ("none", "crop", "stack"))
        if args.eval:  # the runs have their settings; only their data may be others
            idle = dict.fromkeys(vars(args).keys() - {"dataset", "validation", *NOT_SETTINGS}, True)
        for name in idle:
            needless = idle[name] and getattr(args, name) != parser.get_default(name)
            need(not needless, f"--{name.replace('_', '-')}: has no effect with these settings; leave it out")


def open_folder(out, name):
    """Return --out or, without it, the first of runs/NAME, runs/NAME-2, ... that is not there yet."""
    folders = (Path("runs", f"{name}-{count}" if count > 1 else name) for count in range(1, 10**6))
    folder = Path(out) if out else next(folder for folder in folders if not folder.exists())
    need(not folder.is_file(), f"--out {folder}: is a file; pass a folder")
    used = [x for x in "metrics.json comparison.png log.csv checkpoint.pt".split() if (folder / x).exists()]
    unfinished = name != "eval" and "checkpoint.pt" in used and "metrics.json" not in used
    need(unfinished or not used, f"--out {folder}: holds {used}; pass another folder, or --eval {folder}")
    return folder


@torch.no_grad()
def report(runs, splits, folder, classifier=None):
    """Measure {label: (model, settings, history)}; write comparison.png and metrics.json; print the table."""
    tables, test_images = {}, splits[1][0]
    rows = {"originals": test_images[:16].float() / 255}
    for label, (model, config, history) in runs.items():
        print(f"measuring {label} on {len(test_images):,} test images", flush=True)
        torch.manual_seed(0)
        holes = draw_holes(test_images.shape, generator_for("cpu", 0), config.hole)  # for every run the same
        tables[label] = evaluate(model, *splits, holes if config.masked else None, classifier)
        seconds, speed = sum(epoch["seconds"] for epoch in history), history[-1]["images_per_second"]
        tables[label] |= {"train_seconds": seconds, "images_per_second": speed}
        x = rows["originals"].to(next(model.parameters()).device)
        rows[label] = model.decode(model.encode(x))
        if config.masked:
            rows[f"holes of {config.hole:g}"] = holed = cut_holes(x, holes[:16].to(x.device))
            rows[f"{label}, from holes"] = model.decode(model.encode(holed))
        rows |= code_rows(model, x) if len(runs) == 1 else {}
    save_rows(folder / "comparison.png", rows)
    print_table(tables)
    (folder / "metrics.json").write_text(json.dumps(tables if len(runs) > 1 else tables[label], indent=1))
    print(f"written to {folder}: comparison.png, metrics.json")


def train_command(parser, argv):
    """Train a run, or go on with it, and measure it."""
    parser.set_defaults(**preset(parser.parse_args(argv)))
    args = parser.parse_args(argv)
    check(args, parser)
    name = [Path(args.dataset).absolute().stem, *["masked"] * args.masked, args.objective]
    name += [args.transform, args.judge] * (args.objective == "stae") + [f"s{args.seed}"]
    folder = open_folder(args.out, "-".join(name))
    need(args.dataset in PRESETS or Path(args.dataset).resolve() not in (folder / "file").resolve().parents,
         f"--out {folder}: lies among the images of --dataset; pass another folder")
    world, rank = args.processes, int(os.environ["RANK"]) if args.processes > 1 else 0
    if world > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(days=1))
    if rank:
        sys.stdout = open(os.devnull, "w")
        distributed.barrier()  # until the first process has downloaded and decoded
    splits = load_data(args.dataset, args.data, args.size, args.validation)
    if world > 1 and not rank:
        distributed.barrier()
    images = splits[0][0]
    if args.device == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.cuda()
    parser.set_defaults(**preset(args, images))
    args = parser.parse_args(argv)
    args.size = images.shape[2]
    check(args, parser)
    need(args.batch_size * world <= len(images), f"--batch-size {args.batch_size}: over {len(images)} images")
    config = argparse.Namespace(**{k: value for k, value in vars(args).items() if k not in NOT_SETTINGS})
    stored = load_checkpoint(folder)[2] if (folder / "checkpoint.pt").exists() else None
    old = stored["config"] if stored else vars(config)
    differ = [f"{k} {old.get(k)}, here {value}" for k, value in vars(config).items() if old.get(k) != value]
    need(not differ, f"--out {folder}: holds a run of other settings ({'; '.join(differ)}); pass another")
    changed = [f"{k} {value}" for k, value in vars(config).items() if value != parser.get_default(k)]
    print(f"{folder}: {len(images):,} images to train on, {len(splits[1][0]):,} to test on;", *changed)
    torch.manual_seed(config.seed)
    model = Autoencoder(*(vars(config)[name] for name in SHAPE))
    model = model.to(args.device, memory_format=torch.channels_last)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        history = train(model, images, config, folder, stored, args.compile)
        if rank == 0:
            report({folder.name: (model.eval(), config, history)}, splits, folder)
    except (SystemExit, OSError, RuntimeError):  # RuntimeError: out of memory, or no room for a checkpoint
        start = f"torchrun --nproc_per_node {world}" if world > 1 else "python"
        line = shlex.join(argv if args.out else [*argv, "--out", str(folder)])
        print(f"\nto resume: {start} stae.py {line}", file=sys.stdout if rank else sys.stderr)
        raise


def eval_command(parser, argv):
    """Measure runs side by side, on their own data or, all of them, on what the flags name."""
    loaded = {path: load_checkpoint(path) for path in parser.parse_args(argv).eval}
    kinds = set()
    for _, config, _ in loaded.values():
        parser.set_defaults(**vars(config))
        args = parser.parse_args(argv)
        check(args, parser)
        kinds.add((args.dataset, args.validation, args.size, args.channels))
    need(len(kinds) == 1, f"--eval: runs of different data or sizes, {sorted(kinds)}; pass fewer")
    folder, classifier = open_folder(args.out, "eval"), None
    splits = load_data(args.dataset, args.data, args.size, args.validation)
    need(splits[0][0].shape[1] == args.channels, f"--dataset {args.dataset}: needs {args.channels} channels")
    torch.manual_seed(0)
    if args.recognition:
        need(splits[0][1] is not None, f"--recognition: {args.dataset} has no labels; leave it out")
        classifier = train_classifier(*splits[0], torch.device(args.device), preset(args)["precision"])
    folder.mkdir(parents=True, exist_ok=True)
    report({path: (model.to(args.device), config, stored["history"])
            for path, (model, config, stored) in loaded.items()}, splits, folder, classifier)


def main(argv=None):
    """Run the command line -> exit code: 0, 1 for a failure, 2 for bad input; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        parser = build_parser()
        (eval_command if parser.parse_args(argv).eval else train_command)(parser, argv)
        return 0
    except (BadInput, FloatingPointError, OSError, torch.cuda.OutOfMemoryError) as error:
        print("stae.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


if __name__ == "__main__":
    sys.exit(main())
