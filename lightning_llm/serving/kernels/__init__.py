"""Attention over a paged KV cache, for every device: what `Decoder.forward(attention=...)` is handed when it serves."""
