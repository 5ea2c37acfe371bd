"""parallel: how the same mathematics is spread over ranks.

Here, and nowhere else: torch.distributed, deepspeed, megatron.core. Not here: the loop, files of a run other than
checkpoint shards, the command line. Imports configs and model; changes the model from outside through its seams.
"""
