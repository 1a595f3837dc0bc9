# SPDX-License-Identifier: MIT
"""Contract 3.7: engram and all-gather sessions."""

import pytest
import torch
from deep_ep import ElasticBuffer, Error

from v2 import RANKS, exchange


def test_3_7_all_gather_sessions():
    def body(buffer, tokens):
        size = ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, [(2, 3), (5,)], torch.bfloat16)
        buffer.agrs_set_config(size, 2)
        with buffer.agrs_new_session():
            a, b = buffer.agrs_get_inplace_tensor([(2, 3), (5,)], torch.bfloat16)
            a.fill_(buffer.rank_idx), b.fill_(-buffer.rank_idx)
            all_a, all_b, wait = buffer.all_gather((a, b))
            wait()
        with pytest.raises(Error, match="session"):
            buffer.all_gather(a)
        return all_a, all_b

    for all_a, all_b in exchange(body)[0]:
        assert all_a.shape == (RANKS, 2, 3) and all_b.shape == (RANKS, 5)
        assert all_a[:, 0, 0].tolist() == [0, 1, 2, 3] and all_b[:, 4].tolist() == [0, -1, -2, -3]


def test_3_7_engram_fetches_entries_of_all_ranks():
    def body(buffer, tokens):
        entries = 6
        table = (
            torch.arange(entries * 4, dtype=torch.float32).view(entries, 4).to(torch.bfloat16) + 100 * buffer.rank_idx
        )
        buffer.engram_write(table)
        wanted = torch.randint(0, RANKS * entries, (3 + buffer.rank_idx, 2), dtype=torch.int32)
        data, sf = buffer.engram_fetch(wanted)()
        assert sf is None
        flat = wanted.flatten().long()
        expected = (flat % entries * 4).unsqueeze(1) + torch.arange(4) + (flat // entries * 100).unsqueeze(1)
        return data, expected.view(wanted.size(0), -1).to(torch.bfloat16)

    for data, expected in exchange(body)[0]:
        assert torch.equal(data, expected)


@pytest.mark.parametrize("tma", [False, True], ids=["row-major", "tma"])
def test_3_7_engram_brings_fp8_entries_and_their_scales(tma):
    entries, hidden = 5, 128

    def body(buffer, tokens):
        random = torch.Generator().manual_seed(3)
        all_sf = torch.rand((RANKS * entries, 2), generator=random)
        table = torch.randn((RANKS * entries, hidden), generator=random).to(torch.float8_e4m3fn)
        first = buffer.rank_idx * entries
        with pytest.raises(Error, match="sf"):
            buffer.engram_write(table[first : first + entries])
        buffer.engram_write(table[first : first + entries], all_sf)
        wanted = torch.randint(0, RANKS * entries, (3, 2), dtype=torch.int32, generator=random)
        with pytest.raises(Error, match="indices"):
            buffer.engram_fetch(wanted + RANKS * entries)
        data, sf = buffer.engram_fetch(wanted, use_tma_aligned_col_major_sf=tma)()
        flat = wanted.flatten().long()
        expected = table.view(torch.uint8)[flat].view(3, -1)
        return torch.equal(data.view(torch.uint8), expected), torch.equal(sf, all_sf[flat].view(3, -1)), sf.stride()

    for same_data, same_sf, stride in exchange(body)[0]:
        assert same_data and same_sf and stride == ((1, 4) if tma else (4, 1))


def test_3_7_gathers_interleave_alone_and_in_batches_within_the_sessions_limits():
    def body(buffer, tokens):
        a, b = torch.full((4,), buffer.rank_idx), torch.full((2, 2), buffer.rank_idx + 0.5)
        size = ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, (4,), torch.int64)
        size += ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, [(2, 2)] * 2, torch.float32)
        assert ElasticBuffer.get_agrs_buffer_size_hint(buffer.group, size) % (2 << 20) == 0
        buffer.agrs_set_config(size, 2)
        with buffer.agrs_new_session(enabled=False):
            pass
        buffer.create_agrs_session()
        with pytest.raises(Error, match="open already"):
            buffer.create_agrs_session()
        own = buffer.agrs_get_inplace_tensor((4,), torch.int64)
        own.copy_(a)
        all_a, wait_a = buffer.all_gather(own)
        all_b, all_c, wait_b = buffer.all_gather([b, b + 1])
        wait_b(), wait_a()
        with pytest.raises(Error, match="3 gathers"):
            buffer.all_gather(a)
        buffer.destroy_agrs_session()
        return all_a, all_b, all_c

    for all_a, all_b, all_c in exchange(body)[0]:
        assert all_a[:, 0].tolist() == [0, 1, 2, 3]
        assert all_b[:, 1, 1].tolist() == [0.5, 1.5, 2.5, 3.5] and torch.equal(all_c, all_b + 1)
