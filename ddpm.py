"""Denoising diffusion probabilistic models (DDPM) on small images, their ancestor and their heirs.

Papers   Ho, Jain & Abbeel 2020, arXiv:2006.11239 (equation numbers without a name: v2); images in [-1, 1]
         Sohl-Dickstein et al. 2015, arXiv:1503.03585: bounds of the entropy of a reverse step
         Song, Meng & Ermon 2020, arXiv:2010.02502 (DDIM): --sampler ddim --sample-steps 50 --eta 0
         Nichol & Dhariwal 2021, arXiv:2102.09672 (improved DDPM): --schedule cosine, --objective hybrid or vlb
         Bao et al. 2022, arXiv:2201.06503 (Analytic-DPM): --variance analytic
         Ho & Salimans 2022, arXiv:2207.12598 (classifier-free guidance): --classes, --guidance w
Forward  q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), abar_t = prod_s (1 - beta_s), t = 1 ... T        eq. (4)
Loss     L_simple = E || eps - eps_theta(x_t, t) ||^2                                          Algorithm 1, eq. (14)
Sample   x_{t-1} = (x_t - beta_t / sqrt(1 - abar_t) eps_theta) / sqrt(alpha_t) + sigma_t z     Algorithm 2, eq. (11)
Bound    -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0, in bits/dim                      eqs. (5), (8), (13)
Differs  mean over pixels instead of sum; the cosine schedule by default; a smaller U-Net; a learning rate that
         decays; clipped gradients, as in the authors' code; x_0 is clipped while sampling and in the bound, as there
         and unlike Algorithm 2 (--no-clip), but, unlike there, not in the decoder L_0; see README, "What differs"

    python ddpm.py --dataset mnist              # trains, then see runs/ddpm-mnist/samples.png and process.gif
    python ddpm.py --dataset mnist --resume     # goes on; with --sample-only just draws
    python ddpm.py --dataset mnist --sample-only --sampler ddim --sample-steps 50     # 20 times as fast
    python ddpm.py --dataset mnist --sample-only --evaluate-bound 100                 # bits/dim of the test set
    python ddpm.py --dataset mnist --objective vlb --predict v --out runs/vlb-mnist   # lower bits/dim
"""
import argparse, contextlib, itertools, math, time
from pathlib import Path
import torch
import torch.distributed as dist
import common
import ncsn
import toy
from common import Run, UNet, require

def schedule(name, T):
    """abar_t for t = 0 ... T, (T + 1,) float64; abar_0 = 1 is "no noise yet". linear: section 4 of Ho et al., scaled by
    1000 / T; cosine: improved DDPM, eq. (17). UserError if T is too small for it."""
    require(T > (20 if name == "linear" else 1), f"--T {T} is too few for --schedule {name}")
    beta = common.linear_betas(T, 0.1 / T, 20 / T) if name == "linear" else common.cosine_betas(T)
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])

def kernel(abar, t):
    """sqrt(abar_t) and sqrt(1 - abar_t) of t (B,), (B, 1, 1, 1) float32: x_t = a x_0 + s eps, eq. (4)."""
    return abar[t].sqrt().float().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().float().view(-1, 1, 1, 1)

def hide(label, p_null):
    """The labels, each hidden (-1) with probability p_null, so that one network learns with and without them."""
    return None if label is None else label.where(torch.rand(len(label), device=label.device) >= p_null, -1)

def loss(net, x0, abar, label=None, p_null=0.1, predict="eps"):
    """L_simple, Algorithm 1 and eq. (14), a mean over pixels; net(x_t, t, label); abar: schedule() on the device of x0.
    predict: what net returns, eps, x0, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho, arXiv:2202.00512)."""
    t = torch.randint(1, len(abar), (len(x0),), device=x0.device)          # t ~ Uniform({1, ..., T}), T included
    eps = torch.randn_like(x0)
    a, s = kernel(abar, t)                                                 # (B, 1, 1, 1)
    x_t = a * x0 + s * eps                                                 # eq. (4)
    target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[predict]
    return (target - net(x_t, t, hide(label, p_null))).square().mean()     # eq. (14)

@torch.no_grad()
def sample(net, x, abar):
    """Algorithm 2 with sigma_t^2 = beta_t, from x = x_T ~ N(0, I), (B, C, H, W); net(x_t, t) is eps (see predictor)."""
    for t in range(len(abar) - 1, 0, -1):
        alpha = abar[t] / abar[t - 1]
        beta = 1 - alpha
        z = torch.randn_like(x) if t > 1 else 0                            # no noise in the last step
        eps = net(x, torch.full((len(x),), t, device=x.device))
        x = (x - beta / (1 - abar[t]).sqrt() * eps) / alpha.sqrt() + beta.sqrt() * z             # eq. (11), line 4
    return x

def subsequence(T, S):
    """[0, tau_1, ..., tau_S = T]: S of the T trained steps, evenly spaced from 1 to T and rounded (improved DDPM,
    section 4); the last trained step is always one of them."""
    require(1 <= S <= T, f"--sample-steps {S} is not between 1 and T = {T}")
    return [0] + torch.linspace(T, 1, S, dtype=torch.float64).round().long().tolist()[::-1]

@torch.no_grad()
def ancestral(net, x, abar, tau, variance="beta", gamma=None):
    """Algorithm 2 on the steps tau = [0, ..., T] only, as if they were all (improved DDPM, eq. 19), with any
    reverse_variance; for "learned", net(x_t, t) is eps and v in 2C channels. tau = 0 ... T and "beta": sample()."""
    for t, s in zip(tau[:0:-1], tau[-2::-1]):                              # from x_t to x_s, s < t
        out = net(x, torch.full((len(x),), t, device=x.device))
        eps, v = out.chunk(2, dim=1) if variance == "learned" else (out, None)
        alpha = abar[t] / abar[s]
        mean = (x - (1 - alpha) / (1 - abar[t]).sqrt() * eps) / alpha.sqrt()                     # eq. (11)
        sigma2 = reverse_variance(variance, abar[t], abar[s], v, None if gamma is None else gamma[t])
        x = mean + sigma2.sqrt() * torch.randn_like(x) if s > 0 else mean
    return x

@torch.no_grad()
def ddim(net, x, abar, path, eta=0.0):
    """DDIM, eq. (12), 0 <= eta <= 1, along a path of steps: T ... 0 draws; 0 ... T, with eta = 0, encodes an image as
    its x_T. With the cosine schedule 1 / sqrt(abar_T) is 2e4: it needs a predictor that clips x_0."""
    for t, s in zip(path, path[1:]):                                       # from x_t to x_s
        eps = net(x, torch.full((len(x),), max(t, 1), device=x.device))    # step 0 was not trained, 1 is nearest
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()             # "predicted x_0"
        sigma = eta * ((1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])).sqrt() if eta else 0.0   # eq. (16)
        x = abar[s].sqrt() * x0 + (1 - abar[s] - sigma ** 2).clamp(min=0).sqrt() * eps
        x = x + sigma * torch.randn_like(x) if eta else x
    return x

def eps_and_x0(out, x_t, a, s, predict):
    """(eps, x0) from what the network returned, by x_t = a x0 + s eps and v = a eps - s x0."""
    if predict == "eps":
        return out, (x_t - s * out) / a
    if predict == "x0":
        return (x_t - a * out) / s, out
    return s * x_t + a * out, a * x_t - s * out

def predictor(net, abar, predict="eps", label=None, w=0.0, clip=False, learned=False, frames=None, every=1):
    """What the samplers call: f(x_t, t) -> eps, and with learned also v, in 2C channels; abar on the device of x_t.
    w: classifier-free guidance, (1 + w) eps(x_t, label) - w eps(x_t), its eq. (6). clip: x_0 to [-1, 1]. frames: a
    list that gets x_t and the x_0 predicted from it, of 8 images in turn, at the first and then every so many calls."""
    calls = itertools.count()
    def f(x, t):
        out, (a, s), C = net(x, t, label), kernel(abar, t), x.shape[1]
        out, v = out[:, :C], out[:, C:]
        if w:
            out = (1 + w) * out - w * net(x, t, torch.full_like(label, -1))[:, :C]
        eps, x0 = eps_and_x0(out, x, a, s, predict)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - a * x0) / s
        if frames is not None and next(calls) % every == 0:
            frames.append(torch.stack([x[:8], x0[:8]], dim=1).flatten(0, 1))
        return torch.cat([eps, v], dim=1) if learned else eps
    return f

# ------------------------------------------------------------------------------- the variational bound, variances
def posterior(x0, x_t, a_t, a_s):
    """Mean and variance beta~ of q(x_s | x_t, x_0) for s < t, with abar_t and abar_s, eqs. (6), (7)."""
    alpha = a_t / a_s
    beta = 1 - alpha
    mean = a_s.sqrt() * beta / (1 - a_t) * x0 + alpha.sqrt() * (1 - a_s) / (1 - a_t) * x_t
    return mean, (1 - a_s) / (1 - a_t) * beta

def reverse_variance(kind, a_t, a_s, v=None, gamma=None, floor=0.0):
    """sigma_t^2 of the step from t to s with abar_t and abar_s. beta; beta~, here at least floor: Ho, section 3.2.
    learned: exp(f log beta + (1 - f) log beta~), f = v in improved DDPM, eq. (15), here (v + 1) / 2 as in its code.
    analytic: the optimum beta~ + c^2 Cov(x_0 | x_t), c = sqrt(abar_s) beta / (1 - abar_t), Cov = (1 - abar_t) / abar_t
    (1 - gamma) in (0, 1] for second_moment's gamma: Analytic-DPM, eqs. (9) (rearranged), (11), (12)."""
    beta = 1 - a_t / a_s
    beta_tilde = (1 - a_s) / (1 - a_t) * beta
    if kind == "beta":
        return beta
    if kind == "analytic":
        cov = ((1 - a_t) / a_t * (1 - gamma)).clamp(1e-8, 1)               # not 0: at t = 1 nothing else is left
        return beta_tilde + a_s * (beta / (1 - a_t)) ** 2 * cov
    beta_tilde = beta_tilde.clamp(min=floor)
    if kind == "beta-tilde":
        return beta_tilde
    f = (v + 1) / 2
    return (f * beta.log() + (1 - f) * beta_tilde.log()).exp()

@torch.no_grad()
def second_moment(net, images, abar, predict="eps", n=50):
    """gamma_t = E || eps_theta(x_t, t) ||^2 / d, (T + 1,) on the CPU, from n images (uint8) a step: (1 - abar_t) times
    the Gamma_t of Analytic-DPM, eq. (8), whose score is -eps_theta / sqrt(1 - abar_t). Labels are not given."""
    f, gamma = predictor(net, abar, predict), [torch.ones((), device=abar.device)]
    for t in range(1, len(abar)):
        x0 = images[torch.randint(len(images), (n,))].to(abar.device) / 127.5 - 1
        at = torch.full((n,), t, device=abar.device)
        a, s = kernel(abar, at)
        gamma.append(f(a * x0 + s * torch.randn_like(x0), at).square().mean())
    return torch.stack(gamma).cpu().double()

def log_decoder(x0, mean, sigma):
    """log of N(mean, sigma^2) integrated over the bin of width 2/255 around x0; the outer bins are open, eq. (13)."""
    upper = torch.where(x0 > 0.999, 1e3, x0 + 1 / 255)
    lower = torch.where(x0 < -0.999, -1e3, x0 - 1 / 255)
    a, b = (lower - mean) / sigma, (upper - mean) / sigma
    a, b = torch.where(a + b > 0, -b, a), torch.where(a + b > 0, -a, b)    # in the lower tail nothing cancels
    a, b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return b + (-torch.expm1(a - b)).log()                                 # log(Phi(b) - Phi(a))

def bound_term(out, x0, x_t, t, abar, predict="eps", variance="beta", gamma=None, clip=False):
    """(L_{t-1} in bits/dim (B,), predicted x_0, sigma_t^2): KL(q(x_{t-1} | x_t, x_0) || p_theta), eq. (5), and for
    t = 1 the decoder L_0, eq. (13). out: net(x_t, t), of C channels, or 2C if the variance is learned; gamma (T + 1,).
    beta~, 0 at t = 1, is there taken as that of t = 2, as in the authors' code. clip: the predicted x_0 to [-1, 1] for
    t > 1; the decoder's outer bins are open, a mean beyond them is surer. Computed in the float type of abar."""
    C, view = x0.shape[1], (-1, 1, 1, 1)
    a_t, a_s = abar[t].view(view), abar[t - 1].view(view)
    floor = (1 - abar[1]) / (1 - abar[2]) * (1 - abar[2] / abar[1])        # beta~_2
    x0_hat = eps_and_x0(out[:, :C], x_t, a_t.sqrt(), (1 - a_t).sqrt(), predict)[1]
    x0_hat = torch.where(t.view(view) > 1, x0_hat.clamp(-1, 1), x0_hat) if clip else x0_hat
    sigma2 = reverse_variance(variance, a_t, a_s, out[:, C:], None if gamma is None else gamma[t].view(view), floor)
    mean, _ = posterior(x0_hat, x_t, a_t, a_s)
    mean_q, var_q = posterior(x0, x_t, a_t, a_s)
    var_q = var_q.clamp(min=floor)
    kl = 0.5 * (sigma2.log() - var_q.log() + (var_q + (mean_q - mean) ** 2) / sigma2 - 1)
    l = torch.where(t.view(view) == 1, -log_decoder(x0, mean, sigma2.sqrt()), kl)
    return l.flatten(1).mean(1) / math.log(2), x0_hat, sigma2

def hybrid_loss(net, x0, abar, label=None, p_null=0.1, predict="eps", lam=0.001):
    """L_simple + lambda L_vlb, improved DDPM, eq. (16). L_vlb, in bits/dim as in the authors' code, is T times the term
    of a random t; it trains the variance only: the mean in it is detached."""
    t = torch.randint(1, len(abar), (len(x0),), device=x0.device)
    eps = torch.randn_like(x0)
    a, s = kernel(abar, t)
    x_t = a * x0 + s * eps
    out, v = net(x_t, t, hide(label, p_null)).chunk(2, dim=1)
    target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[predict]
    l = bound_term(torch.cat([out.detach(), v], dim=1), x0, x_t, t, abar, predict, "learned")[0]
    return (target - out).square().mean() + lam * (len(abar) - 1) * l.mean()

def gather(x):
    """x (B,) of all processes of torchrun, one after the other."""
    if not dist.is_initialized():
        return x
    dist.all_gather(parts := [torch.empty_like(x) for _ in range(dist.get_world_size())], x)
    return torch.cat(parts)

def vlb_loss(net, x0, abar, history, label=None, p_null=0.1, predict="eps"):
    """L_vlb = sum_t L_t = E[L_t / p_t], t ~ p_t ~ sqrt(E[L_t^2]), improved DDPM, eq. (18), in bits/dim (L_T, which has
    no weights, left out). history (T, 10): the last ten L_t of each t, inf before; uniform p until all are there. Of
    several L_t of one t in a batch one enters it."""
    p = history.square().mean(1).sqrt()
    p = torch.where(p.isfinite().all(), 0.999 * p / p.sum() + 0.001 / len(p), 1 / len(p))        # (T,), never 0
    t = p.multinomial(len(x0), replacement=True) + 1
    a, s = kernel(abar, t)
    x_t = a * x0 + s * torch.randn_like(x0)
    out = net(x_t, t, hide(label, p_null))
    l = bound_term(out, x0, x_t, t, abar, predict, "learned")[0].to(p.dtype)
    i, new = gather(t - 1), gather(l.detach())
    history[i] = torch.cat([history[i][:, 1:], new[:, None]], dim=1)
    return (l / p[t - 1]).mean()

def entropy_bounds(abar):
    """Lower and upper bound of the entropy of x_{t-1} given x_t, nats/dim, t = 1 ... T (Sohl-Dickstein, eq. 24):
    H(x_t | x_{t-1}) + H(x_{t-1} | x_0) - H(x_t | x_0) and H(x_t | x_{t-1}); for data of variance up to 1."""
    H = lambda variance: 0.5 * (2 * math.pi * math.e * variance).log()
    upper = H(1 - abar[1:] / abar[:-1])
    return upper + H(1 - abar[:-1]) - H(1 - abar[1:]), upper

@torch.no_grad()
def evaluate_bound(net, images, abar, N, predict="eps", variance="beta", gamma=None, clip=True):
    """(L_T in bits/dim, rows) of uint8 images; rows (T, 4): L_{t-1} in bits/dim, its variance over images, mean squared
    error of the predicted x_0, entropy of the reverse step in nats/dim. Each t sees N >= 2 images drawn anew, without
    labels: the rows are independent."""
    x0, a, rows = images.double() / 127.5 - 1, abar[-1].item(), []
    prior = (a * (x0.square().mean() - 1) - math.log(1 - a)) / 2 / math.log(2)                 # L_T, of all images
    gamma = None if gamma is None else gamma.to(abar)
    for t in range(1, len(abar)):
        parts = []
        for x0 in images[torch.randint(len(images), (N,))].split(500):
            x0 = x0.to(abar.device) / 127.5 - 1
            at = torch.full((len(x0),), t, device=abar.device)
            a, s = kernel(abar, at)
            x_t = a * x0 + s * torch.randn_like(x0)
            l, x0_hat, sigma2 = bound_term(net(x_t, at, None), x0, x_t, at, abar, predict, variance, gamma,
                                           clip)
            x0_hat, entropy = x0_hat.clamp(-1, 1) if clip else x0_hat, 0.5 * (2 * math.pi * math.e * sigma2).log()
            mse = (x0_hat - x0).square()
            parts.append(torch.stack([l, mse.flatten(1).mean(1), entropy.flatten(1).mean(1).expand_as(l)]))
        l, mse, entropy = torch.cat(parts, dim=1)                          # (N,) each
        rows.append(torch.stack([l.mean(), l.var(), mse.mean(), entropy.mean()]))
    return prior.item(), torch.stack(rows).cpu().double()

# --------------------------------------------------------------------------------------------- from flags to files
def network(args):
    """The U-Net of these settings, with 2C channels out if it learns the variance; for vlb it keeps the history."""
    C, mult = args.shape[0], (1, 2, 2) if args.patch == 1 else (1, 2)      # 28 is 4 times an odd number
    net = UNet(C, args.width, mult, patch=args.patch, classes=args.n_classes, dropout=args.dropout,
               out=C if args.objective == "simple" else 2 * C)
    if args.objective == "vlb":
        net.register_buffer("history", torch.full((args.T, 10), math.inf))
    return net

def denoiser(ckpt, net=None, device="cpu"):
    """D(y, sigma, label=None) = E[x_0 | y = x_0 + sigma z] of a checkpoint read by load_checkpoint, images in [-1, 1],
    sigma a number or (B,): x_t = sqrt(abar_t) y with sigma^2 = (1 - abar_t) / abar_t, t a real number between two
    steps. net: instead of the checkpoint's averaged network."""
    args = argparse.Namespace(**ckpt["args"])
    if net is None:
        net = network(args).to(device).eval().requires_grad_(False)
        net.load_state_dict(ckpt["ema"])
    abar = schedule(args.schedule, args.T)[1:]
    table = (((1 - abar) / abar).log() / 2).float().to(device)             # log sigma of t = 1 ... T, rising

    def D(y, sigma, label=None):
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))          # (B,)
        i = torch.searchsorted(table, sigma.log()).clamp(1, len(table) - 1)
        t = i + ((sigma.log() - table[i - 1]) / (table[i] - table[i - 1])).clamp(0, 1)         # (B,), 1 <= t <= T
        sigma = sigma.view(-1, 1, 1, 1)
        a = 1 / (1 + sigma ** 2).sqrt()                                    # sqrt(abar_t)
        return eps_and_x0(net(a * y, t, label)[:, :y.shape[1]], a * y, a, sigma * a, args.predict)[1]
    return D

def score_network(D):
    """sigma s(y, sigma) = (D(y, sigma) - y) / sigma, the net that ncsn.py's sampler calls. Of a DDPM it is -eps: its
    score is -eps / sqrt(1 - abar_t) in x_t, which is -eps / sigma in y = x_t / sqrt(abar_t)."""
    return lambda y, log_sigma, label=None: (D(y, log_sigma.exp(), label) - y) / log_sigma.exp().view(-1, 1, 1, 1)

def as_eps(net, abar):
    """The other way round: the eps(x_t, t) of a net(y, log sigma) of ncsn.py, -net at y = x_t / sqrt(abar_t)."""
    def eps(x_t, t, label=None):
        a, s = kernel(abar, t)
        return -net(x_t / a, (s / a).log().flatten(), label)
    return eps

def slerp(a, b, f):
    """From a (f = 0) to b (f = 1) on the great circle, each (C, H, W): DDIM, eq. (67)."""
    angle = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).acos()
    return (((1 - f) * angle).sin() * a + (f * angle).sin() * b) / angle.sin()

def report_bound(run, abar, variance, gamma):
    """--evaluate-bound: a line, OUT/bound.csv (a row a step), and two pictures."""
    args = run.args
    torch.manual_seed(args.seed)
    images, _ = toy.load_images(args.dataset, args.data_dir, "test", args.size)
    N = args.evaluate_bound
    run.print(f"bound  {N} test images at each of {args.T} steps ...")
    prior, rows = evaluate_bound(run.ema, images, abar, N, args.predict, variance, gamma, not args.no_clip)
    require(rows.isfinite().all(), "the bound is not finite: the network is not trained, or diverged")
    (L, var, mse, entropy), (low, high) = rows.T, entropy_bounds(abar.cpu().double())
    rate, rmse, error = prior + L.sum() - L.cumsum(0), 127.5 * mse.sqrt(), lambda v: (v.sum() / N).sqrt().item()
    with common.aside(Path(args.out) / "bound.csv") as f:                  # rate: what is known of x_0 from x_t
        f.write(b"t,bits_per_dim,standard_error,rate,rmse_of_255,entropy,lower,upper\n")
        table = torch.stack([torch.arange(len(L)) + 1, L, (var / N).sqrt(), rate, rmse, entropy, low, high], dim=1)
        f.writelines((",".join(f"{v:.8g}" for v in row) + "\n").encode() for row in table.tolist())
    toy.plot(Path(args.out) / "rate-distortion.png", {"predicted x_0": list(zip(rate.tolist(), rmse.tolist()))},
             "bits/dim sent", "root mean squared error of 255")
    curves = {"upper bound": high - low, "of the network": entropy - low}
    toy.plot(Path(args.out) / "entropy.png", {k: list(enumerate(v.tolist(), 1)) for k, v in curves.items()}, "t",
             "entropy of a reverse step above its lower bound, nats/dim", logx=True, logy=True)
    half = rmse[rate >= min(rate[0], (prior + L.sum()) / 2)][-1]           # where half of the bits have been sent
    run.print(f"bound  {variance}: L_T {prior:.3g}   L_1..T-1 {L[1:].sum():.4f} +- "
              f"{error(var[1:]):.4f}   L_0 {L[0]:.4f} +- {error(var[:1]):.4f}   sum {prior + L.sum():.4f} +- "
              f"{error(var):.4f} bits/dim   half of the bits leave an error of {half:.2f} of 255")

def strip(run, abar, table, draw):
    """--strip: one picture of several ways to draw, from the same noise, or of the way from one image to another."""
    args, rows, cols = run.args, [], 10
    def row(name, n, **options):
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        rows.append(draw(run.ema, n, **options).cpu())
        run.print(f"strip  {name}   {time.perf_counter() - start:.1f} s for {n} images")
    if args.strip == "steps":
        for S in sorted({min(S, args.T) for S in (10, 20, 50, 100, args.T)}):
            for eta in (0.0, 1.0):
                row(f"{S} steps, eta = {eta:g}", cols, sampler="ddim", tau=subsequence(args.T, S), eta=eta)
    elif args.strip == "guidance":
        for w in (0.0, 1.0, 3.0):
            row(f"w = {w:g}", 3 * cols, w=w)
    else:
        images, _ = toy.load_images(args.dataset, args.data_dir, "test", args.size)
        require(len(images) > 1, f"--strip interpolate needs two pictures, {args.dataset} has one")
        n, f = min(12, len(images) // 2 * 2), predictor(run.ema, table, args.predict, clip=not args.no_clip)
        x0 = images[:n].to(args.device) / 127.5 - 1
        for S in sorted({min(S, args.T) for S in (10, 20, 50, 100, 200)}):
            x_T = ddim(f, x0, abar, tau := subsequence(args.T, S))         # encode
            error = (ddim(f, x_T, abar, tau[::-1]) - x0).square().mean().sqrt()
            run.print(f"strip  {S} steps to encode, {S} to decode: root mean squared error {127.5 * error:.3f} of 255")
        way = [slerp(a, b, k) for a, b in zip(x_T[::2], x_T[1::2]) for k in torch.linspace(0, 1, 9)]
        way, cols = ddim(f, torch.stack(way), abar, tau[::-1]).unflatten(0, (-1, 9)), 11
        rows.append(torch.cat([x0[::2, None], way, x0[1::2, None]], dim=1).flatten(0, 1).cpu())
    toy.save_picture(toy.grid(torch.cat(rows), run.low, cols), path := Path(args.out) / f"{args.strip}.png")
    run.print(f"saved  {path}")

def misses(nets, data, levels):
    """sweep() of the error of {label: network} at noise levels sigma, E|sigma (s - exact)|^2 / d."""
    def error(net, sigma):
        x = data(4000) + sigma * torch.randn_like(data(4000))
        return sigma ** 2 * (toy.score(net)(x, sigma) - data.score(x, sigma)).square().mean((1, 2, 3))
    return toy.sweep("sigma", "error", levels, nets, error, math.nan, logx=True, logy=True)

def conditioning():
    """How a network is told its noise: one number, sigma, its logarithm, the step t, or sines of the logarithm."""
    turn = lambda u: u[:, None].exp().atan() * 2 / math.pi                 # t / T of the cosine schedule, eq. (17)
    ways = {"sigma": lambda u: u[:, None].exp(), "log sigma": lambda u: u[:, None], "t / T": turn,
            "t": lambda u: 1000 * turn(u), "Fourier features": toy.fourier}
    sigma = common.geometric_sigmas(50, 0.01, 100).float()
    nets = {k: toy.fit(toy.Net(told=f), lambda net: ncsn.loss(net, toy.MIX(512), sigma), 1000) for k, f in ways.items()}
    return toy.join(misses(nets, toy.MIX, sigma[::9].tolist()))

def weighting():
    """lambda = sigma^p decides where a network with too little room errs; one with more has room for every p."""
    sigma, normal, ps = common.geometric_sigmas(5, 0.05, 10).float(), toy.Mixture([1.0], [[0.0]], 0.5), (0, 1, 2, 3, 4)
    nets = {f"p = {p}": toy.fit(toy.Net(), lambda net: ncsn.loss(net, toy.MIX(512), sigma, power=p), 1000) for p in ps}
    small = lambda w: lambda x, log_sigma, label: -w * log_sigma.exp().view(-1, 1, 1, 1) * x   # s = -w x, all levels
    best = lambda _, p: ncsn.least(lambda w: ncsn.loss(small(w), normal(4000), sigma, power=p))
    exact = lambda _, p: (sigma ** p).sum() / (sigma ** p * (normal.v + sigma ** 2)).sum()
    return toy.join(misses(nets, toy.MIX, sigma.tolist()),
                    toy.sweep("p", "best w of s = -w x", ps, {"exact": 0}, best, exact))

def main():
    p = common.arguments(__doc__)
    p.add_argument("--steps", type=int, help="optimizer steps (None: 4000 on digits, 12000 on others; paper: 800,000)")
    p.add_argument("--batch-size", type=int, default=16, help="images a step, shared by all processes (paper: 128)")
    p.add_argument("--lr", type=float, default=1e-3, help="largest learning rate of Adam: 5%% of the steps up to it, "
                   "then a cosine down to 0 (paper: 2e-4, constant)")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the average of the weights, after n steps at "
                   "most (1 + n) / (10 + n) (paper: 0.9999)")
    p.add_argument("--T", type=int, default=1000, help="steps of the forward process (paper: 1000)")
    p.add_argument("--schedule", choices=["linear", "cosine"], default="cosine", help="beta_1 ... beta_T (paper: "
                   "linear; improved DDPM: cosine)")
    p.add_argument("--predict", choices=["eps", "x0", "v"], default="eps", help="what the network returns (paper: eps)")
    p.add_argument("--objective", choices=["simple", "vlb", "hybrid"], default="simple", help="L_simple; the bound, "
                   "with learned variance and t by importance, lowest with --predict v; L_simple + 0.001 bound "
                   "(papers: simple, hybrid)")
    p.add_argument("--sampler", choices=["ddpm", "ddim", "langevin"], default="ddpm", help="Algorithm 2; DDIM; or "
                   "annealed Langevin dynamics, ncsn.py's, with the score -eps / sqrt(1 - abar)")
    p.add_argument("--sample-steps", type=int, help="draw with so many of the T steps, the last among them (None: all)")
    p.add_argument("--variance", choices=["beta", "beta-tilde", "learned", "analytic"], help="sigma_t^2 of Algorithm 2 "
                   "and of the bound (None: beta, or learned where it was trained; paper: beta or beta-tilde)")
    p.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 that of beta-tilde (DDIM paper: 0)")
    p.add_argument("--no-clip", action="store_true", help="do not clip the predicted x_0 to [-1, 1], neither in "
                   "sampling nor in the bound")
    p.add_argument("--temperature", type=float, default=1.0, help="standard deviation of x_T, the latent (papers: 1)")
    p.add_argument("--classes", action="store_true", help="train with the labels, one in ten being hidden")
    p.add_argument("--label", type=int, help="draw this class only; a network trained with --classes")
    p.add_argument("--guidance", type=float, default=0.0, help="w of classifier-free guidance: 0 is none")
    p.add_argument("--evaluate-bound", type=int, help="instead of drawing: the test set's bound in bits/dim, with "
                   "so many images a step; OUT/bound.csv, rate-distortion.png, entropy.png")
    p.add_argument("--strip", choices=["steps", "guidance", "interpolate"], help="instead of drawing, OUT/STRIP.png: "
                   "10, 20, 50, 100, T steps of DDIM, eta 0 and 1; w = 0, 1, 3 for each label; between test images "
                   "(of a folder: any)")
    args, ckpt = common.settings(p, "ddpm", may_be_0=("label", "n_classes", "eta", "guidance"), fixed=("T", "schedule",
                                 "predict", "objective"), not_kept=("label", "no_clip"))
    args.steps = args.steps or (4000 if args.dataset == "digits" else 12000)
    variance = args.variance or ("beta" if args.objective == "simple" else "learned")
    if not args.sample_only:
        images, labels = toy.load_images(args.dataset, args.data_dir, "train", args.size)
        require(labels is not None or not args.classes, f"--classes: the pictures in {args.dataset} have no labels")
        args.shape, args.n_classes = list(images.shape[1:]), int(labels.max()) + 1 if args.classes else 0
    abar = schedule(args.schedule, args.T).to(torch.float32 if "mps" in args.device else torch.float64)    # (T + 1,)
    table = abar.to(args.device)                                           # the samplers' is on the CPU
    tau = subsequence(args.T, args.sample_steps or args.T)
    require(args.label is None or args.label < args.n_classes,
            f"--label {args.label}: the network knows {args.n_classes} classes (train with --classes)")
    require(args.n_classes or not args.guidance and args.strip != "guidance", "--guidance: train with --classes")
    require(variance != "learned" or args.objective != "simple",
            "--variance learned: train with --objective hybrid or vlb")
    now = lambda flag: getattr(args, flag) != p.get_default(flag)          # given in this command, not saved
    require(not now("variance") or args.sampler == "ddpm" or args.evaluate_bound, "--variance is for --sampler ddpm")
    require(not now("eta") or args.sampler == "ddim" and args.eta <= 1, "--eta, 0 to 1, is for --sampler ddim")
    require(args.sampler != "langevin" or not (now("guidance") or now("sample_steps") or args.strip == "guidance"),
            "--sampler langevin has its own steps and no guidance: drop --sample-steps, --guidance, --strip guidance")
    require(sum(map(bool, (args.evaluate, args.evaluate_bound, args.strip))) <= 1,
            "--evaluate, --evaluate-bound and --strip: one at a time")
    require(args.evaluate_bound != 1, "--evaluate-bound takes 2 images or more")
    require(not args.evaluate_bound or args.dataset in (*toy.SHA256, "cifar10"),
            f"--evaluate-bound: {args.dataset} has no test images")
    require("mps" not in args.device or (args.sample_only or args.objective == "simple") and not args.evaluate_bound,
            "--device mps lacks what the bound needs: give --device cpu")

    def gamma():                                                           # estimated once for a network, and kept
        path, made_of = Path(args.out) / "gamma.pt", [run.n, run.seconds, run.ema.bf16]
        with contextlib.suppress(Exception):                               # none, damaged, or of another network
            kept = torch.load(path, weights_only=True)
            if kept["made_of"] == made_of:
                return kept["gamma"]
        torch.manual_seed(args.seed)
        images, _ = toy.load_images(args.dataset, args.data_dir, "train", args.size)
        common.save({"made_of": made_of, "gamma": (g := second_moment(run.ema, images, table, args.predict))}, path)
        return g

    def draw(net, n, frames=None, sampler=args.sampler, tau=tau, eta=args.eta, w=args.guidance):
        label = torch.arange(n, device=args.device) % max(1, args.n_classes) if args.n_classes else None    # in turn
        label = label if args.label is None else torch.full_like(label, args.label)
        x = args.temperature * torch.randn(n, *args.shape, device=args.device)
        if not args.sample_only and run.n < args.steps:                    # the grids drawn in training: quickly
            sampler, tau, eta = "ddim", subsequence(args.T, min(50, args.T)), 0.0
        learned = sampler == "ddpm" and variance == "learned"
        f = predictor(net, table, args.predict, label, w, not args.no_clip, learned, frames, max(1, len(tau) // 30))
        if sampler == "langevin":                                          # ncsn.py's ladder, for images in [-1, 1]
            D, sigma = denoiser({"args": vars(args)}, net, args.device), common.geometric_sigmas(10, 0.1, 30)
            return ncsn.sample(score_network(D), sigma[0] * x, sigma, 4e-3, [10] * 30, label, frames=frames, every=10)
        if sampler == "ddim":
            x = ddim(f, x, abar, tau[::-1], eta)
        elif variance == "beta" and len(tau) == len(abar):
            x = sample(f, x, abar)
        else:
            x = ancestral(f, x, abar, tau, variance, g)
        if frames is not None:
            frames.append(torch.stack([x[:8], x[:8]], dim=1).flatten(0, 1))
        return x

    run = Run(args, "ddpm", network(args), draw, ckpt, low=-1.0)
    run.print(f"data   {args.dataset}, {' x '.join(map(str, args.shape))}, range [-1, 1]")
    if not args.sample_only:
        for x0, label in run.batches(images, labels if args.classes else None):
            if args.objective == "simple":
                run.step(loss(run.net, x0, table, label, predict=args.predict))
            elif args.objective == "hybrid":
                run.step(hybrid_loss(run.net, x0, table, label, predict=args.predict))
            else:
                run.step(vlb_loss(run.net, x0, table, run.raw.history, label, predict=args.predict))
    if args.evaluate_bound:                                                # float32, TF32 not even on CUDA
        run.ema.bf16 = torch.backends.cudnn.allow_tf32 = False
    uses_g = args.evaluate_bound or args.sampler == "ddpm" and args.strip not in ("steps", "interpolate")
    g = gamma() if run.rank == 0 and variance == "analytic" and uses_g else None
    if run.rank == 0 and args.evaluate_bound:
        report_bound(run, table, variance, g)
    elif run.rank == 0 and args.strip:
        strip(run, abar, table, draw)
    elif run.rank == 0:
        run.finish(sampler=args.sampler, eta=args.eta if args.sampler == "ddim" else "",
                   variance=variance if args.sampler == "ddpm" else "")

if __name__ == "__main__":
    common.cli(main)
