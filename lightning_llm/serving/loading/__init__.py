"""What a model's name means, and how its weights and words come to this process.

`load_model` is what everyone calls. `sources.py` tells what a name means and makes a Hugging Face folder of it,
`folder.py` loads that; `gguf_*.py` read llama.cpp's files, and `cache.py` keeps what was fetched or converted.
"""

from lightning_llm.serving.loading.folder import LoadedModel, load_folder
from lightning_llm.serving.loading.sources import check_source, load_model

__all__ = ["LoadedModel", "check_source", "load_folder", "load_model"]
