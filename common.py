"""What has no equation number: noise schedules, the U-Net, runs and checkpoints, quality, the project's own digits."""
import argparse, concurrent.futures, contextlib, copy, csv, ctypes, functools, hashlib, io, math, os
import signal, struct, sys, time
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the file or flag and the cure."""

def require(ok, sentence):
    """Raise UserError(sentence) unless ok."""
    if not ok:
        raise UserError(sentence)

def cli(main):
    """Run main(); a UserError, or an OSError such as an unreadable file, is one sentence and exit status 2."""
    try:
        main()
    except (UserError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr, flush=True)
        os._exit(2) if dist.is_initialized() else sys.exit(2)    # other processes wait: no orderly farewell

@contextlib.contextmanager
def aside(path):
    """Open a file beside PATH for writing, then rename it to PATH: there is the old file or the new one, never half."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            yield f
            os.fsync(f.flush() or f.fileno())
        part.replace(path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror or e}); what was there before is untouched") from e
    finally:
        part.unlink(missing_ok=True)

def save(what, path):
    """torch.save to PATH, all or nothing."""
    torch.save(what, buffer := io.BytesIO())
    with aside(path) as f:
        f.write(buffer.getbuffer())

# --------------------------------------------------------------------------------------------- noise schedules
def geometric_sigmas(sigma_max, sigma_min, L):
    """(L,) float64: sigma_1 = sigma_max > ... > sigma_L = sigma_min with one ratio (Song & Ermon 2019, section 4.1)."""
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), L, dtype=torch.float64)

def linear_betas(T, beta_1=1e-4, beta_T=0.02):
    """(T,) float64: beta_1 ... beta_T in equal steps (Ho et al. 2020, section 4)."""
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)

def cosine_betas(T, s=0.008, beta_max=0.999):
    """(T,) float64: 1 - f(t) / f(t-1), at most beta_max; f(t) = cos^2((t/T + s) / (1 + s) pi/2) (Nichol, eq. 17)."""
    f = ((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2).cos().square()
    return (1 - f[1:] / f[:-1]).clamp(max=beta_max)

def karras_sigmas(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """(n + 1,) float64: from sigma_max to sigma_min in equal steps of sigma^(1/rho), then 0 (Karras 2022, eq. 5)."""
    return F.pad(torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n, dtype=torch.float64) ** rho, (0, 1))

# ------------------------------------------------------------------------------------------------- the network
def zero(layer):
    """The layer with all its weights 0: a residual branch starts as the identity, an output as 0."""
    [nn.init.zeros_(p) for p in layer.parameters()]
    return layer

class Block(nn.Module):
    """Residual block; the embedding scales and shifts its second normalisation (adaptive group norm)."""
    def __init__(self, c_in, c_out, c_emb, dropout, pool=False):
        super().__init__()
        self.pool, self.dropout, self.emb = pool, nn.Dropout(dropout), zero(nn.Linear(c_emb, 2 * c_out))
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        x = F.avg_pool2d(x, 2) if self.pool else x
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)                 # (B, C, 1, 1) each
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift        # addcmul is slow on CPUs
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))

class UNet(nn.Module):
    """net(x, noise, label=None): x (B, C, H, W), noise (B,) real (log sigma, t, ...), label (B,), -1 or None: no class.
    Float32 like x, 0 before training; inside bfloat16 if .bf16 is set. UserError for sizes that do not halve."""
    def __init__(self, channels=1, width=32, mult=(1, 2, 2), patch=1, classes=0, dropout=0.0, out=None):
        super().__init__()
        self.patch, self.levels, self.classes, self.bf16 = patch, len(mult), classes, False
        require(width % 8 == 0, f"--width {width} is not a multiple of 8, the groups of the normalisation")
        c, c_emb = width, 4 * width
        # frequencies in radians: 2, two neighbouring levels of log sigma stay alike; 0.002, t = 1 and 1000 differ
        self.register_buffer("freq", torch.logspace(math.log10(2), math.log10(0.002), width // 2), persistent=False)
        self.emb = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb) if classes else None             # the last row: null class
        self.conv_in = nn.Conv2d(channels * patch ** 2, width, 3, padding=1)
        self.down = nn.ModuleList([Block(c, c := width * m, c_emb, dropout, pool=k > 0) for k, m in enumerate(mult)])
        self.mid = nn.ModuleList([Block(c, c, c_emb, dropout), Block(c, c, c_emb, dropout)])
        self.norm_qkv, heads = nn.GroupNorm(8, c), c // math.gcd(c, 64)
        self.attention = nn.MultiheadAttention(c, heads, batch_first=True)
        zero(self.attention.out_proj)
        self.side = nn.ModuleList([nn.Conv2d(c, c := width * m, 1) for m in mult[::-1]])
        self.up = nn.ModuleList([Block(width * m, width * m, c_emb, dropout) for m in mult[::-1]])
        self.norm, self.conv_out = nn.GroupNorm(8, c), zero(nn.Conv2d(c, (out or channels) * patch ** 2, 3, padding=1))

    def forward(self, x, noise, label=None):
        (H, W), factor = x.shape[-2:], self.patch * 2 ** (self.levels - 1)
        require(H % factor == W % factor == 0, f"images of {H} x {W} do not fit the U-Net: both must be multiples of "
                f"{factor}, which is --patch {self.patch} times 2 for each halving")
        assert noise.shape == x.shape[:1], f"one noise value an image, got {tuple(noise.shape)} for {len(x)} images"
        angle = noise.float()[:, None] * self.freq                                     # (B, width / 2)
        emb = self.emb(torch.cat([angle.cos(), angle.sin()], dim=1))                   # (B, 4 width)
        if self.label is not None:
            label = torch.full_like(noise, -1).long() if label is None else label
            emb = emb + self.label(label % (self.classes + 1))                         # -1 is the last row
        h, emb = self.conv_in(F.pixel_unshuffle(x, self.patch)), F.silu(emb)           # (B, width, H / patch, ...)
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            h, skips = h.bfloat16() if self.bf16 else h, []
            for block in self.down:
                skips.append(h := block(h, emb))
            h = self.mid[0](h, emb)
            q = self.norm_qkv(h).flatten(2).transpose(1, 2)                            # (B, pixels, C)
            h = h + self.attention(q, q, q, need_weights=False)[0].transpose(1, 2).reshape(h.shape)
            h = self.mid[1](h, emb)
            for side, block in zip(self.side, self.up):
                skip, h = skips.pop(), side(h)                 # a sum: to concatenate them doubles the dearest layers
                h = block(skip + (F.interpolate(h, skip.shape[-2:]) if h.shape != skip.shape else h), emb)
            h = F.silu(self.norm(h)).float()
        return F.pixel_shuffle(self.conv_out(h), self.patch)

# ------------------------------------------------------------------------------------ flags, runs, checkpoints
class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag with its default."""

def arguments(doc):
    """The flags that all scripts share; --steps, --batch-size, --lr, --ema, to which papers give values, are theirs."""
    p = argparse.ArgumentParser(description=doc, formatter_class=Help)
    add = p.add_argument
    add("--dataset", default="digits", help="digits, mnist, fashion-mnist, cifar10, or a folder of pictures")
    add("--data-dir", default="data", help="where data sets are kept: DIR/mnist/train-images-idx3-ubyte[.gz], ...")
    add("--size", type=int, help="centre-crop and resize the pictures of a folder to so many pixels squared")
    add("--out", help="folder of the run: ckpt.pt, log.csv, loss.png, samples.png, ... (None: runs/SCRIPT-DATASET)")
    add("--resume", action="store_true", help="go on from OUT/ckpt.pt with its settings, as if never stopped")
    add("--sample-only", action="store_true", help="no training: draw from OUT/ckpt.pt with its settings")
    add("--overwrite", action="store_true", help="start anew in a folder that already holds a run")
    add("--width", type=int, default=32, help="channels of the U-Net's finest level, a multiple of 8")
    add("--patch", type=int, default=1, help="pixels squared that the U-Net sees as one: 2 is faster and coarser")
    add("--dropout", type=float, default=0.0, help="dropout in the U-Net's blocks")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or the name of one")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of the network; auto: bf16 in hardware")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--samples", type=int, default=100, help="images to draw at the end")
    add("--sample-every", type=int, default=2000, help="steps between grids drawn in training, all from the same noise")
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--npz", action="store_true", help="also write OUT/samples.npz: arr_0, uint8 (N, H, W, 3), for FID programs")
    add("--evaluate", type=int, help="draw at least N images and compare N with the test set: a row of OUT/quality.csv")
    add("--seed", type=int, default=0, help="of all that is random")
    return p

HERE = {"out", "data_dir", "resume", "sample_only", "overwrite", "device", "npz", "evaluate", "evaluate_bound",
        "strip"}                                                                        # of a command, not of a run
FIXED = {"dataset", "size", "width", "patch", "dropout", "classes"}                     # not changed after the start

def settings(parser, script, may_be_0=(), not_kept=(), fixed=()):
    """(args, ckpt): the command line, with --resume and --sample-only over the settings saved in OUT/ckpt.pt (FIXED and
    fixed may not change; --sample-only does not take not_kept from there). Joins the processes of torchrun. Raises
    UserError for a folder that holds a run, or a checkpoint that does not fit."""
    args, ckpt = parser.parse_args(), None
    args.out = out = args.out or f"runs/{script}-{Path(args.dataset).name}"
    if args.resume or args.sample_only:
        ckpt = load_checkpoint(Path(out) / "ckpt.pt", script)
        saved = {k: v for k, v in ckpt["args"].items() if k not in HERE.union(not_kept if args.sample_only else ())}
        parser.set_defaults(**saved, out=out)
        args = parser.parse_args()
        for k in FIXED.union(fixed) & saved.keys():
            require(getattr(args, k) == saved[k], f"--{k} is {saved[k]} in {out}/ckpt.pt: drop it, or change --out")
    else:
        require(args.overwrite or not any((Path(out) / f).exists() for f in ("ckpt.pt", "log.csv")),
                f"{out} already holds a run: go on with --resume, draw with --sample-only, start anew with --overwrite "
                "or name another --out")
    for k, v in ((k, v) for k, vs in vars(args).items() for v in (vs if isinstance(vs, list) else [vs])):
        ok = isinstance(v, (str, bool, type(None))) or 0 < v < (1 if k in ("ema", "dropout") else math.inf)
        ok = ok or v == 0 and k in ("seed", "dropout", "ema", *may_be_0)
        require(ok, f"--{k.replace('_', '-')} {v} is out of range")
    require(not args.evaluate or 10 <= args.evaluate <= 10_000, "--evaluate takes 10 to 10000, all test images")
    require(not args.evaluate or args.dataset in (*toy.SHA256, "cifar10"), f"--evaluate: {args.dataset} has no labels")
    auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    args.device = auto if args.device == "auto" else args.device
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {args.device} cannot be used here ({str(e).splitlines()[0]})") from e
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:                           # under torchrun
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
        torch.cuda.set_device(args.device) if "cuda" in args.device else None
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo")
        require(args.batch_size % world == 0, f"--batch-size {args.batch_size} is no multiple of the {world} processes")
    torch.manual_seed(args.seed)                                                      # the network's first weights
    return args, ckpt

def load_checkpoint(path, script=None):
    """What Run.save wrote (script, args, step, raw, ema, ...), no pickle run. UserError if damaged or another's."""
    require(Path(path).exists(), f"there is no checkpoint {path}: train first, or name its folder with --out")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        made_by = ckpt["script"]
    except Exception as e:                        # a damaged file makes torch.load raise any of half a dozen types
        raise UserError(f"{path} is truncated, damaged or no checkpoint of this project ({type(e).__name__})") from e
    require(script in (None, made_by), f"{path} was made by {made_by}.py, not by {script}.py: name another --out")
    return ckpt

FORMAT = torch.contiguous_format, torch.channels_last           # CPU, which is slow to normalise the second, and CUDA

def has_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return device != "mps" and bool(torch.cuda.is_bf16_supported(False) if "cuda" in device else
                                    cpu.get("avx512_bf16") or cpu.get("amx_bf16"))

def keep_memory():
    """Let glibc keep freed memory: to return it and to fetch it again, page by page, is a fifth of a step on a CPU."""
    if hasattr(libc := ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt"):
        libc.mallopt(-1, 2 ** 30)                                        # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25)           # M_MMAP_THRESHOLD; an old glibc allows less

class Run:
    """All that lies between a paper's loss and the files in OUT. net: the network to train, in bf16, compiled, on many
    processes as args say; ema: its average, to draw from; draw(net, n, frames): n images in [low, 1] drawn with it,
    and the frames of the process. ckpt: where to go on. Raises UserError if the loss is not finite."""
    def __init__(self, args, script, net, draw, ckpt=None, low=0.0):
        self.args, self.script, self.draw, self.low, self.out = args, script, draw, low, Path(args.out)
        self.device, self.n, self.seconds, self.rows, self.signal = args.device, 0, 0.0, [], 0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.print = functools.partial(print, flush=True) if self.rank == 0 else lambda text: None
        net.bf16 = args.precision == "bf16" or args.precision == "auto" and has_bf16(args.device)
        keep_memory()
        self.raw = net.to(self.device, memory_format=FORMAT["cuda" in args.device])
        self.ema = copy.deepcopy(self.raw).eval().requires_grad_(False)
        self.opt = torch.optim.Adam(self.raw.parameters(), args.lr, fused=True)
        self.recent = torch.zeros(100, 2, device=self.device)       # loss, gradient norm of the last 100 steps
        if ckpt:
            self.n, self.seconds, self.rows = ckpt["step"], ckpt["seconds"], ckpt["rows"]
            self.recent.copy_(ckpt["recent"])
            try:
                [getattr(self, name).load_state_dict(ckpt[name]) for name in ("raw", "ema", "opt")]
            except (RuntimeError, ValueError) as e:
                raise UserError(f"{self.out}/ckpt.pt is of another network, perhaps of an earlier version") from e
        self.raw.compile() or self.ema.compile() if args.compile else None
        self.net = nn.parallel.DistributedDataParallel(self.raw) if self.world > 1 else self.raw
        size = f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"
        self.print(f"net    {size}, {'bf16' if net.bf16 else 'fp32'} on {self.world} x {args.device}")

    def batches(self, images, labels=None):
        """Yield (x0, label) until args.steps are done: x0 float32 (B, C, H, W) in [low, 1], drawn with replacement. The
        seed of step n is (args.seed, n, rank): resuming is exact. Ctrl-C and SIGTERM save first; a second one exits."""
        images, labels = images.to(self.device), None if labels is None else labels.to(self.device)
        def stop(number, frame):
            self.signal = number
            signal.signal(number, handlers[number])
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.start, self.since = time.perf_counter(), self.n
        while self.n < self.args.steps:
            torch.manual_seed(int(np.random.SeedSequence((self.args.seed, self.n, self.rank)).generate_state(1)[0]))
            i = torch.randint(len(images), (self.args.batch_size // self.world,), device=self.device)
            yield images[i].float() * ((1 - self.low) / 255) + self.low, None if labels is None else labels[i]
        for number in handlers:
            signal.signal(number, handlers[number])

    def step(self, loss):
        """One optimizer step: gradient, clipping, learning rate, Adam, EMA; then log, save and draw when it is time."""
        args, f = self.args, min(1, (self.n + 1) / self.args.steps)
        loss.backward()
        for old in self.out.glob("*.*") if self.n == self.rank == 0 else ():      # --overwrite, as a step can be made
            mine = ("samples", "process.", "log.csv", "loss.png", "ckpt.pt", "quality.csv", "gamma.pt", "bound.csv",
                    "entropy.", "rate-distortion.", "steps.png", "guidance.png", "interpolate.png", "bits.csv",
                    "samplers.png", "quality.png")
            old.unlink() if old.name.startswith(mine) else None
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), 1.0)
        self.opt.param_groups[0]["lr"] = args.lr * min(1, 20 * f) * (1 + math.cos(math.pi * f)) / 2
        self.opt.step()
        self.opt.zero_grad()
        weights, decay = [p.detach() for p in self.raw.parameters()], min(args.ema, (1 + self.n) / (10 + self.n))
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - decay)
        self.recent[self.n % 100] = torch.stack([loss.detach().float(), norm])
        self.n += 1
        last, stop = self.n == args.steps, self.signal
        if self.world > 1:                                          # many processes must stop at the same step
            stop = torch.tensor(self.signal, device=self.device)
            stop = self.n % 10 == 0 and (dist.all_reduce(stop, dist.ReduceOp.MAX) or stop.item())
        if last or self.n % 100 == 0:
            self.log()
        if last or stop or self.n % args.save_every == 0:
            self.save()
        began = time.perf_counter()
        if self.rank == 0 and not last and (self.n % args.sample_every == 0 or self.n == min(100, args.sample_every)):
            torch.manual_seed(args.seed)                            # every grid starts from the same noise
            toy.save_picture(toy.grid(self.draw(self.ema, 16, None), self.low), self.out / f"samples_{self.n:06d}.png")
        self.start += time.perf_counter() - began                   # which is not training
        if stop:
            self.print(f"stop   after step {self.n}; go on with --resume --out {self.out}")
            sys.exit(128 + stop)

    def mean(self):
        """(loss, gradient norm), means of the last 100 steps over all processes. Raises UserError if not finite."""
        mean = self.recent[:self.n].mean(0)
        if self.world > 1:
            dist.all_reduce(mean)
        loss, norm = (mean / self.world).tolist()                   # the only wait for the device
        require(math.isfinite(loss + norm), f"the loss or its gradient is not finite in the steps up to {self.n}; "
                f"{self.out}/ckpt.pt, if there is one, is of before: lower --lr, or use --precision fp32")
        return loss, norm

    def log(self):
        """A line on the screen, a row in log.csv, a new loss.png."""
        (loss, norm), now, B, steps = self.mean(), time.perf_counter(), self.args.batch_size, self.args.steps
        rate, self.seconds = (self.n - self.since) / (now - self.start), self.seconds + now - self.start
        self.start, self.since = now, self.n
        self.print(f"step   {self.n:6d}/{steps}   loss {loss:.4f} (mean of last {min(100, self.n)})   "
                   f"{rate * B:.0f} images/s   {(steps - self.n) / rate / 60:.1f} min left")
        self.rows.append([self.n, loss, norm, self.opt.param_groups[0]["lr"], rate * B, self.seconds / 60])
        if self.rank == 0:
            with aside(self.out / "log.csv") as f:
                f.write(b"step,loss,grad_norm,lr,images_per_s,minutes\n")
                f.writelines((",".join(f"{v:.8g}" for v in row) + "\n").encode() for row in self.rows)
            toy.plot(self.out / "loss.png", {"mean of 100 steps": [row[:2] for row in self.rows]}, "step", "loss",
                 f"{self.script}.py on {Path(self.args.dataset).name}")

    def save(self):
        """Write OUT/ckpt.pt, all or nothing, unless the loss is not finite."""
        self.mean()
        if self.rank == 0:
            save({"script": self.script, "args": vars(self.args), "step": self.n, "seconds": self.seconds,
                  "rows": self.rows, "recent": self.recent, "raw": self.raw.state_dict(),
                  "ema": self.ema.state_dict(), "opt": self.opt.state_dict()}, self.out / "ckpt.pt")

    def counted(self, calls):
        """The averaged network; the list gets the number of images of every call."""
        return lambda x, *rest: calls.append(len(x)) or self.ema(x, *rest)

    def finish(self, **facts):
        """Draw args.samples images, or args.evaluate, with the averaged network: samples.png, process.gif, process.png,
        samples.npz, a row of quality.csv that begins with the sampler's facts (name=number). Returns them, uint8."""
        args, frames, chunks, calls = self.args, [], [], []
        torch.manual_seed(args.seed)
        start, net = time.perf_counter(), self.counted(calls)
        for left in range(total := max(args.samples, args.evaluate or 0), 0, -500):
            chunks.append(self.draw(net, min(left, 500), None if chunks else frames).cpu())
            seconds = time.perf_counter() - start
            done = total - max(0, left - 500)
            self.print(f"draw   {done}/{total} images   {seconds / 60 * (total / done - 1):.1f} min left")
        x = torch.cat(chunks)
        require(x.isfinite().all(), "the samples are not finite: let the sampler take smaller steps")
        self.print(f"drew   {len(x)} images in {seconds:.0f} s, {sum(calls) / len(x):.0f} evaluations of the network "
                   f"an image; see {self.out}/samples.png")
        toy.save_picture(toy.grid(x[:100], self.low), self.out / "samples.png")
        for suffix in ("gif", "png"):
            toy.save_process(frames, self.out / f"process.{suffix}", self.low)
        x = toy.to_uint8(x, self.low)
        if args.npz:
            with aside(self.out / "samples.npz") as f:
                np.savez(f, x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
        if args.evaluate:
            row = {"step": self.n, "minutes": round(self.seconds / 60, 2), **facts, "evaluations": sum(calls) / len(x),
                   "s_per_100": round(100 * seconds / len(x), 2), **evaluate(x[:args.evaluate], args)}
            with open(self.out / "quality.csv", "a", newline="") as f:
                writer = csv.DictWriter(f, row := {**row, "flags": " ".join(sys.argv[1:])})
                writer.writeheader() if f.tell() == 0 else None
                writer.writerow(row)
        return x

# ---------------------------------------------------------------------------------------------------- quality
def frechet(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared Frechet distance of the normal distributions with
    the means and covariances of the rows of a and of b (Heusel 2017, eq. 6)."""
    (m, A), (n, B) = ((x.double().mean(0), x.double().T.cov().view(x.shape[1], -1)) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()          # tr (A B)^(1/2)
    return ((m - n).square().sum() + A.trace() + B.trace() - 2 * cross).item()

def inside(a, b, k=3):
    """Share of the rows of b that lie no farther from some row of a than its k-th neighbour in a does: precision for
    a real and b drawn, recall the other way round (Kynkaanniemi et al. 2019)."""
    hit = torch.zeros(len(b), dtype=torch.bool)
    for rows in a.split(1000):
        radius = torch.cdist(rows, a).kthvalue(k + 1).values             # one of them is the row itself
        hit |= (torch.cdist(rows, b) <= radius[:, None]).any(0)
    return hit.double().mean().item()

def nearest(a, b):
    """Mean distance, over the images a, to the nearest of the images b; both uint8, the distance in units of [0, 1]."""
    a, b = a.flatten(1) / 255, b.flatten(1) / 255
    return torch.cat([torch.cdist(rows, b).amin(1) for rows in a.split(500)]).mean().item()

def classifier(name, data_dir="data", device="cpu", epochs=5, batch=128):
    """The yardstick's eye on a labelled set: net(x) are logits, net[:-1](x) 128 features, for x (B, C, H, W) in [0, 1].
    Trained once (two minutes on 2 cores) and kept in DATA_DIR/NAME/classifier.pt with a record of what made it."""
    (images, labels), (test, answers) = (toy.load_images(name, data_dir, split) for split in ("train", "test"))
    layers, c = [], images.shape[1]
    for width in (32, 64, 128):
        layers += [nn.Conv2d(c, c := width, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 128), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(128, int(labels.max()) + 1)).to(device)
    path = Path(data_dir) / name / "classifier.pt"
    made_of = {"net": str(net), "epochs": epochs, "batch": batch,
               "sha256": [hashlib.sha256(a.numpy()).hexdigest() for a in (images, labels, test, answers)]}
    try:
        kept = torch.load(path, map_location=device, weights_only=True)
        assert kept["made_of"] == made_of
        net.load_state_dict(kept["net"])
        return net.eval().requires_grad_(False), kept["accuracy"]
    except Exception:                         # none, damaged, or of other data: as any cache, it is made again
        print(f"eye    training the classifier that judges {name}; it is kept in {path}", flush=True)
    torch.manual_seed(0)
    net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    opt, order = torch.optim.Adam(net.parameters(), fused=True), [torch.randperm(len(images)) for _ in range(epochs)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, len(torch.cat(order)) // batch + 2)
    for i in torch.cat(order).split(batch):
        x = images[i].roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3)).to(device) / 255
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bf16(device)):
            F.cross_entropy(net(x), labels[i].to(device)).backward()
        opt.step(), opt.zero_grad(), schedule.step()
    net.eval().requires_grad_(False)
    accuracy = (features(net, test)[1].argmax(1) == answers).double().mean().item()
    with contextlib.suppress(UserError):                                 # a folder that is read-only keeps nothing
        save({"made_of": made_of, "accuracy": accuracy, "torch": str(torch.__version__), "net": net.state_dict()}, path)
    return net, accuracy

def features(net, images):
    """(features (N, 128), logits (N, K)) of uint8 images, on the CPU."""
    device = next(net.parameters()).device
    f = torch.cat([net[:-1](x.to(device) / 255).cpu() for x in images.split(500)])
    return f, net[-1](f.to(device)).cpu()

def evaluate(x, args):
    """How uint8 images x (N, C, H, W) compare with the test set of args.dataset, as {name: number}, printed in a line.
    floor: the mean Frechet distance of up to ten sets of N training images. nearest: the distance to the nearest
    training image over that of test images: 1 is new, 0 a copy."""
    (images, _), (test, _) = (toy.load_images(args.dataset, args.data_dir, split) for split in ("train", "test"))
    net, accuracy = classifier(args.dataset, args.data_dir, args.device)
    N, some = len(x), lambda x, n: x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]]
    (f, logits), (real, _) = features(net, x), features(net, test)
    sets = features(net, some(images, 10 * N))[0].split(N)                           # one alone is off by a quarter
    floor = float(np.mean([frechet(part, real) for part in sets if len(part) == len(sets[0])]))
    distance, p, real = frechet(f, real), logits.softmax(1), some(real, N)
    counts = p.argmax(1).bincount(minlength=p.shape[1])
    share = counts / counts.sum()
    near = nearest(x, images) / nearest(some(test, N), images)
    row = {"images": N, "frechet": distance, "floor": floor, "ratio": distance / floor,
           "precision": inside(real, f), "recall": inside(f, real), "entropy": -share.xlogy(share).sum().item(),
           "confidence": p.amax(1).mean().item(), "nearest": near}
    print("eval   " + "   ".join(f"{k} {v:.4g}" for k, v in row.items()) + f"   classes {counts.tolist()}   "
          f"(features of a classifier that is right on {100 * accuracy:.2f} % of the test set)")
    return {**row, "classes": " ".join(map(str, counts.tolist())), "classifier": accuracy}

# ------------------------------------------------------------------------------------------------------ digits
def draw_digits(folder, stems):
    """Draw digits, 60,000 + 10,000 of 28 x 28: Pillow's own font in six stroke widths, blurred, through a random affine
    map and a smooth elastic warp. Single IEEE operations of numpy only (no BLAS, sin or cos): every machine with the
    same numpy and Pillow draws the same bytes."""
    S, chunk, font, glyphs = 136, 500, ImageFont.load_default(102), []   # glyphs (S, S) are 4 times as large
    for digit, stroke in ((d, s) for d in "0123456789" for s in range(6)):
        im = Image.new("L", (S, S))
        ImageDraw.Draw(im).text((S / 2, S / 2), digit, 255, font, "mm", stroke_width=stroke)
        glyphs.append(np.asarray(im.filter(ImageFilter.GaussianBlur(2.5)), np.float64))
    ink, u = np.stack(glyphs).ravel(), np.arange(28.0) - 13.5            # u: pixel centres
    bump = np.square(np.maximum(0, 1 - np.square((u[:, None] - 9 * np.arange(-2, 3)) / 14)))      # (28, 5)

    def draw(seed):
        rng = np.random.default_rng(seed)
        uniform = lambda r, *shape: r * (2 * rng.random((2, chunk, *shape)) - 1)                  # two of each
        label, stroke = rng.integers(10, size=chunk), rng.integers(6, size=chunk)
        (a, d), (b, c), shift = 1.02 + uniform(0.2, 1, 1), uniform(0.25, 1, 1), uniform(1.5, 1, 1)
        bend = uniform(1.6, 5, 5)                                        # warp = sum_ij bump_i(y) bump_j(x) bend_ij
        rows = sum(bump[:, i, None] * bend[:, :, None, i, :] for i in range(5))                   # (2, chunk, 28, 5)
        warp = shift + sum(rows[..., j, None] * bump[:, j] for j in range(5))                     # (2, chunk, 28, 28)
        x, y = a * u + (b + 0.1) * u[:, None] + warp[0], 0.5 * c * u + d * u[:, None] + warp[1]
        x, y = (np.clip(4 * v + S / 2 - 0.5, 0, S - 2.001) for v in (x, y))
        ix, iy = x.astype(np.int64), y.astype(np.int64)
        at, fx, fy = ((label * 6 + stroke)[:, None, None] * S + iy) * S + ix, x - ix, y - iy
        top, bottom = ((1 - fx) * ink[at + s] + fx * ink[at + s + 1] for s in (0, S))             # bilinear
        return np.minimum(1.15 * ((1 - fy) * top + fy * bottom), 255).round().astype(np.uint8), label.astype(np.uint8)
    train = stems[0].startswith("train")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = pool.map(draw, ([1 - train, k] for k in range(120 if train else 20)))
        arrays = [np.concatenate(a) for a in zip(*chunks)]
    for stem, a in zip(stems, arrays):
        with aside(folder / stem) as f:
            f.write(struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape) + a.tobytes())
    print(f"data   drew {len(a)} digits into {folder}", flush=True)

import toy                                    # last: its laboratory imports the scripts, which import this file

if __name__ == "__main__":
    import ncsn                               # python common.py --benchmark: images/s of the default network
    ncsn.common.cli(ncsn.main)
