"""data_prep: text in, verified token shards out.

Here: the on-disk format (writer and reader side by side), readers of raw sources, the tokenizer, `glam prep`.
Not here: torch, batches, epochs or mixing (the trainer's data module), and any question about ranks or devices.
This room imports configs only. The trainer comes in by `data_prep.format` alone, which needs numpy and nothing else.
"""
