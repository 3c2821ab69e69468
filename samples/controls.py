"""Measure what the study needs beside `stae.py --eval`: a table of runs, of PCA and of controls.

python samples/controls.py RUN [RUN ...] [--dataset FILE.npz] [--recognition] [--out FILE.json]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stae  # noqa: E402

LIMITS = (0, 1, 3, 7)  # of bands of spatial frequency, inclusive, in cycles per image


def gather(function, images, device):
    """Apply a function of floats (B, C, S, S) to images uint8 -> (N, D) on the CPU."""
    return torch.cat([function(x).flatten(1).cpu() for x in stae.batches_of(images, device)])


def variation(images, region):
    """Sum the absolute differences of neighbours in (B, C, H, W), both in region, as (B,)."""
    rows = images.diff(dim=2).abs() * region[:, :, 1:] * region[:, :, :-1]
    columns = images.diff(dim=3).abs() * region[:, :, :, 1:] * region[:, :, :, :-1]
    return rows.sum(dim=(1, 2, 3)) + columns.sum(dim=(1, 2, 3))


def band_powers(images):
    """Return the power of images (B, C, S, S) in each band of frequency, a list of 5 x (B,)."""
    frequency = torch.fft.fftfreq(images.shape[2], 1 / images.shape[2], device=images.device)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    band = torch.bucketize(radius, radius.new_tensor(LIMITS))
    power = torch.fft.fft2(images).abs().square().sum(dim=1)  # (B, S, S)
    return [power[:, band == number].sum(dim=1) for number in range(len(LIMITS) + 1)]


def measure_pictures(model, images, holes, masked, device):
    """Measure reconstructions of images (N, C, S, S) uint8. psnr_luma: PSNR of Y of BT.601.
    sharpness: the sum of differences of neighbours, over that of the originals; below 1 is blur.
    kept_..., error_...: by bands of spatial frequency, up to so many cycles per image, the power of
    (reconstruction - mean image) and of (reconstruction - original), in % of that of (original -
    mean image). Their sum is 100 % where the decoder gives the conditional mean, the best guess
    from the code; less is missing information, more is invented detail. If masked, of images with
    holes (N, 4), hole_sharpness: inside of these; visible_psnr: outside; masked_ssim: of it all."""
    mean = sum(x.sum(dim=0) for x in stae.batches_of(images, device)) / len(images)
    luma = torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)
    rows, first = [], 0
    for x in stae.batches_of(images, device):
        boxes = holes[first : first + len(x)].to(device)
        first += len(x)
        x_hat = model.decode(model.encode(x))
        filled = model.decode(model.encode(stae.cut_holes(x, boxes)))
        inside, outside = stae.hole_mask(boxes, x), 1 - stae.hole_mask(boxes, x)
        row = [variation(x_hat, inside + outside), variation(x, inside + outside)]
        row += [variation(filled, inside), variation(x, inside), stae.ssim(x, filled)]
        for plane in (((x_hat - x) * luma).sum(dim=1), (filled - x) * outside, outside):
            row.append(plane.square().flatten(1).mean(dim=1))
        row += band_powers(x - mean) + band_powers(x_hat - mean) + band_powers(x_hat - x)
        rows.append(torch.stack(row, dim=1).cpu())
    means = torch.cat(rows).double().mean(dim=0)
    sharp, sharp_x, sharp_hole, sharp_hole_x, similarity, grey, error, area = means[:8].split(1)
    results = {"psnr_luma": stae.decibels([grey]), "sharpness": (sharp / sharp_x).item()}
    power, kept, wrong = means[8:].clamp(min=1e-9).view(3, -1)
    for place, band in enumerate([*LIMITS, "high"]):
        results[f"kept_{band}"] = (100 * kept[place] / power[place]).item()
        results[f"error_{band}"] = (100 * wrong[place] / power[place]).item()
    if masked:
        results |= {"hole_sharpness": (sharp_hole / sharp_hole_x).item()}
        results |= {"visible_psnr": stae.decibels([error / area]), "masked_ssim": similarity.item()}
    return results


def measure_codes(model, train, test, classifier, device):
    """Measure codes. rankme, arXiv 2210.02885: how many dimensions 2,000 of them fill. In % of the
    labels told right, knn_code: by the 20 nearest codes of `train`, by cosine; probe_code,
    probe_features: by a linear probe of codes, of inner activations pooled to 4x4; recognition: by
    a classifier of originals that is shown reconstructions."""
    known, asked = (gather(model.encode, split.images, device) for split in (train, test))
    if isinstance(model, stae.PCA):  # without its scale, distances of codes are those of pixels
        known, asked = known * model.scale.cpu(), asked * model.scale.cpu()
    spread = torch.linalg.svdvals(asked[:2000])
    results = {"rankme": torch.special.entr(spread / spread.sum()).sum().exp().item()}
    if test.labels is None:
        return results
    nearest = (F.normalize(asked) @ F.normalize(known).T).topk(min(20, len(known))).indices
    guesses = {"knn_code": train.labels[nearest].mode(dim=1).values}
    guesses["probe_code"] = linear_probe(known, train.labels, asked)
    if isinstance(model, stae.Autoencoder):
        pool, parts = nn.AdaptiveAvgPool2d(4), (train.images, test.images)
        known, asked = (gather(lambda x: pool(model.encoder(x)[-1]), y, device) for y in parts)
        guesses["probe_features"] = linear_probe(known, train.labels, asked)
    if classifier:
        scores = gather(lambda x: classifier(model.decode(model.encode(x))), test.images, device)
        guesses["recognition"] = scores.argmax(dim=1)
    for name, guess in guesses.items():
        results[name] = 100 * (guess == test.labels).double().mean().item()
    return results


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
    loaded = [stae.load_checkpoint(run) for run in flags.runs]
    columns = {run: (model.to(device), s) for run, (model, s, _) in zip(flags.runs, loaded)}
    sizes = {s.latent_dim or s.latent_channels * (s.size // 8) ** 2 for _, s, _ in loaded}
    kinds = {(flags.dataset or s.dataset, s.size, c["channels"]) for _, s, c in loaded}
    stae.need(len(kinds) == 1, f"{sorted(kinds)} are different data; pass --dataset, or fewer runs")
    dataset, size, channels = kinds.pop()
    train, test = stae.load_data(dataset, flags.data, size)
    stae.need(train.images.shape[1] == channels, f"--dataset {dataset}: not of {channels} channels")
    picked = torch.randperm(len(train.images), generator=stae.seeded("cpu", 0))[:10_000]
    some = stae.Split(*(part[picked] for part in train if part is not None))
    settings = loaded[-1][1]
    for size in sorted(size for size in sizes if size <= 2048):
        columns[f"PCA {size}"] = stae.PCA(train.images, size, device), settings
    classifier, tables = None, {}
    if train.labels is None:
        print(f"{dataset}: no labels, so no recognition, probes and nearest neighbours")
    elif flags.recognition:
        classifier = train_classifier(*train, device, flags.steps)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, (model, s) in columns.items():
            holes = stae.draw_holes(test.images.shape, stae.seeded("cpu", 0), s.hole)
            tables[name] = measure_pictures(model, test.images, holes, s.masked, device)
            tables[name] |= measure_codes(model, some, test, classifier, device)
        torch.manual_seed(0)
        untrained = stae.new_model(settings, channels).to(device).eval()
        tables["untrained"] = measure_codes(untrained, some, test, None, device)
        if classifier:
            right = gather(classifier, test.images, device).argmax(dim=1) == test.labels
            tables["originals"] = {"recognition": 100 * right.double().mean().item()}
    return tables


def main(argv=None):
    """Run the command line -> exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: stae.need(False, message)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or checkpoints")
    parser.add_argument("--recognition", action="store_true", help="train a classifier too")
    parser.add_argument("--steps", type=int, default=2000, help="of the classifier (2000)")
    parser.add_argument("--data", default="data", help="where cifar10 and celeba are")
    for name in ("--dataset", "--device", "--out"):
        parser.add_argument(name)
    try:
        flags = parser.parse_args(argv)
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
