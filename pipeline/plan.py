"""What a run of the transformer will take, before a GPU is rented: memory, traffic, hours, disk.

python -m pipeline.plan --preset dalle_12b --deepspeed_config ds_configs/zero3_12b.json --gpus 64
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

from pipeline import presets
from pipeline.config import DalleRun
from pipeline.console import command
from pipeline.training import checkpoint
from pipeline.training.engines import ds_config
from pipeline.training.planning.forecast import (
    FABRIC_GBPS,
    MFU,
    NODE_GBPS,
    PEAK_TFLOPS,
    TFLOPS,
    Machine,
    Plan,
    make_plan,
)
from pipeline.training.planning.memory import ATTENTION, GIB, MOMENTS


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures, bytes and seconds."""
    found, run = plan.memory, plan.run
    return {
        "gpus": plan.machine.gpus,
        "gpu_bytes": plan.machine.gpu_bytes,
        "parameters": found.shards.total,
        "micro_batch": found.micro_batch,
        "accumulation": found.accumulation,
        "attention": found.attention,
        "parts": {
            part.name: {
                "bytes": part.n_bytes,
                "where": "host" if part.on_host else "gpu",
                "moments": list(part.moments),
            }
            for part in found.parts
        },
        "bytes_at": {moment: found.at(moment) for moment in MOMENTS},
        "peak_bytes": found.peak,
        "fits": plan.fits,
        "largest_micro_batch": plan.largest_micro_batch,
        "changes": [
            {"change": text, "peak_bytes": size, "fits": fits} for text, size, fits in plan.changes
        ],
        "host_bytes_a_node": plan.host_bytes,
        "traffic": {
            "gathered_bytes_an_update": plan.traffic.gathered,
            "gathered_bytes_inside_nodes": plan.traffic.in_node,
            "scattered_bytes_an_update": plan.traffic.scattered,
            "summed_over_nodes_bytes_an_update": plan.traffic.summed,
            "seconds_an_update": plan.traffic.seconds,
        },
        "compute": {
            "flops_an_update": plan.work.model,
            "flops_an_update_with_recomputation": plan.work.hardware,
            "seconds_an_update": plan.work.seconds,
        },
        "bound_by": plan.bound,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "disk_bytes": plan.disk_bytes,
        "updates": run.steps,
        "tokens": plan.tokens,
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.machine.gpus,
        "gpu_hours_at_mfu": plan.gpu_hours_at_mfu,
    }


def table(plan: Plan) -> str:
    """The same, to be read."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    found, run, machine = plan.memory, plan.run, plan.machine
    yield (
        f"{found.shards.total:,} parameters on {machine.gpus} GPUs of {machine.gpu_gib:g} GiB; "
        f"micro-batch {found.micro_batch} x accumulation {found.accumulation} = batch {run.batch}"
    )
    yield ""
    yield f"{'memory of a GPU, GiB':34}" + "".join(f"{moment:>11}" for moment in MOMENTS)
    for part in found.parts:
        if part.on_host:
            continue
        said = f"{part.n_bytes / GIB:.2f}"
        row = "".join(f"{said if moment in part.moments else '':>11}" for moment in MOMENTS)
        yield f"  {part.name:32}{row}"
    sums = "".join(f"{found.at(moment) / GIB:>11.2f}" for moment in MOMENTS)
    yield f"  {'sum':32}{sums}"
    yield f"  {'of':32}{machine.gpu_gib:>11.2f}  {'fits' if plan.fits else 'does not fit'}"
    if plan.largest_micro_batch is not None:
        yield f"largest micro-batch that fits: {plan.largest_micro_batch}"
    else:
        yield "no micro-batch fits"
    for text, size, fits in plan.changes:
        yield f"  {text}: {size / GIB:.2f} GiB, {'fits' if fits else 'does not fit'}"
    yield ""
    yield f"memory of a node's host, GiB: {plan.host_bytes / GIB:,.0f}"
    for part in found.parts:
        if part.on_host:
            yield f"  {part.name:32}{part.n_bytes / GIB:>11.2f} for each GPU"
    yield ""
    micro_s = 1 / found.accumulation
    sent = plan.traffic.sent // found.accumulation
    yield f"{'':34}{'micro-step':>11}{'update':>11}"
    each = f"{sent / 1e9:>11.1f}{plan.traffic.sent / 1e9:>11.1f}"
    yield f"  {'sent by each GPU, GB':32}{each}"
    if plan.traffic.in_node:
        inside = f"{plan.traffic.in_node / found.accumulation / 1e9:>11.1f}"
        yield f"  {'of that, inside the node, GB':32}{inside}{plan.traffic.in_node / 1e9:>11.1f}"
    if plan.traffic.summed:
        yield f"  {'of that, between nodes, GB':32}{'':>11}{plan.traffic.summed / 1e9:>11.1f}"
    for name, seconds in (("sending", plan.traffic.seconds), ("computing", plan.work.seconds)):
        yield f"  {name + ', s':32}{seconds * micro_s:>11.2f}{seconds:>11.2f}"
    yield (
        f"bound by {plan.bound}, if they overlap: {100 * plan.mfu:.0f} % of {PEAK_TFLOPS:g} "
        "TFLOP/s, what is computed again not counted"
    )
    yield (
        f"assumed: {machine.tflops:g} TFLOP/s sustained, {machine.fabric:g} GB/s a GPU between "
        f"nodes of {machine.gpus_per_node}, {NODE_GBPS:g} inside"
    )
    yield ""
    yield f"{run.steps:,} updates of {run.batch:,} samples: {plan.tokens:,} tokens"
    yield f"  {plan.hours:,.1f} hours, {plan.hours * machine.gpus:,.0f} GPU-hours"
    yield (
        f"  at {100 * MFU:.0f} % of {PEAK_TFLOPS:g} TFLOP/s: "
        f"{plan.gpu_hours_at_mfu / machine.gpus:,.1f} hours, {plan.gpu_hours_at_mfu:,.0f} GPU-hours"
    )
    yield (
        f"a checkpoint: {plan.checkpoint_bytes / 1e9:,.1f} GB; with {checkpoint.KEEP} kept, one "
        f"being written and the exported weights: {plan.disk_bytes / 1e9:,.1f} GB of disk"
    )


def main() -> None:
    """Plan a run from the command line."""
    parser = argparse.ArgumentParser(prog="pipeline.plan", description=__doc__)
    parser.add_argument("--preset", required=True, help="dalle_demo .. dalle_12b, FILE.py:FUNCTION")
    parser.add_argument("--deepspeed_config", required=True, help="JSON of ds_configs/")
    parser.add_argument("--gpus", required=True, type=int, help="GPUs, over all nodes")
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a GPU (80)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(8)")
    parser.add_argument(
        "--fabric", type=float, default=FABRIC_GBPS, metavar="GBPS",
        help=f"GB/s that each GPU reaches in collectives between nodes ({FABRIC_GBPS:g})",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=float, default=TFLOPS, metavar="T",
        help=f"TFLOP/s that a GPU sustains, what is computed again counted ({TFLOPS:g})",
    )  # fmt: skip
    parser.add_argument("--micro-batch", type=int, metavar="N", help="instead of the file's")
    parser.add_argument(
        "--attention", choices=ATTENTION,
        help="path of attention: windowed on GPUs before Ampere; without: triton if it takes "
        "the heads' width",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all figures as one JSON object")
    args = parser.parse_args()
    # it says on standard output that it finds no GPU, which a plan does not need
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    run = presets.load_kind(args.preset, DalleRun)
    machine = Machine(args.gpus, args.gpu_gib, args.gpus_per_node, args.fabric, args.tflops)
    ds = ds_config.read(args.deepspeed_config)
    plan = make_plan(run, ds, machine, micro_batch=args.micro_batch, attention=args.attention)
    said = json.dumps(as_json(plan), indent=2) + "\n" if args.json else table(plan)
    sys.stdout.write(said)


if __name__ == "__main__":
    command(main)
