"""Fill in, sharpen, colour, deblur or denoise pictures with any trained run.

Papers   Song & Ermon 2019, arXiv:1907.05600: Langevin dynamics with a mask        ald
         Song et al. 2021, arXiv:2011.13456 (Score SDE): imputation, colour    replace
         Lugmayr et al. 2022, arXiv:2201.09865 (RePaint): back, and again      repaint
         Choi et al. 2021, arXiv:2108.02938 (ILVR): the low frequencies           ilvr
         Chung et al. 2022, arXiv:2209.14687 (DPS): gradient through D             dps
View     D(x, sigma) = E[x_0 | x = x_0 + sigma z] is all that is asked of a run, images
         in [-1, 1]: score = (D(x, sigma) - x) / sigma^2, x = x_t / sqrt(abar_t) of DDPM
Given    b = A x_0 + noise z with a linear A; P = A^+ A projects on what A sees. In x at
         level sigma the known part becomes x - P x + A^+ b + sigma P z        impute()
Differs  one view, not three time scales; corrector steps by sigma, not by norms; the
         last step gives D(x, sigma_N), no noise is left; zeta of DPS is for fewer steps

    python inpaint.py                       # trains a DDPM on digits, hides left halves
    python inpaint.py runs/ncsn-mnist --mask band --method ald     # see runs/*/inpaint/
    python inpaint.py runs/ddpm-mnist --task super --factor 4      # or deblur, denoise
    python inpaint.py --dataset colour-digits --task colorize
"""

import argparse
import inspect
import math
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.fft import fftfreq, irfft2, rfft2, rfftfreq

import common
import ddpm
import ncsn
import sde
from common import COUNT, SCALE, UserError, geometric_sigmas, karras_sigmas, say

# ------------------------------------------------------------------------ what is given

# b = A(x) + noise z of x (B, ...); pinv: A^+, so that A^+ A is an orthogonal projection
Operator = namedtuple("Operator", "A pinv noise", defaults=[0.0])


def masked(mask, noise=0.0):
    """Inpainting: mask (H, W) or (d,) is 1 where x is known. All known: denoising."""
    return Operator(lambda x: mask * x, lambda b: mask * b, noise)


def block_means(k):
    """Super-resolution: the means of k x k pixels, and their repetition."""
    return Operator(
        lambda x: F.avg_pool2d(x, k), lambda b: F.interpolate(b, scale_factor=k)
    )


def grey(C):
    """Colorization: the mean of the channels; Score SDE, I.3, has sqrt(3) times it."""
    return Operator(lambda x: x.mean(1, True), lambda b: b.repeat_interleave(C, 1))


def blurred(H, W, width, smallest=0.05):
    """Deblurring: a periodic Gaussian. A^+ inverts what is damped to >= smallest."""
    f2 = fftfreq(H)[:, None] ** 2 + rfftfreq(W) ** 2
    h = (-2 * (math.pi * width) ** 2 * f2).exp()  # (H, W // 2 + 1)
    inverse = torch.where(h >= smallest, 1 / h, 0)
    return Operator(
        lambda x: irfft2(rfft2(x) * h.to(x.device), (H, W)),
        lambda b: irfft2(rfft2(b) * inverse.to(b.device), (H, W)),
    )


def draw_mask(name, H, W, keep=0.25, seed=0):
    """The mask (1, 1, H, W), 1 where all is known; name: see --mask, or a file."""
    holes = {
        "left": np.s_[..., : W // 2],
        "right": np.s_[..., W // 2 :],
        "top": np.s_[..., : H // 2, :],
        "bottom": np.s_[..., H // 2 :, :],
        "center": np.s_[..., H // 4 : H - H // 4, W // 4 : W - W // 4],
        "band": np.s_[..., W // 3 : W - W // 3],
    }
    m = torch.ones(1, 1, H, W)
    if name in holes:
        m[holes[name]] = 0
    elif name == "random":
        g = torch.Generator().manual_seed(seed)
        m = (torch.rand(m.shape, generator=g) < keep).float()
    else:
        picture = common.as_images(common.read_picture(name)[:1])
        m = (picture.float().mean(1, True) >= 128).float()
    h, w = m.shape[2:]
    if (h, w) != (H, W):
        raise UserError(f"--mask {name} is {w} x {h}: draw it at the images' {W} x {H}")
    if m.min() == m.max():
        raise UserError(f"--mask {name} is of one colour: white is known, black is not")
    return m


# ------------------------------------------------------------------------- the methods


def impute(x, op, b, sigma, z=None):
    """x at level sigma, what is known put in: x - P x + A^+ b + sigma P z. Noise that b
    has is not added again; below its level nothing is known better than x knows it."""
    if sigma < op.noise:
        return x
    z = torch.randn_like(x) if z is None else z
    return x + op.pinv(b - op.A(x - math.sqrt(sigma**2 - op.noise**2) * z))


def step(x, x0, t, s):
    """From noise level t to s < t, x0 = D(x, t): Score SDE, eq. (47); DDPM, eq. (7)."""
    share = 1 - s**2 / t**2  # of the way to x0
    z = torch.randn_like(x)
    return x + share * (x0 - x) + s * math.sqrt(share) * z  # eqs. (47), (7)


def langevin(D, x, sigma, alpha):
    """x + alpha / 2 score + sqrt(alpha) z."""
    score = (D(x, sigma) - x) / sigma**2
    return x + alpha / 2 * score + math.sqrt(alpha) * torch.randn_like(x)


@torch.no_grad()
def ald(D, b, op, x, sigma, T=10, eps=None):
    """NCSN, Algorithm 2, sigma (L,) falling; eps: 0.4 sigma_L^2; at last E[x_0 | x]."""
    eps = eps or 0.4 * sigma[-1] ** 2
    for s in sigma:
        alpha = eps * (s / sigma[-1]) ** 2  # line 3
        z = torch.randn_like(x)  # lines 4, 5: y~ = y + sigma_i z
        for _ in range(T):  # exact in the limit of many small steps
            x = langevin(D, x, s, alpha)  # line 8
            x = impute(x, op, b, s, z)  # line 9: x <- (1 - m) x + m y~
    return impute(D(x, sigma[-1]), op, b, 0.0)


@torch.no_grad()
def replace(D, b, op, x, sigma, T=1, snr=0.16):
    """Score SDE, I.2 to I.4, sigma (N + 1,) falling to 0; T corrector steps a level, in
    which ||z|| / ||score|| is sigma. Biased: the noise put in is blind to the rest."""
    for t, s in pairwise(sigma):
        x = impute(step(x, D(x, t), t, s), op, b, s)
        for _ in range(T if s > op.noise else 0):
            alpha = 4 * (snr * s) ** 2  # Algorithm 4: x + e score + sqrt(2 e) z
            x = impute(langevin(D, x, s, alpha), op, b, s)
    return x


@torch.no_grad()
def repaint(D, b, op, x, sigma, U=7, jump=1):
    """RePaint, Algorithm 1, sigma (N + 1,) falling to 0; jump > 1: its section 4.2.
    Printed for x_{t-1} is the noise of t; q(x_{t-1} | x_0) must be meant."""
    for i in range(0, len(sigma) - 1, jump):
        block = sigma[i : i + jump + 1]
        again = U if block[-1] > op.noise else 1  # line 9: not in the last step
        for u in range(again):
            for t, s in pairwise(block):
                x = impute(step(x, D(x, t), t, s), op, b, s)  # lines 4 to 8
            if u < again - 1:  # line 10: q(x_t | x_{t-1})
                x = x + math.sqrt(block[0] ** 2 - block[-1] ** 2) * torch.randn_like(x)
    return x


@torch.no_grad()
def ilvr(D, b, op, x, sigma):
    """ILVR, Algorithm 1: x <- x' + phi(y_s) - phi(x'), eq. (8). phi, a low-pass filter,
    is A if that gives images (blur, mask), else A^+ A."""
    for t, s in pairwise(sigma):
        x = step(x, D(x, t), t, s)  # x' ~ p(x_{t-1} | x_t)
        if s >= op.noise:
            y = math.sqrt(s**2 - op.noise**2) * torch.randn_like(x)  # y_s less y
            low = b - op.A(x - y)
            x = x + (low if b.shape == x.shape else op.pinv(low))  # eq. (8)
    return x


def dps(D, b, op, x, sigma, zeta=1.0):
    """DPS, Algorithm 1, with zeta' of its code: half the step of zeta_i as printed."""
    for t, s in pairwise(sigma):
        x = x.detach().requires_grad_()
        x0 = D(x, t)  # line 4
        norm = (b - op.A(x0)).flatten(1).norm(dim=1)
        (grad,) = torch.autograd.grad(norm.sum(), x)
        scale = math.sqrt((1 + t**2) * (1 + s**2))  # grad by x_t = x / sqrt(1 + t^2)
        x = step(x, x0, t, s).detach() - zeta * scale * grad  # lines 6, 7
    return x if op.noise else impute(x, op, b, 0.0)  # what is known, as it is


METHODS = {"ald": ald, "replace": replace, "repaint": repaint, "ilvr": ilvr, "dps": dps}
LEVELS = {"ald": 30, "replace": 140, "repaint": 40, "ilvr": 250, "dps": 100}


def levels(method, low, high, N):
    """N levels: for ald 10 to 0.1 in one ratio, else 20 to 0.02, and 0 (EDM, eq. 5)."""
    if method == "ald":
        return geometric_sigmas(min(high, 10.0), max(low, 0.1), N).tolist()
    return karras_sigmas(N, max(low, 0.02), min(high, 20.0)).tolist()


def complete(D, x0, op, method, sigma, K, **options):
    """(what was given (N, ...), K completions (N, K, ...)) of images x0 (N, ...)."""
    b = op.A(x0)
    b = b + op.noise * torch.randn_like(b)
    given = b if b.shape == x0.shape else op.pinv(b)
    b = b.repeat_interleave(K, 0)
    x = sigma[0] * torch.randn_like(x0.repeat_interleave(K, 0))
    x = impute(x, op, b, sigma[0])
    x = METHODS[method](lambda x, s: D(x, s).clamp(-1, 1), b, op, x, sigma, **options)
    return given, x.unflatten(0, (-1, K))


def measure(x0, x, hidden):
    """{name: (N,)} of uint8 x0 (N, ...), x (N, K, ...): PSNR in dB of the best and the
    mean completion; std of a pixel over them, white is 1, where hidden (1, 1, H, W)."""
    x = x.float() / 255
    std = x.std(1, correction=min(1, x.shape[1] - 1)).mean(1)  # (N, H, W)
    std = std[:, hidden[0, 0] == 1].mean(1)
    x = torch.cat([x.mean(1, True), x], dim=1)  # the mean, then each
    mse = (x - x0[:, None] / 255).square().flatten(2).mean(2)
    psnr = -10 * mse.clamp(min=1e-10).log10()  # (N, 1 + K)
    return {"psnr_best": psnr[:, 1:].amax(1), "psnr_mean": psnr[:, 0], "std": std}


# ------------------------------------------------------------------ from flags to files


def flags():
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = common.Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = p.add_argument
    add("run", nargs="?", type=common.path, help="a run's folder (trains a DDPM)")
    add("--samples", type=COUNT, default=10, help="test images (%(default)s)")
    add("--index", type=common.number(int, 0), default=0, help="the first of them")
    add("--completions", type=COUNT, default=10, help="of each (%(default)s)")
    add("--image", nargs="+", type=common.path, help="your own pictures instead")
    add("--size", type=COUNT, help="crop pictures to SIZE pixels squared")
    add("--dataset", type=common.path, help="of the test images (the run's; digits)")
    add("--data-dir", type=common.path, help="where data sets are kept (the run's)")
    add("--out", type=common.path, help="folder of the pictures (RUN/inpaint)")
    add("--device", type=common.device, default=device, help="cpu, cuda, ...")
    add("--seed", type=common.SEED, default=0, help="of all that is random")
    tasks = ["inpaint", "super", "deblur", "denoise", "colorize"]
    add("--task", choices=tasks, default="inpaint", help="what to do (%(default)s)")
    masks = "hides: left, right, top, bottom, center, band, random; or FILE, its black"
    add("--mask", type=common.path, default="left", help=masks)
    add("--keep", type=common.SHARE, default=0.25, help="left by --mask random")
    add("--factor", type=COUNT, default=4, help="super: pixels squared in one")
    add("--blur", type=SCALE, default=1.5, help="deblur: width in pixels")
    add("--noise", type=SCALE, default=0.5, help="denoise: sigma; white is 1")
    auto = "auto: repaint, but replace to denoise"
    add("--method", choices=["auto", *METHODS], default="auto", help=auto)
    add("--sample-steps", type=COUNT, help=f"noise levels ({LEVELS})")
    add("--T", type=common.number(int, 0), help="steps a level (ald 10, replace 1)")
    add("--U", type=COUNT, help="of repaint: passes of a level (7; paper: 10)")
    add("--jump", type=COUNT, help="of repaint: levels at once (1; paper: 10)")
    add("--zeta", type=SCALE, help="of dps: step size (1; paper: 0.3 to 1)")
    return p


def view(run, device="cpu"):
    """(D, (sigma_min, sigma_max)) of a run of any script, for images in [-1, 1]."""
    scripts = {"ncsn": ncsn, "ddpm": ddpm, "sde": sde}
    D, (low, high) = scripts[run.script].denoiser(run, device)
    if run.script != "ncsn":
        return D, (low, high)

    def D_twice(x, sigma):  # NCSN's images are in [0, 1]
        return 2 * D((x + 1) / 2, sigma / 2) - 1

    return D_twice, (2 * low, 2 * high)


def trained(args):
    """The run in the folder named, else of a DDPM, trained now where there is none."""
    if not args.run:
        dataset = args.dataset or "digits"
        args.run = f"runs/ddpm-{Path(dataset).resolve().name}"
        if not common.is_run(args.run):
            say(f"train  no RUN is named: a DDPM learns {dataset} first, in {args.run}")
            argv = ["--out", args.run, "--sample-steps", "50", "--device", args.device]
            argv += ["--dataset", dataset, "--data-dir", args.data_dir or "data"]
            argv += ["--size", str(args.size)] if args.size else []
            ddpm.main(argv)
    run = common.load_checkpoint(args.run, {**ncsn.KIND, **ddpm.KIND, **sde.KIND})
    common.prepare(run.net, argparse.Namespace(precision="auto", device=args.device))
    return run


def pictures(args, run):
    """(images uint8 (N, C, H, W), labels (N,) or []) that are to be completed."""
    size = args.size or run.args.size
    if args.image:
        return torch.cat([own(f, size, *run.args.shape) for f in args.image]), []
    name = args.dataset or run.args.dataset
    folder = common.is_folder(name)
    split = "train" if folder else "test"
    data_dir = args.data_dir or run.args.data_dir
    images, labels = common.load_images(name, split, data_dir, size)
    if list(images.shape[1:]) != run.args.shape:
        raise UserError(f"{name} is not of the run's {run.args.shape}: see --image")
    if args.index >= len(images):
        raise UserError(f"--index {args.index}: {name} has {len(images)} images")
    if folder and name == run.args.dataset:
        say(f"note   these are training pictures: the folder {name} has no test images")
    some = slice(args.index, args.index + args.samples)
    return images[some], [] if labels is None else labels[some]


def own(path, size, C, H, W):
    """The image uint8 (1, C, H, W) in a file. UserError if it does not fit the run."""
    image = common.as_images(common.read_picture(path, size)[:1])
    c, h, w = image.shape[1:]
    if (h, w) != (H, W):
        raise UserError(f"--image {path} is {w} x {h}: --size, or make it {W} x {H}")
    if c > C:
        raise UserError(f"--image {path} is in colour, the run is grey: make it grey")
    return image.expand(-1, C, -1, -1)


def operator(args, C, H, W):
    """(Operator, name of the task, hidden (1, 1, H, W): 1 where a pixel is unknown)."""
    hidden = torch.ones(1, 1, H, W)
    if args.task == "inpaint":
        m = draw_mask(args.mask, H, W, args.keep, args.seed)
        return masked(m.to(args.device)), f"inpaint-{Path(args.mask).stem}", 1 - m
    if args.task == "super":
        if H % args.factor or W % args.factor:
            raise UserError(f"--factor {args.factor} does not divide {H} x {W} pixels")
        return block_means(args.factor), f"super-{args.factor}x", hidden
    if args.task == "colorize":
        if C != 3:
            raise UserError("--task colorize: train on --dataset colour-digits, say")
        return grey(C), "colorize", hidden
    if args.task == "deblur":
        return blurred(H, W, args.blur), f"deblur-{args.blur:g}", hidden
    return masked(hidden.to(args.device), args.noise), f"denoise-{args.noise:g}", hidden


def plan(args, op, low, high):
    """(method, its options, its noise levels). UserError where flags clash."""
    auto = "replace" if op.noise else "repaint"
    method = auto if args.method == "auto" else args.method
    if method == "ald" and op.noise:
        raise UserError("--method ald knows no noise in what is given: take another")
    parameters = inspect.signature(METHODS[method]).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty}
    names = "T", "U", "jump", "zeta"
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if given.keys() - options:
        raise UserError(f"--method {method} takes {list(options)} of {list(names)}")
    sigma = levels(method, low, high, args.sample_steps or LEVELS[method])
    if op.noise:  # b is a draw of this level: begin there
        if not sigma[-2] < op.noise < sigma[0]:
            raise UserError(f"--noise must be in {sigma[-2]:.3g} ... {sigma[0]:.3g}")
        sigma = [op.noise] + [s for s in sigma if s < op.noise]
    return method, options | given, sigma


def save(out, images, given, x, frames, **rows):
    """OUT.png: truth, given, completions; OUT-process.gif: those of the first image;
    OUT.npz: completions (N, K, H, W, C), truth (N, H, W, C), and rows an image."""
    sheet = torch.cat([images[:, None], given[:, None], x], dim=1)[:20, :12]
    picture = common.grid(sheet.flatten(0, 1), cols=sheet.shape[1])
    common.save_picture(picture, f"{out}.png")
    common.save_process([common.to_uint8(f) for f in frames], f"{out}-process")
    truth = images.permute(0, 2, 3, 1)
    completions = x.permute(0, 1, 3, 4, 2)
    with common.aside(f"{out}.npz") as f:
        np.savez(f, completions=completions, truth=truth, **rows)
    say(f"saved  {out}.png, .npz, -process.gif")


def main(argv=None):
    args = flags().parse_args(argv)
    common.keep_memory()
    run = trained(args)
    D, (low, high) = view(run, args.device)
    say(f"run    {args.run}: {run.script}, {run.args.dataset}, {run.step} steps")
    images, labels = pictures(args, run)
    op, name, hidden = operator(args, *run.args.shape)
    method, options, sigma = plan(args, op, low, high)
    say(f"given  {name}   method {method} {options}, {len(sigma)} levels ...")
    N, K = len(images), args.completions
    chunk = 50 if "cuda" in args.device else 1  # images at once, always so many
    calls = len(sigma) * options.get("U", options.get("T", 0) + 1)
    parts, frames = [], None
    for first in range(0, N, chunk):
        some = torch.arange(first, first + chunk).clamp(max=N - 1)
        x0 = images[some].to(args.device) / 127.5 - 1
        common.seed_all(args.seed, args.index + first)
        watch = common.Watch(calls)
        given, x = complete(watch(D), x0, op, method, sigma, K, **options)
        if not x.isfinite().all():
            raise UserError("the completions are not finite: give a smaller --zeta")
        frames = frames or [*watch.frames, x[0, :8].cpu()]
        parts.append((common.to_uint8(given), common.to_uint8(x)))
        say(f"draw   {min(first + chunk, N)}/{N}   {watch.count} evaluations each")
    given, x = (torch.cat(part)[:N] for part in zip(*parts))
    measures = measure(images, x, hidden)
    for key, v in measures.items():
        say(f"mean   {key} {v.mean():.3f}, from {v.min():.3f} to {v.max():.3f}")
    out = args.out or f"{args.run}/inpaint"
    save(f"{out}/{name}-{method}", images, given, x, frames, labels=labels, **measures)


if __name__ == "__main__":
    common.cli(main)
