"""All ranks measured against each other before a run: `lightning-llm doctor --cluster`.

start.py finds out how it was started and begins a rank, or all of them; supervisor.py, on rank 0, says what is measured
next and who is missing; worker.py, on all ranks, measures (compute.py, links.py, storage.py); judging.py is the
judgement, measurements in and findings out.
"""
