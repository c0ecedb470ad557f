"""Shared code: noise schedules, data sets, the U-Net, training runs, pictures."""

import argparse
import contextlib
import copy
import gzip
import io
import math
import os
import sys
import tarfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

# Read when torch is loaded: threads that spin while waiting slow other programs down.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

CUDA = torch.cuda.is_available()
CHUNK = 500 if CUDA else 20  # images sampled at once, always this many
ON_OFF = argparse.BooleanOptionalAction  # --flag or --no-flag
PATH = os.path.expanduser  # the type of a flag


class UserError(Exception):
    """An error the user can fix: one sentence, what is wrong and what to do."""


@contextlib.contextmanager
def blame(culprit):
    """Turn any exception in this block into one sentence that names the culprit."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:  # a damaged file raises any of a dozen types
        raise UserError(f"{culprit}: {str(e)[:200] or type(e).__name__}") from e


def cli(main):
    """Run main(). A user error prints one sentence and exits with 2, Ctrl-C 130."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout is no file
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return main(sys.argv[1:])
    except BrokenPipeError:  # as in: python ncsn.py | head
        os._exit(0)
    except KeyboardInterrupt:
        code, how = 130, f"; --resume goes on from step {Run.saved}"
        why = f"stopped{how if Run.saved else ''}"
    except (UserError, OSError) as e:
        code, why = 2, " ".join(str(e).split())
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "allocate" not in str(e):
            raise
        code, why = 2, "out of memory: lower --batch-size, --width or --size"
    if rank() == 0:
        print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)  # the other processes wait for this one
    sys.exit(code)


def rank():
    """Which process of torchrun this is; 0 without it."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def write(path, save):
    """save(file) next to PATH, then rename: PATH is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            save(f)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path, header, rows):
    """Write rows of numbers below their names."""
    write(path, lambda f: np.savetxt(f, rows, "%.8g", ",", header=header, comments=""))


# ---------------------------------------------------------------------- noise schedules


def geometric_sigmas(sigma_max, sigma_min, L):
    """(L,) float64: sigma_1 > ... > sigma_L with one ratio (NCSN, section 4.1)."""
    ends = math.log10(sigma_max), math.log10(sigma_min)
    return torch.logspace(*ends, L, dtype=torch.float64)


def karras_sigmas(N, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """(N + 1,) float64: N levels from sigma_max to sigma_min, then 0 (EDM, eq. 5)."""
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return F.pad(torch.linspace(*ends, N, dtype=torch.float64) ** rho, (0, 1))


def focus(sigma):
    """How often to train at each of the levels sigma (n,) of images in [-1, 1]: 4 times
    in 5 as ln sigma ~ N(0.5, 0.7^2), where it is decided what an image shows, else
    uniformly."""
    x = sigma.log()
    p = x.diff(append=x[-1:]).abs() * torch.exp(-(((x - 0.5) / 0.7) ** 2) / 2)
    return 0.8 * p / p.sum().clamp(min=1e-30) + 0.2 / len(p)


def each(v, x):
    """A number or (B,) as (B,), with the dtype and device of x (B, ...)."""
    return torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x))


def per_sample(v, x):
    """The same, shaped to multiply x."""
    return each(v, x).view(-1, *[1] * (x.dim() - 1))


def hide(label, p_null=0.1):
    """Labels (B,), each set to -1, "no class", with probability p_null; or None."""
    if label is None:
        return None
    return label.where(torch.rand(len(label), device=label.device) >= p_null, -1)


def seed_all(*numbers):
    """Seed torch from several integers hashed into one (CPUs use only 32 bits)."""
    mixed = np.random.SeedSequence([n + 1 for n in numbers])  # a 0 would be no number
    torch.manual_seed(int(mixed.generate_state(1)[0]))


# --------------------------------------------------- data sets: uint8 images and labels

DRAWN = ["digits", "colour-digits"]  # by draw_digits()
MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
}
SETS = ", ".join([*DRAWN, *MIRRORS])
PICTURES = ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .jp2 .tga"


def load_images(name, split="train", data_dir="data", size=None):
    """A data set or a folder: uint8 images (N, C, H, W), int64 labels (N,) or None, and
    the names of the classes.

    Rendered, or downloaded if missing; prints what was found. A folder has pictures
    (size: cropped to such squares), or MNIST's four files. UserError names the cure.
    """
    names, folder = [], Path(data_dir if name in MIRRORS else "", name)
    if name in DRAWN:
        images, labels = draw_digits(split, colour=name == "colour-digits")
    elif name == "cifar10":
        images, labels = read_cifar10(folder, split)
    elif name in MIRRORS or any(folder.glob("t*-idx3-ubyte*")):
        images = read_idx(folder, split, "images", MIRRORS.get(name))[:, None]
        labels = read_idx(folder, split, "labels", MIRRORS.get(name)).long()
    else:
        images, labels, names = read_folder(folder, split, size)
    N, _, H, W = images.shape
    if not images.numel() or labels is not None and len(labels) != N:
        raise UserError(f"{name} has {N} images of {H} x {W}, {len(labels)} labels")
    if size and (H, W) != (size, size):
        how = {"size": (size, size), "mode": "bilinear", "antialias": True}
        images = F.interpolate(images.float(), **how).round().byte()
    if labels is not None and not names:
        names = [str(k) for k in range(int(labels.max()) + 1)]
    kind = " x ".join(map(str, images.shape[1:]))
    print(f"data   {name}: {N} images to {split} on, {kind}, {len(names)} classes")
    return images, labels, names


def draw_digits(split, colour=False, size=28):
    """Digits in Pillow's own font, in three stroke widths and random quadrilaterals.

    colour: in a random hue that cannot be inferred from the mean of the channels.
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


def download(path, mirror):
    """Download the file of this name from a mirror to PATH."""
    print(f"fetch  {mirror}{path.name}")
    cure = f"put it into {path.parent} by hand, or give --data-dir"
    with blame(f"cannot download {path.name} ({cure})"):
        raw = urllib.request.urlopen(mirror + path.name, timeout=30).read()
    write(path, lambda f: f.write(raw))


def read_idx(folder, split, kind, mirror=None):
    """An IDX file named like MNIST's, as images (N, H, W) or labels (N,), uint8."""
    ndim = 3 if kind == "images" else 1
    path = folder / f"{'t10k' if split == 'test' else split}-{kind}-idx{ndim}-ubyte"
    path = path if path.is_file() else Path(f"{path}.gz")
    if mirror and not path.exists():
        download(path, mirror)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with blame(f"{path} is no IDX file of {ndim} dimensions, or damaged"):
        raw = path.read_bytes()
        if raw[:2] == bytes([31, 139]):
            raw = gzip.decompress(raw)
        if raw[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError("its first bytes")
        data = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
        return torch.tensor(data.reshape(np.frombuffer(raw, ">u4", ndim, 4)))


def read_cifar10(folder, split):
    """Images and labels from CIFAR-10's binary archive, which is not unpacked."""
    path = folder / "cifar-10-binary.tar.gz"
    if not path.exists():
        download(path, MIRRORS["cifar10"])
    part = "data_batch" if split == "train" else "test_batch"
    with blame(f"{path} is damaged"), tarfile.open(path, "r:gz") as tar:
        raw = [tar.extractfile(f).read() for f in tar if f.isfile() and part in f.name]
        rows = torch.tensor(np.frombuffer(b"".join(raw), np.uint8).reshape(-1, 3073))
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def read_picture(path, size=None):
    """Pages uint8 (3, H, W) of a picture, cropped to squares: of a photograph the
    first, of a TIFF or GIF all. What is transparent is white."""
    pages = []
    with blame(f"cannot read {path}"), Image.open(path) as im:
        several = im.format in ("TIFF", "GIF")
        for page in ImageSequence.Iterator(im) if several else [im]:
            if not size and math.prod(page.size) > 512 * 512:
                raise ValueError(f"{page.size} pixels are many: pass --size, e.g. 32")
            if page.mode[0] in "FI":
                raise ValueError("its pixels exceed 8 bits: save an 8-bit image")
            page = ImageOps.exif_transpose(page).convert("RGBA")
            white = Image.new("RGBA", page.size, "white")
            page = Image.alpha_composite(white, page).convert("RGB")
            if size:
                page = ImageOps.fit(page, (size, size), Image.Resampling.LANCZOS)
            pages.append(np.array(page).transpose(2, 0, 1))
    return pages


def as_images(pages):
    """uint8 images (N, C, H, W) of pages (N, 3, H, W); C = 1 if all look grey."""
    grey = all((page == page[:1]).all() for page in pages)
    return pages[:, :1].contiguous() if grey else pages


def pictures_below(folder):
    """The pictures below a folder, sorted: each folder once, links followed; hidden
    ones, __MACOSX and runs are skipped."""
    pictures, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or "ckpt.pt" in files:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(d for d in folders if d[0] not in "._")
        paths = [Path(parent, f) for f in files if f[0] not in "._"]
        pictures += [p for p in paths if p.suffix.lower() in PICTURES.split()]
    return sorted(path for path in pictures if path.is_file())


def read_folder(folder, split, size=None):
    """(images, labels or None, class names) of a folder's pictures, every tenth for
    testing; sub-folders are the classes, numbers in their order."""
    files, pages, labels = pictures_below(folder), [], []
    names = {path.relative_to(folder).parts[0] for path in files}
    if any(path.parent == folder for path in files):
        names = []
    elif names and all(n.lower().startswith(("train", "test", "val")) for n in names):
        raise UserError(f"{folder} holds {sorted(names)}: give one of them, --dataset")
    names = sorted(names, key=lambda n: (int(n) if n.isdecimal() else math.inf, n))
    for k, path in enumerate(files):
        if (k % 10 == 9) == (split == "test"):
            new = read_picture(path, size)
            pages += new
            if names:
                labels += [names.index(path.relative_to(folder).parts[0])] * len(new)
    if not pages:
        found = f"nor has it pictures to {split} on (every tenth is to test on)"
        raise UserError(f"--dataset {folder} is none of {SETS}, {found}")
    if len({page.shape for page in pages}) > 1:
        raise UserError(f"the pictures in {folder} differ in size: pass --size 32")
    images = as_images(torch.from_numpy(np.stack(pages)))
    return images, torch.tensor(labels) if names else None, names


# -------------------------------------------------------------------------- the network


def zero(layer):
    """The layer with zero weights: a residual block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Norm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel, x (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual block; the embedding scales and shifts its second normalisation."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = zero(nn.Linear(c_emb, 2 * c_out))
        self.norm2 = Norm(c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self-attention over all pixels."""

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
    with .dtype = torch.bfloat16 it multiplies in bfloat16. mult: width of each level
    relative to width; out: output channels, if not those of x.
    """

    def __init__(self, channels, width=32, classes=0, out=None, mult=(1, 2, 2)):
        super().__init__()
        self.dtype = torch.float32
        c_emb = 4 * width
        # in radians: neighbouring levels of log sigma stay alike, t = 1 and 1000 differ
        frequencies = torch.logspace(math.log10(2), math.log10(0.002), width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        embed = nn.Linear(2 * len(frequencies), c_emb), nn.SiLU()
        self.embed = nn.Sequential(*embed, nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb) if classes else None

        widths = [width * m for m in mult]
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for c, w in zip([width, *widths], widths):
            self.down.append(Block(c, w, c_emb))
        c = widths[-1]
        self.mid1 = Block(c, c, c_emb)
        self.attention = Attention(c)
        self.mid2 = Block(c, c, c_emb)
        self.side = nn.ModuleList()
        self.up = nn.ModuleList()
        for c_below, w in zip([c, *widths[::-1]], widths[::-1]):
            self.side.append(nn.Conv2d(c_below, w, 1))
            self.up.append(Block(w, w, c_emb))
        self.norm = Norm(width)
        self.conv_out = zero(nn.Conv2d(width, out or channels, 3, padding=1))

    def forward(self, x, noise, label=None):
        factor = 2 ** (len(self.down) - 1)
        if any(n % factor for n in x.shape[2:]):
            raise UserError(f"the U-Net needs multiples of {factor}: pass --size")
        angle = per_sample(noise, x).view(-1, 1) * self.frequencies  # (B, width / 2)
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], dim=1))
        if self.label is not None:
            if label is None:
                label = torch.full((len(x),), -1, device=x.device)
            emb = emb + self.label(label + 1)  # -1: the first row
        elif label is not None:
            raise ValueError("labels for a network that was trained without --classes")
        emb = F.silu(emb)

        with torch.autocast(x.device.type, self.dtype, self.dtype != torch.float32):
            h = self.conv_in(x).contiguous(memory_format=torch.channels_last)
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
        return h.float()


def guided(net, label=None, w=0.0, guide=None):
    """net(x, noise) with guidance: (1 + w) net(x, noise, label) - w weaker.

    weaker: the same without label (classifier-free guidance, arXiv:2207.12598), or the
    guide, a weaker network of this kind (autoguidance, arXiv:2406.02507, whose w is
    1 + w here). Output channels beyond those of x are left unchanged.
    """
    if w and label is None and guide is None:
        raise ValueError("guidance needs labels (B,), or a guide")

    def guided_net(x, noise, *_):  # the label is fixed
        out = net(x, noise, label)
        if not w:
            return out
        if guide:
            worse = guide(x, noise, label)
        else:
            worse = net(x, noise, torch.full_like(label, -1))
        C = x.shape[1]
        better = (1 + w) * out[:, :C] - w * worse[:, :C]
        return torch.cat([better, out[:, C:]], dim=1)

    return guided_net


# ---------------------------------------------------------------------------- the flags


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a single sentence."""

    def __init__(self, doc):
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, allow_abbrev=False, formatter_class=how)

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def read(self, argv, **stored):
        """Parse the flags. Their defaults: stored settings, then the paper's with
        --paper. UserError for a number below 0, or a 0 that makes no sense."""
        args = self.parse_args(argv, SimpleNamespace(**stored))
        if getattr(args, "paper", False):
            args = self.parse_args(argv, SimpleNamespace(**self.paper(args) | stored))
        for action in self._actions:
            value = getattr(args, action.dest, None)
            # 0 makes sense where it is the default, and of a real number that has one
            positive = action.default is None or action.type is int and action.default
            wrong = isinstance(value, (int, float)) and not 0 <= value < 2**63
            if wrong or (positive and value == 0):
                self.error(f"{action.option_strings[0]} {value} is out of range")
        return args


def arguments(script, doc, paper=None):
    """The flags that all scripts share, in the groups p.settled, p.kept, p.sampling, to
    which a script adds its own. paper(args): the settings of the paper, by name."""
    p = Parser(doc)
    p.paper = paper
    p.set_defaults(script=script, shape=None, n_classes=0, names=[], suffix="")
    p.set_defaults(born=time.time_ns())  # tells a run from one it replaced
    p.kept = p.add_argument_group("stored with the run; a later flag overrides it")
    p.settled = p.add_argument_group("fixed when training starts")
    p.sampling = p.add_argument_group("how to sample")
    add = p.kept.add_argument
    add("--dataset", type=PATH, default="digits", help=f"{SETS}, or a FOLDER (digits)")
    add("--data-dir", type=PATH, default="data", help="where data sets are kept (data)")
    add("--steps", type=int, help="training steps (6000; digits: 1600)")
    add("--seed", type=int, default=0, help="random seed (0)")
    add = p.settled.add_argument
    words = "the paper's settings; steps, batch, network and average stay ours"
    add("--paper", action="store_true", help=words)
    add("--size", type=int, help="scale and crop pictures to SIZE x SIZE")
    add("--batch-size", type=int, help="images per step (32; on CUDA 256)")
    words = "muon for the matrices inside the network, else adam (%(default)s)"
    add("--optimizer", choices=["muon", "adam"], default="muon", help=words)
    add("--lr", type=float, default=1e-3, help="peak learning rate (0.001); Muon: 5x")
    add("--constant-lr", action=ON_OFF, default=False, help="no decay after a warm-up")
    words = "simple, dsm, ssm, edm: mostly where ln sigma ~ N(0.5, 0.7^2) (papers: no)"
    add("--focus", action=ON_OFF, default=True, help=words)
    add("--ema", type=float, default=0.999, help="EMA decay of the weights (0.999)")
    add("--width", type=int, help="channels at full resolution (32; on CUDA 64)")
    add("--classes", action="store_true", help="train with labels, one in ten dropped")
    p.add_argument("--out", type=PATH, help="folder of the run (runs/SCRIPT-DATASET)")
    add = p.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue OUT/ckpt.pt, bit for bit")
    add("--sample-only", action="store_true", help="only sample, from OUT/ckpt.pt")
    add("--overwrite", action="store_true", help="discard the run in OUT")
    add = p.add_argument
    add("--device", default="cuda" if CUDA else "cpu", help="cpu, cuda (%(default)s)")
    words = "of matrix products (fp32); bf16: faster on some hardware, worse samples"
    add("--precision", choices=["bf16", "fp32"], default="fp32", help=words)
    add("--npz", action="store_true", help="also save samples*.npz, for --judge or FID")
    add = p.sampling.add_argument
    add("--samples", type=int, default=100, help="number of images (100)")
    add("--label", help="sample only the class of this name (all in turn)")
    add("--guidance", type=float, default=0.0, help="guidance weight w (0: off)")
    words = "autoguidance: a weaker RUN of this script; sde.py: or a classifier"
    add("--guide", type=PATH, help=words)
    return p


def start(parser, argv):
    """The settings: the flags; with --resume or --sample-only those of the run in OUT.

    Stored settings are the flags' defaults; UserError if a flag contradicts a fixed
    one, or if OUT is not empty. Joins the processes of torchrun.
    """
    args = parser.read(argv)
    out = args.out or f"runs/{args.script}-{Path(args.dataset).resolve().name}"
    if args.resume or args.sample_only:
        args = kept_settings(parser, argv, out)
    else:
        check_folder(out, args.overwrite)
    args.out = out
    if (args.guidance or args.label) and not (args.classes or args.guide):
        raise UserError("--guidance, --label: train with --classes, or pass a --guide")
    if args.guide and not (args.guidance and args.sample_only):
        raise UserError("--guide is for sampling: add --sample-only --guidance 1")
    with blame(f"--device {args.device} cannot be used here"):
        torch.ones(1, dtype=torch.float64, device=args.device).item()  # mps has none
    cuda = "cuda" in args.device
    args.batch_size = args.batch_size or (256 if cuda else 32)
    args.width = args.width or (64 if cuda else 32)
    args.steps = args.steps or (1600 if args.dataset in DRAWN else 6000)
    if dist.is_torchelastic_launched() and not args.sample_only:
        join_processes(args)
    seed_all(args.seed)  # the network's first weights
    return args


def kept_settings(parser, argv, out):
    """The settings of the run in OUT, as far as the flags do not change them; .suffix
    lists the flags in which these samples differ from the run's own."""
    saved = read_checkpoint(out, [parser.get_default("script")]).args
    groups = parser.kept, parser.settled, parser.sampling
    kept, settled, sampling = [group._group_actions for group in groups]
    names = ["shape", "n_classes", "names", "born", *[a.dest for a in kept + settled]]
    with blame(f"{out}/ckpt.pt is damaged or of another version"):
        stored = {name: getattr(saved, name) for name in names}
    args = parser.read(argv, **{k: v for k, v in stored.items() if v is not None})
    for action in settled:
        value, flag = getattr(saved, action.dest), action.option_strings[0]
        if getattr(args, action.dest) != value:
            raise UserError(f"{flag} is {value} in {out}: drop the flag")
    if args.sample_only and args.steps != saved.steps:
        raise UserError("--steps has no effect with --sample-only: see --resume")
    for action in kept[3:] + sampling:
        value, flag = getattr(args, action.dest), action.option_strings[0]
        if args.sample_only and value != getattr(saved, action.dest, None):
            name = "-n" if flag == "--samples" else flag[1:]
            args.suffix += f"{name}-{Path(str(value)).name}"
    return args


def check_folder(out, overwrite):
    """UserError if there is anything in OUT but a run (log.csv tells) to overwrite."""
    log, head = Path(out, "log.csv"), ",".join(LOG).encode()
    ours = log.is_file() and log.read_bytes().startswith(head)
    if os.path.exists(out) and os.listdir(out) and not (ours and overwrite):
        cures = "--resume goes on, --sample-only samples, --overwrite starts anew"
        what = f"a run: {cures}, or" if ours else "files of yours:"
        raise UserError(f"{out} holds {what} name another --out")


def join_processes(args):
    """Under torchrun: one device per process, and a share of the batch for each."""
    world = int(os.environ["WORLD_SIZE"])
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of {world}")
    if "cuda" in args.device:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group()  # gloo on CPUs, nccl on GPUs
    if rank() > 0:
        sys.stdout = io.StringIO()  # the first process tells


def data_of(args, split="train"):
    """(images, labels or None) of the run's data set; those of a new run settle
    args.shape, .n_classes, .names. UserError if they do not fit an old one."""
    images, labels, names = load_images(args.dataset, split, args.data_dir, args.size)
    if not args.classes:
        labels, names = None, []
    elif labels is None:
        raise UserError(f"--classes: no sub-folders in {args.dataset} name the classes")
    shape = list(images.shape[1:])
    if args.shape is None:
        args.shape, args.n_classes, args.names = shape, len(names), names
    if shape != args.shape or names != args.names[: len(names)]:
        kind = f"{args.shape}, classes {args.names}"
        raise UserError(f"--dataset {args.dataset} differs from the run's {kind}")
    labels_of(args, torch.arange(1))  # is there a class --label?
    return images, labels


def labels_of(args, index):
    """The labels of images number index: --label, or all classes in turn, or None."""
    if args.label not in [None, *args.names]:
        words = f"the run's classes are {args.names[:20]}; see --classes"
        raise UserError(f"--label {args.label}: {words}")
    if not args.names:
        return None
    classes = torch.arange(len(args.names))
    if args.label is not None:
        classes = classes[args.names.index(args.label)].view(1)
    return classes[index % len(classes)].to(args.device)


# -------------------------------------------------------------------------------- a run

LOG = ["step", "loss", "grad_norm", "lr", "images_per_s", "minutes"]  # of log.csv


def read_checkpoint(folder, scripts):
    """What Run.save() wrote, with .args; no pickled code runs. UserError if it is
    missing, damaged, or from another script."""
    path = Path(folder, "ckpt.pt")
    if not path.exists():
        raise UserError(f"there is no {path}: train, or name the folder of a run")
    with blame(f"{path} is damaged or no checkpoint"):
        what = torch.load(path, map_location="cpu", weights_only=True)
        saved = SimpleNamespace(**what, step=int(what["rows"][-1][0]))
        saved.args = SimpleNamespace(**what["args"])
        script = saved.args.script
    if script not in scripts:
        raise UserError(f"{path} was made by {script}, not by {' or '.join(scripts)}")
    return saved


def load(folder, device="cpu", **networks):
    """(net, args) of a run: the average of its weights, and the settings that made it.

    networks: SCRIPT=network, a function of the settings, for each accepted script.
    """
    saved = read_checkpoint(folder, networks)
    with blame(f"{folder}/ckpt.pt is damaged or of another version"):
        net = networks[saved.args.script](saved.args).eval().requires_grad_(False)
        net.load_state_dict(saved.ema)
    return net.to(device), saved.args


def load_guide(args, *same, **networks):
    """load() of --guide, or (None, None). UserError unless SAME settings agree."""
    if not args.guide:
        return None, None
    net, theirs = load(args.guide, args.device, **networks)
    for name in ("shape", *same):
        ours, other = getattr(args, name), getattr(theirs, name)
        if ours != other:
            raise UserError(f"--guide {args.guide} has {name} {other}, not {ours}")
    return net, theirs


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): orthogonalised momentum for matrices; a convolution is
    one of C_out x k^2 C_in (torch.optim.Muon rejects them). Scaled as in Liu et al.
    2025, arXiv:2502.16982; its learning rate is five times Adam's."""

    def __init__(self, weights, dtype=torch.float32):
        super().__init__(weights, {"lr": 0.0})
        self.dtype = dtype  # of the products that make a matrix orthogonal

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        shapes = {}  # matrices of the same shape are batched
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            mixed = p.grad.lerp(momentum, 0.95).flatten(1)
            shapes.setdefault(mixed.shape, []).append((p, mixed))
        for (a, b), pairs in shapes.items():
            X = torch.stack([mixed for _, mixed in pairs]).to(self.dtype)
            X = X.mT if a > b else X
            X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # Newton-Schulz: singular values near 1
                A = X @ X.mT
                X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
            X = X.mT if a > b else X
            lr = 5 * 0.2 * max(a, b) ** 0.5 * group["lr"]
            for (p, _), u in zip(pairs, X):
                p.sub_(u.reshape(p.shape), alpha=lr)


class Run:
    """A network in training, its averaged weights, and their folder OUT.

    for images, label in run.batches(...): run.update(loss(run.net, ...))
    The randomness of step n is that of (seed, n, rank): --resume is exact to the bit.
    """

    saved = 0  # the step of the last checkpoint

    def __init__(self, args, net):
        self.args, self.step, self.rows, Run.saved = args, 0, [], 0
        net.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        net = net.to(args.device)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        inner, outer = [], []  # convolutions between hidden layers, and all others
        for name, p in net.named_parameters():
            hidden = p.dim() == 4 and min(p.shape[:2]) >= 8 and "conv_out" not in name
            (inner if hidden and args.optimizer == "muon" else outer).append(p)
        self.optimizers = {"adam": torch.optim.Adam(outer, fused=True)}
        if inner:
            self.optimizers["muon"] = Muon(inner, net.dtype)
        self.parts = {"net": net, "ema": self.ema, **self.optimizers}
        if args.resume or args.sample_only:
            old = read_checkpoint(args.out, [args.script])
            with blame(f"{args.out}/ckpt.pt is damaged or of another version"):
                self.step, Run.saved, self.rows = old.step, old.step, old.rows
                for name, part in self.parts.items():
                    part.load_state_dict(getattr(old, name))
        self.net, self.stamp = net, self.last_write()
        if dist.is_initialized():
            self.net = nn.parallel.DistributedDataParallel(net)
            for name, buffer in net.named_buffers(recurse=False):
                self.net.register_buffer(name, buffer)  # the losses' own
        self.previews = {100, *range(1000, args.steps, 1000)} - {args.steps}
        self.recent = []

    def last_write(self):
        """When OUT/ckpt.pt was written, or 0: did another process do so?"""
        path = Path(self.args.out, "ckpt.pt")
        return path.stat().st_mtime_ns if path.exists() else 0

    def batches(self, images, labels):
        """Random images uint8 (B, C, H, W) and labels (B,) or None, up to args.steps;
        none with --sample-only. After the body of a step: ckpt.pt, every 500 steps."""
        args, world = self.args, dist.get_world_size() if dist.is_initialized() else 1
        if args.sample_only:
            return
        n = sum(p.numel() for p in self.net.parameters())
        print(f"train  {n:,} weights, {self.ema.dtype}, {world} x {args.device}")
        print(f"       {args.batch_size} images a step, into {args.out}")
        images = images.to(args.device)
        labels = None if labels is None else labels.to(args.device)
        self.began = time.perf_counter()
        while self.step < args.steps:
            seed_all(args.seed, self.step, rank())
            B = args.batch_size // world
            i = torch.randint(len(images), (B,), device=args.device)
            yield images[i], None if labels is None else labels[i]
            if self.step % 500 == 0 or self.step in (100, args.steps):
                self.save()
        if world > 1:
            dist.destroy_process_group()
            if rank() > 0:
                sys.exit()

    def update(self, loss):
        """A step of Adam and Muon; every 100 steps a line, log.csv and loss.png."""
        args, weights = self.args, [*self.net.parameters()]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        done = (self.step + 1) / args.steps
        down = 1.0 if args.constant_lr else 1.25 * (1 - done)
        lr = args.lr * min(1, 20 * done, down)  # up, flat, down to 0
        for opt in self.optimizers.values():
            opt.param_groups[0]["lr"] = lr
            opt.step()
        self.net.zero_grad()
        decay = min(args.ema, (1 + self.step) / (10 + self.step))  # short at first
        average = get_ema_multi_avg_fn(decay)  # decay ema + (1 - decay) net
        average([*self.ema.parameters()], weights, None)
        for kept, now in zip(self.ema.buffers(), self.parts["net"].buffers()):
            kept.copy_(now)  # as those of a BatchNorm
        self.recent.append(torch.stack([loss.detach(), norm]))
        self.step += 1
        if self.step % 100 == 0 or self.step == args.steps:
            self.log(lr)

    def log(self, lr):
        """A line and a row of what happened since the last."""
        args, n = self.args, len(self.recent)
        mean = torch.stack(self.recent).mean(0)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        mean = mean.tolist()  # the only wait for the device
        if not math.isfinite(sum(mean)):
            kept = f"the last checkpoint is of step {Run.saved}"
            raise UserError(f"the loss is not finite: lower --lr; {kept}")
        minutes = (time.perf_counter() - self.began) / 60
        rate = n * args.batch_size / minutes / 60
        left = (args.steps - self.step) * args.batch_size / rate / 60
        speed = f"{rate:.0f} images/s   {left:.1f} min left"
        print(f"step   {self.step}/{args.steps}   loss {mean[0]:.4f}   {speed}")
        minutes += self.rows[-1][5] if self.rows else 0
        self.rows.append([self.step, *mean, lr, rate, minutes])
        if rank() == 0:
            write_csv(f"{args.out}/log.csv", ",".join(LOG), self.rows)
            curve = [row[:2] for row in self.rows]
            save_curve(f"{args.out}/loss.png", curve, "loss, mean of 100 steps")
        self.recent, self.began = [], time.perf_counter()

    def save(self):
        """Write OUT/ckpt.pt atomically. UserError if somebody else has written it."""
        path = Path(self.args.out, "ckpt.pt")
        what = {"args": vars(self.args), "rows": self.rows}
        what |= {name: part.state_dict() for name, part in self.parts.items()}
        if rank() == 0:
            if self.stamp != self.last_write():
                raise UserError(f"another process trains in {path.parent}")
            write(path, lambda f: torch.save(what, f))
            self.stamp = self.last_write()
        Run.saved = self.step


# ----------------------------------------------------------------------------- pictures


def to_uint8(x, low=-1.0):
    """Float images in [low, 1] as uint8, rounded and clamped, on the CPU."""
    return ((x.float() - low) * (255 / (1 - low))).round().clamp(0, 255).byte().cpu()


def grid(images, cols=10, pad=2, scale=2):
    """A Pillow picture of uint8 images (N, C, H, W), row by row."""
    missing = -len(images) % cols
    images = F.pad(images, (0, pad, 0, pad, 0, 0, 0, missing), value=64)
    _, C, H, W = images.shape
    sheet = images.view(-1, cols, C, H, W).permute(0, 3, 1, 4, 2)
    picture = Image.fromarray(sheet.reshape(-1, cols * W, C).squeeze(2).numpy())
    return ImageOps.scale(picture, scale, Image.Resampling.NEAREST)


def save_curve(path, points, ylabel):
    """A line through points (step, y), as PNG, with three numbers at least on its y
    axis: 1-2-5 steps, logarithmic, if all y are positive and differ enough."""
    left, top, right, bottom = 75, 40, 680, 350
    steps, ys = zip(*points)
    low, high = min(ys), max(ys) + 1e-3 * abs(max(ys)) + 1e-9  # even of equal numbers
    marks = [m * 10.0**k for k in range(-20, 20) for m in (1, 2, 5)]
    marks = [v for v in marks if low <= v <= high]
    if low <= 0 or len(marks) < 3:
        marks = np.linspace(low, high, 4)
    scale = math.log if low > 0 else float
    picture = Image.new("RGB", (700, 400), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)

    def at(step, y):
        up = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return left + step / steps[-1] * (right - left), bottom - up * (bottom - top)

    for y in marks:
        draw.line([at(0, y), at(steps[-1], y)], "#d1d5db")
        draw.text((left - 6, at(0, y)[1]), f"{y:.4g}", "black", font, "rm")
    for step in (0, steps[-1] // 2, steps[-1]):
        draw.text((at(step, low)[0], bottom + 6), f"{step}", "black", font, "mt")
    draw.rectangle([left, top, right, bottom], outline="black")
    draw.text((left, 20), f"{ylabel}, at each step", "black", font, "lm")
    draw.line([at(*point) for point in points], "#2563eb", 3, "curve")
    write(path, lambda f: picture.save(f, "PNG"))


class Watch:
    """watch(f) wraps f; .calls counts its calls, .frames holds 8 images of 20 to 40."""

    def __init__(self):
        self.calls, self.every, self.frames = 0, 1, []

    def __call__(self, f):
        def watched(x, *rest):
            if self.calls % self.every == 0:
                self.frames.append(x[:8].detach().cpu())
            if len(self.frames) > 40:
                self.frames, self.every = self.frames[::2], 2 * self.every
            self.calls += 1
            return f(x, *rest)

        return watched


def save_process(frames, path):
    """Frames of uint8 images (n, C, H, W): animation PATH.gif, filmstrip PATH.png."""
    first, *film = [grid(frame, cols=4, scale=3) for frame in frames]
    times = {"duration": [80] * len(film) + [2500], "loop": 0}
    how = {"save_all": True, "append_images": film, **times}
    write(f"{path}.gif", lambda f: first.save(f, "GIF", **how))
    at = np.linspace(0, len(frames) - 1, min(11, len(frames))).round().astype(int)
    rows = torch.stack([frames[k][:6] for k in at], dim=1).flatten(0, 1)
    write(f"{path}.png", lambda f: grid(rows, cols=len(at)).save(f, "PNG"))


def save_samples(args, draw, preview=0, low=-1.0):
    """Sample args.samples images: draw(index, watch) returns x of these indices.

    Saves samplesNAME.png, processNAME.gif and .png, with --npz samplesNAME.npz; NAME
    is args.suffix, or the step of a preview of 20. Chunks of fixed size have a seed
    each, so image k does not depend on how many are sampled.
    """
    N = 20 if preview else args.samples
    name = f"_{preview:06d}" if preview else args.suffix
    parts, began = [], time.perf_counter()
    if rank() > 0:
        return  # the first process samples
    for first in range(0, N, CHUNK):
        seed_all(args.seed, first)
        watch = Watch()
        x = draw(torch.arange(first, first + CHUNK), watch)
        if not x.isfinite().all():
            raise UserError("the samples are not finite: use smaller steps")
        if first == 0:
            frames = [to_uint8(frame, low) for frame in [*watch.frames, x[:8]]]
        parts.append(to_uint8(x, low))
        cost = f"{watch.calls} evaluations each, {time.perf_counter() - began:.0f} s"
        print(f"sample {min(first + CHUNK, N)}/{N} images, {cost}")
    x = torch.cat(parts)[:N]
    path = f"{args.out}/samples{name}"
    write(f"{path}.png", lambda f: grid(x[:100]).save(f, "PNG"))
    save_process(frames, f"{args.out}/process{name}")
    if args.npz and not preview:
        labels = labels_of(args, torch.arange(N))
        labels = [] if labels is None else labels.tolist()
        rgb = x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        what = {"arr_0": rgb, "labels": labels, "born": args.born}
        write(f"{path}.npz", lambda f: np.savez(f, **what))
    some = f": the first 100 of {N}; all with --npz" if N > 100 else ""
    print(f"saved  {path}.png{some}")
