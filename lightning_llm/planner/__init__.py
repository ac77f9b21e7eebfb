"""From a model and a cluster to parallel sizes, with memory, traffic, idle time and step time computed.

`plan()` is the whole answer, `choose_sizes()` the quick one. Arithmetic only: nothing here needs devices or processes,
and nothing imports strategies, which may call it.
"""

from lightning_llm.planner.candidates import Options
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.plan import Plan, plan
from lightning_llm.planner.sizes import choose_sizes

__all__ = ["Layout", "Options", "Plan", "Workload", "choose_sizes", "plan"]
