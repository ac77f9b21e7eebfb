"""The same sizes and plan on DeepSpeed's engine: `LLM3DDeepSpeedStrategy` and what it needs."""
