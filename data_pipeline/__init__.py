"""Raw text -> shards of tokens -> the batches of one rank, in flow order.

listing -> documents -> survey -> tokenizer -> shards -> build; then split reader -> permutation -> loader, and the
bigram baseline. Imports from `moe_dist` only `errors` and `config`.
"""
