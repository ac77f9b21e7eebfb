"""Text -> tokens -> packed, resumable batches. The Trainer and the command line call this room; it calls litdata.

`tokenize.tokenize` makes a tokenised corpus (a folder), `module.TokenDataModule` reads it for training. This room knows
neither models nor strategies: which part of a batch a process reads comes from the Trainer that it runs under.
"""
