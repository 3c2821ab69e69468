"""Self-Teaching Autoencoder (STAE): an autoencoder that learns to reconstruct images without a reconstruction loss.

From 128 numbers an image, on one CPU core, torch 2.15: drawn shapes at 28.2 dB in five minutes (the plain autoencoder
29.6, PCA 24.1); CIFAR-10 at 21.8 dB in nine (22.8 and 22.9), where a classifier gets 43 % of the reconstructions
right, 39 % of the plain autoencoder's and 38 % of PCA's. The commands are in README.md.

    python stae.py                                       # shapes, no download
    python stae.py --dataset cifar10 --transform crop    # the recipe; the numbers above add --width 32 --epochs 6
    python stae.py --dataset cifar10 --objective mse     # the plain autoencoder, everything else equal
    python stae.py --dataset celeba --masked             # faces, with a hole in them
    python stae.py --dataset my_photos/ --size 64        # any folder of images, or an .npz
    python stae.py --resume runs/NAME                    # after an interruption
    python stae.py --eval runs/NAME/checkpoint.pt        # the table and the picture again
    python stae.py --pictures runs/NAME/checkpoint.pt    # what its code is like

The method, whole in sections 2 to 5:

    z = E(x), x_hat = D(z)                               # encoder, decoder
    loss = d(J(T(x)), J(T(x_hat))) + lambda * SIGReg(z)  # T: a random crop or mask, the same for both

The judge J is the encoder itself, its weights held constant for the step, so the decoder must mend what the judge still
sees. No pixel of x_hat is ever compared with a pixel of x. SIGReg pulls the code towards N(0, I), against collapse.
Without T the pair may settle on images that resemble x to E alone: a private language. By default the judge's inner
activations are compared as well (layer_weight, --judge-layers), a term that the post does not have.

Method: Matteo Peluso, "Self-Teaching Autoencoder", https://github.com/the-puzzler/leautoencoder (May 2026).
SIGReg: Balestriero and LeCun, "LeJEPA", arXiv 2511.08544 (November 2025).
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy>=1.26", "pytest>=8"]
# ///
import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, CelebA
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.transforms import functional as TF
from torchvision.utils import save_image


# ---------------------------------------------------------------------------------------------------------------------
# 1. Data: uint8 images (N, C, H, W). make_ and read_ return them with their labels (N,), or None, and how many of them,
# at the end, are the test split: 0 when nothing says so, and then their order is shuffled

ORDER, DRAWS = 1, 0  # what a random stream is for: the order of an epoch, the draws of a step
CACHE_ABOVE = 5000  # image files; fewer are decoded in seconds
CELEBA_SPLITS = (0, 162_770), (182_637, 202_599)  # train and test of the official partition, by file number


class BadInput(ValueError):
    """Something the user gave cannot be used: one line that names it and the remedy. Raised wherever input is read."""


def make_shapes(count=12_000, size=32, seed=0):
    """Draw two discs, rings or rectangles per image in grey on black; the label, 0 to 2, is the kind of the front one.
    After the author's toy set. Edges are blended in integers, so every machine draws the same bytes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high, (count, 1, 1), generator=generator)

    y, x = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
    canvas = torch.zeros(count, size, size, dtype=torch.int32)
    for _ in range(2):
        kind, grey, radius, other = draw(0, 3), draw(80, 256), draw(3, 10), draw(3, 10)
        dy, dx = (y - draw(5, size - 5)).abs(), (x - draw(5, size - 5)).abs()
        distance = (dy**2 + dx**2).float().sqrt()
        disc = radius + 0.5 - distance  # how far inside its edge each pixel lies, (count, size, size)
        ring = torch.minimum(disc, distance - radius + 2.5)
        rectangle = torch.minimum(radius - dy, other - dx) + 0.5
        inside = torch.where(kind == 0, disc, torch.where(kind == 1, ring, rectangle))
        cover = (inside.clamp(0, 1) * 256).int()
        canvas = (grey * cover + canvas * (256 - cover)) // 256
    return canvas.to(torch.uint8)[:, None], kind.flatten(), count // 6


def shuffled(names):
    """The names by their hashes: an order like a random one, that a new name joins without moving the others."""
    return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def check_side(side):
    """Raise BadInput unless the network can take squares of that side."""
    if side % 8 or side < 16:
        good = max(16, side // 8 * 8)
        raise BadInput(f"images of {side} pixels: the side must be divisible by 8, from 16; pass --size {good}")


def fit(image, size=None, crop=None):
    """Centre crop a picture, or uint8 (..., C, H, W), to a square, of `crop` pixels when given and there, then resize
    it (antialiased) to `size` pixels when given."""
    _, height, width = TF.get_dimensions(image)
    side = min(height, width, crop or height)
    image = TF.center_crop(image, [side, side])
    return image if size in (None, side) else TF.resize(image, [size, size], antialias=True)


def read_cifar10(root):
    """CIFAR-10, found in `root` or downloaded to it by torchvision."""
    try:
        sets = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, a mirror that is down, a broken archive, a folder that cannot be written
        raise BadInput(f"cifar10 is not in --data {root} and cannot be downloaded ({error}); "
                       "put cifar-10-batches-py/ there or pass --dataset FILE.npz") from None
    images = torch.from_numpy(np.concatenate([s.data for s in sets])).permute(0, 3, 1, 2)
    return images, torch.tensor(sets[0].targets + sets[1].targets), len(sets[1].targets)


def read_npz(path):
    """x_train, y_train, x_test, y_test, or x, y alone: x (N, H, W, 1 or 3) uint8, y integers; y and test can lack."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # a damaged zip raises BadZipFile, zlib.error, EOFError, ValueError, ...
        raise BadInput(f"{path}: not a readable .npz ({error})") from None
    ends = [end for end in ("_train", "_test") if "x" + end in arrays] if "x_train" in arrays else [""]
    for end in ends:
        x, y = arrays.get("x" + end), arrays.get("y" + end)
        if x is None:
            raise BadInput(f"{path}: holds {sorted(arrays)}; it must hold x_train (and x_test), or x")
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or x.size == 0:
            raise BadInput(f"{path}: x{end} is {x.dtype} {x.shape}; it must be uint8 (N, H, W, 1 or 3)")
        if x.shape[1:] != arrays["x" + ends[0]].shape[1:]:
            raise BadInput(f"{path}: images differ in shape, x_train {arrays['x_train'].shape}, x_test {x.shape}")
        if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
            raise BadInput(f"{path}: y{end} is {y.dtype} {y.shape}; it must be {len(x)} integers, one per image")
    x, y = (np.concatenate([arrays[k + end] for end in ends if k + end in arrays] or [[]]) for k in "xy")
    images = torch.from_numpy(x).permute(0, 3, 1, 2)
    labels = torch.from_numpy(y.astype(np.int64)) if len(y) == len(x) else None
    if "_test" in ends:
        return images, labels, len(arrays["x_test"])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # always the same
    return images[order], None if labels is None else labels[order], 0


def progress(text, done, total, before):
    """Show how far a long job is: a line that rewrites itself on a terminal, elsewhere a line for each tenth of it."""
    if sys.stdout.isatty():
        text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be rewritten
        print(f"\r\033[K{text}", end="\n" if done == total else "", flush=True)
    elif done == total or done * 10 // total > before * 10 // total:
        print(text, flush=True)


def decode(folder, names, size, crop):
    """Yield (name, uint8 (3, S, S)) for each image file in `folder` that can be read, RGB, fitted, by several threads.
    The others are counted, the first named. Raises BadInput when two images differ in size, or none can be read."""

    warnings.filterwarnings("error", message=".*decompression bomb")  # Pillow only warns of the smaller ones

    def read(name):
        try:
            with open(folder / name, "rb") as file:
                head = file.read(26)
            if head.startswith(b"\x89PNG") and head[24:] == b"\x10\0":
                raise ValueError("16-bit grey, which Pillow would clip to white; convert it to 8 bits")
            return TF.pil_to_tensor(fit(default_loader(folder / name), size, crop)).contiguous()
        except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, ...
            return f"{folder / name} ({error})"

    side, unreadable = None, []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(names), 500):  # in parts: what is decoded and not yet taken waits in memory
            part = names[start : start + 500]
            for name, image in zip(part, pool.map(read, part)):
                if isinstance(image, str):
                    unreadable.append(image)
                    continue
                if side not in (None, image.shape[1]):
                    raise BadInput(f"{folder}: images of {side} and of {image.shape[1]} pixels ({name}); make them "
                                   "equal with --size")
                side = image.shape[1]
                check_side(side)  # now, not after an hour of decoding
                yield name, image
            if len(names) > CACHE_ABOVE:
                done = start + len(part)
                progress(f"decoded {done:,} of {len(names):,} images", done, len(names), start)
    if not side:
        raise BadInput(f"{folder}: no readable image among {len(names)}: {min(unreadable)}")
    if unreadable:
        skipped = f"skipped {len(unreadable)} of {len(names)} images, unreadable: first {min(unreadable)}"
        print(skipped, file=sys.stderr)


def decode_once(folder, names, size, crop):
    """What `decode` makes of many files, kept beside their folder as FOLDER.stae-SIZE.npy -> a memory map (N, 3, S, S),
    the N names that could be read. Made anew when a file was added, changed or taken away."""
    beside = Path(os.path.abspath(folder))
    cache, as_is = (beside.parent / ("-".join([f"{beside.name}.stae", *(str(n) for n in sizes if n)]) + ".npy")
                    for sizes in ((crop, size), (crop,)))
    temporary = Path(f"{cache}.{os.getpid()}.tmp")
    stats = [(name, file.st_size, file.st_mtime_ns) for name in names for file in [os.stat(folder / name)]]
    stamp = hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    def mapped(path):
        array = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)  # behind the array: which files it is made of
            return array, json.load(file)[stamp]

    try:
        found = cache if cache.exists() else as_is  # made when the size was not yet known
        array, readable = mapped(found)
        if size not in (None, array.shape[2]):
            raise ValueError
        if len(readable) < len(names):
            print(f"{found} lacks {len(names) - len(readable)} images that could not be read; delete it to try again",
                  file=sys.stderr)
        return array, readable
    except Exception:  # not there yet, of other files, or damaged, for which numpy raises many kinds
        if not os.access(cache.parent, os.W_OK):
            raise BadInput(f"{cache.parent} cannot be written, but {cache.name}, the decoded images, belongs there; "
                           "link the folder of images from a folder of your own") from None
    readable = []
    try:
        with open(temporary, "wb") as out:
            out.seek(128)  # room for the header, which counts the images and so comes last
            for name, image in decode(folder, names, size, crop):
                out.write(image.numpy())
                readable.append(name)
            out.write(json.dumps({stamp: readable}).encode())
            out.seek(0)
            header = dict(descr="|u1", fortran_order=False, shape=(len(readable), *image.shape))
            np.lib.format.write_array_header_1_0(out, header)
        os.replace(temporary, cache)
        print(f"the decoded images are kept in {cache}, {cache.stat().st_size / 1e9:.2f} GB")
    finally:
        temporary.unlink(missing_ok=True)
    return mapped(cache)


def read_images(folder, train, test, size=None, crop=None):
    """Image files in `folder`, to train and (maybe none) to test on -> uint8 (N, 3, S, S), squares of `size`; the
    N names that can be read; how many of them test. More than CACHE_ABOVE are decoded once and memory-mapped."""
    names = train + test if test else shuffled(train)
    if not names:
        raise BadInput(f"{folder}: no image below it (a file named {' '.join(IMG_EXTENSIONS)})")
    if len(names) > CACHE_ABOVE:
        array, readable = decode_once(folder, names, size, crop)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: the array is not writable. Nothing here writes to it
            images = torch.from_numpy(array)
    else:
        readable, images = zip(*decode(folder, names, size, crop))
        images = torch.stack(images)
    test_count = len(set(readable) & set(test))
    if test and not test_count:
        raise BadInput(f"{folder}: none of its {len(test)} test images can be read")
    return images, readable, test_count


def read_folder(folder, size=None):
    """Every image below `folder`. Subfolders train/ and test/ (or val/), when both hold some, are the splits. The
    first-level subfolders (of each) are the classes when every image lies in one. Without a `size` all must have the
    same."""
    paths = [os.path.join(below, file) for below, _, files in os.walk(folder, followlinks=True) for file in files]
    paths = [path for path in paths if path.lower().endswith(IMG_EXTENSIONS) and os.path.isfile(path)]
    paths.sort(key=lambda path: (-len(path), path))
    once = {os.path.realpath(path): path for path in paths}  # links may lead in circles; the shortest path is kept
    names = sorted(os.path.relpath(path, folder) for path in once.values())
    parts = {part: [name for name in names if Path(name).parts[0].lower() == part] for part in ("train", "test", "val")}
    train, test = parts["train"], parts["test"] or parts["val"]
    split = bool(train and test)
    images, names, test_count = read_images(folder, *((train, test) if split else (names, [])), size)
    parents = [Path(name).parts[int(split) : -1] for name in names]
    classes = sorted({parent[0] for parent in parents if parent})
    labels = torch.tensor([classes.index(parent[0]) for parent in parents]) if all(parents) else None
    return images, labels, test_count


def read_celeba(root, size=None):
    """The centre 128 pixels of each face in `root`/celeba/img_align_celeba, as many as are there (torchvision downloads
    them when none is), split by number as in the official partition. Its validation files are left out."""
    folder = Path(root, "celeba", "img_align_celeba")
    if not any(folder.glob("*.jpg")):
        try:
            CelebA(root, download=True)
        except Exception as error:  # no network, no gdown, the quota of the host, a broken archive
            raise BadInput(f"celeba is not in {folder} and cannot be downloaded ({error}); unpack img_align_celeba.zip "
                           f"from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in {folder.parent}") from None
    names = sorted(file.name for file in folder.glob("*.jpg") if file.stem.isdecimal())
    train, test = ([name for name in names if low < int(name[:-4]) <= high] for low, high in CELEBA_SPLITS)
    images, _, test_count = read_images(folder, train, test, size or 128, crop=128)
    return images, None, test_count


def load_data(dataset, root="data", size=None, validation=0):
    """Load "shapes", "cifar10", "celeba" (in or to `root`), a folder of images or an .npz -> (images, labels) to train,
    to test. Images are (N, C, S, S) uint8 on the CPU, a memory map when they are many files; labels (N,) int64 from 0,
    or None, as for a single class. size: S, to resize to. A set without a test split holds out a tenth, always the
    same. validation: so many of the last training images become the test split."""
    if dataset == "shapes":
        images, labels, test_count = make_shapes()
    elif dataset == "cifar10":
        images, labels, test_count = read_cifar10(root)
    elif dataset == "celeba":
        images, labels, test_count = read_celeba(root, size)
    elif Path(dataset).is_dir():
        images, labels, test_count = read_folder(Path(dataset), size)
    elif Path(dataset).is_file() and dataset.endswith(".npz"):
        images, labels, test_count = read_npz(dataset)
    else:
        raise BadInput(f"--dataset {dataset}: expected shapes, cifar10, celeba, or a folder or an .npz that exists")
    train_count = len(images) - (test_count or max(1, len(images) // 10))
    if validation >= train_count:
        takes = f", --validation takes {validation} of them" if validation else " beside the test images"
        raise BadInput(f"{dataset}: {train_count} training images are too few{takes}")
    side = size or min(images.shape[2:])
    if images.shape[2:] != (side, side):
        images = torch.cat([fit(part, size) for part in images.split(1000)])  # in parts: resizing works in float
    if labels is not None:
        classes, labels = labels.unique(return_inverse=True)
        labels = labels if len(classes) > 1 else None  # there is nothing to tell apart
    cut = train_count - validation
    ends = [slice(cut), slice(cut, train_count) if validation else slice(train_count, None)]
    return [(images[part], None if labels is None else labels[part]) for part in ends]


def as_float(images):
    """(N, C, H, W) uint8 in 0..255 -> float32 in [0, 1]."""
    return images.float() / 255


def generator_for(device, *key):
    """A random generator on `device` whose stream is a function of the integers in `key` alone, e.g. (seed, step)."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def batches(images, batch_size, seed, start, stop, device=None, part=slice(None)):
    """Yield (step, (B, C, H, W) float in [0, 1] on `device`) for start <= step < stop from (N, C, H, W) uint8, there or
    elsewhere, in random order. The batch of a step depends on (seed, step) alone; `part` is what is yielded of it. What
    is left over at the end of an epoch is dropped."""
    device = device or images.device
    per_epoch, order = len(images) // batch_size, None
    for step in range(start, stop):
        epoch, place = divmod(step, per_epoch)
        if order is None or place == 0:
            generator = generator_for(device, seed, ORDER, epoch)
            order = torch.randperm(len(images), generator=generator, device=device).to(images.device)
        picked = order[place * batch_size : (place + 1) * batch_size][part]
        yield step, as_float(images[picked].to(device))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Transforms T: drawn once per image and step, applied identically to x and x_hat. Ideas and settings: the author's.
# And the holes of masked mode, which are cut into the input alone

TRANSFORMS = ("none", "pixel", "patch", "channel", "crop", "stack")
DETAILS = ("blur", "colour", "edges", "residual", "contrast")  # what "stack" is a stack of


def draw_boxes(shape, generator, smallest, largest):
    """Draw crop boxes for images of `shape` (B, C, H, W) -> (B, 4) int64 (top, left, height, width), in whole pixels.
    The side, a fraction of the image's, is log-uniform in [smallest, largest], from one pixel; the place is uniform."""
    smallest = max(smallest, 1 / max(shape[2:]))
    uniform, *place = torch.rand(shape[0], 3, device=generator.device, generator=generator).unbind(dim=1)
    share = smallest * (largest / smallest) ** uniform
    sides = [(share * size).round().clamp(min=1) for size in shape[2:]]  # of height and width, (B,) each
    corners = [(u * (size - side + 1)).floor() for u, size, side in zip(place, shape[2:], sides)]
    return torch.stack((*corners, *sides), dim=1).long()


def crop(images, boxes):
    """Cut a box (B, 4) out of each image (B, C, H, W) and blow it up to full size, bilinear, all in one grid_sample.
    Equals slicing followed by F.interpolate(mode="bilinear"), at every pixel."""
    axes = []
    for axis in (0, 1):
        size, start, extent = images.shape[2 + axis], boxes[:, axis, None], boxes[:, 2 + axis, None]
        place = (torch.arange(size, device=images.device) + 0.5) * extent / size - 0.5  # (B, size), pixels of the box
        pixel = start + place.clamp(min=0).minimum(extent - 1.0)  # what lies outside the box must not bleed in
        axes.append((2 * pixel + 1) / size - 1)  # to grid_sample's [-1, 1]
    y, x = axes
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def draw_mask(kind, shape, generator, ratio):
    """Draw a mask for images of `shape` (B, C, H, W) -> float, broadcastable to it, 1 to keep and 0 to black out.
    pixel, patch (4x4): exactly round(ratio * places) are 0, shared by channels. channel: each with chance `ratio`."""
    batch, channels, height, width = shape
    if kind == "channel":
        return (torch.rand(batch, channels, 1, 1, device=generator.device, generator=generator) >= ratio).float()
    cell = 4 if kind == "patch" else 1
    places = (height // cell) * (width // cell)
    ranks = torch.rand(batch, places, device=generator.device, generator=generator).argsort(dim=1)
    keep = (ranks >= round(ratio * places)).float().view(batch, 1, height // cell, width // cell)
    return keep.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)


def blur(images, side):
    """Mean over a side x side window (odd), at the border over its part inside the image."""
    return F.avg_pool2d(images, side, stride=1, padding=side // 2, count_include_pad=False)


def detail(name, images):
    """One of DETAILS, the author's filters: (B, C, H, W) in [0, 1] -> the same shape and range."""
    grey = images.mean(dim=1, keepdim=True)
    if name == "blur":
        return blur(images, 11)
    if name == "colour":  # saturation, then contrast
        saturated = (grey + 1.8 * (images - grey)).clamp(0, 1)
        mean = saturated.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + 1.4 * (saturated - mean)).clamp(0, 1)
    if name == "edges":
        sobel = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        with torch.autocast(images.device.type, enabled=False):
            slopes = F.conv2d(grey, torch.stack((sobel, sobel.T))[:, None], padding=1)  # (B, 2, H, W)
        strength = (slopes.square().sum(dim=1, keepdim=True) + 1e-12).sqrt().expand_as(images)
    else:
        strength = images - blur(images, 5)
    if name == "contrast":
        strength = strength / (blur(strength.square(), 5) + 1e-4).sqrt()
    strength = strength / (strength.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-6)
    return (1 + strength) / 2 if name == "contrast" else strength.abs()


def draw_views(transform, shape, generator, views=1, crop_range=(0.5, 1.0), mask_ratio=0.7):
    """Draw all that is random about T for a batch of `shape` (B, C, H, W) -> a list of (weight, name, draw) per view.
    Weights sum to 1; draw is a tensor, or None for "none" and for "stack", which is the full image beside five details.
    Raises ValueError for a transform that is not in TRANSFORMS."""
    if transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}, expected one of {', '.join(TRANSFORMS)}")
    if transform == "none":
        return [(1.0, "none", None)]
    if transform == "stack":
        return [(0.5, "none", None)] + [(0.5 / len(DETAILS), name, None) for name in DETAILS]
    if transform == "crop":
        return [(1 / views, "crop", draw_boxes(shape, generator, *crop_range)) for _ in range(views)]
    return [(1 / views, transform, draw_mask(transform, shape, generator, mask_ratio)) for _ in range(views)]


def apply_transform(name, draw, images):
    """T of one drawn view: (B, C, H, W) float -> the same shape. The same draw is the same T, whatever the images."""
    if name == "none":
        return images
    if name == "crop":
        return crop(images, draw)
    return detail(name, images) if name in DETAILS else images * draw


def draw_holes(shape, generator, ratio):
    """Draw a square hole for each image of `shape` (B, C, S, S) -> boxes (B, 4) as from draw_boxes. The side is
    round(sqrt(ratio) * S), from 1 to S - 1."""
    side = min(ratio**0.5, 1 - 1 / shape[2])
    return draw_boxes(shape, generator, side, side)


def hole_mask(holes, size):
    """Boxes (B, 4) in images of that side -> (B, 1, size, size) float, 1 in the box and 0 outside."""
    place = torch.arange(size, device=holes.device) - holes[:, :2, None]  # (B, 2, size), counted from the corner
    y, x = ((place >= 0) & (place < holes[:, 2:, None])).float().unbind(dim=1)  # (B, size) each
    return (y[:, :, None] * x[:, None, :])[:, None]


def cut_holes(images, holes):
    """Fill the holes (B, 4) of images (B, C, S, S) with each image's own mean, per channel, as the author does."""
    return images.lerp(images.mean(dim=(2, 3), keepdim=True), hole_mask(holes, images.shape[3]))


# ---------------------------------------------------------------------------------------------------------------------
# 3. Model: the author's network. And statistics of a batch that several processes share


def processes():
    """How many processes train together: 1 unless torchrun started several."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


class Average(torch.autograd.Function):
    """Mean of a tensor over all processes, and of its gradient: then the mean over processes of their losses has the
    gradients that one process with the whole batch would get. (An in-place all_reduce passes no gradient on.)"""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x / processes()

    @staticmethod
    def backward(ctx, gradient):
        return Average.apply(gradient)


def average(x):
    """Mean of a tensor over all processes, each with an equal part of the batch; x itself when there is one."""
    return x if processes() == 1 else Average.apply(x)


def moments(x, dims):
    """Mean and variance of x over dimensions, kept as 1, and over all processes."""
    mean = average(x.mean(dim=dims, keepdim=True))
    return mean, average((x - mean).square().mean(dim=dims, keepdim=True))


def weakest(codes):
    """The deviation of codes (N, C, h, w) over images, mean over places, of the channel where it is smallest -> scalar,
    near 0 on collapse: all images have then one code, whatever it holds at each place."""
    return moments(codes, 0)[1].sqrt().mean(dim=(2, 3)).min()


class CodeNorm(nn.BatchNorm2d):
    """BatchNorm2d without affine part, which would work against SIGReg. Its batch is that of all processes together, on
    any device: nn.SyncBatchNorm knows GPUs alone. In training `last` is the last batch, normalised."""

    def __init__(self, channels):
        super().__init__(channels, affine=False)

    def forward(self, codes, track=True):
        if not self.training:
            return super().forward(codes)
        mean, variance = moments(codes, (0, 2, 3))
        codes = (codes - mean) / (variance + self.eps).sqrt()
        if track:
            self.last = codes.detach()
            count = codes[:, 0].numel() * processes()
            self.running_mean.lerp_(mean.detach().flatten(), self.momentum)
            self.running_var.lerp_(variance.detach().flatten() * count / (count - 1), self.momentum)
        return codes


class Down(nn.Module):
    """Halve the side, (B, i, h, w) -> (B, o, h/2, w/2): two 3x3 convolutions beside a skip that has no weights."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x):
        skip = F.pixel_unshuffle(x, 2).unflatten(1, (self.conv2.out_channels, -1)).mean(dim=2)  # 4i channels, o means
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
    """(B, 1 or 3, H, W) in [0, 1] -> features (B, C, H/8, W/8), or (B, n, 1, 1) for a latent_dim of n; and the
    activations after the stem and the first Down. This is also the judge. The norm of the code is not in here:
    transformed views must not move its statistics."""

    def __init__(self, channels, width, latent_channels, latent_dim=None, size=None):
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
        return self.head(self.down2(middle)), (stem, middle)


class Autoencoder(nn.Module):
    """Encoder, norm of the code, decoder, for images (B, channels, H, W) in [0, 1] of any sides divisible by 8.
    width: w, channels after the stem. latent_channels: C of the code (B, C, H/8, W/8), must divide 8w. latent_dim: n,
    for a global code instead, (B, n, 1, 1), of images of side `size` alone; the author sets C = w there.
    forward: images -> their reconstructions, the same shape and range."""

    def __init__(self, channels=3, width=64, latent_channels=8, latent_dim=None, size=None):
        super().__init__()
        self.encoder = Encoder(channels, width, latent_channels, latent_dim, size)
        self.norm = CodeNorm(latent_dim or latent_channels)
        layers = [Up(latent_channels, 2 * width), Up(2 * width, width), nn.Upsample(scale_factor=2)]
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        if latent_dim:
            spatial = nn.Unflatten(1, (latent_channels, size // 8, size // 8))
            flat = nn.Linear(latent_dim, latent_channels * (size // 8) ** 2)
            layers = [nn.Flatten(), flat, spatial, nn.SiLU(), *layers]
        self.decoder = nn.Sequential(*layers)

    def encode(self, images):
        """Images -> code (B, C, H/8, W/8) or (B, n, 1, 1) float32, near mean 0 and deviation 1 per channel."""
        return self.norm(self.encoder(images)[0].float())

    def decode(self, z):
        """Code (B, C, h, w) or (B, n, 1, 1) -> images (B, channels, H, W) in [0, 1], float32 under autocast too."""
        return self.decoder(z).float().sigmoid()

    def forward(self, images):
        return self.decode(self.encode(images))


# ---------------------------------------------------------------------------------------------------------------------
# 4. SIGReg: is the code a standard Gaussian? LeJEPA, arXiv 2511.08544, Algorithm 1; recurrence and gradient are ours


def draw_slices(dimensions, count, generator):
    """Draw `count` directions, uniform on the sphere, as unit columns (dimensions, count)."""
    return F.normalize(torch.randn(dimensions, count, device=generator.device, generator=generator), dim=0)


def sigreg(codes, slices, knots=17, t_max=3.0):
    """Epps-Pulley statistic of the codes (N, D) or (N, D, h, w) along slices (D, M), mean over slices -> scalar.
    N * sum over knots t in [0, t_max] of weight * |mean over N of exp(i t s) - exp(-t^2/2)|^2, the weight exp(-t^2/2)
    times the trapezoid on [-t_max, t_max]. Spatial codes: each position over the batch, then mean over positions.
    Expectation 1.05 for N(0, I) codes, whatever N and D; 0.402 * N when every code is 0. It grows with N for a fixed
    mismatch, so its weight in a loss belongs to a batch size. The slices get no gradient."""
    count, dt = len(codes) * processes(), t_max / (knots - 1)
    with torch.autocast(codes.device.type, enabled=False):  # small differences of means: bf16 would drown them
        codes = codes.float().reshape(*codes.shape[:2], -1).permute(2, 0, 1)  # (P, n, D), P positions, n of N here
        k = torch.arange(1, knots, device=codes.device).view(-1, 1, 1, 1)  # at t = 0 there is no difference
        gaussian = torch.exp(-((k * dt) ** 2) / 2)  # (K, 1, 1, 1)
        weight = gaussian * torch.where(k == knots - 1, dt, 2 * dt)
        # The gradient is worked out beside the value: autograd would keep every knot's cosines. And in parts of 4 MB,
        # for large codes have many positions
        with torch.no_grad():
            total, slopes = 0.0, []
            for part in codes.split(max(1, 2**20 // (len(codes[0]) * slices.shape[1]))):
                angle = dt * (part @ slices)  # (p, n, M)
                cos1, sin1 = angle.cos(), angle.sin()
                cos, sin, means = cos1, sin1, []
                for _ in range(1, knots):
                    means.append(torch.stack((cos.mean(dim=1, keepdim=True), sin.mean(dim=1, keepdim=True))))
                    # Angle addition: one cosine serves all knots
                    cos, sin = torch.addcmul(cos * cos1, sin, sin1, value=-1), torch.addcmul(sin * cos1, cos, sin1)
                cos_mean, sin_mean = average(torch.stack(means)).unbind(dim=1)  # (K, p, 1, M)
                real, imaginary = cos_mean - gaussian, sin_mean
                total = total + (weight * (real**2 + imaginary**2)).sum()
                # The derivative by the angle, sum of 2 k weight (imaginary cos(k angle) - real sin(k angle)), is the
                # real part of a polynomial in exp(i angle): Horner
                a, b = 2 * k * weight * imaginary, 2 * k * weight * real
                u, v = torch.zeros_like(angle), torch.zeros_like(angle)
                for j in reversed(range(knots - 1)):
                    u, v = (torch.addcmul(a[j], u, cos1).addcmul_(v, sin1, value=-1),
                            torch.addcmul(b[j], u, sin1).addcmul_(v, cos1))
                slopes.append(dt * (u * cos1 - v * sin1) @ slices.T)  # of N * total in the codes, (p, n, D)
            gradient = torch.cat(slopes) * processes()  # that of the mean of their losses
        value = count * total + ((codes - codes.detach()) * gradient).sum()  # the sum is 0, its gradient is not
        return value / (len(codes) * slices.shape[1])  # mean over positions and slices


# ---------------------------------------------------------------------------------------------------------------------
# 5. Objective: pure functions of a model, a batch and the step's draws

JUDGES = ("frozen", "live", "ema", "random")


def judge_weights(encoder, name, kept=None):
    """The weights that the judge of that name looks with: a dict of tensors by parameter name.
    frozen: the encoder's, held constant. live: the encoder's, gradient and all. ema, random: `kept`, a copy of the
    encoder's initial weights that the caller moves after each step (ema) or leaves alone (random)."""
    if name not in JUDGES or (name in ("ema", "random") and kept is None):
        raise ValueError(f"unknown judge {name!r}, or one that needs kept weights; expected one of {', '.join(JUDGES)}")
    if name == "live":
        return dict(encoder.named_parameters())
    return {key: weight.detach() for key, weight in encoder.named_parameters()} if name == "frozen" else kept


def code_distance(target, seen):
    """d for (B, C, h, w): mean over batch, channels and positions of ((seen - target) / (s + 1e-3))^2 -> scalar.
    s: the target's standard deviation per channel, over batch and positions. One scale for both sides: normalising each
    by its own statistics, as the author does, would hide any cast common to the batch."""
    target, seen = target.float(), seen.float()
    scale = moments(target, (0, 2, 3))[1].clamp(min=1e-12).sqrt()  # the slope of a bare root at 0 is infinite
    return ((seen - target) / (scale + 1e-3)).square().mean()


def layer_distance(targets, seen):
    """Sum over layers of mean((seen - target)^2) / (variance of target + 1e-4) -> scalar, float32."""
    pairs = [(t.float(), s.float()) for t, s in zip(targets, seen)]
    return sum((s - t).square().mean() / (moments(t, (0, 1, 2, 3))[1].squeeze() + 1e-4) for t, s in pairs)


def look(model, judge, images):
    """What the judge, weights from judge_weights, sees in images (B, channels, H, W): as Encoder.forward."""
    return torch.func.functional_call(model.encoder, judge, images)


def judge_views(model, judge, images, z, x_hat, views, slices, layer_weight):
    """Judge x_hat, decoded from z (B, C, h, w), as a reconstruction of `images`, both (B, channels, H, W) -> how far
    off it is, mean over views of d(J(T(images)), J(T(x_hat))) plus layer_weight times the same for the judge's inner
    activations; SIGReg, mean over z and, for a live judge, the transformed codes; the terms by name, distance d alone.
    """
    live = any(weight.requires_grad for weight in judge.values())
    codes, distance, layers = [z], 0.0, 0.0
    for share, name, draw in views:
        with torch.set_grad_enabled(live):  # what the judge sees in the original is the target, a constant
            target, target_layers = look(model, judge, apply_transform(name, draw, images))
        seen, seen_layers = look(model, judge, apply_transform(name, draw, x_hat))
        distance = distance + share * code_distance(target, seen)
        if layer_weight:
            layers = layers + share * layer_distance(target_layers, seen_layers)
        if live:  # normalised by their own batch: the running statistics belong to full images
            codes += [model.norm(code.float(), track=False) for code in (target, seen)]
    regulariser = sum(sigreg(code, slices) for code in codes) / len(codes)  # mean over codes
    terms = {"distance": distance} | ({"layers": layers} if layer_weight else {}) | {"sigreg": regulariser}
    return distance + layer_weight * layers, regulariser, terms


def stae_loss(model, images, views, slices, judge, sigreg_weight=0.03, layer_weight=1.0):
    """The self-teaching objective for images (B, channels, H, W) in [0, 1] -> loss (scalar), its terms by name.
    views: from draw_views. slices: (C, M) from draw_slices. judge: from judge_weights; if it requires gradient (live),
    it gets it from both sides, and SIGReg acts on the transformed codes too. layer_weight: of the inner activations."""
    z = model.encode(images)  # (B, C, h, w)
    x_hat = model.decode(z)  # (B, channels, H, W)
    distance, regulariser, terms = judge_views(model, judge, images, z, x_hat, views, slices, layer_weight)
    return distance + sigreg_weight * regulariser, terms


def masked_loss(model, images, holed, views, slices, judge, sigreg_weight=0.03, layer_weight=10.0):
    """The masked objective, which the author calls leAutoencoder -> loss (scalar), its terms by name. holed: `images`
    with holes (cut_holes). What is decoded from either must look like `images`, and like the other; the rest as in
    stae_loss: loss = mean of the three distances + sigreg_weight * mean of the two SIGRegs.
    Whole and holed images pass the norm of the code in one call: in two, its one running average would fit neither."""
    z, z_holed = model.encode(torch.cat((images, holed))).split(len(images))
    x_hat, x_holed = model.decode(z), model.decode(z_holed)
    rest = views, slices, layer_weight
    clean, regulariser, terms = judge_views(model, judge, images, z, x_hat, *rest)
    masked, regulariser_holed, terms_holed = judge_views(model, judge, images, z_holed, x_holed, *rest)
    seen, seen_holed = look(model, judge, x_hat)[0], look(model, judge, x_holed)[0]
    agreement = code_distance(seen, seen_holed)  # without T; gradient flows into both sides
    loss = (agreement + clean + masked) / 3 + sigreg_weight * (regulariser + regulariser_holed) / 2
    terms = {f"{name}_clean": term for name, term in terms.items()}
    terms |= {f"{name}_masked": term for name, term in terms_holed.items()}
    return loss, {"agreement": agreement} | terms


def mse_loss(model, images, holed=None):
    """The baseline: mean over batch, channels and pixels of (D(E(x)) - x)^2 -> loss (scalar), its terms by name.
    holed: the images with holes; they are then the input, `images` the target."""
    loss = (model(images if holed is None else holed) - images).square().mean()
    return loss, {"mse": loss}


# ---------------------------------------------------------------------------------------------------------------------
# 6. Evaluation: in float32, over a whole split


def psnr(mse):
    """Mean squared error of images in [0, 1] -> PSNR in dB, infinite for 0."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def luma_chroma(images):
    """RGB (B, 3, H, W) -> luma (B, 1, H, W) and chroma (B, 2, H, W) as in JPEG (BT.601). Grey has no chroma."""
    if images.shape[1] == 1:
        return images, torch.zeros_like(images)
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    return torch.einsum("pc,bchw->bphw", torch.tensor(matrix, device=images.device), images).split([1, 2], dim=1)


def ssim(x, y):
    """Structural similarity of (B, C, H, W) in [0, 1], sides at least 11 -> (B,), 1 for equal images.
    Wang et al. 2004: Gaussian window of 11, sigma 1.5, inside the image only; mean over channels and places."""
    means = (TF.gaussian_blur(images, 11, 1.5) for images in (x, y, x * x, y * y, x * y))
    mx, my, xx, yy, xy = (mean[:, :, 5:-5, 5:-5] for mean in means)
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    return score.mean(dim=(1, 2, 3))


def variation(images, inside=None):
    """Sum of absolute horizontal and vertical differences, (B, C, H, W) -> (B,). Sharpness is a ratio of two.
    inside: (B, 1, H, W), 1 for the pixels that count; a difference counts when both of its pixels do."""
    inside = torch.ones_like(images[:, :1]) if inside is None else inside
    counts = [(dim, inside.unfold(dim, 2, 1).amin(dim=-1)) for dim in (2, 3)]
    return sum((images.diff(dim=dim).abs() * count).flatten(1).sum(dim=1) for dim, count in counts)


def principal_axes(flat, count):
    """The directions of largest variance of (N, D), N from 1 -> their mean (D,), axes (D, K), the leading first; K is
    `count`, or fewer when the points span fewer."""
    mean, count = flat.mean(dim=0), min(count, len(flat) - 1)
    if len(mean) <= 4096:
        return mean, torch.linalg.eigh(torch.cov(flat.T, correction=0)).eigenvectors.flip(1)[:, :count]
    with torch.random.fork_rng():  # too many dimensions for a covariance
        torch.manual_seed(0)
        return mean, torch.svd_lowrank(flat - mean, q=min(count + 16, *flat.shape), niter=4)[2][:, :count]


class PCA:
    """The best linear code of so many numbers for images (N, C, H, W) uint8: encode and decode as an Autoencoder's."""

    def __init__(self, images, dimensions, device="cpu"):
        self.shape = images.shape[1:]
        sample = as_float(images[:: 1 + images.numel() // 2**29].to(device))  # evenly spaced, at most 2 GB
        self.mean, self.axes = principal_axes(sample.flatten(1), dimensions)

    def encode(self, images):
        return (images.flatten(1) - self.mean) @ self.axes  # (B, K), K the dimensions, or fewer for few images

    def decode(self, z):
        return (z @ self.axes.T + self.mean).unflatten(1, self.shape)  # (B, C, H, W), not clamped to [0, 1]

    def __call__(self, images):
        return self.decode(self.encode(images))


def collect(function, images, device, batch_size=250):
    """What `function` makes of images (N, C, H, W) uint8, taken as floats on `device`, batch by batch -> (N, ...)."""
    return torch.cat([function(as_float(part.to(device))) for part in images.split(batch_size)])


EXPLAIN = {  # every number of the table, and the keys of metrics.json
    "psnr": "dB, of the mean squared error over the whole split",
    "psnr_luma": "dB, of the brightness alone",
    "psnr_chroma": "dB, of the two colour planes alone",
    "mse": "mean squared error, pixels in [0, 1]",
    "ssim": "structural similarity, 1 for equal images",
    "sharpness": "sum of pixel differences, reconstructions over originals",
    "sigreg": "SIGReg of the codes in groups of 128, 1.05 for a Gaussian",
    "min_std": "deviation of the code's weakest channel, near 0 on collapse",
    "hole": "share of the area that a hole takes",
    "masked_psnr": "dB, reconstructions of images with holes",
    "hole_psnr": "dB, the same inside the holes",
    "visible_psnr": "dB, the same outside the holes",
    "hole_floor_psnr": "dB, holes filled with the mean training image",
    "hole_sharpness": "sharpness inside the holes",
    "masked_ssim": "structural similarity, reconstructions of images with holes",
    "pca_psnr": "dB, of the best linear code of the same size",
    "code_size": "numbers per image",
    "rankme": "effective number of dimensions that the codes fill",
    "probe_code": "% correct, linear probe on the code",
    "probe_random_code": "% correct, linear probe on the code of an untrained encoder",
    "probe_pca": "% correct, linear probe on a PCA code of the same size",
    "probe_pixels": "% correct, linear probe on the pixels, averaged to at most 4,096 numbers",
    "probe_features": "% correct, linear probe on the activations before the last block, averaged likewise",
    "probe_random": "% correct, the same on those of an untrained encoder",
    "knn_code": "% correct, 20 nearest neighbours by the code",
    "knn_pca": "% correct, the same by a PCA code of the same size",
    "knn_features": "% correct, the same by the activations",
    "knn_random": "% correct, the same by those of an untrained encoder",
    "few10": "% correct, linear probe on the code from 10 labels a class; - if a class has fewer",
    "few10_random_code": "% correct, the same on the code of an untrained encoder",
    "few100": "% correct, linear probe on the code from 100 labels a class",
    "few100_random_code": "% correct, the same on the code of an untrained encoder",
    "kmeans_inertia": "variance within clusters of codes over all variance, as many clusters as classes",
    "kmeans_nmi": "what those clusters tell of the classes, from 0 to 1",
    "alignment": "share of what pixels tell of the training labels that PCA of this size keeps, any model",
    "recognition": "% of reconstructions that a classifier of originals gets right",
    "recognition_original": "% of originals that it gets right",
    "recognition_pca": "% of PCA reconstructions that it gets right",
    "accuracy_error": "% points, standard error at most of these from so many test images",
    "parameters": "weights of encoder and decoder",
    "train_seconds": "training alone",
    "images_per_second": "training alone",
    "seed": "of initial weights and all draws",
}


@torch.no_grad()
def evaluate(model, train, test, hole=None, probe=True, classifier=None, batch_size=250):
    """Measure a model on a whole split -> the keys of EXPLAIN up to "parameters". Leaves the model in eval mode.
    train, test: (images (N, C, H, W) uint8, here or elsewhere; labels (N,) or None) as load_data returns them; train
    serves the floors and the probes alone. hole: share of the area, for the keys that speak of holes. probe: for those
    of what the code knows. classifier: from train_classifier, for those of recognition."""
    model.eval()
    (images, _), (test_images, labels) = train, test
    device = next(model.parameters()).device
    results = evaluate_images(model, test_images, batch_size)
    pca = PCA(images, results["code_size"], device)
    error = collect(lambda x: (pca(x) - x).square().mean(dim=(1, 2, 3)), test_images, device)
    results |= {"pca_psnr": psnr(error.double().mean().item())}
    if hole:
        results |= evaluate_holes(model, pca.mean.view_as(images[0]), test_images, hole, batch_size)
    if probe:
        results |= evaluate_codes(model, pca, train, test)
    if classifier:
        for name, show in {"": model, "_original": lambda x: x, "_pca": pca}.items():
            guess = collect(lambda x: classifier(show(x)), test_images, device).argmax(dim=1)
            results["recognition" + name] = accuracy(guess, labels)
    if results.keys() & {"probe_code", "recognition"}:
        results["accuracy_error"] = 50 / len(labels) ** 0.5
    return results


def evaluate_images(model, test, batch_size):
    """What `evaluate` says of reconstructions and codes of images (N, C, H, W) uint8 whatever else it is asked."""
    device = next(model.parameters()).device
    rows, codes = [], []
    for images in test.split(batch_size):
        x = as_float(images.to(device))
        codes.append(model.encode(x))
        x_hat = model.decode(codes[-1])
        squares = [error.square().mean(dim=(1, 2, 3)) for error in (x_hat - x, *luma_chroma(x_hat - x))]
        rows.append(torch.stack([*squares, ssim(x, x_hat), variation(x_hat), variation(x)], dim=1))  # (B, 6)
    mse, luma, chroma, similarity, sharp, sharp_original = torch.cat(rows).double().mean(dim=0).tolist()
    codes = torch.cat(codes)  # (N, C, h, w)
    slices = draw_slices(codes.shape[1], 256, generator_for(device, 0))
    groups = codes.split(128)[: max(1, len(codes) // 128)]
    return {
        "psnr": psnr(mse), "psnr_luma": psnr(luma), "psnr_chroma": psnr(chroma), "mse": mse, "ssim": similarity,
        "sharpness": sharp / max(sharp_original, 1e-9),
        "sigreg": sum(sigreg(group, slices).item() for group in groups) / len(groups),
        "min_std": weakest(codes).item(),
        "code_size": codes[0].numel(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def fixed_holes(images, hole):
    """The holes of test images (N, C, S, S), of that share of the area in (0, 1), as boxes (N, 4) on the CPU: the same
    for every model and on every device."""
    return draw_holes(images.shape, generator_for("cpu", 0), hole)


def evaluate_holes(model, mean_image, test, hole, batch_size):
    """What `evaluate` adds when the input has a hole: the keys of EXPLAIN from "hole" to "masked_ssim"."""
    device, rows = next(model.parameters()).device, []
    for images, holes in zip(test.split(batch_size), fixed_holes(test, hole).split(batch_size)):
        x, holes = as_float(images.to(device)), holes.to(device)
        x_hat, inside = model(cut_holes(x, holes)), hole_mask(holes, x.shape[3])
        square, floor = (x_hat - x).square(), (mean_image - x).square()
        parts = square * inside, square * (1 - inside), floor * inside, inside
        sharpness = variation(x_hat, inside), variation(x, inside)
        rows.append(torch.stack([*(part.mean(dim=(1, 2, 3)) for part in parts), *sharpness, ssim(x, x_hat)], dim=1))
    within, outside, floor, area, sharp, sharp_original, similarity = torch.cat(rows).double().mean(dim=0).tolist()
    return {
        "hole": hole,
        "masked_psnr": psnr(within + outside), "hole_psnr": psnr(within / area), "hole_floor_psnr": psnr(floor / area),
        "visible_psnr": psnr(outside / (1 - area)), "masked_ssim": similarity,
        "hole_sharpness": sharp / max(sharp_original, 1e-9),
    }


RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # strengths that a linear probe chooses from


def accuracy(guess, labels):
    """Per cent of the labels (N,) that were guessed."""
    return 100 * (guess.cpu() == labels.cpu()).double().mean().item()


def ridge(x, y, strengths):
    """Ridge regression of y (N, K) on x (N, D) -> for each strength the weights (D, K) that minimise the mean over N of
    |x @ weights - y|^2, sum over K, plus strength * |weights|^2."""
    wide = x.shape[1] > len(x)  # then solve for N numbers instead of D
    gram, right = (part.double() for part in ((x @ x.T, y) if wide else (x.T @ x, x.T @ y)))
    for strength in strengths:
        regularised = gram + strength * len(x) * torch.eye(len(gram), device=x.device, dtype=gram.dtype)
        weights = torch.cholesky_solve(right, torch.linalg.cholesky(regularised)).float()
        yield x.T @ weights if wide else weights


def linear_probe(x, labels, test, test_labels):
    """Per cent of test (M, D) that ridge regression on one-hot labels of x (N, D), in random order, gets right. The
    features are standardised. Its strength is that of RIDGE which does best on the last fifth of x, in images right, or
    in squared error when they are fewer than 1,000 and their count is too coarse."""
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6
    x, test = (x - mean) / scale, (test - mean) / scale
    y, cut = F.one_hot(labels).float(), max(1, len(x) * 4 // 5)

    def scores(known, asked, strengths):
        share = y[:known].mean(dim=0)
        return [asked @ weights + share for weights in ridge(x[:known], y[:known] - share, strengths)]

    def merit(score):
        if len(score) >= 1000:
            return accuracy(score.argmax(dim=1), labels[cut:])
        return -(score - y[cut:]).square().mean().item()

    tried = [merit(score) for score in scores(cut, x[cut:], RIDGE)]
    best = RIDGE[tried.index(max(tried))]
    return accuracy(scores(len(x), test, [best])[0].argmax(dim=1), test_labels)


def few_labels(x, labels, test, test_labels, per_class, draws=5):
    """linear_probe from so many images of each class, mean over draws; nan when a class has fewer."""
    if labels.unique(return_counts=True)[1].min() < per_class:
        return math.nan
    total = 0.0
    for draw in range(draws):
        order = torch.randperm(len(x), generator=generator_for("cpu", draw)).to(x.device)
        rank = F.one_hot(labels[order]).cumsum(dim=0).gather(1, labels[order, None])[:, 0]  # within its class, from 1
        few = order[rank <= per_class]
        total += linear_probe(x[few], labels[few], test, test_labels)
    return total / draws


def knn(x, labels, test, test_labels, k=20):
    """Per cent of test (M, D) that the majority of their k nearest of x (N, D) by cosine gets right; ties go to the
    smaller label."""
    x, test = F.normalize(x), F.normalize(test)
    nearest = [labels[(part @ x.T).topk(min(k, len(x))).indices] for part in test.split(1000)]  # (1000, k) each
    return accuracy(torch.cat([F.one_hot(votes).sum(dim=1).argmax(dim=1) for votes in nearest]), test_labels)


def k_means(x, clusters, generator, starts=3, rounds=100):
    """Lloyd's k-means from k-means++ (Arthur and Vassilvitskii, 2007), the best of some starts -> variance within the
    clusters over all variance of x (N, D), nan when that is 0; the cluster of each (N,)."""
    x, best, owner = x.double(), math.inf, None
    for _ in range(starts):
        centres = x[torch.randint(len(x), (1,), generator=generator, device=x.device)]
        far = torch.full_like(x[:, 0], math.inf)
        while len(centres) < clusters:
            far = torch.minimum(far, (x - centres[-1]).square().sum(dim=1))
            centres = torch.cat((centres, x[torch.multinomial(far + 1e-12, 1, generator=generator)]))
        for _ in range(rounds):
            nearest = torch.cdist(x, centres).argmin(dim=1)
            members = F.one_hot(nearest, clusters).double()  # (N, clusters)
            moved = members.T @ x / members.sum(dim=0)[:, None].clamp(min=1)
            if torch.equal(moved, centres):
                break
            centres = moved
        within = (x - centres[nearest]).square().sum().item()
        if within < best:
            best, owner = within, nearest
    total = (x - x.mean(dim=0)).square().sum().item()
    return best / total if total else math.nan, owner


def mutual_information(a, b):
    """What labels a (N,) tell of labels b (N,), over the mean of their entropies -> 0 to 1, nan when both have one."""
    joint = F.one_hot(a).double().T @ F.one_hot(b).double() / len(a)
    whole, one, other = (-torch.xlogy(p, p).sum() for p in (joint, joint.sum(dim=1), joint.sum(dim=0)))
    return (2 * (one + other - whole) / (one + other)).clamp(min=0).item()


def rankme(codes):
    """Effective rank of codes (N, D): exp of the entropy of their singular values. Garrido et al., arXiv 2210.02885,
    but for 1e-5 in place of their 1e-7."""
    codes = codes.double()  # in float32 the small ones would be noise
    gram = codes.T @ codes if codes.shape[1] < len(codes) else codes @ codes.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum() + 1e-5
    return torch.exp(-torch.xlogy(share, share).sum()).item()


def alignment(pixels, labels, count):
    """What the `count` leading principal directions of pixels (N, D) keep of the labels (N,): with X = U S V' the
    centred pixels (D, N), of rank R, and Y their one-hot labels (K, N), |Y V_count|^2 / |Y V_R|^2, from 0 to 1,
    nan for a single class. Balestriero and LeCun, arXiv 2402.11337, Eq. 7."""
    if labels.min() == labels.max():
        return math.nan
    centred = (pixels - pixels.mean(dim=0)).double()
    values, axes = torch.linalg.eigh(centred.T @ centred)  # squares of S, smallest first, and U
    found = (F.one_hot(labels).double().T @ centred @ axes).square().sum(dim=0)  # |Y V|^2 times squares of S
    share = torch.where(values > 1e-10 * values[-1], found / values, 0.0).flip(0)
    return (share[:count].sum() / share.sum()).item()


def pooled(maps):
    """(B, C, h, w) averaged over places, when need be, until at most 4,096 numbers are left."""
    return F.adaptive_avg_pool2d(maps, min(maps.shape[2], max(1, math.isqrt(4096 // maps.shape[1]))))


def untrained(model):
    """A copy of the model with random weights, always the same: what the network gives before it learns."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh


def evaluate_codes(model, pca, train, test):
    """What `evaluate` adds of the code's worth: the keys of EXPLAIN from "rankme" to "alignment", from at most 20,000
    training images, the same for every model. Without labels it is rankme alone."""
    (images, labels), (test_images, test_labels) = train, test
    device, fresh = next(model.parameters()).device, untrained(model)
    picked = torch.randperm(len(images), generator=generator_for("cpu", 0))[:20_000]
    images = images[picked.to(images.device)]
    results = {"rankme": rankme(collect(model.encode, images[:10_000], device).flatten(1))}
    if labels is None or labels.max() >= 1000:
        why = "no labels" if labels is None else "more than 1,000 classes"
        print(f"{why}: probes, neighbours, k-means and alignment are skipped")
        return results
    y, test_y = labels[picked].to(device), test_labels.to(device)
    reads = {
        "code": model.encode, "random_code": fresh.encode, "pca": pca.encode, "pixels": pooled,
        "features": lambda x: pooled(model.encoder(x)[1][1]), "random": lambda x: pooled(fresh.encoder(x)[1][1]),
    }
    for name, read in reads.items():
        known = collect(read, images, device).flatten(1), y
        unknown = collect(read, test_images, device).flatten(1), test_y
        results[f"probe_{name}"] = linear_probe(*known, *unknown)
        if name in ("code", "pca", "features", "random"):
            results[f"knn_{name}"] = knn(*known, *unknown)
        if name in ("code", "random_code"):
            control = "" if name == "code" else f"_{name}"
            results |= {f"few{count}{control}": few_labels(*known, *unknown, count) for count in (10, 100)}
        if name == "code":
            inertia, clusters = k_means(known[0], len(y.unique()), generator_for(device, 0))
            results |= {"kmeans_inertia": inertia, "kmeans_nmi": mutual_information(clusters, y)}
        if name == "pixels" and known[0].shape[1] == images[0].numel():  # not pooled
            results["alignment"] = alignment(*known, pca.axes.shape[1])
    return results


@torch.no_grad()
def pictures(models, images, hole=None):
    """Rows for save_rows: 16 test images (of (N, C, H, W) uint8), then what each model makes of them. With a hole: the
    images, the images with holes, then what each model makes of the holed ones and of the whole ones."""
    x = as_float(images[:16].to(next(models[0].parameters()).device))
    inputs = [x]
    if hole:
        inputs = [cut_holes(x, fixed_holes(images, hole)[:16].to(x.device)), x]
    return [x, *inputs[:-1], *(model(batch) for model in models for batch in inputs)]


@torch.no_grad()
def code_pictures(model, train, test):
    """Show what the code is like, on train and test images (N, C, H, W) uint8, two of each at least -> a dict from each
    picture's name to (what its rows are, the rows for save_rows). Neighbours and statistics are of at most 20,000
    training images. "brush" is left out for a global code."""
    device, generator = next(model.parameters()).device, generator_for("cpu", 0)
    train = train[torch.randperm(len(train), generator=generator)[:20_000].to(train.device)]
    x = as_float(test[:16].to(device))
    z = model.encode(x)
    codes = collect(model.encode, train, device).flatten(1)  # (N, D)

    def decode(flat):
        return model.decode(flat.view(-1, *z.shape[1:]))

    drawn = {}
    mean, axes = principal_axes(codes, 8)
    steps = torch.linspace(-3, 3, 9, device=device)[:, None]
    rows = [decode(mean + steps * ((codes - mean) @ axis).std() * axis) for axis in axes.T]
    drawn["walk"] = "a leading principal direction of the code each, from -3 to 3 deviations about the mean", rows

    share = torch.linspace(0, 1, 9, device=device).view(-1, 1, 1, 1)
    rows = [row for i in range(0, min(8, len(x) - 1), 2)
            for row in (model.decode(z[i].lerp(z[i + 1], share)), x[i].lerp(x[i + 1], share))]
    drawn["interpolation"] = "pairs: between two images' codes, between their pixels", rows

    noise = torch.randn(32, z[0].numel(), generator=generator).to(device)
    mixed = torch.randn(32, len(codes), generator=generator).to(device) @ (codes - mean) / len(codes) ** 0.5
    rows = [*decode(noise).split(16), *decode(mean + mixed).split(16)]
    drawn["samples"] = "two of codes from N(0, I), two from a Gaussian with the codes' mean and covariance", rows

    if z.shape[2] > 1:
        half = z.shape[2] // 2
        painted, middle = z.clone(), slice((z.shape[2] - half) // 2, (z.shape[2] - half) // 2 + half)
        painted[:, :, middle, middle] = z.roll(-1, 0)[:, :, middle, middle]
        rows = [x, x.roll(-1, 0), model.decode(z), model.decode(painted)]
        drawn["brush"] = "images, others, reconstructions, with a square of the code taken from the other", rows

    rows = [x[:8]]
    for read in (model.encode, lambda batch: batch):
        asked = read(x[:8]).flatten(1)
        far = collect(lambda batch: torch.cdist(read(batch).flatten(1), asked), train, device)  # (N, 8)
        nearest = far.topk(min(3, len(far)), dim=0, largest=False).indices
        rows += [as_float(train[row.to(train.device)].to(device)) for row in nearest]
    drawn["neighbours"] = "test images, their three nearest training images by code, the three by pixels", rows
    return drawn


def report(results, path):
    """Print the table, and write it to `path` as JSON; what has no finite value is null there and a dash on screen."""
    results = {name: results[name] if math.isfinite(results[name]) else None for name in EXPLAIN if name in results}
    for name, value in results.items():
        form = "," if isinstance(value, int) else ",.0f" if value and value >= 1000 else ".4g"
        text = "-" if value is None else format(value, form)
        print(f"{name:20}{text:>10}  {EXPLAIN[name]}")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")


def save_rows(path, rows):
    """Save a picture: one row per batch, up to 16 images (n, C, H, W) in [0, 1] each, small ones magnified."""
    tiles = torch.cat([row[:16] for row in rows]).cpu()
    tiles = F.interpolate(tiles, scale_factor=max(1, 64 // tiles.shape[-1]))
    save_image(tiles, path, nrow=len(rows[0][:16]), pad_value=1)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Training


def learning_rate(step, steps, peak):
    """Linear warm-up over 100 steps (a tenth of a short run), then a cosine from `peak` to 5 % of it."""
    warmup = min(100, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def rank():
    """The number of this process among those that train together, 0 for the one that writes."""
    return torch.distributed.get_rank() if processes() > 1 else 0


def own_part(batch_size):
    """The part of a batch that this process takes, as a slice."""
    share = batch_size // processes()
    return slice(rank() * share, (rank() + 1) * share)


def draw_step(step, device, config):
    """All that is random in a step, a function of (seed, step) -> holes or None, views, slices, for an Objective. Drawn
    for the whole batch, so that several processes draw the same, and each keeps its part."""
    shape, part = (config.batch_size, config.channels, config.size, config.size), own_part(config.batch_size)
    generator = generator_for(device, config.seed, DRAWS, step)
    # The holes are drawn first, so that mse and stae see the same
    holes = draw_holes(shape, generator, config.hole)[part] if config.masked else None
    if config.objective == "mse":
        return holes, None, None
    views = draw_views(config.transform, shape, generator, config.views, config.crop, config.mask_ratio)
    views = [(share, name, None if draw is None else draw[part]) for share, name, draw in views]
    return holes, views, draw_slices(config.latent_dim or config.latent_channels, config.slices, generator)


class Objective(nn.Module):
    """The loss that config names, of images (B, C, S, S) in [0, 1] and the step's draws -> loss, its terms by name. A
    module, so that DistributedDataParallel and torch.compile see all of it. kept: as in judge_weights, or None."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config, self.kept = model, config, None
        if config.objective == "stae" and config.judge in ("ema", "random"):
            self.kept = {name: weight.detach().clone() for name, weight in model.encoder.named_parameters()}

    def forward(self, images, holes, views, slices):
        config = self.config
        holed = cut_holes(images, holes) if config.masked else None
        if config.objective == "mse":
            return mse_loss(self.model, images, holed)
        judge = judge_weights(self.model.encoder, config.judge, self.kept)
        rest = views, slices, judge, config.sigreg_weight, config.judge_layers
        return masked_loss(self.model, images, holed, *rest) if config.masked else stae_loss(self.model, images, *rest)


def start(model, config):
    """What training needs beside the model -> its Objective; what to call in its place, the same or wrapped to average
    gradients over processes; AdamW."""
    objective = called = Objective(model, config)
    if config.compile:
        called.compile(dynamic=False, mode="reduce-overhead" if config.device.startswith("cuda") else "default")
    if processes() > 1:
        called = nn.parallel.DistributedDataParallel(objective)
    return objective, called, torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)


def train_step(objective, called, optimizer, images, step):
    """One step on images (B, C, S, S) in [0, 1], drawn for by (seed, step), with what `start` returns -> what log.csv
    tells of it, scalars on the device: reading one waits for it."""
    config, device, model = objective.config, images.device, objective.model
    draws = draw_step(step, device, config)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        loss, terms = called(images, *draws)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # The fused AdamW does nothing when this is 1, as torch.amp has it: no bad step is taken, and nothing waits to know
    optimizer.grad_scale, optimizer.found_inf = None, 1 - (loss.detach() + norm).isfinite().float()
    optimizer.step()
    if config.judge == "ema" and objective.kept:
        for name, weight in model.encoder.named_parameters():
            objective.kept[name].lerp_(weight.detach(), 1 - 0.999)
    return {"loss": loss, **terms, "gradient_norm": norm}


@contextmanager
def on_signals(handler):
    """Have Ctrl-C, SIGTERM and a lost terminal call handler(number, frame) meanwhile, but for those that the user has
    told to be ignored (nohup). In the main thread, which alone gets signals."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cut_log(path, last):
    """Keep of a log.csv what is whole and not beyond the step `last`. Raises BadInput when it is something else."""
    try:
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) <= last]
    except FileNotFoundError:
        return print(f"{path} is gone; it starts anew after step {last}", file=sys.stderr)
    except ValueError:
        raise BadInput(f"{path} is not as the run wrote it; move it away to go on without it") from None
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)


def check_finite(rows, names, step):
    """Raise FloatingPointError when something is not finite in rows (k, terms), of the k steps that end with `step`."""
    bad = ~rows.isfinite()
    if bad.any():
        first = bad.any(dim=1).nonzero()[0].item()
        terms = ", ".join(f"{name} {rows[first, i].item()}" for i, name in enumerate(names) if bad[first, i])
        raise FloatingPointError(f"step {step - len(rows) + 1 + first}: not finite: {terms}; try a lower --lr")


def tell(row, steps, before, log):
    """Write a row to log.csv, show it as progress since the step `before`, and say so when the code collapses."""
    if log.tell() == 0:
        print(*row, sep=",", file=log)
    print(*row.values(), sep=",", file=log, flush=True)
    step, left = row["step"], row["seconds"] * (steps / row["step"] - 1)
    text = [f"step {step}/{steps}  {row['images_per_second']:,.0f} images/s  {left:.0f} s left"]
    text += [f"{name} {row[name]:.4f}" for name in list(row)[1 : list(row).index("gradient_norm")]]
    progress("  ".join(text), step, steps, before)
    if row["min_std"] < 0.1:
        print(f"step {step}: the code collapses, its weakest channel has a deviation of {row['min_std']:.2g}; try a "
              "higher --sigreg-weight or a lower --lr", file=sys.stderr)


def train(model, images, steps, config, log_path, state=None, save=None, minutes=5.0):
    """Train on (N, C, H, W) uint8, here or elsewhere. Each row of `log_path` is a mean over the steps since the row
    before. config: the resolved flags. save: is called with a state every so many minutes, at the end, and before
    KeyboardInterrupt(number) is raised for a signal. state: one of these, to go on from, with the model as it was.
    Raises FloatingPointError when something is not finite, and saves no more."""
    device, part = next(model.parameters()).device, own_part(config.batch_size)
    every = min(50, max(1, steps // 20))
    engine = start(model, config)
    objective, _, optimizer = engine
    done, logged, recent, past = 0, 0, [], 0.0  # steps; of them in the log; what train_step told since; seconds
    if state:
        done, logged, recent, past = state["step"], state["logged"], [*state["recent"].to(device)], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        if state["judge"]:
            objective.kept = {name: weight.to(device) for name, weight in state["judge"].items()}
        if rank() == 0:
            cut_log(log_path, logged)
    begun = saved = time.perf_counter()
    stops = []
    model.train()
    # A step is never cut in two: signals wait for its end
    with on_signals(lambda number, _: stops.append(number)), open(log_path, "a") as log:
        for step, x in batches(images, config.batch_size, config.seed, done, steps, device, part):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, config.lr)
            told = train_step(*engine, x, step)
            recent.append(torch.stack([*told.values()]).detach())
            done, stop = step + 1, bool(stops)
            seconds = past + time.perf_counter() - begun
            if done % every == 0 or done == steps:
                rows = average(torch.stack(recent))
                check_finite(rows, told, done)
                means = dict(zip(told, rows.mean(dim=0).tolist()))
                row = {"step": done, **means, "min_std": weakest(model.norm.last).item()}
                row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": seconds}
                row["images_per_second"] = done * config.batch_size / seconds
                tell(row, steps, logged, log)
                logged, recent = done, []
                stop = average(torch.tensor(float(stop), device=device)).item() > 0
            elif processes() > 1:
                stop = False  # all must stop at the same step: they ask one another at each row
            if save and (stop or done == steps or time.perf_counter() - saved > 60 * minutes):
                rows = torch.stack(recent) if recent else torch.empty(0)
                check_finite(rows, told, done)
                save({"step": done, "logged": logged, "recent": rows, "seconds": seconds, "judge": objective.kept,
                      "optimizer": optimizer.state_dict()})
                saved = time.perf_counter()
            if stop:
                raise KeyboardInterrupt(*stops[:1])


def make_classifier(channels, classes, side):
    """A small convolutional classifier: images (B, channels, side, side) in [0, 1], the side from 16, averaged to less
    than 128 -> scores (B, classes). Its initial weights are always the same."""

    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    half = nn.MaxPool2d(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.AvgPool2d(max(1, side // 64)), *block(channels, 32), half, *block(32, 64), half]
        layers += [*block(64, 128), *block(128, 128), half, *block(128, 128)]
        layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, classes)]
    return nn.Sequential(*layers)


def train_classifier(model, images, labels, precision, steps=2000):
    """Train a classifier on images (N, C, S, S) uint8 and labels (N,) from 0, to eval mode. Each step takes 250 images
    at random, mirrored every other time and shifted by up to a tenth of their side."""
    device, largest = next(model.parameters()).device, images.shape[2] // 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05, fused=True)
    begun = time.perf_counter()
    model.train()
    for step in range(steps):
        generator = generator_for("cpu", step)
        picked = torch.randint(len(images), (250,), generator=generator)
        shift = torch.randint(-largest, largest + 1, (2,), generator=generator).tolist()
        x = as_float(images[picked.to(images.device)].to(device)).roll(shift, dims=(2, 3))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            scores = model(x.flip(3) if step % 2 else x).float()
        loss = F.cross_entropy(scores, labels[picked].to(device), label_smoothing=0.1)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left = (time.perf_counter() - begun) * (steps / (step + 1) - 1)
        progress(f"classifier: step {step + 1}/{steps}  {left:.0f} s left", step + 1, steps, step)
    model.eval()


def make_model(config):
    """The Autoencoder that a resolved configuration names."""
    return Autoencoder(config.channels, config.width, config.latent_channels, config.latent_dim, config.size)


def save_whole(path, contents):
    """Write plain dicts and tensors, which load with weights_only=True; the file appears whole or not at all. Raises
    OSError when it cannot be written; what was there before is there still."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is either to torch.save
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error})") from None


def check_config(config):
    """Raise unless the configuration of a checkpoint is one that the command line could have given."""
    flags = []
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif name != "channels" and value not in (None, False):
            flags.append(flag if value is True else f"{flag}={value}")
    build_parser().parse_args(flags)
    if config.keys() != {*DEFAULTS, *PRESETS["shapes"]}:
        raise BadInput(f"settings {sorted(config)}")
    if config["channels"] not in (1, 3):
        raise BadInput(f"{config['channels']} channels")
    check_sizes(argparse.Namespace(**config | {"batch_size": 1}), 1)


def check_state(state, model):
    """Raise unless `state` is one that train can go on from with that model."""
    kinds = dict(step=int, logged=int, seconds=float, recent=torch.Tensor, optimizer=dict, data=str)
    wrong = [name for name, kind in kinds.items() if type(state.get(name)) is not kind]
    if wrong or not 0 <= state["logged"] <= state["step"] or state["seconds"] <= 0:
        raise BadInput(f"its state: {', '.join(wrong) or 'step, logged, seconds'}")
    weights, moved = dict(enumerate(model.parameters())), state["optimizer"]["state"]
    encoder = dict(model.encoder.named_parameters())
    judge = state["judge"] or encoder
    pairs = [(weights[i], moved[i][name]) for i in weights.keys() | moved.keys() for name in ("exp_avg", "exp_avg_sq")]
    pairs += [(encoder[name], judge[name]) for name in encoder.keys() | judge.keys()]
    if any(one.shape != other.shape for one, other in pairs):
        raise BadInput("its state: of another network")


def load_checkpoint(path):
    """Read a checkpoint, or a run folder's, from anybody -> Autoencoder on the CPU in eval mode, float32; its config, a
    dict; all that the file holds. Raises BadInput when it is not one, before anything of its size is made."""
    folder, path = Path(path), Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    if not path.exists():
        runs = sorted(str(run.parent) for run in folder.glob("*/checkpoint.pt"))
        saved = "; nothing was saved yet, start again with --overwrite" if (folder / "log.csv").exists() else ""
        raise BadInput(f"{path}: no such file" + (f"; a run is {runs[0]}" if runs else saved))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = DEFAULTS | checkpoint["config"]  # flags newer than the file
        check_config(config)
        with torch.device("meta"):
            model = make_model(argparse.Namespace(**config))
        model.load_state_dict(checkpoint["model"], assign=True)
        if not all(isinstance(checkpoint["results"][name], (int, float)) for name in {"seed", *checkpoint["results"]}):
            raise BadInput("its results")
        if "state" in checkpoint:
            check_state(checkpoint["state"], model)
    except Exception as error:  # torch.load raises many kinds for a damaged or foreign file, and advises what is unsafe
        why = error if isinstance(error, BadInput) else type(error).__name__
        raise BadInput(f"{path}: not a checkpoint of stae.py ({why})") from None
    return model.float().eval(), config, checkpoint


def load_model(path, device="cpu"):
    """The Autoencoder of a checkpoint or run folder, in eval mode: model.encode(images), model.decode(z)."""
    return load_checkpoint(path)[0].to(device)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Command line

PRESETS = {  # by set; a path takes the row of cifar10 up to 64 pixels, of celeba above
    "shapes": dict(transform="pixel", width=32, latent_channels=8, epochs=20, lr=1e-2),
    "cifar10": dict(transform="crop", width=64, latent_channels=8, epochs=15, lr=3e-3),
    "celeba": dict(transform="crop", width=128, latent_channels=32, epochs=50, lr=1e-3),
}
DEFAULTS = dict(  # of all sets; crop and judge_layers are from README, "The recipe"; None is filled in by the images
    dataset="shapes", size=None, channels=None, validation=0, objective="stae", judge="frozen", crop=[0.5, 1.0],
    views=1, judge_layers=1.0, mask_ratio=0.7, sigreg_weight=0.03, slices=64, masked=False, hole=0.35, latent_dim=None,
    batch_size=128, seed=0, device="auto", precision="auto", compile=False,
)
NOT_OF_THE_RUN = (  # what a checkpoint leaves out
    "data", "out", "overwrite", "no_probe", "recognition", "benchmark", "resume", "save_every",
)
ON_RESUME = {"dataset", "device", "precision", "compile", "epochs", "lr"}  # of a run's flags, what may change there
ON_EVAL = {"dataset", "device", "precision", "validation", "hole"}
READERS = {"eval", "pictures", "compare", "benchmark"}  # flags that do something else than train a run
RUN_FILES = ("checkpoint.pt", "metrics.json", "log.csv", "reconstructions.png", "transforms.png")


def number(cast, rule, holds):
    """An argparse type: what `cast` makes of the text when `holds` says yes; `rule` tells the user what is allowed."""

    def parse(text):
        try:
            if holds(value := cast(text)):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")

    return parse


def build_parser():
    """The flags, by topic. A flag that is not given is None here: its value comes from PRESETS or DEFAULTS."""

    def error(message):  # one line instead of the usage of thirty flags
        raise BadInput(message + ("; see --help" if "unrecognized" in message else ""))

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = error
    text = number(str, "a name or a path", lambda text: bool(text.strip()))
    side = number(int, "an integer divisible by 8, from 16 to 4096", lambda n: n % 8 == 0 and 16 <= n <= 4096)
    width = number(int, "an integer from 1 to 4096", lambda n: 1 <= n <= 4096)
    batch = number(int, "an integer from 2 to 1,000,000", lambda n: 2 <= n <= 10**6)
    count = number(int, "an integer from 1 to 1,000,000", lambda n: 1 <= n <= 10**6)
    natural = number(int, "an integer from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
    share = number(float, "a number in (0, 1]", lambda v: 0 < v <= 1)
    part = number(float, "a number in (0, 1)", lambda v: 0 < v < 1)
    minutes = number(float, "a number above 0", lambda v: 0 < v < math.inf)
    weight = number(float, "a number from 0", lambda v: 0 <= v < math.inf)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=text, metavar="SET", help="shapes (default), cifar10, celeba, a folder of images, an .npz")
    add("--data", type=text, metavar="DIR", help="where cifar10 and celeba are found or downloaded to (default: data)")
    add("--size", type=side, help="side in pixels to resize to, after a square crop (default: as is, celeba 128)")
    add("--validation", type=natural, metavar="N", help="test on the last N training images instead")
    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=("stae", "mse"), help="mse, the baseline, ignores all but the next two (default: stae)")
    add("--masked", action="store_true", default=None, help="reconstruct from images with a square hole as well")
    add("--hole", type=part, metavar="RATIO", help="of the image's area that the hole takes (default: 0.35)")
    add("--transform", choices=TRANSFORMS, help="T, applied to both images (default: pixel for shapes, crop otherwise)")
    add("--judge", choices=JUDGES, help="encoder held for a step, trained, averaged, as initialised (default: frozen)")
    add("--crop", type=share, nargs=2, metavar=("MIN", "MAX"), help="share of the side, log-uniform (default: 0.5 1)")
    add("--views", type=count, metavar="K", help="transformations per image and step (default: 1)")
    add("--judge-layers", type=weight, metavar="W", help="weight of its inner activations (default: 1, --masked 10)")
    add("--mask-ratio", type=share, help="share of pixels, patches or channels blacked out (default: 0.7)")
    add("--sigreg-weight", type=weight, help="lambda; it belongs to a batch size (default: 0.03)")
    add("--slices", type=count, help="directions that SIGReg tests per step (default: 64)")
    defaults = "Paths have the defaults of cifar10 up to 64 pixels, of celeba above."
    add = parser.add_argument_group("model and training", defaults).add_argument
    add("--width", type=width, help="channels after the stem (default: shapes 32, cifar10 64, celeba 128)")
    add("--latent-channels", type=count, help="C of the code (C, side/8, side/8) (default: 8, celeba 32)")
    add("--latent-dim", type=count, metavar="N", help="a code of N numbers, not spatial (default: celeba --masked 128)")
    add("--epochs", type=count, help="passes over the images (default: shapes 20, cifar10 15, celeba 50)")
    add("--batch-size", type=batch, help="images per step (default: 128)")
    add("--lr", type=share, help="peak, of AdamW (default: shapes 0.01, cifar10 0.003, celeba 0.001)")
    add("--seed", type=natural, help="of the initial weights and all draws (default: 0)")
    group = parser.add_argument_group("machine and files")
    add = group.add_argument
    add("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16"), help="of training (default: auto, bf16 where built in)")
    add("--compile", action="store_true", default=None, help="compile the step: slow to start, then faster")
    add("--out", type=text, metavar="DIR", help="folder to write to (default: a new one under runs/)")
    add("--save-every", type=minutes, metavar="MINUTES", help="between checkpoints, fractions allowed (default: 5)")
    add("--overwrite", action="store_true", default=None, help="replace the run that --out holds")
    add("--no-probe", action="store_true", default=None, help="leave out what is measured of the code with labels")
    add("--recognition", action="store_true", default=None, help="let a classifier of originals name reconstructions")
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", type=Path, metavar="RUN", help="go on with the run in that folder, to its --epochs or to more")
    add("--eval", type=Path, metavar="CHECKPOINT", help="measure a checkpoint instead of training")
    add("--pictures", type=Path, metavar="CHECKPOINT", help="draw what its code is like")
    add("--compare", type=Path, nargs="+", metavar="RUN", help="draw what each run folder makes of the test images")
    add("--benchmark", action="store_true", default=None, help="time steps of stae and mse on random pixels instead")
    return parser


def local_rank():
    """The number of this process on its machine when torchrun started it, else None."""
    launched = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    return int(os.environ["LOCAL_RANK"]) if launched else None


def pick_device(name):
    """auto, cpu, cuda or cuda:N -> torch.device. Under torchrun each process of a machine has a GPU of its own."""
    cards, local = torch.cuda.device_count(), local_rank()
    names = ["cuda"] * (cards > 0) + [f"cuda:{i}" for i in range(cards) if local is None] + ["cpu"]
    if name not in ("auto", *names):
        raise BadInput(f"--device {name}: this machine has {', '.join(names)}; pass one of them or auto")
    name = names[0] if name == "auto" else name
    if local is None or name == "cpu":
        return torch.device(name)
    if local >= cards:
        raise BadInput(f"--nproc_per_node: this machine has {cards} GPUs; pass {cards}, or --device cpu")
    return torch.device(f"cuda:{local}")


@contextmanager
def all_processes(device):
    """Meet the other processes, when torchrun started several, and part from them at the end. Rank 0 alone prints."""
    stdout = sys.stdout
    if local_rank() is not None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = timedelta(hours=6)  # one process of a machine decodes its images, the others wait for that
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        with open(os.devnull, "w") as nowhere:
            sys.stdout = nowhere if rank() else stdout
            yield
    finally:
        sys.stdout = stdout
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def pick_precision(name, device):
    """auto -> bf16 where the machine has instructions for it, else fp32."""
    has = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    fast = has.get("avx512_bf16") or has.get("amx_bf16")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return ("bf16" if fast else "fp32") if name == "auto" else name


def check_flags(given):
    """Refuse what cannot work before any data is read or folder made."""
    if "latent_dim" in given and "latent_channels" in given:
        raise BadInput("--latent-dim and --latent-channels: pass one; before a global code there are --width channels")
    if "hole" in given and not given.keys() & {"masked", "eval", "compare"}:
        raise BadInput(f"--hole {given['hole']}: add --masked, or leave it out")
    unused = given.keys() & {"recognition", "no_probe"}
    if unused and given.keys() & {"pictures", "compare", "benchmark"}:
        raise BadInput(f"--{min(unused).replace('_', '-')} belongs to a run or to --eval; leave it out")
    low, high = given.get("crop", (0, 1))
    if low > high:
        raise BadInput(f"--crop {low} {high}: MIN is above MAX; swap them")
    if Path(given.get("data", ".")).exists() and not Path(given.get("data", ".")).is_dir():
        raise BadInput(f"--data {given['data']} is not a folder")
    if "resume" in given and given.keys() & {"out", "overwrite"}:
        raise BadInput(f"--resume {given['resume']}: goes on in that folder; leave --out and --overwrite out")
    if "save_every" in given and given.keys() & READERS:
        raise BadInput("--save-every belongs to a run; leave it out")
    trains = not given.keys() & READERS
    out = given.get("out", run_folder(given["resume"]) if "resume" in given else Path("runs"))
    base = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if (trains or "out" in given) and not (base.is_dir() and os.access(base, os.W_OK)):
        raise BadInput(f"--out {out}: {base} is not a folder that can be written; pass another")
    used = [name for name in RUN_FILES if "out" in given and (out / name).exists()]
    if used and trains and "overwrite" not in given:
        raise BadInput(f"--out {out} holds a run ({used[0]}); pass another folder, or --overwrite")
    device = pick_device(given.get("device", "auto"))
    if not trains and local_rank() is not None:
        raise BadInput(f"--{min(given.keys() & READERS)}: torchrun is for training; use python")
    if "compile" in given:
        try:
            torch.compile(torch.sin)(torch.ones(8, device=device))
        except Exception as error:  # no compiler, no Triton, a Python that is too new
            raise BadInput(f"--compile: torch.compile does not work here ({error}); leave it out") from None


def check_sizes(config, count):
    """Refuse a network or a batch that does not fit the `count` training images."""
    latent, most, most_dim = config.latent_channels, 64 * config.channels, config.channels * config.size**2
    check_side(config.size)
    if config.latent_dim and config.latent_dim > most_dim:
        raise BadInput(f"--latent-dim {config.latent_dim}: larger than the image; pass {most_dim} or less")
    if not config.latent_dim and (latent > most or 8 * config.width % latent):
        raise BadInput(f"--latent-channels {latent}: must divide 8 * --width = {8 * config.width}; above {most} the "
                       "code is larger than the image")
    if config.batch_size > count:
        raise BadInput(f"--batch-size {config.batch_size}: more than the training images; pass {count} or less")
    if config.batch_size % processes():
        raise BadInput(f"--batch-size {config.batch_size}: is shared by {processes()} processes; pass a multiple of it")


def free_path(folder, name, suffix="", overwrite=False):
    """folder/name+suffix, or with -2, -3, ... after the name when that is taken and not to be overwritten."""
    path, count = folder / f"{name}{suffix}", 2
    while path.exists() and not overwrite:
        path, count = folder / f"{name}-{count}{suffix}", count + 1
    return path


def load_splits(config, given, device):
    """(images, labels) of a run to train and to test on; of the channels that config names, when it does. Images are on
    the device when they take at most half of its free memory, else a batch at a time goes there."""
    dataset, out = config.dataset, given.get("out", None if given.keys() & {*READERS, "resume"} else Path("runs"))
    folder = Path(dataset).resolve()
    if out and dataset not in PRESETS and folder.is_dir() and out.resolve().is_relative_to(folder):
        raise BadInput(f"--out {out} is among the images of --dataset {dataset}, and pictures go there; pass another")
    splits = load_data(config.dataset, given.get("data", "data"), config.size, config.validation)
    channels = splits[0][0].shape[1]
    if config.channels not in (None, channels):
        raise BadInput(f"--dataset {config.dataset} has {channels} channels, the checkpoint {config.channels}")
    if "recognition" in given and splits[0][1] is None:
        raise BadInput(f"--recognition: {config.dataset} has no labels to train a classifier with; leave it out")
    size = sum(images.nbytes for images, _ in splits)
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2:
        return splits
    return [(images.to(device), labels) for images, labels in splits]


def fingerprint(images, labels=None):
    """8 letters made of a thousand of the images (N, C, H, W) uint8 and of all labels."""
    some = images[:: 1 + len(images) // 1000].cpu().contiguous().numpy()
    return hashlib.sha256(some.tobytes() + (b"" if labels is None else labels.numpy().tobytes())).hexdigest()[:8]


def kept_classifier(train, config, given, device):
    """The classifier that --recognition asks: trained once for a set of training images, and kept beside them under a
    name that is made of what they are."""
    images, labels = train
    beside = Path(given.get("data", "data"), config.dataset) if config.dataset in PRESETS else config.dataset
    path = Path(f"{os.path.abspath(beside)}.stae-classifier-{fingerprint(images, labels)}.pt")
    kind = images.shape[1], int(labels.max()) + 1, images.shape[2]
    try:
        model = make_classifier(*kind)
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.to(device).eval()
    except Exception:  # not there yet, or damaged, for which torch.load raises many kinds
        model = make_classifier(*kind).to(device, memory_format=torch.channels_last)
    train_classifier(model, images, labels, pick_precision(config.precision, device))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_whole(path, model.state_dict())
        print(f"the classifier is kept in {path}")
    except OSError as error:
        print(f"the classifier is not kept ({error})", file=sys.stderr)
    return model


def measure(model, splits, config, given, results, table, picture):
    """Evaluate as the flags ask; print and write the table, `results` added, and the picture."""
    device = next(model.parameters()).device
    classifier = kept_classifier(splits[0], config, given, device) if "recognition" in given else None
    hole = config.hole if config.masked or "hole" in given else None
    print(f"measuring on {len(splits[1][0]):,} test images", flush=True)
    report(evaluate(model, *splits, hole, "no_probe" not in given, classifier) | results, table)
    save_rows(picture, pictures([model], splits[1][0], hole))


def name_machine(config, device):
    """Put what auto means here into a configuration: of torchrun's devices, each process has its own, the type."""
    config.device = str(device) if local_rank() is None else device.type
    config.precision = pick_precision(config.precision, device)


def resolve(given, device, channels, size, count):
    """The configuration of a run: the flags given, else PRESETS and DEFAULTS, for `count` images to train on of so many
    channels and pixels a side. Raises BadInput when it does not fit them."""
    config = argparse.Namespace(**DEFAULTS | {k: v for k, v in given.items() if k not in NOT_OF_THE_RUN})
    name_machine(config, device)
    config.channels, config.size = channels, size
    row = config.dataset if config.dataset in PRESETS else "cifar10" if size <= 64 else "celeba"
    config = argparse.Namespace(**PRESETS[row] | vars(config))
    if config.dataset == "celeba" and config.masked and "latent_channels" not in given:
        config.latent_dim = config.latent_dim or 128
    if config.latent_dim:
        config.latent_channels = config.width
    if config.masked and "judge_layers" not in given:
        config.judge_layers = 10.0  # with 1 a grid lies over the reconstructions of faces
    check_sizes(config, count)
    return config


def train_command(given):
    """Train, or go on with, a run; measure and draw it."""
    stored = stored_run(given["resume"], given, ON_RESUME) if "resume" in given else None
    device = pick_device(stored[1].device if stored else given.get("device", "auto"))
    with all_processes(device):
        run = train_run(given, device, stored)
    if run:
        with resumable(run[-1], given):
            finish_run(given, *run)


@contextmanager
def resumable(folder, given):
    """Say how to go on with the run in that folder when it is ended early, with the flags that it does not keep."""
    try:
        yield
    except (FloatingPointError, KeyboardInterrupt, OSError):
        if (folder / "checkpoint.pt").exists():
            flags = [f"--data {given['data']}"] if "data" in given else []
            flags += ["--" + name.replace("_", "-") for name in ("no_probe", "recognition") if name in given]
            go_on = " ".join(["python stae.py --resume", str(folder), *flags])
            print(f"\n{folder}/checkpoint.pt is whole; go on with: {go_on}", file=sys.stderr)
        raise


def train_run(given, device, stored):
    """Train as the flags ask, from the start or from what stored_run gives -> what finish_run takes; None for all ranks
    but 0. Every so often, at the end and when interrupted the checkpoint is written."""
    if local_rank():
        try:
            torch.distributed.barrier()  # until the first process of the machine has downloaded and decoded
        except RuntimeError:
            raise BadInput("the first process of this machine has stopped; see what it says") from None
    splits = load_splits(stored[1] if stored else argparse.Namespace(**DEFAULTS | given), given, device)
    if local_rank() == 0:
        torch.distributed.barrier()
    images = splits[0][0]
    data, state = fingerprint(images), None
    if stored:
        model, config, checkpoint = stored
        state = checkpoint["state"]
        name_machine(config, device)
        check_sizes(config, len(images))
        if data != state["data"]:
            raise BadInput(f"{config.dataset}: its images ({data}) are not those that {given['resume']} was trained on "
                           f"({state['data']}); pass those, or start a new run")
    else:
        config = resolve(given, device, *images.shape[1:3], len(images))
        torch.manual_seed(config.seed)
        model = make_model(config)
    model.to(device, memory_format=torch.channels_last)
    steps = config.epochs * (len(images) // config.batch_size)
    if stored and state["step"] >= steps and (run_folder(given["resume"]) / "metrics.json").exists():
        raise BadInput(f"--resume {given['resume']}: all of its {config.epochs} epochs are done; raise --epochs, or "
                       "measure it with --eval")
    announce(config, given, splits, steps, state)
    if rank():
        return train(model, images, steps, config, Path(os.devnull), state)

    parts = [Path(config.dataset).absolute().stem, *["masked"] * config.masked, config.objective, config.transform]
    run = "-".join([*parts, config.judge, f"s{config.seed}"])
    folder = run_folder(given["resume"]) if stored else given.get("out") or free_path(Path("runs"), run)
    if not stored:
        try:
            folder.mkdir(parents=True, exist_ok="out" in given)
            for old in RUN_FILES:
                (folder / old).unlink(missing_ok=True)
        except OSError as error:
            raise BadInput(f"--out {folder}: {error.strerror}; pass another") from None

    def summary(state):
        speed = round(state["step"] * config.batch_size / state["seconds"], 1)
        return {"train_seconds": round(state["seconds"], 1), "images_per_second": speed, "seed": config.seed}

    def save(new):
        nonlocal state
        state = new | {"data": data}
        whole = {"config": vars(config), "model": model.state_dict(), "results": summary(state), "state": state}
        (folder / "metrics.json").unlink(missing_ok=True)  # that of fewer steps, which would say that all is measured
        save_whole(folder / "checkpoint.pt", whole)

    with resumable(folder, given):
        train(model, images, steps, config, folder / "log.csv", state, save, given.get("save_every", 5.0))
    return model, splits, config, summary(state), folder


def announce(config, given, splits, steps, state):
    """Print what is about to be trained, or gone on with from `state`."""
    print("  ".join(f"{name}={value}" for name, value in sorted(vars(config).items())))
    if config.transform == "crop":
        print("crop in pixels:", *(max(1, round(side * config.size)) for side in config.crop))
    print(f"{len(splits[0][0]):,} images to train on, {len(splits[1][0]):,} to test on")
    if state:
        print(f"going on after step {state['step']:,} of {steps:,}")
        if {"epochs", "lr"} & given.keys():
            print(f"the learning rate follows the schedule of {steps:,} steps to a peak of {config.lr} from here on")
    elif steps < 300:
        print(f"only {steps} steps: reconstructions will be poor; raise --epochs or lower --batch-size")


def finish_run(given, model, splits, config, results, folder):
    """Measure and draw a trained run."""
    measure(model, splits, config, given, results, folder / "metrics.json", folder / "reconstructions.png")
    test_images = splits[1][0]
    x, x_hat = pictures([model], test_images)
    views = draw_views(config.transform, x.shape, generator_for(x.device, 0), 1, config.crop, config.mask_ratio)
    seen = [apply_transform(name, draw, batch) for _, name, draw in views for batch in (x, x_hat)]
    save_rows(folder / "transforms.png", [x, *seen])


def run_folder(path):
    """The folder of a run that is named by itself or by its checkpoint."""
    return path if path.is_dir() else path.parent


def stored_run(path, given, free):
    """A checkpoint that a flag names -> model, config, all that the file holds. Of the flags of a run those in `free`
    may be given anew. Raises BadInput for another, with both values."""
    model, stored, checkpoint = load_checkpoint(path)
    for name in given.keys() & stored.keys() - free:
        if given[name] != stored[name]:
            flag = name.replace("_", "-")
            raise BadInput(f"--{flag} {given[name]}: {path} was trained with {stored[name]}; leave the flag out")
    if "resume" in given:
        state = checkpoint.get("state")
        if not state:
            raise BadInput(f"--resume {path}: the file holds a model alone, not the state of its training")
        if given.get("epochs", stored["epochs"]) < stored["epochs"]:
            raise BadInput(f"--epochs {given['epochs']}: {path} is a run of {stored['epochs']}; pass as many or more")
    elif given.get("validation", 0) > stored["validation"] and "dataset" not in given:
        raise BadInput(f"--validation {given['validation']}: {path} was trained on those images; leave the flag out")
    elif "dataset" in given:
        stored["validation"] = 0  # it was a slice of other data
    dataset = given.get("dataset", stored["dataset"])
    if dataset not in PRESETS and not Path(dataset).exists():
        if "dataset" in given:
            raise BadInput(f"--dataset {dataset}: no such file or folder")
        raise BadInput(f"{path} was trained on {dataset}, which is not there from here; pass it as --dataset")
    return model, argparse.Namespace(**stored | {k: v for k, v in given.items() if k not in NOT_OF_THE_RUN}), checkpoint


def checkpoint_command(given):
    """--eval: measure a checkpoint on its own data or on --dataset. --pictures: draw what its code is like. The files
    go to --out or beside the checkpoint."""
    path = given["eval"] if "eval" in given else given["pictures"]
    model, config, checkpoint = stored_run(path, given, ON_EVAL)
    device = pick_device(given.get("device", "auto"))
    splits = load_splits(config, given, device)
    images = [images for images, _ in splits]
    if "pictures" in given and min(map(len, images)) < 2:
        raise BadInput(f"--pictures: {config.dataset} has one image to train or to test on; it takes two of each")
    folder = given.get("out") or run_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    if "eval" in given:
        table = free_path(folder, f"eval-{Path(config.dataset).absolute().stem}", ".json", "overwrite" in given)
        picture = free_path(folder, table.stem, ".png", "overwrite" in given)
        return measure(model.to(device), splits, config, given, checkpoint["results"], table, picture)
    drawn = code_pictures(model.to(device), *images)
    for name, (legend, rows) in drawn.items():
        path = free_path(folder, name, ".png", "overwrite" in given)
        save_rows(path, rows)
        print(f"{path}: rows are {legend}")
    if "brush" not in drawn:
        print("brush.png: skipped, the code has no places to paint")


def benchmark_command(given, warmup=3, repeats=15):
    """Time the training step of stae and of mse in turn, on random pixels of a preset's size. The last line is JSON."""
    device, dataset = pick_device(given.get("device", "auto")), given.get("dataset", "shapes")
    if dataset not in PRESETS:
        raise BadInput(f"--benchmark --dataset {dataset}: it takes random pixels of {', '.join(PRESETS)}; pass one")
    channels, size = 1 if dataset == "shapes" else 3, given.get("size", 128 if dataset == "celeba" else 32)
    config = resolve(given, device, channels, size, 10**6)
    images = torch.randint(256, (4 * config.batch_size, channels, size, size), dtype=torch.uint8, device=device)
    block = 20 if device.type == "cuda" else 1  # steps between two looks at the clock, which make a GPU wait
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def steps(objective):
        """Yield the floating-point operations of a step, then milliseconds a step, each time of a block of steps."""
        own = argparse.Namespace(**vars(config) | {"objective": objective})
        model = make_model(own).to(device, memory_format=torch.channels_last)
        engine = start(model, own)
        feed = batches(images, own.batch_size, own.seed, 0, 10**9)
        with FlopCounterMode(display=False) as counter:
            train_step(*engine, next(feed)[1], 0)
        yield counter.get_total_flops()
        while True:
            wait()
            begun = time.perf_counter()
            for _ in range(block):
                step, x = next(feed)
                train_step(*engine, x, step)
            wait()
            yield 1000 * (time.perf_counter() - begun) / block

    runs = {objective: steps(objective) for objective in ("stae", "mse")}
    flops = {objective: next(run) for objective, run in runs.items()}
    times = [[next(run) for run in runs.values()] for _ in range(warmup + repeats)][warmup:]  # in turn: noise hits both
    median = dict(zip(runs, np.median(times, axis=0).tolist()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{dataset}: {size}x{size}x{channels}, width {config.width}, batch {config.batch_size}, {config.precision}, "
          f"{name}")
    for objective, spread in zip(runs, np.transpose(times)):
        speed, work = 1000 * config.batch_size / median[objective], flops[objective] / median[objective] / 1e9
        print(f"{objective:5}{median[objective]:9.2f} ms/step ({spread.min():.2f} to {spread.max():.2f})"
              f"{speed:10,.0f} images/s{work:9.3f} TFLOP/s")
    ratio, flop_ratio = median["stae"] / median["mse"], flops["stae"] / flops["mse"]
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        import resource  # Windows has none

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # of the whole process; in kB on Linux
    print(f"stae takes {ratio:.2f} times as long as mse, and {flop_ratio:.2f} times the operations; {memory:,.0f} MB")
    print(json.dumps({
        "device": name, "stae_ms": median["stae"], "mse_ms": median["mse"], "ratio": ratio, "flop_ratio": flop_ratio,
        "stae_images_per_second": 1000 * config.batch_size / median["stae"], "peak_memory_mb": memory,
    }))


def compare_command(given):
    """Draw 16 test images and, below, what each run makes of them: comparison.png, in --out or the current folder. When
    one of the runs is masked, all are shown holes (the first such run's, or --hole) as well."""
    models, configs, _ = zip(*(stored_run(path, given, ON_EVAL) for path in given["compare"]))
    names = [name if name in PRESETS else str(Path(name).resolve()) for name in (config.dataset for config in configs)]
    sets = {(name, config.size, config.channels, config.validation) for name, config in zip(names, configs)}
    if len(sets) > 1:
        raise BadInput(f"--compare: the runs differ in (dataset, size, channels, validation): {sorted(sets)}; "
                       "name one --dataset for all, or fewer runs")
    test_images = load_splits(configs[0], given, torch.device("cpu"))[1][0]
    hole = next((config.hole for config in configs if config.masked or "hole" in given), None)
    folder = given.get("out", Path("."))
    folder.mkdir(parents=True, exist_ok=True)
    path = free_path(folder, "comparison", ".png", "overwrite" in given)
    save_rows(path, pictures(models, test_images, hole))
    rows = ["originals", *["originals with holes"] * bool(hole)]
    for run in map(str, given["compare"]):
        rows += [f"{run} from holes", f"{run} from originals"] if hole else [run]
    print(f"written to {path}; rows from the top: {', '.join(rows)}")


def interrupt(number, _):
    """What a signal does outside of training: end what runs, with its clean-up."""
    raise KeyboardInterrupt(number)


def main(argv=None):
    """Run the command line -> exit code: 0, 1 failed while running, 2 bad input told in one line, 128 and the signal's
    number when one ended it."""
    try:
        given = {name: value for name, value in vars(build_parser().parse_args(argv)).items() if value is not None}
        if "out" in given:
            given["out"] = Path(given["out"])
        check_flags(given)
        commands = {"eval": checkpoint_command, "pictures": checkpoint_command, "compare": compare_command,
                    "benchmark": benchmark_command}
        with on_signals(interrupt):
            next((commands[name] for name in commands if name in given), train_command)(given)
        return 0
    except (BadInput, FloatingPointError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a bug of ours: its traceback is wanted
        code = 2 if isinstance(error, BadInput) else 1
        if code == 2 and local_rank():
            return code  # the first process of the machine says it
        print("\n" * (code == 1) + f"stae.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return code
    except KeyboardInterrupt as error:
        print("\nstae.py: interrupted", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
