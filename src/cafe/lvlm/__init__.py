"""Everything that knows a transformers model: loading, prompts, processing, forward passes, and the table of families.

To add a family, see `cafe.lvlm.families`; nothing outside this package names one, which a test holds.
"""
