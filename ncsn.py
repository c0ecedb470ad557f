"""Noise conditional score networks (NCSN): score matching, annealed Langevin dynamics.

Papers   Song & Ermon 2019, arXiv:1907.05600 (equation numbers: v3); images in [0, 1]
         Song & Ermon 2020, arXiv:2006.09011, "Improved techniques": --improved
         Song, Garg, Shi & Ermon 2019, arXiv:1905.07088 (sliced score matching):
         --objective ssm or ssm-vr
         Jolicoeur-Martineau et al. 2020, arXiv:2009.05475 (consistent annealed
         sampling): the default, --sampler consistent
Noise    q_sigma(x~ | x) = N(x~ | x, sigma^2 I), sigma_1 > ... > sigma_L    section 4.2
Network  s(x, sigma) = net(x, log sigma) / sigma; improved: net(x) / sigma
Loss     1/L sum_i lambda(sigma_i) l(sigma_i), lambda(sigma) = sigma^2          eq. (6)
         l(sigma) = 1/2 E || s(x~, sigma) + (x~ - x) / sigma^2 ||^2             eq. (5)
Sample   for sigma_1 ... sigma_L, T times each:
         x <- x + alpha_i / 2 s(x, sigma_i) + sqrt(alpha_i) z,
         alpha_i = eps sigma_i^2 / sigma_L^2                                Algorithm 1
         consistent: beta z instead, beta^2 = sigma_next^2 - (1 - r)^2 sigma_i^2, with
         r = eps / 2 sigma_L^2
Differs  mean over pixels instead of sum; one U-Net, given log sigma, that learns the
         residual to the score of N(0, (sigma^2 + 1/4) I) (not with --improved); more
         levels, a larger first sigma, 0.05 as the last; T = 4; lambda = sigma^3;
         consistent sampling, from sigma_1 z, not Algorithm 1 (--sampler langevin);
         levels near sigma = 0.8 are trained more often (--focus); Muon, gradient
         clipping, learning-rate decay; a weight EMA with a shorter horizon early on;
         images are not dequantised; a last denoising step, as in the second paper (the
         first one's code returns the state before its last step, clamped); --improved
         starts at sigma_1 z, its authors' code at uniform noise. Both papers' code
         takes x + alpha s + sqrt(2 alpha) z: its eps = 2e-5 is 4e-5 here

    python ncsn.py                              # renders its own digits, trains on them
    python ncsn.py --dataset mnist              # then see runs/ncsn-mnist/samples.png
    python ncsn.py --dataset mnist --paper --out runs/paper     # the paper's settings
    python ncsn.py --dataset mnist --improved --out runs/ncsnv2-mnist
"""

import math
from functools import partial

import common  # before torch: it sets how long idle threads spin

# isort: split
import torch

from common import ON_OFF, UNet, UserError, each, geometric_sigmas, hide, per_sample

# --paper undoes what "Differs" lists; with --improved the second paper's settings
PAPER = {"sigma_max": 1.0, "sigma_min": 0.01, "levels": 10, "power": 2.0}
PAPER |= {"gaussian": False, "T": 100, "eps": 4e-5, "denoise": False, "focus": False}
PAPER |= {"optimizer": "adam", "lr": 1e-3, "constant_lr": True, "sampler": "langevin"}
IMPROVED = PAPER | {"sigma_max": None, "levels": None, "eps": None}  # by Techniques
IMPROVED |= {"T": 5, "denoise": True, "lr": 1e-4}


def score(net, x, sigma, label=None):
    """s(x, sigma) = net(x, log sigma) / sigma, an estimate of grad log q_sigma(x).

    x (B, ...), sigma (B,).
    """
    return net(x, sigma.log(), label) / per_sample(sigma, x)


# ------------------------------------------------------------- training: score matching


def draw_levels(sigma, B, focus=False):
    """Indices (B,) of the levels sigma (L,), uniform, or as common.focus wants them."""
    if focus:  # in [-1, 1] the same noise has twice the sigma
        return common.focus(2 * sigma).multinomial(B, replacement=True)
    return torch.randint(len(sigma), (B,), device=sigma.device)


def loss(net, x, sigma, label=None, power=2.0, focus=False):
    """Denoising score matching over the levels sigma (L,), eqs. (5), (6), per pixel.

    x (B, ...), images in [0, 1] or points; lambda = sigma^power; focus: see
    common.focus. One in ten labels is dropped (-1), so the network also learns the
    unconditional score.
    """
    i = draw_levels(sigma, len(x), focus)  # the sum of eq. (6)
    sigma_i = sigma[i]  # (B,)
    label = hide(label)
    z = torch.randn_like(x)
    x_tilde = x + per_sample(sigma_i, x) * z
    target = -z / per_sample(sigma_i, x)  # -(x~ - x) / sigma^2
    s = score(net, x_tilde, sigma_i, label)
    l = 0.5 * (s - target).square().flatten(1).mean(1)  # (B,), eq. (5)
    return (sigma_i**power * l).mean()  # eq. (6)


def ssm_loss(net, x, sigma, label=None, power=2.0, focus=False, reduced=True):
    """Sliced score matching, E[v^T grad_x s v + norm / 2], over the same levels.

    norm: (v^T s)^2, or with reduced variance || s ||^2 (SSM-VR; eq. (3) of NCSN). v has
    random signs; the plain SSM code uses unit vectors. Its mean is that of the loss
    above minus sigma^(power - 2) / 2.
    """
    i = draw_levels(sigma, len(x), focus)
    sigma_i = sigma[i]
    label = hide(label)
    x_tilde = (x + per_sample(sigma_i, x) * torch.randn_like(x)).requires_grad_()
    v = torch.randn_like(x).sign()  # E v v^T = I
    s = score(net, x_tilde, sigma_i, label)
    vs = (v * s).flatten(1).sum(1)  # v^T s
    (grad,) = torch.autograd.grad(vs.sum(), x_tilde, create_graph=True)
    norm = s.square().flatten(1).sum(1) if reduced else vs.square()  # eq. (3)
    l = ((grad * v).flatten(1).sum(1) + norm / 2) / v[0].numel()  # (B,)
    return (sigma_i**power * l).mean()


OBJECTIVES = {"dsm": loss, "ssm": partial(ssm_loss, reduced=False), "ssm-vr": ssm_loss}

# ------------------------------------------------- sampling: annealed Langevin dynamics


@torch.no_grad()
def sample(s_theta, x, sigma, eps, T, denoise=True):
    """Algorithm 1 from x (B, ...) over the falling levels sigma (L,), T steps on each.

    s_theta(x, sigma_i) takes a number. denoise: end with E[x | x~], Tweedie's
    formula. ValueError unless sigma falls.
    """
    if (sigma[1:] >= sigma[:-1]).any():
        raise ValueError("sigma must fall: sigma_1 > ... > sigma_L, geometric_sigmas()")
    for sigma_i in sigma.tolist():
        alpha = eps * (sigma_i / float(sigma[-1])) ** 2  # line 3
        for _ in range(T):
            z = torch.randn_like(x)  # line 5
            x = x + alpha / 2 * s_theta(x, sigma_i) + math.sqrt(alpha) * z  # line 6
    if denoise:
        x = x + sigma_i**2 * s_theta(x, sigma_i)
    return x


@torch.no_grad()
def sample_consistent(s_theta, x, sigma, eps, T, denoise=True):
    """Consistent annealed sampling, arXiv:2009.05475, Algorithm 2; T steps per level.

    A step leaves 1 - r of x's distance from a point, r = alpha_i / 2 sigma_i^2. Then z
    is scaled so that x has the sigma which the next step is told (Algorithm 1 adds more
    noise, see meter), as x at the start has sigma_1.
    """
    r = eps / float(sigma[-1]) ** 2 / 2
    steps = sigma.repeat_interleave(T).tolist()
    for sigma_i, sigma_next in zip(steps, [*steps[1:], steps[-1]]):
        left = (1 - r) * sigma_i
        beta = math.sqrt(max(0, sigma_next**2 - left**2))
        x = x + r * sigma_i**2 * s_theta(x, sigma_i) + beta * torch.randn_like(x)
    if denoise:
        x = x + sigma_i**2 * s_theta(x, sigma_i)
    return x


SAMPLERS = {"langevin": sample, "consistent": sample_consistent}


def meter(sigma, eps):
    """(step ratio r, inflation of the variance) of Algorithm 1, equal on all levels.

    r = a / sigma_i^2 of the update x + a s + sqrt(2 a) z, a = alpha_i / 2. It
    multiplies the distance from a point by 1 - r, so r > 2 is unstable; the variance
    converges to sigma_i^2 / (1 - r/2), an inflation of 1 / (1 - r/2).
    """
    r = eps / float(sigma[-1]) ** 2 / 2
    return r, 1 / (1 - r / 2) if r < 2 else math.inf


# --------------------------------------------------------- improved techniques (NCSNv2)


def largest_distance(images, device="cpu", block=2000):
    """Technique 1: sigma_1 = max_ij || x_i - x_j ||_2 of uint8 images, in [0, 1].

    Exact: no pair is farther apart than the sum of its distances to the mean, so blocks
    of images too close to the mean are skipped.
    """
    x = images.flatten(1).to(device) / 255
    r, order = (x - x.mean(0)).norm(dim=1).sort(descending=True)
    blocks, r, largest = x[order].split(block), r[::block].tolist(), 0.0
    for i, rows in enumerate(blocks):
        for j in range(i, len(blocks)):
            if r[i] + r[j] <= largest:
                break
            largest = max(largest, torch.cdist(rows, blocks[j]).amax().item())
    return largest


def overlap(gamma, d):
    """Phi(sqrt(2 d) (gamma - 1) + 3 gamma) - Phi(sqrt(2 d) (gamma - 1) - 3 gamma).

    The fraction of one level's noise that falls into the shell of the level gamma times
    as large, in d dimensions (Technique 2).
    """
    a = math.sqrt(2 * d) * (gamma - 1)
    upper, lower = (a + 3 * gamma) / math.sqrt(2), (a - 3 * gamma) / math.sqrt(2)
    return (math.erfc(lower) - math.erfc(upper)) / 2


def level_ratio(d):
    """Technique 2: gamma = sigma_{i-1} / sigma_i for which overlap(gamma, d) = 0.5.

    UserError for d <= 4, where there is none.
    """
    if d <= 4:
        raise UserError(f"Technique 2 has no solution in d = {d}: it needs d > 4")
    low, high = 1.0, 2 / (1 - 3 / math.sqrt(2 * d))  # overlap 0.997, and below 0.5
    for _ in range(100):
        middle = (low + high) / 2
        if overlap(middle, d) > 0.5:
            low = middle
        else:
            high = middle
    return low


def step_size(gamma, T):
    """Technique 4: (r, value), the r = eps / sigma_L^2 with the value nearest to 1 of
    (1-r)^2T (gamma^2 - 2r / (1 - (1-r)^2)) + 2r / (1 - (1-r)^2).

    The variance on a point mass, divided by sigma_i^2, after T steps on level i that
    start from gamma^2 sigma_i^2, the level before. It stays above 1: 2r / (1 - (1-r)^2)
    is the inflation of meter().
    """
    r = torch.logspace(-6, 0, 10**6, dtype=torch.float64)
    inflation = 2 * r / (1 - (1 - r) ** 2)
    value = (1 - r) ** (2 * T) * (gamma**2 - inflation) + inflation
    k = (value - 1).abs().argmin()
    return r[k].item(), value[k].item()


def derive(d, sigma_max, sigma_min, T, L=None):
    """(L, eps for sample) by Techniques 2 (unless L is given) and 4, all printed."""
    gamma, span = level_ratio(d), math.log(sigma_max / sigma_min)
    L = L or math.ceil(1 + span / math.log(gamma))
    actual = math.exp(span / max(1, L - 1))  # L is a whole number: slightly smaller
    r, value = step_size(actual, T)
    print(f"tech 1 sigma_1 = {sigma_max:.4g} (largest distance, unless --sigma-max)")
    print(f"tech 2 gamma = {gamma:.5f}; L = {L}, overlap {overlap(actual, d):.3f}")
    print("tech 3 s(x, sigma) = net(x) / sigma; tech 5: averaged weights, --ema")
    print(f"tech 4 variance {value:.4f} sigma^2 after a level, r = {r:.4g}, T = {T}")
    return L, 2 * r * sigma_min**2  # x + alpha/2 s here, x + alpha s there


# ------------------------------------------------------------------ a run, from outside


class ScoreUNet(UNet):
    """sigma s(x, sigma): that of N(0, (sigma^2 + 1/4) I) plus the U-Net's residual."""

    def forward(self, x, noise, label=None):
        sigma = per_sample(noise.exp(), x)
        c = 1 / (sigma**2 + 0.25).sqrt()
        return c * (0.5 * super().forward(c * x, noise, label) - sigma * c * x)


class UntoldUNet(UNet):
    """Technique 3: the U-Net is not given sigma, so s(x, sigma) = net(x) / sigma."""

    def forward(self, x, noise, label=None):
        return super().forward(x, torch.zeros_like(noise), label)


def flags():
    """The command line: the shared flags and this script's own."""
    p = common.arguments(
        "ncsn", __doc__, lambda args: IMPROVED if args.improved else PAPER
    )
    add = p.settled.add_argument
    add("--improved", action="store_true", help="NCSNv2: Techniques 1 to 5")
    words = "denoising or sliced score matching"
    add("--objective", choices=OBJECTIVES, default="dsm", help=words)
    add("--sigma-max", type=float, help="sigma_1 (5, or by Technique 1; paper: 1)")
    add("--sigma-min", type=float, default=0.05, help="sigma_L (0.05, papers: 0.01)")
    add("--levels", type=int, help="noise levels L (30, or Technique 2; paper: 10)")
    add("--power", type=float, default=3.0, help="p of lambda = sigma^p (3; paper: 2)")
    words = "learn the residual to a Gaussian's score (paper: no)"
    add("--gaussian", action=ON_OFF, default=True, help=words)
    add = p.sampling.add_argument
    add("--eps", type=float, help="step size (1e-3, or Technique 4; paper: 4e-5)")
    words = "(consistent; papers and --improved: langevin)"
    add("--sampler", choices=SAMPLERS, help=words)
    words = "steps per level (4; langevin 10; --improved 5; papers: 100, 5)"
    add("--T", type=int, help=words)
    add("--denoise", action=ON_OFF, default=True, help="a last denoising step")
    return p


def network(args):
    """The U-Net of a run's settings."""
    kind = ScoreUNet if args.gaussian else UNet
    kind = UntoldUNet if args.improved else kind
    return kind(args.shape[0], args.width, args.n_classes)


def as_score(net, label=None, w=0.0, guide=None):
    """The network as sample() calls it: s(x, sigma_i), sigma_i a number.

    w: guidance, see common.guided.
    """
    guided_net = common.guided(net, label, w, guide)
    return lambda x, sigma_i: score(guided_net, x, each(sigma_i, x))


def load(folder, device="cpu", label=None, w=0.0):
    """(score, sigma, image shape) of a trained run, as sample() takes them."""
    net, args = common.load(folder, device, ncsn=network)
    sigma = geometric_sigmas(args.sigma_max, args.sigma_min, args.levels)
    return as_score(net, label, w), sigma, args.shape


def denoiser(net, args):
    """(D, (sigma_min, sigma_max)) of a trained run; images in [0, 1].

    D(y, sigma, label=None) = E[x | y = x + sigma z] = y + sigma^2 s(y, sigma), sigma a
    number or (B,).
    """

    def D(y, sigma, label=None):
        s = score(net, y, each(sigma, y), label)
        return y + per_sample(sigma, y) ** 2 * s

    return D, (args.sigma_min, args.sigma_max)


# ------------------------------------------------------------------ from flags to files


def settle(args, images):
    """(sampler, sigma (L,), eps, T): from the flags, or by Techniques 1, 2 and 4."""
    name = args.sampler or ("langevin" if args.improved else "consistent")
    usual = {"consistent": 4, "langevin": 5 if args.improved else 10}
    T = args.T or usual[name]
    eps = 1e-3
    if args.improved and not args.sigma_max:
        args.sigma_max = largest_distance(images, args.device)
    args.sigma_max = args.sigma_max or 5.0
    if not 0 < args.sigma_min < args.sigma_max:
        raise UserError(f"--sigma-min {args.sigma_min} is not below {args.sigma_max}")
    if args.improved:
        ends = args.sigma_max, args.sigma_min
        args.levels, eps = derive(math.prod(args.shape), *ends, T, args.levels)
    args.levels = args.levels or 30
    sigma = geometric_sigmas(args.sigma_max, args.sigma_min, args.levels)
    eps = args.eps or eps
    r, inflation = meter(sigma, eps)
    print(f"steps  r = {r:.4g}; Algorithm 1 inflates the variance by {inflation:.4g}")
    if r > 1:
        print(f"warn   r > {1 if r <= 2 else 2}: Langevin steps overshoot, lower --eps")
    return SAMPLERS[name], sigma, eps, T


def main(argv=()):
    args = common.start(flags(), argv)
    images, labels = (None, None) if args.sample_only else common.data_of(args)
    sampler, sigma, eps, T = settle(args, images)
    guide, _ = common.load_guide(args, "n_classes", ncsn=network)
    run = common.Run(args, network(args))

    def draw(index, watch, T=T):
        x = torch.rand(len(index), *args.shape, device=args.device)
        if args.improved or sampler is sample_consistent:
            x = args.sigma_max * torch.randn_like(x)
        s = as_score(run.ema, common.labels_of(args, index), args.guidance, guide)
        return sampler(watch(s), x, sigma, eps, T, args.denoise)

    quick = partial(draw, T=min(T, 10))
    levels = sigma.float().to(args.device)
    objective = OBJECTIVES[args.objective]
    for x, label in run.batches(images, labels):
        x = x * (1 / 255)  # in [0, 1], as in the paper
        run.update(objective(run.net, x, levels, label, args.power, args.focus))
        if run.step in run.previews:
            common.save_samples(args, quick, run.step, low=0.0)
    common.save_samples(args, draw, low=0.0)


if __name__ == "__main__":
    common.cli(main)
