"""A laboratory in the plane: every claim of the papers beside its exact answer.

Of a mixture of normal distributions density and score are known at all levels of noise.
An experiment draws OUT/EXPERIMENT.png (dots: measured, lines: exact) and a table: what
was measured, its standard error, and the exact value where there is one.

    python toy.py                # the tour: exact and learned score, Langevin dynamics
    python toy.py EXPERIMENT     # one experiment
    python toy.py all            # every experiment, three minutes of one core
"""

import argparse
import itertools
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import common
import ddpm
import inpaint
import ncsn
import sde
from common import Panel, geometric_sigmas, say

# ----------------------------------------------------------------- data: points (n, d)


class Mixture:
    """sum_k w_k N(m_k, v I), w (K,), m (K, d), of which density and score are known.

    sigma, a number or (n,): at that level of noise, v + sigma^2 instead of v.
    """

    def __init__(self, w=(0.2, 0.8), m=((1.0, 1.0), (-1.0, -1.0)), v=0.1):
        self.w, self.m, self.v = torch.as_tensor(w), torch.as_tensor(m), v

    def __call__(self, n):
        m = self.m[self.w.multinomial(n, replacement=True)]
        return m + self.v**0.5 * torch.randn_like(m)

    def parts(self, x, sigma=0.0):
        """(log w_k N(x; m_k, (v + sigma^2) I), (n, K), and v + sigma^2)."""
        v = self.v + torch.as_tensor(sigma).to(x).view(-1, 1) ** 2
        square = (x[:, None] - self.m.to(x)).square().sum(2)
        log_z = x.shape[1] / 2 * (2 * math.pi * v).log()
        return self.w.to(x).log() - square / (2 * v) - log_z, v

    def log_density(self, x, sigma=0.0):
        return self.parts(x, sigma)[0].logsumexp(1)

    def score(self, x, sigma=0.0):
        parts, v = self.parts(x, sigma)
        return (parts.softmax(1) @ self.m.to(x) - x) / v

    def net(self, x, log_sigma, label=None):
        """The exact network: sigma times the score."""
        return log_sigma.exp().view(-1, 1) * self.score(x, log_sigma.exp())


MIX = Mixture()
MODES = Mixture((0.8, 0.2), ((5.0, 5.0), (-5.0, -5.0)), 1.0)  # of the NCSN paper
LADDER = geometric_sigmas(10, 0.1, 10).tolist()


def heart(n):
    """Uniform where (x^2 + y^2 - 1)^3 < x^2 y^3."""
    x = torch.rand(4 * n + 100, 2) * 2.6 - 1.3
    return x[~outside(x, heart)][:n]


def spiral(turn):
    angle = math.pi * turn
    return torch.cat([angle.cos(), angle.sin()], 1) * angle / 7


def swiss_roll(n):
    """A spiral of one and a half turns, with noise of deviation 0.05."""
    return spiral(1.5 + 3 * torch.rand(n, 1)) + 0.05 * torch.randn(n, 2)


def checkerboard(n):
    """Uniform on every other square of a board of 4 x 4."""
    x = 4 * torch.rand(n) - 2
    y = torch.rand(n) + 2 * torch.randint(2, (n,)) - 2 + x.floor() % 2
    return torch.stack([x, y], 1)


def outside(points, data):
    """Which points lie where no data are; of the swiss roll: 4 deviations from it."""
    x, y = points.T
    if data is heart:
        return (x**2 + y**2 - 1) ** 3 >= x**2 * y**3
    if data is checkerboard:
        return ((x.floor() + y.floor()) % 2 == 1) | (points.abs().amax(1) > 2)
    curve = spiral(torch.linspace(1.5, 4.5, 2000)[:, None])
    return torch.cdist(points, curve).amin(1) > 0.2


def energy(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias: 0 for equal distributions."""

    def total(a, b):
        return torch.cdist(a, b).sum().item() / len(a)

    within = total(x, x) / (len(x) - 1) + total(y, y) / (len(y) - 1)
    return 2 * total(x, y) / len(y) - within


def chi2(x, y, box, cells=16):
    """chi^2 per degree of freedom of the counts of n and n points in the cells of
    (-box, box)^2: 1 on average for equal distributions."""
    a = torch.histogramdd(x, [cells, cells], range=[-box, box] * 2)[0]
    b = torch.histogramdd(y, [cells, cells], range=[-box, box] * 2)[0]
    used = a + b > 0
    return ((a - b) ** 2 / (a + b))[used].sum().item() / (used.sum().item() - 1)


# -------------------------------------------------------------------------- the network


class Net(nn.Module):
    """net(x, log sigma, label=None) = sigma s(x, sigma): the U-Net in small.

    D = c_skip x + c_out F (EDM, table 1). F sees sines of x, each as high as noise
    leaves it, exp(-(w sigma)^2 / 2): edges stay sharp. Four more tell it log sigma.
    """

    def __init__(self, d=2, width=128, waves=6):
        super().__init__()
        self.w, self.v = 2.0 ** torch.arange(waves), torch.tensor([0.25, 0.5, 1, 2])
        sizes = [d + 2 * waves * d + 8, width, width, width]
        layers = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.SiLU()]
        self.F = nn.Sequential(*layers, nn.Linear(width, d))

    def forward(self, x, log_sigma, label=None):
        sigma = log_sigma.exp().view(-1, 1)
        c_in = 1 / (sigma**2 + 0.5).sqrt()  # data of variance 0.5
        angle = (c_in * x)[:, :, None] * self.w  # (n, d, waves)
        height = (-((c_in * sigma * self.w) ** 2) / 2).exp()[:, None]
        waves = torch.cat([height * angle.cos(), height * angle.sin()], 1).flatten(1)
        turn = log_sigma[:, None] * self.v
        out = self.F(torch.cat([c_in * x, waves, turn.cos(), turn.sin()], 1))
        return c_in * (0.5**0.5 * out - sigma * c_in * x)  # (D - x) / sigma


def fit(net, loss, steps=2000):
    """The network after so many steps of Adam on loss(net)."""
    opt = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(steps):
        done = (step + 1) / steps
        cosine = (1 + math.cos(math.pi * done)) / 2
        opt.param_groups[0]["lr"] = 8e-3 * min(1, 20 * done) * cosine
        loss(net).backward()
        opt.step()
        opt.zero_grad()
    return net.requires_grad_(False)


def trained(data, sigma_max, sigma_min, steps=2000, waves=6):
    """The s(x, sigma) that ncsn.loss learns on 1000 levels."""
    sigma, net = geometric_sigmas(sigma_max, sigma_min, 1000).float(), Net(waves=waves)
    fit(net, lambda net: ncsn.loss(net, data(512), sigma), steps)
    return partial(s_theta, net)


def s_theta(net, x, sigma):
    """The plain score s(x, sigma) of a network; sigma a number."""
    return ncsn.score(net, x, torch.as_tensor(sigma).to(x).expand(len(x)))


def s_sde(s, process, x, t):
    """s(x, sigma) as the score(x(t), t) of an SDE: at x(t) / a, sigma = s / a."""
    a, deviation = process.kernel(t)
    return s(x / a, deviation / a) / a


def eps_theta(s, abar, x, t):
    """s(x, sigma) as the eps_theta(x_t, t) of DDPM: -sigma s at x_t / sqrt(abar_t)."""
    sigma = ((1 - abar[t]) / abar[t]).sqrt()
    return -sigma * s(x / abar[t].sqrt(), sigma)


def anneal(s, x, sigma, r, T, denoise=False):
    """ncsn.sample with T steps a = r sigma^2 on each of the levels sigma, a list."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    return ncsn.sample(s, x, sigma, 2 * r * sigma[-1].item() ** 2, T, denoise)


def uniform(n):
    """Points of (-8, 8)^2."""
    return 16 * torch.rand(n, 2) - 8


def right(x):
    """1 in the upper right half of the plane, else 0."""
    return (x.sum(1) > 0).double()


# ---------------------------------------------------------------- tables, and pictures


def row(label, values, exact=math.nan):
    """(label, mean, its standard error, exact) of independent values."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    error = values.std().item() / len(values) ** 0.5
    return label, values.mean().item(), error, float(exact)


def agree(label, a, b, exact=1.0):
    """A row: slope of the scores a on b; the label gets their relative distance."""
    norm = b.square().sum()
    slope = (a * b).sum() / norm
    error = ((a - slope * b).square().sum() / norm / len(a)).sqrt()
    distance = ((a - b).square().sum() / norm).sqrt()
    return f"{label}: distance {distance:.3f}, slope", slope.item(), error.item(), exact


def sweep(x, y, xs, ways, f, exact=math.nan, ys=(), **options):
    """A panel and rows of {label: way}: dots are means of f(way, x), with two standard
    errors; the line is exact(way, x), a number, or (nan) joins the dots; ys: shown."""
    lines, dots, rows = {}, {}, []
    for label, way in ways.items():
        lines[label], dots[label] = [], []
        for v in xs:
            known = exact(way, v) if callable(exact) else exact
            rows.append(row(f"{y}, {label}, {x} = {v:.3g}", f(way, v), known))
            _, mean, error, known = rows[-1]
            lines[label].append((v, mean if math.isnan(known) else known))
            dots[label].append((v, mean, 2 * error))
            ys = [*ys, known, mean - 2 * error, mean + 2 * error]
    panel = Panel(xs, ys, x, y, **options)
    for label in ways:
        panel.line(lines[label], label)
        panel.dots(dots[label], label)
    return panel, rows


def join(*sweeps):
    """The panels and all rows of several sweeps."""
    panels, rows = zip(*sweeps)
    return list(panels), [*itertools.chain(*rows)]


def density(title, x, data, low, high, sigma=0.0):
    """A panel of the histogram of numbers x, two standard errors, and the density."""
    counts, unit = torch.histc(x, 40, low, high), 40 / (high - low) / len(x)
    at = torch.linspace(low, high, 81)
    curve = torch.stack([at, data.log_density(at[:, None], sigma).exp()], 1).tolist()
    dots = torch.stack([at[1::2], counts * unit, 2 * counts.sqrt() * unit], 1).tolist()
    ys = [p[1] + sum(p[2:]) for p in curve + dots]
    panel = Panel([low, high], ys, "x", "density", title)
    panel.line(curve, "exact")
    panel.dots(dots, "drawn")
    return panel


def square(title, box, room=40, names=("x_1", "x_2")):
    """An empty panel of (-box, box)^2, with so many pixels for a legend."""
    panel = Panel([-box, box], [-box, box], *names, title, right=290)
    panel.picture = panel.picture.crop((0, 0, panel.box[2] + room, 900))
    panel.draw = ImageDraw.Draw(panel.picture)
    return panel


def cloud(title, x, box, room=40):
    """A panel of 2,000 points x (n, 2)."""
    panel = square(title, box, room)
    panel.dots(x[:2000][x[:2000].abs().amax(1) < box].tolist(), radius=3)
    return panel


def plane(box, n):
    """n^2 points of (-box, box)^2, row by row from its top, as in a heat map."""
    x = torch.linspace(-box, box, n + 2)[1:-1]
    return torch.cartesian_prod(x.flip(0), x).flip(1)


def heat(panel, values):
    """Shade a panel by values (n, n) from 0 to 1, the first row at its top."""
    rgb = 255 - values[:, :, None].numpy() * [210, 180, 70]
    picture = Image.fromarray(rgb.astype(np.uint8))
    left, top, right, bottom = panel.box
    picture = picture.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    panel.picture.paste(picture, (left, top))
    panel.draw.rectangle(panel.box, outline="#374151", width=2)


def arrows(panel, x, v):
    """Arrows from points x (n, 2) to x + v."""
    for ends in zip(panel.pixels(x.tolist()), panel.pixels((x + v).tolist())):
        start, end = np.array(ends)
        neck = start + 0.65 * (end - start)
        across = 0.2 * (end - start)[::-1] * [1, -1]
        panel.draw.line([*start, *neck], common.COLORS[1], 4)
        panel.draw.polygon([*end, *(neck + across), *(neck - across)], common.COLORS[1])


def field(title, data, f, box):
    """A panel of arrows along f(x), as long as its square root, over the density at
    sigma = 1."""
    panel, x = square(title, box), plane(box, 14)
    p = data.log_density(plane(1.08 * box, 80), 1.0).exp().view(80, 80)
    heat(panel, (p / p.max()).sqrt())
    v = f(x) / f(x).norm(dim=1, keepdim=True).sqrt()
    arrows(panel, x, 2 * box / 15 * v / v.norm(dim=1).max())
    return panel


# ---------------------------- experiments: panels of a picture, rows of a table


def tour():
    """Exact and learned score; what Langevin dynamics draws with the learned one."""
    s, x = trained(MODES, 10.0, 0.1, waves=0), MODES(2000)
    drawn = {
        "data": x,
        "Langevin dynamics, sigma = 1": anneal(s, uniform(2000), [1.0], 0.1, 1000),
        "annealed Langevin dynamics": anneal(s, uniform(2000), LADDER, 0.2, 100),
    }
    rows = [agree("learned score on exact", s(x, 1.0), MODES.score(x, 1.0))]
    rows += [row(f"share at (5, 5), {k}", right(x)) for k, x in drawn.items()]
    panels = [
        field("exact score, sigma = 1", MODES, lambda x: MODES.score(x, 1.0), 8),
        field("learned score, sigma = 1", MODES, lambda x: s(x, 1.0), 8),
    ]
    return [*panels, *(cloud(k, drawn[k], 10) for k in list(drawn)[1:])], rows


def settled(r, T, v=1.0):
    """The variance v of N(0, 1) after T steps x + a s + sqrt(2a) z, r = a.

    v <- (1 - r)^2 v + 2 r, to 1 / (1 - r/2).
    """
    end = 1 / (1 - r / 2)
    return end + (1 - r) ** (2 * T) * (v - end)


def langevin():
    """Langevin dynamics draws the density; steps of size r make its variance
    1 / (1 - r/2) times too large, and above r = 2 it has none."""
    normal, marginal = Mixture([1.0], [[2.0]], 0.99), Mixture(m=((1.0,), (-1.0,)))
    x = anneal(MIX.score, torch.randn(10_000, 2), [0.6], 0.06, 1000)[:, 0]
    panel = density("x_1", x, marginal, -4, 3, sigma=0.6)

    def squares(T, r):  # 0.99 + 0.1^2 = 1
        start = 2 + torch.randn(10_000, 1)
        return (anneal(normal.score, start, [0.1], 100 * r, T) - 2) ** 2

    r = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.05, 2.1)
    what = "r", "variance", r, {"after 40 steps": 40}, squares
    inflated = sweep(*what, lambda T, r: settled(r, T), logy=True)
    return join((panel, [row("mean of x_1", x, -0.6)]), inflated)


def annealed():
    """Langevin dynamics gets the weights of far modes wrong; annealed, as many steps,
    right (0.8). The score is exact."""
    watch, start = common.Watch(), uniform(4000)
    plain = anneal(MODES.score, start, [0.1], 10, 1000)
    x = anneal(watch(MODES.score), start, LADDER, 0.2, 100)
    paths = torch.stack(watch.frames)  # (1000, 8, 2)
    length = (paths[1:] - paths[:-1]).norm(dim=2)
    rows = [row("share at (5, 5), Langevin", right(plain))]
    rows.append(row("share at (5, 5), annealed", right(x)))
    panel = square("one annealed path", 40, room=200)
    for i, sigma in enumerate(LADDER):
        inflation = 1 / (1 - 0.1 * sigma**2 / (1 + sigma**2))  # in a mode
        exact = (math.pi * 0.2 * sigma**2 * inflation) ** 0.5
        path = slice(100 * i, 100 * i + 99)
        rows.append(row(f"length of a step, sigma = {sigma:.2g}", length[path], exact))
        panel.line(paths[path, 0].tolist(), f"sigma {sigma:.2g}")
    titles = {"Langevin dynamics": plain, "annealed Langevin dynamics": x}
    return [*(cloud(k, x, 10, 200) for k, x in titles.items()), panel], rows


def share(label, xs, f):
    """sweep() of the share of the upper right mode after Langevin steps with the exact
    score on the levels f(v) = [(sigma, a, T), ...]."""

    def ends(f, v):
        x = uniform(2000)
        for sigma, a, T in f(v):
            x = anneal(MODES.score, x, [sigma], a / sigma**2, round(T))
        return right(x)

    log = {"logx": True, "title": "line: the data's share"}
    panel, rows = sweep(label, "share", xs, {"drawn": f}, ends, ys=[0.8], **log)
    panel.line([(xs[0], 0.8), (xs[-1], 0.8)], "data")
    return panel, rows


def levels():
    """The share of a mode by where levels begin, how many they are, how long a step is;
    and how many must be for neighbours to overlap: NCSNv2, Technique 2."""

    def at(sigma_1=10, L=10, r=0.1, T=100):
        sigma = geometric_sigmas(sigma_1, 0.1, L).tolist()
        return [(s, r * s**2, T) for s in sigma]

    def inside(d, gamma):  # noise within 3 deviations of the next level's
        off = torch.randn(2000, d).norm(dim=1) - gamma * d**0.5
        return off.abs() < 3 * gamma / 2**0.5

    def exact(d, gamma):  # by the distribution of |z|^2
        r = gamma * (torch.tensor([-3, 3]) / 2**0.5 + d**0.5)
        low, high = torch.special.gammainc(torch.tensor(d / 2), r.clamp(min=0) ** 2 / 2)
        return high - low

    count, size = (2, 3, 5, 10, 20, 50, 100), (0.003, 0.01, 0.03, 0.1, 0.3, 1)
    what = "gamma", "overlap", (1.0, 1.02, 1.05, 1.1, 1.2, 1.5)
    ways = {f"d = {d}: {ncsn.level_ratio(d):.3f}": d for d in (100, 784, 3072)}
    return join(
        share("sigma_1, 10 levels", (1, 2, 5, 10, 20, 50), lambda s: at(s)),
        share("L, T = 1000 / L", count, lambda L: at(L=L, T=1000 // L)),
        share("r of the step r sigma^2, T = 20", size, lambda r: at(r=r, T=20)),
        sweep(*what, ways, inside, exact, title="names: where the rule has 0.5"),
    )


def too_many_steps():
    """More steps make samples worse where r is large: each level drifts to a variance
    1 / (1 - r/2) times too large."""
    thin, ladder = Mixture(v=1e-3), geometric_sigmas(5, 0.1, 10).tolist()

    def squares(r, T):
        x = anneal(thin.score, 5 * torch.randn(2000, 2), ladder, r, T)
        return (x - thin.m[1 - right(x).long()]).square() / (thin.v + 0.01)

    def exact(r, T):  # of one mode alone; with fewer steps the modes are not apart
        v = 25.0 if T >= 10 else math.nan
        for sigma in ladder:
            u = thin.v + sigma**2
            v = u * settled(r * (1 - thin.v / u), T, v / u)
        return v / u

    ways = {f"r = {r}": r for r in (0.05, 0.2, 1.0, 1.9)}
    what = "T", "variance / exact", (1, 2, 5, 10, 20, 50), ways, squares, exact
    log = {"logx": True, "logy": True, "title": "4 curves; r = 2.5 ends at 1e20"}
    panel, rows = sweep(*what, **log)
    return [panel], [*rows, row("variance / exact, r = 2.5, T = 5", squares(2.5, 5))]


def matching():
    """The losses of c times the exact score s: denoising, (c - 1)^2 E |sigma s|^2 / 2d
    and a constant (Vincent 2011); sliced, 1/2 less: all are least at c = 1."""
    sigma, at = torch.tensor([0.5]), plane(6, 200)
    p = MIX.log_density(at, 0.5).softmax(0)
    square = (p @ MIX.score(at, 0.5) ** 2).sum().item() / 16  # E |sigma s|^2 / 2d

    def losses(loss, c):
        def net(*at):
            return c * MIX.net(*at)

        return [loss(net, MIX(2000), sigma).item() for _ in range(20)]

    def exact(loss, c):
        constant = 0.5 if loss is ncsn.loss else 0.0
        return ((c - 1) ** 2 - 1) * square + constant

    ways = {"denoising": ncsn.loss, "sliced": partial(ncsn.ssm_loss, reduced=False)}
    ways["sliced, reduced"] = ncsn.ssm_loss
    return join(sweep("c", "loss", (0.2, 0.6, 1, 1.4, 1.8), ways, losses, exact))


def projections():
    """Sliced score matching: directions v with E v v^T = I are unbiased; signs and the
    sphere vary least."""
    m = torch.linspace(0.1, 0.6, 6) * torch.tensor([[1], [-1]])
    data, x = Mixture((0.3, 0.7), m, 0.5), torch.full((1, 6), 0.1)
    s, J = data.score(x)[0], torch.func.jacrev(data.score)(x).view(6, 6)
    H = J + s.outer(s) / 2  # v^T (grad s) v + (v^T s)^2 / 2 = v^T H v
    trace, total, own = H.trace(), H.square().sum(), H.diagonal().square().sum()
    variance = {"normal": 2 * total, "signs": 2 * total - 2 * own}  # of v^T H v
    variance["sphere"] = 1.5 * total - trace**2 / 4

    def draw(way, M):
        v = torch.randn(M, 20_000, 6)
        if way == "signs":
            v = v.sign()
        if way == "sphere":
            v = 6**0.5 * F.normalize(v, dim=2)
        return ((v @ H) * v).sum(2).mean(0)

    def square(way, M):
        return (draw(way, M) - trace) ** 2

    mean = sweep("M", "mean", (1, 2, 4), {k: k for k in variance}, draw, trace)
    what = "M", "variance", (1, 2, 4), {k: k for k in variance}, square
    return join(mean, sweep(*what, lambda k, M: variance[k] / M))


def ode():
    """The probability flow ODE, exact score: order of DDIM and of Heun, likelihood."""
    small, edm = sde.EDM(0.01, 5.0), sde.EDM(0.01, 100.0)
    s, x = partial(s_sde, MIX.score, small), 5 * torch.randn(500, 2).double()

    def ddim(n):  # Euler's method in sigma
        abar = 1 / (1 + common.karras_sigmas(n, 0.01, 5.0).flip(0) ** 2)
        eps = partial(eps_theta, MIX.score, abar)
        return ddpm.ddim(eps, x / 26**0.5, abar, range(n, -1, -1))

    def heun(n):
        return sde.heun(s, small, x, n)

    def error(f, n):
        return (f(n) - best).norm(dim=1)

    best, n, ways = heun(2000), (16, 32, 64, 128, 256), {"DDIM": ddim, "Heun": heun}
    panel, rows = sweep("steps", "error", n, ways, error, logx=True, logy=True)
    y = MIX(1000).double()  # N(0, 100^2 I) is near enough to p_T of edm
    log_p, _ = sde.log_likelihood(partial(s_sde, MIX.score, edm), edm, y, probes=0)
    log_p = log_p.flatten() - MIX.log_density(y, 0.01)
    for name, order in (("DDIM", 1), ("Heun", 2)):
        ratio = error(ways[name], 128).median() / error(ways[name], 256).median()
        rows.append((f"order of {name}", ratio.log2().item(), math.nan, order))
    return [panel], [*rows, row("log p by the ODE less the exact, nats", log_p, 0)]


def codes():
    """Two networks trained apart give a point the same code x(T): that of the data."""
    vp, x = sde.VP(), MIX(1000)
    scores = {"exact": MIX.score}
    for name in ("network 1", "network 2"):
        scores[name] = trained(MIX, 100.0, 0.005, 1000)
    code, rows, panels = {}, [], []
    for name, s in scores.items():
        flow = sde.flow(partial(s_sde, s, vp), vp)
        code[name] = sde.rk45(flow, x, vp.t_min, vp.T, 1e-4)[:, 0]
    for a, b in itertools.combinations(code, 2):
        pair = torch.stack([code[a], code[b]])
        panels.append(square("codes x_1(T)", 4, names=(a, b)))
        panels[-1].dots(pair.T.tolist(), radius=4)
        r = torch.corrcoef(pair)[0, 1].item()
        error = (1 - r**2) / len(x) ** 0.5
        rows.append((f"correlation of the codes, {a} and {b}", r, error, math.nan))
    return panels, rows


SETS = ((heart, 1.5), (swiss_roll, 2.5), (checkerboard, 2))


def methods(s, n):
    """{name: draw(z)} of seven samplers with n evaluations of the score s(x, sigma)."""
    abar, vp = ddpm.schedule("cosine", 200), sde.VP(1e-3)
    eps, f = partial(eps_theta, s, abar), partial(s_sde, s, vp)
    tau, ts = ddpm.subsequence(200, n), sde.times(vp, n - 1)
    ladder = geometric_sigmas(5, 0.01, n // 2).tolist()
    return {
        "NCSN": lambda z: anneal(s, 5 * z, ladder, 0.5, 2, denoise=True),
        "DDPM": lambda z: ddpm.ancestral(eps, z, abar, tau),
        "ODE": lambda z: sde.heun(f, vp, z, n // 2),
        "DDIM": lambda z: ddpm.ddim(eps, z, abar, tau),
        "Euler-Maruyama": lambda z: sde.em(f, vp, z, ts),
        "reverse diffusion": lambda z: sde.reverse(f, vp, z, ts),
        "predictor-corrector": lambda z: sde.pc_vp(f, vp, z, sde.times(vp, n // 2)),
    }


def samplers():
    """Every sampler draws three sets of data with one network a set, in 20 and in 200
    evaluations: the share of points where no data are. The picture: 200."""
    panels, rows = [], []
    for data, box in SETS:
        s, title = trained(data, 20, 0.005, 4000), data.__name__.replace("_", " ")
        drawn, real = {"data": data(4000)}, data(4000)
        for n in (20, 200):
            for name, draw in methods(s, n).items():
                drawn[f"{name}, {n}"] = draw(torch.randn(4000, 2))
        for name, x in drawn.items():
            label = f"{title}, {name}: energy distance {energy(x, real):.4f}, "
            label += f"chi^2 {chi2(x, real, box):.2f}, outside"
            rows.append(row(label, outside(x, data)))
        for name in ("data", "NCSN, 200", "DDPM, 200", "ODE, 200"):
            panels.append(cloud(f"{title}, {name}", drawn[name], 1.1 * box))
    return panels, rows


@torch.no_grad()
def metropolis(log_density, s, x, a, T):
    """(x, share accepted (n,)) after T steps y = x + a s + sqrt(2a) z, each taken with
    probability p(y) q(x | y) / (p(x) q(y | x)) (Roberts & Tweedie 1996)."""

    def log_q(y, x):  # of the step to y from x
        return -(y - x - a * s(x)).square().sum(1) / (4 * a)

    accepted = 0
    for _ in range(T):
        y = x + a * s(x) + math.sqrt(2 * a) * torch.randn_like(x)
        ratio = log_density(y) + log_q(x, y) - log_density(x) - log_q(y, x)
        take = torch.rand(len(x)).log() < ratio
        x, accepted = torch.where(take[:, None], y, x), accepted + take / T
    return x, accepted


def mala():
    """Metropolis' test takes away the error of the step."""

    def tested(r):
        return metropolis(MIX.log_density, MIX.score, MIX(4000), 0.1 * r, 100)

    def square(plain, r):  # of the distance from the mode
        if plain:
            x = anneal(MIX.score, MIX(4000), [1e-3], 1e5 * r, 100)
        else:
            x = tested(r)[0]
        return (x - MIX.m[1 - right(x).long()]) ** 2

    r, ways = (0.05, 0.1, 0.3, 0.6, 0.9, 1.2, 1.5), {"Langevin": 1, "MALA": 0}
    what = "r", "variance in a mode", r, ways, square
    variance = sweep(*what, lambda plain, r: 0.1 / (1 - plain * r / 2))
    what = "r", "share accepted", r, {"MALA": 0}
    return join(variance, sweep(*what, lambda _, r: tested(r)[1]))


def conditional():
    """x_2 given x_1 = 0.1: a noisy x_1 put into every step is far off; going back and
    forth in each (RePaint) is nearer."""
    op, b = inpaint.masked(torch.tensor([1.0, 0.0])), torch.tensor([[0.1, 0.0]])
    sigma, drawn = inpaint.levels("repaint", 0.02, 20.0, 100), {}

    def D(x, s):
        return x + s**2 * MIX.score(x, s)

    for U in (1, 3, 10, 20):
        x = 20 * torch.randn(4000, 2)
        drawn[U] = inpaint.repaint(D, b.expand(4000, 2), op, x, sigma, U)[:, 1]
    w = Mixture(MIX.w, MIX.m[:, :1]).parts(b[:, :1])[0].softmax(1)[0]  # given x_1
    exact = Mixture(w, MIX.m[:, 1:])
    upper = (w * torch.special.ndtr(exact.m.flatten() / exact.v**0.5)).sum()
    what = "times", "P(x_2 > 0)", list(drawn), {"RePaint": drawn}
    panel, rows = sweep(*what, lambda drawn, U: drawn[U] > 0, upper)
    titles = {1: "x_2, each step once", 20: "x_2, each step 20 times"}
    shown = [density(titles[U], drawn[U], exact, -2.5, 2.5) for U in titles]
    return [*shown, panel], rows


# -------------------------------------------------------------------------- the command

NAMES = (
    "tour langevin annealed levels too-many-steps mala "
    "matching projections ode codes samplers conditional"
)


def main(argv=None):
    p = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = NAMES.split()
    p.add_argument("experiment", nargs="?", default="tour", choices=["all", *names])
    p.add_argument(
        "--out", type=common.path, default="runs/toy", help="of the pictures"
    )
    p.add_argument("--seed", type=common.SEED, default=0, help="of all that is random")
    args = p.parse_args(argv)
    for name in names if args.experiment == "all" else [args.experiment]:
        common.seed_all(args.seed)
        began, experiment = time.perf_counter(), globals()[name.replace("-", "_")]
        panels, rows = experiment()
        say(f"{name}: {' '.join(experiment.__doc__.split())}")
        for label, measured, error, exact in rows:
            line = f"    {label:80s} {measured:10.5g}"
            if math.isfinite(error):
                line += f"  +- {error:<8.4g}"
            say(line + (f"  exact {exact:.4g}" if math.isfinite(exact) else ""))
        path = Path(args.out) / f"{name}.png"
        cols = 4 if panels[0].picture.width < 1100 else 2
        common.save_picture(common.sheet(panels, min(cols, len(panels))), path)
        say(f"saved  {path}, {time.perf_counter() - began:.1f} s\n")


if __name__ == "__main__":
    common.cli(main)
