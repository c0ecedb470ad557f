"""Controllable generation: fill in, sharpen, colour, deblur or denoise what is seen in part, with any trained run.

Papers   Song & Ermon 2019, arXiv:1907.05600: annealed Langevin dynamics with a mask           ald: Algorithm 2
         Song et al. 2021, arXiv:2011.13456: imputation, colour, predictor-corrector           replace: I.2, I.3
         Lugmayr et al. 2022, arXiv:2201.09865 (RePaint): steps back, and again                repaint: Algorithm 1
         Choi et al. 2021, arXiv:2108.02938 (ILVR): low frequencies of a reference             ilvr: Algorithm 1
         Chung et al. 2022, arXiv:2209.14687 (DPS): gradient through the denoiser              dps: Algorithm 1
View     D(x, sigma) = E[x_0 | x = x_0 + sigma z], images in [-1, 1], is all that is asked of an ncsn, ddpm or sde run;
         score = (D(x, sigma) - x) / sigma^2 (Tweedie), x = x_t / sqrt(abar_t) of a DDPM, noise sigma_1 > ... > sigma_N
Given    b = A x_0 + noise z with a linear A. P = A^+ A projects on what A sees: x_0 = A^+ b + (I - P) x_0, and what
         a method does to the known part of x at noise level sigma is x - P x + A^+ b + sigma P z            impute()
Differs  one view instead of three time scales; step sizes of the corrector by sigma, not by norms; the last step gives
         D(x, sigma_N), nowhere is noise left; zeta of DPS for fewer steps; see README, "What differs"

    python inpaint.py runs/ddpm-mnist                          # left halves: runs/ddpm-mnist/inpaint/*.png and .gif
    python inpaint.py runs/ncsn-mnist --mask band --method ald
    python inpaint.py runs/ddpm-mnist --task super --factor 4  # or deblur, denoise; colorize for a run on colours
    python inpaint.py --exact                                  # every method against closed forms, no run needed
    python inpaint.py --tint mnist                             # coloured digits to train a colour run on
"""
import argparse, csv, io, math, time
from pathlib import Path
from typing import Callable, NamedTuple
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
import common
import ddpm
import ncsn
import sde
import toy
from common import geometric_sigmas, karras_sigmas, require

# ----------------------------------------------------------------------------------------- one view of all runs
KINDS = {"ncsn": ncsn, "ddpm": ddpm, "sde": sde}

def view(ckpt, net=None, device="cpu"):
    """(D, (sigma_min, sigma_max)) of a checkpoint: the denoiser D(x, sigma) for images in [-1, 1], and the noise levels
    that it was trained on. net: instead of the checkpoint's averaged network."""
    kind, args = ckpt["script"], argparse.Namespace(**ckpt["args"])
    D = KINDS[kind].denoiser(ckpt, net, device)
    if kind == "ncsn":                                                     # images in [0, 1]: half of everything
        return lambda x, sigma: 2 * D((x + 1) / 2, sigma / 2) - 1, (2 * args.sigma_min, 2 * args.sigma_max)
    if kind == "ddpm":
        abar = ddpm.schedule(args.schedule, args.T)
        return D, tuple(((1 - abar[[1, -1]]) / abar[[1, -1]]).sqrt().tolist())
    return D, sde.sigma_range(sde.make_sde(args))

def load(ckpt, device):
    """The averaged network of a checkpoint, in bfloat16 where the hardware has it and the run did not decline."""
    args = argparse.Namespace(**ckpt["args"])
    net = KINDS[ckpt["script"]].network(args).to(device, memory_format=common.FORMAT["cuda" in device])
    try:
        net.load_state_dict(ckpt["ema"])
    except RuntimeError as e:
        raise common.UserError(f"ckpt.pt of {args.out} is of another network, perhaps of an earlier version") from e
    net.bf16 = args.precision != "fp32" and common.has_bf16(device)
    return net.eval().requires_grad_(False)

# ------------------------------------------------------------------------------------------------ what is given
class Operator(NamedTuple):
    """b = A(x) + noise z, with x (B, C, H, W); pinv: A^+, so that A^+ A is an orthogonal projection."""
    A: Callable
    pinv: Callable
    noise: float = 0.0

def masked(mask, noise=0.0):
    """Inpainting: mask (.., H, W) is 1 where the image is known. With noise and all known: denoising."""
    return Operator(lambda x: mask * x, lambda b: mask * b, noise)

def block_means(factor):
    """Super-resolution: the means of factor x factor pixels, and their repetition."""
    return Operator(lambda x: F.avg_pool2d(x, factor), lambda b: F.interpolate(b, scale_factor=factor))

def grey(channels):
    """Colorization: in an orthogonal basis whose first vector is (1, 1, 1) / sqrt(3) grey and colour are decoupled
    (Score SDE, I.3), and the first coefficient, the mean of the channels times sqrt(3), is known."""
    return Operator(lambda x: x.mean(1, keepdim=True), lambda b: b.expand(-1, channels, -1, -1))

def blurred(H, W, width, smallest=0.05):
    """Deblurring: Gaussian of the width in pixels, periodic; A^+ inverts the frequencies that are not damped below
    smallest, and knows nothing of the others."""
    f2 = torch.fft.fftfreq(H)[:, None] ** 2 + torch.fft.rfftfreq(W) ** 2                       # (H, W // 2 + 1)
    h = (-2 * (math.pi * width) ** 2 * f2).exp()
    inverse = torch.where(h >= smallest, 1 / h, 0)
    through = lambda x, h: torch.fft.irfft2(torch.fft.rfft2(x) * h.to(x.device), (H, W))
    return Operator(lambda x: through(x, h), lambda b: through(b, inverse))

def draw_mask(name, H, W, keep=0.5, seed=0):
    """The mask (1, 1, H, W), 1 where the image is known, 0 where it is to be filled in. UserError for a bad file."""
    m, g = torch.ones(1, 1, H, W), torch.Generator().manual_seed(seed)
    at = lambda n: int(torch.randint(n + 1, (1,), generator=g))
    y, x = (at(H - H // 2), at(W - W // 2)) if name == "box" else (H // 4, W // 4)
    holes = {"left": np.s_[:, :W // 2], "right": np.s_[:, W // 2:], "top": np.s_[:H // 2], "bottom": np.s_[H // 2:],
             "center": np.s_[y:y + H // 2, x:x + W // 2], "box": np.s_[y:y + H // 2, x:x + W // 2],
             "band": np.s_[:, W // 3:W - W // 3]}
    if name in holes:
        m[0, 0][holes[name]] = 0
    elif name == "random":
        m = (torch.rand(m.shape, generator=g) < keep).float()
    else:
        picture = toy.read_picture(name).convert("L")
        require(picture.size == (W, H), f"--mask {name} is {picture.size[0]} x {picture.size[1]}, the images are {W} x "
                f"{H}: draw it at their size")
        m = torch.from_numpy(np.array(picture) >= 128).float()[None, None]
    require(m.any(), f"--mask {name} leaves nothing known: white is known, black is filled in")
    require(not m.all(), f"--mask {name} hides nothing: white is known, black is filled in")
    return m

# --------------------------------------------------------------------------------------------------- the methods
def impute(x, op, b, sigma, z=None):
    """x at noise level sigma, what is known put in: x - P x + A^+ b + sigma P z. Noise that b has already is not added
    again; below its level nothing is known better than x knows it (and all methods but dps do no more than draw)."""
    if sigma < op.noise:
        return x
    z = torch.randn_like(x) if z is None else z
    return x + op.pinv(b - op.A(x - math.sqrt(sigma ** 2 - op.noise ** 2) * z))

def step(x, x0, t, s):
    """From noise level t to s < t, given x0 = D(x, t): x + (t^2 - s^2) score + sqrt(s^2 (t^2 - s^2) / t^2) z, Score SDE
    eq. (47), which is q(x_s | x_t, x_0) of DDPM, eqs. (6), (7)."""
    return x + (1 - s ** 2 / t ** 2) * (x0 - x) + s * math.sqrt(1 - s ** 2 / t ** 2) * torch.randn_like(x)

def langevin(D, x, sigma, alpha):
    """x + alpha / 2 score + sqrt(alpha) z."""
    return x + alpha / 2 * (D(x, sigma) - x) / sigma ** 2 + math.sqrt(alpha) * torch.randn_like(x)

@torch.no_grad()
def ald(D, b, op, x, sigma, eps=None, T=10):
    """NCSN, Algorithm 2, on falling levels sigma (L,), T steps on each; eps None: 0.4 sigma_L^2. Exact in the limit of
    many steps T, small eps and a small sigma_L; then E[x_0 | x], where the paper stops with the last noise."""
    eps = eps or 0.4 * sigma[-1] ** 2
    for s in sigma:
        alpha = eps * (s / sigma[-1]) ** 2                                 # line 3
        z = torch.randn_like(x)                                            # lines 4, 5: y~ = y + sigma_i z
        for _ in range(T):
            x = langevin(D, x, s, alpha)                                   # line 8
            x = impute(x, op, b, s, z)                                     # line 9, x <- (1 - m) x + m y~
    return impute(D(x, sigma[-1]), op, b, 0.0)

@torch.no_grad()
def replace(D, b, op, x, sigma, snr=0.16, T=1):
    """Score SDE, I.2 (and I.3, I.4): the known part is drawn from p_t(known | b) after each predictor and each of T
    corrector steps (Algorithms 2, 4, with ||z|| / ||score|| taken as sigma). sigma (N + 1,) falls to 0. Biased: the
    noise drawn for the known part knows nothing of the unknown one."""
    for t, s in zip(sigma, sigma[1:]):
        x = impute(step(x, D(x, t), t, s), op, b, s)
        for _ in range(T if s > op.noise else 0):
            x = impute(langevin(D, x, s, 4 * (snr * s) ** 2), op, b, s)    # Algorithm 4: x + e score + sqrt(2e) z
    return x

@torch.no_grad()
def repaint(D, b, op, x, sigma, U=7, jump=1):
    """RePaint, Algorithm 1; sigma (N + 1,) falls to 0. jump levels down and up again, U times: with jump 1 as printed,
    the longer ones as in its section 4.2. Printed for x_{t-1} is the noise of t; q(x_{t-1} | x_0) must be meant."""
    for i in range(0, len(sigma) - 1, jump):
        block = sigma[i:i + jump + 1]
        again = U if block[-1] > op.noise else 1                           # line 9: not in the last step
        for u in range(again):
            for t, s in zip(block, block[1:]):
                x = impute(step(x, D(x, t), t, s), op, b, s)               # lines 4 to 8, eq. (8)
            if u < again - 1:                                              # line 10, q(x_t | x_{t-1})
                x = x + math.sqrt(block[0] ** 2 - block[-1] ** 2) * torch.randn_like(x)
    return x

@torch.no_grad()
def ilvr(D, b, op, x, sigma):
    """ILVR, Algorithm 1, eq. (8): x <- x' + phi(y_s) - phi(x'), y_s the reference with noise. phi, a low-pass filter,
    is A if that gives images (blur, mask), else A^+ A; and if it is a projection this is replace without corrector."""
    phi = (lambda v: v) if b.shape == x.shape else op.pinv
    for t, s in zip(sigma, sigma[1:]):
        x = step(x, D(x, t), t, s)                                         # x' ~ p(x_{t-1} | x_t)
        if s >= op.noise:
            y = math.sqrt(s ** 2 - op.noise ** 2) * torch.randn_like(x)    # y_s ~ q(y_s | y), less y
            x = x + phi(b - op.A(x - y))
    return x

def dps(D, b, op, x, sigma, zeta=1.0):
    """DPS, Algorithm 1: an ancestral step, less zeta' times the gradient of ||b - A x0|| by x_t, back through D (the
    authors' code; zeta_i = zeta' / ||b - A x0|| as printed gives twice that). In the end, what is known is put in."""
    for t, s in zip(sigma, sigma[1:]):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            x0 = D(x, t)                                                   # line 4
            norm = (b - op.A(x0)).flatten(1).norm(dim=1)
            grad, = torch.autograd.grad(norm.sum(), x)
        scale = math.sqrt((1 + t ** 2) * (1 + s ** 2))                     # x_t = x / sqrt(1 + t^2): its gradient, and
        x = step(x, x0, t, s).detach() - zeta * scale * grad               # back from x_{t-1}; lines 6, 7
    return x if op.noise else impute(x, op, b, 0.0)

METHODS = {"ald": ald, "replace": replace, "repaint": repaint, "ilvr": ilvr, "dps": dps}

def levels(method, low, high, N):
    """N noise levels, as numbers: a geometric ladder down to 0.1 for ald, else Karras' down to 0.02 and then 0."""
    if method == "ald":
        return geometric_sigmas(high, max(low, 0.1), N).tolist()
    return karras_sigmas(N, max(low, 0.02), high).tolist()

# ------------------------------------------------------------------------------------- against closed forms
def mixture(means, covs, weights):
    """The exact D(x, sigma) of data sum_k w_k N(m_k, C_k): means (K, d), covs (K, d, d), weights (K,)."""
    lam, V = torch.linalg.eigh(covs)                                       # (K, d), (K, d, d)

    def D(x, sigma):
        p = torch.einsum("bkd,kde->bke", x.flatten(1)[:, None] - means, V)
        r = (weights.log() - ((p ** 2 / (lam + sigma ** 2)) + (lam + sigma ** 2).log()).sum(-1) / 2).softmax(1)
        x0 = means + torch.einsum("bke,kde->bkd", p * lam / (lam + sigma ** 2), V)             # of each component
        return (r[..., None] * x0).sum(1).view(x.shape)
    return D

def conditional(means, covs, weights, A, b, noise=0.0):
    """Mean (d,) and covariance of that data given b = A x + noise z, A (k, d), b (k,)."""
    S = A @ covs @ A.T + noise ** 2 * torch.eye(len(A))                    # (K, k, k)
    K, r = covs @ A.T @ torch.linalg.inv(S), b - means @ A.T
    m = means + (K @ r[..., None])[..., 0]
    w = (weights.log() - (torch.einsum("ki,kij,kj->k", r, torch.linalg.inv(S), r) + S.logdet()) / 2).softmax(0)
    mean = w @ m
    return mean, torch.einsum("k,kde->de", w, covs - K @ A @ covs + torch.einsum("kd,ke->kde", m - mean, m - mean))

def examples():
    """{name: (means, covs, weights)}, d = 8: a Gaussian of full covariance; two modes of which a half tells little."""
    g = torch.Generator().manual_seed(1)
    L, m = torch.randn(8, 8, generator=g), torch.randn(8, generator=g)
    mode = torch.tensor([0.4, 0.4, 0.6, 0.6, 0.4, 0.4, -0.6, 0.6])
    return {"gaussian": (m[None], (L @ L.T / 8 + 0.05 * torch.eye(8))[None], torch.ones(1)),
            "two modes": (torch.stack([mode, -mode]), 0.2 * torch.eye(8).expand(2, 8, 8), torch.tensor([0.7, 0.3]))}

def errors(data, op, method, sigma, n=4000, **options):
    """(error of the mean, of the covariance, evaluations) of n draws given b of one x_0 of the data, as images
    (1, 2, 4): |mean - exact| / sqrt(trace of the exact covariance), |cov - exact| / |exact|."""
    torch.manual_seed(0)
    means, covs, weights = data
    value, vectors = torch.linalg.eigh(op.pinv(op.A(torch.eye(8).view(8, 1, 2, 4))).flatten(1))          # of P
    A, calls, exact = vectors.T[value > 0.5], [], mixture(*data)
    x0 = (means[0] + torch.linalg.cholesky(covs[0]) @ torch.randn(8)).view(1, 1, 2, 4)
    b = op.A(x0 + op.noise * torch.randn_like(x0))
    mean, cov = conditional(*data, A, A @ op.pinv(b).flatten(), op.noise)
    D = lambda x, s: calls.append(s) or exact(x, s)
    b, x = b.expand(n, -1, -1, -1), sigma[0] * torch.randn(n, 1, 2, 4)
    x = METHODS[method](D, b, op, impute(x, op, b, sigma[0]), sigma, **options).flatten(1)
    error = (x.mean(0) - mean).norm() / cov.trace().sqrt(), (x.T.cov() - cov).norm() / cov.norm()
    return error[0].item(), error[1].item(), len(calls)

# (method, levels, options), each with about 300 evaluations, but for the way of repaint and ald to their limits
EXACT = [("ilvr", 300, {}), ("replace", 150, {}), ("replace", 43, {"T": 6}),
         ("dps", 300, {"zeta": 0.08}), ("dps", 300, {"zeta": 0.2}),
         ("repaint", 40, {}), ("repaint", 100, {"U": 10}), ("ald", 30, {}), ("ald", 30, {"T": 100})]

def report_exact():
    """--exact: a table of the errors of all methods on data whose conditional distribution is known."""
    print("half of 8 values given: errors of the conditional mean and covariance   " + "   ".join(examples()))
    for method, N, options in EXACT:
        sigma = levels(method, 0.02, 10.0 if method == "ald" else 20.0, N)
        rows = [errors(data, masked(draw_mask("right", 2, 4)), method, sigma, **options)
                for data in examples().values()]
        name = f"{method}, {N} levels" + "".join(f", {k} {v}" for k, v in options.items())
        text = "   ".join(f"{mean:.3f} {cov:.3f}" for mean, cov, _ in rows)
        print(f"{name:30s}{rows[0][2]:6d} evaluations   {text}", flush=True)

def given():
    """x_2 given x_1 = 0.1: to put a noisy x_1 into every step is far off; to go back and forth in each, nearer."""
    p, op, sigma = toy.MIX, masked(toy.image([[1.0, 0.0]])), levels("repaint", 0.02, 20.0, 100)
    D, b = lambda x, s: x + s ** 2 * p.score(x, s), toy.image([[0.1, 0.0]]).expand(4000, -1, -1, -1)
    draws = {U: repaint(D, b, op, 20 * torch.randn(4000, 2, 1, 1), sigma, U)[:, 1].flatten() for U in (1, 3, 10, 20)}
    w = toy.Mixture(p.w, p.m[:, :1, 0, 0]).parts(b[:1, :1])[0].softmax(1)[0]                   # of the modes, given x_1
    exact = toy.Mixture(w, p.m[:, 1:, 0, 0])
    pdf = lambda x: exact.log_density(toy.image(x[:, None])).exp()
    upper = (w * torch.special.ndtr(exact.m.flatten() / exact.v ** 0.5)).sum()
    show = lambda U: (toy.density(f"x_2, each step {U} time{'s'[:U - 1]}", draws[U], pdf, -2.5, 2.5), [])
    return toy.join(show(1), show(20), toy.sweep(
        "times", "P(x_2 > 0)", draws, {"exact": draws}, lambda draws, U: (draws[U] > 0).double(), upper))

@torch.no_grad()
def mala(log_density, score, x, a, T):
    """(x, share accepted (B,)) after T Metropolis-adjusted Langevin steps (Roberts & Tweedie 1996) from x (B, C, H, W):
    y = x + a s + sqrt(2a) z is taken with probability p(y) q(x | y) / (p(x) q(y | x)): p is exact, whatever a."""
    log_q = lambda y, x: -(y - x - a * score(x)).square().sum((1, 2, 3)) / (4 * a)             # of the step to y from x
    accepted = 0
    for _ in range(T):
        y = x + a * score(x) + math.sqrt(2 * a) * torch.randn_like(x)
        ratio = log_density(y) + log_q(x, y) - log_density(x) - log_q(y, x)
        take = torch.rand(len(x), device=x.device).log() < ratio           # (B,)
        x, accepted = torch.where(take.view(-1, 1, 1, 1), y, x), accepted + take / T
    return x, accepted

def metropolis():
    """Metropolis' test takes away the error of the step; where modes are far apart only labels help."""
    p, start, label = toy.MIX, torch.full((4000, 2, 1, 1), -1.0), toy.MIX.w.multinomial(4000, replacement=True)
    square = lambda x: (x - p.m[1 - toy.right(x).long()]) ** 2             # of the distance from the mode
    plain = lambda r: toy.anneal(p.net, p(4000), [1e-3], 0.1 * r / 1e-6, 200, denoise=False)
    tested = {r: mala(p.log_density, p.score, p(4000), 0.1 * r, 200) for r in (0.05, 0.1, 0.3, 0.6, 0.9, 1.2, 1.5)}
    walk = lambda label: toy.right(toy.anneal(p.net, start, [0.01], 500, 400, label=label))    # a = 0.05
    panels, rows = toy.join(
        toy.sweep("r", "variance in a mode", tested, {"Langevin": 0.5, "MALA": 0}, lambda k, r: square(
            plain(r) if k else tested[r][0]), lambda k, r: 0.1 / (1 - k * r)),
        toy.sweep("r", "accepted", tested, {"MALA": tested}, lambda tested, r: tested[r][1], math.nan))
    return panels, [*rows, toy.row("share at (1, 1), started at (-1, -1)", walk(None), 0.2),
                    toy.row("share at (1, 1), with the score of a label drawn for each", walk(label), 0.2)]

# -------------------------------------------------------------------------------------------- from flags to files
def tint(images, seed=0):
    """Grey uint8 images (N, 1, H, W) in a random hue each, (N, 3, H, W). The mean of the channels is half of the grey:
    it tells nothing of the hue."""
    turn = torch.rand(len(images), 1, generator=torch.Generator().manual_seed(seed)) + torch.arange(3) / 3
    return (images * (0.5 + 0.35 * (2 * math.pi * turn).cos())[:, :, None, None]).round().byte()

def report_tint(name, data_dir):
    """--tint: 5000 training and 100 test images, tinted, as pictures in DATA_DIR/NAME-tinted and NAME-tinted-test."""
    for split, n, end in (("train", 5000, ""), ("test", 100, "-test")):
        images, _ = toy.load_images(name, data_dir, split)
        require(images.shape[1] == 1, f"--tint {name} has colours already")
        folder = Path(data_dir) / f"{name}-tinted{end}"
        for i, image in enumerate(tint(images[:n])):
            toy.save_picture(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / f"{i:05d}.png")
        print(f"saved  {min(n, len(images))} pictures in {folder}")

def pick_device(name):
    """The device of --device: auto is cuda, then mps, then cpu. UserError if it cannot be used here."""
    auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=(name := auto if name == "auto" else name))
    except (RuntimeError, AssertionError) as e:
        raise common.UserError(f"--device {name} cannot be used here ({str(e).splitlines()[0]})") from e
    return name

def test_images(args, saved):
    """(images uint8 (N, C, H, W), labels (N,) or None): --image, or --samples test images of the run from --index."""
    C, H, W = saved.shape
    if not args.image:
        images, labels = toy.load_images(saved.dataset, args.data_dir, "test", saved.size)
        require(list(images.shape[1:]) == saved.shape, f"{saved.dataset} is no longer what the run was trained on, "
                f"images of {C} x {H} x {W}: name pictures with --image")
        some = slice(args.index, args.index + args.samples)
        require(args.index < len(images), f"--index {args.index}: {saved.dataset} has {len(images)} test images")
        return images[some], labels if labels is None else labels[some]
    pictures = []
    for path in args.image:
        picture = toy.read_picture(path, args.size or saved.size)
        w, h = picture.size
        require((w, h) == (W, H), f"--image {path} is {w} x {h}, the run's images are {W} x {H}: give --size {H}, or "
                "resize it")
        require(C == 3 or picture.mode == "L", f"--image {path} is in colour, the run's images are grey: make it grey")
        pictures.append(torch.from_numpy(np.array(picture.convert("L" if C == 1 else "RGB"))).view(H, W, C))
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous(), None

def operator(args, C, H, W, device):
    """(Operator, name of what was done, hidden (1, 1, H, W): 1 where a pixel is not known as it is)."""
    hidden = torch.ones(1, 1, H, W)
    if args.task == "inpaint":
        m = draw_mask(args.mask, H, W, args.keep, args.seed)
        return masked(m.to(device)), f"inpaint-{Path(args.mask).stem}", 1 - m
    if args.task == "super":
        require(H % args.factor == W % args.factor == 0, f"--factor {args.factor} does not divide images of {H} x {W}")
        return block_means(args.factor), f"super-{args.factor}x", hidden
    if args.task == "colorize":
        require(C == 3, "--task colorize is for a run on colours, the run's images are grey: see --tint")
        return grey(C), "colorize", hidden
    if args.task == "deblur":
        return blurred(H, W, args.blur), f"deblur-{args.blur:g}", hidden
    return masked(hidden.to(device), args.noise), f"denoise-{args.noise:g}", hidden

def complete(D, x0, op, method, sigma, K, frames=None, **options):
    """(what was given (N, ...), K completions (N, K, ...), evaluations) of images x0 (N, C, H, W) in [-1, 1]. frames: a
    list that gets x and D(x, sigma), of one completion of each of 8 images, at every tenth evaluation."""
    b = op.A(x0)
    b = (b + op.noise * torch.randn_like(b)).repeat_interleave(K, 0)
    calls = []
    def watched(x, s):
        out = D(x, s).clamp(-1, 1)                                         # as images are
        if frames is not None and len(calls) % 10 == 0:
            frames.append(torch.stack([x[::K][:8], out[::K][:8]], 1).flatten(0, 1).detach().cpu())
        calls.append(s)
        return out
    x = sigma[0] * torch.randn_like(x0.repeat_interleave(K, 0))
    x = METHODS[method](watched, b, op, impute(x, op, b, sigma[0]), sigma, **options)
    given = (b if b.shape == x.shape else op.pinv(b))[::K]
    return given, x.unflatten(0, (len(x0), K)), len(calls)

def measure(x0, x, hidden, labels=None, judge=None):
    """A row an image, x0 (N, ...), x (N, K, ...) uint8: PSNR in dB of the best completion and of their mean; standard
    deviation of a hidden pixel over completions (white is 1); share of completions with the label, their labels."""
    a, b, rows = x0.float() / 255, x.float() / 255, []
    psnr = lambda a, b: -10 * (a - b).square().flatten(-3).mean(-1).clamp(min=1e-10).log10()
    std = (b.std(1) * hidden).flatten(1).sum(1) / hidden.sum() / x.shape[2] if x.shape[1] > 1 else torch.zeros(len(x))
    found = common.features(judge, x.flatten(0, 1))[1].argmax(1).view(x.shape[:2]) if judge else None
    for i in range(len(x)):
        best, mean = psnr(a[i], b[i]).max(), psnr(a[i], b[i].mean(0))
        rows.append({"psnr_best": best.item(), "psnr_mean": mean.item(), "std": std[i].item()})
        if judge:
            rows[-1] |= {"label": labels[i].item(), "right": (found[i] == labels[i]).float().mean().item(),
                         "labels": " ".join(map(str, found[i].tolist()))}
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    add = p.add_argument
    add("run", nargs="?", help="folder of a run of ncsn.py, ddpm.py or sde.py: RUN/ckpt.pt")
    add("--task", choices=["inpaint", "super", "deblur", "denoise", "colorize"], default="inpaint", help="what to do")
    add("--mask", default="left", help="what inpaint hides: left, right, top or bottom half, center (a square of half "
        "the size), box (the same anywhere, by --seed), band (the middle third of the columns), random (single "
        "pixels), or FILE, a picture of the images' size: white is known, black is filled in")
    add("--keep", type=float, default=0.25, help="share of the pixels that --mask random leaves")
    add("--factor", type=int, default=4, help="of --task super: means of FACTOR x FACTOR pixels are given")
    add("--blur", type=float, default=1.5, help="of --task deblur: width of the Gaussian in pixels")
    add("--noise", type=float, default=0.5, help="of --task denoise: sigma, for images in [-1, 1]")
    add("--method", choices=["auto", *METHODS], default="auto", help="auto: repaint, and replace to denoise")
    add("--sample-steps", type=int, help="noise levels (None: ald 30, replace 140, repaint 40, ilvr 250, dps 100)")
    add("--sigma-max", type=float, help="noise to start from (None: ald 10, others 20, or the run's largest)")
    add("--T", type=int, help="Langevin steps a level (None: ald 10, replace 1; papers: 100, 1)")
    add("--eps", type=float, help="of ald: step size at the last level (None: 0.4 sigma_L^2; paper: 0.2 sigma_L^2)")
    add("--snr", type=float, default=0.16, help="of replace: step of the corrector (paper: 0.16 for VE)")
    add("--U", type=int, default=7, help="of repaint: times that a level is passed (paper: 10)")
    add("--jump", type=int, default=1, help="of repaint: levels down and up again (paper: 10, of 250)")
    add("--zeta", type=float, default=1.0, help="of dps: step size zeta' (paper: 0.3 to 1, of 1000 levels)")
    add("--samples", type=int, default=10, help="test images of the run's data set")
    add("--index", type=int, default=0, help="the first of them")
    add("--image", nargs="+", help="instead of test images: your own pictures, of the run's size (or see --size)")
    add("--size", type=int, help="centre-crop and resize --image to so many pixels squared")
    add("--completions", type=int, default=10, help="of each image")
    add("--data-dir", default="data", help="where data sets are kept")
    add("--out", help="folder of the pictures (None: RUN/inpaint)")
    add("--npz", action="store_true", help="also write all completions: completions, uint8 (N, K, H, W, C), and truth")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or the name of one")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--exact", action="store_true", help="no run: errors of all methods where the answer is known")
    add("--tint", metavar="DATASET", help="no run: write tinted pictures of a grey DATASET, to train a colour run on")
    args = p.parse_args()
    if args.exact:
        return report_exact()
    if args.tint:
        return report_tint(args.tint, args.data_dir)
    for k, v in vars(args).items():
        ok = isinstance(v, (str, bool, list, type(None))) or 0 < v < (1 if k == "keep" else math.inf)
        require(ok or v == 0 and k in ("seed", "index", "T"), f"--{k.replace('_', '-')} {v} is out of range")
    require(args.run, "name the folder of a run, as in: python inpaint.py runs/ddpm-mnist")
    require((path := Path(args.run) / "ckpt.pt").exists(), f"there is no {path}: name the folder of a run")
    ckpt = common.load_checkpoint(path)
    require(ckpt["script"] in KINDS, f"{path} was made by {ckpt['script']}.py: only {', '.join(KINDS)} runs are known")
    device, saved = pick_device(args.device), argparse.Namespace(**ckpt["args"])
    require(getattr(saved, "transform", "none") == "none" and not getattr(saved, "train_classifier", False),
            f"{path} is no model of images in [-1, 1]: train without --transform and --train-classifier")
    common.keep_memory()
    D, (low, high) = view(ckpt, load(ckpt, device), device)
    images, labels = test_images(args, saved)
    op, name, hidden = operator(args, *saved.shape, device)
    method = args.method if args.method != "auto" else "replace" if op.noise else "repaint"
    require(method != "ald" or not op.noise, "--method ald knows no noise in what is given: take another for denoise")
    N = args.sample_steps or {"ald": 30, "replace": 140, "repaint": 40, "ilvr": 250, "dps": 100}[method]
    options = {"ald": {"T": args.T or 10, "eps": args.eps}, "repaint": {"U": args.U, "jump": args.jump}, "ilvr": {},
               "replace": {"T": 1 if args.T is None else args.T, "snr": args.snr}, "dps": {"zeta": args.zeta}}[method]
    sigma = levels(method, low, min(high, args.sigma_max or (10.0 if method == "ald" else 20.0)), N)
    if op.noise:                                                           # b is a draw of this level: begin there
        require(sigma[-2] < op.noise < sigma[0], f"--noise {op.noise} is not in {sigma[-2]:.3g} ... {sigma[0]:.3g}")
        sigma = [op.noise] + [s for s in sigma if s < op.noise]
    print(f"run    {args.run}: {ckpt['script']}, {saved.dataset}, {' x '.join(map(str, saved.shape))}, on {device}\n"
          f"given  {name}   method {method} {options}, {N} levels from {sigma[0]:.3g}", flush=True)
    torch.manual_seed(args.seed)
    parts, frames, start = [], [], time.perf_counter()
    for x0 in images.split(max(1, 100 // args.completions)):
        parts.append(complete(D, x0.to(device) / 127.5 - 1, op, method, sigma, args.completions,
                              None if parts else frames, **options))
        done = sum(len(part[0]) for part in parts)
        seconds = time.perf_counter() - start
        left = seconds / 60 * (len(images) / done - 1)
        print(f"draw   {done}/{len(images)} images   {left:.1f} min left", flush=True)
    given, x = (toy.to_uint8(torch.cat([part[k] for part in parts]).cpu(), -1.0) for k in (0, 1))
    finite = all(part[1].isfinite().all() for part in parts)
    require(finite, "the completions are not finite: let the method take smaller steps, or a smaller --zeta")
    out = Path(args.out or Path(args.run) / "inpaint") / f"{name}-{method}"
    sheet = torch.cat([images[:20, None], given[:20, None], x[:20, :10]], 1)
    toy.save_picture(toy.grid(sheet.flatten(0, 1) / 255, cols=sheet.shape[1]), f"{out}.png")
    final = x[:8, 0] / 127.5 - 1
    toy.save_process([*frames, torch.stack([final, final], 1).flatten(0, 1)], f"{out}.gif", -1.0)
    if args.npz:
        with common.aside(f"{out}.npz") as f:
            np.savez(f, completions=x.permute(0, 1, 3, 4, 2).numpy(), truth=images.permute(0, 2, 3, 1).numpy())
    judge = common.classifier(saved.dataset, args.data_dir, device)[0] if labels is not None else None
    names = args.image or range(args.index, args.index + len(images))
    rows = [{"image": n, **row} for n, row in zip(names, measure(images, x, hidden, labels, judge))]
    show = lambda row: "   ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print("\n".join(show(row) for row in rows))
    mean = {k: float(np.mean([row[k] for row in rows])) for k, v in rows[0].items() if isinstance(v, float)}
    print(f"mean   {show(mean)}   {parts[0][2]} evaluations   {seconds:.1f} s")
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    with common.aside(f"{out}.csv") as f:
        f.write(table.getvalue().encode())
    print(f"saved  {out}.png, .gif, .csv{', .npz' if args.npz else ''}")

if __name__ == "__main__":
    common.cli(main)
