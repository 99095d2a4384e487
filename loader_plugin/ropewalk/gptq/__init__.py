"""The GPTQ format on disk ends here: codes, zero points, groups, shapes, one plain linear."""
