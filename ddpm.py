"""Denoising diffusion probabilistic models (DDPM) on small images, and successors.

Papers   Ho, Jain & Abbeel 2020, arXiv:2006.11239 (equation numbers without a name)
         Song, Meng & Ermon 2020, arXiv:2010.02502 (DDIM): --sampler ddim
         Nichol & Dhariwal 2021, arXiv:2102.09672 (improved DDPM): --objective hybrid
         Bao et al. 2022, arXiv:2201.06503 (Analytic-DPM): --variance analytic
         Salimans & Ho 2022, arXiv:2202.00512: --predict v
         Hoogeboom et al. 2023, arXiv:2301.11093 (simple diffusion): --schedule shifted
         Ho & Salimans 2022, arXiv:2207.12598 (classifier-free guidance): --guidance
         Karras et al. 2024, arXiv:2406.02507 (autoguidance): --guide
Forward  q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 1 ... T        eq. (4)
Loss     L_simple = E || eps - eps_theta(x_t, t) ||^2 (or v)       Algorithm 1, eq. (14)
Sample   x_{t-1} = (x_t - beta_t / sqrt(1 - abar_t) eps_theta) / sqrt(alpha_t)
                   + sigma_t z                                   Algorithm 2, eq. (11)
Bound    -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0 in bits/dim       eqs. (5), (13)
Differs  mean over pixels instead of sum; the shifted cosine schedule; the network
         predicts v, not eps, with the loss on v, which weights eps by 1 / abar_t; steps
         with sigma_t = sqrt(1 / abar_t - 1) near 1.6 are trained more often (--focus);
         a smaller U-Net; no dropout, no flips; Muon, learning-rate decay; averaged
         weights, decay 0.999 (paper: 0.9999); x_0 is clipped, as in the authors' code,
         with DDIM too, but not in L_0. Their decoder has a tanh where eq. (13) has the
         normal distribution function, and a floor of 1e-12. DDIM's steps run from T to
         1; its quadratic ones, which stop at 800 of 1000, are left out. Analytic-DPM's
         gamma is estimated from 50 images

    python ddpm.py --dataset mnist     # trains, then see runs/ddpm-mnist/samples.png
    python ddpm.py --dataset mnist --paper --out runs/paper     # the paper's settings
    python ddpm.py --dataset mnist --sample-only --sampler ddim --sample-steps 50
    python ddpm.py --dataset mnist --sample-only --evaluate-bound 100     # bits/dim
"""

import math
from functools import partial
from itertools import pairwise

import common  # before torch: it sets how long idle threads spin

# isort: split
import torch

from common import ON_OFF, UserError, each, hide, per_sample

SCHEDULES = ["linear", "cosine", "shifted"]
VARIANCES = ["beta", "beta-tilde", "learned", "analytic"]

# --paper undoes what "Differs" lists; improved DDPM's settings with its objectives
PAPER = {"predict": "eps", "schedule": "linear", "T": 1000}
PAPER |= {"focus": False, "optimizer": "adam", "lr": 2e-4, "constant_lr": True}
IMPROVED = PAPER | {"schedule": "cosine", "T": 4000, "lr": 1e-4}

# ------------------------------------------------------------------ the forward process


def schedule(name, T):
    """abar_t for t = 0 ... T, (T + 1,) float64; abar_0 = 1 is "no noise yet".

    linear: section 4, times 1000 / T; cosine: improved DDPM, eq. (17); shifted: cosine
    with each sigma doubled (Hoogeboom et al.). UserError for others or small T.
    """
    if name not in SCHEDULES or T <= (20 if name == "linear" else 1):
        raise UserError(f"there is no schedule {name} of --T {T} steps")
    if name == "linear":
        beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
    else:
        t = torch.arange(T + 1, dtype=torch.float64) / T
        f = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)  # eq. (17)
    abar = torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])
    if name == "shifted":
        abar = abar / (4 - 3 * abar)  # sigma^2 = (1 - abar) / abar is 4 times as large
    return abar


def scales(abar_t, x):
    """a and b of x_t = a x_0 + b eps, eq. (4), shaped to multiply x; abar_t (B,)."""
    return per_sample(abar_t.sqrt(), x), per_sample((1 - abar_t).sqrt(), x)


def diffuse(x0, abar_t):
    """x_t = a x_0 + b eps of q(x_t | x_0), eq. (4), and eps, a, b; abar_t (B,)."""
    a, b = scales(abar_t, x0)
    eps = torch.randn_like(x0)
    return a * x0 + b * eps, eps, a, b


def target(x0, eps, a, b, predict):
    """The regression target of the network, by name; v: arXiv:2202.00512."""
    return {"eps": eps, "x0": x0, "v": a * eps - b * x0}[predict]


def eps_and_x0(out, x_t, a, b, predict):
    """(eps, x0) from the network's output; x_t = a x_0 + b eps, v = a eps - b x_0."""
    if predict == "eps":
        return out, (x_t - b * out) / a
    if predict == "x0":
        return (x_t - a * out) / b, out
    return b * x_t + a * out, a * x_t - b * out  # v, arXiv:2202.00512


# ---------------------------------------------------------------- training: Algorithm 1


def loss(net, x0, abar, label=None, predict="eps", focus=False):
    """L_simple, eq. (14), a mean over pixels; x0 (B, ...), images in [-1, 1] or points.

    predict: what net(x_t, t, label) returns and is trained on, eps, x0 or v. focus: see
    common.focus. One in ten labels is dropped (-1): the network learns with and without
    them.
    """
    T, B = len(abar) - 1, len(x0)
    t = torch.randint(1, T + 1, (B,), device=x0.device)  # line 3: t ~ {1, ..., T}
    if focus:
        p = common.focus(((1 - abar[1:]) / abar[1:]).sqrt())
        t = p.multinomial(B, replacement=True) + 1
    x_t, eps, a, b = diffuse(x0, abar[t])  # line 4, eq. (4)
    out = net(x_t, t, hide(label))
    return (target(x0, eps, a, b, predict) - out).square().mean()  # line 5, eq. (14)


# ------------------------------------------------------ sampling: Algorithm 2, and DDIM


@torch.no_grad()
def sample(eps_theta, x, abar):
    """Algorithm 2 with sigma_t^2 = beta_t, from x = x_T ~ N(0, I), (B, ...)."""
    T = len(abar) - 1
    for t in range(T, 0, -1):
        alpha_t = abar[t] / abar[t - 1]
        beta_t = 1 - alpha_t
        z = torch.randn_like(x) if t > 1 else torch.zeros_like(x)  # line 3
        eps = eps_theta(x, t)
        mean = (x - beta_t / (1 - abar[t]).sqrt() * eps) / alpha_t.sqrt()  # eq. (11)
        x = mean + beta_t.sqrt() * z  # line 4
    return x


def subsequence(T, S):
    """[T, ..., 1, 0]: S of the T steps, evenly spaced and rounded, and 0."""
    if not 1 <= S <= T:
        raise UserError(f"--sample-steps {S} is not between 1 and T = {T}")
    return torch.linspace(T, 1, S, dtype=torch.float64).round().long().tolist() + [0]


@torch.no_grad()
def ancestral(f, x, abar, tau, variance="beta", gamma=None):
    """Algorithm 2 on the falling steps tau = [T, ..., 0] (improved DDPM, eq. 19).

    f(x, t) is eps, or for variance "learned" the pair (eps, raw); see reverse_variance,
    and for "analytic", which needs gamma, second_moment.
    """
    for t, s in pairwise(tau):  # from x_t to x_s
        out = f(x, t)
        eps, raw = out if variance == "learned" else (out, None)
        alpha = abar[t] / abar[s]
        x = (x - (1 - alpha) / (1 - abar[t]).sqrt() * eps) / alpha.sqrt()  # eq. (11)
        if s > 0:
            gamma_t = None if gamma is None else gamma[t]
            sigma2 = reverse_variance(variance, abar[t], abar[s], raw, gamma_t)
            x = x + sigma2.sqrt() * torch.randn_like(x)
    return x


@torch.no_grad()
def ddim(eps_theta, x, abar, tau, eta=0.0):
    """DDIM, eq. (12), along the falling steps tau; eta = 0: no noise, 1: DDPM, beta~.

    Rising from 0 to T, with eta = 0, it encodes x_0 as its x_T. At T = 1000 the cosine
    schedules' 1 / sqrt(abar_T) is 2e4 and 4e4: it needs a predictor that clips x_0.
    """
    for t, s in pairwise(tau):  # from x_t to x_s
        eps = eps_theta(x, max(t, 1))  # step 0 was not trained, 1 is nearest
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()  # "predicted x_0"
        sigma = 0.0
        if eta:
            beta_tilde = (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
            sigma = eta * beta_tilde.sqrt()  # eq. (16)
        rest = (1 - abar[s] - sigma**2).clamp(min=0).sqrt()
        x = abar[s].sqrt() * x0 + rest * eps  # eq. (12)
        if eta:
            x = x + sigma * torch.randn_like(x)
    return x


def predictor(
    net, abar, predict="eps", label=None, w=0.0, guide=None, clip=False, learned=False
):
    """The network as the samplers call it: eps_theta(x_t, t), with t a number.

    w: guidance, see common.guided. clip: x_0 to [-1, 1], for images. learned: the pair
    (eps, raw) of a network with two channels for one.
    """
    guided_net = common.guided(net, label, w, guide)

    def eps_theta(x, t):
        C = x.shape[1]
        out = guided_net(x, each(t, x))
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        eps, x0 = eps_and_x0(out[:, :C], x, a, b, predict)
        if clip:
            eps = (x - a * x0.clamp(-1, 1)) / b
        return (eps, out[:, C:]) if learned else eps

    return eps_theta


# ------------------------------------------------- variances, and the variational bound


def posterior(x0, x_t, abar_t, abar_s):
    """Mean and variance beta~ of q(x_s | x_t, x_0), s < t, eqs. (6), (7)."""
    alpha = abar_t / abar_s
    beta = 1 - alpha
    mean_0 = abar_s.sqrt() * beta / (1 - abar_t) * x0  # eqs. (6), (7)
    mean_t = alpha.sqrt() * (1 - abar_s) / (1 - abar_t) * x_t
    return mean_0 + mean_t, (1 - abar_s) / (1 - abar_t) * beta


def reverse_variance(kind, abar_t, abar_s, raw=None, gamma=None, beta_tilde=None):
    """sigma_t^2 of the step from t to s. beta, beta-tilde: section 3.2.

    learned: improved DDPM, eq. (15), with v = (raw + 1) / 2 as in its code. analytic:
    beta~ + c^2 Cov(x_0 | x_t), c = sqrt(abar_s) beta / (1 - abar_t), by gamma of
    second_moment (Analytic-DPM, Theorem 1), Cov in the bounds of its eqs. (11), (12);
    its code bounds the last noise by 4/255 sqrt(pi/2), with the cosine schedule 2/255.
    beta_tilde: if not by formula.
    """
    beta = 1 - abar_t / abar_s
    if beta_tilde is None:
        beta_tilde = (1 - abar_s) / (1 - abar_t) * beta
    if kind == "beta":
        return beta
    if kind == "beta-tilde":
        return beta_tilde
    if kind == "analytic":
        cov = ((1 - abar_t) / abar_t * (1 - gamma)).clamp(1e-8, 1)  # eqs. (11), (12)
        more = abar_s * (beta / (1 - abar_t)) ** 2 * cov
        return beta_tilde + more
    v = (raw + 1) / 2
    return (v * beta.log() + (1 - v) * beta_tilde.log()).exp()  # eq. (15)


@torch.no_grad()
def second_moment(eps_theta, x0, abar, tau):
    """gamma_t = E || eps_theta(x_t, t) ||^2 / d at the steps tau, (T + 1,), else 1.

    From x0 (N, ...): (1 - abar_t) times Analytic-DPM's Gamma_t, eq. (8), whose score is
    -eps_theta / sqrt(1 - abar_t).
    """
    gamma = torch.ones_like(abar)
    for t in tau:
        if t > 0:
            x_t, *_ = diffuse(x0, abar[t].expand(len(x0)))
            gamma[t] = eps_theta(x_t, t).square().mean()  # eq. (8)
    return gamma


def log_decoder(x0, mean, sigma):
    """log of N(mean, sigma^2) over the bin of width 2/255 around x0, eq. (13).

    The outer bins are open.
    """
    upper = torch.where(x0 > 0.999, 1e3, x0 + 1 / 255)
    lower = torch.where(x0 < -0.999, -1e3, x0 - 1 / 255)
    a = (lower - mean) / sigma
    b = (upper - mean) / sigma
    right = a + b > 0  # Phi is nearly 1 there; the mirror image has the same value
    a, b = torch.where(right, -b, a), torch.where(right, -a, b)
    log_a = torch.special.log_ndtr(a)
    log_b = torch.special.log_ndtr(b)
    return log_b + (-torch.expm1(log_a - log_b)).log()  # log(Phi(b) - Phi(a))


def bound_term(out, x0, x_t, t, abar, predict, variance, gamma=None, clip=False):
    """(L_{t-1} in bits/dim (B,), predicted x_0); t (B,), out = net(x_t, t), eq. (5).

    KL(q(x_{t-1} | x_t, x_0) || p_theta); for t = 1 the decoder, eq. (13). beta~_1 = 0
    is taken as beta~_2; the authors' code does so in L_0 for "beta" too.
    clip: x_0 to [-1, 1] for t > 1 (the decoder's outer bins are open). In abar's type.
    """
    C = x0.shape[1]
    x0 = x0.to(abar)
    x_t = x_t.to(abar)
    abar_t = per_sample(abar[t], x0)
    abar_s = per_sample(abar[t - 1], x0)
    last = per_sample(t, x0) == 1
    a, b = scales(abar[t], x0)
    _, x0_hat = eps_and_x0(out[:, :C], x_t, a, b, predict)
    if clip:
        x0_hat = torch.where(last, x0_hat, x0_hat.clamp(-1, 1))
    mean, _ = posterior(x0_hat, x_t, abar_t, abar_s)
    mean_q, beta_tilde = posterior(x0, x_t, abar_t, abar_s)
    beta_tilde_2 = (1 - abar[1]) / (1 - abar[2]) * (1 - abar[2] / abar[1])
    beta_tilde = torch.where(last, beta_tilde_2, beta_tilde)
    gamma_t = None if gamma is None else per_sample(gamma[t], x0)
    raw = out[:, C:].to(abar)
    sigma2 = reverse_variance(variance, abar_t, abar_s, raw, gamma_t, beta_tilde)
    ratio = (beta_tilde + (mean_q - mean) ** 2) / sigma2
    kl = 0.5 * (sigma2.log() - beta_tilde.log() + ratio - 1)  # eq. (5)
    l = torch.where(last, -log_decoder(x0, mean, sigma2.sqrt()), kl)  # eq. (13)
    return l.flatten(1).mean(1) / math.log(2), x0_hat


def hybrid_loss(net, x0, abar, label=None, predict="eps", lam=0.001):
    """L_simple + lambda L_vlb, improved DDPM, eq. (16).

    L_vlb, in bits/dim as in the authors' code, is T times the term of a random t; it
    trains only the variance, since the mean in it is detached.
    """
    T, B = len(abar) - 1, len(x0)
    t = torch.randint(1, T + 1, (B,), device=x0.device)
    x_t, eps, a, b = diffuse(x0, abar[t])
    out, raw = net(x_t, t, hide(label)).chunk(2, dim=1)
    simple = (target(x0, eps, a, b, predict) - out).square().mean()
    frozen = torch.cat([out.detach(), raw], dim=1)
    l, _ = bound_term(frozen, x0, x_t, t, abar, predict, "learned")
    return simple + lam * T * l.mean()  # eq. (16)


def vlb_loss(net, x0, abar, label=None, predict="eps"):
    """L_vlb = E[L_t / p_t], p_t like sqrt(E[L_t^2]): improved DDPM, eq. (18), in bits.

    net.history (T, 10): the last ten L_t of each t, inf at first; p is uniform until it
    is full. L_T, which has no trainable parameters, is left out.
    """
    T = len(abar) - 1
    p = net.history.square().mean(1).sqrt()  # eq. (18)
    known = p.isfinite().all()
    p = torch.where(known, 0.999 * p / p.sum() + 0.001 / T, 1 / T)
    t = p.multinomial(len(x0), replacement=True) + 1
    x_t, *_ = diffuse(x0, abar[t])
    out = net(x_t, t, hide(label))
    l, _ = bound_term(out, x0, x_t, t, abar, predict, "learned")
    l = l.to(p.dtype)
    kept = net.history[t - 1, 1:]
    net.history[t - 1] = torch.cat([kept, l.detach()[:, None]], dim=1)
    return (l / p[t - 1]).mean()


LOSSES = {"simple": loss, "hybrid": hybrid_loss, "vlb": vlb_loss}


@torch.no_grad()
def evaluate_bound(net, images, abar, N, *options, clip=True):
    """(L_T in bits/dim, rows (T, 3)) of uint8 images: L_{t-1} in bits/dim, its variance
    over images, the mean squared error of x_0; N fresh images for each t. options:
    those of bound_term, from predict on."""
    square = images.double().div(127.5).sub(1).square().mean()
    abar_T = abar[-1].cpu()
    nats = (abar_T * (square - 1) - (1 - abar_T).log()) / 2  # L_T
    rows = []
    for t in range(1, len(abar)):
        i = torch.randint(len(images), (N,))
        x0 = images[i].to(abar.device) / 127.5 - 1
        steps = torch.full((N,), t, device=abar.device)
        x_t, *_ = diffuse(x0, abar[steps])
        out = net(x_t, steps)
        l, x0_hat = bound_term(out, x0, x_t, steps, abar, *options, clip=clip)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        mse = (x0_hat - x0).square().mean()
        rows.append(torch.stack([l.mean(), l.var(), mse]))
    return nats.item() / math.log(2), torch.stack(rows).cpu()


# ------------------------------------------------------------------ a run, from outside


def flags():
    """The command line: the shared flags and this script's own."""
    p = common.arguments(
        "ddpm", __doc__, lambda args: PAPER if args.objective == "simple" else IMPROVED
    )
    add = p.settled.add_argument
    add("--T", type=int, default=1000, help="diffusion steps (1000; improved: 4000)")
    words = "(%(default)s; paper: linear)"
    add("--schedule", choices=SCHEDULES, default="shifted", help=words)
    add("--predict", choices=["eps", "x0", "v"], default="v", help="(v; paper: eps)")
    words = "(%(default)s) hybrid and vlb also learn sigma_t"
    add("--objective", choices=LOSSES, default="simple", help=words)
    add = p.sampling.add_argument
    add("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="(%(default)s)")
    add("--sample-steps", type=int, help="sampling steps, of the T (all)")
    add("--variance", choices=VARIANCES, help="sigma_t^2 (beta; learned if trained so)")
    add("--eta", type=float, default=0.0, help="DDIM: 0 deterministic, 1 as DDPM (0)")
    add("--clip", action=ON_OFF, default=True, help="x_0 to [-1, 1]")
    add = p.add_argument
    add("--evaluate-bound", type=int, help="the bound in bits/dim, N images per step")
    return p


def network(args):
    """The U-Net for these settings; twice the channels if it learns the variance."""
    C = args.shape[0]
    out = C if args.objective == "simple" else 2 * C
    net = common.UNet(C, args.width, args.n_classes, out)
    if args.objective == "vlb":
        net.register_buffer("history", torch.full((args.T, 10), math.inf))
    return net


def load(folder, device="cpu", label=None, w=0.0):
    """(eps_theta, abar, image shape) of a run, for sample() and ddim()."""
    net, args = common.load(folder, device, ddpm=network)
    abar = schedule(args.schedule, args.T)
    f = predictor(net, abar, args.predict, label, w, clip=True)
    return f, abar, args.shape


def denoiser(net, args):
    """(D, (sigma_min, sigma_max)) of a trained run; images in [-1, 1].

    D(y, sigma, label=None) = E[x_0 | y = x_0 + sigma z], sigma a number or (B,): x_t =
    sqrt(abar_t) y at sigma^2 = (1 - abar_t) / abar_t, t real, between two steps.
    """
    abar = schedule(args.schedule, args.T)[1:]
    log_sigmas = ((1 - abar) / abar).log() / 2  # of t = 1 ... T, rising

    def D(y, sigma, label=None):
        table = log_sigmas.to(y)
        log_sigma = each(sigma, y).log()
        i = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
        part = (log_sigma - table[i - 1]) / (table[i] - table[i - 1])
        t = i + part.clamp(0, 1)  # (B,), 1 <= t <= T
        a = 1 / (1 + per_sample(sigma, y) ** 2).sqrt()  # sqrt(abar_t)
        b = per_sample(sigma, y) * a
        out = net(a * y, t, label)[:, : y.shape[1]]
        return eps_and_x0(out, a * y, a, b, args.predict)[1]

    return D, (log_sigmas[0].exp().item(), log_sigmas[-1].exp().item())


# ------------------------------------------------------------------ from flags to files


def report_bound(args, net, abar, variance, gamma):
    """--evaluate-bound: prints a line, writes OUT/bound.csv: one row per step, with
    rate and distortion of section 4.3."""
    images, _ = common.data_of(args, "test")
    net.dtype = torch.float32
    torch.backends.cudnn.allow_tf32 = False
    N = args.evaluate_bound
    print(f"bound  {N} test images at each of {args.T} steps ...")
    gamma = None if gamma is None else gamma.to(abar)
    options = args.predict, variance, gamma
    prior, rows = evaluate_bound(net, images, abar, N, *options, clip=args.clip)
    if not rows.isfinite().all():
        raise UserError("the bound is not finite: train the network longer")
    L, var, mse = rows.T
    rate = prior + L.sum() - L.cumsum(0)  # information about x_0 in x_t, section 4.3
    t = torch.arange(1, args.T + 1)
    error = (var / N).sqrt()
    rmse = 127.5 * mse.sqrt()
    table = torch.stack([t, L, error, rate, rmse], dim=1)
    names = "t,bits_per_dim,standard_error,rate,rmse_in_grey_levels"
    common.write_csv(f"{args.out}/bound.csv", names, table)
    parts = f"L_T {prior:.3g}   L_1..T-1 {L[1:].sum():.4f}   L_0 {L[0]:.4f}"
    total = prior + L.sum()
    bits = f"{total:.4f} +- {error.norm():.4f} bits/dim"
    print(f"bound  {variance}: {parts}   sum {bits}")


def variance_of(args):
    """--variance, by default "beta", or "learned" if it was. UserError for flags that
    contradict each other."""
    learned = args.objective != "simple"
    if args.variance and args.sampler == "ddim":
        raise UserError("--variance applies to --sampler ddpm only")
    if args.variance == "learned" and not learned:
        raise UserError("--variance learned: train with --objective hybrid or vlb")
    if args.eta and args.sampler != "ddim":
        raise UserError("--eta applies to --sampler ddim only")
    return args.variance or ("learned" if learned else "beta")


def analytic_gamma(args, net, abar, tau):
    """second_moment of 50 training images."""
    images, _ = common.data_of(args)
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x0 = images[pick[:50]].to(args.device) / 127.5 - 1
    f = predictor(net, abar, args.predict)
    return second_moment(f, x0, abar, tau)


def main(argv=()):
    args = common.start(flags(), argv)
    variance = variance_of(args)
    abar = schedule(args.schedule, args.T)
    tau = subsequence(args.T, args.sample_steps or args.T)
    images, labels = (None, None) if args.sample_only else common.data_of(args)
    same = "n_classes", "T", "schedule", "predict"
    guide, _ = common.load_guide(args, *same, ddpm=network)
    run = common.Run(args, network(args))
    gamma = None

    def draw(index, watch, sampler=args.sampler, tau=tau):
        x = torch.randn(len(index), *args.shape, device=args.device)  # line 1
        label = common.labels_of(args, index)
        learned = sampler == "ddpm" and variance == "learned"
        options = label, args.guidance, guide, args.clip, learned
        f = predictor(run.ema, abar, args.predict, *options)
        if sampler == "ddim":
            return ddim(watch(f), x, abar, tau, args.eta)
        if variance == "beta" and len(tau) == len(abar):
            return sample(watch(f), x, abar)  # Algorithm 2 as printed
        return ancestral(watch(f), x, abar, tau, variance, gamma)

    few = subsequence(args.T, min(50, args.T))
    quick = partial(draw, sampler="ddim", tau=few)
    abar_device = abar.to(args.device)
    objective = LOSSES[args.objective]
    if args.objective == "simple":
        objective = partial(loss, focus=args.focus)
    for x0, label in run.batches(images, labels):  # Algorithm 1, lines 1 and 6
        x0 = x0 * (2 / 255) - 1  # line 2
        l = objective(run.net, x0, abar_device, label, args.predict)  # lines 3 to 5
        run.update(l)  # line 5: a gradient step
        if run.step in run.previews:
            common.save_samples(args, quick, run.step)

    common.seed_all(args.seed)
    if variance == "analytic":
        steps = range(args.T + 1) if args.evaluate_bound else tau
        gamma = analytic_gamma(args, run.ema, abar, steps)
    if args.evaluate_bound:
        report_bound(args, run.ema, abar_device, variance, gamma)
    else:
        common.save_samples(args, draw)


if __name__ == "__main__":
    common.cli(main)
