"""The settings of every command as frozen dataclasses; `rlhf_fast.config` reads, checks and writes them."""
