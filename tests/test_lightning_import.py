"""The order of imports does not matter, and who needs no Lightning does not wait for it."""

import subprocess
import sys

import pytest

REGISTERED = "from lightning.pytorch.strategies import StrategyRegistry; assert 'llm3d_tp2' in StrategyRegistry"


@pytest.mark.parametrize(
    "code",
    [
        f"import lightning_llm; {REGISTERED}",
        f"import lightning; import lightning_llm; {REGISTERED}",
        pytest.param(
            f"import lightning.pytorch as pl; from lightning_llm import LLM3DStrategy; {REGISTERED}",
            marks=pytest.mark.slow,
        ),
        f"from lightning_llm import LLM3DStrategy; {REGISTERED}",
        pytest.param(f"from lightning_llm.models.module import LLMModule; {REGISTERED}", marks=pytest.mark.slow),
        "import lightning_llm, lightning as L; L.Trainer(strategy='llm3d_zero2', accelerator='cpu', devices=1)",
    ],
)
def test_strategies_are_registered_whoever_comes_first(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["lightning_llm", "lightning_llm.cli", "lightning_llm.serving.server.api"])
def test_lightning_is_imported_by_who_needs_it(module):
    code = f"import sys, {module}; assert not {{'lightning', 'torch._dynamo', 'transformers'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_names():
    import lightning_llm

    for name in lightning_llm.__all__:
        assert getattr(lightning_llm, name) is not None and name in dir(lightning_llm)
    with pytest.raises(AttributeError, match="has no attribute 'LLM4D'"):
        _ = lightning_llm.LLM4D
