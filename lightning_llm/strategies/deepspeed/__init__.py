"""The strategy on DeepSpeed's engine. strategy.py is its lifecycle; deepspeed is imported when a run starts."""
