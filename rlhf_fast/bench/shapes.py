"""Sizes of real models and batches, by name. A case takes its numbers from here.

N rows (tokens), V vocabulary, H hidden size, B sequences, T tokens per response, P prompts, K
completions per prompt.
"""

# Vocabularies.
GPT2 = 50257
LLAMA2 = 32000
QWEN2 = 151936

# Rows of logits. A policy update of 16 responses of 128 tokens is 2048 rows.
LOGITS = {"N": 2048, "V": GPT2}
LOGITS_BACKWARD = {"N": 1024, "V": GPT2}
LOGITS_KL = {"N": 512, "V": GPT2}
LOGITS_GPU = {"N": 4096, "V": QWEN2}
LOGITS_QUICK = {"N": 16, "V": 1000}

# Padded responses: InstructGPT's batch with a long response, and few very long ones.
TOKENS = {"B": 256, "T": 1024}
TOKENS_LONG = {"B": 8, "T": 32768}
TOKENS_GPU = {"B": 512, "T": 4096}
# Few long rows, a batch of losses, and as many tokens as a large run has in one update.
TOKENS_GPU_LONG = {"B": 16, "T": 65536}
TOKENS_GPU_LOSS = {"B": 256, "T": 4096}
TOKENS_GPU_MANY = {"B": 4096, "T": 8192}
TOKENS_QUICK = {"B": 8, "T": 64}

# Hidden states and a head. 512 x 32000 is a model that trains on a CPU; at HEAD_GPU other projects
# have published times.
HEAD = {"N": 2048, "H": 512, "V": LLAMA2}
HEAD_SHORT = {"N": 512, "H": 512, "V": LLAMA2}
HEAD_GPU = {"N": 8192, "H": 4096, "V": 131072}
HEAD_QUICK = {"N": 16, "H": 32, "V": 500}

# One decoding step of B sequences.
DECODE = ({"B": 16, "V": GPT2}, {"B": 64, "V": GPT2})
DECODE_GPU = {"B": 64, "V": QWEN2}
DECODE_QUICK = {"B": 4, "V": 1000}

# Slots, query heads, key heads, room for tokens, head size: Llama-3-8B.
ATTENTION = {"B": 16, "Hq": 32, "Hk": 8, "C": 1024, "D": 128}
ATTENTION_SHARED = {"B": 16, "P": 2, "Hq": 32, "Hk": 8, "Cp": 1024, "C": 128, "D": 128}
ATTENTION_GPU = {"B": 64, "Hq": 32, "Hk": 8, "C": 2048, "D": 128}
ATTENTION_QUICK = {"B": 3, "Hq": 4, "Hk": 2, "C": 40, "D": 16}

# One token of each of N slots through a layer: the MLP of a 1.5 B model, and a head.
LINEAR_LAYER = {"N": 16, "H": 2048, "O": 5632}
LINEAR_HEAD = {"N": 16, "H": 512, "O": LLAMA2}
LINEAR_QUICK = {"N": 3, "H": 40, "O": 50}

# Prompts and their completions: InstructGPT ranks up to 9, GRPO groups have 8.
RANKING = {"P": 64, "K": 9}
GROUPS = {"P": 512, "K": 8}
RANKING_QUICK = {"P": 4, "K": 4}
