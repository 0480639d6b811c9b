"""nanotron: a folder per step, a safetensors file per parameter and tensor-parallel rank, torch archives for Adam."""
