"""The names that TensorRT-LLM users import from `tensorrt_llm.executor`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoRARequest:
    """The adapter that a request asks for; this release refuses every request with one.

    Attributes:
        lora_name: what the adapter is called.
        lora_int_id: a number that tells it from others, None where the name is enough.
        lora_path: its folder. ValueError where that does not exist.
    """

    lora_name: str
    lora_int_id: int | None = None
    lora_path: str = ""

    def __post_init__(self) -> None:
        if not self.lora_path or not Path(self.lora_path).exists():
            raise ValueError(f"LoRARequest.lora_path = {self.lora_path!r} does not exist: give the adapter's folder")
