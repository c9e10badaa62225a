"""What an engine may be told when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bluejay.errors import ConfigError

if TYPE_CHECKING:  # a server holds options and does without torch: what asks for it below imports it
    import torch

    from bluejay.model import ModelConfig

CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8")  # PyTorch's names
CACHE_SHARE = 0.5  # of what is free: the rest is for a step's activations, and for whoever else is on the machine
MOST_STALL = 1_000_000  # times: what it allows is counted in tokens, and infinity cannot be


@dataclass(frozen=True)
class EngineOptions:
    """How an engine uses its machine.

    Attributes:
        max_num_sequences: sequences that run together; a request that has more by itself runs alone.
        max_batch_tokens: tokens that a step reads; prompts are read in chunks that leave room for those that decode.
        max_stall: how many times as long as a step without prompts a step may take while sequences decode. Chunks of
            prompts are cut accordingly, but not below what fits into 20 ms; 0 lets them be as long as
            `max_batch_tokens` says. At most 1,000,000.
        cache_memory_bytes: of the keys and values; None: half of what is free, but not more than `max_num_sequences`
            whole contexts take.
        cache_dtype: of keys and values: "float32", "float16", "bfloat16", "int8", which holds nearly twice as many
            tokens as 16 bits and rounds them more, or "auto": float16, and bfloat16 for a model that computes in it.
        block_size: tokens in a block of the cache.
        prefix_cache: whether beginnings of prompts that were seen before are found in the cache.

    Raises: ConfigError with everything that is wrong at once.
    """

    max_num_sequences: int = 64
    max_batch_tokens: int = 512
    max_stall: float = 2.0
    cache_memory_bytes: int | None = None
    cache_dtype: str = "auto"
    block_size: int = 16
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, expected a whole number, {least} or more"
            for name, least in (("max_num_sequences", 1), ("max_batch_tokens", 1), ("block_size", 1))
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        if type(self.max_stall) not in (int, float) or not (self.max_stall == 0 or 1 < self.max_stall <= MOST_STALL):
            problems.append(
                f"max_stall is {self.max_stall!r}, expected a number above 1 to {MOST_STALL:,}, or 0 for no limit"
            )
        if self.cache_memory_bytes is not None and (
            type(self.cache_memory_bytes) is not int or self.cache_memory_bytes < 1
        ):
            problems.append(f"cache_memory_bytes is {self.cache_memory_bytes!r}, expected a whole number, 1 or more")
        if type(self.prefix_cache) is not bool:
            problems.append(f"prefix_cache is {self.prefix_cache!r}, expected True or False")
        if self.cache_dtype not in ("auto", *CACHE_DTYPES):
            problems.append(f"cache_dtype is {self.cache_dtype!r}, expected auto, {', '.join(CACHE_DTYPES)}")
        if problems:
            raise ConfigError("; ".join(problems))

    def torch_cache_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype of keys and values of a model that computes in `model_dtype`."""
        import torch

        if self.cache_dtype == "auto":
            return torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16
        dtype: torch.dtype = getattr(torch, self.cache_dtype)
        return dtype

    def num_blocks(
        self, config: ModelConfig, cache_dtype: torch.dtype, device: torch.device, *, beside_bytes: int = 0
    ) -> int:
        """The blocks that fit into the memory budget.

        Args:
            beside_bytes: what a draft model keeps of each token.
        Raises: ConfigError if not one block fits.
        """
        from bluejay.engine.kv_cache import bytes_per_token
        from bluejay.model.device import free_memory_bytes

        block_bytes = self.block_size * (bytes_per_token(config, cache_dtype) + beside_bytes)
        budget = self.cache_memory_bytes
        if budget is None:
            whole = self.max_num_sequences * -(-config.n_positions // self.block_size)
            return max(1, min(int(CACHE_SHARE * free_memory_bytes(device)) // block_bytes, whole))
        if budget < block_bytes:
            raise ConfigError(
                f"cache_memory_bytes is {budget:,}, and a block of {self.block_size} tokens takes {block_bytes:,}; "
                f"give at least that"
            )
        return budget // block_bytes
