"""The command `lightning-llm`: each of its commands is a thin function over the room that does the work.

Heavy imports happen inside the commands, so that `--help` and a wrong argument answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_llm.checkpoint import commands as of_checkpoints

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # the shell's code for an end by Ctrl-C

TRAINER_COMMANDS = {
    "fit": "train a model as a YAML file says",
    "validate": "measure the validation loss of a checkpoint",
    "test": "run the test loop on a checkpoint",
    "predict": "run the predict loop on a checkpoint",
}


def tokenize(
    *,
    input: list[str],
    output: str,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    num_workers: int | None = None,
    text_key: str = "text",
    exclude: list[str] | None = None,
    end_of_text: str | None = None,
) -> None:
    """Turn text into packed tokens that TokenDataModule reads.

    Args:
        input: Files and folders with text: .txt, .md, .py, ... each file a document; .jsonl each line one.
        output: The folder to make; the same call again finds it and does nothing.
        tokenizer: A tokenizer.json or a folder with one; without it a byte-level BPE is trained on the text.
        vocab_size: Tokens of the trained tokenizer.
        val_fraction: Share of the text held out for validation.
        num_workers: Processes; by default one per core.
        text_key: The key that holds the text in JSON lines.
        exclude: Glob patterns of files and folders to leave out.
        end_of_text: The token that ends a document; by default the tokenizer's own.
    """
    from lightning_llm.data.tokenize import tokenize as run

    corpus = run(
        input,
        output,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        num_workers=num_workers,
        text_key=text_key,
        exclude=exclude or (),
        end_of_text=end_of_text,
    )
    print(
        f"{corpus.path}: {corpus.train.tokens:,} tokens to train on, {corpus.val.tokens:,} held out, "
        f"from {corpus.files:,} files; vocabulary {corpus.vocab_size:,}{' (reused)' if corpus.reused else ''}"
    )


def generate(
    model: str,
    *,
    prompt: str,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    dtype: str | None = None,
) -> None:
    """Let a model continue a text, on the terminal, token by token.

    Args:
        model: A Hugging Face folder with a tokenizer.json.
        prompt: The text to continue.
        max_tokens: The most tokens to write.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Draw from the likeliest tokens that make up this much probability.
        seed: Makes a draw repeatable.
        dtype: float32, bfloat16, ...; by default what the folder says.
    """
    import torch

    from lightning_llm.checkpoint.manifest import MANIFEST
    from lightning_llm.data.tokenizer import load_tokenizer
    from lightning_llm.errors import ConfigurationError
    from lightning_llm.models.decoder import Decoder
    from lightning_llm.models.generation import generate as run

    folder = Path(model)
    if (folder / MANIFEST).is_file():
        raise ConfigurationError(f"{folder} is a checkpoint. Export it first: lightning-llm export {folder} OUT")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = Decoder.from_pretrained(folder, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    eos = decoder.config.eos_token_id
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    tokens = run(
        decoder,
        tokenizer.encode(prompt).ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_token_ids=ends,
    )
    # Written so far is kept apart from the rest: a token may be half a character, which must wait for its other half.
    ids: list[int] = []
    written = ""
    print(prompt, end="", flush=True)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(written) :], end="", flush=True)
            written = text
    print(tokenizer.decode(ids)[len(written) :])


def plan(
    *,
    model: str | None = None,
    devices: int | None = None,
    device: str = "h100",
    seq_len: int | None = None,
    global_batch: int | None = None,
    precision: str = "bf16-mixed",
    optimizer: str = "adamw",
    float8: bool = False,
    devices_per_node: int | None = None,
    memory_gib: float | None = None,
    host_memory_gib: float | None = None,
    nvme_gb: float | None = None,
    engine: str = "auto",
    offload_optimizer: str | None = None,
    offload_parameters: str | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    context: int | None = None,
    expert: int | None = None,
    mtbf: float | None = None,
    device_mtbf: float | None = None,
    failure_shape: float = 1.0,
    detection_time: float = 60.0,
    restart_time: float = 300.0,
    planned_every: float | None = None,
    planned_time: float = 0.0,
    checkpoint_interval: float | None = None,
    checkpoint_time: float | None = None,
    checkpoint_write_time: float | None = None,
    run_days: float = 30.0,
    config: str | None = None,
    dry_run: bool = False,
    json: bool = False,
    plot: str | None = None,
) -> int:
    """Choose parallel sizes for a model and a cluster, or weigh those of a run file.

    Args:
        model: A preset such as llama3-70b, or a Hugging Face folder.
        devices: How many in all.
        device: A row of the device table: h100, h200, a100-80g, a100-40g, b200, l40s, 4090, mi300x, cpu, ...
        seq_len: Tokens per sequence; by default 8192 or what the model is meant for.
        global_batch: Sequences per optimizer step; by default 1, 4 or 16 million tokens by the model's size.
        precision: bf16-mixed, bf16-true or 32-true.
        optimizer: adamw or muon.
        float8: Linear layers multiply in float8.
        devices_per_node: By default what such nodes have.
        memory_gib: Memory of one device, if not what the table says.
        host_memory_gib: Memory of a node, if not what nodes with such devices usually have.
        nvme_gb: Disks of a node, likewise.
        engine: fsdp2, deepspeed, or auto, which is FSDP2 unless the model does not fit or DeepSpeed is clearly faster.
        offload_optimizer: cpu or nvme; by default only what does not fit otherwise is offloaded.
        offload_parameters: cpu or nvme.
        tensor: Ranks that share a layer's matrices, if not to be chosen.
        pipeline: Stages, if not to be chosen.
        context: Ranks that share a sequence, if not to be chosen.
        expert: Ranks that share a layer's experts, if not to be chosen.
        mtbf: Hours between failures of the whole run; by default as --device-mtbf says.
        device_mtbf: Hours between failures of one device; by default 8,100, the worse of what is published.
        failure_shape: Of the Weibull distribution of times between failures: 1 is exponential, below 1 is bursts.
        detection_time: Seconds until a failure is noticed; an assumption, give yours.
        restart_time: Seconds from then to the first new step; an assumption, give yours.
        planned_every: Hours between planned interruptions, before which the run saves; by default none.
        planned_time: Seconds that one takes beside saving and restarting.
        checkpoint_interval: Seconds between saves to weigh; by default Young's and Daly's.
        checkpoint_time: Seconds that training stands still for a save, where measured; by default estimated.
        checkpoint_write_time: Seconds from then until it is written, likewise.
        run_days: Days of each simulated run.
        config: A run file of fit: estimate exactly its layout instead of searching.
        dry_run: Build the fullest rank's part of the real model without memory, and compare its parameters.
        json: Print everything as JSON.
        plot: A file to draw into, .svg or .png.
    """
    import math
    from dataclasses import replace

    from lightning_llm import planner
    from lightning_llm.errors import ConfigurationError
    from lightning_llm.models.module import resolve_config
    from lightning_llm.planner.reliability import Interruptions
    from lightning_llm.planner.saving import DEVICE_MTBF_HOURS

    interruptions = Interruptions(
        mtbf_hours=mtbf,
        device_mtbf_hours=DEVICE_MTBF_HOURS if device_mtbf is None else device_mtbf,
        detection=detection_time,
        restart=restart_time,
        planned_every=math.inf if planned_every is None else planned_every,
        planned_time=planned_time,
        shape=failure_shape,
    )
    if config is not None:
        from lightning_llm.strategies.run_file import plan_of_run

        made, architecture = plan_of_run(
            config,
            device,
            devices=devices,
            memory_gib=memory_gib,
            host_memory_gib=host_memory_gib,
            nvme_gb=nvme_gb,
        )
    elif model is None or devices is None:
        raise ConfigurationError("plan needs --model and --devices, or --config with a run file.")
    else:
        architecture = resolve_config(model)
        options = planner.Options(
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            context_parallel_size=context,
            expert_parallel_size=expert,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
        )
        made = planner.plan(
            architecture,
            devices,
            device,
            name=model,
            seq_len=seq_len,
            global_batch=global_batch,
            precision=precision,
            optimizer=optimizer,
            float8=float8,
            devices_per_node=devices_per_node,
            memory_gib=memory_gib,
            host_memory_gib=host_memory_gib,
            nvme_gb=nvme_gb,
            engine=engine,
            options=options,
        )
    made = replace(
        made,
        interruptions=interruptions,
        checkpoint_interval=checkpoint_interval,
        checkpoint_time=checkpoint_time,
        checkpoint_write_time=checkpoint_write_time,
        run_days=run_days,
    )
    if json:
        print(made.to_json())
    else:
        from lightning_llm.planner.report import render

        render(made)
    if plot is not None:
        from lightning_llm.planner.plot import save_plot

        save_plot(made, plot)
    if dry_run:
        from lightning_llm.strategies.rehearsal import compare

        print(compare(architecture, made), file=sys.stderr if json else sys.stdout)
    return 0 if made.fits else 1


COMMANDS: dict[str, Callable[..., int | None]] = {
    command.__name__.rstrip("_"): command
    for command in (
        tokenize,
        of_checkpoints.verify,
        of_checkpoints.checkpoints,
        of_checkpoints.export,
        of_checkpoints.reshard,
        of_checkpoints.import_,
        generate,
        plan,
    )
}

# name -> what it is for, and the room whose commands.py has `main(arguments) -> exit code`
GROUPS = {
    "launch": (
        "Run a program on all devices of one or more nodes, and start it again when it fails.",
        "lightning_llm.launch",
    ),
    "registry": ("Keep versions of models: list, register, promote, pull.", "lightning_llm.registry"),
    "bench": ("Put load on a server and measure it: serve.", "lightning_llm.serving.bench"),
    "serve": ("Serve a model behind an OpenAI-compatible endpoint.", "lightning_llm.serving"),
    "doctor": (
        "Tell what this machine offers, and what is missing for what; --cluster: whether all ranks are fit for a run.",
        "lightning_llm.doctor",
    ),
}


def usage() -> str:
    """The list of commands."""
    lines = ["usage: lightning-llm COMMAND [arguments]    (lightning-llm COMMAND --help tells more)", ""]
    lines += [f"  {name:<11} {text}" for name, text in TRAINER_COMMANDS.items()]
    lines += [f"  {name:<11} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [f"  {name:<11} {text}" for name, (text, _) in GROUPS.items()]
    return "\n".join(lines)


def main() -> int:
    """Runs the command in sys.argv; returns its exit code.

    0 done, 1 an error, 2 wrong arguments or settings, 75 preempted, 76 diverged, 77 no checkpoint that can be believed,
    130 interrupted.
    """
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name = argv[0]
    if name in GROUPS:
        return _answer(partial(_run_group, name, argv[1:]))
    if name not in TRAINER_COMMANDS and name not in COMMANDS:
        print(f"lightning-llm: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return USAGE_ERROR
    return _answer(_run_trainer if name in TRAINER_COMMANDS else partial(_run_function, name, argv[1:]))


def trainer_cli(module_class: type[LightningModule], data_class: type[LightningDataModule] | None = None) -> int:
    """`fit`, `validate`, `test` and `predict` for a LightningModule of your own, as `lightning-llm` has them for ours.

    LightningCLI with the strategy `llm3d`; a script is `sys.exit(trainer_cli(YourModule))`.

    Args:
        module_class: Its constructor's arguments are the fields under `model` in a YAML file.
        data_class: Likewise under `data`; None is `TokenDataModule`.

    Returns:
        The exit code, as of `main`.
    """
    prog = Path(sys.argv[0]).name
    return _answer(lambda: _run_trainer(module_class, data_class, prog), prog)


def _answer(run: Callable[[], int], prog: str = "lightning-llm") -> int:
    """Runs a command; says in one sentence what the user can change."""
    try:
        from lightning_llm.errors import ConfigurationError, EndOfRunError

        try:
            return run()
        except EndOfRunError as error:
            print(f"{prog}: {error.message}", file=sys.stderr)
            return error.EXIT_CODE
        except ValueError as error:
            # jsonargparse puts what a constructor refuses into a longer error of its own.
            refused = error if isinstance(error, ConfigurationError) else ConfigurationError.latest
            if refused is None or str(refused) not in str(error):
                raise
            print(f"{prog}: {refused}", file=sys.stderr)
            return USAGE_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run_function(name: str, arguments: list[str]) -> int:
    from lightning_llm.arguments import parse_arguments
    from lightning_llm.errors import CheckpointError

    command = COMMANDS[name]
    try:
        return command(**parse_arguments(command, arguments)) or 0
    except CheckpointError as error:
        print(f"lightning-llm: {error}", file=sys.stderr)
        return FAILED


def _run_group(name: str, arguments: list[str]) -> int:
    return import_module(f"{GROUPS[name][1]}.commands").main(arguments)


def _run_trainer(
    module_class: type[LightningModule] | None = None,
    data_class: type[LightningDataModule] | None = None,
    prog: str = "lightning-llm",
) -> int:
    """LightningCLI, with our module and data unless told others.

    It reads sys.argv itself, as the processes that it launches do.
    """
    from lightning_llm import LLMModule, TokenDataModule
    from lightning_llm.launch.trainer import LaunchedCLI

    for chatty in ("seed", "distributed"):  # a line from every rank
        logging.getLogger(f"lightning.fabric.utilities.{chatty}").setLevel(logging.WARNING)
    LaunchedCLI(
        module_class or LLMModule,
        data_class or TokenDataModule,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"strategy": "llm3d"},
        parser_kwargs={"prog": prog},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
