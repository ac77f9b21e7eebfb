"""The commands of `lightning-llm` that are about checkpoints; cli.py lists them with its own.

Each returns an exit code or None for 0. Heavy imports happen inside, as in cli.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_llm.checkpoint.manifest import Manifest

BAD = 1  # there is a checkpoint that cannot be loaded


def verify(path: str, *, json: bool = False) -> int:
    """Read every file of a checkpoint, or of all in a folder, and say what is damaged.

    Exit code 0 if all are good, 1 if any is not, 2 if there is none. A damaged one gets a note beside it
    (NAME.corrupt), which it loses when it verifies.

    Args:
        path: A checkpoint, a folder of several, or an s3:// address of either.
        json: Print JSON instead of tables.
    """
    from lightning_llm.checkpoint.inspection import inspect

    found = inspect(path)
    if json:
        _print_json([{**checkpoint.to_dict(), "files": _files(checkpoint.files())} for checkpoint in found])
    else:
        from lightning_llm.checkpoint.tables import show_files

        show_files(found)
    return 0 if all(checkpoint.good for checkpoint in found) else BAD


def checkpoints(path: str, *, json: bool = False, no_verify: bool = False) -> int:
    """List the checkpoints of a folder, and say which of them a run would go on from.

    Exit code 1 if there is none that a run could go on from.

    Args:
        path: A folder of checkpoints, or its s3:// address.
        json: Print JSON instead of a table.
        no_verify: Read manifests alone: faster, and damage of other files stays unseen.
    """
    from lightning_llm.checkpoint.inspection import survey

    found = survey(path, verify=not no_verify)
    if json:
        _print_json(found.to_dict())
    else:
        from lightning_llm.checkpoint.tables import show_survey

        show_survey(found)
    return 0 if found.loaded is not None else BAD


def export(checkpoint: str, output: str, *, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """Write a checkpoint as a Hugging Face folder (safetensors, config.json, tokenizer).

    Args:
        checkpoint: What the run saved; of a folder of several the newest good one.
        output: The folder to write.
        dtype: float32, bfloat16, ...; by default what was trained.
        max_shard_size: Largest file, for example 5GB.
    """
    from lightning_llm.checkpoint.export import export as run

    folder = run(checkpoint, output, dtype=dtype, max_shard_size=max_shard_size)
    print(f"{folder}: loads in transformers and in lightning_llm.Decoder.from_pretrained")


def reshard(checkpoint: str, output: str, *, ranks: int, weights_only: bool = False) -> None:
    """Write a checkpoint anew as another number of files of equal size.

    Any layout loads any checkpoint; this is for fewer or more files.

    Args:
        checkpoint: What to copy; of a folder of several the newest good one.
        output: The checkpoint to make.
        ranks: How many files.
        weights_only: Leave out optimizers.
    """
    from lightning_llm.checkpoint.reshard import reshard as run

    print(_made(output, run(checkpoint, output, ranks=ranks, weights_only=weights_only)))


def import_(
    source: str,
    output: str,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    prefix: str | None = None,
    ranks: int = 1,
    weights_only: bool = False,
) -> None:
    """Make a checkpoint of what others saved: Hugging Face, Lightning, torch.distributed.checkpoint or DeepSpeed.

    Nothing that it contains is run: what is not plain data is refused.

    Args:
        source: A Hugging Face folder, a Lightning .ckpt file, a folder of torch.distributed.checkpoint or DeepSpeed.
        output: The checkpoint to make.
        model: A preset or a Hugging Face folder, where the source does not say what model it holds.
        tokenizer: A tokenizer.json, or a folder with one, where the source has none.
        prefix: What comes before the weights' own names in a folder of the latter two.
        ranks: How many files.
        weights_only: Leave out optimizers.
    """
    from lightning_llm.checkpoint.importing import import_checkpoint

    manifest, remarks = import_checkpoint(
        source, output, model=model, tokenizer=tokenizer, prefix=prefix, ranks=ranks, weights_only=weights_only
    )
    print(_made(output, manifest))
    for remark in remarks:
        print(f"note: {remark}")


def _made(output: str, manifest: Manifest) -> str:
    ranks = f"{manifest.world_size} file" + ("s" if manifest.world_size > 1 else "")
    holds = "weights alone" if manifest.weights_only else "weights and optimizer states"
    return f"{output}: {holds} of step {manifest.step}, {manifest.size:,} bytes, tensors in {ranks}; verified"


def _files(rows: list[tuple[str, int, str, str]]) -> list[dict[str, object]]:
    return [dict(zip(("file", "size", "digest", "state"), row, strict=True)) for row in rows]


def _print_json(content: object) -> None:
    import json

    print(json.dumps(content, indent=1))
