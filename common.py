"""What has no equation number: image sets, noise schedules, the U-Net, runs and checkpoints, pictures."""
import argparse, contextlib, copy, functools, gzip, hashlib, http.client, io, math, os, signal, socket, struct
import sys, tarfile, time, urllib.request, zlib
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

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

# ------------------------------------------------------------------------------------------------- image sets
FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
SHA256 = {"digits": [None] * 4, "mnist": """                                   of the FILES, decompressed
              ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
              65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
              0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
              ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2""".split()[-4:], "fashion-mnist": """
              c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
              bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
              5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
              0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34""".split()}
MD5 = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}         # as published
MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "fashion-mnist": ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"],
    "cifar10": ["https://www.cs.toronto.edu/~kriz/",
                "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"]}

def load_images(name, data_dir="data", split="train", size=None):
    """uint8 images (N, C, H, W) and int64 labels (N,) of a named set, or of a folder of pictures (labels None).
    What is missing is drawn (digits) or downloaded. Raises UserError naming the file and the cure."""
    if name not in (*SHA256, "cifar10"):
        return read_folder(Path(name), size), None
    require(not size, f"--size is for a folder of pictures; {name} has its own")
    folder, files, arrays = Path(data_dir) / name, {"train": slice(0, 2), "test": slice(2, 4)}[split], []
    if name == "cifar10":
        rows = torch.tensor(read(folder / "cifar-10-binary.tar.gz", parse_cifar10, split))
        return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()
    for stem, sha256 in zip(FILES[files], SHA256[name][files]):
        names = [n + gz for n in (stem, stem.replace("-idx", ".idx")) for gz in ("", ".gz")]
        path = next((folder / n for n in names if (folder / n).exists()), folder / names[name != "digits"])
        if name == "digits" and not path.exists():
            import toy                                  # toy draws toy data; it stands on this file, so not at the top
            toy.draw_digits(folder, FILES[files])
        arrays.append(torch.tensor(read(path, parse_idx, sha256)))
    return arrays[0][:, None], arrays[1].long()

def read(path, parse, *options):
    """parse(bytes of PATH, decompressed, *options), after a download if it is missing. UserError if it is damaged."""
    if not path.exists():
        download(path, parse, *options)
    try:
        raw = path.read_bytes()
        return parse(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw, *options)
    except (EOFError, OSError, zlib.error, struct.error, tarfile.TarError, KeyError, ValueError, UserError) as e:
        raise UserError(f"{path} is truncated, damaged or another file ({e}); delete it and run again") from e

def parse_idx(raw, sha256):
    """uint8 array of an IDX file."""
    zeros, kind, ndim = struct.unpack_from(">HBB", raw)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(struct.unpack_from(f">{ndim}I", raw, 4))
    require((zeros, kind) == (0, 8) and sha256 in (None, hashlib.sha256(raw).hexdigest()), "wrong magic or checksum")
    return data

def parse_cifar10(raw, split):
    """(N, 3073) labels and images in CIFAR-10's binary archive, read in place and never extracted."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        files = {Path(m.name).name: tar.extractfile(m).read() for m in tar if Path(m.name).name in names}
    return np.frombuffer(b"".join(files[n] for n in names), np.uint8).reshape(-1, 3073)

def download(path, parse, *options):
    """Fetch PATH from a mirror of its folder, each tried twice, and try to read it. UserError names the addresses."""
    part, tried, mib = Path(f"{path}.{os.getpid()}.part"), [], 2 ** 20
    socket.setdefaulttimeout(30)
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in [mirror + path.name for mirror in MIRRORS[path.parent.name] * 2]:
        try:
            urllib.request.urlretrieve(url, part, lambda k, block, total: print(
                f"\rfetch  {url} {min(k * block, total) / mib:.1f} of {total / mib:.1f} MiB", end="", flush=True))
            print()
            require(MD5.get(path.name) in (None, hashlib.md5(part.read_bytes()).hexdigest()), "wrong checksum")
            read(part, parse, *options)
            return part.replace(path)
        except (OSError, http.client.HTTPException, UserError) as e:
            tried.append(f"{url} ({e})")
        finally:
            part.unlink(missing_ok=True)
    raise UserError(f"cannot download {path.name}; put it into {path.parent} by hand. Tried: {', '.join(tried)}")

def read_folder(folder, size=None):
    """All pictures below FOLDER (N, C, H, W): one channel if all are grey, else RGB; transparent becomes white."""
    require(folder.is_dir(), f"--dataset {folder} is neither {', '.join(SHA256)}, cifar10 nor a folder of pictures")
    pictures = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions()):
        try:
            im = ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes())))
            if im.mode.startswith("I"):                                  # 16-bit grey, which convert() would clip
                im = Image.fromarray((np.asarray(im) >> 8).astype(np.uint8))
            require(im.mode != "F", "its pixels are floats of unknown range")
            mode = "L" if im.mode in ("1", "L", "LA", "La") else "RGB"
            if im.has_transparency_data:
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
            im = im.convert(mode)
        except (OSError, SyntaxError, ValueError, UserError, Image.DecompressionBombError) as e:
            raise UserError(f"cannot read the picture {path} ({e}); remove it from the folder") from e
        pictures.append(ImageOps.fit(im, (size, size), Image.Resampling.LANCZOS) if size else im)
        require(pictures[-1].size == pictures[0].size, f"{path} is not of the first one's size: give --size, say 32")
    require(pictures, f"the folder {folder} holds no picture that Pillow can read")
    mode = "L" if all(im.mode == "L" for im in pictures) else "RGB"
    images = torch.from_numpy(np.stack([np.asarray(im.convert(mode)) for im in pictures]))
    return images[:, None] if mode == "L" else images.permute(0, 3, 1, 2).contiguous()

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
        h = torch.addcmul(shift, self.norm2(self.conv1(F.silu(self.norm1(x)))), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))

class UNet(nn.Module):
    """net(x, noise, label=None): x (B, C, H, W), noise (B,) real (log sigma, t, ...), label (B,), -1 or None: no class.
    Float32 like x, 0 before training; inside bfloat16 if .bf16 is set. UserError for sizes that do not halve."""
    def __init__(self, channels=1, width=32, mult=(1, 2, 2), blocks=1, patch=1, classes=0, dropout=0.0):
        super().__init__()
        self.patch, self.levels, self.classes, self.bf16 = patch, len(mult), classes, False
        require(width % 8 == 0, f"--width {width} is not a multiple of 8, the groups of the normalisation")
        c, c_emb, skips = width, 4 * width, [width]
        # frequencies in radians: 2, two neighbouring levels of log sigma stay alike; 0.002, t = 1 and 1000 differ
        self.register_buffer("freq", torch.logspace(math.log10(2), math.log10(0.002), width // 2), persistent=False)
        self.emb = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb) if classes else None             # the last row: null class
        self.conv_in = nn.Conv2d(channels * patch ** 2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, b in ((level, b) for level in range(len(mult)) for b in range(blocks)):
            self.down.append(Block(c, c := width * mult[level], c_emb, dropout, pool=level > 0 and b == 0))
            skips.append(c)
        self.mid = nn.ModuleList([Block(c, c, c_emb, dropout), Block(c, c, c_emb, dropout)])
        self.norm_qkv, heads = nn.GroupNorm(8, c), c // math.gcd(c, 64)
        self.attention = nn.MultiheadAttention(c, heads, batch_first=True)
        zero(self.attention.out_proj)
        for m in [m for m in mult[::-1] for b in range(blocks)] + [mult[0]]:
            self.up.append(Block(c + skips.pop(), c := width * m, c_emb, dropout))
        self.norm, self.conv_out = nn.GroupNorm(8, c), zero(nn.Conv2d(c, channels * patch ** 2, 3, padding=1))

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
            skips = [h := h.bfloat16() if self.bf16 else h]
            for block in self.down:
                skips.append(h := block(h, emb))
            h = self.mid[0](h, emb)
            q = self.norm_qkv(h).flatten(2).transpose(1, 2)                            # (B, pixels, C)
            h = h + self.attention(q, q, q, need_weights=False)[0].transpose(1, 2).reshape(h.shape)
            h = self.mid[1](h, emb)
            for block in self.up:
                skip = skips.pop()
                h = F.interpolate(h, skip.shape[-2:]) if h.shape[-2:] != skip.shape[-2:] else h
                h = block(torch.cat([h, skip], dim=1), emb)
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
    add("--seed", type=int, default=0, help="of all that is random")
    return p

HERE = {"out", "data_dir", "resume", "sample_only", "overwrite", "device", "npz"}     # not taken from a checkpoint
FIXED = {"dataset", "size", "width", "patch", "dropout", "classes"}                   # not changed after the start

def settings(parser, script, may_be_0=(), not_kept=()):
    """(args, ckpt): the command line, with --resume and --sample-only over the settings saved in OUT/ckpt.pt. Joins
    the processes of torchrun. Raises UserError for a folder that holds a run, or a checkpoint that does not fit."""
    args, ckpt = parser.parse_args(), None
    args.out = out = args.out or f"runs/{script}-{Path(args.dataset).name}"
    if args.resume or args.sample_only:
        ckpt = load_checkpoint(Path(out) / "ckpt.pt", script)
        saved = {k: v for k, v in ckpt["args"].items() if k not in HERE.union(not_kept)}
        parser.set_defaults(**saved, out=out)
        args = parser.parse_args()
        for k in FIXED & saved.keys():
            require(getattr(args, k) == saved[k], f"--{k} is {saved[k]} in {out}/ckpt.pt: drop it, or change --out")
    else:
        require(args.overwrite or not any((Path(out) / f).exists() for f in ("ckpt.pt", "log.csv")),
                f"{out} already holds a run: go on with --resume, draw with --sample-only, start anew with --overwrite")
    for k, v in ((k, v) for k, vs in vars(args).items() for v in (vs if isinstance(vs, list) else [vs])):
        ok = isinstance(v, (str, bool, type(None))) or 0 < v < (1 if k in ("ema", "dropout") else math.inf)
        ok = ok or v == 0 and k in ("seed", "dropout", "ema", *may_be_0)
        require(ok, f"--{k.replace('_', '-')} {v} is out of range")
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

class Run:
    """All that lies between a paper's loss and the files in OUT. net: the network to train, in bf16, compiled, on many
    processes as args say; ema: its average, to draw from; draw(net, n, frames): n images in [low, 1] drawn with it,
    and the frames of the process. ckpt: where to go on. Raises UserError if the loss is not finite."""
    def __init__(self, args, script, net, draw, ckpt=None, low=0.0):
        self.args, self.script, self.draw, self.low, self.out = args, script, draw, low, Path(args.out)
        self.device, self.n, self.seconds, self.rows, self.signal = args.device, 0, 0.0, [], 0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.print = functools.partial(print, flush=True) if self.rank == 0 else lambda text: None
        cpu, cuda = getattr(torch.cpu, "get_capabilities", dict)(), "cuda" in args.device
        fast = torch.cuda.is_bf16_supported(False) if cuda else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        net.bf16 = args.precision == "bf16" or args.precision == "auto" and args.device != "mps" and bool(fast)
        layout = torch.channels_last if cuda else torch.contiguous_format       # a CPU normalises channels_last slowly
        self.raw = net.to(self.device, memory_format=layout)
        self.ema = copy.deepcopy(self.raw).eval().requires_grad_(False)
        self.opt = torch.optim.Adam(self.raw.parameters(), args.lr, fused=True)
        self.recent = torch.zeros(100, 2, device=self.device)       # loss, gradient norm of the last 100 steps
        if ckpt:
            self.n, self.seconds, self.rows = ckpt["step"], ckpt["seconds"], ckpt["rows"]
            self.recent.copy_(ckpt["recent"])
            for name in ("raw", "ema", "opt"):
                getattr(self, name).load_state_dict(ckpt[name])
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
            old.unlink() if old.name.startswith(("samples", "process.", "log.csv", "loss.png", "ckpt.pt")) else None
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
            save_picture(grid(self.draw(self.ema, 16, None), self.low), self.out / f"samples_{self.n:06d}.png")
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
            plot(self.out / "loss.png", {"mean of 100 steps": [row[:2] for row in self.rows]}, "step", "loss",
                 f"{self.script}.py on {Path(self.args.dataset).name}")

    def save(self):
        """Write OUT/ckpt.pt, all or nothing, unless the loss is not finite."""
        self.mean()
        if self.rank == 0:
            torch.save({"script": self.script, "args": vars(self.args), "step": self.n, "seconds": self.seconds,
                        "rows": self.rows, "recent": self.recent, "raw": self.raw.state_dict(),
                        "ema": self.ema.state_dict(), "opt": self.opt.state_dict()}, buffer := io.BytesIO())
            with aside(self.out / "ckpt.pt") as f:
                f.write(buffer.getbuffer())

    def finish(self):
        """Draw args.samples images with the averaged network: samples.png, process.gif, process.png, samples.npz."""
        torch.manual_seed(self.args.seed)
        start, frames, chunks = time.perf_counter(), [], []
        for left in range(self.args.samples, 0, -500):
            chunks.append(self.draw(self.ema, min(left, 500), None if chunks else frames))
        x = torch.cat(chunks)
        require(x.isfinite().all(), "the samples are not finite: let the sampler take smaller steps")
        self.print(f"drew   {len(x)} images in {time.perf_counter() - start:.0f} s; see {self.out}/samples.png")
        save_picture(grid(x[:100], self.low), self.out / "samples.png")
        for suffix in ("gif", "png"):
            save_process(frames, self.out / f"process.{suffix}", self.low)
        if self.args.npz:
            with aside(self.out / "samples.npz") as f:
                np.savez(f, to_uint8(x, self.low).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())

# --------------------------------------------------------------------------------------------------- pictures
def to_uint8(x, low=0.0):
    """Float images in [low, 1] as uint8, rounded and clamped."""
    return ((x.float() - low) * (255 / (1 - low))).round().clamp(0, 255).byte().cpu()

def grid(images, low=0.0, cols=None, pad=2, size=600):
    """A Pillow picture of N images (C, H, W) in [low, 1], row by row, enlarged by a whole number to about SIZE."""
    images = to_uint8(images, low)
    N, C, H, W = images.shape
    cols = cols or math.ceil(N ** 0.5)
    images = F.pad(torch.cat([images, images.new_zeros(-N % cols, C, H, W)]), (0, pad, 0, pad), value=64)
    sheet = images.view(-1, cols, C, H + pad, W + pad).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    sheet = F.pad(sheet, (pad, 0, pad, 0), value=64).permute(1, 2, 0).squeeze(2).numpy()
    return ImageOps.scale(Image.fromarray(sheet), max(1, round(size / sheet.shape[1])), Image.Resampling.NEAREST)

def save_picture(picture, path, **options):
    """Write a Pillow picture, all or nothing, in the format of the path's suffix."""
    with aside(path) as f:
        picture.save(f, Path(path).suffix[1:], **options)

def save_process(frames, path, low=0.0, rows=6, columns=11):
    """K frames of N images (C, H, W) each: a .gif plays 16 of them; a .png has one a row, time to the right."""
    if Path(path).suffix == ".gif":
        first, *rest = (grid(f[:16], low, size=300) for f in frames)
        return save_picture(first, path, save_all=True, append_images=rest, duration=[80] * len(rest) + [2500], loop=0)
    shown = [frames[round(k)][:rows] for k in np.linspace(0, len(frames) - 1, min(columns, len(frames)))]
    save_picture(grid(torch.stack(shown, dim=1).flatten(0, 1), low, cols=len(shown)), path)

def plot(path, curves, xlabel, ylabel, title="", logx=False, logy=False):
    """A line plot {label: [(x, y), ...]} as PNG, without points that are not finite, or not positive on a log axis."""
    ok = lambda v, log: math.isfinite(v) and (v > 0 or not log)
    curves = {label: [(x, y) for x, y in c if ok(x, logx) and ok(y, logy)] for label, c in curves.items()}
    colors = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563"] * len(curves)
    large, small = ImageFont.load_default(30), ImageFont.load_default(26)
    left, right, top, bottom, points = 170, 1400, 80, 780, sum(curves.values(), [])
    draw = ImageDraw.Draw(picture := Image.new("RGB", (1440, 900), "white"))
    def axis(values, log, start, end):
        """(function from a value to its pixel, values to mark) for an axis that runs from pixel start to end."""
        low, high = min(values, default=1), max(values, default=10)
        if low == high:
            low, high = (low / 2, low * 2) if log else (low - abs(low) - 1, low + abs(low) + 1)
        f, exponent = (math.log10 if log else float), math.floor(math.log10(high / low if log else high - low))
        marks = [m * 10.0 ** k for k in range(-12, 13) for m in ((1,) if exponent > 1 else (1, 2, 5))]
        if not log:
            step = min((m for m in marks if m >= (high - low) / 6), default=high - low)
            marks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        a, b = 1.03 * f(low) - 0.03 * f(high), 1.03 * f(high) - 0.03 * f(low)
        return lambda v: start + (f(v) - a) / (b - a) * (end - start), [m for m in marks if low <= m <= high]
    px, xs = axis([x for x, y in points], logx, left, right)
    py, ys = axis([y for x, y in points], logy, bottom, top)
    for line, at, text, anchor in [((px(v), top, px(v), bottom), (px(v), bottom + 12), f"{v:g}", "mt") for v in xs] + \
            [((left, py(v), right, py(v)), (left - 14, py(v)), f"{v:g}", "rm") for v in ys]:
        draw.line(line, "#e5e7eb", 2)
        draw.text(at, text, "#374151", small, anchor)
    for (label, curve), color, k in zip(curves.items(), colors, range(len(curves))):
        draw.line([(px(x), py(y)) for x, y in curve] or [(0, 0)], color, 5, joint="curve")
        for x, y in curve if len(curve) <= 30 else []:
            draw.ellipse([px(x) - 7, py(y) - 7, px(x) + 7, py(y) + 7], color)
        draw.line([right - 70, top + 34 + 40 * k, right - 20, top + 34 + 40 * k], color, 7)              # legend
        draw.text((right - 84, top + 34 + 40 * k), label, "#111827", small, "rm", stroke_width=6, stroke_fill="white")
    draw.rectangle([left, top, right, bottom], outline="#374151", width=2)
    for at, text, anchor in (((left, 40), ylabel, "lm"), ((right, 40), title, "rm"), ((785, 866), xlabel, "mm")):
        draw.text(at, text, "#111827", large, anchor)
    save_picture(picture.resize((720, 450), Image.Resampling.LANCZOS), path)               # smooths the lines
