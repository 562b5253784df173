"""Raw text -> shards of tokens -> the batches of one rank, in flow order.

listing -> streams, records, tables -> documents -> survey -> tokenizer -> shards -> build; then split reader ->
permutation -> loader, and the bigram baseline. Of a build that is there: verification, inspection, and megatron, which
writes it in another format. Imports from `moe_dist` only `errors` and `config`.
"""
