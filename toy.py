"""Data and pictures: image sets and how they are read, PNG grids, GIFs and plots, distances between two sets of points,
and the digits that this project draws itself, so that it needs no download.

    python toy.py               # draws the digits set into data/digits, and a sheet of it into runs/toy/digits.png
"""
import gzip, hashlib, http.client, io, math, os, socket, struct, tarfile, urllib.request, zlib
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
import common

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

COLORS = ["#2563eb", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b5563"]   # told apart by all eyes
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

def panel(marks, xlabel="", ylabel="", title="", logx=False, logy=False, box=None, size=(720, 450)):
    """Axes as a Pillow picture of twice SIZE, with marks [(kind, label, points), ...]: line (x, y); dots (x, y), with
    error bars (x, y, e); arrows (x, y, dx, dy) on the axes of a box; heat: values (n, n) from 0 to 1 over the box
    (low, high)^2. Points that are not finite, outside the box, or not positive on a log axis are left out."""
    (W, H), large, small = (2 * n for n in size), ImageFont.load_default(30), ImageFont.load_default(26)
    draw = ImageDraw.Draw(picture := Image.new("RGB", (W, H), "white"))
    ok = lambda v, log: math.isfinite(v) and (v > 0 or not log) and (box is None or box[0] <= v <= box[1])
    marks = [(kind, label, p if kind == "heat" else [q for q in torch.as_tensor(p).tolist() if
              ok(q[0], logx) and ok(q[1], logy)]) for kind, label, p in marks]
    points = [q for kind, _, p in marks if kind != "heat" for q in p]
    fx, xs = axis(box or [q[0] for q in points], logx, 0 if box else 0.03)
    fy, ys = axis(box or [q[1] for q in points], logy, 0 if box else 0.03)
    left = 44 + round(max((small.getlength(f"{v:g}") for v in ys), default=0))
    right, top, bottom, k, color = W - 40, 80, H - (120 if xlabel else 70), 0, COLORS[0]
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
        elif kind == "line":
            draw.line([(px(q[0]), py(q[1])) for q in p] or [(0, 0)], color, 5, joint="curve")
        for x, y, *e in p if kind in ("dots", "arrows") or kind == "line" and 1 < len(p) <= 30 and box is None else []:
            if kind == "arrows":
                (u, v), tip = e, (px(x + e[0]), py(y + e[1]))
                draw.line([px(x), py(y), *tip], color, 4)
                wing = lambda s: (px(x + 0.65 * u - s * 0.22 * v), py(y + 0.65 * v + s * 0.22 * u))
                draw.polygon([tip, wing(1), wing(-1)], color)
                continue
            r = 7 if len(p) <= 100 else 3
            draw.ellipse([px(x) - r, py(y) - r, px(x) + r, py(y) + r], color)
            draw.line([px(x), py(y if logy and y <= e[0] else y - e[0]), px(x), py(y + e[0])], color, 3) if e else None
        if label:                                                    # legend
            at, k = top + 34 + 40 * k, k + 1
            draw.text((right - 84, at), label, "#111827", small, "rm", stroke_width=6, stroke_fill="white")
            draw.line([right - 70, at, right - 20, at], color, 7) if kind == "line" else \
                draw.ellipse([right - 52, at - 7, right - 38, at + 7], color)
    draw.rectangle([left, top, right, bottom], outline="#374151", width=2)
    for at, text, anchor in (((left, 40), ylabel, "lm"), ((right, 40), title, "rm"), ((W / 2, H - 34), xlabel, "mm")):
        draw.text(at, text, "#111827", large, anchor)
    return picture

def figure(path, panels, cols=None):
    """Panels of one size, row by row, as a picture half as large: shrinking smooths the lines."""
    (W, H), cols = panels[0].size, cols or len(panels)
    sheet = Image.new("RGB", (W * cols, H * math.ceil(len(panels) / cols)), "white")
    for k, p in enumerate(panels):
        sheet.paste(p, (k % cols * W, k // cols * H))
    save_picture(sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS), path)

def plot(path, curves, xlabel, ylabel, title="", logx=False, logy=False):
    """A line plot {label: [(x, y), ...]} as PNG."""
    figure(path, [panel([("line", *c) for c in curves.items()], xlabel, ylabel, title, logx, logy)])

def main():
    images, _ = load_images("digits", "data", "train")
    save_picture(grid(images[:200] / 255, cols=20), "runs/toy/digits.png")
    print("saved  runs/toy/digits.png")

if __name__ == "__main__":
    common.cli(main)
