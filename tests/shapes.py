"""The shapes that tests and benchmarks share: those of EVA-CLIP's towers, and awkward neighbours."""

TOKENS = (1, 2, 17, 50, 64, 77, 99, 128, 129, 197, 256, 257, 289, 577)
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 112, 128)
ROW_LENGTHS = (768, 1024, 1408, 1792, 2048, 2730, 4096, 5120, 6144, 15360, 1009)
