"""Measure what the study needs beside `stae.py --eval`: a table of runs, of PCA and of controls.

python samples/controls.py RUN [RUN ...] [--dataset FILE.npz] [--recognition] [--out FILE.json]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stae  # noqa: E402

LIMITS = (0, 1, 3, 7)  # of bands of spatial frequency, inclusive, in cycles per image


def load_labels(dataset, root):
    """Return the labels, int64 (N,), of the images to train on and of those to test on, or None:
    only cifar10 and an .npz with y_train and y_test have any. Raises BadInput."""
    if dataset == "cifar10":
        splits = [datasets.CIFAR10(root, train).targets for train in (True, False)]
        return [torch.tensor(targets) for targets in splits]
    if dataset.lower().endswith(".npz"):
        with stae.reading(dataset), np.load(dataset) as file:
            if "y_train" in file and "y_test" in file:
                return [read_column(dataset, name, file[name]) for name in ("y_train", "y_test")]
    return None


def read_column(path, name, y):
    """Return the labels of an .npz, (N,) or (N, 1), as int64 (N,). Raises BadInput."""
    fine = np.issubdtype(y.dtype, np.integer) and y.size > 0 and y.min() >= 0
    stae.need(fine, f"{path}: {name}: must be integers, none below 0; begins with {y[:5]}")
    return torch.from_numpy(y.reshape(-1).astype(np.int64))


def gather(function, images, device):
    """Apply a function of floats (B, C, S, S) to images uint8 -> (N, D) on the CPU."""
    return torch.cat([function(x).flatten(1).cpu() for x in stae.batches_of(images, device)])


def total(parts):
    """Sum a list of (B, ...) over all images, in double precision."""
    return torch.cat(parts).cpu().double().sum(dim=0)


def variation(images, region):
    """Sum the absolute differences of neighbours in (B, C, H, W), both in region, as (B,)."""
    rows = images.diff(dim=2).abs() * region[:, :, 1:] * region[:, :, :-1]
    columns = images.diff(dim=3).abs() * region[:, :, :, 1:] * region[:, :, :, :-1]
    return rows.sum(dim=(1, 2, 3)) + columns.sum(dim=(1, 2, 3))


def band_powers(images):
    """Return the power of images (B, C, S, S) in each band of spatial frequency, (B, 5)."""
    frequency = torch.fft.fftfreq(images.shape[2], 1 / images.shape[2], device=images.device)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    band = torch.bucketize(radius, radius.new_tensor(LIMITS))
    power = torch.fft.fft2(images).abs().square().sum(dim=1)  # (B, S, S)
    bands = [power[:, band == number].sum(dim=1) for number in range(len(LIMITS) + 1)]
    return torch.stack(bands, dim=1)


def chroma(images):
    """Return what is colour in images (B, 3, H, W): Cb and Cr of BT.601, (B, 2, H, W)."""
    rows = [[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    return torch.einsum("pc,bchw->bphw", torch.tensor(rows, device=images.device), images)


def measure_pictures(model, images, device):
    """Measure reconstructions of images (N, C, S, S) uint8. psnr_chroma: PSNR of colour alone.
    sharpness: the sum of differences of neighbours, over that of the originals; below 1 is blur.
    kept_..., error_...: by bands of spatial frequency, up to so many cycles per image, the power of
    (reconstruction - mean image) and of (reconstruction - original), in % of that of (original -
    mean image). Their sum is 100 % where the decoder gives the conditional mean, the best guess
    from the code; less is missing information, more is invented detail."""
    mean = sum(x.sum(dim=0) for x in stae.batches_of(images, device)) / len(images)
    sharp, sharp_hat, colour_errors, power, kept, wrong = [], [], [], [], [], []
    for x in stae.batches_of(images, device):
        x_hat = model.decode(model.encode(x))
        everywhere = torch.ones_like(x)
        sharp.append(variation(x, everywhere))
        sharp_hat.append(variation(x_hat, everywhere))
        power.append(band_powers(x - mean))
        kept.append(band_powers(x_hat - mean))
        wrong.append(band_powers(x_hat - x))
        if x.shape[1] == 3:
            colour_errors.append(chroma(x_hat - x).square().mean(dim=(1, 2, 3)))
    results = {"sharpness": (total(sharp_hat) / total(sharp)).item()}
    if colour_errors:
        results["psnr_chroma"] = stae.decibels(colour_errors)
    whole = total(power).clamp(min=1e-9)
    kept_shares, error_shares = 100 * total(kept) / whole, 100 * total(wrong) / whole
    for place, band in enumerate([*LIMITS, "high"]):
        results[f"kept_{band}"] = kept_shares[place].item()
        results[f"error_{band}"] = error_shares[place].item()
    return results


def measure_filled(model, images, holes, device):
    """Measure images uint8 that are decoded from those with holes (N, 4). hole_sharpness: as
    sharpness, inside of the holes; visible_psnr: outside of them; masked_ssim: of the whole."""
    sharp, sharp_hat, errors, similarities, first = [], [], [], [], 0
    for x in stae.batches_of(images, device):
        boxes = holes[first : first + len(x)].to(device)
        first += len(x)
        x_hat = model.decode(model.encode(stae.cut_holes(x, boxes)))
        inside = stae.hole_mask(boxes, x)
        outside = 1 - inside
        sharp.append(variation(x, inside))
        sharp_hat.append(variation(x_hat, inside))
        error = ((x_hat - x) * outside).square().mean(dim=(1, 2, 3))
        errors.append(error / outside.mean(dim=(1, 2, 3)))
        similarities.append(stae.ssim(x, x_hat))
    return {
        "hole_sharpness": (total(sharp_hat) / total(sharp)).item(),
        "visible_psnr": stae.decibels(errors),
        "masked_ssim": total(similarities).item() / len(images),
    }


def measure_codes(model, train, test, labels, classifier, device):
    """Measure codes of images uint8, in % of the labels (of train, of test) told right. knn_code:
    by the 20 nearest codes of `train`, by cosine. probe_code, probe_features: by a linear probe of
    codes, of inner activations pooled to 4x4. recognition: by a classifier of originals that is
    shown reconstructions."""
    train_labels, test_labels = labels
    known, asked = gather(model.encode, train, device), gather(model.encode, test, device)
    if isinstance(model, stae.PCA):  # without its scale, distances of codes are those of pixels
        known, asked = known * model.scale.cpu(), asked * model.scale.cpu()
    nearest = (F.normalize(asked) @ F.normalize(known).T).topk(min(20, len(known))).indices
    guesses = {"knn_code": train_labels[nearest].mode(dim=1).values}
    guesses["probe_code"] = linear_probe(known, train_labels, asked)
    if isinstance(model, stae.Autoencoder):

        def inner(x):
            return F.adaptive_avg_pool2d(model.encoder(x)[-1], 4)

        known, asked = gather(inner, train, device), gather(inner, test, device)
        guesses["probe_features"] = linear_probe(known, train_labels, asked)
    if classifier:
        scores = gather(lambda x: classifier(model.decode(model.encode(x))), test, device)
        guesses["recognition"] = scores.argmax(dim=1)
    return {name: percent(guess, test_labels) for name, guess in guesses.items()}


def percent(guess, labels):
    """Return how many of the labels (N,) are told right, in %."""
    return 100 * (guess == labels).double().mean().item()


def linear_probe(x, labels, test, strength=0.01):
    """Label test (M, D) by ridge regression of one-hot labels on standardised x (N, D) -> (M,)."""
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6
    x, test = ((x - mean) / scale).double(), ((test - mean) / scale).double()
    y = F.one_hot(labels).double()
    gram = x.T @ x / len(x) + strength * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)) / len(x))
    return (test @ weights + y.mean(dim=0)).argmax(dim=1)


def train_classifier(images, labels, device, steps):
    """Train a small classifier on images uint8 -> a model of images in [0, 1], scores (B, K)."""
    torch.manual_seed(0)
    layers, largest = [nn.AvgPool2d(max(1, images.shape[2] // 64))], images.shape[2] // 10
    channels = [images.shape[1], 32, 64, 128, 128, 128]
    for i, o, pool in zip(channels, channels[1:], (2, 2, 1, 2, 1)):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        layers.append(nn.MaxPool2d(pool))
    layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, int(labels.max()) + 1)]
    model = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    for step in range(steps):
        generator = stae.seeded("cpu", step)
        picked = torch.randint(len(images), (250,), generator=generator)
        shift = torch.randint(-largest, largest + 1, (2,), generator=generator).tolist()
        x = images[picked].to(device).roll(shift, dims=(2, 3)).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=stae.bf16_is_fast(device)):
            scores = model(x.flip(3) if step % 2 else x).float()
        loss = F.cross_entropy(scores, labels[picked].to(device), label_smoothing=0.1)
        optimizer.param_groups[0]["lr"] = stae.learning_rate(step, steps, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def measure_all(flags):
    """Measure runs, PCA of each size of their codes up to 2,048 numbers, a new network like that of
    the last run, and the originals -> {column: {row: number}}. Raises BadInput."""
    device = stae.open_device(flags.device)
    runs, dataset, train, test = stae.load_runs(flags.runs, flags.dataset, flags.data)
    labels = load_labels(dataset, flags.data or "data")
    columns, sizes = {}, set()
    for run, (model, settings, _) in runs.items():
        columns[run] = model.to(device), settings
        side = settings.size // 8
        sizes.add(settings.latent_dim or settings.latent_channels * side**2)
    for n in sorted(n for n in sizes if n <= 2048):
        columns[f"PCA {n}"] = stae.PCA(train, n, device), settings
    picked = torch.randperm(len(train), generator=stae.seeded("cpu", 0))[:10_000]
    classifier, tables = None, {}
    if labels is None:
        print(f"{dataset}: no labels, so no recognition, probes and nearest neighbours")
    else:
        fine = [len(part) for part in labels] == [len(train), len(test)]
        stae.need(fine, f"{dataset}: y_train, y_test are not as many as x_train, x_test")
        some = train[picked], test, (labels[0][picked], labels[1])
        torch.manual_seed(0)
        untrained = stae.new_model(settings, train.shape[1]).to(device).eval()
        if flags.recognition:
            classifier = train_classifier(train, labels[0], device, flags.steps)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, (model, s) in columns.items():
            tables[name] = measure_pictures(model, test, device)
            if s.masked:
                holes = stae.draw_holes(test.shape, stae.seeded("cpu", 0), s.hole)
                tables[name] |= measure_filled(model, test, holes, device)
            if labels:
                tables[name] |= measure_codes(model, *some, classifier, device)
        if labels:
            tables["untrained"] = measure_codes(untrained, *some, None, device)
        if classifier:
            right = gather(classifier, test, device).argmax(dim=1)
            tables["originals"] = {"recognition": percent(right, labels[1])}
    return tables


def main(argv=None):
    """Run the command line -> exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: stae.need(False, message)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or checkpoints")
    parser.add_argument("--recognition", action="store_true", help="train a classifier too")
    parser.add_argument("--steps", type=int, default=2000, help="of the classifier (2000)")
    parser.add_argument("--data", help="where cifar10 and celeba are (data)")
    parser.add_argument("--dataset", help="other data than those of the runs")
    parser.add_argument("--device", help="cpu, cuda, ... (cuda if there is one)")
    parser.add_argument("--out", metavar="FILE", help="where to write the table as json")
    try:
        flags = parser.parse_args(argv)
        taken = flags.out and Path(flags.out).exists()
        stae.need(not taken, f"--out {flags.out}: is there already; pass another file")
        tables = measure_all(flags)
        stae.print_table(tables)
        if flags.out:
            Path(flags.out).write_text(json.dumps(tables, indent=1))
        return 0
    except (stae.BadInput, OSError) as error:
        print("controls.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
