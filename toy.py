"""Toy data: what this project draws itself, so that it needs no download and the answers are known.

    python toy.py               # draws the digits set into data/digits, and a sheet of it into runs/toy/digits.png
"""
import concurrent.futures, os, struct
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
import common

def draw_digits(folder, stems):
    """Draw digits, 60,000 + 10,000 of 28 x 28: Pillow's own font in six stroke widths, blurred, through a random affine
    map and a smooth elastic warp. Single IEEE operations of numpy only (no BLAS, sin or cos): every machine with the
    same numpy and Pillow draws the same bytes."""
    S, chunk, font, glyphs = 136, 500, ImageFont.load_default(102), []   # glyphs (S, S) are 4 times as large
    for digit, stroke in ((d, s) for d in "0123456789" for s in range(6)):
        im = Image.new("L", (S, S))
        ImageDraw.Draw(im).text((S / 2, S / 2), digit, 255, font, "mm", stroke_width=stroke)
        glyphs.append(np.asarray(im.filter(ImageFilter.GaussianBlur(2.5)), np.float64))
    ink, u = np.stack(glyphs).ravel(), np.arange(28.0) - 13.5            # u: pixel centres
    bump = np.square(np.maximum(0, 1 - np.square((u[:, None] - 9 * np.arange(-2, 3)) / 14)))      # (28, 5)

    def draw(seed):
        rng = np.random.default_rng(seed)
        uniform = lambda r, *shape: r * (2 * rng.random((2, chunk, *shape)) - 1)                  # two of each
        label, stroke = rng.integers(10, size=chunk), rng.integers(6, size=chunk)
        (a, d), (b, c), shift = 1.02 + uniform(0.2, 1, 1), uniform(0.25, 1, 1), uniform(1.5, 1, 1)
        bend = uniform(1.6, 5, 5)                                        # warp = sum_ij bump_i(y) bump_j(x) bend_ij
        rows = sum(bump[:, i, None] * bend[:, :, None, i, :] for i in range(5))                   # (2, chunk, 28, 5)
        warp = shift + sum(rows[..., j, None] * bump[:, j] for j in range(5))                     # (2, chunk, 28, 28)
        x, y = a * u + (b + 0.1) * u[:, None] + warp[0], 0.5 * c * u + d * u[:, None] + warp[1]
        x, y = (np.clip(4 * v + S / 2 - 0.5, 0, S - 2.001) for v in (x, y))
        ix, iy = x.astype(np.int64), y.astype(np.int64)
        at, fx, fy = ((label * 6 + stroke)[:, None, None] * S + iy) * S + ix, x - ix, y - iy
        top, bottom = ((1 - fx) * ink[at + s] + fx * ink[at + s + 1] for s in (0, S))             # bilinear
        return np.minimum(1.15 * ((1 - fy) * top + fy * bottom), 255).round().astype(np.uint8), label.astype(np.uint8)
    train = stems[0].startswith("train")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = pool.map(draw, ([1 - train, k] for k in range(120 if train else 20)))
        arrays = [np.concatenate(a) for a in zip(*chunks)]
    for stem, a in zip(stems, arrays):
        with common.aside(folder / stem) as f:
            f.write(struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape) + a.tobytes())
    print(f"data   drew {len(a)} digits into {folder}", flush=True)

def main():
    images, _ = common.load_images("digits", "data", "train")
    common.save_picture(common.grid(images[:200] / 255, cols=20), "runs/toy/digits.png")
    print("saved  runs/toy/digits.png")

if __name__ == "__main__":
    common.cli(main)
