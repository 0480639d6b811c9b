"""DeepSpeed: ZeRO 0 to 3 on any number of ranks, and universal checkpoints."""
