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
from functools import partial

import numpy as np
import torch
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
    """sum_k w_k N(m_k, v I), w (K,), m (K, d), of which density and score are known; at
    noise level sigma, a number or (n,), v + sigma^2 instead of v."""

    def __init__(self, w=(0.2, 0.8), m=((1.0, 1.0), (-1.0, -1.0)), v=0.1):
        self.w = torch.as_tensor(w)
        self.m = torch.as_tensor(m)
        self.v = v

    def __call__(self, n):
        m = self.m[self.w.multinomial(n, replacement=True)]
        return m + self.v**0.5 * torch.randn_like(m)

    def parts(self, x, sigma=0.0):
        """(log w_k N(x; m_k, (v + sigma^2) I), (n, K), and v + sigma^2)."""
        sigma = torch.as_tensor(sigma).to(x).view(-1, 1)
        v = self.v + sigma**2
        square = (x[:, None] - self.m.to(x)).square().sum(2)
        log_z = x.shape[1] / 2 * (2 * math.pi * v).log()
        return self.w.to(x).log() - square / (2 * v) - log_z, v

    def log_density(self, x, sigma=0.0):
        parts, _ = self.parts(x, sigma)
        return parts.logsumexp(1)

    def score(self, x, sigma=0.0):
        parts, v = self.parts(x, sigma)
        mean = parts.softmax(1) @ self.m.to(x)
        return (mean - x) / v


MIX = Mixture()
MODES = Mixture((0.8, 0.2), ((5.0, 5.0), (-5.0, -5.0)), 1.0)  # of the NCSN paper
LADDER = geometric_sigmas(10, 0.1, 10)


def heart(n):
    """Uniform where (x^2 + y^2 - 1)^3 < x^2 y^3."""
    x = torch.rand(4 * n + 100, 2) * 2.6 - 1.3
    return x[~outside(x, heart)][:n]


def spiral(turn):
    """The points (n, 2) of a spiral after so many half turns (n, 1)."""
    angle = math.pi * turn
    return torch.cat([angle.cos(), angle.sin()], 1) * angle / 7


def swiss_roll(n):
    """A spiral of one and a half turns, with noise of deviation 0.05."""
    return spiral(1.5 + 3 * torch.rand(n, 1)) + 0.05 * torch.randn(n, 2)


def checkerboard(n):
    """Uniform on every other square of a board of 4 x 4."""
    x = 4 * torch.rand(n) - 2
    y = torch.rand(n) + 2 * torch.randint(2, (n,)) - 2
    return torch.stack([x, y + x.floor() % 2], 1)


def outside(points, data):
    """Which points lie where no data are; of the swiss roll: 4 deviations from it."""
    x, y = points.T
    if data is heart:
        return (x**2 + y**2 - 1) ** 3 >= x**2 * y**3
    if data is checkerboard:
        white = (x.floor() + y.floor()) % 2 == 1
        return white | (points.abs().amax(1) > 2)
    curve = spiral(torch.linspace(1.5, 4.5, 2000)[:, None])
    return torch.cdist(points, curve).amin(1) > 0.2


def energy(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias: 0 for equal distributions."""
    n, m = len(x), len(y)
    between = torch.cdist(x, y).sum().item() / (n * m)
    within_x = torch.cdist(x, x).sum().item() / (n * (n - 1))
    within_y = torch.cdist(y, y).sum().item() / (m * (m - 1))
    return 2 * between - within_x - within_y


def chi2(x, y, box, cells=16):
    """chi^2 per degree of freedom of the counts of n and n points in the cells of
    (-box, box)^2: 1 on average for equal distributions."""
    how = {"bins": cells, "range": [-box, box] * 2}
    a, _ = torch.histogramdd(x, **how)
    b, _ = torch.histogramdd(y, **how)
    total = a + b
    parts = ((a - b) ** 2 / total)[total > 0]
    return parts.sum().item() / (len(parts) - 1)


# -------------------------------------------------------------------------- the network


class Net(nn.Module):
    """In the U-Net's place: net(x, log sigma) = sigma s(x, sigma), D = c_skip x + c_out
    F (EDM, Table 1). F sees sines of x, each as high as noise leaves it,
    exp(-(w sigma)^2 / 2): edges stay sharp. Eight more tell it log sigma."""

    def __init__(self, width=128, waves=6):
        super().__init__()
        self.w = 2.0 ** torch.arange(waves)
        self.v = 2.0 ** torch.arange(-2, 2)
        layers = [nn.Linear(2 + 4 * waves + 8, width)]
        for n_out in (width, width, 2):
            layers += [nn.SiLU(), nn.Linear(width, n_out)]
        self.F = nn.Sequential(*layers)

    def forward(self, x, log_sigma, label=None):
        sigma = log_sigma.exp().view(-1, 1)
        c_in = 1 / (sigma**2 + 0.5).sqrt()  # data of variance 0.5
        y = c_in * x
        angle = y[:, :, None] * self.w  # (n, 2, waves)
        blur = c_in * sigma * self.w  # deviation of the angle, (n, waves)
        height = (-(blur**2) / 2).exp()[:, None]
        waves = height * torch.cat([angle.cos(), angle.sin()], 1)
        turn = log_sigma[:, None] * self.v
        seen = [y, waves.flatten(1), turn.cos(), turn.sin()]
        out = self.F(torch.cat(seen, 1))
        return c_in * (0.5**0.5 * out - sigma * c_in * x)  # (D - x) / sigma


def trained(data, sigma_max, sigma_min, steps=2000, waves=6):
    """The s(x, sigma) that ncsn.loss learns on 1000 levels by so many steps of Adam."""
    sigma = geometric_sigmas(sigma_max, sigma_min, 1000).float()
    net = Net(waves=waves)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(steps):
        done = (step + 1) / steps
        cosine = 1 + math.cos(math.pi * done)
        opt.param_groups[0]["lr"] = 4e-3 * min(1, 20 * done) * cosine
        ncsn.loss(net, data(512), sigma).backward()
        opt.step()
        opt.zero_grad()
    return partial(s_theta, net.requires_grad_(False))


def s_theta(net, x, sigma):
    """The plain score s(x, sigma) of a network; sigma a number."""
    sigma = torch.as_tensor(sigma).to(x)
    return ncsn.score(net, x, sigma.expand(len(x)))


def s_sde(s, process, x, t):
    """s(x, sigma) as the score(x(t), t) of an SDE: at x(t) / a, sigma = s / a."""
    a, deviation = process.kernel(t)
    return s(x / a, deviation / a) / a


def eps_theta(s, abar, x, t):
    """s(x, sigma) as the eps_theta(x_t, t) of DDPM: -sigma s at x_t / sqrt(abar_t)."""
    sigma = ((1 - abar[t]) / abar[t]).sqrt()
    return -sigma * s(x / abar[t].sqrt(), sigma)


def anneal(s, x, sigma, r, T, denoise=False):
    """ncsn.sample with T steps a = r sigma^2 on each of the levels sigma."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    eps = 2 * r * sigma[-1].item() ** 2
    return ncsn.sample(s, x, sigma, eps, T, denoise)


def uniform(n):
    """Points of (-8, 8)^2."""
    return 16 * torch.rand(n, 2) - 8


def side(x):
    """0 in the upper right half of the plane, else 1: the number of a mode."""
    return (x.sum(1) <= 0).long()


# ---------------------------------------------------------------- tables, and pictures


def row(label, values, exact=math.nan):
    """(label, mean, its standard error, exact) of independent values."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    error = values.std().item() / len(values) ** 0.5
    return label, values.mean().item(), error, float(exact)


def agree(label, a, b):
    """A row: slope of the scores a on b; the label gets their relative distance."""
    slope = (a * b).sum() / b.square().sum()
    error = (a - slope * b).norm() / b.norm() / len(a) ** 0.5
    distance = (a - b).norm() / b.norm()
    return f"{label}: distance {distance:.3f}, slope", slope, error, 1.0


def sweep(x, y, xs, ways, f, exact=math.nan, **options):
    """[A panel] and rows of {label: way}: dots are means of f(way, x), two standard
    errors; the line is exact(way, x), a number, or (nan) joins the dots."""
    curves, rows, ys = [], [], []
    for label, way in ways.items():
        line, dots = [], []
        for v in xs:
            known = exact(way, v) if callable(exact) else exact
            rows.append(row(f"{y}, {label}, {x} = {v:.3g}", f(way, v), known))
            _, mean, error, known = rows[-1]
            line.append((v, mean if math.isnan(known) else known))
            dots.append((v, mean, 2 * error))
            ys += [known, mean - 2 * error, mean + 2 * error]
        curves.append((label, line, dots))
    panel = Panel(xs, ys, x, y, **options)
    for label, line, dots in curves:
        panel.line(line, label)
        panel.dots(dots, label)
    return [panel], rows


def density(title, x, data, sigma, low, high):
    """A panel of the histogram of numbers x, two standard errors, and the density."""
    counts = torch.histc(x, 40, low, high)
    unit = 40 / (high - low) / len(x)
    drawn = counts * unit
    error = 2 * counts.sqrt() * unit
    at = torch.linspace(low, high, 81)
    exact = data.log_density(at[:, None], sigma).exp()
    ys = torch.cat([exact, drawn + error]).tolist()
    panel = Panel([low, high], ys, "x", "density", title)
    panel.line(torch.stack([at, exact], 1).tolist(), "exact")
    panel.dots(torch.stack([at[1::2], drawn, error], 1).tolist(), "drawn")
    return panel


def frame(title, box, names=("x_1", "x_2")):
    """An empty panel of (-box, box)^2, without room for a legend."""
    panel = Panel([-box, box], [-box, box], *names, title, right=290)
    panel.picture = panel.picture.crop((0, 0, panel.box[2] + 40, 900))
    panel.draw = ImageDraw.Draw(panel.picture)
    return panel


def cloud(title, x, box):
    """A panel of 2,000 points x (n, 2)."""
    panel = frame(title, box)
    x = x[:2000]
    panel.dots(x[x.abs().amax(1) < box].tolist(), radius=3)
    return panel


def plane(box, n):
    """n^2 points of (-box, box)^2, row by row from its top, as in a heat map."""
    x = torch.linspace(-box, box, n + 2)[1:-1]
    return torch.cartesian_prod(x.flip(0), x).flip(1)


def arrows(panel, x, v):
    """Arrows from points x (n, 2) to x + v."""
    color = common.COLORS[1]
    for start, end in zip(panel.pixels(x.tolist()), panel.pixels((x + v).tolist())):
        along = np.subtract(end, start)
        across = 0.2 * along[::-1] * [1, -1]
        neck = start + 0.65 * along
        panel.draw.line([*start, *neck], color, 4)
        panel.draw.polygon([*end, *(neck + across), *(neck - across)], color)


def field(title, data, s, box):
    """A panel of arrows along s(x, 1), over the density at sigma = 1."""
    panel = frame(title, box)
    left, top, right, bottom = panel.box
    p = data.log_density(plane(1.08 * box, 80), 1.0).exp()
    shade = (p / p.max()).sqrt().view(80, 80, 1)
    rgb = 255 - shade.numpy() * [210, 180, 70]
    picture = Image.fromarray(rgb.astype(np.uint8))
    picture = picture.resize((right - left, bottom - top))
    panel.picture.paste(picture, (left, top))
    panel.draw.rectangle(panel.box, outline="#374151", width=2)
    x = plane(box, 14)
    v = s(x, 1.0)
    v = v / v.norm(dim=1, keepdim=True).sqrt()  # roots of the lengths
    arrows(panel, x, 2 * box / 15 * v / v.norm(dim=1).max())
    return panel


def clouds(drawn):
    """Panels of the points {name: x}, and rows of their share in the mode (5, 5)."""
    panels, rows = [], []
    for name, x in drawn.items():
        panels.append(cloud(name, x, 10))
        rows.append(row(f"share at (5, 5), {name}", side(x) == 0))
    return panels, rows


# ---------------------------- experiments: panels of a picture, rows of a table


def tour():
    """Exact and learned score; what Langevin dynamics draws with the learned one."""
    s = trained(MODES, 10.0, 0.1, waves=0)
    x = MODES(2000)
    drawn = {
        "data": x,
        "Langevin dynamics, sigma = 1": anneal(s, uniform(2000), [1.0], 0.1, 1000),
        "annealed Langevin dynamics": anneal(s, uniform(2000), LADDER, 0.2, 100),
    }
    panels, shares = clouds(drawn)
    exact = field("exact score, sigma = 1", MODES, MODES.score, 8)
    learned = field("learned score, sigma = 1", MODES, s, 8)
    slope = agree("learned score on exact", s(x, 1.0), MODES.score(x, 1.0))
    return [exact, learned, *panels[1:]], [slope, *shares]


def settled(T, r, v=1.0):
    """The variance v of points after T steps x + a s + sqrt(2a) z, r = a, on N(0, 1):
    each makes it (1 - r)^2 v + 2 r, and it settles at 1 / (1 - r/2)."""
    end = 1 / (1 - r / 2)
    return end + (1 - r) ** (2 * T) * (v - end)


def langevin():
    """Langevin dynamics draws the density; steps of size r make its variance
    1 / (1 - r/2) times too large, and above r = 2 it has none."""
    x = anneal(MIX.score, torch.randn(10_000, 2), [0.6], 0.06, 1000)[:, 0]
    marginal = Mixture(m=((1.0,), (-1.0,)))
    panel = density("x_1", x, marginal, 0.6, -4, 3)
    normal = Mixture([1.0], [[2.0]], 0.99)  # of variance 1 at sigma = 0.1

    def squares(T, r):
        start = 2 + torch.randn(10_000, 1)
        return (anneal(normal.score, start, [0.1], 100 * r, T) - 2) ** 2

    r = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.05, 2.1)
    ways = {"after 40 steps": 40}
    panels, rows = sweep("r", "variance", r, ways, squares, settled, logy=True)
    return [panel, *panels], [row("mean of x_1", x, -0.6), *rows]


def annealed():
    """Langevin dynamics gets the weights of far modes wrong; annealed, as many steps,
    right (0.8). The score is exact."""
    start = uniform(4000)
    drawn = {
        "Langevin dynamics": anneal(MODES.score, start, [0.1], 10, 1000),
        "annealed Langevin dynamics": anneal(MODES.score, start, LADDER, 0.2, 100),
    }
    return clouds(drawn)


def levels():
    """The share of a mode by where levels begin, how many they are, how long a step is:
    Langevin steps with the exact score. The line: the data's share."""

    def share(settings, v):  # {what the axis shows: all four}
        sigma_1, L, r, T = settings[v]
        sigma = geometric_sigmas(sigma_1, 0.1, L)
        return side(anneal(MODES.score, uniform(2000), sigma, r, T)) == 0

    def draw(x, settings):
        return sweep(x, "share", settings, {"drawn": settings}, share, 0.8, logx=True)

    start = {v: (v, 10, 0.1, 100) for v in (1, 2, 5, 10, 20, 50)}
    count = {v: (10, v, 0.1, 1000 // v) for v in (2, 3, 5, 10, 20, 50, 100)}
    size = {v: (10, 10, v, 20) for v in (0.003, 0.01, 0.03, 0.1, 0.3, 1)}
    left, rows = draw("sigma_1, 10 levels", start)
    middle, more = draw("L, T = 1000 / L", count)
    right, last = draw("r of the step r sigma^2, T = 20", size)
    return left + middle + right, rows + more + last


def too_many_steps():
    """More steps make samples worse where r is large: each level drifts to a variance
    1 / (1 - r/2) times too large."""
    thin = Mixture(v=1e-3)
    ladder = geometric_sigmas(5, 0.1, 10).tolist()

    def squares(r, T):
        x = anneal(thin.score, 5 * torch.randn(2000, 2), ladder, r, T)
        return (x - thin.m[side(x)]) ** 2 / (thin.v + 0.01)

    def exact(r, T):  # of one mode alone; with fewer steps the modes are not apart
        v = 25.0 if T >= 10 else math.nan
        for sigma in ladder:
            u = thin.v + sigma**2
            v = u * settled(T, r * (1 - thin.v / u), v / u)
        return v / u

    ways = {f"r = {r}": r for r in (0.05, 0.2, 1.0, 1.9)}
    T = (1, 2, 5, 10, 20, 50)
    return sweep("T", "variance / exact", T, ways, squares, exact, logx=True, logy=True)


def matching():
    """The losses of c times the exact score s: denoising, (c - 1)^2 E |sigma s|^2 / 2d
    and a constant (Vincent 2011); sliced, 1/2 less: all are least at c = 1."""
    sigma = torch.tensor([0.5])
    at = plane(6, 200)
    p = MIX.log_density(at, 0.5).softmax(0)
    square = (p @ MIX.score(at, 0.5) ** 2).sum().item() / 16  # E |sigma s|^2 / 2d

    def losses(loss, c):
        def net(x, *_):  # c sigma s
            return c * (0.5 * MIX.score(x, 0.5))

        return [loss(net, MIX(2000), sigma).item() for _ in range(20)]

    def exact(loss, c):
        constant = 0.5 if loss is ncsn.loss else 0.0
        return ((c - 1) ** 2 - 1) * square + constant

    ways = {
        "denoising": ncsn.loss,
        "sliced": partial(ncsn.ssm_loss, reduced=False),
        "sliced, reduced": ncsn.ssm_loss,
    }
    return sweep("c", "loss", (0.2, 0.6, 1, 1.4, 1.8), ways, losses, exact)


def slices(H, way, M):
    """20,000 means of v^T H v over M random directions v with E v v^T = I."""
    v = torch.randn(M, 20_000, len(H))
    if way == "signs":
        v = v.sign()
    if way == "sphere":
        v = len(H) ** 0.5 * nn.functional.normalize(v, dim=2)
    return ((v @ H) * v).sum(2).mean(0)


def projections():
    """Sliced score matching: directions v with E v v^T = I are unbiased; signs and the
    sphere vary least."""
    m = torch.linspace(0.1, 0.6, 6)
    data = Mixture((0.3, 0.7), torch.stack([m, -m]), 0.5)
    x = torch.full((1, 6), 0.1)
    s = data.score(x)[0]
    J = torch.func.jacrev(data.score)(x).view(6, 6)
    H = J + s.outer(s) / 2  # v^T (grad s) v + (v^T s)^2 / 2 = v^T H v
    trace = H.trace()
    total = H.square().sum()
    variance = {  # of v^T H v
        "normal": 2 * total,
        "signs": 2 * total - 2 * H.diagonal().square().sum(),
        "sphere": 1.5 * total - trace**2 / 4,
    }

    def square(way, M):
        return (slices(H, way, M) - trace) ** 2

    ways = {k: k for k in variance}
    M = (1, 2, 4)
    left, rows = sweep("M", "mean", M, ways, partial(slices, H), trace)
    right, more = sweep("M", "variance", M, ways, square, lambda k, M: variance[k] / M)
    return left + right, rows + more


def likelihood():
    """A row: log p by the probability flow ODE, less the exact."""
    x = MIX(1000).double()
    edm = sde.EDM(0.01, 100.0)  # N(0, 100^2 I) is near enough to its p_T
    s = partial(s_sde, MIX.score, edm)
    log_p, _ = sde.log_likelihood(s, edm, x, probes=0)
    off = log_p.flatten() - MIX.log_density(x, 0.01)
    return row("log p by the ODE less the exact, nats", off, 0)


def ode():
    """The probability flow ODE, exact score: order of DDIM and of Heun, likelihood."""
    edm = sde.EDM(0.01, 5.0)
    x = 5 * torch.randn(500, 2).double()
    heun = partial(sde.heun, partial(s_sde, MIX.score, edm), edm, x)
    best = heun(2000)

    def ddim(n):  # Euler's method in sigma
        sigma = common.karras_sigmas(n, 0.01, 5.0).flip(0)
        abar = 1 / (1 + sigma**2)
        eps = partial(eps_theta, MIX.score, abar)
        return ddpm.ddim(eps, x / 26**0.5, abar, range(n, -1, -1))

    def error(f, n):
        return (f(n) - best).norm(dim=1)

    n = (16, 32, 64, 128, 256)
    ways = {"DDIM": ddim, "Heun": heun}
    panels, rows = sweep("steps", "error", n, ways, error, logx=True, logy=True)
    for order, (name, f) in enumerate(ways.items(), 1):
        ratio = error(f, 128).median() / error(f, 256).median()
        rows.append((f"order of {name}", ratio.log2(), math.nan, order))
    rows.append(likelihood())
    return panels, rows


def codes():
    """Two networks trained apart give a point the same code x(T): that of the data."""
    vp = sde.VP()
    x = MIX(1000)
    code = {}
    for name in ("exact", "network 1", "network 2"):
        s = MIX.score if name == "exact" else trained(MIX, 100.0, 0.005, 1000)
        flow = sde.flow(partial(s_sde, s, vp), vp)
        code[name] = sde.rk45(flow, x, vp.t_min, vp.T, 1e-4)[:, 0]
    panels, rows = [], []
    for a, b in itertools.combinations(code, 2):
        pair = torch.stack([code[a], code[b]])
        panel = frame("codes x_1(T)", 4, (a, b))
        panel.dots(pair.T.tolist(), radius=4)
        panels.append(panel)
        rho = torch.corrcoef(pair)[0, 1].item()
        error = (1 - rho**2) / len(x) ** 0.5
        rows.append((f"correlation of the codes, {a} and {b}", rho, error, math.nan))
    return panels, rows


SETS = ((heart, 1.5), (swiss_roll, 2.5), (checkerboard, 2))


def draws(s, n):
    """{name: 4,000 points} by seven samplers, n evaluations of s(x, sigma) each."""
    abar = ddpm.schedule("cosine", 200)
    eps = partial(eps_theta, s, abar)
    tau = ddpm.subsequence(200, n)
    vp = sde.VP(1e-3)
    f = partial(s_sde, s, vp)
    ts = sde.times(vp, n - 1, "edm")
    fewer = sde.times(vp, n // 2, "angle")
    ladder = geometric_sigmas(5, 0.01, n // 2)
    z = partial(torch.randn, 4000, 2)
    return {
        "NCSN": anneal(s, 5 * z(), ladder, 0.5, 2, denoise=True),
        "DDPM": ddpm.ancestral(eps, z(), abar, tau),
        "ODE": sde.heun(f, vp, z(), n // 2),
        "DDIM": ddpm.ddim(eps, z(), abar, tau),
        "Euler-Maruyama": sde.em(f, vp, z(), ts),
        "reverse diffusion": sde.reverse(f, vp, z(), ts),
        "predictor-corrector": sde.pc_vp(f, vp, z(), fewer),
    }


def samplers():
    """Every sampler draws three sets of data with one network a set, in 20 and in 200
    evaluations: the share of points where no data are. The picture: 200."""
    panels, rows = [], []
    for data, box in SETS:
        title = data.__name__.replace("_", " ")
        s = trained(data, 20, 0.005, 4000)
        drawn = {"data": data(4000)}
        real = data(4000)
        for n in (20, 200):
            drawn |= {f"{name}, {n}": x for name, x in draws(s, n).items()}
        for name, x in drawn.items():
            label = f"{title}, {name}: energy distance {energy(x, real):.4f}, "
            label += f"chi^2 {chi2(x, real, box):.2f}, outside"
            rows.append(row(label, outside(x, data)))
        for name in ("data", "NCSN, 200", "DDPM, 200", "ODE, 200"):
            panels.append(cloud(f"{title}, {name}", drawn[name], 1.1 * box))
    return panels, rows


def metropolis(data, x, a, T):
    """x after T steps y = x + a s + sqrt(2a) z, each taken with probability
    p(y) q(x | y) / (p(x) q(y | x)) (Roberts & Tweedie 1996)."""
    log_p = data.log_density

    def log_q(y, x):  # of the step to y from x
        return -(y - x - a * data.score(x)).square().sum(1) / (4 * a)

    for _ in range(T):
        y = x + a * data.score(x) + math.sqrt(2 * a) * torch.randn_like(x)
        ratio = log_p(y) + log_q(x, y) - log_p(x) - log_q(y, x)
        take = torch.rand(len(x)).log() < ratio
        x = torch.where(take[:, None], y, x)
    return x


def mala():
    """Metropolis' test takes away the error of the step."""

    def square(test, r):  # of the distance from the mode
        x = MIX(4000)
        if test:
            x = metropolis(MIX, x, 0.1 * r, 100)
        else:
            x = anneal(MIX.score, x, [1e-3], 1e5 * r, 100)  # a = 0.1 r, too
        return (x - MIX.m[side(x)]) ** 2

    def exact(test, r):
        return 0.1 if test else 0.1 / (1 - r / 2)

    r = (0.05, 0.1, 0.3, 0.6, 0.9, 1.2, 1.5)
    ways = {"Langevin": False, "MALA": True}
    return sweep("r", "variance in a mode", r, ways, square, exact)


def conditional():
    """x_2 given x_1 = 0.1: a noisy x_1 put into every step is far off; going back and
    forth in each (RePaint) is nearer."""
    op = inpaint.masked(torch.tensor([1.0, 0.0]))
    b = torch.tensor([0.1, 0.0])
    sigma = inpaint.levels("repaint", 0.02, 20.0, 100)

    def D(x, s):
        return x + s**2 * MIX.score(x, s)

    def upper(method, U):
        x = 20 * torch.randn(4000, 2)
        return method(D, b, op, x, sigma, U)[:, 1] > 0

    x_1 = Mixture(MIX.w, MIX.m[:, :1])
    parts, _ = x_1.parts(b[:1, None])  # of the modes, given x_1
    share = torch.special.ndtr(MIX.m[:, 1] / MIX.v**0.5)  # of x_2 > 0 in a mode
    exact = (parts.softmax(1) * share).sum()
    ways = {"RePaint": inpaint.repaint}
    return sweep("times", "P(x_2 > 0)", (1, 3, 10, 20), ways, upper, exact)


# -------------------------------------------------------------------------- the command

NAMES = (
    "tour langevin annealed levels too-many-steps mala "
    "matching projections ode codes samplers conditional"
)


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    p = common.Parser(description=__doc__, formatter_class=form)
    names = NAMES.split()
    p.add_argument("experiment", nargs="?", default="tour", choices=["all", *names])
    p.add_argument("--out", type=common.path, default="runs/toy", help="of pictures")
    p.add_argument("--seed", type=common.SEED, default=0, help="of all that is random")
    args = p.parse_args(argv)
    for name in names if args.experiment == "all" else [args.experiment]:
        common.seed_all(args.seed)
        experiment = globals()[name.replace("-", "_")]
        panels, rows = experiment()
        say(f"{name}: {' '.join(experiment.__doc__.split())}")
        for label, measured, error, exact in rows:
            line = f"    {label:80s} {measured:10.5g}"
            line += f"  +- {error:<8.4g}" if math.isfinite(error) else ""
            say(line + (f"  exact {exact:.4g}" if math.isfinite(exact) else ""))
        path = f"{args.out}/{name}.png"
        cols = 4 if panels[0].picture.width < 1100 else 2
        common.save_picture(common.sheet(panels, cols), path)
        say(f"saved  {path}\n")


if __name__ == "__main__":
    common.cli(main)
