# SPDX-License-Identifier: MIT
"""The exchange that the tests of ElasticBuffer share."""

from deep_ep import ElasticBuffer

from ranks import make_tokens, run_ranks

RANKS, EXPERTS, HIDDEN, TOPK, MAX_TOKENS = 4, 16, 256, 4, 24
LOCAL = EXPERTS // RANKS


def exchange(body, num_ranks=RANKS, **options):
    def run(group):
        tokens = make_tokens(group.rank(), MAX_TOKENS - group.rank(), HIDDEN, TOPK, EXPERTS)
        with ElasticBuffer(
            group, num_max_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_gpu_timeout_secs=20, **options
        ) as b:
            return tokens, body(b, tokens)

    results = run_ranks(num_ranks, run)
    return [result for _, result in results], [tokens for tokens, _ in results]


def align(value, to):
    return -(-value // to) * to


def slot_counts(expected):
    return [int((expected.topk_idx == e).sum()) for e in range(LOCAL)]


def source_ranks(handle):
    rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    return handle.recv_src_metadata[:rows, 0] // MAX_TOKENS
