"""`lightning-llm bench serve`: load on an OpenAI-compatible server, ours or any other, and what it answers how fast.

The words and the names of the results are those of vLLM's `vllm bench serve`. Nothing here knows of the engine.
"""
