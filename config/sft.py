# Teaches a base model to answer: Qwen3-0.6B on the 200,000 chats of UltraChat, once, on one GPU with 80 GB. About
# 230M tokens are 1e18 FLOPs; not timed yet.
# The weights: a folder qwen3 with the files of Qwen/Qwen3-0.6B-Base; a run of train.py does as well, and its tokenizer.
# The data: python data/prepare.py ultrachat --chat --tokenizer qwen3/tokenizer.json
init_from = "qwen3"
data = "data/ultrachat"
out_dir = "out/sft"

pack = "documents"  # whole conversations in a window
document_mask = True  # which do not see each other
long_documents = "skip"

block_size = 4096
batch_tokens = 131072  # 32 * 4096
micro_batch = 4
max_steps = 1800  # 1,800 * 131,072 = 236M tokens
optimizer = "adamw"  # of which the weights come: Muon does best on what it trained itself
learning_rate = 2e-5
min_lr = 2e-6
warmup_steps = 50
weight_decay = 0.0
eval_every = 200
eval_tokens = 2097152
gradient_checkpointing = True
