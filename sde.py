"""Score-based modelling through stochastic differential equations, on small images.

Papers   Song et al. 2021, arXiv:2011.13456 (equation numbers without a name)
         Song, Durkan, Murray & Ermon 2021, arXiv:2101.09258 (ScoreFlow):
         --weighting likelihood
         Jolicoeur-Martineau et al. 2021, arXiv:2105.14080: --sampler adaptive
         Karras et al. 2022, arXiv:2206.00364 (EDM): --sde edm, --sampler heun
         Lu et al. 2022, arXiv:2211.01095 (DPM-Solver++): --sampler dpm
         Lipman et al. 2022, arXiv:2210.02747 (flow matching), and Liu et al. 2022,
         arXiv:2209.03003 (rectified flow): --sde flow, --weighting flow
         Ho & Salimans 2022, arXiv:2207.12598 (classifier-free guidance): --guidance
         Karras et al. 2024, arXiv:2406.02507 (autoguidance): --guide RUN, a weaker run;
         or a classifier, trained with --train-classifier, for eq. (14)
Forward  dx = f(x, t) dt + g(t) dw, so x(t) = a(t) x(0) + s(t) z      eqs. (5), (29)
Loss     E_t lambda(t) E || s_theta(x(t), t) - grad log p_0t(x(t) | x(0)) ||^2,
         lambda = s^2 (--weighting paper); by default EDM's, for all SDEs   eq. (7)
Sample   dx = [f - g^2 s_theta] dt + g dw, from T down to 0                 eq. (6)
ODE      dx = [f - g^2 s_theta / 2] dt has the same p_t(x); the integral of its
         divergence gives log p(x)                                   eqs. (13), (39)
Network  one for all: in y = x / a = x(0) + sigma z, sigma = s / a, all these SDEs add
         the same noise; D(y; sigma) = E[x(0) | y] as in EDM's Table 1 with
         sigma_data = 1. So one network samples with any of them: --sample-only --sde
Differs  mean over pixels instead of sum; the loss, which is EDM's for all SDEs, with a
         sigma mostly near 1.6 (--focus); a smaller U-Net, given log sigma where EDM has
         log(sigma) / 4; Muon, learning-rate decay, averaged weights, decay 0.999
         (paper: 0.9999); images are dequantised in training too; D is clipped to [-1,
         1] in sampling; beta_i, G_i are those of the exact forward transition between
         two times, N gaps from T to t_min (the authors' Euler-Maruyama has steps of 1 /
         N on N - 1 gaps); they correct before they predict, the algorithms after; heun
         has EDM's grid, 50 steps and churn 25 (18 and 0), the samplers with --grid
         times even in atan(sigma / 2), not in t; VE's paper has images in [0, 1]: its
         sigmas 0.01 to 50 are 0.02 to 100 here, and eq. (29)'s -sigma^2(0) is left out
         as in its code; E[x(0) | x(t_min)] is returned, rounded down to a grey level

    python sde.py --dataset mnist       # trains, then see runs/sde-mnist/samples.png
    python sde.py --dataset mnist --paper --out runs/paper      # the paper's settings
    python sde.py --dataset mnist --sample-only --evaluate-bits 100  # exact bits/dim
    python sde.py --dataset mnist --sample-only --sampler ancestral --sample-steps 1000
"""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import common  # before torch: it sets how long idle threads spin

# isort: split
import torch
import torch.nn.functional as F

from common import ON_OFF, UserError, each, hide, karras_sigmas, per_sample

# --paper undoes what "Differs" lists, by --sde
PAPER = {"weighting": "paper", "optimizer": "adam", "lr": 2e-4, "constant_lr": True}
PAPER |= {"sampler": "pc", "sample_steps": 1000, "grid": "t", "clip": False}
PAPER |= {"snr": 0.01, "focus": False}
EDM_PAPER = {"weighting": "edm", "sampler": "heun", "sample_steps": 18, "churn": 0.0}
PAPERS = {
    "ve": PAPER | {"snr": 0.16, "sigma_min": 0.02, "sigma_max": 100.0},
    "edm": PAPER | EDM_PAPER | {"lr": 1e-3},
    "flow": PAPER | {"weighting": "flow", "sampler": "ode"},  # rectified flow's
}

# --------------------------------------- the SDEs; t and what depends on it: (B,) or ()


class VE:
    """Variance exploding, limit of NCSN: dx = sqrt(d sigma^2 / dt) dw, eqs. (9), (31).

    prior: standard deviation of x(T); t_min: where sampling ends.
    """

    def __init__(self, sigma_min=0.01, sigma_max=34.0, t_min=1e-5):
        self.sigma_min, self.ratio = sigma_min, sigma_max / sigma_min
        self.t_min, self.T, self.prior = t_min, 1.0, sigma_max

    def kernel(self, t):
        """a and s of p_0t(x(t) | x(0)) = N(a x(0), s^2 I)."""
        sigma = self.sigma_min * self.ratio**t  # eq. (31)
        return torch.ones_like(t), sigma

    def fg(self, x, t):
        """f(x, t) and g(t)."""
        g = self.kernel(t)[1] * math.sqrt(2 * math.log(self.ratio))  # eqs. (9), (30)
        return torch.zeros_like(x), g

    def time(self, sigma):
        """The t at which s / a = sigma."""
        return (sigma / self.sigma_min).log() / math.log(self.ratio)


class EDM(VE):
    """EDM's choice, sigma(t) = t: dx = sqrt(2 t) dw, t from sigma_min to sigma_max."""

    def __init__(self, sigma_min=0.002, sigma_max=80.0):
        super().__init__(sigma_min, sigma_max, t_min=sigma_min)
        self.T = sigma_max

    def kernel(self, t):
        return torch.ones_like(t), t

    def fg(self, x, t):
        return torch.zeros_like(x), (2 * t).sqrt()

    def time(self, sigma):
        return sigma


class VP:
    """Variance preserving, the limit of DDPM: eqs. (11), (32), (33).

    dx = -beta(t) / 2 x dt + sqrt(beta(t)) dw, beta(t) from beta_min to beta_max.
    """

    def __init__(self, t_min=1e-5, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.slope = beta_min, beta_max - beta_min
        self.t_min, self.T, self.prior = t_min, 1.0, 1.0

    def beta(self, t):
        return self.beta_min + t * self.slope  # eq. (32)

    def B(self, t):
        """The integral of beta from 0 to t."""
        return self.beta_min * t + self.slope * t**2 / 2

    def kernel(self, t):
        s2 = -torch.expm1(-self.B(t))  # eq. (33); 1 - exp would cancel near t = 0
        return (-self.B(t) / 2).exp(), s2.sqrt()

    def fg(self, x, t):
        beta = self.beta(t)
        return -beta / 2 * x, beta.sqrt()  # eq. (11)

    def time(self, sigma):
        B = torch.log1p(sigma**2)  # sigma^2 = e^B - 1, and B is quadratic in t
        return 2 * B / ((self.beta_min**2 + 2 * self.slope * B).sqrt() + self.beta_min)


class SubVP(VP):
    """Sub-VP: dx = -beta / 2 x dt + sqrt(beta (1 - e^(-2 B))) dw, eq. (12)."""

    def kernel(self, t):
        return (-self.B(t) / 2).exp(), -torch.expm1(-self.B(t))  # eq. (29)

    def fg(self, x, t):
        beta = self.beta(t)
        g2 = beta * -torch.expm1(-2 * self.B(t))
        return -beta / 2 * x, g2.sqrt()  # eq. (12)

    def time(self, sigma):
        # sigma = e^(B/2) - e^(-B/2) = 2 sinh(B / 2); VP's sigma of the same B
        return super().time(torch.expm1(2 * torch.asinh(sigma / 2)).sqrt())


class Flow:
    """Flow matching's straight line, x(t) = (1 - t) x(0) + t z, as an SDE.

    dx = -x / (1 - t) dt + sqrt(2 t / (1 - t)) dw; eq. (13) is dx = E[z - x(0) | x] dt.
    At t = 1, where a = 0, sigma, f and g are infinite: T = 0.99, sigma 99 (EDM's: 80).
    """

    def __init__(self, t_min=1e-3, T=0.99):
        self.t_min, self.T, self.prior = t_min, T, T

    def kernel(self, t):
        return 1 - t, t

    def fg(self, x, t):
        return -x / (1 - t), (2 * t / (1 - t)).sqrt()

    def time(self, sigma):
        return sigma / (1 + sigma)


def make_sde(args, draw=False):
    """The SDE of a run's settings. draw: for sampling, VP and sub-VP end at 1e-3."""
    if args.sde in ("vp", "subvp"):
        t_min = 1e-3 if draw else 1e-5
        return VP(t_min) if args.sde == "vp" else SubVP(t_min)
    if args.sde == "flow":
        return Flow()
    low, high = (0.01, 34.0) if args.sde == "ve" else (0.002, 80.0)
    low, high = args.sigma_min or low, args.sigma_max or high
    if low >= high:
        raise UserError(f"--sigma-min {low} is not below --sigma-max {high}")
    return VE(low, high) if args.sde == "ve" else EDM(low, high)


def sigma_range(sde):
    """sigma = s / a at t_min and at T."""
    a, s = sde.kernel(torch.tensor([sde.t_min, sde.T], dtype=torch.float64))
    return tuple((s / a).tolist())


def times(sde, N, grid="t"):
    """(N + 1,) float64, from T to t_min: evenly spaced in t; edm: as EDM, eq. (5);
    angle: evenly in atan(sigma / 2), as in improved DDPM's schedule, sigma doubled."""
    low, high = sigma_range(sde)
    if grid == "edm":
        return sde.time(karras_sigmas(N + 1, low, high)[:-1])  # eq. (5)
    if grid == "angle":
        ends = math.atan(high / 2), math.atan(low / 2)
        return sde.time(2 * torch.linspace(*ends, N + 1, dtype=torch.float64).tan())
    return torch.linspace(sde.T, sde.t_min, N + 1, dtype=torch.float64)


# -------------------------------------------------------------- the network, the losses


def D_theta(net, y, sigma, label=None, sigma_data=1.0):
    """Estimate of E[x(0) | y = x(0) + sigma z], y (B, ...), sigma (B,): EDM eq. (7)."""
    c_noise = sigma.log()
    sigma = per_sample(sigma, y)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma_data**2 + sigma**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    return c_skip * y + c_out * net(c_in * y, c_noise, label)  # eq. (7)


def eps_theta(net, y, sigma, label=None):
    """(y - D_theta) / sigma, an estimate of z; at small sigma nothing cancels in it."""
    c_noise = sigma.log()
    sigma = per_sample(sigma, y)
    c_in = 1 / (sigma**2 + 1).sqrt()  # c_skip = c_in^2, c_out = sigma c_in
    return c_in * (sigma * c_in * y - net(c_in * y, c_noise, label))


def loss(net, x0, sde, label=None, weighting="paper"):
    """Denoising score matching, eq. (7), lambda = s^2, t uniform; the mean over pixels.

    x0 (B, ...). likelihood: lambda = g^2 (ScoreFlow) up to a constant factor, with t
    in proportion to g^2 / s^2 = d log sigma^2 / dt: log sigma is uniform. flow:
    lambda = s^2 / a^2, with Flow || v - (z - x0) ||^2, v = eps - D. One in ten labels
    is hidden (-1).
    """
    u = torch.rand(len(x0), device=x0.device)
    t = sde.t_min + u * (sde.T - sde.t_min)
    if weighting == "likelihood":
        low, high = sigma_range(sde)
        t = sde.time(low * (high / low) ** u)
    a, s = sde.kernel(t)
    sigma = per_sample(s / a, x0)
    z = torch.randn_like(x0)
    y = x0 + sigma * z  # x(t) / a(t), x(t) ~ p_0t, eq. (29)
    error = eps_theta(net, y, s / a, hide(label)) - z
    if weighting == "flow":
        error = error / per_sample(a, x0)
    return error.square().mean()  # eq. (7): s^2 || -eps / s + z / s ||^2


def edm_loss(net, x0, label=None, focus=False, sigma_data=1.0):
    """EDM's loss, E lambda(sigma) || D(x0 + sigma z; sigma) - x0 ||^2, by its Table 1.

    ln sigma ~ N(-1.2, 1.2^2), which is for sigma_data = 0.5: times sigma_data / 0.5.
    focus: 4 times in 5 N(0.5, 0.7^2) instead, where it is decided what an image shows.
    """
    n = torch.randn(len(x0), device=x0.device)
    sigma = 2 * sigma_data * (-1.2 + 1.2 * n).exp()
    if focus:
        sigma = torch.where(torch.rand_like(n) < 0.8, (0.5 + 0.7 * n).exp(), sigma)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2  # lambda(sigma)
    y = x0 + per_sample(sigma, x0) * torch.randn_like(x0)
    D = D_theta(net, y, sigma, hide(label), sigma_data)
    return (per_sample(weight, x0) * (D - x0).square()).mean()


# ------------------------------------------- samplers: from x = x(T), (B, ...), to x(0)
# score(x, t): a plain function, t one number (0-dim tensor); ts (N + 1,) falls to t_min


def tweedie(score, sde, x, t):
    """E[x(0) | x(t)] = (x + s^2 score) / a."""
    a, s = sde.kernel(t)
    return (x + s**2 * score(x, t)) / a


def transition(sde, t, t_next):
    """r, G^2 of p(x(t) | x(t_next)) = N(r x(t_next), G^2 I), t_next < t: an exact step.

    VE: 1, sigma_i^2 - sigma_{i-1}^2, eq. (8); VP: sqrt(1 - beta_i), beta_i, eq. (10).
    """
    (a, s), (a_next, s_next) = sde.kernel(t), sde.kernel(t_next)
    r = a / a_next
    return r, s**2 - (r * s_next) ** 2  # eqs. (8), (10)


@torch.no_grad()
def em(score, sde, x, ts):
    """Euler-Maruyama on the reverse SDE, eq. (6): N + 1 evaluations."""
    for t, t_next in pairwise(ts):
        dt = t - t_next
        f, g = sde.fg(x, t)
        drift = f - g**2 * score(x, t)  # eq. (6)
        x = x - drift * dt + g * dt.sqrt() * torch.randn_like(x)
    return tweedie(score, sde, x, ts[-1])


@torch.no_grad()
def reverse(score, sde, x, ts):
    """Reverse diffusion, eq. (46): steps as the forward ones, f_i = (r - 1) x, G_i."""
    for t, t_next in pairwise(ts):
        r, G2 = transition(sde, t, t_next)
        z = torch.randn_like(x)
        x = (2 - r) * x + G2 * score(x, t) + G2.sqrt() * z  # eq. (46)
    return tweedie(score, sde, x, ts[-1])


@torch.no_grad()
def reverse_ode(score, sde, x, ts):
    """Probability flow sampling (appendix D.3): no noise, and half the score."""
    for t, t_next in pairwise(ts):
        r, G2 = transition(sde, t, t_next)
        x = (2 - r) * x + G2 / 2 * score(x, t)
    return tweedie(score, sde, x, ts[-1])


@torch.no_grad()
def ancestral(score, sde, x, ts):
    """Ancestral sampling: VP as DDPM, eq. (4), with variance beta_i; VE, eq. (47), and
    sub-VP with that of q(x_{i-1} | x_i, x_0), G_i^2 s_{i-1}^2 / s_i^2."""
    for t, t_next in pairwise(ts):
        r, G2 = transition(sde, t, t_next)
        variance = G2
        if type(sde) is not VP:
            variance = G2 * (sde.kernel(t_next)[1] / sde.kernel(t)[1]) ** 2  # eq. (47)
        z = torch.randn_like(x)
        x = (x + G2 * score(x, t)) / r + variance.sqrt() * z  # eq. (4)
    return tweedie(score, sde, x, ts[-1])


def correct(score, x, t, snr, alpha=1.0):
    """A Langevin step: Algorithm 4 (alpha = 1) or 5; ||.|| is the mean of the norms."""
    z = torch.randn_like(x)  # line 4
    s = score(x, t)  # line 5
    ratio = z.flatten(1).norm(dim=1).mean() / s.flatten(1).norm(dim=1).mean()
    eps = 2 * alpha * (snr * ratio) ** 2  # line 6
    return x + eps * s + (2 * eps).sqrt() * z  # line 7


@torch.no_grad()
def pc_ve(score, sde, x, ts, snr=0.16, M=1):
    """Algorithm 2: a reverse diffusion step, then M of Algorithm 4 where it arrives."""
    for t, t_next in pairwise(ts):
        sigma, sigma_next = sde.kernel(t)[1], sde.kernel(t_next)[1]
        x = x + (sigma**2 - sigma_next**2) * score(x, t)  # line 3
        z = torch.randn_like(x)  # line 4
        x = x + (sigma**2 - sigma_next**2).sqrt() * z  # line 5
        for _ in range(M):
            x = correct(score, x, t_next, snr)  # lines 7, 8
    return tweedie(score, sde, x, ts[-1])


@torch.no_grad()
def pc_vp(score, sde, x, ts, snr=0.16, M=1):
    """Algorithm 3, with Algorithm 5; for sub-VP G^2 stands in place of beta_i.

    alpha = r^2 = 1 - beta_i of the step taken; the authors have a table of 1000.
    """
    for t, t_next in pairwise(ts):
        r, beta = transition(sde, t, t_next)  # sqrt(1 - beta_i), beta_i
        x = (2 - r) * x + beta * score(x, t)  # line 3
        z = torch.randn_like(x)  # line 4
        x = x + beta.sqrt() * z  # line 5
        for _ in range(M):
            x = correct(score, x, t_next, snr, alpha=r**2)  # lines 7, 8
    return tweedie(score, sde, x, ts[-1])


DOPRI = [
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
]
# 5th-order solution minus 4th-order solution
ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]


def largest(error, t, h, last):
    """The largest RMS error in the batch, which controls the step size.
    UserError if the solver is stuck: it is not finite, or t hardly moves."""
    e = error.flatten(1).square().mean(1).sqrt().max().item()
    if not math.isfinite(e) or not (last or abs(h) > 1e-6 * abs(t)):
        raise UserError("the ODE cannot be solved to this --tol: raise it")
    return e


@torch.no_grad()
def rk45(fun, x, t0, t1, tol=1e-5):
    """x(t1) of dx/dt = fun(x, t) from x(t0) (B, ...): Dormand & Prince 1980.

    A step is accepted if the RMS of error / (tol (1 + |x|)) is at most 1.
    """
    t = torch.tensor(t0, dtype=torch.float64)
    h, k0 = (t1 - t0) / 100, fun(x, t)
    while t != t1:
        k = [k0]
        for row in DOPRI:
            x_next = x + h * sum(c * kj for c, kj in zip(row, k))
            k.append(fun(x_next, t + sum(row) * h))
        error = h * sum(c * kj for c, kj in zip(ERROR, k))
        error = error / (tol * (1 + torch.maximum(x.abs(), x_next.abs())))
        last = abs(t1 - t - h) <= 1e-6 * abs(t1 - t0)
        e = largest(error, t, h, last)
        if e <= 1:
            x, k0 = x_next, k[-1]  # the last slope is the next step's first
            t = torch.full_like(t, t1) if last else t + h
        h = h * min(10, max(0.2, 0.9 * max(e, 1e-10) ** -0.2))
        if abs(h) > abs(t1 - t):
            h = (t1 - t).item()
    return x


def velocity(score, sde):
    """The right side of the probability flow ODE, eq. (13), a function of x and t."""

    def fun(x, t):
        f, g = sde.fg(x, t)
        return f - g**2 / 2 * score(x, t)  # eq. (13)

    return fun


@torch.no_grad()
def ode(score, sde, x, tol=1e-5):
    """The probability flow ODE, solved from T to t_min."""
    x = rk45(velocity(score, sde), x, sde.T, sde.t_min, tol)
    return tweedie(score, sde, x, torch.tensor(sde.t_min, dtype=torch.float64))


@torch.no_grad()
def heun(score, sde, x, N, churn=0.0):
    """EDM, Algorithm 1, and for S_churn > 0 Algorithm 2 with S_tmin = 0, S_tmax = inf,
    S_noise = 1. N steps in y = x / a, whose ODE is dy = eps dsigma for every SDE, the
    last to sigma = 0; 2 N - 1 evaluations."""

    def slope(y, sigma):  # (y - D(y; sigma)) / sigma
        t = sde.time(sigma)
        a, s = sde.kernel(t)
        return -s * score(a * y, t)

    sigmas = karras_sigmas(N, *sigma_range(sde))
    y = x / sde.kernel(torch.tensor(sde.T, dtype=torch.float64))[0]
    for sigma, sigma_next in pairwise(sigmas):
        if churn:
            hat = sigma * (1 + min(churn / N, math.sqrt(2) - 1))  # line 5
            y = y + (hat**2 - sigma**2).sqrt() * torch.randn_like(y)  # line 6
            sigma = hat
        d = slope(y, sigma)  # line 7
        y_next = y + (sigma_next - sigma) * d  # line 8
        if sigma_next > 0:
            d = (d + slope(y_next, sigma_next)) / 2  # lines 10, 11
            y_next = y + (sigma_next - sigma) * d
        y = y_next
    return y


@torch.no_grad()
def dpm(score, sde, x, ts):
    """DPM-Solver++(2M), Algorithm 2 of Lu et al.: order 2, N + 1 evaluations.

    lambda = log(a / s) rises by h; D is a constant in a step, by the line through its
    last two values that in the middle, in the first step D itself.
    """
    before, h_before = 0.0, math.inf
    for t, t_next in pairwise(ts):
        (a, s), (a_next, s_next) = sde.kernel(t), sde.kernel(t_next)
        h = (a_next / s_next * s / a).log()
        r = h_before / h
        now = tweedie(score, sde, x, t)
        D = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        x = s_next / s * x - a_next * torch.expm1(-h) * D
        before, h_before = now, h
    return tweedie(score, sde, x, ts[-1])


@torch.no_grad()
def adaptive(score, sde, x, tol=0.05, tol_abs=2 / 256, safety=0.9, r=0.9):
    """Algorithm 1 of Jolicoeur-Martineau et al.: x' by Euler-Maruyama, x'' by the
    mean of the steps at both ends, with the same z; accepted if x' - x'' is small.
    tol_abs: a grey level. One step size per batch; the paper has one per sample.
    """

    def increment(x, t, h, z):
        f, g = sde.fg(x, t)
        return -h * (f - g**2 * score(x, t)) + h.sqrt() * g * z

    end, t = torch.tensor([sde.t_min, sde.T], dtype=torch.float64)
    h, before = 0.01 * (t - end), x
    while t > end:
        last = h >= t - end
        t_next = end if last else t - h
        z = torch.randn_like(x)
        low = x + increment(x, t, h, z)  # x'
        high = (x + low + increment(low, t_next, h, z)) / 2  # x''
        delta = (tol * torch.maximum(low.abs(), before.abs())).clamp(min=tol_abs)
        e = largest((low - high) / delta, t, h, last)
        if e <= 1:
            x, before, t = high, low, t_next
        h = torch.minimum(safety * h * max(e, 1e-10) ** -r, t - end)
    return tweedie(score, sde, x, end)


# ------------------------------------------------------------- likelihood, and guidance


@torch.no_grad()
def log_likelihood(score, sde, x, tol=1e-5, probes=1):
    """(log p(x) in nats, (B, probes), and x(T)) of x (B, ...) at t_min, eq. (39).

    The divergence is v^T grad(velocity) v with Rademacher v, eq. (40); probes = 0:
    exact, d products, as (B, 1).
    """
    B, d = len(x), x[0].numel()
    field = velocity(score, sde)
    if probes:
        vs = torch.randn(probes, B, d, device=x.device).sign().to(x)
    else:
        vs = torch.eye(d).to(x)[:, None].expand(d, B, d)

    def fun(state, t):
        with torch.enable_grad():
            now = state[:, :d].reshape(x.shape).clone().requires_grad_()
            dx = field(now, t).flatten(1)
            columns = []
            for v in vs:
                (vjp,) = torch.autograd.grad((dx * v).sum(), now, retain_graph=True)
                columns.append((vjp.flatten(1) * v).sum(1))  # eq. (40)
        div = torch.stack(columns, dim=1)  # (B, probes) or (B, d)
        div = div if probes else div.sum(1, keepdim=True)
        return torch.cat([dx.detach(), div], dim=1)

    state = torch.cat([x.flatten(1), x.new_zeros(B, max(1, probes))], dim=1)
    state = rk45(fun, state, sde.t_min, sde.T, tol)
    x_T, integral = state[:, :d], state[:, d:]
    log_p_T = torch.distributions.Normal(0, sde.prior).log_prob(x_T).sum(1)
    return log_p_T[:, None] + integral, x_T.view_as(x)  # eq. (39)


def logits(classifier, y, sigma):
    """(B, K) of p(label | y = x(0) + sigma z): K channels, averaged over the pixels."""
    c_in = 1 / (per_sample(sigma, y) ** 2 + 1).sqrt()
    return classifier(c_in * y, sigma.log()).flatten(2).mean(2)


def classifier_loss(net, x0, label, sigma_min=0.05, sigma_max=20.0):
    """Cross-entropy of the label, log sigma uniform where the class is decided."""
    u = torch.rand(len(x0), device=x0.device)
    sigma = sigma_min * (sigma_max / sigma_min) ** u
    y = x0 + per_sample(sigma, x0) * torch.randn_like(x0)
    return F.cross_entropy(logits(net, y, sigma), label)


def make_score(net, sde, label=None, w=0.0, guide=None, classifier=None, clip=False):
    """score(x, t) of a network, as the samplers call it. label (B,): one each.

    w: with a classifier s + w grad log p(label | x(t)), eq. (14), else common.guided.
    clip: D to [-1, 1], for images; not for log p.
    """
    options = () if classifier else (label, w, guide)
    guided_net = common.guided(net, *options)

    def score(x, t):
        a, s = sde.kernel(t)
        y = x / a
        sigma = each(s / a, x)
        eps = eps_theta(guided_net, y, sigma)
        if classifier:
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                log_p = logits(classifier, leaf, sigma).log_softmax(1)
                total = log_p.gather(1, label[:, None]).sum()
                (grad,) = torch.autograd.grad(total, leaf)
            eps = eps - w * s / a * grad  # eq. (14)
        if clip:
            D = y - s / a * eps
            eps = eps + (D - D.clamp(-1, 1)) * a / s  # exactly 0 where D is inside
        return -eps / s

    return score


def dequantised(x0):
    """y = 2 v - 1, v = (u + U[0, 1)) / 256, of images in [-1, 1] of grey levels u."""
    u = (x0 + 1) * 127.5
    return 2 * (u + torch.rand_like(x0)) / 256 - 1


def grey_levels(y):
    """Images in [-1, 1] from dequantised y: u = floor(256 v)."""
    return ((y + 1) * 128).floor().clamp(0, 255) / 127.5 - 1


# ------------------------------------------------------------------ a run, from outside


def flags():
    """The command line: the shared flags and this script's own."""
    p = common.arguments("sde", __doc__, lambda args: PAPERS.get(args.sde, PAPER))
    add = p.kept.add_argument
    sdes = ["vp", "ve", "subvp", "edm", "flow"]
    add("--sde", choices=sdes, default="vp", help="(%(default)s) edm: sigma(t) = t")
    add("--sigma-min", type=float, help="VE: 0.01, paper 0.02; EDM: 0.002")
    add("--sigma-max", type=float, help="VE: 34, paper 100; EDM: 80")
    add = p.settled.add_argument
    weightings = ["edm", "paper", "likelihood", "flow"]
    add("--weighting", choices=weightings, default="edm", help="(edm) paper: s^2")
    add("--train-classifier", action="store_true", help="train p(label | x(t)) instead")
    add = p.sampling.add_argument
    # a new sampler: its name here, its call in draw()
    names = ["em", "reverse", "reverse-ode", "ancestral", "pc"]
    names += ["ode", "heun", "dpm", "adaptive"]
    add("--sampler", choices=names, default="heun", help="(%(default)s)")
    add("--sample-steps", type=int, help="N (50; dpm: 25; paper: 1000)")
    words = "spacing of the N steps, not of heun (%(default)s; paper: t)"
    add("--grid", choices=["t", "edm", "angle"], default="angle", help=words)
    add("--snr", type=float, default=0.16, help="r of pc (0.16; paper: VP 0.01)")
    add("--corrector-steps", type=int, default=1, help="M of pc (1, as the paper)")
    add("--tol", type=float, help="ode, bits: 1e-5, as the paper; adaptive: 0.05")
    add("--churn", type=float, default=25.0, help="S_churn of heun (25; EDM: 0 to 80)")
    add("--clip", action=ON_OFF, default=True, help="D to [-1, 1] (papers: no)")
    add = p.add_argument
    add("--evaluate-bits", type=int, help="bits/dim of N test images")
    add("--probes", type=int, default=1, help="random vectors per image (1)")
    return p


def network(args):
    """The U-Net for these settings; a classifier has one channel per class."""
    C = args.shape[0]
    if args.train_classifier:
        return common.UNet(C, args.width, out=args.n_classes)
    return common.UNet(C, args.width, args.n_classes)


def load(folder, device="cpu", label=None, w=0.0, clip=True):
    """(score, SDE, image shape) of a trained run, as the samplers take them;
    clip=False: as log_likelihood takes them."""
    net, args = common.load(folder, device, sde=network)
    sde = make_sde(args, draw=clip)
    return make_score(net, sde, label, w, clip=clip), sde, args.shape


def denoiser(net, args):
    """(D, (sigma_min, sigma_max)) of a trained run: D(y, sigma, label=None) = E[x(0) |
    y = x(0) + sigma z], images in [-1, 1], sigma a number or (B,)."""
    if args.train_classifier:
        raise UserError("a classifier cannot generate images: pass it to --guide")

    def D(y, sigma, label=None):
        return D_theta(net, y, each(sigma, y), label)

    return D, sigma_range(make_sde(args))


# ------------------------------------------------------------------ from flags to files


def draw(args, net, guides, index, watch):
    """Sample the images with these indices, as the flags say."""
    sde = make_sde(args, draw=True)
    label = common.labels_of(args, index)
    clip = args.clip and args.sampler != "ode"  # there it would be a kink
    score = make_score(net, sde, label, args.guidance, clip=clip, **guides)
    look = watch(lambda x: x)

    def watched(x, t):
        a, s = sde.kernel(t)
        look(x / (a**2 + s**2).sqrt())
        return score(x, t)

    N = args.sample_steps or (25 if args.sampler == "dpm" else 50)
    ts = times(sde, N, args.grid)
    pc = pc_ve if isinstance(sde, VE) else pc_vp
    sampler, *options = {
        "em": (em, ts),
        "reverse": (reverse, ts),
        "reverse-ode": (reverse_ode, ts),
        "ancestral": (ancestral, ts),
        "pc": (pc, ts, args.snr, args.corrector_steps),
        "ode": (ode, args.tol or 1e-5),
        "heun": (heun, N, args.churn),
        "dpm": (dpm, ts),
        "adaptive": (adaptive, args.tol or 0.05),
    }[args.sampler]
    x = sde.prior * torch.randn(len(index), *args.shape, device=args.device)
    return grey_levels(sampler(watched, sde, x, *options))


def report_bits(args, score, sde, images):
    """--evaluate-bits: prints a line, writes OUT/bits.csv, a row per image, a column
    per probe."""
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = images[pick[: args.evaluate_bits]]
    N, d = len(images), images[0].numel()
    bits = torch.empty(0, args.probes)
    for part in images.split(100):
        y = dequantised(part.to(args.device) / 127.5 - 1)
        log_p, _ = log_likelihood(score, sde, y, args.tol or 1e-5, args.probes)
        log_p = log_p.cpu() + d * math.log(2 / 256)  # of u, whose steps are 1
        bits = torch.cat([bits, -log_p / d / math.log(2)])
        print(f"bits   {len(bits)}/{N} images   mean {bits.mean():.4f}")
    names = ",".join(f"probe_{k + 1}" for k in range(args.probes))
    common.write_csv(f"{args.out}/bits.csv", names, bits)
    error = bits.mean(1).std() / N**0.5
    print(f"bits   {bits.mean():.4f} +- {error:.4f} bits/dim on {N} test images")


def load_guides(args):
    """{"guide": a weaker network} or {"classifier": a network} from --guide, or {}."""
    net, theirs = common.load_guide(args, sde=network)
    if net and theirs.train_classifier:
        args.n_classes, args.names = theirs.n_classes, theirs.names
        return {"classifier": net}
    if net and theirs.n_classes != args.n_classes:
        words = f"has n_classes {theirs.n_classes}, not {args.n_classes}"
        raise UserError(f"--guide {args.guide} {words}")
    return {"guide": net}


def main(argv=()):
    args = common.start(flags(), argv)
    if args.train_classifier and args.sample_only:
        raise UserError("a classifier cannot generate images: pass it to --guide")
    args.classes = args.classes or args.train_classifier
    sde = make_sde(args)
    images, labels = (None, None) if args.sample_only else common.data_of(args)
    run = common.Run(args, network(args))
    guides = load_guides(args)
    drawn = partial(draw, args, run.ema, guides)
    few = vars(args) | {"sampler": "heun", "sample_steps": None}
    quick = partial(draw, SimpleNamespace(**few), run.ema, guides)
    for x0, label in run.batches(images, labels):
        y = dequantised(x0 * (2 / 255) - 1)
        if args.train_classifier:
            l = classifier_loss(run.net, y, label)
        elif args.weighting == "edm":
            l = edm_loss(run.net, y, label, args.focus)
        else:
            l = loss(run.net, y, sde, label, args.weighting)
        run.update(l)
        if run.step in run.previews and not args.train_classifier:
            common.save_samples(args, quick, run.step)
    if args.train_classifier:
        return
    if args.evaluate_bits:
        images, _ = common.data_of(args, "test")
        run.ema.dtype = torch.float32
        torch.backends.cudnn.allow_tf32 = False
        common.seed_all(args.seed)
        report_bits(args, make_score(run.ema, sde), sde, images)
        return
    common.save_samples(args, drawn)


if __name__ == "__main__":
    common.cli(main)
