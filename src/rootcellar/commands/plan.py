"""``rootcellar plan``: how much KV cache fits, before anything is bought, downloaded or started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rootcellar.errors import ConfigError
from rootcellar.models.files import hub_hint
from rootcellar.plan.capacity import ENGINE, KV_DTYPES, Ask, Capacity, capacity, what_if
from rootcellar.plan.layers import Architecture, read_architecture
from rootcellar.plan.presets import PRESETS
from rootcellar.plan.roofline import CHIPS, Chip, Work, decode, held_bytes, least_time, prefill
from rootcellar.plan.sizing import MOST_REQUESTS
from rootcellar.units import gb, parse_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar plan``."""
    presets = ", ".join(PRESETS)
    parser.usage = "rootcellar plan MODEL [options]"
    parser.description = (
        "Capacity of the KV cache from first principles, each figure with its formula. Without --hbm, "
        "--kv-bytes-per-device or --max-total-tokens: the bytes per token and per request alone."
    )
    parser.add_argument("model", metavar="MODEL", help=f"A config.json, a model folder, or one of {presets}.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--devices", type=int, metavar="N", help="Devices in all [default: tp].")
    hardware.add_argument("--tp", type=int, metavar="N", help="Devices for one copy of the model [default: devices].")
    hardware.add_argument("--hbm", metavar="SIZE", help="Memory of one device, as 141GB or 80GiB.")
    hardware.add_argument(
        "--mem-fraction",
        "--mem-fraction-static",
        dest="mem_fraction_static",
        type=float,
        default=ENGINE.mem_fraction_static,
        metavar="X",
        help="The part of it for weights, activations and KV cache [default: %(default)s].",
    )
    hardware.add_argument("--weight-bytes", metavar="SIZE", help="Of one copy of the model [default: from the config].")
    hardware.add_argument("--activation-bytes", metavar="SIZE", help="Of one device [default: estimated].")
    hardware.add_argument("--kv-bytes-per-device", metavar="SIZE", help="Instead of --hbm: what the KV cache gets.")
    cache = parser.add_argument_group("cache")
    names = ", ".join(KV_DTYPES)
    cache.add_argument("--kv-cache-dtype", default="auto", metavar="NAME", help=f"auto, {names} [default: auto].")
    cache.add_argument(
        "--page-size", type=int, default=ENGINE.page_size, metavar="N", help="Tokens in a page [default: %(default)s]."
    )
    cache.add_argument("--max-total-tokens", type=int, metavar="N", help="Take so many tokens and no more.")
    cache.add_argument("--window", type=int, metavar="N", help="Another window (or chunk) than the model's, in tokens.")
    cache.add_argument(
        "--swa-full-tokens-ratio",
        type=float,
        default=ENGINE.swa_full_tokens_ratio,
        metavar="X",
        help="Tokens of windowed layers for each of the full ones [default: %(default)s].",
    )
    cache.add_argument(
        "--mamba-full-memory-ratio",
        type=float,
        default=ENGINE.mamba_full_memory_ratio,
        metavar="X",
        help="Bytes of recurrent states for each byte of the rest [default: %(default)s].",
    )
    cache.add_argument("--hicache-ratio", type=float, metavar="X", help="Host tokens for each on the device.")
    cache.add_argument("--hicache-size", metavar="SIZE", help="Instead: host memory for each device.")
    load = parser.add_argument_group("requests")
    load.add_argument(
        "--request-length",
        "--context",
        dest="request_length",
        type=int,
        metavar="N",
        help="Tokens of a request, prompt and answer [default: the model's context].",
    )
    load.add_argument(
        "--chunked-prefill-size",
        type=int,
        default=ENGINE.chunked_prefill_size,
        metavar="N",
        help="Tokens in computation at a time (vLLM: max_num_batched_tokens) [default: %(default)s].",
    )
    load.add_argument(
        "--max-running-requests",
        type=int,
        default=MOST_REQUESTS,
        metavar="N",
        help="Requests that run at the same time [default: %(default)s].",
    )
    load.add_argument(
        "--speculative-num-draft-tokens",
        type=int,
        default=0,
        metavar="N",
        help="Tokens of a request that are guessed in a step: recurrent layers keep the state after each [default: 0].",
    )
    _configure_roofline(parser.add_argument_group("roofline"))


def _configure_roofline(roofline: argparse._ArgumentGroup) -> None:
    roofline.add_argument(
        "--roofline",
        action="store_true",
        help="The least time of a step by chip, with --tp devices and these requests.",
    )
    roofline.add_argument("--chip", choices=CHIPS, metavar="NAME", help=f"One of {', '.join(CHIPS)} [default: all].")
    roofline.add_argument(
        "--batch", type=int, default=64, metavar="N", help="Requests that decode at once [default: %(default)s]."
    )
    roofline.add_argument(
        "--program-bytes",
        metavar="SIZE",
        help="What a compiled decode step accesses on one device: how far its own bytes are from the least.",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``rootcellar plan``. Raises ``ConfigError`` for a wrong option, an unknown model, or when nothing fits."""
    for name in ("max_total_tokens", "request_length", "window", "batch"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise ConfigError(f"{name}={vars(args)[name]} is not allowed: it must be at least 1")
    ask = _ask(args, read_architecture(_config(args.model), window=args.window))
    figures = capacity(ask)
    if args.roofline:
        _roofline(args, ask)
        return 0
    rows = [("as asked", figures), *what_if(ask)]
    if args.json:
        answer = {"model": args.model, "groups": _groups(ask), **figures.as_dict()}
        answer["what_if"] = [{"change": label, **_short(row)} for label, row in rows[1:]]
        print(json.dumps(answer))
    else:
        _print(args.model, ask, figures, rows)
    return 0


def _ask(args: argparse.Namespace, model: Architecture) -> Ask:
    tp = args.tp or args.devices or 1
    sizes = ("hbm", "kv_bytes_per_device", "weight_bytes", "activation_bytes", "hicache_size")
    return Ask(
        model,
        kv_cache_dtype=args.kv_cache_dtype,
        page_size=args.page_size,
        tp=tp,
        devices=args.devices or tp,
        mem_fraction_static=args.mem_fraction_static,
        max_total_tokens=args.max_total_tokens,
        request_length=args.request_length,
        chunked_prefill_size=args.chunked_prefill_size,
        max_running_requests=args.max_running_requests,
        speculative_num_draft_tokens=args.speculative_num_draft_tokens,
        swa_full_tokens_ratio=args.swa_full_tokens_ratio,
        mamba_full_memory_ratio=args.mamba_full_memory_ratio,
        hicache_ratio=args.hicache_ratio,
        **{name: None if vars(args)[name] is None else parse_bytes(vars(args)[name], name) for name in sizes},
    )


def _config(model: str) -> dict[str, Any]:
    """The config that ``model`` names: a preset, a file, or a folder with ``config.json``."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        presets = ", ".join(PRESETS)
        raise ConfigError(
            f"{model!r} is no preset and cannot be read ({error.strerror}): give a config.json, or one of {presets}"
            + hub_hint(model, "config.json")
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}, not an object")
    return config


def _groups(ask: Ask) -> list[dict[str, Any]]:
    return [
        {
            "kind": group.kind.name,
            "rule": group.kind.rule,
            "span": group.kind.span,
            "layers": len(group.kind.layers),
            "bytes_per_token": group.token_bytes(ask.kv_dtype),
            "state_bytes_per_request": group.state_bytes(ask.kv_dtype),
        }
        for group in ask.model.groups
    ]


_SHORT = (
    "bytes_per_token_full",
    "bytes_per_token_hybrid",
    "constant_bytes_per_request",
    "max_total_num_tokens",
    "concurrency",
    "concurrency_as_divided",
)


def _short(figures: Capacity) -> dict[str, Any]:
    values = figures.as_dict()
    return {name: values[name] for name in _SHORT}


def _print(model: str, ask: Ask, figures: Capacity, rows: Sequence[tuple[str, Capacity]]) -> None:
    print(f"{model}: {ask.model.num_layers} layers, tp={ask.tp}, pages of {ask.page_size} tokens")
    for group in _groups(ask):
        span = f" of {group['span']} tokens" if group["span"] else ""
        each = group["bytes_per_token"] or group["state_bytes_per_request"]
        unit = "token" if group["bytes_per_token"] else "request"
        print(f"  {group['layers']:>3} layers {group['rule']}{span}: {each:,} bytes per {unit}")
    print()
    for name, value in figures.as_dict().items():
        if value is not None and name != "formulas" and not (name == "replicas" and value == 1):
            formula = figures.formulas.get(name)
            print(f"{name:<34} {_shown(name, value):>24}" + (f"  = {formula}" if formula else ""))
    print("\nwhat if")
    heads = ("", "bytes/token", "hybrid", "constant/request", "tokens", "concurrency", "as divided")
    table = [heads] + [(label, *(_shown(*item) for item in _short(row).items())) for label, row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    for line in table:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())
    if figures.concurrency is not None:
        print(
            "\nconcurrency: when the memory is divided as such requests need it; as divided: with the ratios above, "
            "where the kind that runs out first decides."
        )


def _roofline(args: argparse.Namespace, ask: Ask) -> None:
    """Print what a decode and a prefill step take at least on each chip."""
    context = ask.request_length or ask.model.context_length
    if context is None:
        raise ConfigError("the config does not say how long a context is: give --context")
    chunk = min(ask.chunked_prefill_size, context)
    batch, program = args.batch, None
    if args.program_bytes is not None:
        program = parse_bytes(args.program_bytes, "program_bytes")
    steps = {
        "decode": decode(ask.model, ask.kv_dtype, ask.tp, batch, context),
        "prefill": prefill(ask.model, ask.kv_dtype, ask.tp, context - chunk, context),
    }
    held = held_bytes(ask.model, ask.kv_dtype, ask.tp, batch, context)
    chips = [CHIPS[args.chip]] if args.chip else list(CHIPS.values())
    rows = [_on_chip(chip, steps, held, program) for chip in chips]
    answer: dict[str, Any] = {
        "model": args.model, "tp": ask.tp, "batch": batch, "context": context, "prefill_tokens": chunk,
        "held_bytes_per_device": held,
        **{name: {"bytes_per_device": work.nbytes, "flops_per_device": work.flops} for name, work in steps.items()},
    }  # fmt: skip
    if program is not None:
        answer["least_of_program_bytes"] = steps["decode"].total_bytes / program
    if args.json:
        print(json.dumps({**answer, "chips": rows}))
        return
    print(f"{args.model}, tp={ask.tp}: a decode step of {batch} requests of {context:,} tokens, a prefill step of the")
    print(f"last {chunk:,} tokens of one; {gb(held)} GB of weights and cache on each device")
    for name, work in steps.items():
        for unit, parts in (("GB", work.nbytes), ("GFLOP", work.flops)):
            said = ", ".join(f"{part} {value / 1e9:,.4g}" for part, value in parts.items() if value)
            print(f"  {name:<8} {sum(parts.values()) / 1e9:>10,.4g} {unit:<6} {said}")
    if program is not None:
        print(
            f"  the compiled decode step accesses {gb(program)} GB, {answer['least_of_program_bytes']:.0%} of it needed"
        )
    heads = f"{'chip':<7} {'fits':<5} {'decode: ms':>11} {'bound':>8} {'tokens/s':>10} {'prefill: ms':>13} {'bound':>8}"
    print(f"\n{heads} {'tokens/s':>10}")
    for row in rows:
        print(f"{row['chip']:<7} {'yes' if row['fits'] else 'no':<5}", end="")
        for name, width in (("decode", 11), ("prefill", 13)):
            seconds, rate = row[f"{name}_seconds"], row[f"{name}_tokens_per_second"]
            print(f" {1e3 * seconds:>{width}.3f} {row[f'{name}_bound']:>8} {rate:>10,.0f}", end="")
        print()
    print(
        "\nNo program for such a step takes less: weights once, what queries see of the cache once, arithmetic at the"
    )
    print("chip's peak in bfloat16, nothing for what devices tell each other.")


def _on_chip(chip: Chip, steps: Mapping[str, Work], held: int, program: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {"chip": chip.name, "source": chip.source, "fits": held <= chip.memory}
    for name, work in steps.items():
        least = least_time(work, chip)
        row[f"{name}_seconds"] = least.seconds
        row[f"{name}_seconds_by_bandwidth"] = least.by_bandwidth
        row[f"{name}_seconds_by_compute"] = least.by_compute
        row[f"{name}_bound"] = least.bound
        row[f"{name}_tokens_per_second"] = work.tokens / least.seconds
    if program is not None:
        row["program_seconds_by_bandwidth"] = program / chip.bandwidth
    return row


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{kind} {count:,}" for kind, count in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
    if "bytes" in name and value >= 10**8:
        return f"{value:,} ({gb(value)} GB)"
    return f"{value:,}"
