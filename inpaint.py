"""Fill in, sharpen, colour, deblur or denoise pictures with any trained run.

Papers   Song & Ermon 2019, arXiv:1907.05600: Langevin dynamics with a mask        ald
         Song et al. 2021, arXiv:2011.13456 (Score SDE): imputation, colour    replace
         Lugmayr et al. 2022, arXiv:2201.09865 (RePaint): back, and again      repaint
         Choi et al. 2021, arXiv:2108.02938 (ILVR): the low frequencies           ilvr
         Chung et al. 2022, arXiv:2209.14687 (DPS): gradient through D             dps
View     D(x, sigma) = E[x_0 | x = x_0 + sigma z] is all that is needed of a run, images
         in [-1, 1]: score = (D(x, sigma) - x) / sigma^2, x = x_t / sqrt(abar_t) of DDPM
Given    b = A x_0 + noise z with a linear A; P = A^+ A projects on what A sees. In x at
         level sigma the known part becomes x - P x + A^+ b + sigma P z        impute()
Differs  one view, not three time scales; corrector steps by sigma, not by norms; the
         last step gives D(x, sigma_N), no noise is left; fewer levels: RePaint 40
         (paper 250), DPS 100 (1000) with zeta for these, ald 30 x 10 (10 x 100); DPS
         puts in what is known at the end; ILVR filters by A, its authors by resizing

    python inpaint.py                       # trains a DDPM on digits, hides left halves
    python inpaint.py runs/ncsn-mnist --mask band --method ald     # see runs/*/inpaint/
    python inpaint.py runs/ddpm-mnist --task super --factor 4      # or deblur, denoise
    python inpaint.py --dataset colour-digits --task colorize
"""

import inspect
import math
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import common  # before torch: it sets how long idle threads spin

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch.fft import fftfreq, irfft2, rfft2, rfftfreq

import ddpm
import ncsn
import sde
from common import PATH, UserError, geometric_sigmas, karras_sigmas

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
    g = torch.Generator().manual_seed(seed)
    y, x = (torch.randint(n - n // 2 + 1, (), generator=g).item() for n in (H, W))
    holes = {
        "left": np.s_[..., : W // 2],
        "right": np.s_[..., W // 2 :],
        "top": np.s_[..., : H // 2, :],
        "bottom": np.s_[..., H // 2 :, :],
        "center": np.s_[..., H // 4 : H - H // 4, W // 4 : W - W // 4],
        "band": np.s_[..., W // 3 : W - W // 3],
        "horizontal": np.s_[..., H // 3 : H - H // 3, :],  # band
        "box": np.s_[..., y : y + H // 2, x : x + W // 2],
    }
    m = torch.ones(1, 1, H, W)
    if name in holes:
        m[holes[name]] = 0
    elif name == "random":
        g.manual_seed(seed)
        m = (torch.rand(m.shape, generator=g) < keep).float()
    else:
        (picture, *_) = common.read_picture(name)
        m = torch.from_numpy(picture.mean(0)[None, None] >= 128).float()
    h, w = m.shape[2:]
    if (h, w) != (H, W):
        raise UserError(f"--mask {name} is {w} x {h}: the images are {W} x {H}")
    if m.min() == m.max():
        raise UserError(f"--mask {name} is a single colour: white marks known pixels")
    return m


# ------------------------------------------------------------------------- the methods


def impute(x, op, b, sigma, z=None):
    """x at level sigma, with the known part replaced: x - P x + A^+ b + sigma P z. The
    noise in b is not added again; below its level b carries no further information."""
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
    """Score SDE, I.2 to I.4, sigma (N + 1,) falling to 0; T corrector steps per level,
    with ||z|| / ||score|| = sigma. Biased: the injected noise ignores the rest."""
    for t, s in pairwise(sigma):
        x = impute(step(x, D(x, t), t, s), op, b, s)
        for _ in range(T if s > op.noise else 0):
            alpha = 4 * (snr * s) ** 2  # Algorithm 4: x + e score + sqrt(2 e) z
            x = impute(langevin(D, x, s, alpha), op, b, s)
    return x


@torch.no_grad()
def repaint(D, b, op, x, sigma, U=7, jump=1):
    """RePaint, Algorithm 1, sigma (N + 1,) falling to 0; jump > 1: its section 4.2.
    It prints the noise of t for x_{t-1}; presumably q(x_{t-1} | x_0) is meant."""
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


SCRIPTS = {"ncsn": ncsn, "ddpm": ddpm, "sde": sde}
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
    p = common.Parser(__doc__)
    auto = "cuda" if common.CUDA else "cpu"
    add = p.add_argument
    add("run", nargs="?", type=PATH, help="folder of a trained run (or trains a DDPM)")
    add("--samples", type=int, default=10, help="test images (%(default)s)")
    add("--index", type=int, default=0, help="index of the first test image (0)")
    add("--completions", type=int, default=10, help="per image (%(default)s)")
    add("--image", nargs="+", type=PATH, help="your own pictures instead")
    add("--size", type=int, help="scale and crop pictures to SIZE x SIZE")
    add("--dataset", type=PATH, help="data set of the test images (the run's)")
    add("--data-dir", type=PATH, help="where data sets are stored (the run's)")
    add("--out", type=PATH, help="output folder (RUN/inpaint)")
    add("--device", default=auto, help="cpu, cuda, ... (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (0)")
    tasks = ["inpaint", "super", "deblur", "denoise", "colorize"]
    add("--task", choices=tasks, default="inpaint", help="what to do (%(default)s)")
    masks = "hide left, right, top, bottom, center, band, horizontal (band), box (at "
    masks += "a random place), random (pixels), or the black pixels of an image FILE"
    add("--mask", type=PATH, default="left", help=masks)
    add("--keep", type=float, default=0.25, help="share kept by --mask random (0.25)")
    add("--factor", type=int, default=4, help="super: FACTOR^2 pixels become one (4)")
    add("--blur", type=float, default=1.5, help="deblur: standard deviation in pixels")
    add("--noise", type=float, default=0.5, help="denoise: sigma; white is 1 (0.5)")
    auto = "auto: replace for denoise, else repaint"
    add("--method", choices=["auto", *METHODS], default="auto", help=auto)
    add("--sample-steps", type=int, help="noise levels (depends on the method)")
    add("--T", type=int, help="steps per level (ald 10, replace 1)")
    add("--U", type=int, help="repaint: passes per level (7; paper: 10)")
    add("--jump", type=int, help="repaint: levels per pass (1; paper: 10)")
    add("--zeta", type=float, help="dps: step size (1; paper: 0.3 to 1)")
    return p


def view(net, theirs):
    """(D, (sigma_min, sigma_max)) of a run of any script, for images in [-1, 1]."""
    D, (low, high) = SCRIPTS[theirs.script].denoiser(net, theirs)
    if theirs.script != "ncsn":
        return D, (low, high)

    def D_rescaled(x, sigma):  # NCSN's images are in [0, 1]
        return 2 * D((x + 1) / 2, sigma / 2) - 1

    return D_rescaled, (2 * low, 2 * high)


def trained(args):
    """Network and settings of the given run, or of a DDPM, trained now if there is
    none."""
    if not args.run:
        dataset = args.dataset or "digits"
        args.run = f"runs/ddpm-{Path(dataset).resolve().name}"
        if not Path(args.run, "ckpt.pt").exists():
            print(f"train  no run given: first a DDPM on {dataset}, in {args.run}")
            argv = ["--out", args.run, "--sample-steps", "50", "--device", args.device]
            argv += ["--dataset", dataset, "--data-dir", args.data_dir or "data"]
            argv += ["--size", str(args.size)] if args.size else []
            ddpm.main(argv)
    networks = {name: script.network for name, script in SCRIPTS.items()}
    return common.load(args.run, args.device, **networks)


def pictures(args, theirs):
    """(images uint8 (N, C, H, W), labels (N,) or []) to complete."""
    size = args.size or theirs.size
    if args.image:
        return torch.cat([own(f, size, *theirs.shape) for f in args.image]), []
    name, data_dir = args.dataset or theirs.dataset, args.data_dir or theirs.data_dir
    images, labels, _ = common.load_images(name, "test", data_dir, size)
    if list(images.shape[1:]) != theirs.shape:
        raise UserError(f"{name} is not of the run's shape {theirs.shape}: see --image")
    if args.index >= len(images):
        raise UserError(f"--index {args.index}: {name} has {len(images)} images")
    some = slice(args.index, args.index + args.samples)
    return images[some], [] if labels is None else labels[some]


def own(path, size, C, H, W):
    """The image uint8 (1, C, H, W) in a file. UserError if it does not fit the run."""
    (page, *_) = common.read_picture(path, size)
    image = common.as_images(torch.from_numpy(page)[None])
    c, h, w = image.shape[1:]
    if (h, w) != (H, W):
        raise UserError(f"--image {path} is {w} x {h}: --size, or make it {W} x {H}")
    if c > C:
        raise UserError(f"--image {path} is in colour, but the run is grey: convert it")
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
        raise UserError("--method ald cannot handle noisy measurements: choose another")
    parameters = inspect.signature(METHODS[method]).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty}
    names = "T", "U", "jump", "zeta"
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if given.keys() - options:
        raise UserError(f"--method {method} takes {list(options)} of {list(names)}")
    sigma = levels(method, low, high, args.sample_steps or LEVELS[method])
    if op.noise:  # b is a sample at this level: start there
        if not sigma[-2] < op.noise < sigma[0]:
            raise UserError(f"--noise must be in {sigma[-2]:.3g} ... {sigma[0]:.3g}")
        sigma = [op.noise] + [s for s in sigma if s < op.noise]
    return method, options | given, sigma


def save(path, images, given, x, frames, **rows):
    """PATH.png: truth, given, completions; PATH-process.gif: the first image's;
    PATH.npz: completions (N, K, H, W, C), truth (N, H, W, C), one entry per image."""
    sheet = torch.cat([images[:, None], given[:, None], x], dim=1)[:20, :12]
    picture = common.grid(sheet.flatten(0, 1), cols=sheet.shape[1])
    common.write(f"{path}.png", lambda f: picture.save(f, "PNG"))
    common.save_process([common.to_uint8(f) for f in frames], f"{path}-process")
    truth = images.permute(0, 2, 3, 1)
    completions = x.permute(0, 1, 3, 4, 2)
    rows |= {"completions": completions, "truth": truth}
    common.write(f"{path}.npz", lambda f: np.savez(f, **rows))
    print(f"saved  {path}.png, .npz, -process.gif")


def main(argv=()):
    args = flags().read(argv)
    with common.blame(f"--device {args.device} cannot be used here"):
        torch.empty(0, device=args.device)
    net, theirs = trained(args)
    D, (low, high) = view(net, theirs)
    print(f"run    {args.run}: {theirs.script}, {theirs.dataset}")
    images, labels = pictures(args, theirs)
    op, name, hidden = operator(args, *theirs.shape)
    method, options, sigma = plan(args, op, low, high)
    words = "".join(f", {k} = {v}" for k, v in options.items())
    print(f"given  {name}: {method} on {len(sigma)} levels{words} ...")
    N = len(images)
    chunk = 50 if "cuda" in args.device else 1  # images at once, always so many
    parts, frames = [], None
    for first in range(0, N, chunk):
        some = torch.arange(first, first + chunk).clamp(max=N - 1)
        x0 = images[some].to(args.device) / 127.5 - 1
        common.seed_all(args.seed, args.index + first)
        watch = common.Watch()
        given, x = complete(
            watch(D), x0, op, method, sigma, args.completions, **options
        )
        if not x.isfinite().all():
            raise UserError("the completions are not finite: give a smaller --zeta")
        frames = frames or [*watch.frames, x[0, :8].cpu()]
        parts.append((common.to_uint8(given), common.to_uint8(x)))
        print(f"sample {min(first + chunk, N)}/{N}   {watch.calls} evaluations each")
    given, x = (torch.cat(part)[:N] for part in zip(*parts))
    measures = measure(images, x, hidden)
    for key, v in measures.items():
        print(f"{key}: mean {v.mean():.3f}, min {v.min():.3f}, max {v.max():.3f}")
    path = f"{args.out or f'{args.run}/inpaint'}/{name}-{method}"
    save(path, images, given, x, frames, labels=labels, **measures)


if __name__ == "__main__":
    common.cli(main)
