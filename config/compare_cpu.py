# What compare.py trains where there is no GPU: every variant 192 wide and 4 layers deep, with as many FLOPs a token in
# its MLPs, at 2.4M to 6.1M parameters. A budget of 1e13 FLOPs is 2 to 5 minutes on a CPU core.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
data = "data/stdlib"

n_layer = 4
n_head = 4
n_embd = 192
block_size = 256
# What each variant takes of these: a variant of one's own finds its sizes here, too.
where_present = dict(
    n_inner=512,
    rope_theta=1000.0,
    local_rope_theta=1000.0,
    n_kv_head=2,
    head_dim=48,
    # a mixture of experts
    n_expert=16,
    n_expert_per_token=4,
    n_expert_inner=128,  # 4 * 128 = 512
    # latent attention
    kv_rank=64,
    nope_dim=32,
    rope_dim=16,
    v_dim=48,
    # delta layers
    n_key_head=2,
    n_value_head=4,
    key_dim=48,
    value_dim=48,
    # windows, slots and blocks for 256 tokens
    window=64,
    n_slot=4,
    key_block=16,
    n_local_block=2,
    top_k_block=3,
    # an indexer, beside latent attention whose queries are made from x
    q_rank=0,
    n_index_head=4,
    index_dim=24,
    index_topk=64,
)
if model == "sliding":
    layer_pattern = "llla"  # of the usual llllla four layers would all be local

batch_tokens = 2048  # 8 * 256
micro_batch = 8
learning_rate = 5e-3
warmup_steps = 20
schedule = "wsd"
decay_fraction = 0.6
beta2 = 0.98  # few tokens a step: average over more steps
muon_momentum = 0.9
muon_steps = 3
eval_tokens = 32768
log_every = 50
