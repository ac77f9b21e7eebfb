"""What is trained and served: the decoder, its config, its weights and its words.

Knows nothing of parallelism, of Lightning's Trainer (`module.py` aside) or of serving; those import this room.
"""
