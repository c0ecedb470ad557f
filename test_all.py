"""Every claim of this project, checked against a closed form or on files made here. `python test_all.py` or `pytest`.

Where a network belongs stands the exact answer: for data N(M, S^2) the score of q_sigma is -(x - M) / (S^2 + sigma^2).
M and S are never 0 and 1 (plain noise would pass), and S = 0, a point mass, shows what mean and variance hide.
"""
import argparse, ast, contextlib, csv, gzip, hashlib, http.server, io, itertools, math, os, re, shutil, signal, struct
import subprocess, sys, tarfile, tempfile, threading, time, unittest
from pathlib import Path
from unittest import mock
import numpy as np
import PIL
import torch
import torch.nn as nn
from PIL import Image
import common
import toy
import ncsn
import ddpm
import inpaint
import sde

HERE = Path(__file__).resolve().parent
M, S = 2.0, 0.5

class Case(unittest.TestCase):
    """A test with a temporary folder, a fixed seed, and assertions on tensors and on the command line."""

    def setUp(self):
        torch.manual_seed(0)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir = Path(folder.name)

    def near(self, a, b, tolerance):
        """Assert that |a - b| <= tolerance everywhere."""
        distance = (torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)).abs().max().item()
        self.assertLessEqual(distance, tolerance, f"{a} is not within {tolerance} of {b}")

    def refuses(self, sentence, call, *args, **kwargs):
        """Assert that the call raises one UserError with these words in it."""
        with self.assertRaises(common.UserError) as caught, contextlib.redirect_stdout(io.StringIO()):
            call(*args, **kwargs)
        self.assertIn(sentence, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def same(self, a, b):
        """Assert that two checkpoints are equal to the last bit."""
        (a, step_a), (b, step_b) = state(a / "ckpt.pt"), state(b / "ckpt.pt")
        self.assertEqual((step_a, a.keys()), (step_b, b.keys()))
        for k in a:
            self.assertTrue(torch.equal(a[k], b[k]), k)

    def command(self, module, *argv):
        """(exit status, stdout, stderr) of `python MODULE.py ARGV`, run inside this process."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, argv)]), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                common.cli(module.main)
            except SystemExit as e:
                code = e.code
        return code, out.getvalue(), err.getvalue()

    def tiny(self, n=64, size=8):
        """A data folder with a digits set of n random 8 x 8 images and labels, and the flags for a few steps on it."""
        folder = self.dir / "data" / "digits"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for k, stem in enumerate(toy.FILES):
            shape = (n,) if k % 2 else (n, size, size)
            data = np.arange(n) % 10 if k % 2 else rng.integers(0, 256, shape)
            write_idx(folder / stem, data.astype(np.uint8))
        return ["--data-dir", self.dir / "data", "--width", 8, "--batch-size", 8, "--samples", 9, "--steps", 6,
                "--sigma-max", 1, "--sigma-min", 0.01, "--levels", 10, "--eps", 2e-5, "--T", 2]

def write_idx(path, data, compress=False):
    """An IDX file of a uint8 array."""
    raw = struct.pack(f">BBBB{data.ndim}I", 0, 0, 8, data.ndim, *data.shape) + data.tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)

def gaussian(M=M, S=S):
    """The net whose score is exact on N(M, S^2): net(x, log sigma) = -sigma (x - M) / (S^2 + sigma^2)."""
    def net(x, noise, label=None):
        sigma = noise.exp().view(-1, 1, 1, 1)
        return -sigma * (x - M) / (S ** 2 + sigma ** 2)
    return net

def data(n, *shape):
    """n images of independent N(M, S^2) pixels."""
    return M + S * torch.randn(n, *(shape or (1, 1, 1)))

class Schedules(Case):
    def test_geometric_ladder(self):
        sigma = common.geometric_sigmas(1.0, 0.01, 10)
        self.near(sigma[0], 1, 1e-12)
        self.near(sigma[-1], 0.01, 1e-12)
        self.near(sigma[1:] / sigma[:-1], 0.01 ** (1 / 9), 1e-12)           # one ratio, falling
        self.near(common.geometric_sigmas(50, 0.01, 232)[1] * 5000 ** (1 / 231), 50, 1e-9)

    def test_betas(self):
        beta = common.linear_betas(1000)
        self.near(beta[[0, 499, 999]], [1e-4, 1e-4 + 499 / 999 * 0.0199, 0.02], 1e-12)
        self.near((1 - beta).log().sum().exp(), 4.0358e-5, 1e-8)              # abar_T of Ho et al.
        beta = common.cosine_betas(1000)
        abar = (1 - beta).cumprod(0)
        t = torch.tensor([1, 250, 500, 750], dtype=torch.float64)
        f = lambda t: torch.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        self.near(abar[[0, 249, 499, 749]], f(t) / f(t[0] * 0), 1e-10)
        self.assertEqual(beta.max(), 0.999)

    def test_karras(self):
        sigma = common.karras_sigmas(18)
        i = torch.arange(18, dtype=torch.float64)
        exact = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        self.near(sigma[:-1], exact, 1e-10)
        self.assertEqual((len(sigma), sigma[-1]), (19, 0))

class ScoreMatching(Case):
    def test_loss_at_the_exact_score_is_its_closed_form_at_every_level(self):
        for sigma, power in itertools.product((2.0, 0.5, 0.1), (2.0, 1.0)):
            loss = ncsn.loss(gaussian(), data(50_000, 1, 2, 2), torch.tensor([sigma]), power=power)
            exact = S ** 2 / (2 * (S ** 2 + sigma ** 2)) * sigma ** (power - 2)
            self.near(loss / exact, 1, 0.02)

    def test_loss_is_the_mean_over_all_levels(self):
        sigma, seen = torch.tensor([2.0, 0.5, 0.1]), []
        def net(x, noise, label=None):
            seen.append(noise)
            return gaussian()(x, noise)
        loss = ncsn.loss(net, data(60_000), sigma)
        self.near(loss, (S ** 2 / (2 * (S ** 2 + sigma ** 2))).mean(), 0.005)
        levels, counts = seen[0].unique(return_counts=True)
        self.near(levels, sigma.log().flip(0), 1e-6)                       # the first and the last level, and log sigma
        self.near(counts / 60_000, 1 / 3, 0.01)

    def test_loss_of_a_silent_network_is_one_half(self):
        loss = ncsn.loss(lambda x, noise, label: torch.zeros_like(x), data(20_000, 3, 2, 2), torch.tensor([3.0, 0.3]))
        self.near(loss, 0.5, 0.005)                                        # 1/2 E|z|^2, a mean over pixels

    def test_loss_is_zero_where_the_noise_can_be_read_off(self):
        loss = ncsn.loss(gaussian(S=0.0), torch.full((1000, 1, 1, 1), M), torch.tensor([1.0, 0.1]))
        self.assertLess(loss, 1e-8)

    def test_gradient_vanishes_at_the_exact_score_and_points_back_to_it(self):
        x, sigma = data(200_000), torch.tensor([1.0, 0.3])
        def gradient(scale, shift):
            torch.manual_seed(0)
            a, b = torch.tensor(scale, requires_grad=True), torch.tensor(shift, requires_grad=True)
            ncsn.loss(lambda x, noise, label: a * gaussian()(x, noise) + b, x, sigma).backward()
            return a.grad.item(), b.grad.item()
        self.near(gradient(1.0, 0.0), 0, 0.004)
        self.assertGreater(gradient(1.1, 0.0)[0], 0.03)
        self.assertLess(gradient(0.9, 0.0)[0], -0.03)
        self.near(gradient(1.0, 0.1)[1], 0.1, 0.004)

    def test_labels_are_passed_on_and_one_in_ten_hidden(self):
        seen, label = [], torch.arange(20_000) % 10
        net = lambda x, noise, label: seen.append(label) or x
        ncsn.loss(net, data(20_000), torch.tensor([1.0]), label)
        self.near((seen[0] == -1).float().mean(), 0.1, 0.01)
        self.assertTrue(((seen[0] == label) | (seen[0] == -1)).all())

class Langevin(Case):
    sigma = common.geometric_sigmas(4.0, 0.1, 10)

    def run_sampler(self, net, n=20_000, eps=0.004, T=100, sigma=None, **options):
        sigma = self.sigma if sigma is None else sigma
        return ncsn.sample(net, torch.rand(n, 1, 1, 1), sigma, eps, [T] * len(sigma), **options)

    def test_annealed_langevin_finds_mean_and_variance(self):
        x = self.run_sampler(gaussian(), denoise=False)
        v, a = S ** 2 + 0.01, 0.004 / 2
        self.near(x.mean(), M, 0.015)
        self.near(x.var() / (v / (1 - a / (2 * v))), 1, 0.03)
        x = self.run_sampler(gaussian())                                   # Tweedie shrinks it by S^2 / (S^2 + sigma^2)
        self.near(x.mean(), M, 0.015)
        self.near(x.var() / (S ** 4 / v / (1 - a / (2 * v))), 1, 0.03)

    def test_point_mass(self):
        x = self.run_sampler(gaussian(S=0.0), n=2000)
        self.near(x, M, 1e-4)                                              # the denoising step lands on it
        x = self.run_sampler(gaussian(S=0.0), denoise=False)
        self.near(x.mean(), M, 0.005)
        self.near(x.var() / (0.01 / (1 - 0.2 / 2)), 1, 0.03)               # r = eps / (2 sigma_L^2) = 0.2

    def test_step_size_follows_sigma_from_the_largest_to_the_smallest(self):
        steps, levels = [], []
        def net(x, noise, label=None):                                     # a score of 1: x moves by alpha_i / 2
            levels.append(noise[0].exp().item())
            return noise.exp().view(-1, 1, 1, 1).expand_as(x)
        with mock.patch.object(torch, "randn_like", torch.zeros_like):
            frames = [torch.zeros(1, 1, 1, 1)]
            ncsn.sample(net, frames[0], torch.tensor([3.0, 1.0, 0.5]).double(), 0.1, [1, 2, 1], frames=frames, every=1)
        steps = (torch.cat(frames[1:]) - torch.cat(frames[:-1])).flatten()
        self.near(levels, [3, 1, 1, 0.5, 0.5], 1e-6)                       # T steps a level, then the denoising step
        self.near(steps, [0.05 * 36, 0.05 * 4, 0.05 * 4, 0.05, 0.25], 1e-6)

    def test_noise_is_the_square_root_of_alpha(self):
        for n, eps in ((1, 0.09), (2, 0.01)):                              # no score: variance n alpha
            silent, x = lambda x, noise, label: 0 * x, torch.zeros(50_000, 1, 1, 1)
            x = ncsn.sample(silent, x, torch.tensor([0.7]), eps, [n], denoise=False)
            self.near(x.var() / (n * eps), 1, 0.03)

    def test_two_modes_get_their_weights(self):
        means, weights = torch.tensor([-2.0, 2.0]), torch.tensor([0.25, 0.75])
        def mixture(x, noise, label=None):                                 # sigma * score of sum_k w_k N(m_k, 0.1^2 + sigma^2)
            sigma = noise.exp().view(-1, 1, 1, 1)
            v = 0.1 ** 2 + sigma ** 2                                      # (B, 1, 1, 1)
            p = (weights.log() - (x - means) ** 2 / (2 * v)).softmax(-1)   # (B, 1, 1, 2)
            return sigma * (p * (means - x) / v).sum(-1, keepdim=True)
        x = self.run_sampler(mixture)
        self.near((x > 0).float().mean(), 0.75, 0.02)
        self.near(x[x > 0].mean(), 2, 0.01)
        self.near(x[x < 0].mean(), -2, 0.01)
        x = ncsn.sample(mixture, torch.rand(5000, 1, 1, 1) * 8 - 4, torch.tensor([0.1]), 0.004, [300])
        self.near((x > 0).float().mean(), 0.5, 0.03)                       # without annealing each stays where it started

    def test_meter_predicts_the_inflation(self):
        for r in (0.1, 0.5, 1.0, 1.5):
            eps = 2 * r * 0.1 ** 2
            (_, first, _), *_, (_, last, inflation) = ncsn.meter(self.sigma, eps)
            self.near([first, last], r, 1e-9)
            x = self.run_sampler(gaussian(S=0.0), n=100_000, eps=eps, T=60, sigma=self.sigma[-2:], denoise=False)
            self.near(x.var() / 0.1 ** 2 / inflation, 1, 0.02)
        x = self.run_sampler(gaussian(S=0.0), n=100, eps=2 * 2.1 * 0.1 ** 2, T=200, sigma=self.sigma[-1:], denoise=False)
        self.assertGreater((x - M).abs().min(), 10)                        # r = 2.1 diverges
        self.assertEqual(ncsn.meter(self.sigma, 2.1 * 0.02)[0][2], math.inf)

    def test_denoiser_is_the_posterior_mean(self):
        D = ncsn.denoiser(None, net=gaussian())
        y = torch.randn(5, 3, 2, 2)
        for sigma in (0.3, torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0])):
            v = torch.as_tensor(sigma).expand(5).view(-1, 1, 1, 1) ** 2
            self.near(D(y, sigma), (S ** 2 * y + v * M) / (S ** 2 + v), 1e-5)

class Sliced(Case):
    def test_loss_at_the_exact_score_is_denoising_less_a_constant(self):
        x = data(20_000, 1, 4, 4)
        for sigma, power, objective in itertools.product((2.0, 0.5), (2.0, 1.0), ("ssm", "ssm-vr")):
            loss = ncsn.loss(gaussian(), x, torch.tensor([sigma]), power=power, objective=objective)
            exact = (S ** 2 / (S ** 2 + sigma ** 2) - 1) / 2 * sigma ** (power - 2)
            self.near(loss / exact, 1, 0.03)

    def test_gradient_vanishes_at_the_exact_score_and_points_back_to_it(self):
        x, sigma = data(20_000, 1, 2, 2), torch.tensor([1.0, 0.3])
        def gradient(scale, objective):
            torch.manual_seed(0)
            a = torch.tensor(scale, requires_grad=True)
            ncsn.loss(lambda x, noise, label: a * gaussian()(x, noise), x, sigma, objective=objective).backward()
            return a.grad.item()
        exact = (1 - S ** 2 / (S ** 2 + sigma ** 2)).mean()                # of a - 1, for denoising and sliced alike
        for objective in ("dsm", "ssm", "ssm-vr"):
            self.near(gradient(1.0, objective), 0, 0.02)
            self.near(gradient(1.5, objective), 0.5 * exact, 0.03)         # a lost 1/2 would vanish at another slope
            self.near(gradient(0.5, objective), -0.5 * exact, 0.03)

    def test_reduced_variance_is_reduced(self):
        x, sigma = data(1, 1, 4, 4), torch.tensor([0.5])
        spread = [torch.stack([ncsn.loss(gaussian(), x, sigma, objective=o) for _ in range(500)]).var()
                  for o in ("ssm", "ssm-vr")]
        self.assertGreater(spread[0], 3 * spread[1])

    def test_trace_through_the_network_and_its_gradient(self):
        torch.manual_seed(3)
        net = common.UNet(1, 16)
        for p in net.parameters():
            nn.init.normal_(p, std=0.2)
        x, sigma, z = torch.rand(1, 1, 8, 8), torch.tensor([0.7]), torch.randn(1, 1, 8, 8)
        jacobian = torch.autograd.functional.jacobian(lambda y: ncsn.score(net, y, sigma), x + 0.7 * z).view(64, 64)
        s, v = ncsn.score(net, x + 0.7 * z, sigma).flatten(), torch.randn(64).sign()
        for objective, norm in (("ssm", (v * s).sum() ** 2), ("ssm-vr", s.square().sum())):
            net.zero_grad()
            with mock.patch.object(torch, "randn_like", mock.Mock(side_effect=[z, v.view(1, 1, 8, 8)])):
                loss = ncsn.loss(net, x, sigma, objective=objective)
            self.near(loss / (0.7 ** 2 * (v @ jacobian @ v + norm / 2) / 64), 1, 1e-3)
            loss.backward()
            self.assertTrue(all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None))
            self.assertGreater(net.attention.in_proj_weight.grad.abs().sum(), 0)       # twice through the attention

class Improved(Case):
    def test_largest_distance_is_exact(self):
        for n, far in ((50, 0), (700, 3)):
            images = (torch.randn(n, 1, 4, 4) * 20 + 128).clamp(0, 255).byte()
            images[:far] = torch.tensor([0, 255, 255], dtype=torch.uint8)[:far, None, None, None]
            exact = torch.cdist(images.flatten(1).double(), images.flatten(1).double()).max() / 255
            for block in (7, 64, 1000):
                self.near(ncsn.largest_distance(images, block=block) / exact, 1, 1e-5)

        images = torch.full((4, 1, 4, 4), 128, dtype=torch.uint8)          # the largest is not among the outermost two
        images.view(4, 16)[[0, 1, 2, 3], [0, 1, 0, 1]] = torch.tensor([255, 255, 3, 3], dtype=torch.uint8)
        self.near(ncsn.largest_distance(images, block=2), 252 / 255, 1e-5)

    def test_overlap_rule(self):
        for d in (5, 27, 784, 3072):
            self.near(ncsn.overlap(ncsn.level_ratio(d), d), 0.5, 1e-9)
        root = math.sqrt(2 * 3072)
        self.near(ncsn.level_ratio(3072), root / (root - 3), 1e-7)               # its second Phi alone
        for d in (1, 2, 4):
            self.refuses("no solution", ncsn.level_ratio, d)
            self.assertGreater(min(ncsn.overlap(1 + 0.01 * k, d) for k in range(100_000)), 0.99)
        gamma, d = ncsn.level_ratio(784), 784                                    # the share that it speaks of, in noise drawn
        radius = torch.randn(20_000, d).norm(dim=1)                        # of a level; the other is gamma times as large
        inside = (radius - gamma * math.sqrt(d)).abs() < 3 * gamma / math.sqrt(2)
        self.near(inside.float().mean(), 0.5, 0.02)

    def test_step_size_makes_the_variance_stay(self):
        for gamma, T in ((1.08, 3), (1.04, 5), (1.2, 1)):
            r, value = ncsn.step_size(gamma, T)
            def after(r):                                                  # x <- (1 - r) x + sqrt(2 r) z, T times
                v = gamma ** 2
                for _ in range(T):
                    v = (1 - r) ** 2 * v + 2 * r
                return v
            self.near(after(r), value, 1e-9)
            self.assertTrue(all(abs(value - 1) < abs(after(r * f) - 1) for f in (0.5, 0.9, 0.99, 1.01, 1.1, 1.5)))
            x = M + gamma * 0.3 * torch.randn(100_000, 1, 1, 1)            # and the sampler does that on a point mass
            x = ncsn.sample(gaussian(S=0.0), x, torch.tensor([0.3]), 2 * r * 0.3 ** 2, [T], denoise=False)
            self.near(x.var() / 0.3 ** 2 / value, 1, 0.02)

    def test_published_settings(self):
        for d, sigma_1, L, T, eps in ncsn.PUBLISHED.values():
            gamma = (sigma_1 / 0.01) ** (1 / (L - 1))
            digits = 1 - math.floor(math.log10(eps))                       # eps is printed with two digits, or one
            self.near(ncsn.step_size(gamma, T)[0] * 1e-4, eps, 0.51 * 10.0 ** -digits * (10 if eps == 9e-7 else 1))
            self.near(ncsn.overlap(gamma, d), 0.567, 0.001)                # all were made with this and not with 0.5
        L, eps, text = ncsn.derive(3072, 50, 0.01, 5)
        self.assertEqual(L, 220)
        self.near(ncsn.derive(3072, 50, 0.01, 5, 232)[1], 2 * 6.2e-6, 1e-7)
        self.assertIn("gamma = 1.03980", text)

    def test_network_is_not_told_sigma(self):
        net = ncsn.Unconditional(1, 8)
        for p in net.parameters():
            nn.init.normal_(p, std=0.2)
        x = torch.rand(1, 1, 8, 8)
        a, b = (ncsn.score(net, x, torch.tensor([sigma])) for sigma in (0.5, 2.0))
        self.near(a / b, 4, 1e-4)

    def test_command(self):
        flags = [*self.tiny(), "--improved", "--out", self.dir / "run"]
        code, out, err = self.command(ncsn, *flags, "--start", "uniform")
        self.assertEqual((code, err), (0, ""))
        images, _ = toy.load_images("digits", self.dir / "data")
        saved = common.load_checkpoint(self.dir / "run" / "ckpt.pt")["args"]
        self.assertEqual((saved["sigma_max"], saved["levels"], saved["eps"]), (1, 10, 2e-5))   # what is given, holds
        for flag in ("--sigma-max", "--levels", "--eps"):
            k = flags.index(flag)
            del flags[k:k + 2]
        code, out, err = self.command(ncsn, *flags, "--overwrite")
        self.assertEqual((code, err), (0, ""))
        saved = common.load_checkpoint(self.dir / "run" / "ckpt.pt")["args"]
        self.near(saved["sigma_max"], ncsn.largest_distance(images), 1e-6)
        L, eps, _ = ncsn.derive(64, saved["sigma_max"], 0.01, 2)
        self.assertEqual((saved["levels"], saved["eps"]), (None, None))
        self.assertIn(f"--eps {eps:.3g} here", out)
        D, y = ncsn.denoiser(common.load_checkpoint(self.dir / "run" / "ckpt.pt")), torch.rand(2, 1, 8, 8)
        self.near(D(y, 2.0) - y, 4 * (D(y, 0.5) - y), 1e-4)                # the network was not told sigma
        more = ncsn.derive(64, saved["sigma_max"], 0.01, 4)[1]
        self.assertLess(more, eps)
        with mock.patch.object(ncsn, "sample", side_effect=lambda net, x, *rest: rest[-2].append(x) or x) as seen:
            code, out, err = self.command(ncsn, "--out", self.dir / "run", "--sample-only", "--T", 4, "--samples", 300)
        self.assertEqual((code, err), (0, ""))
        self.assertIn(f"--eps {more:.3g} here", out)                       # more steps on a level: derived again
        self.near(seen.call_args[0][1].std() / saved["sigma_max"], 1, 0.03)            # and a start from noise
        self.near(seen.call_args[0][3] / more, 1, 1e-6)
        code, out, err = self.command(ncsn, "--derive", "--data-dir", self.dir / "data")
        for words in ("L = 220", "L = 232", "6.2e-06", "sigma_L^2 = 6.18e-06", "gamma = 1.03980", "overlap 0.567"):
            self.assertIn(words, out)
        self.assertEqual((code, err), (0, ""))

    def test_start(self):
        self.assertEqual(self.command(ncsn, *self.tiny(), "--out", self.dir / "run")[0], 0)
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(self.dir / "a.png")
        for start, mean, spread in (("uniform", 0.5, 0.29), ("noise", 0, 1), (self.dir / "a.png", 31.5 / 255, None)):
            with mock.patch.object(ncsn, "sample", side_effect=lambda net, x, *rest: rest[-2].append(x) or x) as seen:
                self.command(ncsn, "--out", self.dir / "run", "--sample-only", "--samples", 200, "--start", start)
            x = seen.call_args[0][1]
            self.near(x.mean(), mean, 0.02)
            if spread:
                self.near(x.std(), spread, 0.02)
            else:
                self.near(x[7], torch.arange(64).view(1, 8, 8) / 255, 1e-6)
        code, _, err = self.command(ncsn, "--out", self.dir / "run", "--sample-only", "--start", self.dir / "b.png")
        self.assertEqual((code, err.count("\n")), (2, 1))

class Diffusion(Case):
    """ddpm.py, with the exact eps of data N(m, s^2) where the network belongs."""
    abar = ddpm.schedule("linear", 1000)
    steps = list(range(1001))

    def exact(self, m=M, s=S, abar=None):
        abar = self.abar if abar is None else abar
        def net(x, t, label=None):                                         # E[eps | x_t]
            a = abar.to(x.device)[t].float().view(-1, 1, 1, 1)
            return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s ** 2 + 1 - a)
        return net

    def gamma(self, s=S, abar=None):
        abar = self.abar if abar is None else abar
        return (1 - abar) / (abar * s ** 2 + 1 - abar)                     # E eps_theta^2 of the exact predictor

    def test_schedules_are_the_papers_formulas(self):
        for T in (100, 1000, 4000):
            beta = [(1e-4 + (t - 1) / (T - 1) * 0.0199) * 1000 / T for t in range(1, T + 1)]
            abar = ddpm.schedule("linear", T)
            for t in (1, T // 2, T):
                self.near(abar[t], math.prod(1 - b for b in beta[:t]), 1e-10)
                self.near(1 - abar[t] / abar[t - 1], beta[t - 1], 1e-10)
            f = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
            abar = ddpm.schedule("cosine", T)
            for t in (1, T // 2, T - 1):
                self.near(abar[t], f(t) / f(0), 1e-10)
            self.near(1 - abar[T] / abar[T - 1], 0.999, 1e-10)             # 1 by the formula, clipped
            self.assertEqual((len(abar), abar[0], abar.dtype), (T + 1, 1, torch.float64))
        self.refuses("--T 20 is too few for --schedule linear", ddpm.schedule, "linear", 20)
        self.assertLess(ddpm.schedule("cosine", 2)[-1], 1e-3)

    def test_loss_at_the_exact_prediction_is_its_closed_form(self):
        a = self.abar[1:]
        v = a * S ** 2 + 1 - a                                             # variance of x_t
        exact = {"eps": a * S ** 2 / v, "x0": S ** 2 * (1 - a) / v, "v": S ** 2 / v}           # of each given x_t
        seen = []
        def net(x, t, label):
            seen.append(t)
            a, s = ddpm.kernel(self.abar, t)
            eps = self.exact()(x, t)
            x0 = (x - s * eps) / a
            return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[predict]
        for predict in exact:
            self.near(ddpm.loss(net, data(100_000), self.abar, predict=predict) / exact[predict].mean(), 1, 0.02)
        t, counts = torch.cat(seen).unique(return_counts=True)
        self.assertEqual(t.tolist(), self.steps[1:])                       # 1 ... T, both ends as often as any
        self.near(counts / 300, 1, 0.3)
        self.near(ddpm.loss(lambda x, t, label: 0 * x, data(50_000), self.abar), 1, 0.02)      # E eps^2
        self.assertLess(ddpm.loss(self.exact(s=0), torch.full((5000, 1, 1, 1), M), self.abar), 1e-6)

    def test_labels_are_passed_on_and_one_in_ten_hidden(self):
        label, history = torch.arange(20_000) % 10, torch.full((1000, 10), math.inf)
        for call, twice in ((ddpm.loss, False), (ddpm.hybrid_loss, True), (ddpm.vlb_loss, True)):
            seen, extra = [], [history] if call is ddpm.vlb_loss else []
            call(lambda x, t, label: seen.append(label) or (torch.cat([x, x], 1) if twice else x), data(20_000), self.abar,
                 *extra, label)
            self.near((seen[0] == -1).float().mean(), 0.1, 0.01)
            self.assertTrue(((seen[0] == label) | (seen[0] == -1)).all())

    def samplers(self, net, x, N, s=S):
        """{name: (drawn from x, whether noise is added)} of all samplers, with N steps."""
        tau, g = ddpm.subsequence(1000, N), self.gamma(s)
        return {**{kind: ddpm.ancestral(net, x, self.abar, tau, kind, g) for kind in ("beta", "beta-tilde", "analytic")},
                **{eta: ddpm.ddim(net, x, self.abar, tau[::-1], eta) for eta in (0.0, 0.5, 1.0)}}

    def moments(self, name, N):
        """Mean and variance that a sampler reaches on N(M, S^2) from N(0, 1): each step is linear in x."""
        mean, var, tau = 0.0, 1.0, ddpm.subsequence(1000, N)
        for t, s in zip(tau[:0:-1], tau[-2::-1]):
            a, b = self.abar[t].item(), self.abar[s].item()
            v, beta = a * S ** 2 + 1 - a, 1 - a / b
            tilde = beta * (1 - b) / (1 - a)
            if isinstance(name, str):                                      # posterior mean of E[x_0 | x_t]
                k = math.sqrt(b) * beta / (1 - a) * math.sqrt(a) * S ** 2 / v + math.sqrt(a / b) * (1 - b) / (1 - a)
                noise = {"beta": beta, "beta-tilde": tilde, "analytic": beta * (b * S ** 2 + 1 - b) / v}[name]
            else:
                noise = name ** 2 * tilde
                k = math.sqrt(a * b) * S ** 2 / v + math.sqrt(max(0, 1 - b - noise)) * math.sqrt(1 - a) / v
            mean = math.sqrt(b) * M + k * (mean - math.sqrt(a) * M)
            var = k ** 2 * var + noise * (s > 0)
        return mean, var

    def test_samplers_reach_mean_and_variance(self):
        x = torch.randn(20_000, 1, 1, 1)
        drawn = ddpm.sample(self.exact(), x, self.abar)
        self.near(drawn.mean(), M, 0.015)
        self.near(drawn.var() / S ** 2, 1, 0.04)
        for N in (1000, 20):
            for name, drawn in self.samplers(self.exact(), x, N).items():
                mean, var = self.moments(name, N)
                self.near(drawn.mean(), mean, 0.015)
                self.near(drawn.var() / var, 1, 0.035)
                if N == 1000:                                              # and all reach the data's own
                    self.near([mean / M, var / S ** 2], 1, 0.025)
        mean, var = self.moments("analytic", 10)                           # the optimal variance: ten steps already do
        drawn = ddpm.ancestral(self.exact(), x, self.abar, ddpm.subsequence(1000, 10), "analytic", self.gamma())
        self.near([mean / M, var / S ** 2, drawn.mean() / M], 1, 0.01)
        self.near(drawn.var() / S ** 2, 1, 0.03)

    def test_point_mass(self):
        x, net = torch.randn(1000, 1, 1, 1), self.exact(s=0)
        self.near(ddpm.sample(net, x, self.abar), M, 1e-4)                 # no noise in the last step
        for N in (1000, 10, 1):
            for drawn in self.samplers(net, x, N, 0).values():
                self.near(drawn, M, 1e-4)

    def test_sample_is_the_ancestral_sampler_on_all_steps(self):
        x, drawn = torch.randn(50, 1, 2, 2), []
        for draw in (lambda: ddpm.sample(self.exact(), x, self.abar),
                     lambda: ddpm.ancestral(self.exact(), x, self.abar, self.steps, "beta"),
                     lambda: ddpm.ancestral(lambda x, t: torch.cat([self.exact()(x, t), torch.ones_like(x)], 1), x,
                                            self.abar, self.steps, "learned")):        # v = 1: beta
            torch.manual_seed(1)
            drawn.append(draw())
        self.near(drawn[1], drawn[0], 1e-4)
        self.near(drawn[2], drawn[0], 1e-4)

    def test_subsequence_holds_the_last_trained_step(self):
        for T, S in ((1000, 10), (1000, 7), (1000, 1000), (50, 49), (30, 1)):
            tau = ddpm.subsequence(T, S)
            self.assertEqual((len(tau), tau[0], tau[-1]), (S + 1, 0, T))
            self.assertEqual(tau, sorted(set(tau)))
            gaps = np.diff(tau[1:])
            self.assertTrue(S == 1 or tau[1] == 1 and gaps.max() - gaps.min() <= 1)
        self.refuses("--sample-steps 31", ddpm.subsequence, 30, 31)

    def test_posterior_is_bayes_rule(self):
        for t, s in ((2, 1), (500, 499), (1000, 999), (1000, 300)):
            a_t, a_s, x0, x_t = self.abar[t], self.abar[s], torch.randn(7).double(), torch.randn(7).double()
            alpha = a_t / a_s
            precision = 1 / (1 - a_s) + alpha / (1 - alpha)                # of q(x_s | x_0) and of q(x_t | x_s)
            mean = (a_s.sqrt() * x0 / (1 - a_s) + alpha.sqrt() * x_t / (1 - alpha)) / precision
            self.near(ddpm.posterior(x0, x_t, a_t, a_s)[0], mean, 1e-10)
            self.near(ddpm.posterior(x0, x_t, a_t, a_s)[1], 1 / precision, 1e-12)

    def test_reverse_variances(self):
        for t, s in ((2, 1), (500, 400), (1000, 999)):
            a, b = self.abar[t], self.abar[s]
            beta, tilde = 1 - a / b, (1 - a / b) * (1 - b) / (1 - a)
            v = torch.tensor([-1, 0, 1]).double()
            self.near(ddpm.reverse_variance("learned", a, b, v) / torch.stack([tilde, (tilde * beta).sqrt(), beta]), 1, 1e-9)
            optimum = beta * (b * S ** 2 + 1 - b) / (a * S ** 2 + 1 - a)   # of Gaussian data: variance of x_s given x_t
            self.near(ddpm.reverse_variance("analytic", a, b, gamma=self.gamma()[t]) / optimum, 1, 1e-9)
            for gamma, cov in ((1.5, 0), (-1e9, 1)):                       # never below beta~, nor above data of [-1, 1]
                self.near(ddpm.reverse_variance("analytic", a, b, gamma=torch.tensor(gamma)),
                          tilde + b * (beta / (1 - a)) ** 2 * cov, 2e-8)
        first = self.abar[1], self.abar[0]                                 # t = 1: beta~ = 0
        self.assertEqual(ddpm.reverse_variance("beta-tilde", *first, floor=1e-5), 1e-5)
        for floor in (0, 1e-5):                                            # the optimum: near 0, but never 0
            self.near(ddpm.reverse_variance("analytic", *first, gamma=torch.tensor(1.5), floor=floor), 1e-8, 1e-12)

    def test_second_moment(self):
        images = ((0.2 + 0.1 * torch.randn(2000, 1, 4, 4)) * 127.5 + 127.5).round().byte()
        abar = ddpm.schedule("cosine", 40)
        g = ddpm.second_moment(self.exact(0.2, 0.1, abar), images, abar, n=1000)
        self.assertEqual(len(g), 41)
        self.near(g[1:] / self.gamma(0.1, abar)[1:], 1, 0.06)

    def test_log_decoder_is_a_distribution(self):
        values = torch.arange(256).double() / 127.5 - 1
        for mean, sigma in ((0.0, 0.01), (0.3, 0.2), (-1.02, 0.001), (1.0, 0.05)):
            log_p = ddpm.log_decoder(values, torch.tensor(mean).double(), torch.tensor(sigma).double())
            self.near(log_p.exp().sum(), 1, 1e-9)
            inner = torch.distributions.Normal(mean, sigma)
            exact = inner.cdf(values[1:-1] + 1 / 255) - inner.cdf(values[1:-1] - 1 / 255)
            self.near(log_p[1:-1].exp(), exact, 1e-6)
        mean = torch.tensor([3.0, -3.0, 0.0], requires_grad=True)          # far off: large, but finite
        l = ddpm.log_decoder(torch.tensor([-1.0, 1.0, 0.5]), mean, torch.tensor(0.01))
        l.sum().backward()
        self.assertTrue(l.isfinite().all() and mean.grad.isfinite().all() and l.max() < -1000)

    def test_bound_is_the_likelihood_of_gaussian_data(self):
        m, s = 0.2, 0.1
        images = ((m + s * torch.randn(2000, 1, 4, 4)) * 127.5 + 127.5).round().clamp(0, 255).byte()
        grid = torch.arange(256).double() / 127.5 - 1
        p = ddpm.log_decoder(grid, torch.tensor(m).double(), torch.tensor(s).double()).exp()
        exact, bounds = -(p * p.clamp(min=1e-300).log2()).sum().item(), []                     # bits of one pixel
        for T in (25, 100, 1000):
            abar = ddpm.schedule("linear", T)
            for kind in ("beta", "beta-tilde", "analytic"):
                L_T, rows = ddpm.evaluate_bound(self.exact(m, s, abar), images, abar, 500, variance=kind,
                                                gamma=self.gamma(s, abar))
                bounds.append((kind, L_T + rows[:, 0].sum().item()))
                error = (rows[:, 1].sum() / 500).sqrt().item()
                self.assertGreater(bounds[-1][1], exact - 4 * error)       # a bound from above
                self.assertLess(error, 0.035)
            a = abar[-1].item()
            self.near(L_T, (a * (m ** 2 + s ** 2) - a - math.log(1 - a)) / 2 / math.log(2), 1e-8 + 0.02 * a)
            self.near(rows[:, 2] / (s ** 2 * (1 - abar) / (abar * s ** 2 + 1 - abar))[1:], 1, 0.15)
            self.near(rows[:, 3], ddpm.entropy_bounds(abar)[1] + 0.5 * (
                (abar * s ** 2 + 1 - abar)[:-1] / (abar * s ** 2 + 1 - abar)[1:]).log(), 1e-6)  # analytic: H(x_t-1 | x_t)
        kinds = dict.fromkeys(k for k, _ in bounds)
        beta, _, analytic = ([b for k, b in bounds if k == kind] for kind in kinds)
        self.assertTrue(beta[0] > beta[1] + 0.1 and beta[1] > beta[2] + 0.1)                   # falls towards it
        self.near([beta[-1] / exact, analytic[-1] / exact], 1, 0.01)

    def test_clipping_lowers_the_terms_but_not_the_decoder(self):
        t = torch.tensor([1, 2, 500, 1000]).repeat(50)
        x0, eps = torch.rand(200, 1, 4, 4).round() * 2 - 1, torch.randn(200, 1, 4, 4)          # only black and white
        a, s = ddpm.kernel(self.abar, t)
        x_t = a * x0 + s * eps
        out = eps + 0.1 * torch.randn_like(eps)
        raw, clipped = (ddpm.bound_term(out, x0, x_t, t, self.abar, clip=clip) for clip in (False, True))
        self.near(raw[0][t == 1], clipped[0][t == 1], 0)
        self.assertTrue((raw[0] >= clipped[0]).all())
        self.assertLess(clipped[0][t == 500].sum() / raw[0][t == 500].sum(), 0.7)        # half of the errors point outwards
        self.near(clipped[1][t > 1], raw[1][t > 1].clamp(-1, 1), 0)

    def test_entropy_of_gaussian_data_is_between_its_bounds(self):
        for name in ("linear", "cosine"):
            abar = ddpm.schedule(name, 1000)
            low, high = ddpm.entropy_bounds(abar)
            v, beta = abar * S ** 2 + 1 - abar, 1 - abar[1:] / abar[:-1]
            true = 0.5 * (2 * math.pi * math.e * beta * v[:-1] / v[1:]).log()                  # of x_{t-1} given x_t
            self.assertTrue((low < true).all() and (true < high).all())
            self.near(high, 0.5 * (2 * math.pi * math.e * beta).log(), 1e-9)
            tilde = beta * (1 - abar[:-1]) / (1 - abar[1:])
            self.near(low[1:], 0.5 * (2 * math.pi * math.e * tilde[1:]).log(), 1e-9)
            self.assertEqual(low[0], -math.inf)                            # x_0 is known from x_1 and x_0

    def test_hybrid_trains_the_mean_by_one_part_and_the_variance_by_the_other(self):
        x0 = (0.2 + 0.1 * torch.randn(64, 1, 4, 4)).clamp(-1, 1)
        def parts(lam):
            torch.manual_seed(0)
            scale, v = torch.tensor(1.1, requires_grad=True), torch.tensor(0.3, requires_grad=True)
            net = lambda x, t, label: torch.cat([scale * self.exact(0.2, 0.1)(x, t), v.expand_as(x)], dim=1)
            l = ddpm.hybrid_loss(net, x0, self.abar, lam=lam)
            l.backward()
            return l.item(), scale.grad.item(), v.grad.item()
        simple, grad_simple, none = parts(0.0)
        both, grad, grad_v = parts(0.001)
        self.assertEqual(none, 0)
        self.near(grad, grad_simple, 1e-7)                                 # the bound does not move the mean
        self.assertNotEqual(grad_v, 0)
        torch.manual_seed(0)
        t, eps = torch.randint(1, 1001, (64,)), torch.randn_like(x0)
        a, s = ddpm.kernel(self.abar, t)
        out = torch.cat([1.1 * self.exact(0.2, 0.1)(a * x0 + s * eps, t), torch.full_like(x0, 0.3)], dim=1)
        l = ddpm.bound_term(out, x0, a * x0 + s * eps, t, self.abar, variance="learned")[0].mean()
        self.near(both - simple, 0.001 * 1000 * l, 1e-5)
        self.near(simple, (eps - out[:, :1]).square().mean(), 1e-6)

    def test_importance_sampling_leaves_the_loss_unbiased(self):
        abar, seen = ddpm.schedule("cosine", 30), []
        x0 = (0.2 + 0.1 * torch.randn(40_000, 1, 1, 1)).clamp(-1, 1)
        def net(x, t, label=None):
            seen.append(t)
            return torch.cat([self.exact(0.2, 0.1, abar)(x, t), torch.zeros_like(x)], dim=1)
        terms = []                                                         # each L_t
        for t in range(1, 31):
            t = torch.full((40_000,), t)
            a, s = ddpm.kernel(abar, t)
            x_t = a * x0 + s * torch.randn_like(x0)
            terms.append(ddpm.bound_term(net(x_t, t), x0, x_t, t, abar, variance="learned")[0].mean())
        for history in (torch.rand(30, 10) + torch.linspace(3, 0.1, 30)[:, None], torch.full((30, 10), math.inf)):
            seen.clear()
            before = history.clone()
            p = before.square().mean(1).sqrt() if before.isfinite().all() else torch.ones(30)
            self.near(ddpm.vlb_loss(net, x0, abar, history) / sum(terms), 1, 0.03)
            counts = seen[0].bincount(minlength=31)[1:]
            self.near(counts / 40_000, 0.999 * p / p.sum() + 0.001 / 30, 0.006)
            self.assertTrue(torch.equal(history[:, :9], before[:, 1:]))    # the oldest of ten leaves, the newest enters
            self.assertTrue((history[:, 9] != before[:, 9]).all())
        history = torch.ones(30, 10)
        history[3, 0] = math.inf                                           # one is missing: uniform
        seen.clear()
        ddpm.vlb_loss(net, x0, abar, history)
        self.near(seen[0].bincount(minlength=31)[1:] / 40_000, 1 / 30, 0.006)

    def test_ddim_is_the_ode_and_its_inverse_to_first_order(self):
        x, errors, back = data(1000), [], []
        v = self.abar * S ** 2 + 1 - self.abar
        exact = self.abar[-1].sqrt() * M + (v[-1] / S ** 2).sqrt() * (x - M)                   # the flow keeps quantiles
        for N in (20, 40, 80, 160):
            tau = ddpm.subsequence(1000, N)
            x_T = ddpm.ddim(self.exact(), x, self.abar, tau)
            errors.append((x_T - exact).abs().mean())
            back.append((ddpm.ddim(self.exact(), x_T, self.abar, tau[::-1]) - x).abs().mean())
        for e in (errors, back):
            for coarse, fine in zip(e, e[1:]):
                self.near(coarse / fine, 2, 0.25)                          # half the step, half the error
        self.assertLess(back[-1], 0.02)

    def test_predictor(self):
        x, t, label = torch.randn(20, 1, 2, 2), torch.randint(300, 1000, (20,)), torch.arange(20) % 3
        a, s = ddpm.kernel(self.abar, t)
        eps = self.exact()(x, t)
        x0 = (x - s * eps) / a
        frames = []
        for predict, out in (("eps", eps), ("x0", x0), ("v", a * eps - s * x0)):
            net = lambda x, t, label: torch.cat([out, 7 + 0 * x], 1)
            self.near(ddpm.predictor(net, self.abar, predict)(x, t), eps, 1e-4)
            both = ddpm.predictor(net, self.abar, predict, learned=True)(x, t)
            self.near(both[:, :1], eps, 1e-4)
            self.near(both[:, 1:], 7, 0)
            f = ddpm.predictor(net, self.abar, predict, clip=True, frames=frames, every=2)
            clipped = [f(x, t) for _ in range(3)][0]
            self.near((x - s * clipped) / a, x0.clamp(-1, 1), 1e-3)
        self.assertEqual(len(frames), 6)                                   # the first and the third of three calls, each
        self.near(frames[0][::2], x[:8], 0)
        self.near(frames[0][1::2], x0[:8].clamp(-1, 1), 1e-4)
        net = lambda x, t, label: label.view(-1, 1, 1, 1) * torch.ones_like(x)                 # null: -1
        self.near(ddpm.predictor(net, self.abar, label=label, w=2.0)(x, t)[:, 0, 0, 0], 3 * label + 2, 1e-5)
        self.near(ddpm.predictor(net, self.abar, label=label)(x, t)[:, 0, 0, 0], label, 1e-5)

    def test_denoiser_is_that_of_ncsn(self):
        ckpt = {"args": {"schedule": "linear", "T": 1000, "predict": "eps"}}
        y = torch.randn(6, 1, 2, 2)
        def net(x, t, label):                                              # exact between two steps too
            table = ((1 - self.abar) / self.abar)[1:].log() / 2
            i = t.floor().long().clamp(1, 999)
            log_sigma = table[i - 1] + (t - i) * (table[i] - table[i - 1])
            a = (1 / (1 + (2 * log_sigma).exp())).float().view(-1, 1, 1, 1)
            return (1 - a).sqrt() * (x - a.sqrt() * M) / (a * S ** 2 + 1 - a)
        D, other = ddpm.denoiser(ckpt, net), ncsn.denoiser(None, gaussian())
        for sigma in (0.05, 1.0, torch.tensor([0.02, 0.1, 0.7, 3.0, 20.0, 100.0])):
            self.near(D(y, sigma), other(y, sigma), 2e-3)
        on_grid = ((1 - self.abar[300]) / self.abar[300]).sqrt().float()
        seen = []
        ddpm.denoiser(ckpt, lambda x, t, label: seen.append((x, t)) or x)(y, on_grid)
        self.near(seen[0][1], 300, 1e-2)
        self.near(seen[0][0], self.abar[300].sqrt() * y, 1e-5)

    def test_annealed_langevin_draws_from_a_ddpm(self):
        D = ddpm.denoiser({"args": {"schedule": "linear", "T": 1000, "predict": "eps"}}, lambda x, t, label: (
            lambda a: (1 - a).sqrt() * (x - a.sqrt() * M) / (a * S ** 2 + 1 - a))(self.abar[t.round().long()].float().view(-1, 1, 1, 1)))
        sigma = common.geometric_sigmas(4.0, 0.1, 10)
        x = ncsn.sample(ddpm.score_network(D), torch.rand(20_000, 1, 1, 1), sigma, 0.004, [100] * 10)
        v = S ** 2 + 0.01
        self.near(x.mean(), M, 0.02)
        self.near(x.var() / (S ** 4 / v / (1 - 0.002 / (2 * v))), 1, 0.04)

    def test_slerp(self):
        a, b = torch.randn(2, 1, 28, 28)
        self.near(ddpm.slerp(a, b, torch.tensor(0.0)), a, 1e-5)
        self.near(ddpm.slerp(a, b, torch.tensor(1.0)), b, 1e-5)
        b = b * a.norm() / b.norm()
        middle = ddpm.slerp(a, b, torch.tensor(0.5))
        self.near(middle.norm() / a.norm(), 1, 1e-4)                       # on the sphere, half way
        self.near((middle - a).norm(), (middle - b).norm(), 1e-3)

def one_hot_noise(count):
    """A stand-in for torch.randn_like: the k-th call returns the k-th unit vector of the batch, so that a batch holds the
    coefficients of independent N(0, 1) and mean and variance of a linear sampler come out exactly."""
    return lambda x: torch.zeros_like(x).index_fill(0, torch.tensor([next(count)]), 1.0)

class SDEs(Case):
    """sde.py, with the exact eps(y, sigma) of data N(M, S^2) where the network belongs."""
    sdes = {"ve": sde.VE(0.01, 34.0), "vp": sde.VP(), "subvp": sde.SubVP(), "edm": sde.EDM()}

    def exact(self, m=M, s=S):
        return lambda y, sigma, label=None: sigma.view(-1, 1, 1, 1) * (y - m) / (s ** 2 + sigma.view(-1, 1, 1, 1) ** 2)

    def test_kernels_solve_their_sdes(self):
        for name, e in self.sdes.items():
            t = torch.linspace(e.eps, e.T, 40, dtype=torch.float64).requires_grad_()
            a, s = e.kernel(t)
            da, = torch.autograd.grad(a.sum(), t, retain_graph=True) if name in ("vp", "subvp") else (t * 0,)
            dv, = torch.autograd.grad((s ** 2).sum(), t)
            f = e.f(torch.ones_like(t), t)                                 # f(x, t) = f(1, t) x
            self.near(da / a, f, 1e-9)                                     # E x(t) = a x(0):   a' = f a
            self.near(dv / (2 * f * s ** 2 + e.g(t) ** 2), 1, 1e-9)        # Var x(t) = s^2:    (s^2)' = 2 f s^2 + g^2
            self.near(e.time(s / a) / t, 1, 1e-9)
        end = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self.near(self.sdes["ve"].kernel(end)[1], [0.01, 34], 1e-12)
        self.near(self.sdes["ve"].g(end), [0.01 * math.sqrt(2 * math.log(3400)), 34 * math.sqrt(2 * math.log(3400))], 1e-9)
        a, s = self.sdes["vp"].kernel(end)
        self.near(a, [1, math.exp(-(0.1 + 20) / 4)], 1e-12)
        self.near(a ** 2 + s ** 2, 1, 1e-12)
        self.near(self.sdes["subvp"].kernel(end)[1], 1 - a ** 2, 1e-12)
        self.near(self.sdes["vp"].g(end) ** 2, [0.1, 20], 1e-12)
        self.assertEqual([e.prior for e in self.sdes.values()], [34, 1, 1, 80])
        self.near(sde.sigma_range(self.sdes["edm"]), [0.002, 80], 1e-12)

    def test_no_cancellation_near_0(self):
        for name in ("vp", "subvp"):
            t = torch.logspace(-5, 0, 60)
            s, exact = (self.sdes[name].kernel(v)[1].double() for v in (t, t.double()))
            self.near(s / exact, 1, 2e-6)
            self.near(self.sdes[name].time((lambda a, s: s / a)(*self.sdes[name].kernel(t))) / t, 1, 1e-4)
        self.assertGreater(((1 - (-self.sdes["vp"].B(t)).exp()) / (exact * 0 + self.sdes["vp"].kernel(t.double())[1] ** 2)
                            - 1).abs().max(), 0.005)                       # what the naive way loses

    def test_grids(self):
        for name, e in self.sdes.items():
            ts = sde.times(e, 10)
            self.near(ts, e.T + (e.eps - e.T) * torch.arange(11, dtype=torch.float64) / 10, 1e-12)
            a, s = e.kernel(sde.times(e, 10, 7.0))
            low, high = sde.sigma_range(e)
            self.near((s / a) ** (1 / 7), torch.linspace(high ** (1 / 7), low ** (1 / 7), 11), 1e-5)

    def test_transitions_are_exact_and_those_of_the_papers(self):
        for name, e in self.sdes.items():
            t, u, v = (torch.tensor(k, dtype=torch.float64) * e.T for k in (0.9, 0.5, 0.2))
            (r1, G1), (r2, G2), (r, G) = sde.transition(e, t, u), sde.transition(e, u, v), sde.transition(e, t, v)
            self.near(r1 * r2 / r, 1, 1e-9)                                # two steps are one
            self.near((r1 ** 2 * G2 + G1) / G, 1, 1e-9)
            self.assertGreater(G1, 0)
        beta = common.linear_betas(1000)
        abar = torch.cat([torch.ones(1), (1 - beta).cumprod(0)])
        e = self.sdes["vp"]
        t = e.time(((1 - abar) / abar).sqrt())
        r, G = sde.transition(e, t[300], t[299])
        self.near([r ** 2, G], [1 - beta[299], beta[299]], 1e-9)           # eq. (10)
        self.near(1000 * t, torch.arange(1001), 4)                         # DDPM is the VP SDE at t = i / N, but for 1/N

    def test_ddpm_is_the_discretised_vp_sde(self):
        abar, e = ddpm.schedule("linear", 1000), self.sdes["vp"]
        x, drawn, net = torch.randn(50, 1, 2, 2), [], Diffusion().exact()
        ts = e.time(((1 - abar) / abar).sqrt()).flip(0)[:-1]               # t_1000 ... t_1
        score = sde.make_score(self.exact(), e)
        for draw in (lambda: ddpm.sample(net, x, abar), lambda: sde.ancestral(score, e, x, ts)):
            torch.manual_seed(1)
            drawn.append(draw())
        self.near(*drawn, 1e-4)

    def test_ncsn_is_the_discretised_ve_sde(self):
        sigma = common.geometric_sigmas(34.0, 0.01, 30)
        e = self.sdes["ve"]
        self.near(e.kernel(sde.times(sde.VE(0.01, 34.0, 1e-12), 29))[1] / sigma, 1, 1e-9)      # the ladder, in equal steps
        for sigma, alpha in ((30.0, 1.0), (0.2, 0.6)):                     # Algorithm 4 or 5 where score = -x / sigma^2:
            x, z, eps = sigma * torch.randn(20_000, 1, 1, 1), [], 2 * alpha * (0.16 * sigma) ** 2    # ~ sigma^2, as alpha_i
            new = sde.correct(lambda x, t, i=None: -x / sigma ** 2, x, None, 0.16, alpha)
            noise = (new - (1 - eps / sigma ** 2) * x) / sigma
            self.near([noise.std() * sigma / math.sqrt(2 * eps), (noise * x / sigma).mean()], [1, 0], 0.02)
        for sampler in (sde.pc, sde.langevin):                             # alpha_i = 1 - beta_i, where VE has 1
            for vp, first, calls in ((self.sdes["vp"], 1, []), (self.sdes["subvp"], 1, []), (e, 0, [])):
                ts = sde.times(vp, 3)
                with mock.patch.object(sde, "correct", lambda score, x, t, snr, alpha: calls.append(float(alpha)) or x):
                    sampler(sde.make_score(self.exact(), vp), vp, torch.randn(5, 1, 1, 1), ts)
                self.near(calls, (-first * (self.sdes["vp"].B(ts[:-1]) - self.sdes["vp"].B(ts[1:]))).exp(), 1e-9)
        seen = []
        score = lambda x, t, i=None: seen.append(float(t)) or -(x - M) / (S ** 2 + e.kernel(t)[1] ** 2)
        sde.langevin(score, e, 34 * torch.randn(10, 1, 1, 1), sde.times(e, 3), M=2)
        self.near(seen, sde.times(e, 3)[[1, 1, 2, 2, 3, 3, 3]], 1e-9)      # M steps where each of the levels is, and Tweedie
        del seen[:]
        sde.pc(score, e, 34 * torch.randn(10, 1, 1, 1), sde.times(e, 3), M=2)
        self.near(seen, sde.times(e, 3)[[0, 1, 1, 1, 2, 2, 2, 3, 3, 3]], 1e-9)

    def moments(self, name, e, N, rho=None, churn=0.0):
        """Mean and variance of x(eps), exactly, by a sampler that is linear in x, before the last Tweedie step."""
        K = N + 3                                                          # constant, x(T), noises
        x, unit = torch.zeros(K, 1, 1, 1, dtype=torch.float64), torch.zeros(K, 1, 1, 1, dtype=torch.float64)
        x[1], unit[0] = e.prior, 1
        def eps(y, sigma, label=None):
            sigma = sigma.view(-1, 1, 1, 1)
            return sigma * (y - M * unit) / (S ** 2 + sigma ** 2)
        score = sde.make_score(eps, e)
        with mock.patch.object(sde.torch, "randn_like", one_hot_noise(itertools.count(2))), \
                mock.patch.object(sde, "tweedie", lambda score, sde, x, t: x):
            x = sde.heun(score, e, x, N, churn=churn) if name == "heun" else getattr(sde, name)(score, e, x, sde.times(e, N, rho))
        return x[0].item(), x[1:].square().sum().item()

    def test_errors_fall_with_the_order_of_the_sampler(self):
        for name, e in self.sdes.items():
            a, s = (v.item() for v in e.kernel(torch.tensor(e.eps, dtype=torch.float64)))
            target = math.sqrt(a ** 2 * S ** 2 + s ** 2)
            for sampler in ("em", "reverse", "ancestral"):
                grid = (7.0 if name == "edm" else None,)
                std = [math.sqrt(self.moments(sampler, e, N, *grid)[1]) for N in (200, 400, 800)]
                error = [abs(v - target) for v in std]
                slopes = [math.log2(p / q) for p, q in zip(error, error[1:])]
                # of first order: twice the steps, half the error; VE's em errs even less, its first term vanishes
                self.near(slopes, 2 if (name, sampler) == ("ve", "em") else 1, 0.1)
                self.near(std[-1] / target, 1, 0.02)
            high, a = sde.sigma_range(e)[1], e.kernel(torch.tensor(e.T, dtype=torch.float64))[0].item()
            shrink = S / math.sqrt(S ** 2 + high ** 2)                     # the ODE from x(T) = 0 + prior z ends at
            mean, std = M * (1 - shrink), shrink * e.prior / a             # M + shrink (x(T) / a - M)
            found = [self.moments("heun", e, N) for N in (32, 64)]
            p, q = (abs(math.sqrt(var) - std) for _, var in found)
            self.near(math.log2(p / q), 2, 0.25)                           # of second order
            self.near(found[-1][0], mean, 1e-3)

    def test_churn_keeps_mean_and_variance(self):
        for e in self.sdes.values():                                       # EDM, Algorithm 2, forgets x(T): no shrink
            for churn in (20.0, 60.0):
                mean, var = self.moments("heun", e, 300, churn=churn)
                self.near([mean / M, math.sqrt(var) / S], 1, 0.02)

    def test_churn_is_that_of_edm_algorithm_2(self):
        sigma, e = common.karras_sigmas(4, 0.002, 80.0).tolist(), self.sdes["edm"]
        for churn, gamma in ((1.0, 1 / 4), (40.0, math.sqrt(2) - 1)):      # min(S_churn / N, sqrt(2) - 1),
            for low, high in ((0.0, math.inf), (0.1, 10.0)):               # from S_tmin to S_tmax
                seen = []
                score = lambda x, t, i=None: seen.append(float(t)) or -(x - M) / (S ** 2 + t ** 2)
                sde.heun(score, e, torch.randn(5, 1, 1, 1), 4, 7.0, churn, low, high)
                exact = [v for a, b in zip(sigma, sigma[1:]) for v in (a * (1 + gamma * (low <= a <= high)), b)][:-1]
                self.near(torch.tensor(seen) / torch.tensor(exact), 1, 1e-5)

    def test_adaptive_steps_are_those_of_its_algorithm_1(self):
        e, tol, z = self.sdes["vp"], 0.02, -0.7                            # a path whose noise is z in every step
        number = lambda f: lambda *v: f(*(torch.tensor(k, dtype=torch.float64) for k in v)).item()
        f, g, score = number(e.f), number(e.g), sde.make_score(self.exact(), e)
        s = number(lambda x, t: score(x.view(1, 1, 1, 1), t))
        x = before = 4.0
        t, h, exact, rejected = e.T, 0.01 * (e.T - e.eps), [], 0
        while t > e.eps:
            t_ = t - h if h < t - e.eps else e.eps
            F = lambda x, t: -h * (f(x, t) - g(t) ** 2 * s(x, t)) + math.sqrt(h) * g(t) * z
            low = x + F(x, t)
            high = (x + low + F(low, t_)) / 2
            error = abs(low - high) / max(2 / 256, tol * max(abs(low), abs(before)))
            exact += [t, t_]
            if error <= 1:
                x, before, t = high, low, t_
            rejected += error > 1
            h = min(t - e.eps, 0.9 * h * error ** -0.9)
        seen = []
        spy = lambda x, t, i=sde.ALL: seen.append(t.item()) or score(x, t, i)
        with mock.patch.object(sde.torch, "randn_like", lambda x: torch.full_like(x, z)):
            found = sde.adaptive(spy, e, torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64), tol)
        self.assertGreater(rejected, 2)
        self.assertEqual(len(seen), len(exact) + 1)                        # and E[x(0) | x(eps)]
        self.near(torch.tensor(seen[:-1]) / torch.tensor(exact), 1, 1e-4)
        self.near(found, x, 1e-2)

    def drawn(self, name, e, score, x, N=1000, rho=None):
        """What the sampler of this name draws from x."""
        grid = sde.times(e, N, 7.0 if isinstance(e, sde.EDM) else rho)
        options = {"ode": (1e-6,), "heun": (100,), "adaptive": (0.02, 0.0078, 0.5), "langevin": (grid, 0.3, 3), "pc": (grid, 0.16, 1)}
        return sde.SAMPLERS[name](score, e, x, *options.get(name, (grid,)))

    def test_every_sampler_with_every_sde_reaches_mean_and_variance(self):
        for name, e in self.sdes.items():
            score = sde.make_score(self.exact(), e)
            sigma = sde.sigma_range(e)[0]
            final = S ** 2 / math.sqrt(S ** 2 + sigma ** 2)                # std of E[x(0) | x(eps)]
            for sampler in sde.SAMPLERS:
                n = 500 if sampler == "adaptive" else 8000
                x = self.drawn(sampler, e, score, e.prior * torch.randn(n, 1, *([8, 8] if n == 500 else [1, 1])),
                               1000 if sampler == "langevin" else 400)
                drift = {"ode": 0.06, "heun": 0.06}.get(sampler, 0.03)     # the ODE keeps x(T)'s missing mean, VE's most
                self.near(x.mean(), M, drift)
                # 8000 draws: 0.8 %; Euler at N = 400: 1.5 %; a Langevin step of snr r: 1 / sqrt(1 - r^2), 4.8 % at 0.3
                inflation = 1 / math.sqrt(1 - 0.09) if sampler == "langevin" else 1
                self.near(x.std() / final / inflation, 1, 0.035)

    def test_point_mass_and_the_last_noise(self):
        for e in self.sdes.values():
            score = sde.make_score(self.exact(s=0.0), e)
            x = e.prior * torch.randn(400, 1, 4, 4)
            a, s = (v.item() for v in e.kernel(torch.tensor(e.eps)))
            for sampler in sde.SAMPLERS:
                self.near(self.drawn(sampler, e, score, x, 100), M, 1e-3)
                if sampler not in ("heun", "langevin"):                    # x(eps) ~ N(a M, s^2), and only s
                    with mock.patch.object(sde, "tweedie", lambda score, sde, x, t: x):
                        last = self.drawn(sampler, e, score, x, 1000, 7.0)
                    rms = (last - a * M).square().mean().sqrt()
                    self.near(last.mean() / (a * M), 1, 0.005)
                    if sampler == "adaptive" and s < 0.0078:               # it does not look closer than one grey level
                        self.assertLess(rms, 0.03)
                    else:
                        self.near(rms / s, 1, 0.07)

    def test_ode_and_sde_have_the_same_marginals(self):
        for e in self.sdes.values():
            score = sde.make_score(self.exact(), e)
            a, s = e.kernel(torch.tensor(e.T))
            x, ts = a * M + (a ** 2 * S ** 2 + s ** 2).sqrt() * torch.randn(8000, 1, 1, 1), sde.times(e, 800, 7.0)
            with mock.patch.object(sde, "tweedie", lambda score, sde, x, t: x):
                for k in (200, 350, 500, 650, 800):
                    a, s = e.kernel(ts[k])
                    v = (a * S) ** 2 + s ** 2
                    for drawn in (sde.em(score, e, x, ts[:k + 1]), sde.rk45(sde.flow(score, e), x, e.T, ts[k].item(), 1e-6)):
                        self.near((drawn.mean() - a * M) / v.sqrt(), 0, 0.045)         # four standard errors
                        self.near(drawn.std() / v.sqrt(), 1, 0.035)

    def test_runge_kutta(self):
        x = torch.rand(20, 3, dtype=torch.float64) + 0.5
        rate, calls = torch.linspace(0.1, 3, 20, dtype=torch.float64)[:, None], []
        def fun(x, t, i):
            calls.append(len(x))
            return -rate[i] * x * t
        for t0, t1 in ((0.0, 2.0), (2.0, 0.5)):
            for tol in (1e-4, 1e-8):
                exact = x * (rate * (t0 ** 2 - t1 ** 2) / 2).exp()
                self.near(sde.rk45(fun, x, t0, t1, tol) / exact, 1, 100 * tol)
        del calls[:]
        together = sde.rk45(fun, x, 0.0, 2.0, 1e-6)
        cost = sum(calls)
        for k in (0, 10, 19):                                              # no sample depends on the others
            alone = sde.rk45(lambda x, t, i: -rate[k] * x * t, x[k:k + 1], 0.0, 2.0, 1e-6)
            self.near(alone, together[k], 1e-12)
        self.assertEqual(calls[0], 20)
        self.assertLess(cost, 20 * len(calls) * 0.9)                       # those that have arrived cost nothing
        with self.assertRaises(common.UserError):
            sde.rk45(lambda x, t, i: x * math.nan, x, 0.0, 1.0, 1e-6)
        errors = [(sde.rk45(fun, x, 0.0, 1.0, tol) - x * (-rate / 2).exp()).abs().max() for tol in (1e-3, 1e-6)]
        self.assertGreater(errors[0] / errors[1], 100)

    def test_loss_at_the_exact_score_is_its_closed_form(self):
        x0 = data(40_000)
        t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        def net(precond, sd):                                              # returns what the preconditioning asks for
            def f(x, noise, label):
                sigma = (noise * (4 if precond == "edm" else 1)).exp().view(-1, 1, 1, 1)
                y = x * (sigma ** 2 + sd ** 2).sqrt()
                D = (M * sigma ** 2 + S ** 2 * y) / (S ** 2 + sigma ** 2)
                if precond == "eps":
                    return (y - D) / sigma
                return (D - sd ** 2 / (sigma ** 2 + sd ** 2) * y) / (sigma * sd / (sigma ** 2 + sd ** 2).sqrt())
            return f
        for name, e in self.sdes.items():
            low, high = sde.sigma_range(e)
            for precond, sd in (("eps", 0.5), ("edm", 0.5), ("edm", 1.0)):
                if name == "edm":                                          # sigma / 2 sd ~ exp N(-1.2, 1.2^2), lambda of table 1
                    sigma = 2 * sd * (-1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * t[1:-1] - 1)).exp()
                    exact = (S ** 2 / (S ** 2 + sigma ** 2) * (sigma ** 2 + sd ** 2) / sd ** 2).mean()
                    self.near(sde.loss(net(precond, sd), x0, e, precond=precond, sigma_data=sd) / exact, 1, 0.04)
                    continue
                a, s = e.kernel(e.eps + t * (1 - e.eps))
                exact = (S ** 2 / (S ** 2 + (s / a) ** 2)).mean()          # t uniform, lambda = s^2
                self.near(sde.loss(net(precond, sd), x0, e, precond=precond, sigma_data=sd) / exact, 1, 0.03)
                sigma = low * (high / low) ** t                            # log sigma uniform, lambda = g^2 / s^2 s^2
                exact = (S ** 2 / (S ** 2 + sigma ** 2)).mean()
                drawn = sde.loss(net(precond, sd), x0, e, weighting="likelihood", precond=precond, sigma_data=sd)
                self.near(drawn / exact, 1, 0.03)
                t_, = (e.eps + t * (1 - e.eps),)
                direct = (e.g(t_) ** 2 / e.kernel(t_)[1] ** 2 * S ** 2 / (S ** 2 + (s / a) ** 2))[1:].mean() * (1 - e.eps) / 2
                self.near(direct / (exact * math.log(high / low)), 1, 0.01)          # the same integral, without importance
            self.near(sde.loss(lambda x, n, l: (x * (n.exp().view(-1, 1, 1, 1) ** 2 + 1).sqrt() - M) / n.exp().view(-1, 1, 1, 1),
                               torch.full((1000, 1, 1, 1), M), e), 0, 1e-3)

    def test_an_edm_network_of_zeros_is_exact_on_its_own_data(self):
        x0 = 0.5 * torch.randn(50_000, 1, 1, 1)                            # N(0, sigma_data^2): D = c_skip y
        self.near(sde.loss(lambda x, n, l: torch.zeros_like(x), x0, self.sdes["edm"], precond="edm", sigma_data=0.5), 1, 0.02)
        seen, y, sigma = [], torch.randn(3, 1, 2, 2), torch.tensor([0.01, 1.0, 30.0])
        sde.eps_theta(lambda x, n, l: seen.append((x, n)) or x, y, sigma, None, "edm", 0.5)
        self.near(seen[0][0], y / (sigma ** 2 + 0.25).sqrt().view(-1, 1, 1, 1), 1e-6)                # c_in
        self.near(seen[0][1], sigma.log() / 4, 1e-6)                                                # c_noise

    def test_labels_are_passed_on_and_one_in_ten_hidden(self):
        seen, label = [], torch.arange(20_000) % 10
        sde.loss(lambda x, n, l: seen.append(l) or torch.zeros_like(x), data(20_000), self.sdes["vp"], label)
        self.near((seen[0] == -1).float().mean(), 0.1, 0.01)
        self.assertTrue(((seen[0] == label) | (seen[0] == -1)).all())

    modes = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.5, -0.5]], dtype=torch.float64)
    weights, width = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.3

    def mixture(self, sigma, y):
        """log density of the mixture with noise sigma (B,) at y (B, 2, 1, 1), for each mode: (B, 3)."""
        v = self.width ** 2 + sigma.view(-1, 1) ** 2
        d2 = (y.flatten(1)[:, None] - self.modes.to(y)).square().sum(2)
        return self.weights.to(y).log() - d2 / (2 * v) - (2 * math.pi * v).log()

    def mixture_eps(self, y, sigma, label=None):
        v = (self.width ** 2 + sigma ** 2).view(-1, 1)
        p = self.mixture(sigma, y).softmax(1) if label is None else torch.eye(3).to(y)[label]
        score = (p @ self.modes.to(y) - y.flatten(1)) / v
        return -(sigma.view(-1, 1) * score).view_as(y)

    def test_likelihood_of_a_mixture(self):
        k = torch.multinomial(self.weights, 1000, replacement=True)
        x = (self.modes[k] + self.width * torch.randn(1000, 2, dtype=torch.float64)).view(-1, 2, 1, 1)
        exact = self.mixture(torch.zeros(1000, dtype=torch.float64), x).logsumexp(1)
        for e in (sde.VP(eps=1e-5), sde.SubVP(eps=1e-4), sde.VE(0.001, 60.0), sde.EDM()):
            score = sde.make_score(self.mixture_eps, e)
            logp, x_T = sde.log_likelihood(score, e, x, 1e-6, probes=0)
            self.near(logp[:, 0].mean(), exact.mean(), 0.01)
            self.near(logp[:, 0], exact, 0.1)
            back = sde.rk45(sde.flow(score, e), x_T, e.T, e.eps, 1e-6)     # encode, decode
            self.near(back, x, 1e-3)
            estimate, _ = sde.log_likelihood(score, e, x[:300], 1e-4, probes=4)
            error = (estimate - logp[:300]).mean(1)
            self.near(error.mean(), 0, 4 * error.std() / math.sqrt(300))   # unbiased
            self.near(error.std() / (estimate.std(1).square().mean().sqrt() / 2), 1, 0.25)     # within its printed error
            self.assertGreater(error.std(), 0.01)

    def test_bits_of_a_uniform_and_of_a_gaussian(self):
        u = torch.randint(0, 256, (400, 1, 2, 2)).double()
        for transform in ("none", "logit"):
            torch.manual_seed(3)
            y, logdet = sde.to_data(u / 127.5 - 1, transform)
            torch.manual_seed(3)
            v = ((u + torch.rand_like(u)) / 256).requires_grad_()
            w = 1e-6 + (1 - 2e-6) * v
            z = 2 * v - 1 if transform == "none" else (w / (1 - w)).log() / 6
            self.near(y, z, 1e-9)
            slope, = torch.autograd.grad(z.sum(), v)
            self.near(logdet, (slope / 256).log().flatten(1).sum(1), 1e-6)
            logp = -(slope.log()).flatten(1).sum(1)                        # density of y where v is uniform on [0, 1]
            self.near(-(logp + logdet) / 4 / math.log(2), 8, 1e-6)         # 256 equal grey levels: 8 bits
            self.near(sde.from_data(y, transform), u / 127.5 - 1, 1e-9)    # and back, to the grey level
        y = 0.1 + 0.2 * torch.randn(300, 1, 2, 2, dtype=torch.float64)
        e = sde.VP(eps=1e-5)
        logp, _ = sde.log_likelihood(sde.make_score(self.exact(0.1, 0.2), e), e, y, 1e-5)
        exact = torch.distributions.Normal(0.1, 0.2).log_prob(y).flatten(1).sum(1)
        self.near(logp[:, 0], exact, 0.02)                                 # of each: v^T J v = tr J if J is diagonal
        bits = -logp[:, 0] / 4 / math.log(2) + 7                           # 7 = 8 - log2 of the range 2 for 256 levels
        self.near(bits.mean(), math.log2(0.2 * 256 / 2 * math.sqrt(2 * math.pi * math.e)), 4 * bits.std() / math.sqrt(300) + 1e-3)

    def test_reported_bits_are_those_of_the_exact_density(self):
        e, lines, k = sde.VP(eps=1e-5), [], torch.multinomial(self.weights, 130, replacement=True)
        y = (self.modes[k] + self.width * torch.randn(130, 2, dtype=torch.float64)).view(-1, 2, 1, 1)
        slope = torch.linspace(-30, -10, 130, dtype=torch.float64)         # log |dy / du| of each image
        run = argparse.Namespace(args=argparse.Namespace(out=self.dir, probes=2), print=lines.append)
        sde.report_bits(run, sde.make_score(self.mixture_eps, e), e, y, slope, 1e-5, [130 * 40])
        exact = -(self.mixture(0 * slope, y).logsumexp(1) + slope) / 2 / math.log(2)           # of two grey levels
        rows = torch.tensor(np.loadtxt(self.dir / "bits.csv", delimiter=","))
        off = rows - exact[:, None]
        self.near(off.mean(), 0, 4 * off.mean(1).std() / math.sqrt(130))
        self.near(off, 0, 3)
        found = re.match(r"bits   (\S+) \+- (\S+) \((\S+) .* of (\d+) test.*, (\d+) eval", lines[-1]).groups()
        error = rows.mean(1).std() / math.sqrt(130), (rows.var(1).mean() / rows.numel()).sqrt()
        self.near([float(v) for v in found], [rows.mean(), *error, 130, 40], 1e-4)

    def test_guidance_is_bayes_rule(self):
        y, label = torch.randn(30, 2, 1, 1), torch.arange(30) % 3
        def classifier(x, noise, label):                                   # logits of p(label | y), as two pixels' mean
            logits = self.mixture(noise.exp(), x * (noise.exp() ** 2 + 1).sqrt().view(-1, 1, 1, 1))
            return torch.stack([logits - 1, logits + 1], dim=2)[..., None]
        for e in self.sdes.values():
            for t in (0.1 * e.T, 0.7 * e.T):
                t = torch.tensor(t)
                a, s = e.kernel(t)
                at = lambda l: -self.mixture_eps(y, (s / a).expand(30).float(), l) / s
                near = lambda score, exact: self.near(score(a * y, t) / exact.abs().max(), exact / exact.abs().max(), 1e-4)
                free, one = at(None), at(label)
                near(sde.make_score(self.mixture_eps, e, label, 1.0, classifier=classifier), one)            # eq. (14)
                near(sde.make_score(self.mixture_eps, e, label, 3.0, classifier=classifier), free + 3 * (one - free))
                null = lambda y, sigma, l: self.mixture_eps(y, sigma, None if (l == -1).all() else l)
                near(sde.make_score(null, e, label, 0.0), one)
                near(sde.make_score(null, e, label, 2.0), 3 * one - 2 * free)

    def test_samplers_that_drop_samples_keep_their_labels(self):
        e, label = self.sdes["vp"], torch.arange(60) % 3
        x = torch.randn(60, 2, 1, 1)
        score = sde.make_score(self.mixture_eps, e, label)
        for name in ("ode", "adaptive", "heun"):
            drawn = self.drawn(name, e, score, x).flatten(1)
            for k in range(3):
                self.near(drawn[label == k].mean(0), self.modes[k], 4 * self.width / math.sqrt(20))
            self.near((drawn - self.modes[label]).std() / self.width, 1, 0.25)

    def test_frames(self):
        for e in self.sdes.values():
            frames, t, x = [], torch.tensor(0.3 * e.T), torch.randn(10, 1, 2, 2)
            score, (a, s) = sde.make_score(self.exact(), e, frames=frames), e.kernel(t)
            D = sde.tweedie(score, e, x, t)
            self.near(frames[0].view(8, 2, 1, 2, 2)[:, 0], x[:8] / (a ** 2 + s ** 2).sqrt(), 1e-5)
            self.near(frames[0].view(8, 2, 1, 2, 2)[:, 1], D[:8], 1e-3)
            for name in ("heun", "ode", "em"):
                frames.clear()
                self.drawn(name, e, sde.make_score(self.exact(), e, frames=frames), e.prior * x, 400)
                self.assertTrue(5 < len(frames) < 33, len(frames))

    def test_the_score_builds_a_graph_only_for_an_x_that_wants_one(self):
        net = nn.Conv2d(1, 1, 1)
        score = sde.make_score(lambda y, sigma, label: net(y), self.sdes["vp"])
        x, t = torch.randn(2, 1, 4, 4), torch.tensor(0.5)
        self.assertFalse(score(x, t).requires_grad)
        self.assertTrue(score(x.requires_grad_(), t).requires_grad)

    def test_denoisers_of_the_three_scripts_agree(self):
        y = torch.randn(6, 1, 2, 2)
        args = {"precond": "eps", "sigma_data": 1.0, "transform": "none", "train_classifier": False}
        own = lambda x, noise, label: (lambda sig: self.exact()(x * (sig ** 2 + 1).sqrt(), sig.flatten()))(noise.exp().view(-1, 1, 1, 1))
        half = lambda x, noise, label: gaussian((M + 1) / 2, S / 2)(x, noise)         # ncsn's images are in [0, 1]
        def eps(x, t, label):                                              # ddpm's, between two steps too
            table = ((1 - Diffusion.abar) / Diffusion.abar)[1:].log() / 2
            i = t.floor().long().clamp(1, 999)
            sigma = (table[i - 1] + (t - i) * (table[i] - table[i - 1])).exp().float()
            return self.exact()(x * (1 + sigma ** 2).sqrt().view(-1, 1, 1, 1), sigma)
        for script, net, a in (("sde", own, args), ("ncsn", half, {}), ("ddpm", eps, {"schedule": "linear", "T": 1000, "predict": "eps"})):
            predict = sde.noise_predictor({"script": script, "args": a}, net)
            for sigma in (0.02, 0.5, 20.0):
                sigma = torch.full((6,), sigma)
                self.near(predict(y, sigma), self.exact()(y, sigma), 3e-3)
        D = sde.denoiser({"args": args}, own)
        self.near(D(y, 0.5), (M * 0.25 + 0.25 * y) / 0.5, 1e-5)
        self.near(D(y, torch.full((6,), 0.5)), D(y, 0.5), 1e-6)

class SDERuns(Case):
    """sde.py from its command line, on tiny images."""
    def flags(self, *more):
        return [*self.tiny()[:10], "--sampler", "heun", "--sample-steps", 3, *more]

    def run_ok(self, *argv):
        code, text, err = self.command(sde, *argv)
        self.assertEqual((code, err), (0, ""), argv)
        return text

    def test_every_sde_trains_and_every_sampler_draws(self):
        for name in ("vp", "ve", "subvp", "edm"):
            out, calls = self.dir / name, []
            self.run_ok(*self.flags("--sde", name, "--out", out, "--npz", "--classes"))
            self.assertEqual(sorted(p.name for p in out.iterdir()), ["ckpt.pt", "log.csv", "loss.png", "process.gif",
                             "process.png", "samples.npz", "samples.png"])
            spies = {k: (lambda score, e, x, *rest, k=k: calls.append((k, type(e).__name__, *rest)) or sde.tweedie(score, e, x, torch.tensor(e.eps)))
                     for k in sde.SAMPLERS}
            with mock.patch.dict(sde.SAMPLERS, spies):
                for k in sde.SAMPLERS:
                    self.run_ok("--sample-only", "--out", out, "--sampler", k, "--sample-steps", 7, "--snr", 0.3, "--corrector-steps", 2,
                                "--churn", 5, *(["--tol", 0.125] if k in ("ode", "adaptive") else []))
            kind = {"vp": "VP", "ve": "VE", "subvp": "SubVP", "edm": "EDM"}[name]
            for k, found, *rest in calls:
                self.assertEqual(found, kind)
                if k == "heun":
                    self.assertEqual(rest, [7, 7, 5])
                elif k in ("ode", "adaptive"):
                    self.assertEqual(rest, [0.125])
                else:
                    e = sde.SDEs[name] if hasattr(sde, "SDEs") else SDEs.sdes[name]
                    self.near(rest[0], sde.times(e, 7, 7.0 if name == "edm" else None), 1e-9)
                    self.assertEqual(rest[1:], [0.3, 2] if k in ("langevin", "pc") else [])
            text = self.run_ok("--sample-only", "--out", out, "--sampler", "heun", "--sample-steps", 4, "--label", 3)
            self.assertIn("7 evaluations of the network", text)
            self.run_ok("--sample-only", "--out", out, "--sampler", "em", "--sample-steps", 3, "--guidance", 2)

    def test_training_gets_its_settings(self):
        seen, real = [], sde.loss
        spy = lambda net, y, e, *rest: seen.append((y, type(e), e.eps, rest)) or real(net, y, e, *rest)
        with mock.patch.object(sde, "loss", spy):
            self.run_ok(*self.flags("--weighting", "likelihood", "--precond", "edm", "--transform", "logit", "--out", self.dir / "a"))
            self.run_ok(*self.flags("--sde", "subvp", "--eps", 1e-4, "--out", self.dir / "b"))
        (y, kind, eps, rest), (z, kind_b, eps_b, rest_b) = seen[0], seen[-1]
        self.assertEqual((kind, eps, rest[1:]), (sde.VP, 1e-5, (0.1, "likelihood", "edm")))
        self.assertEqual((kind_b, eps_b, rest_b[1:]), (sde.SubVP, 1e-4, (0.1, "paper", "eps")))
        self.assertGreater(y.abs().max(), 1)                               # logits / 6
        self.assertTrue((z.abs() < 1).all())
        self.assertGreater(len((128 * (z + 1)).frac().unique()), 50)       # dequantised

    def test_classifier_guides_and_networks_of_the_other_scripts_are_drawn_from(self):
        data = self.flags()[:2]
        text = self.run_ok(*self.flags("--train-classifier", "--steps", 120, "--out", self.dir / "judge"))
        self.assertTrue((self.dir / "judge" / "samples_000100.png").exists())
        out = self.dir / "run"
        self.run_ok(*self.flags("--out", out))
        text = self.run_ok("--sample-only", "--out", out, *data, "--classifier", self.dir / "judge", "--label", 4, "--sampler", "em", "--sample-steps", 3)
        self.command(ncsn, *self.tiny(), "--out", self.dir / "ncsn")
        self.command(ddpm, *self.tiny()[:10], "--T", 30, "--out", self.dir / "ddpm")
        kinds, real = [], sde.heun
        for name, origin in (("ve", "ncsn"), ("vp", "ddpm"), ("vp", "run")):
            with mock.patch.dict(sde.SAMPLERS, heun=lambda score, e, x, *rest: kinds.append((type(e), sde.sigma_range(e))) or real(score, e, x, *rest)):
                self.run_ok("--from", self.dir / origin, *data, "--sampler", "heun", "--sample-steps", 3, "--out", self.dir / f"from-{origin}", "--samples", 9)
            self.assertTrue((self.dir / f"from-{origin}" / "samples.png").exists())
        self.near(kinds[0][1], [0.02, 2.0], 1e-3)                          # ncsn's 0.01 ... 1, for images in [-1, 1]
        self.assertEqual([k for k, _ in kinds], [sde.VE, sde.VP, sde.VP])
        text = self.run_ok("--from", self.dir / "ddpm", *data, "--strip", "samplers", "--sample-steps", 3, "--tol", 0.1, "--out", self.dir / "strip")
        self.assertEqual(re.findall(r"strip  (\w+) +(\d+)", text)[:5], [("em", "4"), ("reverse", "4"), ("ancestral", "4"), ("langevin", "4"), ("pc", "7")])
        with Image.open(self.dir / "strip" / "samplers.png") as im:
            self.near(im.size[0] / im.size[1], (2 + 10 * 10) / (2 + 8 * 10), 0.01)

    def test_bits_codes_and_strips(self):
        data, out = self.flags()[:2], self.dir / "run"
        self.run_ok(*self.flags("--out", out))
        text = self.run_ok("--sample-only", "--out", out, *data, "--evaluate-bits", 20, "--probes", 3, "--tol", 1e-3)
        rows = [list(map(float, r)) for r in csv.reader((out / "bits.csv").read_text().splitlines())]
        self.assertEqual((len(rows), len(rows[0])), (20, 3))
        mean = float(re.search(r"bits   ([\d.]+) \+- ([\d.]+) \(", text)[1])
        self.near(mean, np.mean(rows), 1e-3)
        self.assertTrue(8 < mean < 20, mean)                               # random bytes, a network of six steps: above 8
        text = self.run_ok("--sample-only", "--out", out, *data, "--encode", out, "--tol", 1e-3)
        r = [float(v) for v in re.findall(r"images: (-?[\d.]+) in the mean", text)]
        self.near(r[0], 1, 1e-3)                                           # one network with itself
        self.near(r[1], 0, 0.2)
        text = self.run_ok("--sample-only", "--out", out, *data, "--strip", "interpolate")
        self.assertLess(float(re.search(r"squared error ([\d.e-]+) of 255", text)[1]), 1)
        self.assertTrue((out / "interpolate.png").exists())
        self.assertFalse(common.load_checkpoint(out / "ckpt.pt")["args"].get("encode"))

    def test_drawing_gets_its_settings(self):
        out, judge, seen, real, drawn = self.dir / "run", self.dir / "judge", [], sde.make_score, []
        self.run_ok(*self.flags("--classes", "--out", out))
        self.run_ok(*self.flags("--train-classifier", "--out", judge))
        def make(eps, e, label=None, w=0.0, judge=None, frames=None):
            seen.append((e.eps, None if label is None else label.tolist(), w, judge is not None))
            return real(eps, e, label, w, judge, frames)
        em = lambda score, e, x, ts: drawn.append(x) or sde.tweedie(score, e, x, ts[-1])
        with mock.patch.object(sde, "make_score", make), mock.patch.dict(sde.SAMPLERS, em=em):
            for flags, w, judged, std in (([], 0, False, 1), (["--guidance", 2, "--temperature", 0.5], 2, False, 0.5),
                                          (["--classifier", judge], 1, True, 1),
                                          (["--classifier", judge, "--guidance", 3], 3, True, 1)):
                self.run_ok("--sample-only", "--out", out, "--sampler", "em", "--samples", 25, *flags)
                self.assertEqual(seen[-1], (1e-3, [k % 10 for k in range(25)], w, judged))     # labels in turn
                self.near(drawn[-1].std() / std, 1, 0.08)
            self.run_ok("--sample-only", "--out", out, *self.flags()[:2], "--evaluate-bits", 2, "--tol", 0.01)
            self.assertEqual(seen[-1], (1e-5, None, 0, False))             # a likelihood needs the smaller eps

    def test_strips_and_codes_are_what_they_say(self):
        lines, grids, x = [], [], torch.randint(0, 256, (4, 1, 2, 2)) / 127.5 - 1
        args = argparse.Namespace(transform="none", out=self.dir, encode=self.dir, strip="quality")
        run = argparse.Namespace(args=args, print=lines.append, low=-1.0, device="cpu")
        y = sde.to_data(x)[0]
        with mock.patch.object(sde, "rk45", lambda fun, x, t0, t1, tol: x if t1 > t0 else x + 0.01), \
                mock.patch.object(toy, "save_picture"), \
                mock.patch.object(toy, "grid", lambda rows, *rest: grids.append(rows)):
            sde.interpolate(run, None, sde.VP(), x, y, 1e-5)
        self.assertIn("error 1.27 of 255", lines[0])                       # 0.01 of a range of 2
        rows, back = grids[0].unflatten(0, (2, 11)), sde.from_data(y + 0.01)
        for k in range(2):                                                 # an image, nine on the way, the next image
            self.near(rows[k][[0, 1, 9, 10]], torch.stack([x[2 * k], *back[2 * k:2 * k + 2], x[2 * k + 1]]), 1e-5)
        codes, spans = [torch.randn(60, 1, 2, 2)], []
        codes.append(3 + 0.8 * codes[0] + 1.2 * torch.randn(60, 1, 2, 2))
        encode = lambda fun, x, t0, t1, tol: spans.append((t0, t1)) or codes[len(spans) - 1]
        with mock.patch.object(sde, "rk45", encode), mock.patch.object(common, "load_checkpoint"), \
                mock.patch.object(sde, "averaged"), mock.patch.object(sde, "noise_predictor"):
            sde.report_codes(run, None, sde.VP(), x, 1e-5)
        self.assertEqual(spans, [(1e-3, 1.0)] * 2)                         # to the code
        a, b = (v.flatten(1).T for v in codes)
        r = lambda b: torch.stack([torch.stack([u, v]).corrcoef()[0, 1] for u, v in zip(a, b)])
        found = [[float(v) for v in re.findall(r"-?\d\.\d+", line)] for line in lines[1:]]
        self.near(found, [[r(v).mean(), r(v).std()] for v in (b, b.roll(1, 1))], 6e-4)
        (self.dir / "quality.csv").write_text("sampler,evaluations,ratio,images\nem,51,40,5000\nem,101,5,500\nheun,35,6.5,500\nem,51,7,500\n")
        with mock.patch.object(toy, "plot") as plot:
            sde.compare(run, None)
        curves = plot.call_args.args[1]
        self.assertEqual((curves["em"], curves["heun"], curves["pc"]), ([(51, 7), (101, 5)], [(35, 6.5)], []))

    def test_what_is_drawn_goes_back_to_grey_levels_and_is_judged(self):
        out, calls, y = self.dir / "run", [], 0.3 * torch.randn(20, 1, 8, 8)
        self.run_ok(*self.flags("--classes", "--transform", "logit", "--out", out))
        seen = torch.eye(10)[torch.tensor([k % 10 if k < 15 else 3 for k in range(20)])]       # 15 of 20 are right
        with mock.patch.dict(sde.SAMPLERS, heun=lambda score, e, x, *rest: calls.append(rest) or y), \
                mock.patch.object(common, "classifier", return_value=(None, 1.0)), \
                mock.patch.object(common, "features", return_value=(None, seen)), \
                mock.patch.object(common, "evaluate", return_value={}):
            text = self.run_ok("--sample-only", "--out", out, "--rho", 5, "--npz", "--samples", 20, "--evaluate", 20)
        self.assertEqual(calls, [(3, 5, 0)])
        self.assertIn("label  75.0 % are", text)
        with np.load(out / "samples.npz") as f:
            self.near(torch.tensor(f["arr_0"][..., 0]), toy.to_uint8(sde.from_data(y, "logit"), -1.0)[:, 0], 0)

    def test_a_classifier_learns_from_the_noise_that_it_is_told(self):
        seen, real = [], sde.eps_theta
        with mock.patch.object(sde, "eps_theta", lambda net, y, sigma: seen.append((y, sigma)) or real(net, y, sigma)):
            self.run_ok(*self.flags("--train-classifier", "--steps", 20, "--out", self.dir / "judge"))
        y, sigma = (torch.cat(v) for v in zip(*seen))
        self.assertEqual(len(sigma.unique()), 160)                         # of each image another t
        self.near((y.flatten(1).std(1) / sigma)[sigma > 5].mean(), 1, 0.05)

    def test_killed_or_interrupted_and_resumed_is_never_stopped(self):
        flags = self.flags("--dropout", 0.1, "--samples", 1, "--steps", 40)
        self.run_ok(*flags, "--out", self.dir / "whole")
        real, steps = sde.loss, []
        def stops(*a, **k):
            steps.append(1)
            if len(steps) == 25:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*a, **k)
        with mock.patch.object(sde, "loss", stops):
            self.assertEqual(self.command(sde, *flags, "--out", self.dir / "parts")[0], 130)
        self.assertEqual(self.command(sde, "--resume", "--out", self.dir / "parts", *flags[:2])[0], 0)
        self.same(self.dir / "parts", self.dir / "whole")

    def test_bad_flags_are_one_sentence(self):
        out = self.dir / "run"
        self.command(sde, *self.flags("--out", out))
        for flags, words in ((["--label", 1], "--label 1"), (["--guidance", 1], "--guidance"), (["--sde", "ve"], "--sde is vp"),
                             (["--classifier", out], "no classifier"), (["--from", out], "--from"), (["--tol", 0], "--tol 0"),
                             (["--transform", "logit"], "--transform is none"), (["--encode", self.dir / "no"], "no checkpoint"),
                             (["--strip", "quality"], "quality.csv"), (["--evaluate-bits", 5, "--strip", "samplers"], "one at a time")):
            code, _, err = self.command(sde, "--sample-only", "--out", out, *self.flags()[:2], *flags)
            self.assertEqual((code, err.count("\n")), (2, 1), (flags, err))
            self.assertIn(words, err)

class Control(Case):
    """inpaint.py, with exact denoisers, on images of 1 x 2 x 4."""
    m, s = 0.4, 0.3                                                        # of the data, in [-1, 1]
    right = inpaint.masked(inpaint.draw_mask("right", 2, 4))
    sigma = inpaint.levels("repaint", 0.02, 20.0, 40)

    def kinds(self):
        """{kind: (checkpoint, the exact net of data N(m, s^2) in [-1, 1], its range of sigma there)}."""
        abar = ddpm.schedule("linear", 1000)
        table = ((1 - abar) / abar)[1:].log() / 2
        def eps(x, t, label):                                              # between two steps too
            i = t.floor().long().clamp(1, 999)
            sigma = (table[i - 1] + (t - i) * (table[i] - table[i - 1])).exp()
            a = (1 / (1 + sigma ** 2)).float().view(-1, 1, 1, 1)
            return (1 - a).sqrt() * (x - a.sqrt() * self.m) / (a * self.s ** 2 + 1 - a)
        return {"ncsn": ({"script": "ncsn", "args": {"sigma_min": 0.05, "sigma_max": 5.0}},
                         gaussian((self.m + 1) / 2, self.s / 2), (0.1, 10.0)),
                "ddpm": ({"script": "ddpm", "args": {"schedule": "linear", "T": 1000, "predict": "eps"}}, eps,
                         (table[0].exp().item(), table[-1].exp().item())),
                "sde": ({"script": "sde", "args": {"sde": "ve", "sigma_min": 0.02, "sigma_max": 50.0, "eps": None, "precond": "eps",
                         "sigma_data": 1.0}}, lambda x, noise, label: (lambda v: v.sqrt() * (x * (1 + v).sqrt() - self.m) / (
                         self.s ** 2 + v))((2 * noise).exp().view(-1, 1, 1, 1)), (0.02, 50.0))}

    def test_all_kinds_of_runs_are_one_denoiser_for_images_in_minus_one_to_one(self):
        y = torch.randn(4, 1, 2, 2)
        for kind, (ckpt, net, span) in self.kinds().items():
            D, found = inpaint.view(ckpt, net)
            self.near(torch.tensor(found) / torch.tensor(span), 1, 1e-3)
            for sigma in (0.1, 1.0, torch.tensor([0.2, 0.7, 3.0, 9.0])):
                v = torch.as_tensor(sigma).view(-1, 1, 1, 1) ** 2
                self.near(D(y, sigma), (self.s ** 2 * y + v * self.m) / (self.s ** 2 + v), 3e-3)

    def test_masks(self):
        m = lambda name, **o: inpaint.draw_mask(name, 8, 12, **o)[0, 0]
        rows, columns = torch.arange(8)[:, None].expand(8, 12), torch.arange(12).expand(8, 12)
        for name, known in (("left", columns >= 6), ("right", columns < 6), ("top", rows >= 4), ("bottom", rows < 4),
                            ("center", ~((rows >= 2) & (rows < 6) & (columns >= 3) & (columns < 9))),
                            ("band", (columns < 4) | (columns >= 8))):
            self.near(m(name), known.float(), 0)
        boxes = [m("box", seed=k) for k in range(200)]
        self.assertTrue(all((1 - b).sum() == 24 and (1 - b).amax(1).sum() == 4 and (1 - b).amax(0).sum() == 6 for b in boxes))
        where = {tuple((1 - b).nonzero()[0].tolist()) for b in boxes}
        self.assertEqual(where, set(itertools.product(range(5), range(7))))            # everywhere
        self.near(boxes[3], m("box", seed=3), 0)
        self.near(inpaint.draw_mask("random", 100, 100, 0.3).mean(), 0.3, 0.02)
        drawn = torch.rand(8, 12) < 0.5
        Image.fromarray((drawn * 255).byte().numpy()).save(self.dir / "m.png")
        self.near(m(self.dir / "m.png"), drawn.float(), 0)
        for name, size, value, words in (("small.png", (12, 7), 0, "is 12 x 7, the images are 12 x 8"),
                                         ("white.png", (12, 8), 255, "hides nothing"), ("black.png", (12, 8), 0, "leaves nothing")):
            Image.new("L", size, value).save(self.dir / name)
            self.refuses(words, m, self.dir / name)
        self.refuses("cannot read the picture", m, self.dir / "none.png")

    def test_operators_are_what_they_say_and_their_pseudo_inverses_project(self):
        for op, shape, rank in ((inpaint.masked(inpaint.draw_mask("left", 4, 6)), (1, 4, 6), 12), (inpaint.block_means(2), (1, 4, 6), 6),
                                (inpaint.grey(3), (3, 4, 6), 24), (inpaint.blurred(4, 6, 0.8), (1, 4, 6), None)):
            n = math.prod(shape)
            x = torch.randn(n, *shape)
            P = op.pinv(op.A(torch.eye(n).view(n, *shape))).flatten(1)
            self.near(P, P.T, 1e-5)
            self.near(P @ P, P, 1e-5)
            self.near(op.A(op.pinv(op.A(x))), op.A(x), 1e-5 if rank else 0.15)         # of blur: but for what is damped
            self.near(P.trace(), rank or P.trace().round(), 1e-3)
        x = torch.randn(2, 3, 4, 8)
        self.near(inpaint.block_means(4).A(x)[1, 2, 0, 1], x[1, 2, :, 4:].mean(), 1e-6)
        self.near(inpaint.grey(3).A(x)[1, 0, 2, 3], x[1, :, 2, 3].mean(), 1e-6)
        point = torch.zeros(1, 1, 32, 48)
        point[..., 16, 24] = 1
        b, rows, columns = inpaint.blurred(32, 48, 1.5).A(point)[0, 0], torch.arange(32) - 16.0, torch.arange(48) - 24.0
        self.near(b.sum(), 1, 1e-5)
        self.near((b.sum(1) * rows ** 2).sum(), 1.5 ** 2, 1e-3)
        self.near((b.sum(0) * columns ** 2).sum(), 1.5 ** 2, 1e-3)
        wave = lambda k: torch.cos(2 * math.pi * k * torch.arange(48) / 48).expand(1, 1, 32, 48)
        op = inpaint.blurred(32, 48, 1.5)
        self.near(op.pinv(op.A(wave(10))), wave(10), 1e-4)                 # damped to 0.15: known
        self.near(op.pinv(op.A(wave(13))), 0, 1e-4)                        # to 0.04: not

    def test_what_is_known_is_put_in_with_the_noise_of_the_level(self):
        x, x0 = torch.randn(50_000, 1, 2, 4), torch.randn(1, 1, 2, 4)
        for op in (self.right, inpaint.block_means(2)):
            P = lambda v: op.pinv(op.A(v))
            y = inpaint.impute(x, op, op.A(x0), 0.7)
            self.near(y - P(y), x - P(x), 1e-5)                            # the unknown part as it was
            self.near(P(y).mean(0), P(x0)[0], 0.02)
            self.near(P(y).var(0), 0.49 * P(torch.eye(8).view(8, 1, 2, 4)).flatten(1).diag().view(1, 2, 4), 0.02)
            self.near(P(inpaint.impute(x, op, op.A(x0), 0.0)), P(x0).expand_as(x), 1e-5)
        noisy = self.right._replace(noise=0.4)
        self.near((inpaint.impute(x, noisy, noisy.A(x0), 0.5) - noisy.A(x0))[..., :2].var(), 0.25 - 0.16, 0.002)
        self.near(inpaint.impute(x, noisy, noisy.A(x0), 0.39), x, 0)

    def test_a_step_is_bayes_rule(self):
        x0, x_t, t, s = -0.3, 1.1, 0.9, 0.5
        x = inpaint.step(torch.full((200_000,), x_t), x0, t, s)
        precision = 1 / s ** 2 + 1 / (t ** 2 - s ** 2)                     # x_s = x_0 + s z, x_t = x_s + sqrt(t^2 - s^2) z
        self.near(x.mean(), (x0 / s ** 2 + x_t / (t ** 2 - s ** 2)) / precision, 0.005)
        self.near(x.var() * precision, 1, 0.01)
        self.near(inpaint.step(torch.randn(9), torch.arange(9.0), 0.5, 0.0), torch.arange(9.0), 1e-6)
        x = inpaint.langevin(lambda x, sigma: x + 0.3, torch.full((200_000,), x_t), 0.5, 0.08)
        self.near(x.mean(), x_t + 0.04 * 0.3 / 0.25, 0.005)                # x + alpha / 2 score
        self.near(x.var(), 0.08, 0.001)

    def test_exact_denoiser_and_conditional(self):
        for means, covs, weights in inpaint.examples().values():
            parts = lambda add: [torch.distributions.MultivariateNormal(m, C + add) for m, C in zip(means, covs)]
            x = torch.randn(5, 8, requires_grad=True)
            log_p = torch.stack([w.log() + p.log_prob(x) for w, p in zip(weights, parts(0.49 * torch.eye(8)))]).logsumexp(0)
            score, = torch.autograd.grad(log_p.sum(), x)
            self.near(inpaint.mixture(means, covs, weights)(x.view(5, 1, 2, 4), 0.7).flatten(1), x + 0.49 * score, 1e-4)
            A, b = torch.randn(2, 8), torch.tensor([0.4, -0.2])
            k = weights.multinomial(400_000, replacement=True)
            x = means[k] + (torch.linalg.cholesky(covs)[k] @ torch.randn(400_000, 8, 1))[..., 0]
            w = (-(b - x @ A.T).square().sum(1) / 2 / 0.6 ** 2).softmax(0)                     # importance of each draw
            mean, cov = inpaint.conditional(means, covs, weights, A, b, 0.6)
            self.near(mean, w @ x, 0.02)
            self.near(cov, (x - mean).T @ (w[:, None] * (x - mean)), 0.03)

    def test_methods_against_the_exact_conditional(self):
        found = {}
        for name, data in inpaint.examples().items():
            for method, N, options in (("ilvr", 40, {}), ("replace", 150, {}), ("replace", 43, {"T": 6}), ("repaint", 40, {}),
                                       ("repaint", 40, {"jump": 10}), ("dps", 100, {"zeta": 0.25}), ("ald", 30, {}), ("ald", 30, {"T": 100})):
                sigma, n = inpaint.levels(method, 0.02, 10.0 if method == "ald" else 20.0, N), 2000 if options == {"T": 100} else 4000
                found[name, method, *options] = inpaint.errors(data, self.right, method, sigma, n, **options)
        for name in inpaint.examples():                                    # with 274 evaluations against 299 and 295
            mean, cov, n = found[name, "repaint"]
            for other in (found[name, "replace"], found[name, "replace", "T"]):
                self.assertLess(n, other[2])
                self.assertLess(mean, 0.5 * other[0])
                self.assertLess(cov, 1.1 * other[1])
            self.assertLess(cov, 0.55)
            self.assertLess(found[name, "ald"][0], found[name, "replace"][0])
            self.assertLess(found[name, "dps", "zeta"][0], 0.15)
            self.assertLess(found[name, "repaint", "jump"][0], found[name, "ilvr"][0])
        for name, mean, cov in (("gaussian", 0.05, 0.09), ("two modes", 0.08, 0.3)):           # ald: exact in the limit
            self.assertLess(found[name, "ald", "T"][0], mean)
            self.assertLess(found[name, "ald", "T"][1], cov)
        for name in ("gaussian", "two modes"):                             # replacement stays biased
            self.assertGreater(found[name, "replace"][0], 0.3)

    def test_methods_for_other_operators(self):
        data = inpaint.examples()["gaussian"]
        sigma = inpaint.levels("repaint", 0.02, 20.0, 100)
        for op in (inpaint.block_means(2), inpaint.blurred(2, 4, 1.0)):
            self.assertLess(inpaint.errors(data, op, "repaint", sigma, U=5)[0], 0.15)
            self.assertLess(inpaint.errors(data, op, "ald", inpaint.levels("ald", 0.02, 10.0, 30), T=40)[0], 0.1)
        noisy = inpaint.masked(torch.ones(1, 1, 2, 4), 0.5)                # denoising: drawn exactly, from sigma = noise
        sigma = [0.5 * 0.95 ** k for k in range(150)] + [0.0]
        for method, options in (("replace", {}), ("repaint", {}), ("ilvr", {})):
            mean, cov, n = inpaint.errors(data, noisy, method, sigma, **options)
            self.assertLess(mean, 0.04)
            self.assertLess(cov, 0.12)
            self.assertEqual(n, 150)                                       # below the noise: no corrector, no way back

    def point(self, x, sigma):
        return self.x0 + 0 * x

    def test_no_noise_is_left_and_what_is_given_is_kept(self):
        self.x0 = torch.randn(1, 1, 2, 4)
        for method, op in itertools.product(inpaint.METHODS, (self.right, inpaint.block_means(2), inpaint.blurred(2, 4, 0.4))):
            sigma = inpaint.levels(method, 0.02, 20.0, 10)
            x = inpaint.METHODS[method](self.point, op.A(self.x0).expand(9, -1, -1, -1), op, 20 * torch.randn(9, 1, 2, 4), sigma)
            self.near(x, self.x0.expand_as(x), 1e-5)                       # a point mass
            other = self.x0 + torch.randn(1, 1, 2, 4)
            x = inpaint.METHODS[method](self.point, op.A(other).expand(9, -1, -1, -1), op, 20 * torch.randn(9, 1, 2, 4), sigma)
            if method == "ilvr" and op.A(x).shape == x.shape and op is not self.right:
                self.near(x, self.x0 + op.A(other - self.x0), 1e-4)        # phi is the blur: near b only
                continue
            self.near(op.pinv(op.A(x)), op.pinv(op.A(other)).expand_as(x), 1e-4)

    def seen(self, method, sigma, **options):
        """What the method hands to D: [(sigma, x), ...], of data that is one point."""
        calls, self.x0 = [], torch.randn(1, 1, 2, 4)
        D = lambda x, s: calls.append((s, x.detach())) or self.point(x, s)
        b = self.right.A(self.x0).expand(20_000, -1, -1, -1)
        inpaint.METHODS[method](D, b, self.right, sigma[0] * torch.randn(20_000, 1, 2, 4), sigma, **options)
        return [s for s, _ in calls], [(x - self.x0) for _, x in calls]

    def test_the_order_of_levels_is_that_of_the_papers(self):
        for method, sigma, options, order in (
                ("ald", [4.0, 2.0, 1.0], {"T": 2}, [4, 4, 2, 2, 1, 1, 1]), ("replace", [4.0, 2.0, 1.0, 0.0], {"T": 2}, [4, 2, 2, 2, 1, 1, 1]),
                ("replace", [4.0, 2.0, 1.0, 0.0], {"T": 0}, [4, 2, 1]), ("repaint", [4.0, 2.0, 1.0, 0.0], {"U": 3}, [4, 4, 4, 2, 2, 2, 1]),
                ("repaint", [8.0, 4.0, 2.0, 1.0, 0.0], {"U": 2, "jump": 2}, [8, 4, 8, 4, 2, 1]),
                ("ilvr", [4.0, 2.0, 1.0, 0.0], {}, [4, 2, 1]), ("dps", [4.0, 2.0, 1.0, 0.0], {}, [4, 2, 1])):
            self.assertEqual(self.seen(method, sigma, **options)[0], order, method)

    def test_every_level_sees_its_own_noise(self):
        sigma = [4.0, 2.0, 1.0, 0.5]
        for method, options in (("replace", {"T": 1}), ("repaint", {"U": 3}), ("repaint", {"U": 2, "jump": 2}), ("ilvr", {})):
            levels, x = self.seen(method, [*sigma, 0.0], **options)
            for s, x_s in zip(levels, x):                                  # x - x_0 = sigma z on a point mass
                wide = 1.06 if method == "replace" else 1.02               # the corrector inflates by 1 / (1 - r / 2)
                known, other = x_s[..., :2] - x_s[..., :2].mean(0), x_s[..., 2:] - x_s[..., 2:].mean(0)
                for part in (known, other):
                    self.assertTrue(0.98 < part.std() / s < wide, (method, s, part.std()))
                self.assertLess(abs((known * other).mean()) / s ** 2, 0.03)
        levels, x = self.seen("ald", sigma, T=3, eps=0.1)
        for k in range(1, 13):                                             # Algorithm 2: one y~ for a level
            self.assertEqual(k % 3 != 1, (x[k] - x[k - 1])[..., :2].abs().max().item() < 1e-4)
            self.near(x[k][..., :2].std() / sigma[(k - 1) // 3], 1, 0.02)
        r = 0.2 * sigma[2] ** 2 / 0.5 ** 2 / sigma[2] ** 2                 # eps / (2 sigma_L^2)
        before, after = x[7][..., 2:].var(), x[8][..., 2:].var()           # inside the level of sigma = 1
        self.near(after, (1 - r / 4) ** 2 * before + 2 * r / 4 * sigma[2] ** 2, 0.02)

    def test_dps_step(self):
        x, b = torch.randn(6, 1, 2, 4), self.right.A(torch.randn(6, 1, 2, 4))
        noisy = self.right._replace(noise=0.1)                             # so that nothing is put in, in the end
        found = inpaint.dps(lambda x, s: 0.7 * x, b, noisy, x, [3.0, 0.0], zeta=0.2)
        r = self.right.A(0.7 * x) - b
        grad = 0.7 * r / r.flatten(1).norm(dim=1).view(-1, 1, 1, 1)        # of || b - A D(x) || by x
        self.near(found, 0.7 * x - 0.2 * math.sqrt(10) * grad, 1e-5)       # by x_t = x / sqrt(10)
        self.near(inpaint.dps(lambda x, s: 0.7 * x, b, self.right, x, [3.0, 0.0], zeta=0.2)[..., :2], b[..., :2], 1e-6)
        torch.manual_seed(0)
        found = inpaint.dps(lambda x, s: 0.7 * x, b, noisy, x, [3.0, 1.5], zeta=0.2)
        torch.manual_seed(0)
        self.near(found, inpaint.step(x, 0.7 * x, 3.0, 1.5) - 0.2 * math.sqrt(10 * 3.25) * grad, 1e-5)

    def test_methods_leave_nothing_on_the_cpu(self):
        op = inpaint.masked(torch.ones(1, 1, 2, 4, device="meta"))
        x = torch.ones(3, 1, 2, 4, device="meta")
        for name, method in inpaint.METHODS.items():
            self.assertEqual(method(lambda x, s: 0.5 * x, op.A(x), op, x, [2.0, 1.0, 0.5] + [0.0] * (name != "ald")).device.type, "meta")

    def test_a_denoised_image_is_no_brighter_than_white(self):
        frames, x0 = [], torch.zeros(2, 1, 2, 4)
        given, x, calls = inpaint.complete(lambda x, s: 3 + 0 * x, x0, self.right, "repaint", self.sigma, 5, frames)
        self.assertEqual((x.shape, calls), ((2, 5, 1, 2, 4), 274))
        self.near(x[..., :2], 0, 1e-6)                                     # given
        self.near(x[..., 2:], 1, 1e-6)                                     # D = 3 is none of an image in [-1, 1]
        self.assertEqual(len(frames), 28)
        self.near(torch.stack([f[1::2] for f in frames]), 1, 0)            # E[x_0 | x] beside each x

    def test_measures(self):
        x0 = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
        x = x0[:, None].repeat(1, 4, 1, 1, 1)
        hidden = torch.zeros(1, 1, 4, 4)
        hidden[..., :2] = 1
        x[0, 0] += 10                                                      # all pixels
        x[0, 1, ..., :2] += 20                                             # the hidden half
        x[0, 2, ..., :2] -= 20
        x[0, 3] -= 10
        judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        judge[-1].weight.data[:] = torch.tensor([-1.0, 0.0, 1.0])[:, None]
        judge[-1].bias.data[:] = torch.tensor([16 * 100 / 255, 0.01, -16 * 100 / 255])
        one, two = inpaint.measure(x0, x, hidden, torch.tensor([2, 1]), judge)
        self.near(one["psnr_best"], 20 * math.log10(255 / 10), 1e-3)
        self.near(one["psnr_mean"], 100, 1e-6)
        self.near(one["std"], math.sqrt(2 * (100 + 400) / 3) / 255, 1e-5)
        self.assertEqual((one["right"], one["labels"]), (0.5, "2 2 0 0"))
        self.assertEqual((two["right"], two["labels"], two["std"]), (1.0, "1 1 1 1", 0.0))

    def test_tint_hides_the_hue_from_the_grey(self):
        images = torch.full((3000, 1, 1, 2), 200, dtype=torch.uint8)
        images[..., 1] = 0
        c = inpaint.tint(images)
        self.near(c[..., 0].float().mean(1), 100, 0.7)
        self.near(c[..., 1], 0, 0)
        for k in range(3):                                                 # 200 (0.5 + 0.35 cos)
            v = c[:, k, 0, 0].float() / 200
            self.near([v.mean(), v.std(), v.min(), v.max()], [0.5, 0.35 / math.sqrt(2), 0.15, 0.85], 0.02)
        self.assertGreater(len(c[..., 0].unique(dim=0)), 500)

class ControlRuns(Case):
    def runs(self):
        """A run of each kind, of a few steps on 8 x 8 images: {kind: folder}."""
        flags, more = self.tiny(), {"ncsn": 0, "ddpm": 8}
        for module in (ncsn, ddpm):
            own = flags if module is ncsn else [*flags[:10], "--T", 30]
            self.assertEqual(self.command(module, *own, "--out", self.dir / module.__name__)[0], 0)
        return {name: self.dir / name for name in more}

    def test_command_line_end_to_end(self):
        for kind, run in self.runs().items():
            data = ["--data-dir", self.dir / "data", "--samples", 3, "--index", 2, "--completions", 4, "--npz", "--sample-steps", 3]
            for flags, name in ((["--mask", "left"], "inpaint-left-repaint"), (["--mask", "box", "--method", "ald", "--T", 2], "inpaint-box-ald"),
                                (["--mask", "band", "--method", "dps"], "inpaint-band-dps"),
                                (["--task", "super", "--method", "ilvr"], "super-4x-ilvr"), (["--task", "deblur"], "deblur-1.5-repaint"),
                                (["--task", "denoise", "--noise", 0.8], "denoise-0.8-replace")):
                code, text, err = self.command(inpaint, run, *data, *flags)
                self.assertEqual((code, err), (0, ""))
                self.assertIn(f"run    {run}: {kind}, digits, 1 x 8 x 8", text)
                self.assertIn("method " + name.split("-")[-1], text)
                for suffix in ("png", "gif", "csv", "npz"):
                    self.assertTrue((run / "inpaint" / f"{name}.{suffix}").exists())
                with np.load(run / "inpaint" / f"{name}.npz") as f:
                    x, truth = torch.tensor(f["completions"]), torch.tensor(f["truth"])
                self.assertEqual(x.shape, (3, 4, 8, 8, 1))
                images, labels = toy.load_images("digits", self.dir / "data", "test")
                self.near(truth, images[2:5].permute(0, 2, 3, 1), 0)
                rows = list(csv.DictReader((run / "inpaint" / f"{name}.csv").read_text().splitlines()))
                self.assertEqual([(row["image"], row["label"]) for row in rows], [(str(k), str(k)) for k in (2, 3, 4)])
                if "inpaint" in name:
                    mask = inpaint.draw_mask(name.split("-")[1], 8, 8)[0, 0, :, :, None].bool()
                    same = (x == truth[:, None]) | ~mask
                    self.assertTrue(same.all(), name)                      # bit for bit
                    self.assertGreater((x.float().std(1) * ~mask).sum(), 100)                  # and the rest is new
                with Image.open(run / "inpaint" / f"{name}.png") as im:
                    self.near(im.size[0] / im.size[1], (2 + 6 * 10) / (2 + 3 * 10), 0.01)      # truth, given, four
            before = (run / "inpaint" / "inpaint-left-repaint.npz").read_bytes()
            self.command(inpaint, run, *data)
            self.assertEqual((run / "inpaint" / "inpaint-left-repaint.npz").read_bytes(), before)      # the same seed
            self.command(inpaint, run, *data, "--seed", 1)
            self.assertNotEqual((run / "inpaint" / "inpaint-left-repaint.npz").read_bytes(), before)

    def test_every_flag_reaches_what_it_is_for(self):
        runs, x0 = self.runs(), toy.load_images("digits", self.dir / "data", "test")[0][1:4] / 127.5 - 1
        seen, drawn, shown = [], [], []
        def spy(name):
            def method(D, b, op, x, sigma, **more):
                seen.append((name, more, sigma, op, b, x))
                drawn.append(0.1 * D(x, 1.0))
                return drawn[-1]
            return method
        def call(*flags, run="ddpm"):
            seen.clear(), drawn.clear()
            with mock.patch.dict(inpaint.METHODS, {name: spy(name) for name in inpaint.METHODS}), \
                    mock.patch.object(toy, "save_process", lambda frames, *rest: shown.append(frames[-1])):
                code, _, err = self.command(inpaint, runs[run], "--data-dir", self.dir / "data", "--samples", 3,
                                            "--index", 1, "--completions", 40, *flags)
            self.assertEqual((code, err), (0, ""), flags)
            self.assertEqual([len(call[4]) for call in seen], [80, 40])    # a hundred completions at once at most
            self.near(shown[-1][::2], torch.cat(drawn)[::40], 0.005)       # the film ends with what was drawn
            return seen[0]
        for flags, name, options, N, sigma in (
                (["ald"], "ald", {"T": 10, "eps": None}, 30, 10),
                (["ald", "--T", 3, "--eps", 0.02], "ald", {"T": 3, "eps": 0.02}, 30, 10),
                (["replace"], "replace", {"T": 1, "snr": 0.16}, 141, 20), (["ilvr"], "ilvr", {}, 251, 20),
                (["replace", "--T", 0, "--snr", 0.3], "replace", {"T": 0, "snr": 0.3}, 141, 20),
                (["auto", "--U", 2, "--jump", 3, "--sigma-max", 5], "repaint", {"U": 2, "jump": 3}, 41, 5),
                (["dps", "--zeta", 0.4, "--sample-steps", 7], "dps", {"zeta": 0.4}, 8, 20)):
            found = call("--method", *flags)
            self.assertEqual((*found[:2], len(found[2])), (name, options, N))
            self.near(found[2][0], sigma, 1e-6)
        self.near(call(run="ncsn")[2][0], 2, 1e-6)                         # no more noise than the run knows
        self.near(call("--mask", "random", "--keep", 0.6, "--seed", 5)[3].A(torch.ones(8, 8)),
                  inpaint.draw_mask("random", 8, 8, 0.6, 5), 0)
        for flags, op in ((["super", "--factor", 2], inpaint.block_means(2)),
                          (["deblur", "--blur", 0.7], inpaint.blurred(8, 8, 0.7))):
            self.near(call("--task", *flags)[4], op.A(x0)[:2].repeat_interleave(40, 0), 1e-5)
        name, _, sigma, op, b, x = call("--task", "denoise", "--noise", 0.8)
        self.assertEqual((name, op.noise, sigma[0], sigma[-1]), ("replace", 0.8, 0.8, 0))
        self.assertLess(sigma[1], 0.8)
        b, x = b.unflatten(0, (2, 40)), x.unflatten(0, (2, 40))
        self.near(b, b[:, :1].expand_as(b), 0)                             # of one picture the same is given
        self.near((b[:, 0] - x0[:2]).std() / 0.8, 1, 0.2)                  # with noise, where its completions begin
        self.near(x, b, 1e-6)
        with mock.patch.object(common, "has_bf16", lambda device: True):
            for precision in ("auto", "fp32"):
                ckpt = common.load_checkpoint(runs["ddpm"] / "ckpt.pt")
                ckpt["args"]["precision"] = precision
                self.assertEqual(inpaint.load(ckpt, "cpu").bf16, precision == "auto")

    def test_own_pictures_and_colours(self):
        out = self.dir / "tinted"
        images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8)
        for k, image in enumerate(inpaint.tint(images)):
            toy.save_picture(Image.fromarray(image.permute(1, 2, 0).numpy()), self.dir / "pictures" / f"{k}.png")
        flags = ["--dataset", self.dir / "pictures", *self.tiny()[:10], "--T", 30, "--out", out]
        self.assertEqual(self.command(ddpm, *flags)[0], 0)
        only = ["--sample-steps", 3, "--completions", 2, "--npz"]
        code, text, err = self.command(inpaint, out, "--task", "colorize", "--samples", 2, *only)
        self.assertEqual((code, err), (0, ""))
        Image.effect_noise((20, 16), 90).save(self.dir / "grey.png")
        code, text, err = self.command(inpaint, out, "--image", self.dir / "grey.png", self.dir / "pictures" / "3.png", "--size", 8, *only)
        self.assertEqual((code, err), (0, ""))
        with np.load(out / "inpaint" / "inpaint-left-repaint.npz") as f:
            fit = np.asarray(toy.read_picture(self.dir / "grey.png", 8).convert("RGB"))
            self.assertTrue((f["truth"][0] == fit).all() and (f["completions"][:, :, :, 4:] == f["truth"][:, None, :, 4:]).all())
        found, _ = inpaint.test_images(argparse.Namespace(image=[self.dir / "grey.png"], size=None),
                                       argparse.Namespace(shape=[3, 8, 8], size=8))
        self.near(found[0].permute(1, 2, 0), np.array(fit), 0)             # of the size that the run was trained with
        code, _, err = self.command(inpaint, out, "--image", self.dir / "grey.png")
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("grey.png is 20 x 16, the run's images are 8 x 8: give --size", err)

    def test_mistakes_are_one_sentence(self):
        run, data = self.runs()["ddpm"], ["--data-dir", self.dir / "data"]
        Image.new("L", (9, 8), 255).save(self.dir / "wide.png")
        Image.new("L", (8, 8), 255).save(self.dir / "white.png")
        Image.new("L", (8, 8), 0).save(self.dir / "black.png")
        Image.effect_noise((8, 8), 90).convert("RGB").save(self.dir / "colour.png")
        (self.dir / "text.png").write_text("no picture")
        ckpt = common.load_checkpoint(run / "ckpt.pt")
        for name, change in (("other", {"script": "gan"}), ("old", {"ema": {}})):
            common.save(ckpt | change, self.dir / name / "ckpt.pt")
        for argv, words in (([], "name the folder of a run"), ([self.dir / "none"], "there is no"), ([self.dir / "other"], "made by gan.py"),
                            ([self.dir / "old"], "of another network"), ([run, "--mask", self.dir / "wide.png"], "wide.png is 9 x 8"),
                            ([run, "--mask", self.dir / "white.png"], "hides nothing"), ([run, "--mask", self.dir / "black.png"], "leaves nothing"),
                            ([run, "--mask", "circle"], "cannot read the picture circle"), ([run, "--mask", self.dir / "text.png"], "cannot read"),
                            ([run, "--image", self.dir / "wide.png"], "wide.png is 9 x 8"), ([run, "--image", self.dir / "colour.png"], "is in colour"),
                            ([run, "--image", self.dir / "none.png"], "none.png"), ([run, "--task", "colorize"], "--task colorize"),
                            ([run, "--task", "super", "--factor", 3], "--factor 3"), ([run, "--task", "denoise", "--method", "ald"], "--method ald"),
                            ([run, "--task", "denoise", "--noise", 1e3], "--noise 1000"), ([run, "--index", 64], "--index 64"),
                            ([run, "--mask", "random", "--keep", 1.5], "--keep 1.5"), ([run, "--completions", 0], "--completions 0"),
                            ([run, "--device", "cuda:7"], "--device cuda:7"), (["--tint", "cifar10", "--data-dir", self.dir], "cifar")):
            with mock.patch.object(toy, "MIRRORS", {"cifar10": []}):
                code, _, err = self.command(inpaint, *argv, *([] if "--tint" in argv or not argv else data))
            self.assertEqual((code, err.count("\n")), (2, 1), (argv, err))
            self.assertIn(words, err)

    def test_exact_table_and_tinted_pictures(self):
        self.tiny(n=6)
        with mock.patch.object(inpaint, "EXACT", [("replace", 5, {}), ("repaint", 5, {"U": 2})]):
            code, text, err = self.command(inpaint, "--exact")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("repaint, 5 levels, U 2", text)
        self.assertIn("     9 evaluations", text)
        self.assertEqual(self.command(inpaint, "--tint", "digits", "--data-dir", self.dir / "data")[0], 0)
        images, _ = toy.load_images(self.dir / "data" / "digits-tinted", split="train")
        self.near(images, inpaint.tint(toy.load_images("digits", self.dir / "data", "train")[0]), 0)

class Quality(Case):
    @classmethod
    def setUpClass(cls):
        """A data folder with 8000 + 2000 of the drawn digits, and the classifier that learned them."""
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        with contextlib.redirect_stdout(io.StringIO()):
            cls.images, cls.labels = toy.load_images("digits", cls.folder, "test")
            data = Path(cls.folder) / "digits"
            for k, part in ((0, slice(0, 8000)), (2, slice(8000, 10_000))):
                write_idx(data / toy.FILES[k], cls.images[part, 0].numpy())
                write_idx(data / toy.FILES[k + 1], cls.labels[part].numpy().astype(np.uint8))
            cls.net, cls.accuracy = common.classifier("digits", cls.folder)

    def judge(self, x):
        """The row that evaluate gives images x."""
        args = mock.Mock(dataset="digits", data_dir=self.folder, device="cpu")
        with contextlib.redirect_stdout(io.StringIO()):
            return mock.Mock(**common.evaluate(x, args))

    def test_frechet_distance(self):
        a = torch.randn(500, 5).double() @ torch.randn(5, 5).double()
        C, shift = a.T.cov(), torch.arange(5).double()
        self.near(common.frechet(a, a), 0, 1e-9)
        self.near(common.frechet(a, 3 * a + shift),
                  (2 * a.mean(0) + shift).square().sum() + 4 * C.trace(), 1e-8)        # tr (C + 9 C - 2 * 3 C)
        b = torch.randn(400, 5).double() @ torch.randn(5, 5).double()
        cross = torch.linalg.eigvals(C @ b.T.cov()).real.sqrt().sum()                  # another way to tr (C_a C_b)^(1/2)
        self.near(common.frechet(a, b),
                  (a.mean(0) - b.mean(0)).square().sum() + C.trace() + b.T.cov().trace() - 2 * cross, 1e-8)
        a = torch.randn(100_000, 1)
        self.near(common.frechet(a, M + S * torch.randn(100_000, 1)), M ** 2 + (1 - S) ** 2, 0.05)

    def test_precision_and_recall(self):
        at = lambda *v: torch.tensor(v).double()[:, None] * torch.ones(1, 40)
        a = at(*range(1500))                                               # equal steps; the ends reach 3, the others 2
        self.near(common.inside(a, at(-2.9, -3.1, 700.5, 1498.9, 1501.9, 1502.1, 5000.0), k=3), 4 / 7, 1e-9)
        self.near(common.inside(a, a + 1e-3), 1, 1e-9)
        self.near(common.inside(torch.full((30, 40), 5.0).double(), a), 0, 1 / 1000)            # one point repeated: no reach
        self.near(common.inside(at(0.0, 1, 2, 9), at(5.5, 9.5, 16.9, 17.1), k=2), 0.75, 1e-9)

    def test_nearest(self):
        a, b = (torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8) for n in (600, 50))
        exact = torch.cdist(a.flatten(1).double(), b.flatten(1).double()).amin(1).mean() / 255
        self.near(common.nearest(a, b), exact, 1e-4)
        self.near(common.nearest(b, torch.cat([a, b])), 0, 2e-3)

    def test_classifier_is_kept_with_a_record_and_made_again_for_other_data(self):
        self.assertGreater(self.accuracy, 0.97)
        images = self.images[8000:]
        self.near((common.features(self.net, images)[1].argmax(1) == self.labels[8000:]).float().mean(), self.accuracy, 1e-6)
        path = Path(self.folder) / "digits" / "classifier.pt"
        kept = torch.load(path)
        self.assertEqual(kept["accuracy"], self.accuracy)
        folder = self.dir / "data" / "digits"
        self.tiny()
        def made():
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                net, accuracy = common.classifier("digits", self.dir / "data")
            return "training" in out.getvalue(), net[0].weight
        first, weight = made()
        again, same = made()
        self.assertEqual((first, again), (True, False))
        self.near(weight, same, 0)
        good = (folder / "classifier.pt").read_bytes()
        for bad in (b"", good[:1000], path.read_bytes()):                  # damaged, or of another data set
            (folder / "classifier.pt").write_bytes(bad)
            self.assertTrue(made()[0])
            self.assertFalse(made()[0])
        self.tiny(n=65)
        self.assertTrue(made()[0])

    def test_real_images_are_at_the_floor_and_others_move_as_they_must(self):
        train, test, labels = self.images[:8000], self.images[8000:], self.labels[:8000]
        some = torch.randperm(8000, generator=torch.Generator().manual_seed(1))[:1000]         # not those of the floor
        real = self.judge(train[some])
        self.near(real.ratio, 1, 0.25)
        self.near([real.precision, real.recall], 0.93, 0.07)
        self.near(real.entropy, math.log(10), 0.02)
        self.assertGreater(real.confidence, 0.95)
        self.near(real.nearest, 0, 0.01)                                   # every one a copy
        fresh = self.judge(test[:1000])
        self.assertLess(fresh.ratio, 1.2)
        self.near(fresh.nearest, 1, 0.05)
        noise = self.judge(torch.randint(0, 256, (1000, 1, 28, 28), dtype=torch.uint8))
        self.assertGreater(noise.ratio, 100)
        self.assertLess(noise.precision + noise.recall, 0.05)
        self.assertGreater(noise.nearest, 1.5)
        blank = self.judge(torch.zeros(1000, 1, 28, 28, dtype=torch.uint8))
        self.assertGreater(blank.ratio, 30)
        self.assertEqual((blank.entropy, sum(map(int, blank.classes.split()))), (0, 1000))
        self.near([blank.precision, blank.recall], 0, 0.01)
        one = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:1]          # that of a real one compared with
        repeated = self.judge(test[one].expand(1000, -1, -1, -1).contiguous())
        self.assertGreater(repeated.ratio, 30)
        self.near([repeated.entropy, repeated.recall], 0, 0.01)
        self.near(repeated.precision, 1, 1e-6)                             # it is a digit, if only one
        sevens = self.judge(train[labels == 7][:700])
        self.assertGreater(sevens.ratio, 10)
        self.assertLess(sevens.entropy, 0.2)
        self.assertLess(sevens.recall, 0.3)
        self.assertGreater(sevens.precision, 0.8)
        self.assertGreater(int(sevens.classes.split()[7]), 670)
        half = torch.where(torch.rand(1000, 1, 1, 1) < 0.5, train[some], torch.zeros(1, dtype=torch.uint8))
        self.assertTrue(real.ratio < self.judge(half).ratio < blank.ratio)

    def test_evaluate_adds_a_row(self):
        flags = [*self.tiny(), "--out", self.dir / "run", "--evaluate", 20]
        for k, more in enumerate(([], ["--sample-only", "--T", 3])):
            code, out, err = self.command(ncsn, *flags, *more)
            self.assertEqual((code, err), (0, ""))
            self.assertEqual((out.count("\neval "), out.count("training the classifier")), (1, 1 - k))
            with open(self.dir / "run" / "quality.csv", newline="") as f:
                rows = list(csv.DictReader(f))
            self.assertEqual(len(rows), k + 1)
            self.assertEqual((rows[k]["step"], rows[k]["images"], float(rows[k]["evaluations"])), ("6", "20", 21 + 10 * k))
            self.assertIn("--evaluate 20", rows[k]["flags"])
            self.near(float(rows[k]["r"]), 0.1, 1e-6)
            for name in ("frechet", "floor", "ratio", "precision", "recall", "entropy", "confidence", "nearest", "s_per_100"):
                self.assertTrue(math.isfinite(float(rows[k][name])), name)
        code, out, _ = self.command(ncsn, "--out", self.dir / "run", "--sample-only")           # is asked for each time
        self.assertNotIn("\neval ", out)
        (self.dir / "pictures").mkdir()
        Image.new("L", (8, 8)).save(self.dir / "pictures" / "a.png")
        for bad in (["--dataset", self.dir / "pictures", "--evaluate", 20], ["--evaluate", 3]):
            code, _, err = self.command(ncsn, *self.tiny(), "--out", self.dir / "other", *bad)
            self.assertEqual((code, err.count("\n")), (2, 1))
            self.assertIn("--evaluate", err)

class Speed(Case):
    def test_benchmark(self):
        line = ncsn.benchmark("fp32", "cpu", batch=2, many=2, rounds=1)
        training, evaluation, share, rate, of_fastest, peak = map(float, re.findall(r"(?<= )[0-9.]+(?= )", line[4:]))
        self.assertTrue(0 < training < evaluation and 0 < share < 200 and 0 < of_fastest <= share and 0 < rate and peak > 50)
        self.assertEqual(self.command(ncsn, "--benchmark", "--device", "mps")[0], 2)

class Network(Case):
    def shaken(self, **kwargs):
        """A U-Net with weights that are not zero anywhere."""
        net = common.UNet(width=16, **kwargs)
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
        return net

    def test_shapes_and_zero_start(self):
        for channels, patch, size, mult in ((1, 2, (28, 28), (1, 2)), (3, 1, (8, 16), (1, 2, 2)), (2, 4, (16, 16), (1,))):
            x, noise = torch.randn(3, channels, *size), torch.randn(3)
            net = common.UNet(channels, 16, mult, patch=patch)
            self.assertTrue((net(x, noise) == 0).all())
            out = self.shaken(channels=channels, mult=mult, patch=patch)(x, noise)
            self.assertEqual(out.shape, x.shape)
            self.assertEqual(out.dtype, torch.float32)
            self.assertGreater(out.std(), 0)

    def test_sizes_that_do_not_halve(self):
        self.refuses("multiples of 4", common.UNet(1, 8), torch.zeros(1, 1, 30, 28), torch.zeros(1))
        self.refuses("multiples of 8", common.UNet(1, 8, mult=(1, 1, 1), patch=2), torch.zeros(1, 1, 8, 12), torch.zeros(1))
        self.refuses("multiple of 8", common.UNet, 1, 12)

    def test_every_image_sees_its_own_noise_and_label_and_every_pixel(self):
        net = self.shaken(classes=3).eval()
        x, noise, label = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 0.0, 1.0, 900.0]), torch.tensor([0, 1, 2, 0])
        out = net(x, noise, label)
        for i in range(4):
            self.near(net(x[i:i + 1], noise[i:i + 1], label[i:i + 1]), out[i:i + 1], 1e-4 * out.abs().max().item())
        one = x[:1].expand(4, -1, -1, -1)
        different = lambda a: (a[:, None] - a[None]).flatten(2).abs().amax(2) + torch.eye(4) > 1e-3
        self.assertTrue(different(net(one, torch.tensor([-4.0, 0.5, 500.0, 501.0]), label * 0)).all())
        self.assertTrue(different(net(one, noise * 0, torch.tensor([0, 1, 2, -1]))).all())
        none = net(one, noise * 0)
        self.near(net(one, noise * 0, noise.long() * 0 - 1), none, 1e-5 * none.abs().max().item())     # -1 is no label
        x.requires_grad_()
        net(x, noise, label)[:, :, 0, 0].sum().backward()
        self.assertGreater((x.grad != 0).float().mean(), 0.99)             # attention: every pixel sees every other

    def test_bfloat16_is_near_float32(self):
        net, x, noise = self.shaken(channels=3).eval(), torch.randn(2, 3, 8, 8), torch.randn(2)
        exact = net(x, noise)
        net.bf16 = True
        error = (net(x, noise) - exact).std() / exact.std()
        self.assertLess(error, 0.035)
        self.assertGreater(error, 0)

    def test_compiles_without_a_graph_break(self):
        net, x, noise = self.shaken(classes=2), torch.randn(2, 1, 8, 8), torch.randn(2)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        out = net(x, noise, torch.tensor([0, 1]))
        self.near(compiled(x, noise, torch.tensor([0, 1])), out, 1e-5 * out.abs().max().item())

    def test_loss_and_sampler_leave_nothing_behind_on_the_cpu(self):
        net = common.UNet(1, 8, classes=3).to("meta")                      # meta: reading a number back would raise
        sigma = common.geometric_sigmas(1, 0.01, 4)
        x, label = torch.rand(2, 1, 8, 8, device="meta"), torch.zeros(2, device="meta", dtype=torch.long)
        for objective in ("dsm", "ssm", "ssm-vr"):
            ncsn.loss(net, x, sigma.float().to("meta"), label, objective=objective).backward()
        out = ncsn.sample(net, x, sigma, 2e-5, [2] * 4, label, frames=[])
        self.assertEqual((out.shape, out.device.type), (x.shape, "meta"))
        self.assertEqual(ncsn.denoiser(None, net)(x, 0.1).device.type, "meta")
        abar = ddpm.schedule("linear", 30)
        table, two = abar.to("meta"), common.UNet(1, 8, classes=3, out=2).to("meta")
        ddpm.loss(net, x, table, label).backward()
        ddpm.hybrid_loss(two, x, table, label).backward()
        ddpm.vlb_loss(two, x, table, torch.zeros(30, 10, device="meta"), label).backward()
        f = ddpm.predictor(net, table, label=label, w=1.0, clip=True, frames=[])
        g = ddpm.predictor(two, table, label=label, learned=True)
        for out in (ddpm.sample(f, x, abar), ddpm.ddim(f, x, abar, [30, 3, 0], 1.0), ddpm.ancestral(g, x, abar, [0, 3, 30], "learned")):
            self.assertEqual((out.shape, out.device.type), (x.shape, "meta"))
        D = ddpm.denoiser({"args": {"schedule": "linear", "T": 30, "predict": "v"}}, net, "meta")
        self.assertEqual(D(x, 0.1).device.type, "meta")
        for e in SDEs.sdes.values():
            for weighting, precond in (("paper", "eps"), ("likelihood", "edm")):
                sde.loss(net, x, e, label, weighting=weighting, precond=precond).backward()
            score, ts = sde.make_score(lambda y, sigma, c: sde.eps_theta(net, y, sigma, c), e, label, 1.0), sde.times(e, 4, 7.0)
            for draw in (sde.em, sde.reverse, sde.ancestral, sde.langevin, sde.pc):
                self.assertEqual(draw(score, e, x, ts).device.type, "meta")
            self.assertEqual(sde.heun(score, e, x, 4, churn=2.0).device.type, "meta")

class Laboratory(Case):
    def agrees(self, rows, count, tolerance=4.5):
        """Assert that so many rows have an exact value, each within so many standard errors: of 100 rows that are right,
        one is off by more than 4.5 once in 1500 seeds, and the seed is fixed."""
        known = [(label, (measured - exact) / error) for label, measured, error, exact in rows if math.isfinite(exact)]
        self.assertEqual(len(known), count)
        for label, distance in known:
            self.assertLessEqual(abs(distance), tolerance, label)

    def test_mixture_is_the_density_that_it_draws(self):
        p, sigma = toy.Mixture((0.3, 0.7), ((1.0, 0.5), (-1.0, 0.0)), 0.2), torch.tensor([0.0, 0.3, 2.0]).repeat(7)
        x = torch.randn(21, 2, 1, 1, dtype=torch.float64, requires_grad=True)
        for level in (0.0, 0.7, sigma):
            grad, = torch.autograd.grad(p.log_density(x, level).sum(), x)
            self.near(p.score(x, level), grad, 1e-9)
        self.near(p.net(x, sigma.clamp(min=0.1).log())[sigma > 0], (sigma.view(-1, 1, 1, 1) * grad)[sigma > 0], 1e-5)
        at, width = toy.plane(6, 200), 12 / 201
        noisy = p(100_000) + 0.7 * torch.randn(100_000, 2, 1, 1)
        q = p.log_density(at, 0.7).exp() * width ** 2
        self.near(q.sum(), 1, 1e-4)                                        # a density, that of the points with noise:
        self.near(q @ at.flatten(1), noisy.mean(0).flatten(), 0.02)        # 1.2 / sqrt(100,000) = 0.004
        self.near((at.flatten(1) * q[:, None]).T @ at.flatten(1), noisy.flatten(1).T @ noisy.flatten(1) / 1e5, 0.04)
        label = torch.tensor([0, 1] * 10 + [0])
        self.near(p.score(x, 0.5, label), (p.m[label] - x) / 0.45, 1e-6)

    def test_data(self):
        x = toy.cut(100_000).flatten(1)
        self.assertGreaterEqual(x[:, 0].abs().min(), 0.5)
        self.near(x.mean(0), 0, 0.02)
        self.near(x.var(0), [1.25 + math.sqrt(2 / math.pi), 1], 0.03)      # E(|z| + 1/2)^2
        x, y = toy.heart(50_000).flatten(1).T
        self.assertEqual(len(x), 50_000)
        self.assertLess(((x ** 2 + y ** 2 - 1) ** 3 - x ** 2 * y ** 3).max(), 1e-6)
        self.near(x.mean(), 0, 0.02)
        at = toy.plane(1.3, 300).flatten(1)
        inside = (at.square().sum(1) - 1) ** 3 < at[:, 0] ** 2 * at[:, 1] ** 3
        self.near(y.mean(), at[inside, 1].mean(), 0.02)                    # uniform
        x = toy.swiss_roll(20_000).flatten(1)
        turn = 7 * x.norm(dim=1) / math.pi - 1.5                           # of the angle in (0, 3), uniform
        self.near([turn.mean(), turn.std()], [1.5, 3 / math.sqrt(12)], 0.03)
        along = x * torch.stack([turn.add(1.5).mul(math.pi).cos(), turn.add(1.5).mul(math.pi).sin()], 1)
        self.assertGreater((along.sum(1) / x.norm(dim=1)).mean(), 0.9)     # at its angle, give or take 7 * 0.05
        x, y = toy.checkerboard(20_000).flatten(1).T
        self.assertTrue(((x.floor() + y.floor()) % 2 == 0).all())
        counts = torch.stack([x.floor(), y.floor()]).unique(dim=1, return_counts=True)[1]
        self.assertEqual(len(counts), 8)
        self.near(counts / 20_000, 1 / 8, 0.012)                           # 5 standard errors
        self.near([x.min(), x.max(), y.min(), y.max()], [-2, 2, -2, 2], 0.01)

    def test_energy_distance(self):
        for shift in (0.5, 2.0):                                           # of N(0, 1) and N(shift, 1): x - y is normal
            between = 2 / math.sqrt(math.pi) * math.exp(-shift ** 2 / 4) + shift * math.erf(shift / 2)
            x, y = torch.randn(8000, 1), shift + torch.randn(8000, 1)
            self.near(ncsn.energy(x, y), 2 * between - 4 / math.sqrt(math.pi), 0.05)
        few = [ncsn.energy(torch.randn(5, 2, 1, 1), torch.randn(7, 2, 1, 1)) for _ in range(2000)]
        self.near(np.mean(few), 0, 5 * np.std(few) / math.sqrt(2000))      # without bias: with it, 0.6
        rows = toy.compare({"same": toy.MIX(4000), "moved": toy.MIX(4000) + 0.5}, toy.MIX)
        (_, same, spread, floor), (_, moved, _, _) = rows
        self.assertLess(abs(same - floor), 3 * spread)
        self.assertGreater(moved, 0.2)
        self.assertLess(abs(floor), 0.003)

    def test_rows(self):
        label, mean, error, exact = toy.row("a", [1.0, 2.0, 6.0], 3)
        self.assertEqual((label, exact), ("a", 3))
        self.near([mean, error], [3, math.sqrt(7 / 3)], 1e-9)              # variance 7 of 3 values
        b = torch.randn(5000, 2, 1, 1)
        label, slope, error, _ = toy.agree("b", 0.5 * b + 0.1 * torch.randn_like(b), b)
        self.near(slope, 0.5, 5 * error)
        self.near(error, 0.1 / math.sqrt(5000), 2e-4)
        self.assertRegex(label, "distance 0.5[01]")                              # sqrt(0.5^2 + 0.1^2)

    def test_langevin_inflates_by_the_formula_and_diverges_above_2(self):
        v, end = 3.0, 1 / (1 - 0.3 / 2)
        for T in range(1, 6):
            v = (1 - 0.3) ** 2 * v + 2 * 0.3
            self.near(ncsn.settled(0.3, T, 3.0), v, 1e-9)
        self.near(ncsn.settled(0.3, 200), end, 1e-9)
        self.agrees(ncsn.langevin()[1], 13)

    def test_each_level_drifts_to_its_inflated_variance(self):
        rows = ncsn.too_many_steps()[1]
        self.agrees([row for row in rows if float(row[0].split()[-1]) >= 10 and "2.5" not in row[0]], 12)
        self.assertFalse(rows[-1][1] < 1e9)                                # r = 2.5 diverges, beyond all float32

    def test_annealing_finds_the_weights(self):
        _, ((_, plain, _, _), annealed, *steps) = ncsn.annealed()
        self.near(plain, 0.5, 0.04)                                        # where each started
        self.near(annealed[1], 0.8, 0.03)                                  # 4.7 standard errors
        self.agrees(steps, 10)

    def test_metropolis_keeps_the_covariance_and_labels_mix(self):
        _, rows = inpaint.metropolis()
        self.agrees([r for r in rows if "(-1, -1)" not in r[0]], 15)
        accepted = [r[1] for r in rows if r[0].startswith("accepted")]
        self.assertEqual(accepted, sorted(accepted, reverse=True))
        self.assertGreater(accepted[0], 0.99)                              # small steps are all taken
        self.assertLess(rows[-2][1], 0.1)                                  # stays where it started

    def test_random_sigmas_are_unbiased_and_have_the_variance_that_they_must(self):
        self.agrees(ncsn.objective()[1], 32)

    def test_explicit_loss_is_the_denoising_loss_less_a_constant(self):
        sigma, x = torch.tensor([0.5]), toy.MIX(40_000)
        noisy = x + 0.5 * torch.randn_like(x)
        exact = toy.MIX.score(noisy, 0.5)
        for c in (0.3, 1.0, 1.5):                                          # of any network: of c times the exact score
            net = lambda *at: c * toy.MIX.net(*at)
            distance = (c - 1) ** 2 * exact.square().mean() / 8            # sigma^2 / 2, and a mean over 2
            self.near(ncsn.loss(net, x, sigma), distance + 0.5 - exact.square().mean() / 8, 0.01)
            self.near(ncsn.explicit(net, x, sigma), distance - exact.square().mean() / 8, 0.01)
        w = nn.Linear(1, 1, bias=False)
        memory, variance = ncsn.cost(w, lambda w: (w.weight * (big := torch.randn(2 ** 18, 1))).sum() / 512)
        self.near(memory, 1, 0.01)                                         # MiB: big, kept for its product with w
        self.assertTrue(0.3 < variance < 2.2)                              # chi^2 of 19 degrees / 19

    def test_projections_are_unbiased_and_vary_as_they_must(self):
        rows = ncsn.projections()[1]
        self.agrees([r for r in rows if "axes" not in r[0]], 24)
        axes = {r[0].replace(", axes, M =", ""): r for r in rows if "axes" in r[0]}
        for M in (1, 2, 4):                                                # no chance in them: exact, but of another mean
            self.near(axes[f"mean {M}"][1], axes[f"mean {M}"][3], 1e-5)
            self.near(axes[f"variance {M}"][1], 0, 1e-8)
            self.assertGreater(abs(axes[f"mean {M}"][3] - rows[0][3]), 10 * rows[0][2])
        x, signs = toy.image(torch.full((20_000, 6), 0.1)), torch.randn(1, 20_000, 6).sign()
        v, axis = ncsn.sliced(toy.Mixture([1.0], [[0.5] * 6], 0.5).score, x, signs), torch.eye(6)[:, None]
        self.near(v.mean(), -12 + 6 * 0.8 ** 2 / 2, 0.15)                  # tr grad s = -6 / 0.5, s = 0.4 / 0.5
        v = ncsn.sliced(toy.Mixture([1.0], [[0.5] * 6], 0.5).score, x[:2], axis)
        self.near(v, -2 + 0.8 ** 2 / 2, 1e-5)

    def test_weighting_moves_what_a_small_network_learns(self):
        a, b = ncsn.least(lambda c: (c - 0.3) ** 2 + 5)[:2]                # a parabola's lowest point
        self.near([a, b], 0.3, 1e-5)
        with mock.patch.object(toy, "fit", lambda net, *_: net.requires_grad_(False)):
            rows = ddpm.weighting()[1]
        self.assertEqual(len(rows), 55)
        self.agrees(rows, 5)
        self.assertLess(rows[-1][3], rows[-5][3] / 2)                      # a large power: the large sigma, a small slope

    def test_errors_of_networks(self):
        _, rows = ddpm.misses({"exact": toy.MIX.net, "half": lambda x, u, label: toy.MIX.net(x, u) / 2}, toy.MIX, (0.1, 1.0))
        self.near([rows[0][1], rows[1][1]], 0, 1e-9)
        square = [sigma ** 2 * toy.MIX.score(toy.MIX(40_000) + sigma * torch.randn(40_000, 2, 1, 1), sigma).square().mean() / 4
                  for sigma in (0.1, 1.0)]
        for row, exact in zip(rows[2:], square):
            self.near(row[1], exact, 5 * row[2])

    def test_levels_begin_far_out_and_lie_near(self):
        toy_uniform = toy.uniform
        with mock.patch.object(toy, "uniform", lambda n: toy_uniform(500)):                    # a quarter of the points
            rows = ncsn.levels()[1]
        overlaps = [r for r in rows if r[0].startswith("overlap")]
        self.assertEqual(len(overlaps), 18)
        for label, measured, error, formula in overlaps:                   # the formula is a limit: 0.014 off at d = 100
            self.assertLessEqual(abs(measured - formula), 4.5 * error + 0.015, label)
        share = {r[0].split(", data, ")[1]: r for r in rows if r[0].startswith("share")}
        self.near(share["L = 10, T = 100, sigma_1 = 1"][1], 0.5, 0.12)                   # stays where it began
        self.near([share[k][1] for k in ("L = 10, T = 100, sigma_1 = 10", "T = 1000 / L, L = 20")], 0.8, 0.08)
        self.assertLess(share["T = 1000 / L, L = 2"][1], 0.74)             # 0.02 is a standard error

    def test_steps(self):
        toy_uniform = toy.uniform
        with mock.patch.object(toy, "uniform", lambda n: toy_uniform(500)):
            rows = {r[0].split(", data, ")[1]: r for r in ncsn.steps()[1]}
        self.near([rows["r = 0.1, T = 50"][1], rows["a = r sigma^2, r = 0.3"][1]], 0.8, 0.08)        # 4 standard errors
        calls = []
        with mock.patch.object(toy, "anneal", lambda net, x, *way, **_: calls.append(way) or x):
            ncsn.share("v", (1.0,), lambda v: [(2.0, v, 2.6)])
        self.assertEqual(calls, [([2.0], 0.25, 3)])                        # r = a / sigma^2
        self.near(rows["a = 0.1 sigma^p, p = 0"][1], 0.5, 0.12)          # too small where sigma is large
        self.assertLess(abs(rows["a = r sigma^2, r = 0.003"][1] - 0.5), 0.2)

    def briefly(self, steps):
        """toy.fit that takes so many steps."""
        fit = toy.fit
        return mock.patch.object(toy, "fit", lambda net, loss, *_: fit(net, loss, steps))

    def test_noise_of_any_kind_and_an_autoencoder_learn_the_score(self):
        with self.briefly(200):
            slopes = [slope for _, slope, _, _ in toy.noise()[1]]
            fields = [slope for _, slope, _, _ in toy.autoencoder()[1]]
        self.near(slopes[:3], 1, 0.1)                                      # 200 steps leave some percent, of either sign
        self.near(slopes[3], 0, 0.1)
        self.near(fields, 1, 0.06)

    def test_one_level_fails_where_data_are_thin(self):
        with self.briefly(300):
            rows = ncsn.scores()[1]
        near, far = (float(r[0].split("distance ")[1].split(",")[0]) for r in (rows[0], rows[3]))
        self.assertEqual(len(rows), 12)
        self.assertLess(near, 0.35)
        self.assertGreater(far, 0.5)
        self.near([r[1] for r in rows[8:]], 1, 0.1)                        # at sigma = 5 no place is thin

    def test_matching(self):
        with mock.patch.object(toy, "fit", lambda net, *_: net.requires_grad_(False)), \
                mock.patch.object(ncsn, "cost", lambda net, loss: (0, loss(net).item())):
            rows = ncsn.matching()[1]
        (_, constant, error, exact), (_, slope, _, one), (_, ssm, ssm_error, _) = rows[-3:]
        self.near(constant, exact, 5 * error)
        self.near(slope, one, 0.01)
        self.near(ssm, 1, 5 * ssm_error)                                   # a lost 1/2 gives 0.5
        self.assertLess(ssm_error, 0.01)

    def test_noise_inputs_of_the_network(self):
        with self.briefly(100):
            rows = ddpm.conditioning()[1]
        self.assertEqual(len(rows), 60)
        total = {k: sum(r[1] for r in rows if r[0].split(", ")[1] == k) for k in ("t", "Fourier features")}
        self.assertLess(total["Fourier features"], total["t"])
        u = torch.tensor([-3.0, 0.0, 2.0])
        angle = u[:, None] * torch.tensor([0.25, 0.5, 1, 2])
        self.near(toy.fourier(u), torch.stack([angle.cos(), angle.sin()], 2).flatten(1), 1e-6)
        net = toy.Net()                                                    # without what it learns: exact for N(0, I)
        nn.init.zeros_(net.layers[-1].weight), nn.init.zeros_(net.layers[-1].bias)
        x = torch.randn(3, 2, 1, 1)
        self.near(net(x, u), toy.Mixture([1.0], [[0.0, 0.0]], 1.0).net(x, u), 1e-6)

    def test_every_sampler_draws_the_data(self):
        mix = lambda n: toy.MIX(n)
        with mock.patch.object(toy, "fit", lambda *_: toy.MIX.net):        # the exact network
            panels, rows = toy.samplers(((mix, 2),))
        self.assertEqual(([p["title"].split(", ")[1] for p in panels], len(rows)), (["NCSN", "DDPM", "ODE"], 14))
        for label, distance, spread, floor in rows[7:]:                    # 200 evaluations; two sets of 2,000 points
            lag = 0.015 if "NCSN" in label else 0.002                       # which so few Langevin steps leave
            self.assertLess(distance - floor, 4 * spread + lag, label)
        few = {r[0].split(", ")[2]: r[1] for r in rows[:7]}
        self.assertLess(few["ODE"], 0.03)                                  # 20 are nearly enough for Heun,
        self.assertGreater(few["NCSN"], 3 * few["ODE"])                    # not for annealed Langevin dynamics

    def test_fit_learns_the_score(self):
        sigma, x = torch.tensor([0.5]), toy.MIX(2000)
        net = toy.fit(toy.Net(), lambda net: ncsn.loss(net, toy.MIX(512), sigma), 300)
        self.near(toy.agree("", toy.score(net)(x, 0.5), toy.MIX.score(x, 0.5))[1], 1, 0.05)
        abar = ddpm.schedule("cosine", 50)                                 # the same network, as ddpm.py calls it
        t = torch.tensor([1, 20, 50])
        a, s = ddpm.kernel(abar, t)
        x_t, f = torch.randn(3, 1, 1, 1), ddpm.as_eps(gaussian(), abar)
        self.near(f(x_t, t), s * (x_t - a * M) / (a ** 2 * S ** 2 + s ** 2), 1e-4)
        D = ncsn.denoiser(None, net=gaussian())                            # and back
        self.near(ddpm.score_network(D)(x_t, t / 9), gaussian()(x_t, t / 9), 1e-3)

    def test_ode_has_its_order_and_its_likelihood(self):
        panels, ((_, euler, _, _), (_, heun, _, _), (_, log_p, _, _), *bends) = toy.ode()
        self.near([euler, heun], [1, 2], 0.1)
        self.near(log_p, 0, 2e-3)                                          # nats; 1.1 / 100^2 and the tolerance of rk45
        (ve, edm, vp) = (bend for _, bend, _, _ in bends)
        self.assertLess(edm, min(ve, vp))                                  # EDM's are the straightest
        self.assertEqual([p["title"] for p in panels[1:]], ["VE", "EDM", "VP"])

    def test_conditional(self):
        panels, rows = inpaint.given()
        at = torch.linspace(-5, 5, 4001)
        p = toy.MIX.log_density(torch.stack([torch.full_like(at, 0.1), at], 1)[..., None, None]).exp()
        curve = torch.as_tensor(panels[0]["marks"][0][2])
        self.near(curve[:, 1], np.interp(curve[:, 0], at, p / p.sum() / 0.0025), 1e-3)
        self.near(rows[0][3], p[at > 0].sum() / p.sum(), 1e-3)
        self.assertLess(rows[0][1], 0.35)                                  # replacing is far off, repeating nearer
        self.assertGreater(rows[-1][1], rows[0][1] + 0.08)

    def test_panels_put_marks_where_they_belong(self):
        def at(marks, colour, **options):
            rgb = np.asarray(toy.panel(marks, size=(800, 800), **options)).astype(int)
            y, x = np.nonzero(np.abs(rgb[82:728, 120:758] - colour).sum(-1) < 12)               # inside the axes
            return (x + 120 - 80) / 680, 1 - (y + 82 - 80) / 650
        blue, box = (0x25, 0x63, 0xeb), (-2, 2)
        x, y = at([("dots", "", [(1.0, -1.0), (7.0, 7.0)])], blue, box=box)                    # the second is outside
        self.near([x.mean(), y.mean()], [0.75, 0.25], 0.02)
        x, y = at([("arrows", "", [(0.0, 0.0, 1.0, 0.0)])], blue, box=box)
        self.near([x.min(), x.max()], [0.5, 0.75], 0.02)
        self.near(np.ptp(y[x > 0.7]), 0.08, 0.04)                          # the head is at the end
        self.near(np.ptp(y[x < 0.6]), 0, 0.01)
        heat = np.zeros((2, 2))
        heat[0, 1] = 1                                                     # row 0 is the top
        x, y = at([("heat", "", heat)], toy.SHADES[-1], box=box)
        self.assertTrue(x.min() > 0.5 and y.min() > 0.5)
        self.near(toy.plane(3, 2).flatten(1), [[-1, 1], [1, 1], [-1, -1], [1, -1]], 1e-6)       # from the top, too
        x, y = at([("dots", "", [(0.0, 0.0, 1.5)])], blue, box=box)
        self.near([y.min(), y.max()], [0.125, 0.875], 0.01)                # the error bar
        f = lambda k, v: [k * v - 1, k * v + 1]
        panel, rows = toy.sweep("x", "y", (1.0, 2.0), {"f": 1, "g": 2}, f, lambda k, v: k * v + 1)
        self.assertEqual(rows, [("y, f, x = 1", 1.0, 1.0, 2.0), ("y, f, x = 2", 2.0, 1.0, 3.0),
                                ("y, g, x = 1", 2.0, 1.0, 3.0), ("y, g, x = 2", 4.0, 1.0, 5.0)])
        self.assertEqual([m[2] for m in panel["marks"][:2]], [[(1.0, 2.0), (2.0, 3.0)], [(1.0, 1.0, 2.0), (2.0, 2.0, 2.0)]])
        self.assertEqual([m[1] for m in panel["marks"]], ["f", "", "g", ""])
        panel, rows = toy.sweep("x", "y", (1.0, 2.0), {"f": 1}, f, math.nan)                   # nothing is known
        self.assertEqual(panel["marks"][0][2], [(1.0, 1.0), (2.0, 2.0)])
        self.assertTrue(all(math.isnan(r[3]) for r in rows))
        self.assertEqual(toy.join(("a", [1, 2]), ("b", [3])), (["a", "b"], [1, 2, 3]))
        dots = toy.density("", torch.randn(100_000), lambda x: x, -2, 2)["marks"][1][2]
        normal = (-dots[:, 0] ** 2 / 2).exp() / math.sqrt(2 * math.pi)
        self.assertLessEqual(((dots[:, 1] - normal) / dots[:, 2]).abs().max(), 2.5)            # of two standard errors

    def test_command(self):
        def annealed():
            return [{"marks": [("dots", "", [(0, 0), (1, 1)])]}] * 4, [("a claim", 1.5, 0.25, 1.0), ("b", 2, math.nan, 3)]
        with mock.patch.object(ncsn, "annealed", annealed):
            code, out, err = self.command(toy, "annealed", "--out", self.dir)
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"a claim +1.5 +\+- 0.25 +exact 1 *\n +b +2 +exact 3")
        with Image.open(self.dir / "annealed.png") as picture:
            self.assertEqual(picture.size, (880, 800))                     # two by two
        code, _, err = self.command(toy, "anneal", "--out", self.dir)
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("too-many-steps", err)

class Images(Case):
    def idx(self, name="mnist", n=3):
        """The arrays of random FILES, whose checksums now count as those of a published set."""
        rng = np.random.default_rng(1)
        arrays, sums = [rng.integers(0, 10, (n,) if k % 2 else (n, 6, 4)).astype(np.uint8) for k in range(4)], []
        for a in arrays:
            write_idx(self.dir / "raw", a)
            sums.append(hashlib.sha256((self.dir / "raw").read_bytes()).hexdigest())
        (self.dir / name).mkdir()
        self.enterContext(mock.patch.dict(toy.SHA256, {name: sums}))
        return arrays

    def test_idx_files_under_all_their_names(self):
        arrays = self.idx()
        for dot, gz in itertools.product((False, True), (False, True)):
            folder = self.dir / f"{dot}{gz}" / "mnist"
            folder.mkdir(parents=True)
            for stem, a in zip(toy.FILES, arrays):
                write_idx(folder / (stem.replace("-idx", ".idx" if dot else "-idx") + ".gz" * gz), a, compress=gz)
            for split, k in (("train", 0), ("test", 2)):
                images, labels = toy.load_images("mnist", folder.parent, split)
                self.assertEqual((images.dtype, labels.dtype), (torch.uint8, torch.int64))
                self.near(images, arrays[k][:, None], 0)
                self.near(labels, arrays[k + 1], 0)

    def test_damaged_idx_files_are_named(self):
        arrays, path = self.idx(), self.dir / "mnist" / (toy.FILES[0] + ".gz")
        write_idx(path, arrays[0], compress=True)
        good = path.read_bytes()
        raw = gzip.decompress(good)
        for bad in (good[:-9], good[:30], b"", raw[:-1], raw[:9], b"\0\0\x0d" + raw[3:], raw[:-1] + b"\xff", raw + b"\0",
                    b"<!DOCTYPE html>", gzip.compress(b"hello")):
            path.write_bytes(bad)
            self.refuses(str(path), toy.load_images, "mnist", self.dir)
        path.write_bytes(gzip.compress(raw, 1))                            # compressed again: as good
        self.near(toy.read(path, toy.parse_idx, toy.SHA256["mnist"][0]), arrays[0], 0)

    def test_download_from_a_server_that_fails_half_way_once(self):
        arrays, files, asked = self.idx("fashion-mnist"), {}, []
        for stem, a in zip(toy.FILES, arrays):
            write_idx(self.dir / "raw", a, compress=True)
            files[f"/{stem}.gz"] = (self.dir / "raw").read_bytes()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                body = files.get(self.path)
                self.send_response(200 if body else 404)
                self.send_header("Content-Length", len(body or b""))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if len(asked) == 1 else body or b"")
            def log_message(self, *args):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        good, gone = f"http://127.0.0.1:{server.server_port}/", f"http://127.0.0.1:{server.server_port}/gone/"
        with mock.patch.dict(toy.MIRRORS, {"fashion-mnist": [good, gone]}), contextlib.redirect_stdout(io.StringIO()):
            images, labels = toy.load_images("fashion-mnist", self.dir)
            self.near(images, arrays[0][:, None], 0)
            self.near(labels, arrays[1], 0)
            self.assertEqual(asked[:3], [f"/{toy.FILES[0]}.gz", f"/gone/{toy.FILES[0]}.gz", f"/{toy.FILES[0]}.gz"])
            count = len(asked)
            toy.load_images("fashion-mnist", self.dir)                  # from the disk this time
            self.assertEqual(len(asked), count)
        folder = self.dir / "fashion-mnist"
        self.assertEqual(sorted(p.name for p in folder.iterdir()), sorted(f + ".gz" for f in toy.FILES[:2]))
        with mock.patch.dict(toy.MIRRORS, {"fashion-mnist": [gone + "a/", gone + "b/"]}):
            self.refuses("/gone/b/t10k", toy.load_images, "fashion-mnist", self.dir, "test")
            self.refuses(f"put it into {folder} by hand", toy.load_images, "fashion-mnist", self.dir, "test")
        files[f"/{toy.FILES[2]}.gz"] = files[f"/{toy.FILES[0]}.gz"]  # a good file in the wrong place
        with mock.patch.dict(toy.MIRRORS, {"fashion-mnist": [good]}):
            self.refuses("checksum", toy.load_images, "fashion-mnist", self.dir, "test")

    def test_cifar10_is_read_in_its_archive(self):
        rows = np.random.default_rng(0).integers(0, 10, (12, 3073)).astype(np.uint8)
        path = self.dir / "cifar10" / "cifar-10-binary.tar.gz"
        path.parent.mkdir()
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        with tarfile.open(path, "w:gz") as tar:
            for name, part in zip(names, np.split(rows, 6)):
                info = tarfile.TarInfo(f"../../cifar-10-batches-bin/{name}")
                info.size = part.size
                tar.addfile(info, io.BytesIO(part.tobytes()))
        for split, part in (("train", rows[:10]), ("test", rows[10:])):
            images, labels = toy.load_images("cifar10", self.dir, split)
            self.near(images, part[:, 1:].reshape(-1, 3, 32, 32), 0)
            self.near(labels, part[:, 0], 0)
        self.assertEqual([p.name for p in self.dir.iterdir()], ["cifar10"])    # nothing was extracted
        good = path.read_bytes()
        for bad in (good[:-40], good[:200], b"", b"not a tar"):
            path.write_bytes(bad)
            self.refuses(str(path), toy.load_images, "cifar10", self.dir)
        path.unlink()
        (self.dir / "mirror").mkdir()
        (self.dir / "mirror" / path.name).write_bytes(good)                # readable, but not what was published
        with mock.patch.dict(toy.MIRRORS, {"cifar10": [(self.dir / "mirror").as_uri() + "/"]}):
            self.refuses("wrong checksum", toy.load_images, "cifar10", self.dir)
            with mock.patch.dict(toy.MD5, {path.name: hashlib.md5(good).hexdigest()}), \
                    contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(len(toy.load_images("cifar10", self.dir)[0]), 10)

    def test_folder_of_pictures(self):
        folder = self.dir / "pictures"
        (folder / "deep").mkdir(parents=True)
        ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
        grey = Image.fromarray(ramp)
        grey.save(folder / "a.png")
        grey.convert("1").save(folder / "b.bmp")
        Image.fromarray(ramp.astype(np.uint16) * 256).save(folder / "c.png")
        grey.convert("LA").save(folder / "deep" / "d.png")
        (folder / "notes.txt").write_text("not a picture")
        images, labels = toy.load_images(str(folder))
        self.assertEqual((images.shape, labels), ((4, 1, 8, 8), None))
        for k in (0, 2, 3):
            self.near(images[k, 0], ramp, 0)                               # 16 bits too
        clear = Image.fromarray(np.stack([ramp, ramp, ramp, np.where(ramp < 9, 0, 255).astype(np.uint8)], -1))
        clear.save(folder / "e.png")
        grey.convert("P").save(folder / "f.gif")
        Image.new("CMYK", (8, 8)).save(folder / "g.jpg")
        images, _ = toy.load_images(str(folder))
        self.assertEqual(images.shape, (7, 3, 8, 8))
        self.near(images[0], np.stack([ramp] * 3), 0)
        self.near(images[4, :, 0, :8], 255, 0)                             # transparent is white
        self.near(images[4, :, 4], np.stack([ramp[4]] * 3), 0)
        wide = np.zeros((10, 30, 3), np.uint8)
        wide[:, 10:20] = 200
        Image.fromarray(wide).save(folder / "h.png")
        self.refuses("--size", toy.load_images, str(folder))
        images, _ = toy.load_images(str(folder), size=4)
        self.assertEqual(images.shape, (8, 3, 4, 4))
        self.near(images[7], 200, 15)                                      # the centre only
        (folder / "i.png").write_bytes((folder / "a.png").read_bytes()[:50])
        self.refuses("i.png", toy.load_images, str(folder), size=4)
        self.refuses("is neither", toy.load_images, str(folder / "nowhere"))
        (self.dir / "empty").mkdir()
        self.refuses("no picture", toy.load_images, str(self.dir / "empty"))
        self.refuses("--size", toy.load_images, "mnist", size=8)

    def test_digits_are_drawn_the_same_everywhere(self):
        with contextlib.redirect_stdout(io.StringIO()):
            images, labels = toy.load_images("digits", self.dir, "test")
            again, _ = toy.load_images("digits", self.dir, "test")      # from the files
            with mock.patch.object(os, "cpu_count", lambda: 1):            # and by one thread
                other, _ = toy.load_images("digits", self.dir / "other", "test")
        self.assertEqual((images.shape, images.dtype, labels.shape), ((10_000, 1, 28, 28), torch.uint8, (10_000,)))
        self.assertTrue(torch.equal(images, again) and torch.equal(images, other))
        if PIL.__version__ == "13.0.0":
            self.assertEqual(hashlib.sha256(images.numpy().tobytes()).hexdigest(), DIGITS)
        self.near(labels.bincount(minlength=10) / 10_000, 0.1, 0.015)
        x = images.float().flatten(1) / 255
        self.near(x.mean(), 0.19, 0.03)
        self.assertLess(x.view(-1, 28, 28)[:, [0, -1]].mean(), 0.02)       # hardly a digit touches the border
        means = torch.stack([x[:5000][labels[:5000] == k].mean(0) for k in range(10)])
        nearest = torch.cdist(x[5000:], means).argmin(1)
        self.assertGreater((nearest == labels[5000:]).float().mean(), 0.6)     # labels and shapes belong together

DIGITS = "b7499f71bedee2b78c8a331d9f026670227620fff2e2233ea7c2b225de65a373"

class Pictures(Case):
    def test_grid_places_every_image_and_clamps(self):
        images = torch.full((5, 1, 4, 6), 0.5)
        images[1], images[2], images[4] = 7.0, -7.0, 0.2
        picture = np.asarray(toy.grid(images, cols=3))
        k = picture.shape[1] // (3 * 8 + 2)
        self.assertEqual(picture.shape, ((2 * 6 + 2) * k, (3 * 8 + 2) * k))
        at = lambda row, col: picture[(row * 6 + 4) * k, (col * 8 + 5) * k]
        self.assertEqual([at(0, 0), at(0, 1), at(0, 2), at(1, 0), at(1, 1), at(1, 2)], [128, 255, 0, 128, 51, 0])
        self.near(toy.to_uint8(torch.tensor([-1.0, 0.0, 1.0]), low=-1.0), [0, 128, 255], 0)
        colour = torch.zeros(1, 3, 4, 4)
        colour[:, 2] = 1
        self.assertEqual(toy.grid(colour).getpixel((300, 300)), (0, 0, 255))

    def test_process_plays_and_stands(self):
        frames = [torch.full((4, 1, 8, 8), k / 4) for k in range(5)]
        toy.save_process(frames, self.dir / "p.gif")
        with Image.open(self.dir / "p.gif") as gif:
            self.assertEqual(gif.n_frames, 5)
            gif.seek(2)
            self.near(gif.convert("L").getpixel((100, 100)), 128, 2)
        toy.save_process(frames, self.dir / "p.png", rows=2, columns=3)
        strip = Image.open(self.dir / "p.png")
        pixel = lambda row, col: strip.getpixel(((col + 0.5) * strip.width / 3, (row + 0.5) * strip.height / 2))
        self.assertEqual([pixel(1, col) for col in range(3)], [0, 128, 255])     # time to the right

    def test_plot_draws_the_curve_where_it_belongs(self):
        def ends(points, **axes):
            toy.plot(self.dir / "plot.png", {"": points}, "x", "y", **axes)
            rgb = np.asarray(Image.open(self.dir / "plot.png").convert("RGB")).astype(int)
            y, x = np.nonzero((np.abs(rgb - [0x25, 0x63, 0xeb]).sum(-1) < 40)[80:389, 26:700])
            return rgb.shape, x.min(), x.max(), y[x == x.min()].mean(), y[x == x.max()].mean(), np.median(y)
        shape, left, right, low, high, middle = ends([(0, 0), (1, 0.8)])
        self.assertEqual(shape, (450, 720, 3))
        self.assertLess(left, 40)
        self.assertGreater(low, high + 150)                                # rises
        straight = [(10.0 ** k, 10.0 ** (2 * k)) for k in range(4)]
        straight_line, bent = ends(straight, logx=True, logy=True)[-1], ends(straight, logx=True)[-1]
        self.assertLess(straight_line, bent - 50)                          # a power law is straight on two log axes
        for points in ([], [(1, 1)], [(1, 1e300)], [(1, math.nan), (2, 5), (3, math.inf)], [(0, -1), (-1, 0)]):
            for log in (False, True):
                toy.plot(self.dir / "odd.png", {"odd": points}, "x", "y", logx=log, logy=log)

def state(path):
    """The tensors of a checkpoint in one flat dictionary, and its step."""
    ckpt = common.load_checkpoint(path)
    flat = {f"{part} {k}": v for part in ("raw", "ema") for k, v in ckpt[part].items()}
    flat |= {f"adam {k} {n}": v for k, s in ckpt["opt"]["state"].items() for n, v in s.items()}
    return flat | {"recent": ckpt["recent"], "rows": torch.tensor([r[:4] for r in ckpt["rows"]])}, ckpt["step"]

class Runs(Case):
    def test_command_line_end_to_end(self):
        flags, out = self.tiny(), self.dir / "run"
        code, text, err = self.command(ncsn, *flags, "--out", out, "--classes", "--npz", "--T", *[2] * 9, 3)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("r = a / sigma^2 = 0.1 on all 10 levels from 1 to 0.01", text)
        self.assertIn(" 1.053 times", text)
        self.assertEqual(sorted(p.name for p in out.iterdir()), ["ckpt.pt", "log.csv", "loss.png", "process.gif",
                         "process.png", "samples.npz", "samples.png"])
        for name in ("loss.png", "process.png", "samples.png"):
            low, high = Image.open(out / name).convert("L").getextrema()
            self.assertGreater(high, low + 50)
        arr = np.load(out / "samples.npz", allow_pickle=False)["arr_0"]
        self.assertEqual((arr.shape, arr.dtype), ((9, 8, 8, 3), np.uint8))
        self.assertEqual((out / "log.csv").read_text().splitlines()[0], "step,loss,grad_norm,lr,images_per_s,minutes")
        before = (out / "samples.png").read_bytes()
        code, text, _ = self.command(ncsn, "--sample-only", "--out", out, "--npz")     # same settings, same noise
        self.assertEqual((code, (out / "samples.png").read_bytes()), (0, before))
        drawn, real = [], ncsn.sample
        def spy(net, x, sigma, eps, T, label, denoise, *rest):
            self.assertTrue(0 <= x.min() < 0.1 and 0.9 < x.max() <= 1 and abs(x.mean() - 0.5) < 0.1)      # uniform
            drawn.append((eps, T, label.tolist(), denoise))
            return real(net, x, sigma, eps, T, label, denoise, *rest)
        with mock.patch.object(ncsn, "sample", spy):
            only = ["--sample-only", "--out", out, "--samples", 3]
            self.command(ncsn, *only, "--label", 7, "--eps", 1e-5, "--T", 1, "--no-denoise")
            self.command(ncsn, *only)
        self.assertEqual(drawn, [(1e-5, [1] * 10, [7] * 3, False),                     # sevens, by the flags given now,
                                 (2e-5, [2] * 9 + [3], [0, 1, 2], True)])              # which are not remembered
        ckpt = common.load_checkpoint(out / "ckpt.pt")
        net = common.UNet(1, 8, classes=10).eval()
        y, label = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
        for weights, same in (("ema", True), ("raw", False)):
            net.load_state_dict(ckpt[weights])
            distance = (ncsn.denoiser(ckpt)(y, 0.5, label) - ncsn.denoiser(None, net)(y, 0.5, label)).abs().max()
            self.assertEqual(distance.item() < 1e-5, same)                               # the averaged network
        for flags, words in ((["--label", 10], "--label 10"), (["--width", 16], "--width is 8"), (["--T", 1, 2], "--T gives 2"),
                             (["--device", "cuda:7"], "--device cuda:7")):
            code, _, err = self.command(ncsn, "--sample-only", "--out", out, *flags)
            self.assertEqual(code, 2)
            self.assertIn(words, err)

    def test_training_gets_labels_and_power(self):
        seen, real = [], ncsn.loss
        def spy(net, x, sigma, label, power, objective):
            seen.append((label is not None, power, sigma.tolist(), objective))
            return real(net, x, sigma, label, power, objective=objective)
        with mock.patch.object(ncsn, "loss", spy):
            flags = [*self.tiny(), "--steps", 1, "--levels", 3, "--sigma-max", 4, "--sigma-min", 1]
            self.command(ncsn, *flags, "--out", self.dir / "a", "--classes", "--power", 3)
            self.command(ncsn, *flags, "--out", self.dir / "b", "--power", 0, "--objective", "ssm")
            self.command(ncsn, *flags, "--out", self.dir / "c", "--objective", "ssm-vr", "--precision", "bf16")
        self.assertEqual([s[:2] for s in seen], [(True, 3.0), (False, 0.0), (False, 3.0)])
        self.assertEqual([s[3] for s in seen], ["dsm", "ssm", "ssm-vr"])
        code, _, err = self.command(ncsn, *flags, "--out", self.dir / "d", "--objective", "ssm", "--compile")
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.near(seen[0][2], [4, 2, 1], 1e-6)

    def test_seed_decides_the_first_weights(self):
        first = {}
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            torch.manual_seed(ord(name))                                               # whatever was drawn before
            self.command(ncsn, *self.tiny(), "--steps", 2, "--lr", 1e-9, "--out", self.dir / name, "--seed", seed)
            first[name] = common.load_checkpoint(self.dir / name / "ckpt.pt")["raw"]["conv_in.weight"]
        self.assertTrue(torch.equal(first["a"], first["b"]))
        self.assertFalse(torch.equal(first["a"], first["c"]))

    def test_warns_of_steps_that_overshoot(self):
        flags = [*self.tiny(), "--steps", 1, "--levels", 2]
        for eps, words in ((2e-5, None), (2.2e-4, "r > 1"), (4.4e-4, "diverge")):      # r = 0.1, 1.1, 2.2
            _, text, _ = self.command(ncsn, *flags, "--eps", eps, "--out", self.dir / "run", "--overwrite")
            self.assertEqual("warn" in text, words is not None)
            self.assertIn(words or "", text)

    def test_folder_of_pictures_end_to_end(self):
        (self.dir / "pictures").mkdir()
        for k in range(8):
            Image.effect_noise((20, 16), 90).convert("RGB").save(self.dir / "pictures" / f"{k}.png")
        flags = [*self.tiny(), "--dataset", self.dir / "pictures", "--out", self.dir / "run"]
        self.assertEqual(self.command(ncsn, *flags, "--sample-every", 2, "--npz")[0], 0)
        self.assertEqual(np.load(self.dir / "run" / "samples.npz")["arr_0"].shape, (9, 16, 20, 3))
        self.assertTrue({"samples_000002.png", "samples_000004.png"} <= {p.name for p in (self.dir / "run").iterdir()})
        code, _, err = self.command(ncsn, *flags, "--overwrite", "--patch", 3)
        self.assertEqual(code, 2)
        self.assertIn("multiples of 6", err)
        self.assertTrue((self.dir / "run" / "ckpt.pt").exists())                       # a mistake costs nothing
        code, _, err = self.command(ncsn, *flags, "--overwrite", "--classes")
        self.assertEqual(code, 2)
        self.assertIn("no labels", err)

    def test_killed_or_interrupted_and_resumed_is_never_stopped(self):
        flags = [*self.tiny(), "--steps", 260, "--save-every", 10, "--sample-every", 50, "--classes", "--dropout", 0.1]
        self.assertEqual(self.command(ncsn, *flags, "--out", self.dir / "whole")[0], 0)
        for number, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
            out = self.dir / number.name
            argv = [sys.executable, HERE / "ncsn.py", *flags, "--out", out]
            process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while not (out / "ckpt.pt").exists() and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(number)
            text, err = process.communicate()
            self.assertEqual(process.returncode, status, err)
            step = state(out / "ckpt.pt")[1]
            self.assertTrue(10 <= step < 260)
            if number != signal.SIGKILL:
                self.assertIn(f"stop   after step {step}; go on with --resume", text)
            self.assertEqual(self.command(ncsn, *flags[:2], "--out", out, "--resume")[0], 0)
            self.same(out, self.dir / "whole")
            for name in ("samples.png", "samples_000250.png"):
                self.assertEqual((out / name).read_bytes(), (self.dir / "whole" / name).read_bytes())

    def test_a_run_is_not_overwritten_unless_asked(self):
        flags, out = [*self.tiny(), "--out", self.dir / "run"], self.dir / "run"
        self.command(ncsn, *flags)
        before = {p: p.read_bytes() for p in out.iterdir()}
        code, _, err = self.command(ncsn, *flags)
        self.assertEqual(code, 2)
        self.assertIn("already holds a run", err)
        self.assertEqual(before, {p: p.read_bytes() for p in out.iterdir()})
        self.assertEqual(self.command(ncsn, *flags, "--overwrite", "--seed", 5)[0], 0)
        self.assertNotEqual(before[out / "ckpt.pt"], (out / "ckpt.pt").read_bytes())

    def test_checkpoints_that_cannot_be_used(self):
        flags, out = [*self.tiny(), "--out", self.dir / "run"], self.dir / "run"
        code, _, err = self.command(ncsn, *flags, "--resume")
        self.assertEqual(code, 2)
        self.assertIn("no checkpoint", err)
        self.command(ncsn, *flags)
        good = (out / "ckpt.pt").read_bytes()
        foreign = io.BytesIO()
        torch.save({**common.load_checkpoint(out / "ckpt.pt"), "script": "ddpm"}, foreign)
        other = io.BytesIO()
        torch.save([1, 2], other)
        for bad, words in ((good[:len(good) // 2], "damaged"), (b"", "damaged"), (foreign.getvalue(), "made by ddpm.py"),
                           (other.getvalue(), "damaged"), (good[:1000] + b"\0" * 1000 + good[2000:-500], "damaged")):
            (out / "ckpt.pt").write_bytes(bad)
            for mode in ("--resume", "--sample-only"):
                code, _, err = self.command(ncsn, *flags, mode)
                self.assertEqual((code, err.count("\n")), (2, 1))
                self.assertIn(words, err)
            self.assertEqual((out / "ckpt.pt").read_bytes(), bad)                      # nothing lost

    def test_no_pickle_is_run(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(here),)
        here = self.dir / "evil"
        torch.save({"script": "ncsn", "args": Evil()}, self.dir / "ckpt.pt")
        self.refuses("damaged", common.load_checkpoint, self.dir / "ckpt.pt")
        self.assertFalse(here.exists())

    def test_full_disk_keeps_the_old_checkpoint(self):
        flags, out = [*self.tiny(), "--out", self.dir / "run"], self.dir / "run"
        self.command(ncsn, *flags)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        def full(fd):
            raise OSError(28, "No space left on device")
        with mock.patch.object(os, "fsync", full):
            code, _, err = self.command(ncsn, *flags, "--resume", "--steps", 9, "--save-every", 8)
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("ckpt.pt (No space left on device)", err)
        self.assertEqual(before, {p.name: p.read_bytes() for p in out.iterdir()})      # and no half file beside it
        self.assertEqual(self.command(ncsn, *flags, "--resume", "--steps", 9)[0], 0)

    def test_loss_that_is_not_finite_stops_before_the_checkpoint(self):
        flags, out = [*self.tiny(), "--out", self.dir / "run"], self.dir / "run"
        self.command(ncsn, *flags)
        before = (out / "ckpt.pt").read_bytes()
        for broken in (lambda *a, **k: real(*a, **k) * math.nan, lambda *a, **k: real(*a) + (0 * real(*a)).sqrt()):   # value, gradient
            real = ncsn.loss
            with mock.patch.object(ncsn, "loss", broken):
                code, _, err = self.command(ncsn, *flags, "--resume", "--steps", 9, "--save-every", 8)
            self.assertEqual((code, err.count("\n")), (2, 1))
            self.assertIn("not finite in the steps up to 8", err)
            self.assertEqual((out / "ckpt.pt").read_bytes(), before)

    def test_adam_learning_rate_ema_and_data(self):
        flags = ["--out", self.dir / "run", *self.tiny()[:6], "--steps", 40, "--lr", 0.01, "--ema", 0.3, "--precision", "fp32"]
        with mock.patch.object(sys, "argv", ["x", *map(str, flags)]):
            parser = common.arguments("")
            for flag, kind in (("--steps", int), ("--batch-size", int), ("--lr", float), ("--ema", float)):
                parser.add_argument(flag, type=kind)
            args, _ = common.settings(parser, "x")
        net = common.UNet(1, 8)
        images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 4, 4)
        with contextlib.redirect_stdout(io.StringIO()):
            run = common.Run(args, "x", net, None, low=-1.0)
            averages, weights, rates, seen = [], [net.conv_out.bias.detach().clone()], [], []
            for x, label in run.batches(images, torch.arange(50)):
                self.near(x[:, 0, 0, 0], label / 127.5 - 1, 1e-6)                      # in [low, 1], with its own label
                seen.append(label)
                run.step(1000 * (run.net(x, x[:, 0, 0, 0]) - 1).square().mean())
                if run.n == 1:                                                         # Adam saw a gradient of norm 1
                    first = [run.opt.state[p]["exp_avg"].flatten() for p in net.parameters() if p in run.opt.state]
                    self.near(torch.cat(first).norm(), 0.1, 1e-3)
                weights.append(net.conv_out.bias.detach().clone())
                averages.append(run.ema.conv_out.bias.clone())
                rates.append(run.opt.param_groups[0]["lr"])
        average = weights[0]
        for n in range(40):
            decay = min(0.3, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * weights[n + 1]
            self.near(averages[n], average, 1e-6)
            f = (n + 1) / 40
            self.near(rates[n], 0.01 * min(1, 20 * f) * (1 + math.cos(math.pi * f)) / 2, 1e-9)
        self.near((weights[1] - weights[0]).abs(), rates[0], 1e-6)                     # Adam's first step is lr
        self.assertGreater(len(torch.cat(seen).unique()), 45)
        recent = state(self.dir / "run" / "ckpt.pt")[0]["recent"]
        self.assertLess(recent[39, 0], 0.2 * recent[0, 0])                             # and it learns

    def test_bad_flags_are_one_sentence(self):
        for flags in (["--steps", 0], ["--eps", -1], ["--dropout", 1], ["--T", 0], ["--dataset", "nowhere"], ["--levels", -3],
                      ["--width", 12], ["--sigma-min", 2]):
            code, _, err = self.command(ncsn, *self.tiny(), "--out", self.dir / "run", *flags)
            self.assertEqual((code, err.count("\n")), (2, 1), flags)
            self.assertIn(str(flags[0]), err)
            self.assertFalse((self.dir / "run").exists())

class DiffusionRuns(Case):
    """ddpm.py from its command line, on tiny images."""
    def flags(self):
        return [*self.tiny()[:10], "--T", 30]

    def test_all_objectives_train_and_all_samplers_draw(self):
        for objective, predict in (("simple", "v"), ("hybrid", "eps"), ("vlb", "x0")):
            out = self.dir / objective
            code, text, err = self.command(ddpm, *self.flags(), "--objective", objective, "--predict", predict, "--classes",
                                           "--out", out, "--schedule", "cosine", "--npz")
            self.assertEqual((code, err), (0, ""))
            self.assertEqual(sorted(p.name for p in out.iterdir()), ["ckpt.pt", "log.csv", "loss.png", "process.gif",
                             "process.png", "samples.npz", "samples.png"])
            with Image.open(out / "process.gif") as gif:
                self.assertEqual(gif.n_frames, 31)                         # x_t and x_0 at every step, and the end
            before = (out / "samples.png").read_bytes()
            self.command(ddpm, "--sample-only", "--out", out)
            self.assertEqual(before, (out / "samples.png").read_bytes())   # same settings, same noise
            calls, only = [], ["--sample-only", "--out", out]
            names = ("sample", "ancestral", "ddim")
            spies = [mock.patch.object(ddpm, n, lambda *a, n=n, real=getattr(ddpm, n): calls.append((n, *a[3:])) or real(*a))
                     for n in names]
            with contextlib.ExitStack() as stack:
                [stack.enter_context(s) for s in spies]
                for extra in ([], ["--variance", "beta"], ["--variance", "beta-tilde"], ["--sample-steps", 5, "--label", 3],
                              ["--sampler", "ddim", "--eta", 0.5, "--sample-steps", 5, "--guidance", 2],
                              ["--sampler", "langevin"]):
                    self.assertEqual(self.command(ddpm, *only, *extra)[0], 0, extra)
            five, every = [0, 1, 8, 16, 23, 30], list(range(31))
            kind = "beta" if objective == "simple" else "learned"
            self.assertEqual(calls, [("sample",) if kind == "beta" else ("ancestral", every, "learned", None), ("sample",),
                                     ("ancestral", every, "beta-tilde", None), ("ancestral", five, kind, None),
                                     ("ddim", five[::-1], 0.5)])

    def test_labels_guidance_clip_and_temperature_reach_the_network(self):
        out = self.dir / "run"
        self.command(ddpm, *self.flags(), "--classes", "--out", out)
        seen, real = [], ddpm.predictor
        def spy(net, abar, predict, label, w, clip, *rest):
            seen.append((label.tolist(), w, clip))
            f = real(net, abar, predict, label, w, clip, *rest)
            return lambda x, t: seen.append(x.std()) or f(x, t) if t[0] == 30 else f(x, t)
        with mock.patch.object(ddpm, "predictor", spy):
            self.command(ddpm, "--sample-only", "--out", out, "--samples", 12)
            self.command(ddpm, "--sample-only", "--out", out, "--samples", 2, "--label", 7, "--guidance", 1.5, "--no-clip",
                         "--temperature", 0.5)
        self.assertEqual(seen[::2], [([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1], 0.0, True), ([7, 7], 1.5, False)])
        self.near(seen[1], 1, 0.1)
        self.near(seen[3], 0.5, 0.1)

    def test_bound_strips_and_the_kept_second_moment(self):
        out, data = self.dir / "run", self.tiny()[:2]
        self.command(ddpm, *self.flags(), "--classes", "--out", out)
        only = ["--sample-only", "--out", out, *data]
        before = (out / "samples.png").stat().st_mtime_ns
        code, text, err = self.command(ddpm, *only, "--evaluate-bound", 8, "--variance", "analytic")
        self.assertEqual((code, err), (0, ""))
        rows = list(csv.DictReader((out / "bound.csv").read_text().splitlines()))
        L = [float(r["bits_per_dim"]) for r in rows]
        total = float(re.search(r"sum ([\d.]+) ", text)[1])
        self.near(total, sum(L) + float(re.search(r"L_T ([\d.e-]+)", text)[1]), 1e-3)
        self.near(L[0], float(re.search(r"L_0 ([\d.]+)", text)[1]), 1e-3)
        self.near(sum(L[1:]), float(re.search(r"L_1..T-1 ([\d.]+)", text)[1]), 1e-3)
        self.near(float(rows[0]["rate"]), total - L[0], 1e-3)              # from x_1 all but L_0 is known
        self.near(float(rows[-1]["rate"]), total - sum(L), 1e-3)           # and from x_T only L_T
        self.assertEqual([int(float(r["t"])) for r in rows], list(range(1, 31)))
        for name in ("rate-distortion.png", "entropy.png"):
            low, high = Image.open(out / name).convert("L").getextrema()
            self.assertGreater(high, low + 50)
        self.assertTrue((out / "gamma.pt").exists())                       # of the network in float32; then in its own
        self.command(ddpm, *only, "--variance", "analytic", "--sample-steps", 3)
        kept = (out / "gamma.pt").read_bytes()
        self.command(ddpm, *only, "--variance", "analytic", "--sample-steps", 3)
        self.assertEqual(kept, (out / "gamma.pt").read_bytes())            # not estimated again,
        (out / "gamma.pt").write_bytes(kept[:100])
        self.command(ddpm, *only, "--variance", "analytic", "--sample-steps", 3)
        self.assertEqual(kept[:50], (out / "gamma.pt").read_bytes()[:50])  # unless damaged
        self.assertGreater(len((out / "gamma.pt").read_bytes()), 500)
        after = (out / "samples.png").stat().st_mtime_ns
        for strip, shape in (("steps", (10, 6)), ("guidance", (10, 9)), ("interpolate", (11, 6))):
            code, text, err = self.command(ddpm, *only, "--strip", strip)
            self.assertEqual((code, err), (0, ""))
            with Image.open(out / f"{strip}.png") as im:
                w, h = im.size
            self.near(w / h, (2 + 10 * shape[0]) / (2 + 10 * shape[1]), 0.01)
        self.assertEqual(after, (out / "samples.png").stat().st_mtime_ns)  # they draw nothing else
        self.assertLess(before, after)
        errors = [float(e) for e in re.findall(r"squared error ([\d.]+)", text)]
        self.assertEqual(len(errors), 3)                                   # 10, 20, 30 = T steps
        self.assertTrue(255 > errors[0] > errors[1] > errors[2])           # clipped: without, the step from T explodes
        self.command(ddpm, *self.flags(), "--out", out, "--overwrite", "--samples", 1)
        self.assertFalse(any((out / n).exists() for n in ("gamma.pt", "bound.csv", "entropy.png", "steps.png")))

    def test_the_bound_is_float32_of_the_learned_variance_and_clipped_unless_asked(self):
        out, seen, real = self.dir / "run", [], ddpm.evaluate_bound
        def spy(net, images, abar, N, predict, variance, gamma, clip):
            seen.append((net.bf16, len(images), N, predict, variance, gamma is None, clip))
            return real(net, images, abar, N, predict, variance, gamma, clip)
        with mock.patch.object(ddpm, "evaluate_bound", spy):
            flags = [*self.flags(), "--objective", "hybrid", "--predict", "v", "--precision", "bf16", "--out", out]
            self.command(ddpm, *flags, "--evaluate-bound", 5)
            self.assertFalse((out / "samples.png").exists())
            self.command(ddpm, "--sample-only", "--out", out, *flags[:2], "--evaluate-bound", 6, "--no-clip")
            self.command(ddpm, "--sample-only", "--out", out, *flags[:2], "--evaluate-bound", 7, "--variance", "analytic")
            self.command(ddpm, "--resume", "--out", out, *flags[:2])       # asks for no bound: draws
        self.assertTrue((out / "samples.png").exists())
        self.assertEqual(seen, [(False, 64, 5, "v", "learned", True, True), (False, 64, 6, "v", "learned", True, False),
                                (False, 64, 7, "v", "analytic", False, True)])

    def test_grids_in_training_are_drawn_quickly(self):
        paths, real = [], ddpm.ddim
        with mock.patch.object(ddpm, "ddim", lambda net, x, abar, path, eta: paths.append((path, eta)) or
                               real(net, x, abar, path, eta)):
            flags = [*self.tiny()[:10], "--T", 60, "--sample-every", 2, "--variance", "analytic", "--out", self.dir / "run"]
            code, _, err = self.command(ddpm, *flags)
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(paths, [(ddpm.subsequence(60, 50)[::-1], 0.0)] * 2)           # after steps 2 and 4 of 6
        self.assertTrue((self.dir / "run" / "samples_000004.png").exists())

    def test_killed_or_interrupted_and_resumed_is_never_stopped(self):
        flags = [*self.flags(), "--objective", "vlb", "--classes", "--dropout", 0.1, "--samples", 1]
        self.command(ddpm, *flags, "--steps", 60, "--out", self.dir / "whole")
        real = ddpm.vlb_loss
        def stops(*a, **k):
            steps.append(1)
            if len(steps) == 25:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*a, **k)
        steps = []
        with mock.patch.object(ddpm, "vlb_loss", stops):
            code, text, _ = self.command(ddpm, *flags, "--steps", 60, "--out", self.dir / "parts")
        self.assertEqual(code, 130)
        self.assertEqual(self.command(ddpm, "--resume", "--out", self.dir / "parts", *flags[:2])[0], 0)
        self.same(self.dir / "parts", self.dir / "whole")                  # the history of the losses too
        history = common.load_checkpoint(self.dir / "parts" / "ckpt.pt")["raw"]["history"]
        self.assertEqual(history.shape, (30, 10))
        self.assertTrue((history.isfinite().sum(1) > 4).all())

    def test_bad_flags_are_one_sentence(self):
        out = self.dir / "run"
        self.command(ddpm, *self.flags(), "--out", out)
        for flags, words in ((["--label", 1], "--label 1"), (["--guidance", 1], "--guidance"), (["--strip", "guidance"], "--guidance"),
                             (["--variance", "learned"], "--variance learned"), (["--sample-steps", 31], "--sample-steps 31"),
                             (["--sampler", "ddim", "--variance", "beta"], "--variance"), (["--eta", 1], "--eta"),
                             (["--sampler", "ddim", "--eta", 1.5], "--eta"), (["--evaluate-bound", 1], "--evaluate-bound"),
                             (["--evaluate-bound", 9, "--strip", "steps"], "one at a time"),
                             (["--sampler", "langevin", "--sample-steps", 9], "--sampler langevin"), (["--eta", -1], "--eta"), (["--predict", "x0"], "--predict is eps"), (["--T", 40], "--T is 30"),
                             (["--objective", "vlb"], "--objective is simple"), (["--schedule", "linear"], "--schedule is cosine")):
            code, _, err = self.command(ddpm, "--sample-only", "--out", out, *flags)
            self.assertEqual((code, err.count("\n")), (2, 1), flags)
            self.assertIn(words, err)
        code, _, err = self.command(ddpm, *self.flags(), "--out", self.dir / "new", "--T", 5, "--schedule", "linear")
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("--T 5 is too few", err)
        code, _, err = self.command(ncsn, "--sample-only", "--out", out)
        self.assertIn("made by ddpm.py", err)

    def test_pictures_of_a_folder(self):
        (self.dir / "pictures").mkdir()
        for k in range(5):
            Image.effect_noise((20, 16), 90).convert("RGB").save(self.dir / "pictures" / f"{k}.png")
        out, flags = self.dir / "run", [*self.flags(), "--dataset", self.dir / "pictures"]
        self.assertEqual(self.command(ddpm, *flags, "--objective", "hybrid", "--out", out)[0], 0)
        code, _, err = self.command(ddpm, "--sample-only", "--out", out, "--strip", "interpolate")
        self.assertEqual((code, err), (0, ""))
        with Image.open(out / "interpolate.png") as im:                    # two pairs of the five
            self.near(im.size[0] / im.size[1], (2 + 11 * 22) / (2 + 2 * 18), 0.01)
        code, _, err = self.command(ddpm, "--sample-only", "--out", out, "--evaluate-bound", 4)
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("has no test images", err)

    def test_drawing_keeps_the_settings_of_the_run_and_takes_new_ones(self):
        out, settings = self.dir / "run", []
        self.command(ddpm, *self.flags(), "--sampler", "ddim", "--eta", 1, "--sample-steps", 4, "--out", out)
        real = ddpm.ddim
        with mock.patch.object(ddpm, "ddim", lambda net, x, abar, path, eta: settings.append((len(path), eta)) or
                               real(net, x, abar, path, eta)):
            self.command(ddpm, "--sample-only", "--out", out)
            self.command(ddpm, "--sample-only", "--out", out, "--eta", 0)
        self.assertEqual(settings, [(5, 1.0), (5, 0.0)])
        self.command(ddpm, "--sample-only", "--out", out, "--sampler", "ddim", "--eta", 0.5, "--strip", "steps")
        self.assertEqual(common.load_checkpoint(out / "ckpt.pt")["args"]["eta"], 1)
        drawn = []
        for _ in range(2):                                                 # the second finds gamma.pt
            code, _, err = self.command(ddpm, "--sample-only", "--out", out, *self.flags()[:2], "--sampler", "ddpm",
                                        "--variance", "analytic")
            self.assertEqual((code, err), (0, ""))
            drawn.append((out / "samples.png").read_bytes())
        self.assertEqual(*drawn)

WORKER = """
import sys; sys.path.insert(0, {here!r})
import torch, common, {script}
seen = []
real = common.Run.batches
def batches(run, *a):
    for x, label in real(run, *a):
        seen.append((x.clone(), torch.rand(1, generator=torch.Generator().set_state(torch.get_rng_state()))))
        yield x, label
        final.update(run.raw.state_dict(), **{{"ema " + k: v for k, v in run.ema.state_dict().items()}})
final = {{}}
common.Run.batches = batches
common.cli({script}.main)
rank = torch.distributed.get_rank()
torch.save([final, torch.stack([x for x, _ in seen]), torch.stack([z for _, z in seen])], f"{folder}/rank{{rank}}.pt")
torch.distributed.destroy_process_group()
"""

class Processes(Case):
    def two(self, script, *flags):
        """What each of two processes of SCRIPT under torchrun ended with, and what they printed."""
        (self.dir / "worker.py").write_text(WORKER.format(here=str(HERE), folder=str(self.dir), script=script))
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, self.dir / "worker.py",
                *flags, "--out", self.dir / "two"]
        done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return [torch.load(self.dir / f"rank{r}.pt") for r in (0, 1)], done.stdout

    def test_two_processes_share_the_history_of_the_bound(self):
        flags = [*self.tiny()[:10], "--T", 30, "--objective", "vlb", "--steps", 12, "--batch-size", 16]
        ((a, _, _), (b, _, _)), _ = self.two("ddpm", *flags)
        for k in a:
            self.assertTrue(torch.equal(a[k], b[k]), k)
        self.assertGreater(a["history"].isfinite().sum(), 12 * 16 * 0.6)               # the losses of both, not of one

    def test_two_processes_train_as_one(self):
        flags = [*self.tiny(n=2000), "--steps", 120, "--batch-size", 64, "--lr", 3e-3, "--save-every", 50]
        ((a, xa, za), (b, xb, zb)), text = self.two("ncsn", *flags)
        self.assertEqual(text.count("step      120/120"), 1)                           # one process speaks and saves
        self.assertEqual(a.keys(), b.keys())
        for k in a:
            self.assertTrue(torch.equal(a[k], b[k]), k)                                # replicas: equal to the last bit
        saved = common.load_checkpoint(self.dir / "two" / "ckpt.pt")
        self.assertTrue(torch.equal(saved["raw"]["conv_out.bias"], a["conv_out.bias"]))
        self.assertEqual(xa.shape, (120, 32, 1, 8, 8))
        self.assertGreater((xa - xb).abs().amax((2, 3, 4)).mean(), 0.5)                # other images,
        self.assertTrue((za != zb).all())                                              # other noise
        self.assertEqual(self.command(ncsn, *flags, "--out", self.dir / "one")[0], 0)
        one, two = (common.load_checkpoint(self.dir / k / "ckpt.pt")["rows"] for k in ("one", "two"))
        for row_1, row_2 in zip(one, two):
            self.near(row_2[1] / row_1[1], 1, 0.03)                                    # the same loss, within noise
            self.near(row_2[2] / row_1[2], 1, 0.5)
        code, _, err = self.command(ncsn, *flags, "--out", self.dir / "two", "--resume", "--steps", 121)
        self.assertEqual((code, err), (0, ""))

class Reached(BaseException):
    """A command's flags were accepted and its work would begin."""

class ReadmeWalk(Case):
    """README.md as a reader walks it. Its commands are run by bash, where python only notes its arguments: loops and
    variables are bash's own. A comment with `quick` in it: the command is run, and writes the file that the comment
    names. Copied code assigns drawn images to x and a loss to l."""
    scripts = {"ncsn": ncsn, "ddpm": ddpm, "sde": sde, "inpaint": inpaint, "toy": toy, "common": ncsn}
    blank = r"\b[A-Z]{2,}\b|(?<= )[A-Z]\b"                                # a WORD, or N: to be filled in
    prelude = ("set -eu; exec 3>&1; pass() { :; }; "
               "note() { { printf '%s\\t' \"${BASH_LINENO[1]}\" \"$@\"; echo; } >&3; }; "
               "for c in python torchrun pip pytest; do eval \"$c() { note $c \\\"\\$@\\\"; }\"; done; "
               "for c in git cd source .; do eval \"$c() { pass; }\"; done")

    def setUp(self):
        super().setUp()
        self.text = (HERE / "README.md").read_text()

    def blocks(self, text, kind):
        """[(line number, code)] of the fenced blocks of this kind."""
        found = re.finditer(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S)
        return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in found]

    def inline(self, text):
        """[(line number, code)] of the inline code."""
        prose = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
        found = re.finditer(r"`((?:(?!\n\n)[^`])+)`", prose)
        return [(prose.count("\n", 0, m.start()) + 1, m[1].replace("\n", " ")) for m in found]

    def commands(self, text, inline=True):
        """[(line number, argv)] of the commands in sh blocks and, but for those with a blank to be filled in, in
        inline code. Each block is a subshell where it is in the text, so bash's complaints name its lines."""
        if not shutil.which("bash"):
            self.skipTest("there is no bash")
        script = [""] * (text.count("\n") + 2)
        for n, code in self.blocks(text, "sh"):
            script[n - 1:n - 1 + code.count("\n")] = code.splitlines()
            script[n - 2], script[n - 1 + code.count("\n")] = "(", ")"
        for n, code in self.inline(text) if inline else ():
            if re.match(r"(python|torchrun|pip) ", code) and not re.search(self.blank, code):
                script[n - 1] += f"( {code} );"
        script[0] = self.prelude + ";" + script[0]
        (self.dir / "README.md").write_text("\n".join(script))
        done = subprocess.run(["bash", "README.md"], cwd=self.dir, env={"PATH": ""}, capture_output=True, text=True,
                              executable=shutil.which("bash"))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        rows = [line.split("\t")[:-1] for line in done.stdout.splitlines()]
        return [(int(row[0]), row[1:]) for row in rows]

    def accepts(self, argv):
        """(complaint or "", argparse's result) of `python ARGV`, which goes on until its work would begin."""
        seen, real, processes = [], argparse.ArgumentParser.parse_args, 1
        program, *argv = argv[2:] if argv[:2] == ["python", "-m"] else argv
        if program == "pip":
            needs = re.findall(r"^\w+", (HERE / "requirements.txt").read_text(), re.M)
            known = ["install", "-r", "requirements.txt", "--index-url", *needs]
            return ", ".join(f"who needs {v}?" for v in argv if v not in known and "://" not in v), None
        if program == "torchrun":
            from torch.distributed.run import get_args_parser
            try:
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    run = get_args_parser().parse_args(argv)
            except SystemExit:
                return err.getvalue().splitlines()[-1], None
            argv, processes = [run.training_script, *run.training_script_args], int(run.nproc_per_node)
        elif program != "python":                                          # venv, pytest
            return "", None
        if argv[0] == "-c":
            return compile(argv[1], "README.md", "exec") and "", None      # python's own complaint names the line
        if not argv or not (HERE / argv[0]).is_file():
            return f"there is no {' '.join(argv[:1])}", None
        if argv[0] == "test_all.py":
            unknown = [v for v in argv[1:] if not hasattr(sys.modules[__name__], v.split(".")[0])]
            return ", ".join(f"there is no test {v}" for v in unknown), None
        def parse(parser, *args, **kwargs):
            seen.append(real(parser, *args, **kwargs))
            if run := getattr(seen[-1], "run", None):                      # inpaint.py looks whether it is there
                Path(run).mkdir(parents=True)
                (Path(run) / "ckpt.pt").touch()
            return seen[-1]
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", parse))
            stack.enter_context(mock.patch("torch.distributed.init_process_group"))
            stack.enter_context(mock.patch.dict(os.environ, WORLD_SIZE=str(processes), LOCAL_RANK="0"))
            for work in ("torch.manual_seed", "common.load_checkpoint", "toy.load_images",
                         "concurrent.futures.ProcessPoolExecutor"):
                stack.enter_context(mock.patch(work, side_effect=Reached))
            try:
                code, _, err = self.command(self.scripts[Path(argv[0]).stem], *argv[1:])
            except Reached:
                code, err = 0, ""
        return err.strip().splitlines()[-1] if code else "", seen[-1] if seen else None

    def test_commands_parse_and_draw_only_from_runs_that_a_command_trains(self):
        wrong, made, used = [], set(), []
        rest = re.sub(r"^```(sh|python)$.*?^```$", "", self.text, flags=re.M | re.S)
        self.assertEqual(re.findall(r"^[ $>]*(?:python|pip|torchrun) .*", rest, re.M), [], "not in a block of sh")
        for n, argv in self.commands(self.text):
            complaint, args = self.accepts(argv)
            if complaint:
                wrong.append(f"README.md, line {n}: {' '.join(argv)}: {complaint}")
            elif args:
                a = vars(args)
                script = next(Path(v).stem for v in argv if v.endswith(".py"))
                draws = a.get("sample_only") or a.get("resume")
                out = a["out"] or f"runs/{script}-{Path(a.get('dataset', '')).name}"
                if "steps" in a and not (draws or a.get("origin") or a.get("derive") or a.get("benchmark")):
                    made.add(out)
                used += [(n, r) for r in (a.get("run"), a.get("origin"), a.get("classifier"), a.get("encode"),
                                          out if draws else None) if r]
        wrong += [f"README.md, line {n}: no command trains {run}" for n, run in used if run not in made]
        self.assertEqual("\n".join(wrong), "")
        self.assertGreater(len(made), 3)

    def test_commands_of_the_docstrings_parse(self):
        for name in self.scripts:
            doc = (HERE / f"{name}.py").read_text().split('"""')[1]
            text = "".join(f"```sh\n{line}\n```\n" if line.startswith("    python ") else "\n"
                           for line in doc.splitlines())
            for _, argv in self.commands(re.sub(rf" ({self.blank}).*", "", text), inline=False):
                self.assertEqual(self.accepts(argv)[0], "", f"{name}.py: {' '.join(argv)}")

    def test_flags_in_the_text_exist(self):
        actions, wrong = {}, []
        def collect(parser, *args, **kwargs):
            for option, action in parser._option_string_actions.items():
                actions.setdefault(option, []).append(action)
            raise Reached
        from torch.distributed.run import get_args_parser
        for main in (lambda: get_args_parser().parse_args(), *(module.main for module in self.scripts.values())):
            with mock.patch.object(argparse.ArgumentParser, "parse_args", collect), self.assertRaises(Reached):
                main()
        def takes(action, value):
            with contextlib.suppress(ValueError):
                v = action.type(value) if action.type else value
                return action.nargs != 0 and (action.choices is None or v in action.choices)
        for n, code in self.inline(self.text):
            words = code.replace("=", " ").split() or [""]
            if not words[0].startswith("--"):
                continue
            for flag, value in zip(words, [*words[1:], "--"]):
                if flag.startswith("--") and not value.startswith("--") and not re.fullmatch("[A-Z]+|[a-z]", value):
                    if not any(takes(action, value) for action in actions.get(flag, ())):
                        wrong.append(f"README.md, line {n}: no script takes {flag} {value}")
                elif flag.startswith("--") and flag not in actions:
                    wrong.append(f"README.md, line {n}: no script has {flag}")
        self.assertEqual("\n".join(wrong), "")

    def test_quick_commands_run_and_make_what_they_name(self):
        quick, lines = [], self.text.splitlines()
        for n, argv in self.commands(self.text, inline=False):
            comment = lines[n - 1].partition(" #")[2]
            if re.search(r"\bquick\b", comment):
                quick.append((n, argv, re.findall(r"[\w./-]+\.(?:png|gif|csv|npz|pt)\b", comment)))
        self.assertGreater(len(quick), 1, "no command of README.md is marked quick")
        for path in HERE.glob("*.py"):
            shutil.copy(path, self.dir)
        nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
        env = {**os.environ, "OMP_NUM_THREADS": "1", **nowhere, "no_proxy": ""}        # nothing can be downloaded
        for n, argv, files in quick:
            where = f"README.md, line {n}: {' '.join(argv)}"
            self.assertEqual([f for f in files if (self.dir / f).exists()], [], where)
            done = subprocess.run([sys.executable, *argv[1:]], cwd=self.dir, env=env, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""), where)
            for f in files:
                self.assertTrue((self.dir / f).is_file(), f"{where} made no {f}")
                if f.endswith(("png", "gif")):
                    with Image.open(self.dir / f) as im:
                        im.load()

    def test_pictures_links_and_names_exist(self):
        text = re.sub(r"^```.*?^```$", "", self.text, flags=re.M | re.S)
        links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
        headings = [h.strip().lower() for h in re.findall(r"^#+ (.*)$", text, re.M)]
        anchors = {re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings}
        local = [link for link in links if not re.match(r"\w+:", link)]
        self.assertEqual([v for v in local if v[0] == "#" and v[1:] not in anchors], [])
        files = {v.partition("#")[0] for v in local if v[0] != "#"}
        self.assertEqual([f for f in sorted(files) if not (HERE / f).exists()], [])
        pictures = {f for f in files if re.search(r"\.(png|gif|jpe?g|svg)$", f)}
        for f in pictures:
            with Image.open(HERE / f) as im:
                im.load()
                self.assertIn(im.format, ("PNG", "GIF"), f)
        self.assertEqual({f"assets/{p.name}" for p in (HERE / "assets").iterdir()} - pictures, set(), "never shown")
        tests = {name for kind in globals().values() if isinstance(kind, type) for name in dir(kind)}
        named = set(re.findall(r"\btest_\w+", text)) - {"test_all"}
        self.assertEqual(named - tests, set())

    def test_lines_and_tests_are_counted_rightly(self):
        found, at = {}, None
        for line in self.text.splitlines():
            cells = [c.strip() for c in line.strip("| ").split("|")] if line.startswith("|") else []
            if at is None or not cells:
                at = cells.index("lines") if "lines" in cells else None
            elif (m := re.match(r"\[(\w+\.py)\]", cells[0])) and len(cells) > at and cells[at]:
                found[m[1]] = int(cells[at].replace(",", ""))
        self.assertEqual(found, {name: (HERE / name).read_text().count("\n") for name in found})
        total = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]).countTestCases()
        claims = {int(v.replace(",", "")) for v in re.findall(r"\b(\d[\d,]*) tests\b", self.text)}
        self.assertEqual(claims - {total}, set())

    def copied(self, code, net):
        """Images drawn and losses, two lists, of copied code in which every UNet is net(x, noise, label, its names)."""
        class Net(nn.Module):
            def __init__(self, *args, **kwargs):
                super().__init__()
                self.fixed = common.UNet(*args, **kwargs)                  # the arguments must do

            def forward(self, x, noise, label=None):
                assert noise.shape == x.shape[:1]
                return net(x, noise, label, names)
        names, drawn = {}, {"x": [], "l": []}
        tree = ast.parse(code)
        for node in tree.body:
            exec(compile(ast.Module([node], []), "README.md", "exec"), names)
            if isinstance(node, ast.ImportFrom) and "UNet" in names:
                names["UNet"] = Net
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in drawn:
                drawn[node.targets[0].id].append(names[node.targets[0].id])
        return drawn["x"], drawn["l"]

    def test_copied_code_learns_and_draws(self):
        """With the exact network of independent pixels N(m, s^2): drawn images have their mean and deviation; and with
        that of the images given, uniform noise, the loss is less than half of that of a silent network."""
        def exact(m, s):
            def net(x, noise, label, names):                               # z expected from x, whatever the script
                if "ncsn" in code:                                         # images in [0, 1]
                    return gaussian((m + 1) / 2, s / 2)(x, noise)
                sigma = noise.exp() if "sde" in code else ((1 - names["abar"]) / names["abar"]).sqrt()[noise.long()]
                sigma = sigma.float().view(-1, 1, 1, 1)
                y = x * (1 + sigma ** 2).sqrt()
                return sigma * (y - m) / (s ** 2 + sigma ** 2)
            return net
        m, s = 0.1, 0.4
        for n, code in self.blocks(self.text, "python"):
            torch.manual_seed(0)
            drawn, _ = self.copied(code, exact(m, s))
            losses = []
            for net in (exact(0.0, 3 ** -0.5), lambda x, *_: 0 * x):
                torch.manual_seed(1)
                losses.append(self.copied(code, net)[1])
            where = f"README.md, the code from line {n}"
            if "UNet" in code:
                self.assertGreater(len(drawn) * len(losses[0]), 0, f"{where} assigns nothing to x, or to l")
            for x in drawn:
                self.assertEqual(x.shape[1:], (1, 28, 28), where)
                x = 2 * x - 1 if "ncsn" in code else x
                self.assertLess(abs(x.mean() - m), 0.02, where)
                self.assertLess(abs(x.std() / s - 1), 0.3, where)     # ten steps of heun: 27 % too large
            for l, silent in zip(*losses):
                self.assertLess(l, 0.5 * silent, where)

if __name__ == "__main__":
    result = unittest.main(exit=False).result
    failed, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0 or result.testsRun == 0)
