"""How much memory an engine takes."""

from pathlib import Path

import psutil
import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.host_memory import available_memory
from lightning_llm.serving.engine.kv_cache import KVCache
from lightning_llm.serving.engine.sizing import block_bytes, cache_blocks
from tests.serving.engine.models import make_decoder

CPU = torch.device("cpu")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(path: str, limit: object, used: int, cache: int = 0) -> dict[str, str]:
    names = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cache}"}
    return {f"sys/fs/cgroup/{path}/{name}": f"{value}\n" for name, value in names.items()}


def test_what_a_container_may_use_counts(tmp_path):
    files = {"proc/self/cgroup": "0::/pods/one\n", **group("pods", 50000, 20000, cache=5000)}
    assert available_memory(write(tmp_path, files)) == 35000, "of the group above"
    assert available_memory(write(tmp_path, group("pods/one", 40000, 10000))) == 30000
    assert available_memory(write(tmp_path, group("pods/one", "max", 10000))) == 35000
    assert available_memory(write(tmp_path, group("pods", 10, 20000))) == 0
    write(tmp_path, {"proc/self/cgroup": "0::/elsewhere\n", **group("", 7000, 2000)})
    assert available_memory(tmp_path) == 5000, "of the mount's root"


def test_what_an_older_container_may_use_counts(tmp_path):
    inside = "sys/fs/cgroup/memory/docker/"
    files = {
        "proc/self/cgroup": "7:cpu,cpuacct:/docker\n5:memory:/docker\n",
        inside + "memory.limit_in_bytes": "9000",
        inside + "memory.usage_in_bytes": "4000",
        inside + "memory.stat": "inactive_file 5\ntotal_inactive_file 500",
    }
    assert available_memory(write(tmp_path, files)) == 5500


def test_the_machine_is_the_limit_where_no_group_is(tmp_path):
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def sizes(monkeypatch, free: int) -> tuple:
    monkeypatch.setattr("lightning_llm.serving.engine.sizing.available_memory", lambda: free)
    return make_decoder().config, torch.float32, CPU


def test_engines_that_share_a_device_share_its_memory(monkeypatch):
    config = EngineConfig(memory_utilization=0.5)
    given = sizes(monkeypatch, 0)
    size = block_bytes(config, *given[:2])
    given = sizes(monkeypatch, 400 * size)
    assert cache_blocks(config, *given) == 200
    assert cache_blocks(config, *given, sharing=4) == 50
    with pytest.raises(ConfigurationError, match="for each of 300 engines.*no room for a sequence"):
        cache_blocks(config, *given, sharing=300)


def test_blocks_to_swap_to_are_of_the_hosts_memory(monkeypatch):
    given = sizes(monkeypatch, 0)
    size = block_bytes(EngineConfig(), *given[:2])
    given = sizes(monkeypatch, 400 * size)
    assert cache_blocks(EngineConfig(memory_utilization=0.5, swap_blocks=150), *given) == 50
    with pytest.raises(
        ConfigurationError, match="401 swap_blocks of .* MiB take .* GiB of the host's memory, of which"
    ):
        cache_blocks(EngineConfig(swap_blocks=401), *given)
    with pytest.raises(ConfigurationError, match="150 swap_blocks take .* of that"):
        cache_blocks(EngineConfig(memory_utilization=0.375, swap_blocks=150), *given)
    assert cache_blocks(EngineConfig(kv_cache_blocks=299, swap_blocks=100), *given) == 300
    with pytest.raises(ConfigurationError, match="100 swap_blocks and 300 kv_cache_blocks"):
        cache_blocks(EngineConfig(kv_cache_blocks=300, swap_blocks=100), *given)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_cache_costs_what_is_used_of_it(kv_dtype):
    config = make_decoder().config
    blocks = (512 << 20) // KVCache.bytes_per_block(config, kv_dtype=kv_dtype)
    before = psutil.Process().memory_info().rss
    cache = KVCache(config, blocks, kv_dtype=kv_dtype, host_blocks=blocks)
    cache.copy([(1, 2)])
    cache.swap_out([(1, 5)])
    grown = psutil.Process().memory_info().rss - before
    assert grown < 64 << 20, f"{grown} bytes of 1 GiB"
    assert not cache.data[7].any()
