"""What a launcher tells its ranks, beside torchrun's variables."""

MONITOR_VARIABLE = "LIGHTNING_LLM_MONITOR"  # folder of the monitor that was started before them
ELASTIC_VARIABLE = "LIGHTNING_LLM_ELASTIC"  # set where the number of nodes may change between attempts
