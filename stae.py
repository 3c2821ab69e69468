"""Self-Teaching Autoencoder (STAE): learn to reconstruct images without a reconstruction loss.

    python stae.py                                       # drawn shapes: no download, no GPU
    python stae.py --dataset cifar10 --transform crop    # CIFAR-10, downloaded at the first run
    python stae.py --dataset cifar10 --objective mse     # the baseline: same network and schedule
    python stae.py --dataset celeba --masked             # faces with a hole in them, completed
    python stae.py --eval runs/ONE runs/OTHER            # one table and one picture of several runs

The method is sections 1 to 4; copied out, they need torch alone:

    z = E(x), x_hat = D(z)                               # encoder and decoder
    loss = d(J(T(x)), J(T(x_hat))) + lambda * SIGReg(z)  # T: the same random crop or mask for both

The judge J is the encoder itself. Its weights are constants for the step, or it would learn to
overlook errors: gradient reaches the decoder through x_hat, and the encoder only through z. No
pixel of x_hat is ever compared with one of x. SIGReg pulls the codes towards N(0, I), so that they
do not collapse. Without T the pair may end in a private language: images that mean the same to the
encoder and look wrong to us. One training step, with a generator on the device of the images:

    transform = draw_transform("crop", images.shape, generator, turn=True)
    slices = draw_slices(8, 16, generator)  # two for each of the 8 channels of a code
    model.norm.momentum = max(0.1, 1 / (step + 1))  # good running averages at once
    loss, terms = stae_loss(model, images, transform, slices, freeze(model.encoder))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

From Matteo Peluso ("the author" below): the objective, the network, the transformations, masked
    mode, the frozen judge. "Self-Teaching Autoencoder", 2026,
    https://github.com/the-puzzler/leautoencoder
From LeJEPA: SIGReg. Balestriero and LeCun, arXiv 2511.08544, 2025.
Ours, with what the author has in brackets; README.md names the flags that give the author's:
    crops: half to all of the side, mirrored and turned (one pixel, or 0.15 of the side; not turned)
    d: both sides in units of the features of x (each side in its own)
    BatchNorm of the code: not affine, and of x alone (affine; T(x) and T(x_hat) pass it too)
    inner activations, training, evaluation
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision import datasets, utils
from torchvision.transforms import functional as TF


# 1. Model: the author's network, but for the BatchNorm of the code --------------------------------


class Down(nn.Module):
    """Halve the side, (B, i, h, w) -> (B, o, h/2, w/2): two 3x3 convolutions, a weightless skip."""

    def __init__(self, inputs, outputs):
        super().__init__()
        if 4 * inputs % outputs:
            raise ValueError(f"{outputs} channels: must divide {4 * inputs}, 4 times those before")
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        # The skip: pixel_unshuffle(x, 2) has 4i channels, and each group of them is averaged. As a
        # convolution with constant weights it is faster
        group = 4 * inputs // outputs
        average = torch.eye(outputs).repeat_interleave(group, dim=1) / group  # (o, 4i)
        self.register_buffer("average", average.view(outputs, inputs, 2, 2), persistent=False)

    def forward(self, x):
        skip = F.conv2d(x, self.average, stride=2)
        return F.silu(self.conv2(F.silu(self.conv1(x))) + skip)


class Up(nn.Module):
    """Double the side, (B, i, h, w) -> (B, o, 2h, 2w): two 3x3 convolutions and a 1x1 skip."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        return F.silu(self.skip(x) + self.conv2(F.silu(self.conv1(x))))


class Encoder(nn.Module):
    """Map images (B, channels, H, W) in [0, 1] to a list: features (B, C, H/8, W/8) or
    (B, n, 1, 1), then inner activations (B, 2w, H/4, W/4). Those of the stem are left out: they are
    nearly linear in the pixels. The BatchNorm of the code is not here: it must not see T(x)."""

    def __init__(self, channels, width, latent_channels, latent_dim=0, size=32):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.down1 = Down(width, 2 * width)
        self.down2 = Down(2 * width, latent_channels)
        self.head = nn.Identity()
        if latent_dim:
            linear = nn.Linear(latent_channels * (size // 8) ** 2, latent_dim)
            self.head = nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, (latent_dim, 1, 1)))

    def forward(self, images):
        stem = F.silu(self.stem(images))  # (B, w, H/2, W/2)
        middle = self.down1(stem)  # (B, 2w, H/4, W/4)
        return [self.head(self.down2(middle)), middle]


class Autoencoder(nn.Module):
    """Encoder, BatchNorm, decoder: images (B, channels, 8a, 8b) in [0, 1], a and b integers.

    width: w, the channels after the stem. latent_channels: C of a code (B, C, H/8, W/8); it must
    divide 8w. latent_dim: n, for a global code (B, n, 1, 1) of images of side `size` instead."""

    def __init__(self, channels=3, width=64, latent_channels=8, latent_dim=0, size=32):
        super().__init__()
        self.size = size
        self.encoder = Encoder(channels, width, latent_channels, latent_dim, size)
        # Not affine: a learned scale would fight SIGReg. A tiny eps: new features vary by 1e-5 only
        self.norm = nn.BatchNorm2d(latent_dim or latent_channels, affine=False, eps=1e-8)
        layers = [Up(latent_channels, 2 * width), Up(2 * width, width), nn.Upsample(scale_factor=2)]
        if latent_dim:
            side = size // 8
            linear = nn.Linear(latent_dim, latent_channels * side**2)
            spatial = nn.Unflatten(1, (latent_channels, side, side))
            layers = [nn.Flatten(), linear, spatial, nn.SiLU(), *layers]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, images):
        """Return the reconstructions of images."""
        return self.decode(self.encode(images))

    def encode(self, images):
        """Return the code; in training, mean 0, deviation 1 per channel; float32 under autocast."""
        return self.norm(self.encoder(images)[0].to(self.norm.running_mean.dtype))

    def decode(self, code):
        """Return images (B, channels, H, W) in [0, 1], of the code's type under autocast too."""
        return self.decoder(code).to(code.dtype).sigmoid()


# 2. SIGReg: are the codes a standard Gaussian? (LeJEPA) -------------------------------------------


def draw_slices(dimensions, count, generator):
    """Draw `count` uniform unit columns (dimensions, count); two per dimension are enough."""
    slices = torch.randn(dimensions, count, device=generator.device, generator=generator)
    return F.normalize(slices, dim=0)


def sigreg(codes, slices, knots=17, t_max=3.0):
    """Return the Epps-Pulley statistic of codes (N, D) or (N, D, h, w) along slices (D, M).

    Along each slice the characteristic function of the N projected codes is compared with
    exp(-t^2/2), that of a standard Gaussian: N times the integral over [-t_max, t_max] of the
    squared gap times exp(-t^2/2). Mean over slices, and over the places of a spatial code.
    N(0, I) gives 1.05 on average, for any N and D; (N, D) standardised by their own batch, as the
    global codes of a training step, 0.5 to 0.6. A fixed mismatch grows with N, so twice the batch
    wants half of the weight in a loss. Raises ValueError for other shapes."""
    if codes.dim() not in (2, 4) or codes.shape[1] != len(slices):
        shape, D = tuple(codes.shape), len(slices)
        raise ValueError(f"codes {shape}, slices of {D}: need (N, {D}) or (N, {D}, h, w)")
    with torch.autocast(codes.device.type, enabled=False):  # bf16 would drown small gaps
        codes = codes.float().reshape(*codes.shape[:2], -1).transpose(1, 2)  # (N, places, D)
        projected = (codes @ slices.float()).flatten(1)  # (N, places * M)
        t = torch.linspace(0, t_max, knots, device=codes.device)[:, None]
        gaussian = torch.exp(-t.square() / 2)  # (knots, 1)
        angles = t[:, None] * projected  # (knots, N, places * M)
        real, imaginary = angles.cos().mean(dim=1), angles.sin().mean(dim=1)
        gap = (real - gaussian).square() + imaginary.square()  # (knots, places * M)
        # The integrand is even: twice the integral over [0, t_max]
        return len(codes) * torch.trapezoid(2 * gap * gaussian, t, dim=0).mean()


# 3. Transforms: T, one draw for x and x_hat, of the author's kinds; holes for masked mode ---------

TRANSFORMS = ("none", "pixel", "patch", "channel", "crop")


def draw_transform(name, shape, generator, crop_range=(0.5, 1.0), mask_ratio=0.7, turn=False):
    """Draw T for images of `shape` (B, C, H, W), a function of images that does the same to each
    batch of this shape.

    crop: a box, crop_range of the image's sides, enlarged and, if turn, mirrored and turned.
    pixel, patch (4x4, for sides 4a, 4b): round(mask_ratio * places) of them, never all, are black
    in all channels. channel: each is black with probability mask_ratio, grey images as a whole.
    none: nothing is done. Raises ValueError for another name or an impossible share."""
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform {name!r}, expected one of {', '.join(TRANSFORMS)}")
    if not 0 < crop_range[0] <= crop_range[1] <= 1:
        raise ValueError(f"crop_range {crop_range}: must rise, from above 0 to at most 1")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio}: must lie between 0 and 1")
    if name == "none":
        return lambda images: images
    if name == "crop":
        boxes = draw_boxes(shape, generator, *crop_range)
        if not turn:
            return lambda images: crop(images, boxes)
        # An error that the judge overlooks in one orientation shows in another. E-LPIPS does this
        # with a fixed network, arXiv 1906.03973
        kinds = 8 if shape[2] == shape[3] else 4
        symmetries = torch.randint(kinds, shape[:1], device=generator.device, generator=generator)
        return lambda images: apply_symmetries(crop(images, boxes), symmetries)
    if name == "channel":
        uniform = torch.rand(*shape[:2], 1, 1, device=generator.device, generator=generator)
        keep = (uniform >= mask_ratio).float()
    else:
        keep = draw_mask(shape, generator, mask_ratio, cell=4 if name == "patch" else 1)
    return lambda images: images * keep.to(images.dtype)


def draw_mask(shape, generator, ratio, cell):
    """Draw a mask (B, 1, H, W): 0 in round(ratio * count) of its cell x cell squares, never all."""
    rows, columns = shape[2] // cell, shape[3] // cell
    count = rows * columns
    uniform = torch.rand(shape[0], count, device=generator.device, generator=generator)
    # argsort makes a random permutation of 0, 1, ...: exactly so many lie below a limit
    keep = uniform.argsort(dim=1) >= min(round(ratio * count), count - 1)
    keep = keep.view(-1, 1, rows, columns).float()
    return keep.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)


def draw_boxes(shape, generator, smallest, largest):
    """Draw a box in each image of `shape` (B, C, H, W) -> (B, 4) int64: top, left, height, width.
    Its share of the side is log-uniform in [smallest, largest]; its place is uniform."""
    uniform = torch.rand(shape[0], 3, device=generator.device, generator=generator)
    share = smallest * (largest / smallest) ** uniform[:, 0]
    height = (share * shape[2]).round().clamp(min=1)
    width = (share * shape[3]).round().clamp(min=1)
    top = (uniform[:, 1] * (shape[2] - height + 1)).floor()
    left = (uniform[:, 2] * (shape[3] - width + 1)).floor()
    return torch.stack((top, left, height, width), dim=1).long()


def crop(images, boxes):
    """Cut a box (B, 4) out of each image (B, C, H, W) and enlarge it to full size: what slicing and
    F.interpolate(mode="bilinear") give, for all images at once. In float32: bf16 is too coarse."""

    def places(start, extent, size):  # where the pixels of the result lie, in [-1, 1] of the image
        inside = (torch.arange(size, device=images.device) + 0.5) * extent[:, None] / size - 0.5
        inside = inside.clamp(min=0).minimum(extent[:, None] - 1.0)  # nothing outside bleeds in
        return (2 * (start[:, None] + inside) + 1) / size - 1  # (B, size)

    top, left, height, width = boxes.unbind(dim=1)
    y = places(top, height, images.shape[2])
    x = places(left, width, images.shape[3])
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)
    cut = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return cut.to(images.dtype)


def apply_symmetries(images, symmetries):
    """Mirror and turn images (B, C, H, W) by symmetries (B,), 0 to 7, or 0 to 3 if H is not W: the
    bits are left to right, top to bottom, rows to columns."""
    symmetries = symmetries[:, None, None, None]
    images = torch.where((symmetries & 1) > 0, images.flip(3), images)
    images = torch.where((symmetries & 2) > 0, images.flip(2), images)
    if images.shape[2] == images.shape[3]:
        images = torch.where((symmetries & 4) > 0, images.mT, images)
    return images


def draw_holes(shape, generator, ratio=0.35):
    """Draw a hole in each image of `shape` (B, C, H, W) -> boxes (B, 4), of about the share `ratio`
    of the area: s * H by s * W, rounded, s = sqrt(ratio), but never all of the image. Raises
    ValueError for a ratio outside (0, 1)."""
    if not 0 < ratio < 1:
        raise ValueError(f"ratio {ratio}: a hole's share of the area must lie between 0 and 1")
    side = min(ratio**0.5, 1 - 1 / min(shape[2:]))
    return draw_boxes(shape, generator, side, side)


def hole_mask(holes, images):
    """Turn boxes (B, 4) in images (B, C, H, W) into (B, 1, H, W), 1 inside and 0 outside."""
    top, left, height, width = holes[:, :, None].unbind(dim=1)  # (B, 1) each
    row = torch.arange(images.shape[2], device=holes.device)
    column = torch.arange(images.shape[3], device=holes.device)
    y = (row >= top) & (row < top + height)  # (B, H)
    x = (column >= left) & (column < left + width)  # (B, W)
    return (y[:, None, :, None] & x[:, None, None, :]).to(images.dtype)


def cut_holes(images, holes):
    """Fill holes (B, 4) with the mean colour of each image (B, C, H, W), hidden pixels included."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return images.lerp(mean, hole_mask(holes, images))


# 4. Objective: the losses -------------------------------------------------------------------------

# They work with any model that has
#     model.encode(images) -> code (B, D) or (B, C, h, w), of about N(0, 1) in each channel
#     model.decode(code) -> images in [0, 1], of the input's shape
#     model.encoder(images) -> features like a code, or a list of these and of inner activations


def freeze(encoder):
    """Return the encoder as a judge: a fixed function; gradient passes through it to its input.

    It runs in eval mode, so that a BatchNorm or a dropout in an encoder of yours does the same to
    both images. Call freeze anew in each step: it shares the weights of the encoder, which move on,
    and copies its buffers. Activation checkpointing needs use_reentrant=False and an encoder
    without BatchNorm or dropout."""
    constants = {name: weight.detach() for name, weight in encoder.named_parameters()}
    # Copies, since a later call in train mode moves averages that the backward pass still needs
    constants |= {name: buffer.clone() for name, buffer in encoder.named_buffers()}

    def judge(images):
        modes = [module.training for module in encoder.modules()]
        encoder.eval()
        try:
            return torch.func.functional_call(encoder, constants, images)
        finally:
            for module, mode in zip(encoder.modules(), modes):
                module.training = mode

    return judge


def distance(target, seen, layer_weight=0.0):
    """Return d, the distance between what the judge sees in x and in x_hat, in float32.

    target, seen: features (B, D), B > 1, or (B, C, h, w), or a list of these and of inner
    activations. Features: mean of (seen - target)^2 / v, v the target's variance per channel over
    batch and places. (The author scales both sides by their own batch, which hides a shift common
    to all of its images.) layer_weight (ours) times a sum over inner activations is added, of
    mean((seen - target)^2) / (variance of the target). Raises ValueError for shapes that differ
    or are none of these."""
    if torch.is_tensor(target):
        target, seen = [target], [seen]
    if layer_weight and len(target) < 2:
        raise ValueError(f"layer_weight {layer_weight}: the encoder returns no inner activations")
    if not layer_weight:
        target, seen = target[:1], seen[:1]
    shapes, seen_shapes = [tuple(a.shape) for a in target], [tuple(a.shape) for a in seen]
    if shapes != seen_shapes:
        raise ValueError(f"features {shapes} of x, but {seen_shapes} of x_hat")
    shape = shapes[0]
    if len(shape) not in (2, 4) or target[0].numel() == shape[1]:
        needed = "(B, D) or (B, C, h, w), with several values a channel"
        raise ValueError(f"features {shape}: need {needed}; pool tokens")
    features, seen_features = target[0].float(), seen[0].float()
    all_but_channels = [dim for dim in range(len(shape)) if dim != 1]
    # 1e-6 is small: new features have variances of 1e-5 to 1e-3. The variance is not detached, or
    # a live judge would lower the loss by shrinking its features
    variance = features.var(dim=all_but_channels, correction=0, keepdim=True)
    total = ((seen_features - features).square() / (variance + 1e-6)).mean()
    for inner, seen_inner in zip(target[1:], seen[1:]):
        error = (seen_inner.float() - inner.float()).square().mean()
        total = total + layer_weight * error / (inner.float().var(correction=0) + 1e-4)
    return total


def check_decoded(x_hat, images):
    """Raise ValueError unless x_hat has the shape of images: others would be broadcast."""
    if x_hat.shape != images.shape:
        raise ValueError(f"the model decodes {tuple(x_hat.shape)} from {tuple(images.shape)}")


def stae_loss(model, images, transform, slices, judge, sigreg_weight=0.03, layer_weight=0.0):
    """Return the loss of images (B, C, H, W) in [0, 1], and its terms by name; detach those that
    you keep. Raises ValueError for shapes that do not fit.

    transform: T, any function that does the same to both images. slices: (D, M), D the channels of
    z. judge: freeze(model.encoder), or model.encoder itself, a live one, for comparison: the
    distance then trains its weights too. sigreg_weight: lambda, 0.03 for a batch of 128; halve it
    when B doubles. layer_weight: see distance."""
    z = model.encode(images)
    x_hat = model.decode(z)
    check_decoded(x_hat, images)
    judged = distance(judge(transform(images)), judge(transform(x_hat)), layer_weight)
    regulariser = sigreg(z, slices)
    loss = judged + sigreg_weight * regulariser
    return loss, {"distance": judged, "sigreg": regulariser}


def masked_loss(
    model, images, holed, transform, slices, judge, sigreg_weight=0.03, layer_weight=10.0
):
    """Return the loss of masked mode and its terms by name.

    What is decoded from `images` and from `holed`, the same images with holes, must match `images`
    under the judge, and each other. At a layer_weight of 0 faces are worse. See stae_loss."""
    z, z_holed = model.encode(torch.cat((images, holed))).chunk(2)  # one call: both share a norm
    x_hat, x_holed = model.decode(z), model.decode(z_holed)
    check_decoded(x_hat, images)
    target = judge(transform(images))
    clean = distance(target, judge(transform(x_hat)), layer_weight)
    masked = distance(target, judge(transform(x_holed)), layer_weight)
    # Without T, of features alone, in units of those of x_hat; gradient flows into both
    agreement = distance(judge(x_hat), judge(x_holed))
    regulariser = (sigreg(z, slices) + sigreg(z_holed, slices)) / 2
    loss = (agreement + clean + masked) / 3 + sigreg_weight * regulariser
    return loss, {"agreement": agreement, "clean": clean, "masked": masked, "sigreg": regulariser}


def mse_loss(model, images, holed=None):
    """Return the baseline's loss, mean((D(E(x)) - x)^2), and its term. holed: what E sees
    instead, the same images with holes."""
    x_hat = model.decode(model.encode(images if holed is None else holed))
    check_decoded(x_hat, images)
    loss = (x_hat - images).square().mean()
    return loss, {"mse": loss}


# 5. Data: images uint8 (N, C, S, S) to train on and to test on; labels are not read ---------------


class BadInput(ValueError):
    """Something the user gave cannot be used; the message names it and the remedy."""


def need(ok, message):
    """Raise BadInput(message) unless `ok`."""
    if not ok:
        raise BadInput(message)


def check_type(images):
    """Raise BadInput unless images are uint8."""
    need(images.dtype == torch.uint8, f"images are {images.dtype}: must be uint8, from 0 to 255")


@contextmanager
def reading(path):
    """Turn whatever a library raises for a damaged or foreign file into one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).split(". ")[0]  # what follows is advice to programmers
        raise BadInput(f"{path}: cannot be read ({reason})") from error


def seeded(device, *key):
    """Return a random generator on `device` that is seeded by the integers in `key`. Keys must not
    differ by zeros at their end alone: to numpy (0, 1) and (0, 1, 0) are the same."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def load_data(dataset, root="data", size=0):
    """Load "shapes", "cifar10", "celeba" (in `root`), a folder or an .npz -> the images to train on
    and those to test on, uint8 (N, C, S, S). Raises BadInput.

    size: side of the square images; 0: as they are, 64 for a folder, 128 for celeba."""
    if dataset == "celeba":
        splits = list_celeba(Path(root, "celeba", "img_align_celeba"))
        return [read_images(files, size or 128, crop=128)[0] for files in splits]
    if dataset == "shapes":
        splits = make_shapes(12_000)
    elif dataset == "cifar10":
        splits = read_cifar10(root)
    elif dataset.lower().endswith(".npz"):
        splits = read_npz(dataset)
    else:
        splits = list_folder(Path(dataset))
        return [read_images(files, size or 64)[0] for files in splits]
    return [resize(images, size) for images in splits]


def make_shapes(count, size=32):
    """Draw two discs, rings or rectangles per image, grey on black, after the author's toy set.
    Blended in integers, so that they are the same on every machine."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return torch.randint(low, high, (count, 1, 1), generator=generator)

    y, x = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
    canvas = torch.zeros(count, size, size, dtype=torch.int32)
    for _ in range(2):
        kind, grey = draw(0, 3), draw(80, 256)
        radius, other_radius = draw(3, 10), draw(3, 10)
        row, column = draw(5, size - 5), draw(5, size - 5)
        dy, dx = (y - row).abs(), (x - column).abs()
        from_centre = (dy**2 + dx**2).float().sqrt()
        # How far inside the edge of each kind every pixel lies, (count, size, size)
        disc = radius + 0.5 - from_centre
        ring = torch.minimum(disc, from_centre - radius + 2.5)
        rectangle = torch.minimum(radius - dy, other_radius - dx) + 0.5
        inside = torch.where(kind == 0, disc, torch.where(kind == 1, ring, rectangle))
        cover = (inside.clamp(0, 1) * 256).int()
        canvas = (grey * cover + canvas * (256 - cover)) // 256
    images = canvas.to(torch.uint8)[:, None]
    end = count - count // 6
    return [images[:end], images[end:]]


def read_cifar10(root):
    """Read CIFAR-10 in `root`; torchvision downloads it unless it is there."""
    splits = []
    for train in (True, False):
        with reading(f"{root}/cifar-10-batches-py, downloaded unless it is there"):
            stored = datasets.CIFAR10(root, train=train, download=True)
        splits.append(torch.from_numpy(stored.data).permute(0, 3, 1, 2))
    return splits


def read_npz(path):
    """Read x_train and x_test, uint8 (N, H, W) or (N, H, W, 1 or 3). Raises BadInput that tells
    what was found."""
    with reading(path), np.load(path) as file:
        arrays = {name: file[name] for name in ("x_train", "x_test") if name in file}
        rest = [name for name in file if name not in arrays]
    found = ", ".join([f"{name} {x.dtype} {x.shape}" for name, x in arrays.items()] + rest)
    print(f"{path}: {found}")
    splits = []
    for name in ("x_train", "x_test"):
        need(name in arrays, f"{path}: needs {name}; found {found}")
        x = arrays[name]
        if x.ndim == 3:
            x = x[..., None]
        fine = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3) and x.size > 0
        need(fine, f"{path}: images must be uint8 (N, H, W) or (N, H, W, 1 or 3); found {found}")
        need(x.max() != 1, f"{path}: {name} is of 0 and 1 alone; multiply it by 255")
        splits.append(torch.from_numpy(x).permute(0, 3, 1, 2))
    same = splits[0].shape[1:] == splits[1].shape[1:]
    need(same, f"{path}: x_train and x_test differ in size or channels; found {found}")
    return splits


def list_celeba(folder):
    """List the faces in a folder, the unpacked zip or a part of it, by the official splits."""
    if (folder / folder.name).is_dir():  # as Kaggle packs it
        folder = folder / folder.name
    files = sorted(folder.glob("[0-9]*.jpg"))
    train = [file for file in files if file.stem <= "162770"]
    test = [file for file in files if file.stem >= "182638"]
    print(f"{folder}: {len(train):,} and {len(test):,} faces, official splits without validation")
    need(train and test, f"{folder}: lacks faces of a split; unpack img_align_celeba.zip there")
    return [train, test]


def find_files(folder, above=()):
    """Yield (path, reason to leave it out or "") for what lies below a folder. Links are followed,
    but never back to a folder `above`."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name[0] == "." or path.name in ("@eaDir", "__MACOSX"):
            yield path, "hidden"
        elif path.is_dir() and path.resolve() in above:
            yield path, "a link in a circle"
        elif path.is_dir():
            yield from find_files(path, above)
        elif path.suffix.lower() in Image.registered_extensions():
            yield path, ""
        else:
            yield path, f"not a kind that is read here, {path.suffix or 'without an ending'}"


def name_hash(name):
    """Return an integer that depends on the name alone, as good as random."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16)


def list_folder(folder):
    """List the images below a folder -> two lists of files, and print what was found: train/ and
    test/ (or val/, valid/, validation/), else a tenth is held out, by a hash of each name, so that
    a new file moves no other one."""
    need(folder.is_dir(), f"{folder}: no such folder; or is it shapes, cifar10, celeba, .npz?")
    names, left_out = [], {}
    for path, reason in find_files(folder):
        name = path.relative_to(folder).as_posix()
        if reason:
            left_out.setdefault(reason, []).append(name)
        else:
            names.append(name)
    names.sort(key=name_hash)  # the first 16 of the test images are shown: not all of one folder

    level = 0  # where train/ may lie: archives often unpack into one folder more
    while len({name.split("/")[level] for name in names if name.count("/") > level}) == 1:
        level += 1
    parts = {}
    for name in names:
        folders = name.lower().split("/")[:-1]
        top = folders[level] if len(folders) > level else ""
        parts.setdefault(top, []).append(name)
    tests = [part for part in ("test", "val", "valid", "validation") if part in parts]

    if "train" in parts and tests:
        found = f"those in {tests[0]}/"
        train, test = parts.pop("train"), parts.pop(tests[0])
        rest = sum(parts.values(), [])
        if rest:
            left_out["in neither split"] = rest
    else:
        found = "about a tenth, as there is no train/ beside a test/"
        train = [name for name in names if name_hash(name) % 10]
        test = [name for name in names if name_hash(name) % 10 == 0]
        if not train or not test:
            train, test = names[1:], names[:1]

    print(f"{folder}: {len(train):,} images to train on, {len(test):,} to test on ({found})")
    for reason, files in left_out.items():
        print(f"left out {len(files):,}: {reason}; the first is {files[0]}")
    need(train, f"--dataset {folder}: holds no two images")
    return [[folder / name for name in part] for part in (train, test)]


def read_images(paths, size, crop=None):
    """Decode the centres of image files: squares of `crop` pixels or, without it, of the shorter
    side, resized -> uint8 (N, 3, size, size) of those that can be read, and bool (all,), which can.
    The others are counted on the screen. Raises BadInput when all are."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    readable = torch.zeros(len(paths), dtype=torch.bool)

    def read(index):
        try:
            images[index] = decode(paths[index], size, crop)
            readable[index] = True
        except Exception as error:  # Pillow raises whatever its decoders do
            return f"{paths[index]}: {error}"

    print(f"decoding {len(paths):,} images", flush=True)
    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(read, range(len(paths))) if problem]
    need(readable.any(), f"none of {len(paths):,} images can be read: {problems[:1]}")
    if problems:
        print(f"left out {len(problems):,} that cannot be read, the first is {problems[0]}")
        for place, index in enumerate(readable.nonzero()[:, 0].tolist()):
            images[place] = images[index]  # there may be no room for a second tensor
    return images[: len(paths) - len(problems)], readable


def decode(path, size, crop):
    """Decode the centre of an image file -> uint8 (3, size, size)."""
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # image generators write long texts
    image = Image.open(path)
    if crop is None:
        image.draft("RGB", (2 * size, 2 * size))  # a JPEG of 12 megapixels 11 times faster
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF costs the turn, not the picture
        pass
    if image.mode.startswith("I;16"):  # 16 bits of grey, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    need(image.mode not in ("I", "F"), "its pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    side = crop or min(image.size)
    need(side <= min(image.size), f"smaller than {side} pixels")
    image = TF.center_crop(image.convert("RGB"), [side, side])
    return TF.pil_to_tensor(TF.resize(image, [size, size]))


def resize(images, size):
    """Cut images (N, C, H, W) to squares and resize them to `size`, if it is not 0."""
    side = min(images.shape[2:])
    if images.shape[2:] == (size or side, size or side):
        return images
    print(f"images of {tuple(images.shape[2:])} pixels: cut to {side}, resized to {size or side}")
    parts = TF.center_crop(images, [side, side]).split(1000)  # resizing works in floats
    return torch.cat([TF.resize(part, [size or side] * 2) for part in parts])


# 6. Training: settings make a run, and its folder holds a checkpoint and a log --------------------

LOG_STEPS = 100  # a line of progress and a row of log.csv are means over so many steps
SAVE_SECONDS = 60.0  # the least time between two checkpoints


def setting(default, text, allowed=None):
    """Declare a field of Settings, which is a flag of the command line too. allowed: the words to
    choose from, or the least and the largest number."""
    return field(default=default, metadata={"text": text, "allowed": allowed})


@dataclass
class Settings:
    """The settings of a run: all that decides its weights. The defaults are for shapes."""

    dataset: str = setting("shapes", "shapes, cifar10, celeba, a folder of images or an .npz")
    size: int = setting(0, "side of the images; 0: as they are, a folder 64, celeba 128", (0, 4096))
    objective: str = setting("stae", "mse: the baseline, with the same network", ("stae", "mse"))
    masked: bool = setting(False, "fill a hole that is cut into each image")
    hole: float = setting(0.35, "masked: share of the area that the hole takes", (0.001, 0.999))
    transform: str = setting("pixel", "T, done to both images that the judge sees", TRANSFORMS)
    crop_min: float = setting(0.5, "crop: least share of the side that it takes", (0.001, 1))
    crop_max: float = setting(1.0, "crop: largest share of the side that it takes", (0.001, 1))
    turn: bool = setting(False, "crop: mirror and turn, by the symmetries of the square")
    mask_ratio: float = setting(0.7, "pixel, patch, channel: share that is black", (0.001, 0.999))
    judge: str = setting("frozen", "live: its weights learn in the step too", ("frozen", "live"))
    layer_weight: float = setting(0.0, "weight of inner activations in the distance", (0, 1e6))
    sigreg_weight: float = setting(0.03, "lambda, the author's for batches of 128", (0, 1e6))
    width: int = setting(32, "channels after the stem", (1, 4096))
    latent_channels: int = setting(8, "C of a code; with --latent-dim that of --width", (1, 4096))
    latent_dim: int = setting(0, "numbers of a global code; 0: (C, side/8, side/8)", (0, 10**6))
    slices: int = setting(16, "directions of SIGReg, 2 per channel of a code", (1, 10**7))
    steps: int = setting(1875, "batches to train on", (1, 10**9))
    batch_size: int = setting(64, "images per step", (2, 10**6))
    lr: float = setting(1e-2, "peak learning rate", (1e-9, 1))
    seed: int = setting(0, "seed of the initial weights and of all draws", (0, 2**32 - 1))
    precision: str = setting("auto", "auto: bf16 if that is fast", ("auto", "fp32", "bf16"))

    def __post_init__(self):
        for item in fields(self):
            name, value, allowed = flag(item), getattr(self, item.name), item.metadata["allowed"]
            if item.type is float:
                value = float(value)
                setattr(self, item.name, value)
            need(type(value) is item.type, f"{name} {value!r}: must be {item.type.__name__}")
            if item.type is str and allowed:
                need(value in allowed, f"{name} {value}: must be one of {allowed}")
            elif allowed:
                low, high = allowed
                need(low <= value <= high, f"{name} {value}: must be from {low:,} to {high:,}")
        crops, channels, wide = (self.crop_min, self.crop_max), self.latent_channels, 8 * self.width
        need(crops[0] <= crops[1], f"--crop-min, --crop-max {crops}: the first is larger")
        need(self.size % 8 == 0 and self.size != 8, f"--size {self.size}: must be 16, 24, 32, ...")
        need(wide % channels == 0, f"--latent-channels {channels}: must divide {wide}, 8 * --width")


DATASETS = ("shapes", "cifar10", "celeba")  # by name; others are a folder or an .npz
CROPS = dict(transform="crop", turn=True, batch_size=128, steps=5760)
PRESETS = {  # what replaces defaults, by dataset and flag; folders, .npz: as cifar10
    "shapes": {},
    "cifar10": dict(CROPS, width=64, lr=3e-3),
    "celeba": dict(CROPS, width=128, lr=1e-3, steps=63_000, latent_channels=32),
    "--masked": dict(layer_weight=10.0, turn=False),
    "celeba --masked": dict(latent_dim=128),
}


def choose_settings(given):
    """Return the Settings: the defaults, then what the presets change, then the given ones."""
    dataset = given.get("dataset", "shapes")
    presets = [dataset if dataset in DATASETS else "cifar10"]
    if given.get("masked"):
        presets += ["--masked", f"{dataset} --masked"]
    values = {item.name: item.default for item in fields(Settings)}
    for preset in presets:
        values |= PRESETS.get(preset, {})
    values |= given
    if dataset not in DATASETS:
        values["dataset"] = os.path.abspath(dataset)  # found from any other folder
    if values["latent_dim"] and "latent_channels" not in given:
        values["latent_channels"] = values["width"]  # as the author does
    if "slices" not in given:  # 16 are enough for 8 channels, and far too few for 32
        values["slices"] = 2 * (values["latent_dim"] or values["latent_channels"])
    return Settings(**values)


def run_folder(settings):
    """Return runs/NAME-HASH: the same settings and the same stae.py find the same run again."""
    name = f"{Path(settings.dataset).stem}-{settings.objective}"
    if settings.masked:
        name += "-masked"
    if settings.objective == "stae":
        name += f"-{settings.transform}-{settings.judge}"
    identity = hashlib.sha256(str(settings).encode() + Path(__file__).read_bytes()).hexdigest()
    return Path("runs", f"{name}-{identity[:6]}")


def fingerprint(images):
    """Return what tells data apart: the count of the images and a hash of all of them."""
    digest = hashlib.sha256()
    for part in images.split(100):
        digest.update(part.contiguous().cpu().numpy())
    return f"{len(images)} images {digest.hexdigest()[:12]}"


def learning_rate(step, steps, peak):
    """Return the rate of a step: a linear warm-up over 100 steps or, if that is less, a tenth of
    all, then a cosine down to 5 % of the peak."""
    warmup = min(100, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def draw_batches(images, settings, first):
    """Yield (step, images) from step `first` on. Each epoch has an order of its own, by the seed
    and its number; what is left at its end and does not fill a batch is dropped."""
    size = min(settings.batch_size, len(images))
    for step in range(first, settings.steps):
        epoch, place = divmod(step, len(images) // size)
        if place == 0 or step == first:
            # The last number tells the keys of epochs, 0, from those of steps, 1
            generator = seeded("cpu", settings.seed, epoch, 0, 0)
            order = torch.randperm(len(images), generator=generator).to(images.device)
        yield step, images[order[place * size : (place + 1) * size]]


def step_loss(model, settings, images, generator):
    """Draw holes, T and slices -> the loss of images (B, C, S, S) in [0, 1], and its terms."""
    shape, holed = images.shape, None
    if settings.masked:
        holed = cut_holes(images, draw_holes(shape, generator, settings.hole))
    if settings.objective == "mse":
        return mse_loss(model, images, holed)
    crop_range = settings.crop_min, settings.crop_max
    transform = draw_transform(
        settings.transform, shape, generator, crop_range, settings.mask_ratio, settings.turn
    )
    slices = draw_slices(model.norm.num_features, settings.slices, generator)
    judge = freeze(model.encoder) if settings.judge == "frozen" else model.encoder
    weights = settings.sigreg_weight, settings.layer_weight
    if settings.masked:
        return masked_loss(model, images, holed, transform, slices, judge, *weights)
    return stae_loss(model, images, transform, slices, judge, *weights)


def new_model(settings, channels):
    """Return an untrained Autoencoder of these settings, for images of so many channels."""
    sizes = settings.width, settings.latent_channels, settings.latent_dim, settings.size
    return Autoencoder(channels, *sizes)


def train(settings, images, device, folder):
    """Train on images (N, C, S, S) uint8, or go on with the run in `folder` -> the model, in eval
    mode. Raises BadInput, also for a run of other settings or images, and FloatingPointError for a
    loss or gradient that is not finite.

    The images of a step and all that is drawn in it are functions of the seed and the step, so on
    one kind of device a run that goes on from its last checkpoint ends as if it had never stopped,
    on a CPU to the last bit."""
    check_type(images)
    side = images.shape[2]
    need(settings.size == side, f"--size {settings.size}: the images have {side} pixels a side")
    need(settings.precision != "auto", "--precision auto: train() needs fp32 or bf16")
    torch.manual_seed(settings.seed)
    model = new_model(settings, images.shape[1]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=0.0, fused=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, bf16 = fingerprint(images), settings.precision == "bf16"
    history = resume(folder, settings, data, model, optimizer)
    first = history[-1]["step"] if history else 0

    start = saved = time.perf_counter()
    totals, window = 0.0, first
    for step, batch in draw_batches(images, settings, first):
        x = batch.to(device).float() / 255
        # Plain means at first: running averages start at a variance of 1, features at 1e-5
        model.norm.momentum = max(0.1, 1 / (step + 1))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            generator = seeded(device, settings.seed, step, 0, 1)
            loss, terms = step_loss(model, settings, x, generator)
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings.steps, settings.lr)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        terms = {"loss": loss, **terms, "gradient_norm": norm}
        totals = totals + torch.stack(list(terms.values())).detach()  # no wait for the device
        done = step + 1
        if done % LOG_STEPS == 0 or done == settings.steps:
            means = dict(zip(terms, (totals / (done - window)).tolist()))  # waits for the device
            seconds = time.perf_counter() - start
            speed = (done - window) * len(x) / seconds
            row = {"step": done, **means, "seconds": seconds, "images_per_second": speed}
            print_row(row, settings.steps, (settings.steps - done) * len(x) / speed)
            check_finite(row)
            history.append(row)
            if time.perf_counter() > saved + SAVE_SECONDS or done == settings.steps:
                save_checkpoint(folder, settings, model, optimizer, history, data)
                saved = time.perf_counter()
            start, totals, window = time.perf_counter(), 0.0, done
        elif sys.stdout is not None and sys.stdout.isatty():
            print(f"step {done}/{settings.steps}", end="\r", flush=True)
    return model.eval()


def resume(folder, settings, data, model, optimizer):
    """Load the last checkpoint in a folder into model and optimizer -> its history, [] if there is
    none. Raises BadInput if it is of other settings, or of images with another fingerprint."""
    if not (folder / "checkpoint.pt").exists():
        return []
    _, old, stored = load_checkpoint(folder)
    here = asdict(settings)
    differ = [f"{k} {v}, here {here[k]}" for k, v in asdict(old).items() if v != here[k]]
    need(not differ, f"{folder}: is another run ({'; '.join(differ)}); pass another --out")
    need(data == stored["data"], f"{folder}: its images have changed since; pass another --out")
    with reading(f"{folder}, to go on with it,"):
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
    done = stored["history"][-1]["step"]
    print(f"{folder}: {done:,} of {settings.steps:,} steps are done")
    return stored["history"]


def print_row(row, steps, left):
    """Print a row of the log."""
    numbers = [f"{name} {value:.4g}" for name, value in row.items() if name != "step"]
    print(f"step {row['step']}/{steps}", *numbers, f"{left:.0f} s left", sep="  ", flush=True)


def check_finite(row):
    """Raise FloatingPointError if a loss or a gradient was not finite: the weights are spoilt."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(row[name]):
            raise FloatingPointError(f"step {row['step']}: {name} is not finite; try a lower --lr")


def save_checkpoint(folder, settings, model, optimizer, history, data):
    """Write checkpoint.pt, whole or not at all, and log.csv."""
    path = folder / "checkpoint.pt"
    if path.exists():  # perhaps of a run with other settings that began at the same time
        same = load_checkpoint(path)[1] == settings
        need(same, f"{folder}: another run was started in it meanwhile; pass another --out")
    state = {
        "settings": asdict(settings),
        "channels": model.encoder.stem.in_channels,
        "data": data,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    buffer = io.BytesIO()  # torch hides the error of a full disk, Path does not
    torch.save(state, buffer)
    partial = folder / "checkpoint.partial"
    try:
        partial.write_bytes(buffer.getbuffer())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # half of it would keep the disk full
    write_log(folder, history)


def write_log(folder, history):
    """Write log.csv, the history of a run to read or plot."""
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def load_checkpoint(path):
    """Read a checkpoint, or that in a run's folder -> the Autoencoder, in eval mode on the CPU, its
    Settings, and all that the file holds. No code in the file is run. Raises BadInput."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    need(path.is_file(), f"{path}: there is no such checkpoint")
    with reading(path):
        stored = torch.load(path, map_location="cpu", weights_only=True)
        settings = Settings(**stored["settings"])
        model = new_model(settings, stored["channels"])
        model.load_state_dict(stored["model"])
        finite = all(tensor.isfinite().all() for tensor in stored["model"].values())
        need(finite, "its weights are not finite")
        history, known = stored["history"], {"step", "seconds", "images_per_second"}
        fine = history and all(row.keys() >= known for row in history)
        need(fine and stored["data"], "it has no history")
        return model.eval(), settings, stored


def load_model(path):
    """Return the Autoencoder of a run or checkpoint, in eval mode on the CPU. See Autoencoder."""
    return load_checkpoint(path)[0]


# 7. Evaluation: small measurements of a model, each a dict by name; a table and a picture ---------
# A model here is what has encode(images) and decode(code): an Autoencoder in eval mode, or PCA


class PCA:
    """The best linear code of so many numbers, (B, n, 1, 1), each of variance 1. Its axes are
    those of images (N, C, S, S) uint8, or of a part of them that takes 2 GB as floats. What it
    decodes is not clamped to [0, 1]."""

    def __init__(self, images, numbers, device):
        some = images[:: 1 + images.numel() // 2**29]
        solver = device if torch.device(device).type == "cuda" else "cpu"  # others lack QR
        x = some.to(solver).flatten(1).float() / 255
        torch.manual_seed(0)  # of random projections; niter=2, torch's default, is inaccurate
        _, spread, axes = torch.pca_lowrank(x, min(numbers, *x.shape), niter=8)
        self.shape, self.mean = images.shape[1:], x.mean(dim=0).to(device)
        self.axes, self.scale = axes.to(device), (spread / len(x) ** 0.5 + 1e-6).to(device)

    def encode(self, images):
        code = (images.flatten(1) - self.mean) @ self.axes / self.scale
        return code[:, :, None, None]

    def decode(self, code):
        flat = (code.flatten(1) * self.scale) @ self.axes.T + self.mean
        return flat.unflatten(1, self.shape)


def batches_of(images, device):
    """Yield images uint8 in batches of 128, fewer when they are large, as floats on the device."""
    check_type(images)
    size = max(1, min(128, 2**21 // images[0, 0].numel()))
    for batch in images.split(size):
        yield batch.to(device).float() / 255


def decibels(squared_errors):
    """Return the PSNR of all images, given their mean squared errors in batches."""
    mean = torch.cat(squared_errors).cpu().double().mean().item()
    return -10 * math.log10(max(mean, 1e-12))


def ssim(x, y):
    """Return the structural similarity of (B, C, H, W) in [0, 1], sides from 11, as (B,).
    Wang et al. 2004: Gaussian window of 11, sigma 1.5, inside the image; mean over all places."""

    def average(images):
        return TF.gaussian_blur(images, [11, 11], [1.5, 1.5])[:, :, 5:-5, 5:-5]

    mean_x, mean_y = average(x), average(y)
    variance_x = average(x * x) - mean_x**2
    variance_y = average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    score = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    score = score / (mean_x**2 + mean_y**2 + 0.01**2) / (variance_x + variance_y + 0.03**2)
    return score.mean(dim=(1, 2, 3))


def measure_images(model, images, device):
    """Measure reconstructions of images (N, C, S, S) uint8. psnr: of the mean squared error over
    all images, in dB; ssim: mean over images."""
    errors, similarities = [], []
    for x in batches_of(images, device):
        x_hat = model.decode(model.encode(x))
        errors.append((x_hat - x).square().mean(dim=(1, 2, 3)))
        similarities.append(ssim(x, x_hat))
    return {"psnr": decibels(errors), "ssim": torch.cat(similarities).mean().item()}


def measure_holes(model, images, holes, mean, device):
    """Measure how holes (N, 4) cut into images are filled. hole_psnr: inside of them, in dB;
    hole_floor_psnr: that of the `mean` image (C, S, S) there."""
    errors, mean_errors, first = [], [], 0
    for x in batches_of(images, device):
        boxes = holes[first : first + len(x)].to(device)
        first += len(x)
        x_hat = model.decode(model.encode(cut_holes(x, boxes)))
        inside = hole_mask(boxes, x)
        area = inside.mean(dim=(1, 2, 3))
        errors.append(((x_hat - x) * inside).square().mean(dim=(1, 2, 3)) / area)
        mean_errors.append(((mean - x) * inside).square().mean(dim=(1, 2, 3)) / area)
    return {"hole_psnr": decibels(errors), "hole_floor_psnr": decibels(mean_errors)}


def measure_codes(model, images, device):
    """Measure how Gaussian the codes of images are. sigreg: in random groups of 128, 1.05 for
    N(0, I). min_std: the least deviation over images of a channel, near 0 for a collapse.
    code_size: the numbers of a code."""
    codes = torch.cat([model.encode(x).cpu() for x in batches_of(images, device)])
    slices = draw_slices(codes.shape[1], 256, seeded("cpu", 0))
    order = torch.randperm(len(codes), generator=seeded("cpu", 1))  # images may lie by class
    groups = codes[order].split(128)
    if len(groups[-1]) < 128:
        groups = groups[:-1] or groups
    scores = [sigreg(group, slices).item() for group in groups]
    deviations = codes.std(dim=0, correction=0)  # (D,) or (D, h, w)
    deviations = deviations.reshape(codes.shape[1], -1).mean(dim=1)  # mean over places
    return {
        "sigreg": sum(scores) / len(scores),
        "min_std": deviations.min().item(),
        "code_size": codes[0].numel(),
    }


@torch.no_grad()
def evaluate(model, train_images, test_images, device, holes=None):
    """Measure a model on images (N, C, S, S) uint8 -> the rows of the measure_... functions in one
    dict. holes: boxes (N, 4) to cut into the test images; None: nothing is hidden. Raises BadInput
    for a model in train mode."""
    # Of the parts, since a wrapper of torch.compile may keep a mode of its own
    parts = model.children() if isinstance(model, nn.Module) else ()
    training = any(part.training for part in parts)
    need(not training, "evaluate: the model is in train mode; call model.eval()")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # figures as on a CPU
        results = measure_images(model, test_images, device)
        if holes is not None:
            mean = sum(part.sum(dim=0) for part in train_images.split(1000)) / len(train_images)
            mean = mean.to(device) / 255
            results |= measure_holes(model, test_images, holes, mean, device)
        return results | measure_codes(model, test_images, device)


def play(model, x):
    """Decode changed codes of images (n, C, S, S) -> {name: images (n, C, S, S)}. walk: the first
    channel of the first image's code from -3 to 3. interpolation: from the first code to the last.
    samples: of N(0, I). brush: the middle of the next image's code is painted into each, if codes
    have 4x4 places or more."""
    z = model.encode(x)
    share = torch.linspace(0, 1, len(z), device=z.device).view(-1, 1, 1, 1)
    walk = z[:1].repeat(len(z), 1, 1, 1)
    walk[:, :1] = 6 * share - 3
    noise = torch.randn(z.shape, generator=seeded("cpu", 0)).to(z.device)
    codes = {"walk": walk, "interpolation": z[0].lerp(z[-1], share), "samples": noise}
    quarter = z.shape[2] // 4
    if quarter:
        middle = slice(quarter, 3 * quarter)
        codes["brush"] = z.clone()
        codes["brush"][:, :, middle, middle] = z.roll(-1, dims=0)[:, :, middle, middle]
    return {name: model.decode(code) for name, code in codes.items()}


def save_picture(path, rows):
    """Save {label: images (n, C, S, S) in [0, 1]}, a labelled row each, small images enlarged."""
    strips = []
    for label, images in rows.items():
        tiles = F.interpolate(images.cpu().clamp(0, 1), scale_factor=max(1, 64 // images.shape[3]))
        grid = utils.make_grid(tiles, nrow=len(tiles), pad_value=1)  # (3, H, W)
        caption = Image.new("RGB", (grid.shape[2], 14), "white")
        ImageDraw.Draw(caption).text((3, 1), ascii(label)[1:-1], fill="black")
        strips += [TF.to_tensor(caption), grid]
    utils.save_image(torch.cat(strips, dim=1), path)


def print_table(tables):
    """Print {run: what evaluate returns}, a column for each run."""
    names = dict.fromkeys(name for results in tables.values() for name in results)
    widths = [max(10, len(run)) for run in tables]
    print(" " * 17, *(run.rjust(width) for run, width in zip(tables, widths)))
    for name in names:
        numbers = [results.get(name, "") for results in tables.values()]
        cells = [f"{n:,.4g}" if isinstance(n, float) else str(n) for n in numbers]
        print(f"{name:17}", *(cell.rjust(width) for cell, width in zip(cells, widths)))


@torch.no_grad()
def report(runs, train_images, test_images, device, folder):
    """Measure {run: what load_checkpoint returns} and PCA; write comparison.png, metrics.json."""
    tables = {}
    x = test_images[:16].to(device).float() / 255
    rows = {"originals": x}
    for run, (model, settings, stored) in runs.items():
        print(f"measuring {run} on {len(test_images):,} test images", flush=True)
        model.to(device, memory_format=torch.channels_last)
        history = stored["history"]
        rows[run] = model(x)
        holes = None
        if settings.masked:  # the same holes on every device
            holes = draw_holes(test_images.shape, seeded("cpu", 0), settings.hole)
            holed = cut_holes(x, holes[: len(x)].to(device))
            rows[f"holes of {settings.hole:g}"] = holed
            rows[f"{run}, from holes"] = model(holed)
        tables[run] = evaluate(model, train_images, test_images, device, holes)
        if settings.masked:
            tables[run]["hole"] = settings.hole
        tables[run]["parameters"] = sum(weight.numel() for weight in model.parameters())
        tables[run]["train_seconds"] = sum(row["seconds"] for row in history)
        tables[run]["images_per_second"] = history[-1]["images_per_second"]
    for size in sorted({results["code_size"] for results in tables.values()}):
        if size <= 2048:
            pca = PCA(train_images, size, device)
            if pca.scale.numel() < size:
                print(f"PCA has {pca.scale.numel()} numbers only: there are too few images")
            tables[f"PCA {size}"] = evaluate(pca, train_images, test_images, device)
        else:
            print(f"PCA of {size:,} numbers is left out: it would take hours")
    if len(runs) == 1:
        for name, images in play(model, x).items():  # those of the only run
            rows[f"{run}, {name}"] = images
    save_picture(folder / "comparison.png", rows)
    print_table(tables)
    (folder / "metrics.json").write_text(json.dumps(tables, indent=1))
    print(f"written to {folder}: comparison.png, metrics.json")


# 8. Command line ----------------------------------------------------------------------------------


def flag(item):
    """Return the flag of a field of Settings."""
    return "--" + item.name.replace("_", "-")


def parse_flags(argv):
    """Return the flags, and as a dict the settings among them that were given."""

    def fail(message):
        raise BadInput(f"{message}; see --help")

    about = f"{__doc__.splitlines()[0]} In brackets: the default, and what it is for some data."
    about += " A folder or an .npz has the defaults of cifar10."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.error = fail
    for item in fields(Settings):
        text = f"{item.metadata['text']} ({item.default}"
        for preset, values in PRESETS.items():
            if item.name in values:
                text += f", {preset} {values[item.name]}"
        kind = {"type": item.type}
        if item.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif item.type is str:
            kind["choices"] = item.metadata["allowed"]
        parser.add_argument(flag(item), default=argparse.SUPPRESS, help=text + ")", **kind)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    parser.add_argument("--data", metavar="DIR", help="where cifar10 and celeba are (data)")
    parser.add_argument("--out", metavar="DIR", help="where to write (runs/NAME-HASH, runs/eval)")
    parser.add_argument("--eval", metavar="RUN", nargs="+", help="measure runs or checkpoints")
    flags = parser.parse_args(argv)
    names = {item.name for item in fields(Settings)}
    return flags, {name: value for name, value in vars(flags).items() if name in names}


def open_device(name):
    """Return the device of this name; for None "cuda" if there is one, else "cpu". Raises BadInput
    if there is no such device, or if torchrun started several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    need(world == "1", f"WORLD_SIZE is {world}: there is one process only, so leave out torchrun")
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # no such name, driver or card
        raise BadInput(f"--device {name}: {str(error).splitlines()[0][:200]}; try cpu") from error
    return device


def bf16_is_fast(device):
    """Return whether the device has arithmetic in bf16, and does not just emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def keep_apart(folder, dataset):
    """Raise BadInput if a folder of results lies in a dataset that is a folder: the pictures in it
    would be taken for images."""
    inside = folder.resolve().is_relative_to(Path(dataset).resolve())
    need(dataset in DATASETS or not inside, f"{folder}: lies among the images; pass --out")


def open_folder(folder):
    """Make a folder for results. Raises BadInput if something in it would be overwritten."""
    need(not folder.is_file(), f"{folder}: is a file; pass a folder as --out")
    names = ("comparison.png", "metrics.json", "log.csv")
    taken = [name for name in names if (folder / name).exists()]
    need(not taken, f"{folder}: holds {', '.join(taken)}; pass another folder as --out")
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
    need(writable, f"{folder}: cannot be written to; pass another folder as --out")


def open_run(folder, settings, device):
    """Make the folder of a run, unless it has a checkpoint to go on from. Sets the precision that
    was "auto"."""
    if not (folder / "checkpoint.pt").exists():
        open_folder(folder)
        print(f"{folder}: a new run")
        if settings.precision == "auto":
            settings.precision = "bf16" if bf16_is_fast(device) else "fp32"
    elif settings.precision == "auto":  # the run may come from a machine that chose another one
        settings.precision = load_checkpoint(folder)[1].precision


def load_images(dataset, size, root):
    """Load the data; root, which is --data or None, must be None where it would mean nothing."""
    in_root = dataset in ("cifar10", "celeba")
    need(in_root or not root, f"--data {root}: only for cifar10 and celeba; other data: --dataset")
    return load_data(dataset, root or "data", size)


def train_run(flags, given):
    """Train a run, or go on with it, and measure it."""
    settings = choose_settings(given)
    device = open_device(flags.device)
    images, test_images = load_images(settings.dataset, settings.size, flags.data)
    count, side = len(images), images.shape[2]
    fits = max(16, 8 * math.ceil(side / 8))
    need(side == fits, f"images of {side} x {side} pixels: pass --size {fits}")
    need(count > 1, f"--dataset {settings.dataset}: {count} image is too few to train on")
    settings.size = side
    if settings.batch_size > count:
        print(f"--batch-size {settings.batch_size}: there are {count} images, all in each batch")
    folder = Path(flags.out) if flags.out else run_folder(settings)
    if not flags.out:
        print("The run is named by its settings and by stae.py: an edit of either makes another.")
    keep_apart(folder, settings.dataset)
    open_run(folder, settings, device)
    print(f"{count:,} images to train on, on {device}: {settings}")
    on_device = images
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        on_device = images.to(device)
    train(settings, on_device, device, folder)
    model, settings, stored = load_checkpoint(folder)
    write_log(folder, stored["history"])  # a kill may come between checkpoint and log
    runs = {folder.resolve().name: (model, settings, stored)}
    report(runs, images, test_images, device, folder)


def load_runs(paths, dataset, root):
    """Load runs or checkpoints, and the data that they share, or those of `dataset` instead ->
    {label: what load_checkpoint returns}, name of the data, images to train on, and to test on.
    Prints the settings of each run, and whether it is unfinished or was trained on other images.
    Raises BadInput if the runs do not go together."""
    runs, kinds = {}, set()
    for path in paths:
        if Path(path).is_dir() and not Path(path, "checkpoint.pt").exists():
            print(f"{path}: left out, there is no checkpoint in it")
            continue
        model, settings, stored = load_checkpoint(path)
        unfinished = stored["history"][-1]["step"] < settings.steps
        label = f"{path} (unfinished)" if unfinished else path
        print(f"{label}: {settings}")
        runs[label] = model, settings, stored
        kinds.add((dataset or settings.dataset, settings.size, stored["channels"]))
    need(runs, f"{' '.join(paths)}: there is no checkpoint")
    told = f"data, side or channels of the runs differ: {sorted(kinds)}"
    need(len(kinds) == 1, f"{told}; leave out runs or, if only data differ, pass --dataset")
    name, size, channels = kinds.pop()
    images, test_images = load_images(name, size, root)
    found = images.shape[1]
    need(found == channels, f"--dataset {name}: has {found} channels, not {channels}")
    here = fingerprint(images)
    for label, (_, _, stored) in runs.items():
        if stored["data"] != here:
            print(f"{label}: was trained on other images, {stored['data']}; not on {here}")
    return runs, name, images, test_images


def compare_runs(flags, given):
    """Measure runs side by side, on their own data or on --dataset."""
    needless = given.keys() - {"dataset"}
    need(not needless, f"--eval: {sorted(needless)} come from the runs; leave them out")
    device = open_device(flags.device)
    runs, dataset, *images = load_runs(flags.eval, given.get("dataset"), flags.data)
    folder = Path(flags.out or "runs/eval")
    number = 1
    while folder.exists() and not flags.out:
        number += 1
        folder = Path("runs", f"eval-{number}")
    keep_apart(folder, dataset)
    open_folder(folder)
    report(runs, *images, device, folder)


def main(argv=None):
    """Run the command line -> exit code: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a screen cannot show all file names
    try:
        flags, given = parse_flags(argv)
        if flags.eval:
            compare_runs(flags, given)
        else:
            train_run(flags, given)
        return 0
    except KeyboardInterrupt:
        told = "interrupted; the same command goes on from the last checkpoint, or begins again"
        print(f"\n{told}", file=sys.stderr)
        return 130
    except (BadInput, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        # Full memory is no bug; on a CPU it has no class of its own
        full = any(words in str(error) for words in ("allocate", "out of memory"))
        if isinstance(error, RuntimeError) and not full:
            raise
        print("stae.py: error:", " ".join(str(error).split()), file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # nobody reads it: Python must not try once more
        return 2 if isinstance(error, BadInput) else 1


if __name__ == "__main__":
    sys.exit(main())
