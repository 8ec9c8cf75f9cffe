# The cold start of thinking: a base model, Qwen3-0.6B, learns to work out problems of mathematics between <think> and
# </think>, before reinforcement learning makes it better at that. One GPU with 80 GB; 524M tokens are 2e18 FLOPs; not
# timed yet.
# The weights: a folder qwen3 with the files of Qwen/Qwen3-0.6B-Base; a run of train.py does as well, and its tokenizer.
# The data, solutions as thinking and their results as answers; --skip_bad leaves out proofs, which have no result:
#   python data/prepare.py numinamath --chat --think --skip_bad --tokenizer qwen3/tokenizer.json
#   python data/prepare.py openmathinstruct --chat --think --skip_bad --tokenizer qwen3/tokenizer.json
init_from = "qwen3"
data = ["data/numinamath:0.5", "data/openmathinstruct:0.5"]
out_dir = "out/sft_thinking"

pack = "documents"  # whole conversations in a window
document_mask = True  # which do not see each other
long_documents = "skip"  # half a chain of thought would teach to stop, or to begin, in the middle

block_size = 8192
batch_tokens = 262144  # 32 * 8192
micro_batch = 2
max_steps = 2000  # 2,000 * 262,144 = 524M tokens
optimizer = "adamw"  # of which the weights come: Muon does best on what it trained itself
learning_rate = 2e-5
min_lr = 2e-6
warmup_steps = 100
weight_decay = 0.0
eval_every = 200
eval_tokens = 2097152
gradient_checkpointing = True
