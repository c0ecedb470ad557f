"""What no paper owns: noise schedules, data sets, a U-Net, training runs, pictures."""

import argparse
import contextlib
import copy
import ctypes
import gzip
import hashlib
import http.client
import io
import math
import os
import sys
import tarfile
import time
import urllib.request
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class UserError(Exception):
    """A mistake that the user can mend: one sentence, what is wrong and the cure."""


def cli(main):
    """Run main(); a mistake is one sentence and exit status 2, Ctrl-C one and 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may not be printable
    try:
        return main()
    except BrokenPipeError:  # as in: python ncsn.py | head
        os._exit(0)
    except KeyboardInterrupt as e:
        code, why = 130, str(e) or "stopped; a run goes on with --resume"
    except torch.OutOfMemoryError:
        code, why = 2, "out of memory: lower --batch-size or --width"
    except (UserError, OSError) as e:
        code, why = 2, e
    sentence = " ".join(str(why).split())
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)  # the other processes wait for this one: no orderly farewell
    sys.exit(code)


def rank():
    """Which process of torchrun this is; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def say(text):
    """Print a line at once, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def aside(path):
    """Open a file beside PATH, and rename it to PATH in the end: never half a file."""
    part = Path(f"{path}.{rank()}.part")  # of a killed process: written over
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            yield f
        part.replace(path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror or e})") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_csv(path, header, rows):
    """Write rows of numbers under their names, all or nothing."""
    with aside(path) as f:
        np.savetxt(f, [*rows], "%.8g", ",", header=",".join(header), comments="")


# ---------------------------------------------------------------------- noise schedules


def geometric_sigmas(sigma_max, sigma_min, L):
    """(L,) float64: sigma_1 > ... > sigma_L with one ratio (NCSN, section 4.1)."""
    ends = math.log10(sigma_max), math.log10(sigma_min)
    return torch.logspace(*ends, L, dtype=torch.float64)


def linear_betas(T, beta_1=1e-4, beta_T=0.02):
    """(T,) float64: beta_1 ... beta_T in equal steps (DDPM, section 4)."""
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def cosine_betas(T, s=0.008, beta_max=0.999):
    """(T,) float64: beta_t = 1 - f(t) / f(t - 1) (improved DDPM, eq. 17)."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = ((t + s) / (1 + s) * math.pi / 2).cos().square()
    return (1 - f[1:] / f[:-1]).clamp(max=beta_max)


def karras_sigmas(N, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """(N + 1,) float64: N levels from sigma_max to sigma_min, then 0 (EDM, eq. 5)."""
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return F.pad(torch.linspace(*ends, N, dtype=torch.float64) ** rho, (0, 1))


def per_sample(v, x):
    """v (B,) in the type of x (B, ...) and in a shape that multiplies it."""
    if v.shape != x.shape[:1]:
        raise ValueError(f"one value a sample: {tuple(v.shape)} for {len(x)} samples")
    return v.to(x).view(-1, *[1] * (x.dim() - 1))


def each(v, x):
    """(B,) of a number or of (B,), in the type and on the device of x (B, ...)."""
    return torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x))


def hide(label, p_null=0.1):
    """The labels (B,), each -1, "no class", with probability p_null; or None."""
    if label is None:
        return None
    return label.where(torch.rand(len(label), device=label.device) >= p_null, -1)


def check_labels(label, classes):
    """ValueError unless the labels (B,) are of the classes that a network knows."""
    if not classes:
        raise ValueError("labels for a network that was trained without --classes")
    if label.device.type == "cpu" and not -1 <= label.min() <= label.max() < classes:
        raise ValueError(f"labels go from 0 to {classes - 1}; -1 is no class")


def seed_all(*numbers):
    """Seed torch with whole numbers, mixed: of a seed a CPU uses 32 bits only."""
    mixed = np.random.SeedSequence([n + 1 for n in numbers])  # a 0 would be no number
    torch.manual_seed(int(mixed.generate_state(1)[0]))


# --------------------------------------------------- data sets: uint8 images and labels

MIRRORS = {  # the second address is tried where the first fails
    "mnist": [
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ],
    "fashion-mnist": [
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ],
    "cifar10": [
        "https://www.cs.toronto.edu/~kriz/",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
    ],
}
DRAWN = ["digits", "colour-digits"]  # by draw_digits()
SETS = [*DRAWN, *MIRRORS]
TORCHVISION = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
SHA256 = {  # of the files, decompressed
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the archive, as published
PICTURES = ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .jp2 .tga"


def is_folder(name):
    """Whether a data set is a folder of pictures, which has no test images."""
    return name not in SETS and not any(Path(name).glob("*images?idx3*"))


def load_images(name, split="train", data_dir="data", size=None):
    """uint8 images (N, C, H, W), int64 labels (N,) or None, of a set or a folder.

    Drawn or downloaded where missing; prints what was found. size: of the squares that
    pictures of a folder are cropped to. UserError names the file and the cure.
    """
    note = ""
    if name in DRAWN:
        images, labels = draw_digits(split, colour=name == "colour-digits")
    elif name == "cifar10":
        images, labels = read_cifar10(Path(data_dir, name), split)
    elif not is_folder(name):
        images = read_idx(name, split, "images", data_dir)[:, None]
        labels = read_idx(name, split, "labels", data_dir).long()
    elif split == "test":
        raise UserError(f"{name} is a folder of pictures: it has no test images")
    else:
        images, labels, note = read_folder(Path(name), size)
    N, C, H, W = images.shape
    if not images.numel() or labels is not None and len(labels) != N:
        raise UserError(f"{name} has {N} images of {H} x {W}, {len(labels)} labels")
    classes = "" if labels is None else f", {int(labels.max()) + 1} classes"
    kind = f"{C} x {H} x {W}, {'grey' if C == 1 else 'colour'}{classes}"
    say(f"data   {name}: {N} pictures, {kind}{note}")
    return images, labels


def draw_digits(split, colour=False, size=28):
    """Digits in Pillow's own font, in three stroke widths and random quadrilaterals.

    colour: in a random hue, of which the mean of the channels tells nothing.
    """
    n = 60_000 if split == "train" else 10_000
    font = ImageFont.load_default(96)
    glyphs = [Image.new("L", (112, 112)) for _ in range(30)]
    for k, glyph in enumerate(glyphs):
        draw = ImageDraw.Draw(glyph)
        draw.text((56, 56), str(k // 3), 255, font, anchor="mm", stroke_width=k % 3)
    rng = np.random.default_rng(split == "test")
    which = rng.integers(len(glyphs), size=n)
    corners = np.array([0, 0, 0, 112, 112, 112, 112, 0]) + rng.normal(0, 8, (n, 8))
    images = np.empty((n, 1, size, size), np.uint8)
    quad, bicubic = Image.Transform.QUAD, Image.Resampling.BICUBIC
    for image, k, corner in zip(images, which, corners.tolist()):
        image[0] = glyphs[k].transform((size, size), quad, corner, bicubic)
    if colour:
        turn = 2 * math.pi * (rng.random((n, 1)) + np.arange(3) / 3)
        share = np.float32(0.5 + 0.35 * np.cos(turn))[:, :, None, None]
        images = np.rint(images * share).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(which // 3)


def unzipped(raw):
    """The bytes, decompressed if they are a gzip; none if they are damaged."""
    if raw[:2] != b"\x1f\x8b":
        return raw
    with contextlib.suppress(OSError, EOFError, zlib.error):
        return gzip.decompress(raw)
    return b""


def download(path, name, right):
    """Fetch PATH from the first mirror of the set whose bytes are right(bytes)."""
    failures = []
    for url in [mirror + path.name for mirror in MIRRORS[name]]:
        say(f"fetch  {url}")
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                raw = response.read()
            if not right(raw):
                raise OSError("another file, by its checksum")
            with aside(path) as f:
                f.write(raw)
            return
        except (OSError, http.client.HTTPException) as e:
            failures.append(f"{url} ({e})")
    cure = f"put it into {path.parent} by hand, or say with --data-dir where {name} is"
    raise UserError(f"cannot download {path.name}: {cure}. Tried {', '.join(failures)}")


def read_idx(name, split, kind, data_dir):
    """The bytes of an IDX file, images (N, H, W) or labels (N,), of a set or folder."""
    ndim = 3 if kind == "images" else 1
    parts = ["train"] if split == "train" else ["t10k", "test"]
    stem = f"{parts[0]}-{kind}-idx{ndim}-ubyte"
    folders = [Path(name)]
    if name in MIRRORS:
        folders = [Path(data_dir, name), Path(data_dir, TORCHVISION[name])]
    ends = [f"{part}-{kind}?idx{ndim}?ubyte{z}" for part in parts for z in ("", ".gz")]
    paths = [p for f in folders for end in ends for p in f.glob(f"*{end}")]
    wanted = SHA256.get(f"{name}/{stem}")  # None: of your own

    def right(raw):
        return wanted in (None, hashlib.sha256(unzipped(raw)).hexdigest())

    if not paths and name in MIRRORS:
        paths = [folders[0] / f"{stem}.gz"]
        download(paths[0], name, right)
    if len({p.name.removesuffix(".gz") for p in paths}) != 1:
        raise UserError(f"{name} has {len(paths)} files like {stem}, not one")
    raw = paths[0].read_bytes()
    if not right(raw):
        cure = f"move it away, or say that it is yours: --dataset {paths[0].parent}"
        raise UserError(f"{paths[0]} is damaged, or not the {stem} of {name}: {cure}")
    raw = unzipped(raw)
    head = raw[: 4 + 4 * ndim].ljust(4 + 4 * ndim)
    shape = np.frombuffer(head[4:], ">u4").tolist()
    data = np.frombuffer(raw[len(head) :], np.uint8)
    if head[:4] != bytes([0, 0, 8, ndim]) or math.prod(shape) != len(data):
        raise UserError(f"{paths[0]} is damaged, or no IDX file of {ndim} dimensions")
    return torch.tensor(data.reshape(shape))


def read_cifar10(folder, split):
    """Images and labels in CIFAR-10's binary archive, which is never extracted."""
    path = folder / "cifar-10-binary.tar.gz"
    names = ["test_batch.bin"]
    if split == "train":
        names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    if not path.exists():
        md5 = CIFAR10_MD5
        download(path, "cifar10", lambda raw: hashlib.md5(raw).hexdigest() == md5)
    try:
        with tarfile.open(fileobj=io.BytesIO(unzipped(path.read_bytes()))) as tar:
            files = {Path(m.name).name: m for m in tar if m.isfile()}
            raw = b"".join(tar.extractfile(files[name]).read() for name in names)
        rows = torch.tensor(np.frombuffer(raw, np.uint8).reshape(-1, 3073))
    except (tarfile.TarError, LookupError, ValueError) as e:
        raise UserError(f"{path} is damaged or another file ({e}): move it away") from e
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def read_picture(path, size=None):
    """The pages of a picture, arrays (H, W, 3) uint8; what is transparent is white.

    size: cropped to a square. UserError names a picture that cannot be read.
    """
    pages = []
    try:
        with Image.open(path) as im:
            for page in ImageSequence.Iterator(im):
                W, H = page.size
                if not size and W * H > 512 * 512:
                    raise ValueError(f"{W} x {H} is large: give --size, say 32")
                if page.mode[0] in "FI":
                    raise ValueError("its values are larger than bytes: save 8 bits")
                page = ImageOps.exif_transpose(page).convert("RGBA")
                white = Image.new("RGBA", page.size, "white")
                page = Image.alpha_composite(white, page).convert("RGB")
                if size:
                    page = ImageOps.fit(page, (size, size), Image.Resampling.LANCZOS)
                pages.append(np.asarray(page))
    except Exception as e:  # a damaged picture raises any of half a dozen types
        raise UserError(f"cannot read {path} ({e})") from e
    return pages


def as_images(pages):
    """uint8 images (N, C, H, W) of arrays (H, W, 3); C = 1 if all look grey."""
    images = torch.from_numpy(np.stack(pages)).permute(0, 3, 1, 2)
    if (images == images[:, :1]).all():
        images = images[:, :1]
    return images.contiguous()


def files_below(folder):
    """Paths of the files below a folder, sorted, each once, also behind links.

    Hidden files, __MACOSX and folders of a run are passed over.
    """
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or is_run(parent):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [d for d in sorted(folders) if d[0] != "." and d != "__MACOSX"]
        yield from [Path(parent, f) for f in sorted(files) if f[0] != "."]


def read_folder(folder, size=None):
    """(images, labels, note) of a folder of pictures; sub-folders are the classes."""
    if not folder.is_dir():
        raise UserError(f"--dataset {folder} is neither a folder nor {', '.join(SETS)}")
    pages, classes, skipped = [], [], Counter()
    for path in files_below(folder):
        if path.suffix.lower() not in PICTURES.split():
            skipped[path.suffix or path.name] += 1
            continue
        new = read_picture(path, size)
        pages += new
        classes += [path.relative_to(folder).parts[:-1][:1]] * len(new)
        if any(page.shape != pages[0].shape for page in new):
            raise UserError(f"{path} is not of the size of the others: give --size 32")
    if not pages:
        raise UserError(f"{folder} holds no picture: {PICTURES}")
    labels, names = None, sorted(set(classes))
    if all(names):
        labels = torch.tensor([names.index(name) for name in classes])
    note = ", ".join(f"{n} {suffix}" for suffix, n in skipped.items())
    return as_images(pages), labels, note and f"; skipped {note}"


# -------------------------------------------------------------------------- the network


def zero(layer):
    """The layer with weights 0: a residual branch begins as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Norm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel, x (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual block; the embedding scales and shifts its second normalisation."""

    def __init__(self, c_in, c_out, c_emb, dropout):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = zero(nn.Linear(c_emb, 2 * c_out))
        self.norm2 = Norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Every pixel looks at every other."""

    def __init__(self, c):
        super().__init__()
        self.heads = c // math.gcd(c, 64)
        self.norm = Norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = h.transpose(3, 4).unbind(1)  # (B, heads, pixels, channels)
        weights = (q @ k.mT * (C // self.heads) ** -0.5).softmax(3)
        h = (weights @ v).mT.reshape(B, C, H, W)
        return x + self.out(h)


class UNet(nn.Module):
    """net(x, noise, label=None): x (B, C, H, W); noise (B,), log sigma or t; label (B,)

    Label -1, or None, is "no class". Returns 0 before training, float32 like x;
    with .dtype = torch.bfloat16 it multiplies in bfloat16. mult: widths of the levels
    over width; patch: pixels squared seen as one; out: channels returned, or 0: as x.
    """

    inside = ("down", "mid", "attention", "side", "up")  # its layers under Muon

    def __init__(
        self, channels, width=32, patch=1, classes=0, dropout=0, out=0, mult=(1, 2, 2)
    ):
        super().__init__()
        if width % 8:
            raise UserError(f"--width {width} is not a multiple of 8")
        self.dtype = torch.float32
        self.patch = patch
        mult = mult if patch == 1 else mult[:-1]  # 28 is 4 times an odd number
        c_emb = 4 * width
        # in radians: neighbouring levels of log sigma stay alike, t = 1 and 1000 differ
        frequencies = torch.logspace(math.log10(2), math.log10(0.002), width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb)
        )
        self.classes = classes
        self.label = nn.Embedding(classes + 1, c_emb) if classes else None

        widths = [width * m for m in mult]
        self.conv_in = nn.Conv2d(channels * patch**2, width, 3, padding=1)
        self.down = nn.ModuleList()
        for c, w in zip([width, *widths], widths):
            self.down.append(Block(c, w, c_emb, dropout))
        c = widths[-1]
        self.mid1 = Block(c, c, c_emb, dropout)
        self.attention = Attention(c)
        self.mid2 = Block(c, c, c_emb, dropout)
        self.side = nn.ModuleList()
        self.up = nn.ModuleList()
        for c_below, w in zip([c, *widths[::-1]], widths[::-1]):
            self.side.append(nn.Conv2d(c_below, w, 1))
            self.up.append(Block(w, w, c_emb, dropout))
        self.norm = Norm(width)
        out = (out or channels) * patch**2
        self.conv_out = zero(nn.Conv2d(width, out, 3, padding=1))

    def check(self, shape):
        """UserError unless images of this shape C, H, W can be halved."""
        factor = self.patch * 2 ** (len(self.down) - 1)
        if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
            words = f"images of {list(shape)} do not fit the U-Net"
            raise UserError(f"{words}: H and W must be multiples of {factor}")

    def forward(self, x, noise, label=None):
        self.check(x.shape[1:])
        angle = per_sample(noise, x).view(-1, 1) * self.frequencies  # (B, width / 2)
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], dim=1))
        if label is not None:
            check_labels(label, self.classes)
        if self.label is not None:
            if label is None:
                label = torch.full((len(x),), -1, device=x.device)
            emb = emb + self.label(label + 1)  # -1: the first row
        emb = F.silu(emb)

        h = F.pixel_unshuffle(x, self.patch)
        with torch.autocast(x.device.type, self.dtype, self.dtype != torch.float32):
            h = self.conv_in(h).contiguous(memory_format=torch.channels_last)
            skips = []
            for k, block in enumerate(self.down):
                h = block(F.avg_pool2d(h, 2) if k > 0 else h, emb)
                skips.append(h)
            h = self.mid2(self.attention(self.mid1(h, emb)), emb)
            for k, (side, block) in enumerate(zip(self.side, self.up)):
                h = side(h)
                h = F.interpolate(h, scale_factor=2.0) if k > 0 else h
                h = block(h + skips.pop(), emb)
            h = self.conv_out(F.silu(self.norm(h)))
        return F.pixel_shuffle(h.float(), self.patch)


def unet(args, out=None, kind=UNet):
    """The U-Net of a run's settings. Another network has its arguments, .check, .dtype,
    .inside, and forward(x, noise, label), whose label is -1 or None for "no class"."""
    C = args.shape[0]
    net = kind(C, args.width, args.patch, args.n_classes, args.dropout, out)
    net.check(args.shape)
    return net


# ---------------------------------------------------------------------------- the flags


class Parser(argparse.ArgumentParser):
    """argparse, to which a mistake is one sentence."""

    def error(self, message):
        raise UserError(message)


def number(kind, low, high=1e9):
    """An argparse type: an int or a float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low:g} ... {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def path(text):
    """An argparse type: a path, ~ being the home folder."""
    return str(Path(text).expanduser())


def device(text):
    """An argparse type: a device that can be used here."""
    try:
        torch.empty(0, dtype=torch.float64, device=text)  # mps has none
    except (RuntimeError, AssertionError, TypeError) as e:
        why = str(e).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({why})") from e
    return text


COUNT = number(int, 1)
SCALE = number(float, 1e-9)
SHARE = number(float, 0, 0.999999)
WEIGHT = number(float, 0)
SEED = number(int, 0, 2**63 - 1)
CHUNK = {"cpu": 20, "cuda": 500}  # images drawn at once, always so many


def arguments(doc):
    """The flags that all scripts share; a script adds its papers' own.

    p.settled: kept in a checkpoint for good; p.kept: kept, and changed by the flag; all
    others belong to one command.
    """
    form = argparse.RawDescriptionHelpFormatter
    p = Parser(description=doc, formatter_class=form, allow_abbrev=False)
    p.kept = p.add_argument_group("kept with the run, and changed by the flag")
    p.settled = p.add_argument_group("settled when a run starts")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    add = p.kept.add_argument
    sets = f"{', '.join(SETS)} or a FOLDER (%(default)s)"
    add("--dataset", type=path, default="digits", help=sets)
    add("--data-dir", type=path, default="data", help="where data sets are kept")
    add("--steps", type=COUNT, help="of training (6000; digits 2000)")
    add("--seed", type=SEED, default=0, help="of all that is random (%(default)s)")
    add = p.settled.add_argument
    add("--size", type=COUNT, help="crop a folder's pictures to SIZE pixels squared")
    add("--batch-size", type=COUNT, help="images a step (32; on CUDA 256)")
    add("--lr", type=SCALE, default=1e-3, help="Adam's largest (0.001); Muon's is 5x")
    add("--ema", type=SHARE, default=0.999, help="decay of averaged weights (0.999)")
    add("--width", type=COUNT, help="channels at full resolution (32; on CUDA 64)")
    add("--patch", type=COUNT, default=1, help="pixels squared seen as one (1)")
    add("--dropout", type=SHARE, default=0.0, help="in the U-Net's blocks (0)")
    add("--classes", action="store_true", help="train with labels, one in ten hidden")
    add = p.add_argument
    add("--out", type=path, help="folder of the run (runs/SCRIPT-DATASET)")
    add("--resume", action="store_true", help="go on from OUT/ckpt.pt, to the last bit")
    add("--sample-only", action="store_true", help="draw from OUT/ckpt.pt")
    add("--overwrite", action="store_true", help="start anew where a run is")
    add("--device", type=device, default=auto, help="cpu, cuda, ... (%(default)s)")
    words = "of matrix products (auto: bf16 if the hardware is faster)"
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help=words)
    add("--samples", type=COUNT, default=100, help="images to draw (%(default)s)")
    add("--npz", action="store_true", help="also OUT/samples.npz, for --judge and FID")
    add("--label", type=number(int, 0), help="draw this class only (all in turn)")
    add("--guidance", type=WEIGHT, default=0.0, help="w, of --classes or --guide (0)")
    words = "a worse RUN of this kind, to be led away from; sde.py: or a classifier"
    add("--guide", type=path, help=words)
    return p


def start(kind, argv=None):
    """(args, run): the flags, and with --resume or --sample-only the checkpoint in OUT.

    kind: {script: (flags, network)} of the run. What was kept is the default of a flag;
    UserError if one contradicts what is settled. Joins the processes of torchrun.
    """
    ((script, (flags, _)),) = kind.items()
    parser = flags()
    args, run = parser.parse_args(argv), None
    args.out = args.out or f"runs/{script}-{Path(args.dataset).resolve().name}"
    out = args.out
    if args.resume or args.sample_only:
        run = load_checkpoint(out, kind)
        parser.set_defaults(**vars(run.args) | {"out": out})
        args = parser.parse_args(argv)
        for action in parser.settled._group_actions:
            value, flag = getattr(run.args, action.dest), action.option_strings[0]
            if getattr(args, action.dest) != value:
                raise UserError(f"{flag} is {value} in {out}/ckpt.pt: drop the flag")
    elif is_run(out):
        if not args.overwrite:
            cures = "--resume goes on, --sample-only draws, --overwrite starts anew"
            raise UserError(f"{out} holds a run: {cures}, or name another --out")
    elif os.path.exists(out) and (os.path.isfile(out) or os.listdir(out)):
        raise UserError(f"{out} holds no run but files of yours: name another --out")
    args.script = script
    actions = parser.kept._group_actions + parser.settled._group_actions
    args.remembered = [action.dest for action in actions]
    cuda = "cuda" in args.device
    args.batch_size = args.batch_size or (256 if cuda else 32)
    args.width = args.width or (64 if cuda else 32)
    args.steps = args.steps or (2000 if args.dataset in DRAWN else 6000)
    join_processes(args)
    keep_memory()
    seed_all(args.seed)  # the network's first weights
    return args, run


def join_processes(args):
    """Under torchrun: one device a process, and a share of the batch for each."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args.world = world
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of {world}")
    if world > 1:
        cuda = "cuda" in args.device
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo")


def keep_memory():
    """Let glibc keep freed memory: to fetch it again is a fifth of a step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def training_data(args, run):
    """(images, labels) to train on; sets args.shape and args.n_classes.

    UserError unless they are of the kind that the run began with.
    """
    images, labels = load_images(args.dataset, "train", args.data_dir, args.size)
    if args.classes and labels is None:
        raise UserError(f"--classes: no sub-folders in {args.dataset} name the classes")
    labels = labels if args.classes else None
    kind = list(images.shape[1:]), 0 if labels is None else int(labels.max()) + 1
    if run and kind != (run.args.shape, run.args.n_classes):
        old = run.args.shape, run.args.n_classes  # of other data, or changed ones
        words = f"{kind[0]}, {kind[1]} classes, the run began with {old[0]}, {old[1]}"
        raise UserError(f"--dataset {args.dataset} is other data: {words}")
    args.shape, args.n_classes = kind
    labels_of(args, torch.zeros(1))  # is there a class --label?
    return images, labels


def test_images(args, or_training=False):
    """The test images of a run's data set, or of a folder, if allowed, the others."""
    split = "train" if or_training and is_folder(args.dataset) else "test"
    images, _ = load_images(args.dataset, split, args.data_dir, args.size)
    if list(images.shape[1:]) != args.shape or len(images) < 2:
        raise UserError(f"--dataset {args.dataset} is not of the run's {args.shape}")
    return images


def labels_of(args, index):
    """The labels of images number index: --label, or all classes in turn, or None."""
    if args.label is not None and args.label >= args.n_classes:
        words = f"the run knows {args.n_classes} classes; see --classes"
        raise UserError(f"--label {args.label}: {words}")
    if not args.n_classes:
        return None
    label = index % args.n_classes if args.label is None else 0 * index + args.label
    return label.to(args.device)


# -------------------------------------------------------------------------------- a run

MUON = 5.0  # Muon's learning rate, over Adam's
LOG = ["step", "loss", "grad_norm", "lr", "images_per_s", "minutes"]  # of log.csv


def is_run(folder):
    """Whether a run of this project lives in the folder: its log.csv says so."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(folder, "log.csv").read_text().startswith(",".join(LOG))
    return False


def claim(args):
    """Begin OUT/log.csv, by which all others know that the folder holds a run."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        (out / "ckpt.pt").unlink(missing_ok=True)
    try:
        with open(out / "log.csv", "w" if args.overwrite else "x") as f:
            f.write(",".join(LOG) + "\n")
    except FileExistsError as e:
        raise UserError(f"another process began {out}: name another --out") from e


def load_checkpoint(folder, kinds):
    """What train() wrote: .script .args .step .rows .saved .net (the averaged network).

    kinds: {script: (flags, network)} of those that will do. No pickle is run. UserError
    if it is missing, another's, damaged, or does not fit the network of its settings.
    """
    path = Path(folder, "ckpt.pt")
    if not path.exists():
        cures = "name a run's folder, or train (anew: --overwrite)"
        raise UserError(f"there is no {path}: {cures}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script = str(saved["script"])
    except Exception as e:  # a damaged file raises any of half a dozen types
        raise UserError(f"{path} is damaged or no checkpoint of this project") from e
    if script not in kinds:
        raise UserError(f"{path} was made by {script}, not by {' or '.join(kinds)}")
    flags, network = kinds[script]
    try:
        args = flags().parse_args([str(word) for word in saved["argv"]])
        args.shape = [int(v) for v in saved["shape"]]
        args.n_classes = saved["n_classes"]
        net = network(args).eval().requires_grad_(False)
        for name in ("net", "ema"):
            net.load_state_dict(saved[name])
            if not all(p.isfinite().all() for p in net.parameters()):
                raise ValueError("its weights are not finite")
        rows = [[float(v) for v in row] for row in saved["rows"]]
        step = int(rows[-1][0])
        if {len(row) for row in rows} != {len(LOG)}:
            raise ValueError("its log")
    except Exception as e:
        why = str(e)[:200]  # of another network: the first names
        raise UserError(f"{path} is damaged or of another version: {why}") from e
    fields = {"script": script, "args": args, "step": step, "rows": rows}
    return SimpleNamespace(**fields, saved=saved, net=net)


def has_bf16(device):
    """Whether the hardware is much faster in bfloat16."""
    if "cuda" in str(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(cpu.get("amx_bf16"))  # not for avx512_bf16 alone: see RESULTS.md


def prepare(net, args):
    """The network on the command's device, in its precision."""
    auto = args.precision == "auto" and has_bf16(args.device)
    bf16 = auto or args.precision == "bf16"
    net.dtype = torch.bfloat16 if bf16 else torch.float32
    return net.to(args.device)


def load_guide(args, kinds, same=()):
    """The run of --guide, or None. UserError if it is not like this one, or w clashes.

    same: settings that must agree, if it is of the same script.
    """
    if args.guidance and not (args.classes or args.guide):
        raise UserError("--guidance: train with --classes, or give a --guide")
    if not args.guide:
        return None
    if not (args.sample_only and args.guidance):
        raise UserError("--guide leads a trained run: add --sample-only --guidance 1")
    run = load_checkpoint(args.guide, kinds)
    same = ("n_classes", *same) if run.script == args.script else ()
    for name in ("shape", *same):
        ours, theirs = getattr(args, name), getattr(run.args, name)
        if ours != theirs:
            raise UserError(f"--guide {args.guide} has {name} {theirs}, not {ours}")
    prepare(run.net, args)
    return run


def full_precision(net):
    """For likelihoods and bounds: float32 everywhere, on CUDA without TF32."""
    net.dtype = torch.float32
    torch.backends.cudnn.allow_tf32 = False


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), in the scale of Liu et al. 2025, arXiv:2502.16982:
    momentum made orthogonal, for matrices; a convolution is one of C_out x k^2 C_in
    (torch.optim.Muon takes no convolutions)."""

    def __init__(self, weights, dtype=torch.float32, beta=0.95):
        super().__init__(weights, {"lr": 0.0, "beta": beta})
        self.dtype = dtype  # of the products that make a matrix orthogonal

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        shapes = {}  # matrices of one shape are made orthogonal together
        for p in group["params"]:
            shapes.setdefault(p.flatten(1).shape, []).append(p)
        for shape, ps in shapes.items():
            mixed = []
            for p in ps:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                mixed.append(p.grad.lerp(momentum, group["beta"]).flatten(1))
            update = orthogonal(torch.stack(mixed).to(self.dtype))
            scale = 0.2 * max(shape) ** 0.5  # root mean square 0.2, near Adam's
            for p, u in zip(ps, update):
                p.sub_(u.reshape(p.shape), alpha=scale * group["lr"])


def optimizers(net):
    """Adam, and Muon for the matrices of the layers net.inside (but not their emb)."""
    matrices, rest = [], []
    inside = getattr(net, "inside", ())
    for name, p in net.named_parameters():
        muon = p.dim() > 1 and name.startswith(inside) and "emb" not in name
        (matrices if muon else rest).append(p)
    adam = torch.optim.Adam(rest, fused=True)
    return [adam, Muon(matrices, net.dtype)] if matrices else [adam]


def orthogonal(X, steps=5):
    """Matrices (n, a, b) with singular values brought near 1, by Newton-Schulz."""
    if X.shape[1] > X.shape[2]:
        return orthogonal(X.mT, steps).mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X


def learning_rate(step, steps, largest):
    """Up to the largest in the first 5 % of the steps; from a fifth on, down to 0."""
    done = (step + 1) / steps
    return largest * min(1, 20 * done, 1.25 * (1 - done))


def train(args, net, loss, data, run=None, low=-1.0, preview=None, extra=()):
    """Adam and Muon on loss(net, x0, label); returns the averaged network, to draw by.

    data: images uint8 (N, C, H, W), labels (N,) or None; x0 (B, C, H, W) in [low, 1].
    run: a checkpoint to go on from, to the last bit: what step n draws depends on
    (seed, n, rank) alone.
    preview(ema, n) draws n images; extra: tensors that the loss keeps.
    UserError if the loss is not finite, before the checkpoint is overwritten.
    """
    world = args.world
    net = prepare(net, args)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opts = optimizers(net)
    first, rows = 0, []
    if run:
        first, rows = run.step, run.rows
        restore(run, net, ema, opts, extra)
    elif rank() == 0:
        claim(args)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    images, labels = [None if part is None else part.to(args.device) for part in data]
    size = f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M weights"
    shape = f"width {args.width}, {args.steps} steps of {args.batch_size} images"
    say(f"train  {size}, {net.dtype} on {world} x {args.device}, {shape}: {args.out}")

    recent, done, saved, began = [], first, first, time.perf_counter()
    try:
        for step in range(first, args.steps):
            seed_all(args.seed, step, rank())
            n = args.batch_size // world
            i = torch.randint(len(images), (n,), device=args.device)
            x0 = images[i].float() * ((1 - low) / 255) + low
            l = loss(model, x0, None if labels is None else labels[i])
            l.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            lr = learning_rate(step, args.steps, args.lr)
            for opt, factor in zip(opts, (1, MUON)):
                opt.param_groups[0]["lr"] = factor * lr
                opt.step()
            net.zero_grad()
            decay = min(args.ema, (1 + step) / (10 + step))  # short at first
            average = get_ema_multi_avg_fn(decay)  # decay ema + (1 - decay) net
            average([*ema.parameters()], [*net.parameters()], None)
            recent.append(torch.stack([l.detach(), norm]))
            done = step + 1
            if done % 100 and done < args.steps:
                continue

            mean = torch.stack(recent).mean(0)
            if world > 1:
                dist.all_reduce(mean)
            mean = (mean / world).tolist()  # the only wait for the device
            if not math.isfinite(sum(mean)):
                kept = f"{args.out}/ckpt.pt, if there is one, is of step {saved}"
                raise UserError(f"the loss is not finite: lower --lr; {kept}")
            minutes = (time.perf_counter() - began) / 60
            rate = len(recent) * args.batch_size / minutes / 60
            left = (args.steps - done) * args.batch_size / rate / 60
            speed = f"{rate:.0f} images/s   {left:.1f} min left"
            say(f"step   {done}/{args.steps}   loss {mean[0]:.4f}   {speed}")
            minutes += rows[-1][5] if rows else 0
            rows.append([done, *mean, lr, rate, minutes])
            if rank() == 0:
                save_csv(f"{args.out}/log.csv", LOG, rows)
                curve = {"mean of 100 steps": [row[:2] for row in rows]}
                logy = min(row[1] for row in rows) > 0  # sliced score matching's is not
                plot(f"{args.out}/loss.png", curve, "step", "loss", logy=logy)
                if done == 100 or done % 500 == 0 or done == args.steps:
                    save_checkpoint(args, rows, net, ema, opts, extra)
                    saved = done
                if preview and done < args.steps and (done == 100 or done % 1000 == 0):
                    seed_all(args.seed)
                    picture = grid(to_uint8(preview(ema, 16), low), cols=4)
                    save_picture(picture, f"{args.out}/samples_{done:06d}.png")
            recent, began = [], time.perf_counter()
    except KeyboardInterrupt:
        how = f"go on from step {saved} with --resume --out {args.out}"
        how = how if saved else "nothing was saved yet, start again with --overwrite"
        raise KeyboardInterrupt(f"stopped in step {done + 1}: {how}") from None
    return ema


def save_checkpoint(args, rows, net, ema, opts, extra):
    """Write OUT/ckpt.pt, all or nothing; .argv are its settings as a command line."""
    argv = []
    for name in args.remembered:
        flag, value = "--" + name.replace("_", "-"), getattr(args, name)
        if value is not None and value is not False:
            argv.append(flag if value is True else f"{flag}={value}")
    what = {"script": args.script, "argv": argv, "rows": rows}
    what |= {"shape": args.shape, "n_classes": args.n_classes, "extra": list(extra)}
    what |= {"net": net.state_dict(), "ema": ema.state_dict()}
    what["opts"] = [opt.state_dict() for opt in opts]
    buffer = io.BytesIO()
    torch.save(what, buffer)
    with aside(f"{args.out}/ckpt.pt") as f:
        f.write(buffer.getbuffer())


def restore(run, net, ema, opts, extra):
    """Put the state of a checkpoint back."""
    net.load_state_dict(run.saved["net"])
    ema.load_state_dict(run.saved["ema"])
    try:
        for opt, state in zip(opts, run.saved["opts"], strict=True):
            opt.load_state_dict(state)
            for p in opt.param_groups[0]["params"]:
                for v in opt.state[p].values():
                    v.expand_as(p)  # or an error
        for tensor, old in zip(extra, run.saved["extra"], strict=True):
            tensor.copy_(old)
    except Exception as e:
        raise UserError(f"ckpt.pt is damaged or of another version: {e}") from e


class Watch:
    """Watches what a sampler calls: watch(f) is f, its calls counted in .count, and 8
    of the x of about 30 calls kept in .frames."""

    def __init__(self, calls=30):
        self.every = max(1, calls // 30)
        self.count, self.frames = 0, []

    def __call__(self, f):
        def watched(x, *rest):
            if self.count % self.every == 0:
                self.frames.append(x[:8].detach().cpu())
            self.count += 1
            return f(x, *rest)

        return watched


def finish(args, draw, calls, name="", low=-1.0):
    """Draw args.samples images by draw(index, watch) -> x, images number index.

    calls: of the network an image, as foreseen; draw counts them by watch(network).
    Saves samplesNAME.png, processNAME.gif and .png, with --npz samplesNAME.npz in OUT;
    NAME ends in -wW where guidance of weight W is used. Chunks of one size have a seed
    each: image k does not depend on how many are drawn.
    """
    name += f"-w{args.guidance:g}" if args.guidance else ""
    parts, frames, began = [], None, time.perf_counter()
    chunk = CHUNK["cuda" if "cuda" in args.device else "cpu"]
    nets = 2 if args.guidance else 1
    say(f"draw   {args.samples} images, {nets * calls} evaluations of a network each")
    for first in range(0, args.samples, chunk):
        seed_all(args.seed, first)
        watch = Watch(calls)
        x = draw(torch.arange(first, first + chunk), watch)
        if not x.isfinite().all():
            raise UserError("the samples are not finite: smaller steps are needed")
        frames = frames or [*watch.frames, x[:8].cpu()]
        parts.append(to_uint8(x, low))
        done, seconds = first + chunk, time.perf_counter() - began
        if done < args.samples:
            left = seconds / done * (args.samples - done) / 60
            say(f"draw   {done}/{args.samples}   {left:.1f} min left")
    x = torch.cat(parts)[: args.samples]
    save_picture(grid(x[:100]), f"{args.out}/samples{name}.png")
    frames = [to_uint8(frame, low) for frame in frames]
    save_process(frames, f"{args.out}/process{name}")
    if args.npz:
        labels = labels_of(args, torch.arange(len(x)))
        labels = [] if labels is None else labels.tolist()
        rgb = x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        with aside(f"{args.out}/samples{name}.npz") as f:
            np.savez(f, arr_0=rgb, labels=labels)
    cost = f"{nets * watch.count} evaluations each, {seconds:.0f} s"
    if "cuda" in args.device:
        most = torch.cuda.max_memory_allocated(args.device)
        cost += f", at most {most / 2**30:.1f} GiB"
    say(f"saved  {args.out}/samples{name}.png ({len(x)} images, {cost})")


def slerp(a, b, f):
    """From a (f = 0) to b (f = 1), (C, H, W), on the great circle: DDIM, eq. (67)."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = cosine.clamp(-1, 1).acos()
    way = ((1 - f) * angle).sin() * a + (f * angle).sin() * b
    return way / angle.sin()  # eq. (67)


def interpolate(args, images, encode, decode):
    """OUT/interpolate.png: pairs of uint8 images, and nine points between their codes.

    encode: of images in [-1, 1], the noise from which decode draws them.
    """
    x0 = images[: min(12, len(images) // 2 * 2)].to(args.device) / 127.5 - 1
    codes = encode(x0)
    error = 127.5 * (decode(codes) - x0).square().mean().sqrt()
    say(f"coded  and back: {error:.3f} grey levels off (root mean square)")
    between = torch.linspace(0, 1, 9)
    way = [slerp(a, b, f) for a, b in zip(codes[::2], codes[1::2]) for f in between]
    way = decode(torch.stack(way)).unflatten(0, (-1, 9))
    rows = torch.cat([x0[::2, None], way, x0[1::2, None]], dim=1).flatten(0, 1)
    save_picture(grid(to_uint8(rows), cols=11), f"{args.out}/interpolate.png")
    say(f"saved  {args.out}/interpolate.png")


# ----------------------------------------------------------------------------- pictures


def to_uint8(x, low=-1.0):
    """Float images in [low, 1] as uint8, rounded and clamped, on the CPU."""
    return ((x.float() - low) * (255 / (1 - low))).round().clamp(0, 255).byte().cpu()


def grid(images, cols=10, pad=2, scale=2):
    """A Pillow picture of uint8 images (N, C, H, W), row by row."""
    N, C, H, W = images.shape
    rows = math.ceil(N / cols)
    sheet = torch.full((C, rows * (H + pad), cols * (W + pad)), 64, dtype=torch.uint8)
    for k, image in enumerate(images):
        y, x = k // cols * (H + pad), k % cols * (W + pad)
        sheet[:, y : y + H, x : x + W] = image
    picture = Image.fromarray(sheet.permute(1, 2, 0).squeeze(2).numpy())
    return ImageOps.scale(picture, scale, Image.Resampling.NEAREST)


def save_picture(picture, path, **options):
    """Write a Pillow picture, all or nothing, in the format of the path's suffix."""
    with aside(path) as f:
        picture.save(f, Path(path).suffix[1:], **options)


def save_process(frames, path):
    """Frames of uint8 images (n, C, H, W): a film PATH.gif, and PATH.png in a row."""
    first, *film = [grid(frame, cols=4, scale=3) for frame in frames]
    times = {"duration": [80] * len(film) + [2500], "loop": 0}
    save_picture(first, f"{path}.gif", save_all=True, append_images=film, **times)
    at = np.linspace(0, len(frames) - 1, min(11, len(frames))).round().astype(int)
    rows = torch.stack([frames[k][:6] for k in at], dim=1).flatten(0, 1)
    save_picture(grid(rows, cols=len(at)), f"{path}.png")


COLORS = ["#2563eb", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b5563"]


class Axis:
    """A range of numbers, on a log axis or not: at(v) goes from 0 to 1."""

    def __init__(self, values, log):
        self.scale = math.log10 if log else float
        known = [self.scale(v) for v in values if self.holds(v)] or [0.0, 1.0]
        room = 0.04 * (max(known) - min(known)) or 0.5 + abs(known[0]) / 2
        self.low, self.high = min(known) - room, max(known) + room
        power = 10.0 ** math.floor(math.log10(self.high - self.low))
        steps = [k * power for k in (0.2, 0.5, 1, 2)]
        step = next(k for k in steps if self.high - self.low <= 7 * k)
        step = max(1, round(step)) if log else step
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        marks = [k * step for k in range(first, last + 1)]
        self.marks = [10**v for v in marks] if log else marks

    def holds(self, v):
        return abs(v) < 1e30 and (v > 0 or self.scale is float)

    def at(self, v):
        return (self.scale(v) - self.low) / (self.high - self.low)


class Panel:
    """Axes as a Pillow picture for line() and dots(), the legend beside them.

    xs, ys: values that must be visible; right: room for the legend, in pixels.
    """

    def __init__(
        self, xs, ys, xlabel="", ylabel="", title="", right=170, logx=False, logy=False
    ):
        W, H = 1440, 900  # twice the size of sheet(), whose lines are smooth
        self.x, self.y = Axis(xs, logx), Axis(ys, logy)
        self.box = left, top, right, bottom = 150, 80, W - 2 * right, H - 110
        self.font = ImageFont.load_default(26)
        self.picture = Image.new("RGB", (W, H), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.labels = []
        for v in self.x.marks:
            x = left + self.x.at(v) * (right - left)
            self.draw.line([x, top, x, bottom], "#e5e7eb", 2)
            self.text((x, bottom + 12), f"{v:.4g}", "mt")
        for v in self.y.marks:
            y = bottom - self.y.at(v) * (bottom - top)
            self.draw.line([left, y, right, y], "#e5e7eb", 2)
            self.text((left - 12, y), f"{v:.4g}", "rm")
        self.draw.rectangle(self.box, outline="#374151", width=2)
        self.text((left, 40), ylabel, "lm")
        self.text((right, 40), title, "rm")
        self.text(((left + right) / 2, H - 30), xlabel, "mm")

    def text(self, at, text, anchor):
        self.draw.text(at, text, "#111827", self.font, anchor)

    def pixels(self, points):
        """The pixels of points (x, y, ...); what an axis cannot hold is left out."""
        left, top, right, bottom = self.box
        for x, y, *_ in points:
            if self.x.holds(x) and self.y.holds(y):
                u = left + self.x.at(x) * (right - left)
                yield u, bottom - self.y.at(y) * (bottom - top)

    def color(self, label):
        """The colour of a label, which the legend names; the first without."""
        if label and label not in self.labels:
            self.labels.append(label)
            x, y = self.box[2] + 30, self.box[1] + 40 * len(self.labels) - 20
            self.disc(x, y, 9, self.color(label))
            self.text((x + 24, y), label, "lm")
        return COLORS[self.labels.index(label) % len(COLORS) if label else 0]

    def disc(self, x, y, radius, color):
        self.draw.ellipse([x - radius, y - radius, x + radius, y + radius], color)

    def line(self, points, label=None):
        """A line through the points (x, y)."""
        pixels = list(self.pixels(points)) or [(0, 0)]
        self.draw.line(pixels, self.color(label), 5, "curve")

    def dots(self, points, label=None, radius=7):
        """Dots at the points (x, y), or (x, y, error) with bars."""
        color = self.color(label)
        for x, y in self.pixels(points):
            self.disc(x, y, radius, color)
        for x, y, *error in points:
            for e in error:
                bar = list(self.pixels([(x, y - e), (x, y), (x, y + e)]))
                self.draw.line(bar or [(0, 0)], color, 3)


def sheet(panels, cols=1):
    """Panels of one size in rows, as one picture, at half their size: smooth lines."""
    W, H = panels[0].picture.size
    rows = math.ceil(len(panels) / cols)
    picture = Image.new("RGB", (W * min(cols, len(panels)), H * rows), "white")
    for k, panel in enumerate(panels):
        picture.paste(panel.picture, (k % cols * W, k // cols * H))
    return ImageOps.scale(picture, 0.5, Image.Resampling.LANCZOS)


def plot(path, curves, xlabel, ylabel, **options):
    """Curves {label: [(x, y), ...]} as PNG."""
    points = [p for curve in curves.values() for p in curve]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    panel = Panel(xs, ys, xlabel, ylabel, **options)
    for label, curve in curves.items():
        panel.line(curve, label)
        if len(curve) <= 30:
            panel.dots(curve, label)
    save_picture(sheet([panel]), path)
