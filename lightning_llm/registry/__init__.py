"""Registered models: versions with digests, metrics, lineage and aliases, in a folder, a bucket, MLflow or W&B."""

from lightning_llm.registry.base import LATEST, Lineage, ModelRegistry, ModelVersion
from lightning_llm.registry.content import FileRecord, VerificationError
from lightning_llm.registry.opening import open_registry, register

__all__ = [
    "LATEST",
    "FileRecord",
    "Lineage",
    "ModelRegistry",
    "ModelVersion",
    "VerificationError",
    "open_registry",
    "register",
]
