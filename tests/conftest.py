"""What must hold before torch is imported: distributed tests fork, and a forked child must not meet OpenMP threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("KMP_INIT_AT_FORK", "FALSE")

import warnings

import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
