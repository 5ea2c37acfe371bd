"""Benchmarks: one file a question, our code beside its peers in the same run, answers as ratios.

    python -m benchmarks.moe_layer          our MoE layer against a dense layer, DeepSpeed, Megatron-core, transformers
    python -m benchmarks.vocabulary_loss    the chunked loss against all logits at once
    python -m benchmarks.training_step      our trainer against a bare PyTorch loop; an MoE step against a dense one
    python -m benchmarks.startup            from the command to the first step

Run from the checkout. Each takes --quick (under a minute on two cores) and --json (one object on standard output).
`timing` holds the stopwatch and the scales, `report` the table and the arguments, `moe_peers` the other people's
layers. May import every room and every peer; nothing imports it but its tests. Nothing here asserts a speed.
"""
