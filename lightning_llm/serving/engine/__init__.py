"""The engine: requests in, tokens out, one step at a time. Knows nothing of HTTP.

Engine.add -> Scheduler.schedule -> Runner.forward -> Sampler.sample -> TextStream -> Engine.step's answer
"""
