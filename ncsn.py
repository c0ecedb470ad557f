"""Noise conditional score networks (NCSN) on small images: denoising score matching, annealed Langevin dynamics.

Paper    Song & Ermon 2019, arXiv:1907.05600 (equation numbers: arXiv v3); images in [0, 1]
Noise    q_sigma(x~ | x) = N(x~ | x, sigma^2 I), sigma_1 > ... > sigma_L geometric           sections 4.1, 4.2
Network  s(x, sigma) = net(x, log sigma) / sigma
Loss     l(theta; sigma) = 1/2 E || s(x~, sigma) + (x~ - x) / sigma^2 ||^2                             eq. (5)
         1/L sum_i lambda(sigma_i) l(theta; sigma_i), lambda(sigma) = sigma^2                          eq. (6)
Sample   for sigma_1 ... sigma_L, T times each: x <- x + alpha_i/2 s(x, sigma_i) + sqrt(alpha_i) z,
         alpha_i = eps sigma_i^2 / sigma_L^2                                                      Algorithm 1
Differs  mean over pixels instead of sum; one U-Net that is told log sigma, no RefineNet with one normalisation a
         level; images are not dequantised; clipped gradients, a learning rate that decays, an average of the weights
         and a last denoising step (Tweedie), as in the authors' second paper; and by default more levels, from a
         larger sigma, lambda = sigma^3 (see README, "What differs"). The authors' code takes x + alpha_i s +
         sqrt(2 alpha_i) z, twice the step at the same eps: what is --eps 2e-5 there is --eps 4e-5 here.

    python ncsn.py --dataset mnist              # trains, then see runs/ncsn-mnist/samples.png and process.gif
    python ncsn.py --dataset mnist --resume     # goes on; with --sample-only just draws
"""
import math
import torch
import common
from common import Run, UNet, geometric_sigmas, require

def score(net, x, sigma, label=None):
    """s(x, sigma) = net(x, log sigma) / sigma, an estimate of grad log q_sigma(x); sigma: (B,)."""
    return net(x, sigma.log(), label) / sigma.view(-1, 1, 1, 1)

def loss(net, x, sigma, label=None, power=2.0, p_null=0.1):
    """Denoising score matching over the levels sigma (L,), on the device of x, eqs. (5), (6), mean over pixels.
    lambda(sigma) = sigma^power. A label (B,) is hidden from the network (-1) with probability p_null, to learn both."""
    i = torch.randint(len(sigma), (len(x),), device=x.device)              # one level an image: the sum of eq. (6)
    if label is not None:
        label = label.where(torch.rand(len(x), device=x.device) >= p_null, -1)
    sigma_i = sigma[i]                                                     # (B,)
    z = torch.randn_like(x)
    x_tilde = x + sigma_i.view(-1, 1, 1, 1) * z                            # x~ ~ q_sigma(x~ | x)
    target = -z / sigma_i.view(-1, 1, 1, 1)                                # -(x~ - x) / sigma^2, eq. (2)
    l = 0.5 * (score(net, x_tilde, sigma_i, label) - target).square().flatten(1).mean(1)      # (B,), eq. (5)
    return (sigma_i ** power * l).mean()                                   # eq. (6)

@torch.no_grad()
def sample(net, x, sigma, eps, T, label=None, denoise=True, frames=None, every=10**9):
    """Annealed Langevin dynamics, Algorithm 1, from x (B, C, H, W), over the levels sigma (L,), T (L,) steps on each.
    denoise: end with E[x | x~] (Tweedie). frames: a list that gets x after each level and every so many steps."""
    at = lambda i: torch.full((len(x),), float(sigma[i]), device=x.device)
    for i in range(len(sigma)):                                            # from the largest sigma to the smallest
        alpha = eps * float(sigma[i] / sigma[-1]) ** 2                     # line 3
        for t in range(T[i]):
            z = torch.randn_like(x)
            x = x + alpha / 2 * score(net, x, at(i), label) + math.sqrt(alpha) * z             # line 6
            if frames is not None and ((t + 1) % every == 0 or t + 1 == T[i]):
                frames.append(x.clone())
    if denoise:
        x = x + float(sigma[-1]) ** 2 * score(net, x, at(-1), label)       # E[x | x~] = x~ + sigma^2 grad log q(x~)
        if frames is not None:
            frames.append(x.clone())
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

def network(args):
    """The U-Net of these settings."""
    channels = args.shape[0]
    mult = (1, 2, 2) if args.patch == 1 else (1, 2)                        # 28 is 4 times an odd number
    return UNet(channels, args.width, mult, patch=args.patch, classes=args.n_classes, dropout=args.dropout)

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

def main():
    p = common.arguments(__doc__)
    p.add_argument("--steps", type=int, help="optimizer steps (None: 3500 on digits, 6500 on others; paper: 200,000)")
    p.add_argument("--batch-size", type=int, default=16, help="images a step, shared by all processes (paper: 128)")
    p.add_argument("--lr", type=float, default=1e-3, help="largest learning rate of Adam: 5%% of the steps up to it, "
                   "then a cosine down to 0 (paper: 1e-3, constant)")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the average of the weights, after n steps at "
                   "most (1 + n) / (10 + n) (paper: no average; the authors' second: 0.999)")
    p.add_argument("--sigma-max", type=float, default=5.0, help="largest noise sigma_1 (paper: 1)")
    p.add_argument("--sigma-min", type=float, default=0.05, help="smallest noise sigma_L (paper: 0.01)")
    p.add_argument("--levels", type=int, default=30, help="number of noise levels L (paper: 10)")
    p.add_argument("--power", type=float, default=3.0, help="lambda(sigma) = sigma^POWER in eq. (6) (paper: 2)")
    p.add_argument("--eps", type=float, default=1e-3, help="Langevin step size at the last level (paper: 2e-5)")
    p.add_argument("--T", type=int, nargs="+", default=[10], help="Langevin steps a level, one number or one a "
                   "level (paper: 100)")
    p.add_argument("--no-denoise", action="store_true", help="leave out the last denoising step (paper: left out)")
    p.add_argument("--classes", action="store_true", help="train with the labels, one in ten being hidden")
    p.add_argument("--label", type=int, help="draw this class only; a network trained with --classes")
    args, ckpt = common.settings(p, "ncsn", may_be_0=("label", "n_classes", "power"),
                                 not_kept=("label", "no_denoise"))
    args.steps = args.steps or (3500 if args.dataset == "digits" else 6500)
    require(args.sigma_min <= args.sigma_max, f"--sigma-min {args.sigma_min} is above --sigma-max {args.sigma_max}")
    sigma = geometric_sigmas(args.sigma_max, args.sigma_min, args.levels)
    T = args.T * args.levels if len(args.T) == 1 else args.T
    require(len(T) == args.levels, f"--T gives {len(T)} numbers for --levels {args.levels}: give one, or one a level")
    if not args.sample_only:
        images, labels = common.load_images(args.dataset, args.data_dir, "train", args.size)
        require(labels is not None or not args.classes, f"--classes: the pictures in {args.dataset} have no labels")
        args.shape, args.n_classes = list(images.shape[1:]), int(labels.max()) + 1 if args.classes else 0
    require(args.label is None or args.label < args.n_classes,
            f"--label {args.label}: the network knows {args.n_classes} classes (train with --classes)")

    def draw(net, n, frames=None):                                         # labels in turn: one class a column of ten
        label = torch.arange(n, device=args.device) % max(1, args.n_classes) if args.n_classes else None
        label = label if args.label is None else torch.full_like(label, args.label)
        x = torch.rand(n, *args.shape, device=args.device)
        every = max(1, max(T) * args.levels // 30)                         # about 30 frames, one a level or more
        return sample(net, x, sigma, args.eps, T, label, not args.no_denoise, frames, every)
    run = Run(args, "ncsn", network(args), draw, ckpt)
    run.print(f"data   {args.dataset}, {' x '.join(map(str, args.shape))}, range [0, 1]")
    rows = meter(sigma, args.eps)
    run.print("meter  r = a / sigma^2, and how much it inflates the variance on a point, at each sigma:")
    for k in range(0, len(rows), 5):
        run.print("".join(f"  {s:9.4f}: {r:.3g} x{inflation:.4g}" for s, r, inflation in rows[k:k + 5]))
    if (r := max(r for _, r, _ in rows)) > 1:
        run.print(f"warn   r > 1: Langevin steps overshoot{', and diverge above 2' if r > 2 else ''}; lower --eps")
    if not args.sample_only:
        levels = sigma.float().to(run.device)
        for x, label in run.batches(images, labels if args.classes else None):
            run.step(loss(run.net, x, levels, label, args.power))
    if run.rank == 0:
        run.finish()

if __name__ == "__main__":
    common.cli(main)
