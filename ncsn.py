"""Noise conditional score networks (NCSN) on small images: score matching, annealed Langevin dynamics.

Papers   Song & Ermon 2019, arXiv:1907.05600 (equation numbers: arXiv v3); images in [0, 1]
         Song & Ermon 2020, arXiv:2006.09011, "Improved techniques": --improved
         Song, Garg, Shi & Ermon 2019, arXiv:1905.07088, sliced score matching: --objective ssm or ssm-vr
Noise    q_sigma(x~ | x) = N(x~ | x, sigma^2 I), sigma_1 > ... > sigma_L geometric           sections 4.1, 4.2
Network  s(x, sigma) = net(x, log sigma) / sigma;  improved: net(x) / sigma                        Technique 3
Loss     l(theta; sigma) = 1/2 E || s(x~, sigma) + (x~ - x) / sigma^2 ||^2                             eq. (5)
         1/L sum_i lambda(sigma_i) l(theta; sigma_i), lambda(sigma) = sigma^2                          eq. (6)
Sample   for sigma_1 ... sigma_L, T times each: x <- x + alpha_i/2 s(x, sigma_i) + sqrt(alpha_i) z,
         alpha_i = eps sigma_i^2 / sigma_L^2                                                      Algorithm 1
Differs  mean over pixels instead of sum; one U-Net that is told log sigma, no RefineNet with one normalisation a
         level; images are not dequantised; clipped gradients, a learning rate that decays, an average of the weights
         and a last denoising step (Tweedie), as in the second paper; and by default more levels, from a larger sigma,
         lambda = sigma^3 (see README, "What differs"). The authors' code and the second paper take x + alpha_i s +
         sqrt(2 alpha_i) z, twice the step at the same eps: what is eps = 2e-5 there is --eps 4e-5 here.

    python ncsn.py --dataset mnist              # trains, then see runs/ncsn-mnist/samples.png and process.gif
    python ncsn.py --dataset mnist --resume     # goes on; with --sample-only just draws
    python ncsn.py --dataset mnist --improved --out runs/ncsnv2-mnist     # Techniques 1 to 5
    python ncsn.py --benchmark      # images a second of the default network, and what its convolutions allow
"""
import concurrent.futures, functools, math, multiprocessing, sys, time
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
import common
import toy
from common import Run, UNet, geometric_sigmas, require

def score(net, x, sigma, label=None):
    """s(x, sigma) = net(x, log sigma) / sigma, an estimate of grad log q_sigma(x); sigma: (B,)."""
    return net(x, sigma.log(), label) / sigma.view(-1, 1, 1, 1)

class Unconditional(UNet):
    """The U-Net for Technique 3: it is not told sigma, so s(x, sigma) = net(x) / sigma."""
    def forward(self, x, noise, label=None):
        return super().forward(x, torch.zeros_like(noise), label)

def loss(net, x, sigma, label=None, power=2.0, p_null=0.1, objective="dsm"):
    """Score matching over the levels sigma (L,), on the device of x, eq. (6), mean over pixels, lambda(sigma) =
    sigma^power. dsm: denoising, eq. (5). ssm, ssm-vr: sliced (1905.07088; eq. (3) is ssm-vr), in expectation
    dsm less sigma^(power - 2) / 2. A label (B,) is hidden (-1) with probability p_null, to learn both."""
    i = torch.randint(len(sigma), (len(x),), device=x.device)              # one level an image: the sum of eq. (6)
    if label is not None:
        label = label.where(torch.rand(len(x), device=x.device) >= p_null, -1)
    sigma_i = sigma[i]                                                     # (B,)
    z = torch.randn_like(x)
    x_tilde = x + sigma_i.view(-1, 1, 1, 1) * z                            # x~ ~ q_sigma(x~ | x)
    if objective == "dsm":
        target = -z / sigma_i.view(-1, 1, 1, 1)                            # grad log q_sigma(x~ | x), section 4.2
        l = 0.5 * (score(net, x_tilde, sigma_i, label) - target).square().flatten(1).mean(1)  # (B,), eq. (5)
    else:
        v = torch.randn_like(x).sign()                                     # Rademacher: E v v^T = I
        with sdpa_kernel(SDPBackend.MATH):                                 # whose attention has a second derivative
            s = score(net, x_tilde.requires_grad_(), sigma_i, label)
            vs = (v * s).flatten(1).sum(1)                                 # v^T s
            grad, = torch.autograd.grad(vs.sum(), x_tilde, create_graph=True)                 # grad_x (v^T s)
        norm = vs.square() if objective == "ssm" else s.square().flatten(1).sum(1)            # SSM, SSM-VR (eq. 3)
        l = ((grad * v).flatten(1).sum(1) + norm / 2) / v[0].numel()       # (B,), v^T grad_x s v + norm / 2
    return (sigma_i ** power * l).mean()                                   # eq. (6)

@torch.no_grad()
def sample(net, x, sigma, eps, T, label=None, denoise=True, frames=None, every=10**9):
    """Annealed Langevin dynamics, Algorithm 1, from x (B, C, H, W), over the levels sigma (L,), T (L,) steps on each.
    denoise: end with E[x | x~] (Tweedie). frames: a list that gets 16 images every so many steps, and the last."""
    at = lambda i: torch.full((len(x),), float(sigma[i]), device=x.device)
    for i in range(len(sigma)):                                            # from the largest sigma to the smallest
        alpha = eps * float(sigma[i] / sigma[-1]) ** 2                     # line 3
        for t in range(T[i]):
            z = torch.randn_like(x)
            x = x + alpha / 2 * score(net, x, at(i), label) + math.sqrt(alpha) * z             # line 6
            if frames is not None and (sum(T[:i]) + t + 1) % every == 0:
                frames.append(x[:16].clone())
    if denoise:
        x = x + float(sigma[-1]) ** 2 * score(net, x, at(-1), label)       # E[x | x~] = x~ + sigma^2 grad log q(x~)
    if frames is not None:
        frames.append(x[:16].clone())
    return x

def meter(sigma, eps):
    """[(sigma_i, r, inflation)] of the levels: r = a / sigma_i^2 of the update x + a s + sqrt(2 a) z, a = alpha_i / 2.
    On a point mass (the stiffest data there is) it multiplies the distance by 1 - r: unstable above r = 2, and the
    variance settles at sigma_i^2 / (1 - r/2), an inflation of 1 / (1 - r/2)."""
    rows = []
    for s in sigma.tolist():
        alpha = eps * s ** 2 / float(sigma[-1]) ** 2
        r = alpha / 2 / s ** 2
        rows.append((s, r, 1 / (1 - r / 2) if r < 2 else math.inf))
    return rows

def largest_distance(images, device="cpu", block=2000):
    """Technique 1: sigma_1 = max_ij || x_i - x_j ||_2 of uint8 images (N, C, H, W) as they are in [0, 1]. Exact: no
    pair is farther apart than the sum of its distances r to the mean, so blocks of smaller r are left out."""
    x = images.flatten(1).to(device) / 255
    r, order = (x - x.mean(0)).norm(dim=1).sort(descending=True)
    x, r, largest = x[order].split(block), r[::block].tolist(), 0.0
    for i in range(len(x)):
        for j in range(i, len(x)):
            if r[i] + r[j] <= largest:
                break
            largest = max(largest, torch.cdist(x[i], x[j]).amax().item())
    return largest

def overlap(gamma, d):
    """Phi(sqrt(2 d) (gamma - 1) + 3 gamma) - Phi(sqrt(2 d) (gamma - 1) - 3 gamma): the share of the noise of one level
    that lies where the noise of the level gamma times as large does, in d dimensions (2006.09011, Technique 2)."""
    Phi, a = (lambda x: math.erfc(-x / math.sqrt(2)) / 2), math.sqrt(2 * d) * (gamma - 1)
    return Phi(a + 3 * gamma) - Phi(a - 3 * gamma)

def level_ratio(d):
    """Technique 2: gamma = sigma_{i-1} / sigma_i for which overlap(gamma, d) = 0.5. UserError for d <= 4: none is."""
    require(d > 4, f"Technique 2 has no solution in d = {d}: for d <= 4 the overlap of two levels is above 0.5 "
            "whatever their ratio; give --levels yourself, without --improved")
    low, high = 1.0, 2 / (1 - 3 / math.sqrt(2 * d))                        # overlap falls from 0.997 to below 0.5
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle, d) > 0.5 else (low, middle)
    return low

def step_size(gamma, T):
    """Technique 4: (r, value), the r = eps / sigma_L^2 whose value is as near 1 as T steps on a level allow, of
    (1-r)^2T (gamma^2 - 2r / (1 - (1-r)^2)) + 2r / (1 - (1-r)^2), the variance on leaving a level over sigma^2 on a
    point mass, entered with the last level's. It stays above 1: 2r / (1 - (1-r)^2) is the meter's 1 / (1 - r/2)."""
    r = torch.logspace(-6, 0, 10 ** 6, dtype=torch.float64)
    inflation = 2 * r / (1 - (1 - r) ** 2)
    value = (1 - r) ** (2 * T) * (gamma ** 2 - inflation) + inflation
    k = (value - 1).abs().argmin()
    return r[k].item(), value[k].item()

# d, sigma_1, L, T, eps of the authors' configurations for 2006.09011; sigma_L = 0.01
PUBLISHED = {"CIFAR-10, 32 x 32": (3072, 50, 232, 5, 6.2e-6), "CelebA, 64 x 64": (12288, 90, 500, 5, 3.3e-6),
             "LSUN bedroom, 128 x 128": (49152, 190, 1086, 3, 1.8e-6), "FFHQ, 256 x 256": (196608, 348, 2311, 3, 9e-7)}

def derive(d, sigma_max, sigma_min, T, L=None):
    """(L, eps for sample, text): levels by Technique 2 if L is None, step size by Technique 4, and the reasons."""
    gamma, span = level_ratio(d), math.log(sigma_max / sigma_min)
    L = L or math.ceil(1 + span / math.log(gamma))
    actual = math.exp(span / max(1, L - 1))                                # a whole number of levels: slightly smaller
    p, (r, value) = overlap(actual, d), step_size(actual, T)
    eps = 2 * r * sigma_min ** 2                                           # x + alpha/2 s here, x + alpha s there
    return L, eps, f"""\
tech 2 Phi(sqrt(2d)(gamma-1) + 3 gamma) - Phi(sqrt(2d)(gamma-1) - 3 gamma) = 0.5, d = {d}: gamma = {gamma:.5f}
       sigma_L = {sigma_min:g}, L = {L}: gamma = (sigma_1/sigma_L)^(1/(L-1)) = {actual:.5f}, overlap {p:.3f}
tech 4 (1-r)^2T (gamma^2 - 2r/(1-(1-r)^2)) + 2r/(1-(1-r)^2) nearest to 1, T = {T}: {value:.4f} at r = {r:.4g},
       eps = r sigma_L^2 = {r * sigma_min ** 2:.3g} in x + alpha s + sqrt(2 alpha) z, which is --eps {eps:.3g} here"""

def network(args):
    """The U-Net of these settings."""
    channels = args.shape[0]
    mult = (1, 2, 2) if args.patch == 1 else (1, 2)                        # 28 is 4 times an odd number
    return (Unconditional if args.improved else UNet)(
        channels, args.width, mult, patch=args.patch, classes=args.n_classes, dropout=args.dropout)

def denoiser(ckpt, net=None, device="cpu"):
    """D(y, sigma, label=None) = E[x | y = x + sigma z] = y + sigma^2 s(y, sigma) (Tweedie) of a checkpoint read by
    load_checkpoint; images in [0, 1], sigma a number or (B,). net: instead of the checkpoint's averaged network."""
    if net is None:
        args = common.argparse.Namespace(**ckpt["args"])
        net = network(args).to(device).eval().requires_grad_(False)
        net.load_state_dict(ckpt["ema"])

    def D(y, sigma, label=None):
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))          # (B,)
        return y + sigma.view(-1, 1, 1, 1) ** 2 * score(net, y, sigma, label)
    return D

# ------------------------------------------------- the papers' claims on points in the plane: python toy.py EXPERIMENT
def settled(r, T, v=1.0):
    """The variance v of N(0, 1) after T steps x + a s + sqrt(2a) z, r = a: v <- (1 - r)^2 v + 2 r, to 1 / (1 - r/2)."""
    end = 1 / (1 - r / 2)
    return end + (1 - r) ** (2 * T) * (v - end)

def sliced(score, x, v):
    """v^T (grad s) v + (v^T s)^2 / 2 at points x (B, d, 1, 1) along directions v (M, B, d) or (M, 1, d): (M, B)."""
    vs = (v * score(x := x.requires_grad_()).flatten(1)).sum(2)
    grad = torch.stack([torch.autograd.grad(row.sum(), x, create_graph=True)[0].flatten(1) for row in vs])
    return (v * grad).sum(2) + vs.square() / 2

def explicit(net, x, sigma):
    """sigma^2 E[tr grad s + |s|^2 / 2] / d at one level sigma (1,), slice by slice along all axes (Hyvarinen 2005)."""
    s, axes = lambda x: score(net, x, sigma.expand(len(x))), torch.eye(x[0].numel())[:, None]
    return sigma.item() ** 2 * sliced(s, x + sigma * torch.randn_like(x), axes).mean()

def cost(net, loss):
    """(MiB that loss(net) keeps to back-propagate, variance of its gradient in 20 calls, summed over the weights)."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        l = loss(net)
    calls = [torch.autograd.grad(l if k == 0 else loss(net), list(net.parameters())) for k in range(20)]
    return sum(kept.values()) / 2 ** 20, sum(torch.stack(g).var(0).sum().item() for g in zip(*calls))

def energy(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of points, without bias: 0 on average if their distributions are equal."""
    total = lambda a, b: torch.cdist(a.flatten(1), b.flatten(1)).sum().item() / len(a)
    return 2 * total(x, y) / len(y) - total(x, x) / (len(x) - 1) - total(y, y) / (len(y) - 1)

def least(f):
    """The c with the least f(c), for 20 seeds: the lowest point of the parabola through f(-1), f(0) and f(1)."""
    rows = torch.tensor([[f(c) for c in (-1, 0, 1) if torch.manual_seed(seed)] for seed in range(20)])
    return (rows[:, 0] - rows[:, 2]) / 2 / (rows[:, 0] + rows[:, 2] - 2 * rows[:, 1])

def langevin():
    """Langevin dynamics draws the density, but steps of size r inflate variances by 1 / (1 - r/2), above 2 forever."""
    normal, marginal = toy.Mixture([1.0], [[2.0]], 0.99), toy.Mixture(m=((1.0,), (-1.0,)))     # 0.99 + 0.1^2 = 1
    x = toy.anneal(toy.MIX.net, torch.randn(10_000, 2, 1, 1), [0.6], 0.06, 1000, denoise=False)[:, 0].flatten()
    def squares(r, T):
        return (toy.anneal(normal.net, 2 + torch.randn(10_000, 1, 1, 1), [0.1], 100 * r, T, denoise=False) - 2) ** 2
    pdf = lambda x: marginal.log_density(toy.image(x[:, None]), 0.6).exp()
    return toy.join((toy.density("x_1", x, pdf, -4, 3), [toy.row("mean of x_1", x, -0.6)]), toy.sweep(
        "r", "variance after 40 steps", (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.05, 2.1), {"exact": 40},
        lambda T, r: squares(r, T), lambda T, r: settled(r, T), logy=True))

def annealed():
    """Plain Langevin dynamics gets the weights of far modes wrong; annealed, as many steps, right; exact score."""
    paths, start = [], toy.uniform(4000)
    plain = toy.anneal(toy.MODES.net, start, [0.1], 10, 1000)
    x = toy.anneal(toy.MODES.net, start, toy.LADDER, 0.2, 100, frames=paths, every=1)
    paths = torch.stack(paths[:-1]).flatten(2)                             # (1000, 16, 2)
    length = (paths[1:] - paths[:-1]).norm(dim=2)                          # of steps; variance 2a / (1 - r/2) in a mode
    exact = [(math.pi * 0.2 * s ** 2 / (1 - 0.1 * s ** 2 / (1 + s ** 2))) ** 0.5 for s in toy.LADDER]
    calm, rows = toy.sweep("level", "length of a step", range(10), {"exact in a mode": exact},
                           lambda _, i: length[100 * i:100 * i + 99], lambda exact, i: exact[i], logy=True)
    lines = [("line", f"sigma {toy.LADDER[i]:.2g}", paths[100 * i:100 * i + 100, 0]) for i in range(0, 10, 3)]
    return [toy.cloud("Langevin dynamics", plain, 10), toy.cloud("annealed Langevin dynamics", x, 10),
            {"title": "one annealed path", "marks": lines, "box": (-25, 25)}, calm], [
            toy.row("share at (5, 5), Langevin", toy.right(plain), 0.8),
            toy.row("share at (5, 5), annealed", toy.right(x), 0.8), *rows]

def scores():
    """Where data are thin one level of noise has nothing to learn from; dark: |s - exact| / (|s| + |exact|) near 1."""
    panels, rows, at = [toy.field("exact, sigma = 0.1", lambda x: toy.MODES.score(x, 0.1), 8)], [], toy.plane(8, 80)
    for L, sigma in ((1, 0.1), (100, 0.1), (100, 5.0)):
        net = toy.trained(toy.MODES, 10.0 if L > 1 else 0.1, 0.1, L)
        s, exact = lambda x: toy.score(net)(x, sigma), lambda x: toy.MODES.score(x, sigma)
        wrong = lambda x: (s(x) - exact(x)).norm(dim=1) / (s(x).norm(dim=1) + exact(x).norm(dim=1))
        panels.append(toy.field(name := f"{L} level{'s'[:L - 1]}, sigma = {sigma:g}", s, 8, wrong))
        for k, i in enumerate(toy.MODES.log_density(at, sigma).argsort(descending=True).chunk(4), 1):
            rows.append(toy.agree(f"{name}, quarter {k} of the plane by density", s(at[i]), exact(at[i])))
    return panels, rows

def matching():
    """Score matching by the exact trace, denoising, sliced: one network, one noise level, 200 steps of 64 points."""
    sigma, rows, pairs = torch.tensor([0.5]), [], []
    for d in (2, 10, 100):
        data = toy.Mixture(m=[[1.0] * d, [-1.0] * d])
        x = data(4000) + sigma * torch.randn(4000, d, 1, 1)
        for objective in ("explicit", "dsm", "ssm", "ssm-vr"):
            torch.manual_seed(0)
            l = explicit if objective == "explicit" else functools.partial(loss, objective=objective)
            draw = lambda net: l(net, data(64), sigma)
            memory, variance = cost(net := toy.Net(d), draw)
            start = time.process_time()
            s, ms = toy.score(toy.fit(net, draw, 200))(x, 0.5), (time.process_time() - start) / 0.2
            rows.append(toy.agree(f"d = {d}, {objective}: {ms:.1f} ms, {memory:.1f} MiB, gradient variance "
                                  f"{variance:.2g}", s, data.score(x, 0.5)))
    x, other, exact = toy.MIX(50_000), toy.Net().requires_grad_(False), toy.MIX.net
    best = toy.MIX.score(noisy := x + sigma * torch.randn_like(x), 0.5)
    for k in range(12):                                                    # networks from far to near and beyond
        net = lambda *at: k / 8 * exact(*at) + (1 - k / 8) * other(*at)
        pairs.append(((toy.score(net)(noisy, 0.5) - best).square().mean() / 8, loss(net, x, sigma)))
    a, b = torch.tensor(pairs).T
    constant = 0.5 - best.square().mean().item() / 8                       # E|z|^2 / 2d - E|sigma s|^2 / 2d
    slopes = least(lambda c: loss(lambda *at: c * exact(*at), x, sigma, objective="ssm").item())
    marks = [("line", "slope 1", [(0, constant), (max(a), constant + max(a))]), ("dots", "networks", pairs)]
    return [{"xlabel": "distance from the exact score", "ylabel": "denoising loss", "marks": marks}], [
        *rows, toy.row("denoising loss less distance, 12 networks (Vincent 2011)", b - a, constant),
        toy.agree("denoising loss less that, on distance", b - constant, a),
        toy.row("ssm: the multiple of the exact score with the least loss", slopes, 1)]

def share(label, xs, f):
    """sweep() of the share of the upper right mode, exact score, after Langevin steps on f(v): [(sigma, a, T), ...]."""
    def ends(f, v):
        x = toy.uniform(2000)
        for sigma, a, T in f(v):
            x = toy.anneal(toy.MODES.net, x, [sigma], a / sigma ** 2, round(T), denoise=False)
        return toy.right(x)
    return toy.sweep(label, "share at (5, 5)", xs, {"data": f}, ends, 0.8, logx=xs[-1] > 20 * xs[0] > 0)

def steps():
    """Ten levels: how the step falls with sigma, how long it is, how many there are, and where; exact score."""
    at = lambda r=0.1, p=2, T=20, k=0: [(s, r * s ** p, T + k * (1 - i / 4.5)) for i, s in enumerate(toy.LADDER)]
    return toy.join(share("a = 0.1 sigma^p, p", (0, 1, 1.5, 2, 2.5, 3), lambda p: at(p=p)),
                    share("a = r sigma^2, r", (0.003, 0.01, 0.03, 0.1, 0.3, 1), at),
                    share("r = 0.1, T", (1, 2, 5, 10, 20, 50, 100), lambda T: at(T=T)),
                    share("T = 10 + k ... 10 - k, k", (-8, -4, 0, 4, 8), lambda k: at(T=10, k=k)))

def levels():
    """From which sigma the levels must begin, how many they must be, and how near each other: the rule of NCSNv2."""
    ladder = lambda sigma_1, L, T: [(s, 0.1 * s ** 2, T) for s in geometric_sigmas(sigma_1, 0.1, L).tolist()]
    def inside(d, gamma):                                                  # noise within 3 deviations of the next's
        return (torch.randn(2000, d).norm(dim=1) - gamma * d ** 0.5).abs() < 3 * gamma / 2 ** 0.5
    return toy.join(
        share("L = 10, T = 100, sigma_1", (1, 2, 5, 10, 20, 50), lambda sigma_1: ladder(sigma_1, 10, 100)),
        share("T = 1000 / L, L", (2, 3, 5, 10, 20, 50, 100), lambda L: ladder(10, L, 1000 // L)),
        toy.sweep("gamma", "overlap", (1.0, 1.02, 1.05, 1.1, 1.2, 1.5), {f"d = {d}": d for d in (100, 784, 3072)},
                  inside, lambda d, gamma: overlap(gamma, d)))

def projections():
    """Sliced score matching: directions v with E v v^T = I are unbiased, signs and the sphere vary least; axes fail."""
    data = toy.Mixture((0.3, 0.7), torch.linspace(0.1, 0.6, 6) * torch.tensor([[1], [-1]]), 0.5)
    x, normal = toy.image(torch.full((20_000, 6), 0.1)), lambda M: torch.randn(M, 20_000, 6)
    s, J = data.score(x[:1]).flatten(), torch.func.jacrev(data.score)(x[:1]).view(6, 6)
    H = J + s.outer(s) / 2                                                 # v^T J v + (v^T s)^2 / 2 = v^T H v
    trace, total, own = H.trace(), H.square().sum(), H.diagonal().square().sum()
    ways = {"normal": (normal, 2 * total),                                 # M directions, and the variance of v^T H v
            "signs": (lambda M: normal(M).sign(), 2 * total - 2 * own),
            "uniform": (lambda M: 12 ** 0.5 * (torch.rand(M, 20_000, 6) - 0.5), 2 * total - 1.2 * own),
            "sphere": (lambda M: 6 ** 0.5 * toy.F.normalize(normal(M), dim=2), 1.5 * total - trace ** 2 / 4),
            "axes": (lambda M: 6 ** 0.5 * torch.eye(6)[:M, None], 0)}
    mean = lambda way, M: trace if way[1] else 6 * H.diagonal()[:M].mean()
    draw = lambda way, M: sliced(data.score, x, way[0](M)).mean(0).detach()
    square = lambda way, M: (draw(way, M) - mean(way, M)) ** 2
    return toy.join(toy.sweep("M", "mean", (1, 2, 4), ways, draw, mean), toy.sweep(
        "M", "variance", (1, 2, 4), ways, square, lambda way, M: way[1] / M))

def too_many_steps():
    """More steps make samples worse where r is large: each level drifts to a variance 1 / (1 - r/2) times too large."""
    thin, ladder = toy.Mixture(v=1e-3), geometric_sigmas(5, 0.1, 10).tolist()
    def squares(r, T):
        x = toy.anneal(thin.net, 5 * torch.randn(2000, 2, 1, 1), ladder, r, T, denoise=False)
        return (x - thin.m[1 - toy.right(x).long()]).square() / (thin.v + 0.01)
    def exact(r, T, v=25.0):                                               # of one mode alone
        for u in [thin.v + s ** 2 for s in ladder]:
            v = u * settled(r * (1 - thin.v / u), T, v / u)
        return v / u
    panel, rows = toy.sweep("T", "variance / exact", (1, 2, 5, 10, 20, 50), {
        f"r = {r}": r for r in (0.05, 0.2, 1.0, 1.9, 2.5)}, squares, exact, logx=True, logy=True)
    del panel["marks"][-2:]                                                # r = 2.5 would leave no room for the others
    return [panel], rows

def objective():
    """The loss with a random sigma for each point is unbiased; how sigma is drawn decides its variance."""
    n, R, L, normal = 100, 4000, 10, toy.Mixture([1.0], [[1.0, 1.0]], 0.5)
    sigma, powers = geometric_sigmas(5, 0.1, L).float(), (0, 1, 2, 3)
    v = normal.v + sigma ** 2                                              # half the exact score, whose loss is known:
    exact = lambda p: sigma ** p / 2 * (1 / sigma ** 2 - 0.75 / v)         # (L,), of each level
    def draw(way, p):
        l, i = exact(p), torch.randint(L, (R * n,)) if way == "uniform" else (torch.arange(n) % L).repeat(R)
        i = l.multinomial(R * n, replacement=True) if way == "importance" else i
        x = normal(R * n) if "point" not in way else normal(R * n // L).repeat_interleave(L, 0)
        z, s = torch.randn_like(x), sigma[i].view(-1, 1, 1, 1)
        terms = s ** p / 2 * (normal.score(x + s * z, sigma[i]) / 2 + z / s) ** 2               # eqs. (5), (6)
        return (terms.mean((1, 2, 3)) * (l.mean() / l[i] if way == "importance" else 1)).view(R, n).mean(1) / l.mean()
    def variance(way, p):
        l, shared = exact(p), sigma.outer(sigma) ** p / 4 * (normal.v / 4 / v.outer(v)) ** 2    # covariances of one x
        square, mean2 = l.square().mean(), l.mean() ** 2
        return {"uniform": 2 * square - mean2, "stratified": square, "importance": mean2,
                "all levels of a point": square + shared.fill_diagonal_(0).sum() / L}[way] / n / mean2
    ways = {k: k for k in ("uniform", "stratified", "all levels of a point", "importance")}
    return toy.join(toy.sweep("p", "mean / exact", powers, ways, draw, 1.0), toy.sweep(
        "p", "variance / mean^2", powers, ways, lambda k, p: (draw(k, p) - 1) ** 2, variance, logy=True))

# ------------------------------------------------------------------------------------------------ from flags to files
def benchmark(precision, device, batch=16, many=100, rounds=30):
    """A line on the default network: images/s in training (forward, backward, Adam) and in one evaluation; what its
    3x3 convolutions need, each timed alone (forward, backward, the faster layout), as a share of the step; the step's
    arithmetic, of these convolutions, against that of the fastest of them; peak memory. Medians, taken in turn."""
    common.keep_memory()
    net, convs, t = UNet().to(device, memory_format=common.FORMAT["cuda" in device]), [], {}
    x, noise = torch.randn(many, 1, 28, 28, device=device), torch.zeros(many, device=device)
    net.bf16 = precision != "fp32"
    for m in (m for m in net.modules() if getattr(m, "kernel_size", 0) == (3, 3)):
        m.register_forward_hook(lambda m, x, y: convs.append((m.in_channels, m.out_channels, y.shape[-1], y.dtype)))
    net(x[:batch], noise[:batch])
    [m._forward_hooks.clear() for m in net.modules()]
    net.compile() if precision == "compiled" else None
    opt = torch.optim.Adam(net.parameters(), fused=True)
    def step():
        net(x[:batch], noise[:batch]).square().mean().backward()
        opt.step(), opt.zero_grad()
    jobs = {"step": step, "net": torch.no_grad()(lambda: net(x, noise))}
    for key, form in ((key, form) for key in dict.fromkeys(convs) for form in common.FORMAT):
        c_in, c_out, size, dtype = key
        a, g = (torch.randn(batch, c, size, size).to(device, dtype, memory_format=form) for c in (c_in, c_out))
        conv = torch.nn.Conv2d(c_in, c_out, 3, padding=1).to(device, dtype, memory_format=form)
        jobs[key, form] = functools.partial(lambda conv, a, g: conv(a).backward(g), conv, a.requires_grad_(), g)
    repeat = 20 if "cuda" in device else 1                               # on CUDA, hide the time to launch a kernel
    for _ in range(rounds + 3):
        for name, job in jobs.items():
            start = time.perf_counter()
            [job() for _ in range(repeat)]
            torch.cuda.synchronize() if repeat > 1 else None
            t.setdefault(name, []).append((time.perf_counter() - start) / repeat)
    t = {name: float(np.median(seconds[3:])) for name, seconds in t.items()}
    alone = [min(t[key, form] for form in common.FORMAT) for key in convs]
    work = [3 * 18e-9 * c_in * c_out * size ** 2 * batch for c_in, c_out, size, _ in convs]  # Gflop, three passes
    rate, fastest = sum(work) / t["step"], max(w / s for w, s in zip(work, alone))
    if "cuda" in device:
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource                                                  # of Unix; macOS counts bytes, Linux KiB
        memory = resource.getrusage(0).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (f"{precision:9s}{batch / t['step']:6.0f} images/s training {many / t['net']:6.0f} images/s an evaluation   "
            f"convolutions {100 * sum(alone) / t['step']:.0f} % of a step   {rate:.0f} Gflop/s, "
            f"{100 * rate / fastest:.0f} % of the fastest convolution's   peak {memory / 2 ** 20:.0f} MiB")

def main():
    p = common.arguments(__doc__)
    p.add_argument("--steps", type=int, help="optimizer steps (None: 4000 on digits, 12000 on others; paper: 200,000)")
    p.add_argument("--batch-size", type=int, default=16, help="images a step, shared by all processes (paper: 128)")
    p.add_argument("--lr", type=float, default=1e-3, help="largest learning rate of Adam: 5%% of the steps up to it, "
                   "then a cosine down to 0 (paper: 1e-3, constant; its successor: 1e-4)")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the average of the weights, after n steps at "
                   "most (1 + n) / (10 + n), Technique 5 (paper: no average; its successor: 0.999)")
    p.add_argument("--improved", action="store_true", help="NCSNv2: sigma_1, L and eps by Techniques 1, 2 and 4, the "
                   "network not told sigma (3), a start from noise; --ema and the last denoising step are there anyway")
    p.add_argument("--derive", action="store_true", help="print what Techniques 1, 2 and 4 give for this data, and for "
                   "the published settings, and stop")
    p.add_argument("--objective", choices=["dsm", "ssm", "ssm-vr"], default="dsm", help="score matching: denoising, "
                   "sliced, sliced with reduced variance")
    p.add_argument("--sigma-max", type=float, help="largest noise sigma_1 (None: 5, improved: Technique 1; paper: 1)")
    p.add_argument("--sigma-min", type=float, default=0.05, help="smallest noise sigma_L (papers: 0.01)")
    p.add_argument("--levels", type=int, help="noise levels L (None: 30, improved: by Technique 2; paper: 10)")
    p.add_argument("--power", type=float, default=3.0, help="lambda(sigma) = sigma^POWER in eq. (6) (papers: 2)")
    p.add_argument("--eps", type=float, help="Langevin step size at the last level (None: 1e-3, improved: by "
                   "Technique 4; paper: 2e-5)")
    p.add_argument("--T", type=int, nargs="+", help="Langevin steps a level, one number or one a level (None: 10, "
                   "improved: 5; paper: 100, its successor: 5)")
    p.add_argument("--start", help="where sampling starts: uniform noise in [0, 1], noise of the largest sigma, or the "
                   "picture in a FILE (None: uniform, improved: noise; papers: uniform)")
    p.add_argument("--no-denoise", action="store_true", help="leave out the last denoising step (paper: left out)")
    p.add_argument("--classes", action="store_true", help="train with the labels, one in ten being hidden")
    p.add_argument("--label", type=int, help="draw this class only; a network trained with --classes")
    p.add_argument("--benchmark", action="store_true", help="print the speed of the default network, in fp32, in bf16, "
                   "and in bf16 compiled, and stop")
    if (args := p.parse_args()).benchmark:
        device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        require(device in ("cpu", "cuda"), f"--benchmark measures on cpu or cuda, not on --device {device}")
        require(device == "cpu" or torch.cuda.is_available(), "--device cuda: there is none here")
        for precision in ("fp32", "bf16", "compiled"):                 # each in a process of its own, for its memory
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                print(pool.submit(benchmark, precision, device).result(), flush=True)
        return
    if args.derive:
        images, _ = toy.load_images(args.dataset, args.data_dir, "train", args.size)
        sigma_1, T = args.sigma_max or largest_distance(images), (args.T or [5])[-1]
        require(0 < args.sigma_min < sigma_1, f"--sigma-min {args.sigma_min} is not between 0 and sigma_1 = {sigma_1}")
        print(f"tech 1 sigma_1 = max_ij || x_i - x_j ||_2 = {sigma_1:.4g}")
        print(derive(images[0].numel(), sigma_1, args.sigma_min, T, args.levels)[2])
        for name, (d, sigma_1, L, T, eps) in PUBLISHED.items():
            print(f"\n{name}: published are sigma_1 = {sigma_1}, L = {L}, T = {T}, eps = {eps:g}")
            for levels in (None, L):                                       # by the rule, and as published
                print(derive(d, sigma_1, 0.01, T, levels)[2])
        return
    args, ckpt = common.settings(p, "ncsn", may_be_0=("label", "n_classes", "power"),
                                 not_kept=("label", "no_denoise", "start"), fixed=("improved",))
    args.steps = args.steps or (4000 if args.dataset == "digits" else 12000)
    args.T = args.T or ([5] if args.improved else [10])
    start = args.start or ("noise" if args.improved else "uniform")
    if not args.sample_only:
        images, labels = toy.load_images(args.dataset, args.data_dir, "train", args.size)
        require(labels is not None or not args.classes, f"--classes: the pictures in {args.dataset} have no labels")
        args.shape, args.n_classes = list(images.shape[1:]), int(labels.max()) + 1 if args.classes else 0
        args.sigma_max = args.sigma_max or (largest_distance(images, args.device) if args.improved else 5.0)
    require(args.sigma_min < args.sigma_max, f"--sigma-min {args.sigma_min} is not below sigma_1 = {args.sigma_max}")
    require(not args.compile or args.objective == "dsm", "--compile knows no second derivatives: --objective dsm only")
    L, eps, text = derive(math.prod(args.shape), args.sigma_max, args.sigma_min, args.T[-1], args.levels) \
        if args.improved else (args.levels or 30, 1e-3, "")
    eps, sigma = args.eps or eps, geometric_sigmas(args.sigma_max, args.sigma_min, L)
    T = args.T * L if len(args.T) == 1 else args.T
    require(len(T) == L, f"--T gives {len(T)} numbers for {L} levels: give one, or one a level")
    require(args.label is None or args.label < args.n_classes,
            f"--label {args.label}: the network knows {args.n_classes} classes (train with --classes)")
    C, H, W = args.shape
    if start not in ("uniform", "noise"):
        picture = toy.read_picture(start).convert("L" if C == 1 else "RGB").resize((W, H))
        picture = torch.from_numpy(np.array(picture)).view(H, W, C).permute(2, 0, 1).to(args.device) / 255

    def draw(net, n, frames=None):                                         # labels in turn: one class a column of ten
        label = torch.arange(n, device=args.device) % max(1, args.n_classes) if args.n_classes else None
        label = label if args.label is None else torch.full_like(label, args.label)
        x = torch.rand(n, C, H, W, device=args.device)
        if start == "noise":
            x = args.sigma_max * torch.randn_like(x)
        elif start != "uniform":
            x = picture.expand_as(x)
        every = max(1, sum(T) // 30)                                       # about 30 frames
        return sample(net, x, sigma, eps, T, label, not args.no_denoise, frames, every)
    run = Run(args, "ncsn", network(args), draw, ckpt)
    run.print(f"data   {args.dataset}, {' x '.join(map(str, args.shape))}, range [0, 1]")
    if args.improved:
        run.print(f"tech 1 sigma_1 = max_ij || x_i - x_j ||_2 = {args.sigma_max:.4g}\n{text}\n"
                  f"tech 3 s(x, sigma) = net(x) / sigma\ntech 5 theta' <- m theta' + (1 - m) theta, m = {args.ema}")
    rows = meter(sigma, eps)
    r, inflation = max((r, inflation) for _, r, inflation in rows)         # the same on all levels
    run.print(f"meter  r = a / sigma^2 = {r:.4g} on all {len(rows)} levels from {sigma[0]:.4g} to {sigma[-1]:.4g}: "
              f"the variance on a point is {inflation:.4g} times too large")
    if r > 1:
        run.print(f"warn   r > 1: Langevin steps overshoot{', and diverge above 2' if r > 2 else ''}; lower --eps")
    if not args.sample_only:
        levels = sigma.float().to(run.device)
        for x, label in run.batches(images, labels if args.classes else None):
            run.step(loss(run.net, x, levels, label, args.power, objective=args.objective))
    if run.rank == 0:
        run.finish(r=r, inflation=inflation)

if __name__ == "__main__":
    common.cli(main)
