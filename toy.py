"""Data, pictures, and a laboratory in two dimensions, where the score is known and every claim has an exact answer.

    python toy.py                # the tour: exact score, learned score, Langevin and annealed Langevin dynamics
    python toy.py EXPERIMENT     # a picture runs/toy/EXPERIMENT.png, and a table of measured numbers beside exact ones
    python toy.py all            # every experiment
"""
import argparse, gzip, hashlib, http.client, io, itertools, math, os, socket, struct, tarfile, time
import urllib.request, zlib
from pathlib import Path
import numpy as np
import torch
import torch.distributions as D
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
import common
import ddpm
import inpaint
import ncsn
import sde

# ------------------------------------------------------------------------------------------------- image sets
FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
SHA256 = {"digits": [None] * 4, "mnist": """                                   of the FILES, decompressed
              ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
              65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
              0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
              ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2""".split()[-4:], "fashion-mnist": """
              c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
              bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
              5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
              0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34""".split()}
MD5 = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}         # as published
MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "fashion-mnist": ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"],
    "cifar10": ["https://www.cs.toronto.edu/~kriz/",
                "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"]}

def load_images(name, data_dir="data", split="train", size=None):
    """uint8 images (N, C, H, W) and int64 labels (N,) of a named set, or of a folder of pictures (labels None).
    What is missing is drawn (digits) or downloaded. Raises UserError naming the file and the cure."""
    if name not in (*SHA256, "cifar10"):
        return read_folder(Path(name), size), None
    common.require(not size, f"--size is for a folder of pictures; {name} has its own")
    folder, files, arrays = Path(data_dir) / name, {"train": slice(0, 2), "test": slice(2, 4)}[split], []
    if name == "cifar10":
        rows = torch.tensor(read(folder / "cifar-10-binary.tar.gz", parse_cifar10, split))
        return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()
    for stem, sha256 in zip(FILES[files], SHA256[name][files]):
        names = [n + gz for n in (stem, stem.replace("-idx", ".idx")) for gz in ("", ".gz")]
        path = next((folder / n for n in names if (folder / n).exists()), folder / names[name != "digits"])
        if name == "digits" and not path.exists():
            common.draw_digits(folder, FILES[files])
        arrays.append(torch.tensor(read(path, parse_idx, sha256)))
    return arrays[0][:, None], arrays[1].long()

def read(path, parse, *options):
    """parse(bytes of PATH, decompressed, *options), after a download if it is missing. UserError if it is damaged."""
    if not path.exists():
        download(path, parse, *options)
    try:
        raw = path.read_bytes()
        return parse(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw, *options)
    except (EOFError, OSError, zlib.error, struct.error, tarfile.TarError, KeyError, ValueError, common.UserError) as e:
        raise common.UserError(f"{path} is truncated, damaged or another file ({e}); delete it and run again") from e

def parse_idx(raw, sha256):
    """uint8 array of an IDX file."""
    zeros, kind, ndim = struct.unpack_from(">HBB", raw)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(struct.unpack_from(f">{ndim}I", raw, 4))
    common.require((zeros, kind) == (0, 8), "not an IDX file of bytes")
    common.require(sha256 in (None, hashlib.sha256(raw).hexdigest()), "wrong checksum")
    return data

def parse_cifar10(raw, split):
    """(N, 3073) labels and images in CIFAR-10's binary archive, read in place and never extracted."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        files = {Path(m.name).name: tar.extractfile(m).read() for m in tar if Path(m.name).name in names}
    return np.frombuffer(b"".join(files[n] for n in names), np.uint8).reshape(-1, 3073)

def download(path, parse, *options):
    """Fetch PATH from a mirror of its folder, each tried twice, and try to read it. UserError names the addresses."""
    part, tried, mib = Path(f"{path}.{os.getpid()}.part"), [], 2 ** 20
    socket.setdefaulttimeout(30)
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in [mirror + path.name for mirror in MIRRORS[path.parent.name] * 2]:
        try:
            urllib.request.urlretrieve(url, part, lambda k, block, total: print(
                f"\rfetch  {url} {min(k * block, total) / mib:.1f} of {total / mib:.1f} MiB", end="", flush=True))
            print()
            common.require(MD5.get(path.name) in (None, hashlib.md5(part.read_bytes()).hexdigest()), "wrong checksum")
            read(part, parse, *options)
            return part.replace(path)
        except (OSError, http.client.HTTPException, common.UserError) as e:
            tried.append(f"{url} ({e})")
        finally:
            part.unlink(missing_ok=True)
    raise common.UserError(f"cannot download {path.name}; put it into {path.parent} by hand. Tried: {', '.join(tried)}")

# --------------------------------------------------------------------------------------------------- pictures
def read_picture(path, size=None):
    """A picture as a Pillow image, L if it is grey, else RGB; transparent becomes white; SIZE: cropped to a square.
    Raises UserError if it cannot be read."""
    try:
        im = ImageOps.exif_transpose(Image.open(io.BytesIO(Path(path).read_bytes())))
        if im.mode.startswith("I"):                                      # 16-bit grey, which convert() would clip
            im = Image.fromarray((np.asarray(im) >> 8).astype(np.uint8))
        common.require(im.mode != "F", "its pixels are floats of unknown range")
        mode = "L" if im.mode in ("1", "L", "LA", "La") else "RGB"
        if im.has_transparency_data:
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
        im = im.convert(mode)
    except (OSError, SyntaxError, ValueError, common.UserError, Image.DecompressionBombError) as e:
        raise common.UserError(f"cannot read the picture {path} ({e}); remove it or give another one") from e
    return ImageOps.fit(im, (size, size), Image.Resampling.LANCZOS) if size else im

def read_folder(folder, size=None):
    """All pictures below FOLDER (N, C, H, W): one channel if all are grey, else RGB. UserError names a bad one."""
    names = ", ".join(SHA256)
    common.require(folder.is_dir(), f"--dataset {folder} is neither {names}, cifar10 nor a folder of pictures")
    pictures = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions()):
        pictures.append(read_picture(path, size))
        same = pictures[-1].size == pictures[0].size
        common.require(same, f"{path} is not of the first one's size: give --size, say 32")
    common.require(pictures, f"the folder {folder} holds no picture that Pillow can read")
    mode = "L" if all(im.mode == "L" for im in pictures) else "RGB"
    images = torch.from_numpy(np.stack([np.asarray(im.convert(mode)) for im in pictures]))
    return images[:, None] if mode == "L" else images.permute(0, 3, 1, 2).contiguous()

def to_uint8(x, low=0.0):
    """Float images in [low, 1] as uint8, rounded and clamped."""
    return ((x.float() - low) * (255 / (1 - low))).round().clamp(0, 255).byte().cpu()

def grid(images, low=0.0, cols=None, pad=2, size=600):
    """A Pillow picture of N images (C, H, W) in [low, 1], row by row, enlarged by a whole number to about SIZE."""
    images = to_uint8(images, low)
    N, C, H, W = images.shape
    cols = cols or math.ceil(N ** 0.5)
    images = F.pad(torch.cat([images, images.new_zeros(-N % cols, C, H, W)]), (0, pad, 0, pad), value=64)
    sheet = images.view(-1, cols, C, H + pad, W + pad).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    sheet = F.pad(sheet, (pad, 0, pad, 0), value=64).permute(1, 2, 0).squeeze(2).numpy()
    return ImageOps.scale(Image.fromarray(sheet), max(1, round(size / sheet.shape[1])), Image.Resampling.NEAREST)

def save_picture(picture, path, **options):
    """Write a Pillow picture, all or nothing, in the format of the path's suffix."""
    with common.aside(path) as f:
        picture.save(f, Path(path).suffix[1:], **options)

def save_process(frames, path, low=0.0, rows=6, columns=11):
    """K frames of N images (C, H, W) each: a .gif plays 16 of them; a .png has one a row, time to the right."""
    if Path(path).suffix == ".gif":
        first, *rest = (grid(f[:16], low, size=300) for f in frames)
        return save_picture(first, path, save_all=True, append_images=rest, duration=[80] * len(rest) + [2500], loop=0)
    shown = [frames[round(k)][:rows] for k in np.linspace(0, len(frames) - 1, min(columns, len(frames)))]
    save_picture(grid(torch.stack(shown, dim=1).flatten(0, 1), low, cols=len(shown)), path)

COLORS = ["#2563eb", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b5563", "#8b5a2b"]   # for all eyes
SHADES = [(255, 255, 255), (219, 234, 254), (147, 197, 253), (37, 99, 235), (23, 37, 84)]   # of a heat map, 0 to 1

def axis(values, log, margin):
    """(function from a value to 0 ... 1, values to mark) of an axis that holds the values and a margin."""
    low, high = min(values, default=1), max(values, default=10)
    if low == high:
        low, high = (low / 2, low * 2) if log else (low - abs(low) - 1, low + abs(low) + 1)
    f, exponent = (math.log10 if log else float), math.floor(math.log10(high / low if log else high - low))
    marks = [m * 10.0 ** k for k in range(-12, 13) for m in ((1,) if exponent > 1 else (1, 2, 5))]
    if not log:
        step = min((m for m in marks if m >= (high - low) / 6), default=high - low)
        marks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    a, b = (1 + margin) * f(low) - margin * f(high), (1 + margin) * f(high) - margin * f(low)
    return lambda v: (f(v) - a) / (b - a), [m for m in marks if low <= m <= high]

def panel(marks, xlabel="", ylabel="", title="", logx=False, logy=False, box=None, size=(1440, 900)):
    """Axes as a Pillow picture, with marks (kind, label, points): line (x, y); curve, a line with its points; dots
    (x, y) or (x, y, error); arrows (x, y, dx, dy); heat: values (n, n) from 0 to 1 over a box (low, high)^2.
    Points that are not finite, outside the box, or not positive on a log axis are left out."""
    (W, H), large, small = size, ImageFont.load_default(30), ImageFont.load_default(26)
    draw = ImageDraw.Draw(picture := Image.new("RGB", (W, H), "white"))
    ok = lambda v, log: math.isfinite(v) and (v > 0 or not log) and (box is None or box[0] <= v <= box[1])
    marks = [(kind, label, p if kind == "heat" else [q for q in torch.as_tensor(p).tolist() if
              ok(q[0], logx) and ok(q[1], logy)]) for kind, label, p in marks]
    points = [q for kind, _, p in marks if kind != "heat" for q in p]
    fx, xs = axis(box or [q[0] for q in points], logx, 0 if box else 0.03)
    fy, ys = axis(box or [q[1] + k * sum(q[2:3]) for q in points for k in (logy - 1, 1)], logy, 0 if box else 0.03)
    left = 44 + round(max((small.getlength(f"{v:g}") for v in ys), default=0))
    right, top, bottom, k, color = W - 40, 80, H - (120 if xlabel else 70), 0, COLORS[0]
    high = [fx(q[0]) for q in points if fy(q[1]) > 0.6]                  # the legend goes where there are fewer
    legend, side, align = (left, 1, "lm") if sum(x > 0.5 for x in high) > len(high) / 2 else (right, -1, "rm")
    px, py = lambda v: left + fx(v) * (right - left), lambda v: bottom - fy(v) * (bottom - top)
    for at, text, anchor in [((px(v), bottom + 12), f"{v:g}", "mt") for v in xs] + \
            [((left - 14, py(v)), f"{v:g}", "rm") for v in ys]:
        draw.line((at[0], top, at[0], bottom) if anchor == "mt" else (left, at[1], right, at[1]), "#e5e7eb", 2)
        draw.text(at, text, "#374151", small, anchor)
    for kind, label, p in marks:
        color = COLORS[k % len(COLORS)] if label else color          # without a label: the last one's colour
        if kind == "heat":
            at, value = np.linspace(0, 1, len(SHADES)), torch.as_tensor(p).numpy()
            rgb = np.stack([np.interp(value, at, c) for c in zip(*SHADES)], -1).round().astype(np.uint8)
            rgb = Image.fromarray(rgb).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
            picture.paste(rgb, (left, top))
        elif kind in ("line", "curve"):
            draw.line([(px(q[0]), py(q[1])) for q in p] or [(0, 0)], color, 5, joint="curve")
        for x, y, u, v in p if kind == "arrows" else []:
            at = lambda along, across: (px(x + along * u - across * v), py(y + along * v + across * u))
            draw.line([at(0, 0), at(0.9, 0)], color, 4)
            draw.polygon([at(1, 0), at(0.65, 0.22), at(0.65, -0.22)], color)
        for x, y, *e in p if kind == "dots" or kind == "curve" and len(p) <= 30 else []:
            r = 7 if len(p) <= 100 else 3
            draw.ellipse([px(x) - r, py(y) - r, px(x) + r, py(y) + r], color)
            draw.line([px(x), py(y if logy and y <= e[0] else y - e[0]), px(x), py(y + e[0])], color, 3) if e else None
        if label:
            y, k = top + 34 + 40 * k, k + 1
            draw.text((legend + side * 84, y), label, "#111827", small, align, stroke_width=6, stroke_fill="white")
            x, (half, thick) = legend + side * 45, (7, 7) if kind == "dots" else (25, 3)
            draw.rounded_rectangle([x - half, y - thick, x + half, y + thick], thick, color)
    draw.rectangle([left, top, right, bottom], outline="#374151", width=2)
    for at, text, anchor in (((left, 40), ylabel, "lm"), ((right, 40), title, "rm"), ((W / 2, H - 34), xlabel, "mm")):
        draw.text(at, text, "#111827", large, anchor)
    return picture

def figure(path, panels):
    """Panels, options of panel(), in up to three columns; drawn twice as large and shrunk, which smooths the lines."""
    cols = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    W, H = [(1440, 900), (880, 800), (600, 580)][cols - 1]
    sheet = Image.new("RGB", (W * cols, H * math.ceil(len(panels) / cols)), "white")
    for k, options in enumerate(panels):
        sheet.paste(panel(**options, size=(W, H)), (k % cols * W, k // cols * H))
    save_picture(sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS), path)

def plot(path, curves, xlabel, ylabel, title="", **log):
    """A line plot {label: [(x, y), ...]} as PNG."""
    marks = [("curve", *c) for c in curves.items()]
    figure(path, [{"marks": marks, "xlabel": xlabel, "ylabel": ylabel, "title": title, **log}])

# ------------------------------------------------- the laboratory: points are images of d channels, (n, d, 1, 1)
image = lambda x: torch.as_tensor(x)[..., None, None]                      # points (n, d) as images

class Mixture:
    """sum_k w_k N(m_k, v I): a data set whose density and score are known, also at noise sigma: v + sigma^2 for v."""
    def __init__(self, w=(0.2, 0.8), m=((1.0, 1.0), (-1.0, -1.0)), v=0.1):
        self.w, self.m, self.v = torch.as_tensor(w), image(m), v           # (K,), (K, d, 1, 1)

    def __call__(self, n):
        m = self.m[self.w.multinomial(n, replacement=True)]
        return m + self.v ** 0.5 * torch.randn_like(m)

    def parts(self, x, sigma=0.0):
        """log w_k N(x; m_k, (v + sigma^2) I), (n, K), and v + sigma^2, for sigma a number or (n,)."""
        v = self.v + torch.as_tensor(sigma).to(x).view(-1, 1) ** 2
        square = (x[:, None] - self.m.to(x)).square().sum((2, 3, 4))
        return self.w.to(x).log() - square / (2 * v) - x[0].numel() / 2 * (2 * math.pi * v).log(), v

    def log_density(self, x, sigma=0.0):
        return self.parts(x, sigma)[0].logsumexp(1)

    def score(self, x, sigma=0.0, label=None):
        """grad log density; with labels (n,), of the one normal distribution that each names."""
        parts, v = self.parts(x, sigma)
        p = parts.softmax(1) if label is None else F.one_hot(label, len(self.w)).to(x)
        return ((p @ self.m.to(x).flatten(1)).view_as(x) - x) / v[..., None, None]

    def net(self, x, log_sigma, label=None):
        """The exact network: sigma times the score."""
        return log_sigma.exp().view(-1, 1, 1, 1) * self.score(x, log_sigma.exp(), label)

def cut(n):
    """A standard normal distribution cut in two, the halves moved one unit apart."""
    return image((x := torch.randn(n, 2)) + x.sign() * torch.tensor([0.5, 0]))

def heart(n):
    """Uniform where (x^2 + y^2 - 1)^3 < x^2 y^3."""
    x, y = torch.rand(2, 4 * n + 100) * 2.6 - 1.3
    return image(torch.stack([x, y], 1)[(x ** 2 + y ** 2 - 1) ** 3 < x ** 2 * y ** 3][:n])

def swiss_roll(n):
    """A spiral of one and a half turns, with a little noise."""
    angle = math.pi * (1.5 + 3 * torch.rand(n, 1))
    return image(torch.cat([angle.cos(), angle.sin()], 1) * angle / 7 + 0.05 * torch.randn(n, 2))

def checkerboard(n):
    """Uniform on every other square of a board of 4 x 4."""
    x = 4 * torch.rand(n) - 2
    return image(torch.stack([x, torch.rand(n) + 2 * torch.randint(2, (n,)) - 2 + x.floor() % 2], 1))

fourier = lambda u: torch.view_as_real((1j * u[:, None] * torch.tensor([0.25, 0.5, 1, 2])).exp()).flatten(1)

class Net(torch.nn.Module):
    """net(x, log sigma, label=None): the scripts' U-Net in small; told(log sigma) is what it is told of the noise."""
    def __init__(self, d=2, width=128, told=fourier):
        super().__init__()
        sizes, self.told = (d + told(torch.zeros(1)).shape[1], width, width), told
        layers = [f for k in sizes for f in (torch.nn.Linear(k, width), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, d))

    def forward(self, x, log_sigma, label=None):
        sigma = log_sigma.exp().view(-1, 1, 1, 1)
        c = 1 / (1 + sigma ** 2).sqrt()
        more = self.layers(torch.cat([(c * x).flatten(1), self.told(log_sigma)], 1)).view_as(x)
        return c * (more - sigma * c * x)              # the exact one of N(0, I), and c times more (EDM, eq. 7)

def fit(net, loss, steps=2000):
    """The network after so many steps of Adam on loss(net), with a learning rate that rises and falls to 0."""
    opt = torch.optim.Adam(net.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps, pct_start=0.05)
    for _ in range(steps):
        loss(net).backward()
        opt.step(), opt.zero_grad(), schedule.step()
    return net.requires_grad_(False)

def trained(data, sigma_max, sigma_min, L=100, steps=2000):
    """The network of ncsn.loss on L levels."""
    sigma = common.geometric_sigmas(sigma_max, sigma_min, L).float()
    return fit(Net(), lambda net: ncsn.loss(net, data(512), sigma), steps)

score = lambda net: lambda x, sigma: ncsn.score(net, x, torch.full((len(x),), float(sigma)))       # sigma: a number

def anneal(net, x, sigma, r, T, **options):
    """ncsn.py's annealed Langevin dynamics with T steps a = r sigma^2 on each of the levels sigma, a list."""
    return ncsn.sample(net, x, sigma := torch.tensor(sigma), 2 * r * sigma[-1] ** 2, [T] * len(sigma), **options)

def compare(samples, data, n=2000):
    """Rows with the energy distances of {label: points} to n data, means over sets of n, beside the mean of ten pairs
    of sets of data, whose deviation stands for the standard error."""
    real = torch.tensor([ncsn.energy(data(n), data(n)) for _ in range(10)])
    mean = lambda x: sum(ncsn.energy(part, data(n)) for part in x.split(n)) * n / len(x)
    return [(f"energy distance, {k}", mean(x), real.std().item(), real.mean().item()) for k, x in samples.items()]

def row(label, values, exact=math.nan):
    """A row of a table, (label, measured, its standard error, exact), of independent values."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    return label, values.mean().item(), values.std().item() / len(values) ** 0.5, float(exact)

def agree(label, a, b, exact=1.0):
    """A row: slope of the scores a on b; their relative distance goes into the label."""
    norm, slope = b.square().sum(), (a * b).sum() / b.square().sum()
    error = ((a - slope * b).square().sum() / norm / len(a)).sqrt()
    return f"{label}: distance {((a - b).square().sum() / norm).sqrt():.3f}, slope", slope.item(), error.item(), exact

def sweep(x, y, xs, ways, f, exact, **options):
    """A panel and rows of {label: way}: dots are the means of f(way, x), with two standard errors; the line is exact, a
    number or exact(way, x), or where nothing is known (nan) joins the dots."""
    marks, rows = [], []
    for label, way in ways.items():
        part = [row(f"{y}, {label}, {x} = {v:g}", f(way, v), exact(way, v) if callable(exact) else exact) for v in xs]
        line = [(v, mean if math.isnan(known) else known) for v, (_, mean, _, known) in zip(xs, part)]
        dots = [(v, mean, 2 * error) for v, (_, mean, error, _) in zip(xs, part)]
        marks, rows = marks + [("line", label, line), ("dots", "", dots)], rows + part
    return {"marks": marks, "xlabel": x, "ylabel": y, **options}, rows

def join(*parts):
    """The panels and all rows of several sweeps."""
    panels, rows = zip(*parts)
    return list(panels), sum(rows, [])

right = lambda x: (x.sum((1, 2, 3)) > 0).double()                          # 1 in the upper right half of the plane

def density(title, x, exact, low, high):
    """A panel of the histogram of numbers x, with two standard errors, and of the exact density."""
    counts, at, unit = torch.histc(x, 40, low, high), torch.linspace(low, high, 81), 40 / (high - low) / len(x)
    dots = torch.stack([at[1::2], counts * unit, 2 * counts.sqrt() * unit], 1)
    return {"title": title, "marks": [("line", "exact", torch.stack([at, exact(at)], 1)), ("dots", "drawn", dots)]}

def plane(box, n):
    """n^2 points of the square (-box, box)^2, row by row from its top as in a heat map."""
    x = torch.linspace(-box, box, n + 2)[1:-1]
    return image(torch.stack(torch.meshgrid(x, x.flip(0), indexing="xy"), 2).view(-1, 2))

def field(title, f, box, heat=None):
    """A panel of arrows f(x), as long as the square root of what they stand for, over a heat map of heat(x)."""
    x, heat = plane(box, 14), [("heat", "", heat(plane(box, 80)).view(80, 80))] if heat else []
    v = f(x) / f(x).norm(dim=1, keepdim=True).sqrt()
    arrows = torch.cat([x, 2 * box / 15 * v / v.norm(dim=1).max()], 1).flatten(1)
    return {"title": title, "marks": [*heat, ("arrows", "", arrows)], "box": (-box, box)}

cloud = lambda title, x, box: {"title": title, "marks": [("dots", "", x[:2000].flatten(1))], "box": (-box, box)}

# -------------------------------------------------------------- experiments: panels of a picture, rows of a table
MIX, MODES = Mixture(), Mixture((0.8, 0.2), ((5.0, 5.0), (-5.0, -5.0)), 1.0)           # the second is NCSN's
LADDER = common.geometric_sigmas(10, 0.1, 10).tolist()
uniform = lambda n: 16 * torch.rand(n, 2, 1, 1) - 8                                    # points of (-8, 8)^2

def tour():
    """Exact score, learned score, and what Langevin and annealed Langevin dynamics draw with the learned one."""
    net, x, exact = trained(MODES, 10.0, 0.1), MODES(2000), lambda x: MODES.score(x, 1.0)
    plain, annealed = (anneal(net, uniform(2000), *way) for way in (([0.1], 10, 1000), (LADDER, 0.2, 100)))
    shade = lambda x: (12 * MODES.log_density(x, 1.0).exp()) ** 0.5
    return [field("exact score, sigma = 1", exact, 8, shade), field("learned", lambda x: score(net)(x, 1.0), 8, shade),
            cloud("Langevin dynamics", plain, 8), cloud("annealed Langevin dynamics", annealed, 8)], [
            agree("learned score on exact", score(net)(x, 1.0), exact(x)), *(row(f"share at (5, 5), {k}", right(y), 0.8)
            for k, y in (("data", x), ("Langevin", plain), ("annealed", annealed)))]

def noise():
    """Denoising other noise learns the score of the density which that noise makes; uniform noise has none to learn."""
    data, b, panels, rows = Mixture((0.3, 0.7), ((1.0,), (-1.0,))), 0.5, [], []
    x, at = image(torch.linspace(-2.5, 2.5, 120)[:, None]), image(torch.linspace(-5, 5, 2001)[:, None])
    for kind in (D.Normal(0, 1), D.Laplace(0, 1), D.StudentT(3), D.Uniform(-1, 1, validate_args=False)):
        def loss(net):
            u = torch.as_tensor(kind.sample((512, 1, 1, 1))).requires_grad_()
            target, = torch.autograd.grad((kind.log_prob(u) + 0 * u).sum(), u)              # the score of the noise
            return (score(net)(data(512) + b * u.detach(), b) - target / b).square().mean()
        def exact(y):                                                      # q' / q of q(y) = int p(x) k((y - x) / b) dx
            k = kind.log_prob((y.view(-1, 1) - at.view(1, -1)) / b).exp() * data.log_density(at).exp()
            return (k @ data.score(at).view(-1, 1) / k.sum(1, keepdim=True)).view_as(y)
        s, y, name = score(fit(Net(1), loss)), data(4000) + b * kind.sample((4000, 1, 1, 1)), type(kind).__name__
        y, curve = y[y.flatten().abs() < 2.5], lambda f: torch.cat([x, f(x)], 1).flatten(1)
        rows.append(agree(f"{name} noise", s(y, b), exact(y), float(name != "Uniform")))
        panels.append({"title": f"{name} noise", "xlabel": "x", "ylabel": "score", "marks": [
            ("line", "exact", curve(exact)), ("dots", "learned", curve(lambda x: s(x, b))[::4])]})
    return panels, rows

def autoencoder():
    """A denoising auto-encoder r and a score network that never saw clean data give one field: (r(x) - x) / sigma^2."""
    sigma, noisy = torch.tensor([0.5]), lambda x: x + 0.5 * torch.randn_like(x)
    apply = lambda net, x: net(x, sigma.log().expand(len(x)))
    r = fit(Net(), lambda net: (apply(net, noisy(x := MIX(512))) - x).square().mean())
    s = fit(Net(), lambda net: ncsn.loss(net, MIX(512), sigma, objective="ssm-vr"))
    f = {"exact": lambda x: MIX.score(x, 0.5), "score network": lambda x: score(s)(x, 0.5),
         "auto-encoder": lambda x: (apply(r, x) - x) / sigma ** 2}         # Tweedie
    x = noisy(MIX(4000))
    return [field(name, f[name], 2.5) for name in f], [agree(f"{a} on {b}", f[a](x), f[b](x)) for a, b in (
        ("auto-encoder", "score network"), ("auto-encoder", "exact"), ("score network", "exact"))]

def ode():
    """The probability-flow ODE, exact score: orders of DDIM and Heun, exact likelihood, paths of three processes."""
    small, edm, x = sde.EDM(0.01, 5.0), sde.EDM(0.01, 100.0), 5 * torch.randn(500, 2, 1, 1).double()
    exact = lambda process: sde.make_score(lambda y, sigma, label: -MIX.net(y, sigma.log()), process)
    def ddim(n):                                                           # Euler's method in sigma
        abar = 1 / (1 + common.karras_sigmas(n, 0.01, 5.0).flip(0) ** 2)
        return ddpm.ddim(ddpm.as_eps(MIX.net, abar), x / 26 ** 0.5, abar, range(n, -1, -1))
    best = (heun := lambda n: sde.heun(exact(small), small, x, n))(2000)
    panel, errors = sweep("steps", "error", (16, 32, 64, 128, 256), {"DDIM": ddim, "Heun": heun}, lambda f, n: (
        f(n) - best).norm(dim=1), math.nan, logx=True, logy=True)
    rows = [(f"order of {k}", math.log2(errors[i][1] / errors[i + 1][1]), math.nan, order)
            for k, i, order in (("DDIM", 3, 1), ("Heun", 8, 2))]
    x, panels = MIX(1000).double(), [panel]                                # N(0, 100^2 I) is near enough to p_T of edm
    log_p = sde.log_likelihood(exact(edm), edm, x, probes=0)[0].flatten() - MIX.log_density(x, 0.01)
    rows.append(row("log p by the ODE less the exact, nats", log_p, 0))
    for process in (sde.VE(0.01, 5.0), small, sde.VP()):
        t, field = torch.linspace(process.T, process.eps, 101).double(), sde.flow(exact(process), process)
        path = itertools.accumulate(itertools.pairwise(t.tolist()), lambda y, ab: sde.rk45(field, y, *ab, 1e-4),
                                    initial=process.prior * torch.randn(16, 2, 1, 1).double())
        path, name = torch.stack(list(path)).flatten(2), type(process).__name__
        straight = torch.lerp(path[-1:], path[:1], ((t - t[-1]) / (t[0] - t[-1]))[:, None, None])
        bend = (path - straight).norm(dim=2).mean(0) / (path[0] - path[-1]).norm(dim=1).mean()
        rows.append(row(f"bend, {name}", bend))
        panels.append({"title": name, "xlabel": "t", "ylabel": "x_1", "marks": [
            ("line", "", torch.stack([t, p], 1)) for p in path[:, :, 0].T]})
    return panels, rows

def samplers(sets=((cut, 4), (heart, 1.5), (swiss_roll, 2.5), (checkerboard, 2.5))):
    """Every sampler draws four sets of data with 20 and with 200 evaluations of a network; drawn: 200."""
    panels, rows, abar, vp = [], [], ddpm.schedule("cosine", 200), sde.VP()
    for data, box in sets:
        net = fit(Net(), lambda net: ddpm.loss(ddpm.as_eps(net, abar), data(512), abar))
        known = trained(data, 5, 0.01, steps=4000)
        samples, eps, s = {}, ddpm.as_eps(net, abar), sde.make_score(lambda y, sigma, label: -net(y, sigma.log()), vp)
        for n in (20, 200):
            ladder, tau = common.geometric_sigmas(5, 0.01, n // 2).tolist(), ddpm.subsequence(200, n)
            for name, draw in {"NCSN": lambda x: anneal(known, 5 * x, ladder, 0.5, 2),
                               "DDPM": lambda x: ddpm.ancestral(eps, x, abar, tau),
                               "ODE": lambda x: sde.heun(s, vp, x, n // 2),
                               "DDIM": lambda x: ddpm.ddim(eps, x, abar, tau[::-1]),
                               "Euler-Maruyama": lambda x: sde.em(s, vp, x, sde.times(vp, n - 1)),
                               "reverse diffusion": lambda x: sde.reverse(s, vp, x, sde.times(vp, n - 1)),
                               "predictor-corrector": lambda x: sde.pc(s, vp, x, sde.times(vp, n // 2))}.items():
                samples[f"{data.__name__}, {name}, {n}"] = draw(torch.randn(4000, 2, 1, 1))
        rows += compare(samples, data)
        panels += [cloud(k, x, box) for k, x in samples.items() if k[-3:] == "200"][:3]
    return panels, rows

def main():
    experiments = {f.__name__: f for f in (
        tour, ncsn.langevin, ncsn.annealed, ncsn.scores, ncsn.matching, ncsn.projections, ddpm.weighting, ncsn.steps,
        ncsn.levels, ncsn.objective, ddpm.conditioning, ode, noise, autoencoder)}
    experiments |= {"too-many-steps": ncsn.too_many_steps, "ddpm": samplers, "mala": inpaint.metropolis,
                    "conditional": inpaint.given}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("experiment", nargs="?", default="tour", help=f"all, {', '.join(experiments)}")
    p.add_argument("--out", default="runs/toy", help="folder of the pictures")
    p.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = p.parse_args()
    names = list(experiments) if args.experiment == "all" else [args.experiment]
    common.require(names[0] in experiments, f"there is no experiment {names[0]}: give all, {', '.join(experiments)}")
    for name in names:
        torch.manual_seed(args.seed)
        start, path = time.perf_counter(), Path(args.out) / f"{name}.png"
        panels, rows = experiments[name]()
        print(f"{name}: {experiments[name].__doc__}")
        for label, measured, *known in rows:
            known = [f"{name} {v:<8.4g}" for name, v in zip(("+-", "exact"), known) if math.isfinite(v)]
            print(f"    {label:86s} {measured:10.5g} ", *known)
        figure(path, panels)
        print(f"saved  {path}, {time.perf_counter() - start:.1f} s\n", flush=True)

if __name__ == "__main__":
    import toy                                # the module that the scripts know, not this second copy of it
    common.cli(toy.main)
