"""Runs of seconds: presets for ``--preset tests/tiny.py:NAME``, their data, and ways to start them.

Presets that end in ``_killed`` are the same runs, and end themselves and their whole process group
by SIGKILL at a place that the test chose.
"""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import (
    ClipConfig,
    ClipRun,
    DalleConfig,
    DalleRun,
    DvaeConfig,
    DvaeRun,
    FsqConfig,
    Optimizer,
    Plateau,
    Ramp,
    TowerConfig,
)
from pipeline.console import InputError

ROOT = Path(__file__).parent.parent
# of processes that the tests start, also where there is a GPU
CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
STEPS, SAVE_EVERY = 20, 5
IMAGE_SIZE, GRID, N_CODES = 32, 4, 24
N_TEXT, TEXT_VOCAB = 24, 320
DVAE = DvaeConfig(image_size=IMAGE_SIZE, n_vocab=N_CODES, n_hid=8, n_init=8, n_blk_per_group=1)


def dalle() -> DalleRun:
    """Three layers, one of each pattern; the batch is small against the 50 captions."""
    return DalleRun(
        model=DalleConfig(
            n_layer=3, d_model=32, n_head=2, n_text=N_TEXT, n_text_vocab=TEXT_VOCAB, grid=GRID,
            n_image_vocab=N_CODES, conv_kernel=3,
        ),
        optimizer=Optimizer(
            betas=(0.9, 0.96), weight_decay=4.5e-2, gradient_clipping=4.0, ema_decay=0.9,
            ema_every=3,
        ),
        batch=8, steps=STEPS, warmup=3, lr=Ramp(5e-3, 5e-4, STEPS),
        val_images=8, val_every=SAVE_EVERY, save_every=SAVE_EVERY, log_every=1,
    )  # fmt: skip


def dvae() -> DvaeRun:
    """The temperature and the weight of the KL term move in all twenty updates."""
    return DvaeRun(
        model=DVAE,
        optimizer=Optimizer(
            betas=(0.9, 0.999), weight_decay=1e-4, gradient_clipping=0.0, ema_decay=0.9
        ),
        batch=8, steps=STEPS,
        lr=Ramp(3e-3, 3e-4, STEPS), beta=Ramp(0.0, 1.0, STEPS), tau=Ramp(1.0, 0.25, STEPS),
        val_images=8, val_every=SAVE_EVERY, save_every=SAVE_EVERY, log_every=1,
    )  # fmt: skip


def clip() -> ClipRun:
    """Two towers of two layers; the batch is small against the 50 pictures."""
    return ClipRun(
        model=ClipConfig(
            image_size=IMAGE_SIZE, patch_size=8, vision=TowerConfig(16, 2, 2), n_text=N_TEXT,
            n_vocab=TEXT_VOCAB + 1, text=TowerConfig(16, 2, 2), n_embed=12, quick_gelu=False,
        ),
        optimizer=Optimizer(
            betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, gradient_clipping=1.0, ema_decay=0.5
        ),
        batch=8, steps=STEPS, warmup=3, lr=Ramp(5e-3, 5e-4, STEPS),
        val_images=8, val_batch=8, val_every=SAVE_EVERY, save_every=SAVE_EVERY, log_every=1,
    )  # fmt: skip


def clip_between_saves_killed() -> ClipRun:
    """``clip``, killed after the line of update 7 was written."""
    _kill_between_saves()
    return clip()


def fsq() -> DvaeRun:
    """``dvae`` with finite scalar quantisation, as many codes."""
    model = FsqConfig(image_size=IMAGE_SIZE, levels=(4, 3, 2), n_hid=8, n_init=8, n_blk_per_group=1)
    return dataclasses.replace(dvae(), model=model, beta=None, tau=None)


def dalle_short_with_one_head() -> DalleRun:
    """A head of width 32, the least that the Triton kernels take; eight updates."""
    run = dalle()
    model = dataclasses.replace(run.model, n_head=1)
    return dataclasses.replace(run, model=model, steps=8, val_every=8, save_every=8)


def dalle_other_seed() -> DalleRun:
    """Another run."""
    return dataclasses.replace(dalle(), seed=1)


def dalle_full() -> DalleRun:
    """``dalle`` with all of the recipe: gradient scales, a bounded variance, QK-norm, z-loss."""
    from pipeline.training.engines.engine import Engine
    from pipeline.training.engines.gradient_scales import GradientScales

    def take(self, module):
        # else float16 has them alone, whose sums depend on how a batch is cut
        self.scales = GradientScales(module.take_gradient_scales())

    Engine._take_scales = take
    run = dalle()
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, qk_norm=True),
        # a gradient of norm 4 is clipped and so is the variance
        optimizer=dataclasses.replace(
            run.optimizer, gradient_clipping=0.5, max_exp_avg_sq=1e-5, ema_every=2
        ),
        z_loss=0.01, lr=Plateau(2e-3, halvings=2, window=50, patience=100),
        steps=6, val_every=6, save_every=1,
    )  # fmt: skip


def dalle_full_overflowing() -> DalleRun:
    """``dalle_full``; in the last update one block of the last rank overflows."""
    from pipeline.models import dalle as models
    from pipeline.training.engines.gradient_scales import GradientScales

    run = dalle_full()
    init, forward, unscale = models.Dalle.__init__, models.MLP.forward, GradientScales.unscale
    rank, last = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    updates = []

    def marked(self, config):
        init(self, config)
        self.blocks[1].mlp.overflows = rank == max(last, 1) - 1

    def spoilt(self, x):
        y = forward(self, x)
        if getattr(self, "overflows", False) and y.requires_grad:
            y.register_hook(lambda g: g * math.inf if len(updates) == run.steps - 1 else g)
        return y

    def counted(self, *args):
        updates.append(None)
        return unscale(self, *args)

    models.Dalle.__init__, models.MLP.forward = marked, spoilt
    GradientScales.unscale = counted
    return run


def dalle_asked_to_leave() -> DalleRun:
    """``dalle``, whose last rank alone gets SIGUSR1 after update 7."""
    from pipeline.training.watching.telemetry import Telemetry

    write = Telemetry.update

    def update(self, step, values):
        write(self, step, values)
        if step == 7 and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGUSR1)

    Telemetry.update = update
    return dalle()


def dalle_ladder() -> DalleRun:
    """``dalle`` of 120 updates, which leaves after each thirty and notes what it has seen.

    Files in $SEEN: a line an update and sample.
    """
    from pipeline.training.loop import _Session
    from pipeline.training.watching.telemetry import Telemetry

    write, train = Telemetry.update, _Session._pass
    noted = Path(os.environ["SEEN"]) / f"{os.getpid()}.txt"

    def update(self, step, values):
        write(self, step, values)
        if step in (30, 60, 90):
            os.kill(os.getpid(), signal.SIGUSR1)

    def note(self, batches, step):
        with open(noted, "a") as file:
            file.writelines(f"{step} {row}\n" for batch in batches for row in batch.ids)
        return train(self, batches, step)

    Telemetry.update, _Session._pass = update, note
    return dataclasses.replace(dalle(), steps=120, save_every=120, lr=Ramp(5e-3, 5e-4, 120))


def dalle_drifting() -> DalleRun:
    """``dalle``, in whose eighth update the ranks of the second node go astray by a bit."""
    from pipeline.training.engines.zero import ZeroEngine

    made = ZeroEngine.update

    def update(self, lr):
        norm = made(self, lr)
        if self.updates == 8 and self.rank >= 2:
            self._shards.flats()[0].data[0] += 1e-3
        return norm

    ZeroEngine.update = update
    return dalle()


def dalle_gathered() -> DalleRun:
    """``dalle``; in the end DeepSpeed itself gathers weights and averages, into OUT."""
    from safetensors.torch import save_file

    from pipeline.training import loop

    finish = loop._finish

    def gather(stage, engine, out):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for key in ("weight", "ema"):
            whole = {}
            for name, p in engine.module.named_parameters():
                value = (
                    safe_get_full_fp32_param(p)
                    if key == "weight"
                    else safe_get_full_optimizer_state(p, key)
                )
                whole[name] = value.clone()
            if engine.rank == 0:
                save_file(whole, out / f"{key}.safetensors")
        finish(stage, engine, out)

    loop._finish = gather
    return dalle()


def dalle_soak() -> DalleRun:
    """``dalle`` of $SOAK_STEPS updates, whose saves take long enough to be killed in."""
    from pipeline.training import checkpoint

    sync, steps = checkpoint._sync, int(os.environ["SOAK_STEPS"])

    def slowly(path):
        time.sleep(0.3)
        sync(path)

    checkpoint._sync = slowly
    return dataclasses.replace(dalle(), steps=steps, lr=Ramp(5e-3, 5e-4, steps))


def dalle_slow() -> DalleRun:
    """``dalle``, which takes ten seconds longer."""
    from pipeline.training.watching.telemetry import Telemetry

    write = Telemetry.update

    def update(self, step, values):
        write(self, step, values)
        time.sleep(0.5)

    Telemetry.update = update
    return dalle()


def dalle_damaged_on_rank_1() -> DalleRun:
    """``dalle``, whose second rank finds a damaged sample in the fourth batch."""
    from pipeline.data.loader import TokenLoader

    batch_at = TokenLoader.batch_at

    def damaged(self, position):
        if position == 24 and os.environ["RANK"] == "1":
            raise InputError("row 'x' of rank 1 is damaged")
        return batch_at(self, position)

    TokenLoader.batch_at = damaged
    return dalle()


def dalle_between_saves_killed() -> DalleRun:
    """``dalle``, killed after the line of update 7 was written."""
    _kill_between_saves()
    return dalle()


def dvae_between_saves_killed() -> DvaeRun:
    """``dvae``, killed at the same place."""
    _kill_between_saves()
    return dvae()


def _kill_between_saves() -> None:
    from pipeline.training.watching.telemetry import Telemetry

    write = Telemetry.update

    def update(self, step, values):
        write(self, step, values)
        if self._speaks and step == 7:
            _kill_the_group()

    Telemetry.update = update


def dalle_inside_save_killed() -> DalleRun:
    """``dalle``, killed in the save of update 10, when the file of rank 0 is there."""
    _kill_inside_save()
    return dalle()


def dvae_inside_save_killed() -> DvaeRun:
    """``dvae``, killed at the same place."""
    _kill_inside_save()
    return dvae()


def _kill_inside_save() -> None:
    from pipeline.training import checkpoint

    sync = checkpoint._sync

    def die(path):
        sync(path)
        if path.parent.name == "step-0000010.partial" and path.name.startswith("rank-00000"):
            _kill_the_group()

    checkpoint._sync = die


def _kill_the_group() -> None:
    os.killpg(0, signal.SIGKILL)


@dataclass(frozen=True)
class Inputs:
    """Folders of what the commands of data_prep made."""

    pairs: Path
    tokenizer: Path
    dvae: Path
    other_dvae: Path
    tokens: Path


def ingest(sources: list, out: Path, image_size: int, *, filters=(), team=None, **settings):
    """A pair set of all that can be read, without filters but those named; returns the ledger."""
    from data_prep.facts import Job
    from data_prep.filters import Filters
    from data_prep.ingest import Team
    from data_prep.ingest import ingest as run
    from data_prep.plan import Settings, Where, make_plan

    none = {"min_words": 0, "english": False, "boilerplate": False, "max_aspect": 0}
    taken = Filters(image_size=image_size, **none | dict(filters))
    where = [Where(str(source)) for source in sorted(sources)]
    plan = make_plan(where, Settings(filters=taken, **settings), out)
    return run(Job(plan), team or Team(workers=1))


def make_inputs(folder: Path) -> Inputs:
    """Scenes to tokens through the real modules."""
    from data_prep.encode import Job, describe, encode
    from data_prep.engines import Launch
    from data_prep.scenes import write_scenes
    from data_prep.train_tokenizer import train_tokenizer
    from pipeline.data.shards import ShardReader
    from pipeline.models.dvae import load_dvae

    made = Inputs(*(folder / name for name in ("pairs", "tokenizer", "dvae", "other", "tokens")))
    # a third shows two objects: captions of uneven length
    write_scenes(folder / "scenes", 64, 48, seed=0, hold_out=False, two_objects=0.4)
    ingest([folder / "scenes"], made.pairs, IMAGE_SIZE, val_fraction=0.2)
    pairs = ShardReader(made.pairs, "pairs")
    train_tokenizer(pairs, made.tokenizer, TEXT_VOCAB)
    random_dvae(made.dvae, pairs, seed=0)
    random_dvae(made.other_dvae, pairs, seed=1)
    model, fingerprint = load_dvae(made.dvae)
    made_of = describe(pairs, model, fingerprint, crops=1, seed=0, batch=32, dtype="float32")
    encode(Job(made.pairs, made.dvae, made.tokens, made_of), Launch(), workers=1)
    return made


def random_dvae(folder: Path, pairs, seed: int) -> None:
    """An untrained dVAE that tells pictures apart all the same: each code's logit is centred."""
    from pipeline.data.images import centre_crop, decode_image
    from pipeline.models.dvae import DiscreteVAE, save_dvae

    torch.manual_seed(seed)
    model = DiscreteVAE(DVAE)
    pictures = [centre_crop(decode_image(pairs[i]["image"]), IMAGE_SIZE) for i in range(16)]
    image_BCYX = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pictures]) / 255
    with torch.no_grad():
        logits = model.logits(image_BCYX)
        model.encoder.blocks.output.conv.b.sub_(logits.mean(dim=(0, 2, 3)))
    save_dvae(folder, model)


def arguments(stage: str, inputs: Inputs, out: Path, preset: str, /, **changes) -> list[str]:
    """Command line of ``pipeline.train_STAGE``, without the module; ``changes`` to its options."""
    options = {"preset": f"{__file__}:{preset}", "out": out}
    if stage == "dalle":
        options |= {"data": inputs.tokens, "tokenizer": inputs.tokenizer}
    else:
        options |= {"data": inputs.pairs}
    if stage == "clip":
        options |= {"tokenizer": inputs.tokenizer}
    options |= changes
    return [str(word) for name in options for word in (f"--{name}", options[name])]


def start(command: list, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """Run a command in a process group of its own, which is ended with it."""
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=os.environ | CPU, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def plain(stage: str, *options) -> subprocess.CompletedProcess:
    """``python -m pipeline.train_STAGE``."""
    return start([sys.executable, "-m", f"pipeline.train_{stage}", *options])


def launched(stage: str, ranks: int, ds_config, *options) -> subprocess.CompletedProcess:
    """``deepspeed --module pipeline.train_STAGE`` on ``ranks`` processes of this machine."""
    launcher = Path(sys.executable).parent / "deepspeed"
    places = ["--num_gpus", ranks, "--master_port", free_port(), "--module"]
    module = f"pipeline.train_{stage}"
    return start([launcher, *places, module, *options, "--deepspeed_config", ds_config])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(stage, out: Path, micro_batch: int | None = None):
    """Train ``stage`` in this process with plain PyTorch; returns the engine."""
    from pipeline.training import loop
    from pipeline.training.engines.engine import PlainEngine

    engine = PlainEngine(stage.build, stage.run)
    if micro_batch is not None:
        engine.micro_batch, engine.accumulation = micro_batch, stage.run.batch // micro_batch
    loop.train(stage, engine, out)
    return engine


def curve(out: Path, kind: str = "train") -> list[dict]:
    """The lines of one kind in metrics.jsonl, without the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time_s"}
        for line in lines
        if line["kind"] == kind
    ]


def losses(out: Path) -> list[float]:
    """The loss of every update."""
    return [line["loss"] for line in curve(out)]


def whole(engine, key: str) -> dict[str, torch.Tensor]:
    """All of "weight" or "ema" of an engine with one rank."""
    shapes = engine.shapes()
    return {name: part.values[key].clone().view(shapes[name]) for name, part in engine.slices()}
