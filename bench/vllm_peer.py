"""vLLM as a contender of bench/rollout.py, in its own environment: `PYTHON bench/vllm_peer.py MODEL [ADAPTER]`.

A line of JSON asks, one answers: {"prompts": [[ids]], "new": n, "sample": bool} gives {"tokens": [[ids]]}. The engine has the processors
that this process may use, no prefix cache (every round has the same prompts) and, as every contender, no end-of-sequence. It answers
an empty line when it is ready. With an adapter all completions are by it; without one it has no layers for adapters.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    model, adapter = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {} if adapter is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=256,
        enable_prefix_caching=False,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        **lora,
    )
    request = None if adapter is None else LoRARequest("policy", 1, adapter)
    print(file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        options = {"temperature": 1.0} if asked["sample"] else {"temperature": 0.0}
        sampling = SamplingParams(max_tokens=asked["new"], ignore_eos=True, logprobs=0, detokenize=False, **options)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        found = llm.generate(prompts, sampling, use_tqdm=False, lora_request=request)
        print(json.dumps({"tokens": [list(out.outputs[0].token_ids) for out in found]}), file=answers, flush=True)


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
