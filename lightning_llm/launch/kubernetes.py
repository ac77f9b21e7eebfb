"""`lightning-llm launch kubernetes [options] -- fit -c run.yaml`: writes a run's manifests; commands.py calls `main`.

Every pod runs `lightning-llm launch`, which finds the others, restarts ranks and answers probes; the manifests say what
becomes of a pod by the code that it ends with. Nothing here talks to a cluster: `kubectl apply -f` takes what is made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from lightning_llm.arguments import parse_arguments
from lightning_llm.errors import ConfigurationError
from lightning_llm.launch.manifests import CONFIG_FOLDER, Manifest, Run, config_map, jobset, pytorch_job

LARGEST_NAME = 63
LARGEST_CONFIG_MAP = 1_000_000  # bytes; the cluster takes little more
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_KEY = re.compile(r"[-._a-zA-Z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the manifests of a run on a cluster: pods that each run `lightning-llm launch` with what is behind `--`.

    Args:
        kind: jobset, or pytorchjob of Kubeflow's Training Operator.
        nodes: Pods.
        nproc_per_node: Ranks of each.
        image: A container image with lightning-llm in it.
        name: Of the run; by default that of the run file.
        namespace: By default kubectl's.
        gpus_per_node: Of each pod; by default as many as ranks, 0 for none.
        pvc: CLAIM:PATH, a PersistentVolumeClaim and where it is mounted; relative paths in the run file are below it.
        config_map: One that is there and has the run file, under its name; by default one is made.
        grace_period: Seconds from SIGTERM to SIGKILL, in which the run saves.
        port: Of the probes and of Prometheus.
        output: A file to write; without it the manifests are printed.
        print: Print them beside writing a file.

    Raises:
        ConfigurationError: What cannot be.
    """

    kind: Literal["jobset", "pytorchjob"] = "jobset"
    nodes: int
    nproc_per_node: int
    image: str
    name: str | None = None
    namespace: str | None = None
    gpus_per_node: int | None = None
    pvc: str | None = None
    config_map: str | None = None
    grace_period: int = 300
    port: int = 9400
    output: str | None = None
    print: bool = False

    def __post_init__(self) -> None:
        least = {"nodes": 1, "nproc_per_node": 1, "gpus_per_node": 0, "grace_period": 1, "port": 1}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ConfigurationError(f"--{name.replace('_', '-')} {value} must be at least {number}.")
        self.volume  # noqa: B018  refuse what cannot be

    @property
    def volume(self) -> tuple[str, str] | None:
        """Claim and path."""
        if self.pvc is None:
            return None
        claim, _, path = self.pvc.partition(":")
        if not claim or not path.startswith("/"):
            raise ConfigurationError(f"--pvc {self.pvc} must be CLAIM:PATH, with an absolute path: checkpoints:/runs")
        return claim, path


def main(arguments: Sequence[str]) -> int:
    """Writes what the command line, with the words behind `launch kubernetes`, says; returns the exit code."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    options = Options(**parse_arguments(Options, words[:at], "launch kubernetes"))
    program = words[at + 1 :]
    if not program:
        raise ConfigurationError(
            "launch kubernetes needs a program behind `--`: lightning-llm launch kubernetes ... -- fit -c run.yaml"
        )
    text = to_yaml(manifests(options, program))
    if options.output is not None:
        Path(options.output).write_text(text)
    if options.output is None or options.print:
        print(text, end="")
    return 0


def manifests(options: Options, program: Sequence[str]) -> list[Manifest]:
    """A run's objects, in the order in which a cluster is to get them.

    Args:
        options: See there.
        program: As for `lightning-llm launch`. Files behind `-c` and `--config` go along in a ConfigMap.
    """
    mounted, paths = _mounted(program)
    files = {} if options.config_map is not None else _contents(paths)
    name = _checked_name(options, paths)
    run = Run(
        name=name,
        namespace=options.namespace,
        nodes=options.nodes,
        ranks_per_node=options.nproc_per_node,
        gpus_per_node=options.nproc_per_node if options.gpus_per_node is None else options.gpus_per_node,
        image=options.image,
        program=mounted,
        config_map=options.config_map or (f"{name}-run" if files else None),
        volume=options.volume,
        grace_period=options.grace_period,
        port=options.port,
    )
    for place in _places_that_end_with_a_pod(files, options.volume):
        print(
            f"launch kubernetes: checkpoints in {place} end with their pod. Use --pvc CLAIM:PATH and a folder there, "
            "or s3://...",
            file=sys.stderr,
        )
    job = {"jobset": jobset, "pytorchjob": pytorch_job}[options.kind](run)
    return [*([config_map(run, files)] if files else []), job]


def to_yaml(objects: Sequence[Manifest]) -> str:
    """What `kubectl apply -f` reads; run files in it stay as they are, comments and all."""
    return "".join(
        "---\n" + yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for each in objects
    )


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # lists stand out


def _literally(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _literally)


def _mounted(program: Sequence[str]) -> tuple[tuple[str, ...], list[Path]]:
    """The program with its run files where pods find them, and where they are here."""
    words, paths = list(program), []
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config") or (not equals and at + 1 == len(words)):
            continue
        path = Path(value if equals else words[at + 1])
        there = f"{CONFIG_FOLDER}/{path.name}"
        if equals:
            words[at] = f"{option}={there}"
        else:
            words[at + 1] = there
        paths.append(path)
    return tuple(words), paths


def _contents(paths: Sequence[Path]) -> dict[str, str]:
    files: dict[str, str] = {}
    for path in paths:
        if path.name in files or not _KEY.fullmatch(path.name):
            raise ConfigurationError(
                f"{path}: run files need names of their own, of letters, digits, '-', '.' and '_', in a ConfigMap."
            )
        try:
            files[path.name] = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from None
    size = sum(len(text.encode()) for text in files.values())
    if size > LARGEST_CONFIG_MAP:
        raise ConfigurationError(
            f"The run files have {size:,} bytes, and a ConfigMap takes {LARGEST_CONFIG_MAP:,}. Put them into the image."
        )
    return files


def _checked_name(options: Options, paths: Sequence[Path]) -> str:
    """The run's name, from which the controllers make those of pods."""
    stem = re.sub(r"[^a-z0-9]+", "-", paths[0].stem.lower()).strip("-") if paths else "lightning-llm"
    name = options.name or (stem if stem[:1].isalpha() else f"run-{stem}".strip("-"))
    longest = {"jobset": f"{name}-node-0-{options.nodes - 1}-xxxxx", "pytorchjob": f"{name}-worker-{options.nodes - 1}"}
    if not _LABEL.fullmatch(name) or len(longest[options.kind]) > LARGEST_NAME:
        room = LARGEST_NAME - len(longest[options.kind]) + len(name)
        raise ConfigurationError(
            f"--name {name}: it must be small letters, digits and '-', begin with a letter, and be {room} long at most."
        )
    return name


def _places_that_end_with_a_pod(files: Mapping[str, str], volume: tuple[str, str] | None) -> Iterator[str]:
    for name, text in files.items():
        try:
            callbacks = ((yaml.safe_load(text) or {}).get("trainer") or {}).get("callbacks") or []
        except (yaml.YAMLError, AttributeError) as error:
            raise ConfigurationError(f"{name} is no run file: {error}") from None
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            place = (callback.get("init_args") or {}).get("dirpath") if isinstance(callback, dict) else None
            if place is None or "Checkpoint" not in callback.get("class_path", "") or "://" in place:
                continue
            if volume is None or not PurePosixPath(volume[1], place).is_relative_to(volume[1]):
                yield place
