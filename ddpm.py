"""Denoising diffusion probabilistic models (DDPM) on small images, and their heirs.

Papers   Ho, Jain & Abbeel 2020, arXiv:2006.11239 (equation numbers without a name)
         Song, Meng & Ermon 2020, arXiv:2010.02502 (DDIM): --sampler ddim
         Nichol & Dhariwal 2021, arXiv:2102.09672 (improved DDPM): --objective hybrid
         Bao et al. 2022, arXiv:2201.06503 (Analytic-DPM): --variance analytic
         Salimans & Ho 2022, arXiv:2202.00512: --predict v
         Hoogeboom et al. 2023, arXiv:2301.11093 (simple diffusion): --schedule shifted
         Ho & Salimans 2022, arXiv:2207.12598 (classifier-free guidance): --guidance
         Karras et al. 2024, arXiv:2406.02507 (autoguidance): --guide
Forward  q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 1 ... T        eq. (4)
Loss     L_simple = E || eps - eps_theta(x_t, t) ||^2            Algorithm 1, eq. (14)
Sample   x_{t-1} = (x_t - beta_t / sqrt(1 - abar_t) eps_theta) / sqrt(alpha_t)
                   + sigma_t z                                   Algorithm 2, eq. (11)
Bound    -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0 in bits/dim       eqs. (5), (13)
Differs  mean over pixels instead of sum; the shifted cosine schedule; the network
         returns v, not eps, and is compared with v, which weighs eps by 1 / abar_t; a
         smaller U-Net; Muon, and a learning rate that decays; x_0 is clipped, as in the
         authors' code. Their decoder has a tanh where eq. (13) has the normal
         distribution function, and a floor of 1e-12. DDIM's quadratic steps, which stop
         at 800 of 1000, are left out

    python ddpm.py --dataset mnist     # trains, then see runs/ddpm-mnist/samples.png
    python ddpm.py --dataset mnist --sample-only --sampler ddim --sample-steps 50
    python ddpm.py --dataset mnist --sample-only --evaluate-bound 100     # bits/dim
"""

import math
from functools import partial
from itertools import pairwise

import torch

import common
from common import COUNT, UserError, each, hide, number, per_sample, say

SCHEDULES = ["linear", "cosine", "shifted"]
VARIANCES = ["beta", "beta-tilde", "learned", "analytic"]

# ------------------------------------------------------------------ the forward process


def schedule(name, T):
    """abar_t for t = 0 ... T, (T + 1,) float64; abar_0 = 1 is "no noise yet".

    linear: section 4, times 1000 / T; cosine: improved DDPM, eq. (17); shifted: that
    with each sigma doubled (Hoogeboom et al.). UserError for others, or too small a T.
    """
    if name not in SCHEDULES:
        raise UserError(f"there is no schedule {name}: {' or '.join(SCHEDULES)}")
    if T <= (20 if name == "linear" else 1):
        raise UserError(f"--T {T} is too few for the {name} schedule")
    beta = common.cosine_betas(T)
    if name == "linear":
        beta = common.linear_betas(T, 0.1 / T, 20 / T)
    abar = torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])  # cosine: eq. (17)
    if name == "shifted":
        abar = abar / (4 - 3 * abar)  # sigma^2 = (1 - abar) / abar is 4 times as large
    return abar


def check_steps(abar, tau=()):
    """ValueError unless abar_0 = 1 > abar_1 > ... > abar_T, and the steps tau fall."""
    if abar[0] != 1 or not (abar[1:] < abar[:-1]).all():
        raise ValueError("abar must be abar_0 = 1 > abar_1 > ... > abar_T: schedule()")
    if any(t <= s for t, s in pairwise(tau)):
        raise ValueError("tau must fall, as in [1000, 980, ..., 1, 0]: subsequence()")


def scales(abar_t, x):
    """a and b of x_t = a x_0 + b eps, eq. (4), shaped to multiply x; abar_t (B,)."""
    return per_sample(abar_t.sqrt(), x), per_sample((1 - abar_t).sqrt(), x)


def diffuse(x0, abar_t):
    """x_t = a x_0 + b eps of q(x_t | x_0), eq. (4), and eps, a, b; abar_t (B,)."""
    a, b = scales(abar_t, x0)
    eps = torch.randn_like(x0)
    return a * x0 + b * eps, eps, a, b


def target(x0, eps, a, b, predict):
    """What the network is compared with, by its name; v is of arXiv:2202.00512."""
    return {"eps": eps, "x0": x0, "v": a * eps - b * x0}[predict]


def eps_and_x0(out, x_t, a, b, predict):
    """(eps, x0) from the network's output; x_t = a x_0 + b eps, v = a eps - b x_0."""
    if predict == "eps":
        return out, (x_t - b * out) / a
    if predict == "x0":
        return (x_t - a * out) / b, out
    return b * x_t + a * out, a * x_t - b * out  # v, arXiv:2202.00512


# ---------------------------------------------------------------- training: Algorithm 1


def loss(net, x0, abar, label=None, predict="eps"):
    """L_simple, eq. (14), a mean over pixels; x0 (B, ...), images in [-1, 1] or points.

    predict: what net(x_t, t, label) returns, and is compared with, eps, x0 or v. One in
    ten labels is hidden (-1): one network learns with and without them.
    """
    T, B = len(abar) - 1, len(x0)
    t = torch.randint(1, T + 1, (B,), device=x0.device)  # line 3: t ~ {1, ..., T}
    x_t, eps, a, b = diffuse(x0, abar[t])  # line 4, eq. (4)
    out = net(x_t, t, hide(label))
    return (target(x0, eps, a, b, predict) - out).square().mean()  # line 5, eq. (14)


# ------------------------------------------------------ sampling: Algorithm 2, and DDIM


@torch.no_grad()
def sample(eps_theta, x, abar):
    """Algorithm 2 with sigma_t^2 = beta_t, from x = x_T ~ N(0, I), (B, ...)."""
    check_steps(abar)
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
    check_steps(abar, tau)
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
    """DDIM, eq. (12), along the falling steps tau; eta = 0: no noise, 1: DDPM's beta~.

    Rising from 0 to T, with eta = 0, it encodes x_0 as its x_T. At T = 1000 the cosine
    schedules' 1 / sqrt(abar_T) is 2e4 and 4e4: it needs a predictor that clips x_0.
    """
    check_steps(abar, tau if eta else ())
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
    net, abar, predict="eps", label=None, w=0.0, guide=None, clip=True, learned=False
):
    """The network as the samplers call it: eps_theta(x_t, t), t a number.

    w: classifier-free guidance, eq. (6) of its paper; or, with a guide, a network like
    this one but worse, autoguidance. clip: x_0 to [-1, 1], as images are. learned: the
    pair (eps, raw) of a network with two channels for one.
    """
    if w and label is None and guide is None:
        raise ValueError("guidance needs labels (B,), or a guide")

    def eps_theta(x, t):
        steps = torch.full((len(x),), t, device=x.device)
        C = x.shape[1]
        out = net(x, steps, label)
        out, raw = out[:, :C], out[:, C:]
        if w:
            if guide:
                worse = guide(x, steps, label)
            else:
                worse = net(x, steps, torch.full_like(label, -1))
            out = (1 + w) * out - w * worse[:, :C]  # eq. (6)
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        eps, x0 = eps_and_x0(out, x, a, b, predict)
        if clip:
            eps = (x - a * x0.clamp(-1, 1)) / b
        return (eps, raw) if learned else eps

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
    its code keeps the last noise below 4/255 sqrt(pi/2). beta_tilde: if not by formula.
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
    right = a + b > 0  # there Phi is nearly 1: the mirror image is as likely
    a, b = torch.where(right, -b, a), torch.where(right, -a, b)
    log_a = torch.special.log_ndtr(a)
    log_b = torch.special.log_ndtr(b)
    return log_b + (-torch.expm1(log_a - log_b)).log()  # log(Phi(b) - Phi(a))


def bound_term(out, x0, x_t, t, abar, predict, variance, gamma=None, clip=False):
    """(L_{t-1} in bits/dim (B,), predicted x_0); t (B,), out = net(x_t, t), eq. (5).

    KL(q(x_{t-1} | x_t, x_0) || p_theta); for t = 1 the decoder, eq. (13). beta~_1 = 0
    is taken as beta~_2; the authors' code does so in L_0 for "beta" too: 0.4 bits more.
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
    trains the variance only: the mean in it is detached.
    """
    T, B = len(abar) - 1, len(x0)
    t = torch.randint(1, T + 1, (B,), device=x0.device)
    x_t, eps, a, b = diffuse(x0, abar[t])
    out, raw = net(x_t, t, hide(label)).chunk(2, dim=1)
    simple = (target(x0, eps, a, b, predict) - out).square().mean()
    frozen = torch.cat([out.detach(), raw], dim=1)
    l, _ = bound_term(frozen, x0, x_t, t, abar, predict, "learned")
    return simple + lam * T * l.mean()  # eq. (16)


def vlb_loss(net, x0, abar, history, label=None, predict="eps"):
    """L_vlb = E[L_t / p_t], p_t like sqrt(E[L_t^2]): improved DDPM, eq. (18), in bits.

    history (T, 10): the last ten L_t of each t, inf before; p is uniform until all are
    there. L_T, which has no weights, is left out.
    """
    T = len(abar) - 1
    p = history.square().mean(1).sqrt()  # eq. (18)
    known = p.isfinite().all()
    p = torch.where(known, 0.999 * p / p.sum() + 0.001 / T, 1 / T)
    t = p.multinomial(len(x0), replacement=True) + 1
    x_t, *_ = diffuse(x0, abar[t])
    out = net(x_t, t, hide(label))
    l, _ = bound_term(out, x0, x_t, t, abar, predict, "learned")
    l = l.to(p.dtype)
    kept = history[t - 1, 1:]
    history[t - 1] = torch.cat([kept, l.detach()[:, None]], dim=1)
    return (l / p[t - 1]).mean()


LOSSES = {"simple": loss, "hybrid": hybrid_loss, "vlb": vlb_loss}


@torch.no_grad()
def evaluate_bound(net, images, abar, N, *options, clip=True):
    """(L_T in bits/dim, rows (T, 3)) of uint8 images: L_{t-1} in bits/dim, its variance
    over images, the mean squared error of x_0; N images drawn anew for each t. options:
    of bound_term, from predict on."""
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
    """The command line: what all scripts share, and the papers' own."""
    p = common.arguments(__doc__)
    add = p.settled.add_argument
    add("--T", type=COUNT, default=1000, help="steps of diffusion (paper: 1000)")
    words = "(%(default)s; paper: linear)"
    add("--schedule", choices=SCHEDULES, default="shifted", help=words)
    add("--predict", choices=["eps", "x0", "v"], default="v", help="(v; paper: eps)")
    words = "(%(default)s) the others learn sigma_t too"
    add("--objective", choices=LOSSES, default="simple", help=words)
    add = p.add_argument
    add("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="(%(default)s)")
    add("--sample-steps", type=COUNT, help="draw with so many of the T steps (all)")
    add("--variance", choices=VARIANCES, help="sigma_t^2 (beta, or learned if it was)")
    add("--eta", type=number(float, 0, 1), default=0.0, help="noise of DDIM (0)")
    add("--no-clip", action="store_true", help="do not clip x_0 to [-1, 1]")
    add("--evaluate-bound", type=number(int, 2), help="bits/dim, so many images a step")
    add("--interpolate", action="store_true", help="OUT/interpolate.png of test images")
    return p


def network(args):
    """The U-Net of a run's settings; two channels for one if it learns the variance."""
    learned = args.objective != "simple"
    return common.unet(args, out=args.shape[0] * (2 if learned else 1))


KIND = {"ddpm": (flags, network)}


def load(folder, device="cpu", label=None, w=0.0):
    """(eps_theta, abar, shape of an image) of a run, for sample() and ddim()."""
    run = common.load_checkpoint(folder, KIND)
    abar = schedule(run.args.schedule, run.args.T)
    f = predictor(run.net.to(device), abar, run.args.predict, label, w)
    return f, abar, run.args.shape


def denoiser(run, device="cpu"):
    """(D, (sigma_min, sigma_max)) of a checkpoint; images in [-1, 1].

    D(y, sigma, label=None) = E[x_0 | y = x_0 + sigma z], sigma a number or (B,): x_t =
    sqrt(abar_t) y at sigma^2 = (1 - abar_t) / abar_t, t real, between two steps.
    """
    net = run.net.to(device)
    abar = schedule(run.args.schedule, run.args.T)[1:]
    table = ((1 - abar) / abar).log() / 2  # log sigma of t = 1 ... T, rising
    table = table.float().to(device)

    def D(y, sigma, label=None):
        sigma = each(sigma, y)
        log_sigma = sigma.log()
        i = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
        low = table[i - 1]
        part = (log_sigma - low) / (table[i] - low)
        t = i + part.clamp(0, 1)  # (B,), 1 <= t <= T
        a = per_sample(1 / (1 + sigma**2).sqrt(), y)  # sqrt(abar_t)
        b = per_sample(sigma, y) * a
        out = net(a * y, t, label)[:, : y.shape[1]]
        return eps_and_x0(out, a * y, a, b, run.args.predict)[1]

    return D, (table[0].exp().item(), table[-1].exp().item())


# ------------------------------------------------------------------ from flags to files


def report_bound(args, net, abar, variance, gamma):
    """--evaluate-bound: a line, OUT/bound.csv (a row a step), rate-distortion.png."""
    images, N, out = common.test_images(args), args.evaluate_bound, args.out
    common.full_precision(net)
    gamma = None if gamma is None else gamma.to(abar)
    say(f"bound  {N} test images at each of {args.T} steps ...")
    options = args.predict, variance, gamma
    clip = not args.no_clip
    prior, rows = evaluate_bound(net, images, abar, N, *options, clip=clip)
    if not rows.isfinite().all():
        raise UserError("the bound is not finite: train the network longer")
    L, var, mse = rows.T
    rate = prior + L.sum() - L.cumsum(0)  # what is known of x_0 from x_t, section 4.3
    rmse = 127.5 * mse.sqrt()
    header = ["t", "bits_per_dim", "standard_error", "rate", "rmse_in_grey_levels"]
    table = zip(range(1, args.T + 1), L, (var / N).sqrt(), rate, rmse)
    common.save_csv(f"{out}/bound.csv", header, table)
    curve = {"predicted x_0": list(zip(rate.tolist(), rmse.tolist()))}
    names = "bits/dim sent", "rms, grey levels"
    common.plot(f"{out}/rate-distortion.png", curve, *names)
    parts = f"L_T {prior:.3g}   L_1..T-1 {L[1:].sum():.4f}   L_0 {L[0]:.4f}"
    total = prior + L.sum()
    error = (var.sum() / N).sqrt()
    say(f"bound  {variance}: {parts}   sum {total:.4f} +- {error:.4f} bits/dim")


def check(args):
    """UserError for flags that contradict each other; sets what to draw with."""
    learned = args.objective != "simple"
    if args.variance and args.sampler == "ddim":
        raise UserError("--variance is that of --sampler ddpm")
    args.variance = args.variance or ("learned" if learned else "beta")
    if args.variance == "learned" and not learned:
        raise UserError("--variance learned: train with --objective hybrid or vlb")
    if args.eta and args.sampler != "ddim":
        raise UserError("--eta is the noise of --sampler ddim")
    if args.objective == "vlb" and args.world > 1:
        raise UserError("--objective vlb keeps a history of its loss: use one process")


def analytic_gamma(args, run, net, abar, tau):
    """second_moment of 50 training images."""
    images, _ = common.training_data(args, run)
    g = torch.Generator().manual_seed(0)
    pick = torch.randperm(len(images), generator=g)[:50]
    x0 = images[pick].to(args.device) / 127.5 - 1
    f = predictor(net, abar, args.predict, clip=False)
    return second_moment(f, x0, abar, tau)


def main(argv=None):
    args, run = common.start(KIND, argv)
    check(args)
    guide = common.load_guide(args, KIND, ("T", "schedule", "predict"))
    abar = schedule(args.schedule, args.T)  # the samplers' table, and the loss's
    table = abar.to(args.device)
    tau = subsequence(args.T, args.sample_steps or args.T)
    gamma = None

    def draw(index, watch):
        label = common.labels_of(args, index)
        learned = args.sampler == "ddpm" and args.variance == "learned"
        options = label, args.guidance, guide and guide.net, not args.no_clip, learned
        f = watch(predictor(net, abar, args.predict, *options))
        x = torch.randn(len(index), *args.shape, device=args.device)
        if args.sampler == "ddim":
            return ddim(f, x, abar, tau, args.eta)
        if args.variance == "beta" and len(tau) == len(abar):
            return sample(f, x, abar)
        return ancestral(f, x, abar, tau, args.variance, gamma)

    def preview(net, n):  # quickly
        label = common.labels_of(args, torch.arange(n))
        x = torch.randn(n, *args.shape, device=args.device)
        steps = subsequence(args.T, min(50, args.T))
        return ddim(predictor(net, abar, args.predict, label), x, abar, steps)

    def objective(net, x0, label):
        options = {"history": history} if extra else {}
        of = LOSSES[args.objective]
        return of(net, x0, table, label=label, predict=args.predict, **options)

    if args.sample_only:
        net = common.prepare(run.net, args)
    else:
        data = common.training_data(args, run)
        history = torch.full((args.T, 10), math.inf, device=args.device)
        extra = [history] if args.objective == "vlb" else []
        options = {"run": run, "preview": preview, "extra": extra}
        net = common.train(args, network(args), objective, data, **options)
    if common.rank() > 0:
        return
    common.seed_all(args.seed)
    if args.variance == "analytic":
        steps = range(args.T + 1) if args.evaluate_bound else tau
        gamma = analytic_gamma(args, run, net, abar, steps)
    if args.evaluate_bound:
        report_bound(args, net, table, args.variance, gamma)
    elif args.interpolate:
        images = common.test_images(args, or_training=True)
        f = predictor(net, abar, args.predict, clip=not args.no_clip)
        tau = subsequence(args.T, min(args.sample_steps or 200, args.T))
        encode = partial(ddim, f, abar=abar, tau=tau[::-1])
        decode = partial(ddim, f, abar=abar, tau=tau)
        common.interpolate(args, images, encode, decode)
    else:
        name = "" if args.sampler == "ddpm" else "-ddim"
        common.finish(args, draw, len(tau) - 1, name)


if __name__ == "__main__":
    common.cli(main)
