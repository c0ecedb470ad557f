"""2D experiments: the papers' claims next to exact answers.

The density and the score of a Gaussian mixture are known exactly at every noise level.
An experiment saves a figure, OUT/EXPERIMENT.png (dots: measured, with two standard
errors; dark lines: exact), and prints a table: what was measured, its standard error,
the exact value where one is known, and the bias where the two differ.

    python toy.py                # the tour: exact and learned score, Langevin dynamics
    python toy.py EXPERIMENT     # one experiment
    python toy.py all            # every experiment: three minutes on one core
"""

import itertools
import math
import time
from functools import partial
from pathlib import Path

import common  # before torch: it sets how long idle threads spin

# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import ddpm
import inpaint
import ncsn
import sde
from common import geometric_sigmas

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


def cut(n):
    """A standard normal distribution cut in two, each half moved one unit outwards."""
    x = torch.randn(n, 2)
    return x + x.sign() * torch.tensor([1.0, 0.0])


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
    """True for points outside the data (swiss roll: over 4 deviations away)."""
    x, y = points.T
    if data is cut:
        return x.abs() < 1
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


def mlp(*sizes):
    """Linear layers from each size to the next, with SiLU between them."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in itertools.pairwise(sizes[1:]):
        layers += [nn.SiLU(), nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers)


def sines(log_sigma):
    angle = log_sigma[:, None] * 2.0 ** torch.arange(-2, 2)
    return torch.cat([angle.cos(), angle.sin()], 1)


class Net(nn.Module):
    """In the U-Net's place: net(x, log sigma) = sigma s(x, sigma), D = c_skip x + c_out
    F (EDM, Table 1). F sees told(log sigma), and sines of x, each damped as the noise
    damps it, by exp(-(w sigma)^2 / 2): edges stay sharp."""

    def __init__(self, waves=6, told=sines):
        super().__init__()
        self.w = 2.0 ** torch.arange(waves)
        self.told = told
        n_told = told(torch.zeros(1)).shape[1]
        self.F = mlp(2 + 4 * waves + n_told, 128, 128, 128, 2)

    def forward(self, x, log_sigma, label=None):
        sigma = log_sigma.exp().view(-1, 1)
        c_in = 1 / (sigma**2 + 0.5).sqrt()  # data of variance 0.5
        y = c_in * x
        angle = y[:, :, None] * self.w  # (n, 2, waves)
        blur = c_in * sigma * self.w  # deviation of the angle, (n, waves)
        height = (-(blur**2) / 2).exp()[:, None]
        waves = height * torch.cat([angle.cos(), angle.sin()], 1)
        out = self.F(torch.cat([y, waves.flatten(1), self.told(log_sigma)], 1))
        return c_in * (0.5**0.5 * out - sigma * c_in * x)  # (D - x) / sigma


def fit(net, loss, steps):
    """The network after so many steps of Adam on loss(), with a warm-up and a decay."""
    opt = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(steps):
        done = (step + 1) / steps
        cosine = 1 + math.cos(math.pi * done)
        opt.param_groups[0]["lr"] = 4e-3 * min(1, 20 * done) * cosine
        loss().backward()
        opt.step()
        opt.zero_grad()
    return net.requires_grad_(False)


def trained(data, sigma_max, sigma_min, steps=2000, loss=ncsn.loss, **options):
    """The s(x, sigma) of a Net(**options) that learns 1000 levels with an ncsn loss."""
    sigma = geometric_sigmas(sigma_max, sigma_min, 1000).float()
    net = Net(**options)
    fit(net, lambda: loss(net, data(512), sigma), steps)
    return partial(s_theta, net)


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


def noisy(x, sigma):
    return x + sigma * torch.randn_like(x)


def uniform(n):
    """Points of (-8, 8)^2."""
    return 16 * torch.rand(n, 2) - 8


def side(x):
    """0 in the upper right half of the plane, else 1: the number of a mode."""
    return (x.sum(1) <= 0).long()


# --------------------------------------------------------------- tables, and pictures

COLORS = ["#2563eb", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b5a2b"]
EXACT = "#374151"
LOG = {"logx": True, "logy": True}


def marks(low, high):
    """At least three multiples of 1, 2 or 5 times a power of ten, from low to high."""
    power = 10.0 ** math.floor(math.log10(high - low))
    steps = [k * power for k in (0.2, 0.5, 1, 2)]
    step = next(k for k in steps if high - low <= 7 * k)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Axis:
    """A range of numbers, on a log axis or not: at(v) goes from 0 to 1."""

    def __init__(self, values, log):
        self.scale = math.log10 if log else float
        known = [self.scale(v) for v in values if self.holds(v)] or [0.0, 1.0]
        room = 0.04 * (max(known) - min(known)) or 0.5 + abs(known[0]) / 2
        self.low = min(known) - room
        self.high = max(known) + room
        self.marks = self.powers() if log else marks(self.low, self.high)

    def powers(self):
        """Of a log axis: 1, 2 and 5 times powers of ten, or those alone if many."""
        low, high = self.low, self.high
        if high - low > 3:
            return [10.0 ** round(v) for v in marks(low, high) if v == round(v)]
        powers = range(math.floor(low), math.ceil(high))
        found = [k * 10.0**n for n in powers for k in (1, 2, 5)]
        found = [v for v in found if low <= math.log10(v) <= high]
        return found if len(found) > 2 else marks(10**low, 10**high)

    def holds(self, v):
        return abs(v) < 1e30 and (v > 0 or self.scale is float)

    def at(self, v):
        return (self.scale(v) - self.low) / (self.high - self.low)


class Panel:
    """Square axes that hold the values xs, ys, for line() and dots(), and a legend."""

    def __init__(self, xs, ys, xlabel="", ylabel="", title="", logx=False, logy=False):
        W, H = 900, 960  # twice the size of sheet(), whose lines are smooth
        self.x = Axis(xs, logx)
        self.y = Axis(ys, logy)
        self.box = left, top, right, bottom = 140, 70, W - 40, H - 170
        self.font = ImageFont.load_default(30)
        self.picture = Image.new("RGB", (W, H), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.palette = itertools.cycle(COLORS)
        self.colors = {}
        self.end = left, H - 62  # of the legend
        for v in self.x.marks:
            x = left + self.x.at(v) * (right - left)
            self.draw.line([x, top, x, bottom], "#e5e7eb", 2)
            self.text((x, bottom + 12), f"{v:.5g}", "mt")
        for v in self.y.marks:
            y = bottom - self.y.at(v) * (bottom - top)
            self.draw.line([left, y, right, y], "#e5e7eb", 2)
            self.text((left - 12, y), f"{v:.5g}", "rm")
        self.draw.rectangle(self.box, outline="#374151", width=2)
        self.text((10, 35), ylabel, "lm")
        self.text((right, 35), title, "rm")
        self.text(((left + right) / 2, bottom + 60), xlabel, "mm")

    def text(self, at, text, anchor):
        self.draw.text(at, text, "#111827", self.font, anchor)

    def pixels(self, points):
        """The pixels of points (x, y, ...); what an axis cannot hold is left out."""
        left, top, right, bottom = self.box
        for x, y, *_ in points:
            if self.x.holds(x) and self.y.holds(y):
                u = left + self.x.at(x) * (right - left)
                yield u, bottom - self.y.at(y) * (bottom - top)

    def color(self, label):
        """The colour of a label, which the legend names; one of its own for exact."""
        if label not in self.colors:
            color = EXACT if label == "exact" else next(self.palette)
            self.colors[label] = color
            x, y = self.end
            width = 50 + self.font.getlength(label or "")
            if x + width > self.picture.width:
                x, y = self.box[0], y + 40
            if label:
                self.draw.circle((x, y), 9, color)
                self.text((x + 20, y), label, "lm")
                self.end = x + width, y
        return self.colors[label]

    def line(self, points, label=None):
        """A line through the points (x, y)."""
        pixels = list(self.pixels(points)) or [(0, 0)]
        self.draw.line(pixels, self.color(label), 5, "curve")

    def dots(self, points, label=None, radius=7):
        """Dots at the points (x, y), or (x, y, error) with bars."""
        color = self.color(label)
        for at in self.pixels(points):
            self.draw.circle(at, radius, color)
        for x, y, *error in points:
            for e in error:
                bar = list(self.pixels([(x, y - e), (x, y), (x, y + e)]))
                self.draw.line(bar or [(0, 0)], color, 3)


def sheet(panels):
    """Panels in rows of two or three as one picture, at half their size: smooth."""
    W, H = panels[0].picture.size
    if not any(label for panel in panels for label in panel.colors):
        H -= 60  # there is no legend
    cols = min(len(panels), 2 if len(panels) % 3 else 3)
    rows = math.ceil(len(panels) / cols)
    picture = Image.new("RGB", (W * cols, H * rows), "white")
    for k, panel in enumerate(panels):
        y, x = divmod(k, cols)
        picture.paste(panel.picture, (x * W, y * H))
    return ImageOps.scale(picture, 0.5, Image.Resampling.LANCZOS)


def row(label, values, exact=math.nan):
    """(label, mean, its standard error, exact) of independent values."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    error = values.std().item() / len(values) ** 0.5
    return label, values.mean().item(), error, float(exact)


def off(data, s, sigma, x=None):
    """(n,): |s - score|, over the mean |score|, at points x (n, 2), or noisy data."""
    x = noisy(data(2000), sigma) if x is None else x
    exact = data.score(x, sigma)
    return (s(x, sigma) - exact).norm(dim=1) / exact.norm(dim=1).mean()


def sweep(x, y, xs, ways, f, exact=math.nan, **options):
    """[A panel] and rows of {label: way}: dots are means of f(way, x), two standard
    errors; a line is exact(way, x), or a number; where none is known it joins dots."""
    rows, ys = [], []
    for label, way in ways.items():
        for v in xs:
            known = exact(way, v) if callable(exact) else exact
            rows.append(row(f"{y}, {label}, {x} = {v:.3g}", f(way, v), known))
            _, mean, error, known = rows[-1]
            ys += [known, mean - 2 * error, mean + 2 * error]
    panel = Panel(xs, ys, x, y, **options)
    for k, label in enumerate(ways):
        part = rows[k * len(xs) : (k + 1) * len(xs)]
        dots = [(v, mean, 2 * error) for v, (_, mean, error, _) in zip(xs, part)]
        line = [(v, known) for v, (*_, known) in zip(xs, part) if not math.isnan(known)]
        panel.line(line or dots, "exact" if line else label)
        panel.dots(dots, label)
    return [panel], rows


def both(*parts):
    """The panels, and the rows, of several sweeps."""
    panels, rows = zip(*parts)
    return list(itertools.chain(*panels)), list(itertools.chain(*rows))


def frame(title, box, names=("x_1", "x_2")):
    """An empty panel of (-box, box)^2."""
    return Panel([-box, box], [-box, box], *names, title)


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
    tips = x + 2 * box / 15 * v / v.norm(dim=1).max()
    for start, end in zip(panel.pixels(x.tolist()), panel.pixels(tips.tolist())):
        along = np.subtract(end, start)
        across = 0.2 * along[::-1] * [1, -1]
        neck = start + 0.65 * along
        panel.draw.line([*start, *neck], COLORS[1], 4)
        panel.draw.polygon([*end, *(neck + across), *(neck - across)], COLORS[1])
    return panel


def clouds(samples):
    """Panels of the points {name: x}, and rows of their share in the mode (5, 5)."""
    panels = [cloud(name, x, 10) for name, x in samples.items()]
    rows = [row(f"share at (5, 5), {k}", side(x) == 0, 0.8) for k, x in samples.items()]
    return panels, rows


# ------------------------------- experiments: panels of a figure, rows of a table


def tour():
    """Exact and learned score, and samples of Langevin dynamics with the learned one.
    Its relative error is largest at the last sigma, whose target is mostly noise."""
    s = trained(MODES, 10.0, 0.1, waves=0)
    samples = {
        "data": MODES(2000),
        "Langevin, sigma = 1": anneal(s, uniform(2000), [1.0], 0.1, 1000),
        "annealed Langevin": anneal(s, uniform(2000), LADDER, 0.2, 100),
    }
    exact = field("exact score, sigma = 1", MODES, MODES.score, 8)
    learned = field("learned score, sigma = 1", MODES, s, 8)
    ways = {"learned score": s}
    names = "sigma", "relative error"
    errors = sweep(*names, LADDER.tolist(), ways, partial(off, MODES), **LOG)
    return both(([exact, learned], []), errors, clouds(samples))


def settled(T, r, v=1.0):
    """The variance v of points after T steps x + a s + sqrt(2a) z, r = a, on N(0, 1):
    each makes it (1 - r)^2 v + 2 r, and it settles at 1 / (1 - r/2)."""
    end = 1 / (1 - r / 2)
    return end + (1 - r) ** (2 * T) * (v - end)


def langevin():
    """Langevin dynamics samples the density; steps of size r make its variance
    1 / (1 - r/2) times too large, and above r = 2 it diverges."""
    marginal = Mixture(m=((1.0,), (-1.0,)))
    normal = Mixture([1.0], [[2.0]], 0.99)  # of variance 1 at sigma = 0.1

    def near(x, v):  # 1 / width in a bin of width 0.2 around v, else 0
        return 5.0 * ((x - v).abs() < 0.1)

    def exact(_, v):
        return marginal.log_density(torch.tensor([[v]]), 0.6).exp()

    def squares(T, r):
        start = 2 + torch.randn(10_000, 1)
        return (anneal(normal.score, start, [0.1], 100 * r, T) - 2) ** 2

    x = anneal(MIX.score, torch.randn(10_000, 2), [0.6], 0.06, 1000)[:, 0]
    at = torch.linspace(-3, 2.5, 23).tolist()
    r = (0.1, 0.5, 0.9, 1.2, 1.5, 1.7, 1.9, 2.05, 2.1)
    ways = {"after 40 steps": 40}
    return both(
        sweep("x_1", "density", at, {"samples": x}, near, exact),
        sweep("r", "variance", r, ways, squares, settled, logy=True),
    )


def annealed():
    """Langevin dynamics gets the weights of far modes wrong. Annealed, it gets them
    right in as many steps; so it does with labels, as a label's data have one mode."""
    label = MODES.w.multinomial(4000, replacement=True)

    def labelled(x, sigma):
        return (MODES.m[label] - x) / (MODES.v + sigma**2)

    start = uniform(4000)
    samples = {
        "Langevin": anneal(MODES.score, start, [0.1], 10, 1000),
        "annealed Langevin": anneal(MODES.score, start, LADDER, 0.2, 100),
        "Langevin with labels": anneal(labelled, start, [0.1], 10, 1000),
    }
    return clouds(samples)


def paths():
    """The path of a point grows calmer as the noise falls: in a mode, the mean length
    of a step is sqrt(pi a / (1 - r/2)), a = 0.2 sigma^2, r = a / (1 + sigma^2)."""
    seen = []

    def watched(x, sigma):
        seen.append(x)
        return MODES.score(x, sigma)

    anneal(watched, uniform(500), LADDER, 0.2, 100)
    x = torch.stack(seen)  # (1000, 500, 2)
    length = (x[1:] - x[:-1]).norm(dim=2)

    def late(_, i):  # a mean over the second half of level i
        return length[100 * i + 50 : 100 * i + 99].mean(0)

    def exact(_, i):
        v = LADDER[i].item() ** 2
        return (math.pi * 0.2 * v / (1 - 0.1 * v / (1 + v))) ** 0.5

    panel = frame("one path", 40)
    for i in range(0, 10, 3):
        panel.line(x[100 * i : 100 * i + 300, 0].tolist(), f"from level {i}")
    ways = {"Langevin": 0}
    names = "level", "length of a step"
    panels, rows = sweep(*names, range(10), ways, late, exact, logy=True)
    return [panel, *panels], rows


def levels():
    """Share of samples in a mode after 1,000 steps with the exact score, by the first
    of L levels, L, the step r sigma^2, steps like sigma^q, and T falling by slope."""

    def share(name, v):
        how = {"sigma_1": 10, "L": 10, "r": 0.1, "q": 2, "slope": 0} | {name: v}
        ladder = geometric_sigmas(how["sigma_1"], 0.1, how["L"])
        tilt = torch.linspace(1 + how["slope"], 1 - how["slope"], how["L"])
        T = (1000 / how["L"] * tilt).round().int()
        x = uniform(2000)
        for sigma, T_i in zip(ladder.tolist(), T.tolist()):
            r = how["r"] * (sigma / 0.1) ** (how["q"] - 2)  # that of the last level
            x = anneal(MODES.score, x, [sigma], r, T_i)
        return side(x) == 0

    values = {
        "sigma_1": (1, 2, 5, 10, 20, 50),
        "L": (2, 3, 5, 10, 20, 50),
        "r": (0.003, 0.01, 0.03, 0.1, 0.3, 1),
        "q": (0, 0.5, 1, 1.5, 2),
        "slope": (-0.9, -0.5, 0, 0.5, 0.9),
    }
    parts = []
    for name, v in values.items():
        log = name in ("sigma_1", "L", "r")
        ways = {"1,000 steps": name}
        parts.append(sweep(name, "share", v, ways, share, 0.8, logx=log))
    return both(*parts)


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
    return sweep("T", "variance / true one", T, ways, squares, exact, **LOG)


def explicit(half, net, x, sigma):
    """Hyvarinen's loss, sigma^2 E[div s + half |s|^2] / d, half = 1/2; net: sigma s."""
    x = noisy(x, sigma)
    J = torch.func.jacrev(lambda x: net(x).sum(0))(x)  # (2, n, 2)
    trace = J.diagonal(dim1=0, dim2=2).sum(1)
    return (sigma * trace + half * net(x).square().sum(1)).mean() / 2


def matching():
    """Denoising (dsm), sliced (ssm) and explicit score matching, of c times the exact
    score: minimised at c = 1, but at c = 1/2 if the factor 1/2 is forgotten."""
    sigma = torch.tensor([0.5])
    at = plane(6, 200)
    p = MIX.log_density(at, 0.5).softmax(0)
    square = (p @ MIX.score(at, 0.5) ** 2).sum().item() / 16  # E |sigma s|^2 / 2d

    def losses(loss, c):
        def net(x, *_):  # c sigma s
            return c * (0.5 * MIX.score(x, 0.5))

        return [loss(net, MIX(2000), sigma).item() for _ in range(20)]

    def exact(loss, c):
        constant = 0.5 if loss is ncsn.loss else 0.0  # Vincent 2011
        norm = 2 if loss is forgotten else 1
        return (norm * c**2 - 2 * c) * square + constant

    forgotten = partial(explicit, 1.0)
    more = {"explicit": partial(explicit, 0.5), "1/2 forgotten": forgotten}
    ways = ncsn.OBJECTIVES | more
    return sweep("c", "loss", (0.2, 0.5, 1, 1.4, 1.8), ways, losses, exact)


def objective():
    """The loss with lambda = sigma^p of half the exact score: one random level for each
    point is unbiased; as many points on every level have less variance."""
    sigma = geometric_sigmas(5, 0.1, 10).float()
    normal = Mixture([1.0], [[1.0, 1.0]], 0.5)

    def level(p):  # the loss of each level; that of one point is exponential
        return sigma**p * (1 / sigma**2 - 0.75 / (0.5 + sigma**2)) / 2

    def losses(way, p):  # of 4,000 batches of 100, over the exact loss
        i = torch.arange(400_000) % 10
        if way == "random":
            i = torch.randint(10, (400_000,))
        s = sigma[i, None]
        z = torch.randn(400_000, 2)
        score = normal.score(normal(400_000) + s * z, sigma[i]) / 2
        l = (s**p / 2 * (score + z / s) ** 2).mean(1)
        return l.view(-1, 100).mean(1) / level(p).mean()

    def variance(way, p):
        ratio = level(p).square().mean() / level(p).mean() ** 2
        return (2 * ratio - 1 if way == "random" else ratio) / 100

    ways = {"random": "random", "equal numbers": "equal"}
    p = (0, 1, 2, 3)
    return both(
        sweep("p", "loss / exact", p, ways, losses, 1.0),
        sweep("p", "variance", p, ways, lambda *at: (losses(*at) - 1) ** 2, variance),
    )


def sliced():
    """Denoising (dsm) against sliced score matching (ssm): variance of the gradient by
    c of the loss of c s, s exact, at c = 1; error and time of equal training steps."""
    normal = Mixture([1.0], [[0.0, 0.0]], 0.5)

    def squares(name, sigma):  # of each point's gradient
        c = torch.ones(20_000, 1, requires_grad=True)

        def net(x, *_):
            return c * (sigma * normal.score(x, sigma))

        l = ncsn.OBJECTIVES[name](net, normal(20_000), torch.tensor([sigma]))
        (grad,) = torch.autograd.grad(20_000 * l, c)
        return grad**2

    def exact(name, sigma):
        square = {"dsm": 0.25 * sigma**2, "ssm": 2 * sigma**4, "ssm-vr": sigma**4}
        return square[name] / (0.5 + sigma**2) ** 2

    scores, rows = {}, []
    for name, loss in ncsn.OBJECTIVES.items():
        begin = time.process_time()
        scores[name] = trained(MIX, 3.0, 0.1, 1000, loss, waves=0)
        seconds = time.process_time() - begin
        rows.append((f"seconds of CPU time, {name}", seconds, math.nan, math.nan))
    ways = {k: k for k in scores}
    sigma = (0.1, 0.2, 0.5, 1.0, 2.0)
    return both(
        sweep("sigma", "variance of the gradient", sigma, ways, squares, exact, **LOG),
        sweep("sigma", "relative error", sigma, scores, partial(off, MIX), **LOG),
        ([], rows),
    )


def scores():
    """Where data are scarce, a score of one noise level has nothing to learn from; at a
    large sigma data are everywhere. Four quarters of the plane, by density at sigma."""
    at = plane(8, 60)
    one = trained(MODES, 0.1, 0.1, waves=0)
    many = trained(MODES, 10, 0.1, waves=0)

    def error(way, k):
        s, sigma = way
        order = MODES.log_density(at, sigma).argsort(descending=True)
        return off(MODES, s, sigma, at[order.chunk(4)[k - 1]])

    ways = {"one level, sigma = 0.1": (one, 0.1), "many, sigma = 5": (many, 5.0)}
    quarters = "quarter, from dense to thin", "relative error", (1, 2, 3, 4)
    return sweep(*quarters, ways, error, logy=True)


def told():
    """Ways to tell the network the noise level: an index is usually the worst."""
    ways = {
        "sigma": lambda log_sigma: log_sigma.exp()[:, None],
        "log sigma": lambda log_sigma: log_sigma[:, None],
        "index": lambda log_sigma: 217 * (log_sigma[:, None] + 2.3),  # 0 to 1000
        "sines": sines,
    }
    for name, f in ways.items():
        ways[name] = trained(MODES, 10, 0.1, waves=0, told=f)
    sigma = (0.1, 0.3, 1.0, 3.0, 10.0)
    return sweep("sigma", "relative error", sigma, ways, partial(off, MODES), **LOG)


def noise():
    """Noise that is not normal: denoising Laplace or Student noise of scale b learns
    the score of the noisy density; uniform noise has no score to learn."""
    data = Mixture((0.3, 0.7), ((1.0,), (-1.0,)))
    x = torch.linspace(-2, 2, 81)[:, None]
    at = torch.linspace(-6, 6, 3001)[:, None]

    def error(kind, b):
        def loss():
            u = kind.sample((512, 1)).requires_grad_()
            log_k = kind.log_prob(u) + 0 * u
            (target,) = torch.autograd.grad(log_k.sum() / b, u)  # the noise's score
            return (net(data(512) + b * u.detach()) - target).square().mean()

        net = mlp(1, 128, 128, 1)
        fit(net, loss, 1000)
        weights = kind.log_prob((x - at.T) / b).exp() * data.log_density(at).exp()
        exact = weights @ data.score(at) / weights.sum(1, keepdim=True)  # q' / q
        return (net(x) - exact).abs() / exact.abs().mean()

    kinds = {
        "Laplace": torch.distributions.Laplace(0.0, 1.0),
        "Student": torch.distributions.StudentT(3.0),
        "uniform": torch.distributions.Uniform(-1.0, 1.0, validate_args=False),
    }
    return sweep("b", "relative error", (0.5, 1, 2), kinds, error, **LOG)


def slices(H, way, M):
    """20,000 means of v^T H v over M random directions v with E v v^T = I; but "fixed
    axis" is always the same."""
    d = len(H)
    v = torch.randn(M, 20_000, d)
    axes = d**0.5 * torch.eye(d)
    v = {
        "normal": v,
        "signs": v.sign(),
        "uniform": 12**0.5 * (torch.rand_like(v) - 0.5),
        "sphere": d**0.5 * nn.functional.normalize(v, dim=2),
        "random axis": axes[torch.randint(d, v.shape[:2])],
        "fixed axis": axes[0].expand_as(v),
    }[way]
    return ((v @ H) * v).sum(2).mean(0)


def projections():
    """Sliced score matching: random directions v with E v v^T = I are unbiased, though
    their variances differ; one fixed axis is biased."""
    m = torch.linspace(0.1, 0.6, 6)
    data = Mixture((0.3, 0.7), torch.stack([m, -m]), 0.5)
    x = torch.full((1, 6), 0.1)
    s = data.score(x)[0]
    J = torch.func.jacrev(data.score)(x).view(6, 6)
    H = J + s.outer(s) / 2  # v^T (grad s) v + (v^T s)^2 / 2 = v^T H v
    trace = H.trace()
    total = H.square().sum()
    diagonal = H.diagonal().square().sum()
    variance = {  # of v^T H v
        "normal": 2 * total,
        "signs": 2 * total - 2 * diagonal,
        "uniform": 2 * total - 1.2 * diagonal,  # E v_i^4 = 9/5
        "sphere": 1.5 * total - trace**2 / 4,
        "random axis": 6 * diagonal - trace**2,
    }

    def squares(way, M):
        return (slices(H, way, M) - trace) ** 2

    def exact(way, M):
        return variance[way] / M

    unbiased = {k: k for k in variance}
    ways = unbiased | {"fixed axis": "fixed axis"}
    M = (1, 2, 4)
    means = sweep("M", "mean", M, ways, partial(slices, H), trace)
    return both(means, sweep("M", "variance", M, unbiased, squares, exact))


def ode():
    """The probability flow ODE with the exact score: the orders of DDIM, Heun's method
    and DPM-Solver++, and the likelihood."""
    edm = sde.EDM(0.01, 5.0)
    s = partial(s_sde, MIX.score, edm)
    x = 5 * torch.randn(500, 2).double()
    heun = partial(sde.heun, s, edm, x)
    best = heun(2000)

    def ddim(n):  # Euler's method in sigma
        sigma = common.karras_sigmas(n, 0.01, 5.0).flip(0)
        abar = 1 / (1 + sigma**2)
        eps = partial(eps_theta, MIX.score, abar)
        return ddpm.ddim(eps, x / 26**0.5, abar, range(n, -1, -1))

    def error(f, n):
        return (f(n) - best).norm(dim=1)

    def dpm(n):
        return sde.dpm(s, edm, x, sde.times(edm, n - 1, "edm"))

    ways = {"DDIM": ddim, "Heun": heun, "DPM-Solver++": dpm}
    n = (16, 32, 64, 128, 256)
    panels, rows = sweep("steps", "error", n, ways, error, **LOG)
    for order, (name, f) in zip((1, 2, 2), ways.items()):
        ratio = error(f, 128).median() / error(f, 256).median()
        rows.append((f"order of {name}", ratio.log2(), math.nan, order))
    x = MIX(1000).double()
    edm = sde.EDM(0.01, 100.0)  # N(0, 100^2 I) is near enough to its p_T
    log_p, _ = sde.log_likelihood(partial(s_sde, MIX.score, edm), edm, x, probes=0)
    gap = log_p.flatten() - MIX.log_density(x, 0.01)
    return panels, [*rows, row("log p by the ODE less the exact, nats", gap, 0)]


def codes():
    """Two networks trained independently map a point to the same latent code x(T),
    which depends on the data distribution alone."""
    vp = sde.VP()
    x = MIX(1000)
    code = {}
    for name in ("exact", "network 1", "network 2"):
        s = MIX.score if name == "exact" else trained(MIX, 100.0, 0.005, 1000)
        flow = sde.velocity(partial(s_sde, s, vp), vp)
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


SETS = ((cut, 4), (heart, 1.5), (swiss_roll, 2.5), (checkerboard, 2))


def generate(s, n):
    """{name: 4,000 points} by eight samplers, n evaluations of s(x, sigma) each."""
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
        "DPM-Solver++": sde.dpm(f, vp, z(), ts),
    }


def samplers():
    """Every sampler on four data sets, with one network for each, at 20 and at 200
    evaluations: the share of points where no data are. The figure: at 200."""
    panels, rows = [], []
    for data, box in SETS:
        title = data.__name__.replace("_", " ")
        s = trained(data, 20, 0.005, 4000)
        samples = {"data": data(4000)}
        real = data(4000)
        for n in (20, 200):
            samples |= {f"{name}, {n}": x for name, x in generate(s, n).items()}
        for name, x in samples.items():
            label = f"{title}, {name}: energy distance {energy(x, real):.4f}, "
            label += f"chi^2 {chi2(x, real, box):.2f}, outside"
            rows.append(row(label, outside(x, data)))
        for name in ("data", "NCSN, 200", "DDPM, 200"):
            panels.append(cloud(f"{title}, {name}", samples[name], 1.1 * box))
    return panels, rows


def mala():
    """The Metropolis test (Roberts & Tweedie 1996) removes the discretisation error of
    Langevin dynamics."""
    log_p = MODES.log_density

    def square(way, r):  # of the distance from the mode
        x = MODES(4000)

        def log_q(y, x):  # of the step to y from x
            return -(y - x - r * MODES.score(x)).square().sum(1) / (4 * r)

        for _ in range(50):
            y = x + r * MODES.score(x) + math.sqrt(2 * r) * torch.randn_like(x)
            if way == 0:  # y is taken with probability p(y) q(x | y) / (p(x) q(y | x))
                ratio = log_p(y) + log_q(x, y) - log_p(x) - log_q(y, x)
                take = torch.rand(len(x)).log() < ratio
                y = torch.where(take[:, None], y, x)
            x = y
        return (x - MODES.m[side(x)]) ** 2

    def exact(way, r):
        return 1 / (1 - way * r / 2)

    r = (0.05, 0.1, 0.3, 0.6, 0.9, 1.2, 1.5)
    ways = {"Langevin": 1, "MALA": 0}
    return sweep("r", "variance in a mode", r, ways, square, exact)


def conditional():
    """x_2 given x_1 = 0.1. Resampling each step (RePaint) or more steps of annealed
    Langevin dynamics come nearer, DPS (with zeta = 1) nearest: all are biased."""
    op = inpaint.masked(torch.tensor([1.0, 0.0]))
    b = torch.tensor([0.1, 0.0])

    def D(x, s):
        return x + s**2 * MIX.score(x, s)

    def upper(method, n):
        sigma = inpaint.levels(method.__name__, 0.02, 20.0, 100)
        x = sigma[0] * torch.randn(4000, 2)
        return method(D, b, op, x, sigma, n)[:, 1] > 0

    x_1 = Mixture(MIX.w, MIX.m[:, :1])
    parts, _ = x_1.parts(b[:1, None])  # of the modes, given x_1
    share = torch.special.ndtr(MIX.m[:, 1] / MIX.v**0.5)  # of x_2 > 0 in a mode
    exact = (parts.softmax(1) * share).sum()
    ways = {"RePaint": inpaint.repaint, "Langevin": inpaint.ald}
    n = (1, 3, 10, 20)
    panels, rows = sweep("times per level", "P(x_2 > 0)", n, ways, upper, exact)
    return panels, [*rows, row("P(x_2 > 0), DPS", upper(inpaint.dps, 1.0), exact)]


# -------------------------------------------------------------------------- the command

NAMES = (
    "tour langevin annealed paths levels too-many-steps mala objective matching "
    "sliced scores told noise projections ode codes samplers conditional"
)


def main(argv=()):
    p = common.Parser(__doc__)
    names = NAMES.split()
    p.add_argument("experiment", nargs="?", default="tour", choices=["all", *names])
    p.add_argument("--out", default="runs/toy", help="output folder (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    args = p.read(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in names if args.experiment == "all" else [args.experiment]:
        common.seed_all(args.seed)
        experiment = globals()[name.replace("-", "_")]
        panels, rows = experiment()
        print(f"{name}: {' '.join(experiment.__doc__.split())}")
        for label, measured, error, exact in rows:
            line = f"    {label:76s} {measured:10.5g}"
            if math.isfinite(error):
                line += f"  +- {error:<8.4g}"
            if math.isfinite(exact):
                line += f"  exact {exact:.4g}"
            if abs(measured - exact) > 4.5 * error:
                line += f", biased by {measured - exact:+.2g}"
            print(line)
        path = f"{args.out}/{name}.png"
        sheet(panels).save(path)
        print(f"saved  {path}\n", flush=True)


if __name__ == "__main__":
    common.cli(main)
