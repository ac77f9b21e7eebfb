"""How a model answers: an engine with a paged KV cache and continuous batching, and the LitServe server around it.

`LLM` is the engine in your own process; `LLMServeAPI` is a `litserve.LitAPI`; `lightning-llm serve` is both with an
OpenAI-compatible endpoint.
"""
