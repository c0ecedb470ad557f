"""Score-based generative modelling through stochastic differential equations (SDEs), on small images.

Papers   Song et al. 2021, arXiv:2011.13456 (equation numbers without a name: v2); images in [-1, 1], dequantised
         Song, Durkan, Murray & Ermon 2021, arXiv:2101.09258 (ScoreFlow): --weighting likelihood
         Jolicoeur-Martineau et al. 2021, arXiv:2105.14080: --sampler adaptive
         Karras et al. 2022, arXiv:2206.00364 (EDM): --sde edm, --sampler heun
Forward  dx = f(x, t) dt + g(t) dw, and in closed form x(t) = a(t) x(0) + s(t) z                       eqs. (5), (29)
Loss     E_t lambda(t) E || s_theta(x(t), t) - grad log p_0t(x(t) | x(0)) ||^2, lambda = s^2                   eq. (7)
Reverse  dx = [f - g^2 s_theta] dt + g dw                                                                      eq. (6)
ODE      dx = [f - g^2 s_theta / 2] dt has the same p_t(x); its divergence gives log p(x)             eqs. (13), (39)
Network  s_theta(x, t) = -eps_theta(y, sigma) / s in y = x / a = x(0) + sigma z, sigma = s / a: every linear SDE is one
         family of noise levels seen through a scale, so every sampler can draw from every network (--from)
Differs  mean over pixels, not sum; a small U-Net that is told log sigma and sees y / sqrt(sigma^2 + 1); a learning
         rate that decays; images are dequantised in training too; steps are exact transitions; see README

    python sde.py --dataset mnist                        # --sde vp; trains, then see runs/sde-mnist/samples.png
    python sde.py --dataset mnist --sample-only --evaluate-bits 100                # exact bits/dim of the test set
    python sde.py --from runs/ddpm-mnist --strip samplers                          # one DDPM, eight samplers
"""
import argparse, csv, functools, math
from pathlib import Path
import torch
import common
import ddpm
import ncsn
import toy
from common import Run, UNet, karras_sigmas, require

# ------------------------------------------------------------------- the SDEs; t and what depends on it: any one shape
class VE:
    """Variance exploding, the limit of NCSN: dx = sqrt(d sigma^2(t) / dt) dw, eqs. (9), (30); t in [eps, T]."""
    def __init__(self, sigma_min=0.01, sigma_max=34.0, eps=1e-5):
        self.low, self.high, self.T, self.eps, self.prior = sigma_min, sigma_max, 1.0, eps, sigma_max
    def kernel(self, t):                                                   # a, s of p_0t = N(a x(0), s^2 I), eq. (31)
        return torch.ones_like(t), self.low * (self.high / self.low) ** t
    def f(self, x, t): return torch.zeros_like(x)
    def g(self, t): return self.kernel(t)[1] * math.sqrt(2 * math.log(self.high / self.low))
    def time(self, sigma):                                                 # the t at which s / a = sigma
        return (sigma / self.low).log() / math.log(self.high / self.low)

class EDM(VE):
    """sigma(t) = t, the choice of EDM: dx = sqrt(2 t) dw, t in [sigma_min, sigma_max]."""
    def __init__(self, sigma_min=0.002, sigma_max=80.0):
        super().__init__(sigma_min, sigma_max, eps=sigma_min)
        self.T = sigma_max
    def kernel(self, t): return torch.ones_like(t), t
    def g(self, t): return (2 * t).sqrt()
    def time(self, sigma): return sigma

class VP:
    """Variance preserving, the limit of DDPM: dx = -beta(t) / 2 x dt + sqrt(beta(t)) dw, eqs. (11), (32)."""
    def __init__(self, beta_min=0.1, beta_max=20.0, eps=1e-3):
        self.low, self.slope, self.T, self.eps, self.prior = beta_min, beta_max - beta_min, 1.0, eps, 1.0
    def beta(self, t): return self.low + t * self.slope
    def B(self, t): return self.low * t + self.slope * t ** 2 / 2          # the integral of beta from 0 to t
    def kernel(self, t):                                                   # expm1: 1 - exp would cancel near t = 0
        return (-self.B(t) / 2).exp(), (-torch.expm1(-self.B(t))).sqrt()                                # eq. (33)
    def f(self, x, t): return -self.beta(t) / 2 * x
    def g(self, t): return self.beta(t).sqrt()
    def time(self, sigma):                                                 # sigma^2 = e^B - 1, B quadratic in t
        B = torch.log1p(sigma ** 2)
        return 2 * B / ((self.low ** 2 + 2 * self.slope * B).sqrt() + self.low)

class SubVP(VP):
    """Sub-VP, whose variance is below VP's: dx = -beta / 2 x dt + sqrt(beta (1 - e^(-2 B))) dw, eq. (12)."""
    def kernel(self, t): return (-self.B(t) / 2).exp(), -torch.expm1(-self.B(t))                        # eq. (29)
    def g(self, t): return (self.beta(t) * -torch.expm1(-2 * self.B(t))).sqrt()
    def time(self, sigma):                                                 # sigma = e^(B/2) - e^(-B/2) = 2 sinh(B / 2)
        return super().time((2 * torch.asinh(sigma / 2)).expm1().sqrt())

def make_sde(args, eps=None):
    """The SDE of these settings; eps: its cut-off where --eps is not given (None: the one to draw with)."""
    if args.sde == "edm":
        return EDM(args.sigma_min or 0.002, args.sigma_max or 80.0)
    if args.sde == "ve":
        return VE(args.sigma_min or 0.01, args.sigma_max or 34.0, args.eps or 1e-5)
    return {"vp": VP, "subvp": SubVP}[args.sde](eps=args.eps or eps or 1e-3)

def sigma_range(sde):
    """sigma = s / a at eps and at T."""
    a, s = sde.kernel(torch.tensor([sde.eps, sde.T], dtype=torch.float64))
    return tuple((s / a).tolist())

def times(sde, N, rho=None):
    """(N + 1,) float64, from T to eps: uniform in t, as in the paper, or with EDM's spacing of sigma, its eq. (5)."""
    uniform = torch.linspace(sde.T, sde.eps, N + 1, dtype=torch.float64)
    return sde.time(karras_sigmas(N + 1, *sigma_range(sde), rho)[:-1]) if rho else uniform

# ---------------------------------------------------------------------------------------------- network and loss
def eps_theta(net, y, sigma, label=None, precond="eps", sigma_data=1.0):
    """Estimate of z in y = x(0) + sigma z, sigma (B,). eps: what net returns. edm: (y - D) / sigma, where
    D = c_skip y + c_out net(c_in y, c_noise), EDM eq. (7), table 1."""
    sigma_, noise = sigma.view(-1, 1, 1, 1), sigma.log()
    c_in = 1 / (sigma_ ** 2 + sigma_data ** 2).sqrt()
    if precond == "eps":
        return net(c_in * y, noise, label)
    # c_skip = sigma_data^2 c_in^2, c_out = sigma sigma_data c_in, c_noise = log(sigma) / 4; divided out, none cancels
    return c_in * (sigma_ * c_in * y - sigma_data * net(c_in * y, noise / 4, label))

def loss(net, x0, sde, label=None, p_null=0.1, weighting="paper", precond="eps", sigma_data=1.0):
    """Continuous denoising score matching, eq. (7), mean over pixels. paper: lambda = s^2, t uniform. likelihood:
    lambda = g^2 (ScoreFlow), t ~ g^2 / s^2 = d log sigma^2 / dt by importance: log sigma uniform. EDM: table 1, on D
    lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; log sigma ~ N(-1.2, 1.2^2) at 0.5, else scaled."""
    u, z = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)
    t = sde.eps + u * (sde.T - sde.eps)
    if isinstance(sde, EDM):
        t = 2 * sigma_data * (1.2 * torch.randn_like(u) - 1.2).exp()
    elif weighting == "likelihood":
        low, high = sigma_range(sde)
        t = sde.time(low * (high / low) ** u)
    a, s = sde.kernel(t.view(-1, 1, 1, 1))
    x = a * x0 + s * z                                                     # x(t) ~ p_0t, eq. (29)
    l = (eps_theta(net, x / a, (s / a).flatten(), ddpm.hide(label, p_null), precond, sigma_data) - z).square()
    return (l * (1 + (s / sigma_data) ** 2) if isinstance(sde, EDM) else l).mean()     # s^2 |s_theta - grad log p_0t|^2

# ---------------------------------- samplers: from x = x(T) to x(0); score(x, t, i), i: which of the samples, or ALL
ALL = slice(None)

def tweedie(score, sde, x, t):
    """E[x(0) | x(t)] = (x + s^2 score) / a."""
    a, s = sde.kernel(t)
    return (x + s ** 2 * score(x, t)) / a

def transition(sde, t, t_):
    """r and G^2 of p(x(t) | x(t_)) = N(r x(t_), G^2 I), t_ < t: the discretisation of any of the SDEs, exact. VE:
    1 and sigma_i^2 - sigma_{i-1}^2, eq. (8); VP: sqrt(1 - beta_i) and beta_i, eq. (10)."""
    (a, s), (a_, s_) = sde.kernel(t), sde.kernel(t_)
    return a / a_, s ** 2 - (a / a_ * s_) ** 2

def em(score, sde, x, ts):
    """Euler-Maruyama on the reverse SDE, eq. (6), over the falling times ts (N + 1,): N + 1 evaluations."""
    for t, t_ in zip(ts, ts[1:]):
        drift, h = sde.f(x, t) - sde.g(t) ** 2 * score(x, t), t - t_
        x = x - h * drift + h.sqrt() * sde.g(t) * torch.randn_like(x)
    return tweedie(score, sde, x, ts[-1])

def reverse(score, sde, x, ts):
    """Reverse diffusion, eq. (46): the reverse SDE in steps like the forward one's, f_i = (r - 1) x and G_i."""
    for t, t_ in zip(ts, ts[1:]):
        r, G2 = transition(sde, t, t_)
        x = (2 - r) * x + G2 * score(x, t) + G2.sqrt() * torch.randn_like(x)
    return tweedie(score, sde, x, ts[-1])

def ancestral(score, sde, x, ts):
    """Ancestral sampling: VP, DDPM's eq. (4), with variance beta_i; VE, eq. (47), and sub-VP, with that of
    q(x_{i-1} | x_i, x_0), G_i^2 s_{i-1}^2 / s_i^2."""
    for t, t_ in zip(ts, ts[1:]):
        r, G2 = transition(sde, t, t_)
        var = G2 if type(sde) is VP else G2 * (sde.kernel(t_)[1] / sde.kernel(t)[1]) ** 2
        x = (x + G2 * score(x, t)) / r + var.sqrt() * torch.randn_like(x)
    return tweedie(score, sde, x, ts[-1])

def correct(score, x, t, snr, alpha=1.0):
    """One Langevin step at t, Algorithms 4 (alpha = 1) and 5, eps = 2 alpha (snr |z| / |score|)^2 with mean norms."""
    z, g = torch.randn_like(x), score(x, t)
    eps = 2 * alpha * (snr * z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()) ** 2
    return x + eps * g + (2 * eps).sqrt() * z

def pc(score, sde, x, ts, snr=0.16, M=1, predict=True):
    """Predictor-corrector, Algorithms 2 (VE) and 3 (VP): a reverse diffusion step, then M Langevin steps where it
    arrives, alpha_i = 1 - beta_i as in the authors' code (VE: 1). predict=False: no predictor, annealed Langevin."""
    for t, t_ in zip(ts, ts[1:]):
        r, G2 = transition(sde, t, t_)
        if predict:
            x = (2 - r) * x + G2 * score(x, t) + G2.sqrt() * torch.randn_like(x)
        for _ in range(M):
            x = correct(score, x, t_, snr, r ** 2)
    return tweedie(score, sde, x, ts[-1])

langevin = functools.partial(pc, predict=False)                            # the corrector alone

DOPRI = [[1/5], [3/40, 9/40], [44/45, -56/15, 32/9], [19372/6561, -25360/2187, 64448/6561, -212/729],
         [9017/3168, -355/33, 46732/5247, 49/176, -5103/18656], [35/384, 0, 500/1113, 125/192, -2187/6784, 11/84]]
ERROR = [71/57600, 0, -71/16695, 71/1920, -17253/339200, 22/525, -1/40]    # 5th order less 4th

def rk45(fun, x, t0, t1, tol):
    """x(t1) of dx/dt = fun(x, t, i) from x(t0) (B, ...), Dormand & Prince 1980. Each sample has its own t and step, a
    root mean square error over tol (1 + |x|) below 1. t (n, 1, ...); i: those n of B that are not there yet."""
    x, t = x.clone(), torch.full((len(x), *[1] * (x.dim() - 1)), t0, dtype=x.dtype, device=x.device)
    h, k0 = torch.full_like(t, (t1 - t0) / 100), fun(x, t, ALL)
    while len(i := (t.flatten() != t1).nonzero().flatten()):
        xi, ti, hi, k = x[i], t[i], h[i], [k0[i]]
        for row in DOPRI:
            new = xi + hi * sum(c * kj for c, kj in zip(row, k))
            k.append(fun(new, ti + sum(row) * hi, i))
        error = hi * sum(c * kj for c, kj in zip(ERROR, k)) / (tol * (1 + torch.maximum(xi.abs(), new.abs())))
        e = error.flatten(1).square().mean(1).sqrt().view(ti.shape)
        require(e.isfinite().all() and hi.abs().min() > 1e-7 * abs(t1 - t0), "the ODE cannot be solved to this --tol")
        ok, last = e <= 1, (t1 - ti - hi).abs() <= 1e-6 * abs(t1 - t0)
        x[i], k0[i] = torch.where(ok, new, xi), torch.where(ok, k[-1], k[0])                            # FSAL
        t[i] = torch.where(ok, torch.where(last, t1, ti + hi), ti)
        hi = hi * (0.9 * e.clamp(min=1e-10) ** -0.2).clamp(0.2, 10)
        h[i] = torch.where(hi.abs() > (t1 - t[i]).abs(), t1 - t[i], hi)
    return x

def flow(score, sde):
    """The right side of the probability flow ODE, eq. (13)."""
    return lambda x, t, i=ALL: sde.f(x, t) - sde.g(t) ** 2 / 2 * score(x, t, i)

def ode(score, sde, x, tol=1e-5):
    """The probability flow ODE, solved from T to eps."""
    return tweedie(score, sde, rk45(flow(score, sde), x, sde.T, sde.eps, tol), torch.tensor(sde.eps))

def heun(score, sde, x, N, rho=7.0, churn=0.0, t_min=0.0, t_max=math.inf, s_noise=1.0):
    """EDM, Algorithm 1, or with S_churn > 0 Algorithm 2, in y = x / a, whose ODE is dy = eps dsigma whatever the SDE:
    N steps, the last to sigma = 0; 2N - 1 evaluations."""
    sigmas, y = karras_sigmas(N, *sigma_range(sde), rho), x / sde.kernel(torch.tensor(sde.T))[0]
    def d(y, sigma):                                                       # (y - D(y; sigma)) / sigma
        a, s = sde.kernel(sde.time(sigma))
        return -s * score(a * y, sde.time(sigma))
    for sigma, sigma_ in zip(sigmas, sigmas[1:]):
        if churn and t_min <= sigma <= t_max:
            hat = sigma * (1 + min(churn / N, math.sqrt(2) - 1))           # line 5
            y = y + (hat ** 2 - sigma ** 2).sqrt() * s_noise * torch.randn_like(y)
            sigma = hat
        slope = d(y, sigma)
        euler = y + (sigma_ - sigma) * slope
        y = euler if sigma_ == 0 else y + (sigma_ - sigma) * (slope + d(euler, sigma_)) / 2             # trapezoid
    return y

def adaptive(score, sde, x, tol=0.05, tol_abs=2 / 256, safety=0.9, r=0.9):
    """Algorithm 1 of Jolicoeur-Martineau 2021: x' by Euler-Maruyama, x'' by a second step from there with the same z;
    every sample has its own step h, taken if x' - x'' is below tol. tol_abs: a grey level."""
    x, before, t = x.clone(), x.clone(), torch.full((len(x), 1, 1, 1), sde.T, dtype=x.dtype, device=x.device)
    h = torch.full_like(t, 0.01 * (sde.T - sde.eps))
    while len(i := (t.flatten() > sde.eps).nonzero().flatten()):
        xi, ti, hi, z = x[i], t[i], h[i], torch.randn_like(x[i])
        ti_ = torch.where(hi >= ti - sde.eps, sde.eps, ti - hi)
        step = lambda x, t: -hi * (sde.f(x, t) - sde.g(t) ** 2 * score(x, t, i)) + hi.sqrt() * sde.g(t) * z
        low = xi + step(xi, ti)                                            # x'
        high = (low + xi + step(low, ti_)) / 2                             # x''
        delta = (tol * torch.maximum(low.abs(), before[i].abs())).clamp(min=tol_abs)
        e = ((low - high) / delta).flatten(1).square().mean(1).sqrt().view(ti.shape)
        require(e.isfinite().all() and hi.min() > 1e-7 * sde.T, "the SDE cannot be solved to this --tol")
        x[i], before[i] = torch.where(e <= 1, high, xi), torch.where(e <= 1, low, before[i])
        t[i] = torch.where(e <= 1, ti_, ti)
        h[i] = torch.minimum(safety * hi * e.clamp(min=1e-10) ** -r, t[i] - sde.eps)
    return tweedie(score, sde, x, torch.tensor(sde.eps))

SAMPLERS = {"em": em, "reverse": reverse, "ancestral": ancestral, "langevin": langevin, "pc": pc, "ode": ode,
            "heun": heun, "adaptive": adaptive}

# ----------------------------------------------------------------------------------------- likelihood and latent codes
def log_likelihood(score, sde, x, tol=1e-5, probes=1):
    """(log p(x) in nats, (B, probes), and x(T)), eq. (39): log p_T(x(T)) plus the integral of the divergence of flow(),
    by Skilling-Hutchinson, v^T grad(flow) v with Rademacher v, eq. (40); probes = 0: exactly, in low dimension."""
    D, shape, field = x[0].numel(), x.shape[1:], flow(score, sde)
    vs = torch.eye(D).to(x)[:, None].expand(D, len(x), D) if probes == 0 else \
        torch.randn(probes, len(x), D, device=x.device).sign().to(x)
    def fun(state, t, i):
        with torch.enable_grad():
            y = state[:, :D].reshape(-1, *shape).clone().requires_grad_()
            dx = field(y, t.view(-1, *[1] * len(shape)), i).flatten(1)
            vjp = [torch.autograd.grad((dx * v[i]).sum(), y, retain_graph=True)[0].flatten(1) for v in vs]
        div = torch.stack([(g * v[i]).sum(1) for g, v in zip(vjp, vs)], dim=1)                          # (n, probes)
        return torch.cat([dx.detach(), div if probes else div.sum(1, keepdim=True)], dim=1)
    state = rk45(fun, torch.cat([x.flatten(1), x.new_zeros(len(x), max(1, probes))], dim=1), sde.eps, sde.T, tol)
    x_T = state[:, :D]
    prior = -x_T.square().sum(1) / (2 * sde.prior ** 2) - D / 2 * math.log(2 * math.pi * sde.prior ** 2)
    return prior[:, None] + state[:, D:], x_T.view_as(x)

def to_data(x0, transform="none", alpha=1e-6):
    """(y, log |dy / du| summed over an image, (B,)) of images in [-1, 1], whose grey levels u = 0 ... 255 get uniform
    noise, v = (u + U[0, 1)) / 256: y = 2 v - 1, or y = logit(w) / 6, FFJORD's over 6, w = alpha + (1 - 2 alpha) v."""
    v = ((x0 + 1) * 127.5 + torch.rand_like(x0)) / 256
    if transform == "none":
        return 2 * v - 1, torch.full_like(v[:, 0, 0, 0], v[0].numel() * math.log(2 / 256))
    w = alpha + (1 - 2 * alpha) * v
    return torch.logit(w) / 6, (math.log((1 - 2 * alpha) / 6 / 256) - w.log() - (1 - w).log()).flatten(1).sum(1)

def from_data(y, transform="none", alpha=1e-6):
    """The images in [-1, 1] whose to_data may be y: u = floor(256 v)."""
    v = (torch.sigmoid(6 * y) - alpha) / (1 - 2 * alpha) if transform == "logit" else (y + 1) / 2
    return (256 * v).floor().clamp(0, 255) / 127.5 - 1

# -------------------------------------------------------------------------------- guidance; from flags to files
def make_score(eps, sde, label=None, w=0.0, classifier=None, frames=None):
    """score(x, t, i) of eps(y, sigma, label), what the samplers call. With a classifier s + w grad log p(label | x(t)),
    eq. (14); else (1 + w) s(x, label) - w s(x), classifier-free guidance. frames: a list that gets x(t), scaled, and
    E[x(0) | x(t)] of 8 images in turn, some 30 times."""
    (low, high), seen = sigma_range(sde), [math.inf]                       # seen: below which sigma the next frame is
    def score(x, t, i=ALL):
        a, s = (v.to(x).reshape(-1, 1, 1, 1) for v in sde.kernel(t))
        y, sigma, c = x / a, (s / a).flatten().expand(len(x)), label if label is None else label[i]
        e = eps(y, sigma, None if classifier else c)
        if classifier:
            with torch.enable_grad():
                logits = eps_theta(classifier, v := y.detach().requires_grad_(), sigma).mean((2, 3))    # (n, K)
                e = e - w * s / a * torch.autograd.grad(logits.log_softmax(1).gather(1, c[:, None]).sum(), v)[0]
        elif w:
            e = (1 + w) * e - w * eps(y, sigma, torch.full_like(c, -1))
        if frames is not None and (i is ALL or len(i) > 7 and i[7] == 7) and sigma[0] < seen[-1]:
            seen.append(sigma[0] * (low / high) ** (1 / 30))
            frames.append(torch.stack([(x / (a ** 2 + s ** 2).sqrt())[:8], (y - s / a * e)[:8]], 1).flatten(0, 1))
        return -e / s
    def without_graph(x, t, i=ALL):                                        # unless x wants one, as in log_likelihood
        with torch.set_grad_enabled(x.requires_grad):
            return score(x, t, i)
    return without_graph

def network(args):
    """The U-Net of these settings; a classifier's K channels, averaged over pixels, are logits of p(label | x(t))."""
    C, mult = args.shape[0], (1, 2, 2) if args.patch == 1 else (1, 2)      # 28 is 4 times an odd number
    if args.train_classifier:
        return UNet(C, args.width, mult, args.patch, dropout=args.dropout, out=args.n_classes)
    return UNet(C, args.width, mult, args.patch, args.n_classes, args.dropout)

def denoiser(ckpt, net=None, device="cpu"):
    """D(y, sigma, label=None) = E[x(0) | y = x(0) + sigma z] of a checkpoint read by load_checkpoint, images in [-1, 1]
    (or their logits), sigma a number or (B,). net: instead of the checkpoint's averaged network."""
    args, net = argparse.Namespace(**ckpt["args"]), net or averaged(ckpt, device)
    def D(y, sigma, label=None):
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))          # (B,)
        return y - sigma.view(-1, 1, 1, 1) * eps_theta(net, y, sigma, label, args.precond)
    return D

def averaged(ckpt, device="cpu"):
    """The averaged network of a checkpoint of any of the three scripts."""
    build = {"ncsn": ncsn.network, "ddpm": ddpm.network, "sde": network}[ckpt["script"]]
    net = build(argparse.Namespace(**ckpt["args"]))
    net.load_state_dict(ckpt["ema"])
    return net.to(device).eval().requires_grad_(False)

def noise_predictor(ckpt, net, device="cpu"):
    """eps(y, sigma, label=None) = (y - D(y; sigma)) / sigma of a checkpoint of any script and its net, in [-1, 1]."""
    D = {"ncsn": ncsn.denoiser, "ddpm": ddpm.denoiser, "sde": denoiser}[ckpt["script"]](ckpt, net, device)
    if ckpt["script"] == "ncsn":                                           # whose images are in [0, 1]
        return lambda y, sigma, label=None: (y + 1 - 2 * D((y + 1) / 2, sigma / 2, label)) / sigma.view(-1, 1, 1, 1)
    return lambda y, sigma, label=None: (y - D(y, sigma, label)) / sigma.view(-1, 1, 1, 1)

def report_bits(run, score, sde, y, logdet, tol, calls):
    """--evaluate-bits: a line, and OUT/bits.csv, a row an image and a column a probe."""
    args, N, D, bits = run.args, len(y), y[0].numel(), []
    for part, slope in zip(y.split(100), logdet.split(100)):
        logp, _ = log_likelihood(score, sde, part, tol, args.probes)
        bits += (-(logp + slope[:, None]) / D / math.log(2)).tolist()
        run.print(f"bits   {len(bits)}/{N} images   mean {sum(map(sum, bits)) / len(bits) / len(bits[0]):.4f}")
    with common.aside(Path(args.out) / "bits.csv") as f:
        f.writelines((",".join(f"{v:.6g}" for v in row) + "\n").encode() for row in bits)
    b = torch.tensor(bits)                                                 # (N, probes)
    probes = f" ({(b.var(1).mean() / b.numel()).sqrt():.4f} of it by the probes)" if args.probes > 1 else ""
    run.print(f"bits   {b.mean():.4f} +- {b.mean(1).std() / N ** 0.5:.4f}{probes} bits/dim, exact, dequantised, of {N} "
              f"test images; {args.probes} probes each, --tol {tol:g}, {sum(calls) / N:.0f} evaluations an image")

def report_codes(run, score, sde, y, tol):
    """--encode: correlation of the latent codes that two networks, trained apart, give to the same test images."""
    other = common.load_checkpoint(Path(run.args.encode) / "ckpt.pt", "sde")
    theirs = make_score(noise_predictor(other, averaged(other, run.device), run.device), sde)
    a, b = (rk45(flow(s, sde), y, sde.eps, sde.T, tol).flatten(1) for s in (score, theirs))
    a, b = ((v - v.mean(0)) / v.std(0, correction=0) for v in (a, b))      # (N, D), each dimension over the images
    for name, r in (("the same", (a * b).mean(0)), ("shuffled", (a * b.roll(1, 0)).mean(0))):
        run.print(f"codes  correlation over {name} images: {r.mean():.3f} in the mean of dimensions, sd {r.std():.3f}")

def interpolate(run, score, sde, x0, y, tol):
    """--strip interpolate: test images, and between them nine points on the great circle of their codes, decoded."""
    solve = lambda x, t0, t1: rk45(flow(score, sde), x, t0, t1, tol)
    x_T = solve(y, sde.eps, sde.T)                                         # encode, and decode again
    rms = (k := 127.5 if run.args.transform == "none" else 6) * (solve(x_T, sde.T, sde.eps) - y).square().mean().sqrt()
    run.print(f"strip  encoded, decoded: root mean squared error {rms:.3g} of {'255' if k > 6 else 'the logits'}")
    way = [ddpm.slerp(a, b, k) for a, b in zip(x_T[::2], x_T[1::2]) for k in torch.linspace(0, 1, 9)]
    way = from_data(solve(torch.stack(way), sde.T, sde.eps), run.args.transform).unflatten(0, (-1, 9))
    rows = torch.cat([x0[::2, None], way, x0[1::2, None]], dim=1).flatten(0, 1)
    toy.save_picture(toy.grid(rows, run.low, 11), Path(run.args.out) / "interpolate.png")

def compare(run, draw):
    """--strip samplers: ten images by each; --strip quality: the rows of OUT/quality.csv, as curves."""
    args, rows = run.args, []
    if args.strip == "quality":
        with open(Path(args.out) / "quality.csv", newline="") as f:
            n = (rows := list(csv.DictReader(f)))[-1]["images"]            # ratios at one N, the last row's
        rows = [(r["sampler"], float(r["evaluations"]), float(r["ratio"])) for r in rows if r["images"] == n]
        return toy.plot(Path(args.out) / "quality.png", {k: sorted(r[1:] for r in rows if r[0] == k) for k in SAMPLERS},
                        "evaluations of the network", "Frechet distance / floor", logx=True, logy=True)
    for name in SAMPLERS:
        torch.manual_seed(args.seed)
        rows.append(draw(run.counted(calls := []), 10, sampler=name))
        run.print(f"strip  {name:9s} {sum(calls) / 10:.0f} evaluations an image")
    toy.save_picture(toy.grid(torch.cat(rows), run.low, 10), Path(args.out) / "samplers.png")

def main():
    p = common.arguments(__doc__)
    add = p.add_argument
    add("--steps", type=int, help="optimizer steps (None: 4000 on digits, 12000 on others; paper: 1,300,000)")
    add("--batch-size", type=int, default=16, help="images a step, shared by all processes (paper: 128)")
    add("--lr", type=float, default=1e-3, help="largest learning rate of Adam; a cosine to 0 (paper: 2e-4, constant)")
    add("--ema", type=float, default=0.999, help="decay of the average of the weights (paper: VE 0.999, VP 0.9999)")
    add("--sde", choices=["vp", "ve", "subvp", "edm"], default="vp", help="edm: sigma(t) = t, with EDM's loss")
    add("--sigma-min", type=float, help="smallest sigma of VE and EDM (None: 0.01, 0.002, as in the papers)")
    add("--sigma-max", type=float, help="largest sigma (None: VE 34, as far as two MNIST images; EDM 80; paper: VE 50)")
    add("--eps", type=float, help="cut-off of t, at 0 the score is infinite (None: 1e-5, VP, sub-VP draw: 1e-3; paper)")
    add("--weighting", choices=["paper", "likelihood"], default="paper", help="lambda of eq. (7): s^2; g^2")
    add("--precond", choices=["eps", "edm"], help="what the network returns: z, or EDM's mixture (None: edm for EDM)")
    add("--transform", choices=["none", "logit"], default="none", help="of the data; logit: lower bits/dim")
    add("--sampler", choices=[*SAMPLERS], default="heun", help="em: Euler-Maruyama; langevin: no predictor")
    add("--sample-steps", type=int, help="steps N, not of ode, adaptive (None: heun 18, else 500; papers: 18, 1000)")
    add("--rho", type=float, help="draw on EDM's grid of sigma (None: 7 for heun and EDM, else uniform t; papers)")
    add("--snr", type=float, default=0.16, help="signal-to-noise ratio r of the corrector (paper: VE 0.16, VP 0.01)")
    add("--corrector-steps", type=int, default=1, help="Langevin steps M at each time (paper: 1)")
    add("--tol", type=float, help="of ode, likelihoods (None, paper: 1e-5), adaptive (None: 0.05; paper: 0.01-0.5)")
    add("--churn", type=float, default=0.0, help="S_churn of heun, 0: no noise (EDM: 0 to 80)")
    add("--temperature", type=float, default=1.0, help="standard deviation of x(T), in units of the prior's (paper: 1)")
    add("--classes", action="store_true", help="train with the labels, one in ten being hidden")
    add("--label", type=int, help="draw this class only (None: all in turn)")
    add("--guidance", type=float, help="w: of the --classifier (None: 1, eq. 14), or classifier-free (None: 0)")
    add("--train-classifier", action="store_true", help="train p(label | x(t)) instead, to be given to --classifier")
    add("--classifier", help="draw with the gradient of the classifier in this RUN folder")
    add("--from", dest="origin", help="draw from this RUN folder of any script, with any --sde (None: ncsn's is ve)")
    add("--evaluate-bits", type=int, help="instead of drawing: exact bits/dim of so many test images; OUT/bits.csv")
    add("--probes", type=int, default=1, help="random vectors an image for the divergence in --evaluate-bits")
    add("--encode", help="instead of drawing: correlation of the codes x(T) with those of the run in this RUN folder")
    add("--strip", choices=["samplers", "interpolate", "quality"], help="instead of drawing: OUT/STRIP.png")
    origin = None
    if path := p.parse_args().origin:
        origin = common.load_checkpoint(Path(path) / "ckpt.pt")
        a = {"sde": "ve" if origin["script"] == "ncsn" else "vp", **origin["args"]}
        if origin["script"] == "ncsn":                                     # images in [0, 1]
            a["sigma_min"], a["sigma_max"] = 2 * a["sigma_min"], 2 * a["sigma_max"]
        p.set_defaults(**{k: a[k] for k in ("dataset", "shape", "n_classes", "size", "sde", "sigma_min", "sigma_max",
                                            "transform") if k in a}, out=f"runs/from-{Path(path).name}")
    fixed = ("sde", "sigma_min", "sigma_max", "weighting", "precond", "transform", "train_classifier")
    args, ckpt = common.settings(p, "sde", ("label", "n_classes", "guidance", "churn"), fixed=fixed, not_kept=(
        "label", "eps", "origin", "classifier", "guidance", "rho", "tol"))
    train = not (args.sample_only or origin)
    args.steps = args.steps or (4000 if args.dataset == "digits" else 12000)
    args.precond = args.precond or ("edm" if args.sde == "edm" else "eps")
    if train:
        images, labels = toy.load_images(args.dataset, args.data_dir, "train", args.size)
        needs = args.classes or args.train_classifier
        require(labels is not None or not needs, f"{args.dataset} has no labels: drop --classes and --train-classifier")
        args.shape, args.n_classes = list(images.shape[1:]), int(labels.max()) + 1 if needs else 0
    sde, K, judge = make_sde(args), args.n_classes, None
    if args.classifier:
        judge = averaged(other := common.load_checkpoint(Path(args.classifier) / "ckpt.pt", "sde"), args.device)
        K = other["args"]["n_classes"]
        require(other["args"]["train_classifier"], f"{args.classifier} is no classifier: give --train-classifier there")
    require(args.label is None or args.label < K, f"--label {args.label}: known are {K} classes (train with --classes)")
    require(K or not args.guidance, "--guidance: train with --classes, or give a --classifier")
    require(sum(map(bool, (args.evaluate, args.evaluate_bits, args.encode, args.strip))) <= 1,
            "--evaluate, --evaluate-bits, --encode and --strip: one at a time")
    require(not origin or not args.sample_only and not args.resume, "--from draws, nothing else: drop the other flag")
    eps_of = lambda net: noise_predictor(origin or {"script": "sde", "args": vars(args)}, net, args.device)
    label = lambda n: (torch.arange(n) % K if args.label is None else torch.full((n,), args.label)) if K else None
    w = args.guidance if args.guidance is not None else float(judge is not None)

    def draw(net, n, frames=None, sampler=args.sampler):
        if args.train_classifier:                                          # what it sees, the noise growing
            sigma = torch.logspace(*map(math.log10, sigma_range(sde)), n).view(-1, 1, 1, 1)
            return (images[:n] / 127.5 - 1 + sigma * torch.randn(n, *args.shape)) / (1 + sigma ** 2).sqrt()
        N, c = args.sample_steps or (18 if sampler == "heun" else 500), label(n).to(args.device) if K else None
        score = make_score(eps_of(net), sde, c, w, judge, frames)
        x = args.temperature * sde.prior * torch.randn(n, *args.shape, device=args.device)
        if train and run.n < args.steps:                                   # the grids drawn in training: quickly
            sampler, N = "heun", 18
        ts = times(sde, N, args.rho or (7 if args.sde == "edm" else None))
        options = {"ode": (args.tol or 1e-5,), "adaptive": (args.tol or 0.05,), "heun": (N, args.rho or 7, args.churn),
                   "langevin": (ts, args.snr, args.corrector_steps), "pc": (ts, args.snr, args.corrector_steps)}
        x = from_data(SAMPLERS[sampler](score, sde, x, *options.get(sampler, (ts,))), args.transform)
        if frames is not None:
            frames.append(torch.stack([x[:8], x[:8]], dim=1).flatten(0, 1))
        return x

    run = Run(args, "sde", averaged(origin) if origin else network(args), draw, ckpt, low=-1.0)
    run.print(f"data   {args.dataset}, {' x '.join(map(str, args.shape))}, range [-1, 1]")
    if train:
        full = make_sde(args, eps=1e-5)
        for x0, c in run.batches(images, labels if needs else None):
            y, _ = to_data(x0, args.transform)
            if args.train_classifier:
                a, s = full.kernel(full.eps + torch.rand(len(y), 1, 1, 1, device=y.device) * (full.T - full.eps))
                logits = eps_theta(run.net, y + s / a * torch.randn_like(y), (s / a).flatten()).mean((2, 3))
                run.step(torch.nn.functional.cross_entropy(logits, c))
            else:
                run.step(loss(run.net, y, full, c, 0.1, args.weighting, args.precond))
    if run.rank > 0 or args.train_classifier:
        return
    if args.evaluate_bits or args.encode or args.strip == "interpolate":
        run.ema.bf16 = torch.backends.cudnn.allow_tf32 = False             # float32, TF32 not even on CUDA
        images, _ = toy.load_images(args.dataset, args.data_dir, "test", args.size)
        require(len(images) > 1, f"{args.dataset} has one picture: two are needed")
        n = min(args.evaluate_bits or (200 if args.encode else 12), len(images) // 2 * 2)
        pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
        torch.manual_seed(args.seed)
        x0, sde, tol, calls = images[pick].to(args.device) / 127.5 - 1, make_sde(args, 1e-5), args.tol or 1e-5, []
        (y, logdet), score = to_data(x0, args.transform), make_score(eps_of(run.counted(calls)), sde)
        if args.evaluate_bits:
            report_bits(run, score, sde, y, logdet, tol, calls)
        elif args.encode:
            report_codes(run, score, sde, y, tol)
        else:
            interpolate(run, score, sde, x0, y, tol)
    elif args.strip:
        compare(run, draw)
    else:
        x = run.finish(sampler=args.sampler, N="" if args.sampler in ("ode", "adaptive") else args.sample_steps)
        if K and args.evaluate:
            found = common.features(common.classifier(args.dataset, args.data_dir, args.device)[0], x)[1].argmax(1)
            run.print(f"label  {100 * (found == label(len(x))).double().mean():.1f} % are of the class asked for")

if __name__ == "__main__":
    common.cli(main)
