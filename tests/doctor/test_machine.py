"""The doctor tells what is there, what is missing for what, and finds a torchvision that breaks Lightning."""

import importlib.metadata
import json
import os
import platform
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_llm.doctor import machine, report
from lightning_llm.doctor.report import Finding


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    return machine.collect(tmp_path_factory.mktemp("work"))


def by_name(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_reports_the_running_python_and_torch(findings: list[Finding]) -> None:
    assert platform.python_version() in by_name(findings, "python").detail
    assert torch.__version__ in by_name(findings, "torch").detail


def test_backends_agree_with_torch(findings: list[Finding]) -> None:
    assert (by_name(findings, "gloo").status == "ok") == torch.distributed.is_gloo_available()
    assert (by_name(findings, "nccl").status == "ok") == torch.distributed.is_nccl_available()
    accelerators = {finding.name for finding in findings if finding.section == "accelerators"}
    assert ("cuda:0" in accelerators) == torch.cuda.is_available()


def test_processor_memory_and_disk_are_measured(findings: list[Finding]) -> None:
    assert torch.backends.cpu.get_cpu_capability() in by_name(findings, "instructions").detail
    usable = int(by_name(findings, "cores").detail.split()[0])
    assert 1 <= usable <= (os.cpu_count() or 1)
    total, available = (float(word) for word in by_name(findings, "memory").detail.split() if word[0].isdigit())
    assert 0 < available <= total
    assert float(by_name(findings, "disk").detail.split()[0]) > 0


def test_compilers_are_those_on_the_path(findings: list[Finding]) -> None:
    has_compiler = bool(shutil.which("g++") or shutil.which("clang++"))
    assert (by_name(findings, "C++").status == "ok") == has_compiler


def test_compilers_that_are_not_there_are_missing_for_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = by_name(machine._compilers(), "C++")
    assert (compiler.status, compiler.fix) == ("missing", "install g++ or clang++")
    assert "torch.compile" in compiler.needed_for


def test_version_comes_from_the_program_or_says_that_it_does_not_tell(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho 'the tool'\necho 'version 4.2'\n")
    tool.chmod(0o755)
    assert machine._version_of(str(tool)) == "version 4.2"
    tool.write_text("#!/bin/sh\nexit 3\n")
    assert "does not tell" in machine._version_of(str(tool))


def test_optional_parts_have_a_version_or_a_way_to_get_them(findings: list[Finding]) -> None:
    for name in ("litdata", "wandb", "boto3", "mlflow", "transformers", "deepspeed", "torchao", "litserve"):
        finding = by_name(findings, name)
        assert finding.needed_for
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert finding.status == "missing"
            assert "pip install" in finding.fix
        else:
            assert (finding.status, finding.detail, finding.fix) == ("ok", version, "")


def test_a_required_package_that_is_not_installed_is_a_problem() -> None:
    finding = machine._package("software", "no-such-distribution", "everything", "pip install it", required=True)
    assert (finding.status, finding.fix) == ("problem", "pip install it")


def install_torchvision(folder: Path, code: str) -> None:
    """Puts a torchvision with the given code into a folder, as pip would: a package and its metadata."""
    package, metadata = folder / "torchvision", folder / "torchvision-0.28.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(code)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")


def test_torchvision_of_another_build_is_found_and_the_way_out_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torchvision(tmp_path, "raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = machine._torchvision()
    assert finding.status == "problem"
    assert "operator torchvision::nms does not exist" in finding.detail
    assert "pip uninstall torchvision" in finding.fix


def test_operators_of_deepspeed_are_built_or_there_is_a_way_to_build_them(findings: list[Finding]) -> None:
    assert by_name(findings, "runs on").detail.split()[0] in ("cpu", "cuda")
    for name in ("cpu_adam", "async_io"):
        finding = by_name(findings, name)
        assert finding.section == "DeepSpeed" and "offload" in finding.needed_for
        if finding.status == "missing":
            assert finding.fix.startswith("install ")
        else:
            assert finding.status == "ok"
            assert f"{name}.so" in finding.detail or f"python -m lightning_llm.strategies.deepspeed.ops {name}" in (
                finding.detail
            )


def test_operators_of_deepspeed_that_cannot_be_built_say_what_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    adam = by_name(machine._deepspeed(), "cpu_adam")
    assert (adam.status, adam.detail) == ("missing", "not built, and cannot be here")
    assert adam.fix.startswith("install a C++ compiler") and "libaio-dev" not in adam.fix
    assert "libaio-dev" in by_name(machine._deepspeed(), "async_io").fix


def test_a_lock_that_a_dead_builder_left_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert all(finding.name != "lock" for finding in machine._deepspeed())
    os.utime(lock, (0, 0))
    finding = by_name(machine._deepspeed(), "lock")
    assert (finding.status, finding.fix) == ("problem", f"rm {lock}")


def test_render_says_what_is_missing_for_what_with_problems_first() -> None:
    findings = [
        Finding(section="software", name="torch", status="ok", detail="9.9"),
        Finding(
            section="optional parts",
            name="part",
            status="missing",
            detail="not installed",
            needed_for="deeds",
            fix="pip install part",
        ),
        Finding(section="optional parts", name="bad", status="problem", detail="broken", fix="mend it"),
    ]
    out = StringIO()
    report.render(findings, Console(file=out, width=60))
    text = out.getvalue()
    assert "software" in text and "9.9" in text
    assert "part: missing -> needed for deeds -> pip install part\n" in text
    assert text.index("bad: problem -> mend it\n") < text.index("part: missing")


def test_json_holds_every_finding(findings: list[Finding]) -> None:
    assert [Finding(**entry) for entry in json.loads(report.to_json(findings))] == findings
