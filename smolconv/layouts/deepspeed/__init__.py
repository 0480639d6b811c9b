"""DeepSpeed: ZeRO 0 to 3 on any number of ranks, and universal checkpoints."""

from smolconv.layouts.deepspeed.groups import with_adam
from smolconv.layouts.deepspeed.reader import read_deepspeed
from smolconv.layouts.deepspeed.writer import DeepSpeedOptions, plan_deepspeed

__all__ = ["DeepSpeedOptions", "plan_deepspeed", "read_deepspeed", "with_adam"]
