"""The one on-disk format of a run, and its export to Hugging Face's."""
